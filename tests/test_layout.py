"""The layout map: complete, on the page, the same cells at every size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from evlecg.errors import EvlecgError
from evlecg.page.layout import LAYOUTS, PICTURE_CELLS, batch_cells, page_layout, picture_layout
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


TURN = 0.08  # radians
TURNED = np.array([[np.cos(TURN), -np.sin(TURN), 0.03], [np.sin(TURN), np.cos(TURN), -0.02], [0.05, 0.02, 1.0]])


def _through(warp_33: np.ndarray, points_N2: np.ndarray) -> np.ndarray:
    """The homography, point by point."""
    moved = [warp_33 @ [x, y, 1.0] for x, y in points_N2]
    return np.array([[x / w, y / w] for x, y, w in moved])


def test_a_warped_page_is_located_through_its_warp() -> None:
    plain = page_layout("3x4+1", size_px=(336, 336))
    warped = plain.warped(TURNED)
    points_N2 = np.random.default_rng(0).uniform(0, 1, (500, 2))
    lead_N, time_s_N = plain.locate(points_N2)
    found_N, found_s_N = warped.locate(_through(TURNED, points_N2))
    assert len(set(lead_N)) == 13
    assert_array_equal(found_N, lead_N)
    assert_allclose(found_s_N, time_s_N, atol=1e-4)
    twice = warped.warped(np.linalg.inv(TURNED))
    assert_allclose(twice.cells()[0], plain.cells()[0], atol=1e-6)
    assert warped.paper == plain and plain.paper is plain


@pytest.mark.parametrize("name", LAYOUTS)
def test_cells_of_a_warped_page_lie_where_they_are_seen(name: str) -> None:
    plain = page_layout(name, size_px=(700, 541))
    warped = plain.warped(TURNED)
    box_C4, lead_C, time_C2 = warped.cells()
    seen_C = np.ptp(box_C4, axis=1) > 0
    assert seen_C.mean() > 0.9
    whole_C = seen_C & (box_C4.min(1) > 0) & (box_C4.max(1) < 1)
    found_C, time_s_C = warped.locate((box_C4[whole_C, :2] + box_C4[whole_C, 2:]) / 2)
    assert_array_equal(found_C, lead_C[whole_C])
    assert_allclose(time_s_C, time_C2[whole_C].mean(axis=1), atol=0.12)  # perspective: the middle moves a little


def test_boxes_come_back_to_the_paper() -> None:
    warped = page_layout("3x4+1", size_px=(336, 336)).warped(TURNED)
    edges = np.linspace(0, 1, 25)
    token_N4 = np.array([(x, y, x + 1 / 24, y + 1 / 24) for y in edges[:-1] for x in edges[:-1]])
    paper_N4 = warped.to_paper(token_N4)
    on_paper_N = (paper_N4[:, 2:] > paper_N4[:, :2]).all(1)
    centre_N2 = (token_N4[:, :2] + token_N4[:, 2:]) / 2
    expected_N2 = _through(np.linalg.inv(TURNED), centre_N2)
    inner_N = ((expected_N2 > 0.04) & (expected_N2 < 0.96)).all(1)
    assert_allclose(((paper_N4[:, :2] + paper_N4[:, 2:]) / 2)[inner_N], expected_N2[inner_N], atol=1e-3)
    assert on_paper_N[inner_N].all()
    assert not on_paper_N[((expected_N2 < -0.04) | (expected_N2 > 1.04)).any(1)].any()
    assert_array_equal(warped.to_paper(np.zeros((2, 4))), np.zeros((2, 4)))


def test_a_batch_of_unlike_pages_has_one_list_of_cells() -> None:
    page = page_layout("3x4", size_px=(336, 336))
    picture = picture_layout((336, 336), (0.0, 0.125, 1.0, 0.875))
    box_BC4, lead_C, time_C2 = batch_cells([page, picture, page.warped(TURNED)])
    own_C4, own_lead_C, own_time_C2 = page.cells()
    assert box_BC4.shape == (3, len(own_C4) + PICTURE_CELLS**2, 4)
    assert_array_equal(box_BC4[[0, 2], : len(own_C4)], np.stack([own_C4, own_C4]))
    assert_array_equal(box_BC4[[0, 2], len(own_C4) :], 0)
    assert_array_equal(box_BC4[1, : len(own_C4)], 0)
    assert_array_equal(lead_C, [*own_lead_C, *[-1] * PICTURE_CELLS**2])
    assert_array_equal(time_C2[: len(own_C4)], own_time_C2)
    assert np.isnan(time_C2[len(own_C4) :]).all()


def test_a_picture_knows_no_leads_and_where_it_lies() -> None:
    picture = picture_layout((400, 400), (0.0, 0.125, 1.0, 0.875))
    box_C4, lead_C, _ = picture.cells()
    assert_allclose([*box_C4[:, :2].min(0), *box_C4[:, 2:].max(0)], [0, 0.125, 1, 0.875], atol=1e-6)
    assert set(lead_C) == {-1}
    assert set(picture.locate(np.random.default_rng(0).uniform(0, 1, (50, 2)))[0]) == {-1}
    assert_allclose(picture.to_paper(np.array([[0.5, 0.5, 0.75, 0.875], [0, 0, 1, 0.12]])),
                    [[0.5, 0.5, 0.75, 1.0], [0, 0, 0, 0]], atol=1e-6)  # fmt: skip
