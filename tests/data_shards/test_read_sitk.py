from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813  # its users know it by this name
from scipy.spatial.transform import Rotation

from data_shards.errors import UserError
from data_shards.readers import read_mask, read_volume

SUFFIXES = [".nrrd", ".nhdr", ".mha", ".mhd"]


def save(path: Path, array: np.ndarray, packed: bool = False, **geometry: tuple[float, ...]) -> Path:
    """Write an array (z, y, x) or (y, x), or with channels (…, C)."""
    dimension = len(geometry["spacing"]) if "spacing" in geometry else min(array.ndim, 3)
    image = sitk.GetImageFromArray(array, isVector=array.ndim > dimension)
    image.SetSpacing(geometry.get("spacing", (0.5, 0.75, 2.0)[: image.GetDimension()]))
    image.SetOrigin(geometry.get("origin", (1.0, 2.0, 3.0)[: image.GetDimension()]))
    if "direction" in geometry:
        image.SetDirection(geometry["direction"])
    sitk.WriteImage(image, str(path), packed)
    return path


def numbers(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.int16).reshape(shape)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("packed", [False, True])
def test_values_spacing_and_files(tmp_path: Path, suffix: str, packed: bool) -> None:
    path = save(tmp_path / f"a{suffix}", numbers(2, 3, 4), packed)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, numbers(2, 3, 4))
    assert volume.array.dtype == np.int16 and not volume.flat
    assert volume.spacing == (2.0, 0.75, 0.5)
    assert volume.affine is not None  # NIfTI's frame, whose x and y run the other way than SimpleITK's
    np.testing.assert_allclose(volume.affine, [[-0.5, 0, 0, -1], [0, -0.75, 0, -2], [0, 0, 2, 3], [0, 0, 0, 1]])
    others = set(tmp_path.iterdir()) - {path}
    assert volume.files == ((path, *others) if others else ())
    assert len(others) == (suffix in (".nhdr", ".mhd"))


def _directions() -> list[np.ndarray]:
    flips = [np.diag(signs) for signs in [(1, 1, 1), (1, -1, 1), (-1, -1, 1), (-1, 1, -1)]]
    axes = [np.eye(3)[[1, 2, 0]], np.eye(3)[[2, 1, 0]]]
    oblique = [Rotation.from_euler("xyz", angles, degrees=True).as_matrix() for angles in [(20, -30, 10), (95, 5, -80)]]
    return [*flips, *axes, *oblique, oblique[0] @ flips[1]]


@pytest.mark.parametrize("direction", _directions())
@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_the_same_place_as_nifti(tmp_path: Path, suffix: str, direction: np.ndarray) -> None:
    geometry = {
        "spacing": (0.5, 0.75, 2.0),
        "origin": (-20.0, 30.0, 7.0),
        "direction": tuple(map(float, direction.ravel())),
    }
    array = numbers(4, 5, 6)
    ours = read_volume(save(tmp_path / f"a{suffix}", array, **geometry))
    theirs = read_volume(save(tmp_path / "a.nii.gz", array, **geometry))
    np.testing.assert_array_equal(ours.array, theirs.array)
    assert ours.spacing == pytest.approx(theirs.spacing)
    assert ours.apart(theirs) < 1e-4  # NIfTI keeps 32 bits
    moved = read_volume(save(tmp_path / f"b{suffix}", array, **{**geometry, "origin": (-20.0, 30.0, 9.0)}))
    assert ours.apart(moved) == pytest.approx(2.0)


def test_orientation_is_what_simpleitk_makes_of_it(tmp_path: Path) -> None:
    direction = np.eye(3)[[2, 0, 1]] * [1, -1, 1]
    path = save(tmp_path / "a.nrrd", numbers(4, 5, 6), direction=tuple(direction.ravel()))
    oriented = sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS")
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(oriented))
    assert volume.spacing == oriented.GetSpacing()[::-1]


def test_2d_images_are_pictures(tmp_path: Path) -> None:
    grey = read_volume(save(tmp_path / "a.mha", numbers(3, 4)))
    assert grey.flat and grey.spacing == (1.0, 0.75, 0.5) and grey.affine is None
    np.testing.assert_array_equal(grey.array, numbers(3, 4)[np.newaxis])
    colours = read_volume(save(tmp_path / "b.nrrd", numbers(3, 4, 3).astype(np.uint8), spacing=(0.5, 0.75)))
    np.testing.assert_array_equal(colours.array, numbers(3, 4, 3)[np.newaxis])


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_channels(tmp_path: Path, suffix: str) -> None:
    geometry = {"spacing": (0.5, 0.75, 2.0), "direction": (0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0)}
    rgb = numbers(2, 3, 4, 3).astype(np.uint8)
    path = save(tmp_path / f"rgb{suffix}", rgb, **geometry)
    np.testing.assert_array_equal(read_volume(path).array, rgb.transpose(0, 2, 1, 3))  # x and y change places
    np.testing.assert_array_equal(read_mask(path).array, rgb.transpose(0, 2, 1, 3))
    five = numbers(2, 3, 4, 5)
    path = save(tmp_path / f"five{suffix}", five, **geometry)
    with pytest.raises(UserError, match=rf"five{suffix}: has 5 channels, of which an image takes one or three"):
        read_volume(path)
    with pytest.raises(UserError, match="has 5 channels"):
        read_mask(path, channels=[0])
    turned = five.transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(read_volume(path, channels=[4, 0, 2]).array, turned[..., [4, 0, 2]])
    np.testing.assert_array_equal(read_volume(path, channels=[3]).array, turned[..., 3])
    for wrong, text in [
        ([5], "no channel 5, only 0 to 4"),
        ([-1], "no channel -1"),
        ([0, 1], "one or three are needed"),
    ]:
        with pytest.raises(UserError, match=text):
            read_volume(path, channels=wrong)


