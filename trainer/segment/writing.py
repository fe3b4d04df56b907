"""One volume segmented and written: what ``--volume`` and ``--folder`` both do, so that both do the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from data_shards.errors import counted
from trainer.segment.kept import KeptMasks
from trainer.segment.loading import Loaded
from trainer.segment.session import Session
from trainer.segment.texts import Terms, find_terms
from trainer.volumes.asked import Asked
from trainer.volumes.output import LabelWriter

PREDICTED_IOU, CONFIDENCE = "mean_predicted_iou", "mean_confidence"
"""What the mean score of an object is called: the model's own estimate, or how sure SAM3 is that it is there."""


@dataclass(frozen=True)
class Segmented:
    """What was found in one volume, and written.

    Attributes:
        names: Of the objects.
        kept: Their masks.
        objects: What was found of each, as JSON.
        contested: Voxels that several claim and one got.
        files: What was written.
    """

    names: list[str]
    kept: KeptMasks
    objects: list[dict[str, Any]]
    contested: int
    files: tuple[Path, ...]


def write_shown(
    session: Session,
    loaded: Loaded,
    asked: Sequence[Asked],
    out: Path,
    *,
    initial: Loaded | None = None,
    separate: bool = False,
    overwrite: bool = False,
    bar: Progress | None = None,
) -> Segmented:
    """Segment objects that are shown, and write their masks in the volume's geometry.

    Args:
        session: The volume.
        loaded: The model.
        asked: The objects.
        out: Where the masks go; see `LabelWriter`.
        initial: The model that answers first, or None.
        separate: Write a file for each object.
        overwrite: Replace what is there.
        bar: Where slices are counted; one of its own by default.

    Raises:
        UserError: The prompts do not fit the volume, it cannot be read, or the masks not be written.
    """
    names = [one.name for one in asked]
    with LabelWriter(out, session.scan, names, separate=separate, overwrite=overwrite) as writer:
        kept = session.follow(loaded, initial, asked, writer.put, bar)
    return _segmented(session, names, kept, writer, PREDICTED_IOU)


def write_terms(
    session: Session,
    loaded: Loaded,
    terms: Terms,
    out: Path,
    *,
    separate: bool = False,
    overwrite: bool = False,
    bar: Progress | None = None,
) -> Segmented:
    """Find terms in a volume, and write their masks in its geometry; see `write_shown`."""
    names, slices = find_terms(session, loaded, terms, bar)
    kept = KeptMasks(len(names), session.scan.size)
    with LabelWriter(out, session.scan, names, separate=separate, overwrite=overwrite) as writer:
        for found in slices:
            writer.put(*found)
            kept.put(*found)
    return _segmented(session, names, kept, writer, CONFIDENCE)


def _segmented(session: Session, names: list[str], kept: KeptMasks, writer: LabelWriter, score: str) -> Segmented:
    objects = [kept.describe(place, name, session.spacing, score) for place, name in enumerate(names)]
    return Segmented(names, kept, objects, writer.contested, writer.files)


def lines_of(objects: Sequence[dict[str, Any]]) -> list[str]:
    """What was found of each object, a line each."""
    lines = []
    for one in objects:
        if not one["slices"]:
            lines.append(f"{one['name']}: nothing was found")
            continue
        size = counted(one["voxels"], "voxel") + ("" if one["ml"] is None else f", {one['ml']:,.2f} ml")
        where = f"{counted(one['slices'], 'slice')} ({one['first']} to {one['last']})"
        key = CONFIDENCE if CONFIDENCE in one else PREDICTED_IOU
        words = "mean confidence" if key == CONFIDENCE else "mean predicted IoU"
        lines.append(f"{one['name']}: {where}, {size}, {words} {one[key]:.2f}")
    return lines
