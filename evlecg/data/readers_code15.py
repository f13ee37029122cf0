"""CODE-15%: one table of exams, and HDF5 parts of up to 20,000 tracings.

A part is never held in memory: its tracings are read one by one, or, where it is stored in chunks, by a few rows at a
time, since a chunk can only be unpacked whole. Exams are joined by the part's own `exam_id`, not by row; the all-zero
row with exam_id 0 that ends every part belongs to nobody. Parts that are not there are normal (most users fetch a few):
their exams are dropped, with the reason.

Unit: millivolt, whatever the dataset's card says (1e-4 V). The real tracings beside this checkout decide: with baseline
wander taken out (running median of 0.4 s), lead II spans 1.8 mV in the median of 114 (0.5 to 99.5 % of samples), and
0.8 to 1.0 mV in LUDB, PTB-XL, CPSC2018 and CinC 2021. As 1e-4 V it would span 0.18 mV, and most leads would be flat.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from evlecg.data.gates import Unfit, mend
from evlecg.data.labels import judge
from evlecg.data.readers_base import Dropped, Lazy, Reading, ReadOptions, Source, parse_age, split_of
from evlecg.errors import EvlecgError
from evlecg.schema import LEADS, Record

if TYPE_CHECKING:
    import h5py

TABLE = "exams.csv"
FS_HZ = 400.0
LABEL_COLUMNS = {  # column -> label
    "1dAVb": "1AVB",
    "RBBB": "RBBB",
    "LBBB": "LBBB",
    "SB": "SBRAD",
    "ST": "STACH",
    "AF": "AFIB",
    "normal_ecg": "NORM",
}
NEEDED = ("exam_id", "age", "is_male", "patient_id", "trace_file", *LABEL_COLUMNS)
SHARD = 256
BYTES_AT_ONCE = 64 << 20  # of tracings stored in chunks: 341 of them; larger chunks are read several times over
_PART = re.compile(r"exams_part(\d+)\.(?:hdf5|h5)")
_NO_AGE = -1


class _Entry(NamedTuple):
    """One exam; `dropped` or `fault` says why it cannot be read."""

    exam_id: int
    part: str = ""  # path below the source's root
    row: int = 0
    patient_id: int = 0
    age: float = _NO_AGE
    is_male: bool = False
    labels: int = 0  # bit k: the k-th of `LABEL_COLUMNS`
    dropped: str = ""
    fault: str = ""


_EXAM = np.dtype(
    [("id", "i8"), ("patient", "i8"), ("age", "f4"), ("male", "?"), ("labels", "u1"), ("part", "i2")], align=True
)


def is_code15(folder: Path) -> bool:
    return (folder / TABLE).is_file()


def open_code15(source: Source, options: ReadOptions) -> Reading:
    """Tracings part by part, in their order; then the exams whose tracing is not in this copy."""
    reader = _TracingReader(source)

    def read(entry: _Entry) -> Record:
        if entry.dropped:
            raise Dropped(entry.dropped)
        if entry.fault:
            raise Unfit(entry.fault)
        mended = mend(reader.read_mV(entry.part, entry.row), LEADS, ("mV",) * len(LEADS), FS_HZ)
        present = {code for bit, code in enumerate(LABEL_COLUMNS.values()) if entry.labels >> bit & 1}
        return Record(
            id=str(entry.exam_id),
            patient_id=str(entry.patient_id),
            signal_mV=mended.signal_mV,
            fs_hz=FS_HZ,
            labels=judge(options.labels, present=present, assessed=set(LABEL_COLUMNS.values())),
            split=split_of(str(entry.patient_id), options.seed),
            age=parse_age(str(entry.age)),
            sex="M" if entry.is_male else "F",
            repairs=mended.repairs,
        )

    return Reading(
        None, Lazy(lambda: _entries(source)), lambda entry: str(entry.exam_id), read, shard=_shard_size(source)
    )


def _rows_at_once(tracings: h5py.Dataset) -> int:
    """Rows of a chunk, as far as they may be held: a chunk is read and unpacked whole."""
    rows = tracings.chunks[0] if tracings.chunks else 1
    row_bytes = int(np.prod(tracings.shape[1:])) * tracings.dtype.itemsize
    return max(1, min(rows, BYTES_AT_ONCE // row_bytes))


def _shard_size(source: Source) -> int:
    """Entries a shard: whole chunks, so that two workers seldom read the same one."""
    import h5py

    for path in _parts(source)[:1]:
        try:
            with h5py.File(source.path(path), "r", locking=False) as file:
                tracings = file["tracings"]
                if isinstance(tracings, h5py.Dataset) and tracings.ndim == 3 and tracings.chunks:
                    rows = _rows_at_once(tracings)
                    return -(-SHARD // rows) * rows
        except (OSError, KeyError):
            pass  # said where it is read
    return SHARD


def _parts(source: Source) -> list[str]:
    """Paths of the parts, by number."""
    found: dict[int, str] = {}
    for path in source.find((".hdf5", ".h5")):
        if match := _PART.fullmatch(path.rpartition("/")[2]):
            found.setdefault(int(match[1]), path)
    return [found[number] for number in sorted(found)]


class _TracingReader:
    """Reads tracings row by row; keeps one part open, and the few rows that were unpacked together."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._part = ""
        self._file: h5py.File | None = None
        self._tracings: h5py.Dataset | None = None
        self._rows = np.empty((0, 0, 0))
        self._first = 0

    def read_mV(self, part: str, row: int) -> np.ndarray:
        """float32 [12, T] of one row.

        Raises:
            Unfit: the part holds no tracings of 12 leads.
            OSError: the part is missing or damaged.
        """
        if part != self._part or self._tracings is None:
            self._tracings = self._open(part)
        tracings = self._tracings
        if tracings.chunks is None:
            return np.ascontiguousarray(np.asarray(tracings[row], np.float32).T)
        if not self._first <= row < self._first + len(self._rows):
            step = _rows_at_once(tracings)
            self._first = row // step * step
            self._rows = np.asarray(tracings[self._first : self._first + step])
        return np.ascontiguousarray(self._rows[row - self._first].T, np.float32)

    def _open(self, part: str) -> h5py.Dataset:
        import h5py

        if self._file is not None:
            self._file.close()
        self._part, self._tracings, self._rows = "", None, np.empty((0, 0, 0))
        self._file = h5py.File(self._source.path(part), "r", locking=False)  # the folder may be read-only
        tracings = self._file.get("tracings")
        if not isinstance(tracings, h5py.Dataset) or tracings.ndim != 3 or tracings.shape[2] != len(LEADS):
            raise Unfit("wrong shape: the part holds no tracings of [exams, samples, 12]")
        self._part = part
        return tracings


