from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import nibabel
import numpy as np
import pytest
from toy import LPS_AFFINE, save_nifti

from data_shards.errors import UserError
from data_shards.readers import read_mask, read_volume


def test_nifti_keeps_dtype_order_and_spacing(tmp_path: Path) -> None:
    array = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
    volume = read_volume(save_nifti(tmp_path / "a.nii.gz", array))
    assert volume.array.dtype == np.int16
    np.testing.assert_array_equal(volume.array, array)
    assert volume.spacing == (2.0, 0.75, 0.5)


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1), (1, -1, 1)])
def test_nifti_turns_any_orientation_to_lps(tmp_path: Path, axes: tuple[int, ...], signs: tuple[int, ...]) -> None:
    # World coordinates (RAS mm) of every voxel are stored as its value, whatever the file's axes.
    spacing = np.array([1.5, 2.0, 3.0])  # of world x, y, z
    affine = np.eye(4)
    affine[:3, :3] = 0
    for file_axis, world_axis in enumerate(axes):
        affine[world_axis, file_axis] = signs[file_axis] * spacing[world_axis]
    shape = (4, 5, 6)
    where = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1) @ affine[:3, :3].T
    volumes = []
    for world_axis in range(3):
        path = tmp_path / f"{world_axis}.nii"
        nibabel.save(nibabel.Nifti1Image(where[..., world_axis].astype(np.float32), affine), path)
        volumes.append(read_volume(path))
    right, front, up = (volume.array for volume in volumes)  # mm towards right (R+ is x+ in RAS), anterior, superior
    assert (np.diff(right, axis=2) == -1.5).all()  # columns go from the patient's right to left
    assert (np.diff(front, axis=1) == -2.0).all()  # rows go from anterior to posterior
    assert (np.diff(up, axis=0) == 3.0).all()  # slices go up
    assert volumes[0].spacing == (3.0, 2.0, 1.5)


def test_nifti_oblique_uses_the_nearest_axis(tmp_path: Path) -> None:
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ LPS_AFFINE[:3, :3]
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    volume = read_volume(save_nifti(tmp_path / "a.nii", array, affine))
    np.testing.assert_array_equal(volume.array, array)
    assert volume.spacing == pytest.approx((2.0, 0.75, 0.5))


def test_nifti_applies_a_scale_only_if_there_is_one(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), LPS_AFFINE)
    image.header.set_slope_inter(2.0, -10.0)
    nibabel.save(image, tmp_path / "scaled.nii")
    volume = read_volume(tmp_path / "scaled.nii")
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, np.arange(24).reshape(2, 3, 4).transpose(2, 1, 0) * 2.0 - 10.0)


