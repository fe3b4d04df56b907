"""Corrections of some of a clip's objects: those whose masks were not given; answers about some of several.

Shapes: Q objects, N of them that are clicked on, S the model's input side, h w the decoder's mask side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer.prompts import GivenMaskPrompts, Prompter, Prompts

if TYPE_CHECKING:
    from trainer.models.sam2 import Look, SAM2Features
    from trainer.modules.clips import Followed


@dataclass(frozen=True)
class Clicked:
    """The objects of a group that are clicked on in a frame, the frame's features for each, and the last answers."""

    group: Followed
    features: SAM2Features
    conditioned: Tensor
    logits: Tensor

    @classmethod
    def of(
        cls, group: Followed, features: SAM2Features, conditioned: Tensor, logits: Tensor, clicked: Tensor
    ) -> Clicked:
        """Those of a group whose numbers are given: (N,) int64 on the CPU."""
        if len(clicked) == len(group):
            return cls(group, features, conditioned, logits)
        there = clicked.to(conditioned.device, non_blocking=True)
        return cls(group.subset(clicked), features.take(clicked), conditioned[there], logits[there])


def gives_masks(prompter: Prompter) -> bool:
    """Whether a prompter, or one of those that it is made of, may give masks as answers."""
    parts = [getattr(prompter, "start", None), *getattr(prompter, "prompters", ())]
    return isinstance(prompter, GivenMaskPrompts) or any(gives_masks(part) for part in parts if part is not None)


def not_given(asked: Sequence[Prompts], count: int) -> Tensor:
    """Which of `count` objects were asked about otherwise than by giving their masks: (N,) int64 on the CPU."""
    if all(prompts.given is None for prompts in asked):
        return torch.arange(count)
    clicked = torch.ones(count, dtype=torch.bool)
    for prompts in asked:
        if prompts.given is not None:
            clicked[slice(None) if prompts.rows is None else prompts.rows] = False
    return clicked.nonzero()[:, 0]


def only(asked: Sequence[Prompts], clicked: Tensor, count: int) -> list[Prompts]:
    """The prompts of some of all `count` objects, (N,) int64 on the CPU, whose rows count these alone."""
    if len(clicked) == count:
        return list(asked)
    kept = []
    for prompts in asked:
        rows = torch.arange(len(prompts)) if prompts.rows is None else prompts.rows
        places = torch.isin(rows, clicked).nonzero()[:, 0]
        if len(places):
            part = prompts.subset(places)
            kept.append(replace(part, rows=torch.searchsorted(clicked, rows[places])))
    return kept


def spread(values: Tensor, clicked: Tensor, count: int) -> Tensor:
    """Values (N,) of some objects among those of all `count`, which have 0: (Q,)."""
    if len(clicked) == count:
        return values
    return values.new_zeros(count).index_put((clicked.to(values.device, non_blocking=True),), values)


def patched(look: Look, again: Look, clicked: Tensor) -> Look:
    """An answer about all objects in which that about some is replaced; of several masks the best alone remains."""
    if len(clicked) == len(look.best):
        return again
    place = (clicked.to(look.best.device, non_blocking=True),)
    fields = {
        "best": (look.best, again.best),
        "full": (look.full, again.full),
        "presence": (look.presence, again.presence),
        "pointer": (look.pointer, again.pointer),
        "ious": (look.ious.amax(1, keepdim=True), again.ious.amax(1, keepdim=True)),
    }
    new = {name: old.index_put(place, part.to(old.dtype)) for name, (old, part) in fields.items()}
    return replace(look, logits=new["best"][:, None], **new)


def first_of(count: int, looks: dict[int, Look], costs: dict[str, Tensor]) -> tuple[dict[int, Look], dict[str, Tensor]]:
    """Answers and costs of the first objects, without those that they were padded with."""
    if len(costs["loss"]) == count:
        return looks, costs
    cut = {
        frame: replace(look, **{item.name: getattr(look, item.name)[:count] for item in fields(look)})
        for frame, look in looks.items()
    }
    return cut, {name: cost[:count] for name, cost in costs.items()}


def made_up_click(asked: Sequence[Prompts], logits: Tensor, *_: Any) -> list[Prompts]:
    """What a correction asks, as far as memory goes: a point more, and the last answer's mask."""
    again = []
    for prompts in asked:
        count = 1 if prompts.points is None else prompts.points.shape[1] + 1
        points, labels = torch.zeros(len(prompts), count, 2), torch.ones(len(prompts), count, dtype=torch.int64)
        again.append(replace(prompts, points=points, labels=labels, masks=logits.float()))
    return again
