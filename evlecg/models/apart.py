"""Families whose image, or whose question, stands apart from the text of the answer.

Three forms. In the first a processor writes the row as it likes (an image in front of the text, marked by a mask and
not by a placeholder; or outside of it, read through cross-attention), and the answer is appended to what it wrote. In
the second the processor writes an encoder's text, and a decoder of its own writes the answer. In the third only pages
go through the processor, and the text (question and answer) is the decoder's alone.

Positions are laid out as if every family had one sequence: what the answer is read from comes first (visual tokens, or
the encoder's text with the visual tokens where they stand in it), then the text that the answer is written in. Where a
family attends to visual tokens of another width than the text's, and has no projector, one tensor cannot hold both:
then the positions are the text's alone, `Side.visual_BS` is empty, and the visual tokens are in `visual_BND` only.

What the text is read from is heard with hooks on the family's own forward call: the module that makes the visual
tokens, and the input of the output head, which is the last hidden state as the head reads it.

Shape legend: see schema.py; M positions in front of the text, T positions of the text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from evlecg.errors import EvlecgError
from evlecg.models.positions import measure_boxes
from evlecg.page.layout import batch_cells
from evlecg.page.render import Page
from evlecg.schema import AnswerLogits, Outputs, Side

if TYPE_CHECKING:
    from evlecg.models.encode import Encoder, Turn
    from evlecg.models.load import Loaded

ROW, ENCODER, DECODER = "row", "encoder", "decoder"


@dataclass(frozen=True)
class Apart:
    """One family, as data.

    Attributes:
        form: ROW (the processor writes question and image; the answer follows), ENCODER (the processor writes the
            encoder's text, a decoder answers) or DECODER (question and answer are the decoder's; the page is all that
            the processor reads).
        prompt: what is asked, where there is no chat template; no image placeholder but where the processor wants one.
        closing: what the processor itself writes behind the prompt.
        visual: modules that make the visual tokens, the first that the model has; empty where they stand in the text.
        marks: key of the processor's mask of visual positions in the text (1 there); empty: `image_token_id`.
        real: key of the processor's mask of real tiles or patches: tokens of the others are dropped.
        in_sequence: the text model puts the visual tokens in front of the text by itself.
        width: where the config holds the width of the visual tokens; empty: that of the text.
        count: key of `COUNTS`, how many visual tokens a page has where they do not stand in the text.
        ids: the model's name for the text of form DECODER.
        begins: where the config holds the first id of a decoder's text.
        keeps_bos: the tokenizer's own begin mark follows that first id (BART's kind).
        head: the output head's module, where `get_output_embeddings` does not know it.
        flattened: the processor stretches the page onto patches that carry their row and column.
    """

    form: str = ROW
    prompt: str = "{earlier}Question: {question} Answer:"
    closing: str = ""
    visual: tuple[str, ...] = ()
    marks: str = ""
    real: str = ""
    in_sequence: bool = False
    width: str = ""
    count: str = ""
    ids: str = "decoder_input_ids"
    begins: tuple[str, ...] = ("decoder_start_token_id", "text_config.decoder_start_token_id")
    keeps_bos: bool = False
    head: str = ""
    flattened: bool = False


APART: dict[str, Apart] = {
    "blip": Apart(
        DECODER, "{earlier}{question}", "", ("vision_model",), width="vision_config.hidden_size", count="patches",
        ids="input_ids", begins=("text_config.bos_token_id",), head="text_decoder.cls.predictions.decoder",
    ),
    "blip-2": Apart(ROW),
    "florence2": Apart(ENCODER, "{earlier}{question}", keeps_bos=True),
    "fuyu": Apart(ROW, "{earlier}{question}\n", "<0x04>"),
    "git": Apart(
        DECODER, "{earlier}{question}", "", ("git.visual_projection",), in_sequence=True, count="patches",
        ids="input_ids", begins=("bos_token_id",),
    ),
    "idefics": Apart(
        ROW, "{earlier}User: {question}\nAssistant:", "", ("model.perceiver_resampler", "model.vision_model"),
        width="vision_config.embed_dim", count="latents",
    ),
    "instructblip": Apart(ROW, "{earlier}{question}"),
    "kosmos-2": Apart(ROW, marks="image_embeds_position_mask"),
    "kosmos-2.5": Apart(
        ROW, "<md>{earlier}{question}", marks="image_embeds_position_mask", flattened=True
    ),
    "mllama": Apart(
        ROW, "<|image|>{earlier}{question}\n", "", ("model.multi_modal_projector",), real="aspect_ratio_mask",
        count="patches",
    ),
    "pix2struct": Apart(
        DECODER, "{earlier}{question}", "", ("encoder",), real="attention_mask", count="flattened",
        flattened=True,
    ),
    "t5gemma2": Apart(ENCODER, "{image}{earlier}{question}\n"),
    "vision-encoder-decoder": Apart(
        DECODER, "{earlier}{question}", "", ("enc_to_dec_proj", "encoder"), width="decoder.cross_attention_hidden_size",
        count="patches", keeps_bos=True,
    ),
}  # fmt: skip


def apart_of(config: Any) -> Apart | None:
    """The row of a checkpoint's family; None where image, question and answer are one text."""
    row = APART.get(config.model_type)
    if row is not None and row.form == ROW and getattr(config, "use_decoder_only_language_model", True) is False:
        return replace(row, form=ENCODER)  # BLIP-2 and InstructBLIP on T5
    return row


