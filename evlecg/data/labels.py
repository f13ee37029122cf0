"""One label vocabulary, and how each dataset's own codes enter it.

A code follows PTB-XL (SCP-ECG) where PTB-XL has one; where the spelling differs, `SCP_ALIASES` says so. A dataset says
of each label present, not present, or nothing: the last is kept apart (the label is absent from `Record.labels`),
because "nobody looked" is not "no".

The five superclasses (`super`) are PTB-XL's. What stands for them elsewhere, so that one model can be scored on all:

| superclass | LUDB | CPSC2018 | CinC 2020/2021 |
|---|---|---|---|
| MI | STEMI, scar | not assessed | any infarction code |
| STTC | ischemia, non-specific repolarization | ST depression or elevation | ST, T, QT and ischemia codes |
| CD | any conduction abnormality | first-degree block, LBBB, RBBB | block, delay and pre-excitation codes |
| HYP | any hypertrophy or overload | not assessed | hypertrophy and enlargement codes |
| NORM | a sinus rhythm (axis aside) and nothing else | its class Normal | a sinus rhythm and nothing else |

LUDB's "undefined ischemia/scar/supp.NSTEMI" may be MI or STTC: neither is assessed unless another phrase decides it.
CPSC2018 did not record T waves, so its STTC is narrower than PTB-XL's.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from evlecg.errors import EvlecgError
from evlecg.recipe import nearest

# Each phrase completes "Does this ECG show ...?".
LABELS: dict[str, str] = {
    # PTB-XL's diagnostic superclasses
    "NORM": "a normal tracing",
    "MI": "myocardial infarction",
    "STTC": "an ST or T wave change",
    "CD": "a conduction disturbance",
    "HYP": "hypertrophy",
    # rhythm
    "SR": "sinus rhythm",
    "AFIB": "atrial fibrillation",
    "AFLT": "atrial flutter",
    "SBRAD": "sinus bradycardia",
    "STACH": "sinus tachycardia",
    "SARRH": "sinus arrhythmia",
    "PACE": "a paced rhythm",
    "SVARR": "a supraventricular arrhythmia",
    "SVTAC": "supraventricular tachycardia",
    "PSVT": "paroxysmal supraventricular tachycardia",
    "BIGU": "a bigeminal pattern",
    "TRIGU": "a trigeminal pattern",
    "BRADY": "bradycardia",
    # ectopic beats
    "PAC": "premature atrial contractions",
    "PVC": "premature ventricular contractions",
    # conduction
    "1AVB": "first-degree atrioventricular block",
    "2AVB": "second-degree atrioventricular block",
    "3AVB": "third-degree atrioventricular block",
    "BBB": "an unspecified bundle branch block",
    "LBBB": "complete left bundle branch block",
    "RBBB": "complete right bundle branch block",
    "ILBBB": "incomplete left bundle branch block",
    "IRBBB": "incomplete right bundle branch block",
    "LAFB": "left anterior fascicular block",
    "LPFB": "left posterior fascicular block",
    "IVCD": "a nonspecific intraventricular conduction delay",
    "WPW": "Wolff-Parkinson-White syndrome",
    "LPR": "a prolonged PR interval",
    # chambers, axis and voltage
    "LVH": "left ventricular hypertrophy",
    "RVH": "right ventricular hypertrophy",
    "LAE": "left atrial overload or enlargement",
    "RAE": "right atrial overload or enlargement",
    "LAD": "left axis deviation",
    "RAD": "right axis deviation",
    "LVOLT": "low QRS voltages",
    # waves
    "STD": "ST depression",
    "STE": "ST elevation",
    "TAB": "a T wave abnormality",
    "INVT": "T wave inversion",
    "QWAVE": "abnormal Q waves",
    "PRWP": "poor R wave progression",
    "LNGQT": "a prolonged QT interval",
}

SUPERCLASSES = ("NORM", "MI", "STTC", "CD", "HYP")
SCP_RHYTHM = ("SR", "AFIB", "STACH", "SARRH", "SBRAD", "PACE", "SVARR", "BIGU", "AFLT", "SVTAC", "PSVT", "TRIGU")
SINUS = frozenset({"SR", "SBRAD", "STACH", "SARRH"})  # rhythms that leave a tracing normal

# fmt: off
LABEL_SETS: dict[str, tuple[str, ...]] = {
    "super": SUPERCLASSES,
    "rhythm": SCP_RHYTHM,
    "cpsc9": ("NORM", "AFIB", "1AVB", "LBBB", "RBBB", "PAC", "PVC", "STD", "STE"),
    # the 30 scored codes of the 2021 challenge in its 26 classes
    "cinc2021-26": (
        "AFIB", "AFLT", "BBB", "BRADY", "LBBB", "RBBB", "1AVB", "IRBBB", "LAD", "LAFB", "LVOLT", "IVCD", "SR", "PAC",
        "PACE", "PRWP", "PVC", "LPR", "LNGQT", "QWAVE", "RAD", "SARRH", "SBRAD", "STACH", "TAB", "INVT",
    ),
    "code15-6": ("1AVB", "RBBB", "LBBB", "SBRAD", "STACH", "AFIB"),
    # what the cart's own statements of MIMIC-IV-ECG decide: a machine's labels, not a reader's
    "mimic-machine": (
        *SUPERCLASSES, "SR", "AFIB", "AFLT", "SBRAD", "STACH", "SARRH", "PACE", "SVTAC", "PAC", "PVC", "BIGU", "TRIGU",
        "1AVB", "2AVB", "3AVB", "LBBB", "RBBB", "ILBBB", "IRBBB", "LAFB", "LPFB", "IVCD", "WPW", "LVH", "RVH", "LAE",
        "RAE", "LAD", "RAD", "LVOLT", "STD", "STE", "TAB", "PRWP", "LNGQT",
    ),
    "ludb": (
        *SUPERCLASSES, "SR", "AFIB", "AFLT", "SBRAD", "STACH", "SARRH", "PACE", "PAC", "PVC", "1AVB", "3AVB", "LBBB",
        "RBBB", "ILBBB", "IRBBB", "LAFB", "IVCD", "LVH", "RVH", "LAE", "RAE", "LAD", "RAD",
    ),
}

# PTB-XL code -> label, where the two differ.
SCP_ALIASES = {
    "CLBBB": "LBBB", "CRBBB": "RBBB", "STD_": "STD", "STE_": "STE", "TAB_": "TAB", "LAO/LAE": "LAE", "RAO/RAE": "RAE",
}

CPSC_NAMES = {
    "Normal": "NORM", "AF": "AFIB", "I-AVB": "1AVB", "LBBB": "LBBB", "RBBB": "RBBB", "PAC": "PAC", "PVC": "PVC",
    "STD": "STD", "STE": "STE",
}
# CPSC2018 in the challenge's form: the same nine classes under SNOMED codes, which mean what CPSC meant by them.
CPSC_SNOMED = {
    "426783006": "NORM", "164889003": "AFIB", "270492004": "1AVB", "164909002": "LBBB", "59118001": "RBBB",
    "284470004": "PAC", "164884008": "PVC", "429622005": "STD", "164931005": "STE",
}
CPSC_SUPERCLASS = {
    "NORM": "NORM", "1AVB": "CD", "LBBB": "CD", "RBBB": "CD", "STD": "STTC", "STE": "STTC",
    "AFIB": "", "PAC": "", "PVC": "",
}
# fmt: on
CPSC_ASSESSED = frozenset(CPSC_NAMES.values()) | {"CD", "STTC"}

# LUDB: column of ludb.csv -> (how a phrase begins, in lower case; labels that it means; labels that it may mean).
# The first beginning that fits decides. A phrase that fits none is a finding without a label of ours.
LUDB_PHRASES: dict[str, tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]] = {
    "Rhythms": (
        ("sinus rhythm", ("SR",), ()),
        ("sinus bradycardia", ("SBRAD",), ()),
        ("sinus tachycardia", ("STACH",), ()),
        ("sinus arrhythmia", ("SARRH",), ()),
        ("irregular sinus rhythm", ("SARRH",), ()),
        ("atrial fibrillation", ("AFIB",), ()),
        ("atrial flutter", ("AFLT",), ()),
    ),
    "Electric axis of the heart": (
        ("electric axis of the heart: left axis deviation", ("LAD",), ()),
        ("electric axis of the heart: right axis deviation", ("RAD",), ()),
        (
            "electric axis of the heart: horizontal",
            (),
            ("LAD",),
        ),  # on the way to the left; where it ends is not defined
        ("electric axis of the heart: vertical", (), ("RAD",)),
    ),
    "Conduction abnormalities": (
        ("i degree av", ("1AVB", "CD"), ()),
        ("iii degree av", ("3AVB", "CD"), ()),
        ("complete left bundle", ("LBBB", "CD"), ()),
        ("complete right bundle", ("RBBB", "CD"), ()),
        ("incomplete left bundle", ("ILBBB", "CD"), ()),
        ("incomplete right bundle", ("IRBBB", "CD"), ()),
        ("left anterior hemiblock", ("LAFB", "CD"), ()),
        ("non-specific intrav", ("IVCD", "CD"), ()),
        ("", ("CD",), ()),
    ),
    "Extrasystolies": (
        ("atrial extrasystole", ("PAC",), ()),
        ("ventricular extrasystole", ("PVC",), ()),
    ),
    "Hypertrophies": (
        ("left ventricular hypertrophy", ("LVH", "HYP"), ()),
        ("right ventricular hypertrophy", ("RVH", "HYP"), ()),
        ("left atrial", ("LAE", "HYP"), ()),  # hypertrophy and overload: one statement in PTB-XL
        ("right atrial", ("RAE", "HYP"), ()),
        ("", ("HYP",), ()),
    ),
    "Cardiac pacing": (("", ("PACE",), ()),),
    "Ischemia": (
        ("stemi", ("MI",), ()),
        ("scar formation", ("MI",), ()),
        ("ischemia", ("STTC",), ()),
        ("undefined ischemia", (), ("MI", "STTC")),
    ),
    "Non-specific repolarization abnormalities": (("", ("STTC",), ()),),
    "Other states": (),
}


class Snomed(NamedTuple):
    """A SNOMED CT code of CinC 2020/2021.

    Attributes:
        abbreviation: the challenge's.
        label: our code, "" where we have none.
        superclass: "" where it belongs to none.
        cohorts: letters of the cohorts that use it (`COHORTS`): the others did not assess it.
    """

    abbreviation: str
    label: str
    superclass: str
    cohorts: str


COHORTS = {
    "cpsc_2018": "A",
    "cpsc_2018_extra": "Q",
    "st_petersburg_incart": "I",
    "ptb": "S",
    "ptb-xl": "P",
    "georgia": "E",
    "chapman_shaoxing": "C",
    "ningbo": "N",
}

SINUS_RHYTHM = "426783006"
# Clinically PVCs, but the challenge does not score this code as PVC, nor the next two as a pacing rhythm: a record
# that has one of them says neither yes nor no to the label.
SNOMED_MAYBE = {"164884008": "PVC", "251266004": "PACE", "251268003": "PACE"}

# The challenge's equivalences are two codes with one label: CLBBB = LBBB, CRBBB = RBBB, PAC = SVPB, PVC = VPB.
SNOMED: dict[str, Snomed] = {
    "164889003": Snomed("AF", "AFIB", "", "AQISPEC"),
    "164890007": Snomed("AFL", "AFLT", "", "QSPECN"),
    "6374002": Snomed("BBB", "BBB", "CD", "ISEN"),
    "426627000": Snomed("Brady", "BRADY", "", "QIEN"),
    "733534002": Snomed("CLBBB", "LBBB", "CD", "N"),
    "164909002": Snomed("LBBB", "LBBB", "CD", "AQPECN"),
    "713427006": Snomed("CRBBB", "RBBB", "CD", "QPEN"),
    "59118001": Snomed("RBBB", "RBBB", "CD", "AQIECN"),
    "270492004": Snomed("IAVB", "1AVB", "CD", "AQPECN"),
    "713426002": Snomed("IRBBB", "IRBBB", "CD", "QPEN"),
    "39732003": Snomed("LAD", "LAD", "", "PECN"),
    "445118002": Snomed("LAnFB", "LAFB", "CD", "PEN"),
    "251146004": Snomed("LQRSV", "LVOLT", "", "PECN"),
    "698252002": Snomed("NSIVCB", "IVCD", "CD", "QIPECN"),
    "426783006": Snomed("NSR", "SR", "", "AQSPECN"),
    "284470004": Snomed("PAC", "PAC", "", "AQIPECN"),
    "63593006": Snomed("SVPB", "PAC", "", "QIPEN"),
    "10370003": Snomed("PR", "PACE", "", "QPN"),
    "365413008": Snomed("PRWP", "PRWP", "", "N"),
    "427172004": Snomed("PVC", "PVC", "", "QN"),
    "17338001": Snomed("VPB", "PVC", "", "QEC"),
    "164947007": Snomed("LPR", "LPR", "", "PCN"),
    "111975006": Snomed("LQT", "LNGQT", "STTC", "QPECN"),
    "164917005": Snomed("QAb", "QWAVE", "", "QPECN"),
    "47665007": Snomed("RAD", "RAD", "", "QPECN"),
    "427393009": Snomed("SA", "SARRH", "", "QIPEN"),
    "426177001": Snomed("SB", "SBRAD", "", "QPECN"),
    "427084000": Snomed("STach", "STACH", "", "QISPECN"),
    "164934002": Snomed("TAb", "TAB", "STTC", "QPECN"),
    "59931005": Snomed("TInv", "INVT", "STTC", "QIPECN"),
    "164865005": Snomed("MI", "", "MI", "QISPECN"),
    "164867002": Snomed("OldMI", "", "MI", "Q"),
    "57054005": Snomed("AMI", "", "MI", "IN"),
    "54329005": Snomed("AnMI", "", "MI", "QPN"),
    "428750005": Snomed("NSSTTA", "", "STTC", "QPEC"),
    "55930002": Snomed("STC", "", "STTC", "QPEN"),
    "164930006": Snomed("STIAb", "", "STTC", "QIECN"),
    "429622005": Snomed("STD", "STD", "STTC", "AQIPECN"),
    "164931005": Snomed("STE", "STE", "STTC", "AQIPEC"),
    "164861001": Snomed("MIs", "", "STTC", "QP"),
    "426434006": Snomed("AnMIs", "", "STTC", "PE"),
    "425419005": Snomed("IIs", "", "STTC", "PE"),
    "425623009": Snomed("LIs", "", "STTC", "PE"),
    "413444003": Snomed("AMIs", "", "STTC", "QE"),
    "413844008": Snomed("CMI", "", "STTC", "Q"),
    "704997005": Snomed("ISTD", "STD", "STTC", "Q"),
    "370365005": Snomed("LVS", "", "STTC", "Q"),
    "233917008": Snomed("AVB", "", "CD", "QECN"),
    "27885002": Snomed("CHB", "3AVB", "CD", "QPECN"),
    "204384007": Snomed("CIAHB", "", "CD", "S"),
    "82226007": Snomed("DIB", "", "CD", "Q"),
    "195042002": Snomed("IIAVB", "2AVB", "CD", "QPECN"),
    "426183003": Snomed("IIAVBII", "2AVB", "CD", "N"),
    "54016002": Snomed("MoI", "2AVB", "CD", "ICN"),
    "251120003": Snomed("ILBBB", "ILBBB", "CD", "QPEN"),
    "445211001": Snomed("LPFB", "LPFB", "CD", "PEN"),
    "65778007": Snomed("SAB", "", "CD", "QN"),
    "195060002": Snomed("VPEx", "", "CD", "QEC"),
    "74390002": Snomed("WPW", "WPW", "CD", "ISPECN"),
    "164873001": Snomed("LVH", "LVH", "HYP", "QIPECN"),
    "89792004": Snomed("RVH", "RVH", "HYP", "QPECN"),
    "67741000119109": Snomed("LAE", "LAE", "HYP", "QPEN"),
    "446813000": Snomed("LAH", "LAE", "HYP", "QN"),
    "446358003": Snomed("RAH", "RAE", "HYP", "QPCN"),
    "195126007": Snomed("AH", "", "HYP", "QE"),
    "266249003": Snomed("VH", "", "HYP", "QSPE"),
    "426761007": Snomed("SVT", "SVTAC", "", "QIPECN"),
    "67198005": Snomed("PSVT", "PSVT", "", "IP"),
    "11157007": Snomed("VBig", "BIGU", "", "QIPEC"),
    "251173003": Snomed("AB", "BIGU", "", "IC"),
    "251180001": Snomed("VTrig", "TRIGU", "", "QIPEC"),
}

# Names that labels.csv sidecars use beside the challenge's abbreviations -> SNOMED code.
_SIDECAR_ALIASES = {
    "Normal": SINUS_RHYTHM,
    "NORM": SINUS_RHYTHM,
    "SR": SINUS_RHYTHM,
    "I-AVB": "270492004",
    "SBRAD": "426177001",
    "LNGQT": "111975006",
    "LVOLT": "251146004",
    "IMI": "164865005",
    "VPC": "17338001",
}
SIDECAR_NAMES = {row.abbreviation.casefold(): code for code, row in SNOMED.items()} | {
    name.casefold(): code for name, code in _SIDECAR_ALIASES.items()
}


def resolve_labels(sets: str) -> tuple[str, ...]:
    """Label codes of one set, or of several joined by `+`, in order and once each.

    Raises:
        EvlecgError: a set that does not exist, naming the nearest.
    """
    codes: dict[str, None] = {}
    for name in sets.split("+"):
        if name.strip() not in LABEL_SETS:
            raise EvlecgError(f"unknown label set {name.strip()!r}", hint=nearest(name.strip(), LABEL_SETS))
        codes.update(dict.fromkeys(LABEL_SETS[name.strip()]))
    return tuple(codes)


def judge(
    wanted: Iterable[str],
    *,
    present: AbstractSet[str],
    assessed: AbstractSet[str],
    maybe: AbstractSet[str] = frozenset(),
) -> dict[str, bool]:
    """Present or not, for each wanted label that was assessed.

    Args:
        wanted: label codes, in the order of the result.
        present: what was found.
        assessed: what somebody looked for.
        maybe: what the wording leaves open; not assessed unless it is also in `present`.
    """
    return {code: code in present for code in wanted if code in assessed and (code in present or code not in maybe)}


def cinc_labels(
    wanted: Iterable[str], codes: AbstractSet[str], *, cohort: str, normal: bool = False
) -> dict[str, bool]:
    """Labels of a CinC record.

    Args:
        wanted: label codes.
        codes: its SNOMED codes; others (any text) count as findings without a label.
        cohort: letter of its cohort; "" where it is unknown, and every label counts as assessed, as in the challenge.
        normal: whether it is called normal outright.
    """
    present = {part for code in codes if code in SNOMED for part in (SNOMED[code].label, SNOMED[code].superclass)}
    rows = [row for row in SNOMED.values() if not cohort or cohort in row.cohorts]
    assessed = {part for row in rows for part in (row.label, row.superclass)}
    if SNOMED[SINUS_RHYTHM] in rows:
        assessed.add("NORM")
    if normal or (codes and all(code in SNOMED and SNOMED[code].label in SINUS for code in codes)):
        present.add("NORM")
    maybe = {SNOMED_MAYBE[code] for code in codes if code in SNOMED_MAYBE}
    return judge(wanted, present=present, assessed=assessed | present, maybe=maybe)


def cpsc_labels(wanted: Iterable[str], classes: AbstractSet[str]) -> dict[str, bool]:
    """Labels of a CPSC2018 record from those of its nine classes that it has (as labels of ours)."""
    present = classes | {CPSC_SUPERCLASS[code] for code in classes}
    return judge(wanted, present=present, assessed=CPSC_ASSESSED)


def ludb_labels(wanted: Iterable[str], cells: dict[str, str]) -> dict[str, bool]:
    """Labels of a LUDB record.

    Args:
        wanted: label codes.
        cells: column of ludb.csv -> its cell, one phrase a line.
    """
    present: set[str] = set()
    maybe: set[str] = set()
    other_finding = False
    assessed = {code for rows in LUDB_PHRASES.values() for _, means, _ in rows for code in means} | {"NORM"}
    for column, rows in LUDB_PHRASES.items():
        phrases = [phrase.strip().lower() for phrase in cells.get(column, "").splitlines() if phrase.strip()]
        for phrase in phrases:
            means, may_mean = next(((row[1], row[2]) for row in rows if phrase.startswith(row[0])), ((), ()))
            present.update(means)
            maybe.update(may_mean)
            if column != "Electric axis of the heart":
                other_finding |= not (means and SINUS.issuperset(means))
    if not other_finding and present & SINUS:
        present.add("NORM")
    return judge(wanted, present=present, assessed=assessed, maybe=maybe)
