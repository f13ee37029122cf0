"""A metric applied to data: every label and every mean over labels, each with its counts, interval and formula.

A value that is undefined is None, never 0.5: it is out of every mean, and `undefined_because` says why. A value without
an interval, or with one that says little, carries a `caveat`.

Shape legend: N records, K labels, P patients, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from evlecg.metrics.resampling import (
    N_BOOT,
    Statistic,
    Values,
    mean_over_labels,
    observed,
    percentile_interval,
    reflected_interval,
    resampled,
)
from evlecg.metrics.scored import Scored

MACRO = "unweighted mean over the labels that have a value"
WEIGHTED = "mean over the labels that have a value, each weighted by its positive records"
LEAST_PATIENTS = 2  # on each side that a metric needs: with one, resampling cannot show what another would have changed


@dataclass(frozen=True)
class Metric:
    """What is computed, and the words for it.

    Attributes:
        name: its key in JSON.
        formula: of one label, as a report prints it.
        overall: key -> formula of the numbers over all labels; the first is the headline.
        bind: prepares it for data (may raise EvlecgError where the data are not what it reads).
        sides: classes of records (1, 0) without which a label has no value.
        otherwise_undefined: why a label that has those may still have none.
        higher_is_better: direction.
        reflected: intervals are mirrored at the value (`reflected_interval`).
        in_sample: an operating point is chosen on the very records that it is reported on.
    """

    name: str
    formula: str
    overall: Mapping[str, str]
    bind: Callable[[Scored], Statistic]
    sides: tuple[int, ...] = ()
    otherwise_undefined: str = ""
    higher_is_better: bool = True
    reflected: bool = False
    in_sample: bool = False

    @property
    def headline(self) -> str:
        return next(iter(self.overall))


@dataclass(frozen=True)
class Estimate:
    """A number with its evidence.

    Attributes:
        value: None where undefined.
        ci95: None where `value` is, and where fewer than two patients stand on a side that the metric needs.
        n: records assessed.
        n_pos: positive ones (cells over the labels, where several enter); None where truths have no sides.
        n_patients: patients among the n.
        n_labels: labels that enter the value.
        method: formula of the value.
        interval_method: how the interval came about.
        undefined_because: why there is no value; None where there is one.
        caveat: why there is no interval or why it says little; None where nothing is to be said.
    """

    value: float | None
    ci95: tuple[float, float] | None
    n: int
    n_pos: int | None
    n_patients: int
    n_labels: int
    method: str
    interval_method: str
    undefined_because: str | None = None
    caveat: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values under the attributes' names."""
        return plain(asdict(self))


