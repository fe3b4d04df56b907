"""What a real training on the CPU holds at its peak, and what the plan said before, on one process or on some ranks.

The reference knows nothing of the prediction: what is there before the fit, and what the allocator gives out and takes
back in it, as torch's profiler sees it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import trainer.tuning
from data_shards.datamodule import TripletDataModule
from trainer import rehearsal
from trainer.callbacks import EMA
from trainer.distributed import FSDP2
from trainer.models import SAM3, LiteMedSAM, MedSAM
from trainer.models.medsam import ViT
from trainer.modules import MedSAMModule, SAM3Module
from trainer.plan.activations import pass_bytes
from trainer.plan.memory import parts, sharing_of


def math_attention(*args: Any, **kwargs: Any) -> Tensor:
    """The plain form, which the CPU can be told to take: it has no other with a bias that learns."""
    found: Tensor = torch.ops.aten._scaled_dot_product_attention_math(*args, **kwargs)[0]
    return found


def medsam(side: int, width: int = 32, **arguments: Any) -> Any:
    shape = ViT(width=width, depth=3, heads=2, global_blocks=(1,), window=3)
    model = MedSAM(shape, side, weights=None, attention="eager", **arguments.pop("model", {}))
    return MedSAMModule(model, **arguments)


def litemedsam(side: int, **arguments: Any) -> Any:
    return MedSAMModule(LiteMedSAM(side, weights=None, **arguments.pop("model", {})), **arguments)


def sam2(side: int, **arguments: Any) -> Any:
    from tiny_sam2 import SHAPE

    from trainer.models import SAM2
    from trainer.modules import SAM2Module

    return SAM2Module(SAM2(SHAPE, side, weights=None, dropout=0.0, **arguments.pop("model", {})), **arguments)


def sam3(side: int, **arguments: Any) -> Any:
    from tiny_sam3 import SHAPE

    made = {"dropout": 0.0, "drop_path": 0.0, **arguments.pop("model", {})}
    return SAM3Module(SAM3(SHAPE, side, weights=None, **made), terms_per_image=1, **arguments)


FAMILIES: dict[str, Callable[..., Any]] = {"medsam": medsam, "litemedsam": litemedsam, "sam2": sam2, "sam3": sam3}


def main(
    family: str,
    side: int,
    images: int,
    shards: str,
    root: str,
    ranks: int,
    strategy: str = "auto",
    tuning: str | None = None,
    frames: int = 1,
    passes: int = 1,
    ema: bool = False,
    **arguments: Any,
) -> None:
    """Train three steps as one rank; write ``peak-RANK.json`` with what was said and what was held, in bytes."""
    if tuning is not None:
        arguments["tuning"] = getattr(trainer.tuning, tuning)()
    if family == "sam2":
        arguments.setdefault("memory", frames > 1)
    module = FAMILIES[family](side, **arguments)
    clip = {"frames": frames} if frames > 1 else {}
    rehearsal.fused_attention = math_attention
    node = {"class_path": "trainer.distributed.FSDP2"} if strategy == "fsdp2" else strategy
    activations = pass_bytes(module, lambda: module.rehearse(images, 1, **clip))
    said = parts(module, ema, sharing_of({"strategy": node}, ranks), activations)

    data = TripletDataModule(
        train=shards, batch_size=images * passes * ranks, micro_batch_size=images, targets_per_image=1, seed=3,
        clip_length=frames, only_with_targets=frames == 1,
    )  # fmt: skip
    if family == "sam3":
        data.targets_per_image = None
    engine = Trainer(
        accelerator="cpu", devices=ranks, strategy=FSDP2() if strategy == "fsdp2" else strategy, max_steps=3,
        default_root_dir=root, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, num_sanity_val_steps=0, limit_val_batches=0, gradient_clip_val=0.5,
        callbacks=[EMA()] if ema else [],
    )  # fmt: skip
    tensors = {t.untyped_storage()._cdata: t.untyped_storage() for t in (*module.parameters(), *module.buffers())}
    live = peak = sum(storage.nbytes() for storage in tensors.values())
    del tensors
    with sdpa_kernel(SDPBackend.MATH), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        engine.fit(module, datamodule=data)
    events = profiler.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    Path(root, f"peak-{engine.global_rank}.json").write_text(json.dumps({"said": said, "held": peak}))


def write_shards(folder: Path, volumes: int = 8) -> Path:
    """Slices with a disc each, and some with a square."""
    from tiny_sam2 import write_volumes

    return write_volumes(folder, range(volumes))
