"""The training job: check, build, loop, save. Accelerate is called, never subclassed; there is no trainer class."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evlecg.errors import EvlecgError, RunFailed, Stopped
from evlecg.files import write_text_atomic
from evlecg.progress import Progress
from evlecg.recipe import Recipe, check_resumed, load_recipe
from evlecg.training import checkpoint
from evlecg.training.build import build, opened
from evlecg.training.cache import REHEARSED_STEPS
from evlecg.training.guards import StopRequest, check_teacher, failures_told, stop_requests
from evlecg.training.look import draw_figures, keep_spectra
from evlecg.training.record import save_student, write_provenance
from evlecg.training.step import Job, Position, batches_of, grouped, loader, step, weak_terms
from evlecg.training.track import Tracking, tracking


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        run: its folder.
        steps: optimizer steps taken.
        seconds: of this session.
        n_train: training records.
        n_parameters: of the student.
        last: the last logged row of training.
        student: the step whose student was saved, and why that one.
    """

    run: Path
    steps: int
    seconds: float
    n_train: int
    n_parameters: int
    last: dict[str, Any]
    student: dict[str, Any]


def distill(
    recipe: Recipe,
    *,
    data: Path,
    out: Path,
    resume: bool = False,
    overwrite: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Trains a student and leaves a run folder.

    RUN/recipe.yaml        the recipe, resolved
    RUN/provenance.json    data, models and environment, of every session that worked on it
    RUN/metrics.jsonl      a row for every logged step, and one for every evaluation
    RUN/checkpoints/       what --resume goes on from
    RUN/student/           the trained model; with LoRA the adapters are merged, and stand in adapter/ in peft's layout
    RUN/run.json           how it ended: only a finished run has one

    Args:
        recipe: what to do.
        data: prepared folder.
        out: run folder; it must be missing or empty, unless `resume` or `overwrite`.
        resume: go on from the newest whole checkpoint in `out`, to the bit as if nothing had been in between.
        overwrite: replace an older run, once everything that can be checked before the first step has been.
        force: go on where the memory estimate says that the run does not fit.
        progress: who listens.

    Raises:
        EvlecgError: bad input; nothing is left behind.
        RunFailed: the loss stopped being finite, the disk is full, a loader process died; checkpoints stay.
        Stopped: SIGTERM or SIGINT came, and a checkpoint was written.
    """
    progress = progress or Progress()
    start_s = time.monotonic()
    prepared, samples, labels = opened(recipe, data)
    _check_out(recipe, out, resume, overwrite)
    # models load here; nothing is on disk yet
    job = build(recipe, prepared, samples, labels, progress, force=force)

    with failures_told(out):
        job.accelerator.wait_for_everyone()  # all have looked at `out`
        if job.accelerator.is_main_process:
            if overwrite and out.exists():
                shutil.rmtree(out)
            out.mkdir(parents=True, exist_ok=True)
        job.accelerator.wait_for_everyone()
        state = checkpoint.restore(job, out, progress) if resume else Position()
        made: dict[str, Any] = {}
        if job.accelerator.is_main_process:
            made = write_provenance(job, out, labels, state.step)
            write_text_atomic(out / "recipe.yaml", recipe.to_yaml())
        if state.step == 0:
            keep_spectra(job, out, "before")
        check_teacher(job)
        last = _loop(job, state, out, progress)
        student = _chosen_student(job, state, out, progress)
        keep_spectra(job, out, "after")
        draw_figures(job, out)

        save_student(job, out)  # adapters are merged here
        seconds = time.monotonic() - start_s
        result = RunResult(out, state.step, seconds, len(samples), job.student.n_parameters, last, student)
        if job.accelerator.is_main_process:
            ended = {
                "steps": state.step, "skipped": state.skipped, "seconds": round(seconds, 1), "student": student,
                "checks": job.checks, "last": last, "environment": made["sessions"][-1]["environment"],
            }  # fmt: skip
            write_text_atomic(out / "run.json", json.dumps(made | ended, indent=2) + "\n")
        job.accelerator.wait_for_everyone()
    return result


@dataclass(frozen=True)
class DryRun:
    """What a run would be: everything up to its first steps has happened, and nothing is on disk.

    Attributes:
        checks: the start-up checks, memory included.
        total_steps: optimizer steps of the whole run.
        step_s: median seconds of a measured step, without the first.
        teacher_s: seconds that the teacher takes to fill a cache (or memory), beyond what was rehearsed of it.
        start_s: seconds until the first step.
        evaluations: on validation records, in the whole run.
        evaluation_s: seconds of one, from its first batch.
        estimated_s: seconds of the whole training; reports, control, checkpoints and export come on top.
    """

    checks: dict[str, Any]
    total_steps: int
    step_s: float
    teacher_s: float
    start_s: float
    evaluations: int
    evaluation_s: float
    estimated_s: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def rehearse(recipe: Recipe, *, data: Path, force: bool = False, progress: Progress | None = None) -> DryRun:
    """Does what `distill` does up to and including its first steps, writes nothing, and says what the rest would take.

    Args:
        recipe, data, force, progress: as for `distill`.

    Raises:
        EvlecgError: bad input.
        RunFailed: the loss is not finite.
    """
    progress = progress or Progress()
    begun_s = time.monotonic()
    prepared, samples, labels = opened(recipe, data)
    job = build(recipe, prepared, samples, labels, progress, force=force, always_estimate=True)
    start_s = time.monotonic() - begun_s
    step_s = _timed_steps(job)
    evaluations, evaluation_s = 0, 0.0
    if job.validation is not None:
        evaluations = math.ceil(job.total_steps / recipe.evaluate.every)
        begun_s = time.monotonic()
        job.validation(progress, stopped=lambda: True)  # after its first batch
        evaluation_s = (time.monotonic() - begun_s) * job.validation.n_batches
    estimated_s = start_s + job.teacher_s + job.total_steps * step_s + evaluations * evaluation_s
    return DryRun(job.checks, job.total_steps, step_s, job.teacher_s, start_s, evaluations, evaluation_s, estimated_s)


def _timed_steps(job: Job) -> float:
    """Takes `REHEARSED_STEPS` steps, loading included; the median seconds of those after the first.

    The first of a process also pays for allocators and kernels; a run of one step has no other.
    """
    from evlecg.models.adapt import train_mode

    recipe, taken_s = job.recipe, []
    train_mode(job.student.model)
    batches = batches_of(job, 0)[: REHEARSED_STEPS * recipe.train.accumulation]
    groups = grouped(loader(job, batches, 0), recipe.train.accumulation)
    begun_s = time.monotonic()
    for group in groups:
        if step(job, group, Position(), diagnose=False, gradients=False) is None:
            raise RunFailed("the loss of a first step is not finite", where=recipe.name, hint="lower train.lr")
        taken_s.append(time.monotonic() - begun_s)
        begun_s = time.monotonic()
    return statistics.median(taken_s[1:] or taken_s)


def _loop(job: Job, state: Position, out: Path, progress: Progress) -> dict[str, Any]:
    """Steps from `state` to the end; returns the last logged row of training."""
    from evlecg.models.adapt import train_mode

    recipe, accelerator = job.recipe, job.accelerator
    saved_at = state.step
    weak: set[str] = set()
    start_s = time.monotonic()

    def keep() -> None:
        nonlocal saved_at
        if saved_at != state.step:
            checkpoint.save(job, state, out)
            saved_at = state.step

    with (
        _metrics_file(job, out, state.step) as log,
        tracking(job, out, state.step, progress) as tracker,
        progress.task(recipe.name, job.total_steps) as advance,
        stop_requests() as stop,
    ):
        log.tracker = tracker
        advance(state.step)
        _validate(job, state, log, stop, progress)  # a run that was stopped in an evaluation begins with it
        train_mode(job.model)
        while not _is_over(job, state):
            batches = batches_of(job, state.epoch)
            for group in grouped(loader(job, batches[state.batch :], state.epoch), recipe.train.accumulation):
                wants_row = state.step == 0 or (state.step + 1) % recipe.log.every == 0
                wants_gradients = recipe.log.gradients_every > 0 and state.step % recipe.log.gradients_every == 0
                told = step(job, group, state, diagnose=wants_row, gradients=wants_gradients)
                state.batch += len(group)
                _count(state, told is not None, recipe.train.most_bad, out, progress)
                improved = False
                if told is not None:
                    _warn_of_weak_terms(told, state, weak, progress)
                    if wants_row or wants_gradients:
                        seconds = time.monotonic() - start_s
                        log.write({"step": state.step, "epoch": state.epoch, "seconds": seconds, **told})
                    advance(1, loss=f"{log.last.get('loss', math.nan):.3f}")
                    improved = _validate(job, state, log, stop, progress)
                number = stop.agreed(accelerator)
                due = bool(recipe.checkpoint.every) and state.step % recipe.checkpoint.every == 0
                if due or improved or number:
                    keep()
                if number:
                    raise Stopped(f"stopped by signal {number} after step {state.step} of {job.total_steps}, and saved",
                                  where=out, hint="the same command with --resume goes on", number=number)  # fmt: skip
                if _is_over(job, state):
                    break
            else:
                state.epoch, state.batch = state.epoch + 1, 0
                if not recipe.checkpoint.every:
                    keep()
        keep()
    return log.last


def _is_over(job: Job, state: Position) -> bool:
    patience = job.recipe.evaluate.patience
    return state.step >= job.total_steps or 0 < patience <= state.unimproved


def _count(state: Position, moved: bool, most_bad: int, out: Path, progress: Progress) -> None:
    """Counts a step that was taken, or one that was skipped.

    Raises:
        RunFailed: too many were skipped running.
    """
    if moved:
        state.step, state.bad = state.step + 1, 0
        return
    state.skipped, state.bad = state.skipped + 1, state.bad + 1
    progress.warn(f"step {state.step + 1}: the loss or its gradient is not finite; the batch is skipped "
                  f"({state.skipped} so far)")  # fmt: skip
    if state.bad >= most_bad:
        raise RunFailed(f"the loss was not finite {state.bad} times running", where=out,
                        hint="lower train.lr; metrics.jsonl shows the terms")  # fmt: skip


def _warn_of_weak_terms(told: dict[str, Any], state: Position, weak: set[str], progress: Progress) -> None:
    for name, share in weak_terms(told.get("gradients", {})).items() if state.step > 1 else ():
        if name not in weak:
            weak.add(name)
            progress.warn(f"step {state.step}: the term {name} is {share:.2%} of the gradient; raise its "
                          "weight, or set objective.balance=gradnorm")  # fmt: skip


def _validate(job: Job, state: Position, log: _Log, stop: StopRequest, progress: Progress) -> bool:
    """Scores the validation records where that is due and has not been done; whether it was the best so far."""
    from evlecg.models.adapt import train_mode

    config = job.recipe.evaluate
    if job.validation is None or state.step in (0, state.validated):
        return False
    if state.step % config.every and state.step < job.total_steps:
        return False
    found = job.validation(progress, stopped=stop.asked)
    train_mode(job.model)
    if found is None:  # told to stop
        return False
    state.validated = state.step
    improved = state.best_auc is None or found.auc > state.best_auc
    if improved:
        state.best_step, state.best_auc, state.unimproved = state.step, found.auc, 0
    else:
        state.unimproved += 1
    log.write({"step": state.step, "epoch": state.epoch, "val_auc": found.auc, "val_records": found.n_records,
               "val_labels": found.labels, "best_step": state.best_step})  # fmt: skip
    progress.info(f"step {state.step}: macro AUC {found.auc:.4f} on {found.n_records} validation records"
                  + ("" if improved else f" (best: {state.best_auc:.4f} at step {state.best_step})"))  # fmt: skip
    return improved


def _chosen_student(job: Job, state: Position, out: Path, progress: Progress) -> dict[str, Any]:
    """Puts the student that is to be saved into the job; which one it is, and why."""
    patience = job.recipe.evaluate.patience
    early = f"; stopped after {patience} evaluations without a better one" if state.step < job.total_steps else ""
    best = {"best_step": state.best_step, "best_auc": state.best_auc}
    if state.best_step is None:
        return {"step": state.step, "why": "the last step"}
    if job.recipe.evaluate.keep == "last" or not checkpoint.load_best(job, state, out, progress):
        return {"step": state.step, "why": f"the last step{early}", **best}
    return {"step": state.best_step, "why": f"best macro AUC on validation records{early}", **best}


class _Log:
    """metrics.jsonl, and the trackers.

    Attributes:
        last: the last row of training.
        tracker: where rows go, too.
    """

    def __init__(self, stream: Any, last: dict[str, Any]) -> None:
        self.stream = stream
        self.last = last
        self.tracker: Tracking | None = None

    def write(self, row: dict[str, Any]) -> None:
        if "loss" in row:
            self.last = row
        if self.stream is not None:
            self.stream.write(json.dumps(row) + "\n")
            self.stream.flush()
        if self.tracker is not None:
            self.tracker.log(row)


@contextlib.contextmanager
def _metrics_file(job: Job, out: Path, step: int) -> Iterator[_Log]:
    """metrics.jsonl, without rows that a resumed run is about to write again; the main process appends to it."""
    path = out / "metrics.jsonl"
    rows = [row for row in map(_row, path.read_text(encoding="utf-8").splitlines()) if row and row["step"] <= step
            ] if path.exists() else []  # fmt: skip
    last = next((row for row in reversed(rows) if "loss" in row), {})
    if not job.accelerator.is_main_process:
        yield _Log(None, last)
        return
    if path.exists():
        write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
    with path.open("a", encoding="utf-8") as stream:
        yield _Log(stream, last)


def _row(line: str) -> dict[str, Any] | None:
    """A row of metrics.jsonl; None for one that a killed process did not finish."""
    with contextlib.suppress(ValueError):
        row = json.loads(line)
        return row if isinstance(row, dict) and "step" in row else None
    return None


def _check_out(recipe: Recipe, out: Path, resume: bool, overwrite: bool) -> None:
    try:
        if resume and not out.is_dir():
            raise EvlecgError("there is no run to resume", where=out, hint="leave --resume out to start one")
        if out.exists() and not out.is_dir():
            raise EvlecgError("the run folder is a file", where=out, hint="choose another --out")
        if resume and (out / "recipe.yaml").is_file():
            check_resumed(recipe, load_recipe(str(out / "recipe.yaml")), where=out)
        if not resume and out.exists() and any(out.iterdir()):
            if not overwrite:
                hint = "another --out, --resume or --overwrite"
                raise EvlecgError("the run folder is not empty", where=out, hint=hint)
            if not (out / "recipe.yaml").is_file():
                raise EvlecgError("the folder to overwrite is not a run", where=out, hint="choose another --out")
        there = next(folder for folder in (out, *out.resolve().parents) if folder.exists())
        # access rights do not tell of a read-only or full disk
        with tempfile.TemporaryDirectory(prefix=".evlecg-", dir=there) as probe:
            (Path(probe) / "probe").write_bytes(os.urandom(4096))
    except OSError as error:
        raise EvlecgError(f"the run folder cannot be written to: {error.strerror}", where=out,
                          hint="choose another --out") from error  # fmt: skip
