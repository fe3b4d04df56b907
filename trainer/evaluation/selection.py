"""Which cases of a set are evaluated, and which objects are asked for in them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from trainer.evaluation.cases import ImageCase, SequenceCase, Thing, evenly, image_cases, sequence_cases, things_of
from trainer.evaluation.protocol import SetSpec

Object = tuple[str, str, int]
"""Case, term, and position of the target in its image (−1 for all of a term, in an image or a volume)."""


@dataclass(frozen=True)
class Selected:
    """The cases of a set that are evaluated.

    Attributes:
        spec: The set.
        shards: Its folder.
        images: Its images, of a set of images.
        sequences: Its volumes or videos, each with the objects that are followed.
        pictures: Objects that are kept as pictures.
        left_out: Objects that cannot be followed, as (case, term).
    """

    spec: SetSpec
    shards: ShardDataset
    images: list[ImageCase]
    sequences: list[tuple[SequenceCase, list[Thing]]]
    pictures: list[Object]
    left_out: list[tuple[str, str]]

    @property
    def cases(self) -> int:
        """Number of images, volumes or videos."""
        return len(self.images) + len(self.sequences)

    @property
    def objects(self) -> set[Object]:
        """What is asked for in these cases."""
        found = {(case.key, thing.term, -1) for case, things in self.sequences for thing in things}
        return found | {one for image in self.images for one in self.in_image(image)}

    def in_image(self, image: ImageCase) -> list[Object]:
        """What is asked for in an image."""
        targets = self.shards.index.targets(image.position)
        if self.spec.by_term:
            return [(image.key, term, -1) for term in dict.fromkeys(targets[place][0] for place in image.targets)]
        return [(image.key, targets[place][0], place) for place in image.targets]


def select(spec: SetSpec, limit: int | None, pictures: int, where: str) -> Selected:
    """Choose the cases of a set; no image is read.

    Args:
        spec: The set.
        limit: Most images, volumes or videos, besides the set's own limit.
        pictures: How many objects are kept as pictures.
        where: What messages name.

    Raises:
        UserError: The folder is missing, or the set has no cases.
    """
    limits = [bound for bound in (spec.limit, limit) if bound is not None]
    most = min(limits) if limits else None
    try:
        shards = ShardDataset(spec.folder)
        if spec.kind == "2d":
            images = image_cases(shards.index, spec.terms, most)
            found = Selected(spec, shards, images, [], [], [])
            return replace(found, pictures=[found.in_image(image)[0] for image in evenly(images, pictures)])
        sequences, left_out = [], []
        for case in sequence_cases(shards.index, spec.terms, most):
            things, without = things_of(case, spec.kind, spec.extent == "volume")
            left_out += [(case.key, term) for term in without]
            if things:
                sequences.append((case, things))
    except UserError as error:
        raise UserError(f"{where}: set '{spec.title}': {error}") from None
    if not sequences:
        raise UserError(
            f"{where}: set '{spec.title}': every object of it is in one slice alone, so there is nothing to follow: "
            "kind 2d takes these, or set extent to volume"
        )
    followed = [(case.key, thing.term, -1) for case, things in sequences for thing in things]
    return Selected(spec, shards, [], sequences, evenly(followed, pictures), left_out)
