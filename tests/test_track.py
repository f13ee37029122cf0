"""Trackers follow a run, by name, and never stop it."""

from __future__ import annotations

from pathlib import Path

import pytest

from evlecg.distill import distill
from evlecg.errors import EvlecgError
from evlecg.training.track import check_trackers
from tests.test_checkpoint import Heard, alone
from tests.test_distill import rows


def test_names_are_checked_before_weights_load(checkpoints, synthetic, tmp_path, monkeypatch):
    monkeypatch.setattr("evlecg.models.load.load", lambda *a, **k: pytest.fail("weights were read"))
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    with pytest.raises(EvlecgError, match=r"unknown tracker 'tensorbord'.*did you mean 'tensorboard'"):
        distill(alone(checkpoints, "track=[tensorbord]"), data=synthetic, out=tmp_path / "run")
    with pytest.raises(EvlecgError, match=r"tracker wandb is not installed.*pip install wandb"):
        distill(alone(checkpoints, "track=[wandb]"), data=synthetic, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    check_trackers(())


def read(run):
    """Tag -> [(step, value)], of all event files of a run, those left out that a later file takes back."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = {}
    for folder in {path.parent for path in Path(run / "trackers").rglob("events.*")}:
        events = accumulator.EventAccumulator(str(folder)).Reload()
        for tag in events.Tags()["scalars"]:
            found[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return found


def test_tensorboard_gets_the_rows_and_a_resumed_run_none_twice(checkpoints, synthetic, tmp_path):
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    chosen = alone(checkpoints, "track=[tensorboard]", "evaluate.every=3", "checkpoint.keep_last=9")
    distill(chosen, data=synthetic, out=run)
    seen = read(run)
    losses = [(row["step"], row["loss"]) for row in rows(run) if "loss" in row]
    assert [step for step, _ in seen["loss"]] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in seen["loss"]] == pytest.approx([loss for _, loss in losses])
    assert [step for step, _ in seen["val_auc"]] == [3, 6] and {"lr", "terms/ce", "grad_norm"} <= set(seen)
    for step in (5, 6):
        for file in (run / "checkpoints" / f"step-0000000{step}").iterdir():
            file.unlink()
    distill(chosen, data=synthetic, out=run, resume=True)
    assert read(run)["loss"] == seen["loss"] and read(run)["val_auc"] == seen["val_auc"]


def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(checkpoints, synthetic, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")

    def down(*a, **k):
        raise ConnectionError("the service is down")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.log", down)
    heard = Heard()
    chosen = alone(checkpoints, "track=[tensorboard]", "train.epochs=1")
    assert distill(chosen, data=synthetic, out=tmp_path / "run", progress=heard).steps == 3
    assert [message for message in heard.warnings if "tracking" in message] == [
        "tracking has ended: ConnectionError: the service is down"
    ]
    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.start", down)
    with pytest.raises(EvlecgError, match="a tracker cannot be started: ConnectionError"):
        distill(chosen, data=synthetic, out=tmp_path / "other")
