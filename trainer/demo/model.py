"""The model that `trainer demo` names: a run, a checkpoint of one, a recipe or an export."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from data_shards.errors import UserError
from trainer.restore import Weights
from trainer.run import Run
from trainer.segment.loading import Loaded, load_recipe, load_run

_FULL = {"class_path": "trainer.tuning.FullTuning", "init_args": {"freeze": []}}
"""Tuning of an export, whose weights hold what was learnt."""


def load_model(place: str, checkpoint: str | None, weights: Weights | None, device: torch.device) -> tuple[Loaded, str]:
    """Load a model, and say in a few words what it is.

    Args:
        place: A run's folder, a checkpoint in one, a recipe, or the file or folder of an export.
        checkpoint: Of a run: ``last``, ``best`` or a path.
        weights: Of a checkpoint that has an average: which.
        device: Where it goes.

    Raises:
        UserError: It is none of these, or damaged.
    """
    path = Path(place).expanduser()
    if not path.exists():
        raise UserError(f"{place}: no such run, checkpoint, recipe or export: correct the path")
    kind = _kind(path)
    if kind not in ("run", "checkpoint") and (checkpoint or weights):
        raise UserError(f"--ckpt and --weights belong to a run, and {place} is none")
    if kind == "run":
        loaded, name = load_run(str(path), checkpoint, weights, device), path.resolve().name
    elif kind == "checkpoint":
        if checkpoint:
            raise UserError(f"{place}: is a checkpoint itself: leave --ckpt out")
        run = _run_of(path)
        assert run is not None  # `_kind` found it
        loaded, name = load_run(str(run.root), str(path), weights, device), f"{run.root.name}, {path.name}"
    elif kind == "recipe":
        loaded, name = load_recipe(str(path), device), path.name
    else:
        loaded, name = _load_export(path, device), path.name
    return loaded, f"{type(loaded.model).__name__} · {name}"


def _kind(path: Path) -> str:
    """What a path names."""
    if path.is_file() and path.suffix.lower() in (".yaml", ".yml"):
        return "recipe"
    if _recipe_beside(path).is_file() and (path.is_file() or (path / "export.json").is_file()):
        return "export"
    if path.is_dir() and (path / "recipe.yaml").is_file():
        return "run"
    if _run_of(path) is not None:
        return "checkpoint"
    raise UserError(
        f"{path}: is no run, recipe or checkpoint in a run's folder, nor an export with its recipe beside it; bare "
        "weights go into a recipe's model.init_args.model.init_args.weights"
    )


def _run_of(path: Path) -> Run | None:
    """The run in whose ``checkpoints`` a path lies."""
    for root in path.resolve().parents:
        if root.name == "checkpoints" and (root.parent / "recipe.yaml").is_file():
            return Run.existing(root.parent)
    return None


def _recipe_beside(path: Path) -> Path:
    """The recipe that `trainer export` writes with an export."""
    return path / "recipe.yaml" if path.is_dir() else path.with_name(f"{path.name}.recipe.yaml")


def _load_export(path: Path, device: torch.device) -> Loaded:
    """The model of an export: that of its recipe, whose weights are the export's own."""
    beside = _recipe_beside(path)
    try:
        content: Any = yaml.safe_load(beside.read_text(encoding="utf-8"))
        init = content["model"]["init_args"]
        model = {**init["model"], "init_args": {**init["model"].get("init_args", {}), "weights": str(path.resolve())}}
        content["model"]["init_args"] = {**init, "model": model, "tuning": _FULL}
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        raise UserError(f"{beside}: holds no recipe with a model: export the run again") from None
    with tempfile.TemporaryDirectory(prefix="sam-trainer-demo-") as folder:
        recipe = Path(folder) / beside.name
        recipe.write_text("# An export's model\n" + yaml.safe_dump(content), encoding="utf-8")
        try:
            loaded = load_recipe(str(recipe), device)
        except UserError as error:
            reason = str(error).replace(f"recipe {recipe}: ", "").replace(str(recipe), str(beside))
            raise UserError(f"{path}: {reason}") from None
    return Loaded(loaded.model, {**loaded.origin, "recipe": str(beside), "export": str(path)}, loaded.module)
