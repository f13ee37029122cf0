"""Models against each other on the same records, and runs over seeds.

Everything compared sees the same resamples of the same patients, which removes what the two sides share (easy and hard
patients), so that an interval of a difference is narrower than the two sides' own intervals suggest.

Shape legend: N records, K labels, P patients, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from scipy import stats

from evlecg.errors import EvlecgError
from evlecg.metrics.decisions import exact_answers
from evlecg.metrics.estimates import Estimate, Estimates, Metric, bootstrap_text, plain, summarised, without_words
from evlecg.metrics.resampling import (
    N_BOOT,
    Values,
    mean_over_labels,
    observed,
    percentile_interval,
    resampled,
    two_sided_p,
)
from evlecg.metrics.scored import Scored, same_records

P_TEXT = "p = twice the smaller share of resamples on one side of 0, (1 + count) / (1 + resamples)"
HOLM_TEXT = "p_holm: Holm 1979"


@dataclass(frozen=True)
class Difference:
    """A minus B.

    Attributes:
        value: None where either side is undefined.
        ci95: percentile interval of the difference in resamples that both sides share.
        p: two-sided, not adjusted.
        p_holm: adjusted over the differences it was computed with (see `interval_method`); None where p is.
        n, n_pos, n_patients: records, positive ones and patients behind it, of A and B together.
        n_labels: labels that enter.
        method: formula of the values whose difference this is.
        interval_method: how interval and p came about.
        undefined_because: why there is no value, or no interval and p.
    """

    a: str
    b: str
    value: float | None
    ci95: tuple[float, float] | None
    p: float | None
    p_holm: float | None
    n: int
    n_pos: int | None
    n_patients: int
    n_labels: int
    method: str
    interval_method: str
    undefined_because: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values under the attributes' names."""
        return plain(asdict(self))


@dataclass(frozen=True)
class Pair:
    """Two models: differences of everything that `Estimates` holds, under the same keys.

    A mean over labels is compared over the labels that have a value for both models: with a label more or less it would
    be another number (AUROC has the same ones for both; F1 and precision need not).

    Attributes:
        contrasts: of every two label groups, the first's difference minus the second's: does A gain more there? `a` and
            `b` of a contrast are the two groups.
    """

    a: str
    b: str
    overall: Mapping[str, Difference]
    labels: Mapping[str, Difference]
    label_groups: Mapping[str, Difference]
    contrasts: Mapping[tuple[str, str], Difference]

    @property
    def headline(self) -> Difference:
        return next(iter(self.overall.values()))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the words of the labels are those of the headline."""
        return {
            "a": self.a,
            "b": self.b,
            "overall": {name: found.to_dict() for name, found in self.overall.items()},
            "labels": {name: without_words(found.to_dict()) for name, found in self.labels.items()},
            "label_groups": {name: found.to_dict() for name, found in self.label_groups.items()},
            "contrasts": [contrast.to_dict() for contrast in self.contrasts.values()],
        }


@dataclass(frozen=True)
class Comparison:
    """Models on the same records.

    Attributes:
        models: name -> its own numbers.
        pairs: differences; adjusted p over the pairs for each of `overall`, over pairs and names for the others.
    """

    metric: str
    models: Mapping[str, Estimates]
    pairs: tuple[Pair, ...]

    def pair(self, a: str, b: str) -> Pair:
        """The differences A minus B, in the order they were asked for."""
        return next(pair for pair in self.pairs if (pair.a, pair.b) == (a, b))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values under the attributes' names."""
        return {
            "metric": self.metric,
            "models": {name: estimates.to_dict() for name, estimates in self.models.items()},
            "pairs": [pair.to_dict() for pair in self.pairs],
        }


