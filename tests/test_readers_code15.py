"""CODE-15% in miniature: parts in the true layout around real tracings, whole, chunked, partial and damaged."""

from __future__ import annotations

import csv
import pickle
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
from numpy.testing import assert_allclose, assert_array_equal

from evlecg.data.labels import resolve_labels
from evlecg.data.readers import READERS, ReadOptions, Rejected, Source, home_of
from evlecg.data.readers_base import Reading, split_of
from evlecg.data.readers_code15 import BYTES_AT_ONCE, _TracingReader
from evlecg.errors import EvlecgError
from evlecg.prepare import prepare
from evlecg.schema import Record
from tests.test_readers import kept, reasons

LABELS = ("1dAVb", "RBBB", "LBBB", "SB", "ST", "AF")
COLUMNS = ("exam_id", "age", "is_male", "nn_predicted_age", *LABELS, "patient_id", "death", "timey")
COLUMNS = (*COLUMNS, "normal_ecg", "trace_file")
N_SAMPLES = 4096
LAYOUTS = {"whole": {}, "chunked": {"chunks": (2, 512, 3), "compression": "gzip"}, "rows": {"chunks": (1, 4096, 12)}}


def tracing(seed: int, n_samples: int = 2934) -> np.ndarray:
    """float32 [T, 12] of about 1 mV."""
    return np.random.default_rng(seed).normal(0, 0.4, (n_samples, 12)).astype(np.float32)


def write_part(path: Path, exams: dict[int, np.ndarray], layout: str = "whole") -> None:
    """A part as published: zero-padded on both sides, and one more row of zeros with exam_id 0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tracings = np.zeros((len(exams) + 1, N_SAMPLES, 12), np.float32)
    for row, signal in enumerate(exams.values()):
        start = (N_SAMPLES - len(signal)) // 2
        tracings[row, start : start + len(signal)] = signal
    with h5py.File(path, "w") as file:
        file["exam_id"] = np.array([*exams, 0], np.int64)
        file.create_dataset("tracings", data=tracings, **LAYOUTS[layout])


def exam(exam_id: int, part: int = 0, **cells: object) -> dict[str, object]:
    row = dict.fromkeys(COLUMNS, "False") | {"exam_id": exam_id, "age": 46, "is_male": "True", "patient_id": 7}
    return row | {"nn_predicted_age": 38.7, "death": "", "timey": ""} | {"trace_file": f"exams_part{part}.hdf5"} | cells


def write_exams(folder: Path, rows: list[dict[str, object]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "exams.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def open_at(folder: Path, labels: str = "code15-6+ptbxl-super", seed: int = 0) -> Reading:
    home = home_of("code15", folder)
    assert home is not None
    return READERS["code15"].open(Source(home), ReadOptions(resolve_labels(labels), seed))  # type: ignore[arg-type]


def read(folder: Path, labels: str = "code15-6+ptbxl-super") -> dict[str, Record | Rejected]:
    return {item.id: item for item in open_at(folder, labels).records()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_published(tmp_path: Path, layout: str) -> None:
    """Joined by exam_id, in another order than the table's; padding cut; labels, patient, age, sex."""
    signals = {30: tracing(3), 10: tracing(1, 4096), 20: tracing(2, 2001)}
    write_part(tmp_path / "exams_part0.hdf5", signals, layout)
    write_part(tmp_path / "exams_part11.hdf5", {40: tracing(4)}, layout)
    write_exams(
        tmp_path,
        [
            exam(10, **{"1dAVb": "True", "SB": "True"}),
            exam(20, normal_ecg="True", is_male="False", age=93),
            exam(30, patient_id=8, **{"RBBB": "True", "LBBB": "True", "ST": "True", "AF": "True"}),
            exam(40, part=11),
        ],
    )
    found = read(tmp_path)
    assert list(found) == ["30", "10", "20", "40"]  # as they lie in the parts
    records = kept(found)
    for exam_id, signal in (signals | {40: tracing(4)}).items():
        record = records[str(exam_id)]
        assert_array_equal(record.signal_mV, signal.T)
        assert record.fs_hz == 400
    assert records["10"].repairs == () and records["30"].repairs == ("padding cut: 1.45 s before, 1.45 s after",)
    present = {name: {code for code, value in record.labels.items() if value} for name, record in records.items()}
    assert present == {
        "10": {"1AVB", "SBRAD"},
        "20": {"NORM"},
        "30": {"RBBB", "LBBB", "STACH", "AFIB"},
        "40": set(),
    }
    assessed = {"1AVB", "RBBB", "LBBB", "SBRAD", "STACH", "AFIB", "NORM"}
    assert all(set(record.labels) == assessed for record in records.values())  # of the superclasses, NORM alone
    assert (records["20"].age, records["20"].sex, records["10"].age, records["10"].sex) == (90, "F", 46, "M")
    assert records["10"].patient_id == records["20"].patient_id == "7" != records["30"].patient_id
    assert all(record.split == split_of(record.patient_id, 0) for record in records.values())


