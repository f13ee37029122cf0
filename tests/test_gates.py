"""What is mended, what is refused, and that nothing else is touched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from evlecg.data.gates import Mended, Unfit, lead_index, mend, resampled
from evlecg.data.readers_base import Source
from evlecg.data.readers_wfdb import read_header, read_signal
from evlecg.schema import LEADS

FS_HZ = 500.0


def ecg(duration_s: float = 10.0) -> np.ndarray:
    """float32 [12, T]: 12 different leads of about 1 mV, limb leads consistent."""
    rng = np.random.default_rng(0)
    signal_mV = rng.normal(0, 0.3, (12, int(duration_s * FS_HZ))).astype(np.float32)
    first, second = signal_mV[0].copy(), signal_mV[1].copy()
    signal_mV[2:6] = second - first, -(first + second) / 2, first - second / 2, second - first / 2
    return signal_mV


def gate(signal: np.ndarray, leads: Sequence[str] = LEADS, unit: str = "mV", fs_hz: float = FS_HZ) -> Mended:
    return mend(signal, leads, [unit] * len(leads), fs_hz)


def test_sound_signal_is_left_as_it_is() -> None:
    signal_mV = ecg()
    before = signal_mV.copy()
    mended = gate(signal_mV)
    assert mended.repairs == ()
    assert mended.signal_mV.dtype == np.float32
    assert_array_equal(mended.signal_mV, before)
    assert_array_equal(signal_mV, before)


def test_leads_in_any_order_and_case_and_others_dropped() -> None:
    signal_mV = ecg()
    order = np.random.default_rng(1).permutation(12)
    leads = [*(LEADS[i].upper() if i % 2 else LEADS[i].lower() for i in order), "vx", "ECG II"]
    shuffled = np.concatenate([signal_mV[order], 100 + signal_mV[:2]])  # nothing of the extra channels matters
    assert_array_equal(gate(shuffled, leads).signal_mV, signal_mV)


@pytest.mark.parametrize(("unit", "per_mV"), [("mV", 1), ("mv", 1), ("", 1), ("uV", 1e3), ("µV", 1e3), ("V", 1e-3)])
def test_units(unit: str, per_mV: float) -> None:
    assert_allclose(gate(ecg() * per_mV, unit=unit).signal_mV, ecg(), rtol=1e-6)


@pytest.mark.parametrize("missing", ["III aVR aVL aVF", "I aVF", "II", "III", "aVL", "II aVR aVL aVF"])
def test_limb_leads_are_derived(missing: str) -> None:
    kept = [index for index, lead in enumerate(LEADS) if lead not in missing.split()]
    mended = gate(ecg()[kept], [LEADS[index] for index in kept])
    assert_allclose(mended.signal_mV, ecg(), atol=1e-6)
    assert mended.repairs == (f"derived {', '.join(missing.split())} from the other limb leads",)


@pytest.mark.parametrize("missing", ["V3", "I II", "II III aVF", "aVL V1"])
def test_leads_that_cannot_be_derived(missing: str) -> None:
    kept = [index for index, lead in enumerate(LEADS) if lead not in missing.split()]
    with pytest.raises(Unfit, match=f"missing leads: {', '.join(missing.split())}"):
        gate(ecg()[kept], [LEADS[index] for index in kept])


@pytest.mark.parametrize("start", [0, 1000, 5000 - 25])
def test_short_gaps_are_bridged(start: int) -> None:
    signal_mV = ecg()
    signal_mV[7] = np.linspace(-1, 1, 5000)
    expected = signal_mV.copy()
    signal_mV[7, start : start + 25] = np.nan  # 50 ms
    mended = gate(signal_mV)
    inside = slice(start, start + 25)
    if start == 1000:
        assert_allclose(mended.signal_mV, expected, atol=1e-6)
    else:  # at an edge the nearest value is held
        assert np.ptp(mended.signal_mV[7, inside]) == 0
    assert mended.repairs == ("bridged gaps of at most 50 ms in V2",)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_long_gaps_are_refused(value: float) -> None:
    signal_mV = ecg()
    signal_mV[7, 1000:1026] = value
    with pytest.raises(Unfit, match=r"gap: lead V2 has no numbers for 0\.052 s"):
        gate(signal_mV)
    signal_mV[7] = value
    with pytest.raises(Unfit, match="gap: lead V2"):
        gate(signal_mV)


def broken(kind: str) -> np.ndarray:
    signal_mV = ecg()
    if kind == "zero":
        signal_mV[6] = 0
    elif kind == "noise":
        signal_mV[6] *= 0.01
    elif kind == "half":
        signal_mV[6, 1000:3600] = 0.1
    elif kind == "absurd":
        signal_mV[6, 2000] = 21
    elif kind == "saturated":
        signal_mV[6, 2000:2110] = 9
    elif kind == "offset":
        signal_mV[6] += 33
        signal_mV[6, 0] = 27  # a range large enough to be looked at
    return signal_mV


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("zero", "flat leads: V1"),
        ("noise", "flat leads: V1"),
        ("half", r"flat leads: V1 holds one value for 5\.2 s"),
        ("absurd", "absurd amplitude: lead V1 reaches 21"),
        ("saturated", r"saturated: lead V1 stays at 9\.00 mV for 0\.22 s"),
        ("offset", "absurd amplitude: lead V1 lies beyond"),
    ],
)
def test_bad_leads_are_refused(kind: str, reason: str) -> None:
    with pytest.raises(Unfit, match=reason):
        gate(broken(kind))


def test_large_but_readable_artefacts_are_kept() -> None:
    signal_mV = ecg()
    signal_mV[6, 2000:2050] = 15  # 0.1 s
    signal_mV[7, 1000:2000] = 0.2  # one value for a fifth of the record
    assert gate(signal_mV).repairs == ()


@pytest.mark.parametrize(
    ("signal", "leads", "fs_hz", "reason"),
    [
        (ecg()[:, :0], LEADS, 500.0, "empty"),
        (ecg()[:, :2499], LEADS, 500.0, "too short"),
        (ecg(), LEADS[:11], 500.0, "wrong shape"),
        (ecg()[0], LEADS, 500.0, "wrong shape"),
        (ecg(), LEADS, 0.5, "implausible sampling rate"),
        (ecg(), LEADS, float("nan"), "implausible sampling rate"),
        (ecg(), (*LEADS[:11], "V5"), 500.0, "ambiguous leads: V5"),
    ],
)
def test_bad_shapes_are_refused(signal: np.ndarray, leads: Sequence[str], fs_hz: float, reason: str) -> None:
    with pytest.raises(Unfit, match=reason):
        gate(signal, leads, fs_hz=fs_hz)


def test_unknown_unit_is_refused() -> None:
    with pytest.raises(Unfit, match="unknown unit: lead I"):
        gate(ecg(), unit="mmHg")


def test_other_names_of_leads() -> None:
    """Brazilian, European and IEEE 11073 names; other channels stay other."""
    assert [lead_index(name) for name in ("DI", "DII", "D3", "C1", "c6", "MDC_ECG_LEAD_aVR", "Lead V2")] == [
        *(0, 1, 2, 6, 11, 3, 7),
    ]
    assert [lead_index(name) for name in ("vx", "ECG II", "MLII", "C7", "D", "V7", "")] == [None] * 7


# padding


@pytest.mark.parametrize("blank", [0.0, np.nan])
@pytest.mark.parametrize(("before", "after"), [(581, 581), (800, 0), (0, 800), (51, 51)])
def test_padding_is_cut(before: int, after: int, blank: float) -> None:
    signal_mV = np.pad(ecg(), ((0, 0), (before, after)), constant_values=blank)
    mended = gate(signal_mV)
    assert_array_equal(mended.signal_mV, ecg())
    assert mended.repairs == (f"padding cut: {before / FS_HZ:.2f} s before, {after / FS_HZ:.2f} s after",)


def test_short_or_partial_zeros_are_no_padding() -> None:
    signal_mV = ecg()
    signal_mV[:, :50] = 0  # 0.1 s, and not longer
    signal_mV[:11, -100:] = 0  # one lead goes on
    mended = gate(signal_mV)
    assert mended.repairs == ()
    assert_array_equal(mended.signal_mV, signal_mV)


def test_zeros_inside_stay() -> None:
    signal_mV = np.pad(ecg(), ((0, 0), (100, 0)))
    signal_mV[:, 2000:2200] = 0
    assert_array_equal(gate(signal_mV).signal_mV, signal_mV[:, 100:])


def test_padded_records_that_are_too_short_or_empty() -> None:
    with pytest.raises(Unfit, match=r"too short: 4\.00 s"):
        gate(np.pad(ecg(4.0), ((0, 0), (1000, 1000))))
    with pytest.raises(Unfit, match="flat leads: I, II, III"):
        gate(np.zeros((12, 5000)))


def test_padding_in_derived_leads_and_other_units() -> None:
    padded = np.pad(ecg() * 1000, ((0, 0), (300, 0)))
    kept = [0, 1, *range(6, 12)]
    mended = gate(padded[kept], [LEADS[index] for index in kept], unit="uV")
    assert_allclose(mended.signal_mV, ecg(), atol=1e-5)
    assert mended.repairs[1] == "padding cut: 0.60 s before, 0.00 s after"


def test_real_records_are_not_trimmed(shared_data: Path) -> None:
    """LUDB and CODE-15 as unpadded WFDB: no recording begins or ends in zeros."""
    for folder in ("ludb", "code15_wfdb"):
        source = Source(shared_data / folder)
        for path in source.find(".hea")[::5]:
            header = read_header(source, path)
            raw = read_signal(source, header)
            try:
                mended = mend(raw.values, raw.leads, raw.units, header.fs_hz)
            except Unfit:
                continue
            assert mended.signal_mV.shape[1] == header.n_samples
            padded = np.pad(raw.values, ((0, 0), (581, 581)))
            live = np.flatnonzero(mended.signal_mV.any(axis=0))  # one record begins with one sample of its padding
            live_mV = mended.signal_mV[:, live[0] : live[-1] + 1]
            assert_array_equal(mend(padded, raw.leads, raw.units, header.fs_hz).signal_mV, live_mV)


# resampling


def tone(frequency_hz: float, fs_hz: float, duration_s: float = 10.0) -> np.ndarray:
    """float32 [12, T] of amplitude 1."""
    time_s = np.arange(round(duration_s * fs_hz)) / fs_hz
    return np.sin(2 * np.pi * frequency_hz * time_s)[None].repeat(12, axis=0).astype(np.float32)


RATES = [(500, 100), (257, 500), (1000, 500), (400, 500), (1000, 257), (360.5, 500)]


@pytest.mark.parametrize(("fs_hz", "to_fs_hz"), RATES)
def test_tones_below_the_new_nyquist_frequency_are_kept(fs_hz: float, to_fs_hz: float) -> None:
    for frequency_hz in (1.0, 0.4 * min(fs_hz, to_fs_hz)):
        changed = resampled(tone(frequency_hz, fs_hz), fs_hz, to_fs_hz)
        expected = tone(frequency_hz, to_fs_hz)
        assert changed.shape == expected.shape and changed.dtype == np.float32
        inside = slice(round(to_fs_hz), -round(to_fs_hz))
        assert_allclose(changed[:, inside], expected[:, inside], atol=0.01)  # amplitude and phase within 1 %


@pytest.mark.parametrize(("fs_hz", "to_fs_hz"), [(500, 100), (1000, 500), (1000, 257), (500, 400)])
def test_tones_above_the_new_nyquist_frequency_vanish(fs_hz: float, to_fs_hz: float) -> None:
    for frequency_hz in (0.51 * to_fs_hz, 0.6 * to_fs_hz, 0.49 * fs_hz):
        changed = resampled(tone(frequency_hz, fs_hz), fs_hz, to_fs_hz)
        inside = slice(round(to_fs_hz), -round(to_fs_hz))
        level_dB = 20 * np.log10(np.abs(changed[:, inside]).max())
        assert level_dB < -50
        assert (
            np.abs(tone(frequency_hz, fs_hz)[:, :: int(fs_hz // to_fs_hz) or 1]).max() > 0.5
        )  # taking samples would not


@pytest.mark.parametrize(("fs_hz", "to_fs_hz"), RATES)
def test_an_impulse_stays_where_it_was(fs_hz: float, to_fs_hz: float) -> None:
    for at_s in (0.4, 5.0, 9.6):
        time_s = np.arange(round(10 * fs_hz)) / fs_hz
        pulse = np.exp(-(((time_s - at_s) / 0.015) ** 2))[None].repeat(12, axis=0)
        changed = resampled(pulse, fs_hz, to_fs_hz)
        to_time_s = np.arange(changed.shape[1]) / to_fs_hz
        centre_s = (changed * to_time_s).sum(axis=1) / changed.sum(axis=1)
        assert_allclose(centre_s, at_s, atol=1e-4)
        assert_allclose(changed[0], np.exp(-(((to_time_s - at_s) / 0.015) ** 2)), atol=0.005)


@pytest.mark.parametrize(("fs_hz", "to_fs_hz"), RATES)
def test_ends_ring_no_steps(fs_hz: float, to_fs_hz: float) -> None:
    """An offset and a drift, far from zero at both ends, come out as the same line."""
    time_s = np.arange(round(10 * fs_hz)) / fs_hz
    line = (3 - 0.4 * time_s)[None].repeat(12, axis=0).astype(np.float32)
    changed = resampled(line, fs_hz, to_fs_hz)
    assert_allclose(changed[0], 3 - 0.4 * np.arange(changed.shape[1]) / to_fs_hz, atol=0.003)
    ramp = (20 * time_s)[None].repeat(12, axis=0).astype(np.float32)  # steep: a kink at its start would show
    first = slice(0, round(0.05 * to_fs_hz))
    expected = 20 * np.arange(first.stop) / to_fs_hz
    assert_allclose(resampled(ramp, fs_hz, to_fs_hz)[0, first], expected, atol=0.005)


def test_the_same_rate_changes_nothing_and_odd_rates_are_refused() -> None:
    signal_mV = ecg()
    assert resampled(signal_mV, 500, 500) is signal_mV
    for rate in (float("nan"), 0.0, 1e6):
        with pytest.raises(Unfit, match="implausible sampling rate"):
            resampled(signal_mV, 500, rate)


def test_real_records_there_and_back(shared_data: Path) -> None:
    """500 Hz to 1000 Hz and back gives the record again, up to what lies above 200 Hz."""
    source = Source(shared_data / "ludb")
    raw = read_signal(source, read_header(source, "data/1.hea"))
    back = resampled(resampled(raw.values, 500, 1000), 1000, 500)
    inside = slice(100, -100)
    assert_allclose(back[:, inside], raw.values[:, inside], atol=0.02)


def test_noisy_real_records(shared_data: Path) -> None:
    """CODE-15: 114 of 120 are kept; the rest are too short, dead in one lead, or off the page."""
    source = Source(shared_data / "code15_wfdb")
    refused = {}
    for path in source.find(".hea"):
        header = read_header(source, path)
        raw = read_signal(source, header)
        try:
            mended = mend(raw.values, raw.leads, raw.units, header.fs_hz)
        except Unfit as reason:
            refused[path.removesuffix(".hea")] = str(reason).partition(":")[0]
        else:
            assert np.isfinite(mended.signal_mV).all()
    amplitude = dict.fromkeys(("919999", "919779", "919671", "1111117"), "absurd amplitude")
    assert refused == {"919842": "too short", "91974": "flat leads", **amplitude}
