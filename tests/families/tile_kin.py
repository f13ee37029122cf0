"""Families that cut a page into square tiles beside a thumbnail, as GOT-OCR 2, InternVL and Ovis do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.family_parts import PAPER, chat_template, text_sizes, tower_sizes
from tests.tiny import INIT, _save, byte_level_tokenizer

COHERE_IDS = {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "pad_token": "<PAD>"}
COHERE_TEMPLATE = chat_template(
    start="<BOS_TOKEN>",
    user="<|START_OF_TURN_TOKEN|><|USER_TOKEN|>",
    image="<image>",
    assistant="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    end="<|END_OF_TURN_TOKEN|>",
)
COHERE_TOKENS = ["<PAD>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
                 "<|CHATBOT_TOKEN|>", "<image>"]  # fmt: skip
IM_TEMPLATE = chat_template(
    user="<|im_start|>user\n", image="<image>", assistant="<|im_start|>assistant\n", end="<|im_end|>\n"
)
IM_IDS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
IM_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def aya_vision(folder: Path, *, seed: int = 0) -> Path:
    """Aya Vision: SigLIP over tiles, 2x2 patches to a token, tile names between the tiles, the whole page last."""
    from transformers import (
        AyaVisionConfig,
        AyaVisionForConditionalGeneration,
        AyaVisionProcessor,
        GotOcr2ImageProcessor,
    )

    special = [*COHERE_TOKENS, "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>",
               "TILE", "TILE_GLOBAL"]  # fmt: skip
    tokenizer = byte_level_tokenizer(600, special, **COHERE_IDS)
    config = AyaVisionConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **tower_sizes()},
        text_config={"model_type": "cohere2", "sliding_window": 64, **text_sizes(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
        downsample_factor=2,
    )
    processor = AyaVisionProcessor(
        image_processor=GotOcr2ImageProcessor(
            size={"height": 56, "width": 56}, crop_to_patches=True, max_patches=4, **PAPER
        ),
        tokenizer=tokenizer,
        patch_size=14,
        img_size=56,
        downsample_factor=2,
        chat_template=COHERE_TEMPLATE,
    )
    return _save(AyaVisionForConditionalGeneration, config, processor, folder, seed, True)


def cohere2_vision(folder: Path, *, seed: int = 0) -> Path:
    """Command A Vision: SigLIP over tiles, 2x2 patches to a token, a line-break token behind every tile."""
    from transformers import (
        Cohere2VisionConfig,
        Cohere2VisionForConditionalGeneration,
        Cohere2VisionImageProcessor,
        Cohere2VisionProcessor,
    )

    named = {"boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>", "image_token": "<|IMG_PATCH|>",
             "img_line_break_token": "<|IMG_LINE_BREAK|>"}  # fmt: skip
    tokenizer = byte_level_tokenizer(600, [*COHERE_TOKENS, *named.values()], **COHERE_IDS, extra_special_tokens=named)
    config = Cohere2VisionConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **tower_sizes()},
        text_config={"model_type": "cohere2", "sliding_window": 64, **text_sizes(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
        downsample_factor=2,
        alignment_intermediate_size=64,
    )
    processor = Cohere2VisionProcessor(
        image_processor=Cohere2VisionImageProcessor(
            size={"height": 56, "width": 56}, patch_size=2, crop_to_patches=True, max_patches=4, **PAPER
        ),
        tokenizer=tokenizer,
        chat_template=COHERE_TEMPLATE.replace("<image>", "<|IMG_PATCH|>"),
    )
    return _save(Cohere2VisionForConditionalGeneration, config, processor, folder, seed, True)


def got_ocr2(folder: Path, *, seed: int = 0) -> Path:
    """GOT-OCR 2: SAM's tower, its map brought to a quarter of its side by two strided convolutions."""
    from transformers import (
        GotOcr2Config,
        GotOcr2ForConditionalGeneration,
        GotOcr2ImageProcessor,
        GotOcr2Processor,
    )

    tokenizer = byte_level_tokenizer(600, [*IM_TOKENS, "<img>", "</img>", "<imgpad>"], **IM_IDS)
    config = GotOcr2Config(
        vision_config=_sam_tower(256),
        text_config={"model_type": "qwen2", **text_sizes(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<imgpad>"),
        image_seq_length=16,
    )
    # the number of tokens an image (256) is a default of the published processor's call, not of its config: a page of
    # 1024 px with patches of 16 px, four patches to a token
    processor = GotOcr2Processor(
        image_processor=GotOcr2ImageProcessor(size={"height": 256, "width": 256}, **PAPER),
        tokenizer=tokenizer,
        chat_template=IM_TEMPLATE.replace("<image>", "<img><imgpad></img>\n"),
    )
    return _save(GotOcr2ForConditionalGeneration, config, processor, folder, seed, True)


def pp_chart2table(folder: Path, *, seed: int = 0) -> Path:
    """PP-Chart2Table: GOT-OCR 2's model behind a processor that leaves the placeholders to the prompt."""
    from transformers import (
        GotOcr2ForConditionalGeneration,
        PPChart2TableConfig,
        PPChart2TableImageProcessor,
        PPChart2TableProcessor,
    )

    tokenizer = byte_level_tokenizer(600, [*IM_TOKENS, "<img>", "</img>", "<imgpad>"], **IM_IDS)
    config = PPChart2TableConfig(
        vision_config=_sam_tower(64),
        text_config={"model_type": "qwen2", **text_sizes(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<imgpad>"),
        image_seq_length=16,
    )
    processor = PPChart2TableProcessor(
        image_processor=PPChart2TableImageProcessor(size={"height": 64, "width": 64}, **PAPER),
        tokenizer=tokenizer,
        chat_template=IM_TEMPLATE.replace("<image>", "<img>" + "<imgpad>" * 16 + "</img>\n"),
    )
    return _save(GotOcr2ForConditionalGeneration, config, processor, folder, seed, True)


def _sam_tower(image: int) -> dict:
    """SAM's tower in windows only: global attention over so many patches is slow."""
    return {
        "hidden_size": 24, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": image,
        "patch_size": 4, "initializer_range": INIT, "window_size": 4, "global_attn_indexes": [], "mlp_dim": 48,
    }  # fmt: skip


def qianfan_ocr(folder: Path, *, seed: int = 0) -> Path:
    """Qianfan-OCR: InternVL's tower and pixel shuffle over tiles, the whole page last, before a Qwen 3."""
    from transformers import (
        GotOcr2ImageProcessor,
        QianfanOCRConfig,
        QianfanOCRForConditionalGeneration,
        QianfanOCRProcessor,
    )

    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = byte_level_tokenizer(600, [*IM_TOKENS, *named.values()], **IM_IDS, extra_special_tokens=named)
    config = QianfanOCRConfig(
        vision_config={**tower_sizes(), "drop_path_rate": 0.0},
        text_config={"model_type": "qwen3", **text_sizes(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    processor = QianfanOCRProcessor(
        image_processor=GotOcr2ImageProcessor(
            size={"height": 56, "width": 56}, crop_to_patches=True, max_patches=4, **PAPER
        ),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=IM_TEMPLATE.replace("<image>", "<image>\n"),
    )
    return _save(QianfanOCRForConditionalGeneration, config, processor, folder, seed, True)


def ovis2(folder: Path, *, seed: int = 0) -> Path:
    """Ovis 2: tokens are distributions over a visual vocabulary; the whole page first, then marked rows and columns."""
    from transformers import Ovis2Config, Ovis2ForConditionalGeneration, Ovis2ImageProcessor, Ovis2Processor

    marks = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    tokenizer = byte_level_tokenizer(600, [*IM_TOKENS, "<image>", "<IMG_ATOM>", *marks], **IM_IDS)
    config = Ovis2Config(
        vision_config={**tower_sizes(), "vocab_size": 96, "hidden_stride": 2},
        text_config={"model_type": "qwen2", **text_sizes(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=tokenizer.convert_tokens_to_ids(marks),
        vocab_size=len(tokenizer),
        hidden_size=40,
    )
    processor = Ovis2Processor(
        image_processor=Ovis2ImageProcessor(
            size={"height": 56, "width": 56}, crop_to_patches=True, max_patches=4, **PAPER
        ),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=IM_TEMPLATE.replace("<image>", "<image>\n"),
    )
    return _save(Ovis2ForConditionalGeneration, config, processor, folder, seed, True)


def perception_lm(folder: Path, *, seed: int = 0) -> Path:
    """Perception LM: timm's Perception Encoder over a thumbnail and tiles, 2x2 patches pooled to a token."""
    from transformers import (
        PerceptionLMConfig,
        PerceptionLMForConditionalGeneration,
        PerceptionLMImageProcessor,
        PerceptionLMProcessor,
    )

    named = {"image_token": "<|image|>", "video_token": "<|video|>"}
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    tokenizer = byte_level_tokenizer(
        600, [*special, *named.values()], bos_token="<|begin_of_text|>", eos_token="<|eot_id|>",
        pad_token="<|end_of_text|>", extra_special_tokens=named,
    )  # fmt: skip
    tower = {"img_size": [56, 56], "embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 14, "mlp_ratio": 2.0}
    config = PerceptionLMConfig(
        vision_config={
            "model_type": "timm_wrapper", "architecture": "vit_pe_core_large_patch14_336", "num_classes": 0,
            "label_names": [], "do_pooling": False, "initializer_range": INIT,
            "model_args": {**tower, "global_pool": "", "use_post_transformer_norm": False, "init_values": 0.1,
                           "ref_feat_shape": [4, 4]},
        },
        text_config={"model_type": "llama", **text_sizes(tokenizer)},
        vision_use_cls_token=True,
        projector_pooling_ratio=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        tie_word_embeddings=True,
    )  # fmt: skip
    config.vision_config.embed_dim = 32
    from transformers import PerceptionLMVideoProcessor

    processor = PerceptionLMProcessor(
        image_processor=PerceptionLMImageProcessor(
            tile_size=56, max_num_tiles=4, size={"height": 56, "width": 56}, **PAPER
        ),
        video_processor=PerceptionLMVideoProcessor(size={"height": 56, "width": 56}),
        tokenizer=tokenizer,
        patch_size=14,
        pooling_ratio=2,
        chat_template=chat_template(
            start="<|begin_of_text|>",
            user="<|start_header_id|>user<|end_header_id|>\n\n",
            image="<|image|>",
            assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
            end="<|eot_id|>",
        ),
    )
    return _save(PerceptionLMForConditionalGeneration, config, processor, folder, seed, True)


BUILDERS: dict[str, Callable[..., Path]] = {
    "aya_vision": aya_vision,
    "cohere2_vision": cohere2_vision,
    "got_ocr2": got_ocr2,
    "pp_chart2table": pp_chart2table,
    "qianfan_ocr": qianfan_ocr,
    "ovis2": ovis2,
    "perception_lm": perception_lm,
}
