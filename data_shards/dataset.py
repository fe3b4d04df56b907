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


class ShardDataset:
    """The samples of one split, by number, in the order of the shards.

    Every read is checked against the index; damage raises and is never skipped. Safe to use from threads, to fork and
    to pickle: shards are opened when first read, and reads name their own offset.

    Args:
        folder: Folder of the shards and their index, such as ``OUT/train``.
        check: Check first that every shard exists with the recorded size.

    Raises:
        UserError: The index or a shard is missing or does not fit.
    """

    def __init__(self, folder: str | Path, check: bool = True) -> None:
        self.folder = Path(folder)
        self.index = Index.load(self.folder, check)
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
        return Triplet.decode(self.index.key(number), self.read(number))

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
        data = self._pread(number, start, stop - start)
        members = {name: data[offset - start : offset - start + size] for name, (offset, size) in spans.items()}
        crc = 0
        for content in members.values():
            crc = zlib.crc32(content, crc)
        if len(data) != stop - start or crc != index.crc32[number]:
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
                return os.pread(file, size, offset)
            file = os.open(self.folder / str(self.index.shard_names[shard]), os.O_RDONLY | os.O_CLOEXEC)
            try:
                return os.pread(file, size, offset)
            finally:
                if len(self._files) >= _MAX_OPEN or self._files.setdefault(shard, file) != file:
                    os.close(file)
        except OSError as error:
            raise self._damage(number, f"it cannot be read ({error.strerror})") from error

    def _damage(self, number: int, what: str) -> UserError:
        shard = self.folder / str(self.index.shard_names[self.index.shard[number]])
        return UserError(
            f"{shard}: sample '{self.index.key(number)}' is damaged, {what}: run `data-shards verify {self.folder}`"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()
