"""Shards in a folder of this machine, and the open files that the cache of remote ones shares."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_shards.stores.base import INDEX_NAME, Found, check_name, shard_problems

_MAX_OPEN = 256
"""Files kept open by one store; beyond it a file is opened for each read."""


Identity = tuple[int, int, int]
"""Inode, bytes, and time of the last change in ns of a file."""


def identity(status: os.stat_result) -> Identity:
    """What tells a file from one that was put in its place, or from itself after a change."""
    return status.st_ino, status.st_size, status.st_mtime_ns


class OpenFile:
    """A file descriptor that is closed when the last who uses it lets go: another thread may be reading from it."""

    __slots__ = ("number",)

    def __init__(self, path: Path, flags: int = os.O_RDONLY) -> None:
        self.number = -1
        # Opening a pipe would wait for whoever writes into it.
        self.number = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)

    def read(self, offset: int, size: int) -> bytes:
        """Read a span; shorter where the file ends."""
        # Memory is taken before bytes are read: not for more of them than there are.
        return os.pread(self.number, max(0, min(size, os.fstat(self.number).st_size - offset)), offset)

    def write(self, offset: int, data: bytes) -> None:
        """Write all of the bytes."""
        rest = memoryview(data)
        while rest:
            done = os.pwrite(self.number, rest, offset)
            rest, offset = rest[done:], offset + done


class OpenFiles:
    """Open files by name, at most `_MAX_OPEN`."""

    def __init__(self) -> None:
        self._files: dict[str, OpenFile] = {}

    def get(self, name: str) -> OpenFile | None:
        """Return a file that is open."""
        return self._files.get(name)

    def open(self, name: str, path: Path, flags: int = os.O_RDONLY) -> OpenFile:
        """Open a file, and keep it open if few are."""
        file = OpenFile(path, flags)
        return self._files.setdefault(name, file) if len(self._files) < _MAX_OPEN else file

    def drop(self, name: str) -> None:
        """Forget a file: it is opened again when it is next wanted."""
        self._files.pop(name, None)

    def close(self) -> None:
        """Forget all files."""
        self._files.clear()


class LocalStore:
    """Shards in a folder.

    A shard that is replaced while it is open is read on as it was, until the file is opened anew: in another process,
    after `close`, or after `forget`.

    Args:
        folder: Folder of the shards and their index.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files = OpenFiles()
        self._first: dict[str, Identity] = {}
        """What files were when they were first looked at."""

    @property
    def root(self) -> str:
        """The folder."""
        return str(self.folder)

    def index_path(self) -> Path:
        """Return the path of the index, whether it exists or not."""
        path = self.folder / INDEX_NAME
        with contextlib.suppress(OSError):
            self._first.setdefault(INDEX_NAME, identity(path.stat()))
        return path

    def missing(self, names: Sequence[str], sizes: Sequence[int]) -> Iterator[str]:
        """Yield one line for each shard that does not exist with its recorded size."""
        return shard_problems(self.root, names, sizes, map(self._found, names))

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Read a span of a shard; shorter where the shard ends.

        Raises:
            OSError: The shard is missing or is no file.
            MemoryError: There is no memory for the span.
        """
        file = self._files.get(name)
        if file is None:
            file = self._files.open(name, self.folder / check_name(name))
            self._first.setdefault(name, identity(os.fstat(file.number)))
        return file.read(offset, size)

    def forget(self, name: str, offset: int, size: int) -> None:
        """Open the shard anew for the next read, if another file has its name now."""
        file = self._files.get(name)
        if file is None:
            return
        try:
            now = os.stat(self.folder / check_name(name))  # noqa: PTH116
        except OSError:
            now = None
        if now is None or not os.path.samestat(now, os.fstat(file.number)):
            self._files.drop(name)

    def changed(self, name: str) -> bool:
        """Whether a file is another one than when it was first looked at, is gone, or was written to since."""
        try:
            now = identity(os.stat(self.folder / name))  # noqa: PTH116
        except OSError:
            return name in self._first
        return now != self._first.setdefault(name, now)

    def close(self) -> None:
        """Close the shards; a later read opens them again."""
        self._files.close()

    def _found(self, name: str) -> Found | None:
        try:
            status = os.stat(self.folder / str(name))  # noqa: PTH116  # twice as fast as the method
        except OSError:
            return None
        self._first.setdefault(str(name), identity(status))
        return Found(stat.S_ISREG(status.st_mode), status.st_size)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OpenFiles()}
