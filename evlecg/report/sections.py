"""What a report says, as titled sections of sentences and tables; markdown.py and html.py only set them.

The order is that of a reader's questions: is it good enough, where is it worse, on how many patients; then the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from evlecg.metrics import Comparison, DeLongTest, Difference, Estimate, GroupTable, McNemar
from evlecg.report.data import SCORE_FORMULAS, Cost, Report
from evlecg.report.measured import AS_ANSWERED, FIXED_SPECIFICITY, Measured
from evlecg.report.published import published_for

UNDEFINED = "–"
ABOVE_0 = "Above 0 the first of the two is better."
FEW = 10  # records
SUMMED = "an answer is written in several ways, whose probabilities add up"
CALIBRATED = (
    "calibrated on blank paper: P(answer) is divided by P(answer) on paper without a tracing (Zhao 2021); this shifts "
    "the log odds of every question by a constant, so AUROCs of labels are what they were"
)
Row = tuple[str, ...]


class Table(NamedTuple):
    """Column heads and cells, plain text."""

    columns: Row
    rows: list[Row]


@dataclass(frozen=True)
class Section:
    """A heading with sentences, then tables.

    Attributes:
        key: what html.py puts its pictures to.
        level: 2 for a heading of the report, 3 for one within.
    """

    key: str
    title: str
    lines: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    level: int = 2


def number(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.3f}"


def interval(ci95: tuple[float, float] | None, sign: str = "") -> str:
    return UNDEFINED if ci95 is None else f"{ci95[0]:{sign}.3f}–{ci95[1]:{sign}.3f}".replace("–-", " to -")


def estimate_text(estimate: Estimate | None) -> str:
    """`0.912 (0.893–0.930)`."""
    if estimate is None or estimate.value is None:
        return UNDEFINED
    return number(estimate.value) + (f" ({interval(estimate.ci95)})" if estimate.ci95 is not None else "")


def difference_text(difference: Difference) -> str:
    """`+0.012 (-0.003 to +0.030)`."""
    if difference.value is None:
        return UNDEFINED
    low_high = difference.ci95
    return f"{difference.value:+.3f}" + (f" ({low_high[0]:+.3f} to {low_high[1]:+.3f})" if low_high else "")


def counted(n: int, what: str) -> str:
    """`1 record`, `2 records`."""
    return f"{n} {what}" + ("" if n == 1 else "s")


def p_text(p: float | None) -> str:
    return UNDEFINED if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def sections(report: Report) -> Iterator[Section]:
    """Everything but the summary."""
    if report.gates:
        rows = [("met" if gate.met else "NOT MET", gate.name, gate.detail) for gate in report.gates]
        yield Section("gates", "Gates", (), (Table(("", "gate", "found"), rows),))
    measured = report.measured
    if measured:
        yield Section("labels", "Labels, weakest first", _few(measured), (label_table(report, measured),))
        yield from _label_groups(measured)
        yield from _overall(measured)
        yield from _subgroups(measured)
        yield from _decisions(measured)
        yield from _calibration(measured)
    if report.text:
        for title, columns, rows in report.text.tables():
            yield Section("text", title, (), (Table(columns, rows),))
    if report.worst:
        yield _worst(report)
    if report.robustness:
        yield _robustness(report.robustness.comparison, report.robustness.disturbances)
    for title, robustness in report.text_robustness.items():
        yield _robustness(robustness.comparison, robustness.disturbances, title)
    if report.cost:
        yield _cost(report.cost)
    yield from _published(report)
    left_out = [f"{what}: {why}" for what, why in report.all_left_out.items()] or ["Nothing."]
    yield Section("left_out", "Left out", tuple(left_out))
    yield Section("formulas", "How the numbers are formed", tuple(formulas(report)))
    yield Section("provenance", "Provenance", (), (Table(("key", "value"), list(flat(report.provenance))),))


def summary(report: Report) -> list[str]:
    """The first answer, then where it is worse; the first line is the headline."""
    if report.text:
        return [line.removeprefix("- ") for line in report.text.summary() if line]
    scored = f"{counted(report.n_records, 'record')} of {counted(report.n_patients, 'patient')}"
    measured = report.measured
    if measured is None or report.weakest is None:
        return [f"**No AUROC**: among {scored}, no label has both classes."]
    defined = [label for label in measured.auroc.labels.values() if label.value is not None]
    lines = [
        f"**Macro AUROC {estimate_text(report.macro)}**, the mean over {len(defined)} of {len(report.labels)} labels, "
        f"on {scored}. 1 is perfect, 0.5 is chance; in brackets the 95% interval."
    ]
    missed = [gate.name for gate in report.gates if not gate.met]
    if report.gates:
        lines.append(f"**Gates not met: {', '.join(missed)}.**" if missed else "All gates are met.")
    weak = report.label_aucs[report.weakest]
    with_it = counted(weak.n_pos or 0, "record")
    lines.append(f"Weakest label: {report.weakest} {estimate_text(weak)}, {with_it} with it.")
    chance = [name for name, label in report.label_aucs.items() if label.ci95 is not None and label.ci95[0] <= 0.5]
    if chance:
        lines.append(f"Not shown to be better than chance: {', '.join(chance)}.")
    unsure = [name for name, label in report.label_aucs.items() if label.value is not None and label.ci95 is None]
    if unsure:
        lines.append(f"Without an interval, hence no evidence by themselves: {', '.join(unsure)}.")
    lines.append(_worse_groups(measured))
    if report.split in ("all", "train"):
        lines.append("Records of the training split are among these: a model that was trained on this dataset has seen "
                     "them.")  # fmt: skip
    return lines


def _worse_groups(measured: Measured) -> str:
    """Groups of records that are told apart from the largest, whichever of the two is the worse one."""
    worse = []
    for kind, table in measured.subgroups.items():
        for group, found in table.differences.items():
            if found.value is None or found.p_holm is None or found.p_holm >= 0.05:
                continue
            if found.value < 0:
                worse.append(f"{group} ({kind}) {difference_text(found)} against {table.reference}")
            else:
                worse.append(f"{table.reference} ({kind}), as {group} is better by {difference_text(found)}")
    compared = sum(found.value is not None for table in measured.subgroups.values()
                   for found in table.differences.values())  # fmt: skip
    if worse:
        return f"Worse in: {'; '.join(worse)}."
    if not compared:
        return "Whether it is worse in some group of patients is not known: no two groups are large enough."
    return f"No group of patients is shown to be worse than another ({compared} compared with the largest)."


def label_table(report: Report, measured: Measured) -> Table:
    def weakness(label: str) -> float:
        value = measured.auroc.labels[label].value
        return float("inf") if value is None else value

    rows = []
    for name in sorted(report.labels, key=weakness):
        auc = measured.auroc.labels[name]
        average = measured.average_precision.labels[name]
        rows.append((
            name, report.descriptions.get(name, ""), number(auc.value), interval(auc.ci95),
            interval(measured.delong[name].ci95), str(auc.n_pos), str(auc.n - (auc.n_pos or 0)),
            number(average.value), number(measured.calibrated.brier.labels[name].value),
            number(measured.calibrated.ece.labels[name].value),
            number(measured.calibrated.ece_if_calibrated[name].expected),
        ))  # fmt: skip
    return Table(("label", "meaning", "AUROC", "95% interval", "DeLong's", "positive", "negative",
                  "average precision", "Brier", "ECE", "ECE if calibrated"), rows)  # fmt: skip


def _few(measured: Measured) -> tuple[str, ...]:
    """A warning where a label has hardly any records on one side."""
    few = [name for name, found in measured.auroc.labels.items()
           if found.value is not None and min(found.n_pos or 0, found.n - (found.n_pos or 0)) < FEW]  # fmt: skip
    if not few:
        return ()
    return (f"Fewer than {FEW} records with or without it, so that one record more or less moves the number: "
            f"{', '.join(few)}.",)  # fmt: skip


def _label_groups(measured: Measured) -> Iterator[Section]:
    groups = measured.auroc.label_groups
    if groups:
        rows = [(name, number(found.value), interval(found.ci95), str(found.n_labels), str(found.n_pos),
                 found.undefined_because or found.method.split(";")[0].removeprefix("unweighted mean over "))
                for name, found in groups.items()]  # fmt: skip
        yield Section("label_groups", "By what labels hang on", (
            "Labels are grouped by the part of the tracing that decides them.",
        ), (Table(("part of the tracing", "macro AUROC", "95% interval", "labels", "positives", "which"), rows),),
        )  # fmt: skip


def _overall(measured: Measured) -> Iterator[Section]:
    rows = [
        (name, estimate_text(found), str(found.n_labels), found.undefined_because or found.caveat or "")
        for name, found in (
            ("macro AUROC", measured.auroc.overall["macro"]),
            ("weighted AUROC", measured.auroc.overall["weighted"]),
            ("macro average precision", measured.average_precision.overall["macro"]),
            ("weighted average precision", measured.average_precision.overall["weighted"]),
            ("macro Brier score", measured.calibrated.brier.headline),
            ("macro ECE", measured.calibrated.ece.headline),
        )
    ]
    yield Section("overall", "Over all labels", (), (Table(("number", "value (95% interval)", "labels", ""), rows),))


def _subgroups(measured: Measured) -> Iterator[Section]:
    if not measured.subgroups:
        return
    yield Section("subgroups", "By group of patients", (
        "Differences are to the group with the most patients, over the labels that have an interval in both, hence "
        "they need not be the difference of the two columns.",
    ))  # fmt: skip
    for kind, table in measured.subgroups.items():
        yield Section("subgroup", kind, _ungrouped(table), (group_table(table),), level=3)


def _ungrouped(table: GroupTable) -> tuple[str, ...]:
    return (f"Unknown for {counted(table.n_ungrouped, 'record')}.",) if table.n_ungrouped else ()


def group_table(table: GroupTable) -> Table:
    rows = []
    for name, estimates in table.groups.items():
        found = estimates.headline
        against = table.differences.get(name)
        # a macro counts records of labels that have a value; the group's own are those of its best assessed label
        n_patients = max([found.n_patients, *(label.n_patients for label in estimates.labels.values())])
        n_records = max([found.n, *(label.n for label in estimates.labels.values())])
        rows.append((
            name, str(n_patients), str(n_records), estimate_text(found),
            "the reference" if name == table.reference else difference_text(against) if against else UNDEFINED,
            p_text(against.p_holm) if against else "", found.undefined_because or found.caveat or "",
        ))  # fmt: skip
    return Table(("group", "patients", "records", "macro AUROC", "difference", "p (Holm)", ""), rows)


RULE_WORDS = {
    AS_ANSWERED: "as answered: the likelier of yes and no",
    "youden": "thresholds of the highest sensitivity + specificity on validation",
    "f1": "thresholds of the highest F1 on validation",
    f"specificity_{FIXED_SPECIFICITY:g}": f"thresholds with a specificity of {FIXED_SPECIFICITY:g} on validation",
}


def _decisions(measured: Measured) -> Iterator[Section]:
    names = {"auc_hard": "auc_hard", "f1": "F1", "sensitivity": "sensitivity", "specificity": "specificity",
             "hamming_loss": "Hamming loss", "accuracy": "exact answers"}  # fmt: skip
    rows = [
        (RULE_WORDS[rule], *(estimate_text(decided.metrics[key].headline) for key in names))
        for rule, decided in measured.decided.items()
    ]
    table = Table(("decided by", *names.values()), rows)
    note = () if not measured.no_validation else (f"No thresholds were chosen: {measured.no_validation}.",)
    yield Section("decisions", "As yes or no", note, (table,))
    chosen = measured.decided.get("youden")
    if chosen:
        values = chosen.thresholds.to_dict()["values"]
        rows = [
            (label, number(values[label]) if isinstance(values[label], float) else values[label] or UNDEFINED,
             *(estimate_text(chosen.metrics[key].labels[label]) for key in ("sensitivity", "specificity", "f1")))
            for label in measured.labels
        ]  # fmt: skip
        yield Section("decisions_labels", RULE_WORDS["youden"], (), (
            Table(("label", "threshold", "sensitivity", "specificity", "F1"), rows),), level=3)  # fmt: skip


def _calibration(measured: Measured) -> Iterator[Section]:
    calibrated = measured.calibrated
    lines = [f"Macro ECE {estimate_text(calibrated.ece.headline)}, Brier {estimate_text(calibrated.brier.headline)}."]
    if calibrated.temperature and calibrated.ece_after and calibrated.brier_after:
        temperatures = [value for value in calibrated.temperature.temperature.values() if value is not None]
        if temperatures:
            lines.append(
                f"With the temperature {temperatures[0]:.3g} fitted on validation: "
                f"ECE {estimate_text(calibrated.ece_after.headline)}, "
                f"Brier {estimate_text(calibrated.brier_after.headline)}."
            )
        else:
            reasons = dict.fromkeys(calibrated.temperature.undefined_because.values())
            lines.append(f"No temperature: {'; '.join(reasons)}.")
    lines.append(
        "An ECE is above 0 for a calibrated model too, the more so the fewer the records: what it would be then stands "
        "in the table of labels. Its interval is mirrored against that bias, hence may lie below the value."
    )
    off = [label for label, found in calibrated.ece_if_calibrated.items() if found.p is not None and found.p < 0.05]
    if off:
        lines.append(f"Off by more than chance (p below 0.05, not adjusted): {', '.join(off)}.")
    yield Section("calibration", "Whether scores are probabilities", tuple(lines))


def _worst(report: Report) -> Section:
    rows = [
        (record.record_id, record.label, "present" if record.truth else "absent", number(record.score),
         ", ".join(f"{label} {score:.2f}" for label, score in record.others.items()) or UNDEFINED, record.about)
        for record in report.worst
    ]  # fmt: skip
    return Section("worst", "Records answered wrongly with most confidence", (
        "Before the model is blamed: some of these truths may be wrong.",
    ), (Table(("record", "label", "truth", "score", "also wrong", "about"), rows),))  # fmt: skip


def _robustness(comparison: Comparison, disturbances: Mapping[str, str], subset: str = "") -> Section:
    rows = [("clean", estimate_text(comparison.models["clean"].headline), "", "", "the pages as reported above")]
    rows += [
        (pair.a, estimate_text(comparison.models[pair.a].headline), difference_text(pair.headline),
         p_text(pair.headline.p_holm), disturbances[pair.a])
        for pair in comparison.pairs
    ]  # fmt: skip
    what = comparison.metric if subset else "macro AUROC"
    title = f"Under disturbed pages{f': {subset}' if subset else ''}"
    return Section("robustness", title, (), (
        Table(("pages", what, "difference to clean", "p (Holm)", "what was done"), rows),))  # fmt: skip


def _cost(cost: Cost) -> Section:
    rows = [
        ("parameters", f"{cost.parameters:,}"),
        ("FLOPs a record", UNDEFINED if cost.flops is None else f"{cost.flops:,} ({cost.n_questions} questions)"),
        ("latency of one record, median", f"{cost.latency_ms:.1f} ms ({cost.n_records} records)"),
        ("latency of one record, 95th percentile", f"{cost.latency_p95_ms:.1f} ms"),
        ("peak memory", f"{cost.peak_memory_bytes / 2**20:,.0f} MiB"),
        ("device", cost.device),
    ]
    return Section("cost", "Cost", (cost.method,), (Table(("", ""), rows),))


def _published(report: Report) -> Iterator[Section]:
    found = published_for(report.dataset, report.labels)
    if not found or report.measured is None:
        return
    rows = [(name, f"{100 * value:.1f}", about) for name, value, about in found.rows]
    for rule, decided in report.measured.decided.items():
        ours = decided.metrics["auc_hard"].headline
        if ours.value is not None:
            low_high = "" if ours.ci95 is None else f" ({100 * ours.ci95[0]:.1f}–{100 * ours.ci95[1]:.1f})"
            rows.append((report.model, f"{100 * ours.value:.1f}{low_high}", RULE_WORDS[rule]))
    yield Section("published", "Beside published results", (found.note,), (
        Table(("model", "100 x auc_hard", "how"), rows),))  # fmt: skip


def formulas(report: Report) -> list[str]:
    measured = report.measured
    if measured is None:
        return list(report.text.formulas()) if report.text else []
    decided = measured.decided[AS_ANSWERED].metrics
    answers = report.provenance.get("answers", {})
    lines = [
        SCORE_FORMULAS[report.score_source],
        *([SUMMED] if answers.get("wordings") else []),
        *([CALIBRATED] if answers.get("calibration") == "blank" else []),
        f"AUROC of a label = {measured.auroc.headline.method.split('of one label: ')[-1]}; a record in which the "
        "label was not assessed is in no pair",
        f"macro = {measured.auroc.overall['macro'].method.split(';')[0]}; "
        f"weighted = {measured.auroc.overall['weighted'].method.split(';')[0]}",
        f"average precision = {measured.average_precision.headline.method.split('of one label: ')[-1]}",
        *(f"{name.replace('_', ' ')} = {found.headline.method}" for name, found in decided.items()),
        f"Brier = {measured.calibrated.brier.headline.method.split('of one label: ')[-1]}; "
        f"ECE = {measured.calibrated.ece.headline.method.split('of one label: ')[-1]}",
        *([f"temperature: {measured.calibrated.temperature.method}"] if measured.calibrated.temperature else []),
        measured.auroc.headline.interval_method + "; no interval with fewer than two patients on either side",
        *dict.fromkeys(f"DeLong's interval: {found.interval_method}" for found in measured.delong.values()),
        *report.group_formulas.values(),
        "differences between groups of patients: in resamples that both share; p = twice the smaller share of "
        "resamples on one side of 0; p (Holm) is adjusted within each table",
    ]
    return lines


def mcnemar_text(test: McNemar) -> str:
    return (f"{test.a} alone right {test.n_only_a}, {test.b} alone right {test.n_only_b}, both {test.n_both}, "
            f"neither {test.n_neither}")  # fmt: skip


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[Row]:
    """`{"a": {"b": 1}}` -> `("a.b", "1")`."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def comparison_sections(
    comparison: Comparison,
    tests: Sequence[tuple[str, McNemar, float | None]],
    notes: Sequence[str],
    delong: Mapping[tuple[str, str, str], tuple[DeLongTest, float | None]],
) -> Iterator[Section]:
    """Models on the same records: each one's numbers, differences, label groups, contrasts, exact answers.

    Args:
        comparison: of AUROC.
        tests: (rule of the decisions in words, McNemar's test, its exact p after Holm).
        notes: what was left out.
        delong: (model, other model, label) -> DeLong's test, its p after Holm.
    """
    first = next(iter(comparison.models.values()))
    told = [f"{pair.a} minus {pair.b}: macro AUROC {difference_text(pair.headline)}, p {p_text(pair.headline.p_holm)} "
            f"(adjusted over {counted(len(comparison.pairs), 'pair')})." for pair in comparison.pairs]  # fmt: skip
    heads = tuple(f"{kind} AUROC" for kind in first.overall)
    yield Section("models", "Models", (*told, ABOVE_0, *notes), (_models_table(comparison, heads, "records"),))

    def differences(title: str, key: str, part: str, lead: tuple[str, ...]) -> Section:
        rows = [
            (f"{pair.a} − {pair.b}", str(name), difference_text(found), p_text(found.p), p_text(found.p_holm),
             found.undefined_because or "")
            for pair in comparison.pairs
            for name, found in getattr(pair, part).items()
        ]  # fmt: skip
        heads = ("models", "of", "difference (95% interval)", "p", "p (Holm)", "")
        return Section(key, title, lead, (Table(heads, rows),))

    yield differences("Differences over all labels", "overall", "overall", ())
    if first.label_groups:
        yield differences("By what labels hang on", "label_groups", "label_groups", ())
        rows = [
            (f"{pair.a} − {pair.b}", f"{found.a} more than {found.b}", difference_text(found), p_text(found.p),
             p_text(found.p_holm))
            for pair in comparison.pairs
            for found in pair.contrasts.values()
        ]  # fmt: skip
        if rows:
            yield Section("contrasts", "Is the difference larger there?", (
                "Of every two parts of the tracing: the difference between the models in the first minus the same in "
                "the second. If distillation carries over what a part hangs on, its contrast is not 0.",
            ), (Table(("models", "contrast", "difference (95% interval)", "p", "p (Holm)"), rows),))  # fmt: skip
    yield _labels_compared(comparison, delong)
    if tests:
        told = ["An answer to a record is right where all its labels are."]
        yield _mcnemar_section("Exact answers (McNemar)", "decided by", told, tests)
    some = comparison.pairs[0].headline
    yield Section("formulas", "How the numbers are formed", (
        some.method, some.interval_method, *dict.fromkeys(test.method for _, test, _ in tests),
        *dict.fromkeys(f"DeLong: {test.method}" for test, _ in delong.values()),
        "p (Holm) is adjusted within each table: differences over all labels over the pairs, labels over all labels "
        "and pairs, exact answers over the pairs of one rule",
    ))  # fmt: skip


