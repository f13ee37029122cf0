"""Byte-aligned groups between any two tokenizers: they cover the answer exactly, in order."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch.testing import assert_close
from transformers import LlavaConfig, PreTrainedTokenizerFast

from evlecg.losses.bridge import END, answer_groups, class_log_probabilities, shared_classes
from evlecg.models import load as loading
from evlecg.models.encode import Encoder, Turn
from evlecg.models.vocabulary import spelt_tokens
from evlecg.schema import Side
from tests.tiny import (
    CORPUS,
    IDEFICS_TEMPLATE,
    LLAVA_TEMPLATE,
    QWEN_TEMPLATE,
    byte_level_tokenizer,
    metaspace_tokenizer,
)


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece in the manner of BERT, every character of the corpus a piece, so that nothing is unknown."""
    characters = sorted({char for text in CORPUS for char in text if not char.isspace()})
    words = ["yes", "no", "sinus", "rhythm", "##s", "##th", "normal"]
    vocab = ["[UNK]", "[PAD]", "</s>", "<image>", "<s>", *words, *characters, *(f"##{char}" for char in characters)]
    tokenizer = Tokenizer(models.WordPiece({token: place for place, token in enumerate(dict.fromkeys(vocab))},
                                           unk_token="[UNK]"))  # fmt: skip
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", bos_token="<s>",
                                   eos_token="</s>", additional_special_tokens=["<image>"])  # fmt: skip


TAGS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<image>", "<end_of_utterance>", "<|image_pad|>",
        "<|vision_start|>", "<|vision_end|>"]  # fmt: skip
KINDS = {
    "byte-level": (lambda: byte_level_tokenizer(700, TAGS, eos_token="<|im_end|>", pad_token="<|endoftext|>"),
                   QWEN_TEMPLATE, "<|image_pad|>"),
    "byte-level-2": (lambda: byte_level_tokenizer(330, TAGS, eos_token="<end_of_utterance>", pad_token="<|endoftext|>"),
                     IDEFICS_TEMPLATE, "<image>"),
    "metaspace": (lambda: metaspace_tokenizer(640, ["<s>", "</s>", "<pad>", "<image>"], bos_token="<s>",
                                              eos_token="</s>", pad_token="<pad>"), LLAVA_TEMPLATE, "<image>"),
    "wordpiece": (wordpiece_tokenizer, LLAVA_TEMPLATE, "<image>"),
}  # fmt: skip
_ENCODERS: dict[str, Encoder] = {}


