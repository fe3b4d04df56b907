"""The optimiser, its schedule and its guards, the same for every module."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from data_shards.errors import UserError

Schedule = Literal["constant", "cosine", "linear", "polynomial", "inverse_sqrt"]


@dataclass(frozen=True)
class RateSchedule:
    """The learning rate's factor by optimiser step: a linear warm-up, a decay, and a linear cool-down at the end.

    With w warm-up steps, c of cool-down, T in all, f the final factor and x = (step − w) / (T − w) in [0, 1]:

    - ``constant``: 1
    - ``cosine``: f + (1 − f)·(1 + cos πx) / 2 (Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5)
    - ``linear``: f + (1 − f)·(1 − x)
    - ``polynomial``: f + (1 − f)·(1 − x)^power (DeepLab, arXiv:1606.00915, §4.1.1)
    - ``inverse_sqrt``: 1 / √(1 + (step − w) / timescale), and never below f. It is SAM3's, and with w as the timescale
      that of Vaswani et al. 2017 (arXiv:1706.03762, eq. 3).

    The warm-up is (step + 1) / w, so that no step has a rate of zero, and is 1 at its last step. SAM3's is step / w:
    its first step learns nothing, and all from w on is the same. The cool-down takes what the others make of a step
    down to f by the factor (T − step) / c, as SAM3's to zero.

    Attributes:
        shape: What follows the warm-up.
        warmup_steps: Optimiser steps w in which the rate rises.
        cooldown_steps: The last optimiser steps c, in which it falls to the final factor.
        power: Exponent of ``polynomial``; 0.9 is DeepLab's and nnU-Net's.
        timescale: Steps after the warm-up in which ``inverse_sqrt`` falls to 1/√2; None takes the warm-up's.
        final_factor: Factor f in [0, 1] that is left at the end.

    Raises:
        UserError: A value is out of its range, or ``inverse_sqrt`` has neither timescale nor warm-up.
    """

    shape: Schedule = "constant"
    warmup_steps: int = 0
    cooldown_steps: int = 0
    power: float = 0.9
    timescale: int | None = None
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or self.cooldown_steps < 0:
            raise UserError(
                f"warmup_steps {self.warmup_steps} and cooldown_steps {self.cooldown_steps}: steps are 0 or more"
            )
        if not 0 < self.power < math.inf or not 0 <= self.final_factor <= 1:
            raise UserError(
                f"power is above 0 and final_factor in [0, 1]: here power is {self.power}, final_factor "
                f"{self.final_factor}"
            )
        if self.timescale is not None and self.timescale < 1:
            raise UserError(f"timescale {self.timescale}: 1 step or more; null takes warmup_steps")
        if self.shape == "inverse_sqrt" and not (self.timescale or self.warmup_steps):
            raise UserError("schedule inverse_sqrt needs a timescale in steps, or warmup_steps to take for it")

    @property
    def needs_end(self) -> bool:
        """Whether the number of steps must be known beforehand."""
        return self.shape in ("cosine", "linear", "polynomial") or self.cooldown_steps > 0

    def factor(self, step: int, total: int) -> float:
        """Factor on the learning rate.

        Args:
            step: The step, from 0.
            total: Optimiser steps of the whole run; of no matter where `needs_end` is false.
        """
        warming = step < self.warmup_steps
        found = (step + 1) / self.warmup_steps if warming else self._decayed(step - self.warmup_steps, total)
        if self.cooldown_steps:
            found = self._between(found, min(1.0, max(0, total - step) / self.cooldown_steps))
        return found

    def describe(self) -> str:
        """The schedule in a few words, such as ``cosine to 0 after 250 steps of warm-up``."""
        shapes = {
            "polynomial": f"polynomial (power {self.power:g})",
            "inverse_sqrt": f"inverse_sqrt (timescale {self.timescale or self.warmup_steps})",
        }
        falls = self.needs_end or (self.shape == "inverse_sqrt" and self.final_factor)
        return (
            shapes.get(self.shape, str(self.shape))
            + (f" to {self.final_factor:g}" if falls else "")
            + (f" after {self.warmup_steps} steps of warm-up" if self.warmup_steps else "")
            + (f", the last {self.cooldown_steps} cooling down" if self.cooldown_steps else "")
        )

    def _decayed(self, step: int, total: int) -> float:
        """What the shape makes of a step that is counted from the end of the warm-up."""
        if self.shape == "constant":
            return 1.0
        if self.shape == "inverse_sqrt":
            return max(self.final_factor, (1 + step / (self.timescale or self.warmup_steps)) ** -0.5)
        left = 1 - min(1.0, step / max(1, total - self.warmup_steps))
        if self.shape == "cosine":
            return self._between(1.0, (1 - math.cos(math.pi * left)) / 2)
        return self._between(1.0, left**self.power if self.shape == "polynomial" else left)

    def _between(self, high: float, share: float) -> float:
        """A share of the way from the final factor up to another."""
        return self.final_factor + (high - self.final_factor) * share


def adamw(
    groups: list[dict[str, Any]],
    betas: tuple[float, float],
    schedule: RateSchedule,
    total_steps: int,
) -> dict[str, Any]:
    """AdamW with a schedule by step, as Lightning takes it.

    Args:
        groups: Parameter groups, each with its learning rate and weight decay.
        betas: Averaging factors of the gradient and its square.
        schedule: Factor on every group's rate by step.
        total_steps: Optimiser steps of the whole run.
    """
    # on a CPU too the fused one takes a quarter of the time
    fused = all(parameter.device.type in ("cpu", "cuda") for group in groups for parameter in group["params"])
    optimizer = torch.optim.AdamW(groups, betas=betas, fused=fused)
    scheduler = LambdaLR(optimizer, rate_factor(schedule, total_steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def rate_factor(schedule: RateSchedule, total_steps: int) -> Callable[[int], float]:
    """The learning rate's factor as a plain function of the step: nothing of it goes into checkpoints."""

    def factor(step: int) -> float:
        return schedule.factor(step, total_steps)

    return factor


