"""How a training module is cut over ranks: one group of parameters a block, and one for all the rest.

FSDP2 (`torch.distributed.fsdp.fully_shard`; Zhao et al. 2023, arXiv:2304.11277) gathers the parameters of a group for
its forward and backward pass and sums up its gradients over the ranks. All of that are collective calls: every rank
has to go through the same blocks in the same order, whatever its samples are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from data_shards.errors import UserError


def shard(
    module: nn.Module,
    kinds: Sequence[Sequence[nn.Module]],
    mesh: DeviceMesh,
    reshard_after_forward: bool = True,
) -> None:
    """Shard a training module in place.

    Args:
        module: The module. Its `training_step` becomes the forward pass in which the parameters are gathered; it may
            not call the module itself, which would end there. Evaluations need `gather_for_evaluation`.
        kinds: Its blocks that are groups of their own, each called once a pass, those of an encoder in one sequence.
        mesh: Ranks to shard over in its last dimension, and to copy over in the first of two (HSDP).
        reshard_after_forward: Whether blocks are gathered a second time in the backward pass, and not kept for it.

    Raises:
        UserError: A parameter cannot be cut, as quantised ones cannot.
    """
    for name, parameter in module.named_parameters():
        if not parameter.is_floating_point():
            raise UserError(
                f"trainer.strategy: {name} is quantised ({parameter.dtype}) and cannot be sharded: take ddp, or LoRA "
                "without quantisation"
            )
    # parameters are gathered, and gradients summed up, in fp32: autocast makes of them what it needs
    policy: dict[str, Any] = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(cast_forward_inputs=False)}
    for block in (block for blocks in kinds for block in blocks):
        fully_shard(block, reshard_after_forward=reshard_after_forward, **policy)
    outside = [
        (owner, name)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if parameter.requires_grad and not isinstance(parameter, DTensor)
    ]
    fully_shard(module, **policy)
    _reach(module, outside, [blocks[-1] for blocks in kinds if blocks])
    register_fsdp_forward_method(module, "training_step")


def is_sharded(module: nn.Module) -> bool:
    """Whether a module's parameters are spread over ranks."""
    return isinstance(module, FSDPModule)


@torch.no_grad()
def gather_for_evaluation(module: nn.Module) -> None:
    """Gather all parameters, and keep them until `reshard`: an evaluation's passes then need no other rank.

    They may differ from rank to rank, as images have more or fewer terms to ask for. All ranks must call this.
    """
    if not isinstance(module, FSDPModule):
        return
    with torch.inference_mode(False):  # buffers that are made here serve the training too
        module._get_fsdp_state()._lazy_init()  # a block's pass may come first
        for group in _groups(module):
            group.set_reshard_after_forward(False, recurse=False)
            group.unshard()


def reshard(module: nn.Module, reshard_after_forward: bool | None = None) -> None:
    """Make `module.parameters()` this rank's shards again; nothing happens to a module that is not sharded.

    Args:
        module: The module.
        reshard_after_forward: Whether blocks go back to their shards after each forward pass from now on; None leaves
            that as it is.
    """
    for group in _groups(module):
        group.reshard()
        if reshard_after_forward is not None and group is not module:
            group.set_reshard_after_forward(reshard_after_forward, recurse=False)


def _groups(module: nn.Module) -> Iterator[FSDPModule]:
    return (part for part in module.modules() if isinstance(part, FSDPModule))


def _reach(module: nn.Module, parameters: Sequence[tuple[nn.Module, str]], last: Sequence[nn.Module]) -> None:
    """Give all that learns a gradient in every pass, zero where a rank's prompts did not reach it.

    Ranks sum up the gradients that there are, all in one piece: they have to agree on which these are.

    Args:
        module: The training module.
        parameters: What learns outside of the blocks, each by its owner and its name in there.
        last: The last block of each encoder: its output depends on all of them.
    """
    step: Callable[..., Tensor] = module.training_step  # type: ignore[assignment]
    outputs: dict[nn.Module, Any] = {}
    for block in last:
        block.register_forward_hook(lambda block, _, output: outputs.update({block: output}))

    @wraps(step)
    def reaching(*arguments: Any, **named: Any) -> Tensor:
        outputs.clear()
        loss = step(*arguments, **named)
        touched = [getattr(owner, name).flatten()[:1] for owner, name in parameters]
        # nothing but given masks: no gradient would go through the blocks, and other ranks' do
        loss = loss + zero_of(*touched, *([] if loss.requires_grad else outputs.values()))
        outputs.clear()
        return loss

    module.training_step = reaching  # type: ignore[assignment]


def zero_of(*found: Any) -> Tensor:
    """Zero, with zero gradients to all tensors in some answers of a model."""
    zeros = [(tensor.float().nan_to_num() * 0).sum() for tensor in tensors_in(found) if tensor.requires_grad]
    return torch.stack(zeros).sum() if zeros else torch.zeros(())


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in what a model takes or gives: in mappings, lists, tuples and dataclasses, at any depth."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for item in fields(value):
            yield from tensors_in(getattr(value, item.name))
