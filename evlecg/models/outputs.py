"""What the losses and scores need of any early-fusion model, from its ordinary forward call.

Shape legend: see schema.py. Visual positions are `input_ids == image_token_id`, so a hidden layer's visual tokens are
a gather, and layer 0 at those positions is the projector's output: no family needs code of its own here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from evlecg.errors import EvlecgError
from evlecg.models.classifier import ClassifierHead, classifier_outputs
from evlecg.models.encode import Turn
from evlecg.models.load import Loaded
from evlecg.models.views import AnyEncoder
from evlecg.schema import Batch, Outputs, Side


def forward(loaded: Loaded, side: Side, *, visual_layer: int = -1, model: Any = None) -> Outputs:
    """Runs a model on its half of a batch.

    Args:
        loaded: the checkpoint in memory.
        side: its half, on its device.
        visual_layer: hidden layer whose visual tokens are returned.
        model: the model as accelerate wrapped it; None: the bare one.
    """
    if loaded.checkpoint.kind != "text":
        return classifier_outputs(loaded.model, side, visual_layer=visual_layer, model=model)
    model = loaded.model if model is None else model
    forward_keys, predict_A2 = loaded.forward_keys, side.answer_A2
    inputs = dict(side.inputs)
    if bool((side.block_BS > 1).any()):
        inputs["attention_mask"] = tree_mask(side.block_BS, _dtype(model))
        inputs["position_ids"] = tree_positions(side.block_BS)
    keep_U, place_A = torch.unique(predict_A2[:, 1] - 1, return_inverse=True)
    if "logits_to_keep" in forward_keys:
        inputs["logits_to_keep"] = keep_U
    result = model(**inputs, output_hidden_states=True, use_cache=False, return_dict=True)
    logits_BUV = result.logits
    if "logits_to_keep" not in forward_keys:
        logits_BUV = logits_BUV[:, keep_U]
    layers = result.hidden_states
    return Outputs(
        hidden_BSD=layers[-1],
        visual_BND=gather_visual(layers[visual_layer], side.visual_BS),
        projected_BND=gather_visual(layers[0], side.visual_BS),
        answer_logits_AV=logits_BUV[predict_A2[:, 0], place_A],
        side=side,
    )


class AnswerHead(nn.Module):
    """Reads answer logits off hidden states: what the losses see of a model's head.

    Args:
        loaded: the checkpoint in memory; its head is shared, not copied.
    """

    def __init__(self, loaded: Loaded) -> None:
        super().__init__()
        self.classifies = loaded.checkpoint.kind != "text"
        self.head = ClassifierHead(loaded.model) if self.classifies else loaded.model.get_output_embeddings()

    def forward(self, states_AD: Tensor, side: Side) -> Tensor:
        """Logits [A,V] of the tokens at `side.answer_A2`, given the states that predict them."""
        return self.head(states_AD, side) if self.classifies else self.head(states_AD)


def tree_mask(block_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask [B,1,S,S]: causal, and a block sees the shared prefix and itself only."""
    length = block_BS.shape[1]
    causal_SS = torch.ones(length, length, dtype=torch.bool, device=block_BS.device).tril()
    same_BSS = block_BS[:, :, None] == block_BS[:, None, :]
    prefix_BSS = (block_BS == 0)[:, None, :]
    seen_BSS = causal_SS & (same_BSS | prefix_BSS)  # padding sees padding: harmless, and no row is empty
    mask_BSS = torch.zeros(seen_BSS.shape, dtype=dtype, device=block_BS.device)
    return mask_BSS.masked_fill(~seen_BSS, torch.finfo(dtype).min)[:, None]


def tree_positions(block_BS: Tensor) -> Tensor:
    """Position ids [B,S]: every block continues where the shared prefix ends."""
    index_BS = torch.arange(block_BS.shape[1], device=block_BS.device).expand_as(block_BS)
    starts_BS = torch.ones_like(block_BS, dtype=torch.bool)
    starts_BS[:, 1:] = block_BS[:, 1:] != block_BS[:, :-1]
    start_BS = torch.where(starts_BS, index_BS, 0).cummax(1).values
    prefix_B1 = (block_BS == 0).sum(1, keepdim=True)
    return torch.where(block_BS == 0, index_BS, prefix_B1 + index_BS - start_BS)


