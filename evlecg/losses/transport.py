"""Optimal-transport matching of visual tokens: METHOD's second term.

Entropic optimal transport (Cuturi 2013) between the valid tokens of both sides: uniform marginals, or the same mass for
every lead (`lead_marginals`), which must hold or are relaxed. The cost is divided by its mean first, so that `epsilon`
means the same for every width. `sinkhorn` has the solver, `gromov` an experiment that also matches the distances within
each side.

Shape legend: B batch rows, N teacher tokens, M student tokens, D common width, C lead x time cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from evlecg.losses.gromov import fused_gromov_plan, inner_distance, structure_loss
from evlecg.losses.sinkhorn import transport_plan, uniform_marginals
from evlecg.losses.stable import full_precision, layer_normalised, masked_mean, squared_distance, zero_where_masked


@dataclass(frozen=True)
class Transport:
    """The term, and what explains it.

    Attributes:
        loss: scalar, on the graph.
        plan_BNM: detached; sums to 1 (less where marginals are relaxed) in rows that have tokens on both sides, 0
            elsewhere.
        cost_BNM: detached; what the plan was steered by, before its division by the mean.
        a_BN: mass that every teacher token should have in the plan.
        b_BM: the same of the student's.
    """

    loss: Tensor
    plan_BNM: Tensor
    cost_BNM: Tensor
    a_BN: Tensor
    b_BM: Tensor


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
    a_BN: Tensor | None = None,
    b_BM: Tensor | None = None,
    relax: float | None = None,
    structure: float | None = None,
) -> Transport:
    """Cost of carrying the teacher's visual tokens onto the student's along the optimal plan.

    Published form (`strict`): sum_ij P_ij ||t_i - s_j||^2, averaged over the samples that have tokens on both sides.
    Default form: the same sum over D, so that one weight serves every width, between layer-normalised tokens.
    P is constant in the gradient (envelope theorem).
    With `structure`: that share of fused Gromov-Wasserstein's loss between the distances within each side, and one
    minus that share of the default form.

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
        a_BN: mass of every teacher token, summing to 1 (see `lead_marginals`); None: uniform.
        b_BM: the same of the student's tokens.
        relax: cost of departing from the marginals, in mean costs; None: they must hold.
        structure: match the distances within each side with this weight (0 to 1); None: do not.

    Source:
        METHOD, term 2; arXiv 2605.29977. Options: see `transport_plan`, `fused_gromov_plan`.
    """
    if strict and not all(option is None for option in (extra_cost_BNM, a_BN, b_BM, relax, structure)):
        raise ValueError("the published form has no extra cost, and balanced, uniform marginals")
    if structure is not None and relax is not None:
        raise ValueError("fused Gromov-Wasserstein is solved with marginals that hold")
    teacher_BND = zero_where_masked(teacher_BND, teacher_mask_BN)
    student_BMD = zero_where_masked(student_BMD, student_mask_BM)
    if normalise and not strict:
        teacher_BND, student_BMD = layer_normalised(teacher_BND), layer_normalised(student_BMD)
    with torch.no_grad():
        cost_BNM = squared_distance(teacher_BND, student_BMD, teacher_mask_BN, student_mask_BM)
        if extra_cost_BNM is not None:
            cost_BNM = mean_divided(cost_BNM, teacher_mask_BN, student_mask_BM) + extra_cost_BNM.to(cost_BNM.dtype)
    a_BN = uniform_marginals(teacher_mask_BN, like=cost_BNM) if a_BN is None else a_BN
    b_BM = uniform_marginals(student_mask_BM, like=cost_BNM) if b_BM is None else b_BM
    if structure is None:
        masks = teacher_mask_BN, student_mask_BM
        plan_BNM = transport_plan(cost_BNM, *masks, epsilon=epsilon, steps=steps, relax=relax, a_BN=a_BN, b_BM=b_BM)
        loss_B = plan_cost(plan_BNM, teacher_BND, student_BMD)
    else:
        inner = inner_distance(teacher_BND, teacher_mask_BN), inner_distance(student_BMD, student_mask_BM)
        plan_BNM = fused_gromov_plan(cost_BNM, *inner, a_BN, b_BM, epsilon=epsilon, steps=steps, structure=structure)
        # times the width, which the default form divides by: distances within a side are in mean distances
        loss_B = structure * student_BMD.shape[-1] * structure_loss(plan_BNM, *inner)
        loss_B = loss_B + (1 - structure) * plan_cost(plan_BNM, teacher_BND, student_BMD)
    if not strict:
        loss_B = loss_B / student_BMD.shape[-1]
    has_tokens_B = teacher_mask_BN.any(1) & student_mask_BM.any(1)
    return Transport(masked_mean(loss_B, has_tokens_B), plan_BNM, cost_BNM, a_BN, b_BM)


def plan_cost(plan_BNM: Tensor, x_BND: Tensor, y_BMD: Tensor) -> Tensor:
    """sum_ij P_ij ||x_i - y_j||^2 of every sample, [B], without a second [N, M] matrix on the graph."""
    return (
        (plan_BNM.sum(2) * x_BND.square().sum(-1)).sum(1)
        + (plan_BNM.sum(1) * y_BMD.square().sum(-1)).sum(1)
        - 2 * ((plan_BNM.transpose(1, 2) @ x_BND) * y_BMD).sum((1, 2))
    )


def lead_marginals(
    teacher_mask_BN: Tensor, student_mask_BM: Tensor, teacher_lead_BN: Tensor, student_lead_BM: Tensor
) -> tuple[Tensor, Tensor]:
    """Marginals under which every lead weighs the same on both sides, however many tokens show it.

    With uniform marginals a long rhythm strip outweighs a short lead, and two grids that share a page give a lead
    different masses, which forces mass across leads. Here the tokens without a lead keep the mean of their shares on
    both sides; the rest is divided equally among the leads that both sides show, and within a lead among its tokens.
    Tokens of a lead that one side lacks get nothing. A sample in which the sides share no lead stays uniform.

    Args:
        teacher_mask_BN: bool, valid tokens.
        student_mask_BM: bool, valid tokens.
        teacher_lead_BN: index of the lead that a token shows, -1 for none (see `token_lead`).
        student_lead_BM: the same of the student.

    Returns:
        Mass of every token, float32 [B, N] and [B, M]; each sums to 1, or to 0 where a side has no token.
    """
    leads = 1 + max(int(lead.max()) if lead.numel() else -1 for lead in (teacher_lead_BN, student_lead_BM))

    def members(lead_BN: Tensor, mask_BN: Tensor) -> Tensor:
        """Which token belongs to which group, [B, N, 1 + leads]; the first group is of tokens without a lead."""
        return F.one_hot((lead_BN + 1).clamp_min(0), leads + 1).float() * mask_BN[..., None]

    teacher_BNL, student_BML = members(teacher_lead_BN, teacher_mask_BN), members(student_lead_BM, student_mask_BM)
    shared_BL = teacher_BNL.any(1) & student_BML.any(1)
    blank_B = (teacher_BNL[..., 0].sum(1) / teacher_mask_BN.sum(1).clamp_min(1)
               + student_BML[..., 0].sum(1) / student_mask_BM.sum(1).clamp_min(1)) / 2 * shared_BL[:, 0]  # fmt: skip
    lead_count_B = shared_BL[:, 1:].sum(1)
    mass_BL = shared_BL * ((1 - blank_B) / lead_count_B.clamp_min(1))[:, None]
    mass_BL[:, 0] = blank_B

    def spread(members_BNL: Tensor, mask_BN: Tensor) -> Tensor:
        per_token_BL = mass_BL / members_BNL.sum(1).clamp_min(1)
        mass_BN = (members_BNL @ per_token_BL[..., None])[..., 0]
        return torch.where(lead_count_B[:, None] > 0, mass_BN, uniform_marginals(mask_BN, like=mass_BN))

    return spread(teacher_BNL, teacher_mask_BN), spread(student_BML, student_mask_BM)


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
    plan_BNM: Tensor, a_BN: Tensor, b_BM: Tensor, teacher_lead_BN: Tensor, student_lead_BM: Tensor
) -> dict[str, float]:
    """What the log says of a plan; a number that is undefined is absent.

    Args:
        plan_BNM: the plan.
        a_BN: mass that every teacher token should have, 0 where it is invalid.
        b_BM: the same of the student's tokens.
        teacher_lead_BN: index of the lead that a token shows, -1 for none.
        student_lead_BM: the same of the student.

    Returns:
        `ot_entropy`: 0 a matching as hard as the plan's marginals allow, 1 the independent plan; mean over samples.
        `ot_mass`: mass that is carried, 1 unless marginals are relaxed; mean over samples.
        `ot_marginal_error`: sum of |row sum - a| and |column sum - b|, of the worst sample.
        `ot_mass_in_lead`: of the mass that leaves a token with a lead for a token with a lead, the share that stays
        in the lead.
    """
    found: dict[str, float] = {}
    row_BN, column_BM, mass_B = plan_BNM.sum(2), plan_BNM.sum(1), plan_BNM.sum((1, 2))
    several_B = (torch.minimum((a_BN > 0).sum(1), (b_BM > 0).sum(1)) > 1) & (mass_B > 0)
    if several_B.any():
        mass_K = mass_B[several_B]

        def entropy(part: Tensor) -> Tensor:
            share = part[several_B].flatten(1) / mass_K[:, None]
            return -torch.xlogy(share, share).sum(1)

        row_K, column_K = entropy(row_BN), entropy(column_BM)
        low_K, range_K = torch.maximum(row_K, column_K), torch.minimum(row_K, column_K)
        found["ot_entropy"] = float(((entropy(plan_BNM) - low_K) / range_K).mean())
    has_tokens_B = (a_BN.sum(1) > 0) & (b_BM.sum(1) > 0)
    if has_tokens_B.any():
        error_B = (row_BN - a_BN).abs().sum(1) + (column_BM - b_BM).abs().sum(1)
        found["ot_marginal_error"] = float(error_B[has_tokens_B].max())
        found["ot_mass"] = float(mass_B[has_tokens_B].mean())
    with_lead_BNM = (teacher_lead_BN >= 0)[:, :, None] & (student_lead_BM >= 0)[:, None]
    mass = (plan_BNM * with_lead_BNM).sum()
    if mass > 0:
        same_BNM = with_lead_BNM & (teacher_lead_BN[:, :, None] == student_lead_BM[:, None])
        found["ot_mass_in_lead"] = float((plan_BNM * same_BNM).sum() / mass)
    return found
