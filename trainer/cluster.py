"""Cluster files: the machine that a job runs on, as one recipe overlay with the key `cluster`.

The overlay's `trainer` section says how many nodes and processes there are; `cluster` says how to get them. `trainer
fit` takes such a file as any other overlay: it checks and records the key, and trains no differently for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from data_shards.errors import UserError
from data_shards.schema import from_mapping, load_yaml
from data_shards.strict import is_text

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
_SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD)$", re.IGNORECASE)
_ONLY = {
    "slurm": ("partition", "account", "gres", "requeue", "options"),
    "kubernetes": (
        "image",
        "namespace",
        "volumes",
        "secrets",
        "node_selector",
        "shared_memory_gb",
        "restarts",
        "folder",
    ),
}
"""Fields that mean something to one kind alone."""


@dataclass(frozen=True)
class Cluster:
    """How to get the nodes of a job, and what they are."""

    kind: Literal["local", "slurm", "kubernetes"]
    """`local` starts torchrun here, `slurm` submits with sbatch, `kubernetes` applies a PyTorchJob."""
    gpu: str | None = None
    """The GPU of each process, a name of `trainer.hardware.GPUS`; null: CPUs."""
    hours: float | None = None
    """Time limit of one job, hours; null: the scheduler's own. A job that is requeued has it anew."""
    cpus_per_task: int | None = None
    """CPU cores of each process: its loader's workers and one more."""
    memory_gb: float | None = None
    """Memory of each node, GiB."""
    environment: dict[str, str | int] = field(default_factory=dict)
    """Environment variables of the job, after those that `trainer launch` sets itself. No keys or passwords."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell that run on the job's first node before it starts, as `module load cuda`; run as they stand."""
    python: str | None = None
    """The Python that runs the job; null: the one that launches it, and in a container `python`."""

    partition: str | None = None
    """SLURM's partition."""
    account: str | None = None
    """SLURM's account."""
    gres: str = "gpu"
    """What SLURM calls the GPUs, as `gpu:h100`."""
    signal_seconds: int = 120
    """How long before its end a job is told to save and stop, by SLURM before its time limit, by Kubernetes before a
    pod goes. SLURM looks every half minute, and may be that late."""
    requeue: bool = True
    """Whether a job that was stopped, by its time limit or by others' priority, is queued again and goes on."""
    options: dict[str, str | int | bool] = field(default_factory=dict)
    """Further options of sbatch by their long names, as `{constraint: nvlink, exclusive: true}`."""

    image: str | None = None
    """The container's image, with sam-trainer in it."""
    namespace: str = "default"
    """Kubernetes' namespace."""
    volumes: dict[str, str] = field(default_factory=dict)
    """Where which persistent volume claim is mounted, as `{/data: claim-of-data}`; all nodes write to them."""
    secrets: list[str] = field(default_factory=list)
    """Kubernetes secrets whose entries become environment variables: the place of WANDB_API_KEY."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes that may be taken."""
    shared_memory_gb: float = 16.0
    """Size of /dev/shm, GiB: loader workers hand over their batches there. It counts as the pod's memory."""
    restarts: int = 10
    """How often a pod that failed or was evicted is started again."""
    folder: str = "/workspace"
    """Where in the container the job runs: relative paths of recipes begin there."""

    def __post_init__(self) -> None:
        for name, given in (("hours", self.hours), ("memory_gb", self.memory_gb)):
            if given is not None and not 0 < given < 1e6:
                raise UserError(f"{name} {given:g}: above 0, or null")
        for name, least in (("cpus_per_task", 1), ("signal_seconds", 1), ("restarts", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} {value}: {least} or more")
        if self.hours is not None and self.kind == "slurm" and self.hours * 3600 <= self.signal_seconds:
            raise UserError(f"signal_seconds {self.signal_seconds}: less than the {self.hours:g} hours of the job")
        self._check_texts()
        self._check_kind()

    def _check_texts(self) -> None:
        """Refuse what would break a line of a job script, and keys in a file that is recorded with every run."""
        values = (
            *((name, getattr(self, name)) for name in ("partition", "account", "gres", "python", "image", "namespace")),
            *((f"environment.{name}", value) for name, value in self.environment.items()),
            *((f"options.{name}", value) for name, value in self.options.items()),
            *((f"volumes.{name}", value) for name, value in self.volumes.items()),
            ("folder", self.folder),
        )
        for name, value in values:
            if isinstance(value, str) and (not is_text(value) or not value.strip()):
                raise UserError(f"{name}: text on one line, not {value!r}")
        for line in self.setup:
            if not is_text(line):
                raise UserError("setup: a list of lines of shell, each on one line")
        for name in self.environment:
            if not _NAME.fullmatch(name):
                raise UserError(f"environment: '{name}' is no name of an environment variable")
            if _SECRET.search(name):
                raise UserError(
                    f"environment: {name} looks like a key, and this file is recorded with every run: export it in the "
                    "shell that launches, or name a Kubernetes secret in `secrets`"
                )
        for name in self.options:
            if not _OPTION.fullmatch(name):
                raise UserError(
                    f"options: '{name}' is no long option of sbatch: write it without dashes, as `constraint`"
                )

    def _check_kind(self) -> None:
        """Refuse fields that another kind has: they would be skipped silently."""
        others = {name: kind for kind, names in _ONLY.items() if kind != self.kind for name in names}
        for item in fields(self):
            default = item.default if item.default_factory is MISSING else item.default_factory()
            if (kind := others.get(item.name)) and getattr(self, item.name) != default:
                raise UserError(f"{item.name} is for kind {kind}, and this is kind {self.kind}: take it out")
        if self.kind == "kubernetes" and self.image is None:
            raise UserError("the key 'image' is missing: the container's image, with sam-trainer in it")


def cluster_of(content: Any, where: str) -> Cluster:
    """Check the mapping below the key `cluster`.

    Args:
        content: What the YAML holds there.
        where: The file, for messages.

    Raises:
        UserError: A key is unknown, or a value is wrong.
    """
    cluster = from_mapping(Cluster, content, where, "cluster")
    if cluster.gpu is not None:
        from trainer.hardware import gpu_named

        try:
            gpu_named(cluster.gpu)
        except UserError as error:
            raise UserError(f"{where}: cluster.gpu: {error}") from None
    return cluster


def read_cluster(path: str | Path) -> tuple[Cluster, int, int]:
    """Read a cluster file.

    Returns:
        The cluster, its nodes, and the processes on each: `num_nodes` and `devices` of the file's `trainer` section,
        1 where they are not there.

    Raises:
        UserError: It is no cluster file, or holds a mistake.
    """
    path = Path(path)
    try:
        content = load_yaml(path)
    except UserError as error:
        raise UserError(str(error).replace("no such spec file", "no such cluster file")) from None
    if "cluster" not in content:
        raise UserError(f"{path}: no cluster file: it has no key 'cluster'; examples lie in recipes/clusters")
    trainer = content.get("trainer") or {}
    if not isinstance(trainer, Mapping):
        raise UserError(f"{path}: trainer: expected keys below it, not {trainer!r}")
    cluster = cluster_of(content["cluster"], str(path))
    return cluster, *places(cluster, trainer.get("num_nodes", 1), trainer.get("devices", 1), str(path))


def places(cluster: Cluster, nodes: Any, devices: Any, where: str) -> tuple[int, int]:
    """Nodes, and processes on each, from a recipe's `trainer.num_nodes` and `trainer.devices`.

    Raises:
        UserError: They are no numbers; `auto` is one only on this machine.
    """
    if isinstance(devices, str) and devices.isdigit():
        devices = int(devices)
    if isinstance(devices, list) and cluster.kind == "local":
        devices = len(devices)
    if devices in ("auto", -1) and cluster.kind == "local":
        import torch

        devices = max(1, torch.cuda.device_count())
    for name, value in (("num_nodes", nodes), ("devices", devices)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{where}: trainer.{name} {value}: a number of 1 or more, so that a job can ask for them")
    if cluster.kind == "local" and nodes != 1:
        raise UserError(
            f"{where}: trainer.num_nodes {nodes}: kind local is this machine alone; take slurm or kubernetes"
        )
    return nodes, devices
