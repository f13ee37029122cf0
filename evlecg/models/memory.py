"""What a training step will take, told from configs alone, before any weight is read.

Nothing is guessed from formulas. The models are built without weights (`load.shapes`), adapted as the run will adapt
them (frozen parts, LoRA, checkpointing), and the run's own step is taken once on *pretended* tensors: they have shape,
dtype and device, and no data (PyTorch's fake tensors). A dispatch mode sees every operation and keeps count of the
storages that are alive, so that whatever the code keeps, recomputes, upcasts or frees is counted as it happens:
attention kernels, hidden states, logits, loss terms, gradients. Indices, masks and pixels of the batch are real, which
is what makes models run that look at them. AdamW's two states a weight are counted from the start.

Not counted: the interpreter and its libraries, what a kernel allocates for itself, fragmentation, and the loader's
processes. tests/bench/memory.py compares with measured peaks.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from evlecg.errors import EvlecgError
from evlecg.models.adapt import Quantisation

SCALE_SHARE = {8: 0.02, 4: 0.13}  # bytes of scales beside those of a quantised weight: one a row; one a block of 64
RESIDENT = 1.09  # bytes that a process takes over those of its tensors (tests.bench.memory)
# What glibc was found to hold at most, over that: it keeps freed blocks under 32 MiB for later. Telling it not to
# (MALLOC_MMAP_THRESHOLD_) made the same steps half as slow again, so it is left as it is, and its share told.
KEPT_BY_GLIBC = 1.7


@dataclass(frozen=True)
class ModelMemory:
    """One model's part, in bytes (`parameters` and `trained` are counts).

    Attributes:
        weights: as they will lie in memory.
        gradients, optimizer: of what is trained; zero for a teacher.
        activations: kept for the backward pass once the forward pass is over (a teacher keeps its outputs only).
        logits: the largest that its head gives in one call; part of `activations`.
        forward: the most that the forward pass holds at a time, weights apart.
    """

    name: str
    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    activations: int | None
    logits: int | None
    forward: int | None


@dataclass(frozen=True)
class MemoryEstimate:
    """What a step takes, in bytes.

    Attributes:
        student, teacher: the models' parts.
        inputs: the batch.
        losses: what the loss terms keep for the backward pass, aligner and projections (with their gradients and
            states) included.
        remembered: teacher's outputs that `train.remember_teacher` keeps.
        peak: the most that is alive at a time, all of the above included; None where the step could not be traced.
        at_least: weights, gradients and optimizer states: what is certain even then.
        rows: sequences in the batch, student's and teacher's.
        positions: their lengths.
        why_unknown: why the step could not be traced; empty where it was.
    """

    student: ModelMemory
    teacher: ModelMemory | None
    inputs: int
    losses: int | None
    remembered: int
    peak: int | None
    at_least: int
    rows: tuple[int, ...]
    positions: tuple[int, ...]
    why_unknown: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def needed(self) -> int:
        """Bytes to compare with what is free: what is alive at most, and what the allocator keeps beside it."""
        return self.at_least if self.peak is None else round(self.peak * RESIDENT)

    def table(self, free: int | None = None) -> tuple[list[str], list[list[str]]]:
        """Columns and rows for a reader."""
        models = [self.student, *([self.teacher] if self.teacher else [])]
        columns = ["", "student", *(["teacher"] if self.teacher else [])]
        counts = [
            ["parameters", *(f"{model.parameters:,}" for model in models)],
            ["  trained", *(f"{model.trained:,}" for model in models)],
            ["sequences x positions", *(f"{r} x {p}" for r, p in zip(self.rows, self.positions, strict=True))],
        ]
        parts = [
            [label, *(size_text(getattr(model, name)) for model in models)]
            for label, name in (
                ("weights", "weights"), ("gradients", "gradients"), ("optimizer states", "optimizer"),
                ("activations kept", "activations"), ("  of them logits", "logits"),
                ("forward pass, at most", "forward"),
            )
        ]  # fmt: skip
        shared = [["loss terms", size_text(self.losses)], ["batch", size_text(self.inputs)]]
        if self.remembered:
            shared.append(["remembered teacher", size_text(self.remembered)])
        total = "at least " + size_text(self.at_least) if self.peak is None else size_text(self.peak)
        shared.append(["largest during a step", total])
        if self.peak is not None:
            shared.append(["with the allocator's own", size_text(self.needed)])
        if free is not None:
            shared.append(["free", size_text(free)])
        return columns, [row + [""] * (len(columns) - len(row)) for row in counts + parts + shared]


def size_text(n_bytes: int | None) -> str:
    """Bytes for a reader: three digits and a binary unit."""
    if n_bytes is None:
        return "not known"
    size = float(n_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "B" else f"{n_bytes} B"
        size /= 1024
    return f"{size:.3g} GiB" if size < 1000 else f"{size:,.0f} GiB"


def pretend(module: nn.Module, device: torch.device | str) -> None:
    """Replaces every weight and buffer of a module, in place, by a tensor without data on the device."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, tuple[Tensor, Tensor]] = {}  # the original beside its stand-in: an id must not be used again

    def stand_in(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with mode:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            made[id(tensor)] = empty, tensor
        return made[id(tensor)][0]

    for part in module.modules():
        for held in (part._parameters, part._buffers, part.__dict__):
            for name, tensor in list(held.items()):
                if isinstance(tensor, Tensor):
                    held[name] = stand_in(tensor)  # type: ignore[index]


class _Census(TorchDispatchMode):
    """Counts the bytes of all storages alive, now and at most, by phases."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peaks: dict[str, int] = {}
        self.kept: dict[str, int] = {}
        self.grown: dict[str, int] = {}
        self.phase = ""
        self._known: set[int] = set()

    def enter(self, phase: str) -> None:
        """From now on peaks are this phase's; what is alive at its beginning is noted, and what the last one left."""
        if self.phase:
            self.grown[self.phase] = self.live - self.kept[self.phase]
        self.phase = phase
        self.kept[phase] = self.live
        self.peaks[phase] = self.live

    def add(self, tensors: Iterable[Tensor], *, n_bytes: int | None = None) -> int:
        """Counts tensors that are there already; `n_bytes` in place of what they look like. Returns what was new."""
        before = self.live
        for tensor in tensors:
            self._count(tensor)
        if n_bytes is not None:
            self.live = before + n_bytes
        return self.live - before

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return torch.ones((), dtype=args[0].dtype, device="cpu").item()  # a loss that is asked whether it is finite
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = (args[0], _numbered(args[1]), *args[2:])
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out


def _numbered(indices: Any) -> list[Any]:
    """Real boolean masks as index numbers: how many a mask selects decides a shape, and fake tensors cannot look."""
    found: list[Any] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            found += index.nonzero(as_tuple=True)
        else:
            found.append(index)
    return found


class Resting(torch.optim.Optimizer):
    """An optimizer that leaves its parameters alone: its states are counted, not made."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(list(parameters), {"lr": 0.0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Does nothing."""


def estimate(
    step: Callable[[], Any],
    *,
    student: nn.Module,
    teacher: nn.Module | None,
    objective: nn.Module,
    names: tuple[str, ...],
    inputs: tuple[dict[str, Any], ...],
    device: torch.device,
    quantised: Quantisation | None = None,
    teacher_elsewhere: bool = False,
    processes: int = 1,
    gradient_norms: bool = False,
    remembered: Callable[[int], int] | None = None,
) -> MemoryEstimate:
    """Takes a step on pretended tensors and counts.

    Args:
        step: one whole optimizer step (with a `Resting` optimizer) on the modules below, which `pretend` has seen.
        student, teacher, objective: what it calls.
        names: of the models, for the table.
        inputs: the models' keyword arguments in the batch.
        device: where the run will be.
        quantised: how the teacher's weights will be stored.
        teacher_elsewhere: the teacher's weights are spread over devices, and do not count on this one.
        processes: how many share the training; more than one keep gradients a second time, for their exchange.
        gradient_norms: whether the log takes every term's gradient by itself, beside the whole graph.
        remembered: bytes of a batch of teacher outputs -> bytes that the run will keep of all.
    """
    census = _Census()
    weights = census.add(student.parameters())
    census.add(student.buffers())
    teacher_bytes = 0
    if teacher is not None:
        teacher_bytes = _teacher_bytes(teacher, quantised)
        census.add(teacher.parameters(), n_bytes=0 if teacher_elsewhere else teacher_bytes)
        census.add(teacher.buffers())
    losses_own = census.add(objective.parameters())
    batch = census.add(tensor for side in inputs for tensor in tree_iter(side) if isinstance(tensor, Tensor))
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    gradients = sum(map(_bytes, trained))
    census.live += 2 * (gradients + losses_own)  # AdamW's states
    base = census.live
    logits = {"student": 0, "teacher": 0}
    known: dict[str, int] = {}
    given: list[int] = []
    why = ""
    with ExitStack() as stack:
        for role, model in (("student", student), ("teacher", teacher)):
            if model is not None:
                _watch(stack, census, role, model, logits)
        stack.callback(objective.register_forward_pre_hook(lambda *_: census.enter("losses")).remove)
        stack.callback(objective.register_forward_hook(lambda *_: census.enter("backward")).remove)
        _watch_outputs(stack, objective, given)
        try:
            with torch.random.fork_rng(devices=[]), census:
                step()
            known = _summary(census, teacher is not None) | {"teacher_outputs": max(given, default=0)}
        except EvlecgError:
            raise
        except Exception as error:  # a model that looks at values which are not there; every family its own way
            why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    kept = remembered(known["teacher_outputs"]) if remembered and known else 0
    at_least = base - batch + gradients + losses_own
    peak = None
    if known:
        # AdamW holds two more of the largest weight, and on a GPU, where it works on all at once, one more of each
        largest = max(map(_bytes, trained))
        update = base + gradients + losses_own + (gradients if device.type == "cuda" else 2 * largest)
        peak = max(known["peak"], update, known["graph"] + gradients if gradient_norms else 0)
        if quantised is not None and teacher is not None:
            peak = max(peak, known["teacher_peak"] + _largest_dequantised(teacher, quantised))
        peak += kept + (gradients if processes > 1 else 0)
    sides = [side["input_ids"].shape if "input_ids" in side else (len(next(iter(side.values()))), 0) for side in inputs]
    return MemoryEstimate(
        student=ModelMemory(
            names[0], _count_of(student), sum(parameter.numel() for parameter in trained), weights, gradients,
            2 * gradients, known.get("activations"), logits["student"] if known else None, known.get("forward"),
        ),
        teacher=None if teacher is None else ModelMemory(
            names[1], _count_of(teacher), 0, teacher_bytes, 0, 0, known.get("teacher_outputs"),
            logits["teacher"] if known else None, known.get("teacher_forward"),
        ),
        inputs=batch, losses=known["losses"] + 4 * losses_own if known else None, remembered=kept, peak=peak,
        at_least=at_least, rows=tuple(int(shape[0]) for shape in sides), positions=tuple(int(s[1]) for s in sides),
        why_unknown=why,
    )  # fmt: skip


def _watch(stack: ExitStack, census: _Census, role: str, model: Any, logits: dict[str, int]) -> None:
    """Phases around a model's forward pass, and the size of what its head gives."""
    before = model.register_forward_pre_hook(lambda *_: census.enter(role))
    stack.callback(before.remove)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None:

        def note(_module: Any, _arguments: Any, out: Any) -> None:
            logits[role] = max(logits[role], _bytes(out))

        watched = head.register_forward_hook(note)
        stack.callback(watched.remove)


def _watch_outputs(stack: ExitStack, objective: Any, given: list[int]) -> None:
    """Notes the bytes of what a teacher gave, where the objective reads it: in `forward` or in a first pass."""

    def note(arguments: Sequence[Any]) -> None:
        outputs = arguments[1] if len(arguments) > 1 else None
        if outputs is not None:
            held = [value for value in vars(outputs).values() if isinstance(value, Tensor)]
            logits = getattr(outputs.answer_logits, "states_AD", outputs.answer_logits)
            held += [logits, *outputs.attention.values()]
            given.append(sum({one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in held}.values()))

    stack.callback(objective.register_forward_pre_hook(lambda _, arguments: note(arguments)).remove)
    read = getattr(objective, "record_states", None)
    if read is not None:

        def noted(*arguments: Any) -> Any:
            note(arguments)
            return read(*arguments)

        objective.record_states = noted
        stack.callback(lambda: delattr(objective, "record_states"))


def _summary(census: _Census, has_teacher: bool) -> dict[str, int]:
    """What the phases of a step held."""
    found = {
        "peak": max(census.peaks.values()),
        "graph": census.kept["backward"],
        "forward": census.peaks["student"] - census.kept["student"],
        "activations": census.grown["student"],
        "losses": census.grown["losses"],
    }
    if has_teacher:
        found["teacher_peak"] = census.peaks["teacher"]
        found["teacher_forward"] = census.peaks["teacher"] - census.kept["teacher"]
    return found


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _count_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _teacher_bytes(teacher: nn.Module, quantised: Quantisation | None) -> int:
    plain = sum(_bytes(parameter) for parameter in teacher.parameters())
    if quantised is None:
        return plain
    weights = [teacher.get_parameter(f"{name}.weight") for name in quantised.modules]
    stored = sum(weight.numel() * quantised.bits / 8 * (1 + SCALE_SHARE[quantised.bits]) for weight in weights)
    return int(plain - sum(_bytes(weight) for weight in weights) + stored)


def _largest_dequantised(teacher: nn.Module, quantised: Quantisation) -> int:
    """One layer's weights as the arithmetic needs them."""
    return max(_bytes(teacher.get_submodule(name).weight) for name in quantised.modules)  # type: ignore[arg-type]


def free_bytes(device: torch.device) -> int:
    """What a new job may still take of the device's memory: free on a GPU; available to this process in RAM."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    free = int(psutil.virtual_memory().available)
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:  # a container's limit; what it holds of files can be given back
        inactive = _number(Path("/sys/fs/cgroup/memory.stat"), key="inactive_file") or 0
        free = min(free, limit - used + inactive)
    # processes of one machine take as much each
    return max(free, 0) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _number(path: Path, key: str | None = None) -> int | None:
    """A number that Linux keeps in a file, None where it keeps none."""
    try:
        text = path.read_text()
    except OSError:
        return None
    if key is not None:
        text = next((line.split()[1] for line in text.splitlines() if line.split()[0] == key), "")
    return int(text) if text.strip().isdigit() else None


@dataclass(frozen=True)
class Verdict:
    """An estimate beside what is free."""

    estimate: MemoryEstimate
    free: int
    device: str

    @property
    def fits(self) -> bool:
        return self.estimate.needed <= self.free

    @property
    def tight(self) -> bool:
        """Whether it fits, yet not with all that the C library may keep beside it."""
        return self.fits and self.device == "cpu" and self.estimate.needed * KEPT_BY_GLIBC > self.free

    def to_dict(self) -> dict[str, Any]:
        told = {"free": self.free, "device": self.device, "fits": self.fits, "tight": self.tight}
        return {**self.estimate.to_dict(), **told}

    def check(self, *, force: bool) -> None:
        """Raises where it cannot fit.

        Raises:
            EvlecgError: more is needed than is free, and `force` is not set.
        """
        if self.fits or force:
            return
        needs = f"{size_text(self.estimate.needed)} are needed on {self.device}, {size_text(self.free)} are free"
        hint = (
            "a smaller train.batch_size, train.gradient_checkpointing=true, lora.rank, train.teacher_dtype=bfloat16, "
            "train.teacher_bits; --force tries all the same"
        )
        raise EvlecgError(f"the run does not fit: {needs}", where=self.estimate.student.name, hint=hint)
