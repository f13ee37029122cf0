"""What every objective is made of: cross-entropy on the answer, and the weighing of terms."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from evlecg.losses.stable import full_precision
from evlecg.schema import LossTerms, Side

MOST_SCALE = 1e4  # of a balanced term, and one over the least


@full_precision
def answer_cross_entropy(logits_AV: Tensor, targets_A: Tensor) -> Tensor:
    """Mean cross-entropy over answer tokens in float32; zero, still on the graph, where there are none."""
    if len(targets_A) == 0:
        return logits_AV.sum()
    return F.cross_entropy(logits_AV, targets_A)


def answer_count(side: Side) -> Tensor:
    """How many answer tokens there are: what `answer_cross_entropy` is a mean over."""
    return torch.tensor(len(side.answer_A2), device=side.answer_A2.device)


def balanced(
    scales: dict[str, float], gradients: dict[str, float], weights: dict[str, float], *, keep: float = 0.5
) -> dict[str, float]:
    """Scales with which a term's weight says how large its gradient is, relative to that of cross-entropy.

    A term of weight w then moves the student w / w_ce times as much as cross-entropy does, whatever its units: what
    GradNorm (Chen et al. 2018) strives for, set directly from the measured norms rather than learnt.

    Args:
        scales: those in force; new ones are a geometric mean with them.
        gradients: norm on the student of every weighted term's gradient, before scaling.
        weights: the weights that those gradients hold.
        keep: share of the old scale, in logarithms.

    Returns:
        Scale of every term but `ce`; terms that do not reach the student (`anchor`) have none.
    """
    own = gradients.get("ce", 0.0) / weights["ce"] if weights.get("ce") else 0.0
    if not own > 0:
        return scales
    found = dict(scales)
    for name, norm in gradients.items():
        if name == "ce" or not weights.get(name) or not norm > 0:
            continue
        new = min(max(own / (norm / weights[name]), 1 / MOST_SCALE), MOST_SCALE)
        found[name] = new if name not in scales else scales[name] ** keep * new ** (1 - keep)
    return found


def rescaled(terms: LossTerms, scales: dict[str, float]) -> LossTerms:
    """The same terms with their weights times their scales."""
    if not scales:
        return terms
    weights = {name: weight * scales.get(name, 1.0) for name, weight in terms.weights.items()}
    return weighted(terms.values, weights, terms.diagnostics)


def shared_out(terms: LossTerms, shares: Mapping[str, Tensor]) -> Tensor:
    """The total of a part of a step: every term times the part's share of what the step's mean is taken over.

    Args:
        terms: of one batch.
        shares: by term; they sum to 1 over the parts of a step (or to the number of processes, where gradients are
            averaged over them).
    """
    return torch.stack([value * (terms.weights[name] * shares[name]) for name, value in terms.values.items()]).sum()


def weighted(
    values: dict[str, Tensor], weights: dict[str, float], diagnostics: dict[str, float] | None = None
) -> LossTerms:
    """Terms with their total; weights of terms that were not computed are dropped."""
    weights = {name: float(weights[name]) for name in values}
    total = torch.stack([values[name] * weights[name] for name in values]).sum()
    return LossTerms(total, values, weights, diagnostics or {})
