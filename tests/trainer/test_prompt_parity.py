"""Prompts of every form: with equal weights, segment-anything's own decoder gives the same logits.

Shapes: Q prompts, P points a prompt, S = 128 the input side, h w = 32 the mask side.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.models import MedSAM
from trainer.models.medsam import ViT, to_original
from trainer.prompts import Prompts

SIDE = 128
SHAPE = ViT(width=32, depth=2, heads=2, global_blocks=(1,), window=4)


@pytest.fixture(scope="module")
def ours() -> MedSAM:
    """A small model with random weights, none of them zero."""
    torch.manual_seed(0)
    model = MedSAM(SHAPE, SIDE, weights=None).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def theirs(ours: MedSAM) -> nn.Module:
    """segment-anything's model with the same weights, every one of them."""
    sam = pytest.importorskip("segment_anything.modeling")
    grid = SIDE // SHAPE.patch
    model: nn.Module = sam.Sam(
        image_encoder=sam.ImageEncoderViT(
            img_size=SIDE, patch_size=SHAPE.patch, embed_dim=SHAPE.width, depth=SHAPE.depth, num_heads=SHAPE.heads,
            mlp_ratio=4, out_chans=256, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6), use_rel_pos=True,
            window_size=SHAPE.window, global_attn_indexes=SHAPE.global_blocks,
        ),
        prompt_encoder=sam.PromptEncoder(256, (grid, grid), (SIDE, SIDE), mask_in_chans=16),
        mask_decoder=sam.MaskDecoder(
            transformer_dim=256, num_multimask_outputs=3,
            transformer=sam.TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8),
        ),
    )  # fmt: skip
    model.load_state_dict(to_original(ours.state_dict()), strict=True)
    return model.eval()


def prompts(form: str) -> Prompts:
    """Three prompts about two images, with what the form names."""
    numbers = torch.Generator().manual_seed(3)
    index = torch.tensor([0, 1, 1])
    corners = torch.rand(3, 2, 2, generator=numbers) * (SIDE - 1)
    given: dict[str, Tensor] = {}
    if "box" in form:
        given["boxes"] = torch.cat([corners.amin(1), corners.amax(1)], dim=1)
    if "points" in form:
        given["points"] = torch.randint(0, SIDE, (3, 4, 2), generator=numbers).float()
        given["labels"] = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, -1, -1]])
    if "mask" in form:
        given["masks"] = torch.randn(3, 32, 32, generator=numbers) * 5
    return Prompts(index, **given)


def original(model: Any, features: Tensor, asked: Prompts) -> tuple[Tensor, Tensor]:
    """What segment-anything answers, prompt by prompt: its decoder takes one image at a time."""
    logits, scores = [], []
    for q, image in enumerate(asked.image_index.tolist()):
        sparse, dense = model.prompt_encoder(
            points=None if asked.points is None else (asked.points[q : q + 1], asked.labels[q : q + 1]),  # type: ignore[index]
            boxes=None if asked.boxes is None else asked.boxes[q : q + 1],
            masks=None if asked.masks is None else asked.masks[q : q + 1, None],
        )
        mask, score = model.mask_decoder(
            image_embeddings=features[image : image + 1],
            image_pe=model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        logits.append(mask)
        scores.append(score)
    return torch.cat(logits), torch.cat(scores)


FORMS = ["box", "points", "points and box", "mask", "points and mask", "box and mask", "points, box and mask"]


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_logits_are_those_of_segment_anything(form: str, ours: MedSAM, theirs: nn.Module):
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    features = ours.encode(images)
    assert torch.allclose(features, theirs.image_encoder(images), atol=1e-4)  # type: ignore[operator]
    asked = prompts(form)
    logits, scores = ours.decode(features, asked)
    expected, expected_scores = original(theirs, features, asked)
    assert logits.shape == expected.shape == (3, 1, 32, 32)
    assert (logits - expected).abs().max() < 1e-4
    assert (scores - expected_scores).abs().max() < 1e-4
    assert expected.std() > 0.05, "far above the tolerance"


@torch.no_grad()
def test_every_part_of_a_prompt_is_heard(ours: MedSAM):
    features = ours.encode(torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)))
    answers = [ours.decode(features, prompts(form))[0] for form in FORMS]
    for one in range(len(FORMS)):
        for other in range(one):
            assert (answers[one] - answers[other]).abs().max() > 1e-3, f"{FORMS[one]} against {FORMS[other]}"
