"""A checkpoint under a second name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from trainer.checkpoints.file import discard, mark_of, next_mark_of, old_of, partial_of, settle_file
from trainer.checkpoints.mark import sync


def twin(path: Path, other: Path) -> None:
    """Give a complete checkpoint a second name beside the first, which takes no room where the disk has hard links.

    Args:
        path: The checkpoint.
        other: The second name; what is there is replaced.

    Raises:
        OSError: It cannot be made.
    """
    partial = partial_of(other)
    discard(partial)
    if path.is_dir():
        shutil.copytree(path, partial, copy_function=_link)
        sync(partial)
        discard(old_of(other))
        if other.exists() or other.is_symlink():
            other.rename(old_of(other))
        partial.rename(other)
        sync(other.parent)
        discard(old_of(other))
        return
    _link(path, partial)
    next_mark_of(other).unlink(missing_ok=True)
    _link(mark_of(path), next_mark_of(other))
    settle_file(other)


def _link(path: str | Path, other: str | Path) -> None:
    try:
        os.link(path, other)
    except OSError:  # a disk without
        shutil.copy2(path, other)
        with Path(other).open("rb") as file:
            os.fsync(file.fileno())
