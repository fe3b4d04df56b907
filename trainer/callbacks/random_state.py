"""The states of the global random generators: a run that goes on draws what it would have drawn."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from data_shards.seed import run_seed, stream
from trainer.ranks import every_rank

KEY = "random_state"
"""Key of a checkpoint under which the states are, one for every rank."""


class RandomState(Callback):
    """Keeps the states of Python's, NumPy's and PyTorch's generators, of every rank, in the checkpoints.

    A run that goes on with as many ranks has them again when its first batch begins: what a model draws without a seed
    of its own is what an undisturbed run would have drawn. With another number of ranks each is seeded anew, by the
    run's seed, the step and the rank.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None
        self._begun: dict[str, Any] | None = None
        self._step = 0

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the states of a checkpoint that a fit goes on from; older ones have none."""
        if trainer.state.fn == "fit":
            self._loaded = checkpoint.get(KEY)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the run starts."""
        self._begun, self._step = None, trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restore what was loaded, before anything is drawn; note the states with which a step begins."""
        self._restore(trainer)
        if self._begun is None:
            self._begun = states(trainer.strategy.root_device)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Forget them when the step is done; checkpoints are written after this."""
        if trainer.global_step != self._step:
            self._begun, self._step = None, trainer.global_step

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the states: in the middle of a step those with which it began, since it will be taken again."""
        self._restore(trainer)
        checkpoint[KEY] = {"ranks": every_rank(self._begun or states(trainer.strategy.root_device))}

    def _restore(self, trainer: Trainer) -> None:
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        if len(loaded["ranks"]) == trainer.world_size:
            restore(loaded["ranks"][trainer.global_rank], trainer.strategy.root_device)
        else:
            reseed(run_seed(None), trainer.global_step, trainer.global_rank)


def states(device: torch.device) -> dict[str, Any]:
    """The states of the global generators as tensors and plain values.

    Args:
        device: This rank's; a GPU has a generator of its own.
    """
    version, numbers, gauss = random.getstate()
    drawn = np.random.get_state(legacy=False)
    assert isinstance(drawn, dict)
    return {
        "python": {"version": version, "numbers": torch.tensor(numbers), "gauss": gauss},
        "numpy": {
            "numbers": torch.from_numpy(drawn["state"]["key"].astype(np.int64)),
            "position": int(drawn["state"]["pos"]),
            "has_gauss": int(drawn["has_gauss"]),
            "gauss": float(drawn["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore(state: dict[str, Any], device: torch.device) -> None:
    """Set the global generators to what `states` returned.

    Args:
        state: The states.
        device: This rank's.
    """
    python, drawn = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["numbers"].tolist()), python["gauss"]))
    numbers = drawn["numbers"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", numbers, drawn["position"], drawn["has_gauss"], drawn["gauss"]))
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def reseed(seed: int, step: int, rank: int) -> None:
    """Seed the global generators by the run's seed, the step and the rank."""
    drawn = stream(seed, "resumed", step, rank)
    torch.manual_seed(int(drawn.integers(2**63)))
    random.seed(int(drawn.integers(2**63)))
    np.random.seed(int(drawn.integers(2**32)))
