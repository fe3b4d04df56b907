"""This machine: torchrun, in the foreground."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from types import FrameType

from trainer.launch.environment import variables
from trainer.launch.job import Job, Task
from trainer.run import STOPPED


def command(job: Job, task: Task) -> list[str]:
    """The command line of a task: torchrun, or plain Python for a single process."""
    python, *rest = job.command(task)
    words = [python, *rest]
    if job.processes > 1:  # `torchrun` by its module: the one of this very Python
        words = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job.processes), *rest]
    if job.cluster.setup:
        words = ["bash", "-c", "\n".join([*job.cluster.setup, 'exec "$@"']), "bash", *words]
    return words


def environment(job: Job) -> dict[str, str]:
    """The environment of its processes; what is set in the shell already stays, but for the cluster file's own."""
    own = job.cluster.environment
    ours = {name: value for name, value, _ in variables(job) if name in own or name not in os.environ}
    if "OMP_NUM_THREADS" in ours and "OMP_NUM_THREADS" not in own and job.cluster.cpus_per_task is None:
        ours["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // job.processes))
    return {**os.environ, **ours}


def run(job: Job, task: Task, started: Callable[[int], None]) -> int:
    """Run a task to its end with the terminal attached, handing on SIGTERM, SIGINT and SIGUSR1.

    Args:
        job: The job.
        task: Its task.
        started: Gets the process's number.

    Returns:
        Its exit code; `STOPPED` if it was told to stop, and did.
    """
    told: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def hand_on(number: int, frame: FrameType | None) -> None:
        told.append(number)
        if process is not None and not (number == signal.SIGINT and _in_front()):  # Ctrl-C has reached it already
            # torchrun hands SIGTERM on, and would end at SIGUSR1
            process.send_signal(signal.SIGTERM if number == signal.SIGUSR1 else number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        process = subprocess.Popen(command(job, task), env=environment(job), cwd=job.directory)  # noqa: S603
        for number in told:  # while it was started
            process.send_signal(signal.SIGTERM if number == signal.SIGUSR1 else number)
        started(process.pid)
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    # torchrun itself ends with 1, whatever its ranks say
    if code and set(told) & {signal.SIGTERM, signal.SIGUSR1}:
        return STOPPED
    if code and signal.SIGINT in told:
        return 128 + signal.SIGINT
    return 128 - code if code < 0 else code


def _in_front() -> bool:
    """Whether the terminal sends Ctrl-C to this process and its children alike."""
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False


def alive(pid: str, root: str) -> bool:
    """Whether a process is still that of a job, which has its run's folder in its words: numbers are used again."""
    try:
        os.kill(int(pid), 0)
    except (OSError, ValueError):
        return False
    try:
        with open(f"/proc/{int(pid)}/cmdline", "rb") as file:  # noqa: PTH123  # there is no /proc elsewhere
            return os.fsencode(root) in file.read()
    except OSError:
        return True


def stop(pid: str) -> None:
    """Tell it to save and end."""
    os.kill(int(pid), signal.SIGTERM)
