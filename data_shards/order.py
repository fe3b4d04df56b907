"""The order of samples: a pure function of (seed, epoch), whatever the ranks, workers and interruptions."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np

from data_shards.errors import UserError, nearest
from data_shards.index import Index
from data_shards.seed import stream


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The one global order of an epoch: a permutation of ``range(count)``, int64.

    Args:
        count: Number of samples.
        seed: Seed of the run.
        epoch: Epoch, from 0.
    """
    return np.random.default_rng((seed, epoch)).permutation(count)


@dataclass(frozen=True)
class Sampling:
    """How often each group of samples is seen, where the plain order would drown the small ones.

    MedSAM's authors name the imbalance of modalities a limit of theirs (Ma et al. 2024, Discussion): most of their
    images are CT, MR and endoscopy. Within a group every sample is seen before any is seen again, over epochs too.

    Args:
        by: What makes a group: ``modality`` or ``dataset``.
        power: A group's share is proportional to its number of samples to this power: 1 is the plain order's, 0.5 the
            square root's, 0 the same share for each.
        weights: Shares by name instead, such as ``{CT: 1, MR: 2}``; every group must be named, 0 leaves one out.
        samples: Samples in an epoch; as many as there are if null.
    """

    by: Literal["modality", "dataset"] = "modality"
    power: float = 0.5
    weights: dict[str, float] | None = None
    samples: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.power <= 1:
            raise UserError(f"sampling.power is from 0 to 1, not {self.power}")
        if self.samples is not None and self.samples < 1:
            raise UserError(f"sampling.samples is 1 or more, not {self.samples}")
        for name, weight in (self.weights or {}).items():
            if not 0 <= weight < math.inf:
                raise UserError(f"sampling.weights: {name}: {weight} is no weight; 0 or more is needed")

    def shares(self, counts: Mapping[str, int]) -> dict[str, float]:
        """Return the share of each group in an epoch; they add up to 1.

        Args:
            counts: Number of samples of each group, above 0.

        Raises:
            UserError: The weights name a group that is not there, leave one unnamed, or are all 0.
        """
        if self.weights is None:
            raw = {name: count**self.power for name, count in counts.items()}
        else:
            for name in self.weights:
                if name not in counts:
                    raise UserError(f"sampling.weights: no {self.by} '{name}'{nearest(name, counts)}")
            for name in counts:
                if name not in self.weights:
                    raise UserError(f"sampling.weights: {self.by} '{name}' has none; 0 leaves it out")
            raw = {name: float(self.weights[name]) for name in counts}
        total = sum(raw.values())
        if not total:
            raise UserError("sampling.weights: all are 0: nothing would be seen")
        if total == math.inf:
            raise UserError("sampling.weights: they add up to infinity: give smaller ones")
        return {name: value / total for name, value in raw.items()}


@dataclass(frozen=True)
class EpochOrder:
    """What an epoch holds, and in which order.

    Attributes:
        count: Samples in an epoch.
        positions: Positions of the samples that take part, or None for the first `count` samples of a corpus.
        groups: Positions of the samples of each group, where some are seen more often than others.
        quotas: Samples of each group in an epoch; they add up to `count`.
        name: What it was made of; a resumed run needs the same.
    """

    count: int
    positions: np.ndarray | None = None
    groups: tuple[np.ndarray, ...] = ()
    quotas: tuple[int, ...] = ()
    name: str = field(default="")

    def __len__(self) -> int:
        return self.count

    def __call__(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return positions (count,) int64, and how often each was there before in this epoch (count,) int64."""
        order = epoch_order(self.count, seed, epoch)
        if not self.groups:
            return order if self.positions is None else self.positions[order], np.zeros(self.count, np.int64)
        parts = [
            _turns(group, quota, number, seed, epoch)
            for number, (group, quota) in enumerate(zip(self.groups, self.quotas, strict=True))
        ]
        positions = np.concatenate([part for part, _ in parts])
        repeats = np.concatenate([part for _, part in parts])
        return positions[order], repeats[order]


def make_order(
    index: Index, eligible: np.ndarray | None = None, sampling: Sampling | None = None, batch: int = 1
) -> EpochOrder:
    """Return the order over the samples of an index.

    Args:
        index: The index.
        eligible: (N,) bool, the samples that take part; all if null.
        sampling: How often each group is seen; each sample once if null.
        batch: A weighted epoch is cut to a multiple of it: samples that were drawn and not used would count as seen.

    Raises:
        UserError: The sampling does not fit the data.
    """
    positions = np.arange(len(index)) if eligible is None else np.flatnonzero(eligible)
    name = "" if eligible is None else hashlib.sha256(np.packbits(eligible).tobytes()).hexdigest()[:16]
    if sampling is None:
        return EpochOrder(len(positions), None if eligible is None else positions, name=name)
    if sampling.by == "dataset" and index.is_old:
        raise UserError(f"{index.folder}: its index does not tell data sets: run `data-shards index {index.folder}`")
    numbers, table = (
        (index.modality, index.modalities) if sampling.by == "modality" else (index.dataset, index.datasets)
    )
    mine = numbers[positions]
    groups = {str(table[number]): positions[mine == number] for number in np.unique(mine)}
    shares = sampling.shares({group: len(places) for group, places in groups.items()})
    count = (len(positions) if sampling.samples is None else sampling.samples) // batch * batch
    quotas = _rounded([shares[group] * count for group in groups], count)
    name += json.dumps({**asdict(sampling), "batch": batch}, sort_keys=True)
    return EpochOrder(count, positions, tuple(groups.values()), tuple(quotas), name)


def _rounded(parts: list[float], total: int) -> list[int]:
    """Round parts so that they add up, the largest remainders up."""
    result = [math.floor(part) for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda number: result[number] - parts[number])
    for number in by_remainder[: total - sum(result)]:
        result[number] += 1
    return result


def _turns(group: np.ndarray, quota: int, number: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the samples of one group in an epoch, and how often each was there before.

    A group is gone through in turns, each a permutation of all of it; epochs cut the turns where their quotas end.
    """
    start, stop = epoch * quota, (epoch + 1) * quota
    first, last = start // len(group), -(-stop // len(group))
    turns = [group[stream(seed, "sampling", number, turn).permutation(len(group))] for turn in range(first, last)]
    offset = start - first * len(group)
    positions = np.concatenate([*turns, group[:0]])[offset : offset + quota]
    # The first turn may have shown a part of the group in the epoch before: count what this epoch itself shows.
    order = np.argsort(positions, kind="stable")
    ordered = positions[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])) if quota else np.zeros(0, np.int64)
    lengths = np.diff(np.append(starts, quota))
    repeats = np.empty(quota, np.int64)
    repeats[order] = np.arange(quota) - np.repeat(starts, lengths)
    return positions, repeats
