"""`trainer predict --folder`: every volume and image of a folder, one after the other; what is done stays done."""

from __future__ import annotations

import argparse
import csv
import errno
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress

from data_shards.errors import CommandParser, UserError, counted
from data_shards.progress import progress
from trainer.run import write_whole
from trainer.segment.asking import parse_labels
from trainer.segment.images import FORMATS, Item, check_names, images_in
from trainer.segment.loading import Loaded
from trainer.segment.made import Place, State
from trainer.segment.masks_folder import MaskPrompts, find_masks
from trainer.segment.prompts_file import DESCRIPTION as COLUMNS
from trainer.segment.prompts_file import ImagePrompts, read_prompts
from trainer.segment.session import Session, add_shared_arguments, checked_device, load_named, reader_options
from trainer.segment.texts import Terms, add_text_arguments
from trainer.segment.writing import CONFIDENCE, PREDICTED_IOU, Segmented, write_shown, write_terms
from trainer.volumes.asked import Asked, check_asked
from trainer.volumes.output import check_output
from trainer.volumes.propagation import check_following
from trainer.volumes.scan import parse_spacing
from trainer.volumes.scan_intensity import parse_intensity

SUMMARY, PICTURES = "summary.csv", "pictures"
USAGE = "trainer predict --folder IMAGES (--run RUN | --recipe RECIPE) PROMPTS --out FOLDER [OPTIONS]"
DESCRIPTION = f"""\
Segment every volume and image of a folder and those below it, as `trainer predict --volume` does one: files of all
formats that can be read, folders of DICOM series, and each picture by itself. Masks lie where the images lie, under
their names, each in its image's geometry, with a record of how they were made (.predict.json).

  trainer predict --folder scans --run runs/liver --prompts prompts.csv --out masks
  trainer predict --folder scans --run runs/sam3 --text liver --text spleen --out masks --as nii.gz
  trainer predict --folder scans --run runs/liver --masks truth --labels 1=liver --out masks

What is there already, made by the same weights with the same prompts and options, is left alone: a command that was
stopped goes on when it is given again. What was made otherwise is only replaced with --overwrite. A volume that cannot
be read is named at the end, and the exit code is 1. {SUMMARY} has a line for each object.

{COLUMNS}
--masks shows each object of a label map by its tight box, on the slice where it is largest. Prompts made of the ground
truth are for evaluations only: nobody has them for a new image.
"""
_OPTIONS = ("axis", "intensity", "fill", "spacing", "reader", "margin", "precision")
"""Options that make masks what they are, besides prompts and model."""

Question = ImagePrompts | MaskPrompts | Terms


@dataclass
class Work:
    """One image, and how far it is.

    Attributes:
        place: Where its masks go.
        question: What it is asked; None where nothing is.
        state: How far it was at the start.
        record: The record, once it is done.
        status: ``done``, or why not.
    """

    place: Place
    question: Question | None
    state: State
    record: Mapping[str, Any] | None = None
    status: str = ""

    @property
    def item(self) -> Item:
        """The image."""
        return self.place.item


@dataclass
class Job:
    """The whole command.

    Attributes:
        values: Its options.
        loaded: The model.
        works: All images.
        failed: Those that could not be segmented, with the reason.
    """

    values: argparse.Namespace
    loaded: Loaded
    works: list[Work]
    failed: list[tuple[Item, str]] = field(default_factory=list)


def predict_folder(arguments: list[str]) -> int:
    """Run the command and return its exit code: 1 if an image could not be segmented.

    Raises:
        UserError: A mistake in the arguments, the prompts or the model.
    """
    values = _parser().parse_args(arguments)
    terms = _check(values)
    device = checked_device(values)
    folder, out = Path(values.folder), Path(values.out)
    items, others = images_in(folder, values.glob, [out, *([Path(values.masks)] if values.masks else [])])
    check_names(items)
    questions = _questions(values, terms, items)
    loaded = load_named(values, device)
    if terms:
        terms.check(loaded, values.threshold)
    else:
        check_following([loaded.model], values.margin, values.at_once)
    job = Job(values, loaded, _works(values, loaded, items, questions))
    _check_free(job)
    if others:
        print(f"trainer: note: {folder}: {counted(others, 'file')} of it that are no images: ignored", file=sys.stderr)
    try:
        _segment(job)
    except BaseException:
        with suppress(OSError):  # the disk may be full
            _write_summary(out / SUMMARY, job, terms is not None)
        raise
    _write_summary(out / SUMMARY, job, terms is not None)
    return _print(job, out)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="trainer predict --folder", usage=USAGE, description=DESCRIPTION)
    parser.add_argument("--folder", required=True, metavar="IMAGES", help="where the images are, and in folders below")
    parser.add_argument(
        "--glob", metavar="PATTERN", help="only images whose path in the folder ends so, as in '*_image.nii.gz'"
    )
    add_shared_arguments(parser, folder=True)
    prompts = parser.add_argument_group("what is shown")
    prompts.add_argument("--prompts", metavar="FILE.csv", help="boxes and points, see above")
    prompts.add_argument("--masks", metavar="FOLDER", help="label maps of the same names, for evaluations only")
    prompts.add_argument("--labels", metavar="1=liver,2=spleen", help="which labels of --masks, and their names")
    add_text_arguments(parser)
    out = parser.add_argument_group("what is written")
    out.add_argument("--out", required=True, metavar="FOLDER", help="where masks, records and summary.csv go")
    out.add_argument(
        "--as", dest="form", choices=tuple(FORMATS),
        help="the masks' format (default: the image's own; of a DICOM series a DICOM SEG, of a picture a PNG)",
    )  # fmt: skip
    out.add_argument("--pictures", action="store_true", help=f"draw some slices of each, into {PICTURES} of the folder")
    out.add_argument(
        "--overwrite", action="store_true",
        help="replace what was made otherwise; what was made just so stays: delete it to have it made anew",
    )  # fmt: skip
    return parser


