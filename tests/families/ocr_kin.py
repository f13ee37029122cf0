"""Families whose page stands beside its tiles, or in codes: DeepSeek-OCR 2, Step 3.7, Nemotron, Chameleon, Emu."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.family_parts import PAPER, chat_template, text_sizes, tower_sizes
from tests.tiny import INIT, _save, byte_level_tokenizer

DEEPSEEK_IDS = {
    "bos_token": "<|begin_of_sentence|>", "eos_token": "<|end_of_sentence|>", "pad_token": "<|pad|>",
}  # fmt: skip
DEEPSEEK_TEMPLATE = chat_template(
    start="<|begin_of_sentence|>", user="<|User|>", image="<image>\n", assistant="<|Assistant|>",
    end="<|end_of_sentence|>",
)  # fmt: skip
EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def _deepseek_tokenizer() -> Any:
    special = [*DEEPSEEK_IDS.values(), "<|User|>", "<|Assistant|>", "<image>"]
    return byte_level_tokenizer(600, special, **DEEPSEEK_IDS, extra_special_tokens={"image_token": "<image>"})


def _sam_tower(image: int, **changed: Any) -> dict[str, Any]:
    """SAM's tower in windows only: global attention over so many patches is slow."""
    return {
        "hidden_size": 24, "output_channels": 16, "num_hidden_layers": 1, "num_attention_heads": 4,
        "image_size": image, "patch_size": 4, "initializer_range": INIT, "window_size": 4, "global_attn_indexes": [],
        "mlp_dim": 48, "downsample_channels": [24, 32],
    } | changed  # fmt: skip


