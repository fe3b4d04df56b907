"""COCO's run lengths of masks, read without trust.

Shapes: H, W are the mask's height and width, R its runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def runs_of(counts: str | Sequence[int], size: tuple[int, int]) -> np.ndarray | None:
    """Return COCO's run lengths (R,) int64: outside, inside, outside, …; columns come one after another.

    pycocotools would fill what damaged run lengths leave open with whatever lies in memory, or crash.

    Args:
        counts: Compressed as text, or as they are.
        size: Mask height and width (H, W) in pixels.

    Returns:
        The runs, or None where they are damaged: they do not fill the mask.
    """
    pixels = size[0] * size[1]
    if isinstance(counts, str):
        runs = _unpack(counts, pixels)
    elif len(counts) <= 2 * pixels + 1 and all(type(count) is int and 0 <= count <= pixels for count in counts):
        runs = np.array(counts, dtype=np.int64)
    else:
        return None
    if runs is None or not runs.size or runs.min() < 0 or runs.max() > pixels or int(runs.sum()) != pixels:
        return None
    return runs


def fill(runs: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the mask (H, W) uint8, 1 inside, of runs from `runs_of`."""
    values = np.zeros(len(runs), np.uint8)
    values[1::2] = 1
    return values.repeat(runs).reshape(size[1], size[0]).T


def _unpack(counts: str, pixels: int) -> np.ndarray | None:
    """Read compressed run lengths: (R,) int64, or None where they cannot be those of so many pixels.

    A run is written in groups of 5 bits, lowest first, as a character from 48 on whose bit 32 says that another group
    follows; bit 16 of the last group is the sign. From the fourth run on, it is the difference to the last but one.
    """
    if len(counts) > 8 * (pixels + 2):  # at most a run for each pixel, of 8 characters each
        return None
    # What is below the first character wraps around, to more than 63.
    groups = np.frombuffer(counts.encode("ascii", "replace"), np.uint8) - np.uint8(48)
    if groups.size == 0 or groups.max() > 63 or groups[-1] & 32:
        return None
    ends = (groups < 32).nonzero()[0]
    lengths = ends.copy()
    lengths[0] += 1
    lengths[1:] -= ends[:-1]
    longest = int(lengths.max())
    if longest > 8:  # no image has as many pixels
        return None
    runs = groups[ends].astype(np.int64)
    runs = (runs & 15) - (runs & 16)
    for back in range(1, longest):
        more = (lengths > back).nonzero()[0]
        runs[more] = (runs[more] << 5) + (groups[ends[more] - back] & 31)
    runs[1::2].cumsum(out=runs[1::2])
    runs[2::2].cumsum(out=runs[2::2])
    return runs
