"""DSC, IoU, NSD and HD95 against PyPI surface-distance and MONAI, on 200 random and 50 real pairs of masks.

Whose definition counts: NSD and HD95 are surface-distance's (length or area of the surface, between voxels). MONAI
agrees on NSD in its subvoxel mode; its own HD95 counts voxels of the edge instead, so it is MONAI's distances and areas
of that mode that are compared. Of empty masks surface-distance and MONAI's NSD say nothing (NaN) where both are empty;
here that is a perfect answer, as in MONAI's Dice with ``ignore_empty=False``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation, binary_erosion, distance_transform_edt

from data_shards.readers import read_mask
from trainer.metrics import hd95, nsd, overlap, volume_scores

surface_distance: ModuleType = pytest.importorskip("surface_distance")
monai_metrics: ModuleType = pytest.importorskip("monai.metrics")

EXACT = 1e-6


@dataclass(frozen=True)
class Pair:
    """Two masks of 2 or 3 dimensions, and what they are compared at."""

    name: str
    prediction: np.ndarray
    truth: np.ndarray
    spacing: tuple[float, ...]
    tolerance: float

    @property
    def empty(self) -> int:
        return 2 - int(self.prediction.any()) - int(self.truth.any())


def blob(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A round thing with bays that may leave the image."""
    axes = np.ogrid[tuple(map(slice, shape))]
    scaled = [(a - n * rng.uniform(0.2, 0.8)) / (n * rng.uniform(0.15, 0.5)) for a, n in zip(axes, shape, strict=True)]
    bays = 0.25 * np.cos(rng.integers(2, 6) * np.arctan2(scaled[-1], scaled[-2]) + 6 * rng.random())
    return sum(a**2 for a in scaled) < (1 + bays) ** 2


