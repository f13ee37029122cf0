"""Published ECGBench results that stand beside ours, and only beside the number that is formed as theirs is.

What ECGBench prints under AUC is scikit-learn's roc_auc_score of 0/1 answers parsed from text, our `auc_hard`. An AUROC
of likelihoods is a different number and is never put beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Rows (model, auc_hard in [0, 1], where it stands) and what keeps them apart from ours."""

    rows: tuple[tuple[str, float, str], ...]
    note: str


PULSE = "PULSE-7B, arXiv 2410.19008"
EVL_ECG = "EVL-ECG 2B, arXiv 2605.29977"
# dataset -> the labels it was scored on there, its test records, model -> auc_hard
_SUBSETS: dict[str, tuple[frozenset[str], int, dict[str, float]]] = {
    "ptbxl": (frozenset({"NORM", "MI", "STTC", "CD", "HYP"}), 2082, {PULSE: 0.824, EVL_ECG: 0.752}),
    "code15": (frozenset({"1AVB", "RBBB", "LBBB", "SBRAD", "STACH", "AFIB", "NORM"}), 1400,
               {PULSE: 0.907, EVL_ECG: 0.864}),
    "cpsc2018": (frozenset({"NORM", "AFIB", "1AVB", "LBBB", "RBBB", "PAC", "PVC", "STD", "STE"}), 2061,
                 {PULSE: 0.769, EVL_ECG: 0.668}),
}  # fmt: skip


def published_for(dataset: str, labels: Sequence[str]) -> Published | None:
    """Published results on the same dataset and exactly the same labels; None where there are none."""
    if dataset not in _SUBSETS or _SUBSETS[dataset][0] != set(labels):
        return None
    _, n_records, figures = _SUBSETS[dataset]
    return Published(
        tuple((model, value, "as published: answers in words, parsed") for model, value in figures.items()),
        f"ECGBench prints under AUC the auc_hard of answers in words, on its own {n_records} records. The formula is "
        "the same here; records, prompts and how an answer is had are not, so a difference of a few points says "
        "little. Our AUROC has no published counterpart.",
    )
