from __future__ import annotations

import builtins
import gzip
import json
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from data_shards.errors import UserError
from data_shards.readers import Ground, Volume, check_options, images, read_drawing, read_mask, read_volume

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
RGB = np.stack([GREY, GREY[::-1], 255 - GREY], axis=-1)


def save(path: Path, array: np.ndarray, **options: Any) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


def of_palette(path: Path, indices: np.ndarray, colours: dict[int, tuple[int, int, int]], **options: Any) -> Path:
    image = Image.fromarray(indices)
    image.putpalette([part for number in range(256) for part in colours.get(number, (0, 0, 0))])
    image.save(path, **options)
    return path


def same(volume: Volume, array: np.ndarray) -> None:
    assert volume.flat and volume.spacing is None and volume.affine is None
    assert volume.array.dtype == array.dtype
    np.testing.assert_array_equal(volume.array, array)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".gif", ".pgm", ".tif", ".tiff", ".PNG"])
def test_grey(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a{suffix}", GREY)
    same(read_volume(path), GREY[np.newaxis])
    same(read_mask(path), GREY[np.newaxis])


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".ppm", ".tif"])
def test_colours(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a{suffix}", RGB)
    same(read_volume(path), RGB[np.newaxis])
    same(read_mask(path), RGB[np.newaxis])
    same(read_volume(path, channels=[1]), RGB[np.newaxis, ..., 1])
    same(read_volume(path, channels=[2, 0, 1]), RGB[np.newaxis][..., [2, 0, 1]])
    with pytest.raises(UserError, match="grey: the picture has colours"):
        read_volume(path, grey=True)


def test_resolution_is_not_trusted(tmp_path: Path) -> None:
    assert read_volume(save(tmp_path / "a.png", GREY, dpi=(72, 72))).spacing is None
    assert read_volume(save(tmp_path / "a.tif", GREY, dpi=(72, 72))).spacing is None


@pytest.mark.parametrize("dtype", ["uint16", "int16", "int32", "uint32", "float32", ">u2", ">i2", ">i4", ">u4", ">f4"])
@pytest.mark.parametrize("packed", [None, "zlib"])
def test_tiff_keeps_its_dtype(tmp_path: Path, dtype: str, packed: str | None) -> None:
    kind = np.dtype(dtype)
    most = np.iinfo(kind).max if kind.kind in "iu" else 1e30
    array = np.array([[0, 1, most], [7, 300, most // 2]], dtype)
    tifffile.imwrite(tmp_path / "a.tif", array, compression=packed, byteorder=dtype[0] if dtype[0] == ">" else "<")
    same(read_volume(tmp_path / "a.tif"), array.astype(kind.newbyteorder("="))[np.newaxis])


@pytest.mark.parametrize("dtype", ["float64", "float16", "uint64", "int8"])
def test_tiff_of_types_that_pillow_does_not_know(tmp_path: Path, dtype: str) -> None:
    tifffile.imwrite(tmp_path / "a.tif", GREY.astype(dtype))
    same(read_volume(tmp_path / "a.tif"), GREY.astype(dtype)[np.newaxis])


def test_16_bit_png(tmp_path: Path) -> None:
    labels = np.array([[0, 1, 300], [65535, 2, 1]], np.uint16)
    same(read_mask(save(tmp_path / "a.png", labels)), labels[np.newaxis])


PNG = b"\x89PNG\r\n\x1a\n"


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png_16_bit_rgb(path: Path, colours: int) -> Path:
    channels = {2: 3, 4: 2, 6: 4}[colours]
    rows = (b"\0" + bytes(2 * channels * 5)) * 3
    header = chunk(b"IHDR", struct.pack(">2I5B", 5, 3, 16, colours, 0, 0, 0))
    path.write_bytes(PNG + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("colours", [2, 4, 6])
def test_colours_of_16_bits_in_png_are_refused(tmp_path: Path, colours: int) -> None:
    with pytest.raises(UserError, match=r"a\.png: has 16 bits for each colour, of which 8 would be lost: save it as T"):
        read_volume(_png_16_bit_rgb(tmp_path / "a.png", colours))


@pytest.mark.parametrize("suffix", [".png", ".pbm", ".tif", ".bmp"])
def test_black_and_white(tmp_path: Path, suffix: str) -> None:
    inside = GREY > 100
    Image.fromarray(inside).save(tmp_path / f"a{suffix}")
    assert Image.open(tmp_path / f"a{suffix}").mode == "1"
    same(read_mask(tmp_path / f"a{suffix}"), np.where(inside, np.uint8(255), np.uint8(0))[np.newaxis])


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_tiff_whose_zero_is_white(tmp_path: Path, dtype: str) -> None:
    array = GREY.astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="miniswhite")
    same(read_volume(tmp_path / "a.tif"), (np.iinfo(dtype).max - array)[np.newaxis])


@pytest.mark.parametrize("suffix", [".png", ".gif", ".tif", ".bmp"])
def test_palettes(tmp_path: Path, suffix: str) -> None:
    indices = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    colours = {0: (0, 0, 0), 1: (250, 0, 0), 2: (7, 7, 7)}
    path = of_palette(tmp_path / f"a{suffix}", indices, colours)
    shown = np.array([colours[number] for number in range(3)], np.uint8)[indices]
    same(read_volume(path), shown[np.newaxis])
    same(read_mask(path), shown[np.newaxis])
    same(read_mask(path, palette="index"), indices[np.newaxis])
    same(read_volume(path, palette="index"), shown[np.newaxis])  # of masks only


def test_a_palette_of_greys_is_grey_even_if_inverted(tmp_path: Path) -> None:
    indices = np.array([[0, 255, 255], [255, 0, 0]], np.uint8)
    path = of_palette(tmp_path / "a.png", indices, {number: (255 - number,) * 3 for number in range(256)})
    same(read_mask(path), 255 - indices[np.newaxis])
    same(read_volume(path), 255 - indices[np.newaxis])
    same(read_mask(path, palette="index"), indices[np.newaxis])
    (layer,) = read_drawing(path, Ground(path, read_volume(path))).layers
    assert layer.name == "a"
    np.testing.assert_array_equal(layer.values, 255 - indices[np.newaxis])


def test_transparent_images(tmp_path: Path) -> None:
    opaque = np.dstack([RGB, np.full_like(GREY, 255)])
    same(read_volume(save(tmp_path / "a.png", opaque)), RGB[np.newaxis])
    clear = opaque.copy()
    clear[0, 0, 3] = 254
    save(tmp_path / "b.png", clear)
    with pytest.raises(UserError, match=r"b\.png: is transparent in places.*alpha: drop"):
        read_volume(tmp_path / "b.png")
    same(read_volume(tmp_path / "b.png", alpha="drop"), RGB[np.newaxis])
    save(tmp_path / "c.png", np.dstack([GREY, 255 - GREY]))
    with pytest.raises(UserError, match=r"c\.png: is transparent in places"):
        read_volume(tmp_path / "c.png")
    same(read_volume(tmp_path / "c.png", alpha="drop"), GREY[np.newaxis])


def test_what_is_transparent_in_a_mask_is_background(tmp_path: Path) -> None:
    alpha = np.where(GREY > 100, np.uint8(128), np.uint8(0))
    expected = np.where(GREY > 100, GREY, np.uint8(0))[np.newaxis]
    same(read_mask(save(tmp_path / "a.png", np.dstack([GREY, alpha]))), expected)
    same(read_mask(save(tmp_path / "b.png", np.dstack([GREY, GREY, GREY, alpha]))), expected)
    colours = np.where((GREY > 100)[..., np.newaxis], RGB, np.uint8(0))[np.newaxis]
    same(read_mask(save(tmp_path / "c.png", np.dstack([RGB, alpha]))), colours)
    same(read_mask(save(tmp_path / "c.tif", np.dstack([RGB, alpha]))), colours)


@pytest.mark.parametrize("depth", ["uint8", "uint16"])
def test_one_transparent_value(tmp_path: Path, depth: str) -> None:
    grey = GREY.astype(depth) + np.array(1, depth)
    save(tmp_path / "a.png", grey, transparency=int(grey[1, 1]))
    with pytest.raises(UserError, match="is transparent in places"):
        read_volume(tmp_path / "a.png")
    same(read_volume(tmp_path / "a.png", alpha="drop"), grey[np.newaxis])
    same(read_mask(tmp_path / "a.png"), np.where(grey == grey[1, 1], np.array(0, depth), grey)[np.newaxis])


def test_transparent_palettes_and_colours(tmp_path: Path) -> None:
    save(tmp_path / "a.png", RGB, transparency=tuple(RGB[0, 0].tolist()))
    expected = RGB.copy()
    expected[0, 0] = 0
    same(read_mask(tmp_path / "a.png"), expected[np.newaxis])
    indices = np.array([[0, 1], [2, 1]], np.uint8)
    of_palette(tmp_path / "b.png", indices, {0: (9, 0, 0), 1: (0, 250, 0), 2: (3, 3, 3)}, transparency=0)
    same(read_mask(tmp_path / "b.png"), np.array([[[[0, 0, 0], [0, 250, 0]], [[3, 3, 3], [0, 250, 0]]]], np.uint8))
    same(read_mask(tmp_path / "b.png", palette="index"), indices[np.newaxis])


def test_grey_stored_as_colours(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.dstack([GREY] * 3))
    same(read_volume(path), np.dstack([GREY] * 3)[np.newaxis])
    same(read_volume(path, grey=True), GREY[np.newaxis])
    same(read_mask(path), GREY[np.newaxis])


def test_jpeg_in_its_colour_spaces(tmp_path: Path) -> None:
    smooth = np.zeros((16, 16, 3), np.uint8) + np.array([200, 40, 90], np.uint8)
    Image.fromarray(smooth).save(tmp_path / "rgb.jpg", quality=95)
    Image.fromarray(smooth).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    for name in ("rgb.jpg", "cmyk.jpg"):
        volume = read_volume(tmp_path / name)
        assert volume.array.shape == (1, 16, 16, 3)
        assert np.abs(volume.array.astype(int) - [200, 40, 90]).max() <= 4
    Image.fromarray(smooth[..., 0]).save(tmp_path / "grey.jpeg")
    assert read_volume(tmp_path / "grey.jpeg").array.shape == (1, 16, 16)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation(tmp_path: Path, suffix: str, turn: int) -> None:
    wide = np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40, np.ones((8, 8), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = turn
    path = save(tmp_path / f"a{suffix}", wide, exif=exif, **({"quality": 100} if suffix == ".jpg" else {}))
    if turn == 1:
        assert read_volume(path).array.shape == (1, 16, 24)
        return
    for role in (read_volume, read_mask):
        with pytest.raises(UserError, match=rf"turn it on the screen \(orientation {turn}\).*apply.*ignore"):
            role(path)
        ignored, applied = role(path, orientation="ignore").array[0], role(path, orientation="apply").array[0]
        assert np.abs(ignored.astype(int) - wide).max() <= 1
        moves = {2: wide[:, ::-1], 3: wide[::-1, ::-1], 4: wide[::-1], 5: wide.T, 6: np.rot90(wide, -1)}
        moves |= {7: wide[::-1, ::-1].T, 8: np.rot90(wide)}
        assert applied.shape == moves[turn].shape
        assert np.abs(applied.astype(int) - moves[turn]).max() <= 1


def test_pages_are_slices(tmp_path: Path) -> None:
    stack = np.random.default_rng(0).integers(0, 60000, (4, 5, 6)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack")
    same(read_volume(tmp_path / "a.tif"), stack)
    same(read_mask(tmp_path / "a.tif"), stack)
    frames = [Image.fromarray(frame.astype(np.uint8)) for frame in stack // 256]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_volume(tmp_path / "a.gif").array.shape[0] == 4
    np.testing.assert_array_equal(read_mask(tmp_path / "a.gif").array, (stack // 256).astype(np.uint8))


def test_pages_that_differ(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(GREY, photometric="minisblack")
        file.write(RGB, photometric="rgb")
    same(read_volume(tmp_path / "a.tif"), np.stack([np.dstack([GREY] * 3), RGB]))
    with tifffile.TiffWriter(tmp_path / "b.tif") as file:
        file.write(GREY)
        file.write(GREY.astype(np.uint16))
    with pytest.raises(UserError, match=r"b\.tif: its pages hold different kinds of numbers"):
        read_volume(tmp_path / "b.tif")


@pytest.mark.parametrize("marked", [True, False])
def test_levels_of_a_pyramid(tmp_path: Path, marked: bool) -> None:
    large = np.arange(64, dtype=np.uint8).reshape(8, 8)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for number in range(3):
            file.write(large[:: 2**number, :: 2**number], subfiletype=int(marked and number > 0))
    path = tmp_path / "a.tif"
    for level in range(3):
        same(read_mask(path, level=level), large[np.newaxis, :: 2**level, :: 2**level])
    if marked:
        same(read_mask(path), large[np.newaxis])
    else:
        with pytest.raises(UserError, match=r"its pages differ in size \(8 x 8, 4 x 4, 2 x 2\): choose one"):
            read_mask(path)
    with pytest.raises(UserError, match="there is no level 3, only 0 to 2"):
        read_mask(path, level=3)
    same(read_mask(save(tmp_path / "b.png", GREY), level=3), GREY[np.newaxis])


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("packed", [None, "zlib"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_tiff_with_many_channels(tmp_path: Path, planar: str, packed: str | None, dtype: str) -> None:
    array = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (7, 8, 5)).astype(dtype)
    stored = array if planar == "contig" else array.transpose(2, 0, 1)
    tifffile.imwrite(
        tmp_path / "a.tif", stored, photometric="minisblack", planarconfig=planar, compression=packed, metadata=None
    )
    with pytest.raises(UserError, match=r"a\.tif: has 5 channels, of which an image takes one or three"):
        read_volume(tmp_path / "a.tif")
    same(read_volume(tmp_path / "a.tif", channels=[0, 2, 1]), array[np.newaxis][..., [0, 2, 1]])
    same(read_volume(tmp_path / "a.tif", channels=[4]), array[np.newaxis, ..., 4])
    with pytest.raises(UserError, match=r"a\.tif: the mask has 5 channels"):
        read_mask(tmp_path / "a.tif")


def test_colours_of_16_bits_and_more_channels_than_colours(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 65535, (7, 8, 5)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", array[..., :3], photometric="rgb")
    same(read_volume(tmp_path / "a.tif"), array[np.newaxis, ..., :3])
    tifffile.imwrite(tmp_path / "b.tif", array.astype(np.uint8), photometric="rgb", extrasamples=[0, 0])
    with pytest.raises(UserError, match=r"b\.tif: has 5 channels"):  # Pillow would read red, green and blue
        read_volume(tmp_path / "b.tif")


def test_channels_in_pages(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 65535, (4, 2, 6, 7)).astype(np.uint16)  # (z, channel, y, x)
    tifffile.imwrite(tmp_path / "imagej.tif", array, imagej=True, metadata={"axes": "ZCYX"})
    tifffile.imwrite(tmp_path / "ome.tif", array, ome=True, metadata={"axes": "ZCYX"})
    for name in ("imagej.tif", "ome.tif"):
        with pytest.raises(UserError, match=rf"{name}: has 2 channels"):
            read_volume(tmp_path / name)
        same(read_volume(tmp_path / name, channels=[1]), array[:, 1])
    tifffile.imwrite(tmp_path / "stack.tif", array[:, 0], imagej=True, metadata={"axes": "ZYX"})
    same(read_volume(tmp_path / "stack.tif"), array[:, 0])
    tifffile.imwrite(tmp_path / "time.tif", array[:, 0], imagej=True, metadata={"axes": "TYX"})
    with pytest.raises(UserError, match=r"time\.tif: has 4 points in time"):
        read_volume(tmp_path / "time.tif")


def test_what_needs_tifffile_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((7, 8, 5)), photometric="minisblack", planarconfig="contig")
    load = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name == "tifffile":
            raise ImportError
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"a\.tif: .*\(kind of pixels\).*pip install tifffile"):
        read_volume(tmp_path / "a.tif")


def test_orientation_of_many_channels(tmp_path: Path) -> None:
    five = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    tifffile.imwrite(
        tmp_path / "a.tif", five, photometric="minisblack", planarconfig="contig", extratags=[(274, 3, 1, 3, True)]
    )
    with pytest.raises(UserError, match=r"a\.tif: its tags turn it on the screen \(orientation 3\).*ignore"):
        read_volume(tmp_path / "a.tif", channels=[1])
    same(read_volume(tmp_path / "a.tif", channels=[1], orientation="ignore"), five[np.newaxis, ..., 1])


def test_channels_of_a_grey_picture(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", GREY)
    same(read_volume(path, channels=[0]), GREY[np.newaxis])
    with pytest.raises(UserError, match="channels: the picture is grey"):
        read_volume(path, channels=[0, 1, 2])


def test_netpbm_numbers_are_not_stretched(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 3 2 20\n" + bytes([0, 1, 2, 18, 19, 20]))
    same(read_mask(tmp_path / "a.pgm"), np.array([[[0, 1, 2], [18, 19, 20]]], np.uint8))
    (tmp_path / "b.pgm").write_bytes(b"P2 3 1 4095\n0 1 4095\n")
    same(read_volume(tmp_path / "b.pgm"), np.array([[[0, 1, 4095]]], np.uint16))
    (tmp_path / "c.pgm").write_bytes(b"P5 2 1 65535\n" + np.array([1, 65535], ">u2").tobytes())
    same(read_volume(tmp_path / "c.pgm"), np.array([[[1, 65535]]], np.uint16))


def test_gzipped_netpbm(tmp_path: Path) -> None:
    data = save(tmp_path / "a.ppm", RGB).read_bytes()
    (tmp_path / "a.ppm.gz").write_bytes(gzip.compress(data))
    same(read_volume(tmp_path / "a.ppm.gz"), RGB[np.newaxis])
    packed = bytearray(gzip.compress(data))
    packed[-6] ^= 0xFF  # the checksum
    (tmp_path / "a.ppm.gz").write_bytes(packed)
    with pytest.raises(UserError, match=r"a\.ppm\.gz: cannot be read, is it complete\?.*CRC"):
        read_volume(tmp_path / "a.ppm.gz")
    (tmp_path / "a.ppm.gz").write_bytes(gzip.compress(data)[:-9])
    with pytest.raises(UserError, match=r"a\.ppm\.gz: cannot be read"):
        read_volume(tmp_path / "a.ppm.gz")


def test_a_gzip_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    (tmp_path / "a.pgm.gz").write_bytes(gzip.compress(bytes(10_000)))
    with pytest.raises(UserError, match=r"a\.pgm\.gz: holds more than 6000 bytes"):
        read_volume(tmp_path / "a.pgm.gz")


def test_larger_than_pillow_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: Any) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)  # Pillow warns above it, and refuses twice of it
    same(read_volume(save(tmp_path / "a.png", GREY)), GREY[np.newaxis])
    tifffile.imwrite(tmp_path / "a.tif", np.stack([GREY] * 5), photometric="minisblack", compression="zlib")
    assert read_volume(tmp_path / "a.tif").array.shape == (5, 3, 4)
    assert Image.MAX_IMAGE_PIXELS == 5 and not recwarn.list
    monkeypatch.setattr(images, "MAX_PIXELS", 59)
    with pytest.raises(UserError, match=r"a\.tif: has 60 pixels, more than 59: cut it into pieces"):
        read_volume(tmp_path / "a.tif")
    five = np.zeros((6, 10, 5), np.uint8)
    tifffile.imwrite(tmp_path / "b.tif", five, photometric="minisblack", planarconfig="contig")
    with pytest.raises(UserError, match=r"b\.tif: has 60 pixels, more than 59"):
        read_volume(tmp_path / "b.tif", channels=[0])


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    header = struct.pack(">2I5B", 2**16, 2**15, 8, 0, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(PNG + chunk(b"IHDR", header) + chunk(b"IDAT", b""))
    with pytest.raises(UserError, match=r"a\.png: has 2147483648 pixels, more than 1073741824"):
        read_volume(tmp_path / "a.png")


def test_pillows_limit_stays_in_other_threads_and_after(tmp_path: Path) -> None:
    before = Image.MAX_IMAGE_PIXELS
    path = save(tmp_path / "a.png", np.zeros((300, 300), np.uint8))
    threads = [threading.Thread(target=lambda: [read_volume(path) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.gif", "a.ppm", "a.tif", "packed.tif", "many.tif"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.9])
def test_files_that_are_cut_off(tmp_path: Path, name: str, keep: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 5)).astype(np.uint8)
    path = tmp_path / name
    if name == "many.tif":
        tifffile.imwrite(path, noise, photometric="minisblack", planarconfig="contig", compression="zlib")
    elif name == "packed.tif":
        Image.fromarray(noise[..., :3]).save(path, compression="tiff_lzw")
    else:
        save(path, noise[..., 0] if name == "a.gif" else noise[..., :3])
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(UserError, match=rf"{name}: (cannot be read, is it complete\?|is no picture, or is damaged)"):
        read_volume(path, **({"channels": [0]} if name == "many.tif" else {}))


def test_other_formats_under_the_name(tmp_path: Path) -> None:
    save(tmp_path / "a.png", RGB)
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.png").read_bytes())
    same(read_volume(tmp_path / "a.jpg"), RGB[np.newaxis])  # a PNG is harmless
    (tmp_path / "b.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    with pytest.raises(UserError, match=r"b\.png: is no picture, or is damaged: none of PNG, JPEG"):
        read_volume(tmp_path / "b.png")


def test_options_are_checked(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", GREY)
    check_options(path, [path], {"channels": [0, 2, 1], "palette": "index", "level": 2, "grey": True, "alpha": "drop"})
    for wrong in ({"channels": 3}, {"palette": "raw"}, {"alpha": True}, {"level": "2"}, {"orientation": "turn"}):
        with pytest.raises(UserError, match=rf"reader\.{next(iter(wrong))}: expected"):
            check_options(path, [path], wrong)


@pytest.mark.parametrize(
    "name",
    ["xray_chest_montgomery_png", "dermoscopy_ham10000_jpg", "fundus_chasedb1_jpg", "endoscopy_kvasir_polyp_jpg"],
)
def test_real_masks_above_127(test_data: Path, name: str) -> None:
    (record,) = [item for item in json.loads((test_data / "MANIFEST.json").read_text())["sets"] if item["name"] == name]
    assert record["pairs"]
    for pair in record["pairs"]:
        image, mask = read_volume(test_data / name / pair["image"]), read_mask(test_data / name / pair["mask"])
        assert image.array.shape == (1, *pair["image_info"]["shape"])
        assert mask.array.shape == image.array.shape[:3]
        (area,) = pair["area_px"].values()
        assert (mask.array > 127).sum() == area


def test_real_membrane(test_data: Path) -> None:
    folder = test_data / "em_membrane_isbi2012_png"
    sets = json.loads((test_data / "MANIFEST.json").read_text())["sets"]
    (record,) = [item for item in sets if item["name"] == folder.name]
    for pair in record["pairs"]:
        mask = read_mask(folder / pair["mask"]).array
        assert (mask == 255).sum() == pair["area_px"]["neuron (intracellular area)"]
        assert (mask == 0).sum() == pair["area_px_value0_membrane"]


@pytest.mark.parametrize("name", ["pathology_nuclei_dsb2018_png", "microscopy_nuclei_dsb2018_png"])
def test_real_nuclei_in_a_file_each(test_data: Path, name: str) -> None:
    (record,) = [item for item in json.loads((test_data / "MANIFEST.json").read_text())["sets"] if item["name"] == name]
    for pair in record["pairs"][:3]:
        image = read_volume(test_data / name / pair["image"])
        assert image.array.shape == (1, *pair["image_info"]["shape"][:2], 3)  # all opaque
        masks = sorted((test_data / name / pair["masks_dir"]).glob("*.png"))
        assert len(masks) == pair["n_instances"]
        assert sum(int((read_mask(mask).array > 0).sum()) for mask in masks) == pair["area_px"]["cell nucleus"]


def test_real_16_bit_labels(test_data: Path) -> None:
    folder = test_data / "microscopy_nuclei_stardist_tif"
    sets = json.loads((test_data / "MANIFEST.json").read_text())["sets"]
    (record,) = [item for item in sets if item["name"] == folder.name]
    mask = read_mask(folder / "masks" / "mask2d.tif").array
    assert mask.dtype == np.uint16
    values, counts = np.unique(mask[mask > 0], return_counts=True)
    expected = record["pairs"][0]["masks"][0]["label_voxels"]
    assert {str(value): int(count) for value, count in zip(values, counts, strict=True)} == expected


def test_a_flipped_bit_of_a_png_is_no_other_picture(tmp_path: Path) -> None:
    """Pillow decodes past a wrong checksum: of a hundred flipped bits, a tenth gave other pixels without a word."""
    picture = np.random.default_rng(0).integers(0, 4, (40, 50)).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    sound = (tmp_path / "a.png").read_bytes()
    numbers = np.random.default_rng(1)
    refused = 0
    for _ in range(100):
        damaged = bytearray(sound)
        damaged[int(numbers.integers(8, len(sound)))] ^= 1 << int(numbers.integers(8))
        (tmp_path / "a.png").write_bytes(damaged)
        try:
            np.testing.assert_array_equal(read_volume(tmp_path / "a.png").array[0], picture)
        except UserError:
            refused += 1
    assert refused > 90
