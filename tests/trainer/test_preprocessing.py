"""From native images to a model's input and back: against Pillow and MedSAM's habits, and its own inverse."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.metrics import overlap
from trainer.models import Preprocessing

PAD = Preprocessing(image_size=64)
SQUASH = Preprocessing(image_size=64, resize="squash")
SIZES = [(64, 64), (128, 50), (50, 128), (200, 333), (31, 17)]


def disc(height: int, width: int) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (((rows - 0.45 * height) / (0.3 * height)) ** 2 + ((columns - 0.6 * width) / (0.35 * width)) ** 2 < 1).byte()


def noise(channels: int, height: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Values around 100 for unsigned dtypes, around -20 for the others; the first channel is the darkest."""
    values = np.random.default_rng(height).normal(-20, 20, (channels, height, width))
    values += 10 * np.arange(channels)[:, None, None]
    if dtype in (torch.uint8, torch.uint16):
        values = (values + 120).clip(0, 250)
    return torch.from_numpy(values).to(dtype)


@pytest.mark.parametrize(
    ("native", "inside"),
    [
        ((233, 197), (64, 54)),
        ((197, 233), (54, 64)),
        ((32, 16), (64, 32)),
        ((64, 64), (64, 64)),
        ((1000, 1), (64, 1)),
        ((128, 5), (64, 3)),  # 2.5 px: halves are rounded up, as SAM does
        ((9, 128), (5, 64)),
    ],
)
def test_the_longer_side_fills_the_input_and_the_aspect_ratio_is_kept(native, inside):
    assert PAD.input_size(*native) == inside
    assert SQUASH.input_size(*native) == (64, 64)


@pytest.mark.parametrize("size", SIZES)
def test_images_are_resized_antialiased_then_scaled_then_padded(size):
    """MedSAM's order; the filter is Pillow's bilinear one, which is antialiased."""
    image = noise(1, *size, torch.float32)
    rows, columns = PAD.input_size(*size)
    pillow = np.asarray(Image.fromarray(image[0].numpy()).resize((columns, rows), Image.Resampling.BILINEAR))
    expected = np.zeros((64, 64), np.float32)
    expected[:rows, :columns] = (pillow - pillow.min()) / (pillow.max() - pillow.min())
    found = PAD.images([image])
    assert found.shape == (1, 3, 64, 64)
    assert found.dtype == torch.float32
    for channel in range(3):
        np.testing.assert_allclose(found[0, channel].numpy(), expected, atol=1e-4)


def test_images_that_fit_are_only_scaled():
    image = noise(3, 64, 64, torch.int16)
    values = image.float()
    expected = (values - values.min()) / (values.max() - values.min())
    torch.testing.assert_close(PAD.images([image])[0], expected)
    assert PAD.images([image])[0].amin((1, 2)).max() > 0, "one range over all channels: colours stay"


def test_bicubic_is_pillows_too():
    image = noise(1, 200, 100, torch.float32)
    pillow = np.asarray(Image.fromarray(image[0].numpy()).resize((32, 64), Image.Resampling.BICUBIC))
    found = Preprocessing(image_size=64, interpolation="bicubic").images([image])[0, 0, :, :32].numpy()
    np.testing.assert_allclose(found, (pillow - pillow.min()) / (pillow.max() - pillow.min()), atol=1e-4)


def test_bicubic_does_not_ring_at_edges():
    """As MedSAM's scripts, whose resizing stays within the image's range: what is flat keeps its value."""
    image = torch.zeros(1, 40, 60)
    image[:, 10:30, 15:45] = 200
    found = Preprocessing(120, resize="squash", interpolation="bicubic").images([image])[0, 0]
    assert found[:20].max() == found[:, :20].max() == 0
    assert found[40:80, 40:80].min() == 1
    both = Preprocessing(120, resize="squash", interpolation="bicubic").images([image, image / 2 + 7])
    torch.testing.assert_close(both[1], both[0]), "each image has its own range"


