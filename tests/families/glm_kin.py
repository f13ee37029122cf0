"""Families that take a page of any shape as flat patches, merged two by two, as GLM-V and Qwen do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.family_parts import PAPER, chat_template, text_sizes
from tests.tiny import INIT, _save, byte_level_tokenizer

LIMITS = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
GLM_IDS = {"eos_token": "<|user|>", "pad_token": "<|endoftext|>"}
GLM_TOKENS = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|begin_of_image|>", "<|image|>", "<|end_of_image|>",
              "<|begin_of_video|>", "<|video|>", "<|end_of_video|>"]  # fmt: skip
GLM_TEMPLATE = chat_template(
    user="<|user|>\n", image="<|begin_of_image|><|image|><|end_of_image|>", assistant="<|assistant|>\n"
)
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 3], "partial_rotary_factor": 1.0}


def _glm_tokens(tokenizer: Any) -> dict[str, int]:
    ids = tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": ids("<|image|>"), "video_token_id": ids("<|video|>"),
        "image_start_token_id": ids("<|begin_of_image|>"), "image_end_token_id": ids("<|end_of_image|>"),
        "video_start_token_id": ids("<|begin_of_video|>"), "video_end_token_id": ids("<|end_of_video|>"),
    }  # fmt: skip


def _glm_vision(**changed: Any) -> dict[str, Any]:
    return {
        "depth": 2, "hidden_size": 32, "num_heads": 4, "image_size": 56, "patch_size": 14, "out_hidden_size": 40,
        "intermediate_size": 48, "initializer_range": INIT,
    } | changed  # fmt: skip


def _glm4v_parts() -> tuple[Any, Any]:
    from transformers import Glm4vImageProcessor, Glm4vProcessor, Glm4vVideoProcessor

    tokenizer = byte_level_tokenizer(600, GLM_TOKENS, **GLM_IDS)
    processor = Glm4vProcessor(
        image_processor=Glm4vImageProcessor(size=LIMITS, **PAPER),
        tokenizer=tokenizer,
        video_processor=Glm4vVideoProcessor(size=LIMITS),
        chat_template=GLM_TEMPLATE,
    )
    return tokenizer, processor


def _glm46v_parts() -> tuple[Any, Any]:
    from transformers import Glm46VImageProcessor, Glm46VProcessor, Glm46VVideoProcessor

    tokenizer = byte_level_tokenizer(600, GLM_TOKENS, **GLM_IDS)
    processor = Glm46VProcessor(
        image_processor=Glm46VImageProcessor(size=LIMITS, **PAPER),
        tokenizer=tokenizer,
        video_processor=Glm46VVideoProcessor(size=LIMITS),
        chat_template=GLM_TEMPLATE,
    )
    return tokenizer, processor


def glm4v(folder: Path, *, seed: int = 0) -> Path:
    """GLM-4.1V: three-part rotary positions, the merge a strided convolution."""
    from transformers import Glm4vConfig, Glm4vForConditionalGeneration

    tokenizer, processor = _glm4v_parts()
    config = Glm4vConfig(
        vision_config=_glm_vision(),
        text_config=text_sizes(tokenizer, rope_parameters=MROPE),
        **_glm_tokens(tokenizer),
    )
    return _save(Glm4vForConditionalGeneration, config, processor, folder, seed, True)


def glm4v_moe(folder: Path, *, seed: int = 0) -> Path:
    """GLM-4.5V: GLM-4.1V's tower before a mixture of experts."""
    from transformers import Glm4vMoeConfig, Glm4vMoeForConditionalGeneration

    tokenizer, processor = _glm4v_parts()
    experts = {"moe_intermediate_size": 24, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1}
    config = Glm4vMoeConfig(
        vision_config=_glm_vision(),
        text_config=text_sizes(tokenizer, rope_parameters=MROPE, **experts),
        **_glm_tokens(tokenizer),
    )
    return _save(Glm4vMoeForConditionalGeneration, config, processor, folder, seed, True)


def glm46v(folder: Path, *, seed: int = 0) -> Path:
    """GLM-4.6V: GLM-4.1V's parts behind a processor of its own."""
    from transformers import Glm46VConfig, Glm46VForConditionalGeneration

    tokenizer, processor = _glm46v_parts()
    config = Glm46VConfig(
        vision_config=_glm_vision(model_type="glm4v_vision"),
        text_config=text_sizes(tokenizer, rope_parameters=MROPE, model_type="glm4v_text"),
        **_glm_tokens(tokenizer),
    )
    return _save(Glm46VForConditionalGeneration, config, processor, folder, seed, True)


