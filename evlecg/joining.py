"""Several prepared folders become one: to train on all of them, or to test on hearts that none of them trained.

Nothing is read from the datasets again. Blocks are linked (copied where a link cannot be made), lines are written anew:
ids get the dataset's name before them, the same signal in two folders stays once, a patient stays in one split, also
where two datasets number the same patients (`patient_of`).
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evlecg import __version__
from evlecg.data.labels import resolve_labels
from evlecg.data.readers_base import split_of
from evlecg.data.store import FORMAT_VERSION, Prepared, block_name
from evlecg.data.writer import assemble, write_part, writing
from evlecg.errors import EvlecgError
from evlecg.files import new_folder
from evlecg.prepare import SILENT, PrepareSummary, finished, summary_of
from evlecg.progress import Progress
from evlecg.schema import SPLITS

NAME = "joint"  # of what comes out, as a dataset
OWN = {"synthetic", "wfdb", "dicom"}  # whose patients' numbers mean nothing outside the folder


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
    """`FOLDER` or `FOLDER=SPLIT,SPLIT`, as it is typed.

    Raises:
        EvlecgError: no such split.
    """
    folder, _, names = text.partition("=")
    splits = tuple(name.strip() for name in names.split(",") if name.strip())
    for name in splits:
        if name not in SPLITS:
            raise EvlecgError(f"unknown split {name!r}", where=text, hint=f"known: {', '.join(SPLITS)}")
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
    if len(shares) != len(SPLITS) or min(shares) < 0 or not shares[0]:
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
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> PrepareSummary:
    """Writes one prepared folder from several; of two records with the same signal, the earlier folder's stays.

    Args:
        parts: what is taken, in order.
        out: the prepared folder.
        labels: label set, or several joined by `+`; None for all that any of them has. A label that a dataset did not
            assess stays not assessed in its records.
        shares: split -> share of the patients, drawn anew for all folders that are taken whole; None: splits stay.
        seed: of that.
        overwrite: replace an older prepared folder.
        progress: who is told.

    Raises:
        EvlecgError: fewer than two parts, a folder that is not a prepared one, no record with one of the labels.
        RunFailed: the disk is full.
    """
    if len(parts) < 2:
        raise EvlecgError("there is nothing to join", where="--join", hint="name two prepared folders or more")
    opened = [Prepared.open(part.folder) for part in parts]
    names = _names(prepared.manifest["dataset"] for prepared in opened)
    wanted = resolve_labels(labels) if labels else None
    told = {code: text for prepared in reversed(opened) for code, text in prepared.label_descriptions.items()}
    ordered = wanted if wanted is not None else dict.fromkeys(code for one in opened for code in one.label_names)
    descriptions = {code: told[code] for code in ordered if code in told}
    options = {
        "labels": labels,
        "seed": seed,
        "split": dict(shares) if shares else None,
        "joined": [
            {"name": name, "fingerprint": prepared.fingerprint, "splits": list(part.splits)}
            for name, prepared, part in zip(names, opened, parts, strict=True)
        ],
    }
    plan = {"format_version": FORMAT_VERSION, "evlecg_version": __version__, "dataset": NAME, **options}
    if not overwrite and (done := finished(out, plan)) is not None:
        progress.info(f"{out} is up to date: the same folders and options, {done.n_kept} records; nothing to do")
        return done
    about = {
        "dataset": NAME,
        "title": " + ".join(prepared.manifest["title"] for prepared in opened),
        "licence": "; ".join(dict.fromkeys(prepared.manifest["licence"] for prepared in opened)),
        "citation": "; ".join(dict.fromkeys(prepared.manifest["citation"] for prepared in opened)),
        "options": options,
        "plan": plan,
    }
    with new_folder(out, overwrite) as folder:
        with writing(out):
            for below in ("blocks", "parts"):
                (folder / below).mkdir()
            n_shards = 0
            with progress.task("join", len(parts)) as advance:
                for name, prepared, part in zip(names, opened, parts, strict=True):
                    drawn = None if part.splits else shares
                    rows = _rows(name, prepared, part.splits or SPLITS, descriptions, drawn, seed)
                    n_shards += _add(folder, prepared, n_shards, rows)
                    advance(1, last=name)
        manifest = assemble(folder, n_shards, descriptions=descriptions, about=about)
    return summary_of(out, manifest)


def patient_of(name: str, dataset: str, row: Mapping[str, Any]) -> str:
    """A patient as `DATASET:NUMBER`, the same for the same person in datasets that share records.

    Args:
        name: of the folder among those that are joined, for datasets whose numbers are the folder's own.
        dataset: its dataset.
        row: a line of it.
    """
    patient, own = row["patient_id"], row["id"]
    if ":" in patient:  # joint already
        return patient
    if match := re.fullmatch(r"ptb-xl/patient-(\d+)", patient):  # of dialogues about PTB-XL
        return f"ptbxl:{match[1]}"
    if match := re.fullmatch(r"mimic/p(\d+)", patient):
        return f"mimic-iv-ecg:{match[1]}"
    if dataset.startswith("cinc"):
        if re.fullmatch(r"HR\d{5}", own) and patient != own:
            return f"ptbxl:{patient}"
        if match := re.fullmatch(r"(?:patient|(incart))\d+", patient):
            return f"{match[1] or 'ptb'}:{patient}"
    return f"{name if dataset in OWN else dataset}:{patient}"


def _names(datasets: Iterable[str]) -> list[str]:
    """Dataset names, the second of a name as `name-2`."""
    seen: Counter[str] = Counter()
    names = []
    for dataset in datasets:
        seen[dataset] += 1
        names.append(dataset if seen[dataset] == 1 else f"{dataset}-{seen[dataset]}")
    return names


def _rows(
    name: str, prepared: Prepared, splits: Sequence[str], labels: Mapping[str, str],
    shares: Mapping[str, float] | None, seed: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The wanted lines of a folder, as they stand in the joint one but for the shard."""
    for index in range(len(prepared)):
        row = prepared.row(index)
        if row["split"] not in splits:
            continue
        row["labels"] = {code: present for code, present in row["labels"].items() if code in labels}
        if not row["labels"] and not row.get("questions"):
            row = {"id": row["id"], "shard": row["shard"], "fault": False,
                   "reason": "none of the wanted labels was assessed"}  # fmt: skip
        else:
            row["patient_id"] = patient_of(name, prepared.manifest["dataset"], row)
            row["split"] = split_of(row["patient_id"], seed, shares) if shares else row["split"]
        row["id"] = f"{name}/{row['id']}"
        yield row


def _add(folder: Path, prepared: Prepared, first: int, rows: Iterable[dict[str, Any]]) -> int:
    """Takes over a folder's shards, numbered from `first`, and returns how many there are."""
    by_shard: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_shard.setdefault(row["shard"], []).append(row)
    for place, shard in enumerate(sorted(by_shard)):
        number = first + place
        _link(prepared.path / "blocks" / block_name(shard), folder / "blocks" / block_name(number))
        for row in by_shard[shard]:
            row["shard"] = number
        write_part(folder, number, by_shard[shard])
    return len(by_shard)


def _link(source: Path, target: Path) -> None:
    """A second name for a file, which nothing ever writes into; a copy where the disk has no such thing."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
