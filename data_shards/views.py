"""What a draw of the sampler becomes: a sample with its targets chosen, or the frames of a clip.

Every choice is a pure function of (seed, epoch, position, repeat).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from torch.utils.data import Dataset

from data_shards.batch import Item, Sample, Skipped
from data_shards.dataset import ShardDataset
from data_shards.errors import DamageError, UserError
from data_shards.index import Index
from data_shards.sampler import Draw
from data_shards.seed import stream
from data_shards.triplet import KINDS, Triplet

Anchor = Literal["first", "middle", "last", "ends"]
"""Which slice of a clip says what is followed: ``ends`` draws the first or the last one anew each time."""
Kinds = Literal["all", "semantic", "instance"]
OnDamage = Literal["error", "skip"]


class SampleView(Dataset[Item]):
    """A shard dataset as (epoch, position) → sample, with the targets of that epoch chosen.

    Args:
        shards: The samples.
        targets_per_image: How many targets of an image are drawn in an epoch; null takes all. MedSAM draws one.
        seed: Seed of the draw.
        kinds: Which targets are drawn from: ``semantic`` (all of a term in one mask), ``instance``, or ``all``.
        negatives_per_image: How many terms are drawn from those that were looked for in an image and are not there.
        on_damage: What a damaged sample is: an ``error``, or one to ``skip`` and to report.
        hard_negatives: Draw first from those of these terms that other images of the same modality have, and only then
            from the rest: only the image itself tells that they are not there.
    """

    frames = 1

    def __init__(
        self,
        shards: ShardDataset,
        targets_per_image: int | None = None,
        seed: int = 0,
        kinds: Kinds = "all",
        negatives_per_image: int = 0,
        on_damage: OnDamage = "error",
        hard_negatives: bool = False,
    ) -> None:
        self.shards, self.targets_per_image, self.seed = shards, targets_per_image, seed
        self.kinds, self.negatives_per_image, self.on_damage = kinds, negatives_per_image, on_damage
        self._shown = terms_shown(shards.index) if hard_negatives and negatives_per_image else None

    def __len__(self) -> int:
        return len(self.shards)

    def scored(self, draws: int) -> np.ndarray:
        """Positions of the samples with something to score in an evaluation's first `draws` draws, ascending."""
        return np.flatnonzero(with_target(self.shards.index, self.kinds)[:draws])

    def __getitem__(self, draw: Draw | tuple[int, int]) -> Item:
        """Read what was drawn.

        Raises:
            UserError: A sample is damaged, and may not be skipped; or the place of the shards cannot be read.
        """
        draw = Draw(*draw)
        try:
            return self._read(draw)
        except DamageError as error:
            if self.on_damage == "error":
                raise
            position = self._position(draw)
            return Skipped(position, self.shards.index.key(position), str(error))

    def _position(self, draw: Draw) -> int:
        """Position of what was drawn, or of its first slice."""
        return draw.position

    def _read(self, draw: Draw) -> Sample | tuple[Sample, ...]:
        triplet = self._triplet(draw.position)
        candidates = [number for number, target in enumerate(triplet.targets) if self.kinds in ("all", target.kind)]
        return Sample(
            position=draw.position,
            triplet=triplet,
            chosen=self._draw(candidates, draw),
            repeat=draw.repeat,
            absent=self._negatives([triplet], draw),
        )

    def _triplet(self, position: int) -> Triplet:
        """Read a sample whose image has a value everywhere.

        Raises:
            DamageError: It holds NaN or infinity, from which nothing is learnt and every prediction is empty.
        """
        triplet = self.shards[position]
        if np.issubdtype(triplet.image.dtype, np.floating) and not np.isfinite(triplet.image).all():
            where = f"{self.shards.shard(position)}: sample '{triplet.key}'"
            raise DamageError(
                f"{where}: its image holds NaN or infinity: repair it and build the shards anew, or set "
                "data.init_args.on_damage to skip"
            )
        return triplet

    def _draw(self, candidates: Sequence[int], draw: Draw) -> tuple[int, ...]:
        """Draw as many of the candidates as are wanted, in their order."""
        if self.targets_per_image is None or len(candidates) <= self.targets_per_image:
            return tuple(candidates)
        if draw.repeat:
            generator = stream(self.seed, "repeats", *draw)
        else:
            generator = np.random.default_rng((self.seed, draw.epoch, draw.position))
        chosen = generator.choice(len(candidates), size=self.targets_per_image, replace=False)
        return tuple(candidates[index] for index in sorted(chosen.tolist()))

    def _negatives(self, triplets: Sequence[Triplet], draw: Draw) -> tuple[str, ...]:
        """Draw terms that were looked for in all of some images and are in none of them."""
        if not self.negatives_per_image:
            return ()
        there = {target.term for triplet in triplets for target in triplet.targets}
        everywhere = set.intersection(*({*triplet.looked_for} for triplet in triplets))
        absent = [term for term in dict.fromkeys(triplets[0].looked_for) if term in everywhere - there]
        groups = [list(range(len(absent)))]
        if self._shown is not None:
            shown = self._shown[int(self.shards.index.modality[draw.position])]
            groups = [[n for n in groups[0] if (absent[n] in shown) == hard] for hard in (True, False)]
        generator = stream(self.seed, "negatives", *draw)
        chosen: list[int] = []
        for group in groups:
            count = min(self.negatives_per_image - len(chosen), len(group))
            drawn = generator.choice(len(group), size=count, replace=False).tolist() if count else ()
            chosen += [group[number] for number in drawn]
        return tuple(absent[number] for number in sorted(chosen))


