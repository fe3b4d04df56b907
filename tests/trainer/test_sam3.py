"""SAM3 as composed here, against transformers' own forward pass; its training form, and its weights."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_sam3 import SHAPE, SIDE, detect, every_mask, images, make, tokens
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Sam3Model
from transformers.models.sam3.modeling_sam3 import inverse_sigmoid

from data_shards.errors import UserError
from trainer.losses import SetPrediction
from trainer.models import SAM3, SAM3Shape
from trainer.models.sam3_shape import config_of
from trainer.prompts import ConceptPrompts
from trainer.tuning import FullTuning

LENGTHS, INDEX = (5, 9, 32), (0, 1, 1)


def stock(model: SAM3) -> Sam3Model:
    """transformers' own model with the same weights, all of them."""
    found = Sam3Model(config_of(model.shape, model.preprocessing.image_size))
    found.load_state_dict(model.state_dict(), strict=True)
    return found.eval()


def corners(boxes: Tensor) -> Tensor:
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], dim=-1)


@torch.no_grad()
def test_with_boxes_it_equals_transformers():
    model, pixels = make(), images(2)
    boxes = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(3)) * 0.4 + 0.2
    labels = torch.tensor([[1, 0], [1, -1], [1, 1]])
    ours = detect(model, pixels, INDEX, LENGTHS, boxes=boxes, box_labels=labels)
    ids, valid = tokens(*LENGTHS)
    theirs = stock(model)(
        pixel_values=pixels[list(INDEX)],
        input_ids=ids,
        attention_mask=valid.long(),
        input_boxes=boxes,
        input_boxes_labels=labels.where(labels >= 0, -10),  # its word for padding
    )
    torch.testing.assert_close(ours.logits[-1], theirs.pred_logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.presence[-1], theirs.presence_logits[:, 0], atol=1e-6, rtol=0)
    torch.testing.assert_close(corners(ours.boxes[-1]), theirs.pred_boxes, atol=1e-6, rtol=0)
    torch.testing.assert_close(every_mask(ours), theirs.pred_masks, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.semantic, theirs.semantic_seg[:, 0], atol=1e-6, rtol=0)


@torch.no_grad()
def test_by_text_alone_it_equals_transformers_with_the_geometry_token():
    """transformers leaves the CLS token out where there is no box; its geometry encoder gives it for none at all."""
    model, pixels = make(), images(2)
    ours = detect(model, pixels, INDEX, LENGTHS)
    theirs = stock(model)
    ids, valid = tokens(*LENGTHS)
    seen = theirs.vision_encoder(pixels[list(INDEX)])
    levels, places = seen.fpn_hidden_states[:-1], seen.fpn_position_encoding[:-1]
    none = torch.zeros(3, 0, dtype=torch.bool)
    shown = theirs.geometry_encoder(torch.zeros(3, 0, 4), none, none.long(), levels, places)
    text = theirs.get_text_features(input_ids=ids, attention_mask=valid.long()).pooler_output
    prompt = torch.cat([text, shown.last_hidden_state], 1)
    mask = torch.cat([valid, shown.attention_mask], 1)
    fused = theirs.detr_encoder([levels[2]], prompt, [places[2]], mask)
    found = theirs.detr_decoder(fused.last_hidden_state, prompt, fused.pos_embeds_flattened, mask, fused.spatial_shapes)
    rows = found.intermediate_hidden_states
    boxes = (inverse_sigmoid(found.reference_boxes) + theirs.detr_decoder.box_head(rows)).sigmoid()
    masks = theirs.mask_decoder(rows[-1], list(levels), fused.last_hidden_state, prompt, mask)
    torch.testing.assert_close(ours.logits[-1], theirs.dot_product_scoring(rows, prompt, mask)[-1, ..., 0])
    torch.testing.assert_close(ours.boxes[-1], boxes[-1])
    torch.testing.assert_close(ours.presence[-1], found.presence_logits[-1, :, 0])
    torch.testing.assert_close(every_mask(ours), masks.pred_masks, atol=1e-6, rtol=0)


