"""Paired comparisons against plain loops, scipy and tables."""

from __future__ import annotations

import dataclasses
import json
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy import stats

from evlecg.errors import EvlecgError
from evlecg.metrics import (
    ACCURACY,
    AUROC,
    BRIER,
    F1,
    Scored,
    compare,
    compare_runs,
    estimate,
    holm,
    mcnemar,
    over_seeds,
    seed_test,
)
from evlecg.metrics.resampling import resampled
from tests.metrics_cases import decisions, make

GROUPS = {"QRS": ("A", "B"), "rhythm": ("D",)}


def three() -> dict[str, Scored]:
    return {name: make(n=150, patients=60, noise_seed=seed, shift=shift)
            for name, seed, shift in (("student", 1, 1.5), ("SFT-only", 2, 1.0), ("teacher", 3, 2.0))}  # fmt: skip


def draws(scored: Scored) -> np.ndarray:
    return resampled({"": AUROC.bind(scored)}, scored.n_patients, 20, n_boot=120, seed=2)[""].label_RK


def test_every_pair_every_label_in_the_same_resamples() -> None:
    models = three()
    found = compare(AUROC, models, label_groups=GROUPS, n_boot=120, seed=2)
    assert [(pair.a, pair.b) for pair in found.pairs] == list(combinations(models, 2))
    for pair in found.pairs:
        difference_RK = draws(models[pair.a]) - draws(models[pair.b])
        left, right = (estimate(AUROC, models[name], label_groups=GROUPS, n_boot=0) for name in (pair.a, pair.b))
        expected = {
            ("overall", "macro"): np.nanmean(difference_RK, axis=1),
            ("label_groups", "QRS"): difference_RK[:, :2].mean(axis=1),
            ("label_groups", "rhythm"): difference_RK[:, 3],
            **{("labels", label): difference_RK[:, k] for k, label in enumerate("ABCD")},
        }
        for (part, name), difference_R in expected.items():
            difference = getattr(pair, part)[name]
            value = getattr(left, part)[name].value - getattr(right, part)[name].value
            assert_allclose(difference.value, value, atol=1e-12)
            assert_allclose(difference.ci95, np.percentile(difference_R, (2.5, 97.5)), atol=1e-12)
            below, above = (difference_R <= 0).sum(), (difference_R >= 0).sum()
            assert_allclose(difference.p, min(1, 2 * (1 + min(below, above)) / 121))
            assert difference.n_patients == getattr(left, part)[name].n_patients
    assert found.models["student"] == estimate(AUROC, models["student"], label_groups=GROUPS, n_boot=120, seed=2)
    assert found.pair("student", "teacher").headline.value < 0
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert written["pairs"][0]["overall"]["macro"]["p"] == found.pairs[0].headline.p
    assert "method" not in written["pairs"][0]["labels"]["A"]
    assert written["pairs"][0]["labels"]["A"]["p_holm"] == found.pairs[0].labels["A"].p_holm
    assert written["pairs"][0]["contrasts"][0]["a"] == "QRS"


def test_weighted_and_pooled_differences_are_those_of_their_resamples() -> None:
    models = {name: three()[name] for name in ("student", "teacher")}
    found = compare(AUROC, models, n_boot=120, seed=2).pairs[0].overall["weighted"]
    sides = []
    for scored in models.values():
        values = resampled({"": AUROC.bind(scored)}, scored.n_patients, 20, n_boot=120, seed=2)[""]
        sides.append((values.label_RK * values.positive_RK).sum(axis=1) / values.positive_RK.sum(axis=1))
    assert_allclose(found.ci95, np.percentile(sides[0] - sides[1], (2.5, 97.5)), rtol=1e-9)

    hard = {name: decisions(scored) for name, scored in models.items()}
    for metric, kind in ((F1, "micro"), (ACCURACY, "exact")):
        found = compare(metric, hard, n_boot=120, seed=2).pairs[0].overall[kind]
        sides = [resampled({"": metric.bind(scored)}, scored.n_patients, 20, n_boot=120, seed=2)[""].pooled[kind]
                 for scored in hard.values()]  # fmt: skip
        assert_allclose(found.ci95, np.percentile(sides[0] - sides[1], (2.5, 97.5)), rtol=1e-9)


