from __future__ import annotations

import io
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from data_shards.errors import UserError
from data_shards.triplet import Provenance, Target, Triplet

SIZE = (11, 7)


def blob(seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(SIZE) > 0.6).astype(np.uint8)


def make(image: np.ndarray, masks: int = 2) -> Triplet:
    targets = tuple(Target.from_mask(blob(n), f"organ {n}", ("Orgän", "x"), "instance") for n in range(masks))
    origin = Provenance(
        dataset="toy", patient="p", volume="v", modality="MR", source_sha256="0" * 64, axis="axial", slice_index=4,
        spacing=(0.5, 0.1 + 0.2), slice_spacing=3.0, intensity={"kind": "window", "range": [0, 255]},
    )  # fmt: skip
    return Triplet("toy-v-a00004", image, targets, ("organ 0", "organ 1", "absent"), origin)


def values(dtype: str, *channels: int) -> np.ndarray:
    kind = np.dtype(dtype)
    numbers = np.random.default_rng(1).random((*SIZE, *channels))
    if kind.kind == "f":
        return ((numbers - 0.5) * 1e4).astype(kind)
    limits = np.iinfo(kind)
    array = (numbers * (float(limits.max) - limits.min) + limits.min).astype(kind)
    array[0, 0], array[0, 1] = limits.min, limits.max
    return array


@pytest.mark.parametrize(
    ("image", "extension"),
    [
        (values("uint8"), "image.png"),
        (values("uint16"), "image.png"),
        (values("uint8", 3), "image.png"),
        (values("int16"), "image.npy"),
        (values("int32"), "image.npy"),
        (values("float32"), "image.npy"),
        (values("float64"), "image.npy"),
        (values("uint16", 3), "image.npy"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.dtype}-{value.ndim}d",
)
def test_what_is_encoded_comes_back(image: np.ndarray, extension: str) -> None:
    triplet = make(image)
    members = triplet.encode()
    assert sorted(members) == sorted([extension, "json"])
    back = Triplet.decode(triplet.key, members)
    assert back.image.dtype == image.dtype
    np.testing.assert_array_equal(back.image, image)
    assert (back.targets, back.looked_for, back.provenance) == (triplet.targets, triplet.looked_for, triplet.provenance)
    assert back.encode() == members


def test_members_are_plain_png_and_json() -> None:
    image = values("uint8", 3)
    members = make(image).encode()
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(members["image.png"]))), image)
    record = json.loads(members["json"])
    assert sorted(record) == ["looked_for", "provenance", "targets", "version"]
    assert record["targets"][0]["synonyms"] == ["Orgän", "x"]


@pytest.mark.parametrize("kind", ["random", "one pixel", "all", "frame", "transposed view"])
def test_run_lengths_are_those_of_pycocotools(kind: str) -> None:
    mask = blob(3)
    if kind == "one pixel":
        mask = np.zeros(SIZE, np.uint8)
        mask[9, 2] = 1
    elif kind == "all":
        mask = np.ones(SIZE, np.uint8)
    elif kind == "frame":
        mask = np.zeros(SIZE, np.uint8)
        mask[[0, -1]] = mask[:, [0, -1]] = 1
    elif kind == "transposed view":
        mask = blob(3)[::-1].T
    target = Target.from_mask(mask * 7, "organ")
    rle = {"size": list(mask.shape), "counts": target.counts.encode()}
    assert target.counts.encode() == coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"]
    np.testing.assert_array_equal(coco_mask.decode(rle), mask)
    np.testing.assert_array_equal(target.mask(), mask)
    assert target.area == int(coco_mask.area(rle)) == int(mask.sum())
    # the box holds the indices of the outermost pixels; COCO's is (x, y, width, height)
    x, y, width, height = coco_mask.toBbox(rle).tolist()
    assert target.box == (x, y, x + width - 1, y + height - 1)


