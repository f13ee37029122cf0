"""What every reader shares: the source folder, read once and hashed on the way; options; what a record can become."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from evlecg.data.gates import Unfit
from evlecg.errors import EvlecgError
from evlecg.schema import Record

SPLIT_SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}
MAX_AGE = 90.0  # ages of 90 and more are one group: the few very old could be recognised
SEARCH_WIDTH = 1000
SEARCH_DEPTH = 4  # wget -r puts a dataset under physionet.org/files/NAME/VERSION


class Dropped(Exception):
    """A record that is sound but not wanted (no class of the label set, not in this partial copy); the reason."""


@dataclass(frozen=True)
class Rejected:
    """A record that did not come through.

    Attributes:
        id: as in `Record`.
        reason: one short phrase.
        fault: whether something is wrong with it; False for records that were dropped on purpose.
    """

    id: str
    reason: str
    fault: bool = True


@dataclass(frozen=True)
class ReadOptions:
    """How a dataset is read.

    Attributes:
        labels: label codes wanted.
        seed: of the split, where the dataset brings none.
        fs_hz: which of several published sampling rates; None for the reader's default.
        counts: split -> records, for generated datasets.
        signals: where the signals lie that a dialogue dataset points to: root name (`ptb-xl`, `mimic`, ...) -> folder.
        table: CSV with the labels of a folder that has none of its own.
    """

    labels: tuple[str, ...]
    seed: int = 0
    fs_hz: int | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    signals: Mapping[str, Path] = field(default_factory=dict)
    table: Path | None = None


class Source:
    """A download. Every byte goes through `read`, once, so that its hash costs no second pass over the disk.

    Args:
        root: the dataset's own top folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._prefix = os.path.join(root, "")  # noqa: PTH118
        self._sha256: dict[str, tuple[int, str]] = {}

    def read(self, relative: str) -> bytes:
        """A file's bytes.

        Args:
            relative: path below the root, with `/`.

        Raises:
            Unfit: the path leads out of the source folder.
            OSError: the file cannot be read.
        """
        with open(self._place(relative), "rb") as file:  # noqa: PTH123 - see _place
            data = file.read()
        self._sha256[relative] = (len(data), hashlib.sha256(data).hexdigest())
        return data

    def note(self, relative: str) -> Path:
        """A file that is too large to be read at once: its size enters the provenance, its hash does not.

        Raises:
            Unfit: the path leads out of the source folder.
            OSError: the file is missing.
        """
        path = self.path(relative)
        self._sha256[relative] = (path.stat().st_size, "")
        return path

    def text(self, relative: str) -> str:
        """A text file, with any byte-order mark dropped."""
        return self.read(relative).decode("utf-8-sig", errors="replace")

    def path(self, relative: str) -> Path:
        """Where a file lies; names inside a dataset cannot lead out of its folder."""
        return Path(self._place(relative))

    def exists(self, relative: str) -> bool:
        return os.path.isfile(self._place(relative))  # noqa: PTH113 - see _place

    def _place(self, relative: str) -> str:
        # text, not a Path: five of those a record cost as much time as its hash
        plain = os.path.normpath(relative)
        if os.path.isabs(plain) or plain == ".." or plain.startswith(f"..{os.sep}"):  # noqa: PTH117
            raise Unfit("a file name leads out of the source folder")
        return f"{self._prefix}{plain}"

    def find(self, suffix: str | tuple[str, ...]) -> list[str]:
        """Relative paths of all files with a suffix (or one of several), hidden ones apart, sorted."""
        found: list[str] = []
        for folder, folders, files in os.walk(self.root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            inside = Path(folder).relative_to(self.root).as_posix()
            prefix = "" if inside == "." else f"{inside}/"
            found += [prefix + name for name in files if name.endswith(suffix) and not name.startswith(".")]
        return sorted(found)

    def taken(self) -> list[tuple[str, int, str]]:
        """(relative path, bytes, sha256 or "") of the files that were read since this was asked last."""
        files = [(name, size, sha256) for name, (size, sha256) in self._sha256.items()]
        self._sha256.clear()
        return files

    def signature(self, apart: Iterable[Path] = ()) -> str:
        """Hash of names, sizes and times of all files: what tells, without reading them, that nothing changed.

        Args:
            apart: folders that are not part of the download.
        """
        skipped = {folder.resolve() for folder in apart}
        digest = hashlib.sha256()
        for folder, folders, files in os.walk(self.root):
            folders[:] = sorted(name for name in folders if (Path(folder) / name).resolve() not in skipped)
            for name in sorted(files):
                path = os.path.join(folder, name)  # noqa: PTH118 - a Path for each of 100,000 files takes seconds
                status = os.stat(path) if os.path.exists(path) else os.lstat(path)  # noqa: PTH110, PTH116
                inside = os.path.relpath(path, self.root)
                digest.update(f"{inside}\t{status.st_size}\t{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:32]


class Listing(Iterable[Any]):
    """Entries that are listed when they are first asked for: only the main process asks, workers get theirs handed out.

    Args:
        make: lists them, in an order that never changes.
    """

    def __init__(self, make: Callable[[], Iterable[Any]]) -> None:
        self._make = make

    @cached_property
    def _entries(self) -> list[Any]:
        return list(self._make())

    def __iter__(self) -> Iterator[Any]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@dataclass(frozen=True)
class Reading:
    """An opened dataset: what there is, and how one of them is read.

    `entries` is iterated once, by the main process, which hands them out; `read` is called in worker processes, each
    of which opens the dataset for itself. So an entry is a small value that can be pickled, and opening is cheap:
    whatever needs a pass over a large table belongs into a lazy `entries`, and what `read` needs of it into the entry.

    Attributes:
        total: number of entries; None where only iterating them tells.
        entries: one value for each record, in an order that never changes.
        name: entry -> record id.
        read: entry -> record; raises Unfit or Dropped, or OSError, ValueError, LookupError on unreadable files.
        shard: entries that a worker takes at a time.
        descriptions: labels that the dataset itself brings, code -> phrase that completes "Does this ECG show ...?".
    """

    total: int | None
    entries: Iterable[Any]
    name: Callable[[Any], str]
    read: Callable[[Any], Record]
    shard: int = 256
    descriptions: Mapping[str, str] = field(default_factory=dict)

    def records(self, entries: Iterable[Any] | None = None) -> Iterator[Record | Rejected]:
        """What entries (all by default) become, in order; one bad file never stops the run."""
        for entry in self.entries if entries is None else entries:
            try:
                yield self.read(entry)
            except Unfit as reason:
                yield Rejected(self.name(entry), str(reason))
            except Dropped as reason:
                yield Rejected(self.name(entry), str(reason), fault=False)
            except FileNotFoundError:
                yield Rejected(self.name(entry), "missing file")
            except OSError as error:  # its text holds a path of this machine
                yield Rejected(self.name(entry), f"unreadable file: {error.strerror or type(error).__name__}")
            except EvlecgError as error:
                yield Rejected(self.name(entry), error.what)
            except (ValueError, LookupError, OverflowError) as error:
                yield Rejected(self.name(entry), f"malformed: {type(error).__name__}")

    def n_entries(self) -> int | None:
        """`total`, else what listing the entries tells; None where only reading them would."""
        if self.total is not None:
            return self.total
        return len(self.entries) if isinstance(self.entries, Sized) else None


@dataclass(frozen=True)
class Lazy:
    """Entries that are made when they are iterated, which only the main process does."""

    start: Callable[[], Iterator[Any]]

    def __iter__(self) -> Iterator[Any]:
        return self.start()


def split_of(patient_id: str, seed: int, shares: Mapping[str, float] | None = None) -> str:
    """The split of a patient: the same on every machine, other for another seed.

    Args:
        patient_id: whose.
        seed: of the draw.
        shares: split -> share, which come to one; None for 80/10/10.
    """
    digest = hashlib.sha256(f"{seed}:{patient_id}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    last = ""
    for split, share in (shares or SPLIT_SHARES).items():
        if place < share:
            return split
        place -= share
        last = split if share else last
    return last  # what rounding left over


def parse_age(text: str) -> float | None:
    """Years from "56", "56.0", ">89", "NaN", "Unknown" or ""; `MAX_AGE` at most (PTB-XL writes 300 for 90 and more)."""
    text = text.strip()
    over = text.startswith(">")
    try:
        age = float(text.lstrip(">"))
    except ValueError:
        return None
    if over or age > MAX_AGE - 1:
        return MAX_AGE
    return age if age >= 0 else None  # also drops NaN, which compares false


def parse_sex(text: str) -> str | None:
    """ "F" or "M" from any of F, Female, female, M, ...; None for the rest."""
    return {"f": "F", "female": "F", "m": "M", "male": "M"}.get(text.strip().lower())


def locate(folder: Path, is_home: Callable[[Path], bool], *, merge: bool = False) -> Path | None:
    """The dataset's top folder at or below `folder`, since downloads come wrapped in folders; None where it is not.

    Args:
        folder: where to look; the nearest level with a match decides.
        is_home: whether a folder is the top of the dataset.
        merge: where several match, they are parts of one dataset, and their common parent is its top; otherwise
            several are ambiguous, and count as none.
    """
    for level in levels(folder):
        homes = [path for path in level if is_home(path)]
        if len(homes) == 1:
            return homes[0]
        if homes:
            return Path(os.path.commonpath(homes)) if merge else None
    return None


def levels(folder: Path) -> Iterator[list[Path]]:
    """The folder, the folders in it, those in them, ... as deep and as wide as a download may be wrapped."""
    level = [folder]
    for _ in range(SEARCH_DEPTH + 1):
        yield level
        level = [path for parent in level for path in sorted(parent.iterdir()) if path.is_dir()]
        level = [path for path in level if not path.name.startswith(".")]
        if len(level) > SEARCH_WIDTH:
            return


def names_in(folder: Path, suffix: str) -> Iterator[str]:
    """Names, without the suffix, of the files in a folder; lazy, so that the first wrong one can end a search."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(suffix) and not entry.name.startswith("."):
                yield entry.name.removesuffix(suffix)
