"""Every baseline against a naive twin in plain loops, its invariances, and a few real steps of it."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from evlecg.distill import distill
from evlecg.errors import EvlecgError
from evlecg.losses.baselines import (
    BASELINES,
    cell_relation_kl,
    divergence,
    match_tokens,
    multilevel_ot,
    projected_mse,
    rkd_angle,
    rkd_distance,
    uld_distance,
)
from evlecg.losses.bridge import END, answer_groups
from evlecg.losses.objective import METHODS
from evlecg.recipe import METHOD_NAMES, BaselineConfig, ObjectiveConfig
from evlecg.schema import AnswerLogits, Batch, ModelFacts, Outputs, Side
from tests.test_alignment import seeded
from tests.test_distill import recipe, rows, weights
from tests.test_objective import STUDENT_WIDTH, TEACHER_WIDTH, VOCABULARY, frozen, make_batch, make_outputs

STUDENT_TOKENS = (b"yes", b"no", b" yes", b"ye", b"s", b"n", b"o", END, None, b"maybe", b"x")
TEACHER_TOKENS = (None, END, b" no", b" yes", b"o", b"s", b"perhaps", b"n", b" y", b"es", b"no")
STUDENT = ModelFacts(STUDENT_WIDTH, VOCABULARY, tokens=STUDENT_TOKENS)
TEACHER = ModelFacts(TEACHER_WIDTH, VOCABULARY, tokens=TEACHER_TOKENS)
CONFIG = ObjectiveConfig(baseline=BaselineConfig(top_k=4, relation_heads=2, grid=2, temperature=1.5))


class Head(nn.Module):
    """An output head with words, as `models.outputs.AnswerHead` is one."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.words = (torch.randn(VOCABULARY, width),)

    def forward(self, states_AD: Tensor, side: Side) -> Tensor:
        return self.head(states_AD)

    def embed(self, side: Side) -> Tensor:
        return torch.stack([self.words[0][side.answer_ids_A.roll(1)], self.words[0][side.answer_ids_A]], 1)


def build(name: str, config: ObjectiveConfig = CONFIG, teacher: ModelFacts = TEACHER):
    torch.manual_seed(0)
    return METHODS[name](config, student=STUDENT, teacher=teacher)


def pair(batch: Batch) -> tuple[Outputs, Outputs]:
    assert batch.teacher is not None
    made = []
    for side, width, seed in ((batch.student, STUDENT_WIDTH, 10), (batch.teacher, TEACHER_WIDTH, 20)):
        outputs = make_outputs(side, width, seed=seed, dtype=torch.float32)
        n_tokens = side.visual_box_BN4.shape[1]
        attention = {
            name: seeded(len(side.valid_BS), n_tokens, 4, seed=seed + place, dtype=torch.float32).requires_grad_()
            for place, name in enumerate(("query", "key", "value"))
        }
        side = replace(side, visual_box_BN4=side.visual_box_BN4.float(), cell_box_BC4=side.cell_box_BC4.float())
        made.append(replace(outputs, attention=attention, side=side))
    return made[0], frozen(made[1])


def run(name: str, batch: Batch, *, objective=None, pair_of=None, **kwargs):
    student, teacher = pair_of or pair(batch)
    heads = {"output_head": Head(STUDENT_WIDTH, 1), "teacher_head": Head(TEACHER_WIDTH, 2)}
    return (objective or build(name))(student, teacher, batch, **heads, **kwargs), student


BATCHED = sorted(set(BASELINES))


def test_every_method_of_the_recipe_exists():
    assert set(METHOD_NAMES) == set(METHODS)


@pytest.mark.parametrize("name", BATCHED)
def test_totals_gradients_and_the_share_of_cross_entropy(name):
    batch = make_batch(rows=8)
    objective = build(name, replace(CONFIG, alpha=0.3, baseline=replace(CONFIG.baseline, weight=2.0)))
    terms, student = run(name, batch, objective=objective, ramp=0.5)
    assert terms.weights["ce"] == pytest.approx(0.7)
    parts = [part for part in terms.values if part != "ce"]
    assert parts and all(
        terms.weights[part] == pytest.approx(0.3 * 0.5 * 2.0 * objective.part_weight(part)) for part in parts
    )
    total = sum(float(terms.values[part].detach()) * terms.weights[part] for part in terms.values)
    assert float(terms.total.detach()) == pytest.approx(total, rel=1e-5)
    assert all(math.isfinite(float(value.detach())) for value in terms.values.values())
    sum(terms.values[part] for part in parts).backward()
    logits = student.answer_logits.states_AD
    moved = [x for x in (student.hidden_BSD, student.visual_BND, logits, *student.attention.values())
             if x.grad is not None and x.grad.abs().sum() > 0]  # fmt: skip
    assert moved and all(torch.isfinite(x.grad).all() for x in moved)
    assert all(p.grad is not None for p in objective.parameters()), "DDP needs a gradient everywhere"


