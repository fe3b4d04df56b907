"""What learns, and how fast: one way of tuning a file."""

from trainer.tuning.base import Tuning
from trainer.tuning.full import FullTuning
from trainer.tuning.lora import LoRATuning

__all__ = ["FullTuning", "LoRATuning", "Tuning"]