def config_value(config: Any, *paths: str) -> Any:
    """The first value that is set at the dotted paths, or None."""
    for path in paths:
        value = config
        for part in path.split("."):
            value = getattr(value, part, None)
        if value is not None:
            return value
    return None


def visual_width(config: Any) -> int | None:
    """Width of the visual tokens where it is not the text's."""
    row = apart_of(config)
    return int(width) if row is not None and row.width and (width := config_value(config, row.width)) else None


# encoding


def encode(encoder: Encoder, pages: Sequence[Page], turns: Sequence[Sequence[Turn]]) -> Side:
    """`Encoder.encode` for these families.

    Raises:
        EvlecgError: several questions in one row.
    """
    if any(len(row) != 1 for row in turns):
        raise EvlecgError(
            f"family {encoder.checkpoint.model_type!r} reads one question a row", where=encoder.checkpoint.name,
            hint="set train.packing=never",
        )  # fmt: skip
    rows = [_row(encoder, page.pixels, row[0]) for page, row in zip(pages, turns, strict=True)]
    length = max(row.length for row in rows)

    def padded(parts: list[list[int]], value: int) -> Tensor:
        return torch.tensor([part + [value] * (length - len(part)) for part in parts], dtype=torch.long)

    valid_BS = padded([[1] * row.length for row in rows], 0).bool()
    n_visual = [row.n_visual for row in rows]
    box_BN4 = torch.zeros(len(rows), max(n_visual), 4)
    for place, (count, page) in enumerate(zip(n_visual, pages, strict=True)):
        box_BN4[place, :count] = torch.from_numpy(page.layout.to_paper(encoder.boxes(count)))
    answer_A2 = padded([[0] * row.n_before + row.text.answer for row in rows], 0).nonzero()
    ids_BS = padded([[0] * row.n_before + row.text.ids for row in rows], 0)
    return Side(
        inputs=_collate([row.inputs for row in rows], encoder.pad_id),
        valid_BS=valid_BS,
        block_BS=padded([row.block for row in rows], -1),
        byte_end_BS=padded([[0] * row.n_before + row.text.byte_end for row in rows], 0),
        answer_A2=answer_A2,
        answer_ids_A=ids_BS[answer_A2[:, 0], answer_A2[:, 1]],
        visual_BS=padded([row.visual for row in rows], 0).bool(),
        visual_box_BN4=box_BN4,
        visual_mask_BN=(box_BN4[..., 2] > box_BN4[..., 0]) & (box_BN4[..., 3] > box_BN4[..., 1]),
        cell_box_BC4=torch.from_numpy(batch_cells([page.layout for page in pages])[0]),
    )


def answer_ids(encoder: Encoder, turn: Turn) -> tuple[int, ...]:
    """Ids of the answer's tokens, in their context."""
    _, asked, full = _texts(encoder, turn)
    text = _written(encoder, asked, full, turn)
    return tuple(token for token, answer in zip(text.ids, text.answer, strict=True) if answer)


@dataclass(frozen=True)
class _Text:
    """Tokens, which belong to the answer, and the answer's bytes read so far."""

    ids: list[int]
    answer: list[int]
    byte_end: list[int]


