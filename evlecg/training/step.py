"""One optimizer step, and the job that it is a step of."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from evlecg.data.store import Prepared
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

    def state_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]
        self.scales = state.get("scales", {})


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
    teacher_head: Any = None  # where a method reads it and the teacher is not loaded
    teacher_s: float = 0.0  # that the teacher still takes, where a dry run left records out


def step(job: Job, group: list[Any], state: Position, *, diagnose: bool, gradients: bool) -> dict[str, Any] | None:
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
                teacher_head=_teacher_head(job),
                ramp=_ramp(recipe.objective.warmup, state.step, job.total_steps),
                diagnose=diagnose and last,
            )
            if not bool(torch.isfinite(terms.total)):
                job.optimizer.zero_grad()
                return None
            balance = recipe.objective.balance != "none" and state.step % recipe.objective.balance_every == 0
            if last and balance:
                state.scales = balanced(state.scales, term_gradients(job, terms), terms.weights)
            terms = rescaled(terms, state.scales)
            if last and gradients:
                told["gradients"] = term_gradients(job, terms)
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


def _teacher_head(job: Job) -> Any:
    """The teacher's head as losses see it; None where they do not."""
    from evlecg.models.outputs import AnswerHead

    if job.teacher_head is not None or "heads" not in job.needs or job.teacher is None:
        return job.teacher_head
    return AnswerHead(job.teacher)


def term_gradients(job: Job, terms: Any) -> dict[str, float]:
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


def weak_terms(gradients: dict[str, float]) -> dict[str, float]:
    """Distillation terms below `WEAK_SHARE` of all terms' gradient norms on the student, with their shares."""
    total = sum(gradients.values())
    return {name: norm / total for name, norm in gradients.items() if name != "ce" and norm < WEAK_SHARE * total}


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


def loader(job: Job, batches: list[Any], epoch: int) -> Iterator[Any]:
    from torch.utils.data import DataLoader

    workers = job.recipe.train.workers
    places = range(len(job.builder.samples))
    builder = dataclasses.replace(job.builder, epoch=epoch)
    return iter(DataLoader(places, batch_sampler=batches, collate_fn=builder, num_workers=workers))  # type: ignore[arg-type]
