"""What goes wrong in a run is told in one line, and leaves something to go on from."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import multiprocessing
import os
import signal
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from evlecg import cli
from evlecg.distill import distill
from evlecg.errors import EvlecgError, RunFailed, Stopped
from evlecg.losses.objective import CeObjective
from evlecg.losses.terms import weighted
from evlecg.models import load as models
from evlecg.models.batch import BatchBuilder
from evlecg.teacher import LiveTeacher
from evlecg.training.guards import check_teacher, failures_told, stop_requests
from tests.test_checkpoint import Heard, alone, same
from tests.test_distill import recipe, rows, weights


class Disturbing(Heard):
    """Does something once so many steps are done."""

    def __init__(self, after, does):
        super().__init__()
        self.after, self.does, self.done = after, does, 0

    @contextlib.contextmanager
    def task(self, description, total):
        def advance(n=1, **shown):
            if "loss" in shown:
                self.done += n
                if self.done == self.after:
                    self.does()

        yield advance


@pytest.fixture(autouse=True)
def interrupts_are_heard():
    """Shells that start tests in the background have them ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_goes_on(checkpoints, synthetic, tmp_path, number, code):
    sets = ("train.epochs=1", "evaluate.every=2", "evaluate.keep=last")
    stop = Disturbing(2, lambda: os.kill(os.getpid(), number))  # the evaluation after step 2 is given up
    chosen, run = alone(checkpoints, *sets), tmp_path / "run"
    with pytest.raises(Stopped, match="after step 2 of 3, and saved") as stopped:
        distill(chosen, data=synthetic, out=run, progress=stop)
    assert stopped.value.exit_code == code and "--resume" in stopped.value.hint
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    assert (run / "checkpoints" / "step-00000002").is_dir() and not (run / "student").exists()
    assert [row["step"] for row in rows(run)] == [1, 2]
    distill(chosen, data=synthetic, out=run, resume=True)
    assert [(row["step"], "val_auc" in row) for row in rows(run)] == [
        (1, False), (2, False), (2, True), (3, False), (3, True),
    ]  # fmt: skip
    if number == signal.SIGTERM:
        distill(chosen, data=synthetic, out=tmp_path / "whole")
        assert same(run, tmp_path / "whole")


