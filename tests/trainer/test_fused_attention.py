"""SAM2, SAM3 and LiteMedSAM attend through torch's fused kernel: nothing of theirs takes a softmax of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from trainer.models import SAM3, LiteMedSAM, SegmentationModel
from trainer.prompts import Prompts
from trainer.prompts.concepts import ConceptPrompts


class Attending(TorchFunctionMode):
    """Counts fused attention, and softmaxes outside of it."""

    SOFT = frozenset({F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, F.multi_head_attention_forward})

    def __init__(self) -> None:
        super().__init__()
        self.fused: Counter[tuple[int, int]] = Counter()
        """Calls by queries and keys."""
        self.own: list[tuple[int, ...]] = []
        self.masked: list[torch.dtype] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.fused[args[0].shape[-2], args[1].shape[-2]] += 1
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            self.masked += [] if mask is None else [mask.dtype]
        elif func in self.SOFT:
            self.own.append(tuple(args[0].shape))
        return func(*args, **kwargs)


def attending(run: Callable[[], Any]) -> Attending:
    with Attending() as found:
        run()
    return found


def boxes(count: int, side: int) -> Prompts:
    return Prompts(
        torch.zeros(count, dtype=torch.int64), boxes=torch.tensor([[4.0, 4, side / 2, side / 2]]).repeat(count, 1)
    )


@pytest.mark.parametrize("training", [True, False])
def test_litemedsam(training: bool) -> None:
    model = LiteMedSAM(64, weights=None).train(training)
    features = model.encode(torch.zeros(1, 3, 64, 64))
    encoder = attending(lambda: model.encode(torch.zeros(1, 3, 64, 64)))
    decoder = attending(lambda: model.decode(features, boxes(2, 64)))
    assert encoder.fused.total() == len(model.blocks()) > 0 and encoder.own == []
    assert decoder.fused.total() == 7 and decoder.own == []  # two two-way blocks of three, and the last one


@pytest.mark.parametrize("training", [True, False])
def test_sam2_and_its_memory(training: bool) -> None:
    tiny = pytest.importorskip("tiny_sam2", reason="needs sam2")
    model = tiny.make().train(training)
    side = model.preprocessing.image_size
    images = torch.zeros(2, 3, side, side)
    encoder = attending(lambda: model.encode(images))
    assert encoder.fused.total() == len(model.blocks()) and encoder.own == [] and encoder.masked == []
    features = model.encode(images).take(torch.tensor([0]))
    first = attending(lambda: model.look(features, model.without_memory(features), boxes(1, side)))
    assert first.fused.total() == 7 and first.own == []


@pytest.mark.parametrize("training", [True, False])
def test_sam3(training: bool) -> None:
    pytest.importorskip("open_clip")
    from tiny_sam3 import SHAPE, SIDE

    model: SegmentationModel = SAM3(SHAPE, SIDE, weights=None).train(training)
    images, asked = (
        torch.zeros(1, 3, SIDE, SIDE),
        ConceptPrompts(torch.zeros(2, dtype=torch.int64), ["liver", "spleen"]),
    )
    encoder = attending(lambda: model.encode(images))
    assert encoder.fused.total() == SHAPE.depth and encoder.own == [] and encoder.masked == []
    features = model.encode(images)
    detector = attending(lambda: model.detect(features, asked))
    assert detector.own == []
    assert detector.fused.total() >= SHAPE.text_depth + 2 * SHAPE.encoder_layers + 3 * SHAPE.decoder_layers
