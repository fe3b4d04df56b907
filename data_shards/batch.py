"""A batch of triplets: images at native size, targets flattened over the batch, each pointing at its image.

Shapes: B images, Q targets, A absent terms, C channels, H W native height and width of one image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from data_shards.triplet import Provenance, Target, Triplet

_ALIGNED = 64
"""Tensors begin at multiples of so many bytes in the block that a batch travels in."""


@dataclass(frozen=True)
class Skipped:
    """A sample that could not be read, and that the recipe allows to leave out.

    Attributes:
        position: Its position in the corpus.
        key: Its key.
        reason: What is wrong, on one line.
    """

    position: int
    key: str
    reason: str


@dataclass
class TripletBatch:
    """What a loader yields; resizing, channels and scaling are the model's business, on the device.

    Attributes:
        images: B tensors (C, H, W) at native dtype and size, C being 1 or 3.
        masks: Q tensors (H, W) uint8, 1 inside.
        image_index: (Q,) int64, the image of each target.
        boxes: (Q, 4) float32, tight (x0, y0, x1, y1) in native pixels.
        terms: Q clinical terms.
        keys: B sample keys.
        positions: B positions of the samples in their corpus.
        target_index: Q positions of the targets in their samples.
        provenances: B origins.
        repeats: B numbers: how often the sample was drawn before in this epoch.
        objects: Q numbers: targets of one clip with the same number are the same thing in different frames.
        absent_terms: A clinical terms that were looked for in an image and are not there.
        absent_index: (A,) int64, the image of each absent term.
        frames: Images of one clip; they follow each other. 1 for single images.
        anchors: For each clip the frame whose targets are followed through it.
        numbers: B numbers of the draws that the images come from: a clip's, or a sample's position.
        kinds: Q kinds of targets: ``semantic`` (all of the term in its image) or ``instance`` (one of several).
        synonyms: For each target the other names of its term.
        skipped: Samples that belong here and could not be read.
        counted: In training what the loss is divided by: images (of clips: clips) with a target that a batch of this
            optimiser step has on average, over all its batches on all ranks; damaged ones count too. Divided by their
            own number instead, images in a batch with few of them would count for more. None outside of a training.
    """

    images: list[Tensor]
    masks: list[Tensor]
    image_index: Tensor
    boxes: Tensor
    terms: list[str]
    keys: list[str]
    positions: list[int]
    target_index: list[int]
    provenances: list[Provenance]
    repeats: list[int] = field(default_factory=list)
    objects: list[int] = field(default_factory=list)
    absent_terms: list[str] = field(default_factory=list)
    absent_index: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    frames: int = 1
    anchors: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    synonyms: list[tuple[str, ...]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    counted: float | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def sizes(self) -> Tensor:
        """(Q, 2) native height and width of each target's image, on the CPU."""
        sizes = [self.images[i].shape[-2:] for i in self.image_index.tolist()]
        return torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2)

    @property
    def identities(self) -> list[tuple[int, int]]:
        """For each target (sample position, target position)."""
        images = self.image_index.tolist()
        return [(self.positions[i], t) for i, t in zip(images, self.target_index, strict=True)]

    @property
    def draws(self) -> list[tuple[int, ...]]:
        """What randomness may depend on, for each target: its identity, and the repeat where it is not the first."""
        repeats = [self.repeats[i] for i in self.image_index.tolist()] if self.repeats else [0] * len(self.masks)
        return [(*who, repeat) if repeat else who for who, repeat in zip(self.identities, repeats, strict=True)]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TripletBatch:
        """Move images and masks, in one copy; what is small and indexed by Python stays on the CPU."""
        tensors, place = [*self.images, *self.masks], torch.device(device)
        if all(_is_on(tensor, place) for tensor in tensors):
            return replace(self)
        block, places = _block_of(tensors)
        return self._in(block.to(place, non_blocking=non_blocking), places)

    def pin_memory(self) -> TripletBatch:
        """Pin what `to` moves, as one block: its copy to a GPU need not be waited for."""
        tensors = [*self.images, *self.masks]
        found = _one_block(tensors)
        if found is None:
            return self._in(*_pack(tensors, pinned=True))
        return self._in(found[0].pin_memory(), found[1])

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Say that a stream uses what lies on a GPU: the memory is given to nobody else before it has done so."""
        seen: set[int] = set()
        for tensor in (*self.images, *self.masks):
            storage = tensor.untyped_storage()._cdata
            if tensor.device.type != "cpu" and storage not in seen:
                seen.add(storage)
                tensor.record_stream(stream)

    def _in(self, block: Tensor, places: Sequence[_Place]) -> TripletBatch:
        """The batch with its images and masks as a block has them."""
        views = _views(block, places)
        return replace(self, images=views[: len(self.images)], masks=views[len(self.images) :])

    def by_term(self) -> TripletBatch:
        """The batch with each term of an image as one target, all of it: image by image, in order of appearance.

        A term's only semantic target is all of it; where there is none, or several, its targets together are. Other
        masks are not copied, and a batch that is like this already is given back.
        """
        rows_of: dict[tuple[int, str], list[int]] = {}
        for row, who in enumerate(zip(self.image_index.tolist(), self.terms, strict=True)):
            rows_of.setdefault(who, []).append(row)
        groups = dict(sorted(rows_of.items(), key=lambda item: item[0][0]))
        whole = "instance" not in self.kinds
        if whole and list(groups.values()) == [[row] for row in range(len(self.terms))]:
            return self
        images, terms = [image for image, _ in groups], [term for _, term in groups]
        things: dict[int, dict[str, int]] = {}  # of a clip: a term is the same thing in all of its frames
        for image, term in groups:
            here = things.setdefault(image // self.frames, {})
            here.setdefault(term, len(here))
        parts = [self._parts_of(rows) for rows in groups.values()]
        return replace(
            self,
            masks=[_union([self.masks[row] for row in rows]) for rows in parts],
            image_index=torch.tensor(images, dtype=torch.int64),
            boxes=torch.stack([_around(self.boxes[rows]) for rows in parts]),
            terms=terms,
            target_index=[min(self.target_index[row] for row in rows) for rows in groups.values()],
            objects=[things[image // self.frames][term] for image, term in groups],
            kinds=["semantic"] * len(groups),
            synonyms=[self.synonyms[rows[0]] for rows in groups.values()] if self.synonyms else [],
        )

    def _parts_of(self, rows: list[int]) -> list[int]:
        """Which of a term's targets make up all of it."""
        wholes = [row for row in rows if not self.kinds or self.kinds[row] == "semantic"]
        return wholes if len(wholes) == 1 else rows

    def __reduce__(self) -> Any:
        # On its way out of a worker each tensor costs a file and a connection, some 0.3 ms of the training's own time:
        # images and masks travel in one block, and what is small as plain arrays.
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        tensors = [*values.pop("images"), *values.pop("masks")]
        small = {name: value.detach().cpu().numpy() for name, value in values.items() if isinstance(value, Tensor)}
        return _unpack, (*_block_of(tensors), len(self.images), {**values, **small}, tuple(small))


