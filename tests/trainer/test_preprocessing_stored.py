"""Resizing on the device against what MedSAM's own preparation stores: its definition, and how far from it we are.

MedSAM stores images of 1024 × 1024 that `skimage.transform.resize` made, with ``order=3, preserve_range=True,
mode="constant", anti_aliasing=True``, cut to 8 bits; and label maps with ``order=0, anti_aliasing=False``. That
function is a Gaussian filter and `scipy.ndimage.zoom` on pixels' areas, clipped to the image's range: `stored` and
`stored_mask` were compared with scikit-image 0.26, whose results they are to the last bit.

We resize on the device with an antialiased cubic convolution: the same geometry, another kernel. Measured, in shares of
the image's range, MedSAM's truncation to 8 bits being 0.002 of it on average by itself:

| image | mean | largest |
|---|---|---|
| a body on black, with a scanner's noise | 0.001–0.005 | 0.05 |
| smooth, bright up to its border | 0.004 | 0.014 away from the border |
| white noise, enlarged | 0.016 | 0.12 |
| white noise, shrunk by 1.5 to 2 | 0.06 | 0.34 |

Where a bright image is cut off by its border, the stored one fades to black over its last pixels: splines see zeros
beyond. Ours does not: there the two differ by up to 0.7. Masks are equal.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from trainer.models import Preprocessing

SIDE = 256
SIZES = [(128, 128), (64, 64), (75, 113), (256, 256), (375, 500), (512, 512), (900, 256)]
OURS = Preprocessing(SIDE, resize="squash", scaling="minmax", interpolation="bicubic")


def stored(image: np.ndarray, side: int) -> np.ndarray:
    """What MedSAM stores of an image (H, W) of 8 bits: (side, side) of 8 bits."""
    values = image.astype(np.float64)
    blur = [max(0.0, (length / side - 1) / 2) for length in image.shape]
    filtered = ndimage.gaussian_filter(values, blur, mode="grid-constant")
    factors = [side / length for length in image.shape]
    resized = ndimage.zoom(filtered, factors, order=3, mode="grid-constant", grid_mode=True)
    return resized.clip(values.min(), values.max()).astype(np.uint8)


def stored_mask(mask: np.ndarray, side: int) -> np.ndarray:
    """What MedSAM stores of a mask (H, W): (side, side)."""
    factors = [side / length for length in mask.shape]
    return ndimage.zoom(mask, factors, order=0, mode="grid-constant", grid_mode=True)


def places(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Each pixel's place in shares of the image."""
    rows, columns = np.mgrid[:height, :width]
    return (rows + 0.5) / height, (columns + 0.5) / width


def bright(height: int, width: int) -> np.ndarray:
    """Smooth, and nowhere black."""
    y, x = places(height, width)
    return 120 + 60 * np.sin(6 * x + 1) * np.cos(4 * y) + 50 * np.exp(-((x - 0.4) ** 2 + (y - 0.6) ** 2) / 0.08)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).normal(120, 40, (height, width))


def body(height: int, width: int) -> np.ndarray:
    """A head, so to speak: organs with edges a few pixels wide, on black, with a scanner's noise."""
    y, x = places(height, width)
    found = np.zeros((height, width))
    for row, column, tall, wide, value in (
        *((0.5, 0.5, 0.42, 0.34, 70), (0.5, 0.5, 0.38, 0.3, 60), (0.42, 0.4, 0.12, 0.08, -60)),
        *((0.42, 0.6, 0.12, 0.08, -60), (0.7, 0.5, 0.08, 0.1, 90), (0.3, 0.55, 0.03, 0.03, 60)),
    ):
        found += value * (((y - row) / tall) ** 2 + ((x - column) / wide) ** 2 < 1)
    real, imaginary = np.random.default_rng(width).normal(0, 2, (2, height, width))
    return np.hypot(ndimage.gaussian_filter(found, max(height, width) / 250) + real, imaginary)


def deviations(image: np.ndarray, side: int, margin: int = 0) -> tuple[float, float]:
    """Mean and largest difference of our input from the stored image's, scaled to [0, 1] as MedSAM's loader does."""
    pixels = image.clip(0, 255).round().astype(np.uint8)
    kept = stored(pixels, side).astype(np.float64)
    kept = (kept - kept.min()) / (kept.max() - kept.min())
    ours = Preprocessing(side, resize="squash", scaling="minmax", interpolation="bicubic")
    found = ours.images([torch.from_numpy(pixels)[None]])[0]
    assert torch.equal(found[0], found[2]), "grey is repeated"
    inner = slice(margin, side - margin)
    difference = np.abs(found[0].double().numpy() - kept)[inner, inner]
    return float(difference.mean()), float(difference.max())


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_body_on_black_is_nearly_the_stored_one(size: tuple[int, int]) -> None:
    mean, largest = deviations(body(*size), SIDE)
    assert mean < 0.006 and largest < 0.06


def test_at_full_size_too() -> None:
    mean, largest = deviations(body(512, 512), 1024)
    assert mean < 0.003 and largest < 0.03


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_bright_image_is_the_stored_one_but_for_its_border(size: tuple[int, int]) -> None:
    mean, largest = deviations(bright(*size), SIDE, margin=12)
    assert mean < 0.005 and largest < 0.02


def test_the_border_of_a_stored_image_fades_and_ours_does_not() -> None:
    flat = np.full((128, 128), 200.0)
    flat[40:80, 40:80] = 100
    kept = stored(flat.astype(np.uint8), SIDE)
    assert kept[0, 128] < 160 < 199 <= kept[12, 128]
    found = OURS.images([torch.from_numpy(flat.astype(np.uint8))[None]])[0, 0]
    assert min(found[0, 128], found[12, 128]) > 0.9999


@pytest.mark.parametrize(
    ("size", "most_mean", "most"),
    [((128, 128), 0.02, 0.15), ((256, 256), 1e-6, 1e-6), ((512, 512), 0.06, 0.4)],
    ids=str,
)
def test_white_noise_is_where_the_kernels_differ_most(size: tuple[int, int], most_mean: float, most: float) -> None:
    mean, largest = deviations(noise(*size), SIDE, margin=12)
    assert mean < most_mean and largest < most


@pytest.mark.parametrize("size", [*SIZES, (233, 197), (1, 300), (300, 2), (1024, 768)], ids=str)
@pytest.mark.parametrize("kind", ["organs", "speckles"])
def test_masks_are_the_stored_ones_to_the_pixel(size: tuple[int, int], kind: str) -> None:
    """Also where a sampled place lies exactly between two pixels, as in halving."""
    mask = body(*size) > 60 if kind == "organs" else noise(*size) > 120
    kept = stored_mask(mask.astype(np.uint8), SIDE)
    found = OURS.masks([torch.from_numpy(mask)])[0].numpy()
    if kept.any() or not mask.any():  # we keep a target that lies between the sampled pixels, MedSAM drops it
        np.testing.assert_array_equal(found, kept)
    else:
        assert found.any()


def test_no_pixel_of_a_mask_differs_at_full_size() -> None:
    for size in ((512, 512), (300, 450), (2048, 1500)):
        mask = noise(*size) > 120
        found = Preprocessing(1024, resize="squash").masks([torch.from_numpy(mask)])[0].numpy()
        differ = found != stored_mask(mask.astype(np.uint8), 1024)
        assert not differ.any(), f"{size}: {differ.mean():.2%} of the pixels differ"