def test_sizes_channels_and_dtypes_mix_in_a_batch():
    images = [
        noise(1, 50, 70, torch.uint8),
        noise(3, 50, 70, torch.uint8),
        noise(1, 50, 70, torch.int16),
        noise(1, 50, 70, torch.uint16),
        noise(1, 50, 70, torch.float32),
        noise(3, 64, 20, torch.float32),
        noise(1, 50, 70, torch.float64),
    ]
    together = PAD.images(images)
    assert together.shape == (7, 3, 64, 64)
    for image, found in zip(images, together, strict=True):
        assert torch.equal(found, PAD.images([image])[0])
        assert found.min() == 0
        torch.testing.assert_close(found.max(), torch.tensor(1.0))
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("value", [0.0, 7.0, -1000.0, 1e20])
def test_a_constant_image_is_zero(value):
    assert torch.equal(PAD.images([torch.full((1, 30, 40), value)]), torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("preprocessing", [PAD, SQUASH])
@pytest.mark.parametrize("size", SIZES)
def test_boxes_there_and_back(preprocessing, size):
    height, width = size
    boxes = torch.tensor(
        [[0.0, 0.0, width - 1.0, height - 1.0], [0.2 * width, 0.3 * height, 0.7 * width, 0.9 * height]]
    )
    sizes = torch.tensor([size, size])
    scaled, inside = preprocessing.boxes(boxes, sizes)
    assert inside.tolist() == [list(preprocessing.input_size(*size))] * 2
    expected = boxes[1] * torch.tensor([inside[0, 1] / width, inside[0, 0] / height]).repeat(2)
    torch.testing.assert_close(scaled[1], expected)
    torch.testing.assert_close(preprocessing.boxes_to_native(scaled, sizes), boxes, atol=1e-4, rtol=1e-6)


def test_every_box_is_scaled_by_its_own_image():
    boxes = torch.tensor([[10.0, 20.0, 30.0, 40.0]] * 2)
    scaled, inside = PAD.boxes(boxes, torch.tensor([[128, 64], [32, 64]]))
    assert inside.tolist() == [[64, 32], [32, 64]]
    assert scaled.tolist() == [[5, 10, 15, 20], [10, 20, 30, 40]]


def test_no_boxes_at_all():
    scaled, inside = PAD.boxes(torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.int64))
    assert scaled.shape == (0, 4)
    assert inside.shape == (0, 2)
    assert PAD.boxes_to_native(scaled, torch.zeros(0, 2, dtype=torch.int64)).shape == (0, 4)


@pytest.mark.parametrize("size", SIZES)
def test_masks_are_taken_nearest_and_padded_with_zero(size):
    rows, columns = PAD.input_size(*size)
    mask = disc(*size)
    pillow = np.asarray(Image.fromarray(mask.numpy()).resize((columns, rows), Image.Resampling.NEAREST))
    found = PAD.masks([mask])[0]
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found[:rows, :columns].numpy(), pillow)
    assert found[rows:].sum() == found[:, columns:].sum() == 0


def test_masks_of_several_sizes_and_dtypes_keep_their_order():
    masks = [disc(*size) for size in SIZES]
    masks[1], masks[3] = masks[1].bool(), masks[3] * 255
    together = PAD.masks(masks)
    assert together.shape == (5, 64, 64)
    for mask, found in zip(masks, together, strict=True):
        assert torch.equal(found, PAD.masks([mask])[0])
        assert set(found.unique().tolist()) == {0.0, 1.0}


def test_no_masks_at_all():
    found = PAD.masks([], "cpu")
    assert found.shape == (0, 64, 64)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("preprocessing", [Preprocessing(256), Preprocessing(256, resize="squash")])
@pytest.mark.parametrize("side", [64, 256])
@pytest.mark.parametrize("size", [(233, 197), (120, 250), (512, 400), (90, 40)])
def test_a_mask_comes_back_to_where_it_was(preprocessing, size, side):
    """Drawn at native size, brought to the input, shrunk to the decoder's side, and back."""
    mask = disc(*size)
    logits = preprocessing.masks([mask]) * 20 - 10
    logits = torch.nn.functional.interpolate(logits[None], (side, side), mode="area")[0]
    back = preprocessing.to_native(logits, *size)
    assert back.shape == (1, *size)
    _, iou = overlap(back > 0, mask[None])
    assert iou > 0.97


