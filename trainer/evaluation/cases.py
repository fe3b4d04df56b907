"""The cases of a set: images with their targets, and volumes or videos with the objects in them.

Shapes: D slices, H W native height and width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from data_shards.batch import Sample, collate
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError, nearest
from data_shards.index import Index
from data_shards.triplet import Target
from trainer.scores import volume_of

T = TypeVar("T")


class ShardStack:
    """The slices of a volume, or the frames of a video, in a folder of shards.

    Args:
        shards: The folder.
        positions: Of the slices, in their order.
        name: What messages call it; the key of its first slice by default.

    Raises:
        UserError: The slices have different sizes.
    """

    def __init__(self, shards: ShardDataset, positions: Sequence[int], name: str = "") -> None:
        self.shards, self.positions = shards, [int(position) for position in positions]
        index, first = shards.index, self.positions[0]
        self.name = name or volume_of(index.key(first))
        sizes = {(int(index.height[place]), int(index.width[place])) for place in self.positions}
        if len(sizes) > 1:
            shown = " and ".join(f"{width} x {height}" for height, width in sorted(sizes)[:2])
            raise UserError(f"{self.name}: its slices have different sizes ({shown}): they cannot be followed")
        self.size: tuple[int, int] = sizes.pop()
        steps = (float(getattr(index, f"{way}_spacing")[first]) for way in ("slice", "row", "column"))
        between, rows, columns = steps
        self.flat_spacing = (rows, columns) if np.isfinite(rows) and np.isfinite(columns) else None
        self.spacing = (between, *self.flat_spacing) if self.flat_spacing and np.isfinite(between) else None

    def __len__(self) -> int:
        return len(self.positions)

    def image(self, number: int) -> Tensor:
        """Read a slice: (C, H, W) with 1 or 3 channels, of its native type.

        Raises:
            UserError: A pixel is no finite number.
        """
        return read_image(self.shards, self.positions[number])

    @cached_property
    def targets(self) -> list[tuple[Target, ...]]:
        """What was drawn on each slice, as run lengths."""
        return [self.shards[position].targets for position in self.positions]

    @cached_property
    def plane(self) -> str:
        """Anatomical plane of the slices; empty where it is not known."""
        return self.shards[self.positions[0]].provenance.axis

    def truth(self, term: str, number: int) -> np.ndarray:
        """All of a term in a slice: (H, W) bool."""
        return drawn(self.targets[number], term, self.size)


@dataclass(frozen=True)
class Part:
    """Neighbouring slices of a stack, as a stack of their own.

    Attributes:
        whole: The stack.
        first: Its first slice that belongs to this part.
        last: Its last one.
    """

    whole: ShardStack
    first: int
    last: int

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.whole.name

    @property
    def size(self) -> tuple[int, int]:
        """Native height and width."""
        return self.whole.size

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        """Millimetres between slices, rows and columns."""
        return self.whole.spacing

    def __len__(self) -> int:
        return self.last - self.first + 1

    def image(self, number: int) -> Tensor:
        """Read a slice."""
        return self.whole.image(self.first + number)

    def truth(self, term: str) -> np.ndarray:
        """All of a term: (D, H, W) bool."""
        return np.stack([self.whole.truth(term, number) for number in range(self.first, self.last + 1)])


@dataclass(frozen=True)
class ImageCase:
    """An image with targets.

    Attributes:
        position: Of the sample in its folder.
        key: Of the sample.
        targets: Positions of the targets that are asked for.
    """

    position: int
    key: str
    targets: tuple[int, ...]


@dataclass(frozen=True)
class SequenceCase:
    """A volume or video with objects.

    Attributes:
        positions: Of its slices in their folder, in their order.
        key: Its name, unique in the folder.
        where: For each term that is asked for the numbers of the slices that have a target of it, from 0.
    """

    positions: tuple[int, ...]
    key: str
    where: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Thing:
    """An object of a sequence, and how it is asked for.

    Attributes:
        term: What it is.
        shown: Number of the slice on which it is shown.
        first: First slice that is asked for.
        last: Last one.
    """

    term: str
    shown: int
    first: int
    last: int


def things_of(case: SequenceCase, kind: str, whole: bool) -> tuple[list[Thing], list[str]]:
    """Choose the slice on which each object is shown, and those that it is followed through.

    Args:
        case: The volume or video.
        kind: ``3d`` shows the middle one of an object's slices, the upper one of two, or the nearest to it that has
            the object (Ma et al. 2024, arXiv:2408.03322); ``video`` the first.
        whole: Whether the object is followed to the ends of the case, not only to its own.

    Returns:
        The objects, and the terms that are left out, since there is no other slice to follow them to.
    """
    things, left_out = [], []
    for term, numbers in case.where.items():
        first, last = numbers[0], numbers[-1]
        middle = first + (last - first + 1) // 2
        shown = first if kind == "video" else min(numbers, key=lambda number: (abs(number - middle), number))
        if whole:
            first, last = 0 if kind == "3d" else first, len(case.positions) - 1
        if last > first:
            things.append(Thing(term, shown, first, last))
        else:
            left_out.append(term)
    return things, left_out


def read_image(shards: ShardDataset, position: int) -> Tensor:
    """Read an image: (C, H, W) with 1 or 3 channels, of its native type.

    Raises:
        UserError: A pixel is no finite number.
    """
    image = collate([Sample(position, shards[position], ())]).images[0]
    if image.is_floating_point() and not torch.isfinite(image).all():
        raise UserError(
            f"{shards.shard(position)}: sample '{shards.index.key(position)}' has pixels that are no number"
        )
    return image


def drawn(targets: Sequence[Target], term: str, size: tuple[int, int]) -> np.ndarray:
    """All of a term among an image's targets: its only semantic target, else all of its targets together.

    Returns:
        (H, W) bool; empty where the term has no target.
    """
    mask = np.zeros(size, bool)
    for place in places_of(targets, term):
        mask |= targets[place].mask() != 0
    return mask


def places_of(targets: Sequence[Target], term: str) -> list[int]:
    """Positions of the targets that together are all of a term; see `drawn`."""
    mine = [place for place, target in enumerate(targets) if target.term == term]
    wholes = [place for place in mine if targets[place].kind == "semantic"]
    return wholes if len(wholes) == 1 else mine


def image_cases(index: Index, terms: Sequence[str] | None, limit: int | None) -> list[ImageCase]:
    """The images that have a target, or one of some terms, in the order of the shards.

    Args:
        index: Of the folder.
        terms: Which; None for all.
        limit: Most images, evenly chosen; None for all.

    Raises:
        UserError: There is none, or no such term.
    """
    wanted = _wanted(index, terms)[index.target_term]
    counts = np.concatenate([[0], np.cumsum(wanted)])
    has = np.flatnonzero(counts[index.target_start[1:]] - counts[index.target_start[:-1]])
    if not has.size:
        raise UserError(f"{index.folder}: no image of it has a target to ask for")
    cases = []
    for place in evenly(has.tolist(), limit):
        span = wanted[index.target_start[place] : index.target_start[place + 1]]
        cases.append(ImageCase(place, index.key(place), tuple(np.flatnonzero(span).tolist())))
    return cases


def sequence_cases(index: Index, terms: Sequence[str] | None, limit: int | None) -> list[SequenceCase]:
    """The volumes or videos with a target: slices that follow each other, so a hole makes two of one.

    Args:
        index: Of the folder.
        terms: Which; None for all.
        limit: Most sequences, evenly chosen; None for all.

    Raises:
        UserError: There is none, or no such term, or an old index that does not tell neighbours.
    """
    if index.is_old:
        raise UserError(f"{index.folder}: its index does not tell neighbours: run `data-shards index {index.folder}`")
    allowed = _wanted(index, terms)
    chains = _chains(index)
    if not chains:
        raise UserError(
            f"{index.folder}: no volumes: none of its {len(index)} images follows another one: kind 2d takes these, or "
            "build the shards with `slices: {keep: all}`"
        )
    names = [volume_of(index.key(chain[0])) for chain in chains]
    repeated, found = Counter(names), []
    for name, chain in zip(names, chains, strict=True):
        where: dict[str, list[int]] = {}
        for number, place in enumerate(chain):
            span = index.target_term[index.target_start[place] : index.target_start[place + 1]]
            for term in set(span[allowed[span]].tolist()):
                where.setdefault(str(index.terms[term]), []).append(number)
        if where:
            key = name if repeated[name] == 1 else f"{name}, from {index.key(chain[0])}"
            found.append(SequenceCase(tuple(chain), key, {term: tuple(where[term]) for term in sorted(where)}))
    if not found:
        raise UserError(f"{index.folder}: no volume of it has a target to ask for")
    return evenly(found, limit)


def evenly(items: Sequence[T], limit: int | None) -> list[T]:
    """At most so many of some things, evenly chosen."""
    if limit is None or len(items) <= limit:
        return list(items)
    places = np.linspace(0, len(items) - 1, limit).round().astype(int)
    return [items[place] for place in places.tolist()]


def _wanted(index: Index, terms: Sequence[str] | None) -> np.ndarray:
    """Which of an index's terms are asked for: (number of terms,) bool."""
    known = [str(term) for term in index.terms]
    for term in terms or ():
        if term not in known:
            raise UserError(f"{index.folder}: terms: it has no '{term}'{nearest(term, known)}")
    return np.array([terms is None or term in terms for term in known], bool)


def _chains(index: Index) -> list[list[int]]:
    """Positions of slices that follow each other, two or more."""
    following = index.following
    begins = np.ones(len(index), bool)
    begins[following[following >= 0]] = False
    chains = []
    for place in np.flatnonzero(begins & (following >= 0)).tolist():
        chain = [place]
        while following[chain[-1]] >= 0:
            chain.append(int(following[chain[-1]]))
        chains.append(chain)
    return sorted(chains, key=lambda chain: index.key(chain[0]))
