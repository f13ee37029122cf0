"""One model's scores on one split -> every number of its report.

    measured = measure(test, validation, groups={"sex": sex_N}, label_groups={"ST/T": ("STD", "STE")})
    measured.auroc.headline, measured.decided["youden"].metrics["auc_hard"], measured.subgroups["sex"]

Thresholds and temperature come from validation or are not there: nothing is chosen on the records that are reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evlecg.metrics import (
    ACCURACY,
    AUC_HARD,
    AUROC,
    AVERAGE_PRECISION,
    BRIER,
    F1,
    HAMMING_LOSS,
    N_BOOT,
    SENSITIVITY,
    SPECIFICITY,
    Calibration,
    Curve,
    EceIfCalibrated,
    Estimate,
    Estimates,
    GroupTable,
    Metric,
    ReliabilityCurve,
    Scored,
    Thresholds,
    by_group,
    delong_auroc,
    ece,
    ece_if_calibrated,
    estimate,
    fit_temperature,
    fixed_thresholds,
    reliability_curve,
    roc_curve,
    thresholds_at_specificity,
    thresholds_for_f1,
    thresholds_for_youden,
)

ANSWERED = 0.5  # of the normalised likelihood of yes: what the model would answer
FIXED_SPECIFICITY = 0.9
DECISIONS = (AUC_HARD, F1, SENSITIVITY, SPECIFICITY, HAMMING_LOSS, ACCURACY)
ECE = ece()
ECE_DRAWS = 300  # p below 0.05 needs no more, and there is one for every label
CURVES_WITH_INTERVALS = 9  # labels; with more, an interval for every bin of each would cost more than all else

# key of `decisions` -> how thresholds are chosen on validation
RULES: dict[str, Callable[[Scored], Thresholds]] = {
    "youden": thresholds_for_youden,
    "f1": thresholds_for_f1,
    f"specificity_{FIXED_SPECIFICITY:g}": lambda validation: thresholds_at_specificity(validation, FIXED_SPECIFICITY),
}
AS_ANSWERED = "as_answered"


@dataclass(frozen=True)
class Decided:
    """Decisions by one rule, counted."""

    thresholds: Thresholds
    metrics: Mapping[str, Estimates]

    def to_dict(self) -> dict[str, Any]:
        return {
            "thresholds": self.thresholds.to_dict(),
            **{name: found.to_dict() for name, found in self.metrics.items()},
        }


@dataclass(frozen=True)
class Calibrated:
    """Whether scores are probabilities.

    Attributes:
        brier, ece: of the scores as they are.
        ece_if_calibrated: label -> the ECE that exactly right scores would show.
        curves: label -> reliability curve.
        temperature: fitted on validation; None without one.
        brier_after, ece_after: with it.
    """

    brier: Estimates
    ece: Estimates
    ece_if_calibrated: Mapping[str, EceIfCalibrated]
    curves: Mapping[str, ReliabilityCurve]
    temperature: Calibration | None = None
    brier_after: Estimates | None = None
    ece_after: Estimates | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "brier": self.brier.to_dict(),
            "ece": self.ece.to_dict(),
            "ece_if_calibrated": {label: found.to_dict() for label, found in self.ece_if_calibrated.items()},
            "reliability": {label: curve.to_dict() for label, curve in self.curves.items()},
            "temperature": self.temperature.to_dict() if self.temperature else None,
            "brier_after_temperature": self.brier_after.to_dict() if self.brier_after else None,
            "ece_after_temperature": self.ece_after.to_dict() if self.ece_after else None,
        }


@dataclass(frozen=True)
class Measured:
    """The numbers of a report.

    Attributes:
        auroc, average_precision: over all labels, of every label, of groups of labels (AUROC).
        delong: label -> AUROC with DeLong's interval.
        decided: rule -> counts of decisions; `as_answered` (likelier answer) is always there, `RULES` with validation.
        calibrated: Brier score, calibration error, temperature.
        subgroups: what records are grouped by -> AUROC of every group.
        curves: label -> ROC curve.
        n_boot, seed: of every bootstrap.
        no_validation: why nothing was chosen on validation; empty where it was.
    """

    auroc: Estimates
    average_precision: Estimates
    delong: Mapping[str, Estimate]
    decided: Mapping[str, Decided]
    calibrated: Calibrated
    subgroups: Mapping[str, GroupTable]
    curves: Mapping[str, Curve]
    n_boot: int
    seed: int
    no_validation: str = ""

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.auroc.labels)

    def scores(self) -> dict[str, Estimate]:
        """What a gate can name beside AUROCs: numbers of decisions of which more is better."""
        found = {
            (name if rule == AS_ANSWERED else f"{rule}.{name}"): estimates.headline
            for rule, decided in self.decided.items()
            for name, estimates in decided.metrics.items()
            if name != HAMMING_LOSS.name
        }
        return {**found, AVERAGE_PRECISION.name: self.average_precision.headline}

    def metrics_dict(self) -> dict[str, Any]:
        """`metrics` of report.json, `auc` apart."""
        return {
            "auroc": self.auroc.to_dict(),
            "average_precision": self.average_precision.to_dict(),
            "delong": {label: found.to_dict() for label, found in self.delong.items()},
            "decisions": {rule: decided.to_dict() for rule, decided in self.decided.items()},
            "calibration": self.calibrated.to_dict(),
        }


def measure(
    scored: Scored,
    validation: Scored | None = None,
    *,
    groups: Mapping[str, Sequence[str | None]] | None = None,
    group_orders: Mapping[str, Sequence[str]] | None = None,
    label_groups: Mapping[str, Sequence[str]] | None = None,
    no_validation: str = "no validation scores were given",
    n_boot: int = N_BOOT,
    seed: int = 0,
) -> Measured:
    """Every number of a report.

    Args:
        scored: likelihoods on the records to report.
        validation: likelihoods on others, with the same labels; None: nothing is chosen or fitted.
        groups: what records are grouped by -> the group of every record of `scored`, None or "" where unknown.
        group_orders: the same keys -> groups in their order.
        label_groups: name -> labels that a macro AUROC is formed over.
        no_validation: why `validation` is None.

    Raises:
        EvlecgError: a score is not a probability, or `validation` is `scored`.
    """

    def found(metric: Metric, data: Scored) -> Estimates:
        return estimate(metric, data, n_boot=n_boot, seed=seed)

    def decided(thresholds: Thresholds) -> Decided:
        decisions = thresholds.decide(scored)
        return Decided(thresholds, {metric.name: found(metric, decisions) for metric in DECISIONS})

    decisions = {AS_ANSWERED: decided(fixed_thresholds(scored.labels, ANSWERED))}
    temperature = after = None
    if validation is not None:
        decisions |= {rule: decided(choose(validation)) for rule, choose in RULES.items()}
        temperature = fit_temperature(validation)
        after = temperature.apply(scored)
    curve_boot = n_boot if len(scored.labels) <= CURVES_WITH_INTERVALS else 0
    orders = group_orders or {}
    return Measured(
        auroc=estimate(AUROC, scored, label_groups=label_groups, n_boot=n_boot, seed=seed),
        average_precision=found(AVERAGE_PRECISION, scored),
        delong={label: delong_auroc(scored, label) for label in scored.labels},
        decided=decisions,
        calibrated=Calibrated(
            found(BRIER, scored),
            found(ECE, scored),
            {label: ece_if_calibrated(scored, label, n_draws=ECE_DRAWS, seed=seed) for label in scored.labels},
            {label: reliability_curve(scored, label, n_boot=curve_boot, seed=seed) for label in scored.labels},
            temperature,
            found(BRIER, after) if after else None,
            found(ECE, after) if after else None,
        ),
        subgroups={
            name: by_group(AUROC, scored, group_N, order=orders.get(name, ()), n_boot=n_boot, seed=seed)
            for name, group_N in (groups or {}).items()
        },
        curves={label: roc_curve(scored, label) for label in scored.labels},
        n_boot=n_boot,
        seed=seed,
        no_validation="" if validation is not None else no_validation,
    )


@dataclass(frozen=True)
class WorstRecord:
    """A record that was answered wrongly with confidence.

    Attributes:
        score, truth: of the label with the largest |score - truth| (of 0 and 1).
        others: further labels that were answered wrongly, with their scores.
        about: what is known of the record, for a reader.
        page_png: its drawn page; empty where none was drawn.
    """

    record_id: str
    label: str
    score: float
    truth: bool
    others: Mapping[str, float] = field(default_factory=dict)
    about: str = ""
    page_png: bytes = b""

    def to_dict(self) -> dict[str, Any]:
        return {"record_id": self.record_id, "label": self.label, "score": self.score, "truth": self.truth,
                "others": dict(self.others), "about": self.about}  # fmt: skip


def worst_records(scored: Scored, n: int) -> list[WorstRecord]:
    """The n records with the largest |score - truth| of any label, none that was answered rightly throughout."""
    error_NK = np.where(scored.assessed_NK, np.abs(scored.value_NK - scored.truth_NK), -1.0)
    if not error_NK.size:
        return []
    worst = []
    for row in np.argsort(-error_NK.max(axis=1), kind="stable")[:n]:
        k = int(error_NK[row].argmax())
        if error_NK[row, k] <= ANSWERED:
            break
        others = {scored.labels[j]: float(scored.value_NK[row, j])
                  for j in np.flatnonzero(error_NK[row] > ANSWERED) if j != k}  # fmt: skip
        worst.append(WorstRecord(str(scored.record_ids[row]), scored.labels[k], float(scored.value_NK[row, k]),
                                 bool(scored.truth_NK[row, k]), others))  # fmt: skip
    return worst
