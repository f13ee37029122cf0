"""The transport term against POT, plain loops, its invariances, and its gradient."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import ot
import pytest
import torch
from torch.testing import assert_close

from evlecg.errors import EvlecgError
from evlecg.losses.sinkhorn import _Side, _Solver, transport_plan
from evlecg.losses.transport import (
    lead_marginals,
    overlap_area,
    page_cost,
    plan_diagnostics,
    token_lead,
    transport_loss,
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


@pytest.mark.parametrize(("n", "m"), [(12, 9), (9, 12)])
@pytest.mark.parametrize("relax", [None, 0.5])
def test_plain_iterations_are_sinkhorn(n: int, m: int, relax: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The naive twin: loops over the equations, and Newton switched off."""
    monkeypatch.setattr("evlecg.losses.sinkhorn.NEWTON_WIDTH", 0)
    cost = mean_cost(seeded(1, n, 4), seeded(1, m, 4, seed=1))
    ours = transport_plan(cost, ones(1, n), ones(1, m), epsilon=0.05, steps=25, relax=relax)[0]
    c = cost[0].numpy() if n >= m else cost[0].numpy().T  # the smaller side is updated first
    rows, columns = c.shape
    power = 1.0 if relax is None else relax / (relax + 0.05)
    # scalings of the kernel exp(-c / epsilon) a b, with its first potential on the rows: the solver starts there
    u, v = np.ones(rows), np.ones(columns)
    for step in range(25):
        if step:
            for j in range(columns):
                v[j] = sum(u[i] * np.exp(-c[i, j] / 0.05) / rows for i in range(rows)) ** -power
        for i in range(rows):
            u[i] = sum(v[j] * np.exp(-c[i, j] / 0.05) / columns for j in range(columns)) ** -power
    expected = u[:, None] * np.exp(-c / 0.05) * v / (rows * columns)
    np.testing.assert_allclose(ours.numpy() if n >= m else ours.numpy().T, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("relax", [0.02, 0.3, 5.0])
@pytest.mark.parametrize(("n", "m"), [(40, 24), (24, 40)])
def test_relaxed_plan_agrees_with_pot(n: int, m: int, relax: float) -> None:
    cost = mean_cost(seeded(2, n, 8), seeded(2, m, 8, seed=1))
    a, b = seeded(2, n, seed=2).exp(), seeded(2, m, seed=3).exp()
    a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    plan = transport_plan(cost * 7, ones(2, n), ones(2, m), epsilon=0.05, steps=100, relax=relax, a_BN=a, b_BM=b)
    for ours, c, a_n, b_m in zip(plan.numpy(), cost.numpy(), a.numpy(), b.numpy(), strict=True):
        theirs = ot.unbalanced.sinkhorn_unbalanced(
            a_n, b_m, c, 0.05, relax, reg_type="kl", numItermax=100_000, stopThr=1e-14
        )
        np.testing.assert_allclose(ours * n * m, theirs * n * m, atol=1e-6, rtol=1e-6)
        assert (ours * c).sum() == pytest.approx((theirs * c).sum(), abs=1e-6)
        assert theirs.sum() < 0.995


def test_marginals_and_masks_agree_with_pot() -> None:
    cost = mean_cost(seeded(1, 30, 8), seeded(1, 20, 8, seed=1))
    a, b = seeded(1, 30, seed=2).exp(), seeded(1, 20, seed=3).exp()
    a[0, 3], b[0, 5:7] = 0, 0  # without mass a token is as if it were masked
    mask = ones(1, 20)
    mask[0, 11] = False
    plan = transport_plan(cost, ones(1, 30), mask, epsilon=0.05, steps=100, a_BN=a, b_BM=b)[0].numpy()
    rows, columns = a[0] > 0, (b[0] > 0) & mask[0]
    c = cost[0][rows][:, columns]
    a_n, b_m = a[0][rows] / a[0][rows].sum(), b[0][columns] / b[0][columns].sum()
    theirs = ot.sinkhorn(a_n.numpy(), b_m.numpy(), (c / c.mean()).numpy(), 0.05, numItermax=50_000, stopThr=1e-14)
    np.testing.assert_allclose(plan[np.ix_(rows, columns)], theirs, atol=1e-9)
    assert plan.sum() == pytest.approx(theirs.sum()) and (plan[3] == 0).all() and (plan[:, 11] == 0).all()


def blocks(n: int, m: int) -> torch.Tensor:
    """Costs of two groups that hardly exchange mass: hard."""
    n_group, m_group = torch.arange(n) >= n // 3, torch.arange(m) >= m // 3
    cost = mean_cost(seeded(1, n, 8), seeded(1, m, 8, seed=1)) + 0.7 * (n_group[:, None] != m_group[None])
    return cost / cost.mean()


@pytest.mark.parametrize(("n", "m"), [(240, 24), (60, 40)])  # the first estimates Newton's matrix from every 5th row
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_newton_closes_marginals_where_sinkhorn_does_not(n: int, m: int, dtype: torch.dtype) -> None:
    cost = blocks(n, m).to(dtype)
    plan = transport_plan(cost, ones(1, n), ones(1, m), epsilon=0.05, steps=20)[0]
    error = float((plan.sum(0) - 1 / m).abs().sum() + (plan.sum(1) - 1 / n).abs().sum())
    assert error < (1e-4 if dtype == torch.float32 else 1e-9)
    kernel = torch.exp(-cost[0].double() / 0.05)
    v = torch.ones(m, dtype=torch.float64)
    for _ in range(50):
        u = 1 / n / (kernel @ v)
        v = 1 / m / (kernel.T @ u)
    assert float((u * (kernel @ v) - 1 / n).abs().sum()) > 1e-3


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 15, 50])
def test_rows_hold_after_any_number_of_steps(steps: int) -> None:
    plan = transport_plan(blocks(60, 40), ones(1, 60), ones(1, 40), epsilon=0.005, steps=steps)[0]
    assert_close(plan.sum(1), torch.full((60,), 1 / 60, dtype=torch.float64), rtol=1e-9, atol=0)


