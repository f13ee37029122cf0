"""The PTB Diagnostic ECG Database: as published, and as a cohort of the challenges.

- As published: patientNNN/sXXXX?re.{hea,dat,xyz}, 15 leads at 1000 Hz (12 and the three of Frank, which are left out),
  a clinical summary in the header's comments. Of that, age, sex, the reason for admission and the places of infarction
  are used; names of drugs, dates and everything else never leave the header.
- As a cohort: S0001 to S0549 with SNOMED codes (`readers_cinc.py`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from evlecg.data.gates import mend
from evlecg.data.labels import ptb_labels
from evlecg.data.readers_base import Dropped, Listing, Reading, ReadOptions, Source, parse_age, parse_sex, split_of
from evlecg.data.readers_cinc import CincEntry, all_named, is_cohort, list_cinc, open_cohorts, stem_of
from evlecg.data.readers_wfdb import read_header, read_signal
from evlecg.schema import Record

_PATIENT = re.compile(r"patient\d{3}")
_RECORD = re.compile(r"s\d{4}[a-z_]*re")


class _Native(NamedTuple):
    id: str
    header: str
    patient_id: str


def is_ptb(folder: Path) -> bool:
    if is_cohort("S", folder):
        return True
    if any(_PATIENT.fullmatch(path.name) for path in folder.glob("patient*")):
        return True
    return not _PATIENT.fullmatch(folder.name) and all_named(folder, ".hea", _RECORD.fullmatch)


def open_ptb(source: Source, options: ReadOptions) -> Reading:
    """Records in either form; the native one goes first where a folder holds both."""

    def read(entry: _Native | CincEntry) -> Record:
        if isinstance(entry, _Native):
            return _read_native(source, entry, options)
        return cohort.read(entry)

    cohort = open_cohorts("S", source, options)
    return Reading(None, Listing(lambda: _list(source, options)), lambda entry: entry.id, read)


def _list(source: Source, options: ReadOptions) -> list[_Native] | list[CincEntry]:
    headers = source.find(".hea")
    native = []
    for header in headers:
        if _RECORD.fullmatch(stem_of(header)):
            folder = header.rpartition("/")[0].rpartition("/")[2] or source.root.name
            patient = folder if _PATIENT.fullmatch(folder) else ""
            name = f"{patient}/{stem_of(header)}" if patient else stem_of(header)
            native.append(_Native(name, header, patient or name))
    return native or list_cinc(source, "S", headers, options)


def _read_native(source: Source, entry: _Native, options: ReadOptions) -> Record:
    header = read_header(source, entry.header)
    reason = header.field("Reason for admission")
    labels = ptb_labels(
        options.labels,
        reason,
        header.field("Acute infarction (localization)"),
        header.field("Former infarction (localization)"),
    )
    if not labels and reason.lower() in ("", "n/a", "unknown"):
        raise Dropped("no diagnosis")
    raw = read_signal(source, header)
    mended = mend(raw.values, raw.leads, raw.units, header.fs_hz)
    return Record(
        id=entry.id,
        patient_id=entry.patient_id,
        signal_mV=mended.signal_mV,
        fs_hz=header.fs_hz,
        labels=labels,
        split=split_of(entry.patient_id, options.seed),
        age=parse_age(header.field("age")),
        sex=parse_sex(header.field("sex")),
        repairs=(*header.repairs, *mended.repairs),
    )
