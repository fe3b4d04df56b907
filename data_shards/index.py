"""The index of a folder of shards: random access, checks and statistics without opening a tar.

``index.npz`` lies beside the tars and holds plain arrays (nothing pickled), so that a million samples open at once.
Shapes: S shards, N samples, T targets.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.errors import UserError
from data_shards.triplet import IMAGE_EXTENSIONS

INDEX_NAME = "index.npz"
INDEX_VERSION = 1
"""Raised whenever a stored array changes its meaning."""


@dataclass(frozen=True)
class Member:
    """Where the bytes of one member of a sample lie in its tar."""

    extension: str
    offset: int
    data: bytes


def scan_shard(path: Path) -> Iterator[tuple[str, list[Member]]]:
    """Yield the samples of any WebDataset tar: (key, members), in the order of the tar.

    Members of one sample follow each other and share the key, which is the name up to the first dot of its last part.

    Raises:
        UserError: The tar is missing or damaged, or has no samples.
    """
    key, members = None, list[Member]()
    try:
        with tarfile.open(path, "r:") as tar:
            for item in tar:
                if not item.isfile():
                    continue
                folder, _, name = item.name.rpartition("/")
                stem, _, extension = name.partition(".")
                owner = f"{folder}/{stem}" if folder else stem
                if owner != key:
                    if key is not None:
                        yield key, members
                    key, members = owner, []
                content = tar.extractfile(item)
                data = content.read() if content else b""
                if len(data) != item.size:
                    raise UserError(f"{path}: sample '{owner}' is cut off: copy or build the shard again")
                members.append(Member(extension, item.offset_data, data))
            # tarfile takes a cut between two members for the end; a whole tar ends with blocks of zeros.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise UserError(f"{path}: the shard is cut off after '{key}': copy or build it again")
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{path}: not a readable tar ({error}): copy or build the shard again") from error
    if key is None:
        raise UserError(f"{path}: the shard holds no sample")
    yield key, members


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
        modality: (N,) number of the modality in `modalities`.
        patient: (N,) number of the patient in `patients`.
        extensions: Table of image extensions.
        terms: Table of terms of the targets.
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
    modality: np.ndarray
    patient: np.ndarray
    extensions: np.ndarray
    terms: np.ndarray
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

    def targets(self, number: int) -> list[tuple[str, int]]:
        """Return (term, area) of the targets of one sample."""
        span = slice(self.target_start[number], self.target_start[number + 1])
        pairs = zip(self.target_term[span], self.target_area[span], strict=True)
        return [(str(self.terms[term]), int(area)) for term, area in pairs]

    @classmethod
    def load(cls, folder: str | Path, check: bool = True) -> Index:
        """Open the index of a folder.

        Args:
            folder: Folder of the shards.
            check: Check that every shard exists with the recorded size.

        Raises:
            UserError: The index is missing or damaged, or a shard is missing or has another size.
        """
        folder = Path(folder)
        path = folder / INDEX_NAME
        try:
            data = path.read_bytes()
        except OSError:
            raise UserError(
                f"{folder}: no {INDEX_NAME} here: build the shards with `data-shards build`{_inside(folder)}"
            ) from None
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as content:
                version = int(content["version"])
                arrays = {name: content[name] for name in _array_names()} if version <= INDEX_VERSION else {}
        except Exception as error:  # whatever damaged bytes make NumPy raise
            raise UserError(f"{path}: damaged index ({error}): copy or build the shards again") from error
        if not arrays:
            raise UserError(f"{path}: format {version} is newer than {INDEX_VERSION}: update sam-trainer")
        index = cls(folder=folder, sha256=hashlib.sha256(data).hexdigest(), **arrays)
        if check:
            for problem in index.missing():
                raise UserError(problem)
        return index

    def missing(self) -> Iterator[str]:
        """Yield one line for each shard that does not exist with the recorded size."""
        for name, size in zip(self.shard_names, self.shard_sizes, strict=True):
            path = self.folder / str(name)
            try:
                found = os.stat(path).st_size  # noqa: PTH116
            except OSError:
                yield f"{path}: the shard is missing: copy it again, or build the corpus again"
                continue
            if found != size:
                yield f"{path}: the shard has {found} bytes instead of {size}: copy it again, or build the corpus again"

    def save(self) -> None:
        """Write the index into its folder; equal indices give equal bytes."""
        path = self.folder / INDEX_NAME
        hidden = path.with_name(f".{INDEX_NAME}.partial")
        with hidden.open("wb") as file:
            np.savez(file, version=np.int64(INDEX_VERSION), **{name: getattr(self, name) for name in _array_names()})
            file.flush()
            os.fsync(file.fileno())
        hidden.rename(path)


def write_index(folder: str | Path) -> Index:
    """Scan the tars of a folder, write their index beside them and open it.

    The tars need not be ours: a sample needs a JSON member with our fields and one image.

    Raises:
        UserError: There is no tar, or a tar or a sample cannot be read.
    """
    folder = Path(folder)
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
        self._targets: list[tuple[int, int]] = []
        self._numbers: dict[str, dict[str, int]] = {
            name: {} for name in ("extensions", "terms", "modalities", "patients")
        }

    def add(self, shard: int, path: Path, key: str, members: list[Member]) -> None:
        """Add a sample found in a shard."""
        record = next((member for member in members if member.extension == "json"), None)
        images = [member for member in members if member.extension in IMAGE_EXTENSIONS]
        if record is None or len(images) != 1:
            found = ", ".join(member.extension for member in members)
            wanted = " or ".join(IMAGE_EXTENSIONS)
            raise UserError(f"{path}: sample '{key}' needs a json member and one image ({wanted}), got {found}")
        try:
            content = json.loads(record.data)
            targets = [(self._number("terms", str(item["term"])), int(item["area"])) for item in content["targets"]]
            origin = content["provenance"]
            modality, patient = str(origin["modality"]), str(origin["patient"])
            raw_key = key.encode("ascii")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: sample '{key}' is not a triplet ({type(error).__name__}: {error})") from error
        image = images[0]
        crc = zlib.crc32(image.data, zlib.crc32(record.data))
        place = (shard, record.offset, len(record.data), image.offset, len(image.data))
        numbers = (self._number("extensions", image.extension), crc, len(targets))
        owners = (self._number("modalities", modality), self._number("patients", patient))
        self._rows.append((raw_key, *place, *numbers, *owners))
        self._targets.extend(targets)

    def index(self, folder: Path) -> Index:
        """Return the rows as arrays."""
        key, shard, json_offset, json_size, image_offset, image_size, extension, crc32, count, modality, patient = zip(
            *self._rows, strict=True
        )
        term, area = zip(*self._targets, strict=True) if self._targets else ((), ())
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
            modality=np.array(modality, dtype=np.int32),
            patient=np.array(patient, dtype=np.int32),
            **{name: np.array(list(known), dtype=str) for name, known in self._numbers.items()},
        )

    def _number(self, table: str, name: str) -> int:
        known = self._numbers[table]
        return known.setdefault(name, len(known))


def _array_names() -> list[str]:
    return [item.name for item in fields(Index) if item.name not in ("folder", "sha256")]


def _inside(folder: Path) -> str:
    """Hint at the splits, if the folder is that of a whole corpus."""
    splits = sorted(path.parent.name for path in folder.glob(f"*/{INDEX_NAME}"))
    return f", or name one of its splits: {', '.join(splits)}" if splits else ""