def test_means_are_compared_over_labels_that_both_models_have() -> None:
    truth_NK = np.array([[1.0, 0], [0, 0], [1, 0], [0, 0], [1, 0]])
    patients = list("abcde")
    names = Scored(np.array([[1.0, 0], [0, 1], [0, 0], [0, 0], [1, 0]]), truth_NK, patients, ("X", "Y"))
    never = names.replaced(value_NK=np.array([[1.0, 0], [1, 0], [1, 0], [0, 0], [0, 0]]))
    found = compare(F1, {"names Y": names, "never": never}, label_groups={"Y alone": ("Y",)}, n_boot=200, seed=1)
    assert found.models["names Y"].headline.n_labels == 2  # a false alarm counts 0
    assert found.models["never"].headline.n_labels == 1
    pair = found.pairs[0]
    assert_allclose(pair.headline.value, 0.8 - 2 / 3)
    x_R = [resampled({"": F1.bind(data)}, 5, 1, n_boot=200, seed=1)[""].label_RK[:, 0] for data in (names, never)]
    difference_R = x_R[0] - x_R[1]
    assert pair.headline.n_labels == 1
    assert pair.headline.method.endswith("over X, which both have")
    assert_allclose(pair.headline.ci95, np.nanpercentile(difference_R, (2.5, 97.5)))
    assert pair.labels["Y"].undefined_because == "never: neither a truth nor an answer is positive"
    assert pair.label_groups["Y alone"].value is None


def test_contrasts_say_where_the_gain_is_larger() -> None:
    models = three()
    groups = {**GROUPS, "voltage": ("C",)}
    found = compare(AUROC, models, label_groups=groups, n_boot=120, seed=2)
    for pair in found.pairs:
        gain_RK = draws(models[pair.a]) - draws(models[pair.b])
        assert list(pair.contrasts) == [("QRS", "rhythm"), ("QRS", "voltage"), ("rhythm", "voltage")]
        contrast = pair.contrasts["QRS", "rhythm"]
        gains = pair.label_groups
        assert_allclose(contrast.value, gains["QRS"].value - gains["rhythm"].value)
        expected_R = gain_RK[:, :2].mean(axis=1) - gain_RK[:, 3]
        assert_allclose(contrast.ci95, np.percentile(expected_R, (2.5, 97.5)), atol=1e-12)
        assert (contrast.a, contrast.b, contrast.n_labels) == ("QRS", "rhythm", 3)
        assert contrast.n_pos == sum((models[pair.a].truth_NK[:, k] == 1).sum() for k in (0, 1, 3))
    cells = [cell for pair in found.pairs for cell in pair.contrasts.values()]
    assert [cell.p_holm for cell in cells] == holm([cell.p for cell in cells])
    empty = compare(AUROC, models, label_groups={"QRS": ("A",), "axis": ("Z",)}, n_boot=20).pairs[0].contrasts
    assert empty["QRS", "axis"].value is None
    assert empty["QRS", "axis"].undefined_because == "student: the data have no label of the group"


def test_baseline_takes_every_other_model_minus_it() -> None:
    found = compare(AUROC, three(), baseline="SFT-only", n_boot=50)
    assert [(pair.a, pair.b) for pair in found.pairs] == [("student", "SFT-only"), ("teacher", "SFT-only")]
    with pytest.raises(EvlecgError, match="no model 'CE'"):
        compare(AUROC, three(), baseline="CE")


