"""Signals as a model that reads signals wants them: filtered, resampled, cut to its window, scaled.

Such a model has no page, but its tokens have a lead and a time. They are laid out on a plane of their own, the
*trace*: x is time over the window, y the lead (twelve rows of equal height, in the order of `LEADS`). A token that sees
one lead for half a second has a small box there; one that mixes all leads spans all rows. Boxes, masks and pooling by
shared area then work as on a page. Places on a trace and places on a page are not comparable; lead x time cells are,
and a cell of either has a box on both (`TraceLayout.boxes`, `PageLayout.cells`).

Shape legend: L leads (always 12), T time samples, C lead x time cells, N tokens. Boxes are x0, y0, x1, y1 in [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import scipy.signal

from evlecg.errors import EvlecgError
from evlecg.page.layout import SLIVER
from evlecg.schema import LEADS

NAME = "trace"
CELL_S = 1.25  # as long as a cell of the usual page: half of a 2.5 s panel
FILTER_S = 0.3  # length of the filter, HuBERT-ECG's: too short to take much away below 3 Hz, whatever its lower edge
MOST_RATIO = 1000  # of the two sides of a resampling ratio


@dataclass(frozen=True)
class TraceForm:
    """What a model wants of a signal.

    Attributes:
        fs_hz: samples a second.
        n_samples: of each lead; shorter records are padded with zeros behind their end.
        leads: "flattened" (one after another in one series), "apart" (each a series of its own) or "channels".
        scale: "none" (millivolt), "standard" (zero mean and unit variance over all leads, which keeps their relative
            amplitudes) or "range" (every lead from -1 to 1, as HuBERT-ECG wants it).
        band_hz: lower and upper edge of the filter, 0 for none.
    """

    fs_hz: float
    n_samples: int
    leads: str
    scale: str = "none"
    band_hz: tuple[float, float] = (0.0, 0.0)

    @property
    def window_s(self) -> float:
        return self.n_samples / self.fs_hz


@dataclass(frozen=True)
class TraceLayout:
    """The plane that a signal's tokens are laid out on.

    Attributes:
        duration_s: time from its left to its right edge.
    """

    duration_s: float
    name: str = NAME

    @property
    def paper(self) -> TraceLayout:
        """Itself: nothing is ever turned or shifted on it."""
        return self

    def cells(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lead x time cells of about `CELL_S`: boxes float32 [C, 4], leads int64 [C], start and end in s [C, 2]."""
        bins = max(1, round(self.duration_s / CELL_S))
        edge_s = np.linspace(0, self.duration_s, bins + 1)
        time_C2 = np.tile(np.stack([edge_s[:-1], edge_s[1:]], axis=1), (len(LEADS), 1)).astype(np.float32)
        lead_C = np.repeat(np.arange(len(LEADS)), bins)
        return self.boxes(lead_C, time_C2), lead_C, time_C2

    def boxes(self, lead_C: np.ndarray, time_C2: np.ndarray) -> np.ndarray:
        """Where stretches of time of a lead lie, float32 [C, 4].

        Args:
            lead_C: index into `LEADS`; -1: of no lead that is known.
            time_C2: start and end in seconds; NaN where unknown.

        Returns:
            Zeros for what is unknown or outside of the window (a sliver inside does not count).
        """
        time_C2 = np.asarray(time_C2, np.float64)
        x_C2 = np.clip(np.nan_to_num(time_C2, nan=0.0) / self.duration_s, 0, 1)
        length_C = np.nan_to_num(time_C2[:, 1] - time_C2[:, 0], nan=0.0) / self.duration_s
        shown_C = (np.asarray(lead_C) >= 0) & (length_C > 0) & (x_C2[:, 1] - x_C2[:, 0] > SLIVER * length_C)
        y_C = np.asarray(lead_C, np.float64) / len(LEADS)
        boxes_C4 = np.stack([x_C2[:, 0], y_C, x_C2[:, 1], y_C + 1 / len(LEADS)], axis=1)
        return np.where(shown_C[:, None], boxes_C4, 0).astype(np.float32)


