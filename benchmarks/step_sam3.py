"""What does a training step of SAM3 take, at full size with masks?

python benchmarks/sam3_step.py          # needs a GPU of 80 GB or more; --quick is a tiny model, on the CPU too

Random weights, noise images with discs, every term with two instances: forward pass, set-prediction loss with
instance masks, backward pass and AdamW in bf16 autocast, all activations recomputed. The second measurement keeps
the activations, where the memory is there for it.

The last line is one JSON object:
  benchmark          "sam3_step"
  quick              whether --quick was given
  device             what it ran on
  images, prompts    images a step, and terms asked for in each
  image_size         pixels
  parameters         of the model
  images_per_second  median over the steps, by "recomputed" and "kept"; null where memory ran out
  peak_gib           largest memory that torch had allocated at once, by the same; null on a CPU, or where it ran out
"""

from __future__ import annotations

import gc
import time
from typing import Any

import numpy as np
import torch
from measuring import arguments, finish

from data_shards.batch import TripletBatch
from data_shards.triplet import Provenance
from trainer.losses import SetPredictionLoss
from trainer.models import SAM3, SAM3Shape
from trainer.modules import SAM3Module

TINY = SAM3Shape(
    width=64, depth=4, heads=4, mlp=128, global_blocks=(1, 3), window=4, pretrained_size=56, text_width=32,
    text_depth=2, text_heads=2, text_mlp=64, hidden=32, hidden_heads=4, hidden_mlp=64, geometry_layers=1,
    encoder_layers=2, decoder_layers=3, queries=20,
)  # fmt: skip


def batch_of(images: int, prompts: int, side: int) -> TripletBatch:
    """Images with so many terms of two discs each."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:side, :side]
    radius = side // 16
    places = rng.integers(radius, side - radius, (images * prompts * 2, 2))
    masks = [((rows - y) ** 2 + (columns - x) ** 2 < radius**2).astype(np.uint8) for y, x in places]
    count = len(masks)
    origin = Provenance("noise", patient="", volume="", modality="none", source_sha256="")
    return TripletBatch(
        images=[torch.from_numpy(rng.integers(0, 255, (1, side, side), dtype=np.uint8)) for _ in range(images)],
        masks=[torch.from_numpy(mask) for mask in masks],
        image_index=torch.arange(images).repeat_interleave(prompts * 2),
        boxes=torch.tensor([[x - radius, y - radius, x + radius, y + radius] for y, x in places.tolist()]).float(),
        terms=[f"thing {row // 2 % prompts}" for row in range(count)],
        keys=[f"noise-{image}" for image in range(images)],
        positions=list(range(images)),
        target_index=[row % (prompts * 2) for row in range(count)],
        provenances=[origin] * images,
        kinds=["instance"] * count,
        synonyms=[()] * count,
    )


def measure(device: torch.device, recompute: bool, quick: bool, batch: TripletBatch, steps: int) -> dict[str, Any]:
    """Images a second and the peak of the memory; nothing where it ran out."""
    on_gpu = device.type == "cuda"
    try:
        with device:
            model = SAM3(
                TINY if quick else None, 112 if quick else 1008, weights=None, checkpoint_activations=recompute
            )
        loss = SetPredictionLoss(mask_weight=200.0, dice_weight=10.0, mask_chunk=32)
        module = SAM3Module(model, loss=loss).to(device).train()
        module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
        type(module).current_epoch = property(lambda _: 0)  # type: ignore[assignment, method-assign]
        optimizer = torch.optim.AdamW(module.tuning.parameter_groups(model, 1e-5, 0.05), fused=on_gpu)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(steps + 2):  # two to warm up
            started = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16):
                value = module.training_step(batch, 0)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        assert torch.isfinite(value), "the loss is no number"
        peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
        return {"rate": len(batch) / float(np.median(times[2:])), "peak": peak}
    except torch.cuda.OutOfMemoryError:
        return {"rate": None, "peak": None}
    finally:
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()


def main() -> None:
    values = arguments(__doc__, images=4, prompts=4, steps=5)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not values.quick and device.type == "cpu":
        raise SystemExit("sam3_step: full size needs a GPU; --quick runs a tiny model here")
    side = 112 if values.quick else 1008
    batch = batch_of(values.images, values.prompts, side).to(device)
    found = {}
    for way, recompute in (("recomputed", True), ("kept", False)):
        found[way] = measure(device, recompute, values.quick, batch, values.steps)
        print(way, found[way], flush=True)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in SAM3(TINY if values.quick else None, side, weights=None).parameters())
    finish(
        {
            "benchmark": "sam3_step",
            "quick": values.quick,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
            "images": values.images,
            "prompts": values.prompts,
            "image_size": side,
            "parameters": parameters,
            "images_per_second": {way: one["rate"] for way, one in found.items()},
            "peak_gib": {way: one["peak"] for way, one in found.items()},
        }
    )


if __name__ == "__main__":
    main()
