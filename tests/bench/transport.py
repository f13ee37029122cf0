"""The transport solver beside POT and geomloss, at equal marginal error.

    python -m tests.bench.transport [--threads 1 2] [--inputs page noise] [--error 1e-4] [--rounds 7]

Every solver gets the same float32 costs [8, N, 256], divided by their mean, epsilon .05, and returns its plans. Inputs:
`page`, tokens that vary smoothly over the page with METHOD's default position and lead costs, what the term is for;
`features`, the same without these costs; `noise`, independent Gaussian tokens, the easiest case.

Equal error: of every solver the fewest iterations are searched that bring the worst sample's sum of |row error| and
|column error| to --error; the table has the count and the error measured on the plans. Ours stops by itself at that
tolerance. A call that would take over --limit seconds of the processor is timed for a part of its iterations and
scaled up: marked ~, and its error is that of the part.

Solvers take turns; medians. With one thread the processor's time decides (other work on the machine cannot touch it),
with more the wall clock. Memory: a child process for each loads the cost, solves a small problem, resets its peak
resident size (Linux: /proc/self/clear_refs), and solves the batch; peak less what was resident before, over the size of
the cost. The plans themselves are 1 of it.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ot
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from evlecg.losses.sinkhorn import transport_plan
from evlecg.losses.transport import mean_divided, page_cost
from tests.bench.timing import save

try:
    from geomloss.ot import solve_batch as geomloss_solve_batch
except ImportError:
    geomloss_solve_batch = None

B, M, D = 8, 256, 256
GRIDS = {576: (24, 24), 2438: (46, 53)}
EPSILON = 0.05
OURS = "ours"
MOST_ITERATIONS = 3000  # of searches: beyond, a count is a lower bound, and so are the times that rest on it


def make_cost(kind: str, n: int) -> Tensor:
    """Costs [8, n, 256] over their mean."""
    generator = torch.Generator().manual_seed(0)
    ones_BN, ones_BM = torch.ones(B, n, dtype=torch.bool), torch.ones(B, M, dtype=torch.bool)
    if kind == "noise":
        tokens = [torch.randn(B, count, D, generator=generator) for count in (n, M)]
        return mean_divided(torch.cdist(*tokens).square(), ones_BN, ones_BM)
    waves, mix = torch.randn(B, 2, 16, generator=generator) * 6, torch.randn(16, D, generator=generator) / 4
    boxes, leads, tokens = [], [], []
    for height, width in (GRIDS[n], (16, 16)):
        y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
        box_K4 = torch.stack([x, y, x + 1 / width, y + 1 / height], -1).reshape(-1, 4)
        centre_K2 = (box_K4[:, :2] + box_K4[:, 2:]) / 2
        row, column = (centre_K2[:, 1] * 4).long(), (centre_K2[:, 0] * 4).long()
        leads.append(torch.where(row < 3, column * 3 + row, 1)[None])  # 3 x 4 leads over a rhythm strip of II
        boxes.append(box_K4[None])
        tokens.append(torch.sin(centre_K2 @ waves) @ mix + 0.05 * torch.randn(B, len(box_K4), D, generator=generator))
    cost_BNM = mean_divided(torch.cdist(*tokens).square(), ones_BN, ones_BM)
    if kind == "page":
        cost_BNM = mean_divided(cost_BNM + page_cost(*boxes, *leads, position=1.0, lead=0.5), ones_BN, ones_BM)
    return cost_BNM


def ours(cost_BNM: Tensor, steps: int, tolerance: float | None) -> Tensor:
    masks = (torch.ones(side, dtype=torch.bool) for side in (cost_BNM.shape[:2], cost_BNM.shape[::2]))
    return transport_plan(cost_BNM, *masks, epsilon=EPSILON, steps=steps, tolerance=tolerance)


def pot_looped(cost_BNM: Tensor, iterations: int) -> Tensor:
    options = {"method": "sinkhorn", "numItermax": iterations, "stopThr": 0.0, "warn": False}
    return torch.stack([torch.from_numpy(ot.sinkhorn([], [], cost.numpy(), EPSILON, **options)) for cost in cost_BNM])


def pot_looped_torch(cost_BNM: Tensor, iterations: int) -> Tensor:
    options = {"method": "sinkhorn", "numItermax": iterations, "stopThr": 0.0, "warn": False}
    return torch.stack([ot.sinkhorn([], [], cost, EPSILON, **options) for cost in cost_BNM])


def pot_batch(method: str) -> Callable[[Tensor, int], Tensor]:
    def solve(cost_BNM: Tensor, iterations: int) -> Tensor:
        return ot.batch.solve_batch(
            cost_BNM, EPSILON, max_iter=iterations, tol=0.0, method=method, grad="detach"
        ).plan  # fmt: skip

    return solve


def geomloss_batch(cost_BNM: Tensor, iterations: int) -> Tensor:
    assert geomloss_solve_batch is not None
    masses = (torch.full(side, 1 / side[1]) for side in (cost_BNM.shape[:2], cost_BNM.shape[::2]))
    a_BN, b_BM = masses
    return geomloss_solve_batch(cost_BNM, reg=EPSILON, a=a_BN, b=b_BM, max_iter=iterations).plan


OTHERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "POT ot.sinkhorn, looped (numpy)": pot_looped,
    "POT ot.sinkhorn, looped (torch)": pot_looped_torch,
    "POT ot.batch, sinkhorn": pot_batch("sinkhorn"),
    "POT ot.batch, log_sinkhorn": pot_batch("log_sinkhorn"),
    "geomloss.ot.solve_batch": geomloss_batch,
}


def marginal_error(plan_BNM: Tensor) -> float:
    _, n, m = plan_BNM.shape
    rows_BN, columns_BM = plan_BNM.double().sum(2) - 1 / n, plan_BNM.double().sum(1) - 1 / m
    return float((rows_BN.abs().sum(1) + columns_BM.abs().sum(1)).max())


def sinkhorn_iterations(cost_BNM: Tensor, target: float) -> int:
    """Alternating iterations after which the worst sample has the error: what every POT solver needs."""
    worst = 1
    for cost_NM in cost_BNM:
        kernel_NM = (-cost_NM / EPSILON).exp()
        n, m = kernel_NM.shape
        u_N, v_M = torch.full((n,), 1 / n), torch.full((m,), 1 / m)
        for iteration in range(1, MOST_ITERATIONS):
            v_M = (1 / m) / (kernel_NM.T @ u_N)
            row_N = kernel_NM @ v_M
            u_N = (1 / n) / row_N
            # the error is looked at where it costs little of the search
            if (iteration < 20 or iteration % 10 == 0) and float(
                (v_M * (kernel_NM.T @ u_N) - 1 / m).abs().sum()
            ) <= target:
                worst = max(worst, iteration)
                break
        else:
            return MOST_ITERATIONS
    return worst


def fewest(solve: Callable[[int], Tensor], target: float, limit_s: float) -> tuple[int, bool]:
    """Fewest iterations (to a tenth) whose plans have the error, by doubling and halving; False: not in the limit."""
    low, high = 0, 4
    while True:
        start_s = time.process_time()
        if marginal_error(solve(high)) <= target:
            break
        if time.process_time() - start_s > limit_s or high > MOST_ITERATIONS:
            return high, False
        low, high = high, 2 * high
    while high - low > max(1, high // 10):
        middle = (low + high) // 2
        low, high = (low, middle) if marginal_error(solve(middle)) <= target else (middle, high)
    return high, True


def extra_memory(name: str, cost_BNM: Tensor, error: float, threads: int) -> float | None:
    """Peak extra memory of a solver in units of the cost, measured in a child process."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cost.pt"
        torch.save(cost_BNM, path)
        command = [sys.executable, "-m", "tests.bench.transport", "--child", name, str(path)]
        command += ["--error", str(error), "--threads", str(threads)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def child(name: str, path: str, error: float) -> None:
    """Prints the peak extra memory of one solver. Ten iterations do: memory does not depend on their number."""

    def resident_kB(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

    cost_BNM = torch.load(path)
    solve = (lambda cost: ours(cost, 200, error)) if name == OURS else (lambda cost: OTHERS[name](cost, 10))
    solve(torch.rand(B, 120, 60))  # small: memory that it frees would be used again unseen
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before_kB = resident_kB("VmRSS")
    plan_BNM = solve(cost_BNM)
    print((resident_kB("VmHWM") - before_kB) * 1024 / (cost_BNM.numel() * 4), flush=True)
    del plan_BNM


def measure(kind: str, n: int, threads: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One table: every solver on one input with so many threads."""
    cost_BNM = make_cost(kind, n)
    # name -> call, its iterations, and what its time is multiplied by
    ways: dict[str, tuple[Callable[[], Tensor], str, float]] = {
        OURS: (lambda: ours(cost_BNM, 200, options.error), "own", 1.0),
        f"{OURS}, default tolerance": (lambda: ours(cost_BNM, 200, None), "own", 1.0),
    }
    iterations = sinkhorn_iterations(cost_BNM, options.error)
    for name, solve in OTHERS.items():
        if "geomloss" in name:
            if geomloss_solve_batch is None:
                continue
            needed, found = fewest(lambda count, solve=solve: solve(cost_BNM, count), options.error, options.limit)
        else:
            needed, found = iterations, iterations < MOST_ITERATIONS
        start_s = time.process_time()
        solve(cost_BNM, 10)
        ten_s = time.process_time() - start_s
        timed = min(needed, max(10, int(options.limit / ten_s * 10)))
        label = f"{'' if found else '>'}{needed}"
        ways[name] = (lambda solve=solve, timed=timed: solve(cost_BNM, timed), label, needed / timed)
    rows = {name: {"wall_ms": [], "cpu_ms": [], "error": marginal_error(call())} for name, (call, _, _) in ways.items()}
    for number in range(options.rounds):
        for name, (call, _, factor) in ways.items():
            if number > 1 and statistics.median(rows[name]["wall_ms"]) > 2000 * factor:
                continue  # two rounds of a slow one are enough
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            call()
            rows[name]["wall_ms"].append((time.perf_counter() - wall_s) * 1e3 * factor)
            rows[name]["cpu_ms"].append((time.process_time() - cpu_s) * 1e3 * factor)
    table = []
    for name, row in rows.items():
        _, label, factor = ways[name]
        wanted = not options.no_memory and "default" not in name
        memory = extra_memory(name, cost_BNM, options.error, threads) if wanted else None
        table.append(
            {
                "input": kind, "size": f"{B} x ({n}x{M})", "threads": threads, "solver": name, "iterations": label,
                "extrapolated": factor > 1, "marginal_error": row["error"], "memory_costs": memory,
                "wall_ms": statistics.median(row["wall_ms"]), "cpu_ms": statistics.median(row["cpu_ms"]),
                "wall_min_ms": min(row["wall_ms"]), "rounds": len(row["wall_ms"]),
            }
        )  # fmt: skip
    return table


def show(table: list[dict[str, Any]]) -> None:
    first = table[0]
    clock = "cpu_ms" if first["threads"] == 1 else "wall_ms"
    base = first[clock]
    print(f"\n{first['input']}, {first['size']}, threads {first['threads']} (ratios by {clock})")
    print(
        f"{'solver':33}{'iterations':>11}{'error':>9}{'wall ms':>10}{'min':>9}{'cpu ms':>10}{'ratio':>8}{'memory':>8}"
    )
    for row in table:
        mark = "~" if row["extrapolated"] else ""
        memory = "" if row["memory_costs"] is None else f"{row['memory_costs']:.1f}"
        print(
            f"{row['solver']:33}{row['iterations']:>11}{mark + format(row['marginal_error'], '.1e'):>9}"
            f"{mark + format(row['wall_ms'], '.1f'):>10}{row['wall_min_ms']:9.1f}{row['cpu_ms']:10.1f}"
            f"{row[clock] / base:8.2f}{memory:>8}"
        )
    # a solver that was not brought to the error has no time at equal error
    others = [row for row in table if not row["solver"].startswith(OURS) and ">" not in row["iterations"]]
    if others:
        fastest = min(others, key=lambda row: row[clock])
        print(f"fastest other at equal error: {fastest['solver']}, {fastest[clock] / base:.2f} times ours", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--inputs", nargs="+", default=["page", "noise"], choices=["page", "features", "noise"])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--error", type=float, default=1e-4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--limit", type=float, default=3.0, help="processor seconds that one call may take")
    parser.add_argument("--no-memory", action="store_true", help="leave out the child processes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("SOLVER", "COST"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.child:
        torch.set_num_threads(options.threads[0])
        with threadpool_limits(options.threads[0]):
            child(*options.child, options.error)
        return
    if geomloss_solve_batch is None:
        print("geomloss >= 0.3 is not installed and left out: pip install geomloss")
    tables = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        with threadpool_limits(threads):
            for kind in options.inputs:
                for n in options.sizes:
                    tables.append(measure(kind, n, threads, options))
                    show(tables[-1])
    save(options.json, {"error": options.error, "rows": [row for table in tables for row in table]})


if __name__ == "__main__":
    main()
