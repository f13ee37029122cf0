"""Replies -> numbers: the metrics of every subset with counts and intervals over patients, as JSON and as tables.

Under `parser: pulse` the value of every published metric is computed with the very calls that the published scorer
makes (scikit-learn on 0/1 matrices of the labels that occur in the right answers), so that it is the same to the last
bit; intervals, and all numbers of `parser: strict`, are of `evlecg.metrics`.

Shape legend: N answers, K labels.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from evlecg.metrics import (
    ACCURACY,
    AUC_HARD,
    HAMMING_LOSS,
    N_BOOT,
    Estimate,
    Estimates,
    Metric,
    Scored,
    estimate,
    f1,
)  # fmt: skip
from evlecg.protocol.bench import LABELS, LETTER, OPEN, OPTIONS, SUBSETS, Item, Subset, published
from evlecg.protocol.judged import JUDGED, Verdicts
from evlecg.protocol.parsers import PARSERS, Parser
from evlecg.protocol.replies import Joined, Reply

SEED = 42  # of the published scorer's random letters
TextTable = tuple[str, tuple[str, ...], list[tuple[str, ...]]]  # title, column heads, rows
F1_AS_PUBLISHED = f1(empty=0.0)


@dataclass(frozen=True)
class Read:
    """One answer as it was read.

    Attributes:
        item: the question.
        text: the answer; None where there is none.
        names: what it names, a random letter included.
        right: what it should name.
        failed: nothing could be read off it.
        correct: whether all it names is right, and nothing is missing.
    """

    item: Item
    text: str | None
    names: tuple[str, ...]
    right: tuple[str, ...]
    failed: bool
    correct: bool

    def to_dict(self) -> dict[str, Any]:
        """A line of parsed.jsonl."""
        return {
            "question_id": self.item.id, "subset": self.item.subset, "record_id": self.item.record_id,
            "patient_id": self.item.patient_id, "text": self.text, "named": list(self.names),
            "right": list(self.right), "failed": self.failed, "correct": self.correct,
        }  # fmt: skip


@dataclass(frozen=True)
class SubsetScores:
    """The numbers of one subset.

    Attributes:
        subset: which.
        n_asked: its questions in the data.
        reads: the answers that are scored.
        estimates: metric -> value, counts, interval; the subset's own metric first.
        scored: decisions, right and wrong, or verdicts, for comparisons; None for free text without verdicts.
        classes: label, letter or option -> right answers, answers that name it, both.
        aspects: aspect -> mean of the judge's scores times 10, and their number.
        notes: what a reader has to know.
    """

    subset: Subset
    n_asked: int
    reads: tuple[Read, ...]
    estimates: Mapping[str, Estimates]
    scored: Scored | None
    classes: Mapping[str, Mapping[str, int]]
    aspects: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...]

    @property
    def n_failed(self) -> int:
        return sum(read.failed for read in self.reads)

    @property
    def failure_rate(self) -> float | None:
        return self.n_failed / len(self.reads) if self.reads else None

    @property
    def headline(self) -> Estimate | None:
        """The number that is compared; None for free text without verdicts."""
        return next(iter(self.estimates.values())).headline if self.estimates else None

    @property
    def metric(self) -> str | None:
        """Its key."""
        return next(iter(self.estimates), None)

    @property
    def scale(self) -> float:
        """What makes percent of the headline: verdicts are out of 100 already."""
        return 1 if self.metric == JUDGED.name else 100

    @property
    def published(self) -> dict[str, float]:
        """Model -> published result under the same metric, in [0, 1]."""
        return published(self.subset.name, self.metric)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        headline = self.headline
        return {
            "title": self.subset.title,
            "n": len(self.reads),
            "n_asked": self.n_asked,
            "n_published": self.subset.n,
            "n_failed": self.n_failed,
            "failure_rate": self.failure_rate,
            "metric": self.metric,
            "value": None if headline is None else headline.value,
            "ci95": None if headline is None or headline.ci95 is None else list(headline.ci95),
            "metrics": {name: estimates.to_dict() for name, estimates in self.estimates.items()},
            "classes": {name: dict(counts) for name, counts in self.classes.items()},
            "judge": {name: dict(values) for name, values in self.aspects.items()},
            "published": self.published,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class TextScores:
    """What the text of a model's answers is worth: the section `metrics.text` of a report.

    Attributes:
        parser: how answers were read.
        subsets: in the order of the benchmark.
        missing, extra: ids of questions without an answer, and of answers without a question.
        malformed, unjudged: ids with an unreadable verdict, and verdicts on nothing that was asked.
        seed: of random letters, where the parser draws them.
    """

    parser: Parser
    subsets: Mapping[str, SubsetScores]
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    malformed: tuple[str, ...] = ()
    unjudged: tuple[str, ...] = ()
    seed: int = SEED

    @property
    def reads(self) -> list[Read]:
        return [read for subset in self.subsets.values() for read in subset.reads]

    @property
    def failure_rate(self) -> float | None:
        reads = self.reads
        return sum(read.failed for read in reads) / len(reads) if reads else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "parser": self.parser.name,
            "seed": self.seed if self.parser.draws else None,
            "n": len(self.reads),
            "n_failed": sum(read.failed for read in self.reads),
            "failure_rate": self.failure_rate,
            "missing": {"n": len(self.missing), "ids": list(self.missing)},
            "extra": {"n": len(self.extra), "ids": list(self.extra)},
            "verdicts": {"malformed": list(self.malformed), "extra": list(self.unjudged)},
            "subsets": {name: subset.to_dict() for name, subset in self.subsets.items()},
        }

    def summary(self) -> list[str]:
        """What a reader asks first, one Markdown line each."""
        lines = []
        for one in self.subsets.values():
            headline = one.headline
            if headline is None:
                lines.append(f"- {one.subset.title}: {len(one.reads)} answers, not judged.")
                continue
            lines.append(
                f"- **{one.subset.title}: {one.metric} {_percent(headline, one.scale)}** on {len(one.reads)} answers; "
                f"{one.n_failed} could not be read."
            )
            lines += [f"  - {note}" for note in one.notes]
        unmatched = {
            "questions without an answer": self.missing,
            "answers to nothing asked here": self.extra,
            "unreadable verdicts": self.malformed,
            "verdicts on nothing asked here": self.unjudged,
        }
        for what, ids in unmatched.items():
            if ids:
                shown = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
                lines.append(f"- {len(ids)} {what}: {shown}.")
        return lines

    def tables(self) -> list[TextTable]:
        """(title, column heads, rows), plain text."""
        columns = ("subset", "metric", "ours", "n", "failed", "F1", "Hamming loss", "exactly right")
        rows = [
            (one.subset.title, one.metric or "–", _percent(one.headline, one.scale),
             str(len(one.reads)), _share(one.failure_rate),
             *(_percent(_headline(one.estimates.get(name)), 100, interval=False)
               for name in ("f1", "hamming_loss", "accuracy")))
            for one in self.subsets.values()
        ]  # fmt: skip
        tables: list[TextTable] = [("Answers as text, in percent", columns, rows)]
        beside = [one for one in self.subsets.values() if one.published]
        if beside:
            models = list(dict.fromkeys(model for one in beside for model in one.published))
            heads = ("model", *(f"{one.subset.title} ({one.metric})" for one in beside))
            ours = (
                f"this report (parser: {self.parser.name})",
                *(_percent(one.headline, one.scale, interval=False) for one in beside),
            )
            theirs = [(f"{model} (published)", *(_share(one.published.get(model)) for one in beside))
                      for model in models]  # fmt: skip
            tables.append(("Beside published results, in percent", heads, [ours, *theirs]))
        for one in self.subsets.values():
            title = one.subset.title
            if one.subset.task in (LABELS, LETTER) and one.classes:
                rows = [
                    (name, *(str(counts[key]) for key in ("right", "named", "both")))
                    for name, counts in one.classes.items()
                ]
                tables.append((f"{title}: what answers name", ("class", "right answers", "named", "both"), rows))
            if one.aspects:
                rows = [(name, f"{said['mean']:.1f}", str(int(said["n"]))) for name, said in one.aspects.items()]
                tables.append((f"{title}: verdicts", ("aspect", "mean of 100", "answers"), rows))
        return tables

    def scores(self) -> dict[str, Estimate]:
        """What a gate can name: the number that is compared of a subset, and SUBSET.METRIC for each of its numbers."""
        found = {}
        for name, one in self.subsets.items():
            if one.headline is not None:
                found[name] = one.headline
            better = {key: estimates for key, estimates in one.estimates.items() if key != HAMMING_LOSS.name}
            found |= {f"{name}.{key}": estimates.headline for key, estimates in better.items()}
        return found

    def formulas(self) -> list[str]:
        """How the numbers are formed, one line each."""
        used: dict[str, Estimates] = {}
        for one in self.subsets.values():
            used = {**one.estimates, **used}
        lines = [f"answers are read by parser: {self.parser.name}, that is, {self.parser.rules}"]
        lines += [f"{name} = {estimates.headline.method}" for name, estimates in used.items()]
        if used:
            lines.append(next(iter(used.values())).headline.interval_method)
        if self.parser.draws:
            lines.append(f"random letters: Python's random.Random({self.seed}).choice, one generator through MMMU-ECG, "
                         "CSN and G12EC in this order, answers in the order of their file")  # fmt: skip
        return lines


def score(
    joined: Joined,
    *,
    parser: str = "pulse",
    verdicts: Verdicts | None = None,
    n_boot: int = N_BOOT,
    seed: int = SEED,
) -> TextScores:
    """Reads the answers and scores every subset.

    Args:
        joined: questions and replies.
        parser: a key of `PARSERS`.
        verdicts: a judge's, on free-text answers.
        n_boot: bootstrap resamples over patients.
        seed: of random letters; 42 is that of the published scorer.
    """
    how = PARSERS[parser]
    groups: dict[str, list[tuple[Item, Reply | None]]] = {}
    for item, reply in joined.pairs:
        groups.setdefault(item.subset, []).append((item, reply))
    asked = dict.fromkeys(groups, 0)
    for subset, pairs in groups.items():
        asked[subset] = len(pairs)
    for item in joined.missing:
        asked[item.subset] = asked.get(item.subset, 0) + 1
        groups.setdefault(item.subset, [])
        if how.scores_missing:
            groups[item.subset].append((item, None))
    generator = random.Random(seed)
    found: dict[str, SubsetScores] = {}
    order = {name: place for place, name in enumerate(SUBSETS)}
    for name in sorted(groups, key=lambda name: (order.get(name, len(order)), name)):
        subset = subset_of(name, [item for item, _ in groups[name]])
        reads = _read_all(subset, groups[name], how, generator)
        found[name] = _subset_scores(subset, asked[name], reads, how, verdicts, n_boot)
    return TextScores(
        how, found, tuple(item.id for item in joined.missing), joined.extra,
        verdicts.malformed if verdicts else (), verdicts.extra if verdicts else (), seed,
    )  # fmt: skip


def subset_of(name: str, items: Sequence[Item]) -> Subset:
    """The benchmark's subset of that name; for other data one whose task follows from what its prompts offer."""
    if name in SUBSETS:
        return SUBSETS[name]
    if items and all(len(item.options) > 1 for item in items):
        lettered = all("\nA. " in item.prompt or "\nA) " in item.prompt or "\n(A) " in item.prompt for item in items)
        return Subset(name, name, LETTER if lettered else OPTIONS)
    return Subset(name, name, OPEN)


