"""Many questions about one page, the page read once: the shared prefix stays in the key-value cache.

What `models.outputs.forward` computes for a packed row (every question a block behind the shared prefix), for models
that take no mask of blocks: image and shared text are read once, and every block goes on from a copy of their cache.
Recurrent states (linear attention, state spaces) and convolutions are copied as keys and values are. Blocks of like
length share a forward call.

`can_share` proves for the checkpoint at hand that the logits are those of one question a row. They are not where the
image looks at the question (a prefix language model, an encoder that reads both), and where a family's forward call
cannot go on from a cache with more than one token.

Shape legend: see schema.py; R blocks of one forward call, T positions of the longest of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evlecg.errors import EvlecgError
from evlecg.models.encode import Turn
from evlecg.models.load import Loaded
from evlecg.models.outputs import as_model, forward, largest_difference, model_positions, to_device, tolerance
from evlecg.models.views import AnyEncoder
from evlecg.schema import Side

COPIES_BYTES = 1 << 30  # of caches, that one forward call may have beyond one for every page


@dataclass(frozen=True)
class _Block:
    """Where a block stands: its row, its first position and the one behind its last."""

    row: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


@torch.no_grad()
def forward_shared(loaded: Loaded, side: Side) -> Tensor:
    """Answer logits [A,V] of packed rows, as `forward(loaded, side).answer_logits_AV` has them for a packing model.

    Args:
        loaded: the checkpoint in memory.
        side: packed rows on its device, whose shared prefixes are of one length.

    Raises:
        ValueError: prefixes of several lengths.
        Exception: whatever a model raises that cannot go on from its cache.
    """
    model, inputs = loaded.model, as_model(side.inputs, loaded.model)
    length_B = (side.block_BS == 0).sum(1)
    length = int(length_B[0])
    if bool((length_B != length).any()):
        raise ValueError("the shared prefixes are of several lengths")
    ids_BS = inputs["input_ids"]
    of_text = {key: value for key, value in inputs.items()
               if isinstance(value, Tensor) and value.shape[:2] == ids_BS.shape}  # fmt: skip
    place = _positions(loaded, side)
    prefix = {**inputs, **{key: value[:, :length] for key, value in of_text.items()}}
    if place is not None:
        prefix["position_ids"] = place[..., :length]
    keys = loaded.forward_keys
    kept = {"logits_to_keep": 1} if "logits_to_keep" in keys else {}
    cache_key = "cache" if "cache" in keys else "past_key_values"
    result = model(**prefix, **kept, use_cache=True, return_dict=True)
    cache, turned = getattr(result, cache_key), _turned_places(model)

    logits_AV: list[Tensor | None] = [None] * len(side.answer_ids_A)
    answer = {(row, place): number for number, (row, place) in enumerate(side.answer_A2.tolist())}
    page_bytes = sum(tensor.nbytes for tensor in _tensors(cache)) / len(ids_BS)
    for blocks in _together(_blocks(side), max(len(ids_BS), int(COPIES_BYTES // page_bytes))):
        row_R = torch.tensor([block.row for block in blocks], device=ids_BS.device)
        steps_T = torch.arange(max(block.length for block in blocks), device=ids_BS.device)
        start_R1 = torch.tensor([[block.start] for block in blocks], device=ids_BS.device)
        length_R1 = torch.tensor([[block.length] for block in blocks], device=ids_BS.device)
        real_RT = steps_T < length_R1
        at_RT = start_R1 + torch.minimum(steps_T, length_R1 - 1)
        text = {key: value[row_R[:, None], at_RT] for key, value in of_text.items() if key in keys}
        seen_R = torch.ones(len(blocks), length, dtype=of_text["attention_mask"].dtype, device=ids_BS.device)
        text["attention_mask"] = torch.cat([seen_R, real_RT.to(seen_R.dtype)], 1)
        if place is not None:
            text["position_ids"] = place[..., row_R[:, None], at_RT]
        wanted = [(r, step, answer[block.row, block.start + step + 1])
                  for r, block in enumerate(blocks) for step in range(block.length - 1)
                  if (block.row, block.start + step + 1) in answer]  # fmt: skip
        for module, place_B in turned:
            module.rope_deltas = place_B[row_R] if len(place_B) == len(ids_BS) else place_B
        text[cache_key] = _copied(cache, row_R)
        logits_RTV = model(**text, use_cache=True, return_dict=True).logits
        for r, step, number in wanted:
            logits_AV[number] = logits_RTV[r, step]
    found = [logits_V for logits_V in logits_AV if logits_V is not None]
    assert len(found) == len(logits_AV), "an answer stands outside of its block"
    return torch.stack(found)


def _positions(loaded: Loaded, side: Side) -> Tensor | None:
    """Position ids of all blocks, where the model takes them."""
    return model_positions(loaded, side) if "position_ids" in loaded.forward_keys else None


def _turned_places(model: Any) -> list[tuple[Any, Tensor]]:
    """Modules that remember how far an image has shifted the positions behind it, a row each (Qwen2-VL's kind)."""
    return [(module, module.rope_deltas) for module in model.modules()
            if isinstance(getattr(module, "rope_deltas", None), Tensor)]  # fmt: skip


def _blocks(side: Side) -> list[_Block]:
    """Every question's block, rows in order."""
    blocks = []
    for row, block_S in enumerate(side.block_BS.tolist()):
        for number in range(1, max(block_S) + 1):
            start = block_S.index(number)
            blocks.append(_Block(row, start, start + block_S.count(number)))
    return blocks


def _together(blocks: Sequence[_Block], most: int) -> Iterator[list[_Block]]:
    """Blocks of like length, so many that a forward call stays as small as that of the pages."""
    ordered = sorted(blocks, key=lambda block: -block.length)
    for start in range(0, len(ordered), most):
        yield ordered[start : start + most]


def _tensors(held: Any, depth: int = 0) -> Iterator[Tensor]:
    """Every tensor that a cache holds: of its layers, and of a layer's states."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, (dict, list, tuple)):
        for part in held.values() if isinstance(held, dict) else held:
            yield from _tensors(part, depth)
    elif hasattr(held, "__dict__") and depth < 2:
        yield from _tensors(vars(held), depth + 1)


def _copied(cache: Any, row_R: Tensor) -> Any:
    """A cache of the chosen rows; the one given stays as it is."""
    # tensors are not copied whole, then cut: the rows are chosen from those that there are
    twin = copy.deepcopy(cache, {id(tensor): tensor for tensor in _tensors(cache)})
    twin.reorder_cache(row_R)
    return twin


@torch.no_grad()
def can_share(loaded: Loaded, encoder: AnyEncoder, page: Any, turns: list[Turn]) -> tuple[bool, str]:
    """Whether blocks that go on from the cache of their page get the logits of one question a row, and why not."""
    if len(turns) < 2:
        return False, "one question a page"
    if loaded.checkpoint.kind != "text" or loaded.checkpoint.apart is not None:
        return False, "question, page and answer are not one text"
    device = next(loaded.model.parameters()).device
    try:
        alone_AV = forward(loaded, to_device(encoder.encode([page] * len(turns), [[turn] for turn in turns]), device))
        shared_AV = forward_shared(loaded, to_device(encoder.encode([page] * 2, [turns] * 2), device))
    except EvlecgError:
        raise
    except Exception as error:  # families that cannot go on from a cache fail in their own ways
        return False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    n = len(alone_AV.answer_logits_AV)
    difference = max(largest_difference(part_AV, alone_AV.answer_logits_AV) for part_AV in shared_AV.split(n))
    return difference <= tolerance(loaded.model), f"logits differ by {difference:.1e} of the largest"
