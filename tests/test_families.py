"""Model families end to end; `python -m tests.coverage` does for every family there is what is done here for some."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from evlecg.distill import distill
from evlecg.errors import EvlecgError
from evlecg.models import load as models
from evlecg.models.encode import Encoder, Turn, wanted_page_size
from evlecg.models.families import FAMILIES
from evlecg.models.outputs import LOGITS, forward
from evlecg.models.positions import LAYOUTS
from evlecg.recipe import load_recipe
from tests import coverage, tiny
from tests.families import BUILDERS, VARIANTS, gemma_kin, llava_kin

TRAINED = ("llava_next", "idefics2", "qwen3_vl", "qwen3_5", "internvl", "paligemma", "gemma4", "lfm2_vl")
READ = (
    "llava_onevision", "vipllava", "idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl", "gemma3", "gemma3n", "mistral3",
    "aya_vision", "fast_vlm", "granite4_vision", "glm4v", "ovis2", "perception_lm", "deepseek_vl", "janus", "got_ocr2",
)  # fmt: skip
TURN = Turn("Is it fast?", "no")


@pytest.fixture(scope="module")
def partners(tmp_path_factory):
    return coverage.Partners.make(tmp_path_factory.mktemp("partners"))


@pytest.mark.parametrize("family", TRAINED)
def test_a_family_teaches_and_learns(family, partners, tmp_path):
    verdict = coverage.check(family, partners, tmp_path)
    assert verdict.works, verdict


@pytest.mark.parametrize("family", READ)
def test_a_family_is_read_and_saved(family, tmp_path):
    loaded, encoder = coverage.opened(BUILDERS[family](tmp_path / "built"))
    assert loaded.checkpoint.model_type == family
    coverage.examine(loaded, encoder)
    coverage.reload(loaded, encoder, tmp_path / "saved")


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_a_family_is_read_in_all_its_forms(variant, tmp_path):
    coverage.examine(*coverage.opened(VARIANTS[variant](tmp_path)))


def test_gemma3_looks_at_crops_too(tmp_path):
    loaded, encoder = coverage.opened(gemma_kin.gemma3(tmp_path))
    crops = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16, "pan_and_scan_min_ratio_to_activate": 1.2}
    encoder = Encoder(loaded.checkpoint, loaded.processor, size_px=(180, 112))
    encoder.family = dataclasses.replace(encoder.family, processor=crops)
    n_tokens, place, _ = coverage.examine(loaded, encoder)
    assert n_tokens == 3 * 16, "the page, and its left and its right half"
    boxes = encoder.boxes(n_tokens).reshape(3, 16, 4)
    np.testing.assert_allclose(boxes[:, :, 0].min(1), [0, 0, 0.5], atol=0.02)
    np.testing.assert_allclose(boxes[:, :, 2].max(1), [1, 0.5, 1], atol=0.02)
    assert float(place) > 0.9


@pytest.mark.parametrize("family", sorted(name for name, row in FAMILIES.items() if row.refused))
def test_a_refused_family_is_told_so_before_weights_are_read(family, tmp_path):
    assert coverage.refusal(family, tmp_path) == FAMILIES[family].refused


def test_rows_name_families_and_layouts_that_exist():
    assert set(BUILDERS) | set(FAMILIES) <= set(coverage.families())
    assert {row.layout for row in FAMILIES.values()} <= set(LAYOUTS)
    assert {row.logits for row in FAMILIES.values()} <= set(LOGITS)


def test_a_wrong_layout_is_found_out(tmp_path, monkeypatch):
    """What `examine` is worth: rows and columns exchanged, or newlines forgotten, do not pass."""
    loaded, encoder = coverage.opened(llava_kin.llava_next(tmp_path))
    right = encoder.boxes(70)
    monkeypatch.setattr(encoder, "boxes", lambda n_tokens: right[:, [1, 0, 3, 2]])
    with pytest.raises(AssertionError, match="move elsewhere"):
        coverage.examine(loaded, encoder)
    forgotten = np.concatenate([right[right.any(1)], right[~right.any(1)]])
    monkeypatch.setattr(encoder, "boxes", lambda n_tokens: forgotten)
    with pytest.raises(AssertionError, match=r"move elsewhere|without a place"):
        coverage.examine(loaded, encoder)


def test_anyres_tokens_are_the_page_then_rows_that_end_in_a_newline(tmp_path):
    _, encoder = coverage.opened(llava_kin.llava_next(tmp_path))
    assert encoder.size_px == (112, 87), "the paper's shape, as large as the tiles allow"
    boxes = encoder.boxes(70)
    # 8 x 8 patches of the four tiles, of which one row above and one below are padding
    for rows, columns, found in ((4, 4, boxes[:16]), (6, 8, boxes[16:].reshape(6, 9, 4)[:, :8].reshape(-1, 4))):
        row, column = (index.ravel() for index in np.mgrid[:rows, :columns])
        np.testing.assert_allclose(found[:, 0], column / columns, atol=0.03)
        np.testing.assert_allclose(found[:, 2], (column + 1) / columns, atol=0.03)
        if rows == 4:  # the other six rows of patches begin and end a little inside or outside of the page
            np.testing.assert_allclose(found[:, 1], row / rows, atol=0.03)
        else:
            np.testing.assert_allclose((found[:, 1] + found[:, 3]) / 2, (row + 0.5) / rows, atol=0.05)
    assert not boxes[16:].reshape(6, 9, 4)[:, 8].any(), "newlines have no place"


def test_a_page_is_not_larger_than_paper_and_fits_the_tiles():
    from transformers import GotOcr2ImageProcessor, LlavaNextImageProcessor, Qwen2VLImageProcessor

    assert wanted_page_size(Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=12_845_056)) == (1100, 850)
    small = wanted_page_size(Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=200_000))
    assert 0.98 * 200_000 < small[0] * small[1] <= 1.01 * 200_000
    assert wanted_page_size(LlavaNextImageProcessor()) == (672, 519)
    tiles = GotOcr2ImageProcessor(size={"height": 448, "width": 448}, min_patches=1, max_patches=12)
    assert wanted_page_size(tiles) == (448, 448)
    assert wanted_page_size(tiles, {"crop_to_patches": True}) == (4 * 448, 3 * 448)


def test_a_prefix_model_does_not_see_the_answer(tmp_path):
    loaded, encoder = coverage.opened(gemma_kin.paligemma(tmp_path))
    page = coverage.noise(encoder)
    side = encoder.encode([page], [[TURN]])
    answer_S = torch.zeros_like(side.valid_BS[0]).index_fill(0, side.answer_A2[:, 1], True)
    assert torch.equal(side.inputs["token_type_ids"][0], answer_S.long())
    twin = encoder.processor(
        images=[Image.fromarray(page.pixels)], text=["<image>Is it fast?"], suffix=["no"], return_tensors="pt"
    )
    assert torch.equal(side.inputs["input_ids"], twin["input_ids"])
    twin.pop("labels")
    with torch.no_grad():
        expected = loaded.model(**twin).logits[0, side.answer_A2[:, 1] - 1]
        torch.testing.assert_close(forward(loaded, side).answer_logits_AV, expected)


def test_other_counts_in_text_and_features_are_told_at_the_start(partners, tmp_path):
    folder = tiny.llava(tmp_path / "llava")
    settings = folder / "processor_config.json"
    tree = json.loads(settings.read_text())
    tree["patch_size"] = 28
    settings.write_text(json.dumps(tree))
    chosen = load_recipe(None, {"teacher": str(folder), "student": str(partners.student), "data.labels": ["NORM"]})
    with pytest.raises(EvlecgError, match="teacher has 4 image tokens in its text and 16 image features"):
        distill(chosen, data=partners.data, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_package_that_a_processor_needs_is_named(tmp_path, monkeypatch):
    from transformers import AutoProcessor

    def fail(source: str, **options: object) -> None:
        raise ImportError("Package `num2words` is required to run SmolVLM processor.")

    checkpoint = models.inspect(str(tiny.idefics3(tmp_path, weights=False)))
    monkeypatch.setattr(AutoProcessor, "from_pretrained", fail)
    with pytest.raises(EvlecgError, match="needs a package") as caught:
        models.load_processor(checkpoint)
    assert "num2words" in caught.value.hint
