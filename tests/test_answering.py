"""ECGBench from its files to a report: answers made here or elsewhere, crashes, dialogues, what the user sees."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evlecg.answering import TextProtocol
from evlecg.data.store import Prepared
from evlecg.errors import EvlecgError
from evlecg.evaluate import evaluate
from evlecg.files import partial_folder
from evlecg.models.generate import Generated, Generator
from evlecg.prepare import prepare
from tests.protocol_cases import label_question, letter_question, option_question
from tests.test_cli import run
from tests.test_dialogues import encoded, human
from tests.test_readers_ecgbench import row, write_subset

ABCD = letter_question(tuple("ABCD"))
ITEMS: dict[str, list[tuple[str, str, Any]]] = {  # subset -> id, question, right answer
    "ptb-test": [("ptb-test-1", label_question(("NORM", "MI")), "NORM"), ("ptb-test-2", "<image>\nWhich?", "MI")],
    "cpsc-test": [("1", label_question(("AF", "STE")), "AF")],
    "code15-test": [("1", label_question(("AF", "ST")), "ABNORMAL")],
    "csn-test-no-cot": [("7", ABCD, "B. finding b"), ("8", ABCD, "A. finding a")],
    "g12-test-no-cot": [("7", ABCD, "C. finding c")],
    "mmmu-ecg": [("1", ABCD, "D")],
    "ecgqa-test": [("q-1", option_question(("sinus rhythm", "none")), "sinus rhythm")],
    "ptb-test-report": [("ptb-report-12", "<image>\nPlease write a report.", "SR.")],
}  # fmt: skip
N_QUESTIONS = sum(len(items) for items in ITEMS.values()) + 2  # and the two turns of the arena


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ECGBench in miniature, prepared."""
    root, seed = tmp_path_factory.mktemp("bench"), 0
    for subset, items in ITEMS.items():
        rows = []
        for item_id, question, answer in items:
            rows.append(row(item_id, f"{subset}/{item_id}.png", encoded(seed=seed), human(question, answer)))
            seed += 1
        write_subset(root / "raw", subset, rows)
    talk = [{"question": "Rhythm?", "answer": "Sinus."}, {"question": "Next step?", "answer": "None."}]
    write_subset(root / "raw", "arena", [row("arena-1", "arena/1.png", encoded(seed=seed), talk)])
    prepare("ecgbench", source=root / "raw", out=root / "prepared")
    return root / "prepared"


@pytest.fixture
def spoken(monkeypatch) -> list[list[Any]]:
    """The batches that a model was asked, in order; it repeats the question's last word."""
    batches: list[list[Any]] = []

    def generate(self: Generator, asked: Any) -> list[Generated]:
        batches.append(list(asked))
        return [Generated(f"said {turn.question.split()[-1]}", 2, True) for _, turn in asked]

    monkeypatch.setattr(Generator, "generate", generate)
    return batches


