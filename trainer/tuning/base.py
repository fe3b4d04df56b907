"""Tuning: takes a model, marks what learns, and how fast."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from math import inf
from typing import Any, Literal

from torch import nn

from data_shards.errors import UserError
from trainer.models.base import SegmentationModel
from trainer.tuning.attach import attached

Decay = Literal["matrices", "all"]


class Tuning(ABC):
    """A way of fine-tuning. Freeze first, then add adapters.

    Args:
        rates: Factors on the learning rate by name prefix or shell pattern, such as ``{image_encoder: 0.1}``; where
            several fit a parameter, the last counts.
        learning_rates: Learning rates, in the place of the module's own, by name prefix or shell pattern; where several
            fit a parameter, the last counts. `rates` are factors on these too.
    """

    def __init__(
        self, rates: Mapping[str, float] | None = None, learning_rates: Mapping[str, float] | None = None
    ) -> None:
        self.rates, self.learning_rates = dict(rates or {}), dict(learning_rates or {})
        for what, given in (("rates", self.rates), ("learning_rates", self.learning_rates)):
            for pattern, rate in given.items():
                if not 0 < rate < inf:
                    kind = "factor" if what == "rates" else "rate"
                    raise UserError(f"{what}: {pattern}: {rate}: a {kind} is above 0; what shall not learn is frozen")

    @abstractmethod
    def apply(self, model: SegmentationModel) -> None:
        """Mark what learns, in place; adapters are put in here."""

    def merge(self, model: SegmentationModel) -> None:  # noqa: B027 - most methods have nothing to merge
        """Fold adapters into the weights they adapt, so that the model has its original layout again.

        Raises:
            UserError: The method's parts are no linear maps, so there is nothing to fold them into.
        """

    def check_learns(self, model: SegmentationModel) -> None:
        """Refuse a tuning that trains nothing, or sets the rate of what does not learn; call it after `apply`.

        Raises:
            UserError: It does.
        """
        self._by_pattern(model, "learning_rates", self.learning_rates, 1.0)
        if not self.learning_rate_scales(model):
            raise UserError(
                f"{type(self).__name__} leaves nothing to learn: check its patterns against the model's names"
            )

    def learning_rate_scales(self, model: SegmentationModel) -> dict[str, float]:
        """Factor on the learning rate for every parameter that learns, by name.

        Raises:
            UserError: A pattern of `rates` matches nothing, or nothing that learns.
        """
        return self._by_pattern(model, "rates", self.rates, 1.0)

    def _by_pattern(
        self, model: SegmentationModel, what: str, given: Mapping[str, float], otherwise: float
    ) -> dict[str, float]:
        """A number for every parameter that learns, by name."""
        numbers = {name: otherwise for name, parameter in model.named_parameters() if parameter.requires_grad}
        for pattern, number in given.items():
            found = [name for name in matching(model, pattern, what) if name in numbers]
            if not found and numbers:
                raise UserError(f"{what}: {pattern}: {type(self).__name__} lets nothing of it learn: leave it out")
            numbers.update(dict.fromkeys(found, number))
        return numbers

    def parameter_groups(
        self, model: SegmentationModel, lr: float, weight_decay: float, decay: Decay = "matrices"
    ) -> list[dict[str, Any]]:
        """Make the optimiser's groups: one for each learning rate and each decay.

        Args:
            model: The model that `apply` was called on.
            lr: Base learning rate.
            weight_decay: Decay of what decays.
            decay: What decays. ``"matrices"`` leaves norms, biases (attention's too) and other vectors alone (the habit
                since Goyal et al. 2017, arXiv:1706.02677, §5); ``"all"`` decays them too, as MedSAM's code does.

        Raises:
            UserError: Nothing learns.
        """
        self.check_learns(model)
        scales = self.learning_rate_scales(model)
        bases = self._by_pattern(model, "learning_rates", self.learning_rates, lr)
        groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in model.named_parameters():
            if name in scales:
                decayed = decay == "all" or (parameter.ndim > 1 and "bias" not in name.rpartition(".")[2])
                groups[bases[name] * scales[name], weight_decay if decayed else 0.0].append(parameter)
        return [
            {"params": parameters, "lr": rate, "weight_decay": amount}
            for (rate, amount), parameters in sorted(groups.items(), key=lambda item: item[0])
        ]


def check_fresh(model: nn.Module) -> None:
    """Refuse a model that carries the parts of a tuning method already.

    Raises:
        UserError: It does; a second method's parts would be frozen, trained or merged with the first one's.
    """
    if attached(model) or any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise UserError(
            f"{type(model).__name__} carries the parts of a tuning method already: merge them, or take a fresh model"
        )


def freeze_all(model: nn.Module) -> None:
    """Freeze all of a fresh model; what learns is let loose after that.

    Raises:
        UserError: The model carries the parts of a tuning method already.
    """
    check_fresh(model)
    model.requires_grad_(False)


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze parameters whose names match; a pattern that matches none is a mistake.

    Args:
        model: The model, changed in place.
        patterns: Shell patterns over parameter names; a bare prefix such as ``prompt_encoder`` takes all below it.

    Raises:
        UserError: A pattern matches nothing.
    """
    _mark(model, patterns, requires_grad=False)


def unfreeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let parameters whose names match learn; the twin of `freeze`."""
    _mark(model, patterns, requires_grad=True)


def _mark(model: nn.Module, patterns: Sequence[str], *, requires_grad: bool) -> None:
    parameters = dict(model.named_parameters())
    fixed = getattr(model, "fixed", ())
    for pattern in patterns:
        for name in matching(model, pattern, "train" if requires_grad else "freeze"):
            parameters[name].requires_grad_(requires_grad and name not in fixed)


def matching(model: nn.Module, pattern: str, what: str) -> list[str]:
    """Names of the parameters that a shell pattern matches, or that lie below the part it names.

    Args:
        model: The model.
        pattern: The pattern.
        what: The argument that it stands in, for the message.

    Raises:
        UserError: None does.
    """
    names = [name for name, _ in model.named_parameters()]
    part, dot, rest = pattern.partition(".")
    own = getattr(model, "also_called", {}).get(part, part) + dot + rest
    found = [name for name in names if fnmatch(name, own) or name.startswith(own.rstrip(".*") + ".")]
    if not found:
        parts = sorted({name.split(".")[0] for name in names})
        raise UserError(
            f"{what}: pattern '{pattern}' matches no parameter of {type(model).__name__}; its parts: {', '.join(parts)}"
        )
    return found
