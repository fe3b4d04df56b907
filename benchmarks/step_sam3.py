"""How fast is a SAM3 training step with masks, and what memory does it take?

python benchmarks/step_sam3.py           # needs a GPU of 80 GB or more
python benchmarks/step_sam3.py --quick   # a tiny model, on a CPU too

SAM3 at 1008 px in bf16 autocast, with random weights, on noise images with discs, every term with two instances:
forward pass, set-prediction loss of all layers with instance masks, backward pass, AdamW. Ours encodes an image once
for all of its terms. The reference is the same module asked as transformers' Sam3Model is: one term an image, which is
encoded anew for each; it takes a micro-batch for each term and one optimiser step. That both answer the same is checked
first, where nothing drops out. (Meta's own training code is not the reference: its wheel lacks what its losses are put
together with.) Both compute activations a second time in the backward pass; `kept` and `compiled` are ours with
activations kept, and with the image encoder's blocks compiled besides, where memory has room for them; a tiny model on
a CPU is not compiled.

The last line is one JSON object:
  benchmark          "step_sam3"
  quick              whether --quick was given
  device             what it ran on
  images, prompts    images a step, and terms asked for in each
  image_size         pixels
  parameters         of the model
  difference         largest one of the logits and boxes of both ways, in fp32, with a tiny model
  matmul_tflops      what the device reaches in a matrix product in bf16
  images_per_second  medians by "recomputed" and "kept"; null where memory ran out or no time was left
  peak_gib           largest memory that torch had allocated at once, by the same; null on a CPU, or where it ran out
  rows               a list of {"way", "precision", "images", "masks" (terms of an image), "images_per_second",
                     "reference", "ratio", "lowest" and "highest" over the rounds, "peak_gib", "reference_peak_gib",
                     "tflops", "mfu"}; only "recomputed" has a reference
  left_out           what was not measured, and why: a list of lines
  headline           which row `ratio` is of
  ratio              images a second, ours over the reference's
  bar                {"needed", "met"}: never slower; on a GPU also {"mfu", "gib"}: {"value", "needed", "met"} each
"""

from __future__ import annotations

import json
import time
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from measuring import arguments, device, finish, matmul_rate, say
from racing import REFERENCE, Entrant, Row, Running, Track, headline_of, mfu_bar, named, race, told
from steps import OurStep, compiled, silent
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from data_shards.batch import TripletBatch
from data_shards.triplet import Provenance
from trainer.flops import step_flops
from trainer.losses import SetPredictionLoss
from trainer.models import SAM3, SAM3Shape
from trainer.models.sam3_shape import VOCABULARY
from trainer.modules import SAM3Module
from trainer.modules.concepts import objects_of
from trainer.prompts.concepts import concepts_of

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


NEEDED, MFU, GIB = 1.0, 0.5, 80.0


