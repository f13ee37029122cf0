"""Macro AUROC on validation records while a run is training: scored as `evlecg eval` scores, never on test records."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from evlecg import launch
from evlecg.data.store import Prepared
from evlecg.data.tasks import label_samples
from evlecg.errors import EvlecgError, RunFailed
from evlecg.metrics import AUROC, Scored, estimate
from evlecg.models import load as models
from evlecg.progress import Progress
from evlecg.recipe import Recipe
from evlecg.schema import Sample


def validation_samples(recipe: Recipe, prepared: Prepared, labels: tuple[str, ...]) -> list[Sample]:
    """The validation records that a recipe wants scored; none, where it wants no evaluation.

    Raises:
        EvlecgError: there are none of which an AUC can be formed.
    """
    config = recipe.evaluate
    if not config.every:
        return []
    indices = prepared.indices("val")[: config.max_records].tolist()
    samples = label_samples(prepared, indices, labels, recipe.data.question)
    answers: dict[str | None, set[str]] = {}
    for sample in samples:
        for question in sample.questions:
            answers.setdefault(question.label, set()).add(question.answer)
    if not any(len(found) > 1 for found in answers.values()):
        raise EvlecgError(f"no AUC can be formed of the {len(samples)} validation records: no label is present in some "
                          "and absent in others", where="evaluate.every",
                          hint="evaluate.every=0, a larger evaluate.max_records, or data with a validation split"
                          )  # fmt: skip
    return samples


@dataclass(frozen=True)
class Found:
    """One evaluation: macro AUROC, the labels' own (None where undefined), and of how many records."""

    auc: float
    labels: dict[str, float | None]
    n_records: int


@dataclass(frozen=True)
class Validation:
    """What scores the student as it is.

    Attributes:
        scorer: of the student that is being trained; how it packs was settled before the first step, so that a resumed
            run scores as the uninterrupted one.
        samples: validation records with their questions.
        batch_size: records a forward pass.
        accelerator: of the run; every process scores a share, and all get the result.
    """

    scorer: Any
    samples: list[Sample]
    batch_size: int
    accelerator: Any

    @property
    def n_batches(self) -> int:
        return -(-len(self._share()) // self.batch_size)

    def __call__(self, progress: Progress, *, stopped: Callable[[], bool] = lambda: False) -> Found | None:
        """Scores all records; the model is left in eval mode.

        Args:
            progress: who listens.
            stopped: whether to give up, asked before every batch; where several processes share the work they finish.

        Returns:
            What was found; None where it was given up.

        Raises:
            RunFailed: the model's scores are not numbers.
        """
        share = self._share()
        alone = self.accelerator.num_processes == 1
        rows: list[dict[str, Any]] = []
        with progress.task("validation", len(share)) as advance:
            for batch, predictions in self.scorer.in_batches(share, self.batch_size):
                rows += [dataclasses.asdict(prediction) for prediction in predictions]
                advance(len(batch))
                if alone and stopped():
                    return None
        try:
            found = estimate(AUROC, Scored.of_rows(launch.gathered(rows)), n_boot=0)
        except EvlecgError as error:  # the input was fine
            raise RunFailed(error.what, where=error.where, hint=error.hint) from error
        assert found.headline is not None and found.headline.value is not None
        values = {name: label.value for name, label in found.labels.items()}
        return Found(found.headline.value, values, len({row["record_id"] for row in rows}))

    def _share(self) -> list[Sample]:
        """This process's records, as many as every other's: some come up twice where that does not go even."""
        n, processes = len(self.samples), self.accelerator.num_processes
        places = range(self.accelerator.process_index, -(-n // processes) * processes, processes)
        return [self.samples[place % n] for place in places]


def validation_of(
    recipe: Recipe, prepared: Prepared, samples: list[Sample], student: models.Loaded, accelerator: Any
) -> Validation | None:
    """What scores `samples` from `validation_samples`; None without any."""
    from evlecg.models.score import scorer_of

    if not samples:
        return None
    scorer = scorer_of(student, prepared, recipe.page, samples)
    return Validation(scorer, samples, recipe.train.batch_size, accelerator)
