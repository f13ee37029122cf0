"""What the tiny checkpoints of many families share: a chat template, sizes of language models and towers."""

from __future__ import annotations

from typing import Any

from tests.tiny import INIT, INK_STD, PAPER_MEAN

PAPER = {"image_mean": PAPER_MEAN, "image_std": INK_STD}


def chat_template(*, user: str, image: str, assistant: str, end: str = "", start: str = "") -> str:
    """Every message opened by its role, its image and text in order, closed by `end`; `start` once, in front."""
    return (
        f"{start}{{% for message in messages %}}{{% if message['role'] == 'user' %}}{user}{{% else %}}{assistant}"
        "{% endif %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        f"{image}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}{end}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{assistant}{{% endif %}}"
    )


def text_sizes(tokenizer: Any, **changed: Any) -> dict[str, Any]:
    """Config entries of a language model of two layers over this tokenizer; `changed` come on top."""
    return {
        "vocab_size": len(tokenizer), "hidden_size": 40, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 4096,
        "initializer_range": INIT, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    } | changed  # fmt: skip


def tower_sizes(*, image: int = 56, patch: int = 14, **changed: Any) -> dict[str, Any]:
    """Config entries of a vision transformer of two layers; `changed` come on top."""
    return {
        "hidden_size": 24, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": image, "patch_size": patch, "initializer_range": INIT,
    } | changed  # fmt: skip
