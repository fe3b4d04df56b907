"""The gate: an export is verified when the consumer's own code loads it and agrees on real images.

Shapes: Q prompts of one image, S the consumer's input side; P texts asked about an image, N object queries; T frames of
a clip, H W their native height and width; h w side of a model's masks.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from data_shards import views
from data_shards.batch import Sample, TripletBatch, collate
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError, counted
from trainer.callbacks.panels import to_uint8
from trainer.export.base import (
    BoxConsumer,
    Exporter,
    InputConsumer,
    PromptConsumer,
    TextAnswer,
    TextConsumer,
    VideoConsumer,
)
from trainer.export.following import Clip, follow_both, unequal_tensors
from trainer.metrics import overlap
from trainer.models import SAM3, SegmentationModel
from trainer.prompts import Prompts
from trainer.prompts.concepts import ConceptPrompts, concepts_of
from trainer.prompts.regions import deepest
from trainer.prompts.wording import Wording
from trainer.volumes.asked import Asked, prompts_of

if TYPE_CHECKING:
    from trainer.models import SAM2

TOLERANCE = 1e-3
"""Largest difference in fp32 between our model's answers and the consumer's; `Verdict` says of what."""
TERMS = 8
"""Terms of an image that a consumer of texts is asked for, at most."""
FRAMES = 4
"""Frames of the clip through which a consumer follows what it is shown."""
FOLLOWED = 2
"""Targets that it follows by their boxes, at most; the first one it follows by its mask too."""
POINTED = 3
"""Targets of an image that a consumer is asked for by points, at most."""
PROMPTED = ("boxes", "points", "points and masks")
"""Forms of prompts that a consumer of prompts is asked with."""
SUREST = 32.0
"""Largest logit of a mask to start from."""


@dataclass(frozen=True)
class Verdict:
    """What the gate found.

    Attributes:
        verified: Whether every logit agreed, and every tensor where these are compared.
        consumer: The consumer's distribution and version.
        max_logit_difference: Largest difference over all pixels of all samples. Where texts are asked, that of each
            text's most confident query, as a share of its largest logit if that is above 1: such logits are sums over
            hundreds of channels and reach the tens, and their rounding grows with them.
        samples: Real images compared.
        image_size: Input side of the comparison, the consumer's.
        dsc_run: Mean DSC of our model at the side it was trained at, on these samples.
        dsc_consumer: Mean DSC of the consumer's model at its own side, on these samples.
        max_confidence_difference: Where texts are asked, largest difference of any query's confidence, or of the most
            confident one's box in shares of the image's side.
        max_followed_difference: Where objects are followed, largest difference of logits over all frames.
        frames: Frames of that clip.
        frames_shown: Those after the first in which the consumer holds anything to be there.
        asked: What the images were asked with.
        followed: How each object that was followed was shown.
        frames_shown_raised: The same as `frames_shown` where that is 0: both have then followed once more, with the
            score of an object's being there raised in both, and `max_followed_difference` is of that too.
        tensors: Tensors that the consumer has loaded, where they were compared with ours by name.
        unequal: Names of those that are not equal.
        max_input_difference: Where the consumer has a preprocessing of its own, the largest difference of what it makes
            of the images from what the model was trained on; it decides nothing.
    """

    verified: bool
    consumer: str
    consumer_version: str
    max_logit_difference: float
    tolerance: float
    samples: int
    image_size: int
    dsc_run: float
    dsc_consumer: float
    max_confidence_difference: float | None = None
    max_followed_difference: float | None = None
    frames: int = 0
    frames_shown: int = 0
    asked: tuple[str, ...] = ()
    followed: tuple[str, ...] = ()
    frames_shown_raised: int | None = None
    tensors: int = 0
    unequal: tuple[str, ...] = ()
    max_input_difference: float | None = None

    @property
    def fault(self) -> str:
        """What keeps it from being verified; empty where nothing does."""
        if not self.difference <= self.tolerance:  # NaN is no agreement
            return f"{self.worst} differ by {self.difference:.2g} from the consumer's, more than {self.tolerance:g}"
        if self.unequal:
            return (
                f"{len(self.unequal)} of its {self.tensors} tensors are not those of the run, such as {self.unequal[0]}"
            )
        return ""

    @property
    def compared(self) -> str:
        """What was compared, in words."""
        words = [f"answers to {', '.join(self.asked)} in {counted(self.samples, 'image')}"]
        if self.frames:
            shown = " and ".join(f"{self.followed.count(how)} by {how}" for how in dict.fromkeys(self.followed))
            words.append(f"objects shown {shown} and followed through {self.frames} frames")
        if self.frames_shown_raised is not None:
            words.append("the same with the score of an object's being there raised in both")
        if self.tensors:
            words.append(f"all {self.tensors:,} tensors")
        return "; ".join(words)

    @property
    def worst(self) -> str:
        """What differs most; what is not a number differs more than anything."""
        found = self._differences()
        return max(found, key=lambda name: math.inf if math.isnan(found[name]) else found[name])

    @property
    def difference(self) -> float:
        """How much that differs."""
        return self._differences()[self.worst]

    def _differences(self) -> dict[str, float]:
        found = {
            "logits": self.max_logit_difference,
            "confidences": self.max_confidence_difference,
            "logits of followed objects": self.max_followed_difference,
        }
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class _Compared:
    """One image: the largest differences, and DSC (Q,) of ours at its own side and of the consumer's."""

    logits: Tensor
    ours: Tensor
    theirs: Tensor
    confidence: Tensor | None = None


