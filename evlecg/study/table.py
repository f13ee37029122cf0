"""What a study says: a table in Markdown, a figure, and one recipe a row, all from the content of results.json."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from evlecg.data.labels import labels_by_basis
from evlecg.figures import across_figure, seeds_figure
from evlecg.files import write_text_atomic
from evlecg.metrics import OverSeeds, SeedTest, holm, over_seeds, seed_test
from evlecg.recipe import Recipe, assign, load_recipe
from evlecg.study.plan import Study

TEACHER = "teacher"  # its row
LEAST_ACROSS = 3  # pairs or sizes that a line is drawn across


def study_table(study: Study, told: Mapping[str, Any]) -> str:
    """The results as Markdown, from what results.json holds; cells that are not done yet are left out, and counted."""
    lines = [f"# {study.name}", ""]
    cells = _final(told)
    tests = _tests(study, cells)
    for pair, size in itertools.product(study.pairs, study.sizes):
        here = _of(cells, pair, size)
        lines += [f"## {pair}, {_records(size)}", ""]
        heads = ("method", "macro AUC, mean ± sd over seeds", "accuracy", "seeds",
                 f"minus {study.reference}: mean, p, p (Holm)",
                 f"{study.leader} minus this: mean (95% interval), p, p (Holm)", "validation AUC", "tried")  # fmt: skip
        lines += ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
        teacher = told["teachers"].get(pair)
        if teacher is not None:
            lines.append(f"| {TEACHER} | {teacher:.3f} |" + " |" * (len(heads) - 2))
        for name in study.methods:
            row = _chosen(told, pair, size, name)
            scores = _by_seed(here, name)
            if not scores:
                lines.append(
                    f"| {name} | {_missing(here, name)} | | 0 | | | {_digits(row)} | {row['tried'] if row else ''} |"
                )
                continue
            behind = _test(tests.get((study.leader, pair, size, name)))
            if name == study.leader:
                gain = _test(tests.get((study.leader, pair, size, study.reference)), interval=False)
            else:
                gain = _test(tests.get((study.reference, pair, size, name)), interval=False, turned=True)
            lines.append(
                f"| {name} | {_summary(over_seeds(list(scores.values())))} | {_accuracy(here, name)} | {len(scores)} | "
                f"{gain} | {behind} | {_digits(row)} | {row['tried'] if row else ''} |"
            )
        lines.append("")
        lines += _by_basis(study, told, pair, size)
    lines += _named(study, told, tests)
    failed = [cell for cell in told["cells"] if cell["auc"] is None]
    seconds = sum(cell["seconds"] or 0 for cell in told["cells"])
    left = f" {told['left']} runs are left to do." if told.get("left") else ""
    lines += [
        f"{len(told['cells'])} runs, {len(failed)} of them failed, {seconds / 3600:.2f} hours of runs in all.{left} "
        "Configurations were chosen on the validation split, the table is of the test split. Accuracy: records whose "
        f"labels are all as in the truth at a threshold of 0.5. p: paired t-test over seeds; Holm: corrected for the "
        f"{len(tests)} comparisons of this table.",
        "",
    ]
    return "\n".join(lines)


def study_summary(study: Study, told: Mapping[str, Any]) -> str:
    """One line a method, a pair of columns for each pair of models and size: its mean, and what the leader adds."""
    cells = _final(told)
    tests = _tests(study, cells)
    places = list(itertools.product(study.pairs, study.sizes))
    heads = ["method", *itertools.chain.from_iterable(
        (f"{pair}{'' if len(study.sizes) == 1 else f', {_records(size)}'}: macro AUC", f"{study.leader} minus this")
        for pair, size in places
    )]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    rows: dict[str, list[str]] = {}
    teachers = [told["teachers"].get(pair) for pair, _ in places]
    if any(value is not None for value in teachers):
        rows[TEACHER] = [text for value in teachers for text in ("" if value is None else f"{value:.3f}", "")]
    for name in study.methods:
        rows[name] = []
        for pair, size in places:
            here = _of(cells, pair, size)
            scores = list(_by_seed(here, name).values())
            summary = f"{_summary(over_seeds(scores))} ({len(scores)} seeds)" if scores else _missing(here, name)
            rows[name] += [summary, _test(tests.get((study.leader, pair, size, name)), p_too=False)]
    return "\n".join([*lines, *("| " + " | ".join([name, *texts]) + " |" for name, texts in rows.items()), ""])


def _named(
    study: Study, told: Mapping[str, Any], tests: Mapping[Comparison, tuple[SeedTest, float | None]]
) -> list[str]:
    """One comparison for each pair of models and size: against the method that validation names, whatever test says."""
    named: dict[tuple[str, int | None], tuple[str, SeedTest]] = {}
    kinds = {
        name: load_recipe(study.recipe, dict(method.set)).effective_method for name, method in study.methods.items()
    }
    for pair, size in itertools.product(study.pairs, study.sizes):
        scores = {
            row["method"]: row["validation_auc"]
            for row in told["chosen"]
            if (row["pair"], row["size"]) == (pair, size) and row["validation_auc"] is not None
        }
        rivals = [
            name
            for name in study.methods
            if name in scores and kinds[name] != kinds[study.leader] and (study.leader, pair, size, name) in tests
        ]
        if rivals:
            best = max(rivals, key=scores.__getitem__)
            named[pair, size] = best, tests[study.leader, pair, size, best][0]
    if not named:
        return []
    corrected = holm([test.p for _, test in named.values()])
    lines = [
        f"{study.leader} minus the other method that was best on validation (p; Holm over these {len(named)}):", ""
    ]  # fmt: skip
    for ((pair, size), (best, test)), adjusted in zip(named.items(), corrected, strict=True):
        lines.append(f"- {pair}, {_records(size)}: {best}, {_test((test, adjusted))}")
    return [*lines, ""]


def _records(size: int | None) -> str:
    return f"{size if size is not None else 'all'} training records"


def _missing(cells: Sequence[Mapping[str, Any]], method: str) -> str:
    """Why a row has no number."""
    return "failed" if any(cell["method"] == method for cell in cells) else "not run"


def _by_basis(study: Study, told: Mapping[str, Any], pair: str, size: int | None) -> list[str]:
    """The table by what labels hang on, with intervals over test patients; nothing without them.

    A gain stands where it is of all the seeds that both sides have, as the means beside it are.
    """
    here = _of(_final(told), pair, size)
    leading = _by_seed(here, study.leader)
    over = {}
    for row in told.get("over_records", ()):
        if (row["pair"], row["size"]) == (pair, size):
            theirs = leading if row["method"] == TEACHER else _by_seed(here, row["method"])
            if set(row["seeds"]) == set(leading) & set(theirs):
                over[row["method"]] = row
    if not over:
        return []
    aucs = {name: _label_means(here, name) for name in study.methods}
    if pair in told.get("teacher_labels", {}):
        aucs = {TEACHER: told["teacher_labels"][pair], **aucs}
    groups = labels_by_basis(aucs[study.leader])
    first = next(iter(over.values()))
    minus = f"{study.leader} minus this"
    heads = ["method", *(f"{name} ({', '.join(labels)})" for name, labels in groups.items()), f"{minus}: macro",
             *(f"{minus}: {name}" for name in groups),
             *(f"{one['a']} minus {one['b']}" for one in first["contrasts"]), "seeds"]  # fmt: skip
    behind = ", ".join(f"{gain['n']} in {name}" for name, gain in first["groups"].items())
    lines = [
        f"By what labels hang on: {first['macro']['n']} test records of {first['macro']['n_patients']} patients "
        f"(assessed: {behind}). Intervals (95%) over resampled patients, seeds averaged, for these trained students: "
        "what another seed would give is in the table above. Not corrected for their number.", "",
        "| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads),
    ]  # fmt: skip
    for name, labels in aucs.items():
        if not labels:
            continue
        means = []
        for members in groups.values():
            values = [labels[label] for label in members if labels.get(label) is not None]
            means.append(f"{sum(values) / len(values):.3f}" if values else "")
        row = over.get(name)
        gains = [""] * (len(heads) - len(means) - 1)
        if row:
            found = [row["macro"], *(row["groups"].get(group) for group in groups), *row["contrasts"]]
            gains = [*map(_gain, found), str(len(row["seeds"]))]
        lines.append("| " + " | ".join([name, *means, *gains]) + " |")
    return [*lines, ""]


def _label_means(cells: Sequence[Mapping[str, Any]], method: str) -> dict[str, float]:
    """Label -> AUC, averaged over the seeds in which it has one."""
    found: dict[str, list[float]] = {}
    for cell in cells:
        if cell["method"] == method:
            for label, value in (cell.get("labels") or {}).items():
                if value is not None:
                    found.setdefault(label, []).append(value)
    return {label: sum(values) / len(values) for label, values in found.items()}


def _gain(gain: Mapping[str, Any] | None) -> str:
    if not gain or gain["value"] is None:
        return ""
    interval = gain["ci95"]
    return f"{gain['value']:+.3f}" + (f" ({interval[0]:+.3f} to {interval[1]:+.3f})" if interval else "")


def study_figures(study: Study, told: Mapping[str, Any], folder: Path) -> list[Path]:
    """seeds.png (every seed's macro AUC, methods by their mean) and, across three pairs or sizes or more, across.png.

    With the numbers beside them; nothing where nothing is done.
    """
    scores = {
        (pair, size): {name: list(_by_seed(_of(_final(told), pair, size), name).values()) for name in study.methods}
        for pair, size in itertools.product(study.pairs, study.sizes)
    }
    teacher = {pair: told["teachers"].get(pair) for pair in study.pairs}
    panels = {}
    for (pair, size), found in scores.items():
        done = {name: values for name, values in found.items() if values}
        if done:
            panels[f"{pair}, {_records(size)}"] = (done, teacher[pair])
    if not panels:
        return []
    drawn = [seeds_figure(folder, panels, reference=study.reference, leader=study.leader)]
    across = {}
    if len(study.sizes) >= LEAST_ACROSS:
        for pair in study.pairs:
            methods = {name: [scores[pair, size][name] for size in study.sizes] for name in study.methods}
            names = ["all" if size is None else str(size) for size in study.sizes]
            across[pair] = names, methods, [teacher[pair]] * len(names)
    elif len(study.pairs) >= LEAST_ACROSS:
        for size in study.sizes:
            methods = {name: [scores[pair, size][name] for pair in study.pairs] for name in study.methods}
            across[_records(size)] = list(study.pairs), methods, list(teacher.values())
    if across:
        drawn.append(across_figure(folder, across, leader=study.leader))
    return drawn


def write_rows(study: Study, told: Mapping[str, Any], folder: Path) -> list[Path]:
    """One recipe a row of the table, with what was chosen and what came of it: folder/PAIR/[SIZE/]METHOD.yaml."""
    written = []
    plain = Recipe().to_dict()
    for row in told["chosen"]:
        pair, size, name = row["pair"], row["size"], row["method"]
        keys = {**study.pairs[pair], **study.methods[name].set, **row["configuration"], "data.max_train": size}
        recipe = load_recipe(study.recipe, {**keys, "name": f"{study.name}-{pair}-{name}"})
        scores = list(_by_seed(_of(_final(told), pair, size), name).values())
        came = f"{_summary(over_seeds(scores))} over {len(scores)} seeds" if scores else "not run"
        how = f"Chosen of {row['tried']} configurations by macro AUC on validation: {_digits(row)}"
        if study.methods[name].as_tuned:
            how = f"Configuration as chosen for {study.methods[name].as_tuned}"
        place = folder / pair / (str(size) if len(study.sizes) > 1 else "") / f"{name}.yaml"
        text = (
            f"# The row {name} of the study {study.name}: {pair}, {_records(size)}.\n"
            f"# Command:  evlecg distill --recipe FILE --set seed=N\n"
            f"# {how}; on test: {came}.\n"
            + yaml.safe_dump(_stated(recipe.to_dict(), plain, keys), sort_keys=False, allow_unicode=True)
        )
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(place, text)
        written.append(place)
    return written


def _stated(tree: Mapping[str, Any], plain: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """What of a recipe is not as by default, and what the study set: another default must not change a row."""
    found = _changed(tree, plain)
    for dotted in keys:
        assign(found, dotted, functools.reduce(operator.getitem, dotted.split("."), tree))
    return found


def _changed(tree: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    """What of a recipe is not as by default."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            inner = _changed(value, plain[key])
            found |= {key: inner} if inner else {}
        elif value != plain[key]:
            found[key] = value
    return found


Comparison = tuple[str, str, "int | None", str]  # against which method, pair, size, method


def _tests(study: Study, cells: Sequence[Mapping[str, Any]]) -> dict[Comparison, tuple[SeedTest, float | None]]:
    """The leader against every other method, and every method against the reference, Holm-corrected together."""
    found: dict[Comparison, SeedTest] = {}
    for pair, size, name in itertools.product(study.pairs, study.sizes, study.methods):
        here = _of(cells, pair, size)
        for other in dict.fromkeys((study.leader, study.reference)):
            if name == other or (other, name) == (study.reference, study.leader):  # the other way round it is there
                continue
            ours, theirs = _by_seed(here, other), _by_seed(here, name)
            both = sorted(set(ours) & set(theirs))
            if not both:
                continue
            found[other, pair, size, name] = seed_test(
                {other: {seed: ours[seed] for seed in both}, name: {seed: theirs[seed] for seed in both}}
            )
    corrected = holm([test.p for test in found.values()])
    return {key: (test, p) for (key, test), p in zip(found.items(), corrected, strict=True)}


def _test(
    found: tuple[SeedTest, float | None] | None, *, interval: bool = True, turned: bool = False, p_too: bool = True
) -> str:
    """A comparison in a cell of the table; `turned`: of the second minus the first."""
    if found is None:
        return ""
    test, adjusted = found
    text = f"{-test.difference.mean if turned else test.difference.mean:+.3f}"
    if test.difference.ci95 is not None and interval:
        text += f" ({test.difference.ci95[0]:+.3f} to {test.difference.ci95[1]:+.3f})"
    if p_too and test.p is not None and adjusted is not None:
        text += f", {test.p:.3f}, {adjusted:.3f}"
    return text


def _final(told: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [cell for cell in told["cells"] if cell["stage"] == "final"]


def _of(cells: Sequence[Mapping[str, Any]], pair: str, size: int | None) -> list[Mapping[str, Any]]:
    return [cell for cell in cells if (cell["pair"], cell["size"]) == (pair, size)]


def _chosen(told: Mapping[str, Any], pair: str, size: int | None, method: str) -> Mapping[str, Any] | None:
    """What was chosen for a row; None where the study has grown by it since."""
    found = (row for row in told["chosen"] if (row["pair"], row["size"], row["method"]) == (pair, size, method))
    return next(found, None)


def _by_seed(cells: Sequence[Mapping[str, Any]], method: str) -> dict[int, float]:
    return {cell["seed"]: cell["auc"] for cell in cells if cell["method"] == method and cell["auc"] is not None}


def _accuracy(cells: Sequence[Mapping[str, Any]], method: str) -> str:
    values = [cell["accuracy"] for cell in cells if cell["method"] == method and cell.get("accuracy") is not None]
    return _summary(over_seeds(values)) if values else ""


def _digits(row: Mapping[str, Any] | None) -> str:
    return f"{row['validation_auc']:.3f}" if row and row["validation_auc"] is not None else ""


def _summary(summary: OverSeeds) -> str:
    return f"{summary.mean:.3f}" + (f" ± {summary.sd:.3f}" if summary.sd is not None else "")
