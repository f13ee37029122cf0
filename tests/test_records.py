"""Relations among records: plain loops, invariances, what is the same question, parts of a step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from evlecg.losses.objective import EvlObjective
from evlecg.losses.records import (
    RecordStates,
    answer_relation,
    by_question,
    first_rows,
    of_neighbours,
    place_relation,
    question_states,
)
from evlecg.losses.relation import relation_loss
from evlecg.recipe import ObjectiveConfig, RecordsConfig, RelationConfig, load_recipe
from evlecg.schema import Batch, ModelFacts
from tests.test_alignment import make_side, seeded
from tests.test_objective import STUDENT_WIDTH, TEACHER_WIDTH, VOCABULARY, make_batch, make_head, make_pair

WEIGHTS = {"distance": 0.5, "cosine": 0.5}


def loops(student: list[Tensor], teacher: list[Tensor]) -> float:
    """The relation loss of a few records, straight from its equation."""

    def distances(states: list[Tensor]) -> list[list[float]]:
        d = [[float((a - b).norm()) for b in states] for a in states]
        mean = sum(map(sum, d)) / (len(states) * (len(states) - 1))
        return [[value / mean for value in row] for row in d]

    def cosines(states: list[Tensor]) -> list[list[float]]:
        return [[float(a @ b / (a.norm() * b.norm())) for b in states] for a in states]

    total, n = 0.0, len(student)
    for relation in (distances, cosines):
        for ours, theirs in zip(relation(student), relation(teacher), strict=True):
            total += 0.5 * sum((x - y) ** 2 for x, y in zip(ours, theirs, strict=True)) / n**2
    return total


def test_states_before_the_first_token_of_every_answer() -> None:
    blocks = [[0, 1, 1, 1, 2, 2, 2], [0, 1, 1, 2, 2, -1, -1]]
    side = make_side(blocks, [[0] * 7] * 2, [[0] * 7] * 2, torch.zeros(2, 0, 4),
                     answers=[(0, 2), (0, 3), (0, 5), (0, 6), (1, 2), (1, 4)])  # fmt: skip
    hidden = torch.arange(14.0).reshape(2, 7, 1)
    assert question_states(hidden, side)[:, 0].tolist() == [1, 4, 8, 10]


def test_the_same_question_stands_side_by_side() -> None:
    states, asked = torch.arange(6.0)[:, None], torch.tensor([0, 1, 1, 0, 2, 1])
    grouped, mask = by_question(states, asked)
    assert mask.tolist() == [[True, True, False], [True, True, True], [True, False, False]]
    assert [row[:n].tolist() for row, n in zip(grouped[..., 0], mask.sum(1), strict=True)] == [[0, 3], [1, 2, 5], [4]]
    nothing, none = by_question(states[:0], asked[:0])
    assert nothing.shape == (0, 0, 1) and none.shape == (0, 0)


def test_neighbours_are_asked_the_same() -> None:
    states, asked = torch.arange(6.0)[:, None], torch.tensor([0, 1, 1, 0, 2, 1])
    assert of_neighbours(states, asked)[:, 0].tolist() == [3, 2, 5, 0, 4, 1]


def at_questions(student: Tensor, teacher: Tensor, asked: Tensor) -> RecordStates:
    nowhere = student.new_zeros(0, 0, 1)
    return RecordStates(student, teacher, asked, nowhere, nowhere, nowhere[..., 0].bool(), student.new_zeros(0, 4))


def at_places(student: Tensor, teacher: Tensor, mask: Tensor, cells: Tensor | None = None) -> RecordStates:
    none = student.new_zeros(0, 1)
    number = torch.arange(float(mask.shape[1]))[:, None].expand(-1, 4)
    return RecordStates(none, none, torch.zeros(0, dtype=torch.long), student, teacher, mask,
                        number if cells is None else cells)  # fmt: skip


def test_answers_against_plain_loops() -> None:
    student, teacher = seeded(6, 3), seeded(6, 5, seed=1)
    asked = torch.tensor([0, 1, 0, 1, 0, 2])
    expected = [loops([student[q] for q in group], [teacher[q] for q in group]) for group in ((0, 2, 4), (1, 3))]
    found = answer_relation([at_questions(student, teacher, asked)], **WEIGHTS)
    assert float(found) == pytest.approx(sum(expected) / 2, rel=1e-9), "a question asked once says nothing"
    order = torch.tensor([4, 1, 0, 5, 2, 3])
    turned = at_questions(student[order], teacher[order], asked[order])
    assert_close(answer_relation([turned], **WEIGHTS), found)
    rotation = torch.linalg.qr(seeded(5, 5, seed=3))[0]
    assert_close(answer_relation([at_questions(student, teacher @ rotation * 7, asked)], **WEIGHTS), found)
    alone = answer_relation([at_questions(student.requires_grad_(), teacher, torch.arange(6))], **WEIGHTS)
    assert float(alone.detach()) == 0 and alone.requires_grad


def test_places_against_plain_loops() -> None:
    student, teacher = seeded(4, 3, 2), seeded(4, 3, 6, seed=1)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]]).bool()
    have = [[record for record in range(4) if mask[record, cell]] for cell in range(3)]
    told = [loops([student[r, cell] for r in records], [teacher[r, cell] for r in records])
            for cell, records in enumerate(have) if len(records) > 1]  # fmt: skip
    found = place_relation([at_places(student, teacher, mask)], **WEIGHTS)
    assert float(found) == pytest.approx(sum(told) / 2, rel=1e-9)


def test_cells_of_other_batches_are_found_by_what_they_are() -> None:
    ours = torch.tensor([[0, 0, 2.5, 0], [1, 0, 2.5, 0], [1, 0, 2.5, 1]])
    theirs = torch.tensor([[1, 0, 2.5, 0], [2, 0, 2.5, 0], [0, 2.5, 5, 0]])
    before = at_places(seeded(2, 3, 4), seeded(2, 3, 5), torch.ones(2, 3).bool(), theirs).among(ours)
    assert before.mask_RC.tolist() == [[False, True, False]] * 2
    assert_close(before.student_RCD[:, 1], seeded(2, 3, 4)[:, 0])


def test_parts_with_cells_of_their_own_are_related_where_they_meet() -> None:
    leads = torch.arange(3.0)[:, None] * torch.tensor([1.0, 0, 0, 0])
    student, teacher = seeded(4, 3, 4), seeded(4, 3, 5, seed=1)
    whole = place_relation([at_places(student, teacher, torch.ones(4, 3).bool(), leads)], **WEIGHTS)
    turned = torch.tensor([2, 0, 1])
    parts = [at_places(student[:2], teacher[:2], torch.ones(2, 3).bool(), leads),
             at_places(student[2:, turned], teacher[2:, turned], torch.ones(2, 3).bool(), leads[turned])]  # fmt: skip
    assert_close(place_relation(parts, **WEIGHTS), whole)


def build(config: ObjectiveConfig) -> EvlObjective:
    torch.manual_seed(0)
    facts = (ModelFacts(STUDENT_WIDTH, VOCABULARY), ModelFacts(TEACHER_WIDTH, VOCABULARY))
    return EvlObjective(config, student=facts[0], teacher=facts[1])


ONLY = ObjectiveConfig(lambda_m=0, alpha=0.4, lambda_r=0, lambda_ot=0, lambda_rec=5, relation=RelationConfig(grid=2))


def asked(batch: Batch) -> Batch:
    return replace(batch, asked_Q=torch.zeros(len(batch.sample_ids), dtype=torch.long))


def test_the_objective_weighs_both_parts_and_counts_what_they_are_means_of() -> None:
    batch = asked(make_batch())
    objective = build(replace(ONLY, records=RecordsConfig(answers=2.0, visual=0.5)))
    assert objective.needs == {"teacher", "hidden", "visual"}
    student, teacher = make_pair(batch)
    terms = objective(student, teacher, batch, output_head=make_head(), ramp=0.5, diagnose=True)
    assert set(terms.values) == {"ce", "rec_answer", "rec_visual"} == set(objective.counts(batch))
    assert terms.weights["rec_answer"] == pytest.approx(0.4 * 0.5 * 5 * 2)
    assert terms.weights["rec_visual"] == pytest.approx(0.4 * 0.5 * 5 * 0.5)
    assert {"rec_answer_rolled_gap", "rec_visual_rolled_gap"} <= set(terms.diagnostics)
    assert int(objective.counts(batch)["rec_answer"]) == 1 and int(objective.counts(batch)["rec_visual"]) == 4
    at = batch.student.answer_A2[::2]
    expected = relation_loss(
        student.hidden_BSD[at[:, 0], at[:, 1] - 1][None], question_states(teacher.hidden_BSD, teacher.side)[None],
        torch.ones(1, 3, dtype=torch.bool),
    )  # fmt: skip
    assert_close(terms.values["rec_answer"], expected)
    terms.total.backward()
    for leaf in (student.hidden_BSD, student.visual_BND):
        assert leaf.grad is not None and torch.isfinite(leaf.grad).all() and leaf.grad.abs().sum() > 0


def test_a_teacher_is_followed_and_the_published_form_has_none_of_it() -> None:
    batch = asked(make_batch())
    student, _ = make_pair(batch)
    same = replace(student, side=batch.student)
    values = build(ONLY)(student, same, replace(batch, teacher=batch.student), output_head=make_head()).values
    assert float(values["rec_answer"].detach()) == 0 == float(values["rec_visual"].detach())
    strict = build(ObjectiveConfig(lambda_r=1, strict=True, lambda_m=1, lambda_ot=1, lambda_rec=5)).double()
    student, teacher = make_pair(batch)
    terms = strict(student, teacher, batch, output_head=make_head())
    assert set(terms.values) == {"ce", "mhca", "rel", "ot"}
    paper = build(load_recipe("paper").objective).double()
    assert set(paper(student, teacher, batch, output_head=make_head()).values) == set(terms.values)
    assert build(ObjectiveConfig(relation=RelationConfig(grid=2))).needs == build(ONLY).needs, "the default"
    assert build(replace(ONLY, records=RecordsConfig(distance=0, cosine=0))).needs == frozenset()
    unknown = build(ONLY)(*make_pair(make_batch()), make_batch(), output_head=make_head())
    assert set(unknown.values) == {"ce", "rec_visual"}, "nobody said which questions are the same"


def test_a_part_in_company_pulls_as_it_does_in_the_whole() -> None:
    whole, head = asked(make_batch(rows=3)), make_head()
    objective = build(ONLY)
    student, teacher = make_pair(whole)
    values = objective(student, teacher, whole, output_head=head).values
    leaves = student.hidden_BSD, student.visual_BND
    expected = [torch.autograd.grad(values[f"rec_{name}"], leaf, retain_graph=True)[0]
                for name, leaf in zip(("answer", "visual"), leaves, strict=True)]  # fmt: skip
    single, found = asked(make_batch(rows=1)), [torch.zeros_like(leaf) for leaf in leaves]
    singles = [
        [replace(outputs, hidden_BSD=outputs.hidden_BSD[row : row + 1], visual_BND=outputs.visual_BND[row : row + 1],
                 side=side)
         for outputs, side in ((student, single.student), (teacher, single.teacher))] for row in range(3)
    ]  # fmt: skip
    parts = [objective.record_states(*pair, single).to("cpu") for pair in singles]
    assert not any(part.student_QD.requires_grad or part.student_RCD.requires_grad for part in parts)
    company = objective.in_company(parts, [0, 1, 2, None])
    for row, pair in enumerate(singles):
        alone = objective(*pair, single, output_head=head).values
        terms = objective(*pair, single, output_head=head, company=company[row])
        for place, name in enumerate(("rec_answer", "rec_visual")):
            assert float(alone[name].detach()) == 0
            assert_close(terms.values[name], values[name])
            found[place] += torch.autograd.grad(terms.values[name], leaves[place], retain_graph=True)[0] / 3
    for mine, theirs in zip(found, expected, strict=True):
        assert float(theirs.abs().sum()) > 0
        assert_close(mine, theirs)
    filler = objective(*singles[0], single, output_head=head, company=company[3]).values["rec_answer"]
    assert_close(filler, values["rec_answer"])
    assert float(torch.autograd.grad(filler, student.hidden_BSD)[0].abs().sum()) == 0, "it weighs nothing"
    told = objective.counts(single, across=True)
    assert int(told["rec_answer"]) == int(told["rec_visual"]) == 1


def test_further_rows_of_a_record_are_no_further_records() -> None:
    batch = replace(make_batch(rows=4), sample_ids=("a", "b"), record_B=torch.tensor([0, 0, 1, 1]))
    assert first_rows(batch).tolist() == [0, 2]
    student, teacher = make_pair(batch)
    objective = build(replace(ONLY, records=RecordsConfig(answers=0)))
    found = objective(student, teacher, batch, output_head=make_head()).values["rec_visual"]
    moved = teacher.visual_BND.clone()
    moved[1] += 3.0
    assert_close(objective(student, replace(teacher, visual_BND=moved), batch, output_head=make_head())
                 .values["rec_visual"], found)  # fmt: skip
