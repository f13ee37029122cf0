"""runner.json: all that a runner needs beside the graphs, so that it needs neither tokenizer nor image processor.

A text is cut where the questions begin to differ: the prefix (system text, image, what all questions share) is run
once a page, every question's own tokens behind it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from evlecg.errors import EvlecgError
from evlecg.export.graphs import Graph
from evlecg.models.encode import Encoder, Turn
from evlecg.models.load import Loaded
from evlecg.models.outputs import model_positions
from evlecg.models.trained import TrainedWith
from evlecg.models.views import AnyEncoder, ClassifierEncoder
from evlecg.page.render import page_style, render
from evlecg.run import RUNNER_VERSION
from evlecg.schema import LEADS, Question

KNOWN_PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids")  # the last one only counts positions


def questions_of(loaded: Loaded, trained: TrainedWith) -> list[Question]:
    """The yes/no question of every label that a student was trained for.

    Raises:
        EvlecgError: it was trained for none.
    """
    labels = trained.labels
    if loaded.checkpoint.kind != "text":
        labels = {label: labels.get(label) or label for label in loaded.model.rows if label}
    if not labels:
        raise EvlecgError("the run knows no labels that a runner could answer", where=loaded.checkpoint.name,
                          hint="--format safetensors")  # fmt: skip
    return [
        Question(trained.question.replace("{description}", phrase), "yes", ("yes", "no"), label)
        for label, phrase in labels.items()
    ]


def runner_file(
    loaded: Loaded, encoder: AnyEncoder, trained: TrainedWith, questions: list[Question], graphs: dict[str, Graph],
    *, runtime: str, files: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """The contents of runner.json.

    Args:
        loaded, encoder: the student, and what draws its pages.
        trained: how its pages look.
        questions: of `questions_of`.
        graphs: of graphs.py.
        runtime: a key of `run.RUNTIMES`.
        files: graph -> file.
    """
    classifies = isinstance(encoder, ClassifierEncoder)
    form = encoder.form if isinstance(encoder, ClassifierEncoder) else None
    told: dict[str, Any] = {
        "version": RUNNER_VERSION,
        "runtime": runtime,
        "kind": loaded.checkpoint.kind,
        "graphs": files,
        "labels": [question.label for question in questions],
        "phrases": dict(trained.labels),
        "page": dataclasses.asdict(page_style(trained.page)) if form is None else None,
        "size_px": list(encoder.size_px) if encoder.size_px else None,
        "form": dataclasses.asdict(form) if form else None,
    }
    if classifies:
        told |= {
            "rows": [loaded.model.rows[question.label] for question in questions],
            "exclusive": loaded.model.exclusive,
            "reads_n_recorded": "n_recorded" in graphs["classifier"].inputs,
        }
    else:
        assert isinstance(encoder, Encoder)
        decoder: Any = graphs["decoder"].module
        told["prompt"] = prompt(loaded, encoder, questions, trained) | {
            "cache": [list(shape) for shape in decoder.shapes], "position_axes": decoder.position_axes,
        }  # fmt: skip
    return told


def blank_page(encoder: Encoder, trained: TrainedWith) -> Any:
    """A page with flat lines, of the encoder's size."""
    return render(np.zeros((len(LEADS), 1000)), 100.0, size_px=encoder.size_px, style=page_style(trained.page))


def prompt(loaded: Loaded, encoder: Encoder, questions: list[Question], trained: TrainedWith) -> dict[str, Any]:
    """Token ids and positions of the prefix and of every text behind it, and where its answer's tokens are read."""
    turns, owners = [], []
    for place, question in enumerate(questions):
        each = [Turn.of(question, choice, ends=False) for choice in question.choices]
        ids = [encoder.answer_ids(turn) for turn in each]
        if all(len(tokens) == 1 for tokens in ids) and len(set(ids)) == len(ids):  # all read off one position
            turns.append(each[0])
            owners.append((place, -1, [tokens[0] for tokens in ids]))
        else:
            turns += each
            owners += [(place, choice, []) for choice in range(len(each))]
    side = encoder.encode([blank_page(encoder, trained)], [turns])
    unknown = [
        key for key, value in side.inputs.items()
        if isinstance(value, torch.Tensor) and value.shape == side.valid_BS.shape and key not in KNOWN_PER_TOKEN
    ]  # fmt: skip
    if unknown:
        raise EvlecgError(
            f"the model reads {', '.join(unknown)} of every token, which the graphs do not",
            hint="--format safetensors",
            where=loaded.checkpoint.name,
        )
    ids_S, block_S = side.inputs["input_ids"][0], side.block_BS[0]
    position_PS = model_positions(loaded, side)
    position_PS = position_PS.reshape(-1, position_PS.shape[-1])
    texts = []
    for number, (question, choice, single) in enumerate(owners, start=1):
        mine = (block_S == number).nonzero()[:, 0]
        start = int(mine[0])
        answers = [(int(place) - start - 1, int(ids_S[place])) for row, place in side.answer_A2.tolist()
                   if block_S[place] == number]  # fmt: skip
        predicts = [(answers[0][0], token) for token in single] if single else answers
        texts.append({
            "question": question, "choice": choice, "ids": ids_S[mine].tolist(),
            "positions": position_PS[:, mine].tolist(), "predicts": predicts,
        })  # fmt: skip
    shared = block_S == 0
    return {
        "prefix_ids": ids_S[shared].tolist(),
        "prefix_positions": position_PS[:, shared].tolist(),
        "image_token_id": encoder.image_id,
        "pad_id": encoder.pad_id,
        "texts": texts,
    }