def random_pairs() -> list[Pair]:
    """100 pairs of images, 100 of volumes: noise, blobs, single voxels, whole and empty masks.

    Spacings and tolerances are sums of powers of 2: distances that equal the tolerance do so in single precision too.
    """
    rng = np.random.default_rng(0)
    kinds = {
        "noise": lambda shape: rng.random(shape) < rng.choice([0.05, 0.3, 0.5, 0.9]),
        "blob": lambda shape: blob(rng, shape),
        "voxel": lambda shape: np.arange(np.prod(shape)).reshape(shape) == rng.integers(np.prod(shape)),
        "full": lambda shape: np.ones(shape, bool),
        "empty": lambda shape: np.zeros(shape, bool),
    }
    pairs = []
    for number in range(200):
        axes = 2 + number % 2
        shape = tuple(rng.integers(3, (40, 14)[axes - 2], axes).tolist())
        if number < 2 * len(kinds) ** 2:  # every kind with every other one, as image and as volume
            one, other = (list(kinds)[number // 2 // step % len(kinds)] for step in (1, len(kinds)))
        else:
            one, other = rng.choice(["noise", "blob"], 2, p=[0.3, 0.7])
        spacing = tuple(rng.choice([0.5, 0.75, 1, 1.25, 2, 3, 5], axes).tolist())
        tolerance = float(rng.choice([0, 1, 1.25, 2, 3]))
        name = f"{number}: {one} and {other}, {shape}, {spacing}, {tolerance}"
        pairs.append(Pair(name, kinds[one](shape), kinds[other](shape), spacing, tolerance))
    return pairs


def real_masks(folder: Path) -> Iterator[tuple[str, np.ndarray, tuple[float, ...]]]:
    """50 real masks with their spacing: 27 images, 23 volumes."""
    for name, count in (("dermoscopy_ham10000_jpg", 8), ("endoscopy_kvasir_polyp_jpg", 6), ("fundus_chasedb1_jpg", 6)):
        for path in sorted((folder / name / "masks").iterdir())[:count]:
            yield path.name, picture(path), (1.0, 1.0)
    for path in sorted((folder / "xray_chest_montgomery_png" / "masks").iterdir())[:6]:
        yield path.name, picture(path), (0.7, 0.7)
    yield "nuclei", picture(folder / "microscopy_nuclei_stardist_tif" / "masks" / "mask2d.tif"), (0.5, 0.5)
    organs = read_mask(folder / "ct_abdomen_totalseg_nifti" / "example_seg.nii.gz")
    assert organs.spacing
    values, counts = np.unique(organs.array, return_counts=True)
    for value in sorted(values[1:][np.argsort(-counts[1:])][:15]):
        yield f"organ {value}", organs.array == value, organs.spacing
    for path in (
        "ct_liver_dicom_seg/nrrd/liver_seg.nrrd",
        "ct_sarcoma_dicom_rtstruct/STS_002/reference_mask.nii.gz",
        "mr_brain_tumor_nrrd/brain1_label.nrrd",
        "mr_breast_lesion_nrrd/breast1_label.nrrd",
        "mr_spinal_cord_nifti/t2/t2_seg-manual.nii.gz",
        "mr_spinal_cord_nifti/t2s/t2s_gmseg_manual.nii.gz",
        "pet_sarcoma_nifti/STS_001_PET_mask.nii.gz",
        "pet_sarcoma_nifti/STS_002_PET_mask.nii.gz",
    ):
        volume = read_mask(folder / path)
        assert volume.spacing
        yield path, volume.array > 0, volume.spacing


def picture(path: Path) -> np.ndarray:
    array = read_mask(path).array
    array = array[0] if array.ndim == 3 else array[0, ..., 0]
    return array > (127 if path.suffix == ".jpg" else 0)


def part(mask: np.ndarray) -> np.ndarray:
    """What is inside with a border of two, every second or n-th row and column of what is large, 12 slices of many."""
    box = [slice(max(0, int(places.min()) - 2), int(places.max()) + 3) for places in np.nonzero(mask)]
    inner = mask[tuple(box)]
    steps = [-(-side // (120 if mask.ndim == 2 else 60)) for side in inner.shape[-2:]]
    inner = inner[..., :: steps[0], :: steps[1]]
    return inner if mask.ndim == 2 else inner[max(0, len(inner) // 2 - 6) :][:12]


def real_pairs(folder: Path) -> list[Pair]:
    """Real masks, and predictions as models make them: too large, too small, shifted, with holes and specks.

    No distance equals a tolerance but for rounding, which is coarser in MONAI: two steps of 0.499999998 mm and 1 mm.
    """
    rng = np.random.default_rng(1)
    pairs = []
    for number, (name, mask, spacing) in enumerate(real_masks(folder)):
        truth = part(mask)
        prediction = (binary_dilation, binary_erosion, lambda same: same)[number % 3](truth)
        prediction = np.roll(prediction, rng.integers(-3, 4, 2), (-2, -1)) & (rng.random(truth.shape) < 0.98)
        prediction |= rng.random(truth.shape) < 0.001
        pairs.append(Pair(name, prediction, truth, spacing, (1.03, 2.03, 3.03)[number // 3 % 3]))
    return pairs


@pytest.fixture(scope="module", params=["random", "real"])
def pairs(request: pytest.FixtureRequest) -> list[Pair]:
    found = random_pairs() if request.param == "random" else real_pairs(request.getfixturevalue("test_data"))
    assert len(found) == {"random": 200, "real": 50}[request.param]
    return found


@pytest.fixture
def infinity(monkeypatch: pytest.MonkeyPatch) -> None:
    """surface-distance 0.1 writes np.Inf where a mask is empty, which NumPy 2 has no more."""
    monkeypatch.setattr(np, "Inf", math.inf, raising=False)


@pytest.fixture
def quiet() -> Iterator[None]:
    """The references warn of empty masks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def batched(mask: np.ndarray) -> torch.Tensor:
    """As MONAI wants it: (1, 1, ...)."""
    return torch.from_numpy(mask)[None, None].float()


def test_the_pairs_are_of_every_sort(pairs: list[Pair]) -> None:
    assert sum(pair.truth.ndim == 2 for pair in pairs) in (100, 27)
    if len(pairs) == 200:
        assert {pair.empty for pair in pairs} == {0, 1, 2}
        assert sum(pair.truth.all() and pair.prediction.all() for pair in pairs) == 2
        assert sum(bool(pair.empty) for pair in pairs) >= 18
    else:
        assert all(pair.truth.any() and not pair.truth.all() and pair.prediction.any() for pair in pairs)
        assert len({pair.truth.tobytes() for pair in pairs}) == 50


def test_dsc_and_iou(pairs: list[Pair], quiet: None) -> None:
    seen = set()
    for pair in pairs:
        dsc, iou = (float(score[0]) for score in overlap(*(torch.from_numpy(m)[None] for m in masks(pair))))
        tensors = [batched(mask) for mask in masks(pair)]
        dice = monai_metrics.DiceMetric(reduction="none", ignore_empty=False)(*tensors)
        assert dsc == pytest.approx(float(dice), abs=EXACT), pair.name
        assert iou == pytest.approx(float(monai_metrics.compute_iou(*tensors, ignore_empty=False)), abs=EXACT), (
            pair.name
        )
        if pair.empty < 2:
            expected = surface_distance.compute_dice_coefficient(pair.truth, pair.prediction)
            assert dsc == pytest.approx(expected, abs=EXACT), pair.name
        else:
            assert dsc == iou == 1
        if pair.truth.ndim == 3:
            assert volume_scores(*masks(pair)).dsc == pytest.approx(dsc, abs=EXACT), pair.name
        seen.add(round(dsc, 2))
    assert len(seen) > 15, "scores of all sorts"


def test_nsd_and_hd95_against_surface_distance(pairs: list[Pair], infinity: None, quiet: None) -> None:
    seen = set()
    for pair in pairs:
        found = nsd(*masks(pair), pair.tolerance, pair.spacing), hd95(*masks(pair), pair.spacing)
        if pair.empty == 2:
            assert found == (1, 0), "surface-distance says NaN and infinity"
            continue
        measured = surface_distance.compute_surface_distances(pair.truth, pair.prediction, pair.spacing)
        expected = (
            surface_distance.compute_surface_dice_at_tolerance(measured, pair.tolerance),
            surface_distance.compute_robust_hausdorff(measured, 95),
        )
        assert found == pytest.approx(expected, abs=EXACT), pair.name
        assert math.isinf(found[1]) == bool(pair.empty)
        if pair.truth.ndim == 3:
            scores = volume_scores(*masks(pair), pair.spacing, pair.tolerance)
            assert (scores.nsd, scores.hd95) == pytest.approx(expected, abs=EXACT), pair.name
        seen.add(round(found[0], 2))
    assert len(seen) > 15, "scores of all sorts"


def test_nsd_against_monai(pairs: list[Pair], quiet: None) -> None:
    for pair in pairs:
        expected = monai_metrics.compute_surface_dice(
            *map(batched, masks(pair)), [pair.tolerance], True, spacing=pair.spacing, use_subvoxels=True
        )
        found = nsd(*masks(pair), pair.tolerance, pair.spacing)
        assert found == pytest.approx(1 if pair.empty == 2 else float(expected), abs=EXACT), pair.name


def test_hd95_against_monai(pairs: list[Pair], quiet: None) -> None:
    """Both surfaces lie within HD95 for 95 % of MONAI's area, and one of them does not within less."""
    from monai.metrics.utils import get_edge_surface_distance

    for pair in pairs:
        if pair.empty:
            continue
        edges, away, areas = get_edge_surface_distance(
            *map(torch.from_numpy, masks(pair)), spacing=pair.spacing, use_subvoxels=True, symmetric=True
        )
        found = hd95(*masks(pair), pair.spacing)
        reached = []
        for edge, distance, area in zip(edges, away, areas, strict=True):
            share = area[edge].double() / area[edge].double().sum()
            within = [float(share[distance <= found + side * EXACT * max(1, found)].sum()) for side in (-1, 1)]
            assert within[1] > 0.95 - EXACT, pair.name
            reached.append(within[0])
        assert found == 0 or min(reached) < 0.95 + EXACT, pair.name


def test_hd95_of_monai_counts_voxels_of_the_edge() -> None:
    """A plate with a thin spur, in rows 5 mm apart: voxels count alike for MONAI, lengths for the definition."""
    truth = np.zeros((30, 60), bool)
    truth[5:9, 5:55] = True
    prediction = truth.copy()
    prediction[9:15, 30] = True
    spacing = (5.0, 0.5)
    ours = hd95(prediction, truth, spacing)
    measured = surface_distance.compute_surface_distances(truth, prediction, spacing)
    assert ours == pytest.approx(surface_distance.compute_robust_hausdorff(measured, 95))
    edge, other = (mask & ~binary_erosion(mask) for mask in (prediction, truth))
    by_voxels = np.percentile(distance_transform_edt(~other, sampling=spacing)[edge], 95)
    tensors = [batched(mask) for mask in (prediction, truth)]
    theirs = float(monai_metrics.compute_hausdorff_distance(*tensors, True, percentile=95, spacing=spacing))
    assert theirs == pytest.approx(by_voxels, abs=1e-4), "its quantile is in single precision"
    assert ours > theirs + 1, "the spur is 6 of 112 voxels of the edge, but more than a third of its length"


def masks(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    return pair.prediction, pair.truth
