"""A training whose every score can be worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from data_shards.batch import TripletBatch
from data_shards.datamodule import TripletDataModule
from trainer.callbacks import RunCheckpoint, ValidationPanels, ValidationRecord
from trainer.modules.scoring import Prediction, ScoredModule
from trainer.run import Run

FIRST, LOWERED = 200.0, 20.0


class Thresholder(ScoredModule):
    """Predicts what is brighter than a level, which each optimiser step lowers by `LOWERED`."""

    def __init__(self) -> None:
        super().__init__()
        self.level = torch.nn.Parameter(torch.tensor(FIRST))

    def predict_masks(self, batch: TripletBatch) -> Prediction:
        """Everything bright, whatever the target; odd targets are asked with two points, the others with boxes."""
        owners = batch.image_index.tolist()
        count = len(owners)
        boxes, points, labels = batch.boxes.clone(), torch.full((count, 2, 2), torch.nan), -torch.ones(count, 2)
        for q, target in enumerate(batch.target_index):
            if target % 2:
                boxes[q], points[q], labels[q] = (
                    torch.nan,
                    torch.tensor([[3.0, 4.0], [0.0, 0.0]]),
                    torch.tensor([1.0, 0]),
                )
        masks = [batch.images[owner][0] > self.level.detach() for owner in owners]
        return Prediction(masks, torch.zeros(count), boxes, points, labels)

    def training_step(self, batch: TripletBatch, batch_idx: int) -> Tensor:
        """A loss whose gradient is the same at every step."""
        return LOWERED * self.level

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Steps that are as long as the gradient."""
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(
    shards: str,
    root: str,
    steps: int = -1,
    ranks: int = 1,
    micro: int = 2,
    val: str | None = "val",
    callbacks: Sequence[Callback] = (),
    loggers: Any = False,
    **arguments: Any,
) -> Trainer:
    """Train for some steps from the last checkpoint, or from the start, with a validation after each."""
    run = Run(root)
    last = run.checkpoints / "last.ckpt"
    folders = {"train": f"{shards}/train", "val": f"{shards}/{val}" if val else None}
    data = TripletDataModule(**folders, batch_size=4, micro_batch_size=micro, seed=0)
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp_fork" if ranks > 1 else "auto",
        default_root_dir=root,
        logger=loggers,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{
            "max_steps": steps,
            "val_check_interval": 4 // (micro * ranks),
            "num_sanity_val_steps": -1,
            **arguments,
        },
        callbacks=[RunCheckpoint(1, dirpath=str(run.checkpoints)), ValidationRecord(), ValidationPanels(3), *callbacks],
    )
    trainer.fit(Thresholder(), datamodule=data, ckpt_path=str(last) if last.exists() else None, weights_only=True)
    return trainer
