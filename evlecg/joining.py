"""Several prepared folders become one: to train on all of them, or to test on hearts that none of them trained.

Nothing is read from the datasets again. Blocks are linked (copied where a link cannot be made), lines are written anew:
ids get the dataset's name before them, the same signal in two folders stays once, a patient stays in one split, also
where two datasets number the same patients (`patient_of`), or hold the same signal of somebody.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evlecg import __version__
from evlecg.data.labels import resolve_labels
from evlecg.data.readers_base import split_of
from evlecg.data.readers_cinc import cohort_of
from evlecg.data.store import FORMAT_VERSION, Prepared, block_name
from evlecg.data.writer import assemble, write_part, writing
from evlecg.errors import EvlecgError
from evlecg.files import new_folder
from evlecg.prepare import SILENT, PrepareSummary, check_replaceable, finished, known_signals, summary_of
from evlecg.progress import Progress
from evlecg.schema import SPLITS

NAME = "joint"  # of what comes out, as a dataset
UNKNOWN = "ptbxl:record-"  # begins what stands for a patient whom nothing tells
# About the recordings of other datasets.
DIALOGUES = {"ecgqa", "ecgqa-template", "ecginstruct", "ecg-grounding", "ecg-r1", "ecgbench"}
HOMES = {  # cohort of a challenge, or root of a dialogue's recordings -> the dataset that numbers the same patients
    "A": "cpsc2018", "Q": "cpsc2018-extra", "E": "georgia", "C": "chapman-ningbo", "N": "chapman-ningbo", "P": "ptbxl",
    "S": "ptb", "I": "incart", "ptb-xl": "ptbxl", "mimic": "mimic-iv-ecg",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """What is taken of a prepared folder.

    Attributes:
        folder: the prepared folder.
        splits: those that are taken, and stay what they are; empty: all records.
    """

    folder: Path
    splits: tuple[str, ...] = ()


def part_of(text: str) -> Part:
    """`FOLDER` or `FOLDER=SPLIT,SPLIT`, as it is typed; a folder may have `=` in its name.

    Raises:
        EvlecgError: no folder, or no such split.
    """
    if Path(text).is_dir() or "=" not in text:
        return Part(Path(text))
    folder, _, names = text.rpartition("=")
    splits = tuple(name.strip() for name in names.split(","))
    for name in splits:
        if name not in SPLITS:
            raise EvlecgError(f"unknown split {name!r}", where=text, hint=f"known: {', '.join(SPLITS)}")
    if not folder:
        raise EvlecgError("no folder is named", where=text, hint="DIR or DIR=SPLITS")
    return Part(Path(folder), splits)


def shares_of(text: str) -> dict[str, float]:
    """`50/10/40` -> the shares of train, val and test, which come to one.

    Raises:
        EvlecgError: not three numbers, or one below zero, or nothing to train on.
    """
    try:
        shares = [float(share) for share in text.split("/")]
    except ValueError:
        shares = []
    if len(shares) != len(SPLITS) or not all(map(math.isfinite, shares)) or min(shares) < 0 or not shares[0]:
        raise EvlecgError(f"a split is three shares such as 50/10/40, not {text!r}", where="--split",
                          hint="of training, validation and test records, the first above 0")  # fmt: skip
    return {name: share / sum(shares) for name, share in zip(SPLITS, shares, strict=True)}


def join(
    parts: Sequence[Part],
    *,
    out: Path,
    labels: str | None = None,
    shares: Mapping[str, float] | None = None,
    seed: int = 0,
    exclude: Sequence[Path] = (),
    strict: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> PrepareSummary:
    """Writes one prepared folder from several; of two records with the same signal, the earlier folder's stays.

    Whole shards are linked, also for a few of their records; where `out` lies on another disk they are copied.

    Args:
        parts: what is taken, in order.
        out: the prepared folder.
        labels: label set, or several joined by `+`; None for all that any of them has. A label that a dataset did not
            assess stays not assessed in its records.
        shares: split -> share of the patients, drawn anew for all folders that are taken whole; None: splits stay. A
            patient of a split that was named is in that split everywhere.
        seed: of that.
        exclude: prepared folders whose signals are left out.
        strict: fail where any record was rejected.
        overwrite: replace an older prepared folder.
        progress: who is told.

    Raises:
        EvlecgError: fewer than two parts, a folder that is not a prepared one, or of which nothing is left, no record
            with one of the labels, a rejected record and `strict`.
        RunFailed: the disk is full; nothing is left.
    """
    if len(parts) < 2:
        raise EvlecgError("there is nothing to join", where="--join", hint="name two prepared folders or more")
    if shares and all(part.splits for part in parts):
        raise EvlecgError("there is no split to draw: of every folder splits are named", where="--split")
    sources = _sources(parts)
    wanted = resolve_labels(labels) if labels else None
    told = {code: text for one in reversed(sources) for code, text in one.prepared.label_descriptions.items()}
    every = dict.fromkeys(code for one in sources for code in one.prepared.label_names)
    descriptions = {code: told[code] for code in (every if wanted is None else wanted) if code in told}
    options = {
        "labels": labels,
        "seed": seed if shares else None,
        "split": dict(shares) if shares else None,
        "strict": strict,
        "exclude": [Prepared.open(folder).fingerprint for folder in exclude],
        "joined": [
            {"name": one.name, "fingerprint": one.prepared.fingerprint, "splits": list(one.splits)} for one in sources
        ],
    }
    plan = {"format_version": FORMAT_VERSION, "evlecg_version": __version__, "dataset": NAME, **options}
    if not overwrite and (done := finished(out, plan)) is not None:
        progress.info(f"{out} is up to date: the same folders and options, {done.n_kept} records; nothing to do")
        return done
    check_replaceable(out, overwrite)
    manifests = [one.prepared.manifest for one in sources]
    about = {
        "dataset": NAME,
        "title": " + ".join(manifest["title"] for manifest in manifests),
        "licence": "; ".join(dict.fromkeys(manifest["licence"] for manifest in manifests)),
        "citation": "; ".join(dict.fromkeys(manifest["citation"] for manifest in manifests)),
        "options": options,
        "plan": plan,
    }
    people = _People(sources, shares, seed)
    if people.n_unknown:
        progress.warn(f"{people.n_unknown} records of PTB-XL in a challenge's tree say no patient: one who has others "
                      "may be in two splits (prepare it with --signals ptb-xl=DIR)")  # fmt: skip
    with new_folder(out, overwrite) as folder:
        with writing(out, hint="nothing is left of it; make room and repeat the command"):
            for below in ("blocks", "parts"):
                (folder / below).mkdir()
            n_shards = 0
            with progress.task("join", len(sources)) as advance:
                for one in sources:
                    keep = None if wanted is None else set(descriptions)
                    n_shards += _add(folder, one, n_shards, _rows(one, people, keep))
                    advance(1, last=one.name)
        manifest = assemble(folder, n_shards, descriptions=descriptions, about=about, known=known_signals(exclude),
                            strict=strict)  # fmt: skip
    return summary_of(out, manifest)


@dataclass(frozen=True)
class _Source:
    """A part, opened: its name among the others, and the places of what is taken, in order."""

    name: str
    prepared: Prepared
    splits: tuple[str, ...]
    places: tuple[int, ...]

    @property
    def dataset(self) -> str:
        return self.prepared.manifest["dataset"]


def _sources(parts: Sequence[Part]) -> list[_Source]:
    """The second folder of a dataset is called `DATASET-2`."""
    seen: Counter[str] = Counter()
    sources = []
    for part in parts:
        prepared = Prepared.open(part.folder)
        dataset = prepared.manifest["dataset"]
        seen[dataset] += 1
        places = sorted(int(place) for split in part.splits or SPLITS for place in prepared.indices(split))
        if not places:
            raise EvlecgError("nothing is taken of this folder", where=part.folder,
                              hint=f"it has no record in {', '.join(part.splits)}")  # fmt: skip
        name = dataset if seen[dataset] == 1 else f"{dataset}-{seen[dataset]}"
        sources.append(_Source(name, prepared, part.splits, tuple(places)))
    return sources


class _People:
    """Who is whose record, and in which split: one patient for all that share a number or a signal.

    Attributes:
        n_unknown: records of PTB-XL whose patient nothing tells.
    """

    def __init__(self, sources: Sequence[_Source], shares: Mapping[str, float] | None, seed: int) -> None:
        self._shares, self._seed = shares, seed
        self._same: dict[str, str] = {}
        self._split: dict[str, str] = {}
        first: dict[str, str] = {}
        patients: list[str] = []
        named: list[tuple[str, str]] = []
        for one in sources:
            for place in one.places:
                row = one.prepared.row(place)
                patient = patient_of(one.name, one.dataset, row)
                patients.append(patient)
                owner = first.setdefault(row["sha256"], patient)
                self._same[self._root(patient)] = self._root(owner)
                if one.splits:
                    named.append((patient, row["split"]))
        for patient, split in named:
            self._split.setdefault(self._root(patient), split)
        known = {self._root(patient) for patient in patients if not patient.startswith(UNKNOWN)}
        self.n_unknown = sum(self._root(patient) not in known for patient in patients)

    def _root(self, patient: str) -> str:
        while (found := self._same.get(patient, patient)) != patient:
            patient = found
        return patient

    def of(self, source: _Source, row: Mapping[str, Any]) -> tuple[str, str]:
        """Patient and split of a line."""
        patient = self._root(patient_of(source.name, source.dataset, row))
        if source.splits or self._shares is None:
            return patient, row["split"]
        return patient, self._split.get(patient) or split_of(patient, self._seed, self._shares)


def patient_of(name: str, dataset: str, row: Mapping[str, Any]) -> str:
    """A patient as `DATASET:NUMBER`, the same for the same person in datasets that share records.

    A recording whose patient is not known stands for one: `DATASET:record-NUMBER` where the dataset numbers patients.

    Args:
        name: of the folder among those that are joined, for generated patients.
        dataset: its dataset.
        row: a line of it.
    """
    patient, own = row["patient_id"], row["id"]
    if ":" in patient:  # joint already
        return patient
    if dataset in DIALOGUES and "/" in patient:
        root, _, number = patient.partition("/")
        if match := re.fullmatch(r"(?:ptb-xl/patient-|mimic/p)(\d+)", patient):
            return f"{HOMES[root]}:{match[1]}"
        return f"{HOMES[root]}:record-{number}" if root in ("ptb-xl", "mimic") else f"{HOMES.get(root, root)}:{number}"
    if dataset.startswith("cinc") and (home := HOMES.get(cohort_of(own))):
        return f"{home}:record-{own.removeprefix('HR')}" if home == "ptbxl" and patient == own else f"{home}:{patient}"
    return f"{name if dataset == 'synthetic' else dataset}:{patient}"


def _rows(source: _Source, people: _People, wanted: AbstractSet[str] | None) -> Iterator[dict[str, Any]]:
    """The lines that are taken, as they stand in the joint folder but for the shard."""
    for place in source.places:
        row = source.prepared.row(place)
        row["patient_id"], row["split"] = people.of(source, row)
        row["id"] = f"{source.name}/{row['id']}"
        if wanted is not None:
            row["labels"] = {code: present for code, present in row["labels"].items() if code in wanted}
            if not (row["labels"] or row.get("questions") or row["report"]):
                row = {"id": row["id"], "shard": row["shard"], "fault": False,
                       "reason": "none of the wanted labels was assessed"}  # fmt: skip
        yield row


def _add(folder: Path, source: _Source, first: int, rows: Iterable[dict[str, Any]]) -> int:
    """Takes over a folder's shards, numbered from `first`, and returns how many there are."""
    number = first
    for shard, members in itertools.groupby(rows, key=lambda row: row["shard"]):  # lines stand shard by shard
        _link(source.prepared.path / "blocks" / block_name(shard), folder / "blocks" / block_name(number))
        write_part(folder, number, (row | {"shard": number} for row in members))
        number += 1
    return number - first


def _link(source: Path, target: Path) -> None:
    """A second name for a file, which nothing ever writes into; a copy where the disk has no such thing."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
