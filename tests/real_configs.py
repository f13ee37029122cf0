"""Configs of published checkpoints, with their published numbers, and batches of the shapes that their processors give.

For checks on the meta device: no weights, no processors, no network. Sizes are from the checkpoints' config.json files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from evlecg.models.load import Checkpoint
from evlecg.schema import Batch, Side


def pulse_7b() -> Any:
    """PULSE-7B as transformers would hold it: LLaVA-1.6, Vicuna-7B and CLIP-L/336 with tiles (anyres)."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig

    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
            patch_size=14, projection_dim=768, vocab_size=32000,
        ),
        text_config=LlamaConfig(
            vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=32, max_position_embeddings=4096, tie_word_embeddings=False,
        ),
        image_token_index=32000,
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )  # fmt: skip


def fastvlm_1_5b() -> Any:
    """apple/FastVLM-1.5B: FastViTHD at 1024 px (256 visual tokens, through timm) and Qwen2-1.5B."""
    from transformers import FastVlmConfig

    return FastVlmConfig(
        text_config={
            "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
            "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
            "max_position_embeddings": 32768, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
        image_token_index=151646,
        image_seq_length=256,
        tie_word_embeddings=True,
    )  # fmt: skip


def qwen2_vl_2b() -> Any:
    """Qwen/Qwen2-VL-2B-Instruct."""
    from transformers import Qwen2VLConfig

    return Qwen2VLConfig(
        vision_config={
            "depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        text_config={
            "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
            "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
        },
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        tie_word_embeddings=True,
    )  # fmt: skip


def smolvlm(size: str = "256M") -> Any:
    """HuggingFaceTB/SmolVLM-256M-Instruct and -500M-Instruct: SigLIP-B/16 at 512 px, SmolLM2, 64 tokens a tile."""
    from transformers import Idefics3Config, LlamaConfig

    width, inner, layers, heads, kv_heads = {"256M": (576, 1536, 30, 9, 3), "500M": (960, 2560, 32, 15, 5)}[size]
    return Idefics3Config(
        vision_config={
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "image_size": 512, "patch_size": 16,
        },
        text_config=LlamaConfig(
            vocab_size=49280, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=8192,
            tie_word_embeddings=False, pad_token_id=2,
        ),
        scale_factor=4,
        image_token_id=49190,
        pad_token_id=2,
        tie_word_embeddings=False,
    )  # fmt: skip


def llava_100m() -> Any:
    """No published model: LLaVA of 108M parameters, for peaks that can be measured on any machine."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8, image_size=224,
            patch_size=14, projection_dim=512,
        ),
        text_config=LlamaConfig(
            vocab_size=32064, hidden_size=640, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=10,
            num_key_value_heads=10, max_position_embeddings=4096, tie_word_embeddings=False,
        ),
        image_token_id=32000,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )  # fmt: skip


def idefics3_100m() -> Any:
    """No published model: Idefics3 of 92M parameters, for peaks that can be measured on any machine."""
    from transformers import Idefics3Config, LlamaConfig

    return Idefics3Config(
        vision_config={
            "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 6,
            "image_size": 256, "patch_size": 16,
        },
        text_config=LlamaConfig(
            vocab_size=49280, hidden_size=576, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=9,
            num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=False, pad_token_id=2,
        ),
        scale_factor=2,
        image_token_id=49190,
        pad_token_id=2,
        tie_word_embeddings=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A checkpoint without files: its config, and the shapes of one page.

    Attributes:
        n_visual: visual tokens of a page.
        pixels: rows -> keyword arguments that hold images.
    """

    name: str
    config: Any
    n_visual: int
    pixels: Any

    @property
    def checkpoint(self) -> Checkpoint:
        config, text = self.config, self.config.get_text_config()
        return Checkpoint(
            name=self.name, source=self.name, model_type=config.model_type, config=config, trained=True,
            image_token_id=int(config.image_token_id), width=int(text.hidden_size), vocab_size=int(text.vocab_size),
        )  # fmt: skip

    def side(self, rows: int, *, n_text: int, n_answer: int = 4) -> Side:
        """Half a batch: a page, a text and an answer a row."""
        length = self.n_visual + n_text
        ids_BS = torch.full((rows, length), 5)
        ids_BS[:, : self.n_visual] = self.config.image_token_id
        mask_BS = torch.ones_like(ids_BS)
        inputs = {"input_ids": ids_BS, "attention_mask": mask_BS, **self.pixels(rows)}
        if self.config.model_type == "qwen2_vl":
            inputs["mm_token_type_ids"] = (ids_BS == self.config.image_token_id).long()
        block_BS, end_BS = torch.zeros_like(ids_BS), torch.zeros_like(ids_BS)
        block_BS[:, self.n_visual :] = 1
        end_BS[:, -n_answer:] = torch.arange(1, n_answer + 1)
        answer_A2 = torch.cartesian_prod(torch.arange(rows), torch.arange(length - n_answer, length))
        across = torch.linspace(0, 1, self.n_visual + 1)
        box_N4 = torch.stack([across[:-1], torch.zeros(self.n_visual), across[1:], torch.ones(self.n_visual)], -1)
        cells_C4 = torch.rand(144, 4, generator=torch.Generator().manual_seed(0)).sort(-1).values
        return Side(
            inputs=inputs, valid_BS=mask_BS.bool(), block_BS=block_BS, byte_end_BS=end_BS, answer_A2=answer_A2,
            answer_ids_A=ids_BS[answer_A2[:, 0], answer_A2[:, 1]], visual_BS=ids_BS == self.config.image_token_id,
            visual_box_BN4=box_N4.expand(rows, -1, -1).clone(),
            visual_mask_BN=torch.ones(rows, self.n_visual, dtype=torch.bool),
            cell_box_BC4=cells_C4.expand(rows, -1, -1).clone(),
        )  # fmt: skip


def batch(student: Kind, teacher: Kind | None, rows: int, *, n_text: int) -> Batch:
    """A batch of the two models' shapes."""
    return Batch(
        sample_ids=tuple(map(str, range(rows))),
        record_B=torch.arange(rows),
        student=student.side(rows, n_text=n_text),
        teacher=teacher.side(rows, n_text=n_text) if teacher is not None else None,
        cell_lead_C=torch.arange(144) % 12,
        cell_time_C2=torch.rand(144, 2),
    )


def _square(pixels: int, **more: Any) -> Any:
    return lambda rows: {"pixel_values": torch.rand(rows, 3, pixels, pixels), **more}


def _tiles(tiles: int, pixels: int) -> Any:
    return lambda rows: {
        "pixel_values": torch.rand(rows, tiles, 3, pixels, pixels),
        "pixel_attention_mask": torch.ones(rows, tiles, pixels, pixels, dtype=torch.bool),
    }


def _anyres(rows: int) -> dict[str, Any]:
    """A page of 2200x1700 px: the whole at 336 px and 2x2 tiles."""
    return {"pixel_values": torch.rand(rows, 5, 3, 336, 336), "image_sizes": torch.tensor([[1700, 2200]] * rows)}


def _patches(rows: int, down: int = 60, across: int = 78) -> dict[str, Any]:
    """A page of 1092x840 px in patches of 14 px."""
    return {
        "pixel_values": torch.rand(rows * down * across, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, down, across]] * rows),
    }


def kinds() -> dict[str, Kind]:
    """Every model of this file by name."""
    return {
        kind.name: kind
        for kind in (
            Kind("PULSE-7B", pulse_7b(), 576 + 38 * 48 + 38, _anyres),
            Kind("FastVLM-1.5B", fastvlm_1_5b(), 256, _square(1024)),
            Kind("Qwen2-VL-2B", qwen2_vl_2b(), 60 * 78 // 4, _patches),
            Kind("SmolVLM-256M", smolvlm("256M"), 17 * 64, _tiles(17, 512)),
            Kind("SmolVLM-500M", smolvlm("500M"), 17 * 64, _tiles(17, 512)),
            Kind("llava-100M", llava_100m(), 256, _square(224)),
            Kind("idefics3-100M", idefics3_100m(), 64, _tiles(1, 256)),
        )
    }
