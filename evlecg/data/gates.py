"""Quality gates: a raw signal becomes 12 finite leads in millivolt, or is refused with a reason.

Thresholds were set on 430 recorded ECGs (LUDB, PTB-XL, CPSC2018, CinC 2021, CODE-15) so that what a cardiologist could
still read is kept:

- `FLAT_MV`: the smallest peak-to-peak of a live lead among them is 0.20 mV, that of a dead one (CODE-15) 0.048 mV.
- `LIMIT_MV`: artefacts up to 20 mV beside readable beats occur in CODE-15; 4 of 120 records go beyond and are refused.
- `PLATEAU_MV`, `PLATEAU_S`: an amplifier at its rail holds one value; the longest such plateau in a readable record
  lasts 0.11 s at 3.2 mV.
- `GAP_S`: 50 ms is half a QRS; a straight line over more than that would invent a waveform.
- `PADDING_S`: all 12 leads at exactly zero (or without numbers) for longer than 0.1 s at an end is what was appended to
  reach a fixed length (CODE-15), not a recording: unpadded records begin or end so for 2.5 ms at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from evlecg.schema import LEADS

MIN_DURATION_S = 5.0
GAP_S = 0.05
PADDING_S = 0.1
FLAT_MV = 0.05
FLAT_SHARE = 0.5  # a lead that holds one value for this share of the record was off for too long
LIMIT_MV = 20.0
PLATEAU_MV = 5.0
PLATEAU_S = 0.2
STORE_LIMIT_MV = 32.767  # int16 at 1 uV a step
MIN_FS_HZ, MAX_FS_HZ = 50.0, 20_000.0

MV_PER_UNIT = {
    "mv": 1.0,
    "millivolt": 1.0,
    "millivolts": 1.0,
    "uv": 1e-3,
    "µv": 1e-3,
    "μv": 1e-3,
    "microvolt": 1e-3,
    "microvolts": 1e-3,
    "nv": 1e-6,
    "v": 1e3,
    "volt": 1e3,
    "volts": 1e3,
}
_LEAD_OF = {name.lower(): index for index, name in enumerate(LEADS)}
# what Brazilian (D), European (C) and IEEE 11073 files call them
_LEAD_OF |= {f"d{name}": index for name, index in (("i", 0), ("ii", 1), ("iii", 2), ("1", 0), ("2", 1), ("3", 2))}
_LEAD_OF |= {f"c{number}": 5 + number for number in range(1, 7)}
_LEAD_PREFIXES = ("mdc_ecg_lead_", "lead ")

# Resampling: flat to 0.8 of the lower Nyquist frequency, 60 dB down at that frequency itself.
_PASS_SHARE = 0.8
_STOP_DB = 60.0
_LARGEST_TERM = 5000  # of the ratio of two rates: 257 -> 500 needs 500/257, a rate with decimals more


class Unfit(Exception):
    """A record that cannot be used; the message is the reason, without names or paths."""


@dataclass(frozen=True)
class Mended:
    """A signal that passed.

    Attributes:
        signal_mV: float32 [12, T] in the order of `LEADS`, finite.
        repairs: what was mended, one short phrase each.
    """

    signal_mV: np.ndarray
    repairs: tuple[str, ...]


@lru_cache(maxsize=4096)
def lead_index(name: str) -> int | None:
    """Place of a lead in `LEADS` (any case), or None for other channels."""
    name = name.strip().lower()
    for prefix in _LEAD_PREFIXES:
        name = name.removeprefix(prefix).strip()
    return _LEAD_OF.get(name)


def mend(signal: np.ndarray, leads: Sequence[str], units: Sequence[str], fs_hz: float) -> Mended:
    """Orders, scales, checks and repairs a raw signal.

    Args:
        signal: float [channels, T]; NaN where nothing was recorded.
        leads: channel names in any order and case; channels that are none of the 12 leads are dropped.
        units: of each channel: mV, uV or V in any case; "" means mV.
        fs_hz: samples a second.

    Raises:
        Unfit: no samples, too short, a chest lead or two limb leads missing, an unknown unit, a long gap, a flat,
            saturated or absurdly large lead.
    """
    if signal.ndim != 2 or signal.shape[0] != len(leads) or len(units) != len(leads):
        raise Unfit(f"wrong shape: {signal.shape} for {len(leads)} lead names")
    if signal.shape[1] == 0:
        raise Unfit("empty: no samples")
    if not MIN_FS_HZ <= fs_hz <= MAX_FS_HZ:
        raise Unfit(f"implausible sampling rate: {fs_hz:g} Hz")
    _check_duration(signal.shape[1], fs_hz)
    repairs: list[str] = []
    signal_mV = _trim_padding(_ordered(signal, leads, units, repairs), fs_hz, repairs)
    _bridge_gaps(signal_mV, fs_hz, repairs)
    _check_leads(signal_mV, fs_hz)
    return Mended(signal_mV, tuple(repairs))


def resampled(signal_mV: np.ndarray, fs_hz: float, to_fs_hz: float) -> np.ndarray:
    """A signal at another sampling rate: sample k of the result lies at k / `to_fs_hz` seconds.

    Polyphase, with a linear-phase low-pass that is flat within 0.2 % up to 0.8 of the lower of the two Nyquist
    frequencies and 60 dB down from there on. The ends are continued by their own point reflection, so that an offset
    or a slope at an end rings no step into the result.

    Args:
        signal_mV: float [leads, T], finite.
        fs_hz: its samples a second.
        to_fs_hz: the wanted rate.

    Returns:
        float32 [leads, ceil(T * to_fs_hz / fs_hz)]; the input itself where the rates are equal.

    Raises:
        Unfit: the two rates have no ratio that can be handled (a rate that is not a number).
    """
    if to_fs_hz == fs_hz:
        return signal_mV
    if not (MIN_FS_HZ <= fs_hz <= MAX_FS_HZ and MIN_FS_HZ <= to_fs_hz <= MAX_FS_HZ):
        raise Unfit(f"implausible sampling rate: {fs_hz:g} Hz to {to_fs_hz:g} Hz")
    from scipy.signal import resample_poly  # a slow import: most records keep their rate

    ratio = Fraction(Fraction(to_fs_hz) / Fraction(fs_hz)).limit_denominator(_LARGEST_TERM)
    up, down = ratio.numerator, ratio.denominator
    taps = _low_pass(max(up, down))
    n_samples = signal_mV.shape[1]
    blocks = -(-len(taps) // (2 * up * down)) + 1  # whole multiples of `down` samples stay whole after the change
    around = blocks * down
    continued = np.pad(signal_mV.astype(np.float32), ((0, 0), (around, around)), mode="reflect", reflect_type="odd")
    changed = resample_poly(continued, up, down, axis=1, window=taps)
    start = blocks * up
    return np.ascontiguousarray(changed[:, start : start - (-n_samples * up // down)], np.float32)


@lru_cache(maxsize=8)
def _low_pass(factor: int) -> np.ndarray:
    """Taps (odd number, sum 1) of a low-pass at 1/`factor` of the Nyquist frequency: a sinc under a Kaiser window."""
    width, middle = (1 - _PASS_SHARE) / factor, (1 + _PASS_SHARE) / 2 / factor  # shares of the Nyquist frequency
    half = int(np.ceil((_STOP_DB - 7.95) / (2.285 * np.pi * width) / 2))  # Kaiser's own estimates of length and beta
    at = np.arange(-half, half + 1)
    taps = np.sinc(middle * at) * np.kaiser(at.size, 0.1102 * (_STOP_DB - 8.7))
    return (taps / taps.sum()).astype(np.float32)


def _check_duration(n_samples: int, fs_hz: float) -> None:
    if n_samples < MIN_DURATION_S * fs_hz:
        raise Unfit(f"too short: {n_samples / fs_hz:.2f} s, at least {MIN_DURATION_S:g} s are needed")


def _ordered(signal: np.ndarray, leads: Sequence[str], units: Sequence[str], repairs: list[str]) -> np.ndarray:
    """The 12 leads in order and in millivolt; missing limb leads are derived."""
    signal_mV = np.empty((len(LEADS), signal.shape[1]), np.float32)
    found: set[int] = set()
    for row, (name, unit) in enumerate(zip(leads, units, strict=True)):
        index = lead_index(name)
        if index is None:
            continue
        if index in found:
            raise Unfit(f"ambiguous leads: {LEADS[index]} occurs twice")
        scale = MV_PER_UNIT.get(unit.strip().lower() or "mv")
        if scale is None:
            raise Unfit(f"unknown unit: lead {LEADS[index]}")
        found.add(index)
        np.multiply(signal[row], scale, out=signal_mV[index], casting="same_kind")
    missing = [index for index in range(len(LEADS)) if index not in found]
    if not missing:
        return signal_mV
    names = ", ".join(LEADS[index] for index in missing)
    chest = [index for index in missing if index >= 6]
    if chest:
        raise Unfit(f"missing leads: {names}")
    if len(found & {0, 1, 2}) < 2:
        raise Unfit(f"missing leads: {names}; limb leads can be derived from two of I, II and III only")
    lead_I, lead_II, lead_III = signal_mV[0], signal_mV[1], signal_mV[2]  # views: filled below where missing
    derive = {  # Einthoven: I + III = II; Goldberger: the augmented leads are means of differences
        0: lambda: lead_II - lead_III,
        1: lambda: lead_I + lead_III,
        2: lambda: lead_II - lead_I,
        3: lambda: -(lead_I + lead_II) / 2,
        4: lambda: lead_I - lead_II / 2,
        5: lambda: lead_II - lead_I / 2,
    }
    for index in missing:  # in order: I, II and III are complete before the augmented leads need them
        signal_mV[index] = derive[index]()
    repairs.append(f"derived {names} from the other limb leads")
    return signal_mV


def _trim_padding(signal_mV: np.ndarray, fs_hz: float, repairs: list[str]) -> np.ndarray:
    """Without the ends at which every lead is zero or no number for longer than `PADDING_S`."""

    def blank(at: int | slice) -> np.ndarray:
        part = signal_mV[:, at]
        return ~(np.isfinite(part) & (part != 0)).any(axis=0)

    if not (blank(0) or blank(-1)):  # nearly all records: two columns decide
        return signal_mV
    live = np.flatnonzero(~blank(slice(None)))
    if not live.size:  # nothing at all: the gate for flat leads says it better
        return signal_mV
    before, after = int(live[0]), signal_mV.shape[1] - 1 - int(live[-1])
    start = before if before > PADDING_S * fs_hz else 0
    end = signal_mV.shape[1] - (after if after > PADDING_S * fs_hz else 0)
    if (start, end) == (0, signal_mV.shape[1]):
        return signal_mV
    _check_duration(end - start, fs_hz)
    before_s, after_s = start / fs_hz, (signal_mV.shape[1] - end) / fs_hz
    repairs.append(f"padding cut: {before_s:.2f} s before, {after_s:.2f} s after")
    return np.ascontiguousarray(signal_mV[:, start:end])


def _bridge_gaps(signal_mV: np.ndarray, fs_hz: float, repairs: list[str]) -> None:
    """Straight lines over runs of at most `GAP_S` that hold no number, in place."""
    bad_LT = ~np.isfinite(signal_mV)
    if not bad_LT.any():
        return
    bridged: list[str] = []
    for index in np.flatnonzero(bad_LT.any(axis=1)):
        bad_T = bad_LT[index]
        edges = np.flatnonzero(np.diff(np.concatenate(([False], bad_T, [False]))))
        longest_s = float(np.max(edges[1::2] - edges[::2])) / fs_hz
        if longest_s > GAP_S:
            raise Unfit(f"gap: lead {LEADS[index]} has no numbers for {longest_s:.3g} s")
        at = np.arange(bad_T.size)
        signal_mV[index, bad_T] = np.interp(at[bad_T], at[~bad_T], signal_mV[index, ~bad_T])
        bridged.append(LEADS[index])
    repairs.append(f"bridged gaps of at most {1000 * GAP_S:g} ms in {', '.join(bridged)}")


def _check_leads(signal_mV: np.ndarray, fs_hz: float) -> None:
    low_L, high_L = signal_mV.min(axis=1), signal_mV.max(axis=1)
    range_L = high_L - low_L
    flat = [LEADS[index] for index in np.flatnonzero(range_L < FLAT_MV)]
    if flat:
        raise Unfit(f"flat leads: {', '.join(flat)}")
    n_samples = signal_mV.shape[1]
    for index, lead in enumerate(LEADS):
        lead_T = signal_mV[index]
        if range_L[index] > PLATEAU_MV:  # neither a deviation nor a plateau of that size fits into a smaller range
            centre = float(np.median(lead_T))
            largest = max(high_L[index] - centre, centre - low_L[index])
            if largest > LIMIT_MV:
                raise Unfit(f"absurd amplitude: lead {lead} reaches {largest:.1f} mV from its median")
            for extreme in (low_L[index], high_L[index]):
                if abs(extreme - centre) >= PLATEAU_MV:
                    held_s = _longest_run(lead_T == extreme) / fs_hz
                    if held_s >= PLATEAU_S:
                        raise Unfit(f"saturated: lead {lead} stays at {extreme:.2f} mV for {held_s:.2f} s")
            if max(abs(float(low_L[index])), abs(float(high_L[index]))) > STORE_LIMIT_MV:
                raise Unfit(f"absurd amplitude: lead {lead} lies beyond {STORE_LIMIT_MV} mV")
        steady_T = lead_T[1:] == lead_T[:-1]
        # a run can only be that long if that many neighbours are equal: the run itself is looked for in few records
        if np.count_nonzero(steady_T) >= FLAT_SHARE * n_samples:
            held = _longest_run(steady_T) + 1
            if held >= FLAT_SHARE * n_samples:
                raise Unfit(f"flat leads: {lead} holds one value for {held / fs_hz:.1f} s")


def _longest_run(true_T: np.ndarray) -> int:
    edges = np.flatnonzero(np.diff(np.concatenate(([False], true_T, [False]))))
    return int(np.max(edges[1::2] - edges[::2])) if edges.size else 0
