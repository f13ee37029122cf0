"""CPSC2018: as the challenges have it, and as it was first published.

- The challenges' form is that of `readers_cinc.py`, with SNOMED codes, or (first release) names of its nine classes.
- The native form is a MATLAB structure a record, `ECG` with `sex`, `age` and `data` (12 leads in the usual order, mV,
  500 Hz), in folders TrainingSet1 to 3, and REFERENCE.csv: Recording, First_label, Second_label, Third_label, the
  classes numbered 1 to 9. Their order carries no meaning.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evlecg.data.gates import Unfit, mend
from evlecg.data.labels import CPSC_NAMES, CPSC_NUMBERS, CPSC_SNOMED, cpsc_labels
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
from evlecg.data.readers_cinc import CincEntry, all_named, is_cohort, list_cinc, read_cinc, stem_of
from evlecg.schema import LEADS, Record

FS_HZ = 500.0
_ID = re.compile(r"A\d{4}")
_LABELS = ("First_label", "Second_label", "Third_label")


class _Native(NamedTuple):
    id: str
    path: str  # of the .mat, below the source's root
    classes: frozenset[str]  # as labels of ours


def is_cpsc2018(folder: Path) -> bool:
    if is_cohort("A", folder):
        return True
    for table in folder.glob("REFERENCE*.csv"):
        with table.open(encoding="utf-8-sig", errors="replace") as file:
            if _LABELS[0] in file.readline():
                return True
    return all_named(folder, ".mat", _ID.fullmatch) and not any(names_in(folder, ".hea"))


def open_cpsc2018(source: Source, options: ReadOptions) -> Reading:
    """The records A0001 to A6877: those with headers, among other cohorts or alone; without any, the native ones."""

    def labels(cohort: str, diagnoses: tuple[str, ...]) -> dict[str, bool]:
        known = CPSC_NAMES | CPSC_SNOMED
        classes = {known[item] for item in diagnoses if item in known}
        if not classes:
            raise Dropped("none of the nine classes")
        return cpsc_labels(options.labels, classes)

    def read(entry: CincEntry | _Native) -> Record:
        if isinstance(entry, CincEntry):
            return read_cinc(source, entry, labels, options.seed)
        return _read_native(source, entry, options)

    return Reading(None, Listing(lambda: _list(source, options)), lambda entry: entry.id, read)


def _list(source: Source, options: ReadOptions) -> list[CincEntry] | list[_Native]:
    found = source.find((".hea", ".mat", ".csv"))
    named = [path for path in found if path.endswith(".hea") and _ID.fullmatch(stem_of(path))]
    headers = list_cinc(source, "A", named, options)
    if headers:
        return headers
    classes: dict[str, frozenset[str]] = {}
    for path in found:
        if stem_of(path).startswith("REFERENCE") and path.endswith(".csv"):
            classes |= _read_reference(source.text(path))
    mats = [path for path in found if path.endswith(".mat") and _ID.fullmatch(stem_of(path))]
    return [_Native(stem_of(path), path, classes.get(stem_of(path), frozenset())) for path in mats]


def _read_reference(text: str) -> dict[str, frozenset[str]]:
    """Recording -> classes; a number beyond 1 to 9 is none."""
    rows = csv.DictReader(io.StringIO(text, newline=""))
    if not {"Recording", _LABELS[0]} <= set(rows.fieldnames or ()):
        return {}
    numbers = {row["Recording"]: [(row.get(name) or "").strip() for name in _LABELS] for row in rows}
    return {
        name: frozenset(
            CPSC_NUMBERS[item.removesuffix(".0")] for item in items if item.removesuffix(".0") in CPSC_NUMBERS
        )
        for name, items in numbers.items()
    }


def _read_native(source: Source, entry: _Native, options: ReadOptions) -> Record:
    if not entry.classes:
        raise Dropped("no diagnosis")
    signal, sex, age = _load_structure(source.read(entry.path))
    mended = mend(signal, LEADS, ("mV",) * len(LEADS), FS_HZ)
    return Record(
        id=entry.id,
        patient_id=entry.id,
        signal_mV=mended.signal_mV,
        fs_hz=FS_HZ,
        labels=cpsc_labels(options.labels, entry.classes),
        split=split_of(entry.id, options.seed),
        age=parse_age(age),
        sex=parse_sex(sex),
        repairs=mended.repairs,
    )


def _load_structure(data: bytes) -> tuple[np.ndarray, str, str]:
    """Signal [12, T], sex and age of a MATLAB file."""
    from scipy.io import loadmat

    try:
        structure = loadmat(io.BytesIO(data), variable_names=["ECG"])["ECG"][0, 0]
        sex, age = (str(np.ravel(structure[name])[0]) for name in ("sex", "age"))
        return np.asarray(structure["data"], np.float64), sex, age
    except Exception as error:  # scipy raises what its parser stumbles over: zlib.error, struct.error, TypeError, ...
        raise Unfit("malformed MATLAB file") from error
