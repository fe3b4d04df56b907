"""Shards that were made to do harm: each is refused with one line, and nothing is run, followed or filled."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import resource
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
import zstandard
from PIL import Image
from test_triplet import make, values

from data_shards import codecs
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from data_shards.index import INDEX_NAME, Index
from data_shards.inspect import open_splits
from data_shards.runs import runs_of
from data_shards.scan import write_index
from data_shards.tars import FORBIDDEN, scan_shard, walk
from data_shards.triplet import MAX_RECORD, Target, Triplet
from data_shards.verify import verify
from data_shards.writer import ShardWriter, shard_name

GOOD = make(values("uint8")).encode()
RECORD = json.loads(GOOD["json"])


def refused(call: Callable[[], Any], *parts: str) -> str:
    """Check that a call is refused with one line that has these parts, without taking much memory; return it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    return message


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.marker),))


# --- tars


Items = list[tuple[tarfile.TarInfo, bytes]]


def items() -> Items:
    """Two samples."""
    found = []
    for key in ("a-1", "a-2"):
        for extension, data in GOOD.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(data)
            found.append((info, data))
    return found


def pack(path: Path, content: Items, kind: int = tarfile.GNU_FORMAT, mode: str = "w") -> Path:
    with tarfile.open(path, mode, format=kind) as tar:  # type: ignore[call-overload]
        for info, data in content:
            tar.addfile(info, io.BytesIO(data) if data else None)
    return path


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_are_read_like_tarfile_does(tmp_path: Path, kind: int) -> None:
    content = []
    long = "n" * (120 if kind == tarfile.USTAR_FORMAT else 300)
    for number, folder in enumerate(("", "deep/", f"{long}/", "./x y/")):
        for extension, size in (("json", 700 * number), ("image.png", 512 * number), ("txt", 0)):
            info = tarfile.TarInfo(f"{folder}k{number}.{extension}")
            info.size, info.mtime = size, 12345.678 if kind == tarfile.PAX_FORMAT else 12345  # type: ignore[assignment]
            content.append((info, os.urandom(size)))
    folder_info = tarfile.TarInfo("deep")
    folder_info.type = tarfile.DIRTYPE
    content.insert(3, (folder_info, b""))
    path = pack(tmp_path / "a.tar", content, kind)
    with tarfile.open(path) as tar:
        expected = [(item.name, item.offset_data, item.size) for item in tar if item.isfile()]
    with path.open("rb") as file:
        assert [(entry.name, entry.offset, entry.size) for entry in walk(file, path)] == expected
    assert len(expected) == 12


def link(kind: bytes) -> Callable[[Items], None]:
    def change(content: Items) -> None:
        info = tarfile.TarInfo("a-1.image.npy")
        info.type, info.linkname = kind, "/etc/passwd"
        content.insert(2, (info, b""))

    return change


def name(text: str) -> Callable[[Items], None]:
    def change(content: Items) -> None:
        content[2][0].name = text

    return change


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (link(tarfile.SYMTYPE), ["after 'a-1.json'", "'a-1.image.npy' is a symbolic link"]),
        (link(tarfile.LNKTYPE), ["is a hard link"]),
        (link(tarfile.CHRTYPE), ["is a device"]),
        (link(tarfile.BLKTYPE), ["is a device"]),
        (link(tarfile.FIFOTYPE), ["is a pipe"]),
        (link(tarfile.GNUTYPE_SPARSE), ["is a sparse file"]),
        (link(b"Z"), ["is of an unknown type"]),
        (name("/a-2.json"), ["after 'a-1.json'", "the name '/a-2.json' is refused", "rename the file and pack"]),
        (name("../a-2.json"), ["the name '../a-2.json' is refused"]),
        (name("x/../../a-2.json"), ["is refused"]),
        (name("a-2\n.json"), [r"the name 'a-2\n.json' is refused"]),
        (name("é.json"), ["is refused"]),
        (name(".json"), ["the name '.json' is refused"]),
        (name("a-1.json"), ["sample 'a-1' has two members .json"]),
        (lambda content: content.extend(items()[:1]), ["sample 'a-1' is there twice"]),
        *(
            (name(f"a-2.{end}"), [f"'a-2.{end}' is refused", "pickles or code", "without it"])
            for end in sorted(FORBIDDEN)
        ),
        (name("a-2.image.PKL.gz"), [".pkl files hold pickles"]),
    ],
)
def test_members_that_no_shard_needs(tmp_path: Path, change: Callable[[Items], None], parts: list[str]) -> None:
    content = items()
    change(content)
    path = pack(tmp_path / shard_name(0), content)
    for call in (lambda: list(scan_shard(path)), lambda: write_index(tmp_path)):
        refused(call, str(path), *parts)
    assert not (tmp_path / INDEX_NAME).exists()
    problems = verify(tmp_path).problems
    assert len(problems) == 2 and all(part in problems[1] for part in parts)


def header(data: bytes, offset: int, at: int, new: bytes, fix: bool = True) -> bytes:
    """Change a tar's header, and its checksum with it."""
    block = bytearray(data[offset : offset + 512])
    block[at : at + len(new)] = new
    if fix:
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return data[:offset] + bytes(block) + data[offset + 512 :]


