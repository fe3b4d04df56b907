"""Which modules are norms, and where layers have their channels: the same for every library's classes."""

from __future__ import annotations

from torch import nn


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises and has a scale.

    By name, since the libraries have classes of their own beside torch's: LayerNorm2d, SamLayerNorm, RMSNorm. What is
    only composed of a norm and other layers has no weight of its own.
    """
    weight = getattr(module, "weight", None)
    return "Norm" in type(module).__name__ and isinstance(weight, nn.Parameter) and weight.ndim == 1


def channels_last(module: nn.Module) -> bool:
    """Whether a linear layer, convolution or norm has its channels in the last dimension, not in the second."""
    if isinstance(module, nn.modules.conv._ConvNd | nn.GroupNorm):
        return False
    # of two-dimensional norms, some say so in their name and others in an attribute
    return not type(module).__name__.endswith("2d") and getattr(module, "data_format", None) != "channels_first"
