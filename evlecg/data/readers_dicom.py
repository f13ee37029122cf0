"""DICOM ECG waveforms: a folder of `.dcm` files of the 12-lead, general (16 and 32 bit) and ambulatory classes.

A file holds multiplex groups; the rhythm group with most of the 12 leads is read, never the median beat. Leads are
named by code (SCP-ECG and MDC number them alike, as CID 3001 does), then by its meaning, then by the channel's label.

Nothing that could identify a patient enters: no names, numbers, dates or institutions, neither as fields nor inside the
report. Record and patient ids are hashes: of the file's path below the folder, and of the patient's number. The report
is what the cart or the reader wrote as annotations, less every statement that carries a date, a time, a long number, a
word like "confirmed by" or "physician", or any word of the file's own name, number, place and person fields.

Labels come from a table, as for WFDB folders (`readers_table.py`); without one, records have a report only.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from evlecg.data.gates import Unfit, lead_index, mend
from evlecg.data.identity import hashed, public_statements
from evlecg.data.readers_base import Dropped, Lazy, Reading, ReadOptions, Source, parse_age, parse_sex, split_of
from evlecg.data.readers_table import Row, holds_file, match_rows, read_table, wanted_labels
from evlecg.schema import Record

if TYPE_CHECKING:
    from pydicom import Dataset

SUFFIX = ".dcm"
ECG_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.9.1.1": "12-lead",
    "1.2.840.10008.5.1.4.1.1.9.1.2": "general",
    "1.2.840.10008.5.1.4.1.1.9.1.3": "ambulatory",
    "1.2.840.10008.5.1.4.1.1.9.1.4": "general, 32 bit",
}
MAX_DURATION_S = 3600.0  # a day of 12 leads would not fit into memory, and is no page
_LEAD_CODES = {1: "I", 2: "II", 61: "III", 62: "aVR", 63: "aVL", 64: "aVF"} | {k + 2: f"V{k}" for k in range(1, 7)}
_CODE = re.compile(r"(?:5\.6\.3-9-|2:)(\d+)")
_SAMPLE_TYPES = {
    (8, "SB"): "i1",
    (8, "UB"): "u1",
    (16, "SS"): "i2",
    (16, "US"): "u2",
    (32, "SL"): "i4",
    (32, "UL"): "u4",
}
_AGE = re.compile(r"(\d{1,3})([DWMY])")
_YEARS = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
_PRIVATE_FIELDS = (  # beside all person names
    "PatientID", "OtherPatientIDs", "PatientAddress", "PatientTelephoneNumbers", "InstitutionName",
    "InstitutionAddress",
    "InstitutionalDepartmentName", "StationName", "AccessionNumber", "AdmissionID", "StudyID", "CurrentPatientLocation",
    "PatientInstitutionResidence", "DeviceSerialNumber", "ReferringPhysicianAddress", "MilitaryRank", "Occupation",
)  # fmt: skip


def is_dicom(folder: Path) -> bool:
    return holds_file(folder, SUFFIX)


class _Entry(NamedTuple):
    """A file, or a row without one."""

    path: str
    row: Row | None = None
    problem: str = ""


def open_dicom(source: Source, options: ReadOptions) -> Reading:
    """Every `.dcm` file at or below the folder; with a table, those that it lists.

    Raises:
        EvlecgError: there is a table, and it cannot be understood.
    """
    table = read_table(source, options)

    def read(entry: _Entry) -> Record:
        if entry.problem:
            source.path(entry.path)  # refuses a name that leads out of the folder
            raise Dropped(entry.problem)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's remarks on values; what matters is checked here
            try:
                return _record(entry, source.read(entry.path), options)
            except (AttributeError, NotImplementedError, TypeError, EOFError, struct.error) as error:
                raise Unfit(f"malformed: {type(error).__name__}") from error

    def entries() -> Iterator[_Entry]:
        files = {path[: -len(SUFFIX)]: path for path in source.find("") if path.lower().endswith(SUFFIX)}
        if table is None:
            yield from (_Entry(path) for path in files.values())
            return
        matched: set[str] = set()
        for row, stems in match_rows(table, list(files)):
            matched.update(stems)
            problem = "" if len(stems) == 1 else "ambiguous name" if stems else "listed, but not in this folder"
            yield _Entry(row.record if problem else files[stems[0]], row, problem)
        yield from (
            _Entry(path, None, "no row in the label table") for stem, path in files.items() if stem not in matched
        )

    descriptions = table.wanted(options.labels) if table else {}
    return Reading(None, Lazy(entries), lambda entry: hashed(entry.path), read, descriptions=descriptions)


def _record(entry: _Entry, data: bytes, options: ReadOptions) -> Record:
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        file = pydicom.dcmread(io.BytesIO(data))
    except InvalidDicomError as error:
        raise Unfit("no DICOM file") from error
    if str(file.get("SOPClassUID", "")) not in ECG_CLASSES:
        raise Dropped("no ECG: another DICOM class")
    group = _rhythm_group(file)
    signal, leads, units = _channels(group, little_endian=file.file_meta.TransferSyntaxUID.is_little_endian)
    fs_hz = float(group.SamplingFrequency)
    mended = mend(signal, leads, units, fs_hz)
    row = entry.row or Row(entry.path, {})
    number = str(file.get("PatientID", "") or "").strip()
    patient_id = row.patient_id or hashed(number or entry.path)
    report, n_left_out = _report(file)
    n_left_out = row.n_left_out if row.report else n_left_out
    left_out = (f"{n_left_out} annotations left out: they may name someone",) if n_left_out else ()
    return Record(
        id=hashed(entry.path),
        patient_id=patient_id,
        signal_mV=mended.signal_mV,
        fs_hz=fs_hz,
        labels=wanted_labels(row.labels, options.labels),
        split=row.split or split_of(patient_id, options.seed),
        age=parse_age(row.age) if row.age else _age(file),
        sex=parse_sex(row.sex or str(file.get("PatientSex", "") or "")),
        report=row.report or report,
        repairs=(*mended.repairs, *left_out),
        device=row.device or _device(file),
    )


def _rhythm_group(file: Dataset) -> Dataset:
    """The multiplex group with most leads that is no median beat; the longest of several.

    Raises:
        Unfit: there is no group.
    """

    def rank(group: Dataset) -> tuple[bool, int, float]:
        label = str(group.get("MultiplexGroupLabel", "")).lower()
        derived = str(group.get("WaveformOriginality", "")).upper() == "DERIVED"
        median = derived or any(word in label for word in ("median", "average", "representative", "template"))
        leads = {lead_index(_lead_name(channel)) for channel in group.ChannelDefinitionSequence} - {None}
        return not median, len(leads), group.NumberOfWaveformSamples / float(group.SamplingFrequency)

    groups = list(file.get("WaveformSequence") or ())
    if not groups:
        raise Unfit("empty: no waveform")
    return max(groups, key=rank)


def _lead_name(channel: Dataset) -> str:
    """Name of a channel's lead; "" or any other text where it is none of the 12."""
    source = (channel.get("ChannelSourceSequence") or [{}])[0]
    code = _CODE.fullmatch(str(source.get("CodeValue", "")))
    if code:
        return _LEAD_CODES.get(int(code[1]), "")
    for text in (source.get("CodeValue", ""), source.get("CodeMeaning", ""), channel.get("ChannelLabel", "")):
        name = re.sub(r"\(.*\)|,.*", "", str(text)).strip()
        if lead_index(name) is not None:
            return name
    return ""


