"""``index.npz``: the arrays of an index as a file, read without trust into one block of shared memory.

It is what `numpy.savez` writes: plain arrays, stored as they are, nothing pickled. Shapes: S shards, N samples,
M members, T targets.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.codecs import IMAGE_EXTENSIONS, MAX_BYTES, read_npy_header
from data_shards.errors import UserError
from data_shards.strict import is_text, show
from data_shards.triplet import KINDS, MAX_RECORD

INDEX_VERSION = 3
"""Raised whenever a stored array changes its meaning.

Version 2 added `target_kind` and `absent`. Version 3 lists members, so that samples of any layout can be found, and
tells data sets, volumes, neighbours, sizes and spacings.
"""

ARRAYS: dict[str, tuple[str, str]] = {
    "shard_names": ("U", "S"), "shard_sizes": ("int64", "S"), "shard_sha256": ("U", "S"),
    "raw_keys": ("S", "N"), "shard": ("int32", "N"), "crc32": ("uint32", "N"),
    "dataset": ("int32", "N"), "modality": ("int32", "N"), "patient": ("int32", "N"), "volume": ("int32", "N"),
    "slice_index": ("int32", "N"), "following": ("int32", "N"),
    "height": ("int32", "N"), "width": ("int32", "N"), "channels": ("uint8", "N"), "dtype": ("uint8", "N"),
    "row_spacing": ("float32", "N"), "column_spacing": ("float32", "N"), "slice_spacing": ("float32", "N"),
    "member_start": ("int64", "N + 1"),
    "member_offset": ("int64", "M"), "member_size": ("int64", "M"), "member_extension": ("uint8", "M"),
    "target_start": ("int64", "N + 1"),
    "target_term": ("int32", "T"), "target_area": ("int64", "T"), "target_kind": ("uint8", "T"),
    "extensions": ("U", ""), "terms": ("U", "terms"), "absent": ("int64", "terms"), "datasets": ("U", ""),
    "modalities": ("U", ""), "patients": ("U", ""), "volumes": ("U", ""), "dtypes": ("U", ""), "layout": ("U", "one"),
}  # fmt: skip
"""Type and length of every array in the file; arrays whose lengths have one name are equally long."""

_OLD_MEMBERS = {
    "json_offset": "int64", "json_size": "int64", "image_offset": "int64", "image_size": "int64",
    "image_extension": "uint8",
}  # fmt: skip
"""Arrays (N,) that versions 1 and 2 had in place of the members."""
_SINCE = {
    2: ("target_kind", "absent"),
    3: (
        "member_start", "member_offset", "member_size", "member_extension", "dataset", "volume", "slice_index",
        "following", "height", "width", "channels", "dtype", "row_spacing", "column_spacing", "slice_spacing",
        "datasets", "volumes", "dtypes", "layout",
    ),
}  # fmt: skip
_ALIGNED = 64
_TEXT_CHUNK = 2**20
_LIMITS = {
    "member_size": max(MAX_RECORD, MAX_BYTES) + 1, "shard_sizes": 2**60, "member_offset": 2**60,
    "target_area": 2**60, "target_start": 2**60, "member_start": 2**60, "height": 2**31, "width": 2**31,
    "channels": 4, "target_kind": len(KINDS),
}  # fmt: skip
TABLES = {
    "member_extension": "extensions", "target_term": "terms", "dataset": "datasets", "modality": "modalities",
    "patient": "patients", "volume": "volumes", "dtype": "dtypes",
}  # fmt: skip
"""Arrays that hold numbers of entries of another one, which lists texts."""


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an index file, whole or not at all; equal arrays give equal bytes."""
    hidden = path.with_name(f".{path.name}.partial")
    with hidden.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, array in {"version": np.array(INDEX_VERSION, np.int64), **arrays}.items():
                info = zipfile.ZipInfo(f"{name}.npy")
                # Arrays begin where a processor likes to read them; the extra field fills up to there.
                taken = file.tell() + 30 + len(info.filename) + 20
                info.extra = _filling(-taken % _ALIGNED)
                with archive.open(info, "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    hidden.rename(path)


def _filling(size: int) -> bytes:
    size += _ALIGNED if 0 < size < 4 else 0
    return struct.pack("<HH", 0x6673, size - 4) + bytes(size - 4) if size else b""


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """Read the arrays of an index, check them, and return them with the SHA-256 of the file.

    They are views of one anonymous map, which the workers of a process share. The file itself is not mapped: whoever
    copied another one over it would end the run with a bus error and no word.

    Args:
        path: A plain file of at most `stores.base.MAX_INDEX` bytes.

    Raises:
        OSError: The file cannot be read.
        UserError: It is not what this version reads.
        Exception: What damaged bytes make zipfile and NumPy raise.
    """
    block = mmap.mmap(-1, max(1, path.stat().st_size))
    with path.open("rb", buffering=0) as file:
        size = 0
        while size < len(block) and (count := file.readinto(memoryview(block)[size:])):
            size += count
    data = memoryview(block)[:size].toreadonly()
    arrays = _views(data)
    check_arrays(arrays)
    return arrays, hashlib.sha256(data).hexdigest()


class _Memory(io.RawIOBase):
    """A file over memory, which is not copied as `io.BytesIO` would; a map has not all that zipfile asks for."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._place = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: len(self._data)}[whence])
        return self._place

    def readinto(self, buffer: Any) -> int:
        part = self._data[self._place : self._place + len(buffer)]
        buffer[: len(part)] = part
        self._place += len(part)
        return len(part)


def _views(data: memoryview) -> dict[str, np.ndarray]:
    """Return the arrays, of the present version; only types are checked."""
    with zipfile.ZipFile(_Memory(data)) as archive:
        items = {item.filename.removesuffix(".npy"): item for item in archive.infolist()}
        # Ours are stored as they are. A compressed one could grow without end, and one read twice too.
        if any(item.compress_type != zipfile.ZIP_STORED or item.flag_bits & 1 for item in items.values()):
            raise UserError("it is compressed or encrypted")
        if len(items) != len(archive.infolist()) or sum(item.file_size for item in items.values()) > len(data):
            raise UserError("its parts overlap")

        def load(name: str, kind: str, dimensions: int = 1) -> np.ndarray:
            def check(shape: tuple[int, ...], dtype: np.dtype) -> None:
                if len(shape) != dimensions or (dtype.kind if len(kind) == 1 else dtype.name) != kind:
                    raise UserError(f"'{name}' has shape {shape} and type {dtype}")

            if name not in items:
                raise UserError(f"'{name}' is missing")
            item = items[name]
            with archive.open(item) as member:  # this also compares its two headers
                shape, _, dtype = read_npy_header(member, item.file_size, check)
                header = member.tell()
            lengths = struct.unpack_from("<HH", data, item.header_offset + 26)
            start = item.header_offset + 30 + sum(lengths)
            content = data[start : start + item.file_size]
            if len(content) != item.file_size or zlib.crc32(content) != item.CRC:
                raise UserError(f"the bytes of '{name}' are not those that were written")
            array = np.frombuffer(content[header:], dtype).reshape(shape) if dtype.itemsize else np.zeros(shape, dtype)
            return array.astype(dtype.newbyteorder("="), copy=False)

        version = int(load("version", "int64", 0))
        if not 1 <= version <= INDEX_VERSION:
            raise UserError(f"format {version} is newer than {INDEX_VERSION}: update sam-trainer")
        new = {name for since, names in _SINCE.items() if version < since for name in names}
        arrays = {name: load(name, kind) for name, (kind, _) in ARRAYS.items() if name not in new}
        if version < INDEX_VERSION:
            old = {name: load(name, kind) for name, kind in _OLD_MEMBERS.items()}
            arrays.update({name: array for name, array in _upgrade(arrays, old).items() if name in new})
    return arrays


def _upgrade(arrays: dict[str, np.ndarray], old: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what an index of an older version lacks: its members, and of the rest that it is not known."""
    count = len(arrays["raw_keys"])
    if any(len(array) != count for array in old.values()):
        raise UserError("its members are not as many as its keys")
    if old["image_extension"].size and old["image_extension"].max() >= len(arrays["extensions"]):
        raise UserError("'image_extension' is out of range")
    arrays["extensions"] = np.append(np.array(["json"]), arrays["extensions"])
    zeros = np.zeros(count, np.int32)
    unknown = np.full(count, np.nan, np.float32)
    return {
        "target_kind": np.zeros(len(arrays["target_term"]), np.uint8),
        "absent": np.full(len(arrays["terms"]), -1),
        "member_start": np.arange(0, 2 * count + 1, 2),
        "member_offset": np.stack([old["json_offset"], old["image_offset"]], axis=1).ravel(),
        "member_size": np.stack([old["json_size"], old["image_size"]], axis=1).ravel(),
        "member_extension": np.stack([zeros.astype(np.uint8), old["image_extension"] + 1], axis=1).ravel(),
        **dict.fromkeys(("dataset", "volume", "height", "width"), zeros),
        **{name: zeros.astype(np.uint8) for name in ("channels", "dtype")},
        **dict.fromkeys(("slice_index", "following"), zeros - 1),
        **dict.fromkeys(("row_spacing", "column_spacing", "slice_spacing"), unknown),
        **{name: np.array([""]) for name in ("datasets", "volumes", "dtypes", "layout")},
    }


def check_arrays(arrays: Mapping[str, np.ndarray]) -> None:
    """Raise a `UserError` where lengths differ, a number points to nothing, or a text is none."""
    count = len(arrays["raw_keys"])
    lengths = {"S": len(arrays["shard_names"]), "N": count, "N + 1": count + 1, "one": 1}
    lengths |= {"M": len(arrays["member_size"]), "T": len(arrays["target_term"]), "terms": len(arrays["terms"])}
    for name, (_, length) in ARRAYS.items():
        if length and len(arrays[name]) != lengths[length]:
            raise UserError(f"'{name}' has {len(arrays[name])} items instead of {lengths[length]}")
    if not count:
        raise UserError("it lists no sample")
    limits = {**_LIMITS, **{name: len(arrays[table]) for name, table in TABLES.items()}, "shard": lengths["S"]}
    limits["following"] = count
    for name, limit in limits.items():
        array, least = arrays[name], -1 if name == "following" else 0
        if array.size and not least <= array.min() <= array.max() < limit:
            raise UserError(f"'{name}' is out of range")
    for name, total, fewest in (("target_start", lengths["T"], 0), ("member_start", lengths["M"], 1)):
        start = arrays[name]
        if start[0] != 0 or start[-1] != total or (np.diff(start) < fewest).any():
            raise UserError(f"'{name}' does not cut the {name.removesuffix('_start')}s")
    ends = np.repeat(arrays["shard_sizes"][arrays["shard"]], np.diff(arrays["member_start"]))
    ends -= arrays["member_size"]
    if (arrays["member_offset"] > ends).any():
        raise UserError("'member_offset' lies outside of a shard")
    for shard in arrays["shard_names"].tolist():
        if not is_text(shard) or "/" in shard or not shard.endswith(".tar"):
            raise UserError(f"a shard is called {show(shard)}")
    for name, (kind, _) in ARRAYS.items():
        if kind == "U" and name != "layout":
            _check_texts(name, arrays[name])
    known = {"json", *IMAGE_EXTENSIONS}
    if arrays["layout"].tolist() == [""] and not known.issuperset(arrays["extensions"].tolist()):
        raise UserError("a member has an unknown extension")
    _check_keys(arrays["raw_keys"])


def _check_texts(name: str, texts: np.ndarray) -> None:
    """Refuse what `strict.is_text` refuses, for a whole array at once."""
    if not len(texts) or not texts.dtype.itemsize:
        return
    if texts.dtype.itemsize > 4000:
        raise UserError(f"'{name}' holds texts of more than 1000 characters")
    letters = np.ascontiguousarray(texts).view(np.uint32).reshape(len(texts), -1)
    for part in np.array_split(letters, 1 + letters.size // _TEXT_CHUNK):  # in parts, for the sake of memory
        bad = (part[:, :-1] == 0) & (part[:, 1:] != 0)  # a zero inside of a text
        wrong = (part - 1 < 0x1F) | (part - 0x7F < 0x21) | (part - 0x2028 < 2) | (part - 0xD800 < 0x800)
        if bad.any() or wrong.any() or (part.size and part.max() > 0x10FFFF):
            raise UserError(f"'{name}' holds what is no text")


def _check_keys(keys: np.ndarray) -> None:
    if not keys.dtype.itemsize:
        raise UserError("a key is empty")
    letters = np.ascontiguousarray(keys).view(np.uint8).reshape(len(keys), -1)
    for part in np.array_split(letters, 1 + letters.size // _TEXT_CHUNK):
        ends = (part[:, :-1] == 0) & (part[:, 1:] != 0)  # a zero inside of a key
        if ends.any() or not part[:, :1].all() or part.max() > 126 or ((part != 0) & (part < 32)).any():
            raise UserError("a key is no text")
