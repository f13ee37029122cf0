"""LLaVA and its kin: a tower, a projector, and a language model; NeXT and OneVision cut the page into tiles."""

from __future__ import annotations

from pathlib import Path

from tests import tiny
from tests.families._parts import PIXELS, clip_pixels, clip_tower, llama, llama_tokenizer, text_sizes, vision_sizes
from tests.tiny import LLAVA_TEMPLATE, _save, byte_level_tokenizer

PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]


def llava_full(folder: Path, *, seed: int = 0) -> Path:
    """LLaVA that keeps the class token (strategy "full"), as some of its checkpoints do."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    tokenizer = llama_tokenizer("<image>")
    config = LlavaConfig(
        vision_config=clip_tower(),
        text_config=llama(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
    )
    processor = LlavaProcessor(
        image_processor=clip_pixels(),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    return _save(LlavaForConditionalGeneration, config, processor, folder, seed, True)


def llava_next(folder: Path, *, seed: int = 0) -> Path:
    """LLaVA-NeXT: the page, then its tiles without their padding, a newline after every row."""
    from transformers import (
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    tokenizer = llama_tokenizer("<image>")
    config = LlavaNextConfig(
        vision_config=clip_tower(),
        text_config=llama(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=PINPOINTS, **PIXELS
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    return _save(LlavaNextForConditionalGeneration, config, processor, folder, seed, True)


def llava_next_video(folder: Path, *, seed: int = 0) -> Path:
    """LLaVA-NeXT-Video: reads a picture as LLaVA-NeXT does."""
    from transformers import (
        LlavaNextImageProcessor,
        LlavaNextVideoConfig,
        LlavaNextVideoForConditionalGeneration,
        LlavaNextVideoProcessor,
        LlavaNextVideoVideoProcessor,
    )

    tokenizer = llama_tokenizer("<image>", "<video>")
    ids = tokenizer.convert_tokens_to_ids
    config = LlavaNextVideoConfig(
        vision_config=clip_tower(),
        text_config=llama(tokenizer),
        image_token_index=ids("<image>"),
        video_token_index=ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
    )
    sizes = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    processor = LlavaNextVideoProcessor(
        image_processor=LlavaNextImageProcessor(image_grid_pinpoints=PINPOINTS, **sizes, **PIXELS),
        video_processor=LlavaNextVideoVideoProcessor(**sizes),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    return _save(LlavaNextVideoForConditionalGeneration, config, processor, folder, seed, True)


def llava_onevision(folder: Path, *, seed: int = 0) -> Path:
    """LLaVA-OneVision: SigLIP and Qwen2; tiles as in LLaVA-NeXT, shrunk where there are too many."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    tokenizer = byte_level_tokenizer(600, special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    ids = tokenizer.convert_tokens_to_ids
    pinpoints = [[56 * down, 56 * across] for down in (1, 2, 3) for across in (1, 2, 3)]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vision_sizes(24), vision_use_head=False),
        text_config=Qwen2Config(**text_sizes(tokenizer, 40)),
        image_token_index=ids("<image>"),
        video_token_index=ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_4",
    )
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            size={"height": 56, "width": 56}, image_grid_pinpoints=pinpoints, **PIXELS
        ),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size={"height": 56, "width": 56}),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
        chat_template=tiny.QWEN_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>\n"),
    )
    return _save(LlavaOnevisionForConditionalGeneration, config, processor, folder, seed, True)


def vipllava(folder: Path, *, seed: int = 0) -> Path:
    """ViP-LLaVA: several layers of the tower side by side."""
    from transformers import LlavaProcessor, VipLlavaConfig, VipLlavaForConditionalGeneration

    tokenizer = llama_tokenizer("<image>")
    config = VipLlavaConfig(
        vision_config=clip_tower(depth=3),
        text_config=llama(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=(-2, 1),
    )
    processor = LlavaProcessor(
        image_processor=clip_pixels(),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    return _save(VipLlavaForConditionalGeneration, config, processor, folder, seed, True)


def video_llava(folder: Path, *, seed: int = 0) -> Path:
    """Video-LLaVA: a tower for pictures beside one for videos."""
    from transformers import (
        VideoLlavaConfig,
        VideoLlavaForConditionalGeneration,
        VideoLlavaImageProcessor,
        VideoLlavaProcessor,
        VideoLlavaVideoProcessor,
    )

    tokenizer = llama_tokenizer("<image>", "<video>")
    ids = tokenizer.convert_tokens_to_ids
    config = VideoLlavaConfig(
        vision_config=clip_tower(),
        text_config=llama(tokenizer),
        image_token_index=ids("<image>"),
        video_token_index=ids("<video>"),
    )
    sizes = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    processor = VideoLlavaProcessor(
        image_processor=VideoLlavaImageProcessor(**sizes, **PIXELS),
        video_processor=VideoLlavaVideoProcessor(**sizes),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    return _save(VideoLlavaForConditionalGeneration, config, processor, folder, seed, True)


BUILDERS = {
    "llava": tiny.llava,
    "llava_next": llava_next,
    "llava_next_video": llava_next_video,
    "llava_onevision": llava_onevision,
    "video_llava": video_llava,
    "vipllava": vipllava,
}
VARIANTS = {"llava, class token kept": llava_full}
