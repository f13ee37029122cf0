"""Exported safetensors as anyone loads them: through transformers alone, on a drawn page or a signal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from evlecg.data.synthetic import generate
from evlecg.models import load as models
from evlecg.models.trained import TrainedWith
from evlecg.page.render import page_style, render
from evlecg.recipe import page_size


def logit_difference(folder: Path, original: models.Loaded, trained: TrainedWith) -> float:
    """Largest absolute difference between the logits of the run's student and of the exported files.

    Args:
        folder: what was written.
        original: the student that it was written from.
        trained: its question and pages.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from evlecg.models.encode import Encoder, Turn

    page = trained.page
    size = page_size(page.student_size)
    record = next(generate({"test": 1}, seed=0))
    question = trained.question.replace("{description}", "a normal tracing")
    with models.quiet():
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=original.model.dtype)
        processor = AutoProcessor.from_pretrained(folder)
    logits = []
    for candidate, its_processor in ((original.model, original.processor), (model, processor)):
        encoder = Encoder(original.checkpoint, its_processor, size_px=size)
        drawn = render(record.signal_mV, record.fs_hz, size_px=encoder.size_px, style=page_style(page))
        side = encoder.encode([drawn], [[Turn(question, "yes")]])
        with torch.no_grad():
            logits.append(candidate.eval()(**side.inputs).logits.float())
    return float((logits[0] - logits[1]).abs().max())


def classifier_logit_difference(folder: Path, original: models.Loaded, trained: TrainedWith) -> float:
    """As `logit_difference`, for classifiers: logits of the plain model as its card says they are made."""
    import transformers
    from safetensors.torch import load_file

    from evlecg.models.classifier import READOUT
    from evlecg.models.encode import Turn
    from evlecg.models.views import encoder_for
    from evlecg.page.trace import trace

    record = next(generate({"test": 1}, seed=0))
    page = trained.page
    size = page_size(page.student_size)
    encoder: Any = encoder_for(original, size_px=size)
    if original.form is not None:
        view = trace(record.signal_mV, record.fs_hz, original.form)
    else:
        view = render(record.signal_mV, record.fs_hz, size_px=encoder.size_px, style=page_style(page))
    label = next(iter(original.model.rows))
    inputs = encoder.encode([view], [[Turn("", "yes", label=label)]]).inputs
    remote = {"trust_remote_code": True} if original.checkpoint.trust_remote_code else {}
    name = original.checkpoint.model_class or "AutoModel"
    with models.quiet():
        plain = getattr(transformers, name).from_pretrained(folder, dtype=original.model.dtype, **remote).eval()
    with torch.no_grad():
        wanted = original.model(**inputs)["logits"].float()
        result = plain(**inputs)
        if original.checkpoint.model_class:
            known = ("logits", "prediction_logits", "prediction_outputs")
            found = next(result[key] for key in known if key in result).float()
            found = found.mean(0, keepdim=True) if original.model.apart else found
        else:
            readout = load_file(folder / READOUT)
            state = result.last_hidden_state
            mean = state.flatten(0, -2).mean(0, keepdim=True) if original.model.apart else state.mean(1)
            found = (mean @ readout["weight"].T + readout["bias"]).float()
    return float((wanted - found).abs().max())
