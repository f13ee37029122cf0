"""One label vocabulary, and how each dataset's own codes enter it.

A code follows PTB-XL (SCP-ECG) where PTB-XL has one; where the spelling differs, `SCP_ALIASES` says so. A dataset says
of each label present, not present, or nothing: the last is kept apart (the label is absent from `Record.labels`),
because "nobody looked" is not "no". The tables lie in `label_tables.py` and `label_snomed.py`.

The five superclasses (`ptbxl-super`) are PTB-XL's. What stands for them elsewhere, so that one model can be scored on
all:

| superclass | LUDB | CPSC2018 | CinC 2020/2021 | PTB (native) |
|---|---|---|---|---|
| MI | STEMI, scar | not assessed | any infarction code | infarction |
| STTC | ischemia, non-specific repolarization | ST deviation | ST, T, QT, ischemia codes | not assessed |
| CD | any conduction abnormality | 1AVB, LBBB, RBBB | block and pre-excitation codes | bundle branch block |
| HYP | any hypertrophy or overload | not assessed | hypertrophy and enlargement codes | hypertrophy |
| NORM | a sinus rhythm (axis aside), no more | its class Normal | a sinus rhythm, no more | healthy control |

LUDB's "undefined ischemia/scar/supp.NSTEMI" may be MI or STTC: neither is assessed unless another phrase decides it.
CPSC2018 did not record T waves, so its STTC is narrower than PTB-XL's. PTB's labels are those of the patient.

The 23 subclasses (`ptbxl-sub`) are PTB-XL's aggregation of its diagnostic statements. 16 of them are a single statement
and share its label (LVH, RBBB, NST, ...; NORM is statement, subclass and superclass in one). Where a subclass is wider
than the statement or narrower than the superclass of its name, it has a label of its own: `AMI-any`, `IMI-any`,
`STTC-other`; `AVB`, `LFB`, `ISCA` and `ISCI` have no namesake. Such a label is present wherever one of its kinds is
(`BROADER`), in any dataset.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from functools import lru_cache

from evlecg.data.label_snomed import (
    COHORTS,
    COHORTS_2020,
    EQUIVALENCES,
    SIDECAR_NAMES,
    SINUS_RHYTHM,
    SNOMED,
    SNOMED_CSN,
    SNOMED_MAYBE,
)
from evlecg.data.label_tables import (
    BROADER,
    COMPLETE,
    CPSC_ASSESSED,
    CPSC_NAMES,
    CPSC_NUMBERS,
    CPSC_SNOMED,
    CPSC_SUPERCLASS,
    LABEL_BASIS,
    LABEL_SETS,
    LABELS,
    LUDB_PHRASES,
    PTB_REASONS,
    PTB_WALLS,
    SCP_ALIASES,
    SCP_DIAGNOSTIC,
    SCP_FORM,
    SCP_RHYTHM,
    SCP_SUBCLASSES,
    SINUS,
    SUBCLASS_ALIASES,
    SUPERCLASSES,
)
from evlecg.errors import EvlecgError
from evlecg.recipe import nearest

__all__ = [
    "BROADER",
    "COHORTS",
    "COHORTS_2020",
    "CPSC_NAMES",
    "CPSC_NUMBERS",
    "CPSC_SNOMED",
    "EQUIVALENCES",
    "LABELS",
    "LABEL_BASIS",
    "LABEL_SETS",
    "LUDB_PHRASES",
    "SCP_ALIASES",
    "SCP_DIAGNOSTIC",
    "SCP_FORM",
    "SCP_RHYTHM",
    "SCP_SUBCLASSES",
    "SIDECAR_NAMES",
    "SNOMED",
    "SNOMED_MAYBE",
    "SUBCLASS_ALIASES",
    "SUPERCLASSES",
    "cinc_labels",
    "cpsc_labels",
    "judge",
    "labels_by_basis",
    "ludb_labels",
    "ptb_labels",
    "resolve_labels",
]

_KINDS = {wide: frozenset(code for code in BROADER if wide in BROADER[code]) for wide in COMPLETE}
_CODES = SNOMED | SNOMED_CSN
_LOCATIONS = frozenset(PTB_WALLS.values())
_WALLS = {"ante": "anterior", "sept": "septal", "infe": "inferior", "post": "posterior", "late": "lateral"}


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


def labels_by_basis(labels: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """What labels hang on (QRS shape, ST/T, rhythm, ...) -> those of them that do; see `LABEL_BASIS`.

    Labels that hang on several things, or that no table knows, are in no group; empty groups are left out.
    """
    wanted = list(labels)
    groups = {
        basis: tuple(label for label in wanted if any(label in members for members in reasons.values()))
        for basis, reasons in LABEL_BASIS.items()
        if basis != "several"
    }
    return {basis: members for basis, members in groups.items() if members}


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
    wider = _wider(present)
    present = present | wider
    maybe = maybe | _wider(maybe)
    assessed = assessed | wider | {wide for wide, kinds in _KINDS.items() if kinds <= assessed}
    return {code: code in present for code in wanted if code in assessed and (code in present or code not in maybe)}


def _wider(codes: AbstractSet[str]) -> set[str]:
    return {wide for code in codes if code in BROADER for wide in BROADER[code]}


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
    present = {part for code in codes if code in _CODES for part in _CODES[code][1:3]}
    if normal or (codes and all(code in _CODES and _CODES[code].label in SINUS for code in codes)):
        present.add("NORM")
    maybe = {label for code in codes if code in SNOMED_MAYBE for label in SNOMED_MAYBE[code]}
    return judge(wanted, present=present, assessed=_assessed_in(cohort) | present, maybe=maybe)


@lru_cache
def _assessed_in(cohort: str) -> frozenset[str]:
    rows = [row for row in SNOMED.values() if not cohort or cohort in row.cohorts]
    normal = {"NORM"} if SNOMED[SINUS_RHYTHM] in rows else set()
    return frozenset(part for row in rows for part in (row.label, row.superclass)) | normal


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


def ptb_labels(wanted: Iterable[str], reason: str, acute: str, former: str) -> dict[str, bool]:
    """Labels of a record of the PTB Diagnostic ECG Database.

    They are what the patient was admitted for, and where the infarction was. A healthy control has no superclass but
    NORM; of the others, nobody says what their tracing does not show, infarction apart.

    Args:
        wanted: label codes.
        reason: "Reason for admission" of the header.
        acute: its "Acute infarction (localization)": a place, "no", or unknown.
        former: its "Former infarction (localization)".
    """
    present: set[str] = set()
    for beginning, means in PTB_REASONS:
        if reason.strip().lower().startswith(beginning):
            present.update(means)
    assessed = set(present)
    unplaced = False
    for text, label in ((acute, "ACUTEMI"), (former, "OLDMI")):
        walls = _walls(text)
        if walls:
            present |= {"MI", label, PTB_WALLS.get(walls, "")}
            assessed.add(label)
        elif text.strip().lower() == "no":
            assessed.add(label)
        else:
            unplaced = True
    if "NORM" in present:
        assessed.update(SUPERCLASSES)
    elif present & {*SUPERCLASSES, "BBB"}:
        assessed.add("NORM")
    if not unplaced:  # both fields are known: every place that they do not name is healthy, unless none is named
        assessed.add("MI")
        if "MI" not in present or present & _LOCATIONS:
            assessed |= _LOCATIONS
    return judge(wanted, present=present, assessed=assessed | present)


def _walls(localization: str) -> frozenset[str]:
    """Walls named by "infero-latera" and the like; the header cuts words off and spells them in several ways."""
    parts = localization.strip().lower().replace("/", "-").replace(",", "-").replace(" ", "-").split("-")
    return frozenset(_WALLS[part[:4]] for part in parts if part[:4] in _WALLS)
