"""Geometric relations: METHOD's third term.

Distances and cosines among tokens do not depend on the width or on a rotation of the space they live in, so teacher
and student can be compared without a projection once both have the same tokens: the aligned states (published form),
or visual tokens pooled into cells that both sides know: a page grid, or lead x time cells, where one lead across time
is rhythm and one time across leads is axis (default form).

Shape legend: B batch rows, N tokens of one side, C cells, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evlecg.losses.stable import full_precision, masked_mean, squared_distance, zero_where_masked
from evlecg.losses.transport import overlap_area

TINY = 1e-6  # lengths below this carry no direction: their relations are constants
LEAST_COVER = 1e-3  # share of a cell that tokens must cover; less is rounding of a neighbour's edge


def page_grid(side_cells: int, *, like: Tensor) -> Tensor:
    """Boxes [1, G*G, 4] of a G x G grid over the page, row by row, on the device and in the dtype of `like`."""
    edges_E = torch.linspace(0, 1, side_cells + 1, device=like.device, dtype=like.dtype)
    y0_GG, x0_GG = torch.meshgrid(edges_E[:-1], edges_E[:-1], indexing="ij")
    y1_GG, x1_GG = torch.meshgrid(edges_E[1:], edges_E[1:], indexing="ij")
    return torch.stack([x0_GG, y0_GG, x1_GG, y1_GG], dim=-1).reshape(1, -1, 4)


@full_precision
def pool_to_cells(
    tokens_BND: Tensor, token_box_BN4: Tensor, token_mask_BN: Tensor, cell_box_BC4: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean of the tokens over each cell, weighted by the area they share.

    Args:
        tokens_BND: tokens.
        token_box_BN4: their page boxes x0, y0, x1, y1.
        token_mask_BN: bool, valid tokens.
        cell_box_BC4: page boxes of the cells; one row of boxes serves every sample.

    Returns:
        Pooled tokens [B, C, D], and bool [B, C]: cells that tokens cover. Other cells hold zeros.
    """
    tokens_BND = zero_where_masked(tokens_BND, token_mask_BN)
    cell_box_BC4 = cell_box_BC4.expand(len(tokens_BND), -1, -1).to(token_box_BN4.dtype)
    area_BNC = overlap_area(token_box_BN4, cell_box_BC4).masked_fill(~token_mask_BN[..., None], 0)
    cover_BC = area_BNC.sum(1)
    cell_area_BC = (cell_box_BC4[..., 2:] - cell_box_BC4[..., :2]).clamp_min(0).prod(-1)
    mask_BC = cover_BC > LEAST_COVER * cell_area_BC
    weight_BNC = (area_BNC / cover_BC.masked_fill(~mask_BC, 1)[:, None]).masked_fill(~mask_BC[:, None], 0)
    return weight_BNC.transpose(1, 2).to(tokens_BND.dtype) @ tokens_BND, mask_BC


@full_precision
def distance_relation(tokens_BND: Tensor, mask_BN: Tensor) -> Tensor:
    """Pairwise Euclidean distances over their mean: [B, N, N], zero for masked tokens and on the diagonal.

    The mean is over distinct valid pairs, so that it does not depend on how many tokens there are (Park 2019).
    """
    pair_BNN = _distinct_pairs(mask_BN)
    squared_BNN = squared_distance(tokens_BND, tokens_BND, mask_BN, mask_BN)
    apart_BNN = pair_BNN & (squared_BNN > TINY**2)
    # sqrt has an infinite slope at 0: coincident tokens get the constant 0, and the 1 keeps their slope finite
    distance_BNN = squared_BNN.masked_fill(~apart_BNN, 1).sqrt().masked_fill(~apart_BNN, 0)
    mean_B = distance_BNN.sum((1, 2)) / pair_BNN.sum((1, 2)).clamp_min(1)
    return distance_BNN / mean_B.clamp_min(TINY)[:, None, None]


@full_precision
def cosine_relation(tokens_BND: Tensor, mask_BN: Tensor) -> Tensor:
    """Pairwise cosines: [B, N, N], zero for masked tokens and for tokens of length zero."""
    tokens_BND = zero_where_masked(tokens_BND, mask_BN)
    squared_BN = tokens_BND.square().sum(-1)
    long_BN = squared_BN > TINY**2
    length_BN = squared_BN.masked_fill(~long_BN, 1).sqrt()
    direction_BND = zero_where_masked(tokens_BND / length_BN[..., None], long_BN)
    return direction_BND @ direction_BND.transpose(1, 2)


@full_precision
def relation_loss(
    student_BND: Tensor, target_BNE: Tensor, mask_BN: Tensor, *, distance: float = 0.5, cosine: float = 0.5
) -> Tensor:
    """Squared difference of the relations on both sides: 1/N^2 sum_ij, averaged over samples with at least two tokens.

    With the default weights this is the published (L_D + L_A) / 2. Gradients reach both sides: detach a target that
    is not to move.

    Args:
        student_BND: student tokens.
        target_BNE: the target's tokens, one for one; any width.
        mask_BN: bool, tokens that both sides have.
        distance: weight of the distance relation.
        cosine: weight of the cosine relation.

    Source:
        METHOD, term 3; arXiv 2605.29977. Relations: Park et al. 2019.
    """
    count_B = mask_BN.sum(1)
    error_B = student_BND.new_zeros(len(mask_BN))
    for weight, relation in ((distance, distance_relation), (cosine, cosine_relation)):
        if weight:
            difference_BNN = relation(student_BND, mask_BN) - relation(target_BNE, mask_BN)
            error_B = error_B + weight * difference_BNN.square().sum((1, 2)) / count_B.square().clamp_min(1)
    return masked_mean(error_B, count_B > 1)


def _distinct_pairs(mask_BN: Tensor) -> Tensor:
    """Bool [B, N, N]: both tokens valid and not the same."""
    other_NN = ~torch.eye(mask_BN.shape[1], dtype=torch.bool, device=mask_BN.device)
    return mask_BN[:, :, None] & mask_BN[:, None] & other_NN
