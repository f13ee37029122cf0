"""Experiment trackers by name, through accelerate. They look on: a run never fails because a tracker does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evlecg.errors import EvlecgError
from evlecg.progress import Progress
from evlecg.recipe import nearest
from evlecg.training.step import Job

FOLDER = "trackers"  # in the run folder, for those that write files


def check_trackers(names: tuple[str, ...]) -> None:
    """Are they known to accelerate, and installed?

    Raises:
        EvlecgError: one is not.
    """
    if not names:
        return
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known = [name for name in LoggerType.list() if name != "all"]
    installed = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in known:
            raise EvlecgError(f"unknown tracker {name!r}", where="track", hint=nearest(name, known))
        if name not in installed:
            raise EvlecgError(f"the tracker {name} is not installed", where="track", hint=f"pip install {name}")


class Tracking:
    """Sends rows of metrics.jsonl on to accelerate's trackers, until one of them fails."""

    def __init__(self, accelerator: Any, progress: Progress) -> None:
        self.accelerator = accelerator
        self.progress = progress
        self.works = bool(accelerator.trackers)

    def log(self, row: Mapping[str, Any]) -> None:
        """Sends one row, its nested values under `section/name`."""
        if not self.works:
            return
        try:
            self.accelerator.log(_flat(row), step=row["step"])
        except Exception as error:  # a service that is down, a full disk: whatever a client may raise
            self.works = False
            self.progress.warn(f"tracking has ended: {type(error).__name__}: {error}")


@contextlib.contextmanager
def tracking(job: Job, out: Path, step: int, progress: Progress) -> Iterator[Tracking]:
    """Starts the recipe's trackers for a run that stands at `step`, and ends them.

    Raises:
        EvlecgError: one cannot be started.
    """
    from accelerate.tracking import filter_trackers

    accelerator, recipe = job.accelerator, job.recipe
    accelerator.trackers = []
    if recipe.track:
        accelerator.project_configuration.logging_dir = str(out / FOLDER)
        accelerator.log_with = filter_trackers(list(recipe.track), str(out / FOLDER))
        # what a killed run wrote after its last checkpoint is about to be written again
        again = {"tensorboard": {"purge_step": step + 1}} if step else {}
        plain = {key: value if isinstance(value, (bool, int, float, str)) else str(value)
                 for key, value in recipe.flat().items()}  # fmt: skip
        try:
            accelerator.init_trackers(recipe.name, config=plain, init_kwargs=again)
        except Exception as error:
            raise EvlecgError(f"a tracker cannot be started: {type(error).__name__}: {error}", where="track",
                              hint="set track=[] to go without") from error  # fmt: skip
    told = Tracking(accelerator, progress)
    try:
        yield told
    finally:
        for tracker in accelerator.trackers:
            with contextlib.suppress(Exception):
                tracker.finish()
        accelerator.trackers = []


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Numbers of a nested mapping under `outer/inner`."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            found[f"{prefix}{name}"] = value
    return found
