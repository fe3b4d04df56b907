"""What a visitor takes home: the slice as a picture, its masks, and the masks of the whole image with its geometry."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from data_shards.errors import UserError
from trainer.demo.case import Case
from trainer.demo.drawing import composed
from trainer.volumes.output import LabelWriter

FORMS = {
    "picture": "Picture with masks (PNG)",
    "mask": "Mask of this slice (PNG)",
    "nifti": "Masks as NIfTI",
    "seg": "Masks as DICOM SEG",
    "frames": "Masks of all frames (zip of PNG)",
}
"""What can be saved, as the page calls it."""


def forms_of(case: Case | None) -> list[str]:
    """Which of `FORMS` make sense for an image."""
    if case is None:
        return []
    found = ["picture", "mask"]
    if not case.scan.flat and case.scan.grid.affine is not None:
        found.append("nifti")
    if case.scan.place.layout is not None:
        found.append("seg")
    if case.scan.flat and len(case.scan) > 1:
        found.append("frames")
    return found


def save(case: Case, form: str) -> Path:
    """Write one of `FORMS` and return the file, which vanishes with the case.

    Raises:
        UserError: There is no mask yet, or the format does not fit the image.
    """
    folder, stem = case.scratch(), _stem(case.name)
    tail = f"-{case.slice:04d}" if len(case.scan) > 1 else ""
    if form == "picture":
        path = folder / f"{stem}{tail}.png"
        composed(case, case.slice).save(path)
        return path
    if form not in FORMS:
        raise UserError(f"there is no download '{form}'")
    if not case.filled():
        raise UserError("there is no mask to save yet: show an object first")
    if form == "mask" and (not case.scan.flat or len(case.scan) > 1):
        path = folder / f"{stem}{tail}-mask.png"
        Image.fromarray(_labels(case)).save(path)
        return path
    ends = {"mask": ".png", "nifti": ".nii.gz", "seg": ".dcm", "frames": ""}
    out = folder / f"{stem}-masks{ends[form]}"
    write_masks(case, out)
    return Path(shutil.make_archive(str(out), "zip", out)) if form == "frames" else out


def write_masks(case: Case, path: Path) -> None:
    """Write the masks of the whole image as `trainer predict --volume` does; objects without any are left out.

    Raises:
        UserError: The format does not fit the image.
    """
    kept = [place for place, one in enumerate(case.scene.objects) if one.answers]
    names = [case.scene.objects[place].name for place in kept]
    with LabelWriter(path, case.scan, names) as writer:
        for number in case.filled():
            writer.put(number, case.masks(number)[kept], _scores(case, number)[kept])


def _labels(case: Case) -> np.ndarray:
    """The slice on show as a label map (H, W) uint8: the object n has the value n; the surer one is above."""
    scores, masks = _scores(case, case.slice), case.masks(case.slice)
    picture = np.zeros(case.scan.size, np.uint8)
    kept = [place for place, one in enumerate(case.scene.objects) if one.answers]
    for place in sorted(kept, key=lambda place: (scores[place], -place)):
        picture[masks[place]] = kept.index(place) + 1
    return picture


def _scores(case: Case, number: int) -> np.ndarray:
    answers = [one.answers.get(number) for one in case.scene.objects]
    return np.array([0.0 if answer is None else answer.score for answer in answers], np.float32)


def _stem(name: str) -> str:
    """A file name of what the visitor calls the image, without its ending."""
    word = re.sub(r"(\.nii)?\.[A-Za-z]\w{0,4}$", "", name.split(" and ")[0])
    return re.sub(r"[^\w.-]+", "_", word).strip("._")[:80] or "image"
