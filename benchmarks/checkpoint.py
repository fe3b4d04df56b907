"""How long does a training stand still for a checkpoint, written in the background or waited for?

python benchmarks/checkpoint.py        # some three minutes and 3 GB of disk on two idle cores

A state of 1 GB, as a model of 83 million parameters has with AdamW, is saved while a small network is trained: by one
process as one file, and by two gloo ranks as a folder to which each writes half (DCP). `blocking` writes it between two
steps; `background` copies it there and writes the copy while the training goes on. Each is written to stay: marked,
with SHA-256 and fsync. Figures are medians over rounds in which both run in turn, after one to warm up. The temporary
folder is where TMPDIR says.

The last line is one JSON object:
  benchmark         "checkpoint"
  quick             whether --quick was given
  cores             of this machine
  megabytes         of the state, of all ranks together
  rounds            that count
  step_ms           by form, "file" and "folder": median of the training's steps with nothing written
  stop_seconds      by form and way: longest time between the ends of two steps, less that of a step
  ratios            by form: `stop_seconds` of "blocking" divided by that of "background"
  ratio             the smaller of them
  bar               {"needed", "met"}: that ratio
  first_seconds     by form: stop of the first save in the background, which takes the memory that the others use again
  lost_seconds      by form and way: time from the save to its end, less that of the steps taken meanwhile: the stop,
                    and what steps lose to the writer, which shares the cores with them
  complete_seconds  by form and way: from the save to the mark
  sha256_seconds    of as many bytes on one core
  plain_seconds     to write as many bytes to one file and wait for the disk, without hashing
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measuring import arguments, finish, say
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from trainer.checkpoints import Background, remove, verify, write

WAYS = ("blocking", "background")
TENSORS = 60  # of the state: weights and two moments of each
AFTER = 20
"""Steps after a write, and before."""
NEEDED = 1
"""How often longer a training must stand still that waits for its checkpoint, at least: more than once."""


class Training:
    """Small real steps, over all ranks."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 1))
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4)
        self.inputs = torch.randn(64, 256)
        self.ends: list[float] = []

    def step(self) -> None:
        """Train once and note when it was done."""
        self.optimizer.zero_grad()
        self.network(self.inputs).square().mean().backward()
        if dist.is_initialized():
            for parameter in self.network.parameters():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
        self.optimizer.step()
        self.ends.append(time.perf_counter())

    def steps(self, count: int) -> list[float]:
        """Train so often; how long each step took."""
        self.ends = [time.perf_counter()]
        for _ in range(count):
            self.step()
        return gaps(self.ends)


def gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times)]


