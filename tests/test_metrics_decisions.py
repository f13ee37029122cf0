"""Thresholds are chosen on validation, as a search over every score would, and nowhere else."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from evlecg.errors import EvlecgError
from evlecg.metrics import (
    F1,
    SENSITIVITY,
    SPECIFICITY,
    Scored,
    Thresholds,
    estimate,
    exact_answers,
    fixed_thresholds,
    in_sample_sensitivity_at,
    in_sample_specificity_at,
    thresholds_at_sensitivity,
    thresholds_at_specificity,
    thresholds_for_f1,
    thresholds_for_youden,
)
from tests.metrics_cases import make

RULES = {
    "specificity": lambda data: thresholds_at_specificity(data, 0.8),
    "sensitivity": lambda data: thresholds_at_sensitivity(data, 0.7),
    "f1": thresholds_for_f1,
    "youden": thresholds_for_youden,
}


def best_by_loop(rule: str, truth_N: np.ndarray, value_N: np.ndarray) -> float:
    """Tries every score as a threshold, from infinity down, and keeps the best."""
    best, best_worth = np.inf, -np.inf
    for threshold in [np.inf, *sorted(set(value_N), reverse=True)]:
        flagged = value_N >= threshold
        sensitivity = flagged[truth_N == 1].mean()
        specificity = (~flagged)[truth_N == 0].mean()
        worth = {
            "specificity": sensitivity if specificity >= 0.8 - 1e-9 else -np.inf,
            "sensitivity": specificity if sensitivity >= 0.7 - 1e-9 else -np.inf,
            "f1": 2 * (flagged & (truth_N == 1)).sum() / (flagged.sum() + truth_N.sum()),
            "youden": sensitivity + specificity - 1,
        }[rule]
        # at a given specificity the lowest threshold is as sensitive as any; elsewhere the highest of several stands
        if worth > best_worth + 1e-12 or (rule == "specificity" and worth > -np.inf and worth >= best_worth - 1e-12):
            best, best_worth = threshold, worth
    return best


@pytest.mark.parametrize("levels", [None, 7])
@pytest.mark.parametrize("rule", RULES)
def test_thresholds_equal_a_search_over_every_score(rule: str, levels: int | None) -> None:
    validation = make(n=90, k=3, levels=levels)
    chosen = RULES[rule](validation)
    for k, label in enumerate(validation.labels):
        seen = ~np.isnan(validation.truth_NK[:, k])
        truth_N, value_N = validation.truth_NK[seen, k], validation.value_NK[seen, k]
        assert chosen.values[label] == best_by_loop(rule, truth_N, value_N)
        assert (chosen.n[label], chosen.n_pos[label]) == (seen.sum(), truth_N.sum())
    assert "validation" in chosen.rule
    assert json.loads(json.dumps(chosen.to_dict(), allow_nan=False))["values"] == dict(chosen.values)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([0.05, 0.1, 0.3, 0.55, 0.7, 0.9, 0.95, 1.0]), st.sampled_from([None, 3, 9])
)
def test_on_validation_the_promise_is_kept(seed: int, share: float, levels: int | None) -> None:
    validation = make(n=60, k=2, levels=levels, seed=seed)
    decided = thresholds_at_specificity(validation, share).decide_in_sample(validation)
    found = estimate(SPECIFICITY, decided, n_boot=0)
    assert all(label.value >= share - 1e-12 for label in found.labels.values())
    at_roc = estimate(in_sample_sensitivity_at(share), validation, n_boot=0)
    for name, label in estimate(SENSITIVITY, decided, n_boot=0).labels.items():
        assert label.value == at_roc.labels[name].value
    decided = thresholds_at_sensitivity(validation, share).decide_in_sample(validation)
    assert all(label.value >= share - 1e-12 for label in estimate(SENSITIVITY, decided, n_boot=0).labels.values())
    at_roc = estimate(in_sample_specificity_at(share), validation, n_boot=0)
    for name, label in estimate(SPECIFICITY, decided, n_boot=0).labels.items():
        assert label.value == at_roc.labels[name].value


def test_shares_that_floats_miss_are_met() -> None:
    """0.55 x 100 is 55.000000000000007: a specificity of exactly 0.55 must do."""
    value_N1 = np.arange(101.0)[:, None]
    truth_N1 = np.zeros((101, 1))
    truth_N1[55] = 1  # above it lie 45 of 100 negatives, below it 55
    scored = Scored(value_N1, truth_N1, [str(i) for i in range(101)], ("A",))
    assert estimate(in_sample_sensitivity_at(0.55), scored, n_boot=0).headline.value == 1.0
    assert thresholds_at_specificity(scored, 0.55).values == {"A": 55.0}
    assert estimate(in_sample_sensitivity_at(0.56), scored, n_boot=0).headline.value == 0.0


def test_thresholds_are_applied_to_other_data_only() -> None:
    validation, test = make(seed=1), make(seed=2)
    chosen = thresholds_for_f1(validation)
    decided = chosen.decide(test)
    threshold_K = np.array([chosen.values[label] for label in test.labels])
    assert_array_equal(decided.value_NK, test.value_NK >= threshold_K)
    assert_array_equal(decided.truth_NK, test.truth_NK)
    with pytest.raises(EvlecgError, match="chosen on the very data"):
        chosen.decide(validation)
    with pytest.raises(EvlecgError, match="chosen on the very data"):
        chosen.decide(Scored(validation.value_NK.copy(), validation.truth_NK.copy(), validation.patient_ids,
                             validation.labels))  # fmt: skip
    flattering = estimate(F1, chosen.decide_in_sample(validation), n_boot=0).headline.value
    assert flattering >= estimate(F1, fixed_thresholds(validation.labels).decide(validation), n_boot=0).headline.value


def test_a_label_without_a_threshold_is_left_out_with_the_reason() -> None:
    validation, test = make(seed=1), make(seed=2)
    truth_NK = validation.truth_NK.copy()
    truth_NK[:, 1] = np.where(np.isnan(truth_NK[:, 1]), np.nan, 0)
    truth_NK[:, 2] = np.nan
    chosen = thresholds_for_youden(validation.replaced(truth_NK=truth_NK))
    assert (chosen.values["B"], chosen.values["C"]) == (None, None)
    assert chosen.undefined_because == {
        "B": "validation has no positive record",
        "C": "validation has no negative and no positive record",
    }
    found = estimate(SENSITIVITY, chosen.decide(test), n_boot=20)
    assert found.undefined == {
        "B": "no threshold: validation has no positive record",
        "C": "no threshold: validation has no negative and no positive record",
    }
    assert found.headline.n_labels == 2
    assert_allclose(found.headline.value, np.mean([found.labels["A"].value, found.labels["D"].value]))
    with pytest.raises(EvlecgError, match="no threshold was chosen for D"):
        Thresholds("given", {"A": 0.5, "B": 0.5, "C": 0.5}, {}, {}, {}).decide(test)


def test_a_threshold_at_infinity_flags_nothing() -> None:
    scored = Scored(np.array([[np.inf], [1.0], [np.inf]]), np.array([[0.0], [1], [1]]), list("abc"), ("A",))
    chosen = thresholds_at_specificity(scored, 1.0)
    assert chosen.values == {"A": np.inf}
    assert_array_equal(chosen.decide_in_sample(scored).value_NK[:, 0], [0, 0, 0])
    assert chosen.to_dict()["values"] == {"A": "none flagged"}


def test_fixed_thresholds_are_at_or_above() -> None:
    scored = Scored(np.array([[0.49], [0.5], [0.51]]), np.ones((3, 1)), list("abc"), ("A",))
    chosen = fixed_thresholds(("A",), 0.5)
    assert_array_equal(chosen.decide(scored).value_NK[:, 0], [0, 1, 1])
    assert chosen.rule == "fixed at 0.5"


def test_exact_answers_by_hand() -> None:
    truth_NK = np.array([[1, 0], [1, np.nan], [0, 1], [np.nan, np.nan]])
    answer_NK = np.array([[1.0, 0], [1, 1], [0, 0], [1, 1]])
    assert_array_equal(exact_answers(Scored(answer_NK, truth_NK, list("abcd"), ("X", "Y"))), [1, 1, 0, np.nan])


def test_a_share_is_not_a_percentage() -> None:
    for choose in (thresholds_at_sensitivity, thresholds_at_specificity):
        with pytest.raises(ValueError, match="90 is not in"):
            choose(make(), 90)
