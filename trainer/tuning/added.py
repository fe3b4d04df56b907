"""What every method shares that puts parts into a model: they stay there, or a method folds them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

from data_shards.errors import UserError
from trainer.models.base import SegmentationModel
from trainer.models.blocks import Block
from trainer.tuning.base import Tuning, freeze_all, unfreeze


class AddedTuning(Tuning):
    """Everything is frozen but what is named, and parts that learn are put in.

    Args:
        train: What learns fully besides the parts, as name prefixes or shell patterns.
        rates: Factors on the learning rate by name prefix or shell pattern; where several fit, the last counts.
    """

    def __init__(self, train: Sequence[str] = (), rates: Mapping[str, float] | None = None) -> None:
        super().__init__(rates)
        self.trained = list(train)

    @abstractmethod
    def add(self, model: SegmentationModel, blocks: Sequence[Block]) -> None:
        """Put the parts into a model whose encoder has these blocks, from the input on."""

    def apply(self, model: SegmentationModel) -> None:
        """Freeze everything, let the named parts learn, then put the method's own in.

        Raises:
            UserError: The encoder has no blocks that are known, a pattern matches nothing, or the model carries the
                parts of a method already.
        """
        blocks = model.blocks()
        if not blocks:
            raise UserError(
                f"{type(self).__name__}: {type(model).__name__} has no transformer blocks that trainer/models/blocks.py"
                " knows: take FullTuning, or describe them there"
            )
        freeze_all(model)
        unfreeze(model, self.trained)
        self.add(model, blocks)

    def merge(self, model: SegmentationModel) -> None:
        """Say that there is nothing to fold the parts into; methods whose parts are linear fold them instead.

        Raises:
            UserError: Always.
        """
        raise UserError(
            f"{type(self).__name__} cannot be folded into the model's own weights, so no other tool's layout has a "
            "place for it: go on from its checkpoints here, or tune with LoRA, SAMed, FacT or SSF, which fold"
        )
