"""Runs the cells of an ablation here, one after another: what is finished is skipped, what was begun goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from data_shards.errors import UserError, counted
from trainer.ablation.cells import Cell
from trainer.launch.local import alive
from trainer.launch.records import last_step
from trainer.report.markup import duration
from trainer.report.records import read_record, read_stages
from trainer.run import STOPPED, read_json, write_json

State = Literal["finished", "trained", "begun", "failed", "waiting"]
"""Trained and scored; trained; stopped on the way; ended by an error; not begun."""
Start = Callable[[Cell, Sequence[str]], int]
"""Runs ``trainer`` with some words for a cell, and returns the exit code."""
_TOLD = re.compile(r"^trainer: (?:error: )?(.+)$")


@dataclass(frozen=True)
class Standing:
    """How far a cell is.

    Attributes:
        state: In a word.
        reason: Why it failed.
    """

    state: State
    reason: str = ""


def standing(cell: Cell) -> Standing:
    """How far a cell is, by what lies in its folder, whoever ran it: this command, a job, or a person."""
    if is_scored(cell):
        return Standing("finished")
    noted = _noted(cell)
    if "failed" in noted:
        return Standing("failed", f"{noted.get('stage', 'it')}: {noted['failed']}")
    if cell.tuned and is_trained(cell):
        return Standing("trained")
    return Standing("begun" if cell.run.newest_checkpoint() else "waiting")


def is_trained(cell: Cell) -> bool:
    """Whether its training came to its end, which a stopped one does not."""
    if not cell.tuned:
        return True
    if "fit" not in read_stages(cell.run.stages):
        return False
    return cell.steps is None or last_step(str(cell.root)) == cell.steps


def evaluation(cell: Cell) -> Path | None:
    """Folder of the evaluation of its last checkpoint, or of the untouched weights, whatever its recipe calls it."""
    last = last_step(str(cell.root)) if cell.tuned else 0
    for path in sorted(cell.run.evaluation("").glob("*/per_case.csv")):
        record = read_record(path.parent / "evaluation.json")
        scored = record.get("step") == last and bool(record.get("checkpoint")) == cell.tuned
        if scored and not path.parent.name.endswith("-partial"):
            return path.parent
    return None


def is_scored(cell: Cell) -> bool:
    """Whether it is trained to its end and scored there."""
    return is_trained(cell) and evaluation(cell) is not None


def stages(cell: Cell) -> list[tuple[str, list[str]]]:
    """What is left to do for a cell: the name of each stage, and the words after ``trainer``."""
    recipe = ["-c", str(cell.path)]
    if not cell.tuned:
        return [] if is_scored(cell) else [("test", ["test", *recipe])]
    score = ("test", ["test", *recipe, "--ckpt_path", "last"])
    if not is_trained(cell):
        return [("fit", ["fit", *recipe, "--ckpt_path", "last"]), score]
    return [] if is_scored(cell) else [score]


def run_cells(cells: Sequence[Cell], start: Start | None = None, say: Callable[[str], None] | None = None) -> int:
    """Run what is left of some cells; one that fails is noted with its reason, and the others go on.

    Args:
        cells: The cells.
        start: Runs a stage; a process of its own by default.
        say: Takes the lines of progress; they are printed by default.

    Returns:
        0, or 1 if a cell failed.

    Raises:
        UserError: A cell is being run by another process.
        KeyboardInterrupt: It was told to stop. What is done is kept.
        SystemExit: SIGTERM told it to stop; the code is `STOPPED`.
    """
    start, say = start or start_process, say or _print
    todo = [cell for cell in cells if stages(cell)]
    for cell in todo:
        _refuse_running(cell)
    if len(todo) < len(cells):
        say(f"{counted(len(cells) - len(todo), 'cell')} of {len(cells)} finished before: skipped")
    failed, began = 0, time.monotonic()
    for number, cell in enumerate(todo, 1):
        left = (time.monotonic() - began) / (number - 1) * (len(todo) - number + 1) if number > 1 else None
        about = f" (about {duration(left)} left)" if left else ""
        begun = cell.run.newest_checkpoint() if cell.tuned and not is_trained(cell) else None
        say(f"[{number}/{len(todo)}] {cell.title}{': goes on' if begun else ''}{about}; log: {_log(cell)}")
        reason = _run_cell(cell, start, say)
        if reason:
            failed += 1
            say(f"[{number}/{len(todo)}] {cell.title} FAILED: {reason}")
    return 1 if failed else 0


def _run_cell(cell: Cell, start: Start, say: Callable[[str], None]) -> str:
    """Run what is left of a cell, and return why it failed, or nothing."""
    for stage, words in stages(cell):
        began = time.monotonic()
        write_json(_note(cell), {"stage": stage, "pid": os.getpid()})
        try:
            code = start(cell, words)
        except KeyboardInterrupt:
            _note(cell).unlink(missing_ok=True)
            raise
        if code == STOPPED:
            _note(cell).unlink(missing_ok=True)
            raise SystemExit(STOPPED)
        if code:
            reason = f"{why(_log(cell)) or 'it said nothing'} (exit code {code})"
            write_json(_note(cell), {"stage": stage, "code": code, "failed": reason})
            return f"{stage}: {reason}"
        say(f"    {stage}: {duration(time.monotonic() - began)}")
    _note(cell).unlink(missing_ok=True)
    return "" if is_scored(cell) else _unfinished(cell)


def _unfinished(cell: Cell) -> str:
    """Both commands ended well, and still there is no score of the last step: say so, and note it."""
    reason = f"ended without scores of step {cell.steps}" if cell.steps else "ended without scores"
    write_json(_note(cell), {"stage": "test", "code": 0, "failed": reason})
    return reason


def why(log: Path) -> str:
    """What a command said last of why it ended: its one line, or else the last line of all."""
    try:
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return ""
    told = [match.group(1) for line in lines if (match := _TOLD.match(line))]
    last = next((line for line in reversed(lines) if line), "")
    return told[-1] if told and _TOLD.match(last) else last


def start_process(cell: Cell, words: Sequence[str]) -> int:
    """Run ``trainer`` in a process of its own, whose lines go to the cell's log.

    SIGTERM and Ctrl-C are handed on as SIGTERM, after which a training saves its step and ends; a second one ends it
    at once.

    Raises:
        KeyboardInterrupt: Ctrl-C ended it.
    """
    log = _log(cell)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "trainer.cli", *words]
    with log.open("a", encoding="utf-8") as lines:
        lines.write(f"$ trainer {' '.join(words)}\n")
        lines.flush()
        # of its own session, so that Ctrl-C reaches it from here alone, and once
        process = subprocess.Popen(command, stdout=lines, stderr=subprocess.STDOUT, start_new_session=True)  # noqa: S603
        write_json(_note(cell), {"stage": words[0], "pid": process.pid})
        with _handing_on(process) as told:
            code = process.wait()
    if signal.SIGINT in told:
        raise KeyboardInterrupt
    if told:
        return STOPPED
    return 128 - code if code < 0 else code


@contextmanager
def _handing_on(process: subprocess.Popen[Any]) -> Iterator[list[int]]:
    """Hand signals on to a process; the list has those that came."""
    told: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        told.append(number)
        if len(told) == 1:
            print("stopping: the running step is saved first; once more ends at once", file=sys.stderr, flush=True)
        process.send_signal(signal.SIGTERM if len(told) == 1 else signal.SIGKILL)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _refuse_running(cell: Cell) -> None:
    """Refuse to train a cell twice at once, as after this command alone was killed.

    Raises:
        UserError: Its process is still there.
    """
    pid = _noted(cell).get("pid")
    if pid is not None and pid != os.getpid() and alive(str(pid), str(cell.path)):
        raise UserError(f"{cell.title} is being run by process {pid}: wait for it, or end it with `kill {pid}`")


def _noted(cell: Cell) -> dict[str, Any]:
    """What was noted of a cell's last attempt."""
    return read_json(_note(cell)) if _note(cell).is_file() else {}


def _note(cell: Cell) -> Path:
    return cell.root.with_name(f"{cell.root.name}.attempt.json")


def _log(cell: Cell) -> Path:
    return cell.root.with_name(f"{cell.root.name}.log")


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