def test_sizes_that_a_header_claims(tmp_path: Path) -> None:
    path = pack(tmp_path / shard_name(0), items())
    data = path.read_bytes()
    with path.open("rb") as file:
        third = list(walk(file, path))[2].offset - 512
    huge = [
        b"77777777777\0",
        b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7,
        b"\xff" * 12,
        b"-0000000001\0",
        b"99999999999\0",
    ]
    for size in huge:
        path.write_bytes(header(data, third, 124, size))
        refused(
            lambda: list(scan_shard(path)), f"{path}: damaged after 'a-1.json': a member is larger than what is left"
        )
    path.write_bytes(header(data, third, 0, b"b", fix=False))
    refused(lambda: list(scan_shard(path)), f"{path}: damaged after 'a-1.json': no tar header is there")
    for kind in (b"x", b"L", b"g"):  # a name of 2 MiB
        large = header(data[:third] + data[third : third + 512], third, 124, b"%011o\0" % 2**21)
        path.write_bytes(header(large, third, 156, kind) + bytes(2**21 + 1024))
        refused(lambda: list(scan_shard(path)), f"{path}: damaged after 'a-1.json': a header has 2097152 bytes")


@pytest.mark.parametrize(
    ("records", "part"),
    [
        ({"GNU.sparse.major": "1", "GNU.sparse.realsize": "99999999999999"}, "a sparse file is in the tar"),
        ({"size": "999999999999"}, "a member is larger than what is left"),
        ({"size": "9" * 30}, "a member is larger than what is left"),
        ({"size": "-1"}, "a PAX header is damaged"),
        ({"path": "/etc/passwd"}, "the name '/etc/passwd' is refused"),
        ({"path": "a-2.pkl"}, ".pkl files hold pickles"),
    ],
)
def test_pax_headers(tmp_path: Path, records: dict[str, str], part: str) -> None:
    content = items()
    content[2][0].pax_headers = records
    path = pack(tmp_path / shard_name(0), content, tarfile.PAX_FORMAT)
    refused(lambda: list(scan_shard(path)), f"{path}: damaged after 'a-1.json'", part)


def test_a_chain_of_headers_is_no_recursion(tmp_path: Path) -> None:
    one = tarfile.TarInfo("x")
    one.type, one.size = tarfile.XHDTYPE, 0
    block = one.tobuf()
    path = tmp_path / shard_name(0)
    path.write_bytes(block * 5000 + pack(tmp_path / "b", items()).read_bytes())
    assert [key for key, _ in scan_shard(path)] == ["a-1", "a-2"]
    path.write_bytes(block * 5000)
    refused(lambda: list(scan_shard(path)), "cut off after its start")


def test_compressed_tars(tmp_path: Path) -> None:
    plain = pack(tmp_path / "plain", items()).read_bytes()
    bomb = gzip.compress(bytes(10**7))
    path = tmp_path / shard_name(0)
    for content, kind in (
        (gzip.compress(plain), "gzip"),
        (bomb, "gzip"),
        (pack(tmp_path / "x", items(), mode="w:xz").read_bytes(), "xz"),
        (pack(tmp_path / "x", items(), mode="w:bz2").read_bytes(), "bzip2"),
        (zstandard.ZstdCompressor().compress(plain), "zstd"),
    ):
        path.write_bytes(content)
        refused(lambda: list(scan_shard(path)), f"{path}: not a plain tar, it is compressed ({kind}): unpack it first")


def test_what_follows_the_end_is_not_lost_in_silence(tmp_path: Path) -> None:
    path = pack(tmp_path / shard_name(0), items())
    data = path.read_bytes()
    path.write_bytes(data + data)
    refused(lambda: list(scan_shard(path)), f"{path}: after 'a-2.json': the tar ends, but the file goes on")
    with path.open("r+b") as file:  # a file full of holes
        file.truncate(2**40)
    refused(lambda: list(scan_shard(path)), "the tar ends, but the file goes on")


def test_pipes_and_devices_are_not_opened(tmp_path: Path) -> None:
    start = time.monotonic()
    os.mkfifo(tmp_path / shard_name(0))
    refused(lambda: write_index(tmp_path), "not a file")
    os.mkfifo(tmp_path / INDEX_NAME)
    refused(lambda: Index.load(tmp_path), f"{tmp_path / INDEX_NAME}: not a file")
    (tmp_path / INDEX_NAME).unlink()
    (tmp_path / INDEX_NAME).symlink_to("/dev/zero")
    refused(lambda: Index.load(tmp_path), f"{tmp_path / INDEX_NAME}: not a file")
    (tmp_path / INDEX_NAME).unlink()
    assert len(verify(tmp_path).problems) == 2
    (tmp_path / shard_name(0)).unlink()
    pack(tmp_path / shard_name(0), items())
    write_index(tmp_path)
    (tmp_path / shard_name(0)).unlink()
    os.mkfifo(tmp_path / shard_name(0))
    refused(lambda: ShardDataset(tmp_path), "not a file")
    refused(lambda: ShardDataset(tmp_path, check=False)[0], "is damaged")
    assert any("not a file" in problem for problem in verify(tmp_path).problems)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "place", ["pipe:cat /etc/passwd", "http://example.org/a", "s3://bucket/a", "gs://a/b", "file:///x"]
)
def test_nothing_is_fetched_or_run(place: str) -> None:
    for call in (Index.load, write_index, verify, open_splits):
        refused(lambda call=call: call(place), "shards are read from folders only; nothing is fetched or run")
        if call in (verify, open_splits):  # as the commands do: who read of trainings tried a URL
            refused(lambda call=call: call(place), "copy the shards here first (trainings do read URLs)")
        refused(lambda call=call: call(Path(place)), "shards are read from folders only; nothing is fetched or run")


