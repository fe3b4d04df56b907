"""A training that goes wrong where it is told: a tiny module, and callbacks that see what becomes of it."""

from __future__ import annotations

import copy
import csv
import math
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from data_shards.batch import TripletBatch
from data_shards.datamodule import TripletDataModule
from trainer.callbacks import EMA, RankTimes, RunCheckpoint, SampleTrace, StepGuard
from trainer.distributed import FSDP2
from trainer.modules.optimization import RateSchedule, adamw
from trainer.modules.scoring import ScoredModule
from trainer.modules.tuned import TunedModule
from trainer.ranks import every_rank
from trainer.run import Run

Fault = Callable[[int, int, TripletBatch], str]
"""By step and rank: ``layer``, ``gradient``, ``once``, ``spike`` or ``sleep``; or nothing."""
LAYER = "model.blocks.5.0"


class Network(nn.Module):
    """Twelve blocks, (B, 1, H, W) to (B, 2, H', W')."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh()) for _ in range(12)))

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.blocks(nn.functional.avg_pool2d(images, 4).expand(-1, 2, -1, -1))
        return found

    def block_kinds(self) -> dict[str, list[nn.Module]]:
        return {"block": list(self.blocks)}


class Faulty(TunedModule):
    """Goes wrong where it is told."""

    def __init__(self, fault: Fault) -> None:
        ScoredModule.__init__(self)
        self.model = Network()  # type: ignore[assignment]
        self.schedule = RateSchedule("cosine", 2)
        self.fault, self.now = fault, ""
        self.get_submodule(LAYER).register_forward_hook(
            lambda part, inputs, output: output * math.nan if self.now == "layer" else output
        )

    def training_step(self, batch: TripletBatch, batch_idx: int) -> Tensor:
        self.now = self.fault(self.global_step, self.global_rank, batch)
        time.sleep(0.3 if self.now == "sleep" else 0.0)
        truth = torch.stack([mask.float().mean() for mask in batch.masks]).mean()
        images = torch.stack(batch.images).float() / 255
        loss = (self.model(images).mean() - truth).square() + 0.1 * self.model(images).std()
        self.log("train/loss", loss)
        if self.now == "gradient" and loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * math.inf)
        if self.now == "once" and loss.requires_grad:
            loss = loss * math.nan
        return loss * 100 if self.now == "spike" else loss

    def configure_optimizers(self) -> Any:
        groups = [{"params": list(self.parameters()), "lr": 1e-2, "weight_decay": 0.1}]
        return adamw(groups, (0.9, 0.999), self.schedule, self._total_steps())


class Watch(Callback):
    """Keeps weights, moments, average, rate and what was logged after every step; breaks down at one if told."""

    def __init__(self, kill: int = -1) -> None:
        self.kill = kill
        self.after: dict[int, dict[str, Any]] = {}

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.kill:
            raise RuntimeError("killed")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        average: dict[str, Tensor] = next((c.average for c in trainer.callbacks if isinstance(c, EMA)), {})
        learning = dict(pl_module.named_parameters())
        state = trainer.optimizers[0].state
        self.after[trainer.global_step] = {
            "weights": {name: whole(parameter) for name, parameter in learning.items()},
            "moments": {
                f"{name} {key}": whole(value) for name, p in learning.items() for key, value in state[p].items()
            },
            "average": {name: whole(tensor) for name, tensor in average.items()},
            "rate": trainer.optimizers[0].param_groups[0]["lr"],
            "logged": {name: float(value) for name, value in trainer.callback_metrics.items()},
        }


def whole(tensor: Tensor) -> Tensor:
    return copy.deepcopy((tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach())


def fit(
    shards: Path,
    root: Path,
    guard: StepGuard | None,
    fault: Fault,
    epochs: int = 2,
    every: int = 1,
    kill: int = -1,
    micro: int = 2,
    callbacks: Sequence[Callback] = (),
    **arguments: Any,
) -> dict[int, dict[str, Any]]:
    """Train for epochs of three steps of four images, on from the last checkpoint; what there was after each step."""
    seed_everything(0)
    run = Run(root)
    run.root.mkdir(exist_ok=True)
    last = run.checkpoints / "last.ckpt"
    watch = Watch(kill)
    trainer = Trainer(
        **{"devices": 1, "max_epochs": epochs, "gradient_clip_val": 0.1, "log_every_n_steps": 1, **arguments},
        accelerator="cpu",
        default_root_dir=root,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            RunCheckpoint(every, dirpath=str(run.checkpoints)),
            *(SampleTrace(), *([guard] if guard else []), *callbacks, EMA(0.9), watch),
        ],
    )
    data = TripletDataModule(train=str(shards / "train"), batch_size=4, micro_batch_size=micro, seed=0)
    resumed = str(last) if last.exists() else None
    trainer.fit(Faulty(fault), datamodule=data, ckpt_path=resumed, weights_only=True)
    return watch.after


def rank_main(shards: str, root: str, ranks: int, strategy: str, fault: Fault, guard: dict[str, Any], **_: Any) -> None:
    """Train as one of some ranks; what the first saw is left in ``found.pt``, what all said in ``said.txt``."""
    told: dict[str, Any] = {"devices": ranks, "strategy": FSDP2() if strategy == "fsdp2" else strategy}
    place = Path(root)
    with (place / "said.txt").open("a", buffering=1) as file, redirect_stderr(file):
        times = [RankTimes(slow=1.2, patience=4)]
        found = fit(Path(shards), place, StepGuard(**guard), fault, micro=1, epochs=3, callbacks=times, **told)
    every = every_rank(found[max(found)]["weights"])
    assert all(torch.equal(every[0][name], part[name]) for part in every for name in part), "ranks differ"
    if torch.distributed.get_rank() == 0:
        torch.save(found, place / "found.pt")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def assert_equal(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_equal(found[name], value)
    else:
        assert found == expected


def assert_learnt(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert all(not torch.equal(after["weights"][name], tensor) for name, tensor in before["weights"].items())
