"""COCO annotations: one ``.json`` with the masks of all images, as polygons or run lengths.

Shapes: H, W are the image's height and width; R the runs of a mask; P the points of a polygon.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_shards.errors import UserError
from data_shards.readers.base import Drawing, Ground, Layer, register_drawing
from data_shards.runs import runs_of
from data_shards.strict import read_json, show

_MAX_BYTES = 2 * 2**30
"""Bytes of the largest file that is read; that of COCO's 118 thousand training images has less than a quarter."""

_MAX_STEPS = 2**25
"""Steps of an outline when rasterised: pycocotools takes five to a pixel, and memory for each."""


@dataclass(frozen=True)
class _Content:
    """A parsed file.

    Attributes:
        images: Records of images, by base name.
        annotations: Records of annotations, by the id of their image, in the order of the file.
        categories: Names by id.
    """

    images: dict[str, list[dict[str, Any]]]
    annotations: dict[Any, list[dict[str, Any]]]
    categories: dict[int, str]


@register_drawing(".json")
def read_coco(
    path: Path,
    ground: Ground,
    crowd: Literal["keep", "drop"] = "keep",
    unlisted: Literal["error", "empty"] = "error",
    match: Literal["path", "name"] = "path",
) -> Drawing:
    """Read the COCO annotations of one image: a layer each, with the name and the number of its category.

    Polygons become masks as in COCO's own tools.

    Args:
        path: The file.
        ground: The image; its path must end in what the file calls it.
        crowd: Whether annotations of many things at once (``iscrowd``) are kept. An image of which one is dropped, with
            nothing else of its category, is no negative of it.
        unlisted: What an image means that is not in the file: a mistake, or that nothing was found in it.
        match: Whether folders in the file's names of images must be the image's own, or only the names count.

    Raises:
        UserError: The file is no COCO file, does not know the image or knows two of its name, states another size, or
            an annotation is damaged or has no mask.
    """
    shape = ground.volume.array.shape
    if shape[0] != 1:
        raise UserError(f"{ground.path}: has {shape[0]} slices, but {path.name} describes single images")
    about = path.stat()
    content = _load(path, about.st_size, about.st_mtime_ns)
    image = _find(path, content, ground.path, match)
    names = tuple((name, number) for number, name in content.categories.items())
    if image is None:
        if unlisted == "empty":
            return Drawing((), names=names)
        raise UserError(_unlisted(path, content, ground.path))
    size = (shape[1], shape[2])
    stated = tuple(image.get(name, side) for name, side in zip(("height", "width"), size, strict=True))
    if stated != size:
        raise UserError(
            f"{path}: states {show(stated[1])} x {show(stated[0])} pixels for '{image['file_name']}', but "
            f"{ground.path} has {size[1]} x {size[0]}: its annotations are of another version of the image"
        )
    layers, unread = [], []
    for record in content.annotations.get(image["id"], []):
        where = f"{path}: annotation {show(record.get('id'))} of '{image['file_name']}'"
        number = record.get("category_id")
        if type(number) is not int or number not in content.categories:
            raise UserError(f"{where}: its category {show(number)} is not among the categories of the file")
        if record.get("iscrowd") and crowd == "drop":
            unread.append((content.categories[number], number))
            continue
        values, origin = _cropped(_runs(where, record.get("segmentation"), size), size[0])
        layers.append(Layer(values, origin, content.categories[number], number))
    return Drawing(tuple(layers), names=names, unread=tuple(unread))


@functools.lru_cache(maxsize=4)
def _load(path: Path, size: int, changed: int) -> _Content:
    """Parse a file; it is asked for once for each of its images, so it is kept until it changes."""
    if size > _MAX_BYTES:
        raise UserError(f"{path}: has {size} bytes, more than {_MAX_BYTES}: split it")
    try:
        record = read_json(path.read_bytes(), _MAX_BYTES)
    except UserError as error:
        raise UserError(f"{path}: is no COCO file: {error}") from error
    lists: dict[str, list[dict[str, Any]]] = {}
    for name in ("images", "annotations", "categories"):
        items = record.get(name)
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise UserError(f"{path}: is no COCO file: it has no list of '{name}'")
        lists[name] = items
    content = _Content({}, {}, {})
    ids = set()
    for item in lists["images"]:
        called, number = item.get("file_name"), item.get("id")
        if not isinstance(called, str) or not _parts(called) or not isinstance(number, int | str):
            raise UserError(f"{path}: image {show(number)}: needs a 'file_name' and an 'id'")
        if number in ids:
            raise UserError(f"{path}: two images have the id {show(number)}")
        ids.add(number)
        content.images.setdefault(_parts(called)[-1], []).append(item)
    for item in lists["annotations"]:
        if not isinstance(item.get("image_id"), int | str) or item["image_id"] not in ids:
            raise UserError(f"{path}: annotation {show(item.get('id'))}: no image has its 'image_id'")
        content.annotations.setdefault(item["image_id"], []).append(item)
    for item in lists["categories"]:
        if type(item.get("id")) is not int or not isinstance(item.get("name"), str):
            raise UserError(f"{path}: category {show(item.get('id'))}: needs a whole number as 'id', and a 'name'")
        if content.categories.setdefault(item["id"], item["name"]) != item["name"]:
            raise UserError(f"{path}: two categories have the id {item['id']}")
    return content


