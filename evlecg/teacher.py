"""The teacher's signal. The losses see `Outputs` and cannot tell where they come from."""

from __future__ import annotations

from typing import Protocol

import torch

from evlecg.models.load import Loaded
from evlecg.models.outputs import forward
from evlecg.schema import Batch, Outputs


class TeacherSignal(Protocol):
    """Anything that gives the teacher's outputs for a batch."""

    def __call__(self, batch: Batch) -> Outputs: ...


class LiveTeacher:
    """The teacher itself: frozen, in eval mode, without a graph.

    Args:
        loaded: the teacher's checkpoint in memory, already on its device.
        visual_layer: hidden layer whose visual tokens the losses compare.
    """

    def __init__(self, loaded: Loaded, *, visual_layer: int) -> None:
        self.model = loaded.model.eval().requires_grad_(False)
        self.forward_keys = loaded.forward_keys
        self.visual_layer = visual_layer

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Outputs:
        assert batch.teacher is not None and not self.model.training
        return forward(
            self.model,
            batch.teacher,
            predict_A2=batch.teacher.answer_A2,
            visual_layer=self.visual_layer,
            forward_keys=self.forward_keys,
        )
