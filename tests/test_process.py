"""What a process is told about itself."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from evlecg.process import peak_bytes


def test_a_peak_is_the_programs_own_and_not_that_of_the_one_which_started_it():
    before = peak_bytes()
    held = np.ones(300_000_000, np.uint8)
    assert peak_bytes() >= before and held[-1] == 1
    code = "from evlecg.process import peak_bytes; print(peak_bytes())"
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 1e6 < child < 2e8 < peak_bytes()