@dataclass(frozen=True)
class Estimates:
    """One metric on one model's answers.

    Attributes:
        overall: "macro", "weighted", "micro", ... as the metric offers.
        labels: of every column; empty where the metric has no value for a single label.
        label_groups: macro over named sets of labels.
    """

    metric: str
    overall: Mapping[str, Estimate]
    labels: Mapping[str, Estimate]
    label_groups: Mapping[str, Estimate]

    @property
    def headline(self) -> Estimate:
        """The first of `overall`."""
        return next(iter(self.overall.values()))

    @property
    def undefined(self) -> dict[str, str]:
        """Label -> why it has no value."""
        return {name: label.undefined_because for name, label in self.labels.items() if label.undefined_because}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `method` and `interval_method` of the labels, all alike, stand once."""
        some = next(iter(self.labels.values()), self.headline)
        return {
            "metric": self.metric,
            "method": some.method,
            "interval_method": some.interval_method,
            "overall": {name: estimate.to_dict() for name, estimate in self.overall.items()},
            "labels": {name: without_words(estimate.to_dict()) for name, estimate in self.labels.items()},
            "label_groups": {name: estimate.to_dict() for name, estimate in self.label_groups.items()},
        }


def estimate(
    metric: Metric,
    scored: Scored,
    *,
    label_groups: Mapping[str, Sequence[str]] | None = None,
    n_boot: int = N_BOOT,
    seed: int = 0,
) -> Estimates:
    """A metric with 95% intervals by bootstrap over patients.

    Args:
        label_groups: name -> labels; gives the macro over each set. Labels that the data do not have are passed over,
            and the group's `method` says which entered.
        n_boot: resamples; 0 leaves the intervals out.
        seed: fixes the resamples.

    Raises:
        EvlecgError: the metric reads decisions or probabilities, and the values are others.
    """
    statistic = metric.bind(scored)
    point = observed(statistic, scored.n_patients)
    drawn = None
    if n_boot and scored.n_patients:
        drawn = resampled(
            {"": statistic}, scored.n_patients, scored.most_records_of_a_patient, n_boot=n_boot, seed=seed
        )[""]
    return summarised(metric, scored, point, drawn, label_groups or {}, n_boot=n_boot, seed=seed)


def bootstrap_text(n_boot: int, seed: int, *, reflected: bool = False) -> str:
    """The words for how an interval came about."""
    if not n_boot:
        return "no interval was asked for"
    return (
        f"95% interval = 2.5th to 97.5th percentile over {n_boot} resamples of the patients with replacement (seed "
        f"{seed}), all records of a patient together"
        + (", mirrored at the value (basic bootstrap), since noise only adds to it" if reflected else "")
        + "; a label without a value in a resample is left out of that resample"
    )


def summarised(
    metric: Metric,
    scored: Scored,
    point: Values,
    drawn: Values | None,
    label_groups: Mapping[str, Sequence[str]],
    *,
    n_boot: int,
    seed: int,
    refused: str | None = None,
) -> Estimates:
    """Values and their resamples -> numbers with evidence.

    Args:
        drawn: None where no interval is wanted.
        refused: why nothing may have a value, whatever `point` says; counts are given all the same.
    """
    how = bootstrap_text(n_boot, seed, reflected=metric.reflected)
    support = Support(scored, metric)

    def made(value_1: np.ndarray, value_R: np.ndarray | None, labels: list[int], method: str, reason: str) -> Estimate:
        value = float(value_1[0])
        defined = refused is None and not np.isnan(value)
        ci95, caveat = None, None
        if defined and value_R is not None:
            if not any(support.firm_K[k] for k in labels):
                caveat = support.too_few
            else:
                ci95 = reflected_interval(value, value_R) if metric.reflected else percentile_interval(value_R)
                caveat = _degenerate(value_R)
        rows_N = scored.rows_with(labels)
        return Estimate(
            value if defined else None, ci95, int(rows_N.sum()), scored.n_pos_in(labels),
            scored.n_patients_among(rows_N), len(labels), method, how, None if defined else refused or reason, caveat,
        )  # fmt: skip

    def over(labels: list[int], method: str, kind: str, reason: str) -> Estimate:
        entering = [k for k in labels if not np.isnan(point.label_RK[0, k])]
        mean = [
            None if values is None else mean_over_labels(
                values.label_RK[:, labels],
                values.positive_RK[:, labels] if kind == "weighted" and values.positive_RK is not None else None,
            )
            for values in (point, drawn)
        ]  # fmt: skip
        assert mean[0] is not None
        return made(mean[0], mean[1], entering, method, reason)

    everywhere = list(range(len(scored.labels)))
    overall = {}
    for kind, method in metric.overall.items():
        if kind in point.pooled:
            assessed = [k for k in everywhere if scored.assessed_NK[:, k].any()]
            overall[kind] = made(
                point.pooled[kind], None if drawn is None else drawn.pooled[kind], assessed, method,
                metric.otherwise_undefined if assessed and metric.otherwise_undefined else "no record was assessed",
            )  # fmt: skip
        else:
            overall[kind] = over(everywhere, f"{method}; of one label: {metric.formula}", kind,
                                 "no label has a value")  # fmt: skip
    labels = {}
    if point.label_RK.shape[1]:
        for k, name in enumerate(scored.labels):
            value_R = None if drawn is None else drawn.label_RK[:, k]
            labels[name] = made(point.label_RK[:, k], value_R, [k], metric.formula, support.reason(k))
    groups = {}
    for name, members in label_groups.items() if labels else ():
        present = [k for k, label in enumerate(scored.labels) if label in set(members)]
        entering = [scored.labels[k] for k in present if not np.isnan(point.label_RK[0, k])]
        method = f"unweighted mean over {', '.join(entering) or 'no label'}; of one label: {metric.formula}"
        reason = "no label of the group has a value" if present else "the data have no label of the group"
        groups[name] = over(present, method, "macro", reason)
    return Estimates(metric.name, overall, labels, groups)


class Support:
    """How many records and patients stand behind each label of a metric."""

    def __init__(self, scored: Scored, metric: Metric) -> None:
        self.scored, self.metric = scored, metric
        self.n_K = scored.assessed_NK.sum(axis=0)
        self.pos_K = (scored.truth_NK == 1).sum(axis=0)
        sides = [scored.truth_NK == side for side in metric.sides] or [scored.assessed_NK]
        self.firm_K = np.array(
            [all(scored.n_patients_among(rows_NK[:, k]) >= LEAST_PATIENTS for rows_NK in sides)
             for k in range(len(scored.labels))], dtype=bool,
        )  # fmt: skip

    @property
    def too_few(self) -> str:
        where = {(1,): " with a positive record", (0,): " with a negative record", (): ""}.get(
            self.metric.sides, " on one side"
        )
        return f"no interval: fewer than {LEAST_PATIENTS} patients{where}"

    def reason(self, k: int) -> str:
        """Why label k has no value, where it has none."""
        if self.scored.labels[k] in self.scored.left_out:
            return self.scored.left_out[self.scored.labels[k]]
        n, n_pos = int(self.n_K[k]), int(self.pos_K[k])
        if not n:
            return "no record was assessed"
        if 1 in self.metric.sides and not n_pos:
            return f"all {n} records are negative"
        if 0 in self.metric.sides and n_pos == n:
            return f"all {n} records are positive"
        return self.metric.otherwise_undefined


def _degenerate(value_R: np.ndarray) -> str | None:
    value_R = value_R[~np.isnan(value_R)]
    if len(value_R) and value_R.min() == value_R.max():
        return "every resample gives the same value: the interval cannot show what other patients would change"
    return None


def without_words(values: dict[str, Any]) -> dict[str, Any]:
    """Without `method` and `interval_method`: for many labels that share them."""
    return {key: value for key, value in values.items() if not key.endswith("method")}


def plain(tree: Any) -> Any:
    """Mappings, sequences and numbers as what `json` writes: tuples become lists, mappings dicts."""
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return [plain(value) for value in tree]
    return tree
