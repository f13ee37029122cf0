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
from evlecg.page.augment import Augmenter
from evlecg.page.layout import PageLayout, batch_cells
from evlecg.page.picture import picture_page
from evlecg.page.render import Page, PageStyle, render
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
        augment: what disturbs the pages; None draws them clean.
        epoch: the pass over the data that it is for: a page is disturbed anew in each.
    """

    prepared: Prepared
    samples: Sequence[Sample]
    style: PageStyle
    student: Encoder
    teacher: Encoder | None
    packed: bool
    augment: Augmenter | None = None
    epoch: int = 0

    def __call__(self, indices: Sequence[int]) -> Batch:
        chosen = [self.samples[int(index)] for index in indices]
        turns = [[Turn.of(question) for question in sample.questions] for sample in chosen]
        shared = self.augment is None or self.augment.teacher
        sizes = [self.student.size_px] + ([self.teacher.size_px] if self.teacher is not None and shared else [])
        drawn = [self._draw(sample, sizes, self.augment) for sample in chosen]
        student, layouts = self._side(self.student, [pages[0] for pages in drawn], turns)
        teacher = None
        if self.teacher is not None:
            if not shared:
                drawn = [self._draw(sample, [self.teacher.size_px], None) for sample in chosen]
            teacher, _ = self._side(self.teacher, [pages[-1] for pages in drawn], turns)
        _, lead_C, time_C2 = batch_cells(layouts)
        return Batch(
            sample_ids=tuple(sample.record_id for sample in chosen),
            record_B=torch.tensor(
                [row for row, asked in enumerate(turns) for _ in (asked[:1] if self.packed else asked)]
            ),
            student=student,
            teacher=teacher,
            cell_lead_C=torch.from_numpy(lead_C),
            cell_time_C2=torch.from_numpy(time_C2),
        )

    def _draw(self, sample: Sample, sizes_px: Sequence[tuple[int, int]], augment: Augmenter | None) -> list[Page]:
        return draw_sizes(self.prepared, sample.record_index, sizes_px, self.style, augment=augment, epoch=self.epoch)

    def _side(
        self, encoder: Encoder, pages: list[Page], turns: Sequence[Sequence[Turn]]
    ) -> tuple[Side, list[PageLayout]]:
        if not self.packed:
            repeated = [(page, [turn]) for page, row in zip(pages, turns, strict=True) for turn in row]
            pages, turns = [page for page, _ in repeated], [row for _, row in repeated]
        return encoder.encode(pages, turns), [page.layout for page in pages]


def draw(
    prepared: Prepared,
    index: int,
    size_px: tuple[int, int],
    style: PageStyle,
    *,
    augment: Augmenter | None = None,
    epoch: int = 0,
) -> Page:
    """The page of one prepared record at one model's size: drawn from its signal, or the picture that it is.

    Args:
        prepared: prepared folder.
        index: the record's place in it.
        size_px: width, height.
        style: how pages look that are drawn.
        augment: what disturbs signal and page; the same (seed, epoch, index) gives the same page.
        epoch: which pass over the data.
    """
    return draw_sizes(prepared, index, [size_px], style, augment=augment, epoch=epoch)[0]


def draw_sizes(
    prepared: Prepared,
    index: int,
    sizes_px: Sequence[tuple[int, int]],
    style: PageStyle,
    *,
    augment: Augmenter | None = None,
    epoch: int = 0,
) -> list[Page]:
    """`draw` at several sizes: the record is read, and its signal disturbed, once."""
    record = prepared.record(index)
    signal_mV, start_s = record.signal_mV, 0.0
    if augment is not None and not record.image:
        signal_mV, start_s = augment.signal(signal_mV, record.fs_hz, epoch=epoch, index=index)
    pages = []
    for size_px in sizes_px:
        if record.image:
            page = picture_page(record.image, size_px=size_px, where=record.id)
        else:
            page = render(signal_mV, record.fs_hz, size_px=size_px, style=style, start_s=start_s)
        pages.append(page if augment is None else augment.page(page, epoch=epoch, index=index))
    return pages