def compare(
    metric: Metric,
    models: Mapping[str, Scored],
    *,
    baseline: str | None = None,
    label_groups: Mapping[str, Sequence[str]] | None = None,
    n_boot: int = N_BOOT,
    seed: int = 0,
) -> Comparison:
    """Two or more models on the same records: each one's numbers, and paired differences with interval and p.

    Args:
        models: by name; the same records, truths and labels in the same order.
        baseline: every other model minus this one; None gives every pair, the earlier minus the later.
        label_groups: as in `estimate`.

    Raises:
        EvlecgError: the models were scored on different records, truths or labels.
    """
    if len(models) < 2:
        raise ValueError("a comparison needs two models or more")
    if baseline is not None and baseline not in models:
        raise EvlecgError(f"no model {baseline!r}", where="baseline", hint=f"one of {', '.join(models)}")
    same_records(models)
    groups = label_groups or {}
    first = next(iter(models.values()))
    statistics = {name: metric.bind(scored) for name, scored in models.items()}
    point = {name: observed(statistic, first.n_patients) for name, statistic in statistics.items()}
    drawn: dict[str, Values] | None = None
    if n_boot and first.n_patients:
        drawn = resampled(
            statistics, first.n_patients, first.most_records_of_a_patient, n_boot=n_boot, seed=seed
        )  # fmt: skip
    estimates = {
        name: summarised(
            metric, scored, point[name], None if drawn is None else drawn[name], groups, n_boot=n_boot, seed=seed
        )
        for name, scored in models.items()
    }
    wanted = (
        list(combinations(models, 2)) if baseline is None else [(name, baseline) for name in models if name != baseline]
    )
    pairs = [
        _pair(
            (a, b), models, estimates, (point[a], point[b]), None if drawn is None else (drawn[a], drawn[b]), groups,
            n_boot=n_boot, seed=seed,
        )
        for a, b in wanted
    ]  # fmt: skip
    return Comparison(metric.name, estimates, _adjusted(pairs))


def _pair(
    names: tuple[str, str],
    models: Mapping[str, Scored],
    estimates: Mapping[str, Estimates],
    point: tuple[Values, Values],
    drawn: tuple[Values, Values] | None,
    groups: Mapping[str, Sequence[str]],
    *,
    n_boot: int,
    seed: int,
) -> Pair:
    a, b = names
    scored = models[a]
    parts: dict[str, dict[str, Difference]] = {"overall": {}, "labels": {}, "label_groups": {}}
    resampled_R: dict[str, np.ndarray] = {}  # of the label groups
    for part, found in parts.items():
        for name, left in getattr(estimates[a], part).items():
            right = getattr(estimates[b], part)[name]
            columns = _columns(part, name, scored, groups)
            kind = name if part == "overall" else "macro"
            seen = _both_sides(kind, columns, point)
            difference_R = None
            if drawn is not None and left.ci95 is not None and right.ci95 is not None:
                sides = _both_sides(kind, columns, drawn)
                difference_R = sides[0] - sides[1]
                if part == "label_groups":
                    resampled_R[name] = difference_R
            made = difference(a, b, left, right, (float(seen[0][0]), float(seen[1][0])), difference_R,
                              n_boot=n_boot, seed=seed)  # fmt: skip
            if kind not in point[0].pooled:
                defined = [k for k in columns if not np.isnan([values.label_RK[0, k] for values in point]).any()]
                if len(defined) < max(left.n_labels, right.n_labels):
                    only = ", ".join(scored.labels[k] for k in defined) or "no label"
                    made = replace(made, n_labels=len(defined), method=f"{made.method}; over {only}, which both have")
            found[name] = made
    contrasts = {}
    for first, second in combinations(parts["label_groups"], 2):
        left, right = parts["label_groups"][first], parts["label_groups"][second]
        value = ci95 = p = None
        reason = left.undefined_because or right.undefined_because
        if left.value is not None and right.value is not None:
            value = left.value - right.value
        if first in resampled_R and second in resampled_R:
            contrast_R = resampled_R[first] - resampled_R[second]
            ci95, p = percentile_interval(contrast_R), two_sided_p(contrast_R)
        columns = sorted({k for name in (first, second) for k in _columns("label_groups", name, scored, groups)})
        rows_N = scored.rows_with(columns)
        contrasts[first, second] = Difference(
            first, second, value, ci95, p, p, int(rows_N.sum()), scored.n_pos_in(columns),
            scored.n_patients_among(rows_N), len(columns), f"({a} minus {b}) in {first} minus the same in {second}",
            left.interval_method, reason,
        )  # fmt: skip
    return Pair(a, b, **parts, contrasts=contrasts)


def _columns(part: str, name: str, scored: Scored, groups: Mapping[str, Sequence[str]]) -> list[int]:
    members = {"labels": (name,), "overall": scored.labels}[part] if part in ("labels", "overall") else groups[name]
    return [k for k, label in enumerate(scored.labels) if label in set(members)]


def _both_sides(kind: str, columns: list[int], values: tuple[Values, Values]) -> tuple[np.ndarray, np.ndarray]:
    """Two models' values [R] of one entry of `Estimates`; means are over the labels that both have in a resample."""
    if kind in values[0].pooled:
        return values[0].pooled[kind], values[1].pooled[kind]
    return shared_means(
        values[0].label_RK[:, columns],
        values[1].label_RK[:, columns],
        values[0].positive_RK[:, columns] if kind == "weighted" and values[0].positive_RK is not None else None,
    )


