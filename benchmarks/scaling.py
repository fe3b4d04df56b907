"""How does a training step scale over ranks: measured on this machine's cores, projected to 1,000 GPUs?

python benchmarks/scaling.py            # some four minutes; figures mean something on an idle machine

Measured: Lightning's trainer with DDP and with FSDP2 on 1, 2 and 4 ranks that talk through gloo, a real but small
model (LiteMedSAM at 128 px with random weights), fp32. Weak scaling keeps the images of a rank, strong scaling those of
a step. Ranks beyond the machine's cores share them, so beside images a second stand images per core-second: what the
ranks' talking costs in work, whatever the cores.

The projection's assumptions are options below; benchmarks/projection.py, which also runs by itself, says what it takes
them for, and prints its arithmetic line by line.

The last line is one JSON object:
  benchmark       "scaling"
  quick           whether --quick was given
  cores           that the measurement could use
  load            processes that ran or waited when it began, this one included
  model           what was measured
  gradient_bytes  of it, counted
  weak            by strategy and ranks {"images", "step_seconds", "images_per_second", "efficiency" (1: as many times
                  one rank's rate), "efficiency_on_cores" (1: one rank's rate as many times as ranks have a core each),
                  "efficiency_per_core_second"}
  strong          the same, with all ranks sharing the images of one
  wire            by ranks, of DDP: {"counted_bytes", "measured_bytes"} that all ranks send in a step (null where the
                  system does not tell; other programs' may be among them), "all_reduce_seconds" of the gradients
                  alone, and "predicted_seconds" of a weak step: one rank's, as often as ranks share a core, and that
  assumed, counted, projected  as of benchmarks/projection.py
"""

from __future__ import annotations

import argparse
import io
import json
import os
import socket
import tempfile
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.multiprocessing
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from measuring import finish, say
from projection import add_options, projected
from step_sam3 import batch_of
from torch.utils.data import DataLoader

from data_shards.batch import TripletBatch
from trainer.distributed import FSDP2
from trainer.models import LiteMedSAM, MedSAM
from trainer.models.medsam import ViT
from trainer.modules import MedSAMModule
from trainer.ranks import every_rank

RANKS = (1, 2, 4)
WARM = 2
"""Steps that do not count."""


class Same(LightningDataModule):
    """The same batch again and again."""

    def __init__(self, batch: TripletBatch, steps: int) -> None:
        super().__init__()
        self.batches, self.clip_length = [batch] * steps, batch.frames

    def train_dataloader(self) -> DataLoader[Any]:
        """As often as there are steps."""
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type] # a list is a data set

    def without_targets(self, split: str) -> int:
        """All of its images have targets."""
        return 0


class Clock(Callback):
    """Times steps by the clock and by the cores' work, and counts what went over the loopback device."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float, int | None]] = []
        self.found: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Note when a step was done."""
        self.marks.append((time.perf_counter(), time.process_time(), sent()))

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        """Ask the other ranks, and time what they do together."""
        marks, steps = self.marks[WARM - 1 :], len(self.marks) - WARM
        work = every_rank((marks[-1][1] - marks[0][1]) / steps)
        learnt = [p for p in module.parameters() if p.requires_grad]
        self.found = {
            "step_seconds": median(after[0] - before[0] for before, after in pairwise(marks)),
            "core_seconds": sum(work),
            "measured_bytes": None if marks[0][2] is None else (marks[-1][2] - marks[0][2]) / steps,  # type: ignore[operator]
            "all_reduce_seconds": all_reduce_seconds(sum(p.numel() for p in learnt)) if trainer.world_size > 1 else 0.0,
            "gradient_bytes": 4 * sum(p.numel() for p in learnt),
        }


def sent() -> int | None:
    """Bytes that were sent through the loopback device since the machine started; None where it does not say."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:")), None)


def all_reduce_seconds(count: int) -> float:
    """Median time in which the ranks add up so many numbers."""
    numbers, times = torch.zeros(count), []
    for _ in range(4):
        torch.distributed.barrier()
        started = time.perf_counter()
        torch.distributed.all_reduce(numbers)
        times.append(time.perf_counter() - started)
    return median(times[1:])


def rank_main(rank: int, port: int, ranks: int, strategy: str, images: int, steps: int, quick: bool, out: str) -> None:
    """Train as one rank: Lightning takes processes that its environment names as started by others."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK="0", LOCAL_RANK=str(rank))
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        seed_everything(0)
        model: Any = LiteMedSAM(128, weights=None)
        if quick:
            model = MedSAM(ViT(width=32, depth=2, heads=2, global_blocks=(1,), window=3), 64, weights=None)
        clock = Clock()
        trainer = Trainer(
            accelerator="cpu", devices=ranks, max_steps=steps + WARM, logger=False, callbacks=[clock],
            strategy="auto" if ranks == 1 else FSDP2() if strategy == "fsdp2" else strategy,
            use_distributed_sampler=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=out,
        )  # fmt: skip
        trainer.fit(MedSAMModule(model), Same(batch_of(images, 1, model.preprocessing.image_size), steps + WARM))
    if rank == 0:
        Path(out, "found.json").write_text(json.dumps(clock.found))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def measured(ranks: int, strategy: str, images: int, steps: int, quick: bool) -> dict[str, Any]:
    """What a step takes on some ranks with so many images each."""
    say(f"{strategy}: {ranks} ranks of {images} images")
    with tempfile.TemporaryDirectory() as out:
        arguments = (free_port(), ranks, strategy, images, steps, quick, out)
        torch.multiprocessing.start_processes(rank_main, arguments, nprocs=ranks, start_method="fork")
        found: dict[str, Any] = json.loads(Path(out, "found.json").read_text())
    return {"images": ranks * images, **found}


