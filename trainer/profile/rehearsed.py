"""Where a training step would wait for a GPU: one is gone through on tensors that pretend to be there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from data_shards.batch import TripletBatch
from trainer.modules.tuned import TunedModule
from trainer.rehearsal import start_autograd
from trainer.waits import Wait, place_of_caller

GPU = torch.device("cuda", 0)


class Pretended(TorchDispatchMode):
    """Notes where code waits for a GPU that is not there: reads, sizes that only values tell, and copies that block.

    What lies on the CPU is computed as ever; what is on ``cuda:0`` has a shape and a type, and no values. A read is
    answered with zeros, so that the program goes on and all of its waits are found at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = any(isinstance(tensor, FakeTensor) for tensor in given)
        if not on_gpu and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self._note("reads a value")
            return False if args[0].dtype == torch.bool else 0
        if name == "nonzero":
            self._note("nonzero: its size is known to the device alone")
            return args[0].new_zeros(0, args[0].ndim, dtype=torch.int64)
        if name == "_unique2":
            self._note("unique: its size is known to the device alone")
            every = torch.arange(args[0].numel(), device=args[0].device)
            return args[0].flatten(), every.view(args[0].shape), torch.ones_like(every)
        if name in ("index", "index_put", "index_put_", "_unsafe_index"):
            args = self._indexed(name, args)
        if name == "_to_copy" and not on_gpu:  # fake tensors would be made of small numbers, and these be copied
            source = args[0]
            found = torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype, device=kwargs["device"])
        else:
            found = func(*args, **kwargs)
        self._copies(name, args, kwargs, found)
        return tree_map_only(FakeTensor, _real, found)  # what crossed to the host has values there

    def _indexed(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Note an index whose size only its values tell, or that lies elsewhere; let it choose all."""
        places = list(args[1])
        for number, place in enumerate(places):
            if place is None:
                continue
            if place.dtype in (torch.bool, torch.uint8):
                self._note("index by bools: its size is known to the device alone")
                places[number] = torch.arange(place.shape[0], device=place.device)
            elif place.device != args[0].device:
                self._note("index from the host")
                places[number] = torch.zeros(place.shape, dtype=place.dtype, device=args[0].device)
        values = args[2:]
        if name.startswith("index_put") and places != list(args[1]) and args[2].ndim:
            values = (args[0].new_zeros(()), *args[3:])
        return (args[0], places, *values)

    def _copies(self, name: str, args: Any, kwargs: Any, found: Any) -> None:
        if name not in ("_to_copy", "copy_"):
            return
        source, target = (args[0], found) if name == "_to_copy" else (args[1], args[0])
        eager = kwargs.get("non_blocking") or args[2:3] == (True,)
        if {source.device.type, target.device.type} == {"cpu", "cuda"} and (not eager or target.device.type == "cpu"):
            self._note("copies to the host" if target.device.type == "cpu" else "copies to the device")

    def _note(self, what: str) -> None:
        self.waits.append(Wait(what, place_of_caller(__file__)))


def _real(tensor: FakeTensor) -> Tensor:
    if tensor.device.type != "cpu":
        return tensor
    with unset_fake_temporarily():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)


def waits_of_step(module: TunedModule, batch: TripletBatch, half: bool) -> list[Wait]:
    """Where the forward pass and the loss of a training step would wait for a GPU; the module stays as it is.

    Args:
        module: The module, with its trainer.
        batch: A batch on the CPU.
        half: Whether it is computed in bf16.
    """
    start_autograd()
    quiet = mock.patch.object(module, "log_dict", lambda *_, **__: None)
    eager, fakes = torch.compiler.set_stance("force_eager"), FakeTensorMode(allow_non_fake_inputs=True)
    with (
        torch.random.fork_rng(devices=[]),
        fakes,
        quiet,
        moved_to_gpu(module),
        eager,
        Pretended() as pretended,
        autocast_on_gpu(half),
    ):
        module.training_step(batch.to(GPU, non_blocking=True), 0)
    return pretended.waits


@contextmanager
def moved_to_gpu(module: torch.nn.Module) -> Iterator[None]:
    """Put a module onto a GPU that is pretended, and its own tensors back again."""
    kept = [(part, dict(part._parameters), dict(part._buffers)) for part in module.modules()]
    devices = [(part, part.__dict__["_device"]) for part in module.modules() if "_device" in part.__dict__]
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    name = "torch.nn.modules.module.torch.__future__.get_overwrite_module_params_on_conversion"
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        with mock.patch(name, lambda: True):
            module.to(GPU)
        yield
    finally:
        for part, parameters, buffers in kept:
            part._parameters.update(parameters)
            part._buffers.update(buffers)
        for part, device in devices:
            part.__dict__["_device"] = device
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def autocast_on_gpu(half: bool) -> Iterator[None]:
    """bf16 on the GPU that is pretended; torch's own context asks for one that is there."""
    torch.set_autocast_enabled("cuda", half)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)
