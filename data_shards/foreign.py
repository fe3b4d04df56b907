"""Samples that other people wrote for `webdataset`, read as triplets.

Shapes: H, W are an image's height and width, R the runs of equal values down its columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from data_shards.errors import UserError
from data_shards.layout import Layout, wanted
from data_shards.patterns import compile_pattern
from data_shards.pictures import decode_labels, decode_picture
from data_shards.runs import runs_of
from data_shards.spec import Hasher
from data_shards.strict import is_text, read_json, show
from data_shards.triplet import MAX_RECORD, Provenance, Target, Triplet
from data_shards.vocabulary import normalise

__all__ = ["Layout", "decode", "wanted"]

MAX_INSTANCES = 20_000
"""Instances of one sample."""
_MAX_TEXT = 4000
"""Bytes of a member that holds a term."""
_MAX_RUNS = 2**25
"""Runs of the values of one label map of instances."""

Parts = dict[str, list[Target]]
"""Targets by term; none for a term that was looked for and is not there."""


def decode(layout: Layout, key: str, members: Mapping[str, bytes]) -> Triplet:
    """Make a triplet of the members of a foreign sample, which may be damaged or hostile.

    A term whose mask is empty has no target, but was looked for. Boxes and areas are those of the masks, whatever a
    file says of them.

    Args:
        layout: What the members mean.
        key: The sample's key.
        members: Bytes by extension.

    Raises:
        UserError: A member that the layout names is missing or damaged, or cannot mean what the layout says.
    """
    try:
        given = {name.lower(): data for name, data in members.items()}
        found = [name for name in layout.image if name in given]
        if len(found) != 1:
            count = "no image" if not found else f"{len(found)} images ({', '.join(f'.{name}' for name in found)})"
            raise UserError(f"it has {count}: one of {', '.join(f'.{name}' for name in layout.image)} is needed")
        image = decode_picture(found[0], given[found[0]])
        size = (image.shape[0], image.shape[1])
        parts = _of_masks(layout, given, size) if layout.masks else _of_annotations(layout, given, size)
        targets = tuple(target for part in parts.values() for target in part)
        return Triplet(key, image, targets, tuple(parts), _provenance(layout, key, given[found[0]]))
    except UserError as error:
        raise UserError(f"sample '{key}': {error}") from error


def _member(members: Mapping[str, bytes], extension: str, role: str) -> bytes:
    if extension not in members:
        raise UserError(f"it has no member .{extension}, its {role}: leave the sample out, or index with other options")
    return members[extension]


def _of_masks(layout: Layout, members: Mapping[str, bytes], size: tuple[int, int]) -> Parts:
    """Return the targets of masks: of each term the whole, in all masks together, and then its instances."""
    record = {} if layout.json is None else _record(layout.json, _member(members, layout.json, "json"))
    default = _term(layout, "it", _text(layout, members), record) if layout.one_term else ""
    wholes: dict[str, np.ndarray | None] = {}
    instances: Parts = {}
    for extension in layout.masks:
        labels = decode_labels(extension, _member(members, extension, "mask"))
        if labels.shape != size:
            (rows, columns), (height, width) = labels.shape, size
            raise UserError(
                f"its {extension} has {rows} x {columns} pixels, its image {height} x {width}: resize the mask without "
                "blending its values, or leave the sample out"
            )
        try:
            for term, inside in _wholes(layout, layout.mask_terms.get(extension) or default, labels):
                before = wholes.setdefault(term, None)
                wholes[term] = before if inside is None else inside if before is None else before | inside
                if layout.instances:
                    instances.setdefault(term, []).extend(_instances(labels, term))
        except UserError as error:
            raise UserError(f"its {extension} {error}") from error
    return {
        term: [] if whole is None else [Target.from_mask(whole, term), *instances.get(term, ())]
        for term, whole in wholes.items()
    }


def _wholes(layout: Layout, term: str, labels: np.ndarray) -> Iterator[tuple[str, np.ndarray | None]]:
    """Yield each term of a label map (H, W) and where it is (H, W) bool, None for nowhere."""
    if term:
        if labels.dtype.kind == "i" and labels.min() < 0:
            raise UserError(
                f"has negative values, as {labels.min()}: say what they mean, as --terms={labels.min()}=TERM"
            )
        yield term, labels != 0 if labels.any() else None
        return
    small = labels.dtype.kind in "bu" and labels.dtype.itemsize <= 2  # counting is several times faster than sorting
    values = (np.flatnonzero(np.bincount(labels.ravel())) if small else np.unique(labels)).tolist()
    unknown = [int(value) for value in values if value and value not in layout.terms]
    if unknown:
        listed = ", ".join(map(str, unknown[:5])) + (" and more" if len(unknown) > 5 else "")
        hint = f"add --terms={unknown[0]}=TERM, or --terms={unknown[0]}= to leave it out"
        raise UserError(f"has the values {listed}, which no term has: {hint}")
    for value, name in layout.terms.items():
        if name:
            yield name, labels == value if value in values else None


def _instances(labels: np.ndarray, term: str) -> list[Target]:
    """Return an instance for each value of a label map (H, W) but 0; in time that hardly depends on their number."""
    flat = labels.T.ravel()
    changes = flat[1:] != flat[:-1]
    if np.count_nonzero(changes) > _MAX_RUNS:
        raise UserError(f"changes its value more than {_MAX_RUNS} times: cut the image into patches")
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
    stops, values = np.append(starts[1:], flat.size), flat[starts]
    order = np.argsort(values, kind="stable")
    order = order[values[order] != 0]
    if not order.size:
        return []
    cuts = np.flatnonzero(np.diff(values[order])) + 1
    if len(cuts) >= MAX_INSTANCES:
        raise UserError(f"has more than {MAX_INSTANCES} instances: cut the image into patches")
    size = (labels.shape[0], labels.shape[1])
    return [_target(starts[runs], stops[runs], size, term, "instance") for runs in np.split(order, cuts)]


def _of_annotations(layout: Layout, members: Mapping[str, bytes], size: tuple[int, int]) -> Parts:
    """Return the targets of annotations as in SA-1B: one for each, or one of all that have the same term."""
    assert layout.json is not None
    record = _record(layout.json, _member(members, layout.json, "json"))
    text = _text(layout, members)
    found = record.get("annotations")
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise UserError(f"its {layout.json} has no list of 'annotations', and there is no mask: give --mask EXT")
    if len(found) > MAX_INSTANCES:
        raise UserError(f"its {layout.json} has more than {MAX_INSTANCES} annotations: cut the image into patches")
    spans: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for number, item in enumerate(found):
        place = f"its {layout.json}: annotation {number}"
        mine = spans.setdefault(_term(layout, place, text, item, record), [])
        span = _spans(item.get("segmentation"), size, place)
        if span[0].size:
            mine.append(span)
    if not found and (layout.json_term is None or layout.json_term in record or layout.term):
        spans[_term(layout, "it", text, record)] = []
    if layout.instances:
        return {term: [_target(*span, size, term, "instance") for span in mine] for term, mine in spans.items()}
    return {term: [_target(*_union(mine), size, term, "semantic")] if mine else [] for term, mine in spans.items()}


def _spans(segmentation: Any, size: tuple[int, int], place: str) -> tuple[np.ndarray, np.ndarray]:
    """Return where the pixels inside of an annotation begin and end, (R,) and (R,), counted down the columns."""
    if not isinstance(segmentation, dict):
        raise UserError(
            f"{place} has no run lengths as its 'segmentation'; polygons are not read: store what pycocotools' "
            "`annToRLE` makes of them"
        )
    if segmentation.get("size") != list(size):
        raise UserError(
            f"{place} has the size {show(segmentation.get('size'))}, its image {list(size)} (height, width): correct it"
        )
    counts = segmentation.get("counts")
    runs = runs_of(counts, size) if isinstance(counts, str | list) else None
    if runs is None:
        raise UserError(f"{place} is damaged: its run lengths do not fill {size[0]} x {size[1]} pixels")
    stops = np.cumsum(runs)[1::2]
    full = runs[1::2] > 0
    return (stops - runs[1::2])[full], stops[full]


def _union(spans: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the spans of all together; where they overlap or touch, one goes on."""
    starts, stops = (np.concatenate(ends) for ends in zip(*spans, strict=True))
    order = np.argsort(starts, kind="stable")
    starts, stops = starts[order], np.maximum.accumulate(stops[order])
    first = np.concatenate([[True], starts[1:] > stops[:-1]])
    return starts[first], stops[np.append(first[1:], True)]


