"""Relations among the records of a batch: what differs between patients, as the teacher sees it.

METHOD's relation term compares the tokens of one page with one another. What a label hangs on differs from one patient
to the next, and in a batch that can be seen at the same place of every record: the state that has read the same
question and is about to answer it, and the visual token at the same spot of the page. Distances and cosines among
records need no projection, no common tokenizer and no common grid. Relating whole records goes back to RKD (Park 2019);
the answer states, and one place of the page at a time, are our own. recipes/studies/ says what they gain.

Shape legend: B rows, S positions, Q questions of the batch (row by row), G different questions, R records, C cells,
D student width, E teacher width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evlecg.losses.relation import relation_loss
from evlecg.schema import Batch, Side


def first_rows(batch: Batch) -> Tensor:
    """The first row of every record of a batch, [R]: further ones ask further questions about it."""
    first_B = torch.ones_like(batch.record_B, dtype=torch.bool)
    first_B[1:] = batch.record_B[1:] != batch.record_B[:-1]
    return first_B.nonzero()[:, 0]


def question_states(hidden_BSD: Tensor, side: Side) -> Tensor:
    """States [Q, D] that have read a question and predict the first token of its answer, in reading order."""
    row_A, place_A = side.answer_A2.unbind(1)
    block_A = side.block_BS[row_A, place_A]
    opens_A = torch.ones_like(row_A, dtype=torch.bool)
    opens_A[1:] = (row_A[1:] != row_A[:-1]) | (block_A[1:] != block_A[:-1])
    return hidden_BSD[row_A[opens_A], place_A[opens_A] - 1]


def by_question(states_QD: Tensor, asked_Q: Tensor) -> tuple[Tensor, Tensor]:
    """States of the same question side by side: [G, R, D], and bool [G, R], False behind the last one of a question.

    Args:
        states_QD: from `question_states`.
        asked_Q: int, the same number for the same question.
    """
    order_Q, group_Q, count_G, place_Q = _in_groups(asked_Q)
    n_records = int(count_G.max()) if len(count_G) else 0
    states_GRD = states_QD.new_zeros(len(count_G), n_records, states_QD.shape[1])
    states_GRD = states_GRD.index_put((group_Q, place_Q), states_QD[order_Q])
    return states_GRD, torch.arange(n_records, device=asked_Q.device)[None] < count_G[:, None]


def of_neighbours(states_QD: Tensor, asked_Q: Tensor) -> Tensor:
    """States [Q, D] of another record that was asked the same question, in place of a record's own."""
    order_Q, group_Q, count_G, place_Q = _in_groups(asked_Q)
    here_Q = torch.arange(len(asked_Q), device=asked_Q.device)
    next_Q = order_Q[here_Q - place_Q + (place_Q + 1) % count_G[group_Q]]
    return states_QD[next_Q[order_Q.argsort()]]


def answer_relation(
    student_QD: Tensor, teacher_QE: Tensor, asked_Q: Tensor, *, distance: float, cosine: float
) -> Tensor:
    """Relations among the states that answer the same question, averaged over questions that were asked twice or more.

    Args:
        student_QD, teacher_QE: from `question_states`, one for one.
        asked_Q: int, the same number for the same question.
        distance, cosine: weights, as of `relation_loss`.
    """
    student_GRD, mask_GR = by_question(student_QD, asked_Q)
    teacher_GRE, _ = by_question(teacher_QE, asked_Q)
    return relation_loss(student_GRD, teacher_GRE, mask_GR, distance=distance, cosine=cosine)


def place_relation(
    student_RCD: Tensor, teacher_RCE: Tensor, mask_RC: Tensor, *, distance: float, cosine: float
) -> Tensor:
    """Relations among records at the same cell, averaged over cells that two records or more have.

    Args:
        student_RCD, teacher_RCE: visual tokens pooled into cells (`pool_to_cells`), one row a record.
        mask_RC: bool, cells that both sides have.
        distance, cosine: weights, as of `relation_loss`.
    """
    return relation_loss(
        student_RCD.transpose(0, 1), teacher_RCE.transpose(0, 1), mask_RC.T, distance=distance, cosine=cosine
    )


def _in_groups(asked_Q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Questions with the same ones side by side: their order, each one's group and place in it, and groups' sizes."""
    order_Q = asked_Q.argsort(stable=True)
    _, group_Q, count_G = asked_Q[order_Q].unique_consecutive(return_inverse=True, return_counts=True)
    place_Q = torch.arange(len(asked_Q), device=asked_Q.device) - (count_G.cumsum(0) - count_G)[group_Q]
    return order_Q, group_Q, count_G, place_Q
