"""As little recomputation as fits: how many blocks are computed twice follows from the memory that there is."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from data_shards.errors import UserError
from trainer.callbacks.ema import EMA
from trainer.distributed import FSDP2
from trainer.models.recomputing import recompute_blocks
from trainer.modules.tuned import TunedModule
from trainer.plan.memory import GIB, Sharing, parts, usable
from trainer.plan.recompute import choose


class RecomputeToFit(Callback):
    """Computes as few transformer blocks a second time in the backward pass as a memory asks for.

    Recomputing every block costs about a third more time, none takes the most memory; between them is what fits. Before
    the training a pass of the recipe's size is run on tensors without content, as ``trainer plan`` does, with more and
    more blocks recomputed, from the input on: when the first blocks are computed again, what the later ones kept is
    gone already. Loss and gradients are the same however many they are. It takes the place of the model's own
    ``checkpoint_activations``, which is left false.

    Args:
        memory_gib: Memory of the card in GiB, of which a tenth stays free; null is that of the GPU at hand.
        prompts: Prompts an image that are reckoned with; null takes ``targets_per_image`` (SAM3: ``terms_per_image``)
            with the absent terms, which the recipe has to limit then.
    """

    def __init__(self, memory_gib: float | None = None, prompts: int | None = None) -> None:
        if memory_gib is not None and not 0 < memory_gib < math.inf:
            raise UserError(f"RecomputeToFit's memory_gib {memory_gib}: above 0, or null for the GPU's")
        if prompts is not None and prompts < 1:
            raise UserError(f"RecomputeToFit's prompts {prompts}: 1 or more, or null for the recipe's")
        self.memory_gib, self.prompts = memory_gib, prompts
        self.recomputed: int | None = None
        """Blocks that are computed twice; None before that is known."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose, while nothing is sharded.

        Raises:
            UserError: It does not fit with all blocks computed twice, or what it needs to know is not there.
        """
        if stage != "fit" or self.recomputed is not None:
            return
        assert isinstance(pl_module, TunedModule)
        room = usable(self._memory(pl_module))
        images = int(trainer.datamodule.micro_batch_size)
        frames = int(getattr(trainer.datamodule, "clip_length", 1))
        clip = {"frames": frames} if frames > 1 else {}
        rehearsed = partial(pl_module.rehearse, images, self._prompts(trainer, pl_module), **clip)
        averaged = any(isinstance(callback, EMA) for callback in trainer.callbacks)
        kept = sum(parts(pl_module, averaged, sharing_in(trainer), 0).values())
        chosen = choose(pl_module, rehearsed, str(trainer.precision), room - kept)
        self.recomputed, needed = chosen.count, kept + chosen.activations
        if not chosen.fits:
            raise UserError(
                f"RecomputeToFit: with all {chosen.count} blocks computed twice a step of {images} images takes "
                f"{needed / GIB:.3g} GiB of {room / GIB:.3g}: lower data.init_args.micro_batch_size; see trainer plan"
            )
        recompute_blocks(chosen.blocks[: chosen.count])
        if trainer.is_global_zero:
            print(f"RecomputeToFit: {chosen}: a step takes {needed / GIB:.3g} of {room / GIB:.3g} GiB", flush=True)

    def _memory(self, module: TunedModule) -> float:
        """The card's, in GiB."""
        if self.memory_gib is not None:
            return self.memory_gib
        if not torch.cuda.is_available():
            raise UserError("RecomputeToFit: there is no GPU whose memory could be asked for: set its memory_gib")
        return torch.cuda.get_device_properties(module.trainer.strategy.root_device).total_memory / GIB

    def _prompts(self, trainer: Trainer, module: TunedModule) -> int:
        """Prompts an image."""
        if self.prompts is not None:
            return self.prompts
        asked = getattr(trainer.datamodule, "targets_per_image", None) or getattr(module, "terms_per_image", None)
        if asked is None:
            raise UserError(
                "RecomputeToFit: the recipe asks for all targets of an image: set data.init_args.targets_per_image, or "
                "RecomputeToFit's prompts, to reckon with"
            )
        return int(asked) + int(getattr(trainer.datamodule, "negatives_per_image", 0) or 0)


def sharing_in(trainer: Trainer) -> Sharing:
    """How the ranks of a training share its model."""
    strategy: Any = trainer.strategy
    ranks = int(trainer.world_size)
    if isinstance(strategy, FSDP2):
        copies = trainer.num_nodes if strategy.replicas == "nodes" else int(strategy.replicas)
        return Sharing("fsdp2", ranks, ranks // copies, strategy.reshard_after_forward)
    view = bool(getattr(strategy, "_ddp_kwargs", {}).get("gradient_as_bucket_view"))
    return Sharing("ddp" if ranks > 1 else "alone", ranks, view=view)
