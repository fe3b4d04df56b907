from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from data_shards.errors import UserError
from data_shards.readers import Drawing, Ground, Volume, check_options, coco, read_drawing

SIZE = (40, 50)
POLYGON = [10.0, 5.0, 30.5, 6.0, 28.0, 20.25, 12.0, 18.0]


def image(number: int = 1, name: str = "a.png", size: tuple[int, int] = SIZE) -> dict[str, Any]:
    return {"id": number, "file_name": name, "height": size[0], "width": size[1]}


def note(segmentation: Any, number: int = 7, **changes: Any) -> dict[str, Any]:
    return {"id": number, "image_id": 1, "category_id": 3, "segmentation": segmentation, "iscrowd": 0, **changes}


def save(path: Path, annotations: list[dict[str, Any]], images: list[dict[str, Any]] | None = None) -> Path:
    categories = [{"id": 3, "name": "polyp"}, {"id": 9, "name": "Instrument"}]
    record = {"images": images or [image()], "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(record))
    return path


def read(path: Path, name: str = "a.png", size: tuple[int, int] = SIZE, **options: Any) -> Drawing:
    volume = Volume(np.zeros((1, *size), np.uint8), None, flat=True)
    return read_drawing(path, Ground(path.parent / name, volume), **options)


def whole(drawing: Drawing, number: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Return a layer as a mask of the whole image, having checked that its box is tight."""
    layer = drawing.layers[number]
    assert layer.values.dtype == np.uint8 and layer.values.shape[0] == 1 and layer.origin[0] == 0
    for edge in (layer.values[0, 0], layer.values[0, -1], layer.values[0, :, 0], layer.values[0, :, -1]):
        assert edge.any()
    mask = np.zeros(size, np.uint8)
    _, top, left = layer.origin
    mask[top : top + layer.values.shape[1], left : left + layer.values.shape[2]] = layer.values[0]
    return mask


def polygons(rng: np.random.Generator) -> list[list[float]]:
    count = int(rng.integers(1, 4))
    return [rng.uniform(-10, 55, 2 * int(rng.integers(3, 12))).round(2).tolist() for _ in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_masks_are_those_of_cocos_own_tools(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    blob = np.asfortranarray(rng.random(SIZE) > 0.8, dtype=np.uint8)
    runs = [int(run) for run in np.diff(np.flatnonzero(np.diff(blob.T.ravel(), prepend=2, append=2)))]
    runs = [0, *runs] if blob[0, 0] else runs
    annotations = [
        note(polygons(rng), 1),
        note({"size": list(SIZE), "counts": coco_mask.encode(blob)["counts"].decode()}, 2),
        note({"size": list(SIZE), "counts": runs}, 3, iscrowd=1, category_id=9),
    ]
    path = save(tmp_path / "a.json", annotations)
    drawing, reference = read(path), COCO(str(path))
    assert [(layer.name, layer.number) for layer in drawing.layers] == [("polyp", 3)] * 2 + [("Instrument", 9)]
    assert drawing.complete
    for number in range(3):
        np.testing.assert_array_equal(whole(drawing, number), reference.annToMask(reference.anns[number + 1]))
    np.testing.assert_array_equal(whole(drawing, 1), blob)
    np.testing.assert_array_equal(whole(drawing, 2), blob)


@pytest.mark.parametrize("place", [np.s_[0, 0], np.s_[-1, -1], np.s_[:, :], np.s_[:, 4:6], np.s_[3:5, 7]])
def test_boxes_at_the_edges(tmp_path: Path, place: Any) -> None:
    mask = np.zeros(SIZE, np.uint8, order="F")
    mask[place] = 1
    path = save(tmp_path / "a.json", [note({"size": list(SIZE), "counts": coco_mask.encode(mask)["counts"].decode()})])
    np.testing.assert_array_equal(whole(read(path)), mask)


def test_crowds(tmp_path: Path) -> None:
    path = save(tmp_path / "a.json", [note([POLYGON], 1), note([POLYGON], 2, iscrowd=1)])
    assert len(read(path).layers) == 2
    assert len(read(path, crowd="drop").layers) == 1


def test_annotations_of_other_images_are_left_out(tmp_path: Path) -> None:
    images = [image(1, "a.png"), image(2, "b.png"), image(3, "c.png")]
    path = save(tmp_path / "a.json", [note([POLYGON], 1), note([POLYGON], 2, image_id=2, category_id=9)], images)
    assert [layer.name for layer in read(path, "b.png").layers] == ["Instrument"]
    assert read(path, "c.png").layers == () and read(path, "c.png").complete


def test_the_longest_name_that_ends_the_path_is_the_image(tmp_path: Path) -> None:
    images = [
        image(1, "a.png"),
        image(2, "x/a.png"),
        image(3, ".\\y\\a.png"),
        image(4, "x/y/a.png"),
        image(5, "z/a.png"),
    ]
    annotations = [
        note([POLYGON], number, image_id=number, category_id=3 + 6 * (number % 2)) for number in (1, 2, 3, 4)
    ]
    path = save(tmp_path / "a.json", annotations, images)
    names = {name: [layer.name for layer in read(path, name).layers] for name in ("a.png", "x/a.png", "y/a.png")}
    assert names == {"a.png": ["Instrument"], "x/a.png": ["polyp"], "y/a.png": ["Instrument"]}
    assert [layer.name for layer in read(path, "x/y/a.png").layers] == ["polyp"]
    assert read(path, "z/a.png").layers == ()
    assert [layer.name for layer in read(path, "w/a.png").layers] == ["Instrument"]  # a bare name fits any folder


def test_images_that_are_not_clear(tmp_path: Path) -> None:
    path = save(
        tmp_path / "a.json", [note([POLYGON])], [image(1, "train/a.png"), image(2, "train/b.png"), image(3, "b.png")]
    )
    with pytest.raises(UserError, match=r"val/a\.png: .* another folder only, 'train/a\.png'.*match: name"):
        read(path, "val/a.png")
    assert len(read(path, "val/a.png", match="name").layers) == 1
    with pytest.raises(UserError, match=r"may be 'train/b\.png' \(id 2\) and 'b\.png' \(id 3\)"):
        read(path, "train/b.png", match="name")
    with pytest.raises(UserError, match=r"no image is called 'c\.png'.*unlisted: empty"):
        read(path, "c.png")
    assert read(path, "c.png", unlisted="empty").layers == ()
    path = save(tmp_path / "b.json", [], [image(1), image(2)])
    with pytest.raises(UserError, match=r"may be 'a\.png' \(id 1\) and 'a\.png' \(id 2\)"):
        read(path)


def test_another_size(tmp_path: Path) -> None:
    path = save(tmp_path / "a.json", [note([POLYGON])])
    with pytest.raises(UserError, match=r"states 50 x 40 pixels for 'a\.png', but .*a\.png has 40 x 50"):
        read(path, size=(50, 40))
    unknown = {"id": 1, "file_name": "a.png"}
    assert whole(read(save(tmp_path / "b.json", [note([POLYGON])], [unknown]))).sum() > 100
    volume = Volume(np.zeros((2, *SIZE), np.uint8), None)
    with pytest.raises(UserError, match=r"has 2 slices, but a\.json describes single images"):
        read_drawing(path, Ground(tmp_path / "a.png", volume))


RUNS = r"run lengths do not fill 40 x 50 pixels"
OUTSIDE = "lies outside the image"


@pytest.mark.parametrize(
    ("segmentation", "text"),
    [
        (None, "has no 'segmentation'"),
        ([], "has no 'segmentation'"),
        ("text", "has no 'segmentation'"),
        ([[1, 2, 3, 4]], "has 4 numbers; x and y of three points or more"),
        ([[1, 2, 3, 4, 5]], "has 5 numbers"),
        ([[1, 2, 3, 4, 5, 6, 7]], "has 7 numbers"),
        ([1, 2, 3, 4, 5, 6], "no list of numbers"),
        ([[1, 2, 3, 4, 5, "6"]], "no list of numbers"),
        ([[1, 2, 3, 4, 5, True]], "no list of numbers"),
        ([[1, 2, 3, 4, 5, None]], "no list of numbers"),
        ([[[1, 2], [3, 4], [5, 6]]], "no list of numbers"),
        ([[1e9, 2, 3, 4, 5, 6]], OUTSIDE),
        ([[10**400, 2, 3, 4, 5, 6]], OUTSIDE),
        ([[-1e308, 2, 3, 4, 1e308, 6]], OUTSIDE),
        ([[60, 2, 70, 4, 65, 16]], "its mask is empty, or lies outside"),
        ([[-30, 2, -20, 4, -25, 16]], "its mask is empty, or lies outside"),
        ({"size": [40, 50]}, RUNS),
        ({"size": [40, 50], "counts": None}, RUNS),
        ({"size": [40, 50], "counts": []}, RUNS),
        ({"size": [40, 50], "counts": [5, 10]}, RUNS),
        ({"size": [40, 50], "counts": [1990, 11]}, RUNS),
        ({"size": [40, 50], "counts": [2010, -10]}, RUNS),
        ({"size": [40, 50], "counts": [1990.0, 10]}, RUNS),
        ({"size": [40, 50], "counts": [2**70, 10]}, RUNS),
        ({"size": [40, 50], "counts": "garbage"}, RUNS),
        ({"size": [40, 50], "counts": "é"}, RUNS),
        ({"size": [40, 50], "counts": "0" * 10}, RUNS),
        ({"size": [40, 50], "counts": [2000]}, "its mask is empty"),
        ({"size": [40, 50], "counts": [2000, 0]}, "its mask is empty"),
        ({"size": [50, 40], "counts": [1990, 10]}, r"its mask has the size \[50, 40\], its image \[40, 50\]"),
        ({"counts": [1990, 10]}, "its mask has the size None"),
    ],
)
def test_damaged_masks_are_named(tmp_path: Path, segmentation: Any, text: str) -> None:
    path = save(tmp_path / "a.json", [note([POLYGON], 1), note(segmentation, 77)])
    with pytest.raises(UserError, match=rf"a\.json: annotation 77 of 'a\.png': .*{text}") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_polygons_that_leave_the_image_are_cut(tmp_path: Path) -> None:
    path = save(tmp_path / "a.json", [note([[-20, -20, 80, -20, 80, 60, -20, 60]])])
    assert whole(read(path)).all()


def test_an_endless_outline_is_refused(tmp_path: Path) -> None:
    points = [0.0, 0.0, 3000.0, 3000.0] * 2000
    path = save(tmp_path / "a.json", [note([points])], [image(size=(3000, 3000))])
    with pytest.raises(UserError, match="outline is longer than any shape's"):
        read(path, size=(3000, 3000))


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (note([POLYGON], category_id=4), "its category 4 is not among the categories"),
        (note([POLYGON], category_id="3"), "its category '3' is not among"),
        (note([POLYGON], category_id=True), "its category True is not among"),
        (note([POLYGON], image_id=2), "annotation 7: no image has its 'image_id'"),
        (note([POLYGON], image_id=[1]), "annotation 7: no image has its 'image_id'"),
    ],
)
def test_annotations_of_nothing(tmp_path: Path, annotation: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        read(save(tmp_path / "a.json", [annotation]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is no JSON"),
        ("[1, 2]", "it is no JSON object"),
        ("{}", "it has no list of 'images'"),
        ('{"images": {}, "annotations": [], "categories": []}', "it has no list of 'images'"),
        ('{"images": [], "annotations": [3], "categories": []}', "it has no list of 'annotations'"),
        ('{"images": [], "annotations": []}', "it has no list of 'categories'"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "image 1: needs a 'file_name' and an 'id'"),
        ('{"images": [{"file_name": "a"}], "annotations": [], "categories": []}', "image None: needs a 'file_name'"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "category 1: needs a whole number"),
        ("[" * 100_000, "it is no JSON"),
        ('{"images": ' * 100_000, "it is no JSON"),
        ('{"images": [NaN], "annotations": [], "categories": []}', "it holds NaN"),
    ],
)
def test_other_json(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=rf"a\.json: .*{message}"):
        read(tmp_path / "a.json")


def test_ids_that_are_given_twice(tmp_path: Path) -> None:
    path = save(tmp_path / "a.json", [], [image(1, "a.png"), image(1, "b.png")])
    with pytest.raises(UserError, match="two images have the id 1"):
        read(path)
    record = json.loads(save(tmp_path / "b.json", []).read_text())
    record["categories"].append({"id": 3, "name": "other"})
    (tmp_path / "b.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="two categories have the id 3"):
        read(tmp_path / "b.json")


def test_a_file_is_parsed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    monkeypatch.setattr(coco, "read_json", lambda data, limit: parsed.append(1) or json.loads(data))
    path = save(tmp_path / "a.json", [note([POLYGON])], [image(1, "a.png"), image(2, "b.png")])
    assert (len(read(path, "a.png").layers), len(read(path, "b.png").layers)) == (1, 0)
    assert len(parsed) == 1
    save(path, [note([POLYGON], image_id=2)], [image(1, "a.png"), image(2, "b.png")])
    path.write_text(path.read_text() + " ")
    assert (len(read(path, "a.png").layers), len(read(path, "b.png").layers)) == (0, 1)
    assert len(parsed) == 2


def test_options_are_checked(tmp_path: Path) -> None:
    path = save(tmp_path / "a.json", [])
    check_options(tmp_path / "a.png", [path], {"crowd": "drop", "unlisted": "empty", "match": "name"})
    with pytest.raises(UserError, match=r"reader\.crowd: expected one of keep, drop"):
        check_options(tmp_path / "a.png", [path], {"crowd": "no"})
