"""MedSAM's and Meta's layout, as `segment-anything` and MedSAM's own inference script read it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from trainer.export.base import BoxConsumer, Exporter
from trainer.models import MedSAM, SegmentationModel
from trainer.models.medsam import ORIGINAL_SIZE, VARIANTS, to_original


class MedSAMExporter(Exporter):
    """A flat ``.pth`` under the original names; the consumer is the model that `segment_anything` builds."""

    name = "segment-anything"
    suffix = ".pth"
    package = "segment-anything"
    requirement = "segment-anything==1.0"
    image_size = ORIGINAL_SIZE
    notes = (
        "What the weights expect of an image is in FILE.preprocessing.json and not in the file: MedSAM's script "
        "squashes to 1024 px and scales to [0, 1], SamPredictor pads and standardises; use what they learnt with.",
    )

    def accepts(self, model: SegmentationModel) -> bool:
        """Whether it is a MedSAM of a shape that the consumer can build."""
        return isinstance(model, MedSAM) and model.shape in VARIANTS.values()

    def write(self, model: SegmentationModel, path: Path) -> None:
        """Write the flat state dict; positions learnt at another side are interpolated to the consumer's."""
        if model.preprocessing.image_size != self.image_size:
            model = model.at_size(self.image_size)
        torch.save(to_original(self.state(model)), path)

    def load(self, path: Path) -> BoxConsumer:
        """Load the file into the consumer's model of its width."""
        from segment_anything import sam_model_registry

        state = torch.load(path, map_location="cpu", weights_only=True)
        width = len(state["image_encoder.patch_embed.proj.weight"])
        (variant,) = (name for name, shape in VARIANTS.items() if shape.width == width)
        consumer = sam_model_registry[variant]()
        consumer.load_state_dict(state, strict=True)
        consumer.eval()

        def logits(image: Tensor, boxes: Tensor) -> Tensor:
            sparse, dense = consumer.prompt_encoder(points=None, boxes=boxes, masks=None)
            masks, _ = consumer.mask_decoder(
                image_embeddings=consumer.image_encoder(image),
                image_pe=consumer.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )
            found: Tensor = masks[:, 0]
            return found

        return logits