@pytest.mark.parametrize(
    "place", ["pipe:cat /etc/passwd", "ftp://example.org/a", "zip://a.tar::s3://bucket/a", "ssh://host/a", "s3:bucket"]
)
def test_a_data_set_is_fetched_from_known_places_only(place: str) -> None:
    parts = ("shards are read from folders and from s3://",) if place != "s3:bucket" else ("not a URL of a folder",)
    refused(lambda: ShardDataset(place), *parts)


# --- images


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int = 8, colour: int = 0, body: bytes = b"") -> bytes:
    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def npy_header(text: str) -> bytes:
    padded = text.encode() + b" " * (117 - len(text)) + b"\n" if len(text) < 117 else text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded


def described(shape: object, descr: str = "'|u1'") -> bytes:
    return npy_header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}")


PLAIN = npy(values("int16"))
HEADERS = [
    (described((10**6, 10**6)) + bytes(100), "at most 1e+09 values"),
    (described((30_000, 30_000)) + bytes(100), "declares 900000000 bytes"),
    (described((11, 7)) + bytes(76), "it ends after 76 of 77 bytes"),
    (described((11, 7)) + bytes(78), "goes on after the array"),
    (described((11, 0)), "its image has shape (11, 0)"),
    (described((-11, -7)) + bytes(77), "shape (-11, -7)"),
    (described((True, 7)) + bytes(7), "shape (True, 7)"),
    (described((2, 2, 2, 2)) + bytes(16), "its image has shape (2, 2, 2, 2)"),
    (described((11, 7), "'|O'") + bytes(616), "holds objects"),
    (described((11, 7), "[('a', '|O')]") + bytes(616), "holds objects"),
    (described((11, 7), "[('a', '<i4')]") + bytes(308), "holds objects"),
    (described((11, 7), "'<c16'") + bytes(1232), "holds values of type complex128"),
    (described((11, 7), "'<f16'") + bytes(1232), "holds values of type"),
    (described((11, 7), "'<U4'") + bytes(1232), "holds values of type"),
    (described((11, 7), "'<M8[s]'") + bytes(616), "holds values of type"),
    (npy_header("(" * 900) + bytes(77), "cannot be decoded"),
    (npy_header("{" * 9000) + bytes(77), "cannot be decoded"),
    (npy_header("__import__('os').mkdir('x')") + bytes(77), "cannot be decoded"),
    (PLAIN[:6] + b"\x09\x00" + PLAIN[8:], "version (9, 0)"),
    (PLAIN[:40], "cannot be decoded"),
]


@pytest.mark.parametrize(("data", "part"), HEADERS, ids=range(len(HEADERS)))
def test_npy_headers_are_checked_before_memory_is_taken(data: bytes, part: str) -> None:
    frame = zstandard.ZstdCompressor().compress(data)
    for extension, content in (("image.npy", data), ("image.npy.zst", frame)):
        members = {"json": GOOD["json"], extension: content}
        refused(lambda members=members: Triplet.decode("k", members), "sample 'k': ", part)


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (png(40_000, 40_000), "at most 1e+09 values"),
        (png(20_000, 20_000, colour=2), "at most 1e+09 values"),
        (png(30_000, 30_000), "declares 30000 x 30000 pixels, more than its"),
        (png(2**31 - 1, 2**31 - 1), "at most 1e+09 values"),
        (png(0, 7), "its image has shape (7, 0)"),
        (png(7, 11, colour=3), "bit depth 8 and colour type 3"),
        (png(7, 11, depth=16, colour=2), "bit depth 16 and colour type 2"),
        (png(7, 11, depth=1), "bit depth 1 and colour type 0"),
        (png(7, 11)[:30], "is no PNG"),
        (png(7, 11).replace(b"IDAT\x78", b"IDAT\x00"), "cannot be decoded"),
    ],
)
def test_png_headers_are_checked_before_memory_is_taken(data: bytes, part: str) -> None:
    refused(lambda: Triplet.decode("k", {**GOOD, "image.png": data}), "sample 'k': its ", part)


