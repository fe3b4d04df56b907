from __future__ import annotations

import numpy as np
import pytest

from data_shards.drawings import Drawings, present, select
from data_shards.errors import UserError
from data_shards.readers import Drawing, Layer
from data_shards.spec import TargetSpec

SHAPE = (4, 10, 12)
WHOLE = (0, 0, 10, 12)


def drawings(*layers: Layer, axis="axial", complete: bool = True) -> Drawings:
    return Drawings({"": [Drawing(layers, complete)]}, SHAPE, axis)


def label_map() -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:3, 2:5, 3:6] = 1
    labels[1, 7:9, 8:12] = 2
    return labels


def test_values_of_a_label_map() -> None:
    labels = label_map()
    found = drawings(Layer(labels)).find(TargetSpec("liver", values=[1, 2]), 1, WHOLE)
    assert [item.kind for item in found] == ["semantic"]
    np.testing.assert_array_equal(found[0].mask, labels[1] > 0)
    assert drawings(Layer(labels)).find(TargetSpec("liver", value=2), 2, WHOLE) == []
    assert drawings(Layer(labels)).find(TargetSpec("liver", value=3), 1, WHOLE) == []


def test_each_value_is_an_instance_and_the_union_is_kept() -> None:
    labels = label_map()
    union, first, second = drawings(Layer(labels)).find(TargetSpec("cell nucleus", instances="values"), 1, WHOLE)
    assert (union.kind, first.kind, second.kind) == ("semantic", "instance", "instance")
    np.testing.assert_array_equal(first.mask, labels[1] == 1)
    np.testing.assert_array_equal(second.mask, labels[1] == 2)
    np.testing.assert_array_equal(union.mask, labels[1] > 0)
    assert first.identity != second.identity


def test_pieces_of_a_slice_are_instances() -> None:
    mask = np.zeros(SHAPE, bool)
    mask[0, 1:3, 1:3] = mask[0, 3, 3] = mask[0, 8, 8] = True  # corners connect
    _, *pieces = drawings(Layer(mask)).find(TargetSpec("polyp", instances="components"), 0, WHOLE)
    assert sorted(int(piece.mask.sum()) for piece in pieces) == [1, 5]


def test_layers_that_overlap_are_instances_and_one_union() -> None:
    ones = np.ones((1, 4, 4), np.uint8)
    layers = (Layer(ones, (1, 0, 0), "a"), Layer(ones, (1, 2, 2), "b"))
    union, first, second = drawings(*layers).find(TargetSpec("cell", instances="layers"), 1, WHOLE)
    assert int(first.mask.sum()) == int(second.mask.sum()) == 16
    assert int(union.mask.sum()) == 28 and not (first.mask & ~union.mask).any()
    assert drawings(*layers).find(TargetSpec("cell", instances="layers"), 0, WHOLE) == []


def test_layers_are_chosen_by_name_and_number() -> None:
    ones = np.ones((1, 2, 2), np.uint8)
    both = drawings(Layer(ones, (0, 0, 0), "GTV Mass", 1), Layer(ones, (0, 5, 5), " lung ", 2))
    for target, row in (
        (TargetSpec("tumor", name="gtv*"), 0),
        (TargetSpec("lung", name="Lung"), 5),
        (TargetSpec("x", number=2), 5),
    ):
        (found,) = both.find(target, 0, WHOLE)
        assert np.flatnonzero(found.mask.any(axis=1))[0] == row
    assert both.find(TargetSpec("x", name="lung", number=1), 0, WHOLE) == []
    assert both.find(TargetSpec("bracket", name="[g]tv*"), 0, WHOLE) == []


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_a_box_gives_the_same_masks_as_its_volume(axis) -> None:
    rng = np.random.default_rng(0)
    box = rng.integers(0, 2, (2, 3, 4)).astype(np.uint8)
    volume = np.zeros(SHAPE, np.uint8)
    volume[1:3, 5:8, 6:10] = box
    target, count = TargetSpec("x", value=1), {"axial": 4, "coronal": 10, "sagittal": 12}[axis]
    size = {"axial": (10, 12), "coronal": (4, 12), "sagittal": (4, 10)}[axis]
    window = (0, 0, *size)
    small, large = drawings(Layer(box, (1, 5, 6)), axis=axis), drawings(Layer(volume), axis=axis)
    seen = 0
    for number in range(count):
        one, other = small.find(target, number, window), large.find(target, number, window)
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            np.testing.assert_array_equal(left.mask, right.mask)
            seen += int(left.mask.sum())
    assert seen == box.sum()
    assert small.voxels(target) == large.voxels(target) == {None: box.sum()}


