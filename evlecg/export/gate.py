"""The exported student, loaded in its own runtime, against the run's: the same records, scored again.

Shape legend: N records, K labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from evlecg.data.store import Prepared
from evlecg.data.tasks import label_samples
from evlecg.errors import EvlecgError
from evlecg.export.drawn import Drawn
from evlecg.metrics import AUROC, Difference, Scored, compare, estimate
from evlecg.models import load as models
from evlecg.models.batch import draw
from evlecg.models.score import Scorer, scorer_of
from evlecg.models.trained import TrainedWith
from evlecg.models.views import View
from evlecg.page.render import page_style
from evlecg.run import Student
from evlecg.schema import Question, Sample

AT_ONCE = 8  # records a forward pass
LEAST_LIKELIHOOD = 1e-12  # a logit beyond this is a matter of the last digits of a float


class NotAsGood(EvlecgError):
    """The exported student falls too far behind the run's."""

    exit_code = 3


class Scoring(Protocol):
    """Scores samples."""

    def __call__(self, samples: Sequence[Sample]) -> np.ndarray:
        """P(yes) of every question of every sample, [N, K]; NaN for questions that a sample has not."""
        ...


@dataclass(frozen=True)
class Proof:
    """What the exported student answers beside the run's.

    Attributes:
        n_records: records that both answered.
        data: dataset and split, or that the records were synthetic.
        largest_logit_difference, mean_logit_difference: of log(P(yes) / P(no)).
        original, exported: label (and "macro") -> AUROC; empty where nobody knows the truth.
        drop: exported minus original, macro AUROC, with its paired interval; None likewise.
        max_drop_points: what was allowed, in hundredths of AUROC; None: nothing was asked.
    """

    n_records: int
    data: str
    largest_logit_difference: float
    mean_logit_difference: float
    original: dict[str, float | None] = dataclasses.field(default_factory=dict)
    exported: dict[str, float | None] = dataclasses.field(default_factory=dict)
    drop: Difference | None = None
    max_drop_points: float | None = None

    @property
    def worst(self) -> tuple[str, float]:
        """Label with the largest drop, and the drop in points."""
        drops = {
            name: 100 * (before - after) for name, before in self.original.items()
            if before is not None and (after := self.exported[name]) is not None
        }  # fmt: skip
        return max(drops.items(), key=lambda pair: pair[1], default=("", 0.0))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"drop": self.drop.to_dict() if self.drop else None}


class TorchScoring:
    """Scores with PyTorch, as `evlecg eval` does.

    Args:
        loaded: the student.
        records: prepared folder, or `Drawn`.
        trained: how its pages look.
    """

    def __init__(self, loaded: models.Loaded, records: Any, trained: TrainedWith) -> None:
        self.loaded, self.records, self.trained = loaded, records, trained
        self._scorer: Scorer | None = None

    def scorer(self, samples: Sequence[Sample]) -> Scorer:
        """The scorer behind it, made when the first samples are known: how it reads questions is tried on them."""
        if self._scorer is None:
            self._scorer = scorer_of(self.loaded, self.records, self.trained.page, samples)
        return self._scorer

    def __call__(self, samples: Sequence[Sample]) -> np.ndarray:
        found = np.full((len(samples), max(len(sample.questions) for sample in samples)), np.nan)
        row = 0
        for batch, predictions in self.scorer(samples).in_batches(samples, AT_ONCE):
            answers = iter(predictions)
            for sample in batch:
                found[row, : len(sample.questions)] = [next(answers).score for _ in sample.questions]
                row += 1
        return found


def runner_scoring(student: Student, records: Any, trained: TrainedWith) -> Scoring:
    """Scores with the exported student's own runtime."""
    view: View = student.form if student.form is not None else student.size_px  # type: ignore[assignment]
    style = page_style(trained.page)
    column_of = {label: column for column, label in enumerate(student.labels)}

    def score(samples: Sequence[Sample]) -> np.ndarray:
        most = max(len(sample.questions) for sample in samples)
        found = np.full((len(samples), most), np.nan)
        for start in range(0, len(samples), AT_ONCE):
            batch = samples[start : start + AT_ONCE]
            views = [draw(records, sample.record_index, view, style) for sample in batch]
            scores = student.scores(views)
            for row, sample in enumerate(batch):
                for column, question in enumerate(sample.questions):
                    found[start + row, column] = scores[row, column_of[question.label or ""]]
        return found

    return score


