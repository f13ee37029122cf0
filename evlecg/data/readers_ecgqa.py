"""ECG-QA: questions on PTB-XL and MIMIC-IV-ECG recordings, without the recordings.

    ecgqa/{ptbxl,mimic-iv-ecg}/{template,paraphrased}/{train,valid,test}/NNNNN.json
    ecgqa/{ptbxl,mimic-iv-ecg}/answers_for_each_template.csv

The two wordings ask the same questions, so each is a dataset of its own here: together they would count every answer
twice. A record is one ECG with all questions about it, in the split that ECG-QA gives it (its splits are by ECG and
not those of PTB-XL). Questions that compare two ECGs are left out.
"""

from __future__ import annotations

import ast
import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evlecg.data.dialogues import SEVERAL_ECGS, distinct, encodable, inside
from evlecg.data.gates import Unfit
from evlecg.data.items import Index, Span, read_items, scan
from evlecg.data.readers_base import Dropped, Reading, ReadOptions, Source
from evlecg.data.signals import Ecg, Person, Signals, ecg_of, mimic_ecg, ptbxl_ecg, record_id, signal_record
from evlecg.errors import EvlecgError
from evlecg.schema import Question, Record

WORDINGS = ("paraphrased", "template")
SPLITS = {"train": "train", "valid": "val", "test": "test"}
OPTIONS = "answers_for_each_template.csv"
LARGEST_PTBXL_ID = 99_999  # MIMIC studies have eight digits
MALFORMED = "malformed question: no ECG"
NO_SIGNALS = "ECG-QA holds questions only: the signals are those of PTB-XL and MIMIC-IV-ECG"

_Options = dict[str, tuple[str, ...]]  # template -> answers, in the order of the table


@dataclass(frozen=True)
class _Entry:
    """One ECG, or (without spans) a question that is left out."""

    id: str
    spans: tuple[Span, ...] = ()
    split: str = ""
    ecg: Ecg | None = None
    own: str = ""  # ecg_path, where ECG-QA's mapping step has added it
    person: Person | None = None
    reason: str = ""


def is_ecgqa(folder: Path, wording: str) -> bool:
    """Whether this is `ecgqa/`, or one of its two sources, with questions in a wording."""
    return bool(_wording_folders(folder, wording))


def _wording_folders(folder: Path, wording: str) -> list[str]:
    inner = [path for path in (wording, f"ptbxl/{wording}", f"mimic-iv-ecg/{wording}") if (folder / path).is_dir()]
    return [path for path in inner if any((folder / path / split).is_dir() for split in SPLITS)]


def open_ecgqa(source: Source, options: ReadOptions, *, wording: str) -> Reading:
    """One entry for each ECG that is asked about, after one pass over the questions.

    Args:
        source: the folder `ecgqa`, or one of its two sources.
        options: `signals` says where PTB-XL (`ptb-xl`) and MIMIC-IV-ECG (`mimic`) lie.
        wording: one of `WORDINGS`.
    """
    files = [
        (f"{folder}/{split}/{path.name}", split, folder.rpartition("/")[0])
        for folder in _wording_folders(source.root, wording)
        for split in SPLITS
        for path in sorted((source.root / folder / split).glob("*.json"))
    ]
    paths = [source.path(relative) for relative, _, _ in files]
    tables = {base: _read_options(source, base) for base in {base for _, _, base in files}}
    signals = Signals(source, options.signals)

    def entries() -> Iterator[_Entry]:
        index, wanted = Index(), set[str]()
        for number, (relative, split, _) in enumerate(files):
            for start, length, item in scan(source, relative):
                ids, own = _listed(item.get("ecg_id"), int), _listed(item.get("ecg_path") or [""], str)
                name = record_id(f"{wording}/{split}/{item.get('sample_id')}")
                if not ids or not own:
                    yield _Entry(name, reason=MALFORMED)
                elif len(ids) > 1:
                    yield _Entry(name, reason=SEVERAL_ECGS)
                else:
                    if not own[0] and not signals.roots:
                        raise EvlecgError(NO_SIGNALS, where="--signals", hint="add --signals ptb-xl=DIR (or mimic=DIR)")
                    if ids[0] > LARGEST_PTBXL_ID:
                        wanted.add(str(ids[0]))
                    index.add(f"{split}/{ids[0]}", json.dumps([split, ids[0], own[0]]), (number, start, length))
        people, studies = signals.people(), signals.mimic_studies(wanted)
        for note, spans in index.groups():
            split, ecg_id, own = json.loads(note)
            ecg = _ecg(ecg_id, own, studies)
            yield _Entry(ecg.id, spans, SPLITS[split], ecg, own, people.get(ecg.id))

    def read(entry: _Entry) -> Record:
        if entry.reason == MALFORMED:
            raise Unfit(entry.reason)
        if entry.ecg is None:
            raise Dropped(entry.reason)
        own = _own_path(source, entry.own) if entry.own and signals.given(entry.ecg.root) is None else ""
        place = signals.find(entry.ecg, own)
        if place is None:
            raise Dropped(f"signal not in this copy ({entry.ecg.root})")
        questions = [
            _question(item, entry.split, tables[files[span[0]][2]])
            for span, item in zip(entry.spans, read_items(paths, entry.spans), strict=True)
        ]
        person = entry.person or Person(entry.ecg.patient, None, None)
        record = signal_record(place, id=entry.id, patient_id=person.patient, split=entry.split, age=person.age,
                               sex=person.sex)  # fmt: skip
        return replace(record, questions=distinct(questions))

    return Reading(None, entries(), lambda entry: entry.id, read)