class ClipView(SampleView):
    """Clips of neighbouring slices of one volume, as video models take them: (epoch, position) → frames.

    A clip begins at the slice that was drawn. What is followed through it are semantic targets of its anchor, by
    default that first slice: another slice has those of them that it shows, under the same number.

    Args:
        shards: The samples.
        frames: Slices in a clip.
        step: From one slice of a clip to the next: 2 leaves out every other.
        targets_per_image: How many things are drawn from the anchor; null takes all.
        seed: Seed of the draw.
        negatives_per_image: Terms drawn from those that were looked for in all slices and are in none.
        on_damage: What a clip with a damaged slice is: an ``error``, or one to ``skip`` and to report.
        hard_negatives: Draw first from those of these terms that other images of the same modality have.
        anchor: Which slice says what is followed, and is prompted: forwards from the ``first``, backwards from the
            ``last``, outwards from the ``middle``, or from one of the ``ends``, drawn anew each time.
        starts: Where clips begin, if draws count clips and not samples: (N,) positions.
    """

    def __init__(
        self,
        shards: ShardDataset,
        frames: int,
        step: int = 1,
        targets_per_image: int | None = None,
        seed: int = 0,
        negatives_per_image: int = 0,
        on_damage: OnDamage = "error",
        hard_negatives: bool = False,
        anchor: Anchor = "first",
        starts: np.ndarray | None = None,
    ) -> None:
        super().__init__(shards, targets_per_image, seed, "semantic", negatives_per_image, on_damage, hard_negatives)
        self.frames, self.step, self.anchor, self.starts = frames, step, anchor, starts

    def __len__(self) -> int:
        return len(self.shards) if self.starts is None else len(self.starts)

    def scored(self, draws: int) -> np.ndarray:
        """Positions of the slices that show what their clip's anchor shows, in the first `draws` clips, ascending."""
        index, found = self.shards.index, []
        starts = np.arange(len(index)) if self.starts is None else self.starts
        for start in starts[:draws].tolist():
            places = clip(index, start, self.frames, self.step)
            terms = [_semantic_terms(index, place) for place in places]
            ends = anchor_frames(self.anchor, self.frames)
            anchor = next((frame for frame in ends if terms[frame]), ends[0])
            shown = (n != anchor and bool(terms[n] & terms[anchor]) for n in range(self.frames))
            found += [place for place, wanted in zip(places, shown, strict=True) if wanted]
        return np.array(sorted(found), dtype=np.int64)

    def _position(self, draw: Draw) -> int:
        return draw.position if self.starts is None else int(self.starts[draw.position])

    def _read(self, draw: Draw) -> tuple[Sample, ...]:
        number, draw = draw.position, draw._replace(position=self._position(draw))
        places = clip(self.shards.index, draw.position, self.frames, self.step)
        triplets = [self._triplet(place) for place in places]
        anchor = self._anchor(triplets, draw)
        shown = [place for place, target in enumerate(triplets[anchor].targets) if target.kind == "semantic"]
        terms = [triplets[anchor].targets[place].term for place in self._draw(shown, draw)]
        absent = self._negatives(triplets, draw)
        samples = []
        for place, triplet in zip(places, triplets, strict=True):
            found = [
                (number, terms.index(target.term))
                for number, target in enumerate(triplet.targets)
                if target.kind == "semantic" and target.term in terms
            ]
            chosen, objects = tuple(number for number, _ in found), tuple(thing for _, thing in found)
            samples.append(Sample(place, triplet, chosen, draw.repeat, objects, absent, anchor, number))
        return tuple(samples)

    def _anchor(self, triplets: Sequence[Triplet], draw: Draw) -> int:
        """Which frame is the anchor: of the ends one that shows something to follow."""
        if self.anchor != "ends":
            return anchor_frames(self.anchor, self.frames)[0]
        ends = [end for end in (0, self.frames - 1) if any(t.kind == "semantic" for t in triplets[end].targets)]
        if len(ends) < 2 or self.starts is not None:  # in an evaluation nothing is random
            return ends[0] if ends else 0
        return ends[int(stream(self.seed, "clip_ends", *draw).integers(2))]


