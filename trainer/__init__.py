"""Fine-tune segmentation foundation models for medicine: models, tuning, losses, modules, exports."""

from data_shards import __version__

__all__ = ["__version__"]