def _channels(group: Dataset, *, little_endian: bool) -> tuple[np.ndarray, list[str], list[str]]:
    """float64 [channels, T] in their units, lead names and units of the channels that are leads.

    Raises:
        Unfit: truncated, too long, an encoding that is not read, or no sensitivity, hence no unit.
    """
    n_channels, n_samples = int(group.NumberOfWaveformChannels), int(group.NumberOfWaveformSamples)
    if n_samples > MAX_DURATION_S * float(group.SamplingFrequency):
        raise Unfit(f"too long: more than {MAX_DURATION_S:g} s")
    kind = (int(group.WaveformBitsAllocated), str(group.WaveformSampleInterpretation))
    if kind not in _SAMPLE_TYPES:
        raise Unfit(f"unknown encoding: {kind[0]} bits, {kind[1]}")
    sample_type = np.dtype(_SAMPLE_TYPES[kind]).newbyteorder("<" if little_endian else ">")
    data = bytes(group.WaveformData)
    if len(data) < n_channels * n_samples * sample_type.itemsize:
        raise Unfit(f"truncated: {len(data)} bytes for {n_channels} channels of {n_samples} samples")
    steps_TC = np.frombuffer(data, sample_type, n_channels * n_samples).reshape(n_samples, n_channels)
    padding = group.get("WaveformPaddingValue")
    if isinstance(padding, bytes):
        padding = np.frombuffer(padding[: sample_type.itemsize], sample_type)[0]
    values: list[np.ndarray] = []
    leads: list[str] = []
    units: list[str] = []
    for index, channel in enumerate(group.ChannelDefinitionSequence):
        name = _lead_name(channel)
        if lead_index(name) is None:
            continue
        sensitivity = channel.get("ChannelSensitivity")
        unit = (channel.get("ChannelSensitivityUnitsSequence") or [{}])[0].get("CodeValue", "")
        if sensitivity is None or not unit:
            raise Unfit(f"unknown unit: lead {name} has no sensitivity")
        scale = float(sensitivity) * float(channel.get("ChannelSensitivityCorrectionFactor", None) or 1)
        value_T = steps_TC[:, index] * scale + float(channel.get("ChannelBaseline", None) or 0)
        if padding is not None:
            value_T[steps_TC[:, index] == padding] = np.nan
        values.append(value_T)
        leads.append(name)
        units.append(str(unit))
    if not values:
        raise Unfit("none of the 12 leads is in the file")
    return np.stack(values), leads, units


