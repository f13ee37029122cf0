"""Fused Gromov-Wasserstein: an experiment beside the transport term, solved by POT.

A plan that carries each token to one that looks alike also keeps what is alike within a side alike on the other:

    (1 - s) sum_ij P_ij C_ij + s sum_ijkl (D_ik - E_jl)^2 P_ij P_kl

with D and E the distances within each side (Vayer et al. 2019). POT solves it in float64 on one core, one sample after
another, seconds for pages of hundreds of tokens: for studies, not for long runs.

Shape legend: B batch rows, N teacher tokens, M student tokens, D common width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import ot
import torch
from torch import Tensor

from evlecg.errors import EvlecgError
from evlecg.losses.stable import full_precision, squared_distance

SINKHORN_STEPS = 1000  # inside each of the solver's steps
TOLERANCE = 1e-3  # of the plan's mass, after which POT's solution is refused


def inner_distance(tokens_BND: Tensor, mask_BN: Tensor) -> Tensor:
    """Squared distances [B, N, N] within one side, over their mean per sample; zero at masked tokens."""
    pair_BNN = mask_BN[:, :, None] & mask_BN[:, None, :]
    distance_BNN = squared_distance(tokens_BND, tokens_BND, mask_BN, mask_BN).masked_fill(~pair_BNN, 0)
    mean_B = distance_BNN.sum((1, 2)) / pair_BNN.sum((1, 2)).clamp_min(1)
    return distance_BNN / mean_B.clamp_min(torch.finfo(mean_B.dtype).tiny)[:, None, None]


@full_precision
def structure_loss(plan_BNM: Tensor, teacher_BNN: Tensor, student_BMM: Tensor) -> Tensor:
    """sum_ijkl (D_ik - E_jl)^2 P_ij P_kl of every sample: [B]; the plan is constant in the gradient."""
    plan_BNM = plan_BNM.detach()
    row_BN, column_BM = plan_BNM.sum(2), plan_BNM.sum(1)
    carried_BNN = plan_BNM @ student_BMM @ plan_BNM.transpose(1, 2)
    return (
        torch.einsum("bn,bnk,bk->b", row_BN, teacher_BNN.square(), row_BN)
        + torch.einsum("bm,bml,bl->b", column_BM, student_BMM.square(), column_BM)
        - 2 * (carried_BNN * teacher_BNN).sum((1, 2))
    )


@torch.no_grad()
def fused_gromov_plan(
    cost_BNM: Tensor,
    teacher_BNN: Tensor,
    student_BMM: Tensor,
    a_BN: Tensor,
    b_BM: Tensor,
    *,
    epsilon: float,
    steps: int,
    structure: float,
) -> Tensor:
    """Entropic fused Gromov-Wasserstein plan.

    Args:
        cost_BNM: cost of carrying token n to token m, any scale; divided by its mean per sample.
        teacher_BNN: distances within the first side (see `inner_distance`).
        student_BMM: distances within the second side.
        a_BN: mass of every token of the first side, summing to 1; 0 where it is invalid.
        b_BM: the same of the second side.
        epsilon: entropic regularisation, as a share of the mean cost.
        steps: most steps of the outer solver.
        structure: weight of the distances within the sides, 0 to 1; the cost has the rest.

    Returns:
        [B, N, M]; zero where a side has no mass, NaN where the inputs are.

    Raises:
        EvlecgError: POT found no plan (epsilon too small for its kernel).

    Source:
        Vayer et al. 2019, "Optimal transport for structured data with application on graphs"; Peyre et al. 2016.
    """
    plan_BNM = torch.zeros_like(cost_BNM)
    for sample in range(len(cost_BNM)):
        row_n, column_m = a_BN[sample].nonzero()[:, 0], b_BM[sample].nonzero()[:, 0]
        if len(row_n) == 0 or len(column_m) == 0:
            continue
        tensors = (
            cost_BNM[sample][row_n[:, None], column_m],
            teacher_BNN[sample][row_n[:, None], row_n],
            student_BMM[sample][column_m[:, None], column_m],
            a_BN[sample, row_n],
            b_BM[sample, column_m],
        )
        cost_nm, teacher_nn, student_mm, a_n, b_m = (tensor.double().cpu().numpy() for tensor in tensors)
        if not all(np.isfinite(array).all() for array in (cost_nm, teacher_nn, student_mm)):
            plan_BNM[sample, row_n[:, None], column_m] = torch.nan
            continue
        found_nm: Any = ot.gromov.entropic_fused_gromov_wasserstein(
            cost_nm / max(cost_nm.mean(), np.finfo(float).tiny),
            teacher_nn,
            student_mm,
            a_n / a_n.sum(),
            b_m / b_m.sum(),
            epsilon=epsilon,
            symmetric=True,
            alpha=structure,
            max_iter=steps,
            tol=1e-7,
            numItermax=SINKHORN_STEPS,
            warn=False,
        )
        if not abs(float(found_nm.sum()) - 1) < TOLERANCE:
            raise EvlecgError(
                f"fused Gromov-Wasserstein found no plan at epsilon {epsilon}",
                where="objective.transport.epsilon",
                hint="a larger epsilon, or objective.transport.solver: sinkhorn",
            )
        plan_BNM[sample, row_n[:, None], column_m] = torch.from_numpy(found_nm).to(plan_BNM)
    return plan_BNM
