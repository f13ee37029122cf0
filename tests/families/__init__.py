"""Tiny checkpoints of every family, written as `tests.tiny` writes its own: config, seeded weights, real processor.

A builder is `NAME(folder, *, seed=0) -> Path`; modules hold families of a kin and end in their dict `BUILDERS`, and may
have a dict `VARIANTS` of other forms in which a family's checkpoints come.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

BUILDERS: dict[str, Callable[..., Path]] = {}
VARIANTS: dict[str, Callable[..., Path]] = {}
for _module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
    if _module.name.startswith("_"):
        continue
    _kin = importlib.import_module(f"{__name__}.{_module.name}")
    assert not BUILDERS.keys() & _kin.BUILDERS.keys(), f"two builders for {BUILDERS.keys() & _kin.BUILDERS.keys()}"
    BUILDERS.update(_kin.BUILDERS)
    VARIANTS.update(getattr(_kin, "VARIANTS", {}))
