"""What tiny checkpoints of a kin share."""

from __future__ import annotations

from typing import Any

from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

from tests.tiny import INIT, INK_STD, PAPER_MEAN, metaspace_tokenizer

PIXELS: dict[str, Any] = {"image_mean": PAPER_MEAN, "image_std": INK_STD}


def llama_tokenizer(*special: str, size: int = 640) -> PreTrainedTokenizerFast:
    """Metaspace tokenizer with <s>, </s>, <pad> and the given special tokens."""
    marks = ["<s>", "</s>", "<pad>", *special]
    return metaspace_tokenizer(size, marks, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def text_sizes(tokenizer: PreTrainedTokenizerFast, width: int = 32, depth: int = 2) -> dict[str, Any]:
    """Sizes of a tiny language model, under the names that nearly all text configs use."""
    return {
        "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": depth,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "initializer_range": INIT,
    }  # fmt: skip


def vision_sizes(width: int = 32, depth: int = 2, *, image: int = 56, patch: int = 14) -> dict[str, Any]:
    """Sizes of a tiny vision tower, under the names that nearly all vision configs use."""
    return {
        "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": depth, "num_attention_heads": 4,
        "image_size": image, "patch_size": patch, "initializer_range": INIT,
    }  # fmt: skip


def llama(tokenizer: PreTrainedTokenizerFast, width: int = 32, **further: Any) -> LlamaConfig:
    """A tiny Llama."""
    return LlamaConfig(**text_sizes(tokenizer, width), **further)


def clip_tower(width: int = 32, **sizes: int) -> CLIPVisionConfig:
    """A tiny CLIP tower."""
    return CLIPVisionConfig(**vision_sizes(width, **sizes), projection_dim=width)


def clip_pixels(image: int = 56) -> CLIPImageProcessor:
    """CLIP's square crop."""
    return CLIPImageProcessor(
        size={"shortest_edge": image}, crop_size={"height": image, "width": image}, do_center_crop=True, **PIXELS
    )
