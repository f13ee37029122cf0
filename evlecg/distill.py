"""The training job: check, build, loop, save. Accelerate is called, never subclassed; there is no trainer class."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evlecg.data.store import Prepared
from evlecg.data.tasks import chosen_labels, training_samples
from evlecg.errors import EvlecgError, RunFailed
from evlecg.files import new_folder, write_text_atomic
from evlecg.models import load as models
from evlecg.models.kinds import signal_config
from evlecg.models.trained import TrainedWith
from evlecg.page.augment import augmenter
from evlecg.page.render import page_style
from evlecg.progress import Progress
from evlecg.recipe import Recipe
from evlecg.report import environment

if TYPE_CHECKING:
    from evlecg.models.memory import MemoryEstimate, Verdict

WEAK_SHARE = 0.01  # of the gradient; a term below it changes next to nothing
PROBE_RECORDS = 8  # that figures and spectra are taken from
ANSWER_BATCH = 16  # records a forward pass when the teacher is asked for its answers
MOST_BAD_STEPS = 5  # consecutive non-finite losses that end a run
REHEARSED_STEPS = 3
ESTIMATE_FROM = 20_000_000  # parameters of both models
PLENTY_BYTES = 1_600  # a parameter: a hundred times what a weight, its gradient and its optimizer states take


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, what it cost, and how the loss ended."""

    run: Path
    steps: int
    seconds: float
    n_train: int
    n_parameters: int
    last: dict[str, Any]


def distill(
    recipe: Recipe,
    *,
    data: Path,
    out: Path,
    resume: bool = False,
    overwrite: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Trains a student and leaves a run folder: recipe.yaml, metrics.jsonl, student/, checkpoints/, run.json.

    With LoRA there is adapter/ too, in peft's layout; student/ holds the merged model.

    Args:
        recipe: what to do.
        data: prepared folder.
        out: run folder; it must be missing or empty, unless `resume` or `overwrite`.
        resume: go on from the newest checkpoint in `out`.
        overwrite: replace an older run, once everything that can be checked before the first step has been.
        force: go on where the memory estimate says that the run does not fit.
        progress: who listens.

    Raises:
        EvlecgError: bad input; nothing is left behind.
        RunFailed: the loss stopped being finite; checkpoints stay.
    """
    progress = progress or Progress()
    start_s = time.monotonic()
    prepared, samples, labels = _opened(recipe, data)
    _check_out(out, resume, overwrite)
    # models load here; nothing is on disk yet
    job = _build(recipe, prepared, samples, labels, progress, force=force)

    if overwrite and out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomic(out / "recipe.yaml", recipe.to_yaml())
    state = _restore(job, out, progress) if resume else _Position()
    if state.step == 0:
        _spectra(job, out, "before")
    last = _loop(job, state, out, progress)
    _spectra(job, out, "after")
    _figures(job, out)

    if job.accelerator.is_main_process:
        _save_student(job, out)  # adapters are merged here
    seconds = time.monotonic() - start_s
    result = RunResult(out, state.step, seconds, len(samples), job.student.n_parameters, last)
    if job.accelerator.is_main_process:
        write_text_atomic(out / "run.json", json.dumps(_provenance(job, result, labels), indent=2) + "\n")
    job.accelerator.wait_for_everyone()
    return result


@dataclass(frozen=True)
class DryRun:
    """What a run would be: everything up to its first steps has happened, and nothing is on disk.

    Attributes:
        checks: the start-up checks, memory included.
        total_steps: optimizer steps of the whole run.
        step_s: median seconds of a measured step, without the first.
        later_step_s: the same once `train.remember_teacher` answers from memory; `step_s` without it.
        start_s: seconds until the first step.
        estimated_s: seconds of the whole training; reports, control and export come on top.
    """

    checks: dict[str, Any]
    total_steps: int
    step_s: float
    later_step_s: float
    start_s: float
    estimated_s: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def rehearse(recipe: Recipe, *, data: Path, force: bool = False, progress: Progress | None = None) -> DryRun:
    """Does what `distill` does up to and including its first steps, writes nothing, and says what the rest would take.

    Args:
        recipe, data, force, progress: as for `distill`.

    Raises:
        EvlecgError: bad input.
        RunFailed: the loss is not finite.
    """
    progress = progress or Progress()
    begun_s = time.monotonic()
    prepared, samples, labels = _opened(recipe, data)
    job = _build(recipe, prepared, samples, labels, progress, force=force, always_estimate=True)
    start_s = time.monotonic() - begun_s
    first, later = _timed_steps(job)
    remembers = recipe.needs_teacher and recipe.train.remember_teacher
    if remembers:
        _, later = _timed_steps(job)  # the same records again
    epoch = math.ceil(job.total_steps / recipe.train.epochs) if remembers else job.total_steps
    epoch = min(epoch, job.total_steps)
    step_s = first if remembers else later
    estimated_s = start_s + epoch * step_s + (job.total_steps - epoch) * later
    return DryRun(job.checks, job.total_steps, step_s, later, start_s, estimated_s)


def _timed_steps(job: _Job) -> tuple[float, float]:
    """Takes `REHEARSED_STEPS` steps, loading included; the median seconds of those after the first, twice over.

    The first of a process also pays for allocators and kernels; a run of one step has no other.
    """
    from evlecg.models.adapt import train_mode
    from evlecg.models.batch import epoch_batches

    recipe, taken_s = job.recipe, []
    train_mode(job.student.model)
    batches = epoch_batches(
        len(job.builder.samples), recipe.train.batch_size, seed=recipe.seed, epoch=0,
        process=job.accelerator.process_index, processes=job.accelerator.num_processes,
    )  # fmt: skip
    groups = _grouped(
        _loader(job, batches[: REHEARSED_STEPS * recipe.train.accumulation], 0), recipe.train.accumulation
    )
    begun_s = time.monotonic()
    for group in groups:
        if _step(job, group, _Position(), diagnose=False, gradients=False) is None:
            raise RunFailed("the loss of a first step is not finite", where=recipe.name, hint="lower train.lr")
        taken_s.append(time.monotonic() - begun_s)
        begun_s = time.monotonic()
    seconds = statistics.median(taken_s[1:] or taken_s)
    return seconds, seconds


def _opened(recipe: Recipe, data: Path) -> tuple[Prepared, list, tuple[str, ...]]:
    """The prepared folder, its training samples, and the labels that they are about."""
    prepared = Prepared.open(data)
    labels = chosen_labels(prepared, recipe.data)
    indices = prepared.indices("train")[: recipe.data.max_train].tolist()
    samples = training_samples(prepared, indices, recipe.data, seed=recipe.seed)
    if not samples:
        raise EvlecgError("the prepared folder has no training record about which anything can be asked", where=data)
    return prepared, samples, labels


@dataclass
class _Position:
    """Where a run stands; saved with every checkpoint."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch already read
    step: int = 0  # optimizer steps taken
    scales: dict[str, float] = dataclasses.field(default_factory=dict)  # of balanced terms

    def state_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]
        self.scales = state.get("scales", {})


