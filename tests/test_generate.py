"""Greedy answers against a plain loop over forward calls; padding, end marks, dialogues."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from evlecg.data.store import Prepared
from evlecg.errors import EvlecgError
from evlecg.models import load as models
from evlecg.models.batch import draw
from evlecg.models.encode import Turn
from evlecg.models.generate import Generator, prompts
from evlecg.models.outputs import forward
from evlecg.page.render import PageStyle
from tests.families import BUILDERS

FAMILIES = ("llava", "idefics3", "idefics3_tiles", "qwen2_vl")
ASKED = [
    (0, Turn("Which rhythm?", "sinus rhythm")),
    (1, Turn("Please write a clinical report based on this ECG image, and say which rhythm is seen.", "")),
    (2, Turn("Why?", "", history=(("Which rhythm is seen in lead II?", "sinus rhythm"),))),
    (3, Turn("The axis?", "")),
]


def generator(path: Path, synthetic: Path, n: int = 12) -> Generator:
    loaded = models.load(models.inspect(str(path)))
    return Generator(loaded, Prepared.open(synthetic), PageStyle(), max_new_tokens=n)


def plainly(made: Generator, index: int, turn: Turn, n: int) -> tuple[list[int], float]:
    """The likeliest token, again and again, by whole forward calls without a cache; and the narrowest win."""
    page = draw(made.prepared, index, made.encoder.size_px, made.style)
    side = made.encoder.encode([page], [[Turn(turn.question, "", ends=False, history=turn.history)]])
    inputs, said, margin = dict(side.inputs), [], float("inf")
    length = inputs["input_ids"].shape[1]
    for _ in range(n):
        with torch.no_grad():
            logits = made.loaded.model(**inputs).logits[0, -1]
        best = logits.topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        said.append(int(best.indices[0]))
        if said[-1] in made.ends:
            break
        for key, value in inputs.items():
            if value.shape[:2] == (1, length):
                new = {"input_ids": said[-1], "attention_mask": 1}.get(key, int(value[0, -1]))
                inputs[key] = torch.cat([value, torch.tensor([[new]])], 1)
        length += 1
    return said, margin


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_token_by_token_forward(checkpoints, synthetic, family):
    made = generator(checkpoints[family], synthetic)
    made.loaded.model.generation_config.repetition_penalty = 5.0  # a checkpoint's own file may say so
    made.prove(0, [turn for _, turn in ASKED])
    assert made.padded, made.padding_note
    answers = made.generate(ASKED)
    for (index, turn), answer in zip(ASKED, answers, strict=True):
        said, margin = plainly(made, index, turn, 12)
        assert margin > 1e-5, "a tie: choose another seed"
        ended = said[-1] in made.ends
        assert (answer.n_tokens, answer.ended) == (len(said), ended)
        text = made.encoder.tokenizer.decode(said[:-1] if ended else said, skip_special_tokens=True).strip()
        assert answer.text == text
    assert len({answer.text for answer in answers}) > 1
    alone = [made.generate([one])[0] for one in ASKED]
    assert alone == answers


def test_a_family_that_cannot_be_padded_gets_batches_of_one_length(checkpoints, synthetic, monkeypatch):
    made = generator(checkpoints["llava"], synthetic, n=4)
    inner = made.loaded.model.forward

    @functools.wraps(inner)  # transformers reads its signature
    def blind(*given, attention_mask=None, **named):  # a model that does not look at its mask
        seen = None if attention_mask is None else torch.ones_like(attention_mask)
        return inner(*given, attention_mask=seen, **named)

    expected = [made.generate([one])[0] for one in ASKED]
    monkeypatch.setattr(made.loaded.model, "forward", blind)
    turns = [turn for _, turn in ASKED]
    made.prove(0, turns)
    assert not made.padded and "logits differ" in made.padding_note
    for places in made.batches([*turns, *turns], 8):
        assert len({made.length((turns * 2)[place]) for place in places}) == 1
    assert made.generate(ASKED) == expected


@pytest.mark.parametrize("family", ["janus", "mllama", "florence2", "paligemma"])
def test_families_of_other_forms_answer_too(synthetic, tmp_path, family):
    """A template that ends in a space, masks of image and text, a decoder of its own, no template."""
    made = generator(BUILDERS[family](tmp_path), synthetic, n=6)
    turns = [turn for _, turn in ASKED]
    made.prove(0, turns)
    assert made.padded, made.padding_note
    answers = made.generate(ASKED)
    assert answers == [made.generate([one])[0] for one in ASKED]


def test_a_family_that_generates_from_another_prompt_is_found_out(checkpoints, synthetic, monkeypatch):
    """BLIP's captioner drops the last token of what it is given."""
    made = generator(checkpoints["idefics3"], synthetic, n=4)
    inner = made.loaded.model.generate

    def drops(input_ids, attention_mask, **named):
        return inner(input_ids=input_ids[:, :-1], attention_mask=attention_mask[:, :-1], **named)

    monkeypatch.setattr(made.loaded.model, "generate", drops)
    with pytest.raises(EvlecgError, match="does not generate from the prompt"):
        made.prove(0, [turn for _, turn in ASKED])


