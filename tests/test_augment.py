"""Disturbances: reproducible, physical, and never at the price of knowing what lies where."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import wfdb
from numpy.testing import assert_allclose, assert_array_equal

from evlecg.data.store import Prepared
from evlecg.data.tasks import label_samples
from evlecg.errors import EvlecgError
from evlecg.models import load as models
from evlecg.models.batch import BatchBuilder, draw
from evlecg.models.encode import Encoder
from evlecg.page.augment import (
    DISTURBANCES,
    LEVELS,
    MOVES,
    PAGE,
    SIGNAL,
    SWAPS,
    Augmenter,
    augmenter,
    single,
    swap_electrodes,
)  # fmt: skip
from evlecg.page.layout import LAYOUTS
from evlecg.page.render import PageStyle, render
from evlecg.recipe import AugmentConfig
from evlecg.schema import LEADS

FS_HZ = 250.0
# a strength of each that is well seen
STRONG = {
    "swap": 1.0, "scale": 0.3, "wander_mV": 0.4, "mains_mV": 0.1, "muscle_mV": 0.1, "flat_leads": 2, "start_s": 1.5,
    "creases": 3, "tint": 0.2, "rotate_deg": 6.0, "shift": 0.05, "zoom": 0.1, "perspective": 0.05, "shadow": 0.5,
    "brightness": 0.2, "contrast": 0.3, "blur_mm": 0.6, "noise": 0.05, "jpeg": 80,
}  # fmt: skip


def _ecg(seed: int = 0, seconds: float = 10.0) -> np.ndarray:
    """Twelve leads that obey Einthoven's and Goldberger's laws."""
    rng = np.random.default_rng(seed)
    time_s = np.arange(round(seconds * FS_HZ)) / FS_HZ
    beats = np.exp(-(((time_s % 0.8) - 0.4) ** 2) / 2e-4)
    one, two = beats * 0.6 + 0.01 * rng.normal(size=beats.shape), beats * 0.9
    limb = [one, two, two - one, -(one + two) / 2, one - two / 2, two - one / 2]
    return np.array([*limb, *(beats * k for k in (-0.5, -0.3, 0.2, 0.8, 1.1, 0.9))], np.float32)


def _spike(lead: int, at_s: float) -> np.ndarray:
    signal_mV = np.zeros((12, round(10 * FS_HZ)), np.float32)
    signal_mV[lead, round(at_s * FS_HZ)] = 0.5
    return signal_mV


def _page(signal_mV: np.ndarray, size_px: tuple[int, int] = (420, 325), layout: str = "3x4+1"):
    return render(signal_mV, FS_HZ, size_px=size_px, style=PageStyle(layout=layout))


TOGETHER = Augmenter({name: STRONG[name] for name in MOVES}, 1.0, 3, exact=True)


@pytest.mark.parametrize("size_px", [(168, 168), (420, 325)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("moved_by", [*MOVES, "together"])
def test_an_impulse_is_found_where_the_moved_page_says(moved_by: str, layout: str, size_px: tuple[int, int]) -> None:
    augment = TOGETHER if moved_by == "together" else single(moved_by, STRONG[moved_by])
    flat = _page(np.zeros((12, 2500), np.float32), size_px, layout)
    empty = augment.page(flat, epoch=0, index=5)
    boxes_C4, lead_C, time_C2 = empty.layout.cells()
    slack_s = 3.0 / flat.layout.px_per_s
    found = 0
    for lead, at_s in [(0, 0.6), (1, 5.6), (5, 4.4), (6, 6.9), (10, 8.1), (11, 9.4)]:
        page = augment.page(_page(_spike(lead, at_s), size_px, layout), epoch=0, index=5)
        changed_HW = np.abs(page.pixels.astype(int) - empty.pixels).max(axis=2)
        y_N, x_N = np.nonzero(changed_HW > 60)
        points_N2 = np.stack([(x_N + 0.5) / size_px[0], (y_N + 0.5) / size_px[1]], axis=1)
        lead_N, time_s_N = page.layout.locate(points_N2)
        assert_array_equal(lead_N, lead)
        assert_allclose(time_s_N, at_s, atol=slack_s)
        found += len(x_N) > 0
        boxes_c4 = boxes_C4[(lead_C == lead) & (time_C2[:, 0] <= at_s) & (at_s < time_C2[:, 1])]
        assert len(boxes_c4) or not len(x_N)
        if layout != "12x1" and len(x_N):  # cells of half a row's length are no longer upright boxes on a turned page
            inside_NC = (points_N2[:, None] >= boxes_c4[:, :2]).all(2) & (points_N2[:, None] < boxes_c4[:, 2:]).all(2)
            assert inside_NC.any(1).mean() > 0.8
    assert found >= 4  # some may have left the page


def test_a_rotation_is_one_on_the_paper() -> None:
    page = _page(_ecg())
    moved = single("rotate_deg", 5.0).page(page, epoch=0, index=0).layout
    ends_22 = np.array(moved.warp).reshape(3, 3)[:2] @ np.array([[0.3, 0.5, 1], [0.7, 0.5, 1]]).T
    mm = np.array(moved.size_px) / np.array(moved.px_per_mm)
    along = (ends_22[:, 1] - ends_22[:, 0]) * mm
    assert_allclose(np.degrees(np.arctan2(abs(along[1]), along[0])), 5.0, atol=1e-6)
    assert_allclose(np.hypot(*along), 0.4 * mm[0], rtol=1e-6)


def test_what_a_page_gets_depends_on_seed_epoch_and_record_only() -> None:
    page, signal_mV = _page(_ecg()), _ecg()

    def both(seed: int, epoch: int, index: int) -> np.ndarray:
        augment = augmenter(AugmentConfig(level="photo", share=1.0), seed=seed)
        assert augment is not None
        disturbed_mV, _ = augment.signal(signal_mV, FS_HZ, epoch=epoch, index=index)
        pixels = augment.page(page, epoch=epoch, index=index).pixels
        return np.concatenate([disturbed_mV.ravel(), pixels.ravel()])

    first = both(0, 1, 2)
    others = [both(*key) for key in ((1, 1, 2), (0, 2, 2), (0, 1, 3))]
    assert_array_equal(both(0, 1, 2), first)
    n = signal_mV.size
    for other in others:
        assert (other[:n] != first[:n]).any() and (other[n:] != first[n:]).any()
    assert_array_equal(signal_mV, _ecg())
    assert_array_equal(page.pixels, _page(_ecg()).pixels)


@pytest.mark.parametrize("name", DISTURBANCES)
def test_each_disturbance_disturbs_and_leaves_the_others_alone(name: str) -> None:
    signal_mV, page = _ecg(seconds=14.0), _page(_ecg())
    alone = single(name, STRONG[name], seed=2)
    disturbed_mV, start_s = alone.signal(signal_mV, FS_HZ, epoch=0, index=0)
    seen = alone.page(page, epoch=0, index=0)
    assert ((disturbed_mV != signal_mV).any() or start_s > 0) == (name in SIGNAL)
    assert (seen.pixels != page.pixels).any() == (name in PAGE)
    assert (seen.layout != page.layout) == (name in MOVES)
    assert seen.pixels.dtype == np.uint8 and seen.pixels.shape == page.pixels.shape
    assert disturbed_mV.dtype == np.float32 and np.isfinite(disturbed_mV).all()
    other = "noise" if name in SIGNAL else "wander_mV"
    pair = dataclasses.replace(alone, most={**alone.most, other: STRONG[other]})
    if name in SIGNAL:
        assert_array_equal(pair.signal(signal_mV, FS_HZ, epoch=0, index=0)[0], disturbed_mV)
    else:
        assert_array_equal(pair.page(page, epoch=0, index=0).pixels, seen.pixels)


def test_share_is_the_share_of_disturbed_pages_and_amounts_are_drawn_up_to_the_most() -> None:
    augment = augmenter(AugmentConfig(share=0.3, scale=0.2), seed=0)
    assert augment is not None
    ones = np.ones((12, 10), np.float32)
    change_N = np.array([augment.signal(ones, FS_HZ, epoch=0, index=i)[0][0, 0] - 1 for i in range(1500)])
    assert_allclose((change_N != 0).mean(), 0.3, atol=0.04)
    assert_allclose(np.abs(change_N).max(), 0.2, rtol=0.02)
    assert_allclose(np.abs(change_N[change_N != 0]).mean(), 0.1, rtol=0.1)
    assert_allclose((change_N > 0).sum() / (change_N != 0).sum(), 0.5, atol=0.08)


@pytest.mark.parametrize("name", ["wander_mV", "mains_mV", "muscle_mV"])
def test_noise_obeys_the_laws_of_the_leads_and_has_its_size(name: str) -> None:
    nearly = np.full((12, 5000), 1e-9, np.float32)
    noise_mV = single(name, 0.2, seed=4).signal(nearly, 500.0, epoch=0, index=0)[0].astype(float)
    one, two, three, right, left, foot = noise_mV[:6]
    assert_allclose(three, two - one, atol=1e-6)
    assert_allclose(right, -(one + two) / 2, atol=1e-6)
    assert_allclose(left, one - two / 2, atol=1e-6)
    assert_allclose(foot, two - one / 2, atol=1e-6)
    size_mV = np.sqrt((noise_mV**2).mean()) if name == "muscle_mV" else np.abs(noise_mV).max()
    assert_allclose(size_mV, 0.2, rtol=1e-3)
    power_F = (np.abs(np.fft.rfft(noise_mV * np.hanning(5000), axis=1)) ** 2).sum(0)
    hz_F = np.fft.rfftfreq(5000, 1 / 500.0)
    low_hz, high_hz = {"wander_mV": (0, 0.7), "mains_mV": (49.5, 60.5), "muscle_mV": (14, 151)}[name]
    within = power_F[(hz_F >= low_hz) & (hz_F <= high_hz)].sum() / power_F.sum()
    assert within > (0.9 if name == "mains_mV" else 0.98)  # the rest of the hum is its third harmonic


def test_hum_that_a_slow_record_cannot_hold_is_left_out() -> None:
    ones = np.ones((12, 1000), np.float32)
    assert_array_equal(single("mains_mV", 0.2).signal(ones, 100.0, epoch=0, index=0)[0], ones)


def test_exchanged_electrodes_give_the_textbook_leads() -> None:
    signal_mV = _ecg()
    lead = {name: signal_mV[place] for place, name in enumerate(LEADS)}
    expected = {  # what the reversal makes of each lead
        ("RA", "LA"): {"I": -lead["I"], "II": lead["III"], "III": lead["II"], "aVR": lead["aVL"], "aVL": lead["aVR"]},
        ("LA", "LL"): {"I": lead["II"], "II": lead["I"], "III": -lead["III"], "aVL": lead["aVF"], "aVF": lead["aVL"]},
        ("RA", "LL"): {"I": -lead["III"], "II": -lead["II"], "III": -lead["I"], "aVR": lead["aVF"], "aVF": lead["aVR"]},
        ("V1", "V2"): {"V1": lead["V2"], "V2": lead["V1"]},
    }
    for pair, changed in expected.items():
        swapped = swap_electrodes(signal_mV, *pair)
        for place, name in enumerate(LEADS):
            assert_allclose(swapped[place], changed.get(name, lead[name]), atol=1e-6, err_msg=f"{pair} {name}")
    for pair in SWAPS:
        assert_allclose(swap_electrodes(swap_electrodes(signal_mV, *pair), *pair), signal_mV, atol=1e-6)


def test_flat_leads_are_flat_and_stay_so_under_noise() -> None:
    augment = Augmenter({"flat_leads": 3, "wander_mV": 0.3}, 1.0, 0, exact=True)
    disturbed_mV, _ = augment.signal(_ecg(), FS_HZ, epoch=0, index=0)
    assert (~disturbed_mV.any(axis=1)).sum() == 3


def test_pages_begin_later_but_not_too_late() -> None:
    for seconds, latest_s in ((30.0, 4.0), (12.0, 2.4), (10.0, 2.0)):
        starts = [
            Augmenter({"start_s": 4.0}, 1.0, 0).signal(_ecg(seconds=seconds), FS_HZ, epoch=0, index=i)[1]
            for i in range(60)
        ]
        assert latest_s * 0.8 < max(starts) <= latest_s + 1e-9


def test_what_light_and_paper_do() -> None:
    page = _page(_ecg(), (700, 541))
    before = page.pixels.astype(float)

    def after(name: str) -> np.ndarray:
        return single(name, STRONG[name], seed=1).page(page, epoch=0, index=0).pixels.astype(float)

    for name in ("creases", "tint", "shadow"):
        assert (after(name) <= before + 1).all() and (after(name) < before - 20).mean() > 0.001
    assert_allclose((before - after("shadow")).max(), 255 * STRONG["shadow"], atol=25)
    assert abs(np.median(after("brightness") - before)) > 3 or (after("brightness") - before).max() > 45
    edges = [np.abs(np.diff(image, axis=1)).mean() for image in (before, after("blur_mm"))]
    assert edges[1] < 0.8 * edges[0]
    grey = dataclasses.replace(page, pixels=np.full((400, 400, 3), 128, np.uint8))
    noisy = single("noise", 0.05).page(grey, epoch=0, index=0).pixels.astype(float)
    assert_allclose([noisy.mean(), noisy.std()], [128, 0.05 * 255], rtol=0.02)
    assert 0.5 < np.abs(after("jpeg") - before).mean() < 12


def test_student_and_teacher_see_the_same_page_at_their_own_size() -> None:
    augment = augmenter(AugmentConfig(level="photo", share=1.0), seed=0)
    assert augment is not None
    small, large = (augment.page(_page(_ecg(), size), epoch=0, index=0).layout for size in ((168, 168), (1100, 850)))
    assert small.warp is not None and large.warp is not None
    assert_allclose(small.warp, large.warp, atol=0.02)  # but for the shapes of their papers


def test_sections_and_levels() -> None:
    assert augmenter(AugmentConfig(), seed=0) is None
    assert augmenter(AugmentConfig(level="photo", share=0.0), seed=0) is None
    photo = augmenter(AugmentConfig(level="photo", noise=0.0, swap=0.1), seed=0)
    assert photo is not None and "noise" not in photo.most and photo.most["swap"] == 0.1
    assert photo.most["rotate_deg"] == LEVELS["photo"]["rotate_deg"]
    assert all("swap" not in level and "flat_leads" not in level for level in LEVELS.values())
    keys = {item.name for item in dataclasses.fields(AugmentConfig)}
    assert keys == {*DISTURBANCES, "level", "share", "teacher"}
    assert set(STRONG) == set(DISTURBANCES)


def test_bad_input_is_named() -> None:
    with pytest.raises(EvlecgError, match="at most 30"):
        augmenter(AugmentConfig(rotate_deg=45.0), seed=0)
    with pytest.raises(EvlecgError, match=r"augment\.share is at most 1"):
        augmenter(AugmentConfig(level="light", share=2.0), seed=0)
    with pytest.raises(EvlecgError, match="different seconds"):
        augmenter(AugmentConfig(start_s=1.0, teacher=False), seed=0)
    with pytest.raises(EvlecgError, match="'rotate_deg'"):
        single("rotate", 1.0)
    assert single("noise", 0.0).page(_page(_ecg()), epoch=0, index=0).layout.warp is None


def test_recorded_ecgs_can_still_be_read(shared_data: Path) -> None:
    header = next(iter(sorted((shared_data / "ludb").rglob("*.hea"))))
    record = wfdb.rdrecord(str(header.with_suffix("")))
    signal_mV = np.asarray(record.p_signal, np.float32).T
    augment = augmenter(AugmentConfig(level="photo", share=1.0), seed=0)
    assert augment is not None
    for index in range(4):
        disturbed_mV, start_s = augment.signal(signal_mV, float(record.fs), epoch=0, index=index)
        page = render(disturbed_mV, float(record.fs), size_px=(1100, 850), start_s=start_s)
        seen = augment.page(page, epoch=0, index=index).pixels.mean(axis=2)
        middle = seen[200:650, 200:900]
        assert 0.01 < (middle < np.median(middle) - 50).mean() < 0.25


def _builder(checkpoints, synthetic, augment):
    prepared = Prepared.open(synthetic)
    samples = label_samples(prepared, prepared.indices("train").tolist(), ("NORM", "MI"), "Is it {description}?")
    student, teacher = (models.inspect(str(checkpoints[name])) for name in ("idefics3", "llava"))
    encoders = [Encoder(one, models.load_processor(one)) for one in (student, teacher)]
    return BatchBuilder(prepared, samples, PageStyle(), encoders[0], encoders[1], packed=True, augment=augment)


def test_batches_keep_positions_on_the_paper(checkpoints, synthetic) -> None:
    clean = _builder(checkpoints, synthetic, None)
    builder = dataclasses.replace(clean, augment=single("zoom", 0.2))
    expected, batch, next_epoch = clean([0, 1]), builder([0, 1]), dataclasses.replace(builder, epoch=1)([0, 1])
    for side, plain in ((batch.student, expected.student), (batch.teacher, expected.teacher)):
        torch.testing.assert_close(side.cell_box_BC4, plain.cell_box_BC4)
        assert not torch.equal(side.visual_box_BN4, plain.visual_box_BN4)
    for encoder, side in ((clean.student, batch.student), (clean.teacher, batch.teacher)):
        for row, index in enumerate((0, 1)):
            record = clean.samples[index].record_index
            layout = draw(clean.prepared, record, encoder.size_px, PageStyle(), augment=builder.augment).layout
            seen_N4 = encoder.boxes(int(side.visual_BS[row].sum()))
            assert_array_equal(side.visual_box_BN4[row].numpy(), layout.to_paper(seen_N4))
    torch.testing.assert_close(batch.cell_lead_C, expected.cell_lead_C)
    again = builder([1, 0])
    torch.testing.assert_close(again.student.inputs["pixel_values"].flip(0), batch.student.inputs["pixel_values"],
                               rtol=0, atol=0)  # fmt: skip
    drawn = [draw(clean.prepared, 0, (168, 168), PageStyle(), augment=single("noise", 0.1), epoch=e) for e in (0, 1)]
    assert (drawn[0].pixels != drawn[1].pixels).any()
    assert next_epoch.student.visual_mask_BN.any()


def test_the_teacher_may_see_clean_pages(checkpoints, synthetic) -> None:
    clean = _builder(checkpoints, synthetic, None)
    apart = dataclasses.replace(single("rotate_deg", 8.0), teacher=False)
    expected, batch = clean([0, 1]), dataclasses.replace(clean, augment=apart)([0, 1])
    torch.testing.assert_close(batch.teacher.inputs["pixel_values"], expected.teacher.inputs["pixel_values"])
    assert not torch.equal(batch.student.inputs["pixel_values"], expected.student.inputs["pixel_values"])
