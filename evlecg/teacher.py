"""The teacher's signal. The losses see `Outputs` and cannot tell where they come from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from evlecg.errors import RunFailed
from evlecg.models.load import Loaded
from evlecg.models.outputs import forward
from evlecg.schema import AnswerLogits, Batch, Outputs

MEMORY_BYTES = 2 << 30  # what a RememberingTeacher may hold

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

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Outputs:
        if self.loaded.model.training:
            raise RunFailed("the teacher is in training mode: dropout would make its outputs noise",
                            where=self.loaded.checkpoint.name, hint="call eval() on it")  # fmt: skip
        assert batch.teacher is not None
        return forward(self.loaded, batch.teacher, visual_layer=self.visual_layer, attention=self.attention)


class RememberingTeacher:
    """Runs the teacher the first time it meets a record, and answers from memory after that.

    Right where a record's page is drawn the same in every epoch. Remembered rows were computed among other
    neighbours than they return to, so values equal the live ones to rounding, not to the bit.

    Args:
        live: the teacher.
        needs: which of `hidden`, `visual` and `projected` the losses read; the other fields come back empty.
        limit_bytes: no more is remembered once this is reached.
    """

    def __init__(self, live: TeacherSignal, needs: frozenset[str], *, limit_bytes: int = MEMORY_BYTES) -> None:
        self.live = live
        self.needs = needs
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self.rows: dict[str, dict[str, Tensor]] = {}

    def __call__(self, batch: Batch) -> Outputs:
        side = batch.teacher
        assert side is not None
        ids = batch.sample_ids
        if len(ids) != side.valid_BS.shape[0]:  # one row a question: a record is not a row
            return self.live(batch)
        if not all(name in self.rows for name in ids):
            outputs = self.live(batch)
            self._remember(ids, outputs)
            return outputs
        n_positions, n_visual = side.valid_BS.shape[1], side.visual_box_BN4.shape[1]
        sizes = {"hidden": n_positions, "visual": n_visual, "projected": n_visual}
        found = {field: self._stack(ids, field, size) for field, size in sizes.items()}
        nothing = side.valid_BS.new_zeros((0, 0), dtype=torch.float32)
        return Outputs(found["hidden"], found["visual"], found["projected"], AnswerLogits(nothing), side)

    def _remember(self, ids: tuple[str, ...], outputs: Outputs) -> None:
        fields = {"hidden": outputs.hidden_BSD, "visual": outputs.visual_BND, "projected": outputs.projected_BND}
        counts = {"hidden": outputs.side.valid_BS.sum(1), "visual": outputs.side.visual_BS.sum(1)}
        counts["projected"] = counts["visual"]
        for row, name in enumerate(ids):
            if name in self.rows or self.held_bytes >= self.limit_bytes:
                continue
            kept = {
                field: values[row, : int(counts[field][row])].clone()
                for field, values in fields.items()
                if field in self.needs
            }
            self.held_bytes += sum(tensor.nbytes for tensor in kept.values())
            self.rows[name] = kept

    def _stack(self, ids: tuple[str, ...], field: str, size: int) -> Tensor:
        """Remembered rows as one batch, padded with zeros as `gather_visual` pads."""
        if field not in self.needs:
            return torch.zeros(len(ids), size, 0)
        rows = [self.rows[name][field] for name in ids]
        stacked = rows[0].new_zeros(len(rows), size, rows[0].shape[1])
        for place, row in enumerate(rows):
            stacked[place, : len(row)] = row
        return stacked
