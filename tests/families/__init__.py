"""Tiny checkpoints of every family, written as `tests.tiny` writes its own: config, seeded weights, real processor.

A builder is `NAME(folder, *, seed=0) -> Path`; modules hold families of a kin and end in their dict `BUILDERS`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

BUILDERS: dict[str, Callable[..., Path]] = {}
for _module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
    if _module.name.startswith("_"):
        continue
    _found = importlib.import_module(f"{__name__}.{_module.name}").BUILDERS
    assert not BUILDERS.keys() & _found.keys(), f"two builders for {BUILDERS.keys() & _found.keys()}"
    BUILDERS.update(_found)