def prove(
    make_original: Any, make_exported: Any, questions: Sequence[Question], trained: TrainedWith, *,
    data: Path | None, max_drop_points: float, most_records: int, where: Path,
) -> Proof:  # fmt: skip
    """Scores the same records with both.

    Args:
        make_original, make_exported: given the records (a prepared folder or `Drawn`), a `Scoring`.
        questions: of all labels.
        trained: the questions' wording.
        data: prepared folder; None: synthetic records, whose logits alone are compared.
        max_drop_points: how far any label's AUROC, or their mean, may fall, in hundredths.
        most_records: of the validation split.
        where: what an error names.

    Raises:
        EvlecgError: the folder has no validation records with these labels.
        NotAsGood: an AUROC fell further.
    """
    if data is None:
        drawn = Drawn()
        samples = drawn.samples(questions)
        before, after = (make(drawn)(samples) for make in (make_original, make_exported))
        return Proof(len(samples), "synthetic records", *_logit_differences(before, after))
    prepared = Prepared.open(data)
    labels = tuple(str(question.label) for question in questions if question.label in prepared.label_names)
    samples = label_samples(prepared, prepared.indices("val").tolist()[:most_records], labels, trained.question)
    if not samples:
        raise EvlecgError("there are no validation records to score the export on", where=data,
                          hint="--data DIR with a validation split, or --no-gate")  # fmt: skip
    scored = {}
    values = []
    for name, make in (("exported", make_exported), ("original", make_original)):
        found = make(prepared)(samples)
        values.append(found)
        scored[name] = _scored(found, samples, labels, prepared)
    proof = Proof(
        len(samples),
        f"{prepared.manifest['dataset']}, val",
        *_logit_differences(*values),
        **{name: _aurocs(each) for name, each in scored.items()},
        drop=compare(AUROC, scored).pairs[0].headline,
        max_drop_points=max_drop_points,
    )
    worst, points = proof.worst
    if points > max_drop_points:
        before, after = proof.original[worst], proof.exported[worst]
        raise NotAsGood(
            f"the exported student's AUROC of {worst} falls by {points:.2f} points, from {before:.4f} to {after:.4f} "
            f"on {proof.n_records} validation records", where=where,
            hint=f"nothing was kept; --max-drop allows {max_drop_points:g}, and another --dtype loses less",
        )  # fmt: skip
    return proof


def _scored(values: np.ndarray, samples: Sequence[Sample], labels: tuple[str, ...], prepared: Prepared) -> Scored:
    value_NK, truth_NK = (np.full((len(samples), len(labels)), np.nan) for _ in range(2))
    for row, sample in enumerate(samples):
        for column, question in enumerate(sample.questions):
            place = labels.index(str(question.label))
            value_NK[row, place] = values[row, column]
            truth_NK[row, place] = question.answer == question.choices[0]
    patients = [prepared.patient_ids[sample.record_index] for sample in samples]
    return Scored(value_NK, truth_NK, patients, labels, [sample.record_id for sample in samples])


def _aurocs(scored: Scored) -> dict[str, float | None]:
    found = estimate(AUROC, scored, n_boot=0)
    return {"macro": found.headline.value, **{label: each.value for label, each in found.labels.items()}}


def _logit_differences(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    logits = [
        np.log(p) - np.log1p(-p) for p in (np.clip(each, LEAST_LIKELIHOOD, 1 - LEAST_LIKELIHOOD) for each in (a, b))
    ]
    difference = np.abs(logits[0] - logits[1])
    return float(np.nanmax(difference)), float(np.nanmean(difference))
