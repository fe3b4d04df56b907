"""Weights & Biases, offline unless asked otherwise, and told nothing but what `told` decides, figures and panels."""

from __future__ import annotations

import importlib.util
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from data_shards.errors import UserError
from trainer.run import Run, write_whole

KEY = "WANDB_API_KEY"
PRIVATE: dict[str, Any] = {
    "console": "off",  # output.log would have all that is printed: keys of damaged samples, paths
    "disable_code": True,
    "disable_git": True,  # its remote, and with it names and addresses
    "disable_job_creation": True,
    "email": "",
    "host": "",
    "program": "",
    "save_code": False,
    "silent": True,
    "username": "",
    "x_disable_machine_info": True,
    "x_disable_meta": True,  # the command line, the working directory, the executable
    "x_disable_stats": True,  # disks and networks of the machine; throughput and memory are logged by us
    "x_save_requirements": False,
}
"""Settings of every run: nothing is collected that was not logged."""


class WandB(WandbLogger):
    """Logs to ``wandb/`` of the run, on the first rank; ``wandb sync`` sends it to the service later.

    A run keeps its id (``wandb/run-id``), so that a training that goes on, and its evaluations, go on there too. If the
    package breaks down the training goes on without it: ``metrics.csv`` has every figure.

    Args:
        project: Project.
        name: Name of the run; null is its folder's.
        entity: Team or user; null is the key's own.
        group: Name that runs are grouped by.
        tags: Words to find it by.
        notes: What it is for.
        offline: Whether all of it stays in the run's folder. Otherwise the key is taken from the environment
            (WANDB_API_KEY), and from nowhere else.
        panels: Whether the pictures of validations go there: images of the validation split, without their keys.

    Raises:
        UserError: The package is not installed, or a key is needed and not there.
    """

    def __init__(
        self,
        project: str = "sam-trainer",
        name: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        notes: str | None = None,
        offline: bool = True,
        panels: bool = True,
    ) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise UserError("trainer.logger: Weights & Biases needs another package: pip install 'sam-trainer[wandb]'")
        sends = not offline and os.environ.get("WANDB_MODE", "online") == "online"
        if sends and not os.environ.get(KEY) and rank_zero_only.rank == 0:
            raise UserError(
                f"trainer.logger: offline false needs a key: export {KEY}=…, or leave offline true and send the run "
                "later with `wandb sync`"
            )
        super().__init__(
            project=project, name=name, entity=entity, group=group, tags=list(tags) or None, notes=notes, offline=False
        )
        self._experiment: Any = None
        self._offline, self.panels = offline, panels
        self._run, self._broken = Run("."), False

    def place(self, run: Run, step: int = 0) -> None:
        """Say whose figures these are."""
        self._run, self._save_dir = run, str(run.root)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of the package; begun when it is first asked for.

        Raises:
            UserError: The service refuses it or cannot be reached.
        """
        if self._experiment is None:
            self._experiment = self._begin()
        return self._experiment

    def _begin(self) -> Any:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its crash reports go to a third party
        import wandb

        wanted = {**self._wandb_init, "name": self._name or self._run.root.resolve().name, "id": self._id_of_run()}
        wanted.pop("anonymous")  # of no effect any more, and it says so
        try:
            begun = wandb.init(
                **{**wanted, "dir": str(self._run.root)},
                mode="offline" if self._offline else None,
                reinit="finish_previous",
                settings=wandb.Settings(**PRIVATE),
            )
        except (wandb.Error, OSError) as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"trainer.logger: Weights & Biases: {said[0]}; leave offline true and `wandb sync` later"
            ) from error
        begun.define_metric("trainer/global_step")
        begun.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        if not self._offline and begun.url:
            _say(f"Weights & Biases: {begun.url}")
        return begun

    def _id_of_run(self) -> str:
        """The id that the run has, or gets now."""
        path = self._run.root / "wandb" / "run-id"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, secrets.token_hex(4) + "\n")
        return path.read_text().strip()

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Write what a run is made of as its config."""
        self.experiment  # noqa: B018 - what cannot begin ends the run, what breaks later does not
        self._try(lambda: self.experiment.config.update(dict(params), allow_val_change=True))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write figures."""
        self._try(lambda: self.experiment.log({**metrics, **_at(step)}))

    @rank_zero_only
    def log_image(self, key: str, images: Sequence[Image.Image], step: int | None = None) -> None:
        """Write pictures, where panels are wanted."""
        if self.panels:
            self._try(lambda: self._log_image(key, images, step))

    def _log_image(self, key: str, images: Sequence[Image.Image], step: int | None) -> None:
        import wandb

        self.experiment.log({key: [wandb.Image(image) for image in images], **_at(step)})

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the run there, and say how it is sent."""
        if self._experiment is None:
            return
        ended, self._experiment = self._experiment, None
        self._try(lambda: ended.finish(exit_code=int(status != "success")))
        if self._offline and not self._broken:
            _say(f"Weights & Biases, offline: `wandb sync {Path(ended.dir).parent}` sends it")

    def _try(self, act: Any) -> None:
        """Do something that may fail without harm to the training."""
        if self._broken:
            return
        try:
            act()
        except UserError:
            raise
        except Exception as error:
            self._broken = True
            _say(f"Weights & Biases broke down ({type(error).__name__}): the run goes on without it, see metrics.csv")


def refuse_unguarded(named: Any) -> None:
    """Refuse Lightning's own logger, which lets the package collect whatever it finds.

    Args:
        named: ``trainer.logger`` of a parsed recipe.

    Raises:
        UserError: It is named.
    """
    for node in named if isinstance(named, list) else [named]:
        if str(getattr(node, "class_path", "")).endswith(".WandbLogger"):
            raise UserError(
                "trainer.logger: WandbLogger sends the command line, the code and the host: take trainer.loggers.WandB "
                "as recipes/overlays/wandb.yaml does"
            )


def _at(step: int | None) -> dict[str, int]:
    return {} if step is None else {"trainer/global_step": step}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
