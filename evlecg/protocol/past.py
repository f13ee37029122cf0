"""Answers in words of a report that was written before, beside those of another: the same questions, paired.

A report folder keeps what was read off every answer (parsed.jsonl): nothing is made or parsed again. Free text that
a judge scored is not kept there, and is not compared.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evlecg.errors import EvlecgError
from evlecg.metrics import ACCURACY, AUC_HARD, N_BOOT, Difference, Metric, Scored, compare
from evlecg.protocol.bench import LABELS, OPEN, SUBSETS, Item
from evlecg.protocol.parsers import PARSERS
from evlecg.protocol.scores import TextScores, subset_of

PARSED = "parsed.jsonl"
Rows = dict[tuple[str, str], Mapping[str, Any]]  # (subset, question id) -> a line of parsed.jsonl


def read_parsed(folder: Path, parser: str) -> Rows:
    """What was read off the answers of a report.

    Args:
        folder: report folder that `evlecg eval` wrote.
        parser: how they should have been read.

    Raises:
        EvlecgError: there is none, it is of likelihoods, it is damaged, or another parser read it.
    """
    try:
        theirs = json.loads((folder / "report.json").read_text(encoding="utf-8"))["metrics"]["text"]["parser"]
        lines = (folder / PARSED).read_text(encoding="utf-8").splitlines()
        rows = {(row["subset"], row["question_id"]): row for row in map(json.loads, lines)}
    except OSError as error:
        raise EvlecgError("not a report folder with answers in words", where=folder,
                          hint="a folder that evlecg eval --protocol ecgbench wrote") from error  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise EvlecgError("the report is of likelihoods, or its answers are damaged", where=folder,
                          hint="compare reports that were made in the same way") from error  # fmt: skip
    if theirs != parser:
        raise EvlecgError(f"answers there were read by parser: {theirs}, these are by parser: {parser}", where=folder,
                          hint=f"--parser {theirs}")  # fmt: skip
    return rows


def paired_answers(named: Mapping[str, Rows]) -> dict[str, tuple[Metric, dict[str, Scored]]]:
    """Subset -> its metric, and every report's answers to the questions that all of them have.

    Raises:
        EvlecgError: reports disagree on a right answer.
    """
    found = {}
    for subset, keys in _numbered(named).items():
        labels = subset in SUBSETS and SUBSETS[subset].task == LABELS
        made = _decisions if labels else _answers
        scored = {name: made([rows[key] for key in keys]) for name, rows in named.items()}
        found[subset] = (AUC_HARD if labels else ACCURACY, scored)
    return found


def _numbered(named: Mapping[str, Rows]) -> dict[str, list[tuple[str, str]]]:
    """Subset -> the questions that all reports have, of those that have a number: free text has none."""
    first = next(iter(named.values()))
    groups: dict[str, list[tuple[str, str]]] = {}
    for key in first:
        if all(key in rows for rows in named.values()):
            groups.setdefault(key[0], []).append(key)
    for (subset, question), name in itertools.product(itertools.chain(*groups.values()), named):
        if sorted(named[name][subset, question]["right"]) != sorted(first[subset, question]["right"]):
            raise EvlecgError(f"reports disagree on the right answer of {subset} {question}", where=name,
                              hint="compare answers to the same version of the data")  # fmt: skip
    free = {subset for subset in groups if subset in SUBSETS and SUBSETS[subset].task == OPEN}
    return {subset: keys for subset, keys in groups.items()
            if subset not in free and any(first[key]["right"] for key in keys)}  # fmt: skip


def _decisions(rows: Sequence[Mapping[str, Any]]) -> Scored:
    names = tuple(sorted({name for row in rows for name in row["right"]}))
    named_NK, right_NK = (
        np.array([[float(name in row[what]) for name in names] for row in rows]) for what in ("named", "right")
    )
    return Scored(named_NK, right_NK, [row["patient_id"] for row in rows], names, [row["record_id"] for row in rows])


def _answers(rows: Sequence[Mapping[str, Any]]) -> Scored:
    return Scored.answers([float(row["correct"]) for row in rows], [row["patient_id"] for row in rows])


def check_questions(older: Rows, items: Sequence[Item], parser: str, *, where: Path) -> None:
    """Checks, before a model is asked anything, that an older report can be fallen behind.

    Raises:
        EvlecgError: it has no number, nothing is asked now of a subset that it has (whose gate would vanish unseen), or
            a right answer differs.
    """
    by_subset: dict[str, list[Item]] = {}
    for item in items:
        by_subset.setdefault(item.subset, []).append(item)
    asked: Rows = {(name, item.id): {"right": PARSERS[parser].truth(subset_of(name, group), item)}
                   for name, group in by_subset.items() for item in group}  # fmt: skip
    before = _numbered({"older": older})
    if not before:
        raise EvlecgError("the older report has no number", where=where, hint="--min-score gates free text")
    now = _numbered({"older": older, "this": asked})
    for subset in before:
        if subset not in now:
            raise EvlecgError(f"the older report answers questions of {subset}, of which none is asked now",
                              where=where, hint="a report on the same subsets")  # fmt: skip


def drops_since(older: Rows, now: TextScores, *, n_boot: int = N_BOOT) -> dict[str, Difference]:
    """SUBSET.METRIC -> an older report minus this one, on the questions of both.

    Raises:
        EvlecgError: a right answer differs, or a subset that the older report answers has no answers in this one.
    """
    ours: Rows = {(read.item.subset, read.item.id): read.to_dict() for read in now.reads}
    pairs = paired_answers({"older": older, "this": ours})
    for subset in _numbered({"older": older}):
        if subset not in pairs:
            raise EvlecgError(f"the older report has answers to {subset}, this one has none", where="--max-drop-vs",
                              hint="a report on the same subsets")  # fmt: skip
    return {
        f"{subset}.{metric.name}": compare(metric, scored, n_boot=n_boot).pairs[0].headline
        for subset, (metric, scored) in pairs.items()
    }
