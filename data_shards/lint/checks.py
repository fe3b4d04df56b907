"""The checks that look at one sample: its masks, its terms and its pixels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from data_shards.lint.findings import Problem, sample_check
from data_shards.lint.sample import Outline, Sample
from data_shards.triplet import Target

TINY = 10
"""Pixels below which a target is tiny."""
_WHOLE = 0.98
"""Share of the image from which a mask covers nearly all of it."""
_NOTHING = 0.01
"""Share of an image's range within which values are all the same."""
_FEW_LEVELS = 8
"""Values that an 8-bit picture has at least; label maps and masks have fewer."""
_MOSTLY_ONE = 0.99
"""Share of one value from which a picture is nearly empty, and has few values for that reason."""


def _sound(sample: Sample) -> Iterator[tuple[int, Target, Outline, tuple[int, int, int, int]]]:
    """Yield the targets whose masks can be read and are not empty: number, target, outline, tight box."""
    for number, (target, outline) in enumerate(zip(sample.triplet.targets, sample.outlines, strict=True)):
        if outline.box is not None:
            yield number, target, outline, outline.box


@sample_check("damaged-mask", "error", "The run lengths of a mask cannot be read.")
def damaged_mask(sample: Sample) -> Iterator[Problem]:
    """Look for run lengths that do not fill the image."""
    for number, outline in enumerate(sample.outlines):
        if outline.damage:
            yield Problem(f"{outline.damage}: write the sample again", number)


@sample_check("empty-mask", "error", "A target has a mask without a pixel.")
def empty_mask(sample: Sample) -> Iterator[Problem]:
    """Look for masks with nothing in them."""
    for number, (target, outline) in enumerate(zip(sample.triplet.targets, sample.outlines, strict=True)):
        if outline.box is None and not outline.damage:
            message = f"the mask of '{target.term}' is empty: drop the target, and keep its term in looked_for"
            yield Problem(message, number, 0)


@sample_check("wrong-box", "error", "A target's box is not the tight box of its mask.")
def wrong_box(sample: Sample) -> Iterator[Problem]:
    """Compare each box with its mask."""
    for number, target, _, box in _sound(sample):
        if box != target.box:
            message = f"the box of '{target.term}' is {target.box}, that of its mask {box}: make it from the mask"
            yield Problem(message, number, max(abs(a - b) for a, b in zip(box, target.box, strict=True)))


@sample_check("wrong-area", "error", "A target's area is not that of its mask.")
def wrong_area(sample: Sample) -> Iterator[Problem]:
    """Compare each area with its mask."""
    for number, target, outline, _ in _sound(sample):
        if outline.area != target.area:
            message = f"the area of '{target.term}' is {target.area} px, that of its mask {outline.area}"
            yield Problem(f"{message}: make it from the mask", number, target.area)


@sample_check("degenerate-box", "warning", "A target's box is 1 px wide or high: no prompt can be made from it.")
def degenerate_box(sample: Sample) -> Iterator[Problem]:
    """Look for boxes that are lines or points."""
    for number, target, _, (x0, y0, x1, y1) in _sound(sample):
        if min(x1 - x0, y1 - y0) == 0:
            message = f"the box of '{target.term}' is {x1 - x0 + 1} x {y1 - y0 + 1} px: raise 'min_area' in the spec"
            yield Problem(message, number, 1)


@sample_check("tiny-target", "note", f"A target has fewer than {TINY} px.")
def tiny_target(sample: Sample) -> Iterator[Problem]:
    """Look for masks of few pixels."""
    for number, target, outline, (x0, y0, x1, y1) in _sound(sample):
        if outline.area < TINY and min(x1 - x0, y1 - y0) > 0:
            message = f"'{target.term}' has {outline.area} px: raise 'min_area' in the spec if it is no use"
            yield Problem(message, number, outline.area)


@sample_check("whole-image-mask", "warning", "A mask covers (nearly) the whole image.")
def whole_image_mask(sample: Sample) -> Iterator[Problem]:
    """Look for masks that leave nothing out; a window of a larger image may well lie inside of one thing."""
    if sample.triplet.provenance.patch is not None:
        return
    pixels = sample.image.shape[0] * sample.image.shape[1]
    for number, target, outline, _ in _sound(sample):
        if outline.area >= _WHOLE * pixels:
            share = outline.area / pixels
            message = f"'{target.term}' covers {share:.1%} of the image: is its label that of the background?"
            yield Problem(message, number, share)


