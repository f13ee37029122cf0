"""Batches: which records a step reads, and both models' halves of them.

The order of the records is a function of (seed, epoch) alone, so that a resumed run reads on exactly where it
stopped, and every process knows its share without talking to the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from evlecg.data.store import Prepared
from evlecg.models.encode import Encoder, Turn
from evlecg.page.layout import PageLayout
from evlecg.page.render import PageStyle, render
from evlecg.schema import Batch, Sample, Side


def epoch_order(n: int, *, seed: int, epoch: int) -> np.ndarray:
    """A permutation of n samples that depends on (seed, epoch) only."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def epoch_batches(
    n: int, batch_size: int, *, seed: int, epoch: int, process: int = 0, processes: int = 1
) -> list[np.ndarray]:
    """This process's batches of one epoch.

    A global batch is `batch_size * processes` records; the last one may be smaller, and is dropped only where it
    could not give every process at least one record.
    """
    order = epoch_order(n, seed=seed, epoch=epoch)
    size = batch_size * processes
    batches = [order[start : start + size] for start in range(0, n, size)]
    return [batch[process::processes] for batch in batches if len(batch) >= processes]


@dataclass(frozen=True)
class BatchBuilder:
    """Draws pages and encodes both halves: `builder(indices) -> Batch`, usable as a loader's collate function.

    Attributes:
        prepared: prepared folder.
        samples: what the indices point to.
        style: how pages look.
        student, teacher: the models' encoders; no teacher, no teacher's half.
        packed: all questions of a page in one row; otherwise one row a question.
    """

    prepared: Prepared
    samples: Sequence[Sample]
    style: PageStyle
    student: Encoder
    teacher: Encoder | None
    packed: bool

    def __call__(self, indices: Sequence[int]) -> Batch:
        chosen = [self.samples[int(index)] for index in indices]
        turns = [
            [Turn(question.text, question.answer, history=question.history) for question in sample.questions]
            for sample in chosen
        ]
        student, layout = self._side(self.student, chosen, turns)
        teacher = self._side(self.teacher, chosen, turns)[0] if self.teacher is not None else None
        _, lead_C, time_C2 = layout.cells()
        return Batch(
            sample_ids=tuple(sample.record_id for sample in chosen),
            student=student,
            teacher=teacher,
            cell_lead_C=torch.from_numpy(lead_C),
            cell_time_C2=torch.from_numpy(time_C2),
        )

    def _side(
        self, encoder: Encoder, chosen: Sequence[Sample], turns: Sequence[Sequence[Turn]]
    ) -> tuple[Side, PageLayout]:
        pages = [draw(self.prepared, sample.record_index, encoder.size_px, self.style) for sample in chosen]
        pixels = [page.pixels for page in pages]
        if self.packed:
            return encoder.encode(pixels, turns, pages[0].layout), pages[0].layout
        single = [(page, turn) for page, row in zip(pixels, turns, strict=True) for turn in row]
        side = encoder.encode([page for page, _ in single], [[turn] for _, turn in single], pages[0].layout)
        return side, pages[0].layout


def draw(prepared: Prepared, index: int, size_px: tuple[int, int], style: PageStyle):
    """The page of one prepared record at one model's size."""
    record = prepared.record(index)
    return render(record.signal_mV, record.fs_hz, size_px=size_px, style=style)