@pytest.mark.parametrize("name", BATCHED)
def test_no_answers_give_zero_on_the_graph(name):
    batch = make_batch(rows=8)
    empty = {"answer_A2": batch.student.answer_A2[:0], "answer_ids_A": batch.student.answer_ids_A[:0]}
    student, teacher = (
        replace(out, side=replace(out.side, **empty), answer_logits=AnswerLogits(out.answer_logits_AV[:0]))
        for out in pair(batch)
    )
    terms, _ = run(name, batch, pair_of=(student, teacher))
    assert torch.isfinite(terms.total) and terms.total.requires_grad
    if not {"visual", "attention"} & build(name).needs:
        assert float(terms.total.detach()) == 0


@pytest.mark.parametrize("name", BATCHED)
def test_order_of_records_does_not_matter(name):
    batch = make_batch(rows=8)
    order = torch.tensor([3, 0, 7, 5, 1, 2, 6, 4])
    student, teacher = pair(batch)

    def shuffled(out: Outputs) -> Outputs:
        n = len(out.side.answer_A2) // 8
        kept = ("valid_BS", "block_BS", "byte_end_BS", "visual_BS", "visual_box_BN4", "visual_mask_BN")
        rows_of = {field: getattr(out.side, field)[order] for field in kept}
        ids = out.side.answer_ids_A.unflatten(0, (8, n))[order].flatten()
        states = {field: getattr(out, field)[order] for field in ("hidden_BSD", "visual_BND", "projected_BND")}
        logits = out.answer_logits_AV.unflatten(0, (8, n))[order].flatten(0, 1)
        attention = {key: value[order] for key, value in out.attention.items()}
        return replace(out, side=replace(out.side, answer_ids_A=ids, **rows_of), answer_logits=AnswerLogits(logits),
                       attention=attention, **states)  # fmt: skip

    expected, _ = run(name, batch, pair_of=(student, teacher))
    found, _ = run(name, batch, pair_of=(shuffled(student), shuffled(teacher)))
    for part, value in expected.values.items():
        if name == "dskd" and part != "ce":
            continue  # embeddings of the test's head follow the order of answers
        assert_close(found.values[part], value, atol=1e-5, rtol=1e-5)


def naive_classes(tokens, other, opening):
    def spelt(token):
        return None if token is None else (token.lstrip(b" ") or None) if opening else token

    shared = {spelt(t) for t in tokens} & {spelt(t) for t in other} - {None}
    return [spelt(token) if spelt(token) in shared else "rest" for token in tokens]


@pytest.mark.parametrize("name", ["kl", "rkl", "jsd"])
def test_divergences_over_the_shared_vocabulary(name):
    batch = make_batch(rows=2)
    terms, student = run(name, batch)
    _, teacher = pair(batch)
    assert set(terms.values) == {"ce", f"{name}_shared"}
    groups = answer_groups(student.side, teacher.side)
    total, temperature = 0.0, CONFIG.baseline.temperature
    for group in range(len(groups)):
        opening = bool(groups.opens_G[group])
        ps = []
        sides = (
            (student, groups.student_first_G, STUDENT_TOKENS, TEACHER_TOKENS),
            (teacher, groups.teacher_first_G, TEACHER_TOKENS, STUDENT_TOKENS),
        )
        for outputs, first_G, mine, other in sides:
            p = (outputs.answer_logits_AV[int(first_G[group])].detach() / temperature).softmax(-1)
            sums: dict = {}
            for token, value in zip(naive_classes(mine, other, opening), p.tolist(), strict=True):
                sums[token] = sums.get(token, 0.0) + value
            ps.append(sums)
        s, t = ps
        for key in sorted(set(s) | set(t), key=str):
            a, b = s.get(key, 1e-10), t.get(key, 1e-10)
            if name == "kl":
                total += b * math.log(b / a)
            elif name == "rkl":
                total += a * math.log(a / b)
            else:
                m = 0.5 * a + 0.5 * b
                total += 0.5 * b * math.log(b / m) + 0.5 * a * math.log(a / m)
    assert float(terms.values[f"{name}_shared"].detach()) == pytest.approx(
        temperature**2 * total / len(groups), rel=1e-4
    )


