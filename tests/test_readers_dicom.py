"""DICOM waveforms: written in miniature in several dialects, and pydicom's real sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
import pytest
from numpy.testing import assert_allclose
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, generate_uid

from evlecg.data.identity import hashed
from evlecg.data.readers import READERS, ReadOptions, Rejected, Source, home_of
from evlecg.data.readers_base import Reading
from evlecg.data.store import Prepared
from evlecg.prepare import prepare
from evlecg.schema import LEADS, Record
from tests.test_readers import STEPS, kept, reasons, write_wfdb

TWELVE_LEAD = "1.2.840.10008.5.1.4.1.1.9.1.1"
NUMBER_OF = dict(zip(LEADS, (1, 2, 61, 62, 63, 64, 3, 4, 5, 6, 7, 8), strict=True))
CODES = {
    "scp": lambda lead: (f"5.6.3-9-{NUMBER_OF[lead]}", "SCPECG", ""),
    "mdc": lambda lead: (f"2:{NUMBER_OF[lead]}", "MDC", ""),
    "name": lambda lead: (f"MDC_ECG_LEAD_{lead}", "MDC", ""),
    "meaning": lambda lead: ("x", "99LOCAL", f"Lead {lead} (Einthoven)"),
}


def group(
    steps: np.ndarray = STEPS,
    leads: Sequence[str] = LEADS,
    *,
    kind: str = "scp",
    label: str = "RHYTHM",
    fs_hz: float = 500,
    sensitivity: float | None = 1.0,
    unit: str = "uV",
    correction: float = 1.0,
    baseline: float = 0.0,
    byte_order: str = "<",
) -> Dataset:
    """A multiplex group; `steps` [channels, T] is int16 or int32."""
    item = Dataset()
    item.MultiplexGroupLabel, item.WaveformOriginality = label, "ORIGINAL"
    item.NumberOfWaveformChannels, item.NumberOfWaveformSamples = steps.shape
    item.SamplingFrequency = fs_hz
    bits = 8 * steps.dtype.itemsize
    item.WaveformBitsAllocated, item.WaveformSampleInterpretation = bits, {16: "SS", 32: "SL"}[bits]
    item.WaveformData = np.ascontiguousarray(steps.T).astype(steps.dtype.newbyteorder(byte_order)).tobytes()
    item["WaveformData"].VR = "OW"
    channels = []
    for lead in leads:
        channel, source, units = Dataset(), Dataset(), Dataset()
        source.CodeValue, source.CodingSchemeDesignator, source.CodeMeaning = CODES[kind](lead)
        channel.ChannelSourceSequence = [source]
        if sensitivity is not None:
            channel.ChannelSensitivity, channel.ChannelSensitivityCorrectionFactor = sensitivity, correction
            channel.ChannelBaseline = baseline
            units.CodeValue, units.CodingSchemeDesignator, units.CodeMeaning = unit, "UCUM", unit
            channel.ChannelSensitivityUnitsSequence = [units]
        channels.append(channel)
    item.ChannelDefinitionSequence = channels
    return item


def write_dicom(
    path: Path,
    groups: Sequence[Dataset] | None = None,
    statements: Sequence[str] = (),
    sop_class: str = TWELVE_LEAD,
    syntax: str = ExplicitVRLittleEndian,
    **fields: object,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, generate_uid()
    meta.TransferSyntaxUID = syntax
    file = FileDataset(
        str(path), {}, file_meta=meta, preamble=bytes(128), is_little_endian=syntax != ExplicitVRBigEndian
    )
    file.is_implicit_VR = False
    file.SOPClassUID, file.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
    for name, value in fields.items():
        setattr(file, name, value)
    file.WaveformSequence = list(groups if groups is not None else [group()])
    annotations = []
    for text in statements:
        item = Dataset()
        item.AnnotationGroupNumber, item.UnformattedTextValue = 0, text
        annotations.append(item)
    file.WaveformAnnotationSequence = annotations
    file.save_as(path, enforce_file_format=True)


def open_at(folder: Path, table: Path | None = None) -> Reading:
    home = home_of("dicom", folder)
    assert home == folder
    return READERS["dicom"].open(Source(home), ReadOptions((), table=table))  # type: ignore[arg-type]


def read(folder: Path) -> dict[str, Record | Rejected]:
    return {item.id: item for item in open_at(folder).records()}


def read_one(folder: Path) -> Record:
    (item,) = open_at(folder).records()
    assert isinstance(item, Record), item
    return item


@pytest.mark.parametrize("kind", CODES)
def test_leads_are_named_by_code_or_meaning(tmp_path: Path, kind: str) -> None:
    order = np.random.default_rng(1).permutation(12)
    write_dicom(tmp_path / "a.dcm", [group(STEPS[order], [LEADS[k] for k in order], kind=kind)])
    assert_allclose(read_one(tmp_path).signal_mV, STEPS / 1000, atol=1e-6)


def test_sensitivity_correction_baseline_and_unit(tmp_path: Path) -> None:
    scaled = group(sensitivity=0.005, unit="mV", correction=0.5, baseline=0.25)
    write_dicom(tmp_path / "a.dcm", [scaled])
    assert_allclose(read_one(tmp_path).signal_mV, STEPS * 0.0025 + 0.25, atol=1e-5)


def test_the_rhythm_is_read_and_not_the_median_beat(tmp_path: Path) -> None:
    medians = [group(STEPS, label="MEDIAN BEAT"), group(STEPS)]
    medians[1].WaveformOriginality = "DERIVED"
    rhythm = group((STEPS[:, :3000] // 2).astype("<i2"))
    strip = group((STEPS[:1] // 3).astype("<i2"), LEADS[1:2])  # longer, one lead
    write_dicom(tmp_path / "a.dcm", [*medians, strip, rhythm])
    assert_allclose(read_one(tmp_path).signal_mV, STEPS[:, :3000] // 2 / 1000, atol=1e-6)


@pytest.mark.parametrize("sop_class", [f"{TWELVE_LEAD[:-1]}{k}" for k in (1, 2, 3, 4)])
def test_classes_and_sample_widths(tmp_path: Path, sop_class: str) -> None:
    steps = STEPS.astype("<i4") * 1000 if sop_class.endswith("4") else STEPS
    sensitivity = 0.001 if sop_class.endswith("4") else 1.0
    write_dicom(tmp_path / "a.DCM", [group(steps, sensitivity=sensitivity)], sop_class=sop_class)
    assert_allclose(read_one(tmp_path).signal_mV, STEPS / 1000, atol=1e-6)


def test_big_endian_and_padding_value(tmp_path: Path) -> None:
    steps = STEPS.copy()
    steps[3, 100:110] = -32768
    item = group(steps, byte_order=">")
    item.WaveformPaddingValue = np.array(-32768, ">i2").tobytes()
    item["WaveformPaddingValue"].VR = "OW"
    write_dicom(tmp_path / "a.dcm", [item], syntax=ExplicitVRBigEndian)
    record = read_one(tmp_path)
    assert record.repairs == ("bridged gaps of at most 50 ms in aVR",)
    assert_allclose(record.signal_mV[[0, 11]], STEPS[[0, 11]] / 1000, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "age"),
    [
        ({"PatientAge": "042Y"}, 42),
        ({"PatientAge": "006M"}, 0.5),
        ({"PatientAge": "101Y"}, 90),
        ({"PatientBirthDate": "19710123", "StudyDate": "20130122"}, 41),
        ({"PatientBirthDate": "19710123"}, None),
        ({}, None),
    ],
)
def test_age(tmp_path: Path, fields: dict[str, str], age: float | None) -> None:
    write_dicom(tmp_path / "a.dcm", **fields)
    assert read_one(tmp_path).age == age


PRIVATE = {
    "PatientName": "Mueller^Anna",
    "PatientID": "H-4711",
    "PatientBirthDate": "19500101",
    "StudyDate": "20200317",
    "ReferringPhysicianName": "Weiss^Otto",
    "InstitutionName": "Klinikum Nord",
    "AccessionNumber": "ACC99",
    "Manufacturer": "Acme",
    "ManufacturerModelName": "Cart 5",
    "PatientSex": "F",
}


def test_nothing_that_identifies_enters(tmp_path: Path) -> None:
    statements = [
        "Sinus rhythm",
        "Possible left atrial abnormality.",
        "Seen by Weiss",
        "Confirmed by J. Doe",
        "When compared with ECG of 12-MAR-2019",
        "Compared to 3.4.2019, no change",
        "at 10:32",
        "Case 99482211",
        "ANNA is well",
        "Klinikum Süd",
        "Patient on digoxin",
        "Sinus rhythm",
        "QT 1234 is long",
    ]
    write_dicom(tmp_path / "in" / "Mueller_Anna.dcm", statements=statements, **PRIVATE)
    record = read_one(tmp_path / "in")
    assert record.report == "Sinus rhythm. Possible left atrial abnormality. QT 1234 is long"
    assert record.repairs == ("9 annotations left out: they may name someone",)
    assert record.id == hashed("Mueller_Anna.dcm") and record.patient_id == hashed("H-4711")
    assert (record.age, record.sex, record.device) == (70, "F", "Acme Cart 5")
    prepare("dicom", source=tmp_path / "in", out=tmp_path / "out", workers=1)
    text = "".join(path.read_text() for path in (tmp_path / "out").glob("*.json*")).lower()
    for word in ("mueller", "anna", "4711", "1950", "20200317", "weiss", "klinikum", "acc99", "doe"):
        assert word not in text, word


def test_labels_from_a_table(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for name, shift in (("a", 0), ("b", 500), ("c", 900)):
        write_dicom(
            folder / "s" / f"{name}.dcm", [group(np.roll(STEPS, shift, axis=1))], PatientID="H1", PatientSex="M"
        )
    table = tmp_path / "t.csv"
    table.write_text("file_name,patient_id,age,AFIB,report\ns/a.dcm,P9,50,1,own words\nb,,,0,\ngone,,,1,\n../x,,,1,\n")
    found = {item.id: item for item in open_at(folder, table).records()}
    first, second = (found[hashed(f"s/{name}.dcm")] for name in "ab")
    assert isinstance(first, Record) and isinstance(second, Record)
    assert (first.labels, first.patient_id, first.age, first.report) == ({"AFIB": True}, hashed("P9"), 50, "own words")
    assert (second.labels, second.patient_id, second.sex) == ({"AFIB": False}, hashed("H1"), "M")
    assert reasons(found) == {
        hashed("s/c.dcm"): "no row in the label table",
        hashed("gone"): "listed, but not in this folder",
        hashed("../x"): "a file name leads out of the source folder",
    }
    done = prepare("dicom", source=folder, out=tmp_path / "out", table=table, workers=1)
    assert done.positives == {"AFIB": 1} and Prepared.open(tmp_path / "out").label_names == ("AFIB",)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    write_dicom(tmp_path / "ok.dcm", PatientSex="O")
    (tmp_path / "no.dcm").write_bytes(b"hello")
    (tmp_path / "cut.dcm").write_bytes((tmp_path / "ok.dcm").read_bytes()[:3000])
    write_dicom(tmp_path / "image.dcm", sop_class="1.2.840.10008.5.1.4.1.1.7")
    write_dicom(tmp_path / "none.dcm", [])
    write_dicom(tmp_path / "unit.dcm", [group(sensitivity=None)])
    write_dicom(tmp_path / "other.dcm", [group(unit="mm[Hg]")])
    write_dicom(tmp_path / "leads.dcm", [group(STEPS[:8], LEADS[:8])])
    write_dicom(tmp_path / "median.dcm", [group(STEPS[:, :600], label="MEDIAN BEAT")])
    day = group()
    day.NumberOfWaveformSamples = 500 * 86400
    write_dicom(tmp_path / "day.dcm", [day])
    short = group()
    short.NumberOfWaveformSamples = 6000
    write_dicom(tmp_path / "short.dcm", [short])
    law = group()
    law.WaveformBitsAllocated, law.WaveformSampleInterpretation = 8, "MB"
    write_dicom(tmp_path / "law.dcm", [law])
    names = {hashed(path.name): path.stem for path in tmp_path.iterdir()}
    found = reasons(read(tmp_path))
    cut = found.pop(hashed("cut.dcm"))
    assert cut.startswith(("malformed", "empty", "truncated"))
    assert {names[key]: reason for key, reason in found.items()} == {
        "no": "no DICOM file",
        "image": "no ECG: another DICOM class",
        "none": "empty: no waveform",
        "unit": "unknown unit: lead I has no sensitivity",
        "other": "unknown unit: lead I",
        "leads": "missing leads: V3, V4, V5, V6",
        "median": "too short: 1.20 s, at least 5 s are needed",
        "day": "too long: more than 3600 s",
        "short": "truncated: 120000 bytes for 12 channels of 6000 samples",
        "law": "unknown encoding: 8 bits, MB",
    }
    assert read_one_of(tmp_path, "ok.dcm").sex is None


def read_one_of(folder: Path, name: str) -> Record:
    return kept(read(folder))[hashed(name)]


def test_real_file(shared_data: Path, tmp_path: Path) -> None:
    """pydicom's sample: its rhythm equals pydicom's own reading, and none of its private fields comes out."""
    folder = shared_data / "other" / "pypi"
    record = read_one(folder)
    file = pydicom.dcmread(folder / "waveform_ecg.dcm")
    assert_allclose(record.signal_mV, file.waveform_array(0).T / 1000, atol=1e-5)
    assert (record.fs_hz, record.signal_mV.shape) == (1000, (12, 10000))
    limb = record.signal_mV[:6]
    assert_allclose(limb[0] + limb[2], limb[1], atol=0.01)
    assert (record.age, record.sex) == (42, "F")
    assert record.report == "RITMO SINUSALE. ECG NORMALE" and record.device == "Mortara Instrument, Inc. el250"
    done = prepare("dicom", source=folder, out=tmp_path / "out", fs=500, workers=1)
    assert done.n_kept == 1
    text = "".join(path.read_text() for path in (tmp_path / "out").glob("*.json*"))
    for private in ("642341", "Galliera", "03028041970546", "13002689", "20130125", "19710123", "2721", "5407"):
        assert private not in text


def test_folders_of_other_kinds_are_not_taken_for_it(tmp_path: Path) -> None:
    write_wfdb(tmp_path, "a")
    assert home_of("dicom", tmp_path) is None
