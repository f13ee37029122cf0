"""Conversations and choices in every published form; pictures and paths that must be refused."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from evlecg.data import dialogues
from evlecg.data.dialogues import check_image, choices_of, distinct, inside, questions_of, read_image, text_of, turns
from evlecg.data.gates import Unfit
from evlecg.data.readers_base import Source
from evlecg.schema import Question


def encoded(form: str = "PNG", size: tuple[int, int] = (80, 60), seed: int = 0) -> bytes:
    """A picture of noise, which no encoder makes small."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says its size and holds next to nothing: what a decompression bomb looks like from outside."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def human(*texts: str) -> list[dict[str, str]]:
    return [{"from": "gpt" if number % 2 else "human", "value": text} for number, text in enumerate(texts)]


# conversations


def test_the_three_forms_of_a_dialogue_are_one() -> None:
    expected = [("Is this sinus rhythm?", "Yes."), ("Why?", "P waves precede each QRS.")]
    said = ["<image>\nIs this sinus rhythm?", "Yes.", "Why?", "P waves precede each QRS."]
    assert turns(human(*said)) == expected
    roles = [{"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(said)]
    assert turns([{"role": "system", "content": "You are a cardiologist."}, *roles]) == expected
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": said[0]}]}, *roles[1:]]
    assert turns(parts) == expected
    assert turns([{"question": question, "answer": answer} for question, answer in expected]) == expected


def test_placeholders_go_wherever_they_stand() -> None:
    assert turns(human("<ecg>\n<image>\nRate?", "70"))[0] == ("Rate?", "70")
    assert turns(human("Rate?\n<image>", "<image> is a word here"))[0] == ("Rate?", "<image> is a word here")


def test_a_question_without_answer_is_for_prediction() -> None:
    assert turns(human("Rate?")) == [("Rate?", "")]
    assert turns([{"from": "human", "value": "Look."}, *human("Rate?", "70")]) == [("Look.\nRate?", "70")]


@pytest.mark.parametrize(
    "conversation",
    [
        [],
        human("<image>\n", "Yes."),
        [{"from": "gpt", "value": "Yes."}],
        [{"from": "nurse", "value": "Rate?"}],
        [{"from": "human", "value": 7}],
        [{"from": "human", "value": ["a", 7]}],
        [*human("Rate?", "70"), {"from": "gpt", "value": "80"}],
    ],
)
def test_malformed_dialogues_are_unfit(conversation: list[dict[str, object]]) -> None:
    with pytest.raises(Unfit, match="malformed dialogue"):
        turns(conversation)


def test_exploded_text_is_joined_and_lists_of_answers_are_listed() -> None:
    assert text_of(list("sinus rhythm")) == "sinus rhythm"
    assert text_of(["sinus rhythm", "none"]) == "sinus rhythm, none"
    assert text_of(["yes"]) == "yes"
    assert text_of([]) == text_of(None) == ""


def test_halves_of_surrogate_pairs_do_not_reach_the_disk() -> None:
    assert text_of("a\ud800b 心 📈") == "a\ufffdb 心 📈"
    assert text_of(["\udc00"]).encode() == "\ufffd".encode()


def test_turns_become_questions_with_their_history() -> None:
    first, second = questions_of(human("Rate?", "70", "Rhythm?", "Sinus."), item="a-7", kind="dialogue")
    assert first == Question("Rate?", "70", kind="dialogue", id="a-7")
    assert second == Question("Rhythm?", "Sinus.", kind="dialogue", history=(("Rate?", "70"),), id="a-7#2")
    assert [question.id for question in questions_of(human("Rate?", "70", "Why?", ""), item="", kind="x")] == ["", ""]


def test_repeated_items_count_once() -> None:
    one, again, other = Question("Rate?", "70", id="1"), Question("Rate?", "70", id="2"), Question("Rate?", "80")
    assert distinct([one, again, other]) == (one, other)


# choices

LETTERED = "What is shown?\nA. Sinus rhythm\nB. Atrial fibrillation (AF)\nC. Paced rhythm."


@pytest.mark.parametrize(
    ("answer", "choices"),
    [
        ("B", ("A", "B", "C")),
        ("B.", ("A.", "B.", "C.")),
        ("(B)", ("(A)", "(B)", "(C)")),
        ("", ("A", "B", "C")),
        ("B. Atrial fibrillation (AF)", ("A. Sinus rhythm", "B. Atrial fibrillation (AF)", "C. Paced rhythm.")),
        ("B. atrial fibrillation", ("A. Sinus rhythm", "B. atrial fibrillation", "C. Paced rhythm.")),
        ("paced rhythm", ("Sinus rhythm", "Atrial fibrillation (AF)", "paced rhythm")),
        ("It is paced.", ()),
        ("D", ()),
    ],
)
def test_lettered_lines(answer: str, choices: tuple[str, ...]) -> None:
    assert choices_of(LETTERED, answer) == choices
    assert not answer or not choices or answer in choices


def test_lines_that_only_look_lettered() -> None:
    assert choices_of("B. follows A.\nA. comes first", "A") == ()
    assert choices_of("A. alone", "A") == ()


def test_options_in_the_prompt_of_ecgqa() -> None:
    prompt = (
        "Question: Which rhythm?, Options: bigeminal pattern (unknown origin, supraventricular, or ventricular), "
        "sinus rhythm, none. Only answer based on the given Options without any explanation."
    )
    options = ("bigeminal pattern (unknown origin, supraventricular, or ventricular)", "sinus rhythm", "none")
    assert choices_of(prompt, "Sinus rhythm") == options
    assert choices_of(prompt, "sinus rhythm, none") == options
    assert choices_of(prompt, "") == options
    assert choices_of(prompt, "pacemaker") == ()
    assert choices_of("Options: yes, no\n" + " " * dialogues.LONGEST_CHOICES, "yes") == ()


# pictures


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_whole_pictures_pass_as_they_are(form: str) -> None:
    data = encoded(form, (640, 480))
    assert check_image(data) is data


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.98])
def test_truncated_pictures_are_unfit(form: str, share: float) -> None:
    data = encoded(form, (640, 480))
    with pytest.raises(Unfit, match="unfit picture"):
        check_image(data[: int(share * len(data))])


