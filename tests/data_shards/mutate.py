"""Damages files in ways that a seed decides: blindly, or so that checksums fit and what lies behind them is reached."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Rng = np.random.Generator
Members = list[tuple[str, bytes]]

NASTY = (
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**400, -(2**40), 0.5, 1e308, -0.0, "", "x", "../../x", "/etc/passwd",
    "\n", "\x00", "\x1b[31m", "\ud800", "é" * 40, "x" * 5000, "0" * 3000, "NaN", "semantic", [], {}, [[]], [None],
    [1e999], [0, 0], [1, 1], [2**20, 2**20], [-5, -5], [0, 0, 0, 0], [5, 5, 1, 1], ["a"] * 50, {"a": {"b": {"c": []}}},
)  # fmt: skip
"""Values that a field of a record may be replaced by."""

NUMBERS = (0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1)


def pick(rng: Rng, options: Any) -> Any:
    """One of a sequence, as it is."""
    return options[int(rng.integers(len(options)))]


# --- bytes


def damage(data: bytes, rng: Rng) -> bytes:
    """Damage bytes in one to four places."""
    for _ in range(int(rng.integers(1, 5))):
        data = pick(rng, _BLIND)(bytearray(data), rng) if data else bytes(rng.bytes(20))
    return data


def _span(data: bytearray, rng: Rng, longest: int = 600) -> slice:
    start = int(rng.integers(len(data)))
    return slice(start, start + 1 + int(rng.integers(min(longest, len(data)))))


def _flip(data: bytearray, rng: Rng) -> bytes:
    for place in rng.integers(len(data), size=rng.integers(1, 9)):
        data[place] ^= 1 << int(rng.integers(8))
    return bytes(data)


def _overwrite(data: bytearray, rng: Rng) -> bytes:
    span = _span(data, rng, 64)
    count = len(data[span])
    data[span] = pick(rng, (bytes(count), b"\xff" * count, rng.bytes(count), b"9" * count, b"(" * count))
    return bytes(data)


def _number(data: bytearray, rng: Rng) -> bytes:
    place = int(rng.integers(len(data)))
    size = int(pick(rng, (2, 4, 4, 8)))
    new = (pick(rng, NUMBERS) & (256**size - 1)).to_bytes(size, pick(rng, ("little", "big")))
    data[place : place + len(new)] = new
    return bytes(data)


def _cut(data: bytearray, rng: Rng) -> bytes:
    return bytes(data[: int(rng.integers(len(data)))])


def _insert(data: bytearray, rng: Rng) -> bytes:
    place = int(rng.integers(len(data)))
    data[place:place] = rng.bytes(int(rng.integers(1, 600)))
    return bytes(data)


def _delete(data: bytearray, rng: Rng) -> bytes:
    del data[_span(data, rng)]
    return bytes(data)


def _repeat(data: bytearray, rng: Rng) -> bytes:
    span = _span(data, rng)
    data[span.start : span.start] = data[span] * int(rng.integers(1, 4))
    return bytes(data)


def _swap(data: bytearray, rng: Rng) -> bytes:
    one, other = _span(data, rng, 100), _span(data, rng, 100)
    data[one], data[other] = data[other], data[one]
    return bytes(data)


_BLIND = (_flip, _flip, _overwrite, _number, _number, _cut, _insert, _delete, _repeat, _swap)


# --- JSON


def damage_json(text: bytes, rng: Rng) -> bytes:
    """Change one to three places of a JSON document; mostly its values, sometimes its bytes."""
    if rng.random() < 0.15:
        return damage(text, rng)
    record = json.loads(text)
    for _ in range(int(rng.integers(1, 4))):
        record = _change(record, rng)
    text = json.dumps(record).encode("utf-8", "surrogatepass")
    extra = rng.random()
    if extra < 0.04:  # a key twice
        text = re.sub(rb'("\w+"):', rb"\1:0,\1:", text, count=1)
    elif extra < 0.08:
        depth = int(pick(rng, (100, 2000, 100_000)))
        text = text.replace(b"[", b"[" * depth, 1)
    return text


def _change(record: Any, rng: Rng) -> Any:
    """Replace, remove, add or move one value somewhere in a record."""
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            visit(node[key])

    visit(record)
    if not places or rng.random() < 0.02:
        return copy.deepcopy(pick(rng, NASTY))
    node, key = pick(rng, places)
    what = rng.random()
    if what < 0.65:
        node[key] = copy.deepcopy(pick(rng, NASTY))
    elif what < 0.75:
        del node[key]
    elif what < 0.85:
        other, place = pick(rng, places)
        if place in other if isinstance(other, dict) else place < len(other):
            node[key] = json.loads(json.dumps(other[place]))
    elif isinstance(node, list):
        node.extend([node[key]] * int(rng.integers(1, 30)))
    else:
        node[str(pick(rng, ("extra", "counts", "", "a\nb", "version")))] = node[key]
    return record


# --- arrays and pictures


def damage_npy(data: bytes, rng: Rng) -> bytes:
    """Change the header of an npy file, its length or its bytes."""
    if rng.random() < 0.4:
        return damage(data, rng)
    length = struct.unpack("<H", data[8:10])[0]
    text, body = data[10 : 10 + length].decode("latin-1"), data[10 + length :]
    shape = pick(
        rng,
        (
            "(0,)",
            "()",
            "(7,)",
            "(-1, 5)",
            "(99999999, 99999999)",
            "(3, 3, 3, 3)",
            "(5, None)",
            "(True, 3)",
            "5",
            "[4, 4]",
        ),
    )
    descr = pick(
        rng,
        (
            "'|O'",
            "'<U9'",
            "'<f16'",
            "'>i2'",
            "'<c8'",
            "[('a', '<i4')]",
            "'|V0'",
            "'<M8[s]'",
            "5",
            "'" + "9" * 50 + "i'",
        ),
    )
    text = pick(
        rng,
        (
            re.sub(r"\([\d, ]*\)", shape, text),
            re.sub(r"'[<>|=]\w+'", descr, text),
            text.replace("False", "True"),
            text.replace("{", "{" * int(rng.integers(1, 3000))),
            text.replace("'shape'", "'shap'"),
            "__import__('os').mkdir('marker')",
        ),
    )
    header = text.encode("latin-1")
    length = len(header) if rng.random() < 0.8 else int(pick(rng, NUMBERS)) & 0xFFFF
    return data[:8] + struct.pack("<H", length & 0xFFFF) + header + body


def damage_png(data: bytes, rng: Rng) -> bytes:
    """Change a chunk of a PNG, mostly so that its checksum fits again."""
    if rng.random() < 0.2:
        return damage(data, rng)
    chunks, place = [], 8
    while place + 12 <= len(data):
        size = struct.unpack(">I", data[place : place + 4])[0]
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + size]))
        place += 12 + size
    number = int(rng.integers(len(chunks)))
    kind, content = chunks[number]
    what = rng.random()
    if kind == b"IHDR" and what < 0.7:
        fields = list(struct.unpack(">IIBBBBB", content))
        for _ in range(int(rng.integers(1, 3))):
            place = int(rng.integers(7))
            fields[place] = int(pick(rng, NUMBERS)) & (2**32 - 1 if place < 2 else 255)
        content = struct.pack(">IIBBBBB", *fields)
    elif kind == b"IDAT" and what < 0.7:
        content = zlib.compress(damage(zlib.decompress(content), rng))
    else:
        content = damage(content, rng)
    chunks[number] = (
        pick(rng, (kind, kind, kind, kind, b"tRNS", b"PLTE", b"acTL", b"iCCP", b"zTXt", b"IDAT")),
        content,
    )
    if rng.random() < 0.2:
        chunks.insert(int(rng.integers(len(chunks))), pick(rng, chunks))
    packed = [
        struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part)) for kind, part in chunks
    ]
    return data[:8] + b"".join(packed)


def damage_zstd(data: bytes, rng: Rng) -> bytes:
    """Damage a frame, or what is packed in it."""
    import zstandard

    if rng.random() < 0.5:
        return damage(data, rng)
    inside = damage_npy(zstandard.ZstdDecompressor().decompress(data), rng)
    packer = zstandard.ZstdCompressor(write_content_size=bool(rng.random() < 0.9), write_checksum=True)
    return packer.compress(inside)


def damage_gzip(data: bytes, rng: Rng, inside: Callable[[bytes, Rng], bytes] = damage) -> bytes:
    """Damage a gzip file, or what is packed in it."""
    import gzip

    return damage(data, rng) if rng.random() < 0.3 else gzip.compress(inside(gzip.decompress(data), rng), 1)


# --- containers


class Bomb:
    """A pickle of this makes a folder when it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple:
        return (os.mkdir, (self.marker,))


