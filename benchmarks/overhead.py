"""What does Lightning, with all that our runs record, cost a training step?

python benchmarks/overhead.py           # LiteMedSAM at 256 px: some five minutes on two cores
python benchmarks/overhead.py --quick   # at 128 px, under a minute

A real `lightning.Trainer.fit` over shards, with every callback that `trainer fit` adds, its CSV log and its lines of
progress, a log at every step, the loader in the same process; no evaluation and no checkpoint. The reference is a bare
loop of a copy of the same model over the same batches: resizing, prompts, encode, decode, loss, backward, AdamW, and
nothing else. They take turns step by step in one process, so that what slows the machine down hits both, and learn the
same: the losses are compared. `plain` is the same against the plainest Trainer: without logger and callbacks.

The last line is one JSON object:
  benchmark        "overhead"
  quick            whether --quick was given
  device           what it ran on
  image_size       side of the model's input in pixels
  batch            images in a step, each with one mask
  steps            that count, of each
  threads          that torch uses on the CPU
  precision        that both compute in
  step_ms          {"bare", "run", "plain"}: medians; `bare` is the one beside `run`
  loss_difference  largest difference of the two losses in any step, relative
  overhead         share of a bare step that a run's takes longer, median over the steps
  mean_overhead    the same of all steps together: with what happens only now and then
  plain_overhead   as `overhead`, of the plainest Trainer
  ratio            images a second, a run's over the bare loop's, median over the steps
  bar              {"value", "needed" (at most), "met"} of `overhead`
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from copy import deepcopy
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from measuring import arguments, device, finish, say, settle
from steps import discs
from torch import Tensor

from data_shards.batch import TripletBatch
from data_shards.datamodule import TripletDataModule
from data_shards.scan import write_index
from data_shards.triplet import Provenance, Target, Triplet
from data_shards.writer import ShardWriter
from trainer.losses import resize_logits
from trainer.models import LiteMedSAM
from trainer.modules import MedSAMModule
from trainer.modules.optimization import adamw
from trainer.prompts import BoxPrompts
from trainer.tuning import FullTuning

NEEDED = 0.03
WARM = 2
"""Steps that do not count."""
SAMPLES = 32


def write(folder: Path, side: int) -> Path:
    """Shards of noise with a disc each."""
    origin = Provenance("noise", "0" * 16, "0" * 16, "MR", "0" * 64)
    with ShardWriter(folder, SAMPLES, 2**40) as writer:
        for number in range(SAMPLES):
            batch = discs([1], side, number)
            target = Target.from_mask(batch.masks[0].numpy() > 0, "disc")
            triplet = Triplet("any", batch.images[0][0].numpy(), (target,), ("disc",), origin)
            writer.write(f"noise-{number:04d}", triplet.encode("zstd"))
    write_index(folder)
    return folder


class BareLoop:
    """A training loop with nothing around it, over a copy of a module's model."""

    def __init__(self, module: MedSAMModule) -> None:
        self.model, self.prompts, self.loss = deepcopy(module.model).train(), module.prompts, module.loss
        groups = module.tuning.parameter_groups(self.model, module.lr, module.weight_decay, module.decay)
        self.optimizer = adamw(groups, module.betas, module.schedule, 1)["optimizer"]

    def __call__(self, batch: TripletBatch, epoch: int, place: torch.device) -> Tensor:
        """Take a step; returns its loss. Each image has one target, so the mean over targets is that over images."""
        from trainer.prompts import Truth

        preprocessing = self.model.preprocessing
        boxes, sizes = preprocessing.boxes(batch.boxes, batch.sizes)
        masks = preprocessing.masks(batch.masks, place)
        (asked,) = self.prompts.first(Truth(batch.image_index, boxes, sizes, masks, batch.draws), epoch)
        features = self.model.encode(preprocessing.images(batch.images, place))
        logits, _ = self.model.decode(features, asked.to(place))
        loss = self.loss(resize_logits(logits[:, 0], masks.shape[-2:]), masks)["loss"].mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


