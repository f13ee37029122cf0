"""What must hold before the first step, and what is left out of training."""

from __future__ import annotations

from typing import Any

from evlecg.errors import EvlecgError
from evlecg.models.batch import BatchBuilder, draw
from evlecg.models.encode import Turn
from evlecg.models.load import Loaded
from evlecg.models.outputs import can_pack, count_features, image_matters, to_device
from evlecg.progress import Progress
from evlecg.recipe import Recipe

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
        page = draw(unpacked.prepared, sample.record_index, encoder.size_px, unpacked.style)
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
            "page_px": list(encoder.size_px),
            "visual_tokens": side.visual_box_BN4.shape[1],
            "sequence": int(side.valid_BS[0].sum()),
            "vocabulary": loaded.checkpoint.vocab_size,
            "image_effect": matters,
        }
        checks[role] = told
        progress.info(
            f"{role}: {loaded.checkpoint.name} ({told['family']}, {told['parameters']:,} parameters), page "
            f"{told['page_px'][0]}x{told['page_px'][1]} px, {told['visual_tokens']} visual tokens, "
            f"vocabulary {told['vocabulary']}"
        )
        if matters < 1e-5:
            raise EvlecgError(f"the {role}'s answer does not change when its page is blanked",
                              where=loaded.checkpoint.name, hint="the image does not reach the model")  # fmt: skip
        if packed:
            able, why = can_pack(loaded, encoder, page, turns)
            if not able and recipe.train.packing == "always":
                raise EvlecgError(f"the {role} cannot pack questions", where=loaded.checkpoint.name, hint=why)
            if not able:
                progress.detail(f"{role} cannot pack questions ({why}): one row a question")
            packed = checks["packed"] = packed and able
    return packed, checks


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
