"""LightningModules: how each family is trained."""

from trainer.modules.augmentation import ClipAugmentation
from trainer.modules.medsam import MedSAMModule
from trainer.modules.sam2 import SAM2Module
from trainer.modules.sam3 import SAM3Module
from trainer.modules.tuned import TunedModule

__all__ = ["ClipAugmentation", "MedSAMModule", "SAM2Module", "SAM3Module", "TunedModule"]
