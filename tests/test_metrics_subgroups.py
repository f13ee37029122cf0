"""Groups of records: the same numbers as on the group alone, compared in shared resamples."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.testing import assert_allclose

from evlecg.errors import EvlecgError
from evlecg.metrics import ACCURACY, AUROC, HAMMING_LOSS, SENSITIVITY, Metric, Scored, by_group, estimate, holm
from evlecg.metrics.resampling import resample_patients, resampled
from tests.metrics_cases import decisions, make, rows_of_resample


def grouped(n: int = 200) -> tuple[Scored, np.ndarray]:
    scored = make(n=n, k=3, patients=90)
    names_N = np.array(["F", "M", "F", "M", "F", ""], dtype=object)[np.random.default_rng(8).integers(0, 6, n)]
    return scored, names_N


def alone(scored: Scored, rows_N: np.ndarray) -> Scored:
    patients = [patient for patient, here in zip(scored.patient_ids, rows_N, strict=True) if here]
    return Scored(scored.value_NK[rows_N], scored.truth_NK[rows_N], patients, scored.labels)


def test_a_group_has_the_numbers_of_its_records_alone() -> None:
    scored, names_N = grouped()
    table = by_group(AUROC, scored, names_N, n_boot=50)
    assert list(table.groups) == ["F", "M"]
    for name, found in table.groups.items():
        expected = estimate(AUROC, alone(scored, names_N == name), n_boot=0)
        for label in scored.labels:
            mine, theirs = found.labels[label], expected.labels[label]
            assert_allclose(mine.value, theirs.value, rtol=1e-12)
            assert (mine.n, mine.n_pos, mine.n_patients) == (theirs.n, theirs.n_pos, theirs.n_patients)
        assert_allclose(found.headline.value, expected.headline.value, rtol=1e-12)
        assert found.headline.n_patients == expected.headline.n_patients
    assert table.n_ungrouped == (names_N == "").sum()
    written = json.loads(json.dumps(table.to_dict(), allow_nan=False))
    assert written["groups"]["F"]["overall"]["macro"]["n"] == table.groups["F"].headline.n


def test_differences_are_drawn_together_by_a_plain_loop() -> None:
    scored, names_N = grouped(n=80)
    truth_NK = scored.truth_NK.copy()
    rare = np.flatnonzero((names_N == "M") & (truth_NK[:, 0] == 1))
    kept = [i for i in rare if scored.patient_N[i] in list(dict.fromkeys(scored.patient_N[rare]))[:2]]
    truth_NK[np.setdiff1d(rare, kept), 0] = 0  # so that every seventh resample lacks it
    scored = scored.replaced(truth_NK=truth_NK)
    table = by_group(AUROC, scored, names_N, reference="M", n_boot=40, seed=7)
    count_PR = next(resample_patients(scored.n_patients, 40, 7, chunk=40))
    difference_RK = []
    for count_P in count_PR.T:
        rows = np.array(rows_of_resample(scored, count_P))
        sides = []
        for name in ("F", "M"):
            inside = rows[names_N[rows] == name]
            part = Scored(scored.value_NK[inside], scored.truth_NK[inside], ["p"] * len(inside), scored.labels)
            sides.append([label.value for label in estimate(AUROC, part, n_boot=0).labels.values()])
        difference_RK.append(np.array(sides[0], dtype=float) - np.array(sides[1], dtype=float))
    for k, label in enumerate(scored.labels):
        found = table.label_differences["F"][label]
        assert_allclose(found.ci95, np.nanpercentile(np.array(difference_RK)[:, k], (2.5, 97.5)), rtol=1e-9)
        assert (found.a, found.b) == ("F", "M")
        values = [table.groups[name].labels[label].value for name in ("F", "M")]
        assert_allclose(found.value, values[0] - values[1])
    found = table.differences["F"]
    assert_allclose(found.ci95, np.percentile(np.nanmean(difference_RK, axis=1), (2.5, 97.5)), rtol=1e-9)
    both = names_N != ""
    assert found.n == (~np.isnan(scored.truth_NK[both])).any(axis=1).sum()
    assert found.n_pos == (scored.truth_NK[both] == 1).sum()


def test_the_difference_of_macros_is_over_labels_that_both_groups_have() -> None:
    scored, names_N = grouped()
    truth_NK = scored.truth_NK.copy()
    truth_NK[names_N == "M", 0] = 0  # no positive of A among them
    scored = scored.replaced(truth_NK=truth_NK)
    table = by_group(AUROC, scored, names_N, reference="F", n_boot=60)
    assert table.groups["M"].labels["A"].undefined_because.endswith("records are negative")
    assert table.groups["F"].headline.n_labels == 3
    found = table.differences["M"]
    value = {name: np.mean([table.groups[name].labels[label].value for label in "BC"]) for name in "FM"}
    assert_allclose(found.value, value["M"] - value["F"])
    assert found.n_labels == 2
    assert "mean over B, C;" in found.method
    assert table.label_differences["M"]["A"].value is None
    assert table.label_differences["M"]["A"].undefined_because.startswith("M: all ")


def test_a_small_group_is_undefined_with_its_counts() -> None:
    scored, names_N = grouped()
    few = sorted(set(scored.patient_ids))[:4]
    names_N = np.where(np.isin(scored.patient_ids, few), "device X", names_N)
    n = int((names_N == "device X").sum())
    for metric, data in ((AUROC, scored), (ACCURACY, decisions(scored)), (SENSITIVITY, decisions(scored))):
        table = by_group(metric, data, names_N, min_patients=5, label_groups={"g": ("A", "B")}, n_boot=30)
        found = table.groups["device X"]
        assert {estimate.value for estimate in [*found.overall.values(), *found.labels.values()]} == {None}
        assert found.headline.undefined_because == "4 patients, fewer than 5"
        assert found.headline.n_patients == 4
        assert found.headline.n == (~np.isnan(scored.truth_NK))[names_N == "device X"].any(axis=1).sum() <= n
        assert table.differences["device X"].undefined_because == "device X: 4 patients, fewer than 5"
        assert table.reference != "device X"
        if found.labels:
            assert found.labels["A"].n_pos == (scored.truth_NK[names_N == "device X", 0] == 1).sum()
            assert found.label_groups["g"].undefined_because == "4 patients, fewer than 5"
    just = by_group(ACCURACY, decisions(scored), names_N, min_patients=4, n_boot=0).groups["device X"]
    assert just.headline.value is not None


def test_groups_without_records_and_their_order() -> None:
    scored, names_N = grouped()
    table = by_group(AUROC, scored, names_N, order=("other", "M"), n_boot=20)
    assert list(table.groups) == ["other", "M", "F"]
    assert table.groups["other"].headline.undefined_because == "0 patients, fewer than 10"
    assert table.reference == "F"  # the largest
    with pytest.raises(EvlecgError, match="no group 'X'"):
        by_group(AUROC, scored, names_N, reference="X")
    with pytest.raises(ValueError, match="199 groups for 200 records"):
        by_group(AUROC, scored, names_N[1:])
    nobody = by_group(AUROC, scored, [None] * 200, n_boot=20)
    assert (nobody.groups, nobody.reference, nobody.n_ungrouped) == ({}, None, 200)


@pytest.mark.parametrize("metric", [ACCURACY, HAMMING_LOSS])
def test_pooled_headlines_are_compared_as_they_are(metric: Metric) -> None:
    scored, names_N = grouped()
    hard = decisions(scored)
    table = by_group(metric, hard, names_N, reference="M", n_boot=50, seed=3)
    value = {name: estimate(metric, alone(hard, names_N == name), n_boot=0).headline.value for name in "FM"}
    found = table.differences["F"]
    assert_allclose(found.value, value["F"] - value["M"])
    values = resampled({name: metric.bind(hard.where(names_N == name)) for name in "FM"}, hard.n_patients, 20,
                       n_boot=50, seed=3)  # fmt: skip
    kind = metric.headline
    expected = np.percentile(values["F"].pooled[kind] - values["M"].pooled[kind], (2.5, 97.5))
    assert_allclose(found.ci95, expected, rtol=1e-9)
    assert table.label_differences["F"] == {} if metric is ACCURACY else len(table.label_differences["F"]) == 3


def test_holm_is_over_groups_and_over_cells() -> None:
    scored = make(n=300, k=3, patients=150)
    names_N = np.array(["a", "b", "c", "d"], dtype=object)[np.arange(300) % 4]
    table = by_group(AUROC, scored, names_N, reference="a", n_boot=60)
    found = list(table.differences.values())
    assert [each.p_holm for each in found] == holm([each.p for each in found])
    cells = [cell for labels in table.label_differences.values() for cell in labels.values()]
    assert [cell.p_holm for cell in cells] == holm([cell.p for cell in cells])
    assert len(cells) == 9


def test_a_difference_that_was_put_in_is_found() -> None:
    scored = make(n=600, k=2, patients=400, shift=2.5)
    names_N = np.where(np.arange(600) % 2 == 0, "clean", "noisy").astype(object)
    noise_NK = np.random.default_rng(0).random(scored.value_NK.shape)
    noisy = scored.replaced(value_NK=np.where((names_N == "noisy")[:, None], noise_NK, scored.value_NK))
    assert by_group(AUROC, noisy, names_N, reference="clean", n_boot=200).differences["noisy"].ci95[1] < -0.1
    assert by_group(AUROC, scored, names_N, reference="clean", n_boot=200).differences["noisy"].p > 0.05
