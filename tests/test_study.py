"""Studies: what is chosen, what the table says, and a whole small one with a cell that fails."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from evlecg.data.labels import labels_by_basis
from evlecg.errors import EvlecgError, RunFailed
from evlecg.evaluate import read_scored
from evlecg.metrics import AUROC, compare_runs
from evlecg.recipe import load_recipe
from evlecg.study import (
    Method,
    Study,
    check_grown,
    choose,
    final_cells,
    find_study,
    load_study,
    run_study,
    study_figures,
    study_summary,
    study_table,
    tell,
    tune_cells,
    write_rows,
    write_told,
)
from evlecg.study.run import _run_cell
from evlecg.training.guards import stop_requests
from tests import tables

GRID = {"train.lr": [1e-3, 2e-3]}
STUDY = Study(
    name="small", recipe="quickstart", pairs={"p": {}}, seeds=(1, 2, 3), tune_seeds=(0,),
    methods={"ce": Method({"method": "ce"}, GRID), "evl": Method({}, GRID), "uld": Method({"method": "uld"})},
)  # fmt: skip


def cell(stage, method, seed, configuration, auc):
    return {"stage": stage, "pair": "p", "method": method, "size": None, "seed": seed, "configuration": configuration,
            "auc": auc, "accuracy": auc and 0.5, "seconds": 36.0}  # fmt: skip


def tuned():
    scores = {"ce": (0.7, 0.6), "evl": (None, 0.8)}
    return [cell("tune", name, 0, {"train.lr": lr}, auc)
            for name, aucs in scores.items() for lr, auc in zip(GRID["train.lr"], aucs, strict=True)]  # fmt: skip


def test_only_what_has_a_choice_is_tuned_and_the_best_mean_wins():
    assert [(c.method, c.configuration) for c in tune_cells(STUDY)] == [
        (name, {"train.lr": lr}) for name in ("ce", "evl") for lr in GRID["train.lr"]
    ]
    chosen = {row["method"]: row for row in choose(STUDY, tuned())}
    assert chosen["ce"]["configuration"] == {"train.lr": 1e-3} and chosen["ce"]["validation_auc"] == 0.7
    assert chosen["evl"]["configuration"] == {"train.lr": 2e-3}, "a failed configuration counts as nothing"
    assert chosen["uld"]["configuration"] == {} and chosen["uld"]["tried"] == 1
    finals = final_cells(STUDY, list(chosen.values()))
    assert [c.seed for c in finals] == [1, 1, 1, 2, 2, 2, 3, 3, 3] and all(c.stage == "final" for c in finals)
    assert len({c.key for c in finals}) == 9


def test_a_row_may_take_what_another_was_tuned_to(tmp_path):
    study = dataclasses.replace(STUDY, methods={**STUDY.methods, "kl": Method({"method": "kl"}, as_tuned="ce")})
    assert tune_cells(study) == tune_cells(STUDY)
    row = choose(study, tuned())[-1]
    assert row == {"pair": "p", "size": None, "method": "kl", "configuration": {"train.lr": 1e-3},
                   "validation_auc": None, "tried": 0}  # fmt: skip
    written = write_rows(study, {"cells": tuned(), "chosen": [row], "teachers": {}}, tmp_path)
    assert "# Configuration as chosen for ce; on test: not run." in written[0].read_text()
    before = dataclasses.asdict(STUDY)
    for method in before["methods"].values():
        del method["as_tuned"]  # as a folder of an older version says it
    check_grown(before, dataclasses.asdict(study), where=tmp_path)


def test_the_table_holds_means_paired_tests_and_failures():
    chosen = choose(STUDY, tuned())
    scores = {"ce": (0.70, 0.72, 0.71), "evl": (0.80, 0.83, 0.80), "uld": (None, None, None)}
    cells = [cell("final", name, seed, {}, auc) for name, aucs in scores.items()
             for seed, auc in zip((1, 2, 3), aucs, strict=True)]  # fmt: skip
    table = study_table(STUDY, {"cells": tuned() + cells, "chosen": chosen, "teachers": {"p": 0.9}})
    from scipy import stats

    p = stats.ttest_rel(scores["evl"], scores["ce"]).pvalue
    ce = next(line for line in table.splitlines() if line.startswith("| ce "))
    assert "0.710 ± 0.010" in ce and f"+0.100 (+0.075 to +0.125), {p:.3f}, {p:.3f}" in ce and ce.endswith("| 2 |")
    assert f"| evl | 0.810 ± 0.017 | 0.500 ± 0.000 | 3 | +0.100, {p:.3f}, {p:.3f} |" in table
    assert "| teacher | 0.900 |" in table and "| uld | failed | | 0 |" in table
    assert "13 runs, 4 of them failed, 0.13 hours" in table
    short = study_summary(STUDY, {"cells": tuned() + cells, "chosen": chosen, "teachers": {"p": 0.9}}).splitlines()
    assert short[0] == "| method | p: macro AUC | evl minus this |" and short[2] == "| teacher | 0.900 |  |"
    assert short[3] == "| ce | 0.710 ± 0.010 (3 seeds) | +0.100 (+0.075 to +0.125) |"
    assert short[4:] == ["| evl | 0.810 ± 0.017 (3 seeds) |  |", "| uld | failed |  |"]
    assert "evl minus the other method that was best on validation (p; Holm over these 1):" in table
    assert f"- p, all training records: ce, +0.100 (+0.075 to +0.125), {p:.3f}, {p:.3f}" in table, "uld is not tuned"
    grown = dataclasses.replace(STUDY, methods={**STUDY.methods, "kl": Method()})
    assert "| kl | not run | | 0 | | |  |  |" in study_table(
        grown, {"cells": tuned() + cells, "chosen": chosen, "teachers": {}}
    )


def test_a_row_is_a_recipe_and_a_line_of_the_figure(tmp_path):
    chosen = choose(STUDY, tuned())
    cells = [cell("final", name, seed, {}, auc) for name, auc in (("ce", 0.7), ("evl", 0.8)) for seed in (1, 2)]
    told = {"cells": tuned() + cells, "chosen": chosen, "teachers": {"p": 0.9}}
    written = write_rows(STUDY, told, tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in written} == {"p/ce.yaml", "p/evl.yaml", "p/uld.yaml"}
    text = (tmp_path / "p" / "evl.yaml").read_text()
    assert "Chosen of 2 configurations" in text and "0.800; on test: 0.800 ± 0.000 over 2 seeds" in text
    assert load_recipe(str(tmp_path / "p" / "evl.yaml")) == load_recipe(
        "quickstart", {"train.lr": 2e-3, "name": "small-p-evl"}
    )
    assert "lr: 0.002" in text, "what the study set is stated, also where it is the default"
    assert [path.name for path in study_figures(STUDY, told, tmp_path)] == ["seeds.png"]
    assert (tmp_path / "seeds.png").stat().st_size > 5000 and study_figures(
        STUDY, {**told, "cells": []}, tmp_path
    ) == []
    panel = json.loads((tmp_path / "seeds.json").read_text())["p, all training records"]
    assert panel == {"scores": {"ce": [0.7, 0.7], "evl": [0.8, 0.8]}, "teacher": 0.9}


def write_predictions(folder, shift, seed):
    noise = np.random.default_rng(seed)
    truth_NK = np.random.default_rng(0).random((60, 3)) < 0.4
    score_NK = truth_NK * shift + noise.normal(size=truth_NK.shape)
    folder.mkdir(parents=True)
    with (folder / "predictions.jsonl").open("w") as file:
        for n, k in np.ndindex(*truth_NK.shape):
            row = {"record_id": f"r{n}", "patient_id": f"p{n // 2}", "label": ("CD", "STTC", "HYP")[k]}
            file.write(json.dumps(row | {"score": score_NK[n, k], "truth": bool(truth_NK[n, k])}) + "\n")
    return read_scored(folder)


def begin(folder, study):
    (folder / "cells").mkdir(exist_ok=True)
    (folder / "study.json").write_text(json.dumps(dataclasses.asdict(study)))


def test_the_leaders_gain_over_test_patients_by_what_labels_hang_on(tmp_path):
    with pytest.raises(EvlecgError, match="no study has begun in this folder"):
        tell(STUDY, tmp_path / "elsewhere")
    begin(tmp_path, STUDY)
    assert tell(STUDY, tmp_path)["left"] == 13, "a folder without a cell"
    for one, told in zip(tune_cells(STUDY), tuned(), strict=True):
        (tmp_path / "cells" / f"{one.key}.json").write_text(json.dumps(told))
    scored = {}
    labels = {"CD": 0.7, "STTC": 0.6, "HYP": 0.5}
    for one in final_cells(STUDY, tell(STUDY, tmp_path)["chosen"]):
        if one.method == "uld" and one.seed == 1:
            continue
        run = tmp_path / "cells" / one.key / "run" / "report" / "distilled"
        scored[one.method, one.seed] = write_predictions(run, {"evl": 2.0, "ce": 1.0, "uld": 0.0}[one.method], one.seed)
        told = cell("final", one.method, one.seed, dict(one.configuration), 0.5) | {"labels": labels}
        (tmp_path / "cells" / f"{one.key}.json").write_text(json.dumps(told))
    taught = write_predictions(tmp_path / "teachers" / "p", 3.0, 9)
    (tmp_path / "teachers" / "p" / "report.json").write_text(json.dumps(
        {"metrics": {"auc": {"macro": {"value": 0.9}, "labels": {name: {"value": 0.9} for name in labels}}}}
    ))  # fmt: skip
    told = tell(STUDY, tmp_path)
    assert told["left"] == 1 and told["teacher_labels"]["p"] == dict.fromkeys(labels, 0.9)
    over = {row["method"]: row for row in told["over_records"]}
    assert {name: row["seeds"] for name, row in over.items()} == {
        "ce": [1, 2, 3], "uld": [2, 3], "teacher": [1, 2, 3],
    }  # fmt: skip
    sides = [[scored[name, seed] for seed in (1, 2, 3)] for name in ("evl", "ce")]
    expected = compare_runs(AUROC, *sides, label_groups=labels_by_basis(("CD", "STTC", "HYP"))).to_dict()
    assert {key: over["ce"][key] for key in expected} == json.loads(json.dumps(expected))
    assert over["ce"]["groups"]["QRS shape"]["value"] > 0 and over["teacher"]["macro"]["value"] < 0
    assert taught.n_patients == over["teacher"]["macro"]["n_patients"] == 30
    lines = study_table(STUDY, told).splitlines()
    row = next(line for line in lines if line.startswith("| ce | 0.700 | 0.600 | 0.500 |")).split(" | ")
    gain = over["ce"]["groups"]["ST/T"]
    assert row[6] == f"{gain['value']:+.3f} ({gain['ci95'][0]:+.3f} to {gain['ci95'][1]:+.3f})" and row[-1] == "3 |"
    assert any("60 test records of 30 patients (assessed: 60 in QRS shape, 60 in ST/T" in line for line in lines)
    short = {**told, "over_records": [{**row, "seeds": [1, 2]} for row in told["over_records"]]}
    assert "60 test records" not in study_table(STUDY, short), "means of other seeds stand beside it"
    assert any(line.startswith("| evl | 0.700 | 0.600 | 0.500 |  |") for line in lines)
    assert json.loads(json.dumps(write_told(STUDY, tmp_path))) == json.loads((tmp_path / "results.json").read_text())
    grown = dataclasses.replace(STUDY, methods={**STUDY.methods, "kl": Method({"method": "kl"}, GRID)})
    later = tell(grown, tmp_path)
    assert later["left"] == 1 + 2 + 3 and len(later["chosen"]) == 3, "rows that are tuned are told while one is not"
    assert [row["seeds"] for row in later["over_records"]] == [row["seeds"] for row in told["over_records"]]
    with pytest.raises(EvlecgError, match=r"before pairs\.p changed"):
        tell(dataclasses.replace(STUDY, pairs={"p": {"train.epochs": 99}}), tmp_path)
    few = {**told["teacher_labels"]["p"]}
    few.pop("CD")
    rows = study_table(STUDY, {**told, "teacher_labels": {"p": few}}).splitlines()
    assert any(line.startswith("| teacher |  | 0.900 | 0.900 |") for line in rows), "groups are the leader's"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"leader": "elv"}, "did you mean 'evl'"),
        ({"budget": 1}, "2 configurations are more than the budget of 1"),
        ({"seeds": [0, 1]}, "both choose and tell"),
        ({"sedes": [1]}, "did you mean 'seeds'"),
        ({"methods": {"ce": {"set": {"metod": "ce"}}, "evl": {}}}, "unknown key metod"),
        ({"pairs": None}, "a study needs pairs"),
        ({"methods": {"ce": {"tune": GRID}, "evl": {"as_tuned": "c"}}}, "is tuned.*did you mean 'ce'"),
        ({"methods": {"ce": {"tune": GRID}, "evl": {"as_tuned": "ce", "tune": GRID}}}, "in place of tune"),
    ],
)
def test_mistakes_fail_before_anything_runs(tmp_path, change, message):
    tree = {"name": "s", "recipe": "quickstart", "pairs": {"p": {}}, "seeds": [1],
            "methods": {"ce": {"set": {"method": "ce"}, "tune": GRID}, "evl": {}}}  # fmt: skip
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(tree | change))
    with pytest.raises(EvlecgError, match=message):
        load_study(tmp_path / "s.yaml")


def test_the_shipped_studies_are_valid():
    study = load_study(find_study("methods"))
    assert {"ce", "uld", "dskd", "evl", "evl-strict"} <= set(study.methods)
    assert {len(method.configurations()) for method in study.methods.values()} == {4}, "the same budget for all"
    with pytest.raises(EvlecgError, match="did you mean 'methods'"):
        find_study("methods1")


def test_the_tables_in_the_pages_are_those_of_the_results():
    found = []
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.spliced(text) == text, f"{page.name}: python -m tests.tables"
        found += [match["name"] for match in tables.PLACE.finditer(text)]
    assert {"methods", "methods-summary", "methods-signal", "hearts", "ablation", "alignment"} <= set(found)


def test_lines_are_drawn_across_sizes_or_pairs(tmp_path):
    def told(places, **study):
        study = dataclasses.replace(STUDY, **study)
        cells = [{**cell("final", name, seed, {}, auc), **place} for place in places
                 for name, seed, auc in (("ce", 1, 0.6), ("ce", 2, 0.7), ("evl", 1, 0.8))]  # fmt: skip
        names = [path.name for path in study_figures(study, {"cells": cells, "teachers": {"p": 0.9}}, tmp_path)]
        return names, json.loads((tmp_path / "across.json").read_text())

    names, drawn = told([{"size": 100}, {"size": 1000}], sizes=(100, 300, 1000))
    assert names == ["seeds.png", "across.png"] and (tmp_path / "across.png").stat().st_size > 5000
    panel = {"places": ["100", "300", "1000"], "teacher": [0.9] * 3}
    assert drawn == {"p": {**panel, "scores": {"ce": [[0.6, 0.7], [], [0.6, 0.7]], "evl": [[0.8], [], [0.8]],
                                               "uld": [[], [], []]}}}  # fmt: skip
    names, drawn = told([{"pair": "q"}], pairs={"p": {}, "q": {}, "r": {}})
    assert drawn["all training records"]["places"] == ["p", "q", "r"]
    assert drawn["all training records"]["scores"]["ce"] == [[], [0.6, 0.7], []]


def test_a_study_may_grow_and_may_not_change(tmp_path):
    before = dataclasses.asdict(STUDY)
    more = dataclasses.asdict(dataclasses.replace(STUDY, seeds=(1, 2, 3, 4), methods={**STUDY.methods, "kl": Method()}))
    check_grown(before, more, where=tmp_path)
    other = dataclasses.replace(STUDY, methods={**STUDY.methods, "uld": Method({"method": "uld", "train.lr": 1e-3})})
    with pytest.raises(EvlecgError, match=r"before methods\.uld changed"):
        check_grown(before, dataclasses.asdict(other), where=tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_stopped_study_keeps_what_is_done_and_no_half_results(checkpoints, synthetic, tmp_path, number):
    tree = {
        "name": "long", "recipe": "quickstart", "seeds": [1],
        "pairs": {"tiny": {"teacher": str(checkpoints["llava"]), "student": str(checkpoints["idefics3"]),
                           "data.dir": str(synthetic), "train.epochs": 10000, "train.batch_size": 4}},
        "methods": {"ce": {"set": {"method": "ce"}}, "evl": {}},
    }  # fmt: skip
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(tree))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "evlecg.cli", "distill", "--study", str(tmp_path / "long.yaml"), "--out", str(out)]
    asks = "import signal, runpy, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"  # where it is ignored
    command[1:3] = ["-c", f"{asks}; sys.argv[0] = 'evlecg'; runpy.run_module('evlecg.cli', run_name='__main__')"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        metrics = []
        while not metrics and running.poll() is None:
            time.sleep(0.5)
            metrics = list(out.glob("cells/*/run/metrics.jsonl"))
        assert running.poll() is None, running.communicate()[1]
        running.send_signal(number)
        told = running.communicate(timeout=120)[1]
    assert running.returncode == 128 + number, told
    assert "with 2 of 2 runs of a stage left" in told and "the same command goes on" in told
    assert not list(out.glob("cells/*.json")) and json.loads((out / "results.json").read_text())["left"] == 2
    assert "| evl | not run |" in (out / "table.md").read_text()
    assert list(out.glob("cells/*/run/checkpoints/*")), "the run that was under way saved"


@pytest.mark.slow
def test_a_whole_study_goes_on_where_it_stopped(checkpoints, synthetic, tmp_path):
    tree = {
        "name": "whole", "recipe": "quickstart", "seeds": [1],
        "pairs": {"tiny": {"teacher": str(checkpoints["llava"]), "student": str(checkpoints["idefics3"]),
                           "data.dir": str(synthetic), "train.max_steps": 1, "train.batch_size": 4}},
        "methods": {"ce": {"set": {"method": "ce"}},
                    "evl": {"set": {"objective.align.heads": 5, "objective.lambda_m": 1.0}}},  # 5 does not divide 24
    }  # fmt: skip
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(tree))
    study, out = load_study(tmp_path / "whole.yaml"), tmp_path / "out"
    told = run_study(study, out=out, workers=2)
    by_name = {found["method"]: found for found in told["cells"]}
    assert 0 <= by_name["ce"]["auc"] <= 1 and set(by_name["ce"]["labels"]) == {"NORM", "MI", "STTC", "CD", "HYP"}
    assert by_name["evl"]["auc"] is None and "5 attention heads do not divide" in by_name["evl"]["error"]
    assert 0 <= told["teachers"]["tiny"] <= 1
    assert "| evl | failed |" in (out / "table.md").read_text()
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(told))
    made = {path: path.stat().st_mtime_ns for path in (out / "cells").glob("*.json")}
    assert not list(out.rglob("predictions_val.jsonl")), "a cell is one AUC of one split"
    assert len(list(out.rglob("predictions.jsonl"))) == 2, "the cell that worked, and the teacher"
    assert len(made) == 2 and not list(out.glob("cells/*/run/student")), "weights are not kept"
    run_study(study, out=out, workers=2)
    assert made == {path: path.stat().st_mtime_ns for path in (out / "cells").glob("*.json")}, "nothing ran again"
    moved = next((out / "cells").glob("final-tiny-ce-*.json"))
    moved.unlink()
    run = moved.with_suffix("") / "run"
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace(str(synthetic), "/elsewhere"))
    away = synthetic.rename(synthetic.with_name("away"))
    cell = next(one for one in final_cells(study, told["chosen"]) if one.method == "ce")
    with pytest.raises(RunFailed, match="can neither go on nor begin anew"), stop_requests() as request:
        _run_cell(study, cell, out, str(synthetic), 1, request)
    away.rename(synthetic)
    assert not moved.exists() and "/elsewhere" in (run / "recipe.yaml").read_text(), "nothing was lost"
    again = run_study(study, out=out)
    found = next(found for found in again["cells"] if found["method"] == "ce")
    assert found["error"] is None and found["auc"] == by_name["ce"]["auc"], "what cannot be gone on with begins anew"
    with pytest.raises(EvlecgError, match="another study"):
        run_study(STUDY, out=out)
