"""What a student is trained on: outputs of student and teacher in, weighted terms out.

    L = (1 - alpha) L_CE + alpha (lambda_m L_mhca + lambda_r L_rel + lambda_ot L_ot + lambda_rec L_rec)

(METHOD, arXiv 2605.29977; relations among records, L_rec, are our own: see `losses.records`.)

An objective is a module, since aligner and projections train beside the student; they belong to it and never enter
the student's files. A term of weight zero is not computed and creates no module. Call objectives through `forward`
only, so that DDP may wrap one that has parameters; every parameter gets a gradient on every step.

Shape legend: B batch rows, S student positions, T teacher positions, N teacher's and M student's visual tokens, D
student width, E teacher width, C cells, A answer tokens in the batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evlecg.errors import EvlecgError
from evlecg.losses.alignment import (
    CrossAligner,
    alignment_loss,
    centred_alignment_loss,
    cross_causal_mask,
    place_distance,
    position_bias,
    predicting_positions,
    strict_alignment_loss,
    variance_share,
    visible_mask,
    visual_states,
)
from evlecg.losses.baselines import BASELINES, Baseline
from evlecg.losses.options import check_options
from evlecg.losses.records import (
    Company,
    RecordStates,
    answer_relation,
    by_question,
    first_rows,
    place_relation,
    question_states,
)
from evlecg.losses.relation import page_grid, pool_to_cells, relation_loss
from evlecg.losses.stable import full_precision, zero_where_masked
from evlecg.losses.terms import answer_accuracy, answer_count, answer_cross_entropy, frozen_reading, weighted
from evlecg.losses.transport import (
    Transport,
    cell_cost,
    cell_shares,
    lead_marginals,
    page_cost,
    plan_diagnostics,
    token_lead,
    transport_loss,
)
from evlecg.recipe import ObjectiveConfig
from evlecg.schema import AnswerLogits, Batch, LossTerms, ModelFacts, Outputs, Side


class CeObjective(nn.Module):
    """Cross-entropy on the answer alone: the control that every comparison needs. It has no parameters.

    Args:
        config: unused; every objective is made alike.
        student, teacher: unused.
    """

    reads_tokens = False
    least_rows = 1
    relates_records = False

    def __init__(self, config: ObjectiveConfig, *, student: ModelFacts, teacher: ModelFacts | None) -> None:
        super().__init__()

    @property
    def needs(self) -> frozenset[str]:
        """What it reads beyond the student's answer logits: nothing."""
        return frozenset()

    def counts(self, batch: Batch, *, across: bool = False) -> dict[str, Tensor]:
        """See `EvlObjective.counts`."""
        return {"ce": answer_count(batch.student)}

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
        """See `EvlObjective.forward`; reads `student` only."""
        return weighted({"ce": answer_cross_entropy(student.answer_logits, student.side.answer_ids_A)}, {"ce": 1})


@dataclass(frozen=True)
class _Terms:
    """The distillation terms of one pass, and the intermediate results that explain them."""

    values: dict[str, Tensor] = field(default_factory=dict)
    aligned_BSD: Tensor | None = None
    anchor_logits: AnswerLogits | None = None
    transport: Transport | None = None
    cell_mask_BC: Tensor | None = None


