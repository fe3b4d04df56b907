"""A web server on this machine that serves a folder and misbehaves as told."""

from __future__ import annotations

import base64
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


@dataclass
class Web:
    """What the server does, and what it was asked.

    Attributes:
        folder: What it serves.
        url: Where.
        ranges: Whether it sends parts of files.
        failures: So many requests for shards are answered with status 503.
        truncated: So many answers end before they should.
        short: So many answers are shorter than asked for, and say so.
        shifted: Parts begin so many bytes after where they were asked to.
        password: Who asks must know it.
        asked: (path, range) of every request.
        before: Called before each answer.
    """

    folder: Path
    url: str = ""
    ranges: bool = True
    failures: int = 0
    truncated: int = 0
    short: int = 0
    shifted: int = 0
    password: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)
    before: Callable[[str], None] = lambda path: None

    def shards_asked(self) -> int:
        """How many requests were for shards."""
        return sum(path.endswith(".tar") for path, _ in self.asked)


@contextmanager
def serve(folder: Path) -> Iterator[Web]:
    """Serve a folder until the block ends."""
    web = Web(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            path, wanted = unquote(self.path), self.headers.get("Range", "")
            web.asked.append((path, wanted))
            web.before(path)
            token = base64.b64encode(f"me:{web.password}".encode()).decode()
            if web.password and self.headers.get("Authorization") != f"Basic {token}":
                return self._answer(401, b"who?")
            if path.endswith(".tar") and web.failures:
                web.failures -= 1
                return self._answer(503, b"busy")
            file = web.folder / path.strip("/")
            if not file.is_file():
                return self._answer(404, b"nothing here")
            data = file.read_bytes()
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
            if not web.ranges or span is None:
                return self._answer(200, data)
            start, stop = int(span[1]) + web.shifted, min(int(span[2]) + web.shifted + 1, len(data))
            if start >= len(data):
                return self._answer(416, b"", f"bytes */{len(data)}")
            cut = 0
            if path.endswith(".tar") and web.short and stop - start > 7:
                web.short -= 1
                stop -= 7
            elif path.endswith(".tar") and web.truncated:
                web.truncated -= 1
                cut = 5
            return self._answer(206, data[start:stop], f"bytes {start}-{stop - 1}/{len(data)}", cut, file)

        def _answer(self, status: int, body: bytes, span: str = "", cut: int = 0, file: Path | None = None) -> None:
            self.send_response(status)
            if span:
                self.send_header("Content-Range", span)
            if file is not None:
                self.send_header("ETag", f'"{file.stat().st_mtime_ns}"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) - cut])
            if cut:
                self.close_connection = True

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        web.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield web
        finally:
            server.shutdown()
            thread.join()
