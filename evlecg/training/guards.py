"""What can go wrong in a run that was begun well, told in one line: labels, teacher, workers, disks, signals."""

from __future__ import annotations

import contextlib
import errno
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evlecg.errors import EvlecgError, RunFailed
from evlecg.schema import Batch
from evlecg.training.step import Job

# what the system says of a disk rather than of a mistake in the program
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
SHARED_MEMORY = ("shared memory", "shm", "bus error")


class StopRequest:
    """Whether this process, or one of those beside it, was told to stop."""

    def __init__(self) -> None:
        self.number: int | None = None

    def asked(self) -> bool:
        return self.number is not None

    def agreed(self, accelerator: Any) -> int | None:
        """The signal, the same on all processes: they must leave the loop after the same step."""
        if accelerator.num_processes == 1:
            return self.number
        import torch

        number = accelerator.reduce(torch.tensor(float(self.number or 0), device=accelerator.device), "sum")
        return (self.number or signal.SIGTERM) if float(number) else None


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Within it SIGTERM and SIGINT are requests that a loop looks for; the second SIGINT interrupts at once."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # Python hands signals to the main thread alone
        return

    def note(number: int, frame: Any) -> None:
        request.number = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def failures_told(out: Path) -> Iterator[None]:
    """Turns what a disk and loader processes raise into a `RunFailed` that says what to do.

    A worker's death can be raised between any two lines of a step, so nothing is saved on the way out.
    """
    try:
        yield
    except (ConnectionError, EOFError) as error:  # a worker that died while it handed a batch over
        raise _died(str(error)) from error
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise RunFailed(f"the run folder cannot be written to: {error.strerror}", where=error.filename or out,
                        hint="make room, then go on with --resume") from error  # fmt: skip
    except RuntimeError as error:
        said = str(error)
        if "DataLoader" not in said:
            raise
        if any(word in said.lower() for word in SHARED_MEMORY):
            what, hint = (
                "a loader process ran out of shared memory",
                ("enlarge /dev/shm (docker run --shm-size=8g), or set train.workers=0"),
            )
            raise RunFailed(f"{what}: {said.splitlines()[0]}", where="train.workers",
                            hint=f"{hint}; then go on with --resume") from error  # fmt: skip
        raise _died(said) from error


def _died(said: str) -> RunFailed:
    return RunFailed(f"a loader process died: {said.splitlines()[0] if said else 'without a word'}",
                     where="train.workers",
                     hint="out of memory? fewer train.workers need less; then go on with --resume")  # fmt: skip


def check_teacher(job: Job) -> None:
    """The teacher is frozen, and in eval mode to its last module.

    Raises:
        RunFailed: something has switched a part of it.
    """
    if job.teacher is None:
        return
    for name, module in job.teacher.model.named_modules():
        if module.training:
            raise RunFailed("a part of the teacher is in training mode", where=name or job.teacher.checkpoint.name,
                            hint="dropout would make its outputs noise: report this as a bug")  # fmt: skip
    moving = next((name for name, parameter in job.teacher.model.named_parameters() if parameter.requires_grad), None)
    if moving is not None:
        raise RunFailed("a part of the teacher would be trained", where=moving, hint="report this as a bug")


def check_answers(batch: Batch) -> None:
    """A batch has at least one answer token that the student is trained on.

    Raises:
        EvlecgError: every label is masked, and nothing but noise would be learnt.
    """
    if len(batch.student.answer_ids_A) == 0:
        raise EvlecgError("no answer token of the first batch is left to learn from: all labels are masked",
                          where=", ".join(batch.sample_ids[:3]),
                          hint="does the student's chat template leave the assistant's answer out?")  # fmt: skip
