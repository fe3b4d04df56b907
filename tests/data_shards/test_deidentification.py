"""Whatever a DICOM header holds, a corpus holds none of it.

Each file gets a planted value in every attribute that the library's dictionary knows, which is more than the profile of
PS3.15 lists: names, identifiers, dates, times, ages, texts, codes, bytes. The corpus is then searched, byte by byte.
"""

from __future__ import annotations

import io
import json
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
import yaml
from pydicom import DataElement, Dataset
from pydicom._dicom_dict import DicomDictionary
from toy_dicom import make_rtstruct, make_seg, make_series, save, toy_array

from data_shards.build import build
from data_shards.verify import verify

SHAPE = (4, 12, 10)
WORD = "PLANTED"
PLANTED = {
    **dict.fromkeys(("AE", "CS", "LO", "LT", "SH", "ST", "UC", "UT"), WORD),
    "PN": f"{WORD}^NAME",
    "UR": f"http://{WORD}.example",
    "DA": "18630117",
    "DT": "18630117134757.918273",
    "TM": "134757.918273",
    "AS": "097Y",
    "DS": "918273.645",
    "IS": "918273645",
    "UI": "1.2.826.918273.645.1",
    **dict.fromkeys(("OB", "OW", "UN"), WORD.encode() + b"!"),
}
MARKS = (b"planted", b"18630117", b"134757", b"097y", b"918273")

STRUCTURE = {
    "SpecificCharacterSet",
    "SOPClassUID",
    "Modality",
    "ImageType",
    "NumberOfFrames",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "SegmentationType",
    "SegmentationFractionalType",
}
"""What tells how to read a file, beside the groups of the pixels, segments and contours."""

NESTED = (0x0008, 0x0010, 0x0012, 0x0032, 0x0038, 0x0040)
"""Groups whose sequences get an item, but for what a segmentation needs."""


def plant(dataset: Dataset) -> int:
    """Put planted values into a data set; return how many."""
    planted = 0
    for tag, (kind, _, _, _, keyword) in DicomDictionary.items():
        group = tag >> 16
        if keyword in STRUCTURE or group in (0x0000, 0x0002, 0x0004, 0x5400, 0x7FE0, 0xFFFC, 0xFFFE) or not keyword:
            continue
        if group in (0x0028, 0x0062, 0x3006) and (tag in dataset or kind in ("DS", "IS", "CS", "OB", "OW")):
            continue
        kind = kind.partition(" ")[0]
        if kind in PLANTED:
            dataset[tag] = DataElement(tag, kind, PLANTED[kind])
            planted += 1
        elif kind == "SQ" and group in NESTED and tag not in dataset:
            item = Dataset()
            item.PatientName, item.PatientID, item.StudyDate = PLANTED["PN"], PLANTED["LO"], PLANTED["DA"]
            item.ReferencedSOPInstanceUID = PLANTED["UI"]
            dataset[tag] = DataElement(tag, "SQ", [item])
            planted += 4
    for group in (0x0009, 0x0019, 0x0029, 0x0051):
        block = dataset.private_block(group, f"{WORD} CREATOR", create=True)
        block.add_new(0x01, "LO", WORD)
        block.add_new(0x02, "OB", WORD.encode() + b"!")
        planted += 3
    dataset.file_meta.SourceApplicationEntityTitle = WORD
    dataset.file_meta.ImplementationVersionName = WORD
    dataset.preamble = (WORD.encode() * 20)[:128]
    return planted


def write_case(folder: Path, number: int) -> None:
    """A series, a segmentation and contours of one patient, all planted."""
    sources = make_series(toy_array(SHAPE, number))
    mask = np.zeros((*SHAPE, 1), np.uint8)
    mask[1:3, 3:8, 2:7] = 1
    first = np.array(sources[2].ImagePositionPatient, float)
    corners = first + np.array([[0.7, 1, 0], [3.3, 1, 0], [3.3, 5, 0], [0.7, 5, 0]])
    seg = make_seg(sources, mask)
    contours = make_rtstruct([("lesion", [("CLOSED_PLANAR", corners)])], frame=PLANTED["UI"])
    for index, dataset in enumerate([*sources, seg, contours]):
        assert plant(dataset) > 2500
        # Patients differ by their identifier alone.
        dataset.PatientID = f"{WORD} {number}"
        name = "seg.dcm" if dataset is seg else "rs.dcm" if dataset is contours else f"ct/{index}.dcm"
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"{PLANTED['UI']}.{number}.{index}"
        save(dataset, folder / f"{WORD}{number}" / name)


