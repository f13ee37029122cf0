"""Running a study: every cell in a process of its own; what came of them is told in `tell`."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evlecg.errors import RunFailed, Stopped
from evlecg.files import locked, write_text_atomic
from evlecg.pipeline import training_data
from evlecg.progress import Progress
from evlecg.recipe import load_recipe
from evlecg.study.plan import Cell, Study, choose, final_cells, tune_cells
from evlecg.study.tell import aucs, check_stated, result_of, write_told
from evlecg.training.guards import StopRequest, stop_requests

TOLD_ERROR_CHARS = 2000
POLL_S = 0.5
REFUSED = 2  # exit code of bad input
STOPPED = {128 + signal.SIGTERM, 128 + signal.SIGINT}  # exit codes of a run that saved and can go on


def run_study(study: Study, *, out: Path, workers: int = 1, threads: int = 1, progress: Progress | None = None) -> dict:
    """Runs what is not done yet, and writes what `write_told` does.

    Args:
        study: from `load_study`.
        out: study folder; one that holds the same study is gone on with.
        workers: cells at the same time.
        threads: torch threads a cell.
        progress: who listens.

    Returns:
        The content of results.json.

    Raises:
        EvlecgError: the folder holds another study, or what is in both was changed, or another process is at it.
        Stopped: by SIGTERM or SIGINT, which the runs were told, too.
        RunFailed: runs were killed from outside.
    """
    progress = progress or Progress()
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".lock", out):
        return _run_study(study, out, workers, threads, progress)


def _run_study(study: Study, out: Path, workers: int, threads: int, progress: Progress) -> dict[str, Any]:
    stated = out / "study.json"
    if stated.exists():
        check_stated(study, out)
    write_text_atomic(stated, json.dumps(dataclasses.asdict(study), indent=2) + "\n")
    data = {pair: str(training_data(load_recipe(study.recipe, dict(keys)), progress).resolve())
            for pair, keys in study.pairs.items()}  # fmt: skip
    results: dict[str, dict[str, Any]] = {}
    try:
        tuned = tune_cells(study)
        _run(study, tuned, results, out, data, workers, threads, progress)
        chosen = choose(study, [results[cell.key] for cell in tuned])
        _run(study, final_cells(study, chosen), results, out, data, workers, threads, progress)
        for pair in study.pairs:
            _score_teacher(study, pair, out, data[pair], threads)
    finally:  # what is done is told, also of a study that was stopped
        told = write_told(study, out)
    return told


def _run(
    study: Study, cells: Sequence[Cell], results: dict[str, dict[str, Any]], out: Path, data: Mapping[str, str],
    workers: int, threads: int, progress: Progress,
) -> None:  # fmt: skip
    """Fills in the results of all cells by their keys; those without one are run, `workers` at a time."""
    waiting = []
    for cell in cells:
        result = result_of(out, cell)
        if result is not None:
            results[cell.key] = result
        else:
            waiting.append(cell)
    if waiting:
        with (
            stop_requests() as request,
            progress.task(f"{study.name}: {waiting[0].stage}", len(waiting)) as advance,
            concurrent.futures.ThreadPoolExecutor(workers) as pool,
        ):
            running = {
                pool.submit(_run_cell, study, cell, out, data[cell.pair], threads, request): cell for cell in waiting
            }
            for done in concurrent.futures.as_completed(running):
                try:
                    cell, result = running[done], done.result()
                except BaseException:
                    request.number = request.number or signal.SIGTERM  # the pool would run all that wait, first
                    raise
                if result is None:
                    continue
                results[cell.key] = result
                if result["auc"] is None:
                    progress.warn(f"{cell.key} failed: {_last_line(result['error'])}")
                advance(1, last=f"{cell.method} {result['auc'] or float('nan'):.3f}")
        left = [cell for cell in cells if cell.key not in results]
        if request.number is not None:
            raise Stopped(f"stopped by signal {request.number}, with {len(left)} of {len(cells)} runs of a stage left",
                          where=out, number=request.number, hint="the same command goes on")  # fmt: skip
        if left:
            raise RunFailed(f"{len(left)} of {len(cells)} runs were killed from outside", where=out,
                            hint="out of memory? fewer --workers; the same command goes on")  # fmt: skip


def _run_cell(
    study: Study, cell: Cell, out: Path, data: str, threads: int, request: StopRequest
) -> dict[str, Any] | None:
    """One cell in a process of its own; its result is kept, its weights are not. None: stopped, and can go on."""
    if request.asked():
        return None
    folder = out / "cells" / cell.key
    folder.mkdir(parents=True, exist_ok=True)
    split = "val" if cell.stage == "tune" else "test"
    keys = {
        **study.pairs[cell.pair], **study.methods[cell.method].set, **cell.configuration, "seed": cell.seed,
        "data.dir": data, "data.max_train": cell.size, "threads": threads, "name": cell.key, "finish.control": False,
        "finish.teacher": False, "finish.export": False, "finish.eval_split": split, "log.figures": False,
        "finish.thresholds_from": "none",  # a cell is one AUC: nothing is chosen on validation
    }  # fmt: skip
    layer = load_recipe(study.recipe, keys).objective.visual_layer
    # the teacher runs once a pair; what it gave is kept as it was, so that no cell depends on which came first
    cache = (out / "caches" / (cell.pair if layer == -1 else f"{cell.pair}-layer{layer}")).resolve()
    keys |= {"cache.dir": str(cache), "cache.compression": "none", "cache.several_prompts": True}
    recipe = load_recipe(study.recipe, keys)
    write_text_atomic(folder / "recipe.yaml", recipe.to_yaml())
    run = folder / "run"
    command = [sys.executable, "-m", "evlecg.cli", "distill", "--recipe", str(folder / "recipe.yaml"), "--quiet",
               "--out", str(run), "--json", *(["--resume"] if run.is_dir() else [])]  # fmt: skip
    code, error = _watched(command, threads, request)
    if code == REFUSED and "--resume" in command:  # begun by another version, or beside other files: from the start
        aside = folder / "refused"
        shutil.rmtree(aside, ignore_errors=True)
        run.rename(aside)
        told = error
        code, error = _watched([word for word in command if word != "--resume"], threads, request)
        if code == REFUSED:  # neither: what it had is worth more than a failure that may pass
            shutil.rmtree(run, ignore_errors=True)
            aside.rename(run)
            raise RunFailed(f"a run can neither go on nor begin anew: {_last_line(error)}", where=run,
                            hint=f"going on: {_last_line(told)}")  # fmt: skip
        shutil.rmtree(aside, ignore_errors=True)
    if code in STOPPED or code < 0:  # it saved; or it was killed, by hand or for memory
        return None
    result: dict[str, Any] = {**dataclasses.asdict(cell), "recipe_fingerprint": recipe.fingerprint(), "auc": None,
                              "accuracy": None, "labels": None, "seconds": None, "error": None}  # fmt: skip
    reports = list((run / "report").glob("*/report.json"))
    if code == 0 and reports:
        report = json.loads(reports[0].read_text())
        result["auc"], result["labels"] = aucs(report)
        result["accuracy"] = report["metrics"]["decisions"]["as_answered"]["accuracy"]["overall"]["exact"]["value"]
        result["seconds"] = json.loads((run / "run.json").read_text())["seconds"]
    else:
        result["error"] = (error or f"exit code {code}")[-TOLD_ERROR_CHARS:]
    for heavy in ("checkpoints", "student"):
        shutil.rmtree(run / heavy, ignore_errors=True)
    write_text_atomic(out / "cells" / f"{cell.key}.json", json.dumps(result, indent=1) + "\n")
    return result


def _watched(command: Sequence[str], threads: int, request: StopRequest) -> tuple[int, str]:
    """Exit code and stderr of a run, which is asked to stop where the study is."""
    asked = False
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=_environment(threads)
    ) as running:
        while True:
            try:
                error = running.communicate(timeout=POLL_S)[1]
                return running.returncode, error
            except subprocess.TimeoutExpired:
                if request.asked() and not asked:
                    asked = True
                    running.terminate()


def _last_line(error: str) -> str:
    return (error.strip().splitlines() or ["?"])[-1]


def _score_teacher(study: Study, pair: str, out: Path, data: str, threads: int) -> None:
    """Scores a pair's teacher on the test split, where that is not done yet."""
    recipe = load_recipe(study.recipe, dict(study.pairs[pair]))
    folder = out / "teachers" / pair
    if recipe.teacher == "none" or (folder / "report.json").exists():
        return
    command = [sys.executable, "-m", "evlecg.cli", "eval", "--dataset", data, "--model", recipe.teacher, "--quiet",
               "--split", "test", "--thresholds-from", "none", "--out", str(folder)]  # fmt: skip
    if recipe.data.labels:
        command += ["--labels", ",".join(recipe.data.labels)]
    subprocess.run(command, capture_output=True, check=False, env=_environment(threads))


def _environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
