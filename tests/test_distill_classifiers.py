"""Distillation across kinds: pages, signals and words, each as teacher and as student, through eval and export."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from evlecg import cli
from evlecg.data.synthetic import generate
from evlecg.data.writer import write_prepared
from evlecg.distill import distill
from evlecg.errors import EvlecgError
from evlecg.evaluate import evaluate
from evlecg.export import export
from evlecg.models.checks import STATES, check_labels
from evlecg.models.load import inspect, load
from evlecg.page.render import render
from evlecg.progress import Progress
from evlecg.recipe import load_recipe, parse_set
from tests import tiny_classifiers

NAMES = [*tiny_classifiers.FAMILIES, "hubert_ecg"]
ALL_TERMS = (
    "objective.lambda_m=0.3", "objective.lambda_r=1", "objective.lambda_ot=0.5", "objective.align.heads=2",
    "log.gradients_every=1",
    "train.max_steps=2", "train.batch_size=4", "data.labels=[NORM, MI]", "data.max_train=8",
)  # fmt: skip


@pytest.fixture(scope="module")
def models(checkpoints, tmp_path_factory):
    root = tmp_path_factory.mktemp("classifiers")
    made = {name: tiny_classifiers.write(root / name, name) for name in tiny_classifiers.FAMILIES}
    return checkpoints | made | {"hubert_ecg": tiny_classifiers.hubert_ecg(root / "hubert_ecg")}


def recipe(models, teacher, student, *sets):
    chosen = {
        "teacher": str(models[teacher]) if teacher != "none" else "none", "student": str(models[student]),
        "train.lr": 1e-3, "log.every": 1, "threads": 1, "trust_remote_code": True,
    }  # fmt: skip
    return load_recipe(None, chosen | parse_set(list(sets)))


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def trained(run, student):
    """Every term is finite, and moves the student."""
    found = rows(run)
    assert len(found) == 2
    for row in found:
        assert set(row["terms"]) == {"ce", "mhca", "anchor", "rel", "ot", "rec_answer", "rec_visual"}
        assert all(math.isfinite(value) for value in row["terms"].values())
        assert all(row["gradients"][name] > 0 for name in ("ce", "mhca", "rel", "ot")), (student, row["gradients"])


@pytest.mark.parametrize("student", NAMES)
def test_a_language_model_teaches_every_classifier(models, synthetic, tmp_path, student):
    distill(recipe(models, "llava", student, *ALL_TERMS), data=synthetic, out=tmp_path / "run")
    trained(tmp_path / "run", student)
    result = export(tmp_path / "run", out=tmp_path / "export", trust_remote_code=True)
    assert result.max_logit_difference <= 1e-6
    assert result.weights.name == "model.safetensors"
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run/student", result.out))
    assert set(before) == set(after) and all(bool((before[name] == after[name]).all()) for name in before)
    reports = [
        evaluate(str(folder), data=synthetic, out=tmp_path / f"report-{place}", n_boot=10, trust_remote_code=True)
        for place, folder in enumerate((tmp_path / "run", tmp_path / "export"))
    ]
    assert reports[0].labels == ("NORM", "MI")
    assert reports[0].to_dict()["metrics"] == reports[1].to_dict()["metrics"]
    card = (result.out / "README.md").read_text()
    assert "One logit a label" in card
    form = {"hubert_ecg": "5 s of 12 leads", "wav2vec2": "10 s of 12 leads", "patchtst": "at 50 Hz"}.get(student, "")
    assert form in card


@pytest.mark.parametrize("teacher", NAMES)
def test_every_classifier_teaches_a_language_model(models, synthetic, tmp_path, teacher):
    distill(recipe(models, teacher, "idefics3", *ALL_TERMS), data=synthetic, out=tmp_path / "run")
    trained(tmp_path / "run", "idefics3")


@pytest.mark.parametrize(
    ("teacher", "student"),
    [("vit", "patchtst"), ("hubert_ecg", "resnet"), ("patchtst", "hubert"), ("swin", "convnext")],
)
def test_classifiers_teach_one_another(models, synthetic, tmp_path, teacher, student):
    sets = (*ALL_TERMS, "augment.level=light", "augment.share=1.0", "augment.start_s=1.0", "train.packing=never")
    distill(recipe(models, teacher, student, *sets), data=synthetic, out=tmp_path / "run")
    trained(tmp_path / "run", student)


@pytest.mark.parametrize("student", ["resnet", "patchtst"])
def test_a_small_classifier_learns(models, synthetic, tmp_path, student):
    sets = ("data.labels=[NORM]", "train.epochs=20", "train.batch_size=8", "train.lr=5e-3")
    distill(recipe(models, "none", student, *sets), data=synthetic, out=tmp_path / "run")
    losses = [row["terms"]["ce"] for row in rows(tmp_path / "run")]
    assert np.mean(losses[-3:]) < 0.6 * np.mean(losses[:3])
    report = evaluate(str(tmp_path / "run"), data=synthetic, out=tmp_path / "report", split="train", n_boot=10)
    assert report.macro.value > 0.9


@pytest.mark.parametrize("method", ["dskd", "minilm", "em_kd"])
def test_what_cannot_read_a_classifier_says_so_and_leaves_nothing(models, synthetic, tmp_path, method):
    chosen = recipe(models, "llava", "patchtst", f"method={method}")
    with pytest.raises(EvlecgError, match=f"--method {method} cannot read this family"):
        distill(chosen, data=synthetic, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_is_resumed_and_a_student_trains_on(models, synthetic, tmp_path):
    chosen = recipe(models, "llava", "patchtst", *ALL_TERMS, "checkpoint.every=1", "checkpoint.keep_last=2")
    distill(chosen, data=synthetic, out=tmp_path / "run")
    whole = load_file(tmp_path / "run" / "student" / "model.safetensors")
    for gone in ("student", "checkpoints/step-00000002"):
        shutil.rmtree(tmp_path / "run" / gone)
    assert distill(chosen, data=synthetic, out=tmp_path / "run", resume=True).steps == 2
    resumed = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert all(bool((resumed[name] == whole[name]).all()) for name in whole)
    again = dataclasses.replace(chosen, student=str(tmp_path / "run"), teacher="none")
    before = load_file(tmp_path / "run" / "student" / "model.safetensors")["head.linear.weight"]
    loaded = load(inspect(again.student), labels=("MI", "NORM"))
    assert (loaded.model.head.weight == before).all(), "its head knows the labels and is kept"
    distill(again, data=synthetic, out=tmp_path / "again")


def test_questions_and_pictures_that_a_classifier_cannot_read_fail_before_anything_loads(models, synthetic, tmp_path):
    for asked in ("report", "choose_all", "multiple_choice"):
        chosen = recipe(models, "none", "patchtst", f"data.tasks=[yes_no, {asked}]")
        with pytest.raises(EvlecgError, match="yes or no to labels"):
            distill(chosen, data=synthetic, out=tmp_path / "run")
    records = list(generate({"train": 4, "val": 1, "test": 1}, seed=0))
    for place in range(4):
        page = render(records[place].signal_mV, records[place].fs_hz, size_px=(300, 200))
        file = io.BytesIO()
        Image.fromarray(page.pixels).save(file, format="PNG")
        records[place] = dataclasses.replace(
            records[place], signal_mV=np.zeros((12, 0), np.float32), fs_hz=0.0, image=file.getvalue()
        )  # fmt: skip
    about = {"dataset": "pictures", "title": "pictures", "licence": "", "citation": ""}
    write_prepared(tmp_path / "data", records, descriptions=dict.fromkeys(records[0].labels, "it"), about=about)
    with pytest.raises(EvlecgError, match="is a picture"):
        distill(recipe(models, "none", "patchtst"), data=tmp_path / "data", out=tmp_path / "run")
    with pytest.raises(EvlecgError, match="is a picture"):
        distill(recipe(models, "wav2vec2", "vit"), data=tmp_path / "data", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    distill(recipe(models, "none", "vit", "train.max_steps=1"), data=tmp_path / "data", out=tmp_path / "run")


def test_a_teacher_that_does_not_know_a_label(models, synthetic, tmp_path):
    told = []

    class Listening(Progress):
        def info(self, text):
            told.append(text)

    teacher = load(inspect(str(models["vit"])))
    check_labels(teacher, ("NORM", "AFIB"), STATES, Listening())
    assert len(told) == 1 and "does not know AFIB" in told[0]
    with pytest.raises(EvlecgError, match=r"does not know AFIB .*it knows NORM, MI"):
        check_labels(teacher, ("NORM", "AFIB"), STATES | {"answers"}, Listening())
    check_labels(teacher, ("NORM", "MI"), STATES | {"answers"}, Listening())
    with pytest.raises(EvlecgError, match="has no label AFIB"):
        evaluate(str(models["vit"]), data=synthetic, out=tmp_path / "report", labels=("NORM", "AFIB"))


def call(*arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evlecg", *arguments, "--json", "-q"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    shown = capsys.readouterr()
    return stopped.value.code, json.loads(shown.out)


@pytest.mark.parametrize(("teacher", "student"), [("llava", "hubert_ecg"), ("hubert_ecg", "vit")])
def test_the_command_line_on_recorded_ecgs(shared_data, models, tmp_path, monkeypatch, capsys, teacher, student):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EVLECG_DATA", raising=False)

    def evlecg(*arguments):
        code, told = call(*arguments, monkeypatch=monkeypatch, capsys=capsys)
        assert not code, told
        return told

    evlecg("prepare", "--dataset", "ptbxl", "--source", str(shared_data / "ptbxl"), "--labels", "ptbxl-super",
           "--out", "data/ptbxl")  # fmt: skip
    line = ("distill", "--teacher", str(models[teacher]), "--student", str(models[student]), "--out", "runs/one",
            "--max-steps", "2", "--batch-size", "8", "--set", "train.lr=1e-3")  # fmt: skip
    code, told = call(*line, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and "--trust-remote-code" in told["error"]["hint"]
    told = evlecg(*line, "--trust-remote-code")
    names = [model["name"] for model in told["models"]]
    assert names == (["teacher", "distilled"] if teacher == "llava" else ["distilled"]), "no head, no report"
    trust = ("--trust-remote-code",) if student == "hubert_ecg" else ()
    report = evlecg("eval", "--model", "runs/one", "--dataset", "ptbxl", "--out", "reports/one", *trust)
    assert report["provenance"]["model"]["kind"] == ("signal" if student == "hubert_ecg" else "image")
    exported = evlecg("export", "runs/one", "--out", "student", *trust)
    assert exported["max_logit_difference"] <= 1e-6
    if trust:
        code, told = call("eval", "--dataset", "ptbxl", "--model", "student", monkeypatch=monkeypatch, capsys=capsys)
        assert code == 2 and "not run unasked" in told["error"]["what"]
