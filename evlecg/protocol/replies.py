"""What models said, as files: written as it comes, read in every form that others write, joined by id.

    {"question_id": "ptb-test-7", "prompt": "...", "text": "NORM", "model_id": "...", "metadata": {...}}

is one line of our own file, and of the published ones. Others have `id` for `question_id` and `response` for `text`,
JSON instead of JSON lines, or a file for each subset. Nothing is ever joined by its place in a file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evlecg.errors import EvlecgError
from evlecg.protocol.bench import SUBSETS, Item

ID_KEYS = ("question_id", "id", "No")
TEXT_KEYS = ("text", "response")
TALK_KEYS = ("predict_convs", "response")  # the arena's: both answers of a dialogue in one row


@dataclass(frozen=True)
class Reply:
    """What a model said to one question.

    Attributes:
        id: of the question.
        text: the answer.
        prompt: what it was asked, as its row says; None where it does not.
        subset: as its row or its file says; empty where neither does.
        model: who said it; empty where unknown.
        where: file and row, for messages.
    """

    id: str
    text: str
    prompt: str | None = None
    subset: str = ""
    model: str = ""
    where: str = ""


@dataclass(frozen=True)
class Joined:
    """Replies beside their questions.

    Attributes:
        pairs: in the order of the replies.
        missing: questions without a reply.
        extra: ids of replies to questions that were not asked here.
    """

    pairs: tuple[tuple[Item, Reply], ...]
    missing: tuple[Item, ...]
    extra: tuple[str, ...]


def join(items: Sequence[Item], replies: Iterable[Reply]) -> Joined:
    """Joins replies with questions by subset and id, or by id alone where a reply does not say its subset.

    Raises:
        EvlecgError: two replies to one question, or an id that several subsets have.
    """
    by_key = {(item.subset, item.id): item for item in items}
    if len(by_key) != len(items):
        raise ValueError("items of one subset share an id")
    by_id: dict[str, list[Item]] = {}
    for item in items:
        by_id.setdefault(item.id, []).append(item)
    asked = {item.subset for item in items}
    pairs: dict[tuple[str, str], tuple[Item, Reply]] = {}
    extra: list[str] = []
    for reply in replies:
        if reply.subset in asked:
            found = [by_key[key] for key in [(reply.subset, reply.id)] if key in by_key]
        else:  # a subset that is not asked about has nothing to join; any other word is no subset
            found = [] if reply.subset in SUBSETS else by_id.get(reply.id, [])
        if len(found) > 1:
            names = ", ".join(item.subset for item in found)
            raise EvlecgError(f"the id {reply.id!r} occurs in several subsets ({names})", where=reply.where,
                              hint="a folder with a file for each subset, or rows with a key `subset`")  # fmt: skip
        if not found:
            extra.append(reply.id)
            continue
        key = (found[0].subset, found[0].id)
        if key in pairs:
            raise EvlecgError(f"two answers to the question {reply.id!r}", where=reply.where,
                              hint=f"the first is in {pairs[key][1].where}; keep one")  # fmt: skip
        pairs[key] = (found[0], reply)
    missing = tuple(item for key, item in by_key.items() if key not in pairs)
    return Joined(tuple(pairs.values()), missing, tuple(extra))


def read_replies(path: Path) -> list[Reply]:
    """Reads predictions made elsewhere.

    A file holds JSON lines, a JSON list of objects, or a JSON object from ids to answers; a folder holds such files,
    at any depth, each in a folder or under a name that says its subset (`ptb-test/step-final.jsonl`).

    Raises:
        EvlecgError: nothing there, or a row without id or answer.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*.json*") if file.suffix in (".json", ".jsonl"))
        if not files:
            raise EvlecgError("the folder holds no predictions", where=path, hint="files *.jsonl or *.json")
        return [reply for file in files for reply in _read_file(file, _subset_of(file.relative_to(path)))]
    if not path.is_file():
        raise EvlecgError("no such file of predictions", where=path)
    return _read_file(path, _subset_of(Path(path.name)))


def _subset_of(relative: Path) -> str:
    """The subset that a path names, the longest where several fit (ptb-test is part of ptb-test-report)."""
    for part in reversed(relative.parts):
        named = [name for name in SUBSETS if part == name or part.startswith((f"{name}.", f"{name}_", f"{name}-"))]
        if named:
            return max(named, key=len)
    return ""


