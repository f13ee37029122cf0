"""What is drawn lies where the layout says, looks as a plain-minded drawing would, and is the same every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import wfdb
from numpy.testing import assert_allclose, assert_array_equal
from scipy.spatial import cKDTree

from evlecg.errors import EvlecgError
from evlecg.page.layout import BASELINE, LAYOUTS, PULSE_S
from evlecg.page.render import TEXT_RGB, TRACE_RGB, PageStyle, _pen_px, page_style, render
from evlecg.recipe import PageConfig

FS_HZ = 250.0
BARE = PageStyle(grid="none", lead_names="none")


def _flat(seconds: float = 10.0) -> np.ndarray:
    return np.zeros((12, round(seconds * FS_HZ)), np.float32)


def _impulse(lead: int, at_s: float, mV: float = 1.0) -> np.ndarray:
    signal_mV = _flat()
    signal_mV[lead, round(at_s * FS_HZ)] = mV
    return signal_mV


def _wavy(seed: int = 0, seconds: float = 10.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    steps = rng.normal(0, 0.05, (12, round(seconds * FS_HZ)))
    return (np.cumsum(steps, axis=1) * 0.3 + 5 * steps).clip(-1, 1).astype(np.float32)


SCALES = {  # page size, speed, gain
    "vision tower": ((168, 168), 25.0, 10.0),
    "landscape": ((420, 325), 25.0, 10.0),
    "upright": ((311, 640), 50.0, 5.0),
    "tiny": ((97, 64), 25.0, 10.0),
    "strip": ((901, 200), 12.5, 20.0),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_an_impulse_lies_in_its_box_at_its_time(name: str, scale: str) -> None:
    size_px, speed_mm_s, gain_mm_mV = SCALES[scale]
    style = PageStyle(layout=name, speed_mm_s=speed_mm_s, gain_mm_mV=gain_mm_mV)
    empty = render(_flat(), FS_HZ, size_px=size_px, style=style)
    layout = empty.layout
    pen_px = _pen_px(layout, style)
    slack_s = (pen_px / 2 + 1.0) / layout.px_per_s + 1 / FS_HZ
    row_px = (layout.row_tops_y[1] - layout.row_tops_y[0]) * size_px[1]
    wave_mV = min(0.6, (BASELINE * row_px - pen_px - 1.5) / layout.px_per_mV)  # as high as its row allows
    for lead in range(12):
        for at_s in (0.6, 3.2, 6.8, 9.4):
            page = render(_impulse(lead, at_s, wave_mV), FS_HZ, size_px=size_px, style=style)
            y_N, x_N = np.nonzero((page.pixels != empty.pixels).any(axis=2))
            shown = [p for p in layout.panels if p.lead == lead and p.window_s[0] <= at_s < p.window_s[1]]
            assert (len(x_N) > 0) == bool(shown)
            points_N2 = np.stack([(x_N + 0.5) / size_px[0], (y_N + 0.5) / size_px[1]], axis=1)
            lead_N, time_s_N = layout.locate(points_N2)
            assert_array_equal(lead_N, lead)
            assert_allclose(time_s_N, at_s, atol=slack_s)
            for panel in shown:
                inside_N = (points_N2[:, 1] >= panel.box[1]) & (points_N2[:, 1] < panel.box[3])
                top_px = panel.baseline_y * size_px[1] - wave_mV * layout.px_per_mV
                assert_allclose(y_N[inside_N].min(), top_px, atol=pen_px / 2 + 1.5)


@pytest.mark.parametrize("names", ["plain", "boxed"])
@pytest.mark.parametrize("size_px", [(168, 168), (512, 512), (1100, 850)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_text_never_hides_the_trace(name: str, size_px: tuple[int, int], names: str) -> None:
    signal_mV = _flat()
    signal_mV += 1.4 * np.sign(np.sin(2 * np.pi * 3.1 * np.arange(2500) / FS_HZ))  # runs through every name
    bare, named = (
        render(signal_mV, FS_HZ, size_px=size_px, style=PageStyle(layout=name, lead_names=how)).pixels.astype(int)
        for how in ("none", names)
    )
    ink = (bare == TRACE_RGB["black"]).all(axis=2)
    assert ink.sum() > 100
    assert_array_equal(named[ink], bare[ink])
    touched = (named != bare).any(axis=2)
    assert named[touched].max(axis=1).min() > TRACE_RGB["black"][0] if touched.any() else size_px[0] < 512
    assert min(TEXT_RGB) - max(TRACE_RGB["black"]) > 60


@pytest.mark.parametrize("size_px", [(33, 47), (47, 33), (101, 997), (1501, 133), (1600, 1200)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_can_be_drawn_at_any_size(name: str, size_px: tuple[int, int]) -> None:
    pages = [render(s, FS_HZ, size_px=size_px, style=PageStyle(layout=name)) for s in (_wavy(), _flat())]
    assert pages[0].pixels.shape == (size_px[1], size_px[0], 3)
    for panel in pages[0].layout.panels:
        x0, y0, x1, y1 = (np.array(panel.box) * [*size_px, *size_px]).round().astype(int)
        inside = (slice(y0, max(y1, y0 + 1)), slice(x0, max(x1, x0 + 1)))
        assert (pages[0].pixels[inside] != pages[1].pixels[inside]).any()


def test_colours_of_trace_and_paper() -> None:
    for style in (PageStyle(grid="none", trace="blue", paper="cream"), PageStyle(grid="grey", trace="red")):
        pixels = render(_flat(), FS_HZ, size_px=(560, 420), style=style).pixels
        darkest = pixels.reshape(-1, 3)[pixels.sum(axis=2).argmin()]
        assert_allclose(darkest, TRACE_RGB[style.trace], atol=2)
        assert_array_equal(pixels[0, 1] if style.grid == "none" else style.paper_rgb, style.paper_rgb)


def test_polarity_up_is_positive() -> None:
    size_px = (560, 420)
    empty = render(_flat(), FS_HZ, size_px=size_px, style=BARE)
    panel = empty.layout.panels[0]
    for mV, is_above in ((0.5, True), (-0.5, False)):
        page = render(_impulse(panel.lead, 1.0, mV), FS_HZ, size_px=size_px, style=BARE)
        y_N, _ = np.nonzero((page.pixels < 128).all(axis=2) & (empty.pixels > 200).all(axis=2))
        assert ((y_N + 0.5) / size_px[1] < panel.baseline_y).mean() == (1.0 if is_above else 0.0)


@pytest.mark.parametrize("size_px", [(224, 224), (420, 320)])
def test_strokes_equal_a_naive_drawing(size_px: tuple[int, int]) -> None:
    """The naive twin: a point is ink where it is nearer to the densely sampled trace than the pen's radius."""
    style = PageStyle(layout="12x1", grid="none", lead_names="none", line_width_mm=0.8)
    signal_mV = _flat()
    signal_mV[5] = _wavy()[5] * 0.3
    page = render(signal_mV, FS_HZ, size_px=size_px, style=style)
    layout, panel = page.layout, page.layout.panels[5]
    x0, y0, x1, y1 = np.array(panel.box) * [*size_px, *size_px]
    columns = np.arange(int(x0) + 5, int(x1) - 5)  # the cut ends at both sides are a matter of taste
    rows = np.arange(int(np.ceil(y0)), int(y1))
    dense_s = np.linspace(0, (signal_mV.shape[1] - 1) / FS_HZ, 100_000)
    dense_mV = np.interp(dense_s, np.arange(signal_mV.shape[1]) / FS_HZ, signal_mV[5])
    trace_N2 = np.stack(
        [x0 + dense_s * layout.px_per_s, panel.baseline_y * size_px[1] - dense_mV * layout.px_per_mV], axis=1
    )
    fine = (np.arange(5) + 0.5) / 5
    x, y = np.meshgrid((columns[:, None] + fine).ravel(), (rows[:, None] + fine).ravel())
    distance_px, _ = cKDTree(trace_N2).query(np.stack([x.ravel(), y.ravel()], axis=1))
    ink = (distance_px <= _pen_px(layout, style) / 2).reshape(len(rows), 5, len(columns), 5).mean(axis=(1, 3))
    drawn = 1 - page.pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1, 0] / 255.0
    drawn = drawn / (1 - 16 / 255)
    assert ink.max() == 1.0 and 0.02 < ink.mean() < 0.6
    assert np.abs(drawn - ink).mean() < 0.012
    assert np.quantile(np.abs(drawn - ink), 0.995) < 0.30


