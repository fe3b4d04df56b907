"""Going on with a training: what may have changed since its checkpoint, and how Lightning reads and writes those."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from data_shards.errors import UserError
from trainer.checkpoints import read, remove, write
from trainer.checkpoints.tree import mapped
from trainer.ranks import every_rank
from trainer.restore import outline_checkpoint
from trainer.run import Run
from trainer.version import CODE, code, code_changes

_FIXED_DATA = (
    *("batch_size", "targets_per_image", "seed", "sampling", "kinds", "only_with_targets", "negatives_per_image"),
    *("hard_negatives", "clip_length", "clip_step", "clip_anchor"),
)
"""Arguments of the data module that decide which samples a step sees; how a step is cut up may change."""
_FIXED = ("seed_everything", "trainer.precision", "trainer.gradient_clip_val", "trainer.gradient_clip_algorithm")


class CheckpointFiles(CheckpointIO):
    """Lets Lightning read checkpoints of either form, from one file or a folder of shards, and write the former.

    A strategy that shards reads and writes its own.

    Args:
        check: Check every byte before a checkpoint is read; without, whoever named it has done so.
    """

    def __init__(self, check: bool = True) -> None:
        self.check = check

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a file, which is marked as complete."""
        write(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file or a folder: that of the first rank, whatever others have found.

        Raises:
            UserError: It is missing or damaged.
        """
        path = Path(every_rank(str(path))[0])
        content = read(path, check=self.check)
        # of its own memory, since the file may be removed on another machine while this one still maps it
        return content if path.is_dir() else mapped(content, lambda _, leaf: _copied(leaf))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove it with its mark."""
        remove(Path(path))


def refuse_to_overwrite(run: Run) -> None:
    """A training started anew would replace the checkpoints of the one that is there.

    Raises:
        UserError: One is there.
    """
    newest = run.newest_checkpoint()
    if newest is not None:
        try:
            step = f" at step {outline_checkpoint(newest).get('global_step')}"
        except UserError:  # damaged: there may be others
            step = ""
        raise UserError(
            f"{run.root} holds a training{step} already: go on with --ckpt_path last, choose another "
            "trainer.default_root_dir, or remove that folder"
        )


def refuse_another_recipe(before: Run, recipe: str, checkpoint: Mapping[str, Any]) -> None:
    """A checkpoint goes on with its own optimiser and its own place in the epoch: a recipe cannot change them.

    Where the code is another one too, keys that only one recipe has may be the code's: they are told of in a line.

    Args:
        before: The run that the checkpoint is of.
        recipe: The recipe now, as resolved YAML.
        checkpoint: The checkpoint.

    Raises:
        UserError: The recipe was another one.
    """
    if not (before.recipe.is_file() and before.record.is_file()):
        return
    then, now = map(yaml.safe_load, (before.recipe.read_text(), recipe))
    changed = {key: both for key, *both in changes(then, now)}
    data = [_fixed_data(recipe) for recipe in (then, now)]
    for key in data[0].keys() | data[1].keys():
        changed[key] = [values.get(key, ABSENT) for values in data]
    changed = {key: both for key, both in sorted(changed.items()) if fixes_a_training(key) and _differ(*both)}
    unclear = {key for key, both in changed.items() if ABSENT in both} if _code_changes(checkpoint) else set()
    for key, (old, new) in changed.items():
        if key not in unclear:
            raise UserError(
                f"cannot go on with another {key}: {shown(old)} in {before.recipe}, now {shown(new)}; set it "
                "back, or start in another trainer.default_root_dir"
            )
    if unclear:
        told = ", ".join(
            f"{key} ({shown(changed[key][0])} then, {shown(changed[key][1])} now)" for key in sorted(unclear)
        )
        _warn(f"{before.recipe} was written by other code, and one of the recipes lacks {told}: see whether that fits")


def warn_of_other_code(checkpoint: Mapping[str, Any]) -> None:
    """Say in a line what changed of the code since a checkpoint, if anything did."""
    if changed := _code_changes(checkpoint):
        _warn(f"since the checkpoint changed {', '.join(changed)}: results may differ from an undisturbed run's")


def fixes_a_training(key: str) -> bool:
    """Whether a dotted key may not change between the parts of one training."""
    name = key.rpartition(".")[2]
    of_model = key.startswith("model.") and name not in ("weights", "weights_sha256", "tokenizer")
    return of_model or key in _FIXED or key in {f"data.init_args.{name}" for name in _FIXED_DATA}


def _code_changes(checkpoint: Mapping[str, Any]) -> list[str]:
    """What changed; of a checkpoint from before that was noted, something."""
    then = checkpoint.get(CODE)
    return code_changes(then if isinstance(then, Mapping) else {}, code())


def _fixed_data(recipe: dict[str, Any]) -> dict[str, Any]:
    """What decides on the samples of a step, by dotted key: mappings are one value, since null may take their place."""
    arguments = (recipe.get("data") or {}).get("init_args") or {}
    return {f"data.init_args.{name}": arguments[name] for name in _FIXED_DATA if name in arguments}


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _warn(line: str) -> None:
    if rank_zero_only.rank == 0:
        print(f"warning: {line}", file=sys.stderr, flush=True)


class _Absent:
    """In the place of a value that a recipe does not have."""

    def __repr__(self) -> str:
        return "nothing"


ABSENT = _Absent()


def changes(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """What differs between two recipes, by dotted key; the other's value is `ABSENT` where one of them alone has a key.

    Where another class is named its arguments are not compared. A key that is null in one and not in the other is no
    difference: a recipe from before an argument was there says as much as one that leaves it at null.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = [*old, *(name for name in new if name not in old)]
        if old.get("class_path") != new.get("class_path"):
            names = ["class_path"]
        pairs = {str(name): (old.get(name, ABSENT), new.get(name, ABSENT)) for name in names}
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = {str(number): both for number, both in enumerate(zip(old, new, strict=True))}
    else:
        if _differ(old, new):
            yield key, old, new
        return
    for name, (one, other) in pairs.items():
        yield from changes(one, other, f"{key}.{name}" if key else name)


def _differ(one: Any, other: Any) -> bool:
    return one != other and not all(value is None or value is ABSENT for value in (one, other))


def shown(value: Any) -> str:
    """A value of a recipe in a few words; of a class its name."""
    text = str(value.get("class_path", value) if isinstance(value, Mapping) else value)
    return text if len(text) < 80 else text[:79] + "…"
