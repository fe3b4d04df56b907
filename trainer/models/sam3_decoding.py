"""SAM3's detector, composed from the submodules of transformers' Sam3Model: every layer's answer, and both halves.

Shapes: P prompts, T tokens of a prompt (text, exemplars, CLS), C channels, V = g² places of the coarsest features, Q
object queries, R rows of the decoder (presence token, queries, and in training the queries again), L decoder layers.
Masks are True where something is valid.
Sources: Carion et al. 2025 (SAM 3); divide and conquer is described in its section on training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.sam3.modeling_sam3 import inverse_sigmoid

from trainer.losses.sets import FactoredMasks, SetPrediction


class Detection:
    """One pass of the detector over some prompts.

    Args:
        model: Holds Sam3Model's submodules.
        recompute: Compute each layer a second time in the backward pass instead of keeping what is in it.
    """

    def __init__(self, model: nn.Module, recompute: bool) -> None:
        self.model: Any = model
        self.recompute = recompute and torch.is_grad_enabled()

    def run(
        self, levels: tuple[Tensor, ...], positions: Tensor, image_index: Tensor, prompt: Tensor, valid: Tensor
    ) -> SetPrediction:
        """Detect.

        Args:
            levels: Features of the images, (B, C, 4g, 4g), (B, C, 2g, 2g), (B, C, g, g).
            positions: (1, V, C) positional encoding of the last.
            image_index: (P,) the image of each prompt.
            prompt: (P, T, C) what is asked.
            valid: (P, T) bool.

        Returns:
            In training every layer's answer and the one-to-many half, else the last layer's.
        """
        many = self.model.training
        memory = levels[-1].flatten(2).transpose(1, 2)[image_index]
        mask = valid[:, None, None, :]
        for layer in self.model.detr_encoder.layers:
            memory = self._once(layer, memory, prompt, positions, mask)
        rows, boxes, presence = self._decode(memory, positions, prompt, mask, many)
        logits = self._once(self.model.dot_product_scoring, rows, prompt, valid)[..., 0]
        pixels, semantic = self._once(self._pixels, levels[0], levels[1], image_index, memory, prompt, mask)
        queries, offsets = self._mask_queries(rows[-1])
        half = self.model.detr_decoder.query_embed.num_embeddings

        def part(start: int, stop: int) -> tuple[Tensor, Tensor, FactoredMasks]:
            here = slice(start, stop)
            masks = FactoredMasks(queries[:, here], pixels, offsets[:, here])
            return logits[:, :, here], boxes[:, :, here], masks

        first, second = part(0, half), part(half, 2 * half)
        return SetPrediction(
            logits=first[0],
            boxes=first[1],
            presence=presence,
            masks=first[2],
            semantic=semantic,
            many=SetPrediction(logits=second[0], boxes=second[1], masks=second[2]) if many else None,
        )

    def _decode(
        self, memory: Tensor, positions: Tensor, prompt: Tensor, mask: Tensor, many: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normed rows (L, P, R − 1, C), boxes (L, P, R − 1, 4) and presence logits (L, P); L is 1 unless many."""
        decoder = self.model.detr_decoder
        count, copies = memory.shape[0], 2 if many else 1
        queries = decoder.query_embed.weight.repeat(copies, 1)
        rows = torch.cat([decoder.presence_token.weight, queries]).expand(count, -1, -1)
        reference = decoder.reference_points.weight.repeat(copies, 1).sigmoid().expand(count, -1, -1)
        found = []
        learnt = reference  # as the layer before predicted it: gradients reach that layer's head once more
        for layer in decoder.layers:
            rows = self._once(self._layer, layer, rows, reference, memory, positions, prompt, mask)
            normed = decoder.output_layer_norm(rows[:, 1:])
            shift = decoder.box_head(normed).float()
            boxes = (shift + inverse_sigmoid(learnt)).sigmoid()
            learnt = (shift + inverse_sigmoid(reference)).sigmoid()
            reference = learnt.detach()
            presence = decoder.presence_head(decoder.presence_layer_norm(rows[:, :1]))[:, 0, 0]
            if not self.model.training:  # as transformers; clamped in training, what is far off would never learn
                limit = decoder.clamp_presence_logit_max_val
                presence = presence.clamp(-limit, limit)
            found.append((normed, boxes, presence))
        kept = found if many else found[-1:]
        layers, boxes, presence = (torch.stack(part) for part in zip(*kept, strict=True))
        return layers, boxes, presence

    def _layer(
        self,
        layer: Any,
        rows: Tensor,
        reference: Tensor,
        memory: Tensor,
        positions: Tensor,
        prompt: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """One decoder layer: only the presence token and the first half attend to each other."""
        decoder = self.model.detr_decoder
        side = round(memory.shape[1] ** 0.5)
        place = decoder.ref_point_head(decoder.position_encoding.encode_boxes(reference))
        place = F.pad(place, (0, 0, 1, 0))  # none for the presence token
        bias = F.pad(self._bias(reference, side), (0, 0, 1, 0))  # none for it either
        own = 1 + decoder.query_embed.num_embeddings
        first = rows[:, :own]
        asking = first + place[:, :own]
        attended = layer.self_attn(query=asking, key=asking, value=first)[0]
        first = first + layer.self_attn_dropout(attended)
        rows = layer.self_attn_layer_norm(torch.cat([first, rows[:, own:]], dim=1))
        attended = layer.text_cross_attn(query=rows + place, key=prompt, value=prompt, attention_mask=mask)[0]
        rows = layer.text_cross_attn_layer_norm(rows + layer.text_cross_attn_dropout(attended))
        attended = layer.vision_cross_attn(
            query=rows + place, key=memory + positions, value=memory, attention_mask=bias.to(memory.dtype)
        )[0]
        rows = layer.vision_cross_attn_layer_norm(rows + layer.vision_cross_attn_dropout(attended))
        kind = rows.device.type  # where there is no autocast, graphs for export have none to switch off
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext():
            inside = layer.mlp(rows.float())  # in fp32, as in the official code
        out: Tensor = layer.mlp_layer_norm(rows + layer.mlp_dropout(inside))
        return out

    def _bias(self, boxes: Tensor, side: int) -> Tensor:
        """What attention to a place (P, heads, R − 1, side²) gains by where it lies from a box (P, R − 1, 4)."""
        decoder = self.model.detr_decoder
        ticks = torch.arange(side, device=boxes.device, dtype=boxes.dtype) / side
        gains = []
        for axis, embed in ((1, decoder.box_rpb_embed_y), (0, decoder.box_rpb_embed_x)):
            half = boxes[..., 2 + axis] / 2
            edges = torch.stack([boxes[..., axis] - half, boxes[..., axis] + half], dim=-1)
            away = 8 * (ticks[:, None] - edges[..., None, :])
            gains.append(embed(away.sign() * (away.abs() + 1).log2() / 3))  # log2(8) is 3
        rows, columns = gains
        both = (rows[..., :, None, :] + columns[..., None, :, :]).flatten(2, 3)
        return both.permute(0, 3, 1, 2).contiguous()

    def _pixels(
        self, fine: Tensor, middle: Tensor, image_index: Tensor, memory: Tensor, prompt: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (P, C, 4g, 4g) of the pixels, and the semantic mask's logits (P, 4g, 4g)."""
        head = self.model.mask_decoder
        normed = head.prompt_cross_attn_norm(memory)
        attended = head.prompt_cross_attn(query=normed, key=prompt, value=prompt, attention_mask=mask)[0]
        memory = memory + head.prompt_cross_attn_dropout(attended)
        side = middle.shape[-1] // 2
        coarse = memory.transpose(1, 2).unflatten(2, (side, side))
        pixels = head.pixel_decoder([fine[image_index], middle[image_index], coarse])
        semantic = head.semantic_projection(pixels)[:, 0]
        if torch.is_autocast_enabled(pixels.device.type):  # the last norm gives fp32: half of it is enough to keep
            pixels = pixels.to(torch.get_autocast_dtype(pixels.device.type))
        return pixels, semantic

    def _mask_queries(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (P, R − 1, C) for the pixel decoder's own channels, and offsets (P, R − 1).

        The mask head projects every pixel, then multiplies it with a query. Projecting the query back instead is the
        same product, and spares a map of (P, C, 4g, 4g).
        """
        head = self.model.mask_decoder
        queries = head.mask_embedder(rows)
        weight = head.instance_projection.weight[:, :, 0, 0]
        return queries @ weight.to(queries.dtype), queries @ head.instance_projection.bias.to(queries.dtype)

    def _once(self, function: Callable[..., Any], *given: Any) -> Any:
        """Call, keeping nothing for the backward pass but what was given, if that is wanted."""
        if self.recompute:
            return checkpoint(function, *given, use_reentrant=False)
        return function(*given)
