"""Shows what a corpus holds: tables on the terminal, pictures as PNG.

Shapes: H, W are an image's height and width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from data_shards.corpus import split_folders
from data_shards.dataset import ShardDataset
from data_shards.display import make_table, new_figure, save_figure
from data_shards.errors import UserError, nearest
from data_shards.index import Index
from data_shards.triplet import Triplet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#ff5252", "#40c4ff", "#69f0ae", "#ffd740", "#e040fb", "#ff9e40")
_SHEET = 12
"""Samples on a contact sheet, and those whose images are measured for the table."""


def open_splits(folder: str | Path) -> dict[str, ShardDataset]:
    """Open every split of a corpus.

    Raises:
        UserError: There is no corpus, or a shard is missing.
    """
    return {name: ShardDataset(path) for name, path in split_folders(folder).items()}


def show_corpus(splits: dict[str, ShardDataset], console: Console) -> None:
    """Print a table of the splits and one of their terms."""
    overview = make_table("split", "slices", "patients", "shards", "MB", "images seen", "index")
    for name, dataset in splits.items():
        index = dataset.index
        images = sorted({_describe(dataset[number].image) for number in spread(len(dataset), _SHEET)})
        counts = (len(index), len(index.patients), len(index.shard_names))
        size = f"{index.shard_sizes.sum() / 1e6:.1f}"
        overview.add_row(name, *(f"{count:,}" for count in counts), size, "\n".join(images[:3]), index.sha256[:12])
    console.print(overview)
    terms = make_table("split", "term", "targets", "absent", "smallest (px)", "median", "largest")
    for name, dataset in splits.items():
        for row in _term_rows(dataset.index):
            terms.add_row(name, *row)
    console.print(terms)
    console.print("absent: images in which the term was looked for and is not")


def _term_rows(index: Index) -> Iterator[tuple[str, ...]]:
    """Yield (term, targets, absent, smallest, median, largest) of the semantic targets and the instances of terms."""
    for number, term in enumerate(map(str, index.terms)):
        absent = f"{index.absent[number]:,}" if index.absent[number] >= 0 else "?"
        mine = index.target_term == number
        for kind, name in enumerate((term, f"{term} (instances)")):
            areas = index.target_area[mine & (index.target_kind == kind)]
            if areas.size:
                values = (areas.min(), np.median(areas), areas.max())
                yield name, f"{len(areas):,}", absent, *(f"{value:,.0f}" for value in values)
        if not mine.any():
            yield term, "0", absent, "", "", ""


def find_sample(splits: dict[str, ShardDataset], key: str) -> Triplet:
    """Return the sample of a key.

    Raises:
        UserError: No split has it.
    """
    for dataset in splits.values():
        found = np.flatnonzero(dataset.index.raw_keys == key.encode("ascii", "replace"))
        if found.size:
            return dataset[int(found[0])]
    keys = [str(name) for dataset in splits.values() for name in dataset.index.raw_keys[:1000].astype(str)]
    hint = nearest(key, keys) if len(key) > 3 else ""
    # Hundreds of keys are no hint.
    raise UserError(f"no sample '{key}'{hint if hint.startswith('; did') else f'; the first is {keys[0]}'}")


def show_sample(triplet: Triplet, console: Console) -> None:
    """Print all of a sample but its pixels."""
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # a hash is shown whole
    table.add_row("key", triplet.key)
    table.add_row("image", _describe(triplet.image))
    for target in triplet.targets:
        also = f" (also: {', '.join(target.synonyms)})" if target.synonyms else ""
        table.add_row("target", f"{target.term}{also}: {target.kind}, {target.area:,} px, box {target.box}")
    table.add_row("looked for", ", ".join(triplet.looked_for))
    for name, value in asdict(triplet.provenance).items():
        table.add_row(name, str(value))
    console.print(table)


def draw_sample(triplet: Triplet, path: str | Path) -> None:
    """Write a PNG: the image, and the image with its targets.

    Raises:
        UserError: The file cannot be written.
    """
    height, width = triplet.image.shape[:2]
    figure, axes = _figure(1, 2, (11, 5.5 * max(0.3, min(3.0, height / width)) + 0.6))
    _draw_image(axes[0, 0], triplet)
    axes[0, 0].set_title(triplet.key, fontsize=8, parse_math=False)
    _draw_targets(axes[0, 1], triplet)
    save_figure(figure, path)


def draw_sheet(splits: dict[str, ShardDataset], path: str | Path) -> None:
    """Write a PNG with a dozen evenly spaced samples of the whole corpus and their targets.

    Raises:
        UserError: The file cannot be written.
    """
    places = [(name, number) for name, dataset in splits.items() for number in range(len(dataset))]
    chosen = [places[number] for number in spread(len(places), _SHEET)]
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    figure, axes = _figure(rows, columns, (3.2 * columns, 3.4 * rows))
    for (name, number), panel in zip(chosen, axes.flat, strict=False):
        _draw_targets(panel, splits[name][number], f"{name} {number}: ")
    save_figure(figure, path)


def spread(count: int, wanted: int) -> list[int]:
    """Return at most `wanted` different numbers below `count`, evenly spaced from first to last."""
    return sorted({int(number) for number in np.linspace(0, count - 1, min(count, wanted)).round()})


def _describe(image: np.ndarray) -> str:
    colour = " RGB" if image.ndim == 3 else ""
    return f"{image.shape[0]} x {image.shape[1]}{colour} {image.dtype}"


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, np.ndarray]:
    """Return a figure without a display, and its axes (rows, columns)."""
    figure = new_figure(size)
    axes: np.ndarray = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flat:
        panel.set_axis_off()
    return figure, axes


def _draw_image(panel: Axes, triplet: Triplet) -> None:
    image = triplet.image
    low, high = (0, 255) if image.dtype == np.uint8 else np.nanpercentile(image, [0.5, 99.5])
    high = max(high, low + 1e-6)
    if image.ndim == 3:  # limits are for grey alone: a colour is 0 to 1
        image = ((image.astype(np.float32) - low) / (high - low)).clip(0, 1)
    spacing = triplet.provenance.spacing
    # Anatomy has its proportions: pixels are drawn as tall as they are in mm.
    aspect = spacing[0] / spacing[1] if spacing else 1.0
    panel.imshow(image, cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="nearest")


def _draw_targets(panel: Axes, triplet: Triplet, before: str = "") -> None:
    """Draw the image with a filled contour and a box for each target."""
    from matplotlib.patches import Rectangle

    _draw_image(panel, triplet)
    for number, target in enumerate(triplet.targets):
        colour = _COLOURS[number % len(_COLOURS)]
        x0, y0, x1, y1 = target.box
        # A margin of background closes the contours of masks that touch the border.
        mask = np.pad(target.mask()[y0 : y1 + 1, x0 : x1 + 1].astype(float), 1)
        rows, columns = np.arange(y0 - 1, y1 + 2), np.arange(x0 - 1, x1 + 2)
        panel.contourf(columns, rows, mask, levels=[0.5, 1.5], colors=[colour], alpha=0.3)
        panel.contour(columns, rows, mask, levels=[0.5], colors=[colour], linewidths=0.8)
        panel.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0 + 1, y1 - y0 + 1, fill=False, edgecolor=colour))
    height, width = triplet.image.shape[:2]
    panel.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    panel.set_title(before + title(triplet), fontsize=9, parse_math=False)


def title(triplet: Triplet) -> str:
    """Return the terms of a sample's targets, each once, with the number of instances: ``nucleus ×25, tumour``."""
    instances = Counter(target.term for target in triplet.targets if target.kind == "instance")
    terms = dict.fromkeys(target.term for target in triplet.targets)
    return ", ".join(f"{term} ×{instances[term]}" if instances[term] else term for term in terms) or "no target"
