"""The checks that compare images: their values, their sizes and their spacings."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_shards.lint.findings import corpus_check
from data_shards.lint.survey import Corpus, Hit, by_volume, first_of, groups, more

_SMALLEST, _LARGEST = 0.0005, 20.0
"""Pixel spacings in mm beyond which something is wrong."""
_SMALLEST_MICROSCOPY = 1e-7
"""The same for microscopes: 0.1 nm."""
_MICROSCOPY = frozenset({"microscopy", "pathology", "histology", "histopathology", "cytology", "em", ""})
"""Modalities that may have it, in lower case; and what is not known."""
_THICKEST = 100.0
"""Slice spacing in mm beyond which something is wrong: localisers have some 50."""
_MANY = 8
"""Volumes or images of a kind that are needed before one can be unlike the rest."""
_UNIT = 30.0
"""Ratio of intensities from which another unit is likely: PET slices of one scanner differ by less."""
_APART = 3.0
"""Ratio of sizes or spacings from which one is far from the rest; unless the rest differs as much."""
_BRIGHT, _DARK = 0.4, 0.9
"""Share of the pixels at one end of the range from which an image may be saturated."""


@corpus_check("intensity-outlier", "warning", "A volume's values are far outside of what its data set has.")
def intensity_outlier(corpus: Corpus) -> Iterator[Hit]:
    """Compare the scale of each volume with the median of its kind; 8-bit images have no unit."""
    deep = corpus.rows["depth"] > 8
    for members in groups(np.where(deep, corpus.kind, -1)):
        # The brightest slice speaks for a volume: others may show nothing but air.
        brightest = members[np.argsort(-corpus.rows["scale"][members], kind="stable")]
        brightest = _one_of_each(corpus, brightest[corpus.rows["scale"][brightest] > 0])
        if len(brightest) < _MANY:
            continue
        scales = corpus.rows["scale"][brightest].astype(np.float64)
        middle = float(np.median(scales))
        for row, scale in zip(brightest.tolist(), scales.tolist(), strict=True):
            if not 1 / _UNIT <= scale / middle <= _UNIT:
                message = f"values up to {scale:.3g}, where its data set has {middle:.3g}: is it in another unit?"
                yield Hit(message, row, value=scale)


@corpus_check("saturated", "warning", "Much of an image is at the end of its range, unlike the rest of its data set.")
def saturated(corpus: Corpus) -> Iterator[Hit]:
    """Look for images that are all white or all black where the others of their kind are not."""
    fits = ~corpus.rows["plain"]
    for members in groups(np.where(fits, corpus.kind, -1)):
        if len(members) < _MANY:
            continue
        for name, least, what in (("bright", _BRIGHT, "greatest"), ("dark", _DARK, "least")):
            shares = corpus.rows[name][members].astype(np.float64)
            usual = float(np.percentile(shares, 80))
            for row, share in zip(members.tolist(), shares.tolist(), strict=True):
                if share > max(least, 4 * usual):
                    message = f"{share:.0%} of the pixels have the {what} value, where {usual:.0%} is usual: look at it"
                    yield Hit(message, row, value=share)


@corpus_check("unused-bits", "note", "The 16-bit images of a data set use 8 bits only.")
def unused_bits(corpus: Corpus) -> Iterator[Hit]:
    """Look for data sets without a value that needs 16 bits."""
    deep = (corpus.rows["depth"] == 16) & ~corpus.rows["plain"]
    for members in groups(np.where(deep, corpus.dataset, -1)):
        if (corpus.rows["bits"][members] == 8).all():
            what = "the only image is" if len(members) == 1 else f"all {len(members):,} images are"
            message = f"{what} stored in 16 bits, and 8 hold all values: was the depth lost before?"
            yield Hit(message, int(members[0]), value=8)


@corpus_check(
    "pixel-spacing",
    "error",
    f"A pixel is not {_SMALLEST:g} to {_LARGEST:g} mm wide; under a microscope it may be smaller.",
)
def pixel_spacing(corpus: Corpus) -> Iterator[Hit]:
    """Look for spacings that no scanner has; a microscope's pixels may be a tenth of a nanometre."""
    tables = [part.index.modalities for part in corpus.parts]
    least = [[_SMALLEST_MICROSCOPY if name.casefold() in _MICROSCOPY else _SMALLEST for name in map(str, table)]
             for table in tables]  # fmt: skip
    smallest = np.concatenate(
        [np.array(values)[part.index.modality[part.numbers]] for values, part in zip(least, corpus.parts, strict=True)]
    )
    rows, columns = corpus.column("row_spacing"), corpus.column("column_spacing")
    wrong = (np.fmin(rows, columns) < smallest) | (np.fmax(rows, columns) > _LARGEST)  # NaN: not known
    for row, others in by_volume(corpus, wrong):
        worst = rows[row] if not smallest[row] <= rows[row] <= _LARGEST else columns[row]
        message = f"pixels of {rows[row]:g} x {columns[row]:g} mm{more(others)}"
        yield Hit(f"{message}: correct the spacing of the source", row, value=worst)


