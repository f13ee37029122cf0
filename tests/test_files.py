"""Files and folders appear whole or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from evlecg import files
from evlecg.errors import EvlecgError
from evlecg.files import new_folder, sha256_file, write_text_atomic


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_text_is_written_with_its_parents_and_replaces_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.md"
    write_text_atomic(path, "µV\r\nold")
    write_text_atomic(path, "µV\nnew")
    assert path.read_bytes() == "µV\nnew".encode()
    assert names(path.parent) == ["b.md"]


def test_failed_text_write_keeps_the_old_file_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "b.md"
    path.write_text("old")

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(EvlecgError, match="No space left"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["b.md"]


def test_write_below_a_file_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EvlecgError, match="cannot be written"):
        write_text_atomic(tmp_path / "file" / "b.md", "x")
    with pytest.raises(EvlecgError, match="cannot be made"), new_folder(tmp_path / "file" / "out"):
        pass


@pytest.mark.parametrize("exists", [False, True])
def test_folder_appears_at_the_end_only(tmp_path: Path, exists: bool) -> None:
    out = tmp_path / "deep" / "out"
    if exists:
        out.mkdir(parents=True)
    with new_folder(out) as folder:
        (folder / "x").write_text("1")
        assert folder.parent == out.parent  # same file system
        assert not (out / "x").exists()
    assert (out / "x").read_text() == "1"
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt])
def test_interrupted_folder_leaves_nothing(tmp_path: Path, interruption: type[BaseException]) -> None:
    with pytest.raises(interruption), new_folder(tmp_path / "deep" / "deeper" / "out") as folder:
        (folder / "x").write_text("1")
        raise interruption
    assert names(tmp_path) == []


def test_folder_that_is_not_empty_needs_overwrite(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(EvlecgError, match="not empty") as caught, new_folder(tmp_path):
        pass
    assert "--overwrite" in caught.value.hint
    assert names(tmp_path) == ["x"]


def test_folder_filled_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(EvlecgError, match="not empty"), new_folder(out) as folder:
        (folder / "x").write_text("ours")
        out.mkdir()
        (out / "x").write_text("theirs")
    assert (out / "x").read_text() == "theirs"
    assert names(tmp_path) == ["out"]


def test_overwrite_replaces_all_of_the_old_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with new_folder(out, overwrite=True) as folder:
        assert names(out) == ["old"]
        (folder / "new").write_text("new")
    assert names(out) == ["new"]
    assert names(tmp_path) == ["out"]


def test_old_folder_survives_an_exception_and_a_failed_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(ValueError), new_folder(out, overwrite=True):
        raise ValueError
    assert (out / "old").read_text() == "old"

    rename = Path.rename
    calls = []

    def second_fails(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:  # 1: old folder aside, 2: new folder in, 3: old folder back
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(EvlecgError, match="cannot be replaced"), new_folder(out, overwrite=True):
        pass
    assert len(calls) == 3
    assert (out / "old").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_link_keeps_pointing_at_the_new_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "latest").symlink_to("real")
    with new_folder(tmp_path / "latest") as folder:
        (folder / "x").write_text("1")
    assert (tmp_path / "latest").is_symlink()
    assert (tmp_path / "real" / "x").read_text() == "1"


def test_working_folder_file_and_mount_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EvlecgError, match="is a file"), new_folder(tmp_path / "file", overwrite=True):
        pass
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EvlecgError, match="working or home"), new_folder(Path(), overwrite=True):
        pass
    assert names(tmp_path) == ["file"]


def test_hash_equals_hashlib_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "READ_BYTES", 7)
    (tmp_path / "x").write_bytes(bytes(range(100)))
    assert sha256_file(tmp_path / "x") == hashlib.sha256(bytes(range(100))).hexdigest()
    with pytest.raises(EvlecgError, match="cannot be read"):
        sha256_file(tmp_path / "missing")
