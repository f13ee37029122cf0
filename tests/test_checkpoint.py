"""A run that is killed, or whose disk fails, goes on from its newest whole checkpoint to the same bits."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from evlecg.distill import distill
from evlecg.errors import EvlecgError, RunFailed
from evlecg.progress import Progress
from evlecg.recipe import Recipe
from evlecg.teacher import LiveTeacher
from evlecg.training import checkpoint
from evlecg.training.step import Position
from tests.test_distill import recipe, rows, weights


class Heard(Progress):
    """Keeps what it is told."""

    def __init__(self):
        self.warnings = []

    def warn(self, message):
        self.warnings.append(message)


def same(run, other):
    found, expected = weights(run), weights(other)
    return all(torch.equal(found[name], expected[name]) for name in expected)


def alone(checkpoints, *sets):
    """A recipe without a teacher: three steps an epoch."""
    return recipe(checkpoints, "checkpoint.every=1", "log.figures=false", *sets, teacher="none")


@pytest.fixture(scope="module")
def whole(checkpoints, synthetic, tmp_path_factory):
    """An uninterrupted run of three steps, with a checkpoint of each."""
    run = tmp_path_factory.mktemp("whole") / "run"
    distill(alone(checkpoints, "train.epochs=1", "checkpoint.keep_last=3"), data=synthetic, out=run)
    return run


def test_sigkill_at_random_moments_changes_no_bit(tmp_path):
    told = tmp_path / "told.json"
    command = [sys.executable, "-m", "tests.bench.kill", "--kills", "3", "--seed", "1", "--json", str(told)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(told.read_text())
    assert found["same"] and found["steps"] == 16
    assert len(found["kills"]) == 3 and all(1 <= kill["step"] <= 16 for kill in found["kills"])


def truncated(folder):
    file = folder / "optimizer.bin"
    os.truncate(file, file.stat().st_size // 2)


def flipped(folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncated, "optimizer.bin holds"),
        (flipped, "model.safetensors was changed"),
        (lambda folder: (folder / "random_states_0.pkl").unlink(), "random_states_0.pkl is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "no readable manifest"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": 1, "fi'), "no readable manifest"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": 9}'), "format 9"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(whole, tmp_path, damage, said):
    run = shutil.copytree(whole, tmp_path / "run")
    damage(run / "checkpoints" / "step-00000003")
    heard = Heard()
    assert checkpoint.newest(run, heard) == run / "checkpoints" / "step-00000002"
    assert len(heard.warnings) == 1 and said in heard.warnings[0] and "step-00000003" in heard.warnings[0]


def test_a_run_goes_on_from_before_the_damage(checkpoints, synthetic, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    truncated(run / "checkpoints" / "step-00000003")
    flipped(run / "checkpoints" / "step-00000002")
    shutil.rmtree(run / "student")
    (run / "checkpoints" / ".step-00000004.partial").mkdir()
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 4, "lo')  # what a killed process was writing
    chosen, heard = alone(checkpoints, "train.epochs=1", "checkpoint.keep_last=3"), Heard()
    distill(chosen, data=synthetic, out=run, resume=True, progress=heard)
    assert len(heard.warnings) == 2 and same(run, whole)
    assert [row["step"] for row in rows(run)] == [1, 2, 3]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step-0000000{n}" for n in (1, 2, 3)]
    assert [checkpoint.newest(run, heard), len(heard.warnings)] == [run / "checkpoints" / "step-00000003", 2]
    made = json.loads((run / "provenance.json").read_text())
    assert [session["from_step"] for session in made["sessions"]] == [0, 1]
    before = json.loads((whole / "run.json").read_text())["last"]  # of the same steps, at another time
    assert json.loads((run / "run.json").read_text())["last"] == {**before, "seconds": rows(run)[-1]["seconds"]}


def test_a_teacher_that_is_remembered_is_remembered_alike(checkpoints, synthetic, tmp_path, monkeypatch):
    """What is remembered of a record depends on its company: here by far more than rounding."""
    live = LiveTeacher.__call__

    def dependent(self, batch):
        outputs = live(self, batch)
        for values in (outputs.hidden_BSD, outputs.visual_BND, outputs.projected_BND):
            values += 0.1 * sum(map(len, batch.sample_ids)) + sum(int(name[-1], 36) for name in batch.sample_ids)
        return outputs

    monkeypatch.setattr(LiveTeacher, "__call__", dependent)
    sets = ("train.remember_teacher=true", "objective.lambda_ot=0.5", "checkpoint.every=1", "checkpoint.keep_last=9")
    chosen = recipe(checkpoints, *sets)
    distill(chosen, data=synthetic, out=tmp_path / "whole")
    run = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for step in (5, 6):
        shutil.rmtree(run / "checkpoints" / f"step-0000000{step}")  # as if killed in the second epoch
    distill(chosen, data=synthetic, out=run, resume=True)
    assert same(run, tmp_path / "whole")


def test_a_full_disk_is_told_and_the_last_good_checkpoint_survives(
    checkpoints, synthetic, whole, tmp_path, monkeypatch
):
    """The system refuses to write more than a few kilobytes into a file, from the second checkpoint on."""
    save, limits = checkpoint.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_full_disk(job, state, out):
        if state.step > 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            save(job, state, out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(checkpoint, "save", save_on_a_full_disk)
    run, chosen = tmp_path / "run", alone(checkpoints, "train.epochs=1", "checkpoint.keep_last=3")
    with pytest.raises(RunFailed, match=r"step 2 cannot be written: .*step-00000001 is whole") as failed:
        distill(chosen, data=synthetic, out=run)
    assert failed.value.exit_code == 1 and "GiB are free" in failed.value.hint
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001"]
    monkeypatch.setattr(checkpoint, "save", save)
    distill(chosen, data=synthetic, out=run, resume=True)
    assert same(run, whole)


@pytest.fixture
def locked():
    """A folder that this process may read and not write to, while it holds."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o555)
        root = os.geteuid() == 0
        if root:  # whom rights do not bind
            os.seteuid(65534)
        try:
            yield Path(place)
        finally:
            if root:
                os.seteuid(0)
            Path(place).chmod(0o755)


