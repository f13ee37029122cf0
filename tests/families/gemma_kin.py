"""Gemma's kin: SigLIP towers with pooled tokens, prefix or two-way attention over images, capped logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.families._parts import PIXELS, text_sizes, vision_sizes
from tests.tiny import INIT, _save, metaspace_tokenizer

MARKS = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
TEMPLATE = (
    "<bos>{% for message in messages %}<start_of_turn>{{ 'model' if message['role'] == 'assistant' else 'user' }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def _tokenizer(extra: dict[str, str], size: int = 620) -> Any:
    return metaspace_tokenizer(
        size, [*MARKS, *extra.values()], bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        extra_special_tokens=extra,
    )  # fmt: skip


def _siglip(width: int = 32) -> Any:
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(**vision_sizes(width), vision_use_head=False)


def paligemma(folder: Path, *, seed: int = 0) -> Path:
    """PaliGemma: no chat template; the question is read in both directions, the answer is not."""
    from transformers import (
        GemmaConfig,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipImageProcessor,
    )

    tokenizer = _tokenizer({"image_token": "<image>"})
    pixels = SiglipImageProcessor(size={"height": 56, "width": 56}, **PIXELS)
    pixels.image_seq_length = 16
    processor = PaliGemmaProcessor(image_processor=pixels, tokenizer=tokenizer)
    config = PaliGemmaConfig(
        vision_config=_siglip(),
        text_config=GemmaConfig(**text_sizes(tokenizer, 32), head_dim=8),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=32,
    )
    return _save(PaliGemmaForConditionalGeneration, config, processor, folder, seed, True)


GEMMA3 = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}


def _gemma3(config_kind: Any, model: Any, folder: Path, seed: int, pan_and_scan: bool) -> Path:
    import torch
    from transformers import Gemma3ImageProcessor, Gemma3Processor, Gemma3TextConfig

    tokenizer = _tokenizer(GEMMA3)
    ids = tokenizer.convert_tokens_to_ids
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(
            size={"height": 112, "width": 112},
            do_pan_and_scan=pan_and_scan,
            pan_and_scan_min_crop_size=32,
            pan_and_scan_max_num_crops=4,
            pan_and_scan_min_ratio_to_activate=1.2,
            **PIXELS,
        ),
        tokenizer=tokenizer,
        image_seq_length=16,
        chat_template=TEMPLATE.replace("IMAGE", "<start_of_image>"),
    )
    config = config_kind(
        vision_config=_siglip_large(),
        text_config=Gemma3TextConfig(
            **text_sizes(tokenizer, 32), head_dim=8, sliding_window=64, final_logit_softcapping=30.0,
            layer_types=["sliding_attention", "full_attention"],
        ),
        mm_tokens_per_image=16,
        image_token_index=ids("<image_soft_token>"),
        boi_token_index=ids("<start_of_image>"),
        eoi_token_index=ids("<end_of_image>"),
    )  # fmt: skip
    path = _save(model, config, processor, folder, seed, True)
    # the projector starts from zeros, with which a page would have no effect at all
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = model.from_pretrained(path)
        torch.nn.init.normal_(built.model.multi_modal_projector.mm_input_projection_weight, std=INIT)
        built.save_pretrained(path)
    return path


def _siglip_large() -> Any:
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(**vision_sizes(32, image=112), vision_use_head=False)


def gemma3(folder: Path, *, seed: int = 0) -> Path:
    """Gemma 3: 8 x 8 patches pooled to 4 x 4 tokens."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    return _gemma3(Gemma3Config, Gemma3ForConditionalGeneration, folder, seed, False)


def gemma3_crops(folder: Path, *, seed: int = 0) -> Path:
    """Gemma 3 with pan and scan: the page, then its crops."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    return _gemma3(Gemma3Config, Gemma3ForConditionalGeneration, folder, seed, True)


BUILDERS = {"gemma3": gemma3, "paligemma": paligemma}