def _entries(source: Source) -> Iterator[_Entry]:
    exams, trace_files = _read_exams(source)
    seen = np.zeros(len(exams), bool)
    on_disk = _parts(source)
    for part in on_disk:
        part_ids = _part_ids(source, part)
        if part_ids is None:  # an interrupted download: all exams that it should hold
            name = part.rpartition("/")[2]
            lost = np.flatnonzero(exams["part"] == trace_files.index(name)) if name in trace_files else []
            seen[lost] = True
            yield from (_Entry(int(exams["id"][place]), fault=f"damaged part: {name}") for place in lost)
            continue
        places = np.searchsorted(exams["id"], part_ids)
        for row, (exam_id, place) in enumerate(zip(part_ids.tolist(), places.tolist(), strict=True)):
            if exam_id == 0:
                continue
            if place == len(exams) or exams["id"][place] != exam_id:
                yield _Entry(exam_id, dropped=f"no row in {TABLE}")
                continue
            seen[place] = True
            exam = exams[place]
            yield _Entry(
                exam_id,
                part,
                row,
                int(exam["patient"]),
                float(exam["age"]),
                bool(exam["male"]),
                int(exam["labels"]),
            )
    present = {path.rpartition("/")[2] for path in on_disk}
    for place in np.flatnonzero(~seen):
        name = trace_files[exams["part"][place]]
        reason = "listed, but not in its part" if name in present else f"part not in this copy: {name}"
        yield _Entry(int(exams["id"][place]), dropped=reason)


def _part_ids(source: Source, part: str) -> np.ndarray | None:
    """int64 exam ids of a part's rows; None where it cannot be read."""
    import h5py

    try:
        with h5py.File(source.note(part), "r", locking=False) as file:
            ids, tracings = file["exam_id"], file["tracings"]
            if not (isinstance(ids, h5py.Dataset) and isinstance(tracings, h5py.Dataset)):
                return None
            return np.asarray(ids[: tracings.shape[0]], np.int64)
    except (OSError, KeyError):
        return None


def _read_exams(source: Source) -> tuple[np.ndarray, list[str]]:
    """The table as one array sorted by exam, 32 bytes an exam, and the file names that its `part` points to."""
    rows = csv.DictReader(io.TextIOWrapper(io.BytesIO(source.read(TABLE)), "utf-8-sig", newline=""))
    missing = [name for name in NEEDED if name not in (rows.fieldnames or ())]
    if missing:
        found = ", ".join(rows.fieldnames or ())
        raise EvlecgError(f"a column is missing: {', '.join(missing)}", where=TABLE, hint=f"it has: {found[:200]}")
    trace_files: dict[str, int] = {}

    def values() -> Iterator[tuple[int, int, float, bool, int, int]]:
        for number, cells in enumerate(rows, 2):
            try:
                yield (
                    int(cells["exam_id"]),
                    int(float(cells["patient_id"])),
                    float(cells["age"] or _NO_AGE),
                    _is_true(cells["is_male"]),
                    sum(_is_true(cells[name]) << bit for bit, name in enumerate(LABEL_COLUMNS)),
                    trace_files.setdefault(cells["trace_file"], len(trace_files)),
                )
            except (ValueError, TypeError, AttributeError) as error:  # a short row holds None
                raise EvlecgError("a row cannot be read", where=f"{TABLE}, line {number}") from error

    exams = np.fromiter(values(), _EXAM)
    return exams[np.argsort(exams["id"], kind="stable")], list(trace_files)


def _is_true(cell: str) -> bool:
    text = cell.strip().lower()
    if text in ("true", "1", "1.0"):
        return True
    if text in ("false", "0", "0.0", ""):
        return False
    raise ValueError(cell)
