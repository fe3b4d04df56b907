"""MedSAM against `segment-anything` and `transformers`: the same function and training, weights in every layout."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from data_shards.datamodule import TripletDataModule
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from trainer.callbacks import SampleTrace
from trainer.models import LiteMedSAM, MedSAM
from trainer.models.medsam import VARIANTS, ViT, to_original, to_ours
from trainer.modules import MedSAMModule
from trainer.prompts import BoxPrompts, Prompts
from trainer.tuning import FullTuning

SMALL = ViT(width=48, depth=4, heads=3, global_blocks=(1, 3), window=5)
"""Its 8 × 8 tokens at 128 px are no multiple of the window: windows are padded."""
BOXES = torch.tensor([[0.1, 0.2, 0.6, 0.9], [0.4, 0.3, 0.5, 0.4], [0.0, 0.0, 1.0, 1.0]])


def reference(shape: ViT, side: int) -> Any:
    """`segment-anything`'s model of a shape."""
    pytest.importorskip("segment_anything")
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    grid = side // shape.patch
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=side,
            patch_size=shape.patch,
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.heads,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=shape.window,
            global_attn_indexes=shape.global_blocks,
            out_chans=256,
        ),
        prompt_encoder=PromptEncoder(256, (grid, grid), (side, side), mask_in_chans=16),
        mask_decoder=MaskDecoder(
            transformer_dim=256,
            transformer=TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8),
        ),
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
    )


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a random part: zeros, such as those of relative positions, would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def pair(shape: ViT, side: int, **arguments: Any) -> tuple[MedSAM, Any]:
    """Our model and the reference with equal weights, in evaluation mode."""
    torch.manual_seed(0)
    theirs = shake(reference(shape, side)).eval()
    ours = MedSAM(shape, side, weights=None, **arguments)
    state = {name: tensor for name, tensor in theirs.state_dict().items() if not name.startswith("pixel_")}
    ours.load(state, "of segment-anything")
    return ours.eval(), theirs


