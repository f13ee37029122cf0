"""Families whose image, question and answer are not one text: layout, teacher forcing, widths, scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evlecg.data.store import Prepared
from evlecg.data.tasks import label_samples
from evlecg.errors import EvlecgError
from evlecg.losses.objective import EvlObjective
from evlecg.models import load as models
from evlecg.models.apart import APART, apart_of, flattened_boxes
from evlecg.models.batch import draw
from evlecg.models.encode import Encoder, Turn
from evlecg.models.outputs import AnswerHead, can_pack, forward
from evlecg.models.score import Scorer
from evlecg.page.render import PageStyle
from evlecg.recipe import AlignmentConfig, ObjectiveConfig, RelationConfig
from tests import coverage
from tests.coverage import noise
from tests.families import BUILDERS

NAMED = ("mllama", "florence2", "blip-2", "kosmos-2", "pix2struct")
TURNS = [Turn("Is it fast?", "no"), Turn("Does this ECG show myocardial infarction, or hypertrophy?", "yes, it does")]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Tiny checkpoints, opened on demand, once each."""
    root, opened = tmp_path_factory.mktemp("apart"), {}

    def get(family: str) -> tuple[models.Loaded, Encoder]:
        if family not in opened:
            opened[family] = coverage.opened(BUILDERS[family](root / family))
        return opened[family]

    return get


@pytest.mark.parametrize("family", [*NAMED, "blip", "git", "idefics", "t5gemma2", "vision-encoder-decoder"])
def test_a_family_is_read_and_saved(built, tmp_path, family):
    loaded, encoder = built(family)
    coverage.examine(loaded, encoder)
    fresh = models.load(loaded.checkpoint)
    fresh.model.eval()
    coverage.reload(fresh, encoder, tmp_path)


@pytest.mark.parametrize("family", ["mllama", "pix2struct"])
def test_a_family_teaches_and_learns(family, tmp_path):
    partners = coverage.Partners.make(tmp_path / "partners")
    verdict = coverage.check(family, partners, tmp_path)
    assert verdict.works, verdict


@torch.no_grad()
@pytest.mark.parametrize("family", ["florence2", "t5gemma2", "pix2struct", "vision-encoder-decoder"])
def test_answers_have_the_likelihood_of_a_plain_seq2seq_call(built, family):
    """Labels that transformers shifts right by itself give the likelihood of the ids that we shifted."""
    loaded, encoder = built(family)
    side = encoder.encode([noise(encoder)], [TURNS[1:]])
    inputs = dict(side.inputs)
    ids = inputs.pop("decoder_input_ids")
    inputs.pop("decoder_attention_mask")
    places = side.answer_A2[:, 1] - (side.valid_BS.sum(1)[0] - ids.shape[1])
    start = int(places[0])
    assert places.tolist() == list(range(start, ids.shape[1])), "the answer closes the decoder's text"
    labels = torch.cat([ids[:, 1:], ids[:, -1:]], 1)  # back left; the last one falls off again
    logits = loaded.model(**inputs, labels=labels).logits[0].log_softmax(-1)
    expected = logits[places - 1, ids[0, places]].sum()
    found = forward(loaded, side).answer_logits_AV.log_softmax(-1).gather(1, side.answer_ids_A[:, None]).sum()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mllama", "florence2", "blip", "kosmos-2", "instructblip", "pix2struct"])
