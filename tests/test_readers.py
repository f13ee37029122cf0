"""Each reader on its publisher's layout in miniature, on odd headers, and on the recorded ECGs beside the checkout."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import wfdb
from numpy.testing import assert_allclose, assert_array_equal

from evlecg.data.gates import Unfit
from evlecg.data.labels import LABEL_SETS, SIDECAR_NAMES, resolve_labels
from evlecg.data.readers import READERS, ReadOptions, Rejected, Source, find_reader, home_of
from evlecg.data.readers_base import parse_age, parse_sex, split_of
from evlecg.data.readers_cinc import cohort_of
from evlecg.data.readers_wfdb import read_header, read_signal
from evlecg.errors import EvlecgError
from evlecg.schema import LEADS, Record

STEPS = np.random.default_rng(0).normal(0, 300, (12, 5000)).astype("<i2")  # int16 [12, T], 1 uV a step


def write_wfdb(
    folder: Path,
    name: str,
    steps: np.ndarray = STEPS,
    *,
    suffix: str = ".dat",
    fs_hz: int = 500,
    leads: Sequence[str] = LEADS,
    gains: Sequence[str] = ("1000.0(0)/mV",) * 12,
    comments: Sequence[str] = (),
    said: int | None = None,
    record_line: str = "",
) -> None:
    """A WFDB record as the data sets have them: format 16, one file, for `.mat` behind a header of 24 bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    skip = 24 if suffix == ".mat" else 0
    (folder / f"{name}{suffix}").write_bytes(bytes(skip) + steps.T.astype("<i2").tobytes())
    lines = [record_line or f"{name} {len(leads)} {fs_hz} {steps.shape[1] if said is None else said}"]
    form = "16+24" if skip else "16"
    lines += [
        f"{name}{suffix} {form} {gain + ' ' if gain else ''}16 0 0 0 0 {lead}"
        for lead, gain in zip(leads, gains, strict=True)
    ]
    (folder / f"{name}.hea").write_text("\n".join([*lines, *(f"#{comment}" for comment in comments)]) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_ptbxl(root: Path) -> None:
    """PTB-XL's layout with five records in two folders, at both rates."""
    rows = [
        (1, 17.0, 56.0, 1, 3, {"NORM": 100.0, "LVOLT": 0.0, "SR": 0.0}),
        (2, 17.0, 300.0, 0, 3, {"IMI": 0.0, "CRBBB": 100.0, "STD_": 0.0}),  # likelihood 0 counts
        (3, 18.0, "", 0, 9, {"SR": 0.0}),  # no class
        (1004, 19.0, 40.0, 1, 10, {"NDT": 80.0, "AFIB": 0.0}),
        (1005, 20.0, 41.0, 1, 10, {"LVH": 80.0}),  # listed, not copied
    ]
    table = []
    for number, patient, age, sex, fold, codes in rows:
        names = {
            suffix: f"records{fs}/{number // 1000 * 1000:05d}/{number:05d}_{suffix}"
            for suffix, fs in (("lr", 100), ("hr", 500))
        }
        table.append(
            {
                "ecg_id": number,
                "patient_id": patient,
                "age": age,
                "sex": sex,
                "recording_date": "1984-11-09 09:17:34",
                "report": "sinusrhythmus normales ekg",
                "device": "CS-12   E ",
                "scp_codes": str(codes),
                "strat_fold": fold,
                "filename_lr": names["lr"],
                "filename_hr": names["hr"],
            }
        )
        if number != 1005:
            leads = [lead.upper() for lead in LEADS]
            for suffix, fs_hz in (("lr", 100), ("hr", 500)):
                path = root / names[suffix]
                steps = np.roll(STEPS, number - 1, axis=1)[:, : 10 * fs_hz]
                write_wfdb(path.parent, path.name, steps, fs_hz=fs_hz, leads=leads)
    write_csv(root / "ptbxl_database.csv", table)
    classes = {"NORM": "NORM NORM", "IMI": "MI IMI", "CRBBB": "CD CRBBB", "NDT": "STTC STTC", "LVH": "HYP LVH"}
    statements = [*classes, "LVOLT", "STD_", "SR", "AFIB"]
    write_csv(
        root / "scp_statements.csv",
        [
            {
                "": code,
                "diagnostic": 1.0 if code in classes else "",
                "diagnostic_class": classes.get(code, "").partition(" ")[0],
                "diagnostic_subclass": classes.get(code, "").partition(" ")[2],
            }
            for code in statements
        ],
    )


def read(name: str, folder: Path, labels: str = "", **options: object) -> dict[str, Record | Rejected]:
    reader = READERS[name]
    home = home_of(name, folder)
    assert home is not None
    wanted = resolve_labels(labels or reader.labels)
    reading = reader.open(Source(home), ReadOptions(labels=wanted, **options))  # type: ignore[arg-type]
    found = list(reading.records())
    assert len(found) == reading.n_entries()
    return {item.id: item for item in found}


def kept(found: dict[str, Record | Rejected]) -> dict[str, Record]:
    return {name: item for name, item in found.items() if isinstance(item, Record)}


def reasons(found: dict[str, Record | Rejected]) -> dict[str, str]:
    return {name: item.reason for name, item in found.items() if isinstance(item, Rejected)}


# PTB-XL


def test_ptbxl_as_published(tmp_path: Path) -> None:
    write_ptbxl(tmp_path)
    found = read("ptbxl", tmp_path)
    assert reasons(found) == {"00003": "no diagnostic class", "01005": "listed, but not in this copy"}
    records = kept(found)
    assert_allclose(records["00001"].signal_mV, STEPS / np.float32(1000))
    assert {name: record.split for name, record in records.items()} == {
        "00001": "train",
        "00002": "train",
        "01004": "test",
    }
    assert [record.patient_id for record in records.values()] == ["17", "17", "19"]
    assert (records["00001"].age, records["00001"].sex) == (56, "F")
    assert (records["00002"].age, records["00002"].sex) == (90, "M")
    assert records["00002"].labels == {"NORM": False, "MI": True, "STTC": False, "CD": True, "HYP": False}


def test_ptbxl_rates_and_other_labels(tmp_path: Path) -> None:
    write_ptbxl(tmp_path)
    records = kept(read("ptbxl", tmp_path, "ptbxl-super+ptbxl-rhythm+cpsc9", fs_hz=100))
    assert records["00001"].signal_mV.shape == (12, 1000) and records["00001"].fs_hz == 100
    assert set(records) == {"00001", "00002", "00003", "01004"}  # one without a class may still have a rhythm
    assert "NORM" not in records["00003"].labels and records["00003"].labels["SR"] is True
    second = records["00002"].labels
    assert second["RBBB"] and second["STD"] and second["NORM"] is False
    assert "SR" not in second  # it has no rhythm statement
    assert "LBBB" not in second  # not among the statements of this table
    assert records["01004"].labels["AFIB"] and not records["01004"].labels["SR"]


def test_ptbxl_superclasses_equal_the_reference(shared_data: Path) -> None:
    records = kept(read("ptbxl", shared_data / "ptbxl"))
    with (shared_data / "ptbxl" / "labels_subset.csv").open(newline="") as file:
        reference = {f"{int(row['ecg_id']):05d}": row for row in csv.DictReader(file)}
    assert len(records) == 50
    for name, record in records.items():
        assert {code for code, value in record.labels.items() if value} == set(reference[name]["superclass"].split())
        assert record.split == {"9": "val", "10": "test"}.get(reference[name]["strat_fold"], "train")
        assert record.patient_id == reference[name]["patient_id"]
    assert len(kept(read("ptbxl", shared_data / "ptbxl", fs_hz=100))) == 35


# CinC and CPSC2018


def test_cinc_tree_with_its_variants(tmp_path: Path) -> None:
    tree = tmp_path / "physionet.org" / "files" / "challenge-2021" / "1.0.3"
    georgia, ningbo = tree / "training" / "georgia" / "g1", tree / "training" / "ningbo" / "g1"
    mat = {"suffix": ".mat"}
    about = (" Age: 78", " Sex: Male", " Dx: 67741000119109,426177001", " Rx: Unknown")
    write_wfdb(georgia, "E00001", **mat, comments=about, record_line="E00001.mat 12 500 5000 12-May-2020 12:33:59")
    write_wfdb(georgia, "E00002", **mat, gains=("4880/mv",) * 12, comments=("Age: NaN", "Sex: female", "Dx: 59118001"))
    write_wfdb(georgia, "E00003", **mat, gains=("",) * 12, comments=("Dx: 164889003",))
    write_wfdb(georgia, "E00004", **mat, comments=("Dx: Unknown",))
    write_wfdb(ningbo, "JS23074", **mat, comments=("Dx: 284470004",))
    header = ningbo / "JS23074.hea"
    header.write_text(header.read_text().replace("JS23074.mat", "S23074.mat"))
    found = read("cinc2021", tmp_path)
    records = kept(found)
    assert reasons(found) == {"E00004": "no diagnosis"}
    for record in records.values():
        assert_allclose(record.signal_mV, STEPS / np.float32(1000), rtol=1e-6)
    assert (records["E00001"].age, records["E00001"].sex) == (78, "M")
    assert (records["E00002"].age, records["E00002"].sex) == (None, "F")
    assert {name: record.repairs for name, record in records.items()} == {
        "E00001": ("record line of the header named a file",),
        "E00002": ("gain 4880 read as 1000 a mV",),
        "E00003": ("gain none read as 1000 a mV",),
        "JS23074": (),
    }
    assert {code for code, value in records["E00001"].labels.items() if value} == {"SBRAD"}
    assert "PACE" not in records["E00001"].labels  # Georgia has no such code
    assert records["JS23074"].labels["PAC"] and records["JS23074"].labels["PACE"] is False


def test_cohorts() -> None:
    names = ["A0001", "Q0001", "I0001", "S0001", "HR00001", "E00001", "JS10646", "JS10647", "S23074", "X1"]
    assert [cohort_of(f"{name}.hea") for name in names] == ["A", "Q", "I", "S", "P", "E", "C", "N", "N", ""]
    assert cohort_of("training/ptb-xl/g1/X1.hea") == "P"


def test_cinc_labels_equal_the_reference(shared_data: Path) -> None:
    """Against the names of labels.csv, for records whose header has codes; the others have them from there."""
    found = read("cinc2021", shared_data / "cinc2021")
    assert reasons(found) == {"JS20004": "flat leads: V2, V4, V6"}
    with (shared_data / "cinc2021" / "labels.csv").open(newline="") as file:
        reference = {row["record"]: row for row in csv.DictReader(file)}
    assert set(found) == set(reference)
    # abbreviation -> label, written down here on its own
    label_of = {"AF": "AFIB", "RBBB": "RBBB", "CRBBB": "RBBB", "STach": "STACH", "SB": "SBRAD", "PAC": "PAC"}
    label_of |= {
        "SVPB": "PAC",
        "PVC": "PVC",
        "LBBB": "LBBB",
        "IAVB": "1AVB",
        "NSR": "SR",
        "LQT": "LNGQT",
        "SA": "SARRH",
    }
    label_of |= {"TAb": "TAB", "TInv": "INVT", "QAb": "QWAVE", "IRBBB": "IRBBB", "NSIVCB": "IVCD", "Brady": "BRADY"}
    label_of |= {"LPR": "LPR", "LQRSV": "LVOLT", "PR": "PACE"}
    checked = 0
    for name, record in kept(found).items():
        row = reference[name]
        if row["label_source"] == "header":
            expected = {label_of[item] for item in row["labels"].split("|") if item in label_of}
            assert {code for code, value in record.labels.items() if value} == expected, name
            assert row["fs"] == f"{record.fs_hz:g}" and int(row["n_samples"]) == record.signal_mV.shape[1]
            checked += 1
        elif row["labels"] == "MI":
            assert not any(record.labels.values())  # not one of the 26
        else:
            assert {SIDECAR_NAMES.get(item.casefold()) for item in row["labels"].split("|")} != {None}, name
    assert checked == 55


def test_cpsc2018_names_codes_and_reference(shared_data: Path, tmp_path: Path) -> None:
    records = kept(read("cpsc2018", shared_data / "cpsc2018"))
    assert len(records) == 100
    label_of = {"Normal": "NORM", "AF": "AFIB", "I-AVB": "1AVB"}
    with (shared_data / "cpsc2018" / "labels.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            record = records[row["record"]]
            assert set(record.labels) == set(LABEL_SETS["cpsc9"])
            expected = {label_of.get(name, name) for name in row["labels"].split("|")}
            assert {code for code, value in record.labels.items() if value} == expected
            assert record.age == min(float(row["age"]), 90) and record.sex == row["sex"][0]
    folder = tmp_path / "training" / "cpsc_2018"
    write_wfdb(folder / "g1", "A0001", suffix=".mat", comments=("Dx: 164884008,429622005",))
    write_wfdb(folder / "g2", "A1001", suffix=".mat", comments=("Dx: 426783006",))
    write_wfdb(folder / "g2", "A1002", suffix=".mat", comments=("Dx: 713422000",))
    write_wfdb(tmp_path / "training" / "georgia" / "g1", "E00001", suffix=".mat", comments=("Dx: 426783006",))
    found = read("cpsc2018", tmp_path)
    assert reasons(found) == {"A1002": "none of the nine classes"}
    yes = {name: {code for code, value in record.labels.items() if value} for name, record in kept(found).items()}
    assert yes == {"A0001": {"PVC", "STD"}, "A1001": {"NORM"}}


# LUDB


def test_ludb_as_published(tmp_path: Path) -> None:
    spans = np.ptp(STEPS.astype(int), axis=1)
    gains = [f"{span}({index - 6})/mV" for index, span in enumerate(spans)]
    write_wfdb(tmp_path / "data", "1", leads=[lead.lower() for lead in LEADS], gains=gains)
    write_wfdb(tmp_path / "data", "2", leads=[lead.lower() for lead in LEADS])
    rows = [
        {"ID": "1", "Sex": "F\n", "Age": ">89\n", "Rhythms": "Sinus rhythm", "Hypertrophies": ""},
        {"ID": "2", "Sex": "M\n", "Age": "51\n", "Rhythms": "Atrial fibrillation", "Hypertrophies": "Left atrial x\n"},
    ]
    write_csv(tmp_path / "ludb.csv", rows)
    records = kept(read("ludb", tmp_path))
    for record in records.values():
        assert_allclose(record.signal_mV, STEPS / np.float32(1000), atol=1e-6)
    assert records["1"].repairs == ("per-lead scaling undone: counts read as uV",) and records["2"].repairs == ()
    assert (records["1"].age, records["1"].sex, records["2"].age) == (90, "F", 51)
    assert records["1"].labels["NORM"] and records["2"].labels["LAE"]


def test_ludb_obeys_einthoven_once_its_scaling_is_undone(shared_data: Path) -> None:
    found = read("ludb", shared_data / "ludb")
    records = kept(found)
    assert len(records) == 140 and Counter(reasons(found).values()) == {"listed, but not in this copy": 60}
    for record in records.values():
        lead = dict(zip(LEADS, record.signal_mV, strict=True))
        assert_allclose(lead["I"] + lead["III"], lead["II"], atol=1e-5)
        assert_allclose(2 * lead["aVR"], -lead["I"] - lead["II"], atol=0.00101)
    raw = wfdb.rdrecord(str(shared_data / "ludb" / "data" / "1"))
    assert np.abs(raw.p_signal[:, 0] + raw.p_signal[:, 2] - raw.p_signal[:, 1]).max() > 0.1  # as published it does not


# WFDB


@pytest.mark.parametrize("folder", ["ludb", "ptbxl", "cpsc2018", "cinc2021", "code15_wfdb"])
def test_signals_equal_those_of_the_wfdb_package(shared_data: Path, folder: str) -> None:
    source = Source(shared_data / folder)
    paths = source.find(".hea")
    for path in paths[:: max(len(paths) // 25, 1)]:
        header = read_header(source, path)
        raw = read_signal(source, header)
        reference = wfdb.rdrecord(str(source.path(header.stem)))
        assert list(raw.leads) == reference.sig_name and list(raw.units) == reference.units
        assert header.fs_hz == reference.fs
        in_uV = all(1000 % channel.gain == 0 for channel in header.channels if channel.gain)
        assert_allclose(raw.values.T, reference.p_signal, rtol=0, atol=2e-6 if in_uV else 0.000502)


def test_extra_leads_in_a_missing_file_are_not_needed(shared_data: Path) -> None:
    source = Source(shared_data / "other" / "wfdb")  # PTB: 12 leads in .dat, vx vy vz in an .xyz that is not there
    raw = read_signal(source, read_header(source, "s0010_re.hea"))
    assert raw.values.shape == (12, 38400)


def test_other_formats_go_through_wfdb(tmp_path: Path) -> None:
    wfdb.wrsamp(
        "x212",
        fs=257,
        units=["mV"] * 12,
        sig_name=list(LEADS),
        d_signal=STEPS.T.astype(np.int64),
        fmt=["212"] * 12,
        adc_gain=[1000.0] * 12,
        baseline=[0] * 12,
        write_dir=str(tmp_path),
    )
    source = Source(tmp_path)
    header = read_header(source, "x212.hea")
    assert header.fs_hz == 257 and header.channels[0].format == 212
    assert_allclose(read_signal(source, header).values, STEPS / np.float32(1000), atol=1e-6)
    assert len(source.taken()) == 2


def test_invalid_samples_baseline_and_units(tmp_path: Path) -> None:
    steps = STEPS.copy()
    steps[3, 7] = -32768
    write_wfdb(tmp_path, "x", steps, gains=("200(100)/uV",) * 11 + ("0",))
    source = Source(tmp_path)
    raw = read_signal(source, read_header(source, "x.hea"))
    assert raw.units == ("uV",) * 11 + ("mV",)
    assert_array_equal(np.argwhere(np.isnan(raw.values)), [[3, 7]])
    assert_allclose(raw.values[0], (steps[0].astype(float) - 100) / 200, rtol=1e-5)
    assert_allclose(raw.values[11], steps[11] / 200, rtol=1e-5)  # WFDB: no gain means 200


def test_damaged_records_are_refused_with_a_reason(tmp_path: Path) -> None:
    comments = ("Dx: 426783006",)
    flat, nan = STEPS.copy(), STEPS.copy()
    flat[4], nan[4, 100:200] = 3, -32768
    write_wfdb(tmp_path, "A0001", suffix=".mat", comments=comments)
    write_wfdb(tmp_path, "A0002", suffix=".mat", comments=comments, said=6000)
    write_wfdb(tmp_path, "A0003", suffix=".mat", comments=comments, said=4000)
    write_wfdb(tmp_path, "A0004", flat, suffix=".mat", comments=comments)
    write_wfdb(tmp_path, "A0005", nan, suffix=".mat", comments=comments)
    write_wfdb(
        tmp_path, "A0006", STEPS[:11], suffix=".mat", comments=comments, leads=LEADS[:11], gains=("1000/mV",) * 11
    )
    write_wfdb(tmp_path, "A0007", STEPS[:, :1000], suffix=".mat", comments=comments)
    write_wfdb(tmp_path, "A0008", suffix=".mat", comments=comments, record_line="A0008 13 500 5000")
    write_wfdb(tmp_path, "A0009", suffix=".mat", comments=comments)
    (tmp_path / "A0009.mat").unlink()
    write_wfdb(tmp_path, "A0010", suffix=".mat", comments=comments)
    (tmp_path / "A0010.hea").write_bytes(b"\xff\xfe\x00garbage\n#Dx: 426783006\n")
    write_wfdb(tmp_path, "A0011", suffix=".mat", comments=comments)
    (tmp_path / "A0011.mat").write_bytes(b"")
    write_wfdb(tmp_path, "A0012", suffix=".mat", comments=comments)
    header = tmp_path / "A0012.hea"
    header.write_text(header.read_text().replace("A0012.mat", "../../secret.mat"))
    write_wfdb(tmp_path, "A0013", suffix=".mat", comments=comments, record_line="A0013 12 1.2.3 5000")
    found = read("cpsc2018", tmp_path)
    assert reasons(found) == {
        "A0002": "truncated: the signal file holds 5000 of 6000 samples a lead",
        "A0003": "wrong length: the signal file holds 5000 samples a lead, the header says 4000",
        "A0004": "flat leads: aVL",
        "A0005": "gap: lead aVL has no numbers for 0.2 s",
        "A0006": "missing leads: V6",
        "A0007": "too short: 2.00 s, at least 5 s are needed",
        "A0008": "malformed header: 12 of 13 signal lines",
        "A0009": "missing file",
        "A0010": "malformed header: no record line",
        "A0011": "truncated: the signal file holds 0 of 5000 samples a lead",
        "A0012": "a file name leads out of the source folder",
        "A0013": "malformed: ValueError",
    }
    assert set(kept(found)) == {"A0001"}


# what readers share


def test_source_reads_once_and_hashes_the_same_anywhere(tmp_path: Path) -> None:
    hashes = []
    for place in ("a", "b"):
        (tmp_path / place / "sub").mkdir(parents=True)
        (tmp_path / place / "sub" / "x").write_text("1")
        (tmp_path / place / "y").write_text("2")
        source = Source(tmp_path / place)
        for name in ("sub/x", "y", "y") if place == "a" else ("y", "sub/x"):
            source.read(name)
        hashes.append(sorted(source.taken()))
        assert source.taken() == []
    assert hashes[0] == hashes[1] and [name for name, _, _ in hashes[0]] == ["sub/x", "y"]
    (tmp_path / "b" / "y").write_text("3")
    source.read("y")
    assert source.taken()[0][2] != hashes[0][1][2]


def test_a_signature_follows_names_sizes_and_times(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    for name in ("a", "sub/b"):
        (source / name).write_text("1")
    first = Source(source).signature()
    assert Source(source).signature() == first
    (source / "out").mkdir()
    (source / "out" / "x").write_text("1")
    assert Source(source).signature(apart=(source / "out",)) == first != Source(source).signature()
    (source / "sub" / "b").write_text("2")
    os.utime(source / "sub" / "b", (1, 1))
    changed = Source(source).signature(apart=(source / "out",))
    (source / "sub" / "b").rename(source / "sub" / "c")
    assert len({first, changed, Source(source).signature(apart=(source / "out",))}) == 3


@pytest.mark.parametrize("name", ["../x", "sub/../../x", "/etc/passwd", ".."])
def test_source_refuses_paths_that_lead_out(tmp_path: Path, name: str) -> None:
    with pytest.raises(Unfit, match="leads out"):
        Source(tmp_path).read(name)


def test_splits_hang_on_the_patient_and_the_seed_alone() -> None:
    counts = Counter(split_of(f"p{number}", 0) for number in range(5000))
    assert abs(counts["train"] / 5000 - 0.8) < 0.02 and abs(counts["val"] / 5000 - 0.1) < 0.015
    assert [split_of(f"{number}", 0) for number in range(50)] != [split_of(f"{number}", 1) for number in range(50)]
    # worked out by hand from SHA-256: the same on every machine and in every run
    assert [split_of(name, 0) for name in ("A0001", "A0003", "A0018", "A0033")] == ["train", "val", "val", "test"]


@pytest.mark.parametrize(
    ("text", "age"),
    [
        ("56.0", 56),
        (" 51\n", 51),
        (">89", 90),
        ("300", 90),
        ("89", 89),
        ("89.5", 90),
        ("NaN", None),
        ("", None),
        ("-1", None),
    ],
)
def test_ages(text: str, age: float | None) -> None:
    assert parse_age(text) == age


def test_sexes() -> None:
    assert [parse_sex(text) for text in ("F\n", "female", "Male", "m", "Unknown", "")] == [
        "F",
        "F",
        "M",
        "M",
        None,
        None,
    ]


def test_a_download_is_found_below_its_wrapping(tmp_path: Path) -> None:
    deep = tmp_path / "physionet.org" / "files" / "ptb-xl" / "1.0.3"
    deep.mkdir(parents=True)
    write_ptbxl(deep)
    assert home_of("ptbxl", tmp_path) == deep == home_of("ptbxl", deep)
    assert home_of("ludb", tmp_path) is None
    other = tmp_path / "physionet.org" / "files" / "ptb-xl" / "1.0.1"
    other.mkdir()
    write_ptbxl(other)
    assert home_of("ptbxl", tmp_path) is None  # which of the two?


def test_generated_records_carry_the_wanted_labels_only() -> None:
    options = ReadOptions(labels=("AFIB", "MI", "LVH"), counts={"test": 2})
    reading = READERS["synthetic"].open(None, options)  # type: ignore[arg-type]
    found = list(reading.records())
    assert reading.total == len(found) == 2
    assert all(isinstance(item, Record) and set(item.labels) == {"AFIB", "MI"} for item in found)


def test_table_rows_are_complete() -> None:
    for name, reader in READERS.items():
        assert reader.title and reader.licence
        if reader.labels:  # the dataset of a publisher, and not any folder of a user's
            assert reader.citation and resolve_labels(reader.labels)
        assert bool(reader.get) == reader.needs_source == bool(reader.needs)
        assert all(f"data/{name}" in command for command in reader.get)
    with pytest.raises(EvlecgError, match="did you mean 'ptbxl'"):
        find_reader("ptb-xl")
