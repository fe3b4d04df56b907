"""From what was drawn over a case to the masks of its targets, slice by slice.

Shapes: Z, Y, X the case's volume; N slices of H rows and W columns; h, w a window of a slice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from data_shards.errors import UserError
from data_shards.preprocessing import Axis, place_of, slices_of
from data_shards.readers import Drawing, Layer, fits_name
from data_shards.spec import TargetSpec

Window = tuple[int, int, int, int]
"""A part of a slice: (top, left, height, width) in pixels."""


@dataclass(frozen=True)
class Found:
    """One mask of a target in a window.

    Attributes:
        mask: (h, w) bool.
        kind: ``"semantic"`` or ``"instance"``.
        identity: What tells one instance from another over the slices, for those that go through slices; else None.
    """

    mask: np.ndarray
    kind: str
    identity: tuple[int, int] | None = None


class Sheet:
    """A layer cut into slices."""

    def __init__(self, layer: Layer, shape: tuple[int, ...], axis: Axis) -> None:
        self.layer = layer
        self.colours = layer.values.ndim == 4
        self.whole = layer.values.shape[:3] == tuple(shape[:3])
        self._asked: tuple[int, Window] | None = None
        self._values: set[int] = set()
        self._slices = slices_of(layer.values, axis)
        self._place = place_of(layer.origin, layer.values.shape[:3], shape, axis)

    def crop(self, number: int, window: Window) -> tuple[np.ndarray, int, int] | None:
        """Return what of the layer lies in a window of a slice, and its row and column there; None if nothing can."""
        first, top, left = self._place
        if not 0 <= number - first < len(self._slices):
            return None
        plane = self._slices[number - first]
        row, column = max(top, window[0]), max(left, window[1])
        bottom, right = (
            min(top + plane.shape[0], window[0] + window[2]),
            min(left + plane.shape[1], window[1] + window[3]),
        )
        if row >= bottom or column >= right:
            return None
        return plane[row - top : bottom - top, column - left : right - left], row - window[0], column - window[1]

    def holds(self, labels: Sequence[int], number: int, window: Window) -> bool:
        """Whether a window of a slice may hold one of some labels: an organ atlas has a hundred, a slice a dozen."""
        if self.colours or self.layer.values.dtype.kind == "f":
            return True
        if self._asked != (number, window):
            part = self.crop(number, window)
            self._asked, self._values = (number, window), set(present(part[0])) if part is not None else set()
        return not self._values.isdisjoint(labels)

    @cached_property
    def voxels(self) -> dict[float, int]:
        """How often each value of a label map occurs: asked for each of a hundred targets, counted once."""
        values, counts = _counted(self.layer.values)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))


class Drawings:
    """Everything that was drawn over one case.

    Args:
        parts: By the name of the mask (``""`` for the only one), what its files hold.
        shape: Shape (Z, Y, X) of the case's volume.
        axis: The axis along which it is cut.
    """

    def __init__(self, parts: Mapping[str, Sequence[Drawing]], shape: tuple[int, ...], axis: Axis) -> None:
        self._parts = parts
        self._sheets = {
            name: [Sheet(layer, shape, axis) for drawing in drawings for layer in drawing.layers if layer.values.size]
            for name, drawings in parts.items()
        }
        self._chosen: dict[tuple[str, str | None, int | None], list[Sheet]] = {}

    def looked_for(self, target: TargetSpec) -> bool:
        """Whether a target that is not drawn is absent; not so if its mask is missing or lists only what was drawn."""
        if (target.mask or "") not in self._parts:  # this case has no such mask
            return False
        drawings = self._parts[target.mask or ""]
        return all(drawing.complete for drawing in drawings) or any(
            _selects(target, layer) for drawing in drawings for layer in drawing.layers
        )

    def is_unread(self, target: TargetSpec) -> bool:
        """Whether something of a target was drawn over the case and left out in reading."""
        drawings = self._parts.get(target.mask or "", ())
        left_out = [item for drawing in drawings for item in drawing.unread]
        return any(_selects(target, Layer(_NOTHING, name=name, number=number)) for name, number in left_out)

    def check(self, target: TargetSpec) -> None:
        """Check that what a target asks for can mean something.

        Raises:
            UserError: The file has a list of names, and the target's is not in it; or the target takes a value from
                all of several segments, regions or categories.
        """
        drawings = self._parts.get(target.mask or "", ())
        known = [item for drawing in drawings for item in drawing.names or ()]
        if known and not any(_selects(target, Layer(_NOTHING, name=name, number=number)) for name, number in known):
            wanted = f"name '{target.name}'" if target.name is not None else f"number {target.number}"
            listed = _listed([f"{number} '{name}'" for name, number in known])
            raise UserError(f"'{target.term}': nothing in it has the {wanted}; it has {listed}")
        names = {layer.name for drawing in drawings if drawing.volume is None for layer in drawing.layers}
        names |= {name for name, _ in known}
        if len(names) > 1 and target.has_rule() and target.name is None and target.number is None:
            listed = _listed(sorted(f"'{name}'" for name in names))
            raise UserError(
                f"'{target.term}' takes what is inside any of {listed}: choose by name or number, not by value"
            )

    def find(self, target: TargetSpec, number: int, window: Window) -> list[Found]:
        """Return the masks of a target in a window of a slice: the union first, then the instances; none if absent."""
        union: np.ndarray | None = None  # an atlas has a hundred targets, most of them absent
        instances: list[Found] = []
        for order, sheet in enumerate(self._of(target)):
            part = sheet.crop(number, window)
            if part is None:
                continue
            values, row, column = part
            if target.labels() and not sheet.holds(target.labels(), number, window):
                continue
            place = np.s_[row : row + values.shape[0], column : column + values.shape[1]]
            inside = select(target, values, sheet.colours)
            if not inside.any():
                continue
            union = np.zeros(window[2:], bool) if union is None else union
            union[place] |= inside
            if target.instances == "layers":
                instances.append(Found(_pasted(inside, place, window), "instance", (order, 0)))
            elif target.instances == "values":
                values = _coded(values) if sheet.colours else values
                for value in present(values):
                    instances.append(Found(_pasted(values == value, place, window), "instance", (order, value)))
        if union is None:
            return []
        if target.instances == "components":
            instances = [Found(mask, "instance") for mask in _components(union)]
        return [Found(union, "semantic"), *instances]

    def voxels(self, target: TargetSpec) -> Counter[tuple[int, int] | None]:
        """Return the number of voxels in the whole case: of each instance by its identity, and of all under None."""
        counts: Counter[tuple[int, int] | None] = Counter()
        for order, sheet in enumerate(self._of(target)):
            if target.labels() and target.instances != "layers" and not sheet.colours:
                counts[None] += sum(sheet.voxels.get(label, 0) for label in set(target.labels()))
                continue
            inside = select(target, sheet.layer.values, sheet.colours)
            counts[None] += int(inside.sum())
            if target.instances == "layers":
                counts[order, 0] = int(inside.sum())
            elif target.instances == "values":
                values = _coded(sheet.layer.values) if sheet.colours else sheet.layer.values
                values, numbers = np.unique(values[inside], return_counts=True)
                counts.update({(order, int(v)): int(n) for v, n in zip(values, numbers, strict=True)})
        return counts

    def unnamed(self, targets: Sequence[TargetSpec]) -> dict[str, list[str]]:
        """Return the values or colours of label maps that no target takes, but background, by the name of the mask."""
        result: dict[str, list[str]] = {}
        for name, sheets in self._sheets.items():
            mine = [target for target in targets if (target.mask or "") == name]
            if any(target.name is not None or target.number is not None for target in mine):
                continue
            if all(target.labels() for target in mine):
                known = {value for target in mine for value in target.labels()}
                grey = [sheet for sheet in sheets if not sheet.colours]
                found = {value for sheet in grey for value in present(sheet.layer.values)} - known
                result[name] = [str(value) for value in sorted(found)]
            elif all(target.colour is not None for target in mine):
                result[name] = _other_colours(mine, [sheet.layer.values for sheet in sheets if sheet.colours])
        return {name: values for name, values in result.items() if values}

    def content(self) -> str:
        """Say what there is to choose from: the names of layers, or the values of label maps."""
        layers = [layer for drawings in self._parts.values() for drawing in drawings for layer in drawing.layers]
        grids = [drawing.volume for drawings in self._parts.values() for drawing in drawings]
        names = list(dict.fromkeys(f"'{layer.name}'" for layer in layers if layer.name))
        if any(grid is None for grid in grids):
            return f"its layers: {_listed(names)}" if names else "it has no layers"
        try:
            values = sorted({value for layer in layers if layer.values.ndim == 3 for value in present(layer.values)})
        except UserError:
            return "its values are fractions"
        return f"its values: {_listed(list(map(str, values)))}" if values else "it is empty"

    def _of(self, target: TargetSpec) -> list[Sheet]:
        key = (target.mask or "", target.name, target.number)
        if key not in self._chosen:
            self._chosen[key] = [sheet for sheet in self._sheets[key[0]] if _selects(target, sheet.layer)]
        if target.takes_background() and not all(sheet.whole for sheet in self._chosen[key]):
            raise UserError(
                f"'{target.term}' also takes what was not drawn, which is known of label maps and pictures only: "
                "choose segments, contours and annotations by name or number alone"
            )
        return self._chosen[key]


def select(target: TargetSpec, values: np.ndarray, colours: bool = False) -> np.ndarray:
    """Return where the values (…), or colours (…, 3), of a layer belong to a target: (…) bool.

    Raises:
        UserError: The mask has colours and the target a number, which says nothing of them.
    """
    if colours:
        return _select_colour(target, values)
    inside: np.ndarray
    if target.above is not None:
        inside = values > target.above
    elif target.below is not None:
        inside = values < target.below
    elif target.colour is not None:  # a picture whose colours are all grey is read as grey
        red, green, blue = target.colour
        grey = red == green == blue
        inside = _near(values, red, target.tolerance) if grey else np.zeros(values.shape, bool)
    elif target.labels():
        inside = np.isin(values, target.labels())
    else:
        inside = values != 0
    return inside


def shrunk(drawing: Drawing) -> Drawing:
    """Return a drawing whose layers are cut to what is drawn: of an atlas in a hundred files little is left."""
    layers = tuple(_shrunk(layer) for layer in drawing.layers)
    volume = None if drawing.volume is None else replace(drawing.volume, array=np.empty((0, 0, 0), np.uint8))
    return replace(drawing, layers=layers, volume=volume)


def _shrunk(layer: Layer) -> Layer:
    values, origin = layer.values, list(layer.origin)
    for axis in range(3):
        filled = np.flatnonzero(values.any(axis=tuple(other for other in range(values.ndim) if other != axis)))
        first, stop = (int(filled[0]), int(filled[-1]) + 1) if filled.size else (0, 0)
        values = values[(slice(None),) * axis + (slice(first, stop),)]
        origin[axis] += first
    if values.size > layer.values.size / 2:
        return layer
    # Without a copy the part would keep the whole in memory.
    return replace(layer, values=values.copy(), origin=(origin[0], origin[1], origin[2]))


def present(values: np.ndarray) -> list[int]:
    """Return the different values of an array but 0, sorted, as whole numbers.

    Raises:
        UserError: A value is no whole number, or there are more than 65,535 of them.
    """
    found, _ = _counted(values)
    if len(found) > 2**16 or not (found == np.rint(found)).all():
        raise UserError("its values are no labels (fractions, or more than 65,535 of them): use above, below or a name")
    return [int(value) for value in found if value]


def _counted(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the different values of an array, sorted, and how often each occurs."""
    if values.dtype.kind not in "biu" or values.dtype.itemsize > 2:
        return np.unique(values, return_counts=True)
    # Counting is several times faster than sorting; of a volume slice by slice, as it takes eight bytes a voxel.
    unsigned = values.view(f"u{values.dtype.itemsize}")
    counts = np.zeros(int(unsigned.max(initial=0)) + 1, np.int64)
    for part in unsigned if unsigned.ndim > 2 else [unsigned]:
        counts += np.bincount(part.ravel(), minlength=len(counts))
    found = np.flatnonzero(counts)
    order = np.argsort(found.astype(unsigned.dtype).view(values.dtype), kind="stable")
    return found.astype(unsigned.dtype).view(values.dtype)[order], counts[found][order]


