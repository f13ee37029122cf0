"""ECGInstruct, ECG-Grounding and ECG-R1 in miniature, in their true layouts, hostile items among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose

from evlecg.data.readers import READERS, ReadOptions, Rejected, Source, home_of
from evlecg.data.readers_base import split_of
from evlecg.data.signals import ecg_of, record_id
from evlecg.schema import Question, Record
from tests.test_dialogues import encoded, human, png_header
from tests.test_readers import STEPS, write_ptbxl, write_wfdb
from tests.test_readers_ecgqa import read as read_elsewhere
from tests.test_readers_ecgqa import reasons

MIMIC = "p1000/p10000032/s40689238/40689238"


def item(number: object, image: Any, *texts: str, **more: Any) -> dict[str, Any]:
    talk = human(*(texts or ("<image>\nIs it normal?", "Yes.")))
    return {"id": number, "image": image, "conversations": talk} | more


def write_items(path: Path, items: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(json.dumps(entry) for entry in items)
    path.write_text(lines if path.suffix == ".jsonl" else json.dumps(items, indent=2))


def write_image(path: Path, data: bytes) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return data


def records_of(found: list[Record | Rejected]) -> dict[str, Record]:
    return {entry.id: entry for entry in found if isinstance(entry, Record)}


# names


@pytest.mark.parametrize(
    ("path", "id", "root", "stem", "patient"),
    [
        ("ptb-xl/01033_hr-0.png", "ptb-xl/01033", "ptb-xl", "records500/01000/01033_hr", "ptb-xl/01033"),
        ("ecg_ptbxl_benchmarking/data/ptbxl/records500/21000/21425_hr", "ptb-xl/21425", "ptb-xl",
         "records500/21000/21425_hr", "ptb-xl/21425"),
        (f"mimic_v4/{MIMIC}-0.png", "mimic/40689238", "mimic", f"files/{MIMIC}", "mimic/p10000032"),
        (f"mimic-iv/files/{MIMIC}", "mimic/40689238", "mimic", f"files/{MIMIC}", "mimic/p10000032"),
        ("code15_v4/2508875-0.png", "code15/2508875", "code15", "2508875", "code15/2508875"),
        ("./gen_images/mimic_gen/40689238-0.png", "mimic/40689238", "mimic", "40689238", "mimic/40689238"),
        ("georgia/g1/E00001", "georgia/g1/E00001", "georgia", "g1/E00001", "georgia/g1/E00001"),
    ],
)  # fmt: skip
def test_pictures_and_records_are_recognised(path: str, id: str, root: str, stem: str, patient: str) -> None:
    ecg = ecg_of(path)
    assert (ecg.id, ecg.root, ecg.stems[0], ecg.patient) == (id, root, stem, patient)


def test_ids_have_plain_characters_and_stay_different() -> None:
    assert record_id("ptb-xl/00001_hr-0") == "ptb-xl/00001_hr-0"
    odd = [record_id(name) for name in ("a b", "a_b", "a?b", "é", "")]
    assert len(set(odd)) == 5 and odd[1] == "a_b"
    assert odd[0].startswith("a_b-") and all(set(name) <= set("ab_-0123456789abcdef") for name in odd)


# ECGInstruct


def test_ecginstruct_with_some_of_its_pictures(tmp_path: Path) -> None:
    one = write_image(tmp_path / "ptb-xl" / "00001_hr-0.png", encoded())
    two = write_image(tmp_path / "mimic_v4" / f"{MIMIC}-0.png", encoded("JPEG"))
    write_image(tmp_path / "code15_v4" / "7-0.png", encoded()[:-30])
    write_image(tmp_path / "code15_v4" / "8-0.png", png_header(60_000, 60_000))
    write_items(
        tmp_path / "ECGInstruct.json",
        [
            item("a-1", "ptb-xl/00001_hr-0.png", metadata={"new": "key"}),
            item("a-2", f"mimic_v4/{MIMIC}-0.png", "<image>\nRate?", "70", "Rhythm?", "Sinus."),
            item("a-3", "ptb-xl/00001_hr-0.png", "<image>\nWhich?\nA. SR\nB. AF", "A"),
            item("a-4", "ptb-xl/00001_hr-0.png"),  # the same question once more
            item("a-5", "ptb-xl/00001_hr-0.png", "only", "one", conversations=[{"from": "gpt", "value": "?"}]),
            item("b-1", "ptb-xl/00002_hr-0.png"),
            item("b-2", f"mimic/{MIMIC}-0.png"),
            item("b-3", "mimic/p1001/p10010000/s1/1-0.png"),
            item("b-4", "lone.png"),
            item("b-5", "a: b/lone.png"),
            item("b-6", "a/\ud800.png"),
            item("c-1", "code15_v4/7-0.png"),
            item("c-2", "code15_v4/8-0.png"),
            item("c-3", ["ptb-xl/00001_hr-0.png", "ptb-xl/00002_hr-0.png"]),
            item("c-4", None),
        ],
    )
    found = read_elsewhere(tmp_path, "ecginstruct")
    records = records_of(found)
    assert set(records) == {"ptb-xl/00001_hr-0", f"mimic_v4/{MIMIC}-0"}
    first, second = records["ptb-xl/00001_hr-0"], records[f"mimic_v4/{MIMIC}-0"]
    assert first.image == one and second.image == two  # as they are
    assert first.signal_mV.shape == (12, 0) and first.fs_hz == 0 and first.labels == {}
    assert first.questions == (
        Question("Is it normal?", "Yes.", kind="dialogue", id="a-1"),
        Question("Which?\nA. SR\nB. AF", "A", ("A", "B"), kind="dialogue", id="a-3"),
    )
    assert first.repairs == ("1 malformed dialogues left out",)
    assert [(question.id, question.history) for question in second.questions] == [
        ("a-2", ()),
        ("a-2#2", (("Rate?", "70"),)),
    ]
    assert (first.patient_id, second.patient_id) == ("ptb-xl/00001", "mimic/p10000032")
    assert second.split == split_of("mimic/p10000032", 0)
    assert reasons(found) == {
        "image not in this copy (ptb-xl)": 1,
        "image not in this copy (mimic)": 2,
        "image not in this copy (no folder)": 1,
        "image not in this copy (a__b)": 1,
        "no file can have such a name": 1,
        "unfit picture: truncated or damaged": 1,
        "unfit picture: too many pixels": 1,
        "several ECGs in one question (one image a prompt)": 1,
        "no ECG in the item": 1,
    }
    faults = {entry.id for entry in found if isinstance(entry, Rejected) and entry.fault}
    assert {"code15_v4/7-0", "code15_v4/8-0"} < faults and len(faults) == 3


def test_ecginstruct_with_signals_instead(tmp_path: Path) -> None:
    root = tmp_path / "ecginstruct"
    write_ptbxl(tmp_path / "ptbxl")
    write_wfdb((tmp_path / "mimic" / "files" / MIMIC).parent, "40689238")
    image = write_image(root / "ptb-xl" / "00009_hr-0.png", encoded())
    write_items(
        root / "ECGInstruct.json",
        [
            item("1", "ptb-xl/00001_hr-0.png"),
            item("2", f"mimic/{MIMIC}-0.png"),
            item("3", f"mimic_v4/{MIMIC}-0.png", "<image>\nRate?", "70"),
            item("4", "ptb-xl/00009_hr-0.png"),  # picture here, signal not
            item("5", "ptb-xl/00008_hr-0.png"),
        ],
    )
    found = read_elsewhere(root, "ecginstruct", {"ptb-xl": tmp_path / "ptbxl", "mimic_v4": tmp_path / "mimic"})
    records = records_of(found)
    assert set(records) == {"ptb-xl/00001", "mimic/40689238", "ptb-xl/00009"}
    assert_allclose(records["ptb-xl/00001"].signal_mV, STEPS / np.float32(1000))
    assert records["ptb-xl/00001"].patient_id == "ptb-xl/patient-17" and records["ptb-xl/00001"].sex == "F"
    assert [question.id for question in records["mimic/40689238"].questions] == ["2", "3"]  # two pictures, one ECG
    assert records["mimic/40689238"].image == b"" and records["ptb-xl/00009"].image == image
    assert reasons(found) == {"image not in this copy (ptb-xl)": 1}


def test_one_ecg_stays_in_one_split_and_another_seed_splits_otherwise(tmp_path: Path) -> None:
    items = []
    for patient in range(40):
        for study in range(3):
            name = f"mimic/p1000/p{10000000 + patient}/s{patient}{study}/{patient}{study}-0.png"
            write_image(tmp_path / name, encoded(size=(40, 40)))
            items.append(item(f"{patient}-{study}", name))
    write_items(tmp_path / "ECGInstruct.json", items)
    splits = []
    for seed in (0, 1):
        home = home_of("ecginstruct", tmp_path)
        assert home is not None
        reading = READERS["ecginstruct"].open(Source(home), ReadOptions(labels=(), seed=seed))  # type: ignore[arg-type]
        found = [entry for entry in reading.records() if isinstance(entry, Record)]
        assert len(found) == 120
        splits.append({entry.patient_id: entry.split for entry in found})
        assert all(splits[-1][entry.patient_id] == entry.split for entry in found)
        assert set(splits[-1].values()) == {"train", "val", "test"}
    assert splits[0] != splits[1]


HOSTILE = ["../secret/a.png", "/etc/passwd", "ptb-xl/../../secret/a.png", "link/a.png", "ptb-xl/a\0.png"]


@pytest.mark.parametrize("key", ["image", "ecg"])
def test_hostile_paths_are_refused(tmp_path: Path, key: str) -> None:
    root = tmp_path / "data"
    write_image(tmp_path / "secret" / "a.png", encoded())
    write_wfdb(tmp_path / "secret", "a")
    inner = write_image(root / "ptb-xl" / "00001_hr-0.png", encoded())
    (root / "link").symlink_to(tmp_path / "secret")
    names = [name.removesuffix(".png") if key == "ecg" else name for name in HOSTILE]
    items = [item(number, "ptb-xl/00001_hr-0.png") | {key: name} for number, name in enumerate(names)]
    dataset = "ecg-grounding" if key == "ecg" else "ecginstruct"
    write_items(root / "a.json", [*items, item("good", "ptb-xl/00001_hr-0.png")])
    found = read_elsewhere(root, dataset)
    assert reasons(found) == {"a file name leads out of the source folder": 4, "no file can have such a name": 1}
    assert [record.image for record in records_of(found).values()] == [inner]
    assert all("secret" not in entry.reason for entry in found if isinstance(entry, Rejected))


# ECG-Grounding and ECG-R1


def test_grounding_prefers_the_signal_and_has_a_published_test_set(tmp_path: Path) -> None:
    ecg = f"mimic-iv/files/{MIMIC}"
    write_wfdb((tmp_path / "ecg_timeseries" / ecg).parent, "40689238")
    image = write_image(tmp_path / "ecg_images" / "gen_images" / "mimic_gen" / "2-0.png", encoded())
    train = [
        item("g-1", "mimic_gen/1-0.png", "<ecg>\n<image>\nInterpret.", "Sinus rhythm.", ecg=ecg),
        item("g-2", "mimic_gen/2-0.png", ecg="mimic-iv/files/p1000/p10000033/s2/2"),
        item("g-3", "mimic_gen/3-0.png", ecg="mimic-iv/files/p1000/p10000034/s3/3"),
    ]
    leaked = item("g-4", "mimic_gen/9-0.png", ecg="mimic-iv/files/p1000/p10000099/s91/91")
    train.append(leaked)
    write_items(tmp_path / "ecg_jsons" / "ECG_Grounding_30k.json", train)
    write_items(tmp_path / "ecg_jsons" / "ECG_Grounding_130k.json", train)  # the larger release repeats the smaller
    tested = [item("t-1", "mimic_gen/2-0.png", ecg=f"code15/{number}") for number in range(2)]
    tested.append(item("t-2", "mimic_gen/9-0.png", ecg="mimic-iv/files/p1000/p10000099/s92/92"))
    write_items(tmp_path / "ecg_grounding_test_data" / "ecg-grounding-test.json", tested)
    found = read_elsewhere(tmp_path, "ecg-grounding")
    records = records_of(found)
    assert set(records) == {"mimic/40689238", "mimic/2", "code15/0", "code15/1"}
    assert records["mimic/40689238"].image == b"" and records["mimic/40689238"].fs_hz == 500
    assert records["mimic/40689238"].questions == (
        Question("Interpret.", "Sinus rhythm.", kind="grounding", id="g-1"),
    )  # fmt: skip
    assert records["mimic/2"].image == image
    assert records["code15/0"].split == "test" and "test" not in {records[name].split for name in ("mimic/2",)}
    assert reasons(found) == {
        "image not in this copy (mimic_gen)": 2,
        "its patient is in the published test set": 1,
    }
    assert home_of("ecginstruct", tmp_path) is None


def test_r1_messages(tmp_path: Path) -> None:
    ecg = f"ecg_timeseries/mimic-iv/files/{MIMIC}"
    write_wfdb((tmp_path / ecg).parent, "40689238")
    image = write_image(tmp_path / "ecg_images" / "mimic_gen" / "2-0.png", encoded())
    talk = [
        {"role": "system", "content": "Follow the protocol."},
        {"role": "user", "content": "<ecg><image>Interpret."},
        {"role": "assistant", "content": "<think>P waves.</think><answer>Sinus rhythm.</answer>"},
    ]
    write_items(
        tmp_path / "ecg_jsons" / "train_set" / "CoT-30k.jsonl",
        [
            {"messages": talk, "images": ["ecg_images/mimic_gen/1-0.png"], "objects": {"ecg": [ecg]}},
            {"messages": talk, "images": [{"path": "mimic_gen/2-0.png"}], "objects": {"ecg": []}},
            {"messages": talk, "images": [], "objects": {}},
        ],
    )
    found = read_elsewhere(tmp_path, "ecg-r1")
    records = records_of(found)
    assert set(records) == {"mimic/40689238", "mimic_gen/2-0"}
    assert records["mimic_gen/2-0"].image == image
    expected = Question("Interpret.", "<think>P waves.</think><answer>Sinus rhythm.</answer>", kind="reasoning")
    assert records["mimic/40689238"].questions == (expected,)
    assert reasons(found) == {"no ECG in the item": 1}
    assert all(home_of(name, tmp_path) is None for name in ("ecginstruct", "ecg-grounding", "ecgbench", "ecgqa"))


def test_only_malformed_dialogues_make_a_record_unfit(tmp_path: Path) -> None:
    write_image(tmp_path / "ptb-xl" / "1-0.png", encoded())
    broken = [{"from": "human"}], "text", None, [7]
    write_items(tmp_path / "a.json", [item(0, "ptb-xl/1-0.png", conversations=talk) for talk in broken])
    found = read_elsewhere(tmp_path, "ecginstruct")
    assert reasons(found) == {"malformed dialogue: no question of this ECG can be read": 1}


def test_other_json_is_not_taken_for_dialogues(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"image": "x"}')
    (tmp_path / "text.json").write_text('"conversations": "image":')
    (tmp_path / "ptb-test.json").write_text(json.dumps([item(1, "a.png")]))  # ECGBench's older form
    assert home_of("ecginstruct", tmp_path) is None
    assert home_of("ecgbench", tmp_path) == tmp_path
