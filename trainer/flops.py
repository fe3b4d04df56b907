"""What one pass of a training computes, counted by running it on tensors that have no content.

Counted are matrix products, convolutions and attention, two FLOPs for a multiply-add: what is left, such as norms,
activations and losses, is some per cent, and runs on other units. As in PaLM's definition of MFU (Chowdhery et al.
2022, arXiv:2204.02311, appendix B), what a pass needs is told apart from what it does: a recomputation of activations,
and of attention's scores in its backward pass, are work and no progress.

Shapes: B batch, N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from trainer.models.attention import as_needed
from trainer.modules.scoring import ScoredModule
from trainer.rehearsal import rehearsing

_FUSED = tuple(f"_scaled_dot_product_{kind}_attention" for kind in ("flash", "efficient", "cudnn"))


@dataclass(frozen=True)
class Flops:
    """FLOPs of one forward and backward pass.

    Attributes:
        model: What the pass needs; MFU is this over the time that it took and the device's peak.
        hardware: What it does: recomputed activations and attention scores besides.
        forward: What the forward pass alone needs.
    """

    model: int
    hardware: int
    forward: int


def step_flops(module: ScoredModule, images: int, prompts: int, frames: int = 1) -> Flops:
    """FLOPs of forward, loss and backward of one pass, on one device.

    Seconds for a model of any size. Call it before the module is sharded or compiled, as a callback's ``setup`` does;
    what is frozen counts as little as it computes.

    Args:
        module: Module on any device, the meta device too; nothing of it changes.
        images: Images (or clips) of the pass.
        prompts: Prompts of each.
        frames: Where it learns from clips, the frames of each.

    Raises:
        NotImplementedError: The module cannot rehearse.
    """
    clip = {"frames": frames} if frames > 1 else {}
    return pass_flops(module, lambda: module.rehearse(images, prompts, **clip))


def pass_flops(module: nn.Module, step: Callable[[], Tensor]) -> Flops:
    """FLOPs of one forward and backward.

    Args:
        module: Module on any device; nothing of it changes.
        step: Gives the loss of a pass; called where all that is made is a fake tensor.
    """
    with rehearsing(module), as_needed(), FlopCounter() as counter:
        loss = step()
        forward = counter.model
        counter.backward = True
        loss.backward()
    return Flops(counter.model, counter.hardware, forward)


class FlopCounter(TorchDispatchMode):
    """Counts the FLOPs of all that runs.

    Attributes:
        model: Those that are needed.
        hardware: All of them.
        backward: Whether the backward pass runs: gradients are off in it but where a forward pass is done again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model = self.hardware = 0
        self.backward = False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count it."""
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):  # asked as often as all else
            return args[0].fake_device
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = getattr(func, "_overloadpacket", func)
        needed, done = self._count(packet, args, kwargs, result)
        self.hardware += done
        if not (self.backward and torch.is_grad_enabled()):
            self.model += needed
        return result

    def _count(self, packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> tuple[int, int]:
        """What an operation needs, and what it does."""
        aten = torch.ops.aten
        if packet is aten.convolution_backward:
            return (_convolution_backward(*args),) * 2
        formula = flop_registry.get(packet)
        if formula is None:
            return 0, 0
        done = int(formula(*args, **kwargs, out_val=result))
        for name in _FUSED:
            if packet is getattr(aten, f"{name}_backward"):
                _, query, key, value = args[:4]
                return 2 * int(flop_registry[getattr(aten, name)](query, key, value, out_val=None)), done
        return done, done


def _convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, *settings: Any) -> int:
    """As much as the forward pass for the input's gradient, and again for the weight's; torch's own forgets groups."""
    transposed, mask = settings[4], settings[7]
    places = (x if transposed else gradient).shape[2:]
    return 2 * x.shape[0] * prod(places) * weight.numel() * sum(mask[:2])
