"""What learns, and how fast: one way of tuning a file."""

from trainer.tuning.adaptformer import AdaptFormerTuning
from trainer.tuning.base import Tuning
from trainer.tuning.fact import FacTTuning
from trainer.tuning.frozen_encoder import FrozenEncoderTuning
from trainer.tuning.full import FullTuning
from trainer.tuning.houlsby import HoulsbyTuning
from trainer.tuning.lesam import LeSAMTuning
from trainer.tuning.lora import LoRATuning
from trainer.tuning.medical_sam_adapter import MedicalSAMAdapterTuning
from trainer.tuning.samed import SAMedTuning
from trainer.tuning.selective import SelectiveTuning
from trainer.tuning.ssf import SSFTuning
from trainer.tuning.visual_prompts import VisualPromptTuning

__all__ = [
    "AdaptFormerTuning",
    "FacTTuning",
    "FrozenEncoderTuning",
    "FullTuning",
    "HoulsbyTuning",
    "LeSAMTuning",
    "LoRATuning",
    "MedicalSAMAdapterTuning",
    "SAMedTuning",
    "SSFTuning",
    "SelectiveTuning",
    "Tuning",
    "VisualPromptTuning",
]
