"""What does a training step take at full size: plain, sharded, with recomputed blocks, with compiled blocks?

python benchmarks/sharded_step.py                                  # all, on the GPUs there are; half an hour
python benchmarks/sharded_step.py --families sam3 --images 1       # one family, one image a device
python benchmarks/sharded_step.py --ways plain fsdp2 --devices 2   # two ways, the sharded one on two GPUs
python benchmarks/sharded_step.py --quick                          # tiny models, on a CPU too: a minute or two

Whole steps of Lightning's trainer in bf16-mixed: the batch's way to the device, forward pass, loss, backward pass, the
gradients' norm, AdamW. Every parameter learns that the family's default has learning. Weights are random, images are
noise with discs, and nothing drops out, so that all ways begin with the same loss: what they may differ by is rounding.

Families, with what a device gets in a step (--images changes the first number):
  medsam      MedSAM ViT-B at 1024 px: 4 images with 4 boxes each
  sam2        SAM2.1 base_plus at 512 px: 2 clips of 8 frames, in each 2 things followed through the memory from a box
  sam3        SAM3 at 1008 px: 4 images with 4 terms of two instances each, masks learnt
  litemedsam  LiteMedSAM at 256 px: 32 images with 4 boxes each

Ways, each in processes of its own, so that no peak is another's:
  plain       one device
  fsdp2       trainer.distributed.FSDP2 on --devices devices; on one, what its bookkeeping costs. Each device gets as
              many images as the plain one, the same ones
  recompute   one device, every kind of block computed a second time (checkpoint_activations: true)
  compile     one device, the image encoder's blocks compiled (CompileBlocks); nothing is taken from an earlier run
  all         fsdp2, recompute and compile together

What to read: "ms/step" is the median after two steps that do not count; "first step" has the compilation in it; "peak"
is what PyTorch had allocated at once on the fullest GPU, with weights and optimiser (on a CPU what was resident in the
process, with all that was imported); "first norm" is that of the first step's gradients, which shows a wrong backward
pass, as the loss does not. A way that does not fit says "out of memory", and the others go on. The lines are a table in
Markdown: a heading with the machine above it makes a file for benchmarks/results.

It ends with status 1 where a way broke down, or where losses of the first step differ by more than 2 %.

The last line is one JSON object:
  benchmark  "sharded_step"
  quick      whether --quick was given
  device     what it ran on; null where nothing ran
  torch      its version
  steps      that count, in each way
  families   by family {"image_size", "images" (or frames) of a device, "parameters", "largest_difference" of the first
             step's losses relative to the first way's (null below two ways), "ways"}, the last by way {"devices",
             "step_ms", "images_per_second" of all devices, "peak_gib", "first_step_seconds", "first_loss",
             "first_norm", "ended": null, "out of memory", or what went wrong}; null where it ended so
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from itertools import pairwise
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.multiprocessing
from index import peak_mb
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.plugins.environments import LightningEnvironment
from measuring import finish, rounded, say
from scaling import Same, free_port
from step_sam3 import TINY, batch_of

from data_shards.batch import TripletBatch
from trainer.callbacks import CompileBlocks
from trainer.distributed import FSDP2
from trainer.losses import SetPredictionLoss
from trainer.models import SAM3, LiteMedSAM, MedSAM, SAM2Shape
from trainer.models.medsam import ViT
from trainer.modules import MedSAMModule, SAM2Module, SAM3Module

WARM = 2
"""Steps that do not count."""
CLOSE = 0.02
"""By how much losses of the first step may differ: bf16 has eight bits, and a compiled block rounds less often."""
MEASURES = ("step_ms", "images_per_second", "peak_gib", "first_step_seconds", "first_loss", "first_norm")


@dataclass(frozen=True)
class Way:
    """How a step is computed."""

    sharded: bool = False
    recompute: bool = False
    compiled: bool = False


WAYS = {
    "plain": Way(),
    "fsdp2": Way(sharded=True),
    "recompute": Way(recompute=True),
    "compile": Way(compiled=True),
    "all": Way(sharded=True, recompute=True, compiled=True),
}


@dataclass(frozen=True)
class Family:
    """A family's model, and what it learns from in a step.

    Attributes:
        module: Makes its training module, told whether it is tiny and whether blocks are computed a second time.
        side: Pixels of its input, and with --quick.
        images: Images of a device, and with --quick; clips where there are frames.
        terms: Terms in an image, each of them shown by two discs.
        frames: Frames of a clip, and with --quick.
    """

    module: Callable[[bool, bool], Any]
    side: tuple[int, int]
    images: tuple[int, int]
    terms: int
    frames: tuple[int, int] = (1, 1)


def medsam(tiny: bool, recompute: bool) -> MedSAMModule:
    shape = ViT(width=32, depth=3, heads=2, global_blocks=(1,), window=3)
    side = FAMILIES["medsam"].side[tiny]
    return MedSAMModule(MedSAM(shape if tiny else "vit_b", side, weights=None, checkpoint_activations=recompute))


def litemedsam(tiny: bool, recompute: bool) -> MedSAMModule:
    side = FAMILIES["litemedsam"].side[tiny]
    return MedSAMModule(LiteMedSAM(side, weights=None, checkpoint_activations=recompute))


def sam2(tiny: bool, recompute: bool) -> SAM2Module:
    from trainer.models import SAM2

    shape = SAM2Shape(
        embed_dim=16, stages=(1, 2, 2, 1), global_blocks=(4,), window_spec=(8, 4, 4, 2), background=4, width=32,
        memory_width=16, memory_layers=1, feedforward=64,
    )  # fmt: skip
    side = FAMILIES["sam2"].side[tiny]
    model = SAM2(shape if tiny else "base_plus", side, weights=None, dropout=0.0, checkpoint_activations=recompute)
    return SAM2Module(model)


def sam3(tiny: bool, recompute: bool) -> SAM3Module:
    side = FAMILIES["sam3"].side[tiny]
    model = SAM3(
        TINY if tiny else None, side, weights=None, dropout=0.0, drop_path=0.0, checkpoint_activations=recompute
    )
    # scaled by the prompts of all ranks, as it is in recipes, the loss would rise with the devices
    loss = SetPredictionLoss(mask_weight=200.0, dice_weight=10.0, mask_chunk=32, scale_by_prompts=False)
    return SAM3Module(model, loss=loss)


FAMILIES = {
    "medsam": Family(medsam, (1024, 64), (4, 2), 2),
    "sam2": Family(sam2, (512, 64), (2, 1), 2, (8, 3)),
    "sam3": Family(sam3, (1008, 112), (4, 2), 4),
    "litemedsam": Family(litemedsam, (256, 32), (32, 2), 2),
}


def made(images: int, terms: int, side: int, frames: int) -> TripletBatch:
    """A batch of images, or of clips where there are frames."""
    batch = batch_of(images * frames, terms, side)
    if frames == 1:
        return batch
    numbers = [image // frames for image in range(images * frames)]
    return replace(batch, frames=frames, anchors=[0] * images, numbers=numbers)


class Clock(Callback):
    """Notes when steps are done, and loss and gradients' norm of the first."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self.first_loss = 0.0
        self.first_norm: float | None = None

    def judge(self, norm: torch.Tensor) -> bool:
        """Note the first norm; every step is taken."""
        self.first_norm = float(norm) if self.first_norm is None else self.first_norm
        return True

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Begin."""
        if not self.marks:
            self.marks.append(now())

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *_: Any) -> None:
        """Note when a step was done."""
        self.marks.append(now())
        if len(self.marks) == 2:
            self.first_loss = float(outputs["loss"])


def now() -> float:
    """Seconds by the clock, with nothing under way on the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def rank_main(rank: int, port: int, asked: dict[str, Any], out: str) -> None:
    """Train as one rank, and leave what was found in a file."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK="0", LOCAL_RANK=str(rank))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(out, "compiled"))
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    quick, on_gpu = asked["quick"], torch.cuda.is_available()
    if not on_gpu and (quick or asked["devices"] > 1):
        torch.set_num_threads(1)
    way, family, clock = WAYS[asked["way"]], FAMILIES[asked["family"]], Clock()
    side, frames, steps = family.side[quick], family.frames[quick], asked["steps"] + WARM
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        seed_everything(0)
        module = family.module(quick, way.recompute)
        module.judge = clock.judge
        parameters = sum(p.numel() for p in module.parameters())
        # code generation takes longer than all the rest of --quick
        compiling = [CompileBlocks(backend="eager" if quick else "inductor")] if way.compiled else []
        trainer = Trainer(
            accelerator="gpu" if on_gpu else "cpu", devices=asked["devices"], precision="bf16-mixed",
            strategy=FSDP2() if way.sharded else "auto", plugins=[LightningEnvironment()], max_steps=steps,
            callbacks=[*compiling, clock], gradient_clip_val=1.0, logger=False, use_distributed_sampler=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=out,
        )  # fmt: skip
        trainer.fit(module, Same(made(asked["images"], family.terms, side, frames), steps))
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_mb() * 1e6
    step = median(after - before for before, after in pairwise(clock.marks[WARM:]))
    if rank == 0:
        found = {
            "device": torch.cuda.get_device_name() if on_gpu else "CPU",
            "parameters": parameters,
            "step_ms": 1000 * step,
            "images_per_second": asked["devices"] * asked["images"] * frames / step,
            "first_step_seconds": clock.marks[1] - clock.marks[0],
            "first_loss": clock.first_loss,
            "first_norm": clock.first_norm,
        }
        Path(out, "found.json").write_text(json.dumps(found))
    Path(out, f"peak-{rank}").write_text(str(peak / 2**30))


def measured(asked: dict[str, Any]) -> dict[str, Any]:
    """What a step of a family takes in a way, or how that ended."""
    # a process that has asked the driver for its GPUs cannot be forked
    method = "spawn" if torch.cuda.is_available() else "fork"
    with tempfile.TemporaryDirectory() as out:
        try:
            torch.multiprocessing.start_processes(
                rank_main, (free_port(), asked, out), nprocs=asked["devices"], start_method=method
            )
        except (torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException) as error:
            return {**dict.fromkeys(MEASURES), "ended": why(str(error))}
        found: dict[str, Any] = json.loads(Path(out, "found.json").read_text())
        peak = max(float(path.read_text()) for path in Path(out).glob("peak-*"))
    if not isfinite(found["first_loss"]):
        return {**dict.fromkeys(MEASURES), "ended": "the loss is no number"}
    return {**found, "peak_gib": peak, "ended": None}


def why(trace: str) -> str:
    """How a process ended, on one line."""
    if "OutOfMemoryError" in trace or "can't allocate memory" in trace or "SIGKILL" in trace:
        return "out of memory"
    lines = [line.strip() for line in trace.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
    return re.sub(r"^[\w.]*\.", "", (errors or lines)[-1]) or "no reason given"


def show(way: str, devices: int, row: dict[str, Any]) -> None:
    """Print a way's line of the table."""
    cells = [
        "–"
        if value is None
        else f"{value:.6f}"
        if name in ("first_loss", "first_norm")
        else f"{rounded(float(value)):g}"
        for name, value in ((name, row[name]) for name in MEASURES)
    ]
    print("|", " | ".join([way, str(devices), *cells, row["ended"] or ""]), "|", flush=True)


