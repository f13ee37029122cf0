"""Geometric relations against plain loops, their invariances, and their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from evlecg.losses.relation import cosine_relation, distance_relation, page_grid, pool_to_cells, relation_loss


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def naive_relations(tokens: list[list[float]]) -> tuple[list[list[float]], list[list[float]]]:
    """Distances over their mean, and cosines, of plain lists."""
    n = len(tokens)
    distance = [[math.dist(tokens[i], tokens[j]) for j in range(n)] for i in range(n)]
    mean = sum(distance[i][j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    length = [math.hypot(*token) for token in tokens]
    cosine = [
        [sum(x * y for x, y in zip(tokens[i], tokens[j], strict=True)) / (length[i] * length[j]) for j in range(n)]
        for i in range(n)
    ]
    return [[d / mean for d in row] for row in distance], cosine


def test_relations_against_plain_loops() -> None:
    tokens = seeded(2, 5, 3) + 10
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    for b, n in ((0, 5), (1, 3)):
        distance, cosine = naive_relations(tokens[b, :n].tolist())
        assert_close(distance_relation(tokens, mask)[b, :n, :n], torch.tensor(distance, dtype=torch.float64))
        assert_close(cosine_relation(tokens, mask)[b, :n, :n], torch.tensor(cosine, dtype=torch.float64))
    assert float(distance_relation(tokens, mask)[1, 3:].abs().sum()) == 0


def test_loss_against_plain_loops() -> None:
    student, target = seeded(2, 4, 3), seeded(2, 4, 6, seed=1)
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[1, 3:] = False
    expected = []
    for b, n in ((0, 4), (1, 3)):
        ours, theirs = naive_relations(student[b, :n].tolist()), naive_relations(target[b, :n].tolist())
        terms = [sum((ours[k][i][j] - theirs[k][i][j]) ** 2 for i in range(n) for j in range(n)) / n**2 for k in (0, 1)]
        expected.append((terms[0] + terms[1]) / 2)
    assert float(relation_loss(student, target, mask)) == pytest.approx(sum(expected) / 2)
    only = relation_loss(student[:1], target[:1], mask[:1], distance=2.0, cosine=0.0)
    ours, theirs = naive_relations(student[0].tolist())[0], naive_relations(target[0].tolist())[0]
    assert float(only) == pytest.approx(
        2 * sum((ours[i][j] - theirs[i][j]) ** 2 for i in range(4) for j in range(4)) / 16
    )


def test_identical_rotated_and_scaled_features_cost_nothing() -> None:
    student = seeded(2, 7, 5)
    rotation, _ = torch.linalg.qr(seeded(8, 5, seed=2))
    mask = torch.ones(2, 7, dtype=torch.bool)
    assert float(relation_loss(student, student, mask)) == 0
    assert_close(relation_loss(student, 3 * student @ rotation.T, mask), torch.zeros((), dtype=torch.float64))
    assert float(relation_loss(student, seeded(2, 7, 5, seed=3), mask)) > 0.1


def test_loss_ignores_padding_and_order() -> None:
    student, target = seeded(2, 6, 3), seeded(2, 6, 4, seed=1)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 4:] = False
    loss = relation_loss(student, target, mask)
    dirty = student.masked_fill(~mask[..., None], torch.nan)
    assert_close(relation_loss(dirty, target, mask), loss)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    assert_close(relation_loss(student[:, order], target[:, order], mask[:, order]), loss)
    single = [
        relation_loss(student[:1, :4], target[:1, :4], mask[:1, :4]),
        relation_loss(student[1:], target[1:], mask[1:]),
    ]
    assert_close(torch.stack(single).mean(), loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["zero", "coincident", "tiny", "one"])
def test_gradients_are_finite(kind: str, dtype: torch.dtype) -> None:
    tokens = seeded(2, 6, 4, dtype=torch.float32)
    mask = torch.ones(2, 6, dtype=torch.bool)
    if kind == "zero":
        tokens[0] = 0
        tokens[1, 2] = 0
    elif kind == "coincident":
        tokens[:] = tokens[:, :1]
    elif kind == "tiny":
        tokens *= 1e-20
    else:
        mask[:, 1:] = False
    student = tokens.to(dtype).requires_grad_()
    loss = relation_loss(student, seeded(2, 6, 3, seed=1, dtype=torch.float32), mask)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert student.grad is not None and torch.isfinite(student.grad).all()
    assert float(student.grad.abs().max()) < 1e3


def test_gradcheck() -> None:
    student, target = seeded(2, 5, 3).requires_grad_(), seeded(2, 5, 4, seed=1).requires_grad_()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    assert torch.autograd.gradcheck(lambda s, t: relation_loss(s, t, mask), (student, target))


def test_empty_mask_gives_zero_on_the_graph() -> None:
    student = seeded(2, 5, 3).requires_grad_()
    loss = relation_loss(student, seeded(2, 5, 3, seed=1), torch.zeros(2, 5, dtype=torch.bool))
    assert float(loss.detach()) == 0 and loss.requires_grad
    loss.backward()


def test_large_common_component_does_not_drown_distances() -> None:
    tokens = seeded(1, 30, 16, dtype=torch.float32)
    mask = torch.ones(1, 30, dtype=torch.bool)
    assert_close(distance_relation(tokens + 500, mask), distance_relation(tokens, mask), atol=1e-3, rtol=1e-3)


def test_pooling_against_plain_loops() -> None:
    tokens = seeded(1, 4, 3)
    boxes = torch.tensor([[[0, 0, 0.5, 0.5], [0.25, 0, 0.75, 1], [0.75, 0.5, 1, 1], [0, 0, 1, 1]]]).double()
    mask = torch.tensor([[True, True, True, False]])
    cells = torch.tensor([[[0, 0, 0.5, 1], [0.5, 0, 1, 1], [0, 0.6, 0.2, 1], [0.1, 0.1, 0.1, 0.1]]]).double()
    pooled, covered = pool_to_cells(tokens, boxes, mask, cells)
    for c, cell in enumerate(cells[0].tolist()):
        areas = []
        for box, valid in zip(boxes[0].tolist(), mask[0].tolist(), strict=True):
            width, height = min(box[2], cell[2]) - max(box[0], cell[0]), min(box[3], cell[3]) - max(box[1], cell[1])
            areas.append(max(width, 0) * max(height, 0) * valid)
        assert bool(covered[0, c]) == (sum(areas) > 0)
        mean = (
            sum(a * t for a, t in zip(areas, tokens[0], strict=True)) / sum(areas) if sum(areas) else 0 * tokens[0, 0]
        )
        assert_close(pooled[0, c], mean)
    assert covered.tolist() == [[True, True, False, False]]


@pytest.mark.parametrize(("edge", "covers"), [(0.5000001, False), (0.5015, True)])
def test_a_sliver_from_rounding_does_not_cover_a_cell(edge: float, covers: bool) -> None:
    boxes = torch.tensor([[[0.0, 0.0, edge, 1.0]]])
    _, covered = pool_to_cells(torch.ones(1, 1, 2), boxes, torch.ones(1, 1, dtype=torch.bool), page_grid(2, like=boxes))
    assert covered.tolist() == [[True, covers, True, covers]]


def test_a_sample_with_one_token_has_no_relations_and_no_share_in_the_mean() -> None:
    student, target = seeded(2, 4, 3), seeded(2, 4, 3, seed=1)
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[1, 1:] = False
    assert_close(relation_loss(student, target, mask), relation_loss(student[:1], target[:1], mask[:1]))


def test_page_grid_reads_row_by_row() -> None:
    grid = page_grid(2, like=torch.zeros(1))
    expected = [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]]
    assert_close(grid, torch.tensor([expected]))


def test_pooling_a_finer_grid_of_the_same_picture_gives_the_same_relations() -> None:
    coarse = seeded(1, 16, 5)
    fine = coarse.unflatten(1, (4, 4)).repeat_interleave(3, 1).repeat_interleave(3, 2).flatten(1, 2)
    cells = page_grid(4, like=coarse)
    pooled = [
        pool_to_cells(x, page_grid(side, like=coarse), torch.ones(1, side**2, dtype=torch.bool), cells)
        for x, side in ((coarse, 4), (fine, 12))
    ]
    assert_close(pooled[0][0], pooled[1][0])
    loss = relation_loss(pooled[0][0], pooled[1][0], pooled[0][1] & pooled[1][1])
    assert_close(loss, torch.zeros_like(loss))
