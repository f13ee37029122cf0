"""Entropic optimal transport plans of a batch: balanced or KL-relaxed, any marginals, masked.

Sinkhorn (Cuturi 2013; for relaxed marginals Chizat et al. 2018) in kernel form, finished by Newton steps on the dual of
the smaller side (Brauer et al. 2017, "A Sinkhorn-Newton method for entropic optimal transport"). Where scalings leave
the range that can be trusted they are absorbed into the potentials (Schmitzer 2019); where they have left it, some
iterations run in the log domain.

Chosen by measurement (`python -m tests.bench.transport`; METHOD's costs, epsilon .05 of the mean):

- On token sets that fall into page regions the kernel is nearly block-diagonal, and Sinkhorn alone needs hundreds to
  thousands of iterations for a marginal error of 1e-4. Three to five iterations and one Newton matrix reach 1e-5. The
  matrix is used again as long as it serves (a step then costs little more than an iteration), and where one side is
  much larger it is estimated from every k-th row: on token grids neighbours are alike.
- On unstructured tokens Sinkhorn itself converges in four or five iterations. The rate of the last two iterations tells
  which of the two finishes sooner.
- The residual of Newton's equation is taken between logarithms, col * log(target / col): exact for a token whose
  coupling to others is weak, where the plain residual overshoots. Steps that reach too far are shortened as a whole.
- Starting at a larger epsilon gained nothing, nor did c-transforms as first potentials; these serve where costs
  span more than the kernel's range.
- Samples are solved one after another on their valid tokens only, so that one kernel stays in cache (batched products
  of a matrix and a vector are three to seven times slower) and padding cannot change a number. Matrix-vector products
  use one core; hence on the CPU several samples are solved at once, one a thread.

Shape legend: B batch rows, N tokens of the larger side, M tokens of the smaller side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from evlecg.losses.stable import full_precision

WARM_UP = 3  # iterations before the first Newton step
NEWTON_COST_A_COLUMN, NEWTON_COST = 1 / 12, 4  # what a Newton matrix costs, in iterations (measured; one thread)
PESSIMISM = 4  # Sinkhorn's rate gets worse as fast modes die out: so many times the iterations it promises
NEWTON_WIDTH = 2048  # above this many tokens on the smaller side the dense system costs more than it saves
NEWTON_REACH = 4.0  # largest change of a potential in one Newton step, in epsilons
NEWTON_LOCAL = 1e-2  # error below which Newton should converge at once: if not, its matrix is too rough an estimate
CONTRACTION = 0.3  # a Newton matrix is renewed when a step leaves more of the error than this
DIVERGENCE = 3.0  # a Newton step that leaves more than so many times the least error is taken back
STALLS = 3  # so many Newton matrices in a row without progress send the solver back to plain iterations
CHECK = 5  # iterations between looks at the range of the scalings
BLOCK = 10  # iterations in the log domain, or without Newton after a step that failed
ROWS_A_COLUMN = 2  # rows that estimate the Newton matrix, for each of its columns


def uniform_marginals(mask_BN: Tensor, *, like: Tensor) -> Tensor:
    """Equal mass [B, N] on every valid token; it sums to 1, or to 0 where there is none. `like` gives the dtype."""
    return mask_BN.to(like.dtype) / mask_BN.sum(1, keepdim=True).clamp_min(1)


@full_precision
def transport_plan(
    cost_BNM: Tensor,
    a_mask_BN: Tensor,
    b_mask_BM: Tensor,
    *,
    epsilon: float,
    steps: int,
    relax: float | None = None,
    a_BN: Tensor | None = None,
    b_BM: Tensor | None = None,
    tolerance: float | None = None,
) -> Tensor:
    """Entropic transport plan between the distributions of two sets of tokens.

    The minimiser of <P, C> + epsilon KL(P | a b^T) over plans with marginals a and b; with `relax`, over all plans of
    <P, C> + epsilon KL(P | a b^T) + relax KL(P 1 | a) + relax KL(P^T 1 | b). C is the cost over its mean.

    Args:
        cost_BNM: cost of moving mass from token n to token m; any scale.
        a_mask_BN: bool, valid tokens of the first side.
        b_mask_BM: bool, valid tokens of the second side.
        epsilon: entropic regularisation, as a share of each sample's mean cost over valid pairs.
        steps: most iterations; fewer are run once the marginals hold.
        relax: cost of departing from the marginals, in mean costs; None: they must hold.
        a_BN: mass of every token of the first side, summing to 1; None: uniform over valid tokens. Tokens without
            mass count as invalid.
        b_BM: the same of the second side.
        tolerance: sum of |marginal error| at which a sample is done; None: 1e-5 (1e-11 in float64).

    Returns:
        [B, N, M], without gradient (envelope theorem); zero where either token is invalid, and for samples without
        tokens on a side. NaN costs give a NaN plan: a diverged model shows in the loss.

    Source:
        Cuturi 2013; Chizat et al. 2018, "Scaling algorithms for unbalanced optimal transport problems".
    """
    cost_BNM = cost_BNM.detach()
    if tolerance is None:
        tolerance = 1e-11 if cost_BNM.dtype == torch.float64 else 1e-5  # float32 stalls near 2e-6
    mass_BN = _masses(a_BN, a_mask_BN, like=cost_BNM)
    mass_BM = _masses(b_BM, b_mask_BM, like=cost_BNM)
    has_a_BN, has_b_BM = mass_BN > 0, mass_BM > 0
    whole_B = (has_a_BN.all(1) & has_b_BM.all(1)).tolist()
    plan_BNM = torch.empty_like(cost_BNM, memory_format=torch.contiguous_format)
    slack = 0.0 if relax is None else epsilon / relax

    @torch.no_grad()  # whether gradients are recorded is a property of the thread
    def solve(sample: int) -> None:
        cost_nm, plan_nm = cost_BNM[sample], plan_BNM[sample]
        if whole_B[sample]:
            _solve_into(plan_nm, cost_nm, mass_BN[sample], mass_BM[sample], epsilon, slack, steps, tolerance)
            return
        plan_nm.zero_()
        row_n, column_m = has_a_BN[sample].nonzero()[:, 0], has_b_BM[sample].nonzero()[:, 0]
        if len(row_n) == 0 or len(column_m) == 0:
            return
        cost_nm = cost_nm[row_n[:, None], column_m]
        part_nm = torch.empty_like(cost_nm)
        a_n, b_m = mass_BN[sample, row_n], mass_BM[sample, column_m]
        _solve_into(part_nm, cost_nm, a_n, b_m, epsilon, slack, steps, tolerance)
        plan_nm[row_n[:, None], column_m] = part_nm

    _on_all_cores(solve, len(cost_BNM), on_cpu=cost_BNM.device.type == "cpu")
    return plan_BNM


def _masses(given_BN: Tensor | None, mask_BN: Tensor, *, like: Tensor) -> Tensor:
    """A side's marginal in the dtype of the cost, summing to 1 as exactly as it can: sides that differ never agree."""
    if given_BN is None:
        return uniform_marginals(mask_BN, like=like)
    mass_BN = given_BN.to(like.dtype) * mask_BN
    return mass_BN / mass_BN.sum(1, keepdim=True).clamp_min(torch.finfo(like.dtype).tiny)


