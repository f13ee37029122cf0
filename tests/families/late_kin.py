"""Families of 2026: nearly all read flat patches as the Qwen kin do, behind language models of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.families._parts import PIXELS, text_sizes
from tests.families.qwen_kin import EXPERTS, GATED_DELTA, ROPE_3, ROPE_3_5, _ids, _qwen3, _tokenizer, _tower
from tests.tiny import INIT, QWEN_TEMPLATE, _save, byte_level_tokenizer

SIZE = {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}


def _tokens(image: str, *further: str, start: str = "", stop: str = "", **named: Any) -> tuple[Any, str]:
    """A tokenizer with a family's own placeholders, and ChatML with them."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(t for t in (start, image, stop) if t), *further]
    tokenizer = byte_level_tokenizer(600, special, eos_token="<|im_end|>", pad_token="<|endoftext|>", **named)
    template = QWEN_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", start + image + stop)
    return tokenizer, template


def cosmos3_omni(folder: Path, *, seed: int = 0) -> Path:
    """Cosmos 3's reasoner: Qwen3-VL under another name."""
    from transformers import Cosmos3OmniConfig, Cosmos3OmniForConditionalGeneration

    tokenizer = _tokenizer()
    config = Cosmos3OmniConfig(
        vision_config=_tower(32, 32, patch=16, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
        text_config=text_sizes(tokenizer, 32, 3) | {"rope_parameters": ROPE_3, "head_dim": 8},
        **_ids(tokenizer),
    )
    return _qwen3(config, Cosmos3OmniForConditionalGeneration, tokenizer, folder, seed)


def qwen4_exp(folder: Path, *, seed: int = 0) -> Path:
    """Qwen4's preview: linear and indexed attention, n-gram embeddings, hyper-connections."""
    from transformers import Qwen4ExpConfig, Qwen4ExpForConditionalGeneration

    tokenizer = _tokenizer()
    config = Qwen4ExpConfig(
        vision_config=_tower(32, 32, patch=16, num_position_embeddings=64),
        text_config=text_sizes(tokenizer, 32)
        | {"rope_parameters": ROPE_3_5, **GATED_DELTA, **EXPERTS, "shared_expert_intermediate_size": 32,
           "hc_lowrank": 8, "ple_embed_dim": 16, "ngram_vocab_size_base": 1000, "heads_per_ngram": 2,
           "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 2, "indexer_n_heads": 2, "indexer_kv_heads": 1,
           "indexer_head_dim": 16, "indexer_budget": 512, "indexer_compress_ratio": 4},
        **_ids(tokenizer),
    )  # fmt: skip
    return _qwen3(config, Qwen4ExpForConditionalGeneration, tokenizer, folder, seed)


def cohere_compass(folder: Path, *, seed: int = 0) -> Path:
    """North Vision: Qwen3-VL's tower before Cohere's language model."""
    from transformers import (
        CohereCompassConfig,
        CohereCompassForConditionalGeneration,
        CohereCompassImageProcessor,
        CohereCompassProcessor,
        CohereCompassVideoProcessor,
    )

    tokenizer, template = _tokens("<|IMAGE_PAD|>", "<|VIDEO_PAD|>", start="<|VISION_START|>", stop="<|VISION_END|>")
    ids = tokenizer.convert_tokens_to_ids
    config = CohereCompassConfig(
        vision_config=_tower(32, 32, patch=16, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
        text_config=text_sizes(tokenizer, 32, 3) | {"rope_parameters": {"full_attention": ROPE_3}, "logit_scale": 0.25},
        image_token_id=ids("<|IMAGE_PAD|>"), video_token_id=ids("<|VIDEO_PAD|>"),
        vision_start_token_id=ids("<|VISION_START|>"), vision_end_token_id=ids("<|VISION_END|>"),
    )  # fmt: skip
    processor = CohereCompassProcessor(
        CohereCompassImageProcessor(size=SIZE, patch_size=16), tokenizer,
        CohereCompassVideoProcessor(size=SIZE, patch_size=16), chat_template=template,
    )  # fmt: skip
    return _save(CohereCompassForConditionalGeneration, config, processor, folder, seed, True)


def cosmos3_edge(folder: Path, *, seed: int = 0) -> Path:
    """Cosmos 3 Edge: SigLIP 2 patches merged two by two."""
    from transformers import (
        Cosmos3EdgeConfig,
        Cosmos3EdgeForConditionalGeneration,
        Cosmos3EdgeImageProcessor,
        Cosmos3EdgeProcessor,
        Cosmos3EdgeVideoProcessor,
    )

    tokenizer = _tokenizer()
    config = Cosmos3EdgeConfig(
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "num_patches": 64, "patch_size": 16, "spatial_merge_size": 2},
        text_config=text_sizes(tokenizer, 32) | {"rope_parameters": ROPE_3, "head_dim": 8},
        projector_hidden_size=64, **_ids(tokenizer),
    )  # fmt: skip
    processor = Cosmos3EdgeProcessor(
        Cosmos3EdgeImageProcessor(size=SIZE), tokenizer, Cosmos3EdgeVideoProcessor(size=SIZE),
        chat_template=QWEN_TEMPLATE,
    )  # fmt: skip
    return _save(Cosmos3EdgeForConditionalGeneration, config, processor, folder, seed, True)


MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "qk_head_dim": 16,
    "v_head_dim": 8, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 512, "num_key_value_heads": 4,
}  # fmt: skip
SPARSE = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32,
    "mlp_layer_types": ["dense", "sparse"],
}  # fmt: skip


