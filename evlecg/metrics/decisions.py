"""Answers of yes or no: thresholds chosen on validation, and what is counted once they are applied.

A threshold that is chosen and reported on the same records flatters. So thresholds are chosen by one function, applied
by another, which refuses the data they were chosen on; what does both at once says `in_sample` in its name.

Shape legend: N records, K labels, P patients, R resamples, F sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import sparse

from evlecg.errors import EvlecgError
from evlecg.metrics.estimates import MACRO, WEIGHTED, Metric, plain
from evlecg.metrics.resampling import Statistic, Values, ratio
from evlecg.metrics.scored import Scored

# -- thresholds --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thresholds:
    """Where a score becomes a decision: positive at or above the threshold.

    Attributes:
        rule: how they were chosen, for a report.
        values: label -> threshold; None where it could not be chosen; infinity flags nothing.
        undefined_because: label -> why there is none.
        n, n_pos: label -> records and positive ones that they were chosen on.
        chosen_on: fingerprint of those data; empty for thresholds given from outside.
    """

    rule: str
    values: Mapping[str, float | None]
    undefined_because: Mapping[str, str]
    n: Mapping[str, int]
    n_pos: Mapping[str, int]
    chosen_on: str = ""

    def decide(self, test: Scored) -> Scored:
        """Decisions (1 or 0) on other data; a label without a threshold is left out with the reason.

        Raises:
            EvlecgError: the thresholds were chosen on these very data, or a label is unknown to them.
        """
        if self.chosen_on and self.chosen_on == test.fingerprint:
            raise EvlecgError("thresholds were chosen on the very data that they would be reported on",
                              where=self.rule, hint="choose them on validation, or say decide_in_sample")  # fmt: skip
        return self.decide_in_sample(test)

    def decide_in_sample(self, scored: Scored) -> Scored:
        """The same without that check: for the very data the thresholds were chosen on; the numbers flatter."""
        unknown = [label for label in scored.labels if label not in self.values]
        if unknown:
            raise EvlecgError(f"no threshold was chosen for {', '.join(unknown)}", where=self.rule,
                              hint="choose thresholds with the same labels")  # fmt: skip
        found = [self.values[label] for label in scored.labels]
        threshold_K = np.array([np.inf if value is None else value for value in found])
        without = {label: f"no threshold: {self.undefined_because.get(label, 'none was given')}"
                   for label, value in zip(scored.labels, found, strict=True) if value is None}  # fmt: skip
        decision_NK = (scored.value_NK >= threshold_K) & (threshold_K < np.inf)
        return scored.replaced(value_NK=decision_NK.astype(np.float64), left_out=without)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values under the attributes' names; an infinite threshold is the text "none flagged"."""
        values = {k: "none flagged" if v is not None and np.isinf(v) else v for k, v in self.values.items()}
        return plain({**asdict(self), "values": values})


def thresholds_at_specificity(validation: Scored, specificity: float) -> Thresholds:
    """Per label the lowest score at which this share of the negative records, or more, lies below.

    That is the most sensitive threshold with this specificity on validation; on other data both are what they are.
    """
    _check_share(specificity)
    return _chosen(
        validation, f"highest sensitivity with a specificity of at least {specificity:g} on validation", (0,),
        lambda true, false: np.flatnonzero(false[-1] - false >= _least(specificity, false[-1]))[-1],
    )  # fmt: skip


def thresholds_at_sensitivity(validation: Scored, sensitivity: float) -> Thresholds:
    """Per label the highest score that this share of the positive records, or more, reach."""
    _check_share(sensitivity)
    return _chosen(
        validation, f"highest specificity with a sensitivity of at least {sensitivity:g} on validation", (1,),
        lambda true, false: np.flatnonzero(true >= _least(sensitivity, true[-1]))[0],
    )  # fmt: skip


def thresholds_for_f1(validation: Scored) -> Thresholds:
    """Per label the threshold of the highest F1; of several, the highest threshold."""
    return _chosen(validation, "highest F1 on validation", (1,),
                   lambda true, false: np.argmax(2 * true / (true + false + true[-1])))  # fmt: skip


def thresholds_for_youden(validation: Scored) -> Thresholds:
    """Per label the threshold of the highest sensitivity + specificity - 1 (Youden 1950); of several, the highest."""
    return _chosen(validation, "highest sensitivity + specificity - 1 (Youden's J) on validation", (0, 1),
                   lambda true, false: np.argmax(true * false[-1] - false * true[-1]))  # fmt: skip


def fixed_thresholds(labels: Sequence[str], value: float = 0.5) -> Thresholds:
    """One threshold for all labels that no data chose."""
    none = dict.fromkeys(labels, 0)
    return Thresholds(f"fixed at {value:g}", dict.fromkeys(labels, float(value)), {}, none, none)


