"""Original LLaVA checkpoints: written as published, compared with twins in transformers' own layout."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CLIPVisionModel,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    TimmWrapperConfig,
)

from evlecg.distill import distill
from evlecg.errors import EvlecgError
from evlecg.models import llava_layout
from evlecg.models import load as models
from evlecg.models.encode import Encoder, Turn
from evlecg.models.outputs import forward
from evlecg.page.layout import page_layout
from evlecg.page.render import Page
from evlecg.recipe import load_recipe
from tests.tiny import byte_level_tokenizer, metaspace_tokenizer

TURN = Turn("Does this ECG show hypertrophy?", "yes")
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14, "projection_dim": 16}  # fmt: skip
TEXT = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 2048}  # fmt: skip
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
FASTVIT = {"inference_mode": True, "layers": [1, 1, 1, 1, 1], "embed_dims": [8, 8, 16, 32, 32]}

# transformers' names -> the published ones, written down here once more and from the other side
PUBLISHED = (
    (r"^model\.language_model\.", "model."),
    (r"^model\.multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^model\.multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"^model\.vision_tower\.timm_model\.", "model.vision_tower.vision_tower.model."),
    (r"^model\.vision_tower\.(?!vision_tower)", "model.vision_tower.vision_tower.vision_model."),
)
PUBLISHED_FASTVIT = (
    (r"\.model\.stem\.", ".model.patch_embed."),
    (r"\.model\.final_conv\.", ".model.conv_exp."),
    (r"\.se\.fc1\.", ".se.reduce."),
    (r"\.se\.fc2\.", ".se.expand."),
    (r"\.mlp\.", ".convffn."),
    (r"\.gamma$", ""),
    (r"\.stages\.0\.blocks\.", ".network.0."),
    (r"\.stages\.1\.downsample\.proj\.0\.reparam_conv\.", ".network.1.proj.0.lkb_reparam."),
    (r"\.stages\.1\.downsample\.", ".network.1."),
    (r"\.stages\.1\.blocks\.", ".network.2."),
    (r"\.stages\.2\.downsample\.proj\.0\.reparam_conv\.", ".network.3.proj.0.lkb_reparam."),
    (r"\.stages\.2\.downsample\.", ".network.3."),
    (r"\.stages\.2\.blocks\.", ".network.4."),
    (r"\.stages\.3\.downsample\.proj\.0\.reparam_conv\.", ".network.5.proj.0.lkb_reparam."),
    (r"\.stages\.3\.downsample\.", ".network.5."),
    (r"\.stages\.3\.pos_emb\.", ".network.6."),
    (r"\.stages\.3\.blocks\.", ".network.7."),
    (r"\.stages\.4\.downsample\.proj\.0\.reparam_conv\.", ".network.8.proj.0.lkb_reparam."),
    (r"\.stages\.4\.downsample\.", ".network.8."),
    (r"\.stages\.4\.pos_emb\.", ".network.9."),
    (r"\.stages\.4\.blocks\.", ".network.10."),
)


def published(key: str) -> str:
    for pattern, target in (*PUBLISHED, *(PUBLISHED_FASTVIT if ".timm_model." in key else ())):
        key = re.sub(pattern, target, key)
    return key


def tokenizer_of(kind: str) -> Any:
    if kind == "llava_qwen2":
        return byte_level_tokenizer(500, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                                    eos_token="<|im_end|>", pad_token="<|endoftext|>")  # fmt: skip
    return metaspace_tokenizer(500, ["<s>", "</s>"], bos_token="<s>", eos_token="</s>")


def twin_of(kind: str, family: str, rows: int) -> Any:
    """A model in transformers' own layout, its embedding one row larger than the published one (`<image>`)."""
    text = {"llava_llama": LlamaConfig, "llava_mistral": MistralConfig, "llava_qwen2": Qwen2Config}[kind]
    tied = kind == "llava_qwen2"
    shared = {"text_config": text(vocab_size=rows + 1, tie_word_embeddings=tied, **TEXT), "image_token_id": rows,
              "tie_word_embeddings": tied}  # fmt: skip
    torch.manual_seed(0)
    if family == "fast_vlm":
        vision = TimmWrapperConfig(architecture="fastvit_mci3", do_pooling=True, global_pool="avg", hidden_size=64,
                                   model_args=FASTVIT)  # fmt: skip
        shared["text_config"].hidden_size = 64
        model = FastVlmForConditionalGeneration(FastVlmConfig(vision_config=vision, **shared))
    else:
        shared |= {"vision_config": CLIPVisionConfig(**VISION), "vision_feature_layer": -2,
                   "vision_feature_select_strategy": "default"}  # fmt: skip
        if family == "llava_next":
            model = LlavaNextForConditionalGeneration(LlavaNextConfig(image_grid_pinpoints=PINPOINTS, **shared))
        else:
            model = LlavaForConditionalGeneration(LlavaConfig(**shared))
    for name, parameter in model.named_parameters():  # far from their tidy initial values: a swapped pair must show
        fan_in = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 100
        torch.nn.init.normal_(parameter, mean=float("gamma" in name), std=1.5 * fan_in**-0.5)
    return model.eval()