def rows_of(folder: Path, name: str = "predictions.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def ask(model: Path, bench: Path, out: Path, **more: Any):
    text = TextProtocol(**{key: more.pop(key) for key in list(more) if key in TextProtocol.__dataclass_fields__})
    return evaluate(str(model), data=bench, out=out, protocol=None, text=text, n_boot=20, batch_size=4, **more)


def test_a_tiny_model_goes_through_the_whole_benchmark(checkpoints, bench, tmp_path):
    report = ask(checkpoints["idefics3"], bench, tmp_path / "report", max_new_tokens=5)
    told = json.loads((tmp_path / "report" / "report.json").read_text())
    assert told == report.to_dict() and told["score_source"] == "text"
    assert set(told["metrics"]["text"]["subsets"]) == {*ITEMS, "arena"}
    assert told["metrics"]["text"]["n"] == N_QUESTIONS == len(rows_of(tmp_path / "report"))
    assert told["provenance"]["generation"] == {
        "temperature": 0, "max_new_tokens": 5, "batched": "several lengths, padded on the left",
    }  # fmt: skip
    assert told["metrics"]["auc"]["labels"] == {}
    for line in rows_of(tmp_path / "report"):
        assert 1 <= line["metadata"]["n_tokens"] <= 5
    parsed = rows_of(tmp_path / "report", "parsed.jsonl")
    assert {(line["subset"], line["question_id"]) for line in parsed} >= {("mmmu-ecg", "1"), ("cpsc-test", "1")}
    page = (tmp_path / "report" / "report.md").read_text()
    assert "| PULSE-7B (published) |" in page and "parser: pulse" in page and "No AUC" not in page


def test_a_dialogue_goes_on_from_the_models_own_answer(checkpoints, bench, tmp_path, spoken):
    ask(checkpoints["idefics3"], bench, tmp_path / "report")
    turns = {turn.question: turn for batch in spoken for _, turn in batch}
    assert turns["Next step?"].history == (("Rhythm?", "said Rhythm?"),)
    said = {line["question_id"]: line["text"] for line in rows_of(tmp_path / "report")}
    assert (said["arena-1"], said["arena-1#2"]) == ("said Rhythm?", "said step?")


KILLED = """
import os, signal, sys
from pathlib import Path
from evlecg.answering import TextProtocol
from evlecg.evaluate import evaluate
from evlecg.models.generate import Generated, Generator
def generate(self, asked, calls=[]):
    calls.append(asked)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return [Generated("said " + turn.question.split()[-1], 2, True) for _, turn in asked]
Generator.generate = generate
evaluate(sys.argv[1], data=Path(sys.argv[2]), out=Path(sys.argv[3]), protocol=None, n_boot=20, batch_size=4)
"""


def test_a_killed_run_goes_on_and_asks_nothing_twice(checkpoints, bench, tmp_path, spoken):
    out, whole = tmp_path / "report", tmp_path / "whole"
    command = [sys.executable, "-c", KILLED, str(checkpoints["idefics3"]), str(bench), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = partial_folder(out) / "predictions.jsonl"
    assert not out.exists() and len(left.read_text().splitlines()) == 8
    kept = left.read_bytes()
    left.write_bytes(kept + b'{"question_id": "x", "te')  # the disk got half of the next line
    ask(checkpoints["idefics3"], bench, out)
    assert sum(len(batch) for batch in spoken) == N_QUESTIONS - 8
    assert (out / "predictions.jsonl").read_bytes().startswith(kept) and not partial_folder(out).exists()
    spoken.clear()
    ask(checkpoints["idefics3"], bench, whole)
    assert sum(len(batch) for batch in spoken) == N_QUESTIONS

    def said(folder: Path) -> dict[tuple[str, str], str]:
        return {(line["metadata"]["subset"], line["question_id"]): line["text"] for line in rows_of(folder)}

    assert said(out) == said(whole) and len(rows_of(out)) == len(said(out)) == N_QUESTIONS


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt(), EvlecgError("a page is torn")])
def test_other_crashes_keep_the_answers_too_and_other_work_starts_anew(
    checkpoints, bench, tmp_path, spoken, monkeypatch, error
):
    inner, out = Generator.generate, tmp_path / "report"

    def failing(self: Generator, asked: Any) -> list[Generated]:
        if len(spoken) == 2:
            raise error
        return inner(self, asked)

    monkeypatch.setattr(Generator, "generate", failing)
    with pytest.raises(type(error)):
        ask(checkpoints["idefics3"], bench, out)
    assert len(rows_of(partial_folder(out))) == 8
    monkeypatch.setattr(Generator, "generate", inner)
    spoken.clear()
    different = isinstance(error, KeyboardInterrupt)
    ask(checkpoints["idefics3"], bench, out, max_new_tokens=9 if different else 1024)
    assert sum(len(batch) for batch in spoken) == (N_QUESTIONS if different else N_QUESTIONS - 8)