def their_logits(model: Any, images: Tensor, boxes: Tensor) -> Tensor:
    sparse, dense = model.prompt_encoder(points=None, boxes=boxes, masks=None)
    logits, _ = model.mask_decoder(
        image_embeddings=model.image_encoder(images),
        image_pe=model.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    return logits[:, 0]


@torch.no_grad()
def our_logits(model: MedSAM, images: Tensor, boxes: Tensor) -> Tensor:
    index = torch.zeros(len(boxes), dtype=torch.int64)
    return model.decode(model.encode(images), Prompts(index, boxes))[0][:, 0]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", [128, 80])
def test_logits_equal_those_of_segment_anything(side: int, attention: str) -> None:
    ours, theirs = pair(SMALL, side, attention=attention)
    images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = their_logits(theirs, images, BOXES * side)
    found = our_logits(ours, images, BOXES * side)
    assert expected.std() > 0.1, "weights that tell something"
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.slow
def test_logits_of_vit_b_at_1024_equal_those_of_segment_anything() -> None:
    ours, theirs = pair(VARIANTS["vit_b"], 1024)
    images = torch.rand(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = their_logits(theirs, images, BOXES * 1024)
    assert expected.std() > 0.1
    assert (our_logits(ours, images, BOXES * 1024) - expected).abs().max() < 1e-4


def test_parameter_counts_are_the_paper_s() -> None:
    with torch.device("meta"):
        model = MedSAM(weights=None)
    FullTuning().apply(model)
    counts = {
        part: sum(p.numel() for p in model.get_submodule(part).parameters() if p.requires_grad)
        for part in ("image_encoder", "mask_decoder", "prompt_encoder")
    }
    assert counts == {"image_encoder": 89_670_912, "mask_decoder": 4_058_340, "prompt_encoder": 0}


@pytest.mark.parametrize(("name", "count"), [("vit_l", 308_278_272), ("vit_h", 637_026_048)])
def test_larger_encoders_are_sam_s(name: str, count: int) -> None:
    with torch.device("meta"):
        model = MedSAM(name, weights=None)  # type: ignore[arg-type]
    assert sum(p.numel() for p in model.image_encoder.parameters()) == count


# --- weights


def test_weights_of_every_layout_are_the_same_function(tmp_path: Path) -> None:
    from transformers import SamConfig, SamModel, SamVisionConfig
    from transformers.models.sam.configuration_sam import SamMaskDecoderConfig, SamPromptEncoderConfig

    ours, _ = pair(SMALL, 128)
    images = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    expected = our_logits(ours, images, BOXES * 128)
    original = to_original(ours.state_dict())
    assert to_ours(original).keys() == ours.state_dict().keys()
    torch.save(original, tmp_path / "medsam.pth")
    save_file(dict(ours.state_dict()), tmp_path / "ours.safetensors")
    module = MedSAMModule(ours, prompts=BoxPrompts(0))
    torch.save({"state_dict": module.state_dict()}, tmp_path / "last.ckpt")
    vision = SamVisionConfig(
        hidden_size=48, num_hidden_layers=4, num_attention_heads=3, image_size=128, window_size=5,
        global_attn_indexes=[1, 3],
    )  # fmt: skip
    theirs = SamModel(
        SamConfig(
            vision_config=vision,
            prompt_encoder_config=SamPromptEncoderConfig(image_size=128),
            mask_decoder_config=SamMaskDecoderConfig(layer_norm_eps=1e-5),
        )
    )
    state = {
        f"vision_{n.removeprefix('image_')}" if n.startswith("image_") else n: t
        for n, t in module.model.state_dict().items()
    }
    positions = state["prompt_encoder.shared_embedding.positional_embedding"]
    theirs.load_state_dict({**state, "shared_image_embedding.positional_embedding": positions}, strict=True)
    theirs.eval().save_pretrained(tmp_path / "folder")
    with torch.no_grad():
        answer = theirs(images, input_boxes=BOXES[None] * 128, multimask_output=False).pred_masks[0, :, 0]
    assert (answer - expected).abs().max() < 1e-4, "transformers' own forward pass"
    for source in ("medsam.pth", "ours.safetensors", "last.ckpt", "folder"):
        read = MedSAM(SMALL, 128, weights=str(tmp_path / source)).eval()
        assert torch.equal(our_logits(read, images, BOXES * 128), expected), source


def refusal(state: dict[str, Tensor], tmp_path: Path, **arguments: Any) -> str:
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError) as caught:
        MedSAM(**{"encoder": SMALL, "image_size": 128, **arguments}, weights=str(tmp_path / "w.pth"))
    (text,) = caught.value.args
    assert "\n" not in text and "w.pth" in text
    return str(text)


def test_weights_of_another_architecture_are_named(tmp_path: Path, untouched: LiteMedSAM) -> None:
    state = MedSAM(SMALL, 128, weights=None).state_dict()
    assert "4 blocks of width 48, the recipe's 12 of 768" in refusal(state, tmp_path, encoder="vit_b")
    large = {
        "image_encoder.patch_embed.proj.weight": torch.zeros(1024, 3, 16, 16),
        **{f"image_encoder.blocks.{i}.norm1.weight": torch.zeros(1024) for i in range(24)},
    }
    assert refusal(large, tmp_path).endswith("set the model's encoder to vit_l")
    assert "LiteMedSAM" in refusal(dict(untouched.state_dict()), tmp_path)
    gone = {name: tensor for name, tensor in state.items() if name != "mask_decoder.iou_token.weight"}
    assert "1 missing (mask_decoder.iou_token.weight)" in refusal(gone, tmp_path)
    assert "1 unknown (surplus)" in refusal({**state, "surplus": torch.zeros(1)}, tmp_path)


@pytest.mark.parametrize("arguments", [{"image_size": 100}, {"image_size": 0}, {"encoder": ViT(width=50, heads=3)}])
def test_shapes_that_do_not_fit(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"multiple"):
        MedSAM(**{"encoder": SMALL, **arguments}, weights=None)


def test_weights_at_another_side_keep_what_does_not_depend_on_it(tmp_path: Path) -> None:
    ours, _ = pair(SMALL, 128)
    other = ours.at_size(192)
    assert other.preprocessing.image_size == 192
    resized = {n for n, t in other.state_dict().items() if t.shape != ours.state_dict()[n].shape}
    assert resized == {"image_encoder.pos_embed"} | {
        f"image_encoder.layers.{block}.attn.rel_pos_{axis}" for block in (1, 3) for axis in "hw"
    }
    table = ours.state_dict()["image_encoder.layers.1.attn.rel_pos_h"]
    # half-pixel linear interpolation, by hand
    places = (np.arange(23) + 0.5) * 15 / 23 - 0.5
    expected = np.stack([np.interp(places, np.arange(15), column) for column in table.numpy().T], axis=1)
    found = other.state_dict()["image_encoder.layers.1.attn.rel_pos_h"].numpy()
    assert np.abs(found - expected).max() < 1e-6
    back = ours.at_size(128)
    images = torch.rand(1, 3, 128, 128)
    assert torch.equal(our_logits(back, images, BOXES * 128), our_logits(ours, images, BOXES * 128))


# --- training


def gradients(model: MedSAM, images: Tensor) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    logits, _ = model.decode(model.encode(images), Prompts(torch.zeros(3, dtype=torch.int64), BOXES * 128))
    logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_checkpointed_activations_give_the_same_gradients() -> None:
    plain, _ = pair(SMALL, 128)
    saving = MedSAM(SMALL, 128, weights=None, checkpoint_activations=True)
    saving.load(plain.state_dict(), "of this model")
    images = torch.rand(1, 3, 128, 128)
    expected, found = gradients(plain, images), gradients(saving, images)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)
    assert saving.image_encoder.layers[0].gradient_checkpointing