def test_time_series_are_refused(tmp_path: Path) -> None:
    image = sitk.JoinSeries([sitk.GetImageFromArray(numbers(2, 3, 4))] * 3)
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    with pytest.raises(UserError, match=r"a\.nrrd: has 4 dimensions \(4, 3, 2, 3\), as a time series has"):
        read_volume(tmp_path / "a.nrrd")


def test_spacing_that_is_not_in_the_header(tmp_path: Path) -> None:
    values = numbers(2, 3, 4).tobytes()
    header = b"NRRD0004\ntype: short\ndimension: 3\nsizes: 4 3 2\nendian: little\nencoding: raw\n"
    (tmp_path / "a.nrrd").write_bytes(header + b"\n" + values)
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nrrd").array, numbers(2, 3, 4))
    assert read_volume(tmp_path / "a.nrrd").spacing is None
    (tmp_path / "b.nrrd").write_bytes(header + b"spacings: 0.5 0.75 2\n\n" + values)
    assert read_volume(tmp_path / "b.nrrd").spacing == (2.0, 0.75, 0.5)
    meta = b"ObjectType = Image\nNDims = 3\nDimSize = 4 3 2\nElementType = MET_SHORT\n"
    (tmp_path / "a.mha").write_bytes(meta + b"ElementDataFile = LOCAL\n" + values)
    assert read_volume(tmp_path / "a.mha").spacing is None
    (tmp_path / "b.mha").write_bytes(meta + b"ElementSpacing = 0.5 0.75 2\nElementDataFile = LOCAL\n" + values)
    assert read_volume(tmp_path / "b.mha").spacing == (2.0, 0.75, 0.5)