def _read_all(
    subset: Subset, pairs: Sequence[tuple[Item, Reply | None]], parser: Parser, generator: random.Random
) -> tuple[Read, ...]:
    reads, prompt = [], None
    for item, reply in pairs:
        right = parser.truth(subset, item)
        if reply is None:
            reads.append(Read(item, None, (), right, True, False))
            continue
        prompt = reply.prompt or prompt  # the published scorer keeps the options of the row before, too
        named = parser.read(subset, item, reply.text, prompt or item.prompt)
        names = named.names
        if named.failed and subset.task == LETTER and parser.draws:
            names = (generator.choice(subset.names or tuple("ABCDEFGH")),)
        reads.append(Read(item, reply.text, names, right, named.failed, parser.same(names, right)))
    return tuple(reads)


def _subset_scores(
    subset: Subset, n_asked: int, reads: tuple[Read, ...], parser: Parser, verdicts: Verdicts | None, n_boot: int
) -> SubsetScores:
    notes = []
    if subset.n is not None and n_asked != subset.n:
        notes.append(f"{n_asked} of the {subset.n} published questions are in these data")
    if parser.draws and subset.task == LETTER and (n_drawn := sum(read.failed for read in reads)):
        notes.append(f"{n_drawn} answers are random letters")
    patients = [read.item.patient_id for read in reads]
    aspects: dict[str, dict[str, float]] = {}
    scored, metrics = None, []
    if subset.task == LABELS:
        names = sorted({name for read in reads for name in read.right})
        if names:  # as published: a label that no right answer has does not exist
            scored = Scored(_indicator([read.names for read in reads], names),
                            _indicator([read.right for read in reads], names), patients, tuple(names),
                            [read.item.record_id for read in reads])  # fmt: skip
            metrics = [AUC_HARD, F1_AS_PUBLISHED, HAMMING_LOSS, ACCURACY]
        absent = [name for name in (*subset.kept, *subset.names) if name not in names]
        if absent:
            notes.append(f"no right answer has {', '.join(absent)}: not in the numbers")
    elif subset.task in (LETTER, OPTIONS):
        scored, metrics = Scored.answers([float(read.correct) for read in reads], patients), [ACCURACY]
    elif verdicts is not None:
        scored, aspects = _judged(reads, verdicts)
        metrics = [JUDGED] if scored is not None else []
    estimates = {_key(metric): estimate(metric, scored, n_boot=n_boot) for metric in metrics if scored is not None}
    if parser.name == "pulse" and subset.task == LABELS and scored is not None:
        printed = as_published(scored.value_NK.astype(int), scored.truth_NK.astype(int))
        estimates = {key: _with_value(estimates[key], printed[key]) if key in printed else estimates[key]
                     for key in estimates}  # fmt: skip
    return SubsetScores(subset, n_asked, reads, estimates, scored, _classes(subset, reads), aspects, tuple(notes))


