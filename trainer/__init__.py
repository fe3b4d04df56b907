"""Fine-tune segmentation foundation models for medicine: models, tuning, losses, modules, exports."""

__version__ = "0.1.0"
