"""Scores of volumes by hand, and against the code of those who defined them."""

from __future__ import annotations

import math
import timeit
from types import ModuleType

import numpy as np
import pytest

from trainer.metrics import nsd, slice_dsc, volume_scores
from trainer.metrics.surface import distances, element_areas, outline


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return pytest.importorskip("surface_distance")


def cuboid(lower: tuple[int, int, int], size: tuple[int, int, int], shape: tuple[int, int, int] = (12, 16, 18)):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(start, start + side) for start, side in zip(lower, size, strict=True))] = True
    return mask


def blob(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """A round thing with bays, as an organ is."""
    rng = np.random.default_rng(seed)
    z, y, x = (
        (axis - side * (0.4 + 0.2 * rng.random())) / (0.3 * side)
        for axis, side in zip(np.ogrid[tuple(map(slice, shape))], shape, strict=True)
    )
    waves = 0.2 * np.cos(3 * np.arctan2(y, x) + 6 * rng.random()) + 0.15 * np.sin(4 * z + 6 * rng.random())
    return z**2 + y**2 + x**2 < (1 + waves) ** 2


def test_areas_of_elements_by_hand() -> None:
    areas = element_areas((2.0, 3.0, 6.0))
    faces = np.array([18.0, 12.0, 6.0])  # across slices, rows and columns
    diagonal = np.linalg.norm(faces)
    assert areas[[0, 255]].tolist() == [0, 0]
    assert areas[[128, 1, 127, 254]] == pytest.approx(diagonal / 8), "a corner, cut off through three middles"
    assert areas[[0b11110000, 0b11001100, 0b10101010]] == pytest.approx(faces)
    assert areas[0b10001000] == pytest.approx(np.hypot(12, 6) / 2), "an edge along the slices: a slanted rectangle"
    assert areas[0b11100000] == pytest.approx(18 / 2 + diagonal * 3 / 8), "three in a slice: a triangle, a trapezium"
    assert areas[0b11101000] == pytest.approx(diagonal * 6 / 8), "a corner and its neighbours: a hexagon"
    assert areas[0b10010110] == pytest.approx(diagonal / 2), "four corners apart"


def test_areas_of_elements_against_the_reference(reference: ModuleType) -> None:
    table = pytest.importorskip("surface_distance.lookup_tables").create_table_neighbour_code_to_surface_area
    for spacing in ((1.0, 1.0, 1.0), (5.0, 0.7, 0.9), (0.4, 2.5, 1.3)):
        assert element_areas(spacing) == pytest.approx(table(spacing), abs=1e-12)


def test_a_shifted_cuboid_by_hand() -> None:
    truth, moved = cuboid((3, 3, 3), (4, 6, 6)), cuboid((5, 3, 3), (4, 6, 6))
    found = volume_scores(moved, truth, (2.0, 1.0, 1.0), tolerance=4.0)
    assert (found.dsc, found.nsd, found.tolerance) == (0.5, 1.0, "4 mm"), "two slices of 2 mm away"
    assert distances(outline(truth, (2.0, 1.0, 1.0)), outline(moved, (2.0, 1.0, 1.0)), (2.0, 1.0, 1.0)).max() == 4
    without = volume_scores(moved, truth, None, tolerance=2)
    assert (without.nsd, without.tolerance) == (1.0, "2 px")
    assert volume_scores(moved, truth, (2.0, 1.0, 1.0), tolerance=3.9).nsd < 1


def test_the_surface_of_a_cuboid() -> None:
    """Whole squares on its faces, half a diagonal along its edges, and eight cut corners."""
    a, b, c = 4, 5, 6
    whole = 2 * ((a - 1) * (b - 1) + (a - 1) * (c - 1) + (b - 1) * (c - 1))
    edges = 4 * (a + b + c - 3) * math.sqrt(2) / 2
    assert outline(cuboid((1, 2, 3), (a, b, c)), (1.0, 1.0, 1.0)).lengths.sum() == pytest.approx(
        whole + edges + math.sqrt(3)
    )


def test_empty_volumes() -> None:
    nothing, one = np.zeros((4, 8, 9), np.uint8), cuboid((1, 2, 2), (2, 3, 3), (4, 8, 9)).astype(np.uint8) * 255
    both = volume_scores(nothing, nothing)
    assert (both.dsc, both.nsd, both.hd95) == (1, 1, 0)
    for pair in ((nothing, one), (one, nothing)):
        found = volume_scores(*pair)
        assert (found.dsc, found.nsd, found.hd95) == (0, 0, math.inf)
    same = volume_scores(one, one)
    assert (same.dsc, same.nsd, same.hd95) == (1, 1, 0)


def test_volumes_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="expected two volumes of one size"):
        volume_scores(np.zeros((3, 4, 5)), np.zeros((3, 5, 4)))
    with pytest.raises(ValueError, match="expected two volumes of one size"):
        volume_scores(np.zeros((4, 5)), np.zeros((4, 5)))