def test_padding_does_not_reach_the_native_mask():
    logits = torch.full((1, 64, 64), 5.0)
    rows, columns = PAD.input_size(40, 100)
    logits[:, rows:], logits[:, :, columns:] = -1e6, -1e6
    assert torch.equal(PAD.to_native(logits, 40, 100), torch.full((1, 40, 100), 5.0))


def test_it_travels_as_json():
    assert Preprocessing(**json.loads(json.dumps(SQUASH.to_dict()))) == SQUASH


def test_a_target_between_the_sampled_pixels_is_not_lost():
    mask = torch.zeros(512, 512, dtype=torch.uint8)
    masks = []
    for row, column in ((7, 9), (100, 301), (511, 0)):
        masks.append(mask.clone())
        masks[-1][row, column] = 1
    resized = Preprocessing(image_size=128).masks(masks)
    assert resized.flatten(1).sum(1).tolist() == [1, 1, 1]
    assert [tuple(where[0].tolist()) for where in (m.nonzero() for m in resized)] == [(1, 2), (25, 75), (127, 0)]


def test_soft_targets_keep_the_smallest_and_the_thinnest(monkeypatch: pytest.MonkeyPatch) -> None:
    dot, line, half = (torch.zeros(64, 64, dtype=torch.uint8) for _ in range(3))
    dot[5, 9], line[:, 30], half[:, :32] = 1, 1, 255
    made = Preprocessing(16, resize="squash")
    shares = made.shares([dot, line, half])
    assert shares[0, 1, 2] == 1 / 16 and shares[0].sum() == 1 / 16  # one of the 16 native pixels of this one
    assert (shares[1, :, 7] == 1 / 4).all() and shares[1].sum() == 4  # unbroken
    assert (shares[2, :, :8] == 1).all() and shares[2].sum() == 128
    monkeypatch.setattr("trainer.models.preprocessing.HELD", 1)
    assert torch.equal(made.shares([dot, line, half]), shares)
    assert made.shares([]).shape == (0, 16, 16)
    padded = Preprocessing(16).shares([torch.ones(8, 32)])
    assert (padded[0, :4] == 1).all() and padded.sum() == 64


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_zscore_takes_an_images_own_mean_and_deviation_before_padding(channels, dtype):
    darker = (noise(channels, 60, 40, torch.float32).flip(2) + 90).clamp(0, 200).to(dtype)  # of the first one's size
    images = [noise(channels, 60, 40, dtype), darker, noise(1, 64, 64, dtype)]
    found = Preprocessing(image_size=64, scaling="zscore").images(images)
    assert found.shape == (3, 3, 64, 64)
    for image, result in zip(images, found, strict=True):
        rows, columns = PAD.input_size(*image.shape[-2:])
        native = image.float()[None]
        resized = torch.nn.functional.interpolate(native, (rows, columns), mode="bilinear", antialias=True)[0].numpy()
        expected = (resized.astype(np.float64) - resized.mean()) / resized.astype(np.float64).std()
        np.testing.assert_allclose(
            result[:, :rows, :columns].numpy(), expected.repeat(3 // len(expected), 0), atol=1e-4
        )
        assert (result[:, rows:] == 0).all()
        assert (result[:, :, columns:] == 0).all()
        assert result[:, :rows, :columns].mean().abs() < 1e-4, "all channels together, not each for itself"
        assert result[:, :rows, :columns].std(correction=0) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, -1000.1, 32768.0, 1e6 + 0.3])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_zscore_of_an_image_of_one_value_is_nothing(value, interpolation):
    """Resizing and means round: what they leave must not be taken for contrast, in a neighbour's company too."""
    images = [torch.full((1, 75, 91), value), noise(1, 75, 91, torch.float32)]
    both = Preprocessing(image_size=64, scaling="zscore", interpolation=interpolation).images(images)
    assert (both[0] == 0).all()
    assert both[1].abs().max() > 1


def test_zscore_does_not_depend_on_offset_and_scale():
    image = noise(1, 50, 70, torch.float32)
    zscore = Preprocessing(image_size=32, resize="squash", scaling="zscore")
    torch.testing.assert_close(zscore.images([image * 40 + 1000]), zscore.images([image]), atol=1e-3, rtol=0)
    torch.testing.assert_close(zscore.images([-image]), -zscore.images([image]), atol=1e-4, rtol=0)
    assert zscore.to_dict()["scaling"] == "zscore"
