"""The prepare job end to end: miniature downloads, recorded ECGs, the generator, and every kind of bad input."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose

from evlecg.data import synthetic
from evlecg.data.store import Prepared
from evlecg.errors import EvlecgError, RunFailed
from evlecg.prepare import PrepareSummary, find_dataset, looks_raw, prepare
from evlecg.progress import Progress
from evlecg.schema import SPLITS, Record
from tests.test_readers import STEPS, write_ptbxl, write_wfdb

COMMENTS = ("Age: 74", "Sex: Male", "Dx: 426783006", "Hx: John Smith, seen 12-May-2020")


def write_cpsc(folder: Path, n: int = 3, broken: int = 0) -> None:
    for number in range(n + broken):
        steps = np.roll(STEPS, number, axis=1)
        if number >= n:
            steps[3] = 0
        write_wfdb(folder, f"A{number:04d}", steps, suffix=".mat", comments=COMMENTS)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_download_becomes_a_prepared_folder(tmp_path: Path) -> None:
    write_ptbxl(tmp_path / "source")
    summary = prepare("ptbxl", source=tmp_path / "source", out=tmp_path / "out")
    prepared = Prepared.open(tmp_path / "out")
    assert (summary.n_read, summary.n_kept, summary.n_rejected, summary.n_dropped) == (5, 3, 0, 2)
    assert summary.splits == {"train": 2, "val": 0, "test": 1} and summary.n_patients == 2
    assert summary.positives == {"NORM": 1, "MI": 1, "STTC": 1, "CD": 1, "HYP": 0}
    assert summary.reasons == {"no diagnostic class": 1, "listed, but not in this copy": 1}
    assert json.loads(json.dumps(summary.to_dict()))["fingerprint"] == prepared.fingerprint
    assert_allclose(prepared.record(0).signal_mV, STEPS / np.float32(1000), atol=1e-6)
    assert prepared.manifest["licence"] == "CC BY 4.0" and "Wagner" in prepared.manifest["citation"]
    assert prepared.manifest["options"]["labels"] == "ptbxl-super"
    assert prepared.manifest["source"]["n_files"] == 2 + 2 * 3  # two tables; the dropped records were not read


def test_nothing_of_the_machine_or_the_patient_is_kept(tmp_path: Path) -> None:
    write_cpsc(tmp_path / "download", broken=1)
    write_ptbxl(tmp_path / "ptbxl")
    prepare("cpsc2018", source=tmp_path / "download", out=tmp_path / "out")
    prepare("ptbxl", source=tmp_path / "ptbxl", out=tmp_path / "out2")
    for file in [*(tmp_path / "out").rglob("*.*"), *(tmp_path / "out2").rglob("*.*")]:
        data = file.read_bytes()
        for secret in (str(tmp_path), "download", "Smith", "May", "1984"):
            assert secret.encode() not in data, (file.name, secret)


def test_the_same_download_gives_the_same_folder_wherever_it_lies(tmp_path: Path) -> None:
    found = []
    for place in ("a", "b/c"):
        write_cpsc(tmp_path / place, 12)
        prepare("cpsc2018", source=tmp_path / place, out=tmp_path / place / "out")
        prepared = Prepared.open(tmp_path / place / "out")
        found.append((prepared.fingerprint, prepared.manifest["source"]))
    assert found[0] == found[1]
    prepare("cpsc2018", source=tmp_path / "a", out=tmp_path / "other", seed=1)
    assert Prepared.open(tmp_path / "other").fingerprint != found[0][0]  # other splits


@pytest.mark.parametrize(
    ("name", "labels", "kept", "repaired", "rejected", "dropped", "positives"),
    [
        ("ludb", None, 140, 140, 0, 60, {"NORM": 7, "MI": 22, "AFIB": 14, "LVH": 89, "1AVB": 10, "3AVB": 5}),
        ("ptbxl", None, 50, 0, 0, 11, {"NORM": 31, "MI": 10, "STTC": 10, "CD": 9, "HYP": 8}),
        ("cpsc2018", None, 100, 0, 0, 0, {"NORM": 14, "AFIB": 15, "RBBB": 22, "STE": 10}),
        ("cpsc2018", "ptbxl-super", 100, 0, 0, 0, {"NORM": 14, "STTC": 23, "CD": 32}),
        ("cinc2021", None, 87, 0, 1, 0, {"AFIB": 5, "PAC": 16, "STACH": 21}),
        ("cinc2021", "ptbxl-super", 87, 0, 1, 0, {"NORM": 18, "MI": 18, "HYP": 9}),
    ],
)
def test_recorded_ecgs(
    shared_data: Path,
    tmp_path: Path,
    name: str,
    labels: str | None,
    kept: int,
    repaired: int,
    rejected: int,
    dropped: int,
    positives: dict[str, int],
) -> None:
    summary = prepare(name, source=shared_data / name, out=tmp_path / "out", labels=labels)
    counts = (summary.n_kept, summary.n_repaired, summary.n_rejected, summary.n_dropped)
    assert counts == (kept, repaired, rejected, dropped)
    assert {label: summary.positives[label] for label in positives} == positives
    prepared = Prepared.open(tmp_path / "out")
    patients = [{prepared.patient_ids[index] for index in prepared.indices(split)} for split in SPLITS]
    assert all(patients) and not patients[0] & patients[1] and not (patients[0] | patients[1]) & patients[2]
    for index in range(len(prepared)):
        record = prepared.record(index)
        assert 0.2 < np.ptp(record.signal_mV, axis=1).max() < 30 and record.duration_s >= 5


def test_generated_data_needs_no_source(tmp_path: Path) -> None:
    counts = {"train": 6, "val": 2, "test": 3}
    summary = prepare("synthetic", source=None, out=tmp_path / "a", counts=counts, labels="ptbxl-super")
    assert summary.splits == counts and set(summary.positives) == {"NORM", "MI", "STTC", "CD", "HYP"}
    prepare("synthetic", source=tmp_path, out=tmp_path / "b", counts=counts, labels="ptbxl-super")
    prepare("synthetic", source=None, out=tmp_path / "c", counts=counts, labels="ptbxl-super", seed=1)
    prints = [Prepared.open(tmp_path / name).fingerprint for name in "abc"]
    assert prints[0] == prints[1] != prints[2]


def test_strict_fails_on_a_rejected_record_and_not_on_a_dropped_one(tmp_path: Path) -> None:
    write_ptbxl(tmp_path / "ptbxl")
    prepare("ptbxl", source=tmp_path / "ptbxl", out=tmp_path / "out", strict=True)
    write_cpsc(tmp_path / "cpsc", broken=1)
    with pytest.raises(EvlecgError, match=r"1 of 4 records were rejected .*flat leads \(1\)"):
        prepare("cpsc2018", source=tmp_path / "cpsc", out=tmp_path / "out2", strict=True)
    assert names(tmp_path) == ["cpsc", "out", "ptbxl"]


def test_bad_input_leaves_nothing(tmp_path: Path) -> None:
    cpsc, empty, out = tmp_path / "cpsc", tmp_path / "empty", tmp_path / "out"
    write_cpsc(cpsc)
    write_cpsc(tmp_path / "bad", n=0, broken=2)
    empty.mkdir()
    before = names(tmp_path)
    for message, arguments in (
        ("unknown dataset 'ptbx' -> did you mean 'ptbxl'", {"dataset": "ptbx"}),
        ("unknown label set 'cpsc'", {"labels": "cpsc"}),
        ("20 Hz are too few", {"fs": 20}),
        ("0 workers cannot read", {"workers": 0}),
        ("table of labels does not exist", {"table": tmp_path / "missing.csv"}),
        ("folder of the signals of mimic does not exist", {"signals": {"mimic": tmp_path / "missing"}}),
        ("no such folder", {"exclude": (tmp_path / "missing",)}),
        ("needs its download .*wget", {"source": None}),
        ("source folder does not exist .*missing.*wget", {"source": tmp_path / "missing"}),
        ("source folder is empty", {"source": empty}),
        ("no LUDB 1.0.1 in this folder .*ludb.csv", {"dataset": "ludb"}),
        (r"no record could be used .*flat leads \(2\)", {"source": tmp_path / "bad"}),
        ("source lies inside the output", {"out": tmp_path}),
        ("dataset is empty", {"dataset": "synthetic", "counts": {"train": 0, "test": 0}}),
        ("unknown split 'dev'", {"dataset": "synthetic", "counts": {"dev": 3}}),
    ):
        given = {"dataset": "cpsc2018", "source": cpsc, "out": out, **arguments}
        with pytest.raises(EvlecgError, match=message):
            prepare(**given)
        assert names(tmp_path) == before, message
    prepare("cpsc2018", source=cpsc, out=out)
    with pytest.raises(EvlecgError, match="prepared from something else: seed differ"):
        prepare("cpsc2018", source=cpsc, out=out, seed=1)
    prepare("cpsc2018", source=cpsc, out=out, overwrite=True)
    with pytest.raises(EvlecgError, match="no record could be used"):
        prepare("cpsc2018", source=tmp_path / "bad", out=out, overwrite=True)
    assert len(Prepared.open(out)) == 3


def test_records_without_any_wanted_label_are_dropped(tmp_path: Path) -> None:
    write_ptbxl(tmp_path / "ptbxl")
    summary = prepare("ptbxl", source=tmp_path / "ptbxl", out=tmp_path / "out", labels="ptbxl-rhythm")
    assert (summary.positives["SR"], summary.positives["AFIB"]) == (2, 1)
    reason = {row["id"]: row["reason"] for row in Prepared.open(tmp_path / "out").quarantine()}
    assert reason["00002"] == "no rhythm statement"


class Listener(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def info(self, message: str) -> None:
        self.said.append(message)


def test_progress_is_told(tmp_path: Path) -> None:
    listener = Listener()
    write_cpsc(tmp_path / "cpsc", broken=1)
    prepare("cpsc2018", source=tmp_path / "cpsc", out=tmp_path / "out", progress=listener)
    assert listener.said == ["preparing CPSC 2018: 4 records"]


def test_twice_is_a_no_op_that_says_so(tmp_path: Path) -> None:
    write_cpsc(tmp_path / "cpsc", 4, broken=1)
    first = prepare("cpsc2018", source=tmp_path / "cpsc", out=tmp_path / "out")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    listener = Listener()
    again = prepare("cpsc2018", source=tmp_path / "cpsc", out=tmp_path / "out", progress=listener)
    assert again == dataclasses.replace(first, unchanged=True) and not first.unchanged
    assert len(listener.said) == 1 and "up to date" in listener.said[0]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == stamps
    write_cpsc(tmp_path / "cpsc", 5)  # the download grew
    with pytest.raises(EvlecgError, match="prepared from something else: source differ"):
        prepare("cpsc2018", source=tmp_path / "cpsc", out=tmp_path / "out")


COUNTS = {"train": 700, "val": 20, "test": 30}  # three shards


def content(folder: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}
    manifest = json.loads(files["manifest.json"])
    files["manifest.json"] = json.dumps({**manifest, "created": ""}).encode()
    return files


def generated(out: Path, **options: Any) -> PrepareSummary:
    return prepare("synthetic", source=None, out=out, counts=COUNTS, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    generated(out, workers=1)
    return content(out)


def test_workers_do_not_change_the_result(tmp_path: Path, whole: dict[str, bytes]) -> None:
    generated(tmp_path / "out", workers=2)
    assert content(tmp_path / "out") == whole
    assert len([name for name in whole if name.startswith("blocks")]) == 3


def test_an_interrupted_job_goes_on(tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    real = synthetic.numbered

    def interrupted(seed: int, split: str, number: int) -> Record:
        made.append(f"{split}{number}")
        if len(made) == 600:
            raise KeyboardInterrupt
        return real(seed, split, number)

    monkeypatch.setattr(synthetic, "numbered", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generated(tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
    listener = Listener()
    generated(tmp_path / "out", workers=1, progress=listener)
    assert len(made) == 600 + 750 - 512  # the two complete shards were not made again
    assert listener.said[-1] == "went on after an interruption: 2 of 3 shards were complete"
    assert content(tmp_path / "out") == whole and names(tmp_path) == ["out"]


def test_work_with_other_options_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("evlecg.prepare.assemble", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            generated(tmp_path / "out", workers=1)
    counts = {"train": 5}
    summary = prepare("synthetic", source=None, out=tmp_path / "out", counts=counts, seed=3)
    assert summary.n_kept == 5
    prepare("synthetic", source=None, out=tmp_path / "other", counts=counts, seed=3)
    assert content(tmp_path / "out") == content(tmp_path / "other")


def _interrupt(*arguments: Any, **options: Any) -> Any:
    raise KeyboardInterrupt


def test_a_killed_job_goes_on(tmp_path: Path, whole: dict[str, bytes]) -> None:
    counts = [f"--{split}={count}" for split, count in COUNTS.items()]
    command = [sys.executable, "-m", "evlecg.cli", "prepare", "--dataset", "synthetic", "--out", str(tmp_path / "out")]
    job = subprocess.Popen([*command, *counts, "--workers", "2"], start_new_session=True)
    parts = tmp_path / ".out.partial" / "parts"
    while not list(parts.glob("*.jsonl")) and job.poll() is None:
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL and not (tmp_path / "out").exists()
    subprocess.run([*command, *counts, "--workers", "1"], check=True, capture_output=True)
    assert content(tmp_path / "out") == whole


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_the_main_process(tmp_path: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-m", "evlecg.cli", "prepare", "--dataset", "synthetic", "--out", str(tmp_path / "out")]
    job = subprocess.Popen([*command, "--train", "100000", "--workers", "2"], start_new_session=True)
    parts = tmp_path / ".out.partial" / "parts"
    while not list(parts.glob("*.blocks")) and job.poll() is None:  # until workers work
        time.sleep(0.01)
    os.kill(job.pid, how)  # it alone
    assert job.wait() == -how
    try:
        for _ in range(300):
            os.killpg(job.pid, 0)
            time.sleep(0.05)
        os.killpg(job.pid, signal.SIGKILL)
        raise AssertionError("workers go on")
    except ProcessLookupError:  # nobody is left
        pass


def test_processes_of_a_launcher_share_the_work(tmp_path: Path, whole: dict[str, bytes]) -> None:
    counts = [f"--{split}={count}" for split, count in COUNTS.items()]
    command = [sys.executable, "-m", "evlecg.cli", "prepare", "--dataset", "synthetic", "--out", str(tmp_path / "out")]
    jobs = [
        subprocess.Popen(
            [*command, *counts, "--json", "--workers", "1"],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    said = [job.communicate(timeout=120)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert content(tmp_path / "out") == whole
    assert json.loads(said[0])["n_kept"] == 750 and not said[1]  # one process speaks


def test_shards_of_processes_that_never_come_are_read_by_the_first(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evlecg.prepare.PATIENCE_S", 0.3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    listener = Listener()
    generated(tmp_path / "out", workers=1, progress=listener)
    assert content(tmp_path / "out") == whole
    assert any("reading their shards here" in said for said in listener.said)


def test_a_folder_is_replaced_by_all_processes_of_a_launcher(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    generated(tmp_path / "out", workers=1)
    counts = [f"--{split}={count}" for split, count in COUNTS.items()]
    command = [sys.executable, "-m", "evlecg.cli", "prepare", "--dataset", "synthetic", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2"}  # it comes first, and finds the old folder
    helper = subprocess.Popen([*command, *counts, "--overwrite", "--workers", "1"], env=environment)
    time.sleep(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = Listener()
    generated(tmp_path / "out", workers=1, overwrite=True, progress=said)
    assert helper.wait(timeout=60) == 0 and content(tmp_path / "out") == whole
    assert not any("reading their shards" in line for line in said.said)


def test_two_jobs_do_not_write_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def meanwhile(*arguments: Any, **options: Any) -> Any:
        with pytest.raises(EvlecgError, match="another process is writing this folder"):
            generated(tmp_path / "out")
        raise KeyboardInterrupt

    monkeypatch.setattr("evlecg.prepare.assemble", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        prepare("synthetic", source=None, out=tmp_path / "out", counts={"train": 3})


def test_another_rate_is_resampled(tmp_path: Path) -> None:
    write_cpsc(tmp_path / "cpsc")
    write_ptbxl(tmp_path / "ptbxl")
    summary = prepare("cpsc2018", source=tmp_path / "cpsc", out=tmp_path / "out", fs=250)
    record = Prepared.open(tmp_path / "out").record(0)
    assert (record.fs_hz, record.signal_mV.shape, summary.repairs) == (250.0, (12, 2500), {"resampled": 3})
    summary = prepare("ptbxl", source=tmp_path / "ptbxl", out=tmp_path / "out100", fs=100)
    assert summary.repairs == {}  # published at that rate


def test_signals_of_another_folder_are_left_out(tmp_path: Path) -> None:
    write_cpsc(tmp_path / "cpsc", 5)
    write_cpsc(tmp_path / "few", 2)
    prepare("cpsc2018", source=tmp_path / "few", out=tmp_path / "first")
    for number in range(5):
        for suffix in (".hea", ".mat"):
            path = tmp_path / "cpsc" / f"A{number:04d}{suffix}"
            path.write_bytes(path.read_bytes().replace(b"A000", b"A900"))
            path.rename(tmp_path / "cpsc" / f"A900{number}{suffix}")
    summary = prepare("cpsc2018", source=tmp_path / "cpsc", out=tmp_path / "out", exclude=[tmp_path / "first"])
    assert (summary.n_kept, summary.n_dropped) == (3, 2)
    reasons = [row["reason"] for row in Prepared.open(tmp_path / "out").quarantine()]
    assert reasons == [f"duplicate: the same signal as cpsc2018/A000{number}" for number in range(2)]


def test_a_signal_is_recognised_at_another_rate(tmp_path: Path) -> None:
    write_cpsc(tmp_path / "cpsc", 3)
    prepare("cpsc2018", source=tmp_path / "cpsc", out=tmp_path / "slow", fs=250)
    for fs, first in ((None, "slow"), (200, "slow"), (250, "slow")):
        with pytest.raises(EvlecgError, match=r"no record could be used .*duplicate \(3\)"):
            prepare("cpsc2018", source=tmp_path / "cpsc", out=tmp_path / "out", fs=fs, exclude=[tmp_path / first])


@pytest.mark.parametrize(
    ("name", "folder", "copies"),
    [
        ("ptbxl", "ptbxl", {"HR00001": "00001", "HR00002": "00002", "HR00005": "00005", "HR00007": "00007"}),
        ("ptb", "other", {"S0001": "s0010_re"}),  # 2000 steps a mV there, 1000 in the challenge
    ],
)
def test_recorded_copies_in_the_challenge_are_recognised(
    shared_data: Path, tmp_path: Path, name: str, folder: str, copies: dict[str, str]
) -> None:
    prepare(name, source=shared_data / folder, out=tmp_path / "first")
    prepare("cinc2021", source=shared_data / "cinc2021", out=tmp_path / "out", exclude=[tmp_path / "first"])
    reason = {row["id"]: row["reason"] for row in Prepared.open(tmp_path / "out").quarantine()}
    found = {record: said for record, said in reason.items() if said.startswith("duplicate")}
    assert found == {copy: f"duplicate: the same signal as {name}/{own}" for copy, own in copies.items()}


def test_a_full_disk_keeps_what_is_done(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        real, calls = os.fsync, []

        def full(number: int) -> None:
            calls.append(number)
            if len(calls) == 4:  # the second shard's lines
                raise OSError(errno.ENOSPC, "No space left on device")
            real(number)

        patch.setattr(os, "fsync", full)
        with pytest.raises(RunFailed, match=r"No space left on device .*same command goes on"):
            generated(tmp_path / "out", workers=1)
    listener = Listener()
    generated(tmp_path / "out", workers=1, progress=listener)
    assert "1 of 3 shards were complete" in listener.said[-1] and content(tmp_path / "out") == whole


def test_datasets_are_found_by_name_and_by_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_ptbxl(second / "ptbxl")
    write_cpsc(tmp_path / "anything" / "g1")
    roots = [first, second]
    assert find_dataset("ptbxl", [first]) is None and find_dataset("nothing", roots) is None
    found = find_dataset("ptbxl", roots)
    assert found is not None and not found.prepared
    assert (found.path, found.dataset, found.prepare_to) == (second / "ptbxl", "ptbxl", second / "ptbxl-prepared")
    assert found.prepare_to is not None
    prepare("ptbxl", source=found.path, out=found.prepare_to)
    found = find_dataset("ptbxl", roots)
    assert found is not None and found.prepared and found.path == second / "ptbxl-prepared"
    assert find_dataset(str(second / "ptbxl-prepared"), []) == found
    folder = find_dataset(str(tmp_path / "anything"), roots)
    assert folder is not None and (folder.dataset, folder.prepared) == ("cpsc2018", False)
    monkeypatch.chdir(tmp_path)
    here = find_dataset("anything", roots)
    assert here is not None and here.path == tmp_path / "anything"
    assert looks_raw("ptbxl", second / "ptbxl") and not looks_raw("ludb", second / "ptbxl")
    assert not looks_raw("synthetic", second) and not looks_raw("nothing", second)
    assert not looks_raw("ptbxl", tmp_path / "missing")
