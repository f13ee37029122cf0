"""`Report`: one model on one dataset, and what report.json holds of it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from evlecg import __version__
from evlecg.metrics import Comparison, Estimate
from evlecg.report.gates import GateResult
from evlecg.report.measured import Measured, WorstRecord

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

    def scores(self) -> dict[str, Estimate]: ...


@dataclass(frozen=True)
class Robustness:
    """The same records under disturbed pages.

    Attributes:
        comparison: `clean` and every disturbance; pairs are disturbance minus clean.
        disturbances: name -> what was done to every page.
    """

    comparison: Comparison
    disturbances: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {"disturbances": dict(self.disturbances), **self.comparison.to_dict()}


@dataclass(frozen=True)
class Cost:
    """What one record costs, all its questions included.

    Attributes:
        parameters: of the model.
        flops: of one record, multiply and add counted as two; None where the counter cannot follow the model.
        latency_ms, latency_p95_ms: median and 95th percentile of one record alone, page drawing included; of one
            answer where answers in words were timed.
        peak_memory_bytes: of the device while scoring; of the whole process on a CPU.
        n_records: timed records.
        n_questions: of the record that the FLOPs are of.
        device: where.
        method: how it was measured.
    """

    parameters: int
    flops: int | None
    latency_ms: float
    latency_p95_ms: float
    peak_memory_bytes: int
    n_records: int
    n_questions: int
    device: str
    method: str


@dataclass(frozen=True)
class Report:
    """What one model scored on one split of one dataset.

    Attributes:
        model: what was evaluated: checkpoint, run or export.
        dataset, split: on what.
        n_records, n_patients: how much of it was scored.
        measured: every number of likelihood scores; None where answers in words were scored alone.
        left_out: what is missing from the numbers -> why (rejected records, ...); undefined labels add themselves.
        score_source: `Prediction.source` of the scores, a key of `SCORE_FORMULAS`.
        descriptions: label -> noun phrase.
        provenance: what was run with what; plain JSON values, `environment()` among them.
        worst: records that were answered wrongly with confidence, the worst first.
        group_formulas: how records came into groups that are measured on them.
        robustness, cost: where they were asked for.
        gates: what was asked of it; empty where nothing was.
        text: scores of answers as text; None where likelihoods were scored.
        text_robustness: of those, by the title of each subset.
    """

    model: str
    dataset: str
    split: str
    n_records: int
    n_patients: int
    measured: Measured | None
    left_out: Mapping[str, str] = field(default_factory=dict)
    score_source: str = "likelihood"
    descriptions: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    worst: tuple[WorstRecord, ...] = ()
    group_formulas: Mapping[str, str] = field(default_factory=dict)
    robustness: Robustness | None = None
    cost: Cost | None = None
    gates: tuple[GateResult, ...] = ()
    text: TextSection | None = None
    text_robustness: Mapping[str, Robustness] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.score_source not in SCORE_FORMULAS:
            raise ValueError(f"unknown source of scores: {self.score_source!r}")

    @property
    def labels(self) -> tuple[str, ...]:
        return self.measured.labels if self.measured else ()

    @property
    def macro(self) -> Estimate | None:
        """Macro AUROC; None where there are no likelihoods."""
        return self.measured.auroc.headline if self.measured else None

    @property
    def label_aucs(self) -> dict[str, Estimate]:
        return dict(self.measured.auroc.labels) if self.measured else {}

    @property
    def weakest(self) -> str | None:
        """The label with the lowest AUROC (the first of several), None where none is defined.

        One without an interval, that is, of a single patient, only where no other has one.
        """
        defined = {name: (label.ci95 is None, label.value) for name, label in self.label_aucs.items()
                   if label.value is not None}  # fmt: skip
        return min(defined, key=defined.__getitem__) if defined else None

    @property
    def gates_met(self) -> bool:
        return all(gate.met for gate in self.gates)

    @property
    def all_left_out(self) -> dict[str, str]:
        """`left_out` and the labels that have no AUROC, each with its reason."""
        undefined = {f"label {name}": label.undefined_because for name, label in self.label_aucs.items()}
        told = {what: why for what, why in undefined.items() if why}
        if self.measured and self.measured.no_validation:
            told["thresholds and temperature"] = self.measured.no_validation
        return dict(self.left_out) | told

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json."""
        metrics: dict[str, Any] = {"auc": self._auc_dict()}
        if self.measured:
            metrics |= self.measured.metrics_dict()
        if self.text:
            metrics["text"] = self.text.to_dict()
        return {
            "model": self.model,
            "dataset": self.dataset,
            "split": self.split,
            "n_records": self.n_records,
            "n_patients": self.n_patients,
            "gates": {"met": self.gates_met, "checks": [gate.to_dict() for gate in self.gates]} if self.gates else None,
            "metrics": metrics,
            "subgroups": {name: table.to_dict() for name, table in self.measured.subgroups.items()}
            if self.measured
            else {},
            "worst_records": [record.to_dict() for record in self.worst],
            "robustness": self.robustness.to_dict() if self.robustness else None,
            "text_robustness": {name: found.to_dict() for name, found in self.text_robustness.items()},
            "cost": asdict(self.cost) if self.cost else None,
            "left_out": self.all_left_out,
            "score_source": self.score_source,
            "provenance": dict(self.provenance),
        }

    def _auc_dict(self) -> dict[str, Any]:
        """AUROC in the fields that report.json has had from the first; `metrics.auroc` says more."""
        macro = self.macro
        return {
            "macro": _value_and_interval(macro) if macro else {"value": None, "ci95": None},
            "labels": {
                name: {**_value_and_interval(label), "n_pos": label.n_pos, "n_neg": label.n - (label.n_pos or 0)}
                for name, label in self.label_aucs.items()
            },
            "bootstrap": {"unit": "patient", "resamples": self.measured.n_boot, "seed": self.measured.seed}
            if self.measured
            else None,
        }

    def to_json(self) -> str:
        """Strict JSON: NaN and infinity are refused with a ValueError, wherever they hide."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _value_and_interval(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "ci95": None if estimate.ci95 is None else list(estimate.ci95)}


def environment() -> dict[str, Any]:
    """What the numbers were made with: versions (read, not imported), machine kind, and commits.

    A version is null where the package is not installed; `git` is the working folder's commit, `evlecg_git` that of the
    checkout which the package itself is run from: null outside a repository, and ending in `-dirty` where tracked files
    differ from the commit.
    """
    package = Path(__file__).resolve().parents[1]
    return {
        "evlecg": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "git": _git_revision(Path.cwd()),
        "evlecg_git": _git_revision(package) if _is_tracked(package / "__init__.py") else None,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision(folder: Path) -> str | None:
    # the hash, never a tag
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None


def _is_tracked(file: Path) -> bool:
    """Whether a repository holds the file: an environment may lie inside another project's repository."""
    return bool(_git(file.parent, "ls-files", file.name))


def _git(folder: Path, *command: str) -> str:
    """What git says in a folder; nothing without git, a repository or a commit."""
    try:
        done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