def test_threads_change_nothing() -> None:
    cost = mean_cost(*page_tokens(9, 6)).float().repeat(2, 1, 1)
    threads = torch.get_num_threads()
    plans = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            plans.append(transport_plan(cost.requires_grad_(), ones(4, 81), ones(4, 36), **DEFAULTS))
            assert torch.get_num_threads() == count
            with ThreadPoolExecutor(1) as pool:  # nor for threads to come
                assert pool.submit(torch.get_num_threads).result() == count
    finally:
        torch.set_num_threads(threads)
    for plan in plans[1:]:
        assert_close(plan, plans[0])
    assert not plans[1].requires_grad


def test_what_a_thread_raises_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    threads = torch.get_num_threads()
    monkeypatch.setattr("evlecg.losses.sinkhorn._solve_into", fail)
    try:
        torch.set_num_threads(2)
        with pytest.raises(MemoryError):
            transport_plan(torch.ones(2, 3, 3), ones(2, 3), ones(2, 3), **DEFAULTS)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


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


@pytest.mark.parametrize("relax", [None, 0.5])
def test_absorbing_potentials_changes_nothing(relax: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    cost, masks = mean_cost(seeded(1, 30, 4), seeded(1, 20, 4, seed=1)) - 1.5, (ones(1, 30), ones(1, 20))
    cost = cost / cost.mean().abs() + 2
    expected = transport_plan(cost, *masks, **DEFAULTS, relax=relax)
    monkeypatch.setattr("evlecg.losses.sinkhorn._kernel_range", lambda dtype: 1.0)  # c-transforms, then every look
    monkeypatch.setattr("evlecg.losses.sinkhorn.CHECK", 1)
    assert_close(transport_plan(cost, *masks, epsilon=0.05, steps=200, relax=relax), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("relax", [None, 0.5])
def test_log_domain_takes_over_where_sums_underflow(relax: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    cost, masks = mean_cost(seeded(1, 12, 4), seeded(1, 9, 4, seed=1)), (ones(1, 12), ones(1, 9))
    cost[0, :3] += 2.0
    options = {"epsilon": 0.01, "steps": 300, "relax": relax}
    expected = transport_plan(cost, *masks, **options)
    calls: list[int] = []
    iterate_log = _Solver._iterate_log

    def counted(self: _Solver, iterations: int) -> None:
        calls.append(iterations)
        iterate_log(self, iterations)

    monkeypatch.setattr(_Solver, "_iterate_log", counted)
    # without the first look at the range the kernel is exp((min - C) / epsilon), with rows of zeros in float32
    looks = iter([math.inf])
    monkeypatch.setattr("evlecg.losses.sinkhorn._kernel_range", lambda dtype: next(looks, 1e20))
    plan = transport_plan(cost.float(), *masks, **options)
    assert calls
    assert float((plan * cost).sum()) == pytest.approx(float((expected * cost).sum()), rel=1e-3)
    assert_close(plan.sum(2), expected.sum(2).float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("slack", [0.0, 0.4])
def test_log_domain_fits_what_the_kernel_fits(slack: float) -> None:
    mass, held, log_kernel = seeded(5).softmax(0), seeded(5, seed=1), seeded(5, 4, seed=2)
    side = _Side(mass, held, slack)
    in_log = side.fitted_log(torch.logsumexp(log_kernel, 1))  # of the kernel without what the side holds
    in_kernel = side.absorb(side.fitted((log_kernel + held[:, None]).exp().sum(1)))
    assert_close(in_log.held_N, in_kernel.held_N)
    # the row sums that the fit gives are those that the side asks for
    scaling = side.fitted((log_kernel + held[:, None]).exp().sum(1))
    assert_close(scaling * (log_kernel + held[:, None]).exp().sum(1), side.target(scaling))


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
        plan = ot.sinkhorn([], [], cost, scale, method="sinkhorn_log", numItermax=5_000, stopThr=1e-14)
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
    lead, uniform = torch.tensor([[0, 0, 1, 1]]), torch.full((1, 4), 0.25)
    hard = plan_diagnostics(torch.eye(4)[None] / 4, uniform, uniform, lead, lead)
    loose = plan_diagnostics(torch.full((1, 4, 4), 1 / 16), uniform, uniform, lead, lead)
    common = {"ot_marginal_error": 0, "ot_mass": 1}
    assert hard == pytest.approx({"ot_entropy": 0, "ot_mass_in_lead": 1} | common, abs=1e-6)
    assert loose == pytest.approx({"ot_entropy": 1, "ot_mass_in_lead": 0.5} | common, abs=1e-6)
    short = plan_diagnostics(torch.eye(4)[None] / 8, uniform, uniform, lead, lead - 9)
    assert short == pytest.approx({"ot_entropy": 0, "ot_marginal_error": 1, "ot_mass": 0.5}, abs=1e-6)
    uneven = torch.tensor([[0.5, 0.3, 0.2, 0.0]])
    product = plan_diagnostics(uneven[..., None] * uniform[:, None], uneven, uniform, lead, lead)
    assert product == pytest.approx({"ot_entropy": 1, "ot_mass_in_lead": 0.5} | common, abs=1e-6)
    assert plan_diagnostics(torch.zeros(1, 4, 4), uniform * 0, uniform, lead, lead) == {}


def test_lead_marginals_by_hand() -> None:
    lead_t = torch.tensor([[0, 0, 0, 1, -1, -1, 2, 7], [0, 0, 0, 0, 0, 0, 0, 0], [3, 3, -1, -1, -1, -1, -1, -1]])
    lead_s = torch.tensor([[0, 1, 1, -1], [1, 1, 1, 1], [3, -1, 5, 5]])
    mask_t, mask_s = ones(3, 8), ones(3, 4)
    mask_t[0, 7] = mask_t[2, 6:] = False
    a, b = lead_marginals(mask_t, mask_s, lead_t, lead_s)
    # tokens without a lead: 2 of 7 and 1 of 4; leads 0 and 1 share the rest; lead 2 is missing on the other side
    blank = (2 / 7 + 1 / 4) / 2
    each = (1 - blank) / 2
    assert_close(a[0], torch.tensor([each / 3] * 3 + [each] + [blank / 2] * 2 + [0, 0]))
    assert_close(b[0], torch.tensor([each, each / 2, each / 2, blank]))
    assert_close((a[1], b[1]), (torch.full((8,), 1 / 8), torch.full((4,), 1 / 4)))  # no lead in common: uniform
    blank = (4 / 6 + 1 / 4) / 2
    assert_close(a[2], torch.tensor([(1 - blank) / 2] * 2 + [blank / 4] * 4 + [0] * 2))
    assert_close(b[2], torch.tensor([1 - blank, blank, 0, 0]))
    empty = lead_marginals(mask_t & False, mask_s, lead_t, lead_s)
    assert float(empty[0].sum()) == 0


def test_loss_with_lead_marginals_relaxed_against_pot() -> None:
    teacher, student = seeded(1, 9, 6), seeded(1, 4, 6, seed=1)
    leads = torch.arange(9)[None] % 2, torch.tensor([[0, 0, 0, 1]])
    a, b = lead_marginals(ones(1, 9), ones(1, 4), *leads)
    result = transport_loss(
        teacher, student, ones(1, 9), ones(1, 4), **DEFAULTS, normalise=False, a_BN=a, b_BM=b, relax=0.4
    )
    cost = (teacher[0][:, None] - student[0][None]).square().sum(-1).numpy()
    plan = ot.unbalanced.sinkhorn_unbalanced(
        a[0].double().numpy(), b[0].double().numpy(), cost / cost.mean(), 0.05, 0.4, reg_type="kl",
        numItermax=50_000, stopThr=1e-14,
    )  # fmt: skip
    assert float(result.loss) == pytest.approx(naive_loss(teacher[0], student[0], plan) / 6, rel=1e-6)
    assert result.a_BN is a and result.b_BM is b


@pytest.mark.parametrize("relax", [None, 0.4])
def test_gradient_is_the_envelope_gradient_of_the_relaxed_problem(relax: float | None) -> None:
    """gradcheck of the optimum's value itself, solved anew at every point, whose gradient is defined as the plan."""
    masks = ones(2, 5), ones(2, 4)
    masks[1][1, 3] = False
    mean = 1.3  # held: dividing by the mean would add a term

    class Optimum(torch.autograd.Function):
        @staticmethod
        def forward(ctx, cost: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            value, plans = cost.new_zeros(2), torch.zeros_like(cost)
            for s, (c, a_mask, b_mask) in enumerate(zip(cost, *masks, strict=True)):
                share = float(mean / c[a_mask][:, b_mask].mean())
                p = transport_plan(c[None], a_mask[None], b_mask[None], epsilon=0.3 * share, steps=500,
                                   relax=None if relax is None else relax * share)[0]  # fmt: skip
                plans[s] = p
                p = p[a_mask][:, b_mask]
                n, m = p.shape
                kl = (p * (p * n * m).log() - p).sum() + 1
                value[s] = (p * c[a_mask][:, b_mask]).sum() + 0.3 * mean * kl
                if relax is not None:
                    for side, k in ((p.sum(1), n), (p.sum(0), m)):
                        value[s] += relax * mean * ((side * (side * k).log() - side).sum() + 1)
            ctx.save_for_backward(plans)
            return value

        @staticmethod
        def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return gradient[:, None, None] * ctx.saved_tensors[0]

    assert torch.autograd.gradcheck(Optimum.apply, (seeded(2, 5, 4).exp().requires_grad_(),))


def fused_by_hand(t: torch.Tensor, s: torch.Tensor, plan: np.ndarray, structure: float) -> float:
    """Plain loops over the equation, for layer-normalised tokens."""
    d_t, d_s = ((x[:, None] - x[None]).square().sum(-1) for x in (t, s))
    d_t, d_s = (d_t / d_t.mean()).numpy(), (d_s / d_s.mean()).numpy()
    pairs = [(i, j) for i in range(len(t)) for j in range(len(s))]
    inner = sum((d_t[i, k] - d_s[j, h]) ** 2 * plan[i, j] * plan[k, h] for i, j in pairs for k, h in pairs)
    return (1 - structure) * naive_loss(t, s, plan) / t.shape[1] + structure * inner


@pytest.mark.parametrize("structure", [0.0, 0.4])
def test_fused_gromov_against_plain_loops(structure: float) -> None:
    teacher, student = seeded(2, 7, 6) * 2, seeded(2, 5, 6, seed=1)
    teacher_mask, student_mask = ones(2, 7), ones(2, 5)
    teacher_mask[1, 5:] = False
    result = transport_loss(teacher, student, teacher_mask, student_mask, epsilon=0.3, steps=200, structure=structure)
    expected = []
    for b, n in ((0, 7), (1, 5)):
        t, s = (torch.nn.functional.layer_norm(x, (6,)) for x in (teacher[b, :n], student[b]))
        plan = result.plan_BNM[b, :n].numpy()
        expected.append(fused_by_hand(t, s, plan, structure))
        np.testing.assert_allclose(plan.sum(0), 1 / 5, atol=1e-5)
        np.testing.assert_allclose(plan.sum(1), 1 / n, atol=1e-5)
    assert float(result.loss) == pytest.approx(np.mean(expected), rel=1e-6)
    if structure == 0:  # no structure: the transport that `sinkhorn` solves
        plain = transport_loss(teacher, student, teacher_mask, student_mask, epsilon=0.3, steps=200)
        assert_close(result.plan_BNM, plain.plan_BNM, atol=1e-6, rtol=0)
        assert_close(result.loss, plain.loss, atol=1e-6, rtol=0)


def test_fused_gromov_finds_a_rotation_that_costs_do_not_show() -> None:
    angle = torch.arange(6, dtype=torch.float64) ** 1.5 / 3
    ring = torch.stack([angle.cos(), angle.sin(), *seeded(2, 6, seed=5) * 0.01], 1)[None]
    turned = ring[:, torch.arange(5, -1, -1)] @ torch.diag(torch.tensor([-1.0, -1, 1, 1], dtype=torch.float64))
    options = {"epsilon": 0.02, "steps": 300, "normalise": False}
    plan = transport_loss(ring, turned, ones(1, 6), ones(1, 6), structure=1.0, **options).plan_BNM[0]
    assert plan.argmax(1).tolist() == [5, 4, 3, 2, 1, 0]
    without = transport_loss(ring, turned, ones(1, 6), ones(1, 6), **options).plan_BNM[0]
    assert without.argmax(1).tolist() != [5, 4, 3, 2, 1, 0]


def test_fused_gromov_gradient_and_hard_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = seeded(2, 5, 3).requires_grad_(), seeded(2, 4, 3, seed=1).requires_grad_()
    options = {"epsilon": 0.1, "steps": 50, "structure": 0.5}
    hard = torch.zeros(3, 4, 3, dtype=torch.bfloat16, requires_grad=True)
    mask = ones(3, 5)
    mask[1] = False
    loss = transport_loss(torch.zeros(3, 5, 3, dtype=torch.bfloat16), hard, mask, ones(3, 4), **options).loss
    loss.backward()
    assert hard.grad is not None and torch.isfinite(hard.grad).all() and loss.dtype == torch.float32
    lost = torch.full((1, 4, 3), torch.nan)
    assert transport_loss(torch.ones(1, 5, 3), lost, ones(1, 5), ones(1, 4), **options).loss.isnan()
    plan = transport_loss(teacher, student, ones(2, 5), ones(2, 4), **options).plan_BNM
    monkeypatch.setattr("evlecg.losses.transport.fused_gromov_plan", lambda *_, **__: plan)
    assert torch.autograd.gradcheck(
        lambda t, s: transport_loss(t, s, ones(2, 5), ones(2, 4), **options).loss, (teacher, student)
    )


@pytest.mark.filterwarnings("ignore:::ot")
def test_fused_gromov_says_when_pot_finds_no_plan() -> None:
    with pytest.raises(EvlecgError, match="larger epsilon") as caught:
        transport_loss(
            seeded(1, 12, 6), seeded(1, 8, 6, seed=1), ones(1, 12), ones(1, 8), epsilon=1e-4, steps=5, structure=0.5
        )
    assert caught.value.where == "objective.transport.epsilon"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strict": True, "relax": 1.0}, "published"),
        ({"strict": True, "structure": 0.5}, "published"),
        ({"strict": True, "a_BN": torch.ones(1, 2) / 2}, "published"),
        ({"structure": 0.5, "relax": 1.0}, "hold"),
    ],
)
def test_options_that_contradict_one_another_are_refused(options: dict, message: str) -> None:
    x = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=message):
        transport_loss(x, x, ones(1, 2), ones(1, 2), **DEFAULTS, **options)
