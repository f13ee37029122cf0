"""Prepared folders put together: ids, patients, splits, labels, repeated signals, and bad input."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from evlecg.cli import app, main
from evlecg.data.store import Prepared
from evlecg.data.writer import write_prepared
from evlecg.errors import EvlecgError
from evlecg.joining import Part, join, part_of, patient_of, shares_of
from evlecg.prepare import prepare
from evlecg.progress import Progress
from evlecg.schema import Question, Record
from tests.test_readers import STEPS

ABOUT = {"title": "t", "licence": "CC BY 4.0", "citation": "c"}


def record(number: int, *, patient: str = "", split: str = "train", questions: tuple = (), **labels: bool) -> Record:
    signal_mV = np.roll(STEPS, number, axis=1) / np.float32(1000)
    return Record(id=f"r{number}", patient_id=patient or f"p{number}", labels=labels, split=split,
                  signal_mV=signal_mV, fs_hz=500.0, questions=questions)  # fmt: skip


def write(folder: Path, dataset: str, records: list[Record], **descriptions: str) -> Path:
    write_prepared(folder, records, descriptions=descriptions or {"MI": "an infarction", "CD": "a block"},
                   about={**ABOUT, "dataset": dataset})  # fmt: skip
    return folder


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    a = write(tmp_path / "a", "ptbxl", [record(1, MI=True, CD=False), record(2, MI=False, split="test"),
                                        record(3, MI=True, split="val")])  # fmt: skip
    b = write(tmp_path / "b", "cpsc2018", [record(1, CD=True), record(4, patient="p1", CD=False), record(5, AFIB=True)],
              CD="a block, otherwise", AFIB="atrial fibrillation")  # fmt: skip
    return a, b


def test_ids_patients_and_labels_of_both(two: tuple[Path, Path], tmp_path: Path) -> None:
    summary = join([Part(two[0]), Part(two[1])], out=tmp_path / "out")
    found = Prepared.open(tmp_path / "out")
    assert found.record_ids == ("ptbxl/r1", "ptbxl/r2", "ptbxl/r3", "cpsc2018/r4", "cpsc2018/r5")
    assert found.patient_ids == ("ptbxl:p1", "ptbxl:p2", "ptbxl:p3", "ptbxl:p1", "cpsc2018:p5"), (
        "the first of cpsc2018 has the signal of the first of ptbxl, hence the patient"
    )
    assert summary.splits == {"train": 3, "val": 1, "test": 1} and summary.n_patients == 4
    assert [row["reason"] for row in found.quarantine()] == ["duplicate: the same signal as ptbxl/r1"]
    assert found.label_descriptions == {"MI": "an infarction", "CD": "a block", "AFIB": "atrial fibrillation"}
    labels_NK = found.labels(np.arange(5), ("MI", "CD", "AFIB"))
    np.testing.assert_array_equal(labels_NK[[0, 3]], [[1, 0, np.nan], [np.nan, 0, np.nan]])
    for index, (folder, place) in enumerate(((two[0], 0), (two[0], 1), (two[0], 2), (two[1], 1), (two[1], 2))):
        np.testing.assert_array_equal(found.record(index).signal_mV, Prepared.open(folder).record(place).signal_mV)
    assert found.manifest["options"]["joined"][1] == {
        "name": "cpsc2018", "fingerprint": Prepared.open(two[1]).fingerprint, "splits": [],
    }  # fmt: skip
    block = (tmp_path / "out" / "blocks" / "00001.bin").read_bytes()
    join([Part(two[0])] * 2, out=two[1], overwrite=True)
    assert (tmp_path / "out" / "blocks" / "00001.bin").read_bytes() == block, "a source may be replaced"


def test_splits_are_taken_or_drawn_anew(two: tuple[Path, Path], tmp_path: Path) -> None:
    join([part_of(f"{two[0]}=val,test"), Part(two[1])], out=tmp_path / "some")
    assert Prepared.open(tmp_path / "some").record_ids == (
        "ptbxl/r2", "ptbxl/r3", "cpsc2018/r1", "cpsc2018/r4", "cpsc2018/r5",
    )  # fmt: skip
    many = write(tmp_path / "many", "ludb", [record(n, patient=f"p{n // 2}", MI=bool(n % 3)) for n in range(20, 220)])
    parts = [Part(two[0], ("test",)), Part(many)]
    summary = join(parts, out=tmp_path / "drawn", shares=shares_of("50/10/40"))
    drawn = Prepared.open(tmp_path / "drawn")
    assert next(drawn.record_ids[place] for place in drawn.indices("test")) == "ptbxl/r2", "what was named stays"
    assert 70 <= summary.splits["train"] <= 130 and 50 <= summary.splits["test"] <= 110 and summary.splits["val"]
    assert summary.n_rejected == 0 and summary.n_kept == 201, "a patient's records are drawn together"
    other = join(parts, out=tmp_path / "other", shares=shares_of("50/10/40"), seed=1)
    assert other.fingerprint != summary.fingerprint
    none = join(parts, out=tmp_path / "none", shares=shares_of("60/0/40"))
    assert none.splits["val"] == 0 and none.n_kept == summary.n_kept
    held = write(tmp_path / "held", "ludb", [record(n, patient=f"p{10 + n // 2 % 9}", MI=True, split="test")
                                             for n in range(300, 340)])  # fmt: skip
    for order in ([Part(many), Part(held, ("test",))], [Part(held, ("test",)), Part(many)]):
        kept = join(order, out=tmp_path / "kept", shares=shares_of("98/1/1"), overwrite=True)
        assert kept.n_rejected == 0 and kept.splits["test"] >= 40 + 18, "a named patient's other records go along"


def test_labels_are_chosen_and_questions_kept(tmp_path: Path) -> None:
    asked = Question(id="q", text="Why?", answer="So.", kind="open")
    a = write(tmp_path / "a", "ecgqa", [record(1, questions=(asked,))])
    b = write(tmp_path / "b", "ludb", [record(2, MI=True, AFIB=False), record(3, AFIB=True)], MI="m", AFIB="f")
    summary = join([Part(a), Part(b)], out=tmp_path / "out", labels="ptbxl-super")
    found = Prepared.open(tmp_path / "out")
    assert found.label_names == ("MI",) and found.record_ids == ("ecgqa/r1", "ludb/r2")
    assert found.questions(0) == (asked,) and summary.n_questions == 1
    assert summary.reasons == {"none of the wanted labels was assessed": 1} and summary.n_dropped == 1


def test_a_signal_in_two_folders_tells_whose_its_owners_others_are(tmp_path: Path) -> None:
    a = write(tmp_path / "a", "wfdb", [record(1, patient="h1", MI=True)])
    b = write(tmp_path / "b", "dicom", [record(1, patient="x", MI=True, split="test"),
                                        record(2, patient="x", MI=False, split="test"),
                                        record(3, patient="y", MI=False, split="test")])  # fmt: skip
    join([Part(a), Part(b)], out=tmp_path / "out")
    found = Prepared.open(tmp_path / "out")
    assert found.record_ids == ("wfdb/r1", "dicom/r3")
    assert [row["reason"].partition(":")[0] for row in found.quarantine()] == ["duplicate", "patient in two splits"]
    drawn = join([Part(a), Part(b)], out=tmp_path / "drawn", shares=shares_of("50/0/50"))
    assert drawn.n_kept == 3 and Prepared.open(tmp_path / "drawn").patient_ids == ("wfdb:h1", "wfdb:h1", "dicom:y")


def test_signals_are_left_out_and_strictness_is_kept(two: tuple[Path, Path], tmp_path: Path) -> None:
    parts = [Part(two[0]), Part(two[1])]
    summary = join(parts, out=tmp_path / "out", exclude=[two[0]])
    assert Prepared.open(tmp_path / "out").record_ids == ("cpsc2018/r4", "cpsc2018/r5") and summary.n_dropped == 4
    clash = write(tmp_path / "clash", "ptbxl", [record(8, patient="p1", MI=True, split="test")])
    assert join([Part(two[0]), Part(clash)], out=tmp_path / "loose").n_rejected == 1
    with pytest.raises(EvlecgError, match="1 of 4 records were rejected"):
        join([Part(two[0]), Part(clash)], out=tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


def test_records_with_a_report_alone_are_kept(two: tuple[Path, Path], tmp_path: Path) -> None:
    read = dataclasses.replace(record(9), report="sinus rhythm")
    told = write(tmp_path / "told", "mimic-iv-ecg", [read, record(10, CD=True)])
    join([Part(two[0]), Part(told)], out=tmp_path / "out", labels="ptbxl-super")
    assert "mimic-iv-ecg/r9" in Prepared.open(tmp_path / "out").record_ids


def test_only_a_prepared_folder_is_replaced(two: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years")
    with pytest.raises(EvlecgError, match="not a prepared folder, and is not replaced"):
        join([Part(two[0]), Part(two[1])], out=tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "thesis.txt").read_text() == "years"


def test_patients_whom_nothing_tells_are_warned_of(two: tuple[Path, Path], tmp_path: Path) -> None:
    one = dataclasses.replace(record(6, MI=True), id="HR00006", patient_id="HR00006")
    told: list[str] = []
    progress = Progress()
    progress.warn = told.append  # type: ignore[method-assign]
    join([Part(two[0]), Part(write(tmp_path / "c", "cinc2021", [one]))], out=tmp_path / "out", progress=progress)
    same = dataclasses.replace(record(1, MI=True), id="HR00001", patient_id="HR00001")
    join([Part(write(tmp_path / "d", "cinc2021", [same])), Part(two[0])], out=tmp_path / "tied", progress=progress)
    assert len(told) == 1 and "1 records of PTB-XL in a challenge's tree say no patient" in told[0]


def test_the_same_people_are_recognised_across_datasets() -> None:
    for dataset, own, patient, expected in (
        ("ptbxl", "00001", "15709", "ptbxl:15709"),
        ("ecgqa", "q1", "ptb-xl/patient-15709", "ptbxl:15709"),
        ("cinc2021", "HR00001", "15709", "ptbxl:15709"),
        ("cinc2021", "HR00001", "HR00001", "ptbxl:record-00001"),
        ("ecgbench", "b1", "ptb-xl/00001", "ptbxl:record-00001"),
        ("ecginstruct", "e2", "mimic/4000", "mimic-iv-ecg:record-4000"),
        ("ecginstruct", "e3", "code15/17", "code15:17"),
        ("cinc2021", "A0001", "A0001", "cpsc2018:A0001"),
        ("cpsc2018", "A0001", "A0001", "cpsc2018:A0001"),
        ("cinc2020", "JS00001", "JS00001", "chapman-ningbo:JS00001"),
        ("cinc2020", "S0001", "patient001", "ptb:patient001"),
        ("ptb", "patient001/s0010_re", "patient001", "ptb:patient001"),
        ("cinc2021", "I0001", "incart001", "incart:incart001"),
        ("ecginstruct", "e1", "mimic/p10000032", "mimic-iv-ecg:10000032"),
        ("mimic-iv-ecg", "m1", "10000032", "mimic-iv-ecg:10000032"),
        ("joint", "ludb/1", "ludb:1", "ludb:1"),
        ("wfdb", "A1", "A1", "wfdb:A1"),
        ("synthetic", "s1", "s1", "synthetic-2:s1"),
        ("ludb", "1", "1", "ludb:1"),
    ):
        assert patient_of(f"{dataset}-2", dataset, {"id": own, "patient_id": patient}) == expected


def test_twice_is_a_no_op_and_joint_folders_join(two: tuple[Path, Path], tmp_path: Path) -> None:
    parts = [Part(two[0]), Part(two[1])]
    first = join(parts, out=tmp_path / "out")
    assert join(parts, out=tmp_path / "out").unchanged and not first.unchanged
    assert join(parts, out=tmp_path / "out", seed=1).unchanged, "nothing is drawn"
    with pytest.raises(EvlecgError, match="joined differ"):
        join(parts[::-1], out=tmp_path / "out")
    odd = write(tmp_path / "a=b", "ludb", [record(11, MI=True)])
    assert part_of(str(odd)) == Part(odd) and part_of(f"{odd}=train") == Part(odd, ("train",))
    more = write(tmp_path / "more", "ludb", [record(7, MI=True)])
    join([Part(tmp_path / "out"), Part(more)], out=tmp_path / "again")
    again = Prepared.open(tmp_path / "again")
    assert again.patient_ids[0] == "ptbxl:p1" and again.record_ids[-1] == "ludb/r7" and len(again) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--join", "a"], "there is nothing to join"),
        (["--join", "a", "--join", "nowhere"], "no such folder"),
        (["--join", "a=tset", "--join", "b"], "unknown split 'tset'"),
        (["--join", "a", "--join", "b", "--split", "50/50"], "a split is three shares"),
        (["--join", "a", "--join", "b", "--split", "0/50/50"], "a split is three shares"),
        (["--join", "a", "--join", "b", "--labels", "ptbxl-rhythms"], "unknown label set"),
        (["--join", "a=", "--join", "b"], "unknown split ''"),
        (["--join", "=test", "--join", "b"], "no folder is named"),
        (["--join", "b=val", "--join", "a"], "nothing is taken of this folder"),
        (["--join", "a=test", "--join", "b=train", "--split", "5/1/4"], "there is no split to draw"),
        (["--join", "a", "--join", "b", "--split", "50/nan/40"], "a split is three shares"),
        (["--join", "a", "--join", "b", "--dataset", "ludb"], "--dataset has no place there"),
        (["--join", "a", "--join", "b", "--fs", "100", "--teacher", "x"], "--fs, --teacher has no place there"),
        (["--dataset", "ludb", "--split", "50/10/40"], "--dataset has no place there"),
    ],
)
def test_bad_input_is_one_error_and_leaves_nothing(
    two: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["evlecg", "prepare", *arguments, "--out", "out"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2 and message in " ".join(capsys.readouterr().err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_recorded_copies_and_their_patients_stay_together(shared_data: Path, tmp_path: Path) -> None:
    for name in ("ptbxl", "cinc2021"):
        prepare(name, source=shared_data / name, out=tmp_path / name, labels="ptbxl-super")
    parts = [Part(tmp_path / "cinc2021"), Part(tmp_path / "ptbxl")]
    summary = join(parts, out=tmp_path / "out", shares=shares_of("50/0/50"))
    found, ptbxl = Prepared.open(tmp_path / "out"), Prepared.open(tmp_path / "ptbxl")
    copies = {record.removeprefix("cinc2021/HR") for record in found.record_ids if "HR" in record} & set(
        ptbxl.record_ids
    )
    assert copies, "HRnnnnn is PTB-XL's record nnnnn, bit for bit"
    dropped = {row["id"]: row["reason"] for row in found.quarantine()}
    for number in copies:
        assert dropped[f"ptbxl/{number}"] == f"duplicate: the same signal as cinc2021/HR{number}"
    assert summary.n_rejected == 0, "no patient in two splits"
    recorded = found.record_ids.index("ptbxl/" + next(one for one in ptbxl.record_ids if one not in copies))
    _, number = found.record_ids[recorded].split("/")
    np.testing.assert_array_equal(found.record(recorded).signal_mV,
                                  ptbxl.record(ptbxl.record_ids.index(number)).signal_mV)  # fmt: skip


def test_the_command_tells_what_it_made(two: tuple[Path, Path], tmp_path: Path) -> None:
    command = ["prepare", "--join", str(two[0]), "--join", f"{two[1]}=train", "--out", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["positives"] == {"MI": 2, "CD": 0, "AFIB": 1}
