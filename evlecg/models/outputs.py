"""What the losses and scores need of any model, from its ordinary forward call.

Shape legend: see schema.py. Visual positions are `input_ids == image_token_id`, so a hidden layer's visual tokens are
a gather, and layer 0 at those positions is the projector's output: no early-fusion family needs code of its own here.
Families whose image, question and answer are not one text are read in apart.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evlecg.errors import EvlecgError
from evlecg.models import apart
from evlecg.models.classifier import ClassifierHead, classifier_outputs
from evlecg.models.encode import Turn
from evlecg.models.load import Loaded
from evlecg.models.views import AnyEncoder
from evlecg.schema import AnswerLogits, Batch, Outputs, Side


def forward(
    loaded: Loaded, side: Side, *, visual_layer: int = -1, model: Any = None, attention: bool = False
) -> Outputs:
    """Runs a model on its half of a batch.

    Args:
        loaded: the checkpoint in memory.
        side: its half, on its device.
        visual_layer: hidden layer whose visual tokens are returned.
        model: the model as accelerate wrapped it; None: the bare one.
        attention: also return the last layer's queries, keys and values at the visual positions.
    """
    if loaded.checkpoint.kind != "text":
        if attention:
            raise EvlecgError("queries and keys of a classifier are not read", where=loaded.checkpoint.name,
                              hint="--method minilm cannot read this family")  # fmt: skip
        return classifier_outputs(loaded.model, side, visual_layer=visual_layer, model=model)
    model = loaded.model if model is None else model
    if loaded.checkpoint.apart is not None:
        if attention:
            raise EvlecgError("queries and keys of an image that stands apart from the text are not read",
                              where=loaded.checkpoint.name, hint="--method minilm cannot read this family")  # fmt: skip
        return apart.forward(loaded, side, visual_layer=visual_layer, model=model)
    forward_keys, predict_A2 = loaded.forward_keys, side.answer_A2
    inputs = as_model(side.inputs, model)
    if bool((side.block_BS > 1).any()):
        inputs["attention_mask"] = _tree_masks(loaded, side, _dtype(model))
        inputs["position_ids"] = model_positions(loaded, side)
    head = AnswerHead(loaded)
    whole = not _in_shards(head)
    keep_U, place_A = torch.unique(predict_A2[:, 1] - 1, return_inverse=True)
    if "logits_to_keep" in forward_keys:  # the losses read theirs off the states, a few at a time
        inputs["logits_to_keep"] = 1 if whole else keep_U
    with (
        _last_attention(loaded) if attention else contextlib.nullcontext({}) as seen,
        _final_states(loaded.model) as final,
    ):
        result = model(**inputs, output_hidden_states=True, use_cache=False, return_dict=True)
    layers = [_one_stream(layer, side.valid_BS) for layer in result.hidden_states]
    layers[-1:] = final[-1:] or layers[-1:]
    if whole:
        answer_logits = _read_by(head, side.before_answers(layers[-1]), side)
    else:  # shards come together inside the model's own forward pass only
        logits_BUV = result.logits if "logits_to_keep" in forward_keys else result.logits[:, keep_U]
        answer_logits = AnswerLogits(logits_BUV[predict_A2[:, 0], place_A])
    return Outputs(
        hidden_BSD=layers[-1],
        visual_BND=gather_visual(layers[visual_layer], side.visual_BS),
        projected_BND=gather_visual(layers[loaded.checkpoint.family.projected_layer], side.visual_BS),
        answer_logits=answer_logits,
        side=side,
        attention={name: gather_visual(states_BSD, side.visual_BS) for name, states_BSD in seen.items()},
    )


def _in_shards(module: nn.Module) -> bool:
    """Whether this process holds a part of a module's weights only (FSDP2, ZeRO-3)."""
    return any(hasattr(weight, "device_mesh") or hasattr(weight, "ds_id") for weight in module.parameters())


def _read_by(head: AnswerHead, states_AD: Tensor, side: Side) -> AnswerLogits:
    """What the model's own head reads off the states before its answers, in the precision that the model ran in."""
    kind = states_AD.device.type
    autocast = torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))

    def read(states_RD: Tensor, rows_R: Tensor | slice) -> Tensor:
        with autocast:
            return head(states_RD, side.with_answers(rows_R))

    return AnswerLogits(states_AD, read)


