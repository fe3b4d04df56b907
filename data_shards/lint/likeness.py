"""How alike two images are: a hash to search by, a thumbnail to sift with, and the comparison that decides.

Shapes: N images, H, W a picture's height and width in pixels.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

SIDE = 16
"""Side of a thumbnail, and of the block of frequencies whose signs are the hash."""
WORDS = SIDE * SIDE // 64
"""64-bit words of a hash."""

_COARSE = 2 * SIDE
_FINE = 128
"""Side of the pictures that are compared in the end: fine enough for ribs and vessels, too coarse for JPEG's noise."""
_BLUR = 9
"""Pixels over which a picture is averaged; what remains is its detail."""
_FLOOR = 0.05
"""Contrast, as part of the image's range, below which there is nothing but noise."""
_MASK = np.uint64(2**64 - 1)


def grey(image: np.ndarray, side: int) -> np.ndarray:
    """Return an image (H, W) or (H, W, 3) as a square grey picture (side, side) float32, by area averaging.

    Any proportions become square: a copy that was squeezed has the same picture. What is not finite counts as 0.
    """
    if image.dtype == np.uint8:
        picture = Image.fromarray(image)
        picture = picture.convert("L") if image.ndim == 3 else picture
    else:
        values = np.nan_to_num(image, nan=0, posinf=0, neginf=0) if image.dtype.kind == "f" else image
        with np.errstate(over="ignore"):  # an infinity from a large float64 is mended below
            values = (values.mean(axis=2) if values.ndim == 3 else values).astype(np.float32)
        picture = Image.fromarray(np.nan_to_num(values, posinf=0, neginf=0) if image.dtype.kind == "f" else values)
    # The gap lets Pillow average whole blocks first, which is faster.
    return np.asarray(picture.resize((side, side), Image.Resampling.BOX, reducing_gap=4.0), np.float32)


def fingerprint(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the hash (WORDS,) uint64 and the thumbnail (SIDE, SIDE) uint8 of an image.

    The hash holds the signs of the low frequencies: brightness, contrast and size hardly change them.
    """
    picture = grey(image, _COARSE)
    waves = _COSINES @ (picture - picture.mean()) @ _COSINES.T
    waves[0, 0] = 0  # the mean
    bits = (waves > 0).reshape(-1)[_ORDER]
    small = picture.reshape(SIDE, 2, SIDE, 2).mean(axis=(1, 3))
    low, high = float(small.min()), float(small.max())
    thumbnail = (small - low) * (255 / max(high - low, 1e-30))
    return np.packbits(bits).view(np.uint64), thumbnail.round().astype(np.uint8)


def mirrored(hashes: np.ndarray) -> np.ndarray:
    """Return the hashes (N, WORDS) of the same images, left and right exchanged: odd waves change their sign."""
    return hashes ^ _ODD


def turns(hashes: np.ndarray) -> list[np.ndarray]:
    """Return different parts (N,) uint64 of hashes (N, WORDS), such that equal images are neighbours when sorted."""
    words = [hashes[:, word].byteswap() for word in range(WORDS)]  # the first bit weighs most
    half = np.uint64(32)
    between = [(words[n] << half & _MASK) | (words[(n + 1) % WORDS] >> half) for n in range(WORDS)]
    return words + between


def distances(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the number of different bits (N,) of hashes (N, WORDS) and (N, WORDS)."""
    return np.bitwise_count(some ^ others).sum(axis=1, dtype=np.int64)


def correlations(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the correlation (N,) of pictures (N, H, W) and (N, H, W); 0 where one is constant."""
    one = some.reshape(len(some), -1).astype(np.float32)
    two = others.reshape(len(others), -1).astype(np.float32)
    one, two = one - one.mean(axis=1, keepdims=True), two - two.mean(axis=1, keepdims=True)
    scale = np.sqrt((one**2).sum(axis=1) * (two**2).sum(axis=1))
    return (one * two).sum(axis=1) / np.maximum(scale, 1e-12)


def likeness(one: np.ndarray, other: np.ndarray, mirror: bool = False) -> float:
    """Return how much of their detail two images share: near 1 for copies, below 0.7 for what merely looks alike.

    Args:
        one: (H, W) or (H, W, 3).
        other: Likewise, of any size.
        mirror: Compare with the mirror image of the other.
    """
    side = min(_FINE, *one.shape[:2], *other.shape[:2])
    some, others = _detail(grey(one, side)), _detail(grey(other[:, ::-1] if mirror else other, side))
    return float(correlations(some[None], others[None])[0])


def _detail(picture: np.ndarray) -> np.ndarray:
    """Return what is finer than `_BLUR`, with the same contrast everywhere.

    Images of one kind share strong edges, such as the frame that a camera puts around them. Evened out, they count for
    their area only, and faint structure inside as much.
    """
    low, high = np.percentile(picture, (1, 99))
    fine = picture - _blurred(picture)
    contrast = np.sqrt(_blurred(fine**2) + (_FLOOR * max(high - low, 1e-30)) ** 2)
    return np.asarray(fine / contrast)


def _blurred(picture: np.ndarray) -> np.ndarray:
    from scipy.ndimage import uniform_filter

    return np.asarray(uniform_filter(picture, _BLUR, mode="nearest"))


def _cosines() -> np.ndarray:
    """The lowest SIDE waves of the discrete cosine transform over `_COARSE` points: (SIDE, _COARSE)."""
    waves, points = np.arange(SIDE)[:, None], np.arange(_COARSE)[None]
    return np.cos(np.pi * waves * (2 * points + 1) / (2 * _COARSE)).astype(np.float32)


_COSINES = _cosines()
# Shuffled, every part of a hash has waves of all kinds: images of one kind share the signs of the lowest.
_ORDER = np.random.default_rng(0).permutation(SIDE * SIDE)
_ODD = np.packbits((np.arange(SIDE * SIDE) % SIDE % 2 == 1)[_ORDER]).view(np.uint64)
