"""One vocabulary: complete, consistent, and silent about what nobody looked for."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from evlecg.data import labels
from evlecg.data.labels import LABEL_SETS, LABELS, SNOMED, cinc_labels, cpsc_labels, judge, ludb_labels, resolve_labels
from evlecg.errors import EvlecgError

SUPER = LABEL_SETS["super"]
# The 30 codes that the 2021 challenge scores, in its 26 classes.
SCORED = """
    164889003 | 164890007 | 6374002 | 426627000 | 733534002 164909002 | 713427006 59118001 | 270492004 | 713426002
    | 39732003 | 445118002 | 251146004 | 698252002 | 426783006 | 284470004 63593006 | 10370003 | 365413008
    | 427172004 17338001 | 164947007 | 111975006 | 164917005 | 47665007 | 427393009 | 426177001 | 427084000
    | 164934002 | 59931005
"""


def test_every_code_that_can_come_out_has_a_description() -> None:
    used = {code for codes in LABEL_SETS.values() for code in codes}
    used |= set(labels.SCP_ALIASES.values()) | set(labels.CPSC_NAMES.values()) | set(labels.SNOMED_MAYBE.values())
    used |= {part for row in SNOMED.values() for part in (row.label, row.superclass)} - {""}
    used |= {code for rows in labels.LUDB_PHRASES.values() for row in rows for code in (*row[1], *row[2])}
    assert used <= set(LABELS)
    assert len(set(LABELS.values())) == len(LABELS)
    assert all(len(set(codes)) == len(codes) for codes in LABEL_SETS.values())


def test_cinc2021_set_is_the_30_scored_codes_in_26_classes() -> None:
    of_label: dict[str, set[str]] = {}
    for code, row in SNOMED.items():
        of_label.setdefault(row.label, set()).add(code)
    assert len(LABEL_SETS["cinc2021-26"]) == 26
    assert {frozenset(of_label[label]) for label in LABEL_SETS["cinc2021-26"]} == {
        frozenset(codes.split()) for codes in SCORED.split("|")
    }


def test_snomed_table_agrees_with_the_challenge(shared_data: Path) -> None:
    columns = dict(
        zip(
            "AQISPECN",
            ["CPSC", "CPSC_Extra", "StPetersburg", "PTB", "PTB_XL", "Georgia", "Chapman_Shaoxing", "Ningbo"],
            strict=True,
        )
    )
    with (shared_data / "cinc2021" / "dx_mapping_2021.csv").open(newline="") as file:
        published = {row["SNOMEDCTCode"]: row for row in csv.DictReader(file)}
    for code, row in SNOMED.items():
        used_in = "".join(letter for letter, column in columns.items() if int(published[code][column]) > 0)
        assert (row.abbreviation, row.cohorts) == (published[code]["Abbreviation"], used_in), code
    assert set(labels.SNOMED_MAYBE) <= set(published)


def test_judge_tells_no_from_not_assessed() -> None:
    found = judge(("A", "B", "C", "D"), present={"A", "C"}, assessed={"A", "B", "C", "D"}, maybe={"C", "D"})
    assert found == {"A": True, "B": False, "C": True}
    assert judge(("A",), present=set(), assessed=set()) == {}


def test_cpsc_says_nothing_of_infarction_and_hypertrophy() -> None:
    assert cpsc_labels(SUPER, {"RBBB", "AFIB"}) == {"NORM": False, "STTC": False, "CD": True}
    assert cpsc_labels(SUPER, {"NORM"}) == {"NORM": True, "STTC": False, "CD": False}
    assert cpsc_labels(("STE", "STTC", "MI"), {"STE"}) == {"STE": True, "STTC": True}


@pytest.mark.parametrize(
    ("codes", "cohort", "expected"),
    [
        ({"713427006"}, "N", {"RBBB": True, "PVC": False, "SR": False}),  # complete RBBB counts as RBBB
        ({"59118001", "164884008"}, "E", {"RBBB": True, "SR": False}),  # ventricular ectopics: PVC stays open
        ({"164884008", "17338001"}, "E", {"RBBB": False, "PVC": True, "SR": False}),
        ({"426783006"}, "", {"RBBB": False, "PVC": False, "SR": True}),  # unknown cohort: as the challenge scores it
        ({"426783006"}, "A", {"RBBB": False, "SR": True}),  # CPSC2018 used no scored code for PVC
    ],
)
def test_cinc_equivalences_and_cohorts(codes: set[str], cohort: str, expected: dict[str, bool]) -> None:
    assert cinc_labels(("RBBB", "PVC", "SR"), codes, cohort=cohort) == expected


def test_cinc_superclasses() -> None:
    def found(*codes: str, cohort: str = "P") -> dict[str, bool]:
        return cinc_labels(SUPER, set(codes), cohort=cohort)

    assert found("426783006") == {"NORM": True, "MI": False, "STTC": False, "CD": False, "HYP": False}
    assert found("426783006", "426177001")["NORM"]  # slow, but otherwise normal
    assert not found("426783006", "164890007")["NORM"]
    assert not found("426783006", "999")["NORM"]  # a code that we have no label for is a finding all the same
    assert found("164865005", "164873001") == {"NORM": False, "MI": True, "STTC": False, "CD": False, "HYP": True}
    assert "MI" not in found("426783006", cohort="A") and "HYP" not in found("426783006", cohort="A")


def ludb(**cells: str) -> dict[str, bool]:
    columns = {"rhythm": "Rhythms", "axis": "Electric axis of the heart", "conduction": "Conduction abnormalities"}
    columns |= {"hypertrophy": "Hypertrophies", "pacing": "Cardiac pacing", "ischemia": "Ischemia"}
    columns |= {"other": "Other states", "ectopy": "Extrasystolies"}
    return ludb_labels(LABEL_SETS["ludb"], {columns[key]: value for key, value in cells.items()})


def test_ludb_phrases() -> None:
    found = ludb(
        rhythm="Sinus bradycardia",
        axis="Electric axis of the heart: left axis deviation",
        conduction="Incomplete right bundle branch block\nIii degree av-block",
        hypertrophy="Left atrial overload",
        ectopy="Ventricular extrasystole, type: single pvc",
    )
    yes = {code for code, value in found.items() if value}
    assert yes == {"SBRAD", "LAD", "IRBBB", "3AVB", "CD", "LAE", "HYP", "PVC"}
    assert set(found) == set(LABEL_SETS["ludb"])


def test_ludb_normal_is_a_sinus_rhythm_and_nothing_else() -> None:
    horizontal = "Electric axis of the heart: horizontal"
    found = ludb(rhythm="Sinus rhythm", axis=horizontal)
    assert found["NORM"] and found["SR"] and not found["MI"]
    assert "LAD" not in found  # horizontal: neither normal nor deviated
    assert not ludb(rhythm="Atrial fibrillation")["NORM"]
    assert not ludb(rhythm="Sinus rhythm\nAberrant conduction")["NORM"]
    assert not ludb(rhythm="Sinus rhythm", pacing="Biventricular pacing")["NORM"]
    assert not ludb(rhythm="Sinus rhythm", other="Early repolarization syndrome")["NORM"]
    assert not ludb()["NORM"]


def test_ludb_undefined_ischemia_decides_nothing() -> None:
    undefined = "Undefined ischemia/scar/supp.nstemi: septal"
    found = ludb(rhythm="Sinus rhythm", ischemia=undefined)
    assert "MI" not in found and "STTC" not in found and found["NORM"] is False
    found = ludb(rhythm="Sinus rhythm", ischemia=f"{undefined}\nStemi: septal")
    assert found["MI"] is True and "STTC" not in found


def test_label_sets_can_be_joined_and_unknown_ones_name_the_nearest() -> None:
    assert resolve_labels("super+cpsc9")[:6] == (*SUPER, "AFIB")
    assert resolve_labels("super+cpsc9").count("NORM") == 1
    with pytest.raises(EvlecgError, match="did you mean 'super'"):
        resolve_labels("supper")
