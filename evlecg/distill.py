"""The training job: check, build, loop, save. Accelerate is called, never subclassed; there is no trainer class."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evlecg.data.tasks import chosen_labels
from evlecg.errors import EvlecgError, RunFailed
from evlecg.files import new_folder, write_text_atomic
from evlecg.models import load as models
from evlecg.models.kinds import signal_config
from evlecg.models.trained import TrainedWith
from evlecg.progress import Progress
from evlecg.recipe import Recipe
from evlecg.report import environment
from evlecg.training.build import build, opened
from evlecg.training.cache import REHEARSED_STEPS
from evlecg.training.look import draw_figures, keep_spectra
from evlecg.training.step import Job, Position, grouped, loader, step, weak_terms

MOST_BAD_STEPS = 5  # consecutive non-finite losses that end a run


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, what it cost, and how the loss ended."""

    run: Path
    steps: int
    seconds: float
    n_train: int
    n_parameters: int
    last: dict[str, Any]


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
    """Trains a student and leaves a run folder: recipe.yaml, metrics.jsonl, student/, checkpoints/, run.json.

    With LoRA there is adapter/ too, in peft's layout; student/ holds the merged model.

    Args:
        recipe: what to do.
        data: prepared folder.
        out: run folder; it must be missing or empty, unless `resume` or `overwrite`.
        resume: go on from the newest checkpoint in `out`.
        overwrite: replace an older run, once everything that can be checked before the first step has been.
        force: go on where the memory estimate says that the run does not fit.
        progress: who listens.

    Raises:
        EvlecgError: bad input; nothing is left behind.
        RunFailed: the loss stopped being finite; checkpoints stay.
    """
    progress = progress or Progress()
    start_s = time.monotonic()
    prepared, samples, labels = opened(recipe, data)
    _check_out(out, resume, overwrite)
    # models load here; nothing is on disk yet
    job = build(recipe, prepared, samples, labels, progress, force=force)

    if overwrite and out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomic(out / "recipe.yaml", recipe.to_yaml())
    state = _restore(job, out, progress) if resume else Position()
    if state.step == 0:
        keep_spectra(job, out, "before")
    last = _loop(job, state, out, progress)
    keep_spectra(job, out, "after")
    draw_figures(job, out)

    if job.accelerator.is_main_process:
        _save_student(job, out)  # adapters are merged here
    seconds = time.monotonic() - start_s
    result = RunResult(out, state.step, seconds, len(samples), job.student.n_parameters, last)
    if job.accelerator.is_main_process:
        write_text_atomic(out / "run.json", json.dumps(_provenance(job, result, labels), indent=2) + "\n")
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
        estimated_s: seconds of the whole training; reports, control and export come on top.
    """

    checks: dict[str, Any]
    total_steps: int
    step_s: float
    teacher_s: float
    start_s: float
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
    estimated_s = start_s + job.teacher_s + job.total_steps * step_s
    return DryRun(job.checks, job.total_steps, step_s, job.teacher_s, start_s, estimated_s)


def _timed_steps(job: Job) -> float:
    """Takes `REHEARSED_STEPS` steps, loading included; the median seconds of those after the first.

    The first of a process also pays for allocators and kernels; a run of one step has no other.
    """
    from evlecg.models.adapt import train_mode
    from evlecg.models.batch import epoch_batches

    recipe, taken_s = job.recipe, []
    train_mode(job.student.model)
    batches = epoch_batches(
        len(job.builder.samples), recipe.train.batch_size, seed=recipe.seed, epoch=0,
        process=job.accelerator.process_index, processes=job.accelerator.num_processes,
    )  # fmt: skip
    groups = grouped(loader(job, batches[: REHEARSED_STEPS * recipe.train.accumulation], 0), recipe.train.accumulation)
    begun_s = time.monotonic()
    for group in groups:
        if step(job, group, Position(), diagnose=False, gradients=False) is None:
            raise RunFailed("the loss of a first step is not finite", where=recipe.name, hint="lower train.lr")
        taken_s.append(time.monotonic() - begun_s)
        begun_s = time.monotonic()
    return statistics.median(taken_s[1:] or taken_s)


def _loop(job: Job, state: Position, out: Path, progress: Progress) -> dict[str, Any]:
    """Steps from `state` to the end; returns the last logged row."""
    from evlecg.models.adapt import train_mode
    from evlecg.models.batch import epoch_batches

    recipe, accelerator = job.recipe, job.accelerator
    row: dict[str, Any] = {}
    bad_steps, saved_at = 0, state.step
    weak: set[str] = set()
    start_s, first_step = time.monotonic(), state.step
    train_mode(job.model)
    with _metrics_file(out, state.step) as log, progress.task(recipe.name, job.total_steps) as advance:
        advance(state.step)
        while state.step < job.total_steps:
            batches = epoch_batches(
                len(job.builder.samples), recipe.train.batch_size, seed=recipe.seed, epoch=state.epoch,
                process=accelerator.process_index, processes=accelerator.num_processes,
            )  # fmt: skip
            for group in grouped(loader(job, batches[state.batch :], state.epoch), recipe.train.accumulation):
                wants_row = state.step == first_step or (state.step + 1) % recipe.log.every == 0
                wants_gradients = recipe.log.gradients_every > 0 and state.step % recipe.log.gradients_every == 0
                told = step(job, group, state, diagnose=wants_row, gradients=wants_gradients)
                state.batch += len(group)
                if told is None:
                    bad_steps += 1
                    progress.warn(f"step {state.step + 1}: the loss is not finite; the batch is skipped")
                    if bad_steps >= MOST_BAD_STEPS:
                        raise RunFailed(f"the loss was not finite {bad_steps} times running", where=out,
                                        hint="lower train.lr; metrics.jsonl shows the terms")  # fmt: skip
                    continue
                bad_steps = 0
                state.step += 1
                for name, share in weak_terms(told.get("gradients", {})).items() if state.step > 1 else ():
                    if name not in weak:
                        weak.add(name)
                        progress.warn(f"step {state.step}: the term {name} is {share:.2%} of the gradient; raise its "
                                      "weight, or set objective.balance=gradnorm")  # fmt: skip
                if wants_row or wants_gradients:
                    row = {"step": state.step, "epoch": state.epoch, "seconds": time.monotonic() - start_s, **told}
                    if accelerator.is_main_process:
                        log.write(json.dumps(row) + "\n")
                        log.flush()
                advance(1, loss=f"{row['loss']:.3f}")
                if recipe.checkpoint.every and state.step % recipe.checkpoint.every == 0:
                    saved_at = _checkpoint(job, state, out)
                if state.step >= job.total_steps:
                    break
            else:
                state.epoch, state.batch = state.epoch + 1, 0
                if not recipe.checkpoint.every:
                    saved_at = _checkpoint(job, state, out)
        if saved_at != state.step:
            _checkpoint(job, state, out)
    return row


@contextlib.contextmanager
def _metrics_file(out: Path, step: int) -> Iterator[Any]:
    """metrics.jsonl, open for appending, without rows that a resumed run is about to write again."""
    path = out / "metrics.jsonl"
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if line and json.loads(line)["step"] <= step]
        write_text_atomic(path, "".join(line + "\n" for line in kept))
    with path.open("a", encoding="utf-8") as stream:
        yield stream


def _checkpoint(job: Job, state: Position, out: Path) -> int:
    """Writes checkpoints/step-N whole or not at all, then drops the oldest; returns the step."""
    folder = out / "checkpoints" / f"step-{state.step:08d}"
    partial = folder.with_name(f".{folder.name}.partial")  # one name that all processes know
    accelerator = job.accelerator
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    quiet = logging.getLogger("accelerate.utils.other")
    quiet.setLevel(logging.ERROR)  # it warns of tied weights, which load_state ties again
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_text_atomic(partial / "position.json", json.dumps(state.state_dict()) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        for old in sorted((out / "checkpoints").glob("step-*"))[: -job.recipe.checkpoint.keep_last]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return state.step


def _restore(job: Job, out: Path, progress: Progress) -> Position:
    found = sorted((out / "checkpoints").glob("step-*/position.json"))
    if not found:
        progress.info(f"{out} holds no checkpoint: starting from the beginning")
        return Position()
    job.accelerator.load_state(str(found[-1].parent))
    state = Position()
    state.load_state_dict(json.loads(found[-1].read_text()))
    progress.info(f"going on from step {state.step} ({found[-1].parent})")
    return state


def _save_student(job: Job, out: Path) -> None:
    """student/: what transformers loads, and nothing that only training needed; adapter/ beside it, with LoRA."""
    from evlecg.models.adapt import merge, save_adapter

    model = job.accelerator.unwrap_model(job.model)
    if job.adapted is not None:
        with new_folder(out / "adapter", overwrite=True) as partial:
            save_adapter(job.adapted, partial)
        model = merge(job.adapted)
    with new_folder(out / "student", overwrite=True) as partial:
        model.save_pretrained(partial)
        models.save_processor(job.student, partial)
        _trained_with(job).write(partial)


def _trained_with(job: Job) -> TrainedWith:
    recipe = job.recipe
    return TrainedWith(
        question=recipe.data.question,
        labels={name: job.prepared.label_descriptions[name] for name in chosen_labels(job.prepared, recipe.data)},
        page=dataclasses.replace(recipe.page, student_size=job.builder.student.size_px),
        kind=job.student.checkpoint.kind,
        signal=signal_config(job.student.form) if job.student.form is not None else None,
        method=recipe.effective_method,
        teacher=recipe.teacher if recipe.needs_teacher else None,
        recipe_fingerprint=recipe.fingerprint(),
    )


def _provenance(job: Job, result: RunResult, labels: tuple[str, ...]) -> dict[str, Any]:
    return {
        "recipe": job.recipe.name,
        "recipe_fingerprint": job.recipe.fingerprint(),
        "data": {
            "dataset": job.prepared.manifest["dataset"],
            "fingerprint": job.prepared.fingerprint,
            "labels": list(labels),
            "n_train": result.n_train,
        },
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        "checks": job.checks,
        "last": result.last,
        "environment": environment(),
    }


def _check_out(out: Path, resume: bool, overwrite: bool) -> None:
    if resume and not out.is_dir():
        raise EvlecgError("there is no run to resume", where=out, hint="leave --resume out to start one")
    if resume or not out.exists():
        return
    if not out.is_dir():
        raise EvlecgError("the run folder is a file", where=out, hint="choose another --out")
    if any(out.iterdir()) and not overwrite:
        raise EvlecgError("the run folder is not empty", where=out, hint="another --out, --resume or --overwrite")
    if any(out.iterdir()) and not (out / "recipe.yaml").is_file():
        raise EvlecgError("the folder to overwrite is not a run", where=out, hint="choose another --out")
