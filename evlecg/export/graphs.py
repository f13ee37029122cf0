"""A student as graphs: torch modules with plain tensors in and out, for transformers' exporters to trace.

| kind | graph | reads | gives |
|---|---|---|---|
| text | vision | page uint8 [B, H, W, 3] | visual [B, N, D] |
| text | embed | input_ids [B, T] | embeds [B, T, D] |
| text | decoder | embeds [B, T, D], attention_mask [B, P+T], position_ids [B, T] or [3, B, T], keep [K], cached keys and values [B, heads, P, d] | logits [B, K, V], all keys and values [B, heads, P+T, d] |
| image | classifier | page uint8 [B, H, W, 3] | logits [B, C] |
| signal | classifier | signal [B, 12, T], n_recorded [B] | logits [B, C] |

One decoder serves for the prompt (P = 0: a cache without positions) and for whatever follows it; `keep` says at which
of the T positions logits are wanted: a prompt of a thousand positions times a vocabulary would be gigabytes that
nobody reads. Masks are causal by place, so texts of different lengths are padded on the right.

Shape legend: B rows, N visual tokens, D width, T new positions, P cached ones, V vocabulary, C classes.
"""  # noqa: E501

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evlecg.errors import EvlecgError
from evlecg.export.pixels import Pixels
from evlecg.models.encode import Encoder
from evlecg.models.load import Loaded
from evlecg.models.outputs import LOGITS
from evlecg.models.views import ClassifierEncoder, input_name
from evlecg.schema import LEADS

PROJECTORS = ("multi_modal_projector", "connector", "visual")  # modules whose output enters the language model


