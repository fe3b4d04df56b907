from __future__ import annotations

import json

import numpy as np
import pytest

from data_shards.errors import UserError
from data_shards.preprocessing import MinMax, Native, Percentiles, Window, check_finite, cut
from data_shards.readers import Volume


def test_window_matches_the_formula_and_reports_its_bounds() -> None:
    volume = np.array([[[-1000, -160, 40, 239, 240, 3000]]], np.int16)
    rescale = Window(level=40, width=400).fit(volume)
    assert rescale.apply(volume).tolist() == [[[0, 0, 128, 254, 255, 255]]]
    assert rescale.apply(volume).dtype == np.uint8
    assert json.loads(json.dumps(rescale.provenance())) == {
        "kind": "window", "low": -160.0, "high": 240.0, "range": [0, 255]
    }  # fmt: skip


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
