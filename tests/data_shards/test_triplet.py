from __future__ import annotations

import io
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import zstandard
from PIL import Image
from pycocotools import mask as coco_mask

from data_shards import codecs
from data_shards.codecs import Codec
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
@pytest.mark.parametrize("codec", ["png", "zstd"])
def test_what_is_encoded_comes_back(image: np.ndarray, extension: str, codec: Codec) -> None:
    triplet = make(image)
    members = triplet.encode(codec)
    assert sorted(members) == sorted(["image.npy.zst" if codec == "zstd" else extension, "json"])
    back = Triplet.decode(triplet.key, members)
    assert back.image.dtype == image.dtype
    np.testing.assert_array_equal(back.image, image)
    assert (back.targets, back.looked_for, back.provenance) == (triplet.targets, triplet.looked_for, triplet.provenance)
    assert back.encode(codec) == members


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
    for content, message in (
        (buffer.getvalue(), "holds objects, which are never read"),
        (pickle.dumps(Evil()), "magic"),
    ):
        with pytest.raises(UserError, match=f"sample 'k': .*{message}"):
            Triplet.decode("k", {**members, "image.npy": content})
        packed = {"json": members["json"], "image.npy.zst": zstandard.ZstdCompressor().compress(content)}
        with pytest.raises(UserError, match=f"sample 'k': .*{message}"):
            Triplet.decode("k", packed)
    with pytest.raises(UserError, match="cannot be stored: its image holds values of type object"):
        make(np.array([[Evil()]], dtype=object), masks=0).encode()


def png(array: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format=kind)
    return buffer.getvalue()


GOOD = make(values("uint8")).encode()
RECORD = json.loads(GOOD["json"])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"json": GOOD["json"]}, "it has no image: expected one of image.png, image.npy, image.npy.zst"),
        ({"image.png": GOOD["image.png"]}, "it has no json"),
        ({**GOOD, "image.png": GOOD["image.png"][:40]}, "its image.png cannot be decoded (SyntaxError: broken PNG"),
        ({**GOOD, "image.png": b""}, "its image.png is no PNG"),
        ({**GOOD, "image.png": png(values("uint8"), "BMP")}, "its image.png is no PNG"),
        (
            {**GOOD, "image.png": png(values("uint8", 4))},
            "has bit depth 8 and colour type 6; grey (8 or 16 bits) or RGB",
        ),
        ({"json": GOOD["json"], "image.npy": b"\x93NUMPY"}, "its image.npy cannot be decoded ("),
        ({**GOOD, "json": b"{"}, "its json is damaged: it is no JSON (JSONDecodeError"),
        ({**GOOD, "json": b"\xff\xfe\x00"}, "its json is damaged: it is no JSON (UnicodeDecodeError"),
        ({**GOOD, "json": b"[]"}, "its json is damaged: it is no JSON object"),
        ({**GOOD, "json": json.dumps({**RECORD, "version": 99}).encode()}, "has format 99, newer than 1: update"),
        ({**GOOD, "json": json.dumps({**RECORD, "targets": [{"term": "x"}]}).encode()}, "its target lacks 'size'"),
        ({**GOOD, "json": json.dumps({**RECORD, "provenance": 3}).encode()}, "its provenance is no object"),
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


def test_what_version_1_did_not_have_has_its_default() -> None:
    new = ("previous", "next", "patch", "split_unit")
    origin = {name: value for name, value in RECORD["provenance"].items() if name not in new}
    back = Triplet.decode("k", {**GOOD, "json": json.dumps({**RECORD, "provenance": origin}).encode()})
    assert back.provenance == make(values("uint8")).provenance
    assert [getattr(back.provenance, name) for name in new] == [None, None, None, "patient"]


def test_neighbours_and_patches_come_back() -> None:
    triplet = make(values("uint8"))
    origin = replace(triplet.provenance, previous="a-1", next="a-3", patch=(0, 512), split_unit="image")
    members = replace(triplet, provenance=origin).encode()
    assert Triplet.decode(triplet.key, members).provenance == origin
    assert json.loads(members["json"])["provenance"]["patch"] == [0, 512]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<i2", ">i2", ">f4", "|b1"])
def test_npy_of_others_is_read_in_the_machines_byte_order(order: str, dtype: str) -> None:
    image = np.asarray(values("int16").astype(dtype), order=order)  # type: ignore[call-overload]
    buffer = io.BytesIO()
    np.save(buffer, image)
    for extension, data in (
        ("image.npy", buffer.getvalue()),
        ("image.npy.zst", zstandard.ZstdCompressor(level=1).compress(buffer.getvalue())),
    ):
        back = Triplet.decode("k", {"json": GOOD["json"], extension: data})
        assert back.image.dtype.isnative and back.image.dtype == np.dtype(dtype).newbyteorder("=")
        np.testing.assert_array_equal(back.image, image)


def test_measures_are_those_of_the_mask() -> None:
    rng = np.random.default_rng(2)
    for _ in range(300):
        size = tuple(rng.integers(1, 40, 2))
        mask = (rng.random(size) < rng.random() ** 4).astype(np.uint8)
        mask[rng.integers(size[0]), rng.integers(size[1])] = 1
        target = Target.from_mask(mask, "organ")
        assert target.measure() == (target.box, target.area)
        flat = np.zeros(mask.size, np.uint8)
        for start, stop in zip(*target.spans(), strict=True):
            flat[start:stop] = 1
        np.testing.assert_array_equal(flat.reshape(mask.shape[::-1]).T, mask)
    empty = replace(
        Target.from_mask(blob(), "organ"),
        counts=coco_mask.encode(np.zeros(SIZE, np.uint8, order="F"))["counts"].decode(),
    )
    assert empty.measure() == (None, 0) and not empty.mask().any()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("codec", ["zstd", "plain"])
def test_an_image_read_at_once_is_the_one_read_piece_by_piece(
    codec: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.asfortranarray(values(dtype)) if dtype == "int16" else values(dtype)
    plain = io.BytesIO()
    np.save(plain, image)
    extension = "image.npy.zst" if codec == "zstd" else "image.npy"
    data = codecs._encode_zstd(image) if codec == "zstd" else plain.getvalue()
    damaged = [data[:-3], data[:20] + bytes([data[20] ^ 8]) + data[21:], data + b"more", data + data, data[:9]]

    def outcome(content: bytes) -> object:
        try:
            return codecs.decode_image(extension, content).tolist()
        except UserError as error:
            return str(error)

    at_once = [outcome(content) for content in (data, *damaged)]
    monkeypatch.setattr(codecs, "_AT_ONCE", -1)
    assert [outcome(content) for content in (data, *damaged)] == at_once
    assert at_once[0] == image.tolist() and sum(isinstance(found, str) for found in at_once) >= 4
    read = codecs.decode_image(extension, data)
    assert read.dtype == image.dtype and read.dtype.isnative


def test_each_thread_has_a_decoder_of_its_own() -> None:
    image = np.random.default_rng(0).integers(0, 255, (300, 300), np.uint8)
    data = [codecs._encode_zstd(np.roll(image, number)) for number in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda turn: codecs.decode_image("image.npy.zst", data[turn % 8]), range(200)))
    assert all(np.array_equal(one, np.roll(image, turn % 8)) for turn, one in enumerate(found))
