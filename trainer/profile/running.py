"""A recipe's real training for a few steps, in a folder that is thrown away, without evaluations and checkpoints."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningCLI

from data_shards.errors import UserError
from trainer.callbacks import RunCheckpoint
from trainer.callbacks.breakdown import ending
from trainer.callbacks.watch import RankWatch
from trainer.lightning_cli import RecipeCLI
from trainer.plan.planned import ReadCLI, step


@dataclass(frozen=True)
class Recipe:
    """A recipe, as its profile runs it.

    Attributes:
        words: Its words, as `trainer fit` takes them, with what the profile changes at their end.
        resolved: The recipe with its overlays and keys, as plain values.
        passes: Passes in an optimiser step, on one device.
        notes: What is not as in the recipe, for people.
    """

    words: list[str]
    resolved: dict[str, Any]
    passes: int
    notes: tuple[str, ...]


def read_recipe(words: Sequence[str], steps: int) -> Recipe:
    """Read a recipe and make it one device's share of a run of so many optimiser steps.

    Raises:
        UserError: A mistake in it.
    """
    for word in words:
        if word.partition("=")[0] == "--ckpt_path":
            raise UserError("trainer profile starts from the recipe's own weights: leave --ckpt_path out")
    resolved = ReadCLI(["fit", *words]).resolved
    data, trainer = resolved["data"]["init_args"], resolved["trainer"]
    found = step(data, trainer)
    micro, passes, devices = found["micro_batch"], found["passes"], found["devices"] or 1
    changed: dict[str, Any] = {
        **{"max_steps": steps, "max_epochs": -1, "max_time": None, "limit_val_batches": 0, "logger": None},
        **{"enable_progress_bar": False, "devices": 1, "num_nodes": 1, "strategy": "auto", "fast_dev_run": False},
    }
    strategy, notes = trainer.get("strategy"), []
    if devices > 1 or strategy not in (None, "auto"):
        name = strategy.get("class_path", "").rpartition(".")[2] if isinstance(strategy, dict) else strategy
        many = f"that {devices} GPUs take together" if devices > 1 else f"of strategy {name}"
        notes.append(f"one device's share of a step {many}, without what they send each other")
    given = [f"--trainer.{key}={'null' if value is None else value}" for key, value in changed.items()]
    given += ["--data.init_args.val=null", f"--data.init_args.batch_size={micro * passes}"]
    return Recipe([*words, *given], resolved, passes, tuple(notes))


class ProfileCLI(RecipeCLI):
    """The command line of ``trainer fit`` with one more callback, up to the point where it would train.

    Args:
        words: The recipe's.
        watching: The callback that measures; it comes last.
        folder: Folder in the place of the run's.
    """

    def __init__(self, words: Sequence[str], watching: Callback, folder: Path) -> None:
        self._watching = watching
        super().__init__(["fit", *words, f"--trainer.default_root_dir={folder}"])

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Leave out checkpoints; all else that every run has stays, so that its time is counted."""
        config["enable_checkpointing"] = False
        config["callbacks"] = [one for one in config.get("callbacks") or [] if not isinstance(one, RunCheckpoint)]
        made = super()._instantiate_trainer(config, [one for one in callbacks if not isinstance(one, RunCheckpoint)])
        made.callbacks.append(self._watching)
        return made

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run yet."""

    def train(self) -> None:
        """Run what the recipe says.

        Raises:
            UserError: It ends with a mistake of the recipe's, or with something from outside.
        """
        with RankWatch(self.trainer) as ranks:
            try:
                LightningCLI._run_subcommand(self, "fit")
            except BaseException as error:
                told = ending(error, self.trainer, ranks, fitting=False)
                if told is error:
                    raise
                raise told from error


@contextmanager
def made(recipe: Recipe, watching: Callback) -> Iterator[ProfileCLI]:
    """The recipe's objects, with the run's folder elsewhere; it is gone when the context ends, and so are workers."""
    with tempfile.TemporaryDirectory(prefix="trainer-profile-", ignore_cleanup_errors=True) as folder:
        cli = ProfileCLI(recipe.words, watching, Path(folder) / "run")
        try:
            yield cli
        finally:
            cli.datamodule.teardown("fit")
