"""Shared fixtures. Real recordings lie beside a checkout, never inside it."""

from __future__ import annotations

import os
from pathlib import Path

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
