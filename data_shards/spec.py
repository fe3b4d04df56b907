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
from data_shards.errors import UserError, nearest
from data_shards.preprocessing import AnyIntensity, Axis, Native
from data_shards.schema import from_mapping, load_yaml
from data_shards.splits import AnySplit, ByPatient


@dataclass(frozen=True)
class Case:
    """One image with its mask; or, where `image` holds ``{id}`` or other placeholders, every case whose path fits."""

    image: str
    """Path of the image, relative to the root: a file, or a folder with a DICOM series. ``package://NAME/FILE`` is a
    file of an installed package. A placeholder, ``{id}`` or ``{any_word}``, stands for any text without ``/``."""
    mask: str | dict[str, str]
    """Path of what was drawn on it, with the image's placeholders; may be the same file (npz), or one file for all
    images (COCO). ``*`` takes several files together, as with one file an instance. Several masks have names:
    ``{lesion: "gt/{id}_l.png", vessel: "gt/{id}_v.png"}``; targets of a name that a case lacks are unlabelled in it."""
    patient: str | None = None
    """The patient's identifier; null where nobody is known, which splits by image and says so. With placeholders: a
    template (``"{id}"``), or a regular expression whose first group finds it in the id (``"^(P[0-9]+)_"``), or one for
    all (``"=P1"``). ``dicom`` takes it from the header of a DICOM image."""
    id: str | None = None
    """The case's identifier, unique; by default the image's path as written, or what the placeholders stood for."""
    only: str | None = None
    """A regular expression that an id must contain, where the pattern would fit too many files."""
    split: str | None = None
    """The split, if the spec's split kind is ``explicit``."""
    looked_for: list[str] | None = None
    """The terms that were looked for in these cases, where the data set is labelled in part; null means all."""
    no_mask: Literal["error", "empty", "skip"] = "error"
    """What a missing mask file means: a mistake, an image in which nothing was found, or a case to leave out."""
    no_target: Literal["error", "empty", "skip"] | None = None
    """What a mask without any of the targets means: the same three. By default a mistake; but nothing was found in a
    picture, and in a volume whose slices are all kept (``slices: {keep: all}``)."""

    def __post_init__(self) -> None:
        if self.looked_for == []:
            raise UserError("looked_for is empty: list the terms, or leave it out where all were looked for")
        if self.mask == {}:
            raise UserError("mask names no file")


@dataclass(frozen=True)
class TargetSpec:
    """What is to be segmented and where it is drawn: which layer of the mask, and which of its values.

    A layer is a segment of a DICOM SEG, a region of an RTSTRUCT, an annotation of a COCO file, or a whole mask file.
    """

    term: str
    """Clinical text, such as ``left kidney``; a synonym that the vocabulary knows becomes its one canonical term."""
    synonyms: list[str] = field(default_factory=list)
    """Other names of the same thing; those of the vocabulary come by themselves."""
    mask: str | None = None
    """Which of the case's masks, where they have names."""
    name: str | None = None
    """Which layers, by their name: ``GTV*`` takes all whose name starts so; upper and lower case are one."""
    number: int | None = None
    """Which layers, by their number: of a segment, region, category or channel."""
    value: int | None = None
    """The mask's value inside the target; by default everything but 0."""
    values: list[int] | None = None
    """The mask's values that together are the target."""
    above: float | None = None
    """The target is where the mask is above this number, as in a probability map or a lossy picture."""
    below: float | None = None
    """The target is where the mask is below this number, as in an inverted picture."""
    colour: list[int] | None = None
    """The mask's colour (red, green, blue) inside the target."""
    tolerance: int = 0
    """How far each channel may lie from `colour`, as in lossy pictures."""
    instances: Literal["none", "layers", "values", "components"] = "none"
    """What is one instance: nothing, each layer, each value of a label map (or colour of a picture), or each connected
    piece of a slice."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "term", vocabulary.canonical(self.term))
        object.__setattr__(self, "synonyms", list(vocabulary.synonyms(self.term, self.synonyms)))
        given = [name for name in _PIXEL_RULES if getattr(self, name) is not None]
        where = [name for name in ("mask", "name", "number") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"term '{self.term}' needs one of {', '.join(_PIXEL_RULES)}, got {' and '.join(given)}")
        if not given and not where and self.instances == "none":
            raise UserError(f"term '{self.term}' does not say where it is: give it a value, above, colour or a name")
        if self.values == [] or 0 in self.labels():
            raise UserError(f"term '{self.term}': list its mask values; 0 is background (or say below: 0.5)")
        if self.instances == "values" and given:
            raise UserError(f"term '{self.term}': instances: values takes every value but 0: drop '{given[0]}'")
        if not 0 <= self.tolerance <= 255 or (self.tolerance and self.colour is None):
            raise UserError(f"term '{self.term}': tolerance goes with a colour, from 0 to 255, got {self.tolerance}")
        if self.colour is not None and (len(self.colour) != 3 or not all(0 <= part <= 255 for part in self.colour)):
            raise UserError(f"term '{self.term}': colour needs red, green and blue, each 0 to 255, got {self.colour}")

    def labels(self) -> list[int]:
        """Return the mask's values inside the target; empty if it is defined in another way."""
        return [self.value] if self.value is not None else list(self.values or [])

    def has_rule(self) -> bool:
        """Whether a value, a threshold or a colour says which pixels are inside."""
        return any(getattr(self, name) is not None for name in _PIXEL_RULES)

    def takes_background(self) -> bool:
        """Whether 0 is inside the target, which is what a mask holds where nothing was drawn."""
        black = self.colour is not None and max(self.colour) <= self.tolerance
        return black or (self.above is not None and self.above < 0) or (self.below is not None and self.below > 0)