def test_nifti_big_endian_and_trailing_axis(tmp_path: Path) -> None:
    array = np.arange(24, dtype=">i2").reshape(2, 3, 4, 1)
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    nibabel.save(nibabel.Nifti1Image(array, LPS_AFFINE, header), tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    assert volume.array.dtype == np.dtype("int16")
    np.testing.assert_array_equal(volume.array, array[..., 0].transpose(2, 1, 0))


def test_nifti_rgb(tmp_path: Path) -> None:
    pixels = np.zeros((2, 3, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    pixels["R"], pixels["B"] = 10, 30
    nibabel.save(nibabel.Nifti1Image(pixels, LPS_AFFINE), tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    assert volume.array.shape == (4, 3, 2, 3)
    assert volume.array[0, 0, 0].tolist() == [10, 0, 30]
    assert read_mask(tmp_path / "a.nii").array.shape == (4, 3, 2, 3)


def test_nifti_of_wrong_dimension_or_affine(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.zeros((2, 3, 4, 5), np.uint8), LPS_AFFINE), tmp_path / "4d.nii")
    with pytest.raises(UserError, match=r"4d\.nii: the image has shape \(2, 3, 4, 5\)"):
        read_volume(tmp_path / "4d.nii")
    with pytest.raises(UserError, match="there is no channel 5, only 0 to 4"):
        read_volume(tmp_path / "4d.nii", channels=[5])
    several = np.arange(120, dtype=np.uint8).reshape(2, 3, 4, 5)
    nibabel.save(nibabel.Nifti1Image(several, LPS_AFFINE), tmp_path / "several.nii")
    volume = read_volume(tmp_path / "several.nii", channels=[2])
    np.testing.assert_array_equal(volume.array, several[..., 2].transpose(2, 1, 0))
    volume = read_volume(tmp_path / "several.nii", channels=[4, 0, 1])
    np.testing.assert_array_equal(volume.array, several[..., [4, 0, 1]].transpose(2, 1, 0, 3))
    flat = nibabel.Nifti1Image(np.zeros((2, 3, 4), np.uint8), None)
    flat.header["sform_code"], flat.header["srow_z"] = 1, 0
    flat.header["srow_x"], flat.header["srow_y"] = [1, 0, 0, 0], [0, 1, 0, 0]
    flat.to_filename(tmp_path / "flat.nii")
    data = bytearray((tmp_path / "flat.nii").read_bytes())
    data[252:256] = (0).to_bytes(2, "little") + (1).to_bytes(2, "little")  # qform_code, sform_code
    data[280:328] = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]], "<f4").tobytes()
    (tmp_path / "flat.nii").write_bytes(data)
    with pytest.raises(UserError, match="orientation is unknown"):
        read_volume(tmp_path / "flat.nii")


def test_npz_default_and_named_keys(tmp_path: Path) -> None:
    imgs, gts = np.arange(24, dtype=np.uint8).reshape(2, 3, 4), np.ones((2, 3, 4), np.uint8)
    np.savez(tmp_path / "a.npz", imgs=imgs, gts=gts, spacing=[0.5, 0.75, 2.0])
    np.testing.assert_array_equal(read_volume(tmp_path / "a.npz").array, imgs)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.npz").array, gts)
    assert read_volume(tmp_path / "a.npz").spacing == (2.0, 0.75, 0.5)
    np.savez(tmp_path / "b.npz", ct=imgs)
    volume = read_volume(tmp_path / "b.npz", image_key="ct")
    np.testing.assert_array_equal(volume.array, imgs)
    assert volume.spacing is None


def test_npz_of_a_picture(tmp_path: Path) -> None:
    rgb, labels = np.arange(36, dtype=np.uint8).reshape(3, 4, 3), np.ones((3, 4), np.uint8)
    np.savez(tmp_path / "a.npz", imgs=rgb, gts=labels)
    image, mask = read_volume(tmp_path / "a.npz"), read_mask(tmp_path / "a.npz")
    np.testing.assert_array_equal(image.array, rgb[np.newaxis])
    np.testing.assert_array_equal(mask.array, labels[np.newaxis])
    assert image.flat and mask.flat
    np.savez(tmp_path / "b.npz", imgs=rgb[..., 0], gts=labels)
    assert read_volume(tmp_path / "b.npz").array.shape == (1, 3, 4) and read_volume(tmp_path / "b.npz").flat
    np.savez(tmp_path / "c.npz", imgs=rgb, gts=np.ones((3, 4, 3), np.uint8))  # a volume of three columns
    assert read_volume(tmp_path / "c.npz").array.shape == (3, 4, 3) and not read_volume(tmp_path / "c.npz").flat


