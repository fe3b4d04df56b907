"""Random access to the samples of a folder of shards."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

from data_shards.errors import UserError
from data_shards.index import Index
from data_shards.triplet import Triplet

_MAX_OPEN = 256
"""Shards kept open by one process; beyond it a shard is opened for each read."""
_MAX_GAP = 2**16
"""Bytes between two members of a sample that are read along with them."""


class ShardDataset:
    """The samples of one split, by number, in the order of the shards.

    Every read is checked against the index; damage raises and is never skipped. Safe to use from threads, to fork and
    to pickle: shards are opened when first read, and reads name their own offset.

    Args:
        folder: Folder of the shards and their index, such as ``OUT/train``. URLs and commands, as `webdataset` takes
            them, are refused: nothing is ever fetched or run.
        check: Check first that every shard exists with the recorded size.

    Raises:
        UserError: The index or a shard is missing or does not fit.
    """

    def __init__(self, folder: str | Path, check: bool = True) -> None:
        self.index = Index.load(folder, check)
        self.folder = self.index.folder
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> Triplet:
        """Read one sample; negative numbers count from the end.

        Raises:
            IndexError: There is no such sample.
            UserError: The sample is damaged.
        """
        if not -len(self) <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        number = int(number) % len(self)
        members = self.read(number)
        try:
            return Triplet.decode(self.index.key(number), members)
        except UserError as error:
            raise UserError(f"{self._shard(number)}: {error}") from error

    def read(self, number: int) -> dict[str, bytes]:
        """Read the members of one sample (0 to N − 1), as bytes by extension, checked but not decoded.

        Raises:
            UserError: The bytes are not those that the index recorded.
        """
        index = self.index
        spans = {
            "json": (int(index.json_offset[number]), int(index.json_size[number])),
            str(index.extensions[index.image_extension[number]]): (
                int(index.image_offset[number]),
                int(index.image_size[number]),
            ),
        }
        start = min(offset for offset, _ in spans.values())
        stop = max(offset + size for offset, size in spans.values())
        if stop - start <= sum(size for _, size in spans.values()) + _MAX_GAP:
            data = self._pread(number, start, stop - start)
            members = {name: data[offset - start : offset - start + size] for name, (offset, size) in spans.items()}
        else:  # a foreign tar may have anything between the two
            members = {name: self._pread(number, offset, size) for name, (offset, size) in spans.items()}
        crc = 0
        for content in members.values():
            crc = zlib.crc32(content, crc)
        whole = all(len(members[name]) == size for name, (_, size) in spans.items())
        if not whole or crc != index.crc32[number]:
            raise self._damage(number, "its bytes changed since the build")
        return members

    def close(self) -> None:
        """Close the shards; a later read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _pread(self, number: int, offset: int, size: int) -> bytes:
        """Read a span of the sample's shard; shorter where the shard ends."""
        shard = int(self.index.shard[number])
        file = self._files.get(shard)
        try:
            if file is not None:
                return _read(file, size, offset)
            file = os.open(self._shard(number), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                return _read(file, size, offset)
            finally:
                if len(self._files) >= _MAX_OPEN or self._files.setdefault(shard, file) != file:
                    os.close(file)
        except OSError as error:
            raise self._damage(number, f"it cannot be read ({error.strerror})") from error
        except MemoryError as error:
            raise self._damage(number, f"there is no memory for its {size} bytes") from error

    def _shard(self, number: int) -> Path:
        """Return the path of a sample's shard."""
        return self.folder / str(self.index.shard_names[self.index.shard[number]])

    def _damage(self, number: int, what: str) -> UserError:
        key, hint = self.index.key(number), f"run `data-shards verify {self.folder}`"
        return UserError(f"{self._shard(number)}: sample '{key}' is damaged, {what}: {hint}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()


def _read(file: int, size: int, offset: int) -> bytes:
    # Memory is taken before bytes are read: not for more of them than there are.
    return os.pread(file, max(0, min(size, os.fstat(file).st_size - offset)), offset)
