"""Tensors that pretend to be on a GPU, and a count of where a program would wait for it.

What lies on the CPU is computed as ever; what is on ``cuda:0`` has a shape and a type, and no values. So the host's
part of a training step runs for real, and what the device is asked for is written down.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)


class Pretended(TorchDispatchMode):
    """Notes where our code waits for the device: reads, sizes that only values tell, and copies that block.

    A read is answered with zeros, so that the program goes on and all of its waits are found at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        """What waited and where, as ``operation modules/file.py: line of code``."""
        self.counting = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = any(isinstance(tensor, FakeTensor) for tensor in given)
        if not on_gpu and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self._note(name)
            return False if args[0].dtype == torch.bool else 0
        if name == "nonzero":
            self._note(name)
            return args[0].new_zeros(0, args[0].ndim, dtype=torch.int64)
        if name == "_unique2":
            self._note(name)
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
        # what crossed to the host has values there
        return tree_map_only(FakeTensor, _real, found)

    def _indexed(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Note an index whose size only its values tell, or that lies elsewhere; let it choose all."""
        places = list(args[1])
        for number, place in enumerate(places):
            if place is None:
                continue
            if place.dtype in (torch.bool, torch.uint8):
                self._note(f"{name} by bools")
                every = torch.arange(place.shape[0], device=place.device)
                places[number] = every
            elif place.device != args[0].device:
                self._note(f"{name} from the host")
                places[number] = torch.zeros(place.shape, dtype=place.dtype, device=args[0].device)
        values = args[2:]
        if name.startswith("index_put") and places != list(args[1]) and args[2].ndim:
            values = (args[0].new_zeros(()), *args[3:])
        return (args[0], places, *values)

    def _copies(self, name: str, args: Any, kwargs: Any, found: Any) -> None:
        if name not in ("_to_copy", "copy_"):
            return
        source, target = (args[0], found) if name == "_to_copy" else (args[1], args[0])
        crosses = {source.device.type, target.device.type} == {"cpu", "cuda"}
        eager = kwargs.get("non_blocking") or args[2:3] == (True,)
        if crosses and (not eager or target.device.type == "cpu"):
            self._note(f"{name} to {target.device.type}")

    def _note(self, what: str) -> None:
        if not self.counting:
            return
        frames = [frame for frame in traceback.extract_stack() if "/trainer/" in frame.filename]
        ours = [frame for frame in frames if "/tests/" not in frame.filename]
        last = (ours or frames)[-1]
        self.waits.append(f"{what} {last.filename.rpartition('/trainer/')[2]}: {last.line}")


def _real(tensor: FakeTensor) -> Tensor:
    if tensor.device.type != "cpu":
        return tensor
    with unset_fake_temporarily():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)


@contextmanager
def pretending() -> Iterator[Pretended]:
    """Let ``cuda:0`` be there, and note the waits; `Pretended.waits` grows meanwhile."""
    with FakeTensorMode(allow_non_fake_inputs=True), Pretended() as pretended:
        yield pretended


def put_on_gpu(module: torch.nn.Module, pretended: Pretended) -> None:
    """Put a module onto the GPU that is pretended."""
    pretended.counting = False
    with mock.patch("torch.nn.modules.module.torch.__future__.get_overwrite_module_params_on_conversion", lambda: True):
        module.to(GPU)
    pretended.counting = True


@contextmanager
def autocast() -> Iterator[None]:
    """bf16 on the GPU that is pretended; torch's own context asks for one that is there."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)
