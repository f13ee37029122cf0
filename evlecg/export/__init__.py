"""The student alone: safetensors, config, processor and model card, proven to reload with the same logits."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evlecg import __version__
from evlecg.errors import EvlecgError, RunFailed
from evlecg.files import new_folder, sha256_file, write_text_atomic
from evlecg.models import load as models
from evlecg.models.trained import TrainedWith, trained_with
from evlecg.page.render import page_style, render
from evlecg.progress import Progress
from evlecg.recipe import nearest
from evlecg.report import UNDEFINED

FORMATS = ("safetensors",)
DTYPES = ("auto", "float32", "bfloat16", "float16")
LOGIT_TOLERANCE = 1e-5  # the same weights in the same dtype: anything above this is a defect, not rounding


@dataclass(frozen=True)
class ExportResult:
    """What was exported: the folder, its weights, and how far the reloaded logits were from the run's."""

    out: Path
    weights: Path
    n_parameters: int
    n_bytes: int
    max_logit_difference: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"out": str(self.out), "weights": str(self.weights)}


def export(
    run: Path,
    *,
    out: Path,
    format: str = "safetensors",
    dtype: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Writes a run's student as a checkpoint that plain transformers loads.

    The new folder is reloaded through transformers alone (`AutoModelForImageTextToText` and `AutoProcessor`, or the
    family's class for classification, or `AutoModel` and the readout beside it), and its logits on a drawn page or a
    signal are compared with the run's before it takes its final name.

    Args:
        run: a finished run folder.
        out: folder to write; appears whole or not at all.
        format: one of `FORMATS`.
        dtype: one of `DTYPES`; auto keeps the dtype of the run.
        overwrite: replace what `out` holds.
        trust_remote_code: run Python files that came with the student.
        progress: who listens.

    Raises:
        EvlecgError: not a run, an unknown format, or an output folder that is in the way.
        RunFailed: the reloaded logits differ.
    """
    progress = progress or Progress()
    if format not in FORMATS:
        raise EvlecgError(f"unknown format {format!r}", where="--format", hint=nearest(format, FORMATS))
    if dtype not in DTYPES:
        raise EvlecgError(f"unknown dtype {dtype!r}", where="--dtype", hint=nearest(dtype, DTYPES))
    if not (run / "student" / "config.json").is_file():
        hint = "evlecg distill leaves one; an unfinished run can be continued with --resume"
        raise EvlecgError("the folder holds no finished run", where=run, hint=hint)
    checkpoint = models.inspect(str(run), trust_remote_code=trust_remote_code)
    original = models.load(checkpoint, dtype=dtype)
    with new_folder(out, overwrite) as folder:
        progress.info(f"exporting {run} ({original.n_parameters:,} parameters)")
        original.model.save_pretrained(folder, max_shard_size="5GB")
        models.save_processor(original, folder)
        trained = trained_with(Path(checkpoint.source))
        trained.write(folder)
        if checkpoint.kind == "text":
            difference = _reloaded_difference(folder, original, trained)
        else:
            difference = _reloaded_classifier_difference(folder, original, trained)
        if not difference <= LOGIT_TOLERANCE:
            raise RunFailed(f"the exported model's logits differ by {difference:.2e}", where=out,
                            hint="nothing was kept; please report this family")  # fmt: skip
        weights = sorted(folder.glob("*.safetensors"))  # a readout sorts behind the model
        write_text_atomic(folder / "README.md", _card(run, trained, weights, original, difference))
        n_bytes = sum(file.stat().st_size for file in weights)
        result = ExportResult(out, out / weights[0].name, original.n_parameters, n_bytes, difference)
    progress.info(f"exported to {out}; reloaded by plain transformers, largest logit difference {difference:.1e}")
    return result


def _reloaded_difference(folder: Path, original: models.Loaded, trained: TrainedWith) -> float:
    """Largest absolute difference between the logits of the run's student and of the exported files."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from evlecg.data.synthetic import generate
    from evlecg.models.encode import Encoder, Turn

    page = trained.page
    size = (page.student_size[0], page.student_size[1]) if page.student_size else None
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


def _reloaded_classifier_difference(folder: Path, original: models.Loaded, trained: TrainedWith) -> float:
    """As `_reloaded_difference`, for classifiers: logits of the plain model as its card says they are made."""
    import torch
    import transformers
    from safetensors.torch import load_file

    from evlecg.data.synthetic import generate
    from evlecg.models.classifier import READOUT
    from evlecg.models.encode import Turn
    from evlecg.models.views import encoder_for
    from evlecg.page.trace import trace

    record = next(generate({"test": 1}, seed=0))
    page = trained.page
    size = (page.student_size[0], page.student_size[1]) if page.student_size else None
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


def _card(run: Path, trained: TrainedWith, weights: list[Path], original: models.Loaded, difference: float) -> str:
    """The model card, every figure read from the run's files."""
    made = json.loads((run / "run.json").read_text()) if (run / "run.json").is_file() else {}
    tags = {"text": ["pipeline_tag: image-text-to-text"], "image": ["pipeline_tag: image-classification"]}
    head = "\n".join(
        ["---", "library_name: transformers", *tags.get(original.checkpoint.kind, []),
         "tags: [ecg, knowledge-distillation, evlecg]", "---"]
    )  # fmt: skip
    lines = [
        head,
        "",
        f"# {run.resolve().name}: an ECG model",
        "",
        f"A {original.checkpoint.model_type} model of {original.n_parameters:,} parameters, trained with evlecg "
        f"{__version__} (method `{trained.method or UNDEFINED}`, teacher `{trained.teacher or 'none'}`).",
        "",
        "**Not a medical device.** For research; no diagnosis may rest on it.",
        "",
        "## What it answers",
        "",
        *_answers(trained, original),
        "",
        *(f"- `{label}`: {phrase}" for label, phrase in trained.labels.items()),
        "",
        "## Results",
        "",
        *_results(run),
        "",
        "## Training",
        "",
        *(f"- {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in made.items()
          if key in ("recipe", "recipe_fingerprint", "data", "steps", "seconds", "environment")),
        "",
        "## Files",
        "",
        *(f"- `{file.name}`: {file.stat().st_size:,} bytes, SHA-256 `{sha256_file(file)}`" for file in weights),
        f"- reloaded by plain transformers; largest logit difference from the run: {difference:.1e}",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _answers(trained: TrainedWith, original: models.Loaded) -> list[str]:
    """How to ask the model, and for a classifier how to feed it."""
    if original.checkpoint.kind == "text":
        return [f'One question a label, answered yes or no: "{trained.question}"']
    lines = ["One logit a label (a sigmoid gives the probability), in the order of `id2label` in config.json."]
    form = original.form
    if form is not None:
        band = f", filtered to {form.band_hz[0]:g}-{form.band_hz[1]:g} Hz" if any(form.band_hz) else ""
        lines.append(
            f"It reads {form.window_s:g} s of 12 leads (I, II, III, aVR, aVL, aVF, V1 to V6) at {form.fs_hz:g} Hz in "
            f"millivolt{band}, leads {form.leads}, scale {form.scale} (`evlecg/page/trace.py` says what that means)."
        )
        if form.leads == "apart":
            lines.append("Every lead is a row of the input; the mean of the twelve rows' logits is the record's.")
    if not original.checkpoint.model_class:
        lines.append(
            "The head lies in readout.safetensors: `AutoModel(inputs).last_hidden_state.mean(1) @ weight.T + bias`."
        )
    return lines


def _results(run: Path) -> list[str]:
    """The run's comparison table, or the plain fact that there is none."""
    table = run / "report" / "comparison.md"
    return table.read_text(encoding="utf-8").splitlines() if table.is_file() else ["Not evaluated when exported."]
