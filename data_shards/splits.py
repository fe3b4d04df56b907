"""Which slice of which case goes into which split.

A split is a small frozen dataclass; `Split.assign` turns the list of cases into one rule per case. Where no patient is
known, the case stands for one: a volume, or an image.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from data_shards.errors import UserError


@dataclass(frozen=True)
class SliceRule:
    """From the index of a slice along its axis to its split, or to None for a slice that belongs to no split.

    Attributes:
        splits: The splits that it can give, in the order in which they are shown.
        slabs: The slabs that decide; without them every slice goes to the one split.
    """

    splits: tuple[str, ...]
    slabs: Slabs | None = None

    def __call__(self, index: int) -> str | None:
        """Return the split of a slice."""
        return self.splits[0] if self.slabs is None else self.slabs.of(index)


EXTERNAL = "external"
"""How the name of a split begins that must never be trained on."""


class HasPatient(Protocol):
    """What a split needs to know of a case."""

    @property
    def id(self) -> str:
        """The case's identifier."""

    @property
    def patient(self) -> str:
        """The patient's identifier."""

    @property
    def split(self) -> str | None:
        """The split that the spec names, if any."""


class Split(ABC):
    """A way of dividing cases, or their slices, between splits."""

    kind: str
    shares_patients = False
    """Whether one patient is meant to be in several splits."""

    @abstractmethod
    def assign(self, cases: Sequence[HasPatient]) -> list[SliceRule]:
        """Return one rule per case, in the order of the cases."""

    @abstractmethod
    def split_names(self, cases: Sequence[HasPatient]) -> list[str]:
        """Return the names of the splits, in the order in which they are shown."""


