"""Multi-head cross-attention alignment: METHOD's first term, with its guards against collapse and answer leaks.

H_hat = MultiHead(Q = H_s, K = V = H_t) is what the teacher's states say at the student's positions. Who moves, in the
default form:

- The **student** moves toward H_hat wherever the term is taken. The query is detached, so it cannot lower the loss by
  asking for something easier.
- The **aligner** learns from the anchor (the answer's cross-entropy of the student's frozen output head on H_hat) at
  the positions that predict answer tokens, and there the distance leaves it alone: were it also pulled toward the
  student at those positions, "repeat what the student knows" would be a solution. DSKD (Zhang et al. 2024) separates
  them likewise. Elsewhere nothing but the distance could train it, so it is fitted to the student's states there, as
  every regressor of hidden states since FitNets is.
- The **anchor** moves the aligner only: head, teacher and (detached) query are constants to it.

A collapsed aligner (H_hat no longer depends on the record) shows in three ways: its variance across the samples of a
batch falls to nothing (`variance_share`), and with the teacher's batch rolled by one neither the distance nor the
anchor gets worse (objective.py). In the published form (`strict`) everything moves and nothing is anchored.

Shape legend: B batch rows, S student positions, T teacher positions, N visual tokens, D student width, E teacher
width, H heads, A answer tokens in the batch, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evlecg.losses.stable import full_precision, layer_normalised, masked_mean, zero_where_masked
from evlecg.losses.transport import cell_cost, cell_shares
from evlecg.schema import Side


class CrossAligner(nn.Module):
    """Attention from student positions to teacher positions, of the student's width, without biases.

    Args:
        student_width: width of the queries and of the result.
        teacher_width: width of keys and values.
        heads: attention heads; divides `student_width`.
        normalise: layer-normalise what comes in, so that single huge channels (attention sinks) of a language model
            do not saturate the softmax before anything is learnt. The published form has no such thing.
    """

    def __init__(self, student_width: int, teacher_width: int, *, heads: int, normalise: bool) -> None:
        super().__init__()
        if student_width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {student_width}")
        self.heads = heads
        self.normalise = normalise
        self.query = nn.Linear(student_width, student_width, bias=False)
        self.key = nn.Linear(teacher_width, student_width, bias=False)
        self.value = nn.Linear(teacher_width, student_width, bias=False)
        self.out = nn.Linear(student_width, student_width, bias=False)
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)

    @full_precision
    def forward(
        self, student_BSD: Tensor, teacher_BTE: Tensor, visible_BST: Tensor, bias_BST: Tensor | None = None
    ) -> Tensor:
        """Aligned teacher states [B, S, D]; zeros at positions that see nothing.

        Args:
            student_BSD: queries.
            teacher_BTE: keys and values.
            visible_BST: bool, which teacher positions a student position sees.
            bias_BST: added to the attention logits of every head.
        """
        sees_BS = visible_BST.any(2)
        student_BSD = zero_where_masked(student_BSD, sees_BS)
        teacher_BTE = zero_where_masked(teacher_BTE, visible_BST.any(1))
        if self.normalise:
            student_BSD, teacher_BTE = layer_normalised(student_BSD), layer_normalised(teacher_BTE)
        # a softmax over nothing is NaN: such positions look at everything here and are zeroed at the end
        blocked_BST = ~visible_BST & sees_BS[:, :, None]
        bias_BST = student_BSD.new_zeros(visible_BST.shape) if bias_BST is None else bias_BST.to(student_BSD.dtype)
        attended_BHSd = F.scaled_dot_product_attention(
            self._heads(self.query(student_BSD)),
            self._heads(self.key(teacher_BTE)),
            self._heads(self.value(teacher_BTE)),
            attn_mask=bias_BST.masked_fill(blocked_BST, -torch.inf)[:, None],
        )
        return zero_where_masked(self.out(attended_BHSd.transpose(1, 2).flatten(2)), sees_BS)

    def _heads(self, tokens_BXD: Tensor) -> Tensor:
        return tokens_BXD.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def cross_causal_mask(student: Side, teacher: Side) -> Tensor:
    """Which teacher positions a student position may see without reading ahead: bool [B, S, T].

    The shared prefix (system text and image) is open to all; a question's teacher positions to the student positions
    of the same question that have read at least as many bytes of its answer. Questions do not see one another.
    """
    prefix_B1T = (teacher.block_BS == 0)[:, None]
    same_BST = student.block_BS[:, :, None] == teacher.block_BS[:, None]
    read_BST = teacher.byte_end_BS[:, None] <= student.byte_end_BS[:, :, None]
    return visible_mask(student, teacher) & (prefix_B1T | (same_BST & read_BST))


def visible_mask(student: Side, teacher: Side) -> Tensor:
    """Every valid teacher position, for every valid student position: bool [B, S, T], the published form."""
    return student.valid_BS[:, :, None] & teacher.valid_BS[:, None]


LEAD_APART = 0.25  # another lead, in squared page widths, where only leads and times can be compared


def position_bias(
    student: Side,
    teacher: Side,
    *,
    weight: float,
    cells: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention bias [B, S, T] against the far side of the page.

    Minus `weight` times the squared distance (`place_distance`) between two visual tokens that see the page; 0 where
    either is text or sees only padding.
    """
    student_index_BS, student_seen_BS = _visual_index(student)
    teacher_index_BT, teacher_seen_BT = _visual_index(teacher)
    seen_BST = student_seen_BS[:, :, None] & teacher_seen_BT[:, None]
    if 0 in (student.visual_box_BN4.shape[1], teacher.visual_box_BN4.shape[1]):
        return student.visual_box_BN4.new_zeros(seen_BST.shape)
    between_BNM = place_distance(student, teacher, cells=cells)
    rows_B11 = torch.arange(len(between_BNM), device=between_BNM.device)[:, None, None]
    return -weight * between_BNM[rows_B11, student_index_BS[:, :, None], teacher_index_BT[:, None]] * seen_BST


