"""What does matching cost a training step of set prediction, and how often does it wait for the device?

python benchmarks/matcher.py           # under a minute on two cores; on a GPU where there is one

Three ways to match all layers of both halves, the same matches each: `batched`, ours, all costs in one tensor and one
copy to the host; `per_layer`, each layer of each half on its own, with padded costs, as SAM3's code does; `per_image`,
each prompt of each layer on its own, as DETR's loops do. All use scipy's assignment, and end with the matched indices
on the device. A quarter of the prompts has no target, the others have as many as the table says.

The last line is one JSON object:
  benchmark     "matcher"
  quick         whether --quick was given
  device        "cpu" or the name of the GPU
  threads       that torch uses
  prompts, layers, queries  of a step; both halves have as many layers and queries
  targets       of a prompt that has some: the rows of the table
  counted       how syncs were counted: "cuda sync debug mode", or "calls" that would wait for a GPU: reading values,
                non-zero places, and uploads that are not told not to wait
  milliseconds  by targets: of each way, medians over rounds that run all in turn
  syncs         by targets: of each way, in one step
  ratios        by targets: `per_image` divided by `batched`
  ratio         their geometric mean
  loss_syncs    by targets: of a whole loss with masks, our matching, all terms and the backward pass
  bar           syncs of a step: the most in `loss_syncs`, what is allowed, and whether that is met
  matmul_tflops of this device, in one large product of matrices: bf16 on a GPU, fp32 on a CPU
  step_ms       the shortest that a training step of SAM3 could be here: its FLOP at 1008², of a fourth as many images
                as prompts, at that rate. A real step takes twice as long or more; `step_sam3.py` measures one
  share         by targets: `batched` divided by `step_ms`
  share_bar     {"targets", "share", "needed", "met"}: that of the most targets a prompt up to 20
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from measuring import arguments, device, finish, matmul_rate, medians, settle
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from trainer.losses import (
    FactoredMasks,
    HungarianMatcher,
    ObjectSets,
    OneToManyMatcher,
    SetPrediction,
    SetPredictionLoss,
)
from trainer.losses.boxes import overlap
from trainer.losses.matching import match, upload
from trainer.waits import waits_of

DEVICE = device()
MATCHER, MANY = HungarianMatcher(), OneToManyMatcher()
SIDE, CHANNELS = 36, 16  # of the masks; matching never sees them
PER_IMAGE = 4
"""Prompts of an image."""
TFLOP = 18.2
"""Of a training step of SAM3 at 1008² on an image with one prompt, counted by torch's `FlopCounterMode`; three prompts
more cost more, and the ViT's blocks computed anew a third more: steps are longer than what is reckoned from it."""
SHARE, MANY_TARGETS = 0.01, 20
"""What matching may take of a step, and with how many targets a prompt at most that is looked at."""
Rows = set[tuple[int, ...]]  # layer (the second half's after the first's), prompt, query, target


def drawn(prompts: int, layers: int, queries: int, targets: int) -> tuple[SetPrediction, ObjectSets]:
    """Predictions, some of them near the targets."""
    generator = torch.Generator().manual_seed(targets)
    counts = [0 if prompt % 4 == 3 else targets for prompt in range(prompts)]

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def boxes(*shape: int) -> Tensor:
        places = torch.rand(*shape, 4, generator=generator)
        return torch.cat([0.2 + 0.6 * places[..., :2], 0.05 + 0.2 * places[..., 2:]], -1)

    there = ObjectSets(counts, boxes(sum(counts)).to(DEVICE), (noise(sum(counts), SIDE, SIDE) > 0).to(DEVICE))

    def half() -> SetPrediction:
        said = boxes(layers, prompts, queries)
        for prompt, start in enumerate(there.starts):
            for query in range(min(2 * counts[prompt], queries)):
                said[:, prompt, query] = there.boxes[start + query % counts[prompt]].cpu() + 0.01 * noise(layers, 4)
        parts = noise(prompts, queries, CHANNELS), noise(prompts, CHANNELS, SIDE, SIDE), noise(prompts, queries)
        masks = FactoredMasks(*(part.to(DEVICE).requires_grad_() for part in parts))
        return SetPrediction(noise(layers, prompts, queries).to(DEVICE), said.to(DEVICE), masks=masks)

    first, many = half(), half()
    presence, semantic = noise(layers, prompts).to(DEVICE), noise(prompts, SIDE, SIDE).to(DEVICE)
    return replace(first, presence=presence, semantic=semantic, many=many), there


