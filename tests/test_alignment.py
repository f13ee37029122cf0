"""The alignment term: masks by hand, attention and losses against plain loops, who moves, and collapse seen."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from evlecg.losses.alignment import (
    CrossAligner,
    alignment_loss,
    cross_causal_mask,
    position_bias,
    strict_alignment_loss,
    variance_share,
    visible_mask,
    visual_states,
)
from evlecg.schema import Side


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Head(nn.Linear):
    """An output head as the losses see one: states and the side that they belong to."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__(width, vocabulary, bias=False)

    def forward(self, states_AD: Tensor, side: Side) -> Tensor:
        return super().forward(states_AD)


def make_side(
    block: list[list[int]],
    byte_end: list[list[int]],
    visual: list[list[int]],
    boxes: Tensor,
    *,
    answers: list[tuple[int, int]] | None = None,
    cells: Tensor | None = None,
) -> Side:
    """A half of a batch from hand-written rows; `block` is -1 on padding, `boxes` [B, N, 4]."""
    block_BS = torch.tensor(block)
    vocabulary = torch.Generator().manual_seed(block_BS.numel())
    return Side(
        inputs={},
        valid_BS=block_BS >= 0,
        block_BS=block_BS,
        byte_end_BS=torch.tensor(byte_end),
        answer_A2=torch.tensor(answers or [], dtype=torch.long).reshape(-1, 2),
        answer_ids_A=torch.randint(0, 11, (len(answers or []),), generator=vocabulary),
        visual_BS=torch.tensor(visual).bool(),
        visual_box_BN4=boxes,
        visual_mask_BN=(boxes[..., 2:] > boxes[..., :2]).all(-1),
        cell_box_BC4=boxes[:, :0] if cells is None else cells,
    )


NO_BOXES = torch.zeros(1, 0, 4)


def test_cross_causal_mask_by_hand() -> None:
    # student: BOS image | "q1" "ye" "s" | "q2" "no" | pad     teacher: BOS | "q1" "y" "es" "</s>" | "q2" "n" "o"
    student = make_side([[0, 0, 1, 1, 1, 2, 2, -1]], [[0, 0, 0, 2, 3, 0, 2, 0]], [[0, 1, 0, 0, 0, 0, 0, 0]], NO_BOXES)
    teacher = make_side([[0, 1, 1, 1, 1, 2, 2, 2]], [[0, 0, 1, 3, 3, 0, 1, 2]], [[0] * 8], NO_BOXES)
    expected = [
        [1, 0, 0, 0, 0, 0, 0, 0],  # prefix: the prefix
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],  # question 1, nothing of its answer read
        [1, 1, 1, 0, 0, 0, 0, 0],  # "ye": "y", not "es"
        [1, 1, 1, 1, 1, 0, 0, 0],  # "yes": all of it
        [1, 0, 0, 0, 0, 1, 0, 0],  # question 2 sees nothing of question 1
        [1, 0, 0, 0, 0, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 0],  # padding
    ]
    assert cross_causal_mask(student, teacher)[0].int().tolist() == expected
    assert visible_mask(student, teacher)[0].int().tolist() == [[1] * 8] * 7 + [[0] * 8]
    # padding on the teacher's side is never seen, not even from padding
    assert cross_causal_mask(teacher, student)[0, :, 7].any().item() is False


def test_position_bias_by_hand() -> None:
    nowhere = [0.0, 0.0, 0.0, 0.0]
    student = make_side(
        [[0, 0, 0], [0, 0, 0]],
        [[0] * 3] * 2,
        [[0, 1, 1], [1, 0, 0]],
        torch.tensor([[[0, 0, 0.2, 0.2], nowhere], [[0.5, 0.5, 0.7, 0.7], nowhere]]),
    )
    teacher = make_side(
        [[0, 0], [0, 0]],
        [[0] * 2] * 2,
        [[1, 0], [0, 1]],
        torch.tensor([[[0.4, 0.3, 0.6, 0.5]], [[0.5, 0.5, 0.7, 0.7]]]),
    )
    bias = position_bias(student, teacher, weight=2.0)
    expected = torch.zeros(2, 3, 2)
    expected[0, 1, 0] = -2 * (0.4**2 + 0.3**2)  # the only pair apart; the second token sees no page
    assert_close(bias, expected)
    text = make_side([[0, 0], [0, 0]], [[0] * 2] * 2, [[0, 0]] * 2, torch.zeros(2, 0, 4))
    assert_close(position_bias(student, text, weight=2.0), torch.zeros(2, 3, 2))


