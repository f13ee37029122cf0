"""Scores and truths in, numbers with counts and intervals out.

Intervals come from a bootstrap over patients, not records: two records of one patient are not two pieces of
evidence. Resampling patients with replacement is giving every patient a count, so one sort a label serves all
resamples: with the records in ascending order of score, AUC is a sum over cumulated counts (Mann and Whitney 1947;
Hanley and McNeil 1982). Neighbours in that order between which no negative follows a positive are pooled
beforehand, which leaves segments G far fewer than records, and all resamples go through them at once as the columns
of a sparse product. Counts are integers and every sum is exact, so the values are those of a plain loop.

A value that is undefined is None, never 0.5: it is out of every mean, and `LabelAuc.undefined_because` says why.

Shape legend: N records, K labels, P patients, R resamples, G segments of the sorted records of one label.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from evlecg.errors import EvlecgError

N_BOOT = 2000
CHUNK_CELLS = 1 << 25  # records x resamples held at once: 128 MiB in float32
EXACT_IN_FLOAT32 = 1 << 24  # integers up to here are float32 numbers


@dataclass(frozen=True)
class Estimate:
    """A number and the 95% interval of its bootstrap over patients; None where undefined."""

    value: float | None
    ci95: tuple[float, float] | None


@dataclass(frozen=True)
class LabelAuc:
    """The AUC of one label.

    Attributes:
        value: None unless records of both classes were assessed.
        ci95: None where `value` is, and where fewer than two patients stand on one side: resampling cannot tell how
            another patient would have changed the number.
        n_pos, n_neg: records assessed to have and not to have it.
    """

    value: float | None
    ci95: tuple[float, float] | None
    n_pos: int
    n_neg: int

    @property
    def undefined_because(self) -> str | None:
        """Why there is no value, None where there is one."""
        if self.n_pos and self.n_neg:
            return None
        if self.n_pos or self.n_neg:
            return f"all {self.n_pos or self.n_neg} records are {'positive' if self.n_pos else 'negative'}"
        return "no record was assessed"


@dataclass(frozen=True)
class AucResult:
    """AUCs of all labels, in the order of the columns, and their unweighted mean over the defined ones."""

    macro: Estimate
    labels: tuple[LabelAuc, ...]
    n_boot: int
    seed: int


@dataclass(frozen=True)
class Difference:
    """A minus B on the same records.

    Attributes:
        value: difference of the macro AUCs; None where they are undefined.
        ci95: percentile interval over resamples in which both models see the same patients.
        p: two-sided, twice the smaller share of resamples on one side of zero, (1 + count) / (1 + resamples).
    """

    value: float | None
    ci95: tuple[float, float] | None
    p: float | None


def auc(score_N: np.ndarray, truth_N: np.ndarray) -> float | None:
    """Chance that a positive record scores higher than a negative one, ties counting half.

    Args:
        score_N: any monotone score.
        truth_N: 1, 0, or NaN where the record was not assessed.

    Returns:
        The area under the ROC curve, in [0, 1]; None without both classes.

    Raises:
        EvlecgError: the score of an assessed record is NaN.
    """
    score_NK, truth_NK = _checked(np.reshape(score_N, (-1, 1)), np.reshape(truth_N, (-1, 1)))
    value = _auc(score_NK[:, 0], truth_NK[:, 0])
    return None if np.isnan(value) else value


def macro_auc(score_NK: np.ndarray, truth_NK: np.ndarray) -> float | None:
    """Unweighted mean of the labels' AUCs over the labels with both classes; None where there is no such label."""
    score_NK, truth_NK = _checked(score_NK, truth_NK)
    return _mean([_auc(score_N, truth_N) for score_N, truth_N in zip(score_NK.T, truth_NK.T, strict=True)])


def bootstrap_auc(
    score_NK: np.ndarray, truth_NK: np.ndarray, patient_ids: Sequence[str], *, n_boot: int = N_BOOT, seed: int = 0
) -> AucResult:
    """Macro and per-label AUC with 95% percentile intervals over resamples of patients.

    Args:
        score_NK: any monotone score per record and label.
        truth_NK: 1, 0, or NaN where the label was not assessed in that record.
        patient_ids: of every record; records that share one are drawn together.
        n_boot: resamples; 0 leaves the intervals out.
        seed: fixes the resamples.

    Returns:
        Labels in the order of the columns. In a resample that lacks one class of a label, that label is left out.

    Raises:
        EvlecgError: the score of an assessed label is NaN.
    """
    score_NK, truth_NK = _checked(score_NK, truth_NK)
    value_RK = resampled_auc(score_NK, truth_NK, patient_ids, n_boot=n_boot, seed=seed)
    firm_K = _has_interval(truth_NK, patient_ids)
    labels = []
    for k, (score_N, truth_N) in enumerate(zip(score_NK.T, truth_NK.T, strict=True)):
        value = _auc(score_N, truth_N)
        labels.append(
            LabelAuc(
                value=None if np.isnan(value) else value,
                ci95=_percentiles(value_RK[:, k]) if firm_K[k] else None,
                n_pos=int((truth_N == 1).sum()),
                n_neg=int((truth_N == 0).sum()),
            )
        )
    macro = Estimate(
        value=_mean([np.nan if label.value is None else label.value for label in labels]),
        ci95=_percentiles(_row_means(value_RK)) if firm_K.any() else None,
    )
    return AucResult(macro, tuple(labels), n_boot, seed)


