"""What of a model is trained, and in what form: parts by name, low-rank adapters, checkpointed gradients, quantisation.

A *part* is named the same way everywhere (`train.freeze`, `train.train_only`, `lora.targets`, `lora.full`):

- `vision`, `projector` or `language`: a role, found from the model's structure (`roles`);
- a glob over dotted module or parameter names, matched against any run of whole names: `vision_tower`, `layers.0`,
  `layers.*.self_attn`, `*norm*`;
- `re:` and a regular expression that is searched for in the full parameter name.

Functions here work on the meta device too, so that the memory estimate adapts its weightless model as the run does.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evlecg.errors import EvlecgError
from evlecg.models.load import Loaded
from evlecg.recipe import LoraConfig, TrainConfig, nearest

ROLES = ("vision", "projector", "language")
VISION_MODULES = ("vision_tower", "vision_model", "visual", "vision_encoder")
PROJECTOR_WORDS = ("projector", "connector", "merger", "aligner", "modality_projection")
TRAINED_FILE = "trained.safetensors"


def roles(model: nn.Module) -> dict[str, str]:
    """Parameter name -> one of `ROLES`; empty for a model without a language model.

    The language model is what `get_decoder` returns, with the output head. Of the rest, a module whose name says so is
    the projector, one under a name of `VISION_MODULES` is vision, and what is left stands between the two.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
    if decoder is None or decoder is model:
        return {}
    language = {id(parameter) for parameter in decoder.parameters()}
    head = model.get_output_embeddings()  # type: ignore[operator]
    language |= {id(parameter) for parameter in head.parameters()} if head is not None else set()
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parts = name.split(".")
        if id(parameter) in language:
            found[name] = "language"
        elif not any(word in part for part in parts for word in PROJECTOR_WORDS) and set(parts) & set(VISION_MODULES):
            found[name] = "vision"
        else:
            found[name] = "projector"
    return found


