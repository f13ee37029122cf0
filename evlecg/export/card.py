"""The model card: README.md of an exported student, every number of it read from a file that measured it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evlecg import __version__
from evlecg.files import sha256_file
from evlecg.models.trained import TrainedWith
from evlecg.report import UNDEFINED
from evlecg.run import MANIFEST

if TYPE_CHECKING:
    from evlecg.export.gate import Proof
    from evlecg.export.price import Price
    from evlecg.models.load import Loaded

WEIGHTS = ("*.safetensors", "*.onnx", "*.onnx.data", "*.xml", "*.bin", "*.gguf")
TAGS = {"text": "image-text-to-text", "image": "image-classification"}
CITATION = "EVL-ECG, arXiv 2605.29977"  # of the method


def weights_of(folder: Path) -> list[Path]:
    """Files that hold weights or graphs; a readout sorts behind the model."""
    return sorted({file for pattern in WEIGHTS for file in folder.glob(pattern)})


def card(
    run: Path, trained: TrainedWith, student: Loaded, weights: Sequence[Path], *, format: str, dtype: str,
    difference: float, proof: Proof | None, prices: Sequence[Price], commands: Sequence[str],
) -> str:  # fmt: skip
    """Markdown with the metadata that model hubs read.

    Args:
        run: run folder: its run.json, recipe.yaml and report/ are read.
        trained: evlecg.json.
        student: of the run.
        weights: files of the export.
        format, dtype, difference, proof, prices, commands: of the export.
    """
    made = _json(run / "run.json")
    report = _json(run / "report" / "distilled" / "report.json") or _json(run / "report" / "student" / "report.json")
    teacher = _json(run / "report" / "teacher" / "report.json")
    name = run.resolve().name
    parts: list[tuple[str, list[str]]] = [
        ("", [
            f"A {student.checkpoint.model_type} model of {student.n_parameters:,} parameters, trained with evlecg "
            f"{__version__} (method `{trained.method or UNDEFINED}`, teacher `{trained.teacher or 'none'}`); this "
            f"folder holds it as {format}, {dtype}.",
            "",
            "**Not a medical device.** For research; no diagnosis may rest on it.",
        ]),
        ("What it answers", [*_answers(trained, student), "",
                             *(f"- `{label}`: {phrase}" for label, phrase in trained.labels.items())]),
        ("How to use it", _usage(student, format, commands)),
        ("Intended use and limits", _limits(report, made)),
        ("Results", _results(run, report)),
        ("Proof of the export", _proof(proof, difference, format)),
        ("Cost", _cost(prices)),
        ("Training", _training(run, made, trained, teacher)),
        ("Data, licence and citation", _licence(made, report)),
        ("Files", [
            *(f"- `{file.name}`: {file.stat().st_size:,} bytes, SHA-256 `{sha256_file(file)}`" for file in weights),
            f"- sums of all files: `{MANIFEST}`",
        ]),
    ]  # fmt: skip
    lines = [*_metadata(student, format, trained, report, name), "", f"# {name}: an ECG model", ""]
    for title, text in parts:
        lines += [f"## {title}", ""] * bool(title) + [*text, ""]
    return "\n".join(lines)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _metadata(student: Loaded, format: str, trained: TrainedWith, report: dict[str, Any], name: str) -> list[str]:
    library = {"safetensors": "transformers", "gguf": "gguf"}.get(format, format)
    tag = TAGS.get(student.checkpoint.kind)
    lines = ["---", f"library_name: {library}", *([f"pipeline_tag: {tag}"] if tag else []),
             "tags: [ecg, knowledge-distillation, evlecg]"]  # fmt: skip
    base = _base_of(student)
    if base:
        lines.append(f"base_model: {base}")
    macro = (report.get("metrics") or {}).get("auc", {}).get("macro", {}).get("value")
    if macro is not None:
        lines += [
            "model-index:", f"- name: {json.dumps(name)}", "  results:", "  - task: {type: image-classification}",
            f"    dataset: {{name: {json.dumps(report['dataset'])}, type: {json.dumps(report['dataset'])}, "
            f"split: {report['split']}}}",
            f"    metrics: [{{type: roc_auc, name: macro AUROC of the labels, value: {macro:.6f}}}]",
        ]  # fmt: skip
    return [*lines, "---"]


def _base_of(student: Loaded) -> str:
    """Hub id of the checkpoint that the student started from, where its config still says so."""
    name = str(getattr(student.checkpoint.config, "_name_or_path", "") or "")
    return name if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists() else ""


def _answers(trained: TrainedWith, student: Loaded) -> list[str]:
    """How to ask the model, and for a classifier how to feed it."""
    if student.checkpoint.kind == "text":
        return [f'One question a label, answered yes or no: "{trained.question}"']
    lines = ["One logit a label (a sigmoid gives the probability), in the order of `id2label` in config.json."]
    form = student.form
    if form is not None:
        band = f", filtered to {form.band_hz[0]:g}-{form.band_hz[1]:g} Hz" if any(form.band_hz) else ""
        lines.append(
            f"It reads {form.window_s:g} s of 12 leads (I, II, III, aVR, aVL, aVF, V1 to V6) at {form.fs_hz:g} Hz in "
            f"millivolt{band}, leads {form.leads}, scale {form.scale} (`evlecg/page/trace.py` says what that means)."
        )
        if form.leads == "apart":
            lines.append("Every lead is a row of the input; the mean of the twelve rows' logits is the record's.")
    if not student.checkpoint.model_class:
        lines.append(
            "The head lies in readout.safetensors: `AutoModel(inputs).last_hidden_state.mean(1) @ weight.T + bias`."
        )
    return lines


def _usage(student: Loaded, format: str, commands: Sequence[str]) -> list[str]:
    if format == "gguf":
        left = ["What is left to be done with llama.cpp:", "", "```bash", *commands, "```"] if commands else []
        return left or ["`llama-mtmd-cli -m model-*.gguf --mmproj mmproj-*.gguf --image page.png`"]
    if format == "safetensors":
        kind = student.checkpoint.model_class or (
            "AutoModelForImageTextToText" if student.checkpoint.kind == "text" else "AutoModel"
        )
        return ["```python", f"model = transformers.{kind}.from_pretrained(FOLDER)", "```"]
    package = {"onnx": "onnxruntime"}.get(format, format)
    return [
        f"Without torch: `pip install {package} numpy scipy opencv-python-headless pyyaml wfdb` and evlecg without "
        "what it trains with (`pip install --no-deps evlecg`), then", "",
        "```bash", "python -m evlecg.run FOLDER record.hea", "```", "",
        "```python", 'evlecg.load("FOLDER").predict(signal_mV, fs_hz)  # [12, samples] in mV -> {label: probability}',
        "```", "",
        "`runner.json` says what the graphs are fed with, for those who write a runner of their own.",
    ]  # fmt: skip


def _limits(report: dict[str, Any], made: dict[str, Any]) -> list[str]:
    dataset = report.get("dataset") or (made.get("data") or {}).get("dataset") or UNDEFINED
    lines = [
        "For research on the reading of twelve-lead ECGs of adults, and for teaching. It has seen no other data than "
        f"`{dataset}` in training; what it does with other recorders, populations and pages has to be measured there "
        "first (`evlecg eval --dataset NAME --model FOLDER`).",
        "It answers the labels above and no others; that a label is absent is not that the ECG is normal.",
    ]  # fmt: skip
    if dataset == "synthetic":
        lines.append("**Its data are synthetic: it can read no patient's ECG.**")
    return lines


def _results(run: Path, report: dict[str, Any]) -> list[str]:
    """The run's comparison table with its source, or the plain fact that there is none."""
    table = run / "report" / "comparison.md"
    if not table.is_file():
        return ["Not evaluated when exported."]
    boot = ((report.get("metrics") or {}).get("auc") or {}).get("bootstrap")
    source = "Of the run's student before the export, from `report/comparison.md` of the run"
    if boot:
        source += f"; intervals: {boot['resamples']} bootstrap resamples, unit {boot['unit']}"
    return [*table.read_text(encoding="utf-8").splitlines(), "", f"{source}."]