@dataclass(frozen=True)
class _Row:
    """One question about one page: the model's inputs, and what the positions mean.

    Attributes:
        inputs: a batch of one.
        n_before: positions in front of the text.
        text: the text that the answer is written in.
        visual, block: of every position, those in front included.
        n_visual: visual tokens of the page, be they among the positions or not.
    """

    inputs: dict[str, Tensor]
    n_before: int
    text: _Text
    visual: list[int]
    block: list[int]
    n_visual: int

    @property
    def length(self) -> int:
        return self.n_before + len(self.text.ids)


def _texts(encoder: Encoder, turn: Turn) -> tuple[str, str, str]:
    """(what the processor is given, the prompt as it stands in the end, the prompt with the answer)."""
    row = apart_of(encoder.checkpoint.config)
    assert row is not None
    if row.form == ROW and getattr(encoder.processor, "chat_template", None):
        prompt, full = encoder.text(turn)
        return prompt, prompt, full
    earlier = "".join(f"{question}\n{answer}\n" for question, answer in turn.history)
    image = getattr(encoder.processor, "boi_token", "")
    prompt = row.prompt.format(image=image, earlier=earlier, question=turn.question)
    asked = prompt + row.closing
    return prompt, asked, f"{asked} {turn.answer}"


def _written(encoder: Encoder, prompt: str, full: str, turn: Turn) -> _Text:
    """The text that the answer is written in, tokenized: all of it, or the answer alone where an encoder is asked."""
    row = apart_of(encoder.checkpoint.config)
    assert row is not None
    alone = row.form == ENCODER
    text, start = (turn.answer, 0) if alone else (full, len(prompt))
    encoded = encoder.tokenizer(text, add_special_tokens=row.keeps_bos, return_offsets_mapping=True)
    tokens = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
    special = set(encoder.tokenizer.all_special_ids)
    ids: list[int] = []
    ends: list[int] = []
    if row.form != ROW:
        ids, ends = [_first_id(encoder, row)], [0]
        while tokens and tokens[-1][0] in special and tokens[-1][1][0] == tokens[-1][1][1]:
            tokens.pop()  # the tokenizer's end mark: ours follows where the turn ends
        if tokens and tokens[0][0] == ids[0]:
            tokens.pop(0)
    ids += [token for token, _ in tokens]
    ends += [end for _, (_, end) in tokens]
    answer_start = text.index(turn.answer, start) if turn.answer else len(text)
    answer_stop = answer_start + len(turn.answer)
    answer = [int(end > start) for end in ends]
    # an end mark counts as one more byte: see `Side.byte_end_BS`
    byte_end = [len(text[answer_start : min(end, answer_stop)].encode()) + (end > answer_stop) for end in ends]
    if turn.ends and not (row.form == ROW and getattr(encoder.processor, "chat_template", None)):
        ids, answer, byte_end = [*ids, _end_id(encoder)], [*answer, 1], [*byte_end, len(turn.answer.encode()) + 1]
    return _Text(ids, answer, byte_end)


def _first_id(encoder: Encoder, row: Apart) -> int:
    found = config_value(encoder.checkpoint.config, *row.begins, "decoder.bos_token_id", "bos_token_id")
    if found is None:
        raise EvlecgError("the checkpoint does not say how its decoder begins", where=encoder.checkpoint.name,
                          hint="set decoder_start_token_id in config.json")  # fmt: skip
    return int(found)


def _end_id(encoder: Encoder) -> int:
    tokenizer = encoder.tokenizer
    found = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if found is None:
        raise EvlecgError("the tokenizer has no end mark", where=encoder.checkpoint.name)
    return int(found)


def _row(encoder: Encoder, pixels: np.ndarray, turn: Turn) -> _Row:
    config = encoder.checkpoint.config
    row = apart_of(config)
    assert row is not None
    prompt, asked, full = _texts(encoder, turn)
    text = _written(encoder, asked, full, turn)
    if row.form == DECODER:
        inputs = _process(encoder, pixels, None)
        inputs[row.ids] = torch.tensor([text.ids])
        inputs[row.ids.replace("input_ids", "attention_mask")] = torch.ones(1, len(text.ids), dtype=torch.long)
        return _captured(encoder, row, inputs, text)
    inputs = _process(encoder, pixels, prompt)
    ids = inputs["input_ids"][0].tolist()
    in_text = [int(mark) for mark in _marked(inputs, row, encoder.checkpoint.image_token_id)[0]]
    if row.form == ENCODER:
        inputs["decoder_input_ids"] = torch.tensor([text.ids])
        inputs["decoder_attention_mask"] = torch.ones(1, len(text.ids), dtype=torch.long)
        block = _blocks(in_text) + [1] * len(text.ids)
        return _Row(inputs, len(ids), text, in_text + [0] * len(text.ids), block, sum(in_text))
    text = _appended(encoder, ids, asked, text)
    inputs = _longer(inputs, len(ids), torch.tensor([text.ids]))
    if row.visual:
        return _captured(encoder, row, inputs, text)
    in_text += [0] * (len(text.ids) - len(in_text))
    return _Row(inputs, 0, text, in_text, _blocks(in_text), sum(in_text))


