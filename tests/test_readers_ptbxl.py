"""PTB-XL's label sets: against the reference of the real subset, and what they leave open."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from evlecg.data.labels import LABEL_SETS
from evlecg.data.readers_base import Dropped, Source
from evlecg.data.readers_ptbxl import Statements, ptbxl_labels, read_statements
from evlecg.errors import EvlecgError
from tests.test_readers import kept, read, reasons, write_csv, write_ptbxl


@pytest.fixture(scope="module")
def statements(shared_data: Path) -> Statements:
    return read_statements(Source(shared_data / "ptbxl"))


@pytest.mark.parametrize("fs_hz", [500, 100])
def test_subclasses_and_superclasses_equal_the_reference(shared_data: Path, fs_hz: int) -> None:
    with (shared_data / "ptbxl" / "labels_subset.csv").open(newline="") as file:
        reference = {f"{int(row['ecg_id']):05d}": row for row in csv.DictReader(file)}
    # The reference drops the underscores of PTB-XL's names; written down here on its own.
    name_of = {"AMI": "AMI-any", "IMI": "IMI-any", "STTC": "STTC-other", "LAFB/LPFB": "LFB", "LAO/LAE": "LAE"}
    name_of |= {"RAO/RAE": "RAE", "CLBBB": "LBBB", "CRBBB": "RBBB"}
    records = kept(read("ptbxl", shared_data / "ptbxl", "ptbxl-sub+ptbxl-super", fs_hz=fs_hz))
    assert len(records) == {500: 50, 100: 35}[fs_hz]
    for name, record in records.items():
        row = reference[name]
        subclasses = {name_of.get(item, item) for item in row["subclass"].split()}
        expected = subclasses | set(row["superclass"].split())
        assert {code for code, value in record.labels.items() if value} == expected, name
        assert set(record.labels) == set(LABEL_SETS["ptbxl-sub"]) | set(LABEL_SETS["ptbxl-super"])
        assert record.report == row["report"].strip() and record.fs_hz == fs_hz


def test_all_71_equal_the_statements(shared_data: Path) -> None:
    with (shared_data / "ptbxl" / "labels_subset.csv").open(newline="") as file:
        reference = {f"{int(row['ecg_id']):05d}": set(row["scp_codes_present"].split()) for row in csv.DictReader(file)}
    rename = {"STD_": "STD", "NST_": "NST", "ISC_": "ISC", "LAO/LAE": "LAE", "TAB_": "TAB", "NT_": "NT"}
    for name, record in kept(read("ptbxl", shared_data / "ptbxl", "ptbxl-all")).items():
        expected = {rename.get(code, code) for code in reference[name]}
        assert {code for code, value in record.labels.items() if value} == expected, name


def test_every_statement_reaches_its_classes(statements: Statements) -> None:
    wanted = (*LABEL_SETS["ptbxl-all"], *LABEL_SETS["ptbxl-sub"], *LABEL_SETS["ptbxl-super"])

    def yes(*codes: str) -> set[str]:
        found = ptbxl_labels(wanted, frozenset(codes), statements)
        return {code for code, value in found.items() if value}

    assert yes("ASMI") == {"ASMI", "AMI-any", "MI"}
    assert yes("AMI") == {"AMI", "AMI-any", "MI"}
    assert yes("LMI") == {"LMI", "MI"}
    assert yes("NDT") == {"NDT", "STTC-other", "STTC"}
    assert yes("NST_") == {"NST", "STTC"}
    assert yes("CLBBB", "LAFB") == {"LBBB", "LAFB", "LFB", "CD"}
    assert yes("NORM", "SR") == {"NORM", "SR"}
    assert yes("PRC(S)") == {"PRCS"}


def test_what_nobody_looked_at_stays_open(statements: Statements) -> None:
    def assessed(*codes: str) -> set[str]:
        return set(ptbxl_labels(LABEL_SETS["ptbxl-all"], frozenset(codes), statements))

    diagnostic, form, rhythm = (set(LABEL_SETS[f"ptbxl-{kind}"]) for kind in ("diag", "form", "rhythm"))
    assert assessed("PACE") == rhythm
    assert assessed("NORM") == diagnostic | form
    assert assessed("PVC") == form - diagnostic
    assert assessed("LVH", "SR") == set(LABEL_SETS["ptbxl-all"])


@pytest.mark.parametrize(
    ("labels", "codes", "reason"),
    [
        ("ptbxl-sub", {"SR", "PVC"}, "no diagnostic class"),
        ("ptbxl-diag", {"SR"}, "no diagnostic class"),
        ("ptbxl-form", {"SR", "LVH"}, "no form statement"),
        ("ptbxl-rhythm", {"LVH", "PVC"}, "no rhythm statement"),
    ],
)
def test_records_without_a_statement_of_the_kind_are_dropped(
    statements: Statements, labels: str, codes: set[str], reason: str
) -> None:
    with pytest.raises(Dropped, match=reason):
        ptbxl_labels(LABEL_SETS[labels], frozenset(codes), statements)
    assert ptbxl_labels(LABEL_SETS["ptbxl-all"], frozenset(codes), statements)


def test_device_and_report_come_along(tmp_path: Path) -> None:
    write_ptbxl(tmp_path)
    record = kept(read("ptbxl", tmp_path))["00001"]
    assert (record.device, record.report) == ("CS-12 E", "sinusrhythmus normales ekg")
    assert "1984" not in repr(record)
    found = read("ptbxl", tmp_path, "ptbxl-form")
    assert reasons(found) == {
        "00003": "no form statement", "01005": "no form statement",
    }  # fmt: skip
    assert kept(found)["01004"].labels["NDT"] and kept(found)["00001"].labels["LVOLT"]


def test_tables_that_are_not_ptbxl(tmp_path: Path) -> None:
    write_ptbxl(tmp_path)
    write_csv(tmp_path / "ptbxl_database.csv", [{"ecg_id": "", "patient_id": 1}])
    with pytest.raises(EvlecgError, match=r"row without an ecg_id .*ptbxl_database"):
        read("ptbxl", tmp_path)
    write_csv(tmp_path / "scp_statements.csv", [{"": "NORM", "description": "normal"}])
    with pytest.raises(EvlecgError, match="not the statements of PTB-XL"):
        read("ptbxl", tmp_path)
