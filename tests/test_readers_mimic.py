"""MIMIC-IV-ECG in miniature, in the true layout, and the cart's statements as labels."""

from __future__ import annotations

import csv
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from evlecg.data.labels import LABEL_SETS, resolve_labels
from evlecg.data.readers import READERS, ReadOptions, Rejected, Source, home_of
from evlecg.data.readers_base import Reading, split_of
from evlecg.data.readers_mimic import STATEMENTS, _statement_offsets, machine_labels
from evlecg.data.store import Prepared
from evlecg.errors import EvlecgError
from evlecg.prepare import prepare
from evlecg.schema import Record
from tests.test_readers import STEPS, kept, reasons, write_wfdb

LEADS = ("I", "II", "III", "aVR", "aVF", "aVL", "V1", "V2", "V3", "V4", "V5", "V6")  # aVF before aVL, as published
WANTED = LABEL_SETS["mimic-machine"]
MEASURED = ("rr_interval", "p_onset", "p_end", "qrs_onset", "qrs_end", "t_end", "p_axis", "qrs_axis", "t_axis")

STUDIES = {  # study -> (patient, statements, whether its files are in this copy)
    40689238: (10000032, ["Sinus rhythm", "Normal ECG"], True),
    44458630: (10000032, ["Sinus tachycardia", 'T wave changes, "may be" ischemia', "Abnormal ECG"], True),
    49036311: (10000117, ["Atrial fibrillation", "*** Age not entered, assumed to be 50 years old ***"], False),
    45090959: (10000117, [], True),
    40000001: (10000248, None, True),  # no line of measurements
}


