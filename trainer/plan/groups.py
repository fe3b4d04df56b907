"""A module's parameters by part, learning rate and weight decay, and what they take."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from trainer.modules.tuned import TunedModule


@dataclass(frozen=True)
class Group:
    """Parameters of one part of the model that learn alike.

    Attributes:
        part: Part of the model: the first word of the parameters' names.
        added: Whether the tuning method put them there.
        learning_rate: Their learning rate, after warm-up and before decay; None is frozen.
        weight_decay: Their weight decay; None is frozen.
        parameters: How many numbers.
        tensors: How many tensors.
        depths: Least and largest depth in the model, as layer decay counts it.
        first: Name of the first tensor.
    """

    part: str
    added: bool
    learning_rate: float | None
    weight_decay: float | None
    parameters: int
    tensors: int
    depths: tuple[int, int]
    first: str

    @property
    def learning(self) -> int:
        """How many of the numbers learn."""
        return 0 if self.learning_rate is None else self.parameters


def parameter_groups(module: TunedModule, own: set[str]) -> list[Group]:
    """The module's parameters by part, learning rate and weight decay: in the model's order, what is frozen last.

    Args:
        module: The module, on any device.
        own: Names of the parameters that the model has without the tuning method.

    Raises:
        UserError: Nothing learns.
    """
    model, depths = module.model, module.model.layer_ids()
    made = module.tuning.parameter_groups(model, module.lr, module.weight_decay, module.decay)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in made for p in group["params"]}
    members: dict[tuple[str, bool, float | None, float | None], list[str]] = defaultdict(list)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        added = name.replace(".base_layer.", ".") not in own  # peft moves what it adapts there
        members[name.partition(".")[0], added, *rates.get(id(parameter), (None, None))].append(name)
    parts = list(dict.fromkeys((part, added) for part, added, *_ in members))
    found = [
        Group(
            *key,
            parameters=sum(sizes[name] for name in names),
            tensors=len(names),
            depths=(min(depths[name] for name in names), max(depths[name] for name in names)),
            first=names[0],
        )
        for key, names in members.items()
    ]
    return sorted(
        found,
        key=lambda group: (
            parts.index((group.part, group.added)),
            group.learning_rate is None,
            *group.depths,
            group.learning_rate or 0.0,
            -(group.weight_decay or 0.0),
        ),
    )


def memory(module: TunedModule, averaged: bool) -> dict[str, int]:
    """Bytes of what stays in memory, before sharding: weights, and of what learns gradients and AdamW's two moments."""
    tensors = [*module.model.parameters(), *module.model.buffers()]
    learning = sum(p.numel() * p.element_size() for p in module.model.parameters() if p.requires_grad)
    found = {
        "weights": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "gradients": learning,
        "adamw": 2 * learning,
        "average": learning if averaged else 0,
    }
    return {**found, "total": sum(found.values())}
