"""One vocabulary: complete, consistent, and silent about what nobody looked for."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from evlecg.data import labels
from evlecg.data.labels import (
    LABEL_SETS,
    LABELS,
    SNOMED,
    cinc_labels,
    cpsc_labels,
    judge,
    ludb_labels,
    ptb_labels,
    resolve_labels,
)
from evlecg.errors import EvlecgError

SUPER = LABEL_SETS["ptbxl-super"]
# The 30 codes that the 2021 challenge scores, in its 26 classes.
SCORED = """
    164889003 | 164890007 | 6374002 | 426627000 | 733534002 164909002 | 713427006 59118001 | 270492004 | 713426002
    | 39732003 | 445118002 | 251146004 | 698252002 | 426783006 | 284470004 63593006 | 10370003 | 365413008
    | 427172004 17338001 | 164947007 | 111975006 | 164917005 | 47665007 | 427393009 | 426177001 | 427084000
    | 164934002 | 59931005
"""


def test_every_code_that_can_come_out_has_a_description() -> None:
    used = {code for codes in LABEL_SETS.values() for code in codes}
    used |= set(labels.SCP_ALIASES.values()) | set(labels.CPSC_NAMES.values())
    used |= {code for codes in labels.SNOMED_MAYBE.values() for code in codes}
    used |= set(labels.BROADER) | {code for codes in labels.BROADER.values() for code in codes}
    used |= set(labels.SUBCLASS_ALIASES.values())
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
    assert list(SNOMED) == list(published) and len(SNOMED) == 133
    for code, row in SNOMED.items():
        assert bool(row.label) != bool(row.reason), code
        assert row.superclass in ("", *SUPER)
        used_in = "".join(letter for letter, column in columns.items() if int(published[code][column]) > 0)
        assert (row.abbreviation, row.cohorts) == (published[code]["Abbreviation"], used_in), code
    assert set(labels.SNOMED_MAYBE) <= set(published)


def test_equivalences_are_those_that_the_challenge_notes(shared_data: Path) -> None:
    with (shared_data / "cinc2021" / "dx_mapping_2021.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    noted = {frozenset(re.findall(r"\d{5,}", row["Notes"])) for row in rows if row["Notes"]}
    assert noted == {frozenset(pair.codes) for pair in labels.EQUIVALENCES}
    for pair in labels.EQUIVALENCES:
        assert {SNOMED[code].label for code in pair.codes} == {pair.label}
        assert tuple(SNOMED[code].abbreviation for code in pair.codes) == pair.names


def test_ptbxl_sets_are_those_of_its_table(shared_data: Path) -> None:
    with (shared_data / "ptbxl" / "scp_statements.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    def codes(column: str) -> set[str]:
        return {labels.SCP_ALIASES.get(row[""], row[""]) for row in rows if row[column].startswith("1")}

    for name, column, count in (("diag", "diagnostic", 44), ("form", "form", 19), ("rhythm", "rhythm", 12)):
        assert set(LABEL_SETS[f"ptbxl-{name}"]) == codes(column) and len(LABEL_SETS[f"ptbxl-{name}"]) == count
    assert set(LABEL_SETS["ptbxl-all"]) == codes("diagnostic") | codes("form") | codes("rhythm")
    assert len(LABEL_SETS["ptbxl-all"]) == 71 == len(rows)
    kinds: dict[str, set[str]] = {}
    for row in rows:
        if row["diagnostic"]:
            subclass = labels.SUBCLASS_ALIASES.get(row["diagnostic_subclass"], row["diagnostic_subclass"])
            kinds.setdefault(subclass, set()).add(labels.SCP_ALIASES.get(row[""], row[""]))
    assert set(kinds) == set(LABEL_SETS["ptbxl-sub"]) and len(kinds) == 23
    for subclass, members in kinds.items():  # either the statement of that name alone, or a label of its own
        if subclass in LABEL_SETS["ptbxl-all"]:
            assert members == {subclass}
        else:
            assert members == {code for code, wide in labels.BROADER.items() if subclass in wide}


def test_2020_set_is_the_2021_set_without_its_newcomers() -> None:
    assert set(LABEL_SETS["cinc2021-26"]) - set(LABEL_SETS["cinc2020-24"]) == {"BBB", "PRWP"}
    assert len(LABEL_SETS["cinc2020-24"]) == 24


def test_wider_labels_follow_their_kinds() -> None:
    wanted = ("AVB", "VEB")
    assert judge(wanted, present={"2AVB"}, assessed={"2AVB"}) == {"AVB": True}
    assert judge(wanted, present=set(), assessed={"1AVB", "2AVB"}) == {}  # nobody looked for the third degree
    assert judge(wanted, present=set(), assessed={"1AVB", "2AVB", "3AVB"}) == {"AVB": False}
    assert judge(wanted, present=set(), assessed={"PVC", "COUPLET"}) == {}  # there are other ectopic beats
    assert judge(("AMI-any",), present={"MI"}, assessed={"AMI-any", "MI"}, maybe={"AMI"}) == {}


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


def test_codes_wider_than_a_label_leave_it_open() -> None:
    found = cinc_labels(("AVB", "1AVB", "LBBB", "BBB"), {"233917008", "6374002"}, cohort="E")
    assert found == {"AVB": True, "BBB": True}
    found = cinc_labels(("AFAFL", "AFIB", "AFLT"), {"195080001"}, cohort="Q")
    assert found == {"AFAFL": True}
    found = cinc_labels(("HYP", "LAE", "LAABN"), {"253352002"}, cohort="E")
    assert found == {"LAABN": True}
    assert cinc_labels(("LVOLT",), {"251147008"}, cohort="C") == {"LVOLT": True}  # a code of the CSN release only


def test_ptb_labels_are_those_of_the_patient() -> None:
    wanted = ("NORM", "MI", "STTC", "CD", "HYP", "BBB", "ACUTEMI", "OLDMI", "ILMI", "IMI-any", "AMI-any")
    infarct = ptb_labels(wanted, "Myocardial infarction", "infero-latera", "no")
    assert infarct == {
        "NORM": False, "MI": True, "ACUTEMI": True, "OLDMI": False, "ILMI": True, "IMI-any": True, "AMI-any": False,
    }  # fmt: skip
    assert ptb_labels(wanted, "Myocardial infarction", "unknown", "unknown") == {"NORM": False, "MI": True}
    assert ptb_labels(wanted, "Myocardial infarction", "no", "antero-septo-lateral")["AMI-any"] is True
    assert "AMI-any" not in ptb_labels(wanted, "Myocardial infarction", "no", "no")  # somewhere
    healthy = ptb_labels(wanted, "Healthy control", "no", "no")
    assert {code for code, value in healthy.items() if value} == {"NORM"} and set(SUPER) <= set(healthy)
    block = ptb_labels(wanted, "Bundle branch block", "no", "no")
    assert block["BBB"] and block["CD"] and not block["NORM"] and not block["MI"] and "HYP" not in block
    assert ptb_labels(SUPER, "Heart failure (NYHA 3)", "n/a", "n/a") == {}


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
    assert resolve_labels("ptbxl-super+cpsc9")[:6] == (*SUPER, "AFIB")
    assert resolve_labels("ptbxl-super+cpsc9").count("NORM") == 1
    with pytest.raises(EvlecgError, match="did you mean 'ptbxl-super'"):
        resolve_labels("ptbxl-supper")