def _on_all_cores(work: Callable[[int], None], count: int, *, on_cpu: bool) -> None:
    """Calls `work` with 0 to count - 1, on the CPU in as many threads as torch may use."""
    threads = torch.get_num_threads()
    workers = min(threads, count)
    if workers <= 1 or not on_cpu:
        for number in range(count):
            work(number)
        return
    each = threads // workers
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(each,)) as pool:
            list(pool.map(work, range(count)))  # the list raises what a worker raised
    finally:
        torch.set_num_threads(threads)  # a worker's setting is also the default of threads to come


@dataclass(frozen=True)
class _Side:
    """Marginal of one side, and what its scalings are fitted to.

    The scaling u of a side obeys u * (K v) = a exp(-slack f), with f the side's whole potential in epsilons: the
    part that the kernel holds, and log(u / a). Without slack that is u = a / (K v).

    Attributes:
        mass_N: the marginal, all above zero.
        held_N: potential that the kernel holds, in epsilons.
        slack: epsilon over the cost of departing from the marginal; 0 where it must hold.
    """

    mass_N: Tensor
    held_N: Tensor
    slack: float

    def fitted(self, product_N: Tensor) -> Tensor:
        """The scaling, from the kernel's product with the other side's."""
        if self.slack == 0:
            return self.mass_N / product_N
        return self.mass_N * ((-self.slack * self.held_N).exp() / product_N) ** (1 / (1 + self.slack))

    def target(self, scaling_N: Tensor) -> Tensor:
        """The sums that the plan's rows (or columns) should have."""
        if self.slack == 0:
            return self.mass_N
        return self.mass_N * (-self.slack * (self.held_N + (scaling_N / self.mass_N).log())).exp()

    def absorb(self, scaling_N: Tensor) -> _Side:
        return _Side(self.mass_N, self.held_N + (scaling_N / self.mass_N).log(), self.slack)

    def fitted_log(self, reduced_N: Tensor) -> _Side:
        """The same as `fitted` in the log domain: from the log of the kernel's sums without absorbed potentials."""
        return _Side(self.mass_N, reduced_N / -(1 + self.slack), self.slack)


