"""Shards elsewhere: each sample is fetched by one request, and kept here."""

from __future__ import annotations

import atexit
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_shards.errors import UserError
from data_shards.stores.base import INDEX_NAME, MAX_INDEX, check_name, shard_problems
from data_shards.stores.cache import SpanCache, default_cache
from data_shards.stores.fetch import Info, RemoteFiles
from data_shards.strict import read_json

_POINTER = "remote.json"
_MAX_POINTER = 2**16
_PART = 2**25
"""Bytes of an index that one request fetches."""
_STALE = 24 * 3600
"""Seconds after which a copy that was not finished is nobody's."""


class RemoteStore:
    """Shards in a folder that a URL names.

    A sample is fetched when it is first read and kept in the cache (`cache.py`), so that a random order over shards of
    any size begins at once, and a later epoch or run reads this machine's disk. A request that fails is tried four
    times.

    Args:
        url: The folder, as `urls.as_url` gives it.
        cache: Folder of the cache; null: see `default_cache`.
        cache_gb: Most gigabytes (10^9 bytes) in it, of all corpora; null: no limit but the disk's.

    Raises:
        UserError: `cache_gb` is negative.
    """

    def __init__(self, url: str, cache: str | Path | None = None, cache_gb: float | None = None) -> None:
        if cache_gb is not None and not cache_gb >= 0:
            raise UserError(f"cache_gb: {cache_gb} is no number of gigabytes: give 0 or more")
        self._files = RemoteFiles(url)
        self._root = default_cache(cache)
        self._home = self._root / hashlib.sha256(url.encode()).hexdigest()[:16]
        self._limit = None if cache_gb is None else int(cache_gb * 1e9)
        self._index: Path | None = None
        self._spans: SpanCache | None = None

    @property
    def root(self) -> str:
        """The URL, without a password."""
        return self._files.root

    def index_path(self) -> Path:
        """Return where the index lies on this machine; it is copied here first, if it changed there.

        Once asked, a store stays with the index that it found.

        Raises:
            UserError: The URL has no index, or cannot be read.
        """
        if self._index is None:
            info = self._index_info()
            index = self._kept_index(info) or self._new_index(info)
            self._spans = SpanCache(self._home / index.parent.name, self._limit)
            self._index = index  # last: another thread may be waiting for both
        return self._index

    def missing(self, names: Sequence[str], sizes: Sequence[int]) -> Iterator[str]:
        """Yield one line for each shard that does not exist with its recorded size.

        Raises:
            UserError: The URL cannot be read at all.
        """
        names = [check_name(name) for name in names]
        return shard_problems(self.root, names, sizes, self._files.found(names))

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Read a span of a shard, from the cache if it is there; shorter where the shard ends.

        Raises:
            OSError: The shard is missing or is no file.
            MemoryError: There is no memory for the span.
            UserError: It cannot be fetched.
        """
        if size <= 0:
            return b""
        cache = self._cache()
        data = cache.get(name, offset, size)
        if data is None:
            data = self._files.fetch(check_name(name), offset, size)
            if len(data) == size:
                cache.put(name, offset, data)
        return data

    def forget(self, name: str, offset: int, size: int) -> None:
        """Fetch a span once more when it is next read, since the kept bytes are wrong."""
        self._cache().forget(name, offset, size)

    def changed(self, name: str) -> bool:
        """Always false: what was kept of a shard is checked by its bytes."""
        return False

    def close(self) -> None:
        """Close the cache's files; a later read opens them again."""
        if self._spans is not None:
            self._spans.close()

    def _cache(self) -> SpanCache:
        self.index_path()
        assert self._spans is not None
        return self._spans

    def _index_info(self) -> Info:
        """Return what is known of the remote index."""
        try:
            info = self._files.info(INDEX_NAME)
        except OSError as error:
            raise UserError(
                f"{self.root}: no {INDEX_NAME} here: name the folder of one split, such as {self.root}/train, or make "
                "an index with `data-shards index` and copy it there"
            ) from error
        if not info.found.is_file or info.found.size is None or not 0 < info.found.size <= MAX_INDEX:
            raise UserError(f"{self.root}/{INDEX_NAME}: not a file of at most {MAX_INDEX} bytes: copy it there again")
        return info

    def _kept_index(self, info: Info) -> Path | None:
        """Return the index in the cache if it is the one that the server has now."""
        try:
            pointer = read_json(_read_file(self._home / _POINTER, _MAX_POINTER), _MAX_POINTER)
            sha256 = str(pointer.get("sha256"))
            if info.version is None or pointer.get("version") != info.version or not _is_sha256(sha256):
                return None
            path = self._home / sha256 / INDEX_NAME
            with open(path, "rb", opener=_open_file) as file:
                # one of another size is not even hashed
                if os.fstat(file.fileno()).st_size != info.found.size:
                    return None
                return path if hashlib.file_digest(file, "sha256").hexdigest() == sha256 else None
        except (OSError, UserError):
            return None

    def _new_index(self, info: Info) -> Path:
        """Copy the index into the cache or, if that cannot be written, to where this process may."""
        try:
            return self._copy_index(self._home, info)
        except OSError as error:
            problem = error.strerror
        folder = Path(tempfile.mkdtemp(prefix="sam-trainer-"))
        atexit.register(_remove, folder, os.getpid())
        if self._limit != 0:
            warnings.warn(
                f"{self._root}: the cache of remote shards cannot be written ({problem}): the index is copied each "
                "time: make room, or set SAM_TRAINER_CACHE to another folder",
                stacklevel=4,
            )
        try:
            return self._copy_index(folder, info)
        except OSError as error:
            raise UserError(
                f"{folder}: the index of {self.root} cannot be copied here ({error.strerror}): make room, or set TMPDIR"
            ) from error

    def _copy_index(self, home: Path, info: Info) -> Path:
        """Copy the index to ``home/SHA-256/index.npz``, whole or not at all."""
        home.mkdir(parents=True, exist_ok=True)
        partial = home / f".{os.getpid()}-{time.monotonic_ns()}.partial"
        try:
            digest = hashlib.sha256()
            with partial.open("xb") as file:
                for part in self._index_parts(info):
                    digest.update(part)
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            sha256 = digest.hexdigest()
            path = home / sha256 / INDEX_NAME
            path.parent.mkdir(exist_ok=True)
            partial.replace(path)
            pointer = {"url": self.root, "version": info.version, "sha256": sha256}
            partial.write_text(json.dumps(pointer, indent=1))
            partial.replace(home / _POINTER)
        finally:
            partial.unlink(missing_ok=True)
        _tidy(home, sha256)
        return path

    def _index_parts(self, info: Info) -> Iterator[bytes]:
        size = info.found.size
        assert size is not None
        again = f"{self.root}/{INDEX_NAME}: changed while it was copied: start again"
        try:
            for offset in range(0, size, _PART):
                part = self._files.fetch(INDEX_NAME, offset, min(_PART, size - offset))
                if len(part) != min(_PART, size - offset):
                    raise UserError(again)
                yield part
            if self._files.info(INDEX_NAME) != info:
                raise UserError(again)
        except OSError as error:
            raise UserError(again) from error


def _tidy(home: Path, sha256: str) -> None:
    """Remove what belongs to an index that the URL has no more, and copies that were cut off."""
    for path in home.iterdir():
        try:
            if _is_sha256(path.name) and path.name != sha256:
                shutil.rmtree(path, ignore_errors=True)
            elif path.suffix == ".partial" and time.time() - path.stat().st_mtime > _STALE:
                path.unlink()
        except OSError:  # another process was faster
            continue


def _open_file(path: str, flags: int) -> int:
    """Open a plain file: to open a pipe would wait for whoever writes into it."""
    number = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "not a file", path)
    return number


def _read_file(path: Path, limit: int) -> bytes:
    """Read a plain file; of a larger one no more than shows that it is."""
    with open(path, "rb", opener=_open_file) as file:
        return file.read(limit + 1)


def _is_sha256(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def _remove(folder: Path, process: int) -> None:
    """Remove a folder at the end of the process that made it; a fork of it leaves it."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