@sample_check("mask-on-nothing", "warning", "A mask lies where the image is empty: constant background, no edge in it.")
def mask_on_nothing(sample: Sample) -> Iterator[Problem]:
    """Look for masks under which, and around which, the image has its least or its greatest value and nothing else."""
    pixels = sample.pixels
    if pixels.constant:
        return
    margin = _NOTHING * (pixels.high - pixels.low)
    for number, target, outline, box in _sound(sample):
        if outline.area >= TINY and _is_empty(_around(sample.image, box), pixels.low, pixels.high, margin):
            message = f"under and around '{target.term}' the image is empty: is the mask shifted, or of another image?"
            yield Problem(message, number, outline.area)


def _around(image: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """Return the part of an image in a box, and a quarter of its sides around it."""
    x0, y0, x1, y1 = box
    across, down = max(3, (x1 - x0 + 1) // 4), max(3, (y1 - y0 + 1) // 4)
    return image[max(0, y0 - down) : y1 + 1 + down, max(0, x0 - across) : x1 + 1 + across]


def _is_empty(part: np.ndarray, low: float, high: float, margin: float) -> bool:
    """Whether a part of an image has nothing but its background, in all channels."""
    # A few pixels tell nearly always that there is something.
    rows, columns = max(1, part.shape[0] // 8), max(1, part.shape[1] // 8)
    return all(_is_flat(some, low, high, margin) for some in (part[::rows, ::columns], part))


def _is_flat(part: np.ndarray, low: float, high: float, margin: float) -> bool:
    least, most = part.min(), part.max()  # NaN compares as not flat
    return bool(most <= low + margin or least >= high - margin)


@sample_check("repeated-term", "error", "A sample has two semantic targets of one term: each should be all of it.")
def repeated_term(sample: Sample) -> Iterator[Problem]:
    """Count the semantic targets of each term."""
    counts = Counter(target.term for target in sample.triplet.targets if target.kind == "semantic")
    for term, count in counts.items():
        if count > 1:
            message = f"'{term}' has {count} semantic targets: join them, or make them instances"
            yield Problem(message, value=count, term=term)


@sample_check("not-looked-for", "error", "A target's term is not among those that were looked for.")
def not_looked_for(sample: Sample) -> Iterator[Problem]:
    """Compare the targets with what was looked for."""
    for term in dict.fromkeys(target.term for target in sample.triplet.targets):
        if term not in sample.triplet.looked_for:
            message = f"'{term}' has a target but was not looked for: add it to looked_for"
            yield Problem(message, term=term)


@sample_check("not-finite", "error", "An image holds NaN or infinite values.")
def not_finite(sample: Sample) -> Iterator[Problem]:
    """Count the values that are no numbers."""
    if sample.pixels.wrong:
        share = sample.pixels.wrong / sample.image.size
        message = f"{share:.2%} of the values are NaN or infinite: replace them before building"
        yield Problem(message, value=sample.pixels.wrong)


@sample_check("constant-image", "error", "An image with targets has one value only.")
def constant_image(sample: Sample) -> Iterator[Problem]:
    """Look for images without content that are said to show something."""
    if sample.pixels.constant and sample.triplet.targets:
        message = f"every pixel is {sample.pixels.low:g}, and yet it has targets: look at the source and the window"
        yield Problem(message, value=sample.pixels.low)


@sample_check("blank-image", "note", "An image without targets has one value only.")
def blank_image(sample: Sample) -> Iterator[Problem]:
    """Look for images without content."""
    if sample.pixels.constant and not sample.triplet.targets:
        message = f"every pixel is {sample.pixels.low:g}: such a sample teaches nothing; leave it out"
        yield Problem(message, value=sample.pixels.low)


@sample_check("few-levels", "warning", f"An 8-bit image has fewer than {_FEW_LEVELS} different values.")
def few_levels(sample: Sample) -> Iterator[Problem]:
    """Look for label maps and masks in the place of images."""
    pixels = sample.pixels
    if 1 < pixels.levels < _FEW_LEVELS and pixels.common < _MOSTLY_ONE:
        message = f"the image has {pixels.levels} different values: is it a mask, or scaled before it became 8-bit?"
        yield Problem(message, value=pixels.levels)