def _chosen(
    validation: Scored, rule: str, sides: tuple[int, ...], pick: Callable[[np.ndarray, np.ndarray], np.intp]
) -> Thresholds:
    """`pick` gets positives and negatives at or above each candidate, from infinity (nothing) down to the lowest."""
    values: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    n, n_pos = {}, {}
    for k, label in enumerate(validation.labels):
        truth_N = validation.truth_NK[:, k]
        assessed_N = validation.assessed_NK[:, k]
        n[label], n_pos[label] = int(assessed_N.sum()), int((truth_N == 1).sum())
        missing = [name for side, name in ((0, "negative"), (1, "positive"))
                   if side in sides and not (truth_N == side).any()]  # fmt: skip
        if missing:
            values[label] = None
            reasons[label] = validation.left_out.get(label, f"validation has no {' and no '.join(missing)} record")
            continue
        levels, level_N = np.unique(validation.value_NK[assessed_N, k], return_inverse=True)
        true, false = (
            np.cumsum(np.append(0, np.bincount(level_N[truth_N[assessed_N] == side], minlength=len(levels))[::-1]))
            for side in (1, 0)
        )
        values[label] = float(np.append(np.inf, levels[::-1])[pick(true, false)])
    return Thresholds(rule, values, reasons, n, n_pos, validation.fingerprint)


def _least(share: float, total: int) -> float:
    return np.ceil(share * total * (1 - 1e-12))  # 0.55 x 100 is 55.000000000000007


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"a share of {share} is not in (0, 1]")


# -- counts ------------------------------------------------------------------------------------------------------------


class PatientSums:
    """A statistic that is a function of sums over records: they are summed within patients once.

    Args:
        feature_NF: what is summed.
        formed: sums [F, R] -> values.
    """

    def __init__(self, scored: Scored, feature_NF: np.ndarray, formed: Callable[[np.ndarray], Values]) -> None:
        self.counts_only = bool((feature_NF == np.round(feature_NF)).all())
        of_patient_PN = sparse.csr_matrix(
            (np.ones(len(feature_NF)), (scored.patient_N, np.arange(len(feature_NF)))),
            shape=(scored.n_patients, len(feature_NF)),
        )
        self.feature_FP = np.ascontiguousarray((of_patient_PN @ feature_NF).T)
        self.formed = formed

    def __call__(self, count_PR: np.ndarray) -> Values:
        feature_FP = self.feature_FP.astype(count_PR.dtype) if self.counts_only else self.feature_FP
        return self.formed((feature_FP @ count_PR).astype(np.float64))


def _confusion(name: str, formed: Callable[..., Values]) -> Callable[[Scored], Statistic]:
    """Binds a function of true and false positives, false and true negatives, [K, R] each."""

    def bind(scored: Scored) -> Statistic:
        scored.check_decisions(name)
        cells = [
            (scored.truth_NK == truth) & (scored.value_NK == decision)
            for truth, decision in ((1, 1), (0, 1), (1, 0), (0, 0))
        ]
        return PatientSums(
            scored,
            np.concatenate(cells, axis=1).astype(np.float64),
            lambda sum_FR: formed(*sum_FR.reshape(4, len(scored.labels), -1)),
        )

    return bind


def f1(*, empty: float | None = None) -> Metric:
    """F1 of decisions.

    Args:
        empty: value of a label that is neither in the truths nor in the answers: None leaves it out of the means;
            0.0 is what scikit-learn, and hence published figures, take.
    """

    def formed(tp_KR: np.ndarray, fp_KR: np.ndarray, fn_KR: np.ndarray, tn_KR: np.ndarray) -> Values:
        value_KR = ratio(2 * tp_KR, 2 * tp_KR + fp_KR + fn_KR)
        if empty is not None:
            value_KR = np.where((tp_KR + fp_KR + fn_KR == 0) & (tn_KR > 0), empty, value_KR)
        tp_R, fp_R, fn_R = tp_KR.sum(axis=0), fp_KR.sum(axis=0), fn_KR.sum(axis=0)
        return Values(value_KR.T, (tp_KR + fn_KR).T, {"micro": ratio(2 * tp_R, 2 * tp_R + fp_R + fn_R)})

    return Metric(
        name="f1" if empty is None else "f1_empty_is_zero",
        formula="2 TP / (2 TP + FP + FN)"
        + ("" if empty is None else f"; {empty:g} where the label is neither in the truths nor in the answers"),
        overall={"macro": MACRO, "micro": "2 TP / (2 TP + FP + FN) of the counts summed over labels",
                 "weighted": WEIGHTED},
        bind=_confusion("F1", formed),
        otherwise_undefined="neither a truth nor an answer is positive",
    )  # fmt: skip


