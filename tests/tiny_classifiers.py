"""Tiny classifiers of pages and of signals, written as whole checkpoints that `from_pretrained` loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    HubertConfig,
    HubertForSequenceClassification,
    PatchTSMixerConfig,
    PatchTSMixerForTimeSeriesClassification,
    PatchTSTConfig,
    PatchTSTForClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
)

SUPER = ("NORM", "MI", "STTC", "CD", "HYP")
PAPER = {"image_mean": [0.97] * 3, "image_std": [0.15] * 3}  # a page is white but for some ink
AUDIO = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "conv_dim": [16] * 3,
    "conv_kernel": [10, 3, 3], "conv_stride": [5, 2, 2], "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 12, "layerdrop": 0.0,
}  # fmt: skip


def _named(labels: tuple[str, ...], problem: str = "multi_label_classification") -> dict:
    named = {"id2label": dict(enumerate(labels)), "label2id": {label: row for row, label in enumerate(labels)}}
    return named | {"problem_type": problem}


def vit(labels: tuple[str, ...] = SUPER, **more: object) -> tuple:
    """16 patches and a class token."""
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=56, patch_size=14,
        initializer_range=0.1, **_named(labels), **more,
    )  # fmt: skip
    return ViTForImageClassification(config), ViTImageProcessor(size={"height": 56, "width": 56}, **PAPER)


def swin(labels: tuple[str, ...] = SUPER) -> tuple:
    """196 patches of width 12 that become 49 of width 24."""
    config = SwinConfig(
        embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=7, image_size=56, patch_size=4,
        initializer_range=0.1, **_named(labels),
    )  # fmt: skip
    return SwinForImageClassification(config), ViTImageProcessor(size={"height": 56, "width": 56}, **PAPER)


def convnext(labels: tuple[str, ...] = SUPER) -> tuple:
    """Feature maps [B, C, h, w] of 14x14, then 7x7; its image processor resizes to 64 and crops 56 of them."""
    config = ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, initializer_range=0.1, layer_scale_init_value=1.0,
        **_named(labels),
    )  # fmt: skip
    return ConvNextForImageClassification(config), ConvNextImageProcessor(
        size={"shortest_edge": 56}, crop_pct=0.875, **PAPER
    )


def resnet(labels: tuple[str, ...] = SUPER) -> tuple:
    """Feature maps of 14x14, then 7x7, with batch normalisation."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **_named(labels))
    return ResNetForImageClassification(config), ViTImageProcessor(size={"height": 56, "width": 56}, **PAPER)


def wav2vec2(labels: tuple[str, ...] = SUPER) -> tuple:
    """Mono samples at 100 Hz as its feature extractor says; a token sees 40 of them and the next begins 20 later."""
    config = Wav2Vec2Config(**AUDIO, initializer_range=0.1, **_named(labels))
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=100, do_normalize=True)
    return Wav2Vec2ForSequenceClassification(config), extractor


def hubert(labels: tuple[str, ...] = SUPER) -> tuple:
    """As Wav2Vec2, without normalisation of its own."""
    config = HubertConfig(**AUDIO, initializer_range=0.1, **_named(labels))
    return HubertForSequenceClassification(config), Wav2Vec2FeatureExtractor(sampling_rate=100, do_normalize=False)


def patchtst(labels: tuple[str, ...] = SUPER, channels: int = 12) -> tuple:
    """500 samples of each of 12 channels: 10 patches a channel; its head reads all channels' means."""
    config = PatchTSTConfig(
        num_input_channels=channels, context_length=500, patch_length=50, patch_stride=50, d_model=16,
        num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, num_targets=len(labels), **_named(labels),
    )  # fmt: skip
    return PatchTSTForClassification(config), None


def patchtsmixer(labels: tuple[str, ...] = SUPER) -> tuple:
    """The same patches, mixed by perceptrons."""
    config = PatchTSMixerConfig(
        num_input_channels=12, context_length=500, patch_length=50, patch_stride=50, d_model=16, num_layers=2,
        num_targets=len(labels), mode="mix_channel", **_named(labels),
    )  # fmt: skip
    return PatchTSMixerForTimeSeriesClassification(config), None


def signal_student(labels: tuple[str, ...] = SUPER) -> tuple:
    """What builtin:student-signal is: 10 s at 100 Hz, 39 patches a channel, 0.11M parameters."""
    config = PatchTSMixerConfig(
        num_input_channels=12, context_length=1000, patch_length=50, patch_stride=25, d_model=64, num_layers=3,
        num_targets=len(labels), mode="mix_channel", **_named(labels),
    )  # fmt: skip
    return PatchTSMixerForTimeSeriesClassification(config), None


PAGES: dict[str, Callable[..., tuple]] = {"vit": vit, "swin": swin, "convnext": convnext, "resnet": resnet}
SIGNALS: dict[str, Callable[..., tuple]] = {
    "wav2vec2": wav2vec2, "hubert": hubert, "patchtst": patchtst, "patchtsmixer": patchtsmixer,
}  # fmt: skip
FAMILIES = PAGES | SIGNALS

# An encoder in HuBERT-ECG's form: Python files of its own beside the weights, AutoModel only, no feature extractor.
REMOTE_CODE = """
from transformers import HubertConfig, HubertModel


class HuBERTECGConfig(HubertConfig):
    model_type = "hubert_ecg"

    def __init__(self, ensemble_length: int = 1, vocab_sizes=(100,), **kwargs):
        super().__init__(**kwargs)
        self.ensemble_length = ensemble_length
        self.vocab_sizes = list(vocab_sizes)


class HuBERTECG(HubertModel):
    config_class = HuBERTECGConfig
"""


def write(folder: Path, name: str, *, seed: int = 0, **arguments: object) -> Path:
    """A checkpoint of a family: config, seeded weights, image processor or feature extractor where it has one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, processor = FAMILIES[name](**arguments)
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


def hubert_ecg(folder: Path, *, seed: int = 0, family: str = "hubert_ecg") -> Path:
    """A remote-code encoder: 5 s at 100 Hz, leads flattened, as its family was published.

    Args:
        folder: where to.
        seed: of the weights.
        family: model_type; another than HuBERT-ECG's is one that nobody knows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hubert_ecg.py").write_text(REMOTE_CODE.replace('"hubert_ecg"', repr(family)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        from transformers import HubertModel

        HubertModel(HubertConfig(**AUDIO, initializer_range=0.1)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": family, "architectures": ["HuBERTECG"], "ensemble_length": 1, "vocab_sizes": [100],
        "auto_map": {"AutoConfig": "hubert_ecg.HuBERTECGConfig", "AutoModel": "hubert_ecg.HuBERTECG"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder
