"""A SLURM of two virtual nodes on this machine, with daemons, keys and ports of its own."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NODES = ("n1", "n2")
_CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/slurmd.%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
OverTimeLimit=0
KillWait=20
CompleteWait=0
SlurmctldTimeout=60
SlurmdTimeout=60
MessageTimeout=30
ReturnToService=2
SwitchType=switch/none
TreeWidth=65533
{nodes}
PartitionName=tests Nodes=ALL Default=YES MaxTime=UNLIMITED State=UP
"""
_NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=1000 State=UNKNOWN"


def missing() -> str | None:
    """Why no SLURM can be started here; None if one can."""
    absent = [name for name in NEEDED if which(name) is None]
    if absent:
        return f"no SLURM here ({', '.join(absent)} missing): apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "slurmd starts jobs as root only"


def which(name: str) -> str | None:
    """Where a program is; daemons are often not on a user's path."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]))


class Slurm:
    """A SLURM that is running.

    Args:
        folder: Where everything is that it writes: short, for a socket's path has at most 107 characters.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)  # munged refuses a socket that not everyone reaches
        for name in ("state", *(f"slurmd.{node}" for node in NODES)):
            (folder / name).mkdir()
        host = socket.gethostname().partition(".")[0]
        controller, *ports = _free_ports(1 + len(NODES))
        nodes = "\n".join(
            _NODE.format(name=name, host=host, port=port) for name, port in zip(NODES, ports, strict=True)
        )
        self.configuration = folder / "slurm.conf"
        self.configuration.write_text(
            _CONFIGURATION.format(host=host, folder=folder, controller=controller, nodes=nodes)
        )
        self.environment = {"SLURM_CONF": str(self.configuration)}

    def start(self) -> None:
        """Start the daemons, and wait until both nodes take jobs.

        Raises:
            RuntimeError: They do not within a minute; what the daemons said.
        """
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        own = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *own)
        self._wait(lambda: (self.folder / "munge.socket").exists())
        self._daemon("slurmctld", "-D", "-c", "-f", str(self.configuration))
        for node in NODES:
            self._daemon("slurmd", "-D", "-c", "-N", node, "-f", str(self.configuration))
        self._wait(lambda: self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split() == list(NODES))

    def run(self, *command: object, check: bool = False) -> str:
        """What a command of SLURM says."""
        environment = {**os.environ, **self.environment}
        done = subprocess.run(
            [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=60
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str | int) -> dict[str, str]:
        """What SLURM knows of a job: ``JobState``, ``Restarts``, ``ExitCode``, …"""
        words = self.run("scontrol", "-o", "show", "job", number).split()
        return {name: value for name, _, value in (word.partition("=") for word in words)}

    def stop(self) -> None:
        """End all jobs, and the daemons that were started here."""
        if len(self._daemons) > 1:
            self.run("scancel", "--state=RUNNING", "--signal=KILL", "--full", "--user=root")
            self.run("scancel", "--user=root")
            end = time.monotonic() + 10
            while self.run("squeue", "-h").strip() and time.monotonic() < end:
                time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _daemon(self, name: str, *arguments: str) -> None:
        program = which(name)
        assert program is not None
        with (self.folder / f"{name}-{len(self._daemons)}.out").open("wb") as output:
            self._daemons.append(
                subprocess.Popen(
                    [program, *arguments],
                    stdout=output,
                    stderr=output,
                    env={**os.environ, **self.environment},
                    cwd=self.folder,
                    start_new_session=True,
                    preexec_fn=_end_with_parent,
                )
            )

    def _wait(self, ready: object) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if ready():  # type: ignore[operator]
                return
            if any(daemon.poll() is not None for daemon in self._daemons):
                break
            time.sleep(0.1)
        said = [path.read_text(errors="replace")[-1000:] for path in self.folder.glob("*.out")]
        raise RuntimeError("SLURM does not start:\n" + "\n".join(said))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _end_with_parent() -> None:
    """Let a daemon end where the tests are killed and cannot end it: PR_SET_PDEATHSIG."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
