"""Numbers against scikit-learn, resamples against a plain loop."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.metrics import roc_auc_score

from evlecg import metrics
from evlecg.errors import EvlecgError
from evlecg.metrics import (
    auc,
    bootstrap_auc,
    macro_auc,
    paired_difference,
    resample_patients,
    resampled_auc,
)


def make(
    *, n: int = 120, k: int = 4, patients: int = 45, levels: int | None = None, shift: float = 1.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Scores (on `levels` distinct values: ties), truths with a tenth not assessed, patients with several records."""
    rng = np.random.default_rng(seed)
    truth_NK = (rng.random((n, k)) < np.linspace(0.1, 0.6, k)).astype(float)
    score_NK = rng.normal(size=(n, k)) + shift * truth_NK
    if levels is not None:
        score_NK = np.round(score_NK * levels / 6)
    truth_NK[rng.random((n, k)) < 0.1] = np.nan
    return score_NK, truth_NK, [f"p{i}" for i in rng.integers(0, patients, n)]


def naive_resamples(
    score_NK: np.ndarray, truth_NK: np.ndarray, patient_ids: list[str], count_PR: np.ndarray
) -> np.ndarray:
    """The bootstrap as one would say it: write every drawn patient's records down, then ask scikit-learn."""
    patients = sorted(set(patient_ids))
    rows_of = {patient: [i for i, owner in enumerate(patient_ids) if owner == patient] for patient in patients}
    value_RK = np.full((count_PR.shape[1], score_NK.shape[1]), np.nan)
    for r, count_P in enumerate(count_PR.T):
        rows = [i for p, patient in enumerate(patients) for _ in range(int(count_P[p])) for i in rows_of[patient]]
        for k in range(score_NK.shape[1]):
            drawn = [(truth_NK[i, k], score_NK[i, k]) for i in rows if not np.isnan(truth_NK[i, k])]
            if {truth for truth, _ in drawn} == {0, 1}:
                value_RK[r, k] = roc_auc_score(*zip(*drawn, strict=True))
    return value_RK


@pytest.mark.parametrize("levels", [None, 20, 4, 1])
def test_auc_equals_scikit_learn_with_ties(levels: int | None) -> None:
    score_NK, truth_NK, _ = make(n=300, levels=levels)
    expected = []
    for score_N, truth_N in zip(score_NK.T, truth_NK.T, strict=True):
        seen = ~np.isnan(truth_N)
        expected.append(roc_auc_score(truth_N[seen], score_N[seen]))
        assert_allclose(auc(score_N, truth_N), expected[-1], rtol=1e-12)
    assert_allclose(macro_auc(score_NK, truth_NK), np.mean(expected), rtol=1e-12)


def test_auc_by_hand() -> None:
    assert auc(np.array([0.1, 0.4, 0.4, 0.8]), np.array([0, 0, 1, 1])) == 0.875  # 3 wins and a tie of 4 pairs
    assert auc(np.array([0.1, 0.9]), np.array([True, False])) == 0.0


def test_one_class_is_none_and_out_of_the_mean() -> None:
    score_NK = np.array([[0.1, 0.5, 0.2, 0.3], [0.9, 0.1, 0.7, 0.1], [0.3, 0.2, 0.1, 0.9], [0.4, 0.6, 0.5, 0.2]])
    truth_NK = np.array([[0, 1, 0, np.nan], [1, 1, 0, np.nan], [0, 1, 0, np.nan], [1, 1, 0, np.nan]])
    result = bootstrap_auc(score_NK, truth_NK, list("abcd"), n_boot=50)
    assert [label.value for label in result.labels] == [1.0, None, None, None]
    assert [label.ci95 is None for label in result.labels] == [False, True, True, True]
    assert [(label.n_pos, label.n_neg) for label in result.labels] == [(2, 2), (4, 0), (0, 4), (0, 0)]
    assert [label.undefined_because for label in result.labels] == [
        None,
        "all 4 records are positive",
        "all 4 records are negative",
        "no record was assessed",
    ]
    assert result.macro.value == macro_auc(score_NK, truth_NK) == 1.0
    assert auc(score_NK[:, 1], truth_NK[:, 1]) is None
    assert macro_auc(score_NK[:, 1:], truth_NK[:, 1:]) is None
    empty = bootstrap_auc(score_NK[:, 1:], truth_NK[:, 1:], list("abcd"), n_boot=50)
    assert empty.macro == metrics.Estimate(None, None)


