"""The report of a real run in a browser: no request, readable on a phone, in the dark, by keyboard and on paper."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from browser import browsed, needs_browser, too_wide

from trainer.report import write_report
from trainer.run import Run

pytestmark = needs_browser

_CONTRASTS = """() => {
  const rgb = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const light = colour => {
    const [r, g, b] = colour.slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = node => {
    for (let at = node; at; at = at.parentElement) {
      const colour = rgb(getComputedStyle(at).backgroundColor);
      if (colour[3] === 1) return colour;
    }
    return [255, 255, 255, 1];
  };
  const found = [];
  const walker = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    const drawn = node.closest("svg");
    if (!walker.currentNode.data.trim() || node.closest("title, desc") || !node.getClientRects().length) continue;
    const style = getComputedStyle(node);
    const [one, other] = [light(rgb(drawn ? style.fill : style.color)), light(paper(node))];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    found.push([ratio, walker.currentNode.data.trim().slice(0, 40)]);
  }
  return found.sort((a, b) => a[0] - b[0]);
}"""


@pytest.fixture(scope="module")
def page(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run that was evaluated, trained and evaluated again."""
    copy = tmp_path_factory.mktemp("reported") / "run"
    shutil.copytree(tiny_run, copy)
    return write_report(Run(copy))


def visible(tab: Any, what: str) -> int:
    """How many elements a reader sees."""
    return int(tab.locator(f"{what}:visible").count())


@pytest.mark.parametrize("width", [1280, 390])
def test_fits_the_window_and_shows_its_pictures(page: Path, width: int) -> None:
    with browsed(page, width=width) as tab:
        assert too_wide(tab) == 0
        pictures = tab.evaluate(
            """() => Promise.all([...document.querySelectorAll("svg image")].map(async one => {
                 const image = new Image(); image.src = one.getAttribute("href");
                 await image.decode(); return image.naturalWidth; }))"""
        )
        assert pictures and all(pictures), "decode() throws for a damaged one"


def test_asks_for_nothing(page: Path) -> None:
    with browsed(page) as tab:
        asked: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.reload()
        assert [url for url in asked if not url.startswith("data:")] == [page.resolve().as_uri()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_word_stands_out_from_its_paper(page: Path, scheme: Any) -> None:
    with browsed(page, scheme=scheme) as tab:
        contrasts = tab.evaluate(_CONTRASTS)
        assert len(contrasts) > 50
        assert contrasts[0][0] >= 4.5, f"WCAG 2.1 wants 4.5: {contrasts[:5]}"
        paper = tab.evaluate("() => getComputedStyle(document.body).backgroundColor")
        assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]


def test_is_used_by_keyboard(page: Path) -> None:
    with browsed(page) as tab:
        tab.keyboard.press("Tab")
        skip = tab.locator(":focus")
        assert skip.inner_text() == "Skip to the content"
        assert skip.bounding_box()["x"] >= 0, "seen while it has the focus"
        tab.keyboard.press("Enter")
        tab.keyboard.press("Tab")
        first = tab.locator(":focus")
        assert first.evaluate("one => one.closest('nav') !== null")
        assert first.evaluate("one => getComputedStyle(one).outlineStyle") == "solid", "the focus is seen"
        links = tab.locator("nav a")
        for place in range(links.count()):
            target = links.nth(place).get_attribute("href") or ""
            assert tab.locator(f"{target} > h2").inner_text() == links.nth(place).inner_text()
        assert visible(tab, ".tile .truth")
        tab.locator("#show-truth").focus()
        tab.keyboard.press("Space")
        assert not visible(tab, ".tile .truth") and visible(tab, ".tile .prediction")
        tab.locator("#recipe summary").focus()
        tab.keyboard.press("Enter")
        assert "seed_everything" in tab.locator("#recipe pre").inner_text()


def test_is_printed_on_white_with_all_that_is_folded(page: Path) -> None:
    with browsed(page, scheme="dark") as tab:
        assert tab.pdf(format="A4", print_background=True).startswith(b"%PDF-")
        tab.emulate_media(media="print")
        assert tab.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert not visible(tab, "nav") and not visible(tab, ".legend input")
        assert tab.locator("#recipe pre").bounding_box()["height"] > 100, "a folded recipe cannot be opened on paper"
