"""Steps of several ways at one size, timed in turn: the rows that the step benchmarks print."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from measuring import in_turn, settle
from torch import Tensor, nn

REFERENCE = "reference"
Row = dict[str, Any]
TABLE = (
    *("way", "precision", "images", "masks", "images_per_second", "reference", "ratio", "lowest", "highest"),
    *("peak_gib", "reference_peak_gib", "tflops", "mfu"),
)
"""Keys of a row."""


@dataclass(frozen=True)
class Running:
    """A step that is ready.

    Attributes:
        step: Takes it.
        model: What learns.
        optimizer: Its optimiser.
    """

    step: Callable[[], Any]
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def held(self) -> int:
        """Bytes of weights and gradients, and of the optimiser's state."""
        weights = [t for p in self.model.parameters() for t in (p, p.grad) if t is not None]
        state = [t for values in self.optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
        return sum(t.nbytes for t in [*weights, *self.model.buffers(), *state])


@dataclass(frozen=True)
class Entrant:
    """A way to take a step.

    Attributes:
        way: Its name; ``reference`` is what the others are compared with.
        make: Makes it ready; what it needs and is not installed is an `ImportError`.
        flops: That a step needs.
    """

    way: str
    make: Callable[[], Running]
    flops: int = 0


@dataclass(frozen=True)
class Track:
    """A step's size, and how it is timed.

    Attributes:
        place: The device.
        precision: ``fp32`` or ``bf16``.
        images: Of a step.
        masks: Of an image.
        rounds: That count.
        repeats: Steps in a round.
        matmul_tflops: What the device reaches in a matrix product in this precision.
    """

    place: torch.device
    precision: str
    images: int
    masks: int
    rounds: int
    repeats: int
    matmul_tflops: float

    def __str__(self) -> str:
        return f"{self.precision}, {self.images} × {self.masks}"


def race(entrants: Sequence[Entrant], track: Track, left_out: list[str]) -> list[Row]:
    """Time ways in turn; returns a row for each but the reference.

    Args:
        entrants: The ways.
        track: The size.
        left_out: Takes a line for each that is not installed, or that memory has no room for.
    """
    peaks: dict[str, float | None] = {}
    runs: dict[str, Callable[[], int]] = {}
    held = 0
    for entrant in entrants:
        try:
            running = entrant.make()
        except ImportError as error:
            left_out.append(f"{entrant.way}, {track}: {error}")
            continue
        peaks[entrant.way] = peak = _peak(running, track.place, held)
        if peak is None:
            left_out.append(f"{entrant.way}, {track}: out of memory")
            del running
            _free()
            continue
        held += running.held()
        runs[entrant.way] = _repeated(running, track)
    rates = in_turn(runs, track.rounds, warm_up=0)  # `_peak` has
    rows = [_row(one, track, peaks, rates) for one in entrants if one.way in peaks and one.way != REFERENCE]
    runs.clear()
    _free()
    return rows


def _repeated(running: Running, track: Track) -> Callable[[], int]:
    def run() -> int:
        for _ in range(track.repeats):
            running.step()
        settle(track.place)
        return track.repeats * track.images

    return run


def _peak(running: Running, place: torch.device, others: int) -> float | None:
    """GiB that a first step allocates at most, without what others hold; 0 on a CPU, None where memory ran out."""
    on_gpu = place.type == "cuda"
    try:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(place)
        running.step()
        settle(place)
        return (torch.cuda.max_memory_allocated(place) - others) / 2**30 if on_gpu else 0.0
    except torch.OutOfMemoryError:
        return None


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _row(entrant: Entrant, track: Track, peaks: dict[str, float | None], rates: dict[str, list[float]]) -> Row:
    mine, theirs = rates.get(entrant.way), rates.get(REFERENCE)
    ratios = [one / other for one, other in zip(mine, theirs, strict=True)] if mine and theirs else []
    rate = median(mine) if mine else None
    tflops = rate * entrant.flops / track.images / 1e12 if rate and entrant.flops else None
    on_gpu = track.place.type == "cuda"
    values = (
        *(entrant.way, track.precision, track.images, track.masks, rate, median(theirs) if theirs else None),
        *(median(ratios) if ratios else None, min(ratios, default=None), max(ratios, default=None)),
        *(peaks[entrant.way] if on_gpu else None, peaks.get(REFERENCE) if on_gpu else None),
        *(tflops, tflops / track.matmul_tflops if tflops else None),
    )
    return dict(zip(TABLE, values, strict=True))


def headline_of(rows: Sequence[Row], name: str) -> Row:
    """The row that a benchmark's ratio is of: in the first row's precision, most images, then the fastest.

    Raises:
        SystemExit: Nothing could be compared.
    """
    compared = [row for row in rows if row["ratio"] and row["precision"] == rows[0]["precision"]]
    if not compared:
        raise SystemExit(f"{name}: nothing could be compared: see what was left out above")
    fewest = min(row["masks"] for row in compared)
    return max((row for row in compared if row["masks"] == fewest), key=lambda row: (row["images"], row["ratio"]))


def named(row: Row) -> str:
    """A row's name."""
    return f"{row['way']}, {row['precision']}, {row['images']} × {row['masks']}"


def told(row: Row) -> str:
    """A row for people."""

    def figure(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    text = (
        f"{row['way']:10}{row['precision']:5}{row['images']:3} × {row['masks']}: ours "
        f"{figure(row['images_per_second'], '.3g')} images/s, reference {figure(row['reference'], '.3g')}, ratio "
        f"{figure(row['ratio'], '.3f')} ({figure(row['lowest'], '.3f')} to {figure(row['highest'], '.3f')})"
    )
    if row["peak_gib"] is not None:
        text += f", peak {row['peak_gib']:.1f} against {figure(row['reference_peak_gib'], '.1f')} GiB"
    if row["mfu"] is not None:
        text += f", {row['tflops']:.3g} TFLOP/s, MFU {row['mfu']:.1%}"
    return text


def mfu_bar(rows: Sequence[Row], needed: float) -> Row:
    """The bar on MFU, of the best row."""
    best = max((row["mfu"] or 0.0 for row in rows), default=0.0)
    return {"value": best, "needed": needed, "met": best >= needed}
