"""From one case to its samples.

Shapes: N slices of H rows and W columns, cut into windows of h rows and w columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.drawings import Drawings, Found, Window, shrunk
from data_shards.errors import UserError
from data_shards.preprocessing import Axis, Rescale, Stack, check_finite, cut
from data_shards.readers import Drawing, Ground, Windowed, own_options, read_drawing, read_volume
from data_shards.sources import Source, files_sha256
from data_shards.spec import Hasher, Patches, Spec, TargetSpec
from data_shards.splits import SliceRule
from data_shards.triplet import Provenance, Target, Triplet

WITHOUT_TARGET = "slices without a target"
"""Why slices are left out that hold nothing."""
_MOST_UNNAMED = 16
"""Values of one mask that are told one by one, if no target takes them."""


@dataclass
class Conversion:
    """The samples of one case.

    Attributes:
        source: The case's files.
        patient: Hash of the patient.
        volume: Hash of the case.
        rule: From the index of a slice to its split.
        mask_names: Hash of the names of the masks and of their files, by which targets ask for them.
        image_sha256: Hash of the image's files, once read.
        mask_sha256: Hash of the masks' files, once read; empty if there are none.
        expected: Number of slices or windows that `samples` yields, once it is known.
        dropped: Number of targets left out because they are small or at the border, by term.
        left_out: Number of slices, cases or mask values left out, by the reason.
    """

    source: Source
    patient: str
    volume: str
    rule: SliceRule
    mask_names: str = ""
    image_sha256: str = ""
    mask_sha256: str = ""
    expected: int | None = None
    dropped: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, source: Source, rule: SliceRule, hasher: Hasher) -> Conversion:
        """Name a case by its hashes."""
        names = [f"{name}/{path.name}" for name in sorted(source.masks) for path in source.masks[name]]
        patient, volume = hasher("patient", source.patient), hasher("volume", source.id)
        return cls(source, patient, volume, rule, hasher("names", "\n".join(names)))

    def hash_files(self) -> None:
        """Fill in the hashes of the files."""
        self.image_sha256 = files_sha256(self.source.image_files)
        masks = self.source.mask_files
        same = masks == [self.source.image]
        self.mask_sha256 = self.image_sha256 if same else files_sha256(masks) if masks else ""

    def size(self) -> int:
        """Return the bytes of the image's files."""
        return sum(path.stat().st_size for path in self.source.image_files)

    def stamp(self) -> list[list[int]]:
        """Return size and time of change of every file: unchanged, they need not be hashed again."""
        status = [path.stat() for path in (*self.source.image_files, *self.source.mask_files)]
        return [[item.st_size, item.st_mtime_ns] for item in status]

    def record(self) -> dict[str, Any]:
        """Return what a manifest says of the case, as JSON: hashes, no identifier and no path."""
        found: dict[str, Any] = {
            "volume": self.volume,
            "patient": self.patient,
            "split": self.source.split,
            "image_sha256": self.image_sha256,
            "mask_sha256": self.mask_sha256,
            "mask_names": self.mask_names,
        }
        if self.source.looked_for is not None:
            found["looked_for"] = sorted(self.source.looked_for)
        return found

    def samples(self, spec: Spec) -> Iterator[tuple[str, Triplet | None]]:
        """Read the case and yield (split, sample) slice by slice; None for one that is not kept.

        Raises:
            UserError: A file cannot be read, holds NaN, has no target, or image and mask differ in shape or place.
        """
        self.hash_files()
        case = _Case(spec, self)
        self.expected = len(case.places)
        yield from case.samples()


