"""Gemma's kin: SigLIP towers with pooled tokens, prefix or two-way attention over images, capped logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

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
    tokenizer = metaspace_tokenizer(
        size, [*MARKS, *extra.values()], bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        extra_special_tokens=extra,
    )  # fmt: skip
    # Gemma's tokenizer puts no space before the first word, so that an answer reads the same alone and in its place
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    return tokenizer


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


def _gemma3(config_kind: Any, model: Any, folder: Path, seed: int) -> Path:
    import torch
    from transformers import Gemma3ImageProcessor, Gemma3Processor, Gemma3TextConfig

    tokenizer = _tokenizer(GEMMA3)
    ids = tokenizer.convert_tokens_to_ids
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": 112, "width": 112}, **PIXELS),
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

    return _gemma3(Gemma3Config, Gemma3ForConditionalGeneration, folder, seed)


GEMMA3N = {
    "image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
    "audio_token": "<audio_soft_token>", "boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>",
}  # fmt: skip


def gemma3n(folder: Path, *, seed: int = 0) -> Path:
    """Gemma 3n: MobileNet tower, inputs of their own for every layer, placeholders above the text's vocabulary."""
    from transformers import (
        Gemma3nAudioConfig,
        Gemma3nAudioFeatureExtractor,
        Gemma3nConfig,
        Gemma3nForConditionalGeneration,
        Gemma3nProcessor,
        Gemma3nTextConfig,
        Gemma3nVisionConfig,
        SiglipImageProcessor,
    )

    tokenizer = metaspace_tokenizer(600, MARKS, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    n_text = len(tokenizer)
    images = ["<end_of_image>", "<image_soft_token>"]
    audio = ["<end_of_audio>", "<audio_soft_token>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_image>", "<start_of_audio>"]})
    n_text = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [*images, *audio]}, replace_extra_special_tokens=False)
    tokenizer._set_model_specific_special_tokens(GEMMA3N)
    ids = tokenizer.convert_tokens_to_ids
    processor = Gemma3nProcessor(
        feature_extractor=Gemma3nAudioFeatureExtractor(),
        image_processor=SiglipImageProcessor(size={"height": 192, "width": 192}, **PIXELS),
        tokenizer=tokenizer,
        image_seq_length=16,
        audio_seq_length=4,
        chat_template=TEMPLATE.replace("IMAGE", "<image_soft_token>"),
    )
    config = Gemma3nConfig(
        text_config=Gemma3nTextConfig(
            **text_sizes(tokenizer, 32), head_dim=8, vocab_size_per_layer_input=n_text, hidden_size_per_layer_input=8,
            num_kv_shared_layers=0, laurel_rank=4, layer_types=["sliding_attention", "full_attention"],
            activation_sparsity_pattern=[0.0, 0.0], altup_num_inputs=2,
        ),
        vision_config=Gemma3nVisionConfig(
            architecture="mobilenetv5_300m_enc", hidden_size=2048, vocab_size=2, vocab_offset=n_text,
            model_args={"channel_multiplier": 0.05, "stem_size": 8, "msfa_output_resolution": 4},
        ),
        audio_config=Gemma3nAudioConfig(
            hidden_size=16, vocab_size=2, vocab_offset=n_text + 2, conf_num_attention_heads=2,
            conf_num_hidden_layers=1, sscp_conv_channel_size=(8, 4), input_feat_size=32,
        ),
        audio_soft_tokens_per_image=4,
        vision_soft_tokens_per_image=16,
        image_token_id=ids("<image_soft_token>"),
        audio_token_id=ids("<audio_soft_token>"),
        boi_token_id=ids("<start_of_image>"),
        eoi_token_id=ids("<end_of_image>"),
        boa_token_id=ids("<start_of_audio>"),
        eoa_token_id=ids("<end_of_audio>"),
    )  # fmt: skip
    return _save(Gemma3nForConditionalGeneration, config, processor, folder, seed, True)


GEMMA4 = {
    "image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>",
    "audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>",
}  # fmt: skip


def _gemma4(kind: str, folder: Path, seed: int, vision: dict[str, Any]) -> Path:
    import transformers

    tokenizer = _tokenizer(GEMMA4)

    def part(name: str) -> Any:
        return getattr(transformers, f"{kind}{name}")

    processor = part("Processor")(
        feature_extractor=part("AudioFeatureExtractor")(),
        image_processor=part("ImageProcessor")(patch_size=8, max_soft_tokens=70, pooling_kernel_size=2),
        tokenizer=tokenizer,
        video_processor=part("VideoProcessor")(patch_size=8, max_soft_tokens=70, pooling_kernel_size=2),
        image_seq_length=70,
        chat_template=TEMPLATE.replace("IMAGE", "<|image|>"),
    )
    ids = tokenizer.convert_tokens_to_ids
    further = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": len(tokenizer)}
    config = part("Config")(
        text_config=part("TextConfig")(
            **text_sizes(tokenizer, 32), head_dim=8, global_head_dim=16, sliding_window=64,
            layer_types=["sliding_attention", "full_attention"], use_bidirectional_attention="vision",
            final_logit_softcapping=30.0, **(further if kind == "Gemma4" else {}),
        ),
        vision_config=part("VisionConfig")(patch_size=8, pooling_kernel_size=2, initializer_range=INIT, **vision),
        audio_config=None,
        image_token_id=ids("<|image|>"),
        video_token_id=ids("<|video|>"),
        audio_token_id=ids("<|audio|>"),
        boi_token_id=ids("<|image>"),
        eoi_token_id=ids("<image|>"),
        boa_token_id=ids("<|audio>"),
        eoa_token_index=ids("<audio|>"),
    )  # fmt: skip
    return _save(part("ForConditionalGeneration"), config, processor, folder, seed, True)


def gemma4(folder: Path, *, seed: int = 0) -> Path:
    """Gemma 4: pages of any shape, patches pooled by their place, padding at the end."""
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 8, "position_embedding_size": 64,
    }  # fmt: skip
    return _gemma4("Gemma4", folder, seed, sizes)


def gemma4_unified(folder: Path, *, seed: int = 0) -> Path:
    """Gemma 4 without a tower: merged patches go straight into the language model."""
    return _gemma4("Gemma4Unified", folder, seed, {"mm_embed_dim": 32, "mm_posemb_size": 64, "output_proj_dims": 32})


BUILDERS = {
    "gemma3": gemma3,
    "gemma3n": gemma3n,
    "gemma4": gemma4,
    "gemma4_unified": gemma4_unified,
    "paligemma": paligemma,
}
