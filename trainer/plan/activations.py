"""What one pass of a training takes in memory, measured by running it on tensors that have no content.

The module's real forward, loss and backward run on fake tensors (`trainer.rehearsal`). Every storage that comes and
goes is followed, so the peak is that of the real pass, but for what a device's kernels and allocator take for
themselves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from trainer.modules.scoring import ScoredModule
from trainer.rehearsal import AUTOCAST, rehearsing

IMAGES, PROMPTS = (1, 2, 4, 8), (1, 4, 16)
"""Images a pass and prompts an image whose memory is told."""


def memory_at(
    module: ScoredModule,
    precision: str,
    kept: int,
    images: int,
    prompts: int | None,
    frames: int = 1,
    known: dict[tuple[int, int], int] | None = None,
) -> list[dict[str, int]]:
    """Bytes in all on one device, by images a pass and prompts an image.

    What is alive at any one moment is affine in images and in images × prompts, and the peak is the most of all
    moments: convex in each. So the corners are measured and what lies between them is interpolated, which is the truth
    or a little above it: some 5 % where the peak moves from the encoder to the loss.

    Args:
        module: Module on any device; nothing of it changes.
        precision: As Lightning's trainer takes it.
        kept: Bytes that are there before the pass: weights, gradients, the optimiser's.
        images: Images a pass of the recipe; measured.
        prompts: Prompts an image of the recipe; None is not known.
        frames: Where the recipe trains on clips, the frames of each: a clip stands for an image then.
        known: Bytes of passes that were measured before, beside `kept`, by images and prompts; takes new ones.

    Returns:
        For all of `IMAGES` and `PROMPTS` and the recipe's own ``images``, ``prompts`` and ``bytes``.

    Raises:
        NotImplementedError: The module cannot rehearse.
    """
    rows, columns = sorted({*IMAGES, images}), sorted({*PROMPTS, prompts or 1})
    clip = {"frames": frames} if frames > 1 else {}
    passes, found = known if known is not None else {}, {}
    for row, column in {*product((rows[0], rows[-1]), (columns[0], columns[-1])), (images, prompts or 1)}:
        if (row, column) not in passes:
            passes[row, column] = pass_bytes(module, partial(module.rehearse, row, column, **clip), precision)
        found[row, column] = kept + passes[row, column]
    low, high = ([found[row, column] for column in (columns[0], columns[-1])] for row in (rows[0], rows[-1]))
    table = []
    for row, column in product(rows, columns):
        across = (column - columns[0]) / (columns[-1] - columns[0])
        down = (row - rows[0]) / (rows[-1] - rows[0])
        between = [(1 - across) * first + across * last for first, last in (low, high)]
        size = found.get((row, column), round((1 - down) * between[0] + down * between[1]))
        table.append({"images": row, "prompts": column, "bytes": size})
    return table


def pass_bytes(module: nn.Module, step: Callable[[], Tensor], precision: str = "32-true") -> int:
    """The most bytes that are alive in one forward and backward, beside weights and their gradients.

    Gradients are taken to be there before the pass, as they are from the second one of a step on.

    Args:
        module: Module on any device, the meta device too; nothing of it changes.
        step: Gives the loss of a pass; called where all that is made is a fake tensor on the CPU.
        precision: As Lightning's trainer takes it.
    """
    meter, half = StorageMeter(), AUTOCAST.get(precision)
    with rehearsing(module):
        for tensor in (*module.parameters(), *module.buffers()):
            meter.follow(tensor)
            if tensor.grad is not None:
                meter.follow(tensor.grad)
        before = meter.live
        with meter:
            with torch.autocast("cpu", half, enabled=half is not None):
                loss = step()
            loss.backward()
    return meter.peak - before


class StorageMeter(TorchDispatchMode):
    """Follows the bytes of all storages that operations make, from their making until nothing holds them.

    Attributes:
        live: Bytes that are alive.
        peak: The most that were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def follow(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once, for as long as it lives."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()

        def gone(_: object) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what it returns."""
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):  # asked as often as all else
            return args[0].fake_device
        result = func(*args, **(kwargs or {}))
        for part in tree_iter(result):
            if isinstance(part, Tensor):
                self.follow(part)
        return result
