"""Where a piece of code waits for its device: every wait leaves a GPU idle, and a step should have none.

On a GPU torch itself is asked (`torch.cuda.set_sync_debug_mode`). Without one the calls are counted that would wait on
a GPU: those that read values, those whose result has a size that only values tell, and uploads that wait.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_READS = frozenset(
    {
        *(Tensor.cpu, Tensor.item, Tensor.tolist, Tensor.nonzero, torch.nonzero, Tensor.argwhere),
        *(torch.argwhere, Tensor.masked_select, torch.masked_select, Tensor.unique, torch.unique, Tensor.equal),
        *(torch.equal, Tensor.unique_consecutive, torch.unique_consecutive, Tensor.bincount, torch.bincount),
        *(Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.__contains__, torch.allclose),
    }
)
_UPLOADS = frozenset({torch.tensor, torch.as_tensor, Tensor.new_tensor})
_OURS = Path(__file__).parents[1]
"""The folder that our packages lie in."""


@dataclass(frozen=True)
class Wait:
    """A call that waits for the device.

    Attributes:
        call: What was called, such as ``Tensor.item``; what torch says of it on a GPU.
        place: Where in this project, as ``file:line``; the innermost caller's file where none of ours called.
    """

    call: str
    place: str

    def __str__(self) -> str:
        return f"{self.place} {self.call}"


@contextmanager
def watching(device: torch.device) -> Iterator[list[Wait]]:
    """Collect waits while the context is open.

    Args:
        device: The device that is waited for. For a CPU, whose tensors are always there, the calls are counted that
            would wait for a GPU: reading what lies on the CPU on purpose counts too, so move such work out of it.

    Yields:
        The waits, in order; it grows.
    """
    if device.type == "cuda":
        with _asked() as waits:
            yield waits
        return
    with _Calls() as calls:
        yield calls.waits


def waits_of(run: Callable[[], Any], device: torch.device) -> list[Wait]:
    """The waits of a call; see `watching`."""
    with watching(device) as waits:
        run()
    return waits


@contextmanager
def _asked() -> Iterator[list[Wait]]:
    """Collect what CUDA's debug mode warns of."""
    waits: list[Wait] = []
    shown = warnings.showwarning

    def note(
        message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: str | None = None
    ) -> None:
        if "synchroniz" in str(message):
            waits.append(Wait("waits for the GPU", place_of_caller()))
        else:
            shown(message, category, filename, lineno, file, line)

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)


class _Calls(TorchFunctionMode):
    """Notes calls that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _would_wait(func, args, kwargs):
            owner = "torch" if getattr(torch, getattr(func, "__name__", ""), None) is func else "Tensor"
            self.waits.append(Wait(f"{owner}.{getattr(func, '__name__', func)}", place_of_caller()))
        return func(*args, **kwargs)


def _would_wait(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call on tensors of a GPU would wait."""
    if func in _READS:
        return True
    if func in _UPLOADS:
        return func is Tensor.new_tensor or "device" in kwargs
    if func in (Tensor.__getitem__, Tensor.__setitem__):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in index)
    if func is Tensor.to:
        moved = any(isinstance(part, torch.device | str) for part in (*args[1:], kwargs.get("device")))
        return moved and not kwargs.get("non_blocking")
    return False


def place_of_caller(*files: str) -> str:
    """The innermost frame of this project's that is in none of some files, as ``file:line``.

    Args:
        *files: Files that look on and do not count; this one is among them.
    """
    watchers = {Path(__file__), *map(Path, files)}
    frame = sys._getframe(1)
    inner: str | None = None
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path not in watchers and "torch" not in path.parts and path.name != "contextlib.py":
            inner = inner or f"{path.name}:{frame.f_lineno}"
            if path.is_relative_to(_OURS) and "site-packages" not in path.parts:
                return f"{path.relative_to(_OURS)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return inner or "?"