def test_npz_missing_key_lists_those_present(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", img=np.zeros((2, 3, 4)), label=np.zeros((2, 3, 4)))
    with pytest.raises(UserError, match=r"a\.npz: no array 'imgs' \(its arrays: img, label\); did you mean 'img'\?"):
        read_volume(tmp_path / "a.npz")


def test_npz_never_unpickles(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", imgs=np.array([{"evil": 1}], dtype=object))
    with pytest.raises(UserError, match=r"cannot be read.*allow_pickle"):
        read_volume(tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.npz"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.97])
def test_truncated_files_are_named(tmp_path: Path, name: str, keep: float) -> None:
    path = tmp_path / name
    array = np.random.default_rng(0).integers(0, 255, (8, 16, 16)).astype(np.uint8)
    if name.endswith("npz"):
        np.savez(path, imgs=array)
    else:
        save_nifti(path, array)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(UserError, match=rf"{name}: cannot be read, is it complete\?"):
        read_volume(path)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_1_and_2(tmp_path: Path, kind: type, suffix: str) -> None:
    array = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
    nibabel.save(kind(array.transpose(2, 1, 0), LPS_AFFINE), tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(read_volume(tmp_path / f"a{suffix}").array, array)


def test_gzip_with_a_flipped_byte_is_refused(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "a.nii.gz", np.random.default_rng(0).integers(0, 255, (8, 16, 16)).astype(np.uint8))
    raw = bytearray(gzip.decompress(path.read_bytes()))
    packed = bytearray(gzip.compress(bytes(raw)))
    packed[len(packed) // 2] ^= 0xFF
    path.write_bytes(packed)
    with pytest.raises(UserError, match=r"a\.nii\.gz: cannot be read"):
        read_volume(path)


@pytest.mark.parametrize("dtype", ["complex64", "U3", "S3", "M8[s]", "longdouble"])
def test_values_that_are_no_plain_numbers_are_refused(tmp_path: Path, dtype: str) -> None:
    np.savez(tmp_path / "a.npz", imgs=np.zeros((2, 3, 4), dtype))
    with pytest.raises(UserError, match=r"a\.npz: the image holds values of type .*; plain numbers are needed"):
        read_volume(tmp_path / "a.npz")


def test_npz_of_the_other_byte_order(tmp_path: Path) -> None:
    array = np.arange(24, dtype=">u2").reshape(2, 3, 4)
    np.savez(tmp_path / "a.npz", imgs=array)
    volume = read_volume(tmp_path / "a.npz").array
    assert volume.dtype == np.dtype("uint16") and volume.dtype.isnative
    np.testing.assert_array_equal(volume, array)


def test_what_nibabel_mends_is_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save_nifti(tmp_path / "a.nii", np.zeros((2, 3, 4), np.uint8))
    data = bytearray(path.read_bytes())
    data[80:84] = np.float32(-0.5).tobytes()  # pixdim[1]
    path.write_bytes(data)
    assert read_volume(path).spacing == (2.0, 0.75, 0.5)
    assert caplog.records == []
    nibabel.load(path)
    assert caplog.records  # nibabel does log it


def test_missing_unknown_and_misspelt(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.nii: no such file"):
        read_volume(tmp_path / "none.nii")
    (tmp_path / "a.xyz").touch()
    with pytest.raises(UserError, match=r"a\.xyz: no reader for '\.xyz' files; known: .*\.nii, \.nii\.gz, \.npz"):
        read_volume(tmp_path / "a.xyz")
    np.savez(tmp_path / "a.npz", imgs=np.zeros(6))
    with pytest.raises(UserError, match="unknown reader option 'imgkey'; did you mean 'image_key'"):
        read_volume(tmp_path / "a.npz", imgkey="x")
    with pytest.raises(UserError, match=r"the image has shape \(6,\)"):
        read_volume(tmp_path / "a.npz")


def test_real_nifti_and_npz(test_data: Path) -> None:
    abdomen = read_volume(test_data / "ct_abdomen_totalseg_nifti" / "example_ct_sm.nii.gz")
    assert abdomen.array.shape == (30, 101, 122) and abdomen.array.dtype == np.int16
    assert abdomen.array.min() < -900  # Hounsfield units: there is air
    assert read_mask(test_data / "ct_abdomen_totalseg_nifti" / "example_seg.nii.gz").array.shape == abdomen.array.shape
    lesion = test_data / "ct_lesion_recist_npz" / "CT_Lesion_000001_02_01_008-023.npz"
    assert read_mask(lesion).array.sum() == 11697
    assert read_volume(lesion).spacing == pytest.approx((5.0, 0.314453, 0.314453))
