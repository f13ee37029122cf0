"""One metric in parts of the records: by sex, age band, device, noise, heart rate, or whatever names are given.

All parts see the same resamples of all patients, so that parts which share patients (noisy and clean records) are
compared rightly.

Shape legend: N records, K labels, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from evlecg.errors import EvlecgError
from evlecg.metrics.compare import Difference, difference, holm, shared_means
from evlecg.metrics.estimates import Estimate, Estimates, Metric, summarised, without_words
from evlecg.metrics.resampling import N_BOOT, Values, mean_over_labels, observed, resampled
from evlecg.metrics.scored import Scored


@dataclass(frozen=True)
class GroupTable:
    """One metric in every group of records.

    Attributes:
        groups: name -> its numbers, in the order given, then by name.
        reference: the group that the others are compared with; None where none has a value.
        differences: group -> group minus reference, of the headline. A macro is taken over the labels that have an
            interval in both: with a label more or less it would be another number. `p_holm` over the groups.
        label_differences: group -> label -> group minus reference; `p_holm` over all of them.
        n_ungrouped: records without a group.
    """

    metric: str
    groups: Mapping[str, Estimates]
    reference: str | None
    differences: Mapping[str, Difference]
    label_differences: Mapping[str, Mapping[str, Difference]]
    n_ungrouped: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the words of the labels are those of `differences`."""
        return {
            "metric": self.metric,
            "groups": {name: estimates.to_dict() for name, estimates in self.groups.items()},
            "reference": self.reference,
            "differences": {name: found.to_dict() for name, found in self.differences.items()},
            "label_differences": {
                name: {label: without_words(found.to_dict()) for label, found in labels.items()}
                for name, labels in self.label_differences.items()
            },
            "n_ungrouped": self.n_ungrouped,
        }


def by_group(
    metric: Metric,
    scored: Scored,
    groups_N: Sequence[str | None] | np.ndarray,
    *,
    order: Sequence[str] = (),
    reference: str | None = None,
    min_patients: int = 10,
    label_groups: Mapping[str, Sequence[str]] | None = None,
    n_boot: int = N_BOOT,
    seed: int = 0,
) -> GroupTable:
    """A metric in every group of records, and every group against one.

    Args:
        groups_N: the group's name of every record; None or "" where unknown.
        order: of the rows; groups that it does not name follow by name. A named group without records stays in.
        reference: compared with; None takes the group with the most patients that has a value.
        min_patients: a group with fewer has no value.
        label_groups, n_boot, seed: as in `estimate`.

    Raises:
        EvlecgError: no group is named `reference`.
    """
    names_N = np.array(["" if name is None else str(name) for name in groups_N], dtype=object)
    if len(names_N) != len(scored.truth_NK):
        raise ValueError(f"{len(names_N)} groups for {len(scored.truth_NK)} records")
    names = list(dict.fromkeys([*order, *sorted(set(names_N) - {""})]))
    if reference is not None and reference not in names:
        raise EvlecgError(f"no group {reference!r}", where="reference", hint=f"one of {', '.join(names)}")
    parts = {name: scored.where(names_N == name) for name in names}
    statistics = {name: metric.bind(part) for name, part in parts.items()}
    refused = {name: _refusal(part, min_patients) for name, part in parts.items()}
    used = {name: statistic for name, statistic in statistics.items() if refused[name] is None}
    drawn: dict[str, Values] = {}
    if n_boot and used:
        drawn = resampled(used, scored.n_patients, scored.most_records_of_a_patient, n_boot=n_boot, seed=seed)
    point = {name: observed(statistic, scored.n_patients) for name, statistic in statistics.items()}
    tables = {
        name: summarised(
            metric,
            part,
            point[name],
            drawn.get(name),
            label_groups or {},
            n_boot=n_boot,
            seed=seed,
            refused=refused[name],
        )
        for name, part in parts.items()
    }
    defined = [name for name in names if tables[name].headline.value is not None]
    if reference is None and defined:
        reference = max(defined, key=lambda name: tables[name].headline.n_patients)

    differences: dict[str, Difference] = {}
    cells: dict[tuple[str, str], Difference] = {}
    for name in names:
        if reference is None or name == reference:
            continue
        pair = _Pair(metric, (name, reference), parts, tables, point, drawn, n_boot, seed)
        differences[name] = pair.headline()
        cells |= {(name, scored.labels[k]): pair.label(k) for k in pair.columns}
    differences, cells = _holm_over(differences), _holm_over(cells)
    return GroupTable(
        metric.name, tables, reference, differences,
        {name: {label: found for (group, label), found in cells.items() if group == name} for name in differences},
        int((names_N == "").sum()),
    )  # fmt: skip


