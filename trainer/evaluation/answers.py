"""What a model answers about a case, and how good that is.

Shapes: M objects, D slices, H W native height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from trainer.evaluation.cases import Part, Thing
from trainer.evaluation.protocol import SetSpec
from trainer.metrics import detect, nsd, slice_dsc, volume_scores
from trainer.metrics.surface import measure, robust_hausdorff, share_within
from trainer.metrics.volumes import dice, iou
from trainer.models import SegmentationModel
from trainer.volumes.asked import Asked, Kind, prompts_of, shown
from trainer.volumes.propagation import propagate

Precision = Literal["32-true", "bf16-mixed"]


@dataclass(frozen=True)
class Score:
    """How good a mask, or an object in a volume, is; see `trainer.evaluation.rows.Row`, whose columns these are."""

    dsc: float
    iou: float
    nsd: float
    tolerance: str
    hd95: float | None = None
    dsc_unprompted: float | None = None
    size_true: float | None = None
    size_predicted: float | None = None
    size_unit: str = ""
    lesions: int | None = None
    lesions_found: int | None = None
    false_positives: int | None = None
    lesion_dice: float | None = None


def asked_of(mask: np.ndarray, name: str, number: int, spec: SetSpec) -> Asked:
    """How the truth (H, W) of an object is shown on a slice."""
    kinds: dict[str, Kind] = {"box": "box", "point": "points", "mask": "mask"}
    (one,) = shown({name: mask}, number, kinds[spec.prompt])
    if one.box is None or not spec.margin:
        return one
    x0, y0, x1, y1 = one.box
    height, width = mask.shape
    low = max(x0 - spec.margin, 0), max(y0 - spec.margin, 0)
    return replace(one, box=(*low, min(x1 + spec.margin, width - 1), min(y1 + spec.margin, height - 1)))


@torch.no_grad()
def encoded(model: SegmentationModel, image: Tensor, precision: Precision) -> Any:
    """Features of an image (C, H, W)."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        return model.encode(model.preprocessing.images([image], device))


@torch.no_grad()
def answers(
    model: SegmentationModel,
    features: Any,
    size: tuple[int, int],
    asked: Sequence[Asked],
    at_once: int,
    precision: Precision,
) -> np.ndarray:
    """Answer M prompts about the features of an image of H × W pixels: (M, H, W) bool."""
    device, masks = next(model.parameters()).device, np.zeros((len(asked), *size), bool)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        for start in range(0, len(asked), at_once):
            for prompts in prompts_of(asked[start : start + at_once], model.preprocessing, size):
                assert prompts.rows is not None
                one = replace(prompts, image_index=torch.zeros_like(prompts.image_index)).to(device)
                logits, _ = model.decode(features, one)
                native = model.preprocessing.to_native(logits[:, 0], *size) > 0
                masks[start + prompts.rows.numpy()] = native.cpu().numpy()
    return masks


def follow(
    model: SegmentationModel,
    part: Part,
    asked: Sequence[Asked],
    initial: SegmentationModel | None,
    at_once: int,
    precision: Precision,
) -> list[list[dict[str, object]]]:
    """Follow M objects through the slices of a part: for each its D masks, as COCO's run lengths."""
    found: list[list[dict[str, object]]] = [[{}] * len(part) for _ in asked]
    for number, masks, _ in propagate(model, part, asked, initial=initial, at_once=at_once, precision=precision):
        for row, mask in enumerate(masks):
            found[row][number] = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return found


def dense(slices: Sequence[dict[str, object]]) -> np.ndarray:
    """Run lengths of D slices as (D, H, W) bool."""
    decoded: np.ndarray = coco_mask.decode(list(slices))
    return np.ascontiguousarray(decoded.transpose(2, 0, 1)).astype(bool)


def score_image(prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, float] | None, spec: SetSpec) -> Score:
    """Score a mask (H, W) bool; the spacing of rows and columns is None where it is not known."""
    steps = spacing if spec.unit == "mm" else None
    measured = measure(prediction, truth, steps or (1.0, 1.0))
    return Score(
        dsc=dice(prediction, truth),
        iou=iou(prediction, truth),
        nsd=share_within(measured, spec.tolerance),
        tolerance=_tolerance(spec, steps),
        hd95=robust_hausdorff(measured),
        **_sizes(prediction, truth, spacing, "mm2" if spacing else "px"),
        **_lesions(prediction, truth, spec),
    )


def score_sequence(prediction: np.ndarray, truth: np.ndarray, part: Part, thing: Thing, spec: SetSpec) -> Score:
    """Score an object (D, H, W) bool in a volume, in three dimensions, or in a video, frame by frame."""
    place = thing.shown - thing.first
    if spec.kind == "video":
        steps = part.whole.flat_spacing if spec.unit == "mm" else None
        pairs = list(zip(prediction, truth, strict=True))
        surface = [nsd(one, other, spec.tolerance, steps or (1.0, 1.0)) for one, other in pairs]
        dsc = slice_dsc(prediction, truth)
        others = float(np.delete(dsc, place).mean())
        whole = float(np.mean([iou(one, other) for one, other in pairs]))
        return Score(float(dsc.mean()), whole, float(np.mean(surface)), _tolerance(spec, steps), None, others)
    found = volume_scores(prediction, truth, part.spacing if spec.unit == "mm" else None, spec.tolerance)
    return Score(
        dsc=found.dsc,
        iou=iou(prediction, truth),
        nsd=found.nsd,
        tolerance=found.tolerance,
        hd95=found.hd95,
        dsc_unprompted=dice(np.delete(prediction, place, 0), np.delete(truth, place, 0)),
        **_sizes(prediction, truth, part.spacing, "ml" if part.spacing else "voxels"),
        **_lesions(prediction, truth, spec),
    )


def _sizes(prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...] | None, unit: str) -> dict[str, Any]:
    """Columns of the sizes: millilitres or mm² where the spacing is known."""
    one = float(np.prod(spacing or (1.0,))) / (1000 if unit == "ml" else 1)
    true, predicted = (int(np.count_nonzero(mask)) * one for mask in (truth, prediction))
    return {"size_true": true, "size_predicted": predicted, "size_unit": unit}


def _lesions(prediction: np.ndarray, truth: np.ndarray, spec: SetSpec) -> dict[str, Any]:
    """Columns of the lesions, where the set asks for them."""
    if not spec.lesions:
        return {}
    found = detect(prediction, truth)
    return {
        "lesions": len(found.lesions),
        "lesions_found": found.true_positives,
        "false_positives": found.false_positives,
        "lesion_dice": float(sum(lesion.dice for lesion in found.lesions)),
    }


def _tolerance(spec: SetSpec, steps: tuple[float, float] | None) -> str:
    return f"{spec.tolerance:g} {'px' if steps is None else 'mm'}"
