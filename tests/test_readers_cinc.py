"""The challenges by cohort, CPSC2018 as first published, PTB and Chapman-Shaoxing-Ningbo, real and in miniature."""

from __future__ import annotations

import csv
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import wfdb
from numpy.testing import assert_allclose
from scipy.io import savemat

from evlecg.data.labels import LABEL_SETS, SNOMED
from evlecg.data.readers import READERS, ReadOptions, Source, detect, home_of
from evlecg.data.readers_cinc import INCART_RUNS, PTB_RUNS, patient_of
from evlecg.schema import LEADS
from tests.test_readers import STEPS, kept, read, reasons, write_csv, write_wfdb

MAT = {"suffix": ".mat"}
COHORT_RECORDS = {
    "cpsc_2018/g1": ("A0001", "59118001"),
    "cpsc_2018_extra/g1": ("Q0001", "164867002,427084000"),
    "st_petersburg_incart/g1": ("I0016", "164884008"),
    "ptb/g1": ("S0001", "164865005"),
    "ptb-xl/g1": ("HR00001", "426783006"),
    "georgia/g1": ("E00001", "426177001"),
    "chapman_shaoxing/g1": ("JS10646", "164889003"),
    "ningbo/g1": ("JS10647", "164890007"),
}


def write_tree(root: Path) -> None:
    """The challenge's tree with one record a cohort."""
    for folder, (name, codes) in COHORT_RECORDS.items():
        fs_hz = 257 if name[0] == "I" else 1000 if name[0] == "S" and len(name) == 5 else 500
        steps = STEPS if fs_hz <= 500 else np.tile(STEPS, 2)
        write_wfdb(root / "training" / folder, name, steps, **MAT, fs_hz=fs_hz, comments=(f" Dx: {codes}",))


def yes(record) -> set[str]:
    return {code for code, value in record.labels.items() if value}


def test_each_cohort_is_found_in_the_whole_tree(tmp_path: Path) -> None:
    write_tree(tmp_path)
    expected = {
        "cpsc2018": {"A0001"}, "cpsc2018-extra": {"Q0001"}, "incart": {"I0016"}, "ptb": {"S0001"},
        "georgia": {"E00001"}, "chapman-ningbo": {"JS10646", "JS10647"},
        "cinc2020": {"A0001", "Q0001", "I0016", "S0001", "HR00001", "E00001"},
        "cinc2021": {name for name, _ in COHORT_RECORDS.values()},
    }  # fmt: skip
    for dataset, names in expected.items():
        assert set(kept(read(dataset, tmp_path))) == names, dataset
    records = kept(read("cinc2021", tmp_path))
    assert yes(records["JS10646"]) == {"AFIB"} and yes(records["JS10647"]) == {"AFLT"}
    assert "AFIB" in records["JS10646"].labels and "AFIB" not in records["JS10647"].labels  # Ningbo has no such code
    assert records["I0016"].fs_hz == 257 and "PVC" not in records["I0016"].labels  # ventricular ectopics leave it open
    assert records["S0001"].patient_id == "patient001" and records["I0016"].patient_id == "incart008"
    assert set(kept(read("cinc2020", tmp_path))["E00001"].labels) <= set(LABEL_SETS["cinc2020-24"])


def test_headers_as_they_are_found(tmp_path: Path) -> None:
    variants = {
        "E00001": ("16+24 1000/mV", "16x1+24 1000.0(0)/mV"),
        "E00002": ("16+24 1000/mV", "16+24 1000/mv"),
        "E00003": ("E00003 12 500 5000", "E00003.mat 12 500 5000 05-Feb-2020 11:39:16"),
        "E00004": ("# Sex: male", "#Sex: Female"),
        "E00005": ("# Age: 78", "#Age: NaN"),
        "E00006": ("1000/mV", "2000000/mV"),
    }
    comments = (" Age: 78", " Sex: male", " Dx: 426177001,59118001", " Hx: Jane Doe")
    for name, (plain, odd) in variants.items():
        write_wfdb(tmp_path, name, **MAT, gains=("1000/mV",) * 12, comments=comments)
        header = tmp_path / f"{name}.hea"
        assert plain in header.read_text()
        header.write_text(header.read_text().replace(plain, odd))
    records = kept(read("georgia", tmp_path))
    assert set(records) == set(variants)
    for record in records.values():
        assert_allclose(record.signal_mV, STEPS / np.float32(1000), rtol=1e-6)
        assert yes(record) == {"SBRAD", "RBBB"} and record.fs_hz == 500 and "Doe" not in repr(record)
    assert [record.sex for record in records.values()] == ["M", "M", "M", "F", "M", "M"]
    assert [record.age for record in records.values()] == [78, 78, 78, 78, None, 78]
    assert records["E00006"].repairs == ("gain 2e+06 read as 1000 a mV",)


