"""Benchmarks: one command each, `python -m tests.bench.NAME`; not part of the test suite. One thread."""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # read when the libraries are first imported
