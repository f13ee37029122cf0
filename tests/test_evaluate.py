"""Scores on disk become a report: what is chosen on validation, gates, robustness, cost, models against each other."""

from __future__ import annotations

import dataclasses
import json
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from evlecg import cli
from evlecg.comparing import compare_reports
from evlecg.cost import measure_cost
from evlecg.data.store import Prepared
from evlecg.data.tasks import label_samples
from evlecg.disturbed import DISTURBANCES, DisturbedPages, check_disturbances, chosen_disturbances
from evlecg.errors import EvlecgError
from evlecg.evaluate import PREDICTIONS, VALIDATION, evaluate, read_scored
from evlecg.metrics import AUROC, estimate
from evlecg.models import load as models
from evlecg.models.batch import draw
from evlecg.models.score import Scorer
from evlecg.page.render import PageStyle
from evlecg.page.trace import TraceForm
from evlecg.report import Gates

N_BOOT = 20


@pytest.fixture(scope="module")
def reports(checkpoints, synthetic, tmp_path_factory) -> dict[str, Path]:
    """Two models' reports of the synthetic test split."""
    root = tmp_path_factory.mktemp("reports")
    for name in ("llava", "idefics3"):
        evaluate(str(checkpoints[name]), data=synthetic, out=root / name, n_boot=N_BOOT)
    return {name: root / name for name in ("llava", "idefics3")}


def test_thresholds_are_chosen_on_the_validation_records(reports, synthetic):
    prepared = Prepared.open(synthetic)
    folder = reports["llava"]
    test, validation = read_scored(folder), read_scored(folder, name=VALIDATION)
    assert set(test.record_ids) == {prepared.record_ids[i] for i in prepared.indices("test")}
    assert set(validation.record_ids) == {prepared.record_ids[i] for i in prepared.indices("val")}
    report = json.loads((folder / "report.json").read_text())
    assert report["metrics"]["decisions"]["youden"]["thresholds"]["chosen_on"] == validation.fingerprint
    assert report["metrics"]["auc"]["macro"]["value"] == estimate(AUROC, test, n_boot=0).headline.value
    assert {"age", "heart rate", "noise"} <= set(report["subgroups"])
    rates = report["subgroups"]["heart rate"]
    assert sum(group["labels"]["NORM"]["n"] for group in rates["groups"].values()) == 16 - rates["n_ungrouped"] > 12


def test_no_thresholds_where_none_are_asked_for_or_validation_is_what_is_scored(checkpoints, synthetic, tmp_path):
    model = str(checkpoints["llava"])
    one = evaluate(model, data=synthetic, out=tmp_path / "1", n_boot=0, thresholds_from="none", max_records=4)
    two = evaluate(model, data=synthetic, out=tmp_path / "2", n_boot=0, split="val", max_records=4)
    assert not (tmp_path / "1" / VALIDATION).exists() and not (tmp_path / "2" / VALIDATION).exists()
    assert one.all_left_out["thresholds and temperature"] == "--thresholds-from none"
    assert two.all_left_out["thresholds and temperature"] == "the split 'val' holds the validation records"
    with pytest.raises(EvlecgError, match="unknown thresholds-from 'test'"):
        evaluate(model, data=synthetic, out=tmp_path / "3", thresholds_from="test")


