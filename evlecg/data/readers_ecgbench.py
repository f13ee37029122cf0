"""ECGBench: the test sets of PULSE, one folder (Parquet) or one JSON file a subset.

    SUBSET/test-00000-of-00001.parquet     id, image_path, image {bytes, path}, conversations
    SUBSET.json + images/                  id, image, conversations: the older form

Everything is test data. A record is one picture of a subset with all items about it; the subset is the first part of
its id and the kind of its questions, and a question keeps the id of its item, by which predictions are joined. The
texts are read in one pass that leaves the pictures alone; the pictures are then streamed batch by batch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evlecg.data.dialogues import check_image, distinct, encodable, inside, questions_of, read_image
from evlecg.data.gates import Unfit
from evlecg.data.items import scan
from evlecg.data.readers_base import Dropped, Reading, ReadOptions, Source
from evlecg.data.readers_llava import BENCH_STEMS, picture
from evlecg.data.signals import Person, Signals, ecg_of, record_id
from evlecg.errors import EvlecgError
from evlecg.schema import Question, Record

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from pyarrow.parquet import ParquetFile

IMAGE_FOLDERS = ("", "images")
JSON_FOLDERS = ("", "jsons", "ecg_bench", "ecg_bench/jsons")
TEXT_ROWS = 256  # rows of text that are held at once
BATCH_BYTES = 64 << 20  # of pictures that are held at once, where the pages of the file are as small as that
MAX_GROUP_BYTES = 2 << 30  # of one row group; its pages may be as large as the group, and cannot be read in part

_SHARD = re.compile(r"(?:^|[-_.])(?:test|train|validation)-\d{5}-of-\d{5}.*$|\.parquet$")
_NAMES_OF_ID = ("id", "No", "question_id")
_NAMES_OF_TALK = ("conversations", "conversation", "messages")


@dataclass(frozen=True)
class _Entry:
    """One picture: a row of a Parquet file, or (row -1) a file of its own."""

    id: str
    file: int
    row: int
    name: str  # its path in the dataset
    person: Person
    questions: tuple[Question, ...]
    n_malformed: int


@dataclass
class _Group:
    """What was met of one picture so far."""

    id: str
    row: int
    name: str
    questions: list[Question] = field(default_factory=list)
    n_malformed: int = 0


def is_ecgbench(folder: Path) -> bool:
    return bool(_files(folder))


def _files(folder: Path) -> list[tuple[str, str]]:
    """Path below the folder, and subset, of every file; none where no subset is one of ECGBench's."""
    tables = [*folder.glob("*.parquet"), *folder.glob("*/*.parquet")]
    found = [(path, _SHARD.sub("", path.name) or path.parent.name) for path in sorted(tables)]
    lists = [path for inner in JSON_FOLDERS if (folder / inner).is_dir() for path in (folder / inner).glob("*.json*")]
    found += [(path, path.stem) for path in sorted(lists) if path.stem in BENCH_STEMS]
    if not any(subset in BENCH_STEMS for _, subset in found):
        return []
    return [(path.relative_to(folder).as_posix(), subset) for path, subset in found]


def open_ecgbench(source: Source, options: ReadOptions) -> Reading:
    """One entry for each picture of a subset, after one pass over the texts of that subset."""
    files = _files(source.root)
    signals = Signals(source, options.signals)  # for PTB-XL's patients only: the pictures are the benchmark
    pictures = _Pictures([source.path(inside(source, relative)) for relative, _ in files])

    def entries() -> Iterator[_Entry]:
        taken: set[str] = set()
        people = signals.people()
        for number, (relative, subset) in enumerate(files):
            groups: dict[str, _Group] = {}
            in_parquet = relative.endswith(".parquet")
            for row, item in (_parquet_texts if in_parquet else _json_items)(source, relative):
                _collect(groups, row, item, subset)
            for group in groups.values():
                name = group.id
                while name in taken:  # an id that occurs twice is still another picture
                    name += "_"
                taken.add(name)
                ecg = ecg_of(group.name, subset) if group.name else None
                person = people.get(ecg.id) if ecg else None
                person = person or Person(ecg.patient if ecg else name, None, None)
                yield _Entry(name, number, group.row if in_parquet else -1, group.name, person,
                             distinct(group.questions), group.n_malformed)  # fmt: skip

    def read(entry: _Entry) -> Record:
        if not entry.questions:
            raise Unfit("malformed dialogue: no question of this picture can be read")
        if entry.row >= 0:
            image = check_image(pictures.get(entry.file, entry.row))
        else:
            image = read_image(source, _image_file(source, files[entry.file][0], entry.name))
        repairs = (f"{entry.n_malformed} malformed dialogues left out",) if entry.n_malformed else ()
        record = picture(image, id=entry.id, person=entry.person, split="test")
        return replace(record, questions=entry.questions, repairs=repairs)

    return Reading(None, entries(), lambda entry: entry.id, read)


