"""Folders of WFDB records with a table of labels: what a table may look like, and what it may not."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from evlecg.data.identity import hashed
from evlecg.data.readers import READERS, ReadOptions, Rejected, Source, detect, home_of
from evlecg.data.readers_base import Reading, split_of
from evlecg.data.readers_table import Table, holds_file, read_table
from evlecg.data.store import Prepared
from evlecg.errors import EvlecgError
from evlecg.prepare import prepare
from evlecg.schema import Record
from tests.test_readers import STEPS, kept, reasons, write_wfdb


def open_at(folder: Path, table: Path | None = None, labels: tuple[str, ...] = ()) -> Reading:
    home = home_of("wfdb", folder)
    assert home == folder
    return READERS["wfdb"].open(Source(home), ReadOptions(labels, table=table))  # type: ignore[arg-type]


def read(folder: Path, table: Path | None = None, labels: tuple[str, ...] = ()) -> dict[str, Record | Rejected]:
    return {item.id: item for item in open_at(folder, table, labels).records()}


def table_of(tmp_path: Path, text: str) -> Table:
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
    table = read_table(Source(tmp_path), ReadOptions(()))
    assert table is not None
    return table


FULL = """record,patient_id,split,age,sex,device,report,AFIB,old_scar,_note,weight,STEMI
ward1/a,77001,train,63,F,MAC 5500,"sinus rhythm, old scar",0,1,x1,70,
ward1/b,77001,train,,Male,,,1,0,,80,0
c.hea,,validation,90+,,,,true,,,,1
"""


def test_folder_with_everything(tmp_path: Path) -> None:
    write_wfdb(tmp_path / "ward1", "a", fs_hz=500)
    write_wfdb(tmp_path / "ward1", "b", comments=("Age: 55", "Sex: F"))
    write_wfdb(tmp_path / "ward2", "c", suffix=".mat", gains=("",) * 12, comments=("Age: 40", "Name: Smith"))
    write_wfdb(tmp_path, "stray")
    (tmp_path / "labels.csv").write_text(FULL)
    (tmp_path / "labels.yaml").write_text("old_scar: an old scar\n")
    reading = open_at(tmp_path)
    assert reading.descriptions == {"AFIB": "atrial fibrillation", "old_scar": "an old scar", "STEMI": "STEMI"}
    found = read(tmp_path)
    assert reasons(found) == {hashed("stray"): "no row in the label table"}
    first, second, third = (kept(found)[name] for name in ("ward1/a", "ward1/b", "ward2/c"))
    assert first.labels == {"AFIB": False, "old_scar": True}  # an empty cell was not assessed
    assert second.labels == {"AFIB": True, "old_scar": False, "STEMI": False}
    assert third.labels == {"AFIB": True, "STEMI": True}
    assert_allclose(first.signal_mV, STEPS / np.float32(1000))
    assert (first.age, first.sex, first.device, first.report) == (63, "F", "MAC 5500", "sinus rhythm, old scar")
    assert (second.age, second.sex) == (55, "M")  # the header fills what the table leaves empty
    assert first.patient_id == second.patient_id == hashlib.sha256(b"77001").hexdigest()[:16]
    assert third.patient_id == hashed("ward2/c") and third.split == "val"
    assert third.repairs == ("no gain in the header: 200 a mV, as WFDB says",)
    only = read(tmp_path, labels=("STEMI", "AFIB", "MI"))["ward1/b"]
    assert isinstance(only, Record) and list(only.labels.items()) == [("STEMI", False), ("AFIB", True)]


def test_missing_ambiguous_and_escaping_records(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for ward in ("x", "y"):
        write_wfdb(folder / ward, "a")
    write_wfdb(tmp_path, "secret")
    rows = ["record,AFIB", "a,1", "x/a,0", "gone,1", "../secret,1", "/etc/passwd,1", "x/../../other,0"]
    (folder / "labels.csv").write_text("\n".join(rows))
    found = list(open_at(folder).records())
    assert [(item.id, item.reason, item.fault) for item in found if isinstance(item, Rejected)] == [
        ("a", "ambiguous: several records of this name, give the path", True),
        (hashed("gone"), "listed, but not in this folder", False),
        (f"../{hashed('secret')}", "a file name leads out of the source folder", True),
        (f"/{hashed('etc')}/{hashed('passwd')}", "a file name leads out of the source folder", True),
        (f"../{hashed('other')}", "a file name leads out of the source folder", True),
    ]
    assert [item.id for item in found if isinstance(item, Record)] == ["x/a"]


def test_escaping_twice_is_one_record(tmp_path: Path) -> None:
    """The same file under two names would be two rows of one record."""
    with pytest.raises(EvlecgError, match="two rows for x/a"):
        table_of(tmp_path, "record,AFIB\nx/a,1\nx/../x/a.dat,0\n")


@pytest.mark.parametrize("key", ["record", "id", "file_name", "filename", "Path"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_names_of_the_record_column_and_delimiters(tmp_path: Path, key: str, delimiter: str) -> None:
    rows = [[key, "Age", "AF"], ["s\\1.HEA", "61", "1"], ["./s/2.dat", "", "no"]]
    table = table_of(tmp_path, "\ufeff" + "\r\n".join(delimiter.join(row) for row in rows))
    assert {name: row.labels for name, row in table.rows.items()} == {"s/1": {"AF": True}, "s/2": {"AF": False}}
    assert table.rows["s/1"].age == "61" and table.labels == {"AF": "AF"}


def test_record_wins_over_other_names_of_it(tmp_path: Path) -> None:
    table = table_of(tmp_path, "id,record,AFIB\n17,a,1\n18,b,0\n")
    assert list(table.rows) == ["a", "b"]


def test_one_column_of_codes(tmp_path: Path) -> None:
    table = table_of(tmp_path, "record,labels,fs\na,AFIB|scar,500\nb,none,1\nc,,0\nd,scar ;WPW,1\n")
    assert {name: row.labels for name, row in table.rows.items()} == {
        "a": {"AFIB": True, "WPW": False, "scar": True},
        "b": {"AFIB": False, "WPW": False, "scar": False},
        "c": {},
        "d": {"AFIB": False, "WPW": True, "scar": True},
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name,AFIB\na,1\n", r"no column `record` .*it begins: name,AFIB"),
        ("record,age\na,63\n", r"no label column .*it begins: record,age; it needs one column `record`"),
        ("record,AFIB\n", "has no rows"),
        ("record,AFIB\na,1\na,0\n", "two rows for a .*row 3"),
        ("record,AFIB\n,1\n", "names no record .*row 2"),
        ("record,AFIB,AFIB\na,1,1\n", "two columns of one name"),
        ("record,AFIB\na,1\nb,maybe\n", "the column 'AFIB' of the label table holds 'maybe'.*row 3.*begins with _"),
        ("record,split,AFIB\na,holdout,1\n", "unknown split 'holdout' .*row 2.*train, val, test"),
        ("record,labels,AFIB\na,x,1\n", "a column `labels`, and label columns: AFIB"),
    ],
)
def test_tables_that_cannot_be_understood(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(EvlecgError, match=reason):
        table_of(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("scra: an old scar", "does not have: scra .*it has: AFIB, scar"),
        ("[AFIB]", "no list of `code: phrase`"),
        ("AFIB: 3", "no list of `code: phrase`"),
        ("a: b: c", "no YAML"),
    ],
)
def test_phrases_that_cannot_be_understood(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "labels.yaml").write_text(text)
    with pytest.raises(EvlecgError, match=reason):
        table_of(tmp_path, "record,AFIB,scar\na,1,0\n")


def test_without_a_table(tmp_path: Path) -> None:
    write_wfdb(tmp_path, "a")
    with pytest.raises(EvlecgError, match=r"needs a label table .*--table FILE with one column `record`"):
        open_at(tmp_path)
    assert home_of("wfdb", tmp_path / "nothing") is None
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "X.DCM").write_bytes(b"")
    assert holds_file(tmp_path, ".dcm") and not holds_file(tmp_path, ".xyz")


def test_prepared_from_a_table_elsewhere(tmp_path: Path) -> None:
    """A folder's own labels reach the prepared folder with their phrases; patients stay together."""
    rng = np.random.default_rng(0)
    for number in range(6):
        steps = rng.normal(0, 300, (12, 5000)).astype("<i2")
        write_wfdb(tmp_path / "in" / "sub", f"r{number}", steps)
    table = tmp_path / "mine.csv"
    table.write_text(
        "id,patient_id,scar,report\n" + "".join(f"r{number},H{number // 2},{number % 2},\n" for number in range(5))
    )
    (tmp_path / "mine.yaml").write_text("scar: an old scar\n")
    done = prepare("wfdb", source=tmp_path / "in", out=tmp_path / "out", table=table, workers=1)
    assert (done.n_kept, done.n_dropped, done.positives, done.n_patients) == (5, 1, {"scar": 2}, 3)
    folder = Prepared.open(tmp_path / "out")
    assert folder.label_descriptions == {"scar": "an old scar"}
    assert folder.record_ids[0] == "sub/r0" and set(folder.patient_ids) == {hashed(f"H{k}") for k in range(3)}
    assert "H1" not in (tmp_path / "out" / "records.jsonl").read_text()
    assert folder.record(0).split == split_of(hashed("H0"), 0)


