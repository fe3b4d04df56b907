from __future__ import annotations

import io
import shutil
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813  # the field's habit
from pydicom import Dataset
from pydicom.pixels import apply_color_lut, pixel_array
from pydicom.uid import DeflatedExplicitVRLittleEndian, PositronEmissionTomographyImageStorage, generate_uid
from toy_dicom import (
    AXIAL,
    ORIGIN,
    SPACING,
    base,
    make_rtstruct,
    make_seg,
    make_series,
    save,
    set_pixels,
    toy_array,
    write_enhanced,
    write_series,
)

from data_shards.errors import UserError
from data_shards.readers import Ground, Volume, check_options, own_options, read_drawing, read_mask, read_volume
from data_shards.readers.dicom_files import patient_of

BUNDLED = Path(pydicom.__file__).parent / "data" / "test_files"

TURN = np.deg2rad(15)
WAYS = {
    "axial": AXIAL,
    "head first, face down": (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0),
    "mirrored": (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    "sagittal": (0.0, 1.0, 0.0, 0.0, 0.0, -1.0),
    "coronal": (1.0, 0.0, 0.0, 0.0, 0.0, -1.0),
    "oblique": (np.cos(TURN), np.sin(TURN), 0.0, -np.sin(TURN), np.cos(TURN), 0.0),
}


def bundled(name: str) -> Path:
    return next(BUNDLED.rglob(name))


def by_itk(folder: Path) -> sitk.Image:
    """The series as SimpleITK reads it, turned to LPS."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    return sitk.DICOMOrient(reader.Execute(), "LPS")


def check_like_itk(volume: Volume, image: sitk.Image) -> None:
    np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(image))
    assert volume.spacing == pytest.approx(image.GetSpacing()[::-1], abs=1e-5)
    assert volume.affine is not None
    for index in np.ndindex(2, 2, 2):
        corner = [int(bit * (size - 1)) for bit, size in zip(index, image.GetSize(), strict=True)]
        place = np.array(image.TransformIndexToPhysicalPoint(corner)) * (-1, -1, 1)
        np.testing.assert_allclose((volume.affine @ [*corner, 1])[:3], place, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_series_is_that_of_simpleitk(tmp_path: Path, way: str) -> None:
    names = ["c.dcm", "a.dcm", "e.dcm", "b.dcm", "d.dcm"]  # no order but that of their places

    def misnumber(dataset: Dataset, number: int) -> None:
        dataset.InstanceNumber = (number * 2) % 5 + 1

    files = write_series(tmp_path / "s", toy_array(), names, orientation=WAYS[way], change=misnumber)
    volume = read_volume(tmp_path / "s")
    check_like_itk(volume, by_itk(tmp_path / "s"))
    assert volume.array.dtype == np.int16 and not volume.flat
    assert sorted(volume.files) == sorted(files)


def test_order_is_by_place_whichever_way_the_files_run(tmp_path: Path) -> None:
    array = toy_array()
    write_series(tmp_path / "up", array)
    write_series(tmp_path / "down", array[::-1], origin=(*ORIGIN[:2], ORIGIN[2] + 8), step=(0, 0, -2.0))
    up, down = read_volume(tmp_path / "up"), read_volume(tmp_path / "down")
    np.testing.assert_array_equal(up.array, array)
    np.testing.assert_array_equal(down.array, array)
    assert up.apart(down) == 0
    assert up.spacing == SPACING


@pytest.mark.parametrize("way", ["axial", "sagittal", "oblique"])
def test_same_place_as_nifti(tmp_path: Path, way: str) -> None:
    write_series(tmp_path / "s", toy_array(), orientation=WAYS[way])
    sitk.WriteImage(by_itk(tmp_path / "s"), str(tmp_path / "s.nii"))
    dicom, nifti = read_volume(tmp_path / "s"), read_volume(tmp_path / "s.nii")
    np.testing.assert_array_equal(dicom.array, nifti.array)
    assert dicom.apart(nifti) < 1e-3
    moved = nibabel.load(tmp_path / "s.nii")
    affine = moved.affine.copy()
    affine[0, 3] += 4
    nibabel.save(nibabel.Nifti1Image(np.asarray(moved.dataobj), affine), tmp_path / "moved.nii")
    assert dicom.apart(read_volume(tmp_path / "moved.nii")) == pytest.approx(4, abs=1e-3)


def test_one_slice_is_a_volume(tmp_path: Path) -> None:
    array = toy_array()
    files = write_series(tmp_path, array)
    volume = read_volume(files[3])
    np.testing.assert_array_equal(volume.array, array[3:4])
    assert volume.spacing == SPACING and volume.files == (files[3],)
    assert volume.affine is not None and volume.affine[2, 3] == ORIGIN[2] + 6


def test_units(tmp_path: Path) -> None:
    array = toy_array()

    def slope(dataset: Dataset, number: int) -> None:
        dataset.SOPClassUID, dataset.Modality = PositronEmissionTomographyImageStorage, "PT"
        dataset.RescaleSlope, dataset.RescaleIntercept = str(0.5 + 0.25 * number), "0"

    write_series(tmp_path / "pet", array, change=slope)
    pet = read_volume(tmp_path / "pet")
    assert pet.array.dtype == np.float32
    factors = np.array([0.5 + 0.25 * number for number in range(5)])[:, None, None]
    np.testing.assert_array_equal(pet.array, ((array.astype(float) + 1024) * factors).astype(np.float32))

    def plain(dataset: Dataset, number: int) -> None:
        del dataset.RescaleSlope, dataset.RescaleIntercept

    write_series(tmp_path / "plain", array, change=plain)
    assert read_volume(tmp_path / "plain").array.dtype == np.uint16
    np.testing.assert_array_equal(read_volume(tmp_path / "plain").array, array + 1024)

    write_series(tmp_path / "large", np.full((2, 3, 4), 40_000, np.int32))
    large = read_volume(tmp_path / "large").array
    assert large.dtype == np.float32 and (large == 40_000).all()

    def broken(dataset: Dataset, number: int) -> None:
        dataset.RescaleSlope = 0

    write_series(tmp_path / "zero", array, change=broken)
    with pytest.raises(UserError, match=r"000\.dcm: its RescaleSlope is 0"):
        read_volume(tmp_path / "zero")


def test_several_series_are_a_choice_without_names(tmp_path: Path) -> None:
    first, second = toy_array(), toy_array((3, 12, 10), seed=1)
    uid = generate_uid()

    def other(dataset: Dataset, number: int) -> None:
        dataset.SeriesInstanceUID, dataset.SeriesNumber = uid, 4
        dataset.SeriesDescription = "SECRET WORDS"

    write_series(tmp_path, first, [f"a{number}.dcm" for number in range(5)])
    write_series(tmp_path, second, [f"b{number}.dcm" for number in range(3)], change=other)
    with pytest.raises(
        UserError, match=r"holds several series: 3 slices \(series 4, CT\) or 5 slices \(series 1, CT\)"
    ) as e:
        read_volume(tmp_path)
    assert "SECRET" not in str(e.value) and uid not in str(e.value)
    np.testing.assert_array_equal(read_volume(tmp_path, series=4).array, second)
    np.testing.assert_array_equal(read_volume(tmp_path, series=1).array, first)
    np.testing.assert_array_equal(read_volume(tmp_path, series_uid=uid).array, second)
    with pytest.raises(UserError, match=r"no series fit.*choose by another series"):
        read_volume(tmp_path, series=9)


def test_gaps(tmp_path: Path) -> None:
    array = toy_array((6, 12, 10))
    files = write_series(tmp_path / "s", array)
    files[2].unlink()
    with pytest.raises(UserError, match=r"4\.00 mm lie between 001\.dcm and 003\.dcm, 2\.00 mm between most"):
        read_volume(tmp_path / "s")
    volume = read_volume(tmp_path / "s", gaps="allow")
    np.testing.assert_array_equal(volume.array, np.delete(array, 2, axis=0))
    assert volume.affine is not None  # its corners are where they are
    np.testing.assert_allclose((volume.affine @ [0, 0, 4, 1])[:3], [10, 20, 40], atol=1e-6)


def test_rounded_places_are_no_gap(tmp_path: Path) -> None:
    def rounded(dataset: Dataset, number: int) -> None:
        dataset.ImagePositionPatient = [*ORIGIN[:2], round(ORIGIN[2] + number * 1.25, 1)]

    write_series(tmp_path, toy_array((9, 4, 4)), change=rounded)
    assert read_volume(tmp_path).spacing == pytest.approx((1.25, 0.75, 0.5))


def test_two_slices_in_one_place(tmp_path: Path) -> None:
    files = write_series(tmp_path, toy_array())

    def again(dataset: Dataset, number: int) -> None:
        dataset.ImagePositionPatient = [*ORIGIN[:2], ORIGIN[2] + 4]

    write_series(tmp_path, toy_array((1, 12, 10), seed=2), ["twice.dcm"], change=again)
    with pytest.raises(UserError, match=r"share a place \(up to 2, as 002\.dcm and twice\.dcm\)"):
        read_volume(tmp_path)
    assert files[0].exists()


def test_tilted_stack(tmp_path: Path) -> None:
    array = toy_array()
    write_series(tmp_path, array, step=(0.0, 0.5, 2.0))
    with pytest.raises(UserError, match=r"tilted by 14\.0 degrees"):
        read_volume(tmp_path)
    volume = read_volume(tmp_path, tilt="allow")
    np.testing.assert_array_equal(volume.array, array)
    assert volume.affine is not None
    np.testing.assert_allclose((volume.affine @ [0, 0, 4, 1])[:3], [10, 20 - 2.0, 38], atol=1e-6)

    def jolt(dataset: Dataset, number: int) -> None:
        dataset.ImagePositionPatient[0] += 3.0 * (number == 2)

    write_series(tmp_path / "jolted", array, change=jolt)
    with pytest.raises(UserError, match=r"002\.dcm is shifted sideways by 3\.00 mm"):
        read_volume(tmp_path / "jolted", tilt="allow")


def test_localizers(tmp_path: Path) -> None:
    array = toy_array()
    write_series(tmp_path, array)

    def scout(dataset: Dataset, number: int) -> None:
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    write_series(tmp_path, toy_array((1, 12, 10)), ["scout.dcm"], orientation=WAYS["coronal"], change=scout)
    with pytest.raises(UserError, match=r"scout\.dcm: is a localizer among other slices of its series \(1 of 6\)"):
        read_volume(tmp_path)
    np.testing.assert_array_equal(read_volume(tmp_path, localizers="drop").array, array)
    write_series(tmp_path, toy_array((1, 12, 10)), ["scout.dcm"], orientation=WAYS["coronal"])
    with pytest.raises(UserError, match=r"scout\.dcm: runs another way than the others"):
        read_volume(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda item: set_pixels(item, np.zeros((6, 10), np.uint16)), r"slices of \(6, 10\) and \(12, 10\) pixels"),
        (lambda item: setattr(item, "PixelSpacing", [0.8, 0.5]), "distances of its pixels differ from 000.dcm's"),
        (lambda item: setattr(item, "FrameOfReferenceUID", "1.2.3"), "another frame of reference than 000.dcm"),
        (lambda item: setattr(item, "PatientID", "somebody"), "are of several patients"),
        (lambda item: delattr(item, "PixelSpacing"), "not the distance of its pixels"),
        (lambda item: delattr(item, "ImagePositionPatient"), "does not say where it lies"),
        (lambda item: setattr(item, "ImageOrientationPatient", [1, 0, 0, 1, 0, 0]), "not at right angles"),
        (lambda item: setattr(item, "ImagePositionPatient", [1, 2]), "ImagePositionPatient is not 3 numbers"),
        (lambda item: delattr(item, "PixelData"), "has no pixels"),
    ],
)
def test_slices_that_differ_are_named(tmp_path: Path, change: object, message: str) -> None:
    def one(dataset: Dataset, number: int) -> None:
        if number == 3:
            change(dataset)  # type: ignore[operator]

    write_series(tmp_path / "s", toy_array(), change=one)
    with pytest.raises(UserError, match=message) as error:
        read_volume(tmp_path / "s")
    assert "somebody" not in str(error.value)


def test_what_lies_beside_a_series(tmp_path: Path) -> None:
    array = toy_array()
    write_series(tmp_path, array, [f"IM{number}" for number in range(5)])  # as on a disc: no suffix
    (tmp_path / "LICENSE").write_text("free")
    (tmp_path / "Thumbs.db").write_bytes(b"\0" * 300)
    (tmp_path / "._IM0.dcm").write_bytes(b"\0" * 300)
    (tmp_path / "sub").mkdir()
    shutil.copy(bundled("DICOMDIR"), tmp_path / "DICOMDIR")
    masks = np.zeros((*array.shape, 1), np.uint8)
    masks[1, 2:4, 2:4] = 1
    save(make_seg(make_series(array), masks), tmp_path / "seg.dcm")
    save(make_rtstruct([("a", [])]), tmp_path / "rs.dcm")
    shutil.copy(bundled("rtdose.dcm"), tmp_path / "dose.dcm")
    np.testing.assert_array_equal(read_volume(tmp_path).array, array)
    assert read_volume(tmp_path / "IM2").array.shape == (1, 12, 10)
    (tmp_path / "x.dcm").write_bytes(b"no DICOM at all, however long one looks" * 10)
    with pytest.raises(UserError, match=r"x\.dcm: is no DICOM file, or a damaged one"):
        read_volume(tmp_path)


def test_folders_without_images(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("free")
    with pytest.raises(UserError, match="no DICOM file in this folder"):
        read_volume(tmp_path)
    save(make_rtstruct([("a", [])]), tmp_path / "rs.dcm")
    with pytest.raises(UserError, match="is a set of contours, not an image"):
        read_volume(tmp_path)
    shutil.copy(bundled("rtdose.dcm"), tmp_path / "dose.dcm")
    with pytest.raises(UserError, match="holds no image, only what was drawn"):
        read_volume(tmp_path)
    with pytest.raises(UserError, match=r"dose\.dcm: holds no image that can be read"):
        read_volume(tmp_path / "dose.dcm")


def test_burned_in_text_is_refused(tmp_path: Path) -> None:
    def burn(dataset: Dataset, number: int) -> None:
        dataset.BurnedInAnnotation = "YES" if number == 2 else "NO"

    array = toy_array()
    write_series(tmp_path, array, change=burn)
    with pytest.raises(UserError, match=r"002\.dcm: its header says that text is burned into the image"):
        read_volume(tmp_path)
    np.testing.assert_array_equal(read_volume(tmp_path, burned_in="allow").array, array)


def test_low_is_bright(tmp_path: Path) -> None:
    stored = np.array([[0, 1, 4095], [7, 100, 2000]], np.uint16)
    dataset = base("1.2.840.10008.5.1.4.1.1.1", "CR")
    set_pixels(dataset, stored)
    dataset.BitsStored, dataset.HighBit, dataset.PhotometricInterpretation = 12, 11, "MONOCHROME1"
    dataset.ImagerPixelSpacing = [0.2, 0.1]
    path = save(dataset, tmp_path / "cr.dcm")
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, 4095 - stored[None])
    assert volume.array.dtype == np.uint16 and volume.flat and volume.affine is None
    assert volume.spacing == (1.0, 0.2, 0.1)
    np.testing.assert_array_equal(read_mask(path).array, stored[None])  # labels are numbers
    dataset.PixelSpacing = [0.18, 0.09]
    dataset.RescaleSlope, dataset.RescaleIntercept = 2, 10
    volume = read_volume(save(dataset, path))
    np.testing.assert_array_equal(volume.array, (4095 - stored[None].astype(int)) * 2 + 10)
    assert volume.spacing == (1.0, 0.18, 0.09)
    dataset.Modality = "PT"  # Bq/ml stay Bq/ml, however they are shown
    np.testing.assert_array_equal(read_volume(save(dataset, path)).array, stored[None].astype(int) * 2 + 10)
    signed = np.array([[-128, -1, 0, 127]], np.int8)
    set_pixels(dataset, signed)
    dataset.Modality, dataset.PhotometricInterpretation = "DX", "MONOCHROME1"
    del dataset.RescaleSlope, dataset.RescaleIntercept
    assert read_volume(save(dataset, path)).array.tolist() == [[[127, 0, -1, -128]]]


def test_bundled_low_is_bright() -> None:
    path = bundled("6154")
    dataset = pydicom.dcmread(path)
    assert dataset.PhotometricInterpretation == "MONOCHROME1"
    volume = read_volume(path)
    turned = 2**dataset.BitsStored - 1 - dataset.pixel_array.astype(int)
    assert float(dataset.RescaleSlope) not in (0, 1)
    expected = turned * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    np.testing.assert_array_equal(volume.array[0], expected.astype(np.float32))


@pytest.mark.parametrize(
    "name",
    [
        "SC_rgb_small_odd.dcm",
        "SC_rgb_small_odd_big_endian.dcm",
        "SC_rgb_rle_16bit_2frame.dcm",
        "SC_ybr_full_422_uncompressed.dcm",
        "SC_rgb_dcmtk_+eb+cy+s4.dcm",
        "SC_rgb_jpeg_dcmtk.dcm",
        "SC_rgb_jpeg_gdcm.dcm",  # lossless JPEG: decoded in a process of its own
        "examples_rgb_color.dcm",
        "examples_jpeg2k.dcm",
        "examples_ybr_color.dcm",
    ],
)
def test_colours_are_those_of_pydicom(name: str) -> None:
    volume = read_volume(bundled(name))
    expected = pixel_array(bundled(name))
    expected = expected if expected.ndim == 4 else expected[None]
    assert volume.array.shape == expected.shape and volume.array.shape[-1] == 3 and volume.flat
    # Libraries round the way back from YBR in their own ways.
    assert np.abs(volume.array.astype(int) - expected.astype(int)).max() <= (0 if "rgb_" in name else 2)


def test_palette_becomes_rgb() -> None:
    path = bundled("examples_palette.dcm")
    dataset = pydicom.dcmread(path)
    volume = read_volume(path)
    assert volume.array.dtype == np.uint8 and volume.array.shape == (1, 350, 800, 3)
    np.testing.assert_array_equal(volume.array[0], apply_color_lut(dataset.pixel_array, dataset) >> 8)
    np.testing.assert_array_equal(read_mask(path).array[0], dataset.pixel_array)  # labels are numbers


def test_frames_of_ultrasound_are_pictures() -> None:
    volume = read_volume(bundled("examples_ybr_color.dcm"))
    assert volume.array.shape == (30, 240, 320, 3) and volume.flat and volume.affine is None


def test_pictures_of_several_files_are_no_volume(tmp_path: Path) -> None:
    for number in range(2):
        dataset = base("1.2.840.10008.5.1.4.1.1.1", "CR")
        set_pixels(dataset, np.zeros((4, 5), np.uint8))
        save(dataset, tmp_path / f"{number}.dcm")
    with pytest.raises(UserError, match=r"its 2 images do not say where they lie.*make each file a case"):
        read_volume(tmp_path)
    assert read_volume(tmp_path / "0.dcm").spacing is None


def test_multiframe_is_the_series_of_its_frames(tmp_path: Path) -> None:
    stored = toy_array().astype(np.int32).clip(0).astype(np.uint16)
    scales = [(1.0, -10.0), (2.0, 0.0), (1.0, 0.0), (3.0, 5.0), (1.0, 1.0)]
    volume = read_volume(write_enhanced(tmp_path / "mr.dcm", stored, [3, 0, 4, 1, 2], scales))
    slopes, intercepts = (np.array(values)[:, None, None] for values in zip(*scales, strict=True))
    np.testing.assert_array_equal(volume.array, stored * slopes + intercepts)
    write_series(tmp_path / "ct", toy_array())
    assert volume.apart(read_volume(tmp_path / "ct")) < 1e-6
    assert volume.array.dtype == np.int16 and not volume.flat and volume.spacing == SPACING


@pytest.mark.parametrize("name", ["RLE", "bigendian", "expb", "implicit", "jp2klossless", "jpeg_ls_lossless", "padded"])
def test_transfer_syntaxes_hold_the_same_pixels(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    plain = read_volume(bundled("MR_small.dcm"))
    assert plain.array.std() > 10
    np.testing.assert_array_equal(read_volume(bundled(f"MR_small_{name}.dcm")).array, plain.array)
    assert capfd.readouterr() == ("", "")


def test_no_decoder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"JPGExtended\.dcm: its compressed pixels .*pylibjpeg-libjpeg") as error:
        read_volume(bundled("JPGExtended.dcm"))
    assert "\n" not in str(error.value)
    dataset = pydicom.dcmread(bundled("MR_small_jp2klossless.dcm"))
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.201"  # HTJ2K: no library for it is installed
    dataset.save_as(tmp_path / "a.dcm")
    with pytest.raises(UserError, match=r"decoding 'High-Throughput JPEG 2000.*needs another package"):
        read_volume(tmp_path / "a.dcm")
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"  # a film
    dataset.save_as(tmp_path / "a.dcm")
    with pytest.raises(UserError, match="compressed in a way that nothing here decodes"):
        read_volume(tmp_path / "a.dcm")


@pytest.mark.parametrize(
    "name", ["MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "SC_rgb_jpeg_gdcm.dcm", "SC_rgb_rle.dcm"]
)
def test_damaged_compressed_files_end_nothing(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    # Some decoders end the process that calls them. Each of these is read to the end, or refused in one line.
    data = bundled(name).read_bytes()
    start = data.rfind(b"\xe0\x7f\x10\x00")
    refused = 0
    for seed in range(5):
        random = np.random.default_rng(seed)
        broken = np.frombuffer(data, np.uint8).copy()
        places = random.integers(start + 20, min(len(data), start + 150) if seed % 2 else len(data), 20)
        broken[places] = random.integers(0, 256, 20)
        (tmp_path / "x.dcm").write_bytes(broken.tobytes())
        try:
            read_volume(tmp_path / "x.dcm")
        except UserError as error:
            refused += 1
            assert "x.dcm" in str(error)
    assert refused
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.3, 0.6, 0.99])
@pytest.mark.parametrize(
    "name", ["CT_small.dcm", "MR_small_implicit.dcm", "MR_small_RLE.dcm", "MR_small_jpeg_ls_lossless.dcm"]
)
def test_truncated_files_are_named(tmp_path: Path, name: str, keep: float, capfd: pytest.CaptureFixture[str]) -> None:
    data = bundled(name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(UserError, match=name):
        read_volume(tmp_path / name)
    assert capfd.readouterr() == ("", "")


def test_bombs(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(bundled("MR_small_RLE.dcm"))
    dataset.Rows = dataset.Columns = 60_000
    dataset.save_as(tmp_path / "large.dcm")
    with pytest.raises(UserError, match="header promises 7,200,000,000 bytes of pixels"):
        read_volume(tmp_path / "large.dcm")
    dataset = base("1.2.840.10008.5.1.4.1.1.7", "OT")
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(tmp_path / "packed.dcm", enforce_file_format=True)
    data = (tmp_path / "packed.dcm").read_bytes()
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = b"".join(packer.compress(bytes(2**20)) for _ in range(300)) + packer.flush()
    (tmp_path / "packed.dcm").write_bytes(_meta(data) + bomb)
    with pytest.raises(UserError, match=r"packed\.dcm: unpacks to more than 268,435,456 bytes"):
        read_volume(tmp_path / "packed.dcm")


def _meta(data: bytes) -> bytes:
    """The start of a file up to where its data set begins."""
    file = io.BytesIO(data)
    pydicom.filereader.read_preamble(file, force=False)
    pydicom.filereader._read_file_meta_info(file)
    return data[: file.tell()]


def test_deep_nesting(tmp_path: Path) -> None:
    dataset = make_series(toy_array((1, 4, 4)))[0]
    path = save(dataset, tmp_path / "a.dcm")
    data = _meta(path.read_bytes())
    # Sequences within items within sequences, all of undefined length.
    data += (b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff") * 20_000
    path.write_bytes(data)
    with pytest.raises(UserError, match="nested too deeply"):
        read_volume(path)


def test_messages_show_nothing_of_the_header(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    secret = "DOE^JANE"
    for keyword in ("ImagePositionPatient", "PixelSpacing", "RescaleSlope", "SeriesNumber", "NumberOfFrames", "Rows"):
        dataset = make_series(toy_array((1, 4, 4)))[0]
        dataset.PatientName = secret
        tag = pydicom.datadict.tag_for_keyword(keyword)
        with pydicom.config.disable_value_validation():
            dataset[tag] = pydicom.DataElement(tag, "LO", secret)
            dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
        with pytest.raises(UserError) as error:
            read_volume(tmp_path / "a.dcm")
        assert "a.dcm" in str(error.value) and "DOE" not in str(error.value) and "JANE" not in str(error.value)
    assert not [item for item in recwarn if "DOE" in str(item.message)]


def test_files_without_a_preamble(tmp_path: Path) -> None:
    array = toy_array((1, 4, 4))
    path = write_series(tmp_path, array)[0]
    path.write_bytes(path.read_bytes()[len(_meta(path.read_bytes())) :])
    np.testing.assert_array_equal(read_volume(path).array, array)
    np.testing.assert_array_equal(read_volume(tmp_path).array, array)
    with pytest.raises(UserError, match="is a set of contours, not an image"):
        read_volume(bundled("rtstruct.dcm"))


def test_patient_of(tmp_path: Path) -> None:
    def name(dataset: Dataset, number: int) -> None:
        dataset.PatientID = " P 17 "

    files = write_series(tmp_path / "s", toy_array(), change=name)
    assert patient_of(tmp_path / "s") == patient_of(files[0]) == "P 17"
    write_series(tmp_path / "none", toy_array((2, 4, 4)), change=lambda item, number: delattr(item, "PatientID"))
    assert patient_of(tmp_path / "none") is None
    write_series(tmp_path / "s", toy_array((1, 12, 10)), ["other.dcm"])
    with pytest.raises(UserError, match="are of several patients") as error:
        patient_of(tmp_path / "s")
    assert "P 17" not in str(error.value)
    (tmp_path / "a.nii").write_bytes(b"\0" * 400)
    with pytest.raises(UserError, match="is no DICOM file, so its header names no patient"):
        patient_of(tmp_path / "a.nii")
    with pytest.raises(UserError, match="no such file"):
        patient_of(tmp_path / "nowhere")


def test_options_are_those_of_a_spec(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", toy_array())
    rs = save(make_rtstruct([]), tmp_path / "rs.dcm")
    good = {"series": 1, "gaps": "allow", "match": "position", "fraction": 0.4, "regions": ["a*"]}
    check_options(tmp_path / "ct", [rs], good)
    assert own_options(rs, "mask", good) == {"match": "position", "fraction": 0.4, "regions": ["a*"]}
    assert own_options(tmp_path / "ct", "image", good) == {"series": 1, "gaps": "allow"}
    with pytest.raises(UserError, match=r"reader\.gaps: expected one of error, allow, got 'maybe'"):
        check_options(tmp_path / "ct", [rs], {"gaps": "maybe"})


def test_labels_in_a_series(tmp_path: Path) -> None:
    array = toy_array()
    labels = (array > 0).astype(np.int16) * 3 - 1024
    write_series(tmp_path / "ct", array)
    write_series(tmp_path / "labels", labels, change=lambda item, number: setattr(item, "RescaleIntercept", 0))
    ground = Ground(tmp_path / "ct", read_volume(tmp_path / "ct"))
    drawing = read_drawing(tmp_path / "labels", ground)
    assert drawing.complete and drawing.volume is not None and drawing.volume.apart(ground.volume) == 0
    np.testing.assert_array_equal(drawing.layers[0].values, (array > 0) * 3)


def test_real_series(test_data: Path) -> None:
    for folder in (test_data / "ct_liver_dicom_seg" / "image", test_data / "ct_sarcoma_dicom_rtstruct/STS_002/image"):
        volume = read_volume(folder)
        check_like_itk(volume, by_itk(folder))
        assert volume.frame
    liver = read_volume(test_data / "ct_liver_dicom_seg" / "image")
    assert (liver.array.min(), liver.array.max(), liver.array.dtype) == (-3024, 1381, np.dtype("int16"))
    assert [path.name for path in liver.files] == ["03.dcm", "02.dcm", "01.dcm"]
    assert liver.apart(read_volume(test_data / "ct_liver_dicom_seg" / "nrrd" / "liver_seg.nrrd")) < 1e-4
