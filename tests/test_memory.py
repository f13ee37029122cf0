"""The memory estimate against sums done by hand, the allocator's own record, and published model sizes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from evlecg.distill import distill
from evlecg.errors import EvlecgError
from evlecg.losses.objective import METHODS
from evlecg.models import load as models
from evlecg.models import memory
from evlecg.models.encode import Encoder
from evlecg.recipe import load_recipe, parse_set
from evlecg.training import build
from evlecg.training.estimate import adapt_student, bare_job, step_memory
from evlecg.training.processes import optimizer_of
from evlecg.training.step import Position, step
from tests import real_configs

TERMS = ("objective.lambda_m=0.3", "objective.lambda_r=1", "objective.lambda_ot=0.1", "data.labels=[NORM, MI]")


def recipe(checkpoints, *sets, teacher="llava", student="idefics3"):
    chosen = {"teacher": str(checkpoints[teacher]), "student": str(checkpoints[student]), "train.batch_size": 8,
              "train.max_steps": 1, "threads": 1}  # fmt: skip
    return load_recipe(None, chosen | parse_set([*TERMS, *sets]))


def opened(chosen, synthetic):
    """Checkpoints, a batch of eight and the samples, as `distill` makes them."""
    from evlecg.models.batch import BatchBuilder
    from evlecg.page.render import PageStyle

    prepared, samples, _ = build.opened(chosen, synthetic)
    checkpoints = [models.inspect(chosen.student), models.inspect(chosen.teacher)]
    encoders = [Encoder(checkpoint, models.load_processor(checkpoint)) for checkpoint in checkpoints]
    return checkpoints, BatchBuilder(prepared, samples, PageStyle(), *encoders, packed=True)(list(range(8)))


class Sum(nn.Module):
    def forward(self, value):
        return value.sum()


def by_hand(student, batch=16):
    objective, value = Sum(), torch.ones(batch, 64)
    for module in (student, objective):
        memory.pretend(module, "cpu")
    return memory.estimate(
        lambda: objective(student(value)).backward(), student=student, teacher=None, objective=objective,
        names=("hand",), inputs=({"input_ids": value},), device=torch.device("cpu"),
    )  # fmt: skip


def test_a_small_network_is_what_a_pencil_says():
    found = by_hand(nn.Sequential(nn.Linear(64, 256, bias=False), nn.ReLU(), nn.Linear(256, 8, bias=False)))
    weights = 4 * (64 * 256 + 256 * 8)
    assert found.student.parameters == found.student.trained == weights // 4
    assert (found.student.weights, found.student.gradients, found.student.optimizer) == (weights, weights, 2 * weights)
    # ReLU keeps its result, which the second layer keeps too; the last output lives until it is summed
    assert found.student.activations == 4 * 16 * (256 + 8)
    assert found.inputs == 4 * 16 * 64
    assert found.at_least == 4 * weights
    assert (
        found.at_least + found.inputs < found.peak < found.at_least + found.inputs + 4 * 16 * 256 * 4 + 2 * 4 * 64 * 256
    )


def test_what_is_frozen_has_neither_gradients_nor_states():
    student = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 8))
    student[0].requires_grad_(False)
    found = by_hand(student)
    assert found.student.trained == 256 * 8 + 8 and found.student.gradients == 4 * (256 * 8 + 8)


def test_a_model_that_looks_at_values_is_not_guessed_at():
    class Peeking(nn.Linear):
        def forward(self, value):
            out = super().forward(value)
            return out[out > 0]

    found = by_hand(Peeking(64, 8))
    assert found.peak is None and found.student.activations is None and "Dynamic" in found.why_unknown
    assert found.needed == found.at_least == 4 * 4 * (64 * 8 + 8)
    columns, rows = found.table(10**9)
    assert len(columns) == 2 and any("not known" in row[1] for row in rows)
    verdict = memory.Verdict(found, free=found.at_least - 1, device="cpu")
    with pytest.raises(EvlecgError, match="does not fit"):
        verdict.check(force=False)
    verdict.check(force=True)
    memory.Verdict(found, free=found.at_least, device="cpu").check(force=False)
    tight = memory.Verdict(found, free=round(found.at_least * 1.2), device="cpu")
    assert tight.fits and tight.tight and tight.to_dict()["tight"]
    assert not memory.Verdict(found, free=found.at_least * 2, device="cpu").tight
    assert not memory.Verdict(found, free=round(found.at_least * 1.2), device="cuda").tight


@pytest.mark.parametrize(
    ("student", "teacher", "keys"),
    [
        ("idefics3", "llava", []),
        ("qwen2_vl", "idefics3_tiles", []),
        ("llava", "idefics3", ["lora.rank=4", "train.gradient_checkpointing=true"]),
        ("idefics3", "llava", ["train.batch_size=4", "train.accumulation=4"]),
        ("idefics3", "llava", ["train.batch_size=4", "train.accumulation=4", "objective.lambda_ot=0.5"]),
    ],
)
def test_the_allocator_records_what_was_estimated(checkpoints, synthetic, student, teacher, keys):
    """The same step on real tensors under PyTorch's profiler, whose record of allocations knows nothing of ours."""
    chosen = recipe(checkpoints, *keys, student=student, teacher=teacher)
    (small, large), batch = opened(chosen, synthetic)
    told = step_memory(chosen, batch, small, large)
    assert not told.why_unknown and told.student.activations > told.student.logits > 0
    assert told.teacher is not None and told.teacher.activations > 0
    loaded, its_teacher = models.load(small), models.load(large)
    adapt_student(chosen, loaded)
    objective = METHODS["evl"](chosen.objective, student=loaded.facts, teacher=its_teacher.facts)
    optimizer = optimizer_of(chosen, loaded.model, objective)
    job = bare_job(chosen, loaded, its_teacher, objective, optimizer)

    def take():
        step(job, [batch] * chosen.train.accumulation, Position(), diagnose=False, gradients=True)

    take()  # optimizer states are there from now on
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        take()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    states = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.ndim)
    modules = (loaded.model, its_teacher.model, objective)
    held = sum(parameter.nbytes for module in modules for parameter in module.parameters())
    measured = most + held + states + told.inputs
    assert told.peak == pytest.approx(measured, rel=0.15)


