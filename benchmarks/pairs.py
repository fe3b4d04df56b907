"""How many image–mask pairs a second are learnt when an image is encoded once for all of its masks?

python benchmarks/pairs.py           # ViT-B at 1024 px: some thirty-five minutes on two cores, one on a GPU
python benchmarks/pairs.py --quick   # ViT-B at 128 px, under a minute

The corpora that MedSAM learns from have 3.4 masks an image. A step learns from 17 masks on 5 images, and takes one
optimiser step: ours encodes each image once and decodes all its masks; the reference, MedSAM's published loop over
PyPI's `segment-anything`, draws each mask with its image, and encodes 17. Both begin with the same random weights and
boxes; that their losses and gradients are the same is checked first. On a CPU images come one after another in fp32,
which is fastest there; on a GPU in bf16, all five at once against batches of five (`repeats` times as many of all).

Besides, ours alone: LiteMedSAM in bf16, as many pairs a step, each on an image of its own or packed four to an image.

The last line is one JSON object:
  benchmark            "pairs"
  quick                whether --quick was given
  device               what it ran on
  image_size           side of the model's input in pixels
  precision            that both compute in
  threads              that torch uses on the CPU
  images, masks        of a step
  loss_difference      of the two, relative, in fp32
  gradient_difference  the largest of any parameter, relative to the norm of all gradients
  pairs_per_second     {"ours", "reference"}: medians over rounds that run both in turn
  lowest, highest      ratio of a round
  packing              LiteMedSAM: {"image_size", "single", "packed" (pairs a second), "ratio"}
  ratio                pairs a second, ours over the reference's
  bar                  {"needed", "met"}
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from measuring import arguments, device, finish, medians, pairwise, settle
from steps import Draw, OurStep, PublishedStep, check_same, differences, discs, draws_of, medsam, silent

from data_shards.batch import TripletBatch
from trainer.models import LiteMedSAM
from trainer.models.medsam import VARIANTS, ViT
from trainer.modules import MedSAMModule

MASKS = (4, 3, 3, 4, 3)
"""Masks of each image: 3.4 on average."""
BARS = {"cpu": 2.8, "cuda": 8.0}


def our_batches(side: int, place: torch.device) -> list[TripletBatch]:
    """The images: one by one on a CPU, all at once on a GPU."""
    if place.type == "cuda":
        return [discs(MASKS, side // 2).to(place)]
    return [discs([count], side // 2, seed) for seed, count in enumerate(MASKS)]


def their_draws(module: MedSAMModule, batches: Sequence[TripletBatch], together: int) -> list[Draw]:
    """The same pairs, each with its image anew, so many at a time."""
    pairs = []
    for batch in batches:
        singles = [_alone(batch, row) for row in range(len(batch.masks))]
        pairs += [draw for single in singles for draw in draws_of(module, single)]
    parts = [pairs[start : start + together] for start in range(0, len(pairs), together)]
    return [Draw(*(torch.cat([getattr(d, name) for d in part]) for name in vars(part[0]))) for part in parts]


def _alone(batch: TripletBatch, row: int) -> TripletBatch:
    """One target of a batch with its image."""
    image = int(batch.image_index[row])
    return replace(
        batch,
        images=[batch.images[image]],
        masks=[batch.masks[row]],
        image_index=torch.zeros(1, dtype=torch.int64),
        boxes=batch.boxes[row][None],
        terms=[batch.terms[row]],
        keys=[batch.keys[image]],
        positions=[batch.positions[image]],
        target_index=[batch.target_index[row]],
        provenances=[batch.provenances[image]],
    )


def timed(step: Callable[[Any], int], taken: Any, repeats: int, place: torch.device) -> int:
    """Some steps over the 17 pairs; returns how many pairs they were."""
    for _ in range(repeats):
        step(taken)
    settle(place)
    return repeats * sum(MASKS)


def packing(side: int, rounds: int, place: torch.device) -> dict[str, Any]:
    """What LiteMedSAM gains when four pairs lie on one image instead of four."""
    torch.manual_seed(0)
    module = silent(MedSAMModule(LiteMedSAM(side, weights=None)).to(place).train())
    step = OurStep(module, "bf16")
    ways = {"single": [discs([1], side, seed).to(place) for seed in range(4)], "packed": [discs([4], side).to(place)]}

    def run(batches: Sequence[TripletBatch]) -> int:
        step(batches)
        settle(place)
        return 4

    rates = medians({way: partial(run, batches) for way, batches in ways.items()}, rounds)
    return {"image_size": side, **rates, "ratio": rates["packed"] / rates["single"]}


def main() -> None:
    values = arguments(__doc__, side=0, depth=0, rounds=0)
    place = device()
    on_gpu = place.type == "cuda"
    shape: ViT = VARIANTS["vit_b"]
    if values.depth:
        shape = replace(shape, width=96, heads=3, depth=values.depth, global_blocks=(values.depth - 1,))
    side = values.side or (128 if values.quick and not on_gpu else 1024)
    precision = "bf16" if on_gpu else "fp32"
    module = medsam(side, place, shape)
    ours, published = OurStep(module, precision), PublishedStep(module, precision)
    apart = differences(ours, published, discs([2], side // 2).to(place))
    check_same(apart, place)
    print(f"same function: loss within {apart[0]:.1g}, gradients within {apart[1]:.1g}", flush=True)
    batches = our_batches(side, place)
    draws = their_draws(module, batches, 5 if on_gpu else 1)
    for step, taken in ((ours, batches), (published, draws)):  # warms up: the rounds are long
        step(taken[:1])
    repeats = 3 if on_gpu else 1
    found = pairwise(
        partial(timed, ours, batches, repeats, place),
        partial(timed, published, draws, repeats, place),
        values.rounds or (5 if on_gpu else 2),
        warm_up=int(on_gpu),
    )
    print(
        f"ViT-B at {side} px, {precision}: ours {found.ours:.3g} pairs/s, the published loop {found.reference:.3g}, "
        f"ratio {found.ratio:.2f} ({found.lowest:.2f} to {found.highest:.2f})",
        flush=True,
    )
    del ours, published, module
    packed = packing(128 if values.quick else 256, values.rounds or (1 if values.quick else 9), place)
    print(f"LiteMedSAM at {packed['image_size']} px: packed {packed['ratio']:.2f} times the pairs/s of single ones")
    needed = BARS[place.type]
    finish(
        {
            "benchmark": "pairs",
            "quick": values.quick,
            "device": torch.cuda.get_device_name() if on_gpu else "CPU",
            "image_size": side,
            "precision": precision,
            "threads": torch.get_num_threads(),
            "images": len(MASKS),
            "masks": sum(MASKS),
            "loss_difference": apart[0],
            "gradient_difference": apart[1],
            "pairs_per_second": {"ours": found.ours, "reference": found.reference},
            "lowest": found.lowest,
            "highest": found.highest,
            "packing": packed,
            "ratio": found.ratio,
            "bar": {"needed": needed, "met": found.ratio >= needed},
        },
        values.save,
    )


if __name__ == "__main__":
    main()
