"""What this bundle does to images and boxes, and to its network's answers; it needs PyTorch, NumPy and MONAI alone.

Shapes: C channels; X Y sides of an image as MONAI reads it, X to the right; H W the same as rows and columns; S the
network's input side; Q boxes; h w sides of the network's masks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from torch import Tensor, nn

ROUNDING = 2e-6
"""Deviation, relative to the highest value, that resizing in fp32 may give an image of one value."""


def read_list(data_list: str, dataset_dir: str) -> list[dict[str, Any]]:
    """Read which images there are, and the boxes of each.

    Args:
        data_list: JSON file: ``[{"image": "a.png", "box": [[x0, y0, x1, y1], …]}, …]``, boxes in pixels, x to the right
            and y down. A list in the file's ``data`` is taken too.
        dataset_dir: Folder that images are named in.

    Raises:
        ValueError: Something in it is no image with boxes.
    """
    content = json.loads(Path(data_list).read_text(encoding="utf-8"))
    found = []
    for number, item in enumerate(content["data"] if isinstance(content, dict) else content):
        if not isinstance(item, dict) or not {"image", "box"} <= item.keys():
            raise ValueError(f"{data_list}: item {number} needs 'image' and 'box'")
        boxes = np.asarray(item["box"], dtype=np.float32)
        if boxes.size % 4 or boxes.ndim > 2 or not (boxes.ndim == 1 or boxes.shape[1] == 4 or not boxes.size):
            raise ValueError(f"{data_list}: item {number}: a box is [x0, y0, x1, y1], or a list of such")
        found.append({**item, "image": str(Path(dataset_dir) / item["image"]), "box": boxes.reshape(-1, 4)})
    return found


def load_network(path: str, device: torch.device | str = "cpu") -> nn.Module:
    """Load the network: image (1, C, S, S) and boxes (Q, 4) in its pixels → mask logits (Q, h, w).

    Args:
        path: What ``torch.export`` has saved.
        device: Where it shall run.

    Raises:
        FileNotFoundError: It is not there.
    """
    if not Path(path).is_file():  # torch would log its own dismay first
        raise FileNotFoundError(f"{path}: no such file")
    program = torch.export.load(path)
    if torch.device(device).type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, torch.device(device))
    return program.module()


class FitInputd(MapTransform):
    """Bring an image, (C, X, Y) or (C, X, Y, 1), to the network's input (channels, S, S), and its boxes along.

    Beside the image, the item then holds ``size``, its native rows and columns.

    Args:
        keys: Key of the image; one.
        box_key: Key of the boxes (Q, 4) as (x0, y0, x1, y1) in native pixels.
        image_size: Side S in pixels.
        resize: ``pad`` scales the longer side to S and pads bottom and right with zeros; ``squash`` scales both.
        scaling: ``minmax``, ``mean_std``, ``centred`` or ``zscore``; see this bundle's README.
        interpolation: ``bilinear`` or ``bicubic``, antialiased.
        channels: What the network takes; grey images are repeated.
        mean: Of each channel, for images in [0, 1]; None where scaling fixes none.
        std: Likewise.
    """

    def __init__(
        self,
        keys: str,
        box_key: str,
        image_size: int,
        resize: str,
        scaling: str,
        interpolation: str,
        channels: int = 3,
        mean: list[float] | None = None,
        std: list[float] | None = None,
    ) -> None:
        super().__init__(keys)
        self.box_key, self.image_size, self.channels = box_key, image_size, channels
        self.resize, self.scaling, self.interpolation = resize, scaling, interpolation
        self.mean, self.std = mean, std

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Fit one item."""
        item = dict(data)
        for key in self.key_iterator(item):
            native = _rows_and_columns(torch.as_tensor(item[key]))
            height, width = native.shape[-2:]
            rows, columns = input_size(height, width, self.image_size, self.resize)
            meta = item[key].meta if isinstance(item[key], MetaTensor) else {}
            item[key] = MetaTensor(self._image(native, rows, columns), meta=meta)
            scale = torch.tensor([columns / width, rows / height] * 2)
            item[self.box_key] = torch.as_tensor(item[self.box_key], dtype=torch.float32).reshape(-1, 4) * scale
            item["size"] = (height, width)
        return item

    def _image(self, native: Tensor, rows: int, columns: int) -> Tensor:
        if native.shape[0] not in (1, self.channels):
            raise ValueError(f"an image has 1 channel or {self.channels}, not {native.shape[0]}")
        image = native.float()[None]
        resized = F.interpolate(image, (rows, columns), mode=self.interpolation, antialias=True)
        if self.interpolation == "bicubic":
            resized = resized.clamp(image.min(), image.max())
        scaled = self._scaled(resized, native.dtype).expand(-1, self.channels, -1, -1)
        return F.pad(scaled, (0, self.image_size - columns, 0, self.image_size - rows))[0]

    def _scaled(self, image: Tensor, native: torch.dtype) -> Tensor:
        if self.scaling == "zscore":
            deviation, mean = torch.std_mean(image, correction=0)
            own = deviation > ROUNDING * image.abs().max()  # else it is of one value, and resizing has rounded it
            return (image - mean) / deviation if own else torch.zeros_like(image)
        if self.scaling != "minmax" and native == torch.uint8:
            image = image / 255
        else:
            low, high = image.min(), image.max()
            image = (image - low) / (high - low).clamp(min=1e-8)
        if self.mean is None or self.std is None:
            return image
        mean, deviation = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (image - mean) / deviation


