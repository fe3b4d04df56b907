"""The build recipe of a corpus: which files hold which targets of whom, and how they become samples.

The dataclasses below are the schema of the YAML: every key is a field, documented beside it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_shards import vocabulary
from data_shards.errors import UserError
from data_shards.preprocessing import AnyIntensity, Axis, Native
from data_shards.schema import from_mapping, load_yaml
from data_shards.splits import AnySplit, ByPatient


@dataclass(frozen=True)
class Case:
    """One image with its mask; or, where `image` holds ``{id}``, every case whose image's path fits."""

    image: str
    """Path of the image volume, relative to the root; ``package://NAME/FILE`` is a file of an installed package."""
    mask: str
    """Path of the label volume; with ``{id}`` in `image`, it holds ``{id}`` too. May be the same file (npz)."""
    patient: str
    """The patient's identifier. With ``{id}`` in `image`: a template (``"{id}"``), or a regular expression whose
    first group finds it in the id (``"^(P[0-9]+)_"``)."""
    id: str | None = None
    """The case's identifier, unique; by default the image's path as written, or what ``{id}`` stood for."""
    split: str | None = None
    """The split, if the spec's split kind is ``explicit``."""


@dataclass(frozen=True)
class TargetSpec:
    """What is to be segmented and where the mask says so; exactly one of `value`, `values` and `above`."""

    term: str
    """Clinical text, such as ``left kidney``."""
    synonyms: list[str] = field(default_factory=list)
    """Other names of the same thing."""
    value: int | None = None
    """The mask's value inside the target."""
    values: list[int] | None = None
    """The mask's values that together are the target."""
    above: float | None = None
    """The target is where the mask is above this number, as in a probability map."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "term", vocabulary.normalise(self.term))
        object.__setattr__(self, "synonyms", list(vocabulary.synonyms(self.term, self.synonyms)))
        given = [name for name in ("value", "values", "above") if getattr(self, name) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise UserError(f"term '{self.term}' needs exactly one of value, values and above, got {got}")
        if self.values == [] or 0 in self.labels():
            raise UserError(f"term '{self.term}': list its mask values; 0 is background")

    def labels(self) -> list[int]:
        """Return the mask's values inside the target; empty if it is defined by `above`."""
        return [self.value] if self.value is not None else list(self.values or [])


@dataclass(frozen=True)
class Slices:
    """Which slices of a volume become samples."""

    axis: Axis = "axial"
    """Anatomical plane."""
    start: int = 0
    """First slice, as an index along the axis of the volume in LPS order."""
    stop: int | None = None
    """End of the slices, itself left out; null goes on to the last one."""
    step: int = 1
    """1 takes every slice, 2 every second one."""
    min_area: int = 1
    """Pixels; a smaller target is dropped, and its term does not count as looked for in that slice."""
    keep: Literal["nonempty", "all"] = "nonempty"
    """``nonempty`` keeps the slices with a target, ``all`` those without one too, as negatives."""

    def __post_init__(self) -> None:
        if self.start < 0 or self.step < 1 or self.min_area < 1:
            raise UserError("start must be at least 0, step and min_area at least 1")
        if self.stop is not None and self.stop <= self.start:
            raise UserError(f"stop ({self.stop}) must be above start ({self.start})")


@dataclass(frozen=True)
class Shards:
    """How large a shard may grow."""

    max_samples: int = 10_000
    """Samples in a shard."""
    max_bytes: int = 256 * 2**20
    """Bytes in a shard, tar headers included; a single larger sample has a shard to itself."""

    def __post_init__(self) -> None:
        if self.max_samples < 1 or self.max_bytes < 1:
            raise UserError("max_samples and max_bytes must be at least 1")


@dataclass(frozen=True)
class Spec:
    """The recipe of one corpus.

    Identifiers of patients and cases, and the paths of their files, reach neither a shard nor the manifest: they are
    replaced by a keyed hash. Whoever knows the key can test a guess, so where identifiers can be guessed (numbers,
    names, dates) give a private `salt`, best through `salt_env`, and keep it.
    """

    dataset: str
    """Name of the data set: letters, digits, ``-`` and ``_``."""
    modality: str
    """``CT``, ``MR``, ``PET``, ``US``, …"""
    cases: list[Case]
    """The files."""
    targets: list[TargetSpec]
    """What is to be segmented. Every term listed was looked for in every slice of every case."""
    root: str | None = None
    """Folder of the relative paths, itself relative to this file's folder, which is the default; ``--root`` wins."""
    reader: dict[str, str] = field(default_factory=dict)
    """Options of the format's reader, such as the ``image_key`` of npz files."""
    intensity: AnyIntensity = field(default_factory=Native)
    """How intensities become those stored: ``kind: window | percentiles | minmax | none``."""
    slices: Slices = field(default_factory=Slices)
    """Which slices become samples."""
    split: AnySplit = field(default_factory=ByPatient)
    """Which go into which split: ``kind: patients | explicit | slabs``."""
    shards: Shards = field(default_factory=Shards)
    """How large a shard may grow."""
    salt: str | None = None
    """Key of the hashes of identifiers; by default the data set's name. Never written anywhere."""
    salt_env: str | None = None
    """Name of the environment variable that holds the salt."""
    licence: str = ""
    """The licence of the data; goes into the manifest."""
    cite: str = ""
    """What to cite; goes into the manifest."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,47}", self.dataset):
            raise UserError(f"dataset '{self.dataset}': use at most 48 letters, digits, '-' and '_'")
        if not self.cases or not self.targets or not self.modality:
            raise UserError("cases, targets and modality must not be empty")
        terms = [target.term for target in self.targets]
        for term in terms:
            if terms.count(term) > 1:
                raise UserError(f"term '{term}' is listed twice: give one target several values instead")
        if self.salt is not None and self.salt_env is not None:
            raise UserError("salt and salt_env exclude each other")

    def record(self) -> dict[str, Any]:
        """Return what decides the samples, as JSON: without identifiers, paths and the salt."""
        private = {"cases", "root", "salt", "salt_env"}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in private}

    def sha256(self) -> str:
        """Return the hash of `record`."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()

    def hasher(self) -> Hasher:
        """Return the hash of identifiers.

        Raises:
            UserError: The environment variable of the salt is not set.
        """
        salt = self.salt or self.dataset
        if self.salt_env is not None:
            salt = os.environ.get(self.salt_env, "")
            if not salt:
                raise UserError(
                    f"salt_env: the environment variable {self.salt_env} is not set: export the private salt"
                )
        return Hasher(salt)


class Hasher:
    """Keyed BLAKE2b of identifiers: 16 hexadecimal digits."""

    def __init__(self, salt: str) -> None:
        self._key = hashlib.blake2b(salt.encode()).digest()

    def __call__(self, kind: str, identifier: str) -> str:
        """Return the hash of an identifier; kinds (``"patient"``, ``"volume"``) do not collide."""
        text = f"{kind}:{identifier}".encode()
        return hashlib.blake2b(text, key=self._key, digest_size=8).hexdigest()


def load_spec(path: str | Path) -> Spec:
    """Read a spec.

    Raises:
        UserError: The file is missing or wrong; one line with the file, the key and the nearest name.
    """
    path = Path(path)
    return from_mapping(Spec, load_yaml(path), str(path))
