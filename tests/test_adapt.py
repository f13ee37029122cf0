"""Parts by name, adapters, frozen weights, checkpointed gradients, quantised teachers."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from evlecg.distill import distill
from evlecg.errors import EvlecgError
from evlecg.models import adapt
from evlecg.models import load as models
from evlecg.models.encode import Encoder, Turn
from evlecg.models.outputs import forward
from evlecg.page.layout import page_layout
from evlecg.page.render import Page
from evlecg.recipe import LoraConfig, TrainConfig, load_recipe, parse_set

FAMILIES = ("llava", "idefics3", "qwen2_vl")
LORA = ("lora.rank=4", "lora.alpha=8", "lora.dropout=0")


def opened(path):
    loaded = models.load(models.inspect(str(path)))
    loaded.model.eval()
    return loaded, Encoder(loaded.checkpoint, loaded.processor)


def a_side(encoder):
    width, height = encoder.size_px
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return encoder.encode([Page(pixels, page_layout("3x4+1", size_px=encoder.size_px))], [[Turn("Is it?", "no")]])


def recipe(checkpoints, *sets, student="idefics3", teacher="llava"):
    chosen = {"teacher": str(checkpoints[teacher]) if teacher else "none", "student": str(checkpoints[student]),
              "train.batch_size": 8, "train.lr": 1e-2, "train.max_steps": 2, "log.every": 1, "threads": 1}  # fmt: skip
    return load_recipe(None, chosen | parse_set(["data.labels=[NORM, MI]", "train.warmup=0", *sets]))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_one_role(checkpoints, family):
    loaded, _ = opened(checkpoints[family])
    found = adapt.roles(loaded.model)
    assert set(found) == {name for name, _ in loaded.model.named_parameters(remove_duplicate=False)}
    assert set(found.values()) == set(adapt.ROLES)
    expected = {"llava": "multi_modal_projector", "idefics3": "connector", "qwen2_vl": "visual.merger"}[family]
    assert all((expected in name) == (role == "projector") for name, role in found.items())
    assert all("layers" not in name or role != "projector" for name, role in found.items())


def test_parts_are_named_by_globs_and_expressions(checkpoints):
    model = opened(checkpoints["llava"])[0].model
    inside = adapt.part(model, "language_model.layers.0", key="x")
    assert len(inside) == 9 and all("language_model.layers.0." in name for name in inside)
    assert adapt.part(model, "layers.*.self_attn", key="x") == [
        name for name, _ in model.named_parameters() if "self_attn" in name
    ]
    assert adapt.part(model, r"re:mlp\.up", key="x") == ["model.language_model.layers.0.mlp.up_proj.weight"]
    assert not set(adapt.part(model, "layers.1", key="x")) & set(inside)
    with pytest.raises(EvlecgError, match=r"train.freeze.*did you mean 'vision_tower'"):
        adapt.part(model, "visoin_tower", key="train.freeze")
    with pytest.raises(EvlecgError, match="no regular expression"):
        adapt.part(model, "re:(", key="x")


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_logits_are_the_adapters_and_the_rest_is_untouched(checkpoints, family, tmp_path):
    from peft import PeftModel

    loaded, encoder = opened(checkpoints[family])
    side, before = a_side(encoder), {name: value.clone() for name, value in loaded.model.state_dict().items()}
    plain = forward(loaded, side).answer_logits_AV
    adapted = adapt.add_lora(loaded, LoraConfig(rank=4, alpha=8, dropout=0))
    loaded.model.eval()
    torch.testing.assert_close(forward(loaded, side).answer_logits_AV, plain)  # B is zero: nothing has changed yet
    trained = [name for name, value in loaded.model.named_parameters() if value.requires_grad]
    assert trained and all("lora_" in name or "modules_to_save" in name for name in trained)
    with torch.no_grad():
        for name, value in loaded.model.named_parameters():
            if value.requires_grad:
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05)
    moved = forward(loaded, side).answer_logits_AV
    assert (moved - plain).abs().max() > 1e-3
    adapt.save_adapter(adapted, tmp_path / "adapter")
    merged = adapt.merge(adapted)
    assert type(merged) is type(opened(checkpoints[family])[0].model)
    torch.testing.assert_close(forward(loaded, side, model=merged).answer_logits_AV, moved, atol=1e-5, rtol=1e-5)
    after, roles = merged.state_dict(), adapt.roles(merged)
    assert set(after) == set(before)
    for name, role in roles.items():
        touched = role == "projector" or (role == "language" and name.endswith("_proj.weight"))
        assert torch.equal(after[name], before[name]) != touched, name

    base, _ = opened(checkpoints[family])
    read = PeftModel.from_pretrained(base.model, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(forward(base, side, model=read).answer_logits_AV, moved)


def test_adapters_refuse_what_cannot_be(checkpoints):
    loaded, _ = opened(checkpoints["llava"])
    with pytest.raises(EvlecgError, match="no linear layer"):
        adapt.add_lora(loaded, LoraConfig(rank=2, targets=("*norm*",)))
    with pytest.raises(EvlecgError, match="adapted and trained fully"):
        adapt.add_lora(loaded, LoraConfig(rank=2, full=("language_model.layers.0",)))
    with pytest.raises(EvlecgError, match="shared with another module"):
        adapt.add_lora(loaded, LoraConfig(rank=2, full=("embed_tokens",)))  # tied to the head
    with pytest.raises(EvlecgError, match="need a trained model"):
        adapt.add_lora(models.load(models.inspect("builtin:student")), LoraConfig(rank=2))


def test_a_run_with_adapters_leaves_adapter_and_merged_student_and_resumes(checkpoints, synthetic, tmp_path):
    sets = (*LORA, "objective.lambda_ot=0.1", "train.max_steps=4", "checkpoint.every=2", "checkpoint.keep_last=9")
    run, halved = tmp_path / "run", tmp_path / "halved"
    distill(recipe(checkpoints, *sets), data=synthetic, out=run)
    before, after = (
        load_file(checkpoints["idefics3"] / "model.safetensors"),
        load_file(run / "student" / "model.safetensors"),
    )
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("text_model" in name for name in changed) and any("connector" in name for name in changed)
    assert not any("vision_model" in name or "norm" in name or "embed" in name for name in changed)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {item.name for item in (run / "adapter").iterdir()}
    made = json.loads((run / "run.json").read_text())["checks"]["student"]
    assert 0 < made["trained"] < made["parameters"] / 5

    stored = load_file(run / "checkpoints" / "step-00000002" / adapt.TRAINED_FILE)
    assert sum(tensor.numel() for tensor in stored.values()) < sum(tensor.numel() for tensor in before.values()) / 2
    shutil.copytree(run, halved)
    shutil.rmtree(halved / "checkpoints" / "step-00000004")
    distill(recipe(checkpoints, *sets), data=synthetic, out=halved, resume=True)
    again = load_file(halved / "student" / "model.safetensors")
    assert all(torch.equal(after[name], again[name]) for name in after)
    with pytest.raises(EvlecgError, match=r"train\.freeze"):
        distill(recipe(checkpoints, *sets, "train.freeze=[projector]"), data=synthetic, out=halved, resume=True)


@pytest.mark.parametrize(
    ("keys", "stays"),
    [
        (["train.freeze=[layers.0, embed_tokens]"], lambda name: "layers.0." in name or "embed_tokens" in name),
        (["train.train_only=[projector]", "train.gradient_checkpointing=true"], lambda name: "connector" not in name),
    ],
)
def test_frozen_parts_are_the_same_to_the_bit(checkpoints, synthetic, tmp_path, keys, stays):
    distill(recipe(checkpoints, *keys, teacher=None), data=synthetic, out=tmp_path / "run")
    before = load_file(checkpoints["idefics3"] / "model.safetensors")
    after = load_file(tmp_path / "run" / "student" / "model.safetensors")
    for name in before:
        assert torch.equal(before[name], after[name]) == stays(name), name


def test_only_what_trains_is_optimised_and_nothing_left_is_an_error(checkpoints):
    model = opened(checkpoints["idefics3"])[0].model
    adapt.choose_trained(model, TrainConfig(train_only=("language",), freeze=("embed_tokens",)))
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "text_model" in name and "embed" not in name}
    with pytest.raises(EvlecgError, match="nothing of the student is left"):
        adapt.choose_trained(model, TrainConfig(freeze=("*",)))


def test_frozen_batch_statistics_do_not_move():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[0].requires_grad_(False)
    adapt.train_mode(model)
    model(torch.randn(8, 3) + 5)
    assert model[0].running_mean.abs().max() == 0 and model[1].running_mean.abs().max() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_gradients_are_the_gradients(checkpoints, family):
    found = []
    for recompute in (False, True):
        loaded, encoder = opened(checkpoints[family])
        if recompute:
            adapt.checkpoint_gradients(loaded)
        loaded.model.train()
        side = a_side(encoder)
        outputs = forward(loaded, side)
        (outputs.hidden_BSD.square().mean() + outputs.answer_logits_AV.square().mean()).backward()
        found.append({name: value.grad for name, value in loaded.model.named_parameters()})
    assert any(value is not None for value in found[0].values())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize(("bits", "near"), [(8, 0.1), (4, 0.6)])
def test_a_quantised_teacher_takes_less_and_says_nearly_the_same(checkpoints, bits, near):
    plain, encoder = opened(checkpoints["llava"])
    quantised = models.load(plain.checkpoint, bits=bits)
    side = a_side(encoder)
    with torch.no_grad():
        expected, found = (forward(item, side).answer_logits_AV for item in (plain, quantised))
    assert 0 < (found - expected).abs().max() < near * expected.abs().max()
    layers = quantised.model.model
    assert layers.language_model.layers[0].mlp.up_proj.weight.dtype in (torch.int8, torch.uint8)
    assert all(parameter.dtype == torch.float32 for parameter in layers.vision_tower.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in layers.multi_modal_projector.parameters())


def test_a_quantised_teacher_spread_by_accelerate_trains_a_student(checkpoints, synthetic, tmp_path):
    keys = ["train.teacher_device_map=auto", "train.teacher_dtype=auto", "train.dtype=auto"]
    if find_spec("bitsandbytes") is not None:
        keys.append("train.teacher_bits=8")
    distill(recipe(checkpoints, *keys), data=synthetic, out=tmp_path / "run")
    assert (tmp_path / "run" / "student" / "config.json").is_file()


def test_without_a_library_quantising_is_one_error_before_weights(checkpoints, synthetic, tmp_path, monkeypatch):
    monkeypatch.setattr(adapt, "find_spec", lambda name: None)
    monkeypatch.setattr(models, "load", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(EvlecgError, match=r"need bitsandbytes.*pip install"):
        distill(recipe(checkpoints, "train.teacher_bits=4"), data=synthetic, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
