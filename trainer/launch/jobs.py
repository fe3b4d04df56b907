"""`trainer jobs`: what was launched, and how it is doing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from data_shards.errors import CommandParser, UserError
from trainer.launch import kubernetes, local, slurm
from trainer.launch.records import Record, find, last_step

HELP = """\
What `trainer launch` started, and how it is doing.

  trainer jobs                            every job below runs/
  trainer jobs runs/medsam-full data      those of a run, or of a folder of runs or corpora
  trainer jobs --json                     the same for other programs
  trainer jobs tail runs/medsam-full      the last lines of its newest job
  trainer jobs tail 4711 -n 100 -f        more of them, of the job with this id, and then as they come
  trainer jobs cancel runs/medsam-full    end its jobs for good; `trainer launch` again goes on

States are SLURM's, Kubernetes' and the process's own; step is that of the run's last checkpoint.
A job is named by its id, its run, or its name.
"""
_RUNS = "runs"
_COMMANDS = ("tail", "cancel")
_OVER = ("ended", "failed", "stopped", "deleted", "completed", "cancelled", "timeout", "succeeded", "node_fail", "lost")
"""How the states of jobs that are over begin."""
Found = Sequence[tuple[Path, Record]]


def jobs_command(arguments: list[str]) -> int:
    """Run ``trainer jobs`` and return its exit code.

    Raises:
        UserError: A mistake in the arguments, or an engine that does not answer.
    """
    command = arguments[0] if arguments and arguments[0] in _COMMANDS else None
    parser = CommandParser(prog=f"trainer jobs{f' {command}' if command else ''}", description=HELP)
    if command is None:
        parser.add_argument("folders", nargs="*", metavar="FOLDER", help="runs, or folders of runs (default: runs)")
        parser.add_argument("--json", action="store_true", help="print JSON")
        values = parser.parse_args(arguments)
        return _list(values.folders, values.json)
    parser.add_argument("job", metavar="JOB", help="a job's id, run or name")
    parser.add_argument("--in", dest="folder", metavar="FOLDER", help="where to look for it (default: runs)")
    if command == "tail":
        parser.add_argument("-n", type=int, default=20, metavar="N", help="how many lines (default: 20)")
        parser.add_argument("-f", action="store_true", help="go on with lines as they come")
    values = parser.parse_args(arguments[1:])
    found = _named(values.job, values.folder)
    return _cancel(found) if command == "cancel" else _tail(*found[-1], max(values.n, 0), values.f)


def _list(folders: list[str], as_json: bool) -> int:
    if not folders and not Path(_RUNS).is_dir():
        raise UserError("there is no folder runs here: name a run, or a folder of runs: trainer jobs FOLDER")
    found = find(folders or [_RUNS])
    states = _states(found)
    if as_json:
        rows = [
            {**asdict(record), "state": states[folder], "folder": str(folder), "step": last_step(record.root)}
            for folder, record in found
        ]
        print(json.dumps(rows, indent=2))
        return 0
    if not found:
        print("no jobs: `trainer launch RECIPE --cluster FILE` starts one")
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("id", "name", "state", "step", "size", "launched", "run"):
        table.add_column(title, overflow="fold")
    for folder, record in found:
        step = last_step(record.root)
        launched = record.launched[:16].replace("T", " ")
        table.add_row(
            *(record.id, record.name, states[folder], "–" if step is None else f"{step:,}", record.size, launched),
            _near(record.root),
        )
    console = Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(table)
    return 0


def _near(path: str) -> str:
    """A path as seen from here, if it lies below."""
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path


def _states(found: Found) -> dict[Path, str]:
    """State of each job, by its folder; of an engine that does not answer, why."""
    states: dict[Path, str] = {}
    ids = [record.id for _, record in found if record.kind == "slurm"]
    try:
        queued = slurm.states(ids) if ids else {}
    except UserError as error:
        queued = dict.fromkeys(ids, f"unknown: {error}")
    for folder, record in found:
        if record.kind == "slurm":
            states[folder] = queued[record.id]
        elif record.kind == "kubernetes":
            try:
                states[folder] = kubernetes.state(record.id, record.place)
            except UserError as error:
                states[folder] = f"unknown: {error}"
        elif record.state == "running" and not local.alive(record.id, record.root):
            states[folder] = "lost: ended without a word"
        else:
            states[folder] = record.state
    return states


def _named(job: str, folder: str | None) -> Found:
    """The jobs of a run, or of an id or name.

    Raises:
        UserError: There are none.
    """
    if Path(job).is_dir():
        if found := find([job]):
            return found
        raise UserError(f"{job}: no job was launched there; `trainer jobs` lists what was")
    where = folder or _RUNS
    if Path(where).is_dir():
        every = find([where])
        wanted = [(at, one) for at, one in every if job in (one.id, one.name) or one.id.startswith(f"{job}_")]
        if wanted:
            return wanted
    raise UserError(f"there is no job '{job}' below {where}: `trainer jobs` lists them; --in FOLDER looks elsewhere")


def _cancel(found: Found) -> int:
    states = _states(found)
    going = [(folder, record) for folder, record in found if not states[folder].startswith(_OVER)]
    if not going:
        folder, record = found[-1]
        print(f"{record.id} ({record.name}) is over: {states[folder]}")
        return 0
    for _, record in going:
        if record.kind == "slurm":
            slurm.cancel(record.id)
        elif record.kind == "kubernetes":
            kubernetes.cancel(record.id, record.place)
        else:
            local.stop(record.id)
        print(f"cancelled {record.id} ({record.name})")
    return 0


def _tail(folder: Path, record: Record, lines: int, follow: bool) -> int:
    """Print the last lines of a job's log, and with `follow` those that come until the job is over."""
    if record.kind == "kubernetes":
        kubernetes.check_kubectl()
        return subprocess.run(kubernetes.log_command(record.id, record.place, lines, follow), check=False).returncode  # noqa: S603
    if record.log is None:
        raise UserError(
            f"{record.name} runs in the terminal where it was launched: its lines are there, and nowhere else"
        )
    logs = sorted(folder.glob(Path(record.log).name.replace("%a", "*"))) if "%a" in record.log else [Path(record.log)]
    if not (logs and logs[-1].is_file()):
        raise UserError(f"{record.log}: there are no lines yet: the job is {_states([(folder, record)])[folder]}")
    log = max(logs, key=lambda path: path.stat().st_mtime)
    if len(logs) > 1:
        print(f"==> {log} <==", file=sys.stderr)
    with log.open("rb") as file:
        for line in file.readlines()[-lines:] if lines else []:
            sys.stdout.write(line.decode("utf-8", "replace"))
        file.seek(0, os.SEEK_END)
        for text in _coming(file, folder, record) if follow else ():
            sys.stdout.write(text)
            sys.stdout.flush()
    return 0


def _coming(file: object, folder: Path, record: Record, every: float = 1.0) -> Iterator[str]:
    """What is appended to a log, until the job is over."""
    waited = 0
    while True:
        data: bytes = file.read()  # type: ignore[attr-defined]
        if data:
            yield data.decode("utf-8", "replace")
        elif waited % 10 == 9 and _states([(folder, record)])[folder].startswith(_OVER):
            return
        waited += 1
        time.sleep(every)