def test_a_drop_is_paired_on_the_same_records(checkpoints, synthetic, reports, tmp_path):
    gates = Gates(max_drop_vs=reports["idefics3"], max_drop=0.0)
    report = evaluate(str(checkpoints["llava"]), data=synthetic, out=tmp_path / "r", n_boot=N_BOOT, gates=gates,
                      thresholds_from="none", max_records=12)  # fmt: skip
    old, new = read_scored(reports["idefics3"]), read_scored(tmp_path / "r")
    place = [old.record_ids.index(record) for record in new.record_ids]
    columns = [old.labels.index(label) for label in new.labels]
    ours, theirs = (
        estimate(AUROC, dataclasses.replace(new, value_NK=value_NK), n_boot=0).headline.value
        for value_NK in (new.value_NK, old.value_NK[np.ix_(place, columns)])
    )
    assert report.gates[0].value == pytest.approx(theirs - ours)
    assert report.gates[0].met == (theirs - ours <= 0)
    assert "same 12 records" in report.gates[0].detail
    with pytest.raises(EvlecgError, match="not a report folder"):
        evaluate(
            str(checkpoints["llava"]), data=synthetic, out=tmp_path / "s", gates=Gates(max_drop_vs=tmp_path / "none")
        )
    with pytest.raises(EvlecgError, match="'AF' is not scored"):
        evaluate(str(checkpoints["llava"]), data=synthetic, out=tmp_path / "s", gates=Gates(min_label_auc={"AF": 0.5}))
    assert not (tmp_path / "s").exists()


def test_a_wording_is_chosen_on_validation_and_calibration_leaves_ranks(checkpoints, synthetic, reports, tmp_path):
    model, sentences = (
        str(checkpoints["llava"]),
        ("Does this ECG show {description}?", "Is it {description}?", "{description}?"),
    )
    chosen = evaluate(model, data=synthetic, out=tmp_path / "w", n_boot=0, wordings=sentences, calibration="blank",
                      answers={"yes": ("yes", "Yes"), "no": ("no", "No")})  # fmt: skip
    tried = chosen.provenance["question_chosen_by_validation_auroc"]
    assert list(tried) == list(sentences) and len(set(tried.values())) > 1
    best = chosen.provenance["question"]
    assert tried[best] == max(tried.values())
    validation = estimate(AUROC, read_scored(tmp_path / "w", name=VALIDATION), n_boot=0)
    assert validation.headline.value == pytest.approx(tried[best])
    assert {path.name for path in (tmp_path / "w").iterdir()} >= {PREDICTIONS} and not list(
        (tmp_path / "w").glob(".w*")
    )
    text = (tmp_path / "w" / "report.md").read_text()
    assert "calibrated on blank paper" in text and "whose probabilities add up" in text

    calibrated = evaluate(model, data=synthetic, out=tmp_path / "c", n_boot=0, calibration="blank")
    plain, other = read_scored(reports["llava"]), read_scored(tmp_path / "c")
    for label, found in estimate(AUROC, plain, n_boot=0).labels.items():
        assert calibrated.label_aucs[label].value == pytest.approx(found.value, abs=1e-6)
    logit = [np.log(scored.value_NK / (1 - scored.value_NK)) for scored in (plain, other)]
    shift_NK = logit[1] - logit[0]
    assert_allclose(shift_NK, np.broadcast_to(shift_NK[:1], shift_NK.shape), atol=1e-4)
    assert np.abs(shift_NK).min() > 1e-3
    for wrong, what in ({"wordings": ("Is it?",)}, "names no label"), (
        {"wordings": sentences[:2], "thresholds_from": "none"}, "cannot be chosen on validation"
    ):  # fmt: skip
        with pytest.raises(EvlecgError, match=what):
            evaluate(model, data=synthetic, out=tmp_path / "x", **wrong)


def test_a_gate_can_ask_for_decisions(checkpoints, synthetic, tmp_path):
    gates = Gates(min_score={"auc_hard": 0.0, "youden.f1": 1.0})
    report = evaluate(str(checkpoints["llava"]), data=synthetic, out=tmp_path / "r", n_boot=N_BOOT, gates=gates)
    assert [gate.met for gate in report.gates] == [True, False]
    assert report.gates[0].value == report.measured.decided["as_answered"].metrics["auc_hard"].headline.value
    with pytest.raises(EvlecgError, match="'hamming_loss' is not in the report"):
        evaluate(
            str(checkpoints["llava"]), data=synthetic, out=tmp_path / "s", gates=Gates(min_score={"hamming_loss": 0})
        )


def test_damaged_predictions_are_bad_input(tmp_path):
    (tmp_path / PREDICTIONS).write_text('{"record_id": "a"}\n')
    with pytest.raises(EvlecgError, match="damaged"):
        read_scored(tmp_path)


