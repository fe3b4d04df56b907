"""Sharded training: FSDP2 through Lightning, and what the rest of the trainer needs to know of it."""

from trainer.distributed.sharding import is_sharded, reshard, tensors_in, zero_of
from trainer.distributed.strategy import FSDP2

__all__ = ["FSDP2", "is_sharded", "reshard", "tensors_in", "zero_of"]
