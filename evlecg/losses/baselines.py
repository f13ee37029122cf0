"""The methods that EVL-ECG has to beat, each on any pair of checkpoints: one term beside cross-entropy.

    L = (1 - alpha) L_CE + alpha * weight * L_term        (`objective.alpha`, `objective.baseline.weight`)

Where papers compare position by position, positions here are byte-aligned groups of the answer (bridge.py): the two
distributions with which both sides start a group are the ones that answer the same question. Where a published
implementation and its paper differ, the docstring says which is built.

| method | term | source |
|---|---|---|
| kl, rkl | forward, reverse Kullback-Leibler divergence at temperature T, times T^2 | Hinton 2015; MiniLLM, Gu 2024 |
| jsd | generalised Jensen-Shannon divergence | GKD, Agarwal 2024 |
| uld | distance of sorted probabilities | Boizard 2025 (arXiv 2402.12030) |
| multilevel_ot | sorted top-k: distance, log term, Sinkhorn over the sequence | Cui 2025 (arXiv 2412.14528) |
| dskd | both heads on states carried across by cross-model attention | Zhang 2024 (arXiv 2406.17328) |
| minilm | relations of queries, keys, values among page cells | MiniLMv2, Wang 2021 |
| rkd | distances and angles among records | Park 2019 |
| feature | hidden states, projected, at groups and visual tokens | TinyBERT, Jiao 2020 |
| em_kd | Hungarian matching of visual tokens, then states and affinities | EM-KD, Feng 2026 (arXiv 2511.21106) |

Shape legend: B rows, N visual tokens, C cells, D student width, E teacher width, A answer tokens, G groups, V
vocabulary, K shared classes, Q questions, L groups of a question, R relation heads.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evlecg.errors import EvlecgError
from evlecg.losses.bridge import Groups, answer_groups, class_log_probabilities, shared_classes
from evlecg.losses.chunks import summed
from evlecg.losses.records import Company, first_rows
from evlecg.losses.relation import page_grid, pool_to_cells
from evlecg.losses.stable import full_precision, layer_normalised, masked_mean, zero_where_masked
from evlecg.losses.terms import answer_count, answer_cross_entropy, frozen_reading, no_answers, weighted
from evlecg.recipe import BaselineConfig, ObjectiveConfig
from evlecg.schema import AnswerLogits, Batch, LossTerms, ModelFacts, Outputs, Side

LEAST_LOG_P = math.log(1e-10)  # a class that one side cannot spell is improbable, not impossible


class Baseline(nn.Module):
    """Cross-entropy and one distillation term; a method gives the term.

    Args:
        config: the recipe's objective.
        student, teacher: facts of both models.

    Attributes:
        reads: what a method reads of both models, as `EvlObjective.needs` names it.
        reads_tokens: it compares vocabularies: `ModelFacts.tokens` has to be filled in.
        least_rows: records a batch must hold.
    """

    reads: frozenset[str] = frozenset({"teacher", "logits"})
    reads_tokens = False
    least_rows = 1
    relates_records = False  # across a step: see `Company`

    def __init__(self, config: ObjectiveConfig, *, student: ModelFacts, teacher: ModelFacts | None) -> None:
        super().__init__()
        if config.alpha > 1:
            raise EvlecgError(f"alpha is a share, not {config.alpha}", where="objective.alpha", hint="0 to 1")
        if teacher is None:
            raise ValueError("this objective reads a teacher, and knows none")
        self.alpha = config.alpha
        self.config: BaselineConfig = config.baseline
        self.build(student, teacher)

    def build(self, student: ModelFacts, teacher: ModelFacts) -> None:
        """Makes the modules and tables that the term needs."""

    @property
    def needs(self) -> frozenset[str]:
        """What it reads of both models."""
        return self.reads

    def term(self, student: Outputs, teacher: Outputs, batch: Batch, heads: tuple[Any, Any]) -> dict[str, Tensor]:
        """The term's parts by name, each before weighting."""
        raise NotImplementedError

    def sizes(self, student: Side, teacher: Side, batch: Batch) -> dict[str, Tensor]:
        """How many elements the mean of every part is over."""
        raise NotImplementedError

    @torch.no_grad()
    def counts(self, batch: Batch, *, across: bool = False) -> dict[str, Tensor]:
        """See `EvlObjective.counts`."""
        assert batch.teacher is not None
        return {"ce": answer_count(batch.student), **self.sizes(batch.student, batch.teacher, batch)}

    def forward(
        self,
        student: Outputs,
        teacher: Outputs | None,
        batch: Batch,
        *,
        output_head: nn.Module,
        teacher_head: nn.Module | None = None,
        ramp: float = 1.0,
        diagnose: bool = False,
        company: Company | None = None,
    ) -> LossTerms:
        """See `EvlObjective.forward`."""
        if teacher is None:
            raise ValueError("this objective reads a teacher, and was given none")
        parts = self.term(student, teacher, batch, (output_head, teacher_head))
        values = {"ce": answer_cross_entropy(student.answer_logits, student.side.answer_ids_A), **parts}
        share = self.alpha * ramp * self.config.weight
        weights = {name: share * self.part_weight(name) for name in parts}
        return weighted(values, {"ce": 1 - self.alpha, **weights})

    def part_weight(self, name: str) -> float:
        """Weight of a part among the parts of the term."""
        return 1.0


class Divergence(Baseline):
    """`kl`, `rkl` and `jsd`.

    With one vocabulary (heads may be padded differently) over all ids that both have. With two, over the tokens that
    spell the same bytes in both, and the rest as one class; the part's name then ends in `_shared`.
    """

    reads_tokens = True
    kind = "kl"

    def build(self, student: ModelFacts, teacher: ModelFacts) -> None:
        """Which tokens of both vocabularies are the same."""
        common = min(len(student.tokens), len(teacher.tokens))
        self.same_ids = common > 0 and student.tokens[:common] == teacher.tokens[:common]
        self.n_common = common
        self.name = self.kind if self.same_ids else f"{self.kind}_shared"
        if self.same_ids:
            return
        self.n_classes = []
        for opening in (False, True):
            student_V, teacher_V, n_classes = shared_classes(student.tokens, teacher.tokens, opening=opening)
            if n_classes == 1:
                raise EvlecgError("the two vocabularies share no token", where="objective", hint="use --method uld")
            self.n_classes.append(n_classes)
            for role, class_V in (("student", student_V), ("teacher", teacher_V)):
                self.register_buffer(f"{role}_class_{int(opening)}", class_V, persistent=False)

    def term(self, student: Outputs, teacher: Outputs, batch: Batch, heads: tuple[Any, Any]) -> dict[str, Tensor]:
        """The divergence, averaged over groups."""
        groups = answer_groups(student.side, teacher.side)
        if not len(groups):
            return {self.name: no_answers(student.answer_logits)}
        total = summed(self._divergence_sum, *_starts(student, teacher, groups), groups.opens_G)
        return {self.name: total / len(groups)}

    def sizes(self, student: Side, teacher: Side, batch: Batch) -> dict[str, Tensor]:
        """Groups."""
        return {self.name: _n_groups(student, teacher)}

    @full_precision
    def _divergence_sum(self, student_GV: Tensor, teacher_GV: Tensor, opens_G: Tensor) -> Tensor:
        temperature = self.config.temperature
        student_GV, teacher_GV = student_GV / temperature, teacher_GV / temperature
        if self.same_ids:
            pairs = [(student_GV[:, : self.n_common].log_softmax(-1), teacher_GV[:, : self.n_common].log_softmax(-1))]
        else:
            student_GV, teacher_GV = student_GV.log_softmax(-1), teacher_GV.log_softmax(-1)
            pairs = []
            for opening, n_classes in enumerate(self.n_classes):
                chosen_G = opens_G == bool(opening)
                classes = [getattr(self, f"{role}_class_{opening}") for role in ("student", "teacher")]
                pairs.append(tuple(
                    class_log_probabilities(logp_GV[chosen_G], class_V, n_classes).clamp_min(LEAST_LOG_P)
                    for logp_GV, class_V in zip((student_GV, teacher_GV), classes, strict=True)
                ))  # fmt: skip
        sums = [divergence(self.kind, student, teacher, beta=self.config.beta).sum() for student, teacher in pairs]
        return temperature**2 * torch.stack(sums).sum()


class ReverseDivergence(Divergence):
    """`rkl`: the student's own support is what is compared (MiniLLM's direction)."""

    kind = "rkl"


class JensenShannon(Divergence):
    """`jsd`: `beta` KL(t || m) + (1 - `beta`) KL(s || m), m = `beta` t + (1 - `beta`) s, as the GKD paper has it."""

    kind = "jsd"


