"""What the operating system says of this process."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_bytes() -> int:
    """The most that this process had resident in memory since it started its program.

    Linux hands the peak of `getrusage` on to the program that a process becomes: a small one that a large one started
    would be told as large. VmHWM begins anew.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak  # bytes there, KiB elsewhere
