"""Start-up checks, permissions and the dry run."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import evlecg.training.build as job
from evlecg import cli
from evlecg.distill import distill
from evlecg.errors import EvlecgError
from evlecg.models import checks
from evlecg.models import load as models
from evlecg.models.encode import Encoder, Turn
from evlecg.page.layout import page_layout
from evlecg.page.render import Page
from evlecg.progress import Progress
from evlecg.recipe import load_recipe, parse_set


def opened(path):
    loaded = models.load(models.inspect(str(path)))
    return loaded, Encoder(loaded.checkpoint, loaded.processor)


def a_side(encoder, answer="ST depression in V5"):
    width, height = encoder.size_px
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return encoder.encode([Page(pixels, page_layout("3x4+1", size_px=encoder.size_px))], [[Turn("What?", answer)]])


def recipe(checkpoints, *sets, teacher="llava", student="idefics3"):
    chosen = {"teacher": str(teacher if "/" in str(teacher) else checkpoints[teacher]),
              "student": str(student if "/" in str(student) else checkpoints[student]),
              "train.batch_size": 4, "train.max_steps": 1, "threads": 1}  # fmt: skip
    return load_recipe(None, chosen | parse_set(["data.labels=[NORM, MI]", *sets]))


def resized(loaded, rows):
    return dataclasses.replace(loaded, checkpoint=dataclasses.replace(loaded.checkpoint, vocab_size=rows))


def test_a_padded_head_is_told_from_another_tokenizer(checkpoints):
    qwen, llava = opened(checkpoints["qwen2_vl"])[0], opened(checkpoints["llava"])[0]
    assert checks.match_tokenizers(qwen, qwen).kind == "same"
    padded = checks.match_tokenizers(resized(qwen, 151936), resized(qwen, 152064))
    assert padded.kind == "padded head" and "151936 to 152063" in padded.note
    other = opened(checkpoints["qwen2_vl"])[0]
    other.processor.tokenizer.add_tokens(["<one>", "<more>"])
    extended = checks.match_tokenizers(qwen, other)
    assert extended.kind == "extended" and "2 more" in extended.note
    different = checks.match_tokenizers(qwen, llava)
    assert different.kind == "different" and different.shared < 600 and "byte offsets" in different.note


def test_byte_groups_are_boundaries_of_both_sides(checkpoints):
    answer = "premature ventricular contractions, größer"
    ends = [checks.answer_ends(a_side(opened(checkpoints[name])[1], answer)) for name in ("llava", "idefics3")]
    size = len(answer.encode())
    assert all(found[-2:] == [size, size + 1] for found in ends), "the end mark counts as one byte"
    ends = [found[:-1] for found in ends]
    assert ends[0] != ends[1]
    common = sorted(set(ends[0]) & set(ends[1]))
    assert 1 < len(common) < max(map(len, ends))
    assert "".join(checks.cut(answer, common)) == answer
    assert checks.cut("aé", [1, 2, 3]) == ["a", "�", "�"]


class Listening(Progress):
    def __init__(self):
        self.tables, self.warnings = {}, []

    def table(self, title, columns, rows):
        self.tables[title] = {row[0].strip(): list(row[1:]) for row in rows}

    def warn(self, message):
        self.warnings.append(message)


def test_one_screen_says_it_all_and_run_json_keeps_it(checkpoints, synthetic, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "ESTIMATE_FROM", 0)  # tiny models are not worth an estimate
    heard = Listening()
    distill(recipe(checkpoints, "train.dtype=bfloat16"), data=synthetic, out=tmp_path / "run", progress=heard)
    screen = heard.tables["start-up checks"]
    assert screen["image tokens = features"] == ["4 = 4", "16 = 16"]
    assert screen["tokenizers"][0] == "different" and screen["its byte groups"][0].replace("|", "") in ("yes", "no")
    assert "of 2048 positions" in screen["longest sequence"][0] and "bfloat16" in screen["family"][0]
    assert heard.tables["memory of a training step"]["weights"][0].endswith("KiB")
    assert any("bf16" in message for message in heard.warnings)
    kept = json.loads((tmp_path / "run" / "run.json").read_text())["checks"]
    assert kept["memory"]["peak"] > kept["memory"]["at_least"] > 0 and kept["memory"]["fits"]
    assert kept["tokenizers"]["kind"] == "different" and "".join(kept["answer_groups"]) in ("yes", "no")
    assert kept["student"]["image_features"] == kept["student"]["visual_tokens"] == 4


def test_a_sequence_that_is_too_long_is_an_error_before_weights(checkpoints, synthetic, tmp_path, monkeypatch):
    short = shutil.copytree(checkpoints["llava"], tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 24
    (short / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(models, "load", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(EvlecgError, match="positions, the model has 24"):
        distill(recipe(checkpoints, teacher=short), data=synthetic, out=tmp_path / "run")


def test_a_processor_of_another_model_is_found_out(checkpoints, synthetic, tmp_path):
    odd = shutil.copytree(checkpoints["llava"], tmp_path / "odd")
    file = odd / "processor_config.json"
    config = json.loads(file.read_text())
    config["patch_size"] = 28  # a quarter of the image tokens
    file.write_text(json.dumps(config))
    with pytest.raises(EvlecgError, match="the teacher has 4 image tokens in its text and 16 image features"):
        distill(recipe(checkpoints, "train.batch_size=1", teacher=odd), data=synthetic, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_features_that_do_not_fill_the_text_are_an_error(checkpoints, synthetic, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "count_features", lambda loaded, side: 5)
    with pytest.raises(EvlecgError, match="4 image tokens in its text and 5 image features"):
        distill(recipe(checkpoints), data=synthetic, out=tmp_path / "run")


class Evil:
    """A pickle that writes a file when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickled_weights_need_leave_and_run_no_code_even_then(checkpoints, tmp_path):
    pickled = shutil.copytree(checkpoints["llava"], tmp_path / "pickled")
    weights = load_file(pickled / "model.safetensors")
    (pickled / "model.safetensors").unlink()
    torch.save(weights, pickled / "pytorch_model.bin")
    with pytest.raises(EvlecgError, match=r"pickled \(pytorch_model.bin\).*--allow-pickle"):
        models.inspect(str(pickled))
    loaded = models.load(models.inspect(str(pickled), allow_pickle=True))
    plain = models.load(models.inspect(str(checkpoints["llava"])))
    for name, value in plain.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value)
    with (pickled / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Evil(tmp_path / "ran"), file)
    with pytest.raises(EvlecgError, match="cannot be loaded"):
        models.load(models.inspect(str(pickled), allow_pickle=True))
    assert not (tmp_path / "ran").exists()


