"""Pictures as other people store them in shards: JPEG, PNG and npy become images and label maps.

What a header declares is checked against the bytes that are there before memory is taken for it. Nothing is guessed: a
picture that could mean two things is refused. H, W are its height and width in pixels.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from data_shards.codecs import DEFLATE_RATIO, check_image, read_npy
from data_shards.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_KINDS = ("jpg", "jpeg", "png", "npy")
"""Last parts of the extensions of members that can be an image."""
LABEL_KINDS = ("png", "npy")
"""Last parts of the extensions of members that can be a mask. JPEG blurs the edge of one."""

_GREY, _RGB, _PALETTE, _GREY_ALPHA, _RGBA = 0, 2, 3, 4, 6
_PNG_CHANNELS = {_GREY: 1, _RGB: 3, _PALETTE: 1, _GREY_ALPHA: 2, _RGBA: 4}
"""Channels by PNG's colour type."""
_JPEG_RATIO = 1024
"""No JPEG has more pixels than this for a byte: a block of 64 takes a bit at least, for each of its channels."""
_MAX_SCANS = 200
"""Scans of a progressive JPEG; encoders write about ten, and each of them goes over the whole image."""
_ORIENTATION = 0x0112
"""Number of the EXIF tag."""


def decode_picture(extension: str, data: bytes) -> np.ndarray:
    """Return the image of a member: (H, W) grey, or (H, W, 3) in colours.

    Grey keeps its dtype, black and white becomes 0 and 255, and a palette is shown in its colours. Full opacity is
    dropped.

    Args:
        extension: What the member is called; its last part is one of `IMAGE_KINDS`.
        data: Its bytes, which may be damaged or hostile.

    Raises:
        UserError: It is damaged or too large; is transparent somewhere, moves, has colours of 16 bits, or is turned by
            its EXIF tags: masks may have been drawn on the picture as it is stored or as a screen shows it.
    """
    return _decode(_IMAGES, extension, data)


def decode_labels(extension: str, data: bytes) -> np.ndarray:
    """Return the label map of a member: (H, W) whole numbers or bool, as they are stored; of a palette its numbers.

    Args:
        extension: What the member is called; its last part is one of `LABEL_KINDS`.
        data: Its bytes, which may be damaged or hostile.

    Raises:
        UserError: It is damaged or too large, or holds colours, transparency or fractions.
    """
    return _decode(_LABELS, extension, data)


def _decode(decoders: Mapping[str, Callable[[bytes], np.ndarray]], extension: str, data: bytes) -> np.ndarray:
    decoder = decoders.get(extension.rpartition(".")[2])
    if decoder is None:
        raise UserError(f"its {extension} is not read: {', '.join(decoders)} are")
    try:
        return decoder(data)
    except UserError as error:
        text = str(error)
        raise UserError(f"its {extension}{':' if text.startswith('it') else ''} {text}") from error
    except Exception as error:  # whatever damaged bytes make a decoder raise
        raise UserError(f"its {extension} cannot be decoded ({type(error).__name__}: {str(error)[:200]})") from error


def _image_of_jpeg(data: bytes) -> np.ndarray:
    from PIL.JpegImagePlugin import JpegImageFile

    if not data.startswith(b"\xff\xd8\xff"):
        raise UserError("is no JPEG")
    # A marker cannot lie inside of the coded pixels.
    if data.count(b"\xff\xda") > _MAX_SCANS:
        raise UserError(f"has more than {_MAX_SCANS} scans: save it anew")
    # `Image.open` would refuse what is larger than a limit that all threads share.
    with JpegImageFile(io.BytesIO(data)) as picture:
        if picture.mode not in ("L", "RGB"):
            raise UserError(f"has colours of the kind {picture.mode}: save it as grey or RGB")
        width, height = picture.size
        _check((height, width) if picture.mode == "L" else (height, width, 3), np.dtype(np.uint8))
        if width * height > _JPEG_RATIO * len(data):
            raise UserError(f"declares {height} x {width} pixels, more than its {len(data)} bytes can hold")
        _check_upright(picture)
        return np.array(picture)


def _image_of_png(data: bytes) -> np.ndarray:
    shape, depth, colour = _png_header(data)
    with _png(data, shape) as picture:
        if colour == _PALETTE:
            return _opaque(np.asarray(picture.convert("RGBA")))
        array = np.asarray(picture)
        clear = picture.info.get("transparency")
    if colour in (_GREY_ALPHA, _RGBA):
        return _opaque(array)
    if clear is not None:  # one value, or one colour, that a screen does not show
        seen = array != np.asarray(clear).astype(array.dtype)
        if not (seen.any(axis=2) if array.ndim == 3 else seen).all():
            raise _transparent()
    if depth == 1:
        return array.astype(np.uint8) * np.uint8(255)
    return array.astype(np.uint16 if depth == 16 else np.uint8)