@pytest.mark.parametrize("levels", [None, 12, 3])
def test_resamples_equal_a_plain_loop_with_scikit_learn(levels: int | None) -> None:
    score_NK, truth_NK, patient_ids = make(n=60, patients=25, levels=levels)
    count_PR = next(resample_patients(len(set(patient_ids)), 60, 3, chunk=60))
    expected_RK = naive_resamples(score_NK, truth_NK, patient_ids, count_PR)
    value_RK = resampled_auc(score_NK, truth_NK, patient_ids, n_boot=60, seed=3)
    assert_allclose(value_RK, expected_RK, rtol=1e-12)

    result = bootstrap_auc(score_NK, truth_NK, patient_ids, n_boot=60, seed=3)
    for k, label in enumerate(result.labels):
        assert_allclose(label.ci95, np.nanpercentile(expected_RK[:, k], (2.5, 97.5)), rtol=1e-12)
    assert_allclose(result.macro.ci95, np.percentile(np.nanmean(expected_RK, axis=1), (2.5, 97.5)), rtol=1e-12)


def test_resample_without_one_class_is_left_out_for_that_label() -> None:
    score_NK, truth_NK, patient_ids = make(n=30, k=2, patients=30)
    truth_NK[:] = np.where(np.isnan(truth_NK), 0, truth_NK)
    truth_NK[:, 0] = 0
    two = [patient_ids.index(patient) for patient in sorted(set(patient_ids))[:2]]
    truth_NK[two, 0] = 1  # absent from about a seventh of the resamples
    value_RK = resampled_auc(score_NK, truth_NK, patient_ids, n_boot=300)
    missing_K = np.isnan(value_RK).sum(axis=0)
    assert 15 < missing_K[0] < 80
    assert missing_K[1] == 0
    result = bootstrap_auc(score_NK, truth_NK, patient_ids, n_boot=300)
    assert_allclose(result.labels[0].ci95, np.nanpercentile(value_RK[:, 0], (2.5, 97.5)))
    assert_allclose(result.macro.ci95, np.percentile(np.nanmean(value_RK, axis=1), (2.5, 97.5)))


def test_one_patient_on_a_side_has_no_interval() -> None:
    score_N = np.linspace(0, 1, 20)
    truth_NK = np.zeros((20, 2))
    truth_NK[15:17, 0] = 1  # two records, one patient
    truth_NK[15:, 1] = 1
    patient_ids = [f"p{i // 2 if i != 16 else 7}" for i in range(20)]
    assert patient_ids[15] == patient_ids[16]
    result = bootstrap_auc(np.stack([score_N, score_N], axis=1), truth_NK, patient_ids, n_boot=100)
    assert result.labels[0].value is not None
    assert result.labels[0].ci95 is None
    assert result.labels[1].ci95 is not None
    assert result.macro.ci95 is not None
    assert bootstrap_auc(score_N[:, None], truth_NK[:, :1], patient_ids, n_boot=100).macro.ci95 is None


def test_records_of_a_patient_are_drawn_together() -> None:
    score_NK, truth_NK, patient_ids = make(n=80, patients=10**9)  # everyone once
    single = bootstrap_auc(score_NK, truth_NK, patient_ids, n_boot=200)
    copied = bootstrap_auc(
        np.repeat(score_NK, 5, axis=0), np.repeat(truth_NK, 5, axis=0), np.repeat(patient_ids, 5), n_boot=200
    )
    assert_allclose(copied.macro.ci95, single.macro.ci95, rtol=1e-12)  # five copies are no new evidence
    assert copied.labels[0].n_pos == 5 * single.labels[0].n_pos


def test_interval_holds_the_truth_about_95_times_in_100() -> None:
    normal_auc = 0.7602499  # Phi(1 / sqrt 2)
    held = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        truth_N = np.repeat([0.0, 1.0], 60)
        score_N = rng.normal(size=120) + truth_N
        patients = [f"p{i}" for i in range(120)]
        low, high = bootstrap_auc(score_N[:, None], truth_N[:, None], patients, n_boot=300, seed=seed).macro.ci95
        held += low <= normal_auc <= high
    assert 180 <= held <= 198


def test_same_seed_same_numbers_whatever_the_chunk_and_the_record_order(monkeypatch: pytest.MonkeyPatch) -> None:
    score_NK, truth_NK, patient_ids = make(levels=12)
    first = bootstrap_auc(score_NK, truth_NK, patient_ids, n_boot=100, seed=5)
    order = np.random.default_rng(0).permutation(len(patient_ids))
    assert bootstrap_auc(score_NK[order], truth_NK[order], [patient_ids[i] for i in order], n_boot=100, seed=5) == first
    monkeypatch.setattr(metrics, "CHUNK_CELLS", 7 * len(patient_ids))
    assert bootstrap_auc(score_NK, truth_NK, patient_ids, n_boot=100, seed=5) == first
    monkeypatch.setattr(metrics, "EXACT_IN_FLOAT32", 0)  # the float64 path
    assert bootstrap_auc(score_NK, truth_NK, patient_ids, n_boot=100, seed=5) == first
    assert bootstrap_auc(score_NK, truth_NK, patient_ids, n_boot=100, seed=6).macro.ci95 != first.macro.ci95


