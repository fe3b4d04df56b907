"""Targets that are kept as pictures, and the pictures of a training's validations."""

from __future__ import annotations

import bisect

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from data_shards.batch import TripletBatch
from data_shards.errors import UserError
from data_shards.loader import TripletLoader
from data_shards.sampler import EvenSampler
from trainer.modules.scoring import Prediction
from trainer.ranks import every_rank
from trainer.report.panels import Panel
from trainer.report.sheet import draw_sheet
from trainer.run import Run


def spread_samples(loader: TripletLoader, batches: int | float, count: int) -> list[int]:
    """Positions of samples with a target, evenly spread over those that an evaluation reaches: the same every time.

    Args:
        loader: The evaluation's loader.
        batches: How many of its batches are evaluated on each rank.
        count: How many samples are wanted; all where there are fewer.
    """
    view, sampler = loader.dataset, loader.sampler
    whole = isinstance(sampler, EvenSampler)
    draws = min(len(view), batches * sampler.micro_batch * sampler.world) if whole else len(view)
    fits = view.scored(int(draws))
    places = np.linspace(0, len(fits) - 1, min(len(fits), count)).round().astype(int)
    return [int(position) for position in fits[places]]


Place = tuple[float, int, int]
"""DSC of a target, its sample's position in the corpus and its own in the sample: in the order of scores."""


class PanelKeeper:
    """Keeps one target of each of some samples as a picture, on the rank that evaluates the sample.

    Args:
        samples: Positions of the samples. The first shows its first target, the next its second and so on, so that not
            all show the same term.
    """

    def __init__(self, samples: list[int]) -> None:
        self._turns = {position: turn for turn, position in enumerate(samples)}
        self._kept: dict[int, Panel] = {}

    def keep(self, batch: TripletBatch, prediction: Prediction) -> None:
        """Keep what a batch has of the samples."""
        mine: dict[int, list[int]] = {}
        for q, (position, _) in enumerate(batch.identities):
            if position in self._turns:
                mine.setdefault(position, []).append(q)
        for position, targets in mine.items():
            self._kept[position] = panel_of(batch, prediction, targets[self._turns[position] % len(targets)])

    def gathered(self) -> list[Panel]:
        """Every rank's pictures, in the order of the samples. All ranks must ask."""
        merged = {position: panel for part in every_rank(self._kept) for position, panel in part.items()}
        return [merged[position] for position in sorted(merged)]


class RankKeeper:
    """Keeps the best, the median and the worst target of an evaluation as pictures, in one pass over it.

    Best and worst are kept whenever they are beaten. For the median the targets are kept whose scores lie nearest to
    the median so far: of those that come in any order it is, in the end, nearly always among them, else a neighbour.

    Args:
        around: How many are kept about the median, on each rank.
    """

    def __init__(self, around: int = 24) -> None:
        self._around = around
        self._seen: list[float] = []
        self._kept: dict[Place, Panel] = {}

    def keep(self, batch: TripletBatch, prediction: Prediction, q: int, dsc: float) -> None:
        """Look at a target that was scored, and keep it as a picture if it may be wanted."""
        place = (dsc, *batch.identities[q])
        bisect.insort(self._seen, dsc)
        wanted = self._wanted({*self._kept, place})
        if place in wanted:
            self._kept[place] = panel_of(batch, prediction, q)
        self._kept = {one: panel for one, panel in self._kept.items() if one in wanted}

    def _wanted(self, places: set[Place]) -> set[Place]:
        """Those of some that are worst, best or near to the median."""
        ordered = sorted(places)
        median = self._seen[(len(self._seen) - 1) // 2]
        near = sorted(ordered, key=lambda place: abs(place[0] - median))[: self._around]
        return {ordered[0], ordered[-1], *near}

    def gathered(self) -> list[Panel]:
        """Worst, median and best of all ranks, as far as there are so many. All ranks must ask."""
        parts = every_rank(list(self._kept))
        scores = sorted(score for part in every_rank(self._seen) for score in part)
        places = sorted({place for part in parts for place in part})
        if not places:
            return []
        middle = min(places, key=lambda place: abs(place[0] - scores[(len(scores) - 1) // 2]))
        chosen = list(dict.fromkeys((places[0], middle, places[-1])))
        mine = {place: self._kept[place] for place in chosen if place in self._kept}
        merged = {place: panel for part in every_rank(mine) for place, panel in part.items()}
        return [merged[place] for place in chosen]


def panel_of(batch: TripletBatch, prediction: Prediction, q: int) -> Panel:
    """Target `q` of a batch as a picture."""
    image = int(batch.image_index[q])
    points = np.concatenate(
        [prediction.points[q].numpy(force=True), prediction.labels[q].numpy(force=True)[:, None]], 1
    )
    return Panel(
        key=batch.keys[image],
        term=batch.terms[q],
        image=to_uint8(batch.images[image].cpu().numpy()),
        truth=batch.masks[q].cpu().numpy().astype(np.uint8),
        prediction=prediction.masks[q].cpu().numpy().astype(np.uint8),
        box=prediction.boxes[q].numpy(force=True).astype(np.float32),
        points=points[points[:, 2] >= 0].astype(np.float32),
        target=batch.identities[q][1],
    )


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Image (C, H, W) of any dtype as a picture: (H, W) or (H, W, 3) uint8; other ranges are stretched."""
    if image.dtype != np.uint8:
        low, high = float(image.min()), float(image.max())
        image = ((image - low) / max(high - low, 1e-8) * 255).round().astype(np.uint8)
    return image[0] if image.shape[0] == 1 else np.moveaxis(image, 0, -1)


class ValidationPanels(Callback):
    """Draws prediction against truth at the same targets after each validation: ``panels/step-000100.png`` of the run.

    Loggers that take images, such as Weights & Biases, get the picture too, without the samples' keys.

    Args:
        count: How many samples are shown, evenly spread over the validation split; one target of each.
    """

    def __init__(self, count: int = 8) -> None:
        if count < 1:
            raise UserError(f"ValidationPanels: count is 1 or more, not {count}")
        self.count = count
        self._keeper: PanelKeeper | None = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the samples."""
        self._keeper = None
        if trainer.state.fn == "fit" and not (trainer.sanity_checking and trainer.global_step):
            loader, batches = trainer.val_dataloaders, trainer.num_val_batches[0]
            self._keeper = PanelKeeper(spread_samples(loader, batches, self.count))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Prediction, batch: TripletBatch, batch_idx: int
    ) -> None:
        """Keep the batch's pictures."""
        if self._keeper is not None:
            self._keeper.keep(batch, outputs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw them, on the first rank."""
        if self._keeper is None:
            return
        panels, self._keeper = self._keeper.gathered(), None
        if not trainer.is_global_zero or not panels:
            return
        path = Run(trainer.default_root_dir).panels / f"step-{trainer.global_step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet = draw_sheet(panels, f"step {trainer.global_step}")
        temporary = path.with_name(path.name + ".tmp")
        sheet.save(temporary, format="png")
        temporary.replace(path)
        takers = [logger for logger in trainer.loggers if hasattr(logger, "log_image")]
        shown = draw_sheet(panels, f"step {trainer.global_step}", keys=False) if takers else None
        for logger in takers:
            logger.log_image("val/panels", [shown], step=trainer.global_step)
