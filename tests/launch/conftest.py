"""Engines that are not there: programs on the PATH that write down what they get and answer what a test says."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.cluster import Cluster
from trainer.launch.job import Job, Task

_PROGRAM = """\
#!{python} -S
import json, os, sys
here = os.path.dirname(os.path.abspath(__file__))
name = os.path.basename(__file__)
text = "" if sys.stdin.isatty() or name != "kubectl" or sys.argv[1:2] != ["apply"] else sys.stdin.read()
with open(os.path.join(here, "calls.jsonl"), "a") as file:
    file.write(json.dumps([name, sys.argv[1:], text]) + "\\n")
answers = json.load(open(os.path.join(here, "answers.json")))
code, out, err = answers.get(name, [0, "", ""])
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


class Engines:
    """Fake programs, and what they were told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._answers: dict[str, Any] = {}
        self._write()

    def answers(self, name: str, out: str = "", code: int = 0, err: str = "") -> None:
        """Let a program be there, and say this."""
        path = self.folder / name
        path.write_text(_PROGRAM.format(python=sys.executable))
        path.chmod(0o755)
        self._answers[name] = [code, out, err]
        self._write()

    def _write(self) -> None:
        (self.folder / "answers.json").write_text(json.dumps(self._answers))

    def calls(self, name: str) -> list[list[str]]:
        """The arguments of every call of a program."""
        return [arguments for called, arguments, _ in self._read() if called == name]

    def texts(self, name: str) -> list[str]:
        """What a program read from its standard input."""
        return [text for called, _, text in self._read() if called == name]

    def _read(self) -> list[Any]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engines:
    """Fake programs, before all others on the PATH."""
    made = Engines(tmp_path / "engines")
    monkeypatch.setenv("PATH", str(made.folder), prepend=os.pathsep)
    return made


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., Job]:
    """Make a job of some runs, without a recipe."""

    def make(
        cluster: Cluster, *roots: str, nodes: int = 1, processes: int = 1, on_gpus: bool = False, keep: bool = True
    ) -> Job:
        tasks = []
        for name in roots or ("run",):
            root = tmp_path / name
            folder = root / "jobs" / "001"
            folder.mkdir(parents=True)
            recipe = f"{folder}/1-it's one.yaml"
            words = ("fit", "-c", recipe, "--data.init_args.train", "a b;c$(d)", "--ckpt_path", "last")
            tasks.append(Task("trainer.cli", words, root, folder, {"1-it's one.yaml": "# Is it?\nmodel: {}\n"}))
        return Job("it", cluster, "cluster.yaml", nodes, processes, tuple(tasks), tmp_path, on_gpus, keep)

    return make
