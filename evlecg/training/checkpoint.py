"""RUN/checkpoints/step-N: everything that a run goes on from, to the bit; whole, or not there.

accelerate writes the state (student, objective, optimizer, gradient scaler, schedule, random states) under a temporary
name, `position.json` beside it says where in the data the run stands, and `manifest.json` comes last, with the size and
SHA-256 of every file. All of it is on the disk before the folder takes its name. A checkpoint that was damaged later
(cut off, a flipped bit, a file gone) is therefore known before anything is loaded from it, and the next older one is
taken.

The order of the records and their disturbances are functions of seed and epoch, and no state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evlecg.errors import EvlecgError, RunFailed
from evlecg.files import sha256_file, to_disk
from evlecg.progress import Progress
from evlecg.recipe import CheckpointConfig
from evlecg.training.step import Job, Position

FOLDER, MANIFEST, POSITION = "checkpoints", "manifest.json", "position.json"
FORMAT_VERSION = 1


def save(job: Job, state: Position, out: Path) -> None:
    """Writes checkpoints/step-N, then drops those that are no longer kept.

    Raises:
        RunFailed: it cannot be written; the older checkpoints are what they were.
    """
    from safetensors import SafetensorError

    folder = _folder(out, state.step)
    partial = folder.with_name(f".{folder.name}.partial")  # one name that all processes know
    accelerator = job.accelerator
    try:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        with _without_tied_weights_advice():
            accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (partial / POSITION).write_text(json.dumps(dataclasses.asdict(state)) + "\n", encoding="utf-8")
            manifest = {"format": FORMAT_VERSION, "run": _run(job), "files": _files(partial)}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            to_disk(partial)
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one, whose steps were taken again
            partial.rename(folder)
            to_disk(folder.parent)
            _drop_old(out, state, job.recipe.checkpoint)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        if "DataLoader" in str(error):  # a loader process died at this moment
            raise
        kept = sorted(path.name for path in (out / FOLDER).glob("step-*"))
        raise RunFailed(
            f"the checkpoint of step {state.step} cannot be written: {_reason(error)}", where=folder,
            hint=f"{_room(out)}; " + (f"{kept[-1]} is whole: make room and go on with --resume" if kept else
                                      "there is no older one"),
        ) from error  # fmt: skip
    accelerator.wait_for_everyone()


def restore(job: Job, out: Path, progress: Progress) -> Position:
    """Loads the newest whole checkpoint into the job; the beginning, where there is none.

    Raises:
        EvlecgError: it belongs to other data, or to another number of processes.
    """
    from accelerate.utils import broadcast_object_list

    found: list[Path | None] = [None]
    if job.accelerator.is_main_process:  # what a killed process was writing
        for stale in [*(out / FOLDER).glob(".step-*.partial"), *out.glob(".*.partial")]:
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        found = [newest(out, progress)]
    if job.accelerator.num_processes > 1:  # one reads them all to find it
        broadcast_object_list(found)
    folder = found[0]
    if folder is None:
        progress.info(f"{out} holds no checkpoint: starting from the beginning")
        return Position()
    made = _read(folder / MANIFEST)["run"]
    for what, before in made.items():
        now = _run(job)[what]
        if now != before:
            raise EvlecgError(f"the run to go on with has other {what}: {before}, not {now}", where=folder,
                              hint="start another run, with another --out")  # fmt: skip
    state = load(job, folder)
    progress.info(f"going on from step {state.step} ({folder})")
    return state


def load(job: Job, folder: Path) -> Position:
    """Puts a checkpoint's state into the job; returns where it stands.

    Raises:
        EvlecgError: the state is that of a run of another make.
    """
    import torch

    try:
        job.accelerator.load_state(str(folder))
    except (RuntimeError, KeyError, ValueError) as error:
        if isinstance(error, (torch.OutOfMemoryError, torch.distributed.DistError)):
            raise
        raise EvlecgError(
            f"the checkpoint does not fit: {(str(error).splitlines() or [type(error).__name__])[0]}", where=folder,
            hint="another version began the run: go on with that one, or begin anew with another --out",
        ) from error  # fmt: skip
    return Position(**_read(folder / POSITION))


def load_best(job: Job, state: Position, out: Path, progress: Progress) -> bool:
    """Puts the student of `state.best_step` back; False where that checkpoint is no longer whole."""
    assert state.best_step is not None
    folder = _folder(out, state.best_step)
    fault = _fault(folder)
    if fault is not None:
        progress.warn(f"the best checkpoint, {folder}, is damaged ({fault}): the last student is saved instead")
        return False
    load(job, folder)
    return True


def newest(out: Path, progress: Progress) -> Path | None:
    """The newest whole checkpoint of a run; a warning for every newer one."""
    for folder in sorted((out / FOLDER).glob("step-*"), reverse=True):
        fault = _fault(folder)
        if fault is None:
            return folder
        progress.warn(f"the checkpoint {folder} is damaged ({fault}): it is passed over")
    return None


def _folder(out: Path, step: int) -> Path:
    return out / FOLDER / f"step-{step:08d}"


def _run(job: Job) -> dict[str, Any]:
    """What must be the same for a position in the data to mean the same."""
    return {
        "data": job.prepared.fingerprint,
        "training records": len(job.builder.samples),
        "processes": job.accelerator.num_processes,
    }


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.rglob("*")) if path.is_file()
    }  # fmt: skip


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None for a whole one."""
    try:
        manifest = _read(folder / MANIFEST)
        if manifest["format"] != FORMAT_VERSION:
            return f"format {manifest['format']}, not {FORMAT_VERSION}"
        for name, said in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != said["bytes"]:
                return f"{name} holds {path.stat().st_size} bytes, not {said['bytes']}"
        for name, said in manifest["files"].items():
            if sha256_file(folder / name) != said["sha256"]:
                return f"{name} was changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"no readable {MANIFEST}"
    except EvlecgError as error:
        return error.what
    return None


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _drop_old(out: Path, state: Position, config: CheckpointConfig) -> None:
    best = state.best_step if state.best_step is not None else -1
    for old in sorted((out / FOLDER).glob("step-*"))[: -config.keep_last]:
        if old != _folder(out, best):
            shutil.rmtree(old)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _room(out: Path) -> str:
    return f"{shutil.disk_usage(out).free / 2**30:.2f} GiB are free there"


@contextlib.contextmanager
def _without_tied_weights_advice() -> Iterator[None]:
    """accelerate warns of tied weights, which `load_state` ties again."""
    log = logging.getLogger("accelerate.utils.other")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
