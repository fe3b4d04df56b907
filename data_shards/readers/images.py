"""Pictures: PNG, JPEG, BMP, GIF, Netpbm and TIFF, through Pillow; TIFFs of science, which Pillow would cut, in `tiff`.

What a picture says of its resolution is not trusted: most programs write 72 dots per inch into anything.
"""

from __future__ import annotations

import gzip
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data_shards.errors import UserError
from data_shards.readers.axes import pick_channels
from data_shards.readers.base import Role, Volume, register
from data_shards.readers.tiff import beyond_pillow, read_tiff

MAX_PIXELS = 2**30
"""Pixels of all pages of a picture together. Pillow's own limit is below what a slide scanner or a microscope makes."""

_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF")
"""What is looked for in a file, whatever its suffix: a ``.jpg`` that is a PNG is common, and harmless."""

_ORIENTATION = 0x0112
_SAMPLE_FORMAT, _BITS, _PHOTOMETRIC, _SUBFILE = 339, 258, 262, 254
"""Numbers of tags in EXIF and TIFF."""


@dataclass(frozen=True)
class _Options:
    """The options of `read_images`, where they are documented."""

    role: Role
    channels: list[int] | None
    grey: bool
    alpha: str
    orientation: str
    palette: str
    level: int | None


@register(".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff")
@register(".ppm", ".pgm", ".pbm", ".pnm", ".ppm.gz", ".pgm.gz")
def read_images(
    path: Path,
    role: Role,
    channels: list[int] | None = None,
    grey: bool = False,
    alpha: Literal["refuse", "drop"] = "refuse",
    orientation: Literal["refuse", "apply", "ignore"] = "refuse",
    palette: Literal["colour", "index"] = "colour",
    level: int | None = None,
) -> Volume:
    """Read a picture; the pages of a TIFF, or the frames of a GIF, are its slices.

    Grey pictures keep their dtype (uint8, uint16, int16, int32, uint32, float32), black and white ones become 0 and
    255, and palettes and CMYK are shown in their colours. A mask whose colours are all grey becomes grey, and what is
    transparent in it 0.

    Args:
        path: The file.
        role: `channels`, `grey` and `alpha` are for images, `palette` is for masks.
        channels: Which channels of an image, from 0: one, or three to become red, green and blue.
        grey: Make an image grey that is stored as three equal channels.
        alpha: Whether an image that is transparent somewhere is refused, or read without its transparency.
        orientation: What to do with a picture that its EXIF or TIFF tags turn or mirror on the screen: the masks were
            drawn either on what the screen shows (``apply``) or on the stored pixels (``ignore``).
        palette: Whether a mask with a palette is its colours, or the raw numbers, as in label maps with a colour map.
        level: Which page of a TIFF whose pages differ in size, as in a pyramid, the largest being 0. Ignored where
            they do not, so that a slide and a picture of its mask can be read at one level.

    Raises:
        UserError: The file is damaged or too large, or an option is needed to know what it means.
    """
    options = _Options(role, channels, grey, alpha, orientation, palette, level)
    with _no_limit(), _opened(path) as file:
        try:
            image = Image.open(file, formats=_FORMATS)
        except UnidentifiedImageError:
            image = None
            file.seek(0)
            if file.read(4) not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
                raise UserError(f"{path}: is no picture, or is damaged: none of {', '.join(_FORMATS)}") from None
        why = "kind of pixels" if image is None else beyond_pillow(image)
        if image is None or why:
            array = read_tiff(path, why, level, orientation == "ignore", MAX_PIXELS)
        else:
            array = _stacked(path, [_values(path, image, options) for _ in _pages(path, image, options)])
        _check_sums(path, file)
    return Volume(_as_asked(path, array, options), spacing=None, flat=True)


def _check_sums(path: Path, file: IO[bytes]) -> None:
    """Check the checksums of a PNG, which Pillow does not when it decodes: one flipped bit would be other pixels."""
    file.seek(0)
    if file.read(8) == b"\x89PNG\r\n\x1a\n":
        file.seek(0)
        try:
            Image.open(file, formats=["PNG"]).verify()
        except Exception as error:  # whatever damaged bytes make it raise
            raise UserError(f"{path}: cannot be read, is it complete? ({error})") from error


