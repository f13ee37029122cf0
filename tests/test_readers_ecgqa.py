"""ECG-QA in its published tree, in miniature and with the real questions and recordings beside the checkout."""

from __future__ import annotations

import csv
import json
import pickle
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose

from evlecg.data.readers import READERS, ReadOptions, Rejected, Source, home_of
from evlecg.errors import EvlecgError
from evlecg.schema import Question, Record
from tests.test_readers import STEPS, write_csv, write_ptbxl, write_wfdb

TABLE = {
    1: ["no", "not sure", "yes"],
    7: ["atrial fibrillation", "none", "sinus rhythm", "sinus tachycardia"],
    30: ["baseline drift", "burst noise", "none", "static noise", 'rSr\' type "x"'],
}


def item(
    ecg_ids: list[int], sample: int, kind: str = "single-verify", template: int = 1, **more: Any
) -> dict[str, Any]:
    return {
        "template_id": template,
        "question_id": sample,
        "sample_id": sample,
        "question_type": kind,
        "attribute_type": "scp_code",
        "question": f"Question {sample}?",
        "answer": ["yes"],
        "ecg_id": ecg_ids,
        "attribute": ["sinus rhythm"],
    } | more


def write_ecgqa(root: Path, files: Mapping[str, list[dict[str, Any]]]) -> None:
    """Files as published, `files` below `root`, and the table of answers beside each source."""
    for name, items in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(items, indent=4))
        write_csv(
            path.parents[2] / "answers_for_each_template.csv",
            [{"template_id": key, "classes": str(classes)} for key, classes in TABLE.items()],
        )


def read(folder: Path, name: str = "ecgqa", signals: Mapping[str, Path] | None = None) -> list[Record | Rejected]:
    """All records, each read by another opening of the dataset than the one that listed them, as workers do."""
    home = home_of(name, folder)
    assert home is not None
    options = ReadOptions(labels=(), signals=signals or {})
    reading = READERS[name].open(Source(home), options)  # type: ignore[arg-type]
    worker = READERS[name].open(Source(home), options)  # type: ignore[arg-type]
    entries = (pickle.loads(pickle.dumps(entry)) for entry in reading.entries)
    return list(replace(worker, entries=entries).records())


def reasons(found: list[Record | Rejected]) -> Counter[str]:
    return Counter(entry.reason for entry in found if isinstance(entry, Rejected))


def test_ecgqa_as_published(tmp_path: Path) -> None:
    write_ptbxl(tmp_path / "signals")
    write_ecgqa(
        tmp_path / "repository" / "ecgqa",
        {
            "ptbxl/paraphrased/train/00000.json": [
                item([1], 0),
                item([2], 1, "single-query", 7, answer=["sinus rhythm", "atrial fibrillation"]),
                item([1, 2], 2, "comparison_irrelevant-verify", attribute=None),
            ],
            "ptbxl/paraphrased/train/10000.json": [item([1], 3, answer=["maybe"])],
            "ptbxl/paraphrased/valid/00000.json": [
                item([3], 0, "single-choose", 30, answer=["none"], attribute=["burst noise", "static noise"])
            ],
            "ptbxl/paraphrased/test/00000.json": [item([1004], 0), item([1005], 1), item([1004], 0, ecg_id="x")],
            "ptbxl/template/train/00000.json": [item([1], 0, question="In other words?")],
        },
    )
    found = read(tmp_path / "repository", signals={"ptb-xl": tmp_path})
    records = {entry.id: entry for entry in found if isinstance(entry, Record)}
    assert list(records) == ["ptb-xl/00001", "ptb-xl/00002", "ptb-xl/00003", "ptb-xl/01004"]
    assert {name: record.split for name, record in records.items()} == {
        "ptb-xl/00001": "train",
        "ptb-xl/00002": "train",
        "ptb-xl/00003": "val",  # its own splits: fold 9 of PTB-XL by chance only
        "ptb-xl/01004": "test",
    }
    first = records["ptb-xl/00001"]
    assert_allclose(first.signal_mV, STEPS / np.float32(1000))
    assert (first.fs_hz, first.age, first.sex, first.labels, first.image) == (500, 56, "F", {}, b"")
    assert first.patient_id == records["ptb-xl/00002"].patient_id == "ptb-xl/patient-17"
    assert first.questions == (
        Question("Question 0?", "yes", ("no", "not sure", "yes"), kind="single-verify", id="train/0"),
        Question("Question 3?", "maybe", (), kind="single-verify", id="train/3"),  # not an answer of its template
    )
    (several,) = records["ptb-xl/00002"].questions
    assert several.answer == "atrial fibrillation, sinus rhythm" and several.choices == tuple(TABLE[7])
    (between,) = records["ptb-xl/00003"].questions
    assert (between.answer, between.choices) == ("none", ("burst noise", "none", "static noise"))
    assert reasons(found) == {
        "several ECGs in one question (one image a prompt)": 1,
        "signal not in this copy (ptb-xl)": 1,
        "malformed question: no ECG": 1,
    }
    assert {entry.fault for entry in found if isinstance(entry, Rejected) and "malformed" in entry.reason} == {True}

    (other,) = read(tmp_path / "repository", "ecgqa-template", signals={"ptb-xl": tmp_path})
    assert isinstance(other, Record) and [question.text for question in other.questions] == ["In other words?"]


