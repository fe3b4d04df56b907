"""A run: a folder that can be read years later."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_shards.errors import UserError

STOPPED = 128 + signal.SIGTERM
"""Exit code of a fit that SIGTERM or SIGUSR1 ended, as shells have it for the first: it is saved, and can go on."""


class Run:
    """Where a run keeps what; ``trainer.default_root_dir`` in a recipe.

    Args:
        root: The folder.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.recipe = self.root / "recipe.yaml"
        self.record = self.root / "run.json"
        self.stages = self.root / "stages.json"
        self.trace = self.root / "trace.csv"
        self.ranks = self.root / "ranks.csv"
        self.skipped = self.root / "skipped.csv"
        self.validations = self.root / "validation.csv"
        self.validation = self.root / "validation"
        self.panels = self.root / "panels"
        self.forensics = self.root / "forensics"
        self.checkpoints = self.root / "checkpoints"
        self.exports = self.root / "exports"
        self._made: list[Path] = []

    @classmethod
    def existing(cls, root: str | Path) -> Run:
        """Open a run that `trainer fit` made.

        Raises:
            UserError: There is no such run.
        """
        run = cls(root)
        if not run.recipe.is_file():
            raise UserError(f"{root} is no run: it has no recipe.yaml; `trainer fit -c RECIPE` makes one")
        return run

    def create(self) -> None:
        """Make the folder.

        Raises:
            UserError: It cannot be written.
        """
        self._made = [folder for folder in self.root.parents if not folder.exists()]
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.root, prefix=".writable-"):  # each rank tries with its own
                pass
        except OSError as error:
            raise UserError(
                f"cannot write to {self.root} ({error.strerror}): choose another trainer.default_root_dir"
            ) from error

    def prune(self) -> None:
        """Remove folders in which nothing was written: the run's own, and those above it that `create` made."""
        logs = self.root / "logs"
        for folder in [*sorted(logs.glob("version_*")), logs, self.checkpoints, self.root, *self._made]:
            with contextlib.suppress(OSError):  # not there, or not empty
                folder.rmdir()

    def evaluation(self, name: str) -> Path:
        """Folder of one evaluation: ``untouched`` or ``tuned`` by default."""
        return self.root / "evaluation" / name

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint, whole or not, without a look into it; None where nothing was saved yet."""
        last = self.checkpoints / "last.ckpt"
        return last if last.exists() else max(self.checkpoints.glob("step-*.ckpt"), default=None)

    def last_checkpoint(self) -> Path:
        """The newest checkpoint.

        Raises:
            UserError: There is none.
        """
        last = self.checkpoints / "last.ckpt"
        if not last.exists():
            raise UserError(f"{self.root} has no checkpoints/last.ckpt: `trainer fit` has not saved one yet")
        return last

    def add_stage(self, name: str, seconds: float, *, anew: bool = True) -> None:
        """Record how long a stage took; without `anew`, in addition to what it took before."""
        stages = read_json(self.stages) if self.stages.is_file() else {}
        before = 0.0 if anew else stages.get(name, 0.0)
        write_json(self.stages, {**stages, name: round(before + seconds, 2)})


def step_in_name(path: Path) -> int:
    """The step in a checkpoint's name, such as ``step-000500.ckpt``; −1 where there is none."""
    number = path.stem.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def opening(text: str) -> tuple[str, str]:
    """Question and caveat in a recipe's opening comment: up to its first empty line or its launch command.

    Args:
        text: The recipe, or its opening comment.
    """
    match = re.match(r"(?:#[^\n]*\n)+", text)
    question: list[str] = []
    caveat: list[str] = []
    for line in match.group().splitlines() if match else []:
        content = line.lstrip("# ").rstrip()
        if not content or content.startswith("Launch:"):
            break
        (caveat if caveat or content.startswith("Caveat:") else question).append(
            content.removeprefix("Caveat:").strip()
        )
    return " ".join(question), " ".join(caveat)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({type(error).__name__})") from error
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a text, whole or not at all: what was there stays if the disk is full, or the run is killed."""
    temporary = path.with_name(path.name + ".tmp")
    with naming(path):
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let errors of the system in a block name the file: those of writing, as of a full disk, do not by themselves."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