def test_one_vocabulary_is_compared_whole_and_a_padded_head_does_not_matter():
    batch = make_batch(rows=2)
    batch = replace(batch, teacher=replace(batch.student, answer_ids_A=batch.student.answer_ids_A))
    student, teacher = pair(batch)
    padded = replace(
        teacher, answer_logits=AnswerLogits(torch.cat([teacher.answer_logits_AV, torch.full((4, 3), 5.0)], 1))
    )
    facts = ModelFacts(TEACHER_WIDTH, VOCABULARY + 3, tokens=(*STUDENT_TOKENS, None, None, None))
    objective = build("kl", teacher=facts)
    terms, _ = run("kl", batch, objective=objective, pair_of=(student, padded))
    t = CONFIG.baseline.temperature
    logs = [(out.answer_logits_AV.detach() / t).log_softmax(-1) for out in (student, teacher)]
    expected = t**2 * (logs[1].exp() * (logs[1] - logs[0])).sum(-1).mean()
    assert_close(terms.values["kl"].detach(), expected)
    equal, _ = run("kl", batch, objective=objective, pair_of=(student, frozen(replace(student, side=student.side))))
    assert float(equal.values["kl"].detach()) == pytest.approx(0, abs=1e-6)


def test_jsd_goes_over_into_both_divergences():
    student, teacher = seeded(4, 9).log_softmax(-1), seeded(4, 9, seed=1).log_softmax(-1)
    for beta, kind in ((1e-6, "kl"), (1 - 1e-6, "rkl")):
        found = divergence("jsd", student, teacher, beta=beta) / min(beta, 1 - beta)
        assert_close(found, divergence(kind, student, teacher, beta=0.5), atol=1e-3, rtol=1e-3)


def test_uld_against_plain_loops():
    student, teacher = seeded(3, 7), seeded(3, 11, seed=1)
    total = 0.0
    for a, b in zip(student.softmax(-1).tolist(), teacher.softmax(-1).tolist(), strict=True):
        a, b = sorted(a, reverse=True) + [0.0] * 4, sorted(b, reverse=True)
        total += sum(abs(x - y) for x, y in zip(a, b, strict=True))
    assert float(uld_distance(student, teacher, 1.0)) == pytest.approx(total)
    permuted = student[:, torch.randperm(7)]
    assert_close(uld_distance(permuted, teacher, 1.0), uld_distance(student, teacher, 1.0))


def test_multilevel_ot_against_plain_loops():
    opens = torch.tensor([True, False, False, True, False])
    student, teacher, k = seeded(5, 6), seeded(5, 8, seed=1), 3
    found = multilevel_ot(student, teacher, opens, temperature=2.0, top_k=k)
    difference = log = cost = 0.0
    for span in (range(0, 3), range(3, 5)):
        ranked = []
        for logits in (student, teacher):
            p = [(logits[g] / 2.0).softmax(-1).tolist() for g in span]
            order = sorted(range(len(p[0])), key=lambda v, p=p: -sum(row[v] for row in p))[:k]
            ranked.append([[row[v] for v in order] for row in p])
        s, t = ranked
        for a, b in zip(s, t, strict=True):
            difference += sum(abs(x - y) for x, y in zip(a, b, strict=True))
            log -= sum(y * math.log(x) for x, y in zip(a, b, strict=True))
        c = [[sum(abs(x - y) for x, y in zip(a, b, strict=True)) for a in s] for b in t]
        plan = [[math.exp(-value / 0.1) for value in row] for row in c]
        for _ in range(20):
            plan = [[value / sum(row) for value in row] for row in plan]
            columns = [sum(row[j] for row in plan) for j in range(len(s))]
            plan = [[value / columns[j] for j, value in enumerate(row)] for row in plan]
        cost += sum(p * value for prow, crow in zip(plan, c, strict=True) for p, value in zip(prow, crow, strict=True))
    for value, expected in zip(found, (difference, log, cost), strict=True):
        assert float(value) == pytest.approx(expected, rel=1e-6)