def test_zstd_frames_are_checked_before_memory_is_taken() -> None:
    def members(data: bytes) -> dict[str, bytes]:
        return {"json": GOOD["json"], "image.npy.zst": data}

    packer = zstandard.ZstdCompressor(level=19)
    bomb = packer.compress(bytes(2**30))
    assert len(bomb) < 100_000
    refused(lambda: Triplet.decode("k", members(bomb)), "sample 'k'", "magic")
    liar = bytearray(packer.compress(PLAIN))
    assert liar[4] >> 6 == 1  # its size has two bytes; make them eight
    liar[4:7] = bytes([liar[4] | 0xC0]) + struct.pack("<Q", 2**60)
    refused(lambda: Triplet.decode("k", members(bytes(liar))), "declares 1152921504606846976 bytes")
    unknown = zstandard.ZstdCompressor(write_content_size=False).compress(PLAIN)
    refused(lambda: Triplet.decode("k", members(unknown)), "does not declare its size")
    frame = make(values("int16")).encode("zstd")["image.npy.zst"]
    assert zstandard.get_frame_parameters(frame).has_checksum
    for data, part in (
        (frame + frame, "goes on after the array"),
        (frame[:-5], "cannot be decoded"),
        (frame[:-1] + bytes([frame[-1] ^ 1]), "checksum"),
        (b"", "not enough data"),
        (PLAIN, "cannot be decoded"),
    ):
        refused(lambda data=data: Triplet.decode("k", members(data)), part)


def test_images_above_pillows_limit_come_back_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    triplets = [make(np.roll(values("uint8"), number)) for number in range(40)]
    with ThreadPoolExecutor(4) as pool:
        for triplet, back in zip(
            triplets, pool.map(lambda item: Triplet.decode("k", item.encode()), triplets), strict=True
        ):
            np.testing.assert_array_equal(back.image, triplet.image)
    assert Image.MAX_IMAGE_PIXELS == 20


def test_an_image_of_190_megapixels_comes_back() -> None:
    image = np.zeros((13_800, 13_800), np.uint8)
    image[::2000, ::3] = 7
    for codec in ("png", "zstd"):
        extension, data = codecs.encode_image(image, codec)  # type: ignore[arg-type]
        assert np.array_equal(codecs.decode_image(extension, data), image)


def test_what_could_not_be_read_back_is_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "MAX_VALUES", 76)
    refused(lambda: make(values("uint8")).encode(), "sample 'toy-v-a00004' cannot be stored", "cut it into patches")
    monkeypatch.undo()
    for changes, part in (
        ({"key": "/a"}, "its key must be"),
        ({"key": "a/../b"}, "its key must be"),
        ({"looked_for": ("a\nb",)}, "looked_for must be a list of terms"),
        ({"image": values("uint8")[1:]}, "has size (11, 7), its image (10, 7)"),
        ({"image": np.zeros((11, 7, 4))}, "(H, W) or (H, W, 3)"),
        ({"image": np.zeros((11, 7), complex)}, "plain numbers"),
    ):
        refused(lambda changes=changes: replace(make(values("uint8")), **changes).encode(), "cannot be stored", part)


# --- JSON


def nested(depth: int) -> bytes:
    return b'{"version":' + b"[" * depth + b"]" * depth + b"}"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (nested(200_000), "RecursionError"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "RecursionError"),
        (b'{"version": 1, "version": 1}', "the key 'version' twice"),
        (b'{"version": NaN}', "it holds NaN"),
        (b'{"version": -Infinity}', "it holds -Infinity"),
        (b'{"version": ' + b"9" * 5000 + b"}", "ValueError"),
        (b" " * (MAX_RECORD + 1), "more than 67108864"),
        ('{"version": "é"}'.encode("latin-1"), "UnicodeDecodeError"),
        (b"", "JSONDecodeError"),
        (b"null", "no JSON object"),
        (b"{}", "its json lacks"),
    ],
)
def test_json_that_is_no_record(text: bytes, part: str) -> None:
    refused(lambda: Triplet.decode("k", {**GOOD, "json": text}), "sample 'k': its json", part)


