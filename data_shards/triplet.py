"""The sample: one image, its targets (mask, text, box) and where it came from.

Shapes: H, W are the image's native height and width in pixels.

In a shard a triplet is two members that share a key, readable by `webdataset` itself: ``KEY.json``, and
``KEY.image.png`` (8- or 16-bit grey, 8-bit RGB), ``KEY.image.npy`` (any other dtype) or ``KEY.image.npy.zst``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from data_shards.codecs import IMAGE_EXTENSIONS, Codec, decode_image, encode_image
from data_shards.errors import UserError
from data_shards.runs import fill, runs_of
from data_shards.strict import is_count, is_key, is_length, is_text, is_tuple, read_json, show

FORMAT_VERSION = 1
"""Raised whenever a stored triplet changes its meaning."""

MAX_RECORD = 64 * 2**20
"""Bytes of the largest JSON member that is stored or read."""

KINDS = ("semantic", "instance")
"""What a target can be; its number is its place here."""

SPLIT_UNITS = ("patient", "series", "image")
"""What the splits of a corpus can have kept together."""


@dataclass(frozen=True)
class Target:
    """One thing to segment in one image.

    Attributes:
        term: Clinical text, such as ``"left kidney"``.
        size: Mask height and width (H, W) in pixels.
        counts: COCO run-length encoding of the mask, compressed, as ASCII text.
        box: Tight box (x0, y0, x1, y1) in pixels; the indices of the outermost mask pixels, both ends included,
            as in MedSAM's training code.
        area: Number of mask pixels.
        synonyms: Other names of the same thing.
        kind: ``"semantic"`` (all of the term in this image) or ``"instance"`` (one of several).
    """

    term: str
    size: tuple[int, int]
    counts: str
    box: tuple[int, int, int, int]
    area: int
    synonyms: tuple[str, ...] = ()
    kind: str = "semantic"

    @classmethod
    def from_mask(cls, mask: np.ndarray, term: str, synonyms: tuple[str, ...] = (), kind: str = "semantic") -> Target:
        """Encode a mask (H, W), nonzero inside.

        Raises:
            UserError: The mask is empty.
        """
        inside = np.asarray(mask) != 0
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        if rows.size == 0:
            raise UserError(f"the mask of '{term}' is empty: a target needs at least one pixel")
        rle = coco_mask.encode(np.asfortranarray(inside, dtype=np.uint8))
        height, width = inside.shape
        return cls(
            term=term,
            size=(height, width),
            counts=rle["counts"].decode("ascii"),
            box=(int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])),
            area=int(inside.sum()),
            synonyms=tuple(synonyms),
            kind=kind,
        )

    def mask(self) -> np.ndarray:
        """Decode the mask: (H, W) uint8, 1 inside.

        Raises:
            UserError: The run lengths are damaged.
        """
        return fill(self._runs(), self.size)

    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """Return where the pixels inside begin and end: (R,), (R,) int64, counted down the columns, ends left out.

        Raises:
            UserError: The run lengths are damaged.
        """
        runs = self._runs()
        stops = np.cumsum(runs)
        inside = np.flatnonzero(runs[1::2]) * 2 + 1  # outside, inside, outside, …
        return stops[inside - 1], stops[inside]

    def measure(self) -> tuple[tuple[int, int, int, int] | None, int]:
        """Return the tight box, None for an empty mask, and the area, from the run lengths alone.

        Raises:
            UserError: The run lengths are damaged.
        """
        starts, stops = self.spans()
        if not starts.size:
            return None, 0
        height, last = self.size[0], stops - 1
        top, bottom = starts % height, last % height
        if (starts // height != last // height).any():  # one that goes on in the next column touches both edges
            top, bottom = np.array([0]), np.array([height - 1])
        box = (int(starts[0] // height), int(top.min()), int(last[-1] // height), int(bottom.max()))
        return box, int((stops - starts).sum())

    def _runs(self) -> np.ndarray:
        runs = runs_of(self.counts, self.size)
        if runs is None:
            height, width = self.size
            raise UserError(
                f"the mask of '{self.term}' is damaged: its run lengths do not fill {height} x {width} pixels"
            )
        return runs


@dataclass(frozen=True)
class Provenance:
    """Where an image came from. No path and no patient data: identifiers are hashes.

    Attributes:
        dataset: Name of the data set.
        patient: Hash of the patient's identifier.
        volume: Hash of the case's identifier.
        modality: ``"CT"``, ``"MR"``, …
        source_sha256: SHA-256 of the source image file.
        axis: Anatomical plane of the slice: ``"axial"``, ``"coronal"``, ``"sagittal"``, or ``""`` for a plain image.
        slice_index: Position of the slice along its axis, or None.
        spacing: Pixel spacing (row, column) in mm, or None.
        slice_spacing: Distance between slices in mm, or None.
        intensity: How source intensities became the stored ones; enough to repeat it.
        previous: Key of the neighbouring slice before this one, if it is stored in the same split.
        next: Key of the neighbouring slice after this one, if it is stored in the same split.
        patch: Upper left corner (y, x) of this window in its image, in pixels, or None for a whole image.
        split_unit: What the splits kept together: ``"patient"``, ``"series"`` or ``"image"``.
    """

    dataset: str
    patient: str
    volume: str
    modality: str
    source_sha256: str
    axis: str = ""
    slice_index: int | None = None
    spacing: tuple[float, float] | None = None
    slice_spacing: float | None = None
    intensity: Mapping[str, Any] = field(default_factory=dict)
    previous: str | None = None
    next: str | None = None
    patch: tuple[int, int] | None = None
    split_unit: str = "patient"


@dataclass(frozen=True)
class Triplet:
    """One image with its targets.

    Attributes:
        key: Unique name of the sample in its corpus; letters, digits, ``-`` and ``_``.
        image: (H, W) grey or (H, W, 3) RGB at native resolution and dtype.
        targets: What is to be segmented.
        looked_for: Every term that the annotators looked for: one without a target is a negative,
            a term not listed here is simply unlabelled.
        provenance: Where the image came from.
    """

    key: str
    image: np.ndarray
    targets: tuple[Target, ...]
    looked_for: tuple[str, ...]
    provenance: Provenance

    def encode(self, codec: Codec = "png") -> dict[str, bytes]:
        """Return the members of this sample in a tar, by extension.

        Args:
            codec: How the image is stored, losslessly: ``"png"`` (npy for dtypes that PNG does not hold) or ``"zstd"``,
                which is larger and several times faster to read.

        Raises:
            UserError: It could not be read back: a field is out of range, or it is too large.
        """
        record = {
            "version": FORMAT_VERSION,
            "targets": [asdict(target) for target in self.targets],
            "looked_for": list(self.looked_for),
            "provenance": asdict(self.provenance),
        }
        try:
            self.check()
            extension, image = encode_image(self.image, codec)
            text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
            data = text.encode()
            if len(data) > MAX_RECORD:
                raise UserError(f"its targets take {len(data)} bytes: cut the image into patches")
            return {extension: image, "json": data}
        except (UserError, ValueError) as error:
            raise UserError(f"sample '{self.key}' cannot be stored: {error}") from error

    @classmethod
    def decode(cls, key: str, members: Mapping[str, bytes]) -> Triplet:
        """Rebuild a triplet from its tar members, which may be damaged or hostile.

        Args:
            key: The sample's key.
            members: Bytes by extension, as from `encode`.

        Raises:
            UserError: A member is missing or damaged, or was written by a newer format.
        """
        try:
            if "json" not in members:
                raise UserError("it has no json")
            targets, looked_for, provenance = read_record(members["json"])
            extension = next((name for name in IMAGE_EXTENSIONS if name in members), None)
            if extension is None:
                raise UserError(f"it has no image: expected one of {', '.join(IMAGE_EXTENSIONS)}")
            triplet = cls(key, decode_image(extension, members[extension]), targets, looked_for, provenance)
            _check_sizes(triplet)
        except UserError as error:
            raise UserError(f"sample '{key}': {error}") from error
        return triplet

    def check(self) -> None:
        """Raise a `UserError` that names the field unless every field has its type and range."""
        if not is_key(self.key):
            raise UserError("its key must be printable ASCII, no absolute path and without '..'")
        for target in self.targets:
            _check_target(target)
        _check_terms(self.looked_for, "looked_for")
        _check_provenance(self.provenance)
        _check_sizes(self)


def read_record(data: bytes) -> tuple[tuple[Target, ...], tuple[str, ...], Provenance]:
    """Return the targets, the terms looked for and the provenance that a JSON member holds, all checked.

    Raises:
        UserError: It is damaged, or was written by a newer format; it does not name the sample.
    """
    try:
        record = read_json(data, MAX_RECORD)
    except UserError as error:
        raise UserError(f"its json is damaged: {error}") from error
    missing = {"version", "targets", "looked_for", "provenance"} - record.keys()
    if missing:
        raise UserError(f"its json lacks '{min(missing)}'")
    if not is_count(record["version"]):
        raise UserError(f"its format is {show(record['version'])}, which is no number")
    if record["version"] > FORMAT_VERSION:
        raise UserError(f"it has format {show(record['version'])}, newer than {FORMAT_VERSION}: update sam-trainer")
    if not isinstance(record["targets"], list):
        raise UserError("its targets are no list")
    targets = tuple(_from_record(Target, item, "target") for item in record["targets"])
    for target in targets:
        _check_target(target)
    looked_for = tuple(record["looked_for"]) if isinstance(record["looked_for"], list) else record["looked_for"]
    _check_terms(looked_for, "looked_for")
    provenance = _from_record(Provenance, record["provenance"], "provenance")
    _check_provenance(provenance)
    return targets, looked_for, provenance


def _from_record(cls: type, record: Any, what: str) -> Any:
    """Build a dataclass from JSON: lists become tuples, keys of a later minor version are ignored."""
    if not isinstance(record, dict):
        raise UserError(f"its {what} is no object")
    values = {}
    for item in fields(cls):
        if item.name in record:
            value = record[item.name]
            values[item.name] = tuple(value) if isinstance(value, list) else value
        elif item.default is item.default_factory is MISSING:
            raise UserError(f"its {what} lacks '{item.name}'")
    return cls(**values)


def _check_target(target: Target) -> None:
    place = f"its target {show(target.term)}"
    if not is_text(target.term) or not target.term:
        raise UserError(f"{place} has no term")
    if not (is_tuple(target.size, 2) and all(is_count(length) and length > 0 for length in target.size)):
        raise UserError(f"{place} has size {show(target.size)}; (H, W) is needed")
    height, width = target.size
    if not isinstance(target.counts, str):
        raise UserError(f"{place} has no run lengths")
    box = target.box
    if not (is_tuple(box, 4) and all(map(is_count, box)) and box[0] <= box[2] < width and box[1] <= box[3] < height):
        raise UserError(f"{place} has box {show(box)}; (x0, y0, x1, y1) inside of {height} x {width} pixels is needed")
    if not (is_count(target.area) and target.area <= height * width):
        raise UserError(f"{place} has area {show(target.area)}; 0 to {height * width} is needed")
    _check_terms(target.synonyms, f"{place}: synonyms")
    if target.kind not in KINDS:
        raise UserError(f"{place} has kind {show(target.kind)}; known: {', '.join(KINDS)}")


def _check_provenance(origin: Provenance) -> None:
    for name in ("dataset", "patient", "volume", "modality", "source_sha256", "axis"):
        if not is_text(getattr(origin, name)):
            raise _refused(name, getattr(origin, name))
    for name in ("previous", "next"):
        if not (getattr(origin, name) is None or is_key(getattr(origin, name))):
            raise _refused(name, getattr(origin, name))
    if not (origin.slice_index is None or is_count(origin.slice_index)):
        raise _refused("slice_index", origin.slice_index)
    if not (origin.patch is None or (is_tuple(origin.patch, 2) and all(map(is_count, origin.patch)))):
        raise _refused("patch", origin.patch)
    if not (origin.spacing is None or (is_tuple(origin.spacing, 2) and all(map(is_length, origin.spacing)))):
        raise _refused("spacing", origin.spacing)
    if not (origin.slice_spacing is None or is_length(origin.slice_spacing)):
        raise _refused("slice_spacing", origin.slice_spacing)
    if origin.split_unit not in SPLIT_UNITS:
        raise _refused("split_unit", origin.split_unit)
    if not isinstance(origin.intensity, Mapping):
        raise _refused("intensity", origin.intensity)
    try:
        json.dumps(dict(origin.intensity), allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, TypeError):  # infinite, or text that is no UTF-8
        raise _refused("intensity", origin.intensity) from None


def _check_sizes(triplet: Triplet) -> None:
    for target in triplet.targets:
        if target.size != triplet.image.shape[:2]:
            raise UserError(f"the mask of '{target.term}' has size {target.size}, its image {triplet.image.shape[:2]}")


def _check_terms(terms: Any, what: str) -> None:
    if not (isinstance(terms, tuple) and all(is_text(term) and term for term in terms)):
        raise UserError(f"{what} must be a list of terms, got {show(terms)}")


def _refused(name: str, value: Any) -> UserError:
    return UserError(f"its provenance has the {name} {show(value)}")