@torch.no_grad()
def test_in_training_the_first_half_is_as_at_inference():
    model, pixels = make(), images(2)
    plain = detect(model, pixels, INDEX, LENGTHS)
    model.train()
    trained = detect(model, pixels, INDEX, LENGTHS)
    assert plain.many is None and plain.logits.shape == (1, 3, 20)
    assert trained.logits.shape == (3, 3, 20) and trained.many.logits.shape == (3, 3, 20)
    assert trained.many.presence is None and trained.many.semantic is None
    torch.testing.assert_close(trained.logits[-1], plain.logits[-1])
    torch.testing.assert_close(trained.boxes[-1], plain.boxes[-1])
    torch.testing.assert_close(trained.presence[-1], plain.presence[-1])
    torch.testing.assert_close(every_mask(trained), every_mask(plain))
    assert (trained.many.logits[-1] - plain.logits[-1]).abs().max() > 1e-4  # it does not attend to itself


@torch.no_grad()
def test_prompts_of_one_image_equal_runs_of_their_own():
    model, pixels = make(), images(1)
    together = detect(model, pixels, (0, 0, 0), LENGTHS)
    ids, valid = tokens(*LENGTHS)
    for p in range(3):
        asked = ConceptPrompts(torch.tensor([0]), [""])
        known = model.read_tokens(ids[p : p + 1], valid[p : p + 1])
        alone = model.detect_tokens(model.encode(pixels), known, valid[p : p + 1], torch.tensor([0]), asked)
        torch.testing.assert_close(together.logits[:, p], alone.logits[:, 0], atol=1e-6, rtol=0)
        torch.testing.assert_close(together.boxes[:, p], alone.boxes[:, 0], atol=1e-6, rtol=0)
        torch.testing.assert_close(every_mask(together)[p], every_mask(alone)[0], atol=1e-6, rtol=0)


def scalar(prediction: SetPrediction) -> Tensor:
    """A number that depends on everything that a prediction has."""
    halves = [prediction, prediction.many]
    parts = [part.square().mean() for half in halves for part in (half.logits, half.boxes, every_mask(half))]
    return torch.stack([*parts, prediction.presence.square().mean(), prediction.semantic.square().mean()]).sum()


