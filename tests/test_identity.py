"""File names, numbers and statements of hospitals: what may enter a prepared folder, and what may not."""

from __future__ import annotations

import pytest

from evlecg.data.identity import hashed, public_path, public_statements, sentences


@pytest.mark.parametrize(
    "path",
    ["A0001", "JS00001", "ward1/0001", "00001_hr", "patient001/s0010_re", "1111", "p1000/p10000032/s40689238", "x/a"],
)
def test_codes_stay(path: str) -> None:
    assert public_path(path) == path


@pytest.mark.parametrize(
    "part", ["Mueller_Anna", "smith", "r1 copy", "Änna", "20200512_1", "r_12-05-2020", "1954-03-02"]
)
def test_names_and_dates_are_replaced_part_by_part(part: str) -> None:
    assert public_path(f"ward1/{part}/0001") == f"ward1/{hashed(part)}/0001"


@pytest.mark.parametrize(
    "statement",
    [
        "Confirmed by Weber", "electronically signed by A. B.", "Ms Smith", "DR HOUSE", "seen 12.05.2020", "at 08:44",
        "2 May 2020", "no 4711123", "patient moved", "Ward 7", "compared with ECG of 03-JAN-1999",
    ],
)  # fmt: skip
def test_statements_that_may_name_someone_are_left_out(statement: str) -> None:
    assert public_statements(["Sinus rhythm", statement]) == ("Sinus rhythm", 1)


@pytest.mark.parametrize(
    "statement",
    [
        "QTc 480 ms",
        "PR 210 ms V1 to V3",
        "P waves followed by QRS",
        "ST changes caused by digitalis",
        "1st degree AV block",
    ],
)
def test_findings_stay(statement: str) -> None:
    assert public_statements([statement, statement, ""]) == (statement, 0)


def test_private_words_and_sentences() -> None:
    assert list(sentences("Old scar. LVH; 1.5 mV in V1\nAF")) == ["Old scar.", "LVH;", "1.5 mV in V1", "AF"]
    assert list(sentences("Read by Dr. A. Weber. LVH.")) == ["Read by Dr. A. Weber.", "LVH."]
    assert public_statements(["Old scar.", "Anna was here"], {"anna"}) == ("Old scar", 1)
