"""WebDataset tars whose bytes depend on nothing but the samples."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

BLOCK = 512
"""Tar's unit: every header is one block, every member is padded to whole blocks."""


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:06d}.tar"


class ShardWriter:
    """Writes samples to ``shard-000000.tar``, ``shard-000001.tar``, … of a folder, in the order given.

    A shard has a hidden name until it is complete and on disk. Shuffling is the sampler's business.
    """

    def __init__(self, folder: Path, max_samples: int, max_bytes: int) -> None:
        self._folder = folder
        self._max_samples, self._max_bytes = max_samples, max_bytes
        self._shards = self._samples = self._bytes = 0
        self._tar: tarfile.TarFile | None = None
        self._file: io.BufferedWriter | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append a sample.

        Args:
            key: Its unique name.
            members: Bytes by extension, as from `Triplet.encode`.
        """
        size = sum(BLOCK + -(-len(data) // BLOCK) * BLOCK for data in members.values())
        if self._samples and (self._samples >= self._max_samples or self._bytes + size > self._max_bytes):
            self._finish()
        tar = self._tar or self._open()
        for extension in sorted(members):
            header = tarfile.TarInfo(f"{key}.{extension}")  # mtime, uid and gid are 0, the owner's names empty
            header.size, header.mode = len(members[extension]), 0o644
            tar.addfile(header, io.BytesIO(members[extension]))
        self._samples += 1
        self._bytes += size

    def close(self) -> None:
        """Complete the last shard."""
        if self._tar is not None:
            self._finish()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def _open(self) -> tarfile.TarFile:
        self._file = self._hidden().open("wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        return self._tar

    def _finish(self) -> None:
        assert self._tar is not None and self._file is not None
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._hidden().rename(self._folder / shard_name(self._shards))
        self._tar = self._file = None
        self._shards += 1
        self._samples = self._bytes = 0

    def _hidden(self) -> Path:
        return self._folder / f".{shard_name(self._shards)}.partial"
