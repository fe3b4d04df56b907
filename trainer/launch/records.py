"""What was launched: `job.json` in the folder of each job, beside its script, its recipes and its log."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data_shards.errors import UserError
from trainer.run import Run, read_json, step_in_name, write_json

RECORD = "job.json"
_DEEPEST = 6
"""Folders below the one that is searched."""


@dataclass(frozen=True)
class Record:
    """One job, or one task of an array of recipes.

    Attributes:
        id: What the engine calls it: SLURM's id, a process's number, a PyTorchJob's name.
        name: Its name.
        kind: Kind of its cluster.
        launched: When, in ISO 8601.
        root: The run's folder, or that of a corpus.
        size: Nodes and processes, in words.
        log: Where its lines go; None where they went to a terminal or stay in the cluster.
        tasks: Tasks of an array that share this record.
        place: Kubernetes' namespace; empty for other kinds.
        state: What is known here without asking: of a local job how it ended.
    """

    id: str
    name: str
    kind: str
    launched: str
    root: str
    size: str
    log: str | None = None
    tasks: int = 1
    place: str = ""
    state: str = ""


def write_record(folder: Path, record: Record) -> None:
    """Write it down."""
    write_json(folder / RECORD, asdict(record))


def read_record(folder: Path) -> Record:
    """Read it back.

    Raises:
        UserError: It is damaged.
    """
    content = read_json(folder / RECORD)
    try:
        return Record(**content)
    except TypeError as error:
        raise UserError(f"{folder / RECORD}: not what `trainer launch` writes: remove it") from error


def find(places: Sequence[str]) -> list[tuple[Path, Record]]:
    """Every job below some folders, oldest first.

    Raises:
        UserError: A folder is not there.
    """
    found: dict[Path, Record] = {}
    for place in places:
        if not Path(place).is_dir():
            raise UserError(f"{place}: no such folder: name a run, or a folder of runs")
        for folder in _folders(Path(place).absolute()):
            found[folder] = read_record(folder)
    return sorted(found.items(), key=lambda item: (item[1].launched, str(item[0])))


def _folders(place: Path) -> Iterator[Path]:
    """Folders with a record, without a look into what is large and holds none."""
    depth = len(place.parts)
    for folder, below, files in os.walk(place):
        if RECORD in files and Path(folder).parent.name.endswith("jobs"):
            yield Path(folder)
        large = ("checkpoints", "panels", "logs", "validation", "evaluation", "node_modules", "__pycache__")
        below[:] = [n for n in below if not n.startswith(".") and n not in large]
        if len(Path(folder).parts) - depth >= _DEEPEST:
            below.clear()
    beside = place.with_name(f"{place.name}.jobs")  # of a corpus, whose own folder holds nothing else
    if beside.is_dir():
        yield from (path.parent for path in sorted(beside.glob(f"*/{RECORD}")))


def last_step(root: str) -> int | None:
    """Step of a run's newest checkpoint, by its name; None where there is none."""
    checkpoints = Run(root).checkpoints
    last = checkpoints / "last.ckpt"
    paths = [last.readlink()] if last.is_symlink() else checkpoints.glob("step-*.ckpt")
    step = max(map(step_in_name, paths), default=-1)
    return None if step < 0 else step