def _listed(value: Any, kind: type) -> list[Any]:
    """A list of values of a kind; empty for anything else."""
    return value if isinstance(value, list) and all(isinstance(entry, kind) for entry in value) else []


def _ecg(ecg_id: int, own: str, studies: dict[str, Ecg]) -> Ecg:
    if ecg_id <= LARGEST_PTBXL_ID:
        return ptbxl_ecg(ecg_id)
    study = str(ecg_id)
    named = ecg_of(own)
    return studies.get(study) or (named if named.id == f"mimic/{study}" else mimic_ecg(study))


def _own_path(source: Source, own: str) -> str:
    """`ecg_path` below the source folder; the mapping step writes absolute paths.

    Raises:
        Unfit: it leads out of the source folder.
    """
    if Path(own).is_absolute():
        root = source.root.resolve()
        if not Path(own).is_relative_to(root):
            raise Unfit("a file name leads out of the source folder")
        own = Path(own).relative_to(root).as_posix()
    return inside(source, own)


def _read_options(source: Source, base: str) -> _Options:
    """Answers of each template, from the table beside the questions, or one folder up in older releases."""
    for place in (f"{base}/{OPTIONS}".lstrip("/"), OPTIONS):
        if source.exists(place):
            break
    else:
        return {}
    try:
        rows = list(csv.DictReader(io.StringIO(source.text(place), newline="")))
        return {row["template_id"].strip(): tuple(map(str, ast.literal_eval(row["classes"]))) for row in rows}
    except (KeyError, ValueError, SyntaxError, TypeError, AttributeError) as error:
        raise EvlecgError(f"the table of answers is malformed: {type(error).__name__}", where=place) from error


def _question(item: dict[str, Any], split: str, table: _Options) -> Question:
    """One item; several answers are in the order of the table, since the published order is that of a hash.

    Raises:
        KeyError, ValueError: it is malformed.
    """
    answers, kind = item["answer"], str(item["question_type"])
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError("answer is no list of texts")
    choices = table.get(str(item["template_id"]), ())
    if set(answers) <= set(choices):
        answers = [choice for choice in choices if choice in answers]
        named = set(item.get("attribute") or ()) | {"none"}
        between = tuple(choice for choice in choices if choice in named)
        if kind.endswith("-choose") and len(between) > 1 and set(answers) <= set(between):
            choices = between  # "a or b?": the table has the answers to all questions of its kind
    else:
        choices = ()
    return Question(
        text=encodable(str(item["question"])).strip(),
        answer=encodable(", ".join(answers)),
        choices=choices,
        kind=kind,
        id=f"{split}/{item['sample_id']}",
    )