def test_the_second_interrupt_does_not_wait():
    with stop_requests() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_command_line_tells_of_a_stop_in_its_exit_code(monkeypatch, capsys):
    def stopped(*a, **k):
        raise Stopped("stopped by signal 15", where="runs/mine", hint="the same command with --resume goes on")

    monkeypatch.setattr("evlecg.pipeline.run_line", stopped)
    monkeypatch.setattr(sys, "argv", ["evlecg", "distill", "--out", "runs/mine"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 143
    assert capsys.readouterr().err == "stopped by signal 15 [runs/mine] -> the same command with --resume goes on\n"


def broken_at(calls, how):
    """A cross-entropy whose value or gradient is not a number in some of its calls (from 1)."""
    forward, made = CeObjective.forward, []

    def broken(self, student, *arguments, **named):
        terms = forward(self, student, *arguments, **named)
        made.append(1)
        if len(made) not in calls:
            return terms
        if how == "value":
            return weighted({"ce": terms.values["ce"] * float("nan")}, {"ce": 1})
        flat = (0 * student.answer_logits_AV).sum().sqrt()  # the root's slope at 0 is infinite
        assert torch.isfinite(flat)
        return weighted({"ce": terms.values["ce"] + flat}, {"ce": 1})

    return broken


@pytest.mark.parametrize("how", ["value", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(checkpoints, synthetic, tmp_path, monkeypatch, how):
    chosen, run, heard = alone(checkpoints, "train.epochs=1", "train.most_bad=2"), tmp_path / how, Heard()
    monkeypatch.setattr(CeObjective, "forward", broken_at({2}, how))
    distill(chosen, data=synthetic, out=run, progress=heard)
    assert [message for message in heard.warnings if "not finite" in message] == [
        "step 2: the loss or its gradient is not finite; the batch is skipped (1 so far)"
    ]
    made = json.loads((run / "run.json").read_text())
    assert (made["steps"], made["skipped"]) == (3, 1)
    assert all(bool(torch.isfinite(values).all()) for values in weights(run).values())


def test_a_run_whose_loss_stays_broken_ends(checkpoints, synthetic, tmp_path, monkeypatch):
    monkeypatch.setattr(CeObjective, "forward", broken_at({2, 3, 4}, "value"))
    with pytest.raises(RunFailed, match="not finite 3 times running") as failed:
        distill(alone(checkpoints, "train.most_bad=3"), data=synthetic, out=tmp_path / "run")
    assert failed.value.exit_code == 1
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_batch_without_answers_is_an_error_before_the_first_step(checkpoints, synthetic, tmp_path, monkeypatch):
    build = BatchBuilder.__call__

    def masked(self, indices):
        batch = build(self, indices)
        if len(indices) < 8:  # the start-up checks look at single records
            return batch
        none = dataclasses.replace(batch.student, answer_A2=batch.student.answer_A2[:0],
                                   answer_ids_A=batch.student.answer_ids_A[:0])  # fmt: skip
        return dataclasses.replace(batch, student=none)

    monkeypatch.setattr(BatchBuilder, "__call__", masked)
    with pytest.raises(EvlecgError, match="all labels are masked"):
        distill(alone(checkpoints), data=synthetic, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_term_that_changes_next_to_nothing_is_told_once(checkpoints, synthetic, tmp_path):
    sets = ("objective.lambda_ot=1e-6", "log.gradients_every=1", "log.figures=false", "train.max_steps=3")
    heard = Heard()
    distill(recipe(checkpoints, *sets), data=synthetic, out=tmp_path / "run", progress=heard)
    weak = [message for message in heard.warnings if "of the gradient" in message]
    assert len(weak) == 1 and "step 2: the term ot is 0.00% of the gradient" in weak[0]


def test_a_teacher_in_training_mode_is_refused(checkpoints):
    teacher = models.load(models.inspect(str(checkpoints["llava"])))
    live = LiveTeacher(teacher, visual_layer=-1)
    check_teacher(SimpleNamespace(teacher=teacher))
    check_teacher(SimpleNamespace(teacher=None))
    last = next(name for name, module in reversed(list(teacher.model.named_modules())) if "layernorm" in name)
    teacher.model.get_submodule(last).train()
    with pytest.raises(RunFailed, match="in training mode") as refused:
        check_teacher(SimpleNamespace(teacher=teacher))
    assert refused.value.where == last
    teacher.model.eval()
    next(teacher.model.parameters()).requires_grad_(True)
    with pytest.raises(RunFailed, match="would be trained"):
        check_teacher(SimpleNamespace(teacher=teacher))
    teacher.model.train()
    with pytest.raises(RunFailed, match="in training mode"):
        live.of(SimpleNamespace())


def loader_dies(checkpoints, synthetic, out):
    def kill_workers():
        for child in psutil.Process().children():
            if "resource_tracker" not in " ".join(child.cmdline()):
                child.kill()

    chosen = alone(checkpoints, "train.workers=1", "train.batch_size=2", "train.epochs=1")
    with pytest.raises(RunFailed, match="a loader process died") as failed:
        distill(chosen, data=synthetic, out=out, progress=Disturbing(2, kill_workers))
    assert failed.value.exit_code == 1 and "--resume" in failed.value.hint
    assert list((out / "checkpoints").glob("step-*"))


def test_the_death_of_a_loader_process_is_told(checkpoints, synthetic, tmp_path):
    """In a process of its own: torch raises in whatever its parent happens to do."""
    process = multiprocessing.get_context("spawn").Process(target=loader_dies, args=(checkpoints, synthetic, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_an_error_of_a_record_comes_home_from_a_loader_process(checkpoints, synthetic, tmp_path, monkeypatch):
    def broken(self, sample, views, augment):
        if torch.utils.data.get_worker_info() is not None:
            raise EvlecgError("a signal is damaged", where="record 7", hint="prepare it again")
        return draw(self, sample, views, augment)

    draw = BatchBuilder._draw
    monkeypatch.setattr(BatchBuilder, "_draw", broken)
    with pytest.raises(EvlecgError) as failed:
        distill(alone(checkpoints, "train.workers=1"), data=synthetic, out=tmp_path / "run")
    assert str(failed.value) == "a signal is damaged [record 7] -> prepare it again"


@pytest.mark.parametrize(
    ("raised", "what", "hint"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
                      "workers are out of shared memory."), "out of shared memory", "shm-size"),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nunable to allocate shared memory(shm)"),
         "out of shared memory", "train.workers=0"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "died", "out of memory"),
        (ConnectionResetError(104, "Connection reset by peer"), "loader process died", "--resume"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl"), "No space left", "make room"),
        (OSError(errno.EROFS, "Read-only file system", "runs/x"), "Read-only", "--resume"),
    ],
)  # fmt: skip
def test_what_systems_say_becomes_one_line(tmp_path, raised, what, hint):
    with pytest.raises(RunFailed, match=what) as failed, failures_told(tmp_path):
        raise raised
    assert hint in failed.value.hint


def test_mistakes_in_the_program_stay_what_they_are(tmp_path):
    for mistake in (RuntimeError("shape mismatch"), FileNotFoundError(errno.ENOENT, "no"), ValueError()):
        with pytest.raises(type(mistake)), failures_told(tmp_path):
            raise mistake
