"""The figure of `data-shards stats`: terms, areas, sizes, modalities and data sets on one page."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.display import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#33658a", "#f6ae2d", "#d1495b", "#58a4b0", "#7d5ba6", "#6a994e")
"""Of the splits, in their order."""
_WHOLE, _INSTANCE = "#2f4858", "#e07a1f"
_MOST_TERMS = 30
_MOST_GROUPS = 8
_MOST_SIZES = 2000
_OTHERS = " others, summed"
_LABEL = 32
"""Characters of a label."""

Rows = list[tuple[str, dict[str, int]]]
"""Label and images by split."""


def draw(stats: Mapping[str, Any], title: str, path: str | Path) -> None:
    """Write the figure, some 1,400 pixels wide.

    Args:
        stats: As from `counts.count_corpus`.
        title: Name of the corpus.
        path: The PNG to write.

    Raises:
        UserError: The file cannot be written.
    """
    splits = list(stats["splits"])
    terms, areas = _term_rows(stats)
    figure = new_figure((12.8, max(7.6, 1.9 + 0.235 * len(terms))))
    grid = figure.add_gridspec(3, 3, width_ratios=[1.3, 1.0, 1.15])
    panel = figure.add_subplot(grid[:, 0])
    _draw_bars(panel, terms, splits, "images with each term", least=14)
    beside = figure.add_subplot(grid[:, 1], sharey=panel)
    _draw_areas(beside, areas)
    _draw_sizes(figure.add_subplot(grid[0, 2]), stats["images"])
    for place, by, text in ((1, "modality", "images of each modality"), (2, "dataset", "images of each data set")):
        _draw_bars(figure.add_subplot(grid[place, 2]), _group_rows(stats, by), splits, text, least=5, shares=True)
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=min(6, len(labels)), frameon=False, fontsize=10)
    total = stats["total"]
    counts = ((total["images"], "image"), (total["targets"], "target"), (len(stats["terms"]), "term"))
    counted = ", ".join(f"{number:,} {name}{'s' * (number != 1)}" for number, name in counts)
    figure.text(
        0.008, 0.992, f"{_short(title)}: {counted}", ha="left", va="top", fontsize=13, weight="bold", parse_math=False
    )
    with warnings.catch_warnings():  # letters that the font lacks are drawn as boxes
        warnings.simplefilter("ignore", UserWarning)
        save_figure(figure, path)


def _term_rows(stats: Mapping[str, Any]) -> tuple[Rows, list[Mapping[str, Any] | None]]:
    """Return the bars of the most frequent terms and of the others together, and the areas beside them."""
    items = list(stats["terms"].items())
    shown, others = items[:_MOST_TERMS], items[_MOST_TERMS:]
    rows = [(term, {name: split["positives"] for name, split in row["splits"].items()}) for term, row in shown]
    areas: list[Mapping[str, Any] | None] = [row for _, row in shown]
    if others:
        summed = {name: sum(row["splits"][name]["positives"] for _, row in others) for name in stats["splits"]}
        rows.append((f"{len(others):,}{_OTHERS}", summed))
        areas.append(None)
    return rows, areas


def _group_rows(stats: Mapping[str, Any], by: str) -> Rows:
    """Return the bars of modalities or data sets, the largest first, and of the others together."""
    found: dict[str, dict[str, int]] = {}
    for row in stats["groups"]:
        name = row[by] if row[by] is not None else "unknown: run data-shards index"
        counts = found.setdefault(name or "(none)", {})
        for split, count in row["splits"].items():
            counts[split] = counts.get(split, 0) + count
    rows = sorted(found.items(), key=lambda item: (-sum(item[1].values()), item[0]))
    if len(rows) <= _MOST_GROUPS:
        return rows
    others = rows[_MOST_GROUPS - 1 :]
    summed = {split: sum(counts.get(split, 0) for _, counts in others) for split in stats["splits"]}
    return [*rows[: _MOST_GROUPS - 1], (f"{len(others):,}{_OTHERS}", summed)]


def _draw_bars(panel: Axes, rows: Rows, splits: list[str], title: str, least: int, shares: bool = False) -> None:
    """Draw horizontal bars, stacked by split, the first on top; space for `least` of them at least."""
    places = np.arange(len(rows))
    left = np.zeros(len(rows))
    for number, split in enumerate(splits):
        counts = np.array([row.get(split, 0) for _, row in rows])
        colour = _COLOURS[number % len(_COLOURS)]
        bars = panel.barh(places, counts, left=left, height=0.72, color=colour, label=_short(split))
        for bar, (name, _) in zip(bars, rows, strict=True):
            bar.set_alpha(0.45 if name.endswith(_OTHERS) else 1.0)
        left += counts
    total = max(1.0, left.sum())
    for place, count in zip(places, left, strict=True):
        text = f"{count:,.0f} ({count / total:.0%})" if shares else f"{count:,.0f}"
        panel.annotate(text, (count, place), (4, 0), textcoords="offset points", va="center", fontsize=8, color="0.3")
    panel.set_yticks(places, [_short(name) for name, _ in rows], fontsize=9)
    for label in panel.get_yticklabels():
        label.set_parse_math(False)
    panel.set_ylim(max(len(rows), least) - 0.4, -0.6)
    panel.set_xlim(0, max(1.0, left.max(initial=0)) * (1.42 if shares else 1.18))
    panel.xaxis.set_major_locator(_whole_numbers())
    _tidy(panel, title, "x")


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=5, integer=True)


def _draw_areas(panel: Axes, areas: list[Mapping[str, Any] | None]) -> None:
    """Draw the range of each term's areas, the middle 90 % of them and their median, on a logarithmic axis."""
    kinds = (("semantic", _WHOLE, "targets", -0.17), ("instance", _INSTANCE, "instances", 0.17))
    rows = [(place, row) for place, row in enumerate(areas) if row is not None]
    both = {place for place, row in rows if row["semantic"]["area"] and row["instance"]["area"]}
    limits = (math.inf, 0.0)
    for kind, colour, name, shift in kinds:
        found = [(place + shift * (place in both), row[kind]["area"]) for place, row in rows if row[kind]["area"]]
        if not found:
            continue
        y = np.array([place for place, _ in found])
        least, low, middle, high, most = (
            np.array([max(area[name], 1.0) for _, area in found]) for name in ("min", "p5", "median", "p95", "max")
        )
        limits = (min(limits[0], float(least.min())), max(limits[1], float(most.max())))
        panel.hlines(y, least, most, color=colour, linewidth=1.0, alpha=0.55)
        panel.hlines(y, low, high, color=colour, linewidth=4.0, alpha=0.55)
        panel.plot(middle, y, "o", color=colour, markersize=4.5, label=f"{name}: median, 5–95 %, min–max")
    if panel.has_data():
        panel.set_xscale("log")
        panel.set_xlim(0.8 * 10 ** math.floor(math.log10(limits[0])), 1.25 * 10 ** math.ceil(math.log10(limits[1])))
        panel.xaxis.set_major_formatter(_readable)
        panel.xaxis.set_minor_formatter("")
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.045), fontsize=8, frameon=False, ncols=1)
    panel.tick_params(axis="y", labelleft=False, length=0)
    _tidy(panel, "areas of each term (pixels)", "x")


