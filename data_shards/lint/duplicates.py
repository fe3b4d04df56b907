"""Near duplicates over splits: copies that were packed again, resized, brightened or mirrored.

A search that looks at a few neighbours only, then thumbnails, then the images themselves: what merely looks alike, as
chests and brains of different patients do, is not reported. Shapes: N samples, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data_shards.errors import UserError
from data_shards.lint.findings import corpus_check
from data_shards.lint.leaks import copies
from data_shards.lint.likeness import correlations, distances, likeness, mirrored, turns
from data_shards.lint.survey import Corpus, Hit

_NEIGHBOURS = 8
"""Hashes before and after each, in each order, that it is compared with."""
_BITS = 72
"""Different bits of 256 up to which images may be copies; copies differ in some ten, strangers in a hundred."""
_THUMBNAILS = 0.85
"""Correlation of thumbnails from which images may be copies."""
_DETAIL = 0.75
"""Likeness from which they are. Measured on 17 sets of nine modalities: copies 0.75 to 1, strangers to 0.5."""
_TRIES = 4
"""Most likely originals of an image that are read and compared."""
_MOST = 100_000
"""Pairs that are read and compared, over all."""
_PART = 2**14
"""Queries at a time, for the sake of memory."""


class Pairs(NamedTuple):
    """Samples that may be copies: (P,) each.

    Attributes:
        row: The sample, of a later split.
        other: The one that it may be a copy of.
        mirror: Whether left and right may be exchanged.
        bits: Bits of the hashes that differ.
    """

    row: np.ndarray
    other: np.ndarray
    mirror: np.ndarray
    bits: np.ndarray


@corpus_check("near-duplicate", "warning", "Two splits have nearly the same image: resized, packed again or mirrored.")
def near_duplicate(corpus: Corpus) -> Iterator[Hit]:
    """Search, sift and compare; of the neighbours in a volume, only the one that is most like an image is its copy."""
    volume, same = corpus.volume, copies(corpus)
    exact = np.flatnonzero(corpus.split != corpus.split[same])
    taken = set(zip(volume[exact].tolist(), same[exact].tolist(), strict=True))
    done = set[int]()
    for alike, row, other, mirror in sorted(_compared(corpus), key=lambda item: (-item[0], *item[1:])):
        if row in done or (int(volume[row]), other) in taken:
            continue
        done.add(row)
        taken.add((int(volume[row]), other))
        place = corpus.place(other)
        how = "mirrored, it is nearly" if mirror else "nearly"
        message = f"{how} '{place.key}' in split '{place.split}' ({alike:.0%} alike): keep one of the two"
        yield Hit(message, row, value=alike, other=other)


def _compared(corpus: Corpus) -> Iterator[tuple[float, int, int, bool]]:
    """Yield (likeness, row, other, mirrored) of the images that are copies; of each, the most likely are read."""
    pairs = candidates(corpus)
    order = np.lexsort((pairs.mirror, pairs.other, pairs.bits, pairs.row))
    rows = pairs.row[order]
    # The place of a pair among those of its row.
    order = order[np.arange(len(rows)) - np.searchsorted(rows, rows) < _TRIES]
    if len(order) > _MOST:
        corpus.remarks.append(f"Of {len(order):,} pairs that look alike, {_MOST:,} were compared.")
    read = _Reader(corpus)
    for row, other, mirror in zip(*(column[order[:_MOST]].tolist() for column in pairs[:3]), strict=True):
        one, two = read(row), read(other)
        alike = likeness(one, two, mirror) if one is not None and two is not None else 0.0
        if alike >= _DETAIL:
            yield alike, row, other, mirror


def candidates(corpus: Corpus) -> Pairs:
    """Return the pairs of different splits and patients whose hashes and thumbnails are alike, copies left out."""
    copied = corpus.split != corpus.split[copies(corpus)]  # the same pixels are worse, and said elsewhere
    rows = np.flatnonzero(~corpus.rows["plain"])
    found = [_empty()]
    for number in range(1, len(corpus.parts)):
        split = corpus.split[rows]
        found += _search(corpus, rows[split < number], rows[(split == number) & ~copied[rows]])
    return Pairs(*(np.concatenate(columns) for columns in zip(*found, strict=True)))


def _search(corpus: Corpus, earlier: np.ndarray, later: np.ndarray) -> Iterator[Pairs]:
    """Yield what may be copies of earlier rows among later ones."""
    if not earlier.size or not later.size:
        return
    hashes = corpus.rows["hash"]
    known = hashes[earlier]
    orders = [(np.argsort(turn, kind="stable"), turn) for turn in turns(known)]
    sorted_turns = [(order, turn[order]) for order, turn in orders]
    for mirror in (False, True):
        for start in range(0, later.size, _PART):
            part = later[start : start + _PART]
            queries = mirrored(hashes[part]) if mirror else hashes[part]
            codes = [
                _neighbours(order, values, turn, queries, known)
                for (order, values), turn in zip(sorted_turns, turns(queries), strict=True)
            ]
            code = np.unique(np.concatenate(codes))
            query, place = np.divmod(code, earlier.size)
            bits = distances(queries[query], known[place])
            yield _sift(corpus, Pairs(part[query], earlier[place], np.full(code.size, mirror), bits))


def _neighbours(
    order: np.ndarray, values: np.ndarray, turn: np.ndarray, queries: np.ndarray, known: np.ndarray
) -> np.ndarray:
    """Return query × number of known + place, of the known hashes near each query in one order, if few bits differ."""
    at = np.searchsorted(values, turn)
    found = []
    for step in range(-_NEIGHBOURS, _NEIGHBOURS):
        there = np.flatnonzero((at + step >= 0) & (at + step < len(order)))
        places = order[at[there] + step]
        near = distances(queries[there], known[places]) <= _BITS
        found.append(there[near] * len(known) + places[near])
    return np.concatenate(found)


def _sift(corpus: Corpus, pairs: Pairs) -> Pairs:
    """Keep the pairs of different patients and volumes whose thumbnails are alike and whose pixels are not the same."""
    rows, patient = corpus.rows, corpus.patient
    row, other = pairs.row, pairs.other
    apart = (patient[row] != patient[other]) | (patient[row] < 0)
    apart &= corpus.volume[row] != corpus.volume[other]
    apart &= (rows["content"][row] != rows["content"][other]).any(axis=1)
    pairs = Pairs(*(column[apart] for column in pairs))
    alike = []
    for start in range(0, len(pairs.row), _PART):
        some, others = (rows["thumbnail"][column[start : start + _PART]] for column in (pairs.row, pairs.other))
        flips = pairs.mirror[start : start + _PART, None, None]
        alike.append(correlations(np.where(flips, some[:, :, ::-1], some), others) >= _THUMBNAILS)
    keep = np.concatenate([np.zeros(0, bool), *alike])
    return Pairs(*(column[keep] for column in pairs))


def _empty() -> Pairs:
    return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, bool), np.zeros(0, np.int64))


class _Reader:
    """Reads images again and keeps the last few: the copies of one image follow each other."""

    def __init__(self, corpus: Corpus, keep: int = 8) -> None:
        self._corpus, self._keep = corpus, keep
        self._images: dict[int, np.ndarray | None] = {}

    def __call__(self, row: int) -> np.ndarray | None:
        """Return an image; None if it can no longer be read."""
        if row not in self._images:
            if len(self._images) >= self._keep:
                self._images.pop(next(iter(self._images)))
            place = self._corpus.place(row)
            dataset = self._corpus.parts[self._corpus.split[row]].dataset
            try:
                self._images[row] = dataset[place.number].image
            except UserError:
                self._images[row] = None
        return self._images[row]