_PIXEL_RULES = ("value", "values", "above", "below", "colour")


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
    min_voxels: int = 1
    """Voxels of a target in the whole volume; a smaller one is dropped from all its slices, and is not looked for
    there."""
    border: Literal["keep", "drop"] = "keep"
    """``drop`` leaves out targets that touch the edge of the image: they may be incomplete."""
    keep: Literal["nonempty", "all"] = "nonempty"
    """``nonempty`` keeps the slices with a target, ``all`` those without one too, as negatives."""

    def __post_init__(self) -> None:
        if self.start < 0 or min(self.step, self.min_area, self.min_voxels) < 1:
            raise UserError("start must be at least 0; step, min_area and min_voxels at least 1")
        if self.stop is not None and self.stop <= self.start:
            raise UserError(f"stop ({self.stop}) must be above start ({self.start})")


@dataclass(frozen=True)
class Patches:
    """Windows that slide over images too large to be one sample, as whole slides are."""

    size: int = 1024
    """Side of a window in pixels; one at the right or lower edge moves inwards, and is never padded."""
    stride: int | None = None
    """Distance between windows in pixels; null is the size: they do not overlap."""

    def __post_init__(self) -> None:
        if self.size < 1 or (self.stride is not None and not 1 <= self.stride <= self.size):
            raise UserError(f"size must be at least 1 and stride from 1 to size, got {self.size} and {self.stride}")


@dataclass(frozen=True)
class Expected:
    """What the publishers say that a data set holds."""

    images: int
    """Images (slices of volumes)."""
    masks: int | None = None
    """Annotated masks, or null where it is not published."""


@dataclass(frozen=True)
class Shards:
    """How large a shard may grow, and how images lie in it. All are lossless."""

    max_samples: int = 10_000
    """Samples in a shard."""
    max_bytes: int = 256 * 2**20
    """Bytes in a shard, tar headers included; a single larger sample has a shard to itself."""
    codec: Literal["png", "zstd"] = "png"
    """``png`` is read by everything; ``zstd`` (npy, compressed) is larger and is read several times faster."""

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
    reader: dict[str, Any] = field(default_factory=dict)
    """Options of the format's reader, such as the ``image_key`` of npz files."""
    intensity: AnyIntensity = field(default_factory=Native)
    """How intensities become those stored: ``kind: window | percentiles | minmax | rgb | none``."""
    slices: Slices = field(default_factory=Slices)
    """Which slices become samples."""
    patches: Patches | None = None
    """Windows over large images; null takes images whole."""
    split: AnySplit = field(default_factory=ByPatient)
    """Which go into which split: ``kind: patients | medsam | medical_sam3 | explicit | slabs | external``."""
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
    title: str = ""
    """The data set's name as its publishers write it."""
    homepage: str = ""
    """Where the files come from."""
    papers: list[str] = field(default_factory=list)
    """Which published systems trained on it (``Medical SAM3``) or tested on it (``Medical SAM3, external``)."""
    expected: Expected | None = None
    """What the publishers say that it holds."""
    verified: bool = False
    """Whether this spec was run on the data set's real files."""
    notes: str = ""
    """What a user should know: how to arrange the files, what is doubtful."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,47}", self.dataset):
            raise UserError(f"dataset '{self.dataset}': use at most 48 letters, digits, '-' and '_'")
        if not self.cases or not self.targets or not self.modality:
            raise UserError("cases, targets and modality must not be empty")
        terms = [target.term for target in self.targets]
        for term in terms:
            if terms.count(term) > 1:
                raise UserError(f"term '{term}' is listed twice: give one target several values instead")
        for case in self.cases:
            for term in case.looked_for or []:
                if vocabulary.canonical(term) not in terms:
                    raise UserError(f"looked_for: no target '{term}'{nearest(term, terms)}")
        if self.salt == "" or self.salt_env == "":
            raise UserError("the salt is empty: it would be no secret")
        if self.salt is not None and self.salt_env is not None:
            raise UserError("salt and salt_env exclude each other")

    def record(self) -> dict[str, Any]:
        """Return what decides the samples, as JSON: without identifiers, paths and the salt."""
        private = {"cases", "root", "salt", "salt_env", *_ABOUT}
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


_ABOUT = ("title", "homepage", "papers", "expected", "verified", "notes")
"""Keys for readers of the spec: they decide no sample."""


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