class _Case:
    """A case that was read, and cut as a spec says."""

    def __init__(self, spec: Spec, conversion: Conversion) -> None:
        self.spec, self.conversion, source = spec, conversion, conversion.source
        self.image = read_volume(source.image, **own_options(source.image, "image", spec.reader))
        self._check_large()
        check_finite(self.image.array, str(source.image))
        self.axis: Axis = "axial" if self.image.flat else spec.slices.axis
        self.stack: Stack = cut(self.image, self.axis)
        self.rescale: Rescale = spec.intensity.fit(self.image.array)
        parts = {name: [self._read(path) for path in paths] for name, paths in source.masks.items()}
        self.drawings = Drawings(parts, self.image.array.shape[:3], self.axis)
        self.targets = [
            target
            for target in spec.targets
            if (source.looked_for is None or target.term in source.looked_for) and self.drawings.looked_for(target)
        ]
        with self._naming_the_masks():
            self.small = self._small()
            unnamed = self.drawings.unnamed(spec.targets)
            for target in self.targets:
                self.drawings.check(target)
        height, width = self.stack.slices.shape[1:3]
        self.windows = _windows(height, width, spec.patches)
        self.places = self._places()
        if not self.places:
            conversion.left_out["cases without a slice that 'slices' and 'split' select"] += 1
        for name, values in unnamed.items():
            mask = f"masks{f' {name!r}' if name else ''}"
            if len(values) > _MOST_UNNAMED:
                conversion.left_out[
                    f"{mask} with more than {_MOST_UNNAMED} values that no target takes: grey levels?"
                ] += 1
                continue
            for value in values:
                conversion.left_out[f"{mask} with the value {value}, which no target takes"] += 1

    def samples(self) -> Iterator[tuple[str, Triplet | None]]:
        """Yield (split, sample); None for a place that is not kept."""
        found = [self._targets(number, window) for number, window, _ in self.places]
        skipped = not any(targets or unsure for targets, unsure in found) and self._is_empty() and self._is_left_out()
        everything = self.spec.slices.keep == "all" and not skipped
        kept = [everything or bool(targets) for targets, _ in found]
        keys = [self._key(number, window) for number, window, _ in self.places]
        for place, (targets, unsure) in enumerate(found):
            number, window, split = self.places[place]
            if not kept[place]:
                self.conversion.left_out[WITHOUT_TARGET] += 1
                yield split, None
                continue
            top, left, height, width = window
            pixels = self.stack.slices[number, top : top + height, left : left + width]
            yield (
                split,
                Triplet(
                    key=keys[place],
                    image=np.ascontiguousarray(self.rescale.apply(pixels)),
                    targets=tuple(targets),
                    looked_for=tuple(target.term for target in self.targets if target.term not in unsure),
                    provenance=self._provenance(place, kept, keys),
                ),
            )

    def _check_large(self) -> None:
        """Raise if an image that does not fit into the memory would have to be read whole."""
        if not isinstance(self.image.array, Windowed):
            return
        image, (height, width) = self.conversion.source.image, self.image.array.shape[1:3]
        if self.spec.patches is None:
            raise UserError(
                f"{image}: has {width} x {height} pixels: cut it by patches: {{size: 1024}}, or take a smaller level "
                "by reader: {level: 1}"
            )
        if self.spec.intensity.kind not in ("rgb", "none"):
            raise UserError(f"{image}: is too large for intensity '{self.spec.intensity.kind}': say kind: rgb or none")

    def _read(self, path: Path) -> Drawing:
        """Read one mask file and check that it lies on the image."""
        source, spec = self.conversion.source, self.spec
        drawing = read_drawing(path, Ground(source.image, self.image), **own_options(path, "mask", spec.reader))
        if drawing.volume is None:
            return drawing
        grid, image = drawing.volume, self.image
        if grid.array.shape[:3] != image.array.shape[:3]:
            raise UserError(
                f"{path}: shape {grid.array.shape[:3]} (z, y, x) differs from {image.array.shape[:3]} of its image "
                f"{source.image}: resample the mask onto the image, or correct the pairing in the spec"
            )
        apart = image.apart(grid)  # 0 where either does not say where it is
        if apart and apart > np.linalg.norm(image.affine[:3, :3], axis=0).min() / 2:  # type: ignore[index]
            raise UserError(
                f"{path}: lies elsewhere than its image {source.image}: their headers put the same voxel up to "
                f"{apart:.1f} mm apart; resample the mask onto the image, or, if only its header is wrong, give it "
                "that of the image"
            )
        check_finite(grid.array, str(path))
        return drawing if any(target.takes_background() for target in spec.targets) else shrunk(drawing)

    def _places(self) -> list[tuple[int, Window, str]]:
        """Return (slice, window, split) of all that the spec and its split select."""
        slices = self.spec.slices
        numbers = range(len(self.stack.slices))[slices.start : slices.stop : slices.step]
        chosen = [(number, self.conversion.rule(number)) for number in numbers]
        return [(number, window, split) for number, split in chosen if split is not None for window in self.windows]

    def _small(self) -> set[tuple[str, tuple[int, int] | None]]:
        """Return (term, instance) of those with fewer than `min_voxels` voxels in the whole case."""
        least = self.spec.slices.min_voxels
        if least <= 1:
            return set()
        return {
            (target.term, identity)
            for target in self.targets
            for identity, count in self.drawings.voxels(target).items()
            if count < least
        }

    def _targets(self, number: int, window: Window) -> tuple[list[Target], set[str]]:
        """Return the targets in a window of a slice, and the terms that are there but have none that is kept."""
        kept: list[Target] = []
        unsure: set[str] = set()
        for target in self.targets:
            with self._naming_the_masks():
                found = self.drawings.find(target, number, window)
            good = [item for item in found if self._is_kept(target, item)]
            self.conversion.dropped[target.term] += len(found) - len(good)
            if not good and (found or self.drawings.is_unread(target)):
                unsure.add(target.term)  # it is there: the slice is no negative of it
            kept += [Target.from_mask(item.mask, target.term, tuple(target.synonyms), item.kind) for item in good]
        return kept, unsure

    def _is_kept(self, target: TargetSpec, found: Found) -> bool:
        slices, mask = self.spec.slices, found.mask
        if int(mask.sum()) < slices.min_area or (target.term, found.identity) in self.small:
            return False
        edges = (mask[0], mask[-1], mask[:, 0], mask[:, -1])
        return slices.border == "keep" or not any(edge.any() for edge in edges)

    def _is_empty(self) -> bool:
        """Whether the masks hold none of the targets, also in slices that are not asked for."""
        return not any(self.drawings.voxels(target)[None] for target in self.targets)

    def _is_left_out(self) -> bool:
        """Whether a case that holds none of the targets is left out; if not, it is a negative.

        Raises:
            UserError: It is a mistake. A picture, and a volume of which every slice is kept, may hold nothing; but not
                a file that only lists what was drawn, and lists nothing of what was asked for.
        """
        source = self.conversion.source
        if source.no_target == "skip":
            self.conversion.left_out["cases without any of the targets"] += 1
            return True
        may_be_empty = source.no_target is None and (self.image.flat or self.spec.slices.keep == "all")
        if source.no_target == "empty" or not source.mask_files or (may_be_empty and self.targets):
            return False
        terms = ", ".join(f"'{target.term}'" for target in self.spec.targets)
        raise UserError(
            f"{self._mask_name()}: the mask holds none of {terms} ({self.drawings.content()}): correct the targets in "
            "the spec, or say by no_target what that means"
        )

    @contextmanager
    def _naming_the_masks(self) -> Iterator[None]:
        """Say in which files a mistake is that shows only in what was read from them."""
        try:
            yield
        except UserError as error:
            raise UserError(f"{self._mask_name()}: {error}") from None

    def _mask_name(self) -> str:
        return ", ".join(map(str, self.conversion.source.mask_files[:3])) or str(self.conversion.source.image)

    def _key(self, number: int, window: Window) -> str:
        letter = "i" if self.image.flat else self.axis[0]
        patch = "" if self.spec.patches is None else f"-y{window[0]:05d}x{window[1]:05d}"
        return f"{self.spec.dataset}-{self.conversion.volume}-{letter}{number:05d}{patch}"

    def _neighbour(self, place: int, step: int, kept: Sequence[bool], keys: Sequence[str]) -> str | None:
        """Return the key of the next slice up or down, if it is stored in the same split."""
        other = place + step * len(self.windows)
        if self.image.flat or not 0 <= other < len(self.places) or not kept[other]:
            return None
        (here, _, mine), (there, _, split) = self.places[place], self.places[other]
        return keys[other] if split == mine and there - here == step * self.spec.slices.step else None

    def _provenance(self, place: int, kept: Sequence[bool], keys: Sequence[str]) -> Provenance:
        number, window, _ = self.places[place]
        conversion, flat = self.conversion, self.image.flat
        unit = "patient" if conversion.source.patient_known else "image" if flat else "series"
        return Provenance(
            dataset=self.spec.dataset,
            patient=conversion.patient,
            volume=conversion.volume,
            modality=self.spec.modality,
            source_sha256=conversion.image_sha256,
            axis="" if flat else self.axis,
            slice_index=None if flat and len(self.stack.slices) == 1 else number,
            spacing=self.stack.spacing,
            slice_spacing=None if flat else self.stack.slice_spacing,
            intensity=self.rescale.provenance(),
            previous=self._neighbour(place, -1, kept, keys),
            next=self._neighbour(place, 1, kept, keys),
            patch=None if self.spec.patches is None else window[:2],
            split_unit=unit,
        )


def _windows(height: int, width: int, patches: Patches | None) -> list[Window]:
    """Return the windows over an image: all of it, or those that slide; the last ones move inwards."""
    if patches is None:
        return [(0, 0, height, width)]
    size, stride = patches.size, patches.stride or patches.size

    def starts(length: int) -> list[int]:
        last = max(0, length - size)
        return [*range(0, last, stride), last]

    return [(y, x, min(size, height), min(size, width)) for y in starts(height) for x in starts(width)]
