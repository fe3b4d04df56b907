"""Starts runs, on one rank or several, lets something go wrong, and compares what is left with an undisturbed run."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from corpus import recipe, write_recipe, write_shards

from trainer.checkpoints import read
from trainer.report.traces import read_order
from trainer.run import Run

HERE = Path(__file__).parent
TIMEOUT = 240.0


def environment() -> dict[str, str]:
    """That of a command which no rank has started."""
    paths = [str(HERE), str(HERE.parents[1]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    others = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "SAM_TRAINER_FIRST_RANK")
    kept = {name: value for name, value in os.environ.items() if name not in others}
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


class Zygote:
    """A process that has imported everything, and forks for each command."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment(),
        )
        self._answers: dict[int, queue.Queue[int]] = {}
        self._number = 0
        assert self._process.stdout is not None
        assert json.loads(self._process.stdout.readline()) == {"ready": True}
        threading.Thread(target=self._listen, daemon=True).start()

    def fork(
        self,
        arguments: Sequence[object],
        output: Path,
        variables: dict[str, str],
        fault: dict[str, Any] | None = None,
        folder: Path | None = None,
    ) -> Process:
        """Start a command."""
        self._number += 1
        answers = self._answers[self._number] = queue.Queue()
        order = {
            "id": self._number,
            "arguments": [str(argument) for argument in arguments],
            "environment": variables,
            "output": str(output),
            "fault": fault,
            "folder": folder and str(folder),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Process(answers.get(timeout=30), answers, output)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            found = json.loads(line)
            self._answers[found["id"]].put(found.get("pid", found.get("code")))


@dataclass
class Process:
    """A command that is running."""

    pid: int
    answers: queue.Queue[int]
    output: Path
    code: int | None = None

    def wait(self, seconds: float = TIMEOUT) -> int:
        """Its exit code, negative for a signal; one that does not end is a failure, and is ended."""
        if self.code is None:
            try:
                self.code = self.answers.get(timeout=seconds)
            except queue.Empty:
                raise AssertionError("it hangs") from None
        return self.code

    @property
    def running(self) -> bool:
        with contextlib.suppress(queue.Empty):
            self.code = self.answers.get_nowait()
        return self.code is None

    def signal(self, number: int, *, group: bool = False) -> None:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    @property
    def said(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def rank_environment(rank: int, ranks: int, port: int, how: str) -> dict[str, str]:
    """What torchrun, or srun, tells a rank."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    if ranks == 1:
        return {}
    if how == "srun":
        names = {"NTASKS": ranks, "PROCID": rank, "LOCALID": rank, "NNODES": 1, "NODEID": 0, "JOB_ID": 1}
        names |= {"NTASKS_PER_NODE": ranks, "NODELIST": "localhost", "JOB_NAME": "faults"}
        return {**address, **{f"SLURM_{name}": str(value) for name, value in names.items()}}
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
    return {**address, "TORCHELASTIC_RUN_ID": "faults", **{name: str(value) for name, value in names.items()}}


@dataclass
class Ended:
    """How the ranks of a run ended."""

    codes: list[int]
    said: list[str]

    @property
    def lines(self) -> list[str]:
        """What was said, without the progress that every run says."""
        return [line for text in self.said for line in text.splitlines() if line.strip()]

    @property
    def errors(self) -> list[str]:
        return [line for line in self.lines if line.startswith("trainer: error: ")]

    def check_quiet(self) -> None:
        """No rank shows a traceback."""
        assert not any("Traceback" in line for line in self.lines), "\n".join(self.lines)

    def stopped_by(self, code: int = 2) -> str:
        """The one line of a run that refused to go on."""
        self.check_quiet()
        assert set(self.codes) == {code}, (self.codes, self.lines)
        assert len(self.errors) == 1, "\n".join(self.lines)
        return self.errors[0].removeprefix("trainer: error: ")


@dataclass
class Lane:
    """One place in which runs take place one after the other, always in the same folder: checkpoints name it."""

    home: Path
    zygote: Zygote = field(default_factory=Zygote)
    expected: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        self.root = self.home / "run"
        self.struck = self.home / "struck.txt"
        self.shards = write_shards(self.home / "shards")
        self.processes: list[Process] = []
        self._count = 0

    def anew(self) -> None:
        """Forget the run, and end what is left of it."""
        for process in self.processes:
            if process.running:
                process.signal(signal.SIGKILL, group=True)
                process.wait()
        self.processes.clear()
        for path in (self.root, self.root.resolve()):
            shutil.rmtree(path, ignore_errors=True)
        self.root.unlink(missing_ok=True)

    def start(
        self,
        variant: Variant,
        faults: dict[int, dict[str, Any]] | None = None,
        *arguments: object,
        how: str = "torchrun",
    ) -> list[Process]:
        """Start or go on with a run."""
        self._count += 1
        self.struck.unlink(missing_ok=True)
        for fault in (faults or {}).values():
            fault["log"] = str(self.struck)
        path = write_recipe(self.home / "recipe.yaml", variant.recipe(self.shards, self.root))
        port = free_port()
        self.processes = [
            self.zygote.fork(
                ("fit", "-c", path, "--ckpt_path", "last", *arguments),
                self.home / f"output-{self._count}-{rank}.txt",
                rank_environment(rank, variant.ranks, port, how),
                (faults or {}).get(rank),
            )
            for rank in range(variant.ranks)
        ]
        return list(self.processes)

    def run(
        self,
        variant: Variant,
        faults: dict[int, dict[str, Any]] | None = None,
        *arguments: object,
        how: str = "torchrun",
    ) -> Ended:
        """Start or go on with a run, and wait for its end."""
        return finish(self.start(variant, faults, *arguments, how=how))

    def launch(self, variant: Variant) -> list[Process]:
        """Start a run as a user does, whose first process starts the other rank; both, once they train."""
        self._count += 1
        path = write_recipe(self.home / "recipe.yaml", variant.recipe(self.shards, self.root))
        output = self.home / f"output-{self._count}.txt"
        command = [sys.executable, "-m", "trainer.cli", "fit", "-c", str(path), "--ckpt_path", "last"]
        with output.open("w") as file:
            first = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment(), start_new_session=True
            )
        answers: queue.Queue[int] = queue.Queue()
        threading.Thread(target=lambda: answers.put(first.wait()), daemon=True).start()
        self.processes = [Process(first.pid, answers, output)]
        wait_for(self.processes[0], self.root, 2)
        others = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        assert len(others) == 1, self.processes[0].said
        return [*self.processes, Process(int(others[0]), queue.Queue(), output)]

    def command(self, *arguments: object, folder: Path | None = None) -> Ended:
        """Run any command to its end."""
        self._count += 1
        output = self.home / f"output-{self._count}.txt"
        return finish([self.zygote.fork(arguments, output, {}, folder=folder)])

    def undisturbed(self, variant: Variant) -> dict[str, Any]:
        """What a run leaves that nothing happens to."""
        if variant.name not in self.expected:
            self.anew()
            ended = self.run(variant)
            assert set(ended.codes) == {0}, ended.lines
            self.expected[variant.name] = left_by(self.root)
        return self.expected[variant.name]

    def go_on(self, variant: Variant) -> Ended:
        """Go on with a run; it ends as the undisturbed one."""
        ended = self.run(variant)
        ended.check_quiet()
        assert set(ended.codes) == {0}, "\n".join(ended.lines)
        compare(left_by(self.root), self.expected[variant.name])
        return ended


def finish(processes: list[Process]) -> Ended:
    """Wait for all ranks; those that hang are a failure, and say where they are."""
    try:
        codes = [process.wait() for process in processes]
    except AssertionError:
        hang = [process for process in processes if process.running]
        for process in hang:
            process.signal(signal.SIGUSR2)
        time.sleep(1)
        for process in hang:
            process.signal(signal.SIGKILL, group=True)
        said = "\n".join(f"rank {n}, {p.code}: {p.said}" for n, p in enumerate(processes))
        raise AssertionError(f"ranks {[processes.index(process) for process in hang]} hang:\n{said}") from None
    return Ended(codes, [process.said for process in processes])


@dataclass(frozen=True)
class Variant:
    """A kind of run."""

    name: str
    ranks: int = 1
    strategy: Any = "ddp"
    every: int = 2
    options: tuple[tuple[str, Any], ...] = ()

    def recipe(self, shards: Path, root: Path) -> dict[str, Any]:
        content = recipe(shards, root, self.ranks, self.strategy)
        content["checkpoint"]["every_n_steps"] = self.every
        for key, value in self.options:
            node = content
            *parents, last = key.split(".")
            for name in parents:
                node = node[name]
            node[last] = value
        return content


def lines(root: Path) -> int:
    """Batches that a run has traced so far, on its first rank."""
    trace = root / "trace.csv"
    return trace.read_bytes().count(b"\n") if trace.exists() else 0


def wait_for(process: Process, root: Path, count: int) -> bool:
    """Wait until a run has traced so many lines; whether it still runs."""
    end = time.monotonic() + TIMEOUT
    while process.running and lines(root) < count and time.monotonic() < end:
        time.sleep(0.001)
    return process.running


def left_by(root: Path) -> dict[str, Any]:
    """What a finished run leaves that has to be the same however often it was disturbed."""
    run = Run(root)
    losses: dict[tuple[str, str, str], str] = {}
    for path in sorted(root.glob("trace*.csv")):
        with path.open(newline="") as handle:
            for row in csv.DictReader(handle):  # of a step that was taken again, the last attempt counts
                losses[path.name, row["step"], row["batch"]] = row["loss"]
    last = run.newest_checkpoint()
    assert last is not None
    content = read(last)
    return {
        "order": read_order(root),
        "losses": losses,
        "validations": run.validations.read_text(),
        "best": sorted(path.name for path in run.checkpoints.glob("best-*.ckpt")),
        "step": content["global_step"],
        "weights": content["state_dict"],
        "average": content["average"]["weights"],
    }


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Check that two runs ended alike, to the last bit."""
    for name in ("order", "losses", "validations", "best", "step"):
        assert found[name] == expected[name], f"{name}: {found[name]} instead of {expected[name]}"
    for name in ("weights", "average"):
        assert found[name].keys() == expected[name].keys()
        apart = [key for key, tensor in expected[name].items() if not torch.equal(tensor, found[name][key])]
        assert not apart, f"{name}: {apart[:3]} and {len(apart)} in all differ"


@contextlib.contextmanager
def lane(home: Path) -> Iterator[Lane]:
    made = Lane(home)
    try:
        yield made
    finally:
        made.zygote.close()
