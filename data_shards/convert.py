"""From one case to its samples.

Shapes: N slices of H rows and W columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from data_shards.errors import UserError
from data_shards.preprocessing import Stack, check_finite, cut
from data_shards.readers import Volume, read_mask, read_volume
from data_shards.sources import Source, file_sha256
from data_shards.spec import Hasher, Spec, TargetSpec
from data_shards.splits import SliceRule
from data_shards.triplet import Provenance, Target, Triplet


@dataclass
class Conversion:
    """The samples of one case.

    Attributes:
        source: The case's files.
        patient: Hash of the patient.
        volume: Hash of the case.
        rule: From the index of a slice to its split.
        image_sha256: Hash of the image's file, once read.
        mask_sha256: Hash of the mask's file, once read.
        dropped: Number of targets smaller than `min_area`, by term.
    """

    source: Source
    patient: str
    volume: str
    rule: SliceRule
    image_sha256: str = ""
    mask_sha256: str = ""
    dropped: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, source: Source, rule: SliceRule, hasher: Hasher) -> Conversion:
        """Name a case by its hashes."""
        return cls(source, hasher("patient", source.patient), hasher("volume", source.id), rule)

    def hash_files(self) -> None:
        """Fill in the hashes of the files."""
        self.image_sha256 = file_sha256(self.source.image)
        same = self.source.mask == self.source.image
        self.mask_sha256 = self.image_sha256 if same else file_sha256(self.source.mask)

    def wanted(self, spec: Spec, count: int) -> list[tuple[int, str]]:
        """Return (slice, split) of those slices of a stack of `count` that the spec and its split select."""
        chosen = range(count)[spec.slices.start : spec.slices.stop : spec.slices.step]
        pairs = [(number, self.rule(number)) for number in chosen]
        return [(number, split) for number, split in pairs if split is not None]

    def read(self, spec: Spec) -> tuple[Volume, Volume]:
        """Read image and mask and check that they belong together and hold something.

        Raises:
            UserError: A file cannot be read, holds NaN, has no target, or the two differ in shape or place.
        """
        image, mask = self.source.image, self.source.mask
        volume, labels = read_volume(image, **spec.reader), read_mask(mask, **spec.reader)
        if volume.array.shape[:3] != labels.array.shape:
            raise UserError(
                f"{mask}: shape {labels.array.shape} (z, y, x) differs from {volume.array.shape[:3]} of its image "
                f"{image}: resample the mask onto the image, or correct the pairing in the spec"
            )
        apart = volume.apart(labels)
        if volume.spacing is not None and apart > min(volume.spacing) / 2:
            raise UserError(
                f"{mask}: lies elsewhere than its image {image}: their headers put the same voxel up to {apart:.1f} mm "
                "apart; resample the mask onto the image, or, if only its header is wrong, give it that of the image"
            )
        check_finite(volume.array, str(image))
        check_finite(labels.array, str(mask))
        if not any(present(spec.targets, plane) for plane in labels.array):
            terms = ", ".join(f"'{target.term}'" for target in spec.targets)
            raise UserError(
                f"{mask}: the mask holds none of {terms}: correct their values in the spec or leave the case out"
            )
        return volume, labels

    def samples(self, spec: Spec, volume: Volume, labels: Volume) -> Iterator[tuple[str, Triplet | None]]:
        """Yield (split, sample) slice by slice; None for a slice that is not kept."""
        self.hash_files()
        rescale = spec.intensity.fit(volume.array)
        stack, masks = cut(volume, spec.slices.axis), cut(labels, spec.slices.axis).slices
        for number, split in self.wanted(spec, len(masks)):
            targets, looked_for = self._targets(spec, masks[number])
            if not targets and spec.slices.keep == "nonempty":
                yield split, None
                continue
            yield (
                split,
                Triplet(
                    key=f"{spec.dataset}-{self.volume}-{spec.slices.axis[0]}{number:05d}",
                    image=np.ascontiguousarray(rescale.apply(stack.slices[number])),
                    targets=tuple(targets),
                    looked_for=looked_for,
                    provenance=self._provenance(spec, stack, number, rescale.provenance()),
                ),
            )

    def _targets(self, spec: Spec, mask: np.ndarray) -> tuple[list[Target], tuple[str, ...]]:
        """Return the targets of a slice (H, W), and the terms that count as looked for in it."""
        found, unsure = [], set()
        for target in present(spec.targets, mask):
            inside = _inside(target, mask)
            if int(inside.sum()) < spec.slices.min_area:
                self.dropped[target.term] += 1
                unsure.add(target.term)  # it is there: the slice is no negative of it
            else:
                found.append(Target.from_mask(inside, target.term, tuple(target.synonyms)))
        return found, tuple(target.term for target in spec.targets if target.term not in unsure)

    def _provenance(self, spec: Spec, stack: Stack, number: int, intensity: dict[str, object]) -> Provenance:
        return Provenance(
            dataset=spec.dataset,
            patient=self.patient,
            volume=self.volume,
            modality=spec.modality,
            source_sha256=self.image_sha256,
            axis=spec.slices.axis,
            slice_index=number,
            spacing=stack.spacing,
            slice_spacing=stack.slice_spacing,
            intensity=intensity,
        )


def present(targets: list[TargetSpec], mask: np.ndarray) -> list[TargetSpec]:
    """Return the targets with at least one pixel in a mask of any shape."""
    # Counting is several times faster than sorting, where labels are small whole numbers.
    if np.issubdtype(mask.dtype, np.integer) and mask.min() >= 0 and mask.max() < 2**16:
        values = np.flatnonzero(np.bincount(mask.ravel().astype(np.uint16, copy=False)))
    else:
        values = np.unique(mask)
    return [target for target in targets if _inside(target, values).any()]


def _inside(target: TargetSpec, mask: np.ndarray) -> np.ndarray:
    inside: np.ndarray = mask > target.above if target.above is not None else np.isin(mask, target.labels())
    return inside
