"""Which objects of a volume are wanted, and how each is shown on one of its slices.

Shapes: N objects, M those of one slice, H W native height and width, S the model's input side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_shards.errors import UserError
from trainer.models.preprocessing import Preprocessing
from trainer.prompts.base import Prompts, merged
from trainer.prompts.regions import deepest
from trainer.volumes.stack import Stack

Kind = Literal["box", "points", "mask"]
"""How an object is shown."""


@dataclass(frozen=True, eq=False)
class Asked:
    """One object, and how it is shown on one slice, in that slice's native pixels.

    A mask is taken as the object's answer on its slice, exactly. Without one, box and points are what the model is
    asked; together they are one question.

    Attributes:
        name: What the object is called.
        slice: Number of the slice.
        box: (x0, y0, x1, y1), the outermost pixels included.
        points: Each (x, y, label), the label 1 on the object and 0 beside it.
        mask: (H, W) bool.
    """

    name: str
    slice: int
    box: tuple[float, float, float, float] | None = None
    points: tuple[tuple[float, float, int], ...] = ()
    mask: np.ndarray | None = None

    def describe(self) -> dict[str, object]:
        """What was asked, as JSON; a mask is its number of pixels."""
        return {
            "name": self.name,
            "slice": self.slice,
            "box": None if self.box is None else list(self.box),
            "points": [list(point) for point in self.points],
            "mask_px": None if self.mask is None else int(self.mask.sum()),
        }


def tight_box(mask: np.ndarray) -> tuple[float, float, float, float] | None:
    """Box (x0, y0, x1, y1) of a mask (H, W), the outermost pixels included; None if it is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return float(columns[0]), float(rows[0]), float(columns[-1]), float(rows[-1])


def shown(masks: Mapping[str, np.ndarray], number: int, kind: Kind = "mask") -> list[Asked]:
    """Ask about objects whose masks on a slice are known.

    Args:
        masks: Their masks (H, W) bool by name, none of them empty.
        number: The slice.
        kind: ``mask`` shows the mask itself, ``box`` its tight box, ``points`` the pixel farthest from its border.
    """
    asked = []
    for name, mask in masks.items():
        if kind == "mask":
            asked.append(Asked(name, number, mask=mask))
        elif kind == "box":
            asked.append(Asked(name, number, box=tight_box(mask)))
        else:
            _, x, y = deepest(mask)
            asked.append(Asked(name, number, points=((float(x), float(y), 1),)))
    return asked


def check_asked(asked: Sequence[Asked], stack: Stack, first: int, last: int) -> None:
    """Check what is asked before anything is computed.

    Args:
        asked: The objects.
        stack: The volume.
        first: First slice that is wanted.
        last: Last one.

    Raises:
        UserError: A slice lies outside of the volume, nothing is asked, an object has no prompt, two have one name, a
            prompt lies outside of the image, or a mask is empty or of another size.
    """
    where, depth = stack.name, len(stack)
    check_limits(stack, first, last)
    if not asked:
        raise UserError(f"{where}: no prompt: show at least one object by a box, points or a mask")
    names = [one.name for one in asked]
    twice = [name for place, name in enumerate(names) if name in names[:place]]
    if twice:
        raise UserError(f"{where}: two objects are called '{twice[0]}': give each a name of its own")
    for one in asked:
        if not first <= one.slice <= last:
            limits = "it has slices" if last - first == depth - 1 else "wanted are slices"
            raise UserError(f"{where}: '{one.name}' is shown on slice {one.slice}: {limits} {first} to {last}")
        _check_prompt(one, stack.size, where)


def check_limits(stack: Stack, first: int, last: int) -> None:
    """Raise a `UserError` unless a volume has the slices that are wanted."""
    if not 0 <= first <= last < len(stack):
        raise UserError(f"{stack.name}: slices {first} to {last} are asked for, it has 0 to {len(stack) - 1}")


def _check_prompt(one: Asked, size: tuple[int, int], where: str) -> None:
    height, width = size
    image = f"the image, which is {width} pixels wide and {height} high"
    if one.mask is not None:
        if one.mask.shape != size:
            raise UserError(
                f"{where}: the mask of '{one.name}' is {one.mask.shape[1]} x {one.mask.shape[0]} pixels, not as {image}"
            )
        if not one.mask.any():
            raise UserError(f"{where}: the mask of '{one.name}' is empty on slice {one.slice}: choose another slice")
    elif one.box is None and not one.points:
        raise UserError(f"{where}: '{one.name}' has no prompt: give it a box, points or a mask")
    if one.box is not None:
        x0, y0, x1, y1 = one.box
        corners = ",".join(f"{corner:g}" for corner in one.box)
        if not (x0 <= x1 and y0 <= y1):
            raise UserError(f"{where}: the box {corners} of '{one.name}': x0,y0 are its upper left corner")
        if min(x0, y0) < 0 or x1 > width or y1 > height:
            raise UserError(f"{where}: the box {corners} of '{one.name}' reaches out of {image}")
    for x, y, label in one.points:
        if not (0 <= x < width and 0 <= y < height):
            raise UserError(f"{where}: the point ({x:g}, {y:g}) of '{one.name}' lies outside of {image}")
        if label not in (0, 1):
            raise UserError(f"{where}: a point of '{one.name}' has the label {label}: 1 is on the object, 0 beside it")
    if one.mask is None and one.box is None and not any(label for _, _, label in one.points):
        raise UserError(f"{where}: '{one.name}' has only points beside it: give one on it, or a box")


def prompts_of(asked: Sequence[Asked], preprocessing: Preprocessing, size: tuple[int, int]) -> list[Prompts]:
    """What M objects of one slice are asked with, in pixels of the model's input.

    Args:
        asked: The objects; that of row m asks about image m.
        preprocessing: The model's.
        size: Native height and width (H, W).

    Returns:
        Prompts of one form each, on the CPU, whose `rows` together are all M.
    """
    return merged([_prompt(one, row, preprocessing, size) for row, one in enumerate(asked)])


def _prompt(one: Asked, row: int, preprocessing: Preprocessing, size: tuple[int, int]) -> Prompts:
    place, sizes = torch.tensor([row]), torch.tensor([size])
    if one.mask is not None:
        return Prompts(place, given=_given(one.mask, preprocessing), rows=place)
    boxes = points = labels = None
    if one.box is not None:
        boxes, _ = preprocessing.boxes(torch.tensor([one.box]), sizes)
    if one.points:
        native = torch.tensor([point[:2] for point in one.points])
        scaled, _ = preprocessing.boxes(native.repeat(1, 2), sizes.expand(len(native), 2))
        points, labels = scaled[None, :, :2], torch.tensor([[label for _, _, label in one.points]])
    return Prompts(place, boxes=boxes, points=points, labels=labels, rows=place)


def _given(mask: np.ndarray, preprocessing: Preprocessing) -> Tensor:
    """A mask (H, W) at the model's input: (1, S, S) float32 of 0 and 1."""
    native = torch.from_numpy(np.ascontiguousarray(mask))
    # smoothed and then cut at one half, as SAM2's predictor does with a mask
    sized = F.interpolate(
        native[None, None].float(), preprocessing.input_size(*mask.shape), mode="bilinear", antialias=True
    )
    if not (sized >= 0.5).any():  # so small that it would be lost
        return preprocessing.masks([native])
    side = preprocessing.image_size
    whole = F.pad((sized >= 0.5).float(), (0, side - sized.shape[3], 0, side - sized.shape[2]))
    return whole[:, 0]