def require_consumer(exporter: Exporter) -> str:
    """The consumer's version.

    Raises:
        UserError: It is not installed.
    """
    try:
        for package in exporter.also:
            importlib.metadata.version(package)
        return importlib.metadata.version(exporter.package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"the gate of '{exporter.name}' needs the tool that reads the file: pip install {exporter.requirement}; "
            "--unverified writes without it"
        ) from None


def real_samples(folder: str | None, count: int) -> list[TripletBatch]:
    """Images to compare on, evenly spread over a split.

    Args:
        folder: The split's shards.
        count: How many.

    Raises:
        UserError: There are no shards, or no targets in them.
    """
    if folder is None or not Path(folder).is_dir():
        where = f"{folder} is missing" if folder else "the run's recipe names no test split"
        raise UserError(f"the gate needs real images and {where}: give --images FOLDER, a split of verified shards")
    shards = ShardDataset(Path(folder))
    useful = np.flatnonzero(np.diff(shards.index.target_start))
    chosen = useful[np.linspace(0, len(useful) - 1, min(count, len(useful))).round().astype(int)].tolist()
    triplets = [(position, shards[position]) for position in chosen]
    samples = [collate([Sample(position, t, tuple(range(len(t.targets))))]) for position, t in triplets]
    if not samples:
        raise UserError(f"the gate needs images with targets and found none in {folder}: give --images FOLDER")
    return samples


