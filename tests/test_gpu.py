"""What only a GPU can show: runs as a user starts them, on the GPU that the rest of the tests are kept away from.

On a machine without one these skip. The suite's other tests run on the CPU everywhere (conftest.py), as CI's does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny_classifiers

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
if os.environ["EVLECG_TEST_GPUS"] != "all":  # conftest.py
    ENVIRONMENT["CUDA_VISIBLE_DEVICES"] = os.environ["EVLECG_TEST_GPUS"]


def python(*arguments: object) -> str:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def gpu() -> str:
    """Its name."""
    found = python("-c", "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')")
    if not found.strip():
        pytest.skip("no GPU that PyTorch can use")
    return found.strip()


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("classifiers")
    return {name: tiny_classifiers.write(root / name, name) for name in ("vit", "wav2vec2", "patchtst")}


@pytest.mark.parametrize(
    ("teacher", "student"),
    [("llava", "idefics3"), ("qwen2_vl", "idefics3_tiles"), ("llava", "patchtst"), ("vit", "qwen2_vl"),
     ("wav2vec2", "vit")],
)  # fmt: skip
def test_a_run_from_start_to_report(gpu, checkpoints, classifiers, synthetic, tmp_path, teacher, student):
    known = checkpoints | classifiers
    run = tmp_path / "run"
    python(
        "-m", "evlecg.cli", "distill", "--teacher", known[teacher], "--student", known[student], "--data", synthetic,
        "--out", run, "--set", "train.max_steps=4", "--set", "train.batch_size=4", "--set", "objective.lambda_m=0.1",
        "--set", "data.labels=[NORM,MI,STTC,CD,HYP]", "--set", "train.mixed_precision=bf16", "--quiet",
    )  # fmt: skip
    told = json.loads((run / "run.json").read_text())
    assert told["sessions"][0]["device"].startswith("cuda")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["loss"] < 1e4 for line in lines)
    report = json.loads(next((run / "report").glob("*/report.json")).read_text())
    assert 0 <= report["metrics"]["auc"]["macro"]["value"] <= 1


def test_the_estimate_is_what_the_allocator_tells(gpu):
    """100M parameters; what small tensors waste (the allocator rounds to 512 bytes) does not show any more."""
    case = "100M pair, 2 rows"
    found = json.loads(python("-m", "tests.bench.memory", "--device", "cuda", "--measure", case).splitlines()[-1])
    assert found["alive"] / found["allocated"] == pytest.approx(1, abs=0.15)


def test_scores_are_those_of_the_cpu(gpu, checkpoints, synthetic, tmp_path):
    scores = {}
    for place, env in (("gpu", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": ""})):
        out = tmp_path / place
        command = [
            sys.executable, "-m", "evlecg.cli", "eval", "--dataset", str(synthetic), "--model",
            str(checkpoints["llava"]), "--split", "test", "--labels", "NORM,MI", "--out", str(out), "--quiet",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | env)
        assert done.returncode == 0, done.stderr[-3000:]
        scores[place] = json.loads((out / "report.json").read_text())["metrics"]["auc"]["macro"]["value"]
    assert scores["gpu"] == pytest.approx(scores["cpu"], abs=0.02)
