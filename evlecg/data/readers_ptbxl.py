"""PTB-XL: labels and folds in one table, signals at 500 and 100 Hz."""

from __future__ import annotations

import ast
import csv
import io
from dataclasses import dataclass
from pathlib import Path

from evlecg.data.gates import mend
from evlecg.data.labels import SCP_ALIASES, SCP_RHYTHM, SUPERCLASSES, judge
from evlecg.data.readers_base import Dropped, Reading, ReadOptions, Source, parse_age
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
        superclass: diagnostic code -> its class.
        codes: all codes, as labels of ours.
    """

    superclass: dict[str, str]
    codes: frozenset[str]


def read_statements(source: Source) -> Statements:
    """Reads scp_statements.csv; its first column, without a name, holds the code."""
    rows = list(csv.DictReader(io.StringIO(source.text("scp_statements.csv"), newline="")))
    superclass = {row[""]: row["diagnostic_class"] for row in rows if row["diagnostic"].strip() in ("1", "1.0")}
    return Statements(superclass, frozenset(SCP_ALIASES.get(row[""], row[""]) for row in rows))


def ptbxl_labels(wanted: tuple[str, ...], scp_codes: frozenset[str], statements: Statements) -> dict[str, bool]:
    """Labels of a record from its statements, whatever their likelihood (0 means present, ungraded).

    Superclasses count as assessed where there is a diagnostic statement, rhythms where there is a rhythm statement.

    Raises:
        Dropped: only superclasses are wanted, and the record has none (as in the published benchmark).
    """
    classes = {statements.superclass[code] for code in scp_codes if code in statements.superclass}
    present = {SCP_ALIASES.get(code, code) for code in scp_codes}
    assessed = set(statements.codes) - set(SCP_RHYTHM)
    assessed -= set(SUPERCLASSES)  # NORM is a code, too: as a label it is the class
    if classes:
        assessed.update(SUPERCLASSES)
    elif set(wanted) <= set(SUPERCLASSES):
        raise Dropped("no diagnostic class")
    if present & set(SCP_RHYTHM):
        assessed.update(SCP_RHYTHM)
    return judge(wanted, present=present | classes, assessed=assessed)


@dataclass(frozen=True)
class _Row:
    id: str
    cells: dict[str, str]


def open_ptbxl(source: Source, options: ReadOptions) -> Reading:
    """Rows of the table; signals where its file name column says, or flat in the folder of their rate."""
    fs_hz = options.fs_hz or 500
    if fs_hz not in SUFFIXES:
        raise EvlecgError(f"PTB-XL has no records at {fs_hz} Hz", hint="fs can be 500 or 100")
    suffix = SUFFIXES[fs_hz]
    statements = read_statements(source)
    table = next(name for name in TABLES if source.exists(name))
    rows = [
        _Row(f"{int(float(cells['ecg_id'])):05d}", cells)
        for cells in csv.DictReader(io.StringIO(source.text(table), newline=""))
    ]

    def read(row: _Row) -> Record:
        stem = row.cells.get(f"filename_{suffix}") or ""
        if not (stem and source.exists(f"{stem}.hea")):
            stem = f"records{fs_hz}/{row.id}_{suffix}"
        if not source.exists(f"{stem}.hea"):
            raise Dropped("listed, but not in this copy")
        labels = ptbxl_labels(options.labels, _scp_codes(row.cells), statements)  # before the signal: it may drop it
        header = read_header(source, f"{stem}.hea")
        raw = read_signal(source, header)
        mended = mend(raw.values, raw.leads, raw.units, header.fs_hz)
        return Record(
            id=row.id,
            patient_id=str(int(float(row.cells["patient_id"]))),
            signal_mV=mended.signal_mV,
            fs_hz=header.fs_hz,
            labels=labels,
            split=SPLIT_OF_FOLD[int(float(row.cells["strat_fold"]))],
            age=parse_age(row.cells.get("age") or ""),
            sex={"0": "M", "1": "F"}.get((row.cells.get("sex") or "").strip().removesuffix(".0")),
            report=(row.cells.get("report") or "").strip(),
            repairs=(*header.repairs, *mended.repairs),
        )

    return Reading(len(rows), rows, lambda row: row.id, read)


def _scp_codes(cells: dict[str, str]) -> frozenset[str]:
    if cells.get("scp_codes"):
        try:
            return frozenset(ast.literal_eval(cells["scp_codes"]))
        except (SyntaxError, TypeError) as error:
            raise ValueError("scp_codes is not a dict literal") from error
    return frozenset((cells.get("scp_codes_present") or "").split())