def test_a_flipped_byte_of_a_png_is_found() -> None:
    data = bytearray(encoded("PNG"))
    data[len(data) // 2] ^= 1
    with pytest.raises(Unfit, match="truncated or damaged"):
        check_image(bytes(data))


@pytest.mark.parametrize("size", [(7072, 7071), (9000, 9000), (12_000, 9000), (65_500, 65_500), (2**31 - 1, 2**31 - 1)])
def test_bombs_are_refused_from_their_header(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(self: Image.Image) -> None:
        raise AssertionError("a picture of unknown size was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    with pytest.raises(Unfit, match="unfit picture"):
        check_image(png_header(*size))


def test_just_below_the_limit_passes() -> None:
    data = png_header(7071, 7071)
    assert check_image(data) is data


def test_other_formats_and_tiny_pictures_are_unfit(monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (encoded("BMP"), encoded("GIF"), b"", b"\x89PNG\r\n\x1a\n", b"<svg/>", bytes(100)):
        with pytest.raises(Unfit, match="unfit picture"):
            check_image(data)
    with pytest.raises(Unfit, match="too few"):
        check_image(encoded(size=(31, 400)))
    monkeypatch.setattr(dialogues, "MAX_IMAGE_BYTES", 100)
    with pytest.raises(Unfit, match="too large"):
        check_image(encoded())


def test_a_large_file_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(dialogues.MAX_IMAGE_BYTES + 1)  # sparse
    monkeypatch.setattr(Source, "read", lambda self, relative: pytest.fail("it was read"))
    with pytest.raises(Unfit, match="too large"):
        read_image(Source(tmp_path), "a.png")


def test_a_pipe_is_no_picture(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError):
        read_image(Source(tmp_path), "a.png")


# paths


def test_paths_inside_pass_and_all_others_are_refused(tmp_path: Path) -> None:
    root, outside = tmp_path / "data", tmp_path / "secret"
    (root / "images").mkdir(parents=True)
    outside.mkdir()
    (outside / "a.png").write_bytes(encoded())
    (root / "images" / "a.png").write_bytes(encoded(seed=1))
    (root / "link.png").symlink_to(root / "images" / "a.png")
    (root / "out.png").symlink_to(outside / "a.png")
    (root / "folder").symlink_to(outside)
    (root / "loop").symlink_to(root / "loop")
    source = Source(root)
    for name in ("images/a.png", "./images/a.png", "images/../images/a.png", "link.png"):
        assert read_image(source, name) == encoded(seed=1)
    for name in ("../secret/a.png", "images/../../secret/a.png", str(outside / "a.png"), "/etc/passwd", "..",
                 "out.png", "folder/a.png", "loop/a.png"):  # fmt: skip
        with pytest.raises(Unfit, match="leads out"):
            inside(source, name)
    for name in ("images/a\0.png", "images/\ud800.png"):
        with pytest.raises(Unfit, match="no file"):
            inside(source, name)


@pytest.mark.parametrize("turned", [1, 6])
def test_jpegs_lose_their_metadata_and_nothing_else(turned: int) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x0132] = turned, "Jane Doe", "2020:05:12 10:00:00"
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif, comment=b"ward 7, Jane Doe")
    clean = check_image(file.getvalue())
    assert b"Jane" in file.getvalue() and b"Jane" not in clean and b"2020" not in clean
    before, after = Image.open(file), Image.open(io.BytesIO(clean))
    assert after.getexif().get(0x0112, 1) == turned
    np.testing.assert_array_equal(
        np.asarray(ImageOps.exif_transpose(before)), np.asarray(ImageOps.exif_transpose(after))
    )
    assert check_image(clean) == clean


def test_pngs_lose_their_metadata_and_nothing_else() -> None:
    image = Image.fromarray(np.arange(64 * 40, dtype=np.uint8).reshape(40, 64)).convert("P")
    about = PngImagePlugin.PngInfo()
    about.add_text("Patient", "Jane Doe")
    about.add_itxt("Comment", "ward 7", zip=True)
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=about, transparency=3, dpi=(200, 200))
    clean = check_image(file.getvalue())
    assert b"Jane" in file.getvalue() and b"Jane" not in clean and b"Comment" not in clean
    before, after = Image.open(file), Image.open(io.BytesIO(clean))
    np.testing.assert_array_equal(np.asarray(before.convert("RGBA")), np.asarray(after.convert("RGBA")))
    assert after.info["transparency"] == 3 and "dpi" in after.info