def check_clipping(limit: float | None) -> None:
    """Refuse a limit on gradients that is negative or no number.

    Args:
        limit: ``trainer.gradient_clip_val``.

    Raises:
        UserError: It is.
    """
    if limit is not None and not limit >= 0:
        raise UserError(f"trainer.gradient_clip_val {limit}: above 0, or null for no clipping")


def guard_gradients(
    module: LightningModule, optimizer: Optimizer, limit: float | None, algorithm: str | None = None
) -> None:
    """Judge and clip what an optimiser is about to learn from, and log ``train/grad_norm``: the norm before clipping.

    At logged steps those of the model's parts are logged too, and learning rates: see `log_parts`.

    To be called by `LightningModule.configure_gradient_clipping`, which Lightning does before every optimiser step,
    clipping or not. A module's ``judge``, where it has one, is told the norm; if it says no the step learns nothing:
    without gradients AdamW leaves weights, moments and decay alone. Without judge and clipping the norm is computed at
    logged steps only. But for the judge nothing here waits for the device.

    Args:
        module: The module in training.
        optimizer: The optimiser that is about to step.
        limit: ``trainer.gradient_clip_val``; None or 0 does not clip.
        algorithm: ``trainer.gradient_clip_algorithm``: ``norm`` (the default) or ``value``.

    Raises:
        UserError: The limit is negative.
    """
    check_clipping(limit)
    trainer = module.trainer
    judge: Callable[[Tensor], bool] | None = getattr(module, "judge", None)
    logged = trainer.log_every_n_steps > 0 and (trainer.global_step + 1) % trainer.log_every_n_steps == 0
    by_value = algorithm is not None and str(getattr(algorithm, "value", algorithm)) == "value"
    if not limit and not logged and judge is None:
        return
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        scaler.unscale_(optimizer)  # for other optimisers than fused ones, Lightning has done it
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = gradient_norm(gradients) if judge is not None or logged or not by_value else None
    if logged:
        module.log("train/grad_norm", norm, on_step=True, on_epoch=False, batch_size=1)
        log_parts(module, optimizer)
    if judge is not None and norm is not None and not judge(norm):
        optimizer.zero_grad(set_to_none=True)
    elif limit and by_value:
        clip_to_value(gradients, limit)
    elif limit and norm is not None:
        clip_to_norm(gradients, limit, norm)


