"""Foreign samples as triplets: what their members become, and what is refused."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zlib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import mutate
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from data_shards.errors import UserError
from data_shards.foreign import MAX_INSTANCES, Layout, decode, wanted
from data_shards.patterns import compile_pattern
from data_shards.pictures import decode_labels, decode_picture
from data_shards.triplet import Target, Triplet

H, W = 23, 17
RNG = np.random.default_rng(5)
GREY = RNG.integers(0, 256, (H, W), dtype=np.uint8)
RGB = RNG.integers(0, 256, (H, W, 3), dtype=np.uint8)
MASK = (RNG.random((H, W)) > 0.7).astype(np.uint8)
LABELS = RNG.integers(0, 5, (H, W), dtype=np.uint8)
PLAIN = Layout(image=("jpg", "png"), masks=("mask.png",), term="polyp")


def png(array: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(buffer, format="PNG", **options)
    return buffer.getvalue()


def jpeg(array: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(buffer, format="JPEG", **options)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def raw_png(depth: int, colour: int, rows: bytes, size: tuple[int, int] = (H, W)) -> bytes:
    """A PNG of any depth, as Pillow does not write them."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", size[1], size[0], depth, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    packed = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def bits(values: np.ndarray, depth: int) -> bytes:
    """The rows of a PNG of less than 8 bits."""
    per_byte = 8 // depth
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % per_byte)))
    parts = padded.reshape(len(values), -1, per_byte).astype(np.uint16)
    packed = sum(parts[..., n] << (8 - depth * (n + 1)) for n in range(per_byte))
    return b"".join(b"\0" + row.astype(np.uint8).tobytes() for row in packed)


