"""LightningModules: how each family is trained."""

from trainer.modules.medsam import MedSAMModule

__all__ = ["MedSAMModule"]