def test_holm_is_over_pairs_for_the_headline_and_over_all_cells_for_labels() -> None:
    found = compare(AUROC, three(), label_groups=GROUPS, n_boot=100)
    macros = [pair.headline for pair in found.pairs]
    assert [each.p_holm for each in macros] == holm([each.p for each in macros])
    for part in ("labels", "label_groups"):
        cells = [cell for pair in found.pairs for cell in getattr(pair, part).values()]
        assert [cell.p_holm for cell in cells] == holm([cell.p for cell in cells])


def test_pairing_narrows_the_interval() -> None:
    good = make(n=300, patients=150)
    noise_NK = np.random.default_rng(1).normal(size=good.value_NK.shape) * 0.03
    found = compare(AUROC, {"a": good, "b": good.replaced(value_NK=good.value_NK + noise_NK)}, n_boot=200)
    own = found.models["a"].headline.ci95
    paired = found.pairs[0].headline.ci95
    assert paired[1] - paired[0] < 0.5 * (own[1] - own[0])


def test_a_model_with_itself_is_nothing() -> None:
    scored = make()
    headline = compare(AUROC, {"a": scored, "b": scored}, n_boot=50).pairs[0].headline
    assert (headline.value, headline.ci95, headline.p) == (0.0, (0.0, 0.0), 1.0)


def test_undefined_differences_say_why() -> None:
    scored = make(k=2)
    truth_NK = scored.truth_NK.copy()
    truth_NK[:, 0] = 1
    lone = int(np.flatnonzero(scored.truth_NK[:, 1] == 1)[0])
    truth_NK[:, 1] = np.where(np.isnan(truth_NK[:, 1]), np.nan, 0)
    truth_NK[lone, 1] = 1
    models = {name: make(k=2, noise_seed=seed).replaced(truth_NK=truth_NK) for name, seed in (("a", 1), ("b", 2))}
    pair = compare(AUROC, models, n_boot=50).pairs[0]
    assert (pair.labels["A"].value, pair.labels["A"].p) == (None, None)
    assert pair.labels["A"].undefined_because == "a: all 120 records are positive"
    assert pair.labels["B"].value is not None
    assert (pair.labels["B"].ci95, pair.labels["B"].p, pair.labels["B"].p_holm) == (None, None, None)
    assert pair.labels["B"].undefined_because == "no interval: fewer than 2 patients on one side"
    without = compare(AUROC, models, n_boot=0).pairs[0]
    assert (without.labels["B"].ci95, without.labels["B"].undefined_because) == (None, "no interval was asked for")


def test_a_clear_winner_has_a_small_p_and_the_null_a_fair_one() -> None:
    models = {"good": make(n=300, patients=200, shift=3), "noise": make(n=300, patients=200, shift=0, noise_seed=1)}
    assert_allclose(compare(AUROC, models, n_boot=200).pairs[0].headline.p, 2 / 201)
    rejected = 0
    for seed in range(120):
        pair = {name: make(n=60, k=1, patients=50, seed=seed, noise_seed=noise)
                for name, noise in (("a", seed), ("b", seed + 10**6))}  # fmt: skip
        rejected += compare(AUROC, pair, n_boot=99).pairs[0].headline.p < 0.05
    assert rejected <= 14


def test_lower_is_better_is_not_turned_around() -> None:
    models = three()
    headline = compare(BRIER, {name: models[name] for name in ("teacher", "SFT-only")}, n_boot=50).pairs[0].headline
    assert headline.value < 0  # a lower Brier score; who reads it asks `higher_is_better`
    assert not BRIER.higher_is_better


