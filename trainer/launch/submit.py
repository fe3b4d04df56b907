"""Starts or submits jobs, and writes down what was started."""

from __future__ import annotations

import datetime
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_shards.errors import UserError
from trainer.launch import kubernetes, local, slurm
from trainer.launch.job import Job, Task
from trainer.launch.records import Record, write_record
from trainer.run import STOPPED, Run

SCRIPT, MANIFEST = "job.sh", "job.yaml"


def launch(jobs: Sequence[Job]) -> int:
    """Start or submit jobs, each after the one before it.

    Returns:
        The exit code: 0 if all were submitted, or that of the first task here that failed.

    Raises:
        UserError: A folder cannot be written, or the engine refuses.
    """
    before: str | None = None
    for job in jobs:
        _write(job)
        if job.cluster.kind == "local":
            code = _run_here(job)
            if code:
                return code
            continue
        try:
            before = _submit(job, before)
        except UserError:
            for folder in {task.folder for task in job.tasks}:
                shutil.rmtree(folder, ignore_errors=True)
            raise
    return 0


def _write(job: Job) -> None:
    """Write the recipes of every task into its folder."""
    for task in job.tasks:
        if task.root is not None and job.cluster.kind != "kubernetes":
            Run(task.root).create()
        for name, text in task.files.items():
            task.folder.mkdir(parents=True, exist_ok=True)
            (task.folder / name).write_text(text, encoding="utf-8")
    job.folder.mkdir(parents=True, exist_ok=True)


def _submit(job: Job, after: str | None) -> str:
    """Hand a job to its engine, and say where everything is."""
    if job.cluster.kind == "kubernetes":
        (job.folder / MANIFEST).write_text(kubernetes.manifest(job), encoding="utf-8")
        kubernetes.submit((job.folder / MANIFEST).read_text(encoding="utf-8"))
        number = job.name
    else:
        (job.folder / SCRIPT).write_text(slurm.script(job, after), encoding="utf-8")
        number = slurm.submit(job.folder / SCRIPT)
    limit = f", at most {job.cluster.hours:g} h at a time" if job.cluster.hours else ""
    print(f"submitted {job.name} as {number}: {job.size()}{limit}")
    for record, folder in _records(job, number):
        write_record(folder, record)
        print(f"  run   {record.root}")
        if record.log:
            print(f"  log   {record.log}")
    print(f"  trainer jobs tail {number} -f · trainer jobs cancel {number}" if job.keep else f"  script {job.folder}")
    return number


def _records(job: Job, number: str) -> list[tuple[Record, Path]]:
    """One for each training; one for all parts of a corpus."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    place = job.cluster.namespace if job.cluster.kind == "kubernetes" else ""
    log = None if job.cluster.kind != "slurm" else str(job.folder / slurm.log_pattern(job))
    whole = Record(number, job.name, job.cluster.kind, now, _root(job.tasks[0]), job.size(), log, len(job.tasks), place)
    if len(job.tasks) == 1 or not job.keep:
        return [(whole, job.folder)]
    size = replace(job, tasks=job.tasks[:1]).size()
    return [
        (
            replace(
                whole,
                id=f"{number}_{index}" if job.cluster.kind == "slurm" else number,
                root=_root(task),
                log=log and log.replace("%a", str(index)),
                tasks=1,
                size=size,
            ),
            task.folder,
        )
        for index, task in enumerate(job.tasks, 1)
    ]


def _root(task: Task) -> str:
    """The run, or the corpus beside whose folder the jobs are."""
    if task.root is not None:
        return str(task.root)
    return str(task.folder.parent).removesuffix(".jobs")


def _run_here(job: Job) -> int:
    """Run the tasks one after the other; one that is told to stop ends the row."""
    first = 0
    for task in job.tasks:
        print(f"launching {job.name} here: {replace(job, tasks=(task,)).size()}; run {_root(task)}", file=sys.stderr)
        print(f"  {shlex.join(local.command(job, task))}", file=sys.stderr, flush=True)
        code = _run_task(job, task)
        first = first or code
        if code and (not job.keep or code in (STOPPED, 130)):
            return code
    return first


def _run_task(job: Job, task: Task) -> int:
    """Run one task to its end, with a record of it while it runs and after."""
    ((record, folder),) = _records(replace(job, tasks=(task,)), str(os.getpid()))

    def started(number: int) -> None:
        nonlocal record
        record = replace(record, id=str(number), state="running")
        write_record(folder, record)

    code = local.run(job, task, started)
    ended = "ended" if code == 0 else "stopped, saved" if code == STOPPED else f"failed ({code})"
    write_record(folder, replace(record, state=ended))
    return code
