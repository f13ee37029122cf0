"""One model on one dataset: `Report` -> report.json for machines, report.md for readers.

The JSON keys are an interface (CI jobs read them); more may be added, none renamed. Undefined numbers are null there
and an en dash in tables. The Markdown answers first what a reader asks first: how good, on how many patients, and
where it is worst; then every label, what was left out and why, how each number is formed, and provenance.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from evlecg import __version__
from evlecg.files import write_text_atomic
from evlecg.metrics import AucResult, LabelAuc
from evlecg.metrics import MacroAuc as Estimate

UNDEFINED = "–"
PACKAGES = ("torch", "transformers", "accelerate", "numpy")

SCORE_FORMULAS = {  # Prediction.source -> how the score of one label of one record came about
    "likelihood": "score = P(answer that means present) / sum of P over the answers the question allows; "
    "P(answer) = product of its tokens' probabilities given page and question",
    "text": "score = 1 where the generated text, once parsed, names the label, else 0",
}


class TextSection(Protocol):
    """What was read off the text of answers: `metrics.text`, and how a report shows it (plain text and Markdown)."""

    def to_dict(self) -> dict[str, Any]: ...

    def summary(self) -> list[str]: ...

    def tables(self) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]: ...

    def formulas(self) -> list[str]: ...


@dataclass(frozen=True)
class Report:
    """What one model scored on one split of one dataset.

    Attributes:
        model: what was evaluated: checkpoint, run or export.
        dataset, split: on what.
        n_records, n_patients: how much of it was scored.
        labels: label codes in the order of `auc.labels`.
        auc: macro and per label, with intervals.
        left_out: what is missing from the numbers -> why (rejected records, ...); undefined labels add themselves.
        score_source: `Prediction.source` of the scores, a key of `SCORE_FORMULAS`.
        provenance: what was run with what; plain JSON values, `environment()` among them.
        text: scores of answers as text; None where likelihoods were scored.
    """

    model: str
    dataset: str
    split: str
    n_records: int
    n_patients: int
    labels: tuple[str, ...]
    auc: AucResult
    left_out: Mapping[str, str] = field(default_factory=dict)
    score_source: str = "likelihood"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    text: TextSection | None = None

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.auc.labels) or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"{len(self.auc.labels)} AUCs for the labels {self.labels}")
        if self.score_source not in SCORE_FORMULAS:
            raise ValueError(f"unknown source of scores: {self.score_source!r}")

    @property
    def label_aucs(self) -> dict[str, LabelAuc]:
        return dict(zip(self.labels, self.auc.labels, strict=True))

    @property
    def weakest(self) -> str | None:
        """The label with the lowest AUC (the first of several), None where none is defined."""
        defined = {name: label.value for name, label in self.label_aucs.items() if label.value is not None}
        return min(defined, key=defined.__getitem__) if defined else None

    @property
    def all_left_out(self) -> dict[str, str]:
        """`left_out` and the labels that have no AUC, each with its reason."""
        undefined = {name: label.undefined_because for name, label in self.label_aucs.items()}
        return dict(self.left_out) | {f"label {name}": reason for name, reason in undefined.items() if reason}

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json."""
        return {
            "model": self.model,
            "dataset": self.dataset,
            "split": self.split,
            "n_records": self.n_records,
            "n_patients": self.n_patients,
            "metrics": {"auc": self._auc_dict(), **({"text": self.text.to_dict()} if self.text else {})},
            "left_out": self.all_left_out,
            "score_source": self.score_source,
            "provenance": dict(self.provenance),
        }

    def _auc_dict(self) -> dict[str, Any]:
        return {
            "macro": _estimate_dict(self.auc.macro),
            "labels": {
                name: {**_estimate_dict(label), "n_pos": label.n_pos, "n_neg": label.n_neg}
                for name, label in self.label_aucs.items()
            },
            "bootstrap": {"unit": "patient", "resamples": self.auc.n_boot, "seed": self.auc.seed},
        }

    def to_json(self) -> str:
        """Strict JSON: NaN and infinity are refused with a ValueError, wherever they hide."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """The content of report.md."""
        return "\n".join(
            [
                f"# {_cell(self.model)} on {_cell(self.dataset)} ({self.split})",
                "",
                *(self.text.summary() if self.text else self._summary()),
                "",
                *self._tables(),
                "## Left out",
                "",
                *([f"- {_cell(what)}: {_cell(why)}" for what, why in self.all_left_out.items()] or ["Nothing."]),
                "",
                "## How the numbers are formed",
                "",
                *(f"- {line}" for line in self._formulas()),
                "",
                "## Provenance",
                "",
                *_table(("key", "value"), list(_flat(self.provenance))),
                "",
            ]
        )

    def _summary(self) -> list[str]:
        scored = f"{self.n_records} records of {self.n_patients} patients"
        if self.weakest is None:
            return [f"**No AUC**: among {scored}, no label has both classes."]
        n_defined = sum(label.value is not None for label in self.auc.labels)
        lines = [
            f"**Macro AUC {estimate_text(self.auc.macro)}**, the mean over {n_defined} of {len(self.labels)} labels, "
            f"on {scored}. 1 is perfect, 0.5 is chance; in brackets the 95% interval.",
            "",
            f"- Weakest label: {self.weakest} {estimate_text(self.label_aucs[self.weakest])}, "
            f"{self.label_aucs[self.weakest].n_pos} records with it.",
        ]
        chance = [name for name, label in self.label_aucs.items() if label.ci95 is not None and label.ci95[0] <= 0.5]
        if chance:
            lines.append(f"- Not shown to be better than chance: {', '.join(chance)}.")
        unsure = [name for name, label in self.label_aucs.items() if label.value is not None and label.ci95 is None]
        if unsure:
            lines.append(f"- Without an interval, hence no evidence by themselves: {', '.join(unsure)}.")
        return lines

    def _tables(self) -> list[str]:
        tables = [] if self.text and not self.labels else [("Labels, weakest first", self._label_table())]
        if self.text:
            tables += [(title, _table(columns, rows)) for title, columns, rows in self.text.tables()]
        return [line for title, lines in tables for line in (f"## {title}", "", *lines, "")]

    def _label_table(self) -> list[str]:
        def weakness(item: tuple[str, LabelAuc]) -> float:
            return float("inf") if item[1].value is None else item[1].value

        rows = [
            (name, _number(label.value), _interval(label.ci95), str(label.n_pos), str(label.n_neg))
            for name, label in sorted(self.label_aucs.items(), key=weakness)
        ]
        return _table(("label", "AUC", "95% interval", "positive", "negative"), rows)

    def _formulas(self) -> list[str]:
        if self.text and not self.labels:
            return self.text.formulas()
        return [
            SCORE_FORMULAS[self.score_source],
            "AUC of a label = (pairs in which the positive record scores higher + half of the ties) / all pairs of a "
            "positive and a negative record; a record in which the label was not assessed is in no pair",
            "macro AUC = unweighted mean of the AUCs of the labels that have both classes",
            f"95% interval = 2.5th to 97.5th percentile over {self.auc.n_boot} resamples of the patients with "
            f"replacement (seed {self.auc.seed}), all records of a patient together; in a resample with one class only "
            "a label is left out; no interval with fewer than two patients on either side",
        ]


def write_report(report: Report, out: Path) -> None:
    """Writes `report.json` and `report.md` into the folder `out`, each whole or not at all.

    Raises:
        EvlecgError: the folder cannot be written to.
    """
    texts = {"report.json": report.to_json(), "report.md": report.to_markdown()}  # both before either is written
    for name, text in texts.items():
        write_text_atomic(out / name, text)


def comparison_table(rows: Sequence[tuple[str, Report]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Column heads and cells, plain text, one row per (name, report); the columns hold every report's labels."""
    labels = list(dict.fromkeys(label for _, report in rows for label in report.labels))
    cells = [
        (
            name,
            estimate_text(report.auc.macro),
            *(_number(report.label_aucs[label].value) if label in report.labels else UNDEFINED for label in labels),
        )
        for name, report in rows
    ]
    return ("model", "macro AUC (95% interval)", *labels), cells