def test_random_volumes_against_the_reference(reference: ModuleType) -> None:
    rng = np.random.default_rng(0)
    compared = 0
    for number in range(150):
        shape = rng.integers(1, 14, 3)
        masks = [rng.random(shape) < rng.choice([0.02, 0.3, 0.5, 0.9]) for _ in range(2)]
        if not all(mask.any() for mask in masks):
            continue
        spacing = tuple(map(float, rng.choice([0.4, 0.7, 1, 1.25, 2, 3, 5], 3)))
        tolerance = float(rng.choice([0, 0.8, 1, 1.2, 2, 3]))
        found = volume_scores(*masks, spacing, tolerance)
        expected = reference.compute_surface_distances(masks[1], masks[0], spacing)
        surface = reference.compute_surface_dice_at_tolerance(expected, tolerance)
        assert found.nsd == pytest.approx(surface, abs=1e-12), (number, spacing, tolerance)
        assert nsd(*masks, tolerance, spacing) == pytest.approx(surface, abs=1e-12), "the short reach changes nothing"
        assert found.hd95 == pytest.approx(reference.compute_robust_hausdorff(expected, 95), abs=1e-12)
        assert found.dsc == pytest.approx(reference.compute_dice_coefficient(masks[1], masks[0]), abs=1e-12)
        compared += 1
    assert compared > 100


def test_volumes_against_monai() -> None:
    """Its subvoxel mode weighs by area as this does; on elements of equal area the plain mode agrees as well."""
    metrics = pytest.importorskip("monai.metrics")
    torch = pytest.importorskip("torch")
    truth, prediction = blob((14, 40, 36), 0), np.roll(blob((14, 40, 36), 1), 2, axis=1)
    for spacing, tolerance in (((1.0, 1.0, 1.0), 2.0), ((4.0, 0.8, 1.1), 2.0), ((4.0, 0.8, 1.1), 4.0)):
        arrays = (torch.from_numpy(mask)[None, None].float() for mask in (prediction, truth))
        expected = metrics.compute_surface_dice(*arrays, [tolerance], True, spacing=spacing, use_subvoxels=True)
        found = volume_scores(prediction, truth, spacing, tolerance)
        assert 0.1 < found.nsd < 1
        assert found.nsd == pytest.approx(float(expected), abs=1e-6)


def test_slices_one_by_one() -> None:
    truth, prediction = cuboid((2, 2, 2), (3, 4, 4)), cuboid((3, 2, 4), (3, 4, 4))
    assert slice_dsc(prediction, truth).tolist() == [1, 1, 0, 0.5, 0.5, 0, 1, 1, 1, 1, 1, 1]
    assert volume_scores(prediction, truth).dsc == pytest.approx(2 * 16 / 96)


def test_is_faster_than_the_reference(reference: ModuleType) -> None:
    truth, prediction = blob((40, 256, 256), 0), np.roll(blob((40, 256, 256), 0), 2, axis=1)
    spacing = (5.0, 0.8, 0.8)
    expected = reference.compute_surface_distances(truth, prediction, spacing)
    assert nsd(prediction, truth, 2.0, spacing) == pytest.approx(
        reference.compute_surface_dice_at_tolerance(expected, 2.0), abs=1e-12
    )
    ours = min(timeit.repeat(lambda: nsd(prediction, truth, 2.0, spacing), number=1, repeat=3))
    theirs = min(
        timeit.repeat(lambda: reference.compute_surface_distances(truth, prediction, spacing), number=1, repeat=3)
    )
    assert theirs > 2 * ours, f"{1e3 * ours:.0f} ms here, {1e3 * theirs:.0f} ms there"
