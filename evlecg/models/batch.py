"""Batches: which records a step reads, and both models' halves of them.

The order of the records is a function of (seed, epoch) and of how long their texts are, so that a resumed run reads on
exactly where it stopped, and every process knows its share without talking to the others.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.functional import pad

from evlecg.data.store import Prepared
from evlecg.errors import EvlecgError
from evlecg.models.encode import Turn
from evlecg.models.views import AnyEncoder, ClassifierEncoder, View, view_of
from evlecg.page.augment import Augmenter
from evlecg.page.layout import PageLayout, batch_cells
from evlecg.page.picture import picture_page
from evlecg.page.render import Page, PageStyle, render
from evlecg.page.trace import Trace, TraceForm, TraceLayout, trace
from evlecg.schema import Batch, Sample, Side


def epoch_order(n: int, *, seed: int, epoch: int) -> np.ndarray:
    """A permutation of n samples that depends on (seed, epoch) only."""
    return np.random.default_rng([seed, epoch]).permutation(n)


BYTES_PER_TOKEN = 4


def text_length(sample: Sample) -> int:
    """About how many tokens the texts of a sample take, in any tokenizer; "yes" and "no" are as long."""
    texts = (
        text
        for question in sample.questions
        for text in (question.text, question.answer, *(said for pair in question.history for said in pair))
    )
    return sum(math.ceil(len(text.encode()) / BYTES_PER_TOKEN) for text in texts)


def text_lengths(samples: Sequence[Sample], bucket: int) -> tuple[int, ...] | None:
    """What `epoch_batches` cuts batches by: `text_length` of every sample; None where nothing is sorted."""
    return tuple(map(text_length, samples)) if bucket > 1 else None


def epoch_batches(
    n: int,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    process: int = 0,
    processes: int = 1,
    lengths: Sequence[int] | None = None,
    bucket: int = 1,
) -> list[np.ndarray]:
    """This process's batches of one epoch: as many on every process, each record in exactly one of them.

    A global batch is `batch_size * processes` records; the last one may be smaller, and then some processes have fewer
    records than others, or an empty batch.

    Args:
        n: records.
        batch_size: records a batch on each process.
        seed, epoch: of the order.
        process, processes: whose batches.
        lengths: of every record's text. Where they differ, records of similar length share a batch.
        bucket: global batches among whose records similar ones are looked for, a quarter of the epoch at most (else
            the same records would meet in every epoch); 1: batches as they come.
    """
    order = epoch_order(n, seed=seed, epoch=epoch)
    size = batch_size * processes
    bucket = min(bucket, n // (4 * size))
    similar = lengths is not None and bucket > 1 and len(set(lengths)) > 1
    if lengths is not None and similar:
        length_N = np.asarray(lengths)
        pools = [order[start : start + size * bucket] for start in range(0, n, size * bucket)]
        order = np.concatenate([pool[np.argsort(length_N[pool], kind="stable")] for pool in pools])
    batches = [order[start : start + size] for start in range(0, n, size)]
    if similar:  # or every pool would go from short to long; the last batch may be smaller and stays where it is
        whole = len(batches) - 1
        places = np.random.default_rng([seed, epoch, 1]).permutation(whole)
        batches = [*(batches[place] for place in places), batches[whole]]
    return [batch[process::processes] for batch in batches]


class StoredHalves(Protocol):
    """Teacher's halves that need no page: those of a teacher cache."""

    @property
    def window_s(self) -> float | None:
        """Of the signals that the teacher reads; None for pages."""
        ...

    def __call__(self, indices: Sequence[int]) -> tuple[Side, list[Any]]:
        """The half of some samples, and the layouts of its rows."""
        ...


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
        stored: gives the teacher's half, where no encoder does.
    """

    prepared: Prepared
    samples: Sequence[Sample]
    style: PageStyle
    student: AnyEncoder
    teacher: AnyEncoder | None
    packed: bool
    augment: Augmenter | None = None
    epoch: int = 0
    stored: StoredHalves | None = None

    def __call__(self, indices: Sequence[int]) -> Batch:
        if not len(indices):  # this process has no share of the step, but must take it with the others
            return dataclasses.replace(self([0]), counted=False)
        chosen = [self.samples[int(index)] for index in indices]
        turns = [[Turn.of(question) for question in sample.questions] for sample in chosen]
        shared = self.augment is None or self.augment.teacher
        views = [view_of(self.student)] + ([view_of(self.teacher)] if self.teacher is not None and shared else [])
        drawn = [self._draw(sample, views, self.augment) for sample in chosen]
        student, layouts = self._side(self.student, [views[0] for views in drawn], turns)
        teacher, teacher_layouts, teacher_s = None, [], None
        if self.stored is not None:
            (teacher, teacher_layouts), teacher_s = self.stored(indices), self.stored.window_s
        elif self.teacher is not None:
            if not shared:
                drawn = [self._draw(sample, [view_of(self.teacher)], None) for sample in chosen]
            teacher, teacher_layouts = self._side(self.teacher, [views[-1] for views in drawn], turns)
            teacher_s = _window_s(self.teacher)
        # a page's cells, then a trace's: a page shows most leads for a few seconds only, a signal for all of them
        if student.frame == "trace":
            layouts = [*teacher_layouts, *layouts]
        elif teacher is not None and teacher.frame == "trace":
            layouts = [*layouts, *teacher_layouts]
        _, lead_C, time_C2 = batch_cells(layouts)
        return Batch(
            sample_ids=tuple(sample.record_id for sample in chosen),
            record_B=torch.tensor(
                [row for row, asked in enumerate(turns) for _ in (asked[:1] if self.packed else asked)]
            ),
            student=_with_cells(student, _window_s(self.student), lead_C, time_C2),
            teacher=_with_cells(teacher, teacher_s, lead_C, time_C2) if teacher is not None else None,
            cell_lead_C=torch.from_numpy(lead_C),
            cell_time_C2=torch.from_numpy(time_C2),
            asked_Q=_asked(turns),
        )

    def teacher_half(self, indices: Sequence[int]) -> tuple[Side, list[PageLayout | TraceLayout]]:
        """The teacher's half of some samples on clean pages, with its own cells, and the layouts of its rows."""
        assert self.teacher is not None
        chosen = [self.samples[int(index)] for index in indices]
        turns = [[Turn.of(question) for question in sample.questions] for sample in chosen]
        drawn = [self._draw(sample, [view_of(self.teacher)], None)[0] for sample in chosen]
        return self._side(self.teacher, drawn, turns)

    def _draw(self, sample: Sample, views: Sequence[View], augment: Augmenter | None) -> list[Page | Trace]:
        return draw_views(self.prepared, sample.record_index, views, self.style, augment=augment, epoch=self.epoch)

    def _side(
        self, encoder: AnyEncoder, views: list[Any], turns: Sequence[Sequence[Turn]]
    ) -> tuple[Side, list[PageLayout | TraceLayout]]:
        if not self.packed:
            repeated = [(view, [turn]) for view, row in zip(views, turns, strict=True) for turn in row]
            views, turns = [view for view, _ in repeated], [row for _, row in repeated]
        return encoder.encode(views, turns), [view.layout for view in views]


