"""A study: pairs x methods x training sizes x seeds, tuned on validation records and told on test records.

Every cell is an ordinary run of `evlecg distill` in a process of its own, so a study can be killed and repeated: cells
that are done are read, cells that were stopped go on, and methods, seeds, sizes and pairs can be added later. What a
teacher gives is computed once a pair (`OUT/caches`). Two stages. *Tune*: every method tries its own grid, no more than
`budget` configurations, and is judged by macro AUC on the validation split. *Final*: the best configuration of every
method is trained with every seed and scored on the test split, which nothing has seen before. `results.json` holds
every cell, the failed ones too, and is all that the table is made from.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from evlecg.errors import EvlecgError, RunFailed, Stopped
from evlecg.files import write_text_atomic
from evlecg.metrics import OverSeeds, holm, over_seeds, seed_test
from evlecg.pipeline import training_data
from evlecg.progress import Progress
from evlecg.recipe import load_recipe, nearest, recipe_folder
from evlecg.training.guards import StopRequest, stop_requests

TOLD_ERROR_CHARS = 2000
POLL_S = 0.5
STOPPED = {128 + signal.SIGTERM, 128 + signal.SIGINT}  # exit codes of a run that saved and can go on


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        set: recipe keys that make it this method.
        tune: recipe key -> values that are tried, all combinations.
    """

    set: Mapping[str, Any] = field(default_factory=dict)
    tune: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def configurations(self) -> list[dict[str, Any]]:
        """Every combination of the grid, in a fixed order; one empty configuration where there is none."""
        keys = sorted(self.tune)
        return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(self.tune[k] for k in keys))]


@dataclass(frozen=True)
class Study:
    """What a study file says.

    Attributes:
        name: of the study.
        recipe: shipped recipe or YAML file that every cell starts from.
        pairs: name -> recipe keys (teacher, student, page sizes).
        methods: name -> method.
        sizes: training records; null for all.
        seeds: of the final stage.
        tune_seeds: of the tuning stage; a configuration is judged by its mean.
        budget: most configurations a method may try.
        reference: the method that stands for "no distillation".
        leader: the method that all others are tested against.
    """

    name: str
    recipe: str
    pairs: Mapping[str, Mapping[str, Any]]
    methods: Mapping[str, Method]
    sizes: tuple[int | None, ...] = (None,)
    seeds: tuple[int, ...] = (1, 2, 3)
    tune_seeds: tuple[int, ...] = (0,)
    budget: int = 6
    reference: str = "ce"
    leader: str = "evl"

    def __post_init__(self) -> None:
        for role in ("reference", "leader"):
            if getattr(self, role) not in self.methods:
                raise EvlecgError(f"the study has no method {getattr(self, role)!r}", where=role,
                                  hint=nearest(getattr(self, role), self.methods))  # fmt: skip
        for name, method in self.methods.items():
            tried = len(method.configurations())
            if tried > self.budget:
                raise EvlecgError(f"{tried} configurations are more than the budget of {self.budget}",
                                  where=f"methods.{name}.tune", hint="every method gets the same budget")  # fmt: skip
        shared = set(self.seeds) & set(self.tune_seeds)
        if shared and any(len(method.configurations()) > 1 for method in self.methods.values()):
            raise EvlecgError(f"seeds {sorted(shared)} both choose and tell", where="seeds",
                              hint="the final stage needs seeds of its own")  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    stage: str
    pair: str
    method: str
    size: int | None
    seed: int
    configuration: Mapping[str, Any]

    @property
    def key(self) -> str:
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return f"{self.stage}-{self.pair}-{self.method}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def find_study(name_or_path: str) -> Path:
    """A study file, or a shipped study's."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = {item.stem: item for item in (recipe_folder() / "studies").glob("*.yaml")}
    if name_or_path in shipped:
        return shipped[name_or_path]
    raise EvlecgError(f"unknown study {name_or_path!r}", hint=nearest(name_or_path, shipped))


def load_study(path: Path) -> Study:
    """Reads a study file, as strictly as a recipe.

    Raises:
        EvlecgError: not YAML, unknown or missing keys (naming the nearest).
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise EvlecgError("the study cannot be read", where=path, hint=str(error).split("\n")[0]) from error
    if not isinstance(tree, dict):
        raise EvlecgError("a study is a mapping of keys to values", where=path)
    known = {item.name: item for item in dataclasses.fields(Study)}
    _only(tree, known, where=str(path))
    missing = [name for name in ("name", "recipe", "pairs", "methods") if not tree.get(name)]
    if missing:
        raise EvlecgError(f"a study needs {', '.join(missing)}", where=path)
    methods = {}
    for name, method in tree.pop("methods").items():
        _only(method or {}, {"set": 0, "tune": 0}, where=f"{path}: methods.{name}")
        methods[name] = Method(**(method or {}))
    listed = {key: tuple(tree.pop(key)) for key in ("sizes", "seeds", "tune_seeds") if key in tree}
    recipe = tree.pop("recipe")
    beside = path.parent / str(recipe)
    study = Study(recipe=str(beside) if beside.is_file() else recipe, methods=methods, **listed, **tree)
    for pair, method in itertools.product(study.pairs, study.methods):  # a mistyped key fails now, not after hours
        for configuration in study.methods[method].configurations():
            load_recipe(study.recipe, {**study.pairs[pair], **study.methods[method].set, **configuration})
    return study


