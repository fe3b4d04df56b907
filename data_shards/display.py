"""Tables on a terminal and figures as PNG, made alike everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from data_shards.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEFT = ("split", "term", "index", "data set", "modality")
"""Columns of names; the others hold numbers."""


def make_table(*names: str) -> Table:
    """Return an empty table with these columns: names to the left, numbers to the right."""
    result = Table()
    for name in names:
        result.add_column(name, justify="left" if name in _LEFT else "right")
    return result


def new_figure(size: tuple[float, float]) -> Figure:
    """Return a figure that needs no display.

    Args:
        size: Width and height in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def check_png(path: str | Path) -> None:
    """Refuse a name that would not be one of a PNG.

    Raises:
        UserError: It ends in something else than ``.png``.
    """
    if not str(path).lower().endswith(".png"):
        raise UserError(f"--png {path}: a PNG is drawn: give it a name that ends in .png")


def check_place(option: str, path: str | Path | None) -> None:
    """Refuse a place at which no file can be: an hour of work shall not end with a folder that does not exist.

    Args:
        option: The option of the command that names the file.
        path: The file; None if it was not asked for.

    Raises:
        UserError: Its folder does not exist, or it is a folder.
    """
    if path is not None and (not Path(path).resolve().parent.is_dir() or Path(path).is_dir()):
        raise UserError(f"{option} {path}: cannot be written there: name a file in a folder that exists")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, at 110 pixels per inch.

    Raises:
        UserError: The file cannot be written.
    """
    try:
        figure.savefig(path, format="png", dpi=110)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}): choose another --png") from error
