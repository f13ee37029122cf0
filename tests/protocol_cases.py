"""Questions and answers that meet every quirk of the published ECGBench scorer, and what that scorer says of them.

The numbers of the published scorer are kept in tests/golden/ecgbench.json. They were made by

    python -m tests.protocol_cases evaluate_ecgbench.py > tests/golden/ecgbench.json

where evaluate_ecgbench.py is the file of that name in the public repository AIMedLab/PULSE (folder evaluation, commit
a439b6c). As published it does not parse (a comment lacks its mark); that one line is mended, paths are put in, and
nothing else is touched.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import random
import re
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evlecg.data.dialogues import choices_of, split_options
from evlecg.protocol import SUBSETS, Item

GOLDEN = Path(__file__).parent / "golden" / "ecgbench.json"

LABEL_TEXTS = (
    "{names}", "{names}.", "The ECG shows {names}.", "ABNORMAL", "Abnormal ECG", "NORM", "norm", "normal sinus rhythm",
    "", "ST-segment depression in V4", "ST-T changes, STTC", "No MI, no HYP.", "Answer: {names}",
    "First Answer: NORM. Answer:",
    "NORM? Rather not. Answer: {names}", "AFIB with RVR", "II-AVB and III-AVB", "SBP 120",
    "LBBB, RBBB", "HYPERTROPHY, CDE",
    "STDev of {names}", "1dAVb(1st degree av block)", "NORM and ABNORMAL", "Answer: ABNORMAL, {names}", "NORM, {names}",
    "answer: {names}", "{names}\nAnswer: none of these", "It is STEMI.",
)  # fmt: skip
LETTER_TEXTS = (
    "{letter}", "{letter}.", "{letter}. {body}", "{letter}: {body}", "({letter})", "The answer is {letter}",
    "Answer: {letter}", "Answer: Bradycardia", "Answer: none", "answer: {letter}", "The correct option is {letter}",
    "no", "",
    "The correct option is lower case {letter}", "It is {body}, as seen on the ECG.",
    "G. is wrong. {letter}. is right.", "{letter}\n", "The correct option is {letter}. Answer: A", "Option {letter}",
    "Answer: \n{letter}) {body}",
    "A or H.",
    "Answer: Atrial flutter", "Answer: one of them", "I. do not know",
)  # fmt: skip
OPTION_TEXTS = (
    "{names}", "{names}.", "{upper}", "Answer: {names}", "The ECG shows {names}", "none", "", "all of them: {options}",
    "I cannot tell.", "yes", "sinus rhythm and lead I",
)  # fmt: skip
OPTIONS = (
    ("sinus rhythm", "sinus bradycardia", "none"),
    ("lead I", "lead II", "lead III", "lead aVR", "lead V1"),
    ("bigeminal pattern (unknown origin, supraventricular, or ventricular)", "atrial fibrillation", "none"),
    ("yes", "no", "not sure"),
    ("Prolonged QT", "short QT", "none"),
)


@dataclass
class Case:
    """One run of the scorer: items and rows of predictions by subset."""

    items: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def label_question(names: tuple[str, ...]) -> str:
    return f"<image>\nWhich of {', '.join(names)} does this ECG show?"


def letter_question(letters: tuple[str, ...]) -> str:
    return "<image>\nWhat is seen?\n" + "\n".join(f"{letter}. finding {letter.lower()}" for letter in letters)


def option_question(options: tuple[str, ...]) -> str:
    return (f"<image>\nSelect all that apply.\nQuestion: What is seen? Options: {', '.join(options)} "
            "Only answer based on the given Options without any explanation.")  # fmt: skip


@functools.cache
def cases() -> dict[str, Case]:
    """Name -> case; the same in every run."""
    made = {"all": Case(), "other keys": Case(), "every answer has it": Case(), "one label": Case(), "few": Case()}
    rng = random.Random(20241)
    for name, size in (("ptb-test", 300), ("cpsc-test", 300), ("code15-test", 300)):
        add_labels(made["all"], name, size, rng)
        add_labels(made["other keys"], name, 120, rng, text_key="response", id_key="id", id_type=int)
        add_labels(made["few"], name, 7, rng)
    add_labels(made["every answer has it"], "ptb-test", 60, rng, always=("CD",))
    add_labels(made["every answer has it"], "code15-test", 60, rng, always=("SB",))
    add_labels(made["one label"], "ptb-test", 60, rng, only=("MI",))
    add_labels(made["one label"], "cpsc-test", 60, rng, only=("PVC",))
    add_labels(made["one label"], "code15-test", 60, rng, only=("AF",), always=("AF",))
    for name in ("mmmu-ecg", "csn-test-no-cot", "g12-test-no-cot"):
        add_letters(made["all"], name, rng)
        add_letters(made["other keys"], name, rng, text_key="response", id_key="id", id_type=int)
    add_letters(made["few"], "csn-test-no-cot", rng)  # the random letters of MMMU-ECG are not drawn here
    add_options(made["all"], 300, rng)
    add_options(made["other keys"], 100, rng, text_key="response", id_key="id", id_type=int, deep=True)
    add_options(made["few"], 30, rng, prompts=7)
    return made


def add_labels(
    case: Case, name: str, size: int, rng: random.Random, *, always: tuple[str, ...] = (),
    only: tuple[str, ...] = (), **form: Any
) -> None:  # fmt: skip
    labels = only or SUBSETS[name].names
    for number in range(size):
        right = [label for label in labels if label in always or rng.random() < 0.3]
        answer = ", ".join(right)
        if name == "code15-test" and not right and not only:
            answer = rng.choice(["NORM", "ABNORMAL"])
        said = [label for label in labels if rng.random() < (0.8 if label in right else 0.1)]
        text = rng.choice(LABEL_TEXTS).format(names=", ".join(said))
        if rng.random() < 0.4:
            text = ", ".join(said) or "NORM"
        add(case, name, number, label_question(SUBSETS[name].names), answer, text, **form)
    rng.shuffle(case.rows[name])


def add_letters(case: Case, name: str, rng: random.Random, **form: Any) -> None:
    subset = SUBSETS[name]
    assert subset.n is not None
    for number in range(subset.n):
        right = rng.choice(subset.names)
        said = right if rng.random() < 0.6 else rng.choice(subset.names)
        body = f"finding {said.lower()}"
        text = rng.choice(LETTER_TEXTS).format(letter=said, body=body)
        if text.endswith("The correct option is "):
            text += "unclear"
        answer = right if name == "mmmu-ecg" else f"{right}. finding {right.lower()}"
        add(case, name, number, letter_question(subset.names), answer, text, **form)
    rng.shuffle(case.rows[name])


def add_options(
    case: Case, size: int, rng: random.Random, *, deep: bool = False, prompts: int | None = None, **form: Any
) -> None:
    for number in range(size):
        options = rng.choice(OPTIONS)
        right = rng.sample(options, rng.choice([1, 1, 2]))
        said = right if rng.random() < 0.6 else rng.sample(options, 1)
        names = ", ".join(said)
        text = rng.choice(OPTION_TEXTS).format(names=names, upper=names.upper(), options=", ".join(options))
        question = option_question(options)
        add(case, "ecgqa-test", number, question, right, text, **form)
        shown: Any = question.removeprefix("<image>\n")
        if prompts is None or number % prompts == 0:  # rows without a prompt are read with the one before
            case.rows["ecgqa-test"][-1]["prompt"] = {"prompt": shown} if deep else shown


def add(
    case: Case, name: str, number: int, question: str, answer: Any, text: str, *,
    text_key: str = "text", id_key: str = "question_id", id_type: type = str,
) -> None:  # fmt: skip
    item_id: Any = number if id_type is int else f"{name}-{number}"
    key = "No" if name == "mmmu-ecg" else "id"
    talk = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    case.items.setdefault(name, []).append({key: item_id, "image": f"{number}.png", "conversations": talk})
    case.rows.setdefault(name, []).append({id_key: item_id, text_key: text})


def items_of(case: Case) -> list[Item]:
    """What a prepared folder makes of the items."""
    made = []
    for name, items in case.items.items():
        for item in items:
            asked, replied = (turn["value"] for turn in item["conversations"])
            answer = ", ".join(replied) if isinstance(replied, list) else replied
            item_id, prompt = str(item.get("No", item.get("id"))), asked.removeprefix("<image>\n")
            made.append(
                Item(item_id, name, f"{name}/{item_id}", f"patient {item_id}", prompt, answer,
                     choices_of(prompt, answer), split_options(answer))
            )  # fmt: skip
    return made


def write_rows(case: Case, root: Path) -> Path:
    """Predictions as the published scripts leave them: SUBSET/step-final.jsonl."""
    for name, rows in case.rows.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (root / name / "step-final.jsonl").write_text(text, encoding="utf-8")
    return root


def recording(scorer: Any, seen: list[Any]) -> Any:
    """The published function, which prints rounded numbers, with what it returns kept."""

    def record(named: Any, right: Any) -> Any:
        seen.append(scorer(named, right))
        return seen[-1]

    return record


def published_numbers(script: Path) -> dict[str, dict[str, dict[str, float | None]]]:
    """What the published scorer says of every case."""
    source = script.read_text(encoding="utf-8").replace("np.nan  If AUC", "np.nan  # If AUC")
    names = {"mmmu": "mmmu-ecg", "ptb": "ptb-test", "cpsc": "cpsc-test", "csn": "csn-test-no-cot",
             "g12": "g12-test-no-cot", "ecgqa": "ecgqa-test", "code15": "code15-test"}  # fmt: skip
    calls = re.findall(r'eval_(\w+?)(_test)?\(f"\{root\}', source)
    assert len(calls) == len(names)
    numbers: dict[str, dict[str, dict[str, float | None]]] = {}
    for title, case in cases().items():
        numbers[title] = {}
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            for name in names.values():
                (root / f"{name}.json").write_text(json.dumps(case.items.get(name, [])))
            write_rows(case, root / "said")
            module: dict[str, Any] = {"__name__": "published"}
            exec(compile(source.replace("/path/to/PULSE/data/ECGBench", folder), str(script), "exec"), module)
            seen: list[tuple[float, float, float]] = []
            inner = module["compute_f1_auc"]
            module["compute_f1_auc"] = lambda named, right, inner=inner, seen=seen: (
                seen.append(inner(named, right)) or seen[-1]
            )
            for short, suffix in calls:
                name, shown = names[short], io.StringIO()
                if name not in case.rows:
                    continue
                with contextlib.redirect_stdout(shown):
                    module[f"eval_{short}{suffix}"](str(root / "said" / name))
                if SUBSETS[name].task == "labels":
                    f1, auc, loss = (None if value != value else float(value) for value in seen.pop())
                    numbers[title][name] = {"auc_hard": auc, "f1": f1, "hamming_loss": loss}
                else:
                    printed = re.search(r"[Aa]ccuracy:? ([\d.e-]+)\n", shown.getvalue())
                    assert printed, shown.getvalue()
                    numbers[title][name] = {"accuracy": float(printed[1])}
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("script", type=Path)
    made = {"command": "python -m tests.protocol_cases evaluate_ecgbench.py (AIMedLab/PULSE, commit a439b6c)"}
    json.dump(made | {"numbers": published_numbers(parser.parse_args().script)}, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
