"""The whole line as a user runs it: prepare -> distill -> eval -> export on recorded ECGs, with tiny models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from evlecg import cli

SMALL = ["--epochs", "1", "--batch-size", "8", "--set", "train.lr=1e-3", "--set", "data.max_train=24"]


def evlecg(*arguments: str, monkeypatch, capsys) -> dict:
    monkeypatch.setattr(sys, "argv", ["evlecg", *arguments, "--json", "-q"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    shown = capsys.readouterr()
    assert not stopped.value.code, shown.err
    return json.loads(shown.out)


@pytest.mark.parametrize(
    ("dataset", "teacher", "student"), [("ludb", "llava", "idefics3"), ("ptbxl", "qwen2_vl", "llava")]
)
def test_recorded_ecgs_go_the_whole_way(
    shared_data, checkpoints, tmp_path, monkeypatch, capsys, dataset, teacher, student
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EVLECG_DATA", raising=False)

    def call(*arguments: str) -> dict:
        return evlecg(*arguments, monkeypatch=monkeypatch, capsys=capsys)

    source = str(shared_data / dataset)
    prepared = call(
        "prepare", "--dataset", dataset, "--source", source, "--labels", "ptbxl-super", "--out", f"data/{dataset}"
    )
    assert prepared["n_kept"] == {"ludb": 140, "ptbxl": 50}[dataset]

    # data is not named: it is what was prepared last in ./data
    distilled = call("distill", "--teacher", str(checkpoints[teacher]), "--student", str(checkpoints[student]), *SMALL,
                     "--out", "runs/first", "--set", "finish.control=true")  # fmt: skip
    assert distilled["data"] == f"data/{dataset}"
    assert [model["name"] for model in distilled["models"]] == ["teacher", "SFT-only", "distilled"]
    compared = json.loads(Path("runs/first/report/paired/comparison.json").read_text())["auroc"]["pairs"]
    assert [(pair["a"], pair["b"]) for pair in compared] == [
        ("distilled", "SFT-only"), ("distilled", "teacher"), ("SFT-only", "teacher"),
    ]  # fmt: skip
    assert distilled["distilled_minus_sft"]["value"] == compared[0]["overall"]["macro"]["value"]
    assert distilled["distilled_minus_sft"]["value"] is not None
    assert Path("runs/latest").resolve() == Path("runs/first").resolve()
    for name in ("recipe.yaml", "metrics.jsonl", "student/config.json", "checkpoints", "report/comparison.md",
                 "control/student/config.json", "export/model.safetensors", "report/distilled/report.html",
                 "report/paired/comparison.html"):  # fmt: skip
        assert (Path("runs/first") / name).exists(), name

    # the model is not named: it is the newest run; the dataset's name means ./data/NAME
    report = call("eval", "--dataset", dataset, "--out", "reports/run")
    exported = call("export", "runs/first", "--out", "student")
    assert exported["max_logit_difference"] == 0
    again = call("eval", "--model", "student", "--dataset", f"data/{dataset}", "--out", "reports/export")
    assert again["metrics"] == report["metrics"], "the exported student scores what the run's student scores"

    on_disk = json.loads(Path("reports/run/report.json").read_text())
    assert on_disk == report
    assert on_disk["dataset"] == dataset and on_disk["split"] == "test"
    auc = on_disk["metrics"]["auc"]
    assert set(auc["labels"]) == {"NORM", "MI", "STTC", "CD", "HYP"}
    defined = [label["value"] for label in auc["labels"].values() if label["value"] is not None]
    assert auc["macro"]["value"] == pytest.approx(sum(defined) / len(defined))
    for label in auc["labels"].values():
        assert (label["value"] is None) == (min(label["n_pos"], label["n_neg"]) == 0)
    assert "| NORM |" in Path("reports/run/report.md").read_text()


def test_a_raw_download_is_prepared_first(shared_data, checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVLECG_DATA", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "ludb").symlink_to(shared_data / "ludb")
    report = evlecg("eval", "--model", str(checkpoints["llava"]), "--dataset", "ludb", "--split", "all", "--labels",
                    "NORM,HYP", "--out", "report", monkeypatch=monkeypatch, capsys=capsys)  # fmt: skip
    assert report["n_records"] == 140
    assert (tmp_path / "elsewhere" / "ludb-prepared" / "manifest.json").is_file()