def state_of(megabytes: int) -> dict[str, Any]:
    """A checkpoint of so many 10^6 bytes, sharded where there are ranks."""
    length = megabytes * 1_000_000 // 4 // TENSORS // 256
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if dist.is_initialized() else None

    def made() -> Tensor:
        tensor = torch.randn(length, 256)
        return tensor if mesh is None else distribute_tensor(tensor, mesh, [Shard(0)])

    names = [f"blocks.{number}.weight" for number in range(TENSORS // 3)]
    count = range(len(names))
    states = {number: {"step": torch.tensor(1.0), "exp_avg": made(), "exp_avg_sq": made()} for number in count}
    return {
        "state_dict": {name: made() for name in names},
        "optimizer_states": [{"state": states, "param_groups": [{"lr": 1e-4, "params": list(states)}]}],
        "global_step": 1,
    }


def all_ranks(there: bool) -> bool:
    """Whether something is so on every rank; it ends no rank's loop before another's."""
    if not dist.is_initialized():
        return there
    told = torch.tensor(int(there))
    dist.all_reduce(told, dist.ReduceOp.MIN)
    return bool(told)


def save(training: Training, background: Background, state: dict[str, Any], path: Path, way: str) -> dict[str, float]:
    """Train, save, and train on until the checkpoint is there.

    Returns:
        Seconds: of a `step`, of the `stop`, `lost`, and until it is `complete`.
    """
    step = statistics.median(training.steps(AFTER))
    training.ends = [time.perf_counter()]
    start = training.ends[0]
    complete = [0.0]

    def work(content: dict[str, Any]) -> None:
        write(content, path, group=background.group)
        complete[0] = time.perf_counter() - start

    if way == "blocking":
        work(state)
    else:
        staged = background.stage(state)
        background.submit(lambda: work(staged))
    while not all_ranks(not background.busy):
        training.step()
    taken = len(training.ends) - 1
    end = time.perf_counter()
    for _ in range(AFTER):
        training.step()
    background.wait()
    longest = max(gaps(training.ends))
    return {
        "step": step,
        "stop": max(longest - step, 1e-9),
        "lost": max(end - start - taken * step, 1e-9),
        "complete": complete[0],
    }


def measure(rank: int, ranks: int, port: int, megabytes: int, rounds: int, folder: str, out: Any) -> None:
    """Save in turn; the first rank sends what it has seen."""
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    training, background, state = Training(), Background(), state_of(megabytes)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    training.steps(AFTER)
    for round_ in range(rounds + 1):
        for way in WAYS:
            path = Path(folder) / "step-000001.ckpt"
            found[way].append(save(training, background, state, path, way))
            if rank == 0:
                say(f"{ranks} rank(s), round {round_}, {way}: stop {found[way][-1]['stop']:.2f} s")
                verify(path)
                remove(path)
            all_ranks(True)
    if rank == 0:
        out.put(found)
    if ranks > 1:
        dist.destroy_process_group()


def of_ranks(ranks: int, megabytes: int, rounds: int, folder: Path) -> dict[str, list[dict[str, float]]]:
    """What `measure` finds with so many ranks, by way."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    sent = (ranks, port, megabytes, rounds, str(folder), out)
    processes = [context.Process(target=measure, args=(rank, *sent)) for rank in range(ranks)]
    for process in processes:
        process.start()
    while processes[0].exitcode is None and out.empty():
        time.sleep(0.1)
    found: dict[str, list[dict[str, float]]] = out.get(timeout=1)
    for process in processes:
        process.join()
    return found


def bounds(megabytes: int, folder: Path) -> tuple[float, float]:
    """Seconds to hash so many 10^6 bytes, and to write them to stay; medians of three."""
    data = os.urandom(megabytes * 1_000_000)

    def plain() -> None:
        with (folder / "plain").open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        (folder / "plain").unlink()

    found = []
    for run in (lambda: hashlib.sha256(data).digest(), plain):
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
        found.append(statistics.median(taken))
    return found[0], found[1]


def main() -> None:
    values = arguments(__doc__, megabytes=0, rounds=0)
    megabytes = values.megabytes or (100 if values.quick else 1000)
    rounds = values.rounds or (2 if values.quick else 5)
    result: dict[str, dict[str, Any]] = {
        name: {} for name in ("step_ms", "stop_seconds", "ratios", "first_seconds", "lost_seconds", "complete_seconds")
    }
    with tempfile.TemporaryDirectory() as name:
        hashing, writing = bounds(megabytes, Path(name))
        print("form    way         step ms   stop s  lost s  complete s")
        for form, ranks in (("file", 1), ("folder", 2)):
            found = of_ranks(ranks, megabytes, rounds, Path(name))
            result["first_seconds"][form] = found["background"][0]["stop"]
            counted = {
                way: {key: statistics.median(row[key] for row in rows[1:]) for key in rows[0]}
                for way, rows in found.items()
            }
            for way, row in counted.items():
                figures = f"{row['step'] * 1000:8.1f} {row['stop']:8.3f} {row['lost']:7.2f} {row['complete']:11.2f}"
                print(f"{form:7} {way:10} {figures}", flush=True)
            result["step_ms"][form] = counted["blocking"]["step"] * 1000
            for key in ("stop", "lost", "complete"):
                result[f"{key}_seconds"][form] = {way: row[key] for way, row in counted.items()}
            stops = result["stop_seconds"][form]
            result["ratios"][form] = stops["blocking"] / stops["background"]
    print(", ".join(f"{form}: blocking stops {ratio:.1f} × as long" for form, ratio in result["ratios"].items()))
    ratio = min(result["ratios"].values())
    print(f"SHA-256 {hashing:.2f} s, a plain file {writing:.2f} s")
    finish(
        {
            "benchmark": "checkpoint",
            "quick": values.quick,
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "megabytes": megabytes,
            "rounds": rounds,
            **result,
            "ratio": ratio,
            "bar": {"needed": NEEDED, "met": ratio > NEEDED},
            "sha256_seconds": hashing,
            "plain_seconds": writing,
        },
        values.save,
    )


if __name__ == "__main__":
    main()
