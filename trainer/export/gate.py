"""The gate: an export is verified when the consumer's own code loads it and agrees on real images.

Shapes: Q prompts of one image, S the consumer's input side; P texts asked about an image, N object queries; T frames of
a clip, H W their native height and width.
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
import torch.nn.functional as F
from torch import Tensor

from data_shards import views
from data_shards.batch import Sample, TripletBatch, collate
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from trainer.callbacks.panels import to_uint8
from trainer.export.base import BoxConsumer, Exporter, FrameConsumer, TextAnswer, TextConsumer, VideoConsumer
from trainer.metrics import overlap
from trainer.models import SAM3, SegmentationModel
from trainer.prompts import Prompts
from trainer.prompts.concepts import ConceptPrompts, concepts_of
from trainer.prompts.wording import Wording

if TYPE_CHECKING:
    from trainer.models import SAM2

TOLERANCE = 1e-3
"""Largest difference in fp32 between our model's answers and the consumer's; `Verdict` says of what."""
TERMS = 8
"""Terms of an image that a consumer of texts is asked for, at most."""
FRAMES = 4
"""Frames of the clip through which a consumer follows what it is shown."""
FOLLOWED = 3
"""Targets that it follows, at most."""
ABSENT = -1024.0
"""Logit of what SAM2 holds to be absent."""


@dataclass(frozen=True)
class Verdict:
    """What the gate found.

    Attributes:
        verified: Whether every logit agreed.
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
class Clip:
    """Real frames to follow targets through.

    Attributes:
        frames: T frames, (H, W) or (H, W, 3) uint8.
        boxes: (Q, 4) float32, tight boxes of targets of the first frame as (x0, y0, x1, y1), in its pixels.
    """

    frames: tuple[np.ndarray, ...]
    boxes: Tensor


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
    return Clip(tuple(frames[number % len(frames)] for number in range(FRAMES)), boxes)


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
    if exporter.asks == "texts":
        found = [_ask_texts(consumer, model, there, batch, wording or Wording()) for batch in samples]
    else:
        asked = consumer.image if isinstance(consumer, VideoConsumer) else consumer
        found = [_ask_boxes(asked, model, there, batch) for batch in samples]
    followed: dict[str, Any] = {}
    if isinstance(consumer, VideoConsumer) and clip is not None:
        followed = _follow(consumer.follow, cast("SAM2", there), clip)
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
        **followed,
    )
    return replace(verdict, verified=verdict.difference <= TOLERANCE)


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


def _follow(consumer: FrameConsumer, model: SAM2, clip: Clip) -> dict[str, Any]:
    """Let both follow a clip's targets, each by itself, as the consumer does it: what `Verdict` says of it."""
    from trainer.models.sam2_memory import RecentMemory
    from trainer.models.sam2_tracking import Tracking

    images, theirs = consumer(clip.frames, clip.boxes)
    size = theirs.shape[-2:]
    boxes, _ = model.preprocessing.boxes(clip.boxes, torch.tensor([size]).expand(len(clip.boxes), 2))
    features = [model.encode(image[None]) for image in images]  # of the very frames that the consumer has read
    policy, model.memory = model.memory, RecentMemory()
    differences = []
    for q, box in enumerate(boxes):
        tracking = Tracking(model, len(features))
        looks = [tracking.ask(0, features[0], [Prompts(torch.zeros(1, dtype=torch.int64), box[None])])]
        looks += [tracking.follow(frame, features[frame]) for frame in range(1, len(features))]
        ours = F.interpolate(torch.stack([look.best for look in looks]), size, mode="bilinear", align_corners=False)
        differences.append((ours[:, 0] - theirs[:, q]).abs().max())
    model.memory = policy
    shown = theirs[1:].flatten(1).amax(1) > ABSENT / 2  # resizing may round it
    return {
        "max_followed_difference": float(torch.stack(differences).max()),
        "frames": len(images),
        "frames_shown": int(shown.sum()),
    }


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