def _solve_into(
    plan_nm: Tensor,
    cost_nm: Tensor,
    a_n: Tensor,
    b_m: Tensor,
    epsilon: float,
    slack: float,
    steps: int,
    tolerance: float,
) -> None:
    """Writes one sample's plan; every token is valid. The buffer serves as kernel on the way."""
    scale = float(cost_nm.mean()) * epsilon
    if not math.isfinite(scale):
        plan_nm.fill_(math.nan)
        return
    scale = max(scale, torch.finfo(cost_nm.dtype).tiny)
    if len(a_n) < len(b_m):
        plan_nm, cost_nm, a_n, b_m = plan_nm.T, cost_nm.T, b_m, a_n
    low, high = (float(value) for value in cost_nm.aminmax())
    if (high - low) / scale < math.log(_kernel_range(cost_nm.dtype)):
        row_n, column_m = torch.full_like(a_n, low), torch.zeros_like(b_m)
    else:  # c-transforms: every row and column of the kernel then holds a 1, however small epsilon is
        row_n = cost_nm.amin(1)
        column_m = (cost_nm - row_n[:, None]).amin(0)
    rows, columns = _Side(a_n, row_n / scale, slack), _Side(b_m, column_m / scale, slack)
    _Solver(cost_nm, scale, rows, columns, plan_nm).run(steps, tolerance)


def _kernel_range(dtype: torch.dtype) -> float:
    """How far the kernel's entries may lie apart, and how large a product of two scalings may get."""
    return torch.finfo(dtype).max ** 0.6