def test_nobody_is_named(tmp_path: Path) -> None:
    """Hospital files: people in file names, numbers and reports; also where a record is refused."""
    rng = np.random.default_rng(0)
    names = ("Mueller Änna_1954-03-02", "20200512_7", "A0003", "Broken_Bert")
    for name in names:
        steps = rng.normal(0, 300, (12, 5000)).astype("<i2")
        comments = ("Name: Mueller", "Date: 12-May-2020", "Age: 56")
        write_wfdb(tmp_path / "in", name, steps if name != "Broken_Bert" else 0 * steps, comments=comments)
        (tmp_path / "in" / f"{name}.hea").write_text(  # names with blanks cannot stand in a header
            (tmp_path / "in" / f"{name}.hea").read_text(encoding="utf-8").replace(name, "r1"), encoding="utf-8"
        )
    report = "QTc 480 ms, caused by drugs. Confirmed by Dr. Weber on 12.05.2020. Old scar."
    rows = [f'"{name}",4711{place},1,"{report}"' for place, name in enumerate(names)]
    (tmp_path / "in" / "labels.csv").write_text("record,patient_id,AFIB,report\n" + "\n".join(rows), encoding="utf-8")
    done = prepare("wfdb", source=tmp_path / "in", out=tmp_path / "out", workers=1)
    assert (done.n_kept, done.n_rejected) == (3, 1)
    folder = Prepared.open(tmp_path / "out")
    assert folder.record_ids == (hashed(names[0]), hashed(names[1]), "A0003")
    assert folder.record(0).report == "QTc 480 ms, caused by drugs. Old scar"
    assert folder.record(0).repairs == ("1 statements left out: they may name someone",)
    for path in (tmp_path / "out").glob("*.json*"):
        text = path.read_text(encoding="utf-8")
        assert not [word for word in ("Mueller", "Bert", "1954", "2020", "Weber", "4711") if word in text], path.name


def test_real_folder_with_its_own_table(shared_data: Path) -> None:
    """CODE-15 as WFDB: labels.csv holds numbers, too, which are no labels."""
    folder = shared_data / "code15_wfdb"
    reading = open_at(folder)
    assert reading.descriptions == {"chagas": "chagas"}
    found = {item.id: item for item in reading.records()}
    assert len(found) == 120 and len(kept(found)) == 114
    with (folder / "labels.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            item = found[row["record"]]
            if isinstance(item, Record):
                assert item.labels == {"chagas": row["chagas"] == "True"}
                assert item.sex == row["sex"][0] and item.patient_id == hashed(row["patient_id"])


def test_any_folder_is_detected_last(tmp_path: Path) -> None:
    """A wrapped dataset is found before the folder around it is taken for a folder of records."""
    write_wfdb(tmp_path / "physionet.org" / "files" / "ludb", "1")
    assert detect(tmp_path) == "wfdb"
    (tmp_path / "physionet.org" / "files" / "ludb" / "ludb.csv").write_text("ID\n1\n")
    assert detect(tmp_path) == "ludb"
    assert detect(tmp_path / "nothing") is None