class EvlObjective(nn.Module):
    """Cross-entropy, cross-attention alignment, optimal transport, geometric relations, and relations among records.

    Records are related within a batch, or, with a `Company`, within a step of several.

    Args:
        config: the recipe's objective.
        student: the student's facts.
        teacher: the teacher's facts; None is a mistake unless every term has weight zero.

    Raises:
        EvlecgError: a configuration that cannot work (heads that do not divide the width, `alpha` above 1, relations
            to aligned states that nothing trains).
    """

    reads_tokens = False
    least_rows = 1

    def __init__(self, config: ObjectiveConfig, *, student: ModelFacts, teacher: ModelFacts | None) -> None:
        super().__init__()
        self.config = config
        check_options(config)
        self.uses_alignment, self.uses_relation, self.uses_transport = _terms_used(config)
        self.uses_answers, self.uses_places = _records_used(config)
        self.aligns_tokens = not config.strict and config.align.features != "states"
        self.relates_aligned = self.uses_relation and (config.strict or config.relation.source == "aligned")
        if self.relates_aligned and not self.uses_alignment and not config.strict:
            raise EvlecgError(
                "relations to aligned states need the alignment term: nothing else trains the aligner",
                where="objective.relation.source",
                hint="set objective.lambda_m above 0, or objective.relation.source to teacher",
            )
        if self.needs and teacher is None:
            raise ValueError("this objective reads a teacher, and knows none")
        placed = student.visual_width in (None, student.width)
        if not placed and self.uses_alignment and config.align.scope == "visual" and not self.aligns_tokens:
            raise EvlecgError(
                "the student's visual tokens are not among its hidden states: they have a width of their own",
                where="objective.align.scope",
                hint="set it to all or answer",
            )
        if not placed and self.relates_aligned and not (config.strict or self.aligns_tokens):
            raise EvlecgError(
                "the student's visual tokens are not among its hidden states, so no state is aligned with them",
                where="objective.relation.source",
                hint="set it to teacher",
            )
        self.aligner: CrossAligner | None = None
        self.projection: nn.Linear | None = None
        if teacher is not None and (self.uses_alignment or self.relates_aligned):
            ours, theirs = (facts.token_width if self.aligns_tokens else facts.width for facts in (student, teacher))
            if ours % config.align.heads:
                raise EvlecgError(
                    f"{config.align.heads} attention heads do not divide the student's width of {ours}",
                    where="objective.align.heads",
                    hint=f"for example {math.gcd(ours, config.align.heads)}",
                )
            self.aligner = CrossAligner(ours, theirs, heads=config.align.heads, normalise=not config.strict)
        if teacher is not None and self.uses_transport:
            self.projection = nn.Linear(teacher.token_width, student.token_width, bias=False)
            # orthogonal: distances among teacher tokens survive, and so does their size per element
            gain = max(1.0, math.sqrt(student.token_width / teacher.token_width))
            nn.init.orthogonal_(self.projection.weight, gain=gain)

    @property
    def relates_records(self) -> bool:
        """Whether records are related with one another."""
        return self.uses_answers or self.uses_places

    @property
    def reads_teacher_beside_records(self) -> bool:
        """Whether a term reads more of the teacher than a `Company` holds."""
        return self.uses_alignment or self.uses_relation or self.uses_transport

    @property
    def needs(self) -> frozenset[str]:
        """What it reads: `teacher`, and of both models `hidden`, `visual` (a layer) or `projected` tokens."""
        return _evl_needs(self.config)

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
        """One step's loss.

        Args:
            student: on the graph.
            teacher: without gradient, the same records in the same order; None where `company` holds what is read.
            batch: names the lead x time cells; its halves are those of the outputs.
            output_head: the student's (`models.outputs.AnswerHead`); read frozen, by the anchor.
            teacher_head: the teacher's; read by `dskd` alone.
            ramp: share of the distillation weights in force. The anchor is exempt: it moves the aligner only, which
                had better be right by the time the student is pulled toward it.
            company: the step's records; None: the batch's are all. The value of a relation among them is that of the
                whole step in every part, its gradient that which this part adds, as often as there are parts.
            diagnose: fill `diagnostics`. Costs a second pass of the terms with the teacher's batch rolled by one,
                and waits for the device.
        """
        config = self.config
        values = {"ce": answer_cross_entropy(student.answer_logits, student.side.answer_ids_A)}
        weights = {
            "ce": 1 - config.alpha,
            "mhca": config.alpha * ramp * config.lambda_m,
            "anchor": config.alpha * config.lambda_m * config.align.anchor,
            "rel": config.alpha * ramp * config.lambda_r,
            "ot": config.alpha * ramp * config.lambda_ot,
            "rec_answer": config.alpha * ramp * config.lambda_rec * config.records.answers,
            "rec_visual": config.alpha * ramp * config.lambda_rec * config.records.visual,
        }
        if not self.needs:
            return weighted(values, weights)
        if teacher is None and (self.reads_teacher_beside_records or company is None):
            raise ValueError("this objective reads a teacher, and was given none")
        terms = self._terms(student, teacher, batch, output_head, company)
        diagnostics = self._diagnose(terms, student, teacher, batch, output_head, company) if diagnose else {}
        return weighted({**values, **terms.values}, weights, diagnostics)

    @torch.no_grad()
    def counts(self, batch: Batch, *, across: bool = False) -> dict[str, Tensor]:
        """How many elements every term's mean is taken over: scalar tensors, from the batch alone.

        `across`: records are related across the step (see `Company`).

        With them the parts of a step (batches summed into it, on all processes) weigh as their elements do, and come
        to what one batch of all records gives.
        """
        side = batch.student
        found = {"ce": answer_count(side)}
        if not self.needs:
            return found
        assert batch.teacher is not None
        if self.uses_alignment:
            found["mhca"] = self._aligned_count(batch)
            if not (self.config.strict or self.aligns_tokens) and self.config.align.anchor > 0:
                found["anchor"] = answer_count(side)
        if self.uses_transport:
            found["ot"] = (batch.teacher.visual_mask_BN.any(1) & side.visual_mask_BN.any(1)).sum()
        if self.uses_relation:
            found["rel"] = (self._related(side, batch.teacher).sum(1) > 1).sum()
        related = {"rec_answer": self.uses_answers and batch.asked_Q is not None, "rec_visual": self.uses_places}
        if across:  # every part holds the whole step's
            return found | {name: torch.ones_like(found["ce"]) for name, used in related.items() if used}
        if related["rec_answer"]:
            assert batch.asked_Q is not None
            found["rec_answer"] = (batch.asked_Q.unique(return_counts=True)[1] > 1).sum()
        if self.uses_places:
            halves = (side, batch.teacher)
            masks = [self._places(half, half.visual_box_BN4[..., :0], batch)[1] for half in halves]
            found["rec_visual"] = ((masks[0] & masks[1]).sum(0) > 1).sum()
        return found

    def _terms(
        self,
        student: Outputs,
        teacher: Outputs | None,
        batch: Batch,
        output_head: nn.Module,
        company: Company | None,
        *,
        rolled: bool = False,
    ) -> _Terms:
        """Every distillation term, before weighting.

        Args:
            student, teacher, batch, output_head, company: as for `forward`.
            rolled: every student meets the teacher of the next record in its place.
        """
        terms, among = _Terms(), self._among_records(student, teacher, batch, company, rolled=rolled)
        if teacher is None:
            return replace(terms, values=among)
        teacher = _rolled(teacher) if rolled else teacher
        if self.aligner is not None:
            terms = self._alignment(self.aligner, student, teacher, batch, output_head)
        if self.projection is not None:
            transport = self._transport(self.projection, student, teacher, batch)
            terms = replace(terms, values={**terms.values, "ot": transport.loss}, transport=transport)
        if self.uses_relation:
            loss, cell_mask_BC = self._relation(student, teacher, terms.aligned_BSD)
            terms = replace(terms, values={**terms.values, "rel": loss}, cell_mask_BC=cell_mask_BC)
        return replace(terms, values={**terms.values, **among})

    def _among_records(
        self, student: Outputs, teacher: Outputs | None, batch: Batch, company: Company | None, *, rolled: bool
    ) -> dict[str, Tensor]:
        """Relations among the records of the batch, or of the whole step; of neighbours those of the batch alone."""
        if not self.relates_records or (rolled and company is not None):
            return {}
        if company is None:
            assert teacher is not None
            states = self.record_states(student, teacher, batch)
            return self._relations([states.rolled() if rolled else states])
        ours_QD, ours_RCD, _ = self._record_half(student, batch)
        states = {"rec_answer": ours_QD, "rec_visual": ours_RCD}
        return {name: company.term(name, states[name]) for name in company.values}

    def in_company(self, parts: Sequence[RecordStates], mine: Sequence[int | None]) -> list[Company]:
        """What relations among all records of a step mean to some of its parts.

        Args:
            parts: every batch of the step that has records, of all processes.
            mine: of every batch of this process, which part it is; None where its record does not count.
        """
        moving = [
            replace(part, student_QD=_leaf(part.student_QD), student_RCD=_leaf(part.student_RCD)) for part in parts
        ]
        with torch.enable_grad():
            values = self._relations(moving)
        held = {"rec_answer": [part.student_QD for part in moving], "rec_visual": [part.student_RCD for part in moving]}
        pulls = {name: torch.autograd.grad(value, held[name]) for name, value in values.items()}
        values = {name: value.detach() for name, value in values.items()}
        return [
            Company(len(parts), values, {} if place is None else {name: pulls[name][place] for name in pulls})
            for place in mine
        ]

    def _relations(self, parts: Sequence[RecordStates]) -> dict[str, Tensor]:
        config, found = self.config.records, {}
        if self.uses_answers and any(len(part.asked_Q) for part in parts):
            found["rec_answer"] = answer_relation(parts, distance=config.distance, cosine=config.cosine)
        if self.uses_places:
            found["rec_visual"] = place_relation(parts, distance=config.distance, cosine=config.cosine)
        return found

    def record_states(self, student: Outputs, teacher: Outputs, batch: Batch) -> RecordStates:
        """What the records of a batch are related by."""
        (ours_QD, ours_RCD, mask_RC), (theirs_QE, theirs_RCE, their_mask_RC) = (
            self._record_half(outputs, batch) for outputs in (student, teacher)
        )
        asked_Q = batch.record_B.new_zeros(0) if batch.asked_Q is None or not self.uses_answers else batch.asked_Q
        cell_C4 = self._cells(batch, mask_RC.shape[1])
        return RecordStates(ours_QD, theirs_QE, asked_Q, ours_RCD, theirs_RCE, mask_RC & their_mask_RC, cell_C4)

    def _record_half(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """One model's states [Q, D] at questions and [R, C, D] at places, and which places [R, C] it has."""
        hidden_BSD = outputs.hidden_BSD
        states_QD, places_RCD = hidden_BSD.new_zeros(0, hidden_BSD.shape[2]), hidden_BSD.new_zeros(0, 0, 1)
        mask_RC = torch.zeros(0, 0, dtype=torch.bool, device=hidden_BSD.device)
        if self.uses_answers and batch.asked_Q is not None:
            states_QD = question_states(hidden_BSD, outputs.side)
        if self.uses_places:
            places_RCD, mask_RC = self._places(outputs.side, _tokens(outputs, self.config.records.features), batch)
        return states_QD, places_RCD, mask_RC

    def _cells(self, batch: Batch, n_cells: int) -> Tensor:
        """What every cell is, [C, 4]: its number on the page grid; or its lead and times, and which of those alike."""
        assert batch.teacher is not None
        if self._grid(batch.student, batch.teacher):
            number_C = torch.arange(n_cells, device=batch.cell_time_C2.device, dtype=batch.cell_time_C2.dtype)
            return number_C[:, None].expand(-1, 4)
        cell_C3 = torch.cat([batch.cell_lead_C[:, None].to(batch.cell_time_C2), batch.cell_time_C2], dim=1)
        cell_C3 = cell_C3.nan_to_num(nan=-1.0)  # of a picture nothing is known but the order
        alike_CC = (cell_C3[:, None] == cell_C3[None]).all(2)
        earlier_C = alike_CC.tril(-1).sum(1)  # a page may show a lead twice
        return torch.cat([cell_C3, earlier_C[:, None].to(cell_C3)], dim=1)

    def _places(self, side: Side, tokens_BND: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Visual tokens [R, C, D] of every record, pooled into cells, and which cells it has."""
        assert batch.teacher is not None
        pooled_BCD, mask_BC = _pooled(tokens_BND, side, self._grid(batch.student, batch.teacher))
        first_R = first_rows(batch)
        return pooled_BCD[first_R], mask_BC[first_R]

    def _alignment(
        self, aligner: CrossAligner, student: Outputs, teacher: Outputs, batch: Batch, output_head: nn.Module
    ) -> _Terms:
        config = self.config.align
        if self.config.strict:
            aligned_BSD = aligner(student.hidden_BSD, teacher.hidden_BSD, visible_mask(student.side, teacher.side))
            if not self.uses_alignment:
                return _Terms(aligned_BSD=aligned_BSD)
            loss = strict_alignment_loss(student.hidden_BSD, aligned_BSD, student.side.valid_BS)
            return _Terms({"mhca": loss}, aligned_BSD)
        ours_BXD, theirs_BYE = (_tokens(outputs, config.features) for outputs in (student, teacher))
        visible_BXY, bias_BXY = self._visible(student.side, teacher.side), None
        if config.position_bias > 0:
            cells = batch.cell_lead_C, batch.cell_time_C2
            if self.aligns_tokens:
                distance_BXY = place_distance(student.side, teacher.side, cells=cells)
                bias_BXY = -config.position_bias * distance_BXY * visible_BXY
            else:
                bias_BXY = position_bias(student.side, teacher.side, weight=config.position_bias, cells=cells)
        query_BXD = ours_BXD.detach() if config.detach_query else ours_BXD
        aligned_BXD = aligner(query_BXD, theirs_BYE, visible_BXY, bias_BXY)
        mask_BX = visible_BXY.any(2) & self._scope(student.side)
        anchors = config.anchor > 0 and not self.aligns_tokens  # no answer hangs on a visual token
        if config.centred:
            moving_BXD, target_BXD = ours_BXD, aligned_BXD
            if not self.aligns_tokens:  # what stands side by side is the same question, not the same position
                moving_BXD, mask_BX = self._by_question(ours_BXD, batch)
                target_BXD, _ = self._by_question(aligned_BXD, batch)
            loss = centred_alignment_loss(moving_BXD, target_BXD, mask_BX, fixed=anchors, normalise=config.normalise)
        else:
            predicting_BX = predicting_positions(student.side) if anchors else torch.zeros_like(mask_BX)
            loss = alignment_loss(ours_BXD, aligned_BXD, mask_BX, predicting_BX, normalise=config.normalise)
        if not anchors:
            return _Terms({"mhca": loss}, aligned_BXD)
        logits = frozen_reading(student.side.before_answers(aligned_BXD), student.side, output_head)
        anchor = answer_cross_entropy(logits, student.side.answer_ids_A)
        return _Terms({"mhca": loss, "anchor": anchor}, aligned_BXD, logits)

    def transport(self, student: Outputs, teacher: Outputs, batch: Batch) -> Transport | None:
        """Plan and cost of a batch, None where the objective transports nothing."""
        return None if self.projection is None else self._transport(self.projection, student, teacher, batch)

    @staticmethod
    def _by_question(states_BSD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The student's states before the answers, records in rows and questions in columns, and which there are."""
        if batch.asked_Q is None:
            raise ValueError("alignment centred at a question has to know which question is which")
        states_GRD, mask_GR = by_question(question_states(states_BSD, batch.student), batch.asked_Q)
        return states_GRD.transpose(0, 1), mask_GR.T

    def _visible(self, student: Side, teacher: Side) -> Tensor:
        """Which of the teacher's positions, or visual tokens, one of the student's may see."""
        if self.aligns_tokens:
            return student.visual_mask_BN[:, :, None] & teacher.visual_mask_BN[:, None]
        return (cross_causal_mask if self.config.align.causal else visible_mask)(student, teacher)

    def _scope(self, side: Side) -> Tensor:
        """Student positions, or visual tokens, that the alignment term is taken over."""
        if self.config.strict:
            return side.valid_BS
        if self.aligns_tokens:
            return side.visual_mask_BN
        if self.config.align.scope == "answer":
            return predicting_positions(side)
        return side.visual_BS if self.config.align.scope == "visual" else side.valid_BS

    def _aligned_count(self, batch: Batch) -> Tensor:
        """How many positions the mean of the alignment term is over."""
        side, centred = batch.student, self.config.align.centred and not self.config.strict
        assert batch.teacher is not None
        if self.config.strict:
            return self._scope(side).sum()
        if centred and not self.aligns_tokens:
            assert batch.asked_Q is not None
            count_G = batch.asked_Q.unique(return_counts=True)[1]
            return count_G[count_G > 1].sum()
        mask_BX = self._visible(side, batch.teacher).any(2) & self._scope(side)
        return (mask_BX & (mask_BX.sum(0) > 1) if centred else mask_BX).sum()

    def _related(self, student: Side, teacher: Side) -> Tensor:
        """Bool: tokens or cells that relations are taken among, row by row."""
        if self.config.strict:
            return student.valid_BS
        masks = [
            _pooled(side.visual_box_BN4[..., :0], side, self._grid(student, teacher))[1]
            for side in (student, student if self.relates_aligned else teacher)
        ]
        return masks[0] & masks[1]

    def _grid(self, student: Side, teacher: Side) -> int:
        """Cells a side of the page grid; 0: lead x time cells."""
        # a page grid means nothing on a trace: there, cells of lead and time are what both sides have
        config = self.config.relation
        return config.grid if config.cells == "page" and student.frame == teacher.frame == "page" else 0

    def _transport(self, projection: nn.Linear, student: Outputs, teacher: Outputs, batch: Batch) -> Transport:
        config = self.config.transport
        masks = teacher.side.visual_mask_BN, student.side.visual_mask_BN
        leads = _leads(teacher.side, batch), _leads(student.side, batch)
        extra_cost_BNM = None
        if not self.config.strict and (config.position > 0 or config.lead > 0):
            extra_cost_BNM = _extra_cost(teacher.side, student.side, batch, config.position, config.lead)
        a_BN, b_BM = lead_marginals(*masks, *leads) if config.marginals == "lead" else (None, None)
        return transport_loss(
            _project(_tokens(teacher, config.features), teacher.side.visual_mask_BN, projection.weight),
            _tokens(student, config.features),
            *masks,
            epsilon=config.epsilon,
            steps=config.steps,
            strict=self.config.strict,
            normalise=config.normalise,
            extra_cost_BNM=extra_cost_BNM,
            a_BN=a_BN,
            b_BM=b_BM,
            relax=config.relax,
            structure=config.structure if config.solver == "fused_gromov" else None,
        )

    def _relation(self, student: Outputs, teacher: Outputs, aligned_BSD: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The relation term, and which cells both sides have (None in the published form, which pools nothing)."""
        config, grid = self.config.relation, self._grid(student.side, teacher.side)
        if self.config.strict:
            assert aligned_BSD is not None
            return relation_loss(student.hidden_BSD, aligned_BSD, student.side.valid_BS), None
        pooled_BCD, mask_BC = _pooled(_tokens(student, config.features), student.side, grid)
        if self.relates_aligned:
            assert aligned_BSD is not None
            # a fixed target: the aligner is trained by its own term
            aligned_BSD = aligned_BSD.detach()
            aligned_BND = aligned_BSD if self.aligns_tokens else visual_states(aligned_BSD, student.side)
            target_BCE, target_mask_BC = _pooled(aligned_BND, student.side, grid)
        else:
            target_BCE, target_mask_BC = _pooled(_tokens(teacher, config.features), teacher.side, grid)
        mask_BC = mask_BC & target_mask_BC
        loss = relation_loss(pooled_BCD, target_BCE, mask_BC, distance=config.distance, cosine=config.cosine)
        return loss, mask_BC

    @torch.no_grad()
    def _diagnose(
        self,
        terms: _Terms,
        student: Outputs,
        teacher: Outputs | None,
        batch: Batch,
        output_head: nn.Module,
        company: Company | None,
    ) -> dict[str, float]:
        """Numbers that tell a working term from a hollow one; what is undefined is absent.

        `TERM_rolled_gap` is how much worse a term gets when every student meets its neighbour's teacher: near zero,
        the term does not depend on the record, whatever its value. It is not taken of a whole step's relations.
        """
        found: dict[str, float | None] = {}
        if teacher is None:
            return {}
        if terms.aligned_BSD is not None:
            states_BXD = _tokens(student, self.config.align.features) if self.aligns_tokens else student.hidden_BSD
            mask_BX = self._scope(student.side)
            found["mhca_variance_share"] = variance_share(terms.aligned_BSD, mask_BX)
            found["student_variance_share"] = variance_share(states_BXD, mask_BX)
        if terms.anchor_logits is not None and len(terms.anchor_logits):
            found["anchor_accuracy"] = answer_accuracy(terms.anchor_logits, student.side.answer_ids_A)
        if terms.transport is not None:
            plan = terms.transport
            leads = [_leads(side, batch) for side in (teacher.side, student.side)]
            found.update(plan_diagnostics(plan.plan_BNM, plan.a_BN, plan.b_BM, *leads))
        if terms.cell_mask_BC is not None:
            found["rel_cells"] = float(terms.cell_mask_BC.sum(1).float().mean())
        if len(teacher.hidden_BSD) > 1:
            rolled = self._terms(student, teacher, batch, output_head, company, rolled=True)
            for name, value in rolled.values.items():
                found[f"{name}_rolled_gap"] = float(value - terms.values[name])
        return {name: value for name, value in found.items() if value is not None}


METHODS: dict[str, type[EvlObjective | CeObjective | Baseline]] = {
    "evl": EvlObjective,
    "ce": CeObjective,
    "seqkd": CeObjective,  # on the teacher's answers, which the job asks for before the first step
    **BASELINES,
}


def needs_of(method: str, config: ObjectiveConfig) -> frozenset[str]:
    """What a method reads of both models, known before either is."""
    kind = METHODS[method]
    if issubclass(kind, Baseline):
        return kind.reads
    return _evl_needs(config) if issubclass(kind, EvlObjective) else frozenset()


def _terms_used(config: ObjectiveConfig) -> tuple[bool, bool, bool]:
    """Whether alignment, relation and transport weigh anything."""
    relations = config.strict or config.relation.distance > 0 or config.relation.cosine > 0
    return (
        config.alpha * config.lambda_m > 0,
        config.alpha * config.lambda_r > 0 and relations,
        config.alpha * config.lambda_ot > 0,
    )


def _records_used(config: ObjectiveConfig) -> tuple[bool, bool]:
    """Whether relations among records weigh anything: at the same question, at the same place."""
    among = config.records.distance > 0 or config.records.cosine > 0
    weight = 0.0 if config.strict or not among else config.alpha * config.lambda_rec
    return weight * config.records.answers > 0, weight * config.records.visual > 0


def _evl_needs(config: ObjectiveConfig) -> frozenset[str]:
    alignment, relation, transport = _terms_used(config)
    answers, places = _records_used(config)
    found = set()
    if alignment or (relation and (config.strict or config.relation.source == "aligned")):
        found.add("hidden" if config.strict else _FEATURES[config.align.features])
    if transport:
        found.add(_FEATURES[config.transport.features])
    if relation and not config.strict:
        found.add(_FEATURES[config.relation.features])
    if answers:
        found.add("hidden")
    if places:
        found.add(_FEATURES[config.records.features])
    return frozenset(found | {"teacher"}) if found else frozenset()


_FEATURES = {"states": "hidden", "last": "visual", "projected": "projected"}  # recipe's word -> what a model must offer


def _tokens(outputs: Outputs, features: str) -> Tensor:
    """What a recipe's word (see `_FEATURES`) stands for."""
    offered = {"states": outputs.hidden_BSD, "last": outputs.visual_BND, "projected": outputs.projected_BND}
    return offered[features]


def _pooled(tokens_BND: Tensor, side: Side, grid: int) -> tuple[Tensor, Tensor]:
    """Tokens pooled into a page grid of `grid` cells a side, or into lead x time cells where it is 0."""
    boxes = page_grid(grid, like=side.visual_box_BN4) if grid else side.cell_box_BC4
    return pool_to_cells(tokens_BND, side.visual_box_BN4, side.visual_mask_BN, boxes)


def _leaf(states: Tensor) -> Tensor:
    """The same values, at full precision, to take gradients on."""
    return states.detach().to(torch.promote_types(states.dtype, torch.float32)).requires_grad_()


@full_precision
def _project(tokens_BNE: Tensor, mask_BN: Tensor, weight_DE: Tensor) -> Tensor:
    """The teacher's tokens at the student's width. Masked first: NaN in padding would reach the weight's gradient."""
    return F.linear(zero_where_masked(tokens_BNE, mask_BN), weight_DE)


def _extra_cost(teacher: Side, student: Side, batch: Batch, position: float, lead: float) -> Tensor:
    """What steers the plan: distance on the page and lead; between other layouts, time and lead through the cells."""
    if teacher.frame == student.frame == "page":
        leads = _leads(teacher, batch), _leads(student, batch)
        return page_cost(teacher.visual_box_BN4, student.visual_box_BN4, *leads, position=position, lead=lead)
    return cell_cost(
        cell_shares(teacher.visual_box_BN4, teacher.visual_mask_BN, teacher.cell_box_BC4),
        cell_shares(student.visual_box_BN4, student.visual_mask_BN, student.cell_box_BC4),
        batch.cell_lead_C,
        batch.cell_time_C2,
        position=position,
        lead=lead,
    )


def _leads(side: Side, batch: Batch) -> Tensor:
    return token_lead(side.visual_box_BN4, side.visual_mask_BN, side.cell_box_BC4, batch.cell_lead_C)


def _rolled(teacher: Outputs) -> Outputs:
    """The teacher's batch rolled by one, in everything that the terms read of a teacher (not `answer_A2`, `inputs`)."""
    rows = ("valid_BS", "block_BS", "byte_end_BS", "visual_BS", "visual_box_BN4", "visual_mask_BN", "cell_box_BC4")
    side = replace(teacher.side, **{name: getattr(teacher.side, name).roll(1, 0) for name in rows})
    states = ("hidden_BSD", "visual_BND", "projected_BND")
    return replace(teacher, side=side, **{name: getattr(teacher, name).roll(1, 0) for name in states})