CHANGES: list[tuple[str, Any, str]] = [
    ("version", 0.5, "its format is 0.5"),
    ("version", True, "its format is True"),
    ("version", 2**70, "its format is"),
    ("targets", {}, "its targets are no list"),
    ("targets.0", [], "its target is no object"),
    ("targets.0.term", "", "has no term"),
    ("targets.0.term", ["x"], "has no term"),
    ("targets.0.term", "a\x1b[31m", "has no term"),
    ("targets.0.term", "\ud800", "has no term"),
    ("targets.0.term", "x" * 2000, "has no term"),
    ("targets.0.size", [11], "has size"),
    ("targets.0.size", [11, 7, 1], "has size"),
    ("targets.0.size", [-11, -7], "has size"),
    ("targets.0.size", [0, 7], "has size"),
    ("targets.0.size", [11.0, 7.0], "has size"),
    ("targets.0.size", [True, 7], "has size"),
    ("targets.0.size", [2**62, 2**62], "has size"),
    ("targets.0.size", 7, "has size"),
    ("targets.0.size", [2**20, 2**20], "has size (1048576, 1048576), its image (11, 7)"),
    ("targets.0.counts", 5, "has no run lengths"),
    ("targets.0.counts", [11, 7], "has no run lengths"),
    ("targets.0.box", [0, 0, 7, 3], "has box (0, 0, 7, 3); (x0, y0, x1, y1) inside of 11 x 7 pixels"),
    ("targets.0.box", [0, 0, 3, 11], "has box"),
    ("targets.0.box", [3, 0, 2, 3], "has box"),
    ("targets.0.box", [-1, 0, 2, 3], "has box"),
    ("targets.0.box", [0.5, 0, 2, 3], "has box"),
    ("targets.0.box", None, "has box"),
    ("targets.0.area", -1, "has area -1; 0 to 77 is needed"),
    ("targets.0.area", 78, "has area"),
    ("targets.0.area", 10**400, "has area"),
    ("targets.0.area", "5", "has area"),
    ("targets.0.kind", "panoptic", "has kind 'panoptic'; known: semantic, instance"),
    ("targets.0.kind", None, "has kind"),
    ("targets.0.kind", ["instance"], "has kind"),
    ("targets.0.synonyms", "liver", "synonyms must be a list"),
    ("targets.0.synonyms", [1], "synonyms must be a list"),
    ("looked_for", "liver", "looked_for must be a list"),
    ("looked_for", [["x"]], "looked_for must be a list"),
    ("provenance", [], "its provenance is no object"),
    ("provenance.patient", 7, "has the patient 7"),
    ("provenance.patient", None, "has the patient"),
    ("provenance.modality", "C\nT", "has the modality"),
    ("provenance.slice_index", -1, "has the slice_index -1"),
    ("provenance.slice_index", 1.5, "has the slice_index"),
    ("provenance.spacing", [0, 1], "has the spacing (0, 1)"),
    ("provenance.spacing", [1e999, 1], "it holds Infinity"),
    ("provenance.spacing", [1, 1, 1], "has the spacing"),
    ("provenance.spacing", "ab", "has the spacing"),
    ("provenance.slice_spacing", -2, "has the slice_spacing"),
    ("provenance.patch", [0, -1], "has the patch"),
    ("provenance.patch", [0.0, 1], "has the patch"),
    ("provenance.previous", "../x", "has the previous"),
    ("provenance.next", 5, "has the next"),
    ("provenance.split_unit", "pixel", "has the split_unit 'pixel'"),
    ("provenance.split_unit", {}, "has the split_unit"),
    ("provenance.intensity", [], "has the intensity"),
    ("provenance.intensity", {"a": "\ud800"}, "has the intensity"),
]


@pytest.mark.parametrize(("key", "value", "part"), CHANGES)
def test_fields_of_a_wrong_type_or_out_of_range(key: str, value: object, part: str) -> None:
    record = json.loads(GOOD["json"])
    *path, last = [int(name) if name.isdigit() else name for name in key.split(".")]
    place = record
    for step in path:
        place = place[step]
    place[last] = value
    refused(lambda: Triplet.decode("k", {**GOOD, "json": json.dumps(record).encode()}), "sample 'k': ", part)


def test_numbers_that_overflow_to_infinity() -> None:
    text = GOOD["json"].replace(b'"slice_spacing":3.0', b'"slice_spacing":1e999')
    assert text != GOOD["json"]
    refused(lambda: Triplet.decode("k", {**GOOD, "json": text}), "has the slice_spacing inf")


def test_run_lengths_that_would_fill_memory() -> None:
    target = Target.from_mask(values("uint8") > 99, "organ")
    start = time.monotonic()
    for counts in ("0" * 10**7, "oooooooO" * 10**5, "0P" * 10**6, target.counts + "0" * 10**6):
        refused(replace(target, counts=counts).mask, "the mask of 'organ' is damaged")
    # sums that come out right only because they overflow
    size = (2**16, 2**16)
    assert runs_of([2**62, 2**62, 2**62, 2**62 + 2**32], size) is None
    assert runs_of([-5, 82], (11, 7)) is None and runs_of([True, 76], (11, 7)) is None
    np.testing.assert_array_equal(runs_of([3, 4, 70], (11, 7)), [3, 4, 70])  # type: ignore[arg-type]
    assert time.monotonic() - start < 5


