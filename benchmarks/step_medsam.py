"""How fast is a MedSAM training step against MedSAM's published loop, in the same batch and precision?

python benchmarks/step_medsam.py           # ViT-B at 1024 px: some ten minutes on two cores, three on a GPU
python benchmarks/step_medsam.py --quick   # ViT-B at 224 px, under a minute

Ours is MedSAMModule as recipes/medsam/full.yaml trains it, from native 8-bit images on: resizing, prompts, encoder,
decoder, losses, DSC, backward pass, AdamW. The reference is MedSAM's loop: PyPI's `segment-anything` ViT-B, prompt
encoder without gradients, MONAI's Dice and torch's cross-entropy, AdamW; its images are prepared beforehand. Where an
image has several masks, the loop draws each with its image, and learns from as many masks in a step. Both begin with
the same random weights and boxes, and it is checked first that their losses and gradients are the same.

On a CPU: one image with one mask, in fp32 and in bf16. On a GPU: bf16 with 1 to 16 images, with 1, 4 and 8 masks an
image, with compiled blocks (the callback CompileBlocks), and LoRA, which has no reference; what memory has no room for
is null. MFU is the FLOPs that a step needs over its time, against the rate of a large matrix product in this run.

The last line is one JSON object:
  benchmark            "step_medsam"
  quick                whether --quick was given
  device               what it ran on
  image_size           side of the model's input in pixels
  threads              that torch uses on the CPU
  loss_difference      of the two, relative, in fp32
  gradient_difference  the largest of any parameter, relative to the norm of all gradients
  matmul_tflops        by precision: what the device reaches in a matrix product
  rows                 a list of {"way": "full", "compiled" or "lora", "precision", "images", "masks" of an image,
                       "images_per_second", "reference" (the same of the loop), "ratio", "lowest" and "highest" over
                       the rounds, "peak_gib" and "reference_peak_gib" (null on a CPU), "tflops", "mfu"}
  left_out             what was not measured, and why: a list of lines
  headline             which row `ratio` is of: on a GPU that with most images with one mask each
  ratio                images a second, ours over the reference's
  bar                  {"needed", "met"}; on a GPU "mfu" too: {"value", "needed", "met"} of the best row
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from measuring import arguments, device, finish, matmul_rate, say
from racing import REFERENCE, Entrant, Row, Running, Track, headline_of, mfu_bar, named, race, told
from steps import DTYPES, OurStep, PublishedStep, check_same, compiled, differences, discs, draws_of, medsam

from data_shards.batch import TripletBatch
from trainer.flops import step_flops
from trainer.models.medsam import VARIANTS, ViT
from trainer.modules import MedSAMModule
from trainer.tuning import LoRATuning, Tuning


@dataclass(frozen=True)
class Case:
    """A size of a step, and how ours takes it."""

    precision: str
    images: int
    masks: int
    ways: tuple[str, ...] = ("full",)


ON_CPU = (Case("fp32", 1, 1), Case("bf16", 1, 1))
ON_GPU = (
    Case("bf16", 8, 1, ("full", "compiled")),
    Case("bf16", 4, 4),
    Case("bf16", 4, 8),
    Case("bf16", 8, 1, ("lora",)),
    Case("bf16", 16, 1, ("full", "compiled")),
    Case("bf16", 4, 1),
    Case("bf16", 1, 1),
)
BARS = {"cpu": 1.0, "cuda": 3.0}
MFU = 0.45


@dataclass(frozen=True)
class Model:
    """The model, and what a step of it costs."""

    side: int
    shape: ViT
    place: torch.device

    def module(self, way: str = "full") -> MedSAMModule:
        """A new one."""
        tuning: Tuning | None = LoRATuning(rank=16, alpha=32, train=["mask_decoder"]) if way == "lora" else None
        return medsam(self.side, self.place, self.shape, tuning)

    def flops(self, way: str, case: Case) -> int:
        """FLOPs of a step: they are linear in images and in masks."""
        module = self.module("lora" if way == "lora" else "full")
        one, two = (step_flops(module, 1, masks).model for masks in (1, 2))
        return case.images * (2 * one - two + case.masks * (two - one))

    def entrant(self, way: str, case: Case, batch: TripletBatch) -> Entrant:
        """One of ours."""

        def make() -> Running:
            module = self.module(way)
            step = OurStep(compiled(module) if way == "compiled" else module, case.precision)
            return Running(partial(step, [batch]), module.model, step.optimizer)

        return Entrant(way, make, self.flops(way, case))

    def reference(self, case: Case, batch: TripletBatch) -> Entrant:
        """MedSAM's loop."""

        def make() -> Running:
            module = self.module()
            step = PublishedStep(module, case.precision)
            return Running(partial(step, draws_of(module, batch)), step.model, step.optimizer)

        return Entrant(REFERENCE, make)

    def raced(self, case: Case, rounds: int, rate: float, left_out: list[str]) -> list[Row]:
        """A row for each way of ours."""
        batch = discs([case.masks] * case.images, self.side // 2).to(self.place)
        rivals = [] if case.ways == ("lora",) else [self.reference(case, batch)]
        repeats = 3 if self.place.type == "cuda" else 1
        track = Track(self.place, case.precision, case.images, case.masks, rounds, repeats, rate)
        return race([*rivals, *(self.entrant(way, case, batch) for way in case.ways)], track, left_out)

    def check(self) -> tuple[float, float]:
        """Make sure that both are the same function; how far they are apart."""
        module = self.module()
        batch = discs([1], self.side // 2).to(self.place)
        found = differences(OurStep(module), PublishedStep(module), batch)
        check_same(found, self.place)
        return found


def main() -> None:
    values = arguments(__doc__, side=0, depth=0, rounds=0, seconds=0)
    place, started = device(), time.perf_counter()
    on_gpu = place.type == "cuda"
    shape = VARIANTS["vit_b"]
    if values.depth:
        shape = replace(shape, width=96, heads=3, depth=values.depth, global_blocks=(values.depth - 1,))
    model = Model(values.side or (224 if values.quick else 1024), shape, place)
    cases = ON_GPU if on_gpu else ON_CPU
    rates = {precision: matmul_rate(place, DTYPES[precision]) for precision in {case.precision for case in cases}}
    apart = model.check()
    print(f"same function: loss within {apart[0]:.1g}, gradients within {apart[1]:.1g}", flush=True)
    rows: list[Row] = []
    left_out: list[str] = []
    for case in cases:
        if values.seconds and rows and time.perf_counter() - started > values.seconds:
            left_out.append(f"{' and '.join(case.ways)}, {case.images} × {case.masks}: no time left")
            continue
        say(f"{case.precision}, {case.images} images with {case.masks} masks")
        found = model.raced(case, values.rounds or (5 if on_gpu else 3), rates[case.precision], left_out)
        rows += found
        print(*map(told, found), sep="\n", flush=True)
    for line in left_out:
        print(f"left out: {line}")
    headline = headline_of(rows, "step_medsam")
    needed = BARS[place.type]
    bar: dict[str, Any] = {"needed": needed, "met": headline["ratio"] >= needed}
    if on_gpu:
        bar["mfu"] = mfu_bar(rows, MFU)
    finish(
        {
            "benchmark": "step_medsam",
            "quick": values.quick,
            "device": torch.cuda.get_device_name() if on_gpu else "CPU",
            "image_size": model.side,
            "threads": torch.get_num_threads(),
            "loss_difference": apart[0],
            "gradient_difference": apart[1],
            "matmul_tflops": rates,
            "rows": rows,
            "left_out": left_out,
            "headline": named(headline),
            "ratio": headline["ratio"],
            "bar": bar,
        },
        values.save,
    )


if __name__ == "__main__":
    main()
