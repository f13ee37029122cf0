"""The report says what it was given, in keys that do not move."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from evlecg.errors import EvlecgError
from evlecg.metrics import AucResult, LabelAuc, bootstrap_auc
from evlecg.metrics import MacroAuc as Estimate
from evlecg.report import (
    Report,
    comparison_dict,
    comparison_markdown,
    comparison_table,
    environment,
    write_report,
)

AUC = AucResult(
    macro=Estimate(0.81234, (0.7123, 0.9123)),
    labels=(
        LabelAuc(0.95678, (0.9, 1.0), 40, 60),
        LabelAuc(None, None, 0, 100),
        LabelAuc(0.66789, (0.4567, 0.8765), 12, 88),
        LabelAuc(0.7, None, 1, 99),
    ),
    n_boot=2000,
    seed=7,
)


def make(auc: AucResult = AUC, **changes: object) -> Report:
    values: dict = {
        "model": "runs/latest",
        "dataset": "synthetic",
        "split": "test",
        "n_records": 100,
        "n_patients": 77,
        "labels": ("NORM", "MI", "STTC", "HYP"),
        "auc": auc,
        "left_out": {"3 records": "lead V1 is flat"},
        "provenance": {"recipe": "quickstart", "environment": {"torch": "2.9", "cpu": {"count": 2}}, "note": "a|b\nc"},
    }
    return Report(**(values | changes))


def section(markdown: str, title: str) -> list[str]:
    """Lines under a heading that starts with `title`."""
    body = next(part for part in markdown.split("\n## ") if part.startswith(title))
    return [line for line in body.split("\n")[1:] if line]


def test_json_holds_the_fixed_keys(tmp_path: Path) -> None:
    write_report(make(), tmp_path / "new" / "folder")
    report = json.loads((tmp_path / "new" / "folder" / "report.json").read_text(encoding="utf-8"))
    assert {key: report[key] for key in ("model", "dataset", "split", "n_records", "n_patients")} == {
        "model": "runs/latest",
        "dataset": "synthetic",
        "split": "test",
        "n_records": 100,
        "n_patients": 77,
    }
    assert report["metrics"]["auc"]["macro"] == {"value": 0.81234, "ci95": [0.7123, 0.9123]}
    labels = report["metrics"]["auc"]["labels"]
    assert list(labels) == ["NORM", "MI", "STTC", "HYP"]
    assert labels["STTC"] == {"value": 0.66789, "ci95": [0.4567, 0.8765], "n_pos": 12, "n_neg": 88}
    assert labels["MI"] == {"value": None, "ci95": None, "n_pos": 0, "n_neg": 100}
    assert report["metrics"]["auc"]["bootstrap"] == {"unit": "patient", "resamples": 2000, "seed": 7}
    assert report["left_out"] == {"3 records": "lead V1 is flat", "label MI": "all 100 records are negative"}
    assert report["provenance"]["environment"]["torch"] == "2.9"
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["report.json", "report.md"]


def test_markdown_answers_the_first_questions_first() -> None:
    markdown = make().to_markdown()
    top = markdown.split("\n## ")[0]
    assert "**Macro AUC 0.812 (0.712–0.912)**" in top
    assert "3 of 4 labels" in top
    assert "100 records of 77 patients" in top
    assert "Weakest label: STTC 0.668 (0.457–0.876), 12 records" in top
    assert "better than chance: STTC." in top
    assert "Without an interval, hence no evidence by themselves: HYP." in top
    assert [part.split()[0] for part in markdown.split("\n## ")[1:]] == ["Labels,", "Left", "How", "Provenance"]


def test_markdown_table_holds_every_number_weakest_first() -> None:
    assert section(make().to_markdown(), "Labels")[2:] == [
        "| STTC | 0.668 | 0.457–0.876 | 12 | 88 |",
        "| HYP | 0.700 | – | 1 | 99 |",
        "| NORM | 0.957 | 0.900–1.000 | 40 | 60 |",
        "| MI | – | – | 0 | 100 |",
    ]


def test_markdown_says_what_was_left_out_how_it_was_counted_and_from_what() -> None:
    markdown = make().to_markdown()
    assert section(markdown, "Left out") == ["- 3 records: lead V1 is flat", "- label MI: all 100 records are negative"]
    formulas = "\n".join(section(markdown, "How"))
    assert "2000 resamples of the patients" in formulas
    assert "seed 7" in formulas
    assert "product of its tokens' probabilities" in formulas
    assert "generated text" in make(score_source="text").to_markdown()
    assert section(markdown, "Provenance")[2:] == [
        "| recipe | quickstart |",
        "| environment.torch | 2.9 |",
        "| environment.cpu.count | 2 |",
        "| note | a\\|b c |",
    ]


def test_report_without_any_auc_says_so() -> None:
    auc = bootstrap_auc(np.zeros((3, 1)), np.zeros((3, 1)), ["a", "b", "c"], n_boot=5)
    report = make(auc, labels=("AF",), left_out={})
    assert "**No AUC**: among 100 records of 77 patients" in report.to_markdown()
    assert report.to_dict()["metrics"]["auc"]["macro"] == {"value": None, "ci95": None}
    assert comparison_table([("x", report)])[1] == [("x", "–", "–")]


def test_report_where_nothing_is_wrong_says_nothing_of_it() -> None:
    auc = AucResult(Estimate(0.9, (0.8, 0.95)), (LabelAuc(0.9, (0.8, 0.95), 5, 5),), 10, 0)
    markdown = make(auc, labels=("AF",), left_out={}).to_markdown()
    assert section(markdown, "Left out") == ["Nothing."]
    assert "better than chance" not in markdown
    assert "Without an interval" not in markdown


def test_real_numbers_survive_json_to_the_last_bit() -> None:
    rng = np.random.default_rng(0)
    truth_NK = (rng.random((50, 4)) < 0.5).astype(float)
    auc = bootstrap_auc(rng.random((50, 4)), truth_NK, [f"p{i}" for i in range(50)], n_boot=20)
    macro = json.loads(make(auc).to_json())["metrics"]["auc"]["macro"]
    assert (macro["value"], tuple(macro["ci95"])) == (auc.macro.value, auc.macro.ci95)


def test_nan_never_reaches_the_disk(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_report(make(provenance={"loss": float("nan")}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_place_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EvlecgError, match="cannot be written"):
        write_report(make(), tmp_path / "file")


def test_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="4 AUCs"):
        make(labels=("NORM",))
    with pytest.raises(ValueError, match="4 AUCs"):
        make(labels=("NORM", "MI", "MI", "HYP"))
    with pytest.raises(ValueError, match="source"):
        make(score_source="oracle")


def test_comparison_joins_labels_by_name() -> None:
    other = AucResult(
        Estimate(0.75, (0.7, 0.8)), (LabelAuc(0.8, (0.7, 0.9), 5, 5), LabelAuc(0.7, (0.6, 0.8), 5, 5)), 10, 0
    )
    rows = [("teacher", make()), ("student", make(other, labels=("AF", "NORM")))]
    columns, cells = comparison_table(rows)
    assert columns == ("model", "macro AUC (95% interval)", "NORM", "MI", "STTC", "HYP", "AF")
    assert cells == [
        ("teacher", "0.812 (0.712–0.912)", "0.957", "–", "0.668", "0.700", "–"),
        ("student", "0.750 (0.700–0.800)", "0.700", "–", "–", "–", "0.800"),
    ]
    assert comparison_markdown(rows).split("\n") == [
        "| model | macro AUC (95% interval) | NORM | MI | STTC | HYP | AF |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| teacher | 0.812 (0.712–0.912) | 0.957 | – | 0.668 | 0.700 | – |",
        "| student | 0.750 (0.700–0.800) | 0.700 | – | – | – | 0.800 |",
        "",
    ]
    models = comparison_dict(rows)["models"]
    assert [model["name"] for model in models] == ["teacher", "student"]
    assert models[1]["metrics"]["auc"]["labels"]["AF"] == {"value": 0.8, "ci95": [0.7, 0.9], "n_pos": 5, "n_neg": 5}
    assert "provenance" not in models[0]


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_environment_names_versions_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    found = environment()
    assert found["git"] is None
    assert found["python"] == sys.version.split()[0]
    assert found["numpy"] == np.__version__
    assert found["cpu_count"] >= 1
    json.dumps(found, allow_nan=False)

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *identity, *arguments], capture_output=True, text=True, check=True).stdout.strip()

    git("init")
    (tmp_path / "x").write_text("1")
    git("add", "x")
    git("commit", "-m", "x")
    git("tag", "-a", "v1", "-m", "x")  # the hash is wanted all the same
    assert environment()["git"] == git("rev-parse", "HEAD")
    (tmp_path / "x").write_text("2")
    assert environment()["git"] == git("rev-parse", "HEAD") + "-dirty"


def test_versions_are_read_without_importing() -> None:
    code = (
        "import sys; from evlecg.report import environment; e = environment(); "
        "assert e['torch'] and e['transformers'] and e['accelerate']; "
        "assert not {'torch', 'transformers', 'accelerate'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[1])