def divergence(kind: str, student_GK: Tensor, teacher_GK: Tensor, *, beta: float) -> Tensor:
    """A divergence of two sets of log probabilities, [G]."""
    if kind == "kl":
        return (teacher_GK.exp() * (teacher_GK - student_GK)).sum(-1)
    if kind == "rkl":
        return (student_GK.exp() * (student_GK - teacher_GK)).sum(-1)
    mixture_GK = torch.logaddexp(teacher_GK + math.log(beta), student_GK + math.log(1 - beta))
    from_teacher_G = (teacher_GK.exp() * (teacher_GK - mixture_GK)).sum(-1)
    from_student_G = (student_GK.exp() * (student_GK - mixture_GK)).sum(-1)
    return beta * from_teacher_G + (1 - beta) * from_student_G


class Uld(Baseline):
    """`uld`: sum over ranks of |p_s - p_t|, both sorted, the shorter vocabulary filled with zeros; mean over groups."""

    def term(self, student: Outputs, teacher: Outputs, batch: Batch, heads: tuple[Any, Any]) -> dict[str, Tensor]:
        """The distance, averaged over groups."""
        groups = answer_groups(student.side, teacher.side)
        if not len(groups):
            return {"uld": no_answers(student.answer_logits)}
        distance = functools.partial(uld_distance, temperature=self.config.temperature)
        return {"uld": summed(distance, *_starts(student, teacher, groups)) / len(groups)}

    def sizes(self, student: Side, teacher: Side, batch: Batch) -> dict[str, Tensor]:
        """Groups."""
        return {"uld": _n_groups(student, teacher)}


@full_precision
def uld_distance(student_GV: Tensor, teacher_GV: Tensor, temperature: float) -> Tensor:
    """Universal logit distance of two sets of logits over different vocabularies, summed (Boizard 2025, equation 6)."""
    student_GV, teacher_GV = ((x / temperature).softmax(-1).sort(descending=True).values
                              for x in (student_GV, teacher_GV))  # fmt: skip
    size = max(student_GV.shape[1], teacher_GV.shape[1])
    student_GV, teacher_GV = (F.pad(x, (0, size - x.shape[1])) for x in (student_GV, teacher_GV))
    return (student_GV - teacher_GV).abs().sum()


class MultiLevelOt(Baseline):
    """`multilevel_ot`: a question's groups share one order of ranks; the top k are compared at three levels.

    Ranks are sorted by their probability summed over the question (the published code's order), cut to `top_k`, then:
    absolute difference, minus sum p_t log p_s (`log_weight`), and the Sinkhorn cost between the question's positions
    with absolute differences as costs (`sinkhorn_weight`, regularisation .1, 20 iterations). Probabilities are those of
    the softmax at the temperature; the published code also divides logits by their standard deviation, the paper does
    not, and neither is done here.
    """

    def term(self, student: Outputs, teacher: Outputs, batch: Batch, heads: tuple[Any, Any]) -> dict[str, Tensor]:
        """The three parts, averaged over groups (the last one over questions)."""
        groups = answer_groups(student.side, teacher.side)
        names = ("mlot_difference", "mlot_log", "mlot_sinkhorn")
        if not len(groups):
            return {name: no_answers(student.answer_logits) for name in names}
        levels = functools.partial(multilevel_ot, temperature=self.config.temperature, top_k=self.config.top_k)
        starts = _starts(student, teacher, groups)
        difference, log, sinkhorn = summed(levels, *starts, groups.opens_G, starts=groups.opens_G)
        parts = (difference / len(groups), log / len(groups), sinkhorn / groups.opens_G.sum())
        return dict(zip(names, parts, strict=True))

    def sizes(self, student: Side, teacher: Side, batch: Batch) -> dict[str, Tensor]:
        """Groups, and questions."""
        groups = answer_groups(student, teacher)
        n_groups = _n_groups(student, teacher)
        return {"mlot_difference": n_groups, "mlot_log": n_groups, "mlot_sinkhorn": groups.opens_G.sum()}

    def part_weight(self, name: str) -> float:
        """Of the three levels."""
        return {"mlot_log": self.config.log_weight, "mlot_sinkhorn": self.config.sinkhorn_weight}.get(name, 1.0)