def _select_colour(target: TargetSpec, values: np.ndarray) -> np.ndarray:
    inside: np.ndarray
    if target.colour is not None:
        inside = np.ones(values.shape[:-1], bool)
        for channel, wanted in enumerate(target.colour):
            inside &= _near(values[..., channel], wanted, target.tolerance)
    elif target.labels() or target.above is not None or target.below is not None:
        raise UserError(
            f"the mask is in colours, and '{target.term}' is given by a number: give it a colour: [R, G, B]"
        )
    else:
        inside = (values != 0).any(axis=-1)
    return inside


def _other_colours(targets: Sequence[TargetSpec], pictures: Sequence[np.ndarray]) -> list[str]:
    """Return the colours of pictures (Z, Y, X, 3), but black, that belong to no target."""
    codes = sorted({code for values in pictures for code in np.unique(_coded(values)).tolist() if code})
    colours = np.array([(code >> 32, code >> 16 & 0xFFFF, code & 0xFFFF) for code in codes]).reshape(-1, 3)
    taken = np.zeros(len(colours), bool)
    for target in targets:
        taken |= _select_colour(target, colours)
    return [str(colour) for colour in colours[~taken].tolist()]


def _near(values: np.ndarray, wanted: int, tolerance: int) -> np.ndarray:
    near: np.ndarray = (values >= wanted - tolerance) & (values <= wanted + tolerance)
    return near


def _selects(target: TargetSpec, layer: Layer) -> bool:
    """Whether a layer is one of those that a target names."""
    if target.number is not None and layer.number != target.number:
        return False
    if target.name is None:
        return True
    return fits_name(layer.name, target.name)


def _coded(colours: np.ndarray) -> np.ndarray:
    """Return one number (…) for each colour (…, 3), 0 for black."""
    red, green, blue = (colours[..., channel].astype(np.int64) for channel in range(3))
    return (red << 32) | (green << 16) | blue


def _pasted(inside: np.ndarray, place: tuple[slice, slice], window: Window) -> np.ndarray:
    mask = np.zeros(window[2:], bool)
    mask[place] = inside
    return mask


_NOTHING = np.empty((0, 0, 0), np.uint8)


def _listed(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _components(mask: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the connected pieces of a mask (h, w); corners connect."""
    from scipy import ndimage

    labels, count = ndimage.label(mask, np.ones((3, 3)))
    for number in range(1, count + 1):
        yield labels == number
