"""What SAM3Module learns concepts from, and what it makes of the answers.

Shapes: B images, P concepts, Q targets, N instances, H W native height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_shards.batch import TripletBatch
from trainer.losses import ObjectSets, SetPredictionLoss
from trainer.losses.matching import upload
from trainer.models import SAM3, Preprocessing
from trainer.modules.scoring import Prediction
from trainer.presence import TermAnswer
from trainer.prompts import Concept, Exemplars


def objects_of(
    batch: TripletBatch, concepts: Sequence[Concept], preprocessing: Preprocessing, side: int, device: torch.device
) -> ObjectSets:
    """What is there of some concepts.

    Args:
        batch: B images with their targets.
        concepts: P concepts in them.
        preprocessing: What the model expects of an image.
        side: Side in pixels of the masks.
        device: Where to put it.

    Returns:
        Instances, boxes as shares of the input, and all of a concept in one mask. Masks are shares of their pixels.
    """
    rows = [row for concept in concepts for row in concept.rows]
    wholes = [(p, concept.whole) for p, concept in enumerate(concepts) if concept.whole is not None]
    parts = [(p, row) for p, c in enumerate(concepts) if c.whole is None for row in c.rows]
    used = sorted({*rows, *(row for _, row in wholes + parts)})
    place = {row: number for number, row in enumerate(used)}
    masks = replace(preprocessing, image_size=side).shares([batch.masks[row] for row in used], device)
    # boxes name their outermost pixels; edges lie one further on
    edges = batch.boxes[rows] + torch.tensor([0.0, 0.0, 1.0, 1.0])
    corners = preprocessing.boxes(edges, batch.sizes[rows])[0] / preprocessing.image_size
    low, high = corners[:, :2], corners[:, 2:]
    boxes = torch.cat([(low + high) / 2, high - low], dim=1).to(device, non_blocking=True)
    shown = wholes + parts
    owners, whole, instances = upload(
        np.array([p for p, _ in shown] + [place[row] for _, row in shown] + [place[row] for row in rows], np.int64),
        device,
    ).split([len(shown), len(shown), len(rows)])
    semantic = torch.zeros(len(concepts), side, side, device=device)
    semantic = semantic.index_add(0, owners, masks[whole]).clamp(max=1)
    return ObjectSets(
        counts=[len(concept.rows) for concept in concepts],
        boxes=boxes,
        masks=masks[instances],
        semantic=semantic,
    )


def term_answers(
    batch: TripletBatch, prediction: Prediction, threshold: float, scored: Sequence[bool]
) -> list[tuple[int, TermAnswer]]:
    """What was said to every term that was asked for, there or not, each with its sample's position.

    Args:
        batch: A batch in which each term of an image is one target.
        prediction: What the model says to its targets and absent terms.
        threshold: Confidence from which an answer counts.
        scored: For each target whether it is scored: what was shown in a prompt is not found.
    """
    scores = prediction.scores.tolist()
    areas = [int(mask.sum()) if score >= threshold else 0 for mask, score in zip(prediction.masks, scores, strict=True)]
    there = zip(batch.image_index.tolist(), batch.terms, scores, areas, strict=True)
    absent = (prediction.absent.tolist(), prediction.absent_areas.tolist())
    gone = zip(batch.absent_index.tolist(), batch.absent_terms, *absent, strict=True)
    found = []
    for present, rows in ((True, compress(there, scored)), (False, gone)):
        for image, term, confidence, area in rows:
            origin = batch.provenances[image]
            answer = TermAnswer(
                batch.keys[image], term, origin.modality, origin.dataset, present, float(confidence), int(area)
            )
            found.append((batch.positions[image], answer))
    return found


def unreached(model: SAM3, loss: SetPredictionLoss, exemplars: Exemplars | None) -> list[str]:
    """Parts of the model that no gradient reaches: DDP would wait for it, and weight decay would wear them away."""
    return [*_unasked(model, exemplars), *_unlearnt(loss)]


def _unasked(model: SAM3, exemplars: Exemplars | None) -> list[str]:
    """What encodes exemplars that are never shown."""
    boxes, points = (exemplars.boxes, exemplars.points) if exemplars is not None else (0, 0)
    parts = [] if boxes else ["boxes_direct_project", "boxes_pool_project", "boxes_pos_enc_project"]
    parts += [] if boxes or points else ["label_embed", "vision_layer_norm"]
    beside = [] if points or model.point_encoder is None else ["point_encoder"]
    return [*(f"geometry_encoder.{part}" for part in parts), *beside]


def _unlearnt(loss: SetPredictionLoss) -> list[str]:
    """What gives masks that no term of the loss has a weight for."""
    instances = loss.weights["mask_loss"] or loss.weights["dice_loss"]
    semantic = loss.weights["semantic_loss"] or loss.weights["semantic_dice"]
    if not instances and not semantic:
        # nor are the finer features used that only masks are made of
        return ["mask_decoder", "vision_encoder.neck.fpn_layers.0", "vision_encoder.neck.fpn_layers.1"]
    parts = [] if semantic else ["mask_decoder.semantic_projection"]
    return parts if instances else [*parts, "mask_decoder.mask_embedder", "mask_decoder.instance_projection"]


def nothing_absent(datamodule: Any, stage: str) -> list[str]:
    """What to say where negatives are asked for and no image lacks a term that was looked for in it.

    Args:
        datamodule: A `TripletDataModule` that is set up; another has nothing to say.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.
    """
    shards = getattr(datamodule, "shards", {})
    splits = {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ("test",))
    found = []
    for split in splits:
        name = "negatives_per_image" if split == "train" else "evaluated_negatives"
        count = getattr(datamodule, name, 0)
        if count and split in shards and not shards[split].index.absent.any():  # -1 where an old index cannot say
            what = "looked for in an image of it and not there: nothing is asked for in vain"
            found.append(f"data.init_args.{name} {count}: {datamodule.folders[split]} has no term that was {what}")
    return found


def without_overlaps(masks: Sequence[Tensor], scores: Tensor, image_index: Tensor) -> list[Tensor]:
    """Give each pixel to the term that is most confident there; of equals, to the first.

    Args:
        masks: Q logits (H, W).
        scores: (Q,) confidences.
        image_index: (Q,) the image of each.

    Returns:
        Q masks (H, W) bool.
    """
    resolved = list(masks)
    for image in image_index.unique().tolist():
        mine = [q for q, owner in enumerate(image_index.tolist()) if owner == image]
        winner = torch.full_like(masks[mine[0]], -1, dtype=torch.int16)
        best = torch.full_like(masks[mine[0]], -1.0)
        for place, q in enumerate(mine):  # one by one: stacked, a hundred terms would take several times their memory
            confidence = masks[q].sigmoid() * scores[q].to(masks[q])
            better = (masks[q] > 0) & (confidence > best)
            winner = winner.masked_fill(better, place)
            best = torch.where(better, confidence, best)
        for place, q in enumerate(mine):
            resolved[q] = winner == place
    return resolved