def run_study(study: Study, *, out: Path, workers: int = 1, threads: int = 1, progress: Progress | None = None) -> dict:
    """Runs what is not done yet, and writes results.json, table.md and the figure.

    Args:
        study: from `load_study`.
        out: study folder; one that holds the same study is gone on with.
        workers: cells at the same time.
        threads: torch threads a cell.
        progress: who listens.

    Returns:
        The content of results.json.

    Raises:
        EvlecgError: the folder holds another study, or what is in both was changed.
        Stopped: by SIGTERM or SIGINT, which the runs were told, too.
        RunFailed: runs were killed from outside.
    """
    progress = progress or Progress()
    out.mkdir(parents=True, exist_ok=True)
    told = json.loads(json.dumps(dataclasses.asdict(study)))
    stated = out / "study.json"
    if stated.exists():
        check_grown(json.loads(stated.read_text()), told, where=out)
    write_text_atomic(stated, json.dumps(told, indent=2) + "\n")
    data = {pair: str(training_data(load_recipe(study.recipe, dict(keys)), progress).resolve())
            for pair, keys in study.pairs.items()}  # fmt: skip
    results: list[dict[str, Any]] = []
    results += _run(study, tune_cells(study), out, data, workers, threads, progress)
    chosen = choose(study, results)
    results += _run(study, final_cells(study, chosen), out, data, workers, threads, progress)
    teachers = {pair: _teacher(study, pair, out, data[pair], threads) for pair in study.pairs}
    told = {"study": study.name, "chosen": chosen, "teachers": teachers, "cells": results}
    write_text_atomic(out / "results.json", json.dumps(told, indent=1) + "\n")
    write_text_atomic(out / "table.md", study_table(study, told))
    return told


def check_grown(before: Mapping[str, Any], now: Mapping[str, Any], *, where: Path) -> None:
    """A study may get new pairs, methods, sizes and seeds; what it had stays what it was, or its cells would lie.

    Raises:
        EvlecgError: something in both differs.
    """
    changed = [key for key in ("name", "recipe", "tune_seeds", "budget") if before[key] != now[key]]
    for kind in ("pairs", "methods"):
        shared = [name for name in before[kind] if name in now[kind]]
        changed += [f"{kind}.{name}" for name in shared if before[kind][name] != now[kind][name]]
    if changed:
        raise EvlecgError(f"the folder holds another study, or the same before {', '.join(changed)} changed",
                          where=where, hint="another --out")  # fmt: skip


def tune_cells(study: Study) -> list[Cell]:
    """The tuning stage; a method with one configuration has nothing to choose."""
    return [
        Cell("tune", pair, name, size, seed, configuration)
        for pair, size, (name, method) in itertools.product(study.pairs, study.sizes, study.methods.items())
        if len(method.configurations()) > 1
        for configuration, seed in itertools.product(method.configurations(), study.tune_seeds)
    ]


