"""SAM2's weights come in Meta's layout and in transformers', and compute the same in both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    Sam2Config,
    Sam2HieraDetConfig,
    Sam2Model,
    Sam2VideoConfig,
    Sam2VideoMaskDecoderConfig,
    Sam2VideoModel,
    Sam2VideoPromptEncoderConfig,
    Sam2VisionConfig,
)

from data_shards.errors import UserError
from trainer.models.sam2_names import check_architecture, to_ours, to_transformers
from trainer.models.sam2_shape import VARIANTS, SAM2Shape
from trainer.models.weights import read_weights

build_sam = pytest.importorskip("sam2.build_sam")
SIDE = 128
LETTERS = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}
pytestmark = pytest.mark.filterwarnings("ignore:cannot import name")  # without CUDA, holes are not filled
BOX = torch.tensor([[20.0, 30.0, 90.0, 100.0]])


def config(shape: SAM2Shape, side: int) -> Sam2VideoConfig:
    """What transformers calls a shape."""
    widths = shape.channels[::-1]
    trunk = Sam2HieraDetConfig(
        hidden_size=shape.embed_dim,
        num_attention_heads=shape.num_heads,
        image_size=[side, side],
        embed_dim_per_stage=widths,
        num_attention_heads_per_stage=[shape.num_heads * 2**stage for stage in range(4)],
        blocks_per_stage=list(shape.stages),
        global_attention_blocks=list(shape.global_blocks),
        window_size_per_stage=list(shape.window_spec),
        window_positional_embedding_background_size=[shape.background, shape.background],
    )
    vision = Sam2VisionConfig(
        backbone_config=trunk,
        backbone_channel_list=widths[::-1],
        backbone_feature_sizes=[[side // stride, side // stride] for stride in (4, 8, 16)],
    )
    return Sam2VideoConfig(
        vision_config=vision,
        prompt_encoder_config=Sam2VideoPromptEncoderConfig(image_size=side),
        mask_decoder_config=Sam2VideoMaskDecoderConfig(),
        image_size=side,
        memory_attention_rope_feat_sizes=[side // 16, side // 16],
    )


def official(variant: str) -> dict[str, Tensor]:
    """The official model's state dict."""
    name = f"configs/sam2.1/sam2.1_hiera_{LETTERS[variant]}.yaml"
    state: dict[str, Tensor] = build_sam.build_sam2(name, None, device="cpu").state_dict()
    return state


@pytest.fixture(scope="module")
def tiny() -> dict[str, Tensor]:
    return official("tiny")


@pytest.fixture(scope="module")
def predictor() -> Any:
    """The official predictor at 128 px, no weight of it zero or one, which takes the object to be there."""
    torch.manual_seed(0)
    made = build_sam.build_sam2_video_predictor(
        "configs/sam2.1/sam2.1_hiera_t.yaml",
        None,
        device="cpu",
        hydra_overrides_extra=[f"++model.image_size={SIDE}"],
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        made.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(5.0)
    return made


@pytest.mark.parametrize("variant", LETTERS)
def test_every_tensor_has_a_place_in_both_layouts(variant):
    ours = official(variant)
    with torch.device("meta"):
        theirs = Sam2VideoModel(config(VARIANTS[variant], 1024)).state_dict()
    converted = to_transformers(ours)
    assert {name: tensor.shape for name, tensor in converted.items()} == {n: t.shape for n, t in theirs.items()}
    back = to_ours(converted)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.items())
    again = to_transformers(back)
    assert all(torch.equal(again[name], tensor) for name, tensor in converted.items())
    check_architecture(back, VARIANTS[variant], "w.pt")


def test_our_own_names_stay(tiny):
    assert to_ours(tiny) == tiny
    assert to_ours({**tiny, "head.weight": BOX}).keys() - tiny.keys() == {"head.weight"}
    assert "head.weight" in to_ours({**to_transformers(tiny), "head.weight": BOX})


def test_transformers_image_model_answers_as_the_official_one(predictor):
    whole = config(VARIANTS["tiny"], SIDE)
    parts = {"prompt_encoder_config": whole.prompt_encoder_config, "mask_decoder_config": whole.mask_decoder_config}
    image_config = Sam2Config(vision_config=whole.vision_config, **{n: part.to_dict() for n, part in parts.items()})
    theirs = Sam2Model(image_config).eval()
    assert not theirs.load_state_dict(to_transformers(predictor.state_dict()), strict=False).missing_keys
    image = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        answer = theirs(pixel_values=image, input_boxes=BOX[None], multimask_output=False)
        high, middle, top = predictor.forward_image(image)["backbone_fpn"]
        corners = (BOX.reshape(1, 2, 2), torch.tensor([[2, 3]]))
        sparse, dense = predictor.sam_prompt_encoder(points=corners, boxes=None, masks=None)
        masks, ious, _, _ = predictor.sam_mask_decoder(
            image_embeddings=top + predictor.no_mem_embed.reshape(1, -1, 1, 1),
            image_pe=predictor.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
            repeat_image=False,
            high_res_features=[high, middle],
        )
    assert masks.std() > 0.1
    assert (answer.pred_masks[0] - masks).abs().max() < 1e-5
    assert (answer.iou_scores[0] - ious).abs().max() < 1e-5


