"""The job script of `trainer launch` on a real SLURM, around a stand-in for the training that saves and goes on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from rig import Slurm

from trainer.cluster import Cluster
from trainer.launch import slurm as engine
from trainer.launch.job import Job, Task

PATIENCE = 90.0
LONG = 100_000
REVOKED = 2.0
"""Seconds after which a node takes a job again that was just ended on it: credentials are dated by the second."""


class Launched:
    """A job of two tasks on two nodes.

    Args:
        slurm: Where.
        root: The run's folder.
        arguments: Of the stand-in.
        hours: Time limit.
    """

    def __init__(self, slurm: Slurm, root: Path, *arguments: object, hours: float = 0.25) -> None:
        self.slurm, self.root = slurm, root
        folder = root / "jobs" / "001"
        folder.mkdir(parents=True)
        task = Task("stand_in", (str(root), *map(str, arguments)), root, folder, {})
        environment: dict[str, str | int] = {"PYTHONPATH": str(Path(__file__).parent)}
        cluster = Cluster("slurm", hours=hours, partition="tests", signal_seconds=45, environment=environment)
        script = engine.script(Job("stand-in", cluster, "here", 2, 1, (task,), Path.cwd(), on_gpus=False))
        (folder / "job.sh").write_text(script)
        self.number = engine.submit(folder / "job.sh")

    @property
    def log(self) -> str:
        path = self.root / "jobs" / "001" / "log.txt"
        return path.read_text() if path.exists() else ""

    @property
    def known(self) -> dict[str, str]:
        return self.slurm.job(self.number)

    @property
    def step(self) -> int:
        path = self.root / "now"
        return int(path.read_text() or 0) if path.exists() else 0

    def wait(self, ready: Callable[[], Any], seconds: float = PATIENCE) -> None:
        end = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < end, f"{self.known}\n{self.log}"
            time.sleep(0.05)

    def run_until(self, step: int) -> None:
        self.wait(lambda: self.step >= step)

    def go_on(self) -> None:
        """Spare it the two minutes that SLURM lets a requeued job wait."""
        self.wait(lambda: self.known["JobState"] == "PENDING")
        time.sleep(REVOKED)
        self.slurm.run("scontrol", "update", f"jobid={self.number}", "StartTime=now", check=True)

    def end(self) -> tuple[str, str]:
        """Its last state, and how often it was started again."""
        self.wait(lambda: self.known["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"))
        return self.known["JobState"], self.known["Restarts"]


@pytest.fixture(scope="module")
def limited(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """A job with the shortest time limit that there is; it waits for it while the other tests run."""
    return Launched(slurm, tmp_path_factory.mktemp("limited") / "run", 1200, hours=1 / 60)


def test_a_job_goes_on_after_a_requeue_and_after_a_signal(slurm: Slurm, tmp_path: Path, limited: Launched) -> None:
    job = Launched(slurm, tmp_path / "it's a run", 120)
    job.run_until(5)
    slurm.run("scontrol", "requeue", job.number, check=True)  # SIGTERM to everything, as preemption sends it
    job.go_on()
    assert "stopped by SIGTERM at " in job.log
    job.run_until(job.step + 5)
    slurm.run("scancel", "--signal=USR1", job.number, check=True)  # to the tasks alone, as before the time limit
    job.go_on()
    assert "stopped by SIGUSR1 at " in job.log
    assert job.end() == ("COMPLETED", "2")
    begun = [line for line in job.log.splitlines() if line.startswith("begins at ")]
    assert len(begun) == 3 and begun[0].startswith("begins at 0 on n") and "begins at 0" not in "".join(begun[1:])
    assert job.log.count("ends\n") == 1


def test_a_cancelled_job_stays_so(slurm: Slurm, tmp_path: Path) -> None:
    job = Launched(slurm, tmp_path / "run", LONG)
    job.run_until(5)
    engine.cancel(job.number)
    assert job.end() == ("CANCELLED", "0")
    job.wait(lambda: job.number not in slurm.run("squeue", "-h", "-o", "%i").split())
    time.sleep(0.5)
    assert job.known["JobState"] == "CANCELLED", "its script brought it back to life"
    assert "stopped by SIGTERM" in job.log, "it could save"


def test_a_job_that_fails_is_not_queued_again_and_ends_its_other_rank(slurm: Slurm, tmp_path: Path) -> None:
    job = Launched(slurm, tmp_path / "run", LONG, "save", 2)
    assert job.end() == ("FAILED", "0"), "srun's code is that of the rank that srun itself stopped: 143"
    assert "task 1: Exited with exit code 2" in job.log


def test_a_job_that_saves_nothing_is_not_queued_for_ever(slurm: Slurm, tmp_path: Path) -> None:
    job = Launched(slurm, tmp_path / "run", LONG, "no")
    job.run_until(3)
    slurm.run("scancel", "--signal=USR1", job.number, check=True)
    assert job.end() == ("FAILED", "0")
    assert "stopped before it saved anything" in job.log


def test_the_time_limit_s_signal_comes_in_time_and_the_job_goes_on(limited: Launched) -> None:
    limited.go_on()
    assert "stopped by SIGUSR1 at " in limited.log, "not by the limit itself, which sends SIGTERM"
    limited.run_until(limited.step + 1)
    assert limited.known["Restarts"] == "1"
    engine.cancel(limited.number)
    assert limited.end()[0] == "CANCELLED"
