"""What a step takes in memory, from the checkpoints' configs and a batch: the run's own step, on shapes alone."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from evlecg.models import load as models
from evlecg.progress import Progress
from evlecg.recipe import Recipe
from evlecg.training.step import Job, Position, relates_across, step

if TYPE_CHECKING:
    from evlecg.models.memory import MemoryEstimate, Verdict


def adapt_student(recipe: Recipe, student: models.Loaded) -> Any:
    """Sets what of the student is trained and how, in place; returns the `PeftModel` around it, None without LoRA."""
    from evlecg.models import adapt

    if recipe.train.gradient_checkpointing:
        adapt.checkpoint_gradients(student)
    adapted = adapt.add_lora(student, recipe.lora) if recipe.lora.rank else None
    adapt.choose_trained(student.model, recipe.train)
    return adapted


def step_memory(
    recipe: Recipe,
    batch: Any,
    student: models.Checkpoint,
    teacher: models.Checkpoint | None = None,
    *,
    device: Any = "cpu",
    n_samples: int = 0,
    cached: bool = False,
) -> MemoryEstimate:
    """What a step of a run takes, from the checkpoints' configs and a batch: no weight is read or made.

    Args:
        recipe: the run.
        batch: what a step reads; the largest that may come.
        student, teacher: from `models.inspect`.
        device: where the run will be.
        n_samples: training samples, for what `train.remember_teacher` keeps.
        cached: the teacher is not loaded: all that is read of it comes out of a cache.
    """
    import torch
    from accelerate import PartialState

    from evlecg.losses.objective import METHODS
    from evlecg.models import memory
    from evlecg.models.adapt import quantisation
    from evlecg.teacher.store import MEMORY_BYTES

    train = recipe.train
    device = torch.device(device)
    small = models.shapes(student, dtype=train.dtype)
    large = models.shapes(teacher, dtype=train.teacher_dtype) if teacher is not None else None
    quantised = None
    if large is not None and train.teacher_bits:
        quantised = quantisation(large, train.teacher_bits, compute_dtype=train.teacher_dtype)
    adapt_student(recipe, small)
    # what Sinkhorn holds does not grow with its iterations
    quick = dataclasses.replace(recipe.objective.transport, steps=2)
    quick = dataclasses.replace(recipe.objective, transport=quick)
    method = METHODS[recipe.effective_method]
    facts = [loaded.facts for loaded in (small, large) if loaded is not None]
    if method.reads_tokens:  # any vocabulary of this size takes as much
        facts = [dataclasses.replace(one, tokens=tuple(b"%d" % i for i in range(one.vocab_size))) for one in facts]
    with torch.random.fork_rng(devices=[]):  # the run's own draws come later, and stay what they were
        objective = method(quick, student=facts[0], teacher=facts[1] if large is not None else None)
    stands = PartialState().device or "cpu"  # where `step` puts a batch; a GPU that is not here is traced on the CPU
    for module in (small.model, *([large.model] if large is not None else []), objective):
        memory.pretend(module, stands)
    trained = [p for module in (small.model, objective) for p in module.parameters() if p.requires_grad]
    job = bare_job(recipe, small, large, objective, memory.Resting(trained))
    if cached and large is not None:
        job = dataclasses.replace(job, signal=lambda batch: _shapes_of(batch, facts[1], large, objective.needs))
    group = [batch] * min(2, train.accumulation)
    if relates_across(job, group) and objective.reads_teacher_beside_records:  # the teacher's outputs for all are held
        group = [batch] * train.accumulation
    norms = recipe.log.gradients_every > 0
    there = large.model if large is not None and not cached else None
    sides = (batch.student, *([batch.teacher] if there is not None else []))
    rows = len(batch.sample_ids)
    return memory.estimate(
        # a term's gradient norm recomputes what was not kept, and keeps it then
        lambda: step(job, group, Position(), diagnose=False, gradients=norms and train.gradient_checkpointing),
        student=small.model, teacher=there, objective=objective,
        names=(student.name, *([teacher.name] if teacher is not None else [])),
        inputs=tuple(side.inputs for side in sides), device=device, quantised=quantised,
        teacher_elsewhere=train.teacher_device_map is not None and device.type != "cpu",
        processes=PartialState().num_processes, gradient_norms=norms,
        remembered=(lambda held: min(MEMORY_BYTES, held * n_samples // rows))
        if train.remember_teacher and not recipe.cache.dir else None,
    )  # fmt: skip


def _shapes_of(batch: Any, facts: Any, teacher: models.Loaded, needs: frozenset[str]) -> Any:
    """What a cache gives for a batch, in its shapes; it takes no memory."""
    import torch

    from evlecg.schema import Outputs

    side, dtype = batch.teacher, teacher.model.dtype
    (rows, n), n_visual = side.valid_BS.shape, side.visual_box_BN4.shape[1]

    def shaped(*shape: int) -> Any:
        return torch.zeros((), dtype=dtype, device=side.valid_BS.device).expand(shape)

    attention = {name: shaped(rows, n_visual, facts.width) for name in ("query", "key", "value")}
    return Outputs(
        shaped(rows, n, facts.width), shaped(rows, n_visual, facts.token_width), shaped(rows, n_visual, facts.width),
        shaped(len(side.answer_A2), facts.vocab_size), side, attention if "attention" in needs else {},
    )  # fmt: skip


def bare_job(
    recipe: Recipe, student: models.Loaded, teacher: models.Loaded | None, objective: Any, optimizer: Any
) -> Job:
    """What `step` needs of a job, for models without data: the memory estimate, and what it is measured against."""
    from accelerate import Accelerator
    from transformers import get_scheduler

    from evlecg.models.adapt import train_mode
    from evlecg.teacher import LiveTeacher

    accelerator = Accelerator(mixed_precision=recipe.train.mixed_precision)  # its own: it remembers what it prepares
    train_mode(student.model)
    signal = None
    if teacher is not None and objective.needs:
        attention = "attention" in objective.needs
        signal = LiveTeacher(teacher, visual_layer=recipe.objective.visual_layer, attention=attention)
    return Job(
        recipe=recipe, prepared=None, accelerator=accelerator, student=student, teacher=teacher,  # type: ignore[arg-type]
        signal=signal, builder=None,
        model=accelerator.prepare_model(student.model, device_placement=False, evaluation_mode=True),
        objective=objective, optimizer=optimizer, schedule=get_scheduler("constant", optimizer), total_steps=1,
        needs=objective.needs, checks={},
    )  # fmt: skip


def tell_memory(verdict: Verdict, progress: Progress) -> None:
    progress.table("memory of a training step", *verdict.estimate.table(verdict.free))
    if verdict.estimate.why_unknown:
        progress.warn(f"activations could not be estimated ({verdict.estimate.why_unknown})")
    if not verdict.fits:
        progress.warn("the run is not expected to fit; --force goes on")
    elif verdict.tight:
        progress.warn(
            "the run may not fit: glibc keeps up to 0.7 times as much again of what was freed; "
            "MALLOC_MMAP_THRESHOLD_=262144 in the environment makes it give that back, and steps slower"
        )
