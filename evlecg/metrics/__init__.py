"""Scores and truths in, numbers with counts, intervals and formulas out.

    scored = Scored(score_NK, truth_NK, patient_ids, labels)      # NaN truths: not assessed
    estimate(AUROC, scored).headline                              # macro, with its interval over patients
    decided = thresholds_at_specificity(validation, 0.9).decide(scored)
    compare(AUROC, {"student": a, "SFT-only": b}).pairs[0].labels["AF"].p_holm
    by_group(AUROC, scored, sex_N).differences

A `Metric` is a value; `estimate`, `compare` and `by_group` take any of them. They are AUROC, AVERAGE_PRECISION and
in_sample_sensitivity_at / in_sample_specificity_at (of scores); AUC_HARD, F1 (`f1`), SENSITIVITY, SPECIFICITY,
PRECISION, HAMMING_LOSS and ACCURACY (of decisions); BRIER, `brier_term` and `ece` (of probabilities).
"""

from evlecg.metrics.calibration import (
    BRIER,
    Calibration,
    EceIfCalibrated,
    ReliabilityBin,
    ReliabilityCurve,
    brier_term,
    ece,
    ece_if_calibrated,
    fit_platt,
    fit_temperature,
    reliability_curve,
)
from evlecg.metrics.compare import (
    Comparison,
    Difference,
    McNemar,
    OverSeeds,
    Pair,
    SeedTest,
    compare,
    holm,
    mcnemar,
    over_seeds,
    seed_test,
)
from evlecg.metrics.decisions import (
    ACCURACY,
    AUC_HARD,
    F1,
    HAMMING_LOSS,
    PRECISION,
    SENSITIVITY,
    SPECIFICITY,
    Thresholds,
    exact_answers,
    f1,
    fixed_thresholds,
    thresholds_at_sensitivity,
    thresholds_at_specificity,
    thresholds_for_f1,
    thresholds_for_youden,
)
from evlecg.metrics.estimates import Estimate, Estimates, Metric, estimate
from evlecg.metrics.ranking import (
    AUROC,
    AVERAGE_PRECISION,
    Curve,
    DeLong,
    DeLongTest,
    delong,
    delong_auroc,
    delong_test,
    in_sample_sensitivity_at,
    in_sample_specificity_at,
    precision_recall_curve,
    roc_curve,
)
from evlecg.metrics.resampling import N_BOOT
from evlecg.metrics.runs import Gain, RunsComparison, compare_runs
from evlecg.metrics.scored import Scored
from evlecg.metrics.subgroups import GroupTable, by_group

__all__ = [
    "ACCURACY",
    "AUC_HARD",
    "AUROC",
    "AVERAGE_PRECISION",
    "BRIER",
    "F1",
    "HAMMING_LOSS",
    "N_BOOT",
    "PRECISION",
    "SENSITIVITY",
    "SPECIFICITY",
    "Calibration",
    "Comparison",
    "Curve",
    "DeLong",
    "DeLongTest",
    "Difference",
    "EceIfCalibrated",
    "Estimate",
    "Estimates",
    "Gain",
    "GroupTable",
    "McNemar",
    "Metric",
    "OverSeeds",
    "Pair",
    "ReliabilityBin",
    "ReliabilityCurve",
    "RunsComparison",
    "Scored",
    "SeedTest",
    "Thresholds",
    "brier_term",
    "by_group",
    "compare",
    "compare_runs",
    "delong",
    "delong_auroc",
    "delong_test",
    "ece",
    "ece_if_calibrated",
    "estimate",
    "exact_answers",
    "f1",
    "fit_platt",
    "fit_temperature",
    "fixed_thresholds",
    "holm",
    "in_sample_sensitivity_at",
    "in_sample_specificity_at",
    "mcnemar",
    "over_seeds",
    "precision_recall_curve",
    "reliability_curve",
    "roc_curve",
    "seed_test",
    "thresholds_at_sensitivity",
    "thresholds_at_specificity",
    "thresholds_for_f1",
    "thresholds_for_youden",
]
