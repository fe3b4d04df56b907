"""An average of the weights over the steps, kept beside the training and evaluated in the weights' place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from data_shards.errors import UserError
from trainer.distributed import reshard
from trainer.modules.optimization import own_shard
from trainer.restore import AVERAGE, Weights


class EMA(Callback):
    """Averages what learns, exponentially: after each optimiser step, average = d·average + (1 − d)·weights.

    (Polyak and Juditsky 1992, doi:10.1137/0330046; as a moving average Tarvainen and Valpola 2017, arXiv:1703.01780.)
    Validations in a fit score the average, and so `checkpoint.monitor` keeps the best by it. Checkpoints hold both:
    a resumed run goes on with the raw weights, and ``trainer validate``, ``test``, ``predict`` and ``export`` take the
    average unless ``--weights raw`` asks for the others.

    What is frozen is not averaged, and needs no memory; the average of the rest takes as much as those weights.
    Lightning's own callback copies the whole module, and loses the raw weights at the end of a fit.

    Args:
        decay: Largest d, in [0, 1): some 1 / (1 − d) steps are averaged.
        warmup: Begin with a lower d: min(decay, (1 + t) / (10 + t)) after t steps. Without it, a run that is not much
            longer than 1 / (1 − d) steps ends near the weights that it began with.
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"EMA's decay is in [0, 1), not {decay}")
        self.decay, self.warmup = decay, warmup
        self.average: dict[str, Tensor] = {}
        """The average by parameter's name; while a validation runs, the raw weights."""
        self._steps = 0
        self._last_step = 0
        self._swapped = False
        self._loaded: Mapping[str, Tensor] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the weights as they are, or as the checkpoint says."""
        learning = _learning(pl_module)
        self.average = {name: parameter.detach().clone() for name, parameter in learning.items()}
        self._last_step = trainer.global_step
        if self._loaded is None:
            self._steps = 0
        else:
            put(self._loaded, self.average)
            self._loaded = None

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Average, if the batch ended an optimiser step that was taken; checkpoints are written after this."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        if getattr(pl_module, "step_dropped", False):
            return
        decay = min(self.decay, (1 + self._steps) / (10 + self._steps)) if self.warmup else self.decay
        learning = _learning(pl_module)
        weights = _shards(learning[name] for name in self.average)
        get_ema_multi_avg_fn(decay)(_shards(self.average.values()), weights, self._steps)
        self._steps += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average in the weights' place."""
        self._swap(pl_module, to_average=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the weights back; checkpoints are written after this."""
        self._swap(pl_module, to_average=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the weights back where a validation breaks down: what is saved now shall be right."""
        self._swap(pl_module, to_average=False)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the average; of a sharded one every rank adds its part."""
        if self.average:
            checkpoint[AVERAGE] = {**self.settings(), "steps": self._steps, "weights": dict(self.average)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the average of a checkpoint that a fit goes on from."""
        if trainer.state.fn == "fit":
            check_average(checkpoint, [self], Path(str(trainer.ckpt_path)))
            self._loaded, self._steps = checkpoint[AVERAGE]["weights"], checkpoint[AVERAGE]["steps"]

    def go_back(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the average of a checkpoint in the middle of a fit."""
        put(checkpoint[AVERAGE]["weights"], self.average)
        self._steps = checkpoint[AVERAGE]["steps"]

    def settings(self) -> dict[str, Any]:
        """What must stay the same when a run is gone on with."""
        return {"decay": self.decay, "warmup": self.warmup}

    @torch.no_grad()
    def _swap(self, module: LightningModule, *, to_average: bool) -> None:
        """Exchange weights and average in place, one tensor after the other."""
        if self._swapped == to_average or not self.average:
            return
        reshard(module)  # an evaluation has gathered the weights
        learning = _learning(module)
        for name, tensor in self.average.items():
            ours, weights = own_shard(tensor), own_shard(learning[name].detach())
            before = weights.clone()
            weights.copy_(ours)
            ours.copy_(before)
        self._swapped = to_average


class EvaluateAverage(Callback):
    """Puts the average of a checkpoint in the place of its raw weights before an evaluation.

    Args:
        average: The average by parameter's name.
    """

    def __init__(self, average: Mapping[str, Tensor]) -> None:
        self.average = average

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put it there."""
        put(self.average, dict(pl_module.named_parameters()))

    on_test_start = on_validation_start
    on_predict_start = on_validation_start


def scored_weights(trainer: Trainer) -> Weights | None:
    """Which weights of its checkpoint an evaluation scores; None without a checkpoint."""
    averaged = any(isinstance(callback, EvaluateAverage) for callback in trainer.callbacks)
    return ("average" if averaged else "raw") if trainer.ckpt_path else None


def check_average(content: Mapping[str, Any], callbacks: Iterable[Callback], path: Path) -> None:
    """Check that a checkpoint and a fit that goes on from it agree on whether, and how, weights are averaged.

    Args:
        content: The checkpoint.
        callbacks: Those of the fit.
        path: Where the checkpoint is, for messages.

    Raises:
        UserError: They do not.
    """
    ours = next((callback.settings() for callback in callbacks if isinstance(callback, EMA)), None)
    saved = content.get(AVERAGE)
    theirs = saved and {name: saved[name] for name in ("decay", "warmup")}
    if ours != theirs:
        then, now = (
            "EMA of " + ", ".join(f"{name} {value}" for name, value in values.items()) if values else "no EMA"
            for values in (theirs, ours)
        )
        raise UserError(
            f"cannot go on with another trainer.callbacks: {then} in checkpoint {path}, now {now}; set it back, or "
            "start in another trainer.default_root_dir"
        )


@torch.no_grad()
def put(values: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy whole values into tensors of the same names, which may be sharded."""
    for name, value in values.items():
        there = tensors[name].detach()
        if isinstance(there, DTensor):
            value = distribute_tensor(value.to(there.device), there.device_mesh, there.placements).to_local()
        own_shard(there).copy_(value)


def _learning(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [own_shard(tensor.detach()) for tensor in tensors]
