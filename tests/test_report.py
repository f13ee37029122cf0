"""The report says what was measured, in keys that do not move, first things first."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose
from sklearn.metrics import roc_auc_score

from evlecg.errors import EvlecgError
from evlecg.metrics import (
    AUC_HARD,
    AUROC,
    BRIER,
    Scored,
    compare,
    delong_test,
    estimate,
    fit_temperature,
    holm,
    thresholds_for_youden,
)
from evlecg.report import (
    Cost,
    Gates,
    Report,
    Robustness,
    check_gates,
    compare_models,
    comparison_dict,
    comparison_markdown,
    comparison_table,
    environment,
    measure,
    on_shared,
    summary,
    to_html,
    to_markdown,
    worst_records,
    write_comparison,
    write_junit,
    write_report,
)

LABELS = ("NORM", "MI", "STTC", "HYP")
N_BOOT = 60


def make_scored(seed: int = 0, *, n: int = 100, skill: float = 1.5, labels: tuple[str, ...] = LABELS) -> Scored:
    """Truths from one seed and scores of another; two records a patient, MI never present, HYP once."""
    truths, scores = np.random.default_rng(7), np.random.default_rng(seed)
    truth_NK = (truths.random((n, len(LABELS))) < (0.4, 0, 0.3, 0)).astype(float)
    truth_NK[5, 3] = 1
    truth_NK[3, 0] = np.nan
    logit_NK = scores.normal(size=truth_NK.shape) + skill * (2 * np.nan_to_num(truth_NK) - 1) * (1, 1, 0.2, 1)
    columns = [LABELS.index(label) for label in labels]
    score_NK = 1 / (1 + np.exp(-logit_NK))
    return Scored(score_NK[:, columns], truth_NK[:, columns], [f"p{i // 2}" for i in range(n)], labels,
                  [f"r{i}" for i in range(n)])  # fmt: skip


def validation_of(scored: Scored) -> Scored:
    """Other records of the same model."""
    return make_scored(11, labels=scored.labels)


def make(scored: Scored | None = None, *, validation: bool = True, **changes: object) -> Report:
    scored = scored or make_scored()
    sex_N = ["F" if i % 3 else "M" for i in range(len(scored.patient_ids))]
    measured = measure(
        scored, validation_of(scored) if validation else None, groups={"sex": [None, *sex_N[1:]]},
        label_groups={"ST/T": ("STTC",), "voltage": ("HYP",)}, no_validation="--thresholds-from none", n_boot=N_BOOT,
        seed=7,
    )  # fmt: skip
    values: dict = {
        "model": "runs/latest",
        "dataset": "synthetic",
        "split": "test",
        "n_records": 100,
        "n_patients": 50,
        "measured": measured,
        "left_out": {"3 records": "lead V1 is flat"},
        "descriptions": {"STTC": "an ST or T wave change"},
        "provenance": {"recipe": "quickstart", "environment": {"torch": "2.9", "cpu": {"count": 2}}, "note": "a|b\nc"},
    }
    return Report(**(values | changes))


def section(markdown: str, title: str) -> list[str]:
    """Lines under a heading that starts with `title`."""
    body = next(part for part in re.split(r"\n##+ ", markdown) if part.startswith(title))
    return [line for line in body.split("\n")[1:] if line]


def rows(markdown: str, title: str) -> dict[str, list[str]]:
    """First cell -> the others of the last table under a heading."""
    lines = [line for line in section(markdown, title) if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0]: row[1:] for row in cells if row[0] != "---"}


def test_json_holds_the_fixed_keys_and_the_numbers_of_the_metrics(tmp_path: Path) -> None:
    scored = make_scored()
    write_report(make(scored), tmp_path / "new" / "folder")
    report = json.loads((tmp_path / "new" / "folder" / "report.json").read_text(encoding="utf-8"))
    assert {key: report[key] for key in ("model", "dataset", "split", "n_records", "n_patients")} == {
        "model": "runs/latest", "dataset": "synthetic", "split": "test", "n_records": 100, "n_patients": 50,
    }  # fmt: skip
    expected = estimate(AUROC, scored, n_boot=N_BOOT, seed=7)
    auc = report["metrics"]["auc"]
    assert auc["macro"] == {"value": expected.headline.value, "ci95": list(expected.headline.ci95)}
    assert list(auc["labels"]) == list(LABELS)
    assert auc["labels"]["NORM"]["value"] == pytest.approx(
        roc_auc_score(np.delete(scored.truth_NK[:, 0], 3), np.delete(scored.value_NK[:, 0], 3))
    )
    assert auc["labels"]["NORM"]["n_pos"] + auc["labels"]["NORM"]["n_neg"] == 99
    assert auc["labels"]["MI"] == {"value": None, "ci95": None, "n_pos": 0, "n_neg": 100}
    assert auc["bootstrap"] == {"unit": "patient", "resamples": N_BOOT, "seed": 7}
    assert report["left_out"] == {"3 records": "lead V1 is flat", "label MI": "all 100 records are negative"}
    assert report["provenance"]["environment"]["torch"] == "2.9"
    assert report["gates"] is None and report["cost"] is None and report["robustness"] is None
    assert set(report["metrics"]["auroc"]["overall"]) == {"macro", "weighted"}
    assert set(report["subgroups"]["sex"]["groups"]) == {"F", "M"} and report["subgroups"]["sex"]["n_ungrouped"] == 1
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "report.html", "report.json", "report.md",
    ]  # fmt: skip


def test_thresholds_and_temperature_come_from_validation() -> None:
    scored = make_scored()
    validation = validation_of(scored)
    metrics = make(scored).to_dict()["metrics"]
    decisions = thresholds_for_youden(validation).decide(scored)
    expected = estimate(AUC_HARD, decisions, n_boot=0).headline.value
    assert metrics["decisions"]["youden"]["auc_hard"]["overall"]["macro"]["value"] == expected
    assert set(metrics["decisions"]) == {"as_answered", "youden", "f1", "specificity_0.9"}
    assert metrics["decisions"]["youden"]["thresholds"]["values"]["MI"] is None, "validation has no positive"
    answered = scored.replaced(value_NK=(scored.value_NK >= 0.5).astype(float))
    assert metrics["decisions"]["as_answered"]["hamming_loss"]["overall"]["micro"]["value"] == pytest.approx(
        np.mean((answered.value_NK != answered.truth_NK)[answered.assessed_NK])
    )
    calibration = metrics["calibration"]
    fitted = fit_temperature(validation)
    assert calibration["temperature"]["temperature"] == fitted.temperature
    assert calibration["brier_after_temperature"]["overall"]["macro"]["value"] == pytest.approx(
        estimate(BRIER, fitted.apply(scored), n_boot=0).headline.value
    )
    without = make(scored, validation=False)
    assert set(without.to_dict()["metrics"]["decisions"]) == {"as_answered"}
    assert without.to_dict()["metrics"]["calibration"]["temperature"] is None
    assert without.all_left_out["thresholds and temperature"] == "--thresholds-from none"
    with pytest.raises(EvlecgError, match="very data"):
        measure(scored, scored, n_boot=0)


def test_markdown_answers_the_first_questions_first() -> None:
    report = make()
    markdown = to_markdown(report)
    top = markdown.split("\n## ")[0]
    macro = report.macro
    assert f"**Macro AUROC {macro.value:.3f} ({macro.ci95[0]:.3f}–{macro.ci95[1]:.3f})**" in top
    assert "3 of 4 labels" in top
    assert "100 records of 50 patients" in top
    assert f"Weakest label: STTC {report.label_aucs['STTC'].value:.3f}" in top
    assert "better than chance: STTC." in top
    assert "Without an interval, hence no evidence by themselves: HYP." in top
    titles = [part.split("\n")[0] for part in markdown.split("\n## ")[1:]]
    assert titles[0] == "Labels, weakest first" and titles[-3:] == [
        "Left out", "How the numbers are formed", "Provenance",
    ]  # fmt: skip
    missed = make(gates=check_gates(Gates(min_auc=1.0), report.measured.auroc))
    assert "Gates not met: --min-auc" in summary(missed)[1]
    assert to_markdown(missed).index("## Gates") < to_markdown(missed).index("## Labels")


def test_a_group_that_is_worse_is_named_at_the_top() -> None:
    scored = make_scored(n=400, skill=3)
    late_N = np.arange(400) >= 200
    value_NK = scored.value_NK.copy()
    value_NK[late_N] = np.random.default_rng(1).random(value_NK[late_N].shape)
    measured = measure(
        scored.replaced(value_NK=value_NK), groups={"device": ["new" if late else "old" for late in late_N]},
        group_orders={"device": ("old", "new", "absent")}, n_boot=200,
    )  # fmt: skip
    assert list(measured.subgroups["device"].groups) == ["old", "new", "absent"]
    told = summary(make(measured=measured))[-1]
    assert told.startswith("Worse in: new (device) -0.") and told.endswith("against old.")
    more_N = np.arange(400) >= 150  # the larger group is the worse one
    value_NK[more_N] = np.random.default_rng(1).random(value_NK[more_N].shape)
    measured = measure(scored.replaced(value_NK=value_NK), n_boot=200,
                       groups={"device": ["new" if more else "old" for more in more_N]})  # fmt: skip
    assert summary(make(measured=measured))[-1].startswith("Worse in: new (device), as old is better by +0.")
    assert "Records of the training split" in summary(make(measured=measured, split="all"))[-1]
    alike = measure(scored, groups={"device": ["new" if late else "old" for late in late_N]}, n_boot=200)
    assert summary(make(measured=alike))[-1].startswith("No group of patients is shown to be worse")
    one = measure(scored, groups={"device": ["old"] * 400}, n_boot=0)
    assert "not known" in summary(make(measured=one))[-1]


def test_tables_hold_every_number_weakest_first() -> None:
    report = make()
    found = rows(to_markdown(report), "Labels")
    assert list(found)[1:2] == ["STTC"] and list(found)[-1] == "MI"
    weakest = report.label_aucs["STTC"]
    assert found["STTC"][:3] == ["an ST or T wave change", f"{weakest.value:.3f}",
                                 f"{weakest.ci95[0]:.3f}–{weakest.ci95[1]:.3f}"]  # fmt: skip
    assert found["MI"][1:3] == ["–", "–"] and found["MI"][4:6] == ["0", "100"]
    assert found["HYP"][2] == "–", "one positive patient: no interval"
    groups = rows(to_markdown(report), "By what labels hang on")
    assert groups["ST/T"][0] == f"{weakest.value:.3f}" and groups["ST/T"][-1] == "STTC"
    sexes = rows(to_markdown(report), "sex")
    assert sexes["F"][3] == "the reference" and int(sexes["F"][1]) + int(sexes["M"][1]) == 99
    assert "Unknown for 1 record." in to_markdown(report)


def test_markdown_says_what_was_left_out_how_it_was_counted_and_from_what() -> None:
    markdown = to_markdown(make())
    assert section(markdown, "Left out") == ["- 3 records: lead V1 is flat", "- label MI: all 100 records are negative"]
    formulas = "\n".join(section(markdown, "How"))
    assert f"{N_BOOT} resamples of the patients" in formulas
    assert "seed 7" in formulas
    assert "product of its tokens' probabilities" in formulas
    for word in ("AUROC of a label", "average precision", "auc hard", "hamming loss", "Brier", "ECE", "temperature",
                 "DeLong"):  # fmt: skip
        assert word in formulas, word
    assert "generated text" in to_markdown(make(score_source="text"))
    assert section(markdown, "Provenance")[2:] == [
        "| recipe | quickstart |",
        "| environment.torch | 2.9 |",
        "| environment.cpu.count | 2 |",
        "| note | a\\|b c |",
    ]


def test_report_without_any_auc_says_so() -> None:
    scored = Scored(np.zeros((3, 1)), np.zeros((3, 1)), ["a", "b", "c"], ("AF",), ["a", "b", "c"])
    report = make(measured=measure(scored, n_boot=5), left_out={})
    assert "**No AUROC**: among 100 records of 50 patients" in to_markdown(report)
    assert report.to_dict()["metrics"]["auc"]["macro"] == {"value": None, "ci95": None}
    assert comparison_table([("x", report)]).rows == [("x", "–", "–")]
    assert "No AUROC" in to_html(report)


def test_numbers_survive_json_to_the_last_bit() -> None:
    report = make()
    macro = json.loads(report.to_json())["metrics"]["auc"]["macro"]
    assert (macro["value"], tuple(macro["ci95"])) == (report.macro.value, report.macro.ci95)


def test_nan_never_reaches_the_disk(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_report(make(provenance={"loss": float("nan")}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_place_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EvlecgError, match="cannot be written"):
        write_report(make(), tmp_path / "file")


def test_an_unknown_source_of_scores_is_refused() -> None:
    with pytest.raises(ValueError, match="source"):
        make(score_source="oracle")


class _Page(HTMLParser):
    """Tags, addresses and ids of a page; unclosed tags fail."""

    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_from_elsewhere_and_escapes_what_it_is_given() -> None:
    scored = make_scored()
    worst = [dataclasses.replace(record, page_png=b"PNG") for record in worst_records(scored, 2)]
    html = to_html(make(scored, model="<script>alert(1)</script>", worst=tuple(worst)))
    page = _Page()
    page.feed(html)
    assert page.open == []
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert len(page.addresses) == 3 + 3 + 2, "ROC and calibration of three labels, two pages"
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert "url(" not in html and "@import" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert html.index("macro AUROC") < html.index("Labels, weakest first") < html.index("Provenance")


def test_worst_records_are_wrong_with_most_confidence() -> None:
    truth_NK = np.array([[1.0, 0], [1, 0], [0, np.nan], [0, 0]])
    value_NK = np.array([[0.2, 0.9], [0.7, 0.1], [0.95, 0.99], [0.5, 0.4]])
    found = worst_records(Scored(value_NK, truth_NK, list("abcd"), ("AF", "MI"), ["r0", "r1", "r2", "r3"]), 5)
    assert [(record.record_id, record.label, record.truth) for record in found] == [
        ("r2", "AF", False), ("r0", "MI", False),
    ]  # fmt: skip
    assert found[1].score == 0.9 and found[1].others == {"AF": 0.2}
    assert found[0].others == {}, "a label that was not assessed is not wrong"


def test_gates_compare_the_value_and_state_the_interval(tmp_path: Path) -> None:
    old, new = make_scored(0, skill=2), make_scored(1, skill=1)
    auroc = estimate(AUROC, new, n_boot=N_BOOT)
    drop = compare(AUROC, {"old": old, "new": new}, n_boot=N_BOOT).pairs[0].headline
    assert drop.value > 0.02
    asked = Gates(auroc.headline.value, {"MI": 0.1, "NORM": 0.1}, Path("reports/last"), max_drop=drop.value - 1e-6)
    drops = {"macro AUROC": drop}
    at_bound, undefined, label, dropped = check_gates(asked, auroc, drops)
    assert at_bound.met and not check_gates(Gates(min_auc=auroc.headline.value + 1e-9), auroc)[0].met
    assert not undefined.met and "all 100 records are negative" in undefined.detail
    assert label.met and label.name == "--min-label-auc NORM"
    assert not dropped.met and dropped.ci95 == drop.ci95 and "100 records" in dropped.detail
    assert f"{drop.ci95[0]:+.3f} to {drop.ci95[1]:+.3f}" in dropped.detail
    assert check_gates(dataclasses.replace(asked, max_drop=drop.value), auroc, drops)[-1].met
    report = make(gates=(at_bound, undefined))
    assert report.to_dict()["gates"]["met"] is False and not report.gates_met
    assert [check["met"] for check in report.to_dict()["gates"]["checks"]] == [True, False]
    write_junit(tmp_path / "gates.xml", report.gates, 'a "model" & more')
    suite = xml.parse(tmp_path / "gates.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("name")) == ("2", "1", 'a "model" & more')
    assert [case.find("failure") is None for case in suite] == [True, False]
    assert suite[1].find("failure").get("message") == undefined.detail


def test_gates_that_make_no_sense_are_refused() -> None:
    for bad in ({"min_auc": 90.0}, {"min_label_auc": {"AF": -0.1}}, {"max_drop": -0.1}):
        with pytest.raises(EvlecgError):
            Gates(**bad)


def test_published_results_stand_beside_auc_hard_alone() -> None:
    labels = ("NORM", "MI", "STTC", "CD", "HYP")
    rng = np.random.default_rng(0)
    truth_NK = (rng.random((60, 5)) < 0.5).astype(float)
    scored = Scored(rng.random((60, 5)), truth_NK, [str(i) for i in range(60)], labels, [str(i) for i in range(60)])
    measured = measure(scored, n_boot=0)
    markdown = to_markdown(make(measured=measured, dataset="ptbxl"))
    found = rows(markdown, "Beside published results")
    assert found["PULSE-7B, arXiv 2410.19008"][0] == "82.4"
    ours = measured.decided["as_answered"].metrics["auc_hard"].headline.value
    assert found["runs/latest"][0] == f"{100 * ours:.1f}"
    assert "82.4" not in "\n".join(section(markdown, "Labels"))
    for other in (make(measured=measured, dataset="ludb"), make(dataset="ptbxl")):
        assert "published" not in to_markdown(other), "another dataset, other labels"


def test_robustness_and_cost_have_their_tables() -> None:
    clean, noisy = make_scored(0, skill=2), make_scored(1, skill=0.5)
    found = compare(AUROC, {"clean": clean, "noise": noisy}, baseline="clean", n_boot=N_BOOT)
    cost = Cost(1_234_567, 2_000_000, 12.34, 45.6, 3 * 2**20, 30, 5, "CPU, 1 threads", "one at a time")
    report = make(robustness=Robustness(found, {"noise": "0.3 mV"}), cost=cost)
    told = rows(to_markdown(report), "Under disturbed pages")
    assert told["noise"][1].startswith(f"{found.pairs[0].headline.value:+.3f} (") and told["noise"][-1] == "0.3 mV"
    told = rows(to_markdown(report), "Cost")
    assert told["parameters"] == ["1,234,567"] and told["peak memory"] == ["3 MiB"]
    assert report.to_dict()["robustness"]["pairs"][0]["overall"]["macro"]["value"] == found.pairs[0].headline.value


def test_comparison_joins_labels_by_name() -> None:
    both = [("teacher", make()), ("student", make(make_scored(5, labels=("STTC", "NORM"))))]
    columns, cells = comparison_table(both)
    assert columns == ("model", "macro AUC (95% interval)", "NORM", "MI", "STTC", "HYP")
    student = both[1][1].label_aucs
    assert cells[1][2:] == (f"{student['NORM'].value:.3f}", "–", f"{student['STTC'].value:.3f}", "–")
    assert comparison_markdown(both).split("\n")[3].startswith("| student | ")
    models = comparison_dict(both)["models"]
    assert [model["name"] for model in models] == ["teacher", "student"]
    assert models[1]["metrics"]["auc"]["labels"]["NORM"]["value"] == student["NORM"].value
    assert "provenance" not in models[0]


def test_models_are_compared_on_what_all_have_and_the_rest_is_told() -> None:
    a = make_scored(0)
    b = make_scored(1, labels=("STTC", "NORM"))
    order = np.random.default_rng(0).permutation(90)
    b = Scored(b.value_NK[order], b.truth_NK[order], [b.patient_ids[i] for i in order], b.labels,
               [b.record_ids[i] for i in order])  # fmt: skip
    shared, notes = on_shared({"a": a, "b": b})
    assert shared["a"].labels == shared["b"].labels == ("NORM", "STTC")
    assert list(shared["b"].record_ids) == [f"r{i}" for i in range(90)]
    assert_allclose(shared["b"].value_NK, make_scored(1).value_NK[:90][:, [0, 2]])
    assert_allclose(shared["a"].truth_NK, shared["b"].truth_NK)
    assert notes == ["a: 10 records and 2 labels that not all have are left out."]
    with pytest.raises(EvlecgError, match="share no label"):
        on_shared({"a": make_scored(labels=("NORM",)), "b": make_scored(labels=("STTC",))})
    stranger = Scored(a.value_NK, a.truth_NK, a.patient_ids, a.labels, [f"s{i}" for i in range(100)])
    with pytest.raises(EvlecgError, match="share no record"):
        on_shared({"a": a, "b": stranger})


def test_the_falsification_test_tells_groups_contrasts_and_exact_answers(tmp_path: Path) -> None:
    models = {"distilled": make_scored(0, skill=2.5), "SFT-only": make_scored(1, skill=1), "teacher": make_scored(2)}
    validation = {name: validation_of(scored) for name, scored in models.items()}
    groups = {"QRS shape": ("NORM",), "ST/T": ("STTC",)}
    found = compare_models(models, validation, label_groups=groups, n_boot=N_BOOT)
    pair = found.auroc.pair("distilled", "SFT-only")
    gain = pair.label_groups["QRS shape"].value
    assert gain == pytest.approx(pair.labels["NORM"].value)
    assert pair.contrasts["QRS shape", "ST/T"].value == pytest.approx(gain - pair.labels["STTC"].value)
    assert [(rule, test.a, test.b) for rule, test in found.tests if rule == "youden"] == [
        ("youden", "distilled", "SFT-only"), ("youden", "distilled", "teacher"), ("youden", "SFT-only", "teacher"),
    ]  # fmt: skip
    write_comparison(found, tmp_path, "a < b")
    told = json.loads((tmp_path / "comparison.json").read_text())
    assert told["auroc"]["pairs"][0]["overall"]["macro"]["p_holm"] == pair.headline.p_holm
    assert {test["rule"] for test in told["mcnemar"]} == {"as_answered", "youden"}
    markdown = (tmp_path / "comparison.md").read_text()
    assert f"| distilled − SFT-only | macro | {pair.headline.value:+.3f} (" in markdown
    assert "QRS shape more than ST/T" in markdown
    tests = [delong_test({a: models[a], b: models[b]}, label)
             for a, b in combinations(models, 2) for label in found.auroc.models[a].labels]  # fmt: skip
    assert [test["p"] for test in told["delong"]] == [test.p for test in tests]
    assert [test["p_holm"] for test in told["delong"]] == holm([test.p for test in tests])
    exact = [test.p_exact for rule, test in found.tests if rule == "youden"]
    assert [test["p_exact_holm"] for test in told["mcnemar"] if test["rule"] == "youden"] == holm(exact)
    assert f"{tests[0].ci95[0]:+.3f} to {tests[0].ci95[1]:+.3f}" in "\n".join(section(markdown, "Label by label"))
    html = (tmp_path / "comparison.html").read_text()
    page = _Page()
    page.feed(html)
    assert page.open == [] and page.addresses == [] and "<h1>a &lt; b</h1>" in html
    assert {rule for rule, _ in compare_models(models, n_boot=0).tests} == {"as_answered"}


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_environment_names_versions_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    found = environment()
    assert found["git"] is None  # of the working folder; the package's own is another matter
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / ".git").exists():
        revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True).stdout
        assert found["evlecg_git"].removesuffix("-dirty") == revision.strip()
    assert found["python"] == sys.version.split()[0]
    assert found["numpy"] == np.__version__
    assert found["cpu_count"] >= 1
    json.dumps(found, allow_nan=False)

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *identity, *arguments], capture_output=True, text=True, check=True).stdout.strip()

    git("init")
    (tmp_path / "x").write_text("1")
    git("add", "x")
    git("commit", "-m", "x")
    git("tag", "-a", "v1", "-m", "x")  # the hash is wanted all the same
    assert environment()["git"] == git("rev-parse", "HEAD")
    (tmp_path / "x").write_text("2")
    assert environment()["git"] == git("rev-parse", "HEAD") + "-dirty"


def test_versions_are_read_without_importing() -> None:
    code = (
        "import sys; from evlecg.report import environment; e = environment(); "
        "assert e['torch'] and e['transformers'] and e['accelerate']; "
        "assert not {'torch', 'transformers', 'accelerate'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[1])