def test_a_batch_gives_what_its_rows_give_alone(built, family):
    """Positions are contiguous: valid ones first, the encoder's and the decoder's side by side, padding behind."""
    loaded, encoder = built(family)
    pages = [noise(encoder), noise(encoder, 1)]
    side = encoder.encode(pages, [TURNS[:1], TURNS[1:]])
    together = forward(loaded, side)
    counts = side.valid_BS.sum(1)
    assert counts[0] < counts[1]
    assert side.valid_BS[0, : counts[0]].all() and not side.valid_BS[0, counts[0] :].any()
    taken = 0
    for row, (page, turn) in enumerate(zip(pages, TURNS, strict=True)):
        alone_side = encoder.encode([page], [[turn]])
        alone = forward(loaded, alone_side)
        torch.testing.assert_close(together.hidden_BSD[row, : counts[row]], alone.hidden_BSD[0], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(together.visual_BND[row], alone.visual_BND[0], atol=1e-4, rtol=1e-3)
        n_answer = len(alone_side.answer_A2)
        torch.testing.assert_close(
            together.answer_logits_AV[taken : taken + n_answer], alone.answer_logits_AV, atol=1e-4, rtol=1e-3
        )
        taken += n_answer
        text = encoder.tokenizer.decode(alone_side.answer_ids_A, skip_special_tokens=True).replace(" ", "")
        assert text == turn.answer.replace(" ", "")
        read_A = alone_side.byte_end_BS[0, alone_side.answer_A2[:, 1]]
        assert read_A[-1] == len(turn.answer) + 1 and bool((read_A.diff() >= 0).all())
        assert not alone_side.byte_end_BS[0, : alone_side.answer_A2[0, 1]].any()


@torch.no_grad()
def test_the_head_reads_the_states_that_the_side_points_to(built):
    for family in ("blip", "florence2", "git"):
        loaded, encoder = built(family)
        side = encoder.encode([noise(encoder), noise(encoder, 1)], [TURNS[:1], TURNS[1:]])
        outputs = forward(loaded, side)
        rows_A, places_A = side.answer_A2.T
        read_AV = AnswerHead(loaded)(outputs.hidden_BSD[rows_A, places_A - 1], side)
        torch.testing.assert_close(read_AV, outputs.answer_logits_AV, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_visual_tokens_come_first_where_they_have_the_width_of_the_text(built):
    loaded, encoder = built("mllama")
    side = encoder.encode([noise(encoder)], [TURNS[:1]])
    outputs = forward(loaded, side)
    n_visual = side.visual_box_BN4.shape[1]
    assert side.visual_BS[0].nonzero().flatten().tolist() == list(range(n_visual))
    torch.testing.assert_close(outputs.hidden_BSD[:, :n_visual], outputs.projected_BND)
    assert loaded.facts.visual_width is None


@torch.no_grad()
def test_visual_tokens_of_another_width_are_no_positions(built):
    loaded, encoder = built("blip")
    side = encoder.encode([noise(encoder)], [TURNS[:1]])
    outputs = forward(loaded, side)
    assert not side.visual_BS.any()
    assert side.visual_mask_BN.all() and side.visual_box_BN4.shape[1] == 17
    assert outputs.visual_BND.shape == (1, 17, 32) and outputs.hidden_BSD.shape[2] == 40
    assert (loaded.facts.width, loaded.facts.visual_width) == (40, 32)


def test_transport_projects_to_the_width_of_the_visual_tokens(built):
    student, teacher = built("blip")[0].facts, built("idefics")[0].facts
    objective = EvlObjective(
        ObjectiveConfig(lambda_m=0, lambda_r=1, lambda_rec=0, lambda_ot=1.0), student=student, teacher=teacher
    )
    assert objective.projection.weight.shape == (32, 32) and student.width == teacher.width == 40


@pytest.mark.parametrize(
    "config",
    [
        ObjectiveConfig(lambda_r=1, lambda_rec=0, lambda_m=1.0, align=AlignmentConfig(heads=4, scope="visual")),
        ObjectiveConfig(
            lambda_rec=0,
            lambda_m=1.0,
            lambda_r=1.0,
            align=AlignmentConfig(heads=4),
            relation=RelationConfig(source="aligned"),
        ),
    ],
)
def test_terms_that_need_visual_tokens_among_the_states_are_refused(built, config):
    student, teacher = built("blip")[0].facts, built("mllama")[0].facts
    with pytest.raises(EvlecgError, match="not among its hidden states"):
        EvlObjective(config, student=student, teacher=teacher)
    EvlObjective(config, student=teacher, teacher=student)


def test_one_question_a_row(built):
    loaded, encoder = built("florence2")
    able, why = can_pack(loaded, encoder, noise(encoder), TURNS)
    assert not able and "not one text" in why
    with pytest.raises(EvlecgError, match="one question a row"):
        encoder.encode([noise(encoder)], [TURNS])


def test_query_tokens_read_the_question_and_never_the_answer(built):
    _, encoder = built("instructblip")
    side = encoder.encode([noise(encoder)], [[Turn("Is it hypertrophy?", "conduction disturbance")]])
    asked = encoder.processor.qformer_tokenizer.decode(side.inputs["qformer_input_ids"][0])
    assert "hypertrophy" in asked and "disturbance" not in asked


def test_tiles_that_hold_no_page_are_dropped(built):
    """A page of one tile leaves three of Llama 3.2's four places empty."""
    loaded, _ = built("mllama")
    narrow = Encoder(loaded.checkpoint, loaded.processor, size_px=(56, 56))
    side = narrow.encode([noise(narrow)], [TURNS[:1]])
    assert side.visual_box_BN4.shape[1] == 17
    assert forward(loaded, side).visual_BND.shape[1] == 17
    np.testing.assert_allclose(side.visual_box_BN4[0, 0], [0, 0, 1, 1], atol=0.02)  # its class token
    np.testing.assert_allclose(side.visual_box_BN4[0, 1], [0, 0, 0.25, 0.25], atol=0.02)


def test_flattened_patches_say_where_they_are():
    patches = torch.tensor([[1.0, 1, 9], [1, 2, 9], [2, 1, 9], [2, 2, 9], [0, 0, 0]])
    boxes = flattened_boxes(patches, 4)
    assert boxes.tolist() == [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]]
    assert flattened_boxes(patches, 5) is None


def test_questions_drawn_onto_the_page_are_refused(built):
    _, encoder = built("pix2struct")
    encoder.processor.image_processor.is_vqa = True
    try:
        with pytest.raises(EvlecgError, match="draws the question"):
            encoder.encode([noise(encoder)], [TURNS[:1]])
    finally:
        encoder.processor.image_processor.is_vqa = False


def test_a_wrong_number_of_visual_tokens_is_found_out(built, monkeypatch):
    loaded, encoder = built("git")
    monkeypatch.setattr(loaded.checkpoint.config.vision_config, "patch_size", 28)
    with pytest.raises(EvlecgError, match="visual tokens"):
        forward(loaded, encoder.encode([noise(encoder)], [TURNS[:1]]))


@torch.no_grad()
@pytest.mark.parametrize("family", ["mllama", "florence2", "blip"])
def test_scores_are_the_likelihoods_of_the_answers(built, synthetic, family):
    loaded, encoder = built(family)
    prepared = Prepared.open(synthetic)
    samples = label_samples(prepared, prepared.indices("test")[:2], ("NORM", "MI"), "Does this ECG show {description}?")
    scorer = Scorer(loaded, prepared, PageStyle())
    scorer.prove(samples[0])
    assert scorer.way == "rows", scorer.note
    found = {(item.record_id, item.label): item.score for item in scorer.score(samples)}
    for sample in samples:
        page = draw(prepared, sample.record_index, encoder.size_px, PageStyle())
        for question in sample.questions:
            logp = []
            for choice in question.choices:
                side = encoder.encode([page], [[Turn.of(question, choice, ends=False)]])
                outputs = forward(loaded, side)
                logp.append(float(outputs.answer_logits_AV.log_softmax(-1).gather(1, side.answer_ids_A[:, None]).sum()))
            expected = 1 / (1 + np.exp(logp[1] - logp[0]))
            assert found[(sample.record_id, question.label)] == pytest.approx(expected, abs=1e-5)


def test_rows_hold_modules_and_config_entries_that_exist(built):
    for family in APART:
        loaded, _ = built(family)
        row = apart_of(loaded.checkpoint.config)
        modules = dict(loaded.model.named_modules())
        assert not row.visual or any(name in modules for name in row.visual), family
        assert not row.head or row.head in modules
