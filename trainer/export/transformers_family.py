"""What the families share in transformers: strict loading, image processors, and how promptable classes are asked.

Shapes: Q prompts of one image, C channels, S input side, h w side of the masks.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling
from transformers.utils import logging

from trainer.callbacks.panels import to_uint8
from trainer.export.base import InputConsumer, PromptConsumer, TextConsumer, VideoConsumer
from trainer.models import Preprocessing, SegmentationModel
from trainer.prompts import Prompts

WEIGHTS = "model.safetensors"
"""What transformers calls the file of weights."""
_STRETCHED = (
    "transformers' image processor takes 8-bit images and rounds to 8 bits when it resizes; the run brought other "
    "images to their own range first: stretch them to 0-255 before."
)
_OWN_RANGE = (
    "The run scaled each image by its own range, after resizing; transformers' image processor divides by 255: stretch "
    "an image that does not fill 0-255 before, or make pixel_values as preprocessing.json says."
)
_OWN_MEAN = (
    "The run took each image's own mean and deviation, and transformers' image processor takes ImageNet's: make "
    "pixel_values as preprocessing.json says."
)
_COARSE = (
    "Load with dtype=torch.float32, which keeps what was written: in {dtype} transformers computes prompts' "
    "coordinates in {dtype} too, and rounds them to some two pixels."
)


class Family(ABC):
    """One of our models as transformers has it.

    Args:
        model: The model; its adapters may still be in it.
    """

    asks: ClassVar[Literal["texts", "prompts", "prompts and frames"]] = "prompts"
    """What it is asked with, at most."""

    def __init__(self, model: SegmentationModel) -> None:
        self.model: Any = model

    @property
    def side(self) -> int:
        """Input side S in pixels."""
        return int(self.model.preprocessing.image_size)

    def check(self, to: str) -> None:  # noqa: B027 - most fit in every size
        """Refuse sizes that transformers' class cannot have.

        Args:
            to: The format, for the message.

        Raises:
            UserError: There is one.
        """

    @property
    @abstractmethod
    def architecture(self) -> type[PreTrainedModel]:
        """The class that holds all of the model."""

    @abstractmethod
    def config(self) -> Any:
        """Configuration of that class."""

    @abstractmethod
    def renamed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors under the names of that class; adapters beside the layers that they are on keep their places."""

    def base(self, state: Mapping[str, Tensor], layers: Collection[str]) -> Any:
        """A model of transformers in memory, for an adapter.

        Args:
            state: Its weights by transformers' names; what is not among them stays random.
            layers: What the adapter is on.

        Raises:
            ValueError: There is a weight that the class does not have.
        """
        made = self.architecture(self.config())
        unknown = made.load_state_dict(state, strict=False).unexpected_keys
        if unknown:
            raise ValueError(f"{len(unknown)} unknown ({', '.join(unknown[:3])})")
        return made.eval()

    @abstractmethod
    def processor(self) -> Any:
        """What makes a user's images and prompts into the model's input, as near to the run's as it can be set."""

    @abstractmethod
    def answering(self, model: Any, folder: Path | None) -> PromptConsumer | TextConsumer:
        """Ask a model of transformers about single images.

        Args:
            model: A model of `architecture`, or one that has its image parts.
            folder: What was exported, if the consumer reads more of it.
        """

    @abstractmethod
    def load(self, folder: Path) -> PromptConsumer | TextConsumer | VideoConsumer:
        """Load what was exported with transformers' own code.

        Raises:
            ValueError: A key is missing, or there is one that is not known.
        """

    def notes(self, dtype: str) -> tuple[str, ...]:
        """What a user of transformers should know, of weights that are written in one of `DTYPES`."""
        found = [_STRETCHED]
        scaling = self.model.preprocessing.scaling
        if scaling == "minmax":
            found[0] = _OWN_RANGE
        elif scaling == "zscore":
            found.append(_OWN_MEAN)
        if dtype != "fp32":
            found.append(_COARSE.format(dtype=dtype))
        return tuple(found)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep what transformers says while it loads off the screen: what matters of it is checked."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_strictly(kind: type[PreTrainedModel], folder: Path, others: Collection[str] = ()) -> Any:
    """Load a model in fp32, and demand that every key of it was there and no other.

    Its own word is not enough: transformers keeps quiet about keys that a class, or a part of it, is told to ignore.

    Args:
        kind: Its class.
        folder: Where it lies.
        others: Keys that may be there besides.

    Raises:
        ValueError: A key is missing, unknown or misshapen.
    """
    with quietly():
        model, told = kind.from_pretrained(folder, output_loading_info=True, local_files_only=True, dtype=torch.float32)
    with safe_open(folder / WEIGHTS, "pt") as file:
        there = set(file.keys())
    own = model.state_dict()
    loaded = {own[name].data_ptr() for name in own.keys() & there}
    absent = {name for name, tensor in own.items() if name not in there and tensor.data_ptr() not in loaded}
    found = {
        "missing": absent | set(told["missing_keys"]),
        "unknown": (there - own.keys() - set(others)) | (set(told["unexpected_keys"]) - set(others)),
        "misshapen": {str(one) for one in told["mismatched_keys"]},
    }
    wrong = [f"{len(keys)} {how} ({', '.join(sorted(keys)[:3])})" for how, keys in found.items() if keys]
    if wrong:
        raise ValueError("; ".join(wrong))
    return model.eval()


