"""What every export offers to the gate.

Shapes: Q prompts, S the consumer's input side, C channels; P texts, N object queries, h w the side of their masks; T
frames, H W their native height and width.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from data_shards.errors import UserError
from trainer.models import SegmentationModel
from trainer.prompts import Prompts

BoxConsumer = Callable[[Tensor, Tensor], Tensor]
"""A consumer's own model: image (1, C, S, S) and boxes (Q, 4) in its pixels → mask logits (Q, S, S)."""


@dataclass(frozen=True)
class TextAnswer:
    """What a consumer's own model finds of some texts in an image.

    Attributes:
        confidence: (P, N) confidence of each query, in [0, 1].
        boxes: (P, N, 4) as (cx, cy, w, h), shares of the input's side.
        masks: (P, N, h, w) logits.
    """

    confidence: Tensor
    boxes: Tensor
    masks: Tensor


TextConsumer = Callable[[Tensor, Sequence[str]], TextAnswer]
"""A consumer's own model: image (1, C, S, S) and P texts → what it finds."""

PromptConsumer = Callable[[Tensor, Sequence[Prompts]], list[Tensor]]
"""A consumer's own model: image (1, C, S, S) and prompts of any form in its pixels → for each mask logits (Q, h, w)."""

FrameConsumer = Callable[[Sequence[np.ndarray], Tensor, Tensor], tuple[Tensor, Tensor]]
"""A consumer's own model: T frames (H, W) or (H, W, 3) uint8, boxes (Q, 4) in pixels of the first, and the mask (S, S)
bool of one more object there → the frames as it read them, (T, C, S, S), and mask logits (T, Q + 1, H, W) of what is
shown, followed through all of them."""

InputConsumer = Callable[[Tensor], Tensor]
"""A consumer's own preprocessing: a native image (C, H, W) → what its model takes, (1, C, S, S)."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types that weights are written in, by what `--dtype` takes."""


@dataclass(frozen=True)
class VideoConsumer:
    """A consumer's own model that answers prompts in an image, and follows what it is shown through frames.

    Attributes:
        image: Answers boxes, points and masks to start from; its logits have its own side, (Q, h, w).
        follow: Follows.
        module: The model itself, whose tensors have the names of ours.
        masks: Whether what is shown by a mask is followed; if not, the logits are those of the boxes alone.
    """

    image: PromptConsumer
    follow: FrameConsumer
    module: nn.Module
    masks: bool = True


class Exporter(ABC):
    """One format, the tool that reads it, and how that tool loads it."""

    name: str
    """What ``--to`` takes."""
    suffix: str
    """How the file's name ends; empty where a folder is written."""
    package: str
    """The consumer's distribution."""
    also: tuple[str, ...] = ()
    """Other distributions that the gate needs."""
    requirement: str
    """What to install for the gate."""
    image_size: int
    """Input side S in pixels that the consumer runs at."""
    asks: Literal["boxes", "texts", "prompts", "prompts and frames"] = "boxes"
    """What the consumer is asked with."""
    merged: bool | None = True
    """Whether adapters are merged before anything is written; None: what is linear is, and the rest stays in."""
    dtypes: tuple[str, ...] = tuple(DTYPES)
    """Which of `DTYPES` the format can hold."""
    dtype: str = "fp32"
    """What the weights are written in."""
    samples: int = 8
    """Images that the gate compares on, unless told otherwise."""
    notes: tuple[str, ...] = ()
    """What a user of the consumer should know."""
    builder: Mapping[str, Any] = MappingProxyType({})
    """What the consumer's builder is told beside the file, where it must be told something."""
    weights: str | None = None
    """What the recipe names as the weights that the run began with."""

    def and_merged(self) -> Exporter:
        """The export that writes the merged model beside adapters.

        Raises:
            UserError: The format has no adapters.
        """
        raise UserError(f"--merge: '{self.name}' holds the merged model anyway: leave --merge out")

    def based_on(self, checkpoint: Path) -> Exporter:
        """The export that takes what our model does not have from a checkpoint in the consumer's layout.

        Raises:
            UserError: The format has nothing that our model does not have, or there is no such checkpoint.
        """
        raise UserError(f"--base {checkpoint}: '{self.name}' takes everything from the run: leave --base out")

    @abstractmethod
    def accepts(self, model: SegmentationModel) -> bool:
        """Whether the format can hold this model.

        Raises:
            UserError: It could, but for its sizes.
        """

    def for_model(self, model: SegmentationModel) -> Exporter:
        """The export of one model that `accepts` has taken, where the consumer is built after it."""
        return self

    def of_type(self, dtype: str) -> Exporter:
        """The same export with weights in another of `DTYPES`.

        Raises:
            UserError: The format cannot hold it.
        """
        if dtype not in self.dtypes:
            raise UserError(f"--dtype {dtype}: '{self.name}' holds {', '.join(self.dtypes)}")
        found = copy.copy(self)
        found.dtype = dtype
        return found

    def state(self, model: SegmentationModel) -> dict[str, Tensor]:
        """The model's tensors by name, on the CPU, in the type that is written."""
        dtype = DTYPES[self.dtype]
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        return {name: one.to(dtype) if one.is_floating_point() else one for name, one in state.items()}

    @abstractmethod
    def write(self, model: SegmentationModel, path: Path) -> None:
        """Write the file, or fill the folder, which is there and empty; adapters have been merged as `merged` says.

        Weights are already rounded to the type that is written, and held in fp32.
        """

    def read_input(self, path: Path) -> InputConsumer | None:
        """The consumer's own preprocessing, where it has one that is configured by what is written."""
        return None

    @abstractmethod
    def load(self, path: Path) -> BoxConsumer | TextConsumer | PromptConsumer | VideoConsumer:
        """Load the file with the consumer's own code, strictly.

        Returns:
            A consumer of what `asks` says.

        Raises:
            ImportError: The consumer is not installed.
            Exception: Whatever the consumer raises at a file that does not fit.
        """
