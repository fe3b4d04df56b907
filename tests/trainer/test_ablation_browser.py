"""The page of an ablation in a browser: the answer is read first, pictures load, nothing is cut off."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from browser import browsed, needs_browser, too_wide
from finished_cells import LEVELS, cell, leave

from trainer.ablation.page import render, write_page
from trainer.ablation.plots import Point, forest_plot, front, pareto_plot
from trainer.ablation.results import Results, collect
from trainer.ablation.spec import Loaded, load_ablation
from trainer.ablation.words import scale, verdict
from trainer.run import write_json

WHY = "non-finite <loss> & no way out"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Loaded, Results, Path]:
    """An ablation whose last cell failed with one of its seeds."""
    root = tmp_path_factory.mktemp("ablation")
    spec = root / "methods.yaml"
    names = "\n".join(f"  {name}: {'{tuned: false}' if name == 'untouched' else ''}" for name in LEVELS)
    head = "# Does LoRA match full fine-tuning on my data, and at what cost?\n# Caveat: of discs.\n"
    spec.write_text(f"{head}base: b.yaml\nbudget: {{steps: 30}}\nseeds: [0, 1]\nreference: full\ncells:\n{names}\n")
    cells = [cell(root, name, seed) for seed in (0, 1) for name in LEVELS if seed == 0 or name != "untouched"]
    for one in cells[:-1]:
        leave(one)
    last = cells[-1]
    last.root.parent.mkdir(parents=True, exist_ok=True)
    write_json(last.root.with_name(f"{last.root.name}.attempt.json"), {"stage": "fit", "failed": WHY})
    loaded, results = load_ablation(spec), collect(cells, "full")
    write_page(root / "results.html", loaded, results)
    return loaded, results, root / "results.html"


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_opens_and_answers_at_once(made: tuple[Loaded, Results, Path], width: int, scheme) -> None:
    with browsed(made[2], width=width, scheme=scheme) as tab:
        assert too_wide(tab) == 0
        assert tab.locator("h1").inner_text() == "Does LoRA match full fine-tuning on my data, and at what cost?"
        answer = tab.locator(".answer")
        box = answer.bounding_box()
        assert box["y"] + box["height"] < 900, "within the first screen"
        said = answer.inner_text().replace("\u00a0", " ")
        assert "After 30 steps each, full reaches a median DSC of" in said
        assert "no difference beyond chance was found for" in said
        assert "adapter (−0.0" in said and ", 95 % CI −" in said and "scores lower beyond chance" in said
        assert WHY in tab.locator(".caveat").last.inner_text()
        assert tab.locator(".tile svg image").count() == 3, "each of three targets' images is stored once"
        assert tab.locator(".tile").count() == 3 * len(LEVELS)
        outlines = tab.locator(".tile .prediction").count()
        tab.locator("#show-prediction").press("Space")
        assert outlines and tab.locator(".tile .prediction:visible").count() == 0, "by keyboard"
        tab.locator("summary").first.press("Enter")
        assert "budget: {steps: 30}" in tab.locator("details[open] pre").inner_text()


@needs_browser
def test_it_prints(made: tuple[Loaded, Results, Path]) -> None:
    """On paper nothing is scrolled, so nothing may be wider than the page."""
    with browsed(made[2], width=1000) as tab:
        tab.emulate_media(media="print")
        assert tab.evaluate("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
        assert len(tab.pdf(format="A4")) > 20_000


def test_every_column_of_the_question_is_there(made: tuple[Loaded, Results, Path]) -> None:
    page = render(*made[:2])
    for column in (
        *("Learns", "% of all", "To keep", "Checkpoint", "Peak memory (process)", "Images/s", "Time to fit"),
        *("DSC, median [Q1, Q3]", "NSD, median [Q1, Q3]", "Mean difference of DSC (95 % CI)", "p (Holm)"),
    ):
        assert f">{column}</th>" in page
    assert "from scratch" in page and "unet is no foundation model but a specialist" in page
    for title in ("DSC by modality", "DSC by data set, median", "Score against cost", "Mean DSC of each seed"):
        assert f"<h2>{title}" in page
    assert "&lt;loss&gt; &amp; no way out" in page and "<loss>" not in page
    assert page.count("<details><summary>Recipe of ") == len(LEVELS)


def test_a_specialist_is_no_part_of_the_front_and_presses_nothing_together() -> None:
    points = [Point("a", 1e6, "1 M", 0.80, 0.78, 0.82), Point("b", 9e6, "9 M", 0.85, 0.83, 0.87)]
    far = Point("unet", 5e5, "0.5 M", 0.3, 0.28, 0.32, specialist=True)
    assert front(points) == points
    drawn = pareto_plot([*points, far], "parameters", "DSC", logarithmic=True, level=("untouched", 0.75))
    assert "unet ↓ 0.300" in drawn and ">0.2</text>" not in drawn and ">0.75</text>" in drawn
    assert places(drawn, "circle", "cx") and min(places(drawn, "circle", "cx")) > 44
    near = pareto_plot([*points, Point("unet", 5e5, "0.5 M", 0.79, specialist=True)], "p", "DSC", logarithmic=True)
    assert ">unet</text>" in near
    alone = pareto_plot([far], "p", "DSC", logarithmic=False)
    assert ">unet</text>" in alone


def test_differences_far_out_are_arrows() -> None:
    rows = [("a", -0.02, -0.03, -0.01, "↓"), ("b", 0.01, None, None, ""), ("unet", -0.5, -0.55, -0.45, "↓")]
    drawn = forest_plot(rows, "DSC", "full", ["unet"])
    assert drawn.count("<circle") == 2 and "−0.500</text>" in drawn
    whole = forest_plot(rows, "DSC", "full")
    assert whole.count("<circle") == 3 and "−0.500</text>" not in whole


def places(drawn: str, tag: str, name: str) -> Sequence[float]:
    return [float(part.split(f'{name}="')[1].split('"')[0]) for part in drawn.split(f"<{tag} ")[1:]]


@pytest.mark.parametrize(
    ("shift", "said"),
    [
        (-0.2, "; every other method scores lower beyond chance; method-c comes closest: −0.1"),
        (0.2, "; every other method scores higher beyond chance, and most of all method-c: +0.2"),
        (0.0, "; no difference beyond chance was found for any other method; the least certain is method-"),
    ],
)
def test_of_many_methods_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: float, said: str) -> None:
    names = ["full", "method-a", "method-b", "method-c"]
    levels = {name: 0.6 + shift * (name != "full") + number / 100 * (shift != 0) for number, name in enumerate(names)}
    monkeypatch.setattr("finished_cells.LEVELS", levels)
    spec = tmp_path / "many.yaml"
    listed = "".join(f"  {name}:\n" for name in names)
    spec.write_text(f"# Which?\nbase: b\nbudget: {{steps: 30}}\ncells:\n{listed}")
    cells = [cell(tmp_path, name, 0) for name in names]
    assert "No answer yet" in verdict(load_ablation(spec), collect(cells, "full"))
    for one in cells:
        leave(one)
    sentence = verdict(load_ablation(spec), collect(cells, "full"))
    assert said in sentence and "95\u00a0% CI" in sentence
    assert scale(collect(cells, "full")) == ""
