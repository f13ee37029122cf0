"""What a teacher gave, kept: in memory for one run, or in a folder for all of them.

    cache.json             format, what it was made with, the teacher's facts, what is in it and what compression cost
    basis-FIELD.safetensors  mean and principal directions of a field (compression low_rank)
    part-head.safetensors, part-words.safetensors  the teacher's output head and word embeddings, where they are read
    shards/*.safetensors   rows: fields one after another, int8 or as compressed, with scales; and what positions mean
    .lock                  held by the process that writes

A shard is written under a temporary name and renamed; its header says which rows it holds, so a folder is right at any
moment, whoever is killed. Fields may come later than others, in shards of their own. Readers map shards into memory.

A row's key is `RECORD.QUESTIONS.ANSWERS.N`: three hashes, and how many questions the row holds.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from evlecg.errors import EvlecgError, RunFailed
from evlecg.files import write_text_atomic
from evlecg.teacher.compress import (
    COMPRESSIONS,
    Codec,
    LowRank,
    affordable_rank,
    codec_of,
    fit_low_rank,
)
from evlecg.teacher.rows import FIELDS, Geometry, RowSide

FORMAT_VERSION = 1
INDEX = "cache.json"
SHARD_BYTES = 64 << 20
SHARD_S = 60.0  # no more than so much of the teacher's work is lost to a kill
FIT_ROWS, FIT_TOKENS = 64, 8  # principal directions are fitted on at least so many rows, and tokens a dimension
MOST_FIT_ROWS = 512
ROW_BYTES = 160  # what a row takes in a shard's header and tables of stops
LEAST_ROWS = 500  # a cache grows: its directions are not made few because it begins small
FP16_SHARE = 0.25  # what low_rank aims at: a row takes at most this share of its fp16 bytes
MEMORY_BYTES = 2 << 30  # what a MemoryStore may hold


@dataclass(frozen=True)
class TeacherFacts:
    """What has to be known of a teacher that is not loaded.

    Attributes:
        width, vocab_size, visual_width: as in `ModelFacts`.
        dtype: that its states are computed in.
        frame: of its tokens' places, see `Side`.
        window_s: of a model that reads signals; None for pages.
        head_reads_states: the head gives the answer's logits from the last states, to rounding; else logits are kept.
        packs: whether it proved equal with all questions of a page in one row; None: nobody asked.
        checks: what the start-up checks found.
    """

    width: int
    vocab_size: int
    visual_width: int | None
    dtype: str
    frame: str
    window_s: float | None
    head_reads_states: bool
    packs: bool | None
    checks: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A row on its way into a store."""

    key: str
    side: RowSide
    fields: dict[str, Tensor]


