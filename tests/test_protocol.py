"""ECGBench: quirks of the published scorer, equality with it, the strict reading, files of predictions, verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evlecg.data.dialogues import choices_of, split_options
from evlecg.data.readers_llava import BENCH_STEMS
from evlecg.errors import EvlecgError
from evlecg.metrics import ACCURACY, AUC_HARD, F1, HAMMING_LOSS, compare, estimate
from evlecg.protocol import (
    PARSERS,
    SUBSETS,
    Item,
    Reply,
    ReplyLog,
    join,
    published,
    read_replies,
    read_verdicts,
    score,
    subset_of,
)  # fmt: skip
from evlecg.protocol.judged import scores_of
from evlecg.protocol.scores import as_published
from tests.protocol_cases import GOLDEN, cases, items_of, letter_question, option_question, write_rows

BIGEMINAL = "bigeminal pattern (unknown origin, supraventricular, or ventricular)"


def item(subset: str, answer: str, prompt: str = "?", id: str = "1", patient: str = "p") -> Item:
    prompt = prompt.removeprefix("<image>\n")
    return Item(
        id, subset, f"{subset}/{id}", patient, prompt, answer, choices_of(prompt, answer), split_options(answer)
    )


def read(parser: str, subset: str, text: str, prompt: str = "?", answer: str = "") -> tuple[str, ...]:
    asked = item(subset, answer, prompt)
    return PARSERS[parser].read(SUBSETS[subset], asked, text, asked.prompt).names


def scored(pairs: list[tuple[Item, str]], parser: str = "pulse", **more: Any):
    replies = [Reply(asked.id, text, subset=asked.subset) for asked, text in pairs]
    return score(join([asked for asked, _ in pairs], replies), parser=parser, n_boot=0, **more)


# the published reading


@pytest.mark.parametrize(
    ("subset", "text", "names"),
    [
        ("ptb-test", "NORM, MI", "NORM MI"),
        ("ptb-test", "ABNORMAL", "NORM"),
        ("ptb-test", "No MI.", "MI"),
        ("ptb-test", "norm", ""),
        ("ptb-test", "NORM. Answer: CD", "NORM CD"),  # only CODE-15 looks for the mark
        ("cpsc-test", "AFIB, II-AVB", "AF I-AVB"),
        ("cpsc-test", "STEMI", "STE"),
        ("code15-test", "STTC", "ST"),
        ("code15-test", "ST-segment depression", "ST"),
        ("code15-test", "SBP", "SB"),
        ("code15-test", "ABNORMAL", "ABNORMAL"),
        ("code15-test", "NORM and ABNORMAL, AF", "ABNORMAL AF"),
        ("code15-test", "NORM, AF", "NORM AF"),
        ("code15-test", "Answer: AF. Answer: NORM", "NORM"),
        ("code15-test", "AF. Answer:", ""),
        ("code15-test", "AF. answer: NORM", "NORM AF"),
    ],
)
def test_labels_are_substrings(subset, text, names):
    assert read("pulse", subset, text) == tuple(names.split())


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("C", "C"),
        ("C.", "C"),
        ("D. yes, B. no", "B"),  # the first of the alphabet
        ("as seen on the ECG.", "G"),
        ("The correct option is F", "F"),
        ("The correct option is f", None),
        ("The correct option is f. Answer: A", None),
        ("The correct option is ", None),  # the published scorer stops here with an exception
        ("Answer: Bradycardia", "B"),
        ("Answer: DB", "B"),
        ("Answer: one", None),
        ("answer: B", None),
        ("C) sinus rhythm", None),
        ("C\n", None),
        ("I. or J.", None),
        ("", None),
    ],
)
def test_letters_are_found_anywhere(text, letter):
    assert read("pulse", "csn-test-no-cot", text) == (() if letter is None else (letter,))


def test_unread_letters_are_drawn_as_published():
    import random

    pairs = [(item("mmmu-ecg", "A", id=str(n)), "?") for n in range(50)]
    pairs += [(item("csn-test-no-cot", "A. x", id=str(n)), "?") for n in range(50)]
    drawn = random.Random(42)
    expected = [drawn.choice("ABCD") for _ in range(50)] + [drawn.choice("ABCDEFGH") for _ in range(50)]
    scores = scored(list(reversed(pairs)))
    reads = scores.reads  # MMMU-ECG first, whatever comes first in the file
    assert [named.names[0] for named in reads] == expected and all(named.failed for named in reads)
    assert scores.subsets["mmmu-ecg"].notes[-1] == "50 answers are random letters"
    other = scored(list(reversed(pairs)), seed=7)
    assert [named.names for named in other.reads] != [named.names for named in reads]
    strict = scored(pairs, parser="strict")
    assert all(named.names == () and not named.correct for named in strict.reads)


def test_options_are_lower_cased_on_one_side_only():
    question = option_question(("lead I", "none", BIGEMINAL))
    assert read("pulse", "ecgqa-test", "None.", question) == ("none",)
    assert read("pulse", "ecgqa-test", "lead I", question) == ()  # it cannot be answered
    assert read("pulse", "ecgqa-test", BIGEMINAL, question) == (
        "bigeminal pattern (unknown origin", "supraventricular", "or ventricular)",
    )  # fmt: skip
    scores = scored([(item("ecgqa-test", BIGEMINAL, question), BIGEMINAL)])
    assert scores.subsets["ecgqa-test"].headline.value == 0
    assert scored([(item("ecgqa-test", BIGEMINAL, question), BIGEMINAL)], "strict").reads[0].correct


def test_a_row_without_prompt_is_read_with_the_one_before():
    items = [item("ecgqa-test", "none", option_question(("none", "short QT")), id="1"),
             item("ecgqa-test", "yes", option_question(("yes", "no")), id="2")]  # fmt: skip
    prompts = [(items[0].prompt, None), (None, None), (None, items[1].prompt)]
    right = []
    for first, second in prompts:
        replies = [Reply("1", "none", first), Reply("2", "yes", second)]
        right.append([named.correct for named in score(join(items, replies), n_boot=0).reads])
    assert right == [[True, False], [True, True], [True, True]]


def test_a_label_that_no_answer_has_is_dropped_and_one_that_all_have_ends_it():
    pairs = [(item("ptb-test", answer, id=str(n)), text) for n, (answer, text) in enumerate(
        [("NORM", "NORM"), ("MI", "MI, HYP"), ("MI", "NORM"), ("NORM", "NORM, HYP")])]  # fmt: skip
    subset = scored(pairs).subsets["ptb-test"]
    assert subset.scored.labels == ("MI", "NORM")
    assert subset.headline.value == pytest.approx((0.75 + 0.75) / 2)
    assert subset.estimates["hamming_loss"].headline.value == pytest.approx(2 / 8)  # HYP costs nothing
    assert subset.classes["HYP"] == {"right": 0, "named": 2, "both": 0}
    assert "no right answer has STTC, CD, HYP" in subset.notes[-1]
    everywhere = [(item("ptb-test", f"{a.answer}, CD", id=a.id), text) for a, text in pairs]
    subset = scored(everywhere).subsets["ptb-test"]
    assert subset.headline.value is None and subset.headline.ci95 is None
    assert "cannot score" in subset.headline.undefined_because
    assert scored(everywhere, "strict").subsets["ptb-test"].headline.value == pytest.approx(0.75)  # without CD


def test_with_one_label_f1_is_that_of_its_absence():
    named, right = np.array([[1], [0], [0], [0], [1]]), np.array([[1], [1], [0], [0], [0]])
    assert as_published(named, right)["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("title", sorted(cases()))
def test_numbers_are_those_of_the_published_scorer(title, tmp_path):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))["numbers"][title]
    case = cases()[title]
    joined = join(items_of(case), read_replies(write_rows(case, tmp_path)))
    assert not joined.missing and not joined.extra
    scores = score(joined, parser="pulse", n_boot=0)
    assert set(scores.subsets) == set(golden)
    for name, numbers in golden.items():
        subset = scores.subsets[name]
        got = {key: subset.estimates[key].headline.value for key in numbers}
        assert got == numbers, name  # to the last bit
        if "auc_hard" in numbers and None not in numbers.values() and len(subset.scored.labels) > 1:
            for metric in (AUC_HARD, F1, HAMMING_LOSS):
                ours = estimate(metric, subset.scored, n_boot=0).headline.value
                assert ours == pytest.approx(numbers[metric.name], abs=1e-12)


# the strict reading


@pytest.mark.parametrize(
    ("subset", "text", "names"),
    [
        ("ptb-test", "ABNORMAL", ""),
        ("ptb-test", "STTC, HYP", "STTC HYP"),
        ("ptb-test", "sttc and hyp.", "STTC HYP"),
        ("ptb-test", "The ECG shows MI, with CD.", "MI CD"),
        ("ptb-test", "MI, no HYP, not CD", "MI"),
        ("ptb-test", "HYPERTROPHY", ""),
        ("ptb-test", "I first thought of MI.\nAnswer: CD", "CD"),
        ("ptb-test", "Answer: MI. On reflection the answer is NORM.", "NORM"),
        ("ptb-test", "MI. Answer:", "MI"),
        ("cpsc-test", "III-AVB and non-AF", ""),
        ("cpsc-test", "I-AVB; STE", "I-AVB STE"),
        ("code15-test", "ST-segment depression, ST/T changes, ST depression", ""),
        ("code15-test", "ST, AF", "ST AF"),
        ("code15-test", "Normal. NORM", "NORM"),
        ("code15-test", "1dAVb(1st degree av block)", "1dAVb"),
    ],
)
def test_strict_labels_are_words(subset, text, names):
    assert sorted(read("strict", subset, text)) == sorted(names.split())


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("C", "C"),
        ("(C).", "C"),
        ("**C**", "C"),
        ("C. finding c", "C"),
        ("C) finding c\nbecause of the P waves", "C"),
        ("as seen on the ECG.", None),
        ("A. no\nB. yes", None),  # two are named
        ("A. no\nB. yes\nThe answer is B.", "B"),
        ("Option A is wrong. The correct option is D", "D"),
        ("Answer: A. Wait, the answer is (D).", "D"),
        ("Answer: Bradycardia", None),
        ("The answer is A normal tracing", None),
        ("Finding D.", "D"),
        ("Answer: finding d", "D"),
        ("finding", None),
        ("K", None),
        ("The answer is K.", None),
        ("", None),
    ],
)
def test_strict_letters_are_stated(text, letter):
    question = letter_question(tuple("ABCDEFGH"))
    assert read("strict", "csn-test-no-cot", text, question, "C. finding c") == (() if letter is None else (letter,))


def test_strict_options_are_words_in_any_case():
    options = ("lead I", "lead II", "none", "QT", "short QT", BIGEMINAL)
    question = option_question(options)

    def named(text: str) -> tuple[str, ...]:
        return read("strict", "ecgqa-test", text, question, "none")

    assert named("LEAD II, short qt") == ("lead II", "short QT")
    assert named("Lead I") == ("lead I",)
    assert named(f"It is a {BIGEMINAL}.") == (BIGEMINAL,)
    assert named("nonetheless") == ()
    assert named("lead I? Answer: none") == ("none",)


@pytest.mark.parametrize(("answer", "letter"), [("B. AF", "B"), ("B", "B"), ("(B) AF", "B"), ("finding b", "B")])
def test_right_letters_in_every_form(answer, letter):
    asked = item("csn-test-no-cot", answer, letter_question(tuple("ABC")))
    assert PARSERS["strict"].truth(SUBSETS["csn-test-no-cot"], asked) == (letter,)


def test_failures_are_counted_and_wrong_under_strict():
    pairs = [(item("csn-test-no-cot", "A. x", letter_question(tuple("ABCDEFGH")), id=str(n), patient=str(n)), text)
             for n, text in enumerate(["A", "on the ECG.", "B"])]  # fmt: skip
    asked = [entry for entry, _ in pairs] + [item("csn-test-no-cot", "A. x", id="unanswered", patient="9")]
    joined = join(asked, [Reply(entry.id, text) for entry, text in pairs])
    strict = score(joined, parser="strict", n_boot=50)
    subset = strict.subsets["csn-test-no-cot"]
    assert (len(subset.reads), subset.n_failed, subset.failure_rate) == (4, 2, 0.5)
    assert subset.headline.value == 0.25 and subset.headline.n_patients == 4 and subset.headline.ci95 is not None
    assert strict.missing == ("unanswered",)
    pulse = score(joined, parser="pulse", n_boot=0).subsets["csn-test-no-cot"]
    assert (len(pulse.reads), pulse.n_failed, pulse.n_asked) == (3, 0, 4)
    assert pulse.headline.value == pytest.approx(1 / 3)
    told = strict.to_dict()
    assert told["n_failed"] == 2 and told["missing"] == {"n": 1, "ids": ["unanswered"]}
    assert told["subsets"]["csn-test-no-cot"]["classes"]["A"] == {"right": 4, "named": 1, "both": 1}
    json.dumps(told, allow_nan=False)


def test_two_models_can_be_compared_on_the_same_answers():
    asked = [item("csn-test-no-cot", "A. x", id=str(n), patient=str(n)) for n in range(40)]
    one = scored([(entry, "A") for entry in asked], "strict").subsets["csn-test-no-cot"].scored
    two = scored([(entry, "AB"[int(entry.id) % 2]) for entry in asked], "strict").subsets["csn-test-no-cot"].scored
    assert compare(ACCURACY, {"one": one, "two": two}, n_boot=100).pairs[0].headline.value == pytest.approx(0.5)


# the benchmark as data


def test_subsets_are_those_that_are_read():
    assert set(SUBSETS) == BENCH_STEMS


def test_published_results_stand_under_their_own_metric_only():
    assert published("ptb-test", "auc_hard")["PULSE-7B"] == 0.824
    assert published("ptb-test", "auroc") == {} and published("csn-test-no-cot", "auc_hard") == {}
    assert published("csn-test-no-cot", "accuracy")["EVL-ECG 2B"] == 0.897
    assert "GEM" not in published("mmmu-ecg", "accuracy") and "GEM" in published("ptb-test", "auc_hard")
    assert published("arena", None) == {}
    scores = scored([(item("csn-test-no-cot", "A. x"), "A")])
    table = {title: rows for title, _, rows in scores.tables()}["Beside published results, in percent"]
    assert table[0] == ("this report (parser: pulse)", "100.0") and ("PULSE-7B (published)", "85.2") in table
    assert "1 of the 1611 published questions" in scores.subsets["csn-test-no-cot"].notes[0]


def test_other_data_are_scored_by_what_their_prompts_offer():
    letters = item("quiz", "B. finding b", letter_question(tuple("ABC")))
    options = item("single-choose", "none", option_question(("none", "short QT")))
    assert subset_of("quiz", [letters]).task == "letter"
    assert subset_of("single-choose", [options]).task == "options"
    assert subset_of("talk", [item("talk", "Because.")]).task == "open"
    scores = scored([(letters, "Answer: B."), (options, "None")], "strict")
    assert [subset.headline.value for subset in scores.subsets.values()] == [1, 1]


# files of predictions

ROWS = [
    {"question_id": "a-1", "prompt": "?", "text": "NORM", "model_id": "m", "metadata": {}},
    {"id": 2, "response": "MI"},
]


def forms(folder: Path) -> dict[str, Path]:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    written = {
        "lines": ("lines.jsonl", lines),
        "no last line end": ("cut.jsonl", lines.rstrip("\n")),
        "windows": ("windows.jsonl", "\ufeff" + lines.replace("\n", "\r\n")),
        "list": ("list.json", json.dumps(ROWS, indent=1)),
        "lines in .json": ("lines.json", lines),
        "object of texts": ("texts.json", json.dumps({"a-1": "NORM", "2": "MI"})),
        "object of rows": ("rows.json", json.dumps({"a-1": {"text": "NORM"}, "2": {"response": "MI"}})),
    }
    made = {}
    for form, (name, text) in written.items():
        (folder / name).write_bytes(text.encode())
        made[form] = folder / name
    (folder / "out" / "ptb-test").mkdir(parents=True)
    (folder / "out" / "ptb-test" / "step-final.jsonl").write_text(lines)
    return made | {"folder": folder / "out"}


def test_predictions_in_every_form(tmp_path):
    asked = [item("ptb-test", "MI", id="2"), item("ptb-test", "NORM", id="a-1")]  # another order
    for form, path in forms(tmp_path).items():
        joined = join(asked, read_replies(path))
        assert [(entry.id, reply.text) for entry, reply in joined.pairs] == [("a-1", "NORM"), ("2", "MI")], form
        assert all(named.correct for named in score(joined, n_boot=0).reads)


def test_dialogues_of_the_arena_have_an_answer_a_turn(tmp_path):
    rows = [
        {
            "question_id": "arena-1",
            "golden_convs": [],
            "predict_convs": [{"question": "?", "answer": "x"}, {"answer": "y"}],
        },
        {"id": "arena-2", "response": [{"response": "v"}, {"response": "w"}]},
    ]
    path = tmp_path / "arena.json"
    path.write_text(json.dumps(rows))
    found = [(reply.id, reply.text, reply.subset) for reply in read_replies(path)]
    assert found == [
        ("arena-1", "x", "arena"),
        ("arena-1#2", "y", "arena"),
        ("arena-2", "v", "arena"),
        ("arena-2#2", "w", "arena"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"id": 1, "text": "NORM"}\n{"id": 2, "te', "line 2"),
        ('{"text": "NORM"}\n', "no id"),
        ('{"id": 1}\n', "no answer"),
        ('{"id": 1, "text": null}\n', "no answer"),
        ('["NORM"]\n', "no JSON object"),
        ('{"id": "1", "text": "NORM"}\n{"id": 1, "text": "MI"}\n', "two answers to the question '1'"),
    ],
)
def test_predictions_that_cannot_be_joined_are_errors(tmp_path, text, said):
    path = tmp_path / "predictions.jsonl"
    path.write_text(text)
    with pytest.raises(EvlecgError, match=said):
        join([item("ptb-test", "NORM")], read_replies(path))


def test_missing_and_extra_ids_are_named_and_subsets_kept_apart(tmp_path):
    asked = [item("ptb-test", "NORM", id="1"), item("cpsc-test", "AF", id="1"), item("cpsc-test", "AF", id="2")]
    rows = [
        {"id": 1, "text": "AF", "subset": "cpsc-test"},
        {"id": 9, "text": "AF"},
        {"id": 3, "text": "A", "subset": "mmmu-ecg"},
    ]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    joined = join(asked, read_replies(tmp_path / "some.jsonl"))
    assert [entry.subset for entry, _ in joined.pairs] == ["cpsc-test"]
    assert [(entry.subset, entry.id) for entry in joined.missing] == [("ptb-test", "1"), ("cpsc-test", "2")]
    assert joined.extra == ("9", "3")
    scores = score(joined, n_boot=0)
    assert "- 2 questions without an answer: 1, 2." in scores.summary()
    assert "- 2 answers to nothing asked here: 9, 3." in scores.summary()
    with pytest.raises(EvlecgError, match="several subsets"):
        join(asked, [Reply("1", "AF")])


def test_the_subset_of_a_file_is_the_longest_that_its_path_names(tmp_path):
    for name in ("ptb-test-report/final.jsonl", "run/ptb-test_step.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"id": 1, "text": "x"}\n')
    assert [reply.subset for reply in read_replies(tmp_path)] == ["ptb-test-report", "ptb-test"]


def test_a_log_keeps_whole_lines_and_drops_a_half_one(tmp_path):
    path = tmp_path / "predictions.jsonl"
    one, two = item("ptb-test", "NORM", id="1"), item("ptb-test", "MI", id="2")
    with ReplyLog(path) as log:
        log.add(one, "NORM \u2028 é\n", model="m", n_tokens=3)
        assert json.loads(path.read_text()) == {  # on disk before the log is closed
            "question_id": "1", "prompt": "?", "text": "NORM \u2028 é\n", "model_id": "m",
            "metadata": {"subset": "ptb-test", "record_id": "ptb-test/1", "n_tokens": 3},
        }  # fmt: skip
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"question_id": "2", "text": "M')
    with ReplyLog(path) as log:
        assert one in log and two not in log
        log.add(two, "MI", model="m")
    assert path.read_bytes().startswith(whole) and path.read_bytes().count(b"\n") == 2
    path.write_bytes(whole + whole)
    with pytest.raises(EvlecgError, match="two answers"):
        ReplyLog(path)


# verdicts

REPORTS = [item("ptb-test-report", "SR.", id=f"ptb-report-{n}", patient=str(n)) for n in (101, 102, 103)]


@pytest.mark.parametrize("form", ["folder", "lines", "object", "texts"])
def test_verdicts_are_means_times_ten(tmp_path, form):
    verdicts = {
        "101": {"Diagnosis": {"Score": 8, "Explanation": "x"}, "Waveform": {"Score": "7"}, "Rhythm": {"Score": 10}},
        "102": {"Diagnosis": {"Score": 4}, "Waveform": {"Score": 5}, "Rhythm": {"Score": 0}},
        "103": {"Diagnosis": {"Score": "n/a"}},
        "999": {"Diagnosis": {"Score": 4}},
    }
    path = tmp_path / "judged.json"
    if form == "folder":
        path.mkdir()
        for name, verdict in verdicts.items():
            (path / f"{name}.json").write_text(json.dumps(verdict))
    elif form == "object":
        path.write_text(json.dumps(verdicts))
    else:
        rows = [{"id": f"ptb-report-{name}", "verdict": f"Here: {json.dumps(verdict)}!" if form == "texts" else verdict}
                for name, verdict in verdicts.items()]  # fmt: skip
        path.write_text("\n".join(json.dumps(row) for row in rows))
    found = read_verdicts(path, REPORTS)
    assert [name.rsplit("-")[-1] for name in found.malformed + found.extra] == ["103", "999"]
    replies = [Reply(entry.id, "Sinus rhythm.") for entry in REPORTS]
    scores = score(join(REPORTS, replies), verdicts=found, n_boot=50)
    subset = scores.subsets["ptb-test-report"]
    by_report = [(8 + 7 + 10) / 3 * 10, (4 + 5 + 0) / 3 * 10]
    assert subset.headline.value == pytest.approx(np.mean(by_report)) and subset.headline.n == 2
    assert subset.headline.ci95 == pytest.approx(tuple(sorted(by_report)))
    assert {name: said["mean"] for name, said in subset.aspects.items()} == {
        "diagnosis": 60,
        "waveform": 60,
        "rhythm": 50,
    }
    assert scores.tables()[0][2][0][2].startswith("56.7 (")
    assert score(join(REPORTS, replies), n_boot=0).subsets["ptb-test-report"].headline is None


def test_verdicts_that_fit_several_answers_or_come_twice_are_errors(tmp_path):
    path = tmp_path / "judged.jsonl"
    path.write_text('{"id": "101", "Diagnosis": 8}\n{"id": "ptb-report-101", "Diagnosis": 8}\n')
    with pytest.raises(EvlecgError, match="two verdicts"):
        read_verdicts(path, REPORTS)
    path.write_text('{"id": "0", "Diagnosis": 8}\n')
    with pytest.raises(EvlecgError, match="fits several"):
        read_verdicts(path, [item("ptb-test-report", "SR.", id=f"{n}_hr-0") for n in (1, 2)])


@pytest.mark.parametrize(
    ("verdict", "scores"),
    [
        ({"Accuracy": {"score": 7.5}}, {"accuracy": 7.5}),
        ({"id": 3, "judge": "someone", "Accuracy": 7}, {"accuracy": 7}),
        ({"Accuracy": {"Score": 11}}, {}),
        ({"Accuracy": {"Score": True}}, {}),
        ({"Accuracy": {"Explanation": "no score"}}, {}),
        ("no JSON {", {}),
        ([7], {}),
    ],
)
def test_scores_of_a_verdict(verdict, scores):
    assert scores_of(verdict) == scores
