"""With the weights of tiny official modules ours compute the same: the renames, and the model, proved by numbers.

Shapes: B images, P prompts, Q queries, L layers.
"""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from official_sam3 import SHAPE, SIDE, merges, tiny
from torch import Tensor

from trainer.losses.sets import QueryMasks, SetPrediction
from trainer.models import SAM3
from trainer.models.sam3_names import to_meta, to_ours
from trainer.prompts.concepts import ConceptPrompts

pytest.importorskip("sam3")
TEXTS = ["liver", "left kidney tumour", "spleen"]
INDEX = torch.tensor([1, 0, 1])
"""The image of each text."""


def copied(official: Any, attention: Literal["eager", "sdpa"] | None = None) -> SAM3:
    """Ours with the official model's weights."""
    model = SAM3(
        SHAPE, SIDE, weights=None, tokenizer=merges(), dropout=0, drop_path=0, attention=attention, points=True
    )
    model.load(official.state_dict(), "of the official model")
    return model.eval()


@pytest.fixture(scope="module")
def pair() -> tuple[Any, SAM3]:
    """The official model, and ours with its weights; no dropout; in evaluation mode."""
    torch.manual_seed(0)
    official = tiny(dropout=0.0)
    return official, copied(official)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(autouse=True)
def without_pinning(monkeypatch):
    """The official code pins memory even where there is no GPU."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)


def near(found: Tensor | None, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal but for a share of the largest number."""
    assert found is not None and found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)


def test_the_way_back_is_the_official_state(pair):
    official, model = pair
    there, back = official.state_dict(), to_meta(model.state_dict())
    assert back.keys() == {name for name in there if not name.endswith("freqs_cis")}
    there["backbone.vision_backbone.trunk.pos_embed"][:, 0] = 0
    assert all(torch.equal(back[name], there[name]) for name in back)


def test_the_image_encoder(pair, images):
    official, model = pair
    with torch.no_grad():
        levels, positions, _, _ = official.backbone.vision_backbone(images)
        found = model.encode(images).levels
        coarsest = model.vision_encoder(images).fpn_hidden_states[3]
    for ours, theirs in zip((*found, coarsest), levels, strict=True):
        near(ours, theirs)
    near(model._positions(found[2]), positions[2][:1].flatten(2).transpose(1, 2))


def test_the_text_encoder(pair):
    official, model = pair
    with torch.no_grad():
        theirs = official.backbone.forward_text(TEXTS, device="cpu")
        found, valid = model.read(TEXTS)
    assert valid.sum(1).tolist() == [3, 5, 4]
    assert torch.equal(valid, ~theirs["language_mask"])
    near(found[valid], theirs["language_features"].transpose(0, 1)[valid])


def test_the_texts_projection(pair):
    """Nothing of SAM3 asks for it, but it has a name in both layouts, and is transposed."""
    official, model = pair
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    theirs = rows @ official.backbone.language_backbone.encoder.text_projection
    near(model.text_encoder.text_projection(rows), theirs)


def exemplars(boxes: int, points: int) -> tuple[ConceptPrompts, Any]:
    """The same prompts for ours and for the official model; the last text lacks one of each exemplar."""
    from sam3.model.geometry_encoders import Prompt

    generator = torch.Generator().manual_seed(3)
    places = [torch.rand(3, n, size, generator=generator) * 0.4 + 0.3 for n, size in ((boxes, 4), (points, 2))]
    labels = [torch.randint(2, (3, n), generator=generator) for n in (boxes, points)]
    for given in labels:
        given[2, -1:] = -1
    ours = ConceptPrompts(
        INDEX, TEXTS, places[0] if boxes else None, labels[0], places[1] if points else None, labels[1]
    )
    official = Prompt(
        box_embeddings=places[0].transpose(0, 1), box_mask=labels[0] < 0, box_labels=labels[0].clamp(min=0).T,
        point_embeddings=places[1].transpose(0, 1), point_mask=labels[1] < 0, point_labels=labels[1].clamp(min=0).T,
    )  # fmt: skip
    return ours, official


