"""Environment of a job's processes: what differs from the defaults, each with its reason."""

from __future__ import annotations

from trainer.launch.job import Job

Variable = tuple[str, str, str]
"""Name, value, reason."""


def variables(job: Job) -> list[Variable]:
    """What a job sets; the cluster file's own come last, and so replace ours."""
    cores = job.cluster.cpus_per_task or 1
    found: list[Variable] = [
        ("PYTHONUNBUFFERED", "1", "lines are in the log when they are printed, not when a buffer is full"),
        ("OMP_NUM_THREADS", str(cores), "without it every process takes all cores of its node"),
    ]
    if job.on_gpus and job.keep:
        found += [
            ("NCCL_DEBUG", "WARN", "NCCL says why it fails; by default it fails without a word"),
            ("TORCH_NCCL_DUMP_ON_TIMEOUT", "1", "a collective that times out leaves what each rank waited for …"),
            ("TORCH_FR_BUFFER_SIZE", "2000", "… with the last so many collectives before it …"),
            (
                "TORCH_FR_DUMP_TEMP_FILE",
                f"{job.folder}/nccl-rank-",
                "… here: a node's /tmp is out of reach after the job",
            ),
        ]
    own = job.cluster.environment
    found = [variable for variable in found if variable[0] not in own]
    return [*found, *((name, str(value), "of the cluster file") for name, value in own.items())]
