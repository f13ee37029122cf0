"""Families that slice a page in ways of their own: MiniCPM-V, Aria, Molmo 2, Granite for Docling, Kimi."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.family_parts import PAPER, chat_template, text_sizes, tower_sizes
from tests.tiny import INIT, _save, byte_level_tokenizer

IM_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
IM_IDS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def _im_template(image: str) -> str:
    return chat_template(
        user="<|im_start|>user\n", image=image, assistant="<|im_start|>assistant\n", end="<|im_end|>\n"
    )


def _hybrid_text(tokenizer: Any) -> dict[str, Any]:
    """Qwen 3.5's decoder: one layer of linear attention, one of full attention."""
    return {
        "model_type": "qwen3_5_text", "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2],
                            "mrope_interleaved": True, "partial_rotary_factor": 0.5},
        **text_sizes(tokenizer, head_dim=16),
    }  # fmt: skip


MINICPM_MARKS = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "image_start_token": "<image>",
    "image_end_token": "</image>", "slice_start_token": "<slice>", "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>",
}  # fmt: skip


def _minicpm_parts(processor: type, image_processor: type, video_processor: type, mode: str) -> tuple[Any, Any]:
    tokenizer = byte_level_tokenizer(
        600, [*IM_TOKENS, *MINICPM_MARKS.values()], **IM_IDS, extra_special_tokens=MINICPM_MARKS
    )
    sizes = {"scale_resolution": 112, "patch_size": 14, "max_slice_nums": 4, "downsample_mode": mode}
    return tokenizer, processor(
        image_processor=image_processor(**sizes, **PAPER),
        video_processor=video_processor(**sizes),
        tokenizer=tokenizer,
        chat_template=_im_template("<|image_pad|>"),
    )


def _minicpm_config(tokenizer: Any, **changed: Any) -> dict[str, Any]:
    ids = tokenizer.convert_tokens_to_ids
    return {
        "vision_config": tower_sizes(image=112, insert_layer_id=0),
        "text_config": _hybrid_text(tokenizer),
        "insert_layer_id": 0,
        "image_size": 112,
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
    } | changed


def minicpmv4_6(folder: Path, *, seed: int = 0) -> Path:
    """MiniCPM-V 4.6: the whole page and slices of it, 4x4 patches to a token in two merges."""
    from transformers import (
        MiniCPMV4_6Config,
        MiniCPMV4_6ForConditionalGeneration,
        MiniCPMV4_6ImageProcessor,
        MiniCPMV4_6Processor,
        MiniCPMV4_6VideoProcessor,
    )

    tokenizer, processor = _minicpm_parts(
        MiniCPMV4_6Processor, MiniCPMV4_6ImageProcessor, MiniCPMV4_6VideoProcessor, "16x"
    )
    config = MiniCPMV4_6Config(**_minicpm_config(tokenizer))
    return _save(MiniCPMV4_6ForConditionalGeneration, config, processor, folder, seed, True)


def minicpmv4_7(folder: Path, *, seed: int = 0) -> Path:
    """MiniCPM-V 4.7: 4.6 with three-part positions for its image tokens."""
    from transformers import (
        MiniCPMV4_6ImageProcessor,
        MiniCPMV4_6VideoProcessor,
        MiniCPMV4_7Config,
        MiniCPMV4_7ForConditionalGeneration,
        MiniCPMV4_7Processor,
    )

    tokenizer, processor = _minicpm_parts(
        MiniCPMV4_7Processor, MiniCPMV4_6ImageProcessor, MiniCPMV4_6VideoProcessor, "16x"
    )
    ids = tokenizer.convert_tokens_to_ids
    marks = {
        "image_start_id": ids("<image>"), "image_end_id": ids("</image>"), "slice_start_id": ids("<slice>"),
        "slice_end_id": ids("</slice>"), "newline_id": tokenizer("\n", add_special_tokens=False)["input_ids"][0],
    }  # fmt: skip
    config = MiniCPMV4_7Config(**_minicpm_config(tokenizer, **marks))
    return _save(MiniCPMV4_7ForConditionalGeneration, config, processor, folder, seed, True)