def _process(encoder: Encoder, pixels: np.ndarray, prompt: str | None) -> dict[str, Tensor]:
    """What the processor makes of one page, and of a prompt where it is to read one: a batch of one."""
    from PIL import Image

    if getattr(encoder.processor.image_processor, "is_vqa", False):
        raise EvlecgError(
            "the processor draws the question onto the page, which moves the page and needs a font from the hub",
            where=encoder.checkpoint.name, hint="save it with image_processor.is_vqa=False: its decoder is then asked",
        )  # fmt: skip
    said: dict[str, Any] = {} if prompt is None else {"text": [prompt]}
    if hasattr(encoder.processor.image_processor, "max_patches"):  # the processor's own default would hide it
        said["max_patches"] = encoder.processor.image_processor.max_patches
    bos = encoder.tokenizer.bos_token
    if prompt is not None and bos and prompt.startswith(bos):  # a template wrote it
        said["add_special_tokens"] = False
    try:
        found = encoder.processor(
            images=[Image.fromarray(pixels)], return_tensors="pt", **said, **encoder.family.processor
        )
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise EvlecgError(
            "the checkpoint's processor cannot read a page and a question", where=encoder.checkpoint.name,
            hint=next((line for line in str(error).splitlines() if line), type(error).__name__),
        ) from error  # fmt: skip
    return dict(found)


def boxes(encoder: Encoder, n_tokens: int) -> np.ndarray | None:
    """`positions.measure_boxes` for these families."""
    row = apart_of(encoder.checkpoint.config)
    assert row is not None
    prompt = None if row.form == DECODER else _texts(encoder, encoder.nothing_asked)[0]

    def process(page: np.ndarray) -> dict[str, Any]:
        inputs: dict[str, Any] = _process(encoder, page, prompt)
        if row.real and "pixel_values" in inputs:
            pixels = inputs["pixel_values"]
            real_K = inputs[row.real].flatten().bool()
            inputs["pixel_values"] = pixels.reshape(-1, *pixels.shape[-3:])[real_K]
        return inputs

    if row.count == "flattened":
        width, height = encoder.size_px
        inputs = process(np.full((height, width, 3), 255, np.uint8))
        return flattened_boxes(inputs["flattened_patches"][0], n_tokens)
    if row.flattened:  # no patch is a token: latent queries look at all of them
        return np.tile(np.array([0, 0, 1, 1], np.float32), (n_tokens, 1))
    return measure_boxes(
        process, size_px=encoder.size_px, n_tokens=n_tokens, layout=encoder.family.layout,
        config=encoder.checkpoint.config,
    )  # fmt: skip


def flattened_boxes(patches_NP: Tensor, n_tokens: int) -> np.ndarray | None:
    """Boxes of Pix2Struct's patches, which carry their row and column (from 1) in front of their pixels.

    The page is stretched onto the whole grid of patches. Padding has row 0.
    """
    row_N, column_N = (patches_NP[:, axis].numpy().astype(int) for axis in (0, 1))
    kept_N = row_N > 0
    if kept_N.sum() != n_tokens:
        return None
    row_N, column_N = row_N[kept_N], column_N[kept_N]
    down, across = row_N.max(), column_N.max()
    edges = ((column_N - 1) / across, (row_N - 1) / down, column_N / across, row_N / down)
    return np.stack(edges, 1).astype(np.float32)


def _captured(encoder: Encoder, row: Apart, inputs: dict[str, Tensor], text: _Text) -> _Row:
    """A row whose visual tokens are made outside of the text."""
    config = encoder.checkpoint.config
    n_visual = COUNTS[row.count](config, inputs, row)
    width = visual_width(config)
    n_before = n_visual if width is None or width == encoder.checkpoint.width else 0
    visual = [1] * n_before + [0] * len(text.ids)
    return _Row(inputs, n_before, text, visual, [0] * n_before + [1] * len(text.ids), n_visual)


