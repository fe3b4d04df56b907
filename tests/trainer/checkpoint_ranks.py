"""What ranks make of checkpoints: to be started by `torch.multiprocessing.start_processes`."""

from __future__ import annotations

import errno
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from data_shards.errors import UserError
from trainer.checkpoints import Background, load_sharded, verify, write
from trainer.checkpoints.mark import HashedFile


class Network(nn.Module):
    """Rows that do not divide by the ranks, a bias of one number, a frozen layer, and one that nothing reaches."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.frozen = nn.Linear(6, 7), nn.Linear(7, 7).requires_grad_(False)
        self.last, self.unreached = nn.Linear(7, 1), nn.Linear(3, 5)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen += 1
        return self.last(self.frozen(self.first(inputs).tanh()))


def optimizer_of(network: Network) -> torch.optim.AdamW:
    """Two groups, not in the order of the network's parameters."""
    groups = [
        {"params": [*network.unreached.parameters(), *network.last.parameters()], "lr": 0.01, "layer": "top"},
        {"params": list(network.first.parameters()), "lr": 0.001, "weight_decay": 0.5, "layer": "bottom"},
    ]
    return torch.optim.AdamW(groups)


def shard(network: Network, mesh: DeviceMesh) -> Network:
    for layer in (network.first, network.frozen, network.last):
        fully_shard(layer, mesh=mesh)
    return fully_shard(network, mesh=mesh)


def train(network: Network, optimizer: torch.optim.Optimizer, steps: int) -> None:
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        network(inputs).square().mean().backward()
        optimizer.step()


def content_of(network: Network, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """As Lightning's strategy gives it: the very tensors that are trained."""
    names = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    weights = get_model_state_dict(network)
    average = {name: (tensor * 0.5).detach() for name, tensor in weights.items() if name in names}
    return {
        "state_dict": weights,
        "optimizer_states": [get_optimizer_state_dict(network, optimizer)],
        "average": {"weights": average, "steps": 2},
        "global_step": 2,
        "loops": {"seen": (1, [2, None])},
    }


def whole(value: Any) -> Any:
    """A copy with all tensors put together."""
    if isinstance(value, dict):
        return {key: whole(part) for key, part in value.items()}
    if isinstance(value, list):
        return [whole(part) for part in value]
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().clone() if isinstance(value, Tensor) else value


def mesh_of(ranks: int, copies: int) -> DeviceMesh:
    if copies == 1:
        return init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))
    return init_device_mesh("cpu", (copies, ranks // copies), mesh_dim_names=("replicate", "shard"))


def start(rank: int, ranks: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)


def save_main(rank: int, ranks: int, port: int, copies: int, folder: str) -> None:
    """Train, save in the background, and train on meanwhile; what was there is in ``saved.pt`` as a whole."""
    start(rank, ranks, port)
    network = shard(Network(0), mesh_of(ranks, copies))
    optimizer = optimizer_of(network)
    train(network, optimizer, 2)
    background = Background()
    content = content_of(network, optimizer)
    saved = whole(content)
    staged = background.stage(content)
    train(network, optimizer, 1)
    background.submit(lambda: write(staged, Path(folder) / "step-000002.ckpt", group=background.group))
    train(network, optimizer, 1)
    again = background.stage(content_of(network, optimizer))  # waits, and takes the same memory
    assert again["state_dict"]["first.weight"] is staged["state_dict"]["first.weight"]
    assert not torch.equal(whole(again)["state_dict"]["first.weight"], saved["state_dict"]["first.weight"])
    if rank == 0:
        torch.save(saved, Path(folder) / "saved.pt")
    dist.destroy_process_group()


def beside_main(rank: int, ranks: int, port: int, folder: str) -> None:
    """Save in the background and in the main thread at once, each of which one rank comes to late."""
    start(rank, ranks, port)
    network = shard(Network(0), mesh_of(ranks, 1))
    optimizer = optimizer_of(network)
    train(network, optimizer, 2)
    background, root = Background(), Path(folder)
    write({"state_dict": get_model_state_dict(network)}, root / "before.ckpt")
    staged = background.stage(content_of(network, optimizer))

    def beside() -> None:
        time.sleep(0.0 if rank else 0.5)
        write(staged, root / "beside.ckpt", group=background.group)

    background.submit(beside)
    time.sleep(0.5 if rank else 0.0)
    write({"state_dict": get_model_state_dict(network)}, root / "main.ckpt")
    background.wait()
    dist.barrier()
    dist.destroy_process_group()


def load_main(rank: int, ranks: int, port: int, cases: dict[str, tuple[str, int]], folder: str) -> None:
    """Load each case's checkpoint at its number of copies; ``CASE.pt`` has what is there then as a whole."""
    start(rank, ranks, port)
    for case, (path, copies) in cases.items():
        network = shard(Network(5), mesh_of(ranks, copies))
        optimizer = optimizer_of(network)
        if case.startswith("trained"):
            train(network, optimizer, 1)
        rest = load_sharded(Path(path), network, [optimizer])
        found = {"now": whole(content_of(network, optimizer)), "rest": whole(rest)}
        sharded = all(isinstance(tensor, DTensor) for tensor in rest["average"]["weights"].values())
        train(network, optimizer, 1)
        found |= {"sharded": sharded, "next": whole(get_model_state_dict(network))}
        if rank == 0:
            torch.save(found, Path(folder) / f"{case}.pt")
    dist.destroy_process_group()


def fail_main(rank: int, ranks: int, port: int, folder: str) -> None:
    """Let a write fail on one rank after the other, in both forms; ``rank0.pt`` and so on have what each is told."""
    start(rank, ranks, port)
    network = shard(Network(0), mesh_of(ranks, 1))
    content = {"state_dict": get_model_state_dict(network), "global_step": 2}
    background, path, told = Background(), Path(folder) / "step-000002.ckpt", []
    real = HashedFile.write
    for bad in range(ranks):
        for form, what in {"folder": content, "file": {"global_step": 2}}.items():

            def full(file: HashedFile, data: Any, bad: int = bad, form: str = form) -> int:
                if rank == bad or form == "file":
                    raise OSError(errno.ENOSPC, "No space left on device")
                return real(file, data)

            for failing in (False, True):
                HashedFile.write = full if failing else real  # type: ignore[method-assign]
                staged = background.stage(what)
                background.submit(lambda staged=staged: write(staged, path, group=background.group))
                try:
                    background.wait()
                except UserError as error:
                    told.append(str(error))
                dist.barrier()
                verify(path)
                dist.barrier()
    torch.save(told, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
