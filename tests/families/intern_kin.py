"""InternVL: tiles that fit the page's shape, then the page; tokens four patches each."""

from __future__ import annotations

from pathlib import Path

from tests import tiny
from tests.families._parts import PIXELS, text_sizes, vision_sizes
from tests.tiny import _save, byte_level_tokenizer

NAMES = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
         "video_token": "<video>"}  # fmt: skip


def internvl(folder: Path, *, size: str = "tiny", seed: int = 0, tiles: bool = True, weights: bool = True) -> Path:
    """InternVL3 in its native form, with tiles or without; one tile of 49 visual tokens when builtin."""
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
        Qwen2Config,
    )

    big = size == "builtin"
    tiles = tiles and not big
    width, text, depth, image, patch = (64, 64, 3, 168, 12) if big else (32, 40, 2, 56, 14)
    n_tokens = (image // patch // 2) ** 2
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *NAMES.values()]
    tokenizer = byte_level_tokenizer(
        600, special, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=NAMES
    )
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            size={"height": image, "width": image}, crop_to_patches=tiles, min_patches=1,
            max_patches=6 if tiles else 1, **PIXELS,
        ),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size={"height": image, "width": image}),
        image_seq_length=n_tokens,
        chat_template=tiny.QWEN_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\n"),
    )  # fmt: skip
    config = InternVLConfig(
        vision_config=vision_sizes(width, depth, image=image, patch=patch) | {"layer_scale_init_value": 1.0},
        text_config=Qwen2Config(**text_sizes(tokenizer, text), tie_word_embeddings=True),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=n_tokens,
    )
    return _save(InternVLForConditionalGeneration, config, processor, folder, seed, weights)


def internvl_whole(folder: Path, *, seed: int = 0) -> Path:
    """InternVL3 that reads the page as one tile."""
    return internvl(folder, seed=seed, tiles=False)


BUILDERS = {"internvl": internvl}
VARIANTS = {"internvl, one tile": internvl_whole}
