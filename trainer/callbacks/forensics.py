"""What made a step bad: its samples, the first layer that gave what is no number, the gradients that are none.

Shapes: images are (C, H, W), as in `data_shards.batch`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from data_shards.batch import TripletBatch
from trainer.distributed import reshard, tensors_in
from trainer.modules.optimization import own_shard

_NAMES = 20
"""Parameters that are named; the others are counted."""
_LAYERS = 5
"""Layers that are named: some give −inf on purpose, and the first may be one of them."""


@dataclass
class Pass:
    """A micro-batch of the step that is being taken.

    Attributes:
        batch: What was learnt from.
        number: Its number in the epoch.
        loss: Its loss as it was told to the backward pass, a scalar: divided by the micro-batches of a step.
    """

    batch: TripletBatch
    number: int
    loss: Tensor | None = None


def write_report(path: Path, head: Mapping[str, Any], batches: Sequence[Mapping[str, Any]]) -> str:
    """Write a report as JSON, in which numbers that are none are text.

    Returns:
        What is wrong with the place where it should go; empty if it was written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_plain({**head, "batches": list(batches)}), indent=2, allow_nan=False) + "\n")
    except OSError as error:  # what is looked into must not end what it was written for
        return f"{path} could not be written ({error.strerror})"
    return ""


def bad_gradients(module: nn.Module) -> dict[str, Any]:
    """Which parameters have a gradient, or a shard of one on this rank, that is not finite: names and their count."""
    found = [
        name
        for name, parameter in module.named_parameters()
        if parameter.grad is not None and not bool(own_shard(parameter.grad).isfinite().all())
    ]
    return {"count": len(found), "names": found[:_NAMES]}


def samples_of(trainer: Trainer, batch: TripletBatch) -> list[dict[str, Any]]:
    """Keys of a batch's samples, the shards that they lie in, and the values of their images."""
    shards = trainer.datamodule.shards["train"]
    return [
        {"key": key, "shard": shards.shard(position), "image": _values(image)}
        for key, position, image in zip(batch.keys, batch.positions, batch.images, strict=True)
    ]


def again(trainer: Trainer, module: LightningModule, taken: Pass) -> dict[str, Any]:
    """Go forward through a micro-batch once more, and note where numbers were lost.

    All ranks have to do so, for all their micro-batches: blocks may be sharded. A training step draws what it draws
    from its samples, so it is the same again. The state of the random numbers is left as it was.

    Returns:
        ``loss``: what it is now; ``layer``: the first whose inputs are finite and whose output is not, or
        ``not reproduced``; ``later_layers``: more of them.
    """
    devices = [module.device] if module.device.type == "cuda" else []
    with _watched(module) as layers, _silent(module), torch.no_grad(), torch.random.fork_rng(devices):
        try:
            with trainer.precision_plugin.train_step_context(), torch.compiler.set_stance("force_eager"):
                answer = module.training_step(taken.batch, taken.number)
        except Exception as error:  # of memory, say: the other ranks wait for what this one found
            return {"loss": None, "layer": f"the second pass failed: {' '.join(str(error).split())[:200]}"}
        finally:
            reshard(module)
    loss = float(answer["loss"] if isinstance(answer, Mapping) else answer)
    if not layers and not math.isfinite(loss):
        layers = [{"name": "training_step", "class": type(module).__name__, "output": _kind(torch.tensor(loss))}]
    found: dict[str, Any] = {"loss": loss, "layer": layers[0] if layers else "not reproduced"}
    return {**found, "later_layers": layers[1:]} if layers[1:] else found


@contextmanager
def _watched(module: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Collect the layers that make of finite inputs an output that is not, innermost first."""
    found: list[dict[str, Any]] = []
    names = {part: name for name, part in module.named_modules()}

    def look(part: nn.Module, arguments: Any, named: Any, output: Any) -> None:
        if len(found) == _LAYERS:
            return
        kind = next(filter(None, map(_kind, tensors_in(output))), "")
        if kind and not any(map(_kind, tensors_in((arguments, named)))):
            weights = all(bool(own_shard(p.detach()).isfinite().all()) for p in part.parameters())
            made = {"name": names[part], "class": type(part).__name__, "output": kind, "weights_are_finite": weights}
            found.append(made)

    hooks = [part.register_forward_hook(look, with_kwargs=True) for part in module.modules()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _silent(module: LightningModule) -> Iterator[None]:
    """Let a module log nothing."""
    module.log = lambda *_, **__: None
    try:
        yield
    finally:
        del module.log


def _kind(tensor: Tensor) -> str:
    """``nan``, ``inf``, or nothing if all of a tensor is finite."""
    if not tensor.is_floating_point() or bool(tensor.isfinite().all()):
        return ""
    return "nan" if bool(tensor.isnan().any()) else "inf"


def _values(image: Tensor) -> dict[str, Any]:
    """Type, shape and range of an image, and the share of it that is NaN; the range is that of its numbers."""
    nan = image.isnan() if image.is_floating_point() else torch.zeros_like(image, dtype=torch.bool)
    numbers = image[~nan].cpu().double()
    span = {"min": float(numbers.min()), "max": float(numbers.max())} if len(numbers) else {"min": None, "max": None}
    dtype = str(image.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(image.shape), **span, "nan_share": float(nan.float().mean())}


def _plain(value: Any) -> Any:
    """The same with numbers that JSON does not know as text: ``nan``, ``inf``."""
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
