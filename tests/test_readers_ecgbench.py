"""ECGBench in miniature: Parquet as the hub writes it, the exploded texts, the arena, the older JSON form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from evlecg.data import readers_ecgbench
from evlecg.data.readers import READERS, ReadOptions, Rejected, Source, home_of
from evlecg.errors import EvlecgError
from evlecg.schema import Question, Record
from tests.test_dialogues import encoded, human, png_header
from tests.test_readers import write_ptbxl
from tests.test_readers_ecgqa import read as read_elsewhere
from tests.test_readers_ecgqa import reasons

OPTIONS = "Options: bigeminal pattern (unknown origin, supraventricular, or ventricular), sinus rhythm, none"


def row(id: Any, path: str | None, image: bytes, talk: Any, **more: Any) -> dict[str, Any]:
    return {"id": id, "image_path": path, "image": {"bytes": image, "path": path}, "conversations": talk} | more


def write_subset(root: Path, subset: str, rows: list[dict[str, Any]], **options: Any) -> None:
    (root / subset).mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), root / subset / "test-00000-of-00001.parquet", **options)


def records_of(found: list[Record | Rejected]) -> dict[str, Record]:
    return {entry.id: entry for entry in found if isinstance(entry, Record)}


def exploded(*texts: str) -> list[dict[str, Any]]:
    return [{"from": turn["from"], "value": list(turn["value"])} for turn in human(*texts)]


def test_subsets_as_published(tmp_path: Path) -> None:
    pictures = [encoded(seed=number) for number in range(6)]
    write_subset(
        tmp_path,
        "ptb-test",
        [
            row("ptb-test-12", "ptb/00012_hr-0.png", pictures[0], human("<image>\nWhich of NORM, MI?", "NORM")),
            row("ptb-test-13", "ptb/00013_hr-0.png", pictures[1], human("<image>\nWhich of NORM, MI?", "MI, CD")),
            row("ptb-test-14", "ptb/00012_hr-0.png", pictures[0], human("<image>\nAnything else?", "No.")),
        ],
    )
    write_subset(
        tmp_path,
        "csn-test-no-cot",
        [row(7, "csn/JS00001-0.png", pictures[2], human("<image>\nWhich?\nA. SR\nB. AF\nC. AT", "B. AF"))],
    )
    talk = exploded(f"<image>\nQuestion: Rhythm? {OPTIONS}", "sinus rhythm")
    several = exploded(f"<image>\nQuestion: Rhythms? {OPTIONS}", "")
    several[1]["value"] = ["sinus rhythm", "none"]
    write_subset(
        tmp_path,
        "ecgqa-test",
        [row("q-1", "ptb/00012_hr-0.png", pictures[3], talk), row("q-2", "ptb/00014_hr-0.png", pictures[4], several)],
    )
    pairs = [{"question": "Rhythm?", "answer": "Sinus."}, {"question": "Next step?", "answer": "None."}]
    write_subset(tmp_path, "arena", [row("arena-1", "arena/1.jpg", encoded("JPEG"), pairs)])
    report = {"id": "r-1", "image_path": "ptb/00015_hr-0.png", "image": {"bytes": pictures[5], "path": ""}}
    report["conversation"] = [{"role": "user", "content": "<image>\nReport."}, {"role": "assistant", "content": "SR."}]
    write_subset(tmp_path, "ptb-test-report", [report])

    found = read_elsewhere(tmp_path, "ecgbench")
    records = records_of(found)
    assert len(found) == len(records) == 7
    assert {record.split for record in records.values()} == {"test"}
    first = records["ptb-test/ptb-test-12"]
    assert first.image == pictures[0] and first.signal_mV.shape == (12, 0)
    assert first.questions == (
        Question("Which of NORM, MI?", "NORM", kind="ptb-test", id="ptb-test-12"),
        Question("Anything else?", "No.", kind="ptb-test", id="ptb-test-14"),  # the same picture
    )
    assert records["ptb-test/ptb-test-13"].image == pictures[1]
    lettered = records["csn-test-no-cot/7"].questions[0]
    assert (lettered.id, lettered.answer, lettered.choices) == ("7", "B. AF", ("A. SR", "B. AF", "C. AT"))
    one, two = records["ecgqa-test/q-1"], records["ecgqa-test/q-2"]
    assert one.questions[0].text.startswith("Question: Rhythm? Options: bigeminal")
    assert one.questions[0].answer == "sinus rhythm" and two.questions[0].answer == "sinus rhythm, none"
    assert len(one.questions[0].choices) == 3 and one.questions[0].choices == two.questions[0].choices
    assert one.patient_id == first.patient_id == "ptb-xl/00012"
    assert [(turn.text, turn.answer, turn.history, turn.id) for turn in records["arena/arena-1"].questions] == [
        ("Rhythm?", "Sinus.", (), "arena-1"),
        ("Next step?", "None.", (("Rhythm?", "Sinus."),), "arena-1#2"),
    ]
    assert records["ptb-test-report/r-1"].questions == (
        Question("Report.", "SR.", kind="ptb-test-report", id="r-1"),
    )  # fmt: skip


def test_patients_of_ptbxl_are_known_by_its_table(tmp_path: Path) -> None:
    write_ptbxl(tmp_path / "ptbxl")
    write_subset(tmp_path / "bench", "ptb-test", [row("1", "ptb/00002_hr-0.png", encoded(), human("?", "x"))])
    (record,) = read_elsewhere(tmp_path / "bench", "ecgbench", {"ptb-xl": tmp_path / "ptbxl"})
    assert isinstance(record, Record) and record.image == encoded()
    assert (record.patient_id, record.age, record.sex) == ("ptb-xl/patient-17", 90, "M")


def test_one_subset_alone_and_a_flat_file(tmp_path: Path) -> None:
    talk = human("Which?", "MI")
    write_subset(tmp_path, "cpsc-test", [row("1", "A0001-0.png", encoded(), talk)])
    (alone,) = read_elsewhere(tmp_path / "cpsc-test", "ecgbench")
    assert (alone.id, isinstance(alone, Record) and alone.patient_id) == ("cpsc-test/1", "cpsc-test/A0001")
    flat = {"id": "1", "image_path": "A0001-0.png", "image": encoded(), "conversations": talk}  # bytes, no struct
    (tmp_path / "flat").mkdir()
    parquet.write_table(pa.Table.from_pylist([flat]), tmp_path / "flat" / "code15-test.parquet")
    (record,) = read_elsewhere(tmp_path / "flat", "ecgbench")
    assert isinstance(record, Record) and record.image == encoded()
    parquet.write_table(pa.Table.from_pylist([flat]), tmp_path / "other.parquet")
    assert home_of("ecgbench", tmp_path / "nowhere") is None
    (tmp_path / "lone").mkdir()
    (tmp_path / "other.parquet").rename(tmp_path / "lone" / "other.parquet")
    assert home_of("ecgbench", tmp_path / "lone") is None


def test_bad_rows_are_left_out_and_say_why(tmp_path: Path) -> None:
    talk = human("Which?", "MI")
    write_subset(
        tmp_path,
        "ptb-test",
        [
            row("good", "a.png", encoded(), talk),
            row("none", "b.png", b"", talk),
            row("cut", "c.png", encoded()[:-20], talk),
            row("bomb", "d.png", png_header(60_000, 60_000), talk),
            row("mute", "e.png", encoded(), []),
            row("again", None, encoded(), talk),
            row("again", None, encoded(), talk),
            row("a b", "f.png", encoded(), talk),
        ],
    )
    found = read_elsewhere(tmp_path, "ecgbench")
    names = sorted(records_of(found))
    assert len(names) == 4 and names[0].startswith("ptb-test/a_b-")
    assert names[1:] == ["ptb-test/again", "ptb-test/again_", "ptb-test/good"]
    assert records_of(found)[names[0]].questions[0].id == "a b"  # verbatim
    assert reasons(found) == {
        "unfit picture: the row has none": 1,
        "unfit picture: truncated or damaged": 1,
        "unfit picture: too many pixels": 1,
        "malformed dialogue: no question of this picture can be read": 1,
    }


def test_rows_in_any_order_and_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers_ecgbench, "BATCH_BYTES", 40_000)
    pictures = [encoded(size=(40, 40), seed=number) for number in range(23)]
    rows = [row(str(number), f"{number}.png", image, human("?", "x")) for number, image in enumerate(pictures)]
    write_subset(tmp_path, "ptb-test", rows, row_group_size=10)
    home = home_of("ecgbench", tmp_path)
    assert home is not None
    reading = READERS["ecgbench"].open(Source(home), ReadOptions(labels=()))  # type: ignore[arg-type]
    entries = list(reading.entries)
    assert reading.total is None and len(entries) == 23
    for number in [*range(23), 22, 0, 5, 15, 14, 16, 4]:
        assert reading.read(entries[number]).image == pictures[number]


def test_damaged_files_say_so(tmp_path: Path) -> None:
    write_subset(tmp_path, "ptb-test", [row("1", "a.png", encoded(), human("?", "x"))])
    path = tmp_path / "ptb-test" / "test-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(EvlecgError, match="damaged or cut off"):
        read_elsewhere(tmp_path, "ecgbench")


MEASURE = """
import sys
from pathlib import Path
import pyarrow
from evlecg.data.readers import READERS, ReadOptions, Source
from evlecg.schema import Record
reading = READERS["ecgbench"].open(Source(Path(sys.argv[1])), ReadOptions(labels=()))
kept = sum(isinstance(entry, Record) for entry in reading.records())
print(kept, pyarrow.default_memory_pool().max_memory())
"""


def test_the_table_is_never_held(tmp_path: Path) -> None:
    head, noise = encoded(size=(40, 40)), np.random.default_rng(0)
    rows = [row(str(number), f"{number}.png", head + noise.bytes(400_000), human("?", "x")) for number in range(120)]
    write_subset(tmp_path, "ptb-test", rows, row_group_size=10)  # 48 MB; the hub's groups have 100 pictures
    # in a process of its own: the peak of this one is that of all tests before
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    kept, peak = map(int, done.stdout.split())
    assert kept == 120 and 0 < peak < 16e6  # it is 12.4e6: three row groups


def test_the_older_form(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(encoded())
    root = tmp_path / "ecg_bench"
    (root / "images" / "code15").mkdir(parents=True)
    (root / "images" / "code15" / "1-0.png").write_bytes(encoded(seed=1))
    (root / "images" / "out").symlink_to(tmp_path)
    (root / "jsons").mkdir()
    names = ["code15/1-0.png", "code15/2-0.png", "../../secret.png", str(tmp_path / "secret.png"), "out/secret.png"]
    items = [{"id": f"c-{number}", "image": name, "conversations": human("<image>\nWhich?", "AF")}
             for number, name in enumerate(names)]  # fmt: skip
    (root / "jsons" / "code15-test.json").write_text(json.dumps(items))
    mmmu = {"No": "m-1", "image": "code15/1-0.png", "conversations": human("Which?\nA. SR\nB. AF", "B")}
    (root / "jsons" / "mmmu-ecg.json").write_text(json.dumps([mmmu]))
    found = read_elsewhere(root, "ecgbench")
    records = records_of(found)
    assert set(records) == {"code15-test/c-0", "mmmu-ecg/m-1"}
    assert {record.image for record in records.values()} == {encoded(seed=1)}
    assert records["mmmu-ecg/m-1"].questions == (Question("Which?\nA. SR\nB. AF", "B", ("A", "B"), None, "mmmu-ecg",
                                                          id="m-1"),)  # fmt: skip
    assert reasons(found) == {
        "image not in this copy (code15-test)": 1,
        "a file name leads out of the source folder": 3,
    }
