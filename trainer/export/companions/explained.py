"""``preprocessing.json``: what another tool must do to an image before the weights, and to their logits after."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from data_shards.errors import UserError
from data_shards.preprocessing import AnyIntensity, Window
from data_shards.schema import from_mapping
from trainer.export.companions.facts import DataSetFacts
from trainer.models.preprocessing import Preprocessing

SCHEMA_VERSION = 1
"""Raised whenever a field changes its meaning; new fields do not raise it."""

_EXPLAINED = {
    "schema_version": "Raised whenever a field changes its meaning.",
    "image_size": "Side in pixels of the square input that the weights were trained at.",
    "consumer_image_size": "Side in pixels at which the tool that this export is for runs the weights.",
    "resize": "pad: the longer side becomes image_size, the shorter keeps its ratio, rounded half up. squash: both "
    "sides become image_size.",
    "padding": "What fills the square to the right and at the bottom, after scaling; null where nothing is padded.",
    "interpolation": "Filter with which images are resized, on float32 values of the native image, half-pixel centres.",
    "antialias": "Whether the filter is widened when an image is made smaller.",
    "clamped": "Whether resized values are clamped to the native image's own range, over all its channels.",
    "channels": "Channels that the input has.",
    "channel_order": "Order of the channels.",
    "grey": "What becomes of an image with one channel.",
    "scaling": "How values are scaled after resizing; the fields below say it in numbers.",
    "uint8_range": "8-bit images: these two values become 0 and 1, whatever the image holds; null: as other types.",
    "other_range": "16-bit and other types: image takes the smallest and largest value of the resized image, over all "
    "its channels and before padding, as 0 and 1. Null: images are standardised as they are.",
    "mean": "Subtracted by channel from values in [0, 1]; image: the image's own, over all channels, before padding; "
    "null: nothing.",
    "std": "Divides by channel what is left; image: the image's own deviation, divided by N and not N - 1; null: "
    "nothing. An image of one value becomes 0.",
    "input": "Shape and type of what the model takes: batch, channels, rows, columns.",
    "steps": "All of it in order.",
    "intensity": "By data set: how source intensities (such as HU) became the 8-bit or 16-bit images that the run's "
    "shards hold and that all of the above starts from; do the same to yours. low becomes 0 and high 255, clipped and "
    "rounded.",
    "output": "mask_side: rows and columns of the mask logits at image_size. to_native: how logits go back to an "
    "image's own pixels. threshold: logits above it are inside. confidence_threshold: answers of a lower confidence "
    "count as absent; null where the model does not say whether something is there.",
    "prompts": "Boxes and points are (x, y) in native pixels times the ratio of the resized to the native side, so in "
    "pixels of the input; a box is (x0, y0, x1, y1).",
}


def describe_preprocessing(
    preprocessing: Preprocessing,
    consumer_size: int,
    mask_side: int,
    confidence: float | None,
    datasets: Iterable[DataSetFacts],
) -> dict[str, Any]:
    """Everything that another tool needs, and a line on each field.

    Args:
        preprocessing: That of the model.
        consumer_size: Input side in pixels of the tool that the export is for.
        mask_side: Side in pixels of the model's masks.
        confidence: From which an answer counts; None where answers have none.
        datasets: What the run learnt from.
    """
    own = preprocessing.scaling == "zscore"
    fixed = preprocessing.fixed_statistics
    pad = preprocessing.resize == "pad"
    content = {
        "schema_version": SCHEMA_VERSION,
        **preprocessing.to_dict(),
        "consumer_image_size": consumer_size,
        "padding": {"right": 0.0, "bottom": 0.0} if pad else None,
        "antialias": True,
        "clamped": preprocessing.interpolation == "bicubic",
        "channel_order": "RGB",
        "grey": "repeated",
        "uint8_range": [0, 255] if fixed else None,
        "other_range": None if own else "image",
        "mean": "image" if own else list(fixed[0]) if fixed else None,
        "std": "image" if own else list(fixed[1]) if fixed else None,
        "input": {"shape": [1, preprocessing.channels, *[preprocessing.image_size] * 2], "dtype": "float32"},
        "steps": _steps(preprocessing),
        "prompts": {"unit": "pixels of the input", "box": ["x0", "y0", "x1", "y1"], "point": ["x", "y"]},
        "output": {
            "mask_side": mask_side,
            "to_native": _back(preprocessing),
            "threshold": 0.0,
            "confidence_threshold": confidence,
        },
        "intensity": {dataset.name: _intensity(dataset) for dataset in datasets},
    }
    return {**content, "explained": {name: _EXPLAINED[name] for name in content}}


def _steps(preprocessing: Preprocessing) -> list[str]:
    side, fixed = preprocessing.image_size, preprocessing.fixed_statistics
    target = (
        f"the longer side becomes {side} px, the other max(1, floor(side · {side} / longer + 0.5))"
        if preprocessing.resize == "pad"
        else f"both sides become {side} px"
    )
    steps = [
        "take the stored image (see intensity) as float32: RGB, or one grey channel",
        f"resize, {preprocessing.interpolation} with antialiasing: {target}",
    ]
    if preprocessing.interpolation == "bicubic":
        steps.append("clamp to the smallest and largest value that the image had before")
    if preprocessing.scaling == "zscore":
        steps.append("subtract the image's own mean, divide by its own deviation")
    else:
        low_high = "map the image's own smallest and largest value to 0 and 1"
        steps.append(f"8-bit images: divide by 255; others: {low_high}" if fixed else low_high)
    if fixed:
        mean, std = ([round(value, 6) for value in values] for values in fixed)
        steps.append(f"subtract {mean} and divide by {std}, by channel")
    if preprocessing.channels > 1:
        steps.append(f"repeat a grey image in all {preprocessing.channels} channels")
    if preprocessing.resize == "pad":
        steps.append(f"pad with 0 at the right and at the bottom to {side} × {side} px")
    return steps


def _back(preprocessing: Preprocessing) -> list[str]:
    side = preprocessing.image_size
    steps = [f"resize the logits to {side} × {side} px, bilinear, without antialiasing"]
    if preprocessing.resize == "pad":
        steps.append("cut away what was padded")
    return [*steps, "resize to the image's own rows and columns, bilinear, without antialiasing", "compare: logits > 0"]


def _intensity(dataset: DataSetFacts) -> dict[str, Any]:
    """The rule of one data set with its numbers, and where that is known from."""
    if not dataset.intensity:
        return {"rule": None, "low": None, "high": None, "from": "not recorded"}
    if dataset.sampled:
        bounds = {name: dataset.intensity.get(name) for name in ("low", "high")}
        return {"rule": {"kind": dataset.intensity.get("kind")}, **bounds, "from": "one image of the shards"}
    rule = {name: value for name, value in dataset.intensity.items() if value is not None}
    low, high = _bounds(dataset.intensity)
    return {"rule": rule, "low": low, "high": high, "from": "the manifest of the shards"}


def _bounds(rule: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """What becomes 0 and 255 where that is the same for every image; None where it is fitted to each."""
    try:
        intensity = from_mapping(_Rule, {"intensity": dict(rule)}, "manifest").intensity
    except UserError:  # of a later version
        return None, None
    if not isinstance(intensity, Window):
        return None, None
    window = intensity.fit(np.zeros(1))  # whatever the image
    return window.low, window.high


@dataclasses.dataclass(frozen=True)
class _Rule:
    """As a spec has it."""

    intensity: AnyIntensity