class ToNatived(MapTransform):
    """Bring mask logits (Q, h, w) back to the image's pixels, as labels (1, X, Y): 0, or a box's number from 1.

    Where several boxes' masks lie over each other, the one with the highest logit counts.

    Args:
        keys: Key of the logits; one.
        image_key: Key of the image that they are of, as `FitInputd` has left it.
        image_size: Side S of the network's input in pixels.
        resize: As in `FitInputd`.
    """

    def __init__(self, keys: str, image_key: str, image_size: int, resize: str) -> None:
        super().__init__(keys)
        self.image_key, self.image_size, self.resize = image_key, image_size, resize

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Bring one item back."""
        item = dict(data)
        height, width = item["size"]
        rows, columns = input_size(height, width, self.image_size, self.resize)
        for key in self.key_iterator(item):
            logits = torch.as_tensor(item[key]).cpu().float()[:, None]
            full = F.interpolate(logits, (self.image_size, self.image_size), mode="bilinear")
            native = F.interpolate(full[..., :rows, :columns], (height, width), mode="bilinear")[:, 0]
            best, box = native.max(dim=0)
            labels = torch.where(best > 0, box + 1, 0).T[None].to(torch.int32)
            meta = item[self.image_key].meta
            slices = len(meta.get("spatial_shape", ())) == 3  # a volume of one slice is saved as one
            item[key] = MetaTensor(labels[..., None] if slices else labels, meta=meta)
        return item


class BoxEvaluator:
    """Shows a network every item of a data set with its boxes, and hands on what it says.

    Args:
        dataset: Items with ``image`` and ``box``, as `FitInputd` leaves them.
        network: The network.
        inferer: Calls it: ``inferer(images, network, boxes)``.
        postprocessing: Takes the item with ``pred``, the mask logits (Q, h, w).
        device: Where the network is.
    """

    def __init__(
        self,
        dataset: Iterable[dict[str, Any]],
        network: nn.Module,
        inferer: Callable[..., Tensor],
        postprocessing: Transform,
        device: torch.device | str = "cpu",
    ) -> None:
        self.dataset, self.network, self.inferer = dataset, network, inferer
        self.postprocessing, self.device = postprocessing, device

    def run(self) -> None:
        """Go through the data set once."""
        with torch.no_grad():
            for item in self.dataset:
                if not len(item["box"]):
                    raise ValueError(f"{item['image'].meta.get('filename_or_obj', 'an image')}: it has no box")
                image, boxes = item["image"].as_tensor()[None].to(self.device), item["box"].to(self.device)
                self.postprocessing({**item, "pred": self.inferer(image, self.network, boxes)})


def input_size(height: int, width: int, side: int, resize: str) -> tuple[int, int]:
    """Rows and columns that an image takes inside the network's input."""
    if resize == "squash":
        return side, side
    scale = side / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))  # halves are rounded up


def _rows_and_columns(image: Tensor) -> Tensor:
    """An image as MONAI reads it, (C, X, Y) or (C, X, Y, 1), as (C, H, W)."""
    if image.ndim == 4 and image.shape[-1] == 1:
        image = image[..., 0]
    if image.ndim != 3:
        raise ValueError(
            f"an image has two axes beside its channels, not {image.ndim - 1}: take volumes slice by slice"
        )
    plain: Tensor = image.as_tensor() if isinstance(image, MetaTensor) else image
    return plain.transpose(1, 2).contiguous()
