"""What every objective is made of: cross-entropy on the answer, and the weighing of terms."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evlecg.losses.chunks import summed
from evlecg.losses.stable import full_precision
from evlecg.schema import AnswerLogits, LossTerms, Side

MOST_SCALE = 1e4  # of a balanced term, and one over the least


def answer_cross_entropy(logits: AnswerLogits, targets_A: Tensor) -> Tensor:
    """Mean cross-entropy over answer tokens in float32; zero, still on the graph, where there are none."""
    if len(targets_A) == 0:
        return no_answers(logits)
    every_A = torch.arange(len(targets_A), device=targets_A.device)
    return summed(_cross_entropy_sum, [logits], [every_A], targets_A) / len(targets_A)


def no_answers(logits: AnswerLogits) -> Tensor:
    """The zero of a term without answers, on the graph."""
    return logits.states_AD.sum() * 0


@torch.no_grad()
def answer_accuracy(logits: AnswerLogits, targets_A: Tensor) -> float:
    """Share of answer tokens that are the likeliest of all; there must be at least one."""
    every_A = torch.arange(len(targets_A), device=targets_A.device)
    right = summed(lambda logits_RV, targets_R: (logits_RV.argmax(-1) == targets_R).sum(), [logits], [every_A],
                   targets_A)  # fmt: skip
    return float(right) / len(targets_A)


def frozen_reading(states_AD: Tensor, side: Side, output_head: nn.Module) -> AnswerLogits:
    """What an output head, frozen, reads off states that stand for those before each answer token.

    Gradients reach the states, never the head (`functional_call` with detached parameters).
    """
    frozen = {name: value.detach() for name, value in (*output_head.named_parameters(), *output_head.named_buffers())}
    dtype = next((value.dtype for value in frozen.values() if value.is_floating_point()), states_AD.dtype)

    def read(states_RD: Tensor, rows_R: Tensor | slice) -> Tensor:
        with torch.autocast(states_RD.device.type, enabled=False):  # a bf16 head reads bf16: no float32 copy of [V, D]
            told = (states_RD.to(dtype), side.with_answers(rows_R))
            return torch.func.functional_call(output_head, frozen, told)

    return AnswerLogits(states_AD, read)


@full_precision
def _cross_entropy_sum(logits_RV: Tensor, targets_R: Tensor) -> Tensor:
    return F.cross_entropy(logits_RV, targets_R, reduction="sum")


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