def dots3_note(folder: Path, *, seed: int = 0) -> Path:
    """Dots 3 Note: image, sound and text; only pages are shown to it here."""
    from transformers import (
        Dots3NoteConfig,
        Dots3NoteFeatureExtractor,
        Dots3NoteForConditionalGeneration,
        Dots3NoteProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer, template = _tokens(
        "<|imgpad|>", "<|video_pad|>", "<|audio_comp_pad|>", start="<|img|>", stop="<|endofimg|>"
    )
    ids = tokenizer.convert_tokens_to_ids
    config = Dots3NoteConfig(
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "patch_size": 14, "spatial_merge_size": 2, "adapter_in_dim": 32, "adapter_out_dim": 32,
                       "mlp_layer_types": ["dense", "dense"], "per_layer_config": None, "initializer_range": INIT},
        audio_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
                      "num_key_value_heads": 4, "head_dim": 8, "downsample_hidden_size": 8, "adapter_input_size": 32,
                      "adapter_out_dim": 32, "conv_output_size": 128, "feature_size": 128},
        text_config=text_sizes(tokenizer, 32)
        | {**MLA, **SPARSE, "head_dim": 16, "layer_types": ["indexed_attention", "sliding_attention"],
           "shared_experts_intermediate_size": 32, "sliding_window": 512, "swa_num_attention_heads": 4,
           "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 16,
           "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
        image_token_id=ids("<|imgpad|>"), video_token_id=ids("<|video_pad|>"),
        audio_token_id=ids("<|audio_comp_pad|>"),
    )  # fmt: skip
    limits = {"min_pixels": 56 * 56, "max_pixels": 112 * 112, "patch_size": 14, "temporal_patch_size": 1}
    processor = Dots3NoteProcessor(
        Qwen2VLImageProcessor(**limits), tokenizer, Qwen2VLVideoProcessor(**limits), Dots3NoteFeatureExtractor(),
        chat_template=template,
    )  # fmt: skip
    return _save(Dots3NoteForConditionalGeneration, config, processor, folder, seed, True)


def minimax_m3_vl(folder: Path, *, seed: int = 0) -> Path:
    """MiniMax M3: sparse attention and experts behind merged patches."""
    from transformers import (
        MiniMaxM3SparseForConditionalGeneration,
        MiniMaxM3VLConfig,
        MiniMaxM3VLImageProcessor,
        MiniMaxM3VLProcessor,
        MiniMaxM3VLVideoProcessor,
    )

    own = MiniMaxM3VLProcessor
    tokenizer, template = _tokens(own.IMAGE_TOKEN, own.VIDEO_TOKEN, own.VISION_START_TOKEN, own.VISION_END_TOKEN)
    ids = tokenizer.convert_tokens_to_ids
    config = MiniMaxM3VLConfig(
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "image_size": 112,
                       "initializer_range": INIT},
        text_config=text_sizes(tokenizer, 32)
        | {"head_dim": 8, "rotary_dim": 4, "dense_intermediate_size": 64, "shared_intermediate_size": 32,
           "num_local_experts": 4, "num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"],
           "layer_types": ["full_attention", "full_attention"], "index_head_dim": 8, "index_n_heads": 2,
           "intermediate_size": 32},
        image_token_index=ids(own.IMAGE_TOKEN), video_token_index=ids(own.VIDEO_TOKEN),
        projector_hidden_size=32, merged_hidden_size=128,
    )  # fmt: skip
    limits = {"min_pixels": 56 * 56, "max_pixels": 112 * 112}
    processor = own(
        MiniMaxM3VLImageProcessor(**limits), tokenizer, MiniMaxM3VLVideoProcessor(**limits), chat_template=template
    )
    return _save(MiniMaxM3SparseForConditionalGeneration, config, processor, folder, seed, True)