def publish(folder: Path, kind: str, twin: Any, *, tower: str, tower_in_file: bool = True, **config: Any) -> Path:
    """Writes the twin as its authors would have: config, two shards with an index, tokenizer without `<image>`."""
    folder.mkdir(parents=True)
    tokenizer = tokenizer_of(kind)
    rows = len(tokenizer)
    tensors = {}
    for key, tensor in twin.state_dict().items():
        if key.endswith(("embed_tokens.weight", "lm_head.weight")):
            tensor = tensor[:rows]
        if key == "lm_head.weight" and twin.config.tie_word_embeddings:
            continue
        if key.startswith("model.vision_tower.") and not tower_in_file:
            continue
        tensors[published(key)] = tensor.clone().contiguous()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)  # old files hold what is computed
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    text = {key: value for key, value in twin.config.text_config.to_dict().items() if key in TEXT}
    tree = {
        "model_type": kind, "architectures": ["LlavaForCausalLM"], "torch_dtype": "float32", "vocab_size": rows,
        "tie_word_embeddings": twin.config.tie_word_embeddings, "mm_vision_tower": tower, "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "tune_mm_mlp_adapter": False, **text, **config,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(tree))
    tokenizer.save_pretrained(folder)
    return folder


def tower_folder(folder: Path, twin: Any) -> str:
    """The vision tower by itself, as `mm_vision_tower` names it."""
    tower = CLIPVisionModel(CLIPVisionConfig(**VISION))
    tower.load_state_dict(twin.model.vision_tower.state_dict())
    tower.save_pretrained(folder)
    return str(folder)


def page_of(size_px: tuple[int, int]) -> Page:
    pixels = np.random.default_rng(0).integers(0, 255, (size_px[1], size_px[0], 3), dtype=np.uint8)
    return Page(pixels, page_layout("3x4+1", size_px=size_px))


def logits_of(loaded: models.Loaded, size_px: tuple[int, int]) -> tuple[torch.Tensor, Any]:
    side = Encoder(loaded.checkpoint, loaded.processor, size_px=size_px).encode([page_of(size_px)], [[TURN]])
    with torch.no_grad():
        return loaded.model.eval()(**side.inputs).logits, side


CASES = [
    ("llava_llama", "llava_next", {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}),
    ("llava_mistral", "llava", {"image_aspect_ratio": "pad"}),
    ("llava_llama", "llava", {"image_aspect_ratio": "square", "mm_patch_merge_type": "spatial_unpad"}),
    ("llava_qwen2", "fast_vlm", {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"}),
]


@pytest.mark.parametrize(("kind", "family", "config"), CASES, ids=["unpad", "pad", "square", "fastvlm"])
@pytest.mark.parametrize("tower_in_file", [True, False])
def test_logits_are_those_of_the_native_twin(tmp_path, kind, family, config, tower_in_file):
    rows = len(tokenizer_of(kind))
    twin = twin_of(kind, family, rows)
    if family == "fast_vlm":
        if not tower_in_file:
            pytest.skip("FastVLM is published with its tower")
        tower = str(tmp_path / "mobileclip_l_128")
        twin.config.vision_config.save_pretrained(tower)
        size = (160, 120)
    else:
        tower, size = tower_folder(tmp_path / "tower", twin), (70, 40)
    pinpoints = {"image_grid_pinpoints": [pair[::-1] for pair in PINPOINTS]} if family == "llava_next" else {}
    folder = publish(tmp_path / "original", kind, twin, tower=tower, tower_in_file=tower_in_file, **config, **pinpoints)
    checkpoint = models.inspect(str(folder))
    assert checkpoint.model_type == family and checkpoint.image_token_id == rows
    loaded = models.load(checkpoint)
    found, side = logits_of(loaded, size)
    with torch.no_grad():
        expected = twin(**side.inputs).logits
    torch.testing.assert_close(found[..., :rows], expected[..., :rows], atol=1e-5, rtol=1e-5)
    assert float((found[..., :rows] - found[..., :rows].mean()).abs().max()) > 0.1, "logits that say something"
    # the row added for <image> is never the answer
    assert bool((found[..., rows] < found[..., :rows].max(-1).values).all())

    # the native twin's folder, with the processor that was put together, goes through transformers' own loading
    native = tmp_path / "native"
    twin.save_pretrained(native)
    loaded.processor.save_pretrained(native)
    again, other = logits_of(models.load(models.inspect(str(native))), size)
    assert torch.equal(other.inputs["input_ids"], side.inputs["input_ids"])
    torch.testing.assert_close(again[..., :rows], found[..., :rows], atol=1e-5, rtol=1e-5)


def test_flat_tiles_stand_one_behind_the_other(tmp_path):
    """No transformers family merges tiles flat; the twin does it by hand: every tile alone, features in tile order."""
    rows = len(tokenizer_of("llava_llama"))
    twin = twin_of("llava_llama", "llava", rows)
    folder = publish(tmp_path / "original", "llava_llama", twin, tower=tower_folder(tmp_path / "tower", twin),
                     image_aspect_ratio="anyres", image_grid_pinpoints=str([tuple(p) for p in PINPOINTS]))  # fmt: skip
    loaded = models.load(models.inspect(str(folder)))
    assert loaded.checkpoint.original.tiled
    for size, tiles in (((70, 54), 5), ((120, 40), 4)):
        found, side = logits_of(loaded, size)
        assert side.inputs["pixel_values"].shape[0] == tiles
        assert side.visual_BS.sum() == tiles * 4
        ids = side.inputs["input_ids"]
        with torch.no_grad():
            features = [twin.model.get_image_features(tile[None], return_dict=True).pooler_output[0]
                        for tile in side.inputs["pixel_values"]]  # fmt: skip
            embedded = twin.get_input_embeddings()(ids)
            embedded[0, side.visual_BS[0]] = torch.cat(features)
            expected = twin(inputs_embeds=embedded, attention_mask=side.inputs["attention_mask"]).logits
        torch.testing.assert_close(found[..., :rows], expected[..., :rows], atol=1e-5, rtol=1e-5)
        boxes = side.visual_box_BN4[0]
        torch.testing.assert_close(boxes[:4].mean(0), torch.tensor([0.25, 0.25, 0.75, 0.75]), atol=0.06, rtol=0)
    two = Encoder(loaded.checkpoint, loaded.processor, size_px=size).encode([page_of(size)] * 2, [[TURN]] * 2)
    outputs = forward(loaded, two)
    torch.testing.assert_close(outputs.visual_BND[0], outputs.visual_BND[1], atol=1e-5, rtol=1e-5)


def test_prompts_are_those_of_the_published_conversations(tmp_path):
    expected = {
        "llava_llama": ("USER: <image>\nDoes this ECG show hypertrophy? ASSISTANT:", " yes</s>"),
        "llava_mistral": ("[INST] <image>\nDoes this ECG show hypertrophy? [/INST]", " yes </s>"),
        "llava_qwen2": ("<|im_start|>user\n<image>\nDoes this ECG show hypertrophy?<|im_end|>\n<|im_start|>assistant\n",
                        "yes<|im_end|>"),
    }  # fmt: skip
    for kind, (prompt, answer) in expected.items():
        family = "fast_vlm" if kind == "llava_qwen2" else "llava"
        twin = twin_of(kind, family, len(tokenizer_of(kind)))
        tower = str(tmp_path / kind / "mobileclip_l_128")
        if family == "fast_vlm":
            twin.config.vision_config.save_pretrained(tower)
        else:
            tower = tower_folder(Path(tower), twin)
        folder = publish(tmp_path / kind / "original", kind, twin, tower=tower, image_aspect_ratio="pad")
        checkpoint = models.inspect(str(folder))
        asked, full = Encoder(checkpoint, models.load_processor(checkpoint), size_px=(64, 64)).text(TURN)
        assert asked.endswith(prompt) and full == asked + answer, full


def test_every_weight_is_accounted_for(tmp_path):
    twin = twin_of("llava_llama", "llava", len(tokenizer_of("llava_llama")))
    folder = publish(tmp_path / "original", "llava_llama", twin, tower=tower_folder(tmp_path / "tower", twin))
    shard = folder / "model-00001-of-00002.safetensors"
    from safetensors.torch import load_file

    held = load_file(shard)
    save_file({**held, "model.mystery.weight": torch.ones(1)}, shard, metadata={"format": "pt"})
    with pytest.raises(EvlecgError, match=r"1 weights are unknown.*model\.mystery\.weight"):
        models.load(models.inspect(str(folder)))
    gone = next(key for key in held if "mm_projector" in key)
    save_file({key: value for key, value in held.items() if key != gone}, shard, metadata={"format": "pt"})
    with pytest.raises(EvlecgError, match="1 weights are missing"):
        models.load(models.inspect(str(folder)))
    # GEM's signal encoder reads no page: left out, and said so
    ecg = {"model.ecg_tower.conv1.weight": torch.ones(2), "model.ecg_projector.0.weight": torch.ones(2)}
    save_file({**held, **ecg}, shard, metadata={"format": "pt"})
    models.load(models.inspect(str(folder)))
    assert llava_layout.left_out([*held, *ecg])["the ECG signal encoder, which reads no page"] == 2
    shard.unlink()
    with pytest.raises(EvlecgError, match=r"1 weight files are missing: model-00001"):
        models.load(models.inspect(str(folder)))


def test_what_no_family_computes_is_refused_before_weights_are_read(tmp_path):
    twin = twin_of("llava_llama", "llava", len(tokenizer_of("llava_llama")))
    tower = tower_folder(tmp_path / "tower", twin)
    wrong = {
        "mm_projector_type": "linear", "mm_use_im_start_end": True, "image_aspect_ratio": "anyres_max_9",
        "mm_patch_merge_type": "unpad_maxpool",
    }  # fmt: skip
    for key, value in wrong.items():
        folder = publish(tmp_path / key, "llava_llama", twin, tower=tower, **{key: value})
        for file in folder.glob("*.safetensors"):
            file.unlink()
        with pytest.raises(EvlecgError, match=f"{key}.*not supported"):
            models.inspect(str(folder))
    folder = publish(tmp_path / "nowhere", "llava_llama", twin, tower=str(tmp_path / "no" / "tower"))
    with pytest.raises(EvlecgError, match=r"vision tower .* cannot be read"):
        models.inspect(str(folder))


def test_it_teaches_and_learns(checkpoints, synthetic, tmp_path):
    rows = len(tokenizer_of("llava_qwen2"))
    twin = twin_of("llava_qwen2", "fast_vlm", rows)
    twin.config.vision_config.save_pretrained(tmp_path / "mobileclip_l_128")
    fast = publish(tmp_path / "fast", "llava_qwen2", twin, tower=str(tmp_path / "mobileclip_l_128"),
                   image_aspect_ratio="pad")  # fmt: skip
    pulse_twin = twin_of("llava_llama", "llava", len(tokenizer_of("llava_llama")))
    pulse = publish(tmp_path / "pulse", "llava_llama", pulse_twin, tower=tower_folder(tmp_path / "tower", pulse_twin),
                    image_aspect_ratio="anyres", image_grid_pinpoints=PINPOINTS)  # fmt: skip
    common = {"train.max_steps": 2, "train.batch_size": 4, "threads": 1, "objective.lambda_m": 0.3,
              "data.labels": ("NORM", "MI"), "train.lr": 1e-3}  # fmt: skip
    run = tmp_path / "run"
    distill(load_recipe(None, {"teacher": str(pulse), "student": str(fast), **common}), data=synthetic, out=run)
    student = AutoModelForImageTextToText.from_pretrained(run / "student")
    assert type(student) is FastVlmForConditionalGeneration
    before = twin.state_dict()["model.multi_modal_projector.linear_1.weight"]
    assert not torch.equal(student.state_dict()["model.multi_modal_projector.linear_1.weight"], before)
    with pytest.raises(EvlecgError, match="can teach only"):
        distill(load_recipe(None, {"teacher": "none", "student": str(pulse), **common}), data=synthetic,
                out=tmp_path / "refused")  # fmt: skip
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("kind", ["pulse", "fastvlm"])
def test_real_sizes_map_without_weights(tmp_path, kind):
    """PULSE-7B and FastVLM-1.5B by their published configs, on the meta device: every key, every shape."""
    if kind == "pulse":
        tree = {
            "model_type": "llava_llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_projector_type": "mlp2x_gelu",
            "mm_hidden_size": 1024, "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
            "mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres",
            "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        }  # fmt: skip
        tokenizer, n_parameters = tokenizer_of("llava_llama"), 7.06e9
    else:
        tree = {
            "model_type": "llava_qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
            "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
            "max_position_embeddings": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "mm_vision_tower": "mobileclip_l_1024", "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 3072,
            "mm_vision_select_layer": -2, "mm_patch_merge_type": "flat", "image_aspect_ratio": "pad",
        }  # fmt: skip
        tokenizer, n_parameters = tokenizer_of("llava_qwen2"), 1.91e9
    tokenizer.add_tokens([llava_layout.IMAGE_TOKEN], special_tokens=True)
    original = llava_layout.translate(tree, tokenizer, name=kind)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(original.native)
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert sum(np.prod(shape) for shape in expected.values()) == pytest.approx(n_parameters, rel=0.01)
    stored = [(published(key), torch.empty(shape, device="meta")) for key, shape in expected.items()]
    found = llava_layout.state_dict(original, stored, name=kind)
    assert {key: tuple(tensor.shape) for key, tensor in found.items()} == expected
    assert not any(key.startswith("model.language_model") for key, _ in stored), "the published names are others"
