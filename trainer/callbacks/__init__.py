"""What happens beside the training: checkpoints, records, progress."""

from trainer.callbacks.calibration import CalibrationRecord
from trainer.callbacks.checkpoint import RunCheckpoint
from trainer.callbacks.compiling import CompileBlocks
from trainer.callbacks.concept_probes import BoxGivenProbe, SynonymProbe
from trainer.callbacks.ema import EMA
from trainer.callbacks.evaluation import EvaluationRecord
from trainer.callbacks.guard import StepGuard
from trainer.callbacks.heartbeat import Heartbeat
from trainer.callbacks.memory import Memory
from trainer.callbacks.panels import ValidationPanels
from trainer.callbacks.predictions import PredictionRecord
from trainer.callbacks.probes import BoxJitterProbe
from trainer.callbacks.progress import ProgressLines, RunBar
from trainer.callbacks.random_state import RandomState
from trainer.callbacks.recomputing import RecomputeToFit
from trainer.callbacks.record import RunRecord
from trainer.callbacks.stopping import GracefulStop
from trainer.callbacks.stragglers import RankTimes
from trainer.callbacks.throughput import Throughput
from trainer.callbacks.trace import SampleTrace
from trainer.callbacks.validation import ValidationRecord
from trainer.callbacks.volumes import VolumeRecord

__all__ = [
    "EMA",
    "BoxGivenProbe",
    "BoxJitterProbe",
    "CalibrationRecord",
    "CompileBlocks",
    "EvaluationRecord",
    "GracefulStop",
    "Heartbeat",
    "Memory",
    "PredictionRecord",
    "ProgressLines",
    "RandomState",
    "RankTimes",
    "RecomputeToFit",
    "RunBar",
    "RunCheckpoint",
    "RunRecord",
    "SampleTrace",
    "StepGuard",
    "SynonymProbe",
    "Throughput",
    "ValidationPanels",
    "ValidationRecord",
    "VolumeRecord",
]
