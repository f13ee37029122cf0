"""What a study is: its file, its cells, and what the tuning stage chooses."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from evlecg.errors import EvlecgError
from evlecg.recipe import load_recipe, nearest, recipe_folder


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        set: recipe keys that make it this method.
        tune: recipe key -> values that are tried, all combinations.
        as_tuned: another method, whose chosen configuration this one takes.
    """

    set: Mapping[str, Any] = field(default_factory=dict)
    tune: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    as_tuned: str | None = None

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
            grids = [key for key, other in self.methods.items() if other.tune]
            if method.as_tuned is not None and (method.tune or method.as_tuned not in grids):
                raise EvlecgError("as_tuned names a method that is tuned, and stands in place of tune",
                                  where=f"methods.{name}.as_tuned", hint=nearest(method.as_tuned, grids))  # fmt: skip
            tried = len(method.configurations())
            if tried > self.budget:
                raise EvlecgError(f"{tried} configurations are more than the budget of {self.budget}",
                                  where=f"methods.{name}.tune", hint="every method gets the same budget")  # fmt: skip
        shared = set(self.seeds) & set(self.tune_seeds)
        if shared and any(len(method.configurations()) > 1 for method in self.methods.values()):
            raise EvlecgError(f"seeds {sorted(shared)} both choose and tell", where="seeds",
                              hint="the final stage needs seeds of its own")  # fmt: skip

    def tuned_like(self, method: str) -> Method:
        """The method whose grid a row takes its configuration from: itself, or the one it names."""
        return self.methods[self.methods[method].as_tuned or method]


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
        _only(method or {}, {item.name: item for item in dataclasses.fields(Method)}, where=f"{path}: methods.{name}")
        methods[name] = Method(**(method or {}))
    listed = {key: tuple(tree.pop(key)) for key in ("sizes", "seeds", "tune_seeds") if key in tree}
    recipe = tree.pop("recipe")
    beside = path.parent / str(recipe)
    study = Study(recipe=str(beside) if beside.is_file() else recipe, methods=methods, **listed, **tree)
    for pair, method in itertools.product(study.pairs, study.methods):  # a mistyped key fails now, not after hours
        for configuration in study.tuned_like(method).configurations():
            load_recipe(study.recipe, {**study.pairs[pair], **study.methods[method].set, **configuration})
    return study


def check_grown(before: Mapping[str, Any], now: Mapping[str, Any], *, where: Path) -> None:
    """A study may get new pairs, methods, sizes and seeds; what it had stays what it was, or its cells would lie.

    Raises:
        EvlecgError: something in both differs.
    """

    def said(tree: Mapping[str, Any]) -> Mapping[str, Any]:
        return {key: value for key, value in tree.items() if value is not None}

    changed = [key for key in ("name", "recipe", "tune_seeds", "budget") if before[key] != now[key]]
    for kind in ("pairs", "methods"):
        shared = [name for name in before[kind] if name in now[kind]]
        changed += [f"{kind}.{name}" for name in shared if said(before[kind][name]) != said(now[kind][name])]
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
    """The configuration of every pair, size and method with the best mean validation AUC; failed ones count as 0.

    A row `as_tuned` takes that of the method it names, has tried none itself, and has no AUC on validation.
    """
    chosen = []
    for pair, size, (name, taken) in itertools.product(study.pairs, study.sizes, study.methods.items()):
        method, tuned = study.tuned_like(name), taken.as_tuned or name
        scores = {}
        for place, configuration in enumerate(method.configurations()):
            found = [
                cell["auc"] or 0.0
                for cell in results
                if (cell["stage"], cell["pair"], cell["method"], cell["size"]) == ("tune", pair, tuned, size)
                and cell["configuration"] == configuration
            ]
            scores[place] = sum(found) / len(found) if found else 0.0
        best = max(scores, key=lambda place: (scores[place], -place))
        chosen.append({"pair": pair, "size": size, "method": name, "configuration": method.configurations()[best],
                       "validation_auc": None if taken.as_tuned else scores[best] or None,
                       "tried": 0 if taken.as_tuned else len(scores)})  # fmt: skip
    return chosen


def final_cells(study: Study, chosen: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """The final stage: what was chosen, with every seed; seed by seed, so that one that is stopped has whole tables."""
    return [
        Cell("final", row["pair"], row["method"], row["size"], seed, row["configuration"])
        for seed, row in itertools.product(study.seeds, chosen)
    ]


def _only(tree: Mapping[str, Any], known: Mapping[str, Any], *, where: str) -> None:
    for name in tree:
        if name not in known:
            raise EvlecgError(f"unknown key {name}", where=where, hint=nearest(str(name), known))