@dataclass(frozen=True)
class _Job:
    """Everything that the loop needs, built once."""

    recipe: Recipe
    prepared: Prepared
    accelerator: Any
    student: models.Loaded
    teacher: models.Loaded | None
    signal: Any
    builder: Any
    model: Any
    objective: Any
    optimizer: Any
    schedule: Any
    total_steps: int
    needs: frozenset[str]
    checks: dict[str, Any]
    adapted: Any = None  # the PeftModel around the student's model, with LoRA


def _build(
    recipe: Recipe, prepared: Prepared, samples: list, labels: tuple[str, ...], progress: Progress, *, force: bool,
    always_estimate: bool = False,
) -> _Job:  # fmt: skip
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from transformers import get_scheduler

    from evlecg.losses.objective import METHODS
    from evlecg.models import adapt
    from evlecg.models.batch import BatchBuilder, epoch_batches
    from evlecg.models.checks import (
        check_labels,
        check_lengths,
        check_samples,
        longest_samples,
        startup_checks,
    )  # fmt: skip
    from evlecg.models.encode import Encoder
    from evlecg.models.memory import Verdict, free_bytes
    from evlecg.models.views import encoder_for
    from evlecg.models.vocabulary import token_bytes
    from evlecg.teacher import LiveTeacher, RememberingTeacher

    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    train = recipe.train
    method = METHODS[recipe.effective_method]
    augment = augmenter(recipe.augment, seed=recipe.seed)
    if augment is not None and augment.teacher and recipe.needs_teacher and train.remember_teacher:
        hint = "set augment.teacher=false or train.remember_teacher=false"
        raise EvlecgError(
            "a teacher that is remembered must see the same pages in every epoch", where="augment", hint=hint
        )
    permissions = {"trust_remote_code": recipe.trust_remote_code, "allow_pickle": recipe.allow_pickle}
    checkpoints = [models.inspect(recipe.student, kind=recipe.student_kind, **permissions)]
    if recipe.needs_teacher:
        checkpoints.append(models.inspect(recipe.teacher, kind=recipe.teacher_kind, **permissions))
    for checkpoint in checkpoints:
        check_samples(checkpoint, prepared, samples)
    if checkpoints[0].original is not None and checkpoints[0].original.tiled:
        hint = "no transformers family lays tiles out flat, so what was trained could not be loaded again"
        raise EvlecgError("this original LLaVA layout can teach only", where=recipe.student, hint=hint)
    sizes = (_pair(recipe.page.student_size), _pair(recipe.page.teacher_size))
    style = page_style(recipe.page)
    accelerator = Accelerator(mixed_precision=train.mixed_precision, gradient_accumulation_steps=train.accumulation)
    texts = all(checkpoint.kind == "text" for checkpoint in checkpoints)
    processors: list[Any] = [models.load_processor(checkpoint) if texts else None for checkpoint in checkpoints]
    encoders: list[Any] = []

    def build(packed: bool) -> BatchBuilder:
        teacher_encoder = encoders[1] if len(encoders) > 1 else None
        return BatchBuilder(prepared, samples, style, encoders[0], teacher_encoder, packed=packed)

    def fits(packed: bool) -> Verdict | None:
        """Before any weight is read. Where there is plenty, tracing a step would be the dearer part of a small run."""
        size, free = _size(checkpoints), free_bytes(accelerator.device)
        if not always_estimate and size < ESTIMATE_FROM and size * PLENTY_BYTES < free:
            return None
        batch = build(packed)(longest_samples(samples, train.batch_size))
        found = step_memory(recipe, batch, *checkpoints, device=accelerator.device, n_samples=len(samples))
        verdict = Verdict(found, free, str(accelerator.device))
        verdict.check(force=force)
        return verdict

    if train.teacher_bits and recipe.needs_teacher and texts:  # is there a library that quantises?
        adapt.quantisation(models.shapes(checkpoints[1]), train.teacher_bits, compute_dtype=train.teacher_dtype)
    packs = train.packing != "never" and max(len(sample.questions) for sample in samples) > 1
    memory = None
    if texts:
        encoders += [
            Encoder(checkpoint, processor, size_px=size)
            for checkpoint, processor, size in zip(checkpoints, processors, sizes, strict=False)
        ]
        check_lengths(build(packs)(longest_samples(samples, 1)), checkpoints)
        memory = fits(packs)

    set_seed(recipe.seed)
    student = models.load(checkpoints[0], dtype=train.dtype, seed=recipe.seed, processor=processors[0], labels=labels,
                          signal=recipe.student_signal)  # fmt: skip
    teacher = None
    if recipe.needs_teacher:
        teacher = models.load(
            checkpoints[1], dtype=train.teacher_dtype, processor=processors[1], signal=recipe.teacher_signal,
            bits=train.teacher_bits, device_map=train.teacher_device_map,
        )  # fmt: skip
        if not train.teacher_bits and not train.teacher_device_map:
            teacher.model.to(accelerator.device)
        teacher.model.eval()
    adapted = _adapt(recipe, student)
    if not texts:
        encoders += [
            encoder_for(loaded, size_px=size)
            for loaded, size in zip((student, teacher), sizes, strict=True)
            if loaded is not None
        ]
    unpacked = build(False)
    lengths = check_lengths(build(packs)(longest_samples(samples, 1)), checkpoints)
    student_encoder, teacher_encoder = unpacked.student, unpacked.teacher
    student.model.to(accelerator.device)

    packed, checks = startup_checks(recipe, unpacked, student, teacher, progress, lengths=lengths)
    if packed != packs:
        memory = fits(packed)
    checks["memory"] = memory.to_dict() if memory is not None else None
    if memory is not None:
        _tell_memory(memory, progress)
    builder = dataclasses.replace(unpacked, packed=packed, augment=augment)

    facts = [
        dataclasses.replace(loaded.facts, tokens=token_bytes(loaded, encoder)) if method.reads_tokens else loaded.facts
        for loaded, encoder in ((student, student_encoder), (teacher, teacher_encoder))
        if loaded is not None and encoder is not None
    ]  # fmt: skip
    objective = method(recipe.objective, student=facts[0], teacher=facts[1] if teacher is not None else None)
    needs = objective.needs
    if teacher is not None:
        check_labels(teacher, labels, needs, progress)
    _check_method(recipe, needs, len(samples))
    if recipe.effective_method == "seqkd" and teacher is not None:
        builder = dataclasses.replace(builder, samples=_teacher_answers(builder, teacher, progress), teacher=None)
    optimizer = _optimizer(recipe, student.model, objective)
    batches = len(epoch_batches(len(samples), train.batch_size, seed=0, epoch=0, processes=accelerator.num_processes))
    total = train.epochs * math.ceil(batches / train.accumulation)
    if train.max_steps is not None:
        total = min(total, train.max_steps)
    names = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
    schedule = get_scheduler(
        names[train.schedule],
        optimizer,
        num_warmup_steps=round(train.warmup * total),
        num_training_steps=total,
    )
    # the schedule stays unwrapped: accelerate would step it once a process
    model, optimizer = accelerator.prepare(student.model, optimizer)
    if any(True for _ in objective.parameters()):
        objective = accelerator.prepare(objective)
    accelerator.register_for_checkpointing(schedule)
    if not all(parameter.requires_grad for parameter in student.model.parameters()):
        adapt.save_trained_only(accelerator, student.model)
    signal = None
    if teacher is not None and needs:
        attention = "attention" in needs
        signal = LiveTeacher(teacher, visual_layer=recipe.objective.visual_layer, attention=attention)
        if train.remember_teacher:
            signal = RememberingTeacher(signal, needs)
    return _Job(
        recipe=recipe, prepared=prepared, accelerator=accelerator, student=student, teacher=teacher, signal=signal,
        builder=builder, model=model, objective=objective, optimizer=optimizer, schedule=schedule, total_steps=total,
        needs=needs, checks=checks, adapted=adapted,
    )  # fmt: skip


