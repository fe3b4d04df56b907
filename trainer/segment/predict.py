"""`trainer predict --volume`: prompts on one slice, or words; the masks of the whole volume are written."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_shards.display import check_png
from data_shards.errors import CommandParser, UserError, counted
from trainer.run import write_json
from trainer.segment.asking import asked_of, masks_of, named, parse_labels, parse_slice
from trainer.segment.session import Session, add_shared_arguments, tell
from trainer.segment.texts import Terms, add_text_arguments
from trainer.segment.writing import Segmented, lines_of, write_shown, write_terms
from trainer.volumes.asked import Asked, check_asked, shown
from trainer.volumes.output import check_output
from trainer.volumes.scan import RECORD, open_labels

USAGE = "trainer predict --volume IMAGE (--run RUN | --recipe RECIPE) PROMPTS --out FILE [OPTIONS]"
DESCRIPTION = """\
Show objects on one slice of a volume, and segment them in all slices: SAM2 follows them through its memory; SAM, MedSAM
and LiteMedSAM are asked on each slice with the box of the mask on the slice before.

  trainer predict --volume ct.nii.gz --run runs/liver --box 40:120,90,260,230=liver --out liver.nii.gz
  trainer predict --volume ct.nii.gz --recipe recipes/quickstart.yaml --point 52,70 --point 60,81,- --out one.nii.gz
  trainer predict --volume series/ --run runs/organs --mask drawn.nii.gz --slice 40 --labels 1=liver --out o.dcm

SAM3 is asked in words, each slice for each term:

  trainer predict --volume ct.nii.gz --run runs/sam3 --text liver --text "portal vein" --out o.nii.gz [--instances]

Boxes are x0,y0,x1,y1 and points x,y in pixels of the slice, + on the object and - beside it; SLICE is a number from 0,
and the middle slice if left out. Prompts with one name are one object. A mask is taken as the answer on its slice.
Models without memory find something in nearly every box: tell them with --first and --last where the objects end.
Beside the output lie a picture (.png) and how it was made (.predict.json).
"""


def predict_volume(arguments: list[str]) -> int:
    """Run the command and return its exit code.

    Raises:
        UserError: A mistake in the arguments, the volume, the prompts or the model.
    """
    values = _parser().parse_args(arguments)
    terms = Terms.of(values)
    if terms and (values.box or values.point or values.mask or values.initial != "model"):
        raise UserError("--text asks in words alone: leave out --box, --point, --mask and --initial")
    session = Session.opened(values)
    with session.scan as scan:
        asked = [] if terms else _asked(session)
        if not terms:
            check_asked(asked, scan, session.first, session.last)
        out = Path(values.out)
        names = [one.name for one in asked] or list(terms.names if terms else ())
        check_output(out, scan, names, separate=values.separate, overwrite=values.overwrite)
        record, picture = _places(values, out)
        initial = session.load_initial()
        loaded = session.load()
        how = {"separate": values.separate, "overwrite": values.overwrite}
        if terms:
            terms.check(loaded, values.threshold)
            made = write_terms(session, loaded, terms, out, **how)
            content = session.describe_with(loaded, terms.describe(loaded))
        else:
            made = write_shown(session, loaded, asked, out, initial=initial, **how)
            content = session.describe(loaded, initial, asked)
        files = [*map(str, made.files), *([str(picture)] if picture else []), str(record)]
        write_json(record, {**content, "objects": made.objects, "contested": made.contested, "files": files})
        if picture:
            session.draw(picture, asked, made.kept, names=made.names)
    _print(session, made, files)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="trainer predict --volume", usage=USAGE, description=DESCRIPTION)
    add_shared_arguments(parser)
    prompts = parser.add_argument_group("what is shown")
    prompts.add_argument("--box", action="append", default=[], metavar="[SLICE:]x0,y0,x1,y1[=NAME]")
    prompts.add_argument("--point", action="append", default=[], metavar="[SLICE:]x,y[,+|-][=NAME]")
    prompts.add_argument("--mask", metavar="FILE", help="a label map of the volume: every label of one slice is shown")
    prompts.add_argument("--slice", metavar="K", help="the slice of --mask (default: middle)")
    prompts.add_argument("--labels", metavar="1=liver,2=spleen", help="which labels of --mask, and their names")
    prompts.add_argument(
        "--initial", default="model", metavar="model|truth|RUN|RECIPE",
        help="whose mask the slice has that is shown: the model's own (default), that of --mask, or that of another "
        "model, which gets the box (of --mask: its tight box) or points",
    )  # fmt: skip
    add_text_arguments(parser)
    out = parser.add_argument_group("what is written")
    out.add_argument(
        "--out", required=True, metavar="FILE",
        help=".nii.gz, .nrrd, .mha, .npz, .dcm (a DICOM SEG of a DICOM series), .png (of one picture), or a folder of "
        "PNGs",
    )  # fmt: skip
    out.add_argument("--separate", action="store_true", help="a file for each object, where they may overlap")
    out.add_argument("--overwrite", action="store_true", help="replace what is there")
    out.add_argument("--picture", metavar="FILE.png", help="where the picture goes (default: beside the output)")
    out.add_argument("--no-picture", action="store_true", help="draw none")
    return parser


def _asked(session: Session) -> list[Asked]:
    """The objects that the command line shows."""
    values = session.values
    if values.mask is None and (values.slice is not None or values.labels is not None):
        raise UserError(
            "--slice and --labels belong to --mask: a box or point names its slice itself, as in --box 40:…"
        )
    if values.initial == "truth" and values.mask is None:
        raise UserError("--initial truth takes the mask of --mask: give it, or leave --initial out")
    asked = asked_of(values.box, values.point, session.middle)
    if values.mask is None:
        return asked
    number = session.middle if values.slice is None else parse_slice(values.slice, session.middle, "--slice")
    if not 0 <= number < len(session.scan):
        raise UserError(f"--slice {number}: {session.scan.name} has slices 0 to {len(session.scan) - 1}")
    with open_labels(values.mask, session.scan) as labels:
        tell(labels)
        picture = labels.raw(number)
        present = [int(value) for value in np.unique(picture) if value]
        names = named(present, parse_labels(values.labels), labels, f" on slice {number}")
    other = values.initial not in ("model", "truth")
    return [*asked, *shown(masks_of(picture, names), number, "box" if other else "mask")]


def _places(values: argparse.Namespace, out: Path) -> tuple[Path, Path | None]:
    """Where the record and the picture go.

    Raises:
        UserError: One is there already, or the picture would be no PNG.
    """
    stem = re.sub(r"(\.nii)?\.[A-Za-z]+$", "", out.name)
    record = out.with_name(stem + RECORD)
    beside = f"{stem}.png" if out.suffix.lower() != ".png" else f"{stem}.picture.png"
    picture = None if values.no_picture else Path(values.picture or out.with_name(beside))
    if picture is not None:
        check_png(picture)
    for path in (record, picture):
        if path is not None and path.exists() and not values.overwrite:
            raise UserError(f"{path} is there already: give --overwrite, or another --out")
    return record, picture


def _print(session: Session, made: Segmented, files: Sequence[str]) -> None:
    for line in lines_of(made.objects):
        print(line)
    if made.contested:
        voxels = counted(made.contested, "voxel")
        print(f"{voxels} belong to several objects: the surer one has them; --separate keeps all")
    count = session.last - session.first + 1
    rate = session.seconds / count
    print(f"{counted(count, 'slice')} in {session.seconds:.1f} s on {session.device} ({rate:.2f} s each)")
    print(f"written: {', '.join(files)}")