def palette_image(values: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    colours = np.random.default_rng(8).integers(0, 256, (256, 3), dtype=np.uint8)
    image = Image.fromarray(values, mode="P")
    image.putpalette(colours.tobytes())
    return image, colours[values]


# --- pictures


def test_images_are_what_was_stored() -> None:
    wide = RNG.integers(0, 65536, (H, W), dtype=np.uint16)
    opaque = np.dstack([RGB, np.full((H, W), 255, np.uint8)])
    indexed, colours = palette_image(LABELS)
    cases: list[tuple[str, bytes, np.ndarray]] = [
        ("png", png(GREY), GREY),
        ("png", png(RGB), RGB),
        ("img.png", png(wide), wide),
        ("png", png(opaque), RGB),
        ("png", png(Image.fromarray(opaque[..., 2:], mode="LA")), opaque[..., 2]),
        ("png", png(indexed), colours),
        ("png", png(Image.fromarray(MASK * 255).convert("1")), MASK * np.uint8(255)),
        ("png", raw_png(4, 0, bits(LABELS, 4)), LABELS * np.uint8(17)),
        ("npy", npy(wide.astype(np.float32)), wide.astype(np.float32)),
        ("npy", npy(np.asfortranarray(RGB.astype(">i2"))), RGB.astype(np.int16)),
    ]
    for extension, data, expected in cases:
        found = decode_picture(extension, data)
        assert found.dtype == expected.dtype and found.dtype.isnative
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("array", [GREY, RGB])
@pytest.mark.parametrize("options", [{"quality": 90}, {"quality": 30, "progressive": True}])
def test_jpegs_are_what_pillow_shows(array: np.ndarray, options: dict[str, Any]) -> None:
    data = jpeg(array, **options)
    np.testing.assert_array_equal(decode_picture("jpg", data), np.asarray(Image.open(io.BytesIO(data))))
    assert decode_picture("jpeg", data).shape == array.shape


def test_labels_are_the_numbers_in_the_file() -> None:
    indexed, _ = palette_image(LABELS)
    indexed_clear = png(indexed, transparency=0)  # a screen does not show 0, but it is a number all the same
    small, tiny = LABELS % 4, LABELS % 2
    cases: list[tuple[str, bytes, np.ndarray]] = [
        ("png", png(LABELS), LABELS),
        ("png", png(LABELS.astype(np.uint16) * 300), LABELS.astype(np.uint16) * 300),
        ("seg.png", indexed_clear, LABELS),
        ("png", raw_png(4, 0, bits(LABELS, 4)), LABELS),
        ("png", raw_png(2, 0, bits(small, 2)), small),
        ("png", raw_png(1, 0, bits(tiny, 1)), tiny.astype(bool)),
        ("png", png(np.dstack([LABELS] * 3)), LABELS),
        ("png", png(np.dstack([LABELS] * 3 + [np.full_like(LABELS, 255)])), LABELS),
        ("npy", npy(LABELS.astype(np.int32) - 1), LABELS.astype(np.int32) - 1),
        ("npy", npy(LABELS.astype(np.float64)), LABELS.astype(np.int64)),
    ]
    for extension, data, expected in cases:
        found = decode_labels(extension, data)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def animated() -> bytes:
    return png(Image.fromarray(GREY), save_all=True, append_images=[Image.fromarray(255 - GREY)])


def many_scans() -> bytes:
    data = jpeg(GREY, progressive=True)
    return data[:-2] + b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00" * 201 + data[-2:]


def wide_jpeg() -> bytes:
    data = bytearray(jpeg(GREY))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", 60_000, 60_000)
    return bytes(data)


CLEAR = np.dstack([RGB, np.full((H, W), 254, np.uint8)])
SPOT = tuple(map(int, RGB[3, 4]))


@pytest.mark.parametrize(
    ("decoder", "extension", "data", "message"),
    [
        (decode_picture, "png", png(CLEAR), "its png is transparent in places"),
        (decode_picture, "png", png(RGB, transparency=SPOT), "its png is transparent in places"),
        (decode_picture, "png", png(GREY, transparency=int(GREY[0, 0])), "its png is transparent in places"),
        (decode_picture, "png", png(palette_image(LABELS)[0], transparency=1), "its png is transparent in places"),
        (decode_picture, "png", raw_png(16, 2, (b"\0" + bytes(6 * W)) * H), "its png has 16 bits for each colour"),
        (decode_picture, "png", raw_png(3, 0, b""), "its png has bit depth 3 and colour type 0"),
        (decode_picture, "png", raw_png(8, 0, b"", (60_000, 16_000)), "its png declares 60000 x 16000 pixels, more"),
        (decode_picture, "png", raw_png(8, 0, b"", (60_000, 60_000)), "its png is refused: its image has shape"),
        (decode_picture, "png", raw_png(8, 0, b"\0\0"), r"its png cannot be decoded \(OSError"),
        (decode_picture, "png", png(GREY)[:-40], r"its png cannot be decoded \("),
        (decode_picture, "png", animated(), "its png moves"),
        (decode_picture, "png", png(GREY, exif=turned(3)), r"its png is turned on the screen .*\(orientation 3\)"),
        (decode_picture, "jpg", jpeg(RGB, exif=turned(6)), r"its jpg is turned on the screen .*\(orientation 6\)"),
        (decode_picture, "jpg", jpeg(Image.fromarray(RGB).convert("CMYK")), "its jpg has colours of the kind CMYK"),
        (decode_picture, "jpg", many_scans(), "its jpg has more than 200 scans"),
        (decode_picture, "jpg", wide_jpeg(), "its jpg is refused|its jpg declares 60000 x 60000 pixels"),
        (decode_picture, "jpg", jpeg(RGB)[:-100], r"its jpg cannot be decoded \(OSError: image file is truncated"),
        (decode_picture, "jpg", png(RGB), "its jpg is no JPEG"),
        (decode_picture, "png", jpeg(RGB), "its png is no PNG"),
        (decode_picture, "webp", b"RIFF", "its webp is not read: jpg, jpeg, png, npy are"),
        (decode_picture, "npy", npy(np.zeros((2, 2, 2, 2))), "its npy is refused: its image has shape"),
        (decode_picture, "npy", npy(np.array([[1j]])), "its npy is refused: its image holds values of type complex128"),
        (decode_labels, "seg.png", png(RGB), "its seg.png has colours"),
        (decode_labels, "seg.png", png(np.dstack([GREY] * 3 + [GREY // 2])), "its seg.png is transparent"),
        (decode_labels, "jpg", jpeg(LABELS), "its jpg is not read: png, npy are"),
        (decode_labels, "npy", npy(LABELS + 0.5), "its npy holds fractions"),
        (decode_labels, "npy", npy(np.full((H, W), np.nan)), "its npy holds fractions or what is no number"),
        (decode_labels, "npy", npy(LABELS[None]), r"its npy has shape \(1, 23, 17\); a mask is \(H, W\)"),
    ],
)  # fmt: skip
def test_pictures_that_could_mean_two_things_or_are_damaged(
    decoder: Any, extension: str, data: bytes, message: str
) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        decoder(extension, data)


def test_opacity_that_hides_nothing_is_dropped() -> None:
    rare = next(value for value in range(256) if value not in GREY)
    np.testing.assert_array_equal(decode_picture("png", png(GREY, transparency=rare)), GREY)
    assert tuple(RGB.min(axis=(0, 1))) > (0, 0, 0) or not (RGB == 0).all(axis=2).any()
    np.testing.assert_array_equal(decode_picture("png", png(RGB, transparency=(0, 0, 0))), RGB)


def test_an_upright_tag_is_no_reason_to_refuse() -> None:
    assert decode_picture("jpg", jpeg(RGB, exif=turned(1))).shape == RGB.shape


# --- layouts

FULL = Layout(
    image=("jpg", "image.png"),
    masks=("a.png", "b.npy"),
    mask_terms={"a.png": "left kidney"},
    terms={-1: "", 3: "Zyste, groß"},
    dataset="toy",
    modality="CT",
    patient="^(P[0-9]+)_",
)


def test_a_layout_comes_back_from_json_and_from_pickle() -> None:
    for layout in (PLAIN, FULL, Layout(("npy",), json="json", json_term="label", instances=True)):
        assert Layout.from_json(layout.to_json()) == layout
        assert pickle.loads(pickle.dumps(layout)) == layout
    assert json.loads(FULL.to_json())["terms"] == {"-1": "", "3": "Zyste, groß"}
    assert replace(FULL, terms=dict(reversed(FULL.terms.items()))).to_json() == FULL.to_json()


def test_a_damaged_layout_is_one_line() -> None:
    record = json.loads(FULL.to_json())
    for name in [item.name for item in fields(Layout)]:
        with pytest.raises(UserError, match=f"the layout of the samples is damaged .it lacks '{name}'.: run"):
            Layout.from_json(json.dumps({key: value for key, value in record.items() if key != name}))
    with pytest.raises(UserError, match="it has 'more'"):
        Layout.from_json(json.dumps({**record, "more": 1}))
    for text in ("", "[]", "{", '{"image": NaN}', json.dumps({**record, "terms": {"1.5": "x"}})):
        with pytest.raises(UserError, match="the layout of the samples is damaged"):
            Layout.from_json(text)
    for name in record:
        for value in mutate.NASTY:
            try:
                layout = Layout.from_json(json.dumps({**record, name: value}))
            except UserError as error:
                assert "\n" not in str(error)
            else:
                assert Layout.from_json(layout.to_json()) == layout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": ()}, "no image: give --image EXT"),
        ({"masks": ()}, "no masks: give --mask EXT, or --json EXT"),
        ({"image": ("webp",)}, "--image webp: only jpg, jpeg, png, npy are read here"),
        ({"masks": ("mask.jpg",)}, "--mask mask.jpg: only png, npy are read here: JPEG blurs the edge of a mask"),
        ({"masks": ("jpg",)}, "the member .jpg is given twice"),
        ({"text": "MASK"}, "'MASK' is no extension"),
        ({"text": "a/b"}, "'a/b' is no extension"),
        ({"term": ""}, "it is not clear which term the masks have: give --term TEXT"),
        ({"terms": {1: "liver"}}, "--term polyp: all masks have terms already"),
        ({"mask_terms": {"mask.png": "liver"}}, "--term polyp: all masks have terms already"),
        ({"mask_terms": {"seg.png": "liver"}}, "--mask: 'seg.png' has a term but is no mask"),
        ({"terms": {1: "liver"}, "term": "", "instances": True}, "--terms: with --instances"),
        ({"json": "json"}, "--json json: with masks only a term is read from it: give --json-term KEY"),
        ({"json_term": "label"}, "--json-term: give --json EXT too"),
        ({"json": "json", "json_term": "x", "text": "txt"}, "--text and --json-term both give the term"),
        ({"masks": (), "json": "json", "terms": {1: "a"}}, "--terms: annotations have no values"),
        ({"patient": "P[0-9]+"}, "--patient: the pattern 'P.0-9.+' needs one group"),
        ({"patient": "((a+)+"}, r"--patient: '\(\(a\+\)\+' is no regular expression"),
        ({"patient": "(?:a+)+(b)"}, r"--patient: the pattern '\(\?:a\+\)\+\(b\)' could take hours"),
    ],
)
def test_a_layout_whose_parts_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        replace(PLAIN, **changes)


@pytest.mark.parametrize(
    ("members", "given", "expected"),
    [
        (["json", "image.png"], None, None),
        (["json", "image.npy.zst"], None, None),
        (["jpg", "mask.png", "txt"], None, Layout(("jpg",), ("mask.png",), text="txt")),
        (["JPG", "Seg.PNG", "cls"], {"term": "x"}, Layout(("jpg",), ("seg.png",), term="x")),
        (["jpg", "json", "jpeg"], {"term": "x"}, Layout(("jpg", "jpeg"), json="json", term="x", instances=True)),
        (["image.npy", "label.npy"], {"terms": {1: "a"}}, Layout(("image.npy",), ("label.npy",), terms={1: "a"})),
        (["jpg", "png"], {"masks": ("png",), "term": "x"}, Layout(("jpg",), ("png",), term="x")),
        (["jpg", "liver.png"], {"masks": ("liver.png",), "mask_terms": {"liver.png": "liver"}},
         Layout(("jpg",), ("liver.png",), {"liver.png": "liver"})),
        (["png", "mask1.png", "mask2.png", "caption", "json"], None,
         Layout(("png",), ("mask1.png", "mask2.png"), text="caption")),
        (["png", "seg.png", "json"], {"json_term": "label"},
         Layout(("png",), ("seg.png",), json="json", json_term="label")),
        (["image.png", "json"], {"json": "json", "term": "x"},
         Layout(("image.png",), json="json", term="x", instances=True)),
    ],
)  # fmt: skip
def test_roles_are_told_from_extensions(members: list[str], given: Any, expected: Layout | None) -> None:
    assert Layout.detect(members, given) == expected
    assert Layout.detect(members * 3, given) == expected


@pytest.mark.parametrize(
    ("members", "given", "message"),
    [
        (["jpg", "png"], {"term": "x"}, r"which members are images and which are masks \(members found: .jpg, .png\): "
                                        "give --image EXT and --mask EXT"),
        (["jpg", "txt"], None, r"which members are masks \(members found: .jpg, .txt\): give --mask EXT, or --json"),
        (["jpg", "mask.png"], None, r"which term the masks have \(members found: .jpg, .mask.png\): give --term TEXT"),
        (["txt", "cls"], {"term": "x"}, "which members are images"),
        ([], None, r"which members are images and which are masks \(members found: none\)"),
        (["jpg", "mask.png", "txt", "caption"], None, "which term the masks have"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_asked(members: list[str], given: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^it is not clear {message}"):
        Layout.detect(members, given)


def test_wanted_members() -> None:
    assert wanted(PLAIN) == {"jpg", "png", "mask.png", "JPG", "PNG", "MASK.PNG"}
    assert {"txt", "json"} <= wanted(Layout(("jpg",), json="json", text="txt"))


def test_patterns_that_are_safe_are_taken() -> None:
    for text in (r"^([^_]+)_", r"(\d+)", r"^(?:[^/]+/)?(P\d+)_", r"^(.*)_.*_", "^(foo|bar)/"):
        compile_pattern(text)
    for text in (r"^(a|aa)*$", r"(.*).*.*x", r"(a)\1", "(?=a)(b)", "^(?:a?){30}(b)", "(x)" + "y" * 500):
        with pytest.raises(UserError, match=r"could take hours|more than 500"):
            compile_pattern(text)


# --- samples


def members(**changes: bytes | None) -> dict[str, bytes]:
    found = {"png": png(RGB), "mask.png": png(MASK), **{n.replace("_", "."): data for n, data in changes.items()}}
    return {name: data for name, data in found.items() if data is not None}


def summary(triplet: Triplet) -> list[tuple[str, str, int]]:
    return [(target.term, target.kind, target.area) for target in triplet.targets]


def test_an_image_and_its_mask() -> None:
    triplet = decode(PLAIN, "a/0001", members())
    np.testing.assert_array_equal(triplet.image, RGB)
    assert triplet.targets == (Target.from_mask(MASK, "polyp"),) and triplet.looked_for == ("polyp",)
    triplet.check()
    assert Triplet.decode("a/0001", triplet.encode()).targets == triplet.targets


def test_an_empty_mask_is_a_negative() -> None:
    triplet = decode(PLAIN, "k", members(mask_png=png(MASK * 0)))
    assert triplet.targets == () and triplet.looked_for == ("polyp",)


def test_extensions_may_be_in_capitals() -> None:
    assert decode(PLAIN, "k", {"JPG": jpeg(RGB), "Mask.PNG": png(MASK)}).image.shape == RGB.shape


def test_a_text_names_the_term() -> None:
    layout = replace(PLAIN, text="txt")
    for text, term in (("left  kidney\n", "left kidney"), ("\ufeffNiere groß", "Niere groß"), (" \n", "polyp")):
        assert decode(layout, "k", members(txt=text.encode())).looked_for == (term,)
    with pytest.raises(UserError, match=r"^sample 'k': it has no term: .txt is empty or missing: add --term TEXT"):
        decode(replace(layout, term=""), "k", members(txt=b""))


def test_values_have_terms() -> None:
    layout = replace(PLAIN, term="", terms={1: "liver", 2: "spleen", 3: "liver", 4: "", 9: "tumour"})
    triplet = decode(layout, "k", members(mask_png=png(LABELS)))
    liver, spleen = np.isin(LABELS, (1, 3)), LABELS == 2
    assert triplet.targets == (Target.from_mask(liver, "liver"), Target.from_mask(spleen, "spleen"))
    assert triplet.looked_for == ("liver", "spleen", "tumour")
    signed = npy(LABELS.astype(np.int16) - 1)
    triplet = decode(replace(layout, masks=("seg.npy",), terms={-1: "air", 1: "a", 2: "b", 3: ""}), "k",
                     {"png": png(GREY), "seg.npy": signed})  # fmt: skip
    assert summary(triplet)[0] == ("air", "semantic", int((LABELS == 0).sum()))


def test_a_value_of_0_can_have_a_term() -> None:
    layout = replace(PLAIN, term="", terms={0: "membrane", 1: "cell"})
    assert decode(layout, "k", members()).targets == (
        Target.from_mask(MASK == 0, "membrane"),
        Target.from_mask(MASK, "cell"),
    )


def test_several_masks() -> None:
    layout = replace(PLAIN, masks=("a.png", "b.png", "c.png"), mask_terms={"a.png": "liver"})
    triplet = decode(layout, "k", members(a_png=png(MASK), b_png=png(MASK.T.reshape(H, W)), c_png=png(LABELS == 2)))
    both = MASK.T.reshape(H, W).astype(bool) | (LABELS == 2)
    assert triplet.targets == (Target.from_mask(MASK, "liver"), Target.from_mask(both, "polyp"))


def test_each_value_is_an_instance() -> None:
    labels = RNG.integers(0, 12, (H, W)).astype(np.uint16) * 1000
    layout = replace(PLAIN, instances=True)
    triplet = decode(layout, "k", members(mask_png=png(labels)))
    values = [value for value in np.unique(labels) if value]
    expected = [Target.from_mask(labels == value, "polyp", (), "instance") for value in values]
    assert triplet.targets == (Target.from_mask(labels != 0, "polyp"), *expected)
    for array in (np.ones((H, W), bool), np.ones((1, 1), np.uint8), -np.ones((H, W), np.int64)):
        with_instances = {"png": png(np.zeros(array.shape, np.uint8)), "m.npy": npy(np.abs(array))}
        found = decode(replace(layout, masks=("m.npy",)), "k", with_instances)
        assert summary(found) == [("polyp", "semantic", array.size), ("polyp", "instance", array.size)]
    assert decode(layout, "k", members(mask_png=png(labels * 0))).targets == ()


def test_thousands_of_instances_take_no_time_each() -> None:
    rows, columns = np.mgrid[:1000, :1000]
    labels = (rows // 10 * 100 + columns // 10 + 1).astype(np.int32)
    layout = Layout(("npy",), ("m.npy",), term="x", instances=True)
    found = decode(layout, "k", {"npy": npy(np.zeros((1000, 1000), np.uint8)), "m.npy": npy(labels)})
    assert len(found.targets) == 10_001 and {target.area for target in found.targets[1:]} == {100}
    labels = np.arange(40_000).reshape(200, 200)
    with pytest.raises(UserError, match=f"its m.npy has more than {MAX_INSTANCES} instances"):
        decode(layout, "k", {"npy": npy(np.zeros((200, 200), np.uint8)), "m.npy": npy(labels)})


def annotation(mask: np.ndarray, compressed: bool = True, **more: Any) -> dict[str, Any]:
    """As in SA-1B; or with run lengths as they are."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    counts: Any = rle["counts"].decode()
    if not compressed:
        flat = np.concatenate([[0], mask.T.ravel() != 0])
        edges = np.flatnonzero(np.diff(flat))
        counts = np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()
    return {"segmentation": {"size": [H, W], "counts": counts}, "bbox": [0, 0, 1, 1], "area": -5, "id": 7, **more}


def sa1b(*annotations: Any, **more: Any) -> bytes:
    return json.dumps({"image": {"image_id": 1, "height": H, "width": W}, "annotations": annotations, **more}).encode()


REGIONS = [RNG.random((H, W)) > 0.5 for _ in range(3)]
SA1B = Layout(("jpg",), json="json", term="thing", instances=True)


@pytest.mark.parametrize("compressed", [True, False])
def test_annotations_are_instances(compressed: bool) -> None:
    data = {"jpg": jpeg(RGB), "json": sa1b(*(annotation(region, compressed) for region in REGIONS))}
    triplet = decode(SA1B, "k", data)
    assert triplet.targets == tuple(Target.from_mask(region, "thing", (), "instance") for region in REGIONS)
    triplet.check()


def test_annotations_with_terms_become_one_target_each() -> None:
    items = [annotation(region, label=label) for region, label in zip(REGIONS, ("a", "b", "a"), strict=True)]
    items += [annotation(REGIONS[0] * 0, label="empty"), annotation(REGIONS[1])]
    layout = Layout(("jpg",), json="json", json_term="label")
    triplet = decode(layout, "k", {"jpg": jpeg(RGB), "json": sa1b(*items, label="whole")})
    expected = [Target.from_mask(REGIONS[0] | REGIONS[2], "a")]
    expected += [Target.from_mask(REGIONS[1], "b"), Target.from_mask(REGIONS[1], "whole")]
    assert triplet.targets == tuple(expected)
    assert triplet.looked_for == ("a", "b", "empty", "whole")


def test_a_sample_without_annotations_is_a_negative() -> None:
    assert decode(SA1B, "k", {"jpg": jpeg(RGB), "json": sa1b()}).looked_for == ("thing",)
    layout = Layout(("jpg",), json="json", json_term="label")
    assert decode(layout, "k", {"jpg": jpeg(RGB), "json": sa1b()}).looked_for == ()


def test_the_term_of_a_mask_in_a_json() -> None:
    layout = replace(PLAIN, term="", json="json", json_term="caption")
    triplet = decode(layout, "k", members(json=b'{"caption": "left lung", "annotations": 5}'))
    assert triplet.targets == (Target.from_mask(MASK, "left lung"),)


def test_patients_are_found_in_keys() -> None:
    layout = replace(PLAIN, patient="^(?:[^/]+/)?(P[0-9]+)_", dataset="toy", modality="MR")
    one, other = decode(layout, "a/P1_1", members()).provenance, decode(layout, "P1_2", members()).provenance
    assert one.patient == other.patient != decode(layout, "P2_1", members()).provenance.patient
    assert (one.dataset, one.modality, one.split_unit, one.slice_index) == ("toy", "MR", "patient", None)
    assert "P1" not in one.patient
    with pytest.raises(
        UserError, match=r"^sample 'Q1': the pattern of --patient, .*, finds no patient in its key: give one"
    ):
        decode(layout, "Q1", members())


def test_an_image_of_unknown_patient_stands_for_itself() -> None:
    one, other = decode(PLAIN, "1", members()).provenance, decode(PLAIN, "2", members()).provenance
    third = decode(PLAIN, "1", members(png=png(GREY))).provenance
    assert one.patient == other.patient != third.patient and one.split_unit == "image"


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        (PLAIN, {"png": None}, "it has no image: one of .jpg, .png is needed"),
        (PLAIN, {"jpg": jpeg(RGB)}, r"it has 2 images \(.jpg, .png\): one of .jpg, .png is needed"),
        (PLAIN, {"mask_png": None}, "it has no member .mask.png, its mask"),
        (PLAIN, {"mask_png": png(MASK[:-1])}, "its mask.png has 22 x 17 pixels, its image 23 x 17: resize"),
        (replace(PLAIN, masks=("m.npy",)), {"m_npy": npy(MASK.astype(int) - 1)},
             "its m.npy has negative values, as -1: say what they mean, as --terms=-1=TERM"),
        (replace(PLAIN, term="", terms={1: "a"}), {"mask_png": png(LABELS)},
         "its mask.png has the values 2, 3, 4, which no term has: add --terms=2=TERM, or --terms=2= to leave it out"),
        (replace(PLAIN, text="txt"), {}, "it has no member .txt, its text"),
        (replace(PLAIN, text="txt"), {"txt": b"\xff"}, "its txt is no UTF-8"),
        (replace(PLAIN, text="txt"), {"txt": b"a\nb"}, "it has no term: .txt is no text of at most 1000 characters on"),
        (replace(PLAIN, text="txt"), {"txt": b"a" * 5000}, "its txt has 5000 bytes, which is no term"),
        (replace(PLAIN, json="json", json_term="k"), {}, "it has no member .json, its json"),
        (replace(PLAIN, json="json", json_term="k"), {"json": b'{"k": 3}'}, "it has 3 as 'k' of .json"),
        (replace(PLAIN, json="json", json_term="k", term=""), {"json": b"{}"}, "it has no term: 'k' of .json is empty"),
        (replace(PLAIN, json="json", json_term="k"), {"json": b"[]"}, "its json is damaged: it is no JSON object"),
        (replace(SA1B, image=("png",)), {"json": b"{}"}, "its json has no list of 'annotations'"),
        (replace(SA1B, image=("png",)), {"json": sa1b({})}, "its json: annotation 0 has no run lengths"),
        (replace(SA1B, image=("png",)), {"json": sa1b({"segmentation": [[1, 2, 3, 4]]})},
             "its json: annotation 0 .*; polygons are not read: store what pycocotools' `annToRLE` makes of them"),
        (replace(SA1B, image=("png",)), {"json": sa1b(annotation(MASK), {"segmentation": {"size": [W, H]}})},
         "its json: annotation 1 has the size .17, 23., its image .23, 17. .height, width.: correct it"),
        (replace(SA1B, image=("png",)), {"json": sa1b({"segmentation": {"size": [H, W], "counts": [1, 2]}})},
         "its json: annotation 0 is damaged: its run lengths do not fill 23 x 17 pixels"),
        (replace(SA1B, image=("png",)), {"json": sa1b(*[{}] * (MAX_INSTANCES + 1))}, "its json has more than 20000"),
    ],
)  # fmt: skip
def test_samples_that_do_not_fit(layout: Layout, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^sample 'k': {message}"):
        decode(layout, "k", members(**changes))


# --- damage

DAMAGE = {"png": mutate.damage_png, "npy": mutate.damage_npy, "json": mutate.damage_json}
SAMPLES: list[tuple[Layout, dict[str, bytes]]] = [
    (PLAIN, members(mask_png=png(LABELS))),
    (replace(PLAIN, instances=True), {"jpg": jpeg(RGB), "mask.png": png(palette_image(LABELS)[0])}),
    (replace(PLAIN, term="", terms={1: "a", 2: "b", 3: "c", 4: "d"}, masks=("m.npy",)),
     {"jpg": jpeg(GREY, progressive=True), "m.npy": npy(LABELS.astype(np.int32))}),
    (replace(PLAIN, text="txt", instances=True, masks=("m.npy",)),
     {"png": png(palette_image(LABELS)[0]), "m.npy": npy(LABELS.astype(np.float32)), "txt": "Öl".encode()}),
    (SA1B, {"jpg": jpeg(RGB), "json": sa1b(*(annotation(region) for region in REGIONS))}),
    (Layout(("png",), json="json", json_term="label"),
     {"png": png(GREY.astype(np.uint16)), "json": sa1b(*(annotation(r, False, label="x") for r in REGIONS))}),
]  # fmt: skip


@pytest.mark.parametrize("part", range(4))
def test_damaged_members_are_triplets_or_one_line(part: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(part)
    refused = 0
    for _ in range(600):
        layout, sample = mutate.pick(rng, SAMPLES)
        name = mutate.pick(rng, sorted(sample))
        data = DAMAGE.get(name.rpartition(".")[2], mutate.damage)(sample[name], rng)
        if rng.random() < 0.03:
            data = mutate.pick(rng, mutate.planted(tmp_path / "marker"))
        try:
            triplet = decode(layout, "k", {**sample, name: data})
        except UserError as error:
            refused += 1
            assert str(error).startswith("sample 'k': ") and len(str(error)) < 600
        else:
            triplet.check()
            for target in triplet.targets:
                assert target == replace(
                    Target.from_mask(target.mask(), target.term, (), target.kind), counts=target.counts
                )
    assert 200 < refused < 600
    assert not (tmp_path / "marker").exists()