def test_batches_hold_like_lengths_longest_first(checkpoints, synthetic):
    made = generator(checkpoints["idefics3"], synthetic)
    made.padded = True
    turns = [Turn("Why " * n, "") for n in (1, 9, 3, 7, 5)]
    assert made.batches(turns, 2) == [[1, 3], [4, 2], [0]]
    made.prove(0, turns[:1])
    assert not made.padded and made.padding_note == "all prompts are of one length"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_stops_where_its_turn_ends(checkpoints, synthetic, family):
    """Training writes the end mark behind an answer; that very token stops generation."""
    made = generator(checkpoints[family], synthetic)
    mark = made.encoder.answer_ids(Turn("Rhythm?", "sinus rhythm", ends=True))
    mark = mark[len(made.encoder.answer_ids(Turn("Rhythm?", "sinus rhythm", ends=False)))]
    assert mark in made.ends
    head = made.loaded.model.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[0])
    bias[mark] = 1e4
    head.register_forward_hook(lambda module, given, result: result + bias)
    (answer,) = made.generate(ASKED[:1])
    assert (answer.text, answer.n_tokens, answer.ended) == ("", 1, True)


def test_a_template_may_end_turns_with_another_mark_than_the_text(checkpoints, synthetic):
    made = generator(checkpoints["idefics3"], synthetic)
    tokenizer = made.loaded.processor.tokenizer
    mark, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<end_of_utterance>", "<|endoftext|>"))
    tokenizer.eos_token = "<|endoftext|>"
    made.loaded.model.generation_config.eos_token_id = None
    assert Generator(made.loaded, made.prepared, made.style).ends == sorted([mark, end])
    made.loaded.model.generation_config.eos_token_id = [7]
    assert Generator(made.loaded, made.prepared, made.style).ends == sorted([7, mark, end])


def test_prompts_lose_their_answers_and_are_padded_on_the_left():
    inputs = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [8, 4, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "pixel_values": torch.rand(2, 3, 4, 4),
        "cross_attention_mask": torch.tensor([[[1], [2], [3], [4]], [[5], [6], [0], [0]]]),
    }
    moved = prompts(inputs, torch.tensor([1, 1]), pad_id=9)
    assert moved["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert moved["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert moved["cross_attention_mask"].tolist() == [[[1], [2], [3]], [[0], [0], [5]]]
    assert moved["pixel_values"] is inputs["pixel_values"]
    decoder = {"decoder_input_ids": torch.tensor([[1, 3], [1, 4]]), "decoder_attention_mask": torch.ones(2, 2).long()}
    moved = prompts({"input_ids": torch.tensor([[5, 6], [7, 0]]), **decoder}, torch.tensor([1, 1]), pad_id=9)
    assert moved["input_ids"].tolist() == [[5, 6], [7, 0]] and moved["decoder_input_ids"].tolist() == [[1], [1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_token_is_predicted_as_in_training(checkpoints, synthetic, family):
    """Also where the template ends in a space, which training reads as a part of the answer's first token."""
    made = generator(checkpoints[family], synthetic, n=1)
    template = made.encoder.processor.chat_template
    head, closing = template[: template.rindex("{% endif %}")], "{% endif %}"
    for ending in ("", " "):
        made.encoder.processor.chat_template = head + ending + closing
        made.encoder._tails.clear()
        result, _ = made._run(made._inputs(ASKED[:1]), max_new_tokens=1, output_logits=True)
        page = draw(made.prepared, 0, made.encoder.size_px, made.style)
        side = made.encoder.encode([page], [[ASKED[0][1]]])
        with torch.no_grad():
            expected = forward(made.loaded, side).answer_logits_AV[0]
        torch.testing.assert_close(result.logits[0][0], expected, atol=1e-4, rtol=1e-4)
