"""Kubernetes: a PyTorchJob of Kubeflow's training operator (v1), kubectl, and what it says."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import yaml

from data_shards.errors import UserError
from trainer.cluster import Cluster
from trainer.launch.engine import ask
from trainer.launch.environment import variables
from trainer.launch.job import Job

RECIPES = "/etc/sam-trainer/recipes"
"""Where the job finds its recipes: they travel in the manifest, so that the image need not have them."""
_PORT = 23456
"""The operator's own port of rank 0."""


def manifest(job: Job) -> str:
    """The job's recipes and the job, as YAML for ``kubectl apply -f -``."""
    (task,) = job.tasks
    meta = {"name": job.name, "namespace": job.cluster.namespace}
    recipes = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": task.files}
    replicas = {"Master": _replica(job, 1)}
    if job.nodes > 1:
        replicas["Worker"] = _replica(job, job.nodes - 1)
    policy: dict[str, Any] = {
        "backoffLimit": job.cluster.restarts,
        "cleanPodPolicy": "Running",  # pods that ended keep their logs
    }
    if job.cluster.hours is not None:
        policy["activeDeadlineSeconds"] = round(job.cluster.hours * 3600)
    whole = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": meta,
        "spec": {"runPolicy": policy, "pytorchReplicaSpecs": replicas},
    }
    opening = "# Written by `trainer launch`. Each node is a pod in which torchrun starts a process for each GPU.\n"
    return opening + yaml.safe_dump_all([recipes, whole], sort_keys=False, allow_unicode=True)


def _replica(job: Job, count: int) -> dict[str, Any]:
    cluster = job.cluster
    spec: dict[str, Any] = {
        "terminationGracePeriodSeconds": cluster.signal_seconds,  # from SIGTERM to SIGKILL: to save in
        "containers": [_container(job)],
        "volumes": [
            # PyTorch's loader workers hand batches over in shared memory, of which containers have 64 MiB by default
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": _gib(cluster.shared_memory_gb)}},
            {"name": "recipes", "configMap": {"name": job.name}},
            *(
                {"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": claim}}
                for number, claim in enumerate(cluster.volumes.values(), 1)
            ),
        ],
    }
    if cluster.node_selector:
        spec["nodeSelector"] = dict(cluster.node_selector)
    # the operator restarts a pod that failed or was evicted, and `--ckpt_path last` goes on: torchrun ends with 1
    # whatever its processes say, so that the policy ExitCode cannot tell a stop from a mistake
    return {"replicas": count, "restartPolicy": "OnFailure", "template": {"spec": spec}}


def _container(job: Job) -> dict[str, Any]:
    cluster = job.cluster
    limits: dict[str, Any] = {"nvidia.com/gpu": job.processes} if job.on_gpus else {}
    if cluster.cpus_per_task is not None:
        limits["cpu"] = cluster.cpus_per_task * job.processes
    if cluster.memory_gb is not None:
        limits["memory"] = _gib(cluster.memory_gb)
    mounts = [
        {"name": "shared-memory", "mountPath": "/dev/shm"},  # noqa: S108  # the container's
        {"name": "recipes", "mountPath": RECIPES, "readOnly": True},
        *({"name": f"volume-{number}", "mountPath": place} for number, place in enumerate(cluster.volumes, 1)),
    ]
    container: dict[str, Any] = {
        "name": "pytorch",  # the operator looks for a container of this name
        "image": cluster.image,
        "command": ["/bin/bash", "-c", _script(job)],
        "env": [{"name": name, "value": value} for name, value, _ in variables(job)],
        "ports": [{"name": "pytorchjob-port", "containerPort": _PORT}],
        "resources": {"limits": limits, "requests": dict(limits)},
        "volumeMounts": mounts,
    }
    if cluster.secrets:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in cluster.secrets]
    return container


def _script(job: Job) -> str:
    """What a pod runs; `exec`, so that SIGTERM reaches torchrun and not a shell."""
    python, *rest = job.command(job.tasks[0])
    torchrun = [python, "-m", "torch.distributed.run", f"--nnodes={job.nodes}", f"--nproc-per-node={job.processes}"]
    # the operator numbers the pods in RANK, and says where the first one is
    places = '--node-rank="$RANK" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT"'
    if job.nodes == 1:
        places = "--standalone"
    lines = [f"cd {shlex.quote(job.cluster.folder)} || exit 1", *job.cluster.setup]
    return "\n".join([*lines, f"exec {shlex.join(torchrun)} {places} {shlex.join(rest)}"])


def _gib(size: float) -> str:
    return f"{round(size * 1024)}Mi"


def check_run_folder(root: str, cluster: Cluster) -> None:
    """Refuse a run whose checkpoints would be gone with its pods.

    Raises:
        UserError: Its folder lies on no volume.
    """
    place = PurePosixPath(cluster.folder) / root
    if not any(place.is_relative_to(volume) for volume in cluster.volumes):
        raise UserError(
            f"trainer.default_root_dir {root}: in the container {place}, which is on none of cluster.volumes "
            f"({', '.join(cluster.volumes) or 'there are none'}): its checkpoints would be gone with the pod"
        )


def check_kubectl() -> None:
    """Refuse where nothing can be applied.

    Raises:
        UserError: There is no kubectl.
    """
    if shutil.which("kubectl") is None:
        raise UserError("kubectl is not here: install it, or print the manifest with --dry-run and apply it elsewhere")


def submit(text: str) -> None:
    """Apply a manifest.

    Raises:
        UserError: The cluster refuses it.
    """
    _ask(["apply", "-f", "-"], text)


def cancel(name: str, namespace: str) -> None:
    """Delete a job, with its recipes.

    Raises:
        UserError: The cluster refuses.
    """
    _ask(["delete", f"pytorchjob/{name}", f"configmap/{name}", "-n", namespace, "--ignore-not-found"])


def state(name: str, namespace: str) -> str:
    """The newest condition of a job, in lower case."""
    found = _ask(["get", "pytorchjob", name, "-n", namespace, "-o", "json", "--ignore-not-found"])
    if not found.strip():
        return "deleted"
    conditions = json.loads(found).get("status", {}).get("conditions") or []
    true = [item["type"].lower() for item in conditions if item.get("status") == "True"]
    return true[-1] if true else "created"


def log_command(name: str, namespace: str, lines: int, follow: bool) -> list[str]:
    """The command that shows the lines of rank 0's pod."""
    of_first = f"training.kubeflow.org/job-name={name},training.kubeflow.org/replica-type=master"
    return ["kubectl", "logs", "-n", namespace, "-l", of_first, f"--tail={lines}", *(["-f"] if follow else [])]


def _ask(words: Sequence[str], text: str | None = None) -> str:
    """Run kubectl and return what it says.

    Raises:
        UserError: It is not there, or fails.
    """
    return ask(["kubectl", *words], f"kubectl {words[0]}", "install it, or name another cluster", text)
