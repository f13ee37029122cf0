"""Any checkpoint: found, inspected from its config alone, then loaded with every weight accounted for."""

from __future__ import annotations

import hashlib
import inspect as python_inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from evlecg.errors import EvlecgError
from evlecg.files import sha256_file
from evlecg.models.apart import Apart, apart_of, config_value, visual_width
from evlecg.models.families import Family, family_of
from evlecg.models.kinds import ANSWERS, kind_of, needs_remote_code, read_config, signal_form
from evlecg.models.labels import label_codes
from evlecg.models.reshape import reshaped
from evlecg.models.trained import trained_with
from evlecg.page.trace import TraceForm
from evlecg.recipe import SignalConfig, nearest
from evlecg.schema import ModelFacts

# name -> (folder inside evlecg/assets, whether its weights are used); an untrained one starts from the run's seed
BUILTIN: dict[str, tuple[str, bool]] = {
    "teacher": ("teacher", True),
    "teacher-untrained": ("teacher", False),
    "teacher-qwen2vl": ("teacher-qwen2vl", True),
    "teacher-qwen2vl-untrained": ("teacher-qwen2vl", False),
    "student": ("student", False),
    "student-internvl": ("student-internvl", False),
    "student-signal": ("student-signal", False),
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
        trained: False where it starts from seeded random weights: a built-in architecture, or a config with keys set.
        image_token_id: id of the placeholder whose positions hold visual tokens.
        width: hidden size of the language model.
        vocab_size: rows of the output head.
        original: the original LLaVA layout that it is stored in (`llava_layout.Original`), None for transformers' own.
        kind: "text", "image" or "signal" (see `models.kinds`); of the others, `image_token_id` is -1, `width` 0 (known
            once the model is there) and `vocab_size` 2: yes and no.
        model_class: transformers' class of a classifier; empty for an encoder without a head.
        labels: of a classifier, the label code of each row of its head, None where the vocabulary does not know it.
        trust_remote_code: its own Python files may be run.
        allow_pickle: its weights may be read from pickle files.
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
    kind: str = "text"
    model_class: str = ""
    labels: tuple[str | None, ...] = ()
    trust_remote_code: bool = False
    allow_pickle: bool = False

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
    """A checkpoint in memory: transformers model (a `Classifier` around it, where it is one) and processor.

    Attributes:
        processor: for images and text; of a classifier its image processor, or feature extractor (None: it has none).
        form: what a model that reads signals wants of them; None for all others.
    """

    checkpoint: Checkpoint
    model: Any
    processor: Any
    form: TraceForm | None = None

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
        if self.checkpoint.kind != "text":
            return self.model.facts
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


def inspect(
    name: str,
    *,
    kind: str = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    settings: Sequence[str] = (),
) -> Checkpoint:
    """Reads a checkpoint's config only.

    Args:
        name: folder, run folder, hub id or builtin:NAME.
        kind: "text", "image", "signal", or "auto" where the config is to decide.
        trust_remote_code: run the Python code that it brings along, where transformers has none for it.
        allow_pickle: read its weights from pickle files where it has no safetensors.
        settings: keys of the config to set (`models.reshape`); the model then starts from seeded random weights.

    Raises:
        EvlecgError: nothing there, a family of no known kind, one that cannot work (the reason is given), or a
            checkpoint that needs one of the two permissions and did not get it.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    source, trained = resolve(name)
    trained = trained and not settings
    if trained and not allow_pickle:
        _refuse_pickle(name, Path(source))
    original = None
    try:
        raw = read_config(source)
        original = _original(raw, source, name) if raw.get("mm_vision_tower") else None
        remote = original is None and needs_remote_code(raw)
        if remote and not trust_remote_code:
            raise EvlecgError(
                "the checkpoint brings Python code of its own, which is not run unasked", where=name,
                hint="read that code, then add --trust-remote-code (recipe key trust_remote_code)",
            )  # fmt: skip
        found = kind_of(source, raw, kind, where=name) if original is None else None
        if original is not None:
            if settings:
                raise EvlecgError("the original LLaVA layout keeps its shape", where="student_config",
                                  hint="a checkpoint in transformers' own layout")  # fmt: skip
            config = original.native
        else:
            config = AutoConfig.from_pretrained(source, trust_remote_code=remote)
            config = reshaped(config, settings) if settings else config
    except EvlecgError:
        raise
    except Exception as error:  # transformers raises many kinds here: OSError, ValueError, KeyError, hub errors
        raise EvlecgError("the checkpoint's config cannot be read", where=name, hint=_first_line(error)) from error
    if found is not None and found.name != "text":
        return Checkpoint(
            name=name, source=source, model_type=config.model_type, config=config, trained=trained, image_token_id=-1,
            width=0, vocab_size=len(ANSWERS), kind=found.name, model_class=found.model_class, trust_remote_code=remote,
            labels=label_codes(dict(config.id2label or {}), trained_with(Path(source)).labels),
        )  # fmt: skip
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
        trust_remote_code=remote,
        allow_pickle=allow_pickle,
    )


def _original(tree: dict[str, Any], source: str, name: str) -> Any:
    """The translation of an original LLaVA config, None for any other."""
    from evlecg.models import llava_layout

    if not llava_layout.is_original(tree):
        return None
    with quiet():
        return llava_layout.translate(tree, llava_layout.load_tokenizer(source, name=name), name=name)


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

    if checkpoint.original is not None:
        from evlecg.models import llava_layout

        with quiet():
            tokenizer = llava_layout.load_tokenizer(checkpoint.source, name=checkpoint.name)
        return llava_layout.build_processor(checkpoint.original, tokenizer)
    hint = "save the processor beside the model: processor.save_pretrained(FOLDER)"
    try:
        with quiet():
            processor = AutoProcessor.from_pretrained(checkpoint.source, trust_remote_code=checkpoint.trust_remote_code)
    except ImportError as error:
        message = "the checkpoint's processor needs a package"
        raise EvlecgError(message, where=checkpoint.name, hint=_first_line(error)) from error
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
    labels: tuple[str, ...] = (),
    signal: SignalConfig | None = None,
    processor: Any = None,
    bits: int | None = None,
    device_map: str | None = None,
) -> Loaded:
    """Loads weights and processor; a weight that is missing, left over or of another shape is an error.

    Args:
        checkpoint: from `inspect`.
        dtype: "float32", "bfloat16", "float16", or "auto" for the one the weights are stored in.
        seed: of the random weights of an untrained model, and of a classifier's new head.
        labels: what a classifier that is to be trained has to tell apart; others ignore it.
        signal: how signals are to enter a model that reads them; None: as the checkpoint says.
        processor: the checkpoint's, where it has been read already.
        bits: 8 or 4 to quantise the linear layers of the language model while they load.
        device_map: how accelerate spreads the layers over devices ("auto", "cpu", ...); None: all on the CPU.

    Raises:
        EvlecgError: no usable processor, no library that quantises, or weights that do not fit the config.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    from evlecg.models.adapt import quantisation

    if checkpoint.kind != "text":
        if bits is not None:
            raise EvlecgError("classifiers are not quantised", where=checkpoint.name, hint="leave the bits out")
        return _load_classifier(checkpoint, dtype, seed, labels, signal)
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
        reader: Any = AutoModelForImageTextToText
        source: Any = checkpoint.source
        given: dict[str, Any] = {}
        if checkpoint.original is not None:
            source, given = None, {"config": checkpoint.config, "state_dict": _original_weights(checkpoint)}
            reader = reader._model_mapping[type(checkpoint.config)]
        with quiet():
            model, info = reader.from_pretrained(  # type: ignore[misc]
                source, dtype=torch_dtype, output_loading_info=True,
                use_safetensors=None if checkpoint.allow_pickle else True,  # None: safetensors where there are any
                weights_only=True, trust_remote_code=checkpoint.trust_remote_code, **given, **options,
            )  # fmt: skip
    except EvlecgError:
        raise
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


def _original_weights(checkpoint: Checkpoint) -> dict[str, Any]:
    from evlecg.models import llava_layout

    tensors = llava_layout.stored_tensors(checkpoint.source, name=checkpoint.name)
    return llava_layout.state_dict(checkpoint.original, tensors, name=checkpoint.name)


def _load_classifier(
    checkpoint: Checkpoint, dtype: str, seed: int, labels: tuple[str, ...], signal: SignalConfig | None
) -> Loaded:
    import torch

    from evlecg.models.classifier import load_classifier

    processor, form = _classifier_processor(checkpoint), None
    if checkpoint.kind == "signal":
        said = [item for item in (signal, trained_with(Path(checkpoint.source)).signal) if item is not None]
        form = signal_form(checkpoint.config, processor, said, where=checkpoint.name)
    torch_dtype = "auto" if dtype == "auto" else getattr(torch, dtype)
    try:
        with quiet():
            model = load_classifier(checkpoint, torch_dtype=torch_dtype, seed=seed, labels=labels,
                                    leads=form.leads if form else "")  # fmt: skip
    except EvlecgError:
        raise
    except Exception as error:  # as below: transformers raises many kinds here
        hint = f"{_first_line(error)} (only safetensors are read)"
        raise EvlecgError("the checkpoint's weights cannot be loaded", where=checkpoint.name, hint=hint) from error
    return Loaded(checkpoint, model, processor, form)


def _classifier_processor(checkpoint: Checkpoint) -> Any:
    """Image processor of a model of pages (an error where there is none), feature extractor of a model of signals."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    try:
        with quiet():
            if checkpoint.kind == "image":
                return _uncropped(AutoImageProcessor.from_pretrained(checkpoint.source))
            return AutoFeatureExtractor.from_pretrained(checkpoint.source)
    except Exception as error:
        if checkpoint.kind == "signal":
            return None
        raise EvlecgError("the checkpoint has no usable image processor", where=checkpoint.name,
                          hint="save it beside the model: processor.save_pretrained(FOLDER)") from error  # fmt: skip


def _uncropped(image_processor: Any) -> Any:
    """An image processor that keeps the whole of a square page: what a photograph can spare at its edges is leads."""
    if getattr(image_processor, "crop_pct", None):
        image_processor.crop_pct = 1.0
    size, crop = getattr(image_processor, "size", None), getattr(image_processor, "crop_size", None)
    if getattr(image_processor, "do_center_crop", False) and size and crop and "shortest_edge" in size:
        image_processor.size = {"shortest_edge": min(int(size["shortest_edge"]), int(crop["height"]))}
    return image_processor


def save_processor(loaded: Loaded, folder: Path) -> None:
    """Writes a model's processor beside it; a feature extractor says the rate that signals really had."""
    if loaded.processor is None:
        return
    if loaded.form is not None and hasattr(loaded.processor, "sampling_rate"):
        loaded.processor.sampling_rate = round(loaded.form.fs_hz)
        loaded.processor.do_normalize = loaded.form.scale == "standard"
    loaded.processor.save_pretrained(folder)


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
