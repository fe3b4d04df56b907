"""What ``trainer predict`` and ``trainer test`` leave of volumes: objects in three dimensions.

Shapes: D slices, N objects, H W native height and width of a slice.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from data_shards.batch import TripletBatch, collate
from data_shards.errors import UserError, counted
from data_shards.index import Index
from data_shards.loader import TripletLoader
from data_shards.triplet import Provenance
from trainer.callbacks.evaluation import evaluation_folder
from trainer.callbacks.probes import refuse_shards
from trainer.models.sam3 import SAM3
from trainer.modules.sam3 import SAM3Module
from trainer.prompts.concepts import Concept
from trainer.ranks import every_rank
from trainer.run import Run, write_json
from trainer.volumes.linking import SliceObjects, distinct, link, renumbered
from trainer.volumes.objects import VolumeObjects, runs, write_volume

LINKED, TRACKED = "slice-wise, linked by overlap", "detector and tracker"
"""How objects were made of slices, as the output says it."""

Place = tuple[str, str, str]
"""Data set, volume and axis."""


@dataclass
class Volume:
    """What is known of a volume so far.

    Attributes:
        terms: What is asked for in its slices.
        modality: Modality of its images.
        spacing: Millimetres between slices, rows and columns; NaN where it is not known.
        size: Height and width (H, W).
        positions: Positions of its samples in the corpus, by the number of the slice.
        found: What was found of each term, by the number of the slice; empty where slices are tracked at the end.
        fault: Why it cannot be put together, if it cannot.
    """

    terms: tuple[str, ...]
    modality: str
    spacing: tuple[float, float, float]
    size: tuple[int, int]
    positions: dict[int, int] = field(default_factory=dict)
    found: dict[int, dict[str, SliceObjects]] = field(default_factory=dict)
    fault: str = ""


@dataclass(frozen=True)
class Linking:
    """How answers become objects, as ``volumes.json`` records it.

    Attributes:
        same: IoU above which two answers in one slice are the same object.
        least_overlap: Smallest IoU of an object's masks in neighbouring slices.
        gap: Most slices in a row in which an object may be missing.
        min_slices: Objects in fewer slices are left out.
    """

    same: float
    least_overlap: float
    gap: int
    min_slices: int


class VolumeRecord(Callback):
    """Makes objects of what a text-prompted model finds in the slices of volumes, into ``volumes`` of the run.

    ``DATASET-VOLUME.npz`` has for the n-th of its `terms` the array ``labels_n`` (slices, height, width), which holds
    the numbers of the objects, 0 where there is none, and ``confidence_n``, their mean confidence; ``slice_index`` and
    ``spacing`` (slices, rows, columns, in mm) say where they lie. ``volumes.json`` says of each volume how it was made:

    - slice-wise, linked by overlap: each slice is asked by itself, and masks of neighbouring slices that overlap are
      one object;
    - detector and tracker: the slices are the frames of a video to SAM3's tracker, which follows what the tuned
      detector finds (transformers' Sam3VideoModel). It needs the tracker's weights, which ``facebook/sam3`` holds.

    Args:
        method: ``link``, ``track``, or ``auto``: to track where there are weights of a tracker, else to link.
        tracker: Where the tracker's weights are, a hub name, file or folder of Sam3VideoModel; null looks into the
            model's own source of weights.
        terms: What to ask for in every volume; null asks for each term that some slice of the volume has a target of.
        same: IoU above which two answers in one slice are the same object; the more confident one stays.
        least_overlap: Smallest IoU of the masks of one object in neighbouring slices.
        gap: Most slices in a row in which an object may not be found and go on after.
        min_slices: Objects that are found in fewer slices are left out.
        begin: Confidence from which a detection begins an object of the tracker; 0.7 in SAM3.
    """

    def __init__(
        self,
        method: Literal["auto", "link", "track"] = "auto",
        tracker: str | None = None,
        terms: list[str] | None = None,
        same: float = 0.5,
        least_overlap: float = 0.3,
        gap: int = 1,
        min_slices: int = 1,
        begin: float = 0.7,
    ) -> None:
        if not 0 <= same <= 1 or not 0 < least_overlap <= 1 or not 0 <= begin <= 1:
            raise UserError(
                f"VolumeRecord: same and begin are in [0, 1], least_overlap above 0 and at most 1, not {same}, {begin} "
                f"and {least_overlap}"
            )
        if gap < 0 or min_slices < 1 or (terms is not None and not terms):
            raise UserError(
                f"VolumeRecord: gap is 0 or more, min_slices 1 or more, terms null or at least one, not {gap}, "
                f"{min_slices} and {terms}"
            )
        if not all(term.strip() for term in terms or ()):
            raise UserError(f"VolumeRecord: terms {terms}: one is empty: name what is to be segmented")
        if tracker is not None and method == "link":
            raise UserError("VolumeRecord: method link takes no tracker: leave it out, or set method to track")
        self.method, self.tracker = method, tracker
        self.terms = None if terms is None else tuple(dict.fromkeys(terms))
        self.linking, self.begin = Linking(same, least_overlap, gap, min_slices), begin
        self._tracker: Any = None
        self._why = ""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the method."""
        self._start(trainer, pl_module, trainer.predict_dataloaders, Run(trainer.default_root_dir).root / "volumes")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the method."""
        self._start(trainer, pl_module, trainer.test_dataloaders, evaluation_folder(trainer) / "volumes")

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: TripletBatch, batch_idx: int
    ) -> None:
        """Keep what the batch's slices show."""
        with trainer.precision_plugin.predict_step_context():
            self._take(trainer, pl_module, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: TripletBatch, batch_idx: int
    ) -> None:
        """Keep what the batch's slices show."""
        with trainer.precision_plugin.test_step_context():
            self._take(trainer, pl_module, batch)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is left, and the summary."""
        with torch.no_grad(), trainer.precision_plugin.predict_step_context():
            self._end(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is left, and the summary."""
        with torch.no_grad(), trainer.precision_plugin.test_step_context():
            self._end(trainer, pl_module)

    def _start(self, trainer: Trainer, module: LightningModule, loader: TripletLoader, folder: Path) -> None:
        if not isinstance(module, SAM3Module):
            raise UserError("trainer.callbacks: VolumeRecord asks in words, which only SAM3Module takes: leave it out")
        refuse_shards(trainer, "VolumeRecord", "puts its own volumes together")
        self._loader, self._folder = loader, folder
        self._asked, self._sizes = volumes_of(loader.dataset.shards.index)
        self._open: dict[Place, Volume] = {}
        self._records: list[dict[str, Any]] = []
        self._images = 0
        self._threshold = module.threshold
        self._tracker, self._why = self._find_tracker(module)
        if trainer.is_global_zero:
            print(f"volumes: {self._how}: {self._why}", flush=True)

    @property
    def _how(self) -> str:
        return LINKED if self._tracker is None else TRACKED

    def _find_tracker(self, module: SAM3Module) -> tuple[Any, str]:
        """The tracker, or None, and why."""
        if self.method == "link":
            return None, "the recipe says so"
        model = module.model
        assert isinstance(model, SAM3)
        source, why = self.tracker or model.source, "the model's weights are random: no tracker comes with them"
        if source is not None:
            from trainer.volumes.tracking import Tracker, tracker_weights

            weights, why = tracker_weights(source)
            if weights:
                tracker = Tracker(model, weights, source, module.threshold, self.begin)
                return tracker, f"{source} holds the tracker; the detector is this run's"
        if self.method == "track" or self.tracker is not None:
            raise UserError(f"VolumeRecord: {why}: name the tracker's weights, or set method to link")
        return None, why

    def _take(self, trainer: Trainer, module: LightningModule, batch: TripletBatch) -> None:
        """Keep what the batch's slices show, and write the volumes that are complete."""
        assert isinstance(module, SAM3Module)
        mine: dict[int, Volume] = {}
        for image, number in enumerate(batch.numbers or batch.positions):
            if number % trainer.world_size != trainer.global_rank:
                continue  # repeated to make the ranks even
            volume = self._volume(batch, image)
            if volume is None:
                self._images += 1
            elif not volume.fault:
                mine[image] = volume
        if self._tracker is None:
            terms = [mine[image].terms if image in mine else () for image in range(len(batch))]
            for found in module.instances(batch, terms):
                index = batch.provenances[found.image].slice_index
                assert index is not None
                objects = SliceObjects.encoded(
                    index, found.masks.cpu().numpy(), found.confidences.float().cpu().numpy()
                )
                kept = objects.subset(distinct(objects, self.linking.same))
                mine[found.image].found.setdefault(index, {})[found.term] = kept
        for place in [
            place for place, volume in self._open.items() if len(volume.positions) == self._sizes.get(place[:2])
        ]:
            self._write(place, self._open.pop(place), module)

    def _volume(self, batch: TripletBatch, image: int) -> Volume | None:
        """The volume of a slice, which has its position now; None for a plain image."""
        origin, size = batch.provenances[image], tuple(batch.images[image].shape[-2:])
        if origin.slice_index is None:
            return None
        place = (origin.dataset, origin.volume, origin.axis)
        if place not in self._open:
            terms = self.terms if self.terms is not None else self._asked.get(place[:2], ())
            self._open[place] = Volume(terms, origin.modality, _spacing(origin), (size[0], size[1]))
        volume = self._open[place]
        if origin.patch is not None:
            volume.fault = "its samples are windows of slices"
        elif size != volume.size:
            volume.fault = "its slices have different sizes"
        elif origin.slice_index in volume.positions:
            volume.fault = f"it has slice {origin.slice_index} twice"
        elif not volume.terms:
            volume.fault = "no slice of it has a target, so there is no term to ask for: give `terms`"
        volume.positions[origin.slice_index] = batch.positions[image]
        return volume

    def _end(self, trainer: Trainer, module: LightningModule) -> None:
        """Share out what is left among the ranks, write it, and write the summary."""
        assert isinstance(module, SAM3Module)
        left: dict[Place, Volume] = {}
        for part in every_rank(self._open):
            for place, volume in part.items():
                one = left.setdefault(place, volume)
                if one is not volume:
                    one.fault = one.fault or volume.fault
                    one.fault = one.fault or ("its slices have different sizes" if one.size != volume.size else "")
                    one.positions |= volume.positions
                    one.found |= volume.found
        for turn, place in enumerate(sorted(left)):
            if turn % trainer.world_size == trainer.global_rank:
                self._write(place, left[place], module)
        records = [record for part in every_rank(self._records) for record in part]
        images = sum(every_rank(self._images))
        if trainer.is_global_zero:
            self._summarize(records, images)

    def _summarize(self, records: list[dict[str, Any]], images: int) -> None:
        ordered = sorted(records, key=lambda record: (record["dataset"], record["volume"], record["axis"]))
        content = {
            "method": self._how,
            "why": self._why,
            "settings": {"threshold": self._threshold, **asdict(self.linking), "begin": self.begin},
            "volumes": ordered,
            "images_without_a_slice": images,
        }
        write_json(self._folder / "volumes.json", content)
        made = [record for record in ordered if "left_out" not in record]
        objects = sum(term["objects"] for record in made for term in record["terms"].values())
        print(f"volumes: {counted(objects, 'object')} in {counted(len(made), 'volume')}, {self._how}: {self._folder}")
        for record in ordered:
            if "left_out" in record:
                print(f"volumes: {record['dataset']} {record['volume']} is left out: {record['left_out']}")

    def _write(self, place: Place, volume: Volume, module: SAM3Module) -> None:
        """Make objects of a volume's slices, and write them."""
        dataset, name, axis = place
        record: dict[str, Any] = {"dataset": dataset, "volume": name, "axis": axis, "method": self._how}
        if volume.fault:
            self._records.append({**record, "left_out": volume.fault})
            return
        indices = sorted(volume.positions)
        slices = self._slices(volume, axis, module)
        terms = {term: VolumeObjects.of(*found, volume.size) for term, found in slices.items()}
        stem = re.sub(r"[^A-Za-z0-9_.-]", "_", f"{dataset}-{name}" + (f"-{axis}" if axis not in ("", "axial") else ""))
        write_volume(self._folder / f"{stem}.npz", terms, indices, volume.spacing, axis)
        self._records.append(
            {
                **record,
                "file": f"{stem}.npz",
                "slices": len(indices),
                "missing_slices": indices[-1] - indices[0] + 1 - len(indices),
                "terms": {term: objects.describe(volume.spacing) for term, objects in terms.items()},
            }
        )

    def _slices(
        self, volume: Volume, axis: str, module: SAM3Module
    ) -> dict[str, tuple[list[SliceObjects], list[np.ndarray]]]:
        """What was found of each term in each slice, with the numbers of the objects."""
        indices = sorted(volume.positions)
        if self._tracker is None:
            found = {term: [volume.found[index][term] for index in indices] for term in volume.terms}
            settings = self.linking.least_overlap, self.linking.gap, self.linking.min_slices
            return {term: (slices, link(slices, *settings)) for term, slices in found.items()}
        asked = [Concept(0, term, (), None, (), volume.modality, axis, (0, 0)) for term in volume.terms]
        texts = dict(zip(volume.terms, module.wording.say(asked, None), strict=True))
        tracked: dict[str, tuple[list[SliceObjects], list[np.ndarray]]] = {term: ([], []) for term in texts}
        for run in runs(indices, self.linking.gap):  # over a wide gap nothing can be followed
            image = partial(self._image, [volume.positions[index] for index in run])
            for term, found_term in self._tracker.track(run, image, texts).items():
                slices, numbers = tracked[term]
                last = max((int(some.max()) for some in numbers if some.size), default=0)
                slices += found_term.slices
                numbers += [np.where(some > 0, some + last, 0) for some in found_term.numbers]
        least = self.linking.min_slices
        return {term: (slices, renumbered(numbers, least)) for term, (slices, numbers) in tracked.items()}

    def _image(self, positions: list[int], place: int) -> Tensor:
        """Read a slice again."""
        return collate([self._loader.dataset[(0, positions[place])]]).images[0]


def volumes_of(index: Index) -> tuple[dict[tuple[str, str], tuple[str, ...]], dict[tuple[str, str], int]]:
    """Of each volume the terms that its slices have targets of, and the number of its samples.

    Args:
        index: Of the shards.

    Returns:
        Both by data set and volume; terms in alphabetical order.
    """
    samples = np.repeat(np.arange(len(index)), np.diff(index.target_start))
    rows = np.stack([index.dataset[samples], index.volume[samples], index.target_term])
    terms: dict[tuple[str, str], set[str]] = {}
    for dataset, volume, term in np.unique(rows, axis=1).T.tolist():
        terms.setdefault((str(index.datasets[dataset]), str(index.volumes[volume])), set()).add(str(index.terms[term]))
    places, counts = np.unique(np.stack([index.dataset, index.volume]), axis=1, return_counts=True)
    sizes = {
        (str(index.datasets[dataset]), str(index.volumes[volume])): int(count)
        for (dataset, volume), count in zip(places.T.tolist(), counts, strict=True)
    }
    return {place: tuple(sorted(terms.get(place, ()))) for place in sizes}, sizes


def _spacing(origin: Provenance) -> tuple[float, float, float]:
    rows, columns = origin.spacing or (np.nan, np.nan)
    return (np.nan if origin.slice_spacing is None else origin.slice_spacing, rows, columns)
