"""What every objective is made of: cross-entropy on the answer, and the weighing of terms."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from evlecg.losses.stable import full_precision
from evlecg.schema import LossTerms


@full_precision
def answer_cross_entropy(logits_AV: Tensor, targets_A: Tensor) -> Tensor:
    """Mean cross-entropy over answer tokens in float32; zero, still on the graph, where there are none."""
    if len(targets_A) == 0:
        return logits_AV.sum()
    return F.cross_entropy(logits_AV, targets_A)


def weighted(
    values: dict[str, Tensor], weights: dict[str, float], diagnostics: dict[str, float] | None = None
) -> LossTerms:
    """Terms with their total; weights of terms that were not computed are dropped."""
    weights = {name: float(weights[name]) for name in values}
    total = torch.stack([values[name] * weights[name] for name in values]).sum()
    return LossTerms(total, values, weights, diagnostics or {})
