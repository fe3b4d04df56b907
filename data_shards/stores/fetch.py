"""Spans of remote files: fsspec, with what it leaves open: retries, whose fault an error is, and forked processes."""

from __future__ import annotations

import errno
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

from data_shards.errors import UserError
from data_shards.stores.base import Found
from data_shards.stores.urls import SCHEMES, scheme_of, without_password
from data_shards.stores.web import NoRangesError, web_info, web_range

T = TypeVar("T")

_PAUSES = (0.5, 2.0, 8.0)
"""Seconds between the tries of a request."""
_AT_ONCE = 16
"""Questions for sizes that are on their way together, where a folder cannot be listed."""
_VERSION = (
    "ETag", "etag", "LastModified", "last_modified", "last_commit", "blob_id", "mtime", "ino", "created", "updated",
    "generation",
)  # fmt: skip
"""Fields by which the file systems tell that a file is another one than it was."""
_NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)

_file_systems: dict[tuple[Any, ...], Any] = {}
"""File systems by process. Their event loops and connections do not survive a fork, so a child makes its own. Those of
its parent stay here untouched: to delete them would close connections that the parent still uses."""


@dataclass(frozen=True)
class Info:
    """What a server says of a file.

    Attributes:
        found: Whether it is a file, and its size.
        version: Changes when the file does; None where the server says nothing but its size.
    """

    found: Found
    version: str | None


