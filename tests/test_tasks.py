"""Questions from labels, reports and dialogues: right answers, nothing unassessed, the same for the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evlecg.data.store import Prepared
from evlecg.data.tasks import NONE_OF_THESE, WORDINGS, chosen_tasks, training_samples
from evlecg.data.writer import write_prepared
from evlecg.errors import EvlecgError
from evlecg.recipe import DataConfig
from evlecg.schema import Question, Record

PHRASES = {"NORM": "a normal tracing", "AFIB": "atrial fibrillation", "LBBB": "left block", "RBBB": "right block",
           "PVC": "extra beats"}  # fmt: skip
ASKED = (Question("Which rate?", "70", kind="query"), Question("Is it high?", "no", ("yes", "no"), kind="verify"))


def prepared(tmp_path: Path, **second: Any) -> Prepared:
    def record(number: int, labels: dict[str, bool], **other: Any) -> Record:
        signal_mV = np.random.default_rng(number).normal(0, 1, (12, 500)).astype(np.float32)
        return Record(f"r{number}", f"p{number}", signal_mV, 100.0, labels, "train", **other)

    records = [
        record(0, {"NORM": False, "AFIB": True, "LBBB": False, "RBBB": True, "PVC": False}, report="AF, RBBB."),
        record(1, {"NORM": False, "AFIB": False}, **second),
        record(2, {}, questions=ASKED),
        record(3, {"PVC": True}),
    ]
    about = {"dataset": "x", "title": "x", "licence": "x", "citation": "x"}
    write_prepared(tmp_path / "out", records, descriptions=PHRASES, about=about)
    return Prepared.open(tmp_path / "out")


def questions(folder: Prepared, seed: int = 0, **config: Any) -> list[tuple[Question, ...]]:
    samples = {
        sample.record_index: sample.questions
        for sample in training_samples(folder, range(4), DataConfig(**config), seed=seed)
    }
    return [samples.get(index, ()) for index in range(4)]


def test_yes_no_asks_about_what_was_assessed(tmp_path: Path) -> None:
    first, second, third, fourth = questions(prepared(tmp_path), tasks=("yes_no",))
    assert [(question.label, question.answer) for question in first] == [
        ("NORM", "no"), ("AFIB", "yes"), ("LBBB", "no"), ("RBBB", "yes"), ("PVC", "no"),
    ]  # fmt: skip
    assert first[1].text == "Does this ECG show atrial fibrillation?" and first[1].choices == ("yes", "no")
    assert [question.label for question in second] == ["NORM", "AFIB"]
    assert third == () and [question.answer for question in fourth] == ["yes"]


def test_choose_all_lists_what_was_assessed_and_answers_with_what_is_there(tmp_path: Path) -> None:
    first, second, third, _ = questions(prepared(tmp_path), tasks=("choose_all",))
    (question,) = first
    assert all(phrase in question.text for phrase in PHRASES.values())
    assert sorted(question.answer.split(", ")) == ["atrial fibrillation", "right block"]
    (question,) = second
    assert question.answer == NONE_OF_THESE and "left block" not in question.text
    assert third == ()


def test_multiple_choice_has_one_right_line(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    first, second, _, fourth = questions(folder, tasks=("multiple_choice",), choices=3)
    assert [question.label for question in first] == ["AFIB", "RBBB"] and second == fourth == ()
    for question in first:
        assert question.text.splitlines()[1:] == list(question.choices) and len(question.choices) == 3
        phrases = [choice[3:] for choice in question.choices]
        assert [choice[:3] for choice in question.choices] == ["A. ", "B. ", "C. "]
        assert question.answer == question.choices[phrases.index(PHRASES[question.label or ""])]
        others = {"atrial fibrillation", "right block"} - {PHRASES[question.label or ""]}
        assert not others & set(phrases)  # another present label would be right, too
    places = {questions(folder, seed, tasks=("multiple_choice",))[0][0].answer[0] for seed in range(30)}
    assert places == {"A", "B", "C", "D"}


def test_reports_and_dialogues_are_taken_as_they_are(tmp_path: Path) -> None:
    first, second, third, _ = questions(prepared(tmp_path), tasks=("report", "dialogue"))
    assert [(question.kind, question.answer) for question in first] == [("report", "AF, RBBB.")]
    assert second == () and third == ASKED


def test_without_tasks_the_folder_decides(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    assert chosen_tasks(folder, DataConfig()) == ("yes_no", "dialogue")
    first, _, third, _ = questions(folder)
    assert len(first) == 5 and third == ASKED


def test_drawing_follows_the_seed_alone(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    varied: dict[str, Any] = {"tasks": ("yes_no", "choose_all", "multiple_choice", "report"), "wording": "varied"}
    assert questions(folder, 1, **varied) == questions(folder, 1, **varied)
    texts = {question.text for seed in range(40) for question in questions(folder, seed, **varied)[0][:1]}
    own = DataConfig().question
    expected = {text.replace("{description}", PHRASES["NORM"]) for text in (own, *WORDINGS["varied"]["yes_no"])}
    assert texts == expected


def test_every_wording_knows_every_task() -> None:
    for name, sentences in WORDINGS.items():
        assert set(sentences) == {"yes_no", "choose_all", "multiple_choice", "report"}, name
        assert all("{description}" in text for text in sentences["yes_no"])
        assert all("{options}" in text for text in sentences["choose_all"])


def test_no_more_questions_than_wanted(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    kept = [questions(folder, seed, max_questions=2)[0] for seed in range(20)]
    assert {len(found) for found in kept} == {2} and len(set(kept)) > 3
    every = questions(folder)[0]
    assert all([question for question in every if question in found] == list(found) for found in kept)  # in order


def test_unknown_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvlecgError, match=r"unknown task 'yesno' .*did you mean 'yes_no'"):
        questions(prepared(tmp_path), tasks=("yesno",))
