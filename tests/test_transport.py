"""The transport term against POT, plain loops, its invariances, and its gradient."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch
from torch.testing import assert_close

from evlecg.losses.transport import (
    overlap_area,
    page_cost,
    plan_diagnostics,
    token_lead,
    transport_loss,
    transport_plan,
)

DEFAULTS = {"epsilon": 0.05, "steps": 50}


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def grid_boxes(side: int) -> torch.Tensor:
    """Boxes of a side x side grid over the page, [1, side^2, 4]."""
    cells = [(x, y, x + 1, y + 1) for y in range(side) for x in range(side)]
    return torch.tensor(cells, dtype=torch.float64)[None] / side


def page_tokens(n_side: int, m_side: int, *, width: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Two samples of tokens that vary smoothly over the page, plus noise: what makes plain Sinkhorn slow."""
    waves, mix = seeded(2, 2, 16, seed=1) * 6, seeded(16, width, seed=2) / 4

    def field(side: int, seed: int) -> torch.Tensor:
        centre = (grid_boxes(side)[..., :2] + grid_boxes(side)[..., 2:]) / 2
        return torch.sin(centre @ waves) @ mix + 0.05 * seeded(2, side * side, width, seed=seed)

    return field(n_side, 3), field(m_side, 4)


def mean_cost(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    cost = (teacher[:, :, None] - student[:, None]).square().sum(-1)
    return cost / cost.mean((1, 2), keepdim=True)


@pytest.mark.parametrize(("n", "m"), [(40, 24), (24, 40)])
@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_plan_agrees_with_pot(n: int, m: int, epsilon: float) -> None:
    cost = mean_cost(seeded(2, n, 8), seeded(2, m, 8, seed=1))
    plan = transport_plan(cost * 7, ones(2, n), ones(2, m), epsilon=epsilon, steps=50)
    for ours, c in zip(plan, cost, strict=True):
        theirs = ot.sinkhorn([], [], c.numpy(), epsilon, method="sinkhorn_log", numItermax=50_000, stopThr=1e-13)
        # relative to the largest entry of its kind: 1e-6 absolute would be loose where entries are 1/(n m)
        np.testing.assert_allclose(ours.numpy() * n * m, theirs * n * m, atol=1e-6, rtol=1e-6)


def test_plain_iterations_are_sinkhorn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evlecg.losses.transport.NEWTON_STEPS", 0)
    cost = mean_cost(seeded(1, 12, 4), seeded(1, 9, 4, seed=1))
    ours = transport_plan(cost, ones(1, 12), ones(1, 9), epsilon=0.05, steps=25)[0]
    kernel = torch.exp(-cost[0] / 0.05)
    # the solver starts from the c-transforms as potentials, hence from exp of the columns' one
    row = cost[0].amin(1, keepdim=True)
    v = torch.exp((cost[0] - row).amin(0) / 0.05)
    for _ in range(25):
        u = 1 / 12 / (kernel @ v)
        v = 1 / 9 / (kernel.T @ u)
    u = 1 / 12 / (kernel @ v)
    assert_close(ours, u[:, None] * kernel * v)


@pytest.mark.parametrize("extra", [False, True])
def test_marginals_hold_at_the_defaults_in_float32(extra: bool) -> None:
    teacher, student = page_tokens(24, 16)
    lead_t, lead_s = (torch.arange(n * n)[None] // (n * n // 4) for n in (24, 16))
    cost = mean_cost(teacher, student)
    if extra:
        cost = cost + page_cost(grid_boxes(24), grid_boxes(16), lead_t, lead_s, position=1.0, lead=0.5)
    plan = transport_plan(cost.float(), ones(2, 576), ones(2, 256), **DEFAULTS)
    error = (plan.sum(2) - 1 / 576).abs().sum(1) + (plan.sum(1) - 1 / 256).abs().sum(1)
    assert float(error.max()) < 1e-4


@pytest.mark.parametrize("epsilon", [1e-3, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_small_epsilon_stays_finite_and_sums_to_one(epsilon: float, dtype: torch.dtype) -> None:
    teacher, student = page_tokens(9, 6)
    cost = (mean_cost(teacher, student) * 100).to(dtype)
    plan = transport_plan(cost, ones(2, 81), ones(2, 36), epsilon=epsilon, steps=50)
    assert torch.isfinite(plan).all()
    assert_close(plan.double().sum((1, 2)), torch.ones(2, dtype=torch.float64), atol=1e-4, rtol=0)
    # near the exact optimum; 50 iterations do not close the marginals at the smaller one, so it may lie below
    exact = ot.emd2([], [], cost[0].double().numpy())
    assert float((plan[0] * cost[0]).sum()) == pytest.approx(exact, rel=0.05 if epsilon == 1e-2 else 0.15)


def test_log_domain_takes_over_where_the_kernel_leaves_float_range(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = mean_cost(seeded(1, 30, 4), seeded(1, 20, 4, seed=1))
    expected = transport_plan(cost, ones(1, 30), ones(1, 20), **DEFAULTS)
    monkeypatch.setattr("evlecg.losses.transport._sinkhorn", lambda kernel_NM, iterations: None)
    assert_close(transport_plan(cost, ones(1, 30), ones(1, 20), **DEFAULTS), expected)


def test_plan_is_constant_in_the_gradient() -> None:
    cost = seeded(1, 6, 4).square().requires_grad_()
    assert not transport_plan(cost, ones(1, 6), ones(1, 4), **DEFAULTS).requires_grad


def test_coincident_points_give_the_independent_plan() -> None:
    plan = transport_plan(torch.zeros(1, 6, 4), ones(1, 6), ones(1, 4), **DEFAULTS)
    assert_close(plan, torch.full((1, 6, 4), 1 / 24))


def test_plan_ignores_padding_and_follows_permutations() -> None:
    teacher, student = seeded(2, 10, 5), seeded(2, 7, 5, seed=1)
    teacher_mask, student_mask = ones(2, 10), ones(2, 7)
    teacher_mask[0, 6:], student_mask[1, 4:] = False, False
    cost = mean_cost(teacher, student)
    plan = transport_plan(cost, teacher_mask, student_mask, **DEFAULTS)
    alone = transport_plan(cost[:1, :6], ones(1, 6), ones(1, 7), **DEFAULTS)
    assert_close(plan[0, :6], alone[0])
    assert float(plan[0, 6:].abs().sum()) == 0 and float(plan[1, :, 4:].abs().sum()) == 0
    garbage = cost.masked_fill(~(teacher_mask[:, :, None] & student_mask[:, None]), torch.nan)
    assert_close(transport_plan(garbage, teacher_mask, student_mask, **DEFAULTS), plan)
    n, m = torch.randperm(10), torch.randperm(7)
    shuffled = transport_plan(cost[:, n][:, :, m], teacher_mask[:, n], student_mask[:, m], **DEFAULTS)
    assert_close(shuffled, plan[:, n][:, :, m])


def naive_loss(teacher: torch.Tensor, student: torch.Tensor, plan: np.ndarray) -> float:
    return sum(
        float(plan[i, j]) * float((teacher[i] - student[j]).square().sum())
        for i in range(len(teacher))
        for j in range(len(student))
    )


def test_strict_loss_against_plain_loops_and_pot() -> None:
    teacher, student = seeded(2, 8, 3) + 5, seeded(2, 6, 3, seed=1) + 5
    ours = transport_loss(teacher, student, ones(2, 8), ones(2, 6), **DEFAULTS, strict=True).loss
    expected = []
    for t, s in zip(teacher, student, strict=True):
        cost = (t[:, None] - s[None]).square().sum(-1)
        plan = ot.sinkhorn([], [], (cost / cost.mean()).numpy(), 0.05, numItermax=50_000, stopThr=1e-14)
        expected.append(naive_loss(t, s, plan))
    assert float(ours) == pytest.approx(np.mean(expected), rel=1e-6)


def test_default_loss_is_per_element_normalised_and_steered_by_the_page() -> None:
    teacher, student = seeded(1, 9, 6) * 3 + 1, seeded(1, 4, 6, seed=1)
    lead_t, lead_s = torch.arange(9)[None] % 2, torch.arange(4)[None] % 2
    extra = page_cost(grid_boxes(3), grid_boxes(2), lead_t, lead_s, position=2.0, lead=0.5)
    ours = transport_loss(teacher, student, ones(1, 9), ones(1, 4), **DEFAULTS, extra_cost_BNM=extra).loss
    t, s = ((x[0] - x[0].mean(-1, keepdim=True)) / x[0].var(-1, keepdim=True, correction=0).add(1e-5).sqrt()
            for x in (teacher, student))  # fmt: skip
    cost = (t[:, None] - s[None]).square().sum(-1)
    steering = cost / cost.mean() + extra[0]
    plan = ot.sinkhorn([], [], (steering / steering.mean()).numpy(), 0.05, numItermax=50_000, stopThr=1e-14)
    assert float(ours) == pytest.approx(naive_loss(t, s, plan) / 6, rel=1e-6)


def test_page_cost_by_hand() -> None:
    cost = page_cost(
        torch.tensor([[[0.0, 0.0, 0.2, 0.2]]]),
        torch.tensor([[[0.3, 0.4, 0.5, 0.6], [0.0, 0.0, 0.2, 0.2]]]),
        torch.tensor([[3]]),
        torch.tensor([[3, -1]]),
        position=2.0,
        lead=0.7,
    )
    assert_close(cost, torch.tensor([[[2 * (0.3**2 + 0.4**2), 0.7]]]))


def test_gradient_is_the_envelope_gradient() -> None:
    """With the entropy added, the optimum's own gradient has no term through the plan; strict, without the mean."""
    teacher, student = seeded(1, 5, 3), seeded(1, 4, 3, seed=1).requires_grad_()
    result = transport_loss(teacher, student, ones(1, 5), ones(1, 4), **DEFAULTS, strict=True)
    (gradient,) = torch.autograd.grad(result.loss, student)
    scale = float(result.cost_BNM.mean()) * 0.05  # the absolute epsilon, held fixed below

    def regularised(flat: np.ndarray) -> float:
        moved = torch.from_numpy(flat).reshape(4, 3)
        cost = (teacher[0][:, None] - moved[None]).square().sum(-1).numpy()
        plan = ot.sinkhorn([], [], cost, scale, method="sinkhorn_log", numItermax=100_000, stopThr=1e-15)
        return float((plan * cost).sum() + scale * (plan * np.log(plan)).sum())

    start = student.detach().numpy().ravel()
    steps = np.eye(len(start)) * 1e-5
    numeric = np.array([(regularised(start + h) - regularised(start - h)) / 2e-5 for h in steps])
    np.testing.assert_allclose(gradient.numpy().ravel(), numeric, atol=1e-6)


@pytest.mark.parametrize("strict", [False, True])
def test_gradcheck_with_the_plan_held(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = seeded(2, 5, 3).requires_grad_(), seeded(2, 4, 3, seed=1).requires_grad_()
    teacher_mask, student_mask = ones(2, 5), ones(2, 4)
    student_mask[1, 2:] = False
    plan = transport_loss(teacher, student, teacher_mask, student_mask, **DEFAULTS, strict=strict).plan_BNM
    monkeypatch.setattr("evlecg.losses.transport.transport_plan", lambda *_, **__: plan)
    assert torch.autograd.gradcheck(
        lambda t, s: transport_loss(t, s, teacher_mask, student_mask, **DEFAULTS, strict=strict).loss,
        (teacher, student),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hard_inputs_give_finite_gradients_and_empty_masks_give_zero(dtype: torch.dtype) -> None:
    teacher = torch.zeros(3, 5, 4, dtype=dtype)
    student = torch.zeros(3, 4, 4, dtype=dtype, requires_grad=True)
    teacher_mask, student_mask = ones(3, 5), ones(3, 4)
    teacher_mask[1], student_mask[2] = False, False
    teacher[1] = torch.nan
    result = transport_loss(teacher, student, teacher_mask, student_mask, **DEFAULTS)
    result.loss.backward()
    assert result.loss.dtype == torch.float32
    assert student.grad is not None and torch.isfinite(student.grad).all()
    empty = transport_loss(teacher, student, teacher_mask & False, student_mask, **DEFAULTS).loss
    assert float(empty.detach()) == 0 and empty.requires_grad


def test_loss_averages_over_samples_with_tokens_and_runs_outside_autocast() -> None:
    teacher, student = seeded(3, 6, 4, dtype=torch.float32), seeded(3, 5, 4, seed=1, dtype=torch.float32)
    mask = ones(3, 6)
    mask[1] = False
    with torch.autocast("cpu", dtype=torch.bfloat16):
        together = transport_loss(teacher, student, mask, ones(3, 5), **DEFAULTS).loss
    alone = [transport_loss(teacher[b : b + 1], student[b : b + 1], ones(1, 6), ones(1, 5), **DEFAULTS).loss
             for b in (0, 2)]  # fmt: skip
    assert_close(together, torch.stack(alone).mean())


def test_a_diverged_model_shows_as_nan() -> None:
    student = torch.full((1, 4, 3), torch.nan)
    assert transport_loss(torch.zeros(1, 5, 3), student, ones(1, 5), ones(1, 4), **DEFAULTS).loss.isnan()


def test_extra_cost_is_refused_in_the_published_form() -> None:
    with pytest.raises(ValueError, match="published"):
        x = torch.zeros(1, 2, 3)
        transport_loss(x, x, ones(1, 2), ones(1, 2), **DEFAULTS, strict=True, extra_cost_BNM=torch.zeros(1, 2, 2))


def test_token_lead_takes_the_largest_overlap() -> None:
    cells = torch.tensor([[[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]]])
    boxes = torch.tensor([[[0.1, 0, 0.2, 1], [0.4, 0, 0.8, 1], [0, 0, 0, 0], [0.6, 0, 0.7, 1]]])
    mask = torch.tensor([[True, True, True, False]])
    assert token_lead(boxes, mask, cells, torch.tensor([7, 3])).tolist() == [[7, 3, -1, -1]]
    assert token_lead(boxes, mask, cells[:, :0], torch.tensor([], dtype=torch.long)).tolist() == [[-1] * 4]
    assert_close(overlap_area(boxes, cells)[0, 1], torch.tensor([0.1, 0.3]))


def test_plan_diagnostics_by_hand() -> None:
    lead = torch.tensor([[0, 0, 1, 1]])
    hard = plan_diagnostics(torch.eye(4)[None] / 4, ones(1, 4), ones(1, 4), lead, lead)
    loose = plan_diagnostics(torch.full((1, 4, 4), 1 / 16), ones(1, 4), ones(1, 4), lead, lead)
    assert hard == pytest.approx({"ot_entropy": 0, "ot_marginal_error": 0, "ot_mass_in_lead": 1}, abs=1e-6)
    assert loose == pytest.approx({"ot_entropy": 1, "ot_marginal_error": 0, "ot_mass_in_lead": 0.5}, abs=1e-6)
    short = plan_diagnostics(torch.eye(4)[None] / 8, ones(1, 4), ones(1, 4), lead, lead - 9)
    assert short["ot_marginal_error"] == pytest.approx(1.0) and "ot_mass_in_lead" not in short
    assert plan_diagnostics(torch.zeros(1, 4, 4), ones(1, 4) & False, ones(1, 4), lead, lead) == {}