@contextlib.contextmanager
def _last_attention(loaded: Loaded) -> Iterator[dict[str, Tensor]]:
    """Fills a dict with what the last layer's query, key and value projections return, [B,S,*].

    Raises:
        EvlecgError: the family's language model has no such projections (it fuses them, or does not attend).
    """
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    found: dict[str, Any] = {}
    for path, module in loaded.model.get_decoder().named_modules():
        kind = next((name for name, suffix in names.items() if path.endswith(f"self_attn.{suffix}")), None)
        if kind:
            found[kind] = module  # the last one stays
    if set(found) != set(names):
        raise EvlecgError(
            "the language model has no separate query, key and value projections", where=loaded.checkpoint.name,
            hint="--method minilm cannot read this family",
        )  # fmt: skip
    seen: dict[str, Tensor] = {}

    def keep(kind: str) -> Any:
        def hook(module: Any, given: Any, result: Tensor) -> None:
            seen[kind] = result

        return hook

    handles = [module.register_forward_hook(keep(kind)) for kind, module in found.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def as_model(inputs: dict[str, Any], model: Any) -> dict[str, Any]:
    """The inputs with pixels in the model's own precision: not every model brings them there itself."""
    return {
        key: value.to(_dtype(model)) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }


@contextlib.contextmanager
def _final_states(model: Any) -> Iterator[list[Tensor]]:
    """Collects what the head reads: in some families the last entry of `hidden_states` comes before the norm."""
    found: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        if isinstance(getattr(output, "last_hidden_state", None), Tensor):
            found.append(output.last_hidden_state)

    handle = model.base_model.register_forward_hook(keep) if model.base_model is not model else None
    try:
        yield found
    finally:
        if handle is not None:
            handle.remove()


def _one_stream(layer: Tensor, valid_BS: Tensor) -> Tensor:
    """A hidden state as [B,S,D], of the families that keep several.

    Gemma 3n has [versions,B,S,D], of which its layers read the first; hyper-connections have [B,S,streams,D], which
    begin as copies of the same input: their mean.
    """
    if layer.ndim == 3:
        return layer
    return layer[0] if layer.shape[1:3] == valid_BS.shape else layer.mean(2)


class AnswerHead(nn.Module):
    """Reads answer logits off hidden states: what the losses see of a model's head.

    Args:
        loaded: the checkpoint in memory; its head is shared, not copied.
    """

    def __init__(self, loaded: Loaded) -> None:
        super().__init__()
        self.name, self.apart = loaded.checkpoint.name, loaded.checkpoint.apart is not None
        self.classifies = loaded.checkpoint.kind != "text"
        if self.classifies:
            self.head = ClassifierHead(loaded.model)
            return
        self.head = apart.output_head(loaded)
        self.finish = LOGITS[loaded.checkpoint.family.logits]
        self.text = loaded.checkpoint.config.get_text_config()
        self._words = (loaded.model.get_input_embeddings(),)  # in a tuple: read, but no part of this module

    @property
    def parts(self) -> dict[str, nn.Module]:
        """`head`, and of models that answer in words `words`, their embeddings."""
        return {"head": self.head} | ({} if self.classifies else {"words": self._words[0]})

    def forward(self, states_AD: Tensor, side: Side) -> Tensor:
        """Logits [A,V] of the tokens at `side.answer_A2`, given the states that predict them."""
        if self.classifies:
            return self.head(states_AD, side)
        return self.finish(self.head(states_AD), self.text)

    def embed(self, side: Side) -> Tensor:
        """Embeddings of every answer token and of the one before it, [A,2,D]: the one before comes first."""
        if self.apart or self.classifies:
            raise EvlecgError("there are no words before an answer that stands apart from its question",
                              where=self.name, hint="--method dskd cannot read this family")  # fmt: skip
        before_A = side.before_answers(side.inputs["input_ids"])
        return self._words[0](torch.stack([before_A, side.answer_ids_A], dim=1))


def _softcap(logits_AV: Tensor, text: Any) -> Tensor:
    """Gemma's soft limit of the logits, where the config sets one."""
    cap = getattr(text, "final_logit_softcapping", None)
    return logits_AV if cap is None else cap * torch.tanh(logits_AV / cap)


def _unpadded(logits_AV: Tensor, text: Any) -> Tensor:
    """Without the rows that only round the head's size."""
    size = getattr(text, "unpadded_vocab_size", None)
    return logits_AV if size is None else logits_AV[..., :size]


def _wordless(logits_AV: Tensor, text: Any) -> Tensor:
    """Chameleon's logits, in which no answer can be a code of an image."""
    codes = [place for name, place in text.vocabulary_map.items() if name.startswith("IMGIMG")]
    return logits_AV.index_fill(-1, torch.tensor(codes, device=logits_AV.device), torch.finfo(logits_AV.dtype).min)


# what models do to their head's output, given the text config
LOGITS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "inkling": lambda logits_AV, text: _unpadded(logits_AV / text.logits_mup_width_multiplier, text),
    "muse": lambda logits_AV, text: _softcap(logits_AV * text.output_multiplier, text),
    "plain": lambda logits_AV, text: logits_AV,
    "divided": lambda logits_AV, text: logits_AV / text.logits_scaling,
    "scale": lambda logits_AV, text: logits_AV * (1.0 if text.logit_scale is None else text.logit_scale),
    "softcap": _softcap,
    "wordless": _wordless,
}


