"""Kills a training run with SIGKILL at random moments, again and again, and compares what comes out in the end.

    python -m tests.bench.kill [--kills N] [--recipe tiny|quickstart] [--seed S] [--workers N] [--json FILE]

An uninterrupted run and one that is killed N times within its first epoch and resumed each time, both on one thread and
in processes of their own; a kill comes at a random moment after a random step, which is as often as not while a
checkpoint is being written. Exit code 0: the students' files have the same SHA-256.

`tiny` trains adapters (with dropout) on every term of the objective, balanced, with a remembering teacher and
evaluations on validation records; `quickstart` is the shipped recipe on fewer records.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from evlecg.distill import distill
from evlecg.files import sha256_file
from evlecg.prepare import prepare
from evlecg.progress import Progress
from evlecg.recipe import Recipe, load_recipe, parse_set
from tests import tiny

FORKED = multiprocessing.get_context("fork")  # torch is imported once; this process computes nothing
RECORDS = {"tiny": 32, "quickstart": 256}  # of an epoch; there are two
PATIENCE_S = 600  # for a step
PRELOADED = (  # here once, rather than in every child
    "evlecg.training.checkpoint", "evlecg.models.checks", "evlecg.models.memory", "evlecg.losses.objective",
    "accelerate", "peft", "transformers.models.idefics3.modeling_idefics3", "transformers.models.llava.modeling_llava",
    "transformers.models.clip.modeling_clip", "transformers.models.llama.modeling_llama",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill a run at random moments, resume it, compare the student.")
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--recipe", choices=tuple(RECORDS), default="tiny")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--workers", type=int, default=0, help="loader processes of the runs")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    for module in PRELOADED:
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as work:
        found = compare(Path(work), given.recipe, given.kills, random.Random(given.seed), given.workers)
    width = len("killed and resumed")
    print(f"{'uninterrupted':<{width}} {found['steps']} steps  {found['expected']}")
    for place, kill in enumerate(found["kills"], start=1):
        print(f"{f'kill {place}':<{width}} after row of step {kill['step']}; newest checkpoint: {kill['newest']}"
              f"{kill['partial']}")  # fmt: skip
    print(f"{'killed and resumed':<{width}} {found['steps']} steps  {found['found']}")
    print("the students are the same to the bit" if found["same"] else "THE STUDENTS DIFFER")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(0 if found["same"] else 1)


def compare(work: Path, name: str, kills: int, moments: random.Random, workers: int = 0) -> dict[str, Any]:
    """Trains twice, once with `kills`; hashes of both students, and when the kills came."""
    _in_child(_prepare, work, name)
    chosen, per_epoch = _recipe(work, name, workers)
    _in_child(_train, chosen, work, work / "whole", False)
    killed, told = work / "killed", []
    for place in range(kills):
        child = FORKED.Process(target=_train, args=(chosen, work, killed, killed.is_dir()))
        child.start()
        reached = _steps(killed)
        target = min(reached + moments.randint(1, max(1, (per_epoch - reached) // (kills - place))), per_epoch)
        begun_s = time.monotonic()
        while child.is_alive() and _steps(killed) < target:
            assert time.monotonic() - begun_s < PATIENCE_S, f"step {target} does not come"
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.15))
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        names = sorted(path.name for path in (killed / "checkpoints").glob("*"))
        told.append({
            "step": _steps(killed),
            "newest": next((found for found in reversed(names) if found.startswith("step")), "none"),
            "partial": ", one half written" if any(found.startswith(".") for found in names) else "",
        })  # fmt: skip
    _in_child(_train, chosen, work, killed, killed.is_dir())
    hashes = [sha256_file(run / "student" / "model.safetensors") for run in (work / "whole", killed)]
    return {
        "recipe": name, "steps": json.loads((killed / "run.json").read_text())["steps"], "kills": told,
        "expected": hashes[0], "found": hashes[1], "same": hashes[0] == hashes[1],
    }  # fmt: skip


def _recipe(work: Path, name: str, workers: int) -> tuple[Recipe, int]:
    """The recipe and its steps an epoch."""
    batch = 4 if name == "tiny" else 16
    sets = ["train.epochs=2", f"train.batch_size={batch}", "log.every=1", "checkpoint.every=2", "threads=1",
            f"train.workers={workers}", "log.figures=false"]  # fmt: skip
    if name == "tiny":
        sets += [f"teacher={work / 'llava'}", f"student={work / 'idefics3'}", "data.labels=[NORM, MI]", "lora.rank=4",
                 "train.remember_teacher=true", "objective.lambda_m=0.3", "objective.lambda_ot=0.5", "train.lr=1e-3",
                 "objective.balance=gradnorm", "objective.balance_every=3", "evaluate.every=7"]  # fmt: skip
    return load_recipe("quickstart" if name == "quickstart" else None, parse_set(sets)), RECORDS[name] // batch


def _prepare(work: Path, name: str) -> None:
    if name == "tiny":
        for family in ("llava", "idefics3"):
            tiny.FAMILIES[family](work / family)
    prepare("synthetic", source=None, out=work / "data", counts={"train": RECORDS[name], "val": 16, "test": 1}, seed=3)


def _train(recipe: Recipe, work: Path, out: Path, resume: bool) -> None:
    distill(recipe, data=work / "data", out=out, resume=resume, progress=_Warnings())


class _Warnings(Progress):
    def warn(self, message: str) -> None:
        print(f"  {message}", file=sys.stderr)


def _in_child(target: Any, *arguments: Any) -> None:
    child = FORKED.Process(target=target, args=arguments)
    child.start()
    child.join()
    if child.exitcode:
        sys.exit(f"{target.__name__} failed")


def _steps(run: Path) -> int:
    """The step of the last whole row of metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


if __name__ == "__main__":
    main()
