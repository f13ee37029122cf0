"""How long 95% intervals over patients take: `python -m tests.bench.statistics`.

20,000 records of 18,000 patients, 71 labels of prevalence 0.2% to 45% (the shape of PTB-XL's 71 statements), 2,000
resamples, one thread. Beside them a plain loop over resamples with scikit-learn, timed on a few and multiplied.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from evlecg.metrics import (
    ACCURACY,
    AUC_HARD,
    AUROC,
    AVERAGE_PRECISION,
    BRIER,
    F1,
    HAMMING_LOSS,
    SENSITIVITY,
    Metric,
    Scored,
    by_group,
    compare,
    delong_auroc,
    ece,
    estimate,
    fit_platt,
    fit_temperature,
    fixed_thresholds,
    in_sample_sensitivity_at,
)
from tests.bench.timing import save

TARGET_S = 10.0  # of AUROC, macro and per label


def made(n: int, k: int, *, shift: float, seed: int, prevalence: np.ndarray | None = None) -> Scored:
    rng = np.random.default_rng(seed)
    truths = np.random.default_rng(0)  # the same for every model
    share_K = np.geomspace(0.002, 0.45, k) if prevalence is None else prevalence
    truth_NK = (truths.random((n, k)) < share_K).astype(float)
    patients = [f"p{i % int(0.9 * n)}" for i in range(n)]  # every ninth has two records
    logit_NK = rng.normal(size=(n, k)) + shift * truth_NK + np.log(share_K / (1 - share_K))
    return Scored(1 / (1 + np.exp(-logit_NK)), truth_NK, patients, tuple(f"label {i}" for i in range(k)))


def cpu_s(call: Callable[[], Any]) -> float:
    start_s = time.process_time()
    call()
    return time.process_time() - start_s


def with_scikit_learn(scored: Scored, n_boot: int) -> None:
    """The plain loop: draw patients, write their records down, call roc_auc_score for every label."""
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    order = np.argsort(scored.patient_N, kind="stable")
    start_P = np.searchsorted(scored.patient_N[order], np.arange(scored.n_patients + 1))
    for _ in range(n_boot):
        drawn = rng.integers(0, scored.n_patients, scored.n_patients)
        rows = np.concatenate([order[start_P[p] : start_P[p + 1]] for p in drawn])
        for truth_N, value_N in zip(scored.truth_NK[rows].T, scored.value_NK[rows].T, strict=True):
            if 0 < truth_N.sum() < len(truth_N):
                roc_auc_score(truth_N, value_N)


def main() -> None:
    parser = argparse.ArgumentParser(description="Bootstrap over patients.")
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--labels", type=int, default=71)
    parser.add_argument("--resamples", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=3, help="of AUROC; everything else runs once")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    n, k, n_boot = given.records, given.labels, given.resamples
    scored, other = made(n, k, shift=1.3, seed=1), made(n, k, shift=1.2, seed=2)
    balanced = made(n, k, shift=1.3, seed=3, prevalence=np.full(k, 0.5))
    tied = scored.replaced(value_NK=np.round(scored.value_NK, 2))
    decided = fixed_thresholds(scored.labels, 0.3).decide(scored)
    sex_N = ["F" if patient % 2 else "M" for patient in scored.patient_N]

    def interval(metric: Metric, data: Scored) -> Callable[[], Any]:
        return lambda: estimate(metric, data, n_boot=n_boot)

    print(f"{n} records of {scored.n_patients} patients x {k} labels, {n_boot} resamples, one thread, CPU seconds")
    auroc_s = sorted(cpu_s(interval(AUROC, scored)) for _ in range(given.rounds))
    rows = {"AUROC, macro, weighted and per label": auroc_s[len(auroc_s) // 2]}
    print(f"{rows['AUROC, macro, weighted and per label']:8.2f}  AUROC, macro, weighted and per label (median of "
          f"{given.rounds}: {auroc_s[0]:.2f} to {auroc_s[-1]:.2f})")  # fmt: skip
    ways: dict[str, Callable[[], Any]] = {
        "AUROC, scores rounded to 1/100 (ties)": interval(AUROC, tied),
        "AUROC, every label at 50% prevalence (the slowest case)": interval(AUROC, balanced),
        "average precision": interval(AVERAGE_PRECISION, scored),
        "in-sample sensitivity at specificity 0.9": interval(in_sample_sensitivity_at(0.9), scored),
        "F1, macro, micro, weighted and per label": interval(F1, decided),
        "auc_hard": interval(AUC_HARD, decided),
        "sensitivity": interval(SENSITIVITY, decided),
        "Hamming loss": interval(HAMMING_LOSS, decided),
        "accuracy (exact)": interval(ACCURACY, decided),
        "Brier score": interval(BRIER, scored),
        "ECE, 15 bins of equal width": interval(ece(), scored),
        "ECE, 15 bins of equal mass": interval(ece(kind="mass"), scored),
        "AUROC of two models, paired": lambda: compare(AUROC, {"a": scored, "b": other}, n_boot=n_boot),
        "AUROC of two sexes and their difference": lambda: by_group(AUROC, scored, sex_N, n_boot=n_boot),
        "DeLong's interval of every label": lambda: [delong_auroc(scored, label) for label in scored.labels],
        "temperature and Platt scaling of every label": lambda: (fit_temperature(scored, shared=False),
                                                                 fit_platt(scored)),
    }  # fmt: skip
    for name, way in ways.items():
        rows[name] = cpu_s(way)
        print(f"{rows[name]:8.2f}  {name}")
    few = 2
    rows["scikit-learn, extrapolated"] = cpu_s(lambda: with_scikit_learn(scored, few)) / few * n_boot
    print(f"{rows['scikit-learn, extrapolated']:8.0f}  AUROC, a plain scikit-learn loop ({few} resamples, multiplied)")
    met = auroc_s[len(auroc_s) // 2] < TARGET_S
    print(f"{'met   ' if met else 'MISSED'}  AUROC: {auroc_s[len(auroc_s) // 2]:.2f} s, wanted under {TARGET_S:g}")
    save(given.json, {"records": n, "labels": k, "resamples": n_boot, "cpu_s": rows, "auroc_s": auroc_s, "met": met})


if __name__ == "__main__":
    with threadpool_limits(1):
        main()
