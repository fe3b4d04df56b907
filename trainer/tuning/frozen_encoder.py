"""Fine-tuning of the heads alone: the image encoder stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from data_shards.errors import UserError
from trainer.models.base import SegmentationModel
from trainer.tuning.base import Tuning, freeze_all, matching, unfreeze


class FrozenEncoderTuning(Tuning):
    """Image encoder and prompt encoder are frozen; the mask decoder learns. No gradient enters the encoder.

    Args:
        train: What learns, as name prefixes or shell patterns; nothing of the image encoder.
        rates: Factors on the learning rate by name prefix or shell pattern; where several fit, the last counts.
    """

    def __init__(self, train: Sequence[str] = ("mask_decoder",), rates: Mapping[str, float] | None = None) -> None:
        super().__init__(rates)
        self.trained = list(train)

    def apply(self, model: SegmentationModel) -> None:
        """Freeze everything, then let the named parts learn.

        Raises:
            UserError: A pattern matches nothing, or something of the image encoder.
        """
        freeze_all(model)
        for pattern in self.trained:
            inside = [name for name in matching(model, pattern, "train") if name.startswith(model.encoder + ".")]
            if inside:
                raise UserError(
                    f"train: '{pattern}' takes {inside[0]}, but FrozenEncoderTuning freezes the image encoder: name "
                    "other parts, or take SelectiveTuning"
                )
        unfreeze(model, self.trained)