def _refusal(part: Scored, min_patients: int) -> str | None:
    n_patients = part.n_patients_among(part.rows_with(range(len(part.labels))))
    if n_patients >= min_patients:
        return None
    return f"{n_patients} patient{'' if n_patients == 1 else 's'}, fewer than {min_patients}"


@dataclass(frozen=True)
class _Pair:
    """A group and the one it is compared with."""

    metric: Metric
    names: tuple[str, str]
    parts: Mapping[str, Scored]
    tables: Mapping[str, Estimates]
    point: Mapping[str, Values]
    drawn: Mapping[str, Values]
    n_boot: int
    seed: int

    @cached_property
    def both(self) -> Scored:
        a, b = (self.parts[name] for name in self.names)
        return a.replaced(truth_NK=np.where(a.assessed_NK, a.truth_NK, b.truth_NK))

    @property
    def columns(self) -> range:
        """Labels that the metric has values for."""
        return range(len(self.tables[self.names[0]].labels))

    def label(self, k: int) -> Difference:
        label = self.parts[self.names[0]].labels[k]
        left, right = (self.tables[name].labels[label] for name in self.names)
        return self._made(left, right, [k], firm=self._firm(k))

    def headline(self) -> Difference:
        left, right = (self.tables[name].headline for name in self.names)
        if self.metric.headline in self.point[self.names[0]].pooled:
            everything = list(range(len(self.parts[self.names[0]].labels)))
            firm = left.ci95 is not None and right.ci95 is not None
            return self._made(left, right, everything, firm=firm, pooled=self.metric.headline)
        shared = [k for k in self.columns if self._valued(k) and (self._firm(k) or not self.n_boot)]
        labels = ", ".join(self.parts[self.names[0]].labels[k] for k in shared)
        method = f"unweighted mean over {labels or 'no label'}; of one label: {self.metric.formula}"
        left, right = (self._over(shared, name, method) for name in self.names)
        return self._made(left, right, shared, firm=bool(shared and self.n_boot))

    def _over(self, columns: list[int], name: str, method: str) -> Estimate:
        whole = self.tables[name].headline
        if not columns:
            reason = whole.undefined_because or "no label has an interval in both groups"
            return replace(whole, value=None, method=method, undefined_because=reason)
        return replace(whole, value=float(mean_over_labels(self.point[name].label_RK[:, columns])[0]), method=method)

    def _valued(self, k: int) -> bool:
        return all(list(self.tables[name].labels.values())[k].value is not None for name in self.names)

    def _firm(self, k: int) -> bool:
        return self._valued(k) and all(
            list(self.tables[name].labels.values())[k].ci95 is not None for name in self.names
        )

    def _made(
        self, left: Estimate, right: Estimate, columns: list[int], *, firm: bool, pooled: str | None = None
    ) -> Difference:
        """The difference with the counts of both groups together."""
        a, b = self.names

        def sides(values: Mapping[str, Values]) -> tuple[np.ndarray, np.ndarray]:
            if pooled is not None:
                return values[a].pooled[pooled], values[b].pooled[pooled]
            return shared_means(values[a].label_RK[:, columns], values[b].label_RK[:, columns])

        seen = sides(self.point)
        drawn = sides(self.drawn) if firm else None
        rows_N = self.both.rows_with(columns)
        return replace(
            difference(
                a, b, left, right, (float(seen[0][0]), float(seen[1][0])),
                None if drawn is None else drawn[0] - drawn[1], n_boot=self.n_boot, seed=self.seed,
            ),
            n=int(rows_N.sum()), n_pos=self.both.n_pos_in(columns), n_patients=self.both.n_patients_among(rows_N),
            n_labels=len(columns),
        )  # fmt: skip


def _holm_over(found: dict[Any, Difference]) -> dict[Any, Difference]:
    adjusted = holm([each.p for each in found.values()])
    return {key: replace(each, p_holm=p) for (key, each), p in zip(found.items(), adjusted, strict=True)}
