"""The completion mark of a checkpoint: what belongs to it, and the checksum of each file. It is written last."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from data_shards.errors import UserError

FORMAT = 1
"""Of marks and of what they stand for; another one is refused."""
FOLDER_MARK = "complete.json"
"""Name of the mark inside of a checkpoint's folder."""

_CHUNK = 2**24
"""Bytes that are hashed and written at a time."""
_LARGEST = 2**26
"""Bytes of a mark: a million files would need more."""
_PLAIN = re.compile(r"[A-Za-z0-9_=-][A-Za-z0-9._=-]*")

Advance = Callable[[int], object]
"""Is told of bytes that were read or written."""


@dataclass(frozen=True)
class Entry:
    """One file of a checkpoint.

    Attributes:
        bytes: Its size.
        sha256: Its checksum, in hexadecimal digits.
    """

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Mark:
    """What a complete checkpoint consists of.

    Attributes:
        step: Optimiser steps taken.
        files: Its files by name, without the mark.
    """

    step: int
    files: Mapping[str, Entry]

    def encode(self) -> bytes:
        """The mark as a file: JSON with a checksum of its own, so that no byte of it can change unseen."""
        files = {name: {"bytes": entry.bytes, "sha256": entry.sha256} for name, entry in sorted(self.files.items())}
        body = {"format": FORMAT, "step": self.step, "files": files}
        own = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        return (json.dumps({**body, "sha256": own}, indent=1) + "\n").encode()

    def write(self, path: Path) -> None:
        """Write the mark to stay."""
        with HashedFile(path) as file:
            file.write(self.encode())

    @classmethod
    def read(cls, path: Path) -> Mark:
        """Read a mark.

        Raises:
            UserError: It is missing, damaged, or of another format.
        """
        try:
            if path.is_symlink() or not path.is_file():
                raise UserError(f"{path}: no completion mark: the checkpoint was not written to its end")
            with path.open("rb") as file:
                raw = file.read(_LARGEST)
            content = json.loads(raw)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: the checkpoint's mark is damaged ({type(error).__name__})") from error
        found = content.get("format") if isinstance(content, dict) else None
        if type(found) is int and found != FORMAT:
            raise UserError(f"{path}: the checkpoint is of format {found}, this trainer reads format {FORMAT}")
        try:
            mark = cls(content["step"], {name: Entry(**entry) for name, entry in _files(content).items()})
            whole = mark.encode() == raw
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: the checkpoint's mark is damaged ({type(error).__name__})") from error
        if not whole:
            raise UserError(f"{path}: the checkpoint's mark is damaged: its checksum is another one")
        for name, entry in mark.files.items():
            if not _PLAIN.fullmatch(name):
                raise UserError(f"{path}: the checkpoint's mark names {name!r}, which is no file of its own")
            if type(entry.bytes) is not int or entry.bytes < 0 or not re.fullmatch("[0-9a-f]{64}", str(entry.sha256)):
                raise UserError(f"{path}: the checkpoint's mark is damaged: size or checksum of {name}")
        if type(mark.step) is not int or not mark.files:
            raise UserError(f"{path}: the checkpoint's mark is damaged: it names no step or no file")
        return mark

    def fits(self, name: str, path: Path) -> bool:
        """Whether a file has the size that the mark says."""
        return path.is_file() and path.stat().st_size == self.files[name].bytes

    def check(self, name: str, path: Path, advance: Advance = lambda _: None) -> None:
        """Check one of the files, all bytes of it.

        Args:
            name: Its name in the mark.
            path: Where it is.
            advance: Is told of bytes as they are read.

        Raises:
            UserError: It is missing, no plain file, or was changed since.
        """
        wanted = self.files[name]
        if path.is_symlink() or not path.is_file():
            raise UserError(f"{path}: the checkpoint's file is missing or no plain file")
        size = path.stat().st_size
        if size != wanted.bytes:
            what = "truncated" if size < wanted.bytes else "too long"
            raise UserError(f"{path}: {what}: {size:,} bytes, {wanted.bytes:,} were written")
        if digest(path, advance) != wanted.sha256:
            raise UserError(f"{path}: damaged: its SHA-256 is not the one that was written")


def _files(content: Any) -> dict[str, Any]:
    files: dict[str, Any] = dict(content["files"].items())
    return files


def digest(path: Path, advance: Advance = lambda _: None) -> str:
    """SHA-256 of a file, in hexadecimal digits.

    Raises:
        UserError: It cannot be read.
    """
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_CHUNK):
                found.update(piece)
                advance(len(piece))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    return found.hexdigest()


class HashedFile:
    """A new file that is hashed while it is written, and is on the disk when it is closed.

    Both release Python's lock, piece by piece: a training goes on beside.

    Args:
        path: Where to; what is there is replaced.
        advance: Is told of bytes as they are written.
    """

    def __init__(self, path: Path, advance: Advance = lambda _: None) -> None:
        self._advance = advance
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self._size = 0

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def write(self, data: Any) -> int:
        """Write bytes, or whatever has some."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK):
            piece = view[start : start + _CHUNK]
            self._file.write(piece)
            self._hash.update(piece)
            self._advance(len(piece))
        self._size += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing: closing does."""

    def entry(self) -> Entry:
        """Size and checksum of what was written."""
        return Entry(self._size, self._hash.hexdigest())


def sync(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:  # a system without
        return
    try:
        os.fsync(number)
    except OSError:  # a file system without
        pass
    finally:
        os.close(number)