def part(model: nn.Module, pattern: str, *, key: str) -> list[str]:
    """Names of the parameters that a pattern means, tied ones under all their names.

    Args:
        model: the model.
        pattern: see the module's docstring.
        key: recipe key that it comes from, for the error.

    Raises:
        EvlecgError: it means none, or is no regular expression.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if pattern in ROLES:
        role = roles(model)
        found = [name for name in names if role.get(name) == pattern]
    else:
        try:
            expression = re.compile(pattern[3:] if pattern.startswith("re:") else _glob(pattern))
        except re.error as error:
            raise EvlecgError(f"{pattern!r} is no regular expression: {error}", where=key) from error
        found = [name for name in names if expression.search(name)]
    if not found:
        modules = {name for name, _ in model.named_modules() if name}
        known = modules | {name.rsplit(".", 1)[-1] for name in modules if not name.rsplit(".", 1)[-1].isdigit()}
        hint = nearest(pattern, known)
        if hint.startswith("known"):
            shallow = sorted(name for name in modules if name.count(".") < 2)
            hint = f"known: {', '.join((*ROLES, *shallow[:12]))}, ..."
        raise EvlecgError(f"{pattern!r} names no part of the model", where=key, hint=hint)
    return found


def _glob(pattern: str) -> str:
    """Regular expression of a glob that may begin and end at any dot."""
    body = fnmatch.translate(pattern).removeprefix("(?s:").removesuffix(r")\Z").removesuffix(r")\z")
    return rf"(?s:(?:^|\.){body}(?:\.|$))"


def _parts(model: nn.Module, patterns: Iterable[str], *, key: str) -> set[str]:
    return {name for pattern in patterns for name in part(model, pattern, key=key)}


def choose_trained(model: nn.Module, config: TrainConfig) -> None:
    """Sets `requires_grad` of every parameter as `train.train_only`, `train.freeze` and `train.freeze_vision` say.

    Raises:
        EvlecgError: a pattern that names nothing, or nothing left to train.
    """
    frozen = _parts(model, config.freeze, key="train.freeze")
    if config.freeze_vision:
        frozen |= _parts(model, ["vision"], key="train.freeze_vision")
    trained = _parts(model, config.train_only, key="train.train_only")
    still = {
        id(parameter)  # a tied weight is frozen when any of its names is
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name in frozen or (config.train_only and name not in trained and not _tied_in(model, parameter, trained))
    }
    for parameter in model.parameters():
        if id(parameter) in still:
            parameter.requires_grad_(False)
    _check_something_trains(model)


def _tied_in(model: nn.Module, parameter: nn.Parameter, names: set[str]) -> bool:
    """Whether a parameter also goes by one of the names."""
    return any(other is parameter for name, other in model.named_parameters(remove_duplicate=False) if name in names)


def _check_something_trains(model: nn.Module) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        hint = "train.freeze and train.train_only leave no parameter out"
        raise EvlecgError("nothing of the student is left to train", where="train.freeze", hint=hint)


def add_lora(loaded: Loaded, config: LoraConfig) -> Any:
    """Puts adapters into a model, in place, and freezes all but them and the fully trained parts.

    Args:
        loaded: the student; its model keeps its class and gains adapter layers.
        config: the recipe's section.

    Returns:
        The `PeftModel` around the same model: it saves and merges the adapters.

    Raises:
        EvlecgError: a pattern that names nothing, or parts that cannot be adapted.

    Source:
        Hu et al. 2022 (LoRA), through peft.
    """
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    model = loaded.model
    if not loaded.checkpoint.trained:
        raise EvlecgError("adapters need a trained model to stand beside", where=loaded.checkpoint.name,
                          hint="set lora.rank=0, or name a trained student")  # fmt: skip
    targeted = _parts(model, config.targets, key="lora.targets")
    head = model.get_output_embeddings()
    targets = [
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and f"{name}.weight" in targeted
    ]  # fmt: skip
    if not targets:
        raise EvlecgError("the parts to adapt hold no linear layer", where="lora.targets", hint="for example language")
    full = covering_modules(model, _parts(model, config.full, key="lora.full"))
    inside = next((name for name in targets if any(name == top or name.startswith(f"{top}.") for top in full)), None)
    if inside is not None:
        raise EvlecgError(f"{inside} is to be adapted and trained fully", where="lora.full", hint="choose one of them")
    peft_config = PeftConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets,  # type: ignore
        modules_to_save=full or None, use_rslora=config.rslora, use_dora=config.dora, bias="none",
    )  # fmt: skip
    weightless = next(model.parameters()).is_meta
    return get_peft_model(model, peft_config, low_cpu_mem_usage=weightless)


def covering_modules(model: nn.Module, names: set[str]) -> list[str]:
    """The fewest modules that hold exactly the named parameters.

    Raises:
        EvlecgError: a parameter that stands beside others in a module and so cannot be trained fully by itself, or one
            that is shared with a module outside.
    """
    owned = {
        prefix: {f"{prefix}.{name}" for name, _ in module.named_parameters(remove_duplicate=False)}
        for prefix, module in model.named_modules() if prefix
    }  # fmt: skip
    chosen: list[str] = []
    covered: set[str] = set()
    for prefix in sorted(owned, key=lambda name: (name.count("."), name)):
        if owned[prefix] and owned[prefix] <= names and not owned[prefix] <= covered:
            chosen.append(prefix)
            covered |= owned[prefix]
    loose = sorted(names - covered)
    objects = dict(model.named_parameters(remove_duplicate=False))
    inside = {id(objects[name]) for name in covered}
    shared = [name for name, parameter in objects.items() if id(parameter) in inside and name not in covered]
    if loose or shared:
        name = (loose or shared)[0]
        why = "it is not a module of its own" if loose else "its weight is shared with another module"
        raise EvlecgError(f"{name} cannot be trained beside adapters: {why}", where="lora.full",
                          hint="name a whole module that shares nothing")  # fmt: skip
    return chosen


def save_adapter(adapted: Any, folder: Path) -> None:
    """Adapters and fully trained parts in peft's layout: `PeftModel.from_pretrained(base, folder)` reads them."""
    adapted.save_pretrained(str(folder), save_embedding_layers=False)


def merge(adapted: Any) -> Any:
    """Folds the adapters into the weights and returns the plain model (the same object, without adapter layers)."""
    return adapted.merge_and_unload(safe_merge=True)


def checkpoint_gradients(loaded: Loaded) -> None:
    """Recomputes activations layer by layer in the backward pass instead of keeping them.

    Raises:
        EvlecgError: the family cannot.
    """
    if not loaded.model.supports_gradient_checkpointing:
        raise EvlecgError(f"family {loaded.checkpoint.model_type!r} cannot checkpoint gradients",
                          where="train.gradient_checkpointing", hint="set it to false")  # fmt: skip
    # not re-entrant: the other kind drops gradients where a layer's input needs none (frozen embeddings, adapters)
    loaded.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model's towers: the items of its outermost module lists, as far as they hold weights."""
    lists: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{above}.") for above in lists):
            lists[path] = module
    return [item for module in lists.values() for item in module if any(True for _ in item.parameters())]


