"""Dialogues in the LLaVA layout: ECGInstruct (PULSE), ECG-Grounding (GEM) and the message layout of ECG-R1.

An item names a picture, a WFDB record, or both; items about one ECG become one record. Pictures are looked for below
the source folder and kept as they are. Where the user says where the signals lie (`--signals ptb-xl=DIR`), or the item
names a WFDB record that lies below the source folder, the signal is taken, and the picture only where it is missing.
Items whose files are not in this copy are counted by their root: partial copies are normal.

No split is published but for files named as tests: everything else is split by patient where the file name tells the
patient (MIMIC-IV-ECG) or a table does (PTB-XL, through `--signals`), by recording otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from evlecg.data.dialogues import SEVERAL_ECGS, distinct, encodable, inside, questions_of, read_image
from evlecg.data.gates import Unfit
from evlecg.data.items import Index, Span, read_items, scan
from evlecg.data.readers_base import Dropped, Reading, ReadOptions, Source, split_of
from evlecg.data.signals import Ecg, Person, Signals, ecg_of, plain, record_id, signal_record
from evlecg.schema import LEADS, Question, Record

# Where the projects put their JSON files and their pictures, below the top folder.
JSON_FOLDERS = ("", "ecg_jsons", "ecg_jsons/train_set", "ecg_jsons/test_set", "train_set", "test_set", "jsons",
                "ecg_grounding_test_data")  # fmt: skip
IMAGE_FOLDERS = ("", "images", "ecg_images", "ecg_images/gen_images")
BENCH_STEMS = frozenset({"ptb-test", "ptb-test-report", "cpsc-test", "code15-test", "csn-test-no-cot",
                         "g12-test-no-cot", "mmmu-ecg", "ecgqa-test", "arena"})  # fmt: skip
HELD_OUT = "its patient is in the published test set"
KINDS = {"ecginstruct": "dialogue", "ecg-grounding": "grounding", "ecg-r1": "reasoning"}

_PEEK_BYTES = 1 << 16
_PEEK_FILES = 20
_TEST = re.compile(r"(?:^|[-_.])test(?:[-_.]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class _Entry:
    """One ECG with its items, or (without spans) an item that is left out."""

    id: str
    spans: tuple[Span, ...] = ()
    split: str = ""
    image: str = ""
    own: str = ""  # WFDB path of the item
    person: Person | None = None
    reason: str = ""


def dialect_of(path: Path) -> str:
    """Which dataset a JSON file has the layout of, by its first items; "" for any other file."""
    if path.stem in BENCH_STEMS:
        return ""
    try:
        with path.open("rb") as file:
            head = file.read(_PEEK_BYTES)
    except OSError:
        return ""
    if not head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"[", b"{")):
        return ""
    keys = set(re.findall(rb'"(messages|objects|images|image|ecg|conversations)"\s*:', head))
    if b"messages" in keys and keys & {b"objects", b"images"}:
        return "ecg-r1"
    if b"conversations" not in keys:
        return ""
    return "ecg-grounding" if b"ecg" in keys else "ecginstruct" if b"image" in keys else ""


def _files(folder: Path, dataset: str) -> list[str]:
    found = [
        f"{inner}/{path.name}".lstrip("/")
        for inner in JSON_FOLDERS
        if (folder / inner).is_dir()
        for path in sorted((folder / inner).glob("*.json*"))[:_PEEK_FILES]
        if path.suffix in (".json", ".jsonl") and path.is_file() and dialect_of(path) == dataset
    ]
    return found


def is_llava(folder: Path, dataset: str) -> bool:
    """Whether a folder holds dialogue files of a dataset (a key of `KINDS`)."""
    return bool(_files(folder, dataset))


def open_llava(source: Source, options: ReadOptions, *, dataset: str) -> Reading:
    """One entry for each ECG, after one pass over the dialogue files.

    Args:
        source: the folder with the JSON files.
        options: `signals` says where the recordings lie; `seed` is that of the split.
        dataset: a key of `KINDS`.
    """
    files = _files(source.root, dataset)
    paths = [source.path(inside(source, relative)) for relative in files]
    is_test = [bool(_TEST.search(Path(relative).stem)) for relative in files]
    signals = Signals(source, options.signals)

    def split(test: bool, person: Person) -> str:
        if test:
            return "test"
        drawn = split_of(person.patient, options.seed)
        return "train" if drawn == "test" and any(is_test) else drawn  # the published test set is the test set

    def entries() -> Iterator[_Entry]:
        index, tested = Index(), set[Ecg]()
        for number, relative in enumerate(files):
            for start, length, item in scan(source, relative):
                images, own = _names(item, "image"), _names(item, "ecg")
                name = _id(item) or f"{Path(relative).stem}-{start}"
                if len(images) > 1 or len(own) > 1:
                    yield _Entry(record_id(name), reason=SEVERAL_ECGS)
                elif not images and not own:
                    yield _Entry(record_id(name), reason="no ECG in the item")
                else:
                    image, path = (images or [""])[0], (own or [""])[0]
                    ecg = ecg_of(path or image)
                    if is_test[number]:
                        tested.add(ecg)
                    by_signal = bool(path) or signals.given(ecg.root) is not None
                    key = f"{int(is_test[number])}\n{ecg.id if by_signal else image}"
                    index.add(key, json.dumps([is_test[number], by_signal, path, image]), (number, start, length))
        people = signals.people()
        held_out = {people[ecg.id].patient if ecg.id in people else ecg.patient for ecg in tested}
        for note, spans in index.groups():
            test, by_signal, path, image = json.loads(note)
            ecg = ecg_of(path or image)
            person = people.get(ecg.id) or Person(ecg.patient, None, None)
            name = ecg.id if by_signal else record_id(re.sub(r"\.[A-Za-z]+$", "", image))
            if person.patient in held_out and not test:
                yield _Entry(name, reason=HELD_OUT)
            else:
                yield _Entry(name, spans, split(test, person), image, path, person)

    def read(entry: _Entry) -> Record:
        if entry.person is None:
            raise Dropped(entry.reason)
        place = _find_image(source, entry.image) if entry.image else ""
        ecg = ecg_of(entry.own or entry.image)
        signal = signals.find(ecg, entry.own)
        if signal is None and not place:
            kind, name = ("image", entry.image) if entry.image else ("signal", entry.own)
            folders = [part for part in name.split("/")[:-1] if part != "."]
            raise Dropped(f"{kind} not in this copy ({plain(folders[0]) if folders else 'no folder'})")
        questions, n_malformed = _questions(read_items(paths, entry.spans), KINDS[dataset])
        if not questions:
            raise Unfit("malformed dialogue: no question of this ECG can be read")
        if signal is not None:
            record = signal_record(signal, id=entry.id, patient_id=entry.person.patient, split=entry.split,
                                   age=entry.person.age, sex=entry.person.sex)  # fmt: skip
        else:
            record = picture(read_image(source, place), id=entry.id, person=entry.person, split=entry.split)
        repairs = (f"{n_malformed} malformed dialogues left out",) if n_malformed else ()
        return replace(record, questions=questions, repairs=(*record.repairs, *repairs))

    return Reading(None, entries(), lambda entry: entry.id, read)


def picture(image: bytes, *, id: str, person: Person, split: str) -> Record:
    """A record that is a picture, without questions as yet."""
    return Record(
        id=id,
        patient_id=person.patient,
        signal_mV=np.zeros((len(LEADS), 0), np.float32),
        fs_hz=0,
        labels={},
        split=split,
        age=person.age,
        sex=person.sex,
        image=image,
    )


def _find_image(source: Source, name: str) -> str:
    """Path of a picture below the source folder; "" where it is not in this copy.

    Raises:
        Unfit: it leads out of the source folder.
    """
    inside(source, name)
    for folder in IMAGE_FOLDERS:
        relative = f"{folder}/{name}" if folder else name
        if source.exists(relative):
            return inside(source, relative)
    return ""


def _questions(items: list[dict[str, Any]], kind: str) -> tuple[tuple[Question, ...], int]:
    """Questions of all items of an ECG, and how many items were malformed."""
    questions: list[Question] = []
    n_malformed = 0
    for item in items:
        try:
            said = next(item[key] for key in ("conversations", "messages", "conversation") if key in item)
            questions += questions_of(said, item=_id(item), kind=kind)
        except (Unfit, StopIteration, TypeError, AttributeError):
            n_malformed += 1
    return distinct(questions), n_malformed


def _id(item: dict[str, Any]) -> str:
    value = item.get("id", item.get("question_id"))
    return "" if value is None else encodable(str(value))


def _names(item: dict[str, Any], kind: str) -> list[str]:
    """File names of the pictures (`image`) or WFDB records (`ecg`) of an item, in any of the layouts."""
    objects = item.get("objects")
    value = item.get(kind) or item.get(f"{kind}s") or (objects.get(kind) if isinstance(objects, dict) else None)
    values = value if isinstance(value, list) else [value]
    named = (entry.get("path") if isinstance(entry, dict) else entry for entry in values)
    return [entry for entry in named if isinstance(entry, str) and entry]