class _Template:
    """A processor as far as text goes: the tokenizer and the chat template that the tiny checkpoints use."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str) -> None:
        self.tokenizer, self.chat_template = tokenizer, template

    def apply_chat_template(self, messages, **kwargs):
        return self.tokenizer.apply_chat_template(messages, chat_template=self.chat_template, **kwargs)


def encoder(kind: str) -> Encoder:
    if kind not in _ENCODERS:
        build, template, image = KINDS[kind]
        tokenizer = build()
        checkpoint = loading.Checkpoint(
            name=kind, source="", model_type="llava", config=LlavaConfig(), trained=False, width=8,
            vocab_size=len(tokenizer), image_token_id=tokenizer.convert_tokens_to_ids(image),
        )  # fmt: skip
        _ENCODERS[kind] = Encoder(checkpoint, _Template(tokenizer, template), size_px=(56, 56))
    return _ENCODERS[kind]


def text_side(kind: str, answers: list[str]) -> tuple[Side, list[list[tuple[int, int]]]]:
    """A side of one row a question without its image, and (token id, byte end) of every answer token."""
    tails = [encoder(kind)._tail(Turn("Which rhythm?", answer)) for answer in answers]
    width = max(len(tail.ids) for tail in tails)
    block = torch.full((len(tails), width), -1)
    ends = torch.zeros(len(tails), width, dtype=torch.long)
    places, ids, told = [], [], []
    for row, tail in enumerate(tails):
        block[row, : len(tail.ids)] = 1
        ends[row, : len(tail.ids)] = torch.tensor(tail.byte_end)
        chosen = [place for place, flag in enumerate(tail.is_answer) if flag]
        places += [(row, place) for place in chosen]
        ids += [tail.ids[place] for place in chosen]
        told.append([(tail.ids[place], tail.byte_end[place]) for place in chosen])
    nothing = torch.zeros(len(tails), 0, 4)
    side = Side({}, block >= 0, block, ends, torch.tensor(places), torch.tensor(ids), torch.zeros_like(block).bool(),
                nothing, nothing[..., 0].bool(), nothing)  # fmt: skip
    return side, told


PAIRS = [(first, second) for first in KINDS for second in KINDS if first < second]
TEXT = (
    st.text(st.sampled_from("yesno sinu rhtm,.0123-äß€心電🫀\u200d\n"), min_size=1, max_size=24)
    .map(str.strip)
    .filter(len)
)


@pytest.mark.parametrize(("student", "teacher"), [pair for pair in PAIRS if "wordpiece" not in pair])
@given(answers=st.lists(TEXT, min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_groups_cover_every_answer_exactly_and_in_order(student, teacher, answers):
    sides = [text_side(kind, answers) for kind in (student, teacher)]
    groups = answer_groups(sides[0][0], sides[1][0])
    opened = -1
    for (_, told), group_A, first_G in zip(
        sides, (groups.student_A, groups.teacher_A), (groups.student_first_G, groups.teacher_first_G), strict=True
    ):
        assert (group_A >= 0).all(), "both sides read the whole answer and its end"
        assert (group_A.diff() >= 0).all(), "in order"
        assert sorted(set(group_A.tolist())) == list(range(len(groups))), "no group is empty on either side"
        flat = [(row, end) for row, tokens in enumerate(told) for _, end in tokens]
        reached = {}
        for place, group in enumerate(group_A.tolist()):
            reached[group] = flat[place]  # the last token of a group says where it ends
            assert flat[place][0] == flat[int(first_G[group])][0], "a group stays in its answer"
        for row, answer in enumerate(answers):
            ends = [end for group, (where, end) in sorted(reached.items()) if where == row]
            assert ends == sorted(set(ends)), "every group reads at least one byte"
            assert ends[-2:] == [len(answer.encode()), len(answer.encode()) + 1] or ends == [len(answer.encode()) + 1]
        mine = {group: end for group, (_, end) in reached.items()}
        if opened == -1:
            opened = mine
        assert mine == opened, "both sides stand at the same bytes"
    assert int(groups.opens_G.sum()) == len(answers)


@pytest.mark.parametrize("other", ["byte-level", "metaspace"])
def test_wordpiece_answers_are_covered(other):
    """WordPiece loses white space that it cannot spell, so its answers are words with single spaces."""
    answers = ["yes", "sinus rhythm, 75", "ST-depression"]
    first, second = text_side("wordpiece", answers), text_side(other, answers)
    groups = answer_groups(first[0], second[0])
    for (_, told), group_A in zip((first, second), (groups.student_A, groups.teacher_A), strict=True):
        assert (group_A >= 0).all() and (group_A.diff() >= 0).all()
        assert [tokens[-1][1] for tokens in told] == [len(answer.encode()) + 1 for answer in answers]


def test_parts_of_one_character_stay_together():
    side, told = text_side("byte-level", ["心"])
    other, _ = text_side("metaspace", ["心"])
    assert len(told[0]) > 2, "three bytes and the end mark"
    groups = answer_groups(side, other)
    assert groups.student_A.tolist() == [0] * (len(told[0]) - 1) + [1]


def test_an_answer_that_one_side_cuts_off_leaves_its_rest_without_a_group():
    student, _ = text_side("byte-level", ["yes", "no"])
    teacher, _ = text_side("metaspace", ["yes", "no"])
    keep = torch.tensor([place for place, (row, _) in enumerate(teacher.answer_A2.tolist()) if row == 1])
    cut = dataclasses.replace(teacher, answer_A2=teacher.answer_A2[keep], answer_ids_A=teacher.answer_ids_A[keep])
    groups = answer_groups(student, cut)
    assert (groups.student_A[student.answer_A2[:, 0] == 0] == -1).all()
    assert (groups.student_A[student.answer_A2[:, 0] == 1] >= 0).all() and (groups.teacher_A >= 0).all()


@pytest.mark.parametrize("kind", list(KINDS))
def test_token_bytes_spell_the_text(kind):
    one = encoder(kind)
    tokens = spelt_tokens(one, len(one.tokenizer) + 3)
    assert tokens[-3:] == (None, None, None), "rows beyond the tokenizer stand for nothing"
    text = "yes sinus rhythm" if kind == "wordpiece" else "yes, sinus rhythm äß 心 75"
    ids = one.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(tokens[place] or b"?" for place in ids).strip() == text.encode()
    assert tokens.count(END) == 1 and tokens[one.tokenizer.eos_token_id] == END
    assert tokens[one.checkpoint.image_token_id] is None


def test_shared_classes_by_hand():
    student = [b"yes", b" yes", b"no", b"maybe", None, END]
    teacher = [None, END, b" no", b" yes", b"perhaps"]
    first, second, n = shared_classes(student, teacher, opening=True)
    names = sorted({b"yes", b"no", END})
    assert n == 4 and first.tolist() == [names.index(b"yes"), names.index(b"yes"), names.index(b"no"), 3, 3,
                                         names.index(END)]  # fmt: skip
    assert second.tolist() == [3, names.index(END), names.index(b"no"), names.index(b"yes"), 3]
    first, second, n = shared_classes(student, teacher, opening=False)
    assert n == 3 and first.tolist() == [2, 1, 2, 2, 2, 0] and second.tolist() == [2, 0, 2, 1, 2]


def test_class_probabilities_are_sums_and_carry_gradients():
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    classes = torch.tensor([0, 1, 1, 2, 2, 2])
    found = class_log_probabilities(logits.log_softmax(-1), classes, 4)
    p = logits.softmax(-1)
    expected = torch.stack([p[:, classes == k].sum(-1) for k in range(3)], -1).log()
    assert_close(found[:, :3], expected)
    assert (found[:, 3] == -torch.inf).all(), "a class without tokens"
    torch.autograd.gradcheck(lambda x: class_log_probabilities(x.log_softmax(-1), classes, 4)[:, :3], (logits,))
    far = class_log_probabilities(torch.tensor([[-2000.0, -2001.0, 0.0]]), torch.tensor([0, 0, 1]), 2)
    assert_close(far, torch.tensor([[-2000 + float(torch.log1p(torch.exp(torch.tensor(-1.0)))), 0.0]]))


def test_groups_of_packed_pages(checkpoints):
    """Through the real encoders: two models, several questions in one row."""
    from tests.test_models import TURNS, noise

    sides = []
    for name in ("llava", "idefics3"):
        checkpoint = loading.inspect(str(checkpoints[name]))
        one = Encoder(checkpoint, loading.load_processor(checkpoint))
        sides.append(one.encode([noise(one)] * 2, [TURNS, TURNS[:2]]))
    groups = answer_groups(*sides)
    assert int(groups.opens_G.sum()) == 5
    assert (groups.student_A >= 0).all() and (groups.teacher_A >= 0).all()
    rows = [side.answer_A2[first, 0] for side, first in
            zip(sides, (groups.student_first_G, groups.teacher_first_G), strict=True)]  # fmt: skip
    assert torch.equal(*rows)
