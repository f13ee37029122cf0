"""The prepare job: a dataset as published, or generated, becomes a prepared folder (`data/store.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from evlecg.data.labels import resolve_labels
from evlecg.data.readers import READERS, Reader, ReadOptions, Rejected, Source, detect, find_reader, home_of
from evlecg.data.store import Prepared, PreparedWriter, is_prepared
from evlecg.errors import EvlecgError
from evlecg.progress import Progress

SILENT = Progress()


@dataclass(frozen=True)
class PrepareSummary:
    """What came of it.

    Attributes:
        n_read: entries of the dataset: kept, rejected and dropped.
        n_kept: records in the folder, the repaired ones included.
        n_rejected: records with a fault, in quarantine.
        n_dropped: sound records that were left out (no class of the label set, not in a partial copy).
        splits: split -> records.
        n_patients: over all splits.
        positives: label -> records that have it.
        fingerprint: of the folder.
    """

    out: Path
    dataset: str
    n_read: int
    n_kept: int
    n_repaired: int
    n_rejected: int
    n_dropped: int
    splits: dict[str, int]
    n_patients: int
    positives: dict[str, int]
    reasons: dict[str, int]
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "out": str(self.out)}


@dataclass(frozen=True)
class FoundDataset:
    """Where a dataset lies.

    Attributes:
        path: the prepared folder, or the top folder of the raw download.
        prepared: which of the two.
        dataset: name in `READERS`.
        prepare_to: where a raw download is to be prepared to; None for a prepared folder.
    """

    path: Path
    prepared: bool
    dataset: str
    prepare_to: Path | None = None


def prepare(
    dataset: str,
    *,
    source: Path | None,
    out: Path,
    labels: str | None = None,
    overwrite: bool = False,
    strict: bool = False,
    seed: int = 0,
    fs: int | None = None,
    counts: Mapping[str, int] | None = None,
    progress: Progress = SILENT,
) -> PrepareSummary:
    """Reads a dataset, checks and mends every record, and writes the prepared folder.

    Args:
        dataset: name in `READERS`.
        source: the download, or a folder around it; not needed, and not read, for generated data.
        out: the prepared folder.
        labels: label set, or several joined by `+`; None for the dataset's own.
        overwrite: replace an older prepared folder.
        strict: fail where any record is rejected.
        seed: of the split where the dataset brings none, and of generated data.
        fs: sampling rate in Hz, where the dataset was published at several.
        counts: split -> records, for generated data.
        progress: who is told.

    Raises:
        EvlecgError: bad input of any kind; nothing is left under `out` then, or what was there before.
    """
    reader = find_reader(dataset)
    wanted = resolve_labels(labels or reader.labels)
    if fs is not None and fs not in reader.rates_hz:
        rates = " or ".join(str(rate) for rate in reader.rates_hz)
        hint = f"fs can be {rates}" if rates else "its records keep the rate at which they were published"
        raise EvlecgError(f"{reader.title} has no choice of {fs} Hz", where="fs", hint=hint)
    opened = _open_source(dataset, reader, source, out)
    options = ReadOptions(labels=wanted, seed=seed, fs_hz=fs, counts=dict(counts or {}))
    with PreparedWriter(out, label_names=wanted, overwrite=overwrite) as writer:
        reading = reader.open(cast(Any, opened), options)
        if reading.n_entries() == 0:
            raise EvlecgError("the dataset is empty: no record was found", where=source or dataset, hint=reader.needs)
        progress.info(f"preparing {reader.title}: {reading.n_entries()} records")
        with progress.task(f"prepare {dataset}", reading.n_entries()) as advance:
            for item in reading.records():
                if isinstance(item, Rejected):
                    progress.detail(f"{item.id}: {item.reason}")
                    writer.reject(item)
                elif item.labels:
                    writer.add(item)
                else:
                    writer.reject(Rejected(item.id, "none of the wanted labels was assessed", fault=False))
                advance(1)
        often = ", ".join(f"{reason} ({n})" for reason, n in writer.reasons.most_common(3))
        if writer.n_kept == 0:
            raise EvlecgError("no record could be used", where=source or dataset, hint=often)
        if strict and writer.n_rejected:
            raise EvlecgError(
                f"{writer.n_rejected} of {reading.n_entries()} records were rejected", where=dataset, hint=often
            )
        manifest = writer.finish(
            {
                "dataset": dataset,
                "title": reader.title,
                "licence": reader.licence,
                "citation": reader.citation,
                "source": opened.provenance() if opened else {"n_files": 0, "n_bytes": 0, "sha256": None},
                "options": {
                    "labels": labels or reader.labels,
                    "seed": seed,
                    "fs_hz": fs,
                    "counts": dict(options.counts),
                },
            }
        )
    if writer.n_rejected or writer.n_dropped:
        progress.info(f"left out {writer.n_rejected} rejected and {writer.n_dropped} dropped records: {often}")
    splits = manifest["splits"]
    return PrepareSummary(
        out=out,
        dataset=dataset,
        n_read=writer.n_kept + writer.n_rejected + writer.n_dropped,
        n_kept=writer.n_kept,
        n_repaired=writer.n_repaired,
        n_rejected=writer.n_rejected,
        n_dropped=writer.n_dropped,
        splits={split: splits[split]["records"] for split in splits},
        n_patients=sum(splits[split]["patients"] for split in splits),
        positives={
            code: sum(splits[split]["labels"][code]["positive"] for split in splits) for code in manifest["label_names"]
        },
        reasons=dict(writer.reasons),
        fingerprint=Prepared.open(out).fingerprint,
    )


def looks_raw(dataset: str, folder: Path) -> bool:
    """Whether a download of `dataset` lies in `folder` or just below it."""
    return dataset in READERS and home_of(dataset, folder) is not None


def find_dataset(name_or_dir: str, roots: list[Path]) -> FoundDataset | None:
    """What a user means by a dataset name or a folder.

    A name is looked up as ROOT/NAME (prepared), ROOT/NAME-prepared, then ROOT/NAME as a raw download; a folder is
    taken as it is.

    Args:
        name_or_dir: a name in `READERS`, the name of a folder below a root, or a folder.
        roots: where named datasets lie, in order.

    Returns:
        What was found; None where there is nothing.

    Raises:
        EvlecgError: a prepared folder was found, but it is damaged.
    """
    for root in roots:
        for folder in (root / name_or_dir, root / f"{name_or_dir}-prepared"):
            if is_prepared(folder):
                return FoundDataset(folder, True, Prepared.open(folder).manifest["dataset"])
        if looks_raw(name_or_dir, root / name_or_dir):
            return FoundDataset(root / name_or_dir, False, name_or_dir, root / f"{name_or_dir}-prepared")
    folder = Path(name_or_dir)
    if not folder.is_dir():
        return None
    if is_prepared(folder):
        return FoundDataset(folder, True, Prepared.open(folder).manifest["dataset"])
    dataset = detect(folder)
    if dataset is None:
        return None
    folder = folder.resolve()
    return FoundDataset(folder, False, dataset, folder.with_name(f"{folder.name}-prepared"))


def _open_source(dataset: str, reader: Reader, source: Path | None, out: Path) -> Source | None:
    if not reader.needs_source:
        return None
    how = "; ".join(reader.get)
    if source is None:
        raise EvlecgError(f"{dataset} needs its download", where="--source", hint=f"get it: {how}")
    if not source.is_dir():
        raise EvlecgError("the source folder does not exist", where=source, hint=f"get it: {how}")
    if out.resolve() == source.resolve() or out.resolve() in source.resolve().parents:
        raise EvlecgError("the source lies inside the output folder", where=out, hint="choose another --out")
    try:
        home = home_of(dataset, source)
    except OSError as error:
        raise EvlecgError(f"the source folder cannot be read: {error.strerror}", where=source) from error
    if home is None:
        if not any(source.iterdir()):
            raise EvlecgError("the source folder is empty", where=source, hint=f"get it: {how}")
        raise EvlecgError(f"no {reader.title} in this folder", where=source, hint=f"it needs {reader.needs}")
    return Source(home)