def place_distance(student: Side, teacher: Side, *, cells: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Squared distance [B, N, M] of the middles of the student's and the teacher's visual tokens (page [0, 1]).

    Where one of them reads signals, the distance is one of time and lead (`transport.cell_cost`, another lead for
    `LEAD_APART`), which takes the batch's cells: their leads and times.
    """
    if student.frame == teacher.frame == "page":
        return (_centres(student)[:, :, None] - _centres(teacher)[:, None]).square().sum(-1)
    if cells is None:
        raise ValueError("places on a page and on a trace are compared through cells")
    return cell_cost(
        cell_shares(student.visual_box_BN4, student.visual_mask_BN, student.cell_box_BC4),
        cell_shares(teacher.visual_box_BN4, teacher.visual_mask_BN, teacher.cell_box_BC4),
        *cells,
        position=1.0,
        lead=LEAD_APART,
    )


def _centres(side: Side) -> Tensor:
    """Middle of every visual token's box [B, N, 2]."""
    return (side.visual_box_BN4[..., :2] + side.visual_box_BN4[..., 2:]) / 2


def _visual_index(side: Side) -> tuple[Tensor, Tensor]:
    """Which visual token stands at every position, int [B, S] (any, where none does), and whether it sees a place."""
    if side.visual_box_BN4.shape[1] == 0:
        return torch.zeros_like(side.block_BS), torch.zeros_like(side.visual_BS)
    index_BS = (side.visual_BS.long().cumsum(1) - 1).clamp(0, side.visual_box_BN4.shape[1] - 1)
    return index_BS, side.visual_BS & side.visual_mask_BN.gather(1, index_BS)


def visual_states(hidden_BSD: Tensor, side: Side) -> Tensor:
    """States at the visual positions [B, N, D], in order; what fills up rows with fewer is masked in `side`."""
    count = side.visual_box_BN4.shape[1]
    order_BN = torch.argsort((~side.visual_BS).int(), dim=1, stable=True)[:, :count]
    return hidden_BSD.gather(1, order_BN[..., None].expand(-1, -1, hidden_BSD.shape[-1]))


def predicting_positions(side: Side) -> Tensor:
    """Bool [B, S]: positions whose state predicts an answer token, one before the token itself."""
    marked_BS = torch.zeros_like(side.valid_BS)
    marked_BS[side.answer_A2[:, 0], side.answer_A2[:, 1] - 1] = True
    return marked_BS


@full_precision
def strict_alignment_loss(student_BSD: Tensor, aligned_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """The published form: squared distance summed over the width, averaged over valid positions.

    The published 1/(B*S) counts valid positions only, so that padding changes nothing.

    Source:
        METHOD, term 1; arXiv 2605.29977.
    """
    difference_BSD = zero_where_masked(student_BSD, mask_BS) - zero_where_masked(aligned_BSD, mask_BS)
    return masked_mean(difference_BSD.square().sum(-1), mask_BS)


@full_precision
def alignment_loss(
    student_BSD: Tensor, aligned_BSD: Tensor, mask_BS: Tensor, anchored_BS: Tensor, *, normalise: bool
) -> Tensor:
    """The default form: squared distance per element, averaged over the masked positions.

    Args:
        student_BSD: student states; they move.
        aligned_BSD: aligned teacher states; they move only where they are not anchored.
        mask_BS: bool, positions that count.
        anchored_BS: bool, positions where the aligned state is a fixed target.
        normalise: layer-normalise both sides first.
    """
    student_BSD = zero_where_masked(student_BSD, mask_BS)
    aligned_BSD = zero_where_masked(aligned_BSD, mask_BS)
    aligned_BSD = torch.where(anchored_BS[..., None], aligned_BSD.detach(), aligned_BSD)
    if normalise:
        student_BSD, aligned_BSD = layer_normalised(student_BSD), layer_normalised(aligned_BSD)
    return masked_mean((student_BSD - aligned_BSD).square().mean(-1), mask_BS)


@full_precision
def departures(states_BXD: Tensor, mask_BX: Tensor) -> Tensor:
    """States [B, X, D] minus their mean over the rows that have the same place; what differs between records.

    Zeros where the mask is False, and at places that one row alone has.
    """
    states_BXD = zero_where_masked(states_BXD, mask_BX)
    mean_XD = states_BXD.sum(0) / mask_BX.sum(0).clamp_min(1)[:, None]
    return zero_where_masked(states_BXD - mean_XD, mask_BX)


def centred_alignment_loss(
    student_BXD: Tensor, aligned_BXD: Tensor, mask_BX: Tensor, *, fixed: bool, normalise: bool
) -> Tensor:
    """`alignment_loss` of what differs between the rows at the same place, over places that several rows have.

    Args:
        student_BXD, aligned_BXD, mask_BX, normalise: as there.
        fixed: the aligned states are a fixed target everywhere.
    """
    mask_BX = mask_BX & (mask_BX.sum(0) > 1)
    student_BXD, aligned_BXD = (departures(states_BXD, mask_BX) for states_BXD in (student_BXD, aligned_BXD))
    return alignment_loss(student_BXD, aligned_BXD, mask_BX, torch.full_like(mask_BX, fixed), normalise=normalise)


@torch.no_grad()
@full_precision
def variance_share(states_BSD: Tensor, mask_BS: Tensor) -> float | None:
    """Share of the states' variance that lies between samples at the same position; 0 for a collapsed target.

    The rest lies between positions. Only positions that are valid in at least two samples count; None where there is
    no such position, or no variance at all.
    """
    mask_BS = mask_BS & (mask_BS.sum(0) > 1)
    if not mask_BS.any():
        return None
    states_BSD = zero_where_masked(states_BSD, mask_BS)
    mean_D = states_BSD.sum((0, 1)) / mask_BS.sum()
    within = departures(states_BSD, mask_BS).square().sum()
    total = zero_where_masked(states_BSD - mean_D, mask_BS).square().sum()
    return float(within / total) if total > 0 else None