def _parts(name: str) -> tuple[str, ...]:
    """Split a name of an image, as Windows or others write it."""
    return tuple(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def _find(path: Path, content: _Content, image: Path, match: str) -> dict[str, Any] | None:
    """Return the record of an image: the one whose name is the longest end of its path."""
    whole = image.absolute().parts
    found = content.images.get(image.name, [])
    if match == "path":
        found = [item for item in found if _parts(item["file_name"]) == whole[-len(_parts(item["file_name"])) :]]
        longest = max((len(_parts(item["file_name"])) for item in found), default=0)
        found = [item for item in found if len(_parts(item["file_name"])) == longest]
    if len(found) > 1:
        names = " and ".join(f"'{item['file_name']}' (id {item['id']})" for item in found[:2])
        raise UserError(f"{path}: {image} may be {names}: give the images different names")
    return found[0] if found else None


def _unlisted(path: Path, content: _Content, image: Path) -> str:
    same = content.images.get(image.name, [])
    if same:
        return (
            f"{path}: {image}: the file knows an image of this name in another folder only, '{same[0]['file_name']}': "
            "if it is the same, say reader: {match: name}"
        )
    return (
        f"{path}: no image is called '{image.name}': leave the case out, or, if the file leaves out images in which "
        "nothing was found, say reader: {unlisted: empty}"
    )


def _runs(where: str, segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """Return the runs (R,) of a segmentation."""
    from pycocotools import mask as coco_mask

    if not segmentation or not isinstance(segmentation, list | dict):
        raise UserError(f"{where}: has no 'segmentation', perhaps only a box: draw its mask or leave it out")
    if isinstance(segmentation, list):
        outlines = [_outline(where, points, size) for points in segmentation]
        counts: Any = coco_mask.merge(coco_mask.frPyObjects(outlines, *size))["counts"].decode("ascii")
    else:
        counts = segmentation.get("counts")
        if segmentation.get("size") != list(size):
            raise UserError(f"{where}: its mask has the size {show(segmentation.get('size'))}, its image {list(size)}")
    runs = runs_of(counts, size) if isinstance(counts, str | list) else None
    if runs is None:
        raise UserError(f"{where}: its mask is damaged: its run lengths do not fill {size[0]} x {size[1]} pixels")
    if not runs[1::2].any():
        raise UserError(f"{where}: its mask is empty, or lies outside the image")
    return runs


def _outline(where: str, points: Any, size: tuple[int, int]) -> list[float]:
    """Check a polygon [x0, y0, x1, y1, …] before pycocotools, which trusts it, takes memory for its outline.

    What lies less than the image's own size outside of it is cut off.
    """
    if not isinstance(points, list) or not all(type(number) in (int, float) for number in points):
        raise UserError(f"{where}: its polygon is no list of numbers [x0, y0, x1, y1, …]")
    if len(points) % 2 or len(points) < 6:
        raise UserError(f"{where}: its polygon has {len(points)} numbers; x and y of three points or more are needed")
    limit = 3 * max(size)  # a whole number of JSON may be larger than any float
    corners = np.array([max(-limit, min(limit, number)) for number in points], dtype=float).reshape(-1, 2)  # (P, 2)
    sides = np.array(size[::-1])
    if not np.isfinite(corners).all() or (corners < -sides).any() or (corners > 2 * sides).any():
        raise UserError(f"{where}: its polygon lies outside the image of {sides[0]} x {sides[1]} pixels")
    steps = 5 * np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1).sum()
    if steps > _MAX_STEPS:
        raise UserError(f"{where}: its polygon's outline is longer than any shape's: it is damaged")
    return [float(number) for number in points]


def _cropped(runs: np.ndarray, height: int) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Return the box (1, h, w) uint8 that holds a mask, and its first voxel; the columns around it stay packed."""
    ends = np.cumsum(runs)
    first = (ends - runs)[1::2][runs[1::2] > 0][0]
    last = ends[1::2][runs[1::2] > 0][-1] - 1
    left, right = int(first // height), int(last // height) + 1
    # The runs of the columns from left to right: what lies before and after is outside the mask.
    bounds = np.clip(np.concatenate([[0], ends]), left * height, right * height)
    values = (np.arange(len(runs)) % 2).astype(np.uint8)
    box = np.repeat(values, np.diff(bounds)).reshape(right - left, height).T
    rows = np.flatnonzero(box.any(axis=1))
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    return np.ascontiguousarray(box[np.newaxis, top:bottom]), (0, top, left)
