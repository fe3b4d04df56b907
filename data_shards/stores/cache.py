"""Samples of remote shards kept on this machine, shared by all processes without a lock.

The layout, below the cache's folder::

    <hash of the URL>/remote.json                             which URL, and which index it had last
    <hash of the URL>/<SHA-256 of the index>/index.npz        the index
    <hash of the URL>/<SHA-256 of the index>/NAME.tar         spans at the offsets that they have in the shard
    <hash of the URL>/<SHA-256 of the index>/NAME.tar.marks   which spans are there

Both files of a shard are sparse: what was never fetched takes no room. A span that begins in block ``offset // 512``
has its mark, eight bytes, at ``8 × block`` of the marks: its size and where in the block it begins, 0 where it is
absent. A mark is written after the bytes of its span, so a process that is killed at any moment leaves either a mark
with its bytes, or bytes that nobody will look at. Processes that fetch one span at the same time write the same bytes
and the same mark. Spans that begin in one block overwrite each other's mark, which costs a request and nothing else.
Spans are those of one index, as the folder has its hash; what a power cut or a bad disk leaves, the reader's CRC-32
finds, and `forget` takes the mark away.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import struct
import warnings
from pathlib import Path
from typing import Any

from data_shards.errors import UserError
from data_shards.stores.base import check_name
from data_shards.stores.local import OpenFile, OpenFiles

_BLOCK = 512
_MARK = struct.Struct("<Q")
_MARKS = ".marks"
_SHARES = 64
"""The free room is measured anew after a process wrote this part of it: so many may fill a cache side by side."""
_RESERVE = (0.05, 10 * 10**9)
"""Part of the disk that is left free, and the most bytes of it: checkpoints need room too."""


def default_cache(cache: str | Path | None = None) -> Path:
    """Return the folder of the cache: that given, else $SAM_TRAINER_CACHE, else one below $XDG_CACHE_HOME or ~/.cache.

    Raises:
        UserError: There is no home folder.
    """
    path = cache or os.environ.get("SAM_TRAINER_CACHE")
    try:
        if path:
            return Path(path).expanduser().absolute()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "sam-trainer"
    except RuntimeError as error:
        raise UserError(f"no folder for the cache of remote shards ({error}): set SAM_TRAINER_CACHE") from error


class Room:
    """How much the cache may still take, of a limit that all corpora in it share and of the disk.

    Args:
        folder: The cache.
        limit: Bytes, or None.
    """

    def __init__(self, folder: Path, limit: int | None) -> None:
        self._folder, self._limit = folder, limit
        self._left = 0

    def take(self, size: int) -> bool:
        """Reserve room; False if there is none.

        Raises:
            OSError: The cache cannot be looked at.
        """
        if size > self._left:
            free = self._free()
            self._left = max(free // _SHARES, min(size, free))
        if size > self._left:
            return False
        self._left -= size
        return True

    def _free(self) -> int:
        disk = shutil.disk_usage(self._folder)
        share, most = _RESERVE
        free = disk.free - int(min(share * disk.total, most))
        if self._limit is not None:
            free = min(free, self._limit - _used(self._folder))
        return max(0, free)


class SpanCache:
    """The kept spans of one index.

    Nothing here ever fails a run: where the folder cannot be written or is full, one warning says so, what is there is
    read and no more is kept.

    Args:
        folder: Where the shards' spans lie, two levels below the cache's own.
        limit: Most bytes of the whole cache; None: until the disk is nearly full; 0: keep nothing.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder = folder
        self._room = Room(folder.parent.parent, limit)
        self._files = OpenFiles()
        self._keeps = limit != 0
        self._wrong: set[tuple[str, int, int]] = set()

    def get(self, name: str, offset: int, size: int) -> bytes | None:
        """Return a span if it is here."""
        if (name, offset, size) in self._wrong:
            return None
        try:
            place, mark = _mark(offset, size)
            if self._open(name, _MARKS).read(place, _MARK.size) != mark:
                return None
            data = self._open(name).read(offset, size)
        except OSError:
            return None
        return data if len(data) == size else None

    def put(self, name: str, offset: int, data: bytes) -> None:
        """Keep a span if there is room."""
        if not self._keeps:
            return
        try:
            if not self._room.take(len(data)):
                self._stop("is full", "raise cache_gb, or make room on the disk")
                return
            place, mark = _mark(offset, len(data))
            self._open(name, create=True).write(offset, data)
            self._open(name, _MARKS, create=True).write(place, mark)
        except OSError as error:
            self._stop(f"cannot be written ({error.strerror})", "make room, or set SAM_TRAINER_CACHE to another folder")

    def forget(self, name: str, offset: int, size: int) -> None:
        """Take a span's mark away."""
        try:
            place, mark = _mark(offset, size)
            marks = self._open(name, _MARKS)
            if marks.read(place, _MARK.size) == mark:
                marks.write(place, bytes(_MARK.size))
        except FileNotFoundError:
            return
        except OSError:  # at least this process knows
            self._wrong.add((name, offset, size))

    def close(self) -> None:
        """Close the files; they are opened again when wanted."""
        self._files.close()

    def _open(self, name: str, ending: str = "", create: bool = False) -> OpenFile:
        """Return the file of a shard's spans or marks, for reading only if it may not be written."""
        file = self._files.get(name + ending)
        if file is None:
            path = self.folder / (check_name(name) + ending)
            try:
                file = self._files.open(name + ending, path, os.O_RDWR | (os.O_CREAT if create else 0))
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or create:
                    raise
                file = self._files.open(name + ending, path)
        return file

    def _stop(self, what: str, remedy: str) -> None:
        if self._keeps:
            self._keeps = False
            place = self.folder.parent.parent
            warnings.warn(
                f"{place}: the cache of remote shards {what}: samples not in it are fetched each time: {remedy}",
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OpenFiles()}


def _mark(offset: int, size: int) -> tuple[int, bytes]:
    """Return where the mark of a span lies, and the mark."""
    block, start = divmod(offset, _BLOCK)
    return _MARK.size * block, _MARK.pack(size * _BLOCK + start)


def _used(folder: Path) -> int:
    """Return the bytes that the files of the cache take on the disk; sparse files take less than they are long."""
    total = 0
    for home in os.scandir(folder):
        if not re.fullmatch("[0-9a-f]{16}", home.name):  # not ours
            continue
        for place, _, names in os.walk(home.path):
            for name in names:
                try:
                    total += os.lstat(f"{place}/{name}").st_blocks * 512
                except OSError:  # another process took it away
                    continue
    return total
