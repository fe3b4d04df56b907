"""The model of a run or of a recipe, ready to answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from data_shards.errors import UserError
from trainer.models import SegmentationModel
from trainer.modules.tuned import TunedModule
from trainer.recipe import check_recipe
from trainer.restore import Weights, find_checkpoint, instantiate, restore
from trainer.run import Run


@dataclass(frozen=True)
class Loaded:
    """A model, and where it comes from.

    Attributes:
        model: On its device, in evaluation mode.
        origin: The same as JSON.
        module: The training module around it, which knows how SAM3 is asked.
    """

    model: SegmentationModel
    origin: dict[str, Any]
    module: TunedModule

    def fingerprint(self) -> dict[str, str]:
        """What tells one model from another wherever its files lie: its class, and a checksum of all its weights."""
        found = hashlib.sha256(json.dumps(self.model.preprocessing.to_dict(), sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return {"class": type(self.model).__name__, "sha256": found.hexdigest()}


def device_of(name: str) -> torch.device:
    """The device that ``--device`` names: ``auto`` is a GPU where there is one.

    Raises:
        UserError: There is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: there is no such device: take auto, cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: take auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} such devices: take auto or cpu")
    return device


def load_run(folder: str, checkpoint: str | None, weights: Weights | None, device: torch.device) -> Loaded:
    """The model of a run, with the weights of one of its checkpoints.

    Args:
        folder: The run's.
        checkpoint: ``last``, ``best`` or a path; the last by default.
        weights: Which, where a checkpoint has an average: that by default.
        device: Where it goes.

    Raises:
        UserError: There is no such run or checkpoint, or both do not fit.
    """
    run = Run.existing(folder)
    path = find_checkpoint(checkpoint or "last", run) or run.last_checkpoint()
    module = restore(run, path, weights)
    return _loaded(module, {"run": str(run.root), "checkpoint": str(path), "weights": weights}, device)


def load_recipe(path: str, device: torch.device) -> Loaded:
    """The model of a recipe with the weights that it names, untouched.

    Raises:
        UserError: The recipe is not allowed, or its weights are not there.
    """
    check_recipe(path)
    content: dict[str, Any] = yaml.safe_load(Path(path).read_text())
    node = content.get("model")
    if not isinstance(node, Mapping) or "class_path" not in node:
        raise UserError(f"recipe {path}: it has no model with a class_path")
    seed = content.get("seed_everything")
    torch.manual_seed(seed if isinstance(seed, int) and not isinstance(seed, bool) else 0)  # weights may be random
    module: TunedModule = instantiate(node, TunedModule, f"recipe {path}")
    return _loaded(module, {"recipe": str(path)}, device)


def load_any(place: str, device: torch.device) -> Loaded:
    """The model of a run's folder, or of a recipe's file.

    Raises:
        UserError: It is neither.
    """
    return load_recipe(place, device) if Path(place).is_file() else load_run(place, None, None, device)


def _loaded(module: TunedModule, origin: dict[str, Any], device: torch.device) -> Loaded:
    model = module.to(device).eval().model
    described = {"class": type(model).__name__, **origin, "preprocessing": model.preprocessing.to_dict()}
    return Loaded(model, described, module)
