"""Families of one square picture, padded: DeepSeek-VL and Janus; beside them LLaVA's kin with other towers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.family_parts import PAPER, chat_template, text_sizes, tower_sizes
from tests.tiny import INIT, _save, byte_level_tokenizer, metaspace_tokenizer

DEEPSEEK_IDS = {
    "bos_token": "<|begin_of_sentence|>", "eos_token": "<|end_of_sentence|>", "pad_token": "<|pad|>",
}  # fmt: skip
DEEPSEEK_TEMPLATE = chat_template(
    start="<|begin_of_sentence|>",
    user="User: ",
    image="<image_placeholder>",
    assistant="\n\nAssistant: ",
    end="<|end_of_sentence|>",
)


def deepseek_vl(folder: Path, *, seed: int = 0) -> Path:
    """DeepSeek-VL: SigLIP over a page padded to a square."""
    from transformers import (
        DeepseekVLConfig,
        DeepseekVLForConditionalGeneration,
        DeepseekVLImageProcessor,
        DeepseekVLProcessor,
    )

    tokenizer = byte_level_tokenizer(
        600, [*DEEPSEEK_IDS.values(), "<image_placeholder>"], **DEEPSEEK_IDS,
        extra_special_tokens={"image_token": "<image_placeholder>"},
    )  # fmt: skip
    config = DeepseekVLConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **tower_sizes()},
        text_config={"model_type": "llama", **text_sizes(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
    )
    processor = DeepseekVLProcessor(
        image_processor=DeepseekVLImageProcessor(size={"height": 56, "width": 56}, **PAPER),
        tokenizer=tokenizer,
        num_image_tokens=16,
        chat_template=DEEPSEEK_TEMPLATE,
    )
    return _save(DeepseekVLForConditionalGeneration, config, processor, folder, seed, True)


def deepseek_vl_hybrid(folder: Path, *, seed: int = 0) -> Path:
    """DeepSeek-VL 7B: the same page to SigLIP and, in finer detail, to SAM's tower; two halves of every token."""
    from transformers import (
        DeepseekVLHybridConfig,
        DeepseekVLHybridForConditionalGeneration,
        DeepseekVLHybridImageProcessor,
        DeepseekVLHybridProcessor,
    )

    tokenizer = byte_level_tokenizer(
        600, [*DEEPSEEK_IDS.values(), "<image_placeholder>"], **DEEPSEEK_IDS,
        extra_special_tokens={"image_token": "<image_placeholder>"},
    )  # fmt: skip
    config = DeepseekVLHybridConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **tower_sizes()},
        high_res_vision_config={
            "model_type": "sam_vision_model", "hidden_size": 24, "output_channels": 12, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 128, "patch_size": 16, "window_size": 4, "mlp_dim": 48,
            "global_attn_indexes": [0, 1], "initializer_range": INIT,
        },
        text_config={"model_type": "llama", **text_sizes(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
    )  # fmt: skip
    fine = {"high_res_image_mean": PAPER["image_mean"], "high_res_image_std": PAPER["image_std"]}
    processor = DeepseekVLHybridProcessor(
        image_processor=DeepseekVLHybridImageProcessor(
            size={"height": 56, "width": 56}, high_res_size={"height": 128, "width": 128}, **PAPER, **fine
        ),
        tokenizer=tokenizer,
        num_image_tokens=16,
        chat_template=DEEPSEEK_TEMPLATE,
    )
    return _save(DeepseekVLHybridForConditionalGeneration, config, processor, folder, seed, True)


def janus(folder: Path, *, seed: int = 0) -> Path:
    """Janus: one tower for reading, a quantiser beside it for drawing, which questions do not touch."""
    from transformers import JanusConfig, JanusForConditionalGeneration, JanusImageProcessor, JanusProcessor

    named = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = byte_level_tokenizer(
        600, [*DEEPSEEK_IDS.values(), *named.values()], **DEEPSEEK_IDS, extra_special_tokens=named
    )
    config = JanusConfig(
        vision_config={
            "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 14,
            "mlp_ratio": 2.0, "projection_dim": 40, "num_image_tokens": 16, "initializer_range": INIT,
        },
        vq_config={
            "embed_dim": 4, "num_embeddings": 16, "latent_channels": 32, "base_channels": 32,
            "channel_multiplier": [1, 1], "num_res_blocks": 1, "projection_dim": 40, "image_token_embed_dim": 40,
        },
        text_config={"model_type": "llama", **text_sizes(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
    )  # fmt: skip
    processor = JanusProcessor(
        image_processor=JanusImageProcessor(size={"height": 56, "width": 56}, **PAPER),
        tokenizer=tokenizer,
        num_image_tokens=16,
        chat_template=DEEPSEEK_TEMPLATE.replace("{{ part['text'] }}", "\n{{ part['text'] }}"),
    )
    return _save(JanusForConditionalGeneration, config, processor, folder, seed, True)


def fast_vlm(folder: Path, *, seed: int = 0) -> Path:
    """FastVLM: timm's FastViT, whose convolutions leave one token to 64 x 64 pixels."""
    from transformers import CLIPImageProcessor, FastVlmConfig, FastVlmForConditionalGeneration, LlavaProcessor

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    tokenizer = byte_level_tokenizer(600, special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    # weights of the usual size would let nothing of the page through depthwise convolutions, and kernels of 7x7 on maps
    # of 8x8 would smear it over all tokens
    local = {"pos_embs": [None] * 5, "down_patch_size": 3}
    shape = {"layers": [1] * 5, "embed_dims": [8, 8, 16, 32, 32], "mlp_ratios": [2] * 5, **local}
    config = FastVlmConfig(
        vision_config={
            "model_type": "timm_wrapper", "architecture": "fastvit_mci3", "num_classes": 0, "label_names": [],
            "do_pooling": True, "initializer_range": 0.4, "hidden_size": 64,
            "model_args": {"inference_mode": True, **shape},
        },
        text_config={"model_type": "qwen2", **text_sizes(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )  # fmt: skip
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 256}, crop_size={"height": 256, "width": 256}, image_mean=[0.0, 0.0, 0.0],
            image_std=[1.0, 1.0, 1.0],
        ),
        tokenizer=tokenizer,
        patch_size=64,
        vision_feature_select_strategy="full",
        chat_template=chat_template(
            user="<|im_start|>user\n", image="<image>\n", assistant="<|im_start|>assistant\n", end="<|im_end|>\n"
        ),
    )  # fmt: skip
    return _save(FastVlmForConditionalGeneration, config, processor, folder, seed, True)


def granite4_vision(folder: Path, *, seed: int = 0) -> Path:
    """Granite Vision 4: LLaVA-NeXT's tiles, windows of patches queried down, added inside several decoder layers."""
    from transformers import (
        Granite4VisionConfig,
        Granite4VisionForConditionalGeneration,
        Granite4VisionProcessor,
        LlavaNextImageProcessor,
    )

    special = ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<image>", "<pad>"]
    tokenizer = byte_level_tokenizer(
        600, special, bos_token="<|end_of_text|>", eos_token="<|end_of_text|>", pad_token="<pad>"
    )
    pinpoints = [[56, 112], [112, 56], [112, 112]]
    config = Granite4VisionConfig(
        vision_config={
            "model_type": "siglip_vision_model", "vision_use_head": False, **tower_sizes(hidden_size=64),
        },
        text_config=text_sizes(
            tokenizer, num_hidden_layers=4, attention_multiplier=0.25, embedding_multiplier=1.0,
            logits_scaling=2.0,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        qformer_config={
            "model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 64,
            "cross_attention_frequency": 1, "max_position_embeddings": 64, "use_qformer_text_input": False,
            "initializer_range": INIT,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        image_grid_pinpoints=pinpoints,
        downsample_rate="2/4",
        deepstack_layer_map=[[-2, 0], [-1, 1]],
        spatial_target_layers=[1, 2, 3, 3],
        projector_dropout=0.0,
    )  # fmt: skip
    processor = Granite4VisionProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"height": 56, "width": 56}, crop_size={"height": 56, "width": 56}, do_center_crop=False,
            image_grid_pinpoints=pinpoints, **PAPER,
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="full",
        downsample_rate="2/4",
        chat_template=chat_template(
            user="<|start_of_role|>user<|end_of_role|>", image="<image>\n",
            assistant="<|start_of_role|>assistant<|end_of_role|>", end="<|end_of_text|>\n",
        ),
    )  # fmt: skip
    return _save(Granite4VisionForConditionalGeneration, config, processor, folder, seed, True)


def lfm2_vl(folder: Path, *, seed: int = 0) -> Path:
    """LFM2-VL: patches of tiles and a thumbnail, padded to one length; convolutions between the attention layers."""
    from transformers import Lfm2VlConfig, Lfm2VlForConditionalGeneration, Lfm2VlImageProcessor, Lfm2VlProcessor

    marks = [f"<|img_row_{row}_col_{column}|>" for row in range(1, 4) for column in range(1, 4)]
    special = ["<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>",
               "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", *marks]  # fmt: skip
    tokenizer = byte_level_tokenizer(
        600, special, bos_token="<|startoftext|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    config = Lfm2VlConfig(
        vision_config={
            "model_type": "siglip2_vision_model", "hidden_size": 24, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "patch_size": 14, "num_patches": 16, "vision_use_head": False,
        },
        text_config={
            "model_type": "lfm2", "layer_types": ["conv", "full_attention"], "conv_L_cache": 3,
            "block_auto_adjust_ff_dim": False, **text_sizes(tokenizer),
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projector_hidden_size=64,
        downsample_factor=2,
    )  # fmt: skip
    processor = Lfm2VlProcessor(
        image_processor=Lfm2VlImageProcessor(
            size={"height": 56, "width": 56}, tile_size=56, encoder_patch_size=14, min_image_tokens=2,
            max_image_tokens=6, max_tiles=4, **PAPER,
        ),
        tokenizer=tokenizer,
        chat_template=chat_template(
            start="<|startoftext|>", user="<|im_start|>user\n", image="<image>", assistant="<|im_start|>assistant\n",
            end="<|im_end|>\n",
        ),
    )  # fmt: skip
    return _save(Lfm2VlForConditionalGeneration, config, processor, folder, seed, True)


def mistral3(folder: Path, *, seed: int = 0) -> Path:
    """Mistral Small 3: Pixtral's tower over a page of any shape, 2x2 patches to a token, a break behind every row."""
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        PixtralImageProcessor,
        PixtralProcessor,
    )

    special = ["<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    tokenizer = metaspace_tokenizer(640, special, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    config = Mistral3Config(
        vision_config={"model_type": "pixtral", **tower_sizes(image=112), "hidden_act": "silu"},
        text_config={"model_type": "mistral", **text_sizes(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
    )
    processor = PixtralProcessor(
        image_processor=PixtralImageProcessor(
            size={"longest_edge": 112}, patch_size={"height": 14, "width": 14}, **PAPER
        ),
        tokenizer=tokenizer,
        patch_size=14,
        spatial_merge_size=2,
        chat_template=MISTRAL_TEMPLATE,
    )
    return _save(Mistral3ForConditionalGeneration, config, processor, folder, seed, True)


MISTRAL_TEMPLATE = chat_template(start="<s>", user="[INST]", image="[IMG]", assistant="").replace(
    "{% endfor %}{% endfor %}",
    "{% endfor %}{% if message['role'] == 'user' %}[/INST]{% else %}</s>{% endif %}{% endfor %}",
)


def lighton_ocr(folder: Path, *, seed: int = 0) -> Path:
    """LightOnOCR: Pixtral's tower before a Qwen 3; rows of tokens follow one another without a break."""
    from transformers import (
        LightOnOcrConfig,
        LightOnOcrForConditionalGeneration,
        LightOnOcrProcessor,
        PixtralImageProcessor,
    )

    named = {"image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>", "image_end_token": "<|vision_end|>"}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values()]
    tokenizer = byte_level_tokenizer(
        600, special, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=named
    )
    config = LightOnOcrConfig(
        vision_config={"model_type": "pixtral", **tower_sizes(image=112), "hidden_act": "silu"},
        text_config={"model_type": "qwen3", **text_sizes(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        spatial_merge_size=2,
    )
    processor = LightOnOcrProcessor(
        image_processor=PixtralImageProcessor(
            size={"longest_edge": 112}, patch_size={"height": 28, "width": 28}, **PAPER
        ),
        tokenizer=tokenizer,
        patch_size=14,
        spatial_merge_size=2,
        chat_template=chat_template(
            user="<|im_start|>user\n", image="<|image_pad|>", assistant="<|im_start|>assistant\n", end="<|im_end|>\n"
        ),
    )
    return _save(LightOnOcrForConditionalGeneration, config, processor, folder, seed, True)


BUILDERS: dict[str, Callable[..., Path]] = {
    "deepseek_vl": deepseek_vl,
    "deepseek_vl_hybrid": deepseek_vl_hybrid,
    "fast_vlm": fast_vlm,
    "granite4_vision": granite4_vision,
    "janus": janus,
    "lfm2_vl": lfm2_vl,
    "lighton_ocr": lighton_ocr,
    "mistral3": mistral3,
}
