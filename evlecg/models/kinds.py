"""What kind of model a checkpoint is, from its config alone, and what form of signal its family was made for.

| kind | reads | answers |
|---|---|---|
| text | a page and a question | words |
| image | a page | one logit a label |
| signal | a signal | one logit a label |

A classifier answers "Does this ECG show X?" as a model whose vocabulary is {yes: 0, no: 1}: the logits of a label's
question are (z, 0), so that cross-entropy on the answer is binary cross-entropy on the label.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evlecg.errors import EvlecgError
from evlecg.page.render import PAGE_S
from evlecg.page.trace import TraceForm
from evlecg.recipe import KINDS, SignalConfig
from evlecg.schema import LEADS

YES, NO = 0, 1
ANSWERS = {"yes": YES, "no": NO}

# Families that read spectrograms of speech; nothing in them says how an ECG would become one.
SPECTROGRAMS = ("audio-spectrogram-transformer", "whisper", "wav2vec2-bert")
# The form that a family was published with, where its files do not say it.
FORMS: dict[str, SignalConfig] = {
    # code/dataset.py and code/utils.py of its repository: five seconds, leads flattened, 100 Hz, 0.05 to 47 Hz
    "hubert_ecg": SignalConfig(fs_hz=100.0, window_s=5.0, leads="flattened", scale="range", low_hz=0.05, high_hz=47.0),
}
REMOTE_CLASSES = {"AutoModelForImageClassification": "image", "AutoModelForAudioClassification": "signal"}


@dataclass(frozen=True)
class Kind:
    """How a checkpoint is loaded.

    Attributes:
        name: "text", "image" or "signal".
        model_class: transformers' class with a classification head; empty where the family has none (an encoder, to
            which a linear readout of its mean token is added).
    """

    name: str
    model_class: str = ""


def read_config(source: str) -> dict[str, Any]:
    """config.json of a folder or hub id, without building a config class.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    from transformers import PretrainedConfig

    return PretrainedConfig.get_config_dict(source)[0]


def needs_remote_code(config: Mapping[str, Any]) -> bool:
    """Whether the checkpoint's family is its own Python files, unknown to the installed transformers."""
    from transformers import CONFIG_MAPPING

    return "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING


def kind_of(source: str, config: Mapping[str, Any], asked: str, *, where: str) -> Kind:
    """The kind of a checkpoint.

    Args:
        source: its folder or hub id.
        config: config.json.
        asked: a name of `KINDS`; "auto" decides from evlecg.json beside the checkpoint, else from the family.
        where: what an error names.

    Raises:
        EvlecgError: the config does not decide it, or the family cannot read what the kind says.
    """
    from transformers.models.auto import modeling_auto as tables

    family = config.get("model_type", "")
    by_kind = {
        "text": tables.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        "image": tables.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        "signal": {
            **tables.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
            **tables.MODEL_FOR_TIME_SERIES_CLASSIFICATION_MAPPING_NAMES,
        },
    }
    name = asked if asked != "auto" else _saved_kind(source)
    if not name:
        auto_map = config.get("auto_map") or {}
        remote = {REMOTE_CLASSES[key] for key in auto_map if key in REMOTE_CLASSES}
        found = [kind for kind, families in by_kind.items() if family in families] or sorted(remote)
        name = found[0] if found else "signal" if family in FORMS else ""
    if not name and needs_remote_code(config):
        raise EvlecgError(
            f"the config of {family or 'this family'!r} does not say whether it reads pages or signals",
            where=where,
            hint="set student_kind (or teacher_kind; --kind of eval) to image or signal",
        )
    if family in SPECTROGRAMS and name in ("", "signal"):
        raise EvlecgError(f"{family!r} reads spectrograms of speech, not signals", where=where,
                          hint="take a model that reads samples, as Wav2Vec2 and HuBERT do")  # fmt: skip
    if name in ("", "text"):
        return Kind("text")
    classes = by_kind[name].get(family, "")
    if isinstance(classes, tuple):
        classes = next((known for known in config.get("architectures") or () if known in classes), classes[0])
    if family in by_kind[name] or not needs_remote_code(config):
        return Kind(name, classes)
    return Kind(name, next((key for key, kind in REMOTE_CLASSES.items()
                            if kind == name and key in (config.get("auto_map") or {})), ""))  # fmt: skip


def signal_form(config: Any, extractor: Any, asked: Sequence[SignalConfig], *, where: str) -> TraceForm:
    """The form of signal that a checkpoint wants.

    Args:
        config: transformers config.
        extractor: its feature extractor, None where it has none.
        asked: what was asked for, the strongest first (the recipe, evlecg.json); the family's own form stands behind.
        where: what an error names.

    Raises:
        EvlecgError: nobody says at what rate, or the family cannot take the leads so.
    """
    chain = [*asked, FORMS.get(config.model_type, SignalConfig())]

    def said(key: str) -> Any:
        return next((value for item in chain if (value := getattr(item, key)) not in (None, "auto")), None)

    context, channels = getattr(config, "context_length", None), getattr(config, "num_input_channels", None)
    fs_hz, window_s = said("fs_hz"), said("window_s")
    leads = said("leads")
    if context:
        if channels not in (1, len(LEADS)):
            raise EvlecgError(f"a model of {channels} channels cannot read 12 leads", where=where,
                              hint="config.num_input_channels must be 12, or 1 for leads apart")  # fmt: skip
        fits = "channels" if channels == len(LEADS) else "apart"
        if leads not in (None, fits):
            raise EvlecgError(f"a model of {channels} channels takes leads {fits}, not {leads}", where=where)
        leads = fits
        fs_hz = fs_hz or context / (window_s or PAGE_S)
        n_samples = int(context)
    else:
        fs_hz = fs_hz or getattr(extractor, "sampling_rate", None)
        if not fs_hz:
            raise EvlecgError("nobody says at what sampling rate this model reads", where=where,
                              hint="set student_signal.fs_hz (or teacher_signal.fs_hz)")  # fmt: skip
        n_samples = round(fs_hz * (window_s or PAGE_S))
    standard = getattr(extractor, "do_normalize", False)
    scale = said("scale") or ("standard" if standard else "none")
    band = float(said("low_hz") or 0), float(said("high_hz") or 0)
    return TraceForm(float(fs_hz), n_samples, leads or "flattened", scale, band)


def signal_config(form: TraceForm) -> SignalConfig:
    """A form with all of it said: what evlecg.json holds, and `signal_form` reads back."""
    low_hz, high_hz = form.band_hz
    return SignalConfig(form.fs_hz, form.window_s, form.leads, form.scale, low_hz, high_hz)


def _saved_kind(source: str) -> str:
    """What evlecg.json says; empty where it says nothing (a damaged one is reported by `trained_with`)."""
    path = Path(source) / "evlecg.json"
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("kind", "") if path.is_file() else ""
    except (OSError, ValueError, AttributeError):
        return ""
    return kind if kind in KINDS[1:] else ""
