"""The LightningDataModule over shards."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule

from data_shards.batch import TripletBatch
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from data_shards.index import Index
from data_shards.loader import TripletLoader, check_state
from data_shards.order import EpochOrder, Sampling, make_order
from data_shards.sampler import EvenSampler, GlobalOrderSampler
from data_shards.seed import run_seed
from data_shards.splits import EXTERNAL
from data_shards.stores.urls import as_url
from data_shards.views import (
    Anchor,
    ClipView,
    Kinds,
    OnDamage,
    SampleView,
    clip,
    clip_starts,
    clips_end_to_end,
    longest_volume,
    with_target,
)


class TripletDataModule(LightningDataModule):
    """Feeds triplets from shards made by ``data-shards build``.

    Args:
        train: Folder of the training split, such as ``shards/train``.
        val: Folder of the validation split; null goes without.
        test: Folder of the test split, also taken by ``predict``.
        batch_size: Images in one optimiser step, over all GPUs. How many passes that takes follows from it.
        micro_batch_size: Images a GPU takes at once; lower it when memory runs out, a step stays the same. Nearly so
            with set prediction, whose terms are divided by the targets of each pass.
        targets_per_image: Targets drawn from an image in an epoch; null takes all, encoding the image once for them.
        num_workers: Processes that read and decode; 0 reads in the main process.
        seed: Seed of the order of samples and of drawn targets; that of the run (`seed_everything`) if null.
        sampling: How often each modality or data set is seen in training; each sample once if null.
        kinds: Which targets are used: ``semantic`` (all of a term in one mask), ``instance``, or ``all``.
        only_with_targets: Train on the samples that have a target of these kinds, and leave out the others.
        train_samples: Train on so many samples alone, drawn at random, for every seed the same ones: those of a
            smaller number are among those of a larger one. Null takes all.
        negatives_per_image: Terms drawn from those that were looked for in a training image and are not there.
        hard_negatives: Draw first from those of these terms that other images of the same modality have, so that only
            the image itself tells; then from the rest.
        evaluated_negatives: As `negatives_per_image`, for every image of validation, test and predict: the same terms
            each time, so that what is found of them can be counted.
        clip_length: Neighbouring slices in a training sample, for video models; 1 takes single images.
        clip_step: From one slice of a clip to the next; 2 leaves out every other.
        clip_anchor: Which slice of a clip says what is followed, and is prompted: forwards from the ``first``,
            backwards from the ``last``, outwards from the ``middle``, or from one of the ``ends``, drawn anew each
            time. Where clips are trained on they are evaluated too: end to end, so that no slice is in two.
        on_damage: What a damaged sample is: ``error`` ends the run, ``skip`` goes on without it, and reports it.
        max_damaged: Share of an epoch that may be skipped before the run ends all the same.
        cache: Folder in which samples of remote shards (``s3://``, ``gs://``, …) are kept; that of the user if null.
        cache_gb: Most gigabytes to keep there; what does not fit is fetched anew each time. Null keeps everything.
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
        sampling: Sampling | None = None,
        kinds: Kinds = "all",
        only_with_targets: bool = False,
        train_samples: int | None = None,
        negatives_per_image: int = 0,
        hard_negatives: bool = False,
        evaluated_negatives: int = 0,
        clip_length: int = 1,
        clip_step: int = 1,
        clip_anchor: Anchor = "first",
        on_damage: OnDamage = "error",
        max_damaged: float = 0.01,
        cache: str | None = None,
        cache_gb: float | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1 or micro_batch_size < 1:
            raise UserError(f"batch_size {batch_size} and micro_batch_size {micro_batch_size} must be 1 or more")
        if targets_per_image is not None and targets_per_image < 1:
            raise UserError(f"targets_per_image {targets_per_image}: 1 or more, or null for all")
        if train_samples is not None and train_samples < 1:
            raise UserError(f"train_samples {train_samples}: 1 or more, or null for all")
        if num_workers < 0:
            raise UserError(f"num_workers {num_workers}: 0 or more")
        if negatives_per_image < 0 or clip_length < 1 or clip_step < 1:
            raise UserError(
                f"negatives_per_image {negatives_per_image} is 0 or more, clip_length {clip_length} and clip_step "
                f"{clip_step} are 1 or more"
            )
        if evaluated_negatives < 0:
            raise UserError(f"evaluated_negatives {evaluated_negatives}: 0 or more")
        if hard_negatives and not (negatives_per_image or evaluated_negatives):
            raise UserError("hard_negatives says which are drawn: set negatives_per_image or evaluated_negatives too")
        if clip_length > 1 and kinds == "instance":
            raise UserError("kinds instance: clips follow semantic targets; shards do not say which instance is which")
        if not 0 <= max_damaged <= 1:
            raise UserError(f"max_damaged {max_damaged}: a share from 0 to 1")
        self.folders = {"train": train, "val": val, "test": test}
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.targets_per_image, self.num_workers, self.seed = targets_per_image, num_workers, run_seed(seed)
        self.sampling, self.kinds, self.only_with_targets = sampling, kinds, only_with_targets
        self.train_samples = train_samples
        self.negatives_per_image, self.clip_length, self.clip_step = negatives_per_image, clip_length, clip_step
        self.clip_anchor: Anchor = clip_anchor
        self.hard_negatives, self.evaluated_negatives = hard_negatives, evaluated_negatives
        self.on_damage, self.max_damaged = on_damage, max_damaged
        self.cache, self.cache_gb = cache, cache_gb
        self.shards: dict[str, ShardDataset] = {}
        self._order: tuple[Index, EpochOrder] | None = None
        self._loaders: dict[str, TripletLoader] = {}

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
                self.shards[split] = self._open(split, folder)
        if needed[0] not in self.shards:
            command = getattr(stage, "value", stage)  # Lightning's names are no plain text
            raise UserError(f"`{command}` needs data.init_args.{needed[0]}: the folder of that split's shards")
        if stage == "fit" and self.trainer is not None:
            if self.trainer.accumulate_grad_batches != 1:
                raise UserError("trainer.accumulate_grad_batches follows from data.init_args.batch_size: set that")
            test = self.folders["test"]
            if test is not None and as_url(test) is None and not Path(test).is_dir():
                raise UserError(f"data.init_args.test: there is no folder {test}; null goes without")
            self._train_sampler()  # batches that do not divide are refused before anything is written
            self.trainer.accumulate_grad_batches = self.accumulation(self.trainer.world_size)
            self._check_limit()
            self._say_what_is_left_out()
            if "val" not in self.shards:
                self.trainer.limit_val_batches = 0  # otherwise Lightning wonders about an empty loader
            self._check_interval()

    def accumulation(self, world: int) -> int:
        """Micro-batches in one optimiser step on each of `world` ranks."""
        return max(1, self.batch_size // (self.micro_batch_size * world))

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one epoch, as `limit_train_batches` leaves them."""
        if self.trainer is None:
            return len(self._train_order()) // self.batch_size
        return self._batches() // self.accumulation(self.trainer.world_size)

    def _batches(self) -> int:
        """Micro-batches of each rank in one epoch, as `limit_train_batches` leaves them."""
        limit = self.trainer.limit_train_batches
        whole = len(self._train_order()) // self.batch_size * self.accumulation(self.trainer.world_size)
        return min(whole, limit) if isinstance(limit, int) else int(whole * limit)

    def without_targets(self, split: str) -> int:
        """Number of samples of an opened split that are used and have no target of the kinds that are."""
        empty = ~with_target(self.shards[split].index, self.kinds)
        used = self._train_order().positions if split == "train" else None
        return int(empty.sum() if used is None else empty[used].sum())

    def train_dataloader(self) -> TripletLoader:
        """Loader in the epoch's global order, resumable."""
        shards = self.shards["train"]
        draw = (self.targets_per_image, self.seed)
        negatives, hard = self.negatives_per_image, self.hard_negatives
        if self.clip_length > 1:
            clips = (self.clip_length, self.clip_step)
            view: SampleView = ClipView(shards, *clips, *draw, negatives, self.on_damage, hard, self.clip_anchor)
        else:
            view = SampleView(shards, *draw, self.kinds, negatives, self.on_damage, hard)
        loader = self._loader("train", view, self._train_sampler(), shards.index.sha256)
        loader.steps_per_epoch = self.steps_per_epoch
        return loader

    def val_dataloader(self) -> TripletLoader | list[TripletLoader]:
        """Loader over the validation split, in order; none where there is no such split."""
        return self._evaluation("val") if "val" in self.shards else []

    def test_dataloader(self) -> TripletLoader:
        """Loader over the test split, in order."""
        return self._evaluation("test")

    def predict_dataloader(self) -> TripletLoader:
        """Loader over the test split, in order."""
        return self._evaluation("test")

    def teardown(self, stage: str) -> None:
        """Stop the workers of all loaders."""
        while self._loaders:
            self._loaders.popitem()[1].close()

    def on_exception(self, exception: BaseException) -> None:
        """Stop the workers of all loaders; Lightning calls this when a run breaks down."""
        self.teardown("")

    def transfer_batch_to_device(self, batch: TripletBatch, device: torch.device, dataloader_idx: int) -> TripletBatch:
        """Move a batch, without waiting for it; one that the loader took there stays as it is."""
        return batch.to(device, non_blocking=True)

    def _train_sampler(self) -> GlobalOrderSampler:
        rank, world = self._rank()
        order = self._train_order()
        cut = (self.batch_size, self.micro_batch_size, rank, world)
        counted = None if self.clip_length > 1 else with_target(self.shards["train"].index, self.kinds)
        return GlobalOrderSampler(order, *cut, self.seed, counted)  # every clip has a target: others are not eligible

    def _check_limit(self) -> None:
        """Refuse an epoch that ends in the middle of a step, or that Lightning would order itself."""
        limit, passes = self.trainer.limit_train_batches, self.accumulation(self.trainer.world_size)
        if self.trainer.overfit_batches:
            raise UserError("trainer.overfit_batches is not supported: take trainer.limit_train_batches and max_epochs")
        batches = self._batches()
        if batches % passes and not self.trainer.fast_dev_run:
            raise UserError(
                f"trainer.limit_train_batches {limit}: {batches} batches are no whole steps of {passes}: "
                f"choose a multiple of {passes}"
            )

    def _check_interval(self) -> None:
        """Refuse validations that would never come, and those for which each rank would look at its own clock."""
        trainer, batches = self.trainer, self._batches()
        if getattr(trainer, "_val_check_time_interval", None) is not None and trainer.world_size > 1:
            raise UserError("trainer.val_check_interval: ranks do not agree about a time: give a number of batches")
        often, epochs = trainer.val_check_interval, trainer.check_val_every_n_epoch
        if isinstance(often, int) and often > batches > 0 and epochs is not None and trainer.limit_val_batches:
            raise UserError(
                f"trainer.val_check_interval {often}: an epoch has {batches} batches: lower it, or set "
                "trainer.check_val_every_n_epoch to null"
            )

    def _say_what_is_left_out(self) -> None:
        """Name what the recipe leaves out of a training: nothing is skipped in silence."""
        total, used = len(self.shards["train"]), self._train_order().positions
        if used is not None and len(used) < total and self._rank()[0] == 0:
            if self.train_samples is not None:
                print(f"data.init_args.train: {len(used):,} of {total:,} samples are trained on", file=sys.stderr)
                return
            why = "do not begin a whole clip" if self.clip_length > 1 else f"have no target of kind '{self.kinds}'"
            counts = f"{total - len(used):,} of {total:,} samples"
            print(f"data.init_args.train: {counts} {why}: they are left out", file=sys.stderr)

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Check that the state of a train loader was made with this order of these samples.

        Raises:
            UserError: It was not.
        """
        check_state(state, self.shards["train"].index.sha256, self.seed, self._train_order().name)
        steps = state.get("steps_per_epoch", self.steps_per_epoch)
        if steps != self.steps_per_epoch:
            raise UserError(
                f"cannot resume: an epoch had {steps} steps, now {self.steps_per_epoch}: set "
                "trainer.limit_train_batches back"
            )

    def _train_order(self) -> EpochOrder:
        index = self.shards["train"].index
        if self._order is None or self._order[0] is not index:
            self._order = (index, make_order(index, self._drawn(self._eligible()), self.sampling, self.batch_size))
        return self._order[1]

    def _eligible(self) -> np.ndarray | None:
        """Which samples are trained on: (N,) bool; None for all."""
        index = self.shards["train"].index
        if self.clip_length > 1:
            chosen = clip_starts(index, self.clip_length, self.clip_step, self.clip_anchor)
            what = self._clip
        elif self.only_with_targets:
            chosen, what = with_target(index, self.kinds), f"sample with a target of kind '{self.kinds}'"
        else:
            return None
        if not chosen.any():
            raise UserError(f"data.init_args.train: {self.folders['train']} has no {what}{self._too_short(index)}")
        return None if chosen.all() else chosen

    def _drawn(self, chosen: np.ndarray | None) -> np.ndarray | None:
        """So many of the samples that are trained on as were asked for: (N,) bool; None for all."""
        count = len(self.shards["train"].index)
        places = np.arange(count) if chosen is None else np.flatnonzero(chosen)
        if self.train_samples is None or self.train_samples == len(places):
            return chosen
        if self.train_samples > len(places):
            raise UserError(
                f"train_samples {self.train_samples:,}: {self.folders['train']} has {len(places):,} to draw from"
            )
        drawn = np.zeros(count, bool)
        drawn[places[np.random.default_rng(0).permutation(len(places))[: self.train_samples]]] = True
        return drawn

    def _open(self, split: str, folder: str) -> ShardDataset:
        """Open a split; where damage is skipped, shards that are missing are only named."""
        shards = ShardDataset(folder, check=self.on_damage == "error", cache=self.cache, cache_gb=self.cache_gb)
        if self.on_damage == "skip":
            for problem in shards.missing():
                if self._rank()[0] == 0:
                    print(f"data.init_args.{split}: {problem} (until then, its samples are skipped)", file=sys.stderr)
        return shards

    @property
    def _clip(self) -> str:
        which = {"ends": "first or last"}.get(self.clip_anchor, self.clip_anchor)
        return f"clip of {self.clip_length} slices whose {which} has a semantic target"

    def _too_short(self, index: Index) -> str:
        """What to do where no volume has as many slices as a clip."""
        needed, most = (self.clip_length - 1) * self.clip_step + 1, longest_volume(index)
        if self.clip_length == 1 or most >= needed:
            return ""
        if most == 1:
            return ": no sample has a neighbour: build shards of volumes with `slices: {keep: all}`"
        return f": a clip spans {needed} slices, and no volume has more than {most} in a row: lower clip_length"

    def _say_what_is_not_scored(self, split: str, starts: np.ndarray) -> None:
        """Name what lies in no clip of an evaluation: nothing is left out in silence."""
        index = self.shards[split].index
        outside = with_target(index, "semantic")
        for start in starts.tolist():
            outside[clip(index, start, self.clip_length, self.clip_step)] = False
        if outside.any() and self._rank()[0] == 0:
            counts = f"{int(outside.sum()):,} of {len(index):,} samples"
            print(
                f"data.init_args.{split}: {counts} have a target and lie in no whole clip: they are not scored",
                file=sys.stderr,
            )

    def _evaluation(self, split: str) -> TripletLoader:
        shards, draw = self.shards[split], (None, self.seed)
        negatives, damage, hard = self.evaluated_negatives, self.on_damage, self.hard_negatives
        if self.clip_length > 1:
            clips = (self.clip_length, self.clip_step)
            starts = clips_end_to_end(shards.index, clip_starts(shards.index, *clips, self.clip_anchor), *clips)
            if not len(starts):
                short = self._too_short(shards.index)
                raise UserError(f"data.init_args.{split}: {self.folders[split]} has no {self._clip}{short}")
            self._say_what_is_not_scored(split, starts)
            view: SampleView = ClipView(shards, *clips, *draw, negatives, damage, hard, self.clip_anchor, starts)
        else:
            view = SampleView(shards, *draw, self.kinds, negatives, damage, hard)
        return self._loader(split, view, EvenSampler(len(view), self.micro_batch_size, *self._rank()))

    def _loader(
        self, split: str, view: SampleView, sampler: GlobalOrderSampler | EvenSampler, data_hash: str = ""
    ) -> TripletLoader:
        if split in self._loaders:  # made anew: the old one's workers end
            self._loaders[split].close()
        device = self.trainer.strategy.root_device if self.trainer is not None else None
        gpu = device if device is not None and device.type == "cuda" else None
        pinned = torch.cuda.is_available() if device is None else gpu is not None
        self._loaders[split] = TripletLoader(view, sampler, self.num_workers, pinned, data_hash, self.max_damaged, gpu)
        return self._loaders[split]

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
