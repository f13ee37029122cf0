"""The whole objective: totals and gradients, published form, what is built, and collapse seen by the controls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from evlecg.errors import EvlecgError
from evlecg.losses.objective import METHODS, CeObjective, EvlObjective, answer_cross_entropy
from evlecg.losses.relation import page_grid
from evlecg.losses.transport import token_lead
from evlecg.recipe import AlignmentConfig, ObjectiveConfig, RelationConfig, TransportConfig
from evlecg.schema import AnswerLogits, Batch, ModelFacts, Outputs, Side
from tests.test_alignment import Head, make_side, seeded

STUDENT_WIDTH, TEACHER_WIDTH, VOCABULARY = 8, 12, 11
STUDENT, TEACHER = ModelFacts(STUDENT_WIDTH, VOCABULARY), ModelFacts(TEACHER_WIDTH, VOCABULARY)
ALL = ObjectiveConfig(lambda_rec=0, lambda_m=0.7, lambda_r=2.0, lambda_ot=0.3)
TOKENS = replace(ALL, align=AlignmentConfig(features="last", centred=True))
FORMS = {"default": ALL, "published": replace(ALL, strict=True), "tokens": TOKENS}


def make_outputs(side: Side, width: int, *, seed: int, dtype: torch.dtype = torch.float64) -> Outputs:
    """Random outputs whose every tensor is a leaf of the graph."""
    batch, positions = side.valid_BS.shape
    count = side.visual_box_BN4.shape[1]

    def leaf(*shape: int, offset: int) -> Tensor:
        return seeded(*shape, seed=seed + offset).to(dtype).requires_grad_()

    return Outputs(
        hidden_BSD=leaf(batch, positions, width, offset=0),
        visual_BND=leaf(batch, count, width, offset=1),
        projected_BND=leaf(batch, count, width, offset=2),
        answer_logits=AnswerLogits(leaf(len(side.answer_A2), VOCABULARY, offset=3)),
        side=side,
    )


def frozen(outputs: Outputs) -> Outputs:
    names = ("hidden_BSD", "visual_BND", "projected_BND")
    states = {name: getattr(outputs, name).detach() for name in names}
    return replace(outputs, answer_logits=AnswerLogits(outputs.answer_logits_AV.detach()), **states)


def make_batch(rows: int = 3) -> Batch:
    """Student: 4 visual tokens and one answer of two tokens; teacher: 9 visual tokens and other bytes a token."""
    cells = page_grid(2, like=torch.zeros(1, dtype=torch.float64)).expand(rows, -1, -1)
    grid = [page_grid(side, like=cells).expand(rows, -1, -1) for side in (2, 3)]
    student = make_side(
        [[0] * 5 + [1, 1, 1, -1]] * rows,
        [[0] * 6 + [1, 3, 0]] * rows,
        [[0, 1, 1, 1, 1, 0, 0, 0, 0]] * rows,
        grid[0],
        answers=[(row, position) for row in range(rows) for position in (6, 7)],
        cells=cells,
    )
    teacher = make_side(
        [[0] * 10 + [1, 1, 1, 1]] * rows,
        [[0] * 11 + [1, 2, 3]] * rows,
        [[1] * 9 + [0] * 5] * rows,
        grid[1],
        answers=[(row, position) for row in range(rows) for position in (11, 12, 13)],
        cells=cells,
    )
    time = torch.tensor([[0.0, 2.5], [2.5, 5.0]] * 2)
    return Batch(
        tuple(f"r{row}" for row in range(rows)), torch.arange(rows), student, teacher, torch.tensor([0, 0, 1, 1]), time
    )


def build(config: ObjectiveConfig, *, seed: int = 0) -> EvlObjective:
    torch.manual_seed(seed)
    return EvlObjective(config, student=STUDENT, teacher=TEACHER).double()


def make_head() -> nn.Module:
    torch.manual_seed(1)
    return Head(STUDENT_WIDTH, VOCABULARY).double()


def make_pair(batch: Batch, dtype: torch.dtype = torch.float64) -> tuple[Outputs, Outputs]:
    assert batch.teacher is not None
    student = make_outputs(batch.student, STUDENT_WIDTH, seed=10, dtype=dtype)
    return student, frozen(make_outputs(batch.teacher, TEACHER_WIDTH, seed=20, dtype=dtype))


def test_cross_entropy_against_plain_loops_and_empty() -> None:
    logits, targets = seeded(3, 5), torch.tensor([4, 0, 2])
    expected = [float(torch.logsumexp(row, 0) - row[t]) for row, t in zip(logits, targets, strict=True)]
    assert float(answer_cross_entropy(AnswerLogits(logits), targets)) == pytest.approx(sum(expected) / 3)
    assert answer_cross_entropy(AnswerLogits(logits.bfloat16()), targets).dtype == torch.float32
    empty = answer_cross_entropy(AnswerLogits(torch.zeros(0, 5, requires_grad=True)), targets[:0])
    assert float(empty.detach()) == 0 and empty.requires_grad


def test_ce_is_cross_entropy_alone_with_weight_one() -> None:
    batch = make_batch()
    student, _ = make_pair(batch)
    objective = METHODS["ce"](ALL, student=STUDENT, teacher=None)
    assert isinstance(objective, CeObjective) and objective.needs == frozenset()
    assert not list(objective.parameters())
    terms = objective(student, None, batch, output_head=make_head())
    assert_close(terms.total, F.cross_entropy(student.answer_logits_AV, batch.student.answer_ids_A))
    assert terms.weights == {"ce": 1.0} and set(terms.values) == {"ce"}


@pytest.mark.parametrize("strict", [False, True])
def test_total_is_the_weighted_sum_and_everything_moves(strict: bool) -> None:
    batch = make_batch()
    student, teacher = make_pair(batch)
    objective, head = build(replace(ALL, strict=strict)), make_head()
    terms = objective(student, teacher, batch, output_head=head, ramp=0.5)
    weights = {"ce": 0.5, "mhca": 0.5 * 0.5 * 0.7, "rel": 0.5 * 0.5 * 2.0, "ot": 0.5 * 0.5 * 0.3}
    if not strict:
        weights["anchor"] = 0.5 * 0.7  # never ramped
    assert terms.weights == pytest.approx(weights) and set(terms.values) == set(weights)
    total = sum(float(value.detach()) * weights[name] for name, value in terms.values.items())
    assert float(terms.total.detach()) == pytest.approx(total)
    assert terms.diagnostics == {}
    terms.total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.parameters())  # DDP needs them all
    assert all(p.grad is None for p in head.parameters())
    for tensor in (student.hidden_BSD, student.visual_BND, student.answer_logits.states_AD):
        if strict or tensor is not student.hidden_BSD or objective.uses_alignment:
            assert tensor.grad is not None and torch.isfinite(tensor.grad).all() and tensor.grad.abs().sum() > 0


def test_published_terms_against_a_naive_twin() -> None:
    """Every term of the strict form from its equation, with the objective's own weights, one sample at a time."""
    batch = make_batch()
    student, teacher = make_pair(batch)
    objective = build(replace(ALL, strict=True))
    values = objective(student, teacher, batch, output_head=make_head()).values
    assert objective.aligner is not None and objective.projection is not None and batch.teacher is not None
    mhca, relation = [], []
    for b in range(3):
        h_s, h_t = student.hidden_BSD[b, :8], teacher.hidden_BSD[b]
        heads = []
        for part in torch.arange(STUDENT_WIDTH).chunk(objective.config.align.heads):
            q, k, v = (
                layer.weight[part]
                for layer in (objective.aligner.query, objective.aligner.key, objective.aligner.value)
            )
            logits = (h_s @ q.T) @ (h_t @ k.T).T / len(part) ** 0.5
            heads.append(logits.softmax(1) @ (h_t @ v.T))
        h_hat = torch.cat(heads, 1) @ objective.aligner.out.weight.T
        mhca.append((h_s - h_hat).square().sum() / 8)
        error = torch.zeros((), dtype=torch.float64)
        for kind in ("distance", "cosine"):
            psi = []
            for h in (h_hat, h_s):
                if kind == "distance":
                    d = torch.stack([torch.stack([(x - y).norm() for y in h]) for x in h])
                    psi.append(d / (d.sum() / (8 * 7)))
                else:
                    psi.append(torch.stack([torch.stack([F.cosine_similarity(x, y, dim=0) for y in h]) for x in h]))
            error = error + (psi[0] - psi[1]).square().sum() / 8**2 / 2
        relation.append(error)
    assert_close(values["mhca"], torch.stack(mhca).mean())
    assert_close(values["rel"], torch.stack(relation).mean())
    transport = objective._transport(objective.projection, student, teacher, batch)
    projected = teacher.visual_BND @ objective.projection.weight.T
    twin = sum(
        transport.plan_BNM[b, i, j] * (projected[b, i] - student.visual_BND[b, j]).square().sum()
        for b in range(3) for i in range(9) for j in range(4)
    )  # fmt: skip
    assert_close(values["ot"], torch.as_tensor(twin / 3))


