"""FSDP2 as a strategy of Lightning's trainer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import Module
from torch.optim import Optimizer

from data_shards.errors import UserError
from trainer.distributed.sharding import gather_for_evaluation, is_sharded, reshard, shard


class FSDP2(ModelParallelStrategy):
    """Shards parameters, gradients and optimiser states over the ranks, block by block (PyTorch's FSDP2).

    For models that do not fit a GPU with their optimiser; where they do, ``ddp`` is as fast or faster. What learns is
    the same, whatever the number of ranks: master weights, optimiser states and sums of gradients are in fp32, and
    ``trainer.precision: bf16-mixed`` computes in bf16. Checkpoints are folders to which every rank writes its part; any
    number of ranks reads them, and so do the other commands; ``trainer consolidate`` makes one file of them. Each
    evaluation gathers the weights once, so they have to fit a GPU without the optimiser.

    What learns and is never reached, such as a mask's prompt where none is given, decays here, for it gets gradients of
    zero; ``ddp`` refuses it.

    Args:
        replicas: Copies of the model: 1 shards over all GPUs. ``nodes`` keeps a copy on each node and shards inside it
            (HSDP), so that only sums of gradients go from node to node; or any number that divides the GPUs.
        reshard_after_forward: Free a block after its forward pass and gather it again for its backward pass. Without it
            less is sent, and the gathered weights are held for the time of a step.
        timeout_minutes: How long a rank waits for the others before the run breaks down.
    """

    def __init__(
        self,
        replicas: int | Literal["nodes"] = 1,
        reshard_after_forward: bool = True,
        timeout_minutes: float = 30,
    ) -> None:
        if isinstance(replicas, int) and replicas < 1:
            raise UserError(f"trainer.strategy: replicas {replicas}: 1 or more, or nodes")
        if not timeout_minutes > 0:
            raise UserError(f"trainer.strategy: timeout_minutes {timeout_minutes}: above 0")
        super().__init__(tensor_parallel_size=1, timeout=timedelta(minutes=timeout_minutes))
        self.replicas, self.reshard_after_forward = replicas, reshard_after_forward
        self._mesh: DeviceMesh | None = None

    def setup_environment(self) -> None:
        """Start the ranks' connection, and lay them out.

        Raises:
            UserError: The replicas do not divide them.
        """
        ranks = self.num_nodes * self.num_processes
        copies = self.num_nodes if self.replicas == "nodes" else int(self.replicas)
        if ranks % copies:
            raise UserError(f"trainer.strategy: replicas {copies} do not divide {ranks} ranks")
        self._data_parallel_size = ranks
        super().setup_environment()
        kind = self.root_device.type
        if copies == 1:
            self._mesh = init_device_mesh(kind, (ranks,), mesh_dim_names=("shard",))
        else:
            self._mesh = init_device_mesh(kind, (copies, ranks // copies), mesh_dim_names=("replicate", "shard"))

    def shard(self, module: Module, kinds: Mapping[str, list[Module]]) -> None:
        """Shard a training module in place; one that is sharded stays as it is.

        Args:
            module: The module.
            kinds: Its blocks by kind; all of them are groups of their own.
        """
        if is_sharded(module):
            return
        assert self._mesh is not None
        shard(module, list(kinds.values()), self._mesh, self.reshard_after_forward)

    def on_validation_start(self) -> None:
        """Gather the weights for the evaluation."""
        assert self.lightning_module is not None
        gather_for_evaluation(self.lightning_module)

    def on_validation_end(self) -> None:
        """Spread the weights again."""
        assert self.lightning_module is not None
        reshard(self.lightning_module, self.reshard_after_forward)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's tensors: this rank's shards of them, where they are."""
        assert self.lightning_module is not None
        reshard(self.lightning_module)
        return get_model_state_dict(self.lightning_module, options=StateDictOptions())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimiser's tensors by parameter's name: this rank's shards of them, where they are."""
        assert self.lightning_module is not None
        inner = getattr(optimizer, "_optimizer", optimizer)
        if not inner.state:  # asked for it, PyTorch would make one by a step
            reshard(self.lightning_module)
            names = {id(parameter): name for name, parameter in self.lightning_module.named_parameters()}
            groups = [{**group, "params": [names[id(p)] for p in group["params"]]} for group in inner.param_groups]
            return {"state": {}, "param_groups": groups}
        return get_optimizer_state_dict(self.lightning_module, inner, options=StateDictOptions())

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint, each rank its part."""
        from trainer.checkpoints import stage, write

        write(stage(checkpoint), Path(self.broadcast(str(filepath))))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of any form and any number of ranks into the module and its optimisers."""
        from trainer.checkpoints import load_sharded

        assert self.lightning_module is not None
        path = Path(self.broadcast(str(checkpoint_path)))
        reshard(self.lightning_module)
        return load_sharded(path, self.lightning_module, self.optimizers)

    def setup(self, trainer: Trainer) -> None:
        """Set the module and its optimisers up.

        Raises:
            UserError: The precision is not supported.
        """
        if str(trainer.precision) not in ("32-true", "bf16-mixed"):
            raise UserError(f"trainer.precision {trainer.precision}: FSDP2 takes bf16-mixed or 32-true")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is experimental.*")
            super().setup(trainer)