def test_parameters_are_those_of_the_run_and_levers_lower_the_peak(checkpoints, synthetic):
    chosen = recipe(checkpoints, student="llava", teacher="idefics3")
    (small, large), batch = opened(chosen, synthetic)
    plain = step_memory(chosen, batch, small, large)
    assert plain.student.parameters == models.load(small).n_parameters
    assert plain.teacher is not None and plain.teacher.parameters == models.load(large).n_parameters
    assert plain.student.weights == 4 * plain.student.parameters and plain.teacher.gradients == 0

    def with_keys(*keys):
        return step_memory(recipe(checkpoints, *keys, student="llava", teacher="idefics3"), batch, small, large)

    half = with_keys("train.dtype=bfloat16", "train.teacher_dtype=bfloat16")
    assert half.student.weights == 2 * half.student.parameters and half.peak < plain.peak
    recomputed = with_keys("train.gradient_checkpointing=true")
    assert recomputed.student.activations < 0.9 * plain.student.activations and recomputed.peak < plain.peak
    adapters = with_keys("lora.rank=2")
    assert adapters.student.trained < plain.student.trained / 5 and adapters.at_least < plain.at_least
    parts = with_keys("train.accumulation=2", "objective.lambda_rec=2")
    assert parts.teacher.activations == plain.teacher.activations > 0, "of a first pass, too"
    remembered = with_keys("train.remember_teacher=true")
    assert remembered.peak - plain.peak == remembered.remembered == 0  # `n_samples` is not known here


@pytest.mark.parametrize(
    ("name", "millions"),
    [("PULSE-7B", 7063), ("FastVLM-1.5B", 1676), ("Qwen2-VL-2B", 2209), ("SmolVLM-256M", 256), ("SmolVLM-500M", 507)],
)
def test_published_sizes_come_out_of_configs(name, millions):
    if name == "FastVLM-1.5B":
        pytest.importorskip("timm")
    loaded = models.shapes(real_configs.kinds()[name].checkpoint)
    # FastVLM's is a sum of published parts: Qwen2-1.5B 1544, FastViTHD 125, projector 7
    assert loaded.n_parameters / 1e6 == pytest.approx(millions, rel=0.005)


def test_what_cannot_fit_is_refused_before_weights_are_read(checkpoints, synthetic, tmp_path, monkeypatch):
    chosen = recipe(checkpoints)
    with monkeypatch.context() as patched:
        patched.setattr(memory, "free_bytes", lambda device: 100_000)
        patched.setattr(models, "load", lambda *a, **k: pytest.fail("weights were read"))
        with pytest.raises(EvlecgError, match=r"does not fit.*needed on cpu.*--force") as refused:
            distill(chosen, data=synthetic, out=tmp_path / "run")
        assert refused.value.exit_code == 2 and not (tmp_path / "run").exists()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100_000)
    assert distill(chosen, data=synthetic, out=tmp_path / "run", force=True).steps == 1


def test_free_memory_is_the_containers_where_it_has_a_limit(tmp_path, monkeypatch):
    assert 10**6 < memory.free_bytes(torch.device("cpu")) < 10**14
    numbers = {"memory.max": 5000, "memory.current": 3000, "memory.stat": 500}
    monkeypatch.setattr(memory, "_number", lambda path, key=None: numbers[path.name])
    assert memory.free_bytes(torch.device("cpu")) == 2500
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.free_bytes(torch.device("cpu")) == 1250


def test_sizes_read_well():
    assert [memory.size_text(n) for n in (None, 12, 2048, 1500 * 1024, 3 << 30)] == [
        "not known", "12 B", "2 KiB", "1.46 MiB", "3 GiB",
    ]  # fmt: skip


def test_estimates_leave_the_draws_of_a_run_alone(checkpoints, synthetic):
    chosen = recipe(checkpoints)
    (small, large), batch = opened(chosen, synthetic)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    step_memory(dataclasses.replace(chosen, seed=5), batch, small, large)
    assert torch.equal(torch.rand(3), expected)


def test_a_teacher_out_of_the_cache_takes_no_memory(checkpoints, synthetic):
    keys = ("objective.lambda_m=0.3", "objective.lambda_ot=0.5")
    chosen = recipe(checkpoints, *keys, student="llava", teacher="idefics3")
    (small, large), batch = opened(chosen, synthetic)
    live = step_memory(chosen, batch, small, large)
    cached = step_memory(chosen, batch, small, large, cached=True)
    assert not cached.why_unknown and cached.teacher is None and live.teacher is not None
    assert live.at_least - cached.at_least == pytest.approx(live.teacher.weights, rel=0.01)  # and its few buffers
    assert cached.peak < live.peak - live.teacher.weights / 2
    assert cached.losses > 0 and len(cached.rows) == 1
