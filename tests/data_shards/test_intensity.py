from __future__ import annotations

import json

import numpy as np
import pytest

from data_shards.errors import UserError
from data_shards.preprocessing import (
    WINDOWS,
    Colour,
    MinMax,
    Native,
    Percentiles,
    Window,
    check_finite,
    cut,
    place_of,
    slices_of,
)
from data_shards.readers import Volume


def test_window_matches_the_formula_and_reports_its_bounds() -> None:
    volume = np.array([[[-1000, -160, 40, 239, 240, 3000]]], np.int16)
    rescale = Window(level=40, width=400).fit(volume)
    assert rescale.apply(volume).tolist() == [[[0, 0, 128, 254, 255, 255]]]
    assert rescale.apply(volume).dtype == np.uint8
    assert json.loads(json.dumps(rescale.provenance())) == {
        "kind": "window", "low": -160.0, "high": 240.0, "range": [0, 255]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("soft_tissue", -160, 240),
        ("lung", -910, 590),
        ("brain", 0, 80),
        ("bone", -500, 1300),
        ("mediastinum", -125, 225),
    ],
)
def test_named_windows(name: str, low: float, high: float) -> None:
    rescale = Window(name=name).fit(np.zeros(1))
    assert (rescale.low, rescale.high) == (low, high)
    assert set(WINDOWS) == {"soft_tissue", "lung", "brain", "bone", "mediastinum"}


def test_percentiles_are_those_of_the_paper_s_code() -> None:
    """MedSAM's preprocessing of an MR volume, written down from its formula: clip, stretch, background stays 0."""
    rng = np.random.default_rng(1)
    volume = rng.gamma(2, 100, (3, 40, 40)) * (rng.random((3, 40, 40)) > 0.4)
    low, high = np.percentile(volume[volume > 0], [0.5, 99.5])
    expected = (np.clip(volume, low, high) - low) / (high - low) * 255
    np.testing.assert_allclose(Percentiles().apply(volume), expected, atol=0.51)  # rounded, not cut off


def test_colours_are_kept_where_they_are_in_range() -> None:
    colours = np.random.default_rng(0).integers(0, 200, (1, 4, 5, 3))
    np.testing.assert_array_equal(Colour().apply(colours.astype(np.uint8)), colours)
    for dtype in (np.uint16, np.float64):
        stored = Colour().apply(colours.astype(dtype))
        np.testing.assert_array_equal(stored, colours)
        assert stored.dtype == np.uint8
    unit = Colour().apply(colours / colours.max())  # 0–1 would be black
    assert unit.max() == 255 and Colour().apply(colours * 100).max() == 255
    assert Colour().apply(colours - 50.0).min() == 0


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_a_box_lies_among_the_slices_where_it_lies_in_the_volume(axis) -> None:
    volume = np.zeros((7, 8, 9), int)
    box = np.arange(1, 1 + 2 * 3 * 4).reshape(2, 3, 4)
    volume[4:6, 1:4, 3:7] = box
    first, top, left = place_of((4, 1, 3), box.shape, volume.shape, axis)
    slices, cut_box = slices_of(volume, axis), slices_of(box, axis)
    n, h, w = cut_box.shape
    np.testing.assert_array_equal(slices[first : first + n, top : top + h, left : left + w], cut_box)


def test_percentiles_leave_background_out() -> None:
    rng = np.random.default_rng(0)
    volume = np.zeros((4, 50, 50), np.float32)
    volume[:, 10:40, 10:40] = rng.normal(500, 50, (4, 30, 30))
    rescale = Percentiles().fit(volume)
    low, high = np.percentile(volume[volume != 0], [0.5, 99.5])
    assert (rescale.low, rescale.high) == (float(low), float(high))
    assert Percentiles(nonzero=False).fit(volume).low == 0.0
    stored = rescale.apply(volume)
    assert stored[0, 0, 0] == 0 and stored.max() == 255
    # the bounds are those of the whole volume: slices keep their brightness relative to each other
    np.testing.assert_array_equal(rescale.apply(volume[:1]), stored[:1])