def planted(marker: Path) -> list[bytes]:
    """Pickles, alone and in an npy file."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([[Bomb(marker)]], dtype=object), allow_pickle=True)
    return [pickle.dumps(Bomb(marker)), buffer.getvalue()]


def read_tar(path: Path) -> Members:
    with tarfile.open(path) as tar:
        return [(item.name, tar.extractfile(item).read()) for item in tar]  # type: ignore[union-attr]


def write_tar(members: Members) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def damage_jpeg(data: bytes, rng: Rng) -> bytes:
    """Change what a segment of a JPEG declares, its bytes, or how often it is there."""
    if rng.random() < 0.4:
        return damage(data, rng)
    segments, place = [], 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != 0xDA:
        size = 2 + struct.unpack(">H", data[place + 2 : place + 4])[0]
        segments.append(data[place : place + size])
        place += size
    number = int(rng.integers(len(segments)))
    segment = bytearray(segments[number])
    frame = next((n for n, part in enumerate(segments) if part[1] in (0xC0, 0xC2)), None)
    what = rng.random()
    if frame is not None and what < 0.5:  # precision, height, width, components
        number, segment = frame, bytearray(segments[frame])
        field = int(rng.integers(4))
        start, size = ((4, 1), (5, 2), (7, 2), (9, 1))[field]
        segment[start : start + size] = (pick(rng, NUMBERS) & (256**size - 1)).to_bytes(size, "big")
    elif what < 0.8:
        segment[4:] = damage(bytes(segment[4:]), rng)[: 65_533 - 4]
        segment[2:4] = struct.pack(">H", len(segment) - 2)
    else:
        segment *= int(rng.integers(2, 300))
    segments[number] = bytes(segment)
    return data[:2] + b"".join(segments) + data[place:]


def damage_text(data: bytes, rng: Rng) -> bytes:
    """Replace a term by what is none, or damage its bytes."""
    terms = (b"", b" ", b"\xff\xfe", b"\n\n", b"a\nb", b"\x1b[31m", "é\u2028".encode(), b"x" * 2000, b"x" * 10**6)
    return damage(data, rng) if data and rng.random() < 0.3 else pick(rng, terms)


_PAYLOADS = {
    ".json": damage_json,
    ".png": damage_png,
    ".npy": damage_npy,
    ".zst": damage_zstd,
    ".jpg": damage_jpeg,
    ".txt": damage_text,
}


def damage_shard(path: Path, rng: Rng, marker: Path) -> bytes:
    """Damage a shard: its bytes, its headers, its members or what they hold."""
    data = path.read_bytes()
    what = rng.random()
    if what < 0.15:
        return damage(data, rng)
    if what < 0.35:
        return _damage_header(data, rng)
    members = read_tar(path)
    number = int(rng.integers(len(members)))
    name, content = members[number]
    if what < 0.45:
        names = (
            "../" + name,
            "/" + name,
            name + ".pkl",
            "x.pyd",
            "é.json",
            "a b.json",
            ".json",
            "x",
            members[0][0],
            name.upper(),
        )
        members[number] = (pick(rng, names), content)
        if rng.random() < 0.5:
            members.insert(number, pick(rng, members))
    elif what < 0.48:
        other = int(rng.integers(len(members)))
        members[number], members[other] = members[other], members[number]
    elif what < 0.52:  # what belongs to another sample
        alike = [other for other, _ in members if other.partition(".")[2] == name.partition(".")[2]]
        members[number] = (name, dict(members)[pick(rng, alike)])
    elif what < 0.55:
        del members[number]
    elif what < 0.6:
        members[number] = (name, pick(rng, planted(marker)))
    else:
        members[number] = (name, _PAYLOADS[Path(name).suffix](content, rng))
    return write_tar(members)


def _damage_header(data: bytes, rng: Rng) -> bytes:
    """Change a field of a header, mostly so that its checksum fits again."""
    starts = [place for place in range(0, len(data), 512) if data[place + 257 : place + 262] == b"ustar"]
    start = int(pick(rng, starts))
    block = bytearray(data[start : start + 512])
    place, size = pick(
        rng,
        (
            (0, 100),
            (100, 8),
            (124, 12),
            (124, 12),
            (124, 12),
            (148, 8),
            (156, 1),
            (156, 1),
            (157, 100),
            (257, 8),
            (345, 155),
        ),
    )
    block[place : place + size] = {
        1: lambda: bytes([pick(rng, b"01234567LKSxgMVDNX\0\xff")]),
        12: lambda: pick(
            rng,
            (
                b"77777777777\0",
                b"\x80" + rng.bytes(11),
                b"\xff" * 12,
                b"-0000000001\0",
                b"%011o\0" % int(rng.integers(5000)),
                b" " * 12,
            ),
        ),
    }.get(size, lambda: rng.bytes(size))()
    if rng.random() < 0.8:
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return data[:start] + bytes(block) + data[start + 512 :]


def damage_zip(data: bytes, rng: Rng, marker: Path, turn: int | None = None) -> bytes:
    """Damage an npz: its bytes, or its arrays so that its checksums fit.

    Args:
        data: The file.
        rng: Decides how.
        marker: What a pickle makes when it is opened.
        turn: Damage one array, and after all have had their turn the first one again.
    """
    what = rng.random() if turn is None else 0.5 + rng.random() / 2
    if what < 0.3:
        return damage(data, rng)
    members = read_zip(data)
    number = int(rng.integers(len(members))) if turn is None else turn % len(members)
    name, content = members[number]
    if what < 0.4:
        members[number] = (name, pick(rng, planted(marker)))
    elif what < 0.5:
        del members[number]
    elif what < 0.85:
        array = np.load(io.BytesIO(content)).copy()
        buffer = io.BytesIO()
        np.save(buffer, _damage_array(array, rng), allow_pickle=True)
        members[number] = (name, buffer.getvalue())
    else:
        members[number] = (name, damage_npy(content, rng))
    return write_zip(members, zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED)


def read_zip(data: bytes) -> Members:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def write_zip(members: Members, kind: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def damage_layout(data: bytes, rng: Rng) -> bytes:
    """Damage the JSON in an index that says what foreign members mean."""
    members = dict(read_zip(data))
    text = str(np.load(io.BytesIO(members["layout.npy"]))[0])
    damaged = damage_json(text.encode(), rng).decode("utf-8", "replace").rstrip("\0")
    buffer = io.BytesIO()
    np.save(buffer, np.array([damaged]))
    return write_zip(list({**members, "layout.npy": buffer.getvalue()}.items()))


def damage_place(path: Path, rng: Rng, marker: Path) -> None:
    """Damage a file where it lies: what it holds, how long it is, or what it is."""
    data, what = path.read_bytes(), rng.random()
    if what < 0.6:
        path.write_bytes(
            damage_zip(data, rng, marker) if path.suffix == ".npz" else
            damage_json(data, rng) if path.suffix == ".json" else damage(data, rng)
        )  # fmt: skip
    elif what < 0.7:
        path.write_bytes(bytes(len(data)))
    elif what < 0.8:
        with path.open("r+b") as file:
            file.truncate(int(pick(rng, (0, 1, len(data) // 2, len(data) + 8, 2**33))))
    else:
        path.unlink()
        if what < 0.85:
            path.mkdir()
        elif what < 0.9:
            path.symlink_to(path.name)  # itself
        elif what < 0.93:
            path.symlink_to("/dev/null")
        elif what < 0.96:
            os.mkfifo(path)


def _damage_array(array: np.ndarray, rng: Rng) -> np.ndarray:
    what = rng.random()
    if array.size and what < 0.6:
        flat = array.reshape(-1)
        place = int(rng.integers(flat.size))
        if array.dtype.kind in "iu":
            limits = np.iinfo(array.dtype)
            flat[place] = pick(
                rng, (limits.min, limits.max, 0, limits.max // 2, flat[pick(rng, range(flat.size))], flat[place] ^ 1)
            )
        elif array.dtype.kind == "f":
            flat[place] = pick(rng, (np.nan, np.inf, -1.0, 1e38))
        elif array.dtype.kind in "US":
            flat[place] = (
                pick(rng, ("", "../x", "a\nb", "x" * 90))
                if array.dtype.kind == "U"
                else pick(rng, (b"", b"\n", b"\xff"))
            )
        return array
    if what < 0.7:
        return array[:-1] if array.ndim else array
    if what < 0.8:
        return np.concatenate([array, array]) if array.ndim else array
    kinds = ("f8", "i8", "u1", "f4", "c8") if array.dtype.kind in "iufb" else ("S3", "O")
    return array.astype(pick(rng, kinds)) if what < 0.9 else array[None]