def _as_asked(path: Path, array: np.ndarray, options: _Options) -> np.ndarray:
    """Return the channels that are wanted of (Z, Y, X) or (Z, Y, X, C): (Z, Y, X) or (Z, Y, X, 3)."""
    image = options.role == "image"
    if array.ndim == 3:
        if image and options.channels not in (None, [0]):
            raise UserError(f"{path}: channels: the picture is grey, it has one channel")
        return array
    if image:
        array = pick_channels(path, array, options.channels)
    elif array.shape[-1] != 3:
        raise UserError(f"{path}: the mask has {array.shape[-1]} channels, not one or three: save one picture for each")
    if array.ndim == 3 or (image and not options.grey):
        return array
    same = (array == array[..., :1]).all()
    if image and not same:
        raise UserError(f"{path}: grey: the picture has colours: its channels differ")
    return np.ascontiguousarray(array[..., 0]) if same else array


_LIMIT = threading.Lock()
_readers = 0
_before: int | None = None


@contextmanager
def _no_limit() -> Iterator[None]:
    """Switch Pillow's limit of pixels off, which is one for all threads: `_pages` checks each file's size itself."""
    global _readers, _before
    with _LIMIT:
        if not _readers:
            _before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _readers += 1
    try:
        yield
    finally:
        with _LIMIT:
            _readers -= 1
            if not _readers:
                Image.MAX_IMAGE_PIXELS = _before


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, unpacked if it is gzipped."""
    if not path.name.lower().endswith(".gz"):
        with path.open("rb") as file:
            yield file
        return
    most = 6 * MAX_PIXELS  # three channels of 16 bits
    with gzip.open(path) as packed:
        data = packed.read(most)
        if packed.read(1):  # reading on to the end also compares the checksum
            raise UserError(f"{path}: holds more than {most} bytes: it is no picture of at most {MAX_PIXELS} pixels")
    yield io.BytesIO(data)


def _pages(path: Path, image: Image.Image, options: _Options) -> Iterator[int]:
    """Go to each page that is wanted, in turn, once it is known that all of them fit."""
    # The further pages of an MPO, as phones write them into .jpg, are previews.
    count = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    sizes, wanted = [image.size] * count, list(range(count))
    if image.format == "TIFF":
        for page in range(count):
            image.seek(page)
            sizes[page] = image.size
            if image.tag_v2.get(_SUBFILE, 0) & 1:  # type: ignore[attr-defined]  # a smaller version of another page
                wanted.remove(page)
    differ = len(set(sizes)) > 1
    if differ and options.level is not None:
        if not 0 <= options.level < count:
            raise UserError(f"{path}: level: there is no level {options.level}, only 0 to {count - 1}")
        wanted = [options.level]
    shapes = sorted({sizes[page] for page in wanted}, reverse=True)
    if len(shapes) > 1:
        text = ", ".join(f"{width} x {height}" for width, height in shapes)
        raise UserError(f"{path}: its pages differ in size ({text}): choose one, as in reader: {{level: 0}}")
    pixels = sum(sizes[page][0] * sizes[page][1] for page in wanted)
    if not wanted or pixels > MAX_PIXELS:
        hint = f"choose one of its {count} levels, as in reader: {{level: 1}}" if differ else "cut it into pieces"
        raise UserError(f"{path}: has {pixels} pixels, more than {MAX_PIXELS}: {hint}")
    for page in wanted:
        image.seek(page)
        yield page


def _stacked(path: Path, pages: list[np.ndarray]) -> np.ndarray:
    """Stack pages (Y, X) and (Y, X, 3); where they differ, the grey ones become RGB."""
    if any(page.ndim == 3 for page in pages):
        pages = [page if page.ndim == 3 else np.repeat(page[..., np.newaxis], 3, axis=-1) for page in pages]
    if len({page.dtype for page in pages}) > 1:
        raise UserError(f"{path}: its pages hold different kinds of numbers: save them alike")
    return np.stack(pages) if len(pages) > 1 else pages[0][np.newaxis]


def _values(path: Path, image: Image.Image, options: _Options) -> np.ndarray:
    """Decode the page that an image is at: (Y, X), or (Y, X, 3) in colours."""
    tiles = getattr(image, "tile", [])
    codec, _, _, raw = tiles[0] if tiles else ("", (), 0, None)  # how the file stores it; loading forgets that
    if image.format == "PNG" and ";16" in str(raw) and not image.mode.startswith("I"):
        raise UserError(f"{path}: has 16 bits for each colour, of which 8 would be lost: save it as TIFF")
    image = _upright(path, image, options.orientation)
    if options.role == "mask" and options.palette == "index" and image.mode in ("P", "PA"):
        return np.asarray(image if image.mode == "P" else image.getchannel(0))
    values, alpha = _shown(path, image)
    if codec.startswith("ppm") and values.ndim == 2 and isinstance(raw, tuple):
        values = _unscaled(values, raw[1])
    if alpha is not None and options.role == "mask":
        values = np.where(alpha[..., np.newaxis] if values.ndim == 3 else alpha, values, values.dtype.type(0))
    elif alpha is not None and options.alpha == "refuse" and alpha.min() < 255:
        raise UserError(
            f"{path}: is transparent in places, where its colours may mean nothing: save it without transparency, or "
            "say reader: {alpha: drop} to take the colours as they are"
        )
    return values


def _upright(path: Path, image: Image.Image, orientation: str) -> Image.Image:
    """Turn a picture as its tags say, or not, and load it."""
    exif = image.getexif()
    if exif.get(_ORIENTATION, 1) not in range(2, 9):
        image.load()
        return image
    if orientation == "refuse":
        raise UserError(
            f"{path}: its tags turn it on the screen (orientation {exif[_ORIENTATION]}): say reader: "
            "{orientation: apply} if its mask was drawn on what the screen shows, or {orientation: ignore}"
        )
    if orientation == "ignore":
        del exif[_ORIENTATION]  # Pillow turns TIFFs by itself
    image.load()
    return ImageOps.exif_transpose(image) if orientation == "apply" else image


def _shown(path: Path, image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """Return what a screen shows, (Y, X) or (Y, X, 3), and the opacity (Y, X) uint8 if there is any."""
    mode = image.mode
    if mode in ("P", "PA"):
        rgba = np.asarray(image.convert("RGBA"))
        colours = rgba[..., :3]
        grey = (colours == colours[..., :1]).all()
        return (colours[..., 0] if grey else colours), rgba[..., 3]
    if mode in ("LA", "La", "RGBA", "RGBa"):
        array = np.asarray(image.convert("LA" if mode.startswith("L") else "RGBA"))
        return (array[..., 0] if mode.startswith("L") else array[..., :3]), array[..., -1]
    if mode in ("RGB", "CMYK", "YCbCr"):
        array = np.asarray(image.convert("RGB"))
    elif mode in ("1", "L"):
        array = np.asarray(image.convert("L"))
    elif mode == "F" or mode.startswith("I"):
        array = _numbers(image)
    else:
        raise UserError(f"{path}: holds colours of the kind '{mode}': save it as RGB")
    clear = image.info.get("transparency")
    if clear is None:
        return array, None
    seen = array != np.asarray(clear, dtype=array.dtype)
    return array, np.where(seen.any(axis=-1) if array.ndim == 3 else seen, np.uint8(255), np.uint8(0))


def _numbers(image: Image.Image) -> np.ndarray:
    """Return grey values of more than 8 bits (Y, X) in the dtype of the file."""
    array = np.asarray(image)
    if image.format != "TIFF":  # Pillow makes 16-bit Netpbm, and before version 11 also PNG, 32-bit
        return array if array.dtype.kind == "f" else array.astype(np.uint16)
    tags = image.tag_v2  # type: ignore[attr-defined]
    bits, signed = tags.get(_BITS, (16,))[0], tags.get(_SAMPLE_FORMAT, (1,))[0] == 2
    if array.dtype.kind == "f":
        return array
    if bits == 32:
        return array if signed else array.view(np.uint32)
    array = array.astype(np.int16 if signed else np.uint16)
    # Pillow inverts where 0 is white, but not these.
    return array if tags.get(_PHOTOMETRIC) != 0 else np.iinfo(array.dtype).max - array


def _unscaled(array: np.ndarray, maximum: int) -> np.ndarray:
    """Return the numbers in a Netpbm file, which Pillow stretches to 255 or 65535 where its maximum is another."""
    if array.dtype.kind == "f":
        return array
    return np.rint(array * (maximum / np.iinfo(array.dtype).max)).astype(array.dtype)
