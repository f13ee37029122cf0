"""Synthetic records in the place of a prepared folder, where there is none."""

from __future__ import annotations

from collections.abc import Sequence

from evlecg.data.synthetic import generate
from evlecg.schema import Question, Record, Sample

N_DRAWN = 4


class Drawn:
    """As much of a `data.store.Prepared` as scoring reads."""

    def __init__(self, n_records: int = N_DRAWN) -> None:
        self.records: list[Record] = list(generate({"test": n_records}, seed=0))
        self.patient_ids = [record.patient_id for record in self.records]

    def record(self, index: int) -> Record:
        return self.records[index]

    def samples(self, questions: Sequence[Question]) -> list[Sample]:
        """Every question about every record; nobody knows the answers."""
        return [Sample(index, record.id, tuple(questions)) for index, record in enumerate(self.records)]
