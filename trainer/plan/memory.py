"""What one GPU of a training holds at its peak, by part, alone or with others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from data_shards.errors import UserError
from trainer.modules.tuned import TunedModule

RESERVE = 0.1
"""Share of a GPU that is left free: the CUDA context and libraries' workspaces (about 1 GiB) and what the allocator
wastes."""
GIB = 2**30
MOST_IMAGES = 256
"""The largest pass that is looked for."""


@dataclass(frozen=True)
class Sharing:
    """How the ranks of a training share its model.

    Attributes:
        kind: ``alone``, ``ddp`` (each has all of it) or ``fsdp2`` (each has a part).
        ranks: How many there are.
        shards: Over how many of them the model is cut.
        reshard: Whether gathered blocks are freed after their forward pass.
        view: Whether DDP's gradients lie in its buckets, without a copy.
    """

    kind: Literal["alone", "ddp", "fsdp2"]
    ranks: int = 1
    shards: int = 1
    reshard: bool = True
    view: bool = False


def sharing_of(trainer: Mapping[str, Any], ranks: int) -> Sharing:
    """How a recipe shares its model.

    Args:
        trainer: Arguments of the trainer.
        ranks: GPUs in all.

    Raises:
        UserError: Copies do not divide the ranks, or nothing is known of the strategy's memory.
    """
    strategy = trainer.get("strategy") or "auto"
    name = str(strategy.get("class_path") if isinstance(strategy, Mapping) else strategy)
    arguments = (strategy.get("init_args") or {}) if isinstance(strategy, Mapping) else {}
    if isinstance(strategy, Mapping) and name.endswith(".FSDP2"):
        replicas = arguments.get("replicas", 1)
        copies = (trainer.get("num_nodes") or 1) if replicas == "nodes" else int(replicas)
        if ranks % copies:
            raise UserError(f"trainer.strategy: replicas {copies} do not divide {ranks} GPUs")
        return Sharing("fsdp2", ranks, ranks // copies, arguments.get("reshard_after_forward", True))
    known = ("auto", "DDPStrategy", "SingleDeviceStrategy")
    if name.rpartition(".")[2] not in known and not name.startswith("ddp"):
        raise UserError(
            f"trainer.strategy {name}: what it takes is not known here: take auto, ddp or trainer.distributed.FSDP2, "
            "or --no-memory"
        )
    return Sharing("ddp" if ranks > 1 else "alone", ranks, view=bool(arguments.get("gradient_as_bucket_view")))


def parts(module: TunedModule, averaged: bool, sharing: Sharing, activations: int) -> dict[str, int]:
    """Bytes of each part at the peak, on one GPU.

    Args:
        module: The module, on any device.
        averaged: Whether the recipe keeps an average of the weights (EMA).
        sharing: How ranks share it.
        activations: What a pass takes besides, by `pass_bytes`.

    Returns:
        ``weights``, ``gradients``, ``adamw``, ``average``, ``communication`` (DDP's buckets; FSDP2's gathered blocks)
        and ``activations``.
    """
    learning = size(p for p in module.parameters() if p.requires_grad)
    own = -(-size(module.parameters()) // sharing.shards) + size(module.buffers())
    share = -(-learning // sharing.shards)
    shared = {"alone": 0, "ddp": 0 if sharing.view else learning}.get(sharing.kind)
    return {
        "weights": own,
        "gradients": share,
        "adamw": 2 * share,
        "average": share if averaged else 0,
        "communication": _gathered(module, sharing) if shared is None else shared,
        "activations": activations,
    }


def _gathered(module: TunedModule, sharing: Sharing) -> int:
    """The most that FSDP2 holds besides a rank's shards: what is outside of blocks for a whole pass, and of blocks two.

    While a block computes, the next is gathered into a buffer, and from there into its weights; in the backward pass
    gradients are summed up from a buffer, too.
    """
    blocks = [block for kind in module.model.block_kinds().values() for block in kind]
    sizes = sorted((size(block.parameters()) for block in blocks), reverse=True)
    learning = [size(p for p in block.parameters() if p.requires_grad) for block in blocks]
    root = size(module.parameters()) - sum(sizes)
    root_learning = size(p for p in module.parameters() if p.requires_grad) - sum(learning)
    held = sum(sizes[:2]) if sharing.reshard else sum(sizes)
    return root + root_learning + held + sum(sizes[:1]) + 2 * max(learning, default=0)


def size(tensors: Iterable[Any]) -> int:
    """Bytes of some tensors; parameters that are shared inside of a module come once from it."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def usable(memory_gib: float) -> int:
    """Bytes of a GPU that a training may take."""
    return int((1 - RESERVE) * memory_gib * GIB)


def most_images(room: int, measured: Callable[[int], int], own: int) -> int:
    """The most images of a pass that fit.

    What a pass takes is convex in its images (`activations.memory_at`), so that a line through two measured passes says
    too much between them and too little beyond: guesses close in from both sides, each is measured, and the answer is
    one that was measured, at most 5 % below the true one.

    Args:
        room: Bytes that there are for activations.
        measured: Bytes by images a pass.
        own: Images of the recipe, where to begin.

    Returns:
        How many; 0 if not a single one fits.
    """
    fits, known = 0, {0: 0}
    too_many, guess = MOST_IMAGES + 1, max(1, own)
    while too_many - fits > max(1, 0.05 * fits):
        known[guess] = measured(guess)
        if known[guess] <= room:
            fits = guess
        else:
            too_many = guess
        low, high = sorted(known, key=lambda images: abs(known[images] - room))[:2]
        slope = (known[high] - known[low]) / (high - low)
        wanted = min(MOST_IMAGES, int(low + (room - known[low]) / slope)) if slope > 0 else MOST_IMAGES
        guess = max(wanted, fits + 1)  # a line that ends at what fits asks for the next one, not for many more
        guess = guess if guess < too_many else (fits + too_many) // 2
    return fits
