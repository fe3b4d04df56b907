"""The sample: one image, its targets (mask, text, box) and where it came from.

Shapes: H, W are the image's native height and width in pixels.

In a shard a triplet is two members that share a key, readable by `webdataset` itself:
``KEY.image.png`` (8- or 16-bit grey, 8-bit RGB) or ``KEY.image.npy`` (any other dtype), and ``KEY.json``.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from data_shards.errors import UserError

FORMAT_VERSION = 1
"""Raised whenever a stored triplet changes its meaning."""


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
        # pycocotools would fill what damaged run lengths leave open with whatever lies in memory, or crash.
        height, width = self.size
        runs = _unpack_runs(self.counts)
        if runs is None or runs.min() < 0 or int(runs.sum()) != height * width:
            raise UserError(
                f"the mask of '{self.term}' is damaged: its run lengths do not fill {height} x {width} pixels"
            )
        values = (np.arange(len(runs)) % 2).astype(np.uint8)  # outside, inside, outside, …
        return np.repeat(values, runs).reshape(width, height).T  # columns come one after another


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

    def encode(self) -> dict[str, bytes]:
        """Return the members of this sample in a tar, by extension."""
        extension = "image.png" if _fits_png(self.image) else "image.npy"
        record = {
            "version": FORMAT_VERSION,
            "targets": [asdict(target) for target in self.targets],
            "looked_for": list(self.looked_for),
            "provenance": asdict(self.provenance),
        }
        text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return {extension: _ENCODERS[extension](self.image), "json": text.encode()}

    @classmethod
    def decode(cls, key: str, members: Mapping[str, bytes]) -> Triplet:
        """Rebuild a triplet from its tar members.

        Args:
            key: The sample's key.
            members: Bytes by extension, as from `encode`.

        Raises:
            UserError: A member is missing or damaged, or was written by a newer format.
        """
        try:
            record = json.loads(members["json"])
            if record["version"] > FORMAT_VERSION:
                raise UserError(
                    f"sample '{key}' has format {record['version']}, newer than {FORMAT_VERSION}: update sam-trainer"
                )
            extension = next(name for name in _DECODERS if name in members)
            image = _DECODERS[extension](members[extension])
            if not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)) or image.size == 0:
                raise UserError(f"sample '{key}': its image has shape {image.shape}; (H, W) or (H, W, 3) is needed")
            return cls(
                key=key,
                image=image,
                targets=tuple(_from_record(Target, item) for item in record["targets"]),
                looked_for=tuple(record["looked_for"]),
                provenance=_from_record(Provenance, record["provenance"]),
            )
        except UserError:
            raise
        except StopIteration:
            raise UserError(f"sample '{key}' has no image: expected one of {', '.join(_DECODERS)}") from None
        except Exception as error:  # whatever damaged bytes make a decoder raise
            raise UserError(f"sample '{key}' cannot be decoded ({type(error).__name__}: {error})") from error


def _unpack_runs(counts: str) -> np.ndarray | None:
    """Read COCO's compressed run lengths: (R,) int64, or None where they cannot be read.

    A run is written in groups of 5 bits, lowest first, as a character from 48 on whose bit 32 says that another group
    follows; bit 16 of the last group is the sign. From the fourth run on, it is the difference to the last but one.
    """
    groups = np.frombuffer(counts.encode("ascii", "replace"), np.uint8).astype(np.int64) - 48
    if groups.size == 0 or groups.min() < 0 or groups.max() > 63 or groups[-1] & 32:
        return None
    ends = np.flatnonzero(groups & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 8:  # no image has as many pixels
        return None
    shifts = 5 * (np.arange(groups.size) - np.repeat(starts, lengths))
    runs = np.add.reduceat((groups & 31) << shifts, starts)
    runs -= (groups[ends] >> 4 & 1) << (5 * lengths)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def _from_record(cls: type, record: Mapping[str, Any]) -> Any:
    """Build a dataclass from JSON: lists become tuples, keys of a later minor version are ignored."""
    known = {item.name for item in fields(cls)}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}
    return cls(**{name: value for name, value in values.items() if name in known})


def _fits_png(image: np.ndarray) -> bool:
    if image.ndim == 3:
        return image.dtype == np.uint8 and image.shape[2] == 3
    return image.dtype in (np.uint8, np.uint16)


def _encode_png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def _decode_png(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data), formats=["PNG"])
    array = np.asarray(image)
    return array.astype(np.uint16) if image.mode.startswith("I") else array


def _encode_npy(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, image, allow_pickle=False)
    return buffer.getvalue()


def _decode_npy(data: bytes) -> np.ndarray:
    array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    return array


_ENCODERS: dict[str, Callable[[np.ndarray], bytes]] = {"image.png": _encode_png, "image.npy": _encode_npy}
_DECODERS: dict[str, Callable[[bytes], np.ndarray]] = {"image.png": _decode_png, "image.npy": _decode_npy}

IMAGE_EXTENSIONS = tuple(_DECODERS)
"""Extensions of the members that can be a sample's image."""
