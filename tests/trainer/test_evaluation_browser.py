"""The page of an evaluation in a real browser: pictures load, nothing is too wide, charts can be read and opened."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from browser import browsed, needs_browser, too_wide
from evaluations import evaluate, write_nodules

pytestmark = needs_browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models, one of them asked by text, on images with and without a spacing."""
    folder = tmp_path_factory.mktemp("page")
    shards = folder / "shards"
    shards.mkdir()
    sets = [
        {
            "name": "nodules",
            "folder": str(write_nodules(shards)),
            "kind": "2d",
            "objects": "term",
            "lesions": True,
            "noise": [5, 20],
        }
    ]
    return evaluate(folder, sets, ("Bright", "Dark", "SAM3"), pictures=2) / "report.html"


def test_the_page_is_whole_on_a_desk(page: Path) -> None:
    with browsed(page) as tab:
        assert too_wide(tab) == 0
        headings = tab.locator("h3").all_inner_texts()
        assert "Areas in mm²: do predicted and true sizes agree?" in headings
        for begins in ("By size of the target", "Lesions: ", "Prompt noise: "):
            assert any(heading.startswith(begins) for heading in headings), begins
        charts = tab.locator("svg.chart[role=img]")
        shown = [chart for chart in charts.all() if chart.is_visible()]
        # boxes by modality, noise, and for each unit predicted over true and a Bland–Altman plot of each model
        assert charts.count() == len(shown) == 1 + 1 + 2 * (1 + 3)
        for chart in shown:
            box = chart.bounding_box()
            assert box["width"] > 200 and box["height"] > 100 and chart.get_attribute("aria-label")
        marks = tab.locator("svg[aria-label='nodule: predicted over true size']").first.locator(".dist > g")
        assert marks.count() == 3 * 8
        assert "predicted" in marks.first.locator("title").inner_html()
        for at in tab.locator("svg.chart[role=img] path.point").all()[:20]:
            assert at.evaluate("mark => getComputedStyle(mark).fill") not in ("rgb(0, 0, 0)", "none"), (
                "colours are there"
            )


def test_bland_altman_names_stay_apart_and_within_the_page(page: Path) -> None:
    with browsed(page, width=390, scheme="dark") as tab:
        assert too_wide(tab) == 0
        plots = tab.locator("svg[aria-label*='Bland–Altman']")
        assert plots.count() == 2 * 3
        for plot in plots.all():
            boxes = [one.bounding_box() for one in plot.locator("text.axis:not(.turned)").all()]
            names = [
                plot.get_by_text(name, exact=True).bounding_box() for name in ("upper limit", "bias", "lower limit")
            ]
            tops = [name["y"] for name in names]
            assert tops == sorted(tops) and min(b - a for a, b in pairwise(tops)) > 10
            assert all(box["x"] + box["width"] <= 390 for box in [*boxes, *names])


def test_terms_open_by_keyboard(page: Path) -> None:
    with browsed(page) as tab:
        summary = tab.locator("details > summary", has_text="nodule").first
        plot = tab.locator("svg[aria-label*='Bland–Altman']").first
        assert plot.is_visible()
        summary.focus()
        tab.keyboard.press("Enter")
        assert not plot.is_visible()
        tab.keyboard.press("Enter")
        assert plot.is_visible()
