"""A folder of stored rows: what compression costs, what is named when it does not fit, and who may be killed when."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from evlecg.errors import EvlecgError, RunFailed
from evlecg.files import waiting_lock
from evlecg.teacher import FolderStore, TeacherFacts
from evlecg.teacher import store as store_module
from evlecg.teacher.compress import Int8, Plain, affordable_rank, codec_of, fit_low_rank
from evlecg.teacher.rows import Geometry, RowSide
from evlecg.teacher.store import Entry, read_index

MADE_WITH = {"teacher": {"revision": "r1"}, "page": {"grid": "pink"}, "dtype": {"states": "float32"}}
FACTS = TeacherFacts(64, 500, None, "float32", "page", None, True, True)
N_TOKENS, WIDTH = 300, 64


def decaying(n, width=WIDTH, seed=0):
    """Tokens whose directions matter less and less, off the origin, as hidden states are."""
    drawn = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(1)))[0]
    size_D = 0.9 ** torch.arange(width)
    return (torch.randn(n, width, generator=drawn) * size_D) @ mixing + 0.3


def entry(number, fields=("hidden", "answer"), n=N_TOKENS):
    unit = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    geometry = Geometry("3x4+1", 10.0, unit, unit[:2], np.arange(2), np.zeros((2, 2), np.float32))
    flags = np.zeros(n, np.int64)
    side = RowSide(np.arange(n), flags, flags, flags, flags, np.arange(3), np.zeros(0, np.int64), geometry)
    sizes = {"answer": 3}
    return Entry(f"r{number}.q.a.1", side, {f: decaying(sizes.get(f, n), seed=number) for f in fields})


def filled(path, compression, n=80, fields=("hidden", "answer")):
    store = FolderStore.open(path, MADE_WITH, compression)
    store.start(FACTS)
    for number in range(n):
        store.add([entry(number, fields)], remaining=n - number - 1)
    store.write_index()
    return store


@pytest.mark.parametrize(
    ("compression", "worst", "of_fp16"),
    [("none", 0, 2.1), ("bf16", 3e-3, 1.05), ("int8", 1e-2, 0.56), ("low_rank", 0.1, 0.25)],
)
def test_compression_costs_what_the_index_says(tmp_path, compression, worst, of_fp16):
    filled(tmp_path / "c", compression)
    store = FolderStore.open(tmp_path / "c", MADE_WITH, compression)  # as another process sees it
    keys = [f"r{number}.q.a.1" for number in range(80)]
    found, counts = store.field(keys, "hidden", torch.float32, "cpu")
    expected = torch.cat([entry(number).fields["hidden"] for number in range(80)])
    assert counts == [N_TOKENS] * 80
    error = float((found - expected).norm() / expected.norm())
    told = read_index(tmp_path / "c")["contents"]
    assert told["fields"]["hidden"]["relative_error"] == pytest.approx(error, rel=1e-3, abs=1e-9)
    assert error <= worst and told["share_of_fp16"] <= of_fp16
    lost = float((found - expected).square().sum() / (expected - expected.mean(0)).square().sum())
    assert told["fields"]["hidden"]["lost_variance"] == pytest.approx(lost, rel=0.02, abs=1e-9)
    assert told["rows"] == 80 and told["records"] == 80
    on_disk = sum(p.stat().st_size for p in (tmp_path / "c").rglob("*.safetensors"))
    assert told["bytes"] == on_disk
    answer, _ = store.field(keys[:2], "answer", torch.float32, "cpu")
    exact = torch.cat([entry(number).fields["answer"] for number in range(2)])
    assert float((answer - exact).norm() / exact.norm()) < (1e-2 if compression != "none" else 1e-9)


def test_principal_directions_are_those_of_the_singular_vectors():
    tokens = decaying(500).double()
    fitted = fit_low_rank([tokens[:200].float(), tokens[200:].float()], 8)
    _, _, right = torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
    own = fitted.up_RD.double()
    own = own / own.norm(dim=1, keepdim=True)
    torch.testing.assert_close(
        (own @ right[:8].T).abs().diagonal(), torch.ones(8, dtype=torch.float64), atol=1e-4, rtol=0
    )
    coordinates = fitted.encode(tokens.float())
    assert coordinates["data"].dtype == torch.int8 and coordinates["data"].shape == (500, 8)
    kept = tokens.mean(0) + (tokens - tokens.mean(0)) @ right[:8].T @ right[:8]
    torch.testing.assert_close(fitted.decode(coordinates, torch.float64), kept, atol=2e-2, rtol=0)


def test_tokens_of_few_directions_and_odd_sizes():
    flat = torch.ones(50, 8) * torch.tensor([1.0, 2, 0, 0, 0, 0, 0, 0])  # no variance at all
    fitted = fit_low_rank([flat], 4)
    torch.testing.assert_close(fitted.decode(fitted.encode(flat), torch.float32), flat, atol=1e-5, rtol=1e-5)
    zero = torch.zeros(3, 8)
    torch.testing.assert_close(Int8().decode(Int8().encode(zero), torch.float32), zero)
    assert isinstance(codec_of("low_rank", "answer", None), Int8) and isinstance(
        codec_of("int8", "logits", None), Plain
    )
    assert affordable_rank(64, 100, 0, share=0.25, rows=10**6) == 27  # 27 + a scale of 4 of 32 bytes, and a crumb
    assert affordable_rank(64, 100, 1e9, share=0.25, rows=10**6) == 1


@pytest.mark.parametrize(
    ("here", "compression", "said"),
    [
        ({**MADE_WITH, "page": {"grid": "blue"}}, "int8", "page.grid: pink there, blue here"),
        ({**MADE_WITH, "teacher": {"revision": "r2"}}, "int8", "teacher.revision: r1 there, r2 here"),
        ({**MADE_WITH, "layers": {"visual": -2}}, "int8", "layers"),
        (MADE_WITH, "bf16", "compression: int8 there, bf16 here"),
    ],
)
def test_a_mismatch_names_what_differs(tmp_path, here, compression, said):
    filled(tmp_path / "c", "int8", n=1)
    with pytest.raises(EvlecgError, match=said):
        FolderStore.open(tmp_path / "c", here, compression)


def test_other_folders_and_damage_are_told(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "x.txt").write_text("x")
    with pytest.raises(EvlecgError, match="not a teacher cache"):
        FolderStore.open(tmp_path / "notes", MADE_WITH, "int8")
    filled(tmp_path / "c", "int8", n=2)
    shard = next((tmp_path / "c" / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(EvlecgError, match="damaged") as caught:
        FolderStore.open(tmp_path / "c", MADE_WITH, "int8")
    assert str(shard) in str(caught.value)
    (tmp_path / "c" / "cache.json").write_text("{")
    with pytest.raises(EvlecgError, match=r"damaged.*cache\.json"):
        FolderStore.open(tmp_path / "c", MADE_WITH, "int8")


def test_fields_may_come_later(tmp_path):
    filled(tmp_path / "c", "low_rank", n=70)
    later = FolderStore.open(tmp_path / "c", MADE_WITH, "low_rank")
    assert later.lacks("r3.q.a.1", ["visual"]) and not later.lacks("r3.q.a.1", ["hidden"])
    later.add([entry(number, ("visual",)) for number in range(70)])
    both = FolderStore.open(tmp_path / "c", MADE_WITH, "low_rank")
    assert not both.lacks("r3.q.a.1", ["visual", "hidden"]) and len(both) == 70
    assert {"hidden", "answer", "visual"} == set(both.contents()["fields"])
    assert (tmp_path / "c" / "basis-visual.safetensors").exists()


def test_a_store_travels_to_another_process_with_the_shards_that_it_knew(tmp_path):
    store = filled(tmp_path / "c", "int8", n=2)
    sent = pickle.dumps(store)
    FolderStore.open(tmp_path / "c", MADE_WITH, "int8").add([entry(7)])
    there = pickle.loads(sent)
    assert there.lacks("r7.q.a.1", []) and not there.lacks("r1.q.a.1", ["hidden"])
    there.rescan()
    assert not there.lacks("r7.q.a.1", ["hidden"])


def test_shards_are_mapped_and_not_read(tmp_path):
    filled(tmp_path / "c", "none", n=2, fields=("hidden",))
    store = FolderStore.open(tmp_path / "c", MADE_WITH, "none")
    shard, row = store._where["r1.q.a.1"]["hidden"]
    part = shard.parts("hidden", row)["data"]
    assert part.untyped_storage().data_ptr() == shard.tensor("hidden.data").untyped_storage().data_ptr()
    maps = Path("/proc/self/maps")
    if maps.exists():  # Linux says what is mapped
        assert str(shard.path) in maps.read_text()


def test_a_full_disk_is_told_and_what_is_there_stays(tmp_path, monkeypatch):
    store = filled(tmp_path / "c", "int8", n=2)

    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "save_file", full)
    with pytest.raises(RunFailed, match="No space left"):
        store.add([entry(5)])
    assert len(FolderStore.open(tmp_path / "c", MADE_WITH, "int8")) == 2
    assert not list((tmp_path / "c" / "shards").glob(".*"))


def _write_for_ever(path):
    store_module.SHARD_BYTES = 1
    store = FolderStore.open(path, MADE_WITH, "int8")
    store.start(FACTS)
    for number in range(10**6):
        store.add([entry(number)], remaining=10**6 - number)


def test_sigkill_leaves_whole_shards_and_the_next_writer_goes_on(tmp_path):
    fork = multiprocessing.get_context("fork")
    known = 0
    for _ in range(3):
        process = fork.Process(target=_write_for_ever, args=(tmp_path / "c",))
        process.start()
        shards, stop_at = tmp_path / "c" / "shards", time.monotonic() + 30
        while len(list(shards.glob("[!.]*"))) < known + 3 and time.monotonic() < stop_at:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        store = FolderStore.open(tmp_path / "c", MADE_WITH, "int8")
        assert len(list(shards.glob("[!.]*"))) >= known + 3
        known = len(list(shards.glob("[!.]*")))
        for path in shards.glob("[!.]*"):
            with safe_open(path, framework="pt") as file:
                assert file.get_tensor("hidden.data").shape == (N_TOKENS, WIDTH)
        got, _ = store.field(["r0.q.a.1"], "hidden", torch.float32, "cpu")
        assert float((got - entry(0).fields["hidden"]).abs().max()) < 0.05
    for name in (".half.safetensors.1234.partial", ".tmpA1b2C3"):
        (shards / name).write_bytes(b"x")
    store.start(FACTS)
    assert not list(shards.glob(".*")), "what a killed writer left is swept away by the next"
    assert json.loads((tmp_path / "c" / "cache.json").read_text())["contents"]["rows"] == len(store)


def _hold(path, log, barrier, name):
    def note(what):  # a queue may hand over what two processes put in another order; their clock is one
        log.put((time.monotonic_ns(), f"{name} {what}"))

    barrier.wait(timeout=30)
    with waiting_lock(path, lambda: note("waits")):
        note("in")
        time.sleep(1.0)
        note("out")


def test_writers_take_turns(tmp_path):
    fork = multiprocessing.get_context("fork")
    log, barrier = fork.Queue(), fork.Barrier(2)
    processes = [fork.Process(target=_hold, args=(tmp_path / "deep" / ".lock", log, barrier, name)) for name in "ab"]
    for process in processes:
        process.start()
    said = [what for _, what in sorted(log.get(timeout=30) for _ in range(5))]
    for process in processes:
        process.join()
    turns = [line for line in said if "waits" not in line]
    assert turns[0][0] == turns[1][0] and turns[2][0] == turns[3][0] and sum("waits" in line for line in said) == 1
