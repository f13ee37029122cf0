"""Shared fixtures. Real recordings lie beside a checkout, never inside it."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process a core runs the tests: more threads would only wait
# All but test_gpu.py is about arithmetic on a CPU, wherever it runs: a GPU is hidden before PyTorch looks for one.
# Workers of xdist begin in an environment that hides it already, so what was visible goes by a name of its own.
os.environ.setdefault("EVLECG_TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of recorded ECGs; the test skips where it is absent, and fails where CI promised it."""
    if not SHARED_DATA.is_dir():
        if os.environ.get("EVLECG_REQUIRE_SHARED") == "1":
            pytest.fail(f"EVLECG_REQUIRE_SHARED=1, but {SHARED_DATA} is missing")
        pytest.skip(f"recorded ECGs are not beside this checkout ({SHARED_DATA})")
    return SHARED_DATA


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny checkpoints on disk, one a family (and Idefics3 with tiles), all different in tokenizer and token count."""
    from tests import tiny

    root = tmp_path_factory.mktemp("checkpoints")
    made = {name: build(root / name) for name, build in tiny.FAMILIES.items()}
    return made | {"idefics3_tiles": tiny.idefics3(root / "idefics3_tiles", tiles=True)}


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared folder of synthetic records."""
    from evlecg.prepare import prepare

    out = tmp_path_factory.mktemp("data") / "synthetic"
    prepare("synthetic", source=None, out=out, counts={"train": 24, "val": 8, "test": 16}, seed=3)
    return out
