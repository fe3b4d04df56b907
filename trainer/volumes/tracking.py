"""SAM3's detector and tracker together: the slices of a volume as frames of a video.

The tracker and the rules that merge both are transformers' Sam3VideoModel; the detector in it is the one that was
tuned, asked just as it was trained. Two of transformers' clean-up steps fetch compiled code from the hub at run time
and are not used: duplicates are suppressed here instead, and small holes are left as they are.

Shapes: D slices, M detections, T tokens, C channels, h w the mask head's side, S the input's side, H W native size.
Source: Carion et al. 2025 (SAM 3), on detection and tracking in video.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_shards.errors import UserError
from trainer.models.sam3 import SAM3, SAM3Features, config_of
from trainer.models.weights import load_strictly, read_weights
from trainer.prompts.concepts import ConceptPrompts
from trainer.volumes.linking import SliceObjects, distinct

_PARTS = ("tracker_model", "tracker_neck")
"""What Sam3VideoModel has besides the detector."""


@dataclass(frozen=True)
class Tracked:
    """What was found of one term in the slices of a volume.

    Attributes:
        slices: One for each slice.
        numbers: For each slice (M,) int64 numbers of the objects, from 1, not without holes.
    """

    slices: list[SliceObjects]
    numbers: list[np.ndarray]


@dataclass(frozen=True)
class _Seen:
    """One encoded slice: the detector's features, and the ViT's tokens (1, g², C) for the tracker's own neck."""

    last_hidden_state: Tensor
    features: SAM3Features


class Detector(nn.Module):
    """Our detector where Sam3VideoModel has its own.

    Args:
        model: The detector.
        threshold: Confidence above which a detection counts.
        same: IoU above which two detections are the same object.
    """

    def __init__(self, model: SAM3, threshold: float, same: float) -> None:
        super().__init__()
        self.model, self.threshold, self.same = model, threshold, same

    def get_vision_features(self, pixel_values: Tensor) -> _Seen:
        """Encode a slice (1, 3, S, S)."""
        tokens: list[Tensor] = []
        backbone: Any = self.model.get_submodule("vision_encoder.backbone")
        hook = backbone.register_forward_hook(lambda module, given, found: tokens.append(found.last_hidden_state))
        try:
            features = self.model.encode(pixel_values)
        finally:
            hook.remove()
        return _Seen(tokens[0], features)

    def forward(self, vision_embeds: _Seen, text_embeds: tuple[Tensor, Tensor, str], attention_mask: None) -> Any:
        """Detect a term whose text has been read: M detections, as transformers' detector names its output."""
        known, valid, text = text_embeds
        first = torch.zeros(1, dtype=torch.int64, device=known.device)
        found = self.model.detect_tokens(vision_embeds.features, known, valid, first, ConceptPrompts(first, [text]))
        assert found.masks is not None and found.presence is not None
        confidences = found.confidence[0]
        queries = (confidences > self.threshold).nonzero()[:, 0]
        masks = found.masks.of(0, queries).float()
        seen = SliceObjects.encoded(0, (masks > 0).cpu().numpy(), confidences[queries].cpu().numpy())
        kept = torch.tensor(sorted(distinct(seen, self.same)), dtype=torch.int64, device=queries.device)
        centre, size = found.boxes[-1, :, queries[kept], :2].float(), found.boxes[-1, :, queries[kept], 2:].float()
        return SimpleNamespace(
            pred_logits=found.logits[-1, :, queries[kept]].float(),
            presence_logits=found.presence[-1][:, None].float(),
            pred_boxes=torch.cat([centre - size / 2, centre + size / 2], dim=-1),
            pred_masks=masks[kept][None],
        )


