"""From a run's folder back to its trained module."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from data_shards.errors import UserError
from trainer.checkpoints import has_mark, newest_good, outline, read, step_checkpoints, verify
from trainer.models.weights import mismatch
from trainer.modules.tuned import TunedModule
from trainer.recipe import check_recipe
from trainer.run import Run

AVERAGE = "average"
"""Key of a checkpoint under which `trainer.callbacks.EMA` keeps its average."""
Weights = Literal["average", "raw"]
"""Which weights of a checkpoint that has an average."""


def restore(run: Run, checkpoint: Path | None = None, weights: Weights | None = None) -> TunedModule:
    """Rebuild a run's module from its recipe and load a checkpoint of it, every key of it.

    The pretrained weights that the recipe names are not read: the checkpoint replaces all of them.

    Args:
        run: The run.
        checkpoint: The checkpoint; the newest by default.
        weights: Which weights, where the checkpoint has an average of them: that by default.

    Returns:
        The module on the CPU, in evaluation mode.

    Raises:
        UserError: The recipe is not allowed, there is no checkpoint, the two do not fit, or there is no average.
    """
    path = checkpoint or find_checkpoint("last", run) or run.last_checkpoint()
    module = build(recipe_of(run)["model"], f"recipe {run.recipe}")
    content = read_checkpoint(path)
    state = {**content["state_dict"], **average_of(content, weights, path)}
    check_fit(module, state, path)
    module.load_state_dict(state, strict=True)
    return module.eval()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, a file or a folder, as a run of one process writes it; tensors of a file are mapped from it.

    Nothing is unpickled but tensors and plain values. `find_checkpoint` has checked every byte.

    Raises:
        UserError: It is missing, damaged, or no checkpoint of ours.
    """
    return _of_a_run(read(path, check=False), path)


def outline_checkpoint(path: Path) -> dict[str, Any]:
    """As `read_checkpoint`, but the sharded tensors of a folder have their shapes alone, and no content.

    Raises:
        UserError: It is missing, damaged, or no checkpoint of ours.
    """
    return _of_a_run(outline(path), path)


def _of_a_run(content: dict[str, Any], path: Path) -> dict[str, Any]:
    if not isinstance(content.get("state_dict"), dict):
        raise UserError(f"checkpoint {path}: no checkpoint of a run; bare weights go into the model's `weights`")
    return content


def average_of(content: Mapping[str, Any], weights: Weights | None, path: Path) -> dict[str, Tensor]:
    """The average of a checkpoint, by parameter's name: what it puts in the raw weights' place; empty for none.

    Args:
        content: The checkpoint.
        weights: What is asked for; None is the average where there is one.
        path: Where the checkpoint is, for messages.

    Raises:
        UserError: The average is asked for, and there is none.
    """
    if weights == "average" and AVERAGE not in content:
        raise UserError(f"checkpoint {path}: it has no average of the weights: it was trained without EMA")
    found: dict[str, Tensor] = {} if weights == "raw" else content.get(AVERAGE, {}).get("weights", {})
    return found


