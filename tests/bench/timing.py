"""One thread, ways taken in turns, medians with their range: what every benchmark here shares.

The clock counts the process's own time on the processor: what a way costs a core, whatever else the machine does.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def one_thread() -> None:
    """Pins every numerical library to one thread; call before anything is timed."""
    import cv2
    import torch

    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def timed(ways: Mapping[str, Callable[[int], Any]], rounds: Mapping[str, int] | int) -> dict[str, list[float]]:
    """Processor milliseconds of every call. Ways take turns, so that other work on the machine falls on all of them.

    Args:
        ways: name -> what is timed; it gets the number of the round. Each is called once before, untimed.
        rounds: how often, for all or by name.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    wanted = {name: rounds if isinstance(rounds, int) else rounds[name] for name in ways}
    for call in ways.values():
        call(0)
    for number in range(max(wanted.values())):
        for name, call in ways.items():
            if number < wanted[name]:
                start_s = time.process_time()
                call(number)
                times[name].append((time.process_time() - start_s) * 1e3)
    return times


def told(times: Mapping[str, list[float]], against: str) -> dict[str, Any]:
    """Median, fastest and slowest call of every way, and its median over that of `against`."""
    base_ms = statistics.median(times[against])
    return {
        name: {
            "median_ms": statistics.median(values), "min_ms": min(values), "max_ms": max(values), "n": len(values),
            "ratio": statistics.median(values) / base_ms,
        }
        for name, values in times.items()
    }  # fmt: skip


def print_table(rows: Mapping[str, Mapping[str, float]], against: str) -> None:
    width = max(map(len, rows))
    print(f"{'':{width}}  {'CPU ms':>10}  {'min':>9}  {'max':>9}  {'n':>4}  x {against}")
    for name, row in rows.items():
        print(
            f"{name:{width}}  {row['median_ms']:10.2f}  {row['min_ms']:9.2f}  {row['max_ms']:9.2f}  {row['n']:4}"
            f"  {row['ratio']:.2f}"
        )


def save(path: Path | None, result: Mapping[str, Any]) -> None:
    """Writes the result with what it was measured on."""
    if path is None:
        return
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
               "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
               "python": platform.python_version()}  # fmt: skip
    path.write_text(json.dumps({**result, "machine": machine}, indent=2) + "\n", encoding="utf-8")