def compile_layers(model: nn.Module) -> None:
    """Compiles every repeated layer, in place: what is read of a model between layers stays as it is."""
    for layer in layers(model):
        layer.compile()


def check_compiler(device: torch.device | str) -> None:
    """Compiles a line, so that a machine without a compiler is found out before models are loaded.

    Raises:
        EvlecgError: torch.compile does not work here.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:  # whatever torch's compiler and the system's raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise EvlecgError("torch.compile does not work on this machine", where="train.compile",
                          hint=f"install a C++ compiler, or set it to false ({lines[0] if lines else error!r})"
                          ) from error  # fmt: skip


def train_mode(model: nn.Module) -> None:
    """`model.train()`, but running statistics of frozen normalisation layers stay as they are."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(
            parameter.requires_grad for parameter in module.parameters()
        ):
            module.eval()


def save_trained_only(accelerator: Any, model: nn.Module) -> None:
    """From now on `accelerator.save_state` writes, and `load_state` reads, what of the model can change.

    That is: trained parameters and buffers, in `TRAINED_FILE`. Frozen weights are in the student's checkpoint already.
    """
    from safetensors.torch import load_file, save_file

    def state() -> dict[str, torch.Tensor]:
        names = set(model.state_dict())
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        return trained | {name: value for name, value in model.named_buffers() if name in names}

    def place(models: Sequence[Any]) -> int:
        return next(index for index, other in enumerate(models) if accelerator.unwrap_model(other) is model)

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        weights.pop(place(models))
        if accelerator.is_main_process:
            tensors = {name: value.detach().contiguous() for name, value in state().items()}
            save_file(tensors, Path(folder) / TRAINED_FILE)

    def load(models: list[Any], folder: str) -> None:
        models.pop(place(models))
        stored, own = load_file(Path(folder) / TRAINED_FILE), state()
        if set(stored) != set(own):
            name = sorted(set(stored) ^ set(own))[0]
            raise EvlecgError("the checkpoint holds other trained parts than the recipe names", where=folder,
                              hint=f"for example {name}")  # fmt: skip
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(stored[name])

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


@dataclass(frozen=True)
class Quantisation:
    """How a model's linear layers are quantised while they load.

    Attributes:
        library: "bitsandbytes" or "torchao".
        config: what transformers takes as `quantization_config`.
        bits: of a weight.
        modules: names of the layers.
    """

    library: str
    config: Any
    bits: int
    modules: tuple[str, ...]


def quantisation(weightless: Loaded, bits: int, *, compute_dtype: str) -> Quantisation:
    """Chooses a library that this machine has, and the layers: those of the language model, without its head.

    Vision tower and projector keep their precision: their outputs are what a student is compared with.

    Args:
        weightless: from `load.shapes`.
        bits: 8 or 4.
        compute_dtype: dtype of the arithmetic on 4-bit weights ("auto": as the config says).

    Raises:
        EvlecgError: no library for it, or no language model.
    """
    model = weightless.model
    language = set(part(model, "language", key="train.teacher_bits"))
    head = model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    modules = tuple(name for name, module in linear.items() if f"{name}.weight" in language and module is not head)
    others = [name for name in linear if name not in modules]
    if find_spec("bitsandbytes") is not None:
        from transformers import BitsAndBytesConfig

        dtype = (weightless.checkpoint.config.dtype or torch.float32) if compute_dtype == "auto" else compute_dtype
        if bits == 8:
            config: Any = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=others)
        else:
            config = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=others,
            )  # fmt: skip
        return Quantisation("bitsandbytes", config, bits, modules)
    if find_spec("torchao") is not None and bits == 8:
        from torchao.quantization import Int8WeightOnlyConfig  # type: ignore[import-not-found]
        from transformers import TorchAoConfig

        return Quantisation(
            "torchao", TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=others), bits, modules
        )
    have = "torchao has no 4-bit weights for every device" if find_spec("torchao") else "neither library is installed"
    raise EvlecgError(f"{bits}-bit weights need bitsandbytes (or torchao, for 8 bits): {have}",
                      where="train.teacher_bits", hint="pip install 'evlecg[quantised]'")  # fmt: skip