def _read_file(path: Path, subset: str) -> list[Reply]:
    replies: list[Reply] = []
    for number, row in read_rows(path):
        where = f"{path}, row {number}"
        if not isinstance(row, Mapping):
            raise EvlecgError("a prediction is no JSON object", where=where)
        reply_id = next((row[key] for key in ID_KEYS if row.get(key) is not None), None)
        if reply_id is None:
            raise EvlecgError(f"a prediction has no id (none of {', '.join(ID_KEYS)})", where=where,
                              hint="answers are joined by id, never by order")  # fmt: skip
        prompt = row.get("prompt")
        if isinstance(prompt, Mapping):  # the published scripts for other models write it one level deeper
            prompt = prompt.get("prompt")
        about = row.get("metadata") if isinstance(row.get("metadata"), Mapping) else {}
        named = row.get("subset") or (about or {}).get("subset") or subset
        for place, text in enumerate(_texts(row, where)):
            replies.append(
                Reply(
                    str(reply_id) if not place else f"{reply_id}#{place + 1}", text,
                    prompt if isinstance(prompt, str) else None, str(named), str(row.get("model_id") or ""), where,
                )
            )  # fmt: skip
    return replies


def _texts(row: Mapping[str, Any], where: str) -> list[str]:
    """The answers of a row: one, or those to the turns of a dialogue."""
    text = next((row[key] for key in TEXT_KEYS if isinstance(row.get(key), str)), None)
    if text is not None:
        return [text]
    for key in TALK_KEYS:
        talk = row.get(key)
        if isinstance(talk, list) and talk and all(isinstance(turn, Mapping) for turn in talk):
            said = [turn.get("answer", turn.get("response")) for turn in talk]
            if all(isinstance(text, str) for text in said):
                return said
    raise EvlecgError(f"a prediction has no answer (neither {' nor '.join(TEXT_KEYS)})", where=where)


def read_rows(path: Path) -> list[tuple[int, Any]]:
    """(number from 1, row) of a file of JSON lines, a JSON list, or a JSON object from ids to rows.

    Raises:
        EvlecgError: it cannot be read, or is neither.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EvlecgError("a file cannot be read", where=path, hint=str(error)) from error
    try:
        whole = json.loads(text, strict=False)
    except ValueError:
        return _lines(path, text)
    if isinstance(whole, Mapping) and not any(key in whole for key in (*ID_KEYS, *TEXT_KEYS)):
        rows: list[Any] = [
            {"id": key, **(value if isinstance(value, Mapping) else {"text": value})} for key, value in whole.items()
        ]
    else:
        rows = whole if isinstance(whole, list) else [whole]  # a file of one line is one object
    return list(enumerate(rows, start=1))


def _lines(path: Path, text: str) -> list[tuple[int, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append((number, json.loads(line, strict=False)))
        except ValueError as error:
            cut = number == text.count("\n") + 1
            raise EvlecgError("a line is no JSON" + (": the file is cut off" if cut else ""), where=f"{path}, line "
                              f"{number}", hint="JSON lines, or one JSON list") from error  # fmt: skip
    return rows


class ReplyLog:
    """Our own file of predictions: a line for each answer as it comes, read again after a crash.

    Args:
        path: predictions.jsonl; made where missing. A last line that was cut off is dropped.

    Raises:
        EvlecgError: a whole line of it is damaged, or two lines answer one question.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.texts: dict[tuple[str, str], str] = {}
        kept = self._mend()
        for reply in _read_file(path, "") if kept else ():
            key = (reply.subset, reply.id)
            if key in self.texts:
                raise EvlecgError(f"two answers to the question {reply.id!r}", where=reply.where,
                                  hint="start again with --overwrite")  # fmt: skip
            self.texts[key] = reply.text
        self._stream = path.open("a", encoding="utf-8")

    def _mend(self) -> int:
        """Cuts a half-written last line off; returns the bytes that stay."""
        if not self.path.exists():
            return 0
        with self.path.open("r+b") as file:
            content = file.read()
            kept = content.rfind(b"\n") + 1
            if kept < len(content):
                file.truncate(kept)
        return kept

    def __contains__(self, item: Item) -> bool:
        return (item.subset, item.id) in self.texts

    def add(self, item: Item, text: str, *, model: str, **metadata: Any) -> None:
        """Writes one answer, on disk (as far as the system is asked) before the next one is made."""
        row = {
            "question_id": item.id, "prompt": item.prompt, "text": text, "model_id": model,
            "metadata": {"subset": item.subset, "record_id": item.record_id, **metadata},
        }  # fmt: skip
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()
        self.texts[(item.subset, item.id)] = text

    def __enter__(self) -> ReplyLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()


def model_of(replies: Sequence[Reply], default: str) -> str:
    """The model that most replies say they are of."""
    models = Counter(reply.model for reply in replies if reply.model)
    return models.most_common(1)[0][0] if models else default
