"""Where an export lies until the gate has passed, and how it takes its name with everything that travels along.

A kill at any moment leaves under the final name either the whole of what was there before, or nothing, or the whole of
what is new; never a file beside what belongs to another one.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from data_shards.errors import UserError

COMPANIONS = {
    "preprocessing.json": "preprocessing.json",
    "export.json": "export.json",
    "card.md": "README.md",
    "recipe.yaml": "recipe.yaml",
    "citation.bib": "citation.bib",
}
"""What travels along: its name behind that of a file, and its name in a folder."""


class Place:
    """The final name of an export, and a hidden folder beside it in which the export is made.

    As a context it takes away the hidden folder at its end, and what a killed export left at its beginning; where that
    had moved an older export aside, it comes back.

    Args:
        out: Final name.
        folder: Whether a folder is made.

    Attributes:
        made: Where the export is written: its final name, in the hidden folder.
    """

    def __init__(self, out: Path, folder: bool) -> None:
        self.out, self.folder = out, folder
        self._hidden = out.with_name(f".{out.name}.partial")
        self._new, self._old = self._hidden / "new", self._hidden / "old"
        self.made = self._new / out.name
        self._parents: list[Path] = []

    def __enter__(self) -> Place:
        with self.naming():
            self._parents = [parent for parent in self.out.parents if not parent.exists()]
            try:
                self.out.parent.mkdir(parents=True, exist_ok=True)
                self._clear()
                self._new.mkdir(parents=True)
                if self.folder:
                    self.made.mkdir()
            except BaseException:
                self._prune()
                raise
        return self

    def __exit__(self, *raised: object) -> None:
        with self.naming():
            self._clear()
        self._prune()

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Turn what the system says of files in a block into one line that names the export.

        Raises:
            UserError: A file cannot be written.
        """
        try:
            yield
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"{self.out}: cannot be written ({why}): choose another --out") from error

    def write(self, name: str, text: str) -> Path:
        """Write one of `COMPANIONS`, by its name behind a file's; return where it lies for now."""
        path = self.made / COMPANIONS[name] if self.folder else self.made.with_name(f"{self.out.name}.{name}")
        path.write_text(text, encoding="utf-8")
        return path

    def publish(self) -> None:
        """Give the export and what travels along their names."""
        with self.naming():
            if self.folder:
                self.made.replace(self.out)
                return
            names = self._names()
            self._old.mkdir()
            for name in (self.out.name, *names):  # without its file, what travels along misleads nobody
                _move(self.out.parent, self._old, name)
            for name in (*names, self.out.name):
                _move(self._new, self.out.parent, name)

    def _names(self) -> list[str]:
        """Names of what lies, or may lie, beside the file."""
        found = {f"{self.out.name}.{name}" for name in COMPANIONS}
        made = {path.name for folder in (self._new, self._old) if folder.is_dir() for path in folder.iterdir()}
        return sorted((found | made) - {self.out.name})

    def _clear(self) -> None:
        """Take the hidden folder away; what an export moved aside comes back if it was ended before it took the name.

        What comes back is copied, and the file itself moved last: a kill here is mended by the next export.
        """
        if self._old.is_dir() and not self.out.exists():
            for name in self._names():
                if (self._old / name).exists():
                    shutil.copyfile(self._old / name, self.out.parent / name)
                elif not (self._new / name).exists():  # it had been put there for a file that never came
                    (self.out.parent / name).unlink(missing_ok=True)
            _move(self._old, self.out.parent, self.out.name)
        _move(self._hidden, self._hidden, "old", "gone")  # at once: half of it must not come back
        remove(self._hidden)

    def _prune(self) -> None:
        """Take away folders that were made for the export and hold nothing."""
        for parent in self._parents:
            with contextlib.suppress(OSError):  # something is in it
                parent.rmdir()


def _move(source: Path, target: Path, name: str, new_name: str = "") -> None:
    if (source / name).exists():
        (source / name).replace(target / (new_name or name))


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
