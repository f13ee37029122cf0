"""Byte positions of dialogue items: right in every form of file, found in little memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from evlecg.data import items
from evlecg.data.items import Index, read_items, scan
from evlecg.data.readers_base import Source
from evlecg.errors import EvlecgError

ITEMS = [
    {"id": "1", "text": "plain"},
    {"id": "2", "text": 'braces } ] { [ and a quote " and a backslash \\'},
    {"id": "3", "text": "Grüße, 心电图 📈", "more": {"nested": [1, {"a": None}]}},
    {"id": "4", "text": "long " * 500},
]


@pytest.mark.parametrize("form", ["compact", "indented", "lines", "marked", "escaped"])
@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
@pytest.mark.parametrize("hashed", [True, False])
def test_every_item_is_found_and_can_be_read_by_itself(
    tmp_path: Path, form: str, chunk: int, hashed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(items, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(items, "HASHED_BYTES", 1 << 20 if hashed else 0)
    text = {
        "compact": json.dumps(ITEMS, ensure_ascii=False, separators=(",", ":")),
        "indented": json.dumps(ITEMS, ensure_ascii=False, indent=4),
        "lines": "\r\n".join(json.dumps(item, ensure_ascii=False) for item in ITEMS) + "\n",
        "marked": "\ufeff" + json.dumps(ITEMS, ensure_ascii=False),
        "escaped": json.dumps(ITEMS),
    }[form]
    (tmp_path / "a.json").write_bytes(text.encode())
    source = Source(tmp_path)
    found = list(scan(source, "a.json"))
    assert [item for _, _, item in found] == ITEMS
    spans = tuple((0, start, length) for start, length, _ in reversed(found))
    assert read_items([tmp_path / "a.json"], spans) == ITEMS[::-1]
    assert sum(size for _, size, _ in source.taken()) == len(text.encode())


@pytest.mark.parametrize("text", ["", "[]", "[\n]\n", "\n\n"])
def test_empty_files_have_no_items(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert list(scan(Source(tmp_path), "a.json")) == []


def test_a_file_that_is_cut_off_says_where(tmp_path: Path) -> None:
    text = json.dumps(ITEMS[:2])
    (tmp_path / "a.json").write_text(text[:-10])
    found = []
    with pytest.raises(EvlecgError, match=f"behind byte {text.index(', {') + 2}") as caught:
        found += [item for _, _, item in scan(Source(tmp_path), "a.json")]
    assert caught.value.where == "a.json"
    for text in ("[1, 2]", '["a"]', '{"a": 1} x', "[" * 10 + '{"a": ' + "[" * 200_000):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(EvlecgError):
            list(scan(Source(tmp_path), "a.json"))


def test_an_endless_item_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "LARGEST_ITEM_BYTES", 1 << 16)
    monkeypatch.setattr(items, "CHUNK_BYTES", 1 << 12)
    (tmp_path / "a.json").write_text('[{"a": "' + "x" * (1 << 20))
    with pytest.raises(EvlecgError, match="behind byte 1"):
        list(scan(Source(tmp_path), "a.json"))


def test_a_large_list_is_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "HASHED_BYTES", 0)
    path = tmp_path / "a.json"
    answer = "The rhythm is sinus, the axis normal. " * 40
    with path.open("w") as file:
        for number in range(30_000):
            item = {"id": str(number), "image": f"mimic/{number // 3}-0.png", "conversations": [{"value": answer}]}
            file.write(("[" if number == 0 else ",\n") + json.dumps(item))
        file.write("]")
    assert path.stat().st_size > 45e6
    index = Index()
    tracemalloc.start()
    for start, length, item in scan(Source(tmp_path), "a.json"):
        index.add(item["image"], item["image"], (0, start, length))
    groups = index.groups()
    note, spans = next(groups)
    n_more = sum(len(spans) for _, spans in groups)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 9e6  # it is 5.7e6: some chunks of 1 MiB, and the index
    assert (note, len(spans), n_more) == ("mimic/0-0.png", 3, 29_997)
    assert [item["id"] for item in read_items([path], spans)] == ["0", "1", "2"]


def test_groups_are_in_the_order_of_their_first_items() -> None:
    index = Index()
    for number, key in enumerate(["c", "a", "c", "é", "b", "a"]):
        index.add(key, f"{key}{number}", (number % 2, 10 * number, number))
    assert list(index.groups()) == [
        ("c0", ((0, 0, 0), (0, 20, 2))),
        ("a1", ((1, 10, 1), (1, 50, 5))),
        ("é3", ((1, 30, 3),)),
        ("b4", ((0, 40, 4),)),
    ]
    assert list(Index().groups()) == []
    large = Index()
    for number in range(3000):
        large.add(str(number % 7), "", (0, number, 1))
    starts = [[start for _, start, _ in spans] for _, spans in large.groups()]
    assert starts == [list(range(first, 3000, 7)) for first in range(7)]