def clip(index: Index, position: int, frames: int, step: int) -> list[int]:
    """Return the positions of a clip's slices.

    Raises:
        UserError: The volume ends before the clip.
    """
    places = [position]
    for number in range((frames - 1) * step):
        position = int(index.following[position])
        if position < 0:
            raise UserError(f"{index.folder}: no clip of {frames} slices begins at sample '{index.key(places[0])}'")
        if (number + 1) % step == 0:
            places.append(position)
    return places


def terms_shown(index: Index) -> list[frozenset[str]]:
    """Return for each modality of a corpus the terms that any image of it has a target of."""
    shown = np.zeros((len(index.modalities), len(index.terms)), bool)
    shown[np.repeat(index.modality, np.diff(index.target_start)), index.target_term] = True
    return [frozenset(index.terms[row].tolist()) for row in shown]


def _semantic_terms(index: Index, position: int) -> set[int]:
    """Numbers of the terms that a sample has a semantic target of."""
    mine = slice(index.target_start[position], index.target_start[position + 1])
    return set(index.target_term[mine][index.target_kind[mine] == KINDS.index("semantic")].tolist())


def with_target(index: Index, kinds: Kinds) -> np.ndarray:
    """Return which samples have a target of some kind: (N,) bool."""
    if kinds == "all":
        return np.diff(index.target_start) > 0
    before = np.concatenate([[0], np.cumsum(index.target_kind == KINDS.index(kinds))])
    return np.diff(before[index.target_start]) > 0


def anchor_frames(anchor: Anchor, frames: int) -> tuple[int, ...]:
    """The frames of a clip that may be its anchor."""
    return {"first": (0,), "middle": (frames // 2,), "last": (frames - 1,), "ends": (0, frames - 1)}[anchor]


def clips_end_to_end(index: Index, starts: np.ndarray, frames: int, step: int) -> np.ndarray:
    """Choose clips so that no two of them share a slice, from the first slice of a volume on.

    Args:
        index: Of the shards.
        starts: (N,) bool, at which samples a clip may begin.
        frames: Slices in a clip.
        step: From one slice of a clip to the next.

    Returns:
        (M,) positions at which the chosen clips begin.
    """
    taken, chosen = np.zeros(len(index), bool), []
    begins = np.ones(len(index), bool)
    begins[index.following[index.following >= 0]] = False
    for position in np.flatnonzero(begins).tolist():
        while position >= 0:  # along the volume, in whatever order its samples lie
            if starts[position]:
                places = clip(index, position, frames, step)
                if not taken[places].any():
                    taken[places] = True
                    chosen.append(position)
            position = int(index.following[position])
    return np.array(chosen, dtype=np.int64)


def longest_volume(index: Index) -> int:
    """Return the most neighbouring slices in a row that any volume has; 1 without neighbours."""
    place, length = np.arange(len(index)), 0
    while len(place) and length < len(index):
        place, length = index.following[place], length + 1
        place = place[place >= 0]
    return length


def clip_starts(index: Index, frames: int, step: int, anchor: Anchor = "first") -> np.ndarray:
    """Return at which samples a whole clip begins, with a target to follow in its anchor: (N,) bool.

    Raises:
        UserError: The index does not tell neighbours.
    """
    if index.is_old:
        raise UserError(f"{index.folder}: its index does not tell neighbours: run `data-shards index {index.folder}`")
    place, fits = np.arange(len(index)), np.ones(len(index), bool)
    shows, followed = with_target(index, "semantic"), np.zeros(len(index), bool)
    anchors = {frame * step for frame in anchor_frames(anchor, frames)}
    for number in range((frames - 1) * step + 1):
        if number:
            place = index.following[place]
            fits &= (place >= 0) & (index.volume[place] == index.volume) & (index.patient[place] == index.patient)
        if number in anchors:
            followed |= shows[place]
    return fits & followed
