"""What every training module shares: a model, what learns of it, and how its optimiser is made.

Shapes: none; a family's module names its own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim import Optimizer

from data_shards.batch import TripletBatch
from data_shards.errors import UserError
from data_shards.seed import run_seed, stream
from trainer.distributed import FSDP2, is_sharded, zero_of
from trainer.models import SegmentationModel
from trainer.modules.optimization import RateSchedule, adamw, guard_gradients
from trainer.modules.scoring import ScoredModule
from trainer.tuning import Tuning
from trainer.tuning.base import Decay


class TunedModule(ScoredModule):
    """Trains a model by a tuning method with AdamW; a family says what is asked and what an answer costs.

    Args:
        model: The foundation model; the tuning method is applied to it.
        tuning: What learns, and how fast.
        lr: Learning rate of what has no other.
        weight_decay: AdamW's decay.
        decay: What decays: ``matrices`` and kernels, or ``all``.
        betas: AdamW's averaging factors.
        schedule: Factor on every rate by step.
    """

    judge: Callable[[Tensor], bool] | None = None
    """Told the gradients' norm before every optimiser step; says whether it may be taken (`callbacks.StepGuard`)."""
    step_dropped: bool = False
    """Whether the last optimiser step was not taken."""
    bad_steps: int = 0
    """How many were not taken since the last that was."""

    def __init__(
        self,
        model: SegmentationModel,
        tuning: Tuning,
        lr: float,
        weight_decay: float,
        decay: Decay,
        betas: tuple[float, float],
        schedule: RateSchedule,
    ) -> None:
        super().__init__()
        if not 0 < lr < inf or not 0 <= weight_decay < inf or not all(0 <= beta < 1 for beta in betas):
            raise UserError(
                f"lr is above 0, weight_decay is 0 or more, betas in [0, 1): here lr is {lr}, weight_decay "
                f"{weight_decay}, betas {betas}"
            )
        self.model, self.tuning = model, tuning
        self.lr, self.weight_decay, self.decay, self.betas = lr, weight_decay, decay, betas
        self.schedule = schedule
        self.tuning.apply(self.model)

    @abstractmethod
    def describe_prompts(self) -> dict[str, Any]:
        """What an evaluation asks, as JSON."""

    def setup(self, stage: str) -> None:
        """Refuse a precision that is not supported, and a schedule without an end.

        Raises:
            UserError: One of them.
        """
        precision = str(self.trainer.precision)
        if precision.endswith("-true") and precision != "32-true":
            raise UserError(f"trainer.precision {precision} is not supported: take bf16-mixed or 32-true")
        if stage == "fit" and self.schedule.needs_end and self.trainer.max_steps < 0 and self.trainer.max_epochs == -1:
            raise UserError(
                f"schedule {self.schedule.shape} needs to know the end: set trainer.max_steps or trainer.max_epochs"
            )

    def refuse(self, arguments: dict[str, Any], why: str) -> None:
        """Refuse what a data module may be told and this module does not use.

        Args:
            arguments: For each argument of the data module the value that leaves it out.
            why: Why, in a few words.

        Raises:
            UserError: One has another value.
        """
        for name, alone in arguments.items():
            given = getattr(self.trainer.datamodule, name, alone)
            if given != alone:
                raise UserError(f"data.init_args.{name} {given}: {why}: leave it out")

    def refuse_empty(self, lacking: str) -> None:
        """Refuse training data in which some samples have no target.

        Args:
            lacking: What there is none of then.

        Raises:
            UserError: There are such samples.
        """
        datamodule = self.trainer.datamodule
        empty = datamodule.without_targets("train") if datamodule is not None else 0
        if empty:
            raise UserError(
                f"{datamodule.folders['train']}: {empty} samples have no target, so {lacking}: set "
                "data.init_args.only_with_targets to true, or build the shards with `slices: {keep: nonempty}`"
            )

    def refuse_unreached(self, stage: str, parts: Sequence[str]) -> None:
        """Refuse plain DDP where a batch may not reach all that learns: it would wait for the rest.

        Args:
            stage: ``fit``, or another, in which nothing is refused.
            parts: What is reached only where prompts need it, as pieces of parameters' names.

        Raises:
            UserError: Something of it learns.
        """
        strategy = self.trainer.strategy
        if stage != "fit" or not isinstance(strategy, DDPStrategy):
            return
        learns = [n for n, p in self.named_parameters() if p.requires_grad and any(part in n for part in parts)]
        if learns and not strategy._ddp_kwargs.get("find_unused_parameters"):
            names = ", ".join(part.strip(".") for part in parts)
            raise UserError(
                f"trainer.strategy: {learns[0]} learns, and a batch reaches only those parts of the prompt encoder "
                f"that its prompts need: set it to ddp_find_unused_parameters_true, or freeze {names}"
            )

    def seed_dropout(self, batch: TripletBatch) -> None:
        """Make what drops out a function of the samples: a resumed run goes on alike, and ranks differ."""
        drawn = self.current_epoch, batch.positions[0], *batch.repeats[:1]
        torch.manual_seed(int(stream(run_seed(None), "dropout", *drawn).integers(2**63)))

    def configure_model(self) -> None:
        """Shard the model, where the strategy does; Lightning calls this on every rank."""
        strategy = getattr(self._trainer, "strategy", None)
        if isinstance(strategy, FSDP2):
            strategy.shard(self, self.model.block_kinds())

    def nothing_learnt(self) -> Tensor:
        """Loss of a batch with nothing in it: zero, with zero gradients, so that other ranks do not wait."""
        if is_sharded(self):  # the others wait in each block
            return self.idle_pass()
        return torch.stack([(p * 0).sum() for p in self.parameters() if p.requires_grad]).sum()

    def idle_pass(self) -> Tensor:
        """Go through every block as a training pass does, with a made-up image: zero, with zero gradients."""
        preprocessing, side = self.model.preprocessing, self.model.preprocessing.image_size
        features = self.model.encode(torch.zeros(1, preprocessing.channels, side, side, device=self.device))
        return zero_of(features)

    def configure_optimizers(self) -> Any:
        """AdamW over the tuning method's groups."""
        groups = self.tuning.parameter_groups(self.model, self.lr, self.weight_decay, self.decay)
        return adamw(groups, self.betas, self.schedule, self._total_steps())

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm over all ranks' shards, and log it."""
        guard_gradients(self, optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _total_steps(self) -> int:
        """Optimiser steps of the whole run.

        Not `Trainer.estimated_stepping_batches`: that sets up the loaders before a checkpoint is restored, and the
        loader's state would then be dropped without a word.
        """
        trainer = self.trainer
        ends = [trainer.max_steps] if trainer.max_steps > 0 else []
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            ends.append(trainer.max_epochs * trainer.datamodule.steps_per_epoch)
        return min(ends, default=1)