def _proof(proof: Proof | None, difference: float, format: str) -> list[str]:
    how = "in plain transformers, logits" if format in ("safetensors", "gguf") else "in its own runtime, log odds"
    lines = [f"Reloaded {how} differ from the run's by {difference:.1e} at most."]
    if proof is None:
        return [*lines, "Not scored again: no data, or no labels, were given."]
    if not proof.original:
        return [*lines, f"Compared on {proof.n_records} {proof.data}; not scored again: no data were given."]
    lines += ["", f"AUROC on {proof.n_records} records ({proof.data}):", "", "| | " + " | ".join(proof.original) + " |",
              "| --- |" + " --- |" * len(proof.original)]  # fmt: skip
    for name, found in (("run", proof.original), ("export", proof.exported)):
        cells = [UNDEFINED if value is None else f"{value:.4f}" for value in found.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    drop = proof.drop
    if drop is not None and drop.value is not None and drop.ci95 is not None:
        low, high = (100 * end for end in drop.ci95)
        lines += [
            "",
            f"Export minus run: {100 * drop.value:+.2f} points macro AUROC (95% interval {low:+.2f} to {high:+.2f}); "
            f"log odds differ by {proof.mean_logit_difference:.1e} on average.",
        ]
    return lines


def _cost(prices: Sequence[Price]) -> list[str]:
    """The cost card."""
    if not prices:
        return ["Not measured (`evlecg export --cost`)."]
    threads = list(next((price.latency_ms for price in prices if price.latency_ms), {}))
    columns = ["parameters", "GFLOPs a record", "on disk, MB", *(f"ms, {n} thread{'s' * (n != '1')}" for n in threads),
               "peak memory, MB"]  # fmt: skip
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for price in prices:
        if price.failed:
            lines.append(f"| {price.name} | {price.failed} |" + " |" * (len(columns) - 1))
            continue
        cells = [
            f"{price.parameters:,}" if price.parameters else "as the student's",
            f"{price.flops / 1e9:.3g}" if price.flops else "as the student's" if not price.parameters else UNDEFINED,
            f"{price.disk_bytes / 1e6:.2f}" if price.disk_bytes else UNDEFINED,
            *(f"{price.latency_ms[n]:.1f} (p95 {price.latency_p95_ms[n]:.1f})" for n in threads),
            f"{price.peak_memory_bytes / 1e6:.0f}" if price.peak_memory_bytes else UNDEFINED,
        ]  # fmt: skip
        lines.append(f"| {price.name} | " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        "One record at a time with all its questions, page drawing included: median of records that the models took "
        "turns with, each in a process of its own whose whole memory is counted. Teacher and student run in PyTorch, "
        "eager.",
    ]


def _training(run: Path, made: dict[str, Any], trained: TrainedWith, teacher: dict[str, Any]) -> list[str]:
    keys = ("recipe", "recipe_fingerprint", "data", "steps", "seconds", "environment")
    lines = [f"- {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in made.items() if key in keys]
    if trained.teacher:
        found = (teacher.get("provenance") or {}).get("model") or {}
        revision = found.get("weights_sha256")
        lines.append(f"- teacher: {trained.teacher}" + (f", weights SHA-256 `{revision}`" if revision else ""))
    recipe = run / "recipe.yaml"
    if recipe.is_file():
        lines += ["", "<details><summary>Recipe</summary>", "", "```yaml", *recipe.read_text().splitlines(), "```", "",
                  "</details>"]  # fmt: skip
    return lines


def _licence(made: dict[str, Any], report: dict[str, Any]) -> list[str]:
    from evlecg.data.catalogue import datasets

    name = (made.get("data") or {}).get("dataset") or report.get("dataset") or ""
    about = datasets().get(name, {})
    lines = [f"- data: {name or UNDEFINED}" + (f" ({about['title']}), {about['licence']}" if about else "")]
    if about.get("citation"):
        lines.append(f"- citation of the data: {about['citation']}")
    lines.append(
        "- licence of the weights: that of the checkpoint that the student started from, as far as the licence of the "
        "data permits"
    )
    return [*lines, f"- citation of the method: {CITATION}"]