def test_aligner_against_plain_loops() -> None:
    torch.manual_seed(0)
    aligner = CrossAligner(6, 5, heads=2, normalise=False).double()
    student, teacher, bias = seeded(2, 3, 6), seeded(2, 4, 5, seed=1), seeded(2, 3, 4, seed=2)
    visible = seeded(2, 3, 4, seed=3) > 0
    visible[0, 1] = False
    aligner.requires_grad_(False)
    aligned = aligner(student, teacher, visible, bias)
    for b in range(2):
        for s in range(3):
            seen = [t for t in range(4) if visible[b, s, t]]
            if not seen:
                assert float(aligned[b, s].abs().sum()) == 0
                continue
            parts = []
            for head in (slice(0, 3), slice(3, 6)):
                query = aligner.query.weight[head] @ student[b, s]
                logits = [
                    (query @ (aligner.key.weight[head] @ teacher[b, t])).item() / math.sqrt(3) + float(bias[b, s, t])
                    for t in seen
                ]
                share = torch.tensor(logits, dtype=torch.float64).softmax(0)
                parts.append(
                    sum(w * (aligner.value.weight[head] @ teacher[b, t]) for w, t in zip(share, seen, strict=True))
                )
            assert_close(aligned[b, s], aligner.out.weight @ torch.cat(parts))
    assert not visible[0, 1].any()  # the case was met


def test_aligner_never_reads_what_is_not_visible() -> None:
    torch.manual_seed(0)
    aligner = CrossAligner(8, 6, heads=2, normalise=True)
    student, teacher = seeded(1, 3, 8, dtype=torch.float32), seeded(1, 4, 6, seed=1, dtype=torch.float32)
    visible = torch.tensor([[[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]]).bool()
    clean = aligner(student, teacher, visible)
    student[0, 2], teacher[0, 3] = torch.nan, torch.nan  # padding may hold anything
    student.requires_grad_()
    dirty = aligner(student, teacher, visible)
    assert_close(dirty, clean)
    dirty.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in aligner.parameters() if p.grad is not None)
    assert student.grad is not None and torch.isfinite(student.grad).all()
    changed = teacher.clone()
    changed[0, 2] += seeded(6, seed=2, dtype=torch.float32)  # a constant would be normalised away
    assert_close(aligner(student, changed, visible)[0, 0], clean[0, 0])
    assert (aligner(student, changed, visible)[0, 1] - clean[0, 1]).abs().max().item() > 1e-3


def test_aligner_follows_permutations_and_single_samples() -> None:
    torch.manual_seed(0)
    aligner = CrossAligner(8, 6, heads=4, normalise=True).double()
    student, teacher, visible = seeded(2, 5, 8), seeded(2, 7, 6, seed=1), seeded(2, 5, 7, seed=2) > -0.5
    whole, order = aligner(student, teacher, visible), torch.randperm(7)
    assert_close(aligner(student, teacher[:, order], visible[:, :, order]), whole)
    assert_close(aligner(student[1:], teacher[1:], visible[1:]), whole[1:])


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        CrossAligner(10, 4, heads=4, normalise=True)


def test_strict_loss_against_plain_loops() -> None:
    student, aligned = seeded(2, 3, 4), seeded(2, 3, 4, seed=1)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    expected = sum(
        float((student[b, s, d] - aligned[b, s, d]) ** 2)
        for b in range(2) for s in range(3) for d in range(4) if mask[b, s]
    ) / 4  # fmt: skip
    assert float(strict_alignment_loss(student, aligned, mask)) == pytest.approx(expected)
    full = torch.ones(2, 3, dtype=torch.bool)  # without padding: the published 1/(B*S)
    assert float(strict_alignment_loss(student, aligned, full)) == pytest.approx(
        float((student - aligned).square().sum()) / (2 * 3)
    )