def _blocks(visual: list[int]) -> list[int]:
    """0 up to the last visual token (what any question about the page would share), 1 after it."""
    last = max((place for place, mark in enumerate(visual) if mark), default=-1)
    return [0] * (last + 1) + [1] * (len(visual) - last - 1)


def _appended(encoder: Encoder, ids: list[int], prompt: str, text: _Text) -> _Text:
    """The processor's row with the answer behind it.

    The end of the row is the prompt's; only there the two tokenizations have to agree.
    """
    n_answer = text.answer.count(1)
    asked = text.ids[: len(text.ids) - n_answer]
    same = 0
    while same < min(len(ids), len(asked)) and ids[-1 - same] == asked[-1 - same]:
        same += 1
    if not same:
        raise EvlecgError(
            "the prompt is tokenized differently once the answer follows it", where=encoder.checkpoint.name,
            hint=f"it ends in {prompt[-20:]!r}; the row ends in {encoder.tokenizer.decode(ids[-3:])!r}",
        )  # fmt: skip
    before = len(ids)
    return _Text(
        ids + text.ids[len(asked) :],
        [0] * before + text.answer[len(asked) :],
        [0] * before + text.byte_end[len(asked) :],
    )


def _longer(inputs: dict[str, Tensor], length: int, ids_1T: Tensor) -> dict[str, Tensor]:
    """The inputs with longer ids: what the processor says per token goes on as it was at the last one."""
    further = ids_1T.shape[1] - length
    longer = {}
    for key, value in inputs.items():
        if key == "input_ids":
            value = ids_1T
        elif _per_token(key) and value.shape[:2] == (1, length):
            value = torch.cat([value, value[:, -1:].expand(-1, further, *value.shape[2:])], 1)
        longer[key] = value
    return longer


def _per_token(key: str) -> bool:
    return not key.startswith(("pixel", "flattened", "qformer", "aspect", "decoder"))


def _collate(rows: list[dict[str, Tensor]], pad_id: int) -> dict[str, Tensor]:
    """Rows of one as a batch, padded on the right where they differ in length."""
    batch = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        if values[0].ndim > 1:
            length = max(value.shape[1] for value in values)
            fill = pad_id if key in ("input_ids", "decoder_input_ids") else 0
            values = [
                torch.cat([value, value.new_full((1, length - value.shape[1], *value.shape[2:]), fill)], 1)
                if value.shape[1] < length else value
                for value in values
            ]  # fmt: skip
        batch[key] = torch.cat(values)
    return batch


def _marked(inputs: dict[str, Tensor], row: Apart, image_token_id: int) -> Tensor:
    """Visual positions of the text that the processor writes, bool [B, M or T]."""
    if row.visual:
        return torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    return inputs[row.marks] == 1 if row.marks else inputs["input_ids"] == image_token_id


# how many visual tokens a page has, where no text says it


