"""What a study's folder says: results.json, and the table, the figure and the recipes that are made of it."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evlecg.data.labels import labels_by_basis
from evlecg.errors import EvlecgError
from evlecg.evaluate import PREDICTIONS, read_scored
from evlecg.files import write_text_atomic
from evlecg.metrics import AUROC, Scored, compare_runs
from evlecg.study.plan import Cell, Study, check_grown, choose, final_cells, tune_cells
from evlecg.study.table import TEACHER, study_figures, study_table, write_rows


def check_stated(study: Study, out: Path) -> None:
    """Whether a folder is this study's, or that of what it was before it grew.

    Raises:
        EvlecgError: it is not, or none has begun there.
    """
    try:
        before = json.loads((out / "study.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvlecgError("no study has begun in this folder", where=out,
                          hint="the --out that it was run with; without --dry-run it begins") from error  # fmt: skip
    check_grown(before, json.loads(json.dumps(dataclasses.asdict(study))), where=out)


def tell(study: Study, out: Path) -> dict[str, Any]:
    """The content of results.json, from the cells that are done; a row's final stage is told once the row is tuned.

    Returns:
        `study`; `chosen`, a row for each pair, size and method; `teachers` and `teacher_labels`, their AUCs on the test
        split; `cells`, every run; `left`, how many are to be done; `over_records`, the leader minus every other with
        intervals over test patients.

    Raises:
        EvlecgError: the folder is not this study's.
    """
    check_stated(study, out)
    tuned = tune_cells(study)
    found = [(cell, result_of(out, cell)) for cell in tuned]
    tuning = [result for _, result in found if result is not None]
    open_rows = {(cell.pair, cell.size, cell.method) for cell, result in found if result is None}
    chosen = [
        row for row in choose(study, tuning)
        if (row["pair"], row["size"], study.methods[row["method"]].as_tuned or row["method"]) not in open_rows
    ]  # fmt: skip
    done = [(cell, result) for cell in final_cells(study, chosen) if (result := result_of(out, cell)) is not None]
    n_final = len(study.pairs) * len(study.sizes) * len(study.methods) * len(study.seeds)
    teachers = {pair: _teacher(out, pair) for pair in study.pairs}
    return {
        "study": study.name,
        "chosen": chosen,
        "teachers": {pair: found[0] if found else None for pair, found in teachers.items()},
        "teacher_labels": {pair: found[1] for pair, found in teachers.items() if found},
        "cells": [*tuning, *(result for _, result in done)],
        "left": len(tuned) - len(tuning) + n_final - len(done),
        "over_records": _over_records(study, [cell for cell, result in done if result["auc"] is not None], out),
    }


def write_told(study: Study, out: Path) -> dict[str, Any]:
    """Writes results.json, table.md, the figures and recipes/, one a row; returns the first's content."""
    told = tell(study, out)
    write_text_atomic(out / "results.json", json.dumps(told, indent=1) + "\n")
    write_text_atomic(out / "table.md", study_table(study, told))
    study_figures(study, told, out)
    write_rows(study, told, out / "recipes")
    return told


def result_of(out: Path, cell: Cell) -> dict[str, Any] | None:
    """What came of a cell; None where it is not done."""
    path = out / "cells" / f"{cell.key}.json"
    return json.loads(path.read_text()) if path.exists() else None


def aucs(report: Mapping[str, Any]) -> tuple[float | None, dict[str, float | None]]:
    """Macro AUC of a report, and that of every label."""
    auc = report["metrics"]["auc"]
    return auc["macro"]["value"], {name: label["value"] for name, label in auc["labels"].items()}


def _teacher(out: Path, pair: str) -> tuple[float | None, dict[str, float | None]] | None:
    """What a pair's teacher made of the test split; None where it is not scored."""
    report = out / "teachers" / pair / "report.json"
    return aucs(json.loads(report.read_text())) if report.exists() else None


def _over_records(study: Study, finals: Sequence[Cell], out: Path) -> list[dict[str, Any]]:
    """The leader minus every other method, and minus the teacher, seeds averaged and test patients resampled."""
    scored: dict[tuple[str, int | None, str], dict[int, Scored]] = {}
    for cell in finals:
        for found in (out / "cells" / cell.key / "run" / "report").glob(f"*/{PREDICTIONS}"):
            scored.setdefault((cell.pair, cell.size, cell.method), {})[cell.seed] = read_scored(found.parent)
    told = []
    for pair, size in itertools.product(study.pairs, study.sizes):
        ours = scored.get((pair, size, study.leader), {})
        others = {name: scored.get((pair, size, name), {}) for name in study.methods if name != study.leader}
        taught = out / "teachers" / pair
        if ours and (taught / PREDICTIONS).exists():
            labels = next(iter(ours.values())).labels
            if set(labels) <= set(read_scored(taught).labels):  # its head may know fewer
                others[TEACHER] = dict.fromkeys(ours, read_scored(taught, labels))
        for name, theirs in others.items():
            seeds = sorted(set(ours) & set(theirs))
            if seeds:
                sides = [[runs[seed] for seed in seeds] for runs in (ours, theirs)]
                found = compare_runs(AUROC, *sides, label_groups=labels_by_basis(sides[0][0].labels))
                told.append({"pair": pair, "size": size, "method": name, "seeds": seeds, **found.to_dict()})
    return told