def test_models_on_different_records_are_not_compared() -> None:
    a = make()
    for b, message in (
        (make(n=119), "b were scored on different records"),
        (make(k=3), "different labels"),
        (a.replaced(truth_NK=np.where(np.arange(120)[:, None] == 5, np.nan, a.truth_NK)), "truths .label A, record r5"),
        (Scored(a.value_NK, a.truth_NK, a.patient_ids[::-1], a.labels), "different records"),
    ):
        with pytest.raises(EvlecgError, match=message):
            compare(AUROC, {"a": a, "b": b})


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=12))
def test_holm_is_the_step_down_rule(p_values: list[float | None]) -> None:
    adjusted = holm(p_values)
    known = [p for p in p_values if p is not None]
    for p, mine in zip(p_values, adjusted, strict=True):
        if p is None:
            assert mine is None
        else:  # the largest (m - rank) p over all hypotheses that are rejected before it
            before = [min(1.0, sum(r >= q for r in known) * q) for q in known if q <= p]
            assert_allclose(mine, max(before))


def test_holm_by_hand() -> None:
    assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize(("only_a", "only_b"), [(12, 3), (3, 12), (5, 5), (0, 0), (1, 0), (40, 61)])
def test_mcnemar_is_a_binomial_test(only_a: int, only_b: int) -> None:
    table = [(1, 1)] * 30 + [(1, 0)] * only_a + [(0, 1)] * only_b + [(0, 0)] * 7
    patients = [str(i) for i in range(len(table))]
    models = {name: Scored.answers([row[side] for row in table], patients) for side, name in enumerate("ab")}
    found = mcnemar(models)
    assert (found.n_both, found.n_only_a, found.n_only_b, found.n_neither) == (30, only_a, only_b, 7)
    n = only_a + only_b
    exact = stats.binomtest(only_a, n, 0.5).pvalue if n else 1.0
    assert_allclose(found.p_exact, exact, rtol=1e-12)
    assert_allclose(found.p_mid, 1.0 if only_a == only_b else exact - stats.binom.pmf(only_a, n, 0.5), rtol=1e-12)
    accuracies = [estimate(ACCURACY, scored, n_boot=0).headline.value for scored in models.values()]
    assert_allclose(found.value, accuracies[0] - accuracies[1], atol=1e-12)
    assert found.caveat is None
    assert json.loads(json.dumps(found.to_dict()))["n"] == len(table)


def test_mcnemar_of_decisions_asks_for_exact_answers_and_minds_patients() -> None:
    models = {name: decisions(make(k=2, noise_seed=seed)) for name, seed in (("a", 1), ("b", 2))}
    found = mcnemar(models)
    right = {name: ((scored.value_NK == scored.truth_NK) | np.isnan(scored.truth_NK)).all(axis=1)
             & ~np.isnan(scored.truth_NK).all(axis=1) for name, scored in models.items()}  # fmt: skip
    assert found.n_only_a == (right["a"] & ~right["b"]).sum()
    assert "are taken for independent" in found.caveat
    nothing = {name: Scored(np.zeros((0, 1)), np.zeros((0, 1)), [], ("A",)) for name in "ab"}
    assert (mcnemar(nothing).p_exact, mcnemar(nothing).undefined_because) == (None, "no record was assessed")


def test_over_seeds_equals_scipy() -> None:
    values = [0.81, 0.79, 0.84, 0.80, 0.82]
    found = over_seeds(values)
    assert_allclose((found.mean, found.sd), (np.mean(values), np.std(values, ddof=1)))
    assert_allclose(found.ci95, stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values)))
    one = over_seeds([0.8])
    assert (one.mean, one.sd, one.ci95, one.n) == (0.8, None, None, 1)
    with pytest.raises(EvlecgError, match=r"nan is not a number .seed 2 of 3"):
        over_seeds([0.8, float("nan"), 0.7])
    with pytest.raises(EvlecgError, match="no seed"):
        over_seeds([])


