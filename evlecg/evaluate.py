"""Model and prepared folder -> predictions -> report."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np

from evlecg.answering import TextProtocol, chosen_protocol, evaluate_text
from evlecg.data.store import Prepared
from evlecg.data.tasks import chosen_labels, label_samples
from evlecg.errors import EvlecgError
from evlecg.files import new_folder
from evlecg.metrics import N_BOOT, Difference, bootstrap_auc, paired_difference
from evlecg.models import load as models
from evlecg.models.trained import trained_with
from evlecg.page.render import page_style
from evlecg.progress import Progress
from evlecg.recipe import DataConfig, PageConfig, SignalConfig
from evlecg.report import Report, environment, write_report

SPLIT_NAMES = ("train", "val", "test", "all")


def evaluate(
    model: str,
    *,
    data: Path,
    out: Path,
    split: str = "test",
    labels: tuple[str, ...] = (),
    question: str | None = None,
    page: PageConfig | None = None,
    batch_size: int = 16,
    dtype: str = "float32",
    kind: str = "auto",
    signal: SignalConfig | None = None,
    bits: int | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    n_boot: int = N_BOOT,
    max_records: int | None = None,
    overwrite: bool = False,
    protocol: str | None = "likelihood",
    text: TextProtocol | None = None,
    progress: Progress | None = None,
) -> Report:
    """Scores every assessed label of a split by the likelihood of "yes" against "no", and writes the report.

    Under the protocol `ecgbench` the model answers the dataset's own questions in words instead (answering.py).

    Args:
        model: run folder, export folder, checkpoint folder, hub id or builtin:NAME.
        data: prepared folder.
        out: folder for report.json, report.md and predictions.jsonl; appears whole or not at all.
        split: train, val, test or all.
        labels: codes to score; empty: those it was trained on that the folder assessed, else all of the folder's.
        question: wording; None: the one that the model was trained with, else the default.
        page: page style; None: as trained, else the default.
        batch_size: records a forward pass.
        kind: "text", "image", "signal", or "auto" where the model's config is to decide.
        signal: how signals enter a model that reads them; None: as trained, else as its family wants.
        dtype, bits: as for `models.load.load`.
        trust_remote_code, allow_pickle: as for `models.load.inspect`.
        n_boot: bootstrap resamples over patients.
        max_records: score the first N records of the split only.
        overwrite: replace what `out` holds.
        protocol: `likelihood` or `ecgbench`; None: what the data and `text` call for.
        text: how answers in words are made and read; None: the defaults.
        progress: who listens.
    """
    progress = progress or Progress()
    prepared = Prepared.open(data)
    if split not in SPLIT_NAMES:
        raise EvlecgError(f"unknown split {split!r}", where="--split", hint=f"one of {', '.join(SPLIT_NAMES)}")
    indices = (range(len(prepared)) if split == "all" else prepared.indices(split).tolist())[:max_records]
    text = text or TextProtocol()
    if chosen_protocol(protocol, prepared, indices, text) == "ecgbench":
        return evaluate_text(
            model, prepared, indices, text, split=split, out=out, page=page, batch_size=batch_size, dtype=dtype,
            n_boot=n_boot, left_out=_left_out(prepared), overwrite=overwrite, progress=progress,
        )  # fmt: skip
    trained = trained_with(Path(models.resolve(model)[0]))
    wording = question or trained.question
    known = tuple(label for label in trained.labels if label in prepared.label_names)
    checkpoint = models.inspect(model, kind=kind, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    names = chosen_labels(prepared, DataConfig(labels=labels or known, question=wording))
    if checkpoint.kind != "text":
        names = _names_in_head(checkpoint, names, explicit=bool(labels))
    samples = label_samples(prepared, indices, names, wording)
    if not samples:
        raise EvlecgError(f"the split {split!r} has no record with an assessed label", where=data,
                          hint="--split all, or prepare more records")  # fmt: skip

    from evlecg.models.checks import check_samples  # torch loads here

    check_samples(checkpoint, prepared, samples)
    with new_folder(out, overwrite) as folder:
        loaded = models.load(checkpoint, dtype=dtype, bits=bits, signal=signal)
        packing = _predict(loaded, prepared, samples, page or trained.page, batch_size, folder, progress, model)
        report = _report(model, prepared, split, names, folder, n_boot, wording, packing, loaded)
        write_report(report, folder)
    return report


def _names_in_head(checkpoint: models.Checkpoint, names: tuple[str, ...], *, explicit: bool) -> tuple[str, ...]:
    """Of the labels that are to be scored, those that a classifier's head knows.

    Raises:
        EvlecgError: it knows none, or lacks one that was asked for by name.
    """
    found = tuple(name for name in names if name in checkpoint.labels)
    if not found or (explicit and len(found) < len(names)):
        missing = [name for name in names if name not in found]
        own = ", ".join(label for label in checkpoint.labels if label) or "none that the vocabulary knows"
        raise EvlecgError(f"the classifier has no label {', '.join(missing)}", where=checkpoint.name,
                          hint=f"its labels: {own}")  # fmt: skip
    return found


def _predict(
    loaded: models.Loaded, prepared: Prepared, samples: list, page: PageConfig, batch_size: int, folder: Path,
    progress: Progress, name: str,
) -> str:  # fmt: skip
    """Streams every prediction to predictions.jsonl as it comes; returns how the questions were read."""
    import torch

    from evlecg.models.score import Scorer

    if not hasattr(loaded.model, "hf_quantizer"):  # quantised weights are where they belong
        loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    size = page.student_size
    scorer = Scorer(loaded, prepared, page_style(page), size_px=(size[0], size[1]) if size else None)
    scorer.prove_packing(max(samples[:64], key=lambda sample: len(sample.questions)))
    with (
        (folder / "predictions.jsonl").open("w", encoding="utf-8") as stream,
        progress.task(f"score {name}", len(samples)) as advance,
    ):
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            for prediction in scorer.score(batch):
                stream.write(json.dumps(dataclasses.asdict(prediction)) + "\n")
            advance(len(batch))
    return "in one row a page" if scorer.packed else f"one row a question ({scorer.packing_note})"


def _report(
    model: str, prepared: Prepared, split: str, names: tuple[str, ...], folder: Path, n_boot: int, question: str,
    packing: str, loaded: models.Loaded,
) -> Report:  # fmt: skip
    _, score_NK, truth_NK, patients = read_scores(folder, names)
    return Report(
        model=model,
        dataset=str(prepared.manifest["dataset"]),
        split=split,
        n_records=len(patients),
        n_patients=len(set(patients)),
        labels=names,
        left_out=_left_out(prepared),
        auc=bootstrap_auc(score_NK, truth_NK, patients, n_boot=n_boot, seed=0),
        provenance={
            "model": {
                "family": loaded.checkpoint.model_type,
                "kind": loaded.checkpoint.kind,
                "parameters": loaded.n_parameters,
                "weights_sha256": models.weights_hash(loaded.checkpoint),
            },
            "data_fingerprint": prepared.fingerprint,
            "question": question,
            "questions_read": packing,
            "environment": environment(),
        },
    )


def _left_out(prepared: Prepared) -> dict[str, str]:
    """Why records of the source are not in the prepared folder, with their numbers."""
    reasons = Counter(entry["reason"] for entry in prepared.quarantine())
    return {f"{count} records of the source": reason for reason, count in reasons.most_common()}


def read_scores(folder: Path, labels: tuple[str, ...]) -> tuple[list[str], np.ndarray, np.ndarray, list[str]]:
    """A report's predictions as arrays: record ids, score_NK, truth_NK (NaN where not assessed), patient ids."""
    path = folder / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    patients = {row["record_id"]: row["patient_id"] for row in rows}
    place = {record: index for index, record in enumerate(patients)}
    column = {label: index for index, label in enumerate(labels)}
    score_NK = np.full((len(place), len(column)), np.nan)
    truth_NK = np.full((len(place), len(column)), np.nan)
    for row in rows:
        where = place[row["record_id"]], column[row["label"]]
        score_NK[where], truth_NK[where] = row["score"], row["truth"]
    return list(place), score_NK, truth_NK, list(patients.values())


def paired(report_a: Path, report_b: Path, *, n_boot: int = N_BOOT) -> Difference:
    """Macro AUC of report A minus report B on the same records, with interval and p.

    Raises:
        EvlecgError: the two reports scored different records or labels.
    """
    labels = [tuple(json.loads((folder / "report.json").read_text())["metrics"]["auc"]["labels"])
              for folder in (report_a, report_b)]  # fmt: skip
    ids_a, score_a, truth_NK, patients = read_scores(report_a, labels[0])
    ids_b, score_b, _, _ = read_scores(report_b, labels[1])
    if labels[0] != labels[1] or set(ids_a) != set(ids_b):
        raise EvlecgError("two reports on different records or labels cannot be compared", where=report_b)
    order = {record: index for index, record in enumerate(ids_b)}
    score_b = score_b[[order[record] for record in ids_a]]
    return paired_difference(score_a, score_b, truth_NK, patients, n_boot=n_boot, seed=0)