def batched(prediction: SetPrediction, targets: ObjectSets) -> list[Tensor]:
    """Our way: (4, K) indices of all layers."""
    found = match(prediction, targets, MATCHER, MANY)
    layers = [*found.first, *found.many]
    rows = [np.stack([np.full(len(p), n), p.prompts, p.queries, p.targets]) for n, p in enumerate(layers)]
    return [upload(np.concatenate(rows, 1), DEVICE)]


def of_each_layer(prediction: SetPrediction) -> list[tuple[Tensor, Tensor]]:
    """Logits (P, Q) and boxes (P, Q, 4) of each layer, the second half's after the first's."""
    assert prediction.many is not None
    halves = (prediction, prediction.many)
    return [layer for half in halves for layer in zip(half.logits, half.boxes, strict=True)]


def costs(logits: Tensor, boxes: Tensor, targets: Tensor) -> Tensor:
    """Costs (..., Q, T) of queries (..., Q) for targets (..., T, 4)."""
    found, boxes, targets = logits.sigmoid(), boxes.unsqueeze(-2), targets.unsqueeze(-3)
    positive = -MATCHER.alpha * (1 - found) ** 2 * torch.nn.functional.logsigmoid(logits)
    negative = -(1 - MATCHER.alpha) * found**2 * torch.nn.functional.logsigmoid(-logits)
    distance = MATCHER.box_cost * (boxes - targets).abs().sum(-1)
    focal = MATCHER.class_cost * (positive - negative)
    return distance + focal.unsqueeze(-1) - MATCHER.giou_cost * overlap(boxes, targets)[1]


def kept(logits: Tensor, boxes: Tensor, targets: Tensor) -> Tensor:
    """Which queries each target keeps, one to many: (..., Q, T) bool."""
    iou, _ = overlap(boxes.unsqueeze(-2), targets.unsqueeze(-3))
    scores = MANY.alpha * logits.sigmoid().unsqueeze(-1) + (1 - MANY.alpha) * iou
    border = torch.quantile(scores, 1 - MANY.topk / logits.shape[-1], dim=-2, keepdim=True)
    return (scores > border) & (scores > MANY.threshold)


def rows_of(layer: int, prompt: int, queries: np.ndarray, targets: np.ndarray) -> Tensor:
    """Indices (4, K) of one prompt."""
    same = np.ones_like(queries)
    return torch.as_tensor(np.stack([layer * same, prompt * same, queries, targets]), device=DEVICE)


def per_image(prediction: SetPrediction, targets: ObjectSets) -> list[Tensor]:
    """Each prompt of each layer on its own."""
    found = []
    layers = of_each_layer(prediction)
    for number, (logits, boxes) in enumerate(layers):
        for prompt, (start, count) in enumerate(zip(targets.starts, targets.counts, strict=True)):
            if not count:
                continue
            wanted = targets.boxes[start : start + count]
            if number == len(layers) - 1:
                queries, chosen = kept(logits[prompt], boxes[prompt], wanted).nonzero().unbind(1)
                same = torch.ones_like(queries)
                found.append(torch.stack([number * same, prompt * same, queries, chosen + start]))
            else:
                matrix = costs(logits[prompt], boxes[prompt], wanted).cpu().numpy()
                found.append(rows_of(number, prompt, *_shifted(linear_sum_assignment(matrix), start)))
    return found


def per_layer(prediction: SetPrediction, targets: ObjectSets, padded: Tensor) -> list[Tensor]:
    """Each layer on its own; `padded` (P, T, 4) are the targets' boxes, and their counts are on the device."""
    counts = torch.tensor(targets.counts).to(DEVICE, non_blocking=True)
    starts = torch.tensor(targets.starts).to(DEVICE, non_blocking=True)
    found = []
    layers = of_each_layer(prediction)
    for number, (logits, boxes) in enumerate(layers):
        if number == len(layers) - 1:
            real = torch.arange(padded.shape[1], device=DEVICE) < counts[:, None]
            prompt, query, target = (kept(logits, boxes, padded) & real[:, None]).nonzero().unbind(1)
            found.append(torch.stack([torch.full_like(prompt, number), prompt, query, target + starts[prompt]]))
            continue
        sizes = counts.cpu().numpy()
        matrices = costs(logits, boxes, padded).cpu().numpy()
        parts = [np.empty((4, 0), np.int64)]
        for prompt, (start, count) in enumerate(zip(targets.starts, sizes, strict=True)):
            queries, chosen = _shifted(linear_sum_assignment(matrices[prompt, :, :count]), start)
            parts.append(np.stack([np.full_like(queries, number), np.full_like(queries, prompt), queries, chosen]))
        found.append(torch.as_tensor(np.concatenate(parts, 1), device=DEVICE))
    return found


