"""What a text-prompted model finds of one term in one image: every instance, not only the best.

Shapes: M instances, H W native height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Instances:
    """All answers to one term in one image whose confidence reaches the module's threshold.

    Attributes:
        image: Place of the image in its batch.
        term: What was asked for.
        masks: (M, H, W) bool at native size, on any device; M may be 0. They may overlap.
        confidences: (M,) in [0, 1].
    """

    image: int
    term: str
    masks: Tensor
    confidences: Tensor