def test_default_alignment_moves_student_and_aligner_as_documented() -> None:
    batch = make_batch()
    student, teacher = make_pair(batch)
    objective = build(
        ObjectiveConfig(lambda_rec=0, lambda_m=1.0, lambda_r=0.0, lambda_ot=0.0, align=AlignmentConfig(scope="answer"))
    )
    values = objective(student, teacher, batch, output_head=make_head()).values
    parameters = list(objective.parameters())
    assert objective.aligner is not None and parameters
    anchor = torch.autograd.grad(
        values["anchor"], [*parameters, student.hidden_BSD], retain_graph=True, allow_unused=True
    )
    assert anchor[-1] is None and all(g is not None and g.abs().sum() > 0 for g in anchor[:-1])
    # every position in scope is anchored: the distance moves the student only
    pulled = torch.autograd.grad(values["mhca"], [*parameters, student.hidden_BSD], allow_unused=True)
    assert all(g is None or g.abs().sum() == 0 for g in pulled[:-1])
    assert pulled[-1] is not None
    assert (pulled[-1][0].abs().sum(-1) > 0).int().tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("features", ["last", "projected"])
def test_visual_tokens_are_aligned_without_the_text(features: str, centred: bool) -> None:
    """Token by token: attention among tokens with the page's bias, the batch's mean at a place taken off both sides."""
    batch = make_batch()
    student, teacher = make_pair(batch)
    align = AlignmentConfig(features=features, centred=centred, normalise=False, position_bias=2.0)
    objective = build(ObjectiveConfig(lambda_rec=0, lambda_m=1.0, lambda_r=0.0, lambda_ot=0.0, align=align))
    name = {"last": "visual_BND", "projected": "projected_BND"}[features]
    ours, theirs = getattr(student, name), getattr(teacher, name)
    middles = [
        (half.visual_box_BN4[..., :2] + half.visual_box_BN4[..., 2:]) / 2 for half in (batch.student, batch.teacher)
    ]
    bias = -2.0 * torch.cdist(*middles).square()
    assert objective.aligner is not None
    aligned = objective.aligner(ours, theirs, torch.ones_like(bias, dtype=torch.bool), bias)
    apart = ours - aligned
    if centred:
        apart = apart - apart.mean(0)
    value = objective(student, teacher, batch, output_head=make_head()).values
    assert set(value) == {"ce", "mhca"}
    assert_close(value["mhca"], apart.square().mean())
    assert int(objective.counts(batch)["mhca"]) == ours.shape[0] * ours.shape[1]
    value["mhca"].backward()
    assert student.hidden_BSD.grad is None and ours.grad is not None
    assert all(parameter.grad is not None for parameter in objective.parameters())