class _Solver:
    """One sample's iterations on its valid tokens. u always follows from v, so that the plan's rows are exact.

    Args:
        cost_NM: N >= M, since Newton's system has the size of the second side.
        scale: epsilon in the units of the cost.
        rows: first side.
        columns: second side.
        plan_NM: buffer for the result; it holds the kernel on the way.
    """

    def __init__(self, cost_NM: Tensor, scale: float, rows: _Side, columns: _Side, plan_NM: Tensor) -> None:
        self.cost_NM, self.scale, self.kernel_NM = cost_NM, scale, plan_NM
        self.stride = max(1, cost_NM.shape[0] // (ROWS_A_COLUMN * cost_NM.shape[1]))
        self._hold(rows, columns)

    def run(self, steps: int, tolerance: float) -> None:
        """Turns the kernel into the plan."""
        iteration, newton_from, rest = 0, WARM_UP, BLOCK
        best_error = previous = math.inf
        best_M = retreat_M = v_M = self.columns.mass_N
        factor_MM: Tensor | None = None
        used = -1  # steps taken with the Newton matrix in force; -1: the last step was not Newton's
        stalled, from_log = 0, False
        while True:
            sums_N = torch.mv(self.kernel_NM, v_M)
            u_N = self.rows.fitted(sums_N)
            product_M = torch.mv(self.kernel_NM.T, u_N)
            column_M = v_M * product_M
            target_M = self.columns.target(v_M)
            error = float((target_M - column_M).abs_().sum())
            iteration += 1
            if error < best_error:
                best_error, best_M = error, v_M
            if best_error <= tolerance or (iteration >= steps and (best_error < math.inf or from_log)):
                break
            if used >= 0 and not error <= DIVERGENCE * best_error:  # NaN too: take the Newton step back
                v_M, factor_MM, used = retreat_M, None, -1
                newton_from, rest = iteration + rest, 2 * rest
                continue
            if not math.isfinite(error):  # a sum of the kernel underflowed, or a scaling overflowed
                self._iterate_log(BLOCK)
                iteration, from_log = iteration + BLOCK, True
                best_error, best_M, v_M = math.inf, self.columns.mass_N, self.columns.mass_N  # scalings u, v = a, b
                continue
            plain_M = self.columns.fitted(product_M)
            if (used >= 0 or iteration % CHECK == 0) and self._leaves_range(u_N, plain_M):
                self._hold(self.rows.absorb(u_N), self.columns.absorb(plain_M))
                best_error, factor_MM, used = math.inf, None, -1
                best_M = retreat_M = v_M = self.columns.mass_N
                continue
            if used >= 0 and error > CONTRACTION * previous:  # the matrix no longer serves
                factor_MM = None
                stalled = stalled + 1 if error > best_error else 0
                if used == 1 and (error < NEWTON_LOCAL or stalled > 0):
                    self.stride = max(1, self.stride // 2)
                if stalled == STALLS:
                    newton_from, rest, stalled = iteration + rest, 2 * rest, 0
            if factor_MM is None and iteration >= newton_from and self._newton_pays(error, previous, tolerance):
                factor_MM = self._newton_factor(u_N, v_M, u_N * sums_N, column_M)
                used = 0
                if factor_MM is None:
                    newton_from, rest, used = iteration + rest, 2 * rest, -1
            if factor_MM is None:
                v_M, used = plain_M, -1
            else:
                retreat_M = plain_M
                v_M = v_M * _newton_change(factor_MM, target_M, column_M).exp_()
                used += 1
            previous = error
        if best_M is not v_M:
            u_N = self.rows.fitted(torch.mv(self.kernel_NM, best_M))
        self.kernel_NM.mul_(u_N[:, None]).mul_(best_M)

    def _hold(self, rows: _Side, columns: _Side) -> None:
        """Puts both sides' potentials into the kernel."""
        self.rows, self.columns = rows, columns
        torch.add(rows.held_N[:, None], self.cost_NM, alpha=-1 / self.scale, out=self.kernel_NM)
        if bool(columns.held_N.any()):  # spares a pass over the kernel where costs are in range
            self.kernel_NM.add_(columns.held_N)
        self.kernel_NM.exp_()

    def _leaves_range(self, u_N: Tensor, v_M: Tensor) -> bool:
        """Whether scalings grow to where kernel entries that underflowed would count."""
        largest = float((u_N / self.rows.mass_N).max()) * float((v_M / self.columns.mass_N).max())
        return not largest <= _kernel_range(self.kernel_NM.dtype)

    def _iterate_log(self, iterations: int) -> None:
        """Iterations on potentials, from those that the kernel holds: slow, and safe at any epsilon."""
        rows, columns = self.rows, self.columns
        for _ in range(iterations):
            rows = rows.fitted_log(
                torch.logsumexp(columns.held_N + columns.mass_N.log() - self.cost_NM / self.scale, 1)
            )
            columns = columns.fitted_log(
                torch.logsumexp((rows.held_N + rows.mass_N.log())[:, None] - self.cost_NM / self.scale, 0)
            )
        self._hold(rows, columns)

    def _newton_pays(self, error: float, previous: float, tolerance: float) -> bool:
        """Whether Sinkhorn at its present rate would need more iterations than a Newton matrix costs."""
        m = self.cost_NM.shape[1]
        if m > NEWTON_WIDTH:
            return False
        if not error < previous < math.inf:
            return True
        iterations = math.log(tolerance / error) / math.log(error / previous)
        return PESSIMISM * iterations > m * NEWTON_COST_A_COLUMN / self.stride + NEWTON_COST

    def _newton_factor(self, u_N: Tensor, v_M: Tensor, row_N: Tensor, column_M: Tensor) -> Tensor | None:
        """Cholesky factor of Newton's matrix for the logarithm of v, or None where there is none."""
        stretch = 1 + self.rows.slack
        some_NM = self.kernel_NM[:: self.stride]
        if self.stride > 1:
            u_N, row_N = u_N[:: self.stride], row_N[:: self.stride]
            column_M = self.stride * v_M * torch.mv(some_NM.T, u_N)
        share_NM = some_NM * (u_N * (self.stride / (stretch * row_N)).sqrt())[:, None]
        matrix_MM = torch.mm(share_NM.T, share_NM).mul_(-v_M[:, None]).mul_(v_M)
        if self.columns.slack == 0:  # constants are in its null space: this picks the solution without one
            matrix_MM.add_(1 / len(v_M))
        matrix_MM.diagonal().add_(stretch * column_M).add_(1e-6 / len(v_M))
        factor_MM, failed = torch.linalg.cholesky_ex(matrix_MM)
        return None if failed else factor_MM


def _newton_change(factor_MM: Tensor, target_M: Tensor, column_M: Tensor) -> Tensor:
    """Newton's change of the logarithm of v, shortened to the reach."""
    residual_M = column_M * (target_M / column_M).log_()
    change_M = torch.cholesky_solve(residual_M[:, None], factor_MM)[:, 0]
    # all of it: clamped entry by entry, it would no longer move weakly coupled groups of tokens as a whole
    return change_M.mul_((NEWTON_REACH / change_M.abs().max()).clamp_max(1))