def measured_family(name: str, values: argparse.Namespace) -> dict[str, Any]:
    """What a step of a family takes in all ways that were asked for."""
    family, quick = FAMILIES[name], values.quick
    images, frames = values.images or family.images[quick], family.frames[quick]
    each = f"{images} clips of {frames} frames" if frames > 1 else f"{images} images"
    print(f"\n{name} at {family.side[quick]} px, {each} a device\n")
    print("| way | devices | ms/step | images/s | peak GiB | first step s | first loss | first norm | |")
    print("|" + "---|" * 9)
    ways: dict[str, dict[str, Any]] = {}
    for way in values.ways:
        devices = values.devices if WAYS[way].sharded else 1
        say(f"{name}: {way}")
        row = measured(
            {"family": name, "way": way, "devices": devices, "images": images, "steps": values.steps, "quick": quick}
        )
        show(way, devices, row)
        ways[way] = {"devices": devices, **row}
    ran = [row for row in ways.values() if row["ended"] is None]
    found = {
        "image_size": family.side[quick],
        "images": images * frames,
        "parameters": ran[0]["parameters"] if ran else None,
        "largest_difference": largest_difference([row["first_loss"] for row in ran]),
        "device": ran[0]["device"] if ran else None,
        "ways": {way: {key: row[key] for key in ("devices", *MEASURES, "ended")} for way, row in ways.items()},
    }
    if found["largest_difference"] is not None:
        norms = largest_difference([row["first_norm"] for row in ran])
        print(f"\nfirst step: losses {found['largest_difference']:.2g} apart at most, relatively; norms {norms:.2g}")
    return found


