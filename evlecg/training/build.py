"""Everything that a run needs, checked and built once: before the first step, and with nothing on disk."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evlecg.data.store import Prepared
from evlecg.data.tasks import chosen_labels, training_samples
from evlecg.errors import EvlecgError
from evlecg.models import load as models
from evlecg.page.augment import augmenter
from evlecg.page.render import page_style
from evlecg.progress import Progress
from evlecg.recipe import Recipe, page_size
from evlecg.training.estimate import adapt_student, step_memory, tell_memory
from evlecg.training.guards import check_answers
from evlecg.training.processes import accelerator_of, is_sharded, shard_teacher, tell_unused
from evlecg.training.processes import prepared as prepared_models
from evlecg.training.step import Job
from evlecg.training.track import check_trackers
from evlecg.training.validate import validation_of, validation_samples

if TYPE_CHECKING:
    from evlecg.models.batch import BatchBuilder
    from evlecg.models.memory import Verdict

ANSWER_BATCH = 16  # records a forward pass when the teacher is asked for its answers
ESTIMATE_FROM = 20_000_000  # parameters of both models
PLENTY_BYTES = 1_600  # a parameter: a hundred times what a weight, its gradient and its optimizer states take


def opened(recipe: Recipe, data: Path) -> tuple[Prepared, list, tuple[str, ...]]:
    """The prepared folder, its training samples, and the labels that they are about."""
    prepared = Prepared.open(data)
    labels = chosen_labels(prepared, recipe.data)
    indices = prepared.indices("train")[: recipe.data.max_train].tolist()
    samples = training_samples(prepared, indices, recipe.data, seed=recipe.seed)
    if not samples:
        raise EvlecgError("the prepared folder has no training record about which anything can be asked", where=data)
    return prepared, samples, labels


def build(
    recipe: Recipe, prepared: Prepared, samples: list, labels: tuple[str, ...], progress: Progress, *, force: bool,
    always_estimate: bool = False,
) -> Job:  # fmt: skip
    import torch
    from accelerate.utils import set_seed

    from evlecg.losses.objective import METHODS
    from evlecg.models import adapt
    from evlecg.models.batch import BatchBuilder, epoch_batches, text_lengths
    from evlecg.models.checks import (
        check_labels,
        check_lengths,
        check_method,
        check_samples,
        longest_samples,
        startup_checks,
    )  # fmt: skip
    from evlecg.models.encode import Encoder
    from evlecg.models.memory import Verdict, free_bytes
    from evlecg.models.views import encoder_for
    from evlecg.models.vocabulary import token_bytes
    from evlecg.teacher import LiveTeacher
    from evlecg.training.cache import cache_of, wants_packing

    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    train = recipe.train
    method = METHODS[recipe.effective_method]
    augment = augmenter(recipe.augment, seed=recipe.seed)
    permissions: dict[str, Any] = {"trust_remote_code": recipe.trust_remote_code, "allow_pickle": recipe.allow_pickle}
    check_trackers(recipe.track)
    validated = validation_samples(recipe, prepared, labels)
    checkpoints = [models.inspect(
        recipe.student, kind=recipe.student_kind, settings=recipe.student_config, **permissions
    )]  # fmt: skip
    if recipe.needs_teacher:
        checkpoints.append(models.inspect(recipe.teacher, kind=recipe.teacher_kind, **permissions))
    for checkpoint in checkpoints:
        check_method(recipe.effective_method, getattr(method, "reads", frozenset()), checkpoint)
        check_samples(checkpoint, prepared, samples)
    if checkpoints[0].original is not None and checkpoints[0].original.tiled:
        hint = "no transformers family lays tiles out flat, so what was trained could not be loaded again"
        raise EvlecgError("this original LLaVA layout can teach only", where=recipe.student, hint=hint)
    sizes = (page_size(recipe.page.student_size), page_size(recipe.page.teacher_size))
    style = page_style(recipe.page)
    accelerator = accelerator_of(recipe)
    texts = all(checkpoint.kind == "text" for checkpoint in checkpoints)
    text_length_N = text_lengths(samples, train.bucket) if texts else None
    processors: list[Any] = [models.load_processor(checkpoint) if texts else None for checkpoint in checkpoints]
    encoders: list[Any] = []

    def batches_of(packed: bool) -> BatchBuilder:
        teacher_encoder = encoders[1] if len(encoders) > 1 else None
        return BatchBuilder(prepared, samples, style, encoders[0], teacher_encoder, packed=packed)

    def fits(packed: bool) -> Verdict | None:
        """Before any weight is read. Where there is plenty, tracing a step would be the dearer part of a small run."""
        size, free = _size(checkpoints), free_bytes(accelerator.device)
        if not always_estimate and size < ESTIMATE_FROM and size * PLENTY_BYTES < free:
            return None
        batch = batches_of(packed)(longest_samples(samples, train.batch_size))
        found = step_memory(
            recipe, batch, *checkpoints, device=accelerator.device, n_samples=len(samples),
            cached=cache is not None and cache.complete(packed),
        )  # fmt: skip
        verdict = Verdict(found, free, str(accelerator.device))
        verdict.check(force=force)
        return verdict

    cache = None
    if recipe.needs_teacher:
        size = Encoder(checkpoints[1], processors[1], size_px=sizes[1]).size_px if texts else sizes[1]
        cache = cache_of(recipe, prepared, samples, checkpoints[1], size, progress, rehearsal=always_estimate,
                         lengths=text_length_N)  # fmt: skip

    if train.teacher_bits and recipe.needs_teacher and texts:  # is there a library that quantises?
        adapt.quantisation(models.shapes(checkpoints[1]), train.teacher_bits, compute_dtype=train.teacher_dtype)
    packs = wants_packing(recipe, samples)
    packs = packs and not any(checkpoint.kind == "text" and checkpoint.apart for checkpoint in checkpoints)
    memory = None
    if texts:
        encoders += [
            Encoder(checkpoint, processor, size_px=size)
            for checkpoint, processor, size in zip(checkpoints, processors, sizes, strict=False)
        ]
        check_lengths(batches_of(packs)(longest_samples(samples, 1)), checkpoints)
        memory = fits(packs)

    if train.compile:
        adapt.check_compiler(accelerator.device)
    set_seed(recipe.seed)
    student = models.load(checkpoints[0], dtype=train.dtype, seed=recipe.seed, processor=processors[0], labels=labels,
                          signal=recipe.student_signal)  # fmt: skip

    if cache is not None and not cache.complete(packs):
        cache.await_writer()
    teacher = None
    if recipe.needs_teacher and (cache is None or not cache.complete(packs)):
        teacher = load_teacher(recipe, checkpoints[1], processors[1], accelerator.device)
    adapted = adapt_student(recipe, student)
    student.model.to(accelerator.device)

    def looked() -> tuple[BatchBuilder, bool, dict[str, Any]]:
        """The builder of unpacked batches, whether questions are packed, and what the start-up checks found."""
        there = [loaded for loaded in (student, teacher) if loaded is not None]
        if not texts:
            encoders[:] = [encoder_for(loaded, size_px=size) for loaded, size in zip(there, sizes, strict=False)]
        lengths = check_lengths(batches_of(packs)(longest_samples(samples, 1)), checkpoints[: len(there)])
        unpacked = batches_of(False)
        return unpacked, *startup_checks(recipe, unpacked, student, teacher, progress, lengths=lengths)

    unpacked, packed, checks = looked()
    if cache is not None and teacher is None:
        packed = packed and cache.packs
        if not cache.complete(packed):  # it holds what a student that packs has read, and this one does not
            teacher = load_teacher(recipe, checkpoints[1], processors[1], accelerator.device)
            unpacked, packed, checks = looked()
        elif cache.facts is not None:
            checks["teacher"] = dict(cache.facts.checks)
    student_encoder, teacher_encoder = unpacked.student, unpacked.teacher
    if packed != packs:
        memory = fits(packed)
    checks["memory"] = memory.to_dict() if memory is not None else None
    if memory is not None:
        tell_memory(memory, progress)
    builder = dataclasses.replace(unpacked, packed=packed, augment=augment)

    facts = [
        dataclasses.replace(loaded.facts, tokens=token_bytes(loaded, encoder)) if method.reads_tokens else loaded.facts
        for loaded, encoder in ((student, student_encoder), (teacher, teacher_encoder))
        if loaded is not None and encoder is not None
    ]  # fmt: skip
    if cache is not None and teacher is None:
        stands_in = models.Loaded(checkpoints[1], None, processors[1])  # for its vocabulary
        tokens = token_bytes(stands_in, teacher_encoder) if method.reads_tokens else ()
        facts.append(cache.model_facts(tokens))
    objective = method(recipe.objective, student=facts[0], teacher=facts[1] if recipe.needs_teacher else None)
    needs = objective.needs
    if teacher is not None:
        check_labels(teacher, labels, needs, progress)
    processes = accelerator.num_processes
    related = 1 if is_sharded(accelerator) else train.accumulation * processes  # parts of a step
    _check_method(recipe, objective, len(samples), related)
    if recipe.effective_method == "seqkd" and teacher is not None:
        builder = dataclasses.replace(builder, samples=_teacher_answers(builder, teacher, progress), teacher=None)
    batches = epoch_batches(
        len(samples), train.batch_size, seed=recipe.seed, epoch=0, processes=processes, lengths=text_length_N,
        bucket=train.bucket,
    )  # fmt: skip
    check_answers(dataclasses.replace(builder, teacher=None)(batches[0].tolist()))
    total = train.epochs * math.ceil(len(batches) / train.accumulation)
    if train.max_steps is not None:
        total = min(total, train.max_steps)
    if train.compile:  # the checks above ran without: a pass or two are not worth a minute
        for loaded in (student, teacher):
            if loaded is not None:
                adapt.compile_layers(loaded.model)
    tell_unused(accelerator, student, builder([0]).student)
    model, optimizer, schedule = prepared_models(accelerator, recipe, student.model, objective, total_steps=total)
    sharded = is_sharded(accelerator)
    if not sharded and not all(parameter.requires_grad for parameter in student.model.parameters()):
        adapt.save_trained_only(accelerator, student.model)
    signal, teacher_head = None, None
    if teacher is not None and needs:
        shard_teacher(accelerator, teacher.model)
        attention = "attention" in needs
        signal = LiveTeacher(teacher, visual_layer=recipe.objective.visual_layer, attention=attention)
    if cache is not None:
        if signal is not None and teacher is not None:
            cache.fill(signal, teacher, builder, checks.get("teacher", {}), accelerator)
        builder, signal, teacher_head = cache.read_by(builder, checkpoints[1], accelerator.device)
        teacher = None  # it has said all that it is asked
        checks["teacher_cache"] = cache.told()
    if processes > 1:  # the same weights to begin with, but every process drops out by itself
        set_seed(recipe.seed, device_specific=True)
    return Job(
        recipe=recipe, prepared=prepared, accelerator=accelerator, student=student, teacher=teacher, signal=signal,
        builder=builder, model=model, objective=objective, optimizer=optimizer, schedule=schedule, total_steps=total,
        needs=needs, checks=checks, adapted=adapted, processes=processes, sharded=sharded,
        lengths=text_length_N,
        validation=validation_of(recipe, prepared, validated, student, accelerator), teacher_head=teacher_head,
        taught_by=checkpoints[1] if recipe.needs_teacher else None,
        teacher_s=cache.expected_s if cache is not None else 0.0,
    )  # fmt: skip


def load_teacher(recipe: Recipe, checkpoint: models.Checkpoint, processor: Any, device: Any) -> models.Loaded:
    """The teacher as the recipe wants it, on its device and in eval mode."""
    train = recipe.train
    loaded = models.load(
        checkpoint, dtype=train.teacher_dtype, processor=processor, signal=recipe.teacher_signal,
        bits=train.teacher_bits, device_map=train.teacher_device_map,
    )  # fmt: skip
    if not train.teacher_bits and not train.teacher_device_map:
        loaded.model.to(device)
    loaded.model.eval().requires_grad_(False)
    return loaded


def _check_method(recipe: Recipe, objective: Any, n_samples: int, parts: int) -> None:
    """What a method asks of the rest of the recipe; `parts`: batches of a step whose records can be related."""
    name, train, needs = recipe.effective_method, recipe.train, objective.needs
    rows = min(train.batch_size, n_samples)
    if rows < objective.least_rows:
        raise EvlecgError(f"{name} compares the records of a batch with one another: {rows} are too few",
                          where="train.batch_size", hint=f"at least {objective.least_rows}")  # fmt: skip
    parts = parts if train.batch_size < recipe.objective.records.least else 1
    if objective.relates_records and min(n_samples, train.batch_size * parts) < 2:
        raise EvlecgError("relations among records need several of them, and see one at a time",
                          where="train.batch_size", hint="at least 2, or train.accumulation=16 with "
                          "objective.records.least above 1; or objective.lambda_rec=0")  # fmt: skip
    if name == "evl" and not needs:
        raise EvlecgError("every distillation term weighs nothing, so that the teacher would not be read",
                          where="objective", hint="--method ce; or a weight: objective.lambda_rec=10, or, with strict, "
                          "those of --recipe paper")  # fmt: skip
    if recipe.train.compile and "attention" in needs:
        raise EvlecgError(f"{name} reads queries and keys inside a layer, which a compiled one does not show",
                          where="train.compile", hint="set train.compile=false")  # fmt: skip


def _teacher_answers(builder: Any, teacher: models.Loaded, progress: Progress) -> list:
    """The training samples with the teacher's own answers (sequence-level distillation, Kim and Rush 2016)."""
    from evlecg.models.score import Scorer

    free = [question.text for sample in builder.samples for question in sample.questions if len(question.choices) < 2]
    if free:
        raise EvlecgError(f"{len(free)} questions have no choices: seqkd lets the teacher choose among answers",
                          where="data.tasks", hint=f"yes_no or multiple_choice, not {free[0]!r}")  # fmt: skip
    scorer = Scorer(teacher, builder.prepared, builder.style, size_px=builder.teacher.size_px)
    scorer.prove(max(builder.samples[:64], key=lambda sample: len(sample.questions)))
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