def _check(values: argparse.Namespace) -> Terms | None:
    """Find mistakes that have nothing to do with any image, and return the terms that are asked for, if any."""
    terms = Terms.of(values)
    if sum((values.prompts is not None, values.masks is not None, terms is not None)) != 1:
        raise UserError("say what to segment by one of --prompts FILE.csv, --masks FOLDER and --text TERM")
    if values.labels is not None and values.masks is None:
        raise UserError("--labels belongs to --masks: names of objects are in prompts.csv")
    parse_intensity(values.intensity)
    reader_options(values.reader)
    if values.spacing is not None:
        parse_spacing(values.spacing)
    out = Path(values.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file: name a folder")
    if out.resolve() == Path(values.folder).resolve():
        raise UserError(f"--out {out}: is the folder of the images: name another one")
    return terms


def _questions(values: argparse.Namespace, terms: Terms | None, items: Sequence[Item]) -> Mapping[str, Question]:
    """What each image is asked, by its key; those that are asked nothing are not there."""
    if terms is not None:
        return dict.fromkeys([item.key for item in items], terms)
    if values.prompts is not None:
        return read_prompts(Path(values.prompts), items)
    return find_masks(Path(values.masks), items, parse_labels(values.labels))


def _works(
    values: argparse.Namespace, loaded: Loaded, items: Sequence[Item], questions: Mapping[str, Question]
) -> list[Work]:
    """What there is to do, and what is done."""
    model = loaded.fingerprint()
    options = {name: getattr(values, name) for name in _OPTIONS}
    works = []
    for item in items:
        question = questions.get(item.key)
        suffix = FORMATS[values.form] if values.form else item.suffix
        request: dict[str, Any] = {"image": item.describe(), "model": model, "options": options, "format": suffix}
        if question is not None:
            request["prompts"] = question.describe(loaded) if isinstance(question, Terms) else question.describe()
        place = Place(Path(values.out), item, suffix, request)
        works.append(Work(place, question, State("new") if question is None else place.state()))
    return works


def _check_free(job: Job) -> None:
    """Raise a `UserError` if something is there that was made otherwise, and nobody said to replace it."""
    other = [work.state.why for work in job.works if work.state.kind == "other"]
    if other and not job.values.overwrite:
        more = f" (and {counted(len(other) - 1, 'other image')} likewise)" if len(other) > 1 else ""
        raise UserError(f"{other[0]}{more}: give --overwrite, or another --out")


def _segment(job: Job) -> None:
    """Do what is not done."""
    done = [work for work in job.works if work.state.kind == "done"]
    for work in done:
        work.record, work.status = work.state.record, "done"
    if done:
        print(f"{len(done)} of {counted(len(job.works), 'image')} were there already", flush=True)
    asked = [work for work in job.works if work.question is not None and not work.status]
    for work in job.works:
        if work.question is None:
            work.status = "left out: no prompt" if job.values.prompts else "left out: no label map"
    with progress() as bar:
        volumes = bar.add_task("volumes", total=len(asked))
        for work in asked:
            _try(job, work, bar)
            bar.advance(volumes)


def _try(job: Job, work: Work, bar: Progress) -> None:
    """Segment one image; what is wrong with it is kept, and told at the end."""
    try:
        _segment_one(job, work, bar)
        return
    except UserError as error:
        reason = str(error)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"--out {job.values.out}: the disk is full: free some space, and give the command again"
            ) from error
        reason = f"{error.filename or work.item.path}: {error.strerror or type(error).__name__}"
    work.place.give_up()
    work.status = f"failed: {reason}"
    job.failed.append((work.item, reason))


