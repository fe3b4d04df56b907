"""Images per second, whether they are waited for, and how much of the device they use."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from data_shards.batch import TripletBatch
from data_shards.errors import UserError
from trainer.flops import step_flops
from trainer.hardware import GPU, this_gpu
from trainer.modules.scoring import ScoredModule


class Stopwatch:
    """Counts seconds of training, those of evaluations left out, and those of them in which the loader was waited for.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.restart()

    def restart(self) -> None:
        """Begin anew, at this optimiser step."""
        self.step, self._since, self._waited = self._trainer.global_step, time.perf_counter(), self._loader_waited()

    def pause(self) -> None:
        """Stop until `go_on`."""
        self._paused = time.perf_counter()

    def go_on(self) -> None:
        """Count again."""
        self._since += time.perf_counter() - self._paused

    def is_due(self) -> bool:
        """Whether the batch that ends has ended a step that is logged anyway: the device may be waited for."""
        step = self._trainer.global_step
        return step != self.step and step % max(1, self._trainer.log_every_n_steps) == 0

    def read(self) -> tuple[float, float]:
        """Seconds since it was started, and for how many of them batches were waited for."""
        seconds = max(1e-9, time.perf_counter() - self._since)
        return seconds, min(seconds, self._loader_waited() - self._waited)

    def _loader_waited(self) -> float:
        """Seconds for which batches were waited for so far; 0 where the loader does not say."""
        return float(getattr(self._trainer.train_dataloader, "waited", 0.0))


class Throughput(Callback):
    """Logs ``train/images_per_second`` over all ranks: from one optimiser step to the next, without evaluations.

    Besides, ``train/data_wait`` is the share of that time in which this rank waited for its loader, and ``train/mfu``
    the model's FLOPs over what this rank's device could have done in that time: forward and backward of what it was
    given, without what is computed again, and without the optimiser's step (Chowdhery et al. 2022, arXiv:2204.02311,
    appendix B). What a pass costs is counted once, before the first step, in some seconds. Where neither the device's
    peak is known nor given there is no MFU.

    Args:
        peak_tflops: The device's peak in the training's precision, in 10¹² FLOP/s; null takes its data sheet's.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and not 0 < peak_tflops < math.inf:
            raise UserError(f"Throughput's peak_tflops {peak_tflops}: above 0, or null for the data sheet's")
        self.peak_tflops = peak_tflops
        self._cost: PassCost | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Count what a pass costs, while nothing is sharded."""
        if stage != "fit" or self._cost is not None:
            return
        self._peak = self.peak_tflops or peak_of(this_gpu(), str(trainer.precision))
        if self._peak is None or not isinstance(pl_module, ScoredModule):
            return
        try:
            with torch.compiler.set_stance("force_eager"):
                self._cost = PassCost.of(pl_module, int(getattr(trainer.datamodule, "clip_length", 1)))
        except Exception as error:  # a training is not ended by a figure about it
            if trainer.is_global_zero:
                why = " ".join(str(error).split())[:200] or type(error).__name__
                print(f"no train/mfu: what a pass costs cannot be counted ({why})", file=sys.stderr, flush=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._watch, self._images, self._flops = Stopwatch(trainer), 0, 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock: time until `on_validation_end` does not count."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._watch.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock again."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._watch.go_on()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: TripletBatch, batch_idx: int
    ) -> None:
        """Count images; log at a step that is logged anyway, so that the device is not waited for more often."""
        self._images += len(batch) * trainer.world_size
        if self._cost is not None:
            self._flops += self._cost.of_batch(pl_module, batch)
        if not self._watch.is_due():
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds, waited = self._watch.read()
        logged = {"train/images_per_second": self._images / seconds, "train/data_wait": waited / seconds}
        if self._cost is not None and self._peak is not None:
            logged["train/mfu"] = self._flops / (seconds * self._peak * 1e12)
        pl_module.log_dict(logged, batch_size=1)
        self._watch.restart()
        self._images = self._flops = 0


@dataclass(frozen=True)
class PassCost:
    """Model FLOPs of a pass, forward and backward.

    Attributes:
        image: Of each image, or clip.
        prompt: Of each prompt.
    """

    image: int
    prompt: int

    @classmethod
    def of(cls, module: ScoredModule, frames: int) -> PassCost:
        """Count them by two rehearsals: a pass's FLOPs are linear in its images and in its prompts.

        Args:
            module: The module, before it is sharded.
            frames: Where it learns from clips, the frames of each.
        """
        one, two = (step_flops(module, 1, prompts, frames).model for prompts in (1, 2))
        return cls(image=2 * one - two, prompt=two - one)

    def of_batch(self, module: ScoredModule, batch: TripletBatch) -> int:
        """Model FLOPs of a pass over a batch."""
        prompts = module.asked(batch)
        return len(batch) // batch.frames * self.image + prompts * self.prompt if prompts else 0


def peak_of(gpu: GPU | None, precision: str) -> float | None:
    """Peak of a GPU in a training's precision, in 10¹² FLOP/s; None where there is none.

    In fp32 matrices are multiplied in TF32 where `torch.set_float32_matmul_precision` allows it and the GPU can (from
    Ampere on), which is half as fast as bf16.

    Args:
        gpu: The GPU.
        precision: As Lightning's trainer takes it.
    """
    if gpu is None:
        return None
    if "16" in precision:
        return gpu.bf16_tflops
    narrowed = torch.get_float32_matmul_precision() != "highest" and torch.cuda.get_device_capability() >= (8, 0)
    return gpu.bf16_tflops / 2 if narrowed else gpu.fp32_tflops