def check_name(name: str) -> None:
    """Raise a `UserError` unless a split's name can be a folder's."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise UserError(f"'{name}' cannot name a split: use letters, digits, '-' and '_'")


def _refuse_declared(cases: Sequence[HasPatient], kind: str) -> None:
    for case in cases:
        if case.split is not None:
            raise UserError(
                f"case '{case.id}' names split '{case.split}' but the split is '{kind}': use kind: explicit"
            )


@dataclass(frozen=True)
class ByPatient(Split):
    """Whole patients, drawn by a seeded hash: the order of the cases does not matter."""

    fractions: dict[str, float] = field(default_factory=lambda: {"train": 0.8, "test": 0.2})
    """Share of the patients of each split; together 1."""
    seed: int = 0
    """Another seed is another draw."""
    kind: Literal["patients"] = "patients"

    def __post_init__(self) -> None:
        for name, share in self.fractions.items():
            check_name(name)
            if not share > 0:  # nor NaN
                raise UserError(f"the fraction of '{name}' must be above 0, got {share:g}")
        if abs(sum(self.fractions.values()) - 1) > 1e-6:
            raise UserError(f"the fractions must add up to 1, got {sum(self.fractions.values()):g}")

    def draw(self, patients: Sequence[str]) -> dict[str, str]:
        """Return the split of each patient: those of lowest seeded hash into the first split, and so on.

        Raises:
            UserError: There are too few patients for a split to get one.
        """
        ranked = sorted(set(patients), key=lambda patient: hashlib.sha256(f"{self.seed}:{patient}".encode()).digest())
        result: dict[str, str] = {}
        start, share = 0, 0.0
        for name, fraction in self.fractions.items():
            share += fraction
            stop = round(share * len(ranked))
            if stop == start:
                raise UserError(
                    f"split '{name}' gets none of the {len(ranked)} patients at a fraction of {fraction:g}: "
                    "raise it, or name each case's split with kind: explicit"
                )
            result.update(dict.fromkeys(ranked[start:stop], name))
            start = stop
        return result

    def assign(self, cases: Sequence[HasPatient]) -> list[SliceRule]:
        """Return the rule of each case: all slices of a patient go together."""
        _refuse_declared(cases, self.kind)
        drawn = self.draw([case.patient for case in cases])
        return [SliceRule((drawn[case.patient],)) for case in cases]

    def split_names(self, cases: Sequence[HasPatient]) -> list[str]:
        """Return the keys of the fractions."""
        return list(self.fractions)


@dataclass(frozen=True)
class LikeMedSAM(ByPatient):
    """80 % of the patients to train on, 10 % to validate and 10 % to test (MedSAM, Methods)."""

    fractions: dict[str, float] = field(default_factory=lambda: {"train": 0.8, "validation": 0.1, "test": 0.1})
    """Share of the patients of each split; together 1."""
    kind: Literal["medsam"] = "medsam"  # type: ignore[assignment]


@dataclass(frozen=True)
class LikeMedicalSAM3(ByPatient):
    """85 % of the patients to train on and 15 % to validate, with seed 42 (Medical SAM3, implementation details)."""

    fractions: dict[str, float] = field(default_factory=lambda: {"train": 0.85, "validation": 0.15})
    """Share of the patients of each split; together 1."""
    seed: int = 42
    """Another seed is another draw."""
    kind: Literal["medical_sam3"] = "medical_sam3"  # type: ignore[assignment]


@dataclass(frozen=True)
class Explicit(Split):
    """Each case names its split."""

    kind: Literal["explicit"] = "explicit"

    def assign(self, cases: Sequence[HasPatient]) -> list[SliceRule]:
        """Return the rule of each case.

        Raises:
            UserError: A case names no split.
        """
        for case in cases:
            if case.split is None:
                raise UserError(
                    f"case '{case.id}' names no split: give it 'split: train', or the spec another split kind"
                )
            check_name(case.split)
        return [SliceRule((str(case.split),)) for case in cases]

    def split_names(self, cases: Sequence[HasPatient]) -> list[str]:
        """Return the splits named, in the order of their first case."""
        return list(dict.fromkeys(str(case.split) for case in cases))


@dataclass(frozen=True)
class Slabs(Split):
    """Slabs of neighbouring slices that go to the splits in turn: for a demonstration on few volumes, not a benchmark.

    The last `guard` slices of every slab go nowhere, so that slices of different splits are more than `guard` apart.
    """

    start: int = 0
    """First slice of the first slab, as an index along the axis."""
    stop: int | None = None
    """End of the slabs, itself left out; null goes on to the last slice."""
    thickness: int = 12
    """Slices in a slab, its guard included."""
    guard: int = 2
    """Slices dropped where two slabs meet."""
    names: list[str] = field(default_factory=lambda: ["train", "test"])
    """The splits, taken in turn."""
    kind: Literal["slabs"] = "slabs"

    shares_patients = True

    def __post_init__(self) -> None:
        for name in self.names:
            check_name(name)
        if len(set(self.names)) < 2 or len(set(self.names)) < len(self.names):
            raise UserError(f"slabs need at least two different splits, got {', '.join(self.names)}")
        if self.guard < 0 or self.thickness <= self.guard:
            raise UserError(f"thickness ({self.thickness}) must be above guard ({self.guard}), and guard at least 0")
        if self.start < 0 or (self.stop is not None and self.stop <= self.start):
            raise UserError(f"start ({self.start}) must be at least 0 and below stop ({self.stop})")

    def of(self, index: int) -> str | None:
        """Return the split of one slice, or None for a guard or a slice out of range."""
        if index < self.start or (self.stop is not None and index >= self.stop):
            return None
        slab, offset = divmod(index - self.start, self.thickness)
        return self.names[slab % len(self.names)] if offset < self.thickness - self.guard else None

    def assign(self, cases: Sequence[HasPatient]) -> list[SliceRule]:
        """Return the same rule for every case."""
        _refuse_declared(cases, self.kind)
        return [SliceRule(tuple(self.names), self) for _ in cases]

    def split_names(self, cases: Sequence[HasPatient]) -> list[str]:
        """Return the splits."""
        return list(self.names)


@dataclass(frozen=True)
class External(Split):
    """Every case into one split that is never trained on: a test set of its own."""

    name: str = EXTERNAL
    """Name of the split; it starts with ``external``, by which training refuses it."""
    kind: Literal["external"] = "external"

    def __post_init__(self) -> None:
        check_name(self.name)
        if not self.name.startswith(EXTERNAL):
            raise UserError(f"the name of an external split starts with '{EXTERNAL}', got '{self.name}'")

    def assign(self, cases: Sequence[HasPatient]) -> list[SliceRule]:
        """Return the same rule for every case."""
        _refuse_declared(cases, self.kind)
        return [SliceRule((self.name,)) for _ in cases]

    def split_names(self, cases: Sequence[HasPatient]) -> list[str]:
        """Return the one split."""
        return [self.name]


AnySplit = ByPatient | LikeMedSAM | LikeMedicalSAM3 | Explicit | Slabs | External
