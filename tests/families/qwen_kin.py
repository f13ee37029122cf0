"""The Qwen kin: pages of any shape, flat patches, merged two by two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests import tiny
from tests.families._parts import text_sizes
from tests.tiny import INIT, QWEN_TEMPLATE, _save, byte_level_tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>"]  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def _tokenizer() -> Any:
    return byte_level_tokenizer(600, SPECIAL, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _ids(tokenizer: Any) -> dict[str, int]:
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
             "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}  # fmt: skip
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def _parts(patch: int = 14) -> dict[str, Any]:
    """Image and video processor; pages of at most 8 x 8 patches."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    limits = {"min_pixels": (4 * patch) ** 2, "max_pixels": (8 * patch) ** 2, "patch_size": patch}
    return {"image_processor": Qwen2VLImageProcessor(**limits), "video_processor": Qwen2VLVideoProcessor(**limits)}


def _tower(width: int, out: int, *, patch: int, **further: Any) -> dict[str, Any]:
    return {
        "depth": 2, "hidden_size": width, "out_hidden_size": out, "intermediate_size": 2 * width, "num_heads": 4,
        "patch_size": patch, "spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": INIT, **further,
    }  # fmt: skip


def qwen2_5_vl(folder: Path, *, seed: int = 0) -> Path:
    """Qwen2.5-VL: window attention in the tower."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    tokenizer = _tokenizer()
    config = Qwen2_5_VLConfig(
        vision_config=_tower(32, 32, patch=14, window_size=56, fullatt_block_indexes=[1]),
        text_config=text_sizes(tokenizer, 32) | {"rope_parameters": ROPE},
        **_ids(tokenizer),
    )
    processor = Qwen2_5_VLProcessor(**_parts(), tokenizer=tokenizer, chat_template=QWEN_TEMPLATE)
    return _save(Qwen2_5_VLForConditionalGeneration, config, processor, folder, seed, True)


def _qwen3(config: Any, model: type, tokenizer: Any, folder: Path, seed: int) -> Path:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    limits = {"size": {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}, "patch_size": 16}
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**limits),
        video_processor=Qwen3VLVideoProcessor(**limits),
        tokenizer=tokenizer,
        chat_template=QWEN_TEMPLATE,
    )
    return _save(model, config, processor, folder, seed, True)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GATED_DELTA = {
    "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "head_dim": 16,
}  # fmt: skip
ROPE_3 = {**ROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
ROPE_3_5 = {**ROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.5}


def qwen3_vl(folder: Path, *, seed: int = 0) -> Path:
    """Qwen3-VL: features of several layers of the tower enter several layers of the language model (deepstack)."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokenizer = _tokenizer()
    config = Qwen3VLConfig(
        vision_config=_tower(32, 32, patch=16, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
        text_config=text_sizes(tokenizer, 32, 3) | {"rope_parameters": ROPE_3, "head_dim": 8},
        **_ids(tokenizer),
    )
    return _qwen3(config, Qwen3VLForConditionalGeneration, tokenizer, folder, seed)


def qwen3_vl_moe(folder: Path, *, seed: int = 0) -> Path:
    """Qwen3-VL with experts."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    tokenizer = _tokenizer()
    config = Qwen3VLMoeConfig(
        vision_config=_tower(32, 32, patch=16, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
        text_config=text_sizes(tokenizer, 32, 3) | {"rope_parameters": ROPE_3, "head_dim": 8, **EXPERTS},
        **_ids(tokenizer),
    )
    return _qwen3(config, Qwen3VLMoeForConditionalGeneration, tokenizer, folder, seed)


def qwen3_5(folder: Path, *, seed: int = 0) -> Path:
    """Qwen3.5: linear attention in most layers."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    tokenizer = _tokenizer()
    config = Qwen3_5Config(
        vision_config=_tower(32, 32, patch=16, num_position_embeddings=64),
        text_config=text_sizes(tokenizer, 32) | {"rope_parameters": ROPE_3_5, **GATED_DELTA},
        **_ids(tokenizer),
    )
    return _qwen3(config, Qwen3_5ForConditionalGeneration, tokenizer, folder, seed)


def qwen3_5_moe(folder: Path, *, seed: int = 0) -> Path:
    """Qwen3.5 with experts."""
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

    tokenizer = _tokenizer()
    config = Qwen3_5MoeConfig(
        vision_config=_tower(32, 32, patch=16, num_position_embeddings=64),
        text_config=text_sizes(tokenizer, 32)
        | {"rope_parameters": ROPE_3_5, **GATED_DELTA, **EXPERTS, "shared_expert_intermediate_size": 32},
        **_ids(tokenizer),
    )
    return _qwen3(config, Qwen3_5MoeForConditionalGeneration, tokenizer, folder, seed)


BUILDERS = {
    "qwen2_vl": tiny.qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": qwen3_5_moe,
}
