"""Terms instead of prompts: SAM3 is asked for each of them in an image or a slice, and its instances are united.

Shapes: K terms, D slices, H W native height and width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pycocotools import mask as coco_mask

from data_shards.batch import TripletBatch
from data_shards.dataset import ShardDataset
from trainer.evaluation.answers import Precision
from trainer.evaluation.cases import Part, read_image
from trainer.modules.sam3 import SAM3Module


@torch.no_grad()
def find(
    module: SAM3Module, shards: ShardDataset, position: int, terms: Sequence[str], precision: Precision
) -> np.ndarray:
    """Ask for K terms in an image, which is encoded once: (K, H, W) bool.

    What counts is every instance whose confidence reaches the module's threshold, as in ``trainer predict``; where none
    does, the mask is empty.
    """
    image = read_image(shards, position)
    batch = TripletBatch(
        images=[image],
        masks=[],
        image_index=torch.zeros(0, dtype=torch.int64),
        boxes=torch.zeros(0, 4),
        terms=[],
        keys=[shards.index.key(position)],
        positions=[position],
        target_index=[],
        provenances=[shards[position].provenance],
    )
    device = next(module.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        found = module.instances(batch, [list(terms)])
    masks = [one.masks.any(0).cpu().numpy() for one in found]
    return np.stack(masks).astype(bool)


def find_in_slices(
    module: SAM3Module, part: Part, terms: Sequence[str], precision: Precision
) -> list[list[dict[str, object]]]:
    """Ask for K terms in every slice of a part: for each its D masks, as COCO's run lengths."""
    found: list[list[dict[str, object]]] = [[] for _ in terms]
    for position in part.whole.positions[part.first : part.last + 1]:
        for mine, mask in zip(found, find(module, part.whole.shards, position, terms, precision), strict=True):
            mine.append(coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)))
    return found