def _age(file: Dataset) -> float | None:
    if match := _AGE.fullmatch(str(file.get("PatientAge", "") or "").strip()):
        return parse_age(str(float(match[1]) * _YEARS[match[2]]))
    born = _date(file.get("PatientBirthDate"))
    seen = _date(file.get("AcquisitionDateTime")) or _date(file.get("StudyDate"))
    return parse_age(str((seen - born).days // 365.25)) if born and seen else None


def _date(value: Any) -> date | None:
    try:
        return date.fromisoformat(f"{str(value)[:4]}-{str(value)[4:6]}-{str(value)[6:8]}")
    except ValueError:
        return None


def _device(file: Dataset) -> str:
    fields = (str(file.get(name, "") or "").strip() for name in ("Manufacturer", "ManufacturerModelName"))
    return " ".join(field for field in fields if field)


def _report(file: Dataset) -> tuple[str, int]:
    """The statements about the whole tracing that can identify nobody, and how many were left out."""
    statements = (
        str(annotation.get("UnformattedTextValue", "") or "")
        for annotation in file.get("WaveformAnnotationSequence") or ()
        if "ReferencedSamplePositions" not in annotation and "NumericValue" not in annotation
    )  # measurements and marks of single waves apart
    return public_statements(statements, _private_words(file))


def _private_words(file: Dataset) -> set[str]:
    """Words of the fields that name a patient, a person or a place, in lower case."""
    words: set[str] = set()
    for element in file:
        if element.VR == "PN":
            words.update(word for word in re.findall(r"\w+", str(element.value).lower()) if len(word) > 1)
        elif element.keyword in _PRIVATE_FIELDS:
            words.update(word for word in re.findall(r"\w+", str(element.value).lower()) if len(word) > 2)
    return words