class RemoteFiles:
    """The files of one remote folder; holds nothing open.

    Args:
        url: The folder, as `urls.as_url` gives it.
    """

    def __init__(self, url: str) -> None:
        self.url, self.root = url, without_password(url)
        self._scheme = SCHEMES[scheme_of(url)]
        self._web = scheme_of(url) in ("http", "https")

    def fetch(self, name: str, offset: int, size: int) -> bytes:
        """Return a span of a file; shorter where the file ends.

        Raises:
            OSError: There is no such file.
            UserError: It cannot be fetched.
        """
        return self._retried(name, lambda files, path: self._whole_span(files, path, offset, size))

    def info(self, name: str) -> Info:
        """Return what is known of a file.

        Raises:
            OSError: There is no such file.
            UserError: Nobody answers.
        """
        return self._retried(name, self._info)

    def found(self, names: Sequence[str]) -> Iterator[Found | None]:
        """Yield what lies under each name, None for nothing.

        Raises:
            UserError: Nobody answers.
        """
        listing = None if self._web else self._listing()
        if listing is not None:
            yield from (listing.get(name) for name in names)
            return
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            yield from pool.map(self._found, names)

    def _found(self, name: str) -> Found | None:
        try:
            return self.info(name).found
        except OSError:
            return None

    def _listing(self) -> dict[str, Found] | None:
        """Return all files of the folder by name, or None where it may not be listed."""

        def ls(files: Any, path: str) -> list[dict[str, Any]]:
            files.invalidate_cache()
            return files.ls(path, detail=True)

        try:
            items = self._retried("", ls)
        except _NO_FILE:
            return {}
        except _DeniedError:
            return None
        return {item["name"].rstrip("/").rpartition("/")[2]: _as_found(item) for item in items}

    def _info(self, files: Any, path: str) -> Info:
        if self._web:
            size, version = web_info(files, path)
            return Info(Found(True, size), version)
        files.invalidate_cache()
        item = files.info(path)
        known = [f"{name}={item[name]}" for name in _VERSION if item.get(name) is not None]
        return Info(_as_found(item), "; ".join([*known, f"size={item.get('size')}"]) if known else None)

    def _whole_span(self, files: Any, path: str, offset: int, size: int) -> bytes:
        """Return a span, and make sure that nothing but the file's end cuts it."""
        data = self._span(files, path, offset, size)
        if len(data) == size:
            return data
        total = self._info(files, path).found.size
        if total is not None and len(data) != max(0, min(size, total - offset)):
            raise ConnectionError(f"{len(data)} bytes came instead of {size}")
        return data

    def _span(self, files: Any, path: str, offset: int, size: int) -> bytes:
        if self._web:
            return web_range(files, path, offset, size)
        options: dict[str, Any] = {}
        if scheme_of(self.url) == "hf":
            options["cache_type"] = "none"  # or megabytes are read ahead
        elif scheme_of(self.url) == "file":
            item = files.info(path)  # to open a pipe would wait for whoever writes into it
            if item["type"] != "file":
                raise IsADirectoryError(errno.EISDIR, "not a file")
            size = max(0, min(size, item["size"] - offset))
        try:
            return files.cat_file(path, start=offset, end=offset + size, **options)
        except Exception as error:
            if "416" in str(error) or "range" in f"{error!r}".lower():
                return b""  # perhaps the file ends before: `_whole_span` asks
            raise

    def _retried(self, name: str, action: Callable[[Any, str], T]) -> T:
        """Run a request until it succeeds, or trying again is in vain."""
        shown = f"{self.root}/{name}".rstrip("/")
        for pause in (*_PAUSES, None):
            try:
                files = self._file_system()
                return action(files, self._path(files, name))
            except ImportError as error:
                raise UserError(
                    f"{shown}: a driver is missing ({_reason(error)}): pip install '{self._scheme.install}'"
                ) from error
            except NoRangesError as error:
                raise UserError(f"{shown}: {error}: serve the folder with another server, or copy it here") from error
            except MemoryError:
                raise
            except Exception as error:  # each driver has errors of its own
                if _is_denied(error):
                    raise _DeniedError(f"{shown}: access denied ({_reason(error)}): {self._scheme.rights}") from error
                if isinstance(error, _NO_FILE):
                    number = error.errno or errno.ENOENT
                    raise type(error)(number, os.strerror(number), shown) from error
                if pause is None or isinstance(error, ValueError | TypeError):
                    tries = len(_PAUSES) + 1 if pause is None else 1
                    raise UserError(
                        f"{shown}: cannot be fetched, tried {tries}× ({_reason(error)}): correct the URL or mend the "
                        "connection, then start again: a run resumes where it was"
                    ) from error
                time.sleep(pause * random.SystemRandom().uniform(0.5, 1.5))  # not all workers again at once
        raise AssertionError

    def _path(self, files: Any, name: str) -> str:
        if self._web:
            return f"{self.url}/{quote(name)}".rstrip("/")
        return files._strip_protocol(f"{self.url}/{name}".rstrip("/"))

    def _file_system(self) -> Any:
        """Return the file system of this process."""
        import fsspec

        kind = fsspec.get_filesystem_class(scheme_of(self.url))
        options = kind._get_kwargs_from_urls(self.url)
        key = (os.getpid(), scheme_of(self.url), tuple(sorted(options.items())))
        if key not in _file_systems:
            if self._web:
                from aiohttp import ClientTimeout

                timeout = ClientTimeout(total=300, sock_connect=20, sock_read=60)
                # proxies and ~/.netrc are the environment's
                options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
            return _file_systems.setdefault(key, kind(skip_instance_cache=True, **options))
        return _file_systems[key]


class _DeniedError(UserError):
    """The server knows us too little."""


def _as_found(item: dict[str, Any]) -> Found:
    return Found(item.get("type") == "file", item.get("size"))


def _is_denied(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, is about rights; the drivers have no common type for it."""
    while error is not None:
        numbers = [getattr(error, name, None) for name in ("status", "status_code", "code")]
        numbers.append(getattr(getattr(error, "response", None), "status_code", None))
        name = type(error).__name__
        if isinstance(error, PermissionError) or {401, 403, 407} & {n for n in numbers if isinstance(n, int)}:
            return True
        if "Credential" in name or "Authentication" in name or str(error).startswith("Forbidden"):
            return True
        error = error.__cause__
    return False


def _reason(error: BaseException) -> str:
    """Return an error in a few words."""
    text = re.sub(r"://[^/@\s]*@", "://***@", " ".join(str(error).split()))
    name = type(error).__name__
    return f"{name}: {text[:200]}" if text else name