@dataclass(frozen=True)
class Graph:
    """What an exporter needs: the module, inputs to trace it with, and which of their axes vary.

    Attributes:
        axes: input -> axis -> name of its size.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    axes: dict[str, dict[int, str]]


def text_graphs(loaded: Loaded, encoder: Encoder, n_visual: int) -> dict[str, Graph]:
    """Vision, embed and decoder graphs of a vision-language model.

    Raises:
        EvlecgError: its family cannot be cut into these.
    """
    name, family = loaded.checkpoint.name, loaded.checkpoint.family
    text = loaded.checkpoint.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if loaded.checkpoint.apart is not None or kinds != {"full_attention"} or family.two_way:
        raise EvlecgError(f"the family {loaded.checkpoint.model_type!r} cannot be cut into graphs: its text does not "
                          "read its image and itself through one plain cache", where=name,
                          hint="--format safetensors")  # fmt: skip
    wide, high = encoder.size_px
    vision = VisionGraph(loaded, encoder, n_visual)
    pages = torch.randint(0, 256, (2, high, wide, 3), dtype=torch.uint8)
    with torch.no_grad():
        width = vision(pages)["visual"].shape[-1]
    decoder = DecoderGraph(loaded)
    cache = decoder.traced_cache(batch=2, past=3)
    new, past = 4, 3
    places = torch.arange(past, past + new).expand(2, -1)
    position_ids = places if decoder.position_axes == 2 else places.expand(3, 2, -1)
    inputs = {
        "embeds": torch.randn(2, new, width),
        "attention_mask": torch.ones(2, past + new, dtype=torch.int64),
        "position_ids": position_ids.contiguous(),
        "keep": torch.tensor([1, 3]),
        **cache,
    }
    batch_axis = decoder.position_axes - 2
    axes = {
        "embeds": {0: "batch", 1: "new"},
        "attention_mask": {0: "batch", 1: "total"},
        "position_ids": {batch_axis: "batch", batch_axis + 1: "new"},
        "keep": {0: "kept"},
        **{key: {0: "batch", 2: "past"} for key in cache},
    }
    ids = torch.arange(6).reshape(2, 3)
    return {
        "vision": Graph(vision, {"page": pages}, {"page": {0: "batch"}}),
        "embed": Graph(EmbedGraph(loaded), {"input_ids": ids}, {"input_ids": {0: "batch", 1: "new"}}),
        "decoder": Graph(decoder, inputs, axes),
    }


def classifier_graphs(loaded: Loaded, encoder: ClassifierEncoder) -> dict[str, Graph]:
    """The one graph of a classifier."""
    if encoder.form is None:
        width, height = encoder.size_px or (0, 0)
        pages = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8)
        return {"classifier": Graph(PageClassifierGraph(loaded, encoder), {"page": pages}, {"page": {0: "batch"}})}
    inputs = {"signal": torch.randn(2, len(LEADS), encoder.form.n_samples)}
    if input_name(loaded.model.model) == "past_values":
        inputs["n_recorded"] = torch.tensor([encoder.form.n_samples, encoder.form.n_samples // 2])
    axes = {key: {0: "batch"} for key in inputs}
    return {"classifier": Graph(SignalClassifierGraph(loaded, encoder), inputs, axes)}


class VisionGraph(nn.Module):
    """page -> what stands at the image placeholders.

    Args:
        loaded: a vision-language model.
        encoder: its encoder, at the size of its pages.
        n_visual: visual tokens of a page.
    """

    def __init__(self, loaded: Loaded, encoder: Encoder, n_visual: int) -> None:
        super().__init__()
        self.pixels = Pixels(encoder.pixels, encoder.size_px, where=loaded.checkpoint.name)
        self.model = loaded.model
        self.base = loaded.model.base_model if loaded.model.base_model is not loaded.model else loaded.model.model
        self.n_tokens = n_visual
        found = [part for name in PROJECTORS if (part := getattr(self.base, name, None)) is not None]
        if not found:
            raise EvlecgError("the model's projector is not where those of its kind are", where=loaded.checkpoint.name,
                              hint="--format safetensors")  # fmt: skip
        self.projector = found[0]
        known = inspect.signature(self.base.get_image_features).parameters
        self.given = {name: value for name, value in self.pixels.constants.items() if name in known}
        if "pixel_attention_mask" in self.given:
            patch = loaded.checkpoint.config.vision_config.patch_size
            mask = self.given["pixel_attention_mask"].flatten(0, 1)
            patches = mask.unfold(1, patch, patch).unfold(2, patch, patch).sum((-1, -2)) > 0
            self.register_buffer("patch_mask", patches, persistent=False)
        elif "image_grid_thw" in self.given:
            for name, value in _grid_inputs(self.projector, self.given["image_grid_thw"]).items():
                self.register_buffer(f"grid_{name}", value, persistent=False)

    def forward(self, page: Tensor) -> dict[str, Tensor]:
        """`visual` [B, N, D] of pages [B, H, W, 3]."""
        pixels = self.pixels(page).to(self.model.dtype)
        n = page.shape[0]
        if "pixel_attention_mask" in self.given:  # Idefics3's kind: every tile is real, so none is sorted out
            patches: Any = self.patch_mask
            mask = patches[None].expand(n, -1, -1, -1).flatten(0, 1)
            states = self.base.vision_model(pixel_values=pixels.flatten(0, 1), patch_attention_mask=mask)
            visual = self.projector(states.last_hidden_state)
        elif "image_grid_thw" in self.given:
            visual = self._of_grid(pixels, n)
        else:
            visual = _heard_from(self.projector, lambda: self.base.get_image_features(pixel_values=pixels))
        return {"visual": visual.reshape(n, self.n_tokens, -1).float()}

    def _of_grid(self, pixels: Tensor, n: Any) -> Tensor:
        """Qwen's kind: patches of all pages in one row; what follows from their grid is given, not computed."""
        grid = self.given["image_grid_thw"].expand(n, -1)
        positions: Any = self.grid_position_ids
        each = positions.shape[0]
        given = {
            "position_ids": positions[None].expand(n, *positions.shape).flatten(0, 1),
            "cu_seqlens": (torch.arange(n + 1) * each).to(torch.int32),
            "max_seqlen": each,
        }
        return self.projector(pixels, grid_thw=grid, **given).pooler_output


def _grid_inputs(visual: Any, grid: Tensor) -> dict[str, Tensor]:
    """What a tower of Qwen's kind would compute from the grid of a page."""
    from transformers.exporters.utils import precompute_export_inputs

    inputs: dict[str, Any] = {"grid_thw": grid}
    precompute_export_inputs(visual, inputs)
    extra = set(inputs) - {"grid_thw", "position_ids", "cu_seqlens", "max_seqlen"}
    if extra:
        raise EvlecgError(f"towers that need {', '.join(sorted(extra))} are not cut into graphs",
                          hint="--format safetensors")  # fmt: skip
    return {"position_ids": inputs["position_ids"]}


def _heard_from(module: nn.Module, run: Any) -> Tensor:
    """What a module returns while `run` runs.

    What follows it is given one thing to hold, not one a page: LLaVA makes a list of its features, by which a tracer
    would count the pages.
    """
    found: list[Tensor] = []

    def hook(part: nn.Module, given: Any, result: Tensor) -> Tensor:
        found.append(result)
        return result[None]

    handle = module.register_forward_hook(hook)
    try:
        run()
    finally:
        handle.remove()
    return found[0]


class EmbedGraph(nn.Module):
    """input_ids -> their embeddings."""

    def __init__(self, loaded: Loaded) -> None:
        super().__init__()
        self.words = loaded.model.get_input_embeddings()

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """`embeds` [B, T, D]."""
        return {"embeds": self.words(input_ids).float()}