def _readable(value: float, _: object = None) -> str:
    """Return 100, 10 k or 1 M."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _draw_sizes(panel: Axes, images: Mapping[str, Any]) -> None:
    """Draw the sizes of images; the area of a dot grows with their number."""
    _tidy(panel, "image sizes (pixels)", "both")
    if not images["sizes"]:
        panel.text(0.5, 0.5, "unknown: run data-shards index", ha="center", va="center", transform=panel.transAxes)
        panel.set_xticks([])
        panel.set_yticks([])
        return
    sizes = images["sizes"][:_MOST_SIZES]
    width, height, count = (np.array([item[name] for item in sizes]) for name in ("width", "height", "images"))
    low, high = min(width.min(), height.min()) * 0.8, max(width.max(), height.max()) * 1.3
    panel.plot([low, high], [low, high], color="0.85", linewidth=1, zorder=0)
    dots = 14 + 260 * np.sqrt(count / count.max())
    panel.scatter(width, height, dots, color="#33658a", alpha=0.45, edgecolor="white", linewidth=0.6)
    if high > 8 * low:
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set(xlim=(low, high), ylim=(low, high), xlabel="width", ylabel="height")
    text = f"{len(images['sizes']):,} size{'s' * (len(images['sizes']) != 1)}; most: {sizes[0]['height']} x "
    text += f"{sizes[0]['width']}, {sizes[0]['images'] / sum(item['images'] for item in images['sizes']):.0%} of images"
    panel.text(0.03, 0.95, "\n".join(textwrap.wrap(text, 40)), va="top", fontsize=8, transform=panel.transAxes)


def _tidy(panel: Axes, title: str, grid: Any) -> None:
    panel.set_title(title, fontsize=10, loc="left")
    panel.grid(axis=grid, color="0.9", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=8, axis="x")
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _short(text: str) -> str:
    """Cut a long text in its middle: terms often differ at their ends."""
    return text if len(text) <= _LABEL else f"{text[:17]}…{text[18 - _LABEL :]}"