def call(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["evlecg", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    shown = capsys.readouterr()
    return stopped.value.code or 0, shown.out, shown.err


def test_a_gate_that_is_not_met_is_exit_code_3_and_the_report_is_written(
    checkpoints, synthetic, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    common = ["eval", "--dataset", str(synthetic), "--model", str(checkpoints["llava"]), "--quiet",
              "--thresholds-from", "none", "--max-records", "8"]  # fmt: skip
    code, out, _ = call(monkeypatch, capsys, *common, "--out", "a", "--min-auc", "1", "--min-label-auc", "MI=0",
                        "--junit", "gates.xml")  # fmt: skip
    assert code == 3
    assert "NOT MET: --min-auc" in out and "\nmet: --min-label-auc MI" in out
    assert json.loads(Path("a/report.json").read_text())["gates"]["met"] is False
    assert Path("a/report.html").exists()
    assert xml.parse("gates.xml").getroot().get("failures") == "1"
    code, out, _ = call(monkeypatch, capsys, *common, "--out", "b", "--max-drop-vs", "a", "--json")
    assert code == 0 and json.loads(out)["gates"]["checks"][0]["value"] == 0
    for wrong, said in (
        (["--junit", "x.xml"], "needs a gate"),
        (["--max-drop", "0.1"], "needs a gate"),
        (["--min-label-auc", "MI"], "LABEL=AUROC"),
        (["--min-auc", "90"], "between 0 and 1"),
        (["--robustness", "photos"], "did you mean 'photo'"),
        (["other"], "is not an option"),
    ):
        code, _, err = call(monkeypatch, capsys, *common, "--out", "c", *wrong)
        assert code == 2 and said in err, wrong
    assert not Path("c").exists()


def test_models_and_reports_are_compared_in_one_command(checkpoints, synthetic, reports, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(monkeypatch, capsys, "eval", "--compare", str(reports["llava"]), str(checkpoints["idefics3"]),
                        "--dataset", str(synthetic), "--out", "vs", "--quiet", "--json")  # fmt: skip
    assert code == 0
    told = json.loads(out)
    expected = [estimate(AUROC, read_scored(reports[name]), n_boot=0).headline.value for name in ("llava", "idefics3")]
    pair = told["auroc"]["pairs"][0]
    assert (pair["a"], pair["b"]) == ("llava", "idefics3")
    assert pair["overall"]["macro"]["value"] == pytest.approx(expected[0] - expected[1])
    assert {"QRS shape", "ST/T", "voltage"} <= set(pair["label_groups"])
    assert len(pair["contrasts"]) == len(pair["label_groups"]) * (len(pair["label_groups"]) - 1) / 2
    assert {test["rule"] for test in told["mcnemar"]} == {"as_answered", "youden"}
    assert json.loads(Path("vs/comparison.json").read_text()) == told
    assert Path("vs-2-idefics3/report.json").exists() and Path("vs/comparison.html").exists()
    for wrong, said in (
        (["a"], "two models or more"),
        (["a", "b"], "is to be scored"),
        (["a", "b", "--min-auc", "0.5"], "of one model"),
    ):
        code, _, err = call(monkeypatch, capsys, "eval", "--compare", *wrong)
        assert code == 2 and said in err, wrong


def test_reports_are_compared_by_record_and_not_by_order(reports, tmp_path):
    lines = (reports["llava"] / PREDICTIONS).read_text().splitlines()
    (tmp_path / "shuffled").mkdir()
    (tmp_path / "shuffled" / PREDICTIONS).write_text("\n".join(reversed(lines)))
    found = compare_reports({"a": reports["llava"], "b": tmp_path / "shuffled"}, out=tmp_path / "out", n_boot=N_BOOT)
    assert found.auroc.pairs[0].headline.value == 0 and found.auroc.pairs[0].headline.ci95 == (0, 0)


@pytest.fixture(scope="module")
def scorer(checkpoints, synthetic) -> Scorer:
    loaded = models.load(models.inspect(str(checkpoints["llava"])), dtype="float32")
    return Scorer(loaded, Prepared.open(synthetic), PageStyle())


def test_disturbed_pages_are_what_the_disturbance_says(scorer, synthetic):
    prepared, size_px, style = Prepared.open(synthetic), scorer.view, PageStyle()
    clean = draw(prepared, 0, size_px, style).pixels
    pages = {name: draw(DisturbedPages(prepared, name, style, size_px), 0, size_px, style).pixels
             for name in DISTURBANCES}  # fmt: skip
    assert all(pixels.shape == clean.shape and (pixels != clean).any() for pixels in pages.values())
    assert_array_equal(pages["layout"], draw(prepared, 0, size_px, dataclasses.replace(style, layout="6x2")).pixels)
    again = DisturbedPages(prepared, "photo", style, size_px)
    assert_array_equal(draw(again, 0, size_px, style).pixels, pages["photo"])
    assert again.patient_ids == prepared.patient_ids and again.record(0).labels == prepared.record(0).labels
    with pytest.raises(EvlecgError, match="cannot be done to a picture"):
        DisturbedPages(again, "noise", style, size_px).record(0)
    assert chosen_disturbances("photo, noise,photo") == ("photo", "noise")


def test_a_model_that_reads_signals_gets_disturbed_signals(synthetic):
    prepared, style = Prepared.open(synthetic), PageStyle()
    form = TraceForm(100.0, 1000, "channels")
    clean = prepared.record(0)
    noisy = DisturbedPages(prepared, "noise", style, form).record(0)
    lossy = DisturbedPages(prepared, "lead-loss", style, form).record(0)
    assert not noisy.image and noisy.signal_mV.shape == clean.signal_mV.shape
    assert 0.005 < np.abs(noisy.signal_mV - clean.signal_mV).max() < 1
    assert (lossy.signal_mV == 0).all(axis=1).sum() == 3 + (clean.signal_mV == 0).all(axis=1).sum()
    check_disturbances("signal", ("noise", "lead-loss"))
    check_disturbances("image", ("photo",))
    with pytest.raises(EvlecgError, match="photo happens to pages"):
        check_disturbances("signal", ("noise", "photo"))


def test_robustness_is_the_difference_of_the_same_records(checkpoints, synthetic, tmp_path):
    report = evaluate(str(checkpoints["llava"]), data=synthetic, out=tmp_path / "r", n_boot=N_BOOT,
                      thresholds_from="none", robustness=("lead-loss", "photo"))  # fmt: skip
    found = report.robustness.comparison
    assert [(pair.a, pair.b) for pair in found.pairs] == [("lead-loss", "clean"), ("photo", "clean")]
    assert found.models["clean"].headline.value == report.macro.value
    for pair in found.pairs:
        assert_allclose(pair.headline.value, found.models[pair.a].headline.value - report.macro.value)
    assert any(pair.headline.value != 0 for pair in found.pairs)


def test_cost_counts_what_one_record_takes(scorer, synthetic):
    samples = label_samples(scorer.prepared, range(6), scorer.prepared.label_names, "Does this show {description}?")
    cost = measure_cost(scorer.loaded, scorer, samples)
    model = scorer.loaded.model
    assert cost.parameters == sum(weight.numel() for weight in model.parameters())
    assert 0 < cost.latency_ms <= cost.latency_p95_ms and cost.n_records == 3
    assert cost.peak_memory_bytes > 4 * cost.parameters
    fewer = [dataclasses.replace(sample, questions=sample.questions[:1]) for sample in samples]
    one = measure_cost(scorer.loaded, scorer, fewer)
    assert one.n_questions == 1 and 0 < one.flops < cost.flops
    assert 1.5 * one.flops < cost.flops, "unpacked, every question reads the page again"
    # two operations for each weight of the decoder's linear layers and each token, at the least
    decoder = [module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
               and "language_model" in name]  # fmt: skip
    assert one.flops > 2 * sum(layer.weight.numel() for layer in decoder) * 10
