"""The pictures of a report: one small SVG a label, so that a page sets as many side by side as it has room for."""

from __future__ import annotations

import io
import math
from typing import Any

from evlecg.metrics import Curve, ReliabilityCurve

PANELS = 6  # of each kind: a reader compares no more
FEW = 10  # records: a dot of fewer is hollow
SIZE_INCH = (3.1, 3.2)
INK, LINE, CHANCE = "#1f2933", "#20639b", "#b0b7bf"


def roc_plot(title: str, curve: Curve) -> bytes:
    """Sensitivity against 1 - specificity, and the line of chance."""
    figure, axis = _panel(title, "1 − specificity", "sensitivity")
    axis.plot(curve.x, curve.y, color=LINE, lw=1.8)
    return _svg(figure)


def calibration_plot(title: str, curve: ReliabilityCurve) -> bytes:
    """Share of positives against mean score; the area of a dot grows with its records, whiskers are 95% intervals."""
    figure, axis = _panel(title, "mean score", "share present")
    total = sum(found.n for found in curve.bins)
    for found in curve.bins:
        if found.ci95 is not None:
            axis.plot([found.mean_score] * 2, found.ci95, color=LINE, lw=1)
        hollow = found.n < FEW
        axis.plot(found.mean_score, found.share_pos, "o", color="white" if hollow else LINE,
                  mec=LINE if hollow else "white", mew=1 if hollow else 0.5,
                  ms=3 + 9 * math.sqrt(found.n / total))  # fmt: skip
    return _svg(figure)


def _panel(title: str, x: str, y: str) -> tuple[Any, Any]:
    """A square from 0 to 1 with its diagonal."""
    from matplotlib.figure import Figure  # without pyplot: nothing is shown, and no state is kept

    figure = Figure(figsize=SIZE_INCH, layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), aspect="equal")
    axis.set_title(title, fontsize=10, color=INK)
    axis.set_xlabel(x, fontsize=9, color=INK)
    axis.set_ylabel(y, fontsize=9, color=INK)
    axis.tick_params(labelsize=8, colors=INK)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.plot([0, 1], [0, 1], color=CHANCE, lw=1, ls="--")
    return figure, axis


def _svg(figure: Any) -> bytes:
    import matplotlib

    written = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "evlecg", "font.family": "sans-serif"}):
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return written.getvalue()