def glm5_next(folder: Path, *, seed: int = 0) -> Path:
    """GLM-5's next: linear and indexed attention, hyper-connections."""
    from transformers import (
        Glm5NextConfig,
        Glm5NextForConditionalGeneration,
        Glm5NextImageProcessor,
        Glm5NextProcessor,
        Glm5NextVideoProcessor,
    )

    tokenizer, template = _tokens(
        "<|image|>", "<|video|>", "<|begin_of_video|>", "<|end_of_video|>", start="<|begin_of_image|>",
        stop="<|end_of_image|>",
    )  # fmt: skip
    ids = tokenizer.convert_tokens_to_ids
    config = Glm5NextConfig(
        vision_config=_tower(32, 32, patch=14, image_size=112, projection_intermediate_size=64),
        text_config=text_sizes(tokenizer, 32)
        | {**MLA, **SPARSE, "qk_nope_head_dim": 16, "qk_rope_head_dim": 0, "linear_head_dim": 8, "linear_num_heads": 4,
           "layer_types": ["linear_attention", "indexed_attention"], "indexer_types": ["full", "full"],
           "index_kpool": 4, "hc_mult": 2},
        image_token_id=ids("<|image|>"), video_token_id=ids("<|video|>"),
        image_start_token_id=ids("<|begin_of_image|>"), image_end_token_id=ids("<|end_of_image|>"),
        video_start_token_id=ids("<|begin_of_video|>"), video_end_token_id=ids("<|end_of_video|>"),
    )  # fmt: skip
    limits = {"size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}, "patch_size": 14}
    processor = Glm5NextProcessor(
        Glm5NextImageProcessor(**limits), tokenizer, Glm5NextVideoProcessor(**limits), chat_template=template
    )
    return _save(Glm5NextForConditionalGeneration, config, processor, folder, seed, True)


def hy_v4_vl(folder: Path, *, seed: int = 0) -> Path:
    """Hunyuan V4: merged rows with separators among the visual tokens, indexed attention, hyper-connections."""
    from transformers import (
        HYV4VLConfig,
        HYV4VLForConditionalGeneration,
        HYV4VLImageProcessor,
        HYV4VLProcessor,
        HYV4VLVideoProcessor,
    )

    tokenizer = _tokenizer()
    ids = _ids(tokenizer)
    config = HYV4VLConfig(
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "num_key_value_heads": 4, "out_hidden_size": 32, "patch_size": 16, "max_image_size": 128,
                       "spatial_merge_size": 2},
        text_config=text_sizes(tokenizer, 32)
        | {**MLA, **SPARSE, "head_dim": 8, "layer_types": ["indexed_attention", "indexed_attention"],
           "indexer_types": ["full", "full"], "hc_mult": 2, "rope_parameters": {**ROPE_3, "mrope_section": [2, 1, 1]}},
        image_token_id=ids["image_token_id"], video_token_id=ids["video_token_id"],
    )  # fmt: skip
    limits = {"size": {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}, "patch_size": 16}
    processor = HYV4VLProcessor(
        HYV4VLImageProcessor(**limits), tokenizer, HYV4VLVideoProcessor(**limits), chat_template=QWEN_TEMPLATE
    )
    return _save(HYV4VLForConditionalGeneration, config, processor, folder, seed, True)


def hyperclovax_vision_v2(folder: Path, *, seed: int = 0) -> Path:
    """HyperCLOVA X SEED Vision: Qwen2.5-VL's tower."""
    from transformers import (
        HyperCLOVAXVisionV2Config,
        HyperCLOVAXVisionV2ForConditionalGeneration,
        HyperCLOVAXVisionV2Processor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = _tokenizer()
    ids = _ids(tokenizer)
    config = HyperCLOVAXVisionV2Config(
        vision_config={"model_type": "qwen2_5_vl_vision",
                       **_tower(32, 32, patch=14, window_size=56, fullatt_block_indexes=[1])},
        text_config={"model_type": "hyperclovax", **text_sizes(tokenizer, 32), "head_dim": 8},
        image_token_id=ids["image_token_id"], video_token_id=ids["video_token_id"],
    )  # fmt: skip
    limits = {"min_pixels": 56 * 56, "max_pixels": 112 * 112}
    processor = HyperCLOVAXVisionV2Processor(
        image_processor=Qwen2VLImageProcessor(**limits), tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**limits), chat_template=QWEN_TEMPLATE,
    )  # fmt: skip
    return _save(HyperCLOVAXVisionV2ForConditionalGeneration, config, processor, folder, seed, True)


