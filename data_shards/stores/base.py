"""What any store of shards can do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data_shards.errors import UserError
from data_shards.strict import is_text, show

INDEX_NAME = "index.npz"
MAX_INDEX = 2**32
"""Bytes of the largest index that is read: some twenty million samples."""


class Store(Protocol):
    """The bytes of one folder of shards. Safe to use from threads, to fork and to pickle."""

    @property
    def root(self) -> str:
        """Folder or URL, for messages; a password in it is hidden."""

    def index_path(self) -> Path:
        """Return where the index lies on this machine; that of a URL is copied here first, if it changed there.

        Raises:
            UserError: The URL has no index, or cannot be read.
        """

    def missing(self, names: Sequence[str], sizes: Sequence[int]) -> Iterator[str]:
        """Yield one line for each shard that does not exist with its recorded size.

        Raises:
            UserError: The URL cannot be read at all.
        """

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Read a span of a shard; shorter where the shard ends.

        Raises:
            OSError: The shard is missing or is no file: `strerror` says why.
            MemoryError: There is no memory for the span.
            UserError: The place cannot be read: no network, no rights, no driver. Other shards would fail too.
        """

    def forget(self, name: str, offset: int, size: int) -> None:
        """Say that a span came with wrong bytes: reading it once more asks the shard itself.

        Without it a damaged cache, or a shard that was replaced while it was open, would give the same bytes again.
        """

    def changed(self, name: str) -> bool:
        """Whether a shard, or the index, is another file than when it was first looked at, or was written to since.

        Another file may have the same content. Where that cannot be told, as behind a URL, nothing has changed.
        """

    def close(self) -> None:
        """Close what is open; a later read opens it again."""


@dataclass(frozen=True)
class Found:
    """What lies under a shard's name.

    Attributes:
        is_file: Whether it is a plain file.
        size: Its bytes; None where nobody says.
    """

    is_file: bool
    size: int | None


def shard_problem(path: str, found: Found | None, size: int) -> str | None:
    """Return what is wrong with a shard of which an index records the size; None if nothing is."""
    if found is None:
        return f"{path}: the shard is missing: copy it again, or build the corpus again"
    if not found.is_file:
        return f"{path}: not a file: copy the shard again, or build the corpus again"
    if found.size not in (None, size):
        had = f"{found.size} bytes instead of {size}"
        return f"{path}: the shard has {had}: copy it again, or build the corpus again"
    return None


def shard_problems(
    root: str, names: Iterable[str], sizes: Iterable[int], founds: Iterable[Found | None]
) -> Iterator[str]:
    """Yield what is wrong with shards; see `shard_problem`."""
    for name, size, found in zip(names, sizes, founds, strict=True):
        problem = shard_problem(f"{root}/{name}", found, int(size))
        if problem:
            yield problem


def check_name(name: str) -> str:
    """Return a shard's name if it is a plain file name.

    Raises:
        UserError: It could lead out of the folder.
    """
    if not is_text(name) or "/" in name or "\\" in name or not name.endswith(".tar"):
        raise UserError(f"a shard is called {show(name)}: the index is damaged: copy or build the shards again")
    return name