def test_alignment_centred_at_a_question_reads_what_differs_between_records() -> None:
    batch = replace(make_batch(4), asked_Q=torch.tensor([0, 0, 0, 1]))
    student, teacher = make_pair(batch)
    align = AlignmentConfig(scope="answer", centred=True, normalise=False)
    objective, head = (
        build(ObjectiveConfig(lambda_rec=0, lambda_m=1.0, lambda_r=0, lambda_ot=0, align=align)),
        make_head(),
    )
    terms = objective(student, teacher, batch, output_head=head)
    assert int(objective.counts(batch)["mhca"]) == 3, "a question asked once has nothing to differ from"
    gradient = torch.autograd.grad(terms.values["mhca"], student.hidden_BSD)[0]
    assert (gradient.abs().sum(-1) > 0).int().tolist() == [[0, 0, 0, 0, 0, 1, 0, 0, 0]] * 3 + [[0] * 9]
    assert_close(gradient[:3, 5].sum(0), torch.zeros(8, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("config", "needs", "modules"),
    [
        (ObjectiveConfig(lambda_m=0, lambda_rec=0, lambda_r=0, lambda_ot=0), set(), set()),
        (replace(ALL, alpha=0.0), set(), set()),
        (ObjectiveConfig(lambda_m=0, lambda_rec=0, lambda_r=1, lambda_ot=0), {"teacher", "visual"}, set()),
        (replace(ALL, lambda_m=0, lambda_ot=0, relation=RelationConfig(distance=0, cosine=0)), set(), set()),
        (ObjectiveConfig(lambda_m=0, lambda_rec=0, lambda_r=1, lambda_ot=0, strict=True),
         {"teacher", "hidden"}, {"aligner"}),
        (ObjectiveConfig(lambda_m=0, lambda_rec=0, lambda_r=0, lambda_ot=1), {"teacher", "visual"}, {"projection"}),
        (ObjectiveConfig(lambda_rec=0, lambda_r=0, lambda_ot=0, lambda_m=1), {"teacher", "hidden"}, {"aligner"}),
        (replace(ALL, lambda_m=0, lambda_r=0, transport=TransportConfig(features="projected")),
         {"teacher", "projected"}, {"projection"}),
        (replace(ALL, lambda_r=0, lambda_ot=0, align=AlignmentConfig(features="projected")),
         {"teacher", "projected"}, {"aligner"}),
        (ALL, {"teacher", "hidden", "visual"}, {"aligner", "projection"}),
    ],
)  # fmt: skip
def test_terms_of_weight_zero_need_and_build_nothing(
    config: ObjectiveConfig, needs: set[str], modules: set[str]
) -> None:
    objective = build(config)
    assert objective.needs == needs
    assert {name for name, _ in objective.named_children()} == modules
    batch = make_batch()
    student, teacher = make_pair(batch)
    terms = objective(student, teacher if needs else None, batch, output_head=make_head())
    used = {"mhca": config.lambda_m, "rel": config.lambda_r, "ot": config.lambda_ot}
    expected = {name for name, weight in used.items() if weight and needs}
    assert set(terms.values) - {"anchor"} == {"ce"} | expected


def test_needless_objective_takes_no_teacher_and_a_needy_one_insists() -> None:
    idle = EvlObjective(ObjectiveConfig(lambda_m=0, lambda_r=1, lambda_rec=0, alpha=0.0), student=STUDENT, teacher=None)
    assert idle.needs == frozenset()
    with pytest.raises(ValueError, match="knows none"):
        EvlObjective(ALL, student=STUDENT, teacher=None)
    batch = make_batch()
    with pytest.raises(ValueError, match="given none"):
        build(ALL)(make_pair(batch)[0], None, batch, output_head=make_head())


@pytest.mark.parametrize(
    ("config", "where"),
    [
        (replace(ALL, alpha=1.5), "objective.alpha"),
        (replace(ALL, align=AlignmentConfig(heads=3)), "objective.align.heads"),
        (replace(ALL, align=AlignmentConfig(features="last", scope="answer")), "objective.align.scope"),
        (replace(ALL, align=AlignmentConfig(centred=True)), "objective.align.centred"),
        (
            ObjectiveConfig(lambda_r=1, lambda_rec=0, lambda_m=0, relation=RelationConfig(source="aligned")),
            "objective.relation.source",
        ),
        (
            ObjectiveConfig(lambda_m=0, lambda_r=1, lambda_rec=0, strict=True, transport=TransportConfig(relax=1.0)),
            "objective.transport",
        ),
        (
            ObjectiveConfig(
                lambda_m=0, lambda_r=1, lambda_rec=0, strict=True, transport=TransportConfig(marginals="lead")
            ),
            "objective.transport",
        ),
        (
            ObjectiveConfig(
                lambda_m=0, lambda_r=1, lambda_rec=0, transport=TransportConfig(solver="fused_gromov", relax=1.0)
            ),
            "objective.transport.relax",
        ),
        (
            ObjectiveConfig(lambda_m=0, lambda_r=1, lambda_rec=0, transport=TransportConfig(structure=1.5)),
            "objective.transport.structure",
        ),
    ],
)
def test_impossible_configurations_say_where(config: ObjectiveConfig, where: str) -> None:
    with pytest.raises(EvlecgError) as caught:
        build(config)
    assert caught.value.where == where and caught.value.hint


def test_transport_options_reach_the_plan() -> None:
    batch = make_batch()
    student, teacher = make_pair(batch)
    losses, plans = [], []
    options = (
        {"relax": 0.1},
        {"marginals": "lead"},
        {"solver": "fused_gromov"},
        {"solver": "fused_gromov", "structure": 0},
    )
    for option in ({}, *options):
        config = replace(ALL, lambda_m=0, lambda_r=0, transport=TransportConfig(epsilon=0.2, **option))
        objective = build(config)
        transport = objective._transport(objective.projection, student, teacher, batch)
        losses.append(float(transport.loss.detach()))
        plans.append(transport.plan_BNM)
    assert len({round(loss, 9) for loss in losses[:4]}) == 4
    assert float(plans[1].sum((1, 2)).max()) < 0.99  # relaxed: not all of the mass is carried
    leads = token_lead(batch.student.visual_box_BN4, batch.student.visual_mask_BN, batch.student.cell_box_BC4,
                       batch.cell_lead_C)  # fmt: skip
    for row, lead in zip(plans[2].sum(1), leads, strict=True):
        shown = [float(row[lead == index].sum()) for index in set(lead.tolist()) - {-1}]
        assert shown == pytest.approx([shown[0]] * len(shown), abs=1e-6) and shown[0] > 0
    assert_close(plans[4], plans[0], atol=1e-5, rtol=0)  # no structure: the same transport


def test_construction_is_deterministic_and_projection_keeps_scale() -> None:
    first, second, other = build(ALL).state_dict(), build(ALL).state_dict(), build(ALL, seed=1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    for student_width, teacher_width in ((64, 16), (16, 64)):
        torch.manual_seed(0)
        config = ObjectiveConfig(lambda_m=0, lambda_rec=0, lambda_r=0, lambda_ot=1)
        objective = EvlObjective(config, student=ModelFacts(student_width, 11), teacher=ModelFacts(teacher_width, 11))
        assert objective.projection is not None
        projected = objective.projection(seeded(500, teacher_width, dtype=torch.float32)).detach()
        assert float(projected.square().mean()) == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("cells", ["page", "lead_time"])
@pytest.mark.parametrize("features", ["last", "projected"])
def test_relation_is_zero_for_identical_features_and_reads_what_it_names(cells: str, features: str) -> None:
    batch = make_batch()
    config = ObjectiveConfig(
        lambda_m=0,
        lambda_r=1,
        lambda_rec=0,
        lambda_ot=0,
        relation=RelationConfig(cells=cells, features=features, grid=2),
    )
    student, teacher = make_pair(batch)
    same = frozen(replace(student, side=batch.student))
    objective = EvlObjective(config, student=STUDENT, teacher=STUDENT)
    assert float(objective(student, same, batch, output_head=make_head()).values["rel"].detach()) == 0
    value = objective(student, teacher, batch, output_head=make_head()).values["rel"]
    assert float(value.detach()) > 1e-3
    tensors = [student.hidden_BSD, student.visual_BND, student.projected_BND]
    reached = torch.autograd.grad(value, tensors, allow_unused=True)
    assert [gradient is not None for gradient in reached] == [False, features == "last", features == "projected"]


def test_relation_leaves_out_cells_that_the_teacher_does_not_cover() -> None:
    batch = make_batch()
    student, teacher = make_pair(batch)
    mask = teacher.side.visual_mask_BN.clone()
    mask[:, 3:] = False  # of 3 x 3 tokens the upper row remains: it covers the upper of 2 x 2 cells
    objective = build(
        ObjectiveConfig(lambda_m=0, lambda_r=1, lambda_rec=0, lambda_ot=0, relation=RelationConfig(grid=2))
    )
    half = replace(teacher, side=replace(teacher.side, visual_mask_BN=mask))
    terms = objective(student, half, batch, output_head=make_head(), diagnose=True)
    assert terms.diagnostics["rel_cells"] == 2
    (gradient,) = torch.autograd.grad(terms.values["rel"], student.visual_BND)
    assert (gradient.abs().sum(-1) > 0).int().tolist() == [[1, 1, 0, 0]] * 3


def test_relation_to_aligned_states_has_a_fixed_target() -> None:
    batch = make_batch()
    student, teacher = make_pair(batch)
    objective = build(
        ObjectiveConfig(
            lambda_r=1, lambda_rec=0, lambda_m=1, lambda_ot=0, relation=RelationConfig(source="aligned", grid=2)
        )
    )
    value = objective(student, teacher, batch, output_head=make_head()).values["rel"]
    gradients = torch.autograd.grad(value, [*objective.parameters(), student.visual_BND], allow_unused=True)
    assert all(gradient is None for gradient in gradients[:-1]) and gradients[-1] is not None


def padded(side: Side, extra: int) -> Side:
    def grow(rows: Tensor, value: int) -> Tensor:
        return F.pad(rows, (0, extra), value=value)

    return replace(
        side,
        valid_BS=grow(side.valid_BS, False),
        block_BS=grow(side.block_BS, -1),
        byte_end_BS=grow(side.byte_end_BS, 0),
        visual_BS=grow(side.visual_BS, False),
        visual_box_BN4=F.pad(side.visual_box_BN4, (0, 0, 0, extra)),
        visual_mask_BN=grow(side.visual_mask_BN, False),
    )


def padded_outputs(outputs: Outputs, extra: int) -> Outputs:
    states = {
        name: F.pad(getattr(outputs, name), (0, 0, 0, extra), value=torch.nan)
        for name in ("hidden_BSD", "visual_BND", "projected_BND")
    }
    return replace(outputs, side=padded(outputs.side, extra), **states)


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
def test_padding_changes_nothing_and_may_hold_nan(config: ObjectiveConfig) -> None:
    batch = make_batch()
    student, teacher = make_pair(batch)
    objective, head = build(config), make_head()
    plain = objective(student, teacher, batch, output_head=head, diagnose=True)
    longer = objective(padded_outputs(student, 3), padded_outputs(teacher, 2), batch, output_head=head, diagnose=True)
    for name, value in plain.values.items():
        assert_close(longer.values[name], value)
    assert longer.diagnostics == pytest.approx(plain.diagnostics)
    longer.total.backward()
    reached = [student.visual_BND.grad] + [student.hidden_BSD.grad] * ("hidden" in objective.needs)
    gradients = [p.grad for p in objective.parameters()] + reached
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)


def test_order_of_records_does_not_matter() -> None:
    batch, order = make_batch(), torch.tensor([2, 0, 1])
    student, teacher = make_pair(batch)
    objective, head = build(ALL), make_head()
    side = replace(batch.student, answer_ids_A=batch.student.answer_ids_A.unflatten(0, (3, 2))[order].flatten())
    states = ("hidden_BSD", "visual_BND", "projected_BND")
    answers = student.answer_logits_AV.unflatten(0, (3, 2))[order].flatten(0, 1)
    shuffled = [replace(out, **{name: getattr(out, name)[order] for name in states}) for out in (student, teacher)]
    expected = objective(student, teacher, batch, output_head=head).values
    found = objective(
        replace(shuffled[0], side=side, answer_logits=AnswerLogits(answers)), shuffled[1], batch, output_head=head
    )
    for name, value in expected.items():
        assert_close(found.values[name], value)


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
def test_nothing_to_learn_from_is_zero_on_the_graph(config: ObjectiveConfig) -> None:
    batch = make_batch()
    student, teacher = make_pair(batch)

    def emptied(outputs: Outputs) -> Outputs:
        side = outputs.side
        side = replace(
            side,
            valid_BS=side.valid_BS & False,
            answer_A2=side.answer_A2[:0],
            answer_ids_A=side.answer_ids_A[:0],
            visual_mask_BN=side.visual_mask_BN & False,
        )
        return replace(outputs, side=side, answer_logits=AnswerLogits(outputs.answer_logits_AV[:0]))

    objective = build(config)
    terms = objective(emptied(student), emptied(teacher), batch, output_head=make_head(), diagnose=True)
    assert float(terms.total.detach()) == 0
    terms.total.backward()
    gradients = [p.grad for p in objective.parameters()]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)


