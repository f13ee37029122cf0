"""The losses cannot tell a stored teacher from a live one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from evlecg.data.store import Prepared
from evlecg.data.tasks import label_samples
from evlecg.losses.objective import METHODS
from evlecg.models import load as models
from evlecg.models.batch import BatchBuilder
from evlecg.models.outputs import AnswerHead, forward
from evlecg.models.views import encoder_for
from evlecg.models.vocabulary import token_bytes
from evlecg.page.render import PageStyle
from evlecg.recipe import AlignmentConfig, BaselineConfig, ObjectiveConfig
from evlecg.teacher import FolderStore, LiveTeacher, MemoryStore, StoredSides, StoredTeacher
from evlecg.teacher.rows import RowSide, split_outputs, split_side
from evlecg.teacher.store import Entry
from evlecg.training.cache import facts_of, row_keys
from tests import tiny_classifiers

FIELDS = ("hidden", "visual", "projected", "query", "key", "value", "answer")
EXACT = {"atol": 2e-5, "rtol": 1e-5}  # computed among other neighbours


def setting(checkpoints, synthetic, packed=True, teacher="llava"):
    """A live teacher and the builder of batches; the second sample asks less than the others."""
    taught = models.load(models.inspect(str(checkpoints[teacher])))
    student = models.load(models.inspect(str(checkpoints["idefics3"])))
    prepared = Prepared.open(synthetic)
    samples = label_samples(prepared, prepared.indices("train").tolist(), ("NORM", "MI"), "Is it {description}?")
    samples[1] = dataclasses.replace(samples[1], questions=samples[1].questions[:1])
    builder = BatchBuilder(prepared, samples, PageStyle(), encoder_for(student), encoder_for(taught), packed)
    attention = taught.checkpoint.kind == "text"
    return student, taught, LiveTeacher(taught, visual_layer=-1, attention=attention), builder


def kept_in(store, taught, live, builder, fields, *batches):
    """Fills a store batch by batch; the builder and the signal that read it."""
    facts = facts_of(taught, live, builder, {})
    keys = [row_keys(builder.prepared, sample, builder.packed) for sample in builder.samples]
    if isinstance(store, FolderStore):
        store.start(facts)
    for place, batch in enumerate(batches):
        side, layouts = builder.teacher_half(batch)
        rows = zip(split_side(side, layouts), split_outputs(live.of(side), fields), strict=True)
        names = [key for index in batch for key in keys[index]]
        entries = [Entry(name, *row) for name, row in zip(names, rows, strict=True)]
        store.add(entries, remaining=len(batches) - place - 1)
    head = AnswerHead(taught) if "answer" in fields else None
    stored = dataclasses.replace(builder, teacher=None, stored=StoredSides(store, keys, facts))
    return stored, StoredTeacher(store, fields, facts, head)


def assert_same_side(found, expected):
    for item in dataclasses.fields(expected):
        name, value = item.name, getattr(expected, item.name)
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(getattr(found, name), value, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert found.frame == expected.frame


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("where", ["memory", "folder"])
def test_a_stored_teacher_gives_what_the_live_one_gives_in_any_company(
    checkpoints, synthetic, tmp_path, packed, where
):  # fmt: skip
    _, taught, live, builder = setting(checkpoints, synthetic, packed)
    store = MemoryStore() if where == "memory" else FolderStore.open(tmp_path / "c", {}, "none")
    stored, signal = kept_in(store, taught, live, builder, FIELDS, [0, 1, 2], [3, 4])
    expected_batch, batch = builder([4, 1, 0]), stored([4, 1, 0])
    assert_same_side(batch.teacher, expected_batch.teacher)
    assert_same_side(batch.student, expected_batch.student)
    assert set(batch.teacher.inputs) == {"input_ids"}, "no page was drawn for the teacher"
    found, expected = signal(batch), live(expected_batch)
    valid_BS = batch.teacher.valid_BS
    torch.testing.assert_close(found.hidden_BSD[valid_BS], expected.hidden_BSD[valid_BS], **EXACT)
    for name in ("visual_BND", "projected_BND", "answer_logits_AV"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **EXACT)
    for name, value in expected.attention.items():
        torch.testing.assert_close(found.attention[name], value, **EXACT)


@pytest.mark.parametrize("method", ["evl", "kl", "uld", "multilevel_ot", "dskd", "minilm", "feature", "em_kd", "rkd"])
def test_every_method_has_the_same_loss_from_the_cache(checkpoints, synthetic, tmp_path, method):
    student, taught, live, builder = setting(checkpoints, synthetic)
    store = FolderStore.open(tmp_path / "c", {}, "none")
    stored, signal = kept_in(store, taught, live, builder, FIELDS, [0, 1, 2, 3], [4, 5, 6, 7])
    config = ObjectiveConfig(
        lambda_r=1, lambda_m=0.5, align=AlignmentConfig(heads=2), baseline=BaselineConfig(relation_heads=2)
    )
    facts = [
        dataclasses.replace(loaded.facts, tokens=token_bytes(loaded, encoder))
        for loaded, encoder in ((student, builder.student), (taught, builder.teacher))
    ]
    torch.manual_seed(0)
    objective = METHODS[method](config, student=facts[0], teacher=facts[1])
    losses = []
    for batch, teacher in ((builder([6, 1, 0, 3]), live), (stored([6, 1, 0, 3]), signal)):
        outputs = forward(student, batch.student, attention=True)
        heads = {"output_head": AnswerHead(student), "teacher_head": AnswerHead(taught)}
        losses.append(objective(outputs, teacher(batch), batch, **heads).values)
    assert len(losses[0]) > 1
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[1][name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", ["hubert", "vit"])
def test_a_classifier_is_stored_too(checkpoints, synthetic, tmp_path, family):
    """A trace has cells of its own behind the page's, and logits are kept as they are: they are two."""
    teacher = checkpoints | {"teacher": tiny_classifiers.write(tmp_path / "teacher", family)}
    _, taught, live, builder = setting(teacher, synthetic, teacher="teacher")
    store = FolderStore.open(tmp_path / "c", {}, "none")
    stored, signal = kept_in(store, taught, live, builder, ("hidden", "visual", "logits"), [0, 1], [2])
    expected_batch, batch = builder([2, 0]), stored([2, 0])
    assert_same_side(batch.teacher, expected_batch.teacher)
    torch.testing.assert_close(batch.cell_time_C2, expected_batch.cell_time_C2, equal_nan=True)
    found, expected = signal(batch), live(expected_batch)
    torch.testing.assert_close(found.visual_BND, expected.visual_BND, **EXACT)
    torch.testing.assert_close(found.answer_logits_AV, expected.answer_logits_AV, equal_nan=True, **EXACT)


