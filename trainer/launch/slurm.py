"""SLURM: a job script, sbatch, and what the queue says."""

from __future__ import annotations

import getpass
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from data_shards.errors import UserError
from trainer.launch.engine import ask
from trainer.launch.environment import variables
from trainer.launch.job import Job
from trainer.run import Run

GONE = "ended"
"""State of a job that is not in the queue any more, where SLURM keeps no accounts."""
_NOTHING_SAVED = "job: stopped before it saved anything: not queued again, since it would never end; give it more hours"


def script(job: Job, after: str | None = None) -> str:
    """The job script: the same text that sbatch gets, so that it can be read, kept, and submitted by hand.

    Args:
        job: The job.
        after: Id of the job that must have ended well before this one begins.
    """
    parts = [
        "#!/bin/bash",
        f"# {job.name}: written by `trainer launch`; `sbatch THIS_FILE` queues it once more, and it goes on.",
        *_directives(job, after),
        "",
        _start(job),
        *(f"export {name}={shlex.quote(value)}  # {reason}" for name, value, reason in variables(job)),
    ]
    if job.nodes * job.processes > 1:
        parts.append("export MASTER_ADDR=$(hostname)  # this script runs on the job's first node, where rank 0 is")
    if job.cluster.setup:
        parts += ["", "# setup of the cluster file", *job.cluster.setup]
    return "\n".join([*parts, "", _commands(job), "", _run(job)]) + "\n"


def log_pattern(job: Job) -> str:
    """Name of the log in the job's folder, as SLURM fills it in: the array's task is in it."""
    return "log.txt" if len(job.tasks) == 1 else "log-%a.txt"


def _directives(job: Job, after: str | None) -> list[str]:
    cluster, cores = job.cluster, job.cluster.cpus_per_task
    folder = str(job.folder).replace("%", "%%")  # it fills in what follows a %
    options: dict[str, str | int | bool | None] = {
        "job-name": job.name,
        "output": f"{folder}/{log_pattern(job)}",
        "open-mode": "append",  # a job that is requeued goes on in its log
        "nodes": job.nodes,
        "ntasks-per-node": job.processes,
        "gres": f"{cluster.gres}:{job.processes}" if job.on_gpus else None,
        "cpus-per-task": cores,
        "mem": None if cluster.memory_gb is None else f"{cluster.memory_gb * 1024:.0f}M",
        "time": None if cluster.hours is None else _time(cluster.hours),
        "partition": cluster.partition,
        "account": cluster.account,
        "array": f"1-{len(job.tasks)}" if len(job.tasks) > 1 else None,
        "dependency": None
        if after is None
        else f"{'aftercorr' if job.each and len(job.tasks) > 1 else 'afterok'}:{after}",
        "kill-on-invalid-dep": None if after is None else "yes",
        "requeue" if cluster.requeue else "no-requeue": True,
        # without B: to the job's processes, not to this script
        "signal": f"{'USR1' if job.keep else 'TERM'}@{cluster.signal_seconds}",
        **cluster.options,
    }
    lines = []
    for name, value in options.items():
        if value is True:
            lines.append(f"#SBATCH --{name}")
        elif value is not None and value is not False:
            lines.append(f"#SBATCH --{name}={_sbatch_quoted(str(value))}")
    return lines


