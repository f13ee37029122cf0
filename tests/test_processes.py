"""Several processes, and several batches a step, against one process that reads the same records in one batch."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.testing import assert_close

from evlecg import launch
from evlecg.distill import distill
from evlecg.errors import EvlecgError
from evlecg.evaluate import evaluate
from evlecg.losses.objective import METHODS, EvlObjective
from evlecg.models import load as models
from evlecg.models.encode import Encoder
from evlecg.progress import Progress
from evlecg.recipe import load_recipe, parse_set
from evlecg.training.processes import accelerator_of, tell_unused

TERMS = ["objective.lambda_m=0.3", "objective.lambda_r=1", "objective.lambda_ot=0.5", "log.gradients_every=2"]
QUESTIONS = ["data.labels=[NORM, MI]", "data.tasks=[yes_no, choose_all, multiple_choice, report]"]
N_TRAIN = 17  # in batches of 8: 8, 8, and one record for two processes


def recipe(checkpoints: dict[str, Path], batch_size: int, *sets: str, method: str = "evl", student: str = "idefics3"):
    chosen = {
        "teacher": str(checkpoints["llava"]), "student": str(checkpoints[student]), "method": method,
        "train.batch_size": batch_size, "train.epochs": 1, "train.lr": 1e-4, "log.every": 1, "log.figures": False,
        "threads": 1, "data.max_train": N_TRAIN, "objective.lambda_rec": 0,
    }  # fmt: skip
    return load_recipe(None, chosen | parse_set([*QUESTIONS, *sets]))


def trained(chosen: Any, data: Path) -> dict[str, Any]:
    """An epoch: every step's gradients as the optimizer gets them, and what is logged."""
    from evlecg.distill import opened
    from evlecg.models.adapt import train_mode
    from evlecg.training.build import build
    from evlecg.training.step import Position, batches_of, grouped, loader, step

    prepared, samples, labels = opened(chosen, data)
    job = build(chosen, prepared, samples, labels, Progress(), force=False)
    train_mode(job.model)
    named = {
        **{f"student.{name}": p for name, p in job.student.model.named_parameters()},
        **{f"objective.{name}": p for name, p in job.objective.named_parameters()},
    }
    found: dict[str, Any] = {"gradients": [], "rows": []}
    take = job.optimizer.step

    def keep() -> None:
        found["gradients"].append({name: p.grad.clone() for name, p in named.items() if p.grad is not None})
        take()

    job.optimizer.step = keep
    state = Position()
    for group in grouped(loader(job, batches_of(job, 0), 0), chosen.train.accumulation):
        told = step(job, group, state, diagnose=True, gradients=state.step % 2 == 0)
        assert told is not None
        state.step += 1
        found["rows"].append({key: told[key] for key in ("loss", "terms", "gradients") if key in told})
    return found


def _in_process(rank: int, processes: int, meeting: str, out: str, work: Any, arguments: tuple[Any, ...]) -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for kind in (AcceleratorState, GradientState, PartialState):
        kind._reset_state()  # what the parent has seen
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "ACCELERATE_USE_CPU": "true", "ACCELERATE_DEBUG_RDV_FILE": meeting, "FORK_LAUNCHED": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
    }  # fmt: skip
    torch.set_num_threads(1)
    found = work(*arguments)
    if rank == 0:
        torch.save(found, out)
    torch.distributed.destroy_process_group()


