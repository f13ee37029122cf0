"""Answers in words of a report that was written before, beside those of another: the same questions, paired.

A report folder keeps what was read off every answer (parsed.jsonl): nothing is made or parsed again. Free text that
a judge scored is not kept there, and is not compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evlecg.errors import EvlecgError
from evlecg.metrics import ACCURACY, AUC_HARD, N_BOOT, Difference, Metric, Scored, compare
from evlecg.protocol.bench import LABELS, OPEN, SUBSETS
from evlecg.protocol.scores import TextScores

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
    first = next(iter(named.values()))
    groups: dict[str, list[tuple[str, str]]] = {}
    for key in first:
        if all(key in rows for rows in named.values()):
            groups.setdefault(key[0], []).append(key)
    found = {}
    for subset, keys in groups.items():
        task = SUBSETS[subset].task if subset in SUBSETS else None
        for name, rows in named.items():
            for key in keys:
                if sorted(rows[key]["right"]) != sorted(first[key]["right"]):
                    raise EvlecgError(f"reports disagree on the right answer of {subset} {key[1]}", where=name,
                                      hint="compare answers to the same version of the data")  # fmt: skip
        if task == OPEN or not any(first[key]["right"] for key in keys):
            continue
        made = _decisions if task == LABELS else _answers
        scored = {name: made([rows[key] for key in keys]) for name, rows in named.items()}
        found[subset] = (AUC_HARD if task == LABELS else ACCURACY, scored)
    return found


def _decisions(rows: Sequence[Mapping[str, Any]]) -> Scored:
    names = tuple(sorted({name for row in rows for name in row["right"]}))
    named_NK, right_NK = (
        np.array([[float(name in row[what]) for name in names] for row in rows]) for what in ("named", "right")
    )
    return Scored(named_NK, right_NK, [row["patient_id"] for row in rows], names, [row["record_id"] for row in rows])


def _answers(rows: Sequence[Mapping[str, Any]]) -> Scored:
    return Scored.answers([float(row["correct"]) for row in rows], [row["patient_id"] for row in rows])


def drops_since(older: Rows, now: TextScores, *, n_boot: int = N_BOOT) -> dict[str, Difference]:
    """SUBSET.METRIC -> an older report minus this one, on the questions of both.

    Raises:
        EvlecgError: no question in common that has a number, or right answers that differ.
    """
    ours: Rows = {(read.item.subset, read.item.id): read.to_dict() for read in now.reads}
    pairs = paired_answers({"older": older, "this": ours})
    if not pairs:
        raise EvlecgError("the older report shares no question with this one that has a number", where="--max-drop-vs",
                          hint="--min-score gates free text")  # fmt: skip
    return {
        f"{subset}.{metric.name}": compare(metric, scored, n_boot=n_boot).pairs[0].headline
        for subset, (metric, scored) in pairs.items()
    }
