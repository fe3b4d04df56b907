"""Where the models of a protocol come from, and what their results depend on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from data_shards import __version__
from data_shards.errors import UserError
from trainer.callbacks.record import versions
from trainer.evaluation.protocol import TEXT, Loaded, ModelSpec, SetSpec
from trainer.models import SegmentationModel
from trainer.models.weights import sha256_of
from trainer.modules.sam3 import SAM3Module
from trainer.recipe import flat
from trainer.restore import find_checkpoint, instantiate, recipe_of
from trainer.run import Run
from trainer.segment.loading import Loaded as FromRun
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
        self._made: dict[str, SegmentationModel | SAM3Module] = {}
        self._known: dict[str, dict[str, Any]] = {}

    def __getitem__(self, name: str) -> SegmentationModel:
        """Give a model that takes boxes and points in evaluation mode, on its device.

        Raises:
            UserError: Its run, recipe or weights are missing.
        """
        made = self._make(name)
        assert not isinstance(made, SAM3Module)
        return made

    def in_words(self, name: str) -> SAM3Module:
        """Give a model that takes words, likewise, with the module that knows how it is asked.

        Raises:
            UserError: Its run, recipe or weights are missing.
        """
        made = self._make(name)
        assert isinstance(made, SAM3Module)
        try:
            _ = made.model.tokenizer  # read now: not when the first image has been encoded
        except UserError as error:
            raise UserError(f"{self._loaded.path}: models.{name}: {error}") from None
        return made

    def _make(self, name: str) -> SegmentationModel | SAM3Module:
        if name not in self._made:
            where = f"{self._loaded.path}: models.{name}"
            try:
                self._made[name] = _make(self._loaded.models[name], self.device, where)
            except UserError as error:
                raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from None
        return self._made[name]

    def identity(self, name: str) -> dict[str, Any]:
        """What a model's answers depend on, as JSON; nothing is made.

        Raises:
            UserError: Its run or recipe is missing.
        """
        if name not in self._known:
            try:
                self._known[name] = _identity(self._loaded.models[name])
            except UserError as error:
                raise UserError(f"{self._loaded.path}: models.{name}: {error}") from None
        return self._known[name]

    def takes_words(self, name: str) -> bool:
        """Whether a model understands terms, and nothing else."""
        named = flat(self.identity(name)).items()
        return any(key.endswith("class_path") and value == SAM3 for key, value in named)

    def asked_in_words(self, name: str, spec: SetSpec) -> bool:
        """Whether a set asks a model in words: by its prompt, or since the model takes nothing else.

        Raises:
            UserError: The model cannot be asked as the set asks.
        """
        words = self.takes_words(name)
        mine, where = f"{self._loaded.path}: models.{name}", f"set '{spec.title}'"
        if words and not spec.by_term:
            raise UserError(
                f"{mine}: SAM3 is asked in words, for all of a term at once: {where} needs prompt text, or objects "
                "term to put it beside models that are shown boxes or points"
            )
        if words and spec.prompt == "mask":
            raise UserError(f"{mine}: SAM3 is asked in words: {where} shows masks; take prompt text or box")
        if not words and spec.prompt == TEXT:
            raise UserError(
                f"{mine}: only SAM3 takes words, and {where} has prompt text: take prompt box, with objects term in "
                "images to compare it with SAM3"
            )
        return words

    def check(self, specs: Sequence[SetSpec]) -> None:
        """See that every model can be asked as the sets ask, and that first masks are of models that make some.

        Raises:
            UserError: One cannot.
        """
        for spec in specs:
            for name in self._loaded.models:
                self.asked_in_words(name, spec)
                if name in spec.initial and self.takes_words(name) and len(self._loaded.models) > 1:
                    raise UserError(
                        f"{self._loaded.path}: set '{spec.title}': initial: {name} is asked in words and makes no "
                        "first mask"
                    )


def computed_by() -> dict[str, str | None]:
    """Versions of what computes answers and scores."""
    found = versions()
    return {"sam-trainer": __version__, **{name: found.get(name) for name in COMPUTING}}


def _make(spec: ModelSpec, device: torch.device, where: str) -> SegmentationModel | SAM3Module:
    """A model alone, or within its module where that knows how it is asked."""
    if spec.run is not None or spec.recipe is not None:
        found = load_recipe(spec.recipe, device) if spec.recipe else _of_run(spec, device)
        return found.module if isinstance(found.module, SAM3Module) else found.model
    torch.manual_seed(0)  # weights may be random
    node = {"class_path": spec.class_path, "init_args": spec.init_args}
    model: SegmentationModel = instantiate(node, SegmentationModel, where)
    model = model.to(device).eval()
    return SAM3Module(model).to(device).eval() if spec.class_path == SAM3 else model  # type: ignore[arg-type]


def _of_run(spec: ModelSpec, device: torch.device) -> FromRun:
    assert spec.run is not None
    return load_run(spec.run, spec.checkpoint, spec.weights, device)


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