def paired_difference(
    score_a_NK: np.ndarray,
    score_b_NK: np.ndarray,
    truth_NK: np.ndarray,
    patient_ids: Sequence[str],
    *,
    n_boot: int = N_BOOT,
    seed: int = 0,
) -> Difference:
    """Macro AUC of A minus that of B on the same records, with both scored on the same resamples of patients.

    Pairing removes what the two share (easy and hard patients), so that the interval is narrower than what the two
    models' own intervals suggest.

    Raises:
        EvlecgError: the score of an assessed label is NaN.
    """
    macro_a, macro_b = macro_auc(score_a_NK, truth_NK), macro_auc(score_b_NK, truth_NK)
    if macro_a is None or macro_b is None:
        return Difference(None, None, None)
    difference_R = _row_means(resampled_auc(score_a_NK, truth_NK, patient_ids, n_boot=n_boot, seed=seed)) - _row_means(
        resampled_auc(score_b_NK, truth_NK, patient_ids, n_boot=n_boot, seed=seed)
    )
    difference_R = difference_R[~np.isnan(difference_R)]
    if not _has_interval(np.asarray(truth_NK, dtype=np.float64), patient_ids).any() or not len(difference_R):
        return Difference(macro_a - macro_b, None, None)
    fewer = min(int((difference_R <= 0).sum()), int((difference_R >= 0).sum()))
    p = min(1.0, 2 * (1 + fewer) / (1 + len(difference_R)))  # the 1 is the observed sample: p is never 0
    return Difference(macro_a - macro_b, _percentiles(difference_R), p)


