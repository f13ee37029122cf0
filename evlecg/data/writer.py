"""Writing a prepared folder: shards first, each complete or absent, then one pass that puts them together.

A shard is a run of consecutive entries of a dataset. Its blocks go to `blocks/NNNNN.bin` and its lines to
`parts/NNNNN.jsonl`, which appears last and marks it as complete; so any process on any machine that sees the folder
can write any shard, a killed job loses the shards it was writing and no others, and the result does not depend on who
wrote what. What needs a view of all records (ids, patients across splits, the same signal twice) is decided by
`assemble`, in the order of the entries.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from evlecg import __version__
from evlecg.data.gates import resampled
from evlecg.data.readers_base import MAX_AGE, Rejected
from evlecg.data.store import FORMAT_VERSION, HASH_CHARACTERS, STEP_TYPE, STEPS_PER_MV, block_name, question_rows
from evlecg.errors import EvlecgError, RunFailed
from evlecg.schema import SPLITS, Record

_ID = re.compile(r"[A-Za-z0-9_./-]+")


def part_path(folder: Path, shard: int) -> Path:
    """The file that marks a shard as complete."""
    return folder / "parts" / f"{shard:05d}.jsonl"


def write_shard(
    folder: Path,
    shard: int,
    results: Iterable[Record | Rejected],
    *,
    to_hz: int | None = None,
    files: Callable[[], Sequence[tuple[str, int, str]]] = tuple,
) -> int:
    """Writes one shard; `parts/` and `blocks/` must exist.

    A record's hash is that of its signal before it is resampled: the same ECG is recognised in folders of any rate.

    Args:
        folder: folder that is being prepared.
        shard: its number.
        results: what its entries became, in order.
        to_hz: signals of another sampling rate are resampled to it; None to leave all as they are.
        files: called once all results are read, for the (relative path, bytes, sha256) of the files they came from.

    Returns:
        How many entries it has.

    Raises:
        RunFailed: the disk is full, or the folder cannot be written to.
    """
    blocks, part = folder / "blocks" / block_name(shard), part_path(folder, shard)
    # each under a name of its own: what a killed job left running must not write into the files of the next one
    partial, partial_blocks = (part.with_suffix(f".{os.getpid()}.{what}") for what in ("partial", "blocks"))
    n_bytes = n_entries = 0
    with writing(folder):
        with partial_blocks.open("wb") as block_file, partial.open("wb") as part_file:
            for item in results:
                n_entries += 1
                reason = "" if isinstance(item, Rejected) else _unfit(item)
                if reason:
                    item = Rejected(item.id, reason)
                if isinstance(item, Rejected):
                    part_file.write(_line({"id": item.id, "reason": item.reason, "fault": item.fault}))
                    continue
                block = item.image or _steps(item.signal_mV).tobytes()
                sha256 = hashlib.sha256(block).hexdigest()[:HASH_CHARACTERS]
                if to_hz and not item.image and item.fs_hz != to_hz:
                    item = _resampled(item, to_hz)
                    block = _steps(item.signal_mV).tobytes()
                block_file.write(block)
                part_file.write(_line({**_row(item, block, sha256), "shard": shard, "offset": n_bytes}))
                n_bytes += len(block)
            part_file.write(_line({"files": files()}))
            sync(block_file)
            sync(part_file)
        partial_blocks.replace(blocks)
        partial.replace(part)
    return n_entries


def write_part(folder: Path, shard: int, rows: Iterable[Mapping[str, Any]]) -> None:
    """Lines of a shard whose blocks are in their place already; `parts/` must exist.

    Args:
        folder: folder that is being prepared.
        shard: its number.
        rows: as in records.jsonl, or `id`, `reason` and `fault` of a record that is left out.
    """
    with part_path(folder, shard).open("wb") as part:
        part.writelines(map(_line, rows))


def _steps(signal_mV: np.ndarray) -> np.ndarray:
    return np.rint(signal_mV * np.float32(STEPS_PER_MV)).astype(STEP_TYPE)


def _resampled(record: Record, to_hz: int) -> Record:
    said = f"resampled: {record.fs_hz:g} to {to_hz} Hz"
    signal_mV = resampled(record.signal_mV, record.fs_hz, to_hz)
    limit_mV = np.float32(np.iinfo(np.int16).max / STEPS_PER_MV)  # a filter overshoots by some percent at steps
    return replace(
        record,
        signal_mV=signal_mV.clip(-limit_mV, limit_mV),
        fs_hz=float(to_hz),
        repairs=(*record.repairs, said),
    )


def _row(record: Record, block: bytes, sha256: str) -> dict[str, Any]:
    row = {
        "id": record.id,
        "patient_id": record.patient_id,
        "split": record.split,
        "fs_hz": record.fs_hz,
        "n_samples": record.signal_mV.shape[1],
        "n_bytes": len(block),
        "sha256": sha256,
        "labels": {code: bool(present) for code, present in record.labels.items()},
        "age": MAX_AGE if record.age is not None and record.age > MAX_AGE - 1 else record.age,
        "sex": record.sex,
        "report": record.report,
        "device": record.device,
        "repairs": list(record.repairs),
    }
    if record.image:
        row["image"] = True
    if record.questions:
        row["questions"] = question_rows(record.questions)
    return row


def _unfit(record: Record) -> str:
    if not _ID.fullmatch(record.id):
        return "unusable id: letters, digits, _ - . and / only"
    if record.image:
        return ""
    if record.signal_mV.shape[1] == 0:
        return "empty: no samples"
    largest_mV = float(np.abs(record.signal_mV).max())
    if not np.isfinite(largest_mV):
        return "not finite: NaN or infinity in the signal"
    if round(largest_mV * STEPS_PER_MV) > np.iinfo(np.int16).max:
        return f"absurd amplitude: {largest_mV:.1f} mV"
    return ""


@dataclass
class _Tally:
    """Counts of one pass over all shards."""

    kept: int = 0
    repaired: int = 0
    rejected: int = 0
    dropped: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    repairs: Counter[str] = field(default_factory=Counter)
    records: Counter[str] = field(default_factory=Counter)
    positive: Counter[tuple[str, str]] = field(default_factory=Counter)
    negative: Counter[tuple[str, str]] = field(default_factory=Counter)
    questions: Counter[str] = field(default_factory=Counter)
    split_of_patient: dict[str, str] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)
    place_of_hash: dict[str, tuple[str, str]] = field(default_factory=dict)  # id, split ("" where it is elsewhere)

    def trouble(self, row: dict[str, Any]) -> Rejected | None:
        """Why a row that was fit by itself cannot stand beside those before it."""
        if row["id"] in self.ids:
            return Rejected(row["id"], "duplicate: a record of this id is there already")
        place, split = self.place_of_hash.get(row["sha256"], ("", ""))
        # other questions about it are worth keeping: two subsets of a benchmark share pictures
        if place and not (row.get("questions") and split == row["split"]):
            return Rejected(row["id"], f"duplicate: the same signal as {place}", fault=False)
        first = self.split_of_patient.get(row["patient_id"], row["split"])
        if first != row["split"]:
            return Rejected(row["id"], f"patient in two splits: {first} and {row['split']}")
        return None

    def add(self, row: dict[str, Any]) -> None:
        self.ids.add(row["id"])
        self.place_of_hash.setdefault(row["sha256"], (row["id"], row["split"]))
        self.split_of_patient[row["patient_id"]] = row["split"]
        self.kept += 1
        self.repaired += bool(row["repairs"])
        self.repairs.update({repair.partition(":")[0] for repair in row["repairs"]})
        self.records[row["split"]] += 1
        self.questions[row["split"]] += len(row.get("questions", ()))
        for code, present in row["labels"].items():
            (self.positive if present else self.negative)[row["split"], code] += 1

    def reject(self, item: Rejected) -> dict[str, str]:
        self.rejected += item.fault
        self.dropped += not item.fault
        self.reasons[item.reason.partition(":")[0]] += 1
        return {"id": item.id, "kind": "rejected" if item.fault else "dropped", "reason": item.reason}


def assemble(
    folder: Path,
    n_shards: int,
    *,
    descriptions: Mapping[str, str],
    about: Mapping[str, Any],
    files: Iterable[tuple[str, int, str]] = (),
    known: Mapping[str, str] | None = None,
    strict: bool = False,
) -> dict[str, Any]:
    """Turns complete shards into a prepared folder, in place.

    Args:
        folder: holds `blocks/` and `parts/`.
        n_shards: how many shards there are.
        descriptions: label code -> noun phrase, in the order of the label names.
        about: `dataset`, `title`, `licence`, `citation`, `options`, ...: copied into the manifest.
        files: (relative path, bytes, sha256) of files that were read for no shard in particular.
        known: hash -> where it is, of signals that are elsewhere already: such records are dropped.
        strict: fail where any record was rejected.

    Returns:
        The manifest.

    Raises:
        EvlecgError: no record could be used; a rejected one and `strict`.
        RunFailed: the disk is full.
    """
    tally = _Tally(place_of_hash={key: (where, "") for key, where in (known or {}).items()})
    taken = {name: (size, sha256) for name, size, sha256 in files}
    digest = hashlib.sha256()
    with writing(folder):
        with (folder / "records.jsonl").open("wb") as records, (folder / "quarantine.jsonl").open("wb") as quarantine:
            for row in _rows(folder, n_shards):
                if "files" in row:
                    taken.update({name: (size, sha256) for name, size, sha256 in row["files"]})
                    continue
                item = Rejected(row["id"], row["reason"], row["fault"]) if "reason" in row else tally.trouble(row)
                if item is not None:
                    quarantine.write(_line(tally.reject(item)))
                    continue
                tally.add(row)
                line = _line(row)
                digest.update(line)
                records.write(line)
            sync(records)
            sync(quarantine)
        often = ", ".join(f"{reason} ({n})" for reason, n in tally.reasons.most_common(3))
        if not tally.kept:
            raise EvlecgError("no record could be used", where=about["dataset"], hint=often)
        if strict and tally.rejected:
            said = f"{tally.rejected} of {tally.kept + tally.rejected + tally.dropped} records were rejected"
            raise EvlecgError(said, where=about["dataset"], hint=often)
        blocks = {name.name: name.stat().st_size for name in sorted((folder / "blocks").glob("*.bin"))}
        manifest = _manifest(tally, descriptions, about, provenance(taken), blocks, digest.hexdigest())
        with (folder / "manifest.json").open("wb") as file:
            file.write((json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())
            sync(file)
        shutil.rmtree(folder / "parts")
    return manifest


def _rows(folder: Path, n_shards: int) -> Iterator[dict[str, Any]]:
    for shard in range(n_shards):
        with part_path(folder, shard).open("rb") as part:
            for line in part:
                yield json.loads(line)


def _manifest(
    tally: _Tally,
    descriptions: Mapping[str, str],
    about: Mapping[str, Any],
    source: dict[str, Any],
    blocks: dict[str, int],
    records_sha256: str,
) -> dict[str, Any]:
    assessed = {code for _, code in (*tally.positive, *tally.negative)}
    names = [code for code in descriptions if code in assessed]
    patients = Counter(tally.split_of_patient.values())
    splits = {
        split: {
            "records": tally.records[split],
            "patients": patients[split],
            "questions": tally.questions[split],
            "labels": {
                code: {"positive": tally.positive[split, code], "negative": tally.negative[split, code]}
                for code in names
            },
        }
        for split in SPLITS
    }
    return {
        "format_version": FORMAT_VERSION,
        "evlecg_version": __version__,
        **about,
        "source": source,
        "label_names": names,
        "label_descriptions": {code: descriptions[code] for code in names},
        "labels_not_assessed": [code for code in descriptions if code not in assessed],
        "splits": splits,
        "n_kept": tally.kept,
        "n_repaired": tally.repaired,
        "n_rejected": tally.rejected,
        "n_dropped": tally.dropped,
        "reasons": dict(tally.reasons.most_common()),
        "repairs": dict(tally.repairs.most_common()),
        "blocks": blocks,
        "records_sha256": records_sha256,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def provenance(files: Mapping[str, tuple[int, str]]) -> dict[str, Any]:
    """Count, bytes and one hash of the files that were read, the same wherever the folder lies.

    Args:
        files: relative path -> (bytes, sha256; "" for files too large to be hashed on the way).
    """
    digest = hashlib.sha256()
    for relative, (size, sha256) in sorted(files.items()):
        digest.update(f"{relative}\t{size}\t{sha256}\n".encode())
    return {
        "n_files": len(files),
        "n_bytes": sum(size for size, _ in files.values()),
        "sha256": digest.hexdigest() if files else None,
    }


@contextmanager
def writing(
    folder: Path, hint: str = "what is complete stays: once there is room, the same command goes on"
) -> Iterator[None]:
    """Turns a full disk or a read-only folder into an error that says so."""
    try:
        yield
    except OSError as error:
        raise RunFailed(f"the prepared folder cannot be written: {error.strerror}", where=folder, hint=hint) from error


def sync(file: BinaryIO) -> None:
    """Puts a file on the disk itself, not only into the system's cache."""
    file.flush()
    os.fsync(file.fileno())


def write_prepared(
    folder: Path,
    records: Sequence[Record | Rejected],
    *,
    descriptions: Mapping[str, str],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """A prepared folder from records in memory: for data that no reader knows.

    Args:
        folder: a new folder.
        records: with their splits.
        descriptions: label code -> noun phrase that completes "Does this ECG show ...?".
        about: `dataset`, `title`, `licence`, `citation`.

    Returns:
        The manifest.

    Raises:
        EvlecgError: no record could be used.
        RunFailed: the folder is there already, or cannot be written to.
    """
    with writing(folder):
        for name in ("blocks", "parts"):
            (folder / name).mkdir(parents=True)
    write_shard(folder, 0, records)
    return assemble(folder, 1, descriptions=descriptions, about=about)


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
