"""The layout map: complete, on the page, the same cells at every size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from evlecg.errors import EvlecgError
from evlecg.page.layout import LAYOUTS, page_layout
from evlecg.schema import LEADS

SIZES = ((168, 168), (336, 336), (1100, 850), (2200, 1700), (600, 1400), (1600, 400))
STRIP_LEADS = {"3x4": [], "3x4+1": [1], "3x4+3": [1, 6, 10], "6x2": [], "12x1": []}


@pytest.mark.parametrize("size_px", SIZES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_lead_is_shown_inside_the_page(name: str, size_px: tuple[int, int]) -> None:
    layout = page_layout(name, size_px=size_px)
    assert sorted(panel.lead for panel in layout.panels) == sorted([*range(len(LEADS)), *STRIP_LEADS[name]])
    for panel in layout.panels:
        x0, y0, x1, y1 = panel.box
        assert 0 < x0 < x1 < 1 and 0 < y0 < panel.baseline_y < y1 < 1
        seconds = panel.window_s[1] - panel.window_s[0]
        assert_allclose((x1 - x0) * size_px[0], seconds * layout.px_per_s)


@pytest.mark.parametrize("name", LAYOUTS)
def test_panels_do_not_overlap_and_rows_show_the_whole_time(name: str) -> None:
    layout = page_layout(name, size_px=(1100, 850))
    for top in layout.row_tops_y[:-1]:
        windows = [panel.window_s for panel in layout.panels if panel.box[1] == top]
        assert windows[0][0] == 0.0 and windows[-1][1] == 10.0
        assert all(before[1] == after[0] for before, after in itertools.pairwise(windows))


def test_columns_read_downwards_as_on_paper() -> None:
    layout = page_layout("3x4+1", size_px=(1100, 850))
    columns = [
        [LEADS[p.lead] for p in layout.panels if p.window_s == (start_s, start_s + 2.5)] for start_s in (0, 2.5, 5, 7.5)
    ]
    assert columns == [["I", "II", "III"], ["aVR", "aVL", "aVF"], ["V1", "V2", "V3"], ["V4", "V5", "V6"]]


@pytest.mark.parametrize("size_px", [(1100, 850), (2200, 1700), (1754, 1240), (1600, 900)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_millimetre_is_a_millimetre_on_pages_of_ordinary_shape(name: str, size_px: tuple[int, int]) -> None:
    layout = page_layout(name, size_px=size_px)
    assert not layout.anisotropic
    assert_allclose(layout.px_per_mV, 10 * layout.px_per_mm[0])


def test_a_square_page_is_filled_by_stretching() -> None:
    layout = page_layout("3x4+1", size_px=(168, 168))
    assert layout.anisotropic
    boxes_P4 = np.array([panel.box for panel in layout.panels])
    assert boxes_P4[:, 3].max() - boxes_P4[:, 1].min() > 0.9
    assert boxes_P4[:, 2].max() - boxes_P4[:, 0].min() > 0.9


@pytest.mark.parametrize("name", LAYOUTS)
def test_cells_are_the_same_at_every_size(name: str) -> None:
    _, lead_C, time_C2 = page_layout(name, size_px=(1100, 850)).cells()
    for size_px in SIZES:
        box_C4, other_lead_C, other_time_C2 = page_layout(name, size_px=size_px).cells()
        assert (box_C4.dtype, other_lead_C.dtype, other_time_C2.dtype) == (np.float32, np.int64, np.float32)
        assert_array_equal(other_lead_C, lead_C)
        assert_array_equal(other_time_C2, time_C2)


@pytest.mark.parametrize("bins", [1, 2, 5])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_middle_of_a_cell_is_its_lead_and_its_middle_time(name: str, bins: int) -> None:
    layout = page_layout(name, size_px=(336, 336))
    box_C4, lead_C, time_C2 = layout.cells(bins)
    found_C, time_s_C = layout.locate((box_C4[:, :2] + box_C4[:, 2:]) / 2)
    assert_array_equal(found_C, lead_C)
    assert_allclose(time_s_C, time_C2.mean(axis=1), atol=1e-4)
    assert_allclose(time_C2[:, 1] - time_C2[:, 0], np.ptp(time_C2[0]), rtol=1e-5)


def test_strips_have_cells_of_their_own() -> None:
    _, lead_C, _ = page_layout("3x4+1", size_px=(336, 336)).cells(2)
    assert_array_equal(np.bincount(lead_C), [2, 2 + 8, *[2] * 10])


def test_margins_belong_to_no_lead() -> None:
    lead_N, time_s_N = page_layout("3x4+1", size_px=(336, 336)).locate(
        np.array([[0.01, 0.5], [0.5, 0.999], [1.2, 0.5]])
    )
    assert_array_equal(lead_N, [-1, -1, -1])
    assert np.isnan(time_s_N).all()


def test_scale_follows_speed_and_gain() -> None:
    slow, fast = (page_layout("12x1", size_px=(1100, 850), speed_mm_s=speed, gain_mm_mV=5.0) for speed in (25.0, 50.0))
    for layout in (slow, fast):
        assert_allclose(layout.px_per_mV, 5 * layout.px_per_mm[1])
        assert_allclose(layout.px_per_s, layout.speed_mm_s * layout.px_per_mm[0])
    assert slow.px_per_mm[0] > fast.px_per_mm[0]


def test_bad_input_is_named() -> None:
    with pytest.raises(EvlecgError, match=r"'3x4\+1'"):
        page_layout("3x4_1", size_px=(336, 336))
    with pytest.raises(EvlecgError, match="too small"):
        page_layout("3x4", size_px=(336, 8))
    with pytest.raises(EvlecgError, match="0 cells"):
        page_layout("3x4", size_px=(336, 336)).cells(0)
    with pytest.raises(EvlecgError, match=r"not \[N, 2\]"):
        page_layout("3x4", size_px=(336, 336)).locate(np.zeros(2))
    with pytest.raises(EvlecgError, match="mm/mV"):
        page_layout("3x4", size_px=(336, 336), gain_mm_mV=0.0)