def shared_means(
    left_RK: np.ndarray, right_RK: np.ndarray, weight_RK: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Two means [R] over the labels that are defined on both sides of a resample."""
    absent_RK = np.isnan(left_RK) | np.isnan(right_RK)
    left_R, right_R = (
        mean_over_labels(np.where(absent_RK, np.nan, value_RK), weight_RK) for value_RK in (left_RK, right_RK)
    )
    return left_R, right_R


def difference(
    a: str,
    b: str,
    left: Estimate,
    right: Estimate,
    values: tuple[float, float],
    difference_R: np.ndarray | None,
    *,
    n_boot: int,
    seed: int,
) -> Difference:
    """Left minus right, with the counts of the left.

    Args:
        values: of the two, NaN where undefined.
        difference_R: of the two in the same resamples; None where there is to be no interval.
    """
    how = f"{bootstrap_text(n_boot, seed)}; both sides in the same resamples; {P_TEXT}; {HOLM_TEXT}"
    value, ci95, p, reason = None, None, None, None
    if left.value is None or right.value is None:
        reason = f"{a}: {left.undefined_because}" if left.value is None else f"{b}: {right.undefined_because}"
    elif np.isnan(values).any():
        reason = "no label has a value on both sides"
    else:
        value = values[0] - values[1]
        if difference_R is None:
            reason = (left.caveat or right.caveat) if n_boot else "no interval was asked for"
        else:
            ci95, p = percentile_interval(difference_R), two_sided_p(difference_R)
    return Difference(
        a, b, value, ci95, p, p, left.n, left.n_pos, left.n_patients, left.n_labels, left.method, how, reason
    )  # fmt: skip


def _adjusted(pairs: list[Pair]) -> tuple[Pair, ...]:
    """Holm's adjustment: each of `overall` over the pairs; labels, groups and contrasts over all of theirs."""
    changed: list[dict[str, dict[Any, Difference]]] = [{} for _ in pairs]
    for part in ("overall", "labels", "label_groups", "contrasts"):
        families: dict[str, list[tuple[int, Any]]] = {}
        for number, pair in enumerate(pairs):
            for name in getattr(pair, part):
                families.setdefault(name if part == "overall" else "", []).append((number, name))
        for number in range(len(pairs)):
            changed[number][part] = dict(getattr(pairs[number], part))
        for members in families.values():
            adjusted = holm([getattr(pairs[number], part)[name].p for number, name in members])
            for (number, name), p_holm in zip(members, adjusted, strict=True):
                changed[number][part][name] = replace(changed[number][part][name], p_holm=p_holm)
    return tuple(Pair(pair.a, pair.b, **parts) for pair, parts in zip(pairs, changed, strict=True))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjusted p (1979), in the order given; None stays None and counts for nothing."""
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, place) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        adjusted[place] = highest
    return adjusted


# -- accuracy ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class McNemar:
    """Right and wrong answers of A and B to the same questions.

    Attributes:
        n_both, n_only_a, n_only_b, n_neither: records that the two, one, or none answered right.
        value: accuracy of A minus that of B; None without records.
        p_exact: two-sided binomial test of the records that only one answered right (McNemar 1947); 1 without any.
        p_mid: the same with half the weight on the observed split (Fagerland 2013), less conservative.
        caveat: where patients have several records, which the test takes for independent.
    """

    a: str
    b: str
    n_both: int
    n_only_a: int
    n_only_b: int
    n_neither: int
    n_patients: int
    value: float | None
    p_exact: float | None
    p_mid: float | None
    method: str
    undefined_because: str | None = None
    caveat: str | None = None

    @property
    def n(self) -> int:
        return self.n_both + self.n_only_a + self.n_only_b + self.n_neither

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values under the attributes' names, and `n`."""
        return plain({**asdict(self), "n": self.n})


def mcnemar(models: Mapping[str, Scored]) -> McNemar:
    """McNemar's test of two models' exact answers (see `exact_answers`).

    Args:
        models: the two, by name: decisions, or `Scored.answers`.

    Raises:
        EvlecgError: different records, or values that are not decisions.
    """
    if len(models) != 2:
        raise ValueError(f"McNemar's test needs two models, not {len(models)}")
    same_records(models)
    (a, left), (b, right) = models.items()
    right_a_N, right_b_N = exact_answers(left), exact_answers(right)
    cells = [int(((right_a_N == x) & (right_b_N == y)).sum()) for x, y in ((1, 1), (1, 0), (0, 1), (0, 0))]
    n, (only_a, only_b) = sum(cells), cells[1:3]
    p_exact = p_mid = value = None
    if n:
        value = (only_a - only_b) / n
        fewer, discordant = min(only_a, only_b), only_a + only_b
        tail = float(stats.binom.cdf(fewer, discordant, 0.5))
        p_exact = min(1.0, 2 * tail)
        p_mid = min(1.0, 2 * tail - float(stats.binom.pmf(fewer, discordant, 0.5)))
    n_patients = left.n_patients_among(~np.isnan(right_a_N))
    return McNemar(
        a, b, cells[0], only_a, only_b, cells[3], n_patients, value, p_exact, p_mid,
        "McNemar: two-sided binomial test with probability 1/2 of the records that only one model answered right",
        None if n else "no record was assessed",
        None if n_patients == n else f"{n} records of {n_patients} patients are taken for independent; the paired "
        "bootstrap draws patients",
    )  # fmt: skip


# -- seeds -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OverSeeds:
    """The same training with n seeds.

    Attributes:
        mean, sd: sd has n - 1 in the denominator; None with one seed.
        ci95: of the mean, from Student's t; None with one seed.
    """

    values: tuple[float, ...]
    mean: float
    sd: float | None
    ci95: tuple[float, float] | None
    method: str = "mean over seeds; sd with n - 1; 95% interval of the mean from Student's t with n - 1 degrees"

    @property
    def n(self) -> int:
        return len(self.values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values under the attributes' names, and `n`."""
        return plain({**asdict(self), "n": self.n})


@dataclass(frozen=True)
class SeedTest:
    """Two methods trained with the same seeds, A minus B.

    Attributes:
        difference: over seeds, seed by seed.
        t, p: paired t-test, two-sided; None where it is undefined.
    """

    a: str
    b: str
    difference: OverSeeds
    t: float | None
    p: float | None
    method: str
    undefined_because: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values under the attributes' names."""
        return plain({**asdict(self), "difference": self.difference.to_dict()})


def over_seeds(values: Sequence[float]) -> OverSeeds:
    """Mean, standard deviation and interval of one number over seeds.

    Raises:
        EvlecgError: there is none, or one is not a finite number; `where` says which.
    """
    if not len(values):
        raise EvlecgError("there is no seed to average over")
    for place, value in enumerate(values):
        if value is None or not np.isfinite(value):
            raise EvlecgError(f"{value} is not a number", where=f"seed {place + 1} of {len(values)}")
    value_S = np.asarray(values, dtype=np.float64)
    mean, n = float(value_S.mean()), len(value_S)
    sd = float(value_S.std(ddof=1)) if n > 1 else None
    half = None if sd is None else float(stats.t.ppf(0.975, n - 1)) * sd / np.sqrt(n)
    return OverSeeds(tuple(value_S.tolist()), mean, sd, None if half is None else (mean - half, mean + half))


def seed_test(models: Mapping[str, Mapping[int, float]]) -> SeedTest:
    """Paired t-test of two methods over the seeds that both were trained with.

    It says whether another seed would change the verdict, not whether other patients would (`compare` does).

    Args:
        models: name -> seed -> number; the first minus the second.

    Raises:
        EvlecgError: the two have different seeds.
    """
    if len(models) != 2:
        raise ValueError(f"a paired test needs two methods, not {len(models)}")
    (a, left), (b, right) = models.items()
    if set(left) != set(right):
        odd = sorted(set(left) ^ set(right))
        raise EvlecgError(f"{a} and {b} do not have the same seeds", where=f"seeds {', '.join(map(str, odd))}",
                          hint="train both with the same seeds")  # fmt: skip
    seeds = sorted(left)
    difference = over_seeds([left[seed] - right[seed] for seed in seeds])
    t = p = reason = None
    if difference.sd is None:
        reason = "one seed has no variance"
    elif difference.sd == 0:
        reason = "all differences are the same"
    else:
        found = stats.ttest_rel([left[seed] for seed in seeds], [right[seed] for seed in seeds])
        t, p = float(found.statistic), float(found.pvalue)
    return SeedTest(a, b, difference, t, p, "paired t-test, seed by seed, two-sided", reason)
