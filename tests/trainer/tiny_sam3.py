"""A tiny SAM3 with random weights, and what it is asked in the tests.

Shapes: inputs are (B, 3, 112, 112), 8 patches a side; 20 object queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.losses import SetPrediction
from trainer.models import SAM3, SAM3Shape
from trainer.prompts import ConceptPrompts

SIDE = 112
SHAPE = SAM3Shape(
    width=64, depth=4, heads=4, mlp=128, global_blocks=(1, 3), window=4, pretrained_size=56, text_width=32,
    text_depth=2, text_heads=2, text_mlp=64, hidden=32, hidden_heads=4, hidden_mlp=64, geometry_layers=1,
    encoder_layers=2, decoder_layers=3, queries=20,
)  # fmt: skip


def make(seed: int = 0, **arguments: Any) -> SAM3:
    """A model whose weights are all random, in evaluation mode; it drops nothing out unless told."""
    torch.manual_seed(seed)
    model = SAM3(SHAPE, SIDE, weights=None, **{"dropout": 0.0, "drop_path": 0.0, **arguments})
    with torch.no_grad():
        for parameter in model.parameters():  # zeros and ones would hide what a part does
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def tokens(*lengths: int) -> tuple[Tensor, Tensor]:
    """Tokens (K, context) of made-up texts of so many tokens, and which of them are text."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 49000, (len(lengths), SHAPE.context), generator=generator)
    valid = torch.arange(SHAPE.context) < torch.tensor(lengths)[:, None]
    ids[:, 0] = 49406
    for row, length in enumerate(lengths):
        ids[row, length - 1] = 49407
    return ids, valid


def images(count: int) -> Tensor:
    """Fixed random images (B, 3, 112, 112)."""
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def detect(
    model: SAM3, pixels: Tensor, image_index: Sequence[int], lengths: Sequence[int], **exemplars: Tensor
) -> SetPrediction:
    """Ask for made-up texts, one a prompt."""
    ids, valid = tokens(*lengths)
    asked = ConceptPrompts(torch.tensor(image_index), [""] * len(lengths), **exemplars)
    known = model.read_tokens(ids, valid)
    return model.detect_tokens(model.encode(pixels), known, valid, torch.arange(len(lengths)), asked)


def every_mask(prediction: SetPrediction) -> Tensor:
    """Mask logits (P, Q, h, w)."""
    assert prediction.masks is not None
    _, prompts, queries = prediction.logits.shape
    return torch.stack([prediction.masks.of(prompt, torch.arange(queries)) for prompt in range(prompts)])