def _check_method(recipe: Recipe, needs: frozenset[str], n_samples: int) -> None:
    """What a method asks of the rest of the recipe."""
    from evlecg.losses.objective import METHODS

    name = recipe.effective_method
    rows = min(recipe.train.batch_size, n_samples)
    if rows < METHODS[name].least_rows:
        raise EvlecgError(f"{name} compares the records of a batch with one another: {rows} are too few",
                          where="train.batch_size", hint=f"at least {METHODS[name].least_rows}")  # fmt: skip
    unkept = needs & {"attention", "logits"} if recipe.train.remember_teacher else frozenset()
    if unkept:
        raise EvlecgError(f"{name} reads the teacher's {' and '.join(sorted(unkept))}, which are not remembered",
                          where="train.remember_teacher", hint="set train.remember_teacher=false")  # fmt: skip


def _teacher_answers(builder: Any, teacher: models.Loaded, progress: Progress) -> list:
    """The training samples with the teacher's own answers (sequence-level distillation, Kim and Rush 2016)."""
    from evlecg.models.score import Scorer

    free = [question.text for sample in builder.samples for question in sample.questions if len(question.choices) < 2]
    if free:
        raise EvlecgError(f"{len(free)} questions have no choices: seqkd lets the teacher choose among answers",
                          where="data.tasks", hint=f"yes_no or multiple_choice, not {free[0]!r}")  # fmt: skip
    scorer = Scorer(teacher, builder.prepared, builder.style, size_px=builder.teacher.size_px)
    scorer.prove_packing(max(builder.samples[:64], key=lambda sample: len(sample.questions)))
    found: list = []
    with progress.task("teacher's answers", len(builder.samples)) as advance:
        for start in range(0, len(builder.samples), ANSWER_BATCH):
            batch = builder.samples[start : start + ANSWER_BATCH]
            found += scorer.answered(batch)
            advance(len(batch))
    return found


