"""Pages and questions as one model reads them: its own processor, its own chat template, its own page size.

Every question about a page becomes a *block* behind a shared prefix (system text and image). Packed, all blocks of a
page stand in one row and do not see one another (tree attention), so that the image is read once however many
questions hang on it; unpacked, each block has a row of its own. Both give the same logits; `models.outputs` proves it
for the checkpoint at hand before packing is used.

Where a visual token looks on the page is measured (positions.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evlecg.errors import EvlecgError
from evlecg.models import apart
from evlecg.models.load import Checkpoint
from evlecg.models.positions import measure_boxes
from evlecg.page.layout import batch_cells
from evlecg.page.render import Page
from evlecg.schema import Question, Side

REMEMBERED_TURNS = 20_000
MOST_APPENDED = 2  # tokens that a processor puts behind the text
PAPER_SHAPE = (1100, 850)  # landscape letter at 100 px an inch: the shape of a page where the processor sets none


@dataclass(frozen=True)
class Turn:
    """One question and the answer that follows it.

    Attributes:
        ends: the end-of-turn mark follows, too.
        history: earlier (question, answer) turns of the same dialogue; the image stands before the first.
        label: the label code that it asks about, if it asks about one.
    """

    question: str
    answer: str
    ends: bool = True
    history: tuple[tuple[str, str], ...] = ()
    label: str | None = None

    @classmethod
    def of(cls, question: Question, answer: str | None = None, *, ends: bool = True) -> Turn:
        """The turn of a question, with its right answer or another one."""
        return cls(question.text, question.answer if answer is None else answer, ends, question.history, question.label)


@dataclass(frozen=True)
class _Tail:
    """Tokens behind the image: ids, which of them belong to the answer, and the answer's bytes read so far."""

    ids: tuple[int, ...]
    is_answer: tuple[bool, ...]
    byte_end: tuple[int, ...]

    @property
    def n_prompt(self) -> int:
        return self.is_answer.index(True) if True in self.is_answer else len(self.ids)


