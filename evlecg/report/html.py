"""Sections as one self-contained page: styles and pictures inline, no script, nothing fetched."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from evlecg.report import plots
from evlecg.report.data import Report
from evlecg.report.measured import Measured
from evlecg.report.sections import Section, Table, estimate_text, interval, number, sections, summary

LONG, LONG_FIRST = 32, 20  # characters from which a cell is broken into lines; the first column stays in sight
FOLDED = ("formulas", "provenance")  # long, and looked up rather than read

STYLE = """
:root { color-scheme: light; --ink: #1f2933; --dim: #5b6773; --line: #d9dee3; --good: #1b7f4b; --bad: #b3261e; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p, li { max-width: 48rem; overflow-wrap: anywhere; }
.dim, figcaption { color: var(--dim); }
.facts { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0; }
.fact { flex: 1 1 10rem; border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .9rem; min-width: 0; }
.fact b { display: block; font-size: 1.5rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.fact span { color: var(--dim); font-size: .875rem; overflow-wrap: anywhere; }
.good b, .good { color: var(--good); } .bad b, .bad { color: var(--bad); }
.scroll { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--dim); font-weight: 600; vertical-align: bottom; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); }
td { vertical-align: top; white-space: nowrap; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; }
td.text { white-space: normal; min-width: 12rem; max-width: 34rem; overflow-wrap: anywhere; }
td.text:first-child { min-width: 8rem; max-width: 45vw; }
td.num, th.num { text-align: right; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; display: block; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(45%, 16rem), 1fr)); gap: .75rem;
  max-width: 56rem; margin-bottom: .5rem; } .panels img { width: 100%; }
.pages { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1.25rem; }
.pages figure { margin: 0; } .pages img { border: 1px solid var(--line); width: 100%; }
details summary { cursor: pointer; font-size: 1.15rem; font-weight: 600; margin: 2.5rem 0 .5rem; padding-top: .75rem;
  border-top: 1px solid var(--line); }
