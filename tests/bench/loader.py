"""Does reading keep ahead of training? A batch read back and drawn, beside one step of the smallest student.

    python -m tests.bench.loader [--batch N] [--augment LEVEL] [--json FILE]

A synthetic prepared folder is made on the fly (500 Hz, 10 s). Reading: records from the folder, pages drawn at the size
of the built-in student, and of student and teacher; then the same with processors and tokenizers, which is all that a
loader does. The step: forward, answer cross-entropy, backward and AdamW of the built-in student on such a batch, five
questions a page in one row. One thread each; targets are ratios to the step.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import torch

from evlecg.data.store import Prepared
from evlecg.data.tasks import label_samples
from evlecg.losses.objective import METHODS
from evlecg.models import load as models
from evlecg.models.batch import BatchBuilder, draw_views
from evlecg.models.encode import Encoder
from evlecg.models.outputs import AnswerHead, forward
from evlecg.page.augment import augmenter
from evlecg.page.render import PageStyle
from evlecg.prepare import prepare
from evlecg.recipe import AugmentConfig, ObjectiveConfig
from tests.bench.timing import one_thread, print_table, save, timed, told

STEP = "step of builtin:student"
TARGETS = ("read and draw, student", "read and draw, both")


def main() -> None:
    parser = argparse.ArgumentParser(description="Reading and drawing beside a training step.")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--augment", default="none", choices=("none", "light", "photo"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    one_thread()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "synthetic"
        prepare("synthetic", source=None, out=folder, counts={"train": 8 * given.batch, "val": 1, "test": 1}, seed=0)
        prepared = Prepared.open(folder)
        labels = ("NORM", "MI", "STTC", "CD", "HYP")
        samples = label_samples(prepared, prepared.indices("train").tolist(), labels, "Is it {description}?")
        student = models.load(models.inspect("builtin:student"), seed=0)
        teacher = models.inspect("builtin:teacher")
        encoders = [
            Encoder(student.checkpoint, student.processor),
            Encoder(teacher, models.load_processor(teacher)),
        ]
        augment = augmenter(AugmentConfig(level=given.augment), seed=0)
        style = PageStyle()
        alone = BatchBuilder(prepared, samples, style, encoders[0], None, packed=True, augment=augment)
        both = dataclasses.replace(alone, teacher=encoders[1])

        def indices(number: int) -> range:
            start = number * given.batch % (len(samples) - given.batch + 1)
            return range(start, start + given.batch)

        def pages(number: int, sides: list[Encoder]) -> None:
            sizes = [encoder.size_px for encoder in sides]
            for index in indices(number):
                draw_views(prepared, samples[index].record_index, sizes, style, augment=augment, epoch=number)

        objective = METHODS["ce"](ObjectiveConfig(), student=student.facts, teacher=None)
        optimizer = torch.optim.AdamW(student.model.parameters(), lr=1e-4)
        batch = alone(indices(0))
        student.model.train()

        def step(number: int) -> None:
            outputs = forward(student, batch.student)
            objective(outputs, None, batch, output_head=AnswerHead(student)).total.backward()
            optimizer.step()
            optimizer.zero_grad()

        times = timed(
            {
                STEP: step,
                TARGETS[0]: lambda number: pages(number, encoders[:1]),
                TARGETS[1]: lambda number: pages(number, encoders),
                "whole batch, student": lambda number: alone(indices(number)),
                "whole batch, both": lambda number: both(indices(number)),
            },
            given.rounds,
        )
    rows = told(times, STEP)
    print(
        f"{given.batch} records a batch, pages {encoders[0].size_px} and {encoders[1].size_px}, augment {given.augment}"
    )
    print_table(rows, STEP)
    verdicts = {name: rows[name]["ratio"] < 1 for name in TARGETS}
    for name, met in verdicts.items():
        print(f"{'met   ' if met else 'MISSED'}  {name}: {rows[name]['ratio']:.2f} of a step, wanted below 1")
    save(given.json, {"batch": given.batch, "augment": given.augment, "rows": rows, "targets_met": verdicts})


if __name__ == "__main__":
    main()