def _muse(tokenizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 14,
        "merge_size": 2, "patch_temporal": 2, "pos_emb_height": 8, "pos_emb_width": 8,
        "layer_types": ["window_attention", "full_attention"], "max_position_embeddings": 64,
    }  # fmt: skip
    text = text_sizes(tokenizer, 32) | {
        "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "layer_rope_theta": [10000.0, 0],
        "sliding_window": 512,
    }  # fmt: skip
    return vision, text


MUSE_TOKENS = ("<|image_start|>", "<|image_end|>", "<|video|>", "<|vid_frame_separator|>", "<|vid_start|>",
               "<|vid_end|>", "<|audio|>", "<|soft_audio_start|>", "<|soft_audio_end|>")  # fmt: skip


def muse_glimmer(folder: Path, *, seed: int = 0) -> Path:
    """Muse Glimmer: Kimi's tower, merged two by two."""
    from transformers import (
        MuseGlimmerConfig,
        MuseGlimmerForConditionalGeneration,
        MuseGlimmerImageProcessor,
        MuseGlimmerProcessor,
        MuseGlimmerVideoProcessor,
    )

    tokenizer, template = _tokens("<|patch|>", *MUSE_TOKENS)
    ids = tokenizer.convert_tokens_to_ids
    vision, text = _muse(tokenizer)
    config = MuseGlimmerConfig(
        vision_config=vision, text_config=text, image_token_id=ids("<|patch|>"), video_token_id=ids("<|video|>"),
        out_hidden_size=128, projector_hidden_size=64,
    )  # fmt: skip
    limits = {"size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}, "patch_size": 14}
    processor = MuseGlimmerProcessor(
        MuseGlimmerImageProcessor(**limits), MuseGlimmerVideoProcessor(**limits), tokenizer, chat_template=template
    )
    return _save(MuseGlimmerForConditionalGeneration, config, processor, folder, seed, True)


def muse_spark(folder: Path, *, seed: int = 0) -> Path:
    """Muse Spark: Muse Glimmer with experts and sound; only pages are shown to it here."""
    from transformers import (
        MuseGlimmerImageProcessor,
        MuseGlimmerVideoProcessor,
        MuseSparkConfig,
        MuseSparkFeatureExtractor,
        MuseSparkForConditionalGeneration,
        MuseSparkProcessor,
    )

    tokenizer, template = _tokens("<|patch|>", *MUSE_TOKENS)
    ids = tokenizer.convert_tokens_to_ids
    vision, text = _muse(tokenizer)
    config = MuseSparkConfig(
        vision_config=vision,
        audio_config={"hidden_sizes": [8, 16], "depths": [1, 1], "patch_sizes": [16, 6], "num_hidden_layers": 2,
                      "out_hidden_size": 32},
        text_config=text
        | {"moe_hidden_size": 16, "moe_intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
           "mlp_layer_types": ["sparse", "sparse"]},
        image_token_id=ids("<|patch|>"), video_token_id=ids("<|video|>"), audio_token_id=ids("<|audio|>"),
        out_hidden_size=128, projector_hidden_size=64,
    )  # fmt: skip
    limits = {"size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}, "patch_size": 14}
    processor = MuseSparkProcessor(
        MuseGlimmerImageProcessor(**limits), MuseGlimmerVideoProcessor(**limits), tokenizer,
        MuseSparkFeatureExtractor(), chat_template=template,
    )  # fmt: skip
    return _save(MuseSparkForConditionalGeneration, config, processor, folder, seed, True)


def mistral_large4(folder: Path, *, seed: int = 0) -> Path:
    """Mistral Large 4: Pixtral's tower and Mistral 3's merged patches before latent, indexed attention."""
    from transformers import (
        MistralLarge4Config,
        MistralLarge4ForConditionalGeneration,
        PixtralImageProcessor,
        PixtralProcessor,
    )

    tokenizer, template = _tokens("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    config = MistralLarge4Config(
        vision_config={"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                       "num_attention_heads": 4, "head_dim": 8, "image_size": 112, "patch_size": 14,
                       "initializer_range": INIT},
        text_config=text_sizes(tokenizer, 32)
        | {**MLA, **SPARSE, "head_dim": 8, "layer_types": ["indexed_attention", "indexed_attention"],
           "indexer_types": ["full", "full"], "kv_source_layers": [0, 1], "no_rope_layers": [1, 0]},
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"), spatial_merge_size=2,
    )  # fmt: skip
    processor = PixtralProcessor(
        PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14}, **PIXELS), tokenizer,
        patch_size=14, spatial_merge_size=2, chat_template=template,
    )  # fmt: skip
    return _save(MistralLarge4ForConditionalGeneration, config, processor, folder, seed, True)