def write_mimic(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    records, measured = [], []
    for study, (patient, statements, there) in STUDIES.items():
        path = f"files/p{patient // 10000}/p{patient}/s{study}/{study}"
        records.append([patient, study, study, "2180-07-23 08:44:00", path])
        if statements is not None:
            texts = [*statements, *[""] * (18 - len(statements))]
            measured.append([patient, study, 6848296, "2180-07-23 08:44:00", *texts, "0.005-150 Hz", "60 Hz notch"])
            measured[-1] += [659, 40, 128, 170, 258, 518, 81, 77, 75]
        if there:
            folder = (root / path).parent
            steps = np.roll(STEPS, study, axis=1) // 5
            write_wfdb(folder, str(study), steps, leads=LEADS, gains=("200.0(0)/mV",) * 12, comments=("subject 1",))
            header = folder / f"{study}.hea"
            text = header.read_text().replace(" 5000\n", " 5000 08:44:00 23/07/2180\n", 1)
            header.write_text(text)
    with (root / "record_list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["subject_id", "study_id", "file_name", "ecg_time", "path"], *records])
    names = ["subject_id", "study_id", "cart_id", "ecg_time", *(f"report_{k}" for k in range(18))]
    with (root / "machine_measurements.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "bandwidth", "filtering", *MEASURED])
        writer.writerows(reversed(measured))  # another order than the list's


def open_at(folder: Path, labels: str = "mimic-machine") -> Reading:
    home = home_of("mimic-iv-ecg", folder)
    assert home is not None
    return READERS["mimic-iv-ecg"].open(Source(home), ReadOptions(resolve_labels(labels)))  # type: ignore[arg-type]


def read(folder: Path) -> dict[str, Record | Rejected]:
    return {item.id: item for item in open_at(folder).records()}


def test_as_published(tmp_path: Path) -> None:
    write_mimic(tmp_path / "physionet.org" / "files" / "mimic-iv-ecg" / "1.0")
    found = read(tmp_path)
    assert list(found) == [str(study) for study in STUDIES]
    assert reasons(found) == {"49036311": "listed, but not in this copy"}
    records = kept(found)
    first, second = records["40689238"], records["44458630"]
    steps = np.roll(STEPS, 40689238, axis=1) // 5
    assert_allclose(first.signal_mV[[0, 4, 5, 11]], steps[[0, 5, 4, 11]] / 200, rtol=1e-6)  # leads by name
    assert first.patient_id == second.patient_id == "10000032" and first.split == split_of("10000032", 0)
    assert first.report == "Sinus rhythm. Normal ECG" and first.device == "cart 6848296"
    assert second.report == 'Sinus tachycardia. T wave changes, "may be" ischemia. Abnormal ECG'
    assert {code for code, value in first.labels.items() if value} == {"NORM", "SR"}
    assert {code for code, value in second.labels.items() if value} == {"STACH", "TAB", "STTC"}
    for study in ("45090959", "40000001"):
        assert records[study].labels == {} and records[study].report == ""
    assert records["45090959"].device == "cart 6848296" and records["40000001"].device == ""


def test_lines_about_the_form_are_no_report(tmp_path: Path) -> None:
    write_mimic(tmp_path)
    (tmp_path / "files/p1000/p10000117/s49036311").mkdir(parents=True)
    write_wfdb(tmp_path / "files/p1000/p10000117/s49036311", "49036311", leads=LEADS)
    record = kept(read(tmp_path))["49036311"]
    assert record.report == "Atrial fibrillation" and record.labels["AFIB"]


def test_samples_without_a_number(tmp_path: Path) -> None:
    """MIMIC has NaN samples: short runs are bridged, long ones refused."""
    write_mimic(tmp_path)
    for study, n_missing in ((40689238, 20), (44458630, 200)):
        path = next(tmp_path.rglob(f"{study}.dat"))
        steps = np.frombuffer(path.read_bytes(), "<i2").reshape(-1, 12).copy()
        steps[1000 : 1000 + n_missing, 4] = -32768
        path.write_bytes(steps.tobytes())
    found = read(tmp_path)
    assert kept(found)["40689238"].repairs == ("bridged gaps of at most 50 ms in aVF",)
    assert reasons(found)["44458630"] == "gap: lead aVF has no numbers for 0.4 s"


def test_without_measurements_or_columns(tmp_path: Path) -> None:
    write_mimic(tmp_path)
    (tmp_path / "machine_measurements.csv").unlink()
    assert {record.report for record in kept(read(tmp_path)).values()} == {""}
    (tmp_path / "record_list.csv").write_text("subject_id,study_id\n1,2\n")
    with pytest.raises(EvlecgError, match=r"a column is missing: path .*it has: subject_id, study_id"):
        read(tmp_path)


def test_entries_travel(tmp_path: Path) -> None:
    write_mimic(tmp_path)
    entries = pickle.loads(pickle.dumps(list(open_at(tmp_path).entries)))
    reading = open_at(tmp_path)
    assert reading.read(entries[1]).report.startswith("Sinus tachycardia")
    assert reading.read(entries[0]).report.startswith("Sinus rhythm")


def test_statements_are_not_held_in_memory(tmp_path: Path) -> None:
    """20,000 lines of 500 bytes cost 16 bytes each."""
    line = "10000032,{},6848296,2180-07-23 08:44:00," + "Sinus rhythm with a long remark," * 14 + "\n"
    with (tmp_path / "machine_measurements.csv").open("w") as file:
        file.write("subject_id,study_id,cart_id\n")
        file.writelines(line.format(90_000_000 - number) for number in range(20_000))
    tracemalloc.start()
    studies, offsets = _statement_offsets(Source(tmp_path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2e6 and len(studies) == 20_000 and (np.diff(studies) > 0).all()
    with (tmp_path / "machine_measurements.csv").open("rb") as file:
        file.seek(int(offsets[17]))
        assert file.readline().split(b",")[1] == str(studies[17]).encode()


def test_prepared_with_its_reports(tmp_path: Path) -> None:
    write_mimic(tmp_path / "in")
    done = prepare("mimic-iv-ecg", source=tmp_path / "in", out=tmp_path / "out", workers=1)
    assert (done.n_kept, done.n_dropped) == (2, 3)  # without a statement there is neither a label nor a report
    folder = Prepared.open(tmp_path / "out")
    assert folder.record(0).report == "Sinus rhythm. Normal ECG"
    assert "2180" not in (tmp_path / "out" / "records.jsonl").read_text()


# the statements


@pytest.mark.parametrize(
    ("statements", "present", "open_"),
    [
        ("Sinus rhythm|Normal ECG", "SR NORM", ""),
        ("Sinus rhythm", "SR", "NORM"),
        ("Sinus bradycardia|Normal ECG except for rate", "SBRAD", "NORM"),
        ("Sinus rhythm|Left axis deviation|Borderline ECG", "SR LAD", "NORM"),
        ("Sinus rhythm|Left axis deviation|Normal ECG", "SR LAD", "NORM"),
        ("Sinus rhythm|Abnormal ECG", "SR", ""),
        ("Atrial fibrillation with rapid ventricular response", "AFIB", ""),
        ("Atrial fibrillation/flutter", "", "AFIB AFLT NORM"),
        ("Sinus rhythm with PAC(s)|Abnormal ECG", "SR PAC", ""),
        ("Sinus rhythm with PVC(s)|Abnormal ECG", "SR PVC", ""),
        ("Sinus rhythm with 1st degree A-V block|Abnormal ECG", "SR 1AVB CD", ""),
        ("Sinus rhythm with borderline 1st degree A-V block|Abnormal ECG", "SR", "1AVB CD"),
        ("Incomplete RBBB|Abnormal ECG", "IRBBB CD", ""),
        ("Incomplete left bundle branch block|Abnormal ECG", "ILBBB CD", ""),
        ("RBBB with left anterior fascicular block|Abnormal ECG", "RBBB LAFB CD", ""),
        ("RBBB with RAD - possible left posterior fascicular block|Abnormal ECG", "RBBB RAD CD", "LPFB"),
        ("Conduction defect of LBBB type|Abnormal ECG", "CD", ""),
        ("IV conduction defect|Abnormal ECG", "IVCD CD", ""),
        ("Inferior infarct - age undetermined|Abnormal ECG", "MI", ""),
        ("Possible anterior infarct - age undetermined|Abnormal ECG", "", "MI"),
        ("Poor R wave progression - cannot rule out septal infarct|Abnormal ECG", "PRWP", "MI"),
        ("QRS changes V3/V4 may be due to LVH but cannot rule out anterior infarct|Abnormal ECG", "", "LVH HYP MI"),
        ("Inferior ST elevation, CONSIDER ACUTE INFARCT|Abnormal ECG", "STE STTC", "MI"),
        ("*** INFERIOR INFARCT - POSSIBLY ACUTE ***|Abnormal ECG", "MI", ""),
        ("Left ventricular hypertrophy|Abnormal ECG", "LVH HYP", ""),
        ("Possible left ventricular hypertrophy|Left ventricular hypertrophy|Abnormal ECG", "LVH HYP", ""),
        ("Lateral T wave abnormality is probably due to the ventricular hypertrophy|Abnormal ECG", "TAB STTC", "HYP"),
        ("Prolonged QT interval|Abnormal ECG", "LNGQT STTC", ""),
        ("Borderline prolonged QT interval|Abnormal ECG", "", "LNGQT STTC"),
        ("Low QRS voltages in limb leads|Abnormal ECG", "LVOLT", ""),
        ("No evidence of infarct|Sinus rhythm|Normal ECG", "SR NORM", ""),
        ("Impact of pacsite|Abnormal ECG", "", ""),  # whole words only
    ],
)
def test_statements(statements: str, present: str, open_: str) -> None:
    labels = machine_labels(WANTED, statements.split("|"))
    assert {code for code, value in labels.items() if value} == set(present.split())
    assert set(WANTED) - set(labels) == set(open_.split())


def test_where_the_program_gave_up_nothing_else_is_assessed() -> None:
    assert machine_labels(WANTED, ["Pacemaker rhythm - no further analysis"]) == {"PACE": True}
    assert machine_labels(WANTED, ["--- Technically unsatisfactory tracing ---"]) == {}
    assert machine_labels(WANTED, ["Sinus rhythm", "*** Warning: Data quality may affect interpretation ***"]) == {
        "SR": True
    }
    assert machine_labels(WANTED, []) == machine_labels(WANTED, ["", " -- "]) == {}
    assert machine_labels(("AFIB", "MI"), ["Sinus rhythm"]) == {"AFIB": False, "MI": False}


def test_every_piece_can_be_found() -> None:
    """No piece is hidden by one above it, and all labels are in the set."""
    for piece, labels in STATEMENTS:
        assert set(labels) <= set(WANTED)
        if labels and not piece.startswith(("atrial fibrillation/", "atrial flutter/")):
            found = machine_labels(
                WANTED, [piece, "abnormal ecg"] if piece != "normal ecg" else [piece, "sinus rhythm"]
            )
            assert all(found[code] for code in labels), piece
