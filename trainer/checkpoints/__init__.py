"""Checkpoints: one file, or a folder to which every rank writes its part; whole, checked, and free of code."""

from trainer.checkpoints.background import Background
from trainer.checkpoints.consolidate import consolidate
from trainer.checkpoints.mark import Mark
from trainer.checkpoints.ranks import checkpoint_group
from trainer.checkpoints.sharded import load_sharded
from trainer.checkpoints.staging import Buffers, stage
from trainer.checkpoints.store import (
    has_mark,
    is_complete,
    newest_good,
    outline,
    point_last,
    read,
    remove,
    step_checkpoints,
    step_in_name,
    sweep,
    verify,
    write,
)
from trainer.checkpoints.tree import is_sharded

__all__ = [
    "Background",
    "Buffers",
    "Mark",
    "checkpoint_group",
    "consolidate",
    "has_mark",
    "is_complete",
    "is_sharded",
    "load_sharded",
    "newest_good",
    "outline",
    "point_last",
    "read",
    "remove",
    "stage",
    "step_checkpoints",
    "step_in_name",
    "sweep",
    "verify",
    "write",
]