def qwen3_omni_moe_thinker(folder: Path, *, seed: int = 0) -> Path:
    """Qwen3-Omni's thinker: image, sound and text; only pages are shown to it here."""
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        Qwen3OmniMoeProcessor,
        Qwen3OmniMoeThinkerConfig,
        Qwen3OmniMoeThinkerForConditionalGeneration,
        WhisperFeatureExtractor,
    )

    named = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "audio_token": "<|audio_pad|>",
             "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>",
             "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>"}  # fmt: skip
    tokenizer, template = _tokens(
        "<|image_pad|>", *(token for name, token in named.items() if "image" not in name and "vision" not in name),
        start="<|vision_start|>", stop="<|vision_end|>", extra_special_tokens=named,
    )  # fmt: skip
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen3OmniMoeThinkerConfig(
        vision_config=_tower(32, 32, patch=16, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
        audio_config={"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
                      "output_dim": 32, "downsample_hidden_size": 8, "num_mel_bins": 16},
        text_config=text_sizes(tokenizer, 32, 3) | {"rope_parameters": ROPE_3, "head_dim": 8, **EXPERTS},
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"), audio_token_id=ids("<|audio_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), audio_start_token_id=ids("<|audio_start|>"),
    )  # fmt: skip
    limits = {"size": SIZE, "patch_size": 16}
    processor = Qwen3OmniMoeProcessor(
        Qwen2VLImageProcessor(**limits), Qwen2VLVideoProcessor(**limits), WhisperFeatureExtractor(feature_size=16),
        tokenizer, chat_template=template,
    )  # fmt: skip
    return _save(Qwen3OmniMoeThinkerForConditionalGeneration, config, processor, folder, seed, True)


INKLING_TEXT: dict[str, Any] = {
    "head_dim": 8, "swa_head_dim": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "d_rel": 4,
    "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "sliding_window_size": 1024,
    "layer_types": ["hybrid_sliding", "hybrid"],
}  # fmt: skip
INKLING_TOKENS = ("<|content_image|>", "<|unused_200053|>", "<|content_audio_input|>")


def inkling(folder: Path, *, seed: int = 0) -> Path:
    """Inkling: a page as it is, cut into patches of one token each, the last column padding."""
    from transformers import (
        InklingConfig,
        InklingFeatureExtractor,
        InklingForConditionalGeneration,
        InklingImageProcessor,
        InklingProcessor,
    )

    tokenizer, template = _tokens("<|unused_200054|>", *INKLING_TOKENS)
    ids = tokenizer.convert_tokens_to_ids
    config = InklingConfig(
        vision_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8,
                       "text_hidden_size": 32, "initializer_range": INIT},
        audio_config={"n_mel_bins": 8, "mel_vocab_size": 16, "text_hidden_size": 32},
        text_config=text_sizes(tokenizer, 32)
        | {**INKLING_TEXT, "mlp_layer_types": ["dense", "sparse"], "n_shared_experts": 1,
           "unpadded_vocab_size": len(tokenizer) - 2, "logits_mup_width_multiplier": 2.0},
        image_token_id=ids("<|unused_200054|>"), audio_token_id=ids("<|unused_200053|>"),
        image_bos_token_id=ids("<|content_image|>"), audio_bos_token_id=ids("<|content_audio_input|>"),
    )  # fmt: skip
    processor = InklingProcessor(
        InklingFeatureExtractor(), InklingImageProcessor(size={"height": 8, "width": 8}, **PIXELS), tokenizer,
        chat_template=template,
    )  # fmt: skip
    return _save(InklingForConditionalGeneration, config, processor, folder, seed, True)


