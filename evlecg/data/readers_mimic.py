"""MIMIC-IV-ECG: 800,035 ten-second records, and what the cart printed about each.

`record_list.csv` names the records, `machine_measurements.csv` (about 200 MB) holds the statements, `report_0` to
`report_17`. It is not loaded: one pass notes where each study's line begins, and the line is read with the record.

There are no labels but the cart's own statements. `STATEMENTS` reads them literally, as machine labels: they say what a
program saw, and a model trained on them learns that program. A statement that hedges ("possible", "consider", "cannot
rule out") makes its findings neither present nor absent; where the program gave up, nothing counts as assessed.
Patients are MIMIC's own pseudonyms; dates (shifted already) do not enter.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from evlecg.data.gates import mend
from evlecg.data.labels import LABEL_SETS, SINUS, judge
from evlecg.data.readers_base import Dropped, Lazy, Reading, ReadOptions, Source, split_of
from evlecg.data.readers_wfdb import read_header, read_signal
from evlecg.errors import EvlecgError
from evlecg.schema import Record

RECORDS = "record_list.csv"
MEASUREMENTS = "machine_measurements.csv"
_NEEDED = ("subject_id", "study_id", "path")

# A piece of a statement (in lower case, whole words) and the labels that it means. All pieces are looked for in this
# order, and what one has matched is gone for those below it: "incomplete rbbb" is never "rbbb". No label: seen, and
# nothing of ours.
# fmt: off
STATEMENTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    # summaries
    ("abnormal ecg", ()), ("otherwise normal ecg", ()), ("normal ecg except for rate", ()), ("normal ecg", ("NORM",)),
    ("accompanies the infarct", ()), ("reciprocal to inferior infarct", ()), ("normal variant", ()),
    # rhythm
    ("sinus rhythm", ("SR",)), ("sinus bradycardia", ("SBRAD",)), ("sinus tachycardia", ("STACH",)),
    ("sinus arrhythmia", ("SARRH",)), ("irregular sinus", ("SARRH",)),
    ("atrial fibrillation/flutter", ("AFIB", "AFLT")), ("atrial flutter/fibrillation", ("AFIB", "AFLT")),
    ("atrial fibrillation", ("AFIB",)), ("atrial fib", ("AFIB",)), ("atrial flutter", ("AFLT",)),
    ("supraventricular tachycardia", ("SVTAC",)), ("svt", ("SVTAC",)),
    ("pacemaker", ("PACE",)), ("pacing", ("PACE",)), ("paced", ("PACE",)),
    ("ventricular bigeminy", ("BIGU", "PVC")), ("bigeminal pvcs", ("BIGU", "PVC")), ("bigeminal pacs", ("BIGU", "PAC")),
    ("atrial bigeminy", ("BIGU", "PAC")), ("bigeminy", ("BIGU",)),
    ("ventricular trigeminy", ("TRIGU", "PVC")), ("trigeminy", ("TRIGU",)),
    # ectopic beats
    ("multiple pvcs", ("PVC",)), ("pvc(s)", ("PVC",)), ("pvcs", ("PVC",)), ("pvc", ("PVC",)),
    ("premature ventricular", ("PVC",)), ("ventricular premature", ("PVC",)), ("ventricular ectopic", ("PVC",)),
    ("pac(s)", ("PAC",)), ("pacs", ("PAC",)), ("pac", ("PAC",)), ("premature atrial", ("PAC",)),
    ("atrial premature", ("PAC",)), ("premature supraventricular", ("PAC",)), ("supraventricular ectopic", ("PAC",)),
    # conduction
    ("1st degree a-v block", ("1AVB", "CD")), ("1st degree av block", ("1AVB", "CD")),
    ("first degree a-v block", ("1AVB", "CD")), ("first degree av block", ("1AVB", "CD")),
    ("prolonged pr interval", ("1AVB", "CD")),
    ("2nd degree a-v block", ("2AVB", "CD")), ("2nd degree av block", ("2AVB", "CD")),
    ("second degree a-v block", ("2AVB", "CD")), ("second degree av block", ("2AVB", "CD")), ("mobitz", ("2AVB", "CD")),
    ("wenckebach", ("2AVB", "CD")),
    ("3rd degree a-v block", ("3AVB", "CD")), ("3rd degree av block", ("3AVB", "CD")),
    ("third degree a-v block", ("3AVB", "CD")), ("third degree av block", ("3AVB", "CD")),
    ("complete a-v block", ("3AVB", "CD")), ("complete av block", ("3AVB", "CD")),
    ("complete heart block", ("3AVB", "CD")),
    ("incomplete left bundle branch block", ("ILBBB", "CD")), ("incomplete lbbb", ("ILBBB", "CD")),
    ("ilbbb", ("ILBBB", "CD")),
    ("incomplete right bundle branch block", ("IRBBB", "CD")), ("incomplete rbbb", ("IRBBB", "CD")),
    ("irbbb", ("IRBBB", "CD")),
    ("atypical lbbb", ("CD",)), ("atypical rbbb", ("CD",)), ("lbbb type", ("CD",)), ("rbbb type", ("CD",)),
    ("left bundle branch block type", ("CD",)), ("right bundle branch block type", ("CD",)),
    ("left bundle branch block", ("LBBB", "CD")), ("lbbb", ("LBBB", "CD")),
    ("right bundle branch block", ("RBBB", "CD")), ("rbbb", ("RBBB", "CD")),
    ("left anterior fascicular block", ("LAFB", "CD")), ("left posterior fascicular block", ("LPFB", "CD")),
    ("iv conduction defect", ("IVCD", "CD")), ("i.v. conduction defect", ("IVCD", "CD")),
    ("intraventricular conduction", ("IVCD", "CD")), ("iv conduction delay", ("IVCD", "CD")), ("ivcd", ("IVCD", "CD")),
    ("wpw", ("WPW", "CD")), ("wolff-parkinson-white", ("WPW", "CD")), ("ventricular preexcitation", ("WPW", "CD")),
    # chambers, axis and voltage
    ("left ventricular hypertrophy", ("LVH", "HYP")), ("lvh", ("LVH", "HYP")),
    ("right ventricular hypertrophy", ("RVH", "HYP")), ("rvh", ("RVH", "HYP")),
    ("biventricular hypertrophy", ("LVH", "RVH", "HYP")), ("ventricular hypertrophy", ("HYP",)),
    ("hypertrophy", ("HYP",)),
    ("left atrial abnormality", ("LAE", "HYP")), ("left atrial enlargement", ("LAE", "HYP")),
    ("right atrial abnormality", ("RAE", "HYP")), ("right atrial enlargement", ("RAE", "HYP")),
    ("biatrial enlargement", ("LAE", "RAE", "HYP")), ("biatrial abnormality", ("LAE", "RAE", "HYP")),
    ("left axis deviation", ("LAD",)), ("right axis deviation", ("RAD",)), ("lad occlusion", ()), ("lad", ("LAD",)),
    ("rad", ("RAD",)), ("leftward axis", ()), ("rightward axis", ()),
    ("low qrs voltage", ("LVOLT",)), ("low qrs voltages", ("LVOLT",)), ("low voltage", ("LVOLT",)),
    # waves
    ("infarct", ("MI",)), ("infarction", ("MI",)), ("stemi", ("MI",)),
    ("acute st elevation mi", ("MI", "STE", "STTC")),
    ("myocardial injury", ("STTC",)), ("injury/ischemia", ("STTC",)), ("ischemia", ("STTC",)),
    ("st elevation", ("STE", "STTC")), ("st depression", ("STD", "STTC")),
    ("st junctional depression", ("STD", "STTC")),
    ("st-t abnormality", ("TAB", "STTC")), ("st-t abnormalities", ("TAB", "STTC")), ("st-t changes", ("TAB", "STTC")),
    ("st-t change", ("TAB", "STTC")), ("st-t wave abnormality", ("TAB", "STTC")),
    ("st-t wave changes", ("TAB", "STTC")), ("st and t wave", ("TAB", "STTC")), ("t wave abnormality", ("TAB", "STTC")),
    ("t wave abnormalities", ("TAB", "STTC")), ("t wave changes", ("TAB", "STTC")),
    ("t abnormalities", ("TAB", "STTC")), ("t abnormality", ("TAB", "STTC")),
    ("repolarization abnormality", ("TAB", "STTC")),
    ("st abnormality", ("STTC",)), ("st changes", ("STTC",)),
    ("poor r wave progression", ("PRWP",)), ("poor r-wave progression", ("PRWP",)),
    ("prolonged qt", ("LNGQT", "STTC")), ("long qt", ("LNGQT", "STTC")),
)
# fmt: on
# Behind one of these, within its statement, nothing is certain ("borderline" grades a finding, and is one of them).
HEDGES = (
    "possible",
    "possibly",
    "probable",
    "probably",
    "consider",
    "cannot rule out",
    "can not rule out",
    "may be",
    "suggests",
    "suggest",
    "suggestive",
    "borderline",
    "if rhythm is confirmed",
    "cannot exclude",
    "versus",
    "or",
    "atrial fibrillation/flutter",
    "atrial flutter/fibrillation",
)  # fmt: skip
DENIALS = ("no ", "not ", "without ", "no longer ", "absence of ")  # a statement that begins so counts for nothing
GIVEN_UP = (  # nothing is assessed beyond what is said
    "no further analysis", "unsuitable for analysis", "unsatisfactory", "data quality", "leads are missing",
    "no analysis", "not analyzed", "recording unsuitable", "lead reversal", "lead interchange",
    "suspect arm lead", "faulty",
)  # fmt: skip
_WHOLE = r"(?<![a-z0-9]){}(?![a-z0-9])"
_PIECES = tuple((re.compile(_WHOLE.format(re.escape(piece))), labels) for piece, labels in STATEMENTS)
_HEDGE = re.compile(_WHOLE.format(f"(?:{'|'.join(HEDGES)})"))
_NOT_HEART = re.compile(r"not entered|assumed to be \d+ years", re.IGNORECASE)  # about the form, not about the tracing


def is_mimic(folder: Path) -> bool:
    return (folder / RECORDS).is_file()


@lru_cache(maxsize=20_000)  # some 3,000 statements make up 800,000 reports
def _findings(statement: str) -> tuple[frozenset[str], frozenset[str]]:
    """Labels that a statement (lower case) gives, and those that it leaves open."""
    if statement.startswith(DENIALS):
        return frozenset(), frozenset()
    hedge = _HEDGE.search(statement)
    certain_to = hedge.start() if hedge else len(statement)
    certain: set[str] = set()
    hedged: set[str] = set()
    for piece, labels in _PIECES:
        for match in piece.finditer(statement):
            (certain if match.start() < certain_to else hedged).update(labels)
        statement = piece.sub(lambda match: "#" * len(match[0]), statement)  # places stay where they are
    return frozenset(certain), frozenset(hedged)


def machine_labels(wanted: Iterable[str], statements: Iterable[str]) -> dict[str, bool]:
    """Labels of a record from the cart's statements.

    Args:
        wanted: label codes.
        statements: as printed.

    Returns:
        Present or not for each wanted label that was assessed; nothing where there is no statement.
    """
    present: set[str] = set()
    maybe: set[str] = set()
    given_up = False
    said = [" ".join(statement.lower().split()).strip(" *-.") for statement in statements]
    said = [statement for statement in said if statement]
    for statement in said:
        given_up |= any(phrase in statement for phrase in GIVEN_UP)
        certain, hedged = _findings(statement)
        present |= certain
        maybe |= hedged
    finding = bool(present - SINUS - {"NORM"})
    graded = any(word in statement for statement in said for word in ("borderline", "otherwise normal", "except for"))
    if any("abnormal ecg" in statement for statement in said):
        present.discard("NORM")
    elif graded or finding == ("NORM" in present):  # a normal ECG with a finding, or no word of either: it is open
        present.discard("NORM")
        maybe.add("NORM")
    assessed = present if given_up or not said else set(LABEL_SETS["mimic-machine"])
    return judge(wanted, present=present, assessed=assessed, maybe=maybe)


class _Entry(NamedTuple):
    """A row of the record list; `offset` is where its line of statements begins, -1 where there is none."""

    stem: str
    patient_id: str
    offset: int


def open_mimic(source: Source, options: ReadOptions) -> Reading:
    """Rows of record_list.csv, in order; those that are not in this copy are dropped.

    Raises:
        EvlecgError: a column is missing.
    """

    @cache  # opened by the first record that needs it, once in each process
    def measurements() -> tuple[BinaryIO, list[str]]:
        file = source.path(MEASUREMENTS).open("rb")
        return file, next(csv.reader([file.readline().decode("utf-8-sig")]))

    def statements(offset: int) -> tuple[list[str], str]:
        file, names = measurements()
        file.seek(offset)
        cells = dict(zip(names, next(csv.reader([file.readline().decode(errors="replace")])), strict=False))
        found = [cells.get(f"report_{number}", "").strip() for number in range(18)]
        return [text for text in found if text and not _NOT_HEART.search(text)], cells.get("cart_id", "").strip()

    def read(entry: _Entry) -> Record:
        if not source.exists(f"{entry.stem}.hea"):
            raise Dropped("listed, but not in this copy")
        header = read_header(source, f"{entry.stem}.hea")
        raw = read_signal(source, header)
        mended = mend(raw.values, raw.leads, raw.units, header.fs_hz)
        said, cart = statements(entry.offset) if entry.offset >= 0 else ([], "")
        return Record(
            id=entry.stem.rpartition("/")[2],
            patient_id=entry.patient_id,
            signal_mV=mended.signal_mV,
            fs_hz=header.fs_hz,
            labels=machine_labels(options.labels, said),
            split=split_of(entry.patient_id, options.seed),
            report=". ".join(text.strip(" .") for text in said),
            repairs=(*header.repairs, *mended.repairs),
            device=f"cart {cart}" if cart else "",
        )

    return Reading(None, Lazy(lambda: _entries(source)), lambda entry: entry.stem.rpartition("/")[2], read)


def _entries(source: Source) -> Iterator[_Entry]:
    studies, offsets = _statement_offsets(source)
    with io.TextIOWrapper(source.note(RECORDS).open("rb"), "utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        missing = [name for name in _NEEDED if name not in (rows.fieldnames or ())]
        if missing:
            found = ", ".join(rows.fieldnames or ())
            raise EvlecgError(
                f"a column is missing: {', '.join(missing)}", where=RECORDS, hint=f"it has: {found[:200]}"
            )
        for row in rows:
            study = int(row["study_id"])
            place = int(np.searchsorted(studies, study))
            known = place < len(studies) and studies[place] == study
            yield _Entry(row["path"].strip(), row["subject_id"].strip(), int(offsets[place]) if known else -1)


def _statement_offsets(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """int64 study ids, sorted, and the byte at which each one's line begins: 16 bytes a record."""
    if not source.exists(MEASUREMENTS):
        return np.empty(0, np.int64), np.empty(0, np.int64)

    def lines() -> Iterator[tuple[int, int]]:
        with source.note(MEASUREMENTS).open("rb") as file:
            offset = 0
            for line in file:
                cells = line.split(b",", 2)
                if len(cells) == 3 and cells[1].isdigit():  # the header and torn lines are not
                    yield int(cells[1]), offset
                offset += len(line)

    found = np.fromiter(lines(), np.dtype([("study", "i8"), ("offset", "i8")]))
    found = found[np.argsort(found["study"], kind="stable")]
    return np.ascontiguousarray(found["study"]), np.ascontiguousarray(found["offset"])
