"""The index of a folder of shards: random access, checks and statistics without opening a tar.

``index.npz`` lies beside the tars and holds plain arrays (nothing pickled), so that a million samples open at once.
Shapes: S shards, N samples, T targets.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.codecs import IMAGE_EXTENSIONS, MAX_BYTES, read_npy
from data_shards.errors import UserError
from data_shards.strict import is_text, show
from data_shards.tars import Member, scan_shard
from data_shards.triplet import KINDS, MAX_RECORD, read_record

INDEX_NAME = "index.npz"
INDEX_VERSION = 2
"""Raised whenever a stored array changes its meaning. Version 2 added `target_kind` and `absent`."""

_MAX_INDEX = 2**32
"""Bytes of the largest index that is read: some thirty million samples."""


@dataclass(frozen=True)
class Index:
    """Where every sample lies and what it holds.

    Attributes:
        folder: Folder of the shards.
        sha256: SHA-256 of the index file: it covers the shards' own hashes, so it names the data of a run.
        shard_names: (S,) file names.
        shard_sizes: (S,) bytes.
        shard_sha256: (S,) hexadecimal.
        raw_keys: (N,) keys as ASCII bytes; `keys` has them as text.
        shard: (N,) number of the shard.
        json_offset: (N,) first byte of the JSON member in the shard.
        json_size: (N,) its bytes.
        image_offset: (N,) first byte of the image member.
        image_size: (N,) its bytes.
        image_extension: (N,) number of the image's extension in `extensions`.
        crc32: (N,) CRC-32 of the JSON's bytes followed by the image's.
        target_start: (N + 1,) the targets of sample i are ``target_start[i]:target_start[i + 1]``.
        target_term: (T,) number of the term in `terms`.
        target_area: (T,) pixels.
        target_kind: (T,) 0 semantic, 1 instance.
        modality: (N,) number of the modality in `modalities`.
        patient: (N,) number of the patient in `patients`.
        extensions: Table of image extensions.
        terms: Table of terms, of the targets and of those looked for.
        absent: (number of terms,) samples in which a term was looked for and is not; −1 where an old index cannot say.
        modalities: Table of modalities.
        patients: Table of patient hashes.
    """

    folder: Path
    sha256: str
    shard_names: np.ndarray
    shard_sizes: np.ndarray
    shard_sha256: np.ndarray
    raw_keys: np.ndarray
    shard: np.ndarray
    json_offset: np.ndarray
    json_size: np.ndarray
    image_offset: np.ndarray
    image_size: np.ndarray
    image_extension: np.ndarray
    crc32: np.ndarray
    target_start: np.ndarray
    target_term: np.ndarray
    target_area: np.ndarray
    target_kind: np.ndarray
    modality: np.ndarray
    patient: np.ndarray
    extensions: np.ndarray
    terms: np.ndarray
    absent: np.ndarray
    modalities: np.ndarray
    patients: np.ndarray

    def __len__(self) -> int:
        return len(self.raw_keys)

    @cached_property
    def keys(self) -> np.ndarray:
        """The keys as text (N,)."""
        return self.raw_keys.astype(str)

    def key(self, number: int) -> str:
        """Return one key."""
        return bytes(self.raw_keys[number]).decode("ascii")

    def targets(self, number: int) -> list[tuple[str, int, str]]:
        """Return (term, area, kind) of the targets of one sample."""
        span = slice(self.target_start[number], self.target_start[number + 1])
        rows = zip(self.target_term[span], self.target_area[span], self.target_kind[span], strict=True)
        return [(str(self.terms[term]), int(area), KINDS[kind]) for term, area, kind in rows]

    @classmethod
    def load(cls, folder: str | Path, check: bool = True) -> Index:
        """Open the index of a folder.

        Args:
            folder: Folder of the shards.
            check: Check that every shard exists with the recorded size.

        Raises:
            UserError: The index is missing or damaged, or a shard is missing or has another size.
        """
        folder = local_folder(folder)
        path = folder / INDEX_NAME
        try:
            # Opening a pipe would wait for whoever writes into it.
            status = path.stat()
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_INDEX:
                raise UserError(f"{path}: not a file of at most {_MAX_INDEX} bytes: copy or build the shards again")
            data = path.read_bytes()
        except OSError:
            raise UserError(
                f"{folder}: no {INDEX_NAME} here: build the shards with `data-shards build`{_inside(folder)}"
            ) from None
        try:
            index = cls(folder=folder, sha256=hashlib.sha256(data).hexdigest(), **_unpack(data))
            del data
            _check_ranges(index)
        except Exception as error:  # whatever damaged bytes make zipfile and NumPy raise
            raise UserError(f"{path}: damaged index ({error}): copy or build the shards again") from error
        if check:
            for problem in index.missing():
                raise UserError(problem)
        return index

    def missing(self) -> Iterator[str]:
        """Yield one line for each shard that does not exist with the recorded size."""
        for name, size in zip(self.shard_names, self.shard_sizes, strict=True):
            path = self.folder / str(name)
            try:
                found = os.stat(path)  # noqa: PTH116
            except OSError:
                yield f"{path}: the shard is missing: copy it again, or build the corpus again"
                continue
            if not stat.S_ISREG(found.st_mode):
                yield f"{path}: not a file: copy the shard again, or build the corpus again"
            elif found.st_size != size:
                had = f"{found.st_size} bytes instead of {size}"
                yield f"{path}: the shard has {had}: copy it again, or build the corpus again"

    def save(self) -> None:
        """Write the index into its folder; equal indices give equal bytes."""
        path = self.folder / INDEX_NAME
        hidden = path.with_name(f".{INDEX_NAME}.partial")
        with hidden.open("wb") as file:
            np.savez(file, version=np.int64(INDEX_VERSION), **{name: getattr(self, name) for name in _ARRAYS})
            file.flush()
            os.fsync(file.fileno())
        hidden.rename(path)


def write_index(folder: str | Path) -> Index:
    """Scan the tars of a folder, write their index beside them and open it.

    The tars need not be ours: a sample needs a JSON member with our fields and one image.

    Raises:
        UserError: There is no tar, or a tar or a sample cannot be read.
    """
    folder = local_folder(folder)
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise UserError(f"{folder}: no .tar file here")
    table = _Table()
    for number, path in enumerate(paths):
        for key, members in scan_shard(path):
            table.add(number, path, key, members)
        with path.open("rb") as file:
            table.shards.append((path.name, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()))
    table.index(folder).save()
    return Index.load(folder)


class _Table:
    """Collects the rows of an index."""

    def __init__(self) -> None:
        self.shards: list[tuple[str, int, str]] = []
        self._rows: list[tuple[Any, ...]] = []
        self._targets: list[tuple[int, int, int]] = []
        self._absent: Counter[int] = Counter()
        self._numbers: dict[str, dict[str, int]] = {
            name: {} for name in ("extensions", "terms", "modalities", "patients")
        }

    def add(self, shard: int, path: Path, key: str, members: list[Member]) -> None:
        """Add a sample found in a shard."""
        record = next((member for member in members if member.extension == "json"), None)
        images = [member for member in members if member.extension in IMAGE_EXTENSIONS]
        if record is None or len(images) != 1:
            got = ", ".join(member.extension for member in members)
            wanted = " or ".join(IMAGE_EXTENSIONS)
            raise UserError(f"{path}: sample '{key}' needs a json member and one image ({wanted}), got {got}")
        try:
            targets, looked_for, origin = read_record(record.data)
        except UserError as error:
            raise UserError(f"{path}: sample '{key}' is not a triplet: {error}") from error
        found = [(self._number("terms", item.term), item.area, KINDS.index(item.kind)) for item in targets]
        here = {term for term, _, _ in found}
        self._absent.update({self._number("terms", term) for term in looked_for} - here)
        image = images[0]
        crc = zlib.crc32(image.data, zlib.crc32(record.data))
        place = (shard, record.offset, len(record.data), image.offset, len(image.data))
        numbers = (self._number("extensions", image.extension), crc, len(found))
        owners = (self._number("modalities", origin.modality), self._number("patients", origin.patient))
        self._rows.append((key.encode("ascii"), *place, *numbers, *owners))
        self._targets.extend(found)

    def index(self, folder: Path) -> Index:
        """Return the rows as arrays."""
        key, shard, json_offset, json_size, image_offset, image_size, extension, crc32, count, modality, patient = zip(
            *self._rows, strict=True
        )
        term, area, kind = zip(*self._targets, strict=True) if self._targets else ((), (), ())
        names, sizes, hashes = zip(*self.shards, strict=True)
        return Index(
            folder=folder,
            sha256="",
            shard_names=np.array(names, dtype=str),
            shard_sizes=np.array(sizes, dtype=np.int64),
            shard_sha256=np.array(hashes, dtype=str),
            raw_keys=np.array(key, dtype=bytes),
            shard=np.array(shard, dtype=np.int32),
            json_offset=np.array(json_offset, dtype=np.int64),
            json_size=np.array(json_size, dtype=np.int64),
            image_offset=np.array(image_offset, dtype=np.int64),
            image_size=np.array(image_size, dtype=np.int64),
            image_extension=np.array(extension, dtype=np.uint8),
            crc32=np.array(crc32, dtype=np.uint32),
            target_start=np.concatenate([[0], np.cumsum(count)]).astype(np.int64),
            target_term=np.array(term, dtype=np.int32),
            target_area=np.array(area, dtype=np.int64),
            target_kind=np.array(kind, dtype=np.uint8),
            absent=np.array([self._absent[number] for number in range(len(self._numbers["terms"]))], dtype=np.int64),
            modality=np.array(modality, dtype=np.int32),
            patient=np.array(patient, dtype=np.int32),
            **{name: np.array(list(known), dtype=str) for name, known in self._numbers.items()},
        )

    def _number(self, table: str, name: str) -> int:
        known = self._numbers[table]
        return known.setdefault(name, len(known))


_ARRAYS: dict[str, tuple[str, str]] = {
    "shard_names": ("U", "S"), "shard_sizes": ("int64", "S"), "shard_sha256": ("U", "S"),
    "raw_keys": ("S", "N"), "shard": ("int32", "N"),
    "json_offset": ("int64", "N"), "json_size": ("int64", "N"),
    "image_offset": ("int64", "N"), "image_size": ("int64", "N"), "image_extension": ("uint8", "N"),
    "crc32": ("uint32", "N"), "target_start": ("int64", "N + 1"),
    "target_term": ("int32", "T"), "target_area": ("int64", "T"), "target_kind": ("uint8", "T"),
    "modality": ("int32", "N"), "patient": ("int32", "N"),
    "extensions": ("U", ""), "terms": ("U", "terms"), "absent": ("int64", "terms"),
    "modalities": ("U", ""), "patients": ("U", ""),
}  # fmt: skip
"""Type and length of every array in the file; arrays whose lengths have one name are equally long."""


def _unpack(data: bytes) -> dict[str, np.ndarray]:
    """Read the arrays of an index; only types and lengths are checked."""
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        items = {item.filename.removesuffix(".npy"): item for item in archive.infolist()}
        # Ours are stored as they are. A compressed one could grow without end, and one read twice too.
        if any(item.compress_type != zipfile.ZIP_STORED or item.flag_bits & 1 for item in items.values()):
            raise UserError("it is compressed or encrypted")
        if len(items) != len(archive.infolist()) or sum(item.file_size for item in items.values()) > len(data):
            raise UserError("its parts overlap")

        def load(name: str, kind: str, dimensions: int) -> np.ndarray:
            def check(shape: tuple[int, ...], dtype: np.dtype) -> None:
                if len(shape) != dimensions or (dtype.kind if len(kind) == 1 else dtype.name) != kind:
                    raise UserError(f"'{name}' has shape {shape} and type {dtype}")

            if name not in items:
                raise UserError(f"'{name}' is missing")
            with archive.open(items[name]) as file:
                return read_npy(file, items[name].file_size, check)

        version = int(load("version", "int64", 0))
        if not 1 <= version <= INDEX_VERSION:
            raise UserError(f"format {version} is newer than {INDEX_VERSION}: update sam-trainer")
        for name, (kind, _) in _ARRAYS.items():
            if version >= 2 or name not in ("target_kind", "absent"):
                arrays[name] = load(name, kind, 1)
    if version < 2:
        arrays["target_kind"] = np.zeros(len(arrays["target_term"]), np.uint8)
        arrays["absent"] = np.full(len(arrays["terms"]), -1)
    return arrays


def _check_ranges(index: Index) -> None:
    """Raise a `UserError` where a number points to nothing, or a text is none."""
    lengths = {"S": len(index.shard_names), "N": len(index), "N + 1": len(index) + 1, "T": len(index.target_term)}
    lengths["terms"] = len(index.terms)
    for name, (_, length) in _ARRAYS.items():
        if length and len(getattr(index, name)) != lengths[length]:
            raise UserError(f"'{name}' has {len(getattr(index, name))} items instead of {lengths[length]}")
    _check_texts(index)
    limits: dict[str, int] = {
        "shard": lengths["S"], "image_extension": len(index.extensions), "target_term": len(index.terms),
        "target_kind": len(KINDS), "modality": len(index.modalities), "patient": len(index.patients),
        "json_size": MAX_RECORD + 1, "image_size": MAX_BYTES + 1,
        "shard_sizes": 2**60, "json_offset": 2**60, "image_offset": 2**60, "target_area": 2**60, "target_start": 2**60,
    }  # fmt: skip
    for name, limit in limits.items():
        array = getattr(index, name)
        if array.size and not 0 <= array.min() <= array.max() < limit:
            raise UserError(f"'{name}' is out of range")
    start = index.target_start
    if start[0] != 0 or start[-1] != lengths["T"] or (start[1:] < start[:-1]).any():
        raise UserError("'target_start' does not cut the targets")
    sizes = index.shard_sizes[index.shard]
    for kind in ("json", "image"):
        if (getattr(index, f"{kind}_offset") + getattr(index, f"{kind}_size") > sizes).any():
            raise UserError(f"'{kind}_offset' lies outside of a shard")


def _check_texts(index: Index) -> None:
    for name in index.shard_names:
        if not is_text(str(name)) or "/" in str(name) or not str(name).endswith(".tar"):
            raise UserError(f"a shard is called {show(str(name))}")
    if not set(index.extensions.tolist()) <= set(IMAGE_EXTENSIONS):
        raise UserError("an image has an unknown extension")
    for name in ("shard_sha256", "terms", "modalities", "patients"):
        for text in getattr(index, name).tolist():
            if not is_text(text):
                raise UserError(f"'{name}' holds {show(text)}")
    if not len(index):
        raise UserError("it lists no sample")
    letters = index.raw_keys.view(np.uint8).reshape(len(index), -1)
    for part in np.array_split(letters, 1 + letters.size // 2**20):  # in parts, for the sake of memory
        ends = (part[:, :-1] == 0) & (part[:, 1:] != 0)  # a zero inside of a key
        if ends.any() or not part[:, :1].all() or part.max() > 126 or ((part != 0) & (part < 32)).any():
            raise UserError("a key is no text")


def _inside(folder: Path) -> str:
    """Hint at the splits, if the folder is that of a whole corpus."""
    splits = sorted(path.parent.name for path in folder.glob(f"*/{INDEX_NAME}"))
    return f", or name one of its splits: {', '.join(splits)}" if splits else ""


def local_folder(folder: str | Path) -> Path:
    """Return a folder's path.

    Raises:
        UserError: It is written as a URL or as a command, as WebDataset takes them: nothing is fetched or run here.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", str(folder)) and not Path(folder).exists():
        raise UserError(f"{folder}: shards are read from folders only; nothing is fetched or run: copy them here first")
    return Path(folder)