@full_precision
def multilevel_ot(student_GV: Tensor, teacher_GV: Tensor, opens_G: Tensor, *, temperature: float, top_k: int) -> Tensor:
    """The three levels of Multi-Level-OT, summed over groups (the last one over questions): [3].

    Groups of a question follow one another, its first one opens it.
    """
    question_G = opens_G.long().cumsum(0) - 1
    place_G = torch.arange(len(opens_G), device=opens_G.device)
    place_G = place_G - place_G[opens_G][question_G]
    n_questions, longest = int(question_G[-1]) + 1, int(place_G.max()) + 1
    valid_QL = torch.zeros(n_questions, longest, dtype=torch.bool, device=opens_G.device)
    valid_QL[question_G, place_G] = True
    ranked = []
    top_k = min(top_k, student_GV.shape[1], teacher_GV.shape[1])
    for logits_GV in (student_GV, teacher_GV):
        p_GV = (logits_GV / temperature).softmax(-1)
        sum_QV = p_GV.new_zeros(n_questions, p_GV.shape[1]).index_add(0, question_G, p_GV)
        order_Qk = sum_QV.topk(top_k, dim=1).indices
        p_Gk = p_GV.gather(1, order_Qk[question_G])
        ranked.append(p_Gk.new_zeros(n_questions, longest, top_k).index_put((question_G, place_G), p_Gk))
    student_QLk, teacher_QLk = ranked
    difference = (student_QLk - teacher_QLk).abs().sum()
    log = -(teacher_QLk * student_QLk.clamp_min(1e-10).log()).sum()
    cost_QLL = (teacher_QLk[:, :, None] - student_QLk[:, None]).abs().sum(-1)
    pair_QLL = valid_QL[:, :, None] & valid_QL[:, None]
    plan_QLL = torch.where(pair_QLL, (-cost_QLL / 0.1).exp(), 0.0)
    for _ in range(20):
        # where a question has no group the sums are 0, and their floor, 20 times over, would be an infinite slope
        plan_QLL = plan_QLL / plan_QLL.sum(2, keepdim=True).clamp_min(1e-9).masked_fill(~valid_QL[:, :, None], 1)
        plan_QLL = plan_QLL / plan_QLL.sum(1, keepdim=True).clamp_min(1e-9).masked_fill(~valid_QL[:, None], 1)
    return torch.stack([difference, log, (plan_QLL * cost_QLL).sum()])


class Dskd(Baseline):
    """`dskd`: dual-space distillation with cross-model attention.

    Attention between the two sides' answer tokens of a question (query: the student's embeddings of a token and of the
    one it predicts; keys: the teacher's) carries the teacher's states to the student's positions, where the student's
    head must read the answer off them (`dskd_answer`) and the student is drawn to what it reads (`dskd_student`); and
    the student's states to the teacher's positions, where the teacher's head reads them and they are drawn to the
    teacher's distribution (`dskd_teacher`). The student is drawn only where the carried state gets the answer right,
    as the published code does (the paper does not say so).
    """

    reads = frozenset({"teacher", "hidden", "logits", "heads"})

    def build(self, student: ModelFacts, teacher: ModelFacts) -> None:
        """Projections of the query and of the states, both ways."""
        self.query = nn.Linear(2 * student.width, 2 * teacher.width, bias=False)
        self.to_student = nn.Linear(teacher.width, student.width, bias=False)
        self.to_teacher = nn.Linear(student.width, teacher.width, bias=False)

    def term(self, student: Outputs, teacher: Outputs, batch: Batch, heads: tuple[Any, Any]) -> dict[str, Tensor]:
        """The three parts, averaged over the answer tokens of the side where they stand."""
        student_head, teacher_head = heads
        if teacher_head is None:
            raise ValueError("dskd reads the teacher's head, and was given none")
        if not len(student.side.answer_A2) or not len(teacher.side.answer_A2):
            zero = no_answers(student.answer_logits) + sum(p.sum() for p in self.parameters()) * 0
            return {"dskd_answer": zero, "dskd_student": zero, "dskd_teacher": zero}
        with torch.no_grad():
            student_word_A2D, teacher_word_A2E = student_head.embed(student.side), teacher_head.embed(teacher.side)
        mine, theirs = _questions(student), _questions(teacher)
        return self._parts(
            student, teacher, student_word_A2D.float(), teacher_word_A2E.float(), mine[:, None] == theirs[None],
            student_head, teacher_head,
        )  # fmt: skip

    def sizes(self, student: Side, teacher: Side, batch: Batch) -> dict[str, Tensor]:
        """Answer tokens. Of `dskd_student`, whose mean is over those that come out right, as a guess."""
        ours, theirs = answer_count(student), answer_count(teacher)
        return {"dskd_answer": ours, "dskd_student": ours, "dskd_teacher": theirs}

    def _parts(
        self, student: Outputs, teacher: Outputs, student_word: Tensor, teacher_word: Tensor, same: Tensor,
        student_head: Any, teacher_head: Any,
    ) -> dict[str, Tensor]:  # fmt: skip
        student_AD, teacher_AE = (
            student.side.before_answers(student.hidden_BSD).float(),
            teacher.side.before_answers(teacher.hidden_BSD).float(),
        )
        keys = _unit_scale(teacher_word).flatten(1)
        score = self.query(student_word.flatten(1)) @ keys.T / math.sqrt(keys.shape[1])
        score = score.masked_fill(~same, -1e9)
        values = self.to_student(_unit_scale(teacher_word[:, 1]) + _unit_scale(teacher_AE))
        carried_AD = score.softmax(1) @ values
        carried = frozen_reading(carried_AD, student.side, student_head)
        targets_A, n_student = student.side.answer_ids_A, len(carried_AD)
        answer, drawn, right = summed(_dskd_student, [student.answer_logits, carried], _every(n_student), targets_A)
        back_AE = score.T.softmax(1) @ self.to_teacher(student_AD)
        back = frozen_reading(back_AE, teacher.side, teacher_head)
        missed = summed(_dskd_teacher, [back, teacher.answer_logits], _every(len(back_AE)))
        return {"dskd_answer": answer / n_student, "dskd_student": drawn / right.detach().clamp_min(1),
                "dskd_teacher": missed / len(back_AE)}  # fmt: skip


