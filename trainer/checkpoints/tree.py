"""A checkpoint's content: dicts, lists and tuples in each other, with tensors and plain values at the ends."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

Path = tuple[Any, ...]
"""Keys and indices from the root to a value."""


def mapped(tree: Any, change: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """A copy of a tree in which each value at an end is what `change` makes of its path and itself."""
    if isinstance(tree, dict):
        made = copy.copy(tree)  # a module's state has notes in attributes
        for key, value in tree.items():
            made[key] = mapped(value, change, (*path, key))
        return made
    if type(tree) in (list, tuple):
        return type(tree)(mapped(value, change, (*path, index)) for index, value in enumerate(tree))
    return change(path, tree)


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Paths and values of all ends."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    elif type(tree) in (list, tuple):
        for index, value in enumerate(tree):
            yield from leaves(value, (*path, index))
    else:
        yield path, tree


def is_sharded(content: Any) -> bool:
    """Whether some of a checkpoint's tensors are spread over ranks: it is written as a folder then."""
    return any(isinstance(leaf, DTensor) for _, leaf in leaves(content))


def size_of(content: Any) -> int:
    """Bytes of all tensors, of all ranks together."""
    return sum(leaf.numel() * leaf.element_size() for _, leaf in leaves(content) if isinstance(leaf, Tensor))
