"""The pictures of an evaluation, in a file that anything can read.

Shapes: H, W are an image's native height and width in pixels, P its points; they differ between panels.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
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
        box: (4,) float32, the prompt (x0, y0, x1, y1) in native pixels, the outermost pixels included; NaN without one.
        points: (P, 3) float32, the prompt's points as (x, y, label) in native pixels, 1 on the target and 0 beside it.
        target: Position of the target in its sample; −1 in files of earlier versions.
    """

    key: str
    term: str
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    box: np.ndarray
    points: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.float32))
    target: int = -1

    @property
    def dsc(self) -> float:
        """Dice similarity coefficient; 1 where both masks are empty."""
        truth, prediction = self.truth != 0, self.prediction != 0
        total = int(truth.sum()) + int(prediction.sum())
        return 2 * int((truth & prediction).sum()) / total if total else 1.0


def save_panels(path: Path, panels: Sequence[Panel]) -> None:
    """Write panels as a compressed npz without pickles, whole or not at all; its folder is made.

    Raises:
        ValueError: A mask differs in size from its image.
    """
    names = {name: [getattr(panel, name) for panel in panels] for name in ("key", "term")}
    arrays: dict[str, np.ndarray] = {f"{name}s": np.array(values, dtype=str) for name, values in names.items()}
    for number, panel in enumerate(panels):
        image, truth, prediction = panel.image, panel.truth, panel.prediction
        if not image.shape[:2] == truth.shape == prediction.shape:
            raise ValueError(f"{panel.key}: image {image.shape}, truth {truth.shape}, prediction {prediction.shape}")
        arrays[f"image_{number}"] = np.asarray(image, np.uint8)
        arrays[f"truth_{number}"] = np.asarray(truth, np.uint8)
        arrays[f"prediction_{number}"] = np.asarray(prediction, np.uint8)
        if len(panel.points):
            arrays[f"points_{number}"] = np.asarray(panel.points, np.float32)
    arrays["targets"] = np.array([panel.target for panel in panels], np.int64)
    arrays["boxes"] = np.asarray([panel.box for panel in panels], np.float32).reshape(-1, 4)
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
                points=arrays.get(f"points_{number}", np.zeros((0, 3), np.float32)),
                target=int(arrays["targets"][number]) if "targets" in arrays else -1,
            )
            for number, (key, term) in enumerate(zip(arrays["keys"], arrays["terms"], strict=True))
        ]
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: no readable panels ({type(error).__name__}); run the evaluation again") from error