def tree_mask(
    block_BS: Tensor, dtype: torch.dtype, *, window: int | None = None, two_way_BS: Tensor | None = None
) -> Tensor:
    """Additive attention mask [B,1,S,S]: causal, and a block sees the shared prefix and itself only.

    Args:
        block_BS: see `Side`.
        dtype: of the mask.
        window: how many positions back a sliding layer sees, itself included; None: all.
        two_way_BS: tokens that see later ones of the same unbroken run, too (an image's).
    """
    length = block_BS.shape[1]
    causal_SS = torch.ones(length, length, dtype=torch.bool, device=block_BS.device).tril()
    same_BSS = block_BS[:, :, None] == block_BS[:, None, :]
    prefix_BSS = (block_BS == 0)[:, None, :]
    seen_BSS = causal_SS & (same_BSS | prefix_BSS)  # padding sees padding: harmless, and no row is empty
    if two_way_BS is not None:
        starts_BS = two_way_BS & ~F.pad(two_way_BS, (1, 0))[:, :-1]
        run_BS = torch.where(two_way_BS, starts_BS.cumsum(1), 0)
        seen_BSS |= (run_BS[:, :, None] == run_BS[:, None, :]) & two_way_BS[:, :, None]
    if window is not None:
        place_BS = tree_positions(block_BS)
        seen_BSS &= place_BS[:, :, None] - place_BS[:, None, :] < window
    mask_BSS = torch.zeros(seen_BSS.shape, dtype=dtype, device=block_BS.device)
    return mask_BSS.masked_fill(~seen_BSS, torch.finfo(dtype).min)[:, None]


