"""The processes that `accelerate launch` (or another launcher that sets RANK and WORLD_SIZE) has started together."""

from __future__ import annotations

import os
from typing import TypeVar

from evlecg.errors import EvlecgError

T = TypeVar("T")


def rank() -> int:
    """This process's place among them; the first one speaks and writes."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join() -> None:
    """Meets the others, and takes this process's device as the default one.

    Raises:
        EvlecgError: accelerate knows of another number of processes: each would work by itself, in the same folder.
    """
    if world() > 1:
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        known = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).num_processes
        if known != world():
            raise EvlecgError(f"{world()} processes were started, and accelerate shares work between {known}",
                              where="accelerate's config", hint="on CPUs: distributed_type: MULTI_CPU (FSDP needs GPUs)"
                              )  # fmt: skip


def gathered(items: list[T]) -> list[T]:
    """The items of all processes, on all of them: those of the first one come first. All have to call it."""
    if world() == 1:
        return items
    from accelerate.utils import gather_object

    join()
    return gather_object(items)


def from_first(value: T) -> T:
    """The first process's value, on all of them. All have to call it."""
    if world() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    join()
    return broadcast_object_list([value])[0]
