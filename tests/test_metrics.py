"""Every metric against scikit-learn, every resample against a plain loop."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from sklearn import metrics as sk

from evlecg.errors import EvlecgError
from evlecg.metrics import (
    ACCURACY,
    AUC_HARD,
    AUROC,
    AVERAGE_PRECISION,
    BRIER,
    F1,
    HAMMING_LOSS,
    PRECISION,
    SENSITIVITY,
    SPECIFICITY,
    Metric,
    Scored,
    ece,
    estimate,
    f1,
    in_sample_sensitivity_at,
    in_sample_specificity_at,
    resampling,
)
from evlecg.metrics.resampling import observed, resample_patients, resampled
from tests.metrics_cases import Oracle, decisions, make, naive, rows_of_resample


def both_classes(oracle: Oracle) -> Oracle:
    return lambda truth, value: oracle(truth, value) if {0, 1} <= set(truth) else np.nan


def f1_or_nan(truth: np.ndarray, value: np.ndarray) -> float:
    return sk.f1_score(truth, value) if truth.sum() + value.sum() else np.nan


def sensitivity_of_roc(truth: np.ndarray, value: np.ndarray) -> float:
    false_share, true_share, _ = sk.roc_curve(truth, value, drop_intermediate=False)
    return true_share[false_share <= 0.2 + 1e-9].max()


def specificity_of_roc(truth: np.ndarray, value: np.ndarray) -> float:
    false_share, true_share, _ = sk.roc_curve(truth, value, drop_intermediate=False)
    return 1 - false_share[true_share >= 0.7 - 1e-9].min()


def ece_by_loop(truth: np.ndarray, value: np.ndarray) -> float:
    total = 0.0
    for b in range(15):
        low, high = b / 15, (b + 1) / 15
        inside = (value > low) & (value <= high) if b else value <= high
        if inside.any():
            total += inside.mean() * abs(truth[inside].mean() - value[inside].mean())
    return total if len(truth) else np.nan


def quiet(oracle: Oracle) -> Oracle:
    def call(truth: np.ndarray, value: np.ndarray) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return oracle(truth, value)

    return call


CASES: dict[str, tuple[Metric, Oracle, bool]] = {  # metric, its oracle, whether it reads decisions
    "auroc": (AUROC, both_classes(sk.roc_auc_score), False),
    "average_precision": (AVERAGE_PRECISION, both_classes(sk.average_precision_score), False),
    "sensitivity_at": (in_sample_sensitivity_at(0.8), both_classes(sensitivity_of_roc), False),
    "specificity_at": (in_sample_specificity_at(0.7), both_classes(specificity_of_roc), False),
    "auc_hard": (AUC_HARD, both_classes(sk.roc_auc_score), True),
    "f1": (F1, f1_or_nan, True),
    "f1_zero": (f1(empty=0.0), quiet(sk.f1_score), True),
    "sensitivity": (SENSITIVITY, lambda t, v: sk.recall_score(t, v) if t.any() else np.nan, True),
    "specificity": (SPECIFICITY, lambda t, v: sk.recall_score(1 - t, 1 - v) if not t.all() else np.nan, True),
    "precision": (PRECISION, lambda t, v: sk.precision_score(t, v) if v.any() else np.nan, True),
    "hamming_loss": (HAMMING_LOSS, sk.hamming_loss, True),
    "brier": (BRIER, lambda t, v: sk.brier_score_loss(t, v, pos_label=1), False),
    "ece": (ece(), ece_by_loop, False),
}


def case(name: str, **changes: object) -> tuple[Metric, Oracle, Scored]:
    metric, oracle, hard = CASES[name]
    scored = make(**changes)  # type: ignore[arg-type]
    return metric, oracle, decisions(scored) if hard else scored


@pytest.mark.parametrize("levels", [None, 20, 4, 1])
@pytest.mark.parametrize("name", CASES)
def test_values_equal_scikit_learn_with_ties_and_missing_truths(name: str, levels: int | None) -> None:
    metric, oracle, scored = case(name, n=200, levels=levels)
    expected_K = naive(oracle, scored)
    found = estimate(metric, scored, n_boot=0)
    assert_allclose([label.value for label in found.labels.values()], expected_K, rtol=1e-9, atol=1e-12)
    if "macro" in metric.overall:
        assert_allclose(found.overall["macro"].value, np.nanmean(expected_K), rtol=1e-9)
    if "weighted" in metric.overall:
        n_pos = (scored.truth_NK == 1).sum(axis=0)
        assert_allclose(found.overall["weighted"].value, np.average(expected_K, weights=n_pos), rtol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_resamples_equal_a_plain_loop_with_scikit_learn(name: str) -> None:
    metric, oracle, scored = case(name, n=50, k=3, patients=22, levels=12)
    count_PR = next(resample_patients(scored.n_patients, 40, 3, chunk=40))
    expected_RK = np.array([naive(oracle, scored, rows_of_resample(scored, count_P)) for count_P in count_PR.T])
    value_RK = resampled({"": metric.bind(scored)}, scored.n_patients, 50, n_boot=40, seed=3)[""].label_RK
    assert_allclose(value_RK, expected_RK, rtol=1e-9, atol=1e-12)

    found = estimate(metric, scored, n_boot=40, seed=3)
    low_high_K = np.nanpercentile(expected_RK, (2.5, 97.5), axis=0).T
    if metric.reflected:
        low_high_K = np.clip(2 * naive(oracle, scored)[:, None] - low_high_K[:, ::-1], 0, 1)
    assert_allclose([label.ci95 for label in found.labels.values()], low_high_K, rtol=1e-9, atol=1e-12)
    if not metric.reflected and "macro" in metric.overall:
        macro_R = np.nanmean(expected_RK, axis=1)
        assert_allclose(found.overall["macro"].ci95, np.percentile(macro_R, (2.5, 97.5)), rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "weighted"),
    [
        ("auroc", sk.roc_auc_score),
        ("average_precision", sk.average_precision_score),
        ("auc_hard", sk.roc_auc_score),
        ("f1", sk.f1_score),
        ("sensitivity", sk.recall_score),
        ("precision", sk.precision_score),
        ("hamming_loss", sk.hamming_loss),
        ("brier", sk.brier_score_loss),
    ],
)
def test_counts_are_scikit_learns_sample_weights(name: str, weighted: Callable[..., float]) -> None:
    metric, _, scored = case(name, levels=8, missing=0.2)
    count_P = np.random.default_rng(4).integers(0, 5, scored.n_patients)
    value_K = metric.bind(scored)(count_P[:, None].astype(float)).label_RK[0]
    for k, (truth_N, value_N) in enumerate(zip(scored.truth_NK.T, scored.value_NK.T, strict=True)):
        seen = ~np.isnan(truth_N)
        weight_N = count_P[scored.patient_N][seen]
        assert_allclose(value_K[k], weighted(truth_N[seen], value_N[seen], sample_weight=weight_N), rtol=1e-9)


def test_means_over_labels_equal_scikit_learns_multilabel_ones() -> None:
    scored = make(n=300, k=5, levels=30, missing=0)
    truth_NK, value_NK, hard = scored.truth_NK, scored.value_NK, decisions(scored)
    for metric, function in ((AUROC, sk.roc_auc_score), (AVERAGE_PRECISION, sk.average_precision_score)):
        for average in ("macro", "weighted"):
            found = estimate(metric, scored, n_boot=0).overall[average].value
            assert_allclose(found, function(truth_NK, value_NK, average=average), rtol=1e-9)
    for average in ("macro", "micro", "weighted"):
        expected = sk.f1_score(truth_NK, hard.value_NK, average=average)
        assert_allclose(estimate(F1, hard, n_boot=0).overall[average].value, expected, rtol=1e-12)
    for metric, function in ((SENSITIVITY, sk.recall_score), (PRECISION, sk.precision_score)):
        for average in ("macro", "micro"):
            expected = function(truth_NK, hard.value_NK, average=average)
            assert_allclose(estimate(metric, hard, n_boot=0).overall[average].value, expected, rtol=1e-12)
    assert_allclose(estimate(HAMMING_LOSS, hard, n_boot=0).headline.value, sk.hamming_loss(truth_NK, hard.value_NK))
    assert_allclose(estimate(ACCURACY, hard, n_boot=0).headline.value, sk.accuracy_score(truth_NK, hard.value_NK))


def test_auc_hard_is_the_mean_over_classes_that_are_present() -> None:
    truth_NK = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]], dtype=float)
    answer_NK = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 0, 0]], dtype=float)
    found = estimate(AUC_HARD, Scored(answer_NK, truth_NK, list("abcd"), ("X", "Y", "Z")), n_boot=0)
    expected = [sk.roc_auc_score(truth_NK[:, k], answer_NK[:, k]) for k in (0, 1)]
    assert found.headline.value == np.mean(expected)
    assert found.headline.n_labels == 2
    assert found.undefined == {"Z": "all 4 records are negative"}


def test_f1_of_a_label_that_nobody_names() -> None:
    truth_NK, answer_NK = np.array([[1.0, 0], [0, 0], [1, 0]]), np.array([[1.0, 0], [0, 0], [0, 0]])
    scored = Scored(answer_NK, truth_NK, list("abc"), ("X", "Y"))
    assert estimate(F1, scored, n_boot=0).undefined == {"Y": "neither a truth nor an answer is positive"}
    assert_allclose(estimate(F1, scored, n_boot=0).headline.value, 2 / 3)
    assert_allclose(estimate(f1(empty=0.0), scored, n_boot=0).headline.value, 1 / 3)
    assert_allclose(sk.f1_score(truth_NK, answer_NK, average="macro", zero_division=0), 1 / 3)


def test_accuracy_counts_records_with_every_assessed_label_right() -> None:
    truth_NK = np.array([[1, 0], [1, np.nan], [0, 1], [np.nan, np.nan]])
    answer_NK = np.array([[1.0, 0], [1, 1], [0, 0], [1, 1]])
    found = estimate(ACCURACY, Scored(answer_NK, truth_NK, list("aabc"), ("X", "Y")), n_boot=200)
    assert (found.headline.value, found.headline.n, found.headline.n_patients) == (2 / 3, 3, 2)
    assert found.labels == {}

    answers = Scored.answers([1, 0, 1, 1], list("abcd"))
    found = estimate(ACCURACY, answers, n_boot=300, seed=1)
    assert (found.headline.value, found.headline.n, found.headline.n_pos) == (0.75, 4, None)
    count_PR = next(resample_patients(4, 300, 1, chunk=300))
    expected_R = np.array([1, 0, 1, 1]) @ count_PR / 4
    assert_allclose(found.headline.ci95, np.percentile(expected_R, (2.5, 97.5)))


def test_counts_and_words_come_with_the_number() -> None:
    scored = make(n=60, k=2, patients=20)
    found = estimate(AUROC, scored, n_boot=50, seed=9)
    for k, label in enumerate(found.labels.values()):
        seen = ~np.isnan(scored.truth_NK[:, k])
        assert label.n == seen.sum()
        assert label.n_pos == (scored.truth_NK[:, k] == 1).sum()
        assert label.n_patients == len({p for p, here in zip(scored.patient_ids, seen, strict=True) if here})
        assert label.method == AUROC.formula
        assert "50 resamples of the patients" in label.interval_method
        assert "seed 9" in label.interval_method
    macro = found.headline
    assert macro.n_pos == sum(label.n_pos for label in found.labels.values())
    assert (macro.n_labels, macro.n) == (2, (~np.isnan(scored.truth_NK)).any(axis=1).sum())
    assert AUROC.formula in macro.method
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert written["overall"]["macro"]["value"] == macro.value
    assert written["labels"]["A"]["ci95"] == list(found.labels["A"].ci95)
    assert written["method"] == AUROC.formula
    assert "method" not in written["labels"]["A"]
    assert estimate(AUROC, scored, n_boot=0).headline.ci95 is None


def test_undefined_is_none_with_a_reason_and_out_of_the_mean() -> None:
    value_NK = np.array([[0.1, 0.5, 0.2, 0.3], [0.9, 0.1, 0.7, 0.1], [0.3, 0.2, 0.1, 0.9], [0.4, 0.6, 0.5, 0.2]])
    truth_NK = np.array([[0, 1, 0, np.nan], [1, 1, 0, np.nan], [0, 1, 0, np.nan], [1, 1, 0, np.nan]])
    scored = Scored(value_NK, truth_NK, list("abcd"), tuple("WXYZ"))
    for metric in (AUROC, AVERAGE_PRECISION, in_sample_sensitivity_at(0.5)):
        found = estimate(metric, scored, n_boot=50)
        assert [label.value for label in found.labels.values()] == [1.0, None, None, None]
        assert [label.ci95 is None for label in found.labels.values()] == [False, True, True, True]
        assert found.undefined == {
            "X": "all 4 records are positive",
            "Y": "all 4 records are negative",
            "Z": "no record was assessed",
        }
        assert (found.headline.value, found.headline.n_labels) == (1.0, 1)
    alone = estimate(AUROC, Scored(value_NK[:, 1:], truth_NK[:, 1:], list("abcd"), tuple("XYZ")), n_boot=50)
    assert (alone.headline.value, alone.headline.ci95) == (None, None)
    assert alone.headline.undefined_because == "no label has a value"
    hard = decisions(scored)
    assert estimate(SENSITIVITY, hard).undefined["Y"] == "all 4 records are negative"
    assert estimate(SPECIFICITY, hard).undefined["X"] == "all 4 records are positive"
    assert estimate(PRECISION, decisions(scored, 2.0)).undefined["W"] == "no answer is positive"


def test_one_patient_on_a_side_has_no_interval() -> None:
    value_N = np.linspace(0, 1, 20)
    truth_NK = np.zeros((20, 2))
    truth_NK[15:17, 0] = 1  # two records, one patient
    truth_NK[15:, 1] = 1
    patient_ids = [f"p{i // 2 if i != 16 else 7}" for i in range(20)]
    assert patient_ids[15] == patient_ids[16]
    scored = Scored(np.stack([value_N, value_N], axis=1), truth_NK, patient_ids, ("A", "B"))
    found = estimate(AUROC, scored, n_boot=100)
    assert found.labels["A"].value is not None
    assert found.labels["A"].ci95 is None
    assert found.labels["A"].caveat == "no interval: fewer than 2 patients on one side"
    assert found.labels["B"].ci95 is not None
    assert found.headline.ci95 is not None
    sensitivity = estimate(SENSITIVITY, decisions(scored), n_boot=100)
    assert sensitivity.labels["A"].caveat == "no interval: fewer than 2 patients with a positive record"
    assert estimate(SPECIFICITY, decisions(scored), n_boot=100).labels["A"].ci95 is not None


def test_an_interval_without_width_says_so() -> None:
    perfect = Scored(
        np.array([[1.0]] * 5 + [[0.0]] * 5), np.array([[1.0]] * 5 + [[0.0]] * 5), list("abcdefghij"), ("A",)
    )
    for metric in (AUROC, SENSITIVITY, ACCURACY):
        assert estimate(metric, perfect, n_boot=100).headline.ci95 == (1.0, 1.0)
        assert "every resample gives the same value" in (estimate(metric, perfect, n_boot=100).headline.caveat or "")
    assert estimate(AUROC, make(), n_boot=100).headline.caveat is None


def test_resample_without_one_class_is_left_out_for_that_label() -> None:
    scored = make(n=30, k=2, patients=30, missing=0)
    truth_NK = scored.truth_NK.copy()
    truth_NK[:, 0] = 0
    two = [scored.patient_ids.index(patient) for patient in sorted(set(scored.patient_ids))[:2]]
    truth_NK[two, 0] = 1  # absent from about a seventh of the resamples
    scored = scored.replaced(truth_NK=truth_NK)
    value_RK = resampled({"": AUROC.bind(scored)}, scored.n_patients, 30, n_boot=300, seed=0)[""].label_RK
    missing_K = np.isnan(value_RK).sum(axis=0)
    assert 15 < missing_K[0] < 80
    assert missing_K[1] == 0
    found = estimate(AUROC, scored, n_boot=300)
    assert_allclose(found.labels["A"].ci95, np.nanpercentile(value_RK[:, 0], (2.5, 97.5)))
    assert_allclose(found.headline.ci95, np.percentile(np.nanmean(value_RK, axis=1), (2.5, 97.5)))


@pytest.mark.parametrize("name", ["auroc", "average_precision", "sensitivity_at", "specificity_at", "auc_hard"])
def test_a_resample_with_one_class_has_no_value(name: str) -> None:
    metric, _, _ = CASES[name]
    scored = Scored(np.array([[1.0], [0], [1], [0]]), np.array([[1.0], [1], [0], [0]]), list("abcd"), ("A",))
    count_PR = np.array([[1, 2, 0], [1, 2, 0], [1, 0, 1], [1, 0, 3]], dtype=float)  # all, positives, negatives
    assert_array_equal(np.isnan(metric.bind(scored)(count_PR).label_RK[:, 0]), [False, True, True])


def test_label_groups_are_means_over_the_labels_named() -> None:
    scored = make(n=150, k=4)
    truth_NK = scored.truth_NK.copy()
    truth_NK[:, 3] = 0
    scored = scored.replaced(truth_NK=truth_NK)
    groups = {"QRS": ("A", "C", "not here"), "rhythm": ("B", "D"), "voltage": ("D",), "axis": ("elsewhere",)}
    found = estimate(AUROC, scored, label_groups=groups, n_boot=80, seed=2)
    value = {name: label.value for name, label in found.labels.items()}
    assert_allclose(found.label_groups["QRS"].value, (value["A"] + value["C"]) / 2)
    assert found.label_groups["rhythm"].value == value["B"]
    assert found.label_groups["rhythm"].ci95 == found.labels["B"].ci95
    assert "mean over A, C;" in found.label_groups["QRS"].method
    assert found.label_groups["QRS"].n_pos == found.labels["A"].n_pos + found.labels["C"].n_pos
    assert found.label_groups["voltage"].undefined_because == "no label of the group has a value"
    assert found.label_groups["axis"].undefined_because == "the data have no label of the group"
    value_RK = resampled({"": AUROC.bind(scored)}, scored.n_patients, 20, n_boot=80, seed=2)[""].label_RK
    expected = np.percentile((value_RK[:, 0] + value_RK[:, 2]) / 2, (2.5, 97.5))
    assert_allclose(found.label_groups["QRS"].ci95, expected)


@pytest.mark.parametrize("metric", [AUROC, AVERAGE_PRECISION, BRIER])
def test_records_of_a_patient_are_drawn_together(metric: Metric) -> None:
    scored = make(n=80, patients=10**9)  # everyone once
    copied = Scored(
        np.repeat(scored.value_NK, 5, axis=0), np.repeat(scored.truth_NK, 5, axis=0), np.repeat(scored.patient_ids, 5),
        scored.labels,
    )  # fmt: skip
    single, five = (estimate(metric, data, n_boot=200).headline for data in (scored, copied))
    assert_allclose(five.ci95, single.ci95, rtol=1e-9)  # five copies are no new evidence
    assert five.n_pos == 5 * single.n_pos
    assert five.n_patients == single.n_patients


@pytest.mark.parametrize("metric", [AUROC, SENSITIVITY])
def test_intervals_hold_the_truth_about_95_times_in_100(metric: Metric) -> None:
    held = 0
    truth = {"auroc": 0.7602499, "sensitivity": 0.6914625}[metric.name]  # Phi(1 / sqrt 2), Phi(1 / 2)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        truth_N1 = np.repeat([0.0, 1.0], 60)[:, None]
        value_N1 = rng.normal(size=(120, 1)) + truth_N1
        scored = Scored(value_N1, truth_N1, [f"p{i}" for i in range(120)], ("A",))
        data = scored if metric is AUROC else decisions(scored, 0.5)
        low, high = estimate(metric, data, n_boot=300, seed=seed).headline.ci95
        held += low <= truth <= high
    assert 178 <= held <= 198


def test_same_seed_same_numbers_whatever_the_chunk_and_the_record_order(monkeypatch: pytest.MonkeyPatch) -> None:
    scored = make(levels=12)
    order = np.random.default_rng(0).permutation(len(scored.patient_ids))
    mixed = Scored(
        scored.value_NK[order], scored.truth_NK[order], [scored.patient_ids[i] for i in order], scored.labels
    )
    first = {metric.name: estimate(metric, scored, n_boot=100, seed=5) for metric in (AUROC, AVERAGE_PRECISION)}
    for metric in (AUROC, AVERAGE_PRECISION):
        assert estimate(metric, mixed, n_boot=100, seed=5) == first[metric.name]
        assert estimate(metric, scored, n_boot=100, seed=6).headline.ci95 != first[metric.name].headline.ci95
    monkeypatch.setattr(resampling, "CHUNK_CELLS", 7 * scored.n_patients)
    for metric in (AUROC, AVERAGE_PRECISION):
        assert estimate(metric, scored, n_boot=100, seed=5) == first[metric.name]
    monkeypatch.setattr(resampling, "EXACT_IN_FLOAT32", 0)  # the float64 path
    for metric in (AUROC, AVERAGE_PRECISION):
        assert estimate(metric, scored, n_boot=100, seed=5) == first[metric.name]


def test_counts_sum_to_the_patients() -> None:
    pieces = list(resample_patients(13, 10, 0, chunk=4))
    assert [piece.shape for piece in pieces] == [(13, 4), (13, 4), (13, 2)]
    assert_array_equal(np.concatenate(pieces, axis=1).sum(axis=0), np.full(10, 13))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ranking_metrics_see_the_order_only(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 25))
    level_N = np.array(data.draw(st.lists(st.integers(-4, 4), min_size=n, max_size=n)), dtype=float)
    truth_N = np.array(data.draw(st.lists(st.sampled_from([0.0, 1.0, np.nan]), min_size=n, max_size=n)))
    patients = [str(p) for p in data.draw(st.lists(st.integers(0, 6), min_size=n, max_size=n))]

    def value(metric: Metric, score_N: np.ndarray, truth_N: np.ndarray) -> float | None:
        scored = Scored(score_N[:, None], truth_N[:, None], patients, ("A",))
        return estimate(metric, scored, n_boot=0).headline.value

    auroc = value(AUROC, level_N, truth_N)
    for metric in (AUROC, AVERAGE_PRECISION, in_sample_sensitivity_at(0.9), in_sample_specificity_at(0.9)):
        assert value(metric, np.exp(level_N), truth_N) == value(metric, level_N, truth_N)
    if auroc is None:
        assert not {0.0, 1.0} <= set(truth_N)
        return
    assert_allclose(value(AUROC, -level_N, truth_N), 1 - auroc, atol=1e-12)
    assert_allclose(value(AUROC, level_N, 1 - truth_N), 1 - auroc, atol=1e-12)
    seen = ~np.isnan(truth_N)
    assert_allclose(auroc, sk.roc_auc_score(truth_N[seen], level_N[seen]), atol=1e-12)
    expected = sk.average_precision_score(truth_N[seen], level_N[seen])
    assert_allclose(value(AVERAGE_PRECISION, level_N, truth_N), expected, atol=1e-12)


def test_nan_scores_are_bad_input_only_where_assessed() -> None:
    scored = make()
    value_NK = np.where(np.isnan(scored.truth_NK), np.nan, scored.value_NK)
    assert estimate(AUROC, scored.replaced(value_NK=value_NK), n_boot=0) == estimate(AUROC, scored, n_boot=0)
    n = int(np.flatnonzero(~np.isnan(scored.truth_NK[:, 2]))[3])
    value_NK[n, 2] = np.nan
    with pytest.raises(EvlecgError, match=f"1 of .* not numbers .label C, record r{n}"):
        scored.replaced(value_NK=value_NK)
    with pytest.raises(EvlecgError, match=f"label C, row {n}"):
        Scored(value_NK, scored.truth_NK, scored.patient_ids, scored.labels)


def test_what_a_metric_does_not_read_is_bad_input() -> None:
    scored = make()
    for metric in (AUC_HARD, F1, SENSITIVITY, SPECIFICITY, PRECISION, HAMMING_LOSS, ACCURACY):
        with pytest.raises(EvlecgError, match=r"reads decisions, 0 or 1, not 0\.\d+ .label A, record r"):
            estimate(metric, scored)
    logits = scored.replaced(value_NK=scored.value_NK * 9 - 4)
    for metric in (BRIER, ece()):
        with pytest.raises(EvlecgError, match=r"reads probabilities, between 0 and 1, not "):
            estimate(metric, logits)
    with pytest.raises(EvlecgError, match="accuracy reads"):
        Scored.answers([0.5, 1], ["a", "b"])


def test_records_without_a_patient_are_bad_input() -> None:
    scored = make()
    with pytest.raises(EvlecgError, match=r"2 of 120 records have no patient id .row 7"):
        Scored(scored.value_NK, scored.truth_NK,
               [None if n in (7, 9) else p for n, p in enumerate(scored.patient_ids)], scored.labels)  # fmt: skip


def test_misuse_raises() -> None:
    scored = make()
    with pytest.raises(ValueError, match="not both"):
        Scored(scored.value_NK[:, :2], scored.truth_NK, scored.patient_ids, scored.labels)
    with pytest.raises(ValueError, match="0, 1 or NaN"):
        Scored(scored.value_NK, scored.truth_NK + 1, scored.patient_ids, scored.labels)
    with pytest.raises(ValueError, match="patient ids"):
        Scored(scored.value_NK, scored.truth_NK, scored.patient_ids[1:], scored.labels)
    with pytest.raises(ValueError, match="columns for the labels"):
        Scored(scored.value_NK, scored.truth_NK, scored.patient_ids, ("A", "A", "B", "C"))
    with pytest.raises(ValueError, match="bool"):
        scored.where(np.arange(3))
    with pytest.raises(ValueError, match="in \\(0, 1\\]"):
        in_sample_sensitivity_at(90)


def test_no_records_no_numbers() -> None:
    empty = Scored(np.zeros((0, 2)), np.zeros((0, 2)), [], ("A", "B"))
    for metric, _, _ in CASES.values():
        found = estimate(metric, empty)
        assert {estimate.value for estimate in found.overall.values()} == {None}
        assert found.labels["A"].undefined_because == "no record was assessed"
    assert estimate(ACCURACY, empty).headline.undefined_because == "no record was assessed"


def test_sums_of_many_records_stay_exact() -> None:
    """A resample can hold more records than float32 has whole numbers: the sums then run in float64."""
    scored = make(n=40, patients=8, levels=6)
    statistic = AUROC.bind(scored)
    seen: list[np.dtype] = []

    class Spy:
        counts_only = True

        def __call__(self, count_PR: np.ndarray) -> resampling.Values:
            seen.append(count_PR.dtype)
            return statistic(count_PR)

    for most_records in (1, 1 << 22):
        resampled({"": Spy()}, scored.n_patients, most_records, n_boot=3, seed=0)
    assert seen == [np.float32, np.float64]
    assert_allclose(observed(statistic, scored.n_patients).label_RK[0], naive(CASES["auroc"][1], scored))


def test_speed_is_reported(record_property: Callable[[str, object], None]) -> None:
    """A tenth of the records and of the resamples of a full benchmark: `pytest --junitxml` keeps the seconds."""
    scored = Scored(*_large())
    start_s = time.perf_counter()
    found = estimate(AUROC, scored, n_boot=200)
    record_property("bootstrap_2000x71x200_s", round(time.perf_counter() - start_s, 3))
    assert all(label.ci95[0] <= label.value <= label.ci95[1] for label in found.labels.values())


def _large() -> tuple[np.ndarray, np.ndarray, list[str], tuple[str, ...]]:
    rng = np.random.default_rng(0)
    truth_NK = (rng.random((2000, 71)) < np.linspace(0.02, 0.5, 71)).astype(float)
    value_NK = rng.normal(size=truth_NK.shape) + truth_NK
    return value_NK, truth_NK, [f"p{i}" for i in rng.integers(0, 1800, 2000)], tuple(f"label {k}" for k in range(71))
