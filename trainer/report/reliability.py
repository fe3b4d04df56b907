"""Whether what a model promises comes true, read from an evaluation's ``calibration.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.errors import UserError
from trainer.run import read_json


@dataclass(frozen=True)
class Reliability:
    """What was promised and what came true, in bins of what was promised.

    Attributes:
        share: Of all values, in each bin that has any.
        promised: Mean of what was promised in each of them.
        found: Mean of what came true in each of them.
    """

    share: tuple[float, ...]
    promised: tuple[float, ...]
    found: tuple[float, ...]


@dataclass(frozen=True)
class Calibration:
    """What ``calibration.json`` says.

    Attributes:
        targets: How many were looked at.
        whole: Whether all pixels of the images count, not those about the target alone.
        ece: Expected calibration error.
        brier: Brier score.
        pixels: Probabilities of pixels.
        ious: IoU as estimated by the model, if it does.
        iou_error: Mean absolute error of that.
    """

    targets: int
    whole: bool
    ece: float
    brier: float
    pixels: Reliability
    ious: Reliability | None = None
    iou_error: float | None = None


def read_calibration(path: Path) -> Calibration | None:
    """Read ``calibration.json``; None if there is none.

    Raises:
        UserError: The file is damaged.
    """
    if not path.is_file():
        return None
    content = read_json(path)
    try:
        ious = content.get("iou")
        found = Calibration(
            targets=int(content["targets"]),
            whole=content["region"] == "image",
            ece=float(content["ece"]),
            brier=float(content["brier"]),
            pixels=_bins(content, "probability", "inside"),
            ious=_bins(ious, "estimated", "measured") if ious else None,
            iou_error=float(ious["error"]) if ious else None,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); run the evaluation again") from error
    return found


def _bins(content: Mapping[str, Any], promised: str, found: str) -> Reliability:
    """The bins that have anything."""
    columns = zip(content["share"], content[promised], content[found], strict=True)
    filled = [(float(share), float(a), float(b)) for share, a, b in columns if a is not None]
    if not filled or not all(0 <= value <= 1 for row in filled for value in row):
        raise ValueError(f"{promised} and {found} are shares between 0 and 1")
    shares, firsts, seconds = zip(*filled, strict=True)
    return Reliability(shares, firsts, seconds)
