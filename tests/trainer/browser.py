"""Pages in a real browser: the system's Chromium, headless, driven by Playwright; without one, tests are skipped."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")

_PICTURES = """() => Promise.all([...document.images].map(async image => {
  image.loading = "eager";
  try { await image.decode(); } catch { }
  return image.naturalWidth > 0 ? null : (image.alt || image.currentSrc.slice(0, 80) || "a picture without a source");
})).then(all => all.filter(one => one !== null))"""


@contextmanager
def browsed(
    page: Path | str,
    width: int = 1280,
    height: int = 900,
    scheme: Literal["light", "dark"] = "light",
    streams: str = "",
    requests: list[str] | None = None,
) -> Iterator[Any]:
    """Open a page, give it to the test, and fail if it complained or a picture did not load.

    Args:
        page: A file, or an address on this machine.
        width: Of the window, in CSS pixels.
        height: Of the window, in CSS pixels.
        scheme: What the reader's system prefers.
        streams: What is in the addresses of streams that the page itself may end; none by default.
        requests: Takes the address of all that the page asks for.

    Yields:
        Playwright's page, for clicks, keys and screenshots.
    """
    from playwright.sync_api import sync_playwright

    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            tab = context.new_page()
            tab.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
            tab.on("pageerror", lambda error: complaints.append(str(error)))
            tab.on("requestfailed", lambda request: complaints.extend(_failed(request, streams)))
            if requests is not None:
                tab.on("request", lambda request: requests.append(request.url))
            tab.goto(page.resolve().as_uri() if isinstance(page, Path) else page)
            yield tab
            lacking = tab.evaluate(_PICTURES)
        finally:
            browser.close()
    assert not complaints, complaints
    assert not lacking, f"pictures that did not load: {lacking}"


def _failed(request: Any, streams: str) -> list[str]:
    """A complaint about a request, unless it is a stream that the page ended."""
    ended = streams and streams in request.url and request.failure == "net::ERR_ABORTED"
    return [] if ended else [f"{request.url[:120]}: {request.failure}"]


def too_wide(tab: Any) -> int:
    """CSS pixels by which a page is wider than its window; 0 where it fits."""
    return int(tab.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth"))