def _size(checkpoints: list[models.Checkpoint]) -> int:
    """Parameters of all models, from their configs."""
    return sum(models.shapes(checkpoint).n_parameters for checkpoint in checkpoints)


def _adapt(recipe: Recipe, student: models.Loaded) -> Any:
    """Sets what of the student is trained and how, in place; returns the `PeftModel` around it, None without LoRA."""
    from evlecg.models import adapt

    if recipe.train.gradient_checkpointing:
        adapt.checkpoint_gradients(student)
    adapted = adapt.add_lora(student, recipe.lora) if recipe.lora.rank else None
    adapt.choose_trained(student.model, recipe.train)
    return adapted


def _optimizer(recipe: Recipe, model: Any, objective: Any) -> Any:
    import torch

    train = recipe.train
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad], "lr": train.lr},
        {"params": list(objective.parameters()), "lr": train.aligner_lr or train.lr},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=train.lr, weight_decay=train.weight_decay)


def step_memory(
    recipe: Recipe,
    batch: Any,
    student: models.Checkpoint,
    teacher: models.Checkpoint | None = None,
    *,
    device: Any = "cpu",
    n_samples: int = 0,
) -> MemoryEstimate:
    """What a step of a run takes, from the checkpoints' configs and a batch: no weight is read or made.

    Args:
        recipe: the run.
        batch: what a step reads; the largest that may come.
        student, teacher: from `models.inspect`.
        device: where the run will be.
        n_samples: training samples, for what `train.remember_teacher` keeps.
    """
    import torch
    from accelerate import PartialState

    from evlecg.losses.objective import METHODS
    from evlecg.models import memory
    from evlecg.models.adapt import quantisation
    from evlecg.teacher import MEMORY_BYTES

    train = recipe.train
    device = torch.device(device)
    small = models.shapes(student, dtype=train.dtype)
    large = models.shapes(teacher, dtype=train.teacher_dtype) if teacher is not None else None
    quantised = None
    if large is not None and train.teacher_bits:
        quantised = quantisation(large, train.teacher_bits, compute_dtype=train.teacher_dtype)
    _adapt(recipe, small)
    # what Sinkhorn holds does not grow with its iterations
    quick = dataclasses.replace(recipe.objective.transport, steps=2)
    quick = dataclasses.replace(recipe.objective, transport=quick)
    method = METHODS[recipe.effective_method]
    facts = [loaded.facts if loaded is not None else None for loaded in (small, large)]
    if method.reads_tokens:  # any vocabulary of this size takes as much
        facts = [fact and dataclasses.replace(fact, tokens=tuple(b"%d" % i for i in range(fact.vocab_size)))
                 for fact in facts]  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # the run's own draws come later, and stay what they were
        objective = method(quick, student=facts[0], teacher=facts[1])
    for module in (small.model, *([large.model] if large is not None else []), objective):
        memory.pretend(module, device)
    trained = [p for module in (small.model, objective) for p in module.parameters() if p.requires_grad]
    job = _bare_job(recipe, small, large, objective, memory.Resting(trained))
    group = [batch] * min(2, train.accumulation)
    norms = recipe.log.gradients_every > 0
    sides = (batch.student, *([batch.teacher] if large is not None else []))
    rows = len(batch.sample_ids)
    return memory.estimate(
        # a term's gradient norm recomputes what was not kept, and keeps it then
        lambda: _step(job, group, _Position(), diagnose=False, gradients=norms and train.gradient_checkpointing),
        student=small.model, teacher=large.model if large is not None else None, objective=objective,
        names=(student.name, *([teacher.name] if teacher is not None else [])),
        inputs=tuple(side.inputs for side in sides), device=device, quantised=quantised,
        teacher_elsewhere=train.teacher_device_map is not None and device.type != "cpu",
        processes=PartialState().num_processes, gradient_norms=norms,
        remembered=(lambda held: min(MEMORY_BYTES, held * n_samples // rows)) if train.remember_teacher else None,
    )  # fmt: skip


def _bare_job(
    recipe: Recipe, student: models.Loaded, teacher: models.Loaded | None, objective: Any, optimizer: Any
) -> _Job:
    """What `_step` needs of a job, for models without data: the memory estimate, and what it is measured against."""
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
    return _Job(
        recipe=recipe, prepared=None, accelerator=accelerator, student=student, teacher=teacher,  # type: ignore[arg-type]
        signal=signal, builder=None,
        model=accelerator.prepare_model(student.model, device_placement=False, evaluation_mode=True),
        objective=objective, optimizer=optimizer, schedule=get_scheduler("constant", optimizer), total_steps=1,
        needs=objective.needs, checks={},
    )  # fmt: skip


def _tell_memory(verdict: Verdict, progress: Progress) -> None:
    progress.table("memory of a training step", *verdict.estimate.table(verdict.free))
    if verdict.estimate.why_unknown:
        progress.warn(f"activations could not be estimated ({verdict.estimate.why_unknown})")
    if not verdict.fits:
        progress.warn("the run is not expected to fit; --force goes on")


def _loop(job: _Job, state: _Position, out: Path, progress: Progress) -> dict[str, Any]:
    """Steps from `state` to the end; returns the last logged row."""
    from evlecg.models.adapt import train_mode
    from evlecg.models.batch import epoch_batches

    recipe, accelerator = job.recipe, job.accelerator
    row: dict[str, Any] = {}
    bad_steps, saved_at = 0, state.step
    weak: set[str] = set()
    start_s, first_step = time.monotonic(), state.step
    train_mode(job.model)
    with _metrics_file(out, state.step) as log, progress.task(recipe.name, job.total_steps) as advance:
        advance(state.step)
        while state.step < job.total_steps:
            batches = epoch_batches(
                len(job.builder.samples), recipe.train.batch_size, seed=recipe.seed, epoch=state.epoch,
                process=accelerator.process_index, processes=accelerator.num_processes,
            )  # fmt: skip
            for group in _grouped(_loader(job, batches[state.batch :], state.epoch), recipe.train.accumulation):
                wants_row = state.step == first_step or (state.step + 1) % recipe.log.every == 0
                wants_gradients = recipe.log.gradients_every > 0 and state.step % recipe.log.gradients_every == 0
                told = _step(job, group, state, diagnose=wants_row, gradients=wants_gradients)
                state.batch += len(group)
                if told is None:
                    bad_steps += 1
                    progress.warn(f"step {state.step + 1}: the loss is not finite; the batch is skipped")
                    if bad_steps >= MOST_BAD_STEPS:
                        raise RunFailed(f"the loss was not finite {bad_steps} times running", where=out,
                                        hint="lower train.lr; metrics.jsonl shows the terms")  # fmt: skip
                    continue
                bad_steps = 0
                state.step += 1
                for name, share in _weak(told.get("gradients", {})).items() if state.step > 1 else ():
                    if name not in weak:
                        weak.add(name)
                        progress.warn(f"step {state.step}: the term {name} is {share:.2%} of the gradient; raise its "
                                      "weight, or set objective.balance=gradnorm")  # fmt: skip
                if wants_row or wants_gradients:
                    row = {"step": state.step, "epoch": state.epoch, "seconds": time.monotonic() - start_s, **told}
                    if accelerator.is_main_process:
                        log.write(json.dumps(row) + "\n")
                        log.flush()
                advance(1, loss=f"{row['loss']:.3f}")
                if recipe.checkpoint.every and state.step % recipe.checkpoint.every == 0:
                    saved_at = _checkpoint(job, state, out)
                if state.step >= job.total_steps:
                    break
            else:
                state.epoch, state.batch = state.epoch + 1, 0
                if not recipe.checkpoint.every:
                    saved_at = _checkpoint(job, state, out)
        if saved_at != state.step:
            _checkpoint(job, state, out)
    return row


def _step(job: _Job, group: list[Any], state: _Position, *, diagnose: bool, gradients: bool) -> dict[str, Any] | None:
    """One optimizer step over a group of batches; what to log of its last batch, or None where a loss is not finite."""
    import torch

    from evlecg.losses.terms import balanced, rescaled
    from evlecg.models.outputs import AnswerHead, forward, to_device

    recipe, accelerator = job.recipe, job.accelerator
    told: dict[str, Any] = {}
    for number, batch in enumerate(group, start=1):
        last = number == len(group)
        batch = to_device(batch, accelerator.device)
        with contextlib.nullcontext() if last else accelerator.no_sync(job.model):
            with accelerator.autocast():
                outputs = forward(
                    job.student, batch.student, visual_layer=recipe.objective.visual_layer, model=job.model,
                    attention="attention" in job.needs,
                )  # fmt: skip
            terms = job.objective(
                outputs,
                job.signal(batch) if job.signal is not None else None,
                batch,
                output_head=AnswerHead(job.student),
                teacher_head=AnswerHead(job.teacher) if "heads" in job.needs and job.teacher is not None else None,
                ramp=_ramp(recipe.objective.warmup, state.step, job.total_steps),
                diagnose=diagnose and last,
            )
            if not bool(torch.isfinite(terms.total)):
                job.optimizer.zero_grad()
                return None
            balance = recipe.objective.balance != "none" and state.step % recipe.objective.balance_every == 0
            if last and balance:
                state.scales = balanced(state.scales, _term_gradients(job, terms), terms.weights)
            terms = rescaled(terms, state.scales)
            if last and gradients:
                told["gradients"] = _term_gradients(job, terms)
            accelerator.backward(terms.total / len(group))
    parameters = [p for part in job.optimizer.param_groups for p in part["params"]]
    norm = accelerator.clip_grad_norm_(parameters, recipe.train.clip or math.inf)
    rate = job.schedule.get_last_lr()[0]
    job.optimizer.step()
    job.schedule.step()
    job.optimizer.zero_grad()
    if diagnose or gradients:
        total = float(terms.total.detach())
        values = {name: float(value.detach()) for name, value in terms.values.items()}
        weighted = {name: values[name] * terms.weights[name] for name in values}
        told |= {
            "lr": rate,
            "loss": total,
            "terms": values,
            "weighted": weighted,
            "grad_norm": float(norm),
            "diagnostics": terms.diagnostics,
        }
    return told


def _term_gradients(job: _Job, terms: Any) -> dict[str, float]:
    """Norm on the student of every weighted term's gradient."""
    import torch

    parameters = [parameter for parameter in job.student.model.parameters() if parameter.requires_grad]
    norms = {}
    for name, value in terms.values.items():
        if not value.requires_grad:
            continue
        found = torch.autograd.grad(value * terms.weights[name], parameters, retain_graph=True, allow_unused=True)
        norms[name] = math.sqrt(sum(float(g.float().square().sum()) for g in found if g is not None))
    if job.accelerator.num_processes > 1:  # every process must balance alike
        mean = job.accelerator.reduce(torch.tensor(list(norms.values()), device=job.accelerator.device), "mean")
        norms = dict(zip(norms, mean.tolist(), strict=True))
    return norms


def _weak(gradients: dict[str, float]) -> dict[str, float]:
    """Distillation terms below `WEAK_SHARE` of all terms' gradient norms on the student, with their shares."""
    total = sum(gradients.values())
    return {name: norm / total for name, norm in gradients.items() if name != "ce" and norm < WEAK_SHARE * total}


def _ramp(warmup: float, step: int, total: int) -> float:
    """Share of the distillation terms' weight at a step."""
    return min(1.0, (step + 1) / max(1.0, warmup * total))


def _grouped(batches: Iterator[Any], size: int) -> Iterator[list[Any]]:
    group: list[Any] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _loader(job: _Job, batches: list[Any], epoch: int) -> Iterator[Any]:
    from torch.utils.data import DataLoader

    workers = job.recipe.train.workers
    places = range(len(job.builder.samples))
    builder = dataclasses.replace(job.builder, epoch=epoch)
    return iter(DataLoader(places, batch_sampler=batches, collate_fn=builder, num_workers=workers))  # type: ignore[arg-type]


@contextlib.contextmanager
def _metrics_file(out: Path, step: int) -> Iterator[Any]:
    """metrics.jsonl, open for appending, without rows that a resumed run is about to write again."""
    path = out / "metrics.jsonl"
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if line and json.loads(line)["step"] <= step]
        write_text_atomic(path, "".join(line + "\n" for line in kept))
    with path.open("a", encoding="utf-8") as stream:
        yield stream


def _checkpoint(job: _Job, state: _Position, out: Path) -> int:
    """Writes checkpoints/step-N whole or not at all, then drops the oldest; returns the step."""
    folder = out / "checkpoints" / f"step-{state.step:08d}"
    partial = folder.with_name(f".{folder.name}.partial")  # one name that all processes know
    accelerator = job.accelerator
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    quiet = logging.getLogger("accelerate.utils.other")
    quiet.setLevel(logging.ERROR)  # it warns of tied weights, which load_state ties again
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_text_atomic(partial / "position.json", json.dumps(state.state_dict()) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        for old in sorted((out / "checkpoints").glob("step-*"))[: -job.recipe.checkpoint.keep_last]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return state.step


def _restore(job: _Job, out: Path, progress: Progress) -> _Position:
    found = sorted((out / "checkpoints").glob("step-*/position.json"))
    if not found:
        progress.info(f"{out} holds no checkpoint: starting from the beginning")
        return _Position()
    job.accelerator.load_state(str(found[-1].parent))
    state = _Position()
    state.load_state_dict(json.loads(found[-1].read_text()))
    progress.info(f"going on from step {state.step} ({found[-1].parent})")
    return state


def _probe(job: _Job) -> tuple[Any, Any, Any, Any] | None:
    """A few clean training records as both models see them: (batch, pages, student's outputs, teacher's or None)."""
    import torch

    from evlecg.models.batch import draw
    from evlecg.models.outputs import forward, to_device

    if not job.recipe.log.figures or not job.accelerator.is_main_process:
        return None
    builder = dataclasses.replace(job.builder, augment=None)
    if job.signal is None:
        builder = dataclasses.replace(builder, teacher=None)
    places = range(min(PROBE_RECORDS, len(builder.samples)))
    batch = to_device(builder(places), job.accelerator.device)
    pages = [draw(builder.prepared, builder.samples[0].record_index, builder.student.size_px, builder.style)]
    training = job.student.model.training
    job.student.model.eval()
    with torch.no_grad():
        outputs = forward(job.student, batch.student, visual_layer=job.recipe.objective.visual_layer)
        taught = job.signal(batch) if job.signal is not None else None
    job.student.model.train(training)
    return batch, pages, outputs, taught


def _spectra(job: _Job, out: Path, when: str) -> None:
    """Singular values of the probe's visual tokens, kept for the figure of a run that may be resumed in between."""
    import numpy as np

    from evlecg.figures import singular_values

    found = _probe(job)
    if found is None:
        return
    _, _, student, teacher = found
    sides = {f"student {when}": student} | ({"teacher": teacher} if teacher is not None else {})
    spectra = {
        name: singular_values(outputs.visual_BND[outputs.side.visual_mask_BN].float().cpu().numpy())
        for name, outputs in sides.items()
        if outputs.visual_BND.shape[-1]
    }
    (out / "figures").mkdir(exist_ok=True)
    np.savez(out / "figures" / f"spectra-{when}.npz", **spectra)


def _figures(job: _Job, out: Path) -> None:
    """RUN/figures: curves, singular values before and after, and the transport plan of the first record."""
    import numpy as np
    import torch

    from evlecg.figures import TokenPlaces, curves_figure, spectrum_figure, transport_figure
    from evlecg.losses.transport import token_lead

    found = _probe(job)
    if found is None:
        return
    folder = out / "figures"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    curves_figure(folder, rows)
    spectra: dict[str, Any] = {}
    for when in ("before", "after"):
        path = folder / f"spectra-{when}.npz"
        if path.exists():  # a run from before figures existed, gone on with, has no "before"
            with np.load(path) as held:
                spectra |= {name: held[name] for name in held.files}
            path.unlink()
    spectrum_figure(folder, {name: spectra[name] for name in sorted(spectra, reverse=True)})
    batch, pages, student, teacher = found
    transport = getattr(job.accelerator.unwrap_model(job.objective), "transport", None)
    if teacher is None or transport is None:
        return
    with torch.no_grad():
        solved = transport(student, teacher, batch)
    if solved is None:
        return
    places, kept = [], []
    for side in (teacher.side, student.side):
        lead_BN = token_lead(side.visual_box_BN4, side.visual_mask_BN, side.cell_box_BC4, batch.cell_lead_C)
        valid_N = side.visual_mask_BN[0].cpu().numpy()
        box_N4 = side.visual_box_BN4[0].cpu().numpy()[valid_N]
        middles_N2 = np.stack([box_N4[:, [0, 2]].mean(1), box_N4[:, [1, 3]].mean(1)], 1)
        _, time_s_N = pages[0].layout.paper.locate(middles_N2)
        places.append(TokenPlaces(lead_BN[0].cpu().numpy()[valid_N], time_s_N, box_N4))
        kept.append(valid_N)
    cost_NM = solved.cost_BNM[0].float().cpu().numpy()[np.ix_(*kept)]
    transport_figure(
        folder, plan_NM=solved.plan_BNM[0].float().cpu().numpy()[np.ix_(*kept)], cost_NM=cost_NM / cost_NM.mean(),
        teacher=places[0], student=places[1], page_HW3=pages[0].pixels, record=batch.sample_ids[0],
    )  # fmt: skip


def _save_student(job: _Job, out: Path) -> None:
    """student/: what transformers loads, and nothing that only training needed; adapter/ beside it, with LoRA."""
    from evlecg.models.adapt import merge, save_adapter

    model = job.accelerator.unwrap_model(job.model)
    if job.adapted is not None:
        with new_folder(out / "adapter", overwrite=True) as partial:
            save_adapter(job.adapted, partial)
        model = merge(job.adapted)
    with new_folder(out / "student", overwrite=True) as partial:
        model.save_pretrained(partial)
        models.save_processor(job.student, partial)
        _trained_with(job).write(partial)


def _trained_with(job: _Job) -> TrainedWith:
    recipe = job.recipe
    return TrainedWith(
        question=recipe.data.question,
        labels={name: job.prepared.label_descriptions[name] for name in chosen_labels(job.prepared, recipe.data)},
        page=dataclasses.replace(recipe.page, student_size=job.builder.student.size_px),
        kind=job.student.checkpoint.kind,
        signal=signal_config(job.student.form) if job.student.form is not None else None,
        method=recipe.effective_method,
        teacher=recipe.teacher if recipe.needs_teacher else None,
        recipe_fingerprint=recipe.fingerprint(),
    )


def _provenance(job: _Job, result: RunResult, labels: tuple[str, ...]) -> dict[str, Any]:
    return {
        "recipe": job.recipe.name,
        "recipe_fingerprint": job.recipe.fingerprint(),
        "data": {
            "dataset": job.prepared.manifest["dataset"],
            "fingerprint": job.prepared.fingerprint,
            "labels": list(labels),
            "n_train": result.n_train,
        },
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        "checks": job.checks,
        "last": result.last,
        "environment": environment(),
    }


def _check_out(out: Path, resume: bool, overwrite: bool) -> None:
    if resume and not out.is_dir():
        raise EvlecgError("there is no run to resume", where=out, hint="leave --resume out to start one")
    if resume or not out.exists():
        return
    if not out.is_dir():
        raise EvlecgError("the run folder is a file", where=out, hint="choose another --out")
    if any(out.iterdir()) and not overwrite:
        raise EvlecgError("the run folder is not empty", where=out, hint="another --out, --resume or --overwrite")
    if any(out.iterdir()) and not (out / "recipe.yaml").is_file():
        raise EvlecgError("the folder to overwrite is not a run", where=out, hint="choose another --out")


def _pair(size: tuple[int, ...] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    if len(size) != 2 or min(size) < 16:
        raise EvlecgError(f"a page size is [width, height] in pixels, not {list(size)}", where="page")
    return size[0], size[1]