def real_clip(folder: str, samples: Sequence[TripletBatch]) -> Clip:
    """Neighbouring slices with targets in the first; without volumes, the samples of one size, over and over.

    Args:
        folder: The split's shards.
        samples: Images of it, from `real_samples`.
    """
    shards = ShardDataset(Path(folder))
    starts = [] if shards.index.is_old else np.flatnonzero(views.clip_starts(shards.index, FRAMES, 1)).tolist()
    if starts:
        triplets = [shards[place] for place in views.clip(shards.index, starts[len(starts) // 2], FRAMES, 1)]
        batches = [collate([Sample(0, triplet, tuple(range(len(triplet.targets))))]) for triplet in triplets]
    else:
        batches = [one for one in samples if one.images[0].shape[-2:] == samples[0].images[0].shape[-2:]]
    frames = [to_uint8(batch.images[0].numpy()) for batch in batches]
    boxes = batches[0].boxes[:FOLLOWED].float()
    return Clip(tuple(frames[number % len(frames)] for number in range(FRAMES)), boxes, batches[0].masks[0])


@torch.no_grad()
def compare(
    exporter: Exporter,
    path: Path,
    model: SegmentationModel,
    samples: Sequence[TripletBatch],
    wording: Wording | None = None,
    clip: Clip | None = None,
) -> Verdict:
    """Load an export with its consumer and compare logits, on the CPU in fp32.

    Where names are the consumer's own, all tensors are compared too: no image asks for every one of them.

    Args:
        exporter: The format.
        path: The exported file.
        model: Our model, adapters merged, in evaluation mode.
        samples: Real images with targets.
        wording: What a concept is called, for a consumer that is asked with texts; its term by default.
        clip: Real frames, for a consumer that follows objects.

    Raises:
        UserError: The consumer cannot load the file.
    """
    version = require_consumer(exporter)
    try:
        consumer: Any = exporter.load(path)
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"export to '{exporter.name}' failed: {exporter.package} cannot load it ({reason})") from error
    same = model.preprocessing.image_size == exporter.image_size
    there = model if same else model.at_size(exporter.image_size)
    more: dict[str, Any] = {"asked": (exporter.asks,)}
    if isinstance(consumer, VideoConsumer):
        found = [_ask_prompts(consumer.image, model, there, batch) for batch in samples]
        more = {"asked": PROMPTED, "tensors": len(consumer.module.state_dict())}
        more["unequal"] = unequal_tensors(consumer.module, there)
        if clip is not None:
            more |= follow_both(consumer, cast("SAM2", there), clip)
    elif exporter.asks == "prompts":
        found = [_ask_prompts(consumer, model, there, batch) for batch in samples]
        more = {"asked": PROMPTED}
    elif exporter.asks == "texts":
        found = [_ask_texts(consumer, model, there, batch, wording or Wording()) for batch in samples]
    else:
        found = [_ask_boxes(consumer, model, there, batch) for batch in samples]
    reader = exporter.read_input(path)
    if reader is not None:
        more["max_input_difference"] = max(_input_difference(reader, there, batch) for batch in samples)
    confidences = [one.confidence for one in found if one.confidence is not None]
    verdict = Verdict(
        verified=False,
        consumer=exporter.package,
        consumer_version=version,
        # NaN if any is, and NaN is not verified
        max_logit_difference=float(torch.stack([one.logits for one in found]).max()),
        tolerance=TOLERANCE,
        samples=len(samples),
        image_size=exporter.image_size,
        dsc_run=float(torch.cat([one.ours for one in found]).mean()),
        dsc_consumer=float(torch.cat([one.theirs for one in found]).mean()),
        max_confidence_difference=float(torch.stack(confidences).max()) if confidences else None,
        **more,
    )
    return replace(verdict, verified=not verdict.fault)


def _ask_boxes(
    consumer: BoxConsumer, model: SegmentationModel, there: SegmentationModel, batch: TripletBatch
) -> _Compared:
    """Ask both about every target of an image, by its box."""
    images, boxes = there.preprocessing.images(batch.images), there.preprocessing.boxes(batch.boxes, batch.sizes)[0]
    found = consumer(images, boxes)
    return _Compared(
        logits=(found - _logits(there, batch)).abs().max(),
        ours=_dsc(model, batch.masks, _logits(model, batch)),
        theirs=_dsc(there, batch.masks, found),
    )


def _ask_prompts(
    consumer: PromptConsumer, model: SegmentationModel, there: SegmentationModel, batch: TripletBatch
) -> _Compared:
    """Ask both about the targets of an image: by box, by points on and beside it, and with a mask to start from."""
    images = there.preprocessing.images(batch.images)
    features = there.encode(images)
    boxes, _ = there.preprocessing.boxes(batch.boxes, batch.sizes)
    masks = [mask.numpy() != 0 for mask in batch.masks[:POINTED]]
    (points,) = prompts_of([_pointed(mask) for mask in masks], there.preprocessing, masks[0].shape)
    points = replace(points, image_index=batch.image_index[: len(points)])
    asked = [Prompts(batch.image_index, boxes), points]
    ours = [there.decode(features, prompts)[0][:, 0] for prompts in asked]
    asked.append(replace(points, masks=ours[0][: len(points)].clamp(-SUREST, SUREST)))
    ours.append(there.decode(features, asked[-1])[0][:, 0])
    theirs = consumer(images, asked)
    return _Compared(
        logits=torch.stack([(one - other).abs().max() for one, other in zip(ours, theirs, strict=True)]).max(),
        ours=_dsc(model, batch.masks, ours[0] if there is model else _logits(model, batch)),
        theirs=_dsc(there, batch.masks, theirs[0]),
    )


def _input_difference(reader: InputConsumer, there: SegmentationModel, batch: TripletBatch) -> float:
    """Largest difference of what a consumer makes of an image."""
    return float((reader(batch.images[0]) - there.preprocessing.images(batch.images)).abs().max())


def _pointed(mask: np.ndarray) -> Asked:
    """Show a mask (H, W) by its innermost pixel, and a corner of the image, where it seldom is."""
    _, x, y = deepest(mask)
    height, width = mask.shape
    corner = (width - 1, height - 1) if mask[0, 0] else (0, 0)
    return Asked("", 0, points=((x, y, 1), (*corner, 0)))


def _ask_texts(
    consumer: TextConsumer, model: SegmentationModel, there: SegmentationModel, batch: TripletBatch, wording: Wording
) -> _Compared:
    """Ask both for the first terms of an image; what is absent is compared, and has no DSC."""
    assert isinstance(model, SAM3) and isinstance(there, SAM3)
    batch = batch.by_term()
    concepts = concepts_of(batch)[:TERMS]
    texts = wording.say(concepts, None)
    own = _found(there, batch, texts)
    theirs = consumer(there.preprocessing.images(batch.images), texts)
    best = own.confidence.argmax(dim=1)
    rows = torch.arange(len(texts))
    ours, other = own.masks[rows, 0], theirs.masks[rows, best]
    scale = ours.flatten(1).abs().amax(1).clamp(min=1)[:, None, None]
    shown = [p for p, concept in enumerate(concepts) if concept.rows]
    truths = [batch.masks[concepts[p].rows[0]] for p in shown]
    at_own_side = ours if there is model else _found(model, batch, texts).masks[:, 0]
    gaps = [(own.confidence - theirs.confidence).abs().max(), (own.boxes[:, 0] - theirs.boxes[rows, best]).abs().max()]
    return _Compared(
        logits=((ours - other) / scale).abs().max(),
        ours=_dsc(model, truths, at_own_side[shown]),
        theirs=_dsc(there, truths, theirs.masks[rows, theirs.confidence.argmax(dim=1)][shown]),
        confidence=torch.stack(gaps).max(),
    )


def _found(model: SAM3, batch: TripletBatch, texts: Sequence[str]) -> TextAnswer:
    """What our model finds, text by text: all confidences (P, N), and box and mask of the most confident query."""
    features = model.encode(model.preprocessing.images(batch.images))
    confidences, boxes, masks = [], [], []
    for text in texts:
        answer = model.detect(features, ConceptPrompts(torch.zeros(1, dtype=torch.int64), [text]))
        best = answer.confidence.argmax(dim=1)
        assert answer.masks is not None
        confidences.append(answer.confidence)
        boxes.append(answer.boxes[-1][:, best[0]][:, None])
        masks.append(answer.masks.of(0, best)[None])
    return TextAnswer(torch.cat(confidences), torch.cat(boxes), torch.cat(masks))


def _logits(model: SegmentationModel, batch: TripletBatch) -> Tensor:
    """Our model's logits (Q, h, w) for a batch of one image."""
    preprocessing = model.preprocessing
    boxes, _ = preprocessing.boxes(batch.boxes, batch.sizes)
    masks, _ = model.decode(model.encode(preprocessing.images(batch.images)), Prompts(batch.image_index, boxes))
    return masks[:, 0]


def _dsc(model: SegmentationModel, truths: Sequence[Tensor], logits: Tensor) -> Tensor:
    """DSC (Q,) of logits in a model's frame against masks at native resolution."""
    masks = model.preprocessing.to_native(logits, *truths[0].shape) > 0
    return overlap(masks, torch.stack(list(truths)))[0]