@dataclass
class Turns(Callback):
    """Runs a step of the bare loop after each of the trainer's, and times both.

    Attributes:
        bare: The loop.
        seconds: Of each pair of steps: the trainer's, all that it does between two steps included, and the loop's.
        losses: Of each pair of steps.
    """

    bare: BareLoop
    seconds: list[tuple[float, float]] = field(default_factory=list)
    losses: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    since: float = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The trainer's step has ended: it is the loop's turn."""
        settle(pl_module.device)
        between = time.perf_counter()
        loss = self.bare(batch, trainer.current_epoch, pl_module.device)
        settle(pl_module.device)
        after = time.perf_counter()
        self.seconds.append((between - self.since, after - between))
        self.losses.append((outputs["loss"].detach(), loss))
        self.since = time.perf_counter()

    def counted(self) -> list[tuple[float, float]]:
        """The pairs that count."""
        return self.seconds[WARM:]

    def overhead(self) -> float:
        """Share of a bare step by which the trainer's is longer."""
        return median(one / other for one, other in self.counted()) - 1

    def apart(self) -> float:
        """Largest relative difference of two losses."""
        return max(abs(float(one - other)) / abs(float(other)) for one, other in self.losses)


def recorded(folder: Path) -> dict[str, Any]:
    """What `trainer fit` gives its trainer besides a recipe's own."""
    from trainer.callbacks import ProgressLines
    from trainer.lightning_cli import EVERY_RUN

    callbacks = [*(kind() for kind in EVERY_RUN), ProgressLines()]
    return {"callbacks": callbacks, "logger": CSVLogger(folder, name="logs", flush_logs_every_n_steps=1)}


def fitted(shards: Path, folder: Path, side: int, batch: int, steps: int, more: dict[str, Any]) -> Turns:
    """Train for some steps, in turn with a bare loop."""
    seed_everything(0, verbose=False)
    tuning = FullTuning(freeze=["prompt_encoder"])
    module = MedSAMModule(LiteMedSAM(side, weights=None), tuning, BoxPrompts(5), lr=1e-4).to(device())
    turns = Turns(BareLoop(module))
    data = TripletDataModule(train=str(shards), batch_size=batch, micro_batch_size=batch, targets_per_image=1)
    on_gpu = device().type == "cuda"
    settings: dict[str, Any] = {
        "default_root_dir": folder,
        "callbacks": [*more.pop("callbacks", []), turns],
        "accelerator": "gpu" if on_gpu else "cpu",
        "devices": 1,
        "precision": "bf16-mixed" if on_gpu else "32-true",
        "max_steps": steps + WARM,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        **dict.fromkeys(("enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False),
    }
    with warnings.catch_warnings(), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        Trainer(**settings, **more).fit(module, datamodule=data)
    return turns


def main() -> None:
    values = arguments(__doc__, side=0, batch=0, steps=0)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    side = values.side or (128 if values.quick else 256)
    batch = values.batch or 1
    steps = values.steps or (6 if values.quick else 20)
    on_gpu = device().type == "cuda"
    ways: dict[str, Callable[[Path], dict[str, Any]]] = {"run": recorded, "plain": lambda _: {"logger": False}}
    found: dict[str, Turns] = {}
    with tempfile.TemporaryDirectory() as name:
        shards = write(Path(name, "shards"), side)
        for way, more in ways.items():
            say(f"{way}: {steps} steps")
            folder = Path(name, way)
            folder.mkdir()
            found[way] = fitted(shards, folder, side, batch, steps, more(folder))
            print(f"{way}: {found[way].overhead():+.2%} of a bare step", flush=True)
    run, plain = found["run"], found["plain"]
    times = list(zip(*run.counted(), strict=True))
    overhead = run.overhead()
    apart = max(run.apart(), plain.apart())
    if apart > 1e-3 and not on_gpu:
        raise SystemExit(f"overhead: losses differ by {apart:.2g}: the two do not do the same")
    finish(
        {
            "benchmark": "overhead",
            "quick": values.quick,
            "device": torch.cuda.get_device_name() if on_gpu else "CPU",
            "image_size": side,
            "batch": batch,
            "steps": steps,
            "threads": torch.get_num_threads(),
            "precision": "bf16" if on_gpu else "fp32",
            "step_ms": {
                "bare": 1e3 * median(times[1]),
                "run": 1e3 * median(times[0]),
                "plain": 1e3 * median(one for one, _ in plain.counted()),
            },
            "loss_difference": apart,
            "overhead": overhead,
            "mean_overhead": sum(times[0]) / sum(times[1]) - 1,
            "plain_overhead": plain.overhead(),
            "ratio": 1 / (1 + overhead),
            "bar": {"value": overhead, "needed": NEEDED, "met": overhead <= NEEDED},
        },
        values.save,
    )


if __name__ == "__main__":
    main()