def gradients(model: SAM3, **exemplars: Tensor) -> dict[str, Tensor | None]:
    model.train().zero_grad()
    scalar(detect(model, images(2), INDEX, LENGTHS, **exemplars)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_recomputing_changes_no_gradient():
    model = make()
    again = make(checkpoint_activations=True)
    plain, recomputed = gradients(model), gradients(again)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


def test_recomputing_keeps_less():
    kept: dict[bool, int] = {}
    for recompute in (False, True):
        model = make(checkpoint_activations=recompute).train()
        sizes: dict[int, int] = {}

        def note(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            detect(model, images(1), (0,), (5,))
        kept[recompute] = sum(sizes.values()) - sum(p.numel() * 4 for p in model.parameters())
    assert kept[True] < kept[False] / 2


def test_every_parameter_that_learns_gets_a_gradient():
    """By text alone, too: ranks wait for the gradients of all of them."""
    model = make()
    boxes = torch.tensor([[[0.5, 0.5, 0.3, 0.4]]]).expand(3, 1, 4)
    for name, gradient in gradients(model, boxes=boxes).items():
        assert gradient is not None and gradient.abs().sum() > 0, name
    assert all(gradient is not None for gradient in gradients(model).values())
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, _ in model.named_parameters()} - learns == set(model.fixed)
    assert "text_encoder.text_projection.weight" in model.fixed


def test_what_is_fixed_stays_so_whatever_is_tuned():
    model = make()
    FullTuning(freeze=()).apply(model)
    assert not any(model.get_parameter(name).requires_grad for name in model.fixed)


def test_in_training_something_drops_out_and_at_inference_nothing():
    model, pixels = make(dropout=0.3, drop_path=0.5), images(2)
    with torch.no_grad():
        torch.testing.assert_close(
            detect(model, pixels, INDEX, LENGTHS).logits, detect(make(), pixels, INDEX, LENGTHS).logits
        )
        model.train()
        first, second = (model.encode(pixels).levels[0] for _ in range(2))
        assert not torch.equal(first, second)  # paths of the image encoder
        steady = make(dropout=0.3).train()
        assert torch.equal(steady.encode(pixels).levels[0], steady.encode(pixels).levels[0])
        assert not torch.equal(*(detect(steady, pixels, INDEX, LENGTHS).logits for _ in range(2)))


def test_paths_drop_whole_images_at_a_rate_that_grows_with_depth():
    model = make(drop_path=0.6).train()
    layer = model.vision_encoder.backbone.layers[-1]  # a global one
    tokens_of = torch.ones(400, 8, 8, 64)
    with torch.no_grad():
        dropped = layer.mlp(tokens_of).flatten(1).abs().sum(1) == 0
        first = model.vision_encoder.backbone.layers[0].mlp(tokens_of).flatten(1).abs().sum(1) == 0
    assert 0.5 < dropped.float().mean() < 0.7 and not first.any()
    windowed = model.vision_encoder.backbone.layers[2]
    place = windowed.rotary_emb(tokens_of, windowed.position_ids)
    with torch.no_grad():
        branch = windowed.attention(torch.ones(400, 4, 4, 64), place)[0].reshape(100, 4, -1)
    gone = branch.abs().sum(2) == 0
    assert torch.equal(gone.any(1), gone.all(1)) and 0.2 < gone.all(1).float().mean() < 0.6  # all windows of an image


def test_a_presence_far_off_still_learns():
    model = make().train()
    head = model.detr_decoder.presence_head.layer3
    with torch.no_grad():
        head.bias.fill_(100.0)
    presence = detect(model, images(1), (0,), (5,)).presence
    assert presence.min() > 50
    presence.sum().backward()
    assert head.bias.grad.abs().sum() > 0
    assert detect(model.eval(), images(1), (0,), (5,)).presence.max() == 10


def test_depths_are_those_of_the_official_layer_decay():
    model = make()
    ids = model.layer_ids()
    assert ids["vision_encoder.backbone.embeddings.position_embeddings"] == 0
    assert ids["vision_encoder.backbone.layer_norm.weight"] == 0
    assert ids["vision_encoder.backbone.layers.0.mlp.fc1.weight"] == 1
    assert ids["vision_encoder.backbone.layers.3.mlp.fc1.weight"] == 4
    assert {ids[name] for name in ids if not name.startswith("vision_encoder.backbone")} == {5}


def test_the_released_shape_has_840_million_parameters():
    with torch.device("meta"):
        model = SAM3(weights=None)
    assert sum(p.numel() for p in model.parameters()) == 840_376_374
    assert model.mask_side == 288 and len(model.blocks()) == 32


def test_paper_rates_by_layer():
    with torch.device("meta"):
        model = SAM3(weights=None)
    rates = {"vision_encoder": 5e-5, "text_encoder": 5e-5, "text_projection": 5e-5, "geometry_encoder": 1e-4}
    tuning = FullTuning(freeze=(), layer_decay=0.85, learning_rates=rates)
    tuning.apply(model)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: group["lr"] for group in tuning.parameter_groups(model, 3e-4, 0.05) for p in group["params"]}
    assert found["detr_decoder.box_head.layer1.weight"] == 3e-4
    assert found["geometry_encoder.final_proj.weight"] == 1e-4
    assert found["text_encoder.text_model.final_layer_norm.weight"] == 5e-5
    assert found["vision_encoder.neck.fpn_layers.0.proj1.weight"] == 5e-5
    assert found["vision_encoder.backbone.layers.31.mlp.fc1.weight"] == pytest.approx(5e-5 * 0.85)
    assert found["vision_encoder.backbone.layers.0.mlp.fc1.weight"] == pytest.approx(5e-5 * 0.85**32)
    assert found["vision_encoder.backbone.embeddings.position_embeddings"] == pytest.approx(5e-5 * 0.85**33)


def test_another_side_keeps_the_weights():
    model = make()
    larger = model.at_size(168)
    assert larger.mask_side == 48
    pixels = torch.zeros(1, 3, 168, 168)
    ids, valid = tokens(5)
    asked = ConceptPrompts(torch.tensor([0]), [""])
    with torch.no_grad():
        found = larger.detect_tokens(
            larger.encode(pixels), larger.read_tokens(ids, valid), valid, torch.tensor([0]), asked
        )
    assert found.semantic.shape == (1, 48, 48)
    assert torch.equal(larger.state_dict()["text_projection.weight"], model.state_dict()["text_projection.weight"])


