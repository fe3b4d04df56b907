"""Modules whose evaluations also ask for what is not there.

Shapes: none.
"""

from __future__ import annotations

from typing import Any

from data_shards.batch import TripletBatch
from trainer.modules.concepts import term_answers
from trainer.modules.scoring import Prediction
from trainer.modules.tuned import TunedModule
from trainer.presence import TermAnswer, logged_rates
from trainer.ranks import every_rank


class AnsweringModule(TunedModule):
    """Notes what was said to all that was asked for, there or not, beside the scores of what is there.

    Attributes:
        threshold: Confidence from which an answer counts.
        asks_in_vain: Whether what is not there is asked for at all; nothing is noted otherwise.
    """

    threshold: float = 0.5
    asks_in_vain: bool = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.answers: list[tuple[int, TermAnswer]] = []
        """What the evaluation that is running was told on this rank, each with its sample's position in the corpus."""

    def evaluation_step(self, batch: TripletBatch) -> Prediction:
        """Score every term that is there, and note what was said to all that were asked for."""
        prediction = super().evaluation_step(batch)
        if not self.asks_in_vain:
            return prediction
        scored = [self.counts(batch, row) for row in range(len(batch.masks))]
        self.answers += term_answers(batch, prediction, self.threshold, scored)
        return prediction

    def gathered_answers(self) -> list[TermAnswer]:
        """Every rank's answers in corpus order, each once; at an evaluation's end, when all ranks ask."""
        rows = {(position, answer.term): answer for part in every_rank(self.answers) for position, answer in part}
        return [rows[place] for place in sorted(rows)]

    def _forget(self) -> None:
        super()._forget()
        self.answers = []

    def _log(self, stage: str, scores: Any) -> None:
        super()._log(stage, scores)
        self.log_dict(logged_rates(stage, self.gathered_answers(), self.threshold), sync_dist=True)
