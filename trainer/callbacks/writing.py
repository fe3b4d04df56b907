"""Checkpoints are written beside the training, and its failures end it on every rank at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.checkpoints import Background
from trainer.modules.optimization import own_shard


class Writer:
    """Does a run's writes one after the other. All ranks make one, and call its methods at the same points.

    Args:
        background: Whether the training goes on meanwhile.
    """

    def __init__(self, background: bool) -> None:
        self._background = background
        self._thread = Background()
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        # beside the training's own connection, which would wait for the GPU, and the thread's
        self._talk: Any = dist.new_group(backend="gloo") if several else None
        self._under_way = False

    def submit(self, content: dict[str, Any], write: Callable[[dict[str, Any], Any], None]) -> None:
        """Copy a checkpoint, as soon as the one before is written, and write it.

        Args:
            content: The checkpoint.
            write: Writes the copy, given the ranks' connection too.

        Raises:
            UserError: The one before could not be written, or this one where the training waits for it.
        """
        self.wait()
        staged = self._thread.stage(content)
        self._thread.submit(lambda: write(staged, self._thread.group))
        self._under_way = True
        if not self._background:
            self.wait()

    def check(self) -> None:
        """Raise what went wrong with a write that is done on all ranks, without waiting for one that is not.

        Raises:
            UserError: It could not be written.
        """
        if self._under_way and not self._busy():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
            UserError: It could not be written.
        """
        self._under_way = False
        self._thread.wait()

    def _busy(self) -> bool:
        """Whether a rank still writes: all are told the same."""
        if self._talk is None:
            return self._thread.busy
        told = torch.tensor(int(self._thread.busy))
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self._talk)
        return bool(told)


@torch.no_grad()
def are_finite(weights: Iterable[Tensor]) -> bool:
    """Whether those of the weights that learn are all finite numbers, as far as this rank has them."""
    learning = [own_shard(weight) for weight in weights if weight.requires_grad]
    if not learning:
        return True
    # a sum needs no memory, and is finite only where all are; that of finite ones hardly ever overflows
    sums = torch.stack([weight.sum(dtype=torch.float32) for weight in learning])
    return bool(sums.isfinite().all()) or all(bool(weight.isfinite().all()) for weight in learning)
