"""Full fine-tuning, with layer-wise learning-rate decay."""

from __future__ import annotations

from collections.abc import Sequence

from data_shards.errors import UserError
from trainer.models.base import SegmentationModel
from trainer.tuning.base import Tuning, freeze


class FullTuning(Tuning):
    """Everything learns, but for what is named; the deeper a layer lies below the heads, the slower.

    The factor of a parameter at depth i is ``layer_decay ** (top - i)``, with `top` the heads' depth
    (BEiT: Bao et al. 2022, arXiv:2106.08254, appendix; ELECTRA before it).

    Args:
        layer_decay: Factor from one layer to the one below, in (0, 1]; 1 is the same rate everywhere.
        freeze: Parameters that do not learn, as name prefixes or shell patterns. MedSAM freezes the prompt encoder.
    """

    def __init__(self, layer_decay: float = 1.0, freeze: Sequence[str] = ("prompt_encoder",)) -> None:
        super().__init__()
        if not 0 < layer_decay <= 1:
            raise UserError(f"layer_decay is in (0, 1], not {layer_decay}")
        self.layer_decay, self.frozen = layer_decay, list(freeze)

    def apply(self, model: SegmentationModel) -> None:
        """Freeze what is named."""
        freeze(model, self.frozen)

    def learning_rate_scales(self, model: SegmentationModel) -> dict[str, float]:
        """Layer decay by depth."""
        ids = model.layer_ids()
        top = max(ids.values())
        return {name: self.layer_decay ** (top - ids[name]) for name in super().learning_rate_scales(model)}
