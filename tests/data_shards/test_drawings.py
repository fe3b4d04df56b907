from __future__ import annotations

import numpy as np
import pytest

from data_shards.drawings import Drawings, present, select, shrunk
from data_shards.errors import UserError
from data_shards.readers import Drawing, Layer, Volume
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
    assert drawings(Layer(labels)).unnamed([TargetSpec("a", value=1)]) == {"": ["2", "9"]}
    assert drawings(Layer(labels)).unnamed([TargetSpec("a", values=[1, 2, 9])]) == {}
    assert drawings(Layer(labels)).unnamed([TargetSpec("a", above=1)]) == {}


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", "int16", "int32", "float32", "float64"])
def test_present(dtype: str) -> None:
    assert present(np.array([[0, 1], [1, 0]], dtype)) == [1]
    if dtype == "float32":
        with pytest.raises(UserError, match="its values are no labels"):
            present(np.array([0.5], dtype))


@pytest.mark.parametrize("rule", [{"below": 0.5}, {"above": -1}, {"colour": [3, 3, 3], "tolerance": 3}])
def test_what_was_not_drawn_is_not_known_of_a_box(rule: dict) -> None:
    box = np.ones((2, 3, 4), np.uint8)
    target = TargetSpec("x", name="a", **rule)
    with pytest.raises(UserError, match="'x' also takes what was not drawn"):
        drawings(Layer(box, (1, 5, 6), "a")).find(target, 1, WHOLE)
    assert not any(TargetSpec("x", **other).takes_background() for other in ({"below": 0}, {"above": 0}, {"value": 1}))
    whole = np.zeros(SHAPE, np.uint8)
    whole[1, 5:8, 6:10] = 9
    (found,) = drawings(Layer(whole, name="a")).find(TargetSpec("x", name="a", below=0.5), 1, WHOLE)
    assert found.mask.sum() == 10 * 12 - 3 * 4


def test_each_colour_is_an_instance() -> None:
    colours = np.zeros((*SHAPE, 3), np.uint8)
    colours[1, 2:5, 3:6], colours[1, 6:8, 0:2] = (255, 0, 7), (0, 9, 0)
    target = TargetSpec("x", instances="values")
    one = drawings(Layer(colours))
    found = one.find(target, 1, WHOLE)
    assert [(item.kind, int(item.mask.sum())) for item in found] == [("semantic", 13), ("instance", 4), ("instance", 9)]
    assert sorted(one.voxels(target).values()) == [4, 9, 13]


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_layers_are_cut_to_what_is_drawn(axis) -> None:
    for values in (label_map(), np.repeat(label_map()[..., None], 3, axis=-1), -label_map().astype(np.float32)):
        before = Drawing((Layer(values, name="a", number=4),), volume=Volume(values, None))
        after = shrunk(before)
        (layer,) = after.layers
        assert layer.values.shape[:3] == (2, 7, 9) and layer.origin == (1, 2, 3) and layer.values.base is None
        assert (layer.name, layer.number) == ("a", 4) and after.volume is not None and not after.volume.array.size
        size = {"axial": (10, 12), "coronal": (4, 12), "sagittal": (4, 10)}[axis]
        for number in range(4):
            pair = [
                Drawings({"": [item]}, SHAPE, axis).find(TargetSpec("x", name="a"), number, (0, 0, *size))
                for item in (before, after)
            ]
            assert [item.mask.tolist() for item in pair[0]] == [item.mask.tolist() for item in pair[1]]
    full = Layer(np.ones(SHAPE, np.uint8))
    assert shrunk(Drawing((full,))).layers[0] is full
    assert shrunk(Drawing((Layer(np.zeros(SHAPE, np.uint8)),))).layers[0].values.size == 0


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int16", "uint16", "int32", "float32"])
def test_voxels_are_counted(dtype: str) -> None:
    rng = np.random.default_rng(0)
    values = (rng.integers(0, 2, SHAPE) if dtype == "bool" else rng.integers(-3 * (dtype[0] != "u"), 9, SHAPE)).astype(
        dtype
    )
    one = drawings(Layer(values))
    assert one.voxels(TargetSpec("x", values=[1, 7, 7]))[None] == np.isin(values, [1, 7]).sum()
    assert one.voxels(TargetSpec("x", value=-3, instances="components"))[None] == (values == -3).sum()
    assert present(values) == [int(value) for value in np.unique(values) if value]


def test_names_that_the_file_does_not_know_and_values_over_several_names() -> None:
    ones = np.ones((1, 2, 2), np.uint8)
    listed = Drawing((Layer(ones, name="polyp", number=3),), names=(("polyp", 3), ("tool", 9)))
    coco = Drawings({"": [listed]}, SHAPE, "axial")
    coco.check(TargetSpec("polyp", name="Polyp"))
    coco.check(TargetSpec("tool", number=9))  # known, though not drawn here
    for target, message in (
        (TargetSpec("tool", name="toool"), "nothing in it has the name 'toool'; it has 3 'polyp', 9 'tool'"),
        (TargetSpec("tool", number=4), "nothing in it has the number 4"),
        (TargetSpec("polyp", value=1), "takes what is inside any of 'polyp', 'tool': choose by name or number"),
    ):
        with pytest.raises(UserError, match=message):
            coco.check(target)
    both = drawings(Layer(ones, name="GTV"), Layer(ones, name="couch"), complete=False)
    with pytest.raises(UserError, match="takes what is inside any of 'GTV', 'couch'"):
        both.check(TargetSpec("tumor", value=1))
    both.check(TargetSpec("tumor", instances="layers"))
    drawings(Layer(ones, name="GTV"), complete=False).check(TargetSpec("tumor", value=1))


def test_colours_that_no_target_takes() -> None:
    picture = np.zeros((1, 10, 12, 3), np.uint8)
    picture[0, 0, :3] = [[255, 0, 0], [254, 3, 1], [0, 0, 255]]
    red = TargetSpec("polyp", colour=[255, 0, 0])
    assert drawings(Layer(picture)).unnamed([red]) == {"": ["[0, 0, 255]", "[254, 3, 1]"]}
    wide = TargetSpec("polyp", colour=[255, 0, 0], tolerance=3)
    assert drawings(Layer(picture)).unnamed([wide]) == {"": ["[0, 0, 255]"]}
