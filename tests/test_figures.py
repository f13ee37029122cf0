"""Figures hold the numbers that they show; balanced terms have the gradients that their weights ask for."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from evlecg.distill import distill
from evlecg.figures import (
    TokenPlaces,
    curves_figure,
    effective_rank,
    singular_values,
    spectrum_figure,
    transport_figure,
)
from evlecg.losses.terms import MOST_SCALE, balanced, rescaled, weighted
from tests.test_distill import recipe, rows, weights


def shown(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=int)


def test_singular_values_are_those_of_the_centred_features():
    base = np.random.default_rng(0).normal(size=(40, 3)) * [5, 2, 0.1] + 100
    values = singular_values(base)
    expected = np.sqrt(np.linalg.eigvalsh(np.cov(base.T, bias=True) * 40))[::-1]
    np.testing.assert_allclose(values, expected / expected.sum(), rtol=1e-6)
    assert effective_rank(np.full(4, 0.25)) == pytest.approx(4)
    assert effective_rank(np.array([1.0, 0, 0])) == pytest.approx(1)


def test_transport_figure_shows_the_plan_in_the_order_of_leads(tmp_path):
    boxes = np.array([[x / 4, 0, (x + 1) / 4, 1] for x in range(4)])
    teacher = TokenPlaces(np.array([1, 0, -1, 0]), np.array([1.0, 3.0, np.nan, 1.0]), boxes)
    assert teacher.order().tolist() == [3, 1, 0, 2]
    student = TokenPlaces(np.array([0, 1]), np.array([2.0, 2.0]), boxes[:2])
    plan = np.array([[0, 0.25], [0.25, 0], [0, 0.25], [0.25, 0]])
    page = np.full((30, 40, 3), 255, np.uint8)
    path = transport_figure(tmp_path, plan_NM=plan, cost_NM=1 - plan, teacher=teacher, student=student, page_HW3=page,
                            record="r1")  # fmt: skip
    with np.load(tmp_path / "transport.npz") as held:
        np.testing.assert_array_equal(held["plan_NM"], plan)
        np.testing.assert_array_equal(held["teacher_lead_N"], teacher.lead_N)
    other = transport_figure(tmp_path / "other", plan_NM=plan[:, ::-1], cost_NM=1 - plan, teacher=teacher,
                             student=student, page_HW3=page, record="r1")  # fmt: skip
    assert np.abs(shown(path) - shown(other)).sum() > 10_000, "another plan, another picture"


def test_spectra_and_curves_keep_their_numbers(tmp_path):
    spectrum_figure(tmp_path, {"teacher": np.array([0.7, 0.3])})
    told = json.loads((tmp_path / "spectra.json").read_text())
    assert told["teacher"]["values"] == [0.7, 0.3] and told["teacher"]["effective_rank"] == pytest.approx(
        1.842, abs=1e-3
    )
    logged = [{"step": 1, "loss": 2.0, "weighted": {"ce": 1.5, "ot": 0.5}}, {"step": 2, "loss": 1.0, "val_auc": 0.7}]
    curves_figure(tmp_path, logged)
    told = json.loads((tmp_path / "curves.json").read_text())
    assert told["loss"] == {"ce": [[1, 1.5]], "ot": [[1, 0.5]], "total": [[1, 2.0], [2, 1.0]]}
    assert told["validation AUC"] == {"macro": [[2, 0.7]]} and "gradient norm on the student" not in told
    assert curves_figure(tmp_path / "none", []) is None and not (tmp_path / "none").exists()


def test_a_run_leaves_its_figures(checkpoints, synthetic, tmp_path):
    run = tmp_path / "run"
    distill(recipe(checkpoints, "train.max_steps=3", "objective.lambda_ot=0.5"), data=synthetic, out=run)
    names = {item.name for item in (run / "figures").iterdir()}
    assert names == {f"{name}.{kind}" for name, kind in (
        ("curves", "png"), ("curves", "json"), ("spectra", "png"), ("spectra", "json"), ("transport", "png"),
        ("transport", "npz"),
    )}  # fmt: skip
    spectra = json.loads((run / "figures" / "spectra.json").read_text())
    assert set(spectra) == {"teacher", "student before", "student after"}
    assert spectra["student before"]["values"] != spectra["student after"]["values"]
    assert len(spectra["teacher"]["values"]) == 32 and len(spectra["student after"]["values"]) == 24, "their widths"
    with np.load(run / "figures" / "transport.npz") as held:
        assert held["plan_NM"].shape == (16, 4) and held["plan_NM"].sum() == pytest.approx(1, abs=1e-4)
        assert set(held["student_lead_N"]) <= set(range(12))
    plain = tmp_path / "plain"
    distill(recipe(checkpoints, "train.max_steps=3", "objective.lambda_ot=0.5", "log.figures=false"), data=synthetic,
            out=plain)  # fmt: skip
    assert not (plain / "figures").exists()
    kept, without = weights(run), weights(plain)
    assert all(torch.equal(kept[name], without[name]) for name in kept), "looking changes nothing"


def test_balanced_terms_move_the_student_as_their_weights_say():
    found = balanced({}, {"ce": 2.0, "ot": 0.5, "rel": 40.0}, {"ce": 0.5, "ot": 0.25, "rel": 5.0, "anchor": 0.1})
    assert found == pytest.approx({"ot": 4.0 / (0.5 / 0.25), "rel": 4.0 / (40.0 / 5.0)})
    again = balanced(found, {"ce": 2.0, "ot": 0.5, "rel": 160.0}, {"ce": 0.5, "ot": 0.25, "rel": 5.0})
    assert again["ot"] == pytest.approx(2.0) and again["rel"] == pytest.approx((0.5 * 0.125) ** 0.5)
    assert balanced({}, {"ce": 2.0, "ot": 1e-9}, {"ce": 0.5, "ot": 1.0})["ot"] == MOST_SCALE
    assert balanced(found, {"ce": 0.0, "ot": 1.0}, {"ce": 0.5, "ot": 1.0}) == found, "nothing to measure against"
    terms = weighted({"ce": torch.tensor(2.0), "ot": torch.tensor(3.0)}, {"ce": 0.5, "ot": 0.25})
    assert float(rescaled(terms, {"ot": 2.0}).total) == pytest.approx(0.5 * 2 + 0.25 * 2 * 3)
    assert rescaled(terms, {}) is terms


def test_a_balanced_run_logs_the_gradients_it_asked_for_and_resumes_with_its_scales(checkpoints, synthetic, tmp_path):
    chosen = recipe(
        checkpoints,
        "objective.balance=gradnorm",
        "objective.balance_every=1",
        "objective.lambda_m=0.1",
        "objective.lambda_ot=0.2",
        "objective.lambda_r=3",
        "objective.lambda_rec=0",
        "log.gradients_every=1",
        "train.epochs=1",
        "checkpoint.every=2",
    )
    run = tmp_path / "run"
    distill(chosen, data=synthetic, out=run)
    first = rows(run)[0]["gradients"]
    assert first["ot"] == pytest.approx(0.2 * first["ce"], rel=1e-3)
    assert first["rel"] == pytest.approx(3 * first["ce"], rel=1e-3)
    last = max((run / "checkpoints").glob("step-*/position.json"))
    assert set(json.loads(last.read_text())["scales"]) == {"mhca", "ot", "rel"}