def glmga(folder: Path, *, seed: int = 0) -> Path:
    """GLM-GA: GLM-4.6V's model; its image processor keeps pages to multiples of larger blocks."""
    from transformers import Glm46VForConditionalGeneration, Glm46VProcessor, GlmgaConfig
    from transformers.models.glmga import GlmgaImageProcessor, GlmgaVideoProcessor

    tokenizer = byte_level_tokenizer(600, GLM_TOKENS, **GLM_IDS)
    processor = Glm46VProcessor(
        image_processor=GlmgaImageProcessor(size=LIMITS, patch_expand_factor=2, **PAPER),
        tokenizer=tokenizer,
        video_processor=GlmgaVideoProcessor(size=LIMITS),
        chat_template=GLM_TEMPLATE,
    )
    config = GlmgaConfig(
        vision_config=_glm_vision(model_type="glm4v_vision"),
        text_config=text_sizes(tokenizer, rope_parameters=MROPE, model_type="glm4v_text"),
        **_glm_tokens(tokenizer),
    )
    return _save(Glm46VForConditionalGeneration, config, processor, folder, seed, True)


def glm_ocr(folder: Path, *, seed: int = 0) -> Path:
    """GLM-OCR: a smaller GLM-V; published with GLM-4.6V's processor."""
    from transformers import GlmOcrConfig, GlmOcrForConditionalGeneration

    tokenizer, processor = _glm46v_parts()
    config = GlmOcrConfig(
        vision_config=_glm_vision(),
        text_config=text_sizes(tokenizer, rope_parameters=MROPE),
        **_glm_tokens(tokenizer),
    )
    return _save(GlmOcrForConditionalGeneration, config, processor, folder, seed, True)


def paddleocr_vl(folder: Path, *, seed: int = 0) -> Path:
    """PaddleOCR-VL: patches in reading order, merged two by two inside the model."""
    from transformers import (
        PaddleOCRVLConfig,
        PaddleOCRVLForConditionalGeneration,
        PaddleOCRVLImageProcessor,
        PaddleOCRVLProcessor,
    )

    special = ["<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|IMAGE_START|>", "<|IMAGE_PLACEHOLDER|>",
               "<|IMAGE_END|>", "<|video_pad|>"]  # fmt: skip
    tokenizer = byte_level_tokenizer(
        600, special, bos_token="<s>", eos_token="</s>", pad_token="<unk>",
        extra_special_tokens={"image_token": "<|IMAGE_PLACEHOLDER|>"},
    )  # fmt: skip
    ids = tokenizer.convert_tokens_to_ids
    config = PaddleOCRVLConfig(
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 56, "patch_size": 14,
        },
        text_config=text_sizes(
            tokenizer, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 2, 2]}
        ),
        image_token_id=ids("<|IMAGE_PLACEHOLDER|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|IMAGE_START|>"),
        vision_end_token_id=ids("<|IMAGE_END|>"),
    )  # fmt: skip
    processor = PaddleOCRVLProcessor(
        image_processor=PaddleOCRVLImageProcessor(size=LIMITS, **PAPER),
        tokenizer=tokenizer,
        chat_template=chat_template(
            start="<|begin_of_sentence|>",
            user="User: ",
            image="<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
            assistant="\nAssistant:\n",
            end="</s>",
        ),
    )
    return _save(PaddleOCRVLForConditionalGeneration, config, processor, folder, seed, True)