def test_weights_must_all_arrive(tmp_path):
    state = make().state_dict()
    torch.save(state, tmp_path / "whole.pt")
    loaded = SAM3(SHAPE, SIDE, weights=str(tmp_path / "whole.pt"))
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in state.items())
    partial = {name: tensor for name, tensor in state.items() if not name.startswith("dot_product_scoring.text_proj.")}
    torch.save(partial, tmp_path / "partial.pt")
    with pytest.raises(UserError, match=r"partial\.pt.* 2 missing \(dot_product_scoring\.text_proj\.bias"):
        SAM3(SHAPE, SIDE, weights=str(tmp_path / "partial.pt"))
    torch.save({"head.weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt"):
        SAM3(SHAPE, SIDE, weights=str(tmp_path / "other.pt"))


def test_points_need_their_own_weights(tmp_path):
    pixels, points = images(2), torch.rand(3, 2, 2)
    with pytest.raises(UserError, match="points is false"):
        detect(make(), pixels, INDEX, LENGTHS, points=points)
    model = make(points=True)
    with torch.no_grad():
        plain = detect(model, pixels, INDEX, LENGTHS)
        shown = detect(model, pixels, INDEX, LENGTHS, points=points)
        padded = detect(
            model, pixels, INDEX, LENGTHS, points=points, point_labels=torch.full((3, 2), -1, dtype=torch.int64)
        )
    assert (shown.logits - plain.logits).abs().max() > 1e-4
    torch.testing.assert_close(padded.logits, plain.logits, atol=1e-6, rtol=0)
    torch.save(make().state_dict(), tmp_path / "without.pt")
    with pytest.raises(UserError, match="nothing for points"):
        SAM3(SHAPE, SIDE, weights=str(tmp_path / "without.pt"), points=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 100}, "multiple of its patch"),
        ({"dropout": 1.0}, "dropout"),
        ({"shape": SAM3Shape(hidden=20, hidden_heads=4)}, "hidden"),
        ({"shape": SAM3Shape(queries=0)}, "shape.queries 0"),
    ],
)
def test_mistakes_are_one_line(change, message):
    with pytest.raises(UserError, match=message):
        SAM3(**{"weights": None, "shape": SHAPE, "image_size": SIDE, **change})


def test_a_copy_drops_out_too():
    model = copy.deepcopy(make(drop_path=0.5)).train()
    with torch.no_grad():
        assert not torch.equal(*(model.encode(images(2)).levels[0] for _ in range(2)))


def test_under_autocast_it_is_nearly_the_same_and_learns() -> None:
    model = make()
    boxes = torch.tensor([[[0.5, 0.5, 0.3, 0.4]]]).expand(3, 1, 4)
    with torch.no_grad():
        plain = detect(model, images(2), INDEX, LENGTHS, boxes=boxes)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = detect(model, images(2), INDEX, LENGTHS, boxes=boxes)
    torch.testing.assert_close(mixed.boxes, plain.boxes, atol=2e-2, rtol=0)
    assert mixed.boxes.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, boxes=boxes)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in found.values())


def test_under_autocast_the_decoders_mlps_are_in_fp32() -> None:
    """As in Meta's code."""
    model, seen = make(), []
    for layer in model.detr_decoder.layers:
        layer.mlp.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        detect(model, images(1), (0,), (5,))
    assert seen == [torch.float32] * 3


@pytest.mark.parametrize("autocast", [False, True])
def test_recomputing_drops_out_the_same(autocast: bool) -> None:
    found = []
    for recompute in (False, True):
        model = make(checkpoint_activations=recompute, dropout=0.3, drop_path=0.5)
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(gradients(model))
    assert all(torch.equal(found[0][name], gradient) for name, gradient in found[1].items())


def test_positions_of_an_evaluation_or_a_plan_do_not_reach_a_training() -> None:
    """transformers keeps its position encodings: made in inference mode they could not be saved for a backward pass."""
    with torch.inference_mode():
        detect(make(), images(1), (0,), (5,))
    with FakeTensorMode(allow_non_fake_inputs=True):
        make()._positions(torch.zeros(1, 32, 8, 8))
    model = make(checkpoint_activations=True).train()
    detect(model, images(1), (0,), (5,)).boxes.sum().backward()
    places = model._positions(torch.zeros(1, 32, 8, 8))
    encoding = model.vision_encoder.neck.position_encoding
    expected = encoding((2, 32, 8, 8), torch.device("cpu"), torch.float32)[:1].flatten(2).transpose(1, 2)
    assert type(places) is Tensor and torch.equal(places, expected)
