"""Model families, one file each: nn.Modules without Lightning."""

from trainer.models.base import SegmentationModel
from trainer.models.litemedsam import LiteMedSAM
from trainer.models.medsam import MedSAM
from trainer.models.preprocessing import Preprocessing
from trainer.models.sam3 import SAM3
from trainer.models.sam3_shape import SAM3Shape

__all__ = ["SAM3", "LiteMedSAM", "MedSAM", "Preprocessing", "SAM3Shape", "SegmentationModel"]
