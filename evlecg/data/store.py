"""The prepared folder: what every dataset becomes, written once (`data/writer.py`), read through memory maps.

    manifest.json     what it is, where it came from, counts
    records.jsonl     one line a record; `shard`, `offset` and `n_bytes` say where its block lies
    quarantine.jsonl  one line for each record that is not here, with the reason
    blocks/00000.bin  the blocks of one shard, one after another: int16 little-endian, 1 uV a step, [12, T] row by row;
                      or the encoded picture of a record that was born as one

Signals keep their sampling rate and length. Names, dates and header comments never enter; ages of 90 and more are 90.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from evlecg.errors import EvlecgError
from evlecg.schema import LEADS, SPLITS, Question, Record

FORMAT_VERSION = 2
STEPS_PER_MV = 1000.0  # 1 uV: finer than any of the datasets' recorders resolves
STEP_TYPE = np.dtype("<i2")
HASH_CHARACTERS = 32  # 128 bits of the SHA-256 of a signal, as published, or of a picture tell records apart
_NOT_ASSESSED = -1


class Prepared:
    """A prepared folder, opened for reading. Cheap to send to another process: it opens the folder again there.

    Use `Prepared.open(path)`. What every record is asked for (ids, split, labels) is held in columns; the rest of a
    record's line is parsed when the record is read.

    Attributes:
        path: the folder.
        manifest: as in manifest.json.
        record_ids, patient_ids: one for each record.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], text: bytes) -> None:
        self.path = path
        self.manifest = manifest
        self._text = text
        lines = text.splitlines(keepends=True)
        self._start_N = np.cumsum([0, *map(len, lines)], dtype=np.int64)
        names = {name: column for column, name in enumerate(manifest["label_names"])}
        self._label_NK = np.full((len(lines), len(names)), _NOT_ASSESSED, np.int8)
        self._split_N = np.zeros(len(lines), np.int8)
        ids, patients = [], []
        for index, line in enumerate(lines):
            row = json.loads(line)
            ids.append(row["id"])
            patients.append(row["patient_id"])
            self._split_N[index] = SPLITS.index(row["split"])
            for code, present in row["labels"].items():
                self._label_NK[index, names[code]] = present
        self.record_ids: tuple[str, ...] = tuple(ids)
        self.patient_ids: tuple[str, ...] = tuple(patients)

    @classmethod
    def open(cls, path: Path) -> Prepared:
        """Reads manifest and records; signals stay on disk.

        Raises:
            EvlecgError: not a prepared folder, another format version, or damaged files.
        """
        if not is_prepared(path):
            what = "not a prepared folder" if path.is_dir() else "no such folder"
            raise EvlecgError(what, where=path, hint="make one with: evlecg prepare --dataset NAME --out DIR")
        try:
            manifest = read_manifest(path)
            text = (path / "records.jsonl").read_bytes()
            if hashlib.sha256(text).hexdigest() != manifest["records_sha256"]:
                raise EvlecgError("a prepared folder is damaged: records.jsonl was changed", where=path)
            for name, said in manifest["blocks"].items():
                size = (path / "blocks" / name).stat().st_size
                if size != said:
                    raise EvlecgError(
                        f"a prepared folder is damaged: blocks/{name} holds {size} bytes, not {said}",
                        where=path,
                        hint="prepare it again with --overwrite",
                    )
            return cls(path, manifest, text)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise EvlecgError(
                "a prepared folder is damaged", where=path, hint=f"{type(error).__name__}; prepare it again"
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return Prepared.open, (self.path,)

    def __len__(self) -> int:
        return len(self.record_ids)

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(self.manifest["label_names"])

    @property
    def label_descriptions(self) -> dict[str, str]:
        return dict(self.manifest["label_descriptions"])

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that change with any signal, label, split or label set, and with nothing else."""
        return fingerprint(self.manifest)

    @cached_property
    def _blocks(self) -> dict[int, np.ndarray]:
        return {}

    def _block(self, row: dict[str, Any]) -> np.ndarray:
        """uint8 bytes of a record's block."""
        shard = row["shard"]
        if shard not in self._blocks:
            self._blocks[shard] = np.memmap(self.path / "blocks" / block_name(shard), dtype=np.uint8, mode="r")
        return self._blocks[shard][row["offset"] : row["offset"] + row["n_bytes"]]

    def row(self, index: int) -> dict[str, Any]:
        """Line `index` of records.jsonl."""
        return json.loads(self._text[self._start_N[index] : self._start_N[index + 1]])

    def record(self, index: int) -> Record:
        """Record `index`; its signal is a fresh float32 [12, T] array in millivolt."""
        row = self.row(index)
        block = self._block(row)
        image = block.tobytes() if row.get("image") else b""
        steps_LT = block[: 0 if image else None].view(STEP_TYPE).reshape(len(LEADS), -1)
        return Record(
            id=row["id"],
            patient_id=row["patient_id"],
            signal_mV=np.divide(steps_LT, np.float32(STEPS_PER_MV), dtype=np.float32),
            fs_hz=row["fs_hz"],
            labels=row["labels"],
            split=row["split"],
            age=row["age"],
            sex=row["sex"],
            report=row["report"],
            repairs=tuple(row["repairs"]),
            device=row["device"],
            image=image,
            questions=questions_from_rows(row.get("questions", ())),
        )

    def questions(self, index: int) -> tuple[Question, ...]:
        """The dataset's own questions about record `index`, without reading its block."""
        return questions_from_rows(self.row(index).get("questions", ()))

    def indices(self, split: str) -> np.ndarray:
        """int64 indices of a split's records, in order.

        Raises:
            EvlecgError: no such split.
        """
        if split not in SPLITS:
            raise EvlecgError(f"unknown split {split!r}", hint=f"known: {', '.join(SPLITS)}")
        return np.flatnonzero(self._split_N == SPLITS.index(split)).astype(np.int64)

    def labels(self, indices: Sequence[int] | np.ndarray, names: Sequence[str]) -> np.ndarray:
        """float64 [len(indices), len(names)]: 1 present, 0 not present, NaN not assessed."""
        rows = np.asarray(indices, np.int64)
        found_NK = np.full((len(rows), len(names)), np.nan)
        for column, name in enumerate(names):
            if name in self.label_names:
                value_N = self._label_NK[rows, self.label_names.index(name)]
                found_NK[:, column] = np.where(value_N == _NOT_ASSESSED, np.nan, value_N)
        return found_NK

    def hashes(self) -> dict[str, str]:
        """Hash of every record -> its id: the same ECG has the same hash in every prepared folder, of any rate."""
        return {self.row(index)["sha256"]: record_id for index, record_id in enumerate(self.record_ids)}

    def quarantine(self) -> list[dict[str, str]]:
        """`id`, `kind` (rejected or dropped) and `reason` of each record that is not here."""
        return [json.loads(line) for line in (self.path / "quarantine.jsonl").read_bytes().splitlines()]


def is_prepared(folder: Path) -> bool:
    """Whether a folder looks like a prepared one (it may still be damaged)."""
    return (folder / "manifest.json").is_file() and (folder / "records.jsonl").is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a prepared folder.

    Raises:
        EvlecgError: it was written by an evlecg of another format.
        OSError, ValueError, KeyError: it cannot be read.
    """
    manifest = json.loads((folder / "manifest.json").read_bytes())
    if manifest["format_version"] != FORMAT_VERSION:
        raise EvlecgError(
            f"a prepared folder has format {manifest['format_version']}, this evlecg reads {FORMAT_VERSION}",
            where=folder,
            hint="prepare it again with --overwrite",
        )
    return manifest


def fingerprint(manifest: dict[str, Any]) -> str:
    """As `Prepared.fingerprint`, from a manifest alone."""
    parts = [manifest["dataset"], manifest["records_sha256"], manifest["label_names"]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def block_name(shard: int) -> str:
    """File of a shard's blocks below `blocks/`."""
    return f"{shard:05d}.bin"


def question_rows(questions: Sequence[Question]) -> list[dict[str, Any]]:
    """Questions as JSON values; what is at its default is left out."""
    defaults = {item.name: item.default for item in fields(Question)}
    return [{key: value for key, value in asdict(question).items() if value != defaults[key]} for question in questions]


def questions_from_rows(rows: Sequence[dict[str, Any]]) -> tuple[Question, ...]:
    """The inverse of `question_rows`."""
    return tuple(
        Question(
            **{
                **row,
                "choices": tuple(row.get("choices", ())),
                "history": tuple((asked, replied) for asked, replied in row.get("history", ())),
            }
        )
        for row in rows
    )
