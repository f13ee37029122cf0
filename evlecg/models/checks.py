"""What must hold before the first step, on one screen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evlecg.data.store import Prepared
from evlecg.errors import EvlecgError
from evlecg.models.batch import BatchBuilder, draw
from evlecg.models.encode import Turn
from evlecg.models.kinds import ANSWERS
from evlecg.models.load import Checkpoint, Loaded
from evlecg.models.outputs import can_pack, count_features, image_matters, to_device, tree_positions
from evlecg.models.views import view_of
from evlecg.progress import Progress
from evlecg.recipe import Recipe
from evlecg.schema import Batch, Sample, Side

STATES = frozenset({"teacher", "hidden", "visual", "projected"})  # what objectives read that are no answers
EXAMPLE_BYTES = 60  # the longest answer that is shown


@dataclass(frozen=True)
class TokenizerMatch:
    """How two tokenizers relate.

    Attributes:
        kind: "same", "padded head" (same ids, but one output head has unused rows), "extended" (one holds the other's
            ids and more) or "different".
        shared: token texts with the same id on both sides.
        note: what that means for training.
    """

    kind: str
    shared: int
    note: str


def match_tokenizers(student: Loaded, teacher: Loaded) -> TokenizerMatch:
    """Compares ids and sizes of two models' vocabularies."""
    ours, theirs = (loaded.processor.tokenizer.get_vocab() for loaded in (student, teacher))
    heads = student.checkpoint.vocab_size, teacher.checkpoint.vocab_size
    shared = sum(theirs.get(text) == number for text, number in ours.items())
    if ours == theirs and heads[0] == heads[1]:
        return TokenizerMatch("same", shared, "ids mean the same on both sides")
    if ours == theirs:
        smaller, larger = sorted(heads)
        return TokenizerMatch(
            "padded head", shared,
            f"same ids; rows {max(len(ours), smaller)} to {larger - 1} of the larger head stand for nothing",
        )  # fmt: skip
    if shared == min(len(ours), len(theirs)):
        more = abs(len(ours) - len(theirs))
        return TokenizerMatch("extended", shared, f"{shared} ids mean the same; one side has {more} more")
    return TokenizerMatch(
        "different", shared, "texts are compared at the byte offsets where both sides have a token boundary"
    )


def answer_ends(side: Side, row: int = 0, block: int = 1) -> list[int]:
    """Byte offsets at which the tokens of one question's answer end, ascending; the end mark counts as a byte."""
    chosen = (side.answer_A2[:, 0] == row) & (side.block_BS[side.answer_A2[:, 0], side.answer_A2[:, 1]] == block)
    places_A2 = side.answer_A2[chosen]
    return sorted(set(side.byte_end_BS[places_A2[:, 0], places_A2[:, 1]].tolist()) - {0})


