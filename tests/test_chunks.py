"""Losses taken a few rows at a time: the same numbers and gradients, without the whole vocabulary at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from evlecg.losses import chunks
from evlecg.losses.alignment import predicting_positions
from evlecg.losses.baselines import BASELINES
from evlecg.losses.chunks import summed
from evlecg.losses.terms import answer_cross_entropy, frozen_reading
from evlecg.schema import AnswerLogits
from tests.test_alignment import Head, make_side, seeded
from tests.test_baselines import VOCABULARY, build, pair, run
from tests.test_objective import make_batch


def test_anchor_reads_the_head_before_each_answer_token_and_leaves_it_alone() -> None:
    torch.manual_seed(0)
    head = Head(4, 11).double()
    side = make_side([[0, 1, 1, 1]] * 2, [[0, 0, 2, 3]] * 2, [[0] * 4] * 2, torch.zeros(2, 0, 4),
                     answers=[(0, 2), (0, 3), (1, 2)])  # fmt: skip
    aligned = seeded(2, 4, 4).requires_grad_()
    rows, places = side.answer_A2.unbind(1)
    logits = frozen_reading(aligned[rows, places - 1], side, head).rows(slice(None))
    assert_close(logits, torch.stack([F.linear(aligned[row, at], head.weight) for row, at in ((0, 1), (0, 2), (1, 1))]))
    logits.square().sum().backward()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in head.parameters())
    assert aligned.grad is not None
    assert (aligned.grad.abs().sum(-1) > 0).int().tolist() == [[0, 1, 1, 0], [0, 1, 0, 0]]
    assert predicting_positions(side).int().tolist() == [[0, 1, 1, 0], [0, 1, 0, 0]]
    narrow = frozen_reading(aligned.float()[rows, places - 1], side, head.bfloat16())
    assert narrow.rows(slice(None)).dtype == torch.bfloat16


@pytest.fixture(autouse=True)
def any_number_of_rows_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "FEW_ROWS", 0)


def readings(states: Tensor, head: nn.Linear, asked: list[int]) -> AnswerLogits:
    def read(states_RD: Tensor, rows_R: Tensor | slice) -> Tensor:
        asked.append(len(states_RD))
        return head(states_RD)

    return AnswerLogits(states, read)


@pytest.mark.parametrize("rows_at_once", [1, 3, 7, 8, 100])
def test_chunked_cross_entropy_is_the_unchunked(monkeypatch: pytest.MonkeyPatch, rows_at_once: int) -> None:
    torch.manual_seed(0)
    head = nn.Linear(5, 13)
    targets = torch.randint(13, (8,))
    states = torch.randn(8, 5, requires_grad=True)
    expected = F.cross_entropy(head(states), targets)
    wanted = torch.autograd.grad(expected, (states, head.weight))
    monkeypatch.setattr(chunks, "CHUNK_BYTES", rows_at_once * 13 * 4)
    asked: list[int] = []
    found = answer_cross_entropy(readings(states, head, asked), targets)
    assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert_close(torch.autograd.grad(found, (states, head.weight)), wanted, atol=1e-6, rtol=1e-5)
    assert max(asked) == min(rows_at_once, 8)
    once = rows_at_once >= 8
    assert sum(asked) == (1 + 8 if once else 1 + 8 + 8), "one look at the width; twice the rows only where chunked"


def test_chunks_begin_where_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 3 * 2 * 4)
    starts = torch.tensor([1, 0, 1, 1, 0, 0, 0, 1, 0, 1]).bool()
    seen: list[list[int]] = []

    def term(logits: Tensor, place: Tensor) -> Tensor:
        seen.append(place.tolist())
        return logits.sum()

    logits = AnswerLogits(torch.ones(10, 2))
    total = summed(term, [logits], [torch.arange(10)], torch.arange(10), starts=starts)
    assert float(total) == 20
    assert seen == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9]]


@pytest.mark.parametrize("name", sorted(set(BASELINES) - {"minilm", "rkd", "feature", "em_kd"}))
def test_every_term_over_a_vocabulary_is_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    batch = make_batch(rows=8)
    objective = build(name)

    def told() -> tuple[dict[str, Tensor], list[Tensor]]:
        student, teacher = pair(batch)
        terms, _ = run(name, batch, objective=objective, pair_of=(student, teacher))
        leaves = [student.hidden_BSD, student.answer_logits.states_AD]
        found = torch.autograd.grad(terms.total, leaves, allow_unused=True)
        return terms.values, [torch.zeros(1) if g is None else g for g in found]

    whole, whole_gradients = told()
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 3 * 2 * VOCABULARY * 4)
    cut, cut_gradients = told()
    assert_close(cut, whole, atol=1e-6, rtol=1e-5)
    assert_close(cut_gradients, whole_gradients, atol=1e-6, rtol=1e-4)


class Largest(TorchDispatchMode):
    """The largest floating-point tensor that any operation gave back."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor) and value.is_floating_point():
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("name", ["ce", "kl"])
def test_nothing_of_the_size_of_all_logits_is_made(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    batch = make_batch(rows=64)
    objective = build(name)
    student, teacher = pair(batch)
    n_answers, width = len(batch.student.answer_A2), 2  # narrow: the logits are what is large
    head, teacher_head = nn.Linear(width, VOCABULARY), nn.Linear(width, VOCABULARY)
    states = torch.randn(n_answers, width, requires_grad=True)
    student = replace(student, answer_logits=readings(states, head, []))
    teacher = replace(teacher, answer_logits=readings(torch.randn(len(teacher.answer_logits), width), teacher_head, []))

    def largest(rows_at_once: int) -> int:
        monkeypatch.setattr(chunks, "CHUNK_BYTES", rows_at_once * 2 * VOCABULARY * 4)
        with Largest() as seen:
            run(name, batch, objective=objective, pair_of=(student, teacher))[0].total.backward()
        return seen.elements

    every = n_answers * VOCABULARY
    assert largest(n_answers) >= every, "the check sees logits where they are made"
    assert largest(8) < every / 2
