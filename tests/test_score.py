"""Every way to score gives the likelihoods of one plain forward pass an answer; wordings, calibration, options."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from evlecg.data.store import Prepared
from evlecg.data.tasks import label_samples
from evlecg.errors import EvlecgError
from evlecg.models import load as models
from evlecg.models.batch import draw
from evlecg.models.encode import Turn
from evlecg.models.outputs import forward
from evlecg.models.prefix import _copied, _tensors, forward_shared
from evlecg.models.score import PACKED, ROWS, SHARED, Answering, Scorer
from evlecg.page.render import PageStyle, empty_page
from evlecg.schema import Question, Sample
from tests.families import BUILDERS

WAYS = {  # what is taken first
    "llava": PACKED, "gemma3": PACKED, "qwen3_5": SHARED, "lfm2_vl": SHARED, "nemotron_h_omni": SHARED,
    "molmo2": SHARED, "paligemma": ROWS,
}  # fmt: skip
SEVERAL = Answering({"yes": ("yes", "it is present"), "no": ("no", "not there")})
LETTERS = ("A. sinus rhythm", "B. atrial flutter", "C. none")
CHOICE = Question("What does this ECG show?\n" + "\n".join(LETTERS), LETTERS[1], LETTERS, kind="multiple_choice")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("built"), {}

    def of(family: str) -> models.Loaded:
        if family not in made:
            made[family] = models.load(models.inspect(str(BUILDERS[family](folder / family))))
        return made[family]

    return of


@pytest.fixture(scope="module")
def small(checkpoints):
    return models.load(models.inspect(str(checkpoints["llava"])))


def samples_of(prepared: Prepared, n: int = 2) -> list[Sample]:
    return label_samples(prepared, prepared.indices("test")[:n], ("NORM", "MI", "HYP"), "Does it show {description}?")


@torch.no_grad()
def plainly(scorer: Scorer, page, question: Question, answer: str) -> tuple[float, int]:
    """Log likelihood of one answer by a forward pass of its own, and its tokens."""
    side = scorer.encoder.encode([page], [[Turn.of(question, answer, ends=False)]])
    logp_AV = forward(scorer.loaded, side).answer_logits_AV.double().log_softmax(-1)
    return float(logp_AV.gather(1, side.answer_ids_A[:, None]).sum()), len(side.answer_ids_A)


@pytest.mark.parametrize("family", WAYS)
def test_the_ways_give_the_scores_of_one_forward_pass_an_answer(built, checkpoints, synthetic, family):
    loaded = models.load(models.inspect(str(checkpoints["llava"]))) if family == "llava" else built(family)
    prepared = Prepared.open(synthetic)
    samples = samples_of(prepared)
    # one record has a question less: its shared words, and so its prefix, may be more
    samples[1] = dataclasses.replace(samples[1], questions=samples[1].questions[1:])
    for answering in (Answering(), SEVERAL):
        scorer = Scorer(loaded, prepared, PageStyle(), answering=answering)
        scorer.prove(samples[0])
        assert scorer.way == WAYS[family], scorer.note
        found = list(scorer.score(samples))
        asked = [(sample, question) for sample in samples for question in sample.questions]
        assert [(item.record_id, item.label) for item in found] == [(s.record_id, q.label) for s, q in asked]
        for item, (sample, question) in zip(found, asked, strict=True):
            page = draw(prepared, sample.record_index, scorer.view, PageStyle())
            written = [answering.written(question, choice) for choice in question.choices]
            yes, no = (sum(math.exp(plainly(scorer, page, question, way)[0]) for way in ways) for ways in written)
            assert item.score == pytest.approx(yes / (yes + no), abs=1e-4)
    assert len({round(item.score, 5) for item in found}) > 1, "all scores alike show nothing"


def test_a_packing_family_scores_the_same_in_all_ways(small, synthetic):
    prepared = Prepared.open(synthetic)
    samples = samples_of(prepared, 3)
    found = {}
    for way in (PACKED, SHARED, ROWS):
        scorer = Scorer(small, prepared, PageStyle(), answering=SEVERAL)
        scorer.way = way
        found[way] = [item.score for item in scorer.score(samples)]
    np.testing.assert_allclose(found[PACKED], found[ROWS], atol=1e-5)
    np.testing.assert_allclose(found[SHARED], found[ROWS], atol=1e-5)


def test_the_page_is_read_once(built, synthetic):
    prepared = Prepared.open(synthetic)
    samples = samples_of(prepared)
    loaded = built("lfm2_vl")
    scorer = Scorer(loaded, prepared, PageStyle())
    scorer.prove(samples[0])
    rows = []
    hook = loaded.model.get_input_embeddings().register_forward_pre_hook(lambda _m, given: rows.append(given[0].shape))
    list(scorer.score(samples))
    hook.remove()
    (pages, length), *tails = rows
    assert pages == 2 and sum(shape[0] for shape in tails) == sum(
        len(scorer._turns(question)) for sample in samples for question in sample.questions
    )
    assert max(shape[1] for shape in tails) < length, "questions are shorter than page and question"


def test_copies_of_a_cache_leave_it_as_it_was(built, synthetic):
    prepared = Prepared.open(synthetic)
    samples = samples_of(prepared)
    scorer = Scorer(built("qwen3_5"), prepared, PageStyle())
    pages = [draw(prepared, sample.record_index, scorer.view, PageStyle()) for sample in samples]
    side = scorer.encoder.encode(pages, [[Turn.of(q, ends=False) for q in sample.questions] for sample in samples])
    first = forward_shared(scorer.loaded, side)
    torch.testing.assert_close(forward_shared(scorer.loaded, side), first)
    with torch.no_grad():
        cache = scorer.loaded.model(**side.inputs, use_cache=True).cache
    before = [tensor.clone() for tensor in _tensors(cache)]
    assert any(tensor.dtype.is_floating_point for tensor in before)
    twin = _copied(cache, torch.tensor([1, 0, 1]))
    for tensor in _tensors(twin):
        tensor.zero_()
    for tensor, kept in zip(_tensors(cache), before, strict=True):
        assert torch.equal(tensor, kept)


def test_blank_paper_is_what_an_answer_is_set_against(small, synthetic):
    prepared = Prepared.open(synthetic)
    samples = samples_of(prepared)
    scorer = Scorer(small, prepared, PageStyle(), answering=Answering(calibration="blank"))
    paper = empty_page(size_px=scorer.view)
    plain = Scorer(small, prepared, PageStyle())
    shifts: dict[str, set[float]] = {}
    for found, before in zip(scorer.choose(samples), plain.choose(samples), strict=True):
        question = found.question
        prior = [plainly(plain, paper, question, choice)[0] for choice in question.choices]
        expected = (before.p_C.log() - torch.tensor(prior, dtype=torch.float64)).softmax(0)
        torch.testing.assert_close(found.p_C, expected, atol=1e-5, rtol=0)
        shift = float((found.p_C.log() - before.p_C.log()).diff())
        shifts.setdefault(question.label, set()).add(round(shift, 4))
    assert {len(values) for values in shifts.values()} == {1}, "a label's log odds move by one constant: AUROC stays"
    assert len({value for values in shifts.values() for value in values}) == 3


def test_options_are_answered_by_line_letter_or_text(small, synthetic):
    prepared = Prepared.open(synthetic)
    sample = Sample(0, prepared.record_ids[0], (CHOICE,))
    for options, written in (("line", LETTERS), ("letter", ("A", "B", "C")),
                             ("text", ("sinus rhythm", "atrial flutter", "none"))):  # fmt: skip
        scorer = Scorer(small, prepared, PageStyle(), answering=Answering(options=options))
        page = draw(prepared, 0, scorer.view, PageStyle())
        values = [plainly(scorer, page, CHOICE, answer)[0] / (len(answer) if options == "text" else 1)
                  for answer in written]  # fmt: skip
        (found,) = scorer.choose([sample])
        torch.testing.assert_close(found.p_C, torch.tensor(values, dtype=torch.float64).softmax(0), atol=1e-5, rtol=0)
        assert found.choice == LETTERS[int(np.argmax(values))]
    by = {options: Answering(options=options) for options in ("letter", "text")}
    body = dataclasses.replace(CHOICE, choices=("Sinus rhythm.", "B", "(C)"))  # as some data sets write them
    assert [by["letter"].written(body, choice) for choice in body.choices] == [("A",), ("B",), ("C",)]
    assert [by["text"].written(body, choice) for choice in body.choices] == [
        ("sinus rhythm",), ("atrial flutter",), ("none",),
    ]  # fmt: skip
    listed = Question("Options: sinus rhythm, none", "none", ("sinus rhythm", "none"))
    assert by["text"].written(listed, "none") == ("none",)
    with pytest.raises(EvlecgError, match="has no letter"):
        by["letter"].written(listed, "none")


def test_what_cannot_be_worded_or_calibrated_is_told():
    with pytest.raises(EvlecgError, match="unknown calibration 'blanc'"):
        Answering(calibration="blanc")
    with pytest.raises(EvlecgError, match="written in no way"):
        Answering({"yes": ()})
