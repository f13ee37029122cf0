"""Tiny vision-language models that disagree on everything: tokenizer, visual token count, width, family.

Each builder writes a whole checkpoint (config, seeded weights, processor, tokenizer, chat template) that the ordinary
`from_pretrained` calls load, so that tests and the built-in models run offline through the real loading code.

    python -m tests.tiny FAMILY FOLDER [--size tiny|builtin] [--no-weights]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Does this ECG show a normal tracing? yes no",
    "Does this ECG show myocardial infarction, an ST or T wave change, a conduction disturbance or hypertrophy?",
    "Does this ECG show atrial fibrillation, atrial flutter, sinus bradycardia or sinus tachycardia?",
    "Does this ECG show left bundle branch block, right bundle branch block, first degree AV block?",
    "Does this ECG show premature ventricular or atrial contractions, ST depression, ST elevation?",
    "Please write a clinical report based on this ECG image. From the provided options, select all that apply.",
    "Question: Which rhythm is seen in lead II? Answer: sinus rhythm. User: Assistant: USER: ASSISTANT:",
    "The heart rate is 75 beats per minute; the QRS complex lasts 92 ms, the axis is normal, 0 1 2 3 4 5 6 7 8 9 mV.",
]


def byte_level_tokenizer(vocab_size: int, special: list[str], **named: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE in the manner of GPT-2 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right", **named)


def metaspace_tokenizer(vocab_size: int, special: list[str], **named: str) -> PreTrainedTokenizerFast:
    """SentencePiece-like BPE with metaspace and byte fallback, in the manner of Llama."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<unk>", *special, *fallback], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", padding_side="right", **named)


# What made models this small learn at all: a page is white but for some ink, so paper must come out near zero (with
# CLIP's means every patch is one large constant), and weights of std 0.02 are too small for widths of 64.
PAPER_MEAN, INK_STD = [0.97, 0.97, 0.97], [0.15, 0.15, 0.15]
INIT = 0.1

LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% else %} ASSISTANT: {{ message['content'][0]['text'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %} {{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def llava(folder: Path, *, size: str = "tiny", seed: int = 0, weights: bool = True) -> Path:
    """LLaVA 1.5: CLIP tower, square crop, Llama; 16 visual tokens when tiny, 144 when builtin."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    big = size == "builtin"
    width, depth, image, patch = (128, 4, 168, 14) if big else (32, 2, 56, 14)
    special = ["<s>", "</s>", "<pad>", "<image>"]
    tokenizer = metaspace_tokenizer(640, special, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth, num_attention_heads=4,
            image_size=image, patch_size=patch, projection_dim=width, initializer_range=INIT,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=depth - 1,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, initializer_range=INIT,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )  # fmt: skip
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": image},
            crop_size={"height": image, "width": image},
            do_center_crop=True,
            image_mean=PAPER_MEAN,
            image_std=INK_STD,
        ),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    return _save(LlavaForConditionalGeneration, config, processor, folder, seed, weights)


def idefics3(folder: Path, *, size: str = "tiny", seed: int = 0, weights: bool = True, tiles: bool = False) -> Path:
    """Idefics3 and SmolVLM: SigLIP-like tower, pixel shuffle; 4 visual tokens a tile when tiny, 36 when builtin."""
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
        LlamaConfig,
    )

    big = size == "builtin"
    width, depth, image, patch = (64, 3, 168, 14) if big else (24, 2, 56, 14)
    tags = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    special = [
        "<|im_start|>", "<|endoftext|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>",
        *tags,
    ]  # fmt: skip
    tokenizer = byte_level_tokenizer(
        560, special, bos_token="<|im_start|>", eos_token="<end_of_utterance>", pad_token="<|endoftext|>"
    )
    # Idefics3Processor reads the token strings off the tokenizer and may add tokens, so it comes before the config
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessor(
            size={"longest_edge": 2 * image if tiles else image},
            max_image_size={"longest_edge": image},
            do_image_splitting=tiles,
            image_mean=PAPER_MEAN,
            image_std=INK_STD,
        ),
        tokenizer=tokenizer,
        image_seq_len=(image // patch // 2) ** 2,
        chat_template=IDEFICS_TEMPLATE,
    )
    config = Idefics3Config(
        vision_config={
            "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth, "num_attention_heads": 4,
            "image_size": image, "patch_size": patch, "initializer_range": INIT,
        },
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=depth - 1,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, initializer_range=INIT,
        ),
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )  # fmt: skip
    return _save(Idefics3ForConditionalGeneration, config, processor, folder, seed, weights)


def qwen2_vl(folder: Path, *, size: str = "tiny", seed: int = 0, weights: bool = True) -> Path:
    """Qwen2-VL: any page shape, 2x2 merged patches, three-part rotary positions; 64 visual tokens when builtin."""
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
    )

    big = size == "builtin"
    width, tower, depth, heads = (128, 128, 3, 4) if big else (40, 32, 2, 2)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
               "<|video_pad|>"]  # fmt: skip
    tokenizer = byte_level_tokenizer(600, special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        vision_config={
            "depth": depth + big, "embed_dim": tower, "hidden_size": width, "num_heads": 4, "patch_size": 14,
            "mlp_ratio": 4 if big else 2, "spatial_merge_size": 2, "temporal_patch_size": 2,
            **({"initializer_range": INIT} if big else {}),
        },
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 3 * width if big else 96,
            "num_hidden_layers": depth, "num_attention_heads": heads, "num_key_value_heads": heads,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6] if big else [2, 4, 4],
            },
            **({"initializer_range": INIT, "tie_word_embeddings": True} if big else {}),
            "bos_token_id": ids("<|im_start|>"), "eos_token_id": ids("<|im_end|>"),
            "pad_token_id": ids("<|endoftext|>"),
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        **({"tie_word_embeddings": True} if big else {}),
    )  # fmt: skip
    from transformers import Qwen2VLVideoProcessor

    limits = (
        {"min_pixels": 224 * 224, "max_pixels": 224 * 224} if big else {"min_pixels": 56 * 56, "max_pixels": 112 * 112}
    )
    paper = {"image_mean": PAPER_MEAN, "image_std": INK_STD} if big else {}
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**limits, **paper),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**limits),
        chat_template=QWEN_TEMPLATE,
    )
    return _save(Qwen2VLForConditionalGeneration, config, processor, folder, seed, weights)


FAMILIES: dict[str, Callable[..., Path]] = {"llava": llava, "idefics3": idefics3, "qwen2_vl": qwen2_vl}


def _save(kind: type, config: object, processor: object, folder: Path, seed: int, weights: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if weights:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            kind(config).save_pretrained(folder)
    else:
        config.architectures = [kind.__name__]
        config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=("tiny", "builtin"), default="tiny")
    parser.add_argument("--no-weights", action="store_true")
    arguments = parser.parse_args()
    FAMILIES[arguments.family](arguments.folder, size=arguments.size, weights=not arguments.no_weights)


if __name__ == "__main__":
    main()
