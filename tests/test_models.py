"""Checkpoints, encoding, measured token positions, packing and scores, on real code paths with tiny weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from evlecg.data.store import Prepared
from evlecg.data.tasks import label_samples
from evlecg.errors import EvlecgError
from evlecg.models import load as models
from evlecg.models.encode import Encoder, Turn, wanted_page_size
from evlecg.models.outputs import can_pack, forward, gather_visual, image_matters, tree_mask, tree_positions
from evlecg.models.score import Scorer
from evlecg.page.layout import page_layout
from evlecg.page.render import Page, PageStyle
from tests.families import gemma_kin

TURNS = [
    Turn("Does this ECG show hypertrophy?", "yes"),
    Turn("Does this ECG show myocardial infarction?", "no"),
    Turn("Does this ECG show a normal tracing?", "no"),
]
FAMILIES = ("llava", "idefics3", "idefics3_tiles", "qwen2_vl")


def opened(path: Path) -> tuple[models.Loaded, Encoder]:
    loaded = models.load(models.inspect(str(path)))
    loaded.model.eval()
    return loaded, Encoder(loaded.checkpoint, loaded.processor)


def paper(encoder: Encoder, pixels: np.ndarray) -> Page:
    return Page(pixels, page_layout("3x4+1", size_px=encoder.size_px))


def noise(encoder: Encoder, seed: int = 0) -> Page:
    width, height = encoder.size_px
    return paper(encoder, np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_side_says_what_its_positions_mean(checkpoints, family):
    _, encoder = opened(checkpoints[family])
    side = encoder.encode([noise(encoder)] * 2, [TURNS, TURNS[:1]])
    ids = side.inputs["input_ids"]
    for row, turns in enumerate((TURNS, TURNS[:1])):
        for number, turn in enumerate(turns, start=1):
            chosen = [place for r, place in side.answer_A2.tolist() if r == row and side.block_BS[r, place] == number]
            text = encoder.tokenizer.decode(ids[row, chosen])
            assert text.strip().startswith(turn.answer), text
            read = [
                len(encoder.tokenizer.decode(ids[row, chosen[: n + 1]]).strip().encode()) for n in range(len(chosen))
            ]
            expected = [min(n_bytes, len(turn.answer) + 1) for n_bytes in read]  # the end mark counts as one byte
            assert side.byte_end_BS[row, chosen].tolist() == expected
            assert chosen == list(range(chosen[0], chosen[-1] + 1))
    assert (side.block_BS[1] == -1).sum() == (~side.valid_BS[1]).sum() > 0
    assert (side.block_BS[side.visual_BS] == 0).all(), "the image belongs to the shared prefix"
    assert side.visual_BS.sum(1).tolist() == [side.visual_box_BN4.shape[1]] * 2


@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_earlier_turns_are_read_and_not_learnt(checkpoints, family):
    _, encoder = opened(checkpoints[family])
    earlier = (("Which rhythm?", "sinus rhythm"),)
    turn = Turn("Is it fast?", "no", history=earlier)
    side = encoder.encode([noise(encoder)], [[turn]])
    ids = side.inputs["input_ids"][0]
    answer = ids[side.answer_A2[:, 1]]
    text = encoder.tokenizer.decode(ids[side.valid_BS[0]])
    assert text.index("Which rhythm?") < text.index("sinus rhythm") < text.index("Is it fast?")
    assert encoder.tokenizer.decode(answer, skip_special_tokens=True).strip() == "no"
    first = int(side.visual_BS[0].nonzero().min())
    assert "Which" not in encoder.tokenizer.decode(ids[:first]), "the image comes first"
    alone = encoder.encode([noise(encoder)], [[Turn("Is it fast?", "no")]])
    assert alone.valid_BS.sum() < side.valid_BS.sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_questions_get_the_logits_of_single_ones(checkpoints, family):
    loaded, encoder = opened(checkpoints[family])
    able, why = can_pack(loaded, encoder, noise(encoder), TURNS)
    assert able, why


def test_a_family_that_cannot_pack_is_found_out(tmp_path):
    loaded, encoder = opened(gemma_kin.paligemma(tmp_path))  # its image attends to the question behind it
    able, why = can_pack(loaded, encoder, noise(encoder), TURNS)
    assert not able and "differ" in why


def test_blocks_see_the_prefix_and_themselves_only():
    block_BS = torch.tensor([[0, 0, 1, 1, 2, -1]])
    seen = tree_mask(block_BS, torch.float32)[0, 0] == 0
    expected = torch.tensor(
        [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0],
         [1, 1, 0, 0, 0, 1]]
    ).bool()  # fmt: skip
    assert torch.equal(seen, expected)
    assert tree_positions(block_BS)[0, :5].tolist() == [0, 1, 2, 3, 2]


def test_a_sliding_layer_counts_back_from_a_questions_own_place():
    block_BS = torch.tensor([[0, 0, 1, 1, 2]])
    seen = tree_mask(block_BS, torch.float32, window=2)[0, 0] == 0
    expected = torch.tensor(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 1, 0, 0, 1]]
    ).bool()  # fmt: skip
    assert torch.equal(seen, expected)


def test_tokens_of_one_image_see_one_another():
    block_BS = torch.tensor([[0, 0, 0, 0, 0, 1]])
    two_way_BS = torch.tensor([[True, True, False, True, True, False]])
    seen = tree_mask(block_BS, torch.float32, two_way_BS=two_way_BS)[0, 0] == 0
    expected = torch.ones(6, 6).tril().bool()
    expected[0, 1] = expected[3, 4] = True
    assert torch.equal(seen, expected)


def test_visual_tokens_are_gathered_and_padded():
    hidden_BSD = torch.arange(8.0).reshape(2, 4, 1)
    visual_BS = torch.tensor([[True, False, True, False], [False, False, False, True]])
    assert gather_visual(hidden_BSD, visual_BS)[..., 0].tolist() == [[0.0, 2.0], [7.0, 0.0]]


def test_visual_tokens_tile_the_page(checkpoints):
    for family, across, down in (("llava", 4, 4), ("idefics3", 2, 2), ("qwen2_vl", 4, 3)):
        _, encoder = opened(checkpoints[family])
        boxes = encoder.boxes(across * down)
        column, row = np.meshgrid(np.arange(across), np.arange(down))
        expected = np.stack(
            [column / across, row / down, (column + 1) / across, (row + 1) / down], -1
        ).reshape(-1, 4)  # fmt: skip
        np.testing.assert_allclose(boxes, expected, atol=0.02, err_msg=family)


def test_positions_undo_a_centre_crop(checkpoints):
    loaded, _ = opened(checkpoints["llava"])
    encoder = Encoder(loaded.checkpoint, loaded.processor, size_px=(112, 56))  # twice as wide as the crop
    boxes = encoder.boxes(16)
    assert boxes[:, 0].min() == pytest.approx(0.25, abs=0.02)
    assert boxes[:, 2].max() == pytest.approx(0.75, abs=0.02)


def test_positions_of_tiles_come_before_the_whole_page(checkpoints):
    _, encoder = opened(checkpoints["idefics3_tiles"])
    side = encoder.encode([noise(encoder)], [TURNS[:1]])
    boxes = side.visual_box_BN4[0].numpy()
    n_tiles = len(boxes) // 4
    assert n_tiles > 2
    tile_area = (boxes[:4, 2] - boxes[:4, 0]).sum()
    page_area = (boxes[-4:, 2] - boxes[-4:, 0]).sum()
    assert page_area > 1.5 * tile_area
    np.testing.assert_allclose(boxes[-4:].mean(0), [0.25, 0.25, 0.75, 0.75], atol=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_changes_on_the_page_changes_the_tokens_there(checkpoints, family):
    """The processor and the projector, not our arithmetic, say which tokens a region of the page moves."""
    loaded, encoder = opened(checkpoints[family])
    width, height = encoder.size_px
    page = np.full((height, width, 3), 200, np.uint8)
    changed = page.copy()
    x0, y0, x1, y1 = 0.52, 0.54, 0.98, 0.96  # inside the lower right quarter
    changed[int(y0 * height) : int(y1 * height), int(x0 * width) : int(x1 * width)] = 30
    side = encoder.encode([paper(encoder, page), paper(encoder, changed)], [TURNS[:1]] * 2)
    with torch.no_grad():
        outputs = forward(loaded, side)
    moved_N = (outputs.projected_BND[0] - outputs.projected_BND[1]).norm(dim=-1)
    box_N4 = side.visual_box_BN4[0]
    overlap = (box_N4[:, 2].clamp(max=x1) - box_N4[:, 0].clamp(min=x0)).clamp(min=0) * (
        box_N4[:, 3].clamp(max=y1) - box_N4[:, 1].clamp(min=y0)
    ).clamp(min=0)
    inside = overlap / ((box_N4[:, 2] - box_N4[:, 0]) * (box_N4[:, 3] - box_N4[:, 1])) > 0.3
    assert 0 < inside.sum() < len(inside)
    assert moved_N[inside].mean() > 2 * moved_N[~inside].mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_blanking_the_page_moves_the_answer(checkpoints, family):
    loaded, encoder = opened(checkpoints[family])
    side = encoder.encode([noise(encoder)], [TURNS[:1]])
    assert image_matters(loaded, side) > 1e-4


def test_pages_fit_processors(checkpoints):
    assert wanted_page_size(opened(checkpoints["llava"])[1].processor.image_processor) == (56, 56)
    width, height = wanted_page_size(opened(checkpoints["qwen2_vl"])[1].processor.image_processor)
    assert width * height <= 112 * 112
    assert width / height == pytest.approx(1100 / 850, abs=0.02)


def test_a_missing_weight_is_an_error(checkpoints, tmp_path):
    broken = shutil.copytree(checkpoints["llava"], tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    gone = next(name for name in weights if "vision_tower" in name and name.endswith("fc1.weight"))
    del weights[gone]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EvlecgError, match="missing"):
        models.load(models.inspect(str(broken)))


def test_a_checkpoint_without_a_processor_is_an_error(checkpoints, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoints["llava"] / name, bare / name)
    with pytest.raises(EvlecgError, match="processor"):
        models.load(models.inspect(str(bare)))


def test_what_is_not_a_vision_language_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(EvlecgError, match="image-text-to-text"):
        models.inspect(str(tmp_path))
    with pytest.raises(EvlecgError, match="no such checkpoint"):
        models.inspect("/nowhere/at/all")
    with pytest.raises(EvlecgError, match="did you mean 'student'"):
        models.inspect("builtin:studnet")


@pytest.mark.parametrize("name", ["student", "student-internvl", "student-signal", "teacher-qwen2vl-untrained"])
def test_an_untrained_builtin_depends_on_the_seed_alone(name):
    checkpoint = models.inspect(f"builtin:{name}")
    first, again, other = (
        models.load(checkpoint, seed=seed, labels=("NORM",)).model.state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_likelihoods_of_the_answers(checkpoints, synthetic, family):
    """Against the plain way: one full forward a label and answer, probabilities of the answer's tokens multiplied."""
    loaded, encoder = opened(checkpoints[family])
    prepared = Prepared.open(synthetic)
    samples = label_samples(prepared, prepared.indices("test")[:2], ("NORM", "MI"), "Does this ECG show {description}?")
    scorer = Scorer(loaded, prepared, PageStyle())
    scorer.prove(samples[0])
    assert scorer.way == "packed", scorer.note
    found = {(item.record_id, item.label): item.score for item in scorer.score(samples)}

    from PIL import Image

    from evlecg.models.batch import draw

    for sample in samples:
        page = Image.fromarray(draw(prepared, sample.record_index, encoder.size_px, PageStyle()).pixels)
        for question in sample.questions:
            logp = []
            for choice in question.choices:
                prompt, full = encoder.text(Turn(question.text, choice, ends=False))
                adds = not full.startswith(encoder.tokenizer.bos_token or "\0")
                inputs = encoder.processor(images=[page], text=[full], return_tensors="pt", add_special_tokens=adds)
                n_answer = len(encoder.tokenizer(full, add_special_tokens=adds)["input_ids"]) - len(
                    encoder.tokenizer(prompt, add_special_tokens=adds)["input_ids"]
                )
                with torch.no_grad():
                    logits = loaded.model(**inputs).logits[0].log_softmax(-1)
                ids = inputs["input_ids"][0]
                logp.append(sum(float(logits[p - 1, ids[p]]) for p in range(len(ids) - n_answer, len(ids))))
            expected = 1 / (1 + np.exp(logp[1] - logp[0]))
            assert found[(sample.record_id, question.label)] == pytest.approx(expected, abs=1e-5)