def test_only_what_is_read_is_kept_and_memory_has_a_limit(checkpoints, synthetic):
    _, taught, live, builder = setting(checkpoints, synthetic)
    store = MemoryStore()
    stored, signal = kept_in(store, taught, live, builder, ("visual",), [0, 1])
    found = signal(stored([0, 1]))
    assert found.visual_BND.shape[-1] > 0 and found.hidden_BSD.shape[-1] == 0 and not found.attention
    key = stored.stored.keys[0][0]
    assert not store.lacks(key, ["visual"]) and store.lacks(key, ["hidden"]) and store.lacks("other", [])
    with pytest.raises(Exception, match="more than is kept in memory") as caught:
        kept_in(MemoryStore(limit_bytes=3 * store.held_bytes), taught, live, builder, ("visual",), [0, 1], [2], [3],
                [4], [5], [6])  # fmt: skip
    assert "--cache DIR" in str(caught.value)


def test_a_row_reads_back_as_it_was_written(checkpoints, synthetic):
    *_, builder = setting(checkpoints, synthetic)
    side, layouts = builder.teacher_half([0, 1])
    for row in split_side(side, layouts):
        again = RowSide.from_bytes(row.to_bytes(), row.geometry)
        for item in dataclasses.fields(row)[:-1]:
            assert getattr(again, item.name).tolist() == getattr(row, item.name).astype(int).tolist()
