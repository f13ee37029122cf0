"""The losses cannot tell a remembered teacher from a live one."""

from __future__ import annotations

import torch

from evlecg.data.store import Prepared
from evlecg.data.tasks import label_samples
from evlecg.models import load as models
from evlecg.models.batch import BatchBuilder
from evlecg.models.encode import Encoder
from evlecg.page.render import PageStyle
from evlecg.teacher import LiveTeacher, RememberingTeacher

ALL = frozenset({"teacher", "hidden", "visual", "projected"})


def setting(checkpoints, synthetic, packed=True):
    teacher = models.load(models.inspect(str(checkpoints["llava"])))
    student = models.inspect(str(checkpoints["idefics3"]))
    prepared = Prepared.open(synthetic)
    samples = label_samples(prepared, prepared.indices("train").tolist(), ("NORM", "MI"), "Is it {description}?")
    samples[1] = type(samples[1])(samples[1].record_index, samples[1].record_id, samples[1].questions[:1])  # shorter
    builder = BatchBuilder(prepared, samples, PageStyle(), Encoder(student, models.load_processor(student)),
                           Encoder(teacher.checkpoint, teacher.processor), packed)  # fmt: skip
    return LiveTeacher(teacher, visual_layer=-1), builder


class Counting:
    def __init__(self, signal):
        self.signal, self.calls = signal, 0

    def __call__(self, batch):
        self.calls += 1
        return self.signal(batch)


def test_memory_gives_what_the_teacher_gives_in_any_company(checkpoints, synthetic):
    live, builder = setting(checkpoints, synthetic)
    counting = Counting(live)
    remembering = RememberingTeacher(counting, ALL)
    remembering(builder([0, 1, 2]))
    remembering(builder([3, 4]))
    assert counting.calls == 2
    mixed = builder([4, 1])
    found, expected = remembering(mixed), live(mixed)
    assert counting.calls == 2
    valid_BS = mixed.teacher.valid_BS
    torch.testing.assert_close(found.hidden_BSD[valid_BS], expected.hidden_BSD[valid_BS], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.visual_BND, expected.visual_BND, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.projected_BND, expected.projected_BND, atol=1e-5, rtol=1e-5)


def test_only_what_is_needed_is_kept_and_no_more_than_allowed(checkpoints, synthetic):
    live, builder = setting(checkpoints, synthetic)
    counting = Counting(live)
    remembering = RememberingTeacher(counting, frozenset({"visual"}), limit_bytes=1)
    remembering(builder([0, 1]))
    assert [set(row) for row in remembering.rows.values()] == [{"visual"}]  # full after the first
    remembering(builder([0, 1]))
    assert counting.calls == 2


def test_rows_that_are_questions_are_not_remembered(checkpoints, synthetic):
    live, builder = setting(checkpoints, synthetic, packed=False)
    remembering = RememberingTeacher(live, ALL)
    remembering(builder([0, 2]))
    assert remembering.rows == {}
