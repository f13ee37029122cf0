"""Files that appear whole or not at all: written under a temporary name beside their place, then renamed.

A reader never meets half a report or half a prepared folder, whatever interrupts the writer. A killed process
(SIGKILL, power) can leave one `.NAME.XXXXXXXX.partial` behind; nothing reads those, and they may be deleted.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from evlecg.errors import EvlecgError, RunFailed

READ_BYTES = 1 << 20


def write_text_atomic(path: Path, text: str) -> None:
    """Writes UTF-8 text so that `path` holds either its old content or all of the new one.

    Args:
        path: the file; missing parent folders are made.
        text: its new content, line ends as they are.

    Raises:
        EvlecgError: the place cannot be written to.
    """
    partial = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(text.encode("utf-8"))
        partial.replace(path)
    except OSError as error:
        raise EvlecgError(f"a file cannot be written: {error.strerror or error}", where=path) from error
    finally:
        with suppress(OSError):  # renamed, or never made
            partial.unlink()


@contextmanager
def new_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `out` that takes `out`'s name once the block ends without an exception.

    `with new_folder(out, overwrite) as folder: (folder / "x").write_text(...)`. On an exception nothing of it stays,
    parents made for it included; a folder that is being overwritten stays as it was until the new one is complete.

    Args:
        out: the final folder; it may be missing or empty.
        overwrite: replace a folder that is not empty, together with all that it holds.

    Raises:
        EvlecgError: `out` is a file, or not empty without `overwrite`, or cannot be renamed over (a mount point, a
            folder that holds the working or the home folder), or cannot be written to.
    """
    shown, out = out, out.resolve()  # a link such as runs/latest keeps pointing where it pointed
    _check_replaceable(out, shown, overwrite)
    made = _make_parents(out, shown)
    partial = _beside(out)
    try:
        try:
            partial.mkdir()
        except OSError as error:
            raise EvlecgError(f"a folder cannot be made: {error.strerror or error}", where=shown) from error
        yield partial
        _check_replaceable(out, shown, overwrite)  # the work may have taken hours
        _move_over(partial, out, shown)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        _remove_parents(made)
        raise


@contextmanager
def kept_folder(out: Path, overwrite: bool = False, *, keep: Callable[[Path], bool]) -> Iterator[Path]:
    """As `new_folder`, for work that is worth going on with: an interrupted block leaves its folder for the next call.

    The folder is `partial_folder(out)`. It goes when the block raises an `EvlecgError`
    other than `RunFailed`: its input was bad.

    Args:
        out: the final folder; it may be missing or empty.
        overwrite: replace a folder that is not empty, together with all that it holds.
        keep: whether the work that an older block left there (the folder it is given) is to be gone on with.

    Raises:
        EvlecgError: as `new_folder`; or another process is at work there.
    """
    shown, out = out, out.resolve()
    _check_replaceable(out, shown, overwrite)
    made = _make_parents(out, shown)
    partial = partial_folder(out)
    try:
        with locked(partial.with_suffix(".lock"), shown):
            if partial.exists() and not keep(partial):
                shutil.rmtree(partial)
            try:
                partial.mkdir(exist_ok=True)
            except OSError as error:
                raise EvlecgError(f"a folder cannot be made: {error.strerror or error}", where=shown) from error
            try:
                yield partial
            except RunFailed:  # its input was fine
                raise
            except EvlecgError:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            _check_replaceable(out, shown, overwrite)
            _move_over(partial, out, shown)
    except EvlecgError:
        _remove_parents(made)
        raise


def partial_folder(out: Path) -> Path:
    """Where `kept_folder` works until `out` is complete."""
    out = out.resolve()
    return out.with_name(f".{out.name}.partial")


@contextmanager
def locked(lock: Path, shown: Path) -> Iterator[None]:
    """Holds a lock that the system drops when the process ends, however it ends.

    Args:
        lock: file that stands for it.
        shown: what is locked, for the error.

    Raises:
        EvlecgError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows: two jobs on one folder are not told apart there
        yield
        return
    try:
        file = lock.open("w")
    except OSError as error:
        raise EvlecgError(f"a folder cannot be made: {error.strerror or error}", where=shown) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise EvlecgError("another process is writing this folder", where=shown) from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def waiting_lock(lock: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Holds a lock that processes take in turns; the system drops it when a process ends, however it ends.

    Args:
        lock: the file; it stays, or a process that waits for the old one and one that makes a new one would both hold.
        on_wait: called once where another process holds it.

    Raises:
        EvlecgError: the file cannot be made.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise EvlecgError(f"a folder cannot be written to: {error.strerror or error}", where=lock.parent) from error
    with file:
        try:
            import fcntl
        except ImportError:  # Windows: see `_locked`
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read a piece at a time.

    Raises:
        EvlecgError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(READ_BYTES):
                digest.update(piece)
    except OSError as error:
        raise EvlecgError(f"a file cannot be read: {error.strerror or error}", where=path) from error
    return digest.hexdigest()


def to_disk(path: Path) -> None:
    """Returns once a file, or a folder with all that it holds, is on the disk and no longer in a cache alone.

    Raises:
        OSError: it cannot be, for example because the disk is full.
    """
    for item in [*path.rglob("*"), path] if path.is_dir() else [path]:
        if item.is_dir() and os.name == "nt":  # Windows opens no folders
            continue
        descriptor = os.open(item, os.O_RDONLY if item.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _beside(path: Path) -> Path:
    """A fresh hidden name in the same folder, hence on the same file system: a rename there is atomic."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")


def _check_replaceable(out: Path, shown: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise EvlecgError("the output folder is a file", where=shown)
    home = Path(os.environ.get("HOME", os.sep)).resolve()  # Path.home() raises for a user without an account
    if out.is_mount() or Path.cwd().is_relative_to(out) or home.is_relative_to(out):
        raise EvlecgError(
            "the output folder is a mount point, or holds the working or home folder, and cannot be replaced",
            where=shown,
            hint=f"name a folder inside it: {shown / 'out'}",
        )
    if not overwrite and any(out.iterdir()):
        raise EvlecgError("the output folder is not empty", where=shown, hint="choose another, or add --overwrite")


def _make_parents(out: Path, shown: Path) -> list[Path]:
    """The parents that had to be made, innermost first."""
    made = []
    parent = out.parent
    while not parent.exists():
        made.append(parent)
        parent = parent.parent
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvlecgError(f"a folder cannot be made: {error.strerror or error}", where=shown) from error
    return made


def _remove_parents(made: list[Path]) -> None:
    for parent in made:
        try:
            parent.rmdir()
        except OSError:  # someone else uses it by now
            break


def _move_over(partial: Path, out: Path, shown: Path) -> None:
    """Puts `partial` in `out`'s place; the old folder comes back when that fails."""
    old = _beside(out) if out.exists() else None
    try:
        if old is not None:
            out.rename(old)
        try:
            partial.rename(out)
        except BaseException:
            if old is not None:
                old.rename(out)
            raise
    except OSError as error:
        raise EvlecgError(f"a folder cannot be replaced: {error.strerror or error}", where=shown) from error
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
