"""Checkpoints by their path, of either form: written, checked, found and removed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from data_shards.errors import UserError
from trainer.checkpoints.file import (
    check_unmarked,
    discard,
    explained,
    load,
    mark_of,
    next_mark_of,
    old_of,
    settle_file,
    write_file,
)
from trainer.checkpoints.mark import Advance, Mark, sync
from trainer.checkpoints.ranks import checkpoint_group, rank_of, together
from trainer.checkpoints.tree import is_sharded
from trainer.run import step_in_name

LAST = "last.ckpt"
"""Link to the newest complete step checkpoint; a file of its own in older runs."""
_STEP = re.compile(r"step-(\d+)\.ckpt")


def write(content: dict[str, Any], path: Path, *, group: ProcessGroup | None = None) -> None:
    """Write a checkpoint; all ranks call this, but for one that is not sharded and has no `group`: the first may alone.

    Where tensors are spread over ranks it is a folder to which each rank writes its part, else a file by the first
    rank. Either is written under another name, then marked and renamed: it is there as a whole, or not at all.

    Args:
        content: The checkpoint; on the CPU (`stage`) if the training goes on meanwhile. Ranks that write nothing may
            give an empty one.
        path: Where to; what is there is replaced.
        group: The ranks' connection, so that all of them raise what one of them meets. By default what is sharded takes
            `checkpoint_group`, and what is not none.

    Raises:
        UserError: It cannot be written; what was there before stays.
    """
    if is_sharded(content):
        from trainer.checkpoints.folder import write_folder

        write_folder(content, path, checkpoint_group() if group is None else group)
    elif group is not None:
        with together(group):
            if rank_of(group) == 0:
                write_file(content, path)
    elif not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0:
        write_file(content, path)


def is_complete(path: Path) -> bool:
    """Whether a checkpoint has a mark that can be read and files of the right sizes; `verify` reads their bytes too."""
    try:
        mark, files = marked(path)
    except UserError:
        return False
    return all(mark.fits(name, file) for name, file in files.items())


def verify(path: Path, *, unmarked: bool = False, advance: Advance = lambda _: None) -> Mark | None:
    """Check every byte of a checkpoint.

    Args:
        path: The file or folder.
        unmarked: Also take a file without a mark, as older runs have, whose own checksums are right.
        advance: Is told of bytes as they are read.

    Returns:
        Its mark; None for an unmarked file.

    Raises:
        UserError: It is missing, without a mark, truncated, changed, or of an unknown format.
    """
    if not path.exists():
        raise UserError(f"checkpoint {path}: no such file")
    if unmarked and path.is_file() and not has_mark(path):
        check_unmarked(path)
        return None
    mark, files = marked(path)
    for name, file in files.items():
        mark.check(name, file, advance)
    return mark


def bytes_of(path: Path) -> int:
    """Bytes of a checkpoint's files."""
    path = path.resolve()
    return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))


def has_mark(path: Path) -> bool:
    """Whether something is there that says that a checkpoint is complete."""
    path = path.resolve()
    return mark_of(path).exists() or (path.is_file() and next_mark_of(path).exists())


def marked(path: Path) -> tuple[Mark, dict[str, Path]]:
    """A checkpoint's mark, and where its files are; nothing of them has been read.

    Raises:
        UserError: There is none that can be read, or it names other files than there are.
    """
    path = path.resolve()
    if path.is_dir():
        from trainer.checkpoints.folder import check_names

        mark = Mark.read(mark_of(path))
        check_names(path, mark)
        return mark, {name: path / name for name in mark.files}
    following = next_mark_of(path)
    if following.is_file():  # a run was killed between the names of a file and of its mark
        try:
            mark = Mark.read(following)
            (name,) = mark.files
            mark.check(name, path)
            return mark, {name: path}
        except (UserError, ValueError):
            pass
    mark = Mark.read(mark_of(path))
    if len(mark.files) != 1:
        raise UserError(f"{mark_of(path)}: the mark is not that of one file")
    return mark, dict.fromkeys(mark.files, path)