@cache
def letters() -> TemporaryDirectory[str]:
    """A tokenizer of single letters, as large as CLIP's, whose pieces then no package need hold."""
    single = sorted(ByteLevel.alphabet())
    pieces = [*single, *(f"{letter}</w>" for letter in single)]
    unused = [f"<{number}>" for number in range(VOCABULARY - len(pieces) - 2)]
    pieces += [*unused, "<|startoftext|>", "<|endoftext|>"]
    folder = TemporaryDirectory()
    place = Path(folder.name)
    (place / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}), "utf-8")
    (place / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    return folder


def module_of(place: torch.device, quick: bool, recompute: bool, **more: Any) -> SAM3Module:
    """A module with random weights."""
    torch.manual_seed(0)
    more |= {"weights": None, "tokenizer": letters().name, "checkpoint_activations": recompute}
    with place:
        model = SAM3(TINY if quick else None, side_of(quick), **more)
    loss = SetPredictionLoss(mask_weight=200.0, dice_weight=10.0, mask_chunk=32)
    return silent(SAM3Module(model, loss=loss, lr=1e-5, weight_decay=0.05).to(place).train())


def side_of(quick: bool) -> int:
    """Side of the input in pixels."""
    return 112 if quick else 1008


def by_term(batch: TripletBatch, prompts: int) -> list[TripletBatch]:
    """The batch as one for each term: all images, each with one of its terms."""
    images = len(batch)
    parts = []
    for prompt in range(prompts):
        rows = [row for row in range(len(batch.masks)) if row // 2 % prompts == prompt]
        parts.append(
            TripletBatch(
                images=batch.images,
                masks=[batch.masks[row] for row in rows],
                image_index=batch.image_index[rows],
                boxes=batch.boxes[rows],
                terms=[batch.terms[row] for row in rows],
                keys=batch.keys,
                positions=batch.positions,
                target_index=[batch.target_index[row] for row in rows],
                provenances=batch.provenances,
                kinds=["instance"] * len(rows),
                synonyms=[()] * len(rows),
            )
        )
        assert len(rows) == 2 * images
    return parts


@torch.no_grad()
def check(place: torch.device, prompts: int) -> float:
    """Largest difference between the answers of both ways, of a tiny model in fp32 that drops nothing out."""
    module = module_of(place, True, False, dropout=0.0, drop_path=0.0)

    def answers(batch: TripletBatch) -> Tensor:
        """(L, P, Q, 5) logits and boxes of P terms, those of an image together."""
        concepts = concepts_of(batch)
        truth = objects_of(batch, concepts, module.model.preprocessing, module.model.mask_side, place)
        found = module(batch, concepts, truth, 0)
        return torch.cat([found.logits[..., None], found.boxes], -1)

    whole = batch_of(2, prompts, side_of(True)).to(place)
    ours, parts = answers(whole), [answers(part) for part in by_term(whole, prompts)]
    apart = max(float((ours[:, term::prompts] - part).abs().max()) for term, part in enumerate(parts))
    if apart > 1e-2:
        raise SystemExit(f"step_sam3: answers differ by {apart:.2g}: not the same function")
    return apart


def entrant(way: str, place: torch.device, quick: bool, batches: list[TripletBatch], flops: int) -> Entrant:
    """One of the ways."""

    def make() -> Running:
        module = module_of(place, quick, way in (REFERENCE, "recomputed"))
        step = OurStep(compiled(module) if way == "compiled" else module, "bf16")
        return Running(partial(step, batches), module.model, step.optimizer)

    return Entrant(way, make, flops)


def main() -> None:
    values = arguments(__doc__, images=4, prompts=4, steps=0, rounds=0, seconds=0)
    place, quick, started = device(), values.quick, time.perf_counter()
    on_gpu = place.type == "cuda"
    if not quick and not on_gpu:
        raise SystemExit("step_sam3: full size needs a GPU; --quick runs a tiny model here")
    images, prompts = values.images, values.prompts
    rate = matmul_rate(place)
    apart = check(place, prompts)
    print(f"same function: answers within {apart:.1g}", flush=True)
    batch = batch_of(images, prompts, side_of(quick)).to(place)
    with torch.device("meta"):
        shape = SAM3(TINY if quick else None, side_of(quick), weights=None)
    one, two = (step_flops(SAM3Module(shape), 1, count).model for count in (1, 2))
    flops = images * (2 * one - two + prompts * (two - one))
    track = Track(place, "bf16", images, prompts, values.rounds or 3, values.steps or 2, rate)
    rows: list[Row] = []
    left_out: list[str] = []
    ways = (("recomputed",), ("kept",), *(() if quick and not on_gpu else (("compiled",),)))
    for group in ways:
        if values.seconds and rows and time.perf_counter() - started > values.seconds:
            left_out.append(f"{' and '.join(group)}: no time left")
            continue
        say(" and ".join(group))
        rivals = [entrant(REFERENCE, place, quick, by_term(batch, prompts), 0)] if group == ("recomputed",) else []
        found = race([*rivals, *(entrant(way, place, quick, [batch], flops) for way in group)], track, left_out)
        rows += found
        print(*map(told, found), sep="\n", flush=True)
    for line in left_out:
        print(f"left out: {line}")
    by_way = {row["way"]: row for row in rows}
    headline = headline_of(rows, "step_sam3")
    bar: dict[str, Any] = {"needed": NEEDED, "met": headline["ratio"] >= NEEDED}
    if on_gpu:
        least = min(row["peak_gib"] for row in rows)
        bar |= {"mfu": mfu_bar(rows, MFU), "gib": {"value": least, "needed": GIB, "met": least <= GIB}}
    finish(
        {
            "benchmark": "step_sam3",
            "quick": quick,
            "device": torch.cuda.get_device_name() if on_gpu else "CPU",
            "images": images,
            "prompts": prompts,
            "image_size": side_of(quick),
            "parameters": sum(parameter.numel() for parameter in shape.parameters()),
            "difference": apart,
            "matmul_tflops": rate,
            "images_per_second": {way: by_way.get(way, {}).get("images_per_second") for way in ("recomputed", "kept")},
            "peak_gib": {way: by_way.get(way, {}).get("peak_gib") for way in ("recomputed", "kept")},
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
