"""Label maps that show their objects: ground truth as prompts, for evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.errors import UserError
from data_shards.readers import known_suffixes
from trainer.models.weights import sha256_of
from trainer.segment.asking import masks_of, named
from trainer.segment.images import Item, sizes_of, stem_of
from trainer.segment.session import tell
from trainer.volumes.asked import Asked, shown
from trainer.volumes.scan import Scan, open_labels


@dataclass(frozen=True)
class MaskPrompts:
    """The objects of one label map, each shown by its tight box on the slice where it is largest.

    Attributes:
        path: The label map.
        wanted: Which of its labels, and their names, as `parse_labels` gives them.
    """

    path: Path
    wanted: Mapping[int, str] | None

    def asked(self, scan: Scan) -> list[Asked]:
        """The objects; none where the label map has none of those that are wanted.

        Raises:
            UserError: The label map does not lie on the scan, or cannot be read.
        """
        with open_labels(self.path, scan) as labels:
            tell(labels)
            largest: dict[int, tuple[int, int]] = {}
            for number in range(len(scan)):
                for value, area in zip(*np.unique(labels.raw(number), return_counts=True), strict=True):
                    if value and area > largest.get(int(value), (0, 0))[0]:
                        largest[int(value)] = int(area), number
            values = sorted(value for value in largest if self.wanted is None or value in self.wanted)
            if not values:
                return []
            wanted = None if self.wanted is None else {value: self.wanted[value] for value in values}
            asked = []
            for value, name in named(values, wanted, labels, "").items():
                number = largest[value][1]
                asked += shown(masks_of(labels.raw(number), {value: name}), number, "box")
            return asked

    def describe(self) -> dict[str, Any]:
        """What is asked, as JSON."""
        same: dict[str, Any] = {"sha256": sha256_of(self.path)} if self.path.is_file() else sizes_of(self.path)
        wanted = None if self.wanted is None else {str(value): name for value, name in self.wanted.items()}
        return {"mask": same, "labels": wanted, "slice": "largest", "prompt": "box"}


def find_masks(folder: Path, items: Sequence[Item], wanted: Mapping[int, str] | None) -> dict[str, MaskPrompts]:
    """Find the label map of each image: it has the same name, in the same place of its folder; the suffix may differ.

    Args:
        folder: Of the label maps.
        items: The images.
        wanted: Which labels, and their names.

    Returns:
        By an image's key; those without a label map are left out.

    Raises:
        UserError: There is no such folder, an image has several label maps, or none has one.
    """
    if not folder.is_dir():
        raise UserError(f"--masks {folder}: is no folder: name the one that holds the label maps")
    suffixes = known_suffixes()
    found = {}
    for item in items:
        same = folder / item.key
        fitting = [same] if same.exists() else []
        place = (folder / item.name).parent
        if not fitting and place.is_dir():
            base = Path(item.name).name
            entries = sorted(path for path in place.iterdir() if not path.name.startswith("."))
            fitting = [path for path in entries if base in (path.name, stem_of(path.name, suffixes))]
        if len(fitting) > 1:
            both = " or ".join(path.name for path in fitting[:2])
            raise UserError(f"--masks {folder}: the label map of {item.key} may be {both}: leave one")
        if fitting:
            found[item.key] = MaskPrompts(fitting[0], wanted)
    if not found:
        raise UserError(
            f"--masks {folder}: no label map has the name of an image, such as {items[0].key}: call them alike"
        )
    return found
