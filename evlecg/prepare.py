"""The prepare job: a dataset as published, or generated, becomes a prepared folder (`data/store.py`).

The main process names the entries; worker processes, here and under `accelerate launch`, read them shard by shard.
What is complete stays: an interrupted job goes on where it stopped, and a finished one is recognised by its options
and the names, sizes and times of the files it was made from.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, cast

from evlecg import __version__
from evlecg.data.labels import LABELS, resolve_labels
from evlecg.data.readers import READERS, Reader, Reading, ReadOptions, Rejected, Source, detect, find_reader, home_of
from evlecg.data.store import FORMAT_VERSION, Prepared, fingerprint, is_prepared, read_manifest
from evlecg.data.writer import assemble, part_path, write_shard, writing
from evlecg.errors import EvlecgError, RunFailed
from evlecg.files import kept_folder, partial_folder, write_text_atomic
from evlecg.progress import Progress
from evlecg.schema import Record

SILENT = Progress()
MOST_WORKERS = 8  # one disk seldom feeds more
WAIT_S = 0.2
PATIENCE_S = 60.0  # how long the first process waits for a shard of the others before it reads them all by itself
STALLED_S = 1800.0  # how long the others wait for the first one
JOINING_S = 10.0  # processes of one launch start within that time of each other


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
        n_questions: the dataset's own questions, over all splits.
        positives: label -> records that have it.
        repairs: what was mended -> records.
        reasons: why records are in quarantine -> records.
        fingerprint: of the folder.
        unchanged: the folder was there already, made of the same files with the same options; nothing was done.
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
    n_questions: int
    positives: dict[str, int]
    repairs: dict[str, int]
    reasons: dict[str, int]
    fingerprint: str
    unchanged: bool = False

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


@dataclass(frozen=True)
class _Task:
    """What a worker process needs to open the dataset for itself."""

    dataset: str
    root: Path | None
    options: ReadOptions
    resample_hz: int | None
    folder: Path


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
    signals: Mapping[str, Path] | None = None,
    table: Path | None = None,
    exclude: Iterable[Path] = (),
    workers: int | None = None,
    progress: Progress = SILENT,
) -> PrepareSummary:
    """Reads a dataset, checks and mends every record, and writes the prepared folder.

    Under `accelerate launch` (or any launcher that sets RANK and WORLD_SIZE) every process reads its share of the
    shards, and the first one puts them together; all must see the same `out`. The result is the same as of one.

    Args:
        dataset: name in `READERS`.
        source: the download, or a folder around it; not needed, and not read, for generated data.
        out: the prepared folder.
        labels: label set, or several joined by `+`; None for the dataset's own.
        overwrite: replace an older prepared folder, even one that is up to date.
        strict: fail where any record is rejected.
        seed: of the split where the dataset brings none, and of generated data.
        fs: sampling rate in Hz: as published where the dataset has it, else every other rate is resampled to it.
        counts: split -> records, for generated data.
        signals: root name -> folder of the signals that a dialogue dataset points to.
        table: CSV of labels, for folders without labels of their own.
        exclude: prepared folders whose signals are left out here, whatever they are called there.
        workers: reading processes; None for one a core, up to `MOST_WORKERS`, and one for small datasets.
        progress: who is told.

    Raises:
        EvlecgError: bad input of any kind; nothing is left under `out` then, or what was there before.
        RunFailed: a worker died; what was done stays, and the same call goes on there.
    """
    reader = find_reader(dataset)
    sets = labels or reader.labels
    wanted = resolve_labels(sets) if sets else ()  # none: the folder brings its own
    if fs is not None and fs < 50:
        raise EvlecgError(f"{fs} Hz are too few to draw an ECG", where="fs", hint="50 or more")
    if workers is not None and workers < 1:
        raise EvlecgError(f"{workers} workers cannot read", where="workers", hint="1 or more")
    opened = _open_source(dataset, reader, source, out)
    _check_extras(reader, table, signals)
    published_hz = fs if fs in reader.rates_hz else None
    options = ReadOptions(wanted, seed, published_hz, dict(counts or {}), dict(signals or {}), table)
    known = known_signals(exclude)
    partial = partial_folder(out)
    about = {
        "dataset": dataset,
        "title": reader.title,
        "licence": reader.licence,
        "citation": reader.citation,
        "options": {
            "labels": labels or reader.labels,
            "seed": seed,
            "fs_hz": fs,
            "counts": dict(options.counts),
            "strict": strict,
            "exclude": [Prepared.open(folder).fingerprint for folder in exclude],
        },
    }
    plan = {
        "format_version": FORMAT_VERSION,
        "evlecg_version": __version__,
        "dataset": dataset,
        **about["options"],
        "source": [
            item.signature(apart=(out, partial))
            for item in (opened, *(Source(folder) for folder in options.signals.values()))
            if item is not None
        ],
        "table": [_file_signature(path) for path in (table, table.with_suffix(".yaml"))] if table else None,
    }
    if not overwrite and (done := finished(out, plan)) is not None:
        progress.info(f"{out} is up to date: the same source and options, {done.n_kept} records; nothing to do")
        return done
    task = _Task(dataset, opened.root if opened else None, options, None if published_hz else fs, partial)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if rank:
        return _help(task, plan, out, workers, rank, world, overwrite)

    with kept_folder(out, overwrite, keep=lambda folder: _has_plan(folder, plan)) as folder:
        check_replaceable(out, overwrite)
        with writing(out):
            for name in ("blocks", "parts"):
                (folder / name).mkdir(exist_ok=True)
        write_text_atomic(folder / "plan.json", json.dumps(plan))
        worker = _Worker(task)
        reading = worker.reading
        if reading.n_entries() == 0:
            raise EvlecgError("the dataset is empty: no record was found", where=source or dataset, hint=reader.needs)
        progress.info(f"preparing {reader.title}" + (f": {n} records" if (n := reading.n_entries()) else ""))
        n_shards = _read_shards(worker, workers, rank, world, progress)
        if not n_shards:
            raise EvlecgError("the dataset is empty: no record was found", where=source or dataset, hint=reader.needs)
        if not _await(lambda: sum(not part_path(folder, number).exists() for number in range(n_shards)), PATIENCE_S):
            progress.info("the other processes are gone or were never there: reading their shards here")
            _read_shards(_Worker(task), workers, 0, 1, SILENT)
        manifest = assemble(
            folder,
            n_shards,
            descriptions={code: LABELS[code] for code in wanted} | dict(reading.descriptions),
            about={**about, "plan": plan},
            files=worker.files(),
            known=known,
            strict=strict,
        )
        (folder / "plan.json").unlink()
    return summary_of(out, manifest)


class _Worker:
    """A dataset opened in this process, and the shards that it makes of its entries."""

    def __init__(self, task: _Task) -> None:
        self.task = task
        self.reader = find_reader(task.dataset)
        self.source = Source(task.root) if task.root else None
        self.reading = self.reader.open(cast(Any, self.source), task.options)

    def write(self, number: int, entries: list[Any], advance: Callable[[int], None] | None = None) -> int:
        """Writes one shard and returns how many entries it has."""
        results = self._results(entries, advance or (lambda n: None))
        return write_shard(self.task.folder, number, results, to_hz=self.task.resample_hz, files=self.files)

    def files(self) -> list[tuple[str, int, str]]:
        return self.source.taken() if self.source else []

    def _results(self, entries: list[Any], advance: Callable[[int], None]) -> Iterator[Record | Rejected]:
        for item in self.reading.records(entries):
            advance(1)
            if isinstance(item, Rejected):
                yield item
            elif not (item.labels or item.questions or (self.reader.unlabelled and item.report)):
                yield Rejected(item.id, "none of the wanted labels was assessed", fault=False)
            else:
                yield item


_worker: _Worker | None = None  # of a worker process


def _start_worker(task: _Task) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process answers it
    threading.Thread(target=_end_with_main, daemon=True).start()
    _worker = _Worker(task)


def _end_with_main() -> None:
    """Ends this worker when the main process is gone: one that was killed cannot say so."""
    main = parent_process()
    assert main is not None
    main.join()
    os._exit(1)


def _work(number: int, entries: list[Any]) -> int:
    assert _worker is not None
    return _worker.write(number, entries)


class _Shards:
    """A reading's entries, cut into numbered shards."""

    def __init__(self, task: _Task, reading: Reading, rank: int, world: int, advance: Callable[[int], None]) -> None:
        self._entries, self._size = iter(reading.entries), reading.shard
        self._folder, self._rank, self._world, self._advance = task.folder, rank, world, advance
        self.n_shards = self.n_found = 0

    def __iter__(self) -> Iterator[tuple[int, list[Any]]]:
        """(number, entries) of the shards that this process has to read; a second loop goes on after the first."""
        while entries := list(itertools.islice(self._entries, self._size)):
            number = self.n_shards
            self.n_shards += 1
            own = number % self._world == self._rank
            found = part_path(self._folder, number).exists()
            self.n_found += found and own
            if own and not found:
                yield number, entries
            else:
                self._advance(len(entries))