class DecoderGraph(nn.Module):
    """New positions behind cached ones -> logits and the longer cache."""

    def __init__(self, loaded: Loaded) -> None:
        super().__init__()
        self.decoder = loaded.model.get_decoder()
        self.head = loaded.model.get_output_embeddings()
        self.finish = LOGITS[loaded.checkpoint.family.logits]
        self.text = loaded.checkpoint.config.get_text_config()
        parameters = inspect.signature(self.decoder.forward).parameters
        self.cache_key = "cache" if "cache" in parameters else "past_key_values"  # renamed on the way to transformers 6
        rope = getattr(self.text, "rope_parameters", None) or {}
        self.position_axes = 3 if "mrope_section" in rope else 2
        states = torch.zeros(1, 1, loaded.checkpoint.width, dtype=loaded.model.dtype)
        with torch.no_grad():
            cache = self._run(states, torch.zeros(*([3] * (self.position_axes - 2)), 1, 1, dtype=torch.int64), None, [])
        self.shapes = [(keys.shape[1], keys.shape[3], values.shape[3]) for keys, values in cache[1]]

    def traced_cache(self, *, batch: int, past: int) -> dict[str, Tensor]:
        """A cache of noise: `past.0.key` and so on."""
        made = {}
        for layer, (heads, key_width, value_width) in enumerate(self.shapes):
            made[f"past_{layer}_key"] = torch.randn(batch, heads, past, key_width)
            made[f"past_{layer}_value"] = torch.randn(batch, heads, past, value_width)
        return made

    def forward(
        self, embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, keep: Tensor, **past: Tensor
    ) -> dict[str, Tensor]:
        """`logits` [B, K, V] at the kept positions, `present_*` the cache behind all of them."""
        dtype = self.head.weight.dtype
        pairs = [
            (past[f"past_{layer}_key"].to(dtype), past[f"past_{layer}_value"].to(dtype))
            for layer in range(len(self.shapes))
        ]
        n_new, n_all = embeds.shape[1], attention_mask.shape[1]
        place_T1 = (torch.arange(n_new) + (n_all - n_new))[:, None]
        seen_BTS = (torch.arange(n_all)[None] <= place_T1)[None] & attention_mask[:, None].bool()
        mask = torch.where(seen_BTS, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]
        states, cache = self._run(embeds.to(dtype), position_ids, mask, pairs)
        logits = self.finish(self.head(states[:, keep]), self.text)
        present = {}
        for layer, (keys, values) in enumerate(cache):
            present[f"present_{layer}_key"], present[f"present_{layer}_value"] = keys.float(), values.float()
        return {"logits": logits.float(), **present}

    def _run(self, states: Tensor, position_ids: Tensor, mask: Any, pairs: list[tuple[Tensor, Tensor]]) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(pairs):
            cache.update(keys, values, layer)
        given = {self.cache_key: cache}
        result = self.decoder(inputs_embeds=states, attention_mask=mask, position_ids=position_ids, use_cache=True,
                              **given)  # fmt: skip
        layers: list[Any] = cache.layers
        return result.last_hidden_state, [(layer.keys, layer.values) for layer in layers]


class PageClassifierGraph(nn.Module):
    """page -> logits."""

    def __init__(self, loaded: Loaded, encoder: ClassifierEncoder) -> None:
        super().__init__()
        assert encoder.size_px is not None
        self.pixels = Pixels(_one_page(encoder), encoder.size_px, where=loaded.checkpoint.name)
        self.classifier = loaded.model

    def forward(self, page: Tensor) -> dict[str, Tensor]:
        """`logits` [B, C] of pages [B, H, W, 3]."""
        pixels = self.pixels(page).to(self.classifier.dtype)
        return {"logits": self.classifier(pixel_values=pixels)["logits"].float()}


class SignalClassifierGraph(nn.Module):
    """signal in the model's form -> logits."""

    def __init__(self, loaded: Loaded, encoder: ClassifierEncoder) -> None:
        super().__init__()
        self.encoder_inputs = encoder.arranged
        self.classifier = loaded.model

    def forward(self, signal: Tensor, n_recorded: Tensor | None = None) -> dict[str, Tensor]:
        """`logits` [B, C] of signals [B, 12, T]."""
        inputs = self.encoder_inputs(signal.to(self.classifier.dtype), n_recorded)
        return {"logits": self.classifier(**inputs)["logits"].float()}


def _one_page(encoder: ClassifierEncoder) -> Any:
    def process(page: np.ndarray) -> dict[str, Tensor]:
        return encoder.pixels([page])

    return process
