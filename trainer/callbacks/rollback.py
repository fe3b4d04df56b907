"""Going back to the weights of a checkpoint in the middle of a training, which goes on from where it is."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from trainer.callbacks.checkpoint import RunCheckpoint
from trainer.callbacks.ema import EMA
from trainer.checkpoints import load_sharded, newest_good, read
from trainer.distributed import is_sharded, reshard
from trainer.ranks import every_rank
from trainer.run import Run


def go_back(trainer: Trainer, module: LightningModule) -> Path | None:
    """Take weights, optimiser and average from the newest good checkpoint; all ranks call this.

    Step counter, learning rates and the order of samples stay as they are.

    Args:
        trainer: The trainer, between two steps.
        module: Its module.

    Returns:
        The checkpoint; None if there is none yet.

    Raises:
        UserError: A checkpoint could not be written or read.
    """
    folder = Run(trainer.default_root_dir).checkpoints
    for saver in trainer.callbacks:
        if isinstance(saver, RunCheckpoint):
            saver.finish()  # the newest may still be on its way to the disk
            folder = Path(saver.dirpath or folder)
    # another attempt may have gone farther, and one that was told to stop among bad steps has saved what led there
    last_good = trainer.global_step - int(getattr(module, "bad_steps", 0))
    path = every_rank(newest_good(folder, _say, last_good) if trainer.is_global_zero else None)[0]
    if path is None:
        return None
    ((optimizer,), settings) = trainer.optimizers, _settings(trainer)
    if is_sharded(module):
        reshard(module)
        content = load_sharded(path, module, [optimizer])
    else:
        content = read(path, check=False)  # `newest_good` has read every byte
        module.load_state_dict(content["state_dict"])
        optimizer.load_state_dict(content["optimizer_states"][0])
    for group, kept in zip(optimizer.param_groups, settings, strict=True):
        group.update(kept)
    for callback in trainer.callbacks:
        if isinstance(callback, EMA):
            callback.go_back(content)
    return path


def _settings(trainer: Trainer) -> list[dict[str, object]]:
    """What an optimiser's groups have besides parameters: learning rates are the schedule's, not a checkpoint's."""
    groups = trainer.optimizers[0].param_groups
    return [{name: value for name, value in group.items() if name != "params"} for group in groups]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
