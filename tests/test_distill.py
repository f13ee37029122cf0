"""The training job on tiny models: what it leaves, that it learns, resumes and refuses."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from evlecg.data.synthetic import generate
from evlecg.data.writer import write_prepared
from evlecg.distill import distill
from evlecg.errors import EvlecgError
from evlecg.models.batch import epoch_batches, epoch_order, text_length
from evlecg.page.render import render
from evlecg.recipe import load_recipe, parse_set
from evlecg.schema import Question, Sample
from evlecg.training.step import grouped
from tests.families import gemma_kin

LABELS = "data.labels=[NORM, MI]"


def recipe(checkpoints, *sets, teacher="llava", student="idefics3"):
    chosen = {
        "teacher": str(checkpoints[teacher]) if teacher != "none" else "none",
        "student": str(checkpoints[student]),
        "train.batch_size": 8,
        "train.epochs": 2,
        "train.lr": 1e-3,
        "log.every": 1,
        "threads": 1,
    }
    return load_recipe(None, chosen | parse_set([LABELS, *sets]))


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run):
    return load_file(run / "student" / "model.safetensors")


ALL_TERMS = (
    "objective.lambda_m=0.3", "objective.lambda_r=1", "objective.lambda_ot=0.5", "log.gradients_every=2",
)  # fmt: skip


@pytest.mark.parametrize(
    ("teacher", "student"),
    [("llava", "idefics3"), ("idefics3_tiles", "llava"), ("qwen2_vl", "idefics3"), ("llava", "qwen2_vl")],
)
@pytest.mark.parametrize("strict", [False, True])
def test_every_term_trains_every_pair(checkpoints, synthetic, tmp_path, teacher, student, strict):
    run = tmp_path / "run"
    chosen = recipe(checkpoints, *ALL_TERMS, f"objective.strict={str(strict).lower()}", "train.max_steps=3",
                    teacher=teacher, student=student)  # fmt: skip
    result = distill(chosen, data=synthetic, out=run)
    assert result.steps == 3 and result.n_train == 24
    first = rows(run)[0]
    assert {"ce", "mhca", "rel", "ot"} <= set(first["terms"])
    assert all(math.isfinite(value) and value >= 0 for value in first["terms"].values())
    assert sum(first["weighted"].values()) == pytest.approx(first["loss"], rel=1e-5)
    assert all(first["gradients"][name] > 0 for name in ("ce", "mhca", "rel", "ot"))
    before = load_file(checkpoints[student] / "model.safetensors")
    after = weights(run)
    assert set(after) == set(before), "nothing that only training needs is saved with the student"
    assert any(not torch.equal(after[name], before[name]) for name in after)


def test_a_run_leaves_what_it_promises(checkpoints, synthetic, tmp_path):
    run = tmp_path / "run"
    distill(recipe(checkpoints), data=synthetic, out=run)
    assert {item.name for item in run.iterdir()} == {
        "figures",
        "recipe.yaml", "provenance.json", "metrics.jsonl", "student", "checkpoints", "run.json",
    }  # fmt: skip
    assert load_recipe(str(run / "recipe.yaml")) == recipe(checkpoints)
    made = json.loads((run / "run.json").read_text())
    assert made["checks"]["packed"] is True
    assert made["checks"]["teacher"]["visual_tokens"] == 16 and made["checks"]["student"]["visual_tokens"] == 4
    assert [item.name for item in (run / "checkpoints").iterdir()] == ["step-00000006"]
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]


def test_the_same_run_twice_is_the_same_to_the_bit_and_another_seed_is_not(checkpoints, synthetic, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        distill(recipe(checkpoints, f"seed={seed}", "train.max_steps=2"), data=synthetic, out=tmp_path / name)
    first, again, other = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_training_learns_what_a_page_shows(checkpoints, synthetic, tmp_path):
    chosen = recipe(checkpoints, "train.epochs=40", "train.lr=3e-3", "train.warmup=0.1", teacher="none")
    distill(chosen, data=synthetic, out=tmp_path / "run")
    losses = [row["terms"]["ce"] for row in rows(tmp_path / "run")]
    assert np.mean(losses[-3:]) < 0.1 * losses[0]


@pytest.mark.parametrize(("stop_at", "level"), [(2, "none"), (4, "none"), (4, "photo")])  # in either epoch
def test_a_resumed_run_is_the_uninterrupted_one(checkpoints, synthetic, tmp_path, stop_at, level):
    chosen = recipe(checkpoints, *ALL_TERMS, "checkpoint.every=1", "checkpoint.keep_last=9", f"augment.level={level}")
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    distill(chosen, data=synthetic, out=whole)
    shutil.copytree(whole, halved)
    for folder in (halved / "checkpoints").iterdir():  # as if it had been killed just after step `stop_at`
        if int(folder.name.removeprefix("step-")) > stop_at:
            shutil.rmtree(folder)
    shutil.rmtree(halved / "student")
    distill(chosen, data=synthetic, out=halved, resume=True)
    expected, found = weights(whole), weights(halved)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [row["step"] for row in rows(halved)] == [row["step"] for row in rows(whole)]
    assert [row["loss"] for row in rows(halved)] == [row["loss"] for row in rows(whole)]


def test_accumulated_batches_make_one_step(checkpoints, synthetic, tmp_path):
    distill(recipe(checkpoints, "train.accumulation=2", "train.epochs=1"), data=synthetic, out=tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]  # three batches: two, then one
    assert list(grouped(iter("abcde"), 2)) == [["a", "b"], ["c", "d"], ["e"]]


def test_every_record_is_read_once_an_epoch_by_exactly_one_process():
    assert sorted(epoch_order(10, seed=0, epoch=0)) == list(range(10))
    assert not np.array_equal(epoch_order(10, seed=0, epoch=0), epoch_order(10, seed=0, epoch=1))
    shares = [epoch_batches(23, 4, seed=0, epoch=3, process=p, processes=2) for p in (0, 1)]
    assert len(shares[0]) == len(shares[1]) == 3
    read = np.concatenate([batch for share in shares for batch in share])
    assert sorted(read) == list(range(23))


def test_the_last_batch_leaves_no_record_out_and_a_process_without_one_runs_along():
    shares = [epoch_batches(17, 4, seed=0, epoch=0, process=p, processes=2) for p in (0, 1)]
    assert [len(batch) for batch in shares[0]] == [4, 4, 1] and [len(batch) for batch in shares[1]] == [4, 4, 0]
    assert sorted(np.concatenate([*shares[0], *shares[1]])) == list(range(17))


def test_batches_of_similar_length():
    lengths = np.random.default_rng(0).integers(10, 500, 1003).tolist()

    def batches(bucket, lengths=lengths, epoch=0, **shared):
        return epoch_batches(1003, 8, seed=1, epoch=epoch, lengths=lengths, bucket=bucket, **shared)

    def padding(found):
        rows = [np.asarray(lengths)[batch] for batch in found]
        return sum(row.max() * len(row) - row.sum() for row in rows) / sum(lengths)

    plain, similar = batches(1), batches(50)
    assert len(plain) == len(similar) == 126 and sorted(np.concatenate(similar)) == list(range(1003))
    assert padding(plain) > 0.5 and padding(similar) < 0.1
    for mine, again in zip(similar, batches(50), strict=True):
        np.testing.assert_array_equal(mine, again)
    first, other = ({frozenset(batch) for batch in found} for found in (similar, batches(50, epoch=1)))
    assert len(first & other) < 5, "other records meet in every epoch"
    means = [np.mean(np.asarray(lengths)[batch]) for batch in similar]
    assert abs(np.corrcoef(means[:-1], np.arange(125))[0, 1]) < 0.3, "batches do not go from short to long"
    for mine, other in zip(batches(50, lengths=[7] * 1003), batches(1, lengths=None), strict=True):
        np.testing.assert_array_equal(mine, other)  # texts of one length: the order is what it was
    shares = [batches(50, process=p, processes=2) for p in (0, 1)]
    assert sorted(np.concatenate([*shares[0], *shares[1]])) == list(range(1003))


def test_a_yes_is_as_long_as_a_no():
    asked = Question("Does it show MI?", "yes")
    longer = dataclasses.replace(asked, answer="an old infarction", history=(("Which rhythm?", "sinus"),))
    lengths = [
        text_length(Sample(0, "a", (question,)))
        for question in (asked, dataclasses.replace(asked, answer="no"), longer)
    ]
    assert lengths == [5, 5, 4 + 5 + 4 + 2]


@pytest.mark.slow
def test_compiled_layers_train_the_same(checkpoints, synthetic, tmp_path):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler")
    for name, compiled in (("plain", "false"), ("compiled", "true")):
        chosen = recipe(checkpoints, f"train.compile={compiled}", "train.max_steps=2", "log.figures=false")
        distill(chosen, data=synthetic, out=tmp_path / name)
    plain, compiled = ([row["loss"] for row in rows(tmp_path / name)] for name in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert set(weights(tmp_path / "compiled")) == set(weights(tmp_path / "plain"))


def test_without_a_compiler_compile_is_refused(checkpoints, synthetic, tmp_path, monkeypatch):
    def fails(*_arguments, **_options):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(EvlecgError, match=r"torch\.compile does not work"):
        distill(recipe(checkpoints, "train.compile=true"), data=synthetic, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_frozen_vision_towers_stay(checkpoints, synthetic, tmp_path):
    distill(recipe(checkpoints, "train.freeze_vision=true", "train.max_steps=2"), data=synthetic, out=tmp_path / "run")
    before, after = load_file(checkpoints["idefics3"] / "model.safetensors"), weights(tmp_path / "run")
    vision = [name for name in before if "vision_model" in name]
    assert vision and all(torch.equal(before[name], after[name]) for name in vision)
    assert not torch.equal(before["model.connector.modality_projection.proj.weight"],
                           after["model.connector.modality_projection.proj.weight"])  # fmt: skip


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["data.labels=[NROM]"], "did you mean 'NORM'"),
        (["data.question=Is it normal?"], "no place for the label"),
        (["page.student_size=[10]"], "page size"),
        (["train.packing=always", "student=PREFIX"], "cannot pack"),
        (["augment.level=light", "train.remember_teacher=true"], "same pages in every epoch"),
    ],
)
def test_bad_input_leaves_nothing(checkpoints, synthetic, tmp_path, sets, said):
    if "student=PREFIX" in sets:  # its page attends to the question, so that questions cannot share one
        sets = [item.replace("PREFIX", str(gemma_kin.paligemma(tmp_path / "prefix"))) for item in sets]
    with pytest.raises(EvlecgError, match=said):
        distill(recipe(checkpoints, *sets), data=synthetic, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_folder_is_not_overwritten_by_accident(checkpoints, synthetic, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "precious.txt").write_text("x")
    with pytest.raises(EvlecgError, match="not empty"):
        distill(recipe(checkpoints), data=synthetic, out=run)
    with pytest.raises(EvlecgError, match="not a run"):
        distill(recipe(checkpoints), data=synthetic, out=run, overwrite=True)
    with pytest.raises(EvlecgError, match="no run to resume"):
        distill(recipe(checkpoints), data=synthetic, out=tmp_path / "none", resume=True)
    assert (run / "precious.txt").read_text() == "x"


def test_pictures_dialogues_and_reports_train(checkpoints, tmp_path):
    """A folder of signals and pictures, with labels, dialogues of several turns and reports, in one batch."""
    records = list(generate({"train": 6}))
    asked = (
        Question("Which rhythm?", "sinus", kind="dialogue"),
        Question("And why?", "P waves", kind="dialogue", history=(("Which rhythm?", "sinus"),)),
    )
    for place in (1, 4):
        file = io.BytesIO()
        page = render(records[place].signal_mV, records[place].fs_hz, size_px=(220, 170))
        Image.fromarray(page.pixels).save(file, "PNG")
        records[place] = dataclasses.replace(
            records[place], signal_mV=np.zeros((12, 0), np.float32), fs_hz=0.0, image=file.getvalue(), labels={},
            questions=asked,
        )  # fmt: skip
    about = {"dataset": "mixed", "title": "mixed", "licence": "", "citation": ""}
    write_prepared(tmp_path / "data", records, descriptions=dict.fromkeys(records[0].labels, "it"), about=about)
    tasks = "data.tasks=[yes_no, choose_all, multiple_choice, report, dialogue]"
    chosen = recipe(checkpoints, *ALL_TERMS, tasks, "train.batch_size=6", "train.max_steps=2", "data.wording=varied")
    result = distill(chosen, data=tmp_path / "data", out=tmp_path / "run")
    assert result.n_train == 6 and result.steps == 2
    assert all(math.isfinite(value) for row in rows(tmp_path / "run") for value in row["terms"].values())
