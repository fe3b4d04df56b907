"""What `trainer predict --volume` and `trainer evaluate --volume` share: options, the model, the propagation."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from rich.progress import Progress

from data_shards.errors import UserError
from data_shards.progress import progress
from trainer.callbacks.panels import to_uint8
from trainer.callbacks.record import versions
from trainer.segment.kept import KeptMasks
from trainer.segment.loading import Loaded, device_of, load_any, load_recipe, load_run
from trainer.segment.sheet import Tile, chosen_slices, draw_tiles, save
from trainer.volumes.asked import Asked
from trainer.volumes.propagation import Found, Precision, propagate
from trainer.volumes.scan import Scan, open_scan, parse_spacing

_Thing = TypeVar("_Thing")


def add_shared_arguments(parser: argparse.ArgumentParser, *, folder: bool = False) -> None:
    """Options of all commands on volumes; of a `folder`, what makes sense for many."""
    if not folder:
        parser.add_argument("--volume", required=True, metavar="IMAGE", help="the volume: a file, or a folder of DICOM")
    whose = parser.add_argument_group("the model")
    whose.add_argument("--run", metavar="RUN", help="a run's folder: its trained weights")
    whose.add_argument("--recipe", metavar="RECIPE", help="a recipe: the weights that it names, untouched")
    whose.add_argument("--ckpt", "--ckpt_path", dest="ckpt", metavar="CKPT", help="last (default), best or a path")
    whose.add_argument(
        "--weights", choices=("average", "raw"), help="which, of a checkpoint that has an average: that by default"
    )
    whose.add_argument("--device", default="auto", help="auto (default: a GPU where there is one), cpu, cuda, cuda:1")
    whose.add_argument(
        "--precision", choices=("32-true", "bf16-mixed"), default="32-true", help="bf16-mixed is faster on a GPU"
    )
    whose.add_argument(
        "--margin", type=int, default=0, metavar="PX",
        help="models without memory: enlarge the box that a slice's mask makes for the next one (default: 0)",
    )  # fmt: skip
    whose.add_argument(
        "--at-once", type=int, default=16, metavar="N", help="objects that are decoded together (default: 16)"
    )
    what = parser.add_argument_group("the volumes" if folder else "the volume")
    if not folder:
        what.add_argument("--first", type=int, metavar="K", help="first slice that is wanted, from 0 (default: all)")
        what.add_argument("--last", type=int, metavar="K", help="last slice that is wanted")
    what.add_argument("--axis", choices=("axial", "coronal", "sagittal"), default="axial", help="how it is cut")
    what.add_argument(
        "--intensity", metavar="RULE",
        help="what models are shown, as in the training's shards: window:LOW,HIGH or window:NAME for CT, percentiles "
        "for MR, minmax, rgb or none (default: 8-bit as it is, else percentiles)",
    )  # fmt: skip
    what.add_argument("--fill", type=float, metavar="VALUE", help="take this for NaN and infinity (default: refuse)")
    what.add_argument("--spacing", metavar="Z,Y,X", help="mm between voxels, for a file that does not say")
    what.add_argument(
        "--reader", action="append", default=[], metavar="NAME=VALUE",
        help="an option of the file's reader, as under `reader` in a build spec",
    )  # fmt: skip


@dataclass
class Session:
    """A volume, and what it is segmented with.

    Attributes:
        values: The command's options.
        scan: The volume.
        device: Where models compute.
        first: First slice that is wanted.
        last: Last one.
        seconds: What the propagation took, when it is done.
    """

    values: argparse.Namespace
    scan: Scan
    device: torch.device
    first: int
    last: int
    seconds: float = 0.0

    @classmethod
    def opened(cls, values: argparse.Namespace) -> Session:
        """Open the volume.

        Raises:
            UserError: There is no model or more than one, the device is not there, or the volume cannot be read.
        """
        device = checked_device(values)
        spacing = None if values.spacing is None else parse_spacing(values.spacing)
        scan = open_scan(
            values.volume,
            axis=values.axis,
            intensity=values.intensity,
            reader_options=reader_options(values.reader),
            spacing=spacing,
            fill=values.fill,
        )
        tell(scan)
        first = 0 if values.first is None else values.first
        last = len(scan) - 1 if values.last is None else values.last
        return cls(values, scan, device, first, last)

    @property
    def middle(self) -> int:
        """Number of the middle slice of those that are wanted."""
        return (self.first + self.last + 1) // 2

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        """Millimetres between slices, rows and columns; None where they are not known, as between frames."""
        return None if self.scan.flat and self.values.spacing is None else self.scan.spacing

    def load(self) -> Loaded:
        """Load the model."""
        return load_named(self.values, self.device)

    def load_initial(self) -> Loaded | None:
        """Load the other model that answers on the slices where objects are shown, if one is named."""
        return None if self.values.initial in ("model", "truth") else load_any(self.values.initial, self.device)

    def follow(
        self, loaded: Loaded, initial: Loaded | None, asked: Sequence[Asked], take: Any, bar: Progress | None = None
    ) -> KeptMasks:
        """Propagate, with a bar.

        Args:
            loaded: The model.
            initial: The one that answers first, or None.
            asked: The objects.
            take: Called with each slice's number, masks and scores.
            bar: Where the slices are counted; one of its own by default.
        """
        precision: Precision = self.values.precision
        kept = KeptMasks(len(asked), self.scan.size)
        started = time.perf_counter()
        slices = propagate(
            loaded.model, self.scan, asked, first=self.first, last=self.last,
            initial=None if initial is None else initial.model, margin=self.values.margin,
            at_once=self.values.at_once, precision=precision,
        )  # fmt: skip
        found: Found
        for found in self.counted(slices, bar):
            take(*found)
            kept.put(*found)
        self.seconds = time.perf_counter() - started
        return kept

    def counted(self, slices: Iterable[_Thing], bar: Progress | None) -> Iterator[_Thing]:
        """Count slices on a bar, one of their own where there is none, while they are gone through."""
        with ExitStack() as end:
            shown = end.enter_context(progress()) if bar is None else bar
            task = shown.add_task("slices", total=self.last - self.first + 1)
            end.callback(shown.remove_task, task)
            for one in slices:
                yield one
                shown.advance(task)

    def draw(
        self,
        path: Path,
        asked: Sequence[Asked],
        kept: KeptMasks,
        truths: KeptMasks | None = None,
        names: Sequence[str] = (),
    ) -> None:
        """Draw the slices that show objects and some others; objects that were not shown have `names`."""
        filled = sorted({*kept.filled(), *(truths.filled() if truths else ())})
        filled = [number for number in filled if self.first <= number <= self.last]
        tiles = [
            Tile(
                number,
                to_uint8(self.scan.image(number).numpy()),
                kept.masks(number),
                None if truths is None else truths.masks(number),
                [(place, one) for place, one in enumerate(asked) if one.slice == number],
            )
            for number in chosen_slices([one.slice for one in asked], filled) or [self.middle]
        ]
        save(draw_tiles(tiles, names or [one.name for one in asked]), path)

    def describe(self, loaded: Loaded, initial: Loaded | None, asked: Sequence[Asked]) -> dict[str, Any]:
        """How the masks of objects that were shown were made, as JSON."""
        memory = hasattr(loaded.model, "look")
        how = {
            "method": "memory" if memory else "box chain",
            "margin": None if memory else self.values.margin,
            "initial": self.values.initial if initial is None else initial.origin,
            "prompts": [one.describe() for one in asked],
        }
        return self.describe_with(loaded, how)

    def describe_with(self, loaded: Loaded, how: Mapping[str, Any]) -> dict[str, Any]:
        """How masks were made, as JSON; `how` says what was asked, and by which method."""
        scan, values = self.scan, self.values
        return {
            "volume": str(values.volume),
            "size": [len(scan), *scan.size],
            "spacing": None if self.spacing is None else list(self.spacing),
            "axis": values.axis,
            "intensity": scan.rescale.provenance(),
            "fill": values.fill,
            "slices": {"first": self.first, "last": self.last},
            "model": loaded.origin,
            **how,
            "device": str(self.device),
            "precision": values.precision,
            "seconds": round(self.seconds, 2),
            "versions": versions(),
        }


def tell(scan: Scan) -> None:
    """Print what the user of a scan should be told."""
    for note in scan.notes:
        print(f"trainer: note: {note}", file=sys.stderr)


def checked_device(values: argparse.Namespace) -> torch.device:
    """Where models compute.

    Raises:
        UserError: There is no model or more than one, or the device is not there.
    """
    if (values.run is None) == (values.recipe is None):
        raise UserError("give the model by either --run RUN or --recipe RECIPE")
    if values.recipe and (values.ckpt or values.weights):
        raise UserError("--ckpt and --weights belong to --run: a recipe's weights are those that it names")
    return device_of(values.device)


def load_named(values: argparse.Namespace, device: torch.device) -> Loaded:
    """Load the model that a command line names."""
    if values.recipe:
        return load_recipe(values.recipe, device)
    return load_run(values.run, values.ckpt, values.weights, device)


def reader_options(texts: Sequence[str]) -> dict[str, Any]:
    """Options of a file's reader, from ``--reader NAME=VALUE``.

    Raises:
        UserError: One has another form.
    """
    options = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise UserError(f"--reader {text}: give NAME=VALUE, such as series=2")
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--reader {text}: '{value}' is no value") from error
    return options
