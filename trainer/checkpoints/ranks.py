"""How the ranks of a run speak about a checkpoint while the training speaks about gradients."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup

from data_shards.errors import UserError

_TIMEOUT = timedelta(minutes=30)
_made: weakref.WeakKeyDictionary[ProcessGroup, ProcessGroup] = weakref.WeakKeyDictionary()
"""By the training's connection, with which it goes."""


def checkpoint_group() -> ProcessGroup | None:
    """The ranks' own connection for checkpoints in their main threads; None in a run of one process.

    It is made by the first call, which all ranks make at the same point.

    Raises:
        RuntimeError: It was not made yet, and this is not the main thread.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    world = dist.group.WORLD
    assert world is not None
    if world not in _made:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("call checkpoint_group() on all ranks before checkpoints are written in the background")
        made = group_of_its_own()
        assert made is not None
        _made[world] = made
    return _made[world]


def group_of_its_own() -> ProcessGroup | None:
    """One more such connection, for a thread: what another one sends at the same time is not mixed up with its own.

    All ranks call this at the same point; None in a run of one process.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    made = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    assert isinstance(made, ProcessGroup)  # this rank is in it
    return made


def rank_of(group: ProcessGroup | None) -> int:
    """This process's number in a group; 0 without one."""
    return 0 if group is None else dist.get_rank(group)


@contextmanager
def together(group: ProcessGroup | None) -> Iterator[None]:
    """Let the block fail on all ranks where it fails on one; those where it did not fail raise that rank's message.

    Raises:
        UserError: The block failed elsewhere.
    """
    error: BaseException | None = None
    try:
        yield
    except Exception as problem:
        error = problem
    if group is not None:
        said: list[str | None] = [None] * dist.get_world_size(group)
        try:
            dist.all_gather_object(said, None if error is None else (str(error) or type(error).__name__), group=group)
        except RuntimeError as lost:
            raise UserError("a checkpoint was broken off: another rank is gone") from (error or lost)
        if error is None and any(said):
            raise UserError(next(message for message in said if message))
    if error is not None:
        raise error
