"""Verdicts of a language model on free-text answers, read from a file: no service is called here.

A verdict gives each aspect a score from 0 to 10; ECGBench asks for Diagnosis, Waveform and Rhythm of reports, and for
Accuracy, Completeness and Instruction Adherence in its arena. As published, numbers are means times ten.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evlecg.errors import EvlecgError
from evlecg.metrics import Metric, Scored
from evlecg.metrics.decisions import PatientSums
from evlecg.metrics.resampling import Statistic, Values, ratio
from evlecg.protocol.bench import Item
from evlecg.protocol.replies import ID_KEYS, read_rows

HIGHEST = 10.0
_VERDICT_KEYS = ("verdict", "judgement", "judgment", "judge", "scores")


def _bind_mean(scored: Scored) -> Statistic:
    return PatientSums(
        scored,
        np.stack([scored.value_NK[:, 0], np.ones(len(scored.value_NK))], axis=1),
        lambda sum_FR: Values(np.empty((sum_FR.shape[1], 0)), None, {"mean": ratio(sum_FR[0], sum_FR[1])}),
    )


JUDGED = Metric(
    name="judged",
    formula="mean over aspects of a judge's scores from 0 to 10, times 10",
    overall={"mean": "mean over answers of (mean over aspects of a judge's scores from 0 to 10, times 10)"},
    bind=_bind_mean,
)


@dataclass(frozen=True)
class Verdicts:
    """Verdicts beside the items that they are on.

    Attributes:
        by_item: (subset, id) -> aspect -> score from 0 to 10.
        malformed: ids whose verdict has no readable scores.
        extra: ids that no item has.
    """

    by_item: Mapping[tuple[str, str], Mapping[str, float]]
    malformed: tuple[str, ...]
    extra: tuple[str, ...]


def read_verdicts(path: Path, items: Sequence[Item]) -> Verdicts:
    """Reads a judge's verdicts and joins them with the questions they are on.

    A folder holds one `ID.json` an answer, as the published scripts leave it, the id being the question's or what
    stands behind its last hyphen. A file holds JSON lines, a list, or an object from ids to verdicts.

    Args:
        path: file or folder.
        items: questions that are judged; of a dialogue its first.

    Raises:
        EvlecgError: nothing there, two verdicts on one item, or an id that fits several items.
    """
    by_item: dict[tuple[str, str], Mapping[str, float]] = {}
    malformed: list[str] = []
    extra: list[str] = []
    for verdict_id, verdict, where in _rows(path):
        item = _item_of(verdict_id, items, where)
        if item is None:
            extra.append(verdict_id)
            continue
        key = (item.subset, item.id)
        if key in by_item:
            raise EvlecgError(f"two verdicts on {item.id!r}", where=where, hint="keep one")
        scores = scores_of(verdict)
        if scores:
            by_item[key] = scores
        else:
            malformed.append(verdict_id)
    return Verdicts(by_item, tuple(malformed), tuple(extra))


def _rows(path: Path) -> list[tuple[str, Any, str]]:
    if path.is_dir():
        files = sorted(path.rglob("*.json"))
        if not files:
            raise EvlecgError("the folder holds no verdicts", where=path, hint="one ID.json an answer")
        return [(file.stem, file.read_text(encoding="utf-8-sig", errors="replace"), str(file)) for file in files]
    if not path.is_file():
        raise EvlecgError("no such file of verdicts", where=path)
    rows = []
    for number, row in read_rows(path):
        where = f"{path}, row {number}"
        row = row if isinstance(row, Mapping) else {}
        row_id = next((row[key] for key in ID_KEYS if row.get(key) is not None), None)
        if row_id is None:
            raise EvlecgError("a verdict has no id", where=where, hint=f"one of {', '.join(ID_KEYS)}")
        inner = next((row[key] for key in _VERDICT_KEYS if key in row), row)
        rows.append((str(row_id), inner, where))
    return rows


def _item_of(verdict_id: str, items: Sequence[Item], where: str) -> Item | None:
    found = [item for item in items if item.id == verdict_id]
    found = found or [item for item in items if item.id.rsplit("-", 1)[-1] == verdict_id]
    if len(found) > 1:
        names = ", ".join(f"{item.subset}/{item.id}" for item in found[:3])
        raise EvlecgError(f"the verdict {verdict_id!r} fits several answers ({names}, ...)", where=where,
                          hint="name verdicts by the whole id")  # fmt: skip
    return found[0] if found else None


def scores_of(verdict: Any) -> dict[str, float]:
    """Aspect (lower case) -> score from 0 to 10 of one verdict; empty where it cannot be read.

    Args:
        verdict: `{Aspect: {Score: 8, Explanation: ...}}`, `{Aspect: 8}`, or a text that holds one of them.
    """
    if isinstance(verdict, str):
        try:
            verdict = json.loads(verdict[verdict.index("{") : verdict.rindex("}") + 1], strict=False)
        except ValueError:
            return {}
    if not isinstance(verdict, Mapping):
        return {}
    scores = {}
    for aspect, said in verdict.items():
        if isinstance(said, Mapping):
            value = next((value for key, value in said.items() if str(key).casefold() == "score"), None)
        elif aspect in ID_KEYS or isinstance(said, str) or not isinstance(said, (int, float)):
            continue  # of a row with other keys: its id, who judged
        else:
            value = said
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return {}
        if isinstance(value, bool) or not 0 <= number <= HIGHEST:
            return {}
        scores[str(aspect).casefold()] = number
    return scores
