"""What is launched, whatever launches it."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from data_shards.errors import UserError, counted
from trainer.cluster import Cluster


@dataclass(frozen=True)
class Task:
    """One command that every process of a job runs; a job with several of them is an array.

    Attributes:
        module: What Python runs, with ``-m``.
        arguments: Its arguments.
        root: The run's folder, absolute; None where no training is run.
        folder: Where its recipes and its record are, absolute.
        files: Copies of the recipes to write into `folder`, by name.
    """

    module: str
    arguments: tuple[str, ...]
    root: Path | None
    folder: Path
    files: dict[str, str]


@dataclass(frozen=True)
class Job:
    """What is asked of a cluster at once.

    Attributes:
        name: Its name.
        cluster: The machine.
        where: The cluster file.
        nodes: Nodes.
        processes: Processes on each; one GPU each, where `on_gpus`.
        tasks: What they run; each task of an array has the nodes for itself.
        directory: Where relative paths begin.
        on_gpus: Whether GPUs are asked for.
        keep: Whether a stop is told by SIGUSR1 and the trainer's checkpoint tells what was done (a training).
        each: Whether a task waits for the task of its own number in the job before, not for all of that job's.
    """

    name: str
    cluster: Cluster
    where: str
    nodes: int
    processes: int
    tasks: tuple[Task, ...]
    directory: Path
    on_gpus: bool
    keep: bool = True
    each: bool = False

    @property
    def folder(self) -> Path:
        """Where the job's script is: with its first task."""
        return self.tasks[0].folder

    @property
    def python(self) -> str:
        """The Python that runs it."""
        return self.cluster.python or ("python" if self.cluster.kind == "kubernetes" else sys.executable)

    def command(self, task: Task) -> list[str]:
        """The command of one process, as words."""
        return [self.python, "-m", task.module, *task.arguments]

    def size(self) -> str:
        """Its size in words."""
        each = counted(self.processes, "process", "processes")
        if self.on_gpus:
            each = f"{self.processes} {self.cluster.gpu or 'GPU'}"
        many = f"{counted(self.nodes, 'node')} × {each}"
        return many if len(self.tasks) == 1 else f"{len(self.tasks)} tasks of {many}"


def job_name(text: str) -> str:
    """A name that every engine takes, from any text.

    Raises:
        UserError: Lightning would take a SLURM job of this name for a shell, and start one process.
    """
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-") or "job"
    if name in ("bash", "interactive"):
        raise UserError(f"--name {name}: Lightning takes a job of that name for a shell; choose another")
    return name if name[0].isalpha() else f"job-{name}"


def next_folder(jobs: Path) -> Path:
    """The folder of the next job in a folder of jobs; it is not made."""
    taken = [int(path.name) for path in jobs.glob("[0-9][0-9][0-9]*") if path.name.isdigit()] if jobs.is_dir() else []
    return jobs / f"{max(taken, default=0) + 1:03d}"