@corpus_check("slice-spacing", "error", f"A slice spacing is no length of {_SMALLEST:g} to {_THICKEST:g} mm.")
def slice_spacing(corpus: Corpus) -> Iterator[Hit]:
    """Look for distances between slices that no scanner has."""
    spacing = corpus.column("slice_spacing")
    deep = ~np.isnan(spacing) & (corpus.column("slice_index") >= 0)
    smallest = np.where(corpus.column("row_spacing") < _SMALLEST, _SMALLEST_MICROSCOPY, _SMALLEST)
    for row, others in by_volume(corpus, deep & ((spacing < smallest) | (spacing > _THICKEST))):
        message = f"slices {spacing[row]:g} mm apart{more(others)}"
        yield Hit(f"{message}: correct the spacing of the source", row, value=spacing[row])


@corpus_check("no-slice-spacing", "note", "A volume's slices have a pixel spacing and no slice spacing.")
def no_slice_spacing(corpus: Corpus) -> Iterator[Hit]:
    """Look for volumes whose third dimension is not known."""
    flat = np.isnan(corpus.column("slice_spacing")) & ~np.isnan(corpus.column("row_spacing"))
    volumes = _counts(corpus.volume) > 1
    for row, others in by_volume(corpus, flat & volumes & (corpus.column("slice_index") >= 0)):
        yield Hit(f"no slice spacing{more(others)}: lengths across slices are not known", row)


@corpus_check("volume-changes", "error", "Size or spacing changes inside of a volume.")
def volume_changes(corpus: Corpus) -> Iterator[Hit]:
    """Compare the slices of each volume."""
    size = np.stack([corpus.rows["height"], corpus.rows["width"]], axis=1)
    spacing = np.stack([corpus.column(f"{name}_spacing") for name in ("row", "column", "slice")], axis=1)
    whole = ~corpus.rows["patch"] & (corpus.column("slice_index") >= 0)
    first = first_of(np.where(whole, corpus.volume, -1))
    other = (size != size[first]).any(axis=1)
    same = np.isclose(spacing, spacing[first], rtol=1e-3, atol=0, equal_nan=True).all(axis=1)
    for changed, what, values in ((other, "px", size), (~same & ~other, "mm", spacing)):
        for row, others in by_volume(corpus, changed):
            was, now = (" x ".join(f"{length:g}" for length in values[at]) for at in (first[row], row))
            rest = more(others)
            message = f"{now} {what}{rest}, where its volume begins with {was} {what}: build it from one series"
            yield Hit(message, row, other=int(first[row]))


@corpus_check("size-outlier", "warning", "An image's size is far from the rest of its data set and modality.")
def size_outlier(corpus: Corpus) -> Iterator[Hit]:
    """Compare the side of each volume's images with the median of its kind; windows of one image do not count."""
    side = np.sqrt(corpus.rows["height"].astype(np.float64) * corpus.rows["width"])
    for row, value, middle in _far(corpus, np.where(corpus.rows["patch"], np.nan, side)):
        size = f"{corpus.rows['height'][row]} x {corpus.rows['width'][row]} px"
        message = f"the image has {size}, where about {middle:.0f} px a side is usual: is it a thumbnail or a montage?"
        yield Hit(message, row, value=value)


@corpus_check("spacing-outlier", "warning", "A pixel spacing is far from the rest of its data set and modality.")
def spacing_outlier(corpus: Corpus) -> Iterator[Hit]:
    """Compare the spacing of each volume with the median of its kind."""
    rows, columns = (corpus.column(f"{name}_spacing").astype(np.float64) for name in ("row", "column"))
    plausible = (rows > 0) & (columns > 0) & np.isfinite(rows) & np.isfinite(columns)
    spacing = np.sqrt(np.where(plausible, rows, np.nan) * np.where(plausible, columns, np.nan))
    for row, value, middle in _far(corpus, spacing):
        yield Hit(f"pixels of {value:.3g} mm, where {middle:.3g} mm is usual: is its spacing right?", row, value=value)


def _far(corpus: Corpus, values: np.ndarray) -> Iterator[tuple[int, float, float]]:
    """Yield the volumes whose values (N,) are far from the others of their kind: first slice, value, median."""
    for members in groups(np.where(np.isnan(values), -1, corpus.kind)):
        firsts = _one_of_each(corpus, members)
        if len(firsts) < _MANY:
            continue
        logs = np.log(values[firsts])
        middle = float(np.median(logs))
        away = np.abs(logs - middle)
        limit = max(np.log(_APART), 3 * float(np.percentile(away, 80)))
        for row in firsts[away > limit].tolist():
            yield row, float(values[row]), float(np.exp(middle))


def _one_of_each(corpus: Corpus, members: np.ndarray) -> np.ndarray:
    """Return the first row of each volume among some rows."""
    return np.asarray(members[np.unique(corpus.volume[members], return_index=True)[1]])


def _counts(numbers: np.ndarray) -> np.ndarray:
    """Return how often each of the numbers (N,) occurs: (N,)."""
    _, inverse, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    return np.asarray(counts[inverse])