# --- indices


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Seven samples in three shards, with two kinds of images and of targets."""
    with ShardWriter(tmp_path / "train", 3, 2**20) as writer:
        for number in range(7):
            image = values(("uint8", "int16")[number % 2])
            writer.write(f"toy-{number:03d}", make(image, masks=number % 3).encode(("png", "zstd")[number % 2]))
    write_index(tmp_path / "train")
    return tmp_path / "train"


def rewrite(folder: Path, save: Callable[..., None] = np.savez, **changes: Any) -> None:
    path = folder / INDEX_NAME
    with np.load(path) as content:
        arrays = {**content, **changes}
    save(path, **{name: array for name, array in arrays.items() if array is not None})


def changed(folder: Path, array: str, place: object, value: object) -> np.ndarray:
    result = getattr(Index.load(folder), array).copy()
    result[place] = value
    return result


@pytest.mark.parametrize(
    ("array", "place", "value", "part"),
    [
        ("shard", 0, -1, "'shard' is out of range"),
        ("shard", 0, 3, "'shard' is out of range"),
        ("shard", 0, 1, ""),
        ("member_offset", 2, -512, "'member_offset' is out of range"),
        ("member_offset", 2, 2**62, "'member_offset' is out of range"),
        ("member_offset", 2, 2**40, "'member_offset' lies outside of a shard"),
        ("member_size", 2, -1, "'member_size' is out of range"),
        ("member_size", 2, 2**33, "'member_size' is out of range"),
        ("member_size", 3, 2**60, "'member_size' is out of range"),
        ("member_size", 3, 10**6, "'member_offset' lies outside of a shard"),
        ("member_extension", 1, 200, "'member_extension' is out of range"),
        ("member_start", 0, 1, "'member_start' does not cut the members"),
        ("member_start", 3, 4, "'member_start' does not cut the members"),
        ("member_start", -1, 99, "'member_start' does not cut the members"),
        ("following", 0, 7, "'following' is out of range"),
        ("following", 0, -2, "'following' is out of range"),
        ("dataset", 0, 1, "'dataset' is out of range"),
        ("volume", 0, -1, "'volume' is out of range"),
        ("height", 0, -1, "'height' is out of range"),
        ("channels", 0, 4, "'channels' is out of range"),
        ("dtype", 0, 200, "'dtype' is out of range"),
        ("target_start", 0, 1, "'target_start' does not cut the targets"),
        ("target_start", 3, 0, "'target_start' does not cut the targets"),
        ("target_start", 2, -1, "'target_start' is out of range"),
        ("target_start", -1, 99, "'target_start' does not cut the targets"),
        ("target_term", 0, 9, "'target_term' is out of range"),
        ("target_term", 0, -1, "'target_term' is out of range"),
        ("target_area", 0, -1, "'target_area' is out of range"),
        ("target_kind", 0, 2, "'target_kind' is out of range"),
        ("modality", 0, 1, "'modality' is out of range"),
        ("patient", 0, -7, "'patient' is out of range"),
        ("shard_sizes", 0, -1, "'shard_sizes' is out of range"),
        ("shard_names", 0, "../x.tar", "a shard is called '../x.tar'"),
        ("shard_names", 0, "/x.tar", "a shard is called '/x.tar'"),
        ("shard_names", 0, "a\nb.tar", "a shard is called"),
        ("shard_names", 0, "passwd", "a shard is called 'passwd'"),
        ("extensions", 0, "image.pkl", "a member has an unknown extension"),
        ("extensions", 0, "a\nb", "'extensions' holds"),
        ("datasets", 0, "a\u2028b", "'datasets' holds"),
        ("volumes", 0, "a\x7fb", "'volumes' holds"),
        ("patients", 0, "a\0b", "'patients' holds"),
        ("terms", 0, "a\x1bb", "'terms' holds"),
        ("terms", 0, "\ud800", "'terms' holds"),
        ("raw_keys", 0, b"a\nb", "a key is no text"),
        ("raw_keys", 0, b"a\0b", "a key is no text"),
        ("raw_keys", 0, b"a\xffb", "a key is no text"),
        ("raw_keys", 0, b"", "a key is no text"),
    ],
)
def test_numbers_of_an_index_that_point_to_nothing(
    shards: Path, array: str, place: object, value: object, part: str
) -> None:
    old = getattr(Index.load(shards), array)
    if isinstance(value, str | bytes):
        old = old.astype(f"{old.dtype.kind}{max(40, old.dtype.itemsize)}")
    new = old.copy()
    new[place] = value
    rewrite(shards, **{array: new})
    if part:
        refused(lambda: Index.load(shards, check=False), f"{shards / INDEX_NAME}: damaged index ({part}")
        problems = verify(shards).problems
        assert len(problems) == 1 and "3 shards were read without an index" in problems[0]
    else:  # plausible, and wrong
        refused(lambda: ShardDataset(shards)[0], "toy-000")


def test_arrays_of_an_index_of_a_wrong_shape_or_type(shards: Path) -> None:
    original = (shards / INDEX_NAME).read_bytes()
    index = Index.load(shards)
    for changes, part in (
        ({"shard": index.shard[:-1]}, "'shard' has 6 items instead of 7"),
        ({"shard": index.shard[:, None]}, "'shard' has shape (7, 1)"),
        ({"shard": index.shard.astype(np.float64)}, "'shard' has shape (7,) and type float64"),
        ({"crc32": index.crc32.astype(np.int64)}, "'crc32' has shape (7,) and type int64"),
        ({"shard": index.shard.astype(">i4")}, ""),
        ({"terms": index.terms[:0]}, "'absent' has 3 items instead of 0"),
        ({"raw_keys": index.raw_keys.astype(str)}, "'raw_keys' has shape"),
        ({"patient": None}, "'patient' is missing"),
        ({"version": np.int64(0)}, "format 0 is newer"),
        ({"version": np.array([2])}, "'version' has shape (1,)"),
        ({name: getattr(index, name)[:0] for name in ("raw_keys", "shard", "crc32")}, "items instead of 0"),
    ):
        (shards / INDEX_NAME).write_bytes(original)
        rewrite(shards, **changes)
        if part:
            refused(lambda: Index.load(shards), "damaged index (", part)
        else:
            np.testing.assert_array_equal(Index.load(shards).shard, index.shard)


def rewrite_as_old(folder: Path, version: int) -> None:
    """Write the index as version 1 or 2 had it."""
    index = Index.load(folder)
    newer = {
        *("member_start", "member_offset", "member_size", "member_extension", "dataset", "volume", "slice_index"),
        *("following", "height", "width", "channels", "dtype", "row_spacing", "column_spacing", "slice_spacing"),
        *("datasets", "volumes", "dtypes", "layout", *(("target_kind", "absent") if version == 1 else ())),
    }
    members = {
        "json_offset": index.member_offset[0::2],
        "json_size": index.member_size[0::2],
        "image_offset": index.member_offset[1::2],
        "image_size": index.member_size[1::2],
        "image_extension": index.member_extension[1::2] - 1,
        "extensions": index.extensions[1:],
    }
    rewrite(folder, version=np.int64(version), **dict.fromkeys(newer), **members)


@pytest.mark.parametrize("version", [1, 2])
def test_an_index_of_an_older_version_is_read(shards: Path, version: int) -> None:
    triplets, new = list(ShardDataset(shards)), Index.load(shards)
    rewrite_as_old(shards, version)
    old = Index.load(shards)
    assert old.is_old and not new.is_old
    for name in ("member_start", "member_offset", "member_size", "member_extension", "extensions", "crc32", "terms"):
        np.testing.assert_array_equal(getattr(old, name), getattr(new, name))
    assert [old.members(number) for number in range(7)] == [new.members(number) for number in range(7)]
    assert old.target_kind.tolist() == [int(version == 2)] * 6
    assert old.following.tolist() == old.slice_index.tolist() == [-1] * 7
    assert old.height.tolist() == [0] * 7 and np.isnan(old.row_spacing).all()
    assert old.datasets.tolist() == old.volumes.tolist() == old.dtypes.tolist() == old.layout.tolist() == [""]
    assert [triplet.encode() for triplet in ShardDataset(shards)] == [triplet.encode() for triplet in triplets]
    old.save()  # as the present version, with what is known
    assert Index.load(shards).members(3) == new.members(3)


def test_an_index_of_an_older_version_whose_members_point_to_nothing(shards: Path) -> None:
    original = (shards / INDEX_NAME).read_bytes()
    for name, place, value, part in (
        ("json_offset", 2, -512, "'member_offset' is out of range"),
        ("image_offset", 2, 2**40, "'member_offset' lies outside of a shard"),
        ("json_size", 2, -1, "'member_size' is out of range"),
        ("image_extension", 1, 200, "'image_extension' is out of range"),
    ):
        (shards / INDEX_NAME).write_bytes(original)
        rewrite_as_old(shards, 2)
        with np.load(shards / INDEX_NAME) as content:
            array = content[name].copy()
        array[place] = value
        rewrite(shards, **{name: array})
        refused(lambda: Index.load(shards, check=False), f"damaged index ({part}")
        rewrite(shards, **{name: array[:3]})
        refused(lambda: Index.load(shards, check=False), "damaged index (its members are not as many as its keys")


def test_the_index_tells_sizes_neighbours_and_spacings(built: Path) -> None:
    dataset = ShardDataset(built / "train")
    index = dataset.index
    keys = [index.key(number) for number in range(len(index))]
    assert (index.following >= 0).sum() > 10
    for number, triplet in enumerate(dataset):
        origin = triplet.provenance
        assert (index.height[number], index.width[number], index.channels[number]) == (*triplet.image.shape, 1)
        assert index.dtypes[index.dtype[number]] == triplet.image.dtype.name
        assert index.datasets[index.dataset[number]] == origin.dataset
        assert index.volumes[index.volume[number]] == origin.volume
        assert index.slice_index[number] == origin.slice_index
        assert (keys[index.following[number]] if index.following[number] >= 0 else None) == origin.next
        spacings = (index.row_spacing[number], index.column_spacing[number], index.slice_spacing[number])
        np.testing.assert_allclose(spacings, (*origin.spacing, origin.slice_spacing), rtol=1e-6)  # type: ignore[misc]


def test_another_index_copied_over_the_one_in_use_changes_nothing(shards: Path) -> None:
    dataset = ShardDataset(shards)
    expected = [triplet.encode() for triplet in dataset]
    with (shards / INDEX_NAME).open("r+b") as file:  # as cp does
        file.truncate(0)
    assert [triplet.encode() for triplet in dataset] == expected


def test_an_index_goes_to_another_process_by_its_name(shards: Path) -> None:
    dataset = ShardDataset(shards)
    assert len(pickle.dumps(dataset)) < 2000
    sent = pickle.dumps(dataset)
    rewrite(shards, crc32=dataset.index.crc32 + np.uint32(1))
    refused(lambda: pickle.loads(sent), "index.npz: changed under the run")


def test_an_index_of_version_1_is_read(shards: Path) -> None:
    new = Index.load(shards)
    assert new.target_kind.tolist() == [1] * 6 and new.absent.tolist() == [7 - 4, 7 - 2, 7]
    assert dict(zip(new.terms.tolist(), new.absent.tolist(), strict=True)) == {"organ 0": 3, "organ 1": 5, "absent": 7}
    rewrite_as_old(shards, 1)
    old = Index.load(shards)
    assert old.target_kind.tolist() == [0] * 6 and old.absent.tolist() == [-1] * 3
    assert [triplet.key for triplet in ShardDataset(shards)] == [f"toy-{number:03d}" for number in range(7)]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_pickles_and_bombs_in_an_index(shards: Path, tmp_path: Path) -> None:
    path, marker = shards / INDEX_NAME, tmp_path / "marker"
    good = path.read_bytes()
    objects = np.array([Evil(marker)] * 7, dtype=object)
    rewrite(shards, shard=objects)
    refused(lambda: Index.load(shards), "damaged index (it holds objects, which are never read")
    path.write_bytes(good)
    rewrite(shards, save=np.savez_compressed)
    refused(lambda: Index.load(shards), "damaged index (it is compressed or encrypted)")

    def rezip(change: Callable[[zipfile.ZipFile, str, bytes], None]) -> None:
        with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                change(new, name, old.read(name))

    def pickled(new: zipfile.ZipFile, name: str, data: bytes) -> None:
        new.writestr(name, pickle.dumps(Evil(marker)) if name == "shard.npy" else data)

    rezip(pickled)
    refused(lambda: Index.load(shards), "damaged index (", "magic")

    def bomb(new: zipfile.ZipFile, name: str, data: bytes) -> None:
        if name == "shard.npy":
            new.writestr(name, described((10**10,), "'<i4'") + bytes(10**7), zipfile.ZIP_DEFLATED)
        else:
            new.writestr(name, data)

    rezip(bomb)
    refused(lambda: Index.load(shards), "damaged index (it is compressed")

    def lie(new: zipfile.ZipFile, name: str, data: bytes) -> None:
        new.writestr(name, described((10**10,), "'<i4'") + bytes(28) if name == "shard.npy" else data)

    rezip(lie)
    refused(lambda: Index.load(shards), "declares 40000000000 bytes of int32")
    rezip(lambda new, name, data: [new.writestr(name, data) for _ in range(2)] and None)
    refused(lambda: Index.load(shards), "damaged index (its parts overlap)")
    directory = good.rfind(b"PK\x01\x02", 0, good.find(b"PK\x01\x02") + 10)
    path.write_bytes(good[: directory + 24] + struct.pack("<I", 2**31) + good[directory + 28 :])
    refused(lambda: Index.load(shards), "damaged index (")
    with path.open("wb") as file:
        file.truncate(2**33)
    refused(lambda: Index.load(shards), "not a file of at most")
    assert not marker.exists()


def test_a_gap_between_the_members_is_not_read(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = [(info, data) for info, data in items() if info.name.startswith("a-1")]
    filler = tarfile.TarInfo("a-1.tif")
    filler.size = 10**6
    for path in shards.glob("*.tar"):
        path.unlink()
    pack(shards / "one.tar", [content[0], (filler, bytes(10**6)), content[1]])
    write_index(shards)
    sizes: list[int] = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: sizes.append(size) or real(file, size, offset))
    np.testing.assert_array_equal(ShardDataset(shards)[0].image, values("uint8"))
    assert sum(sizes) == sum(map(len, GOOD.values()))


# --- webdataset itself


@pytest.mark.parametrize("codec", ["png", "zstd"])
def test_webdataset_reads_both_codecs(tmp_path: Path, codec: Any) -> None:
    triplets = [make(np.roll(values("uint8", 3), n), masks=n % 3) for n in range(5)]
    with ShardWriter(tmp_path, 2, 2**20) as writer:
        for number, triplet in enumerate(triplets):
            writer.write(f"toy-{number}", triplet.encode(codec))
    write_index(tmp_path)
    dataset = ShardDataset(tmp_path)
    assert verify(tmp_path).problems == []
    extension = {"png": "image.png", "zstd": "image.npy.zst"}[codec]
    assert dataset.index.extensions.tolist() == ["json", extension]

    def unpack(key: str, data: bytes) -> Any:
        if key.endswith(".npy.zst"):
            return np.load(io.BytesIO(zstandard.ZstdDecompressor().decompress(data)), allow_pickle=False)
        return None

    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode(unpack, "rgb8"))
    assert [item["__key__"] for item in read] == [triplet.key for triplet in dataset]
    for item, mine, original in zip(read, dataset, triplets, strict=True):
        np.testing.assert_array_equal(item[extension], original.image)
        np.testing.assert_array_equal(mine.image, original.image)
        assert item["json"] == json.loads(original.encode()["json"])
