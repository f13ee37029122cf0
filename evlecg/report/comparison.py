"""Models beside one another: the short table of a run, and the paired comparison of reports on the same records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from evlecg.errors import EvlecgError
from evlecg.files import write_text_atomic
from evlecg.metrics import (
    AUROC,
    N_BOOT,
    Comparison,
    DeLongTest,
    McNemar,
    Metric,
    Scored,
    compare,
    delong_test,
    fixed_thresholds,
    holm,
    mcnemar,
    thresholds_for_youden,
)
from evlecg.report.data import Report
from evlecg.report.html import page_html, section_html
from evlecg.report.markdown import section_lines, table_lines
from evlecg.report.measured import ANSWERED
from evlecg.report.sections import (
    RULE_WORDS,
    Section,
    Table,
    answer_sections,
    comparison_sections,
    estimate_text,
    number,
)


def comparison_table(rows: Sequence[tuple[str, Report]]) -> Table:
    """One row per (name, report); the columns hold every report's labels."""
    labels = list(dict.fromkeys(label for _, report in rows for label in report.labels))
    cells = [
        (
            name,
            estimate_text(report.macro),
            *(number(report.label_aucs[label].value if label in report.labels else None) for label in labels),
        )
        for name, report in rows
    ]
    return Table(("model", "macro AUC (95% interval)", *labels), cells)


def comparison_markdown(rows: Sequence[tuple[str, Report]]) -> str:
    """The comparison as a Markdown table."""
    return "\n".join(table_lines(comparison_table(rows))) + "\n"


def comparison_dict(rows: Sequence[tuple[str, Report]]) -> dict[str, Any]:
    """The comparison for `--json`: of every model the AUROCs and counts of its report.json."""
    kept = ("model", "dataset", "split", "n_records", "n_patients", "left_out", "score_source")
    models = []
    for name, report in rows:
        tree = report.to_dict()
        models.append({"name": name, **{key: tree[key] for key in kept}, "metrics": {"auc": tree["metrics"]["auc"]}})
    return {"models": models}


def on_shared(models: Mapping[str, Scored]) -> tuple[dict[str, Scored], list[str]]:
    """Models on the records and labels that all of them have, in the first one's order.

    Args:
        models: by name, each with its `record_ids`.

    Returns:
        The same models, and a sentence for each that has more than is shared.

    Raises:
        EvlecgError: nothing is shared.
    """
    first, *others = models.values()
    ids = [set(scored.record_ids) for scored in others]
    records = [record for record in first.record_ids if all(record in known for known in ids)]
    labels = tuple(label for label in first.labels if all(label in scored.labels for scored in others))
    if not records or not labels:
        raise EvlecgError("the reports share no record" if not records else "the reports share no label",
                          where=", ".join(models), hint="score them on the same data, split and labels")  # fmt: skip
    shared, notes = {}, []
    for name, scored in models.items():
        place = {record: row for row, record in enumerate(scored.record_ids)}
        rows = np.array([place[record] for record in records])
        columns = np.array([scored.labels.index(label) for label in labels])
        patients = [str(scored.patient_ids[row]) for row in rows]
        shared[name] = Scored(
            scored.value_NK[np.ix_(rows, columns)], scored.truth_NK[np.ix_(rows, columns)],
            patients, labels, records,
        )  # fmt: skip
        more = len(scored.record_ids) - len(records), len(scored.labels) - len(labels)
        if any(more):
            notes.append(f"{name}: {more[0]} records and {more[1]} labels that not all have are left out.")
    return shared, notes


@dataclass(frozen=True)
class ModelComparison:
    """Models on the same records.

    Attributes:
        auroc: differences with intervals, p and Holm's p; label groups and their contrasts.
        tests: (rule of the decisions, McNemar's test) of every pair.
        notes: what was left out to have the same records.
        delong: DeLong's test of every label of every pair, the second opinion to the bootstrap's.
    """

    auroc: Comparison
    tests: tuple[tuple[str, McNemar], ...]
    notes: tuple[str, ...]
    delong: tuple[DeLongTest, ...] = ()

    @property
    def delong_p_holm(self) -> list[float | None]:
        """Of `delong`, adjusted over all labels and pairs."""
        return holm([test.p for test in self.delong])

    @property
    def mcnemar_p_holm(self) -> list[float | None]:
        """Of the exact p of `tests`, adjusted over all pairs of the same rule."""
        adjusted: list[float | None] = [None] * len(self.tests)
        for rule in dict.fromkeys(rule for rule, _ in self.tests):
            places = [place for place, (other, _) in enumerate(self.tests) if other == rule]
            for place, p in zip(places, holm([self.tests[place][1].p_exact for place in places]), strict=True):
                adjusted[place] = p
        return adjusted

    def to_dict(self) -> dict[str, Any]:
        return {
            "auroc": self.auroc.to_dict(),
            "delong": [
                {**test.to_dict(), "p_holm": p} for test, p in zip(self.delong, self.delong_p_holm, strict=True)
            ],
            "mcnemar": [
                {"rule": rule, **test.to_dict(), "p_exact_holm": p}
                for (rule, test), p in zip(self.tests, self.mcnemar_p_holm, strict=True)
            ],
            "notes": list(self.notes),
        }