def _detached(folder: Path, suffix: str, name: str) -> Path:
    path = folder / f"a{suffix}"
    if suffix in (".mha", ".mhd"):
        text = f"ObjectType = Image\nNDims = 3\nDimSize = 4 3 2\nElementType = MET_SHORT\nElementDataFile = {name}\n"
    else:
        text = f"NRRD0004\ntype: short\ndimension: 3\nsizes: 4 3 2\nendian: little\nencoding: raw\ndata file: {name}\n"
    path.write_text(text)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_values_in_other_files(tmp_path: Path, suffix: str) -> None:
    array = numbers(2, 3, 4)
    (tmp_path / "a.raw").write_bytes(array.tobytes())
    for number in range(2):
        (tmp_path / f"s{number}.raw").write_bytes(array[number].tobytes())
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.raw").write_bytes(array.tobytes())
    pattern = "s%d.raw 0 1 1" + (" 2" if suffix in (".nrrd", ".nhdr") else "")
    listed = "LIST 2\ns0.raw\ns1.raw" if suffix in (".nrrd", ".nhdr") else "LIST\ns0.raw\ns1.raw"
    for name, files in [("a.raw", ["a.raw"]), ("in/a.raw", ["in/a.raw"])] + [
        (text, ["s0.raw", "s1.raw"]) for text in (pattern, listed)
    ]:
        path = _detached(tmp_path, suffix, name)
        volume = read_volume(path)
        np.testing.assert_array_equal(volume.array, array)
        assert volume.files == (path, *(tmp_path / file for file in files))
    path = _detached(tmp_path, suffix, "none.raw")
    with pytest.raises(UserError, match=rf"a\{suffix}: its values are in 'none\.raw', which is not beside it"):
        read_volume(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("how", ["/{}", "../{}", "in/../../{}", "C:\\{}", "..\\{}", "~/{}"])
def test_values_outside_the_folder_are_refused(tmp_path: Path, suffix: str, how: str) -> None:
    secret = tmp_path / "secret.raw"
    secret.write_bytes(numbers(2, 3, 4).tobytes())
    folder = tmp_path / "data"
    (folder / "in").mkdir(parents=True)
    name = how.format(str(secret).lstrip("/") if how == "/{}" else secret.name)
    for text in (name, f"LIST\n{name}", f"LIST\nok.raw\n{name}"):
        with pytest.raises(UserError, match="outside its folder"):
            read_volume(_detached(folder, suffix, text))


def test_a_second_place_of_the_values_is_not_overlooked(tmp_path: Path) -> None:
    secret = tmp_path / "secret.raw"
    secret.write_bytes(numbers(2, 3, 4).tobytes())
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "b").write_bytes(secret.read_bytes())
    for before in ("Comment = x\r", "  ", "elementdatafile = b\n", "\v"):
        path = _detached(folder, ".mha", "LOCAL")
        text = path.read_text().replace("ElementDataFile", f"{before}ElementDataFile = {secret}\nElementDataFile")
        path.write_bytes(text.encode() + secret.read_bytes())
        with pytest.raises(UserError, match=r"outside its folder|no 'ElementDataFile'"):
            read_volume(path)
    for field in ("datafile", "Data File", " data file"):
        path = _detached(folder, ".nrrd", f"a.raw\n{field}: {secret}")
        with pytest.raises(UserError, match="says twice where its values are"):
            read_volume(path)


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "packed.nrrd", "packed.mha", "a.nhdr", "a.mhd", "packed.mhd"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_files_that_are_cut_off(tmp_path: Path, name: str, keep: float, capfd: pytest.CaptureFixture[str]) -> None:
    array = np.random.default_rng(0).integers(0, 60, (20, 30, 40)).astype(np.int16)
    path = save(tmp_path / name, array, name.startswith("packed"))
    (data,) = set(tmp_path.iterdir()) - {path} or {path}
    data.write_bytes(data.read_bytes()[: int(data.stat().st_size * keep)])
    with pytest.raises(UserError) as caught:
        read_volume(path)
    text = str(caught.value)
    assert (text.startswith(f"{path}: ") and "cut off" in text) or "is it complete?" in text or "no NRRD" in text
    assert "itk" not in text.lower() and "0x" not in text and ".cxx" not in text
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_damaged_compressed_values(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    array = np.random.default_rng(0).integers(0, 60, (20, 30, 40)).astype(np.int16)
    path = save(tmp_path / name, array, True)
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}: cannot be read, is it complete\?"):
        read_volume(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("size", ["", "CompressedDataSize = 300\n", "CompressedDataSize = 3x\n"])
def test_a_metaimage_with_a_wrong_length(tmp_path: Path, size: str, capfd: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "a.mha", np.random.default_rng(0).integers(0, 60, (20, 30, 40)).astype(np.int16), True)
    data = path.read_bytes()
    start = data.index(b"CompressedDataSize")
    path.write_bytes(data[:start] + size.encode() + data[data.index(b"\n", start) + 1 :])
    with pytest.raises(UserError, match=r"a\.mha: (cannot be read|its header does not say how long)"):
        read_volume(path)
    assert capfd.readouterr() == ("", "")


def test_compressed_metaimages_of_either_byte_order(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mhd", numbers(2, 3, 4).byteswap(), True)
    path.write_text(path.read_text().replace("OrderMSB = False", "OrderMSB = True"))
    np.testing.assert_array_equal(read_volume(path).array, numbers(2, 3, 4))


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_a_header_that_promises_too_much(tmp_path: Path, suffix: str) -> None:
    for packed in (False, True):
        path = save(tmp_path / f"a{suffix}", numbers(2, 3, 4), packed)
        path.write_bytes(path.read_bytes().replace(b"4 3 2\n", b"40000 30000 20000\n"))
        with pytest.raises(UserError, match=r"it holds \d+ bytes of the 48000000000000 it promises"):
            read_volume(path)


def test_other_formats_under_the_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    nifti = nibabel.Nifti1Image(numbers(4, 3, 2), np.eye(4)).to_bytes()
    for name, text in [("a.nrrd", "is no NRRD file"), ("a.mha", "is no MetaImage")]:
        (tmp_path / name).write_bytes(nifti)
        with pytest.raises(UserError, match=rf"{name}: {text}"):
            read_volume(tmp_path / name)
    (tmp_path / "b.nrrd").write_bytes(b"NRRD0004\ntype: nonsense\n\n")
    with pytest.raises(UserError, match=r"b\.nrrd: cannot be read, is it complete\? \(.*nonsense"):
        read_volume(tmp_path / "b.nrrd")
    assert capfd.readouterr() == ("", "")


def test_real_files(test_data: Path) -> None:
    for name, image, label, voxels in [
        ("mr_brain_tumor_nrrd", "brain1_image.nrrd", "brain1_label.nrrd", 4137),
        ("mr_breast_lesion_nrrd", "breast1_image.nrrd", "breast1_label.nrrd", 143),
    ]:
        volume, mask = read_volume(test_data / name / image), read_mask(test_data / name / label)
        assert (mask.array == 1).sum() == voxels and mask.array.any() and mask.array.shape == volume.array.shape
        assert volume.apart(mask) == 0.0 and volume.spacing == mask.spacing
    (record,) = [
        item
        for item in json.loads((test_data / "MANIFEST.json").read_text())["sets"]
        if item["name"] == "ct_liver_dicom_seg"
    ]
    for mask in record["pairs"][0]["masks"]:
        values, counts = np.unique(read_mask(test_data / "ct_liver_dicom_seg" / mask["file"]).array, return_counts=True)
        found = {str(value): int(count) for value, count in zip(values, counts, strict=True) if value}
        assert found == mask["label_voxels"]