def test_a_folder_that_cannot_be_written_to_is_told_before_weights_load(locked, monkeypatch):
    monkeypatch.setattr("evlecg.distill.opened", lambda *a: (None, [], ()))
    monkeypatch.setattr("evlecg.distill.build", lambda *a, **k: pytest.fail("models were built"))
    for out in (locked, locked / "run", locked / "runs" / "run", Path(__file__) / "run"):
        with pytest.raises(EvlecgError, match=r"cannot be written to: (Permission denied|Not a directory)") as refused:
            distill(Recipe(), data=Path("data"), out=out)
        assert refused.value.where == str(out) and refused.value.exit_code == 2


def test_a_run_goes_on_as_it_was_begun(checkpoints, synthetic, whole, tmp_path):
    with pytest.raises(EvlecgError, match=r"begun with train.lr=0.001, not 0.01"):
        distill(alone(checkpoints, "train.epochs=1", "train.lr=0.01"), data=synthetic, out=whole, resume=True)
    job = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=2, is_main_process=True),
        prepared=SimpleNamespace(fingerprint=json.loads((whole / "run.json").read_text())["data"]["fingerprint"]),
        builder=SimpleNamespace(samples=[None] * 24),
    )  # fmt: skip
    run = shutil.copytree(whole, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("accelerate.utils.broadcast_object_list", lambda found: found)
        with pytest.raises(EvlecgError, match="other processes: 1, not 2"):
            checkpoint.restore(job, run, Progress())
        job.accelerator.num_processes, job.prepared.fingerprint = 1, "another"
        with pytest.raises(EvlecgError, match="other data"):
            checkpoint.restore(job, run, Progress())


def test_a_checkpoint_of_another_make_is_told(checkpoints, synthetic, whole, tmp_path, monkeypatch):
    registered = Accelerator.register_for_checkpointing
    monkeypatch.setattr(
        Accelerator, "register_for_checkpointing", lambda self, *parts: registered(self, *parts, *parts)
    )
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "student")
    with pytest.raises(EvlecgError, match="does not fit: Number of custom checkpoints") as told:
        distill(alone(checkpoints, "train.epochs=1", "checkpoint.keep_last=3"), data=synthetic, out=run, resume=True)
    assert "another version" in told.value.hint and (run / "checkpoints" / "step-00000003").is_dir()


def test_a_teacher_that_has_changed_is_found_out(checkpoints, synthetic, tmp_path):
    teacher = shutil.copytree(checkpoints["llava"], tmp_path / "teacher")
    chosen = recipe({**checkpoints, "llava": teacher}, "train.max_steps=1", "log.figures=false")
    distill(chosen, data=synthetic, out=tmp_path / "run")
    made = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert len(made["models"]["teacher"]["weights_sha256"]) == len(made["models"]["student"]["weights_sha256"]) == 64
    assert torch.__version__.startswith(made["sessions"][0]["environment"]["torch"]) and made["data"]["n_train"] == 24
    flipped(teacher)
    with pytest.raises(EvlecgError, match="the teacher is another one"):
        distill(chosen, data=synthetic, out=tmp_path / "run", resume=True)


def test_positions_survive_json():
    state = Position(2, 5, 17, {"ot": 0.1 + 0.2}, 3, 1, 14, 7, 0.123456789012345678, 2)
    assert Position(**json.loads(json.dumps(dataclasses.asdict(state)))) == state
