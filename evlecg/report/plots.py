"""The pictures of a report as SVG, one file each, to be set inline."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from evlecg.metrics import Curve, ReliabilityCurve

PANELS = 6  # of each plot: more are too small to read
COLUMNS = 3
INK, LINE, CHANCE = "#1f2933", "#20639b", "#b0b7bf"


def roc_plot(curves: Sequence[tuple[str, Curve]]) -> bytes:
    """Small multiples, one panel a title; titles say what the curve is of."""
    figure, axes = _panels(len(curves))
    for axis, (title, curve) in zip(axes, curves, strict=True):
        axis.plot([0, 1], [0, 1], color=CHANCE, lw=1, ls="--")
        axis.plot(curve.x, curve.y, color=LINE, lw=1.8)
        _frame(axis, title, "1 − specificity", "sensitivity")
    return _svg(figure)


def calibration_plot(curves: Sequence[tuple[str, ReliabilityCurve]]) -> bytes:
    """Share of positives against mean score; the area of a dot grows with its records, whiskers are 95% intervals."""
    figure, axes = _panels(len(curves))
    for axis, (title, curve) in zip(axes, curves, strict=True):
        axis.plot([0, 1], [0, 1], color=CHANCE, lw=1, ls="--")
        total = sum(found.n for found in curve.bins)
        for found in curve.bins:
            if found.ci95 is not None:
                axis.plot([found.mean_score] * 2, found.ci95, color=LINE, lw=1)
            axis.plot(found.mean_score, found.share_pos, "o", color=LINE, mec="white", mew=0.5,
                      ms=3 + 9 * math.sqrt(found.n / total))  # fmt: skip
        _frame(axis, title, "mean score", "share present")
    return _svg(figure)


def _panels(n: int) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")  # pictures are written, never shown
    import matplotlib.pyplot as plt

    columns = min(n, COLUMNS)
    rows = math.ceil(n / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.1 * columns, 3.2 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[n:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:n])


def _frame(axis: Any, title: str, x: str, y: str) -> None:
    axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), aspect="equal")
    axis.set_title(title, fontsize=10, color=INK)
    axis.set_xlabel(x, fontsize=9, color=INK)
    axis.set_ylabel(y, fontsize=9, color=INK)
    axis.tick_params(labelsize=8, colors=INK)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _svg(figure: Any) -> bytes:
    import matplotlib
    import matplotlib.pyplot as plt

    written = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "evlecg", "font.family": "sans-serif"}):
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return written.getvalue()
