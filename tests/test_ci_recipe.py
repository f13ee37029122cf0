"""The refresh job puts a student into use, and leaves it there when the next one does not reach the gates."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="the job is a bash script")
def test_a_month_is_accepted_and_a_worse_one_is_not(tmp_path):
    def month(name: str, **settings: str) -> int:
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "EVLECG": f"{sys.executable} -m evlecg.cli", "DATASET": "synthetic",
            "PREPARE_ARGS": "--train 24 --val 8 --test 24", "TEACHER": "builtin:teacher", "STUDENT": "builtin:student",
            "DISTILL_ARGS": "--max-steps 2 --set data.labels=[NORM,MI,HYP] --set log.figures=false", "MONTH": name,
            **settings,
        }  # fmt: skip
        command = ["bash", str(ROOT / "recipes" / "ci" / "refresh.sh")]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode in (0, 3), done.stderr
        return done.returncode

    refresh = tmp_path / "refresh"
    assert month("2026-10", MIN_AUC="0") == 0
    assert (refresh / "current").resolve() == (refresh / "2026-10").resolve()
    assert (refresh / "current" / "student" / "model.safetensors").is_file()
    assert json.loads((refresh / "2026-10" / "report" / "report.json").read_text())["cost"]["parameters"] > 0

    # the next month reuses the run, so that the drop is exactly 0; the gate of the label is out of reach
    shutil.copytree(refresh / "2026-10" / "run", refresh / "2026-11" / "run")
    assert month("2026-11", MIN_AUC="0", MAX_DROP="0", GATE_ARGS="--min-label-auc MI=1") == 3
    assert (refresh / "current").resolve() == (refresh / "2026-10").resolve(), "the old student stays in use"
    assert not (refresh / "2026-11" / "student").exists()
    checks = json.loads((refresh / "2026-11" / "report" / "report.json").read_text())["gates"]["checks"]
    assert {check["name"]: check["met"] for check in checks} == {
        "--min-auc": True, "--min-label-auc MI": False, "--max-drop-vs": True,
    }  # fmt: skip
    assert checks[-1]["value"] == 0
    assert xml.parse(refresh / "2026-11" / "gates.xml").getroot().get("failures") == "1"
