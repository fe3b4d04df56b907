"""One file from a checkpoint of any number of ranks."""

from __future__ import annotations

from pathlib import Path

from trainer.checkpoints.file import write_file
from trainer.checkpoints.mark import Advance
from trainer.checkpoints.store import read


def consolidate(path: Path, out: Path, advance: Advance = lambda _: None) -> None:
    """Write a checkpoint of either form as one file with its mark, as a run of one process would have written it.

    Args:
        path: The checkpoint; every byte of it is checked.
        out: The file to write.
        advance: Is told of bytes as they are checked, and as they are written.

    Raises:
        UserError: The checkpoint is damaged, or the file cannot be written.
    """
    write_file(read(path, advance=advance), out, advance)
