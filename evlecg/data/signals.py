"""From the file names of dialogue datasets back to the recorded signals, and to the patients behind them.

ECGInstruct, ECGBench, ECG-Grounding and ECG-R1 name pictures and records of other datasets, each under its own root
folder. An `Ecg` is the same for all names of one recording, so that its questions meet in one record, and so that a
recording in one dataset can be recognised in another.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from evlecg.data.dialogues import inside
from evlecg.data.gates import mend
from evlecg.data.readers_base import Source, locate, parse_age
from evlecg.data.readers_ptbxl import TABLES
from evlecg.data.readers_wfdb import read_header, read_signal
from evlecg.errors import EvlecgError
from evlecg.schema import Record

# Folder in a file name -> dataset of the recording. The last four are the names of the GEM and ECG-R1 trees.
ROOTS = {
    "mimic": "mimic",
    "mimic_v4": "mimic",
    "mimic-iv-ecg": "mimic",
    "ptb-xl": "ptb-xl",
    "ptbxl": "ptb-xl",
    "code15": "code15",
    "code15_v4": "code15",
    "mimic-iv": "mimic",
    "mimic_gen": "mimic",
    "cod15_v4": "code15",
    "ecg_ptbxl_benchmarking": "ptb-xl",
}
OWN_FOLDERS = ("", "ecg_timeseries/")  # where a dialogue dataset itself may hold signals

_PTBXL = re.compile(r"(\d{5})_[hl]r(?:-\d+)?")
_MIMIC = re.compile(r"(?:^|/)(p\d{4,}/(p\d{5,})/s\d+/(\d+))(?:-\d+)?$")
_UNUSABLE = re.compile(r"[^A-Za-z0-9_./-]")


@dataclass(frozen=True)
class Ecg:
    """One recording.

    Attributes:
        id: `ptb-xl/00001`, `mimic/40689238`, `code15/2508875`; of other datasets root and path.
        root: its dataset, as `--signals ROOT=DIR` names it.
        stems: where its header may lie below the folder of the dataset, without `.hea`; the first one there is taken.
        patient: who it is of, as far as its name tells; else its own id.
    """

    id: str
    root: str
    stems: tuple[str, ...]
    patient: str


class Person(NamedTuple):
    """Whose recording it is, from a table."""

    patient: str
    age: float | None
    sex: str | None


def ptbxl_ecg(number: int) -> Ecg:
    """The recording with a PTB-XL `ecg_id`."""
    name = f"{number:05d}"
    stems = tuple(
        f"records{fs}/{folder}{name}_{suffix}"
        for fs, suffix in ((500, "hr"), (100, "lr"))
        for folder in (f"{number // 1000 * 1000:05d}/", "")
    )
    return Ecg(f"ptb-xl/{name}", "ptb-xl", stems, f"ptb-xl/{name}")


def mimic_ecg(study: str, patient: str = "", path: str = "") -> Ecg:
    """The recording of a MIMIC-IV-ECG study; `path` below the dataset, without extension, where it is known."""
    name = f"mimic/{study}"
    return Ecg(name, "mimic", (path,) if path else (), f"mimic/{patient}" if patient else name)


def ecg_of(path: str, root: str = "") -> Ecg:
    """The recording behind the name of a picture or of a WFDB record.

    `NNNNN_hr-0.png` is PTB-XL's record NNNNN; `.../pNNNN/pNNNNNNNN/sNNNNNNNN/NNNNNNNN-0.png` is of MIMIC-IV-ECG and
    says the patient; otherwise the first folder is the dataset, and the extension and `-0` are dropped.

    Args:
        path: as the dialogue file has it.
        root: the dataset, where the path has no folder.
    """
    parts = [part for part in path.split("/") if part not in ("", ".")]
    name = re.sub(r"\.(png|jpe?g|hea|dat|mat)$", "", "/".join(parts), flags=re.IGNORECASE)
    if match := _PTBXL.fullmatch(name.rpartition("/")[2]):
        return ptbxl_ecg(int(match[1]))
    if match := _MIMIC.search(name):
        return mimic_ecg(match[3], match[2], f"files/{match[1]}")
    name = re.sub(r"-\d+$", "", name)
    known = next((number for number, part in enumerate(parts[:-1]) if part in ROOTS), 0 if len(parts) > 1 else -1)
    folders = name.split("/")
    if known >= 0:
        root, folders = ROOTS.get(parts[known], parts[known]), folders[known + 1 :]
    stem = "/".join(folders)
    identity = record_id(f"{root}/{stem}" if root else stem)
    return Ecg(identity, root, tuple(dict.fromkeys((stem, folders[-1]))), identity)


def record_id(text: str) -> str:
    """A name as a record id: other characters are replaced, and a hash then keeps different names different."""
    plain = _UNUSABLE.sub("_", text)
    if plain == text and text:
        return text
    return f"{plain}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def plain(text: str) -> str:
    """A name from a dialogue file as it may enter a reason: short, of plain characters."""
    return _UNUSABLE.sub("_", text)[:40]


class Signals:
    """The folders with signals: the user's (`--signals ROOT=DIR`) and the dialogue dataset's own.

    Args:
        source: the dialogue dataset.
        folders: root -> folder, roots in any of the spellings of `ROOTS`.

    Raises:
        EvlecgError: a folder does not exist.
    """

    def __init__(self, source: Source, folders: Mapping[str, Path]) -> None:
        self._own = source
        self._given: dict[str, Source] = {}
        for name, folder in folders.items():
            if not folder.is_dir():
                raise EvlecgError("a folder of signals does not exist", where=f"--signals {name}={folder}")
            root = ROOTS.get(name, name)
            self._given[root] = Source(_home(root, folder))

    def given(self, root: str) -> Source | None:
        """The user's folder for a dataset."""
        return self._given.get(root)

    @property
    def roots(self) -> tuple[str, ...]:
        return tuple(self._given)

    def find(self, ecg: Ecg, own: str = "") -> tuple[Source, str] | None:
        """Where the header of a recording lies: folder and stem; None where it is not in this copy.

        Args:
            ecg: the recording.
            own: the path that the dialogue file gives; looked up in its own folder where the user gave none.

        Raises:
            Unfit: `own` leads out of the source folder.
        """
        if own:
            inside(self._own, own)
        given = self._given.get(ecg.root)
        if given is not None:
            for stem in ecg.stems:
                if given.exists(f"{stem}.hea"):
                    return given, stem
        if own:
            for folder in OWN_FOLDERS:
                stem = inside(self._own, f"{folder}{own.removesuffix('.hea')}")
                if self._own.exists(f"{stem}.hea"):
                    return self._own, stem
        return None

    def people(self) -> dict[str, Person]:
        """Recording -> patient, from PTB-XL's table, where the user gave that dataset; MIMIC's names say it."""
        source = self._given.get("ptb-xl")
        table = next((name for name in TABLES if source and source.exists(name)), None)
        if source is None or table is None:
            return {}
        rows = csv.DictReader(io.StringIO(source.text(table), newline=""))
        return {
            f"ptb-xl/{int(float(row['ecg_id'])):05d}": Person(
                f"ptb-xl/patient-{int(float(row['patient_id']))}",
                parse_age(row.get("age") or ""),
                {"0": "M", "1": "F"}.get((row.get("sex") or "").strip().removesuffix(".0")),
            )
            for row in rows
            if row.get("patient_id")
        }

    def mimic_studies(self, wanted: set[str]) -> dict[str, Ecg]:
        """Study -> recording, from MIMIC-IV-ECG's record_list.csv (800,000 rows, streamed), for the wanted ones."""
        source = self._given.get("mimic")
        if source is None or not wanted or not source.exists("record_list.csv"):
            return {}
        with source.note("record_list.csv").open(newline="", encoding="utf-8-sig") as file:
            return {
                row["study_id"]: mimic_ecg(row["study_id"], f"p{row['subject_id']}", row["path"])
                for row in csv.DictReader(file)
                if row["study_id"] in wanted
            }


def signal_record(
    place: tuple[Source, str], *, id: str, patient_id: str, split: str, age: float | None, sex: str | None
) -> Record:
    """A record from its signal, checked and mended as everywhere; without labels, and without questions as yet.

    Raises:
        Unfit, OSError, ValueError: as in `read_header`, `read_signal` and `mend`.
    """
    source, stem = place
    header = read_header(source, f"{stem}.hea")
    raw = read_signal(source, header)
    mended = mend(raw.values, raw.leads, raw.units, header.fs_hz)
    return Record(
        id=id,
        patient_id=patient_id,
        signal_mV=mended.signal_mV,
        fs_hz=header.fs_hz,
        labels={},
        split=split,
        age=age,
        sex=sex,
        repairs=(*header.repairs, *mended.repairs),
    )


def _home(root: str, folder: Path) -> Path:
    """The dataset's top folder at or below `folder`, as far as a folder's name tells."""
    inner = {"ptb-xl": ("records500", "records100"), "mimic": ("files",)}.get(root, ())
    if not inner:
        return folder
    return locate(folder, lambda path: any((path / name).is_dir() for name in inner)) or folder