def test_bfloat16_outputs_under_autocast_give_float32_terms() -> None:
    batch = make_batch()
    student, teacher = make_pair(batch, torch.bfloat16)
    torch.manual_seed(0)
    objective = EvlObjective(ALL, student=STUDENT, teacher=TEACHER)
    head = make_head().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = objective(student, teacher, batch, output_head=head)
    plain = objective(student, teacher, batch, output_head=head)
    assert all(value.dtype == torch.float32 for value in terms.values.values())
    for name, value in plain.values.items():
        assert_close(terms.values[name], value)
    terms.total.backward()
    assert student.visual_BND.grad is not None and torch.isfinite(student.visual_BND.grad).all()


def test_diagnostics_are_plain_floats_and_do_not_touch_the_loss() -> None:
    batch = make_batch()
    student, teacher = make_pair(batch)
    objective, head = build(ALL), make_head()
    quiet = objective(student, teacher, batch, output_head=head)
    loud = objective(student, teacher, batch, output_head=head, diagnose=True)
    assert_close(loud.total, quiet.total)
    assert all(type(value) is float for value in loud.diagnostics.values())
    assert set(loud.diagnostics) == {
        "mhca_variance_share", "student_variance_share", "anchor_accuracy", "mhca_rolled_gap", "anchor_rolled_gap",
        "ot_entropy", "ot_marginal_error", "ot_mass", "ot_mass_in_lead", "ot_rolled_gap", "rel_cells", "rel_rolled_gap",
    }  # fmt: skip
    alone = make_batch(rows=1)
    terms = objective(*make_pair(alone), alone, output_head=head, diagnose=True)
    assert not [name for name in terms.diagnostics if "rolled" in name or "variance" in name]  # undefined: absent


