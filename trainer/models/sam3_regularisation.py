"""The dropout of SAM3's official training, which transformers' modules lack; no module is replaced or renamed.

Shapes: B images, W windows an image.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import drop_path
from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION = "sam3_dropout"
"""Name under which transformers knows scaled dot-product attention with a module's own dropout."""


def regularise(model: nn.Module, dropout: float, path: float, tokens: int) -> None:
    """Add dropout to a model made of Sam3Model's submodules; at inference nothing changes.

    Attention weights of the geometry encoder and the DETR layers, their FFNs after the activation, and the text's MLP
    of the scores drop out at `dropout`; the residual branches of the ViT's blocks at a rate that grows linearly with
    depth from 0 to `path` (Huang et al. 2016, arXiv:1603.09382).

    Args:
        model: The model.
        dropout: Share that drops out, in [0, 1).
        path: Share of the deepest block's branches that drop out, in [0, 1).
        tokens: Side of the image in patches.
    """
    AttentionInterface.register(ATTENTION, attend)
    for name in ("geometry_encoder", "detr_encoder", "detr_decoder"):
        part: Any = model.get_submodule(name)
        part.config._attn_implementation = ATTENTION
        for module in part.modules():
            if type(module).__name__ == "Sam3Attention":
                module.attention_dropout = dropout
            elif type(module).__name__ == "Sam3MLP":
                # it drops out before its ReLU, which is the same as after
                module.dropout = nn.Dropout(dropout)
    # no dropout there, but masks of what is valid, which transformers' eager attention would add as 0 and 1
    model.get_submodule("mask_decoder").config._attn_implementation = ATTENTION  # type: ignore[union-attr]
    scoring: Any = model.get_submodule("dot_product_scoring")
    scoring.text_mlp_dropout = nn.Identity()  # transformers drops out the MLP's output, the official code its inside
    scoring.text_mlp.layer1.register_forward_hook(Dropout(dropout))
    layers: Any = model.get_submodule("vision_encoder.backbone.layers")
    for place, layer in enumerate(layers):
        rate = path * place / max(1, len(layers) - 1)
        windows = (-(-tokens // layer.window_size)) ** 2 if layer.window_size else 1
        layer.attention.register_forward_hook(DropPath(rate, windows))
        layer.mlp.register_forward_hook(DropPath(rate, 1))


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention that drops out as its module says; the signature is transformers'."""
    rate = float(getattr(module, "attention_dropout", 0.0)) if module.training else 0.0
    out = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout_p=rate, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


class Dropout:
    """A forward hook that drops numbers out of a module's output in training."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, module: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
        """Drop out."""
        return F.dropout(output, self.rate, module.training)


class DropPath:
    """A forward hook that drops a residual branch of whole images in training.

    Args:
        rate: Share of the images.
        windows: Windows that an image is cut into; they follow each other in the first dimension.
    """

    def __init__(self, rate: float, windows: int) -> None:
        self.rate, self.windows = rate, windows

    def __call__(self, module: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        """Drop the branch; attention gives a tuple whose first is the branch."""
        if not module.training or not self.rate:
            return output
        if isinstance(output, tuple):
            return (self._drop(output[0]), *output[1:])
        return self._drop(output)

    def _drop(self, branch: Tensor) -> Tensor:
        images = branch.shape[0] // self.windows
        dropped: Tensor = drop_path(branch.reshape(images, -1), self.rate, training=True)
        return dropped.reshape(branch.shape)


def start_as_official(model: nn.Module) -> None:
    """Draw a random model's queries and boxes as the official code does: transformers' all begin near one box."""
    decoder: Any = model.get_submodule("detr_decoder")
    with torch.no_grad():
        decoder.query_embed.weight.normal_()
        decoder.reference_points.weight.normal_()
        decoder.box_head.layer3.weight.zero_()
        decoder.box_head.layer3.bias.zero_()
