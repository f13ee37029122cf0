"""What every metric reads: one value and one truth per record and label, and whose record it is.

Shape legend: N records, K labels, P patients.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from evlecg.errors import EvlecgError


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores, probabilities or 0/1 decisions of K labels on N records, checked once.

    A part of the records is the same object with the other truths taken away (`where`), so that a part and the whole,
    or two parts, see the same resamples of the same patients.

    Attributes:
        value_NK: float64 [N, K]; a number wherever the label was assessed.
        truth_NK: float64 [N, K]; 1, 0, or NaN where the label was not assessed in that record.
        patient_ids: of every record; records that share one are one piece of evidence.
        labels: names of the columns.
        record_ids: of every record, for messages only; empty for row numbers.
        left_out: label -> why it carries no truths although the data had some.
        is_answers: the one column says whether an answer was right; there is no truth to be positive.

    Raises:
        EvlecgError: a value of an assessed label is NaN, or a record has no patient.
        ValueError: shapes, names or truths that no caller should pass.
    """

    value_NK: np.ndarray
    truth_NK: np.ndarray
    patient_ids: Sequence[str]
    labels: tuple[str, ...]
    record_ids: Sequence[str] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    is_answers: bool = False

    def __post_init__(self) -> None:
        value_NK = np.asarray(self.value_NK, dtype=np.float64)
        truth_NK = np.asarray(self.truth_NK, dtype=np.float64)
        labels = tuple(self.labels)
        if truth_NK.ndim != 2 or value_NK.shape != truth_NK.shape:
            raise ValueError(f"values {value_NK.shape} and truths {truth_NK.shape} are not both [records, labels]")
        if len(labels) != truth_NK.shape[1] or len(set(labels)) != len(labels):
            raise ValueError(f"{truth_NK.shape[1]} columns for the labels {labels}")
        if len(self.patient_ids) != len(truth_NK) or len(self.record_ids) not in (0, len(truth_NK)):
            raise ValueError(
                f"{len(self.patient_ids)} patient ids and {len(self.record_ids)} record ids for {len(truth_NK)} records"
            )
        assessed_NK = ~np.isnan(truth_NK)
        if not np.isin(truth_NK[assessed_NK], (0, 1)).all():
            raise ValueError("truths are 0, 1 or NaN")
        for name, value in (("value_NK", value_NK), ("truth_NK", truth_NK), ("labels", labels)):
            object.__setattr__(self, name, value)
        nameless = [n for n, patient in enumerate(self.patient_ids) if patient is None or str(patient) == ""]
        if nameless:
            raise EvlecgError(
                f"{len(nameless)} of {len(truth_NK)} records have no patient id", where=self._record(nameless[0]),
                hint="intervals are over patients: use the record's own id where nothing is known",
            )  # fmt: skip
        nan_NK = np.isnan(value_NK) & assessed_NK
        if nan_NK.any():
            n, k = np.argwhere(nan_NK)[0]
            raise EvlecgError(
                f"{nan_NK.sum()} of {assessed_NK.sum()} scores are not numbers",
                where=f"label {labels[k]}, {self._record(n)}",
                hint="the model's logits are NaN: was training unstable, or the dtype too small?",
            )

    @classmethod
    def of_rows(cls, rows: Iterable[Mapping[str, Any]], labels: Sequence[str] | None = None) -> Scored:
        """Predictions, one a label of a record, as a table.

        Args:
            rows: `record_id`, `patient_id`, `label`, `score` and `truth` of each, as `Prediction` names them; of two
                for the same label of the same record the later counts.
            labels: columns; None: as they come.
        """
        rows = list(rows)
        patients = {row["record_id"]: row["patient_id"] for row in rows}
        place = {record: index for index, record in enumerate(patients)}
        names = tuple(dict.fromkeys(row["label"] for row in rows)) if labels is None else tuple(labels)
        column = {label: index for index, label in enumerate(names)}
        score_NK = np.full((len(place), len(column)), np.nan)
        truth_NK = np.full((len(place), len(column)), np.nan)
        for row in rows:
            where = place[row["record_id"]], column[row["label"]]
            score_NK[where], truth_NK[where] = row["score"], row["truth"]
        return cls(score_NK, truth_NK, list(patients.values()), names, list(patients))

    @classmethod
    def answers(cls, correct_N: Sequence[float] | np.ndarray, patient_ids: Sequence[str]) -> Scored:
        """Answers to open or multiple-choice questions: 1 right, 0 wrong, one a row."""
        correct_N1 = np.reshape(np.asarray(correct_N, dtype=np.float64), (-1, 1))
        scored = cls(correct_N1, np.ones_like(correct_N1), patient_ids, ("answer",), is_answers=True)
        scored.check_decisions("accuracy")
        return scored

    @cached_property
    def patient_N(self) -> np.ndarray:
        """Every record's patient as an index, in the order of the sorted ids."""
        if not len(self.patient_ids):
            return np.zeros(0, dtype=np.intp)
        return np.unique(np.array([str(patient) for patient in self.patient_ids]), return_inverse=True)[1]

    @cached_property
    def n_patients(self) -> int:
        return int(self.patient_N.max()) + 1 if len(self.patient_N) else 0

    @cached_property
    def most_records_of_a_patient(self) -> int:
        return int(np.bincount(self.patient_N).max()) if len(self.patient_N) else 0

    @cached_property
    def assessed_NK(self) -> np.ndarray:
        return ~np.isnan(self.truth_NK)

    def n_patients_among(self, rows_N: np.ndarray) -> int:
        """Number of patients of the chosen records (bool [N])."""
        return int(np.count_nonzero(np.bincount(self.patient_N[rows_N])))

    def rows_with(self, columns: Sequence[int]) -> np.ndarray:
        """bool [N]: records in which any of the columns was assessed."""
        return np.asarray(self.assessed_NK[:, list(columns)].any(axis=1))

    def n_pos_in(self, columns: Sequence[int]) -> int | None:
        """Positive cells of the columns; None where truths have no sides."""
        return None if self.is_answers else int((self.truth_NK[:, list(columns)] == 1).sum())

    def column(self, label: str) -> int:
        """Index of a label.

        Raises:
            EvlecgError: there is no such label.
        """
        if label not in self.labels:
            raise EvlecgError(f"no label {label!r}", where="labels", hint=f"one of {', '.join(self.labels)}")
        return self.labels.index(label)

    def where(self, rows_N: np.ndarray) -> Scored:
        """The chosen records (bool [N]): the truths of all others are taken away, patients and rows stay."""
        rows_N = np.asarray(rows_N)
        if rows_N.dtype != bool or rows_N.shape != (len(self.truth_NK),):
            raise ValueError(f"rows {rows_N.dtype} {rows_N.shape} are not bool [{len(self.truth_NK)}]")
        return self.replaced(truth_NK=np.where(rows_N[:, None], self.truth_NK, np.nan))

    def replaced(
        self,
        *,
        value_NK: np.ndarray | None = None,
        truth_NK: np.ndarray | None = None,
        left_out: Mapping[str, str] | None = None,
    ) -> Scored:
        """The same records and labels with other values or truths, or with labels left out for a reason."""
        truth_NK = self.truth_NK if truth_NK is None else truth_NK
        if left_out:
            out_K = np.isin(np.array(self.labels, dtype=object), list(left_out))
            truth_NK = np.where(out_K, np.nan, truth_NK)
        made = Scored(
            self.value_NK if value_NK is None else value_NK, truth_NK, self.patient_ids, self.labels, self.record_ids,
            {**self.left_out, **(left_out or {})}, self.is_answers,
        )  # fmt: skip
        made.__dict__["patient_N"] = (
            self.patient_N
        )  # the cached property: sorting the ids again costs more than all else
        return made

    @cached_property
    def fingerprint(self) -> str:
        """Of values and truths: what was chosen or fitted on some data knows them again."""
        digest = hashlib.sha256(repr((self.labels, self.value_NK.shape)).encode())
        for array_NK in (self.value_NK, self.truth_NK):
            digest.update(np.ascontiguousarray(array_NK).tobytes())
        return digest.hexdigest()

    def check_decisions(self, metric: str) -> None:
        """Raises:
        EvlecgError: a value is neither 0 nor 1.
        """
        self._check((self.value_NK != 0) & (self.value_NK != 1), f"{metric} reads decisions, 0 or 1",
                    "apply thresholds that were chosen on validation")  # fmt: skip

    def check_probabilities(self, metric: str) -> None:
        """Raises:
        EvlecgError: a value lies outside [0, 1].
        """
        self._check((self.value_NK < 0) | (self.value_NK > 1), f"{metric} reads probabilities, between 0 and 1",
                    "pass the normalised likelihood of the answers, not logits")  # fmt: skip

    def _check(self, wrong_NK: np.ndarray, what: str, hint: str) -> None:
        wrong_NK = wrong_NK & self.assessed_NK
        if wrong_NK.any():
            n, k = np.argwhere(wrong_NK)[0]
            raise EvlecgError(f"{what}, not {self.value_NK[n, k]:g}",
                              where=f"label {self.labels[k]}, {self._record(n)}", hint=hint)  # fmt: skip

    def _record(self, n: int) -> str:
        return f"record {self.record_ids[n]}" if len(self.record_ids) else f"row {n}"


def same_records(scored: Mapping[str, Scored]) -> None:
    """Checks that models were scored on the same records, truths and labels, in the same order.

    Raises:
        EvlecgError: they were not; the message names the model that differs.
    """
    (first_name, first), *others = scored.items()
    for name, other in others:
        if other.labels != first.labels:
            raise EvlecgError(f"{first_name} and {name} have different labels", where=name)
        if other.truth_NK.shape != first.truth_NK.shape or not np.array_equal(other.patient_N, first.patient_N):
            raise EvlecgError(f"{first_name} and {name} were scored on different records", where=name,
                              hint="put both in the order of one list of record ids")  # fmt: skip
        if not np.array_equal(other.truth_NK, first.truth_NK, equal_nan=True):
            n, k = np.argwhere(~((other.truth_NK == first.truth_NK) | ~(other.assessed_NK | first.assessed_NK)))[0]
            raise EvlecgError(f"{first_name} and {name} have different truths",
                              where=f"label {first.labels[k]}, {first._record(n)}")  # fmt: skip