def answer_sections(
    subsets: Mapping[str, tuple[Comparison, Sequence[McNemar]]],
    p_holm: Mapping[tuple[str, str, str], float | None],
    mcnemar_p_holm: Sequence[float | None],
    notes: Sequence[str],
) -> Iterator[Section]:
    """Models' answers to the same questions, subset by subset.

    Args:
        subsets: title -> its comparison, McNemar's test of every pair.
        p_holm: (title, model, other model) -> p of the difference, after Holm over all of them.
        mcnemar_p_holm: exact p of the tests in their order, after Holm over all of them.
        notes: what was left out, and how answers were read.
    """
    rows = [
        (title, f"{pair.a} − {pair.b}", comparison.metric, difference_text(pair.headline), p_text(pair.headline.p),
         p_text(p_holm[title, pair.a, pair.b]), pair.headline.undefined_because or "")
        for title, (comparison, _) in subsets.items()
        for pair in comparison.pairs
    ]  # fmt: skip
    heads = ("questions", "models", "of", "difference (95% interval)", "p", "p (Holm)", "")
    yield Section("models", "Differences", (ABOVE_0, *notes), (Table(heads, rows),))
    for title, (comparison, _) in subsets.items():
        kinds = next(iter(comparison.models.values())).overall
        heads = tuple(f"{kind} {comparison.metric}" if len(kinds) > 1 else comparison.metric for kind in kinds)
        yield Section("answers", title, (), (_models_table(comparison, heads, "questions"),))
    told = [(title, test) for title, (_, tests) in subsets.items() for test in tests]
    tests = [(title, test, p) for (title, test), p in zip(told, mcnemar_p_holm, strict=True)]
    yield _mcnemar_section("Exactly right answers (McNemar)", "questions", [], tests)
    methods = [(pair.headline.method, pair.headline.interval_method)
               for comparison, _ in subsets.values() for pair in comparison.pairs]  # fmt: skip
    yield Section("formulas", "How the numbers are formed", (
        *dict.fromkeys(text for both in methods for text in both), *dict.fromkeys(test.method for _, test, _ in tests),
        "p (Holm) is adjusted over all pairs of all questions' subsets",
    ))  # fmt: skip


