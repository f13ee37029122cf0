"""PTB-XL: labels and folds in one table, signals at 500 and 100 Hz.

A statement counts whatever its likelihood (0 means present, ungraded). What a record says nothing of is not "no": its
diagnostic statements, subclasses and superclasses count as assessed where it has a diagnostic statement, its rhythms
where it has a rhythm statement, its form statements where it has a diagnostic or a form statement (somebody looked at
the waves). Where only labels of one kind are wanted, records without a statement of that kind are dropped, as in the
published benchmark; its task of all 71 counts silence as absence instead, for some 400 records without a diagnosis and
some 800 without a rhythm.
"""

from __future__ import annotations

import ast
import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from evlecg.data.gates import mend
from evlecg.data.labels import (
    SCP_ALIASES,
    SCP_DIAGNOSTIC,
    SCP_FORM,
    SCP_RHYTHM,
    SCP_SUBCLASSES,
    SUBCLASS_ALIASES,
    SUPERCLASSES,
    judge,
)
from evlecg.data.readers_base import Dropped, Listing, Reading, ReadOptions, Source, parse_age
from evlecg.data.readers_wfdb import read_header, read_signal
from evlecg.errors import EvlecgError
from evlecg.schema import Record

TABLES = ("ptbxl_database.csv", "labels_subset.csv")  # as published; the table of a partial copy
SUFFIXES = {500: "hr", 100: "lr"}
SPLIT_OF_FOLD = dict.fromkeys(range(1, 9), "train") | {9: "val", 10: "test"}


def is_ptbxl(folder: Path) -> bool:
    return (folder / "scp_statements.csv").is_file() and any((folder / table).is_file() for table in TABLES)


@dataclass(frozen=True)
class Statements:
    """scp_statements.csv.

    Attributes:
        classes: diagnostic code -> its superclass and its subclass, as labels of ours.
        codes: all codes, as labels of ours.
    """

    classes: dict[str, tuple[str, ...]]
    codes: frozenset[str]


def read_statements(source: Source) -> Statements:
    """Reads scp_statements.csv; its first column, without a name, holds the code.

    Raises:
        EvlecgError: the file has no such columns.
    """
    rows = list(csv.DictReader(io.StringIO(source.text("scp_statements.csv"), newline="")))
    if not rows or not {"", "diagnostic", "diagnostic_class", "diagnostic_subclass"} <= set(rows[0]):
        raise EvlecgError("not the statements of PTB-XL", where="scp_statements.csv", hint="download it again")
    classes = {}
    for row in rows:
        if row["diagnostic"].strip() in ("1", "1.0"):
            subclass = row["diagnostic_subclass"]
            classes[row[""]] = (row["diagnostic_class"], SUBCLASS_ALIASES.get(subclass, subclass))
    return Statements(classes, frozenset(SCP_ALIASES.get(row[""], row[""]) for row in rows))


def ptbxl_labels(wanted: tuple[str, ...], scp_codes: frozenset[str], statements: Statements) -> dict[str, bool]:
    """Labels of a record from its statements, as the module's head says.

    Args:
        wanted: label codes.
        scp_codes: PTB-XL's codes of the record.
        statements: its table.

    Raises:
        Dropped: only labels of one kind are wanted, and the record has no statement of that kind.
    """
    classes = {part for code in scp_codes if code in statements.classes for part in statements.classes[code]}
    present = {SCP_ALIASES.get(code, code) for code in scp_codes}
    diagnostic = {*SUPERCLASSES, *SCP_SUBCLASSES, *SCP_DIAGNOSTIC}
    assessed: set[str] = set()
    if classes:
        aggregated = {part for parts in statements.classes.values() for part in parts}
        assessed |= (statements.codes & set(SCP_DIAGNOSTIC)) | aggregated | set(SUPERCLASSES)
    if classes or present & set(SCP_FORM):
        assessed |= (statements.codes & set(SCP_FORM)) - diagnostic
    if present & set(SCP_RHYTHM):
        assessed |= statements.codes & set(SCP_RHYTHM)
    for kind, missing, has in (
        (diagnostic, "no diagnostic class", bool(classes)),
        (set(SCP_RHYTHM), "no rhythm statement", bool(present & set(SCP_RHYTHM))),
        (set(SCP_FORM), "no form statement", bool(present & set(SCP_FORM))),
    ):
        if not has and kind.issuperset(wanted):
            raise Dropped(missing)
    return judge(wanted, present=present | classes, assessed=assessed)


class _Row(NamedTuple):
    id: str
    stem: str  # path of the signals, without suffix; "" where the table does not say
    patient_id: str
    fold: str
    age: str
    sex: str
    report: str
    device: str
    scp_codes: str  # dict literal
    codes: str  # those of a partial copy's table, separated by spaces


def open_ptbxl(source: Source, options: ReadOptions) -> Reading:
    """Rows of the table; signals where its file name column says, or flat in the folder of their rate."""
    fs_hz = options.fs_hz or 500
    if fs_hz not in SUFFIXES:
        raise EvlecgError(f"PTB-XL has no records at {fs_hz} Hz", hint="fs can be 500 or 100")
    suffix = SUFFIXES[fs_hz]
    statements = read_statements(source)

    def read(row: _Row) -> Record:
        codes = _scp_codes(row)
        labels = ptbxl_labels(options.labels, codes, statements)  # before the signal: it may drop the record
        header = None
        for stem in filter(None, (row.stem, f"records{fs_hz}/{row.id}_{suffix}")):
            try:
                header = read_header(source, f"{stem}.hea")
                break
            except FileNotFoundError:
                continue
        if header is None:
            raise Dropped("listed, but not in this copy")
        raw = read_signal(source, header)
        mended = mend(raw.values, raw.leads, raw.units, header.fs_hz)
        return Record(
            id=row.id,
            patient_id=str(int(float(row.patient_id))),
            signal_mV=mended.signal_mV,
            fs_hz=header.fs_hz,
            labels=labels,
            split=SPLIT_OF_FOLD[int(float(row.fold))],
            age=parse_age(row.age),
            sex={"0": "M", "1": "F"}.get(row.sex.removesuffix(".0")),
            report=row.report,
            repairs=(*header.repairs, *mended.repairs),
            device=" ".join(row.device.split()),
        )

    return Reading(None, Listing(lambda: _list(source, f"filename_{suffix}")), lambda row: row.id, read)


def _list(source: Source, filename: str) -> list[_Row]:
    table = next(name for name in TABLES if source.exists(name))
    columns = (filename, "patient_id", "strat_fold", "age", "sex", "report", "device", "scp_codes", "scp_codes_present")
    rows = []
    for cells in csv.DictReader(io.StringIO(source.text(table), newline="")):
        try:
            name = f"{int(float(cells['ecg_id'])):05d}"
        except (KeyError, TypeError, ValueError) as error:
            raise EvlecgError("a row without an ecg_id", where=table, hint="download the table again") from error
        rows.append(_Row(name, *((cells.get(column) or "").strip() for column in columns)))
    return rows


def _scp_codes(row: _Row) -> frozenset[str]:
    if not row.scp_codes:
        return frozenset(row.codes.split())
    try:
        return frozenset(ast.literal_eval(row.scp_codes))
    except (SyntaxError, TypeError) as error:
        raise ValueError("scp_codes is not a dict literal") from error
