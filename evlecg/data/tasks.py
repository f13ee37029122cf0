"""Labels, reports and a dataset's own dialogues become questions.

| task | question | answer |
|---|---|---|
| `yes_no` | one for each assessed label | yes or no |
| `choose_all` | one that lists all assessed labels | those present, separated by commas |
| `multiple_choice` | one for each present label, with absent ones beside it | the line of the present one |
| `report` | one | the report |
| `dialogue` | the dataset's own | the dataset's own |

Wordings are a table; which of several wordings a record gets, and where the right choice stands, follows from the
recipe's seed, the record and the label alone, so that a run can be repeated and resumed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence

from evlecg.data.store import Prepared
from evlecg.errors import EvlecgError
from evlecg.recipe import DataConfig, nearest
from evlecg.schema import Question, Sample

YES_NO = ("yes", "no")
NONE_OF_THESE = "none of these"
TASKS = ("yes_no", "choose_all", "multiple_choice", "report", "dialogue")

# Wording -> task -> sentences, of which one is drawn. `yes_no` has `data.question` in front of them.
# `ecgbench` holds the prompts of the published benchmark, so that a student meets them in training.
WORDINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "plain": {
        "yes_no": (),
        "choose_all": ("Which of these does this ECG show? Options: {options}",),
        "multiple_choice": ("What does this ECG show?",),
        "report": ("Write a report of this ECG.",),
    },
    "varied": {
        "yes_no": (
            "Is there {description} in this ECG?",
            "Do you see {description} on this page?",
            "Looking at this 12-lead ECG, is {description} present?",
            "Would you report {description} here?",
        ),
        "choose_all": (
            "Which of these does this ECG show? Options: {options}",
            "Select everything that applies to this ECG: {options}",
            "From the list {options}, name each finding that is present.",
        ),
        "multiple_choice": (
            "What does this ECG show?",
            "Which finding is present in this ECG?",
            "Choose the finding that fits this ECG.",
        ),
        "report": (
            "Write a report of this ECG.",
            "Describe and interpret this ECG.",
            "What would you write about this ECG?",
        ),
    },
    "ecgbench": {
        "yes_no": (),
        "choose_all": (
            "Given this ECG image, please answer the following question. From the provided options, select all that "
            "apply. List your selections, separated by commas.\nQuestion: What does this ECG show? Options: {options}",
        ),
        "multiple_choice": ("Based on this ECG image, which of the following is present?",),
        "report": ("Please write a clinical report based on this ECG image.",),
    },
}


def chosen_labels(prepared: Prepared, config: DataConfig) -> tuple[str, ...]:
    """The labels that a recipe asks about, in the folder's order where the recipe names none.

    Raises:
        EvlecgError: a label that the folder does not have, or a wording without its place for the label.
    """
    if "{description}" not in config.question:
        raise EvlecgError(
            "data.question has no place for the label", where=config.question, hint="write {description} where it goes"
        )
    for label in config.labels:
        if label not in prepared.label_names:
            raise EvlecgError(f"the prepared folder has no label {label!r}", where="data.labels",
                              hint=nearest(label, prepared.label_names))  # fmt: skip
    return tuple(config.labels) or prepared.label_names


def chosen_tasks(prepared: Prepared, config: DataConfig) -> tuple[str, ...]:
    """The tasks of a recipe; where it names none, what the folder offers: yes/no and its dialogues, else its reports.

    Raises:
        EvlecgError: a task that does not exist.
    """
    for task in config.tasks:
        if task not in TASKS:
            raise EvlecgError(f"unknown task {task!r}", where="data.tasks", hint=nearest(task, TASKS))
    if config.tasks:
        return config.tasks
    has_questions = any(split["questions"] for split in prepared.manifest["splits"].values())
    offered = (("yes_no", bool(prepared.label_names)), ("dialogue", has_questions))
    return tuple(task for task, there in offered if there) or ("report",)


def training_samples(prepared: Prepared, indices: Sequence[int], config: DataConfig, *, seed: int) -> list[Sample]:
    """A sample a record, with the questions of all tasks; records about which nothing can be asked are left out.

    Args:
        prepared: prepared folder.
        indices: its records.
        config: labels, tasks, wording.
        seed: of everything that is drawn.

    Raises:
        EvlecgError: an unknown label or task.
    """
    labels = chosen_labels(prepared, config)
    tasks = chosen_tasks(prepared, config)
    if tasks == ("yes_no",) and config.wording != "varied" and config.max_questions is None:
        return label_samples(prepared, indices, labels, config.question)  # nothing is drawn, no row has to be read
    truth_NK = prepared.labels(indices, labels)
    samples = []
    for index, truth_K in zip(indices, truth_NK, strict=True):
        record_id = prepared.record_ids[index]
        assessed = [(label, bool(value)) for label, value in zip(labels, truth_K, strict=True) if value == value]
        row = prepared.row(int(index)) if {"report", "dialogue"} & set(tasks) else {}
        writer = _Writer(config, prepared.label_descriptions, f"{seed}:{record_id}")
        questions: list[Question] = []
        for task in tasks:
            if task == "dialogue":
                questions += prepared.questions(int(index)) if row.get("questions") else ()
            elif task == "report":
                questions += writer.report(row["report"])
            else:
                questions += getattr(writer, task)(assessed)
        if config.max_questions is not None and len(questions) > config.max_questions:
            kept = sorted(writer.random("kept").sample(range(len(questions)), config.max_questions))
            questions = [questions[place] for place in kept]
        if questions:
            samples.append(Sample(int(index), record_id, tuple(questions)))
    return samples


def label_samples(prepared: Prepared, indices: Sequence[int], labels: Sequence[str], wording: str) -> list[Sample]:
    """A sample a record, with a yes/no question for each of its assessed labels; records without any are left out.

    Args:
        prepared: prepared folder.
        indices: its records.
        labels: label codes.
        wording: sentence with `{description}` in it.
    """
    truth_NK = prepared.labels(indices, labels)
    descriptions = prepared.label_descriptions
    samples = []
    for index, truth_K in zip(indices, truth_NK, strict=True):
        assessed = [(label, bool(value)) for label, value in zip(labels, truth_K, strict=True) if value == value]
        if assessed:
            questions = tuple(
                _yes_no(wording.replace("{description}", descriptions.get(label, label)), label, present)
                for label, present in assessed
            )
            samples.append(Sample(int(index), prepared.record_ids[index], questions))
    return samples


def _yes_no(text: str, label: str, present: bool) -> Question:
    return Question(text, YES_NO[0] if present else YES_NO[1], YES_NO, label)


class _Writer:
    """Writes the questions about one record.

    Args:
        config: wording, number of choices.
        descriptions: label -> noun phrase.
        key: what everything drawn follows from.
    """

    def __init__(self, config: DataConfig, descriptions: dict[str, str], key: str) -> None:
        self._config, self._descriptions, self._key = config, descriptions, key
        self._wordings = WORDINGS[config.wording]

    def random(self, purpose: str) -> random.Random:
        digest = hashlib.sha256(f"{self._key}:{purpose}".encode()).digest()
        return random.Random(int.from_bytes(digest[:8], "big"))

    def yes_no(self, assessed: Iterable[tuple[str, bool]]) -> list[Question]:
        sentences = (self._config.question, *self._wordings["yes_no"])
        return [
            _yes_no(self._drawn(sentences, label).replace("{description}", self._phrase(label)), label, present)
            for label, present in assessed
        ]

    def choose_all(self, assessed: Sequence[tuple[str, bool]]) -> list[Question]:
        if not assessed:
            return []
        options = [self._phrase(label) for label, _ in assessed]
        self.random("options").shuffle(options)
        present = {self._phrase(label) for label, value in assessed if value}
        answer = ", ".join(option for option in options if option in present) or NONE_OF_THESE
        sentence = self._drawn(self._wordings["choose_all"], "choose_all")
        return [Question(sentence.replace("{options}", ", ".join(options)), answer, kind="choose_all")]

    def multiple_choice(self, assessed: Sequence[tuple[str, bool]]) -> list[Question]:
        absent = [label for label, value in assessed if not value]
        questions = []
        for label, value in assessed:
            if not value or not absent:
                continue
            drawn = self.random(f"choices:{label}")
            options = [label, *drawn.sample(absent, min(len(absent), self._config.choices - 1))]
            drawn.shuffle(options)
            lines = tuple(f"{chr(ord('A') + place)}. {self._phrase(code)}" for place, code in enumerate(options))
            sentence = self._drawn(self._wordings["multiple_choice"], f"multiple_choice:{label}")
            text = "\n".join((sentence, *lines))
            questions.append(Question(text, lines[options.index(label)], lines, label, kind="multiple_choice"))
        return questions

    def report(self, report: str) -> list[Question]:
        return [Question(self._drawn(self._wordings["report"], "report"), report, kind="report")] if report else []

    def _phrase(self, label: str) -> str:
        return self._descriptions.get(label, label)

    def _drawn(self, sentences: Sequence[str], purpose: str) -> str:
        return sentences[0] if len(sentences) == 1 else self.random(f"wording:{purpose}").choice(sentences)