@media print { details { display: block; } .scroll { overflow: visible; } }
"""


def to_html(report: Report) -> str:
    """The content of report.html."""
    which = "all records" if report.split == "all" else f"{report.split} split"
    body = [f"<h1>{escape(report.model)}</h1>", f'<p class="dim">on {escape(report.dataset)}, {which}</p>']
    body += _facts(report)
    head, *rest = summary(report)
    body += [f"<p>{_marked(head)}</p>", "<ul>", *(f"<li>{_marked(line)}</li>" for line in rest), "</ul>"]
    for section in sections(report):
        pictures = []
        if report.measured and section.key == "labels":
            pictures = _roc(report.measured)
        elif report.measured and section.key == "calibration":
            pictures = _calibration(report.measured)
        elif section.key == "worst":
            pictures = _pages(report)
        body += section_html(section, pictures)
    return page_html(f"{report.model} on {report.dataset} ({report.split})", body)


def page_html(title: str, body: Iterable[str]) -> str:
    """A whole page."""
    return "\n".join([
        "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", "</head>", "<body>", *body, "</body>", "</html>",
        "",
    ])  # fmt: skip


def section_html(section: Section, pictures: Sequence[str] = ()) -> list[str]:
    title = escape(section.title)
    inside = []
    if len(section.lines) > 1 or (section.lines and section.key in ("left_out", "formulas")):
        inside += ["<ul>", *(f"<li>{_marked(line)}</li>" for line in section.lines), "</ul>"]
    else:
        inside += [f"<p>{_marked(line)}</p>" for line in section.lines]
    inside += [line for table in section.tables for line in _table(table)]
    inside += pictures
    if section.key in FOLDED:
        return ["<details>", f"<summary>{title}</summary>", *inside, "</details>"]
    return [f"<h{section.level}>{title}</h{section.level}>", *inside]


def _facts(report: Report) -> list[str]:
    facts = []
    if report.macro is not None:
        shown = "" if report.macro.ci95 is None else f", 95% interval {interval(report.macro.ci95)}"
        facts.append(("", number(report.macro.value), f"macro AUROC{shown}"))
    facts.append(("", f"{report.n_patients:,}", f"patients, {report.n_records:,} records"))
    if report.weakest is not None:
        facts.append(("", report.weakest, f"weakest label: {estimate_text(report.label_aucs[report.weakest])}"))
    if report.gates:
        n_met = sum(gate.met for gate in report.gates)
        mood = "good" if report.gates_met else "bad"
        facts.append((mood, f"{n_met} of {len(report.gates)}", "gates met" if n_met else "gates met: none"))
    return [
        '<div class="facts">',
        *(f'<div class="fact {mood}"><b>{escape(value)}</b><span>{escape(what)}</span></div>'
          for mood, value, what in facts),
        "</div>",
    ]  # fmt: skip


def _roc(measured: Measured) -> list[str]:
    drawn = {label: curve for label, curve in measured.curves.items() if curve.x}
    values = {label: measured.auroc.labels[label].value or 0.0 for label in drawn}
    chosen = sorted(drawn, key=values.__getitem__)[: plots.PANELS]
    which = f" of the {len(chosen)} weakest labels" if len(chosen) < len(drawn) else ""
    return _panels({label: plots.roc_plot(f"{label}, {values[label]:.3f}", drawn[label]) for label in chosen},
                   f"ROC curves{which}, with their AUROC; dashed: chance.")  # fmt: skip


def _calibration(measured: Measured) -> list[str]:
    """Of labels with both classes: where a label never occurs, every score is too high, and no plot is needed."""
    drawn = {label: curve for label, curve in measured.calibrated.curves.items()
             if measured.auroc.labels[label].value is not None}  # fmt: skip
    errors = {label: measured.calibrated.ece.labels[label].value or 0.0 for label in drawn}
    chosen = sorted(drawn, key=errors.__getitem__, reverse=True)[: plots.PANELS]
    which = f" of the {len(chosen)} labels with the highest ECE" if len(chosen) < len(drawn) else ""
    return _panels(
        {label: plots.calibration_plot(f"{label}, ECE {errors[label]:.3f}", drawn[label]) for label in chosen},
        f"Reliability{which}: share of records in which the label is present against the mean score, in ten bins of "
        f"equal width; dots grow with the number of records and are hollow below {plots.FEW}; whiskers are 95% "
        "intervals, where there are patients enough for one. A calibrated model lies on the dashed line.",
    )


def _panels(pictures: Mapping[str, bytes], caption: str) -> list[str]:
    """Small pictures in as many columns as there is room for."""
    if not pictures:
        return []
    images = [_image(content, "image/svg+xml", label) for label, content in pictures.items()]
    return ['<figure><div class="panels">', *images, "</div>", f"<figcaption>{escape(caption)}</figcaption></figure>"]


def _pages(report: Report) -> list[str]:
    shown = [record for record in report.worst if record.page_png]
    if not shown:
        return []
    return ['<div class="pages">', *(
        _figure(record.page_png, "image/png", f"{record.record_id}: {record.label} is "
                f"{'present' if record.truth else 'absent'}, score {record.score:.3f}")
        for record in shown
    ), "</div>"]  # fmt: skip


def _figure(content: bytes, kind: str, caption: str) -> str:
    return f"<figure>{_image(content, kind, caption)}<figcaption>{escape(caption)}</figcaption></figure>"


def _image(content: bytes, kind: str, told: str) -> str:
    return f'<img src="data:{kind};base64,{base64.b64encode(content).decode()}" alt="{escape(told)}">'


def _table(table: Table) -> list[str]:
    numeric = [all(_is_number(row[k]) for row in table.rows) and any(row[k] for row in table.rows)
               for k in range(len(table.columns))]  # fmt: skip
    lines = ['<div class="scroll"><table>', "<thead><tr>"]
    lines += [f"<th{' class=num' if right else ''}>{escape(name)}</th>"
              for name, right in zip(table.columns, numeric, strict=True)]  # fmt: skip
    lines += ["</tr></thead>", "<tbody>"]
    for row in table.rows:
        cells = []
        for place, (text, right) in enumerate(zip(row, numeric, strict=True)):
            kind = "num" if right else "bad" if text == "NOT MET" else "good" if text == "met" else ""
            kind = kind or ("text" if len(text) > (LONG if place else LONG_FIRST) else "")
            cells.append(f"<td{f' class={kind}' if kind else ''}>{escape(text)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return [*lines, "</tbody>", "</table></div>"]


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"[<+-]?[\d.,]+|–|", text))


def _marked(line: str) -> str:
    """Escaped text whose **bold** parts are so."""
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(line))
