"""Evaluation while training: on validation records, as `evlecg eval` scores them, without a trace in the weights."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from evlecg.data.store import Prepared
from evlecg.distill import distill
from evlecg.errors import EvlecgError
from evlecg.evaluate import evaluate
from evlecg.training.validate import Found, Validation, validation_samples
from tests.test_checkpoint import alone, same
from tests.test_distill import rows, weights

EVERY_2 = ("evaluate.every=2", "checkpoint.every=100", "lora.rank=2")  # six steps, with dropout


def scripted(monkeypatch, *aucs):
    """Validation AUCs of the evaluations to come."""
    left = list(aucs)
    monkeypatch.setattr(Validation, "__call__", lambda self, progress, **named: Found(left.pop(0), {}, 8))


def made(run):
    return json.loads((run / "run.json").read_text())


@pytest.fixture(scope="module")
def evaluated(checkpoints, synthetic, tmp_path_factory):
    """A run of six steps, evaluated after every second one, that keeps the last student."""
    run = tmp_path_factory.mktemp("evaluated") / "run"
    distill(alone(checkpoints, *EVERY_2, "evaluate.keep=last"), data=synthetic, out=run)
    return run


def test_a_run_is_scored_as_eval_scores(synthetic, evaluated, tmp_path):
    told = [row for row in rows(evaluated) if "val_auc" in row]
    assert [row["step"] for row in told] == [2, 4, 6] and all(row["val_records"] == 8 for row in told)
    report = evaluate(str(evaluated), data=synthetic, out=tmp_path / "report", split="val", n_boot=2)
    assert told[-1]["val_auc"] == report.macro.value
    assert told[-1]["val_labels"] == {name: label.value for name, label in report.label_aucs.items()}


def test_evaluation_leaves_no_trace_in_the_weights(checkpoints, synthetic, evaluated, tmp_path):
    distill(alone(checkpoints, "checkpoint.every=100", "lora.rank=2"), data=synthetic, out=tmp_path / "run")
    assert same(evaluated, tmp_path / "run")
    assert made(tmp_path / "run")["student"] == {"step": 6, "why": "the last step"}


def test_the_best_student_is_saved_and_said(checkpoints, synthetic, evaluated, tmp_path, monkeypatch):
    scripted(monkeypatch, 0.6, 0.9, 0.9)  # as good is not better
    run = tmp_path / "run"
    result = distill(alone(checkpoints, *EVERY_2), data=synthetic, out=run)
    best = {"best_step": 4, "best_auc": 0.9}
    assert made(run)["student"] == {"step": 4, "why": "best macro AUC on validation records", **best} == result.student
    assert made(run)["steps"] == 6 and not same(run, evaluated)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    trained = load_file(run / "checkpoints" / "step-00000004" / "trained.safetensors")
    projector = "model.connector.modality_projection"  # trained fully beside the adapters
    (stored,) = [value for name, value in trained.items() if "modality_projection" in name and "lora" not in name]
    assert torch.equal(weights(run)[f"{projector}.proj.weight"], stored)


def test_a_run_stops_where_nothing_gets_better(checkpoints, synthetic, tmp_path, monkeypatch):
    scripted(monkeypatch, 0.8, 0.7, 0.75, 0.9)
    chosen = alone(checkpoints, "evaluate.every=1", "evaluate.patience=2")
    distill(chosen, data=synthetic, out=tmp_path / "run")
    told = made(tmp_path / "run")
    assert told["steps"] == 3 and told["student"]["step"] == 1
    assert told["student"]["why"] == (
        "best macro AUC on validation records; stopped after 2 evaluations without a better one"
    )
    distill(chosen, data=synthetic, out=tmp_path / "run", resume=True)  # and is not gone on with
    assert made(tmp_path / "run")["steps"] == 3


def test_a_best_student_that_is_damaged_is_not_saved_silently(checkpoints, synthetic, tmp_path, monkeypatch):
    from evlecg.training import checkpoint

    scripted(monkeypatch, 0.9, 0.8, 0.7)
    whole = checkpoint.load_best

    def damaged(job, state, out, progress):
        (out / "checkpoints" / "step-00000001" / "model.safetensors").write_bytes(b"")
        return whole(job, state, out, progress)

    monkeypatch.setattr(checkpoint, "load_best", damaged)
    distill(alone(checkpoints, "evaluate.every=1", "train.epochs=1"), data=synthetic, out=tmp_path / "run")
    assert made(tmp_path / "run")["student"] == {
        "step": 3, "why": "the last step", "best_step": 1, "best_auc": 0.9
    }  # fmt: skip


def test_only_validation_records_are_scored(checkpoints, synthetic):
    prepared = Prepared.open(synthetic)
    val = [prepared.record_ids[index] for index in prepared.indices("val")]
    chosen = alone(checkpoints, "evaluate.every=1")
    assert [sample.record_id for sample in validation_samples(chosen, prepared, ("NORM", "MI"))] == val
    chosen = alone(checkpoints, "evaluate.every=1", "evaluate.max_records=5")
    assert [sample.record_id for sample in validation_samples(chosen, prepared, ("NORM", "MI"))] == val[:5]
    assert validation_samples(alone(checkpoints), prepared, ("NORM", "MI")) == []


def test_records_of_which_no_auc_can_be_formed_are_an_error_before_weights(
    checkpoints, synthetic, tmp_path, monkeypatch
):
    monkeypatch.setattr("evlecg.models.load.load", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(EvlecgError, match="no AUC can be formed of the 1 validation records"):
        distill(alone(checkpoints, "evaluate.every=1", "evaluate.max_records=1"), data=synthetic, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_processes_share_the_records_evenly_and_leave_none_out():
    from types import SimpleNamespace

    shares = []
    for process in range(3):
        accelerator = SimpleNamespace(num_processes=3, process_index=process)
        shares.append(Validation(None, list(range(7)), 2, accelerator)._share())
    assert [len(share) for share in shares] == [3, 3, 3]
    assert set().union(*shares) == set(range(7))
