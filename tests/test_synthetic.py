"""The generator: physics exact, seeds stable, prevalences and voltages as in life."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from evlecg.data.synthetic import LABELS, WAVES, Patient, _beats, draw_patient, generate, one_record
from evlecg.errors import EvlecgError
from evlecg.schema import LEADS, Record


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return list(generate({"train": 500}))


@pytest.fixture(scope="module")
def patients() -> list[Patient]:
    return [draw_patient(np.random.default_rng((7, i))) for i in range(3000)]


def _healthy(records: list[Record]) -> list[Record]:
    return [record for record in records if record.labels["NORM"]]


def test_records_are_what_was_asked_for(records: list[Record]) -> None:
    assert len(records) == 500 and len({record.id for record in records}) == 500
    for record in records:
        assert record.signal_mV.shape == (12, 2500) and record.signal_mV.dtype == np.float32
        assert np.isfinite(record.signal_mV).all()
        assert tuple(record.labels) == LABELS
        assert record.split == "train" and record.report.endswith(".")
    (fast,) = generate({"test": 1}, fs_hz=500.0, duration_s=8.0)
    assert fast.signal_mV.shape == (12, 4000) and fast.duration_s == 8.0


def test_limb_leads_obey_einthoven_and_goldberger_exactly(records: list[Record]) -> None:
    for record in records[:100]:
        one, two, three, avr, avl, avf = record.signal_mV[:6]
        assert_array_equal(three, two - one)
        assert_array_equal(avr, -(one + two) / 2)
        assert_array_equal(avl, one - two / 2)
        assert_array_equal(avf, two - one / 2)


def test_a_record_depends_on_seed_split_and_number_only(records: list[Record]) -> None:
    few = list(generate({"test": 2, "train": 5}))
    for again, record in zip(few[2:], records[:5], strict=True):
        assert (again.id, again.patient_id, again.labels, again.report) == (
            record.id, record.patient_id, record.labels, record.report
        )  # fmt: skip
        assert_array_equal(again.signal_mV, record.signal_mV)
    other_seed, other_split = next(generate({"train": 1}, seed=1)), few[0]
    for other in (other_seed, other_split):
        bends = [np.diff(record.signal_mV[6], 2) > 0 for record in (other, records[0])]  # the sign of the noise
        assert np.mean(bends[0] == bends[1]) < 0.6
        assert (other.signal_mV != records[0].signal_mV).any()


def test_a_few_patients_have_two_records_in_one_split(records: list[Record]) -> None:
    by_patient: dict[str, list[Record]] = {}
    for record in [*records, *generate({"val": 40})]:
        by_patient.setdefault(record.patient_id, []).append(record)
    twice = [group for group in by_patient.values() if len(group) == 2]
    assert 0.01 < len(twice) / len(by_patient) < 0.06
    for first, second in twice:
        assert first.split == second.split and first.age == second.age and first.sex == second.sex
        assert {k: first.labels[k] for k in LABELS[:6]} == {k: second.labels[k] for k in LABELS[:6]}
        assert (first.signal_mV != second.signal_mV).any()
    assert max(len(group) for group in by_patient.values()) == 2


def test_prevalences(patients: list[Patient], records: list[Record]) -> None:
    share = {label: np.mean([patient.labels[label] for patient in patients]) for label in LABELS[:6]}
    assert_allclose(share["NORM"], 0.41, atol=0.03)
    for label in ("MI", "STTC", "CD", "HYP"):
        assert 0.18 < share[label] < 0.30, label
    assert 0.07 < share["AFIB"] < 0.13
    for label in ("SBRAD", "STACH"):
        assert 0.05 < np.mean([record.labels[label] for record in records]) < 0.16, label
    assert 0.2 < np.mean([sum(patient.labels[k] for k in LABELS[1:5]) > 1 for patient in patients]) < 0.4


def test_norm_excludes_disease_and_afib_excludes_sinus_rates(records: list[Record]) -> None:
    for record in records:
        present = {label for label, is_present in record.labels.items() if is_present}
        assert not ("NORM" in present and present & {"MI", "STTC", "CD", "HYP", "AFIB"})
        assert len(present & {"AFIB", "SBRAD", "STACH"}) <= 1
        assert ("bradycardia" in record.report) == ("SBRAD" in present)


@pytest.mark.parametrize(
    ("lead", "lowest_mV", "highest_mV"), [("II", 0.7, 1.4), ("V5", 0.9, 1.7), ("V1", 0.1, 0.5), ("I", 0.3, 1.0)]
)
def test_healthy_r_waves_are_as_high_as_real_ones(
    records: list[Record], lead: str, lowest_mV: float, highest_mV: float
) -> None:
    peaks_mV = [record.signal_mV[LEADS.index(lead)].max() for record in _healthy(records)]
    assert lowest_mV < np.median(peaks_mV) < highest_mV
    assert np.percentile(peaks_mV, 99) < 3.5


def test_r_grows_and_s_shrinks_across_the_chest(records: list[Record]) -> None:
    chest = np.median([record.signal_mV[6:] for record in _healthy(records)[:100]], axis=0)
    assert chest.shape == (6, 2500)
    highs = np.median([record.signal_mV[6:].max(axis=1) for record in _healthy(records)], axis=0)
    lows = np.median([record.signal_mV[6:].min(axis=1) for record in _healthy(records)], axis=0)
    assert highs[0] < highs[1] < highs[2] < highs[3] and highs[5] < highs[3]
    assert -lows[0] > 0.5 and -lows[5] < 0.4


def _median_of(patients: list[Patient], finding: str, lead: str, measure) -> float:  # type: ignore[no-untyped-def]
    chosen = [patient for patient in patients if patient.findings == (finding,) and not patient.labels["AFIB"]][:25]
    assert len(chosen) >= 10, finding
    row = LEADS.index(lead)
    return float(
        np.median(
            [measure(one_record(np.random.default_rng(i), patient=p).signal_mV[row]) for i, p in enumerate(chosen)]
        )
    )


def test_diseases_do_what_they_do_at_the_bedside(patients: list[Patient]) -> None:
    def versus_normal(finding: str, lead: str, measure=np.max) -> tuple[float, float]:  # type: ignore[no-untyped-def]
        return _median_of(patients, finding, lead, measure), _median_of(patients, "normal ECG", lead, measure)

    sick, well = versus_normal("left ventricular hypertrophy", "V5")
    assert sick > 1.2 * well  # tall R
    sick, well = versus_normal("right bundle branch block", "V1")
    assert sick > well + 0.1  # R'
    sick, well = versus_normal("inferior infarction", "aVF", np.min)
    assert sick < well - 0.1  # Q
    sick, well = versus_normal("anteroseptal infarction", "V2")
    assert sick < well - 0.05  # lost R
    sick, well = versus_normal("left anterior fascicular block", "aVF", lambda mV: mV.max() + mV.min())
    assert sick < 0 < well  # left axis


def test_left_bundle_branch_block_is_wide(patients: list[Patient]) -> None:
    wide, narrow = (
        _median_of(patients, finding, "V6", lambda mV: (mV > 0.5 * mV.max()).sum())
        for finding in ("left bundle branch block", "normal ECG")
    )
    assert wide > 1.8 * narrow


def test_fibrillating_atria_have_no_p_wave_and_no_beat(patients: list[Patient]) -> None:
    rows = [WAVES.index("P1"), WAVES.index("P2")]
    for patient in patients[:300]:
        assert patient.waves_W5[rows, 2:].any() != patient.labels["AFIB"]
    scatter = [
        np.median(
            [np.std(rr) / np.mean(rr) for i in range(30) for rr in [np.diff(_rhythm(i, fibrillates))]],
        )
        for fibrillates in (False, True)
    ]
    assert scatter[0] < 0.06 < 0.15 < scatter[1]


def _rhythm(seed: int, fibrillates: bool) -> np.ndarray:
    beats_s = _beats(np.random.default_rng(seed), 0.8, fibrillates, 10.0, 0.25, 0.0)
    assert beats_s[0] < 0.5 and beats_s[-1] > 8.5
    return beats_s


def test_bad_input_is_named() -> None:
    with pytest.raises(EvlecgError, match="'train'"):
        generate({"trian": 3})
    with pytest.raises(EvlecgError, match="-1 records"):
        generate({"train": -1})
    with pytest.raises(EvlecgError, match="seed"):
        generate({"train": 1}, seed=-1)
    with pytest.raises(EvlecgError, match="heartbeat"):
        generate({"train": 1}, fs_hz=10.0)