def minicpm_ocr(folder: Path, *, seed: int = 0) -> Path:
    """MiniCPM-OCR: MiniCPM-V 4.6 with one merge only, 2x2 patches to a token."""
    from transformers import (
        MiniCPMOcrConfig,
        MiniCPMOcrForConditionalGeneration,
        MiniCPMOcrImageProcessor,
        MiniCPMOcrProcessor,
        MiniCPMOcrVideoProcessor,
    )

    tokenizer, processor = _minicpm_parts(MiniCPMOcrProcessor, MiniCPMOcrImageProcessor, MiniCPMOcrVideoProcessor, "4x")
    config = _minicpm_config(tokenizer)
    del config["image_size"]
    return _save(MiniCPMOcrForConditionalGeneration, MiniCPMOcrConfig(**config), processor, folder, seed, True)


def aria(folder: Path, *, seed: int = 0) -> Path:
    """Aria: as many queries as the page's size asks for, over patches; experts."""
    from transformers import AriaConfig, AriaForConditionalGeneration, AriaImageProcessor, AriaProcessor

    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<fim_prefix>", "<|img|>", "<fim_suffix>"]
    tokenizer = byte_level_tokenizer(
        600, special, bos_token="<s>", eos_token="<|im_end|>", pad_token="<unk>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<|img|>"},
    )  # fmt: skip
    config = AriaConfig(
        vision_config={"model_type": "idefics3_vision", **tower_sizes(image=980, patch=70)},
        text_config=text_sizes(tokenizer, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        image_token_index=tokenizer.convert_tokens_to_ids("<|img|>"),
        projector_patch_to_query_dict={49: 8, 196: 16},
        initializer_range=INIT,
    )
    processor = AriaProcessor(
        image_processor=AriaImageProcessor(max_image_size=980, **PAPER),
        tokenizer=tokenizer,
        size_conversion={490: 8, 980: 16},
        chat_template=_im_template("<fim_prefix><|img|><fim_suffix>"),
    )
    return _save(AriaForConditionalGeneration, config, processor, folder, seed, True)


def kimi_k25(folder: Path, *, seed: int = 0) -> Path:
    """Kimi K2.5: patches in reading order, merged two by two inside the model, before DeepSeek V3's decoder."""
    from transformers import (
        Kimi_K25Config,
        Kimi_K25ForConditionalGeneration,
        Kimi_K25ImageProcessor,
        Kimi_K25Processor,
        Kimi_K25VideoProcessor,
    )

    special = [*IM_TOKENS, "<|media_begin|>", "<|media_content|>", "<|media_pad|>", "<|media_end|>",
               "<|kimi_k25_video_placeholder|>"]  # fmt: skip
    tokenizer = byte_level_tokenizer(600, special, **IM_IDS)
    ids = tokenizer.convert_tokens_to_ids
    text = text_sizes(
        tokenizer, num_key_value_heads=4, moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=4, qk_nope_head_dim=8,
        v_head_dim=8, first_k_dense_replace=1, num_mtp_layers=0,
    )  # fmt: skip
    del text["head_dim"]
    config = Kimi_K25Config(
        vision_config={
            "hidden_size": 24, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "pos_emb_height": 8, "pos_emb_width": 8, "pos_emb_time": 1, "patch_size": 14,
        },
        text_config={"model_type": "deepseek_v3", **text},
        projection_hidden_size=24,
        image_token_id=ids("<|media_pad|>"),
        video_token_id=ids("<|kimi_k25_video_placeholder|>"),
        vision_start_token_id=ids("<|media_begin|>"),
        vision_end_token_id=ids("<|media_end|>"),
    )  # fmt: skip
    limit = {"max_height": 112, "max_width": 112}
    processor = Kimi_K25Processor(
        image_processor=Kimi_K25ImageProcessor(size=limit, max_patches=64, **PAPER),
        tokenizer=tokenizer,
        video_processor=Kimi_K25VideoProcessor(size=limit),
        chat_template=_im_template("<|media_begin|>image<|media_content|><|media_pad|><|media_end|>"),
    )
    return _save(Kimi_K25ForConditionalGeneration, config, processor, folder, seed, True)


def molmo2(folder: Path, *, seed: int = 0) -> Path:
    """Molmo 2: overlapping crops and the whole page; a table says which patches are pooled to every token."""
    from transformers import (
        Molmo2Config,
        Molmo2ForConditionalGeneration,
        Molmo2ImageProcessor,
        Molmo2Processor,
        Molmo2VideoProcessor,
    )

    marks = ["<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>", "<im_end>", "<frame_end>",
             "<im_low>", "<|image|>", "<|video|>"]  # fmt: skip
    tokenizer = byte_level_tokenizer(600, [*IM_TOKENS, *marks], bos_token="<|endoftext|>", **IM_IDS)
    ids = tokenizer.convert_tokens_to_ids
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 6}
    config = Molmo2Config(
        vision_config={**tower_sizes(), **heads, "image_size": [56, 56]},
        adapter_config={
            **heads, "hidden_size": 24, "vision_feature_layer": [-1, 0], "intermediate_size": 48,
            "text_hidden_size": 40, "initializer_range": INIT,
        },
        text_config=text_sizes(tokenizer, additional_vocab_size=0),
        image_start_token_id=ids("<im_start>"),
        low_res_image_start_token_id=ids("<low_res_im_start>"),
        image_end_token_id=ids("<im_end>"),
        image_patch_id=ids("<im_patch>"),
        frame_start_token_id=ids("<frame_start>"),
        frame_end_token_id=ids("<frame_end>"),
    )  # fmt: skip
    processor = Molmo2Processor(
        image_processor=Molmo2ImageProcessor(
            size={"height": 56, "width": 56}, max_crops=4, overlap_margins=[1, 1], **PAPER
        ),
        video_processor=Molmo2VideoProcessor(size={"height": 56, "width": 56}),
        tokenizer=tokenizer,
        chat_template=_im_template("<|image|>"),
    )
    return _save(Molmo2ForConditionalGeneration, config, processor, folder, seed, True)


