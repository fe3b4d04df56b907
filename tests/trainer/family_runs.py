"""Runs of two steps of a tiny model of each family, for the exports."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import tiny_sam2
import tiny_sam3
import torch
import yaml
from torch import Tensor

from trainer.cli import main
from trainer.models import SegmentationModel
from trainer.prompts import Prompts
from trainer.prompts.concepts import ConceptPrompts
from trainer.restore import instantiate

SAM2_SHAPE = replace(tiny_sam2.SHAPE, width=128, memory_width=64)
"""With memories as wide as transformers' class has them."""
SIDES = {"sam": 64, "sam2": 64, "sam3": 112}
FULL = {"class_path": "trainer.tuning.FullTuning", "init_args": {"freeze": []}}
MODULES = {"sam": "MedSAMModule", "sam2": "SAM2Module", "sam3": "SAM3Module"}
MODELS: dict[str, dict[str, Any]] = {
    "sam": {
        "class_path": "trainer.models.MedSAM",
        "init_args": {
            "image_size": 64,
            "encoder": {"width": 32, "depth": 3, "heads": 2, "global_blocks": [1], "window": 3},
        },
    },
    "sam2": {
        "class_path": "trainer.models.SAM2",
        "init_args": {"image_size": 64, "variant": {**tiny_sam2.SHAPE_ARGUMENTS, "width": 128, "memory_width": 64}},
    },
    "sam3": {
        "class_path": "trainer.models.SAM3",
        "init_args": {
            "image_size": 112,
            "shape": {**asdict(tiny_sam3.SHAPE), "global_blocks": list(tiny_sam3.SHAPE.global_blocks)},
        },
    },
}
"""What a recipe has at its model, but for the weights."""


def node(family: str, **arguments: Any) -> dict[str, Any]:
    """What a recipe has at its model, with more arguments."""
    return {**MODELS[family], "init_args": {**MODELS[family]["init_args"], **arguments}}


def trained(family: str, folder: Path, shards: Path, tuning: dict[str, Any] | None = None, **arguments: Any) -> Path:
    """Train for two steps from random weights, none of them zero; return the run's folder.

    Args:
        family: One of `MODELS`.
        folder: Where to.
        shards: What on.
        tuning: The recipe's tuning; all of the model by default.
        **arguments: More of the model's.
    """
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    begun = instantiate(node(family, weights=None, **arguments), SegmentationModel, "here").state_dict()
    # as they are drawn, SAM's encoder gives next to nothing
    torch.save({name: one + 0.02 * torch.randn_like(one) for name, one in begun.items()}, folder / "w.pt")
    model = node(family, weights=str(folder / "w.pt"), **arguments)
    init = {"model": model, "lr": 1.0e-3, "tuning": tuning or FULL}
    data: dict[str, Any] = {split: str(shards / split) for split in ("train", "test")}
    data |= {"batch_size": 2} | ({"clip_length": 2} if family == "sam2" else {})
    content = {
        "seed_everything": 0,
        "model": {"class_path": f"trainer.modules.{MODULES[family]}", "init_args": init},
        "data": {"class_path": "data_shards.datamodule.TripletDataModule", "init_args": data},
        "trainer": {"default_root_dir": str(folder / "run"), "max_steps": 2, "accelerator": "cpu"},
        "checkpoint": {"every_n_steps": 2},
    }
    (folder / "r.yaml").write_text("# Does it run?\n" + yaml.safe_dump(content))
    assert main(["fit", "-c", str(folder / "r.yaml")]) == 0
    return folder / "run"


def image_of(family: str) -> Tensor:
    """Random input (1, 3, S, S)."""
    side = SIDES[family]
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(5))


BOXES = torch.tensor([[5.0, 8.0, 50.0, 52.0], [20.0, 20.0, 30.0, 40.0]])


@torch.no_grad()
def logits(model: SegmentationModel, family: str) -> Tensor:
    """What a model of ours answers to two boxes, or to a text, on random input."""
    first = torch.zeros(2, dtype=torch.int64)
    asked: Any = ConceptPrompts(first[:1], ["disc"]) if family == "sam3" else Prompts(first, BOXES)
    found: Tensor = model.decode(model.encode(image_of(family)), asked)[0]
    return found[:, 0]


def refused(run: Path, to: str, out: Path, trainer_command: Any, *options: object) -> str:
    """The one line of an export that is refused; nothing is left of it."""
    code, _, err = trainer_command("export", run, "--to", to, "--out", out, "--samples", 1, *options)
    assert code == 2, err
    assert err.startswith("trainer: error: ") and err.count("\n") == 1, err
    assert not out.exists() and not (run / "exports").exists()
    assert not list(out.parent.glob(f".{out.name}*"))
    return str(err)
