"""Thousands of damaged files: each is read or refused with one line; nothing crashes, hangs, fills memory or is run.

``SAM_TRAINER_FUZZ=20000`` makes so many mutants. A finding names its kind and number, which can be repeated alone:
``python tests/data_shards/fuzz_worker.py SEEDS KIND NUMBER NUMBER+1 LOG``, SEEDS being a folder filled by `plant`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from mutate import write_tar
from PIL import Image
from pydicom.data import get_testdata_file
from test_triplet import make, values
from toy import make_case, save_nifti
from toy_dicom import make_rtstruct, make_seg, make_series, save, toy_array, write_enhanced, write_series

from data_shards.dataset import ShardDataset
from data_shards.layout import Layout
from data_shards.readers import Ground, read_drawing, read_volume
from data_shards.scan import write_index
from data_shards.triplet import Triplet
from data_shards.verify import verify
from data_shards.writer import ShardWriter

SHARES = {"shard": 0.2, "index": 0.2, "foreign": 0.2, "cache": 0.12, "manifest": 0.08, "dicom": 0.12, "files": 0.08}
TOTAL = int(os.environ.get("SAM_TRAINER_FUZZ", "600"))
_MOST_DEATHS = 20


def plant(folder: Path) -> None:
    """Fill a folder with small sound files of all kinds; the same bytes each time."""
    numbers = random.Random(0)
    with mock.patch("secrets.randbelow", numbers.randrange):  # of which identifiers are made
        _plant(folder)


def _plant(folder: Path) -> None:
    _plant_corpus(folder / "corpus")
    _plant_foreign(folder / "foreign")
    for name in ("dicom", "files", "ground"):
        (folder / name).mkdir()
    _plant_dicom(folder)
    files = folder / "files"
    image, labels = (array[:3, :9, :8] for array in make_case(0))
    for name in ("a.nii", "b.nii.gz"):
        save_nifti(files / name, image if name == "a.nii" else labels)
    np.savez(files / "c.npz", imgs=image, gts=labels, spacing=np.array([2.0, 0.75, 0.5]))
    picture = np.random.default_rng(0).integers(0, 255, (40, 50, 3)).astype(np.uint8)
    for suffix in (".png", ".jpg", ".bmp", ".gif", ".ppm", ".tif"):
        Image.fromarray(picture).save(files / f"picture{suffix[1:]}{suffix}")
    Image.fromarray(picture[..., 0].astype(np.uint16)).save(files / "deep.png")
    Image.fromarray(picture).save(files / "packed.tif", compression="tiff_lzw")
    Image.fromarray(picture).save(folder / "ground" / "a.png")
    import SimpleITK as sitk  # noqa: N813  # its users know it by this name

    for number, suffix in enumerate((".nrrd", ".mha", ".mhd", ".nhdr")):
        volume = sitk.GetImageFromArray(image)
        volume.SetSpacing((0.5, 0.75, 2.0))
        sitk.WriteImage(volume, str(files / f"sitk{number}{suffix}"), number % 2 == 0)
    _plant_coco(files / "coco.json")


def _plant_corpus(folder: Path) -> None:
    def sample(number: int) -> Triplet:
        image = values(("uint8", "int16", "uint16", "float32")[number % 4], *((3,) if number % 5 == 4 else ()))
        triplet = make(image, masks=number % 3)
        origin = replace(triplet.provenance, previous=f"toy-{number - 1}" if number else None, patch=(0, number))
        return replace(triplet, key=f"toy-{number}", provenance=origin)

    splits = {}
    for split, numbers in {"train": range(7), "test": range(7, 9)}.items():
        with ShardWriter(folder / split, 4, 2**20) as writer:
            for number in numbers:
                triplet = sample(number)
                writer.write(triplet.key, triplet.encode("zstd" if number % 2 else "png"))
        splits[split] = {"slices": len(numbers), "index_sha256": write_index(folder / split).sha256}
    manifest = {
        "format_version": 1,
        "spec": {"dataset": "toy", "split": {"kind": "patients"}},
        "sources": [{"volume": "v", "patient": "p", "split": None}],
        "dataset": "toy",
        "splits": splits,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))


def _plant_foreign(folder: Path) -> None:
    """Tars as others write them: a mask and a text, run lengths, values of masks, a term in a JSON."""
    rng = np.random.default_rng(3)
    ends: dict[str, tuple[str, ...]] = {
        "texts": ("jpg", "mask.png", "txt"),
        "runs": ("jpg", "json"),
        "values": ("png", "seg.npy", "liver.png"),
        "captions": ("npy", "mask.png", "json"),
    }
    given: dict[str, dict[str, Any]] = {
        "texts": {"patient": "^(P[0-9])_"},
        "runs": {"term": "object"},
        "values": {"image": ("png",), "masks": ("seg.npy", "liver.png"), "terms": {1: "spleen", 2: "", 3: "cyst"}},
        "captions": {"json": "json", "json_term": "caption", "instances": True},
    }
    given["values"]["mask_terms"] = {"liver.png": "liver"}
    for name, extensions in ends.items():
        (folder / name).mkdir(parents=True)
        for shard in range(2):
            members = [
                (f"P{shard}_{number}.{end}", _foreign_member(name, end, 24 + number, rng))
                for number in range(3)
                for end in extensions
            ]
            (folder / name / f"{name}-{shard}.tar").write_bytes(write_tar(members))
        write_index(folder / name, Layout.detect(extensions, {"dataset": name, **given[name]}))


def _foreign_member(name: str, end: str, height: int, rng: np.random.Generator) -> bytes:
    width = 20
    labels = np.zeros((height, width), np.uint8)
    for value in (1, 2, 3):
        row, column = rng.integers(0, 16, 2)
        labels[row : row + 5, column : column + 4] = value
    buffer = io.BytesIO()
    if end in ("jpg", "png"):
        picture = rng.integers(0, 255, (height, width, *((3,) if end == "jpg" else ()))).astype(np.uint8)
        Image.fromarray(picture).save(buffer, "JPEG" if end == "jpg" else "PNG", progressive=name == "runs")
    elif end == "npy":
        np.save(buffer, rng.integers(-1000, 1000, (height, width)).astype(np.int16))
    elif end == "seg.npy":
        np.save(buffer, labels.astype(np.int32))
    elif end.endswith("png"):
        Image.fromarray(labels if name == "captions" else (labels > 0).astype(np.uint8) * 255).save(buffer, "PNG")
    elif end == "txt":
        return b"polyp\n"
    elif name == "captions":
        return json.dumps({"caption": "cell nucleus", "url": "x"}).encode()
    else:
        whole = {"size": [height, width], "counts": [100, 20, 200, 60, height * width - 380]}
        part = {"size": [height, width], "counts": [0, 10, height * width - 10]}
        found = [{"segmentation": part, "area": 10, "bbox": [0, 0, 1, 10]}, {"segmentation": whole}]
        return json.dumps({"image": {"height": height, "width": width}, "annotations": found}).encode()
    return buffer.getvalue()


def _plant_dicom(folder: Path) -> None:
    array = toy_array((3, 12, 10))
    series = make_series(array)
    write_series(folder / "ground" / "series", array)
    write_series(folder / "dicom" / "series", array)
    save(series[0], folder / "dicom" / "slice.dcm")
    write_enhanced(folder / "dicom" / "enhanced.dcm", (array + 1024).astype(np.uint16), [2, 0, 1], [(1.0, -1024.0)] * 3)
    for kind in ("BINARY", "FRACTIONAL"):
        masks = np.zeros((3, 12, 10, 2), np.uint8 if kind == "BINARY" else np.float32)
        masks[:, 3:7, 2:6, 0] = masks[1, 8:, 5:, 1] = 1
        seg = make_seg(series, masks, kind)
        for element in seg.iterall():
            if element.VR in ("DA", "TM", "DT") and element.value:
                element.value = {"DA": "20200101", "TM": "120000", "DT": "20200101120000"}[element.VR]
        seg.save_as(folder / "dicom" / f"seg-{kind.lower()}.dcm")
    # Of pydicom's package; the latter two are decoded in a process for each, which takes its time.
    for name in ("RLE", "jpeg_ls_lossless", "jp2klossless") if TOTAL > 8000 else ("RLE",):
        path = get_testdata_file(f"MR_small_{name}.dcm", download=False)
        shutil.copy(str(path), folder / "dicom" / f"{name}.dcm")
    corners = np.array([[-9, -17, 30], [-6, -17, 30], [-6, -13, 30], [-9, -13, 30]], float)
    regions = [
        ("GTV", [("CLOSED_PLANAR", corners), ("CLOSED_PLANAR", corners + np.array([0, 0, 2]))]),
        ("dot", [("POINT", corners[:1])]),
    ]
    save(make_rtstruct(regions, series=series[0].SeriesInstanceUID), folder / "dicom" / "regions.dcm")


def _plant_coco(path: Path) -> None:
    from pycocotools import mask as coco_mask

    blob = np.asfortranarray(np.random.default_rng(1).random((40, 50)) > 0.8, dtype=np.uint8)
    packed = {"size": [40, 50], "counts": coco_mask.encode(blob)["counts"].decode()}
    plain = {"size": [40, 50], "counts": [500, 300, 1200]}
    shapes = [[[10.0, 5.0, 30.5, 6.0, 28.0, 20.25]], packed, plain]
    annotations = [
        {"id": number, "image_id": 1, "category_id": 3, "segmentation": shape, "iscrowd": int(number == 2)}
        for number, shape in enumerate(shapes)
    ]
    images = [{"id": 1, "file_name": "a.png", "height": 40, "width": 50}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "x"}]}))


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeds")
    plant(folder)
    return folder


@pytest.mark.parametrize("kind", SHARES)
@pytest.mark.filterwarnings("ignore:The string")  # highdicom, about the toy's name
def test_damaged_files_are_read_or_refused(seeds: Path, kind: str) -> None:
    count = round(TOTAL * SHARES[kind])
    found = fuzz(seeds, kind, count)
    assert not (seeds / "marker").exists(), "a pickle was opened"
    assert not found, f"{len(found)} findings:\n" + "\n".join(found[:40])
    total = (seeds / f"{kind}.log").read_text().splitlines()[-1]
    read, refused, reasons = map(
        int, re.fullmatch(r"total (\d+) read, (\d+) refused for (\d+) reasons", total).groups()
    )  # type: ignore[union-attr]
    # Damage that is never refused, or always in one way, would reach nothing. That of a cache is mended, as it should.
    least, ways = (200, 20) if kind == "cache" else (20, 10)
    assert min(read, refused) > (read + refused) / least and reasons >= min(15, count // ways), total


def test_the_same_files_each_time(seeds: Path, tmp_path: Path) -> None:
    plant(tmp_path)
    for path in filter(Path.is_file, tmp_path.rglob("*")):
        assert path.read_bytes() == (seeds / path.relative_to(tmp_path)).read_bytes(), path


def test_what_must_not_happen_is_found(seeds: Path) -> None:
    found = fuzz(seeds, "broken", 8)
    assert len(found) == 7
    for line, part in zip(
        found,
        (
            "broken 1: ended the process",  # hangs
            "broken 2: ended the process",  # crashes
            "broken 6: ended the process",  # works on without end
            "broken 0 BAD ValueError: x (",
            "broken 3 BAD MemoryError",
            "broken 4 BAD Finding: the message does not name",
            "broken 5 BAD SystemExit",
        ),
        strict=True,
    ):
        assert line.startswith(part), found


def fuzz(seeds: Path, kind: str, count: int) -> list[str]:
    """Return what was found among the mutants 0 to `count`."""
    log, noise = seeds / f"{kind}.log", seeds / f"{kind}.noise"
    first, found = 0, []
    for _ in range(_MOST_DEATHS):
        _work(seeds, kind, first, count, log, noise)
        lines = log.read_text().splitlines()
        if lines[-1].startswith("total "):
            break
        last = int(lines[-1].split()[1])
        found.append(f"{kind} {last}: ended the process: {noise.read_text(errors='replace')[-300:]}")
        first = last + 1
    ends = [line.removeprefix("end ") for line in lines if line.startswith("end ")]
    assert len(ends) + len(found) == count or len(found) == _MOST_DEATHS, "not all mutants were made"
    return found + [f"{kind} {line}" for line in ends if not line.endswith(" ok")]


def _work(seeds: Path, kind: str, first: int, stop: int, log: Path, noise: Path) -> None:
    """Let a process work through some mutants; it and what it started is gone afterwards."""
    worker = Path(__file__).with_name("fuzz_worker.py")
    with noise.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(worker), str(seeds), kind, str(first), str(stop), str(log)],
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            cwd=seeds,
        )
        try:
            process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_the_sound_files_are_read(seeds: Path) -> None:
    """What is damaged above was whole: otherwise nothing would be tested."""
    problems = verify(seeds / "corpus").problems
    assert [problem.partition(": ")[2] for problem in problems[:1]] == [
        "sample 'toy-7': its previous slice 'toy-6' is not in this split"
    ]
    assert problems[1:] == ["patient p is in splits test, train: split by patient"]
    for folder in sorted((seeds / "foreign").iterdir()):
        assert verify(folder).problems == [] and len(ShardDataset(folder)) == 6
        assert all(triplet.targets for triplet in ShardDataset(folder))
    ground = seeds / "ground" / "series"
    for path in sorted([*(seeds / "dicom").iterdir(), *(seeds / "files").iterdir()]):
        if path.suffix in (".raw", ".zraw", ".gz") and not path.name.endswith(".nii.gz"):
            continue
        if path.name.startswith(("seg", "regions")):
            assert read_drawing(path, Ground(ground, read_volume(ground))).layers
        elif path.suffix == ".json":
            picture = seeds / "ground" / "a.png"
            assert len(read_drawing(path, Ground(picture, read_volume(picture))).layers) == 3
        else:
            assert read_volume(path).array.size > 100