def test_partial_copies_and_strays(tmp_path: Path) -> None:
    write_part(tmp_path / "sub" / "exams_part1.hdf5", {10: tracing(1), 15: tracing(9), 11: tracing(2, 1900)})
    (tmp_path / "exams_part2.hdf5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(500))  # an interrupted download
    with h5py.File(tmp_path / "exams_part3.hdf5", "w") as file:
        file["exam_id"] = np.array([50])
        file["tracings"] = np.ones((1, 4096, 8), np.float32)
    rows = [exam(10, 1), exam(11, 1), exam(12, 1), exam(20, 0), exam(30, 2), exam(31, 2), exam(50, 3)]
    write_exams(tmp_path, rows)
    found = read(tmp_path)
    assert reasons(found) == {
        "15": "no row in exams.csv",
        "11": "too short: 4.75 s, at least 5 s are needed",
        "12": "listed, but not in its part",
        "20": "part not in this copy: exams_part0.hdf5",
        "30": "damaged part: exams_part2.hdf5",
        "31": "damaged part: exams_part2.hdf5",
        "50": "wrong shape: the part holds no tracings of [exams, samples, 12]",
    }
    faults = {name for name, item in found.items() if isinstance(item, Rejected) and item.fault}
    assert faults == {"11", "30", "31", "50"}
    assert set(kept(found)) == {"10"}


def test_tables_that_cannot_be_read(tmp_path: Path) -> None:
    write_exams(tmp_path, [exam(10, age="old")])
    with pytest.raises(EvlecgError, match=r"a row cannot be read \[exams.csv, line 2\]"):
        read(tmp_path)
    (tmp_path / "exams.csv").write_text("exam_id,age,is_male\n1,2,True\n")
    with pytest.raises(EvlecgError, match=r"a column is missing: patient_id, trace_file, 1dAVb.*it has: exam_id, age"):
        read(tmp_path)


def test_entries_travel_and_every_worker_reads_for_itself(tmp_path: Path) -> None:
    write_part(tmp_path / "exams_part0.hdf5", {10: tracing(1), 11: tracing(2)}, "chunked")
    write_exams(tmp_path, [exam(10), exam(11)])
    sent = pickle.dumps(list(open_at(tmp_path).entries))
    assert len(sent) < 600
    found = [open_at(tmp_path).read(entry) for entry in reversed(pickle.loads(sent))]
    assert_array_equal(found[0].signal_mV, tracing(2).T)
    assert_array_equal(found[1].signal_mV, tracing(1).T)


class _Counting:
    """Stands for an h5py dataset and counts the rows that were read."""

    def __init__(self, n_rows: int, chunk_rows: int | None) -> None:
        self.chunks = None if chunk_rows is None else (chunk_rows, 64, 1)
        self.shape, self.n_rows_read, self.most_at_once = (n_rows, 8, 12), 0, 0
        self.dtype = np.dtype("f8")

    def __getitem__(self, at: int | slice) -> np.ndarray:
        rows = np.arange(self.shape[0])[at if isinstance(at, slice) else slice(at, at + 1)]
        self.n_rows_read += len(rows)
        self.most_at_once = max(self.most_at_once, len(rows))
        values = np.broadcast_to(rows[:, None, None], (len(rows), 8, 12))
        return values if isinstance(at, slice) else values[0]


@pytest.mark.parametrize(("chunk_rows", "at_once"), [(None, 1), (1, 1), (10, 10), (1000, 40)])
def test_each_row_is_read_once_and_few_at_a_time(
    tmp_path: Path, chunk_rows: int | None, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evlecg.data.readers_code15.BYTES_AT_ONCE", 40 * 8 * 12 * 8)
    reader = _TracingReader(Source(tmp_path))
    dataset = _Counting(100, chunk_rows)
    reader._part, reader._tracings = "part", dataset  # type: ignore[assignment]
    for row in range(100):
        assert (reader.read_mV("part", row) == row).all()
    assert dataset.n_rows_read == 100 and dataset.most_at_once == at_once


def test_a_chunk_is_read_by_one_worker(tmp_path: Path) -> None:
    """A shard is whole chunks: 313 rows are what h5py chooses for 20,001 tracings."""
    for chunk_rows, shard in ((313, 313), (64, 256), (100, 300), (2000, 341), (None, 256)):
        with h5py.File(tmp_path / "exams_part0.hdf5", "w") as file:
            chunks = None if chunk_rows is None else (chunk_rows, 64, 1)
            file.create_dataset("tracings", (2001, N_SAMPLES, 12), np.float32, chunks=chunks)  # nothing is written
        write_exams(tmp_path, [exam(1)])
        assert open_at(tmp_path).shard == shard
    assert BYTES_AT_ONCE // (N_SAMPLES * 12 * 4) == 341


def test_memory_stays_flat(tmp_path: Path) -> None:
    """A part of 64 MB is read in less than a tenth of it."""
    with h5py.File(tmp_path / "exams_part0.hdf5", "w") as file:
        file["exam_id"] = np.arange(1, 326)
        tracings = file.create_dataset("tracings", (325, N_SAMPLES, 12), np.float32, chunks=(5, 4096, 12))
        for row in range(0, 325, 5):
            tracings[row : row + 5] = tracing(row, N_SAMPLES)
    write_exams(tmp_path, [exam(number) for number in range(1, 326)])
    reading = open_at(tmp_path)
    tracemalloc.start()
    n_read = sum(isinstance(item, Record) for item in reading.records())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert n_read == 325 and peak < 6e6


def test_real_tracings(tmp_path: Path, shared_data: Path) -> None:
    """The six tracings with their true rows of exams.csv, put back into a part, come out as they were."""
    with (shared_data / "code15_ecgfm" / "meta.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    signals = {
        int(row["exam_id"]): scipy.io.loadmat(shared_data / "code15_ecgfm" / row["save_file"])["feats"].T
        for row in rows
    }
    for layout in ("whole", "chunked"):
        folder = tmp_path / layout
        for part in {row["trace_file"] for row in rows}:
            inside = {int(row["exam_id"]) for row in rows if row["trace_file"] == part}
            write_part(folder / part, {key: signals[key] for key in inside}, layout)
        write_exams(folder, [{name: row[name] for name in COLUMNS} for row in rows])
        found = read(folder)
        assert len(found) == 6
        for row in rows:
            item = found[row["exam_id"]]
            if isinstance(item, Rejected):
                assert item.reason.startswith(("absurd amplitude", "saturated")), item
                continue
            assert_allclose(item.signal_mV, signals[int(row["exam_id"])].T, atol=1e-6)
            expected = {
                code for name, code in (("1dAVb", "1AVB"), ("RBBB", "RBBB"), ("AF", "AFIB")) if row[name] == "True"
            }
            assert {code for code in ("1AVB", "RBBB", "AFIB") if item.labels[code]} == expected
            assert item.patient_id == row["patient_id"] and item.age == float(row["age"])
        assert len(kept(found)) >= 4


def test_prepared_with_workers_and_alone(tmp_path: Path) -> None:
    write_part(tmp_path / "in" / "exams_part0.hdf5", {number: tracing(number) for number in range(1, 13)}, "chunked")
    write_exams(tmp_path / "in", [exam(number, patient_id=number, AF=str(number % 2 == 0)) for number in range(1, 14)])
    done = [
        prepare("code15", source=tmp_path / "in", out=tmp_path / f"out{workers}", workers=workers) for workers in (1, 2)
    ]
    assert done[0].fingerprint == done[1].fingerprint
    assert (done[0].n_kept, done[0].n_dropped, done[0].n_rejected) == (12, 1, 0)
    assert done[0].positives["AFIB"] == 6 and done[0].n_repaired == 12