def choose(study: Study, results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The configuration of every pair, size and method with the best mean validation AUC; failed ones count as 0."""
    chosen = []
    for pair, size, (name, method) in itertools.product(study.pairs, study.sizes, study.methods.items()):
        scores = {}
        for place, configuration in enumerate(method.configurations()):
            found = [
                cell["auc"] or 0.0
                for cell in results
                if (cell["stage"], cell["pair"], cell["method"], cell["size"]) == ("tune", pair, name, size)
                and cell["configuration"] == configuration
            ]
            scores[place] = sum(found) / len(found) if found else 0.0
        best = max(scores, key=lambda place: (scores[place], -place))
        chosen.append({"pair": pair, "size": size, "method": name, "configuration": method.configurations()[best],
                       "validation_auc": scores[best] or None, "tried": len(scores)})  # fmt: skip
    return chosen


def final_cells(study: Study, chosen: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """The final stage: what was chosen, with every seed."""
    return [
        Cell("final", row["pair"], row["method"], row["size"], seed, row["configuration"])
        for row, seed in itertools.product(chosen, study.seeds)
    ]


def study_table(study: Study, told: Mapping[str, Any]) -> str:
    """The results as Markdown, from what results.json holds."""
    lines = [f"# {study.name}", ""]
    cells = [cell for cell in told["cells"] if cell["stage"] == "final"]
    tests = _tests(study, cells)
    for pair, size in itertools.product(study.pairs, study.sizes):
        here = [cell for cell in cells if (cell["pair"], cell["size"]) == (pair, size)]
        lines += [f"## {pair}, {size if size is not None else 'all'} training records", ""]
        heads = ("method", "macro AUC, mean ± sd over seeds", "seeds", f"minus {study.reference}",
                 f"{study.leader} minus this: mean (95% interval), p, p (Holm)", "tried")  # fmt: skip
        lines += ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
        teacher = told["teachers"].get(pair)
        if teacher is not None:
            lines.append(f"| teacher | {teacher:.3f} | | | | |")
        base = _by_seed(here, study.reference)
        for name in study.methods:
            scores = _by_seed(here, name)
            tried = next(row["tried"] for row in told["chosen"] if (row["pair"], row["size"], row["method"])
                         == (pair, size, name))  # fmt: skip
            if not scores:
                lines.append(f"| {name} | failed | 0 | | | {tried} |")
                continue
            summary = over_seeds(list(scores.values()))
            both = [scores[seed] - base[seed] for seed in scores if seed in base]
            gain = f"{sum(both) / len(both):+.3f}" if both and name != study.reference else ""
            lines.append(f"| {name} | {_summary(summary)} | {summary.n} | {gain} | "
                         f"{tests.get((pair, size, name), '')} | {tried} |")  # fmt: skip
        lines.append("")
    failed = [cell for cell in told["cells"] if cell["auc"] is None]
    seconds = sum(cell["seconds"] or 0 for cell in told["cells"])
    lines += [
        f"{len(told['cells'])} runs, {len(failed)} of them failed, {seconds / 3600:.2f} hours of runs in all. "
        "Configurations were chosen on the validation split, the table is of the test split. p: paired t-test over "
        f"seeds; Holm: corrected for the {len(tests)} comparisons of this table.",
        "",
    ]
    return "\n".join(lines)


def _tests(study: Study, cells: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int | None, str], str]:
    """The leader against every other method, Holm-corrected over the whole table, as text."""
    found = {}
    for pair, size, name in itertools.product(study.pairs, study.sizes, study.methods):
        here = [cell for cell in cells if (cell["pair"], cell["size"]) == (pair, size)]
        ours, theirs = _by_seed(here, study.leader), _by_seed(here, name)
        both = sorted(set(ours) & set(theirs))
        if name != study.leader and both:
            found[pair, size, name] = seed_test({study.leader: {seed: ours[seed] for seed in both},
                                                 name: {seed: theirs[seed] for seed in both}})  # fmt: skip
    corrected = holm([test.p for test in found.values()])
    told = {}
    for (key, test), adjusted in zip(found.items(), corrected, strict=True):
        text = f"{test.difference.mean:+.3f}"
        if test.difference.ci95 is not None:
            text += f" ({test.difference.ci95[0]:+.3f} to {test.difference.ci95[1]:+.3f})"
        if test.p is not None and adjusted is not None:
            text += f", {test.p:.3f}, {adjusted:.3f}"
        told[key] = text
    return told


def _run(
    study: Study, cells: Sequence[Cell], out: Path, data: Mapping[str, str], workers: int, threads: int,
    progress: Progress,
) -> list[dict[str, Any]]:  # fmt: skip
    """Results of all cells, in their order; those without one are run, `workers` at a time."""
    results: dict[str, dict[str, Any]] = {}
    waiting = []
    for cell in cells:
        path = out / "cells" / f"{cell.key}.json"
        if path.exists():
            results[cell.key] = json.loads(path.read_text())
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
                cell, result = running[done], done.result()
                if result is None:
                    continue
                results[cell.key] = result
                if result["auc"] is None:
                    progress.warn(f"{cell.key} failed: {(result['error'].strip().splitlines() or ['?'])[-1]}")
                advance(1, last=f"{cell.method} {result['auc'] or float('nan'):.3f}")
        left = [cell for cell in cells if cell.key not in results]
        if request.number is not None:
            raise Stopped(f"stopped by signal {request.number}, with {len(left)} of {len(cells)} runs of a stage left",
                          where=out, number=request.number, hint="the same command goes on")  # fmt: skip
        if left:
            raise RunFailed(f"{len(left)} of {len(cells)} runs were killed from outside", where=out,
                            hint="out of memory? fewer --workers; the same command goes on")  # fmt: skip
    return [results[cell.key] for cell in cells]


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
    if code in STOPPED or code < 0:  # it saved; or it was killed, by hand or for memory
        return None
    result: dict[str, Any] = {**dataclasses.asdict(cell), "recipe_fingerprint": recipe.fingerprint(), "auc": None,
                              "labels": None, "seconds": None, "error": None}  # fmt: skip
    reports = list((run / "report").glob("*/report.json"))
    if code == 0 and reports:
        auc = json.loads(reports[0].read_text())["metrics"]["auc"]
        result["auc"] = auc["macro"]["value"]
        result["labels"] = {name: label["value"] for name, label in auc["labels"].items()}
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


def _teacher(study: Study, pair: str, out: Path, data: str, threads: int) -> float | None:
    """Macro AUC of a pair's teacher on the test split."""
    recipe = load_recipe(study.recipe, dict(study.pairs[pair]))
    folder = out / "teachers" / pair
    if recipe.teacher == "none":
        return None
    if not (folder / "report.json").exists():
        command = [sys.executable, "-m", "evlecg.cli", "eval", "--dataset", data, "--model", recipe.teacher, "--quiet",
                   "--split", "test", "--thresholds-from", "none", "--out", str(folder)]  # fmt: skip
        if recipe.data.labels:
            command += ["--labels", ",".join(recipe.data.labels)]
        subprocess.run(command, capture_output=True, check=False, env=_environment(threads))
    if not (folder / "report.json").exists():
        return None
    return json.loads((folder / "report.json").read_text())["metrics"]["auc"]["macro"]["value"]


def _environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def _by_seed(cells: Sequence[Mapping[str, Any]], method: str) -> dict[int, float]:
    return {cell["seed"]: cell["auc"] for cell in cells if cell["method"] == method and cell["auc"] is not None}


def _summary(summary: OverSeeds) -> str:
    return f"{summary.mean:.3f}" + (f" ± {summary.sd:.3f}" if summary.sd is not None else "")


def _only(tree: Mapping[str, Any], known: Mapping[str, Any], *, where: str) -> None:
    for name in tree:
        if name not in known:
            raise EvlecgError(f"unknown key {name}", where=where, hint=nearest(str(name), known))