def gather_visual(hidden_BSD: Tensor, visual_BS: Tensor) -> Tensor:
    """Hidden states at the visual positions, [B,N,D], padded on the right with zeros."""
    counts_B = visual_BS.sum(1)
    most = int(counts_B.max())
    if bool((counts_B == most).all()):
        return hidden_BSD[visual_BS].view(hidden_BSD.shape[0], most, hidden_BSD.shape[2])
    rows, places = visual_BS.nonzero(as_tuple=True)
    rank = (visual_BS.cumsum(1) - 1)[rows, places]
    padded_BND = hidden_BSD.new_zeros(hidden_BSD.shape[0], most, hidden_BSD.shape[2])
    return padded_BND.index_put((rows, rank), hidden_BSD[rows, places])


def to_device(item: Any, device: torch.device | str) -> Any:
    """A `Batch` or `Side` with every tensor on the device."""
    if isinstance(item, Tensor):
        return item.to(device, non_blocking=True)
    if isinstance(item, dict):
        return {key: to_device(value, device) for key, value in item.items()}
    if isinstance(item, (Batch, Side)):
        return dataclasses.replace(
            item, **{field.name: to_device(getattr(item, field.name), device) for field in dataclasses.fields(item)}
        )
    return item


@torch.no_grad()
def packing_difference(loaded: Loaded, encoder: AnyEncoder, page: Any, turns: list[Turn]) -> float:
    """Largest difference between packed and unpacked answer logits, as a share of the largest logit.

    Raises:
        Exception: whatever the model raises on a packed row: some families compute positions of their own.
    """
    packed = encoder.encode([page], [turns])
    single = encoder.encode([page] * len(turns), [[turn] for turn in turns])
    device = next(loaded.model.parameters()).device
    results = []
    was_training = loaded.model.training
    loaded.model.eval()
    try:
        for side in (to_device(packed, device), to_device(single, device)):
            outputs = forward(loaded, side)
            results.append(outputs.answer_logits_AV.float())
    finally:
        loaded.model.train(was_training)
    together, apart = results
    return float((together - apart).abs().max() / apart.abs().max().clamp_min(1e-6))


PACKING_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def can_pack(loaded: Loaded, encoder: AnyEncoder, page: Any, turns: list[Turn]) -> tuple[bool, str]:
    """Whether packing gives this checkpoint the same logits as one question a row, and why not."""
    if len(turns) < 2:
        return False, "one question a page"
    if loaded.checkpoint.kind != "text":
        return True, "its questions are read off one state"
    try:
        difference = packing_difference(loaded, encoder, page, turns)
    except EvlecgError:
        raise
    except Exception as error:  # families that take no 4-D mask or positions fail in their own ways
        return False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    allowed = PACKING_TOLERANCE.get(_dtype(loaded.model), 1e-3)
    return difference <= allowed, f"logits differ by {difference:.1e} of the largest"


@torch.no_grad()
def image_matters(loaded: Loaded, side: Side) -> float:
    """How far the answer logits move, as a share of the largest, when every page of the batch is blanked.

    Zero means that the model does not see its images.
    """
    outputs = forward(loaded, side)
    blanks = {"pixel_values": _blank, "input_values": torch.zeros_like, "past_values": torch.zeros_like}
    if loaded.form is not None:
        blanks[next(iter(side.inputs))] = torch.zeros_like
    blank = {key: blanks[key](value) if key in blanks else value for key, value in side.inputs.items()}
    without = forward(loaded, dataclasses.replace(side, inputs=blank))
    logits, ablated = outputs.answer_logits_AV.float(), without.answer_logits_AV.float()
    if not bool(logits.isfinite().all()):  # a classifier that does not know the labels: its states have to do
        logits, ablated = outputs.hidden_BSD.float(), without.hidden_BSD.float()
    return float((logits - ablated).abs().max() / logits.abs().max().clamp_min(1e-6))


def _blank(pixels: Tensor) -> Tensor:
    """Every tile or patch in one even tone; those of padding stay zero, by which Idefics3's kind knows them."""
    inner = tuple(range(max(pixels.ndim - 3, 1), pixels.ndim))
    return (pixels.abs().amax(inner, keepdim=True) > 0) * pixels.mean() + torch.zeros_like(pixels)


def _dtype(model: Any) -> torch.dtype:
    return next(model.parameters()).dtype
