"""Random access to the samples of a folder of shards."""

from __future__ import annotations

import errno
import hashlib
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_shards import foreign
from data_shards.errors import DamageError, UserError
from data_shards.index import Index
from data_shards.stores import LocalStore, open_store
from data_shards.triplet import Triplet

try:
    from isal.isal_zlib import crc32  # five times as fast: with zlib's a sample takes 4 % longer
except ImportError:
    from zlib import crc32

LOOK_SECONDS = 60.0
"""How often an index is looked at that is in use."""
_PUT_BACK = "put back what was there and go on, or start anew on the new data (a training in another default_root_dir)"
_MAX_GAP = 2**16
"""Bytes between two members of a sample that are read along with them."""


class ShardDataset:
    """The samples of one split, by number, in the order of the shards.

    Every read is checked against the index; damage raises and is never skipped. Safe to use from threads, to fork and
    to pickle: shards are opened when first read, and reads name their own offset.

    Args:
        folder: Folder of the shards and their index, such as ``OUT/train``, or its URL: ``s3://``, ``gs://``,
            ``https://``, … Commands, as `webdataset` takes them, are refused: nothing is ever run.
        check: Check first that every shard exists with the recorded size.
        cache: Where samples of a URL are kept on this machine; the user's own cache by default.
        cache_gb: Most gigabytes to keep there.

    Raises:
        UserError: The index or a shard is missing or does not fit.
    """

    def __init__(
        self,
        folder: str | Path,
        check: bool = True,
        cache: str | Path | None = None,
        cache_gb: float | None = None,
    ) -> None:
        self._store = open_store(folder, cache, cache_gb)
        self.root = self._store.root
        path = self._store.index_path()
        try:
            self.index = Index.load(path.parent, check=False)
        except UserError as error:
            if isinstance(self._store, LocalStore):
                raise
            raise UserError(f"{self.root}: its {path.name} is refused ({error}): put a sound one there") from error
        self.folder = self.index.folder
        self._next_look = time.monotonic() + LOOK_SECONDS
        layout = str(self.index.layout[0])
        try:
            self._decode = partial(foreign.decode, foreign.Layout.from_json(layout)) if layout else Triplet.decode
        except UserError as error:
            raise UserError(f"{self.folder}: {error}") from error
        if check:
            for problem in self.missing():
                raise UserError(problem)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> Triplet:
        """Read one sample; negative numbers count from the end.

        Raises:
            IndexError: There is no such sample.
            DamageError: The sample is damaged.
            UserError: The place of the shards cannot be read at all: no network, no rights.
        """
        if not -len(self) <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        number = int(number) % len(self)
        members = self.read(number)
        try:
            return self._decode(self.index.key(number), members)
        except UserError as error:
            raise DamageError(f"{self.shard(number)}: {error}") from error

    def read(self, number: int) -> dict[str, bytes]:
        """Read the members of one sample (0 to N − 1), as bytes by extension, checked but not decoded.

        Raises:
            DamageError: The bytes are not those that the index recorded.
            UserError: The place of the shards cannot be read at all: no network, no rights.
        """
        if time.monotonic() > self._next_look:
            self._check_index()
        spans = self.index.members(number)
        start = min(offset for offset, _ in spans.values())
        stop = max(offset + size for offset, size in spans.values())
        # A foreign tar may have anything between the members.
        together = stop - start <= sum(size for _, size in spans.values()) + _MAX_GAP
        pieces = [(start, stop - start)] if together else list(spans.values())
        shard = str(self.index.shard_names[self.index.shard[number]])
        for attempt in (1, 2):
            data = {offset: self._read(number, offset, size) for offset, size in pieces}
            members = {}
            for name, (offset, size) in spans.items():
                piece, begin = (data[start], offset - start) if together else (data[offset], 0)
                members[name] = piece[begin : begin + size]
            crc = 0
            for content in members.values():
                crc = crc32(content, crc)
            if crc == self.index.crc32[number] and all(len(members[name]) == spans[name][1] for name in spans):
                return members
            if attempt == 1:  # perhaps it is only the copy that was kept
                for offset, size in pieces:
                    self._store.forget(shard, offset, size)
        if self._store.changed(shard):
            raise UserError(f"{self.shard(number)}: changed while it was in use: {_PUT_BACK}")
        raise self._damage(number, "its bytes changed since the build")

    def missing(self) -> Iterator[str]:
        """Yield one line for each shard that does not exist with the recorded size."""
        return self._store.missing(self.index.shard_names.tolist(), self.index.shard_sizes.tolist())

    def shard(self, number: int) -> str:
        """Return the path or URL of a sample's shard."""
        return f"{self.root}/{self.index.shard_names[self.index.shard[number]]}"

    def close(self) -> None:
        """Close the shards; a later read opens them again."""
        self._store.close()

    def _check_index(self) -> None:
        """Look, now and then, whether the corpus was built again while it was in use.

        Samples are checked one by one, so that what is read stays right; but nobody could go on with the run.

        Raises:
            UserError: The index has another content than when it was read.
        """
        self._next_look = time.monotonic() + LOOK_SECONDS
        path = self._store.index_path()
        if self._store.changed(path.name) and path.is_file():
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != self.index.sha256:
                    raise UserError(f"{path}: changed while it was in use: {_PUT_BACK}")

    def _read(self, number: int, offset: int, size: int) -> bytes:
        """Read a span of the sample's shard; shorter where the shard ends."""
        try:
            return self._store.read(str(self.index.shard_names[self.index.shard[number]]), offset, size)
        except OSError as error:
            hint = "put the shard back, then go on" if error.errno == errno.ENOENT else ""
            raise self._damage(number, f"it cannot be read ({error.strerror})", hint) from error
        except MemoryError as error:
            raise self._damage(number, f"there is no memory for its {size} bytes") from error

    def _damage(self, number: int, what: str, hint: str = "") -> DamageError:
        here = self.root == str(self.folder)
        hint = hint or (f"run `data-shards verify {self.root}`" if here else "copy the shard there again")
        return DamageError(f"{self.shard(number)}: sample '{self.index.key(number)}' is damaged, {what}: {hint}")
