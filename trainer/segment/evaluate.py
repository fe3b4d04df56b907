"""`trainer evaluate --volume`: prompts made of the truth on one slice, and scores of the whole volume in 3D."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from data_shards.display import make_table
from data_shards.errors import CommandParser, UserError, counted
from trainer.metrics import volume_scores
from trainer.run import write_json
from trainer.segment.asking import MIDDLE, named, parse_labels, parse_slice
from trainer.segment.kept import KeptMasks
from trainer.segment.session import Session, add_shared_arguments, tell
from trainer.volumes.asked import Asked, Kind, check_asked, shown
from trainer.volumes.propagation import copied
from trainer.volumes.scan import Scan, open_labels

LARGEST = "largest"
USAGE = "trainer evaluate --volume IMAGE --truth LABELS (--run RUN | --recipe RECIPE) --out FOLDER [OPTIONS]"
DESCRIPTION = """\
Show each object of a volume on one slice, with a prompt made of the truth there, segment it in all slices, and score
that in 3D: overlap (DSC) and surface (NSD), over all slices and over those that were not shown, beside what copying the
true mask of that slice into every other one would give. With --first and --last what lies outside is not scored. For
the slices that were not shown the shown one is cut out, and its neighbours touch there: their NSD is of what is joined
so.

  trainer evaluate --volume ct.nii.gz --truth organs.nii.gz --labels 1=liver,2=spleen --run runs/organs --out eval/ct
  trainer evaluate --volume ct.nii.gz --truth organs.nii.gz --recipe RECIPE --initial runs/medsam --out eval/two

The folder has scores.csv, evaluation.json and slices.png.
"""
_SCORES = ("dsc", "dsc_unprompted", "nsd", "nsd_unprompted", "hd95")
_COPIES = ("copy_dsc", "copy_dsc_unprompted", "copy_nsd", "copy_nsd_unprompted")


def evaluate_volume(arguments: list[str]) -> int:
    """Run the command and return its exit code.

    Raises:
        UserError: A mistake in the arguments, the volume, its truth or the model.
    """
    values = _parser().parse_args(arguments)
    kind = _kind(values)
    out = Path(values.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not values.overwrite:
        raise UserError(f"--out {out} is there already: give --overwrite, or another folder")
    session = Session.opened(values)
    with session.scan as scan:
        scan.require_slices(2)
        scan.require_spacing("a 3D surface distance")
        names, truths = _truths(values, scan)
        asked, drawn = _asked(session, names, truths, kind)
        check_asked(asked, scan, session.first, session.last)
        initial = session.load_initial()
        loaded = session.load()
        kept = session.follow(loaded, initial, asked, lambda *_: None)
        rows = [
            _row(place, value, session, drawn[place], kept, truths, values.tolerance)
            for place, value in enumerate(names)
        ]
        content = {
            **session.describe(loaded, initial, asked),
            "scored": {"first": session.first, "last": session.last},
            "truth": str(values.truth),
            "prompt": kind,
            "tolerance_mm": values.tolerance,
            "objects": rows,
            "mean": _means(rows),
        }
        write_json(out / "evaluation.json", content)
        _write_csv(out / "scores.csv", rows)
        if not values.no_picture:
            session.draw(out / "slices.png", asked, kept, truths)
    _print(rows, session, out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="trainer evaluate --volume", usage=USAGE, description=DESCRIPTION)
    add_shared_arguments(parser)
    prompts = parser.add_argument_group("what is shown")
    prompts.add_argument("--truth", required=True, metavar="LABELS", help="a label map of the volume")
    prompts.add_argument("--labels", metavar="1=liver,2=spleen", help="which of its labels, and their names")
    prompts.add_argument(
        "--slice", default=MIDDLE, metavar="middle|largest|K",
        help="where each object is shown: the middle of its slices (default), the one with most of it, or slice K",
    )  # fmt: skip
    prompts.add_argument(
        "--prompt", choices=("box", "points", "mask"), help="its tight box (default), innermost point, or true mask"
    )
    prompts.add_argument(
        "--initial", default="model", metavar="model|truth|RUN|RECIPE",
        help="whose mask the shown slice has: the model's own (default), the true one, or that of another model, which "
        "gets the prompt",
    )  # fmt: skip
    out = parser.add_argument_group("what is written")
    out.add_argument("--out", required=True, metavar="FOLDER")
    out.add_argument("--tolerance", type=float, default=2.0, metavar="MM", help="what NSD forgives (default: 2 mm)")
    out.add_argument("--overwrite", action="store_true", help="replace what is there")
    out.add_argument("--no-picture", action="store_true", help="draw none")
    return parser


def _kind(values: argparse.Namespace) -> Kind:
    """What objects are shown by."""
    if not 0 < values.tolerance < float("inf"):
        raise UserError(f"--tolerance {values.tolerance}: millimetres above 0")
    if values.initial == "truth":
        if values.prompt not in (None, "mask"):
            raise UserError(f"--initial truth shows the true mask, not a {values.prompt}: leave --prompt out")
        return "mask"
    kind: Kind = values.prompt or "box"
    if kind == "mask" and values.initial != "model":
        raise UserError(f"--initial {values.initial} answers a box or points, not a mask: leave one of both out")
    return kind


def _truths(values: argparse.Namespace, scan: Scan) -> tuple[dict[int, str], KeptMasks]:
    """The objects' names by their labels, and their true masks."""
    with open_labels(values.truth, scan) as labels:
        tell(labels)
        present = sorted(
            {int(value) for number in range(len(scan)) for value in np.unique(labels.raw(number)) if value}
        )
        names = named(present, parse_labels(values.labels), labels, "")
        truths = KeptMasks(len(names), scan.size)
        for number in range(len(scan)):
            picture = labels.raw(number)
            truths.put(number, np.stack([picture == value for value in names]))
    return names, truths


