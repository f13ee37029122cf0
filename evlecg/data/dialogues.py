"""What dialogue datasets share: conversations become questions, pictures are checked before anything decodes them."""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from evlecg.data.gates import Unfit
from evlecg.data.readers_base import Source
from evlecg.schema import Question

MAX_IMAGE_BYTES = 50_000_000
MAX_IMAGE_PIXELS = 50_000_000
MIN_IMAGE_EDGE = 32
_ORIENTATION = 0x0112
_PNG_COLOUR = frozenset({b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT", b"bKGD", b"pHYs"})
LONGEST_CHOICES = 20_000  # characters of a question in which choices are looked for
SEVERAL_ECGS = "several ECGs in one question (one image a prompt)"

_ASKING = frozenset({"human", "user"})
_ANSWERING = frozenset({"gpt", "assistant", "model"})
_PLACEHOLDER = re.compile(r"<(?:image|ecg)>[ \t]*\n?", re.IGNORECASE)
_LETTERED = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]+(\S.*)$", re.MULTILINE)
_OPTIONS = re.compile(r"\bOptions:[ \t]*([^\n]+)", re.IGNORECASE)
_INSTRUCTION = re.compile(r"\s*\bOnly answer\b.*", re.IGNORECASE | re.DOTALL)
_OUTER_COMMA = re.compile(r",\s*(?![^()]*\))")  # "bigeminal pattern (unknown origin, ...)" is one option


def turns(conversation: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Question and answer of each turn.

    Image placeholders and system messages are left out; a last question without an answer has an empty one.

    Args:
        conversation: `{from: human|gpt, value}`, `{role: user|assistant, content}`, or `{question, answer}` each.

    Raises:
        Unfit: there is no question, an answer comes first, or a speaker is unknown.
    """
    pairs: list[tuple[str, str]] = []
    asked = False
    for message in conversation:
        if "question" in message:
            pairs.append((_asked(message["question"]), text_of(message.get("answer"))))
            asked = False
            continue
        speaker = str(message.get("from") or message.get("role") or "").lower()
        said = next((message[key] for key in ("value", "content", "text") if message.get(key) is not None), None)
        if speaker in _ASKING:
            if asked:  # two messages in a row are one question
                pairs[-1] = (f"{pairs[-1][0]}\n{_asked(said)}".strip(), "")
            else:
                pairs.append((_asked(said), ""))
            asked = True
        elif speaker in _ANSWERING:
            if not asked:
                raise Unfit("malformed dialogue: an answer without a question")
            pairs[-1] = (pairs[-1][0], text_of(said))
            asked = False
        elif speaker != "system":
            raise Unfit("malformed dialogue: an unknown speaker")
    if not pairs or not all(question for question, _ in pairs):
        raise Unfit("malformed dialogue: no question")
    return pairs


def _asked(value: Any) -> str:
    return _PLACEHOLDER.sub("", text_of(value)).strip()


def text_of(value: Any) -> str:
    """Text of a message: a string, a list of answers, a text exploded into its characters, or a list of typed parts.

    Raises:
        Unfit: none of them.
    """
    if value is None:
        return ""
    if isinstance(value, list):
        parts = [part.get("text", "") if isinstance(part, Mapping) else part for part in value]
        if not all(isinstance(part, str) for part in parts):
            raise Unfit("malformed dialogue: a message is no text")
        if all(len(part) == 1 for part in parts):
            value = "".join(parts)
        else:
            separator = "" if any(isinstance(part, Mapping) for part in value) else ", "
            value = separator.join(part.strip() for part in parts if part.strip())
    if not isinstance(value, str):
        raise Unfit("malformed dialogue: a message is no text")
    return encodable(value).strip()


def encodable(text: str) -> str:
    """The text with halves of surrogate pairs replaced, which JSON can hold and UTF-8 cannot."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def questions_of(conversation: Sequence[Mapping[str, Any]], *, item: str, kind: str) -> list[Question]:
    """A question for each turn of a dialogue, the earlier turns its history.

    The first turn has the item's id, the second `ID#2`, and so on.

    Args:
        conversation: as in `turns`.
        item: id of the dialogue item.
        kind: `Question.kind`.

    Raises:
        Unfit: as in `turns`.
    """
    pairs = turns(conversation)
    return [
        Question(
            text=question,
            answer=answer,
            choices=choices_of(question, answer),
            kind=kind,
            history=tuple(pairs[:number]),
            id=item if number == 0 or not item else f"{item}#{number + 1}",
        )
        for number, (question, answer) in enumerate(pairs)
    ]


def distinct(questions: Iterable[Question]) -> tuple[Question, ...]:
    """Each question once, ids aside: published files overlap, and repeat items."""
    first: dict[Question, Question] = {}
    for question in questions:
        first.setdefault(replace(question, id=""), question)
    return tuple(first.values())


def choices_of(text: str, answer: str) -> tuple[str, ...]:
    """The answers that a question offers, in the form in which its answer is written; empty for free text.

    Lines `A. ...` give letters, whole lines or their texts, whichever the answer is; the answer is one of the choices.
    `Options: a, b, ...` gives the options; where several are right, the answer lists them, separated by commas.

    Args:
        text: the question.
        answer: the right answer; empty where unknown: letters then.
    """
    if len(text) > LONGEST_CHOICES:
        return ()
    lettered = [(letter, body.strip()) for letter, body in _LETTERED.findall(text)]
    letters = [letter for letter, _ in lettered]
    if len(letters) >= 2 and letters == [chr(ord("A") + number) for number in range(len(letters))]:
        return _lettered_choices(dict(lettered), answer)
    sections = _OPTIONS.findall(text)
    if sections:
        options = split_options(_INSTRUCTION.sub("", sections[-1]))
        known = {option.casefold() for option in options}
        if len(options) >= 2 and all(part.casefold() in known for part in split_options(answer)):
            return options
    return ()


def _lettered_choices(options: Mapping[str, str], answer: str) -> tuple[str, ...]:
    if not answer:
        return tuple(options)
    bare = re.fullmatch(r"(\(?)([A-Z])([.):]*)", answer)
    if bare and bare[2] in options:
        return tuple(f"{bare[1]}{letter}{bare[3]}" for letter in options)
    begins = re.match(r"\(?([A-Z])[.):]\s", answer)
    if begins and begins[1] in options:
        return tuple(answer if letter == begins[1] else f"{letter}. {body}" for letter, body in options.items())
    plain = answer.rstrip(".").casefold()
    if plain in {body.rstrip(".").casefold() for body in options.values()}:
        return tuple(answer if body.rstrip(".").casefold() == plain else body for body in options.values())
    return ()


def split_options(text: str) -> tuple[str, ...]:
    """`a, b (c, d), e` -> `a`, `b (c, d)`, `e`."""
    return tuple(part.strip().rstrip(".") for part in _OUTER_COMMA.split(text.strip()) if part.strip())


def inside(source: Source, relative: str) -> str:
    """The path itself, if it stays in the source folder wherever symbolic links lead.

    Raises:
        Unfit: it leads out, or is no path.
    """
    if "\0" in relative or encodable(relative) != relative:
        raise Unfit("no file can have such a name")
    path = source.path(relative)
    try:
        stays = path.resolve().is_relative_to(source.root.resolve())
    except (OSError, RuntimeError):  # a loop of links
        stays = False
    if not stays:
        raise Unfit("a file name leads out of the source folder")
    return relative


def read_image(source: Source, relative: str) -> bytes:
    """An encoded picture, checked as in `check_image`; its size on disk is looked at before it is read.

    Raises:
        Unfit: the path leads out of the source folder, or the picture is refused.
        OSError: it cannot be read.
    """
    path = source.path(inside(source, relative))
    if not path.is_file():  # a pipe would block
        raise FileNotFoundError(relative)
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise Unfit("unfit picture: the file is too large")
    return check_image(source.read(relative))


def check_image(data: bytes) -> bytes:
    """The picture without its metadata, if it is a whole PNG or JPEG of a size that can be decoded without harm.

    Only the header is read before the size is known. A PNG is then checked by its checksums, a JPEG by decoding an
    eighth of its resolution, since it has none. Pixels are never encoded again.

    Raises:
        Unfit: another format, truncated, damaged, too large or too small.
    """
    from PIL import Image

    if len(data) > MAX_IMAGE_BYTES:
        raise Unfit("unfit picture: the file is too large")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
                width, height = image.size
                if width * height > MAX_IMAGE_PIXELS:
                    raise Unfit(f"unfit picture: {width} × {height} pixels are too many")
                if min(width, height) < MIN_IMAGE_EDGE:
                    raise Unfit(f"unfit picture: {width} × {height} pixels are too few")
                kind, turned = image.format, image.getexif().get(_ORIENTATION, 1) if image.format == "JPEG" else 1
                if kind == "JPEG":
                    image.draft("L", (width // 8, height // 8))
                    image.load()
                else:
                    image.verify()
        return _jpeg_alone(data, turned) if kind == "JPEG" else _png_alone(data)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Unfit("unfit picture: too many pixels") from None
    except Image.UnidentifiedImageError:
        raise Unfit("unfit picture: neither PNG nor JPEG") from None
    except (OSError, SyntaxError, ValueError, LookupError, EOFError, TypeError, struct.error):  # as Pillow meets damage
        raise Unfit("unfit picture: truncated or damaged") from None


def _png_alone(data: bytes) -> bytes:
    """A PNG with the chunks that its pixels need: text, time and EXIF may name a patient."""
    kept, at = [data[:8]], 8
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        name, stop = data[at + 4 : at + 8], at + 12 + size
        if name[:1].isupper() or name in _PNG_COLOUR:
            kept.append(data[at:stop])
        at = stop
        if name == b"IEND":
            break
    whole = b"".join(kept)
    return data if whole == data else whole


def _jpeg_alone(data: bytes, turned: int) -> bytes:
    """A JPEG without comments and application segments, apart from JFIF's, Adobe's (colours) and how to turn it."""
    kept, at = [data[:2]], 2
    if turned in range(2, 9):
        exif = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, _ORIENTATION, 3, 1, turned, 0, 0)
        kept.append(b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif)
    while data[at : at + 1] == b"\xff":
        marker = data[at + 1]
        if marker in (0xFF, *range(0xD0, 0xD9)):  # filling, or a mark without content
            kept.append(data[at : at + 1] if marker == 0xFF else data[at : at + 2])
            at += 1 if marker == 0xFF else 2
            continue
        (size,) = struct.unpack_from(">H", data, at + 2)
        stop = at + 2 + size
        if marker == 0xDA:  # pixels from here on
            break
        if not ((0xE1 <= marker <= 0xEF and marker != 0xEE) or marker == 0xFE):
            kept.append(data[at:stop])
        at = stop
    whole = b"".join([*kept, data[at:]])
    return data if whole == data else whole