def largest_difference(values: Sequence[float]) -> float | None:
    """By how much the first of some values and another differ at most, relatively."""
    return max((abs(value - values[0]) / abs(values[0]) for value in values[1:]), default=None)


def options() -> argparse.Namespace:
    """Read the command line."""
    there = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models and 3 steps: whether it runs, not how fast")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="which; all by default")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="which; all by default")
    parser.add_argument("--steps", type=int, default=0, help="steps that count, in each way; 10 by default")
    parser.add_argument(
        "--images", type=int, default=0, help="images (SAM2: clips) of each device in a step; see above"
    )
    parser.add_argument(
        "--devices", type=int, default=there or 1, help="devices of fsdp2 and all; all GPUs by default, on a CPU 1"
    )
    values = parser.parse_args()
    if min(values.devices, values.steps + 1, values.images + 1) < 1:
        parser.error("--devices, --steps and --images are 1 or more")
    if there and values.devices > there:
        parser.error(f"--devices {values.devices}: there are {there} GPUs")
    values.steps = values.steps or (3 if values.quick else 10)
    if not there and not values.quick:
        say("sharded_step: there is no GPU, and a step at full size takes minutes here; --quick runs tiny models")
    return values


def main() -> None:
    values = options()
    families = {name: measured_family(name, values) for name in values.families}
    devices = [family.pop("device") for family in families.values()]
    broken = [
        f"{name}, {way}: {row['ended']}"
        for name, family in families.items()
        for way, row in family["ways"].items()
        if row["ended"] not in (None, "out of memory")
    ]
    apart = [f"{name}: losses differ" for name, found in families.items() if (found["largest_difference"] or 0) > CLOSE]
    head = {"benchmark": "sharded_step", "quick": values.quick, "torch": torch.__version__, "steps": values.steps}
    print()
    finish({**head, "device": next(filter(None, devices), None), "families": families})
    if broken or apart:
        raise SystemExit("\n".join([*broken, *apart]))


if __name__ == "__main__":
    main()