def _labels_of_png(data: bytes) -> np.ndarray:
    shape, depth, colour = _png_header(data)
    with _png(data, shape) as picture:
        array = np.array(picture)  # of a palette the numbers
    if colour in (_GREY_ALPHA, _RGBA):
        array = _opaque(array)
    if array.ndim == 3:
        if (array != array[..., :1]).any():
            raise UserError("has colours: save it as grey, with one number for each term")
        return np.ascontiguousarray(array[..., 0])
    if colour == _GREY and depth in (2, 4):  # which Pillow stretches to 0 to 255
        return array // np.uint8(255 // (2**depth - 1))
    return array.astype(np.uint16) if depth == 16 else array


def _png_header(data: bytes) -> tuple[tuple[int, ...], int, int]:
    """Return the shape of what will be decoded, the bit depth and the colour type."""
    if len(data) < 33 or data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
        raise UserError("is no PNG")
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    if colour not in _PNG_CHANNELS or depth not in (1, 2, 4, 8, 16):
        raise UserError(f"has bit depth {depth} and colour type {colour}, which PNG does not know")
    if depth == 16 and colour != _GREY:  # Pillow would cut it to 8
        raise UserError("has 16 bits for each colour, of which 8 would be lost: save it as npy")
    shape = (height, width) if colour in (_GREY, _GREY_ALPHA) else (height, width, 3)
    _check(shape, np.dtype(np.uint16 if depth == 16 else np.uint8))
    if height * (1 + width * _PNG_CHANNELS[colour] * depth // 8) > DEFLATE_RATIO * len(data):
        raise UserError(f"declares {height} x {width} pixels, more than its {len(data)} bytes can hold")
    return shape, depth, colour


@contextmanager
def _png(data: bytes, shape: tuple[int, ...]) -> Iterator[Image]:
    """Open and decode a PNG whose header declares an image of a shape."""
    from PIL.PngImagePlugin import PngImageFile

    with PngImageFile(io.BytesIO(data)) as picture:
        if picture.size != shape[1::-1]:
            raise UserError("has two sizes")
        if getattr(picture, "n_frames", 1) > 1:
            raise UserError("moves: save one picture of it")
        picture.load()
        _check_upright(picture)
        yield picture


def _check_upright(picture: Image) -> None:
    """Refuse a picture that a screen turns: nobody says whether its masks were turned, too."""
    turned = picture.getexif().get(_ORIENTATION, 1)
    if turned in range(2, 9):
        raise UserError(
            f"is turned on the screen by its EXIF tags (orientation {turned}), and its masks may have been drawn "
            "either way: store the pixels upright, without the tag"
        )


def _opaque(array: np.ndarray) -> np.ndarray:
    """Drop the opacity, the last channel, of (H, W, 2) or (H, W, 4)."""
    if array[..., -1].min() < 255:
        raise _transparent()
    return np.ascontiguousarray(array[..., 0] if array.shape[2] == 2 else array[..., :3])


def _transparent() -> UserError:
    return UserError("is transparent in places, where its values may mean nothing: save it without transparency")


def _image_of_npy(data: bytes) -> np.ndarray:
    return read_npy(io.BytesIO(data), len(data), _check)


def _labels_of_npy(data: bytes) -> np.ndarray:
    def check(shape: tuple[int, ...], dtype: np.dtype) -> None:
        if len(shape) != 2:
            raise UserError(f"has shape {shape}; a mask is (H, W)")
        _check(shape, dtype)

    array = read_npy(io.BytesIO(data), len(data), check)
    if array.dtype.kind != "f":
        return array
    whole = np.isfinite(array) & (np.abs(array) < 2.0**31)
    whole &= np.where(whole, array, 0) == np.rint(np.where(whole, array, 0))
    if not whole.all():
        raise UserError("holds fractions or what is no number: a mask has whole numbers")
    return array.astype(np.int64)


def _check(shape: tuple[int, ...], dtype: np.dtype) -> None:
    try:
        check_image(shape, dtype)
    except UserError as error:
        raise UserError(f"is refused: {error}") from error


_IMAGES = {"jpg": _image_of_jpeg, "jpeg": _image_of_jpeg, "png": _image_of_png, "npy": _image_of_npy}
_LABELS = {"png": _labels_of_png, "npy": _labels_of_npy}
