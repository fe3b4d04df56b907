"""The command `data-shards stats`: counts, sizes, areas, terms and balance of a corpus as tables, JSON and a figure."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_shards.errors import CommandParser, UserError, counted

if TYPE_CHECKING:
    from rich.console import Console

HELP = """\
Show what a corpus holds, from its index alone: a million samples take seconds.

  data-shards stats data/liver                      tables on the terminal
  data-shards stats data/liver --json liver.json    all of it, and more, as JSON
  data-shards stats data/liver --png liver.png      one figure: terms, areas, sizes, balance

A term is absent from an image if it was looked for there and is not in it; images in which
nobody looked for it count for neither. Balance says how often a group of images would be seen
in training with

  sampling: {by: modality, power: 0.5}              or by: dataset

where a group's share is proportional to its number of images to that power.
"""

_MOST_ROWS = 30
"""Rows of a table."""
_MOST_SIZES = 8
_UNKNOWN = "unknown"
_ORDER = {name: place for place, name in enumerate(("train", "training", "val", "valid", "validation", "test"))}
"""In which known splits are shown; others come after them, as they are."""


def add_arguments(parser: CommandParser) -> None:
    """Add the arguments of `data-shards stats`."""
    parser.add_argument("dir", metavar="DIR", help="a corpus, or one split of it")
    parser.add_argument("--json", metavar="OUT", help="write everything into this file")
    parser.add_argument("--png", metavar="OUT", help="draw a figure into this file")


def run(values: argparse.Namespace) -> int:
    """Run `data-shards stats`.

    Raises:
        UserError: There is no corpus, an index is damaged, or a file cannot be written.
    """
    from rich.console import Console

    from data_shards.corpus import split_folders
    from data_shards.counts import count_corpus
    from data_shards.display import check_place, check_png
    from data_shards.index import Index

    for option, path in (("--json", values.json), ("--png", values.png)):
        check_place(option, path)
    if values.png is not None:
        check_png(values.png)
    folders = dict(sorted(split_folders(values.dir).items(), key=lambda item: _ORDER.get(item[0], len(_ORDER))))
    stats = count_corpus({name: Index.load(path, check=False) for name, path in folders.items()})
    if values.json is not None:
        _write_json(stats, Path(values.json))
    show(stats, Console(markup=False, emoji=False, highlight=False))
    if values.json is not None:
        print(f"written {values.json}")
    if values.png is not None:
        from data_shards.stats_plots import draw

        draw(stats, Path(values.dir).resolve().name, values.png)
        print(f"drawn {values.png}")
    return 0


def _write_json(stats: Mapping[str, Any], path: Path) -> None:
    from data_shards.stage import write_json

    try:
        write_json(path, stats)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}): choose another --json") from error


def show(stats: Mapping[str, Any], console: Console) -> None:
    """Print the tables.

    Args:
        stats: As from `counts.count_corpus`.
        console: Where to.
    """
    _show_splits(stats, console)
    _show_groups(stats, console)
    _show_images(stats, console)
    _show_terms(stats, console)
    _show_areas(stats, console)
    _show_balance(stats, console)
    for name in stats["outdated"]:
        console.print(
            f"{name}: its index is of an older version and knows no data sets, volumes, sizes nor spacings: run "
            "`data-shards index`", soft_wrap=True
        )  # fmt: skip


def _show_splits(stats: Mapping[str, Any], console: Console) -> None:
    names = ("split", "images", "no target", "targets", "patients", "volumes", "shards", "MB")
    table = _table(console, "", *names)
    for name, split in stats["splits"].items():
        counts = [split[key] for key in ("images", "without_target", "targets", "patients", "volumes", "shards")]
        table.add_row(name, *(_UNKNOWN if count is None else f"{count:,}" for count in counts), _mb(split["bytes"]))
    console.print(table)
    for name, split in stats["splits"].items():
        each = split["targets_per_image"]
        kinds = f", {split['instance']:,} of them instances" if split["instance"] else ""
        console.print(
            f"{name}: {each['mean']:.2f} targets an image (median {each['median']:g}, 95 % {each['p95']:g}, most "
            f"{each['max']:g}){kinds}", soft_wrap=True
        )  # fmt: skip


def _show_groups(stats: Mapping[str, Any], console: Console) -> None:
    splits = list(stats["splits"])
    table = _table(console, "images", "modality", "data set", *splits, *(["all"] if len(splits) > 1 else []))
    for row in stats["groups"][:_MOST_ROWS]:
        counts = [row["splits"].get(name, 0) for name in splits] + ([row["images"]] if len(splits) > 1 else [])
        table.add_row(_name(row["modality"]), _name(row["dataset"]), *(f"{count:,}" for count in counts))
    console.print(table)
    _more(len(stats["groups"]), _MOST_ROWS, console)


def _show_images(stats: Mapping[str, Any], console: Console) -> None:
    images = stats["images"]
    if images["sizes"]:
        table = _table(console, "sizes (pixels)", "height", "width", "images", "share")
        total = sum(item["images"] for item in images["sizes"])
        for item in images["sizes"][:_MOST_SIZES]:
            share = f"{item['images'] / total:.1%}"
            table.add_row(f"{item['height']:,}", f"{item['width']:,}", f"{item['images']:,}", share)
        console.print(table)
        _more(len(images["sizes"]), _MOST_SIZES, console)
        for name in ("height", "width"):
            found = images[name]
            console.print(f"{name}: median {found['median']:,.0f}, from {found['min']:,.0f} to {found['max']:,.0f}")
        for name, found in images["spacing"].items():
            console.print(f"{name} spacing: {_spacing(found, total)}", soft_wrap=True)
        kinds = [f"{count:,} {'grey' if number == '1' else 'RGB'}" for number, count in images["channels"].items()]
        kinds += [f"{count:,} {dtype}" for dtype, count in images["dtypes"].items()]
        console.print(f"images: {', '.join(kinds)}", soft_wrap=True)
    members = [
        f"{item['members']:,} .{name} ({_mb(item['bytes'])} MB)" for name, item in list(stats["members"].items())[:8]
    ]
    console.print(f"members: {', '.join(members)}", soft_wrap=True)


def _spacing(found: Mapping[str, Any] | None, total: int) -> str:
    if found is None:
        return _UNKNOWN
    missing = f", unknown for {counted(total - found['known'], 'image')}" if found["known"] < total else ""
    return f"median {found['median']:.3g} mm, from {found['min']:.3g} to {found['max']:.3g}{missing}"


def _show_terms(stats: Mapping[str, Any], console: Console) -> None:
    """Print in how many images of each split a term is, and from how many it is absent."""
    splits = list(stats["splits"])
    instances = any(split["instance"] for split in stats["splits"].values())
    title = "images with each term / images from which it is absent"
    table = _table(console, title, "term", *splits, *(["instances"] if instances else []))
    for term, row in list(stats["terms"].items())[:_MOST_ROWS]:
        cells = []
        for name in splits:
            split = row["splits"][name]
            cells.append(f"{split['positives']:,} / {'?' if split['absent'] is None else format(split['absent'], ',')}")
        total = sum(split["instance"] for split in row["splits"].values())
        table.add_row(term, *cells, *([f"{total:,}"] if instances else []))
    console.print(table)
    _more(len(stats["terms"]), _MOST_ROWS, console)


def _show_areas(stats: Mapping[str, Any], console: Console) -> None:
    table = _table(console, "areas (pixels)", "term", "min", "5 %", "median", "95 %", "max", "% of image")
    rows = list(_area_rows(stats))
    for row in rows[:_MOST_ROWS]:
        table.add_row(*row)
    console.print(table)
    _more(len(rows), _MOST_ROWS, console)


def _area_rows(stats: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the areas of the targets and of the instances of each term; the last cell is their median share."""
    for term, row in stats["terms"].items():
        for kind, name in (("semantic", term), ("instance", f"{term} (instances)")):
            area, share = row[kind]["area"], row[kind]["share"]
            if area is not None:
                median = _UNKNOWN if share is None else f"{100 * share['median']:.3g}"
                yield name, *(f"{value:,.0f}" for value in area.values()), median