@full_precision
def _dskd_student(student_RV: Tensor, carried_RV: Tensor, targets_R: Tensor) -> Tensor:
    """Sums over answer tokens: cross-entropy of the carried states; divergence where they are right; how many are."""
    right_R = carried_RV.argmax(-1) == targets_R
    kl_R = divergence("kl", student_RV.log_softmax(-1), carried_RV.detach().log_softmax(-1), beta=0.5)
    answer = F.cross_entropy(carried_RV, targets_R, reduction="sum")
    return torch.stack([answer, kl_R.masked_fill(~right_R, 0).sum(), right_R.sum().to(kl_R.dtype)])


@full_precision
def _dskd_teacher(back_RV: Tensor, teacher_RV: Tensor) -> Tensor:
    return divergence("kl", back_RV.log_softmax(-1), teacher_RV.log_softmax(-1), beta=0.5).sum()


def _every(n_rows: int) -> list[Tensor]:
    """All rows, of both sides."""
    return [torch.arange(n_rows)] * 2


class MiniLm(Baseline):
    """`minilm`: how cells of the page relate in the last layer's queries, keys and values.

    Queries, keys and values at the visual tokens are averaged over the cells of a page grid; in each of
    `relation_heads` parts, softmax(x x^T / sqrt(d)) of the student is drawn to the teacher's (MiniLMv2, equations 4-6).
    """

    reads = frozenset({"teacher", "attention"})

    def build(self, student: ModelFacts, teacher: ModelFacts) -> None:
        """Nothing to build."""

    def term(self, student: Outputs, teacher: Outputs, batch: Batch, heads: tuple[Any, Any]) -> dict[str, Tensor]:
        """One part for queries, keys and values each."""
        parts = {}
        for name in ("query", "key", "value"):
            pooled, masks = [], []
            for outputs in (student, teacher):
                side = outputs.side
                grid = page_grid(self.config.grid, like=side.visual_box_BN4)
                tokens_BCD, mask_BC = pool_to_cells(
                    outputs.attention[name], side.visual_box_BN4, side.visual_mask_BN, grid
                )
                pooled.append(tokens_BCD)
                masks.append(mask_BC)
            both_BC = masks[0] & masks[1]
            parts[f"minilm_{name}"] = cell_relation_kl(pooled[0], pooled[1], both_BC, heads=self.config.relation_heads)
        return parts

    def sizes(self, student: Side, teacher: Side, batch: Batch) -> dict[str, Tensor]:
        """Cells."""
        grid = page_grid(self.config.grid, like=student.visual_box_BN4)
        masks = [
            pool_to_cells(side.visual_box_BN4[..., :0], side.visual_box_BN4, side.visual_mask_BN, grid)[1]
            for side in (student, teacher)
        ]
        return dict.fromkeys(("minilm_query", "minilm_key", "minilm_value"), (masks[0] & masks[1]).sum())


