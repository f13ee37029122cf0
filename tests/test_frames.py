"""A page and a signal side by side: what is of the same lead and time is near, all else is far, in every term."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from evlecg.losses.alignment import LEAD_APART, position_bias
from evlecg.losses.objective import EvlObjective
from evlecg.losses.transport import cell_cost, cell_shares, overlap_area
from evlecg.page.layout import batch_cells, page_layout
from evlecg.page.trace import TraceLayout
from evlecg.recipe import ObjectiveConfig, RelationConfig, TransportConfig
from evlecg.schema import LEADS, AnswerLogits, Batch, ModelFacts, Outputs, Side

WINDOW_S = 10.0


def page_grid_boxes(n):
    edges = np.linspace(0, 1, n + 1)
    return np.array([(edges[x], edges[y], edges[x + 1], edges[y + 1]) for y in range(n) for x in range(n)], np.float32)


def signal_boxes(n=10):
    """Patches of one second of every lead."""
    lead_N = np.repeat(np.arange(12), n)
    time_N2 = np.tile(np.stack([np.arange(n), np.arange(1, n + 1)], 1), (12, 1)).astype(np.float32)
    return TraceLayout(WINDOW_S).boxes(lead_N, time_N2), lead_N, time_N2


def side_of(boxes_N4, cell_box_C4, frame, rows=1, n_text=2):
    n = len(boxes_N4)
    block_BS = torch.cat([torch.zeros(rows, n), torch.ones(rows, n_text)], 1).long()
    visual_BS = block_BS == 0
    box_BN4 = torch.from_numpy(boxes_N4).expand(rows, -1, -1)
    return Side(
        inputs={}, valid_BS=torch.ones_like(visual_BS), block_BS=block_BS, byte_end_BS=torch.zeros_like(block_BS),
        answer_A2=torch.tensor([[row, n + n_text - 1] for row in range(rows)]),
        answer_ids_A=torch.zeros(rows, dtype=torch.long), visual_BS=visual_BS, visual_box_BN4=box_BN4,
        visual_mask_BN=(box_BN4[..., 2] > box_BN4[..., 0]),
        cell_box_BC4=torch.from_numpy(cell_box_C4).expand(rows, -1, -1), frame=frame,
    )  # fmt: skip


@pytest.fixture(scope="module")
def setting():
    """A page of 24 x 24 tokens, a signal of 12 x 10 patches, and the page's cells on both."""
    page = page_layout("3x4+1", size_px=(336, 336))
    _, lead_C, time_C2 = batch_cells([page, TraceLayout(WINDOW_S)])
    cell_C4 = np.concatenate([page.cells()[0], np.zeros((96, 4), np.float32)])
    boxes_N4, lead_M, time_M2 = page_grid_boxes(24), *signal_boxes()[1:]
    teacher = side_of(boxes_N4, cell_C4, "page")
    student = side_of(signal_boxes()[0], TraceLayout(WINDOW_S).boxes(lead_C, time_C2), "trace")
    centre_N2 = (boxes_N4[:, :2] + boxes_N4[:, 2:]) / 2
    lead_N, time_N = page.locate(centre_N2)
    return teacher, student, torch.from_numpy(lead_C), torch.from_numpy(time_C2), lead_N, time_N, lead_M, time_M2


def costs(setting, position=1.0, lead=1.0):
    teacher, student, lead_C, time_C2, *_ = setting
    return cell_cost(
        cell_shares(teacher.visual_box_BN4, teacher.visual_mask_BN, teacher.cell_box_BC4),
        cell_shares(student.visual_box_BN4, student.visual_mask_BN, student.cell_box_BC4),
        lead_C, time_C2, position=position, lead=lead,
    )[0]  # fmt: skip


def test_cost_is_low_where_lead_and_time_agree_and_high_elsewhere(setting):
    *_, lead_N, time_N, lead_M, time_M2 = setting
    cost_NM = costs(setting).numpy()
    middle_M = time_M2.mean(1)
    inner = [n for n in range(len(lead_N)) if lead_N[n] >= 0 and cost_NM[n].min() < 0.1]
    assert len(inner) > 200
    for n in inner:
        nearest = cost_NM[n].argmin()
        assert lead_M[nearest] == lead_N[n]
        assert abs(middle_M[nearest] - time_N[n]) < 1.3, "of the same cell or its neighbour"
        other_lead = cost_NM[n][lead_M != lead_N[n]].min()
        far_time = cost_NM[n][(lead_M == lead_N[n]) & (np.abs(middle_M - time_N[n]) > 4)]
        assert cost_NM[n].min() + 0.3 < other_lead
        assert far_time.size == 0 or cost_NM[n].min() + 0.08 < far_time.min()


def test_cost_is_its_sum_over_cells(setting):
    """W_t D W_s^T by loops over a few tokens."""
    teacher, student, lead_C, time_C2, *_ = setting
    cost_NM = costs(setting, position=0.7, lead=0.4)
    span = float(time_C2.max() - time_C2.min())
    for n, m in ((100, 3), (250, 57), (470, 110)):
        shares = []
        for side, token in ((teacher, n), (student, m)):
            area_C = overlap_area(side.visual_box_BN4[:, token : token + 1], side.cell_box_BC4)[0, 0]
            shares.append(area_C / area_C.sum())
        total = 0.0
        for i in range(len(lead_C)):
            for j in range(len(lead_C)):
                apart_s = float(time_C2[i].mean() - time_C2[j].mean()) / span
                total += float(shares[0][i] * shares[1][j]) * (0.7 * apart_s**2 + 0.4 * float(lead_C[i] != lead_C[j]))
        assert float(cost_NM[n, m]) == pytest.approx(total, abs=1e-5)


