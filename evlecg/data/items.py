"""JSON files of dialogue items (a list, or one a line), read by byte position.

ECGInstruct is one list of 1.3 GB. A pass over it notes, for each item, where its bytes lie and which ECG it is about
(about 100 bytes an item); after that any item can be read by itself, in any process. The standard library's decoder
finds where an item ends at the speed of C: the bytes are shown to it as Latin-1, one character a byte, so that its
character positions are byte positions.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from array import array
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from evlecg.data.readers_base import Source
from evlecg.errors import EvlecgError

CHUNK_BYTES = 1 << 20
LARGEST_ITEM_BYTES = 16 << 20
HASHED_BYTES = 64 << 20  # files up to this size are read at once, and their hash enters the provenance

Span = tuple[int, int, int]  # which file of the dataset, first byte, bytes

_BETWEEN = re.compile(r"[ \t\r\n,\[\]]*")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def scan(source: Source, relative: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """First byte, length and content of every item of a file, in order.

    Args:
        source: the download.
        relative: a JSON list of objects, or one object a line.

    Raises:
        EvlecgError: the file is cut off or malformed: nothing behind that place can be trusted.
        Unfit: the path leads out of the source folder.
        OSError: it cannot be read.
    """
    path = source.note(relative)
    if path.stat().st_size <= HASHED_BYTES:
        yield from _scan(io.BytesIO(source.read(relative)), relative)
        return
    with path.open("rb") as file:
        yield from _scan(file, relative)


def _scan(file: BinaryIO, relative: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    decoder = json.JSONDecoder(strict=False)  # line breaks inside of strings occur
    chunk = file.read(CHUNK_BYTES)
    first = len(_BYTE_ORDER_MARK) if chunk.startswith(_BYTE_ORDER_MARK) else 0
    text = chunk[first:].decode("latin-1")
    at = 0  # in `text`, which begins at byte `first` of the file
    while True:
        between = _BETWEEN.match(text, at)
        at = between.end() if between else at
        if at < len(text):
            try:
                item, end = decoder.raw_decode(text, at)
            except RecursionError:
                raise EvlecgError(f"an item at byte {first + at} is nested too deeply", where=relative) from None
            except ValueError:
                pass  # so far: the rest of the item may be in the next chunk
            else:
                if not isinstance(item, dict):
                    raise EvlecgError(f"no list of dialogue items: byte {first + at} begins something else",
                                      where=relative)  # fmt: skip
                own = text[at:end]
                yield first + at, end - at, item if own.isascii() else json.loads(own.encode("latin-1"), strict=False)
                at = end
                continue
        chunk = file.read(CHUNK_BYTES)
        if not chunk and at == len(text):
            return
        if not chunk or len(text) - at > LARGEST_ITEM_BYTES:
            raise EvlecgError(f"the file is cut off or malformed: no item ends behind byte {first + at}",
                              where=relative, hint="download it again")  # fmt: skip
        text, first, at = text[at:] + chunk.decode("latin-1"), first + at, 0


def read_items(paths: list[Path], spans: tuple[Span, ...]) -> list[dict[str, Any]]:
    """The items at `spans`, in their order.

    Raises:
        OSError: a file is missing.
        ValueError: a file has changed since it was scanned.
    """
    items = []
    for number, start, length in spans:
        with paths[number].open("rb") as file:
            file.seek(start)
            items.append(json.loads(file.read(length), strict=False))
    return items


class Index:
    """Where the items of each ECG lie. Compact: five numbers and a short note an item, in flat arrays."""

    def __init__(self) -> None:
        self._group = array("q")  # 64-bit hash of the key; for 1e6 keys the odds of one collision are 3e-8
        self._file, self._start, self._length = array("i"), array("q"), array("i")
        self._notes, self._note_end = bytearray(), array("q")

    def add(self, key: str, note: str, span: Span) -> None:
        """One item.

        Args:
            key: items of the same key belong together.
            note: handed back with the group, from its first item.
            span: where the item lies.
        """
        digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self._group.append(int.from_bytes(digest, "little", signed=True))
        self._file.append(span[0])
        self._start.append(span[1])
        self._length.append(span[2])
        self._notes += note.encode("utf-8", "surrogatepass")
        self._note_end.append(len(self._notes))

    def groups(self) -> Iterator[tuple[str, tuple[Span, ...]]]:
        """Note and spans of every group, groups and items in the order in which they were met."""
        _, first_G, group_N = np.unique(np.frombuffer(self._group, np.int64), return_index=True, return_inverse=True)
        first_N = first_G[group_N]
        order_N = np.argsort(first_N, kind="stable")
        bounds = np.flatnonzero(np.diff(first_N[order_N], prepend=-1, append=-1))
        for low, high in pairwise(bounds):
            numbers = order_N[low:high].tolist()
            first = numbers[0]
            note = self._notes[self._note_end[first - 1] if first else 0 : self._note_end[first]]
            yield (
                note.decode("utf-8", "surrogatepass"),
                tuple((self._file[number], self._start[number], self._length[number]) for number in numbers),
            )