class Tracker:
    """Follows what a detector finds through the slices of a volume.

    Args:
        model: The detector.
        state: Weights of tracker and neck, as `tracker_weights` reads them.
        source: Where they come from: a folder's ``config.json`` says their sizes, else they are the released model's.
        threshold: Confidence above which a detection counts.
        begin: Confidence from which a detection begins an object.

    Raises:
        UserError: The weights do not fit.
    """

    def __init__(self, model: SAM3, state: Mapping[str, Tensor], source: str, threshold: float, begin: float) -> None:
        from transformers import Sam3VideoModel

        config = _config(model, source)
        same, config.det_nms_thresh = config.det_nms_thresh, 0.0
        config.score_threshold_detection, config.new_det_thresh = threshold, max(begin, threshold)
        config.fill_hole_area = 0
        self.model = model
        self.video = Sam3VideoModel(config)
        for name in _PARTS:
            part = {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
            load_strictly(getattr(self.video, name), part, source)
        self.video.detector_model = Detector(model, threshold, same)
        self.video.to(next(model.parameters()).device).eval()

    @torch.no_grad()
    def track(
        self, indices: Sequence[int], image: Callable[[int], Tensor], texts: Mapping[str, str]
    ) -> dict[str, Tracked]:
        """Find terms in neighbouring slices.

        Args:
            indices: Numbers of D slices along their axis, ascending.
            image: Reads one of them by its place in `indices`: (C, H, W).
            texts: What is asked for each term.

        Returns:
            By term; in the order of the slices.
        """
        from transformers.models.sam3_video.modeling_sam3_video import Sam3VideoInferenceSession

        device = next(self.model.parameters()).device
        session = Sam3VideoInferenceSession(inference_device=device, dtype=torch.float32)
        session.processed_frames = _Frames(self.model, len(indices), image)
        for term, text in texts.items():
            prompt = session.add_prompt(term)
            session.prompt_embeddings[prompt] = (*self.model.read([text]), text)
            session.prompt_attention_masks[prompt] = None
        sides = tuple(image(0).shape[-2:])
        found = {term: Tracked([], []) for term in texts}
        for frame in self.video.propagate_in_video_iterator(session):
            hidden = {*frame.suppressed_obj_ids, *session.hotstart_removed_obj_ids}
            for prompt, term in session.prompts.items():
                shown = [
                    number
                    for number in sorted(frame.obj_id_to_mask)
                    if number not in hidden and session.obj_id_to_prompt_id.get(number) == prompt
                ]
                objects = self._objects(indices[frame.frame_idx], frame, shown, sides)
                found[term].slices.append(objects)
                found[term].numbers.append(np.array(shown, dtype=np.int64) + 1)
        return found

    def _objects(self, index: int, frame: Any, shown: Sequence[int], sides: tuple[int, ...]) -> SliceObjects:
        """Objects of one term in one slice, at native size."""
        if not shown:
            return SliceObjects(index, (), np.zeros(0))
        logits = torch.cat([frame.obj_id_to_mask[number] for number in shown])
        masks = self.model.preprocessing.to_native(logits, *sides) > 0
        scores = [frame.obj_id_to_tracker_score.get(n, frame.obj_id_to_score.get(n, 0.0)) for n in shown]
        return SliceObjects.encoded(index, masks.cpu().numpy(), np.array([float(score) for score in scores]))


class _Frames:
    """Slices as a video that is read frame by frame: all at once would take 12 MB each."""

    def __init__(self, model: SAM3, count: int, image: Callable[[int], Tensor]) -> None:
        self._model, self._count, self._image = model, count, image

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: int) -> Tensor:
        device = next(self._model.parameters()).device
        return self._model.preprocessing.images([self._image(place)], device)[0]


def tracker_weights(source: str) -> tuple[dict[str, Tensor], str]:
    """Read the tracker that lies beside a detector.

    Args:
        source: A hub name, a file or a folder of Sam3VideoModel's weights.

    Returns:
        The tracker's weights, empty where there are none, and why then.

    Raises:
        UserError: Nothing there.
    """
    state = read_weights(source)
    # some hub files nest the neck, and transformers 5.23 writes the tracker's prefix twice
    nested = re.compile(rf"^tracker_model\.(?=({'|'.join(_PARTS)})\.)")
    found = {nested.sub("", key): t for key, t in state.items() if key.startswith(tuple(f"{p}." for p in _PARTS))}
    if found:
        return found, ""
    if any(key.startswith("tracker.") for key in state):
        return {}, f"{source} has the tracker in Meta's layout, which only transformers' own conversion can bring over"
    return {}, f"{source} holds no tracker (no tracker_model.*)"


def _config(model: SAM3, source: str) -> Any:
    """Sizes of the video model, whose own detector is made as small as can be, because ours takes its place."""
    from transformers import Sam3VideoConfig

    file = Path(source).expanduser() / "config.json"
    try:
        config = Sam3VideoConfig.from_json_file(str(file)) if file.is_file() else Sam3VideoConfig()
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: no sizes of a Sam3VideoModel ({error}): save the folder again") from error
    least = replace(
        model.shape, depth=1, text_depth=1, geometry_layers=1, encoder_layers=1, decoder_layers=1, queries=1
    )
    config.detector_config = config_of(least, model.preprocessing.image_size)
    config.image_size = model.preprocessing.image_size
    side = model.preprocessing.image_size // model.shape.patch
    config.tracker_config.memory_attention_rope_feat_sizes = [side, side]
    config.low_res_mask_size = model.mask_side
    return config
