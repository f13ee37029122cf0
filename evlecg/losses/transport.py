"""Optimal-transport matching of visual tokens: METHOD's second term.

Entropic optimal transport (Cuturi 2013) with uniform marginals over the valid tokens of each side. The cost is divided
by its mean first, so that `epsilon` means the same for every width.

The solver: Sinkhorn in kernel form, ten iterations at a time; between blocks the scalings are absorbed into the
potentials (Schmitzer 2019), so the kernel never leaves float range for long, and a block whose scalings do is repeated
in the log domain. After each block Newton steps on the dual of the smaller side finish the job (Brauer et al. 2017,
"A Sinkhorn-Newton method for entropic optimal transport"). Chosen by measurement: on token sets that fall into page
regions (nearly block-diagonal kernels), 50 plain iterations at epsilon .05 leave marginal errors of 1e-3 and 200 leave
2e-4 to 1e-3, over-relaxation and Newton with conjugate gradients 1e-4 to 1e-3; ten iterations and three or four
dense Newton steps leave below 1e-5 at the price of 50 to 120 iterations. Samples are solved one after another on
their valid tokens only: one kernel stays in cache (about three times faster than batched products on two cores), and
padding cannot change a number.

Shape legend: B batch rows, N teacher tokens, M student tokens, D common width, C lead x time cells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from evlecg.losses.stable import full_precision, layer_normalised, masked_mean, squared_distance, zero_where_masked

BLOCK = 10  # Sinkhorn iterations between absorptions
NEWTON_STEPS = 6  # after a block; each must lower the error or the next block begins
NEWTON_WIDTH = 2048  # above this many tokens on the smaller side the dense system costs more than it saves
NEWTON_REACH = 1.0  # largest change of a potential in one Newton step, in epsilons


@dataclass(frozen=True)
class Transport:
    """The term, and what explains it.

    Attributes:
        loss: scalar, on the graph.
        plan_BNM: detached; sums to 1 in rows that have tokens on both sides, 0 elsewhere.
        cost_BNM: detached; what the plan was steered by, before its division by the mean.
    """

    loss: Tensor
    plan_BNM: Tensor
    cost_BNM: Tensor


@torch.no_grad()  # envelope theorem: the plan is constant in the gradient
@full_precision
def transport_plan(cost_BNM: Tensor, a_mask_BN: Tensor, b_mask_BM: Tensor, *, epsilon: float, steps: int) -> Tensor:
    """Entropic transport plan between uniform distributions over the valid tokens of each side.

    Args:
        cost_BNM: cost of moving mass from token n to token m; any scale.
        a_mask_BN: bool, valid tokens of the first side.
        b_mask_BM: bool, valid tokens of the second side.
        epsilon: entropic regularisation, as a share of each sample's mean cost over valid pairs.
        steps: most Sinkhorn iterations; fewer are run once the marginals hold.

    Returns:
        [B, N, M], without gradient; zero where either token is invalid, and for samples without tokens on a side.
    """
    plan_BNM = torch.zeros_like(cost_BNM)
    for sample, (a_mask_N, b_mask_M) in enumerate(zip(a_mask_BN, b_mask_BM, strict=True)):
        rows_n, columns_m = a_mask_N.nonzero()[:, 0], b_mask_M.nonzero()[:, 0]
        if len(rows_n) == 0 or len(columns_m) == 0:
            continue
        whole = len(rows_n) == cost_BNM.shape[1] and len(columns_m) == cost_BNM.shape[2]
        cost_nm = cost_BNM[sample] if whole else cost_BNM[sample][rows_n[:, None], columns_m]
        cost_nm = cost_nm / cost_nm.mean().clamp_min(torch.finfo(cost_nm.dtype).tiny)
        if len(rows_n) >= len(columns_m):
            plan_nm = _solve(cost_nm, epsilon, steps)
        else:  # Newton's system has the size of the second side
            plan_nm = _solve(cost_nm.T.contiguous(), epsilon, steps).T
        if whole:
            plan_BNM[sample] = plan_nm
        else:
            plan_BNM[sample, rows_n[:, None], columns_m] = plan_nm
    return plan_BNM


def _solve(cost_NM: Tensor, epsilon: float, steps: int) -> Tensor:
    """The plan of one sample without masks; N >= M. NaN costs give a NaN plan: a diverged model shows in the loss."""
    tolerance = 1e-11 if cost_NM.dtype == torch.float64 else 1e-5  # float32 stalls near 2e-6
    # c-transforms as first potentials: every row and column of the kernel then holds a 1, however small epsilon is
    row_N1 = cost_NM.amin(1, keepdim=True)
    column_1M = (cost_NM - row_N1).amin(0, keepdim=True)
    done = 0
    while True:
        block = min(BLOCK, steps - done)
        kernel_NM = ((row_N1 + column_1M - cost_NM) / epsilon).exp_()
        v_M = _sinkhorn(kernel_NM, block)
        if v_M is None:
            row_N1, column_1M = _sinkhorn_log(cost_NM, column_1M, epsilon, block)
            kernel_NM = ((row_N1 + column_1M - cost_NM) / epsilon).exp_()
            v_M = torch.ones_like(column_1M[0])
        u_N, v_M, error = _newton(kernel_NM, v_M, tolerance)
        done += block
        if error <= tolerance or done >= steps:
            return kernel_NM.mul_(u_N[:, None]).mul_(v_M)
        row_N1 = row_N1 + epsilon * u_N.log()[:, None]
        column_1M = column_1M + epsilon * v_M.log()


def _sinkhorn(kernel_NM: Tensor, iterations: int) -> Tensor | None:
    """Scaling v after some iterations in kernel form, or None where a scaling left the range that can be trusted."""
    n, m = kernel_NM.shape
    u_N, v_M = kernel_NM.new_ones(n), kernel_NM.new_ones(m)
    for _ in range(iterations):
        u_N = (1 / n) / torch.mv(kernel_NM, v_M)
        v_M = (1 / m) / torch.mv(kernel_NM.T, u_N)
    limit = torch.finfo(kernel_NM.dtype).max ** 0.6
    scalings = torch.cat([u_N, v_M])
    # NaN fails both comparisons; the bound on 1/x also catches sums that underflowed to zero
    return v_M if bool((scalings < limit).all() and (scalings > 1 / limit).all()) else None


def _sinkhorn_log(cost_NM: Tensor, column_1M: Tensor, epsilon: float, iterations: int) -> tuple[Tensor, Tensor]:
    """The same iterations on potentials: slow, and safe at any epsilon."""
    n, m = cost_NM.shape
    row_N1 = cost_NM.new_zeros(n, 1)
    for _ in range(iterations):
        row_N1 = -epsilon * (math.log(n) + torch.logsumexp((column_1M - cost_NM) / epsilon, 1, keepdim=True))
        column_1M = -epsilon * (math.log(m) + torch.logsumexp((row_N1 - cost_NM) / epsilon, 0, keepdim=True))
    return row_N1, column_1M


def _newton(kernel_NM: Tensor, v_M: Tensor, tolerance: float) -> tuple[Tensor, Tensor, float]:
    """Newton's method on the dual in the potential of the second side; the first side's rows are always exact.

    Returns:
        Scalings u, v and the column error: the sum of |column sum - 1/M|, the best that was reached.
    """
    n, m = kernel_NM.shape
    u_N = (1 / n) / torch.mv(kernel_NM, v_M)
    best = (u_N, v_M, math.inf)
    for step in range(NEWTON_STEPS + 1):
        column_M = v_M * torch.mv(kernel_NM.T, u_N)
        residual_M = 1 / m - column_M
        error = float(residual_M.abs().sum())
        if not error < best[2]:  # too far from the solution for its quadratic model, or at float's floor
            return best
        best = (u_N, v_M, error)
        if error <= tolerance or step == NEWTON_STEPS or m > NEWTON_WIDTH:
            return best
        share_NM = kernel_NM * u_N[:, None]
        hessian_MM = (share_NM.T @ share_NM).mul_(-n * v_M[:, None] * v_M)
        # constants are in its null space: adding 1/M everywhere picks the solution without one
        hessian_MM += 1 / m
        hessian_MM.diagonal().add_(column_M).add_(1e-6 / m)
        factor_MM, failed = torch.linalg.cholesky_ex(hessian_MM)
        if failed:
            return best
        change_M = torch.cholesky_solve(residual_M[:, None], factor_MM)[:, 0]
        v_M = v_M * change_M.clamp(-NEWTON_REACH, NEWTON_REACH).exp()
        u_N = (1 / n) / torch.mv(kernel_NM, v_M)
    return best


@full_precision
def transport_loss(
    teacher_BND: Tensor,
    student_BMD: Tensor,
    teacher_mask_BN: Tensor,
    student_mask_BM: Tensor,
    *,
    epsilon: float,
    steps: int,
    strict: bool = False,
    normalise: bool = True,
    extra_cost_BNM: Tensor | None = None,
) -> Transport:
    """Cost of carrying the teacher's visual tokens onto the student's along the optimal plan.

    Published form (`strict`): sum_ij P_ij ||t_i - s_j||^2, averaged over the samples that have tokens on both sides.
    Default form: the same sum over D, so that one weight serves every width, between layer-normalised tokens.
    P is constant in the gradient (envelope theorem).

    Args:
        teacher_BND: the teacher's tokens, already projected to the student's width.
        student_BMD: the student's tokens.
        teacher_mask_BN: bool, valid tokens.
        student_mask_BM: bool, valid tokens.
        epsilon: entropic regularisation, as a share of the mean cost.
        steps: most Sinkhorn iterations.
        strict: the sum over the width as published, without normalisation or extra cost.
        normalise: layer-normalise both sides (default form only).
        extra_cost_BNM: steers the plan only, in mean feature costs (see `page_cost`).

    Source:
        METHOD, term 2; arXiv 2605.29977.
    """
    if strict and extra_cost_BNM is not None:
        raise ValueError("the published form has no extra cost")
    teacher_BND = zero_where_masked(teacher_BND, teacher_mask_BN)
    student_BMD = zero_where_masked(student_BMD, student_mask_BM)
    if normalise and not strict:
        teacher_BND, student_BMD = layer_normalised(teacher_BND), layer_normalised(student_BMD)
    with torch.no_grad():
        cost_BNM = squared_distance(teacher_BND, student_BMD, teacher_mask_BN, student_mask_BM)
        if extra_cost_BNM is not None:
            cost_BNM = mean_divided(cost_BNM, teacher_mask_BN, student_mask_BM) + extra_cost_BNM.to(cost_BNM.dtype)
        plan_BNM = transport_plan(cost_BNM, teacher_mask_BN, student_mask_BM, epsilon=epsilon, steps=steps)
    # sum P (|t|^2 + |s|^2 - 2 t.s) without a second [N, M] matrix on the graph
    loss_B = (
        (plan_BNM.sum(2) * teacher_BND.square().sum(-1)).sum(1)
        + (plan_BNM.sum(1) * student_BMD.square().sum(-1)).sum(1)
        - 2 * ((plan_BNM.transpose(1, 2) @ teacher_BND) * student_BMD).sum((1, 2))
    )
    if not strict:
        loss_B = loss_B / student_BMD.shape[-1]
    has_tokens_B = teacher_mask_BN.any(1) & student_mask_BM.any(1)
    return Transport(masked_mean(loss_B, has_tokens_B), plan_BNM, cost_BNM)


def mean_divided(cost_BNM: Tensor, a_mask_BN: Tensor, b_mask_BM: Tensor) -> Tensor:
    """The cost of each sample over its mean over valid pairs; a cost of zero everywhere stays zero."""
    pair_BNM = a_mask_BN[:, :, None] & b_mask_BM[:, None, :]
    mean_B = cost_BNM.masked_fill(~pair_BNM, 0).sum((1, 2)) / pair_BNM.sum((1, 2)).clamp_min(1)
    return cost_BNM / mean_B.clamp_min(torch.finfo(cost_BNM.dtype).tiny)[:, None, None]


def page_cost(
    teacher_box_BN4: Tensor,
    student_box_BM4: Tensor,
    teacher_lead_BN: Tensor,
    student_lead_BM: Tensor,
    *,
    position: float,
    lead: float,
) -> Tensor:
    """Extra cost [B, N, M] of moving mass across the page or out of its lead.

    Args:
        teacher_box_BN4: page boxes x0, y0, x1, y1 in [0, 1].
        student_box_BM4: page boxes.
        teacher_lead_BN: index of the lead that a token shows, -1 for none (see `token_lead`).
        student_lead_BM: the same of the student.
        position: cost of a squared distance of 1 between box centres.
        lead: cost of leaving the lead.
    """
    teacher_centre_BN2 = (teacher_box_BN4[..., :2] + teacher_box_BN4[..., 2:]) / 2
    student_centre_BM2 = (student_box_BM4[..., :2] + student_box_BM4[..., 2:]) / 2
    distance_BNM = (teacher_centre_BN2[:, :, None] - student_centre_BM2[:, None]).square().sum(-1)
    return position * distance_BNM + lead * (teacher_lead_BN[:, :, None] != student_lead_BM[:, None])


def cell_cost(
    teacher_share_BNC: Tensor,
    student_share_BMC: Tensor,
    cell_lead_C: Tensor,
    cell_time_C2: Tensor,
    *,
    position: float,
    lead: float,
) -> Tensor:
    """Extra cost [B, N, M] of moving mass through time or out of its lead, between tokens of any two layouts.

    Where teacher and student do not see the same page (one reads signals), their boxes cannot be compared, but both
    know the lead x time cells that their tokens cover: W_t D W_s^T, where W holds each token's shares of the cells and
    D what lies between two cells.

    Args:
        teacher_share_BNC: share of each token in each cell (see `cell_shares`); zeros for a token that shows no lead.
        student_share_BMC: the same of the student.
        cell_lead_C: lead of each cell, -1 where unknown.
        cell_time_C2: its start and end in seconds, NaN where unknown.
        position: cost of a squared distance of 1, in spans of all cells' time (a page from left to right).
        lead: cost of leaving the lead.

    Returns:
        A token without cells is as far from every other as cells are on average.
    """
    time_C = torch.nan_to_num(cell_time_C2.to(teacher_share_BNC.dtype), nan=0.0)
    span = (time_C.max() - time_C.min()).clamp_min(torch.finfo(time_C.dtype).tiny) if time_C.numel() else 1.0
    middle_C = time_C.mean(1) / span
    apart_CC = (cell_lead_C[:, None] != cell_lead_C[None]).to(time_C.dtype)
    distance_CC = position * (middle_C[:, None] - middle_C[None]).square() + lead * apart_CC
    cost_BNM = teacher_share_BNC @ distance_CC @ student_share_BMC.to(distance_CC.dtype).transpose(1, 2)
    known_BNM = (teacher_share_BNC.sum(2) > 0)[:, :, None] & (student_share_BMC.sum(2) > 0)[:, None]
    return torch.where(known_BNM, cost_BNM, distance_CC.mean() if distance_CC.numel() else 0.0)


def cell_shares(box_BN4: Tensor, mask_BN: Tensor, cell_box_BC4: Tensor) -> Tensor:
    """Share [B, N, C] of each token in each cell: of the area that it has in cells. Zeros where it has none.

    A cell counts as much as the part of it that the token covers, so that a token over a whole row of thin cells
    belongs to each of them alike.
    """
    area_BNC = overlap_area(box_BN4, cell_box_BC4).masked_fill(~mask_BN[..., None], 0)
    total_BN1 = area_BNC.sum(2, keepdim=True)
    return torch.where(total_BN1 > 0, area_BNC / total_BN1.clamp_min(torch.finfo(area_BNC.dtype).tiny), 0.0)


def token_lead(box_BN4: Tensor, mask_BN: Tensor, cell_box_BC4: Tensor, cell_lead_C: Tensor) -> Tensor:
    """Lead of the lead x time cell that each token overlaps most: int [B, N], -1 where it overlaps none."""
    overlap_BNC = overlap_area(box_BN4, cell_box_BC4)
    if overlap_BNC.shape[-1] == 0:
        return torch.full(mask_BN.shape, -1, dtype=cell_lead_C.dtype, device=mask_BN.device)
    area_BN, cell_BN = overlap_BNC.max(-1)
    return cell_lead_C[cell_BN].masked_fill(~mask_BN | (area_BN <= 0), -1)


def overlap_area(box_BN4: Tensor, cell_box_BC4: Tensor) -> Tensor:
    """Area [B, N, C] that every box shares with every cell, in pages."""
    low_BNC2 = torch.maximum(box_BN4[:, :, None, :2], cell_box_BC4[:, None, :, :2])
    high_BNC2 = torch.minimum(box_BN4[:, :, None, 2:], cell_box_BC4[:, None, :, 2:])
    return (high_BNC2 - low_BNC2).clamp_min(0).prod(-1)


@torch.no_grad()
def plan_diagnostics(
    plan_BNM: Tensor,
    teacher_mask_BN: Tensor,
    student_mask_BM: Tensor,
    teacher_lead_BN: Tensor,
    student_lead_BM: Tensor,
) -> dict[str, float]:
    """What the log says of a plan; a number that is undefined is absent.

    Returns:
        `ot_entropy`: 0 a matching as hard as the marginals allow, 1 the independent plan; mean over samples.
        `ot_marginal_error`: sum of |row sum - 1/N| and |column sum - 1/M|, of the worst sample.
        `ot_mass_in_lead`: of the mass that leaves a token with a lead for a token with a lead, the share that stays
        in the lead.
    """
    found: dict[str, float] = {}
    n_B, m_B = teacher_mask_BN.sum(1), student_mask_BM.sum(1)
    several_B = torch.minimum(n_B, m_B) > 1
    if several_B.any():
        entropy_B = -torch.xlogy(plan_BNM, plan_BNM).sum((1, 2))[several_B]
        log_n_B, log_m_B = n_B[several_B].log(), m_B[several_B].log()
        low_B, range_B = torch.maximum(log_n_B, log_m_B), torch.minimum(log_n_B, log_m_B)
        found["ot_entropy"] = float(((entropy_B - low_B) / range_B).mean())
    has_tokens_B = (n_B > 0) & (m_B > 0)
    if has_tokens_B.any():
        rows_BN = (plan_BNM.sum(2) - 1 / n_B[:, None]).masked_fill(~teacher_mask_BN, 0)
        columns_BM = (plan_BNM.sum(1) - 1 / m_B[:, None]).masked_fill(~student_mask_BM, 0)
        error_B = rows_BN.abs().sum(1) + columns_BM.abs().sum(1)
        found["ot_marginal_error"] = float(error_B[has_tokens_B].max())
    with_lead_BNM = (teacher_lead_BN >= 0)[:, :, None] & (student_lead_BM >= 0)[:, None]
    mass = (plan_BNM * with_lead_BNM).sum()
    if mass > 0:
        same_BNM = with_lead_BNM & (teacher_lead_BN[:, :, None] == student_lead_BM[:, None])
        found["ot_mass_in_lead"] = float((plan_BNM * same_BNM).sum() / mass)
    return found
