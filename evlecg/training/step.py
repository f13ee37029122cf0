"""One optimizer step, and the job that it is a step of.

A step may have several parts: batches that are summed into it, on several processes. Every term is a mean over what its
masks leave, and parts rarely have the same number of that (answer tokens, positions, records with tokens on both
sides); the last ones of an epoch may have no record at all. So every term of a part weighs as its elements do, and the
step is the one that a single batch of all records would be. What it cannot be equal in: terms that compare the records
of a batch with one another (rkd; relations among records where a batch has `objective.records.least`), or take a
statistic over it (dskd; batch normalisation, whose running statistics a first pass moves once more); dropout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from evlecg.data.store import Prepared
from evlecg.errors import EvlecgError
from evlecg.models import load as models
from evlecg.recipe import Recipe

PROBE_RECORDS = 8  # the first training records: figures and spectra are taken from them
WEAK_SHARE = 0.01  # of the gradient; a term below it changes next to nothing


@dataclass
class Position:
    """Where a run stands; saved with every checkpoint."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch already read
    step: int = 0  # optimizer steps taken
    scales: dict[str, float] = dataclasses.field(default_factory=dict)  # of balanced terms
    skipped: int = 0  # batches (or groups of them) that moved nothing: their loss or gradient was not finite
    bad: int = 0  # how many of those came last, one after another
    validated: int = 0  # the step of the last evaluation on validation records
    best_step: int | None = None
    best_auc: float | None = None  # macro AUROC on validation records at `best_step`
    unimproved: int = 0  # evaluations since then


@dataclass(frozen=True)
class Job:
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
    processes: int = 1  # that share a step
    sharded: bool = False  # each holds a part of the weights: what runs a model must run it on all processes
    lengths: tuple[int, ...] | None = None  # of the samples' texts, where batches are cut by them
    validation: Any = None  # what scores validation records while training, where the recipe wants that
    taught_by: models.Checkpoint | None = None  # the teacher's checkpoint, loaded or not
    teacher_head: Any = None  # where a method reads it and the teacher is not loaded
    teacher_s: float = 0.0  # that the teacher still takes, where a dry run left records out


def step(job: Job, group: list[Any], state: Position, *, diagnose: bool, gradients: bool) -> dict[str, Any] | None:
    """One optimizer step over a group of batches; what to log of it.

    None where the loss or its gradient is not finite: then nothing has moved. (Under float16 a gradient that overflows
    is the scaler's business.)

    Gradient norms of terms are those of the group's first batch (on all processes), diagnostics those of the last batch
    on this process.
    """
    import torch

    from evlecg.losses.terms import balanced, rescaled, shared_out
    from evlecg.models.outputs import AnswerHead, forward, to_device

    recipe, accelerator = job.recipe, job.accelerator
    told: dict[str, Any] = {}
    gradients = gradients and not job.sharded  # a term's gradient by itself cannot be taken on shards
    shares = step_shares(job, group)
    across = relates_across(job, group)
    taught, company, draws = _first_pass(job, group) if across else ([], [None] * len(group), [])
    tells = diagnose or gradients
    sums: dict[str, Any] = {}
    total: Any = 0.0
    scales = state.scales
    for number, batch in enumerate(group, start=1):
        first, last = number == 1, number == len(group)
        batch = to_device(batch, accelerator.device)
        if across:
            _draw_again(draws[number - 1], accelerator.device)
        with contextlib.nullcontext() if last else accelerator.no_sync(job.model):
            with accelerator.autocast():
                outputs = forward(
                    job.student, batch.student, visual_layer=recipe.objective.visual_layer, model=job.model,
                    attention="attention" in job.needs,
                )  # fmt: skip
            terms = job.objective(
                outputs,
                taught[number - 1] if across else _taught(job, batch),
                batch,
                output_head=AnswerHead(job.student),
                teacher_head=_teacher_head(job),
                ramp=_ramp(recipe.objective.warmup, state.step, job.total_steps),
                diagnose=diagnose and last,
                company=company[number - 1],
            )
            if not all_finite(job, terms.total):
                job.optimizer.zero_grad()
                return None
            balance = recipe.objective.balance != "none" and state.step % recipe.objective.balance_every == 0
            if first and balance:
                state.scales = balanced(state.scales, term_gradients(job, terms, shares), terms.weights)
            terms = rescaled(terms, state.scales)
            if first and gradients:
                told["gradients"] = term_gradients(job, terms, shares)
            loss = terms.total if shares is None else shared_out(terms, shares.of[number - 1])
            accelerator.backward(loss)
            if tells:
                total = total + loss.detach()
                for name, value in terms.values.items():
                    part = value.detach() if shares is None else value.detach() * shares.of[number - 1][name]
                    sums[name] = sums[name] + part if name in sums else part
    average_gradients(job)
    parameters = [p for part in job.optimizer.param_groups for p in part["params"]]
    norm = accelerator.clip_grad_norm_(parameters, recipe.train.clip or math.inf)
    if norm is not None and accelerator.scaler is None and not bool(torch.isfinite(norm)):  # clipped, it is NaN
        job.optimizer.zero_grad()
        state.scales = scales
        return None
    rate = job.schedule.get_last_lr()[0]
    job.optimizer.step()
    job.schedule.step()
    job.optimizer.zero_grad()
    if tells:
        total, values = told_values(job, total, sums)
        weighted = {name: values[name] * terms.weights[name] for name in values}
        told |= {
            "lr": rate,
            "loss": total,
            "terms": values,
            "weighted": weighted,
            "grad_norm": float(norm),  # type: ignore
            "diagnostics": terms.diagnostics,
        }
    return told


