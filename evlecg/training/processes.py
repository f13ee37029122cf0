"""Models on several processes: replicated (DDP), or in shards (FSDP2, DeepSpeed), as accelerate's config says.

The student goes to accelerate with its optimizer. The objective's own parameters (aligner, projections) are a few
matrices that train beside it: they stay whole on every process, and `step` averages their gradients. Where the student
is sharded they have an optimizer of their own, since a sharded one holds the shards of one model and nothing else.
"""

from __future__ import annotations

from typing import Any

from evlecg import launch
from evlecg.errors import EvlecgError
from evlecg.models.load import Loaded
from evlecg.recipe import Recipe
from evlecg.schema import Side

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


class Together:
    """Optimizers, or their schedules, that take their steps together."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def get_last_lr(self) -> list[float]:
        return [rate for part in self.parts for rate in part.get_last_lr()]

    def state_dict(self) -> dict[str, Any]:
        return {str(place): part.state_dict() for place, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for place, part in enumerate(self.parts):
            part.load_state_dict(state[str(place)])


def accelerator_of(recipe: Recipe) -> Any:
    """The accelerator of a run; what `accelerate launch` was told is in the environment.

    Raises:
        EvlecgError: a setting that this recipe cannot be run with.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    launch.join()
    # a step sums its batches itself (training/step.py): accelerate must not divide by their number as well
    accelerator = Accelerator(
        mixed_precision=recipe.train.mixed_precision, kwargs_handlers=[DistributedDataParallelKwargs()]
    )
    if is_sharded(accelerator):
        _check_sharded(accelerator, recipe)
    return accelerator


def is_sharded(accelerator: Any) -> bool:
    """Whether every process holds a part of the student's weights."""
    return accelerator.distributed_type.value in ("FSDP", "DEEPSPEED")


def _check_sharded(accelerator: Any, recipe: Recipe) -> None:
    if accelerator.distributed_type.value == "FSDP" and not accelerator.is_fsdp2:
        raise EvlecgError("FSDP of the first version is not supported", where="accelerate's config",
                          hint="fsdp_version: 2, as in recipes/accelerate/fsdp2-8x80gb.yaml")  # fmt: skip
    for given, where, why in (
        (recipe.lora.rank > 0, "lora.rank", "adapters cannot be merged into shards"),
        (recipe.objective.balance != "none", "objective.balance", "a term's gradient cannot be taken on shards"),
        (recipe.train.teacher_bits is not None, "train.teacher_bits", "quantised weights are not sharded"),
        (recipe.train.teacher_device_map is not None, "train.teacher_device_map", "the teacher is sharded already"),
    ):
        if given:
            raise EvlecgError(f"{why}, which accelerate's config asks for", where=where,
                              hint="leave it out, or use recipes/accelerate/ddp-8gpu.yaml")  # fmt: skip
    if accelerator.distributed_type.value == "DEEPSPEED":
        if recipe.train.accumulation > 1:
            raise EvlecgError("DeepSpeed counts batches itself", where="train.accumulation", hint="set it to 1")
        # it asks for the size of batches, and sees none
        accelerator.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = recipe.train.batch_size


def tell_unused(accelerator: Any, student: Loaded, side: Side) -> None:
    """Has DDP look for unused weights on every step where the student has some, and only there: looking takes time.

    A tower that is read one layer before its last has them, and a head that pools what is read unpooled; classifiers of
    signals leave layers out at random.

    Args:
        accelerator: from `accelerator_of`; its student is not prepared yet.
        student: on its device.
        side: its half of a batch.
    """
    import torch

    from evlecg.models.outputs import forward, to_device

    if accelerator.num_processes == 1 or is_sharded(accelerator):
        return
    trained = [parameter for parameter in student.model.parameters() if parameter.requires_grad]
    logits_AV = forward(student, to_device(side, accelerator.device)).answer_logits_AV
    found = torch.autograd.grad(logits_AV.float().sum(), trained, allow_unused=True)
    unused = any(gradient is None for gradient in found)
    accelerator.ddp_handler.find_unused_parameters = unused or student.checkpoint.kind != "text"


def prepared(accelerator: Any, recipe: Recipe, model: Any, objective: Any, *, total_steps: int) -> tuple[Any, Any, Any]:
    """Makes the optimizer and its schedule, and hands all to accelerate.

    Args:
        accelerator: from `accelerator_of`.
        recipe: the run.
        model: the student, on its device, with `requires_grad` set.
        objective: on the CPU; it is moved.
        total_steps: of the schedule.

    Returns:
        (model as it is to be called, optimizer, schedule); all that changes is registered for checkpoints.
    """
    from accelerate.utils import broadcast

    objective.to(accelerator.device)
    own = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    if accelerator.num_processes > 1:
        for parameter in own:
            parameter.data.copy_(broadcast(parameter.data))
    if not is_sharded(accelerator):
        optimizer = optimizer_of(recipe, model, objective)
        schedule = _schedule(recipe, optimizer, total_steps)
        model, optimizer = accelerator.prepare(model, optimizer)
        for part in ([objective] if own else []) + [schedule]:
            accelerator.register_for_checkpointing(part)
        return model, optimizer, schedule
    optimizer = optimizer_of(recipe, model, None)
    schedule = _schedule(recipe, optimizer, total_steps)
    if accelerator.is_fsdp2:
        _cut_at_layers(accelerator, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    if not own:
        accelerator.register_for_checkpointing(schedule)
        return model, optimizer, schedule
    beside = optimizer_of(recipe, None, objective)
    schedule = Together(schedule, _schedule(recipe, beside, total_steps))
    accelerator.register_for_checkpointing(objective, beside, schedule)
    return model, Together(optimizer, beside), schedule


def optimizer_of(recipe: Recipe, model: Any, objective: Any) -> Any:
    """AdamW over what is trained of student and objective; either may be None."""
    import torch

    train = recipe.train
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad] if model is not None else [], "lr": train.lr},
        {
            "params": list(objective.parameters()) if objective is not None else [],
            "lr": train.aligner_lr or train.lr,
        },
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=train.lr, weight_decay=train.weight_decay)


def _schedule(recipe: Recipe, optimizer: Any, total_steps: int) -> Any:
    from transformers import get_scheduler

    # it stays unwrapped: accelerate would step it once a process
    return get_scheduler(
        SCHEDULES[recipe.train.schedule], optimizer, num_warmup_steps=round(recipe.train.warmup * total_steps),
        num_training_steps=total_steps,
    )  # fmt: skip


def shard_teacher(accelerator: Any, model: Any) -> None:
    """Cuts a frozen teacher into shards as the student is cut, in place, where accelerate's config says FSDP2."""
    if not is_sharded(accelerator) or not accelerator.is_fsdp2:
        return
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    model.requires_grad_(False)
    _cut_at_layers(accelerator, model)
    fsdp2_prepare_model(accelerator, model)


def _cut_at_layers(accelerator: Any, model: Any) -> None:
    """Has accelerate's wrapping policy cut a model at its own layers: of two models it keeps the first one's names."""
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    from evlecg.models.adapt import layers

    plugin = accelerator.state.fsdp_plugin
    if getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy) is transformer_auto_wrap_policy:
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in layers(model)})


def whole_weights(accelerator: Any, model: Any) -> dict[str, Any] | None:
    """All weights of a sharded student on the main process (empty elsewhere); None where nothing is sharded.

    Every process has to call it. Tied weights come once, as transformers saves them.
    """
    if not is_sharded(accelerator):
        return None
    state = accelerator.get_state_dict(model)
    once = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    return {name: value for name, value in state.items() if name not in tied}