def _tree_masks(loaded: Loaded, side: Side, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """The tree mask of every kind of attention layer that the language model has."""
    text = loaded.checkpoint.config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"])
    two_way_BS = side.visual_BS if loaded.checkpoint.family.two_way else None
    masks = {
        kind: tree_mask(
            side.block_BS, dtype, window=window if kind == "sliding_attention" else None, two_way_BS=two_way_BS
        )
        for kind in kinds
    }
    return masks if len(masks) > 1 else next(iter(masks.values()))


def tree_positions(block_BS: Tensor) -> Tensor:
    """Position ids [B,S]: every block continues where the shared prefix ends."""
    index_BS = torch.arange(block_BS.shape[1], device=block_BS.device).expand_as(block_BS)
    starts_BS = torch.ones_like(block_BS, dtype=torch.bool)
    starts_BS[:, 1:] = block_BS[:, 1:] != block_BS[:, :-1]
    start_BS = torch.where(starts_BS, index_BS, 0).cummax(1).values
    prefix_B1 = (block_BS == 0).sum(1, keepdim=True)
    return torch.where(block_BS == 0, index_BS, prefix_B1 + index_BS - start_BS)


def model_positions(loaded: Loaded, side: Side) -> Tensor:
    """`tree_positions` as the model counts them: [B,S], or [3,B,S] where an image counts its rows and columns."""
    place_BS = tree_positions(side.block_BS)
    count = getattr(loaded.model, "get_rope_index", None) or getattr(loaded.model.base_model, "get_rope_index", None)
    if count is None:
        return place_BS
    prefix_BS = side.block_BS == 0
    known = inspect.signature(count).parameters
    given = {key: value for key, value in side.inputs.items() if key in known}
    place_PBS, _ = count(**given | {"attention_mask": prefix_BS.to(side.inputs["attention_mask"].dtype)})
    next_B = place_PBS.masked_fill(~prefix_BS, -1).amax((0, 2)) + 1
    behind_BS = next_B[:, None] + place_BS - prefix_BS.sum(1, keepdim=True)
    return torch.where(prefix_BS, place_PBS, behind_BS.to(place_PBS.dtype))


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
def count_features(loaded: Loaded, side: Side) -> int | None:
    """How many image features the model makes of a batch; None where it does not say (no `get_image_features`)."""
    if loaded.checkpoint.apart is not None:
        return forward(loaded, side).visual_BND.shape[:2].numel()  # where the text says no number, this counts
    both = (getattr(model, "get_image_features", None) for model in (loaded.model, loaded.model.base_model))
    extracts = [extract for extract in both if extract is not None]  # the outer one may pass on what it is given
    if not extracts:
        return None
    extract, known = extracts[0], {name for each in extracts for name in inspect.signature(each).parameters}
    inputs = as_model(side.inputs, loaded.model)
    result = extract(**{key: value for key, value in inputs.items() if key in known}, return_dict=True)
    features = getattr(result, "pooler_output", result)
    if features is None:  # Granite Vision 4: (decoder layer, features) pairs, all of one length; Llama 4: unprojected
        added = getattr(result, "deepstack_features", None)
        features = added[0][1] if added else result.last_hidden_state
    return _count(features)


def _count(features: Any) -> int:
    """Rows of width D in a tensor [..., D], or in a list of such tensors, one an image."""
    if isinstance(features, Tensor):
        return features.numel() // features.shape[-1]
    return sum(_count(part) for part in features)


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
            results.append(outputs.answer_logits_AV)
    finally:
        loaded.model.train(was_training)
    return largest_difference(*results)


def largest_difference(logits_AV: Tensor, expected_AV: Tensor) -> float:
    """Largest difference between logits, as a share of the largest expected one."""
    expected_AV = expected_AV.float()
    return float((logits_AV.float() - expected_AV).abs().max() / _largest(expected_AV))


def _largest(logits_AV: Tensor) -> Tensor:
    """The largest logit in size, but for those that a model rules out by the least number there is."""
    allowed = logits_AV > torch.finfo(logits_AV.dtype).min / 2
    return logits_AV[allowed].abs().max().clamp_min(1e-6)


TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def tolerance(model: Any) -> float:
    """By how much logits of the same text may differ between two ways to compute them, as a share of the largest."""
    return TOLERANCE.get(_dtype(model), 1e-3)


def can_pack(loaded: Loaded, encoder: AnyEncoder, page: Any, turns: list[Turn]) -> tuple[bool, str]:
    """Whether packing gives this checkpoint the same logits as one question a row, and why not."""
    if len(turns) < 2:
        return False, "one question a page"
    if loaded.checkpoint.kind != "text":
        return True, "its questions are read off one state"
    if loaded.checkpoint.apart is not None:
        return False, "question, page and answer are not one text"
    try:
        difference = packing_difference(loaded, encoder, page, turns)
    except EvlecgError:
        raise
    except Exception as error:  # families that take no 4-D mask or positions fail in their own ways
        return False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return difference <= tolerance(loaded.model), f"logits differ by {difference:.1e} of the largest"


@torch.no_grad()
def image_matters(loaded: Loaded, side: Side) -> float:
    """How far the answer logits move, as a share of the largest, when every page of the batch is blanked.

    Zero means that the model does not see its images.
    """
    outputs = forward(loaded, side)
    blank = {key: _blanked(key, value, loaded) for key, value in side.inputs.items()}
    without = forward(loaded, dataclasses.replace(side, inputs=blank))
    logits, ablated = outputs.answer_logits_AV.float(), without.answer_logits_AV.float()
    if not bool(logits.isfinite().all()):  # a classifier that does not know the labels: its states have to do
        logits, ablated = outputs.hidden_BSD.float(), without.hidden_BSD.float()
    return float((logits - ablated).abs().max() / _largest(logits))


def _blanked(key: str, value: Any, loaded: Loaded) -> Any:
    """One of a model's inputs without what it shows: pixels in one tone, a signal that is flat."""
    if loaded.form is not None or key in ("input_values", "past_values"):
        return torch.zeros_like(value) if value.is_floating_point() else value
    if "pixel_values" in key:
        return _blank(value)
    return _blank_flattened(value) if key == "flattened_patches" else value


def _blank(pixels: Tensor) -> Tensor:
    """Every tile or patch in one even tone; those of padding stay zero, by which Idefics3's kind knows them."""
    inner = tuple(range(max(pixels.ndim - 3, 1), pixels.ndim))
    return (pixels.abs().amax(inner, keepdim=True) > 0) * pixels.mean() + torch.zeros_like(pixels)


def _blank_flattened(patches: Tensor) -> Tensor:
    """Pix2Struct's patches without their pixels; row and column, in front of them, stay."""
    return torch.cat([patches[..., :2], torch.zeros_like(patches[..., 2:])], -1)


def _dtype(model: Any) -> torch.dtype:
    return next(model.parameters()).dtype
