"""Small modules put onto a model's own, without renaming any of its parameters.

A part becomes a submodule of the module that it changes, and a forward hook calls it: the model's own names and state
dict stay, and the part's parameters come on top as ``MODULE.PART.…``. Hooks are functions of this module that find the
part by its name: a copied, pickled or sharded model takes its own part, not that of the original.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from data_shards.errors import UserError

Change = Callable[[nn.Module, Any, Any], Any]
"""Takes the part, the module's first positional input and its output; returns the new output."""


def attach(module: nn.Module, name: str, part: nn.Module, change: Change) -> None:
    """Put a part onto a module.

    Args:
        module: What is changed; its output is a tensor, or a tuple whose first item is taken.
        name: The part's name in the module.
        part: The part; it goes to the device of the module's parameters.
        change: A function at the top level of a file, so that the model can be copied and pickled.

    Raises:
        UserError: The module has a part of that name already.
    """
    if hasattr(module, name):
        raise UserError(f"{type(module).__name__} has a '{name}' already: give a tuning method a fresh model")
    own = next(module.parameters(), None)
    module.add_module(name, part if own is None else part.to(own.device))
    handle = module.register_forward_hook(partial(_call, name=name, change=change), with_kwargs=True)
    _handles(module)[name] = handle.id


def detach(module: nn.Module, name: str) -> nn.Module:
    """Take a part off again and return it."""
    part = module.get_submodule(name)
    module._forward_hooks.pop(_handles(module)[name])
    module._forward_hooks_with_kwargs.pop(_handles(module).pop(name), None)
    delattr(module, name)
    return part


def attached(model: nn.Module, name: str | None = None) -> list[nn.Module]:
    """Every module of a model that has a part of a name, or any part."""
    parts = ((module, vars(module).get("_attached", {})) for module in model.modules())
    return [module for module, names in parts if (names if name is None else name in names)]


def _handles(module: nn.Module) -> dict[str, int]:
    """Ids of the hooks by their parts' names: plain numbers, so that they are right in a copy too."""
    handles: dict[str, int] = vars(module).setdefault("_attached", {})
    return handles


def _call(
    module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any, *, name: str, change: Change
) -> Any:
    part = module.get_submodule(name)
    given = inputs[0] if inputs else next(iter(named.values()))
    if isinstance(output, tuple):
        return (change(part, given, output[0]), *output[1:])
    return change(part, given, output)
