"""Signals in a model's form, and the plane that their tokens lie on."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from evlecg.errors import EvlecgError
from evlecg.page.layout import batch_cells, page_layout
from evlecg.page.trace import TraceForm, TraceLayout, trace
from evlecg.schema import LEADS


def sine(frequency_hz=2.0, fs_hz=500.0, seconds=10.0, amplitude_mV=1.0):
    time_s = np.arange(round(fs_hz * seconds)) / fs_hz
    return amplitude_mV * np.sin(2 * np.pi * frequency_hz * time_s)[None] * np.arange(1, 13)[:, None]


@pytest.mark.parametrize("fs_hz", [100.0, 250.0, 500.0, 1000.0, 51.2])
def test_resampling_keeps_what_fits_under_the_new_rate(fs_hz):
    form = TraceForm(fs_hz, round(10 * fs_hz), "channels")
    seen = trace(sine(), 500.0, form)
    assert seen.signal_LT.shape == (12, form.n_samples) and seen.signal_LT.dtype == np.float32
    assert seen.n_recorded == form.n_samples
    inner = slice(round(fs_hz), round(9 * fs_hz))  # filters ring at the ends
    assert_allclose(seen.signal_LT[:, inner], sine(fs_hz=fs_hz)[:, : form.n_samples][:, inner], atol=0.06)


def test_a_window_is_cut_from_where_the_page_begins_and_padded_behind_the_record():
    signal_LT = np.tile(np.arange(1000, dtype=np.float32), (12, 1))  # ten seconds at 100 Hz
    seen = trace(signal_LT, 100.0, TraceForm(100.0, 500, "flattened"), start_s=2.0)
    assert_allclose(seen.signal_LT[0], np.arange(200, 700))
    short = trace(signal_LT, 100.0, TraceForm(100.0, 500, "flattened"), start_s=8.0)
    assert short.n_recorded == 200
    assert_allclose(short.signal_LT[3], [*range(800, 1000), *[0] * 300])


def test_scales():
    signal_LT = sine() + 0.5
    forms = {scale: TraceForm(500.0, 5000, "channels", scale) for scale in ("none", "standard", "range")}
    seen = {scale: trace(signal_LT, 500.0, form).signal_LT for scale, form in forms.items()}
    assert_allclose(seen["none"], signal_LT, atol=1e-5)
    assert abs(seen["standard"].mean()) < 1e-4 and seen["standard"].std() == pytest.approx(1, abs=1e-3)
    ratio = np.ptp(seen["standard"][11]) / np.ptp(seen["standard"][0])
    assert ratio == pytest.approx(12, rel=1e-3), "relative amplitudes of leads survive"
    assert_allclose(seen["range"].min(1), -1, atol=1e-5)
    assert_allclose(seen["range"].max(1), 1, atol=1e-5)
    flat = signal_LT.copy()
    flat[4] = 0.3
    assert_allclose(trace(flat, 500.0, forms["range"]).signal_LT[4], 0)


def test_the_band_takes_away_what_lies_outside():
    wave, hum = sine(5.0), sine(120.0)
    form = TraceForm(500.0, 5000, "channels", band_hz=(0.05, 47.0))
    inner = slice(500, 4500)
    kept = trace(wave + hum, 500.0, form).signal_LT[:, inner]
    assert np.abs(kept[0]).max() == pytest.approx(1, abs=0.15), "what lies inside stays"
    alone = trace(hum, 500.0, form).signal_LT[:, inner]
    assert np.abs(alone[0]).max() < 0.02
    low_only = TraceForm(500.0, 5000, "channels", band_hz=(0.0, 47.0))
    assert_allclose(trace(np.full((12, 5000), 2.0), 500.0, low_only).signal_LT, 2, atol=1e-4)
    high_only = TraceForm(500.0, 5000, "channels", band_hz=(20.0, 0.0))
    assert np.abs(trace(np.full((12, 5000), 2.0), 500.0, high_only).signal_LT).max() < 0.1


def test_bad_signals_are_refused():
    form = TraceForm(100.0, 500, "flattened")
    with pytest.raises(EvlecgError, match=r"\[12, samples\]"):
        trace(np.zeros((8, 100)), 100.0, form)
    with pytest.raises(EvlecgError, match="NaN"):
        trace(np.full((12, 100), np.nan), 100.0, form)
    with pytest.raises(EvlecgError, match="cannot start"):
        trace(np.zeros((12, 100)), 100.0, form, start_s=1.0)


def test_cells_tile_the_plane_and_cells_of_a_page_find_their_place():
    layout = TraceLayout(10.0)
    boxes_C4, lead_C, _ = layout.cells()
    assert len(boxes_C4) == 12 * 8 and sorted(set(lead_C.tolist())) == list(range(12))
    assert ((boxes_C4[:, 2:] - boxes_C4[:, :2]).prod(1)).sum() == pytest.approx(1, abs=1e-5)
    v4 = LEADS.index("V4")
    page = page_layout("3x4+1", size_px=(400, 300))
    _, page_lead_C, page_time_C2 = page.cells()
    on_trace_C4 = layout.boxes(page_lead_C, page_time_C2)
    first = int(np.flatnonzero(page_lead_C == v4)[0])
    assert_allclose(page_time_C2[first], (7.5, 8.75))
    assert_allclose(on_trace_C4[first], (0.75, v4 / 12, 0.875, (v4 + 1) / 12), atol=1e-6)
    short_C4 = TraceLayout(5.0).boxes(page_lead_C, page_time_C2)
    assert not short_C4[first].any(), "a window of five seconds does not reach the seventh"
    assert short_C4[0].any()
    unknown_C4 = layout.boxes(np.array([-1]), np.array([[np.nan, np.nan]]))
    assert not unknown_C4.any()
    together_BC4, _, _ = batch_cells([layout, layout])
    assert_allclose(together_BC4[0], boxes_C4)