def deepseek_ocr2(folder: Path, *, seed: int = 0) -> Path:
    """DeepSeek-OCR 2: a decoder reads SAM's map and then queries, whose states are the page's tokens."""
    from transformers import (
        DeepseekOcr2Config,
        DeepseekOcr2ForConditionalGeneration,
        DeepseekOcr2ImageProcessor,
        DeepseekOcr2Processor,
    )

    tokenizer = _deepseek_tokenizer()
    text = text_sizes(tokenizer, mlp_layer_types=["dense", "sparse"], n_group=1, topk_group=1, **EXPERTS)
    del text["head_dim"]
    config = DeepseekOcr2Config(
        vision_config={
            "sam_config": _sam_tower(256),
            "encoder_config": {
                "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
                "num_key_value_heads": 4, "initializer_range": INIT, "vocab_size": 8,
            },
        },
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    processor = DeepseekOcr2Processor(
        image_processor=DeepseekOcr2ImageProcessor(
            size={"height": 256, "width": 256}, tile_size=192, min_patches=2, max_patches=2, **PAPER
        ),
        tokenizer=tokenizer,
        patch_size=4,
        downsample_ratio=4,
        chat_template=DEEPSEEK_TEMPLATE,
    )
    return _save(DeepseekOcr2ForConditionalGeneration, config, processor, folder, seed, True)


def unlimited_ocr(folder: Path, *, seed: int = 0) -> Path:
    """Unlimited-OCR: SAM's map through a second tower, a newline behind every line; sliding attention behind it."""
    from transformers import (
        UnlimitedOcrConfig,
        UnlimitedOcrForConditionalGeneration,
        UnlimitedOcrImageProcessor,
        UnlimitedOcrProcessor,
    )

    tokenizer = _deepseek_tokenizer()
    text = text_sizes(tokenizer, mlp_layer_types=["dense", "sparse"], sliding_window=64, **EXPERTS)
    del text["head_dim"]
    config = UnlimitedOcrConfig(
        vision_config={
            "sam_config": _sam_tower(128),
            "encoder_config": tower_sizes(image=128, patch=16, hidden_size=32),
        },
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    processor = UnlimitedOcrProcessor(
        image_processor=UnlimitedOcrImageProcessor(
            size={"height": 128, "width": 128}, tile_size=64, min_patches=2, max_patches=4, **PAPER
        ),
        tokenizer=tokenizer,
        patch_size=4,
        downsample_ratio=4,
        chat_template=DEEPSEEK_TEMPLATE,
    )
    return _save(UnlimitedOcrForConditionalGeneration, config, processor, folder, seed, True)


def step3p7(folder: Path, *, seed: int = 0) -> Path:
    """Step 3.7: windows of a large page before the whole page, both brought down by strided convolutions; experts."""
    from transformers import (
        Step3p7Config,
        Step3p7ForConditionalGeneration,
        Step3p7ImageProcessor,
        Step3p7Processor,
    )

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<im_patch>", "<im_start>", "<im_end>", "<patch_start>",
               "<patch_end>", "<patch_newline>"]  # fmt: skip
    tokenizer = byte_level_tokenizer(600, special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    config = Step3p7Config(
        vision_config={
            "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 168, "patch_size": 14,
            "mlp_ratio": 2.0, "max_position_embeddings": 144,
        },
        text_config=text_sizes(
            tokenizer, moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2, share_expert_dim=24,
            mlp_layer_types=["dense", "sparse"], layer_types=["sliding_attention", "full_attention"],
            sliding_window=64,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<im_patch>"),
    )  # fmt: skip
    processor = Step3p7Processor(
        image_processor=Step3p7ImageProcessor(
            size={"height": 168, "width": 168}, patch_size=112, max_image_size=224, vision_patch_size=14,
            downsampler_stride=4, **PAPER,
        ),
        tokenizer=tokenizer,
        chat_template=chat_template(
            user="<|im_start|>user\n", image="<im_patch>", assistant="<|im_start|>assistant\n", end="<|im_end|>\n"
        ),
    )  # fmt: skip
    return _save(Step3p7ForConditionalGeneration, config, processor, folder, seed, True)


def nemotron_h_omni(folder: Path, *, seed: int = 0) -> Path:
    """Nemotron Nano Omni: RADIO's tower, pixels shuffled two by two, a decoder of state spaces and attention."""
    from transformers import (
        NemotronH_Omni_Reasoning_V3,
        NemotronH_Omni_Reasoning_V3_Config,
        NemotronH_Omni_Reasoning_V3ImageProcessor,
        NemotronH_Omni_Reasoning_V3Processor,
        NemotronH_Omni_Reasoning_V3VideoProcessor,
        ParakeetFeatureExtractor,
    )

    special = ["<unk>", "<s>", "<|im_start|>", "<|im_end|>", "<image>", "<video>", "<so_embedding>", "<so_start>",
               "<so_end>", "<img>", "</img>"]  # fmt: skip
    tokenizer = byte_level_tokenizer(600, special, bos_token="<s>", eos_token="<|im_end|>", pad_token="<unk>")
    ids = tokenizer.convert_tokens_to_ids
    text = text_sizes(
        tokenizer, layers_block_type=["linear_attention", "full_attention", "mlp"], ssm_state_size=8,
        mamba_num_heads=4, mamba_head_dim=16, n_groups=2, chunk_size=16, use_mamba_kernels=False,
    )  # fmt: skip
    del text["num_hidden_layers"]
    config = NemotronH_Omni_Reasoning_V3_Config(
        vision_config={
            "model_type": "radio", "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "patch_size": 16, "initializer_range": INIT, "video_temporal_patch_size": 2,
        },
        text_config={"model_type": "nemotron_h", **text},
        projector_hidden_size=48,
        vision_hidden_size=24,
        image_token_id=ids("<image>"),
        video_token_id=ids("<video>"),
        audio_token_id=ids("<so_embedding>"),
    )  # fmt: skip
    processor = NemotronH_Omni_Reasoning_V3Processor(
        image_processor=NemotronH_Omni_Reasoning_V3ImageProcessor(
            patch_size=16, min_num_patches=16, max_num_patches=64, **PAPER
        ),
        feature_extractor=ParakeetFeatureExtractor(),
        video_processor=NemotronH_Omni_Reasoning_V3VideoProcessor(),
        tokenizer=tokenizer,
        chat_template=chat_template(
            user="<|im_start|>user\n", image="<image>\n", assistant="<|im_start|>assistant\n", end="<|im_end|>\n"
        ),
    )
    return _save(NemotronH_Omni_Reasoning_V3, config, processor, folder, seed, True)


def chameleon(folder: Path, *, seed: int = 0) -> Path:
    """Chameleon: the page in codes of a quantiser, which are words of the decoder's vocabulary."""
    from transformers import (
        ChameleonConfig,
        ChameleonForConditionalGeneration,
        ChameleonImageProcessor,
        ChameleonProcessor,
    )

    codes = [f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(code))}Z" for code in range(16)]
    special = ["<s>", "<pad>", "</s>", "<racm3:break>", "<eoss>", "<image>", "<reserved08706>", *codes]
    tokenizer = byte_level_tokenizer(
        660, special, bos_token="<s>", eos_token="</s>", pad_token="<pad>", sep_token="<reserved08706>",
        extra_special_tokens={"image_token": "<image>", "boi_token": "<racm3:break>", "eoi_token": "<eoss>"},
    )  # fmt: skip
    text = text_sizes(tokenizer)
    del text["head_dim"]
    config = ChameleonConfig(
        vq_config={
            "embed_dim": 8, "num_embeddings": 16, "latent_channels": 32, "resolution": 64, "base_channels": 32,
            "channel_multiplier": [1, 1, 1], "num_res_blocks": 1, "attn_type": "none",
        },
        vocabulary_map={word: place for word, place in tokenizer.get_vocab().items() if word in special},
        **text,
    )  # fmt: skip
    processor = ChameleonProcessor(
        image_processor=ChameleonImageProcessor(
            size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, rescale_factor=1 / 255, **PAPER
        ),
        tokenizer=tokenizer,
        image_seq_length=256,
    )
    return _save(ChameleonForConditionalGeneration, config, processor, folder, seed, True)


def emu3(folder: Path, *, seed: int = 0) -> Path:
    """Emu 3: a page of any shape in codes of a quantiser, an end-of-line word behind every line of them."""
    from transformers import Emu3Config, Emu3ForConditionalGeneration, Emu3ImageProcessor, Emu3Processor

    codes = [f"<|visual token {code:06d}|>" for code in range(32)]
    named = {
        "image_token": "<image>", "boi_token": "<|image start|>", "eoi_token": "<|image end|>",
        "image_wrapper_token": "<|image token|>", "eof_token": "<|extra_201|>",
    }  # fmt: skip
    special = ["<|extra_203|>", "<|extra_204|>", "<|endoftext|>", "<|extra_200|>", *named.values(), *codes]
    tokenizer = byte_level_tokenizer(
        680, special, bos_token="<|extra_203|>", eos_token="<|extra_204|>", pad_token="<|endoftext|>",
        extra_special_tokens=named,
    )  # fmt: skip
    config = Emu3Config(
        vq_config={
            "codebook_size": 32, "embed_dim": 4, "latent_channels": 4, "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1, "hidden_size": 32,
            "attn_resolutions": [],
        },
        text_config=text_sizes(tokenizer, attention_dropout=0.0),
        vocabulary_map={word: place for word, place in tokenizer.get_vocab().items() if word in special},
    )  # fmt: skip
    processor = Emu3Processor(
        image_processor=Emu3ImageProcessor(min_pixels=96 * 96, max_pixels=160 * 160, **PAPER),
        tokenizer=tokenizer,
        chat_template=chat_template(
            start="<|extra_203|>", user="User: ", image="<image>", assistant=" Assistant:", end="<|extra_204|>"
        ),
    )
    return _save(Emu3ForConditionalGeneration, config, processor, folder, seed, True)


BUILDERS: dict[str, Callable[..., Path]] = {
    "chameleon": chameleon,
    "deepseek_ocr2": deepseek_ocr2,
    "emu3": emu3,
    "nemotron_h_omni": nemotron_h_omni,
    "step3p7": step3p7,
    "unlimited_ocr": unlimited_ocr,
}