def _auc_hard(tp_KR: np.ndarray, fp_KR: np.ndarray, fn_KR: np.ndarray, tn_KR: np.ndarray) -> Values:
    return Values(((ratio(tp_KR, tp_KR + fn_KR) + ratio(tn_KR, tn_KR + fp_KR)) / 2).T)


def _sensitivity(tp_KR: np.ndarray, fp_KR: np.ndarray, fn_KR: np.ndarray, tn_KR: np.ndarray) -> Values:
    pooled_R = ratio(tp_KR.sum(axis=0), (tp_KR + fn_KR).sum(axis=0))
    return Values(ratio(tp_KR, tp_KR + fn_KR).T, None, {"micro": pooled_R})


def _specificity(tp_KR: np.ndarray, fp_KR: np.ndarray, fn_KR: np.ndarray, tn_KR: np.ndarray) -> Values:
    return _sensitivity(tn_KR, fn_KR, fp_KR, tp_KR)


def _precision(tp_KR: np.ndarray, fp_KR: np.ndarray, fn_KR: np.ndarray, tn_KR: np.ndarray) -> Values:
    return _sensitivity(tp_KR, fn_KR, fp_KR, tn_KR)


def _hamming(tp_KR: np.ndarray, fp_KR: np.ndarray, fn_KR: np.ndarray, tn_KR: np.ndarray) -> Values:
    wrong_KR, all_KR = fp_KR + fn_KR, tp_KR + fp_KR + fn_KR + tn_KR
    return Values(ratio(wrong_KR, all_KR).T, None, {"micro": ratio(wrong_KR.sum(axis=0), all_KR.sum(axis=0))})


def _exact(scored: Scored) -> Statistic:
    correct_N = exact_answers(scored)
    answered_N = ~np.isnan(correct_N)
    return PatientSums(
        scored,
        np.stack([np.where(answered_N, correct_N, 0), answered_N], axis=1).astype(np.float64),
        lambda sum_FR: Values(np.empty((sum_FR.shape[1], 0)), None, {"exact": ratio(sum_FR[0], sum_FR[1])}),
    )


def exact_answers(scored: Scored) -> np.ndarray:
    """Of every record, whether all its assessed labels were decided right: 1, 0, or NaN where none was assessed.

    Raises:
        EvlecgError: the values are not decisions.
    """
    scored.check_decisions("accuracy")
    wrong_N = ((scored.value_NK != scored.truth_NK) & scored.assessed_NK).any(axis=1)
    return np.where(scored.assessed_NK.any(axis=1), (~wrong_N).astype(np.float64), np.nan)


F1 = f1()

AUC_HARD = Metric(
    name="auc_hard",
    formula="roc_auc_score of 0/1 answers = (sensitivity + specificity) / 2, as ECGBench prints under AUC; not to be "
    "compared with an AUROC of probabilities",
    overall={"macro": "unweighted mean over the labels with both classes; a label absent from the truths is dropped"},
    bind=_confusion("auc_hard", _auc_hard),
    sides=(1, 0),
)

SENSITIVITY = Metric(
    name="sensitivity", formula="TP / (TP + FN)",
    overall={"macro": MACRO, "micro": "TP / (TP + FN) of the counts summed over labels"},
    bind=_confusion("sensitivity", _sensitivity), sides=(1,), otherwise_undefined="no truth is positive",
)  # fmt: skip

SPECIFICITY = Metric(
    name="specificity", formula="TN / (TN + FP)",
    overall={"macro": MACRO, "micro": "TN / (TN + FP) of the counts summed over labels"},
    bind=_confusion("specificity", _specificity), sides=(0,), otherwise_undefined="no truth is negative",
)  # fmt: skip

PRECISION = Metric(
    name="precision", formula="TP / (TP + FP)",
    overall={"macro": MACRO, "micro": "TP / (TP + FP) of the counts summed over labels"},
    bind=_confusion("precision", _precision), otherwise_undefined="no answer is positive",
)  # fmt: skip

HAMMING_LOSS = Metric(
    name="hamming_loss", formula="wrong decisions / decisions",
    overall={"micro": "wrong decisions / decisions, over all records and labels that were assessed"},
    bind=_confusion("Hamming loss", _hamming), higher_is_better=False,
)  # fmt: skip

ACCURACY = Metric(
    name="accuracy", formula="right answers / answers",
    overall={"exact": "records answered exactly right (every assessed label as in the truth, or the one right choice) "
             "/ records; also called clinical accuracy"},
    bind=_exact,
)  # fmt: skip
