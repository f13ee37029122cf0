"""Macro and per-label AUROC in the few fields that report.json has today, made of the numbers of this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evlecg.metrics.compare import Difference, compare
from evlecg.metrics.estimates import estimate
from evlecg.metrics.ranking import AUROC
from evlecg.metrics.resampling import N_BOOT
from evlecg.metrics.scored import Scored


@dataclass(frozen=True)
class MacroAuc:
    """A number and the 95% interval of its bootstrap over patients; None where undefined."""

    value: float | None
    ci95: tuple[float, float] | None


@dataclass(frozen=True)
class LabelAuc:
    """The AUC of one label; `ci95` is None where fewer than two patients stand on one side."""

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

    macro: MacroAuc
    labels: tuple[LabelAuc, ...]
    n_boot: int
    seed: int


def bootstrap_auc(
    score_NK: np.ndarray, truth_NK: np.ndarray, patient_ids: Sequence[str], *, n_boot: int = N_BOOT, seed: int = 0
) -> AucResult:
    """Macro and per-label AUC with 95% percentile intervals over resamples of patients.

    Raises:
        EvlecgError: the score of an assessed label is NaN.
    """
    found = estimate(AUROC, _columns(score_NK, truth_NK, patient_ids), n_boot=n_boot, seed=seed)
    return AucResult(
        MacroAuc(found.headline.value, found.headline.ci95),
        tuple(
            LabelAuc(label.value, label.ci95, label.n_pos or 0, label.n - (label.n_pos or 0))
            for label in found.labels.values()
        ),
        n_boot,
        seed,
    )


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

    Raises:
        EvlecgError: the score of an assessed label is NaN.
    """
    models = {
        name: _columns(score_NK, truth_NK, patient_ids) for name, score_NK in (("a", score_a_NK), ("b", score_b_NK))
    }
    return compare(AUROC, models, n_boot=n_boot, seed=seed).pairs[0].headline


def _columns(score_NK: np.ndarray, truth_NK: np.ndarray, patient_ids: Sequence[str]) -> Scored:
    return Scored(score_NK, truth_NK, patient_ids, tuple(f"column {k}" for k in range(np.shape(truth_NK)[1])))
