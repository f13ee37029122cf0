"""Quality gates of an unattended refresh: what was asked, what was found, whether it is met.

A gate compares the point estimate; its interval is stated beside it. Whoever wants certainty asks for a margin: with
few patients the lower end of an interval lies far below the value, and a gate on it would fail for want of patients.
A number that is undefined meets no gate.
"""

from __future__ import annotations

import xml.etree.ElementTree as xml
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from evlecg.errors import EvlecgError
from evlecg.files import write_text_atomic
from evlecg.metrics import Difference, Estimate, Estimates

ALLOWED_DROP = 0.01  # macro AUROC; about what another seed moves


@dataclass(frozen=True)
class Gates:
    """What a report has to reach.

    Attributes:
        min_auc: least macro AUROC.
        min_label_auc: label -> least AUROC.
        max_drop_vs: folder of an older report that is not to be fallen behind.
        max_drop: by how much macro AUROC may be lower than there, on the records of both; of answers in words, the
            number of every subset, on the questions of both.
        min_score: name -> least value of another number: of decisions (`auc_hard`, `f1`, `accuracy`, ...), or of
            answers in words (a subset, or SUBSET.METRIC).
    """

    min_auc: float | None = None
    min_label_auc: Mapping[str, float] = field(default_factory=dict)
    max_drop_vs: Path | None = None
    max_drop: float = ALLOWED_DROP
    min_score: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        asked = {"--min-auc": self.min_auc, **{f"--min-label-auc {label}": least
                                               for label, least in self.min_label_auc.items()}}  # fmt: skip
        for option, least in asked.items():
            if least is not None and not 0 <= least <= 1:
                raise EvlecgError(f"an AUROC lies between 0 and 1, not at {least:g}", where=option)
        if self.max_drop < 0:
            raise EvlecgError(f"a drop of {self.max_drop:g} would ask for a gain", where="--max-drop",
                              hint="0 or more")  # fmt: skip


@dataclass(frozen=True)
class GateResult:
    """One gate.

    Attributes:
        name: the option, as it was asked.
        met: whether the value reaches what was asked.
        asked: the bound.
        value, ci95: what was found; None where undefined.
        detail: the same as a sentence.
    """

    name: str
    met: bool
    asked: float
    value: float | None
    ci95: tuple[float, float] | None
    detail: str

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ci95": None if self.ci95 is None else list(self.ci95)}


def check_gates(
    gates: Gates,
    auroc: Estimates | None,
    drops: Mapping[str, Difference] | None = None,
    scores: Mapping[str, Estimate] | None = None,
) -> tuple[GateResult, ...]:
    """Every gate that was asked for, in the order of the options.

    Args:
        gates: what was asked.
        auroc: of the report; None where answers in words are reported.
        drops: name of a number -> that of the older report minus this one's, on the same records; for `max_drop_vs`.
        scores: what `min_score` may name.

    Raises:
        EvlecgError: an AUROC is asked of answers in words, or a score that is not there.
    """
    results = []
    if auroc is None and (gates.min_auc is not None or gates.min_label_auc):
        raise EvlecgError("answers in words have no AUROC", where="--min-auc, --min-label-auc",
                          hint="--min-score NAME=VALUE")  # fmt: skip
    if auroc is not None and gates.min_auc is not None:
        results.append(_least("--min-auc", "macro AUROC", gates.min_auc, auroc.headline))
    labels = auroc.labels if auroc is not None else {}
    for label, least in gates.min_label_auc.items():
        results.append(_least(f"--min-label-auc {label}", f"AUROC of {label}", least, labels[label]))
    for name, least in gates.min_score.items():
        found = (scores or {}).get(name)
        if found is None:
            raise EvlecgError(f"the gate's score {name!r} is not in the report", where="--min-score",
                              hint=f"one of {', '.join(scores or ())}")  # fmt: skip
        results.append(_least(f"--min-score {name}", name, least, found))
    if gates.max_drop_vs is not None:
        assert drops
        for what, drop in drops.items():
            met = drop.value is not None and drop.value <= gates.max_drop
            if drop.value is None:
                detail = f"the drop of {what} is undefined: {drop.undefined_because}"
            else:
                unit = "records" if auroc is not None else "questions"
                detail = (f"{what} is {drop.value:+.3f} lower{_in_brackets(drop.ci95, sign='+')} than in "
                          f"{gates.max_drop_vs} on the same {drop.n} {unit}, allowed: {gates.max_drop:g}")  # fmt: skip
            name = "--max-drop-vs" if auroc is not None else f"--max-drop-vs {what}"
            results.append(GateResult(name, met, gates.max_drop, drop.value, drop.ci95, detail))
    return tuple(results)


def _least(name: str, what: str, least: float, found: Estimate) -> GateResult:
    if found.value is None:
        detail = f"{what} is undefined: {found.undefined_because}"
    else:
        detail = f"{what} is {found.value:.3f}{_in_brackets(found.ci95)} on {found.n} records, asked: {least:g} or more"
    return GateResult(name, found.value is not None and found.value >= least, least, found.value, found.ci95, detail)


def _in_brackets(ci95: tuple[float, float] | None, sign: str = "") -> str:
    return "" if ci95 is None else f" ({ci95[0]:{sign}.3f} to {ci95[1]:{sign}.3f})"


def write_junit(path: Path, results: Sequence[GateResult], suite: str) -> None:
    """The gates as JUnit XML, which CI systems show as tests.

    Raises:
        EvlecgError: the file cannot be written.
    """
    failed = sum(not result.met for result in results)
    root = xml.Element("testsuites", tests=str(len(results)), failures=str(failed), errors="0")
    cases = xml.SubElement(root, "testsuite", name=suite, tests=str(len(results)), failures=str(failed), errors="0")
    for result in results:
        case = xml.SubElement(cases, "testcase", classname="evlecg.gates", name=result.name)
        if not result.met:
            xml.SubElement(case, "failure", message=result.detail, type="gate").text = result.detail
        xml.SubElement(case, "system-out").text = result.detail
    xml.indent(root)
    write_text_atomic(path, '<?xml version="1.0" encoding="UTF-8"?>\n' + xml.tostring(root, encoding="unicode") + "\n")