def _patches(config: Any, inputs: dict[str, Tensor], row: Apart) -> int:
    """Patches of a vision transformer with its class token and registers; of a Swin transformer, which merges them."""
    vision = config_value(config, "vision_config", "encoder")
    patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    stages = getattr(vision, "depths", None)
    stride = patch * 2 ** (len(stages) - 1) if stages else patch
    heads = 0 if stages else 1 + (getattr(vision, "num_register_tokens", 0) or 0) + (vision.model_type == "deit")
    pixels = inputs["pixel_values"]
    tiles = int(inputs[row.real].sum()) if row.real else 1
    return tiles * ((pixels.shape[-2] // stride) * (pixels.shape[-1] // stride) + heads)


def _latents(config: Any, inputs: dict[str, Tensor], row: Apart) -> int:
    if config.use_resampler:
        return int(config.perceiver_config.resampler_n_latents)
    return _patches(config, inputs, row)


def _flattened(config: Any, inputs: dict[str, Tensor], row: Apart) -> int:
    return int(inputs[row.real].sum())


COUNTS = {"patches": _patches, "latents": _latents, "flattened": _flattened}


# reading the model


def output_head(loaded: Loaded) -> Any:
    """The module that turns hidden states into logits."""
    row = apart_of(loaded.checkpoint.config)
    if row is not None and row.head:
        return loaded.model.get_submodule(row.head)
    head = loaded.model.get_output_embeddings()
    return loaded.model.language_model.get_output_embeddings() if head is None else head  # Nemotron: the decoder's own


def forward(loaded: Loaded, side: Side, *, visual_layer: int, model: Any) -> Outputs:
    """`models.outputs.forward` for these families.

    `visual_layer` chooses among an encoder's or a text model's layers where visual tokens stand in its text; tokens
    that a text attends to from outside are the same for all its layers.

    Raises:
        EvlecgError: the model makes another number of visual tokens than the checkpoint's processor led to expect.
    """
    row = apart_of(loaded.checkpoint.config)
    assert row is not None
    n_visual = side.visual_box_BN4.shape[1]
    with _heard(loaded, row) as heard:
        result = model(**side.inputs, output_hidden_states=True, use_cache=False, return_dict=True)
    text_BTD, logits_BTV = heard["text"], result.logits
    inner = getattr(result, "language_model_outputs", None) or result
    if row.visual:
        projected_BND = visual_BND = _real(heard["visual"], side, row)
        if visual_BND.shape[1] != n_visual:
            raise EvlecgError(
                f"{visual_BND.shape[1]} visual tokens where {n_visual} were expected", where=loaded.checkpoint.name,
                hint="its processor and its weights do not belong together (image size, patch size)",
            )  # fmt: skip
        in_front = not row.in_sequence and bool(side.visual_BS.any())
        before_BMD = visual_BND if in_front else text_BTD[:, :0]
        n_before_B = torch.full_like(side.valid_BS[:, 0], before_BMD.shape[1], dtype=torch.long)
    else:
        layers = inner.encoder_hidden_states if row.form == ENCODER else inner.hidden_states
        marked_BM = _marked(side.inputs, row, loaded.checkpoint.image_token_id)
        visual_BND, projected_BND = (
            layers[layer][marked_BM].view(len(marked_BM), n_visual, -1) for layer in (visual_layer, 0)
        )
        before_BMD = inner.encoder_last_hidden_state if row.form == ENCODER else text_BTD[:, :0]
        n_before_B = side.inputs["attention_mask"].sum(1) if row.form == ENCODER else 0 * side.valid_BS.long().sum(1)
    # valid positions stand side by side, as if there were one text: no padding between what is read and what is written
    index_BS = torch.arange(side.valid_BS.shape[1], device=text_BTD.device).expand_as(side.valid_BS)
    source_BS = torch.where(
        index_BS < n_before_B[:, None], index_BS, index_BS - n_before_B[:, None] + before_BMD.shape[1]
    )
    hidden_BSD = torch.cat([before_BMD.to(text_BTD.dtype), text_BTD], 1)
    source_BS = source_BS.clamp_max(hidden_BSD.shape[1] - 1)
    place_A = side.answer_A2[:, 1] - 1 - n_before_B[side.answer_A2[:, 0]]
    return Outputs(
        hidden_BSD=hidden_BSD.gather(1, source_BS[..., None].expand(-1, -1, hidden_BSD.shape[-1])),
        visual_BND=visual_BND,
        projected_BND=projected_BND,
        answer_logits=AnswerLogits(logits_BTV[side.answer_A2[:, 0], place_A]),
        side=side,
    )


def _real(visual: Tensor, side: Side, row: Apart) -> Tensor:
    """Visual tokens as [B,N,D], those of padding left out; every page of a batch has the same number."""
    batch = len(side.valid_BS)
    visual_BND = visual.reshape(batch, -1, visual.shape[-1])
    if not row.real:
        return visual_BND
    real_BK = side.inputs[row.real].reshape(batch, -1).bool()
    real_BN = real_BK.repeat_interleave(visual_BND.shape[1] // real_BK.shape[1], 1)
    return visual_BND[real_BN].view(batch, -1, visual_BND.shape[-1])


@contextlib.contextmanager
def _heard(loaded: Loaded, row: Apart) -> Iterator[dict[str, Tensor]]:
    """What passes the output head (`text`) and leaves the module of the visual tokens (`visual`) meanwhile."""
    heard: dict[str, Tensor] = {}

    def at_head(_module: Any, arguments: tuple[Tensor, ...]) -> None:
        heard["text"] = arguments[0]

    def at_visual(_module: Any, _arguments: Any, output: Any) -> None:
        heard["visual"] = output if isinstance(output, Tensor) else output[0]

    hooks = [output_head(loaded).register_forward_pre_hook(at_head)]
    modules = dict(loaded.model.named_modules())
    for name in row.visual:
        if name in modules:
            hooks.append(modules[name].register_forward_hook(at_visual))
            break
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()