class MemoryStore:
    """Rows as they are, until the process ends.

    Args:
        limit_bytes: more than this is an error.
    """

    compression = "none"

    def __init__(self, *, limit_bytes: int = MEMORY_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._rows: dict[str, Entry] = {}

    def lacks(self, key: str, fields: Iterable[str]) -> bool:
        """Whether anything of a row is not there."""
        return key not in self._rows or not set(fields) <= set(self._rows[key].fields)

    def add(self, entries: Sequence[Entry], *, remaining: int = 0) -> None:
        """Keeps rows.

        Args:
            entries: the rows.
            remaining: rows that are still to come.

        Raises:
            EvlecgError: they take too much, or will.
        """
        added = sum(tensor.nbytes for entry in entries for tensor in entry.fields.values())
        expected = self.held_bytes + added + remaining * added // max(len(entries), 1)
        if expected > self.limit_bytes:
            raise EvlecgError(
                f"what the teacher gives takes {expected / 2**30:.1f} GiB, more than is kept in memory "
                f"({self.limit_bytes / 2**30:.1f} GiB)",
                where="train.remember_teacher", hint="--cache DIR keeps it on disk, compressed",
            )  # fmt: skip
        self.held_bytes += added
        self._rows |= {entry.key: entry for entry in entries}

    def flush(self) -> None:
        """Nothing waits."""

    def side(self, key: str) -> RowSide:
        """What a row's positions mean."""
        return self._rows[key].side

    def field(self, keys: Sequence[str], name: str, dtype: torch.dtype, device: Any) -> tuple[Tensor, list[int]]:
        """A field of some rows, one after another: [n, D], and n of every row."""
        parts = [self._rows[key].fields[name] for key in keys]
        return torch.cat(parts).to(device, dtype), [len(part) for part in parts]


class _Shard:
    """One file, mapped into memory as soon as it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            about = self._file.metadata()
            self.keys: list[str] = json.loads(about["keys"])
            self.fields: tuple[str, ...] = tuple(json.loads(about["fields"]))
            self.sums: dict[str, dict[str, float]] = json.loads(about["sums"])
            self._kinds = json.loads(about["geometries"])
        except Exception as error:  # safetensors raises kinds of its own
            hint = f"delete it and start again: only its rows are lost ({error})"
            raise EvlecgError("a shard of the teacher cache is damaged", where=path, hint=hint) from error
        self._tensors: dict[str, Tensor] = {}
        self._stops: dict[str, list[int]] = {}

    def tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            self._tensors[name] = self._file.get_tensor(name)
        return self._tensors[name]

    def span(self, name: str, row: int) -> tuple[int, int]:
        if name not in self._stops:
            self._stops[name] = [0, *self.tensor(f"{name}.stops").tolist()]
        return self._stops[name][row], self._stops[name][row + 1]

    def parts(self, name: str, row: int) -> dict[str, Tensor]:
        start, stop = self.span(name, row)
        held = self._parts_of[name]
        return {part: self.tensor(f"{name}.{part}")[start:stop] for part in held}

    @cached_property
    def _parts_of(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for whole in self._file.keys():  # noqa: SIM118 (not a dict)
            name, _, part = whole.rpartition(".")
            if part in ("data", "scale"):
                found.setdefault(name, []).append(part)
        return found

    @cached_property
    def _geometries(self) -> list[Geometry]:
        return [
            Geometry(name, duration_s, *(self.tensor(f"geometry{place}.{part}").numpy() for part in _GEOMETRY_PARTS))
            for place, (name, duration_s) in enumerate(self._kinds)
        ]

    def side(self, row: int) -> RowSide:
        start, stop = self.span("side", row)
        geometry = self._geometries[int(self.tensor("side.geometry")[row])]
        return RowSide.from_bytes(self.tensor("side.bytes")[start:stop].numpy().tobytes(), geometry)


_GEOMETRY_PARTS = ("box_N4", "cell_box_C4", "lead_C", "time_C2")


class FolderStore:
    """Rows in a folder. Cheap to send to another process: it opens the same shards again there.

    Use `FolderStore.open` and, to write, `with store.writing():`.

    Attributes:
        path: the folder.
        compression: see `compress`.
        facts: of the teacher; None until something is written.
    """

    def __init__(self, path: Path, made_with: Mapping[str, Any], compression: str, facts: TeacherFacts | None) -> None:
        self.path = path
        self.made_with = made_with
        self.compression = compression
        self.facts = facts
        self._shards: dict[str, _Shard] = {}
        self._where: dict[str, dict[str, tuple[_Shard, int]]] = {}  # key -> field -> shard and row; "side" is one
        self._codecs: dict[str, Codec] = {}
        self._decoders: dict[tuple[str, str], Codec] = {}  # by field and device
        self._waiting: list[Entry] = []
        self._remaining = 0
        self._since_s = time.monotonic()

    @classmethod
    def open(cls, path: Path, made_with: Mapping[str, Any], compression: str) -> FolderStore:
        """A cache that is there, or one that is about to be.

        Args:
            path: the folder; nothing is written yet.
            made_with: all that decides a row beside record and questions, in plain words; values are what JSON holds.
            compression: one of `COMPRESSIONS`.

        Raises:
            EvlecgError: the folder holds something else, or was made with something else: all that differs is named.
        """
        if compression not in COMPRESSIONS:
            raise EvlecgError(f"unknown compression {compression!r}", hint=f"known: {', '.join(COMPRESSIONS)}")
        index = read_index(path)
        if index is None:
            return cls(path, made_with, compression, None)
        found = [*differences(index["made_with"], made_with)]
        if index["compression"] != compression:
            found.append(f"compression: {index['compression']} there, {compression} here")
        if found:
            raise EvlecgError(f"the teacher cache was made with something else: {'; '.join(found)}", where=path,
                              hint="another --cache folder, or the settings that this one was made with")  # fmt: skip
        store = cls(path, made_with, compression, TeacherFacts(**index["facts"]))
        store.rescan()
        return store

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.path, dict(self.made_with), self.compression, self.facts, list(self._shards))

    def rescan(self) -> None:
        """Takes in shards that others have written since."""
        self.take_in(sorted(path.name for path in (self.path / "shards").glob("[!.]*.safetensors")))

    def take_in(self, names: Sequence[str]) -> None:
        """Opens shards by their names."""
        for name in names:
            if name in self._shards:
                continue
            shard = self._shards[name] = _Shard(self.path / "shards" / name)
            for row, key in enumerate(shard.keys):
                held = self._where.setdefault(key, {})
                for kind in ("side", *shard.fields):
                    held.setdefault(kind, (shard, row))

    def __len__(self) -> int:
        return len(self._where)

    @property
    def keys(self) -> Iterable[str]:
        """Of all rows."""
        return self._where.keys()

    def lacks(self, key: str, fields: Iterable[str]) -> bool:
        """Whether anything of a row is not there."""
        held = self._where.get(key)
        return held is None or not all(name in held for name in fields)

    def side(self, key: str) -> RowSide:
        """What a row's positions mean."""
        shard, row = self._where[key]["side"]
        return shard.side(row)

    def field(self, keys: Sequence[str], name: str, dtype: torch.dtype, device: Any) -> tuple[Tensor, list[int]]:
        """A field of some rows, one after another: [n, D], and n of every row."""
        rows = [shard.parts(name, row) for shard, row in (self._where[key][name] for key in keys)]
        parts = {part: torch.cat([row[part] for row in rows]).to(device) for part in rows[0]}
        if (name, str(device)) not in self._decoders:
            codec = self._codec(name)
            self._decoders[name, str(device)] = codec.to(device) if isinstance(codec, LowRank) else codec
        return self._decoders[name, str(device)].decode(parts, dtype), [len(row["data"]) for row in rows]

    # writing

    def start(self, facts: TeacherFacts) -> None:
        """Notes what the teacher is: the folder exists from here on. Only under `writing_lock`."""
        self.facts = facts
        try:
            (self.path / "shards").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvlecgError(f"a folder cannot be made: {error.strerror or error}", where=self.path) from error
        # a killed writer's: our own, and the temporary files of safetensors
        for left in (*self.path.glob(".*.partial"), *(self.path / "shards").glob(".*")):
            left.unlink(missing_ok=True)
        self.write_index()

    def add(self, entries: Sequence[Entry], *, remaining: int = 0) -> None:
        """Takes rows; they are on disk once a shard is full, a minute has passed, or after `flush`.

        Args:
            entries: the rows.
            remaining: rows that are still to come.
        """
        self._waiting += entries
        self._remaining = remaining
        if not remaining:
            return self.flush()
        if self._to_fit() and not self._enough_to_fit():
            return None
        full = sum(tensor.nbytes for entry in self._waiting for tensor in entry.fields.values()) >= SHARD_BYTES
        if full or time.monotonic() - self._since_s > SHARD_S:
            self.flush()
        return None

    def flush(self) -> None:
        """Writes what waits."""
        if self._waiting:
            self._fit()
            name = self._write_shard(self._waiting)
            self._waiting = []
            self.take_in([name])
        self._since_s = time.monotonic()

    def fit_from(self, entries: Sequence[Entry]) -> None:
        """Fits what has to be fitted on these rows, without keeping them."""
        kept, self._waiting = self._waiting, [*entries]
        self._fit()
        self._waiting = kept

    def _to_fit(self) -> list[str]:
        if self.compression != "low_rank" or not self._waiting:
            return []
        names = [name for name in self._waiting[0].fields if name not in ("answer", "logits")]
        return [name for name in names if name not in self._codecs and not self._basis(name).exists()]

    def _enough_to_fit(self) -> bool:
        if len(self._waiting) < FIT_ROWS:
            return False
        if len(self._waiting) >= MOST_FIT_ROWS:
            return True
        first = self._waiting[0].fields
        return all(
            len(self._waiting) * len(first[name]) >= FIT_TOKENS * first[name].shape[1] for name in self._to_fit()
        )

    def _fit(self) -> None:
        names = self._to_fit()
        if not names:
            return
        rows = self._waiting[:MOST_FIT_ROWS]
        side_bytes = sum(len(row.side.to_bytes()) for row in rows) / len(rows) + ROW_BYTES
        sizes = {name: sum(row.fields[name].numel() for row in rows) / len(rows) for name in rows[0].fields}
        for name in names:
            tokens = [row.fields[name] for row in rows]
            n_tokens, width = sum(map(len, tokens)) / len(rows), tokens[0].shape[1]
            others = side_bytes * sizes[name] / sum(sizes[other] for other in names)  # shared out by size
            rows_of_all = max(len(self._waiting) + self._remaining, LEAST_ROWS)
            rank = affordable_rank(width, n_tokens, others, share=FP16_SHARE, rows=rows_of_all)
            fitted = fit_low_rank(tokens, rank)
            self._codecs[name] = fitted
            self._save(self._basis(name), {"mean": fitted.mean_D, "up": fitted.up_RD}, {"rows": str(len(rows))})

    def _write_shard(self, entries: Sequence[Entry]) -> str:
        tensors: dict[str, Tensor] = {}
        sums: dict[str, dict[str, float]] = {}
        blobs = [entry.side.to_bytes() for entry in entries]
        geometries: dict[bytes, tuple[int, Geometry]] = {}
        numbers = []
        for entry in entries:
            geometry = entry.side.geometry
            numbers.append(geometries.setdefault(geometry.to_bytes(), (len(geometries), geometry))[0])
        for place, geometry in geometries.values():
            for part in _GEOMETRY_PARTS:
                tensors[f"geometry{place}.{part}"] = torch.from_numpy(np.ascontiguousarray(getattr(geometry, part)))
        tensors["side.bytes"] = torch.frombuffer(bytearray(b"".join(blobs)), dtype=torch.uint8)
        tensors["side.stops"] = torch.tensor([len(blob) for blob in blobs]).cumsum(0)
        tensors["side.geometry"] = torch.tensor(numbers, dtype=torch.int32)
        fields = [name for name in FIELDS if name in entries[0].fields]
        for name in fields:
            x_nD = torch.cat([entry.fields[name] for entry in entries])
            parts = self._codec(name).encode(x_nD)
            back_nD = self._codec(name).decode(parts, torch.float32)
            n_fp16 = 2 * x_nD.numel()
            if name == "answer" and self.facts is not None:  # the losses read the logits that they stand for
                n_fp16 = 2 * len(x_nD) * self.facts.vocab_size
            sums[name] = {
                "error": float((back_nD - x_nD.float()).square().sum(dtype=torch.float64)),
                "size": float(x_nD.float().square().sum(dtype=torch.float64)),
                "variance": float((x_nD.float() - x_nD.float().mean(0)).square().sum(dtype=torch.float64)),
                "bytes": sum(part.nbytes for part in parts.values()), "fp16_bytes": n_fp16,
            }  # fmt: skip
            tensors |= {f"{name}.{part}": value.contiguous() for part, value in parts.items()}
            tensors[f"{name}.stops"] = torch.tensor([len(entry.fields[name]) for entry in entries]).cumsum(0)
        about = {"keys": json.dumps([entry.key for entry in entries]), "fields": json.dumps(fields),
                 "sums": json.dumps(sums),
                 "geometries": json.dumps([[g.name, g.duration_s] for _, g in geometries.values()])}  # fmt: skip
        name = f"{time.time_ns()}-{uuid.uuid4().hex[:8]}.safetensors"
        self._save(self.path / "shards" / name, tensors, about)
        return name

    def _basis(self, name: str) -> Path:
        return self.path / f"basis-{name}.safetensors"

    def _codec(self, name: str) -> Codec:
        if name not in self._codecs:
            fitted = None
            if self._basis(name).exists():
                with safe_open(self._basis(name), framework="pt") as file:
                    fitted = LowRank(file.get_tensor("mean").clone(), file.get_tensor("up").clone())
            self._codecs[name] = codec_of(self.compression, name, fitted)
        return self._codecs[name]

    def has_head(self, name: str) -> bool:
        """Whether a part of the teacher's head is there: `head`, or `words` (its embeddings)."""
        return self._head(name).exists()

    def head(self, name: str) -> dict[str, Tensor]:
        """A part's parameters and buffers."""
        return load_file(self._head(name))

    def save_head(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps a part's parameters and buffers."""
        self._save(self._head(name), dict(tensors), {})

    def _head(self, name: str) -> Path:
        return self.path / f"part-{name}.safetensors"

    def _save(self, path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            save_file(tensors, partial, metadata=about)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        except Exception as error:  # safetensors wraps what the system says
            partial.unlink(missing_ok=True)
            raise RunFailed(f"the teacher cache cannot be written: {error}", where=path,
                            hint="what is there stays; the same command goes on") from error  # fmt: skip

    def write_index(self) -> None:
        """cache.json, with what is there now."""
        assert self.facts is not None
        index = {
            "format_version": FORMAT_VERSION, "made_with": self.made_with, "compression": self.compression,
            "facts": dataclasses.asdict(self.facts), "contents": self.contents(),
        }  # fmt: skip
        write_text_atomic(self.path / INDEX, json.dumps(index, indent=2) + "\n")

    def contents(self) -> dict[str, Any]:
        """What is there, what it takes, and what compression cost, measured on every token that was written.

        `relative_error` is the root of the summed squared errors over that of the summed squares; `lost_variance`
        relates them to the variance around a field's mean, which is what losses see.
        """
        totals: dict[str, dict[str, float]] = {}
        for shard in self._shards.values():
            for name, sums in shard.sums.items():
                total = totals.setdefault(name, dict.fromkeys(sums, 0.0))
                for what, value in sums.items():
                    total[what] += value
        files = [*(self.path / "shards").glob("[!.]*.safetensors"), *self.path.glob("basis-*.safetensors")]
        n_bytes = sum(path.stat().st_size for path in files)
        fp16 = sum(total["fp16_bytes"] for total in totals.values())
        fields = {
            name: {
                "bytes": int(total["bytes"]), "fp16_bytes": int(total["fp16_bytes"]),
                "rank": codec.rank if isinstance(codec := self._codec(name), LowRank) else None,
                "relative_error": (total["error"] / total["size"]) ** 0.5 if total["size"] else None,
                "lost_variance": total["error"] / total["variance"] if total["variance"] else None,
            }
            for name, total in totals.items()
        }  # fmt: skip
        return {
            "rows": len(self), "records": len({key.split(".")[0] for key in self._where}), "shards": len(self._shards),
            "bytes": n_bytes, "fp16_bytes": int(fp16), "share_of_fp16": n_bytes / fp16 if fp16 else None,
            "head_bytes": sum(path.stat().st_size for path in self.path.glob("part-*.safetensors")), "fields": fields,
        }  # fmt: skip


Store = MemoryStore | FolderStore


def _reopened(
    path: Path, made_with: dict[str, Any], compression: str, facts: TeacherFacts | None, shards: list[str]
) -> FolderStore:
    store = FolderStore(path, made_with, compression, facts)
    store.take_in(shards)
    return store


def read_index(path: Path) -> dict[str, Any] | None:
    """cache.json of a folder; None where there is no cache yet.

    Raises:
        EvlecgError: the folder holds something else, or a cache of another format, or a damaged one.
    """
    if not path.exists() or (path.is_dir() and not any(item for item in path.iterdir() if item.name != ".lock")):
        return None
    if not (path / INDEX).is_file():
        if path.is_dir() and {item.name for item in path.iterdir()} <= {".lock", "shards"}:
            return None  # killed before its first word
        raise EvlecgError("not a teacher cache", where=path, hint="name a folder that is missing or empty")
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        version = index["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvlecgError("a teacher cache is damaged", where=path / INDEX, hint="make it anew") from error
    if version != FORMAT_VERSION:
        raise EvlecgError(f"a teacher cache has format {version}, this evlecg reads {FORMAT_VERSION}", where=path,
                          hint="make it anew")  # fmt: skip
    return index


def differences(there: Any, here: Any, name: str = "") -> Iterable[str]:
    """What differs between two trees of plain values, each as `page.grid: pink there, blue here`."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in [*there, *(key for key in here if key not in there)]:
            yield from differences(there.get(key), here.get(key), f"{name}.{key}" if name else str(key))
    elif there != here:
        yield f"{name}: {_short(there)} there, {_short(here)} here"


def _short(value: Any) -> str:
    text = str(value)
    return text[:16] + "..." if len(text) > 40 and " " not in text else text