def test_mimic_questions_through_the_record_list(tmp_path: Path) -> None:
    path = "files/p1000/p10000032/s40689238/40689238"
    write_wfdb((tmp_path / "mimic" / path).parent, "40689238")
    rows = [("10000032", "40689238", path), ("10000032", "44458630", "files/p1000/p10000032/s44458630/44458630")]
    write_csv(
        tmp_path / "mimic" / "record_list.csv",
        [
            {"subject_id": patient, "study_id": study, "file_name": study, "ecg_time": "2180-07-23", "path": where}
            for patient, study, where in rows
        ],
    )
    name = "mimic-iv-ecg/paraphrased/test/00000.json"
    write_ecgqa(tmp_path / "ecgqa", {name: [item([40689238], 0), item([44458630], 1), item([49999999], 2)]})
    found = read(tmp_path / "ecgqa", signals={"mimic": tmp_path / "mimic"})
    (record,) = [entry for entry in found if isinstance(entry, Record)]
    assert (record.id, record.patient_id, record.split) == ("mimic/40689238", "mimic/p10000032", "test")
    assert reasons(found) == {"signal not in this copy (mimic)": 2}


def test_mapped_paths_below_the_source_and_no_others(tmp_path: Path) -> None:
    root = tmp_path / "ecgqa"
    write_wfdb(root / "signals", "00001_hr")
    write_wfdb(tmp_path / "elsewhere", "00002_hr")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    paths = [
        "signals/00001_hr",
        str(root / "signals" / "00001_hr"),
        "../elsewhere/00002_hr",
        str(tmp_path / "elsewhere" / "00002_hr"),
        "link/00002_hr",
    ]
    name = "ptbxl/paraphrased/train/00000.json"
    write_ecgqa(root, {name: [item([number], number, ecg_path=[path]) for number, path in enumerate(paths, 1)]})
    found = read(root)
    assert [entry.id for entry in found if isinstance(entry, Record)] == ["ptb-xl/00001", "ptb-xl/00002"]
    assert reasons(found) == {"a file name leads out of the source folder": 3}


def test_questions_alone_are_an_error_that_says_what_to_add(tmp_path: Path) -> None:
    write_ecgqa(tmp_path, {"ptbxl/paraphrased/train/00000.json": [item([1], 0)]})
    with pytest.raises(EvlecgError, match="questions only") as caught:
        read(tmp_path)
    assert "--signals ptb-xl=DIR" in (caught.value.hint or "")
    with pytest.raises(EvlecgError, match="does not exist"):
        read(tmp_path, signals={"ptb-xl": tmp_path / "nowhere"})
    (tmp_path / "ptbxl" / "answers_for_each_template.csv").write_text("template_id,classes\n1,['no'\n")
    with pytest.raises(EvlecgError, match="malformed"):
        read(tmp_path, signals={"ptb-xl": tmp_path})


def test_real_questions_on_real_recordings(shared_data: Path, tmp_path: Path) -> None:
    items = json.loads((shared_data / "ptbxl" / "ecgqa_subset.json").read_text())
    for name in {item["file"] for item in items}:
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps([entry for entry in items if entry["file"] == name], indent=4))
    found = read(tmp_path, signals={"ptb-xl": shared_data / "ptbxl"})
    wanted = [entry for entry in items if "/paraphrased/" in entry["file"]]
    singles = [entry for entry in wanted if len(entry["ecg_id"]) == 1]
    records = {entry.id: entry for entry in found if isinstance(entry, Record)}
    lost = {entry.id for entry in found if isinstance(entry, Rejected) and entry.reason.startswith("signal not")}
    assert set(records) | lost == {f"ptb-xl/{entry['ecg_id'][0]:05d}" for entry in singles}
    assert sum(reasons(found).values()) == len(wanted) - len(singles) + len(lost)
    asked = {question.id: (name, question) for name, record in records.items() for question in record.questions}
    assert len(asked) >= 20
    for entry in singles:
        name = f"ptb-xl/{entry['ecg_id'][0]:05d}"
        if name in records:
            assert asked[f"train/{entry['sample_id']}"][0] == name
            question = asked[f"train/{entry['sample_id']}"][1]
            assert (question.text, question.answer) == (entry["question"], ", ".join(entry["answer"]))
    with (shared_data / "ptbxl" / "labels_subset.csv").open(newline="") as file:
        patients = {f"ptb-xl/{int(row['ecg_id']):05d}": row["patient_id"] for row in csv.DictReader(file)}
    for name, record in records.items():
        assert record.patient_id == f"ptb-xl/patient-{int(float(patients[name]))}"
        assert record.signal_mV.shape == (12, 5000) or record.fs_hz == 100
