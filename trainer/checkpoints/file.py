"""A checkpoint as one file, with its mark beside it."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from data_shards.errors import UserError
from trainer.checkpoints.mark import FOLDER_MARK, Advance, Entry, HashedFile, Mark, sync
from trainer.checkpoints.tree import size_of


def mark_of(path: Path) -> Path:
    """Where the mark of a checkpoint is."""
    return path / FOLDER_MARK if path.is_dir() else path.with_name(path.name + ".json")


def next_mark_of(path: Path) -> Path:
    """Where the mark of a file is that is just about to take the place of another."""
    return path.with_name(path.name + ".json.next")


def partial_of(path: Path) -> Path:
    """Where a checkpoint is while it is written."""
    return path.with_name(path.name + ".partial")


def old_of(path: Path) -> Path:
    """Where a checkpoint goes that is replaced or removed."""
    return path.with_name(path.name + ".old")


def write_file(content: dict[str, Any], path: Path, advance: Advance = lambda _: None) -> None:
    """Write a checkpoint as one file: at every moment the old or the new one is there, whole and marked.

    Args:
        content: The checkpoint; its tensors are not changed meanwhile.
        path: Where to.
        advance: Is told of bytes as they are written.

    Raises:
        UserError: It cannot be written, or holds what could not be read back.
    """
    partial = partial_of(path)
    try:
        with explained(path, content):
            path.parent.mkdir(exist_ok=True)  # a run that was moved away is not made anew
            discard(partial)
            entry = save(content, partial, advance)
            Mark(step_of(content), {path.name: entry}).write(next_mark_of(path))
            sync(path.parent)
            settle_file(path)
    except UserError:
        with suppress(OSError):
            discard(partial)
        raise


def settle_file(path: Path) -> None:
    """Give a written file its name, and then its mark the name; until then `verify` takes the next mark."""
    if path.is_dir() and not path.is_symlink():
        exchange(path)
    else:
        partial_of(path).replace(path)
    sync(path.parent)
    next_mark_of(path).replace(mark_of(path))
    sync(path.parent)
    discard(old_of(path))


def exchange(path: Path) -> None:
    """Give a written checkpoint its name where what has it cannot just be replaced; `sweep` mends a kill in between."""
    old = old_of(path)
    discard(old)
    there = path.exists() or path.is_symlink()
    if there:
        path.rename(old)
    try:
        partial_of(path).rename(path)
    except OSError:
        if there:
            old.rename(path)
        raise


def save(content: Any, path: Path, advance: Advance = lambda _: None) -> Entry:
    """Write what `load` reads, and see that it does.

    Returns:
        Size and checksum.

    Raises:
        OSError: The file cannot be written.
        UserError: The content has values that are neither tensors nor plain.
    """
    with HashedFile(path, advance) as file:
        try:
            torch.save(content, file)  # type: ignore[arg-type]  # all that it needs of a file
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):  # hidden behind what torch makes of it
                cause = cause.__cause__ or cause.__context__
            if cause is not None:
                raise cause from None
            raise UserError(f"{path}: the checkpoint cannot be saved ({_first_line(error)})") from error
    load(path)  # maps the tensors, and makes the rest, which is little
    return file.entry()


def load(path: Path) -> Any:
    """Read a file without unpickling anything but tensors and plain values; tensors are mapped from it.

    Raises:
        UserError: It is missing, damaged, or holds anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [item.filename for item in archive.infolist() if item.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise UserError(f"{path}: not a checkpoint: its parts are compressed, as no trainer writes them")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {path}: no such file") from error
    except UserError:
        raise
    except Exception as error:  # zip, pickle and tensor errors are of many kinds
        raise UserError(
            f"checkpoint {path}: not a readable checkpoint ({type(error).__name__}): it is damaged, or holds what is "
            "neither tensor nor plain value"
        ) from error


def check_unmarked(path: Path) -> None:
    """Check a file without a mark, as older trainers wrote it, by the checksums (CRC-32) that such files have inside.

    Raises:
        UserError: It is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except Exception as error:
        raise UserError(f"checkpoint {path}: damaged or not a checkpoint ({type(error).__name__})") from error
    if wrong is not None:
        raise UserError(f"checkpoint {path}: damaged: its part {wrong} has another checksum")


def step_of(content: dict[str, Any]) -> int:
    """Optimiser steps that a checkpoint says were taken; 0 where it says nothing."""
    return int(content.get("global_step", 0))


def discard(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def explained(path: Path, content: Any) -> Iterator[None]:
    """Turn what the disk, or DCP on any rank, says of a checkpoint into one line for the user.

    Args:
        path: The checkpoint.
        content: What is written; None where it is read.

    Raises:
        UserError: The block failed.
    """
    try:
        yield
    except CheckpointException as failed:
        problems = [problem for problem, _ in failed.failures.values()]
        ours = next((problem for problem in problems if isinstance(problem, UserError | OSError)), problems[0])
        raise _told(path, content, ours) from failed
    except OSError as error:
        raise _told(path, content, error) from error


def _told(path: Path, content: Any, error: BaseException) -> UserError:
    if isinstance(error, UserError):
        return error
    reason = (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {_first_line(error)}"
    if content is None:
        return UserError(f"checkpoint {path}: cannot be read ({reason})")
    try:
        free = f"{shutil.disk_usage(path.parent).free:,}"
    except OSError:
        free = "?"
    return UserError(
        f"checkpoint {path}: cannot be written ({reason}): it needs some {size_of(content):,} bytes, {free} are free; "
        "make room or choose another trainer.default_root_dir; checkpoints written before are whole"
    )


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
