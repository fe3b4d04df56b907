"""Model families, one file each: nn.Modules without Lightning. `SAM2` needs the package sam2, and waits until asked."""

from typing import TYPE_CHECKING, Any

from trainer.models.base import SegmentationModel
from trainer.models.litemedsam import LiteMedSAM
from trainer.models.medsam import MedSAM
from trainer.models.preprocessing import Preprocessing
from trainer.models.sam2_shape import SAM2Shape, require_sam2
from trainer.models.sam3 import SAM3
from trainer.models.sam3_shape import SAM3Shape
from trainer.models.unet import BoxUNet

if TYPE_CHECKING:
    from trainer.models.sam2 import SAM2

__all__ = [
    "SAM2",
    "SAM3",
    "BoxUNet",
    "LiteMedSAM",
    "MedSAM",
    "Preprocessing",
    "SAM2Shape",
    "SAM3Shape",
    "SegmentationModel",
]


def __getattr__(name: str) -> Any:
    if name != "SAM2":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    require_sam2()
    from trainer.models.sam2 import SAM2

    return SAM2


def __dir__() -> list[str]:
    return [*globals(), "SAM2"]
