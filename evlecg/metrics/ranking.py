"""What ranking scores tells: AUROC, average precision, operating points of the ROC curve, DeLong's variance, curves.

One sort a label serves all resamples: with the records in order of score, AUC is a sum over cumulated counts (Mann and
Whitney 1947; Hanley and McNeil 1982). Neighbours in that order between which no negative follows a positive are pooled
beforehand, which leaves segments G far fewer than records, and all resamples go through them at once as the columns of
a sparse product. Counts are integers and every sum is exact, so the values are those of a plain loop.

Shape legend: N records, K labels, P patients, R resamples, G segments of the sorted records of one label, C patients
(clusters) of one label, M models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy import sparse, special
from scipy.stats import norm

from evlecg.metrics.estimates import MACRO, WEIGHTED, Estimate, Metric, plain
from evlecg.metrics.resampling import Statistic, Values, ratio
from evlecg.metrics.scored import Scored, same_records

_BLOCK = 64  # rows that are divided at once: they stay in the processor's cache
_Z975 = float(norm.ppf(0.975))


_Label = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # counts [P, R] -> value [R], positives [R]


class _PerLabel:
    """A statistic of the labels one by one, each from its own sorted segments."""

    counts_only = True

    def __init__(self, scored: Scored, sort: Callable[[Scored, int], _Label]) -> None:
        self.n_labels = len(scored.labels)
        both_K = (scored.truth_NK == 1).any(axis=0) & (scored.truth_NK == 0).any(axis=0)
        self.labels = {int(k): sort(scored, int(k)) for k in np.flatnonzero(both_K)}

    def __call__(self, count_PR: np.ndarray) -> Values:
        label_RK = np.full((count_PR.shape[1], self.n_labels), np.nan)
        positive_RK = np.zeros_like(label_RK)
        for k, label in self.labels.items():
            label_RK[:, k], positive_RK[:, k] = label(count_PR)
        return Values(label_RK, positive_RK)


@dataclass(frozen=True)
class _RankedPairs:
    """One label's records in ascending order of score, cut into segments, as sparse sums over patients.

    In a segment all negatives come before all positives, or (`tied_T`) all scores are equal.
    """

    positive_GP: sparse.csr_matrix
    negative_GP: sparse.csr_matrix
    tied_T: np.ndarray

    @classmethod
    def sort(cls, scored: Scored, k: int) -> _RankedPairs:
        level_N, positive_N, patient_N = _levels(scored, k)
        has_positive = np.bincount(level_N, weights=positive_N) > 0  # per level, that is, distinct score
        has_negative = np.bincount(level_N, weights=~positive_N) > 0
        tied = has_positive & has_negative
        cut = tied[1:] | tied[:-1] | (has_negative[1:] & has_positive[:-1])
        segment = np.concatenate([[0], np.cumsum(cut)])
        sums = [
            _sums_GP(segment[level_N[side]], patient_N[side], int(segment[-1]) + 1, scored.n_patients)
            for side in (positive_N, ~positive_N)
        ]
        return cls(sums[0], sums[1], segment[tied])

    def __call__(self, count_PR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """AUC [R] and positives [R]; NaN without both classes."""
        positive_GR, below_GR = self.positive_GP @ count_PR, self.negative_GP @ count_PR
        ties_R = np.einsum("tr,tr->r", positive_GR[self.tied_T], below_GR[self.tied_T], dtype=np.float64)
        _cumulate(below_GR)
        won_R = np.einsum("gr,gr->r", positive_GR, below_GR, dtype=np.float64) - 0.5 * ties_R
        positive_R = positive_GR.sum(axis=0, dtype=np.float64)
        return ratio(won_R, positive_R * below_GR[-1]), positive_R


@dataclass(frozen=True)
class _Descent:
    """One label's records from the highest score down, in steps that each end with a level that holds positives.

    At the end of a step everything down to and with that level is above the threshold. Between two ends only negatives
    come in, so that no better operating point and no term of average precision lies there.
    """

    positive_GP: sparse.csr_matrix
    negative_GP: sparse.csr_matrix
    other_negative_P: np.ndarray  # below every positive

    @classmethod
    def sort(cls, scored: Scored, k: int) -> _Descent:
        level_N, positive_N, patient_N = _levels(scored, k)
        above_N = np.cumsum(np.bincount(level_N, weights=positive_N) > 0)[level_N]  # 0 below every positive
        n_steps = int(above_N.max())
        step_N = n_steps - above_N
        seen_N = ~positive_N & (above_N > 0)
        return cls(
            _sums_GP(step_N[positive_N], patient_N[positive_N], n_steps, scored.n_patients),
            _sums_GP(step_N[seen_N], patient_N[seen_N], n_steps, scored.n_patients),
            np.bincount(patient_N[above_N == 0], minlength=scored.n_patients),
        )

    def steps(self, count_PR: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Positives and negatives of every step [G, R], all positives and all negatives [R]."""
        positive_GR, negative_GR = self.positive_GP @ count_PR, self.negative_GP @ count_PR
        below_R = self.other_negative_P.astype(count_PR.dtype) @ count_PR
        return positive_GR, negative_GR, positive_GR.sum(axis=0), negative_GR.sum(axis=0) + below_R

    def average_precision(self, count_PR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        positive_GR, negative_GR, positives_R, negatives_R = self.steps(count_PR)
        flagged_GR, true_GR = np.add(negative_GR, positive_GR, out=negative_GR), positive_GR.copy()
        _cumulate(flagged_GR)
        _cumulate(true_GR)
        total_R = np.zeros(count_PR.shape[1])
        for start in range(0, len(true_GR), _BLOCK):
            block = slice(start, start + _BLOCK)
            precision_GR = np.divide(true_GR[block], np.maximum(flagged_GR[block], 1), dtype=np.float64)
            total_R += np.einsum("gr,gr->r", positive_GR[block], precision_GR)
        return np.where(negatives_R > 0, ratio(total_R, positives_R), np.nan), positives_R.astype(np.float64)

    def sensitivity_at(self, least: float, count_PR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        positive_GR, negative_GR, positives_R, negatives_R = self.steps(count_PR)
        true_R, false_R, best_R = np.zeros((3, count_PR.shape[1]))
        allowed_R = negatives_R - _at_least(least, negatives_R)
        for positive_R, negative_R in zip(positive_GR, negative_GR, strict=True):
            true_R += positive_R
            false_R += negative_R
            np.copyto(best_R, true_R, where=false_R <= allowed_R)
        return np.where(negatives_R > 0, ratio(best_R, positives_R), np.nan), positives_R.astype(np.float64)

    def specificity_at(self, least: float, count_PR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        positive_GR, negative_GR, positives_R, negatives_R = self.steps(count_PR)
        true_R, false_R, paid_R = np.zeros((3, count_PR.shape[1]))
        needed_R = _at_least(least, positives_R)
        for positive_R, negative_R in zip(positive_GR, negative_GR, strict=True):
            short_R = true_R < needed_R
            true_R += positive_R
            false_R += negative_R
            np.copyto(paid_R, false_R, where=short_R)
        return np.where(positives_R > 0, ratio(negatives_R - paid_R, negatives_R), np.nan), positives_R.astype(
            np.float64
        )


def _cumulate(count_GR: np.ndarray) -> None:
    """Running sums down the rows, in place; faster than cumsum(axis=0), which walks down the columns."""
    for g in range(1, len(count_GR)):
        np.add(count_GR[g], count_GR[g - 1], out=count_GR[g])


def _levels(scored: Scored, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the records assessed for label k: rank of the score among the distinct ones, whether positive, patient."""
    assessed_N = scored.assessed_NK[:, k]
    _, level_N = np.unique(scored.value_NK[assessed_N, k], return_inverse=True)
    return level_N, scored.truth_NK[assessed_N, k] == 1, scored.patient_N[assessed_N]


def _sums_GP(row: np.ndarray, patient: np.ndarray, n_rows: int, n_patients: int) -> sparse.csr_matrix:
    return sparse.csr_matrix((np.ones(len(row), np.float32), (row, patient)), shape=(n_rows, n_patients))


def _at_least(share: float, total_R: np.ndarray) -> np.ndarray:
    """How many of `total_R` are at least a share; the smallest whole number, safe from rounding of the product."""
    return np.ceil(share * np.asarray(total_R, dtype=np.float64) * (1 - 1e-12))


def _each_label(sort: Callable[[Scored, int], _Label]) -> Callable[[Scored], Statistic]:
    return lambda scored: _PerLabel(scored, sort)


def _descending(
    method: Callable[[_Descent, np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> Callable[[Scored], Statistic]:
    return _each_label(lambda scored, k: partial(method, _Descent.sort(scored, k)))


AUROC = Metric(
    name="auroc",
    formula="(pairs in which the positive record scores higher + half of the ties) / all pairs of a positive and a "
    "negative record",
    overall={"macro": MACRO, "weighted": WEIGHTED},
    bind=_each_label(_RankedPairs.sort),
    sides=(1, 0),
)

AVERAGE_PRECISION = Metric(
    name="average_precision",
    formula="sum over the distinct scores, from the highest, of (recall gained) x (precision down to that score); its "
    "chance level is the prevalence",
    overall={"macro": MACRO, "weighted": WEIGHTED},
    bind=_descending(_Descent.average_precision),
    sides=(1, 0),
)


def in_sample_sensitivity_at(specificity: float) -> Metric:
    """Highest sensitivity of the ROC curve at this specificity or more: the threshold is chosen on the same records.

    Optimistic, and more so the fewer the records; in each resample the threshold is chosen anew. For thresholds that
    come from validation see `thresholds_at_specificity`.
    """
    _check_share(specificity)
    return Metric(
        name=f"in_sample_sensitivity_at_specificity_{specificity:g}",
        formula=f"highest share of the positive records at or above a threshold that {specificity:g} or more of the "
        "negative records lie below; the threshold is chosen on these same records",
        overall={"macro": MACRO},
        bind=_descending(lambda descent, count_PR: descent.sensitivity_at(specificity, count_PR)),
        sides=(1, 0),
        in_sample=True,
    )


def in_sample_specificity_at(sensitivity: float) -> Metric:
    """Highest specificity of the ROC curve at this sensitivity or more: the threshold is chosen on the same records."""
    _check_share(sensitivity)
    return Metric(
        name=f"in_sample_specificity_at_sensitivity_{sensitivity:g}",
        formula=f"highest share of the negative records below a threshold that {sensitivity:g} or more of the positive "
        "records reach; the threshold is chosen on these same records",
        overall={"macro": MACRO},
        bind=_descending(lambda descent, count_PR: descent.specificity_at(sensitivity, count_PR)),
        sides=(1, 0),
        in_sample=True,
    )


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"a share of {share} is not in (0, 1]")


# -- DeLong ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeLong:
    """AUROCs of M models on one label, with their covariance.

    Attributes:
        auc_M: NaN without both classes.
        covariance_MM: NaN where fewer than two patients stand on a side.
        clustered: some patient has several records.
    """

    auc_M: np.ndarray
    covariance_MM: np.ndarray
    clustered: bool

    @property
    def name(self) -> str:
        return "DeLong 1988, summed within patients (Obuchowski 1997)" if self.clustered else "DeLong 1988"


@dataclass(frozen=True)
class DeLongTest:
    """AUROC of A minus that of B on one label of the same records.

    Attributes:
        value: the difference; None without both classes.
        ci95: value +- 1.96 standard errors; None where the variance is undefined.
        p: two-sided, of z = value / standard error.
    """

    a: str
    b: str
    label: str
    value: float | None
    ci95: tuple[float, float] | None
    p: float | None
    n: int
    n_pos: int
    n_patients: int
    method: str
    undefined_because: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values under the attributes' names."""
        return plain(asdict(self))


def delong(models: Mapping[str, Scored], label: str) -> DeLong:
    """DeLong's covariance of AUROCs on the same records, by midranks (Sun and Xu 2014).

    Where a patient has several records, their structural components are summed within patients (Obuchowski 1997), which
    also counts that a patient's positive and negative records go together. With one record a patient both are the same.

    Raises:
        EvlecgError: the models were scored on different records.
    """
    same_records(models)
    first = next(iter(models.values()))
    k = first.column(label)
    assessed_N = first.assessed_NK[:, k]
    positive_N = first.truth_NK[assessed_N, k] == 1
    _, patient_N = np.unique(first.patient_N[assessed_N], return_inverse=True)
    n_models, n_pos, n_neg = len(models), int(positive_N.sum()), int((~positive_N).sum())
    clustered = len(np.unique(patient_N)) < len(patient_N)
    if not n_pos or not n_neg:
        return DeLong(np.full(n_models, np.nan), np.full((n_models, n_models), np.nan), clustered)
    auc_M = np.empty(n_models)
    sums = []  # of each side, per patient: structural component minus AUC [M, C]
    win_MN = np.empty((n_models, len(patient_N)))
    for m, scored in enumerate(models.values()):
        score_N = scored.value_NK[assessed_N, k]
        everywhere_N, among_pos, among_neg = (
            _midrank(score_N),
            _midrank(score_N[positive_N]),
            _midrank(score_N[~positive_N]),
        )
        win_MN[m, positive_N] = (everywhere_N[positive_N] - among_pos) / n_neg  # share of negatives that lie below
        win_MN[m, ~positive_N] = (
            1 - (everywhere_N[~positive_N] - among_neg) / n_pos
        )  # share of positives that lie above
        auc_M[m] = win_MN[m, positive_N].mean()
    n_clusters = []
    for side_N in (positive_N, ~positive_N):
        centred_MN = (win_MN - auc_M[:, None])[:, side_N]
        owner = patient_N[side_N]
        sums.append(np.stack([np.bincount(owner, row, minlength=patient_N.max() + 1) for row in centred_MN]))
        n_clusters.append(len(np.unique(owner)))
    if min(n_clusters) < 2:
        return DeLong(auc_M, np.full((n_models, n_models), np.nan), clustered)
    (pos_MC, neg_MC), n_all = sums, sums[0].shape[1]
    covariance_MM = (
        n_clusters[0] / (n_clusters[0] - 1) * pos_MC @ pos_MC.T / n_pos**2
        + n_clusters[1] / (n_clusters[1] - 1) * neg_MC @ neg_MC.T / n_neg**2
        + n_all / (n_all - 1) * (pos_MC @ neg_MC.T + neg_MC @ pos_MC.T) / (n_pos * n_neg)
    )
    return DeLong(auc_M, covariance_MM, clustered)


def delong_auroc(scored: Scored, label: str) -> Estimate:
    """AUROC of one label with DeLong's 95% interval on the logit scale, which stays within (0, 1).

    At an AUROC of 0 or 1 the variance is 0 whatever the number of records, and there is no interval.
    """
    result = delong({"": scored}, label)
    k = scored.column(label)
    value, variance = float(result.auc_M[0]), float(result.covariance_MM[0, 0])
    ci95, reason, caveat = None, None, None
    if np.isnan(value):
        reason = _one_class(scored, k)
    elif np.isnan(variance):
        caveat = "no interval: fewer than 2 patients on one side"
    elif value in (0.0, 1.0) or variance <= 0:
        caveat = f"no interval: the variance is 0 at an AUROC of {value:g}"
    else:
        half = _Z975 * np.sqrt(variance) / (value * (1 - value))
        ci95 = tuple(float(special.expit(special.logit(value) + sign * half)) for sign in (-1, 1))
    return Estimate(
        None if reason else value, (ci95[0], ci95[1]) if ci95 else None, int(scored.assessed_NK[:, k].sum()),
        int((scored.truth_NK[:, k] == 1).sum()), scored.n_patients_among(scored.assessed_NK[:, k]), 1, AUROC.formula,
        f"95% interval = logit(AUROC) ± 1.96 standard errors / (AUROC (1 - AUROC)), transformed back; variance: "
        f"{result.name}",
        reason, caveat,
    )  # fmt: skip


def delong_test(models: Mapping[str, Scored], label: str) -> DeLongTest:
    """Paired comparison of two models' AUROCs on one label.

    Args:
        models: the two, by name; the first minus the second.

    Raises:
        EvlecgError: the models were scored on different records.
    """
    if len(models) != 2:
        raise ValueError(f"a paired test needs two models, not {len(models)}")
    result = delong(models, label)
    (a, scored), (b, _) = models.items()
    k = scored.column(label)
    value = float(result.auc_M[0] - result.auc_M[1])
    contrast_M = np.array([1.0, -1.0])
    variance = float(contrast_M @ result.covariance_MM @ contrast_M)
    ci95, p, reason = None, None, None
    if np.isnan(value):
        reason = _one_class(scored, k)
    elif np.isnan(variance):
        reason = "no test: fewer than 2 patients on one side"
    elif variance > 1e-18:
        error = np.sqrt(variance)
        ci95, p = (value - _Z975 * error, value + _Z975 * error), float(2 * norm.sf(abs(value) / error))
    elif value == 0:  # the two rank alike
        ci95, p = (0.0, 0.0), 1.0
    else:
        reason = "no test: the variance is 0"
    return DeLongTest(
        a, b, label, None if np.isnan(value) else value, ci95, p, int(scored.assessed_NK[:, k].sum()),
        int((scored.truth_NK[:, k] == 1).sum()), scored.n_patients_among(scored.assessed_NK[:, k]),
        f"z = difference / its standard error, two-sided normal; covariance: {result.name}", reason,
    )  # fmt: skip


def _one_class(scored: Scored, k: int) -> str:
    if scored.labels[k] in scored.left_out:
        return scored.left_out[scored.labels[k]]
    n, n_pos = int(scored.assessed_NK[:, k].sum()), int((scored.truth_NK[:, k] == 1).sum())
    return f"all {n} records are {'positive' if n_pos else 'negative'}" if n else "no record was assessed"


def _midrank(score_N: np.ndarray) -> np.ndarray:
    """Rank from 1, the mean one among equals."""
    _, level_N, size = np.unique(score_N, return_inverse=True, return_counts=True)
    return (np.cumsum(size) - (size - 1) / 2)[level_N]


# -- curves ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Points of an ROC curve (x = 1 - specificity, y = sensitivity) or of precision (y) against recall (x).

    `threshold` of a point: records that score at least this are flagged; infinity where none is. Empty without both
    classes.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    threshold: tuple[float, ...]
    n_pos: int
    n_neg: int


def roc_curve(scored: Scored, label: str) -> Curve:
    """Sensitivity against 1 - specificity at every distinct score; points on a straight piece are dropped."""
    found = _cumulated(scored, scored.column(label))
    if found is None:
        return _empty(scored, label)
    threshold, true, false = found
    corner = np.ones(len(true), dtype=bool)
    corner[1:-1] = np.diff(false)[:-1] * np.diff(true)[1:] != np.diff(false)[1:] * np.diff(true)[:-1]
    threshold, true, false = threshold[corner], true[corner], false[corner]
    return Curve(tuple((false / false[-1]).tolist()), tuple((true / true[-1]).tolist()), tuple(threshold.tolist()),
                 int(true[-1]), int(false[-1]))  # fmt: skip


def precision_recall_curve(scored: Scored, label: str) -> Curve:
    """Precision against recall at every distinct score that adds a positive record, from the highest down."""
    found = _cumulated(scored, scored.column(label))
    if found is None:
        return _empty(scored, label)
    threshold, true, false = found
    rises = np.concatenate([[False], np.diff(true) > 0])
    x, y = true[rises] / true[-1], true[rises] / (true + false)[rises]
    return Curve(tuple(x.tolist()), tuple(y.tolist()), tuple(threshold[rises].tolist()), int(true[-1]), int(false[-1]))


def _cumulated(scored: Scored, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Thresholds from infinity down, and the positive and negative records at or above each; None with one class."""
    assessed_N = scored.assessed_NK[:, k]
    levels, level_N = np.unique(scored.value_NK[assessed_N, k], return_inverse=True)
    positive_N = scored.truth_NK[assessed_N, k] == 1
    if positive_N.all() or not positive_N.any():
        return None
    true, false = (
        np.concatenate([[0.0], np.cumsum(np.bincount(level_N[side], minlength=len(levels))[::-1])])
        for side in (positive_N, ~positive_N)
    )
    return np.concatenate([[np.inf], levels[::-1]]), true, false


def _empty(scored: Scored, label: str) -> Curve:
    truth_N = scored.truth_NK[:, scored.column(label)]
    return Curve((), (), (), int((truth_N == 1).sum()), int((truth_N == 0).sum()))