def reference_losses(theirs: Any, batches: list[list[str]], shards: ShardDataset, module: MedSAMModule) -> list[float]:
    """MedSAM's training loop: its model, MONAI's Dice, PyTorch's cross-entropy, AdamW over encoder and decoder."""
    monai_losses = pytest.importorskip("monai.losses")
    dice = monai_losses.DiceLoss(sigmoid=True, squared_pred=True, reduction="mean")
    entropy = nn.BCEWithLogitsLoss(reduction="mean")
    learning = [*theirs.image_encoder.parameters(), *theirs.mask_decoder.parameters()]
    optimizer = torch.optim.AdamW(learning, lr=1e-4, weight_decay=0.01)
    keys = {shards.index.key(i): i for i in range(len(shards))}
    losses = []
    for batch in batches:
        triplets = [shards[keys[key]] for key in batch]
        preprocessing = module.model.preprocessing
        images = preprocessing.images([torch.from_numpy(t.image.copy())[None] for t in triplets])
        masks = preprocessing.masks([torch.from_numpy(t.targets[0].mask()) for t in triplets])[:, None]
        boxes, _ = preprocessing.boxes(
            torch.tensor([t.targets[0].box for t in triplets], dtype=torch.float32),
            torch.tensor([t.image.shape[:2] for t in triplets]),
        )
        embeddings = theirs.image_encoder(images)
        predictions = []
        with torch.no_grad():
            prompts = [theirs.prompt_encoder(points=None, boxes=box[None], masks=None) for box in boxes]
        for embedding, (sparse, dense) in zip(embeddings, prompts, strict=True):
            logits, _ = theirs.mask_decoder(
                image_embeddings=embedding[None],
                image_pe=theirs.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )
            predictions.append(F.interpolate(logits, masks.shape[-2:], mode="bilinear", align_corners=False))
        predicted = torch.cat(predictions)
        loss = dice(predicted, masks) + entropy(predicted, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_ten_steps_follow_the_reference_loop(tiny_shards: Path, tmp_path: Path) -> None:
    from lightning.pytorch import Trainer

    ours, theirs = pair(SMALL, 128)
    theirs.train()
    module = MedSAMModule(ours, prompts=BoxPrompts(max_shift=0), lr=1e-4, weight_decay=0.01, decay="all")
    data = TripletDataModule(train=str(tiny_shards / "train"), batch_size=2, micro_batch_size=2, seed=0)
    trainer = Trainer(
        max_steps=10, accelerator="cpu", callbacks=[SampleTrace()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    with (tmp_path / "trace.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 10
    batches = [row["keys"].split() for row in rows]
    expected = reference_losses(theirs, batches, ShardDataset(tiny_shards / "train"), module)
    found = [float(row["loss"]) for row in rows]
    assert expected[0] - min(expected) > 0.05, "something is learnt"
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-5
    names = dict(module.model.named_parameters())
    for name, parameter in to_ours(dict(theirs.named_parameters())).items():
        if not name.startswith("prompt_encoder"):
            assert (names[name] - parameter).abs().max() < 2e-4, name


def test_coordinates_keep_their_precision_under_autocast() -> None:
    """In bf16 a box's corners would be rounded to two pixels of 1024, and so would the places of the features."""
    model, seen = MedSAM(SMALL, 128, weights=None).eval(), []
    model.mask_decoder.register_forward_pre_hook(lambda _, given, named: seen.append(named), with_kwargs=True)
    prompts = Prompts(torch.zeros(3, dtype=torch.int64), BOXES * 127, masks=torch.randn(3, 32, 32))
    with torch.no_grad():
        features = model.encode(torch.rand(1, 3, 128, 128))
        model.decode(features, prompts)
        with torch.autocast("cpu", torch.bfloat16):
            model.decode(features, prompts)
    for name in ("sparse_prompt_embeddings", "dense_prompt_embeddings", "image_positional_embeddings"):
        assert torch.equal(seen[0][name], seen[1][name]), name