def ask(official: Any, images: Tensor, shown: Any) -> dict[str, Any]:
    """What the official model answers; in training without its matcher, which would need targets."""
    from sam3.model.data_misc import FindStage

    stage = FindStage(INDEX, torch.arange(len(TEXTS)), None, None, None, None, None, None)
    encoded = {**official.backbone.forward_image(images), **official.backbone.forward_text(TEXTS, device="cpu")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(official, "_compute_matching", lambda out, targets: None)
        patch.setattr(official, "back_convert", lambda targets: None)
        answer: dict[str, Any] = official.forward_grounding(encoded, stage, None, shown)
    return answer


def same_masks(found: QueryMasks | None, theirs: Tensor) -> None:
    assert found is not None
    for prompt, masks in enumerate(theirs):
        near(found.of(prompt, torch.arange(len(masks))), masks)


def same_last_layer(found: SetPrediction, theirs: dict[str, Any]) -> None:
    near(found.logits[-1], theirs["pred_logits"][..., 0])
    near(found.boxes[-1], theirs["pred_boxes"])
    assert found.presence is not None
    near(found.presence[-1], theirs["presence_logit_dec"][:, 0])
    near(found.semantic, theirs["semantic_seg"][:, 0])
    same_masks(found.masks, theirs["pred_masks"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("boxes", "points"), [(0, 0), (3, 0), (0, 2), (2, 3)])
def test_the_whole_model(pair, images, boxes, points, attention):
    official = pair[0]
    model = copied(official, attention)
    prompts, shown = exemplars(boxes, points)
    with torch.no_grad():
        theirs = ask(official, images, shown)
        found = model.detect(model.encode(images), prompts)
    assert len(found.logits) == 1 and found.many is None
    same_last_layer(found, theirs)


def test_exemplars_count(pair, images):
    """What was just compared depends on them."""
    model = pair[1]
    with torch.no_grad():
        features = model.encode(images)
        answers = [model.detect(features, exemplars(*given)[0]).logits for given in ((0, 0), (3, 0), (0, 2), (2, 3))]
    for i, one in enumerate(answers):
        assert all((one - other).abs().max() > 1e-2 for other in answers[:i])


@pytest.fixture
def learning(pair) -> tuple[Any, SAM3]:
    """Both in training, without old gradients."""
    official, model = pair
    for part in pair:
        part.train()
        part.zero_grad()
    yield official, model
    official.eval()
    model.eval()


def test_both_halves_of_every_layer_in_training(learning, images):
    """Divide and conquer: the second half of the queries attends to nothing of its kind."""
    official, model = learning
    prompts, shown = exemplars(2, 0)
    theirs = ask(official, images, shown)
    found = model.detect(model.encode(images), prompts)
    same_last_layer(found, theirs)
    layers = [*theirs["aux_outputs"], theirs]
    assert len(layers) == len(found.logits) == SHAPE.decoder_layers
    assert found.many is not None and found.presence is not None
    for place, layer in enumerate(layers):
        near(found.logits[place], layer["pred_logits"][..., 0])
        near(found.boxes[place], layer["pred_boxes"])
        near(found.presence[place], layer["presence_logit_dec"][:, 0])
        near(found.many.logits[place], layer["pred_logits_o2m"][..., 0])
        near(found.many.boxes[place], layer["pred_boxes_o2m"])
    same_masks(found.many.masks, theirs["pred_masks_o2m"])


def test_gradients_in_training(learning, images):
    """Every parameter's: what the official code detaches between layers is detached in ours."""
    official, model = learning
    prompts, shown = exemplars(2, 2)
    theirs = ask(official, images, shown)
    found = model.detect(model.encode(images), prompts)
    generator = torch.Generator().manual_seed(5)
    assert found.many is not None and found.many.masks is not None and found.presence is not None
    ours, other = torch.zeros(()), torch.zeros(())
    for place, layer in enumerate([*theirs["aux_outputs"], theirs]):
        for one, two in (
            (found.logits[place], layer["pred_logits"][..., 0]),
            (found.boxes[place], layer["pred_boxes"]),
            (found.presence[place], layer["presence_logit_dec"][:, 0]),
            (found.many.logits[place], layer["pred_logits_o2m"][..., 0]),
            (found.many.boxes[place], layer["pred_boxes_o2m"]),
        ):
            weights = torch.randn(one.shape, generator=generator)
            ours, other = ours + (weights * one).mean(), other + (weights * two).mean()
    masks = torch.stack([found.many.masks.of(prompt, torch.arange(SHAPE.queries)) for prompt in range(3)])
    for one, two in ((masks, theirs["pred_masks_o2m"]), (found.semantic, theirs["semantic_seg"][:, 0])):
        weights = torch.randn(one.shape, generator=generator)
        ours, other = ours + (weights * one).mean(), other + (weights * two).mean()
    ours.backward()
    other.backward()
    expected = to_ours({n: p.grad for n, p in official.named_parameters() if p.grad is not None})
    own = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    never = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert set(model.fixed) == never
    assert own.keys() == expected.keys() == dict(model.named_parameters()).keys() - never
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in own.items():
        assert (gradient - expected[name]).abs().max() <= 1e-5 * scale, name
