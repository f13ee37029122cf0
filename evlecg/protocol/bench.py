"""ECGBench as data: its subsets, how each is scored, and what was published on them.

The benchmark is that of PULSE (Liu 2024, "Teach Multimodal LLMs to Comprehend Electrocardiographic Images"). Its seven
scored subsets are read off the text of an answer; two are judged by a language model, whose verdicts come as a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

LABELS, LETTER, OPTIONS, OPEN = "labels", "letter", "options", "open"  # what an answer names


@dataclass(frozen=True)
class Subset:
    """A set of questions that are scored together.

    Attributes:
        name: as in the benchmark's file names; for other data the questions' own kind.
        title: as a report prints it.
        task: what an answer names: `LABELS`, one `LETTER`, `OPTIONS` of the prompt, or free text (`OPEN`).
        names: label codes or letters that can be named; empty where every prompt has its own.
        n: questions as published; None for data that are not of the benchmark.
        after_mark: published scorers read only what stands behind the last `Answer:`.
        kept: labels that a right answer has as its only one, and of which the longest in an answer counts.
    """

    name: str
    title: str
    task: str
    names: tuple[str, ...] = ()
    n: int | None = None
    after_mark: bool = False
    kept: tuple[str, ...] = ()

    @property
    def metric(self) -> str | None:
        """Key of the number that is compared; None where there is none without a judge."""
        return {LABELS: "auc_hard", LETTER: "accuracy", OPTIONS: "accuracy"}.get(self.task)


EIGHT = tuple("ABCDEFGH")

# In the order in which the published script scores them: its random letters come from one generator.
SUBSETS: Mapping[str, Subset] = MappingProxyType(
    {
        subset.name: subset
        for subset in (
            Subset("mmmu-ecg", "MMMU-ECG", LETTER, EIGHT[:4], 200),
            Subset("ptb-test", "PTB-XL Super", LABELS, ("NORM", "MI", "STTC", "CD", "HYP"), 2082),
            Subset("cpsc-test", "CPSC 2018", LABELS,
                   ("NORM", "AF", "I-AVB", "LBBB", "RBBB", "PAC", "PVC", "STD", "STE"), 2061),
            Subset("csn-test-no-cot", "CSN", LETTER, EIGHT, 1611),
            Subset("g12-test-no-cot", "G12EC", LETTER, EIGHT, 2026),
            Subset("ecgqa-test", "ECG-QA", OPTIONS, (), 1317),
            Subset("code15-test", "CODE-15", LABELS, ("1dAVb", "RBBB", "LBBB", "SB", "ST", "AF"), 1400,
                   after_mark=True, kept=("NORM", "ABNORMAL")),
            Subset("ptb-test-report", "PTB-XL reports", OPEN, (), 500),
            Subset("arena", "ECG Arena", OPEN, (), 100),
        )
    }
)  # fmt: skip

_COLUMNS = ("ptb-test", "code15-test", "cpsc-test", "csn-test-no-cot", "g12-test-no-cot", "mmmu-ecg", "ecgqa-test")
_ROWS: tuple[tuple[str, tuple[float | None, ...]], ...] = (
    ("random", (50.3, 48.8, 51.2, 11.6, 12.1, 24.2, 16.2)),
    ("GPT-4o", (55.6, 59.9, 50.9, 57.5, 49.2, 43.5, 35.2)),
    ("LLaVA-Med", (50.0, 69.2, 50.0, 13.8, 14.1, 27.0, 29.5)),
    ("Qwen2-VL-7B", (51.3, 60.7, 49.4, 25.5, 32.9, 31.5, 20.4)),
    ("PULSE-7B", (82.4, 90.7, 76.9, 85.2, 78.2, 58.0, 73.8)),
    ("GEM", (83.4, 91.5, 79.1, 86.2, 80.5, None, None)),
    ("EVL-ECG 2B", (75.2, 86.4, 66.8, 89.7, 77.1, 48.5, 64.8)),
)


def published(subset: str, metric: str | None) -> dict[str, float]:
    """Model -> published result in [0, 1]; empty where nothing was published under that metric.

    `auc_hard` is what the papers print as AUC: it is never put beside an AUROC of likelihoods.

    Args:
        subset: name of a subset.
        metric: key of the number that it would stand beside.
    """
    if subset not in _COLUMNS or SUBSETS[subset].metric != metric:
        return {}
    column = _COLUMNS.index(subset)
    return {model: round(value / 100, 4) for model, values in _ROWS if (value := values[column]) is not None}


@dataclass(frozen=True)
class Item:
    """A question that was put to a model, and its right answer.

    Attributes:
        id: joins it with replies; unique within its subset.
        subset: name of its subset.
        record_id, patient_id: whose ECG it is about.
        prompt: what was asked, without image placeholder.
        answer: the right answer as written.
        options: what the prompt offers, as the data's reader found it; empty where it offers nothing.
        right_options: the right answer as a list, where it may name several options.
    """

    id: str
    subset: str
    record_id: str
    patient_id: str
    prompt: str
    answer: str
    options: tuple[str, ...] = ()
    right_options: tuple[str, ...] = ()
