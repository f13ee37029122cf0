"""The teacher's signal. The losses see `Outputs` and cannot tell where they come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evlecg.errors import RunFailed
from evlecg.models.load import Loaded
from evlecg.models.outputs import forward
from evlecg.schema import Batch, Outputs, Side
from evlecg.teacher.rows import Geometry, join_outputs, join_sides
from evlecg.teacher.store import Store, TeacherFacts

TeacherSignal = Callable[[Batch], Outputs]  # anything that gives the teacher's outputs for a batch


class LiveTeacher:
    """The teacher itself: frozen, in eval mode, without a graph.

    Args:
        loaded: the teacher's checkpoint in memory, already on its device.
        visual_layer: hidden layer whose visual tokens the losses compare.
        attention: the losses read the last layer's queries, keys and values, too.
    """

    def __init__(self, loaded: Loaded, *, visual_layer: int, attention: bool = False) -> None:
        self.loaded = loaded
        self.loaded.model.eval().requires_grad_(False)
        self.visual_layer = visual_layer
        self.attention = attention

    def __call__(self, batch: Batch) -> Outputs:
        assert batch.teacher is not None
        return self.of(batch.teacher)

    @torch.no_grad()
    def of(self, side: Side) -> Outputs:
        """What it gives for its half of a batch."""
        if self.loaded.model.training:
            raise RunFailed("the teacher is in training mode: dropout would make its outputs noise",
                            where=self.loaded.checkpoint.name, hint="call eval() on it")  # fmt: skip
        return forward(self.loaded, side, visual_layer=self.visual_layer, attention=self.attention)


@dataclass(frozen=True)
class StoredSides:
    """The teacher's halves of batches out of a store: no page is drawn for it, and no processor called.

    Attributes:
        store: holds the rows.
        keys: of every sample, its rows: one, or one a question where questions are not packed.
        facts: of the teacher.
    """

    store: Store
    keys: Sequence[tuple[str, ...]]
    facts: TeacherFacts

    @property
    def window_s(self) -> float | None:
        """Of the signals that the teacher reads; None for pages."""
        return self.facts.window_s

    def __call__(self, indices: Sequence[int]) -> tuple[Side, list[Geometry]]:
        """The half of some samples, and the layouts of its rows."""
        keys = [key for index in indices for key in self.keys[int(index)]]
        if any(not self.keys[int(index)] or self.store.lacks(self.keys[int(index)][0], ()) for index in indices):
            raise RunFailed("the teacher's rows do not cover a batch: so many steps were skipped that the run reads on",
                            hint="without train.max_steps every record is covered")  # fmt: skip
        rows = [self.store.side(key) for key in keys]
        return join_sides(rows, keys, frame=self.facts.frame), [row.geometry for row in rows]


class StoredTeacher:
    """Answers with what a store holds of a batch whose teacher's half came out of it.

    Args:
        store: holds the rows.
        fields: those to read (`rows.FIELDS`); all others come back empty.
        facts: of the teacher.
        head: the teacher's `AnswerHead`, which makes logits of the states stored as `answer`; None: nobody reads any.
    """

    def __init__(self, store: Store, fields: Sequence[str], facts: TeacherFacts, head: Any = None) -> None:
        self.store = store
        self.fields = tuple(fields)
        self.dtype: torch.dtype = getattr(torch, facts.dtype)
        self.head = head

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Outputs:
        side = batch.teacher
        assert side is not None and side.row_keys
        device = side.valid_BS.device
        values = {name: self.store.field(side.row_keys, name, self.dtype, device) for name in self.fields}
        if "answer" in values and self.head is not None:
            states_AD, counts = values.pop("answer")
            values["logits"] = self.head(states_AD, side), counts
        return join_outputs(values, side, self.dtype)
