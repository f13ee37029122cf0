"""Reports of several models on the same records, every two of them: OUT/comparison.json, .md and .html."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from evlecg.data.labels import labels_by_basis
from evlecg.errors import EvlecgError
from evlecg.evaluate import PREDICTIONS, VALIDATION, difference, read_scored
from evlecg.files import new_folder
from evlecg.metrics import N_BOOT, Difference, Scored
from evlecg.protocol.bench import SUBSETS
from evlecg.protocol.past import paired_answers, read_parsed
from evlecg.report import (
    AnswerComparison,
    ModelComparison,
    compare_answers,
    compare_models,
    on_shared,
    write_answer_comparison,
    write_comparison,
)


def is_report(folder: Path) -> bool:
    """Whether a folder holds a report's predictions."""
    return (folder / PREDICTIONS).is_file() and (folder / "report.json").is_file()


def paired(report_a: Path, report_b: Path, *, n_boot: int = N_BOOT) -> Difference:
    """Macro AUROC of report A minus report B on the records and labels of both, with interval and p.

    Raises:
        EvlecgError: they share none, or a truth differs.
    """
    return difference(read_scored(report_a), read_scored(report_b), n_boot)


def told_by(folder: Path) -> dict[str, object]:
    """What a report says of itself; empty where it says nothing."""
    try:
        return json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def compare_reports(
    named: Mapping[str, Path], *, out: Path, n_boot: int = N_BOOT, overwrite: bool = False
) -> ModelComparison | AnswerComparison:
    """Reports on the same records, every two of them, the earlier minus the later; writes comparison.{json,md,html}.

    Reports of likelihoods are compared by AUROC, reports of answers in words by the number of every subset.

    Args:
        named: name -> report folder.
        out: folder to write.
        n_boot: bootstrap resamples over patients.
        overwrite: replace what `out` holds.

    Raises:
        EvlecgError: fewer than two, a folder without predictions, no shared record, truths that differ, or reports of
            both kinds.
    """
    if len(named) < 2:
        raise EvlecgError("a comparison needs two models or more", where="--compare")
    sources = {name: told_by(folder).get("score_source") for name, folder in named.items()}
    if "text" in sources.values():
        return _compare_answers(named, sources, out, n_boot, overwrite)
    scored = {name: read_scored(folder) for name, folder in named.items()}
    labels = next(iter(on_shared(scored)[0].values())).labels
    validation = None
    if all((folder / VALIDATION).is_file() for folder in named.values()):
        validation = {name: read_scored(folder, name=VALIDATION) for name, folder in named.items()}
        validation = {name: _columns(found, labels) for name, found in validation.items()}
    found = compare_models(scored, validation, label_groups=labels_by_basis(labels), n_boot=n_boot)
    found = dataclasses.replace(found, notes=(*_scored_on(named), *found.notes))
    with new_folder(out, overwrite) as folder:
        write_comparison(found, folder, " against ".join(named))
    return found


def _compare_answers(
    named: Mapping[str, Path], sources: Mapping[str, object], out: Path, n_boot: int, overwrite: bool
) -> AnswerComparison:
    for name, source in sources.items():
        if source != "text":
            raise EvlecgError("reports of answers in words and of likelihoods have no number in common", where=name,
                              hint="compare reports that were made by one --protocol")  # fmt: skip
    first = next(iter(named.values()))
    parser = str(told_by(first)["metrics"]["text"]["parser"])  # type: ignore[index]
    rows = {name: read_parsed(folder, parser) for name, folder in named.items()}
    pairs = paired_answers(rows)
    if not pairs:
        raise EvlecgError("the reports share no question that has a number", where=", ".join(named),
                          hint="score them on the same data; free text is not compared")  # fmt: skip
    titles = {subset: SUBSETS[subset].title if subset in SUBSETS else subset for subset in pairs}
    found = compare_answers({titles[subset]: pair for subset, pair in pairs.items()}, n_boot=n_boot)
    n_shared = sum(len(next(iter(scored.values())).patient_ids) for _, scored in pairs.values())
    notes = [*_scored_on(named), f"Answers were read by parser: {parser}."]
    notes += [f"{name}: {len(theirs) - n_shared} answers that not all have, or that have no number, are left out."
              for name, theirs in rows.items() if len(theirs) > n_shared]  # fmt: skip
    found = dataclasses.replace(found, notes=tuple(notes))
    with new_folder(out, overwrite) as folder:
        write_answer_comparison(found, folder, " against ".join(named))
    return found


def _scored_on(named: Mapping[str, Path]) -> tuple[str, ...]:
    """What reports say they are of, where they are there and of one thing."""
    told = set()
    for folder in named.values():
        if report := told_by(folder):
            told.add(f"Scored on {report['dataset']} ({report['split']}).")
    return tuple(told) if len(told) == 1 else ()


def _columns(scored: Scored, labels: Sequence[str]) -> Scored:
    """Some of the labels; one that nobody assessed is a column without truths."""
    shape = len(scored.patient_ids), len(labels)
    value_NK, truth_NK = np.full(shape, np.nan), np.full(shape, np.nan)
    for k, label in enumerate(labels):
        if label in scored.labels:
            column = scored.labels.index(label)
            value_NK[:, k], truth_NK[:, k] = scored.value_NK[:, column], scored.truth_NK[:, column]
    return Scored(value_NK, truth_NK, scored.patient_ids, tuple(labels), scored.record_ids)
