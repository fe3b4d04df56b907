"""Trainings of every family's tiny twin, on one process or on some gloo ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import forked_ranks
import torch

BATCH = 4


def medsam(**arguments: Any) -> Any:
    from trainer.models import MedSAM
    from trainer.models.medsam import ViT
    from trainer.modules import MedSAMModule
    from trainer.prompts import BoxPrompts

    shape = ViT(width=32, depth=3, heads=2, global_blocks=(1,), window=3)
    torch.manual_seed(0)
    model = MedSAM(shape, 64, weights=None, attention="eager", **arguments.pop("model", {}))
    return MedSAMModule(model, prompts=BoxPrompts(max_shift=3, seed=1), lr=1e-3, **arguments)


def litemedsam(**arguments: Any) -> Any:
    from trainer.models import LiteMedSAM
    from trainer.modules import MedSAMModule
    from trainer.prompts import BoxPrompts

    torch.manual_seed(0)
    model = LiteMedSAM(32, weights=None, **arguments.pop("model", {}))
    return MedSAMModule(model, prompts=BoxPrompts(max_shift=3, seed=1), lr=1e-3, **arguments)


def sam2(**arguments: Any) -> Any:
    import tiny_sam2

    from trainer.modules import SAM2Module
    from trainer.prompts import SAM2BoxPrompts
    from trainer.tuning import FullTuning

    arguments.setdefault("tuning", FullTuning(freeze=["sam_prompt_encoder", "mask_downsample"]))  # as DDP wants it
    model = tiny_sam2.make(**arguments.pop("model", {}))
    return SAM2Module(model, prompts=SAM2BoxPrompts(seed=1), lr=1e-3, **arguments)


def sam3(**arguments: Any) -> Any:
    import tiny_sam3

    from trainer.modules import SAM3Module

    model = tiny_sam3.make(**arguments.pop("model", {})).train()
    return SAM3Module(model, lr=1e-3, **arguments)


FAMILIES: dict[str, Callable[..., Any]] = {"medsam": medsam, "litemedsam": litemedsam, "sam2": sam2, "sam3": sam3}
DATA: dict[str, dict[str, Any]] = {
    "medsam": {}, "litemedsam": {}, "sam2": {"clip_length": 3}, "sam3": {"negatives_per_image": 1},
}  # fmt: skip


def start(family: str, ranks: int, shards: Path, root: Path, **options: Any) -> list[Any]:
    """Train on some ranks; what each of them found.

    Args:
        family: One of `FAMILIES`.
        ranks: How many.
        shards: Shards of `tiny_sam2.write_volumes`.
        root: Folder of the run.
        options: What `main` takes.

    Raises:
        torch.multiprocessing.ProcessRaisedException: A rank broke down.
    """
    forked_ranks.run(main, root, ranks, family=family, shards=str(shards), **options)
    return [torch.load(path) for path in sorted(root.glob("found-*.pt"))]


def main(
    family: str,
    shards: str,
    root: str,
    ranks: int,
    strategy: str = "auto",
    strategy_arguments: dict[str, Any] | None = None,
    tuning: str | None = None,
    tuning_arguments: dict[str, Any] | None = None,
    module_arguments: dict[str, Any] | None = None,
    data_arguments: dict[str, Any] | None = None,
    micro: int = 1,
    steps: int = 4,
    empty: Sequence[int] = (),
    callbacks: Sequence[tuple[str, dict[str, Any]]] = (),
    resume: str | None = None,
    **trainer_arguments: Any,
) -> None:
    """Train as one rank, and keep what was found as ``found-RANK.pt``."""
    from lightning.pytorch import Callback, Trainer, seed_everything
    from torch.distributed.tensor import DTensor

    import trainer.callbacks
    import trainer.tuning
    from data_shards.datamodule import TripletDataModule
    from trainer.distributed import FSDP2
    from trainer.resuming import CheckpointFiles

    seed_everything(0)
    arguments = {**(module_arguments or {})}
    if tuning is not None:
        arguments["tuning"] = getattr(trainer.tuning, tuning)(**(tuning_arguments or {}))
    module = FAMILIES[family](**arguments)
    data = TripletDataModule(
        train=shards,
        val=shards,
        batch_size=BATCH,
        micro_batch_size=micro,
        seed=3,
        **DATA[family],
        **(data_arguments or {}),
    )

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()

    class Note(Callback):
        """Notes losses, norms and sizes."""

        def __init__(self) -> None:
            self.losses: list[float] = []
            self.norms: list[float] = []
            self.parts: list[dict[str, float]] = []
            self.gradients: dict[str, torch.Tensor] = {}

        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            if not self.gradients:
                self.gradients = {n: whole(p.grad) for n, p in module.named_parameters() if p.grad is not None}

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, number: int) -> None:
            if trainer.global_rank in empty:  # as if all of its samples had been damaged
                for names in (batch.masks, batch.terms, batch.absent_terms):
                    names.clear()
                for index in (batch.image_index, batch.absent_index):
                    index.resize_(0)

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, number: int) -> None:
            self.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)
            if "train/grad_norm" in trainer.callback_metrics:
                self.norms.append(float(trainer.callback_metrics["train/grad_norm"]))
                shown = {
                    n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith(("train/grad", "train/lr"))
                }
                self.parts.append(shown)

    note = Note()
    made = FSDP2(**(strategy_arguments or {})) if strategy == "fsdp2" else strategy
    extra = [getattr(trainer.callbacks, name)(**arguments) for name, arguments in callbacks]
    settings: dict[str, Any] = {
        "max_steps": steps,
        "limit_val_batches": 0,
        "gradient_clip_val": 0.5,
        **trainer_arguments,
    }
    saves = any(name == "RunCheckpoint" for name, _ in callbacks)
    engine = Trainer(
        accelerator="cpu", devices=ranks, strategy=made, default_root_dir=root, logger=False, log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=saves, num_sanity_val_steps=0,
        callbacks=[*extra, note], plugins=[] if strategy == "fsdp2" else [CheckpointFiles()], **settings,
    )  # fmt: skip
    engine.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    local = {
        name: p.to_local().numel() if isinstance(p, DTensor) else p.numel() for name, p in module.named_parameters()
    }
    weights = {name: whole(p) for name, p in module.named_parameters()}
    moments = [state["exp_avg"].dtype for state in engine.optimizers[0].state.values() if "exp_avg" in state]
    metrics = {name: float(value) for name, value in engine.callback_metrics.items()}
    torch.save(
        {
            "losses": note.losses, "norms": note.norms, "parts": note.parts, "weights": weights,
            "gradients": note.gradients,
            "held": sum(local.values()), "moments": {str(kind) for kind in moments}, "metrics": metrics,
        },
        Path(root) / f"found-{engine.global_rank}.pt",
    )  # fmt: skip