def _key(metric: Metric) -> str:
    return "f1" if metric is F1_AS_PUBLISHED else metric.name


def _indicator(rows: Sequence[tuple[str, ...]], names: Sequence[str]) -> np.ndarray:
    return np.array([[float(name in row) for name in names] for row in rows]).reshape(len(rows), len(names))


def as_published(named_NK: np.ndarray, right_NK: np.ndarray) -> dict[str, float | None]:
    """`auc_hard`, `f1` and `hamming_loss` by the published scorer's own calls; None where it gets not a number.

    Two of its consequences: a label that every right answer has makes the whole AUC undefined; and where one label is
    all there is, F1 is that of its absence, since scikit-learn then takes the one column for a binary problem.

    Args:
        named_NK, right_NK: int [N, K], 1 where an answer names the label; K labels that occur in right answers,
            sorted by name.
    """
    from sklearn.metrics import f1_score, hamming_loss, roc_auc_score

    areas = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # labels without answers; labels with one class
        for column in range(right_NK.shape[1]):
            try:
                areas.append(roc_auc_score(right_NK[:, column], named_NK[:, column]))
            except ValueError:  # what older versions do where newer ones return NaN
                areas.append(np.nan)
        each = np.asarray(f1_score(right_NK, named_NK, average=None))[: right_NK.shape[1]]  # type: ignore[arg-type]
        loss = hamming_loss(right_NK, named_NK)
    printed = {"auc_hard": np.mean(areas), "f1": np.mean(list(each)), "hamming_loss": loss}
    return {name: None if np.isnan(value) else float(value) for name, value in printed.items()}