def write_spec(folder: Path, codec: str) -> Path:
    spec = {
        "dataset": "toy",
        "modality": "CT",
        "cases": [{"image": "{id}/ct", "mask": {"seg": "{id}/seg.dcm", "rs": "{id}/rs.dcm"}, "patient": "dicom"}],
        "targets": [
            {"term": "liver", "mask": "seg", "name": "part 1"},
            {"term": "liver lesion", "mask": "rs", "name": "lesion"},
        ],
        "intensity": {"kind": "window", "level": 40, "width": 400},
        "split": {"kind": "patients", "fractions": {"train": 0.5, "test": 0.5}, "seed": 0},
        "shards": {"codec": codec},
        "salt": f"{WORD} SALT",
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def contents(data: bytes, name: str) -> Iterator[tuple[str, bytes]]:
    """Yield what a file holds, and what is packed within it."""
    yield name, data
    if data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for item in archive.namelist():
                yield from contents(archive.read(item), f"{name}/{item}")
    elif name.endswith(".tar"):
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar.getmembers():
                file = tar.extractfile(member)
                assert file is not None
                yield f"{name}/{member.name}", repr((member.pax_headers, member.uname, member.gname)).encode()
                yield from contents(file.read(), f"{name}/{member.name}")
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        yield from chunks(data, name)
    elif data[:4] == b"\x28\xb5\x2f\xfd":
        import zstandard

        yield f"{name} unpacked", zstandard.ZstdDecompressor().decompressobj().decompress(data)


def chunks(data: bytes, name: str) -> Iterator[tuple[str, bytes]]:
    place, pixels = 8, b""
    while place < len(data):
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        assert kind in (b"IHDR", b"IDAT", b"IEND"), f"{name}: chunk {kind!r}"
        pixels += data[place + 8 : place + 8 + size] if kind == b"IDAT" else b""
        place += size + 12
    yield f"{name} pixels", zlib.decompress(pixels)


def search(folder: Path) -> list[str]:
    """Return where marks occur, in names too."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        for place, data in contents(path.read_bytes(), name) if path.is_file() else [(name, b"")]:
            text = place.lower().encode() + b"\n" + data.lower()
            found += [f"{mark!r} in {place}" for mark in MARKS if mark in text]
    return found


def test_search_finds_what_is_hidden(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.npz")
    buffer = io.BytesIO()
    np.savez_compressed(buffer, a=np.frombuffer(b"x" * 50 + b"18630117", np.uint8))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info.size = buffer.tell()
        buffer.seek(0)
        tar.addfile(info, buffer)
    assert search(tmp_path) == ["b'18630117' in a.tar/a.npz/a.npy"]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two patients, in folders whose names are planted too."""
    folder = tmp_path_factory.mktemp("planted")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some planted values are longer than they may be
        for number in range(2):
            write_case(folder, number)
    return folder


@pytest.mark.parametrize("codec", ["png", "zstd"])
def test_no_header_reaches_a_corpus(
    planted: Path, tmp_path: Path, codec: str, capfd: pytest.CaptureFixture[str]
) -> None:
    example = pydicom.dcmread(planted / f"{WORD}0" / "ct" / "1.dcm")
    assert example.PatientName == PLANTED["PN"] and example.SeriesInstanceUID == PLANTED["UI"]
    result = build(write_spec(planted, codec), tmp_path / "out")
    assert verify(tmp_path / "out").problems == []
    splits = result.manifest["splits"]
    assert sum(split["targets"]["liver"] for split in splits.values()) == 4
    assert sum(split["targets"]["liver lesion"] for split in splits.values()) == 2
    assert {name: split["patients"] for name, split in splits.items()} == {"train": 1, "test": 1}
    assert search(tmp_path / "out") == []
    said = "".join(capfd.readouterr()) + json.dumps(result.warnings)
    assert not [mark for mark in MARKS if mark.decode() in said.lower()]
