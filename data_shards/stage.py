"""Folders that several processes may want: locks, durable writes, and the swap that puts a new corpus in place."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from data_shards.errors import UserError

CORPUS, OLD, LOCK = "corpus", "old", "lock"
"""In a work folder: the corpus to come, the one that it replaces, and the file that is locked."""


def work_folder(out: Path) -> Path:
    """Return the hidden folder beside a corpus in which it is made; where `out` is a link, beside what it points to."""
    place = out.resolve()
    return place.with_name(f".{place.name}.partial")


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn whatever the disk refuses into a `UserError` that names `out`."""
    try:
        yield
    except OSError as error:
        refused = UserError(f"{out}: cannot be written ({error.strerror or error}): choose another --out")
        for note in getattr(error, "__notes__", ()):
            refused.add_note(note)
        raise refused from error


@contextmanager
def workspace(folder: Path, busy: str, useful: Callable[[], str | None]) -> Iterator[None]:
    """Make a folder and hold its lock; on an error it is removed, with the parents made for it, unless it is useful.

    Args:
        folder: The folder.
        busy: What to say if another process holds it.
        useful: Says, after an error, what is worth keeping: it becomes a note of the error. None removes the folder.

    Raises:
        UserError: Another process holds it.
    """
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        with locked(folder, busy):
            try:
                yield
            except BaseException as error:
                kept = useful()
                if kept is None:
                    shutil.rmtree(folder, ignore_errors=True)
                else:
                    error.add_note(kept)
                raise
    except BaseException:
        for parent in made:
            with suppress(OSError):  # it may hold what another process is making
                parent.rmdir()
        raise


@contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """Make a folder and hold its lock, which ends with the process; some file systems have no locks.

    Raises:
        UserError: Another process holds it.
    """
    file = None
    while file is None:
        file = _lock(folder, busy)
    with file:
        yield


def _lock(folder: Path, busy: str) -> IO[str] | None:
    """Return the locked file of a folder, or None if its owner finished and removed it under our hands."""
    _make(folder)
    path = folder / LOCK
    try:
        file = path.open("a")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(busy) from None
    except OSError:
        pass
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    file.close()
    return None


def _make(folder: Path) -> None:
    """Make a folder and its parents, though another process may be removing the same empty ones."""
    for _ in range(20):
        with suppress(FileNotFoundError):
            folder.mkdir(parents=True, exist_ok=True)
            return
    folder.mkdir(parents=True, exist_ok=True)


def recover(out: Path) -> None:
    """Put the old corpus back if a build was killed between taking it away and putting the new one in its place."""
    place, work = out.resolve(), work_folder(out)
    if not place.exists() and (work / OLD).exists():
        (work / OLD).rename(place)


def settle(out: Path) -> None:
    """Begin work on the place of a corpus: what a killed build left there is put right.

    Raises:
        UserError: Nothing can ever be swapped in there, or the disk refuses.
    """
    if out.resolve().is_mount():
        raise UserError(f"{out}: is where a disk is mounted, which cannot be renamed: choose a folder inside it")
    with writing(out):
        recover(out)


def swap(work: Path, out: Path) -> None:
    """Put the new corpus of a work folder in its place; the old one, if any, goes into the work folder."""
    place = out.resolve()
    shutil.rmtree(work / OLD, ignore_errors=True)
    sync_folder(work / CORPUS)
    if place.exists():
        place.rename(work / OLD)
    try:
        (work / CORPUS).rename(place)
    except OSError:
        recover(out)
        raise
    sync_folder(place.parent)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that is whole, and on disk, or not there."""
    hidden = path.with_name(f".{path.name}.partial")
    with hidden.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    hidden.rename(path)
    sync_folder(path.parent)


def read_json(path: Path) -> Any:
    """Read a JSON file; None if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where its file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)