def image_settings(preprocessing: Preprocessing, mask_side: int) -> dict[str, Any]:
    """What a run's preprocessing is in the words of transformers' image processors.

    Args:
        preprocessing: The run's.
        mask_side: Side h = w of the masks that the model takes.
    """
    side = preprocessing.image_size
    square, masks = {"height": side, "width": side}, {"height": mask_side, "width": mask_side}
    if preprocessing.resize == "squash":
        found: dict[str, Any] = {"size": square, "mask_size": masks}
    else:
        found = {"size": {"longest_edge": side}, "pad_size": square}
        found |= {"mask_size": {"longest_edge": mask_side}, "mask_pad_size": masks}
    found["resample"] = getattr(PILImageResampling, preprocessing.interpolation.upper())
    if preprocessing.scaling == "minmax":
        return {**found, "do_normalize": False}
    if preprocessing.scaling == "centred":
        return {**found, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return {**found, "image_mean": list(IMAGENET_DEFAULT_MEAN), "image_std": list(IMAGENET_DEFAULT_STD)}


def read_images(folder: Path) -> InputConsumer:
    """The image processor that a folder names, on pictures of 8 bits."""
    with quietly():
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)

    def read(image: Tensor) -> Tensor:
        found: Tensor = processor(images=Image.fromarray(to_uint8(image.numpy())), return_tensors="pt")["pixel_values"]
        return found

    return read


def promptable(model: Any) -> PromptConsumer:
    """Ask SAM's or SAM2's class of transformers for one mask a prompt."""

    def logits(image: Tensor, asked: Sequence[Prompts]) -> list[Tensor]:
        seen = model.get_image_embeddings(image)
        return [_answer(model, seen, prompts) for prompts in asked]

    return logits


def _answer(model: Any, seen: Any, prompts: Prompts) -> Tensor:
    """Logits (Q, h, w); a mask to start from belongs to an image of its own, other prompts share theirs."""
    alone = prompts.masks is not None
    given = {"input_boxes": prompts.boxes, "input_points": prompts.points, "input_labels": prompts.labels}
    shaped = {name: one[:, None] if alone else one[None] for name, one in given.items() if one is not None}
    if prompts.masks is not None:
        shaped["input_masks"] = prompts.masks[:, None]
        many = len(prompts)
        seen = (
            [one.expand(many, -1, -1, -1) for one in seen] if isinstance(seen, list) else seen.expand(many, -1, -1, -1)
        )
    masks: Tensor = model(image_embeddings=seen, multimask_output=False, **shaped).pred_masks
    return masks.flatten(0, 2)
