"""What the tests of the demo upload: a volume with two objects, its series in DICOM, and what nobody should open."""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import yaml

SPACING = (2.5, 0.8, 0.8)
BALL, BAR = (34.0, 14.0, 52.0, 32.0), (10.0, 36.0, 26.0, 42.0)
"""Boxes of the two objects on the middle slice, slice 4."""


def labels() -> np.ndarray:
    """A ball (1) on slices 1 to 7 of 9, and a bar (2) on slices 2 to 6: (9, 56, 64)."""
    z, y, x = np.mgrid[:9, :56, :64]
    found = np.zeros(z.shape, np.uint8)
    found[(x - 43) ** 2 + (y - 23) ** 2 + ((z - 4) * 3) ** 2 <= 9**2] = 1
    found[(abs(x - 18) <= 8) & (abs(y - 39) <= 3) & (abs(z - 4) <= 2)] = 2
    return found


def picture() -> np.ndarray:
    """What is seen of it: (9, 56, 64) uint8."""
    image = np.random.default_rng(0).normal(70, 4, labels().shape) + 120 * (labels() > 0)
    return image.clip(0, 255).astype(np.uint8)


def affine() -> np.ndarray:
    """Of a volume in LPS order, somewhere in the scanner."""
    found = np.diag([-SPACING[2], -SPACING[1], SPACING[0], 1.0])
    found[:3, 3] = (30.0, -12.5, 7.0)
    return found


def write_nifti(path: Path, array: np.ndarray | None = None) -> Path:
    """Write a volume (Z, Y, X); the picture by default."""
    array = picture() if array is None else array
    nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), affine()), path)
    return path


def write_zip(path: Path, members: Mapping[str, bytes]) -> Path:
    """Write a zip of files by their name in it, whatever it says."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return path


def zipped(path: Path, files: Sequence[Path]) -> Path:
    """Write a zip of files under their own names."""
    return write_zip(path, {file.name: file.read_bytes() for file in files})


def bomb(path: Path, size: int) -> Path:
    """A gzip of zeros that unpacks to so many bytes."""
    path.write_bytes(gzip.compress(bytes(size)))
    return path


def pickled_npz(path: Path, thing: Any) -> Path:
    """An npz whose image is an array of objects."""
    held = io.BytesIO()
    np.save(held, np.array([thing], dtype=object), allow_pickle=True)
    return write_zip(path, {"imgs.npy": held.getvalue()})


def write_recipe(path: Path, model: dict[str, Any], module: str = "MedSAMModule") -> Path:
    """A recipe of a model alone."""
    content = {"model": {"class_path": f"trainer.modules.{module}", "init_args": {"model": model}}}
    path.write_text("# Does it run?\n" + yaml.safe_dump(content))
    return path


def real_model(folder: Path) -> Path:
    """A recipe with LiteMedSAM's released weights at 64 px."""
    model = {"class_path": "trainer.models.LiteMedSAM", "init_args": {"image_size": 64}}
    return write_recipe(folder / "real.yaml", model)


def tiny_model(folder: Path) -> Path:
    """A recipe with a MedSAM of random weights at 64 px."""
    encoder = {"width": 32, "depth": 3, "heads": 2, "global_blocks": [1], "window": 3}
    init = {"encoder": encoder, "image_size": 64, "weights": None}
    return write_recipe(folder / "tiny.yaml", {"class_path": "trainer.models.MedSAM", "init_args": init})
