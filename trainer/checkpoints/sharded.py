"""From a checkpoint of either form, of any number of ranks, into a sharded module and its optimisers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from data_shards.errors import UserError
from trainer.checkpoints.file import check_unmarked, load
from trainer.checkpoints.folder import OPTIMIZERS, fill, key_of, load_rest, stored
from trainer.checkpoints.optimizers import by_number, named, names_of
from trainer.checkpoints.ranks import checkpoint_group, rank_of, together
from trainer.checkpoints.store import has_mark, marked
from trainer.checkpoints.tree import Path as TreePath
from trainer.checkpoints.tree import mapped

WEIGHTS = "state_dict"
"""Where Lightning keeps the module's tensors in a checkpoint."""


@torch.no_grad()
def load_sharded(
    path: Path, module: nn.Module, optimizers: Sequence[Optimizer] = (), *, check: bool = True
) -> dict[str, Any]:
    """Load a checkpoint into a module and its optimisers, each rank its own part; all ranks call this.

    Args:
        path: The checkpoint, of either form and any number of ranks.
        module: The module, sharded (FSDP2) or not.
        optimizers: Its optimisers; without, their states are not read.
        check: Check every byte before, each rank a share of the files; without, the caller has done so.

    Returns:
        The rest of the checkpoint. Tensors in there that have the name and the shape of a parameter, such as an average
        of the weights, are sharded as that is.

    Raises:
        UserError: The checkpoint is damaged, or of another model or optimiser. Nothing has been loaded then.
    """
    group = checkpoint_group()
    path = path.resolve()
    with together(group):
        if check:
            _verify_share(path, group)
        content = load_rest(path) if path.is_dir() else load(path)
        if not isinstance(content, dict) or not isinstance(content.get(WEIGHTS), dict):
            raise UserError(f"checkpoint {path}: no checkpoint of a run")
        live = get_model_state_dict(module)
        if path.is_dir():
            stored(path, content)  # before anything is left out
        states = content.pop(OPTIMIZERS, [])
        if optimizers:
            if len(states) != len(optimizers):
                raise UserError(f"checkpoint {path}: it has {len(states)} optimisers, the recipe {len(optimizers)}")
            names = [names_of(module, optimizer) for optimizer in optimizers]
            content[OPTIMIZERS] = [named(state, ours, path) for state, ours in zip(states, names, strict=True)]
        _check_weights(content[WEIGHTS], live, path)
        content, empty = _placed(content, live, path)
    if path.is_dir():
        fill(empty, path, group)
    states = content.pop(OPTIMIZERS, [])
    set_model_state_dict(module, content.pop(WEIGHTS))
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(by_number(state, names_of(module, optimizer)))
    return content


def _verify_share(path: Path, group: ProcessGroup | None) -> None:
    """Check this rank's share of a checkpoint's files.

    Raises:
        UserError: One is missing or damaged, or there is no mark.
    """
    ranks = 1 if group is None else dist.get_world_size(group)
    if path.is_file() and not has_mark(path):
        if rank_of(group) == 0:
            check_unmarked(path)
        return
    mark, files = marked(path)
    for name in sorted(files)[rank_of(group) :: ranks]:
        mark.check(name, files[name])


def _check_weights(saved: Mapping[str, Any], live: Mapping[str, Any], path: Path) -> None:
    wrong = sorted(saved.keys() ^ live.keys())
    wrong += [name for name in saved.keys() & live.keys() if _shape(saved[name]) != _shape(live[name])]
    if wrong:
        shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise UserError(f"checkpoint {path} is of another model or tuning than the recipe's: {shown}")


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _placed(content: dict[str, Any], live: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A checkpoint's content with all tensors of a parameter's shape spread as that parameter is.

    Args:
        content: The content, the optimisers' states by name.
        live: The module's tensors.
        path: The checkpoint, for messages.

    Returns:
        It, and those of its tensors by key that are yet to be read from shards.

    Raises:
        UserError: An optimiser's sharded tensor has another shape than its parameter.
    """
    empty: dict[str, Tensor] = {}

    def place(at: TreePath, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        name = at[3] if at[0] == OPTIMIZERS and len(at) == 5 else at[-1]
        like = live.get(name) if isinstance(name, str) else None
        if not isinstance(like, DTensor) or like.shape != leaf.shape or at[-1] == "step":
            if leaf.is_meta and at[0] == OPTIMIZERS and isinstance(like, DTensor):
                raise UserError(f"checkpoint {path}: {key_of(at)} has another shape than its parameter")
            like = None
        if not leaf.is_meta:
            return leaf if like is None else _spread(leaf, like)
        made = torch.empty(leaf.shape, dtype=leaf.dtype) if like is None else torch.empty_like(like, dtype=leaf.dtype)
        empty[key_of(at)] = made
        return made

    return mapped(content, place), empty


def _spread(whole: Tensor, like: DTensor) -> Tensor:
    """This rank's part of a tensor that all ranks have; nothing is sent."""
    mesh = like.device_mesh
    part = distribute_tensor(whole.to(mesh.device_type), mesh, like.placements, src_data_rank=None)
    return part.clone()  # the file may be a map of gigabytes
