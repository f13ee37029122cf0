"""The prepared folder: what goes in comes out, and it is whole or not there."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from evlecg.data.readers_base import Rejected
from evlecg.data.store import Prepared
from evlecg.data.writer import assemble, write_prepared, write_shard
from evlecg.errors import EvlecgError, RunFailed
from evlecg.schema import Question, Record

DESCRIPTIONS = {"NORM": "a normal tracing", "MI": "myocardial infarction", "HYP": "hypertrophy"}
ABOUT = {"dataset": "test", "title": "Test", "licence": "none", "citation": "nobody", "options": {}}


def record(number: int, split: str = "train", patient: str = "", n_samples: int = 500, **other: Any) -> Record:
    rng = np.random.default_rng(number)
    values: dict[str, Any] = {
        "id": f"r{number}",
        "patient_id": patient or f"p{number}",
        "signal_mV": rng.normal(0, 1, (12, n_samples)).astype(np.float32),
        "fs_hz": 100.0,
        "labels": {"NORM": number % 2 == 0, "MI": number % 2 == 1} if number else {"NORM": True},
        "split": split,
    }
    return Record(**{**values, **other})


def write(out: Path, records: Iterable[Record | Rejected]) -> dict[str, Any]:
    return write_prepared(out, list(records), descriptions=DESCRIPTIONS, about=ABOUT)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    given = [
        record(0, age=47.0, sex="F", report="Sinusrhythmus – ä", repairs=("mended",)),
        record(1, "val", n_samples=731, fs_hz=257.0),
        record(2, "test"),
        record(3, "train", patient="p0"),
    ]
    write(tmp_path / "out", given)
    prepared = Prepared.open(tmp_path / "out")
    assert len(prepared) == 4
    for index, before in enumerate(given):
        after = prepared.record(index)
        assert after.signal_mV.dtype == np.float32 and after.signal_mV.flags.writeable
        assert_allclose(after.signal_mV, before.signal_mV, rtol=0, atol=0.000501)  # half a microvolt, and float32
        for name in ("id", "patient_id", "fs_hz", "labels", "split", "age", "sex", "report", "repairs"):
            assert getattr(after, name) == getattr(before, name), name
    assert_array_equal(prepared.indices("train"), [0, 3])
    assert prepared.patient_ids == ("p0", "p1", "p2", "p0")
    assert isinstance(prepared._blocks[0], np.memmap)
    with pytest.raises(EvlecgError, match="unknown split"):
        prepared.indices("dev")


def test_labels_that_were_not_assessed_are_nan(tmp_path: Path) -> None:
    write(tmp_path / "out", [record(0), record(1), record(2, "test")])
    prepared = Prepared.open(tmp_path / "out")
    assert prepared.label_names == ("NORM", "MI")  # nobody assessed HYP
    assert prepared.label_descriptions["MI"] == "myocardial infarction"
    assert prepared.manifest["labels_not_assessed"] == ["HYP"]
    found = prepared.labels(np.array([0, 1, 2]), ("MI", "HYP", "NORM"))
    assert_array_equal(found, [[np.nan, np.nan, 1], [1, np.nan, 0], [0, np.nan, 1]])
    assert prepared.labels([], ("MI",)).shape == (0, 1)


def test_manifest_counts(tmp_path: Path) -> None:
    rejected = [Rejected("bad", "flat leads: V1"), Rejected("other", "no diagnostic class", fault=False)]
    manifest = write(
        tmp_path / "out", [record(0), record(1, patient="p0"), *rejected, record(2, "test", repairs=("x",))]
    )
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["splits"]["train"] == {
        "records": 2,
        "patients": 1,
        "questions": 0,
        "labels": {"NORM": {"positive": 1, "negative": 1}, "MI": {"positive": 1, "negative": 0}},
    }
    assert manifest["splits"]["val"]["records"] == 0
    counts = {key: manifest[key] for key in ("n_kept", "n_repaired", "n_rejected", "n_dropped")}
    assert counts == {"n_kept": 3, "n_repaired": 1, "n_rejected": 1, "n_dropped": 1}
    assert Prepared.open(tmp_path / "out").quarantine() == [
        {"id": "bad", "kind": "rejected", "reason": "flat leads: V1"},
        {"id": "other", "kind": "dropped", "reason": "no diagnostic class"},
    ]


def test_what_cannot_be_stored_is_rejected_with_a_reason(tmp_path: Path) -> None:
    nan, huge = np.zeros((12, 500), np.float32), np.zeros((12, 500), np.float32)
    nan[3, 7], huge[3, 7] = np.nan, 32.768
    limit = np.zeros((12, 500), np.float32)
    limit[0, 0], limit[0, 1] = 32.767, -32.767
    bad = [
        record(0, signal_mV=nan),
        record(1, signal_mV=huge),
        record(2, signal_mV=limit),
        record(2),
        record(3, id="Jane Doe"),
        record(4, signal_mV=np.zeros((12, 0), np.float32)),
    ]
    write(tmp_path / "out", bad)
    prepared = Prepared.open(tmp_path / "out")
    reasons = [row["reason"].partition(":")[0] for row in prepared.quarantine()]
    assert reasons == ["not finite", "absurd amplitude", "duplicate", "unusable id", "empty"]
    assert_allclose(prepared.record(0).signal_mV[0, :2], [32.767, -32.767], rtol=1e-6)


def test_very_old_patients_are_one_group(tmp_path: Path) -> None:
    ages = [89.0, 89.5, 93.0, 300.0, None]
    write(tmp_path / "out", [record(number, age=age) for number, age in enumerate(ages)])
    prepared = Prepared.open(tmp_path / "out")
    assert [prepared.record(index).age for index in range(5)] == [89.0, 90.0, 90.0, 90.0, None]


def test_a_patient_stays_in_the_split_where_it_came_first(tmp_path: Path) -> None:
    write(tmp_path / "out", [record(0), record(1, "test", patient="p0"), record(2, patient="p0")])
    prepared = Prepared.open(tmp_path / "out")
    assert prepared.record_ids == ("r0", "r2")
    assert prepared.quarantine() == [
        {"id": "r1", "kind": "rejected", "reason": "patient in two splits: train and test"}
    ]


def test_the_same_signal_is_kept_once(tmp_path: Path) -> None:
    twin = record(1, signal_mV=record(0).signal_mV)
    other = record(2, signal_mV=record(0).signal_mV + np.float32(0.001))
    write(tmp_path / "out", [record(0), twin, other])
    prepared = Prepared.open(tmp_path / "out")
    assert prepared.record_ids == ("r0", "r2")
    assert prepared.quarantine()[0] == {
        "id": "r1", "kind": "dropped", "reason": "duplicate: the same signal as r0",
    }  # fmt: skip


def test_the_same_signal_elsewhere_is_found_by_its_content(tmp_path: Path) -> None:
    write(tmp_path / "first", [record(0), record(1)])
    known = {key: f"first/{name}" for key, name in Prepared.open(tmp_path / "first").hashes().items()}
    out = tmp_path / "second"
    for name in ("blocks", "parts"):
        (out / name).mkdir(parents=True)
    renamed = record(5, signal_mV=record(1).signal_mV, split="test")
    write_shard(out, 0, [renamed, record(3)])
    assemble(out, 1, descriptions=DESCRIPTIONS, about=ABOUT, known=known)
    prepared = Prepared.open(out)
    assert prepared.record_ids == ("r3",)
    assert prepared.quarantine()[0]["reason"] == "duplicate: the same signal as first/r1"


def test_shards_in_any_order_give_the_same_folder(tmp_path: Path) -> None:
    records = [record(number, "test" if number == 7 else "train") for number in range(9)]
    manifests = []
    for name, order in (("a", (0, 1, 2)), ("b", (2, 0, 1))):
        out = tmp_path / name
        for part in ("blocks", "parts"):
            (out / part).mkdir(parents=True)
        for shard in order:
            assert write_shard(out, shard, records[3 * shard : 3 * shard + 3]) == 3
        manifests.append(assemble(out, 3, descriptions=DESCRIPTIONS, about=ABOUT))
        assert names(out) == ["blocks", "manifest.json", "quarantine.jsonl", "records.jsonl"]
    assert {**manifests[0], "created": ""} == {**manifests[1], "created": ""}
    prepared = Prepared.open(tmp_path / "b")
    assert prepared.record_ids == tuple(f"r{number}" for number in range(9))
    assert_allclose(prepared.record(7).signal_mV, records[7].signal_mV, rtol=0, atol=0.000501)


def test_pictures_and_questions_come_back(tmp_path: Path) -> None:
    asked = (
        Question("Which rhythm?", "sinus", ("sinus", "flutter"), kind="single-choose", id="qa/1"),
        Question("And why?", "P waves", history=(("Which rhythm?", "sinus"),)),
    )
    picture = record(
        0, signal_mV=np.zeros((12, 0), np.float32), fs_hz=0.0, labels={}, image=b"\x89PNG not really", questions=asked
    )
    write(tmp_path / "out", [record(3), picture, record(4)])
    prepared = Prepared.open(tmp_path / "out")
    found = prepared.record(1)
    assert (found.image, found.questions, found.signal_mV.shape) == (picture.image, asked, (12, 0))
    assert prepared.questions(1) == asked and prepared.questions(0) == ()
    assert_allclose(prepared.record(2).signal_mV, record(4).signal_mV, rtol=0, atol=0.000501)
    assert prepared.manifest["splits"]["train"]["questions"] == 2


def test_two_subsets_may_ask_about_one_picture(tmp_path: Path) -> None:
    """Its other questions are kept; a copy without any, or in another split, is not."""
    blank = np.zeros((12, 0), np.float32)

    def about(number: int, split: str, *texts: str) -> Record:
        questions = tuple(Question(text, "a") for text in texts)
        return record(number, split, "p", signal_mV=blank, labels={}, image=b"\x89PNG", questions=questions)

    other = record(3, "test", "q", signal_mV=blank, labels={}, image=b"\x89PNG", questions=(Question("Why?", "a"),))
    write(tmp_path / "out", [about(0, "train", "Rate?"), about(1, "train", "Axis?"), about(2, "train"), other])
    prepared = Prepared.open(tmp_path / "out")
    assert prepared.record_ids == ("r0", "r1") and prepared.questions(1)[0].text == "Axis?"
    assert [row["id"] for row in prepared.quarantine()] == ["r2", "r3"]


def test_what_cannot_be_used_leaves_an_error(tmp_path: Path) -> None:
    with pytest.raises(EvlecgError, match=r"no record could be used .*flat \(1\)"):
        write(tmp_path / "out", [Rejected("r1", "flat: V1")])
    out = tmp_path / "strict"
    for name in ("blocks", "parts"):
        (out / name).mkdir(parents=True)
    write_shard(out, 0, [record(0), Rejected("r1", "flat: V1"), Rejected("r2", "not wanted", fault=False)])
    with pytest.raises(EvlecgError, match="1 of 3 records were rejected"):
        assemble(out, 1, descriptions=DESCRIPTIONS, about=ABOUT, strict=True)
    with pytest.raises(RunFailed, match="cannot be written: File exists"):
        write(tmp_path / "out", [record(0)])


def test_fingerprint_follows_the_content_alone(tmp_path: Path) -> None:
    def fingerprint(name: str, *records: Record) -> str:
        write(tmp_path / name, records)
        return Prepared.open(tmp_path / name).fingerprint

    first = fingerprint("a", record(0), record(1))
    assert fingerprint("b", record(0), record(1)) == first
    signal_mV = record(1).signal_mV.copy()
    signal_mV[0, 0] += 0.002
    assert fingerprint("c", record(0), record(1, signal_mV=signal_mV)) != first
    assert fingerprint("d", record(0), record(1, labels={"NORM": True, "MI": True})) != first
    assert fingerprint("e", record(0), record(1, "val")) != first


def test_it_travels_to_another_process_without_its_signals(tmp_path: Path) -> None:
    write(tmp_path / "out", [record(0, n_samples=50_000)])
    prepared = Prepared.open(tmp_path / "out")
    prepared.record(0)
    sent = pickle.dumps(prepared)
    assert len(sent) < 1000
    assert_array_equal(pickle.loads(sent).record(0).signal_mV, prepared.record(0).signal_mV)


def damage(out: Path, kind: str) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    if kind == "version":
        (out / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    elif kind == "manifest":
        (out / "manifest.json").write_text("{")
    elif kind == "key":
        del manifest["blocks"]
        (out / "manifest.json").write_text(json.dumps(manifest))
    elif kind == "signals":
        (out / "blocks/00000.bin").write_bytes((out / "blocks/00000.bin").read_bytes()[:-2])
    elif kind == "gone":
        (out / "blocks/00000.bin").unlink()
    elif kind == "records":
        text = (out / "records.jsonl").read_text()
        (out / "records.jsonl").write_text(text.replace('"NORM": true', '"NORM": false'))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("version", "has format 99, this evlecg reads 2"),
        ("manifest", "is damaged"),
        ("key", "is damaged"),
        ("signals", "blocks/00000.bin holds 11998 bytes, not 12000"),
        ("gone", "is damaged"),
        ("records", "records.jsonl was changed"),
    ],
)
def test_damaged_folders_are_refused(tmp_path: Path, kind: str, message: str) -> None:
    write(tmp_path / "out", [record(0)])
    damage(tmp_path / "out", kind)
    with pytest.raises(EvlecgError, match=message):
        Prepared.open(tmp_path / "out")


def test_what_is_no_prepared_folder(tmp_path: Path) -> None:
    with pytest.raises(EvlecgError, match="not a prepared folder"):
        Prepared.open(tmp_path)
    with pytest.raises(EvlecgError, match="no such folder"):
        Prepared.open(tmp_path / "missing")
