"""Compilation of the blocks, one by one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from data_shards.errors import UserError, nearest
from trainer.distributed import FSDP2
from trainer.models.recomputing import wrap_forward
from trainer.modules.tuned import TunedModule


class CompileBlocks(Callback):
    """Compiles each transformer block with `torch.compile`: less memory traffic, and the first steps take minutes.

    Equal blocks share one compilation, and each is one graph, without breaks. Whole models are not compiled: what is
    asked differs from step to step, and each change would be a new one. Compiled or not, the names of the weights are
    the same, and so are checkpoints.

    ``mode: reduce-overhead`` captures each block in a CUDA graph, which is launched whole: that pays where kernels are
    so small that launching them takes longer (few images, small inputs). It is safe where shapes stay few, since each
    is captured anew, and where no gradient outlives a step: steps of several batches are refused. Memory of a graph is
    not given back. It has not been run on a GPU yet; on a CPU nothing is captured.

    Args:
        kinds: Kinds of blocks, such as ``image_encoder`` (SAM3: ``vision_encoder``, ``text_encoder``,
            ``detr_encoder``); null is the image encoder's, whose inputs have the same size in every step. Others are
            compiled for each number of texts or prompts, which are padded to few then (the module's
            ``prompt_buckets``).
        backend: ``inductor`` needs a C++ compiler, on a GPU Triton too; ``aot_eager`` tries the way without them.
        mode: What `torch.compile` calls so, for ``inductor``.
        decoder: Compile the mask decoder too, for each number of prompts and of points in a prompt; prompts are padded
            to few numbers then (the module's ``prompt_buckets``).
    """

    def __init__(
        self,
        kinds: Sequence[str] | None = None,
        backend: Literal["inductor", "aot_eager", "eager"] = "inductor",
        mode: Literal["default", "reduce-overhead", "max-autotune-no-cudagraphs"] = "default",
        decoder: bool = False,
    ) -> None:
        self.kinds, self.backend, self.mode, self.decoder = kinds, backend, mode, decoder
        self._compiled = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compile before anything is sharded, so that each block is gathered outside of what is compiled.

        Raises:
            UserError: The model has no such blocks, or no such decoder, or gradients outlive what is captured.
        """
        assert isinstance(pl_module, TunedModule)
        there = pl_module.model.block_kinds()
        for kind in self.kinds or ():
            if kind not in there:
                raise UserError(f"CompileBlocks: no blocks of kind {kind}{nearest(kind, there)}")
        if self.mode == "reduce-overhead" and trainer.accumulate_grad_batches > 1:
            raise UserError(
                f"CompileBlocks: mode reduce-overhead with trainer.accumulate_grad_batches "
                f"{trainer.accumulate_grad_batches}: the next batch would overwrite gradients: set it to 1, or mode to "
                "default"
            )
        decoder = _decoder_of(trainer, pl_module) if self.decoder else None
        if self._compiled:
            return
        mode: dict[str, Any] = {"mode": self.mode} if self.backend == "inductor" else {}
        # blocks of one kind share their code, and some differ in size, window or dropout
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        kinds = [pl_module.model.encoder] if self.kinds is None else self.kinds
        compiled = [block for kind in kinds for block in there[kind]]
        for part in [*compiled, *([] if decoder is None else [decoder])]:
            # not `block.compile()`, which takes in the hooks that gather its weights
            wrap_forward(part, partial(torch.compile, backend=self.backend, dynamic=False, **mode))
        by_prompt = decoder is not None or any(kind != pl_module.model.encoder for kind in kinds)
        if by_prompt and hasattr(pl_module, "prompt_buckets"):
            pl_module.prompt_buckets = True
        self._compiled = True


def _decoder_of(trainer: Trainer, module: TunedModule) -> nn.Module:
    """The mask decoder of a module that can pad its prompts.

    Raises:
        UserError: There is none, or it is sharded.
    """
    model = module.model
    name = model.also_called.get("mask_decoder", "mask_decoder")
    decoder = getattr(model, name, None)
    if not (model.decodes_whole and hasattr(module, "prompt_buckets") and isinstance(decoder, nn.Module)):
        raise UserError(
            f"CompileBlocks: decoder true: {type(model).__name__} has no mask decoder that is called whole: set it to "
            "false"
        )
    if isinstance(trainer.strategy, FSDP2):
        raise UserError("CompileBlocks: decoder true: FSDP2 gathers its weights outside of it: set it to false")
    return decoder
