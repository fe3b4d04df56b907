"""What does a training step save when an image is encoded once for several of its targets?

python benchmarks/packed.py            # some five minutes on two cores; figures mean something on an idle machine

A step of as many image-target pairs is taken in two ways, both with images one after another, which is fastest on a
CPU: `single`, one target of each image, as MedSAM was trained; `packed`, several targets of each. Forward pass, loss,
backward pass and AdamW in bf16, with random weights; the targets are discs on noise. What packing costs or gains in
DSC is another question: LOG.md has a comparison on real images.

The last line is one JSON object:
  benchmark         "packed"
  quick             whether --quick was given
  threads           that torch uses
  pairs             image-target pairs in a step
  targets           of an image, where they are packed
  pairs_per_second  {"litemedsam_128", "litemedsam_256", "medsam_1024"}: of each {"single", "packed"}, medians over
                    rounds that run all in turn; MedSAM is left out by --quick
  ratio             by model: `packed` divided by `single`
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from measuring import arguments, finish, medians

from data_shards.batch import TripletBatch
from data_shards.triplet import Provenance
from trainer.models import LiteMedSAM, MedSAM, SegmentationModel
from trainer.modules import MedSAMModule

MODELS: dict[str, Callable[[], SegmentationModel]] = {
    "litemedsam_128": lambda: LiteMedSAM(128, weights=None),
    "litemedsam_256": lambda: LiteMedSAM(256, weights=None),
    "medsam_1024": lambda: MedSAM(weights=None, checkpoint_activations=True),
}


def image_of(targets: int, seed: int, side: int = 256) -> TripletBatch:
    """One image with so many discs."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side]
    places = rng.integers(40, side - 40, (targets, 2))
    masks = [torch.from_numpy(((rows - y) ** 2 + (columns - x) ** 2 < 900).astype(np.uint8)) for y, x in places]
    return TripletBatch(
        images=[torch.from_numpy(rng.integers(0, 255, (1, side, side)).astype(np.uint8))],
        masks=masks,
        image_index=torch.zeros(targets, dtype=torch.int64),
        boxes=torch.tensor([[x - 29.0, y - 29.0, x + 29.0, y + 29.0] for y, x in places.tolist()]),
        terms=["disc"] * targets,
        keys=[f"noise-{seed}"],
        positions=[seed],
        target_index=list(range(targets)),
        provenances=[Provenance("noise", patient="", volume="", modality="none", source_sha256="")],
    )


def step(module: MedSAMModule, optimizer: torch.optim.Optimizer, batches: list[TripletBatch]) -> int:
    """One optimiser step over micro-batches; returns the pairs it saw."""
    optimizer.zero_grad()
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            loss = module.training_step(batch, 0)
        (loss / len(batches)).backward()
    optimizer.step()
    return sum(len(batch.masks) for batch in batches)


def prepared(name: str) -> tuple[MedSAMModule, torch.optim.Optimizer]:
    """A module that trains outside of a Trainer, and its optimiser."""
    module = MedSAMModule(MODELS[name]())
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    type(module).current_epoch = property(lambda _: 0)  # type: ignore[assignment, method-assign]
    groups = module.tuning.parameter_groups(module.model, 1e-4, 0.01)
    return module, torch.optim.AdamW(groups)


def main() -> None:
    values = arguments(__doc__, pairs=4, rounds=0, models=len(MODELS))
    single = [image_of(1, seed) for seed in range(values.pairs)]
    packed = [image_of(values.pairs, 0)]
    names = [name for name in MODELS if name != "medsam_1024" or not values.quick][: values.models]
    rates: dict[str, dict[str, float]] = {}
    for name in names:
        module, optimizer = prepared(name)
        ways = {"single": single, "packed": packed}
        runs = {way: functools.partial(step, module, optimizer, batches) for way, batches in ways.items()}
        rates[name] = medians(runs, values.rounds or (2 if values.quick or name == "medsam_1024" else 9))
        print(name, {way: f"{rate:.2f} pairs/s" for way, rate in rates[name].items()}, flush=True)
        del module, optimizer
    finish(
        {
            "benchmark": "packed",
            "quick": values.quick,
            "threads": torch.get_num_threads(),
            "pairs": values.pairs,
            "targets": values.pairs,
            "pairs_per_second": rates,
            "ratio": {name: found["packed"] / found["single"] for name, found in rates.items()},
        }
    )


if __name__ == "__main__":
    main()
