"""What may enter the output of names, numbers and free text that users bring themselves (WFDB and DICOM folders).

The published datasets are de-identified, and their ids are kept. A hospital's own files are not: people sit in file
names ("Mueller_Anna_1954-03-02.hea"), in patient numbers and in the cart's statements ("Confirmed by ...").
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet

PLAIN_WORDS = frozenset({
    "batch", "case", "cohort", "data", "ecg", "fold", "folder", "group", "part", "patient", "rec", "record", "records",
    "session", "set", "site", "study", "sub", "subject", "test", "train", "val", "validation", "visit", "ward", "wfdb",
})  # fmt: skip
LONGEST_LETTERS = 2  # of a run of letters that is no such word: A0001, JS00001, 00001_hr

_PIECES = re.compile(r"[a-z]+|\d+|[^a-z\d]+", re.IGNORECASE)
_PLAIN = re.compile(r"[A-Za-z\d_.-]+")
_DATE = re.compile(
    r"(?<!\d)(?:19|20)\d\d[-_.]?(?:0[1-9]|1[0-2])[-_.]?(?:0[1-9]|[12]\d|3[01])(?!\d)"
    r"|(?<!\d)\d{1,2}[-_.]\d{1,2}[-_.](?:19|20)?\d\d(?!\d)"
)
_DONE_BY = (
    "acquired|analy[sz]ed|approved|authenticated|authored|confirmed|dictated|edited|entered|interpreted|ordered|overread|"
    "performed|read|recorded|referred|reported|requested|reviewed|signed|validated|verified"
)
_IDENTIFYING = re.compile(
    r"\d{1,4}[./-]\d{1,2}[./-]\d{2,4}"  # dates
    r"|\d{1,2}[ .-]?(?:jan|feb|m[aä]r|apr|ma[iy]|jun|jul|aug|sep|o[ck]t|nov|de[cz])[a-z]*[ .,-]*\d{2,4}"
    r"|\d{1,2}:\d{2}|\d{5,}"  # times, long numbers
    rf"|\b(?:{_DONE_BY}) by\b"
    r"|(?-i:\bMs\.? [A-Z])"  # not the millisecond
    r"|\b(?:by dr|dr|md|prof|mr|mrs|physician|doctor|patient|name|id|mrn|ssn|dob|born|birth\w*|operator|"
    r"technician|nurse|hospital|clinic|ward|room|bed|address|phone|insurance|institution|department)\b",
    re.IGNORECASE,
)


_ENDS = re.compile(  # of sentences, not of titles and initials: "by Dr. A. Weber" is one statement
    r"(?<!\bdr\.)(?<!\bprof\.)(?<!\bmr\.)(?<!\bmrs\.)(?<!\bms\.)(?<!\bmd\.)(?<!\b[a-z]\.)(?<=[.;!?])\s+", re.IGNORECASE
)


def hashed(text: str) -> str:
    """16 hex digits that stand for a name or number, always the same."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def public_path(path: str) -> str:
    """A path whose parts are codes stays as it is; of the others, each is replaced by its hash.

    A code is made of numbers, of letters by ones or twos, and of words such as `ward` or `record`, and holds no date:
    `ward1/A0001` and `00001_hr` are, `Mueller_Anna` and `20200512_1` are not.
    """
    return "/".join(part if _is_code(part) else hashed(part) for part in path.split("/"))


def _is_code(part: str) -> bool:
    if part in ("", ".", ".."):
        return True
    if not _PLAIN.fullmatch(part) or _DATE.search(part):
        return False
    letters = (piece for piece in _PIECES.findall(part) if piece.isalpha())
    return all(len(piece) <= LONGEST_LETTERS or piece.lower() in PLAIN_WORDS for piece in letters)


def public_statements(statements: Iterable[str], private_words: AbstractSet[str] = frozenset()) -> tuple[str, int]:
    """The statements of a report that can identify nobody, each once, as one text, and how many were left out.

    Left out is what holds a date, a time, a long number, a word like "confirmed by" or "physician", or a private word.

    Args:
        statements: as written.
        private_words: words that may not occur, in lower case.
    """
    kept: dict[str, None] = {}
    n_left_out = 0
    for text in map(" ".join, map(str.split, statements)):
        if not text:
            continue
        if _IDENTIFYING.search(text) or private_words & set(re.findall(r"\w+", text.lower())):
            n_left_out += 1
        else:
            kept[text.strip(" .")] = None
    return ". ".join(kept), n_left_out


def sentences(text: str) -> Iterator[str]:
    """Statements of a free text: its lines, and in them its sentences."""
    for line in text.splitlines():
        yield from _ENDS.split(line)