def _collect(groups: dict[str, _Group], row: int, item: dict[str, Any], subset: str) -> None:
    value = next((item[key] for key in _NAMES_OF_ID if item.get(key) is not None), None)
    item_id = "" if value is None else encodable(str(value))
    name = next((item[key] for key in ("image_path", "image") if isinstance(item.get(key), str)), "")
    group = groups.setdefault(name or f"\0{row}", _Group(record_id(f"{subset}/{item_id or row}"), row, name))
    talk = next((item[key] for key in _NAMES_OF_TALK if item.get(key) is not None), None)
    if talk is None and item.get("question") is not None:
        talk = [{"question": item["question"], "answer": item.get("answer")}]
    try:
        group.questions += questions_of(talk or [], item=item_id, kind=subset)
    except (Unfit, TypeError, AttributeError):
        group.n_malformed += 1


def _json_items(source: Source, relative: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for row, (_, _, item) in enumerate(scan(source, relative)):
        yield row, item


def _image_file(source: Source, relative: str, name: str) -> str:
    """Path of a picture of the older form: beside its JSON file or above, directly or in a folder `images`.

    Raises:
        Unfit: it leads out of the source folder.
        Dropped: it is not in this copy.
    """
    inside(source, name)
    for base in Path(relative).parents:
        for folder in IMAGE_FOLDERS:
            path = (base / folder / name).as_posix()
            if source.exists(inside(source, path)):
                return path
    raise Dropped(f"image not in this copy ({Path(relative).stem})")


def _open_parquet(path: Path) -> ParquetFile:
    from pyarrow.parquet import ParquetFile

    return ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)  # pages are streamed, not whole column chunks


def _parquet_texts(source: Source, relative: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Row number and all columns but the picture.

    Raises:
        EvlecgError: the file is damaged.
    """
    from pyarrow import ArrowException

    try:
        with _open_parquet(source.note(relative)) as file:
            columns = [name for name in file.schema_arrow.names if name != "image"]
            row = 0
            for batch in file.iter_batches(batch_size=TEXT_ROWS, columns=columns):
                for item in batch.to_pylist():
                    yield row, item
                    row += 1
    except (ArrowException, OSError) as error:
        raise EvlecgError("a Parquet file is damaged or cut off", where=relative, hint="download it again") from error


class _Pictures:
    """Pictures of Parquet files. Going forward through a file reads it once, a batch at a time.

    Memory is that of a batch where pages are small. Writers often put a row group into one page; then it is that of
    two or three row groups (the hub makes them of 100 pictures).

    Args:
        paths: the files.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._at: tuple[int, int] = (-1, -1)  # file and row group that are open
        self._first = 0  # row at which the current batch begins, in its row group
        self._batch: RecordBatch | None = None
        self._batches: Iterator[RecordBatch] = iter(())
        self._file: ParquetFile | None = None

    def get(self, number: int, row: int) -> bytes:
        """The bytes of a picture.

        Args:
            number: of the file.
            row: in the file.

        Raises:
            Unfit: the row has no picture, or its row group is too large to be one of pictures.
            OSError, ValueError: the file is damaged.
        """
        if self._file is None or self._at[0] != number:
            if self._file is not None:
                self._file.close()
            self._file = _open_parquet(self._paths[number])
            self._at = (number, -1)
        group, row = _place(self._file, row)
        if self._at[1] != group or row < self._first:
            self._batches = self._open(self._file, group)
            self._at, self._first, self._batch = (number, group), 0, None
        while self._batch is None or row >= self._first + self._batch.num_rows:
            self._first += self._batch.num_rows if self._batch is not None else 0
            self._batch = next(self._batches, None)
            if self._batch is None:
                raise ValueError("a row group is shorter than it says")
        value = self._batch.column(0)[row - self._first].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes) or not data:
            raise Unfit("unfit picture: the row has none")
        return data

    def _open(self, file: ParquetFile, group: int) -> Iterator[RecordBatch]:
        about = file.metadata.row_group(group)
        sizes = [about.column(index) for index in range(about.num_columns)]
        size = sum(part.total_uncompressed_size for part in sizes if part.path_in_schema.split(".")[0] == "image")
        if size > MAX_GROUP_BYTES:
            raise Unfit("unfit picture: its row group is too large")
        rows = max(1, min(about.num_rows, BATCH_BYTES // max(1, size // max(1, about.num_rows))))
        return file.iter_batches(batch_size=rows, row_groups=[group], columns=["image"])


def _place(file: ParquetFile, row: int) -> tuple[int, int]:
    """Row group of a row, and its place in it."""
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if row < rows:
            return group, row
        row -= rows
    raise IndexError("no such row")