def check_fit(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Check that a checkpoint has every key of a module, and no other.

    Raises:
        UserError: It does not.
    """
    found = mismatch(module, state)
    if found:
        raise UserError(f"checkpoint {path} is of another model or tuning than the recipe's: {found}")


def find_checkpoint(name: str, run: Run) -> Path | None:
    """Find the checkpoint that ``--ckpt_path`` names, and check every byte of it.

    The last is the newest that is undamaged; each newer one that is refused is told of on stderr.

    Args:
        name: ``last``, ``best`` (by the recipe's ``checkpoint.monitor``), or a path.
        run: The run.

    Returns:
        The path; None for the last of a run that has none yet.

    Raises:
        UserError: There is no such checkpoint, or it is damaged.
    """
    if name == "last":
        return _last(run)
    if name == "best":
        kept = sorted(run.checkpoints.glob("best-*.ckpt"))
        if not kept:
            raise UserError(f"{run.root}: no best checkpoint; it needs checkpoint.monitor and a validation in the fit")
        # the newest of them knows which was the best when it was saved, and it would not be there were it worse since
        states = outline_checkpoint(_checked(kept[-1])).get("callbacks", {}).values()
        named = {Path(state["best_model_path"]).name for state in states if state.get("best_model_path")}
        return _checked(next((path for path in kept if path.name in named), kept[-1]))
    if not Path(name).exists():
        raise UserError(f"checkpoint {name}: no such file; --ckpt_path takes last, best or a path")
    return _checked(Path(name))


def _last(run: Run) -> Path | None:
    """The newest checkpoint that is undamaged; None where nothing was saved yet."""
    last = run.checkpoints / "last.ckpt"
    alone = last.exists() and not last.is_symlink()  # as older runs have it
    if step_checkpoints(run.checkpoints):
        good = newest_good(run.checkpoints, _say)
        if good is not None:
            if last.is_symlink() and not last.exists():
                _say(f"{last}: what it leads to, {last.readlink()}, is gone; {good} is taken instead")
            return last if last.exists() and last.resolve() == good.resolve() else good
        if not alone:
            raise UserError(
                f"{run.checkpoints}: none of its checkpoints is complete and undamaged: put one back, or start in "
                "another trainer.default_root_dir"
            )
    return _checked(last) if alone else None


def _checked(path: Path) -> Path:
    """A checkpoint, every byte of which was read; only files that no trainer marked as yet may have no mark.

    Raises:
        UserError: It is damaged.
    """
    unmarked = path.is_file() and not has_mark(path) and not path.resolve().name.startswith("step-")
    if unmarked:
        outline(path)  # says best what is no checkpoint at all
    verify(path, unmarked=unmarked)
    return path


def _say(line: str) -> None:
    if rank_zero_only.rank == 0:
        print(line, file=sys.stderr, flush=True)


def recipe_of(run: Run) -> dict[str, Any]:
    """The run's resolved recipe, checked.

    Raises:
        UserError: It is damaged or names a class that is not allowed.
    """
    check_recipe(run.recipe)
    content: dict[str, Any] = yaml.safe_load(run.recipe.read_text())
    return content


def build(node: Mapping[str, Any], where: str) -> TunedModule:
    """Make a recipe's module without reading the pretrained weights that it names.

    Args:
        node: What the recipe has at its key ``model``.
        where: The recipe, for messages.

    Raises:
        UserError: A class does not take its arguments.
    """
    model = without_weights(node["init_args"]["model"])
    module: TunedModule = instantiate({**node, "init_args": {**node["init_args"], "model": model}}, TunedModule, where)
    return module


def without_weights(node: Mapping[str, Any]) -> dict[str, Any]:
    """A model's node of a recipe, with random weights in the place of those that it names."""
    arguments = dict(node.get("init_args") or {})
    arguments.update(dict.fromkeys(arguments.keys() & {"weights", "weights_sha256"}))
    return {**node, "init_args": arguments}


def instantiate(node: Mapping[str, Any], base: type, where: str) -> Any:
    """Make the object that a node of a recipe describes.

    Args:
        node: Its ``class_path`` and ``init_args``.
        base: A class that it must be one of.
        where: The recipe, for messages.

    Raises:
        UserError: It is not, or the class does not take its arguments.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "made", required=True)
    try:
        config = parser.parse_object({"made": dict(node)})
    except Exception as error:
        raise UserError(f"{where}: {_first_line(error)}") from error
    try:
        return parser.instantiate_classes(config).made
    except ValueError as error:
        refused: BaseException | None = error  # jsonargparse wraps what a class says into lines of its own
        while refused is not None and not isinstance(refused, UserError):
            refused = refused.__cause__ or refused.__context__
        if refused is None:
            raise
        raise refused from None


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
