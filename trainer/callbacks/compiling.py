"""Compilation of the blocks, one by one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from data_shards.errors import UserError, nearest
from trainer.models.recomputing import wrap_forward
from trainer.modules.tuned import TunedModule


class CompileBlocks(Callback):
    """Compiles each transformer block with `torch.compile`: less memory traffic, and the first steps take minutes.

    Equal blocks share one compilation. Whole models are not compiled: what is asked differs from step to step, and each
    change would be a new one. Compiled or not, the names of the weights are the same, and so are checkpoints.

    Args:
        kinds: Kinds of blocks, such as ``image_encoder`` (SAM3: ``vision_encoder``, ``text_encoder``,
            ``detr_encoder``); null is the image encoder's, whose inputs have the same size in every step. Others are
            compiled anew for every number of prompts.
        backend: ``inductor`` needs a C++ compiler, on a GPU Triton too; ``aot_eager`` tries the way without them.
        mode: What `torch.compile` calls so, for ``inductor``.
    """

    def __init__(
        self,
        kinds: Sequence[str] | None = None,
        backend: Literal["inductor", "aot_eager", "eager"] = "inductor",
        mode: Literal["default", "max-autotune-no-cudagraphs"] = "default",
    ) -> None:
        self.kinds, self.backend, self.mode = kinds, backend, mode
        self._compiled = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compile before anything is sharded, so that each block is gathered outside of what is compiled.

        Raises:
            UserError: The model has no such blocks.
        """
        assert isinstance(pl_module, TunedModule)
        there = pl_module.model.block_kinds()
        for kind in self.kinds or ():
            if kind not in there:
                raise UserError(f"CompileBlocks: no blocks of kind {kind}{nearest(kind, there)}")
        if self._compiled:
            return
        mode: dict[str, Any] = {"mode": self.mode} if self.backend == "inductor" else {}
        # blocks of one kind share their code, and some differ in size, window or dropout
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for kind in [pl_module.model.encoder] if self.kinds is None else self.kinds:
            for block in there[kind]:
                # not `block.compile()`, which takes in the hooks that gather its weights
                wrap_forward(block, partial(torch.compile, backend=self.backend, dynamic=False, **mode))
        self._compiled = True
