"""What a run leaves beside its metrics: where it came from (from the first step on), the student, and how it ended."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from evlecg.data.tasks import chosen_labels
from evlecg.errors import EvlecgError
from evlecg.files import new_folder, write_text_atomic
from evlecg.models import load as models
from evlecg.models.kinds import signal_config
from evlecg.models.trained import TrainedWith
from evlecg.report import environment
from evlecg.training.processes import whole_weights
from evlecg.training.step import Job

PROVENANCE = "provenance.json"


def write_provenance(job: Job, out: Path, labels: tuple[str, ...], step: int) -> dict[str, Any]:
    """Writes provenance.json as a run begins, or goes on from `step`, and returns it.

    Raises:
        EvlecgError: the run was begun with a model whose weights are others now.
    """
    recipe, path = job.recipe, out / PROVENANCE
    found: dict[str, Any] = {
        "recipe": recipe.name,
        "recipe_fingerprint": recipe.fingerprint(),
        "data": {
            "dataset": job.prepared.manifest["dataset"],
            "fingerprint": job.prepared.fingerprint,
            "labels": list(labels),
            "n_train": len(job.builder.samples),
        },
        "models": {"student": _model(job.student.checkpoint)}
        | ({"teacher": _model(job.taught_by)} if job.taught_by is not None else {}),
        "sessions": [],
    }
    if step and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        for role, model in found["models"].items():
            if model != before["models"].get(role):
                raise EvlecgError(f"the {role} is another one than the run was begun with", where=model["name"],
                                  hint="start another run, with another --out")  # fmt: skip
        found["sessions"] = before["sessions"]
    found["sessions"].append({
        "from_step": step,
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "processes": job.accelerator.num_processes,
        "device": str(job.accelerator.device),
        "environment": environment(),
    })  # fmt: skip
    write_text_atomic(path, json.dumps(found, indent=2) + "\n")
    return found


def _model(checkpoint: models.Checkpoint) -> dict[str, Any]:
    """Which weights: the hash of a folder's, the revision of a hub id's, neither for a built-in that is untrained."""
    return {
        "name": checkpoint.name,
        "family": checkpoint.model_type,
        "weights_sha256": models.weights_hash(checkpoint),
        "revision": getattr(checkpoint.config, "_commit_hash", None),
    }


def save_student(job: Job, out: Path) -> None:
    """student/: what transformers loads, and nothing that only training needed; adapter/ beside it, with LoRA."""
    from evlecg.models.adapt import merge, save_adapter

    state = whole_weights(job.accelerator, job.model)
    if not job.accelerator.is_main_process:
        return
    model = job.accelerator.unwrap_model(job.model)
    if job.adapted is not None:
        with new_folder(out / "adapter", overwrite=True) as partial:
            save_adapter(job.adapted, partial)
        model = merge(job.adapted)
    with new_folder(out / "student", overwrite=True) as partial:
        model.save_pretrained(partial, state_dict=state)
        models.save_processor(job.student, partial)
        _trained_with(job).write(partial)


def _trained_with(job: Job) -> TrainedWith:
    recipe = job.recipe
    return TrainedWith(
        question=recipe.data.question,
        labels={name: job.prepared.label_descriptions[name] for name in chosen_labels(job.prepared, recipe.data)},
        page=dataclasses.replace(recipe.page, student_size=job.builder.student.size_px),
        kind=job.student.checkpoint.kind,
        signal=signal_config(job.student.form) if job.student.form is not None else None,
        method=recipe.effective_method,
        teacher=recipe.teacher if recipe.needs_teacher else None,
        recipe_fingerprint=recipe.fingerprint(),
    )