def test_rkd_against_plain_loops():
    student, teacher = seeded(5, 3), seeded(5, 4, seed=1)

    def huber(x, y):
        d = abs(x - y)
        return 0.5 * d * d if d < 1 else d - 0.5

    def distances(x):
        d = [float((x[i] - x[j]).norm()) for i, j in itertools.combinations(range(len(x)), 2)]
        return [value / (sum(d) / len(d)) for value in d]

    pairs = list(zip(distances(student), distances(teacher), strict=True))
    assert float(rkd_distance(student, teacher)) == pytest.approx(sum(huber(*p) for p in pairs) / len(pairs))
    values = []
    for i, j, k in itertools.permutations(range(5), 3):
        angles = []
        for x in (student, teacher):
            a, b = x[j] - x[i], x[k] - x[i]
            angles.append(float(a @ b / (a.norm() * b.norm())))
        values.append(huber(*angles))
    assert float(rkd_angle(student, teacher)) == pytest.approx(sum(values) / len(values))
    turn = torch.linalg.qr(seeded(3, 3, seed=5)).Q
    assert_close(rkd_distance(2 * student @ turn + 1, teacher), rkd_distance(student, teacher))
    assert_close(rkd_angle(2 * student @ turn + 1, teacher), rkd_angle(student, teacher))


def test_records_shown_twice_count_once_in_rkd():
    batch = make_batch(rows=8)
    student, teacher = pair(batch)
    single, _ = run("rkd", replace(batch, record_B=torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])), pair_of=(student, teacher))
    objective = build("rkd")
    first = [replace(out, visual_BND=out.visual_BND[::2], side=replace(
        out.side, visual_mask_BN=out.side.visual_mask_BN[::2])) for out in (student, teacher)]  # fmt: skip
    expected = objective.term(first[0], first[1], replace(batch, record_B=torch.arange(4)), (None, None))
    assert_close(single.values["rkd_distance"], expected["rkd_distance"])


def test_minilm_against_plain_loops_and_refuses_heads_that_do_not_divide():
    student, teacher = seeded(2, 3, 4), seeded(2, 3, 6, seed=1)
    mask = torch.tensor([[True, True, True], [True, False, True]])
    total, count = 0.0, 0
    for b in range(2):
        valid = [c for c in range(3) if mask[b, c]]
        for head in range(2):
            for c in valid:
                logs = []
                for x, d in ((student, 2), (teacher, 3)):
                    part = x[b, :, head * d : (head + 1) * d]
                    score = torch.stack([part[c] @ part[o] / math.sqrt(d) for o in valid])
                    logs.append(score.log_softmax(0))
                total += float((logs[1].exp() * (logs[1] - logs[0])).sum())
                count += 1
    assert float(cell_relation_kl(student, teacher, mask, heads=2)) == pytest.approx(total / count)
    assert float(cell_relation_kl(student, student, mask, heads=2)) == pytest.approx(0, abs=1e-9)
    with pytest.raises(EvlecgError, match="3 relation heads do not divide a width of 4"):
        cell_relation_kl(student, teacher, mask, heads=3)


def test_matching_is_one_to_one_and_of_least_cost():
    student, teacher = seeded(2, 3, 2), seeded(2, 4, 2, seed=1)
    masks = torch.ones(2, 3).bool(), torch.ones(2, 4).bool()
    masks[1][1, 0] = False
    mine, theirs, rows_of = match_tokens(student, teacher, *masks)
    for row in range(2):
        chosen = [(int(a), int(b)) for a, b, r in zip(mine, theirs, rows_of, strict=True) if r == row]
        allowed = [m for m in range(4) if masks[1][row, m]]
        best = min(
            sum(float((student[row, n] - teacher[row, m]).abs().sum()) for n, m in enumerate(order))
            for order in itertools.permutations(allowed, 3)
        )
        assert len(chosen) == 3 and len({b for _, b in chosen}) == 3 and all(b in allowed for _, b in chosen)
        cost = sum(float((student[row, a] - teacher[row, b]).abs().sum()) for a, b in chosen)
        assert cost == pytest.approx(best)