def cut(answer: str, ends: Sequence[int]) -> list[str]:
    """An answer cut at byte offsets; a piece of a character shows as a replacement mark."""
    data = answer.encode()
    return [data[start:end].decode(errors="replace") for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def longest_samples(samples: Sequence[Sample], n: int) -> list[int]:
    """Indices of the `n` samples with the longest texts: what a batch may come to."""

    def length(index: int) -> int:
        return sum(
            len(question.text) + len(question.answer) + sum(len(said) for pair in question.history for said in pair)
            for question in samples[index].questions
        )

    return sorted(range(len(samples)), key=length, reverse=True)[:n]


def check_lengths(batch: Batch, checkpoints: Sequence[Checkpoint]) -> list[tuple[int, int | None]]:
    """Positions that the longest row of a batch takes, and how many the model was made for; nothing is truncated.

    Raises:
        EvlecgError: a row is longer than its model's positions.
    """
    found = []
    for side, checkpoint in zip((batch.student, batch.teacher), checkpoints, strict=False):
        assert side is not None
        limit = None
        if checkpoint.kind == "text":
            limit = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
        longest = int(tree_positions(side.block_BS)[side.valid_BS].max()) + 1
        if limit is not None and longest > limit:
            raise EvlecgError(
                f"the longest page and question take {longest} positions, the model has {limit}", where=checkpoint.name,
                hint="nothing is cut off: use a smaller page (page.student_size, page.teacher_size) or shorter texts",
            )  # fmt: skip
        found.append((longest, limit))
    return found


def startup_checks(
    recipe: Recipe,
    unpacked: BatchBuilder,
    student: Loaded,
    teacher: Loaded | None,
    progress: Progress,
    *,
    lengths: Sequence[tuple[int, int | None]],
    first: str = "student",
) -> tuple[bool, dict[str, Any]]:
    """What must hold before a step is worth taking, shown as one table.

    Per model: page size, visual tokens and image features (equal), the longest sequence, trained parameters, how an
    example answer is cut into tokens (whole), how far the answer moves when the page is blanked (at all). Between them:
    tokenizers, and the groups of bytes that both sides have a boundary at. Last: whether questions are packed.

    Args:
        recipe: the run.
        unpacked: draws and encodes.
        student, teacher: in memory.
        progress: who listens.
        lengths: from `check_lengths`.
        first: what `student` is: a teacher may be looked at alone.

    Returns:
        (whether questions are packed, all findings for run.json).

    Raises:
        EvlecgError: one of them does not hold.
    """
    sample = max(unpacked.samples[:64], key=lambda candidate: len(candidate.questions))
    turns = [Turn.of(question) for question in sample.questions]
    short = [turn for turn in turns if 0 < len(turn.answer.encode()) <= EXAMPLE_BYTES]
    example = max(short, key=lambda turn: len(turn.answer), default=turns[0])
    packed = recipe.train.packing != "never" and len(turns) > 1
    checks: dict[str, Any] = {"packed": packed}
    sides = [(first, student, unpacked.student)]
    if teacher is not None and unpacked.teacher is not None:
        sides.append(("teacher", teacher, unpacked.teacher))
    ends: list[list[int]] = []
    for (role, loaded, encoder), (longest, limit) in zip(sides, lengths, strict=True):
        name = loaded.checkpoint.name
        page = draw(unpacked.prepared, sample.record_index, view_of(encoder), unpacked.style)
        side = to_device(encoder.encode([page], [[example]]), loaded.model.device)
        if len(side.answer_A2) == 0:
            raise EvlecgError("no answer token is left to learn from", where=name,
                              hint="the chat template drops the assistant's text")  # fmt: skip
        tokens = side.visual_box_BN4.shape[1]
        features = count_features(loaded, side) if loaded.checkpoint.kind == "text" else tokens
        if features is not None and features != tokens:
            hint = "its processor and its weights do not belong together (patch size, image size, select strategy)"
            raise EvlecgError(f"the {role} has {tokens} image tokens in its text and {features} image features",
                              where=name, hint=hint)  # fmt: skip
        try:
            matters = image_matters(loaded, side)
        except (ValueError, RuntimeError) as error:
            hint = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise EvlecgError(f"the {role} cannot read a page and a question", where=name, hint=hint) from error
        if matters < 1e-5:
            raise EvlecgError(f"the {role}'s answer does not change when its input is blanked", where=name,
                              hint="it does not reach the model")  # fmt: skip
        n_bytes = len(example.answer.encode())
        ends.append([end for end in answer_ends(side) if end <= n_bytes])
        if loaded.checkpoint.kind == "text" and n_bytes and ends[-1][-1:] != [n_bytes]:
            raise EvlecgError(f"the {role}'s tokens do not cover the whole answer {example.answer!r}", where=name,
                              hint="its chat template or tokenizer changes the text")  # fmt: skip
        trained = sum(parameter.numel() for parameter in loaded.model.parameters() if parameter.requires_grad)
        checks[role] = {
            "checkpoint": name,
            "family": loaded.checkpoint.model_type,
            "parameters": loaded.n_parameters,
            "trained": trained if role == "student" else 0,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "page_px": list(encoder.size_px) if encoder.size_px else None,
            "signal": dataclasses.asdict(loaded.form) | {"window_s": loaded.form.window_s} if loaded.form else None,
            "visual_tokens": tokens,
            "image_features": features,
            "sequence": longest,
            "positions": limit,
            "vocabulary": loaded.checkpoint.vocab_size,
            "answer": cut(example.answer, ends[-1]),
            "image_effect": matters,
        }
        if packed:
            able, why = can_pack(loaded, encoder, page, turns)
            if not able and recipe.train.packing == "always":
                raise EvlecgError(f"the {role} cannot pack questions", where=name, hint=why)
            checks[role]["packing"] = "yes" if able else f"no: {why}"
            packed = checks["packed"] = packed and able
    if teacher is not None and all(loaded.checkpoint.kind == "text" for _, loaded, _ in sides):
        match = match_tokenizers(student, teacher)
        groups = cut(example.answer, sorted(set(ends[0]) & set(ends[1])))
        checks["tokenizers"] = {"kind": match.kind, "shared": match.shared, "note": match.note}
        checks["answer_groups"] = groups
    _show(checks, [role for role, *_ in sides], progress)
    if first == "student" and student.model.dtype in (torch.bfloat16, torch.float16) and not recipe.lora.rank:
        progress.warn(
            f"the student is trained in {student.model.dtype}: steps of under a few thousandths of a weight are lost; "
            "train.dtype=float32 with train.mixed_precision=bf16 keeps them"
        )
    return packed, checks


def _seen(told: dict[str, Any]) -> str:
    """What a model looks at, in words."""
    if told["page_px"]:
        return f"{told['page_px'][0]}x{told['page_px'][1]} px"
    form = told["signal"]
    return f"{form['window_s']:g} s at {form['fs_hz']:g} Hz, leads {form['leads']}, scale {form['scale']}"


def _show(checks: dict[str, Any], roles: Sequence[str], progress: Progress) -> None:
    """The screen."""
    columns: list[dict[str, Any]] = [checks[role] for role in roles]

    def row(label: str, text: Any) -> list[str]:
        return [label, *(text(found) for found in columns)]

    rows = [
        row("checkpoint", lambda c: c["checkpoint"]),
        row("family", lambda c: f"{c['family']}, {c['dtype']}"),
        row("parameters", lambda c: f"{c['parameters']:,}"),
        row("  trained", lambda c: f"{c['trained']:,} ({c['trained'] / max(c['parameters'], 1):.1%})"),
        row("page or signal", _seen),
        row("image tokens = features", lambda c: f"{c['visual_tokens']} = {c['image_features'] or 'checked inside'}"),
        row("longest sequence", lambda c: f"{c['sequence']} of {c['positions'] or 'any number'} positions"),
        row("effect of blanking the page", lambda c: f"{c['image_effect']:.2g}"),
        row("vocabulary", lambda c: f"{c['vocabulary']:,}"),
        row("an answer's tokens", lambda c: "|".join(c["answer"])),
        row("packs questions", lambda c: c.get("packing", "not tried")),
    ]
    if "tokenizers" in checks:
        found = checks["tokenizers"]
        rows += [["its byte groups", "|".join(checks["answer_groups"]), ""], ["tokenizers", found["kind"], ""]]
    progress.table("start-up checks", ["", *roles], rows)
    if "tokenizers" in checks:
        progress.info(f"tokenizers: {found['kind']} ({found['note']})")


def check_method(name: str, reads: frozenset[str], checkpoint: Checkpoint) -> None:
    """That a method finds in a model what it reads.

    Args:
        name: of the method.
        reads: what it reads of both models.
        checkpoint: one of them.

    Raises:
        EvlecgError: queries and keys, or words before an answer, of a model that has none or whose are not read.
    """
    if checkpoint.kind == "text" and checkpoint.apart is None:
        return
    for part, what in (("attention", "queries and keys"), ("heads", "words before an answer")):
        if part in reads:
            raise EvlecgError(f"where a page stands apart from the text, or there is no text, no {what} can be read",
                              where=checkpoint.name, hint=f"--method {name} cannot read this family")  # fmt: skip


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
