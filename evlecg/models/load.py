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
from evlecg.models.apart import Apart, apart_of, config_value, visual_width
from evlecg.models.families import Family, family_of
from evlecg.recipe import nearest
from evlecg.schema import ModelFacts

# name -> (folder inside evlecg/assets, whether its weights are used); an untrained one starts from the run's seed
BUILTIN: dict[str, tuple[str, bool]] = {
    "teacher": ("teacher", True),
    "teacher-untrained": ("teacher", False),
    "student": ("student", False),
}


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
        original: the original LLaVA layout that it is stored in (`llava_layout.Original`), None for transformers' own.
    """

    name: str
    source: str
    model_type: str
    config: Any
    trained: bool
    image_token_id: int
    width: int
    vocab_size: int
    original: Any = None

    @property
    def family(self) -> Family:
        """What is particular about its family."""
        return family_of(self.model_type)

    @property
    def apart(self) -> Apart | None:
        """How its image stands apart from its text; None where it does not."""
        return apart_of(self.config)


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
        return ModelFacts(self.checkpoint.width, self.checkpoint.vocab_size, visual_width(self.checkpoint.config))


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


def inspect(name: str) -> Checkpoint:
    """Reads a checkpoint's config only.

    Raises:
        EvlecgError: nothing there, not an image-text-to-text family, or one that cannot work (the reason is given).
    """
    from transformers import AutoConfig, PretrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    source, trained = resolve(name)
    original = None
    try:
        tree, _ = PretrainedConfig.get_config_dict(source)
        if tree.get("mm_vision_tower"):
            original = _original(tree, source, name)
        config = original.native if original is not None else AutoConfig.from_pretrained(source)
    except EvlecgError:
        raise
    except Exception as error:  # transformers raises many kinds here: OSError, ValueError, KeyError, hub errors
        raise EvlecgError("the checkpoint's config cannot be read", where=name, hint=_first_line(error)) from error
    if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise EvlecgError(
            f"{config.model_type!r} is not an image-text-to-text family of the installed transformers",
            where=name,
            hint="name a vision-language checkpoint",
        )
    family = family_of(config.model_type)
    if family.refused:
        raise EvlecgError(
            f"family {config.model_type!r} can be neither teacher nor student: it {family.refused}", where=name
        )
    image_token_id = config_value(config, family.image_token_id)
    row = apart_of(config)
    if image_token_id is None and row is not None and (row.visual or row.marks):
        image_token_id = -1  # its text holds no placeholder, and needs none
    if image_token_id is None:
        raise EvlecgError(
            f"family {config.model_type!r} has no image placeholder in its text",
            where=name,
            hint="models/apart.py holds the families that need none; this one has no row there",
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
        vocab_size=int(getattr(text, "unpadded_vocab_size", None) or text.vocab_size),
        original=original,
    )


def _original(tree: dict[str, Any], source: str, name: str) -> Any:
    """The translation of an original LLaVA config, None for any other."""
    from evlecg.models import llava_layout

    if not llava_layout.is_original(tree):
        return None
    with quiet():
        return llava_layout.translate(tree, llava_layout.load_tokenizer(source, name=name), name=name)


def load_processor(checkpoint: Checkpoint) -> Any:
    """The checkpoint's own processor, complete with image processor and tokenizer."""
    from transformers import AutoProcessor

    if checkpoint.original is not None:
        from evlecg.models import llava_layout

        with quiet():
            tokenizer = llava_layout.load_tokenizer(checkpoint.source, name=checkpoint.name)
        return llava_layout.build_processor(checkpoint.original, tokenizer)
    hint = "save the processor beside the model: processor.save_pretrained(FOLDER)"
    try:
        with quiet():
            processor = AutoProcessor.from_pretrained(checkpoint.source)
    except ImportError as error:
        message = "the checkpoint's processor needs a package"
        raise EvlecgError(message, where=checkpoint.name, hint=_first_line(error)) from error
    except Exception as error:
        raise EvlecgError("the checkpoint has no usable processor", where=checkpoint.name, hint=hint) from error
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise EvlecgError("the checkpoint has no processor for images and text", where=checkpoint.name, hint=hint)
    return processor


def load(checkpoint: Checkpoint, *, dtype: str = "float32", seed: int = 0) -> Loaded:
    """Loads weights and processor; a weight that is missing, left over or of another shape is an error.

    Args:
        checkpoint: from `inspect`.
        dtype: "float32", "bfloat16", "float16", or "auto" for the one the weights are stored in.
        seed: of the random weights of an untrained built-in.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    processor = load_processor(checkpoint)  # before the weights: the cheap thing fails first
    torch_dtype = "auto" if dtype == "auto" else getattr(torch, dtype)
    if not checkpoint.trained:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForImageTextToText.from_config(checkpoint.config, dtype=torch_dtype)
        return Loaded(checkpoint, model, processor)
    try:
        reader, source, given = AutoModelForImageTextToText, checkpoint.source, {}
        if checkpoint.original is not None:
            source, given = None, {"config": checkpoint.config, "state_dict": _original_weights(checkpoint)}
            reader = reader._model_mapping[type(checkpoint.config)]
        with quiet():
            model, info = reader.from_pretrained(  # type: ignore[misc]
                source, dtype=torch_dtype, use_safetensors=True, output_loading_info=True, **given
            )
    except EvlecgError:
        raise
    except Exception as error:
        hint = f"{_first_line(error)} (only safetensors are read)"
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


def _original_weights(checkpoint: Checkpoint) -> dict[str, Any]:
    from evlecg.models import llava_layout

    tensors = llava_layout.stored_tensors(checkpoint.source, name=checkpoint.name)
    return llava_layout.state_dict(checkpoint.original, tensors, name=checkpoint.name)


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
