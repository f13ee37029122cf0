"""What must hold before the first step, and what is left out of training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from evlecg.data.store import Prepared
from evlecg.errors import EvlecgError
from evlecg.models.batch import BatchBuilder, draw
from evlecg.models.encode import Turn
from evlecg.models.kinds import ANSWERS
from evlecg.models.load import Checkpoint, Loaded
from evlecg.models.outputs import can_pack, count_features, image_matters, to_device
from evlecg.models.views import view_of
from evlecg.progress import Progress
from evlecg.recipe import Recipe
from evlecg.schema import Sample

STATES = frozenset({"teacher", "hidden", "visual", "projected"})  # what objectives read that are no answers
VISION_MODULES = ("vision_tower", "vision_model", "visual", "vision_encoder")


def startup_checks(
    recipe: Recipe, unpacked: BatchBuilder, student: Loaded, teacher: Loaded | None, progress: Progress
) -> tuple[bool, dict[str, Any]]:
    """What must hold before a step is worth taking, said on the way: packing, answers, visual tokens, image seen."""
    sample = max(unpacked.samples[:64], key=lambda candidate: len(candidate.questions))
    turns = [Turn.of(question) for question in sample.questions]
    packed = recipe.train.packing != "never" and len(turns) > 1
    checks: dict[str, Any] = {"packed": packed}
    sides = [("student", student, unpacked.student)]
    if teacher is not None and unpacked.teacher is not None:
        sides.append(("teacher", teacher, unpacked.teacher))
    for role, loaded, encoder in sides:
        page = draw(unpacked.prepared, sample.record_index, view_of(encoder), unpacked.style)
        side = to_device(encoder.encode([page], [turns[:1]]), loaded.model.device)
        if len(side.answer_A2) == 0:
            raise EvlecgError("no answer token is left to learn from", where=loaded.checkpoint.name,
                              hint="the chat template drops the assistant's text")  # fmt: skip
        n_tokens, n_features = side.visual_box_BN4.shape[1], count_features(loaded, side)
        if n_features is not None and n_features != n_tokens:
            hint = "its processor and its weights do not belong together (patch size, image size, select strategy)"
            raise EvlecgError(f"the {role} has {n_tokens} image tokens in its text and {n_features} image features",
                              where=loaded.checkpoint.name, hint=hint)  # fmt: skip
        matters = image_matters(loaded, side)
        told = {
            "family": loaded.checkpoint.model_type,
            "parameters": loaded.n_parameters,
            "page_px": list(encoder.size_px) if encoder.size_px else None,
            "signal": dataclasses.asdict(loaded.form) if loaded.form else None,
            "visual_tokens": side.visual_box_BN4.shape[1],
            "sequence": int(side.valid_BS[0].sum()),
            "vocabulary": loaded.checkpoint.vocab_size,
            "image_effect": matters,
        }
        checks[role] = told
        seen = f"page {encoder.size_px[0]}x{encoder.size_px[1]} px" if encoder.size_px else _form_text(loaded)
        progress.info(
            f"{role}: {loaded.checkpoint.name} ({told['family']}, {told['parameters']:,} parameters), {seen}, "
            f"{told['visual_tokens']} visual tokens, vocabulary {told['vocabulary']}"
        )
        if matters < 1e-5:
            raise EvlecgError(f"the {role}'s answer does not change when its input is blanked",
                              where=loaded.checkpoint.name, hint="it does not reach the model")  # fmt: skip
        if packed:
            able, why = can_pack(loaded, encoder, page, turns)
            if not able and recipe.train.packing == "always":
                raise EvlecgError(f"the {role} cannot pack questions", where=loaded.checkpoint.name, hint=why)
            if not able:
                progress.detail(f"{role} cannot pack questions ({why}): one row a question")
            packed = checks["packed"] = packed and able
    return packed, checks


def _form_text(loaded: Loaded) -> str:
    """The form of signal that a model reads, in words."""
    form = loaded.form
    assert form is not None
    return f"signal of {form.window_s:g} s at {form.fs_hz:g} Hz, leads {form.leads}, scale {form.scale}"


def check_samples(checkpoint: Checkpoint, prepared: Prepared, samples: Sequence[Sample]) -> None:
    """That a classifier is asked about labels only, and a model that reads signals gets no pictures.

    Raises:
        EvlecgError: another question, or a picture; nothing has been loaded by then.
    """
    if checkpoint.kind == "text":
        return
    for sample in samples:
        for question in sample.questions:
            if question.label is None or question.answer not in ANSWERS:
                raise EvlecgError(
                    f"a classifier says yes or no to labels; it cannot answer {question.text[:60]!r}",
                    where=checkpoint.name,
                    hint="data.tasks=[yes_no]",
                )
        if checkpoint.kind == "signal" and prepared.row(sample.record_index).get("image"):
            raise EvlecgError("a record is a picture, and the model reads signals", where=sample.record_id,
                              hint="prepare the records' signals, or take a model that reads pages")  # fmt: skip


def check_labels(teacher: Loaded, labels: Sequence[str], needs: frozenset[str], progress: Progress) -> None:
    """Which of the run's labels a teacher that is a classifier does not know.

    Raises:
        EvlecgError: the objective reads its answers to them.
    """
    if teacher.checkpoint.kind == "text":
        return
    unknown = [label for label in labels if label not in teacher.model.rows]
    if not unknown:
        return
    if needs - STATES:
        raise EvlecgError(
            f"the teacher's head does not know {', '.join(unknown)}",
            where=teacher.checkpoint.name,
            hint=f"it knows {', '.join(teacher.model.rows) or 'no label by a name'}; --set data.labels=[...]",
        )
    progress.info(f"teacher: does not know {', '.join(unknown)}; only its hidden states are read")


def freeze_vision(student: Loaded) -> None:
    """Takes the vision tower out of training; projector and language model stay in.

    Raises:
        EvlecgError: no parameter lies in a module with a name of `VISION_MODULES`.
    """
    frozen = 0
    for name, parameter in student.model.named_parameters():
        parts = name.split(".")
        if any(part in VISION_MODULES for part in parts) and not any(
            "merger" in part or "projector" in part for part in parts
        ):
            parameter.requires_grad_(False)
            frozen += 1
    if not frozen:
        raise EvlecgError("train.freeze_vision finds no vision tower", where=student.checkpoint.name,
                          hint="set train.freeze_vision=false")  # fmt: skip