def test_projected_mse_counts_masked_tokens_not_at_all():
    student, teacher, weight = seeded(2, 3, 4), seeded(2, 3, 5, seed=1), seeded(4, 5, seed=2)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    values = []
    for b, n in mask.nonzero().tolist():

        def norm(x):
            return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()

        values.append(float((norm(student[b, n]) - weight @ norm(teacher[b, n])).square().mean()))
    assert float(projected_mse(student, teacher, weight, mask)) == pytest.approx(sum(values) / len(values))
    spoilt = teacher.clone()
    spoilt[~mask] = torch.nan
    assert_close(projected_mse(student, spoilt, weight, mask), projected_mse(student, teacher, weight, mask))


def test_dskd_carries_states_within_a_question_only():
    batch = make_batch(rows=8)
    student, teacher = pair(batch)
    moved = teacher.hidden_BSD.clone()
    row = 5
    moved[row] += 1.0
    expected, _ = run("dskd", batch, pair_of=(student, teacher))
    objective, heads = build("dskd"), (Head(STUDENT_WIDTH, 1), Head(TEACHER_WIDTH, 2))
    carried = []
    for hidden in (teacher.hidden_BSD, moved):
        logits = []

        class Spy(Head):
            def forward(self, states_AD, side, logits=logits):
                logits.append(states_AD.detach())
                return super().forward(states_AD, side)

        objective.term(student, replace(teacher, hidden_BSD=hidden), batch, (Spy(STUDENT_WIDTH, 1), heads[1]))
        carried.append(logits[0] / objective.to_student.weight.norm())
    rows_A = batch.student.answer_A2[:, 0]
    changed = (carried[0] - carried[1]).abs().sum(1)
    # dividing by the deviation of all elements moves everything a little; the row itself moves by far the most
    assert changed[rows_A == row].min() > 3 * changed[rows_A != row].max()
    assert float(expected.values["dskd_answer"].detach()) > 0


@pytest.mark.parametrize("name", [*BATCHED, "seqkd"])
def test_every_baseline_trains_a_real_pair(checkpoints, synthetic, tmp_path, name):
    out = tmp_path / "run"
    chosen = recipe(checkpoints, "train.max_steps=3", f"method={name}", "objective.baseline.grid=2",
                    "log.gradients_every=2", "objective.baseline.relation_heads=2")  # fmt: skip
    distill(chosen, data=synthetic, out=out)
    first = rows(out)[0]
    assert all(math.isfinite(value) for value in first["terms"].values())
    # dskd's answer part moves its own modules only, and its pull on the student waits until they get answers right
    parts = [part for part in first["terms"] if part not in ("dskd_answer", "dskd_student")]
    assert all(first["gradients"][part] > 0 for part in parts)
    assert json.loads((out / "run.json").read_text())["steps"] == 3
    assert set(weights(out)) == set(load_file(checkpoints["idefics3"] / "model.safetensors")), "nothing else is saved"


def test_seqkd_learns_the_teachers_answers(checkpoints, synthetic, tmp_path, monkeypatch):
    """The samples that it trains on hold what the teacher finds likeliest, whatever the labels say."""
    import evlecg.training.build as job
    from evlecg.data.store import Prepared
    from evlecg.data.tasks import label_samples
    from evlecg.models import load as loading
    from evlecg.models.score import Scorer
    from evlecg.page.render import PageStyle

    seen = {}
    original = job._teacher_answers
    monkeypatch.setattr(job, "_teacher_answers", lambda *given: seen.setdefault("samples", original(*given)))
    distill(recipe(checkpoints, "train.max_steps=1", "method=seqkd"), data=synthetic, out=tmp_path / "run")
    prepared = Prepared.open(synthetic)
    wording = "Does this ECG show {description}?"
    samples = label_samples(prepared, prepared.indices("train").tolist(), ("NORM", "MI"), wording)
    scorer = Scorer(loading.load(loading.inspect(str(checkpoints["llava"]))), prepared, PageStyle())
    expected = {(item.record_id, item.label): "yes" if item.score > 0.5 else "no" for item in scorer.score(samples)}
    found = {(sample.record_id, question.label): question.answer
             for sample in seen["samples"] for question in sample.questions}  # fmt: skip
    assert found == expected


def test_what_a_method_needs_is_asked_for_before_training(checkpoints, synthetic, tmp_path):
    with pytest.raises(EvlecgError, match="rkd compares the records of a batch"):
        distill(recipe(checkpoints, "train.batch_size=4", "method=rkd"), data=synthetic, out=tmp_path / "a")
    assert not (tmp_path / "a").exists()
