"""Spans of files on web servers, which may ignore that only a span was asked for."""

from __future__ import annotations

import re
from typing import Any


class NoRangesError(Exception):
    """The server does not send spans of files."""


def web_range(files: Any, url: str, offset: int, size: int) -> bytes:
    """Return a span of a file; shorter where the answer ends.

    Args:
        files: fsspec's file system of the web.
        url: The file.
        offset: First byte.
        size: Number of bytes.

    Raises:
        NoRangesError: The server sends something else than the span.
        FileNotFoundError: There is no such file.
        PermissionError: The server wants to know who asks.
        OSError: The server fails.
    """
    return _sync(files, _range, url, offset, size)[0]


def web_info(files: Any, url: str) -> tuple[int | None, str | None]:
    """Return size and version of a file, either None where the server does not say.

    Raises:
        NoRangesError: The server sends no spans.
        OSError: As in `web_range`.
    """
    # One byte is asked for, since `HEAD` is often not answered, or otherwise than `GET`.
    _, total, version = _sync(files, _range, url, 0, 1)
    return total, version


def _sync(files: Any, action: Any, *arguments: Any) -> Any:
    from fsspec.asyn import sync

    return sync(files.loop, action, files, *arguments)


async def _range(files: Any, url: str, offset: int, size: int) -> tuple[bytes, int | None, str | None]:
    """Return the bytes of a span, the size of the file and its version."""
    session = await files.set_session()
    asked = files.kwargs.get("headers", {})  # such as a token, from fsspec's configuration
    headers = {**asked, "Range": f"bytes={offset}-{offset + size - 1}", "Accept-Encoding": "identity"}
    async with session.get(files.encode_url(url), **{**files.kwargs, "headers": headers}) as answer:
        _check(answer.status)
        said = answer.headers.get("Content-Range", "")
        if answer.status == 416:  # the file ends before the span
            total = re.fullmatch(r"bytes \*/(\d+)", said)
            return b"", int(total[1]) if total else None, None
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", said)
        if answer.status != 206 or span is None or int(span[1]) != offset:
            raise NoRangesError(f"the server does not send parts of files (status {answer.status} to a range request)")
        data = bytearray()
        async for chunk in answer.content.iter_any():
            data += chunk
            if len(data) > size:
                raise NoRangesError(f"the server sends more than the {size} bytes that it was asked for")
        known = [answer.headers[name] for name in ("ETag", "Last-Modified") if name in answer.headers]
        total_size = None if span[2] == "*" else int(span[2])
        return bytes(data), total_size, "; ".join([*known, span[2]]) if known else None


def _check(status: int) -> None:
    """Raise for a status that means failure."""
    if status in (404, 410):
        raise FileNotFoundError
    if status in (401, 403, 407):
        raise PermissionError(f"status {status}")
    if status >= 400 and status != 416:
        raise ConnectionError(f"status {status}")
