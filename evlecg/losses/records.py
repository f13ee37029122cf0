"""Relations among the records of a batch: what differs between patients, as the teacher sees it.

METHOD's relation term compares the tokens of one page with one another. What a label hangs on differs from one patient
to the next, and in a batch that can be seen at the same place of every record: the state that has read the same
question and is about to answer it, and the visual token at the same spot of the page. Distances and cosines among
records need no projection, no common tokenizer and no common grid. Relating whole records goes back to RKD (Park 2019);
the answer states, and one place of the page at a time, are our own. recipes/studies/ says what they gain.

Large models leave room for few records a batch. Their states then meet those of the batches before, as these were:
constants of a step or a few ago, like the memory of He et al. 2020 (MoCo) and Wang et al. 2020 (cross-batch memory).

Shape legend: B rows, S positions, Q questions of the batch (row by row), G different questions, R records, C cells,
D student width, E teacher width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evlecg.losses.relation import relation_loss
from evlecg.schema import Batch, Side


@dataclass(frozen=True)
class RecordStates:
    """What records are related by.

    Attributes:
        n_records: how many there are.
        student_QD, teacher_QE: from `question_states`, one for one; no rows where questions are not related.
        asked_Q: int, which question each is.
        student_RCD, teacher_RCE: visual tokens pooled into cells (`pool_to_cells`), one row a record; no rows where
            places are not related.
        mask_RC: bool, cells that both sides have.
        cell_C3: what a cell is, the same numbers in every batch; NaN where nobody knows.
    """

    n_records: int
    student_QD: Tensor
    teacher_QE: Tensor
    asked_Q: Tensor
    student_RCD: Tensor
    teacher_RCE: Tensor
    mask_RC: Tensor
    cell_C3: Tensor

    def constant(self) -> RecordStates:
        """The same values without gradient."""
        return self._each(Tensor.detach)

    def to(self, device: torch.device | str) -> RecordStates:
        """The same on a device."""
        return self._each(lambda value: value.to(device))

    def among(self, cell_C3: Tensor) -> RecordStates:
        """The same with the cells of another batch; those that it lacks are masked."""
        same_CK = (cell_C3[:, None] == self.cell_C3[None]).all(2)
        place_C, found_C = same_CK.int().argmax(1), same_CK.any(1)
        return dataclasses.replace(
            self, student_RCD=self.student_RCD[:, place_C], teacher_RCE=self.teacher_RCE[:, place_C],
            mask_RC=self.mask_RC[:, place_C] & found_C, cell_C3=cell_C3,
        )  # fmt: skip

    def _each(self, change: Callable[[Tensor], Tensor]) -> RecordStates:
        held = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "n_records"}
        return RecordStates(self.n_records, **{name: change(value) for name, value in held.items()})


class EarlierRecords:
    """The states of the last records that were stepped on, kept for batches that hold too few; saved with checkpoints.

    Args:
        least: records that are kept: no fewer, once there were so many, and no batch more than it takes.
    """

    def __init__(self, least: int) -> None:
        self.least = least
        self._kept: list[RecordStates] = []

    def __bool__(self) -> bool:
        return bool(self._kept)

    def remember(self, states: Sequence[RecordStates]) -> None:
        """Keeps the states of a batch: on several processes those of all, so that they keep the same."""
        self._kept.extend(one for one in states if one.n_records)
        self._kept = self._newest(self.least)

    def completing(self, n_records: int, device: torch.device) -> list[RecordStates]:
        """The fewest of the last ones with which a batch of `n_records` has enough."""
        return [states.to(device) for states in self._newest(self.least - n_records)]

    def state_dict(self) -> dict[str, Any]:
        """Everything that is kept."""
        return {"kept": [dict(vars(states)) for states in self._kept]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What a checkpoint kept."""
        self._kept = [RecordStates(**states) for states in state["kept"]]

    def _newest(self, n_records: int) -> list[RecordStates]:
        found: list[RecordStates] = []
        for states in reversed(self._kept):
            if sum(one.n_records for one in found) >= n_records:
                break
            found.insert(0, states)
        return found


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
    states: RecordStates, earlier: Sequence[RecordStates] = (), *, distance: float, cosine: float
) -> Tensor:
    """Relations among the states that answer the same question, averaged over questions that were asked twice or more.

    Args:
        states: of a batch.
        earlier: of batches before it, which stand beside it as constants.
        distance, cosine: weights, as of `relation_loss`.
    """
    all_of = [states, *earlier]
    asked_Q = torch.cat([one.asked_Q for one in all_of])
    student_GRD, mask_GR = by_question(torch.cat([one.student_QD for one in all_of]), asked_Q)
    teacher_GRE, _ = by_question(torch.cat([one.teacher_QE for one in all_of]), asked_Q)
    fresh_GR = None
    if earlier:
        fresh_Q1 = (torch.arange(len(asked_Q), device=asked_Q.device) < len(states.asked_Q))[:, None].float()
        fresh_GR = by_question(fresh_Q1, asked_Q)[0][..., 0] > 0
    return relation_loss(student_GRD, teacher_GRE, mask_GR, distance=distance, cosine=cosine, fresh_BN=fresh_GR)


def place_relation(
    states: RecordStates, earlier: Sequence[RecordStates] = (), *, distance: float, cosine: float
) -> Tensor:
    """Relations among records at the same cell, averaged over cells that two records or more have.

    Args:
        states, earlier, distance, cosine: as of `answer_relation`.
    """
    all_of = [states, *(one.among(states.cell_C3) for one in earlier)]
    student_RCD, teacher_RCE, mask_RC = (
        torch.cat([getattr(one, name) for one in all_of]) for name in ("student_RCD", "teacher_RCE", "mask_RC")
    )
    fresh_CR = None
    if earlier:
        fresh_R = torch.arange(len(mask_RC), device=mask_RC.device) < len(states.mask_RC)
        fresh_CR = fresh_R.expand(mask_RC.shape[1], -1)
    return relation_loss(
        student_RCD.transpose(0, 1), teacher_RCE.transpose(0, 1), mask_RC.T, distance=distance, cosine=cosine,
        fresh_BN=fresh_CR,
    )  # fmt: skip


def _in_groups(asked_Q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Questions with the same ones side by side: their order, each one's group and place in it, and groups' sizes.

    Groups come in the order in which their questions first do.
    """
    here_Q = torch.arange(len(asked_Q), device=asked_Q.device)
    number_Q = asked_Q.unique(return_inverse=True)[1]
    first_Q = here_Q.new_full(asked_Q.shape, len(asked_Q)).scatter_reduce(0, number_Q, here_Q, "amin")
    asked_Q = first_Q[number_Q]
    order_Q = asked_Q.argsort(stable=True)
    _, group_Q, count_G = asked_Q[order_Q].unique_consecutive(return_inverse=True, return_counts=True)
    place_Q = here_Q - (count_G.cumsum(0) - count_G)[group_Q]
    return order_Q, group_Q, count_G, place_Q