def comparison_markdown(rows: Sequence[tuple[str, Report]]) -> str:
    """The comparison as a Markdown table."""
    columns, cells = comparison_table(rows)
    return "\n".join(_table(columns, cells)) + "\n"


def comparison_dict(rows: Sequence[tuple[str, Report]]) -> dict[str, Any]:
    """The comparison for `--json`: what report.json holds of every model, provenance apart."""
    return {
        "models": [
            {"name": name, **{key: value for key, value in report.to_dict().items() if key != "provenance"}}
            for name, report in rows
        ]
    }


def estimate_text(estimate: Estimate | LabelAuc) -> str:
    """`0.912 (0.893–0.930)`."""
    if estimate.value is None:
        return UNDEFINED
    return _number(estimate.value) + (f" ({_interval(estimate.ci95)})" if estimate.ci95 is not None else "")


def environment() -> dict[str, Any]:
    """What the numbers were made with: versions (read, not imported), machine kind, and the working folder's commit.

    A version is null where the package is not installed; `git` is null outside a repository and ends in `-dirty`
    where tracked files differ from the commit.
    """
    return {
        "evlecg": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "git": _git_revision(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]  # the hash, never a tag
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, no repository, no commit
        return None
    return done.stdout.strip() or None


def _estimate_dict(estimate: Estimate | LabelAuc) -> dict[str, Any]:
    return {"value": estimate.value, "ci95": None if estimate.ci95 is None else list(estimate.ci95)}


def _number(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.3f}"


def _interval(ci95: tuple[float, float] | None) -> str:
    return UNDEFINED if ci95 is None else f"{ci95[0]:.3f}–{ci95[1]:.3f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines]


def _cell(text: str) -> str:
    """Text that neither ends a table cell nor a line."""
    return " ".join(text.split()).replace("|", "\\|")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """`{"a": {"b": 1}}` -> `("a.b", "1")`."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
