"""From the text of an answer to what it names: labels, a letter, options.

Two readings. `pulse` is that of the published ECGBench scorer, its mistakes included, so that published numbers can be
reproduced; where that scorer would stop with an exception, the answer counts as unread. `strict` reads what a person
would accept as an explicit answer, says so where there is none, and draws nothing at random.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evlecg.protocol.bench import EIGHT, LABELS, LETTER, OPTIONS, Item, Subset


@dataclass(frozen=True)
class Named:
    """What an answer names: labels, one letter, or options; no names where nothing was found."""

    names: tuple[str, ...]

    @property
    def failed(self) -> bool:
        return not self.names


NOTHING = Named(())


@dataclass(frozen=True)
class Parser:
    """One reading of answers, and of right answers.

    Attributes:
        name: its key.
        rules: in words, for a report.
        read: (subset, item, text, prompt) -> what the text names.
        truth: (subset, item) -> what the right answer names.
        same: whether named options are the right ones.
        draws: an unread multiple-choice answer gets a random letter.
        scores_missing: questions without a reply count as unread answers; otherwise they are left out.
    """

    name: str
    rules: str
    read: Callable[[Subset, Item, str, str], Named]
    truth: Callable[[Subset, Item], tuple[str, ...]]
    same: Callable[[Sequence[str], Sequence[str]], bool]
    draws: bool
    scores_missing: bool


# -- as published ------------------------------------------------------------------------------------------------------

_NO_COT = "Only answer based on the given Options without any explanation."
_PHRASE = "The correct option is "
_MARK = "Answer:"


def _pulse_read(subset: Subset, item: Item, text: str, prompt: str) -> Named:
    if subset.task == LABELS:
        if subset.after_mark:
            text = text.split(_MARK)[-1]
        longest = [label for label in sorted(subset.kept, key=len) if label in text][-1:]  # NORM is part of ABNORMAL
        return Named((*longest, *(label for label in subset.names if label in text)))
    if subset.task == LETTER:
        letter = _pulse_letter(text)
        return NOTHING if letter is None else Named((letter,))
    if subset.task == OPTIONS:
        lowered = text.lower()
        return Named(tuple(option for option in pulse_options(prompt) if option in lowered))
    return Named((text,)) if text else NOTHING


def _pulse_letter(text: str) -> str | None:
    if text in EIGHT:
        return text
    for letter in EIGHT:  # the first of the alphabet, wherever in the text it stands
        if f"{letter}." in text:
            return letter
    if _PHRASE in text:
        behind = text.split(_PHRASE)[-1][:1]
        return behind if behind in EIGHT else None
    if _MARK in text:
        behind = text.split(_MARK)[-1]
        return next((letter for letter in EIGHT if letter in behind), None)
    return None


def pulse_options(prompt: str) -> list[str]:
    """Options of a prompt as the published scorer cuts them: at every comma, also inside brackets."""
    return [option.strip() for option in prompt.split("Options:")[-1].replace(_NO_COT, "").split(",")]


def _pulse_truth(subset: Subset, item: Item) -> tuple[str, ...]:
    if subset.task == LABELS:
        if item.answer in subset.kept:
            return (item.answer,)
        return tuple(label for label in subset.names if label in item.answer)
    if subset.task == LETTER:  # one subset compares whole answers, the others the first character
        return (item.answer if subset.name == "mmmu-ecg" else item.answer[:1],)
    return item.right_options if subset.task == OPTIONS else (item.answer,)


PULSE = Parser(
    name="pulse",
    rules="as the published scorer reads: labels by case-sensitive substring (NORM fires in ABNORMAL, ST in STTC); of "
    "several letters with a full stop behind them the first of the alphabet, and a random letter where none is found; "
    "options by substring of the lower-cased answer; questions without a reply are left out",
    read=_pulse_read,
    truth=_pulse_truth,
    same=lambda named, right: set(named) == set(right),
    draws=True,
    scores_missing=False,
)

# -- strict ------------------------------------------------------------------------------------------------------------

_ANSWER_IS = re.compile(r"\b(?:answers?|selections?)(?:\s+(?:is|are)\b\s*:?|\s*:)", re.IGNORECASE)
_PARTS = re.compile(r"\s*(?:[,;\n]|\band\b)\s*(?![^()]*\))")
_NEGATED = re.compile(
    r"\b(?:no|not|without|absence of|negative for|rules? out|ruled out)\s+(?:(?!but\b)\w+\s+)?$", re.IGNORECASE
)
_NO_LABEL_BEHIND = r"(?![\w-])(?!\s*/\s*T\b)(?!\s+(?:segment|depression|elevation|change|deviation|abnormalit))"
_LETTER_ALONE = re.compile(r"\W*([A-Z])\W*")
_LETTER_STATED = re.compile(
    r"\b(?:[Aa]nswer|ANSWER|[Oo]ption|OPTION|[Cc]hoice|CHOICE)\b(?:\s+(?:is|would be))?\s*[:\-]?[\s*_\"'(\[]*([A-Z])"
    r"(?![\w'-])(?=[\s*_]*(?:[.):,;\"'\]–—-]|$|\n|(?:is|because|since|as)\b))"
)
_LETTER_LINE = re.compile(r"^[ \t*_]*\(?([A-Z])(?:[.):]|[ \t]*$)", re.MULTILINE)
_OFFERED = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]+(\S.*)$", re.MULTILINE)


def _strict_read(subset: Subset, item: Item, text: str, prompt: str) -> Named:
    if subset.task == LABELS:
        return _last_explicit(text, lambda part: _strict_labels((*subset.kept, *subset.names), part))
    if subset.task == LETTER:
        letter = _strict_letter(subset, item, text)
        return NOTHING if letter is None else Named((letter,))
    if subset.task == OPTIONS:
        return _last_explicit(text, lambda part: _strict_options(item.options, part))
    return Named((text,)) if text.strip() else NOTHING


def _last_explicit(text: str, read: Callable[[str], tuple[str, ...]]) -> Named:
    """What stands behind the last "Answer:" or "the answer is", where that names something; else the whole text."""
    marks = list(_ANSWER_IS.finditer(text))
    names = read(text[marks[-1].end() :]) if marks else ()
    return Named(names or read(text))


def _strict_labels(labels: Sequence[str], text: str) -> tuple[str, ...]:
    """Codes as words of their own, not denied; in any case where the text is nothing but a list of codes."""
    code_of = {label.casefold(): label for label in labels}
    parts = [part.strip(" .*\"'").casefold() for part in _PARTS.split(text.strip()) if part.strip(" .*\"'")]
    if parts and all(part in code_of for part in parts):
        return tuple(dict.fromkeys(code_of[part] for part in parts))
    return tuple(
        label
        for label in labels
        if any(
            not _NEGATED.search(text[: found.start()])
            for found in re.finditer(rf"(?<![\w-]){re.escape(label)}{_NO_LABEL_BEHIND}", text)
        )
    )


def _strict_letter(subset: Subset, item: Item, text: str) -> str | None:
    """The letter alone; else the last one stated ("the answer is B"); else the one that begins a line; else the one
    whose option the text repeats. A letter that is not offered is no answer."""
    bodies = {letter: body.strip(" .").casefold() for letter, body in _OFFERED.findall(item.prompt)}
    offered = bodies or dict.fromkeys(subset.names or EIGHT)
    text = text.strip()
    alone = _LETTER_ALONE.fullmatch(text)
    if alone:
        return alone[1] if alone[1] in offered else None
    stated = _LETTER_STATED.findall(text)
    if stated:
        return stated[-1] if stated[-1] in offered else None
    lines = set(_LETTER_LINE.findall(text))
    if lines:
        letter = lines.pop()
        return letter if not lines and letter in offered else None
    said = _ANSWER_IS.split(text)[-1].strip(" .\n").casefold()
    repeated = [letter for letter, body in bodies.items() if body == said]
    return repeated[0] if len(repeated) == 1 else None


def _strict_options(options: Sequence[str], text: str) -> tuple[str, ...]:
    """Options as words of their own in any case, the longest first: what a longer one covers is not a shorter one."""
    taken = [False] * len(text)
    found: dict[str, int] = {}
    for option in sorted(options, key=len, reverse=True):
        for match in re.finditer(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text, re.IGNORECASE):
            if not any(taken[match.start() : match.end()]):
                taken[match.start() : match.end()] = [True] * (match.end() - match.start())
                found.setdefault(option, match.start())
    return tuple(sorted(found, key=found.__getitem__))


def _strict_truth(subset: Subset, item: Item) -> tuple[str, ...]:
    if subset.task == LABELS:
        return _strict_labels((*subset.kept, *subset.names), item.answer)
    if subset.task == LETTER:
        found = re.match(r"\(?([A-Z])(?![\w'-])", item.answer)
        if found:
            return (found[1],)
        said = item.answer.strip(" .").casefold()
        return tuple(letter for letter, body in _OFFERED.findall(item.prompt) if body.strip(" .").casefold() == said)
    return item.right_options if subset.task == OPTIONS else (item.answer,)


STRICT = Parser(
    name="strict",
    rules="labels as words of their own, not denied (no MI); the last letter that is stated as the answer, or the only "
    "one that begins a line; options as whole words in any case, the longest first; behind the last `Answer:` where "
    "there is one; what names nothing counts as failed and as wrong, and so does a question without a reply; nothing "
    "is random",
    read=_strict_read,
    truth=_strict_truth,
    same=lambda named, right: {name.casefold() for name in named} == {name.casefold() for name in right},
    draws=False,
    scores_missing=True,
)

PARSERS = {"pulse": PULSE, "strict": STRICT}
