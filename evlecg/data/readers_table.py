"""Any folder of WFDB records with a table of labels, and the table itself, which DICOM folders use, too.

The table is a CSV with a header (`,`, `;` or tab), one row a record:

    record,patient_id,split,age,sex,device,report,AFIB,LBBB,scar
    ward1/0001,77001,train,63,F,MAC 5500,"sinus rhythm, old scar",0,0,1
    ward1/0002,77002,,,,,,1,,0

- `record` (or `id`, `file_name`, `filename`, `path`): path below the folder without suffix; a bare name will do where
  it occurs once.
- one column a label: 1 present, 0 not present, empty not assessed. Or one column `labels` with the codes that are
  present, joined by `|` or `;` (`none`: assessed, and nothing found; empty: not assessed).
- all others are optional. Columns that never hold 0 or 1, and those whose name begins with `_`, are notes and are left
  out.

A label code that evlecg knows keeps its phrase; any other is asked for by its own name. A file `labels.yaml` beside
`labels.csv` (the table's name with `.yaml`) says it better: `scar: an old scar`.

Nothing that could identify a patient enters: patients are named by a hash, records by their path as far as it consists
of codes (`identity.py`), and statements of a report that may name someone are left out.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

from evlecg.data.gates import Unfit, mend
from evlecg.data.identity import hashed, public_path, public_statements, sentences
from evlecg.data.labels import LABELS
from evlecg.data.readers_base import Dropped, Lazy, Reading, ReadOptions, Source, parse_age, parse_sex, split_of
from evlecg.data.readers_wfdb import DEFAULT_GAIN, read_header, read_signal
from evlecg.errors import EvlecgError
from evlecg.schema import SPLITS, Record

TABLE = "labels.csv"
RECORD_COLUMNS = ("record", "id", "file_name", "filename", "path")  # the first of them that is there
OTHER_COLUMNS = ("patient_id", "split", "age", "sex", "device", "report", "labels")
SHAPE = "one column `record`, and one column a label with 0, 1 or empty (or one column `labels` with codes joined by |)"
_YES = frozenset({"1", "1.0", "true", "yes"})
_NO = frozenset({"0", "0.0", "false", "no"})
_EMPTY = frozenset({"", "nan", "na", "n/a", "none", "null"})
_SPLIT_NAMES = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}
_SUFFIX = re.compile(r"\.(?:hea|dat|mat|dcm)$", re.IGNORECASE)
_SEARCH_FOLDERS = 2000


class Row(NamedTuple):
    """One record of a table. Empty text where the table says nothing."""

    record: str
    labels: dict[str, bool]
    patient_id: str = ""  # its hash
    split: str = ""
    age: str = ""
    sex: str = ""
    device: str = ""
    report: str = ""
    n_left_out: int = 0  # statements of the report that may name someone


@dataclass(frozen=True)
class Table:
    """A table of labels.

    Attributes:
        rows: record -> its row.
        labels: label code -> phrase.
    """

    rows: dict[str, Row]
    labels: dict[str, str]

    def wanted(self, codes: tuple[str, ...]) -> dict[str, str]:
        """Those of `labels` that are asked for; all of them where nothing is asked for."""
        return {code: phrase for code, phrase in self.labels.items() if not codes or code in codes}


def holds_file(folder: Path, suffix: str) -> bool:
    """Whether a file of this suffix (any case) lies at or below a folder; gives up after 2,000 folders."""
    for count, (_, folders, files) in enumerate(os.walk(folder)):
        if any(name.lower().endswith(suffix) and not name.startswith(".") for name in files):
            return True
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if count > _SEARCH_FOLDERS:
            break
    return False


def read_table(source: Source, options: ReadOptions) -> Table | None:
    """The table of `options.table`, else labels.csv of the folder; None where there is neither.

    Raises:
        EvlecgError: it cannot be understood; the message names the column, or the line and the cell.
    """
    if options.table is None and not source.exists(TABLE):
        return None
    where = options.table or Path(TABLE)
    text = _text(source, options.table, TABLE)
    if text is None:
        raise EvlecgError("the label table does not exist", where=where)
    header_line = text.partition("\n")[0]
    delimiter = max(",;\t", key=header_line.count)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    names = [name.strip() for name in rows.fieldnames or ()]
    rows.fieldnames = names
    seen = f"it begins: {header_line.strip()[:200]}"
    if len(set(names)) < len(names):
        raise EvlecgError("the label table has two columns of one name", where=where, hint=seen)
    of_name = {name.lower(): name for name in names}
    key = next((of_name[name] for name in RECORD_COLUMNS if name in of_name), None)
    if key is None:
        raise EvlecgError("the label table has no column `record`", where=where, hint=f"{seen}; it needs {SHAPE}")
    others = {name: of_name[name] for name in OTHER_COLUMNS if name in of_name and of_name[name] != key}
    free = [name for name in names if name and not name.startswith("_") and name not in {key, *others.values()}]
    cells = [{name: (value or "").strip() for name, value in row.items() if isinstance(name, str)} for row in rows]
    if not cells:
        raise EvlecgError("the label table has no rows", where=where, hint=seen)
    columns = [name for name in free if _is_label_column(name, cells, where, strict="labels" not in others)]
    if "labels" in others and columns:
        what = f"the label table has a column `labels`, and label columns: {', '.join(columns[:5])}"
        raise EvlecgError(what, where=where, hint="keep one of the two; a name that begins with _ is left out")
    if "labels" not in others and not columns and "report" not in others:
        raise EvlecgError("the label table has no label column", where=where, hint=f"{seen}; it needs {SHAPE}")
    if "labels" in others:
        columns = sorted({code for row in cells for code in _codes(row[others["labels"]]) or ()})
    found: dict[str, Row] = {}
    for number, row in enumerate(cells, 2):
        record = _record_name(row[key])
        if not record:
            raise EvlecgError("a row of the label table names no record", where=f"{where}, row {number}")
        if record in found:
            raise EvlecgError(f"the label table has two rows for {record}", where=f"{where}, row {number}")
        labels = _listed(row[others["labels"]], columns) if "labels" in others else _cells(row, columns)
        text_of = {name: row[column] for name, column in others.items() if name not in ("labels", "split")}
        patient = text_of.pop("patient_id", "")
        split = _split(row[others["split"]], f"{where}, row {number}") if "split" in others else ""
        report, n_left_out = public_statements(sentences(text_of.pop("report", "")))
        found[record] = Row(
            record, labels, hashed(patient) if patient else "", split, **text_of, report=report, n_left_out=n_left_out
        )
    return Table(found, _phrases(source, options.table, columns))


def is_wfdb(folder: Path) -> bool:
    return holds_file(folder, ".hea")


class _Entry(NamedTuple):
    """A record of the folder or of the table; `stem` is empty where it is not in the folder."""

    name: str
    stem: str = ""
    row: Row | None = None
    ambiguous: bool = False


def open_wfdb(source: Source, options: ReadOptions) -> Reading:
    """The rows of the table, then the records that have none.

    Raises:
        EvlecgError: there is no table, or it cannot be understood.
    """
    table = read_table(source, options)
    if table is None:
        raise EvlecgError(
            "a folder of WFDB records needs a label table", where=TABLE, hint=f"--table FILE with {SHAPE}"
        )

    def read(entry: _Entry) -> Record:
        row = entry.row
        if row is None:
            raise Dropped("no row in the label table")
        source.path(entry.name)  # refuses a name that leads out of the folder
        if entry.ambiguous:
            raise Unfit("ambiguous: several records of this name, give the path")
        if not entry.stem:
            raise Dropped("listed, but not in this folder")
        patient_id = row.patient_id or hashed(entry.stem)  # without a patient, a record is one of its own
        header = read_header(source, f"{entry.stem}.hea")
        raw = read_signal(source, header)
        mended = mend(raw.values, raw.leads, raw.units, header.fs_hz)
        uncalibrated = any(channel.gain is None for channel in header.channels)
        repairs = (f"no gain in the header: {DEFAULT_GAIN:g} a mV, as WFDB says",) if uncalibrated else ()
        if row.n_left_out:
            repairs += (f"{row.n_left_out} statements left out: they may name someone",)
        return Record(
            id=public_path(entry.stem),
            signal_mV=mended.signal_mV,
            fs_hz=header.fs_hz,
            repairs=(*header.repairs, *repairs, *mended.repairs),
            patient_id=patient_id,
            labels=wanted_labels(row.labels, options.labels),
            split=row.split or split_of(patient_id, options.seed),
            age=parse_age(row.age or header.field("Age")),
            sex=parse_sex(row.sex or header.field("Sex")),
            report=row.report,
            device=row.device,
        )

    def entries() -> Iterator[_Entry]:
        stems = [path.removesuffix(".hea") for path in source.find(".hea")]
        matched: set[str] = set()
        for row, matches in match_rows(table, stems):
            matched.update(matches)
            yield _Entry(row.record, matches[0] if len(matches) == 1 else "", row, len(matches) > 1)
        yield from (_Entry(stem, stem) for stem in stems if stem not in matched)

    return Reading(
        None,
        Lazy(entries),
        lambda entry: public_path(entry.stem or entry.name),
        read,
        descriptions=table.wanted(options.labels),
    )


def match_rows(table: Table, stems: list[str]) -> Iterator[tuple[Row, list[str]]]:
    """Each row, with the files that it can mean: that of its path, else all of its bare name."""
    paths = set(stems)
    of_name: dict[str, list[str]] = {}
    for stem in stems:
        of_name.setdefault(stem.rpartition("/")[2], []).append(stem)
    for row in table.rows.values():
        if row.record in paths:
            yield row, [row.record]
        else:
            yield row, of_name.get(row.record, [])


def wanted_labels(labels: Mapping[str, bool], wanted: tuple[str, ...]) -> dict[str, bool]:
    """Labels of a table in the order asked for; all of them where nothing is asked for."""
    return {code: labels[code] for code in wanted or labels if code in labels}


def _text(source: Source, table: Path | None, name: str) -> str | None:
    """A text file of the folder, or the one beside a table that the user named; None where it is not there."""
    if table is None:
        return source.text(name) if source.exists(name) else None
    try:
        return table.read_bytes().decode("utf-8-sig", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise EvlecgError(f"a table cannot be read: {error.strerror}", where=table) from error


def _record_name(cell: str) -> str:
    name = _SUFFIX.sub("", cell.replace("\\", "/"))
    return os.path.normpath(name) if name else ""


def _is_label_column(name: str, rows: list[dict[str, str]], where: Path, *, strict: bool) -> bool:
    """Whether it holds 0, 1 or nothing; a mixture with other values is an error where `strict`, else no label."""
    cells = [row[name].lower() for row in rows]
    if not any(cell in _YES or cell in _NO for cell in cells):
        return False
    for number, cell in enumerate(cells, 2):
        if cell not in _YES and cell not in _NO and cell not in _EMPTY:
            if not strict:
                return False
            raise EvlecgError(
                f"the column {name!r} of the label table holds {cell[:40]!r}, which is neither 0, 1 nor empty",
                where=f"{where}, row {number}",
                hint="empty a cell that was not assessed; a column whose name begins with _ is left out",
            )
    return True


def _cells(row: Mapping[str, str], columns: list[str]) -> dict[str, bool]:
    return {name: row[name].lower() in _YES for name in columns if row[name].lower() not in _EMPTY}


def _codes(cell: str) -> list[str] | None:
    """Codes of a `labels` cell; None where it was not assessed."""
    codes = [code.strip() for code in re.split(r"[|;]", cell) if code.strip()]
    if codes and [code.lower() for code in codes] == ["none"]:
        return []
    return codes or None


def _listed(cell: str, columns: list[str]) -> dict[str, bool]:
    codes = _codes(cell)
    return {} if codes is None else {code: code in codes for code in columns}


def _split(cell: str, where: str) -> str:
    split = _SPLIT_NAMES.get(cell.lower(), cell.lower())
    if split and split not in SPLITS:
        raise EvlecgError(f"unknown split {cell!r}", where=where, hint=f"known: {', '.join(SPLITS)}, or empty")
    return split


def _phrases(source: Source, table: Path | None, codes: list[str]) -> dict[str, str]:
    """Label code -> phrase: from labels.yaml, else evlecg's own, else its name."""
    where = table.with_suffix(".yaml") if table else Path(TABLE).with_suffix(".yaml")
    text = _text(source, where if table else None, where.name)
    try:
        said = yaml.safe_load(text) if text is not None else {}
    except yaml.YAMLError as error:
        raise EvlecgError("the phrases of the labels are no YAML", where=where) from error
    said = {} if said is None else said
    if not isinstance(said, dict) or not all(isinstance(phrase, str) for phrase in said.values()):
        raise EvlecgError("the phrases of the labels are no list of `code: phrase`", where=where)
    said = {str(code): phrase.strip() for code, phrase in said.items()}  # YAML reads some codes as numbers
    unknown = sorted(set(said) - set(codes))
    if unknown:
        raise EvlecgError(
            f"a phrase for a label that the table does not have: {unknown[0]}",
            where=where,
            hint=f"it has: {', '.join(codes)[:200]}",
        )
    return {code: said.get(code) or LABELS.get(code) or _plain(code) for code in codes}


def _plain(code: str) -> str:
    """A column's name as words; abbreviations keep their capitals."""
    words = code.replace("_", " ").strip()
    return words if words.isupper() else words.lower()
