"""Shards and a recipe so small that a whole command takes seconds: every fault is injected into the real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data_shards.scan import write_index
from data_shards.triplet import Provenance, Target, Triplet
from data_shards.writer import ShardWriter

SAMPLES = {"train": 24, "val": 4}
STEPS = 12
"""Optimiser steps of a run: two epochs."""
SIDE = 32


def write_shards(folder: Path, first: int = 0) -> Path:
    """Images with a bright square each, four to a shard; `first` makes others of them."""
    rng = np.random.default_rng(first)
    for split, count in SAMPLES.items():
        with ShardWriter(folder / split, 4, 2**20) as writer:
            for number in range(count):
                row, column = rng.integers(4, SIDE - 16, 2)
                mask = np.zeros((SIDE, SIDE), np.uint8)
                mask[row : row + 9, column : column + 12] = 1
                image = (rng.normal(90, 12, (SIDE, SIDE)) + 100 * mask).clip(0, 255).astype(np.uint8)
                key = f"{split}-{first + number:03d}"
                origin = Provenance("faults", f"p{number}", f"v{number}", "CT", "0" * 64)
                writer.write(
                    key, Triplet(key, image, (Target.from_mask(mask, "square"),), ("square",), origin).encode()
                )
        write_index(folder / split)
    return folder


def recipe(shards: Path, root: Path, ranks: int = 1, strategy: str | dict[str, Any] = "ddp") -> dict[str, Any]:
    """A tiny MedSAM, validated after every third step and saved after every second, with an average of its weights."""
    vit = {"width": 16, "depth": 2, "heads": 2, "global_blocks": [1], "window": 2}
    return {
        "seed_everything": 0,
        "model": {
            "class_path": "trainer.modules.MedSAMModule",
            "init_args": {
                "model": {
                    "class_path": "trainer.models.MedSAM",
                    "init_args": {
                        "weights": None,
                        "image_size": SIDE,
                        "encoder": {"class_path": "trainer.models.medsam.ViT", "init_args": vit},
                    },
                },
                "tuning": {"class_path": "trainer.tuning.SelectiveTuning", "init_args": {"train": [], "norms": True}},
                "lr": 1.0e-3,
            },
        },
        "data": {
            "class_path": "data_shards.datamodule.TripletDataModule",
            "init_args": {
                "train": str(shards / "train"),
                "val": str(shards / "val"),
                "batch_size": 4,
                "micro_batch_size": 2 // ranks,
            },
        },
        "trainer": {
            "default_root_dir": str(root),
            "max_epochs": 2,
            "val_check_interval": 6,
            "log_every_n_steps": 1,
            "accelerator": "cpu",
            "devices": ranks,
            "strategy": strategy if ranks > 1 else "auto",
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "trainer.callbacks.EMA", "init_args": {"decay": 0.9}}],
        },
        "checkpoint": {"every_n_steps": 2, "monitor": "val/dsc"},
    }


def write_recipe(path: Path, content: dict[str, Any]) -> Path:
    """Write a recipe with an opening comment."""
    path.write_text("# Does it survive?\n" + yaml.safe_dump(content))
    return path
