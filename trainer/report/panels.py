"""The pictures of an evaluation, in a file that anything can read.

Shapes: H, W are an image's native height and width in pixels; they differ between panels.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_shards.errors import UserError


@dataclass(frozen=True)
class Panel:
    """One target as a picture.

    Attributes:
        key: Sample key.
        term: Clinical term.
        image: (H, W) grey or (H, W, 3) RGB, uint8.
        truth: (H, W) uint8, nonzero inside.
        prediction: (H, W) uint8, nonzero inside.
        box: (4,) float32, the prompt (x0, y0, x1, y1) in native pixels, the outermost pixels included.
    """

    key: str
    term: str
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    box: np.ndarray

    @property
    def dsc(self) -> float:
        """Dice similarity coefficient; 1 where both masks are empty."""
        truth, prediction = self.truth != 0, self.prediction != 0
        total = int(truth.sum()) + int(prediction.sum())
        return 2 * int((truth & prediction).sum()) / total if total else 1.0


def save_panels(
    path: Path,
    *,
    keys: list[str],
    terms: list[str],
    images: list[np.ndarray],
    truths: list[np.ndarray],
    predictions: list[np.ndarray],
    boxes: list[np.ndarray],
) -> None:
    """Write panels as a compressed npz without pickles, whole or not at all.

    Args:
        path: The file; its folder is made.
        keys: Sample keys, one a panel, as are all lists.
        terms: Clinical terms.
        images: (H, W) or (H, W, 3) uint8.
        truths: (H, W) uint8.
        predictions: (H, W) uint8.
        boxes: (4,) float32 as (x0, y0, x1, y1) in native pixels.

    Raises:
        ValueError: The lists differ in length, or a mask in size from its image.
    """
    columns = (keys, terms, images, truths, predictions, boxes)
    if len({len(column) for column in columns}) != 1:
        raise ValueError(f"lists of different lengths: {[len(column) for column in columns]}")
    arrays: dict[str, np.ndarray] = {"keys": np.array(keys, dtype=str), "terms": np.array(terms, dtype=str)}
    for number, (image, truth, prediction) in enumerate(zip(images, truths, predictions, strict=True)):
        if not image.shape[:2] == truth.shape == prediction.shape:
            raise ValueError(f"{keys[number]}: image {image.shape}, truth {truth.shape}, prediction {prediction.shape}")
        arrays[f"image_{number}"] = np.asarray(image, np.uint8)
        arrays[f"truth_{number}"] = np.asarray(truth, np.uint8)
        arrays[f"prediction_{number}"] = np.asarray(prediction, np.uint8)
    arrays["boxes"] = np.asarray(boxes, np.float32).reshape(-1, 4)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as handle:
        np.savez_compressed(handle, allow_pickle=False, **arrays)
    temporary.replace(path)


def load_panels(path: Path) -> list[Panel]:
    """Read panels.

    Raises:
        UserError: The file is missing, damaged, or no file of panels.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = dict(stored)
        return [
            Panel(
                key=str(key),
                term=str(term),
                image=arrays[f"image_{number}"],
                truth=arrays[f"truth_{number}"],
                prediction=arrays[f"prediction_{number}"],
                box=arrays["boxes"][number],
            )
            for number, (key, term) in enumerate(zip(arrays["keys"], arrays["terms"], strict=True))
        ]
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: no readable panels ({type(error).__name__}); run the evaluation again") from error
