"""What the ranks of a run tell each other."""

from __future__ import annotations

from typing import TypeVar

import torch

T = TypeVar("T")


def every_rank(part: T) -> list[T]:
    """Every rank's part, in the order of the ranks; this one's alone where there is only one. All ranks must ask."""
    if not torch.distributed.is_initialized():
        return [part]
    parts: list[T] = [part] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, part)
    return parts
