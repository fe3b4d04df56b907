"""Predictions and targets of set prediction, drawn at random for the tests of its losses."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.losses import DenseMasks, FactoredMasks, ObjectSets, SetPrediction, SetPredictionLoss

GOLDEN = Path(__file__).parents[1] / "golden"
CHANNELS = 6
RANKS = 2
RANK_COUNTS = {"uneven": ((3, 0), (1,)), "fewer targets than ranks": ((0, 0, 0), (1,)), "none": ((0,), (0, 0))}
"""Targets of the prompts of each rank."""


def checker() -> ModuleType:
    """The script that compares us with recorded outputs."""
    spec = importlib.util.spec_from_file_location("golden_check", GOLDEN / "check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def boxes_at(*shape: int, generator: torch.Generator, device: str = "cpu") -> Tensor:
    """Boxes well inside of the image."""
    drawn = torch.rand(*shape, 4, generator=generator, device=device)
    return torch.cat([0.3 + 0.4 * drawn[..., :2], 0.05 + 0.3 * drawn[..., 2:]], -1)


def drawn_sets(
    counts: Sequence[int],
    queries: int = 12,
    layers: int = 3,
    side: int = 8,
    target_side: int = 16,
    factored: bool = True,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[SetPrediction, ObjectSets]:
    """What a model might say, near enough to the targets that many match one to many, and the targets."""
    generator = None if device != "cpu" else torch.Generator().manual_seed(seed)
    prompts, total = len(counts), sum(counts)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    targets = ObjectSets(
        counts,
        boxes_at(total, generator=generator, device=device),
        (noise(total, target_side, target_side) > 0.3).to(torch.uint8),
    )

    def half() -> SetPrediction:
        boxes = boxes_at(layers, prompts, queries, generator=generator, device=device)
        for prompt, start in enumerate(targets.starts):
            for query in range(min(2 * counts[prompt], queries)):
                target = targets.boxes[start + query % counts[prompt]]
                boxes[:, prompt, query] = target + 0.01 * noise(layers, 4)
        if factored:
            parts = noise(prompts, queries, CHANNELS), noise(prompts, CHANNELS, side, side), noise(prompts, queries)
            masks: Any = FactoredMasks(*parts)
        else:
            masks = DenseMasks(noise(prompts, queries, side, side))
        return SetPrediction(noise(layers, prompts, queries), boxes, masks=masks)

    first, many = half(), half()
    return replace(first, presence=noise(layers, prompts), semantic=noise(prompts, side, side), many=many), targets


def joined(parts: Sequence[tuple[SetPrediction, ObjectSets]]) -> tuple[SetPrediction, ObjectSets]:
    """What one process says and knows that has the prompts of all."""

    def half(some: Sequence[SetPrediction]) -> SetPrediction:
        masks = [vars(one.masks) for one in some]
        return SetPrediction(
            torch.cat([one.logits for one in some], 1),
            torch.cat([one.boxes for one in some], 1),
            torch.cat([one.presence for one in some], 1) if some[0].presence is not None else None,
            FactoredMasks(*(torch.cat([one[name] for one in masks]) for name in ("queries", "pixels", "offsets"))),
            torch.cat([one.semantic for one in some]) if some[0].semantic is not None else None,
        )

    predictions, targets = zip(*parts, strict=True)
    truth = ObjectSets(
        [count for one in targets for count in one.counts],
        torch.cat([one.boxes for one in targets]),
        torch.cat([one.masks for one in targets]),
    )
    return replace(half(predictions), many=half([one.many for one in predictions])), truth


def leaves_of(prediction: SetPrediction) -> dict[str, Tensor]:
    """All tensors of a prediction by name, with gradients from now on."""
    found: dict[str, Tensor] = {}
    for half, name in ((prediction, "first"), (prediction.many, "many")):
        if half is not None:
            parts = {**vars(half), **{f"masks.{key}": value for key, value in vars(half.masks or half).items()}}
            found |= {f"{name}.{key}": value for key, value in parts.items() if isinstance(value, Tensor)}
    return {name: tensor.requires_grad_() for name, tensor in found.items()}


def gradients_of(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor | None]:
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return dict(zip(leaves, grads, strict=True))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def rank_main(rank: int, port: int, case: str, out: str) -> None:
    """One of two ranks with different numbers of prompts and targets: to be started by `torch.multiprocessing`."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    prediction, targets = drawn_sets(RANK_COUNTS[case][rank], seed=rank)
    found = SetPredictionLoss(mask_weight=1, dice_weight=1)(prediction, targets)
    torch.save(found, Path(out) / f"rank{rank}.pt")
    dist.destroy_process_group()