def _segment_one(job: Job, work: Work, bar: Progress) -> None:
    """Open an image, segment it, and write masks and record."""
    values, place, question = job.values, work.place, work.question
    limits = (question.first, question.last) if isinstance(question, ImagePrompts) else (None, None)
    series = [f"{name}={value}" for name, value in work.item.reader.items()]
    own = {"volume": work.item.path, "first": limits[0], "last": limits[1], "reader": [*values.reader, *series]}
    session = Session.opened(argparse.Namespace(**{**vars(values), "initial": "model", **own}))
    with session.scan as scan:
        out, overwrite = place.labels(len(scan)), work.state.kind != "new"
        if isinstance(question, Terms):
            asked: list[Asked] = []
            check_output(out, scan, question.names, overwrite=overwrite)
        else:
            asked = _asked(question, session)
            if not asked:
                work.status = "left out: its label map has no object that is wanted"
                return
            check_output(out, scan, [one.name for one in asked], overwrite=overwrite)
        place.begin()
        if isinstance(question, Terms):
            made = write_terms(session, job.loaded, question, out, overwrite=overwrite, bar=bar)
            content = session.describe_with(job.loaded, question.describe(job.loaded))
        else:
            made = write_shown(session, job.loaded, asked, out, overwrite=overwrite, bar=bar)
            content = session.describe(job.loaded, None, asked)
        if values.pictures:
            session.draw(place.out / PICTURES / f"{work.item.name}.png", asked, made.kept, names=made.names)
        content = {**content, "objects": made.objects, "contested": made.contested}
        if isinstance(question, MaskPrompts):
            content["prompts_from"] = f"{question.path}: ground truth as prompts, for evaluations only"
        work.record, work.status = place.finish(content, made.files), "done"
    print(_line(work.item, made, session.seconds), flush=True)


def _asked(question: ImagePrompts | MaskPrompts | None, session: Session) -> list[Asked]:
    """The objects of an image, checked; none where its label map has none.

    Raises:
        UserError: A prompt does not fit the image.
    """
    assert question is not None  # else there is nothing to do
    if isinstance(question, MaskPrompts):
        return question.asked(session.scan)
    asked = question.asked(session.middle)
    try:
        check_asked(asked, session.scan, session.first, session.last)
    except UserError as error:
        raise UserError(f"{question.where}: {error}") from error
    return asked


def _line(item: Item, made: Segmented, seconds: float) -> str:
    """What was found in an image."""
    parts = []
    for one in made.objects:
        size = counted(one["voxels"], "voxel") if one["ml"] is None else f"{one['ml']:,.2f} ml"
        parts.append(f"{one['name']} {size if one['slices'] else 'not found'}")
    return f"{item.key}: {', '.join(parts)}; {seconds:.1f} s"


def _write_summary(path: Path, job: Job, words: bool) -> None:
    """Write a line for each object, and one for each image that has none."""
    score = CONFIDENCE if words else PREDICTED_IOU
    columns = ("image", "object", "slices", "voxels", "ml", score, "seconds", "status")
    rows: list[dict[str, Any]] = []
    for work in job.works:
        status = {"image": work.item.key, "status": work.status or "not done"}
        if work.record is None:
            rows.append(status)
            continue
        for one in work.record["objects"]:
            found = {name: one[name] for name in ("slices", "voxels", "ml", score)}
            rows.append({**status, "object": one["name"], **found, "seconds": work.record["seconds"]})
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = _Lines()
    writer = csv.DictWriter(lines, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, "".join(lines.written))


class _Lines:
    """Takes what a CSV writer writes."""

    def __init__(self) -> None:
        self.written: list[str] = []

    def write(self, text: str) -> None:
        self.written.append(text)


def _print(job: Job, out: Path) -> int:
    """Say what was done and what was not, and return the exit code."""
    left = [work for work in job.works if work.status.startswith("left out")]
    for reason in sorted({work.status for work in left}):
        names = [work.item.key for work in left if work.status == reason]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        print(f"trainer: note: {reason}: {', '.join(names[:3])}{more}", file=sys.stderr)
    for item, reason in job.failed:
        print(f"trainer: failed: {item.key}: {reason}", file=sys.stderr)
    done = sum(work.status == "done" for work in job.works)
    there = sum(work.state.kind == "done" for work in job.works)
    parts = [f"{done - there} made", f"{there} there already"]
    parts += [f"{len(left)} left out"] if left else []
    parts += [f"{len(job.failed)} failed"] if job.failed else []
    print(f"{counted(len(job.works), 'image')}: {', '.join(parts)}; written: {out}, {out / SUMMARY}")
    if job.values.masks:
        print("The prompts were made of ground truth: these masks are for evaluations only.")
    return 1 if job.failed else 0