def _target(starts: np.ndarray, stops: np.ndarray, size: tuple[int, int], term: str, kind: str) -> Target:
    """Return a target of its spans (R,), in order, at least one."""
    edges = np.stack([starts, stops], axis=1).ravel()
    rest = [] if edges[-1] == size[0] * size[1] else [size[0] * size[1]]
    runs = np.diff(np.concatenate([edges, rest]).astype(np.int64), prepend=0)
    packed = coco_mask.frPyObjects({"counts": runs.tolist(), "size": list(size)}, *size)
    target = Target(term, size, packed["counts"].decode("ascii"), (0, 0, 0, 0), 0, (), kind)
    box, area = target.measure()
    assert box is not None
    return replace(target, box=box, area=area)


def _term(layout: Layout, who: str, text: str | None, *records: Mapping[str, Any]) -> str:
    """Return the term of a sample or of an annotation, by the first of its records that says it."""
    place = f".{layout.text}"
    if layout.json_term is not None:
        place = f"'{layout.json_term}' of .{layout.json}"
        value = next((record[layout.json_term] for record in records if layout.json_term in record), None)
        if not (value is None or isinstance(value, str)):
            raise UserError(f"{who} has {show(value)} as {place}, which is no text")
        text = value
    text = (text or "").strip() or layout.term
    if not text:
        raise UserError(f"{who} has no term: {place} is empty or missing: add --term TEXT for such samples")
    if not is_text(text):
        raise UserError(f"{who} has no term: {place} is no text of at most 1000 characters on one line")
    return normalise(text)


