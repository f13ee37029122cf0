"""Answers as text: greedy, one page a prompt, in the checkpoint's own chat template, up to the end of the turn.

Prompts of one length need no padding. Prompts of several lengths are padded on the left, where the next token is
predicted at the end of every row; whether a checkpoint then says what it says to each prompt alone is tried once
(`prove`), as families differ in whether their positions follow the mask.

Shape legend: B batch rows, S positions of prompt and answer, T positions of the prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evlecg.data.store import Prepared
from evlecg.errors import EvlecgError
from evlecg.models.batch import draw
from evlecg.models.encode import Encoder, Turn
from evlecg.models.load import Loaded, quiet
from evlecg.models.outputs import forward, to_device, tolerance
from evlecg.page.render import PageStyle
from evlecg.schema import Side

ANY_ANSWER = "A"  # stands where an answer will
PROVED_TOKENS = 3  # the first is read off the padded prompt, the others off its cache


@dataclass(frozen=True)
class Generated:
    """One answer.

    Attributes:
        text: without special tokens and surrounding white space.
        n_tokens: made, the end-of-turn mark included.
        ended: the model ended its turn; otherwise it was cut off at `max_new_tokens`.
    """

    text: str
    n_tokens: int
    ended: bool


class Generator:
    """Answers questions about prepared pages.

    Args:
        loaded: model and processor, on the device to use.
        prepared: prepared folder that record indices point into.
        style: how pages look.
        size_px: page size; None: what the processor wants.
        max_new_tokens: where an answer is cut off.

    Attributes:
        padded: prompts of several lengths share a batch.
        padding_note: why, or why not.
    """

    def __init__(
        self,
        loaded: Loaded,
        prepared: Prepared,
        style: PageStyle,
        *,
        size_px: tuple[int, int] | None = None,
        max_new_tokens: int = 1024,
    ) -> None:
        self.loaded = loaded
        self.prepared = prepared
        self.style = style
        self.encoder = Encoder(loaded.checkpoint, loaded.processor, size_px=size_px)
        self.max_new_tokens = max_new_tokens
        self.ends = self._end_of_turn()
        self.padded = False
        self.padding_note = "not tried"

    def _end_of_turn(self) -> list[int]:
        """Ids after which nothing more is said: what the template writes behind an answer, and the model's own."""
        behind = [self.encoder.answer_ids(Turn("", ".", ends=ends)) for ends in (True, False)]
        marks = set(behind[0][len(behind[1]) : len(behind[1]) + 1])
        added = self.encoder.tokenizer.added_tokens_decoder
        marks = {mark for mark in marks if mark in added and added[mark].special}  # or the template closes with text
        own = self.loaded.model.generation_config.eos_token_id
        for ids in (own, self.encoder.tokenizer.eos_token_id):
            marks |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])
        if not marks:
            raise EvlecgError("the checkpoint has no mark that ends a turn", where=self.loaded.checkpoint.name,
                              hint="set eos_token in its tokenizer")  # fmt: skip
        return sorted(marks)

    def length(self, turn: Turn) -> int:
        """Tokens of a question's prompt, the image counted as one."""
        return len(self.encoder.tokenizer(self.encoder.text(turn)[0])["input_ids"])

    def batches(self, turns: Sequence[Turn], batch_size: int) -> list[list[int]]:
        """Places of the turns, those of like length together: the longest first, so that memory fails early or never.

        Where padding is not proven, a batch holds one length.
        """
        lengths = [self.length(turn) for turn in turns]
        batches: list[list[int]] = []
        for place in sorted(range(len(turns)), key=lambda place: -lengths[place]):
            last = batches[-1] if batches else []
            alike = self.padded or (bool(last) and lengths[last[0]] == lengths[place])
            if last and len(last) < batch_size and alike:
                last.append(place)
            else:
                batches.append([place])
        return batches

    @torch.no_grad()
    def prove(self, record_index: int, turns: Sequence[Turn]) -> None:
        """Tries the shortest and the longest of some prompts before all are answered.

        The first token must be predicted as training predicts it. If both prompts in one batch get the logits of each
        alone, prompts are padded from then on.

        Raises:
            EvlecgError: the family's own generation reads something else than the prompt.
        """
        by_length = sorted(turns, key=self.length)
        asked = [(record_index, by_length[0]), (record_index, by_length[-1])]
        try:
            alone = [self._first_logits([one])[0] for one in asked]
        except (IndexError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise EvlecgError(
                f"family {self.loaded.checkpoint.model_type!r} cannot generate with the installed transformers",
                where=self.loaded.checkpoint.name, hint=f"{type(error).__name__}: {str(error)[:200]}",
            ) from error  # fmt: skip
        allowed = tolerance(self.loaded.model)
        outputs = forward(self.loaded, to_device(self._side(asked[1:]), self.loaded.model.device))
        found, expected = alone[1][0][0], outputs.answer_logits_AV[0].float()
        if float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6)) > allowed:
            raise EvlecgError(
                f"family {self.loaded.checkpoint.model_type!r} does not generate from the prompt that it is given",
                where=self.loaded.checkpoint.name, hint="--protocol likelihood scores labels without generating",
            )  # fmt: skip
        if self.length(by_length[0]) == self.length(by_length[-1]):
            self.padded, self.padding_note = False, "all prompts are of one length"
            return
        try:
            together = self._first_logits(asked)
        except EvlecgError:
            raise
        except Exception as error:  # families that cannot read a padded prompt fail in their own ways
            self.padded = False
            self.padding_note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            return
        difference = max(_difference(*both) for both in zip(together, alone, strict=True))
        self.padded, self.padding_note = difference <= allowed, f"logits differ by {difference:.1e} of the largest"

    def _first_logits(self, asked: Sequence[tuple[int, Turn]]) -> list[tuple[Tensor, list[int]]]:
        """Logits [steps, V] of every prompt's first answer tokens, and those tokens."""
        settings = {"max_new_tokens": PROVED_TOKENS, "min_new_tokens": PROVED_TOKENS, "output_logits": True}
        result, start = self._run(self._inputs(asked), **settings)
        logits_BTV = torch.stack(result.logits, dim=1).float()
        return list(zip(logits_BTV, result.sequences[:, start:].tolist(), strict=True))

    @torch.no_grad()
    def generate(self, asked: Sequence[tuple[int, Turn]]) -> list[Generated]:
        """Answers one batch.

        Args:
            asked: (record index, question with its history) of every row; answers of the turns are not looked at.

        Returns:
            An answer a row, in order. In the same batch or alone a model says the same, but where two tokens tie
            within rounding.
        """
        answers: dict[int, Generated] = {}
        for rows in self._rows_together(asked):
            inputs = self._inputs([asked[row] for row in rows])
            result, start = self._run(inputs, max_new_tokens=self.max_new_tokens)
            for row, ids in zip(rows, result.sequences[:, start:].tolist(), strict=True):
                answers[row] = self._answer(ids)
        return [answers[row] for row in range(len(asked))]

    def _rows_together(self, asked: Sequence[tuple[int, Turn]]) -> Iterator[list[int]]:
        """Rows that may share a forward pass: all, or those of one length."""
        if self.padded:
            yield list(range(len(asked)))
            return
        groups: dict[int, list[int]] = {}
        for row, (_, turn) in enumerate(asked):
            groups.setdefault(self.length(turn), []).append(row)
        yield from groups.values()

    def _answer(self, ids: list[int]) -> Generated:
        stop = next((place for place, token in enumerate(ids) if token in self.ends), None)
        said = ids if stop is None else ids[:stop]
        text = self.encoder.tokenizer.decode(said, skip_special_tokens=True).strip()
        return Generated(text, len(ids) if stop is None else stop + 1, stop is not None)

    def _side(self, asked: Sequence[tuple[int, Turn]]) -> Side:
        """The rows that training would read, with an answer that stands for any."""
        pages = [draw(self.prepared, index, self.encoder.size_px, self.style) for index, _ in asked]
        turns = [
            Turn(turn.question, ANY_ANSWER, ends=False, history=turn.history, label=turn.label) for _, turn in asked
        ]
        return self.encoder.encode(pages, [[turn] for turn in turns])

    def _inputs(self, asked: Sequence[tuple[int, Turn]]) -> dict[str, Any]:
        """What the model reads before it answers: the row that training would read, up to the answer.

        Not the prompt's own tokens: where a template ends in a space, that space is part of the answer's first token.
        """
        side = self._side(asked)
        n_answer_B = torch.bincount(side.answer_A2[:, 0], minlength=len(asked))
        return to_device(prompts(side.inputs, n_answer_B, self.encoder.pad_id), self.loaded.model.device)

    def _run(self, inputs: dict[str, Any], **settings: Any) -> tuple[Any, int]:
        """What `generate` of the model returns, and where its answers start."""
        from transformers import GenerationConfig

        config = GenerationConfig(
            do_sample=False, num_beams=1, use_cache=True, eos_token_id=self.ends, pad_token_id=self.encoder.pad_id,
            return_dict_in_generate=True,
            # greedy means the likeliest token: what a checkpoint's own file says on repeats does not hold
            repetition_penalty=1.0, no_repeat_ngram_size=0, **settings,
        )  # fmt: skip
        with quiet():  # advice on settings that are the checkpoint's
            result = self.loaded.model.eval().generate(**inputs, generation_config=config)
        return result, inputs[_text_key(inputs)].shape[1]


