"""A training on any number of ranks: `run` forks them, `Moment` kills them, `steps` and `passes` read their traces."""

from __future__ import annotations

import csv
import os
import signal
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked_ranks
import numpy as np
import torch
from family_training import DATA, FAMILIES
from lightning.pytorch import Callback, Trainer, seed_everything
from tiny_sam2 import LENGTH, slice_of
from torch.distributed.tensor import DTensor

from data_shards.datamodule import TripletDataModule
from data_shards.scan import write_index
from data_shards.triplet import Triplet
from data_shards.writer import ShardWriter
from trainer.callbacks import RunCheckpoint, SampleTrace
from trainer.ranks import every_rank
from trainer.report.traces import decode_keys
from trainer.resuming import CheckpointFiles
from trainer.run import Run

BATCH = 4
EMPTY = {(1, 4), (1, 5), (2, 5)}
DAMAGED = (0, 3)
"""Slices (volume, number) without a target, and one that cannot be learnt from."""


def made_slice(volume: int, number: int) -> Triplet:
    """A slice of a volume; some show nothing of what was looked for, and one is damaged."""
    triplet = slice_of(volume, number)
    if (volume, number) in EMPTY:
        return replace(triplet, targets=())
    if (volume, number) == DAMAGED:
        return replace(triplet, image=np.full(triplet.image.shape, np.nan, np.float32))
    return triplet


def write(folder: Path) -> Path:
    """Shards of three volumes."""
    with ShardWriter(folder, 100, 2**24) as writer:
        for volume in range(3):
            for number in range(LENGTH):
                triplet = made_slice(volume, number)
                writer.write(triplet.key, triplet.encode())
    write_index(folder)
    return folder


class Moment(Callback):
    """Kills its rank, as ``kill -9`` does, in a hook at a step."""

    def __init__(self, step: int, hook: str, batch: int | None = None) -> None:
        self.step, self.batch = step, batch
        setattr(self, hook, self._die)

    def _die(self, trainer: Trainer, *arguments: Any) -> None:
        here = not trainer.sanity_checking and trainer.global_step == self.step
        if here and (self.batch is None or trainer.fit_loop.epoch_loop.batch_idx == self.batch):
            os.kill(os.getpid(), signal.SIGKILL)


def strategy_of(name: str) -> Any:
    """A strategy of Lightning's trainer by name: ``auto``, ``ddp``, ``fsdp2``."""
    if name != "fsdp2":
        return name
    from trainer.distributed import FSDP2

    return FSDP2()


def train(
    family: str,
    shards: str,
    root: str,
    ranks: int,
    micro: int,
    strategy: str = "ddp",
    epochs: int = 2,
    every: int = 100,
    validated: bool = False,
    kill: dict[str, Any] | None = None,
    lr: float = 1e-4,
    module_arguments: dict[str, Any] | None = None,
) -> None:
    """Train as one rank, from the last checkpoint if there is one; rank 0 leaves the weights in ``weights.pt``.

    Args:
        family: One of `family_training.FAMILIES`.
        shards: What `write` wrote.
        root: Folder of the run.
        ranks: Number of ranks.
        micro: Samples a rank takes at once.
        strategy: As `strategy_of`, where there are several ranks.
        epochs: Epochs.
        every: Optimiser steps from one checkpoint to the next.
        validated: Validate after every second step of an epoch, a little.
        kill: Arguments of `Moment`.
        lr: Learning rate.
        module_arguments: Of the family's module.
    """
    seed_everything(0)
    run = Run(root)
    last = run.checkpoints / "last.ckpt"
    cut = {"batch_size": BATCH, "micro_batch_size": micro, "seed": 3, "on_damage": "skip", "max_damaged": 1.0}
    data = TripletDataModule(train=shards, val=shards if validated else None, **{**DATA[family], **cut})
    if family != "sam3":  # such models refuse images that they have nothing to ask about; a batch may do without
        data.without_targets = lambda split: 0  # type: ignore[method-assign]
    module = FAMILIES[family](**(module_arguments or {}))
    module.lr = lr
    passes = BATCH // (micro * ranks)
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy_of(strategy) if ranks > 1 else "auto",
        max_epochs=epochs,
        val_check_interval=2 * passes if validated else 1.0,
        limit_val_batches=2,
        gradient_clip_val=0.5,
        num_sanity_val_steps=0,
        default_root_dir=root,
        plugins=[CheckpointFiles()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            RunCheckpoint(every, dirpath=str(run.checkpoints)),
            SampleTrace(),
            *([Moment(**kill)] if kill else []),
        ],
    )
    trainer.fit(module, datamodule=data, ckpt_path=str(last) if last.exists() else None, weights_only=True)
    weights = {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in module.named_parameters()}
    sums = every_rank(float(sum(weight.double().sum() for weight in weights.values())))
    assert len(set(sums)) == 1, f"ranks differ: {sums}"
    if trainer.is_global_zero:
        torch.save(weights, Path(root) / "weights.pt")


def run(root: Path, ranks: int = 1, dies: bool = False, target: Callable[..., None] = train, **options: Any) -> None:
    """Train on some ranks, or do something else there: `forked_ranks.run`."""
    forked_ranks.run(target, root, ranks, dies, **options)


def passes(root: Path) -> dict[tuple[int, int, int, int], tuple[str, list[str]]]:
    """What counts of the traces: by (step, epoch, batch, rank) the loss as it is written, and the samples."""
    rows = [
        (int(row["attempt"]), int(path.stem.partition("-rank")[2] or 0), row)
        for path in root.glob("trace*.csv")
        for row in csv.DictReader(path.open())
    ]
    first: dict[int, int] = {}
    for attempt, _, row in rows:
        first[attempt] = min(int(row["step"]), first.get(attempt, int(row["step"])))
    return {
        (int(row["step"]), int(row["epoch"]), int(row["batch"]), rank): (row["loss"], decode_keys(row["keys"]))
        for attempt, rank, row in sorted(rows, key=lambda one: (one[0], one[1]))
        if all(int(row["step"]) < start for later, start in first.items() if later > attempt)
    }


def steps(root: Path) -> dict[tuple[int, int], tuple[float, list[str]]]:
    """By (epoch, step): a step's loss, the mean over its passes on all ranks, and its samples in the global order."""
    found: dict[tuple[int, int], list[tuple[str, list[str]]]] = defaultdict(list)
    for (step, epoch, _, _), row in sorted(passes(root).items()):
        found[epoch, step].append(row)
    return {
        place: (float(np.mean([float(loss) for loss, _ in rows])), [key for _, keys in rows for key in keys])
        for place, rows in found.items()
    }


def weights(root: Path) -> dict[str, torch.Tensor]:
    """The weights at a run's end."""
    found: dict[str, torch.Tensor] = torch.load(root / "weights.pt", weights_only=True)
    return found
