"""Where a run's figures go besides its own files; each is told the same, and nothing of a patient."""

from trainer.loggers.tensorboard import TensorBoard
from trainer.loggers.told import told
from trainer.loggers.wandb import WandB, refuse_unguarded

__all__ = ["TensorBoard", "WandB", "refuse_unguarded", "told"]
