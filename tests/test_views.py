"""Where a classifier's tokens lie: told by what moves when one place of the page or one stretch of a lead changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from evlecg.data.store import Prepared
from evlecg.data.synthetic import generate
from evlecg.data.tasks import label_samples
from evlecg.errors import EvlecgError
from evlecg.models import load as models
from evlecg.models.batch import BatchBuilder, draw_views
from evlecg.models.encode import Turn
from evlecg.models.views import encoder_for, view_of
from evlecg.page.augment import Augmenter
from evlecg.page.render import Page, PageStyle, render
from evlecg.page.trace import Trace, TraceLayout, trace
from evlecg.recipe import SignalConfig
from tests import tiny_classifiers

SIGNAL_NAMES = [*tiny_classifiers.SIGNALS, "hubert_ecg"]
TURN = [Turn("Is it there?", "yes", label="MI")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("classifiers")
    made = {name: tiny_classifiers.write(root / name, name) for name in tiny_classifiers.FAMILIES}
    return made | {"hubert_ecg": tiny_classifiers.hubert_ecg(root / "hubert_ecg")}


@pytest.fixture(scope="module")
def record():
    return next(generate({"test": 1}, seed=0))


def loaded_from(folder, signal=None):
    return models.load(models.inspect(str(folder), trust_remote_code=True), labels=("MI", "NORM"), signal=signal)


def moved(loaded, encoder, before, after, layer="last"):
    """How far each token moves, [N], and the half of the batch that it is of."""
    side = encoder.encode([before, after], [TURN, TURN])
    with torch.no_grad():
        tokens_BNC = loaded.model.eval()(**side.inputs)[layer]
    return (tokens_BNC[1] - tokens_BNC[0]).norm(dim=-1).numpy(), side


def overlaps(box_N4, region_4):
    low, high = np.maximum(box_N4[:, :2], region_4[:2]), np.minimum(box_N4[:, 2:], region_4[2:])
    return (high - low).clip(0).prod(1) > 0


@pytest.mark.parametrize("name", list(tiny_classifiers.PAGES))
@pytest.mark.parametrize("place", [(0.05, 0.1), (0.7, 0.2), (0.4, 0.8)])
def test_tokens_that_move_lie_where_the_page_changed(folders, record, name, place):
    loaded = loaded_from(folders[name])
    encoder = encoder_for(loaded)
    assert encoder.size_px == (56, 56), "nothing is squeezed or cut off"
    page = render(record.signal_mV, record.fs_hz, size_px=encoder.size_px)
    x, y = (round(share * 56) for share in place)
    pixels = page.pixels.copy()
    pixels[y : y + 8, x : x + 8] = 255 - pixels[y : y + 8, x : x + 8]
    region = np.array([x, y, x + 8, y + 8]) / 56
    for layer in ("projected", "last"):
        change_N, side = moved(loaded, encoder, page, Page(pixels, page.layout), layer)
        box_N4 = side.visual_box_BN4[0].numpy()
        assert_allclose([*box_N4[0, :2], *box_N4[-1, 2:]], [0, 0, 1, 1], atol=0.01, err_msg="the whole page is seen")
        inside_N = overlaps(box_N4, region)
        assert 0 < inside_N.sum() < len(inside_N) / 2
        # a convolution's field reaches half a token beyond its own share
        near_N = overlaps(box_N4, region + np.array([-4, -4, 4, 4]) / 56)
        assert near_N[change_N.argmax()], layer
        assert change_N[inside_N].mean() > 2 * change_N[~inside_N].mean(), layer


def test_the_class_token_is_no_visual_token(folders, record):
    loaded = loaded_from(folders["vit"])
    encoder = encoder_for(loaded)
    page = render(record.signal_mV, record.fs_hz, size_px=encoder.size_px)
    side = encoder.encode([page], [TURN])
    assert side.visual_BS.sum() == 16 and side.frame == "page"
    with torch.no_grad():
        found = loaded.model(**side.inputs)
        own = loaded.model.model.vit(side.inputs["pixel_values"]).last_hidden_state
    torch.testing.assert_close(found["last"], own[:, 1:])
    torch.testing.assert_close(found["pooled"], own[:, 0])


@pytest.mark.parametrize(
    ("name", "leads"), [*((name, "auto") for name in SIGNAL_NAMES), ("wav2vec2", "apart"), ("hubert_ecg", "apart")]
)
@pytest.mark.parametrize(("lead", "at_s"), [(0, 0.5), (5, 4.1), (11, 2.6)])
def test_tokens_that_move_lie_where_the_signal_changed(folders, record, name, leads, lead, at_s):
    loaded = loaded_from(folders[name], SignalConfig(leads=leads))
    encoder, form = encoder_for(loaded), loaded.form
    before = trace(record.signal_mV, record.fs_hz, form)
    changed_LT = before.signal_LT.copy()
    span = slice(round(at_s * form.fs_hz), round((at_s + 0.4) * form.fs_hz))
    changed_LT[lead, span] += np.random.default_rng(0).choice([-3.0, 3.0], span.stop - span.start)
    after = Trace(changed_LT, before.layout, before.n_recorded)
    region = before.layout.boxes(np.array([lead]), np.array([[at_s, at_s + 0.4]]))[0]
    change_N, side = moved(loaded, encoder, before, after, "projected")
    box_N4 = side.visual_box_BN4[0].numpy()
    inside_N = overlaps(box_N4, region)
    assert side.frame == "trace" and 0 < inside_N.sum() < len(inside_N) / 2
    assert inside_N[change_N.argmax()]
    row_N = box_N4[:, 1] <= region[1] + 1e-6
    row_N &= box_N4[:, 3] >= region[3] - 1e-6
    assert change_N[inside_N].mean() > 2 * change_N[~inside_N].mean()
    assert row_N[np.argsort(change_N)[-3:]].all(), "of the right lead"


def test_channels_that_are_mixed_span_all_leads(folders, record, monkeypatch):
    """A model that takes twelve channels at once and gives one series of tokens."""
    from transformers import HubertModel

    loaded = loaded_from(folders["hubert_ecg"], SignalConfig(leads="channels"))
    assert isinstance(loaded.model.model, HubertModel)
    kernel = loaded.model.model.feature_extractor.conv_layers[0].conv
    loaded.model.model.feature_extractor.conv_layers[0].conv = torch.nn.Conv1d(
        12, kernel.out_channels, kernel.kernel_size, stride=kernel.stride, bias=kernel.bias is not None
    )
    monkeypatch.setattr(type(loaded.model.model.feature_extractor), "forward", _channels_forward)
    encoder = encoder_for(loaded)
    side = encoder.encode([trace(record.signal_mV, record.fs_hz, loaded.form)], [TURN])
    assert side.inputs["input_values"].shape == (1, 12, 500)
    box_N4 = side.visual_box_BN4[0].numpy()
    assert_allclose(box_N4[:, [1, 3]], np.tile([0, 1], (len(box_N4), 1)))
    assert (np.diff(box_N4[:, 0]) > 0).all() and box_N4[0, 0] == 0
    # a token sees 40 samples of 500, and the next begins 20 later
    assert_allclose(box_N4[3], [0.12, 0, 0.2, 1], atol=1e-6)


def _channels_forward(self, input_values):
    for layer in self.conv_layers:
        input_values = layer(input_values)
    return input_values


def test_what_lies_behind_the_record_is_padding(folders, record):
    for name in SIGNAL_NAMES:
        loaded = loaded_from(folders[name])
        encoder, form = encoder_for(loaded), loaded.form
        short = trace(record.signal_mV[:, : round(2.5 * record.fs_hz)], record.fs_hz, form)
        whole = trace(record.signal_mV, record.fs_hz, form)
        side = encoder.encode([short, whole], [TURN, TURN])
        mask_BN, box_BN4 = side.visual_mask_BN, side.visual_box_BN4
        assert bool(mask_BN[1].all())
        assert mask_BN[0].float().mean() == pytest.approx(2.5 / form.window_s, abs=0.06)  # half a patch
        middle_N = (box_BN4[1, :, 0] + box_BN4[1, :, 2]) / 2 * form.window_s
        assert (middle_N[mask_BN[0]] < 2.5).all() and (middle_N[~mask_BN[0]] >= 2.45).all()
    assert side.inputs.get("past_observed_mask") is None  # HuBERT-ECG's, the last one
    patches = loaded_from(folders["patchtst"])
    observed = encoder_for(patches).encode([trace(record.signal_mV[:, :500], 500.0, patches.form)], [TURN])
    assert observed.inputs["past_observed_mask"][0, :, 0].sum() == 50  # one second at 50 Hz


def test_questions_that_are_none_of_labels_are_refused(folders, record):
    encoder = encoder_for(loaded_from(folders["patchtst"]))
    assert encoder.answer_ids(Turn("?", "yes", label="MI")) == (0,)
    assert encoder.answer_ids(Turn("?", "no", label="MI")) == (1,)
    for turn in (Turn("Write a report of this ECG.", "Sinus rhythm."), Turn("Which?", "A. hypertrophy", label="HYP")):
        with pytest.raises(EvlecgError, match="yes or no to labels"):
            encoder.answer_ids(turn)


def test_student_and_teacher_see_the_same_disturbed_signal(folders, checkpoints, synthetic):
    """Drawn once for a page and two forms of signal: the same stretch of the same disturbed record."""
    prepared = Prepared.open(synthetic)
    forms = [loaded_from(folders[name]).form for name in ("wav2vec2", "hubert_ecg")]
    augment = Augmenter({"scale": 0.5, "start_s": 1.5}, 1.0, seed=3, exact=True)
    page, first, second = draw_views(prepared, 0, [(56, 56), *forms], PageStyle(), augment=augment, epoch=1)
    record = prepared.record(0)
    disturbed_mV, start_s = augment.signal(record.signal_mV, record.fs_hz, epoch=1, index=0)
    assert start_s == 1.5 and not np.array_equal(disturbed_mV, record.signal_mV)
    assert_allclose(first.signal_LT, trace(disturbed_mV, record.fs_hz, forms[0], start_s=1.5).signal_LT)
    assert_allclose(second.signal_LT, trace(disturbed_mV, record.fs_hz, forms[1], start_s=1.5).signal_LT)
    assert isinstance(page, Page)


def test_a_batch_of_a_page_and_a_signal_has_the_pages_cells(folders, checkpoints, synthetic):
    prepared = Prepared.open(synthetic)
    samples = label_samples(prepared, [0, 1], ("NORM", "MI"), "Is it {description}?")
    llava = models.load(models.inspect(str(checkpoints["llava"])))
    page_encoder, signal_encoder = encoder_for(llava), encoder_for(loaded_from(folders["hubert_ecg"]))
    assert view_of(page_encoder) == page_encoder.size_px
    batches = {
        "student": BatchBuilder(prepared, samples, PageStyle(), signal_encoder, page_encoder, packed=True)([0, 1]),
        "teacher": BatchBuilder(prepared, samples, PageStyle(), page_encoder, signal_encoder, packed=True)([0, 1]),
    }
    for role, batch in batches.items():
        assert len(batch.cell_lead_C) == 32 + 12 * 4, "the page's, then the trace's"
        other = getattr(batch, "teacher" if role == "student" else "student").cell_box_BC4
        assert bool(other[:, :32].any(2).all()) and not other[:, 32:].any()
        on_trace_BC4 = getattr(batch, role).cell_box_BC4
        wanted_C4 = TraceLayout(5.0).boxes(batch.cell_lead_C.numpy(), batch.cell_time_C2.numpy())
        assert_allclose(on_trace_BC4.numpy(), np.stack([wanted_C4] * 2))
    alone = BatchBuilder(prepared, samples, PageStyle(), signal_encoder, None, packed=True)([0, 1])
    assert len(alone.cell_lead_C) == 12 * 4, "without a page, the trace's own"
