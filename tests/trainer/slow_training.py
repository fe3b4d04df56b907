"""A training whose steps take their time, to be killed: ``python slow_training.py '{"shards": …, "root": …}'``."""

from __future__ import annotations

import json
import sys
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint

from data_shards.batch import TripletBatch
from data_shards.datamodule import TripletDataModule
from trainer.callbacks import RunCheckpoint, SampleTrace
from trainer.ranks import every_rank
from trainer.run import Run


class Slow(LightningModule):
    """Learns a single number, slowly."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seconds = seconds

    def training_step(self, batch: TripletBatch, batch_idx: int) -> torch.Tensor:
        time.sleep(self.seconds)
        means = torch.stack([image.float().mean() for image in batch.images])
        return (self.weight * means.mean()).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Crash(Callback):
    """Breaks down when the first batch after a step is about to be learnt from, or in another hook."""

    def __init__(self, step: int, hook: str) -> None:
        self.step = step
        setattr(self, hook, self._crash)

    def _crash(self, trainer: Trainer, *arguments: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("crash")


def main(
    shards: str,
    root: str,
    ranks: int,
    workers: int,
    micro: int,
    epochs: int,
    every: int,
    seconds: float = 0.0,
    crash: int = -1,
    hook: str = "on_train_batch_start",
    rescue: bool = False,
    trainer_arguments: dict[str, Any] | None = None,
    **data_arguments: Any,
) -> float:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    run = Run(root)
    last = run.checkpoints / "last.ckpt"
    cut = {"batch_size": 8, "micro_batch_size": micro, "num_workers": workers, "seed": 3}
    data = TripletDataModule(train=shards, **cut, **data_arguments)
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_epochs=epochs if epochs else -1,
        default_root_dir=root,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            RunCheckpoint(every, dirpath=str(run.checkpoints)),
            SampleTrace(),
            Crash(crash, hook),
            *([OnExceptionCheckpoint(str(run.checkpoints), "last")] if rescue else []),
        ],
        **(trainer_arguments or {}),
    )
    module = Slow(seconds)
    trainer.fit(module, datamodule=data, ckpt_path=str(last) if last.exists() else None, weights_only=True)
    weights = every_rank(float(module.weight))
    assert len(set(weights)) == 1
    if trainer.is_global_zero:
        print(f"done at step {trainer.global_step}, weight {weights[0]:.9g}")
    return weights[0]


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