def test_monotone_scores_give_the_same_numbers() -> None:
    score_NK, truth_NK, patient_ids = make()
    first = bootstrap_auc(score_NK, truth_NK, patient_ids, n_boot=50)
    assert bootstrap_auc(1 / (1 + np.exp(-score_NK)), truth_NK, patient_ids, n_boot=50) == first


def test_counts_sum_to_the_patients() -> None:
    pieces = list(resample_patients(13, 10, 0, chunk=4))
    assert [piece.shape for piece in pieces] == [(13, 4), (13, 4), (13, 2)]
    assert_array_equal(np.concatenate(pieces, axis=1).sum(axis=0), np.full(10, 13))


def test_paired_difference_uses_the_same_resamples() -> None:
    a_NK, truth_NK, patient_ids = make(n=200, patients=80, shift=1.5)
    b_NK = a_NK + np.random.default_rng(1).normal(size=a_NK.shape) * 0.8
    result = paired_difference(a_NK, b_NK, truth_NK, patient_ids, n_boot=400, seed=2)
    difference_R = np.nanmean(resampled_auc(a_NK, truth_NK, patient_ids, n_boot=400, seed=2), axis=1) - np.nanmean(
        resampled_auc(b_NK, truth_NK, patient_ids, n_boot=400, seed=2), axis=1
    )
    assert_allclose(result.value, macro_auc(a_NK, truth_NK) - macro_auc(b_NK, truth_NK))
    assert_allclose(result.ci95, np.percentile(difference_R, (2.5, 97.5)))
    below = (difference_R <= 0).sum()
    assert_allclose(result.p, min(1, 2 * (1 + min(below, 400 - below)) / 401))

    swapped = paired_difference(b_NK, a_NK, truth_NK, patient_ids, n_boot=400, seed=2)
    assert_allclose((swapped.value, swapped.p), (-result.value, result.p))
    assert_allclose(swapped.ci95, (-result.ci95[1], -result.ci95[0]))


def test_paired_difference_of_a_model_with_itself_is_nothing() -> None:
    score_NK, truth_NK, patient_ids = make()
    assert paired_difference(score_NK, score_NK, truth_NK, patient_ids, n_boot=50) == metrics.Difference(
        0.0, (0.0, 0.0), 1.0
    )
    truth_NK[:] = 1
    assert paired_difference(score_NK, score_NK, truth_NK, patient_ids, n_boot=50) == metrics.Difference(
        None, None, None
    )


def test_p_is_small_when_one_model_is_clearly_better() -> None:
    a_NK, truth_NK, patient_ids = make(n=300, patients=200, shift=2)
    noise_NK = np.random.default_rng(1).normal(size=a_NK.shape)
    result = paired_difference(a_NK, noise_NK, truth_NK, patient_ids, n_boot=200)
    assert_allclose(result.p, 2 / 201)
    assert result.ci95[0] > 0


def test_nan_scores_are_bad_input_only_where_assessed() -> None:
    score_NK, truth_NK, patient_ids = make()
    score_NK[np.isnan(truth_NK)] = np.nan
    assert macro_auc(score_NK, truth_NK) is not None
    score_NK[np.argmax(~np.isnan(truth_NK[:, 2])), 2] = np.nan
    with pytest.raises(EvlecgError, match="label column 2"):
        bootstrap_auc(score_NK, truth_NK, patient_ids)


def test_misuse_raises() -> None:
    score_NK, truth_NK, patient_ids = make()
    with pytest.raises(ValueError, match="not both"):
        macro_auc(score_NK[:, :2], truth_NK)
    with pytest.raises(ValueError, match="0, 1 or NaN"):
        macro_auc(score_NK, truth_NK + 1)
    with pytest.raises(ValueError, match="patient ids"):
        bootstrap_auc(score_NK, truth_NK, patient_ids[1:])


def test_no_records_no_numbers() -> None:
    result = bootstrap_auc(np.zeros((0, 2)), np.zeros((0, 2)), [])
    assert result.macro == metrics.Estimate(None, None)
    assert result.labels[0].undefined_because == "no record was assessed"


def test_speed_is_reported(record_property: Callable[[str, object], None]) -> None:
    """A tenth of the records and of the resamples of a full benchmark: `pytest --junitxml` keeps the seconds."""
    score_NK, truth_NK, patient_ids = make(n=2000, k=71, patients=1800)
    start_s = time.perf_counter()
    result = bootstrap_auc(score_NK, truth_NK, patient_ids, n_boot=200)
    record_property("bootstrap_2000x71x200_s", round(time.perf_counter() - start_s, 3))
    assert result.n_boot == 200
    assert all(label.ci95[0] <= label.value <= label.ci95[1] for label in result.labels)
