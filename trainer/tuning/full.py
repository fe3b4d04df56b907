"""Full fine-tuning, with layer-wise learning-rate decay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from data_shards.errors import UserError
from trainer.models.base import SegmentationModel
from trainer.tuning.base import Tuning, check_fresh, freeze


class FullTuning(Tuning):
    """Everything learns, but for what is named; the deeper a layer lies below the heads, the slower.

    A parameter of layer l learns at the rate times ``layer_decay ** (L + 1 - l)``: the patch embedding is layer 0, the
    blocks are layers 1 to L, and the heads, with the neck, learn at the full rate (BEiT: Bao et al. 2022,
    arXiv:2106.08254, appendix; ELECTRA before it: Clark et al. 2020, arXiv:2003.10555, appendix; Medical SAM3 too).

    Args:
        layer_decay: Factor from one layer to the one below, in (0, 1]; 1 is the same rate everywhere.
        depth: L, where a paper's differs from the model's number of blocks; null is the model's own. A larger one
            slows all blocks by the same factor against the heads; with a smaller one, such as Medical SAM3's 12 of 32,
            the blocks above it learn at the full rate.
        freeze: Parameters that do not learn, as name prefixes or shell patterns. MedSAM freezes the prompt encoder;
            SAM3 has none, so that it needs ``[]`` or parts of its own here.
        rates: Further factors on the learning rate by name prefix or shell pattern, multiplied with the decay; where
            several fit a parameter, the last counts.
        learning_rates: Learning rates, in the place of the module's ``lr``, by name prefix or shell pattern; layer
            decay is multiplied onto these too. Where several fit a parameter, the last counts.
    """

    def __init__(
        self,
        layer_decay: float = 1.0,
        depth: int | None = None,
        freeze: Sequence[str] = ("prompt_encoder",),
        rates: Mapping[str, float] | None = None,
        learning_rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(rates, learning_rates)
        if not 0 < layer_decay <= 1:
            raise UserError(f"layer_decay is in (0, 1], not {layer_decay}")
        if depth is not None and depth < 1:
            raise UserError(f"depth is the number of layers, 1 or more, not {depth}")
        self.layer_decay, self.depth, self.frozen = layer_decay, depth, list(freeze)

    def apply(self, model: SegmentationModel) -> None:
        """Freeze what is named.

        Raises:
            UserError: A pattern matches nothing.
        """
        check_fresh(model)
        freeze(model, self.frozen)

    def learning_rate_scales(self, model: SegmentationModel) -> dict[str, float]:
        """Layer decay by depth, times `rates`."""
        ids = model.layer_ids()
        own = max(ids.values()) - 1
        below = {n: max(0, (self.depth or own) + 1 - layer) if layer <= own else 0 for n, layer in ids.items()}
        return {
            name: rate * self.layer_decay ** below[name] for name, rate in super().learning_rate_scales(model).items()
        }
