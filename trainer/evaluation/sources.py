"""Where the models of a protocol come from, and what their results depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from data_shards import __version__
from data_shards.errors import UserError
from trainer.callbacks.record import versions
from trainer.evaluation.protocol import Loaded, ModelSpec
from trainer.models import SegmentationModel
from trainer.models.weights import sha256_of
from trainer.recipe import flat
from trainer.restore import find_checkpoint, instantiate, recipe_of
from trainer.run import Run
from trainer.segment.loading import load_recipe, load_run

SAM3 = "trainer.models.SAM3"
COMPUTING = ("torch", "transformers", "sam2")
"""Distributions that answers depend on, beside this one."""


class Models:
    """The models of a protocol, made when first asked for.

    Args:
        loaded: The protocol.
        device: Where they compute.
    """

    def __init__(self, loaded: Loaded, device: torch.device) -> None:
        self._loaded, self.device = loaded, device
        self._made: dict[str, SegmentationModel] = {}

    def __getitem__(self, name: str) -> SegmentationModel:
        """Give a model in evaluation mode, on its device.

        Raises:
            UserError: Its run, recipe or weights are missing.
        """
        if name not in self._made:
            where = f"{self._loaded.path}: models.{name}"
            try:
                model = _make(self._loaded.models[name], self.device, where)
            except UserError as error:
                raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from None
            self._made[name] = model
        return self._made[name]

    def identity(self, name: str) -> dict[str, Any]:
        """What a model's answers depend on, as JSON; nothing is made.

        Raises:
            UserError: Its run or recipe is missing, or it is asked in words.
        """
        try:
            found = _identity(self._loaded.models[name])
            if any(key.endswith("class_path") and value == SAM3 for key, value in flat(found).items()):
                raise UserError("SAM3 is asked in words, not with boxes and points: score it with `trainer test`")
        except UserError as error:
            raise UserError(f"{self._loaded.path}: models.{name}: {error}") from None
        return found


def computed_by() -> dict[str, str | None]:
    """Versions of what computes answers and scores."""
    found = versions()
    return {"sam-trainer": __version__, **{name: found.get(name) for name in COMPUTING}}


def _make(spec: ModelSpec, device: torch.device, where: str) -> SegmentationModel:
    if spec.run is not None:
        return load_run(spec.run, spec.checkpoint, spec.weights, device).model
    if spec.recipe is not None:
        return load_recipe(spec.recipe, device).model
    torch.manual_seed(0)  # weights may be random
    node = {"class_path": spec.class_path, "init_args": spec.init_args}
    model: SegmentationModel = instantiate(node, SegmentationModel, where)
    return model.to(device).eval()


def _identity(spec: ModelSpec) -> dict[str, Any]:
    if spec.run is not None:
        run = Run.existing(spec.run)
        path = find_checkpoint(spec.checkpoint or "last", run) or run.last_checkpoint()
        return {"model": recipe_of(run)["model"], "sha256": sha256_of(path), "weights": spec.weights}
    if spec.recipe is not None:
        content = yaml.safe_load(Path(spec.recipe).read_text(encoding="utf-8"))
        what = {"model": content.get("model"), "seed": content.get("seed_everything")}
    else:
        what = {"model": {"class_path": spec.class_path, "init_args": spec.init_args}}
    named = [Path(value) for key, value in flat(what).items() if key.endswith(".weights") and isinstance(value, str)]
    return {**what, "files": [sha256_of(path) for path in named if path.is_file()]}
