"""What a run tuned with LoRA has learnt, as peft writes it for the class of transformers.

Shapes: none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from data_shards.errors import UserError
from trainer.export.transformers_family import Family
from trainer.models import SegmentationModel

PREFIX = "base_model.model."
"""Of the names in an adapter's file."""


@dataclass(frozen=True)
class Adapter:
    """What was learnt.

    Attributes:
        config: Peft's configuration.
        state: Tensors of the file by name.
        base: Tensors of the model that it belongs on, by transformers' names, without those that learnt fully.
        layers: What it is on, and what learnt fully: modules of that model.
    """

    config: LoraConfig
    state: dict[str, Tensor]
    base: dict[str, Tensor]
    layers: list[str]


def adapter_of(model: SegmentationModel, family: Family) -> Adapter:
    """Take what was learnt out of a model.

    Args:
        model: The model with its adapters.
        family: What it is in transformers.

    Raises:
        UserError: Something learnt that peft has no place for.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    own = {name: one.detach().cpu() for name, one in _plain(model, layers)}
    low = {name: one.detach().cpu() for name, one in model.state_dict().items() if ".lora_" in name}
    whole = family.renamed(own)
    with torch.device("meta"):
        theirs = family.architecture(family.config())
    learnt = _learnt(model)
    for name in [*(f"{name}.weight" for name in layers), *learnt]:
        if not family.renamed({name: own[name]}):
            raise _refused(f"{name} learnt, and {family.architecture.__name__} has nothing for it")
    targets = sorted(_target(family, name) for name in layers)
    fully = family.renamed({name: own[name] for name in learnt})
    modules = _modules_to_save(fully)
    kept = _below(theirs, modules)
    for target in targets:
        if f"{target}.weight" in kept:
            inside = (name for name in sorted(fully) if target.startswith(f"{name.rpartition('.')[0]}."))
            first = next(inside, f"{target}.weight")
            raise _refused(f"{first} learnt fully, and peft keeps whole modules, of which this has adapters inside")
    given: Any = model.peft_config["default"]  # type: ignore[index]
    config = LoraConfig(
        r=given.r,
        lora_alpha=given.lora_alpha,
        lora_dropout=given.lora_dropout,
        use_dora=given.use_dora,
        use_rslora=given.use_rslora,
        target_modules=targets,
        modules_to_save=modules or None,
        inference_mode=True,
    )
    config.target_modules = targets  # in order: of a set, no two files would be equal
    state = {_in_file(name): one for name, one in family.renamed(low).items()}
    state |= {PREFIX + name: whole[name] for name in kept}
    base = {name: one for name, one in whole.items() if name not in fully}
    return Adapter(config, state, base, [*targets, *modules])


def _refused(why: str) -> UserError:
    return UserError(f"export to 'peft' failed: {why}: take --to transformers, which merges what is linear")


def _plain(model: SegmentationModel, layers: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a model as they would be named without adapters; quantised ones as plain numbers."""
    quantised = {f"{name}.": one for name, one in layers.items() if not _base(one).weight.is_floating_point()}
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name and not name.startswith(tuple(quantised)):
            yield name.replace(".base_layer.", "."), tensor
    for name, layer in quantised.items():
        from trainer.tuning.quantization import dequantized

        for kind, tensor in dequantized(_base(layer)).state_dict().items():
            yield name + kind, tensor


def _base(layer: Any) -> Any:
    return layer.get_base_layer()


def _learnt(model: SegmentationModel) -> list[str]:
    """Names of the parameters that learnt fully, as they are without adapters."""
    named = ((name, one) for name, one in model.named_parameters() if ".lora_" not in name)
    return [name.replace(".base_layer.", ".") for name, one in named if one.requires_grad]


def _target(family: Family, name: str) -> str:
    """What transformers calls a layer of ours."""
    (found,) = family.renamed({f"{name}.weight": torch.empty(0)})
    return found.removesuffix(".weight")


def _in_file(name: str) -> str:
    """What peft calls a tensor of an adapter."""
    return PREFIX + name.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector").replace(
        ".default.", "."
    )


def _modules_to_save(learnt: Collection[str]) -> list[str]:
    """The smallest modules that hold what learnt fully.

    Whole parts would be fewer, but peft 0.18 calls what it keeps with one unnamed argument, as layers are called.

    Args:
        learnt: Names of parameters of a model of transformers.

    Raises:
        UserError: A parameter that learnt lies in no module of its own.
    """
    alone = [name for name in learnt if "." not in name]
    if alone:
        raise _refused(f"{min(alone)} learnt, which is no module of its own, and peft keeps modules only")
    owners = {name.rpartition(".")[0] for name in learnt}
    return sorted(name for name in owners if not any(name.startswith(f"{other}.") for other in owners))


def _below(theirs: nn.Module, modules: Collection[str]) -> list[str]:
    """Names of what peft keeps with some modules: it takes every module whose name ends like one of theirs."""
    names = [name for name, _ in theirs.named_modules() if name and name.endswith(tuple(modules))] if modules else []
    return [name for name in theirs.state_dict() if name.startswith(tuple(f"{one}." for one in names))]
