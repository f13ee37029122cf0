"""Any checkpoint: found, inspected from its config alone, then loaded with every weight accounted for."""

from __future__ import annotations

import hashlib
import inspect as python_inspect
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from evlecg.errors import EvlecgError
from evlecg.files import sha256_file
from evlecg.recipe import nearest
from evlecg.schema import ModelFacts

# name -> (folder inside evlecg/assets, whether its weights are used); an untrained one starts from the run's seed
BUILTIN: dict[str, tuple[str, bool]] = {
    "teacher": ("teacher", True),
    "teacher-untrained": ("teacher", False),
    "student": ("student", False),
}


PICKLED = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint's config says, known before any weight is read.

    Attributes:
        name: what the user typed.
        source: local folder or hub id that transformers reads.
        model_type: transformers' family name.
        config: transformers config.
        trained: False for a built-in architecture that starts from seeded random weights.
        image_token_id: id of the placeholder whose positions hold visual tokens.
        width: hidden size of the language model.
        vocab_size: rows of the output head.
        trust_remote_code: whether Python code that the checkpoint brings along may run.
        allow_pickle: whether its weights may be read from pickle files.
    """

    name: str
    source: str
    model_type: str
    config: Any
    trained: bool
    image_token_id: int
    width: int
    vocab_size: int
    trust_remote_code: bool = False
    allow_pickle: bool = False


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory: transformers model and processor."""

    checkpoint: Checkpoint
    model: Any
    processor: Any

    @property
    def forward_keys(self) -> frozenset[str]:
        """Names of the model's forward arguments."""
        return frozenset(python_inspect.signature(type(self.model).forward).parameters)

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def facts(self) -> ModelFacts:
        """What an objective has to know."""
        return ModelFacts(self.checkpoint.width, self.checkpoint.vocab_size)


def resolve(name: str) -> tuple[str, bool]:
    """Where a checkpoint's files are: a built-in, a run folder (its student), a folder, or a hub id.

    Returns:
        (folder or hub id, whether its weights are to be read).
    """
    if name.startswith("builtin:"):
        key = name.removeprefix("builtin:")
        if key not in BUILTIN:
            raise EvlecgError(f"unknown built-in model {key!r}", hint=nearest(key, BUILTIN))
        folder, trained = BUILTIN[key]
        return str(resources.files("evlecg") / "assets" / folder), trained
    path = Path(name)
    if (path / "student" / "config.json").is_file():
        return str(path / "student"), True
    if path.is_dir():
        if not (path / "config.json").is_file():
            hint = "a checkpoint folder holds config.json, weights and a processor; a run folder holds student/"
            raise EvlecgError("the folder holds no model", where=name, hint=hint)
        return name, True
    if path.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") != 1:
        raise EvlecgError("no such checkpoint", where=name, hint="give a folder, a hub id (owner/name) or builtin:NAME")
    return name, True


def inspect(name: str, *, trust_remote_code: bool = False, allow_pickle: bool = False) -> Checkpoint:
    """Reads a checkpoint's config only.

    Args:
        name: folder, run folder, hub id or builtin:NAME.
        trust_remote_code: run the Python code that it brings along, where transformers has none for it.
        allow_pickle: read its weights from pickle files where it has no safetensors.

    Raises:
        EvlecgError: nothing there, not an image-text-to-text family, no image placeholder; or it needs one of the two
            permissions and did not get it.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    source, trained = resolve(name)
    if not trust_remote_code:
        _refuse_remote_code(name, source)
    if trained and not allow_pickle:
        _refuse_pickle(name, Path(source))
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds here: OSError, ValueError, KeyError, hub errors
        raise EvlecgError("the checkpoint's config cannot be read", where=name, hint=_first_line(error)) from error
    if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise EvlecgError(
            f"{config.model_type!r} is not an image-text-to-text family of the installed transformers",
            where=name,
            hint="name a vision-language checkpoint",
        )
    image_token_id = getattr(config, "image_token_id", None)
    if image_token_id is None:
        raise EvlecgError(
            f"family {config.model_type!r} has no image placeholder in its text",
            where=name,
            hint="only early-fusion families are supported so far",
        )
    text = config.get_text_config()
    return Checkpoint(
        name=name,
        source=source,
        model_type=config.model_type,
        config=config,
        trained=trained,
        image_token_id=int(image_token_id),
        width=int(text.hidden_size),
        vocab_size=int(text.vocab_size),
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )


def _refuse_remote_code(name: str, source: str) -> None:
    """An error where the config's class lives in the checkpoint's own Python files and nowhere else."""
    from transformers import PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        tree, _ = PretrainedConfig.get_config_dict(source)
    except Exception:  # the reader that follows says what is wrong with it
        return
    code = (tree.get("auto_map") or {}).get("AutoConfig")
    if code and tree.get("model_type") not in CONFIG_MAPPING:
        raise EvlecgError(
            f"the checkpoint brings Python code of its own ({code}), which is not run unasked",
            where=name,
            hint="read that code, then add --trust-remote-code (recipe key trust_remote_code)",
        )


def _refuse_pickle(name: str, folder: Path) -> None:
    """An error where a local checkpoint has pickled weights only."""
    pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
    if pickled and not any(folder.glob("*.safetensors")):
        raise EvlecgError(
            f"the checkpoint's weights are pickled ({pickled[0]}); only safetensors are read",
            where=name,
            hint="convert them to safetensors, or add --allow-pickle (recipe key allow_pickle)",
        )


def load_processor(checkpoint: Checkpoint) -> Any:
    """The checkpoint's own processor, complete with image processor and tokenizer."""
    from transformers import AutoProcessor

    hint = "save the processor beside the model: processor.save_pretrained(FOLDER)"
    try:
        with quiet():
            processor = AutoProcessor.from_pretrained(checkpoint.source, trust_remote_code=checkpoint.trust_remote_code)
    except Exception as error:
        raise EvlecgError("the checkpoint has no usable processor", where=checkpoint.name, hint=hint) from error
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise EvlecgError("the checkpoint has no processor for images and text", where=checkpoint.name, hint=hint)
    return processor