def _text(layout: Layout, members: Mapping[str, bytes]) -> str | None:
    if layout.text is None:
        return None
    data = _member(members, layout.text, "text")
    if len(data) > _MAX_TEXT:
        raise UserError(f"its {layout.text} has {len(data)} bytes, which is no term")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"its {layout.text} is no UTF-8") from None


def _record(extension: str, data: bytes) -> dict[str, Any]:
    try:
        return read_json(data, MAX_RECORD)
    except UserError as error:
        raise UserError(f"its {extension} is damaged: {error}") from error


def _provenance(layout: Layout, key: str, image: bytes) -> Provenance:
    """Return where a sample came from, as far as one can know; identifiers are hashed.

    An image of an unknown patient stands for itself: the same one in two splits is found, equal keys mean nothing.
    """
    hashed, source = Hasher(""), hashlib.sha256(image).hexdigest()
    patient = hashed("image", source)
    if layout.patient is not None:
        match = compile_pattern(layout.patient).search(key)
        if match is None or not match[1]:
            raise UserError(
                f"the pattern of --patient, {show(layout.patient)}, finds no patient in its key: give one whose first "
                "group fits in every key, or leave --patient out"
            )
        patient = hashed("patient", match[1])
    return Provenance(
        dataset=layout.dataset,
        patient=patient,
        volume=hashed("volume", source),
        modality=layout.modality,
        source_sha256=source,
        intensity={"kind": "none"},
        split_unit="image" if layout.patient is None else "patient",
    )
