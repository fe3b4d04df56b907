"""Model families, one file each: nn.Modules without Lightning."""

from trainer.models.base import SegmentationModel
from trainer.models.litemedsam import LiteMedSAM
from trainer.models.medsam import MedSAM
from trainer.models.preprocessing import Preprocessing

__all__ = ["LiteMedSAM", "MedSAM", "Preprocessing", "SegmentationModel"]
