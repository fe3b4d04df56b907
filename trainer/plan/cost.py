"""What a training will cost: steps, images a second, hours, energy and disk; arithmetic on numbers that are said."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.errors import UserError
from data_shards.stores.urls import as_url
from trainer.hardware import GPU, GPUS, gpu_named

MFU = 0.25
"""Share of the peak that is assumed where nothing was measured. No figure of ours: published are 23 % for a tuned
ViT-S and 33 to 39 % for Llama 3 8B, both on H100s."""
HOST = 1.8
"""Power of a whole server over that of its GPUs: at most 10.2 kW with 5.6 kW of GPUs in NVIDIA's DGX H100."""
PUE = 1.5
"""Power of a data centre over that of its servers."""


@dataclass(frozen=True)
class Machine:
    """What a training runs on.

    Attributes:
        devices: GPUs in all.
        memory: Memory of each, GiB; None is not known.
        gpu: What they are; None is not known.
        assumed: Whether `gpu` was guessed from its memory.
        hours: Time limit of a job; None without one.
        stop: Hours before the limit at which a job is told to stop.
        requeue: Whether it is queued again then.
        said: Where all this is from.
    """

    devices: int
    memory: float | None = None
    gpu: GPU | None = None
    assumed: bool = False
    hours: float | None = None
    stop: float = 0.0
    requeue: bool = False
    said: str = "the recipe"


def machine_of(devices: int, memory: float | None, gpu: str | None, said: str) -> Machine:
    """A machine as options describe it; a GPU that is not named is the slowest known one of its memory."""
    found, assumed = gpu_named(gpu) if gpu else None, False
    if found is None and memory is not None:
        same = [known for known in GPUS.values() if known.memory_gb == memory]
        found = min(same, key=lambda known: known.bf16_tflops, default=None)
        assumed = found is not None
    if memory is None and found is not None:
        memory = found.memory_gb
    return Machine(devices, memory, found, assumed, said=said)


def length(
    trainer: Mapping[str, Any], batch: int, images: int | None, epoch: int | None, passes: int
) -> dict[str, Any]:
    """Optimiser steps of the run.

    Args:
        trainer: Arguments of the trainer.
        batch: Images (or clips) a step.
        images: Images (or clips) of an epoch, where they were given.
        epoch: Steps of an epoch, where the shards say.
        passes: Passes of a rank in a step.

    Returns:
        ``steps``, None where they cannot be known, and ``steps_from``, in words.
    """
    where = "the shards" if epoch is not None else "--images"
    if epoch is None and images is not None:
        epoch = images // batch
    limit = trainer.get("limit_train_batches")
    if epoch is not None and limit is not None:
        batches = epoch * passes
        epoch = (min(batches, limit) if isinstance(limit, int) else int(batches * limit)) // passes
    ends: dict[int, str] = {}
    most, epochs = trainer.get("max_steps") or -1, trainer.get("max_epochs")
    if most > 0:
        ends[most] = "trainer.max_steps"
    if epochs is None and most <= 0 and trainer.get("max_time") is None:
        epochs = 1000  # Lightning's default
    if epochs is not None and epochs > 0 and epoch is not None:
        ends[epochs * epoch] = f"{epochs:,} epochs of {epoch:,} steps, by {where}"
    if not ends:
        return {"steps": None, "steps_from": "not known without the shards: --images N says how many an epoch has"}
    return {"steps": min(ends), "steps_from": ends[min(ends)]}


def steps_per_epoch(datamodule: Any) -> int | None:
    """Optimiser steps of an epoch by the index of the training split; None where it is not on this machine.

    Raises:
        UserError: It is there and damaged, or has nothing to train on.
    """
    folder = datamodule.folders["train"]
    if folder is None or as_url(folder) is not None or not Path(folder).is_dir():
        return None
    datamodule.shards["train"] = datamodule._open("train", folder)
    return int(datamodule.steps_per_epoch)


def speed(
    rate: float | None, like: tuple[float, str] | None, mfu: float | None, machine: Machine, flops: float | None
) -> dict[str, Any]:
    """Images a second over all GPUs, and where that is from.

    Args:
        rate: What the user measured.
        like: What a run measured, for this number of GPUs, and of which run.
        mfu: Share of the GPUs' peak, as the user says.
        machine: The machine.
        flops: FLOPs of an image's forward and backward pass that MFU divides; None is not known.

    Returns:
        ``images_per_second``, None where it cannot be known, ``rate_from`` in words, and ``mfu`` where it was taken.
    """
    if rate is not None:
        return {"images_per_second": rate, "rate_from": "given by --rate", "mfu": None}
    if like is not None:
        return {"images_per_second": like[0], "rate_from": like[1], "mfu": None}
    if machine.gpu is None or flops is None:
        lacks = "a GPU: give --gpu NAME" if machine.gpu is None else "the FLOPs: leave out --no-memory"
        return {"images_per_second": None, "rate_from": f"not known without {lacks}, or --rate IMAGES/S", "mfu": None}
    share = MFU if mfu is None else mfu
    peak = machine.gpu.bf16_tflops * 1e12
    how = f"{'assumed' if mfu is None else 'given by --mfu'}, not measured"
    said = (
        f"estimated: {share:.0%} ({how}) of {machine.devices} × {machine.gpu.bf16_tflops:g} TFLOP/s, "
        f"{flops / 1e12:.3g} TFLOP an image"
    )
    return {"images_per_second": share * peak * machine.devices / flops, "rate_from": said, "mfu": share}


def bill(machine: Machine, steps: int | None, images: int, rate: float | None) -> dict[str, Any]:
    """Hours, GPU-hours, energy and how often the time limit ends a job; None for what is not known.

    Args:
        machine: The machine.
        steps: Optimiser steps.
        images: Images of a step, the frames of clips counted.
        rate: Images a second over all GPUs.
    """
    names = ("hours", "gpu_hours", "kwh", "kwh_from", "jobs")
    if steps is None or rate is None:
        return dict.fromkeys(names)
    hours = steps * images / rate / 3600
    found: dict[str, Any] = {**dict.fromkeys(names), "hours": hours, "gpu_hours": hours * machine.devices}
    if machine.gpu is not None:
        found["kwh"] = hours * machine.devices * machine.gpu.watts / 1000 * HOST * PUE
        found["kwh_from"] = (
            f"at most: {machine.devices} × {machine.gpu.watts:g} W (the board's limit) × {HOST:g} for the rest of the "
            f"servers × {PUE:g} (PUE) × {told_hours(hours)}"
        )
    if machine.hours is not None:
        found["jobs"] = max(1, math.ceil(hours / (machine.hours - machine.stop)))
    return found


def told_hours(hours: float) -> str:
    """Hours as a person says them."""
    if hours < 1:
        return f"{60 * hours:.1f} min"
    return f"{hours:.1f} h" if hours < 100 else f"{hours:,.0f} h"


def positive(name: str, value: float | None, most: float = math.inf) -> None:
    """Refuse an option that is not above 0.

    Raises:
        UserError: It is not, or is above `most`.
    """
    if value is not None and not 0 < value <= most:
        raise UserError(f"{name} {value:g}: above 0{f', and at most {most:g}' if most < math.inf else ''}")