def test_windows_cut_masks() -> None:
    labels = label_map()
    whole = drawings(Layer(labels)).find(TargetSpec("x", value=1), 1, WHOLE)[0].mask
    for window in ((0, 0, 4, 4), (3, 4, 5, 6), (2, 2, 8, 10)):
        top, left, height, width = window
        (found,) = drawings(Layer(labels)).find(TargetSpec("x", value=1), 1, window)
        np.testing.assert_array_equal(found.mask, whole[top : top + height, left : left + width])
    assert drawings(Layer(labels)).find(TargetSpec("x", value=1), 1, (6, 0, 4, 4)) == []


def test_what_was_not_searched_is_no_negative() -> None:
    layers = (Layer(np.zeros((0, 0, 0), np.uint8), name="liver"),)
    liver, spleen = TargetSpec("liver", name="liver"), TargetSpec("spleen", name="spleen")
    listed = drawings(*layers, complete=False)
    assert listed.looked_for(liver) and not listed.looked_for(spleen)
    assert drawings(*layers).looked_for(spleen)
    assert not drawings(*layers).looked_for(TargetSpec("x", mask="other", value=1))
    assert listed.find(liver, 0, WHOLE) == []


def test_rules_of_pixels() -> None:
    grey = np.array([0, 1, 126, 128, 255], np.uint8)
    assert select(TargetSpec("x", above=127), grey).tolist() == [False, False, False, True, True]
    assert select(TargetSpec("x", below=127), grey).tolist() == [True, True, True, False, False]
    assert select(TargetSpec("x", colour=[255, 255, 255]), grey).tolist() == [False] * 4 + [True]
    assert select(TargetSpec("x", colour=[255, 0, 0]), grey).tolist() == [False] * 5
    assert select(TargetSpec("x", name="a"), grey).tolist() == [False] + [True] * 4
    colours = np.array([[255, 0, 0], [250, 4, 0], [0, 0, 255], [0, 0, 0]], np.uint8)
    assert select(TargetSpec("x", colour=[255, 0, 0]), colours, True).tolist() == [True, False, False, False]
    assert select(TargetSpec("x", colour=[255, 0, 0], tolerance=5), colours, True).tolist() == [
        True,
        True,
        False,
        False,
    ]
    assert select(TargetSpec("x", name="a"), colours, True).tolist() == [True, True, True, False]
    with pytest.raises(UserError, match="the mask is in colours, and 'x' is given by a number"):
        select(TargetSpec("x", value=1), colours, True)


def test_values_that_no_target_names() -> None:
    labels = label_map()
    labels[0, 0, 0] = 9
    assert drawings(Layer(labels)).unnamed([TargetSpec("a", value=1)]) == {"": [2, 9]}
    assert drawings(Layer(labels)).unnamed([TargetSpec("a", values=[1, 2, 9])]) == {}
    assert drawings(Layer(labels)).unnamed([TargetSpec("a", above=1)]) == {}


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", "int16", "int32", "float32", "float64"])
def test_present(dtype: str) -> None:
    assert present(np.array([[0, 1], [1, 0]], dtype)) == [1]
    if dtype == "float32":
        with pytest.raises(UserError, match="its values are no labels"):
            present(np.array([0.5], dtype))
