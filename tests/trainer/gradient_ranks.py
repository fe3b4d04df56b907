"""What two ranks make of gradients: to be started by `torch.multiprocessing.spawn`."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard

from trainer.modules.optimization import clip_to_norm, clip_to_value, gradient_norm

RANKS = 2


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def network() -> nn.Sequential:
    """Rows that do not divide by two ranks, and a bias of one number: a rank holds nothing of it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1))


def backward(model: nn.Sequential) -> None:
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    (100 * model(inputs)).square().mean().backward()


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rank_main(rank: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    found: dict[str, Any] = {}
    line = init_device_mesh("cpu", (RANKS,))
    grid = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("replicate", "shard"))
    # all but the second layer are sharded: its gradients are plain tensors, the same on every rank
    for name, mesh in (("sharded", line), ("replicated and sharded", grid)):
        for clip in ("norm", "value"):
            model = network()
            for layer in (model[0], model[4]):
                fully_shard(layer, mesh=mesh)
            backward(model)
            mine = gradients(model)
            assert sum(isinstance(gradient, DTensor) for gradient in mine) == 4
            norm = gradient_norm(mine)
            clip_to_norm(mine, 0.5, norm) if clip == "norm" else clip_to_value(mine, 0.5)
            found[f"{name} {clip}"] = (norm, [whole(gradient).clone() for gradient in mine], gradient_norm(mine))
    summand = torch.tensor([3.0, 4.0]) * (rank + 1)
    parts = [DTensor.from_local(summand, line, [Partial()]), DTensor.from_local(summand, line, [Shard(0)])]
    found["sums"] = gradient_norm(parts)
    found["none"] = gradient_norm([])
    torch.save(found, Path(out) / f"rank{rank}.pt")
    dist.destroy_process_group()