def test_answers_of_a_file_are_scored_without_a_model(bench, tmp_path, monkeypatch, capsys):
    said = {"ptb-test-1": "NORM", "ptb-test-2": "NORM", "q-1": "Sinus rhythm", "nobody": "x", "arena-1": "Sinus."}
    path = tmp_path / "other.jsonl"
    rows = [{"id": key, "response": text, "model_id": "theirs"} for key, text in said.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    verdicts = {"1": {"Accuracy": {"Score": 5}}, "12": {"Diagnosis": {"Score": 5}}}
    (tmp_path / "judged.json").write_text(json.dumps(verdicts))
    monkeypatch.chdir(tmp_path)
    arguments = ["eval", "--dataset", str(bench), "--predictions", "other.jsonl", "--judged", "judged.json"]
    arguments += ["--out", "report"]
    code, out, err = run(*arguments, "--parser", "strict", "-q", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0, err
    assert "theirs on ecgbench, test" in out and "PTB-XL Super" in out
    told = json.loads((tmp_path / "report" / "report.json").read_text())
    text = told["metrics"]["text"]
    assert told["model"] == "theirs" and text["parser"] == "strict"
    assert text["extra"] == {"n": 1, "ids": ["nobody"]} and text["missing"]["n"] == N_QUESTIONS - 4
    assert text["subsets"]["ecgqa-test"]["value"] == 1 and text["subsets"]["arena"]["value"] == 50
    assert text["subsets"]["arena"]["judge"] == {"accuracy": {"mean": 50, "n": 1}}
    assert text["subsets"]["ptb-test"]["value"] == 0.5 and text["subsets"]["csn-test-no-cot"]["failure_rate"] == 1
    again = evaluate("unused", data=bench, out=tmp_path / "again", protocol=None, n_boot=20,
                     text=TextProtocol("strict", tmp_path / "report" / "predictions.jsonl"))  # fmt: skip
    assert again.text is not None and again.text.to_dict()["subsets"]["ptb-test"]["value"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--protocol", "ecgbnech", "--model", "builtin:student"], "unknown protocol"),
        (["--parser", "puls", "--model", "builtin:student"], "unknown parser"),
        (["--protocol", "likelihood", "--predictions", "other.jsonl"], "not of likelihoods"),
        (["--predictions", "nothing.jsonl"], "no such file of predictions"),
        (["--predictions", "other.jsonl"], "none of 1 predictions is on one of the"),
        (["--judged", "nothing.json", "--model", "builtin:student"], "no such file of verdicts"),
    ],
)
def test_mistakes_are_told_in_one_line(bench, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    Path("other.jsonl").write_text('{"id": "nobody", "text": "x"}\n')
    code, _, err = run("eval", "--dataset", str(bench), *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and said in err and "Traceback" not in err
    assert not Path("reports").exists()


def test_labels_are_scored_by_likelihood_unless_words_are_asked_for(checkpoints, synthetic, tmp_path):
    report = evaluate(str(checkpoints["llava"]), data=synthetic, out=tmp_path / "likelihood", protocol=None, n_boot=20,
                      max_records=4)  # fmt: skip
    assert report.text is None and report.labels
    with pytest.raises(EvlecgError, match="no question of the dataset's own"):
        evaluate(str(checkpoints["llava"]), data=synthetic, out=tmp_path / "words", protocol="ecgbench")


def test_options_are_chosen_by_their_likelihood(checkpoints, bench, tmp_path):
    report = ask(checkpoints["idefics3"], bench, tmp_path / "letters", choose_by="letter")
    lines = rows_of(tmp_path / "letters")
    assert {line["metadata"]["subset"] for line in lines} == {"csn-test-no-cot", "g12-test-no-cot", "mmmu-ecg"}
    for line in lines:
        p = line["metadata"]["p"]
        assert sum(p.values()) == pytest.approx(1) and len(p) == 4
        assert line["text"] == max(p, key=p.__getitem__)[0] in "ABCD"
    assert all(not one.n_failed for one in report.text.subsets.values()), "letters are read as they are"
    assert {"1 question with options that have no letters", "7 questions without options"} <= set(report.left_out)
    assert report.provenance["answers"]["options"] == "letter"
    both = ask(checkpoints["idefics3"], bench, tmp_path / "text", choose_by="text", calibration="blank")
    assert "ecgqa-test" in both.text.subsets and both.provenance["answers"]["calibration"] == "blank"


def test_options_are_made_of_labels_where_the_data_have_no_questions(checkpoints, synthetic, tmp_path):
    report = ask(checkpoints["llava"], synthetic, tmp_path / "r", choose_by="text", max_records=6, parser="strict")
    (subset,) = report.text.subsets.values()
    assert subset.subset.name == "multiple_choice" and subset.n_asked == len(rows_of(tmp_path / "r")) > 0
    assert subset.n_failed == 0 and 0 <= subset.headline.value <= 1


def test_answers_in_words_have_gates_disturbed_pages_and_a_cost(
    checkpoints, bench, tmp_path, spoken, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    common = ["eval", "--dataset", str(bench), "--model", str(checkpoints["idefics3"]), "-q", "--overwrite"]
    gates = ["--min-score", "ptb-test=0.4", "--min-score", "ptb-test.accuracy=0.9", "--junit", "gates.xml"]
    code, out, _ = run(*common, *gates, "--robustness", "photo", "--cost", "--out", "r",
                       monkeypatch=monkeypatch, capsys=capsys)  # fmt: skip
    assert code == 3 and "NOT MET: --min-score ptb-test.accuracy: ptb-test.accuracy is 0.000" in out
    told = json.loads(Path("r/report.json").read_text())
    checks = {check["name"]: check["met"] for check in told["gates"]["checks"]}
    assert checks == {"--min-score ptb-test": True, "--min-score ptb-test.accuracy": False}
    assert Path("gates.xml").read_text().count("<failure") == 1
    assert len(rows_of(Path("r"), "predictions_photo.jsonl")) == N_QUESTIONS
    found = told["text_robustness"]["CSN"]
    assert found["metric"] == "accuracy" and found["pairs"][0]["a"] == "photo"
    (difference,) = found["pairs"][0]["overall"].values()
    assert difference["value"] == 0, "this model says the same to every page"
    assert told["cost"]["n_questions"] == 1 and told["cost"]["latency_ms"] > 0
    assert "Under disturbed pages: CSN" in Path("r/report.md").read_text()
    for arguments, said in (
        (["--min-score", "ptb=1"], "'ptb' is not in the report"), (["--min-auc", "0.5"], "have no AUROC"),
        (["--question", "Is it {description}?"], "their own words"),
    ):  # fmt: skip
        code, _, err = run(*common, *arguments, "--out", "s", monkeypatch=monkeypatch, capsys=capsys)
        assert code == 2 and said in err and not Path("s").exists()


def test_answers_in_words_may_not_fall_behind_an_older_report(
    checkpoints, bench, tmp_path, spoken, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    rights = {"ptb-test": ["NORM", "MI"], "csn-test-no-cot": ["B", "A"], "ecgqa-test": ["sinus rhythm"]}
    said = {
        subset: dict(zip([item[0] for item in ITEMS[subset]], texts, strict=True)) for subset, texts in rights.items()
    }
    for name, worse in (("older", {}), ("now", {"csn-test-no-cot": {"7": "C"}})):
        rows = [{"question_id": item, "text": worse.get(subset, {}).get(item, text), "subset": subset}
                for subset, texts in said.items() for item, text in texts.items()]  # fmt: skip
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["eval", "--dataset", str(bench), "-q", "--overwrite"]
    code, _, err = run(
        *common, "--predictions", "older.jsonl", "--out", "older", monkeypatch=monkeypatch, capsys=capsys
    )
    assert code == 0, err
    code, _, err = run(*common, "--predictions", "now.jsonl", "--max-drop-vs", "older", "--junit", "gates.xml",
                         "--out", "now", monkeypatch=monkeypatch, capsys=capsys)  # fmt: skip
    assert code == 3, err
    checks = {check["name"]: check for check in json.loads(Path("now/report.json").read_text())["gates"]["checks"]}
    assert {name: check["met"] for name, check in checks.items()} == {
        "--max-drop-vs ptb-test.auc_hard": True,
        "--max-drop-vs csn-test-no-cot.accuracy": False,
        "--max-drop-vs ecgqa-test.accuracy": True,
    }
    dropped = checks["--max-drop-vs csn-test-no-cot.accuracy"]
    assert dropped["value"] == 0.5 and "+0.500 lower" in dropped["detail"] and "same 2 questions" in dropped["detail"]
    assert Path("gates.xml").read_text().count("<failure") == 1
    code, out, err = run("eval", "--compare", "older", "now", "-q", "--out", "both", "--json",
                         monkeypatch=monkeypatch, capsys=capsys)  # fmt: skip
    assert code == 0, err
    told = json.loads(out)["answers"]
    assert set(told) == {"PTB-XL Super", "CSN", "ECG-QA"} and told["CSN"]["metric"] == "accuracy"
    (difference,) = told["CSN"]["pairs"][0]["overall"].values()
    assert difference["value"] == 0.5 and told["CSN"]["mcnemar"][0]["n_only_a"] == 1
    assert told["CSN"]["mcnemar"][0]["p_exact_holm"] == 1.0
    assert "| CSN | older − now | accuracy | +0.500" in Path("both/comparison.md").read_text()
    model = ["--model", str(checkpoints["idefics3"]), "--max-drop-vs"]
    for arguments, told in (
        (["--predictions", "now.jsonl", "--parser", "strict", "--max-drop-vs", "older"], "--parser pulse"),
        ([*model, "nowhere"], "not a report folder with answers in words"),
    ):  # fmt: skip
        code, _, err = run(*common, *arguments, "--out", "s", monkeypatch=monkeypatch, capsys=capsys)
        assert code == 2 and told in err and not Path("s").exists()
    assert not spoken, "an older report is read before a model is asked anything"
    kept = Path("older/parsed.jsonl").read_text()
    other = {**json.loads(kept.splitlines()[0]), "subset": "other"}
    report = json.loads(Path("older/report.json").read_text())
    subsets = report["metrics"]["text"]["subsets"]
    Path("older/report.json").write_text(
        json.dumps(
            {
                **report,
                "metrics": {"text": {"parser": "pulse", "subsets": {**subsets, "other": subsets["csn-test-no-cot"]}}},
            }
        )
    )
    Path("fewer.jsonl").write_text("".join(f"{line}\n" for line in Path("now.jsonl").read_text().splitlines()[:4]))
    for older, arguments, told in (
        (kept.replace('"right": ["NORM"]', '"right": ["MI"]'), ["--predictions", "now.jsonl"],
         "disagree on the right answer of ptb-test ptb-test-1"),
        (kept + json.dumps(other) + "\n", model[:2], "answers questions of other, of which none is asked now"),
        (kept, ["--predictions", "fewer.jsonl"], "has answers to ecgqa-test, this one has none"),
    ):  # fmt: skip
        Path("older/parsed.jsonl").write_text(older)
        code, _, err = run(*common, *arguments, "--max-drop-vs", "older", "--out", "s",
                           monkeypatch=monkeypatch, capsys=capsys)  # fmt: skip
        assert code == 2 and told in err, err
    assert not spoken, "an older report that cannot be compared with is found out before a model is asked anything"


def test_ids_that_are_not_unique_are_told_apart(bench):
    from evlecg.answering import _asked

    prepared = Prepared.open(bench)
    twice = [*range(len(prepared)), prepared.record_ids.index("mmmu-ecg/1")]
    keys = [(entry.item.subset, entry.item.id) for entry in _asked(prepared, twice)]
    assert (
        ("mmmu-ecg", "mmmu-ecg/1#1") in keys and ("csn-test-no-cot", "7") in keys and ("g12-test-no-cot", "7") in keys
    )
