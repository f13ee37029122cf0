"""The prepared folder: what every dataset becomes, written once, read through a memory map.

    manifest.json     what it is, where it came from, counts
    signals.bin       int16 little-endian, 1 uV a step: the [12, T] block of each record, row by row, one after another
    records.jsonl     one line a record; `offset` is the byte at which its block begins
    quarantine.jsonl  one line for each record that is not here, with the reason

Signals keep their sampling rate and length. Names, dates and header comments never enter; ages of 90 and more are 90.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from evlecg import __version__
from evlecg.data.labels import LABELS
from evlecg.data.readers_base import MAX_AGE, Rejected
from evlecg.errors import EvlecgError
from evlecg.files import new_folder
from evlecg.schema import LEADS, SPLITS, Record

FORMAT_VERSION = 1
STEPS_PER_MV = 1000.0  # 1 uV: finer than any of the datasets' recorders resolves
_STEP_TYPE = np.dtype("<i2")
_ID = re.compile(r"[A-Za-z0-9_./-]+")


class PreparedWriter:
    """Writes a prepared folder that appears whole or not at all.

    `with PreparedWriter(out, label_names=names) as writer: writer.add(record); ...; writer.finish({...})`. Leaving the
    block by an exception, or without `finish`, leaves `out` as it was.

    Args:
        out: the folder.
        label_names: label codes that the records may carry, in order.
        overwrite: replace an older prepared folder; any other folder that is not empty is never replaced.

    Raises:
        EvlecgError: on entering: `out` is not empty.
    """

    def __init__(self, out: Path, *, label_names: Sequence[str], overwrite: bool = False) -> None:
        self.out = out
        self.label_names = tuple(label_names)
        self.overwrite = overwrite
        self.n_kept = self.n_repaired = self.n_rejected = self.n_dropped = 0
        self.reasons: Counter[str] = Counter()
        self._split_of_patient: dict[str, str] = {}
        self._ids: set[str] = set()
        self._records_in: Counter[str] = Counter()
        self._positive: Counter[tuple[str, str]] = Counter()
        self._negative: Counter[tuple[str, str]] = Counter()
        self._n_bytes = 0
        self._records_sha256 = hashlib.sha256()
        self._finished = False

    def __enter__(self) -> PreparedWriter:
        if self.overwrite and self.out.is_dir() and any(self.out.iterdir()) and not is_prepared(self.out):
            raise EvlecgError(
                "the output folder is not a prepared folder, and is not replaced", where=self.out, hint="choose another"
            )
        with ExitStack() as stack:
            self._folder = stack.enter_context(new_folder(self.out, self.overwrite))
            self._signals = stack.enter_context((self._folder / "signals.bin").open("wb"))
            self._records = stack.enter_context((self._folder / "records.jsonl").open("wb"))
            self._quarantine = stack.enter_context((self._folder / "quarantine.jsonl").open("wb"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> bool | None:
        if exception[0] is None and not self._finished:
            exception = (AssertionError, AssertionError("finish() was not called"), None)
            self._stack.__exit__(*exception)
            raise exception[1]
        return self._stack.__exit__(*exception)

    def add(self, record: Record) -> None:
        """Writes one record, or puts it into quarantine where it cannot be stored or occurs twice.

        Raises:
            EvlecgError: its patient is in another split already; the disk is full.
        """
        reason = self._unfit(record)
        if reason:
            self.reject(Rejected(record.id, reason))
            return
        first = self._split_of_patient.setdefault(record.patient_id, record.split)
        if first != record.split:
            raise EvlecgError(
                f"a patient is in two splits, {first} and {record.split}", where=f"patient {record.patient_id}"
            )
        self._ids.add(record.id)
        block = np.rint(record.signal_mV * np.float32(STEPS_PER_MV)).astype(_STEP_TYPE).tobytes()
        labels = {code: bool(record.labels[code]) for code in self.label_names if code in record.labels}
        row = {
            "id": record.id,
            "patient_id": record.patient_id,
            "split": record.split,
            "fs_hz": record.fs_hz,
            "n_samples": record.signal_mV.shape[1],
            "offset": self._n_bytes,
            "labels": labels,
            "age": MAX_AGE if record.age is not None and record.age > MAX_AGE - 1 else record.age,
            "sex": record.sex,
            "report": record.report,
            "repairs": list(record.repairs),
            "sha256": hashlib.sha256(block).hexdigest(),
        }
        line = _line(row)
        with self._writing():
            self._signals.write(block)
            self._records.write(line)
        self._n_bytes += len(block)
        self._records_sha256.update(line)
        self.n_kept += 1
        self.n_repaired += bool(record.repairs)
        self._records_in[record.split] += 1
        for code, present in labels.items():
            (self._positive if present else self._negative)[record.split, code] += 1

    def reject(self, rejected: Rejected) -> None:
        """Writes why a record is not here."""
        kind = "rejected" if rejected.fault else "dropped"
        self.n_rejected += rejected.fault
        self.n_dropped += not rejected.fault
        self.reasons[rejected.reason.partition(":")[0]] += 1
        with self._writing():
            self._quarantine.write(_line({"id": rejected.id, "kind": kind, "reason": rejected.reason}))

    def finish(self, about: dict[str, Any]) -> dict[str, Any]:
        """Completes the folder; it takes its name when the block ends.

        Args:
            about: `dataset`, `title`, `licence`, `citation`, `source`, `options`: copied into the manifest.

        Returns:
            The manifest.
        """
        assessed = {code for _, code in (*self._positive, *self._negative)}
        names = [code for code in self.label_names if code in assessed]
        manifest = {
            "format_version": FORMAT_VERSION,
            "evlecg_version": __version__,
            **about,
            "label_names": names,
            "label_descriptions": {code: LABELS[code] for code in names},
            "labels_not_assessed": [code for code in self.label_names if code not in assessed],
            "splits": {split: self._split_counts(split, names) for split in SPLITS},
            "n_kept": self.n_kept,
            "n_repaired": self.n_repaired,
            "n_rejected": self.n_rejected,
            "n_dropped": self.n_dropped,
            "n_bytes": self._n_bytes,
            "records_sha256": self._records_sha256.hexdigest(),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        with self._writing():
            for file in (self._signals, self._records, self._quarantine):
                _sync(file)
            with (self._folder / "manifest.json").open("wb") as file:
                file.write((json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())
                _sync(file)
        self._finished = True
        return manifest

    def _split_counts(self, split: str, names: list[str]) -> dict[str, Any]:
        return {
            "records": self._records_in[split],
            "patients": sum(value == split for value in self._split_of_patient.values()),
            "labels": {
                code: {"positive": self._positive[split, code], "negative": self._negative[split, code]}
                for code in names
            },
        }

    def _unfit(self, record: Record) -> str:
        if not _ID.fullmatch(record.id):
            return "unusable id: letters, digits, _ - . and / only"
        if record.id in self._ids:
            return "duplicate: a record of this id is there already"
        if record.signal_mV.shape[1] == 0:
            return "empty: no samples"
        largest_mV = float(np.abs(record.signal_mV).max())
        if not np.isfinite(largest_mV):
            return "not finite: NaN or infinity in the signal"
        if round(largest_mV * STEPS_PER_MV) > np.iinfo(np.int16).max:
            return f"absurd amplitude: {largest_mV:.1f} mV"
        return ""

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise EvlecgError(f"the prepared folder cannot be written: {error.strerror}", where=self.out) from error


class Prepared:
    """A prepared folder, opened for reading. Cheap to send to another process: it opens the folder again there.

    Use `Prepared.open(path)`.

    Attributes:
        path: the folder.
        manifest: as in manifest.json.
        record_ids, patient_ids: one for each record.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        self.path = path
        self.manifest = manifest
        self._rows = rows
        self.record_ids: tuple[str, ...] = tuple(row["id"] for row in rows)
        self.patient_ids: tuple[str, ...] = tuple(row["patient_id"] for row in rows)

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
            manifest = json.loads((path / "manifest.json").read_bytes())
            if manifest["format_version"] != FORMAT_VERSION:
                raise EvlecgError(
                    f"a prepared folder has format {manifest['format_version']}, this evlecg reads {FORMAT_VERSION}",
                    where=path,
                    hint="prepare it again with --overwrite",
                )
            text = (path / "records.jsonl").read_bytes()
            if hashlib.sha256(text).hexdigest() != manifest["records_sha256"]:
                raise EvlecgError("a prepared folder is damaged: records.jsonl was changed", where=path)
            rows = [json.loads(line) for line in text.splitlines()]
            size, said = (path / "signals.bin").stat().st_size, manifest["n_bytes"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EvlecgError(
                "a prepared folder is damaged", where=path, hint=f"{type(error).__name__}; prepare it again"
            ) from error
        if size != said:
            raise EvlecgError(
                f"a prepared folder is damaged: signals.bin holds {size} bytes, not {said}",
                where=path,
                hint="prepare it again with --overwrite",
            )
        return cls(path, manifest, rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return Prepared.open, (self.path,)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(self.manifest["label_names"])

    @property
    def label_descriptions(self) -> dict[str, str]:
        return dict(self.manifest["label_descriptions"])

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that change with any signal, label, split or label set, and with nothing else."""
        parts = [self.manifest["dataset"], self.manifest["records_sha256"], self.manifest["label_names"]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    @cached_property
    def _steps(self) -> np.memmap:
        return np.memmap(self.path / "signals.bin", dtype=_STEP_TYPE, mode="r")

    def record(self, index: int) -> Record:
        """Record `index`; its signal is a fresh float32 [12, T] array in millivolt."""
        row = self._rows[index]
        start = row["offset"] // _STEP_TYPE.itemsize
        block = self._steps[start : start + len(LEADS) * row["n_samples"]].reshape(len(LEADS), -1)
        return Record(
            id=row["id"],
            patient_id=row["patient_id"],
            signal_mV=np.divide(block, np.float32(STEPS_PER_MV), dtype=np.float32),
            fs_hz=row["fs_hz"],
            labels=row["labels"],
            split=row["split"],
            age=row["age"],
            sex=row["sex"],
            report=row["report"],
            repairs=tuple(row["repairs"]),
        )

    def indices(self, split: str) -> np.ndarray:
        """int64 indices of a split's records, in order.

        Raises:
            EvlecgError: no such split.
        """
        if split not in SPLITS:
            raise EvlecgError(f"unknown split {split!r}", hint=f"known: {', '.join(SPLITS)}")
        return np.array([index for index, row in enumerate(self._rows) if row["split"] == split], np.int64)

    def labels(self, indices: Sequence[int] | np.ndarray, names: Sequence[str]) -> np.ndarray:
        """float64 [len(indices), len(names)]: 1 present, 0 not present, NaN not assessed."""
        found = [[float(self._rows[int(i)]["labels"].get(name, np.nan)) for name in names] for i in indices]
        return np.array(found, np.float64).reshape(len(indices), len(names))

    def quarantine(self) -> list[dict[str, str]]:
        """`id`, `kind` (rejected or dropped) and `reason` of each record that is not here."""
        return [json.loads(line) for line in (self.path / "quarantine.jsonl").read_bytes().splitlines()]


def is_prepared(folder: Path) -> bool:
    """Whether a folder looks like a prepared one (it may still be damaged)."""
    return (folder / "manifest.json").is_file() and (folder / "records.jsonl").is_file()


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