def _taught(job: Job, batch: Any) -> Any:
    """The teacher's outputs for a batch; None where it is not read."""
    return job.signal(batch) if job.signal is not None else None


def relates_across(job: Job, group: list[Any]) -> bool:
    """Whether the records of all batches of a step are related with one another, since one batch holds few.

    Not where weights are sharded: with a first pass that no backward pass follows, FSDP2's processes waited for ever.
    """
    few = job.recipe.train.batch_size < job.recipe.objective.records.least and not job.sharded
    return job.objective.relates_records and few and len(group) * job.processes > 1


def _first_pass(job: Job, group: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """What relates the records of a step: one forward pass of the student over a group of batches, without gradient.

    Returns:
        For every batch what else the loss reads of the teacher, the company of its records (on several processes, the
        records of all), and where the random numbers stood: the second pass draws the same dropout.
    """
    import torch
    from accelerate.utils import gather_object

    from evlecg.models.outputs import forward, to_device
    from evlecg.schema import AnswerLogits

    device, layer = job.accelerator.device, job.recipe.objective.visual_layer
    taught, mine, draws = [], [], []
    for batch in group:
        batch = to_device(batch, device)
        draws.append(_random_state(device))
        with torch.no_grad():
            with job.accelerator.autocast():
                outputs = forward(job.student, batch.student, visual_layer=layer, model=job.model)
            teacher = job.signal(batch)
            states = job.objective.record_states(outputs, teacher, batch)
        mine.append(states if batch.counted else None)
        if job.objective.reads_teacher_beside_records:  # without inputs and head: all pixels at once are too many
            side, logits = dataclasses.replace(teacher.side, inputs={}), AnswerLogits(teacher.answer_logits.states_AD)
            taught.append(dataclasses.replace(teacher, side=side, answer_logits=logits))
        else:
            taught.append(None)
    everyone, rank = [mine], job.accelerator.process_index if job.processes > 1 else 0
    if job.processes > 1:
        everyone = gather_object([[states and states.to("cpu") for states in mine]])
        everyone = [[states and states.to(device) for states in one] for one in everyone]
    places = [(process, number) for process, one in enumerate(everyone) for number, states in enumerate(one) if states]
    parts = [everyone[process][number] for process, number in places]
    own = [places.index((rank, number)) if states else None for number, states in enumerate(mine)]
    return taught, job.objective.in_company(parts, own), draws


def _random_state(device: Any) -> tuple[Any, Any]:
    """Where torch's random numbers stand, on the CPU and on the device."""
    import torch

    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _draw_again(state: tuple[Any, Any], device: Any) -> None:
    import torch

    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


@dataclass(frozen=True)
class Shares:
    """How much of every term's mean each part of a step is; over all parts they come to the number of processes.

    Attributes:
        of: of every batch of the group, by term.
        first: the same with the group's first batch as the whole step.
    """

    of: list[dict[str, Any]]
    first: dict[str, Any]


def step_shares(job: Job, group: list[Any]) -> Shares | None:
    """What this process's batches weigh in the step; None where the step is one batch."""
    import torch

    from evlecg.models.outputs import to_device

    if len(group) * job.processes == 1:
        return None
    counts, across = [], relates_across(job, group)
    for batch in group:
        # the inputs (pixels) are not counted, and would all be on the device at once
        sides = {role: getattr(batch, role) for role in ("student", "teacher")}
        sides = {role: dataclasses.replace(side, inputs={}) for role, side in sides.items() if side is not None}
        counted = job.objective.counts(to_device(dataclasses.replace(batch, **sides), job.accelerator.device),
                                       across=across)  # fmt: skip
        counts.append({name: count.float() * batch.counted for name, count in counted.items()})
    names = list(counts[0])
    count_GK = torch.stack([torch.stack([part[name] for name in names]) for part in counts])
    total_GK = job.accelerator.reduce(count_GK, "sum") if job.processes > 1 else count_GK
    share_GK = job.processes * count_GK / total_GK.sum(0).clamp_min(1)
    first_K = job.processes * count_GK[0] / total_GK[0].clamp_min(1)
    return Shares([dict(zip(names, share_K, strict=True)) for share_K in share_GK.unbind()],
                  dict(zip(names, first_K.unbind(), strict=True)))  # fmt: skip


def all_finite(job: Job, loss: Any) -> bool:
    """Whether a loss is finite on every process: they must skip a step together, or wait for one another for ever."""
    import torch

    finite = torch.isfinite(loss)
    if job.processes > 1:
        return bool(job.accelerator.reduce(finite.float(), "sum") == job.processes)
    return bool(finite)


def average_gradients(job: Job) -> None:
    """Averages the gradients of the objective's own parameters over the processes: no wrapper of a model does it."""
    import torch

    own = [parameter for parameter in job.objective.parameters() if parameter.requires_grad]
    if job.processes == 1 or not own:
        return
    given = [torch.zeros_like(p) if p.grad is None else p.grad for p in own]
    mean = job.accelerator.reduce(torch.cat([gradient.flatten() for gradient in given]), "mean")
    for parameter, gradient in zip(own, mean.split([p.numel() for p in own]), strict=True):
        parameter.grad = gradient.view_as(parameter).clone()


def told_values(job: Job, total: Any, sums: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """The loss of a whole step and its terms, from this process's parts of them."""
    import torch

    if job.processes == 1:
        return float(total), {name: float(value) for name, value in sums.items()}
    mean = job.accelerator.reduce(torch.stack([value.float() for value in (total, *sums.values())]), "mean").tolist()
    return mean[0], dict(zip(sums, mean[1:], strict=True))


def _teacher_head(job: Job) -> Any:
    """The teacher's head as losses see it; None where they do not."""
    from evlecg.models.outputs import AnswerHead

    if job.teacher_head is not None or "heads" not in job.needs or job.teacher is None:
        return job.teacher_head
    return AnswerHead(job.teacher)


def term_gradients(job: Job, terms: Any, shares: Shares | None = None) -> dict[str, float]:
    """Norm on the student of every weighted term's gradient; over all processes, that of the batches' common mean."""
    import torch

    parameters = [parameter for parameter in job.student.model.parameters() if parameter.requires_grad]
    norms = {}
    for name, value in terms.values.items():
        if not value.requires_grad:
            continue
        weight = terms.weights[name]
        if job.processes > 1 and shares is not None:
            weight = weight * shares.first[name]
        found = torch.autograd.grad(value * weight, parameters, retain_graph=True, allow_unused=True)
        if job.processes > 1:  # each holds a part of the sum, and all must balance alike
            found = [
                job.accelerator.reduce(torch.zeros_like(p) if g is None else g, "mean")
                for p, g in zip(parameters, found, strict=True)
            ]
        norms[name] = math.sqrt(sum(float(g.float().square().sum()) for g in found if g is not None))
    return norms


def weak_terms(gradients: dict[str, float]) -> dict[str, float]:
    """Distillation terms below `WEAK_SHARE` of all terms' gradient norms on the student, with their shares.

    The anchor is none of them: it moves the aligner only.
    """
    total, exempt = sum(gradients.values()), ("ce", "anchor")
    return {name: norm / total for name, norm in gradients.items() if name not in exempt and norm < WEAK_SHARE * total}


def _ramp(warmup: float, step: int, total: int) -> float:
    """Share of the distillation terms' weight at a step."""
    return min(1.0, (step + 1) / max(1.0, warmup * total))


def grouped(batches: Iterator[Any], size: int) -> Iterator[list[Any]]:
    group: list[Any] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def batches_of(job: Job, epoch: int) -> list[Any]:
    """This process's batches of an epoch, as indices of samples."""
    from evlecg.models.batch import epoch_batches

    train, accelerator = job.recipe.train, job.accelerator
    return epoch_batches(
        len(job.builder.samples), train.batch_size, seed=job.recipe.seed, epoch=epoch,
        process=accelerator.process_index, processes=job.processes, lengths=job.lengths, bucket=train.bucket,
    )  # fmt: skip


def loader(job: Job, batches: list[Any], epoch: int) -> Iterator[Any]:
    """Batches of an epoch, drawn and encoded in `train.workers` processes.

    Raises:
        EvlecgError: what a record raised, wherever it was read.
    """
    import torch
    from torch.utils.data import DataLoader

    workers = job.recipe.train.workers
    places = range(len(job.builder.samples))
    builder = _Carrying(dataclasses.replace(job.builder, epoch=epoch))
    # a generator of its own: a loader draws a seed for its workers, and from torch's that would be one draw more in a
    # run that is resumed in mid-epoch
    read = DataLoader(places, batch_sampler=batches, collate_fn=builder, num_workers=workers,  # type: ignore[arg-type]
                      generator=torch.Generator())  # fmt: skip
    for batch in read:
        if isinstance(batch, EvlecgError):
            raise batch
        yield batch


@dataclass(frozen=True)
class _Carrying:
    """A batch builder whose errors come home from a worker as they are: torch would send their traceback as a text."""

    builder: Any

    def __call__(self, indices: Any) -> Any:
        try:
            return self.builder(indices)
        except EvlecgError as error:
            return error