def test_a_collapsed_aligner_is_seen() -> None:
    """An aligner that learnt to say one thing of every record against one that tells records apart.

    The student repeats what the aligner says in both cases, so the loss itself is near zero for both: only the
    controls tell them apart.
    """
    batch = make_batch(rows=4)
    student, teacher = make_pair(batch)
    # every record's teacher states share a component that the collapsed aligner reads, and hold one of their own
    hidden = torch.cat([torch.ones(4, 14, 1), seeded(4, 1, TEACHER_WIDTH - 1, seed=5).expand(-1, 14, -1)], -1)
    teacher = replace(teacher, hidden_BSD=hidden)
    config = ObjectiveConfig(
        lambda_rec=0,
        lambda_m=1,
        lambda_r=0,
        lambda_ot=0,
        align=AlignmentConfig(position_bias=0, anchor=0, normalise=False),
    )
    found = {}
    for kind, columns in (("collapsed", slice(0, 1)), ("alive", slice(1, None))):
        objective = build(config)
        assert objective.aligner is not None
        objective.aligner.normalise = False
        weight = torch.zeros(STUDENT_WIDTH, TEACHER_WIDTH, dtype=torch.float64)
        weight[:, columns] = seeded(STUDENT_WIDTH, TEACHER_WIDTH, seed=6)[:, columns]
        objective.aligner.value.weight.data = weight
        visible = batch.student.valid_BS[:, :, None].expand(-1, -1, 14)
        repeated = objective.aligner(student.hidden_BSD, teacher.hidden_BSD, visible).detach().requires_grad_()
        terms = objective(replace(student, hidden_BSD=repeated), teacher, batch, output_head=make_head(), diagnose=True)
        assert float(terms.values["mhca"].detach()) < 1e-9
        found[kind] = terms.diagnostics
    assert found["collapsed"]["mhca_rolled_gap"] == pytest.approx(0, abs=1e-9)
    assert found["alive"]["mhca_rolled_gap"] > 0.1
    assert found["collapsed"].get("mhca_variance_share", 0) < 1e-9
    assert found["alive"]["mhca_variance_share"] > 0.5


def test_rolled_gap_of_every_term_is_positive_once_the_student_copies_its_teacher() -> None:
    batch = make_batch(rows=4)
    student, _ = make_pair(batch)
    teacher = frozen(replace(student, side=batch.student))
    config = ObjectiveConfig(lambda_m=0, lambda_rec=0, lambda_r=1, lambda_ot=1, relation=RelationConfig(grid=2))
    torch.manual_seed(0)
    objective = EvlObjective(config, student=STUDENT, teacher=STUDENT).double()
    assert objective.projection is not None
    objective.projection.weight.data = torch.eye(STUDENT_WIDTH, dtype=torch.float64)
    terms = objective(student, teacher, batch, output_head=make_head(), diagnose=True)
    assert terms.diagnostics["rel_rolled_gap"] > 0.05 and terms.diagnostics["ot_rolled_gap"] > 0.05
    assert terms.diagnostics["rel_cells"] == 4