def _show_balance(stats: Mapping[str, Any], console: Console) -> None:
    """Print what `sampling` would make of the split that is trained on, if its groups are unequal."""
    name = "train" if "train" in stats["balance"] else next(iter(stats["balance"]))
    for by, found in stats["balance"][name].items():
        if found is None or len(found["groups"]) < 2:
            continue
        column = "data set" if by == "dataset" else by
        title = f"balance of {name}, sampling: {{by: {by}, power: …}}"
        table = _table(console, title, column, "images", "power 1", "power 0.5", "power 0", "seen at 0.5")
        for group in found["groups"][:_MOST_ROWS]:
            shares = group["shares"]
            cells = [f"{share:.1%}" for share in shares.values()]
            seen = f"x {shares['0.5'] / shares['1.0']:.2f}"
            table.add_row(_name(group["name"]), f"{group['images']:,}", *cells, seen)
        console.print(table)
        _more(len(found["groups"]), _MOST_ROWS, console)
        console.print(f"the largest {column} has {found['ratio']:,.1f} times the images of the smallest")


def _table(console: Console, title: str, *names: str) -> Any:
    from data_shards.display import make_table

    if title:
        console.print(f"\n{title}")
    return make_table(*names)


def _more(count: int, shown: int, console: Console) -> None:
    if count > shown:
        console.print(f"… and {count - shown:,} more; --json has all")


def _name(name: str | None) -> str:
    return _UNKNOWN if name is None else name or "(none)"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f}"
