"""The PhysioNet/CinC challenges of 2020 and 2021, and CPSC2018 in their form.

One header and one `.mat` (format 16 behind 24 bytes) for each record, diagnoses in the header's comments: SNOMED codes,
or names in the first release of CPSC2018. The record's cohort is the folder below `training/`, else its name says it.
Patients are not identified: every record counts as a patient of its own.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from evlecg.data.gates import mend
from evlecg.data.labels import (
    COHORTS,
    CPSC_NAMES,
    CPSC_SNOMED,
    SIDECAR_NAMES,
    cinc_labels,
    cpsc_labels,
)
from evlecg.data.readers_base import Dropped, Reading, ReadOptions, Source, parse_age, parse_sex, split_of
from evlecg.data.readers_wfdb import read_header, read_signal, with_gain
from evlecg.schema import Record

# Gains of early releases, where 1000 is true; None is a header without one.
WRONG_GAINS: frozenset[float | None] = frozenset({None, 200.0, 4880.0, 2_000_000.0})
TRUE_GAIN = 1000.0
CPSC_ID = re.compile(r"A\d{4}")
LAST_CHAPMAN = 10646  # JS numbers above it are Ningbo
_NAMES = (
    (re.compile(r"A\d{4}"), "A"),
    (re.compile(r"Q\d{4}"), "Q"),
    (re.compile(r"I\d{4}"), "I"),
    (re.compile(r"S\d{4}"), "S"),
    (re.compile(r"HR\d{5}"), "P"),
    (re.compile(r"E\d{5}"), "E"),
    (re.compile(r"S\d{5}"), "N"),  # one Ningbo record lost the J of its name
)
SIDECAR = "labels.csv"


# path of a header, diagnoses -> labels
_Labels = Callable[[str, tuple[str, ...]], dict[str, bool]]


@dataclass(frozen=True)
class _Entry:
    id: str
    header: str  # path below the source's root


def is_cinc2021(folder: Path) -> bool:
    if any((folder / cohort).is_dir() or (folder / "training" / cohort).is_dir() for cohort in COHORTS):
        return True
    return any(path.with_suffix(".mat").exists() for path in folder.glob("*.hea"))


def is_cpsc2018(folder: Path) -> bool:
    ids = [path.stem for path in folder.glob("*.hea")]
    return bool(ids) and all(CPSC_ID.fullmatch(name) for name in ids)


def cohort_of(header: str) -> str:
    """Letter of a record's cohort (`labels.COHORTS`) from the path of its header; "" where nothing tells."""
    *folders, name = header.removesuffix(".hea").split("/")
    for folder in folders:
        if folder in COHORTS:
            return COHORTS[folder]
    if match := re.fullmatch(r"JS(\d{5})", name):
        return "C" if int(match[1]) <= LAST_CHAPMAN else "N"
    return next((letter for pattern, letter in _NAMES if pattern.fullmatch(name)), "")


def open_cinc2021(source: Source, options: ReadOptions) -> Reading:
    """Every header below the source, of any cohort."""

    def labels(header: str, diagnoses: tuple[str, ...]) -> dict[str, bool]:
        codes = {SIDECAR_NAMES.get(item.casefold(), item) for item in diagnoses}
        normal = any(item.casefold() in ("norm", "normal") for item in diagnoses)
        return cinc_labels(options.labels, codes, cohort=cohort_of(header), normal=normal)

    return _open(source, options, [_Entry(_id(path), path) for path in source.find(".hea")], labels)


def open_cpsc2018(source: Source, options: ReadOptions) -> Reading:
    """The records named A0001 to A6877, in a folder of their own or among the other cohorts."""
    entries = [_Entry(_id(path), path) for path in source.find(".hea") if CPSC_ID.fullmatch(_id(path))]

    def labels(header: str, diagnoses: tuple[str, ...]) -> dict[str, bool]:
        known = CPSC_NAMES | CPSC_SNOMED
        classes = {known[item] for item in diagnoses if item in known}
        if not classes:
            raise Dropped("none of the nine classes")
        return cpsc_labels(options.labels, classes)

    return _open(source, options, entries, labels)


def _id(header: str) -> str:
    return header.rpartition("/")[2].removesuffix(".hea")


def _open(source: Source, options: ReadOptions, entries: list[_Entry], labels: _Labels) -> Reading:
    sidecar = _read_sidecar(source)

    def read(entry: _Entry) -> Record:
        header = with_gain(read_header(source, entry.header), WRONG_GAINS, TRUE_GAIN)
        diagnoses = tuple(item.strip() for item in header.field("Dx").split(",") if item.strip())
        diagnoses = tuple(item for item in diagnoses if item.lower() not in ("unknown", "nan"))
        diagnoses = diagnoses or sidecar.get(entry.id, ())
        if not diagnoses:
            raise Dropped("no diagnosis")
        raw = read_signal(source, header)
        mended = mend(raw.values, raw.leads, raw.units, header.fs_hz)
        return Record(
            id=entry.id,
            patient_id=entry.id,
            signal_mV=mended.signal_mV,
            fs_hz=header.fs_hz,
            labels=labels(entry.header, diagnoses),
            split=split_of(entry.id, options.seed),
            age=parse_age(header.field("Age")),
            sex=parse_sex(header.field("Sex")),
            repairs=(*header.repairs, *mended.repairs),
        )

    return Reading(len(entries), entries, lambda entry: entry.id, read)


def _read_sidecar(source: Source) -> dict[str, tuple[str, ...]]:
    """Record -> diagnoses by name, from a labels.csv beside the records; used where a header has lost its own."""
    if not source.exists(SIDECAR):
        return {}
    rows = csv.DictReader(io.StringIO(source.text(SIDECAR), newline=""))
    if not {"record", "labels"} <= set(rows.fieldnames or ()):
        return {}
    return {row["record"]: tuple(item for item in (row["labels"] or "").split("|") if item) for row in rows}