def resampled_auc(
    score_NK: np.ndarray, truth_NK: np.ndarray, patient_ids: Sequence[str], *, n_boot: int = N_BOOT, seed: int = 0
) -> np.ndarray:
    """AUC of every label in every resample of patients: what all intervals and comparisons are made of.

    Two calls with the same patients and seed see the same resamples.

    Returns:
        float64 [R, K], NaN where a resample lacks one class.

    Raises:
        EvlecgError: the score of an assessed label is NaN.
    """
    score_NK, truth_NK = _checked(score_NK, truth_NK)
    n_records, n_labels = truth_NK.shape
    patient_N, n_patients, largest = _patients(patient_ids, n_records)
    # Sums stay exact in float32, at half the memory traffic, unless a resample can hold too many records.
    dtype = np.float32 if n_patients * largest <= EXACT_IN_FLOAT32 else np.float64
    value_RK = np.full((n_boot, n_labels), np.nan)
    labels = {
        k: _sort_label(score_NK[:, k], truth_NK[:, k], patient_N, n_patients, dtype)
        for k in range(n_labels)
        if {0, 1} <= set(np.unique(truth_NK[:, k]))
    }
    if not labels:
        return value_RK
    start = 0
    for count_PR in resample_patients(n_patients, n_boot, seed, chunk=max(1, CHUNK_CELLS // n_records), dtype=dtype):
        stop = start + count_PR.shape[1]
        for k, label in labels.items():
            value_RK[start:stop, k] = label.auc(count_PR)
        start = stop
    return value_RK


def resample_patients(
    n_patients: int, n_boot: int, seed: int, *, chunk: int, dtype: type[np.floating] = np.float64
) -> Iterator[np.ndarray]:
    """How often every patient is drawn in every resample of as many patients as there are.

    Args:
        chunk: resamples a piece; the numbers do not depend on it.

    Yields:
        [P, up to `chunk`] whole numbers; every column sums to P.
    """
    generator = np.random.default_rng(seed)
    for start in range(0, n_boot, chunk):
        count_PR = np.empty((n_patients, min(chunk, n_boot - start)), dtype)
        for column_P in count_PR.T:
            column_P[:] = np.bincount(generator.integers(0, n_patients, n_patients), minlength=n_patients)
        yield count_PR


@dataclass(frozen=True)
class _SortedLabel:
    """One label's records in ascending order of score, cut into segments, as sparse sums over patients.

    In a segment all negatives come before all positives, or (`tied_T`) all scores are equal.
    """

    positive_GP: sparse.csr_matrix
    negative_GP: sparse.csr_matrix
    tied_T: np.ndarray

    def auc(self, count_PR: np.ndarray) -> np.ndarray:
        """AUC [R] with every patient's records counted as often as `count_PR` says; NaN without both classes."""
        positive_GR, below_GR = self.positive_GP @ count_PR, self.negative_GP @ count_PR
        ties_R = np.einsum("tr,tr->r", positive_GR[self.tied_T], below_GR[self.tied_T], dtype=np.float64)
        for g in range(1, len(below_GR)):  # faster than cumsum(axis=0), which walks down the columns
            np.add(below_GR[g], below_GR[g - 1], out=below_GR[g])
        won_R = np.einsum("gr,gr->r", positive_GR, below_GR, dtype=np.float64) - 0.5 * ties_R
        pairs_R = positive_GR.sum(axis=0, dtype=np.float64) * below_GR[-1]
        return np.divide(won_R, pairs_R, out=np.full_like(won_R, np.nan), where=pairs_R > 0)


def _sort_label(
    score_N: np.ndarray, truth_N: np.ndarray, patient_N: np.ndarray, n_patients: int, dtype: type[np.floating]
) -> _SortedLabel:
    assessed_N = ~np.isnan(truth_N)
    score_N, truth_N, patient_N = score_N[assessed_N], truth_N[assessed_N] == 1, patient_N[assessed_N]
    _, level_N = np.unique(score_N, return_inverse=True)
    has_positive = np.bincount(level_N, weights=truth_N) > 0  # per level, that is, distinct score
    has_negative = np.bincount(level_N, weights=~truth_N) > 0
    tied = has_positive & has_negative
    cut = tied[1:] | tied[:-1] | (has_negative[1:] & has_positive[:-1])
    segment = np.concatenate([[0], np.cumsum(cut)])  # of every level

    def counts_GP(of_class: np.ndarray) -> sparse.csr_matrix:
        cells = (segment[level_N[of_class]], patient_N[of_class])
        return sparse.csr_matrix((np.ones(len(cells[0]), dtype), cells), shape=(segment[-1] + 1, n_patients))

    return _SortedLabel(counts_GP(truth_N), counts_GP(~truth_N), segment[tied])


def _auc(score_N: np.ndarray, truth_N: np.ndarray) -> float:
    """Rank-sum AUC of checked input, NaN without both classes."""
    positive_N, assessed_N = truth_N == 1, ~np.isnan(truth_N)
    n_pos = int(positive_N.sum())
    n_neg = int(assessed_N.sum()) - n_pos
    if not n_pos or not n_neg:
        return float("nan")
    _, level_N, size = np.unique(score_N[assessed_N], return_inverse=True, return_counts=True)
    rank = np.cumsum(size) - (size - 1) / 2  # mean rank of every level, from 1
    rank_sum = rank[level_N][positive_N[assessed_N]].sum()
    return float((rank_sum - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def _checked(score_NK: np.ndarray, truth_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    score_NK, truth_NK = np.asarray(score_NK, dtype=np.float64), np.asarray(truth_NK, dtype=np.float64)
    if truth_NK.ndim != 2 or score_NK.shape != truth_NK.shape:
        raise ValueError(f"scores {score_NK.shape} and truths {truth_NK.shape} are not both [records, labels]")
    assessed_NK = ~np.isnan(truth_NK)
    if not np.isin(truth_NK[assessed_NK], (0, 1)).all():
        raise ValueError("truths are 0, 1 or NaN")
    nan_K = (np.isnan(score_NK) & assessed_NK).sum(axis=0)
    if nan_K.any():
        raise EvlecgError(
            f"{nan_K.sum()} of {assessed_NK.sum()} scores are not numbers",
            where=f"label column {int(np.argmax(nan_K > 0))}",
            hint="the model's logits are NaN: was training unstable, or the dtype too small?",
        )
    return score_NK, truth_NK


def _patients(patient_ids: Sequence[str], n_records: int) -> tuple[np.ndarray, int, int]:
    """Every record's patient as an index, the number of patients, and the most records of one."""
    if len(patient_ids) != n_records:
        raise ValueError(f"{len(patient_ids)} patient ids for {n_records} records")
    if not n_records:
        return np.zeros(0, dtype=int), 0, 0
    _, patient_N, size_P = np.unique(np.asarray(patient_ids), return_inverse=True, return_counts=True)
    return patient_N, len(size_P), int(size_P.max())


def _has_interval(truth_NK: np.ndarray, patient_ids: Sequence[str]) -> np.ndarray:
    """bool [K]: at least two patients stand on each side."""
    patient_N, _, _ = _patients(patient_ids, len(truth_NK))
    return np.array(
        [all(len(np.unique(patient_N[truth_N == side])) >= 2 for side in (0, 1)) for truth_N in truth_NK.T], dtype=bool
    )


def _row_means(value_RK: np.ndarray) -> np.ndarray:
    """Mean over the defined labels of every resample, NaN where there is none."""
    defined_RK = ~np.isnan(value_RK)
    n_R = defined_RK.sum(axis=1)
    total_R = np.where(defined_RK, value_RK, 0).sum(axis=1)
    return np.divide(total_R, n_R, out=np.full(len(value_RK), np.nan), where=n_R > 0)


def _mean(values: list[float]) -> float | None:
    defined = [value for value in values if not np.isnan(value)]
    return float(np.mean(defined)) if defined else None


def _percentiles(value_R: np.ndarray) -> tuple[float, float] | None:
    value_R = value_R[~np.isnan(value_R)]
    if not len(value_R):
        return None
    low, high = np.percentile(value_R, (2.5, 97.5))
    return float(low), float(high)