def test_seed_test_pairs_by_seed_whatever_the_order() -> None:
    a, b = {0: 0.81, 1: 0.79, 2: 0.84, 3: 0.80}, {3: 0.78, 2: 0.80, 1: 0.80, 0: 0.79}
    found = seed_test({"evl": a, "ce": b})
    expected = stats.ttest_rel([a[s] for s in range(4)], [b[s] for s in range(4)])
    assert_allclose((found.t, found.p), (expected.statistic, expected.pvalue))
    assert_allclose(found.difference.mean, 0.0175)
    assert json.loads(json.dumps(found.to_dict()))["difference"]["n"] == 4
    assert seed_test({"a": {0: 0.8}, "b": {0: 0.7}}).undefined_because == "one seed has no variance"
    same = seed_test({"a": {0: 0.5, 1: 0.75}, "b": {0: 0.25, 1: 0.5}})
    assert (same.p, same.undefined_because) == (None, "all differences are the same")
    with pytest.raises(EvlecgError, match=r"same seeds .seeds 2"):
        seed_test({"a": {0: 0.8, 1: 0.7}, "b": {0: 0.8, 1: 0.7, 2: 0.1}})


def test_runs_over_seeds_in_the_same_resamples() -> None:
    left = [make(n=150, patients=60, noise_seed=seed, shift=1.5) for seed in (1, 2)]
    right = [make(n=150, patients=60, noise_seed=seed, shift=1.0) for seed in (3, 4)]
    found = compare_runs(AUROC, left, right, label_groups=GROUPS, n_boot=120, seed=2)
    apart_RK = np.mean([draws(a) - draws(b) for a, b in zip(left, right, strict=True)], axis=0)
    values = [[estimate(AUROC, scored, label_groups=GROUPS, n_boot=0) for scored in side] for side in (left, right)]

    def value(read) -> float:
        return float(np.mean([read(a) - read(b) for a, b in zip(*values, strict=True)]))

    assert (found.n_runs, found.macro.n, found.macro.n_patients) == (2, 150, left[0].n_patients)
    wanted = estimate(AUROC, left[0], label_groups=GROUPS, n_boot=0).label_groups["rhythm"]
    assert (found.groups["rhythm"].n, found.groups["rhythm"].n_patients) == (wanted.n, wanted.n_patients)
    assert_allclose(found.macro.value, value(lambda one: one.overall["macro"].value), atol=1e-12)
    assert_allclose(found.macro.ci95, np.percentile(apart_RK.mean(axis=1), (2.5, 97.5)), atol=1e-12)
    assert_allclose(found.groups["QRS"].value, value(lambda one: one.label_groups["QRS"].value), atol=1e-12)
    contrast_R = apart_RK[:, :2].mean(axis=1) - apart_RK[:, 3]
    assert_allclose(found.contrasts["QRS", "rhythm"].ci95, np.percentile(contrast_R, (2.5, 97.5)), atol=1e-12)
    one = compare(AUROC, {"a": left[0], "b": right[0]}, n_boot=120, seed=2).pair("a", "b").headline
    alone = compare_runs(AUROC, left[:1], right[:1], n_boot=120, seed=2).macro
    assert (alone.value, alone.ci95) == (one.value, one.ci95), "one run is an ordinary comparison"
    taught = compare_runs(AUROC, [left[0]] * 2, right, n_boot=120, seed=2)  # a teacher has no seeds
    assert_allclose(taught.macro.value, np.mean([compare_runs(AUROC, left[:1], [b], n_boot=0).macro.value
                                                 for b in right]))  # fmt: skip
    assert json.loads(json.dumps(found.to_dict()))["contrasts"][0]["a"] == "QRS"
    rare = [dataclasses.replace(one, truth_NK=np.where(np.arange(150)[:, None] == 3, 1.0, 0.0) * np.ones(4))
            for one in (left[0], right[0])]  # fmt: skip
    few = compare_runs(AUROC, rare[:1], rare[1:], n_boot=120)
    assert few.macro.value is not None and few.macro.ci95 is None, "one positive patient says nothing about others"
    with pytest.raises(EvlecgError, match="2 and 1 runs cannot be paired"):
        compare_runs(AUROC, left, right[:1])
