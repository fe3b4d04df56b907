"""Surface Dice by hand, and against the code of those who defined it."""

from __future__ import annotations

import math
import timeit
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from trainer.metrics import nsd
from trainer.metrics.surface import distances, element_lengths, outline

Reference = Callable[[np.ndarray, np.ndarray, float, tuple[float, float]], float]


@pytest.fixture(scope="module")
def reference() -> Reference:
    package: ModuleType = pytest.importorskip("surface_distance")

    def compute(prediction: np.ndarray, truth: np.ndarray, tolerance: float, spacing: tuple[float, float]) -> float:
        found = package.compute_surface_distances(truth, prediction, spacing)
        return float(package.compute_surface_dice_at_tolerance(found, tolerance))

    return compute


def blob(side: int, seed: int, radius: float = 0.2, roughness: float = 0.1) -> np.ndarray:
    """A round thing with bays, as an organ is."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side]
    y, x = side * (0.4 + 0.2 * generator.random(2))
    angle = np.arctan2(rows - y, columns - x)
    waves = sum(roughness * generator.normal() / k * np.cos(k * angle + 6 * generator.random()) for k in range(2, 9))
    return (rows - y) ** 2 + (columns - x) ** 2 < (side * radius * (1 + waves)) ** 2


def square(top: int, left: int, side: int, shape: tuple[int, int] = (20, 24)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_a_square_has_the_outline_of_marching_squares() -> None:
    """Four corners are cut by half a diagonal each, and between them lie side − 1 whole steps."""
    found = outline(square(3, 5, 4))
    assert found.lengths.sum() == pytest.approx(4 * 3 + 4 * math.sqrt(2) / 2)
    assert found.corners.min(axis=0).tolist() == [3, 5], "the corner between pixels, left above the first one"
    assert found.corners.max(axis=0).tolist() == [7, 9]
    stretched = outline(square(3, 5, 4), (2.0, 0.5))
    assert stretched.lengths.sum() == pytest.approx(2 * 3 * (2 + 0.5) + 4 * math.hypot(2, 0.5) / 2)


def test_lengths_of_elements() -> None:
    lengths = element_lengths((3.0, 4.0))  # half a diagonal is 2.5
    assert lengths[[0, 15]].tolist() == [0, 0]
    assert lengths[[0b1100, 0b0011]].tolist() == [4, 4], "two pixels above two others: along the row"
    assert lengths[[0b1010, 0b0101]].tolist() == [3, 3]
    assert lengths[[0b1001, 0b0110]].tolist() == [5, 5], "two opposite pixels: two corners"
    assert lengths[[1, 2, 4, 8, 7, 11, 13, 14]].tolist() == [2.5] * 8


def test_a_shifted_square_by_hand() -> None:
    """Corners 4 to 12 of the rows, 4 to 12 of the columns, and a prediction two columns further."""
    truth, moved = square(4, 4, 8), square(4, 6, 8)
    assert distances(outline(truth), outline(moved)).max() == 2
    assert nsd(moved, truth, 2) == 1
    # The whole left side is two columns away: seven steps and two cut corners. Of the right side, which lies within
    # the prediction, corners 6 to 10 are two away from its top, bottom and right side; 5 and 11 only one.
    far, length = (7 + math.sqrt(2)) + 5, 4 * 7 + 2 * math.sqrt(2)
    assert nsd(moved, truth, 1) == nsd(truth, moved, 1) == pytest.approx(1 - far / length)
    # With columns 2 mm apart the left side is 4 mm away; of the right side corners 7 to 9 are more than 2 mm.
    far, length = (7 + math.hypot(1, 2)) + 3, 2 * 7 * (1 + 2) + 2 * math.hypot(1, 2)
    assert nsd(moved, truth, 2, (1.0, 2.0)) == pytest.approx(1 - far / length)


def test_empty_masks() -> None:
    nothing, one = np.zeros((8, 9), np.uint8), square(2, 2, 3, (8, 9)).astype(np.uint8) * 255
    assert nsd(nothing, nothing, 2) == 1
    assert nsd(nothing, one, 2) == nsd(one, nothing, 2) == 0
    assert nsd(one, one, 0) == 1
    assert np.isinf(distances(outline(one), outline(nothing))).all()


def test_a_mask_ends_where_its_image_ends() -> None:
    whole = np.ones((6, 7), bool)
    assert outline(whole).lengths.sum() == pytest.approx(2 * (5 + 6) + 4 * math.sqrt(2) / 2)
    assert nsd(whole, whole, 0) == 1


def test_random_masks_against_the_reference(reference: Reference) -> None:
    generator = np.random.default_rng(0)
    steps = [0.4, 0.5, 0.7, 0.8, 1, 1.25, 2, 0.3515625, 3]
    for number in range(600):
        shape = generator.integers(1, 40, 2)
        masks = [generator.random(shape) < generator.choice([0.02, 0.3, 0.5, 0.9]) for _ in range(2)]
        if not all(mask.any() for mask in masks):
            continue
        spacing = tuple(map(float, generator.choice(steps, 2))) if number % 2 else (float(generator.choice(steps)),) * 2
        tolerance = float(generator.choice([0, 0.8, 1, 1.2, 2, 3]))  # many lie exactly at a distance that occurs
        expected = reference(*masks, tolerance, spacing)
        assert nsd(*masks, tolerance, spacing) == pytest.approx(expected, abs=1e-12), (number, spacing, tolerance)


def test_real_masks_against_the_reference(reference: Reference, test_data: Path) -> None:
    compared = 0
    for folder in ("fundus_chasedb1_jpg", "endoscopy_kvasir_polyp_jpg"):
        for path in sorted((test_data / folder / "masks").iterdir())[:2]:
            truth = np.asarray(Image.open(path).convert("L")) > 127
            prediction = np.roll(truth, (3, -2), (0, 1))
            for tolerance, spacing in ((2.0, (1.0, 1.0)), (1.0, (0.4, 0.7))):
                expected = reference(prediction, truth, tolerance, spacing)
                assert 0 < expected < 1
                assert nsd(prediction, truth, tolerance, spacing) == pytest.approx(expected, abs=1e-12)
                compared += 1
    assert compared == 8


def test_is_at_least_five_times_as_fast_as_the_reference(reference: Reference) -> None:
    truth, prediction = blob(1024, 0, 0.25), np.roll(blob(1024, 0, 0.25, 0.11), 3, axis=0)
    spacing = (1.0, 1.0)
    assert nsd(prediction, truth, 2.0) == pytest.approx(reference(prediction, truth, 2.0, spacing), abs=1e-12)
    ours = min(timeit.repeat(lambda: nsd(prediction, truth, 2.0), number=1, repeat=15))
    theirs = min(timeit.repeat(lambda: reference(prediction, truth, 2.0, spacing), number=1, repeat=5))
    assert theirs > 5 * ours, f"{1e3 * ours:.2f} ms here, {1e3 * theirs:.2f} ms there"
