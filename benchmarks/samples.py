"""What do the other benchmarks read? Real slices at the size of real samples; prints kilobytes a sample by codec.

python benchmarks/samples.py           # a few seconds

The slices are those of the ICBM 152 template, T1-weighted MR, 8 bits, that nilearn carries. It has 197 × 233 voxels a
slice, and is an average of 152 heads: smooth, with little noise. So each slice is resized to 512 × 512 by cubic
interpolation, and Rician noise of 3 grey levels is added, after which a PNG has about the size that real 512 × 512
slices have (133 KB by the project's own measurements). Targets: 3 or 4 a slice, 3.4 on average, drawn from the tissue
maps of the same template and smoothed by 3 pixels, as contours drawn by hand are. The 1024 × 1024 images are what the
reference MedSAM preparation makes of the same slices: resized again, cubic, and the grey repeated to RGB.

The last line is one JSON object:
  benchmark             "samples"
  quick                 whether --quick was given
  distinct              number of different slices
  noise                 standard deviation of the noise in grey levels
  targets_per_sample    targets a slice
  mask_characters       mean length of a mask's run lengths, in characters
  kilobytes_per_sample  {"png", "zstd", "png_1024"}: mean of image and JSON together, in 1000 bytes
  encoded_per_second    {"png", "zstd", "png_1024"}: samples encoded a second on one core

The 1024 × 1024 PNG is smaller here than the 985 KB that the project measured on other images: the path that ours is
compared with is, if anything, the faster for it.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from measuring import arguments, finish
from PIL import Image
from scipy import ndimage

from data_shards.codecs import Codec
from data_shards.scan import write_index
from data_shards.triplet import Provenance, Target, Triplet
from data_shards.writer import ShardWriter

NOISE = 3.0
"""Standard deviation of the noise in grey levels."""
CODECS: dict[str, tuple[str, Codec]] = {
    "png": ("native", "png"),
    "zstd": ("native", "zstd"),
    "png_1024": ("large", "png"),
}
"""The shards that are compared: which image is stored and how."""

_SLICES = (36, 132)
"""First and last axial slice taken: all of them show brain."""
_CONTOUR = 3.0
"""Pixels by which tissue maps are smoothed."""


@dataclass(frozen=True)
class Slice:
    """One real slice.

    Attributes:
        image: (512, 512) uint8.
        masks: Masks (512, 512) of bool by term.
    """

    image: np.ndarray
    masks: Mapping[str, np.ndarray]

    def native(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the image and its masks as they are."""
        return self.image, dict(self.masks)

    def large(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return what the reference preparation stores: (1024, 1024, 3) uint8, and masks (1024, 1024)."""
        grey = _resized(self.image, 1024).clip(0, 255).round().astype(np.uint8)
        masks = {term: mask.repeat(2, axis=0).repeat(2, axis=1) for term, mask in self.masks.items()}
        return np.repeat(grey[..., None], 3, axis=2), masks

    def labels(self) -> np.ndarray:
        """Return the masks in one map (1024, 1024) uint8, as the reference preparation stores them."""
        labels = np.zeros((1024, 1024), np.uint8)
        for number, mask in enumerate(self.large()[1].values(), 1):
            labels[mask] = number
        return labels


def slices(count: int, noise: float = NOISE) -> list[Slice]:
    """Return different slices of the template; 3.4 targets on average where `count` is a multiple of 5."""
    head, white, grey = (_template(kind) for kind in ("t1", "wm", "gm"))
    numbers = np.linspace(*_SLICES, count).round().astype(int)
    return [_slice(head[..., z], white[..., z], grey[..., z], order, noise) for order, z in enumerate(numbers)]


def _slice(head: np.ndarray, white: np.ndarray, grey: np.ndarray, order: int, noise: float) -> Slice:
    rng = np.random.default_rng(order)
    clean = _resized(head, 512)
    real, imaginary = rng.normal(0, noise, (2, *clean.shape))
    image = np.hypot(clean + real, imaginary).clip(0, 255).round().astype(np.uint8)
    white, grey = (ndimage.gaussian_filter(_resized(tissue, 512), _CONTOUR) for tissue in (white, grey))
    brain = ndimage.binary_fill_holes(white + grey > 127)
    left, right = brain.copy(), brain.copy()
    left[256:], right[:256] = False, False
    masks = {"brain": brain, "left side of the brain": left, "cerebral white matter": white > 127}
    if order % 5 > 2:
        masks["right side of the brain"] = right
    return Slice(image, masks)


def _template(kind: str) -> np.ndarray:
    package = find_spec("nilearn")
    if package is None or package.origin is None:
        sys.exit("the benchmarks read a real volume that nilearn carries: pip install nilearn")
    name = f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz"
    return np.asarray(nibabel.load(Path(package.origin).parent / "datasets" / "data" / name).dataobj)


def _resized(image: np.ndarray, length: int) -> np.ndarray:
    factors = [length / side for side in image.shape]
    return ndimage.zoom(image.astype(np.float32), factors, order=3, mode="nearest")


def encoded(source: Slice, kind: str) -> dict[str, bytes]:
    """Return a slice's members in a tar, for one of `CODECS`."""
    form, codec = CODECS[kind]
    image, masks = getattr(source, form)()
    origin = Provenance("icbm152", "0" * 16, "0" * 16, "MR", "0" * 64, "axial", spacing=(0.4, 0.4), slice_spacing=1.0)
    targets = tuple(Target.from_mask(mask, term) for term, mask in masks.items())
    return Triplet("any", image, targets, tuple(masks), origin).encode(codec)


def targets_of(sources: Sequence[Mapping[str, bytes]]) -> tuple[float, float]:
    """Return targets a sample, and the mean length of their run lengths in characters."""
    targets = [target for members in sources for target in Triplet.decode("any", members).targets]
    return len(targets) / len(sources), statistics.mean(len(target.counts) for target in targets)


def write_shards(folder: Path, sources: Sequence[Mapping[str, bytes]], count: int, per_shard: int) -> Path:
    """Write `count` samples of different keys, the members of `sources` in turn, and their index."""
    with ShardWriter(folder, per_shard, 2**40) as writer:
        for number in range(count):
            writer.write(f"icbm-{number:07d}", sources[number % len(sources)])
    write_index(folder)
    return folder


def write_reference(folder: Path, sources: Sequence[Slice], count: int) -> Path:
    """Write images and label maps as the reference preparation does: a PNG each, in two folders."""
    for name in ("imgs", "gts"):
        (folder / name).mkdir(parents=True)
    for number, source in enumerate(sources):
        Image.fromarray(source.large()[0]).save(folder / "imgs" / f"{number:05d}.png")
        Image.fromarray(source.labels()).save(folder / "gts" / f"{number:05d}.png")
    for number in range(len(sources), count):  # a copy takes pages of its own, as another image would
        for name in ("imgs", "gts"):
            data = (folder / name / f"{number % len(sources):05d}.png").read_bytes()
            (folder / name / f"{number:05d}.png").write_bytes(data)
    return folder


def main() -> None:
    values = arguments(__doc__, distinct=0)
    sources = slices(values.distinct or (10 if values.quick else 50))
    result: dict[str, Any] = {
        "benchmark": "samples",
        "quick": values.quick,
        "distinct": len(sources),
        "noise": NOISE,
        "kilobytes_per_sample": {},
        "encoded_per_second": {},
    }
    for kind in CODECS:
        start = time.perf_counter()
        members = [encoded(source, kind) for source in sources]
        rate = len(sources) / (time.perf_counter() - start)
        size = statistics.mean(sum(map(len, item.values())) for item in members) / 1000
        print(f"{kind}: {size:.0f} KB a sample, {rate:.0f} encoded a second")
        result["kilobytes_per_sample"][kind] = size
        result["encoded_per_second"][kind] = rate
    result["targets_per_sample"], result["mask_characters"] = targets_of(
        [encoded(source, "zstd") for source in sources]
    )
    finish(result)


if __name__ == "__main__":
    main()