def _with_value(estimates: Estimates, value: float | None) -> Estimates:
    """The same numbers with another headline."""
    (name, headline), *others = estimates.overall.items()
    if value is None:
        reason = "a label is in every right answer, which the published scorer cannot score"
        headline = replace(headline, value=None, ci95=None, undefined_because=reason)
    else:
        headline = replace(headline, value=value)
    return replace(estimates, overall={name: headline, **dict(others)})


def _judged(reads: Sequence[Read], verdicts: Verdicts) -> tuple[Scored | None, dict[str, dict[str, float]]]:
    found = [(read, verdicts.by_item[key]) for read in reads
             if (key := (read.item.subset, read.item.id)) in verdicts.by_item]  # fmt: skip
    if not found:
        return None, {}
    means = np.array([[10 * float(np.mean(list(scores.values())))] for _, scores in found])
    names = list(dict.fromkeys(aspect for _, scores in found for aspect in scores))
    aspects = {}
    for name in names:
        given = [10 * scores[name] for _, scores in found if name in scores]
        aspects[name] = {"mean": float(np.mean(given)), "n": float(len(given))}
    patients = [read.item.patient_id for read, _ in found]
    return Scored(means, np.ones_like(means), patients, ("answer",), is_answers=True), aspects


def _classes(subset: Subset, reads: Sequence[Read]) -> dict[str, dict[str, int]]:
    if subset.task == OPEN:
        return {}
    occurring = {name for read in reads for name in (*read.names, *read.right)}
    known = (*subset.kept, *subset.names)
    names = [*known, *sorted(occurring - set(known))]
    counts = {name: {"right": 0, "named": 0, "both": 0} for name in names}
    for read in reads:
        for name in set(read.right) | set(read.names):
            counts[name]["right"] += name in read.right
            counts[name]["named"] += name in read.names
            counts[name]["both"] += name in read.right and name in read.names
    return counts


def _headline(estimates: Estimates | None) -> Estimate | None:
    return None if estimates is None else estimates.headline


def _percent(value: Estimate | None, scale: float, *, interval: bool = True) -> str:
    if value is None or value.value is None:
        return "–"
    low_high = f" ({value.ci95[0] * scale:.1f}–{value.ci95[1] * scale:.1f})" if interval and value.ci95 else ""
    return f"{value.value * scale:.1f}{low_high}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