def exaone4_5(folder: Path, *, seed: int = 0) -> Path:
    """EXAONE 4.5: a windowed tower with grouped queries, plain one-part positions in the text."""
    from transformers import (
        Exaone4_5_Config,
        Exaone4_5_ForConditionalGeneration,
        Exaone4_5_Processor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    special = ["[PAD]", "[BOS]", "[EOS]", "<|endofturn|>", "<|user|>", "<|assistant|>", "<vision>", "</vision>",
               "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
    tokenizer = byte_level_tokenizer(600, special, bos_token="[BOS]", eos_token="<|endofturn|>", pad_token="[PAD]")
    config = Exaone4_5_Config(
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "num_key_value_heads": 2,
            "window_size": 56, "out_hidden_size": 40, "fullatt_block_indexes": [1], "initializer_range": INIT,
        },
        text_config={
            "model_type": "exaone4", "sliding_window": 64, "sliding_window_pattern": 2, **text_sizes(tokenizer),
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )  # fmt: skip
    processor = Exaone4_5_Processor(
        image_processor=Qwen2VLImageProcessor(size=LIMITS, **PAPER),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=LIMITS),
        chat_template=chat_template(
            user="<|user|>\n",
            image="<vision><|image_pad|></vision>\n",
            assistant="<|assistant|>\n",
            end="<|endofturn|>\n",
        ),
    )
    return _save(Exaone4_5_ForConditionalGeneration, config, processor, folder, seed, True)


def ernie4_5_vl_moe(folder: Path, *, seed: int = 0) -> Path:
    """ERNIE 4.5 VL: experts of their own for image tokens, told apart by a second kind of token types."""
    from transformers import (
        Ernie4_5_VLMoeConfig,
        Ernie4_5_VLMoeForConditionalGeneration,
        Ernie4_5_VLMoeImageProcessor,
        Ernie4_5_VLMoeProcessor,
        Ernie4_5_VLMoeVideoProcessor,
    )

    named = {
        "image_token": "<|IMAGE_PLACEHOLDER|>", "image_start_token": "<|IMAGE_START|>",
        "image_end_token": "<|IMAGE_END|>", "video_token": "<|VIDEO_PLACEHOLDER|>",
        "video_start_token": "<|VIDEO_START|>", "video_end_token": "<|VIDEO_END|>",
    }  # fmt: skip
    tokenizer = byte_level_tokenizer(
        600, ["<unk>", "<s>", "</s>", "<|begin_of_sentence|>", *named.values()], bos_token="<s>", eos_token="</s>",
        pad_token="<unk>", extra_special_tokens=named,
    )  # fmt: skip
    ids = tokenizer.convert_tokens_to_ids
    config = Ernie4_5_VLMoeConfig(
        vision_config={
            "depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "initializer_range": INIT,
        },
        text_config=text_sizes(
            tokenizer, moe_intermediate_size=[24, 16], moe_k=2, moe_num_experts=4, moe_num_shared_experts=1,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 1]},
        ),
        **{f"{name}_id": ids(token) for name, token in named.items()},
    )  # fmt: skip
    processor = Ernie4_5_VLMoeProcessor(
        image_processor=Ernie4_5_VLMoeImageProcessor(size=LIMITS, **PAPER),
        tokenizer=tokenizer,
        video_processor=Ernie4_5_VLMoeVideoProcessor(size=LIMITS, draw_on_frames=False),
        chat_template=chat_template(
            start="<|begin_of_sentence|>",
            user="User: Picture 1:",
            image="<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
            assistant="\nAssistant: ",
            end="</s>",
        ),
    )
    return _save(Ernie4_5_VLMoeForConditionalGeneration, config, processor, folder, seed, True)


def hunyuan_vl(folder: Path, *, seed: int = 0) -> Path:
    """HunYuan-VL: a newline token behind every row of tokens, one token before and one behind the image."""
    from transformers import (
        HunYuanVLConfig,
        HunYuanVLForConditionalGeneration,
        HunYuanVLImageProcessor,
        HunYuanVLProcessor,
    )

    named = {"image_token": "<image>", "image_start_token": "<im_start>", "image_end_token": "<im_end>"}
    special = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<newline>", *named.values()]
    tokenizer = byte_level_tokenizer(
        600, special, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", extra_special_tokens=named
    )
    ids = tokenizer.convert_tokens_to_ids
    config = HunYuanVLConfig(
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "out_hidden_size": 40, "img_max_token_num": 64, "max_image_size": 128, "min_image_size": 64,
        },
        text_config=text_sizes(
            tokenizer, head_dim=16,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2, 2]},
        ),
        image_token_id=ids("<image>"),
        im_start_id=ids("<im_start>"),
        im_end_id=ids("<im_end>"),
        im_newline_id=ids("<newline>"),
    )  # fmt: skip
    processor = HunYuanVLProcessor(
        image_processor=HunYuanVLImageProcessor(size={"shortest_edge": 64 * 64, "longest_edge": 128 * 128}, **PAPER),
        tokenizer=tokenizer,
        chat_template=chat_template(
            start="<bos>", user="<user>", image="<im_start><image><im_end>", assistant="<assistant>", end="<eos>"
        ),
    )
    return _save(HunYuanVLForConditionalGeneration, config, processor, folder, seed, True)


BUILDERS: dict[str, Callable[..., Path]] = {
    "ernie4_5_vl_moe": ernie4_5_vl_moe,
    "exaone4_5": exaone4_5,
    "glm46v": glm46v,
    "glm4v": glm4v,
    "glm4v_moe": glm4v_moe,
    "glm_ocr": glm_ocr,
    "glmga": glmga,
    "hunyuan_vl": hunyuan_vl,
    "paddleocr_vl": paddleocr_vl,
}
