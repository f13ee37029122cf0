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
from evlecg.models.trained import TrainedWith
from evlecg.page.augment import augmenter
from evlecg.page.render import page_style
from evlecg.progress import Progress
from evlecg.recipe import Recipe
from evlecg.report import environment

if TYPE_CHECKING:
    from evlecg.models.memory import MemoryEstimate, Verdict

MOST_BAD_STEPS = 5  # consecutive non-finite losses that end a run
REHEARSED_STEPS = 3


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
    job = _build(recipe, prepared, samples, progress, force=force)  # models load here; nothing is on disk yet

    if overwrite and out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomic(out / "recipe.yaml", recipe.to_yaml())
    state = _restore(job, out, progress) if resume else _Position()
    last = _loop(job, state, out, progress)

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
    prepared, samples, _ = _opened(recipe, data)
    job = _build(recipe, prepared, samples, progress, force=force)
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

    def state_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]


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
    checks: dict[str, Any]
    adapted: Any = None  # the PeftModel around the student's model, with LoRA


def _build(recipe: Recipe, prepared: Prepared, samples: list, progress: Progress, *, force: bool) -> _Job:
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from transformers import get_scheduler

    from evlecg.losses.objective import METHODS
    from evlecg.models import adapt
    from evlecg.models.batch import BatchBuilder, epoch_batches
    from evlecg.models.checks import check_lengths, longest_samples, startup_checks
    from evlecg.models.encode import Encoder
    from evlecg.models.memory import Verdict, free_bytes
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
    checkpoints = [models.inspect(recipe.student, **permissions)]
    checkpoints += [models.inspect(recipe.teacher, **permissions)] if recipe.needs_teacher else []
    processors = [models.load_processor(checkpoint) for checkpoint in checkpoints]
    sizes = (_pair(recipe.page.student_size), _pair(recipe.page.teacher_size))
    encoders = [
        Encoder(checkpoint, processor, size_px=size)
        for checkpoint, processor, size in zip(checkpoints, processors, sizes, strict=False)
    ]
    teacher_encoder = encoders[1] if recipe.needs_teacher else None
    style = page_style(recipe.page)
    unpacked = BatchBuilder(prepared, samples, style, encoders[0], teacher_encoder, packed=False)
    accelerator = Accelerator(mixed_precision=train.mixed_precision, gradient_accumulation_steps=train.accumulation)
    largest = longest_samples(samples, train.batch_size)

    def fits(packed: bool) -> tuple[Verdict, list[tuple[int, int | None]]]:
        batch = dataclasses.replace(unpacked, packed=packed)(largest)
        lengths = check_lengths(batch, checkpoints)
        found = step_memory(recipe, batch, *checkpoints, device=accelerator.device, n_samples=len(samples))
        verdict = Verdict(found, free_bytes(accelerator.device), str(accelerator.device))
        verdict.check(force=force)
        return verdict, lengths

    packs = train.packing != "never" and max(len(sample.questions) for sample in samples) > 1
    memory, lengths = fits(packs)  # before any weight is read

    set_seed(recipe.seed)
    student = models.load(checkpoints[0], dtype=train.dtype, seed=recipe.seed, processor=processors[0])
    teacher = None
    if recipe.needs_teacher:
        teacher = models.load(checkpoints[1], dtype=train.teacher_dtype, processor=processors[1],
                              bits=train.teacher_bits, device_map=train.teacher_device_map)  # fmt: skip
        if not train.teacher_bits and not train.teacher_device_map:
            teacher.model.to(accelerator.device)
        teacher.model.eval()
    adapted = _adapt(recipe, student)
    student.model.to(accelerator.device)

    packed, checks = startup_checks(recipe, unpacked, student, teacher, progress, lengths=lengths)
    if packed != packs:
        memory, _ = fits(packed)
    checks["memory"] = memory.to_dict()
    _tell_memory(memory, progress)
    builder = dataclasses.replace(unpacked, packed=packed, augment=augment)

    objective = method(
        recipe.objective,
        student=student.facts,
        teacher=teacher.facts if teacher is not None else None,
    )
    needs = objective.needs
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
    if teacher is not None:
        signal = LiveTeacher(teacher, visual_layer=recipe.objective.visual_layer)
        if train.remember_teacher:
            signal = RememberingTeacher(signal, needs)
    return _Job(
        recipe=recipe, prepared=prepared, accelerator=accelerator, student=student, teacher=teacher, signal=signal,
        builder=builder, model=model, objective=objective, optimizer=optimizer, schedule=schedule, total_steps=total,
        checks=checks, adapted=adapted,
    )  # fmt: skip


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
    facts = large.facts if large is not None else None
    with torch.random.fork_rng(devices=[]):  # the run's own draws come later, and stay what they were
        objective = METHODS[recipe.effective_method](quick, student=small.facts, teacher=facts)
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
    return _Job(
        recipe=recipe, prepared=None, accelerator=accelerator, student=student, teacher=teacher,  # type: ignore[arg-type]
        signal=LiveTeacher(teacher, visual_layer=recipe.objective.visual_layer) if teacher is not None else None,
        builder=None, model=accelerator.prepare_model(student.model, device_placement=False, evaluation_mode=True),
        objective=objective, optimizer=optimizer, schedule=get_scheduler("constant", optimizer), total_steps=1,
        checks={},
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

    from evlecg.models.outputs import AnswerHead, forward, to_device

    recipe, accelerator = job.recipe, job.accelerator
    told: dict[str, Any] = {}
    for number, batch in enumerate(group, start=1):
        last = number == len(group)
        batch = to_device(batch, accelerator.device)
        with contextlib.nullcontext() if last else accelerator.no_sync(job.model):
            with accelerator.autocast():
                outputs = forward(
                    job.student, batch.student, visual_layer=recipe.objective.visual_layer, model=job.model
                )
            terms = job.objective(
                outputs,
                job.signal(batch) if job.signal is not None else None,
                batch,
                output_head=AnswerHead(job.student),
                ramp=_ramp(recipe.objective.warmup, state.step, job.total_steps),
                diagnose=diagnose and last,
            )
            if not bool(torch.isfinite(terms.total)):
                job.optimizer.zero_grad()
                return None
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
    return norms


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
        job.student.processor.save_pretrained(partial)
        _trained_with(job).write(partial)


def _trained_with(job: _Job) -> TrainedWith:
    recipe = job.recipe
    return TrainedWith(
        question=recipe.data.question,
        labels={name: job.prepared.label_descriptions[name] for name in chosen_labels(job.prepared, recipe.data)},
        page=dataclasses.replace(recipe.page, student_size=job.builder.student.size_px),
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