def _messages(turn: Turn) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What was said before the answer, and the answer; the image stands in the first message."""
    said = [*(text for pair in turn.history for text in pair), turn.question, turn.answer]
    messages = [
        {"role": "assistant" if place % 2 else "user", "content": [{"type": "text", "text": text}]}
        for place, text in enumerate(said)
    ]
    messages[0]["content"].insert(0, {"type": "image"})
    return messages[:-1], messages[-1]


class Encoder:
    """Turns pages and questions into one model's half of a batch.

    Args:
        checkpoint: from `load.inspect`.
        processor: the checkpoint's processor.
        size_px: (width, height) of the pages it will get; None lets the processor decide.

    Attributes:
        size_px: (width, height) that pages must have.
    """

    def __init__(self, checkpoint: Checkpoint, processor: Any, *, size_px: tuple[int, int] | None = None) -> None:
        self.checkpoint = checkpoint
        self.family = checkpoint.family
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.apart = apart.apart_of(checkpoint.config)
        self.nothing_asked = Turn("", ".")
        self.size_px = size_px or self._wanted_size()
        pad = self.tokenizer.pad_token_id
        self.image_id = checkpoint.image_token_id
        self.pad_id = pad if pad is not None else (self.tokenizer.eos_token_id or 0)
        self._tails: dict[Turn, _Tail] = {}
        self._boxes: dict[int, np.ndarray] = {}

    def _wanted_size(self) -> tuple[int, int]:
        width, height = wanted_page_size(self.processor.image_processor, getattr(self.processor, "images_kwargs", {}))
        return width * self.family.scale[0], height * self.family.scale[1]

    def text(self, turn: Turn) -> tuple[str, str]:
        """(prompt, prompt with the answer): the checkpoint's chat template, image first."""
        asked, replied = _messages(turn)
        if not getattr(self.processor, "chat_template", None):  # PaliGemma's kind: image and question, then the answer
            image = getattr(self.processor, "image_token", "<image>")
            earlier = "".join(f"{question}\n{answer}\n" for question, answer in turn.history)
            prompt = self.family.prompt.format(image=image, earlier=earlier, question=turn.question)
            return prompt, prompt + turn.answer + ((self.tokenizer.eos_token or "") if turn.ends else "")
        prompt = self.processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        full = self.processor.apply_chat_template([*asked, replied], tokenize=False).rstrip()
        if not full.startswith(prompt) or turn.answer not in full[len(prompt) :]:
            full = prompt + turn.answer + (self.tokenizer.eos_token or "")
        if turn.ends and full.endswith(turn.answer):  # a template that leaves it to the next turn to end this one
            full += self.tokenizer.eos_token or ""
        if not turn.ends:
            full = full[: full.index(turn.answer, len(prompt)) + len(turn.answer)]
        return prompt, full

    def encode(self, pages: Sequence[Page], turns: Sequence[Sequence[Turn]]) -> Side:
        """Builds the half of a batch.

        Args:
            pages: one page a row, of `size_px`.
            turns: the questions of every row, at least one each.

        Returns:
            A `Side` of B = len(pages) rows.
        """
        if self.apart is not None:
            return apart.encode(self, pages, turns)
        tails = [[self._tail(turn) for turn in row] for row in turns]
        rows = self._process([page.pixels for page in pages], [self.text(row[0])[1] for row in turns])
        special = rows["attention_mask"].shape
        rows.pop("labels", None)  # PaliGemma's processor marks all that is not its own suffix as unanswered
        per_token = {
            key: value
            for key, value in rows.items()
            if isinstance(value, Tensor) and value.shape == special and key not in ("input_ids", "attention_mask")
        }
        built: list[dict[str, list[int]]] = []
        for index, row in enumerate(tails):
            keep = rows["attention_mask"][index].bool()
            ids = rows["input_ids"][index][keep].tolist()
            extra = {key: value[index][keep].tolist() for key, value in per_token.items()}
            built.append(self._row(ids, row, extra))
        side = self._pad(built, list(per_token))
        taken = {"input_ids", "attention_mask", *per_token}
        inputs = {key: value for key, value in rows.items() if key not in taken} | side
        return self._side(inputs, built, pages)

    def pixels(self, page: np.ndarray) -> dict[str, Tensor]:
        """What the processor makes of a page alone: `pixel_values`, and what describes them."""
        made = self._process([page], [self.text(self.nothing_asked)[1]])
        ids = made["input_ids"].shape
        return {key: value for key, value in made.items() if isinstance(value, Tensor) and value.shape != ids}

    def answer_ids(self, turn: Turn) -> tuple[int, ...]:
        """Ids of the answer's tokens, in their context."""
        if self.apart is not None:
            return apart.answer_ids(self, turn)
        tail = self._tail(turn)
        return tuple(token for token, answer in zip(tail.ids, tail.is_answer, strict=True) if answer)

    def _process(self, pages: Sequence[np.ndarray], texts: list[str]) -> dict[str, Any]:
        from PIL import Image

        images: list = [Image.fromarray(page) for page in pages]
        if self.family.nested:
            images = [[image] for image in images]
        try:
            return dict(
                self.processor(
                    images=images,
                    text=texts,
                    padding=True,
                    return_tensors="pt",
                    add_special_tokens=self._adds(texts[0]),
                    **self.family.processor,
                )
            )
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise EvlecgError(
                "the checkpoint's processor cannot read a page and a question",
                where=self.checkpoint.name,
                hint=str(error).splitlines()[0] if str(error) else type(error).__name__,
            ) from error

    def _adds(self, text: str) -> bool:
        """Whether the tokenizer still has to add its begin-of-text mark (a template may have written it)."""
        bos = self.tokenizer.bos_token
        return bos is None or not text.startswith(bos)

    def _tail(self, turn: Turn) -> _Tail:
        if turn not in self._tails:
            if len(self._tails) >= REMEMBERED_TURNS:  # reports and dialogues hardly ever repeat
                self._tails.clear()
            self._tails[turn] = self._tokenize_tail(turn)
        return self._tails[turn]

    def _tokenize_tail(self, turn: Turn) -> _Tail:
        prompt, full = self.text(turn)
        encoded = self.tokenizer(full, add_special_tokens=self._adds(full), return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        image_end = self._image_end(prompt)
        start = next((place for place, (begin, _) in enumerate(offsets) if begin >= image_end), len(ids))
        answer_start = full.index(turn.answer, len(prompt)) if turn.answer else len(full)
        answer_stop = answer_start + len(turn.answer)
        # a token belongs to the answer when it ends behind the prompt; end-of-turn marks do, white space before does
        is_answer = tuple(end > len(prompt) for _, end in offsets[start:])
        # the end-of-turn mark counts as one more byte: it is read after the answer, not with its last byte
        byte_end = tuple(
            len(full[answer_start : min(end, answer_stop)].encode()) + (end > answer_stop) if end > answer_start else 0
            for _, end in offsets[start:]
        )
        return _Tail(tuple(ids[start:]), is_answer, byte_end)

    def _image_end(self, prompt: str) -> int:
        """Where the image's placeholder ends in a prompt."""
        named = (getattr(self.processor, name, None) for name in ("image_placeholder_token", "image_token"))
        known = {*named, self.tokenizer.convert_ids_to_tokens(self.image_id)}
        ends = [prompt.rindex(token) + len(token) for token in known if token and token in prompt]
        if not ends:
            raise EvlecgError(
                "the chat template puts no image placeholder into the prompt",
                where=self.checkpoint.name,
                hint=f"the template gave {prompt!r}",
            )
        return max(ends)

    def _row(self, ids: list[int], tails: list[_Tail], extra: dict[str, list[int]]) -> dict[str, list[int]]:
        """One row: the shared prefix, then every question's block."""
        first = tails[0].ids
        start = _last_place(ids, first)
        if start is None:
            raise EvlecgError(
                "the text behind the image is tokenized differently once the image is expanded",
                where=self.checkpoint.name,
                hint="this family needs a row of its own; please report it",
            )
        shared = _common_prefix(tails) if len(tails) > 1 else 0
        prefix = start + shared
        row: dict[str, list[int]] = {
            "input_ids": ids[:prefix], "block": [0] * prefix, "byte_end": [0] * prefix, "answer": [0] * prefix,
        }  # fmt: skip
        for number, tail in enumerate(tails, start=1):
            row["input_ids"] += tail.ids[shared:]
            row["block"] += [number] * (len(tail.ids) - shared)
            row["byte_end"] += tail.byte_end[shared:]
            row["answer"] += [int(flag) for flag in tail.is_answer[shared:]]
        for key, values in extra.items():  # token types and the like: further text is of the type the text had
            row[key] = values[:prefix] + [values[-1]] * (len(row["input_ids"]) - prefix)
        if self.family.answer_type is not None:
            row["token_type_ids"] = [flag * self.family.answer_type for flag in row["answer"]]
        return row

    def _pad(self, built: list[dict[str, list[int]]], extra: list[str]) -> dict[str, Tensor]:
        length = max(len(row["input_ids"]) for row in built)

        def padded(key: str, value: int) -> Tensor:
            return torch.tensor([row[key] + [value] * (length - len(row[key])) for row in built], dtype=torch.long)

        ids = padded("input_ids", self.pad_id)
        mask = torch.tensor([[1] * len(row["block"]) + [0] * (length - len(row["block"])) for row in built])
        return {"input_ids": ids, "attention_mask": mask} | {key: padded(key, 0) for key in extra}

    def _side(self, inputs: dict[str, Any], built: list[dict[str, list[int]]], pages: Sequence[Page]) -> Side:
        length = inputs["input_ids"].shape[1]

        def padded(key: str, value: int) -> Tensor:
            return torch.tensor([row[key] + [value] * (length - len(row[key])) for row in built], dtype=torch.long)

        valid_BS = inputs["attention_mask"].bool()
        visual_BS = (inputs["input_ids"] == self.image_id) & valid_BS
        counts = visual_BS.sum(1).tolist()
        boxes = [page.layout.to_paper(self.boxes(count)) for count, page in zip(counts, pages, strict=True)]
        box_BN4 = torch.zeros(len(built), max(counts), 4)
        for row, box_N4 in enumerate(boxes):
            box_BN4[row, : len(box_N4)] = torch.from_numpy(box_N4)
        mask_BN = (box_BN4[..., 2] > box_BN4[..., 0]) & (box_BN4[..., 3] > box_BN4[..., 1])
        answer_A2 = padded("answer", 0).nonzero()
        return Side(
            inputs=inputs,
            valid_BS=valid_BS,
            block_BS=padded("block", -1),
            byte_end_BS=padded("byte_end", 0),
            answer_A2=answer_A2,
            answer_ids_A=inputs["input_ids"][answer_A2[:, 0], answer_A2[:, 1]],
            visual_BS=visual_BS,
            visual_box_BN4=box_BN4,
            visual_mask_BN=mask_BN,
            cell_box_BC4=torch.from_numpy(batch_cells([page.layout for page in pages])[0]),
        )

    def boxes(self, n_tokens: int) -> np.ndarray:
        """Page box of every visual token, float32 [n_tokens, 4] as x0 y0 x1 y1 in [0,1]; zeros where it sees padding.

        Raises:
            EvlecgError: the family's layout does not come to `n_tokens` (a merge that is not known).
        """
        if n_tokens not in self._boxes:
            self._boxes[n_tokens] = self._measure_boxes(n_tokens)
        return self._boxes[n_tokens]

    def _measure_boxes(self, n_tokens: int) -> np.ndarray:
        if self.apart is not None:
            boxes = apart.boxes(self, n_tokens)
        else:
            text = self.text(self.nothing_asked)[1]
            boxes = measure_boxes(
                lambda page: self._process([page], [text]),
                size_px=self.size_px,
                n_tokens=n_tokens,
                layout=self.family.layout,
                config=self.checkpoint.config,
            )
        if boxes is None:
            raise EvlecgError(
                f"cannot tell where {n_tokens} visual tokens of family {self.checkpoint.model_type!r} lie on the page",
                where=self.checkpoint.name,
                hint="its tokens are not equal shares of its pixels; this family is not supported yet",
            )
        return boxes


def wanted_page_size(image_processor: Any, defaults: Mapping[str, Any] = {}) -> tuple[int, int]:
    """(width, height) of a page that the image processor neither crops nor squeezes more than it must.

    Args:
        image_processor: the checkpoint's.
        defaults: what its processor sets where the image processor's own entry would decide otherwise.
    """
    size = {
        key: value
        for key in ("height", "width", "shortest_edge", "longest_edge")
        if (value := _entry(getattr(image_processor, "size", None), key)) is not None
    }
    pinpoints = getattr(image_processor, "image_grid_pinpoints", None)
    if pinpoints:
        return _anyres_size(pinpoints)
    crop = getattr(image_processor, "crop_size", None)
    if getattr(image_processor, "do_center_crop", False) and crop is not None:
        return int(_entry(crop, "width") or crop), int(_entry(crop, "height") or crop)
    limits = _tile_limits(image_processor, defaults)
    if "height" in size and "width" in size and limits is not None:
        tile = _tile_px(image_processor)
        return _tiled_size(tile or int(size["width"]), tile or int(size["height"]), *limits)
    if "height" in size and "width" in size:
        return int(size["width"]), int(size["height"])
    largest = _entry(getattr(image_processor, "max_image_size", None), "longest_edge")
    if largest is not None and not getattr(image_processor, "do_image_splitting", False):
        return int(largest), int(largest)  # Idefics3 unsplit: one square tile
    width, height = PAPER_SHAPE
    longest = size.get("longest_edge")
    most_patches = getattr(image_processor, "max_patches", None)
    if most_patches is not None:  # Pix2Struct: as many patches as it may have
        patch = image_processor.patch_size
        patch_px2 = patch**2 if isinstance(patch, int) else int(_entry(patch, "height") or 1) ** 2
        scale = min(1.0, math.sqrt(most_patches * patch_px2 / (width * height)))
    elif longest is not None and longest > 10_000:  # the Qwen family counts pixels, not edges
        scale = min(1.0, math.sqrt(longest / (width * height)))
    elif longest is not None:
        scale = longest / width
    elif "shortest_edge" in size:
        scale = size["shortest_edge"] / height
    else:
        scale = 1.0
    return round(width * scale), round(height * scale)


def _anyres_size(pinpoints: Any) -> tuple[int, int]:
    """The largest page of the paper's shape that fits one of the (height, width) that are cut into tiles."""
    width, height = PAPER_SHAPE
    scale = max(min(wide / width, high / height) for high, wide in pinpoints)
    return round(width * scale), round(height * scale)


def _tile_limits(image_processor: Any, defaults: Mapping[str, Any]) -> tuple[int, int] | None:
    """(fewest, most) tiles of the grid that a page is cut into, as wide and high as the page; None where it is not."""
    if defaults.get("crop_to_patches", getattr(image_processor, "crop_to_patches", False)):  # InternVL's kind
        return image_processor.min_patches, image_processor.max_patches
    if getattr(image_processor, "do_image_splitting", False) and hasattr(image_processor, "max_tiles"):  # LFM2-VL
        return image_processor.min_tiles, image_processor.max_tiles
    if getattr(image_processor, "vision_input_type", "") == "thumb+tile":  # Perception LM
        return 1, image_processor.max_num_tiles
    if hasattr(image_processor, "downsampler_stride"):  # Step 3.7
        return 1, (image_processor.max_image_size // image_processor.patch_size) ** 2
    return None


def _tile_px(image_processor: Any) -> int | None:
    """Side of the tiles where it is not the size of the page as a whole."""
    if hasattr(image_processor, "downsampler_stride"):
        return int(image_processor.patch_size)
    return getattr(image_processor, "tile_size", None)


def _tiled_size(tile_width: int, tile_height: int, least: int, most: int) -> tuple[int, int]:
    """The grid of tiles that is nearest the paper's shape; of grids of one shape, the larger."""
    width, height = PAPER_SHAPE
    grids = [(across, down) for across in range(1, most + 1) for down in range(1, most // across + 1)]

    def fit(grid: tuple[int, int]) -> tuple[float, int]:
        return abs(math.log(grid[0] * tile_width * height / (grid[1] * tile_height * width))), -grid[0] * grid[1]

    across, down = min((grid for grid in grids if grid[0] * grid[1] >= least), key=fit)
    return across * tile_width, down * tile_height


def _entry(size: Any, key: str) -> int | None:
    """`size[key]` of a dict or of transformers' SizeDict, None where it is not set."""
    return size.get(key) if isinstance(size, dict) else getattr(size, key, None)


def _last_place(ids: list[int], tail: tuple[int, ...]) -> int | None:
    """Where `tail` begins in `ids`; a processor may append an end of line of its own, which is left out."""
    for start in range(len(ids) - len(tail), max(len(ids) - len(tail) - MOST_APPENDED, 0) - 1, -1):
        if tuple(ids[start : start + len(tail)]) == tail:
            return start
    return None


def _common_prefix(tails: list[_Tail]) -> int:
    """How many prompt tokens all tails share, leaving each at least one of its own before the answer."""
    limit = min(tail.n_prompt for tail in tails) - 1
    shared = 0
    while shared < limit and len({tail.ids[shared] for tail in tails}) == 1:
        shared += 1
    return shared
