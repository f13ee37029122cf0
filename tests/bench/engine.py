"""Is the engine fast? Its step beside a bare loop, its loader beside its step, two processes beside one.

    python -m tests.bench.engine [--only step|loader|processes|padding|tower] [--rounds N] [--large] [--json FILE]

step       a step of the engine and a plain PyTorch step (forward passes, the same loss functions, backward, clipping,
           AdamW) on the same models, batches and optimizer, in turns, one thread; wanted: at most 1.03 times as long
loader     seconds that a training loop waits for its batches, over seconds of its steps, without and with a worker
processes  records a second of two processes of one thread (DDP, gloo) over those of one, in turns; wanted: at least
           1.8. Needs two cores that nothing else uses
padding    share of text positions that are padding, with and without batches of similar length
tower      images that the vision tower reads a page, with one question and with five

The pair is the quickstart's (`--large`: 108M LLaVA to 92M Idefics3, random weights, two rows; `step` only).
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evlecg.data.store import Prepared
from evlecg.models.batch import epoch_batches, text_length
from evlecg.models.outputs import AnswerHead, forward
from evlecg.progress import Progress
from evlecg.recipe import load_recipe, parse_set
from evlecg.training.build import build, opened
from evlecg.training.step import Position, batches_of, grouped, loader, step
from tests.bench.timing import one_thread, print_table, save, timed, told

MOST_RATIO, LEAST_GAIN = 1.03, 1.8
TERMS = ["objective.lambda_m=0.3", "objective.lambda_r=10", "objective.lambda_ot=0.1"]
TASKS = "data.tasks=[yes_no, choose_all, multiple_choice, report]"


def recipe(*sets: str) -> Any:
    fixed = {"threads": 1, "train.epochs": 1, "train.lr": 1e-4, "log.figures": False, "train.batch_size": 16}
    return load_recipe(None, fixed | parse_set([*TERMS, *sets]))


def made(folder: Path, chosen: Any) -> Any:
    return build(chosen, *opened(chosen, folder), Progress(), force=True)


def bare(job: Any, batch: Any) -> None:
    """What a loop written for these two models would do."""
    outputs = forward(job.student, batch.student)
    with torch.no_grad():
        taught = forward(job.teacher, batch.teacher)
    job.objective(outputs, taught, batch, output_head=AnswerHead(job.student)).total.backward()
    parameters = [p for part in job.optimizer.param_groups for p in part["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, job.recipe.train.clip)
    plain = getattr(job.optimizer, "optimizer", job.optimizer)
    plain.step()
    plain.zero_grad()


def large_job() -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText

    from evlecg.losses.objective import METHODS
    from evlecg.models.load import Loaded
    from evlecg.training.estimate import bare_job
    from evlecg.training.processes import optimizer_of
    from tests.real_configs import batch, kinds

    known = kinds()
    student, teacher = (
        Loaded(known[name].checkpoint, AutoModelForImageTextToText.from_config(known[name].config), None)
        for name in ("idefics3-100M", "llava-100M")
    )
    chosen = recipe()
    objective = METHODS["evl"](chosen.objective, student=student.facts, teacher=teacher.facts)
    job = bare_job(chosen, student, teacher, objective, optimizer_of(chosen, student.model, objective))
    return job, batch(known["idefics3-100M"], known["llava-100M"], 2, n_text=64)


def bench_step(folder: Path, rounds: int, large: bool) -> dict[str, Any]:
    if large:
        job, batch = large_job()
    else:
        job = made(folder, recipe())
        batch = job.builder(batches_of(job, 0)[0])
    state = Position(step=1)
    ways = {
        "bare loop": lambda number: bare(job, batch),
        "engine": lambda number: step(job, [batch], state, diagnose=False, gradients=False),
        # what the defaults add: a row every 10 steps, gradient norms every 50
        "engine, with its log": lambda n: step(job, [batch], state, diagnose=n % 10 == 0, gradients=n % 50 == 0),
    }
    times = timed(ways, rounds)
    rows = told(times, "bare loop")
    print_table(rows, "bare loop")
    pairs = [mine / other for mine, other in zip(times["engine"], times["bare loop"], strict=True)]
    ratio = statistics.median(pairs)
    mean = statistics.mean(times["engine, with its log"]) / statistics.mean(times["bare loop"])
    verdict = "met   " if ratio <= MOST_RATIO else "MISSED"
    print(f"{verdict}  a step is {ratio:.3f} of a bare one (median of {len(pairs)} pairs; at most {MOST_RATIO}); "
          f"with the log, mean over mean: {mean:.3f}")  # fmt: skip
    return {"rows": rows, "ratio": ratio, "with_log": mean}


def bench_loader(folder: Path) -> dict[str, Any]:
    found = {}
    for workers in (0, 1):
        job = made(folder, recipe(f"train.workers={workers}"))
        waited_s = stepped_s = 0.0
        groups = grouped(loader(job, batches_of(job, 0)[:20], 0), 1)
        next(groups)  # the first one starts the worker
        while True:
            begun_s = time.monotonic()
            group = next(groups, None)
            if group is None:
                break
            waited_s += time.monotonic() - begun_s
            begun_s = time.monotonic()
            step(job, group, Position(step=1), diagnose=False, gradients=False)
            stepped_s += time.monotonic() - begun_s
        found[workers] = waited_s / stepped_s
        print(f"{workers} workers: the loop waits {waited_s:.2f} s for batches, and steps {stepped_s:.2f} s "
              f"({found[workers]:.1%})")  # fmt: skip
    return {"waited_over_stepped": found}


def _rate(chosen: Any, folder: Path, steps: int) -> float:
    """Records a second over some steps, loading included; the first two are not counted."""
    job = made(folder, chosen)
    groups = grouped(loader(job, batches_of(job, 0)[: steps + 2], 0), 1)
    read = 0
    begun_s = 0.0
    for number, group in enumerate(groups):
        if number == 2:
            job.accelerator.wait_for_everyone()
            begun_s = time.monotonic()
        step(job, group, Position(step=1), diagnose=False, gradients=False)
        read += len(group[0].sample_ids) * job.processes if number >= 2 else 0
    job.accelerator.wait_for_everyone()
    return read / (time.monotonic() - begun_s)


def bench_processes(folder: Path, rounds: int, steps: int = 10) -> dict[str, Any]:
    from tests.test_processes import on_processes

    one_s, two_s = [], []
    for number in range(rounds):
        one_s.append(on_processes(_rate, recipe(), folder, steps, processes=1))
        two_s.append(on_processes(_rate, recipe(), folder, steps, processes=2))
        print(
            f"round {number}: one process {one_s[-1]:.1f}, two {two_s[-1]:.1f} records/s: {two_s[-1] / one_s[-1]:.2f}"
        )
    gain = statistics.median(two / one for one, two in zip(one_s, two_s, strict=True))
    print(f"{'met   ' if gain >= LEAST_GAIN else 'MISSED'}  two processes read {gain:.2f} times the records of one "
          f"(median of {rounds}; wanted at least {LEAST_GAIN})")  # fmt: skip
    return {"one": one_s, "two": two_s, "gain": gain}


def bench_padding(folder: Path) -> dict[str, Any]:
    job = made(folder, recipe(TASKS, "data.wording=varied", "data.max_questions=4", "teacher=none"))
    builder = dataclasses.replace(job.builder, teacher=None)
    lengths, found = [text_length(sample) for sample in builder.samples], {}
    n_batches = {}
    for bucket in (1, 50):
        padding = []
        batches = epoch_batches(len(lengths), 16, seed=0, epoch=0, lengths=lengths, bucket=bucket)
        for batch in batches:
            side = builder(batch).student
            padding.append([float((~side.valid_BS).sum()), side.valid_BS.numel()])
        n_batches[bucket] = len(batches)
        empty, all_positions = np.sum(padding, axis=0)
        found[bucket] = empty / all_positions
    print(f"padding: {found[1]:.1%} of positions in {n_batches[1]} batches as they come, {found[50]:.1%} in "
          f"{n_batches[50]} batches of similar length (positions of the image, never padded, included)")  # fmt: skip
    return {"padding": found}


def bench_tower(folder: Path) -> dict[str, Any]:
    found = {}
    for asked, labels in ((1, "[MI]"), (5, "[NORM, MI, STTC, CD, HYP]")):
        job = made(folder, recipe(f"data.labels={labels}"))
        batch = job.builder(range(8))
        for role, loaded, side in (("student", job.student, batch.student), ("teacher", job.teacher, batch.teacher)):
            seen = []
            patches = next(m for m in loaded.model.modules() if isinstance(m, torch.nn.Conv2d))
            handle = patches.register_forward_hook(lambda m, given, out, seen=seen: seen.append(len(given[0])))
            with torch.no_grad():
                forward(loaded, side)
            handle.remove()
            found[role, asked] = sum(seen) / 8
            print(f"{role}: {found[role, asked]:g} images through the tower a page with {asked} question(s)")
    return {"images_a_page": {f"{role}, {asked}": count for (role, asked), count in found.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("step", "loader", "processes", "padding", "tower"))
    parser.add_argument("--rounds", type=int, default=40, help="of the step; a tenth as many of the processes")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--data", type=Path, help="prepared folder; none: a synthetic one is made")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    one_thread()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        folder = given.data or Path(work) / "synthetic"
        if given.data is None:
            from evlecg.prepare import prepare

            prepare("synthetic", source=None, out=folder, counts={"train": 400, "val": 1, "test": 1}, seed=0)
        assert Prepared.open(folder)
        ways = {
            "processes": lambda: bench_processes(folder, max(1, given.rounds // 10)),
            "step": lambda: bench_step(folder, given.rounds, given.large),
            "loader": lambda: bench_loader(folder),
            "padding": lambda: bench_padding(folder),
            "tower": lambda: bench_tower(folder),
        }
        for name, way in ways.items():
            if given.only in (None, name):
                print(f"-- {name}")
                found[name] = way()
    save(given.json, found)


if __name__ == "__main__":
    main()
