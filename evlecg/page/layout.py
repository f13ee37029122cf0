"""Which lead and which stretch of time lies where on the page.

A layout is computed from the page's size alone, so the same record has the same cells on a student's small page and
on a teacher's large one. One paper is assumed: a left margin that holds the calibration pulse, `duration_s` of time,
and rows of equal height. The paper is as high as the page's shape asks for, hence a millimetre is as wide as it is
high ("isotropic") on every page of an ordinary shape. A square page for a small vision tower would leave a third of
its height empty that way; there the paper is a stretched A4 sheet, and the grid is stretched with it.

A page that was photographed askew (augment.py), or a picture that was fitted into another shape (picture.py), has a
`warp`: panels keep their place on the *paper*, and the warp says where on the *page* the paper lies. `locate` and
`cells` speak of the page as it is seen; `to_paper` brings the boxes of what is seen back onto the paper, where one
cell is the same for every page of a batch.

Shape legend: B pages, N points or boxes, C lead x time cells. Boxes are x0, y0, x1, y1 in [0, 1] of the page, y
pointing down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np

from evlecg.errors import EvlecgError
from evlecg.recipe import nearest
from evlecg.schema import LEADS

MARGIN_MM = 3.0  # blank paper at every edge
PULSE_S = 0.2  # calibration pulse, drawn to the left of each row
PULSE_FOOT_MM = 1.5  # baseline on both sides of the pulse
FOOTER_MM = 6.0  # room for "25 mm/s 10 mm/mV"
FOOTER_PX_PER_MM = 2.4  # below this the footer cannot be read, and its room goes to the rows
BASELINE = 0.55  # of the row from its top: R waves and lead names above need a little more room than S waves
SMALLEST_PX = 32
STRETCHED_ASPECT = math.sqrt(2.0)  # A4 landscape
WIDEST_ASPECT = 2.0
PICTURE = "picture"  # name of the layout of a page that nobody knows the leads of
PICTURE_CELLS = 6  # a side; such a page is cut into equal cells without lead and time
PICTURE_WIDTH_MM = 297.0  # A4 landscape: what such a page is taken for where a disturbance has a size on paper
SLIVER = 0.05  # a box of which less lies on the paper sees none of it


@dataclass(frozen=True)
class _Arrangement:
    """Rows of leads (each row shows its leads one after the other), then rows of one lead over the whole time."""

    rows: tuple[tuple[str, ...], ...]
    strips: tuple[str, ...] = ()
    narrowest_aspect: float = 1.25  # narrower pages are stretched


_THREE_BY_FOUR = (("I", "aVR", "V1", "V4"), ("II", "aVL", "V2", "V5"), ("III", "aVF", "V3", "V6"))
LAYOUTS: dict[str, _Arrangement] = {
    "3x4": _Arrangement(_THREE_BY_FOUR),
    "3x4+1": _Arrangement(_THREE_BY_FOUR, ("II",)),
    "3x4+3": _Arrangement(_THREE_BY_FOUR, ("II", "V1", "V5")),
    "6x2": _Arrangement(tuple(zip(LEADS[:6], LEADS[6:], strict=True))),
    "12x1": _Arrangement(tuple((lead,) for lead in LEADS), narrowest_aspect=0.7),  # also printed upright
}


@dataclass(frozen=True)
class Panel:
    """One lead over one stretch of time.

    Attributes:
        lead: index into `LEADS`.
        box: x0, y0, x1, y1 in [0, 1] of the page; its width is exactly `window_s`, its height one row.
        window_s: first and last second shown, counted from the start of the page.
        baseline_y: where 0 mV lies, in [0, 1] of the page.
    """

    lead: int
    box: tuple[float, float, float, float]
    window_s: tuple[float, float]
    baseline_y: float


@dataclass(frozen=True)
class PageLayout:
    """Every panel of a page and its scale.

    Attributes:
        name: one of `LAYOUTS`.
        size_px: width, height.
        duration_s: time from the left to the right end of a row.
        speed_mm_s, gain_mm_mV: the paper's scale.
        px_per_mm: horizontal, vertical.
        panels: in reading order, row by row, rhythm strips last.
        row_tops_y: top of every row and the bottom of the last, in [0, 1] of the page.
        start_x: where time starts in every row, in [0, 1] of the page.
        warp: the homography from paper to page, row by row, both in [0, 1]; None where they are the same.
    """

    name: str
    size_px: tuple[int, int]
    duration_s: float
    speed_mm_s: float
    gain_mm_mV: float
    px_per_mm: tuple[float, float]
    panels: tuple[Panel, ...]
    row_tops_y: tuple[float, ...]
    start_x: float
    warp: tuple[float, ...] | None = None

    @property
    def paper(self) -> PageLayout:
        """The same page before its warp."""
        return self if self.warp is None else replace(self, warp=None)

    def warped(self, onto_33: np.ndarray) -> PageLayout:
        """The same page after another warp (a homography of [0, 1] x [0, 1])."""
        warp_33 = np.asarray(onto_33, np.float64) @ self._warp_33
        return replace(self, warp=tuple((warp_33 / warp_33[2, 2]).ravel().tolist()))

    @property
    def _warp_33(self) -> np.ndarray:
        return np.eye(3) if self.warp is None else np.array(self.warp).reshape(3, 3)

    @property
    def anisotropic(self) -> bool:
        """Whether a millimetre is not as wide as it is high: the page's shape is far from the paper's."""
        return not math.isclose(*self.px_per_mm, rel_tol=1e-6)

    @property
    def px_per_s(self) -> float:
        return self.speed_mm_s * self.px_per_mm[0]

    @property
    def px_per_mV(self) -> float:
        return self.gain_mm_mV * self.px_per_mm[1]

    def cells(self, bins_per_panel: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lead x time cells: every panel cut into equal stretches of time.

        Panels that show more time are cut into more cells, so that all cells of a page last about equally long; a
        rhythm strip has cells of its own. Number and order depend on name, duration and `bins_per_panel` only,
        never on the page's size. Where the leads are not known, the cells are those of a grid, of lead -1.

        Args:
            bins_per_panel: cells in the shortest panel.

        Returns:
            Boxes float32 [C, 4], zeros where a cell has left the page; leads int64 [C]; start and end in seconds
            float32 [C, 2].
        """
        if bins_per_panel < 1:
            raise EvlecgError(f"a panel cannot be cut into {bins_per_panel} cells")
        boxes_C4, lead_C, time_C2 = self._paper_cells(bins_per_panel)
        return self.to_page(boxes_C4), lead_C, time_C2

    def _paper_cells(self, bins_per_panel: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if not self.panels:
            n = PICTURE_CELLS
            y_C, x_C = (index.ravel() for index in np.mgrid[:n, :n])
            boxes_C4 = np.stack([x_C, y_C, x_C + 1, y_C + 1], axis=1).astype(np.float32) / n
            return boxes_C4, np.full(n * n, -1, np.int64), np.full((n * n, 2), np.nan, np.float32)
        shortest_s = min(panel.window_s[1] - panel.window_s[0] for panel in self.panels)
        boxes, leads, times = [], [], []
        for panel in self.panels:
            start_s, end_s = panel.window_s
            bins = bins_per_panel * round((end_s - start_s) / shortest_s)
            edge_x = np.linspace(panel.box[0], panel.box[2], bins + 1)
            edge_s = np.linspace(start_s, end_s, bins + 1)
            for i in range(bins):
                boxes.append((edge_x[i], panel.box[1], edge_x[i + 1], panel.box[3]))
                leads.append(panel.lead)
                times.append((edge_s[i], edge_s[i + 1]))
        return np.array(boxes, np.float32), np.array(leads, np.int64), np.array(times, np.float32)

    def locate(self, points_N2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lead and time shown at points of the page.

        Args:
            points_N2: x, y in [0, 1] of the page.

        Returns:
            Lead int64 [N], -1 where no panel lies; time in seconds float32 [N], NaN there.
        """
        points_N2 = np.asarray(points_N2, np.float64)
        if points_N2.ndim != 2 or points_N2.shape[1] != 2:
            raise EvlecgError(f"points have the shape {points_N2.shape}, not [N, 2]")
        x_N, y_N = _project(np.linalg.inv(self._warp_33), points_N2).T if self.warp else points_N2.T
        lead_N = np.full(len(points_N2), -1, np.int64)
        time_s_N = np.full(len(points_N2), np.nan, np.float32)
        for panel in self.panels:
            x0, y0, x1, y1 = panel.box
            inside_N = (x_N >= x0) & (x_N < x1) & (y_N >= y0) & (y_N < y1)
            start_s, end_s = panel.window_s
            lead_N[inside_N] = panel.lead
            time_s_N[inside_N] = start_s + (x_N[inside_N] - x0) / (x1 - x0) * (end_s - start_s)
        return lead_N, time_s_N

    def to_page(self, boxes_N4: np.ndarray) -> np.ndarray:
        """Boxes on the paper -> boxes on the page, float32 [N, 4]; see `to_paper`."""
        return boxes_N4 if self.warp is None else _moved(self._warp_33, boxes_N4)

    def to_paper(self, boxes_N4: np.ndarray) -> np.ndarray:
        """Boxes on the page -> boxes on the paper.

        A box that is turned gets the upright box through the middles of its sides: it keeps centre and area, so that
        neighbours stay neighbours and do not grow into one another.

        Args:
            boxes_N4: x0, y0, x1, y1 in [0, 1] of the page.

        Returns:
            float32 [N, 4]; zeros where hardly any of the box lies on the paper.
        """
        return boxes_N4 if self.warp is None else _moved(np.linalg.inv(self._warp_33), boxes_N4)


class CellLayout(Protocol):
    """What lead x time cells lie on: a `PageLayout`, or a signal's plane (`trace.TraceLayout`)."""

    @property
    def name(self) -> str: ...

    @property
    def duration_s(self) -> float: ...

    @property
    def paper(self) -> CellLayout: ...

    def cells(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...


def batch_cells(layouts: Sequence[CellLayout]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cells of pages that need not be alike, on their papers: one list of cells that serves every page.

    Kinds of pages follow one another in the order in which they come. A page has boxes for the cells of its own kind
    and zeros for the others, which no token can overlap.

    Returns:
        Boxes float32 [B, C, 4], leads int64 [C], times float32 [C, 2].
    """
    kinds: dict[tuple[str, float], tuple[np.ndarray, np.ndarray]] = {}
    own = []
    for layout in layouts:
        boxes_C4, lead_C, time_C2 = layout.paper.cells()
        kinds.setdefault((layout.name, layout.duration_s), (lead_C, time_C2))
        own.append(boxes_C4)
    stops = np.cumsum([len(lead_C) for lead_C, _ in kinds.values()])
    span = {kind: slice(stop - len(kinds[kind][0]), stop) for kind, stop in zip(kinds, stops.tolist(), strict=True)}
    boxes_BC4 = np.zeros((len(layouts), int(stops[-1]), 4), np.float32)
    for page, layout in enumerate(layouts):
        boxes_BC4[page, span[layout.name, layout.duration_s]] = own[page]
    leads, times = zip(*kinds.values(), strict=True)
    return boxes_BC4, np.concatenate(leads), np.concatenate(times)


def picture_layout(size_px: tuple[int, int], box: tuple[float, float, float, float]) -> PageLayout:
    """The layout of a picture of unknown leads that fills `box` of a page."""
    x0, y0, x1, y1 = box
    px_per_mm = (x1 - x0) * size_px[0] / PICTURE_WIDTH_MM
    blank = PageLayout(PICTURE, size_px, 0.0, 25.0, 10.0, (px_per_mm, px_per_mm), (), (0.0, 1.0), 0.0)
    if box == (0.0, 0.0, 1.0, 1.0):
        return blank
    return blank.warped(np.array([[x1 - x0, 0, x0], [0, y1 - y0, y0], [0, 0, 1]]))


def _project(warp_33: np.ndarray, points_N2: np.ndarray) -> np.ndarray:
    """Points behind a homography, float64 [N, 2]."""
    moved_N3 = np.asarray(points_N2, np.float64) @ warp_33[:, :2].T + warp_33[:, 2]
    return moved_N3[:, :2] / moved_N3[:, 2:]


def _moved(warp_33: np.ndarray, boxes_N4: np.ndarray) -> np.ndarray:
    """Upright boxes behind a homography, cut off at [0, 1]; zeros where they have left it."""
    boxes_N4 = np.asarray(boxes_N4, np.float64)
    corners_N8 = boxes_N4[:, [0, 1, 2, 1, 2, 3, 0, 3]]  # clockwise from the upper left
    moved_N42 = _project(warp_33, corners_N8.reshape(-1, 2)).reshape(-1, 4, 2)
    low_N2 = np.stack([moved_N42[:, [0, 3], 0].mean(1), moved_N42[:, [0, 1], 1].mean(1)], axis=1)
    high_N2 = np.stack([moved_N42[:, [1, 2], 0].mean(1), moved_N42[:, [2, 3], 1].mean(1)], axis=1)
    cut_N4 = np.concatenate([low_N2, high_N2], axis=1).clip(0, 1)
    left_N = (cut_N4[:, 2:] - cut_N4[:, :2]).prod(1)
    cut_N4[left_N <= SLIVER * (high_N2 - low_N2).prod(1)] = 0  # also what was empty before
    return cut_N4.astype(np.float32)


@lru_cache(maxsize=64)
def page_layout(
    name: str = "3x4+1",
    *,
    size_px: tuple[int, int],
    duration_s: float = 10.0,
    speed_mm_s: float = 25.0,
    gain_mm_mV: float = 10.0,
) -> PageLayout:
    """Lays out a page.

    Args:
        name: one of `LAYOUTS`.
        size_px: width, height of the page.
        duration_s: time from the left to the right end of a row.
        speed_mm_s: paper speed.
        gain_mm_mV: gain.

    Raises:
        EvlecgError: unknown name (naming the nearest), a page too small, or a scale that is not positive.
    """
    if name not in LAYOUTS:
        raise EvlecgError(f"unknown page layout {name!r}", hint=nearest(name, LAYOUTS))
    width_px, height_px = size_px
    if min(size_px) < SMALLEST_PX:
        raise EvlecgError(f"a page of {width_px}x{height_px} pixels is too small", hint=f"at least {SMALLEST_PX}")
    if not (duration_s > 0 and speed_mm_s > 0 and gain_mm_mV > 0):
        raise EvlecgError(f"a page of {duration_s} s at {speed_mm_s} mm/s and {gain_mm_mV} mm/mV cannot be drawn")
    arrangement = LAYOUTS[name]
    start_mm = MARGIN_MM + PULSE_S * speed_mm_s + 2 * PULSE_FOOT_MM
    paper_width_mm = start_mm + duration_s * speed_mm_s + MARGIN_MM
    aspect = width_px / height_px
    if aspect < arrangement.narrowest_aspect:
        aspect = STRETCHED_ASPECT
    elif aspect > WIDEST_ASPECT:
        aspect = WIDEST_ASPECT
    paper_height_mm = paper_width_mm / aspect
    px_per_mm = (width_px / paper_width_mm, height_px / paper_height_mm)

    n_rows = len(arrangement.rows) + len(arrangement.strips)
    footer_mm = FOOTER_MM if min(px_per_mm) >= FOOTER_PX_PER_MM else 0.0
    pitch_mm = (paper_height_mm - 2 * MARGIN_MM - footer_mm) / n_rows
    top_mm = MARGIN_MM
    if pitch_mm > 2:  # whole millimetres, so that every baseline lies on a grid line
        spare_mm = n_rows * (pitch_mm % 1.0)
        pitch_mm, top_mm = pitch_mm // 1.0, top_mm + spare_mm / 2

    panels = []
    rows = arrangement.rows + tuple((lead,) for lead in arrangement.strips)
    for row, leads in enumerate(rows):
        row_mm = top_mm + row * pitch_mm
        seconds = duration_s / len(leads)
        for column, lead in enumerate(leads):
            window_s = (column * seconds, (column + 1) * seconds)
            x0, x1 = ((start_mm + at_s * speed_mm_s) / paper_width_mm for at_s in window_s)
            y0, y1 = row_mm / paper_height_mm, (row_mm + pitch_mm) / paper_height_mm
            baseline_y = (row_mm + round(BASELINE * pitch_mm)) / paper_height_mm
            panels.append(Panel(LEADS.index(lead), (x0, y0, x1, y1), window_s, baseline_y))
    tops = tuple((top_mm + row * pitch_mm) / paper_height_mm for row in range(n_rows + 1))
    return PageLayout(
        name, (width_px, height_px), duration_s, speed_mm_s, gain_mm_mV, px_per_mm, tuple(panels), tops,
        start_mm / paper_width_mm,
    )  # fmt: skip
