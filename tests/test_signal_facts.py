"""Heart rate and noise are what was put into a record, and what annotators found in recorded ones."""

from __future__ import annotations

import numpy as np
import pytest

from evlecg.data.labels import LABEL_BASIS, LABEL_SETS, LABELS, labels_by_basis
from evlecg.data.signal_facts import BANDS, SignalFacts, bands, beat_samples, signal_facts
from evlecg.data.store import Prepared

FS_HZ = 500.0


def beats_mV(rate_bpm: float, *, noise_mV: float = 0.0, seconds: float = 10, fs_hz: float = FS_HZ) -> np.ndarray:
    """[12, T]: narrow QRS complexes with tall, wide T waves behind them, and white noise of a known size."""
    time_T = np.arange(round(seconds * fs_hz)) / fs_hz
    wave_T = np.zeros_like(time_T)
    for beat_s in np.arange(0.4, seconds, 60 / rate_bpm):
        wave_T += np.exp(-(((time_T - beat_s) / 0.012) ** 2)) + 0.6 * np.exp(-(((time_T - beat_s - 0.2) / 0.05) ** 2))
    noise_LT = np.random.default_rng(0).normal(0, 1, (12, len(time_T)))
    return wave_T * np.linspace(0.5, 1.5, 12)[:, None] + noise_mV * noise_LT


@pytest.mark.parametrize("fs_hz", [100.0, 257.0, 500.0])
@pytest.mark.parametrize("rate_bpm", [35, 60, 75, 140])
def test_rate_is_the_rate_of_the_beats(rate_bpm: float, fs_hz: float) -> None:
    found = signal_facts(beats_mV(rate_bpm, noise_mV=0.03, fs_hz=fs_hz), fs_hz)
    assert found.heart_rate_bpm == pytest.approx(rate_bpm, rel=0.02)


def test_noise_is_the_part_of_the_noise_within_its_band() -> None:
    white_uV = 20.0
    expected = white_uV * np.sqrt((100 - 30) / (FS_HZ / 2))  # white noise is spread evenly up to half the rate
    found = signal_facts(beats_mV(70, noise_mV=white_uV / 1000), FS_HZ)
    assert found.noise_uV == pytest.approx(expected, rel=0.15)
    assert signal_facts(beats_mV(70), FS_HZ).noise_uV < 0.5, "the beats themselves are no noise"


def test_fast_and_tall_beats_do_not_count_as_noise() -> None:
    noise_mV_LT = beats_mV(200, noise_mV=0.005) - beats_mV(200)
    expected = 5.0 * np.sqrt((100 - 30) / (FS_HZ / 2))
    assert signal_facts(4 * beats_mV(200) + noise_mV_LT, FS_HZ).noise_uV == pytest.approx(expected, rel=0.15)


def test_one_artefact_does_not_hide_the_beats() -> None:
    signal_mV_LT = beats_mV(72)
    signal_mV_LT[:, 2100:2110] += 20
    assert signal_facts(signal_mV_LT, FS_HZ).heart_rate_bpm == pytest.approx(72, rel=0.03)


def test_what_cannot_be_measured_is_none() -> None:
    assert signal_facts(np.zeros((12, 5000)), FS_HZ) == SignalFacts(None, None)
    assert signal_facts(np.zeros((12, 0)), FS_HZ) == SignalFacts(None, None), "a record that is a picture"
    assert signal_facts(beats_mV(60, seconds=1), FS_HZ) == SignalFacts(None, None)
    assert signal_facts(beats_mV(30, seconds=3), FS_HZ).heart_rate_bpm is None, "two beats are no rate"
    assert signal_facts(beats_mV(60)[:, ::10], 50.0).noise_uV is None, "no band left to measure noise in"
    one_lead_mV = np.zeros((12, 5000))
    one_lead_mV[6] = beats_mV(60)[6]
    assert signal_facts(one_lead_mV, FS_HZ).heart_rate_bpm == pytest.approx(60, rel=0.02)


def test_rates_of_recorded_ecgs_agree_with_their_annotators(shared_data) -> None:
    wfdb = pytest.importorskip("wfdb")
    errors = []
    for header in sorted((shared_data / "ludb" / "data").glob("*.hea"))[::3]:
        record = wfdb.rdrecord(str(header.with_suffix("")))
        notes = wfdb.rdann(str(header.with_suffix("")), "ii")
        complexes = notes.sample[np.array(notes.symbol) == "N"]
        expected = 60 * record.fs / np.median(np.diff(complexes))
        found = signal_facts(np.nan_to_num(record.p_signal.T), record.fs)
        errors.append(abs(found.heart_rate_bpm / expected - 1))
    assert len(errors) == 47
    assert np.mean(np.array(errors) > 0.05) <= 0.03, "within 5% of the annotated rate, all but one"
    assert max(errors) < 0.15


def test_beats_lie_where_the_complexes_are() -> None:
    found = beat_samples(beats_mV(60), FS_HZ)
    np.testing.assert_allclose(found, FS_HZ * np.arange(0.4, 10), atol=0.03 * FS_HZ)


def test_bands_hold_their_edges_and_say_nothing_of_the_unknown() -> None:
    row = {"sex": "F", "age": 59.9, "device": "AT-6"}
    assert bands(SignalFacts(60.0, 4.9), row) == {
        "sex": "F", "age": "40 to 59", "device": "AT-6", "heart rate": "60 to 100/min", "noise": "under 5 µV",
    }  # fmt: skip
    assert bands(SignalFacts(100.0, 20.0), row)["heart rate"] == "60 to 100/min"
    assert bands(SignalFacts(100.1, 20.1), row)["noise"] == "over 20 µV"
    unknown = bands(SignalFacts(None, None), {"sex": None, "age": None, "device": ""})
    assert set(unknown) == set(BANDS) and set(unknown.values()) == {""}


def test_every_synthetic_record_has_a_rate_and_a_noise(synthetic) -> None:
    prepared = Prepared.open(synthetic)
    for index in range(12):
        record = prepared.record(index)
        found = signal_facts(record.signal_mV, record.fs_hz)
        assert 35 < found.heart_rate_bpm < 160 and found.noise_uV is not None


def test_every_label_hangs_on_something_once() -> None:
    listed = [label for reasons in LABEL_BASIS.values() for members in reasons.values() for label in members]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(LABELS)
    groups = labels_by_basis(LABEL_SETS["ptbxl-super"])
    assert groups == {"QRS shape": ("MI", "CD"), "ST/T": ("STTC",), "voltage": ("HYP",)}