def granite_docling(folder: Path, *, seed: int = 0) -> Path:
    """Granite for Docling: tiles and the whole page, 4x4 patches shuffled to a token, more added inside the decoder."""
    from transformers import (
        GraniteDoclingConfig,
        GraniteDoclingForConditionalGeneration,
        GraniteDoclingImageProcessor,
        GraniteDoclingProcessor,
    )

    tags = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    special = ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<image>", "<pad>",
               "<fake_token_around_image>", "<global-img>", *tags]  # fmt: skip
    tokenizer = byte_level_tokenizer(
        600, special, bos_token="<|end_of_text|>", eos_token="<|end_of_text|>", pad_token="<pad>"
    )
    config = GraniteDoclingConfig(
        vision_config={
            **tower_sizes(num_hidden_layers=3), "out_hidden_size": 40, "scale_factor": 2,
            "deepstack_visual_indexes": [0, 1], "use_fine_route": False,
        },
        text_config=text_sizes(
            tokenizer, num_hidden_layers=3, embedding_multiplier=1.0, logits_scaling=2.0, residual_multiplier=0.5,
            attention_multiplier=0.3,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    processor = GraniteDoclingProcessor(
        image_processor=GraniteDoclingImageProcessor(size={"height": 56, "width": 56}, max_patches=4, **PAPER),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=chat_template(
            user="<|start_of_role|>user<|end_of_role|>", image="<image>",
            assistant="<|start_of_role|>assistant<|end_of_role|>", end="<|end_of_text|>\n",
        ),
    )  # fmt: skip
    return _save(GraniteDoclingForConditionalGeneration, config, processor, folder, seed, True)


def lfm3_vl(folder: Path, *, seed: int = 0) -> Path:
    """LFM3-VL: flat patches merged two by two; convolutions between the attention layers of tower and decoder."""
    from transformers import (
        Lfm3VlConfig,
        Lfm3VlForConditionalGeneration,
        Lfm3VlProcessor,
        Qwen2VLImageProcessor,
        Qwen3VLVideoProcessor,
    )

    special = [*IM_TOKENS, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = byte_level_tokenizer(600, special, **IM_IDS)
    ids = tokenizer.convert_tokens_to_ids
    config = Lfm3VlConfig(
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"], "patch_size": 14,
            "initializer_range": INIT,
        },
        text_config={"model_type": "lfm3", "layer_types": ["conv", "full_attention"], **text_sizes(tokenizer)},
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        projector_hidden_size=48,
    )  # fmt: skip
    limits = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    processor = Lfm3VlProcessor(
        image_processor=Qwen2VLImageProcessor(size=limits, patch_size=14, **PAPER),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(size=limits, patch_size=14),
        chat_template=_im_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return _save(Lfm3VlForConditionalGeneration, config, processor, folder, seed, True)


BUILDERS: dict[str, Callable[..., Path]] = {
    "aria": aria,
    "granite_docling": granite_docling,
    "kimi_k25": kimi_k25,
    "lfm3_vl": lfm3_vl,
    "minicpm_ocr": minicpm_ocr,
    "minicpmv4_6": minicpmv4_6,
    "minicpmv4_7": minicpmv4_7,
    "molmo2": molmo2,
}