def test_run_lengths_of_many_shapes_are_read_like_pycocotools() -> None:
    rng = np.random.default_rng(5)
    for _ in range(300):
        size = tuple(rng.integers(1, 90, 2))
        mask = np.asfortranarray((rng.random(size) < rng.random() ** 3).astype(np.uint8))
        mask[rng.integers(size[0]), rng.integers(size[1])] = 1
        np.testing.assert_array_equal(Target.from_mask(mask, "organ").mask(), mask)
    large = np.zeros((3000, 2000), np.uint8)
    large[5:2990, 7:1990] = 1
    large[100:200, 300:400] = 0
    np.testing.assert_array_equal(Target.from_mask(large, "organ").mask(), large)


def test_damaged_run_lengths_are_refused_not_filled_from_memory() -> None:
    good = Target.from_mask(blob(), "organ")
    for counts in (
        "",
        "0",
        "1",
        good.counts[:-1],
        good.counts + "1",
        "PPPP",
        "o",
        "\x7f~",
        "é",
        "o" * 30 + "0",
        "L" * 9,
    ):
        with pytest.raises(UserError, match="the mask of 'organ' is damaged: its run lengths do not fill 11 x 7"):
            replace(good, counts=counts).mask()
    with pytest.raises(UserError, match="do not fill 1000000 x 1000000"):
        replace(good, size=(10**6, 10**6)).mask()


def test_an_empty_mask_is_no_target() -> None:
    with pytest.raises(UserError, match="the mask of 'liver' is empty"):
        Target.from_mask(np.zeros(SIZE), "liver")


class Evil:
    def __reduce__(self) -> tuple:
        return (pytest.fail, ("a pickle was opened",))


def test_nothing_is_unpickled() -> None:
    members = make(values("float32")).encode()
    buffer = io.BytesIO()
    np.save(buffer, np.array([[Evil()]], dtype=object), allow_pickle=True)
    for content in (buffer.getvalue(), pickle.dumps(Evil())):
        with pytest.raises(UserError, match=r"sample 'k' cannot be decoded.*allow_pickle"):
            Triplet.decode("k", {**members, "image.npy": content})
    with pytest.raises(ValueError, match="Object arrays"):
        make(np.array([[Evil()]], dtype=object)).encode()


def png(array: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format=kind)
    return buffer.getvalue()


GOOD = make(values("uint8")).encode()
RECORD = json.loads(GOOD["json"])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"json": GOOD["json"]}, "has no image: expected one of image.png, image.npy"),
        ({"image.png": GOOD["image.png"]}, "cannot be decoded (KeyError: 'json')"),
        ({**GOOD, "image.png": GOOD["image.png"][:40]}, "cannot be decoded ("),
        ({**GOOD, "image.png": b""}, "cannot be decoded (UnidentifiedImageError"),
        ({**GOOD, "image.png": png(values("uint8"), "BMP")}, "cannot be decoded (UnidentifiedImageError"),
        ({**GOOD, "image.png": png(values("uint8", 4))}, "its image has shape (11, 7, 4)"),
        ({"json": GOOD["json"], "image.npy": b"\x93NUMPY"}, "cannot be decoded ("),
        ({**GOOD, "json": b"{"}, "cannot be decoded (JSONDecodeError"),
        ({**GOOD, "json": b"\xff\xfe\x00"}, "cannot be decoded ("),
        ({**GOOD, "json": b"[]"}, "cannot be decoded (TypeError"),
        ({**GOOD, "json": json.dumps({**RECORD, "version": 99}).encode()}, "has format 99, newer than 1: update"),
        ({**GOOD, "json": json.dumps({**RECORD, "targets": [{"term": "x"}]}).encode()}, "cannot be decoded (TypeError"),
        ({**GOOD, "json": json.dumps({**RECORD, "provenance": 3}).encode()}, "cannot be decoded (AttributeError"),
    ],
)
def test_damage_is_one_line_with_the_key(members: dict[str, bytes], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Triplet.decode("toy-v-a00004", members)
    assert str(caught.value).startswith("sample 'toy-v-a00004'")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_fields_of_a_later_minor_version_are_ignored() -> None:
    record = {**RECORD, "extra": 1, "provenance": {**RECORD["provenance"], "scanner": "x"}}
    record["targets"] = [{**RECORD["targets"][0], "colour": "red"}]
    back = Triplet.decode("k", {**GOOD, "json": json.dumps(record).encode()})
    assert back.provenance == make(values("uint8")).provenance and len(back.targets) == 1
