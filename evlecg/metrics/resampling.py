"""The bootstrap over patients: who is drawn how often, what that does to a statistic, and what intervals say.

Two records of one patient are not two pieces of evidence, so patients are resampled, not records. Resampling with
replacement is giving every patient a count; a statistic therefore reads counts [P, R] (a chunk of resamples as columns)
and never sees a resampled record. With all counts 1 it gives the value itself.

Shape legend: K labels, P patients, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

N_BOOT = 2000
CHUNK_CELLS = 1 << 24  # patients x resamples held at once: 64 MiB in float32
EXACT_IN_FLOAT32 = 1 << 24  # integers up to here are float32 numbers


@dataclass(frozen=True)
class Values:
    """A statistic under R counts.

    Attributes:
        label_RK: float64, NaN where undefined.
        positive_RK: positives of every label, the weights of the prevalence-weighted mean; None where none is offered.
        pooled: values [R] that are not means over labels, by name.
    """

    label_RK: np.ndarray
    positive_RK: np.ndarray | None = None
    pooled: Mapping[str, np.ndarray] = field(default_factory=dict)


class Statistic(Protocol):
    """`counts_only`: sums of whole numbers, exact in float32 at half the memory traffic."""

    counts_only: bool

    def __call__(self, count_PR: np.ndarray, /) -> Values: ...


def observed(statistic: Statistic, n_patients: int) -> Values:
    """The statistic of the data themselves, R = 1."""
    return statistic(np.ones((n_patients, 1)))


def resampled(
    statistics: Mapping[str, Statistic], n_patients: int, most_records: int, *, n_boot: int, seed: int
) -> dict[str, Values]:
    """Every statistic in the same resamples; the same patients and seed give the same resamples in another call.

    Args:
        most_records: of any one patient: says whether sums fit float32.
    """
    exact = n_patients * most_records <= EXACT_IN_FLOAT32
    dtype = np.float32 if exact and all(statistic.counts_only for statistic in statistics.values()) else np.float64
    chunk = max(1, CHUNK_CELLS // max(1, n_patients))
    parts: dict[str, list[Values]] = {name: [] for name in statistics}
    for count_PR in resample_patients(n_patients, n_boot, seed, chunk=chunk, dtype=dtype):
        for name, statistic in statistics.items():
            parts[name].append(statistic(count_PR))
    return {name: _joined(values) for name, values in parts.items()}


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


def percentile_interval(value_R: np.ndarray) -> tuple[float, float] | None:
    """2.5th to 97.5th percentile of the defined resamples; None where there is none."""
    value_R = value_R[~np.isnan(value_R)]
    if not len(value_R):
        return None
    low, high = np.percentile(value_R, (2.5, 97.5))
    return float(low), float(high)


def reflected_interval(value: float, value_R: np.ndarray) -> tuple[float, float] | None:
    """The percentile interval mirrored at the value (the basic bootstrap), cut to [0, 1].

    For distances from perfection (calibration error): noise only adds to them, in the sample and once more in every
    resample, so that the resamples lie above the value as the value lies above the truth. For squared distances by as
    much; for absolute ones near 0 by less (0.41 of it), so that such an interval may still lie above a truth of 0.
    """
    interval = percentile_interval(value_R)
    return (
        None if interval is None else (max(0.0, 2 * value - interval[1]), min(1.0, max(0.0, 2 * value - interval[0])))
    )


def two_sided_p(difference_R: np.ndarray) -> float | None:
    """Twice the smaller share of resamples on one side of zero, (1 + count) / (1 + resamples): it is never 0."""
    difference_R = difference_R[~np.isnan(difference_R)]
    if not len(difference_R):
        return None
    fewer = min(int((difference_R <= 0).sum()), int((difference_R >= 0).sum()))
    return min(1.0, 2 * (1 + fewer) / (1 + len(difference_R)))  # the 1 is the observed sample


def mean_over_labels(value_RK: np.ndarray, weight_RK: np.ndarray | None = None) -> np.ndarray:
    """Mean [R] over the defined labels of every resample, NaN where there is none."""
    defined_RK = ~np.isnan(value_RK)
    weight_RK = defined_RK.astype(np.float64) if weight_RK is None else np.where(defined_RK, weight_RK, 0.0)
    return ratio((np.where(defined_RK, value_RK, 0) * weight_RK).sum(axis=1), weight_RK.sum(axis=1))


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """float64 quotient, NaN where the denominator is 0."""
    out = np.full(np.broadcast_shapes(np.shape(numerator), np.shape(denominator)), np.nan)
    return np.divide(numerator, denominator, out=out, where=np.asarray(denominator) > 0)


def _joined(parts: list[Values]) -> Values:
    return Values(
        np.concatenate([part.label_RK for part in parts]),
        None
        if parts[0].positive_RK is None
        else np.concatenate([part.positive_RK for part in parts if part.positive_RK is not None]),
        {name: np.concatenate([part.pooled[name] for part in parts]) for name in parts[0].pooled},
    )
