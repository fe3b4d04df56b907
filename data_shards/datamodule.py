"""The LightningDataModule over shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule

from data_shards.batch import TripletBatch
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from data_shards.loader import SampleView, TripletLoader
from data_shards.sampler import EvenSampler, GlobalOrderSampler
from data_shards.seed import run_seed
from data_shards.splits import EXTERNAL


class TripletDataModule(LightningDataModule):
    """Feeds triplets from shards made by ``data-shards build``.

    Args:
        train: Folder of the training split, such as ``shards/train``.
        val: Folder of the validation split; null goes without.
        test: Folder of the test split, also taken by ``predict``.
        batch_size: Images in one optimiser step, over all GPUs. How many passes that takes follows from it.
        micro_batch_size: Images a GPU takes at once; lower it when memory runs out, a step stays the same.
        targets_per_image: Targets drawn from an image in an epoch; null takes all, encoding the image once for them.
        num_workers: Processes that read and decode; 0 reads in the main process.
        seed: Seed of the order of samples and of drawn targets; that of the run (`seed_everything`) if null.
    """

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        batch_size: int = 4,
        micro_batch_size: int = 1,
        targets_per_image: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1 or micro_batch_size < 1:
            raise UserError(f"batch_size {batch_size} and micro_batch_size {micro_batch_size} must be 1 or more")
        if targets_per_image is not None and targets_per_image < 1:
            raise UserError(f"targets_per_image {targets_per_image}: 1 or more, or null for all")
        if num_workers < 0:
            raise UserError(f"num_workers {num_workers}: 0 or more")
        self.folders = {"train": train, "val": val, "test": test}
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.targets_per_image, self.num_workers, self.seed = targets_per_image, num_workers, run_seed(seed)
        self.shards: dict[str, ShardDataset] = {}

    def setup(self, stage: str) -> None:
        """Open the indices of the splits that this stage needs, and set the number of accumulation steps."""
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}[stage]
        for split in needed:
            folder = self.folders[split]
            if folder is not None and split not in self.shards:
                # A link may go by another name.
                names = (Path(folder).name, Path(folder).resolve().name)
                if split != "test" and any(name.startswith(EXTERNAL) for name in names):
                    raise UserError(f"data.init_args.{split}: {folder} is an external set: it is for `test` only")
                self.shards[split] = ShardDataset(Path(folder))
        if needed[0] not in self.shards:
            raise UserError(f"`{stage}` needs data.init_args.{needed[0]}: the folder of that split's shards")
        if stage == "fit" and self.trainer is not None:
            if self.trainer.accumulate_grad_batches != 1:
                raise UserError("trainer.accumulate_grad_batches follows from data.init_args.batch_size: set that")
            if self.folders["test"] is not None and not Path(self.folders["test"]).is_dir():
                raise UserError(f"data.init_args.test: there is no folder {self.folders['test']}; null goes without")
            self._train_sampler()  # batches that do not divide are refused before anything is written
            self.trainer.accumulate_grad_batches = self.accumulation(self.trainer.world_size)
            if "val" not in self.shards:
                self.trainer.limit_val_batches = 0  # otherwise Lightning wonders about an empty loader

    def accumulation(self, world: int) -> int:
        """Micro-batches in one optimiser step on each of `world` ranks."""
        return max(1, self.batch_size // (self.micro_batch_size * world))

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one epoch."""
        return len(self.shards["train"]) // self.batch_size

    def without_targets(self, split: str) -> int:
        """Number of samples of an opened split that have no target at all."""
        return int((np.diff(self.shards[split].index.target_start) == 0).sum())

    def train_dataloader(self) -> TripletLoader:
        """Loader in the epoch's global order, resumable."""
        shards = self.shards["train"]
        view = SampleView(shards, self.targets_per_image, self.seed)
        return self._loader(view, self._train_sampler(), shards.index.sha256)

    def val_dataloader(self) -> TripletLoader | list[TripletLoader]:
        """Loader over the validation split, in order; none where there is no such split."""
        return self._evaluation("val") if "val" in self.shards else []

    def test_dataloader(self) -> TripletLoader:
        """Loader over the test split, in order."""
        return self._evaluation("test")

    def predict_dataloader(self) -> TripletLoader:
        """Loader over the test split, in order."""
        return self._evaluation("test")

    def transfer_batch_to_device(self, batch: TripletBatch, device: torch.device, dataloader_idx: int) -> TripletBatch:
        """Move a batch, without waiting for it."""
        return batch.to(device, non_blocking=True)

    def _train_sampler(self) -> GlobalOrderSampler:
        rank, world = self._rank()
        count = len(self.shards["train"])
        return GlobalOrderSampler(count, self.batch_size, self.micro_batch_size, rank, world, self.seed)

    def _evaluation(self, split: str) -> TripletLoader:
        shards = self.shards[split]
        return self._loader(SampleView(shards), EvenSampler(len(shards), self.micro_batch_size, *self._rank()))

    def _loader(
        self, view: SampleView, sampler: GlobalOrderSampler | EvenSampler, data_hash: str = ""
    ) -> TripletLoader:
        return TripletLoader(view, sampler, self.num_workers, torch.cuda.is_available(), data_hash)

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