def test_code_of_a_checkpoint_needs_leave(tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    folder, ran = tmp_path / "remote", tmp_path / "ran"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "strange_ecg", "auto_map": {"AutoConfig": "configuration_strange.StrangeConfig"}})
    )
    (folder / "configuration_strange.py").write_text(
        "from transformers import PretrainedConfig\n"
        f"open({str(ran)!r}, 'w').close()\n"
        "class StrangeConfig(PretrainedConfig):\n    model_type = 'strange_ecg'\n"
    )
    with pytest.raises(EvlecgError, match=r"code of its own.*--trust-remote-code"):
        models.inspect(str(folder))
    assert not ran.exists()
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(EvlecgError, match="'strange_ecg' is not an image-text-to-text family"):
        models.inspect(str(folder), kind="text", trust_remote_code=True)
    assert ran.exists()


def test_a_dry_run_tells_and_leaves_nothing(checkpoints, synthetic, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["distill", "--dry-run", "--json", "--teacher", str(checkpoints["llava"]), "--student",
                 str(checkpoints["idefics3"]), "--data", str(synthetic), "--batch-size", "4", "--epochs", "2",
                 "--teacher-dtype", "bfloat16", "--student-dtype", "float32", "--lora-rank", "2",
                 "--set", "train.remember_teacher=true", "--set", "evaluate.every=5"]  # fmt: skip
    before = sorted(str(file) for file in synthetic.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["evlecg", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    shown = capsys.readouterr()
    assert not stopped.value.code
    told = json.loads(shown.out)
    assert told["total_steps"] == 12 and told["checks"]["memory"]["fits"]
    assert told["checks"]["teacher"]["dtype"] == "bfloat16" and told["checks"]["student"]["trained"] < 10_000
    assert told["teacher_s"] > 0 and told["estimated_s"] > told["start_s"] > 0
    assert told["evaluations"] == 3 and told["evaluation_s"] > 0
    steps_s = 12 * told["step_s"] + 3 * told["evaluation_s"]
    assert told["estimated_s"] == pytest.approx(told["start_s"] + told["teacher_s"] + steps_s)
    assert "memory of a training step" in shown.err and "start-up checks" in shown.err
    assert list(tmp_path.iterdir()) == [] and sorted(str(file) for file in synthetic.rglob("*")) == before


def test_a_dry_run_makes_no_data(tmp_path, monkeypatch):
    from evlecg.pipeline import rehearse_line

    monkeypatch.chdir(tmp_path)
    sets = ["data.synthetic_train=4", "data.synthetic_val=1", "data.synthetic_test=1", "data.labels=[NORM, MI]",
            "data.dir=synthetic", "train.batch_size=2", "teacher=none"]  # fmt: skip
    assert rehearse_line(load_recipe(None, parse_set(sets))).total_steps == 6
    assert list(tmp_path.iterdir()) == []
