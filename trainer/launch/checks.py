"""A recipe on a cluster, checked before anything is queued, and frozen as it was."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_shards.errors import UserError
from data_shards.sampler import GlobalOrderSampler
from trainer.cluster import Cluster, cluster_of, places, read_cluster
from trainer.launch.job import Task, next_folder
from trainer.plan.fits import refuse_what_cannot_fit
from trainer.plan.planned import PlanCLI, ReadCLI
from trainer.restore import outline_checkpoint
from trainer.resuming import refuse_another_recipe
from trainer.run import Run


@dataclass(frozen=True)
class Checked:
    """A recipe that can be launched.

    Attributes:
        words: What `trainer fit` gets, recipes first.
        cluster: The machine.
        nodes: Nodes.
        processes: Processes on each.
        root: The run's folder as the recipe has it.
        devices: Whether `words` say themselves how many processes there are.
    """

    words: tuple[str, ...]
    cluster: Cluster
    nodes: int
    processes: int
    root: Path
    devices: bool


class LaunchCLI(ReadCLI):
    """A recipe that is about to be launched."""

    def check(self, words: Sequence[str], where: str) -> Checked:
        """Check what a job would stumble over.

        Args:
            words: The command line after `fit`.
            where: The cluster file, for messages.

        Raises:
            UserError: Something does not fit together.
        """
        trainer, data = self.resolved["trainer"], self.resolved["data"]["init_args"]
        cluster = cluster_of(self.resolved["cluster"], where)
        devices = trainer["devices"]
        if devices in ("auto", -1):  # of an overlay for any number of GPUs: as many as the cluster has
            devices = read_cluster(where)[2]
        nodes, processes = places(cluster, trainer["num_nodes"], devices, where)
        accelerator = str(trainer["accelerator"])
        if cluster.gpu is None and cluster.kind != "local" and accelerator in ("gpu", "cuda"):
            raise UserError(
                f"trainer.accelerator {accelerator}: {where} has cluster.gpu null, which is CPUs: name its GPU"
            )
        if cluster.gpu is not None and accelerator == "cpu":
            raise UserError(f"trainer.accelerator cpu: {where} has GPUs: take a cluster of CPUs, or accelerator auto")
        ranks = nodes * processes
        try:
            GlobalOrderSampler(data["batch_size"], data["batch_size"], data["micro_batch_size"], 0, ranks, 0)
        except UserError as error:
            raise UserError(f"{where}: {nodes} × {processes} processes: {error}") from None
        root = Path(trainer["default_root_dir"] or ".")
        self._check_run(Run(root))
        return Checked(tuple(words), cluster, nodes, processes, root, str(trainer["devices"]) == str(processes))

    def _check_run(self, run: Run) -> None:
        """Refuse a recipe that the run's own checkpoint would refuse when the job has started."""
        newest = run.newest_checkpoint()
        if newest is not None:
            recipe: str = self._parser("fit").dump(self.config["fit"], skip_none=False, format="yaml")
            refuse_another_recipe(run, recipe, outline_checkpoint(newest))


def check_training(words: Sequence[str], where: str, plan: bool) -> Checked:
    """Check a recipe with its overlays, of which one is the cluster.

    Args:
        words: The command line after `fit`.
        where: The cluster file, for messages.
        plan: Whether to look if it fits the cluster's GPU.

    Raises:
        UserError: There is a mistake, or it does not fit.
    """
    for word in words:
        if word.partition("=")[0] == "--ckpt_path":
            raise UserError("--ckpt_path: a job always goes on from the run's last checkpoint; leave it out")
    checked = LaunchCLI(["fit", *words]).check(words, where)
    if plan and checked.cluster.gpu is not None:
        refuse_what_cannot_fit(words)
    else:
        PlanCLI(["fit", *words])  # makes the module without its weights: what its classes refuse is said now
    return checked


def freeze(checked: Checked, jobs: Path | None = None, at: str | None = None, root: Path | None = None) -> Task:
    """The task of a training, with copies of its recipes, so that what is edited later changes no job that waits.

    Args:
        checked: The recipe.
        jobs: Folder of the jobs; by default that of the run.
        at: Where the job finds the copies; by default where they are written.
        root: The run's folder as the job sees it; by default the one on this machine.
    """
    root = root or checked.root.absolute()
    folder = next_folder(jobs or root / "jobs")
    files: dict[str, str] = {}
    arguments = ["fit"]
    words = iter(checked.words)
    for word in words:
        if word != "-c":
            arguments.append(word)
            continue
        source = Path(next(words))
        name = f"{len(files) + 1}-{re.sub(r'[^A-Za-z0-9._-]+', '-', source.name)}"
        files[name] = source.read_text(encoding="utf-8")
        arguments += ["-c", f"{at or folder}/{name}"]
    if not checked.devices:  # `auto` on this machine
        arguments += ["--trainer.devices", str(checked.processes)]
    return Task("trainer.cli", (*arguments, "--ckpt_path", "last"), root, folder, files)


def recipe_words(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """Make one form of all ways to name recipes: `-c FILE`; a cluster is a recipe in its place.

    Args:
        arguments: The command line: recipes, overlays, ``--cluster FILE`` and keys with values.

    Returns:
        The words for `trainer fit`, and the cluster file.

    Raises:
        UserError: A file is not named, or there are two clusters.
    """
    words: list[str] = []
    cluster: str | None = None
    rest = iter(arguments)
    for word in rest:
        name, equals, value = word.partition("=")
        if name.startswith("-c") and name != "-c":  # -cFILE
            name, equals, value = "-c", "=", word[2:].removeprefix("=")
        if name not in ("-c", "--config", "--cluster"):
            words.append(word)
            continue
        value = value if equals else next(rest, "")
        if not value:
            raise UserError(f"{name} needs a file; see trainer launch --help")
        if name == "--cluster":
            if cluster is not None:
                raise UserError("--cluster is there twice: a job has one cluster")
            cluster = value
        words += ["-c", value]
    return words, cluster
