"""LUDB: 200 records, phrases of a cardiologist per record.

Its headers scale every lead to a peak-to-peak of exactly 1 "mV" (the gain is the lead's own range), which hides voltage
and breaks Einthoven's law by up to 0.7 mV. The counts themselves satisfy I + III = II to the last digit in all records,
so they share one scale; read as microvolt, they give usual voltages (median range of II 1.2 mV, of V3 2.2 mV). That is
what the reader does wherever it finds such gains; the absolute scale is an inference, the relative one is a fact.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from evlecg.data.gates import Unfit, mend
from evlecg.data.labels import ludb_labels
from evlecg.data.readers_base import Dropped, Reading, ReadOptions, Source, parse_age, parse_sex, split_of
from evlecg.data.readers_wfdb import Channel, in_units, read_header, read_steps
from evlecg.data.store import STEPS_PER_MV
from evlecg.schema import Record


def is_ludb(folder: Path) -> bool:
    return (folder / "ludb.csv").is_file()


@dataclass(frozen=True)
class _Row:
    id: str
    cells: dict[str, str]


def open_ludb(source: Source, options: ReadOptions) -> Reading:
    """Rows of ludb.csv; signals in data/ID.{hea,dat}."""
    rows = [
        _Row(cells["ID"].strip(), {key: value or "" for key, value in cells.items() if key})
        for cells in csv.DictReader(io.StringIO(source.text("ludb.csv"), newline=""))
    ]

    def read(row: _Row) -> Record:
        try:
            header = read_header(source, f"data/{row.id}.hea")
        except FileNotFoundError as error:
            raise Dropped("listed, but not in this copy") from error
        steps_LT, channels = read_steps(source, header)
        channels, repairs = _same_scale(steps_LT, channels)
        raw = in_units(steps_LT, channels)
        mended = mend(raw.values, raw.leads, raw.units, header.fs_hz)
        return Record(
            id=row.id,
            patient_id=row.id,
            signal_mV=mended.signal_mV,
            fs_hz=header.fs_hz,
            labels=ludb_labels(options.labels, row.cells),
            split=split_of(row.id, options.seed),
            age=parse_age(row.cells["Age"]),
            sex=parse_sex(row.cells["Sex"]),
            repairs=(*header.repairs, *repairs, *mended.repairs),
        )

    return Reading(len(rows), rows, lambda row: row.id, read)


def _same_scale(steps_LT: np.ndarray, channels: list[Channel]) -> tuple[list[Channel], tuple[str, ...]]:
    """The channels with counts as microvolt, where the header normalised every lead to a range of 1."""
    if not steps_LT.size:
        raise Unfit("empty: no samples")
    range_L = np.ptp(steps_LT.astype(np.int32), axis=1) / np.array([channel.gain or np.inf for channel in channels])
    if np.abs(range_L - 1).max() > 1e-3:
        return channels, ()
    in_uV = [replace(channel, gain=STEPS_PER_MV, baseline=0) for channel in channels]
    return in_uV, ("per-lead scaling undone: counts read as uV",)
