"""What is there already of a folder's masks: which were made just so, which otherwise, and which were not finished.

A volume counts as done when its record lies beside its masks, which is written last. While it is worked on a hidden
file says so: masks without a record are then what a process left that was killed, and else somebody else's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, Literal

from data_shards.errors import UserError
from trainer.run import read_json, write_json
from trainer.segment.images import Item
from trainer.volumes.output_files import remove
from trainer.volumes.scan import RECORD

REASONS = {
    "image": "of an image that has changed since",
    "model": "by another model",
    "prompts": "with other prompts",
    "options": "with other options",
    "format": "in another format",
}
"""What may differ in a request, in words."""


@dataclass(frozen=True)
class State:
    """How far one volume is.

    Attributes:
        kind: ``new``; ``begun`` and not finished; ``done``, just as it is asked for now; or ``other``.
        why: What is other.
        record: The record, if it is done.
    """

    kind: Literal["new", "begun", "done", "other"]
    why: str = ""
    record: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Place:
    """Where the masks of one image go, and what tells how they were made.

    Attributes:
        out: The folder of all masks.
        item: The image.
        suffix: Of the masks.
        request: All that makes the masks what they are, as JSON: see `REASONS`.
    """

    out: Path
    item: Item
    suffix: str
    request: Mapping[str, Any]

    @property
    def record(self) -> Path:
        """The record's file."""
        return self._beside(RECORD)

    def labels(self, slices: int) -> Path:
        """The masks of an image with so many slices: of a picture one PNG, of more a folder with one for each."""
        return self._beside("" if self.suffix == ".png" and slices > 1 else self.suffix)

    def state(self) -> State:
        """How far it is."""
        if self.record.exists():
            return self._recorded()
        if self._begun.exists():
            return State("begun")
        there = next((path for path in (self.labels(1), self._beside(".json")) if path.is_file()), None)
        return State("other", f"{there} is there, and no record of how it was made") if there else State("new")

    def begin(self) -> None:
        """Say that it is worked on; what an earlier process left unfinished is removed."""
        self.record.parent.mkdir(parents=True, exist_ok=True)
        if self._begun.exists():
            for path in self.record.parent.glob(f".{escape(Path(self.item.name).name)}.*partial*"):
                remove(path)
        self._begun.touch()
        self.record.unlink(missing_ok=True)  # it would tell of masks that are about to go

    def give_up(self) -> None:
        """Say that it is not worked on any more; where masks lie without their record, what was said stays."""
        if not any(self.labels(slices).exists() for slices in (1, 2)):
            self._begun.unlink(missing_ok=True)

    def finish(self, content: Mapping[str, Any], files: Sequence[Path]) -> dict[str, Any]:
        """Write the record, with which it is done, and return it.

        Args:
            content: How the masks were made, and what was found.
            files: Masks and what lies beside them.
        """
        outputs = {path.name: _bytes(path) for path in files}
        record = {**content, "files": [*map(str, files), str(self.record)], "outputs": outputs, "request": self.request}
        write_json(self.record, record)
        self._begun.unlink(missing_ok=True)
        return record

    @property
    def _begun(self) -> Path:
        """The hidden file that is there while the image is worked on."""
        return self.record.with_name(f".{Path(self.item.name).name}.predict.begun")

    def _beside(self, suffix: str) -> Path:
        return self.out / f"{self.item.name}{suffix}"

    def _recorded(self) -> State:
        """The state of what has a record."""
        try:
            record = read_json(self.record)
            request, outputs = record["request"], dict(record["outputs"])
            differing = [name for name in REASONS if request[name] != json.loads(json.dumps(self.request))[name]]
        except (UserError, KeyError, TypeError, ValueError):
            return State("other", f"{self.record} is no record of `trainer predict --folder`")
        if differing:
            how = " and ".join(REASONS[name] for name in differing)
            return State("other", f"{self.record} tells of masks made {how}")
        for name, size in outputs.items():
            path = self.record.with_name(name)
            if not path.exists():
                return State("begun")
            if _bytes(path) != size:
                return State("other", f"{path} was changed since it was made")
        return State("done", record=record)


def _bytes(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