def test_drawing_is_deterministic_and_leaves_the_cached_paper_alone() -> None:
    first = render(_wavy(1), FS_HZ, size_px=(336, 336)).pixels.copy()
    render(_wavy(2), FS_HZ, size_px=(336, 336))
    assert_array_equal(render(_wavy(1), FS_HZ, size_px=(336, 336)).pixels, first)
    assert first.dtype == np.uint8 and first.shape == (336, 336, 3)


def test_a_short_record_leaves_blank_paper() -> None:
    size_px = (560, 420)
    style = PageStyle(layout="12x1", grid="none", lead_names="none")
    page = render(_wavy(seconds=4.0), FS_HZ, size_px=size_px, style=style)
    x0, _, x1, _ = page.layout.panels[0].box
    end_px = (x0 + (x1 - x0) * 0.4) * size_px[0]
    assert (page.pixels[:, int(end_px) + 3 :] == 255).all()
    assert (page.pixels[:, int(end_px) - 6 : int(end_px) - 3] < 128).any()


def test_start_s_shows_a_later_stretch() -> None:
    signal_mV = _wavy(seconds=16.0)
    late = render(signal_mV, FS_HZ, size_px=(336, 336), start_s=4.0).pixels
    assert_array_equal(late, render(signal_mV[:, 1000:], FS_HZ, size_px=(336, 336)).pixels)
    assert (late != render(signal_mV, FS_HZ, size_px=(336, 336)).pixels).any()