@dataclass(frozen=True)
class Sample:
    """A triplet on its way into a batch.

    Attributes:
        position: Its position in the corpus.
        triplet: What was read.
        chosen: Positions of the targets that were chosen from it.
        repeat: How often it was drawn before in this epoch.
        objects: For each chosen target the number of the thing that it shows; None numbers them in order.
        absent: Terms chosen from those that were looked for and are not there.
        anchor: Of a clip's frame, which frame of the clip says what is followed.
        number: Number of the draw that it comes from; its position if None.
    """

    position: int
    triplet: Triplet
    chosen: tuple[int, ...]
    repeat: int = 0
    objects: tuple[int, ...] | None = None
    absent: tuple[str, ...] = ()
    anchor: int = 0
    number: int | None = None

    @property
    def targets(self) -> list[tuple[int, Target]]:
        """The chosen targets with their positions."""
        return [(index, self.triplet.targets[index]) for index in self.chosen]


Item = Sample | Skipped | tuple[Sample, ...]
"""What is put into batches: a sample, one that could not be read, or the frames of a clip."""


def collate(items: Sequence[Item], frames: int = 1) -> TripletBatch:
    """Put samples into a batch, in order.

    Args:
        items: The samples; clips of as many frames each, or single images.
        frames: How many frames a clip has.
    """
    skipped = [item for item in items if isinstance(item, Skipped)]
    clips = [item if isinstance(item, tuple) else (item,) for item in items if not isinstance(item, Skipped)]
    samples = [sample for clip in clips for sample in clip]
    targets = [(image, index, target) for image, s in enumerate(samples) for index, target in s.targets]
    boxes = [target.box for _, _, target in targets]
    absent = [(image, term) for image, sample in enumerate(samples) for term in sample.absent]
    return TripletBatch(
        images=[_to_tensor(sample.triplet.image) for sample in samples],
        masks=[torch.from_numpy(target.mask()) for _, _, target in targets],
        image_index=torch.tensor([image for image, _, _ in targets], dtype=torch.int64),
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        terms=[target.term for _, _, target in targets],
        keys=[sample.triplet.key for sample in samples],
        positions=[sample.position for sample in samples],
        target_index=[index for _, index, _ in targets],
        provenances=[sample.triplet.provenance for sample in samples],
        repeats=[sample.repeat for sample in samples],
        objects=[n for s in samples for n in (range(len(s.chosen)) if s.objects is None else s.objects)],
        absent_terms=[term for _, term in absent],
        absent_index=torch.tensor([image for image, _ in absent], dtype=torch.int64),
        frames=frames,
        anchors=[clip[0].anchor for clip in clips],
        numbers=[sample.position if sample.number is None else sample.number for sample in samples],
        kinds=[target.kind for _, _, target in targets],
        synonyms=[target.synonyms for _, _, target in targets],
        skipped=skipped,
    )


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Bring tensors of one device to the CPU in one copy: it is waited for once, not once for each."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return list(tensors)
    block, places = _block_of(tensors)
    return _views(block.cpu(), places)


