"""DeLong against a naive twin, curves against scikit-learn."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.stats import norm
from sklearn import metrics as sk

from evlecg.errors import EvlecgError
from evlecg.metrics import (
    AUROC,
    Scored,
    delong,
    delong_auroc,
    delong_test,
    estimate,
    precision_recall_curve,
    roc_curve,
)
from tests.metrics_cases import make


def single(n: int = 80, *, levels: int | None = None, seed: int = 0, noise_seed: int | None = None) -> Scored:
    """One record a patient, one label."""
    scored = make(n=n, k=1, levels=levels, seed=seed, noise_seed=noise_seed)
    return Scored(scored.value_NK, scored.truth_NK, [f"q{i}" for i in range(n)], scored.labels)


def kernel(positive: float, negative: float) -> float:
    return 1.0 if positive > negative else 0.5 if positive == negative else 0.0


def naive_covariance(models: list[Scored]) -> np.ndarray:
    """DeLong 1988 by double loops over pairs, the equations as printed, one record a patient."""
    truth_N = models[0].truth_NK[:, 0]
    components = []
    for scored in models:
        x = scored.value_NK[truth_N == 1, 0]
        y = scored.value_NK[truth_N == 0, 0]
        v10 = [sum(kernel(a, b) for b in y) / len(y) for a in x]
        v01 = [sum(kernel(a, b) for a in x) / len(x) for b in y]
        components.append((v10, v01, sum(v10) / len(x)))
    out = np.zeros((len(models), len(models)))
    for (r, (v10_r, v01_r, auc_r)), (s, (v10_s, v01_s, auc_s)) in product(enumerate(components), repeat=2):
        s10 = sum((a - auc_r) * (b - auc_s) for a, b in zip(v10_r, v10_s, strict=True)) / (len(v10_r) - 1)
        s01 = sum((a - auc_r) * (b - auc_s) for a, b in zip(v01_r, v01_s, strict=True)) / (len(v01_r) - 1)
        out[r, s] = s10 / len(v10_r) + s01 / len(v01_r)
    return out


def naive_clustered_variance(scored: Scored) -> float:
    """Obuchowski 1997, equation by equation, over patients."""
    seen = ~np.isnan(scored.truth_NK[:, 0])
    rows = [(p, t, v) for p, t, v, s in zip(scored.patient_ids, scored.truth_NK[:, 0], scored.value_NK[:, 0], seen,
                                            strict=True) if s]  # fmt: skip
    x = [(p, v) for p, t, v in rows if t == 1]
    y = [(p, v) for p, t, v in rows if t == 0]
    m, n = len(x), len(y)
    auc = sum(kernel(a, b) for _, a in x for _, b in y) / (m * n)
    patients = sorted({p for p, _, _ in rows})
    ten = {p: sum(sum(kernel(a, b) for _, b in y) / n - auc for q, a in x if q == p) for p in patients}
    one = {p: sum(sum(kernel(a, b) for _, a in x) / m - auc for q, b in y if q == p) for p in patients}
    i, i10, i01 = len(patients), len({p for p, _ in x}), len({p for p, _ in y})
    s10 = i10 / ((i10 - 1) * m) * sum(ten[p] ** 2 for p in patients)
    s01 = i01 / ((i01 - 1) * n) * sum(one[p] ** 2 for p in patients)
    s11 = i / (i - 1) * sum(ten[p] * one[p] for p in patients)
    return s10 / m + s01 / n + 2 * s11 / (m * n)


@pytest.mark.parametrize("levels", [None, 6])
def test_delongs_covariance_equals_double_loops(levels: int | None) -> None:
    models = {name: single(levels=levels, noise_seed=seed) for name, seed in (("a", 1), ("b", 2), ("c", 3))}
    found = delong(models, "A")
    assert_allclose(found.covariance_MM, naive_covariance(list(models.values())), rtol=1e-10)
    assert_allclose(found.auc_M, [estimate(AUROC, scored, n_boot=0).headline.value for scored in models.values()])
    assert found.name == "DeLong 1988"


@pytest.mark.parametrize("levels", [None, 6])
def test_delong_over_patients_equals_obuchowskis_equations(levels: int | None) -> None:
    scored = make(n=60, k=1, patients=20, levels=levels)
    found = delong({"": scored}, "A")
    assert_allclose(found.covariance_MM[0, 0], naive_clustered_variance(scored), rtol=1e-10)
    assert "Obuchowski" in found.name
    assert "Obuchowski" in delong_auroc(scored, "A").interval_method


def test_five_copies_of_a_record_are_no_new_evidence() -> None:
    scored = single()
    copied = Scored(*(np.repeat(array, 5, axis=0) for array in (scored.value_NK, scored.truth_NK, scored.patient_ids)),
                    scored.labels)  # fmt: skip
    assert_allclose(delong({"": copied}, "A").covariance_MM, delong({"": scored}, "A").covariance_MM, rtol=1e-10)


def test_delongs_interval_is_on_the_logit_scale() -> None:
    scored = single()
    found = delong_auroc(scored, "A")
    auc = sk.roc_auc_score(*(array[~np.isnan(scored.truth_NK)] for array in (scored.truth_NK, scored.value_NK)))
    error = np.sqrt(naive_covariance([scored])[0, 0])
    ends = np.log(auc / (1 - auc)) + np.array([-1, 1]) * norm.ppf(0.975) * error / (auc * (1 - auc))
    assert_allclose(found.value, auc)
    assert_allclose(found.ci95, 1 / (1 + np.exp(-ends)), rtol=1e-9)
    assert (found.n, found.n_pos) == (int((~np.isnan(scored.truth_NK)).sum()), int((scored.truth_NK == 1).sum()))
    assert json.loads(json.dumps(found.to_dict()))["ci95"] == list(found.ci95)


def test_delongs_interval_is_near_the_bootstraps() -> None:
    scored = make(n=400, k=2, patients=250)
    for label, mine in estimate(AUROC, scored, n_boot=1000).labels.items():
        assert_allclose(delong_auroc(scored, label).ci95, mine.ci95, atol=0.012)


def test_delongs_test_equals_its_formula() -> None:
    models = {"a": single(noise_seed=1), "b": single(noise_seed=5)}
    found = delong_test(models, "A")
    covariance = naive_covariance(list(models.values()))
    error = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    aucs = [estimate(AUROC, scored, n_boot=0).headline.value for scored in models.values()]
    assert_allclose(found.value, aucs[0] - aucs[1])
    assert_allclose(found.p, 2 * (1 - norm.cdf(abs(found.value) / error)), rtol=1e-9)
    assert_allclose(found.ci95, [found.value - 1.959964 * error, found.value + 1.959964 * error], rtol=1e-6)
    swapped = delong_test({"b": models["b"], "a": models["a"]}, "A")
    assert_allclose((swapped.value, swapped.p), (-found.value, found.p))
    assert json.loads(json.dumps(found.to_dict()))["p"] == found.p


def test_delongs_test_errs_in_about_5_of_100_under_the_null() -> None:
    rejected = 0
    for seed in range(300):
        models = {"a": single(seed=seed, noise_seed=seed), "b": single(seed=seed, noise_seed=seed + 5000)}
        rejected += delong_test(models, "A").p < 0.05
    assert 5 <= rejected <= 28


def test_where_delong_says_nothing_it_says_why() -> None:
    value_N1 = np.array([[0.9], [0.8], [0.2], [0.1]])
    perfect = Scored(value_N1, np.array([[1.0], [1], [0], [0]]), list("abcd"), ("A",))
    assert (delong_auroc(perfect, "A").value, delong_auroc(perfect, "A").ci95) == (1.0, None)
    assert delong_auroc(perfect, "A").caveat == "no interval: the variance is 0 at an AUROC of 1"
    lone = Scored(value_N1, np.array([[1.0], [0], [0], [0]]), list("abcd"), ("A",))
    assert delong_auroc(lone, "A").caveat == "no interval: fewer than 2 patients on one side"
    assert delong_auroc(lone, "A").value == 1.0
    none = Scored(value_N1, np.zeros((4, 1)), list("abcd"), ("A",))
    assert delong_auroc(none, "A").value is None
    assert delong_auroc(none, "A").undefined_because == "all 4 records are negative"
    itself = delong_test({"a": single(), "b": single()}, "A")
    assert (itself.value, itself.ci95, itself.p) == (0.0, (0.0, 0.0), 1.0)
    alone = delong_test({"a": lone, "b": lone}, "A")
    assert (alone.p, alone.undefined_because) == (None, "no test: fewer than 2 patients on one side")
    nothing = delong_test({"a": none, "b": none}, "A")
    assert (nothing.value, nothing.undefined_because) == (None, "all 4 records are negative")
    turned = delong_test({"a": perfect, "b": perfect.replaced(value_NK=1 - value_N1)}, "A")
    assert (turned.value, turned.p, turned.undefined_because) == (1.0, None, "no test: the variance is 0")
    with pytest.raises(EvlecgError, match="no label 'Z'"):
        delong_auroc(perfect, "Z")
    with pytest.raises(EvlecgError, match="different records"):
        delong_test({"a": single(80), "b": single(70)}, "A")


@pytest.mark.parametrize("levels", [None, 8])
def test_curves_equal_scikit_learns(levels: int | None) -> None:
    scored = make(n=200, k=2, levels=levels)
    for k, label in enumerate(scored.labels):
        seen = ~np.isnan(scored.truth_NK[:, k])
        truth_N, value_N = scored.truth_NK[seen, k], scored.value_NK[seen, k]
        roc = roc_curve(scored, label)
        x, y, threshold = sk.roc_curve(truth_N, value_N, drop_intermediate=False)
        assert_allclose(sk.auc(roc.x, roc.y), sk.roc_auc_score(truth_N, value_N), rtol=1e-12)
        assert len(roc.x) < len(x) or levels
        assert (roc.x[0], roc.y[0], roc.threshold[0], roc.x[-1], roc.y[-1]) == (0, 0, np.inf, 1, 1)
        for x_point, y_point, cut in zip(roc.x, roc.y, roc.threshold, strict=True):
            place = np.flatnonzero(threshold == cut)[0]
            assert_allclose((x_point, y_point), (x[place], y[place]))

        pr = precision_recall_curve(scored, label)
        precision, recall, threshold = sk.precision_recall_curve(truth_N, value_N)
        for recalled, precise, cut in zip(pr.x, pr.y, pr.threshold, strict=True):
            place = np.flatnonzero(threshold == cut)[0]
            assert_allclose((recalled, precise), (recall[place], precision[place]))
        assert (np.diff([0, *pr.x]) > 0).all()
        area = np.sum(np.diff([0, *pr.x]) * pr.y)
        assert_allclose(area, sk.average_precision_score(truth_N, value_N), rtol=1e-12)
        assert (pr.n_pos, pr.n_neg) == ((truth_N == 1).sum(), (truth_N == 0).sum())


def test_one_class_has_no_curve() -> None:
    scored = Scored(np.ones((3, 1)), np.ones((3, 1)), list("abc"), ("A",))
    for curve in (roc_curve(scored, "A"), precision_recall_curve(scored, "A")):
        assert (curve.x, curve.n_pos, curve.n_neg) == ((), 3, 0)
