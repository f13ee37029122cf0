"""Calibration against scikit-learn and against what was put into the data."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.special import expit, logit
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, log_loss

from evlecg.errors import EvlecgError
from evlecg.metrics import (
    AUROC,
    BRIER,
    Scored,
    brier_term,
    ece,
    ece_if_calibrated,
    estimate,
    fit_platt,
    fit_temperature,
    reliability_curve,
)
from evlecg.metrics.resampling import resample_patients, resampled
from tests.metrics_cases import make


def drawn_from(slope: float, bias: float, *, n: int = 4000, k: int = 1, seed: int = 0) -> Scored:
    """Truths drawn from sigmoid(slope x logit(score) + bias): what a calibration should find."""
    rng = np.random.default_rng(seed)
    value_NK = expit(rng.normal(-0.5, 2, size=(n, k)))
    truth_NK = (rng.random((n, k)) < expit(slope * logit(value_NK) + bias)).astype(float)
    return Scored(value_NK, truth_NK, [f"p{i}" for i in range(n)], tuple("ABCD"[:k]))


def part(scored: Scored, k: int) -> tuple[np.ndarray, np.ndarray]:
    seen = ~np.isnan(scored.truth_NK[:, k])
    return scored.truth_NK[seen, k], scored.value_NK[seen, k]


@pytest.mark.parametrize(("kind", "strategy"), [("width", "uniform"), ("mass", "quantile")])
@pytest.mark.parametrize("levels", [None, 10])
def test_reliability_curve_equals_scikit_learns(kind: str, strategy: str, levels: int | None) -> None:
    scored = make(n=300, k=2, levels=levels)
    for k, label in enumerate(scored.labels):
        truth_N, value_N = part(scored, k)
        curve = reliability_curve(scored, label, n_bins=8, kind=kind, n_boot=50)  # type: ignore[arg-type]
        share, mean = calibration_curve(truth_N, value_N, n_bins=8, strategy=strategy)
        assert_allclose([b.share_pos for b in curve.bins], share, rtol=1e-12)
        assert_allclose([b.mean_score for b in curve.bins], mean, rtol=1e-12)
        assert sum(b.n for b in curve.bins) == len(truth_N)
        assert sum(b.n_pos for b in curve.bins) == truth_N.sum()
        assert all(b.low - 1e-9 <= b.mean_score <= b.high + 1e-9 for b in curve.bins)
        assert all(b.ci95 is None or b.ci95[0] <= b.share_pos <= b.ci95[1] for b in curve.bins if b.n_patients > 5)
        assert json.loads(json.dumps(curve.to_dict()))["bins"][0]["n"] == curve.bins[0].n


def test_reliability_interval_is_over_patients() -> None:
    scored = make(n=60, k=1, patients=15, missing=0)
    curve = reliability_curve(scored, "A", n_bins=3, n_boot=80, seed=6)
    count_PR = next(resample_patients(scored.n_patients, 80, 6, chunk=80))
    weight_NR = count_PR[scored.patient_N]
    truth_N, value_N = part(scored, 0)
    for b in curve.bins:
        inside = (value_N > b.low) & (value_N <= b.high)
        share_R = truth_N[inside] @ weight_NR[inside] / weight_NR[inside].sum(axis=0)
        assert_allclose(b.ci95, np.nanpercentile(share_R, (2.5, 97.5)))
        assert b.n_patients == len(set(scored.patient_N[inside]))


@pytest.mark.parametrize("kind", ["width", "mass"])
@pytest.mark.parametrize("levels", [None, 6])
def test_calibration_error_is_that_of_the_curve(kind: str, levels: int | None) -> None:
    scored = make(n=200, k=3, levels=levels)
    found = estimate(ece(10, kind), scored, n_boot=0)  # type: ignore[arg-type]
    for label in scored.labels:
        curve = reliability_curve(scored, label, n_bins=10, kind=kind, n_boot=0)  # type: ignore[arg-type]
        n = sum(b.n for b in curve.bins)
        by_hand = sum(b.n / n * abs(b.share_pos - b.mean_score) for b in curve.bins)
        assert_allclose(found.labels[label].value, by_hand, rtol=1e-12)


def test_calibration_error_of_the_honest_is_near_nothing() -> None:
    assert estimate(ece(), drawn_from(1, 0, n=20000), n_boot=0).headline.value < 0.015
    assert estimate(ece(), drawn_from(1, 2, n=20000), n_boot=0).headline.value > 0.15


@pytest.mark.parametrize("kind", ["width", "mass"])
def test_the_level_of_chance_of_the_calibration_error(kind: str) -> None:
    scored = make(n=150, k=2)
    found = ece_if_calibrated(scored, "B", n_bins=8, kind=kind, n_draws=300, seed=3)  # type: ignore[arg-type]
    metric = ece(8, kind)  # type: ignore[arg-type]
    assert_allclose(found.value, estimate(metric, scored, n_boot=0).labels["B"].value, rtol=1e-12)
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(300):
        drawn_NK = np.where(np.isnan(scored.truth_NK), np.nan, rng.random(scored.truth_NK.shape) < scored.value_NK)
        errors.append(estimate(metric, scored.replaced(truth_NK=drawn_NK), n_boot=0).labels["B"].value)
    assert_allclose(found.expected, np.mean(errors), rtol=0.06)
    assert_allclose(found.upper95, np.percentile(errors, 95), rtol=0.12)
    assert found.n == (~np.isnan(scored.truth_NK[:, 1])).sum()
    none = ece_if_calibrated(scored.replaced(truth_NK=np.full((150, 2), np.nan)), "B")
    assert (none.value, none.p, none.n) == (None, None, 0)


def test_the_honest_pass_the_test_of_calibration_19_times_in_20() -> None:
    honest = [ece_if_calibrated(drawn_from(1, 0, n=200, seed=seed), "A", n_draws=200).p for seed in range(150)]
    assert 1 <= sum(p < 0.05 for p in honest) <= 16
    assert ece_if_calibrated(drawn_from(0.4, 0, n=500), "A").p < 0.01


def test_mirrored_interval_of_the_calibration_error_is_nearer_to_nothing() -> None:
    """Noise adds to the error of a calibrated model, once in the sample and, less, once more in each resample."""
    mirrored = percentile = 0
    for seed in range(40):
        scored = drawn_from(1, 0, n=150, seed=seed)
        found = estimate(ece(10), scored, n_boot=100).headline
        value_R = resampled({"": ece(10).bind(scored)}, 150, 1, n_boot=100, seed=0)[""].label_RK[:, 0]
        mirrored += found.ci95[0] == 0.0
        percentile += np.percentile(value_R, 2.5) <= 0.01
    assert mirrored >= 12
    assert percentile <= 2


@pytest.mark.parametrize("kind", ["width", "mass"])
@pytest.mark.parametrize("levels", [None, 6])
def test_brier_is_the_sum_of_its_terms(kind: str, levels: int | None) -> None:
    scored = make(n=150, k=3, levels=levels)
    terms = {
        term: estimate(brier_term(term, 10, kind), scored, n_boot=30).labels  # type: ignore[arg-type]
        for term in ("reliability", "resolution", "uncertainty", "within_bins")
    }
    brier = estimate(BRIER, scored, n_boot=0).labels
    for k, label in enumerate(scored.labels):
        truth_N, value_N = part(scored, k)
        value = {term: labels[label].value for term, labels in terms.items()}
        total = value["reliability"] - value["resolution"] + value["uncertainty"] + value["within_bins"]
        assert_allclose(total, brier_score_loss(truth_N, value_N, pos_label=1), rtol=1e-12)
        assert_allclose(brier[label].value, total, rtol=1e-12)
        curve = reliability_curve(scored, label, n_bins=10, kind=kind, n_boot=0)  # type: ignore[arg-type]
        n, share = len(truth_N), truth_N.mean()
        reliability = sum(b.n * (b.mean_score - b.share_pos) ** 2 for b in curve.bins) / n
        resolution = sum(b.n * (b.share_pos - share) ** 2 for b in curve.bins) / n
        within = 0.0
        for b in curve.bins:
            inside = (value_N > b.low) & (value_N <= b.high) | (value_N == b.low) & (b is curve.bins[0])
            away = value_N[inside] - b.mean_score
            within += (away**2 - 2 * away * (truth_N[inside] - b.share_pos)).sum() / n
        expected = [reliability, resolution, share * (1 - share), within]
        assert_allclose(list(value.values()), expected, rtol=1e-9, atol=1e-12)
        assert all(labels[label].ci95 is not None for labels in terms.values())
    if levels == 6 and kind == "width":  # one score a bin
        assert all(abs(label.value) < 1e-12 for label in terms["within_bins"].values())


def test_temperature_is_the_one_put_in() -> None:
    for slope in (0.4, 1.0, 2.5):
        fit = fit_temperature(drawn_from(slope, 0, n=20000))
        assert_allclose(fit.temperature["A"], 1 / slope, rtol=0.05)
        assert fit.bias["A"] == 0.0
        assert fit.nll_after["A"] <= fit.nll_before["A"]


def test_temperature_minimises_the_likelihood_loss() -> None:
    validation = make(n=300, k=2)
    fit = fit_temperature(validation, shared=False)
    for k, label in enumerate(validation.labels):
        truth_N, value_N = part(validation, k)
        at = {scale: log_loss(truth_N, expit(logit(value_N) * fit.slope[label] * scale)) for scale in (0.98, 1, 1.02)}
        assert_allclose(fit.nll_after[label], at[1], rtol=1e-9)
        assert at[1] < min(at[0.98], at[1.02])
        assert_allclose(fit.nll_before[label], log_loss(truth_N, value_N), rtol=1e-9)
    shared = fit_temperature(validation)
    assert len(set(shared.slope.values())) == 1
    pooled = np.concatenate([np.stack(part(validation, k)) for k in range(2)], axis=1)
    loss = [log_loss(pooled[0], expit(logit(pooled[1]) * shared.slope["A"] * scale)) for scale in (0.98, 1, 1.02)]
    assert loss[1] < min(loss[0], loss[2])


def test_platt_scaling_is_logistic_regression_on_smoothed_targets() -> None:
    validation = make(n=300, k=2)
    fit = fit_platt(validation)
    for k, label in enumerate(validation.labels):
        truth_N, value_N = part(validation, k)
        n_pos, n_neg = truth_N.sum(), (1 - truth_N).sum()
        target_N = np.where(truth_N == 1, (n_pos + 1) / (n_pos + 2), 1 / (n_neg + 2))
        # a soft target is a positive and a negative record with its weights
        twice = np.tile(logit(value_N), 2)[:, None]
        oracle = LogisticRegression(C=1e12, tol=1e-10, max_iter=1000).fit(
            twice, np.repeat([1, 0], len(truth_N)), sample_weight=np.concatenate([target_N, 1 - target_N])
        )
        assert_allclose([fit.slope[label], fit.bias[label]], [oracle.coef_[0, 0], oracle.intercept_[0]], rtol=1e-4)


def test_calibrating_mends_other_data_and_keeps_the_order() -> None:
    validation, test = drawn_from(0.4, 1.0, seed=1), drawn_from(0.4, 1.0, seed=2)
    for fit in (fit_platt(validation), fit_temperature(validation)):
        mended = fit.apply(test)
        assert_allclose(mended.value_NK, expit(fit.slope["A"] * logit(test.value_NK) + fit.bias["A"]))
        assert estimate(ece(), mended, n_boot=0).headline.value < estimate(ece(), test, n_boot=0).headline.value
        before, after = (estimate(AUROC, data, n_boot=0).headline.value for data in (test, mended))
        assert_allclose(before, after, atol=1e-12)
        with pytest.raises(EvlecgError, match="fitted on the very data"):
            fit.apply(validation)
        fit.apply_in_sample(validation)
        assert json.loads(json.dumps(fit.to_dict(), allow_nan=False))["temperature"]["A"] == 1 / fit.slope["A"]
    assert estimate(ece(), fit_platt(validation).apply(test), n_boot=0).headline.value < 0.03


def test_scores_of_0_and_1_are_read() -> None:
    value_N1 = np.array([[0.0], [1.0], [1.0], [0.0], [0.3], [0.6]])
    validation = Scored(value_N1, np.array([[0.0], [1], [0], [0], [1], [1]]), list("abcdef"), ("A",))
    for fit in (fit_temperature(validation), fit_platt(validation)):
        assert fit.slope["A"] is not None
        assert np.isfinite(fit.nll_before["A"])
        assert np.isfinite(fit.apply_in_sample(validation).value_NK).all()


def test_what_cannot_be_fitted_is_left_out_with_the_reason() -> None:
    validation = make(n=60, k=4)
    truth_NK = validation.truth_NK.copy()
    truth_NK[:, 0] = 1
    truth_NK[:, 1] = np.nan
    truth_NK[:, 2] = validation.value_NK[:, 2] > 0.5  # separated at a logit of 0
    fit = fit_temperature(validation.replaced(truth_NK=truth_NK), shared=False)
    assert fit.undefined_because == {
        "A": "validation has no negative record",
        "B": "validation has no record in which it was assessed",
        "C": "on validation the scores separate the classes: any temperature towards 0 is better still",
    }
    assert fit.slope["A"] is fit.temperature["A"] is None
    assert fit.slope["D"] is not None
    found = estimate(BRIER, fit.apply(make(n=60, k=4, seed=5)), n_boot=0)
    assert found.undefined["A"] == "no calibration: validation has no negative record"
    assert found.headline.n_labels == 1
    turned = validation.replaced(truth_NK=(validation.value_NK < 0.5).astype(float))
    assert "do not rise with the truth" in fit_temperature(turned).undefined_because["A"]
    assert fit_platt(validation.replaced(truth_NK=truth_NK)).slope["C"] is not None  # smoothed targets hold it back


def test_what_is_no_probability_is_bad_input() -> None:
    logits = make().replaced(value_NK=make().value_NK * 4 - 1)
    for read in (
        fit_temperature,
        fit_platt,
        lambda data: reliability_curve(data, "A"),
        lambda data: estimate(brier_term("resolution"), data),
        fit_platt(make(seed=3)).apply,
    ):
        with pytest.raises(EvlecgError, match="reads probabilities"):
            read(logits)
    with pytest.raises(EvlecgError, match="no calibration was fitted for C, D"):
        fit_platt(make(k=2)).apply(make())
    with pytest.raises(ValueError, match="0 bins"):
        ece(0)
