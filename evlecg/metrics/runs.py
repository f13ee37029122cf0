"""Two methods, each trained with several seeds and scored on the same records: what would other patients say?

`seed_test` asks whether other seeds would change a verdict. Here the seeds are averaged, and patients are resampled:
few test records cannot prove much, whatever the seeds agree on.

Shape legend: K labels, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from evlecg.errors import EvlecgError
from evlecg.metrics.compare import shared_means
from evlecg.metrics.estimates import Metric, Support, plain
from evlecg.metrics.resampling import N_BOOT, Values, observed, percentile_interval, resampled
from evlecg.metrics.scored import Scored, same_records


@dataclass(frozen=True)
class Gain:
    """A mean over seeds of A minus B.

    Attributes:
        value: None where no label has a value on both sides.
        ci95: percentile interval over resampled patients, all seeds in the same resamples, for these trained models;
            None without a value, without resamples, or where too few patients are behind every label.
        n, n_patients: assessed records, and their patients.
    """

    value: float | None
    ci95: tuple[float, float] | None
    n: int
    n_patients: int


@dataclass(frozen=True)
class RunsComparison:
    """Runs of two methods on the same records.

    Attributes:
        n_runs: pairs of runs that are averaged.
        macro: over all labels.
        groups: label group -> the same over its labels.
        contrasts: of every two groups, the first's gain minus the second's: is the difference larger there?
    """

    n_runs: int
    macro: Gain
    groups: Mapping[str, Gain]
    contrasts: Mapping[tuple[str, str], Gain]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; contrasts as a list."""
        told = asdict(self) | {"contrasts": [
            {"a": a, "b": b, **asdict(gain)} for (a, b), gain in self.contrasts.items()
        ]}  # fmt: skip
        return plain(told)


def compare_runs(
    metric: Metric,
    a: Sequence[Scored],
    b: Sequence[Scored],
    *,
    label_groups: Mapping[str, Sequence[str]] | None = None,
    n_boot: int = N_BOOT,
    seed: int = 0,
) -> RunsComparison:
    """A minus B, run by run, averaged over the runs.

    Args:
        metric: its mean over labels is compared, over the labels that both have in a resample.
        a, b: as many of one as of the other, in the same order of seeds; the same records, truths and labels.
        label_groups: name -> labels, as in `estimate`.

    Raises:
        EvlecgError: not as many of both, none, or other records, truths or labels.
    """
    if len(a) != len(b) or not a:
        raise EvlecgError(f"{len(a)} and {len(b)} runs cannot be paired", hint="one of each for every seed")
    sides = {f"{side}{place}": scored for side, runs in (("a", a), ("b", b)) for place, scored in enumerate(runs)}
    same_records(sides)
    first = a[0]
    # one object scored twice, such as a teacher that has no seeds, is resampled once
    once = {id(scored): scored for scored in sides.values()}
    bound = {str(key): metric.bind(scored) for key, scored in once.items()}
    seen = {key: observed(statistic, first.n_patients) for key, statistic in bound.items()}
    drawn = {}
    if n_boot and first.n_patients:
        drawn = resampled(bound, first.n_patients, first.most_records_of_a_patient, n_boot=n_boot, seed=seed)
    firm_K = Support(first, metric).firm_K

    def means_R(values: Mapping[str, Values], columns: list[int]) -> np.ndarray:
        """Mean difference over the runs in every resample; [0] where there is none."""
        if not values or not columns:
            return np.empty(0)
        per_run = [shared_means(*(values[str(id(one))].label_RK[:, columns] for one in both))
                   for both in zip(a, b, strict=True)]  # fmt: skip
        return np.mean([left_R - right_R for left_R, right_R in per_run], axis=0)

    def gain(columns: list[int], seen_1: np.ndarray, drawn_R: np.ndarray) -> Gain:
        value = float(seen_1[0]) if len(seen_1) and not np.isnan(seen_1[0]) else None
        interval = percentile_interval(drawn_R) if value is not None and firm_K[columns].any() else None
        rows_N = first.rows_with(columns)
        return Gain(value, interval, int(rows_N.sum()), first.n_patients_among(rows_N))

    columns = {name: [first.labels.index(label) for label in labels if label in first.labels]
               for name, labels in (label_groups or {}).items()}  # fmt: skip
    parts = {name: (means_R(seen, places), means_R(drawn, places)) for name, places in columns.items() if places}
    every = list(range(len(first.labels)))
    return RunsComparison(
        n_runs=len(a),
        macro=gain(every, means_R(seen, every), means_R(drawn, every)),
        groups={name: gain(columns[name], *found) for name, found in parts.items()},
        contrasts={
            (one, other): gain(
                sorted({*columns[one], *columns[other]}),
                *(left - right for left, right in zip(parts[one], parts[other], strict=True)),
            )
            for one, other in combinations(parts, 2)
        },
    )