def on_processes(work: Any, *arguments: Any, processes: int = 2) -> Any:
    """What `work` returns on the main one of some processes that share a gloo group."""
    with tempfile.TemporaryDirectory() as folder:
        meeting, out = str(Path(folder) / "meeting"), str(Path(folder) / "out.pt")
        context = multiprocessing.get_context("fork")
        started = [
            context.Process(target=_in_process, args=(rank, processes, meeting, out, work, arguments))
            for rank in range(processes)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(300)
            process.kill()
        assert [process.exitcode for process in started] == [0] * processes
        return torch.load(out, weights_only=False)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert len(found["rows"]) == len(expected["rows"])
    for mine, theirs in zip(found["rows"], expected["rows"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["terms"] == pytest.approx(theirs["terms"], abs=1e-4)
    # AdamW makes whole steps of the rounding in gradients near zero, so that later ones start from other weights
    first, wanted = found["gradients"][0], expected["gradients"][0]
    assert found["rows"][0]["terms"] == pytest.approx(expected["rows"][0]["terms"], abs=1e-6)
    assert set(first) == set(wanted)
    for name, gradient in wanted.items():
        assert_close(first[name], gradient, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def pair(checkpoints, synthetic):
    """Method -> job on one process that is trained with it. The models are the same ones."""
    from evlecg.distill import opened
    from evlecg.models.vocabulary import token_bytes
    from evlecg.teacher import LiveTeacher
    from evlecg.training.build import build

    chosen = recipe(checkpoints, 6, *TERMS, "train.clip=0", "objective.baseline.top_k=8")
    prepared, samples, labels = opened(chosen, synthetic)
    job = build(chosen, prepared, samples, labels, Progress(), force=False)
    sides = ((job.student, job.builder.student), (job.teacher, job.builder.teacher))
    facts = [dataclasses.replace(model.facts, tokens=token_bytes(model, encoder)) for model, encoder in sides]

    def made(method: str) -> tuple[Any, Any]:
        torch.manual_seed(0)
        objective = METHODS[method](chosen.objective, student=facts[0], teacher=facts[1])
        signal = LiveTeacher(job.teacher, visual_layer=-1, attention="attention" in objective.needs)
        return dataclasses.replace(job, objective=objective, needs=objective.needs, signal=signal), job.builder

    return made


def gradients_of(job: Any, group: list[Any], *, even: bool = False) -> dict[str, torch.Tensor]:
    """Gradients of one step over a group of batches, which is not taken; `even`: each batch weighs the same."""
    from evlecg.training import step as training

    found: dict[str, torch.Tensor] = {}
    job.objective.zero_grad()
    named = [*job.student.model.named_parameters(), *job.objective.named_parameters()]
    job.optimizer.step = lambda: found.update({name: p.grad.clone() for name, p in named if p.grad is not None})
    if even:
        names = training.step_shares(job, group).first
        share = dict.fromkeys(names, torch.tensor(1 / len(group)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "step_shares", lambda *_: training.Shares([share] * len(group), share))
            assert training.step(job, group, training.Position(), diagnose=False, gradients=False) is not None
    else:
        assert training.step(job, group, training.Position(), diagnose=False, gradients=False) is not None
    return found


def test_two_processes_are_one_with_the_same_global_batch(checkpoints, synthetic):
    expected = trained(recipe(checkpoints, 8, *TERMS), synthetic)
    found = on_processes(trained, recipe(checkpoints, 4, *TERMS), synthetic)
    assert len(found["rows"]) == 3
    assert_same(found, expected)
    for place, rel in ((0, 1e-5), (2, 1e-3)):
        assert found["rows"][place]["gradients"] == pytest.approx(expected["rows"][place]["gradients"], rel=rel)


RECORDS = ["objective.lambda_rec=2", "train.bucket=1", "log.gradients_every=0"]
TWICE = "objective.relation.cells=lead_time"  # the page shows lead II twice


@pytest.mark.parametrize(
    ("processes", "batch_size", "accumulation", "sets"),
    [(1, 2, 4, []), (1, 1, 8, [TWICE]), (2, 4, 1, []), (2, 2, 2, TERMS[:3])],
)
def test_records_are_related_across_the_parts_of_a_step(
    checkpoints, synthetic, processes, batch_size, accumulation, sets
):
    """8 records a step in one batch, and in parts: a process with nothing in the last step among them."""
    whole = trained(recipe(checkpoints, 8, *RECORDS, *sets), synthetic)
    chosen = recipe(checkpoints, batch_size, *RECORDS, *sets, f"train.accumulation={accumulation}")
    parts = trained(chosen, synthetic) if processes == 1 else on_processes(trained, chosen, synthetic)
    assert whole["rows"][0]["terms"]["rec_answer"] > 0 and len(whole["rows"]) == 3
    assert_same(parts, whole)


def test_two_records_by_themselves_pull_elsewhere(checkpoints, synthetic):
    whole = trained(recipe(checkpoints, 8, *RECORDS), synthetic)["gradients"][0]
    alone = [*RECORDS, "train.accumulation=4", "objective.records.least=0"]
    other = trained(recipe(checkpoints, 2, *alone), synthetic)["gradients"][0]
    assert max(float((whole[name] - other[name]).abs().max()) for name in whole) > 1e-3


def test_both_passes_draw_the_same_dropout(checkpoints, synthetic, monkeypatch):
    halves, read = [], EvlObjective._record_half

    def noted(self, outputs, batch):
        found = read(self, outputs, batch)
        if outputs.side is batch.student:
            halves.append(found[0].detach())
        return found

    monkeypatch.setattr(EvlObjective, "_record_half", noted)
    sets = [*RECORDS, "train.accumulation=2", "lora.rank=2", "lora.dropout=0.5", "train.lr=0.1"]
    trained(recipe(checkpoints, 2, *sets), synthetic)
    first, second, again, once_more = halves[4:8]  # of the second step: at first adapters add nothing
    assert torch.equal(first, again) and torch.equal(second, once_more)
    monkeypatch.setattr("evlecg.training.step._draw_again", lambda *_: None)
    halves.clear()
    trained(recipe(checkpoints, 2, *sets), synthetic)
    assert not torch.equal(halves[4], halves[6]), "there is dropout"


def test_one_record_a_step_has_nobody_to_be_related_to(checkpoints, synthetic):
    with pytest.raises(EvlecgError, match="relations among records need several") as told:
        trained(recipe(checkpoints, 1, "objective.lambda_rec=1"), synthetic)
    assert "train.accumulation=16" in told.value.hint
    with pytest.raises(EvlecgError, match="every distillation term weighs nothing"):
        trained(recipe(checkpoints, 4, "objective.lambda_rec=0"), synthetic)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("seqkd", "rkd", "dskd")])
def test_parts_of_a_step_weigh_as_their_elements_do(pair, method):
    """One batch of six records, and the same records as a batch of five and one of one."""
    job, builder = pair(method)
    whole, parts = builder(range(6)), [builder(range(5)), builder([5])]
    expected, found = gradients_of(job, [whole]), gradients_of(job, parts)
    assert set(found) == set(expected) and expected
    for name, gradient in expected.items():
        assert_close(found[name], gradient, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    plain = gradients_of(job, parts, even=True)
    gap = max(float((plain[name] - expected[name]).abs().max()) for name in expected)
    assert gap > 1e-3, "the mean of the parts' means is something else"


def test_a_batch_that_is_not_counted_moves_nothing(pair):
    job, builder = pair("evl")
    filler = builder([])
    assert not filler.counted and len(filler.sample_ids) == 1
    expected, found = gradients_of(job, [builder([1, 2])]), gradients_of(job, [builder([1, 2]), filler])
    for name, gradient in expected.items():
        assert_close(found[name], gradient, atol=1e-7, rtol=1e-6)


def take_shards() -> None:
    """accelerate reads FSDP's config on GPUs only; what it calls runs on CPUs all the same."""
    from accelerate import Accelerator, PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin

    state = Accelerator(cpu=True).state
    for kept in (state, PartialState()):  # every new accelerator copies the one into the other
        kept.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True,
        state_dict_type="SHARDED_STATE_DICT", cpu_ram_efficient_loading=False,
    )  # fmt: skip


def sharded(chosen: Any, data: Path, out: Path) -> dict[str, Any]:
    """Trains in shards, then once more from a checkpoint in between; says how much of the weights was here."""
    from evlecg import distill as jobs

    take_shards()
    here: dict[str, float] = {}
    look = jobs.keep_spectra

    def note(job: Any, folder: Path, when: str) -> None:
        if when == "before":  # later, what the head reads stays whole between passes
            for role, model in (("student", job.student.model), ("teacher", job.teacher.model)):
                whole = sum(p.numel() for p in model.parameters())
                here[role] = sum(p.to_local().numel() for p in model.parameters()) / whole
        look(job, folder, when)

    jobs.keep_spectra = note
    jobs.distill(chosen, data=data, out=out)
    weights = load_file(out / "student" / "model.safetensors") if launch.rank() == 0 else {}
    torch.distributed.barrier()
    if launch.rank() == 0:
        for folder in (out / "checkpoints").iterdir():
            if folder.name > "step-00000001":
                shutil.rmtree(folder)
        shutil.rmtree(out / "student")
    torch.distributed.barrier()
    jobs.distill(chosen, data=data, out=out, resume=True)
    return {"weights": weights, "here": here}


def test_shards_train_as_whole_models_do_and_are_saved_whole(checkpoints, synthetic, tmp_path):
    sets = (*TERMS[:3], "checkpoint.every=1", "checkpoint.keep_last=9")
    found = on_processes(sharded, recipe(checkpoints, 4, *sets, "log.figures=true"), synthetic, tmp_path / "shards")
    assert found["here"] == {"student": pytest.approx(0.5, abs=0.02), "teacher": pytest.approx(0.5, abs=0.02)}
    distill(recipe(checkpoints, 8, *sets), data=synthetic, out=tmp_path / "whole")
    expected = load_file(tmp_path / "whole" / "student" / "model.safetensors")
    resumed = load_file(tmp_path / "shards" / "student" / "model.safetensors")
    assert set(found["weights"]) == set(resumed) == set(expected)
    for name, value in expected.items():
        assert_close(found["weights"][name], value, atol=2e-5, rtol=0)
        assert torch.equal(resumed[name], found["weights"][name]), name


def scored(model: Path, data: Path, out: Path) -> int:
    evaluate(str(model), data=data, out=out, n_boot=20, batch_size=3, robustness=("noise",))
    return 0


def test_scores_are_gathered_once_each(checkpoints, synthetic, tmp_path):
    on_processes(scored, checkpoints["idefics3"], synthetic, tmp_path / "two")
    scored(checkpoints["idefics3"], synthetic, tmp_path / "one")
    for name in ("predictions.jsonl", "predictions_val.jsonl"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    assert reports[0]["robustness"] == reports[1]["robustness"]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize(("key", "why"), [("lora.rank=4", "merged"), ("objective.balance=gradnorm", "gradient")])
def test_what_shards_cannot_do_is_refused(checkpoints, monkeypatch, key, why):
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True)
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: accelerator)
    with pytest.raises(EvlecgError, match=why):
        accelerator_of(recipe(checkpoints, 4, key))
    accelerator.is_fsdp2 = False
    with pytest.raises(EvlecgError, match="first version"):
        accelerator_of(recipe(checkpoints, 4))


@pytest.mark.parametrize(("student", "unused"), [("llava", True), ("idefics3", False)])
def test_ddp_looks_for_unused_weights_where_there_are_any(checkpoints, synthetic, pair, student, unused):
    """LLaVA's tower ends in a norm for a pooled token, which nobody reads."""
    builder = pair("ce")[1]
    loaded = models.load(models.inspect(str(checkpoints[student])))
    encoder = Encoder(loaded.checkpoint, loaded.processor)
    side = dataclasses.replace(builder, student=encoder, teacher=None)([0]).student
    accelerator = SimpleNamespace(
        num_processes=2, distributed_type=DistributedType.MULTI_CPU, device="cpu", ddp_handler=SimpleNamespace()
    )
    tell_unused(accelerator, loaded, side)
    assert accelerator.ddp_handler.find_unused_parameters is unused


def test_a_launcher_that_accelerate_does_not_follow_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("accelerate.PartialState", lambda **_: SimpleNamespace(num_processes=1))
    with pytest.raises(EvlecgError, match="3 processes were started"):
        launch.join()
