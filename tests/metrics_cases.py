"""Data for the tests of metrics, and the bootstrap as one would say it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from evlecg.metrics import Scored


def make(
    *,
    n: int = 120,
    k: int = 4,
    patients: int = 45,
    levels: int | None = None,
    shift: float = 1.0,
    missing: float = 0.1,
    seed: int = 0,
    noise_seed: int | None = None,
) -> Scored:
    """Probabilities (on `levels` distinct values: ties), truths with a tenth not assessed, several records a patient.

    Another `noise_seed` with the same `seed` is another model on the same records.
    """
    rng = np.random.default_rng(seed)
    truth_NK = (rng.random((n, k)) < np.linspace(0.15, 0.6, k)).astype(float)
    patient_ids = [f"p{i}" for i in rng.integers(0, patients, n)]
    missing_NK = rng.random((n, k)) < missing
    noise = np.random.default_rng(seed + 1000 if noise_seed is None else noise_seed)
    value_NK = 1 / (1 + np.exp(-(noise.normal(size=(n, k)) + shift * (truth_NK - 0.5))))
    if levels is not None:
        value_NK = np.round(value_NK * levels) / levels
    truth_NK[missing_NK] = np.nan
    return Scored(value_NK, truth_NK, patient_ids, tuple("ABCDEFGHIJ"[:k]), [f"r{i}" for i in range(n)])


def decisions(scored: Scored, threshold: float = 0.5) -> Scored:
    return scored.replaced(value_NK=(scored.value_NK >= threshold).astype(float))


Oracle = Callable[[np.ndarray, np.ndarray], float]  # truths and values of one label, all assessed -> number or NaN


def naive(oracle: Oracle, scored: Scored, rows: np.ndarray | list[int] | None = None) -> np.ndarray:
    """The oracle's value of every label [K] on some rows (with repeats)."""
    rows = np.arange(len(scored.truth_NK)) if rows is None else np.asarray(rows, dtype=int)
    values = []
    for truth_N, value_N in zip(scored.truth_NK[rows].T, scored.value_NK[rows].T, strict=True):
        seen = ~np.isnan(truth_N)
        values.append(oracle(truth_N[seen], value_N[seen]))
    return np.array(values, dtype=float)


def rows_of_resample(scored: Scored, count_P: np.ndarray) -> list[int]:
    """Writes every drawn patient's records down, as often as it was drawn."""
    names = sorted({str(patient) for patient in scored.patient_ids})
    return [
        i
        for p, patient in enumerate(names)
        for _ in range(int(count_P[p]))
        for i, owner in enumerate(scored.patient_ids)
        if owner == patient
    ]