@full_precision
def cell_relation_kl(student_BCD: Tensor, teacher_BCE: Tensor, mask_BC: Tensor, *, heads: int) -> Tensor:
    """Divergence of the teacher's softmax relations among cells from the student's, mean over rows, heads and cells."""
    logps = []
    for tokens_BCD in (student_BCD, teacher_BCE):
        heads_here = math.gcd(heads, tokens_BCD.shape[-1])
        if heads_here != heads:
            raise EvlecgError(f"{heads} relation heads do not divide a width of {tokens_BCD.shape[-1]}",
                              where="objective.baseline.relation_heads", hint=f"for example {heads_here}")  # fmt: skip
        split_BRCd = tokens_BCD.unflatten(-1, (heads, -1)).transpose(1, 2)
        score_BRCC = split_BRCd @ split_BRCd.transpose(2, 3) / math.sqrt(split_BRCd.shape[-1])
        logps.append(score_BRCC.masked_fill(~mask_BC[:, None, None, :], -1e9).log_softmax(-1))
    return masked_mean(divergence("kl", logps[0], logps[1], beta=0.5), mask_BC[:, None].expand(-1, heads, -1))


class Rkd(Baseline):
    """`rkd`: distances (over their mean) and angles among the records of a batch, Huber loss, weighted 1 : 2.

    A record is the mean of its visual tokens in the last layer. Rows that show a record again count once.
    """

    reads = frozenset({"teacher", "visual"})
    least_rows = 8

    def term(self, student: Outputs, teacher: Outputs, batch: Batch, heads: tuple[Any, Any]) -> dict[str, Tensor]:
        """Distance and angle part."""
        first_R = first_rows(batch)
        means = [_mean_token(outputs, first_R) for outputs in (student, teacher)]
        return {"rkd_distance": rkd_distance(*means), "rkd_angle": rkd_angle(*means)}

    def sizes(self, student: Side, teacher: Side, batch: Batch) -> dict[str, Tensor]:
        """Pairs and triples of records. Those across the parts of a step are not compared."""
        n = torch.tensor(len(batch.sample_ids), device=batch.record_B.device)
        return {"rkd_distance": n * (n - 1) // 2, "rkd_angle": n * (n - 1) * (n - 2)}

    def part_weight(self, name: str) -> float:
        """Of distances and angles."""
        return {"rkd_angle": 2.0}.get(name, 1.0)


@full_precision
def rkd_distance(student_RD: Tensor, teacher_RE: Tensor) -> Tensor:
    """Huber loss between both sides' pairwise distances, each over its mean (Park 2019, equations 5-7)."""
    pair = torch.triu_indices(len(student_RD), len(student_RD), 1, device=student_RD.device)
    if not pair.shape[1]:
        return student_RD.sum() * 0
    scaled = []
    for x_RD in (student_RD, teacher_RE):
        d_P = (x_RD[pair[0]] - x_RD[pair[1]]).square().sum(-1).clamp_min(1e-12).sqrt()
        scaled.append(d_P / d_P.mean())
    return F.smooth_l1_loss(*scaled)


@full_precision
def rkd_angle(student_RD: Tensor, teacher_RE: Tensor) -> Tensor:
    """Huber loss between both sides' angles at every record of every other two (Park 2019, equations 8-10)."""
    cosines = []
    for x_RD in (student_RD, teacher_RE):
        e_RRD = F.normalize(x_RD[None] - x_RD[:, None], dim=-1, eps=1e-6)
        cosines.append(e_RRD @ e_RRD.transpose(1, 2))
    n = len(student_RD)
    other = ~torch.eye(n, dtype=torch.bool, device=student_RD.device)
    # vertex i, ends j and k: all three differ
    mask = other[:, :, None] & other[:, None, :] & other[None]
    return masked_mean(F.smooth_l1_loss(cosines[0], cosines[1], reduction="none"), mask)


class Feature(Baseline):
    """`feature`: the teacher's last states, projected to the student's width, as targets.

    Text: the mean state of a byte-aligned group. Vision: the teacher's tokens averaged over the student's token boxes
    (area-weighted: a 2-D interpolation that undoes any crop or tiling).
    """

    reads = frozenset({"teacher", "hidden", "visual"})

    def build(self, student: ModelFacts, teacher: ModelFacts) -> None:
        """One projection for text, one for visual tokens."""
        self.text = nn.Linear(teacher.width, student.width, bias=False)
        self.vision = nn.Linear(teacher.token_width, student.token_width, bias=False)

    def term(self, student: Outputs, teacher: Outputs, batch: Batch, heads: tuple[Any, Any]) -> dict[str, Tensor]:
        """Text and visual part."""
        groups = answer_groups(student.side, teacher.side)
        text = (
            _group_means(student, groups.student_A, len(groups)),
            _group_means(teacher, groups.teacher_A, len(groups)),
        )
        here, there = student.side, teacher.side
        pooled_BNE, mask_BN = pool_to_cells(
            teacher.visual_BND, there.visual_box_BN4, there.visual_mask_BN, here.visual_box_BN4
        )
        mask_BN = mask_BN & here.visual_mask_BN
        return {
            "feature_text": projected_mse(text[0], text[1], self.text.weight, torch.ones_like(text[0][:, 0]).bool()),
            "feature_vision": projected_mse(student.visual_BND, pooled_BNE, self.vision.weight, mask_BN),
        }

    def sizes(self, student: Side, teacher: Side, batch: Batch) -> dict[str, Tensor]:
        """Groups, and the student's visual tokens."""
        box_BN4 = teacher.visual_box_BN4
        _, covered_BN = pool_to_cells(box_BN4[..., :0], box_BN4, teacher.visual_mask_BN, student.visual_box_BN4)
        return {
            "feature_text": _n_groups(student, teacher),
            "feature_vision": (covered_BN & student.visual_mask_BN).sum(),
        }


@full_precision
def projected_mse(student_XD: Tensor, teacher_XE: Tensor, weight_DE: Tensor, mask_X: Tensor) -> Tensor:
    """Mean squared error per element between layer-normalised states and projected, layer-normalised targets."""
    target_XD = F.linear(layer_normalised(zero_where_masked(teacher_XE, mask_X)), weight_DE)
    error_X = (layer_normalised(zero_where_masked(student_XD, mask_X)) - target_XD).square().mean(-1)
    return masked_mean(error_X, mask_X)


class EmKd(Baseline):
    """`em_kd`: every visual token of the side with fewer is matched with one of the other (Hungarian algorithm).

    Matching cost: the absolute distance of layer-normalised states after a projection that trains with the term.
    Two parts: the distance of matched states, and the smooth L1 distance between both sides' affinities (cosines) of
    the answer's byte groups with the matched tokens (VLAD). The paper matches and compares visual *logits* over one
    vocabulary (VSD); with two vocabularies there are none to compare, so states take their place.
    """

    reads = frozenset({"teacher", "hidden", "visual"})

    def build(self, student: ModelFacts, teacher: ModelFacts) -> None:
        """The projection that makes both sides' tokens comparable.

        Raises:
            EvlecgError: a side whose answers and visual tokens have no common space.
        """
        for role, facts in (("student", student), ("teacher", teacher)):
            if facts.width != facts.token_width:
                raise EvlecgError(f"answers ({facts.width} wide) and visual tokens ({facts.token_width}) never meet",
                                  where=role, hint="--method em_kd cannot read this family")  # fmt: skip
        self.projection = nn.Linear(teacher.token_width, student.token_width, bias=False)

    def term(self, student: Outputs, teacher: Outputs, batch: Batch, heads: tuple[Any, Any]) -> dict[str, Tensor]:
        """Distance of matched states, and affinities."""
        target_BND = F.linear(layer_normalised(teacher.visual_BND.float()), self.projection.weight)
        mine, theirs, row_P = match_tokens(
            layer_normalised(student.visual_BND.float()), target_BND, student.side.visual_mask_BN,
            teacher.side.visual_mask_BN,
        )  # fmt: skip
        student_PD, teacher_PE = student.visual_BND[row_P, mine].float(), teacher.visual_BND[row_P, theirs].float()
        distance = (layer_normalised(student_PD) - target_BND[row_P, theirs]).square().mean()
        groups = answer_groups(student.side, teacher.side)
        if not len(groups) or not len(row_P):
            zero = student.visual_BND.sum() * 0
            return {"em_state": distance if len(row_P) else zero, "em_affinity": zero}
        row_G = student.side.answer_A2[groups.student_first_G, 0]
        together = row_G[:, None] == row_P[None]
        affinities = [
            F.normalize(_group_means(outputs, group_A, len(groups)).float(), dim=-1) @ F.normalize(tokens, dim=-1).T
            for outputs, group_A, tokens in (
                (student, groups.student_A, student_PD), (teacher, groups.teacher_A, teacher_PE),
            )
        ]  # fmt: skip
        affinity = masked_mean(F.smooth_l1_loss(affinities[0], affinities[1], reduction="none"), together)
        return {"em_state": distance, "em_affinity": affinity}

    def sizes(self, student: Side, teacher: Side, batch: Batch) -> dict[str, Tensor]:
        """Matches, and matches times groups of the same row."""
        matches_B = torch.minimum(student.visual_mask_BN.sum(1), teacher.visual_mask_BN.sum(1))
        row_G = student.answer_A2[answer_groups(student, teacher).student_first_G, 0]
        groups_B = torch.bincount(row_G, minlength=len(matches_B))
        return {"em_state": matches_B.sum(), "em_affinity": (matches_B * groups_B).sum()}


@torch.no_grad()
def match_tokens(
    student_BND: Tensor, teacher_BMD: Tensor, student_mask_BN: Tensor, teacher_mask_BM: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One-to-one matches of least total absolute distance: student token [P], teacher token [P], row [P]."""
    from scipy.optimize import linear_sum_assignment

    mine, theirs, rows = [], [], []
    for row in range(len(student_BND)):
        student_N, teacher_M = student_mask_BN[row].nonzero()[:, 0], teacher_mask_BM[row].nonzero()[:, 0]
        cost_NM = torch.cdist(student_BND[row, student_N], teacher_BMD[row, teacher_M], p=1)
        first, second = linear_sum_assignment(cost_NM.cpu().numpy())
        mine.append(student_N[torch.as_tensor(first, device=student_N.device)])
        theirs.append(teacher_M[torch.as_tensor(second, device=teacher_M.device)])
        rows.append(torch.full_like(mine[-1], row))
    return torch.cat(mine), torch.cat(theirs), torch.cat(rows)


def _n_groups(student: Side, teacher: Side) -> Tensor:
    return torch.tensor(len(answer_groups(student, teacher)), device=student.answer_A2.device)


def _starts(student: Outputs, teacher: Outputs, groups: Groups) -> tuple[list[AnswerLogits], list[Tensor]]:
    """Logits of both sides, and with which of them each starts every group."""
    return [student.answer_logits, teacher.answer_logits], [groups.student_first_G, groups.teacher_first_G]


def _questions(outputs: Outputs) -> Tensor:
    """A number for the question of every answer token that both sides share, [A]."""
    row_A, place_A = outputs.side.answer_A2.unbind(1)
    return row_A * 100_000 + outputs.side.block_BS[row_A, place_A]


def _unit_scale(x_AD: Tensor) -> Tensor:
    """Divided by the standard deviation of all its elements, as DSKD normalises."""
    return x_AD / x_AD.std().clamp_min(1e-6)


def _mean_token(outputs: Outputs, row_R: Tensor) -> Tensor:
    """Mean visual token of some rows, [R, D]."""
    mask_RN = outputs.side.visual_mask_BN[row_R]
    tokens_RND = zero_where_masked(outputs.visual_BND[row_R].float(), mask_RN)
    return tokens_RND.sum(1) / mask_RN.sum(1, keepdim=True).clamp_min(1)


def _group_means(outputs: Outputs, group_A: Tensor, n_groups: int) -> Tensor:
    """Mean last state of the tokens of every group, [G, D]."""
    row_A, place_A = outputs.side.answer_A2.unbind(1)
    held_A = group_A >= 0
    states_AD = outputs.hidden_BSD[row_A, place_A][held_A].float()
    total_GD = states_AD.new_zeros(n_groups, states_AD.shape[1]).index_add(0, group_A[held_A], states_AD)
    return total_GD / torch.bincount(group_A[held_A], minlength=n_groups).clamp_min(1)[:, None]


BASELINES: dict[str, type[Baseline]] = {
    "kl": Divergence,
    "rkl": ReverseDivergence,
    "jsd": JensenShannon,
    "uld": Uld,
    "multilevel_ot": MultiLevelOt,
    "dskd": Dskd,
    "minilm": MiniLm,
    "rkd": Rkd,
    "feature": Feature,
    "em_kd": EmKd,
}
