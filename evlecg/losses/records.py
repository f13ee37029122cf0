"""Relations among the records of a batch: what differs between patients, as the teacher sees it.

METHOD's relation term compares the tokens of one page with one another. What a label hangs on differs from one patient
to the next, and in a batch that can be seen at the same place of every record: the state that has read the same
question and is about to answer it, and the visual token at the same spot of the page. Distances and cosines among
records need no projection, no common tokenizer and no common grid. Relating whole records goes back to RKD (Park 2019);
the answer states, and one place of the page at a time, are our own. recipes/studies/ says what they gain.

Large models leave room for few records a batch. Then all records of a step are related: a first pass without gradient
gives their states, the relations among these the gradient on each, and a second pass carries it on, batch after batch,
so that the step is that of one batch (the gradient cache of Gao et al. 2021). States of earlier steps will not do
(recipes/studies/README.md).

Shape legend: B rows, S positions, Q questions of the batch (row by row), G different questions, R records, C cells,
D student width, E teacher width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evlecg.losses.relation import relation_loss
from evlecg.losses.stable import full_precision
from evlecg.schema import Batch, Side


@dataclass(frozen=True)
class RecordStates:
    """What records are related by.

    Attributes:
        student_QD, teacher_QE: from `question_states`, one for one; no rows where questions are not related.
        asked_Q: int, which question each is.
        student_RCD, teacher_RCE: visual tokens pooled into cells (`pool_to_cells`), one row a record; no rows where
            places are not related.
        mask_RC: bool, cells that both sides have.
        cell_C4: what a cell is, the same numbers in every batch; no two of a batch are the same.
    """

    student_QD: Tensor
    teacher_QE: Tensor
    asked_Q: Tensor
    student_RCD: Tensor
    teacher_RCE: Tensor
    mask_RC: Tensor
    cell_C4: Tensor

    def to(self, device: torch.device | str) -> RecordStates:
        """The same without gradient, on a device."""
        held = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return RecordStates(**{name: value.detach().to(device) for name, value in held.items()})

    def rolled(self) -> RecordStates:
        """Every student by another record's teacher, at the same question and the same place."""
        return dataclasses.replace(
            self, teacher_QE=of_neighbours(self.teacher_QE, self.asked_Q), teacher_RCE=self.teacher_RCE.roll(1, 0),
            mask_RC=self.mask_RC & self.mask_RC.roll(1, 0),
        )  # fmt: skip

    def among(self, cell_C4: Tensor) -> RecordStates:
        """The same with the cells of another batch; those that it lacks are masked."""
        same_CK = (cell_C4[:, None] == self.cell_C4[None]).all(2)
        place_C, found_C = same_CK.int().argmax(1), same_CK.any(1)
        return dataclasses.replace(
            self, student_RCD=self.student_RCD[:, place_C], teacher_RCE=self.teacher_RCE[:, place_C],
            mask_RC=self.mask_RC[:, place_C] & found_C, cell_C4=cell_C4,
        )  # fmt: skip


@dataclass(frozen=True)
class Company:
    """The relations of a whole step, and how they pull at the batch that is one of its parts.

    Attributes:
        n_parts: batches with records, of all processes.
        values: term -> its value.
        pulls: term -> gradient of the value on the batch's states ([Q, D] or [R, C, D]); none where it does not count.
    """

    n_parts: int
    values: dict[str, Tensor]
    pulls: dict[str, Tensor]

    def term(self, name: str, states: Tensor) -> Tensor:
        """The value, whose mean over the parts has the gradient of the whole."""
        pull = self.pulls[name] if name in self.pulls else torch.zeros_like(states)
        on_graph = self.n_parts * _along(states, pull)
        return self.values[name] + on_graph - on_graph.detach()


@full_precision
def _along(states: Tensor, direction: Tensor) -> Tensor:
    return (states * direction).sum()


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


def answer_relation(parts: Sequence[RecordStates], *, distance: float, cosine: float) -> Tensor:
    """Relations among the states that answer the same question, averaged over questions that were asked twice or more.

    Args:
        parts: of the batches that are related as one.
        distance, cosine: weights, as of `relation_loss`.
    """
    asked_Q, student_QD, teacher_QE = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("asked_Q", "student_QD", "teacher_QE")
    )
    student_GRD, mask_GR = by_question(student_QD, asked_Q)
    teacher_GRE, _ = by_question(teacher_QE, asked_Q)
    return relation_loss(student_GRD, teacher_GRE, mask_GR, distance=distance, cosine=cosine)


def place_relation(parts: Sequence[RecordStates], *, distance: float, cosine: float) -> Tensor:
    """Relations among records at the same cell, averaged over cells that two records or more have.

    Args:
        parts, distance, cosine: as of `answer_relation`.
    """
    cell_C4 = torch.cat([part.cell_C4 for part in parts]).unique(dim=0) if len(parts) > 1 else None
    if cell_C4 is not None:
        parts = [part.among(cell_C4) for part in parts]
    student_RCD, teacher_RCE, mask_RC = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("student_RCD", "teacher_RCE", "mask_RC")
    )
    return relation_loss(
        student_RCD.transpose(0, 1), teacher_RCE.transpose(0, 1), mask_RC.T, distance=distance, cosine=cosine
    )


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
