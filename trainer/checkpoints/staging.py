"""A copy of a checkpoint's tensors in the host's memory: the training goes on while they are written."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer.checkpoints.tree import Path, is_sharded, mapped


class Buffers:
    """Memory for copies, kept from one checkpoint to the next: it is allocated once, and pinned where a GPU is."""

    def __init__(self) -> None:
        self._kept: dict[Path, Tensor] = {}
        self._used: set[Path] = set()

    def like(self, path: Path, tensor: Tensor) -> Tensor:
        """Memory for a tensor, sharded as it is; what it holds is of no meaning."""
        self._used.add(path)
        kept = self._kept.get(path)
        if kept is None or _layout(kept) != _layout(tensor):
            kept = self._kept[path] = _empty(tensor)
        return kept

    def drop_unused(self) -> None:
        """Free what was not asked for since the last call."""
        self._kept = {path: tensor for path, tensor in self._kept.items() if path in self._used}
        self._used = set()


@torch.no_grad()
def stage(content: dict[str, Any], buffers: Buffers | None = None) -> dict[str, Any]:
    """Copy a checkpoint so that later steps cannot change it; what is sharded stays so, with the shards on the CPU.

    Args:
        content: The checkpoint.
        buffers: Memory to copy into; what was copied into it before is overwritten. None takes new memory.

    Returns:
        The copy; empty on ranks that write nothing, as all but the first where nothing is sharded.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_rank() and not is_sharded(content):
        return {}
    buffers = Buffers() if buffers is None else buffers
    known: dict[tuple[Any, ...], Tensor] = {}

    def copied(path: Path, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return copy.deepcopy(leaf)
        leaf = leaf.detach()
        place = None if isinstance(leaf, DTensor) or not leaf.numel() else _place(leaf)
        if place in known:  # tied weights are written once
            return known[place]
        made = buffers.like(path, leaf)
        _local(made).copy_(_local(leaf), non_blocking=True)
        if place is not None:
            known[place] = made
        return made

    made: dict[str, Any] = mapped(content, copied)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    buffers.drop_unused()
    return made


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    spread = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else ()
    return (tensor.shape, tensor.dtype, *spread)


def _empty(tensor: Tensor) -> Tensor:
    def made(pinned: bool) -> Tensor:
        if isinstance(tensor, DTensor):
            return torch.empty_like(tensor, device="cpu", pin_memory=pinned, memory_format=torch.contiguous_format)
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)

    if torch.cuda.is_available():
        with suppress(RuntimeError):  # the system may allow less of it
            return made(pinned=True)
    return made(pinned=False)
