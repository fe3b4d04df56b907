from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from toy import write_spec

from data_shards.build import build
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from data_shards.readers import files_of, read_mask, read_volume, slides

openslide = pytest.importorskip("openslide")

SIDE = 1024


def picture() -> np.ndarray:
    y, x = np.mgrid[:SIDE, : SIDE - 256].astype(np.uint16)
    return np.stack([x // 4, y // 4, (x + y) // 8], axis=-1).astype(np.uint8)


def pyramid(path: Path, levels: int = 3, **options: Any) -> Path:
    """Write a tiled pyramid, which OpenSlide reads whatever its suffix."""
    with tifffile.TiffWriter(path) as file:
        for number in range(levels):
            step = 2**number
            part = np.ascontiguousarray(picture()[::step, ::step])
            file.write(part, tile=(256, 256), photometric="rgb", subfiletype=int(number > 0), metadata=None, **options)
    return path


@pytest.mark.parametrize("suffix", [".svs", ".NDPI", ".mrxs", ".scn"])
def test_a_level(tmp_path: Path, suffix: str) -> None:
    path = pyramid(tmp_path / f"a{suffix}")
    for level in range(3):
        volume = read_volume(path, level=level)
        assert volume.flat and volume.affine is None and volume.array.dtype == np.uint8 and volume.files == ()
        np.testing.assert_array_equal(volume.array, picture()[np.newaxis, :: 2**level, :: 2**level])
    np.testing.assert_array_equal(read_volume(path).array, picture()[np.newaxis])
    for level in (3, -1):
        with pytest.raises(UserError, match=rf"a\{suffix}: level: there is no level {level}, only 0 to 2"):
            read_volume(path, level=level)


def test_bands_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slides, "_BAND", 100)
    np.testing.assert_array_equal(read_volume(pyramid(tmp_path / "a.svs")).array, picture()[np.newaxis])


def test_a_mask_is_a_picture_at_the_same_level(tmp_path: Path) -> None:
    slide, mask = pyramid(tmp_path / "a.svs"), pyramid(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_mask(mask, level=1).array, read_volume(slide, level=1).array)


def test_spacing(tmp_path: Path) -> None:
    path = pyramid(tmp_path / "a.svs")
    with openslide.OpenSlide(path) as slide:
        known = {"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.5"}
        assert slides._spacing(known, slide.level_downsamples[2]) == pytest.approx((1.0, 0.002, 0.001))
    for wrong in (
        {},
        {"openslide.mpp-x": "0.25"},
        *({**known, "openslide.mpp-x": x} for x in ("x", "0", "inf", "nan")),
    ):
        assert slides._spacing(wrong, 1.0) is None
    in_centimetres = pyramid(tmp_path / "b.svs", resolution=(40000, 20000), resolutionunit="CENTIMETER")
    assert read_volume(in_centimetres, level=1).spacing == pytest.approx((1.0, 0.001, 0.0005))


def test_a_large_level_is_read_window_by_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shards of a slide that is opened equal those of one that is read whole."""
    pyramid(tmp_path / "a.svs")
    mask = np.zeros((SIDE, SIDE - 256), np.uint8)
    mask[100:700, 200:500] = 1
    tifffile.imwrite(tmp_path / "m.tif", mask[::2, ::2])
    spec = {
        "dataset": "slides",
        "modality": "pathology",
        "cases": [{"image": "a.svs", "mask": "m.tif", "split": "train"}],
        "targets": [{"term": "tumor", "value": 1}],
        "reader": {"level": 1},
        "intensity": {"kind": "rgb"},
        "patches": {"size": 128, "stride": 96},
        "split": {"kind": "explicit"},
    }
    write_spec(tmp_path / "s.yaml", **spec)
    build(tmp_path / "s.yaml", tmp_path / "whole")
    monkeypatch.setattr(slides, "MAX_PIXELS", 1000)
    build(tmp_path / "s.yaml", tmp_path / "windows")
    for name in ("train/shard-000000.tar", "train/index.npz"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "windows" / name).read_bytes()
    triplet = ShardDataset(tmp_path / "windows" / "train")[3]
    top, left = triplet.provenance.patch
    np.testing.assert_array_equal(triplet.image, picture()[::2, ::2][top : top + 128, left : left + 128])
    for changes, message in (
        ({"patches": None}, r"a\.svs: has 384 x 512 pixels: cut it by patches: \{size: 1024\}"),
        ({"intensity": {"kind": "percentiles"}}, "is too large for intensity 'percentiles': say kind: rgb or none"),
    ):
        write_spec(tmp_path / "bad.yaml", **{**spec, **changes})
        with pytest.raises(UserError, match=message):
            build(tmp_path / "bad.yaml", tmp_path / "bad")


class _Slide:
    """Stands for a slide of which only a part was scanned."""

    def __init__(self, rgba: np.ndarray, **properties: str) -> None:
        self.rgba, self.properties = rgba, properties

    def read_region(self, place: tuple[int, int], level: int, size: tuple[int, int]) -> np.ndarray:
        (left, top), (width, height) = place, size
        return self.rgba[top : top + height, left : left + width]


def test_what_was_not_scanned_shows_the_background() -> None:
    rgba = np.array([[[10, 20, 30, 255], [0, 0, 0, 0], [100, 0, 200, 51]]], np.uint8)
    white = slides._pixels(_Slide(rgba), 0, 3, 1)
    assert white.tolist() == [[[10, 20, 30], [255, 255, 255], [224, 204, 244]]]
    grey = slides._pixels(_Slide(rgba, **{"openslide.background-color": "101010"}), 0, 3, 1)
    assert grey[0, 1].tolist() == [16, 16, 16]


def test_the_files_of_mrxs(tmp_path: Path) -> None:
    path = pyramid(tmp_path / "a.mrxs")
    (tmp_path / "a").mkdir()
    for name in ("Slidedat.ini", "Data0000.dat"):
        (tmp_path / "a" / name).write_bytes(b"x")
    files = read_volume(path, level=2).files
    assert files == (path, tmp_path / "a" / "Data0000.dat", tmp_path / "a" / "Slidedat.ini")


def test_files_that_are_no_slides(tmp_path: Path) -> None:
    (tmp_path / "a.svs").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"a\.svs: is no slide that OpenSlide knows, or is damaged"):
        read_volume(tmp_path / "a.svs")
    path = pyramid(tmp_path / "b.svs", compression="zlib")
    path.write_bytes(path.read_bytes()[:300_000])
    with pytest.raises(UserError, match=r"b\.svs: (is no slide that OpenSlide knows|cannot be read)"):
        read_volume(path)


def test_without_openslide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pyramid(tmp_path / "a.svs")
    load = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name == "openslide":
            raise ModuleNotFoundError
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"a\.svs: slides need OpenSlide: pip install openslide-python openslide-bin"):
        read_volume(path)


def test_the_files_beside_a_mirax_slide_are_its_own(tmp_path: Path) -> None:
    path = pyramid(tmp_path / "a.mrxs")
    assert files_of(path) == [path]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "Data0000.dat").touch()
    assert files_of(path) == [path, tmp_path / "a" / "Data0000.dat"]
    assert files_of(pyramid(tmp_path / "b.svs")) == [tmp_path / "b.svs"]