def read(path: Path, *, check: bool = True, advance: Advance = lambda _: None) -> dict[str, Any]:
    """Read a checkpoint of either form into this process, on the CPU, without unpickling any code.

    Args:
        path: The file, whose tensors are mapped, or the folder, which is put together.
        check: Check every byte before; without, the caller has done so.
        advance: Is told of bytes as they are checked.

    Returns:
        The checkpoint as a run of one process writes it: the optimisers' parameters have numbers.

    Raises:
        UserError: It is missing, damaged, or no checkpoint.
    """
    if not path.exists():
        raise UserError(f"checkpoint {path}: no such file")
    if check:
        verify(path, unmarked=True, advance=advance)
    path = path.resolve()
    if path.is_dir():
        from trainer.checkpoints.folder import read_folder

        return read_folder(path)
    content = load(path)
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path}: no checkpoint of a run")
    return content


def outline(path: Path) -> dict[str, Any]:
    """A checkpoint without the content of its sharded tensors, which are on no device; nothing is checked.

    Args:
        path: The file, whose tensors are mapped, or the folder.

    Raises:
        UserError: It is missing, damaged, or no checkpoint.
    """
    path = path.resolve()
    if not path.is_dir():
        return read(path, check=False)
    from trainer.checkpoints.folder import load_rest

    return load_rest(path)


def step_checkpoints(folder: Path) -> list[Path]:
    """Step checkpoints of a run, complete or not, oldest first."""
    found = {path: _STEP.fullmatch(path.name) for path in folder.glob("step-*.ckpt")}
    return sorted((path for path, match in found.items() if match), key=step_in_name)


def newest_good(folder: Path, say: Callable[[str], object], before: int | None = None) -> Path | None:
    """The newest step checkpoint that is complete and undamaged; every byte of it has been read.

    Args:
        folder: Where a run's checkpoints are.
        say: Is told a line about each newer one that was refused, and which one is taken instead.
        before: Only of this step or an earlier one.

    Returns:
        Its path; None where there is none.
    """
    refused = []
    good = None
    for path in reversed(step_checkpoints(folder)):
        if before is not None and step_in_name(path) > before:
            continue
        try:
            verify(path)
        except UserError as error:
            refused.append(str(error))
            continue
        good = path
        break
    for reason in refused:
        say(f"{reason}; {f'{good} is taken instead' if good else 'there is no older one'}")
    return good


def remove(path: Path) -> None:
    """Remove a checkpoint with its mark; one that is half removed is complete no more."""
    if path.is_dir() and not path.is_symlink():
        discard(old_of(path))
        path.rename(old_of(path))
        sync(path.parent)
        discard(old_of(path))
        return
    for file in (next_mark_of(path), path.with_name(path.name + ".json"), path):
        file.unlink(missing_ok=True)


def point_last(path: Path) -> None:
    """Let ``last.ckpt`` beside a checkpoint be a link to it.

    Raises:
        UserError: It cannot be written.
    """
    last = path.with_name(LAST)
    link = last.with_name(LAST + ".link")
    with explained(last, path.name):
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        if last.is_dir() and not last.is_symlink():
            remove(last)
        link.replace(last)
        sync(path.parent)


def sweep(folder: Path) -> None:
    """Finish or remove what a killed run left half done; only the run that writes here may ask for it, on one rank."""
    for partial in folder.glob("*.ckpt.partial"):
        path = partial.with_name(partial.name.removesuffix(".partial"))
        ready = is_complete(partial) if partial.is_dir() else _fits(next_mark_of(path), partial)
        if ready and not path.exists():  # it was about to take the name
            if partial.is_dir():
                partial.rename(path)
            else:
                settle_file(path)
        else:
            discard(partial)
    for old in folder.glob("*.ckpt.old"):
        path = old.with_name(old.name.removesuffix(".old"))
        if not path.exists() and (
            is_complete(old) if old.is_dir() else _fits(path.with_name(path.name + ".json"), old)
        ):
            old.rename(path)  # what was to take its place did not come that far
        else:
            discard(old)
    for mark in folder.glob("*.ckpt.json.next"):
        path = mark.with_name(mark.name.removesuffix(".json.next"))
        if _fits(mark, path):
            mark.replace(mark_of(path))
        else:
            mark.unlink()
    for mark in folder.glob("*.ckpt.json"):
        if not mark.with_name(mark.name.removesuffix(".json")).is_file():
            mark.unlink()
    (folder / (LAST + ".link")).unlink(missing_ok=True)
    sync(folder)


def _fits(mark: Path, path: Path) -> bool:
    try:
        found = Mark.read(mark)
        for name in found.files:
            found.check(name, path)
    except UserError:
        return False
    return len(found.files) == 1