def compare_models(
    models: Mapping[str, Scored],
    validation: Mapping[str, Scored] | None = None,
    *,
    label_groups: Mapping[str, Sequence[str]] | None = None,
    n_boot: int = N_BOOT,
    seed: int = 0,
) -> ModelComparison:
    """Every two models, the earlier minus the later, on the records and labels that all have.

    Args:
        models: name -> likelihoods, with record ids.
        validation: the same models on validation; thresholds for McNemar's test are chosen on it.
        label_groups: what labels hang on -> labels.

    Raises:
        EvlecgError: nothing is shared, or the same record has different truths.
    """
    shared, notes = on_shared(models)
    labels = next(iter(shared.values())).labels
    decided = {"as_answered": {name: fixed_thresholds(labels, ANSWERED).decide(scored)
                               for name, scored in shared.items()}}  # fmt: skip
    if validation:
        decided["youden"] = {name: thresholds_for_youden(validation[name]).decide(scored)
                             for name, scored in shared.items()}  # fmt: skip
        first, *others = (answers.truth_NK for answers in decided["youden"].values())
        if any(not np.array_equal(first, other, equal_nan=True) for other in others):
            del decided["youden"]  # validation differs: a label has thresholds in one model and none in another
    return ModelComparison(
        compare(AUROC, shared, label_groups=label_groups, n_boot=n_boot, seed=seed),
        tuple(
            (rule, mcnemar({a: answers[a], b: answers[b]}))
            for rule, answers in decided.items()
            for a, b in combinations(shared, 2)
        ),
        tuple(notes),
        tuple(delong_test({a: shared[a], b: shared[b]}, label) for a, b in combinations(shared, 2) for label in labels),
    )


@dataclass(frozen=True)
class AnswerComparison:
    """Models' answers in words to the same questions.

    Attributes:
        subsets: title -> differences of its number, McNemar's test of every pair.
        notes: what was left out, and how answers were read.
    """

    subsets: Mapping[str, tuple[Comparison, tuple[McNemar, ...]]]
    notes: tuple[str, ...] = ()

    @property
    def p_holm(self) -> dict[tuple[str, str, str], float | None]:
        """(title, model, other model) -> p of the difference, adjusted over all of them."""
        raw = {(title, pair.a, pair.b): pair.headline.p
               for title, (comparison, _) in self.subsets.items() for pair in comparison.pairs}  # fmt: skip
        return dict(zip(raw, holm(list(raw.values())), strict=True))

    @property
    def mcnemar_p_holm(self) -> list[float | None]:
        """Exact p of all tests in their order, adjusted over all of them."""
        return holm([test.p_exact for _, tests in self.subsets.values() for test in tests])

    def to_dict(self) -> dict[str, Any]:
        adjusted, exact = self.p_holm, iter(self.mcnemar_p_holm)
        return {
            "answers": {
                title: {
                    **comparison.to_dict(),
                    "p_holm": {f"{pair.a} - {pair.b}": adjusted[title, pair.a, pair.b] for pair in comparison.pairs},
                    "mcnemar": [{**test.to_dict(), "p_exact_holm": next(exact)} for test in tests],
                }
                for title, (comparison, tests) in self.subsets.items()
            },
            "notes": list(self.notes),
        }


def compare_answers(
    subsets: Mapping[str, tuple[Metric, Mapping[str, Scored]]], *, n_boot: int = N_BOOT, seed: int = 0
) -> AnswerComparison:
    """Every two models on every subset, the earlier minus the later.

    Args:
        subsets: title -> its metric; name -> decisions, or right and wrong, on the same questions.
        n_boot: bootstrap resamples over patients.
        seed: of the resamples.
    """
    return AnswerComparison({
        title: (
            compare(metric, scored, n_boot=n_boot, seed=seed),
            tuple(mcnemar({a: scored[a], b: scored[b]}) for a, b in combinations(scored, 2)),
        )
        for title, (metric, scored) in subsets.items()
    })  # fmt: skip


def write_answer_comparison(found: AnswerComparison, out: Path, title: str) -> None:
    """As `write_comparison`, of answers in words."""
    _write(
        found.to_dict(),
        list(answer_sections(found.subsets, found.p_holm, found.mcnemar_p_holm, found.notes)),
        out,
        title,
    )


def write_comparison(found: ModelComparison, out: Path, title: str) -> None:
    """Writes comparison.json, comparison.md and comparison.html into the folder `out`.

    Raises:
        EvlecgError: the folder cannot be written to.
    """
    told = [(RULE_WORDS[rule], test, p) for (rule, test), p in zip(found.tests, found.mcnemar_p_holm, strict=True)]
    delong = dict(zip(((test.a, test.b, test.label) for test in found.delong),
                      zip(found.delong, found.delong_p_holm, strict=True), strict=True))  # fmt: skip
    _write(found.to_dict(), list(comparison_sections(found.auroc, told, found.notes, delong)), out, title)


def _write(tree: Mapping[str, Any], parts: Sequence[Section], out: Path, title: str) -> None:
    html = [f"<h1>{escape(title)}</h1>", *(line for section in parts for line in section_html(section))]
    texts = {
        "comparison.json": json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "comparison.md": "\n".join([f"# {title}", "", *section_lines(parts)]),
        "comparison.html": page_html(title, html),
    }
    for name, text in texts.items():
        write_text_atomic(out / name, text)