def test_calibration_pulse_is_one_millivolt_for_200_ms() -> None:
    size_px = (2200, 1700)
    page = render(_flat(), FS_HZ, size_px=size_px, style=BARE)
    layout = page.layout
    panel = layout.panels[0]
    start_px = int(layout.start_x * size_px[0]) - 2
    dark = page.pixels[: int(panel.box[3] * size_px[1]), :start_px, 0] < 100
    y_N, x_N = np.nonzero(dark)
    assert_allclose(np.ptp(y_N) + 1, layout.px_per_mV + _pen_px(layout, BARE), atol=1.5)
    top_N = x_N[y_N < y_N.min() + 2]
    assert_allclose(np.ptp(top_N) + 1, PULSE_S * layout.px_per_s + _pen_px(layout, BARE), atol=1.5)


def test_absurd_amplitudes_stay_near_their_row() -> None:
    size_px = (560, 420)
    signal_mV = _flat()
    signal_mV[0] = np.where(np.arange(2500) % 200 < 100, 40.0, -40.0)
    page = render(signal_mV, FS_HZ, size_px=size_px, style=BARE)
    empty = render(_flat(), FS_HZ, size_px=size_px, style=BARE)
    y_N, _ = np.nonzero((page.pixels != empty.pixels).any(axis=2))
    row_px = (page.layout.row_tops_y[1] - page.layout.row_tops_y[0]) * size_px[1]
    assert y_N.max() < page.layout.row_tops_y[1] * size_px[1] + 0.5 * row_px
    assert y_N.min() < page.layout.row_tops_y[0] * size_px[1]


def test_grid_fades_and_names_go_on_small_pages() -> None:
    def colours(size: int, style: PageStyle) -> int:
        return len(np.unique(render(_flat(), FS_HZ, size_px=(size, size), style=style).pixels.reshape(-1, 3), axis=0))

    assert colours(96, PageStyle()) < colours(336, PageStyle())
    named = render(_flat(), FS_HZ, size_px=(1100, 850)).pixels
    unnamed = render(_flat(), FS_HZ, size_px=(1100, 850), style=PageStyle(lead_names="none")).pixels
    assert (named != unnamed).any()
    tiny = [
        render(_flat(), FS_HZ, size_px=(128, 128), style=PageStyle(lead_names=how)).pixels for how in ("plain", "none")
    ]
    assert_array_equal(tiny[0], tiny[1])


def test_grid_lines_are_a_millimetre_apart() -> None:
    page = render(_flat(), FS_HZ, size_px=(2200, 1700), style=PageStyle(lead_names="none"))
    row = page.pixels[4, :, 1].astype(int)  # above all traces
    lines = np.flatnonzero((row[1:-1] < row[:-2]) & (row[1:-1] <= row[2:])) + 1
    assert_allclose(np.diff(lines).mean(), page.layout.px_per_mm[0], rtol=0.01)


def test_real_records_render(shared_data: Path) -> None:
    header = next(iter(sorted((shared_data / "ludb").rglob("*.hea"))))
    record = wfdb.rdrecord(str(header.with_suffix("")))
    signal_mV = np.asarray(record.p_signal, np.float32).T
    page = render(signal_mV, float(record.fs), size_px=(1100, 850))
    for panel in page.layout.panels:
        x0, y0, x1, y1 = (np.array(panel.box) * [1100, 850, 1100, 850]).astype(int)
        assert 0.004 < (page.pixels[y0:y1, x0:x1].max(axis=2) < 90).mean() < 0.2


def test_page_style_reads_the_recipe() -> None:
    keys = {
        "layout": "6x2", "speed_mm_s": 50.0, "gain_mm_mV": 5.0, "grid": "blue", "paper": "cream", "trace": "red",
        "line_width_mm": 0.5, "lead_names": "boxed",
    }  # fmt: skip
    assert page_style(PageConfig(**keys)) == PageStyle(**keys)
    assert page_style(PageConfig()) == PageStyle()


@pytest.mark.parametrize(
    ("signal_mV", "fs_hz", "options", "message"),
    [
        (np.zeros((11, 2500)), 250.0, {}, r"\[12, samples\]"),
        (np.zeros(2500), 250.0, {}, r"\[12, samples\]"),
        (np.full((12, 2500), np.nan), 250.0, {}, "NaN"),
        (np.zeros((12, 2500)), 0.0, {}, "samples a second"),
        (np.zeros((12, 2500)), 250.0, {"start_s": 10.0}, "start at"),
        (np.zeros((12, 2500)), 250.0, {"start_s": -1.0}, "start at"),
        (np.zeros((12, 2500)), 250.0, {"style": PageStyle(layout="3x5")}, "'3x4'"),
    ],
)
def test_bad_input_is_named(signal_mV: np.ndarray, fs_hz: float, options: dict, message: str) -> None:
    with pytest.raises(EvlecgError, match=message):
        render(signal_mV, fs_hz, size_px=(336, 336), **options)


def test_bad_styles_are_named() -> None:
    with pytest.raises(EvlecgError, match="'pink'"):
        PageStyle(grid="pinc")
    with pytest.raises(EvlecgError, match="'boxed'"):
        PageStyle(lead_names="boxd")
    with pytest.raises(EvlecgError, match="wide"):
        PageStyle(line_width_mm=0.0)