def test_what_lies_in_a_folder_is_recognised(tmp_path: Path, shared_data: Path) -> None:
    write_tree(tmp_path)
    cohorts = {"georgia": "georgia", "cpsc_2018": "cpsc2018", "cpsc_2018_extra": "cpsc2018-extra", "ptb": "ptb"}
    cohorts |= {"st_petersburg_incart": "incart", "ningbo": "chapman-ningbo"}
    assert detect(tmp_path) == "cinc2021"
    for folder, dataset in cohorts.items():
        assert detect(tmp_path / "training" / folder) == dataset
    for folder, dataset in {"cinc2021": "cinc2021", "cpsc2018": "cpsc2018", "cpsc2018_native": "cpsc2018"}.items():
        assert detect(shared_data / folder) == dataset
    assert detect(shared_data / "ptbxl") == "ptbxl" and detect(shared_data / "ludb") == "ludb"
    assert detect(shared_data / "other") == "ptb"
    (tmp_path / "empty").mkdir()
    assert detect(tmp_path / "empty") is None


def test_real_cohorts_equal_their_reference(shared_data: Path, tmp_path: Path) -> None:
    """Each cohort of the real records in a folder of its own; labels against the SNOMED codes of labels.csv."""
    with (shared_data / "cinc2021" / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = {"cpsc_2018_extra": "cpsc2018-extra", "georgia": "georgia", "ningbo": "chapman-ningbo", "ptb": "ptb"}
    checked: Counter[str] = Counter()
    for cohort, dataset in names.items():
        folder = tmp_path / cohort / "g1"
        folder.mkdir(parents=True)
        members = [row for row in rows if row["cohort"] == cohort]
        for row in members:
            for suffix in (".hea", ".mat"):
                shutil.copy(shared_data / "cinc2021" / f"{row['record']}{suffix}", folder)
        found = read(dataset, tmp_path / cohort, "cinc2021-26")
        with_codes = [row for row in members if row["label_source"] == "header" and row["record"] != "JS20004"]
        assert set(kept(found)) == {row["record"] for row in with_codes}
        for row in with_codes:
            labels = {SNOMED[code].label for code in row["dx_snomed"].split()} & set(LABEL_SETS["cinc2021-26"])
            assert yes(found[row["record"]]) == labels, row["record"]
            checked[cohort] += 1
        dropped = {name for name, reason in reasons(found).items() if reason == "no diagnosis"}
        assert dropped == {row["record"] for row in members} - {row["record"] for row in with_codes} - {"JS20004"}
    assert checked == {"cpsc_2018_extra": 15, "georgia": 16, "ningbo": 13}


def test_chapman_shaoxing_ningbo_as_published(tmp_path: Path) -> None:
    tree = tmp_path / "a-large-scale-12-lead-electrocardiogram-database-1.0.0"
    about = ("Age: 85", "Sex: Male", "Dx: 164889003,59118001,164934002", "Rx: Unknown", "Hx: Unknown", "Sx: Unknown")
    write_wfdb(tree / "WFDBRecords" / "01" / "010", "JS00001", **MAT, comments=about)
    dead = STEPS.copy()
    dead[2] = 0
    write_wfdb(tree / "WFDBRecords" / "01" / "010", "JS00002", dead, **MAT, comments=("Dx: 426177001",))
    write_wfdb(tree / "WFDBRecords" / "23" / "230", "JS23074", **MAT, comments=("Age: NaN", "Dx: 233896004,251147008"))
    header = tree / "WFDBRecords" / "23" / "230" / "JS23074.hea"
    header.write_text(header.read_text().replace("JS23074", "S23074"))
    write_csv(tree / "ConditionNames_SNOMED-CT.csv", [{"Acronym Name": "SB", "Snomed_CT": "426177001"}])
    assert detect(tmp_path) == "chapman-ningbo"
    found = read("chapman-ningbo", tmp_path, "cinc2021-26+ptbxl-super")
    records = kept(found)
    assert reasons(found) == {"JS00002": "flat leads: III"}
    assert yes(records["JS00001"]) == {"AFIB", "RBBB", "TAB", "STTC", "CD"}
    assert (records["JS00001"].age, records["JS00001"].sex) == (85, "M")
    assert yes(records["JS23074"]) == {"LVOLT"} and records["JS23074"].age is None
    assert_allclose(records["JS23074"].signal_mV, STEPS / np.float32(1000))


# CPSC2018 as first published


def test_native_cpsc2018_equals_its_reference(shared_data: Path) -> None:
    folder = shared_data / "cpsc2018_native"
    records = kept(read("cpsc2018", folder))
    name_of = {"premature atrial contraction": "PAC", "st-segment depression": "STD", "normal": "NORM"}
    name_of |= {"1 degree atrioventricular block": "1AVB"}
    with (folder / "REFERENCE_subset.csv").open(newline="") as file:
        reference = list(csv.DictReader(file))
    assert set(records) == {row["Recording"] for row in reference} and len(reference) == 5
    for row in reference:
        record = records[row["Recording"]]
        assert yes(record) == {name_of[row["reports"]]} and set(record.labels) == set(LABEL_SETS["cpsc9"])
        assert (record.age, record.sex) == (float(row["age"]), row["sex"][0])
        lead = dict(zip(LEADS, record.signal_mV, strict=True))
        assert record.fs_hz == 500 and record.duration_s >= 10
        assert_allclose(lead["I"] + lead["III"], lead["II"], atol=0.02)  # the leads are in their places, in mV
        assert_allclose(2 * lead["aVR"], -lead["I"] - lead["II"], atol=0.02)


def test_native_cpsc2018_in_its_folders(tmp_path: Path) -> None:
    for number, name in enumerate(("A0001", "A2001", "A5001", "A5002", "A5003"), start=1):
        folder = tmp_path / "download" / f"TrainingSet{min(number, 3)}"
        folder.mkdir(parents=True, exist_ok=True)
        structure = {"sex": "Female", "age": np.nan if number == 1 else 70, "data": STEPS / 1000.0}
        savemat(folder / f"{name}.mat", {"ECG": structure})
    (folder / "A5003.mat").write_bytes(b"MATLAB 5.0 MAT-file, broken")
    rows = [("A0001", 5, 8, ""), ("A2001", "2.0", "", ""), ("A5001", 1, "", ""), ("A5003", 1, "", "")]
    columns = ("Recording", "First_label", "Second_label", "Third_label")
    write_csv(folder / "REFERENCE.csv", [dict(zip(columns, row, strict=True)) for row in rows])
    assert home_of("cpsc2018", tmp_path) is not None and detect(tmp_path) == "cpsc2018"
    found = read("cpsc2018", tmp_path / "download")
    assert reasons(found) == {"A5002": "no diagnosis", "A5003": "malformed MATLAB file"}
    records = kept(found)
    assert {name: yes(record) for name, record in records.items()} == {
        "A0001": {"RBBB", "STD"}, "A2001": {"AFIB"}, "A5001": {"NORM"},
    }  # fmt: skip
    assert (records["A0001"].age, records["A2001"].age, records["A2001"].sex) == (None, 70, "F")
    assert_allclose(records["A0001"].signal_mV, STEPS / np.float32(1000), rtol=1e-6)


def test_native_cpsc2018_with_its_reference_one_folder_up(tmp_path: Path) -> None:
    (tmp_path / "download" / "TrainingSet1").mkdir(parents=True)
    structure = {"sex": "Male", "age": 70, "data": STEPS / 1000.0}
    savemat(tmp_path / "download" / "TrainingSet1" / "A0001.mat", {"ECG": structure})
    row = {"Recording": "A0001", "First_label": 9, "Second_label": "", "Third_label": ""}
    write_csv(tmp_path / "download" / "REFERENCE.csv", [row])
    assert {name: yes(record) for name, record in kept(read("cpsc2018", tmp_path)).items()} == {"A0001": {"STE"}}
    write_csv(tmp_path / "REFERENCE.csv", [{"A00001": "N"}])  # that of the 2017 challenge
    assert home_of("cpsc2018", tmp_path) == tmp_path / "download"


# PTB


def write_ptb(root: Path, shared_data: Path) -> None:
    """The real s0010_re in PTB's layout, and two headers of its kind."""
    folder = root / "patient001"
    folder.mkdir(parents=True)
    for suffix in (".hea", ".dat"):
        shutil.copy(shared_data / "other" / "wfdb" / f"s0010_re{suffix}", folder)
    leads = [*(lead.lower() for lead in LEADS), "vx", "vy", "vz"]
    steps = np.concatenate((np.tile(STEPS, 2), np.tile(STEPS[:3], 2)))
    for patient, name, reason in (
        ("patient001", "s0014lre", "Myocardial infarction"),
        ("patient104", "s0306lre", "Healthy control"),
        ("patient285", "s0544_re", "n/a"),
    ):
        about = (" age: n/a", " sex: male", " ECG date: 01/10/1990", " Diagnose:", f" Reason for admission: {reason}")
        about += (" Acute infarction (localization): no", " Former infarction (localization): no")
        about = about if reason != "n/a" else about[:5]
        write_wfdb(root / patient, name, steps, fs_hz=1000, leads=leads, gains=("2000",) * 15, comments=about)


def test_ptb_as_published(shared_data: Path, tmp_path: Path) -> None:
    write_ptb(tmp_path / "ptbdb", shared_data)
    assert detect(tmp_path) == "ptb"
    found = read("ptb", tmp_path)
    records = kept(found)
    assert reasons(found) == {"patient285/s0544_re": "no diagnosis"}
    assert {name: record.patient_id for name, record in records.items()} == {
        "patient001/s0010_re": "patient001", "patient001/s0014lre": "patient001", "patient104/s0306lre": "patient104",
    }  # fmt: skip
    real = records["patient001/s0010_re"]
    reference = wfdb.rdrecord(str(shared_data / "other" / "wfdb" / "s0010_re"), channels=list(range(12)))
    assert_allclose(real.signal_mV.T, reference.p_signal, rtol=0, atol=0.000501)  # to whole microvolt, as the challenge
    assert (real.fs_hz, real.age, real.sex) == (1000, 81, "F")
    assert real.labels == {"NORM": False, "MI": True}  # what else she has, nobody says
    assert records["patient001/s0014lre"].split == real.split
    assert yes(records["patient104/s0306lre"]) == {"NORM"} and records["patient104/s0306lre"].age is None
    for record in records.values():
        assert "1990" not in repr(record) and "Diabetes" not in repr(record)
    found = kept(read("ptb", shared_data / "other", "ptbxl-sub"))  # flat, without its patient's folder
    assert yes(found["s0010_re"]) == {"IMI-any"} and found["s0010_re"].labels["AMI-any"] is False


def test_challenge_numbers_follow_the_original_databases(shared_data: Path) -> None:
    assert (len(PTB_RUNS) - PTB_RUNS.count("0"), sum(map(int, PTB_RUNS))) == (290, 549)  # as PTB's card says
    assert (len(INCART_RUNS), sum(map(int, INCART_RUNS))) == (32, 75)  # as INCART's
    assert [patient_of("S", name) for name in ("S0001", "S0004", "S0537", "S0549", "S0550")] == [
        "patient001", "patient002", "patient285", "patient294", "S0550",
    ]  # fmt: skip
    assert [patient_of("I", name) for name in ("I0001", "I0003", "I0036", "I0049", "I0071", "I0075")] == [
        "incart001", "incart002", "incart016", "incart022", "incart030", "incart032",
    ]  # fmt: skip
    assert patient_of("E", "E00001") == "E00001" and patient_of("N", "S23074") == "S23074"
    # The first record of both, in the resolution of the challenge's.
    native = wfdb.rdrecord(str(shared_data / "other" / "wfdb" / "s0010_re"), channels=list(range(12)))
    assert_allclose(wfdb.rdrecord(str(shared_data / "cinc2021" / "S0001")).p_signal, native.p_signal, atol=0.00051)
    # One patient, one age and sex.
    about: dict[str, set[tuple[float | None, str | None]]] = {}
    for record in kept(read("cinc2021", shared_data / "cinc2021")).values():
        if record.patient_id.startswith("patient"):
            about.setdefault(record.patient_id, set()).add((record.age, record.sex))
    assert len(about) == 5 and all(len(item) == 1 for item in about.values())


def test_ptbxl_table_gives_the_patients_of_its_records(tmp_path: Path) -> None:
    for name in ("HR00001", "HR00002", "HR00003"):
        write_wfdb(tmp_path / "in" / "training" / "ptb-xl" / "g1", name, **MAT, comments=("Dx: 426783006",))
    assert {record.patient_id for record in kept(read("cinc2021", tmp_path / "in")).values()} == {
        "HR00001", "HR00002", "HR00003",
    }  # fmt: skip
    rows = [
        {"ecg_id": 1, "patient_id": "17.0", "strat_fold": 10},
        {"ecg_id": 2, "patient_id": "17.0", "strat_fold": 10},
        {"ecg_id": 3, "patient_id": "18.0", "strat_fold": 9},
    ]
    for place, signals in (("ptbxl", {"ptb-xl": tmp_path / "ptbxl"}), ("in", {})):
        (tmp_path / place).mkdir(exist_ok=True)
        write_csv(tmp_path / place / "ptbxl_database.csv", rows)
        records = kept(read("cinc2021", tmp_path / "in", signals=signals))
        assert [(record.patient_id, record.split) for record in records.values()] == [
            ("17", "test"), ("17", "test"), ("18", "val"),
        ]  # fmt: skip


# what reading costs


@pytest.mark.parametrize("dataset", ["cinc2021", "cpsc2018", "ptb", "ptbxl", "chapman-ningbo"])
def test_workers_list_nothing_and_entries_travel(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str
) -> None:
    folder = tmp_path
    if dataset == "ptbxl":
        folder = shared_data / "ptbxl"
    else:
        write_tree(tmp_path)
    home = home_of(dataset, folder)
    assert home is not None
    options = ReadOptions(labels=LABEL_SETS["ptbxl-super"])
    entries = list(READERS[dataset].open(Source(home), options).entries)
    assert entries and max(len(pickle.dumps(entry)) for entry in entries) < 2000

    opened: list[str] = []
    plain_read = Source.read

    def counted(source: Source, relative: str) -> bytes:
        opened.append(relative)
        return plain_read(source, relative)

    def never(*_: object) -> None:
        raise AssertionError("a worker looks for files")

    monkeypatch.setattr(Source, "read", counted)
    for name in ("find", "exists"):
        monkeypatch.setattr(Source, name, never)
    reading = READERS[dataset].open(Source(home), options)  # as a worker does
    at_opening = list(opened)
    assert at_opening == (["scp_statements.csv"] if dataset == "ptbxl" else [])
    record = reading.read(pickle.loads(pickle.dumps(entries[0])))
    assert record.id == reading.name(entries[0])
    read_for_one = opened[len(at_opening) :]
    assert sorted(Path(path).suffix for path in read_for_one)[-2:] in (
        [".hea", ".mat"],
        [".hea", ".hea"],
        [".dat", ".hea"],
    )
    assert len(read_for_one) <= 3