def test_tokens_without_a_lead_are_neither_near_nor_far(setting):
    teacher, student, *_, lead_N, _, _, _ = setting
    shown = cell_shares(student.visual_box_BN4, student.visual_mask_BN, student.cell_box_BC4)[0].sum(1)
    assert_close(shown, torch.ones(120))  # also what the page has no room for
    bare = cell_shares(teacher.visual_box_BN4, teacher.visual_mask_BN, teacher.cell_box_BC4)[0].sum(1) == 0
    assert 0 < int(bare.sum()) < len(lead_N) / 2
    cost_NM = costs(setting)
    row_M = cost_NM[bare][0]
    assert float(row_M.std()) < 1e-6 and cost_NM.min() < row_M[0] < cost_NM.max()
    none = cell_cost(
        torch.zeros(1, 2, 0), torch.zeros(1, 3, 0), torch.zeros(0, dtype=torch.long), torch.zeros(0, 2),
        position=1, lead=1,
    )  # fmt: skip
    assert_close(none, torch.zeros(1, 2, 3))


def test_attention_sees_the_same_lead_and_time(setting):
    teacher, student, lead_C, time_C2, lead_N, _, lead_M, _ = setting
    bias_ST = position_bias(student, teacher, weight=2.0, cells=(lead_C, time_C2))[0]
    assert bias_ST.shape == (122, 578)
    assert not bias_ST[120:].any() and not bias_ST[:, 576:].any(), "text has no place"
    wanted = -2 * costs(setting, lead=LEAD_APART).T
    assert_close(bias_ST[:120, :576], wanted)
    same = torch.from_numpy(lead_M[:, None] == lead_N[None])
    assert bias_ST[:120, :576][same].mean() > bias_ST[:120, :576][~same].mean() + 0.2
    with pytest.raises(ValueError, match="cells"):
        position_bias(student, teacher, weight=2.0)


def outputs_of(side, width, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, positions = side.valid_BS.shape
    hidden_BSD = torch.randn(rows, positions, width, generator=generator)
    visual_BND = hidden_BSD[side.visual_BS].view(rows, -1, width)
    return Outputs(hidden_BSD, visual_BND, visual_BND, AnswerLogits(torch.zeros(len(side.answer_A2), 2)), side)


def batch_of(setting, student, teacher):
    return Batch(("a",), torch.zeros(1, dtype=torch.long), student, teacher, setting[2], setting[3])


def test_the_plan_keeps_mass_in_its_lead(setting):
    teacher, student, *_ = setting
    config = ObjectiveConfig(
        lambda_m=0, lambda_rec=0, alpha=1, lambda_r=0, lambda_ot=1, transport=TransportConfig(position=5, lead=5)
    )
    objective = EvlObjective(config, student=ModelFacts(8, 2), teacher=ModelFacts(6, 9))
    terms = objective(
        outputs_of(student, 8, 0), outputs_of(teacher, 6, 1), batch_of(setting, student, teacher),
        output_head=torch.nn.Identity(), diagnose=True,
    )  # fmt: skip
    assert terms.diagnostics["ot_mass_in_lead"] > 0.5
    blind = dataclasses.replace(config, transport=TransportConfig(position=0, lead=0))
    unsteered = EvlObjective(blind, student=ModelFacts(8, 2), teacher=ModelFacts(6, 9))(
        outputs_of(student, 8, 0), outputs_of(teacher, 6, 1), batch_of(setting, student, teacher),
        output_head=torch.nn.Identity(), diagnose=True,
    )  # fmt: skip
    assert unsteered.diagnostics["ot_mass_in_lead"] < 0.3


def test_relations_compare_cells_of_lead_and_time(setting):
    """Tokens that say nothing but their lead and time agree, and tokens that are shuffled do not."""
    teacher, student, *_, lead_N, time_N, lead_M, time_M2 = setting
    code = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))

    def said(lead, time_s):
        state = torch.cat([code[torch.from_numpy(np.maximum(lead, 0))], torch.from_numpy(time_s)[:, None] / 5], 1)
        return torch.where(torch.from_numpy(lead >= 0)[:, None], state, 0.0)[None].float()

    teacher_BND = said(lead_N, np.nan_to_num(time_N))
    student_BMD = said(lead_M, time_M2.mean(1))
    config = ObjectiveConfig(
        lambda_m=0, lambda_rec=0, alpha=1, lambda_r=1, lambda_ot=0, relation=RelationConfig(cells="page")
    )
    objective = EvlObjective(config, student=ModelFacts(6, 2), teacher=ModelFacts(6, 2))

    def relation(tokens_BMD):
        made = dataclasses.replace(outputs_of(student, 6, 0), visual_BND=tokens_BMD)
        taught = dataclasses.replace(outputs_of(teacher, 6, 1), visual_BND=teacher_BND)
        terms = objective(made, taught, batch_of(setting, student, teacher), output_head=torch.nn.Identity(),
                          diagnose=True)  # fmt: skip
        assert terms.diagnostics["rel_cells"] == 32, "a page grid means nothing here"
        return float(terms.values["rel"])

    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    assert relation(student_BMD) < 0.2 * relation(student_BMD[:, order])
    assert LEADS[lead_M[-1]] == "V6"