def _asked(turns: Sequence[Sequence[Turn]]) -> torch.Tensor:
    """A number for the words of every question, [Q]: the same in every batch and process."""
    return torch.tensor([_number(turn.history, turn.question) for row in turns for turn in row], dtype=torch.long)


@functools.lru_cache(maxsize=4096)
def _number(history: Any, question: str) -> int:
    return int.from_bytes(hashlib.sha256(repr((history, question)).encode()).digest()[:8], "big", signed=True)


def _window_s(encoder: AnyEncoder) -> float | None:
    """Seconds of signal that a model reads; None for pages."""
    return encoder.form.window_s if isinstance(encoder, ClassifierEncoder) and encoder.form is not None else None


def _with_cells(side: Side, window_s: float | None, lead_C: np.ndarray, time_C2: np.ndarray) -> Side:
    """A half with boxes for all of the batch's cells: a page has none for those of a trace, behind its own."""
    if window_s is not None:
        boxes_C4 = torch.from_numpy(TraceLayout(window_s).boxes(lead_C, time_C2))
        return dataclasses.replace(side, cell_box_BC4=boxes_C4.expand(len(side.valid_BS), -1, -1).contiguous())
    missing = len(lead_C) - side.cell_box_BC4.shape[1]
    return dataclasses.replace(side, cell_box_BC4=pad(side.cell_box_BC4, (0, 0, 0, missing))) if missing else side


def draw(
    prepared: Prepared,
    index: int,
    view: View,
    style: PageStyle,
    *,
    augment: Augmenter | None = None,
    epoch: int = 0,
) -> Any:
    """One prepared record as one model sees it: a `Page` at its size (drawn, or the picture that it is), or a `Trace`.

    Args:
        prepared: prepared folder.
        index: the record's place in it.
        view: size of the page, or form of the signal.
        style: how pages look that are drawn.
        augment: what disturbs signal and page; the same (seed, epoch, index) gives the same page.
        epoch: which pass over the data.

    Raises:
        EvlecgError: a record that is a picture, for a model that reads signals.
    """
    return draw_views(prepared, index, [view], style, augment=augment, epoch=epoch)[0]


def draw_views(
    prepared: Prepared,
    index: int,
    views: Sequence[View],
    style: PageStyle,
    *,
    augment: Augmenter | None = None,
    epoch: int = 0,
) -> list[Any]:
    """`draw` for several models: the record is read, and its signal disturbed, once."""
    record = prepared.record(index)
    signal_mV, start_s = record.signal_mV, 0.0
    if augment is not None and not record.image:
        signal_mV, start_s = augment.signal(signal_mV, record.fs_hz, epoch=epoch, index=index)
    drawn: list[Any] = []
    for view in views:
        if isinstance(view, TraceForm):
            if record.image:
                raise EvlecgError("a record is a picture, and the model reads signals", where=record.id,
                                  hint="leave such records out, or take a model that reads pages")  # fmt: skip
            drawn.append(trace(signal_mV, record.fs_hz, view, start_s=start_s, where=record.id))
            continue
        if record.image:
            page = picture_page(record.image, size_px=view, where=record.id)
        else:
            page = render(signal_mV, record.fs_hz, size_px=view, style=style, start_s=start_s)
        drawn.append(page if augment is None else augment.page(page, epoch=epoch, index=index))
    return drawn