def log_parts(module: LightningModule, optimizer: Optimizer) -> None:
    """Log ``train/grad_norm/PART``, ``train/lr`` and ``train/lr/PART``, at a step that is logged anyway.

    A part of the model is what the first word of its parameters' names says, such as ``image_encoder``; a rate is the
    largest of those in it (layer decay has many), and ``train/lr`` the largest of all. The norms' squares add up to
    that of ``train/grad_norm``: they are of the same gradients, before clipping. Nothing here waits for the device.

    Args:
        module: The module in training.
        optimizer: The optimiser that is about to step.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    parts: dict[str, list[Tensor]] = defaultdict(list)
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            part = names.get(id(parameter), "rest").removeprefix("model.").partition(".")[0]
            rates[part] = max(rates.get(part, 0.0), float(group["lr"]))
            parts[part] += [] if parameter.grad is None else [parameter.grad]
    norms = _square_sums(list(parts.values())).sqrt()
    found: dict[str, Any] = {f"train/grad_norm/{part}": norm for part, norm in zip(parts, norms, strict=True)}
    found |= {f"train/lr/{part}": rate for part, rate in rates.items()} | {"train/lr": max(rates.values())}
    module.log_dict(found, on_step=True, on_epoch=False, batch_size=1)


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """2-norm of all gradients as one vector, a scalar: the same on every rank, and the same as on one.

    Shards of a sharded gradient (DTensor, as FSDP2 makes them) are summed over the ranks that hold them, those of one
    mesh at once; a gradient that every rank has whole is counted once.
    """
    return _square_sums([gradients])[0].sqrt()


def _square_sums(groups: Sequence[Sequence[Tensor]]) -> Tensor:
    """Sums of the squares of each group's gradients over all ranks, one number a group."""
    held: dict[tuple[Any, tuple[int, ...]], list[list[Tensor]]] = {}
    for number, gradients in enumerate(groups):
        for gradient in gradients:
            mesh: Any = None
            dimensions: tuple[int, ...] = ()
            local = gradient
            if isinstance(gradient, DTensor):
                whole = [Replicate() if place.is_partial() else place for place in gradient.placements]
                gradient = gradient.redistribute(placements=whole)
                dimensions = tuple(i for i, place in enumerate(whole) if not place.is_replicate())
                mesh, local = gradient.device_mesh, gradient.to_local()
            held.setdefault((mesh, dimensions), [[] for _ in groups])[number].append(local)
    if not held:
        return torch.zeros(len(groups))
    found = []
    for (mesh, dimensions), mine in held.items():
        device = next(shard for shards in mine for shard in shards).device
        norms = [torch.nn.utils.get_total_norm(shards) if shards else torch.zeros(()) for shards in mine]
        squares = torch.stack([norm.to(device) for norm in norms]).square()
        for dimension in dimensions:
            dist.all_reduce(squares, group=mesh.get_group(dimension))
        found.append(squares)
    return torch.stack([squares.to(found[0].device) for squares in found]).sum(0)


def clip_to_norm(gradients: Sequence[Tensor], limit: float, norm: Tensor) -> None:
    """Scale gradients, in place, so that their norm is at most the limit (Pascanu et al. 2013, arXiv:1211.5063).

    Args:
        gradients: All of them.
        limit: Largest norm.
        norm: Their norm, by `gradient_norm`.
    """
    if gradients:
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)  # PyTorch's ε
        torch._foreach_mul_([own_shard(gradient) for gradient in gradients], factor)


def clip_to_value(gradients: Sequence[Tensor], limit: float) -> None:
    """Cut every number of the gradients, in place, to [−limit, limit]."""
    if gradients:
        shards = [own_shard(gradient) for gradient in gradients]
        torch._foreach_clamp_min_(shards, -limit)
        torch._foreach_clamp_max_(shards, limit)


def own_shard(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
