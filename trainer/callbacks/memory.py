"""How much memory the steps take."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Memory(Callback):
    """Logs ``train/gpu_memory_gib``: the most that tensors took on a GPU since the last logged step.

    It is the largest of the ranks', in GiB, as PyTorch's allocator counts it: what ``trainer plan`` foretells. The
    driver's tools show more, for kernels, communication and gaps between tensors. Without a GPU there is
    ``train/cpu_memory_gib``, the most that the process has taken since it was started, its code and data included.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here on."""
        self._step = trainer.global_step
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log at a step that is logged anyway: the allocator is asked, not the device."""
        if trainer.global_step == self._step or trainer.global_step % max(1, trainer.log_every_n_steps):
            return
        self._step = trainer.global_step
        if pl_module.device.type == "cuda":
            name, peak = "train/gpu_memory_gib", torch.cuda.max_memory_allocated(pl_module.device)
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        else:
            name, peak = "train/cpu_memory_gib", peak_resident()
        several = trainer.world_size > 1
        pl_module.log(name, peak / 2**30, batch_size=1, sync_dist=several, reduce_fx="max")


def peak_resident() -> int:
    """The most bytes that this process has had in memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