def load(
    checkpoint: Checkpoint,
    *,
    dtype: str = "float32",
    seed: int = 0,
    processor: Any = None,
    bits: int | None = None,
    device_map: str | None = None,
) -> Loaded:
    """Loads weights and processor; a weight that is missing, left over or of another shape is an error.

    Args:
        checkpoint: from `inspect`.
        dtype: "float32", "bfloat16", "float16", or "auto" for the one the weights are stored in.
        seed: of the random weights of an untrained built-in.
        processor: the checkpoint's, where it has been read already.
        bits: 8 or 4 to quantise the linear layers of the language model while they load.
        device_map: how accelerate spreads the layers over devices ("auto", "cpu", ...); None: all on the CPU.

    Raises:
        EvlecgError: no usable processor, no library that quantises, or weights that do not fit the config.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    from evlecg.models.adapt import quantisation

    processor = processor or load_processor(checkpoint)  # before the weights: the cheap thing fails first
    torch_dtype = "auto" if dtype == "auto" else getattr(torch, dtype)
    if not checkpoint.trained:
        if bits is not None:
            raise EvlecgError("an untrained model is not quantised", where=checkpoint.name)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForImageTextToText.from_config(checkpoint.config, dtype=torch_dtype)
        return Loaded(checkpoint, model, processor)
    options: dict[str, Any] = {"device_map": device_map} if device_map else {}
    if bits is not None:
        options["quantization_config"] = quantisation(shapes(checkpoint), bits, compute_dtype=dtype).config
    try:
        with quiet():
            model, info = AutoModelForImageTextToText.from_pretrained(  # type: ignore[misc]
                checkpoint.source, dtype=torch_dtype, output_loading_info=True,
                use_safetensors=None if checkpoint.allow_pickle else True,  # None: safetensors where there are any
                weights_only=True, trust_remote_code=checkpoint.trust_remote_code, **options,
            )  # fmt: skip
    except Exception as error:
        hint = _first_line(error) + ("" if checkpoint.allow_pickle else " (only safetensors are read)")
        raise EvlecgError("the checkpoint's weights cannot be loaded", where=checkpoint.name, hint=hint) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in info.get(kind) or ())
        if keys:
            raise EvlecgError(
                f"{len(keys)} weights are {kind.removesuffix('_keys')}: {', '.join(keys[:3])}"
                + (" ..." if len(keys) > 3 else ""),
                where=checkpoint.name,
                hint="a model with random weights must not pass as trained; check config.json against the weights",
            )
    return Loaded(checkpoint, model, processor)


def shapes(checkpoint: Checkpoint, *, dtype: str = "float32") -> Loaded:
    """The model without weights: every parameter has its shape and lies on the meta device.

    Args:
        checkpoint: from `inspect`.
        dtype: as in `load`; "auto" is the one its config names.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    torch_dtype = (checkpoint.config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    with quiet(), torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            checkpoint.config, dtype=torch_dtype, trust_remote_code=checkpoint.trust_remote_code
        )
    return Loaded(checkpoint, model, None)


def weights_hash(checkpoint: Checkpoint) -> str | None:
    """SHA-256 over a local checkpoint's safetensors files, None for a hub id or untrained weights."""
    files = sorted(Path(checkpoint.source).glob("*.safetensors")) if checkpoint.trained else []
    if not files:
        return None
    return hashlib.sha256("".join(f"{file.name} {sha256_file(file)}\n" for file in files).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class quiet:
    """transformers' own bars and advice stay off the user's screen while a model loads."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *exception: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self.verbosity)
        if os.environ.get("TRANSFORMERS_VERBOSITY"):
            logging.enable_progress_bar()
