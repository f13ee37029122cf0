"""Sections as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from evlecg.report.data import Report
from evlecg.report.sections import Section, Table, sections, summary


def to_markdown(report: Report) -> str:
    """The content of report.md."""
    head, *rest = summary(report)
    lines = [f"# {cell(report.model)} on {cell(report.dataset)} ({report.split})", "", head, ""]
    lines += [*(f"- {line}" for line in rest), ""] if rest else []
    return "\n".join([*lines, *section_lines(sections(report))])


def section_lines(found: Iterable[Section]) -> list[str]:
    """Every section: heading, sentences as a list where there are several, tables."""
    lines = []
    for section in found:
        lines += ["#" * section.level + " " + cell(section.title), ""]
        if section.lines:
            listed = len(section.lines) > 1 or section.key in ("left_out", "formulas")
            lines += [*(f"- {cell(line)}" if listed else cell(line) for line in section.lines), ""]
        for shown in section.tables:
            lines += [*table_lines(shown), ""]
    return lines


def table_lines(table: Table) -> list[str]:
    rows: Sequence[Sequence[str]] = [table.columns, ["---"] * len(table.columns), *table.rows]
    return ["| " + " | ".join(cell(text) for text in row) + " |" for row in rows]


def cell(text: str) -> str:
    """Text that neither ends a table cell nor a line."""
    return " ".join(text.split()).replace("|", "\\|")
