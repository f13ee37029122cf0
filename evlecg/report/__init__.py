"""One model on one dataset: `Report` -> report.json for machines, report.md and report.html for readers.

The JSON keys are an interface (CI jobs read them); more may be added, none renamed. Undefined numbers are null there
and an en dash in tables. The pages answer first what a reader asks first: how good, on how many patients, and where it
is worst; then every label, what was left out and why, how each number is formed, and provenance.
"""

from __future__ import annotations

from pathlib import Path

from evlecg.files import write_text_atomic
from evlecg.report.comparison import (
    AnswerComparison,
    ModelComparison,
    compare_answers,
    compare_models,
    comparison_dict,
    comparison_markdown,
    comparison_table,
    on_shared,
    write_answer_comparison,
    write_comparison,
)
from evlecg.report.data import SCORE_FORMULAS, Cost, Report, Robustness, TextSection, environment
from evlecg.report.gates import GateResult, Gates, check_gates, write_junit
from evlecg.report.html import to_html
from evlecg.report.markdown import to_markdown
from evlecg.report.measured import Measured, WorstRecord, measure, worst_records
from evlecg.report.sections import UNDEFINED, Section, Table, counted, estimate_text, summary

__all__ = [
    "SCORE_FORMULAS",
    "UNDEFINED",
    "AnswerComparison",
    "Cost",
    "GateResult",
    "Gates",
    "Measured",
    "ModelComparison",
    "Report",
    "Robustness",
    "Section",
    "Table",
    "TextSection",
    "WorstRecord",
    "check_gates",
    "compare_answers",
    "compare_models",
    "comparison_dict",
    "comparison_markdown",
    "comparison_table",
    "counted",
    "environment",
    "estimate_text",
    "measure",
    "on_shared",
    "summary",
    "to_html",
    "to_markdown",
    "worst_records",
    "write_answer_comparison",
    "write_comparison",
    "write_junit",
    "write_report",
]


def write_report(report: Report, out: Path) -> None:
    """Writes `report.json`, `report.md` and `report.html` into the folder `out`, each whole or not at all.

    Raises:
        EvlecgError: the folder cannot be written to.
    """
    texts = {"report.json": report.to_json(), "report.md": to_markdown(report), "report.html": to_html(report)}
    for name, text in texts.items():  # all were made before the first is written
        write_text_atomic(out / name, text)
