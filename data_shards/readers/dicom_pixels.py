"""The pixels of DICOM files: decoding, colours, and from stored values to those of the modality.

Shapes: F frames of R rows and C columns.
"""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.errors import UserError
from data_shards.readers import dicom_decode
from data_shards.readers.base import Role
from data_shards.readers.dicom_files import most_bytes, number_in
from data_shards.readers.dicom_planes import group

if TYPE_CHECKING:
    from pydicom import Dataset

MEASURED = ("CT", "PT")
"""Modalities whose values are measurements: how a screen shows them, dark or bright, says nothing of the values."""


_SAFE = ("pydicom", "pillow")
"""Libraries that survive damaged files."""


class PixelDecoder:
    """Decodes pixels: what Python or Pillow can do here, everything else in a process of its own.

    Other libraries end the whole process when a compressed file is damaged.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> PixelDecoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def frames(self, dataset: Dataset, path: Path) -> tuple[np.ndarray, str]:
        """Return the stored values (F, R, C) or (F, R, C, samples) of a file, and their photometric interpretation.

        Raises:
            UserError: There are none, they are damaged, or no installed library decodes them.
        """
        if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            raise UserError(f"{path}: has no pixels, or ends before them: copy it again or leave it out")
        _check_size(dataset, path)
        array, colours = self._decode(dataset, path)
        samples = int(dataset.get("SamplesPerPixel") or 1)
        shape = (int(dataset.get("NumberOfFrames") or 1), int(dataset.Rows), int(dataset.Columns))
        return array.reshape(*shape, samples) if samples > 1 else array.reshape(shape), colours

    def _decode(self, dataset: Dataset, path: Path) -> tuple[np.ndarray, str]:
        from pydicom.pixels import get_decoder

        syntax = dataset.file_meta.TransferSyntaxUID
        try:
            decoder = get_decoder(syntax)
        except NotImplementedError:
            raise UserError(
                f"{path}: its pixels are compressed in a way that nothing here decodes ({syntax})"
            ) from None
        if not decoder.is_available:
            raise UserError(
                f"{path}: decoding '{syntax.name}' needs another package: pip install python-gdcm pylibjpeg"
            )
        if not syntax.is_encapsulated:
            try:
                return dicom_decode.decode(dataset)
            except ValueError:
                raise UserError(f"{path}: its pixels do not fit its header: copy it again or leave it out") from None
        for plugin in _SAFE:
            if plugin in decoder.available_plugins:
                try:
                    return dicom_decode.decode(dataset, plugin)
                except Exception:  # noqa: S112  # others may know more kinds of pixels, as those of 12 bits
                    continue
        array = self._ask(path) if set(decoder.available_plugins) - set(_SAFE) else None
        if array is None:
            raise UserError(
                f"{path}: its compressed pixels ({syntax.name}) cannot be decoded: the file is damaged, or they need "
                "another library, as pylibjpeg-libjpeg for lossy JPEG of 12 bits"
            )
        return array

    def _ask(self, path: Path) -> tuple[np.ndarray, str] | None:
        """Let the other process decode a file; None if it cannot."""
        if self._child is None:
            # -P keeps the folder of the script, full of formats' names, out of what it imports.
            command = [sys.executable, "-P", str(dicom_decode.__file__)]
            self._child = subprocess.Popen(  # noqa: S603  # this interpreter, with a file of this package
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        assert self._child.stdin is not None and self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps([str(path.resolve()), most_bytes(path)]).encode() + b"\n")
            self._child.stdin.flush()
            answer = json.loads(self._child.stdout.readline())
            data = self._child.stdout.read(answer["bytes"])
            return np.load(io.BytesIO(data), allow_pickle=False), answer["colours"]
        except Exception:  # it refused the file, or broke down
            self._end()
            return None

    def _end(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None


def _check_size(dataset: Dataset, path: Path) -> None:
    """Raise if the header promises far more pixels than the file can hold."""
    names = ("Rows", "Columns", "BitsAllocated")
    sizes = [int(dataset.get(name) or 0) for name in names]
    frames, samples = int(dataset.get("NumberOfFrames") or 1), int(dataset.get("SamplesPerPixel") or 1)
    if min(*sizes, frames, samples) < 1:
        raise UserError(f"{path}: its header does not say how large its slices are: repair it or leave the file out")
    size = math.prod(sizes) * frames * samples / 8
    if size > most_bytes(path):
        raise UserError(f"{path}: its header promises {size:,.0f} bytes of pixels, which the file cannot hold")


def picture(dataset: Dataset, decoder: PixelDecoder, path: Path, role: Role) -> np.ndarray:
    """Return the frames of a file as a screen shows them, before any rescaling: (F, R, C) or (F, R, C, 3) RGB.

    Colours become RGB. Where low values are shown bright (MONOCHROME1), values are turned round within the range of
    the stored bits: 0 and the highest change places, unless they are `MEASURED`. Grey masks keep their stored values,
    also those that stand for colours of a palette. Padding is left as it is.

    Raises:
        UserError: The pixels cannot be decoded, or their colours are of a kind that is not known.
    """
    array, colours = decoder.frames(dataset, path)
    if colours == "PALETTE COLOR" and role == "image":
        from pydicom.pixels import apply_color_lut

        array = apply_color_lut(array, dataset)[..., :3]
        # Tables of 16 bits hold the colour in the upper half, but for some writers.
        return (array >> 8).astype(np.uint8) if array.dtype == np.uint16 and array.max() > 255 else array
    if colours == "RGB":
        return array[..., :3]
    if colours not in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR") or array.ndim != 3:
        raise UserError(f"{path}: colours of the kind '{colours}' are not read: convert it to RGB")
    if colours == "MONOCHROME1" and role == "image" and dataset.get("Modality") not in MEASURED:
        return invert(array, int(dataset.get("BitsStored") or dataset.BitsAllocated))
    return array


def blank(dataset: Dataset) -> np.ndarray:
    """Return frames (F, R, C) or (F, R, C, 3) of zeros that take no memory, shaped as `picture` gives them."""
    sides = (int(dataset.get("NumberOfFrames") or 1), int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0))
    colours = (
        int(dataset.get("SamplesPerPixel") or 1) > 1 or dataset.get("PhotometricInterpretation") == "PALETTE COLOR"
    )
    return np.broadcast_to(np.uint8(0), (*sides, 3) if colours else sides)


def invert(array: np.ndarray, bits: int) -> np.ndarray:
    """Let the lowest and the highest number of so many bits change places, and all between."""
    total = -1 if array.dtype.kind == "i" else 2**bits - 1
    return (total - array.astype(np.int64)).astype(array.dtype)


def scale_of(dataset: Dataset, frame: int, path: Path) -> tuple[float, float]:
    """Return slope and intercept of a frame's values; (1, 0) where none are given.

    Raises:
        UserError: They make no sense, or a table takes their place.
    """
    if dataset.get("ModalityLUTSequence"):
        raise UserError(
            f"{path}: its values go through a table (ModalityLUTSequence), which is not read: apply it first"
        )
    place = group(dataset, frame, "PixelValueTransformationSequence") or dataset
    slope, intercept = number_in(place, "RescaleSlope", path), number_in(place, "RescaleIntercept", path)
    if slope == 0:
        raise UserError(f"{path}: its RescaleSlope is 0, which makes all values one: repair the header")
    return 1.0 if slope is None else slope, intercept or 0.0


def rescale(frames: Sequence[np.ndarray], scales: Sequence[tuple[float, float]]) -> np.ndarray:
    """Return slices (N, R, C) in the unit of the modality, such as HU.

    Args:
        frames: Stored values (R, C) of each slice.
        scales: Slope and intercept of each slice.

    Returns:
        The stored dtype if nothing is scaled; int16 if the values are whole numbers that fit; float32 otherwise.
    """
    if all(scale == (1.0, 0.0) for scale in scales):
        return np.stack(frames)
    found: list[Any] = []
    for frame, (slope, intercept) in zip(frames, scales, strict=True):
        whole = slope.is_integer() and intercept.is_integer() and max(abs(slope), abs(intercept)) < 2**30
        if frame.dtype.kind in "iu" and whole:
            exact = frame.astype(np.int64) * int(slope) + int(intercept)
            fits = exact.min() >= -(2**15) and exact.max() < 2**15
            found.append(exact.astype(np.int16 if fits else np.float32))
        else:
            found.append((frame.astype(np.float64) * slope + intercept).astype(np.float32))
    return np.stack(found)  # slices of both types become float32
