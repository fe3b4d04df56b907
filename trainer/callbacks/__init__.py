"""What happens beside the training: checkpoints, records, progress."""

from trainer.callbacks.checkpoint import RunCheckpoint
from trainer.callbacks.evaluation import EvaluationRecord
from trainer.callbacks.predictions import PredictionRecord
from trainer.callbacks.progress import ProgressLines, RunBar
from trainer.callbacks.record import RunRecord
from trainer.callbacks.throughput import Throughput
from trainer.callbacks.trace import SampleTrace

__all__ = [
    "EvaluationRecord",
    "PredictionRecord",
    "ProgressLines",
    "RunBar",
    "RunCheckpoint",
    "RunRecord",
    "SampleTrace",
    "Throughput",
]