def _read_shards(worker: _Worker, workers: int | None, rank: int, world: int, progress: Progress) -> int:
    """Reads this process's share of the shards that are not complete yet; returns how many there are in all."""
    with progress.task(f"prepare {worker.task.dataset}", worker.reading.n_entries()) as advance:
        shards = _Shards(worker.task, worker.reading, rank, world, advance)
        first = list(itertools.islice(shards, 2))
        alone = workers == 1 or (workers is None and (len(first) < 2 or _cores() == 1))
        if alone:
            for number, entries in itertools.chain(first, shards):
                worker.write(number, entries, advance)
        else:
            _read_in_parallel(worker.task, itertools.chain(first, shards), workers or _cores(), advance)
    if shards.n_found and not rank:
        progress.info(f"went on after an interruption: {shards.n_found} of {shards.n_shards} shards were complete")
    return shards.n_shards


def _read_in_parallel(
    task: _Task, shards: Iterable[tuple[int, list[Any]]], workers: int, advance: Callable[[int], None]
) -> None:
    # spawn: a forked child would inherit the locks of threads that it does not have
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(task,))
    running: set[Future[int]] = set()
    try:
        for number, entries in shards:
            if len(running) >= 2 * workers:
                running = _advanced(running, advance)
            running.add(pool.submit(_work, number, entries))
        while running:
            running = _advanced(running, advance)
    except BrokenProcessPool as error:
        raise RunFailed(
            "a worker process died", where=task.dataset, hint="out of memory? fewer --workers; what is done stays"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _advanced(running: set[Future[int]], advance: Callable[[int], None]) -> set[Future[int]]:
    done, running = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        advance(future.result())
    return running


def _cores() -> int:
    """Cores that this process may use, shared with the other processes that a launcher started on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _help(
    task: _Task, plan: dict[str, Any], out: Path, workers: int | None, rank: int, world: int, overwrite: bool
) -> PrepareSummary:
    """What the other processes of a launcher do: read their shards, then wait for the first one to finish."""

    def done() -> PrepareSummary | None:
        return None if task.folder.exists() else finished(out, plan)

    if overwrite:  # the folder that is there may be the one to be replaced
        _await(lambda: not _has_plan(task.folder, plan), JOINING_S)
    _await_first(lambda: not (_has_plan(task.folder, plan) or done()))
    if _has_plan(task.folder, plan):
        _read_shards(_Worker(task), workers, rank, world, SILENT)
    _await_first(lambda: not done())
    summary = done()
    assert summary is not None
    return summary


def _await_first(missing: Callable[[], int]) -> None:
    """Waits for the first process.

    Raises:
        RunFailed: nothing came of it.
    """
    if not _await(missing, STALLED_S):
        raise RunFailed(f"waited {STALLED_S:g} s for the first process", hint="run it again: it goes on from here")


def _has_plan(folder: Path, plan: dict[str, Any]) -> bool:
    with suppress(OSError, ValueError):
        return json.loads((folder / "plan.json").read_bytes()) == plan
    return False


def _await(missing: Callable[[], int], patience_s: float) -> bool:
    """Waits for other processes until nothing is missing any more; False where nothing changed for `patience_s`."""
    last, since_s = missing(), time.monotonic()
    while last:
        time.sleep(WAIT_S)
        now = missing()
        if now != last:
            last, since_s = now, time.monotonic()
        if time.monotonic() - since_s > patience_s:
            return False
    return True


def finished(out: Path, plan: dict[str, Any]) -> PrepareSummary | None:
    """The summary of a folder that was made with this plan; None where nothing is there.

    Raises:
        EvlecgError: it was made of something else, or otherwise.
    """
    if not is_prepared(out):
        return None
    try:
        manifest = read_manifest(out)
    except (OSError, ValueError, KeyError):
        return None  # damaged: not empty, hence an error unless it is to be overwritten
    other = [key for key, value in plan.items() if manifest.get("plan", {}).get(key) != value]
    if other:
        raise EvlecgError(
            f"the output folder was prepared from something else: {', '.join(other)} differ", where=out,
            hint="choose another --out, or add --overwrite",
        )  # fmt: skip
    return replace(summary_of(out, manifest), unchanged=True)


def summary_of(out: Path, manifest: dict[str, Any]) -> PrepareSummary:
    """What a manifest says of a prepared folder."""
    splits = manifest["splits"]
    return PrepareSummary(
        out=out,
        dataset=manifest["dataset"],
        n_read=manifest["n_kept"] + manifest["n_rejected"] + manifest["n_dropped"],
        n_kept=manifest["n_kept"],
        n_repaired=manifest["n_repaired"],
        n_rejected=manifest["n_rejected"],
        n_dropped=manifest["n_dropped"],
        splits={split: splits[split]["records"] for split in splits},
        n_patients=sum(splits[split]["patients"] for split in splits),
        n_questions=sum(splits[split]["questions"] for split in splits),
        positives={
            code: sum(splits[split]["labels"][code]["positive"] for split in splits) for code in manifest["label_names"]
        },
        repairs=manifest["repairs"],
        reasons=manifest["reasons"],
        fingerprint=fingerprint(manifest),
    )


def check_replaceable(out: Path, overwrite: bool) -> None:
    """Only a prepared folder may be overwritten.

    Raises:
        EvlecgError: `out` holds something else.
    """
    if overwrite and out.is_dir() and any(out.iterdir()) and not is_prepared(out):
        raise EvlecgError(
            "the output folder is not a prepared folder, and is not replaced", where=out, hint="choose another"
        )


def known_signals(folders: Iterable[Path]) -> dict[str, str]:
    """Hash -> where, of every signal in other prepared folders."""
    known: dict[str, str] = {}
    for folder in folders:
        prepared = Prepared.open(folder)
        dataset = prepared.manifest["dataset"]
        known.update({key: f"{dataset}/{record_id}" for key, record_id in prepared.hashes().items()})
    return known


def _check_extras(reader: Reader, table: Path | None, signals: Mapping[str, Path] | None) -> None:
    if table is not None and not table.is_file():
        raise EvlecgError("the table of labels does not exist", where=table)
    for name, folder in (signals or {}).items():
        if not folder.is_dir():
            raise EvlecgError(f"the folder of the signals of {name} does not exist", where=folder)


def _file_signature(path: Path) -> list[int] | None:
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else None


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
