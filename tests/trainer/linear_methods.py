"""The tuning methods whose parts are linear, or that put none in."""

from __future__ import annotations

from collections.abc import Callable

from trainer.tuning import (
    FacTTuning,
    FrozenEncoderTuning,
    FullTuning,
    LoRATuning,
    SAMedTuning,
    SelectiveTuning,
    SSFTuning,
    Tuning,
)

LINEAR_METHODS: dict[str, Callable[[], Tuning]] = {
    "full": lambda: FullTuning(layer_decay=0.9),
    "frozen_encoder": FrozenEncoderTuning,
    "selective": lambda: SelectiveTuning(norms=True, biases=True, patch_embedding=True, last_blocks=1),
    "lora": lambda: LoRATuning(rank=2, alpha=6),
    "dora": lambda: LoRATuning(rank=2, dora=True, rslora=True),
    "samed": lambda: SAMedTuning(rank=2),
    "fact": lambda: FacTTuning(rank=3, scale=0.5),
    "ssf": SSFTuning,
}