def _union(masks: Sequence[Tensor]) -> Tensor:
    """Where any of some masks (H, W) is; one alone stays as it is."""
    first, *others = masks
    if not others:
        return first
    union = first.clone()
    for mask in others:  # one by one: stacked, a thousand nuclei would take a gigabyte
        union |= mask
    return union


def _around(boxes: Tensor) -> Tensor:
    """The box (4,) around boxes (N, 4) as (x0, y0, x1, y1)."""
    return torch.cat([boxes[:, :2].amin(dim=0), boxes[:, 2:].amax(dim=0)])


_Place = tuple[int, torch.dtype, tuple[int, ...], bool]
"""Where a tensor lies in a block: first byte, type, shape, and whether it lies there column by column."""


def _turned(tensor: Tensor) -> bool:
    """Whether a tensor lies column by column in memory, as decoded masks do: turning costs more than decoding."""
    return tensor.ndim == 2 and not tensor.is_contiguous() and tensor.t().is_contiguous()


def _is_on(tensor: Tensor, device: torch.device) -> bool:
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


def _block_of(tensors: Sequence[Tensor]) -> tuple[Tensor, list[_Place]]:
    """The block of bytes in which tensors lie already, or a new one with copies of them."""
    return _one_block(tensors) or _pack(tensors)


def _one_block(tensors: Sequence[Tensor]) -> tuple[Tensor, list[_Place]] | None:
    """The block of bytes that some tensors share, whole; None where they lie apart, or it holds much more than them."""
    if not tensors or len({tensor.untyped_storage()._cdata for tensor in tensors}) > 1:
        return None
    size = tensors[0].untyped_storage().nbytes()
    if size > sum(map(_room, tensors)) or not all(tensor.is_contiguous() or _turned(tensor) for tensor in tensors):
        return None
    places = [(int(t.storage_offset()) * t.itemsize, t.dtype, tuple(t.shape), _turned(t)) for t in tensors]
    first = tensors[0].t() if _turned(tensors[0]) else tensors[0]
    return first.flatten().view(torch.uint8).as_strided((size,), (1,), 0), places


def _room(tensor: Tensor) -> int:
    """Bytes that a tensor takes in a block."""
    return -(-tensor.nbytes // _ALIGNED) * _ALIGNED


def _pack(tensors: Sequence[Tensor], pinned: bool = False) -> tuple[Tensor, list[_Place]]:
    """Copy tensors into one block of bytes; in a loader's worker into one that the main process can read."""
    places: list[_Place] = []
    total = 0
    for tensor in tensors:
        places.append((total, tensor.dtype, tuple(tensor.shape), _turned(tensor)))
        total += _room(tensor)
    device = tensors[0].device if tensors else torch.device("cpu")
    if get_worker_info() is not None and total and device.type == "cpu":  # in other memory it would be copied again
        shared = torch.UntypedStorage._new_shared(total)
        block = torch.empty(0, dtype=torch.uint8).set_(shared)
    else:
        block = torch.empty(total, dtype=torch.uint8, device=device, pin_memory=pinned and total > 0)
    for view, tensor in zip(_views(block, places), tensors, strict=True):
        view.copy_(tensor)
    return block, places


def _views(block: Tensor, places: Sequence[_Place]) -> list[Tensor]:
    """The tensors in a block, none of them copied."""
    views = []
    for start, dtype, shape, turned in places:
        flat = block[start : start + math.prod(shape) * dtype.itemsize].view(dtype)
        views.append(flat.view(shape[::-1]).t() if turned else flat.view(shape))
    return views


def _unpack(
    block: Tensor, places: Sequence[_Place], images: int, values: dict[str, Any], tensors: Sequence[str]
) -> TripletBatch:
    views = _views(block, places)
    small = {name: torch.from_numpy(values[name]) for name in tensors}
    return TripletBatch(**{**values, **small, "images": views[:images], "masks": views[images:]})


def _to_tensor(image: np.ndarray) -> Tensor:
    channels_first = image[None] if image.ndim == 2 else np.moveaxis(image, -1, 0)
    # a copy, because an array decoded from a shard may not be written to, and a tensor may
    return torch.from_numpy(channels_first.copy(order="C"))
