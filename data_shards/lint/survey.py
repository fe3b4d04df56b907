"""A whole corpus as the checks see it: the columns of its indices and the rows that were kept of its samples.

Shapes: N samples that were looked at, over all splits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from data_shards.dataset import ShardDataset
from data_shards.errors import counted
from data_shards.index import Index
from data_shards.lint.findings import Finding, Place


@dataclass(frozen=True)
class Part:
    """A split.

    Attributes:
        name: Its name.
        dataset: Its samples.
        numbers: (n,) int64, the samples that could be read, of those that were looked at.
    """

    name: str
    dataset: ShardDataset
    numbers: np.ndarray

    @property
    def index(self) -> Index:
        """The index of the split."""
        return self.dataset.index

    def terms_in_samples(self) -> np.ndarray:
        """Return in how many samples each term of the index has a target: (number of terms,)."""
        index = self.index
        owner = np.repeat(np.arange(len(index)), np.diff(index.target_start))
        pairs = np.unique(owner * len(index.terms) + index.target_term) if len(owner) else np.zeros(0, np.int64)
        return np.bincount(pairs % max(1, len(index.terms)), minlength=len(index.terms))


@dataclass(frozen=True)
class Hit:
    """What a check of the corpus says.

    Attributes:
        message: What is wrong and what to do.
        row: Number of the sample among the N, or −1.
        split: The split, where no sample is named; empty for the corpus.
        term: The term, if any.
        value: What was measured, if it is a number.
        other: Number of another sample among the N, or −1.
    """

    message: str
    row: int = -1
    split: str = ""
    term: str = ""
    value: float | None = None
    other: int = -1


@dataclass(frozen=True)
class Corpus:
    """All splits.

    Attributes:
        parts: The splits whose index can be read.
        rows: (N,) of type `ROW`, what was kept of each sample, split after split.
        leaks_by_design: Whether the manifest says that every patient is in every split.
        remarks: What a check did not look at, one sentence each; checks add to it.
    """

    parts: list[Part]
    rows: np.ndarray
    leaks_by_design: bool = False
    remarks: list[str] = field(default_factory=list)

    @cached_property
    def split(self) -> np.ndarray:
        """Number of the part of each sample (N,)."""
        return np.repeat(np.arange(len(self.parts)), [len(part.numbers) for part in self.parts])

    def column(self, name: str) -> np.ndarray:
        """Return a column of the indices (N,)."""
        return np.concatenate([getattr(part.index, name)[part.numbers] for part in self.parts])

    @cached_property
    def kind(self) -> np.ndarray:
        """Number (N,) of data set, modality and kind of slice together: what should be alike."""
        return _numbered(self.dataset, self._named("modality", "modalities")[0], self.rows["axis"])

    @cached_property
    def dataset(self) -> np.ndarray:
        """Number of the data set (N,), over all splits."""
        return self._named("dataset", "datasets")[0]

    @cached_property
    def patient(self) -> np.ndarray:
        """Number of the patient (N,), over all splits; −1 where none is named."""
        numbers, known = self._named("patient", "patients")
        return np.where(known, _numbered(self.dataset, numbers), -1)

    @cached_property
    def volume(self) -> np.ndarray:
        """Number of the volume (N,), over all splits; a sample without one stands for itself."""
        numbers, known = self._named("volume", "volumes")
        alone = np.arange(len(numbers)) + 1 + numbers.max(initial=0)
        return _numbered(self.dataset, np.where(known, numbers, alone), self.rows["axis"])

    def _named(self, column: str, table: str) -> tuple[np.ndarray, np.ndarray]:
        """Number a column over all splits by the names that it points to; and say which names are not empty."""
        tables = [getattr(part.index, table) for part in self.parts]
        names, numbers = np.unique(np.concatenate(tables), return_inverse=True)
        starts = np.cumsum([0, *(len(names) for names in tables)])[self.split]
        result = numbers[starts + self.column(column)].astype(np.int64)
        return result, (names != "")[result]

    def place(self, row: int) -> Place:
        """Return where a sample is."""
        part = self.parts[self.split[row]]
        number = int(part.numbers[row - np.searchsorted(self.split, self.split[row])])
        return Place(part.name, part.index.key(number), number)

    def name(self, row: int, table: str, column: str) -> str:
        """Return the name that a column of the index has for a sample, as ``name(row, "modalities", "modality")``."""
        index = self.parts[self.split[row]].index
        return str(getattr(index, table)[getattr(index, column)[self.place(row).number]])

    def finding(self, check: Any, hit: Hit) -> Finding:
        """Return a hit of a check as a finding."""
        where: dict[str, Any] = {"split": hit.split}
        if hit.row >= 0:
            place = self.place(hit.row)
            where = {"split": place.split, "key": place.key, "number": place.number}
        other = self.place(hit.other) if hit.other >= 0 else None
        value = None if hit.value is None else float(hit.value)
        finding: Finding = check.finding(hit.message, term=hit.term, value=value, other=other, **where)
        return finding


def _numbered(*columns: np.ndarray) -> np.ndarray:
    """Number the different combinations of columns (N,) of whole numbers."""
    result = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        _, numbers = np.unique(column, return_inverse=True)
        result = result * (int(numbers.max(initial=0)) + 1) + numbers
        _, result = np.unique(result, return_inverse=True)
    return result.astype(np.int64)


def groups(numbers: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the positions (n,) of each different number of (N,), in the order of the numbers; −1 is none."""
    order = np.argsort(numbers, kind="stable")
    order = order[numbers[order] >= 0]
    if len(order):
        yield from np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)


def first_of(numbers: np.ndarray) -> np.ndarray:
    """Return the position (N,) at which each of the numbers (N,) occurs first; −1 is no number: its own."""
    _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    return np.where(numbers >= 0, first[inverse], np.arange(len(numbers)))


def more(count: int) -> str:
    """Return `` (and 3 more slices of its volume)``, or nothing for none."""
    return f" (and {counted(count, 'more slice')} of its volume)" if count else ""


def by_volume(corpus: Corpus, chosen: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the first of the chosen samples of each volume and split, and how many more of it are chosen.

    Args:
        corpus: The corpus.
        chosen: (N,) bool.
    """
    rows = np.flatnonzero(chosen)
    if rows.size:
        for members in groups(_numbered(corpus.split[rows], corpus.volume[rows])):
            yield int(rows[members[0]]), len(members) - 1
