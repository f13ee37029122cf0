"""What a report groups records by: heart rate and noise, measured on the signal, and what the record says of itself.

The estimates are plain on purpose: they sort records into a few bands and decide nothing else. They read no labels.

Shape legend: L leads (always 12), T time samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import signal as filters

QRS_HZ = (8.0, 20.0)  # most of a QRS complex, little of P and T waves (Pan and Tompkins 1985: 5-15 Hz; T waves reach 8)
INTEGRATED_S = 0.12  # the length of a normal QRS complex with its upslope
REFRACTORY_S = 0.25  # 240 beats a minute
QRS_SHARE = 0.35  # of a typical beat's energy: lower ones are T waves and noise
TYPICAL_WINDOW_S = 2.0  # holds a beat at 30 a minute
LEAST_BEATS = 3
QRS_HALF_S = 0.1  # what noise is not measured in, on either side of a beat
NOISE_HZ = (30.0, 100.0)  # muscle and mains; below it lie the T waves
NYQUIST_SHARE = 0.45
MAD_TO_SD = 1.4826  # of a normal distribution: a few missed beats do not move it

UNKNOWN = ""
AGE_BANDS = ("under 40", "40 to 59", "60 to 79", "80 and over")
RATE_BANDS = ("under 60/min", "60 to 100/min", "over 100/min")
# 5 µV is what the recorder itself may add (IEC 60601-2-25: 30 µV from peak to valley, 6 standard deviations); 20 µV is
# where a technician would record again.
NOISE_BANDS = ("under 5 µV", "5 to 20 µV", "over 20 µV")
BANDS: dict[str, tuple[str, ...]] = {
    "sex": ("F", "M"), "age": AGE_BANDS, "device": (), "heart rate": RATE_BANDS, "noise": NOISE_BANDS,
}  # fmt: skip
BAND_FORMULAS = {
    "heart rate": f"heart rate = 60 / median time between beats; beats = peaks of the energy between {QRS_HZ[0]:g} and "
    f"{QRS_HZ[1]:g} Hz, summed over the leads",
    "noise": f"noise = standard deviation between {NOISE_HZ[0]:g} and {NOISE_HZ[1]:g} Hz (or {NYQUIST_SHARE:g} of the "
    f"sampling rate) outside {QRS_HALF_S:g} s around the beats, by the median absolute deviation, median over leads",
}


@dataclass(frozen=True)
class SignalFacts:
    """Of one record.

    Attributes:
        heart_rate_bpm: beats a minute; None where fewer than three beats are found.
        noise_uV: standard deviation of what is left between beats; None where nothing can be measured.
    """

    heart_rate_bpm: float | None
    noise_uV: float | None


def signal_facts(signal_mV_LT: np.ndarray, fs_hz: float) -> SignalFacts:
    """Heart rate and noise of a record.

    Args:
        signal_mV_LT: [12, T], millivolt; flat leads are passed over.
        fs_hz: samples a second.
    """
    signal_mV_LT = np.asarray(signal_mV_LT, np.float64)
    alive_LT = signal_mV_LT[np.ptp(signal_mV_LT, axis=1) > 0] if signal_mV_LT.size else signal_mV_LT
    if alive_LT.size == 0 or alive_LT.shape[1] < TYPICAL_WINDOW_S * fs_hz or NYQUIST_SHARE * fs_hz <= QRS_HZ[1]:
        return SignalFacts(None, None)
    beats = beat_samples(alive_LT, fs_hz)
    rate = None if len(beats) < LEAST_BEATS else float(60 * fs_hz / np.median(np.diff(beats)))
    return SignalFacts(rate, _noise_uV(alive_LT, fs_hz, beats))


def beat_samples(signal_mV_LT: np.ndarray, fs_hz: float) -> np.ndarray:
    """Sample numbers of the QRS complexes' middles, in order.

    Peaks of the energy in the QRS band over all leads, at least `QRS_SHARE` of a typical beat's (the median over
    windows of the largest in each), so that one artefact does not set the scale.
    """
    energy_T = np.square(_band(signal_mV_LT, fs_hz, *QRS_HZ)).sum(axis=0)
    width = max(1, round(INTEGRATED_S * fs_hz))
    energy_T = np.convolve(energy_T, np.full(width, 1 / width), mode="same")
    window = round(TYPICAL_WINDOW_S * fs_hz)
    largest = [energy_T[start : start + window].max() for start in range(0, len(energy_T) - window + 1, window)]
    typical = float(np.median(largest))
    if typical <= 0:
        return np.zeros(0, np.intp)
    found, _ = filters.find_peaks(energy_T, height=QRS_SHARE * typical, distance=max(1, round(REFRACTORY_S * fs_hz)))
    return found


def _noise_uV(signal_mV_LT: np.ndarray, fs_hz: float, beats: np.ndarray) -> float | None:
    high_hz = min(NOISE_HZ[1], NYQUIST_SHARE * fs_hz)
    if high_hz <= NOISE_HZ[0]:
        return None
    noise_LT = _band(signal_mV_LT, fs_hz, NOISE_HZ[0], high_hz)
    quiet_T = np.ones(noise_LT.shape[1], bool)
    half = round(QRS_HALF_S * fs_hz)
    for beat in beats:
        quiet_T[max(0, beat - half) : beat + half + 1] = False
    if quiet_T.sum() < fs_hz / 2:
        return None
    quiet_LT = noise_LT[:, quiet_T]
    mad_L = np.median(np.abs(quiet_LT - np.median(quiet_LT, axis=1, keepdims=True)), axis=1)
    return float(1000 * MAD_TO_SD * np.median(mad_L))


def _band(signal_mV_LT: np.ndarray, fs_hz: float, low_hz: float, high_hz: float) -> np.ndarray:
    sections = filters.butter(2, (low_hz, high_hz), btype="bandpass", fs=fs_hz, output="sos")
    return filters.sosfiltfilt(sections, signal_mV_LT, axis=1)


def bands(facts: SignalFacts, row: Mapping[str, Any]) -> dict[str, str]:
    """The group of a record in each of `BANDS`; `UNKNOWN` where nothing is known.

    Args:
        facts: of its signal.
        row: its line of the prepared folder: `sex`, `age` and `device` are read.
    """
    return {
        "sex": row["sex"] or UNKNOWN,
        "age": _banded(row["age"], (40, 60, 80), AGE_BANDS),
        "device": row["device"] or UNKNOWN,
        "heart rate": _banded(facts.heart_rate_bpm, (60, np.nextafter(100, 101)), RATE_BANDS),
        "noise": _banded(facts.noise_uV, (5, np.nextafter(20, 21)), NOISE_BANDS),
    }


def _banded(value: float | None, edges: tuple[float, ...], names: tuple[str, ...]) -> str:
    return UNKNOWN if value is None else names[int(np.searchsorted(edges, value, side="right"))]