@dataclass(frozen=True)
class Trace:
    """A signal in a model's form.

    Attributes:
        signal_LT: float32 [12, n_samples].
        layout: the plane of its tokens.
        n_recorded: samples before the padding.
    """

    signal_LT: np.ndarray
    layout: TraceLayout
    n_recorded: int


def trace(signal_mV_LT: np.ndarray, fs_hz: float, form: TraceForm, *, start_s: float = 0.0, where: str = "") -> Trace:
    """Brings a signal into a model's form.

    Filtered and scaled over the whole record, resampled, then cut: what a model sees of a beat does not depend on
    where the window lies.

    Args:
        signal_mV_LT: [12, T], millivolt, finite.
        fs_hz: samples a second.
        form: what the model wants.
        start_s: which second of the record comes first.
        where: what an error names.

    Raises:
        EvlecgError: wrong shape, NaN or infinite values, a start outside of the record, a band that does not fit.
    """
    signal_LT = np.asarray(signal_mV_LT, np.float64)
    if signal_LT.ndim != 2 or signal_LT.shape[0] != len(LEADS) or signal_LT.shape[1] < 2:
        raise EvlecgError(f"a trace needs a signal of shape [12, samples], not {signal_LT.shape}", where=where)
    if not np.isfinite(signal_LT).all():
        raise EvlecgError("a signal with NaN or infinite values cannot be read", where=where)
    signal_LT = _scaled(_filtered(signal_LT, fs_hz, form.band_hz), form.scale)
    ratio = Fraction(form.fs_hz / fs_hz).limit_denominator(MOST_RATIO)
    if ratio == 0:
        raise EvlecgError(f"a signal of {fs_hz} Hz cannot be resampled to {form.fs_hz} Hz", where=where)
    if ratio != 1:
        # edges are held, not dropped to zero: a baseline of 1 mV would ring there
        signal_LT = scipy.signal.resample_poly(signal_LT, ratio.numerator, ratio.denominator, axis=1, padtype="line")
    first = round(start_s * form.fs_hz)
    if not 0 <= first < signal_LT.shape[1]:
        raise EvlecgError(f"a trace cannot start at {start_s} s of a record", where=where)
    shown_LT = signal_LT[:, first : first + form.n_samples]
    padded_LT = np.zeros((len(LEADS), form.n_samples), np.float32)
    padded_LT[:, : shown_LT.shape[1]] = shown_LT
    return Trace(padded_LT, TraceLayout(form.window_s), shown_LT.shape[1])


def _filtered(signal_LT: np.ndarray, fs_hz: float, band_hz: tuple[float, float]) -> np.ndarray:
    """Zero-phase FIR filter; edges at or above half the sampling rate have nothing to take away."""
    low_hz, high_hz = band_hz[0], band_hz[1] if band_hz[1] < fs_hz / 2 else 0.0
    edges = [edge for edge in (low_hz, high_hz) if edge]
    taps = int(FILTER_S * fs_hz) | 1
    if not edges or taps < 3:
        return signal_LT
    kernel = scipy.signal.firwin(taps, edges, pass_zero=not low_hz, fs=fs_hz)
    reach = min(3 * taps, signal_LT.shape[1] - 1)
    return scipy.signal.filtfilt(kernel, 1.0, signal_LT, axis=1, padlen=reach)


def _scaled(signal_LT: np.ndarray, scale: str) -> np.ndarray:
    if scale == "standard":
        return (signal_LT - signal_LT.mean()) / math.sqrt(signal_LT.var() + 1e-7)  # as HF's feature extractors do
    if scale == "range":
        low_L1, high_L1 = signal_LT.min(1, keepdims=True), signal_LT.max(1, keepdims=True)
        return np.where(high_L1 > low_L1, 2 * (signal_LT - low_L1) / np.maximum(high_L1 - low_L1, 1e-8) - 1, 0)
    return signal_LT