def _models_table(comparison: Comparison, heads: Sequence[str], unit: str) -> Table:
    rows = [(name, *(estimate_text(found) for found in estimates.overall.values()),
             str(estimates.headline.n), str(estimates.headline.n_patients))
            for name, estimates in comparison.models.items()]  # fmt: skip
    return Table(("model", *heads, unit, "patients"), rows)


def _mcnemar_section(
    title: str, by: str, told: Sequence[str], tests: Sequence[tuple[str, McNemar, float | None]]
) -> Section:
    """(what decided, or what was asked; the test; its exact p after Holm), a row each."""
    rows = [(f"{test.a} − {test.b}", rule, UNDEFINED if test.value is None else f"{test.value:+.3f}",
             p_text(test.p_exact), p_text(p_holm), p_text(test.p_mid), mcnemar_text(test))
            for rule, test, p_holm in tests]  # fmt: skip
    heads = ("models", by, "difference in accuracy", "p (exact)", "p (exact, Holm)", "p (mid)", "records")
    caveats = dict.fromkeys(test.caveat for _, test, _ in tests if test.caveat)
    return Section("mcnemar", title, (*told, *caveats), (Table(heads, rows),))


def _labels_compared(
    comparison: Comparison, delong: Mapping[tuple[str, str, str], tuple[DeLongTest, float | None]]
) -> Section:
    """Every label of every pair, by the bootstrap over patients and by DeLong's test."""
    rows = []
    for pair in comparison.pairs:
        for label, found in pair.labels.items():
            test, p_holm = delong[pair.a, pair.b, label]
            n_pos = found.n_pos or 0
            low_high = UNDEFINED if test.ci95 is None else "{:+.3f} to {:+.3f}".format(*test.ci95)
            rows.append((
                f"{pair.a} − {pair.b}", label, str(n_pos), str(found.n - n_pos), difference_text(found),
                p_text(found.p), p_text(found.p_holm), low_high, p_text(test.p), p_text(p_holm),
                found.undefined_because or "",
            ))  # fmt: skip
    return Section("labels", "Label by label", (
        "Two ways to an interval and a p: resampled patients, and DeLong's variance. Where they disagree there are "
        "few records on one side.",
    ), (Table(("models", "of", "positive", "negative", "difference (95% interval)", "p", "p (Holm)",
               "DeLong's interval", "DeLong's p", "DeLong's p (Holm)", ""), rows),))  # fmt: skip
