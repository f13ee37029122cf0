"""The PhysioNet/CinC challenges of 2020 and 2021, whole or by cohort, and the Chapman-Shaoxing-Ningbo release.

One header and one `.mat` (format 16 behind 24 bytes) for each record, diagnoses in the header's comments: SNOMED codes,
or names in the first release of CPSC2018. The record's cohort is the folder below `training/`, else its name says it.

Patients are not identified, so a record counts as a patient of its own, except where something else tells:

- INCART and PTB have several records of most patients, and the challenge kept the order of the original databases:
  S0001 holds the samples of patient001/s0010_re, I0036 is the only number that is missing. Their numbers of records a
  patient (`INCART_RUNS`, `PTB_RUNS`) hence give the patient.
- HRnnnnn is PTB-XL's ecg_id nnnnn: with ptbxl_database.csv at the top of the folder, or in the user's copy of PTB-XL
  (`--signals ptb-xl=DIR`), its patients and folds are used. Without it, a patient with several records there may be in
  two splits.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from evlecg.data.gates import mend
from evlecg.data.labels import COHORTS, COHORTS_2020, SIDECAR_NAMES, cinc_labels
from evlecg.data.readers_base import (
    Dropped,
    Listing,
    Reading,
    ReadOptions,
    Source,
    names_in,
    parse_age,
    parse_sex,
    split_of,
)
from evlecg.data.readers_ptbxl import SPLIT_OF_FOLD
from evlecg.data.readers_wfdb import read_header, read_signal, with_gain
from evlecg.schema import Record

# Gains of early releases, where 1000 is true; None is a header without one.
WRONG_GAINS: frozenset[float | None] = frozenset({None, 200.0, 4880.0, 2_000_000.0})
TRUE_GAIN = 1000.0
LAST_CHAPMAN = 10646  # JS numbers above it are Ningbo
SIDECAR = "labels.csv"
_PTBXL_TABLE = "ptbxl_database.csv"
PTBXL_ROOTS = ("ptb-xl", "ptbxl")  # names under which the user's copy may be given
_NAMES = (
    (re.compile(r"A\d{4}"), "A"),
    (re.compile(r"Q\d{4}"), "Q"),
    (re.compile(r"I\d{4}"), "I"),
    (re.compile(r"S\d{4}"), "S"),
    (re.compile(r"HR\d{5}"), "P"),
    (re.compile(r"E\d{5}"), "E"),
    (re.compile(r"S\d{5}"), "N"),  # one Ningbo record lost the J of its name
)
# Records of patient 1, 2, ... in the order of the databases' RECORDS files; one digit a patient.
INCART_RUNS = "23213312232224232223223323332222"
PTB_RUNS = (
    "31125343134233334333334432333444444323344434443444411411111111114331411444444444444441344444544444"
    "43311111111111211121111110112111101011111111111111211111111211011221122111131111172111111112111111"
    "22112211111211111111111111211111211151131111211121111131111111111111111111111111134111131121111221"
)

# cohort letter, diagnoses -> labels
CincLabels = Callable[[str, tuple[str, ...]], dict[str, bool]]


class CincEntry(NamedTuple):
    """One record.

    Attributes:
        header: its path below the source's root.
        patient_id: as far as it is known.
        split: where the dataset brings one, else "".
        listed: diagnoses of a sidecar, for a header that lost its own.
    """

    id: str
    header: str
    cohort: str
    patient_id: str
    split: str
    listed: tuple[str, ...]


def stem_of(path: str) -> str:
    """File name without folders and suffix."""
    return path.rpartition("/")[2].rpartition(".")[0]


def is_cinc(folder: Path) -> bool:
    """The tree of a challenge, or any folder of headers with their .mat files."""
    if any((folder / cohort).is_dir() or (folder / "training" / cohort).is_dir() for cohort in COHORTS):
        return True
    return any((folder / f"{name}.mat").exists() for name in names_in(folder, ".hea"))


def is_cohort(letters: str, folder: Path) -> bool:
    """A folder of headers that all bear names of these cohorts."""
    return all_named(folder, ".hea", lambda name: (cohort_of(name) or "?") in letters)


def all_named(folder: Path, suffix: str, fits: Callable[[str], object]) -> bool:
    """Whether a folder has files with a suffix, and the names of all of them fit."""
    some = False
    for name in names_in(folder, suffix):
        if not fits(name):
            return False
        some = True
    return some


def is_csn(folder: Path) -> bool:
    return (folder / "WFDBRecords").is_dir() or is_cohort("CN", folder)


def cohort_of(header: str) -> str:
    """Letter of a record's cohort (`labels.COHORTS`) from the path of its header; "" where nothing tells."""
    *folders, name = header.removesuffix(".hea").split("/")
    for folder in folders:
        if folder in COHORTS:
            return COHORTS[folder]
    if match := re.fullmatch(r"JS(\d{5})", name):
        return "C" if int(match[1]) <= LAST_CHAPMAN else "N"
    return next((letter for pattern, letter in _NAMES if pattern.fullmatch(name)), "")


