"""Idefics and its kin: tiles with tags of their own, pixel shuffle or a resampler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests import tiny
from tests.families._parts import PIXELS, llama, text_sizes, vision_sizes
from tests.tiny import IDEFICS_TEMPLATE, INIT, _save, byte_level_tokenizer

TAGS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
MARKS = ["<|im_start|>", "<|endoftext|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>"]


def _tokenizer(*special: str) -> Any:
    return byte_level_tokenizer(
        580, [*MARKS, *special], bos_token="<|im_start|>", eos_token="<end_of_utterance>", pad_token="<|endoftext|>"
    )


def idefics2(folder: Path, *, seed: int = 0, tiles: bool = False) -> Path:
    """Idefics2: a resampler makes a fixed number of tokens of a page of any shape."""
    from transformers import (
        Idefics2Config,
        Idefics2ForConditionalGeneration,
        Idefics2ImageProcessor,
        Idefics2Processor,
        MistralConfig,
    )

    tokenizer = _tokenizer()
    processor = Idefics2Processor(
        image_processor=Idefics2ImageProcessor(
            size={"shortest_edge": 42, "longest_edge": 56}, do_image_splitting=tiles, **PIXELS
        ),
        tokenizer=tokenizer,
        image_seq_len=6,
        chat_template=IDEFICS_TEMPLATE,
    )
    config = Idefics2Config(
        vision_config=vision_sizes(32),
        perceiver_config={
            "hidden_size": 32, "resampler_n_latents": 6, "resampler_depth": 2, "resampler_n_heads": 4,
            "resampler_head_dim": 8, "num_key_value_heads": 2, "initializer_range": INIT,
        },
        text_config=MistralConfig(**text_sizes(tokenizer, 32), sliding_window=None),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return _save(Idefics2ForConditionalGeneration, config, processor, folder, seed, True)


def idefics2_tiles(folder: Path, *, seed: int = 0) -> Path:
    """Idefics2 that cuts the page into four, and reads it whole after them."""
    return idefics2(folder, seed=seed, tiles=True)


def idefics3_tiles(folder: Path, *, seed: int = 0) -> Path:
    """Idefics3 as its checkpoints come: tiles, then the page."""
    return tiny.idefics3(folder, seed=seed, tiles=True)


def smolvlm(folder: Path, *, seed: int = 0) -> Path:
    """SmolVLM: Idefics3's tiles and pixel shuffle."""
    from transformers import (
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    tokenizer = _tokenizer("<global-img>", "<video>", *TAGS)
    processor = SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(
            size={"longest_edge": 112}, max_image_size={"longest_edge": 56}, do_image_splitting=True, **PIXELS
        ),
        tokenizer=tokenizer,
        video_processor=SmolVLMVideoProcessor(
            size={"longest_edge": 112}, max_image_size={"longest_edge": 56},
            video_sampling={"fps": 1, "max_frames": 4, "video_size": {"longest_edge": 56}},
        ),
        image_seq_len=4,
        chat_template=IDEFICS_TEMPLATE,
    )  # fmt: skip
    config = SmolVLMConfig(
        vision_config=vision_sizes(24),
        text_config=llama(tokenizer, 24),
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return _save(SmolVLMForConditionalGeneration, config, processor, folder, seed, True)


BUILDERS = {"idefics2": idefics2, "idefics3": tiny.idefics3, "smolvlm": smolvlm}
VARIANTS = {"idefics2, cut in four": idefics2_tiles, "idefics3, tiles": idefics3_tiles}
