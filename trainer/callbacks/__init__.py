"""What happens beside the training: checkpoints, records, progress."""

from trainer.callbacks.checkpoint import RunCheckpoint
from trainer.callbacks.concept_probes import BoxGivenProbe, SynonymProbe
from trainer.callbacks.ema import EMA
from trainer.callbacks.evaluation import EvaluationRecord
from trainer.callbacks.panels import ValidationPanels
from trainer.callbacks.predictions import PredictionRecord
from trainer.callbacks.probes import BoxJitterProbe
from trainer.callbacks.progress import ProgressLines, RunBar
from trainer.callbacks.record import RunRecord
from trainer.callbacks.throughput import Throughput
from trainer.callbacks.trace import SampleTrace
from trainer.callbacks.validation import ValidationRecord
from trainer.callbacks.volumes import VolumeRecord

__all__ = [
    "EMA",
    "BoxGivenProbe",
    "BoxJitterProbe",
    "EvaluationRecord",
    "PredictionRecord",
    "ProgressLines",
    "RunBar",
    "RunCheckpoint",
    "RunRecord",
    "SampleTrace",
    "SynonymProbe",
    "Throughput",
    "ValidationPanels",
    "ValidationRecord",
    "VolumeRecord",
]
