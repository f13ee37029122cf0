"""Answers in words of a report that was written before, beside those of another: the same questions, paired.

A report folder keeps what was read off every answer (parsed.jsonl): nothing is made or parsed again. Subsets that have
no number in the report have none here; a judge's scores are not kept an answer, hence not compared.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evlecg.errors import EvlecgError
from evlecg.metrics import ACCURACY, AUC_HARD, N_BOOT, Difference, Metric, Scored, compare
from evlecg.protocol.bench import Item
from evlecg.protocol.parsers import PARSERS
from evlecg.protocol.scores import TextScores, subset_of

PARSED = "parsed.jsonl"
METRICS = {AUC_HARD.name: AUC_HARD, ACCURACY.name: ACCURACY}
Rows = dict[tuple[str, str], Mapping[str, Any]]  # (subset, question id) -> a line of parsed.jsonl, and its `metric`


def read_parsed(folder: Path, parser: str) -> Rows:
    """What was read off the answers of a report, of its subsets that have a number.

    Args:
        folder: report folder that `evlecg eval` wrote.
        parser: how they should have been read.

    Raises:
        EvlecgError: there is none, it is of likelihoods, it is damaged, or another parser read it.
    """
    try:
        told = json.loads((folder / "report.json").read_text(encoding="utf-8"))["metrics"]["text"]
        theirs, metrics = told["parser"], {name: one["metric"] for name, one in told["subsets"].items()}
        lines = (folder / PARSED).read_text(encoding="utf-8").splitlines()
        rows = _with_metric(map(json.loads, lines), metrics)
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
    for subset, keys in _shared(named).items():
        metric = METRICS[next(iter(named.values()))[keys[0]]["metric"]]
        made = _decisions if metric is AUC_HARD else _answers
        found[subset] = (metric, {name: made([rows[key] for key in keys]) for name, rows in named.items()})
    return found


def _with_metric(rows: Iterable[Mapping[str, Any]], metrics: Mapping[str, str | None]) -> Rows:
    """Rows by subset and id, each with its subset's metric; those of subsets that have none are left out."""
    return {(row["subset"], row["question_id"]): {**row, "metric": metrics[row["subset"]]}
            for row in rows if metrics[row["subset"]] in METRICS}  # fmt: skip


def _shared(named: Mapping[str, Rows]) -> dict[str, list[tuple[str, str]]]:
    """Subset -> the questions that all reports have."""
    first = next(iter(named.values()))
    groups: dict[str, list[tuple[str, str]]] = {}
    for key in first:
        if all(key in rows for rows in named.values()):
            groups.setdefault(key[0], []).append(key)
    for (subset, question), name in itertools.product(itertools.chain(*groups.values()), named):
        if sorted(named[name][subset, question]["right"]) != sorted(first[subset, question]["right"]):
            raise EvlecgError(f"reports disagree on the right answer of {subset} {question}", where=name,
                              hint="compare answers to the same version of the data")  # fmt: skip
    return groups


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
    subsets = {name: subset_of(name, group) for name, group in by_subset.items()}
    asked = _with_metric(
        ({"subset": item.subset, "question_id": item.id, "right": PARSERS[parser].truth(subsets[item.subset], item)}
         for item in items), {name: subset.metric for name, subset in subsets.items()},
    )  # fmt: skip
    if not older:
        raise EvlecgError("the older report has no number", where=where, hint="--min-score gates free text")
    now = _shared({"older": older, "this": asked})
    for subset in _shared({"older": older}):
        if subset not in now:
            raise EvlecgError(f"the older report answers questions of {subset}, of which none is asked now",
                              where=where, hint="a report on the same subsets")  # fmt: skip


def drops_since(older: Rows, now: TextScores, *, n_boot: int = N_BOOT) -> dict[str, Difference]:
    """SUBSET.METRIC -> an older report minus this one, on the questions of both.

    Raises:
        EvlecgError: a right answer differs, or a subset that the older report answers has no answers in this one.
    """
    ours = _with_metric((read.to_dict() for read in now.reads), {name: one.metric for name, one in now.subsets.items()})
    pairs = paired_answers({"older": older, "this": ours})
    for subset in _shared({"older": older}):
        if subset not in pairs:
            raise EvlecgError(f"the older report has answers to {subset}, this one has none", where="--max-drop-vs",
                              hint="a report on the same subsets")  # fmt: skip
    return {
        f"{subset}.{metric.name}": compare(metric, scored, n_boot=n_boot).pairs[0].headline
        for subset, (metric, scored) in pairs.items()
    }