def _sbatch_quoted(text: str) -> str:
    """Quote a value as sbatch reads its own lines: double quotes, in which a backslash takes the next character."""
    if re.fullmatch(r"[\w@%+=:,./-]+", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _time(hours: float) -> str:
    """Hours as SLURM's D-HH:MM:SS."""
    seconds = round(hours * 3600)
    days, rest = divmod(seconds, 86400)
    return f"{days}-{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"


def _start(job: Job) -> str:
    return f"cd {shlex.quote(str(job.directory))} || exit 1"


def _commands(job: Job) -> str:
    """Set `command`, and `root` of a training, to those of this task."""
    lines = []
    for number, task in enumerate(job.tasks, 1):
        line = f"command=({shlex.join(job.command(task))})"
        if task.root is not None:
            line = f"root={shlex.quote(str(task.root))}; {line}"
        lines.append(line if len(job.tasks) == 1 else f"  {number}) {line} ;;")
    if len(job.tasks) == 1:
        return lines[0]
    return "\n".join(['case "$SLURM_ARRAY_TASK_ID" in', *lines, "esac"])


def _run(job: Job) -> str:
    """Start the ranks, and queue the job again when it was stopped before its end."""
    # one task per GPU and no binding of GPUs to tasks: NCCL reaches a node's other GPUs directly then
    srun = ["srun", "--kill-on-bad-exit=1", "--wait=300"]
    if job.cluster.cpus_per_task is not None:
        srun.append(f"--cpus-per-task={job.cluster.cpus_per_task}")
    lines = [
        "trap : TERM USR1  # the shell outlives what stops its processes",
        "# One rank that fails ends all, and so does one that is still there five minutes after another has ended.",
        "# srun's own --cpus-per-task: since SLURM 22.05 it does not take over that of the job.",
    ]
    if job.cluster.cpus_per_task is None:
        lines.pop()
    ran = f'{" ".join(srun)} "${{command[@]}}"'
    if not job.cluster.requeue:
        return "\n".join([*lines, ran])
    kept = Run("$root").checkpoints
    marked = f'started={shlex.quote(str(job.folder))}/started-"$SLURM_JOB_ID"'
    progress = [
        f'  if [ -z "$(find "{kept}" -newer "$started" -print -quit 2>/dev/null)" ]; then',
        f'    echo "{_NOTHING_SAVED}"',
        '    exit "$code"',
        "  fi",
    ]
    return "\n".join(
        [
            *([marked, 'touch "$started"'] if job.keep else []),
            *lines,
            ran,
            "code=$?",
            "# 143: stopped by a signal, and saved; 138: by SIGUSR1 before it listened. A job that was cancelled, or",
            "# requeued by others, is not RUNNING any more: from here it must not be, or it would come back to life.",
            'if { [ "$code" = 143 ] || [ "$code" = 138 ]; } &&',
            '  [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then',
            *(progress if job.keep else []),
            '  scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            'exit "$code"',
        ]
    )


def check_sbatch() -> None:
    """Refuse where nothing can be submitted.

    Raises:
        UserError: There is no sbatch.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is not here: run this on a login node of the cluster; --dry-run prints the job script anywhere"
        )


def submit(path: Path) -> str:
    """Submit a job script and return the job's id.

    Raises:
        UserError: SLURM refuses it.
    """
    said = _ask(["sbatch", "--parsable", str(path)], "sbatch refused the job")
    return said.strip().splitlines()[-1].partition(";")[0]


def cancel(job_id: str) -> None:
    """End a job for good.

    Raises:
        UserError: SLURM refuses.
    """
    _ask(["scancel", job_id], f"scancel refused job {job_id}")


def states(ids: Sequence[str]) -> dict[str, str]:
    """What SLURM says of jobs: of an array, how many tasks are in which state.

    Raises:
        UserError: SLURM does not answer.
    """
    asked = ["squeue", "-h", "-r", "-u", getpass.getuser(), "-o", "%i|%T|%r"]
    queued = _rows(_ask(asked, "squeue does not answer"))
    found = {job: _of(job, queued) for job in ids}
    missing = [job for job, state in found.items() if not state]
    if missing and shutil.which("sacct"):
        asked = ["sacct", "-n", "-X", "-P", "-j", ",".join(missing), "-o", "JobID,State"]
        try:
            ended = _rows(_ask(asked, "sacct"))
        except UserError:  # a cluster without accounts
            ended = []
        found |= {job: _of(job, ended) for job in missing}
    return {job: state or GONE for job, state in found.items()}


def _rows(text: str) -> list[list[str]]:
    return [line.split("|") for line in text.splitlines() if "|" in line]


def _of(job: str, rows: list[list[str]]) -> str:
    """State of a job in rows of id, state and reason; empty if it is not there."""
    told: dict[str, int] = {}
    for name, state, *reason in rows:
        if name == job or name.startswith(f"{job}_"):
            state = state.partition(" ")[0].lower()  # sacct: CANCELLED by 1000
            if state == "pending" and reason and reason[0] not in ("None", ""):
                state = f"pending ({reason[0]})"
            told[state] = told.get(state, 0) + 1
    if list(told.values()) == [1]:
        return next(iter(told))
    return ", ".join(f"{count} {state}" for state, count in sorted(told.items()))


def _ask(words: list[str], failed: str) -> str:
    return ask(words, failed, "run this on a login node of the cluster")
