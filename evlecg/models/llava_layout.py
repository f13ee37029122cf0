"""Checkpoints in the original LLaVA layout, which transformers does not know.

PULSE-7B, the language side of GEM, LLaVA-Med and Apple's FastVLM are published like this (`llava_llama`,
`llava_mistral`, `llava_qwen2`). Their config is translated into that of the transformers family that computes the same,
every weight of their files is given its name there (or is one of the few that are known and left out, or is an error),
and a processor is put together from the tokenizer beside them and from what the config says of pictures.

How pictures become tokens decides the family:

| `image_aspect_ratio` | `mm_patch_merge_type` | transformers |
|---|---|---|
| `anyres` | `spatial_unpad` | LLaVA-NeXT: tiles put together, padding cut off, a newline token a row |
| `anyres` | `flat` (the default) | LLaVA fed with tiles: whole page first, then tile by tile (`TiledLlavaProcessor`) |
| `pad`, `square`, `ori` | any: one tile | LLaVA; FastVLM where the tower is MobileCLIP's |

The placeholder `<image>` is added to the tokenizer. Where the embedding has no row for it, one is added; the new row of
the output head is the mean of the others, so that every other logit stays what it was.

Source:
    Layout and preprocessing: LLaVA (Liu et al. 2023, arXiv 2304.08485; LLaVA-NeXT 2024), the code and configs of
    LLaVA, PULSE, GEM and ml-fastvlm; FastViT names: timm.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AddedToken,
    AutoConfig,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    FastVlmConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    Qwen2Config,
)
from transformers.models.llava.image_processing_llava import LlavaImageProcessor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from evlecg.errors import EvlecgError

IMAGE_TOKEN = "<image>"
_CLIP_LARGE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
# towers that nearly every published checkpoint names: known here, so that a complete file needs nothing from the hub
KNOWN_TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": {**_CLIP_LARGE, "image_size": 336},
    "openai/clip-vit-large-patch14": {**_CLIP_LARGE, "image_size": 224},
}
MOBILECLIP = re.compile(r"mobileclip_l_(\d+)$")  # FastVLM's tower and its page size
FASTVIT_STRIDE_PX = 64

_VICUNA = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_PARTS = (
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
)
# the conversation that each family was trained and is evaluated with: llava_v1, mistral_instruct, qwen_2
TEMPLATES = {
    "llava_llama": _VICUNA
    + " {% for message in messages %}{% if message['role'] == 'user' %}USER: " + _PARTS + " "
    "{% else %}ASSISTANT: " + _PARTS + "</s>{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "llava_mistral": "{% for message in messages %}{% if message['role'] == 'user' %}[INST] " + _PARTS + " [/INST]"
    "{% else %} " + _PARTS + " </s>{% endif %}{% endfor %}",
    "llava_qwen2": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n" + _PARTS + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}  # fmt: skip
TEXT_CONFIGS: dict[str, type] = {
    "llava_llama": LlamaConfig,
    "llava_mistral": MistralConfig,
    "llava_qwen2": Qwen2Config,
}
SAME_AS = {"llava": "llava_llama", "llava_qwen": "llava_qwen2"}  # other names of the same layout

# renamed keys, first match wins; `{tower}` is the tower's name in transformers
_RENAMED: tuple[tuple[str, str], ...] = (
    (r"lm_head\.(.+)", r"lm_head.\1"),
    (r"model\.image_newline", r"model.image_newline"),
    (r"model\.mm_projector\.0\.(weight|bias)", r"model.multi_modal_projector.linear_1.\1"),
    (r"model\.mm_projector\.2\.(weight|bias)", r"model.multi_modal_projector.linear_2.\1"),
    (r"model\.vision_tower\.vision_tower\.vision_model\.(.+)", r"model.vision_tower.\1"),
    (r"model\.(embed_tokens|layers|norm)\.(.+)", r"model.language_model.\1.\2"),
)
# left out, and why; what is told to the user starts with the reason
_LEFT_OUT: tuple[tuple[str, str], ...] = (
    (r".*\.rotary_emb\.inv_freq", "computed, not learnt"),
    (r".*\.embeddings\.position_ids", "computed, not learnt"),
    (r"model\.(ecg_tower|ecg_projector)\..+", "the ECG signal encoder, which reads no page"),
    (r"model\.vision_tower\.vision_tower\.model\.head\.proj", "CLIP's projection, which LLaVA does not read"),
)
# FastViT as ml-fastvlm names it -> as timm does, applied one after the other to what follows the tower's prefix
_FASTVIT: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^patch_embed\.", "stem."),
    (r"^conv_exp\.", "final_conv."),
    (r"^network\.(\d+)\.(\d+)\.", lambda found: f"stages.{_stage(found[1])}.blocks.{found[2]}."),
    (r"^network\.(\d+)\.proj\.", lambda found: f"stages.{_stage(found[1])}.downsample.proj."),
    (r"^network\.(\d+)\.", lambda found: f"stages.{_stage(found[1])}.pos_emb."),
    (r"\.lkb_reparam\.", ".reparam_conv."),
    (r"\.convffn\.", ".mlp."),
    (r"\.se\.reduce\.", ".se.fc1."),
    (r"\.se\.expand\.", ".se.fc2."),
    (r"\.(layer_scale(?:_[12])?)$", r".\1.gamma"),
)
_FASTVIT_PREFIX = "model.vision_tower.vision_tower.model."
_FASTVIT_STAGES = (0, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4)  # of the eleven parts of `network`


@dataclass(frozen=True)
class Original:
    """An original LLaVA config, translated.

    Attributes:
        kind: one of `TEXT_CONFIGS`.
        tower: `mm_vision_tower`: a name of `KNOWN_TOWERS`, a folder or a hub id.
        native: the transformers config that computes the same.
        aspect: how a page is fitted: "anyres", "pad" or "crop".
        tiled: tiles are fed one by one and stand one behind the other (`flat`): no transformers family saves that.
        vocab_size: rows of the embedding in the files.
    """

    kind: str
    tower: str
    native: Any
    aspect: str
    tiled: bool
    vocab_size: int


class TiledLlavaProcessor(LlavaProcessor):
    """LLaVA's processor fed with LLaVA-NeXT's tiles: as many placeholders as all tiles have tokens.

    `pixel_values` holds the tiles of all pages, one behind the other: [tiles, 3, side, side].
    """

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """Placeholders of one page."""
        side = image_inputs["pixel_values"][0][0].shape[-1] // self.patch_size
        return self.image_token * (self._tiles(image_inputs["image_sizes"][image_idx]) * side * side)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As LLaVA's, with the tiles of all pages in one row."""
        inputs = super().__call__(*args, **kwargs)
        if "image_sizes" in inputs:
            counts = [self._tiles(size) for size in inputs.pop("image_sizes")]
            pixels = inputs["pixel_values"]
            inputs["pixel_values"] = torch.cat([page[:count] for page, count in zip(pixels, counts, strict=True)])
        return inputs

    def _tiles(self, image_size: Any) -> int:
        side = self.image_processor.crop_size["height"]
        size = image_size.tolist() if isinstance(image_size, Tensor) else list(image_size)
        return image_size_to_num_patches(size, self.image_processor.image_grid_pinpoints, side)


