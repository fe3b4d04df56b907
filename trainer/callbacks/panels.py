"""Targets that are kept as pictures, and the pictures of a training's validations."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from pycocotools import mask as coco_mask
from torch import Tensor

from data_shards.batch import TripletBatch
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from data_shards.loader import TripletLoader
from data_shards.sampler import EvenSampler
from trainer.modules.scoring import Prediction
from trainer.ranks import every_rank
from trainer.report.panels import Panel
from trainer.report.sheet import draw_sheet
from trainer.run import Run
from trainer.scores import CaseScore

IN_MEMORY = 2**26
"""Bytes of run lengths that are kept in memory; more go to a temporary file."""


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
    """Shows the best, the median and the worst target of an evaluation, which are known only at its end.

    Until then the masks of every target are kept as run lengths, some hundred bytes each, in memory or, where they are
    many, in a temporary file. The images of those that are shown are read again: nothing is predicted twice.
    """

    def __init__(self) -> None:
        self._kept = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115
        self._places: dict[tuple[str, int], tuple[int, int]] = {}

    def keep(self, batch: TripletBatch, prediction: Prediction, q: int) -> None:
        """Keep the masks and the prompt of a target that was scored."""
        image = int(batch.image_index[q])
        position, target = batch.identities[q]
        box, points = _prompt_of(prediction, q)
        line = {
            "truth": _run_lengths(batch.masks[q]),
            "prediction": _run_lengths(prediction.masks[q]),
            **{"term": batch.terms[q], "position": position, "box": box.tolist(), "points": points.tolist()},
        }
        written = json.dumps(line).encode()
        offset = self._kept.seek(0, io.SEEK_END)
        self._kept.write(written)
        self._places[batch.keys[image], target] = (offset, len(written))

    def gathered(self, scores: Sequence[CaseScore], shards: ShardDataset) -> list[Panel]:
        """Worst, median and best, as far as there are so many. All ranks must ask.

        Args:
            scores: Of all ranks.
            shards: Where the images are.
        """
        ranked = sorted(scores, key=lambda score: float(f"{score.dsc:.6f}"))  # as who reads the table sees them
        wanted = [ranked[place] for place in (0, (len(ranked) - 1) // 2, -1)] if ranked else []
        chosen = list(dict.fromkeys((score.key, score.target) for score in wanted))
        mine: dict[tuple[str, int], Panel] = {}
        for who in chosen:
            with contextlib.suppress(UserError):  # damaged since: the scores stand, without a picture
                if who in self._places:
                    mine[who] = self._panel(*who, shards)
        merged = {who: panel for part in every_rank(mine) for who, panel in part.items()}
        return [merged[who] for who in chosen if who in merged]

    def _panel(self, key: str, target: int, shards: ShardDataset) -> Panel:
        offset, length = self._places[key, target]
        self._kept.seek(offset)
        line = json.loads(self._kept.read(length))
        image = shards[line["position"]].image
        return Panel(
            key=key,
            term=line["term"],
            image=to_uint8(image[None] if image.ndim == 2 else np.moveaxis(image, -1, 0)),
            truth=coco_mask.decode(line["truth"]),
            prediction=coco_mask.decode(line["prediction"]),
            box=np.array(line["box"], np.float32),
            points=np.array(line["points"], np.float32).reshape(-1, 3),
            target=target,
        )


def panel_of(batch: TripletBatch, prediction: Prediction, q: int) -> Panel:
    """Target `q` of a batch as a picture."""
    image = int(batch.image_index[q])
    box, points = _prompt_of(prediction, q)
    return Panel(
        key=batch.keys[image],
        term=batch.terms[q],
        image=to_uint8(batch.images[image].cpu().numpy()),
        truth=batch.masks[q].cpu().numpy().astype(np.uint8),
        prediction=prediction.masks[q].cpu().numpy().astype(np.uint8),
        box=box,
        points=points,
        target=batch.identities[q][1],
    )


def _run_lengths(mask: Tensor) -> dict[str, Any]:
    """A mask (H, W) as COCO RLE that JSON takes."""
    lengths = coco_mask.encode(np.asfortranarray(mask.cpu().numpy(), np.uint8))
    return {**lengths, "counts": lengths["counts"].decode("ascii")}


def _prompt_of(prediction: Prediction, q: int) -> tuple[np.ndarray, np.ndarray]:
    """Box (4,) and points (P, 3) that target `q` was asked with, as in a `Panel`."""
    places, labels = prediction.points[q].numpy(force=True), prediction.labels[q].numpy(force=True)
    points = np.concatenate([places, labels[:, None]], 1)
    return prediction.boxes[q].numpy(force=True).astype(np.float32), points[points[:, 2] >= 0].astype(np.float32)


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