def _asked(
    session: Session, names: Mapping[int, str], truths: KeptMasks, kind: Kind
) -> tuple[list[Asked], list[Asked]]:
    """The objects as they are shown, and with their true masks on the same slices."""
    asked, drawn = [], []
    for place, name in enumerate(names.values()):
        number = _slice(session, truths.areas(place), name)
        mask = {name: truths.masks(number)[place]}
        asked += shown(mask, number, kind)
        drawn += shown(mask, number)
    return asked, drawn


def _slice(session: Session, areas: Mapping[int, int], name: str) -> int:
    """The slice that an object is shown on."""
    text, wanted = session.values.slice, [number for number in areas if session.first <= number <= session.last]
    if not wanted:
        raise UserError(
            f"{session.values.truth}: '{name}' is not in slices {session.first} to {session.last}: leave it out with "
            "--labels"
        )
    if text == LARGEST:
        return max(wanted, key=lambda number: areas[number])
    number = parse_slice(text, wanted[len(wanted) // 2], "--slice")
    if number not in wanted:
        raise UserError(
            f"--slice {number}: '{name}' is in slices {wanted[0]} to {wanted[-1]}: take {MIDDLE} or {LARGEST}"
        )
    return number


def _row(
    place: int,
    value: int,
    session: Session,
    drawn: Asked,
    kept: KeptMasks,
    truths: KeptMasks,
    tolerance: float,
) -> dict[str, Any]:
    """Scores of one object in the slices that are wanted.

    Unprompted slices are those that are left when the shown one is cut out. Its neighbours touch there:
    ``nsd_unprompted`` is of the surface of what is joined so, with no gap of a slice in it. Where no other slice is
    wanted, these scores are None.
    """
    spacing, depth, wanted = session.spacing, len(session.scan), slice(session.first, session.last + 1)
    truth, found = truths.volume(place, depth)[wanted], kept.volume(place, depth)[wanted]
    copy = np.stack([masks[0] for _, masks, _ in copied([drawn], session.first, session.last)])
    row: dict[str, Any] = {
        "object": drawn.name,
        "label": value,
        "slice": drawn.slice,
        "slices_truth": int(truth.any(axis=(1, 2)).sum()),
        "voxels_truth": int(truth.sum()),
        "voxels": int(found.sum()),
    }
    others = [np.delete(volume, drawn.slice - session.first, axis=0) for volume in (truth, found, copy)]
    for prefix, whole, rest in (("", found, others[1]), ("copy_", copy, others[2])):
        all_slices = volume_scores(whole, truth, spacing, tolerance)
        unprompted = volume_scores(rest, others[0], spacing, tolerance) if len(rest) else None
        row |= {
            f"{prefix}dsc": all_slices.dsc,
            f"{prefix}dsc_unprompted": unprompted.dsc if unprompted else None,
            f"{prefix}nsd": all_slices.nsd,
            f"{prefix}nsd_unprompted": unprompted.nsd if unprompted else None,
        }
        if not prefix:  # infinite where nothing was found, which JSON has no number for
            row["hd95"] = all_slices.hd95 if np.isfinite(all_slices.hd95) else None
    return row


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Mean of each score over the objects, but not of distances, which may be infinite."""
    names = (*_SCORES[:-1], *_COPIES)
    return {name: None if rows[0][name] is None else float(np.mean([row[name] for row in rows])) for name in names}


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def _print(rows: Sequence[Mapping[str, Any]], session: Session, out: Path) -> None:
    table = make_table("term", "slice", "DSC", "others", "copied", "NSD", "others", "copied", "HD95")
    shown_scores = ("dsc", "dsc_unprompted", "copy_dsc_unprompted", "nsd", "nsd_unprompted", "copy_nsd_unprompted")
    for row in rows:
        scores = (_number(row[name], 3) for name in shown_scores)
        table.add_row(row["object"], str(row["slice"]), *scores, _number(row["hd95"], 1))
    if len(rows) > 1:
        means = _means(rows)
        table.add_row("mean", "", *(_number(means[name], 3) for name in shown_scores), "", style="bold")
    Console().print(table)
    tolerance = f"{session.values.tolerance:g} mm"
    print(f"others: without the slice that was shown; copied: its true mask there instead. NSD at {tolerance}.")
    whole = len(session.scan) - 1
    outside = "" if session.last - session.first == whole else f" of 0 to {whole}; nothing outside of these counts"
    print(f"scored: slices {session.first} to {session.last}{outside}.")
    count = session.last - session.first + 1
    print(f"{counted(count, 'slice')} in {session.seconds:.1f} s on {session.device}; written: {out}")


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
