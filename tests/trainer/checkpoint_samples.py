"""Small checkpoints of both forms, as the tests of their files take them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from trainer.checkpoints import read, write
from trainer.checkpoints.mark import Entry, Mark, digest

FORMS = ["file", "folder"]


@contextmanager
def one_rank(folder: Path) -> Iterator[None]:
    """One rank: what is sharded can be made."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
        gc.collect()  # a rank that is forked later would wait for the threads of what is left


def content(form: str, step: int = 3) -> dict[str, Any]:
    weights = {"weight": torch.arange(12.0).reshape(4, 3) + step, "bias": torch.ones(4, dtype=torch.bfloat16)}
    if form == "folder":
        mesh = init_device_mesh("cpu", (1,))
        weights = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in weights.items()}
    return {"state_dict": weights, "global_step": step, "loops": {"epoch": [1, (2, None)]}, "seed": torch.tensor(7)}


def made(folder: Path, form: str, step: int = 3) -> Path:
    path = folder / f"step-{step:06d}.ckpt"
    write(content(form, step), path)
    return path


def holds(path: Path, step: int) -> bool:
    found = read(path)
    return found["global_step"] == step and found["state_dict"]["weight"].equal(torch.arange(12.0).reshape(4, 3) + step)


def files_of(path: Path) -> list[Path]:
    """All files of a checkpoint, the mark last."""
    if path.is_dir():
        return [*sorted(file for file in path.iterdir() if file.suffix != ".json"), path / "complete.json"]
    return [path, path.with_name(path.name + ".json")]


def seal(path: Path) -> None:
    """Mark a checkpoint anew, as one who forges it would."""
    *parts, mark = files_of(path)
    Mark(3, {part.name: Entry(part.stat().st_size, digest(part)) for part in parts}).write(mark)