def patient_of(cohort: str, name: str) -> str:
    """A record's patient, where its number tells; else the record stands for its patient."""
    runs, prefix = {"S": (PTB_RUNS, "patient"), "I": (INCART_RUNS, "incart")}.get(cohort, ("", ""))
    number = int(name[1:]) if name[1:].isdigit() else 0
    if runs and 0 < number <= sum(map(int, runs)):
        return f"{prefix}{next(at for at, end in enumerate(accumulate(map(int, runs)), 1) if end >= number):03d}"
    return name


def open_cinc2021(source: Source, options: ReadOptions) -> Reading:
    """Every header below the source, of any cohort."""
    return open_cohorts("", source, options)


def open_cinc2020(source: Source, options: ReadOptions) -> Reading:
    """The headers of the six cohorts of 2020."""
    return open_cohorts(COHORTS_2020, source, options)


def open_cohorts(letters: str, source: Source, options: ReadOptions) -> Reading:
    """The records of some cohorts, with the labels of their SNOMED codes.

    Args:
        letters: of `labels.COHORTS`; "" for all headers, those of unknown cohorts included.
        source: any folder that holds them, among others or alone.
        options: how it is read.
    """

    def labels(cohort: str, diagnoses: tuple[str, ...]) -> dict[str, bool]:
        codes = {SIDECAR_NAMES.get(item.casefold(), item) for item in diagnoses}
        normal = any(item.casefold() in ("norm", "normal") for item in diagnoses)
        return cinc_labels(options.labels, codes, cohort=cohort, normal=normal)

    def read(entry: CincEntry) -> Record:
        return read_cinc(source, entry, labels, options.seed)

    entries = Listing(lambda: list_cinc(source, letters, source.find(".hea"), options))
    return Reading(None, entries, lambda entry: entry.id, read)


def list_cinc(source: Source, letters: str, headers: list[str], options: ReadOptions) -> list[CincEntry]:
    """Entries of those headers that belong to some cohorts (all for "")."""
    listed, ptbxl = _read_sidecar(source), _read_ptbxl_table(source, options)
    entries = []
    for header in headers:
        name, cohort = stem_of(header), cohort_of(header)
        if not letters or (cohort and cohort in letters):
            patient, split = ptbxl.get(name, ("", ""))
            entry = CincEntry(name, header, cohort, patient or patient_of(cohort, name), split, listed.get(name, ()))
            entries.append(entry)
    return entries


def read_cinc(source: Source, entry: CincEntry, labels: CincLabels, seed: int) -> Record:
    """One record in the challenges' form.

    Raises:
        Dropped: it has no diagnosis, neither in its header nor in a sidecar.
        Unfit, OSError, ValueError: as `read_header`, `read_signal` and `mend`.
    """
    header = with_gain(read_header(source, entry.header), WRONG_GAINS, TRUE_GAIN)
    diagnoses = tuple(item.strip() for item in header.field("Dx").split(",") if item.strip())
    diagnoses = tuple(item for item in diagnoses if item.lower() not in ("unknown", "nan")) or entry.listed
    if not diagnoses:
        raise Dropped("no diagnosis")
    found = labels(entry.cohort, diagnoses)  # before the signal: it may drop the record
    raw = read_signal(source, header)
    mended = mend(raw.values, raw.leads, raw.units, header.fs_hz)
    return Record(
        id=entry.id,
        patient_id=entry.patient_id,
        signal_mV=mended.signal_mV,
        fs_hz=header.fs_hz,
        labels=found,
        split=entry.split or split_of(entry.patient_id, seed),
        age=parse_age(header.field("Age")),
        sex=parse_sex(header.field("Sex")),
        repairs=(*header.repairs, *mended.repairs),
    )


def _read_sidecar(source: Source) -> dict[str, tuple[str, ...]]:
    """Record -> diagnoses by name, from a labels.csv beside the records; used where a header has lost its own."""
    if not source.exists(SIDECAR):
        return {}
    rows = csv.DictReader(io.StringIO(source.text(SIDECAR), newline=""))
    if not {"record", "labels"} <= set(rows.fieldnames or ()):
        return {}
    return {row["record"]: tuple(item for item in (row["labels"] or "").split("|") if item) for row in rows}


def _read_ptbxl_table(source: Source, options: ReadOptions) -> dict[str, tuple[str, str]]:
    """HR name -> patient and split, from PTB-XL's table at the top of the tree, or in the user's copy of PTB-XL."""
    copies = [Source(folder) for name, folder in options.signals.items() if name in PTBXL_ROOTS]
    source = next((place for place in (source, *copies) if place.exists(_PTBXL_TABLE)), source)
    if not source.exists(_PTBXL_TABLE):
        return {}
    return {
        f"HR{int(float(row['ecg_id'])):05d}": (
            str(int(float(row["patient_id"]))),
            SPLIT_OF_FOLD[int(float(row["strat_fold"]))],
        )
        for row in csv.DictReader(io.StringIO(source.text(_PTBXL_TABLE), newline=""))
    }
