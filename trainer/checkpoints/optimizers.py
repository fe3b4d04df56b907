"""An optimiser's state by parameters' numbers, as one process has it, and by their names, as sharded runs have it.

PyTorch numbers parameters through the groups, one after the other; frozen ones are in no group and have no number.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from data_shards.errors import UserError

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def numbered(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """The state with numbers instead of names; one with numbers stays as it is.

    Args:
        state: ``state`` and ``param_groups`` of an optimiser.
        path: The checkpoint, for messages.

    Raises:
        UserError: It is no state of an optimiser.
    """
    try:
        names = [name for group in state["param_groups"] for name in group["params"]]
        if not any(isinstance(name, str) for name in names):
            return state
        numbers = {name: number for number, name in enumerate(names)}
        groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
        return {
            **state,
            "state": {numbers[name]: kept for name, kept in state["state"].items()},
            "param_groups": groups,
        }
    except (KeyError, TypeError) as error:
        raise UserError(f"checkpoint {path}: an optimiser's state is damaged ({type(error).__name__})") from error


def names_of(module: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """Names of an optimiser's parameters in each of its groups."""
    known: dict[int, str] = {}
    for name, parameter in module.named_parameters():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        known[id(parameter)] = name
    return [[known[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def named(state: dict[str, Any], names: list[list[str]], path: Path) -> dict[str, Any]:
    """A saved state by names.

    Args:
        state: It, by numbers or names.
        names: Of the optimiser's parameters in each of its groups, as the recipe makes it.
        path: The checkpoint, for messages.

    Raises:
        UserError: It was saved of other groups of parameters.
    """
    saved = [list(group["params"]) for group in state["param_groups"]]
    if list(map(len, saved)) != list(map(len, names)):
        raise UserError(
            f"checkpoint {path}: its optimiser has groups of {list(map(len, saved))} parameters, the recipe's of "
            f"{list(map(len, names))}: another tuning or layer decay"
        )
    pairs = [pair for theirs, ours in zip(saved, names, strict=True) for pair in zip(theirs, ours, strict=True)]
    if any(isinstance(theirs, str) for theirs, _ in pairs):
        for theirs, ours in zip(saved, names, strict=True):
            for name in sorted(set(theirs) ^ set(ours)):
                raise UserError(f"checkpoint {path}: its optimiser's groups differ from the recipe's: {name}")
        return state
    known = dict(pairs)
    return {**state, "state": {known[number]: kept for number, kept in state["state"].items()}}


def by_number(state: dict[str, Any], names: list[list[str]]) -> dict[str, Any]:
    """A state by names (`named`) as the optimiser of these groups loads it."""
    flat = [name for group in names for name in group]
    numbers = {name: number for number, name in enumerate(flat)}
    groups = [
        {**group, "params": [numbers[name] for name in ours]}
        for group, ours in zip(state["param_groups"], names, strict=True)
    ]
    return {**state, "state": {numbers[name]: kept for name, kept in state["state"].items()}, "param_groups": groups}
