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


def qwen2_5_omni_thinker(folder: Path, *, seed: int = 0) -> Path:
    """Qwen2.5-Omni's thinker, without what it hears and says."""
    from transformers import (
        Qwen2_5OmniProcessor,
        Qwen2_5OmniThinkerConfig,
        Qwen2_5OmniThinkerForConditionalGeneration,
        WhisperFeatureExtractor,
    )

    names = {
        "image_token": "<|IMAGE|>", "audio_token": "<|AUDIO|>", "video_token": "<|VIDEO|>",
        "vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>",
        "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>",
    }  # fmt: skip
    tokenizer = byte_level_tokenizer(
        600, [*SPECIAL[:3], *names.values()], eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens=names,
    )  # fmt: skip
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2_5OmniThinkerConfig(
        vision_config=_tower(32, 32, patch=14, window_size=56, fullatt_block_indexes=[1]),
        text_config=text_sizes(tokenizer, 32) | {"rope_parameters": ROPE},
        audio_config={
            "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 16, "output_dim": 32,
            "num_mel_bins": 16, "n_window": 10,
        },
        image_token_index=ids("<|IMAGE|>"),
        video_token_index=ids("<|VIDEO|>"),
        audio_token_index=ids("<|AUDIO|>"),
        audio_start_token_id=ids("<|audio_bos|>"),
        audio_end_token_id=ids("<|audio_eos|>"),
        vision_start_token_id=ids("<|vision_bos|>"),  # beyond the config class, as in the published file
        vision_end_token_id=ids("<|vision_eos|>"),
    )  # fmt: skip
    processor = Qwen2_5OmniProcessor(
        **_parts(),
        feature_extractor=WhisperFeatureExtractor(feature_size=16),
        tokenizer=tokenizer,
        chat_template=QWEN_TEMPLATE.replace(
            "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_bos|><|IMAGE|><|vision_eos|>"
        ),
    )
    return _save(Qwen2_5OmniThinkerForConditionalGeneration, config, processor, folder, seed, True)


def video_llama_3(folder: Path, *, seed: int = 0) -> Path:
    """VideoLLaMA3: a SigLIP tower for pages of any shape, Qwen2."""
    from transformers import (
        Qwen2Config,
        VideoLlama3Config,
        VideoLlama3ForConditionalGeneration,
        VideoLlama3ImageProcessor,
        VideoLlama3Processor,
        VideoLlama3VideoProcessor,
    )

    tokenizer = _tokenizer()
    ids = _ids(tokenizer)
    config = VideoLlama3Config(
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "patch_size": 14, "initializer_range": INIT,
        },
        text_config=Qwen2Config(**text_sizes(tokenizer, 32)),
        image_token_id=ids["image_token_id"],
        video_token_id=ids["video_token_id"],
    )  # fmt: skip
    limits = {"min_pixels": 56**2, "max_pixels": 112**2, "patch_size": 14, "merge_size": 1}
    processor = VideoLlama3Processor(
        image_processor=VideoLlama3ImageProcessor(**limits),
        video_processor=VideoLlama3VideoProcessor(**limits),
        tokenizer=tokenizer,
        chat_template=QWEN_TEMPLATE,
    )
    return _save(VideoLlama3ForConditionalGeneration, config, processor, folder, seed, True)


BUILDERS = {
    "qwen2_5_omni_thinker": qwen2_5_omni_thinker,
    "video_llama_3": video_llama_3,
    "qwen2_vl": tiny.qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": qwen3_5_moe,
}