def compared(rows: dict[int, dict[str, Any]], cores: int) -> dict[str, dict[str, Any]]:
    """Rates by ranks, and how they compare with one rank's."""
    rates = {ranks: row["images"] / row["step_seconds"] for ranks, row in rows.items()}
    work = {ranks: row["images"] / row["core_seconds"] for ranks, row in rows.items()}
    return {
        str(ranks): {
            "images": row["images"],
            "step_seconds": row["step_seconds"],
            "images_per_second": rates[ranks],
            "efficiency": rates[ranks] / (ranks * rates[1]),
            "efficiency_on_cores": rates[ranks] / (min(ranks, cores) * rates[1]),
            "efficiency_per_core_second": work[ranks] / work[1],
        }
        for ranks, row in rows.items()
    }


def reckoned(ranks: int, row: dict[str, Any], alone: float, cores: int) -> dict[str, Any]:
    """What was measured of DDP, and what goes over the wire and how long a step takes if nothing is hidden."""
    return {
        "measured_bytes": row["measured_bytes"],
        "all_reduce_seconds": row["all_reduce_seconds"],
        "counted_bytes": 2 * (ranks - 1) * row["gradient_bytes"],
        "predicted_seconds": alone * max(1, ranks / cores) + row["all_reduce_seconds"],
    }


def show(kind: str, tables: dict[str, dict[str, dict[str, Any]]]) -> None:
    for strategy, rows in tables.items():
        for ranks, row in rows.items():
            print(
                f"measured  {kind:6} {strategy:5} {ranks} ranks, {row['images']} images a step: "
                f"{row['step_seconds']:.3f} s, {row['images_per_second']:.2f} images/s, efficiency "
                f"{row['efficiency']:.2f}, on these cores {row['efficiency_on_cores']:.2f}, per core-second "
                f"{row['efficiency_per_core_second']:.2f}"
            )


def measure_all(steps: int, quick: bool, cores: int) -> dict[str, Any]:
    """All that is measured: what the last line has of it."""
    images = 4
    alone = {kept: measured(1, "ddp", kept, steps, quick) for kept in (images // 2, images)}
    weak, strong, wire = {}, {}, {}
    for strategy in ("ddp", "fsdp2"):
        more = {ranks: measured(ranks, strategy, images // 2, steps, quick) for ranks in RANKS[1:]}
        split = {ranks: measured(ranks, strategy, images // ranks, steps, quick) for ranks in RANKS[1:]}
        weak[strategy] = compared({1: alone[images // 2], **more}, cores)
        strong[strategy] = compared({1: alone[images], **split}, cores)
        if strategy == "ddp":
            wire = {str(n): reckoned(n, row, alone[images // 2]["step_seconds"], cores) for n, row in more.items()}
    return {"gradient_bytes": alone[images]["gradient_bytes"], "weak": weak, "strong": strong, "wire": wire}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps, under a minute on two cores")
    add_options(parser)
    parser.add_argument("--steps", type=int, default=0, help=argparse.SUPPRESS)
    values = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0]
    found = measure_all(values.steps or (3 if values.quick else 6), values.quick, cores)
    name = "MedSAM, ViT of width 32 at 64 px" if values.quick else "LiteMedSAM at 128 px"
    print(f"measured on {cores} cores, load {load:.1f} at the beginning: {name}, random weights, fp32, gloo")
    show("weak", found["weak"])
    show("strong", found["strong"])
    for ranks, row in found["wire"].items():
        seen = "unknown" if row["measured_bytes"] is None else f"{row['measured_bytes'] / 1e6:.1f} MB"
        print(
            f"wire      ddp   {ranks} ranks: 2 × ({ranks} − 1) × {found['gradient_bytes'] / 1e6:.1f} MB = "
            f"{row['counted_bytes'] / 1e6:.1f} MB a step counted, {seen} measured; all-reduce alone "
            f"{row['all_reduce_seconds']:.3f} s measured: a weak step of {row['predicted_seconds']:.3f} s predicted"
        )
    print()
    head = {"benchmark": "scaling", "quick": values.quick, "cores": cores, "load": load, "model": name}
    finish({**head, **found, **projected(values)})


if __name__ == "__main__":
    main()
