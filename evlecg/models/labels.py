"""From a classifier's own names of its classes (`config.id2label`) to label codes of the vocabulary."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

from evlecg.data.labels import CPSC_NAMES, LABELS, SCP_ALIASES, SIDECAR_NAMES, SNOMED

_UNNAMED = re.compile(r"LABEL_\d+")


def label_codes(id2label: Mapping[Any, str], own: Collection[str] = ()) -> tuple[str | None, ...]:
    """Label code of each row of a head, None where its name is not in the vocabulary.

    Names are codes, phrases, PTB-XL's statements, CPSC's classes, SNOMED CT codes or the CinC challenges'
    abbreviations; case, blanks, underscores and hyphens do not matter. A code that two rows claim is the first one's.

    Args:
        id2label: row -> name.
        own: codes that the checkpoint brings along (evlecg.json), whether the vocabulary knows them or not.
    """
    codes: list[str | None] = []
    for row in range(max(id2label, default=-1) + 1):
        name = str(id2label.get(row, ""))
        code = name if name in own else None if _UNNAMED.fullmatch(name) else _known().get(_folded(name))
        codes.append(code if code not in codes else None)
    return tuple(codes)


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.casefold())


@lru_cache
def _known() -> dict[str, str]:
    """Folded name -> code; where tables disagree, the earlier one holds: our codes, then phrases, then datasets'."""
    snomed = {code: row.label for code, row in SNOMED.items() if row.label}
    sidecar = {name: snomed[code] for name, code in SIDECAR_NAMES.items() if code in snomed}
    tables = (
        {code: code for code in LABELS},
        {phrase: code for code, phrase in LABELS.items()},
        {phrase.split(" ", 1)[1]: code for code, phrase in LABELS.items() if phrase.startswith(("a ", "an ", "any "))},
        SCP_ALIASES, CPSC_NAMES, snomed, sidecar,
    )  # fmt: skip
    known: dict[str, str] = {}
    for table in tables:
        for name, code in table.items():
            known.setdefault(_folded(name), code)
    return known