def _inkling2(kind: str, folder: Path, seed: int, **further: Any) -> Path:
    import transformers
    from transformers import Inkling2ImageProcessor, Inkling2Processor

    tokenizer, template = _tokens("<|unused_200054|>", *INKLING_TOKENS)
    config = getattr(transformers, f"{kind}Config")(
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "patch_size": 4, "posemb_grid_size": 8, "projection_hidden_dim": 32, "text_hidden_size": 32,
                       "initializer_range": INIT},
        text_config=text_sizes(tokenizer, 32, 4)
        | {**INKLING_TEXT, "layer_types": 2 * INKLING_TEXT["layer_types"], "unpadded_vocab_size": len(tokenizer) - 2,
           "n_layers_per_attn_res_block": 2, **further},
        image_token_id=tokenizer.convert_tokens_to_ids("<|unused_200054|>"),
    )  # fmt: skip
    processor = Inkling2Processor(
        Inkling2ImageProcessor(size={"height": 8, "width": 8}, **PIXELS), tokenizer, chat_template=template
    )
    return _save(getattr(transformers, f"{kind}ForConditionalGeneration"), config, processor, folder, seed, True)


def inkling2(folder: Path, *, seed: int = 0) -> Path:
    """Inkling 2: patches merged two by two."""
    return _inkling2("Inkling2", folder, seed)


def inkling2_loop(folder: Path, *, seed: int = 0) -> Path:
    """Inkling 2 Loop: some layers are passed several times."""
    return _inkling2("Inkling2Loop", folder, seed, loop_layer_index_start=2, loop_layer_index_end=4, loop_num_passes=2)


def apertus1p5(folder: Path, *, seed: int = 0) -> Path:
    """Apertus 1.5: a page as codes of a vision tokenizer, rows ended by a token of their own."""
    from transformers import (
        Apertus1p5Config,
        Apertus1p5ForConditionalGeneration,
        Apertus1p5ImageProcessor,
        Apertus1p5Processor,
        WavTokenizerFeatureExtractor,
    )

    named = {"image_token": "<|image|>", "audio_token": "<|audio|>", "boi_token": "<|img_start|>",
             "eoi_token": "<|img_end|>", "image_wrapper_token": "<|img_token_start|>",
             "eol_token": "<|img_end_of_row|>", "boa_token": "<|audio_start|>",
             "eoa_token": "<|audio_end|>"}  # fmt: skip
    tokenizer, template = _tokens("<|image|>", *list(named.values())[1:], extra_special_tokens=named)
    ids, codes = tokenizer.convert_tokens_to_ids, 64
    config = Apertus1p5Config(
        vision_config={"attn_resolutions": [], "base_channels": 32, "channel_multiplier": [1, 1, 1],
                       "codebook_size": codes, "embed_dim": 8, "latent_channels": 8, "num_res_blocks": 1,
                       "resolution": 64},
        audio_config={"codebook_dim": 8, "codebook_size": 8, "hidden_size": 8, "num_filters": 2, "num_lstm_layers": 1,
                      "decoder_hidden_size": 32, "decoder_intermediate_size": 32, "decoder_num_layers": 1},
        text_config=text_sizes(tokenizer, 32) | {"vocab_size": len(tokenizer) + codes + 8},
        image_token_id=ids("<|image|>"), audio_token_id=ids("<|audio|>"), image_token_offset=len(tokenizer),
        audio_token_offset=len(tokenizer) + codes,
    )  # fmt: skip
    processor = Apertus1p5Processor(
        Apertus1p5ImageProcessor(size={"min_pixels": 32 * 32, "max_pixels": 64 * 64}, spatial_factor=4),
        WavTokenizerFeatureExtractor(), tokenizer, chat_template=template,
    )  # fmt: skip
    return _save(Apertus1p5ForConditionalGeneration, config, processor, folder, seed, True)


BUILDERS = {
    "apertus1p5": apertus1p5,
    "cohere_compass": cohere_compass,
    "cosmos3_edge": cosmos3_edge,
    "cosmos3_omni": cosmos3_omni,
    "dots3_note": dots3_note,
    "glm5_next": glm5_next,
    "hy_v4_vl": hy_v4_vl,
    "hyperclovax_vision_v2": hyperclovax_vision_v2,
    "inkling2": inkling2,
    "inkling2_loop": inkling2_loop,
    "inkling_mm_model": inkling,
    "minimax_m3_vl": minimax_m3_vl,
    "mistral_large4": mistral_large4,
    "muse_glimmer": muse_glimmer,
    "muse_spark": muse_spark,
    "qwen3_omni_moe_thinker": qwen3_omni_moe_thinker,
    "qwen4_exp": qwen4_exp,
}