def prompts(inputs: dict[str, Any], n_answer_B: Tensor, pad_id: int) -> dict[str, Any]:
    """A model's inputs without the answers at the end of their text, padded on the left; pixels stay.

    Args:
        inputs: padded on the right.
        n_answer_B: tokens of every row's answer.
        pad_id: of the text.
    """
    ids_key = _text_key(inputs)
    mask_BS = inputs[ids_key.replace("input_ids", "attention_mask")]
    kept_B1 = mask_BS.sum(1, keepdim=True) - n_answer_B[:, None]
    longest = int(kept_B1.max())
    from_BT = torch.arange(longest)[None] - (longest - kept_B1)
    rows_B1 = torch.arange(len(mask_BS))[:, None]
    cut = dict(inputs)
    for key, value in inputs.items():
        of_text = isinstance(value, Tensor) and value.shape[:2] == mask_BS.shape  # masks of images have more axes
        if of_text and key.startswith("decoder_") == ids_key.startswith("decoder_"):
            cut[key] = value[rows_B1, from_BT.clamp(min=0)]
            cut[key][from_BT < 0] = pad_id if key == ids_key else 0
    return cut


def _text_key(inputs: dict[str, Any]) -> str:
    """The text that the answer is written in: a decoder's own, where there is one."""
    return "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"


def _difference(one: tuple[Tensor, list[int]], other: tuple[Tensor, list[int]]) -> float:
    """Largest difference, as a share of the largest logit, up to the first step at which the texts part."""
    steps = 1
    while steps < len(one[1]) and one[1][:steps] == other[1][:steps]:
        steps += 1
    logits, others = one[0][:steps], other[0][:steps]
    return float((logits - others).abs().max() / others.abs().max().clamp_min(1e-6))
