"""Which lead and which stretch of time lies where on the page.

A layout is computed from the page's size alone, so the same record has the same cells on a student's small page and
on a teacher's large one. One paper is assumed: a left margin that holds the calibration pulse, `duration_s` of time,
and rows of equal height. The paper is as high as the page's shape asks for, hence a millimetre is as wide as it is
high ("isotropic") on every page of an ordinary shape. A square page for a small vision tower would leave a third of
its height empty that way; there the paper is a stretched A4 sheet, and the grid is stretched with it.

Shape legend: N points, C lead x time cells. Boxes are x0, y0, x1, y1 in [0, 1] of the page, y pointing down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

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
        never on the page's size.

        Args:
            bins_per_panel: cells in the shortest panel.

        Returns:
            Boxes float32 [C, 4], leads int64 [C], start and end in seconds float32 [C, 2].
        """
        if bins_per_panel < 1:
            raise EvlecgError(f"a panel cannot be cut into {bins_per_panel} cells")
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
        x_N, y_N = points_N2.T
        lead_N = np.full(len(points_N2), -1, np.int64)
        time_s_N = np.full(len(points_N2), np.nan, np.float32)
        for panel in self.panels:
            x0, y0, x1, y1 = panel.box
            inside_N = (x_N >= x0) & (x_N < x1) & (y_N >= y0) & (y_N < y1)
            start_s, end_s = panel.window_s
            lead_N[inside_N] = panel.lead
            time_s_N[inside_N] = start_s + (x_N[inside_N] - x0) / (x1 - x0) * (end_s - start_s)
        return lead_N, time_s_N


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