@pytest.mark.parametrize("normalise", [False, True])
def test_default_loss_against_plain_loops(normalise: bool) -> None:
    student, aligned = seeded(2, 3, 4) * 3, seeded(2, 3, 4, seed=1)
    mask = torch.tensor([[True, True, True], [True, False, False]])

    def norm(token: Tensor) -> list[float]:
        values = token.tolist()
        mean = sum(values) / 4
        scale = math.sqrt(sum((v - mean) ** 2 for v in values) / 4 + 1e-5)
        return [(v - mean) / scale for v in values] if normalise else values

    terms = [
        sum((x - y) ** 2 for x, y in zip(norm(student[b, s]), norm(aligned[b, s]), strict=True)) / 4
        for b in range(2) for s in range(3) if mask[b, s]
    ]  # fmt: skip
    loss = alignment_loss(student, aligned, mask, mask & False, normalise=normalise)
    assert float(loss) == pytest.approx(sum(terms) / 4)
    padded = [x.masked_fill(~mask[..., None], torch.nan) for x in (student, aligned)]
    assert_close(alignment_loss(*padded, mask, mask, normalise=normalise), loss)


def test_who_moves() -> None:
    student, aligned = seeded(1, 3, 4).requires_grad_(), seeded(1, 3, 4, seed=1).requires_grad_()
    mask, anchored = torch.tensor([[True, True, False]]), torch.tensor([[False, True, False]])
    alignment_loss(student, aligned, mask, anchored, normalise=True).backward()
    assert student.grad is not None and aligned.grad is not None
    moves = [[bool(x.grad[0, s].abs().sum() > 0) for s in range(3)] for x in (student, aligned) if x.grad is not None]
    assert moves == [[True, True, False], [True, False, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_masks_and_zero_states_are_finite(dtype: torch.dtype) -> None:
    student = torch.zeros(2, 3, 4, dtype=dtype, requires_grad=True)
    aligned = torch.zeros(2, 3, 4, dtype=dtype, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    for mask_BS in (mask, mask & False):
        default = alignment_loss(student, aligned, mask_BS, mask & False, normalise=True)
        total = default + strict_alignment_loss(student, aligned, mask_BS)
        assert total.dtype == torch.float32 and float(total.detach()) == 0
        total.backward()
        assert all(x.grad is not None and torch.isfinite(x.grad).all() for x in (student, aligned))


def test_visual_states_keep_their_order() -> None:
    side = make_side([[0] * 5] * 2, [[0] * 5] * 2, [[0, 1, 0, 1, 1], [1, 0, 0, 1, 0]], torch.zeros(2, 3, 4))
    states = torch.arange(10.0).reshape(2, 5, 1)
    found = visual_states(states, side)[..., 0]
    assert found[0].tolist() == [1, 3, 4] and found[1, :2].tolist() == [5, 8]


def test_variance_share_tells_collapsed_from_alive() -> None:
    position = seeded(1, 6, 3)
    mask = torch.ones(4, 6, dtype=torch.bool)
    assert variance_share(position.expand(4, -1, -1), mask) == pytest.approx(0, abs=1e-12)
    sample = seeded(4, 1, 3, seed=1).expand(-1, 6, -1)
    assert variance_share(sample, mask) == pytest.approx(1)
    share = variance_share(position + sample, mask)
    assert share is not None and 0.2 < share < 0.8
    padded = torch.cat([position + sample, torch.full((4, 2, 3), torch.nan)], 1)
    assert variance_share(padded, torch.cat([mask, torch.zeros(4, 2, dtype=torch.bool)], 1)) == pytest.approx(share)
    assert variance_share(sample[:1], mask[:1]) is None
    assert variance_share(torch.ones(4, 6, 3), mask) is None