def _shifted(assignment: tuple[np.ndarray, np.ndarray], start: int) -> tuple[np.ndarray, np.ndarray]:
    return assignment[0], assignment[1] + start


def padded_boxes(targets: ObjectSets) -> Tensor:
    """Boxes (P, T, 4) with zeros behind the last of a prompt."""
    padded = torch.zeros(len(targets.counts), max(targets.counts), 4, device=DEVICE)
    for prompt, (start, count) in enumerate(zip(targets.starts, targets.counts, strict=True)):
        padded[prompt, :count] = targets.boxes[start : start + count]
    return padded


def step(run: Callable[[], Any]) -> int:
    """One step, to its end on the device."""
    run()
    settle(DEVICE)
    return 1


def loss_step(loss: SetPredictionLoss, prediction: SetPrediction, targets: ObjectSets) -> None:
    """Matching, all losses and the backward pass."""
    loss(prediction, targets)["loss"].backward()


def matched(found: list[Tensor]) -> Rows:
    return set(zip(*torch.cat(found, 1).tolist(), strict=True))


def main() -> None:
    values = arguments(__doc__, prompts=16, layers=6, queries=200, rounds=0)
    numbers = [1, 10] if values.quick else [1, 5, 20, 100]
    loss = SetPredictionLoss(mask_weight=200, dice_weight=10, mask_chunk=16)
    milliseconds: dict[str, dict[str, float]] = {}
    waits: dict[str, dict[str, int]] = {}
    loss_syncs: dict[str, int] = {}
    print("targets  way         ms a step   syncs")
    for number in numbers:
        prediction, targets = drawn(values.prompts, values.layers, values.queries, number)
        ways: dict[str, Callable[[], list[Tensor]]] = {
            "per_image": functools.partial(per_image, prediction, targets),
            "per_layer": functools.partial(per_layer, prediction, targets, padded_boxes(targets)),
            "batched": functools.partial(batched, prediction, targets),
        }
        expected = matched(batched(prediction, targets))
        assert all(matched(run()) == expected for run in ways.values()), "the ways differ"
        rates = medians(
            {name: functools.partial(step, run) for name, run in ways.items()},
            values.rounds or (3 if values.quick else 9),
        )
        key = str(number)
        milliseconds[key] = {name: 1000 / rate for name, rate in rates.items()}
        waits[key] = {name: len(waits_of(run, DEVICE)) for name, run in ways.items()}
        loss_syncs[key] = len(waits_of(functools.partial(loss_step, loss, prediction, targets), DEVICE))
        for name in ways:
            print(f"{number:7}  {name:10} {milliseconds[key][name]:10.2f} {waits[key][name]:7}", flush=True)
        print(f"{number:7}  whole loss            {loss_syncs[key]:7}", flush=True)
    most = max(loss_syncs.values())
    ratios = {key: found["per_image"] / found["batched"] for key, found in milliseconds.items()}
    rate = matmul_rate(DEVICE, torch.bfloat16 if DEVICE.type == "cuda" else torch.float32)
    shortest = values.prompts / PER_IMAGE * TFLOP / rate * 1000
    share = {key: found["batched"] / shortest for key, found in milliseconds.items()}
    looked = str(max(number for number in numbers if number <= MANY_TARGETS))
    print(f"{looked} targets a prompt: {share[looked]:.3%} of the shortest step of SAM3, {shortest:.0f} ms")
    finish(
        {
            "benchmark": "matcher",
            "quick": values.quick,
            "device": "cpu" if DEVICE.type == "cpu" else torch.cuda.get_device_name(),
            "threads": torch.get_num_threads(),
            "prompts": values.prompts,
            "layers": values.layers,
            "queries": values.queries,
            "targets": numbers,
            "counted": "calls" if DEVICE.type == "cpu" else "cuda sync debug mode",
            "milliseconds": milliseconds,
            "syncs": waits,
            "ratios": ratios,
            "ratio": statistics.geometric_mean(ratios.values()),
            "loss_syncs": loss_syncs,
            "bar": {"value": most, "needed": 1, "met": most <= 1},
            "matmul_tflops": rate,
            "step_ms": shortest,
            "share": share,
            "share_bar": {
                "targets": int(looked),
                "share": share[looked],
                "needed": SHARE,
                "met": share[looked] < SHARE,
            },
        },
        values.save,
    )


if __name__ == "__main__":
    main()