@pytest.mark.parametrize("value", [0, 7, -3])
@pytest.mark.parametrize("kind", [Percentiles(), MinMax()])
def test_a_blank_volume_stays_blank(kind: MinMax | Percentiles, value: int) -> None:
    assert np.unique(kind.apply(np.full((2, 3, 4), value, np.int16))).tolist() == [0]


@pytest.mark.parametrize("dtype", ["int32", "int64", "float64"])
def test_large_numbers_keep_their_differences(dtype: str) -> None:
    volume = np.array([[[2**30, 2**30 + 1, 2**30 + 2]]], dtype)
    assert MinMax().apply(volume).tolist() == [[[0, 128, 255]]]
    assert Window(level=2**30 + 1, width=2).apply(volume).tolist() == [[[0, 128, 255]]]


def test_minmax_and_none() -> None:
    volume = np.array([[[-10.0, 0.0, 10.0]]], np.float32)
    assert MinMax().apply(volume).tolist() == [[[0, 128, 255]]]
    assert Native().apply(volume) is volume
    assert Native().fit(volume).provenance() == {"kind": "none"}


def test_bad_parameters() -> None:
    with pytest.raises(UserError, match="width must be above 0"):
        Window(level=0, width=0)
    for bad in ({"level": 0, "width": np.nan}, {"level": 0, "width": np.inf}, {"level": np.nan, "width": 1}):
        with pytest.raises(UserError, match="width must be above 0 and level a number"):
            Window(**bad)
    with pytest.raises(UserError, match="low < high"):
        Percentiles(low=99, high=1)
    with pytest.raises(UserError, match=r"per cent: write 99\.5, not 0\.995"):
        Percentiles(low=0.005, high=0.995)


def test_nan_and_infinity_are_counted() -> None:
    volume = np.zeros((2, 3, 4), np.float32)
    volume[0, 0, :2], volume[1, 1, 1] = np.nan, np.inf
    with pytest.raises(UserError, match=r"brain\.nii: 3 of 24 voxels are NaN or infinite"):
        check_finite(volume, "brain.nii")
    check_finite(np.zeros((2, 3, 4), np.int16), "integers.nii")


def test_cut_along_each_axis() -> None:
    array = np.arange(2 * 3 * 4).reshape(2, 3, 4)  # z (up), y (back), x (left)
    volume = Volume(array, (5.0, 2.0, 1.0))
    axial, coronal, sagittal = (cut(volume, axis) for axis in ("axial", "coronal", "sagittal"))
    np.testing.assert_array_equal(axial.slices[1], array[1])
    np.testing.assert_array_equal(coronal.slices[2], array[::-1, 2])  # superior on top
    np.testing.assert_array_equal(sagittal.slices[3], array[::-1, :, 3])
    assert (axial.spacing, axial.slice_spacing) == ((2.0, 1.0), 5.0)
    assert (coronal.spacing, coronal.slice_spacing) == ((5.0, 1.0), 2.0)
    assert (sagittal.spacing, sagittal.slice_spacing) == ((5.0, 2.0), 1.0)
    colour = cut(Volume(np.zeros((2, 3, 4, 3)), None), "sagittal")
    assert colour.slices.shape == (4, 2, 3, 3) and colour.spacing is None


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint16", "float32"])
def test_percentiles_are_those_of_wide_numbers(dtype: str) -> None:
    extremes = np.iinfo(dtype) if dtype[0] != "f" else np.finfo("float16")
    volume = np.repeat(np.array([extremes.min, extremes.max], dtype), 50).reshape(1, 10, 10)
    before = volume.copy()
    found = Percentiles(low=49.6, high=99.5, nonzero=False).fit(volume)
    low, high = np.percentile(volume.astype(np.float64), [49.6, 99.5])
    assert (found.low, found.high) == pytest.approx((low, high))
    np.testing.assert_array_equal(volume, before)