def is_original(tree: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of an original LLaVA checkpoint."""
    return "mm_vision_tower" in tree and _kind(tree) in TEXT_CONFIGS


def translate(tree: Mapping[str, Any], tokenizer: Any, *, name: str) -> Original:
    """Reads an original config.

    Args:
        tree: config.json.
        tokenizer: from `load_tokenizer`.
        name: what an error names.

    Raises:
        EvlecgError: something in the config that no transformers family computes, or an unknown vision tower.
    """
    kind = _kind(tree)
    for key, wanted in (("mm_projector_type", ("mlp2x_gelu",)), ("mm_use_im_start_end", (False, None)),
                        ("mm_vision_select_feature", ("patch", "cls_patch", None)),
                        ("mm_patch_merge_type", ("flat", "spatial_unpad", "spatial", None)),
                        ("image_aspect_ratio", ("anyres", "pad", "square", "ori", None))):  # fmt: skip
        if tree.get(key) not in wanted:
            raise EvlecgError(
                f"{key} {tree.get(key)!r} of an original LLaVA checkpoint is not supported", where=name,
                hint=f"supported: {', '.join(str(value) for value in wanted if value is not None)}",
            )  # fmt: skip
    anyres = tree.get("image_aspect_ratio") == "anyres"
    merge = tree.get("mm_patch_merge_type") or "flat"
    if anyres and merge == "spatial":
        raise EvlecgError("mm_patch_merge_type 'spatial' without unpadding is not supported", where=name,
                          hint="flat and spatial_unpad are")  # fmt: skip
    text_keys = {key: value for key, value in tree.items() if not key.startswith("mm_")}
    text_keys |= {"model_type": TEXT_CONFIGS[kind].model_type, "architectures": None}  # type: ignore[attr-defined]
    text = TEXT_CONFIGS[kind](**text_keys)
    vocab_size = int(text.vocab_size)
    image_token_id = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    text.vocab_size = max(vocab_size, image_token_id + 1)
    shared = {
        "text_config": text,
        "image_token_id": image_token_id,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": bool(tree.get("tie_word_embeddings", False)),
        "dtype": tree.get("torch_dtype"),
    }
    tower = str(tree["mm_vision_tower"])
    vision = _tower_config(tower, name=name)
    if vision.model_type == "timm_wrapper":
        if anyres:
            raise EvlecgError("FastVLM with tiles is not supported", where=name, hint="image_aspect_ratio pad is")
        native = FastVlmConfig(vision_config=vision, **shared)
        return Original(kind, tower, native, "pad", False, vocab_size)
    shared |= {
        "vision_config": vision,
        "vision_feature_layer": int(tree.get("mm_vision_select_layer", -2)),
        "vision_feature_select_strategy": "full" if tree.get("mm_vision_select_feature") == "cls_patch" else "default",
    }
    aspect = "anyres" if anyres else "pad" if tree.get("image_aspect_ratio") == "pad" else "crop"
    if anyres:
        shared["image_grid_pinpoints"] = _pinpoints(tree.get("image_grid_pinpoints"), name=name)
    family = LlavaNextConfig if anyres and merge == "spatial_unpad" else LlavaConfig
    return Original(kind, tower, family(**shared), aspect, anyres and merge == "flat", vocab_size)


def load_tokenizer(source: str, *, name: str) -> Any:
    """The tokenizer beside an original checkpoint, with `<image>` as one token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # transformers raises many kinds here
        raise EvlecgError(
            "the checkpoint's tokenizer cannot be read", where=name, hint=str(error).split("\n")[0]
        ) from error
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def build_processor(original: Original, tokenizer: Any) -> Any:
    """The processor of the translated family; a chat template that lies beside the tokenizer is kept."""
    vision = original.native.vision_config
    side, mean, std = int(getattr(vision, "image_size", 0)), None, None
    if vision.model_type == "timm_wrapper":
        found = MOBILECLIP.search(original.tower)
        side = int(found[1]) if found else int(vision.model_args.get("img_size", 1024))
        mean, std = [0.0] * 3, [1.0] * 3
    settings: dict[str, Any] = {
        "size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}, "do_center_crop": True,
    }  # fmt: skip
    if mean is not None:
        settings |= {"image_mean": mean, "image_std": std}
    template = getattr(tokenizer, "chat_template", None) or TEMPLATES[original.kind]
    if original.aspect == "anyres":
        images: Any = LlavaNextImageProcessor(**settings, image_grid_pinpoints=original.native.image_grid_pinpoints)
    else:
        images = LlavaImageProcessor(**settings, do_pad=original.aspect == "pad")
    kind = LlavaProcessor
    if original.aspect == "anyres":
        kind = TiledLlavaProcessor if original.tiled else LlavaNextProcessor
    fast = vision.model_type == "timm_wrapper"
    strategy = "full" if fast else original.native.vision_feature_select_strategy
    return kind(
        image_processor=images, tokenizer=tokenizer, chat_template=template, image_token=IMAGE_TOKEN,
        patch_size=FASTVIT_STRIDE_PX if fast else vision.patch_size, vision_feature_select_strategy=strategy,
        num_additional_image_tokens=0 if fast else 1,
    )  # fmt: skip


def state_dict(original: Original, tensors: Iterable[tuple[str, Tensor]], *, name: str) -> dict[str, Tensor]:
    """Every weight under its transformers name.

    Args:
        original: from `translate`.
        tensors: (name, tensor) pairs of all the checkpoint's files; a tower that is not among them is read from
            `mm_vision_tower`.
        name: what an error names.

    Raises:
        EvlecgError: a weight that is neither renamed nor known to be left out.
    """
    found: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in tensors:
        target = rename(key)
        if target is None:
            unknown.append(key)
        elif target:
            found[target] = tensor
    if unknown:
        raise EvlecgError(
            f"{len(unknown)} weights are unknown in the original LLaVA layout: {', '.join(sorted(unknown)[:3])}"
            + (" ..." if len(unknown) > 3 else ""),
            where=name,
            hint="a model must not lose weights in silence; please report this checkpoint",
        )
    if original.native.model_type != "llava_next":
        found.pop("model.image_newline", None)  # learnt for tiles that are put together; read by no other merge
    if not any(key.startswith("model.vision_tower.") for key in found):
        found |= _tower_weights(original, name=name)
    rows = int(original.native.text_config.vocab_size)
    for key in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        if key in found and len(found[key]) < rows:
            weight_VD = found[key]
            mean_D = weight_VD.float().mean(0).to(weight_VD.dtype)
            found[key] = torch.cat([weight_VD, mean_D.expand(rows - len(weight_VD), -1)])
    if original.native.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    return found


def rename(key: str) -> str | None:
    """The transformers name of an original weight; "" where it is left out on purpose, None where it is unknown."""
    if any(re.fullmatch(pattern, key) for pattern, _ in _LEFT_OUT):
        return ""
    if key.startswith(_FASTVIT_PREFIX):
        rest = key.removeprefix(_FASTVIT_PREFIX)
        for pattern, target in _FASTVIT:
            rest = re.sub(pattern, target, rest)
        return "model.vision_tower.timm_model." + rest
    for pattern, target in _RENAMED:
        if re.fullmatch(pattern, key):
            return re.sub(pattern, target, key)
    return None


def left_out(keys: Iterable[str]) -> dict[str, int]:
    """How many of a checkpoint's weights are left out, by reason."""
    counted: dict[str, int] = {}
    for key in keys:
        for pattern, reason in _LEFT_OUT:
            if re.fullmatch(pattern, key):
                counted[reason] = counted.get(reason, 0) + 1
                break
    return counted


def stored_tensors(source: str, *, name: str) -> Iterable[tuple[str, Tensor]]:
    """(name, tensor) of all safetensors of a checkpoint, one at a time.

    Raises:
        EvlecgError: no safetensors there, or a shard that the index names is missing.
    """
    from safetensors import safe_open

    for file in weight_files(source, name=name):
        with safe_open(file, framework="pt") as stream:
            for key in stream.keys():  # noqa: SIM118 (not a dict)
                yield key, stream.get_tensor(key)


def weight_files(source: str, *, name: str) -> list[Path]:
    """A checkpoint's safetensors files: its single file, or the shards that its index names."""
    from transformers.utils.hub import cached_file

    hint = "only safetensors are read: convert pickled weights with `save_pretrained(..., safe_serialization=True)`"
    index = cached_file(source, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is None:
        single = cached_file(source, "model.safetensors", _raise_exceptions_for_missing_entries=False)
        if single is None:
            raise EvlecgError("the checkpoint has no safetensors", where=name, hint=hint)
        return [Path(single)]
    shards = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    found = {shard: cached_file(source, shard, _raise_exceptions_for_missing_entries=False) for shard in shards}
    missing = [shard for shard, path in found.items() if path is None]
    if missing:
        raise EvlecgError(f"{len(missing)} weight files are missing: {', '.join(missing[:3])}", where=name,
                          hint="download the checkpoint again")  # fmt: skip
    return [Path(str(path)) for path in found.values()]


def _kind(tree: Mapping[str, Any]) -> str:
    """The published family name, the same for every spelling of it."""
    name = str(tree.get("model_type", ""))
    return SAME_AS.get(name, name)


def _stage(part: str) -> int:
    return _FASTVIT_STAGES[int(part)]


def _tower_config(tower: str, *, name: str) -> Any:
    if not Path(tower, "config.json").is_file():
        if MOBILECLIP.search(tower):
            return FastVlmConfig().vision_config
        if tower in KNOWN_TOWERS:
            return CLIPVisionConfig(**KNOWN_TOWERS[tower])
    try:
        config = AutoConfig.from_pretrained(tower)
    except Exception as error:
        raise EvlecgError(
            f"the vision tower {tower!r} cannot be read", where=name,
            hint=f"mm_vision_tower names a folder or hub id; {str(error).splitlines()[0]}",
        ) from error  # fmt: skip
    config = getattr(config, "vision_config", config)
    if config.model_type not in ("clip_vision_model", "timm_wrapper"):
        raise EvlecgError(f"a vision tower of the family {config.model_type!r} is not supported", where=name,
                          hint="CLIP and MobileCLIP towers are")  # fmt: skip
    return config


def _tower_weights(original: Original, *, name: str) -> dict[str, Tensor]:
    """The vision tower's own weights, where the checkpoint's files do not hold it."""
    if original.native.vision_config.model_type != "clip_vision_model":
        raise EvlecgError("the checkpoint holds no vision tower", where=name, hint=f"it should hold {original.tower!r}")
    try:
        tower, info = CLIPVisionModel.from_pretrained(  # type: ignore[misc]
            original.tower, use_safetensors=True, output_loading_info=True, dtype="auto"
        )
    except Exception as error:
        raise EvlecgError(
            f"the checkpoint holds no vision tower, and {original.tower!r} cannot be loaded", where=name,
            hint=str(error).split("\n")[0],
        ) from error  # fmt: skip
    if info["missing_keys"] or info["mismatched_keys"]:
        raise EvlecgError(f"the vision tower {original.tower!r} lacks weights", where=name,
                          hint=", ".join(sorted(map(str, info["missing_keys"]))[:3]))  # fmt: skip
    return {f"model.vision_tower.{key}": tensor for key, tensor in tower.state_dict().items()}


def _pinpoints(value: Any, *, name: str) -> list[list[int]]:
    """`image_grid_pinpoints`: published as (width, height), read by transformers as [height, width]."""
    try:
        pairs = ast.literal_eval(value) if isinstance(value, str) else value
        return [[int(height), int(width)] for width, height in pairs]
    except (ValueError, TypeError, SyntaxError) as error:
        raise EvlecgError(f"image_grid_pinpoints {value!r} is not a list of sizes", where=name) from error