def followed(predictor: Any, folder: Path) -> tuple[Tensor, Tensor]:
    """Three frames as the official loader reads them, and the logits (3, S, S) that it follows a box with."""
    noise = np.random.default_rng(0).integers(0, 255, (3, SIDE, SIDE, 3), dtype=np.uint8)
    for number, frame in enumerate(noise):
        Image.fromarray(frame).save(folder / f"{number}.jpg")
    state = predictor.init_state(str(folder))
    predictor.add_new_points_or_box(state, 0, 1, box=BOX[0].numpy())
    return state["images"], torch.cat([masks[:, 0] for _, _, masks in predictor.propagate_in_video(state)])


def propagated(model: Sam2VideoModel, frames: Tensor) -> Tensor:
    """What transformers' model follows the same box with."""
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

    session = Sam2VideoInferenceSession(video=frames, video_height=SIDE, video_width=SIDE, dtype=torch.float32)
    number = session.obj_id_to_idx(1)
    corners = {"point_coords": BOX.reshape(1, 1, 2, 2), "point_labels": torch.tensor([[[2, 3]]], dtype=torch.int32)}
    session.add_point_inputs(number, 0, corners)
    session.obj_with_new_inputs = [1]
    found = [answer.pred_masks for answer in model.propagate_in_video_iterator(session, start_frame_idx=0)]
    return F.interpolate(torch.cat(found), (SIDE, SIDE), mode="bilinear", align_corners=False)[:, 0]


def test_transformers_video_model_propagates_as_the_official_one(predictor, tmp_path):
    frames, expected = followed(predictor, tmp_path)
    model = Sam2VideoModel(config(VARIANTS["tiny"], SIDE)).eval()
    weights = to_transformers(predictor.state_dict())
    model.load_state_dict(weights, strict=True)
    assert expected.shape == (3, SIDE, SIDE) and expected.std((1, 2)).min() > 0.05
    assert (propagated(model, frames) - expected).abs().max() < 1e-5
    # it would have shown if one of two equally shaped parts of the memory had the other's name
    swapped = [f"memory_attention.layers.{number}.linear1.weight" for number in (0, 3)]
    model.load_state_dict({**weights, swapped[0]: weights[swapped[1]]})
    wrong = (propagated(model, frames) - expected).abs().amax((1, 2))
    assert wrong[0] < 1e-5 and wrong[1] > 1e-4


def test_files_of_every_kind_are_read(tiny, tmp_path):
    torch.save({"model": tiny}, tmp_path / "meta.pt")
    # as SAM2's own training leaves it
    torch.save({"model": tiny, "optimizer": {"state": {}}, "epoch": 3, "steps": {"train": 9}}, tmp_path / "tuned.pt")
    (tmp_path / "hub").mkdir()
    save_file(to_transformers(tiny), tmp_path / "hub/model.safetensors")
    for source in ("meta.pt", "tuned.pt", "hub"):
        state = to_ours(read_weights(str(tmp_path / source)))
        assert state.keys() == tiny.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in tiny.items())


class Code:
    """What no file of weights may run."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("touched"),))


def test_a_file_with_more_than_tensors_is_not_unpickled(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"no_mem_embed": tiny["no_mem_embed"]}, "more": Code()}, "bad.pt")
    with pytest.raises(UserError, match=r"weights bad\.pt: not a readable checkpoint"):
        read_weights("bad.pt")
    assert not Path("touched").exists()


def line(state: dict[str, Tensor], shape: SAM2Shape = VARIANTS["tiny"]) -> str:
    """The one line that says what is wrong with weights."""
    with pytest.raises(UserError) as error:
        check_architecture(to_ours(state, "w.pt"), shape, "w.pt")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_other_weights_are_named(tiny):
    assert "set the model's variant to tiny" in line(tiny, VARIANTS["small"])
    assert "12 blocks from width 96, the recipe's 48 from 144" in line(tiny, VARIANTS["large"])
    assert "variant to" not in line(
        {n: t for n, t in tiny.items() if ".blocks.11." not in n}, replace(SAM2Shape(), embed_dim=8)
    )
    first = {n: t for n, t in tiny.items() if not n.startswith(("no_obj_embed_spatial", "obj_ptr_tpos_proj"))}
    for state in (first, to_transformers(first)):
        assert "of SAM 2.0" in line(state) and "sam2.1" in line(state)
    image = {n: t for n, t in tiny.items() if n.startswith(("image_encoder", "sam_", "no_mem_embed"))}
    for state in (image, to_transformers(image)):
        assert "the image model alone" in line(state)
    for state in ({}, {"image_encoder.blocks.0.norm1.weight": BOX}, {"vision_encoder.layers.0.bias": BOX}):
        assert "no SAM2" in line(state)


def test_two_matrices_of_positions_that_differ(tiny):
    state = to_transformers(tiny)
    state["shared_image_embedding.positional_embedding"] += 1
    assert "shared_image_embedding.positional_embedding and prompt_encoder" in line(state)
    del state["prompt_encoder.shared_embedding.positional_embedding"]
    assert to_ours(state).keys() == tiny.keys()
