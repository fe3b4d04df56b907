import errno
import itertools
import json
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from one_line import message
from PIL import Image
from toy_dicom import save, toy_array, write_enhanced, write_series

from data_shards.preprocessing import Axis
from data_shards.readers import Ground, read_drawing, read_mask, read_volume
from trainer.volumes.output import LabelWriter, check_output
from trainer.volumes.scan import Scan, open_scan

AXES: tuple[Axis, ...] = ("axial", "coronal", "sagittal")
ORIENTATIONS = [
    "".join(way) for order in itertools.permutations(("LR", "PA", "IS")) for way in itertools.product(*order)
]
"""All 48 ways in which axes can run."""
TILT = np.array([[0.96, -0.24, 0.14], [0.26, 0.95, -0.17], [-0.09, 0.2, 0.975]])
"""Close to a rotation by some degrees about each axis."""


def affine_of(orientation: str, tilted: bool) -> np.ndarray:
    """Axes that run to the letters', with spacings 0.5, 0.75 and 2 mm."""
    codes = nibabel.orientations.axcodes2ornt(orientation)
    affine = np.eye(4)
    affine[:3, :3] = 0
    for number, (axis, way) in enumerate(codes):
        affine[int(axis), number] = way * (0.5, 0.75, 2)[number]
    if tilted:
        turn, _ = np.linalg.qr(TILT)
        affine[:3, :3] = turn * np.sign(np.diag(turn)) @ affine[:3, :3]
    affine[:3, 3] = (-12.5, 30, 7.25)
    return affine


def image(path: Path, affine: np.ndarray | None = None, shape: tuple[int, int, int] = (6, 5, 4)) -> Path:
    """Values below 100, with two things in them: about 1000 and about 2000."""
    rng = np.random.default_rng(0)
    array = rng.integers(0, 100, shape).astype(np.int16)
    array[rng.random(shape) < 0.2] += 1000
    array[rng.random(shape) < 0.1] = 2000
    nibabel.save(nibabel.Nifti1Image(array, np.diag([-0.5, -0.75, 2, 1]) if affine is None else affine), path)
    return path


def things(scan: Scan) -> Iterator[tuple[int, np.ndarray]]:
    """The two things, slice by slice, out of order."""
    for number in (*range(1, len(scan), 2), *range(0, len(scan), 2)):
        pixels = scan.raw(number)
        yield number, np.stack([(pixels >= 1000) & (pixels < 2000), pixels >= 2000])


def expected(array: np.ndarray) -> np.ndarray:
    return np.select([array >= 2000, array >= 1000], [2, 1], 0)


def segment(path: Path, out: Path, axis: Axis = "axial", **options: Any) -> LabelWriter:
    with (
        open_scan(path, axis=axis, intensity="none") as scan,
        LabelWriter(out, scan, ["one", "two"], **options) as writer,
    ):
        for number, masks in things(scan):
            writer.put(number, masks)
    return writer


# --- NIfTI


@pytest.mark.parametrize("tilted", [False, True])
def test_a_nifti_lies_voxel_by_voxel_on_its_source_however_its_axes_run(tilted: bool, tmp_path: Path) -> None:
    for place, orientation in enumerate(ORIENTATIONS):
        path = image(tmp_path / "image.nii", affine_of(orientation, tilted))
        segment(path, tmp_path / "labels.nii", AXES[place % 3], overwrite=True)
        source, labels = nibabel.load(path), nibabel.load(tmp_path / "labels.nii")
        assert "".join(nibabel.aff2axcodes(source.affine)) == orientation
        np.testing.assert_array_equal(labels.dataobj, expected(np.asarray(source.dataobj)))
        assert labels.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(labels.affine, source.affine)
        for name in ("qform_code", "sform_code", "pixdim", "srow_x", "srow_y", "srow_z", "quatern_b", "qoffset_x"):
            np.testing.assert_array_equal(labels.header[name], source.header[name])


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "SPR", "ASL", "PIL"])
def test_itk_finds_the_labels_at_the_same_points(orientation: str, tmp_path: Path) -> None:
    affine = affine_of(orientation, tilted=True)
    path = image(tmp_path / "image.nii.gz", affine)
    segment(path, tmp_path / "labels.nii.gz", "sagittal")
    one, other = sitk.ReadImage(path), sitk.ReadImage(tmp_path / "labels.nii.gz")
    assert other.GetSize() == one.GetSize()
    known = np.asarray(nibabel.load(path).dataobj)
    for index in [tuple(map(int, index)) for index in np.argwhere(known >= 1000)[::3]]:
        point = one.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose(point, (affine @ [*index, 1])[:3] * [-1, -1, 1], atol=1e-4)
        there = other.TransformPhysicalPointToIndex(point)
        assert other[there] == (2 if known[index] >= 2000 else 1)


def test_codes_and_units_of_a_nifti_are_kept_and_words_are_not(tmp_path: Path) -> None:
    source = nibabel.load(image(tmp_path / "first.nii", affine_of("LAS", True)))
    source = nibabel.Nifti2Image(np.asarray(source.dataobj), source.affine, source.header)
    source.set_sform(source.affine, 4)
    source.set_qform(np.diag([1, 2, 3, 1]), 2)
    source.header.set_xyzt_units("mm", "sec")
    source.header["descrip"] = b"a name"
    source.header["intent_name"] = b"a name"
    nibabel.save(source, tmp_path / "image.nii")
    segment(tmp_path / "image.nii", tmp_path / "labels.nii")
    labels = nibabel.load(tmp_path / "labels.nii")
    assert isinstance(labels, nibabel.Nifti2Image)
    assert (int(labels.header["sform_code"]), int(labels.header["qform_code"])) == (4, 2)
    np.testing.assert_array_equal(labels.get_qform(), np.diag([1, 2, 3, 1]))
    np.testing.assert_array_equal(labels.affine, source.affine)
    assert labels.header.get_xyzt_units() == ("mm", "sec")
    assert b"name" not in (tmp_path / "labels.nii").read_bytes()


def test_real_volumes_of_odd_orientation(test_data: Path, tmp_path: Path) -> None:
    for name in ("t1/t1w.nii.gz", "t2/t2.nii.gz", "t2s/t2s.nii.gz"):
        path = test_data / "mr_spinal_cord_nifti" / name
        source = nibabel.load(path)
        bound = np.percentile(np.asarray(source.dataobj), 90)
        with (
            open_scan(path, axis="sagittal") as scan,
            LabelWriter(tmp_path / "out.nii.gz", scan, ["bright"], overwrite=True) as writer,
        ):
            for number in range(len(scan)):
                writer.put(number, scan.raw(number)[None] > bound)
        labels = nibabel.load(tmp_path / "out.nii.gz")
        np.testing.assert_array_equal(np.asarray(labels.dataobj) == 1, np.asarray(source.dataobj) > bound)
        np.testing.assert_array_equal(labels.affine, source.affine)


# --- NRRD, MetaImage, npz, PNG


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_nrrd_and_metaimage_lie_on_their_source(suffix: str, tmp_path: Path) -> None:
    nifti = sitk.ReadImage(image(tmp_path / "image.nii", affine_of("PSL", True)))
    path = tmp_path / f"image{suffix}"
    sitk.WriteImage(nifti, path)
    segment(path, tmp_path / f"labels{suffix}", "coronal")
    source, labels = sitk.ReadImage(path), sitk.ReadImage(tmp_path / f"labels{suffix}")
    assert labels.GetPixelID() == sitk.sitkUInt8
    np.testing.assert_array_equal(sitk.GetArrayFromImage(labels), expected(sitk.GetArrayFromImage(source)))
    for name in ("GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(labels, name)(), getattr(source, name)(), rtol=1e-9, atol=1e-9)


def test_a_nifti_of_a_series_lies_where_the_series_does(tmp_path: Path) -> None:
    array = toy_array()
    write_series(tmp_path / "series", array + 1200, orientation=(0.8, 0.6, 0, 0, 0, -1))
    segment(tmp_path / "series", tmp_path / "labels.nii.gz", "coronal")
    known, found = read_volume(tmp_path / "series"), read_mask(tmp_path / "labels.nii.gz")
    np.testing.assert_array_equal(found.array, expected(known.array))
    assert known.apart(found) < 1e-4


def test_an_npz_has_labels_spacing_and_names(tmp_path: Path) -> None:
    array = np.asarray(nibabel.load(image(tmp_path / "a.nii")).dataobj)
    np.savez(tmp_path / "image.npz", imgs=array, spacing=np.array([0.5, 0.75, 2]))
    for axis in AXES:
        segment(tmp_path / "image.npz", tmp_path / "labels.npz", axis, overwrite=True)
        with np.load(tmp_path / "labels.npz", allow_pickle=False) as content:
            np.testing.assert_array_equal(content["gts"], expected(array))
            assert content["spacing"].tolist() == [0.5, 0.75, 2]
            assert content["names"].tolist() == ["one", "two"]
    found = read_mask(tmp_path / "labels.npz")
    np.testing.assert_array_equal(found.array, expected(array))
    assert found.spacing == (2, 0.75, 0.5)


def test_frames_get_a_picture_each(tmp_path: Path) -> None:
    (tmp_path / "video").mkdir()
    rng = np.random.default_rng(0)
    frames = {f"frame{number}": rng.integers(0, 255, (4, 6, 3), dtype=np.uint8) for number in (2, 10)}
    for name, frame in frames.items():
        Image.fromarray(frame).save(tmp_path / "video" / f"{name}.bmp")
    with open_scan(tmp_path / "video") as scan, LabelWriter(tmp_path / "masks", scan, ["red", "green"]) as writer:
        for number in range(2):
            writer.put(number, np.moveaxis(scan.raw(number), -1, 0)[:2] > 120)
    assert sorted(file.name for file in (tmp_path / "masks").iterdir()) == ["frame10.png", "frame2.png"]
    for name, frame in frames.items():
        red, green = frame[..., 0] > 120, frame[..., 1] > 120
        found = np.asarray(Image.open(tmp_path / "masks" / f"{name}.png"))
        np.testing.assert_array_equal(found, np.where(red, 1, np.where(green, 2, 0)))
    assert json.loads((tmp_path / "masks.json").read_text())["labels"][1]["name"] == "green"
    assert writer.files == (tmp_path / "masks", tmp_path / "masks.json")
    with open_scan(tmp_path / "video") as scan:
        assert "masks is there already" in message(lambda: check_output(tmp_path / "masks", scan, ["a"]))
        with LabelWriter(tmp_path / "masks", scan, ["none"], overwrite=True):
            pass
    assert not np.asarray(Image.open(tmp_path / "masks" / "frame10.png")).any()


# --- DICOM SEG


@pytest.mark.parametrize("axis", AXES)
def test_segments_lie_on_their_series(axis: Axis, tmp_path: Path) -> None:
    highdicom = pytest.importorskip("highdicom")
    array = toy_array() + np.int16(1200)
    array[3] = 0  # a slice without anything
    write_series(tmp_path / "series", array, ["b.dcm", "a.dcm", "e.dcm", "d.dcm", "c.dcm"])
    out = tmp_path / "labels.dcm"
    writer = segment(tmp_path / "series", out, axis)
    assert writer.files == (out,) and writer.contested == 0
    masks = {"one": (array >= 1000) & (array < 2000), "two": array >= 2000}
    segmentation = highdicom.seg.segread(out)
    assert segmentation.NumberOfFrames == sum(plane.any() for mask in masks.values() for plane in mask)
    series = read_volume(tmp_path / "series")
    places = {str(file): number for number, file in enumerate(series.files)}
    assert len(places) == 5
    volume = segmentation.get_volume(combine_segments=False)
    for item, (name, mask) in zip(segmentation.SegmentSequence, masks.items(), strict=True):
        assert item.SegmentLabel == name
        points = np.argwhere(np.asarray(volume.array)[..., item.SegmentNumber - 1])
        found = volume.map_indices_to_reference(points) * [-1, -1, 1]
        known = np.argwhere(mask)[:, ::-1]
        assert series.affine is not None
        known = known @ series.affine[:3, :3].T + series.affine[:3, 3]
        np.testing.assert_allclose(
            sorted(map(tuple, np.round(found, 3))), sorted(map(tuple, np.round(known, 3))), atol=1e-3
        )
    drawing = read_drawing(out, Ground(tmp_path / "series", series))
    assert [layer.name for layer in drawing.layers] == ["one", "two"]
    for layer, mask in zip(drawing.layers, masks.values(), strict=True):
        whole = np.zeros(mask.shape, bool)
        whole[tuple(slice(o, o + n) for o, n in zip(layer.origin, layer.values.shape, strict=True))] = layer.values
        np.testing.assert_array_equal(whole, mask)


def test_segments_of_one_file_with_all_frames_and_overlaps(tmp_path: Path) -> None:
    pytest.importorskip("highdicom")
    path = write_enhanced(tmp_path / "multi.dcm", toy_array().astype(np.uint16), [2, 0, 4, 3, 1], [(1, 0)] * 5)
    from pydicom import dcmread

    dataset = dcmread(path)
    dataset.DimensionOrganizationSequence, dataset.ContentDate, dataset.ContentTime = [], "", ""
    save(dataset, path)
    masks = np.random.default_rng(0).random((5, 2, 12, 10)) < 0.3
    with open_scan(path) as scan, LabelWriter(tmp_path / "seg.dcm", scan, ["one", "two"]) as writer:
        for number in range(5):
            writer.put(number, masks[number])
    drawing = read_drawing(tmp_path / "seg.dcm", Ground(path, read_volume(path)))
    for number, layer in enumerate(drawing.layers):
        np.testing.assert_array_equal(layer.values, masks[:, number])


def test_a_real_series_gets_segments(test_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("highdicom")
    for name in ("ct_liver_dicom_seg/image", "ct_sarcoma_dicom_rtstruct/STS_002/image"):
        path = test_data / name
        with open_scan(path) as scan, LabelWriter(tmp_path / "out.dcm", scan, ["bone"], overwrite=True) as writer:
            for number in range(len(scan)):
                writer.put(number, scan.raw(number)[None] > 200)
        volume = read_volume(path)
        layer = read_drawing(tmp_path / "out.dcm", Ground(path, volume)).layers[0]
        assert layer.values.sum() == (volume.array > 200).sum() > 1000
        z, y, x = (slice(o, o + n) for o, n in zip(layer.origin, layer.values.shape, strict=True))
        np.testing.assert_array_equal(layer.values != 0, volume.array[z, y, x] > 200)


def test_dicom_seg_needs_a_series_and_highdicom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_scan(image(tmp_path / "image.nii")) as scan:
        assert "is no DICOM series" in message(lambda: check_output(tmp_path / "a.dcm", scan, ["a"]))
    write_series(tmp_path / "series", toy_array())
    with open_scan(tmp_path / "series") as scan:
        assert "--separate" in message(lambda: check_output(tmp_path / "a.dcm", scan, ["a"], separate=True))
        monkeypatch.setitem(sys.modules, "highdicom", None)
        assert "pip install highdicom" in message(lambda: check_output(tmp_path / "a.dcm", scan, ["a"]))


# --- several objects


def test_where_objects_overlap_the_surer_one_wins_and_of_equals_the_first(tmp_path: Path) -> None:
    path = image(tmp_path / "image.nii")
    masks = np.zeros((3, 5, 6), bool)
    masks[0, 0:3], masks[1, 2:5], masks[2, 4] = True, True, True
    with open_scan(path) as scan, LabelWriter(tmp_path / "out.nii", scan, ["a", "b", "c"]) as writer:
        writer.put(0, ~masks)  # replaced below
        writer.put(0, masks)
        writer.put(1, masks, np.array([0.1, 0.9, 0.2]))
        writer.put(2, masks, np.array([0.5, 0.5, 0.6]))
        assert writer.contested == 3 * 12
    array = np.asarray(nibabel.load(tmp_path / "out.nii").dataobj)
    assert [array[0, :, number].tolist() for number in range(4)] == [
        [1, 1, 1, 2, 2],
        [1, 1, 2, 2, 2],
        [1, 1, 1, 2, 3],
        [0, 0, 0, 0, 0],
    ]
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["labels"][0] == {"name": "a", "value": 1, "voxels": 8 * 6, "file": "out.nii"}
    assert [label["voxels"] for label in record["labels"]] == [48, 36, 6]


def test_each_object_can_have_a_file_of_its_own(tmp_path: Path) -> None:
    path, masks = image(tmp_path / "image.nii"), np.ones((2, 5, 6), bool)
    masks[1, 2] = False
    with (
        open_scan(path) as scan,
        LabelWriter(tmp_path / "out.nii.gz", scan, ["left lung", "b/c"], separate=True) as writer,
    ):
        writer.put(3, masks)
    assert [file.name for file in writer.files] == ["out-left_lung.nii.gz", "out-b_c.nii.gz", "out.json"]
    for file, mask in zip(writer.files, masks, strict=False):
        array = np.asarray(nibabel.load(file).dataobj)
        np.testing.assert_array_equal(array[..., 3], mask.T)
        assert not array[..., :3].any()
    assert [label["voxels"] for label in json.loads((tmp_path / "out.json").read_text())["labels"]] == [30, 24]


def test_more_than_255_objects_take_two_bytes(tmp_path: Path) -> None:
    path, masks = image(tmp_path / "image.nii", shape=(20, 15, 2)), np.zeros((300, 15, 20), bool)
    masks[np.arange(300), np.arange(300) // 20, np.arange(300) % 20] = True
    with open_scan(path) as scan, LabelWriter(tmp_path / "out.nii", scan, [f"cell {n}" for n in range(300)]) as writer:
        writer.put(1, masks)
    labels = nibabel.load(tmp_path / "out.nii")
    assert labels.get_data_dtype() == np.uint16
    np.testing.assert_array_equal(np.asarray(labels.dataobj)[..., 1].T.ravel(), np.arange(1, 301))


# --- whole or not at all


def test_nothing_is_written_after_an_error_and_nothing_is_left_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = image(tmp_path / "image.nii")
    with open_scan(path) as scan:
        with pytest.raises(RuntimeError), LabelWriter(tmp_path / "out.nii", scan, ["a"]) as writer:
            writer.put(0, np.ones((1, 5, 6), bool))
            raise RuntimeError
        monkeypatch.setattr("trainer.volumes.output_files.json.dumps", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError), LabelWriter(tmp_path / "out.nii", scan, ["a"]):
            pass
    assert [file.name for file in tmp_path.iterdir()] == ["image.nii"]


def test_what_is_there_is_kept_unless_told(tmp_path: Path) -> None:
    path, out = image(tmp_path / "image.nii"), tmp_path / "new" / "out.nii"
    segment(path, out)
    before = out.read_bytes()
    assert "out.nii is there already: give --overwrite" in message(lambda: segment(path, out))
    out.unlink()
    assert "out.json is there already" in message(lambda: segment(path, out))
    segment(path, out, overwrite=True)
    assert out.read_bytes() == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_impossible_outputs_are_one_line_before_any_work(overwrite: bool, tmp_path: Path) -> None:
    path = image(tmp_path / "image.nii")
    np.savez(tmp_path / "image.npz", imgs=np.zeros((3, 5, 6), np.uint8))
    (tmp_path / "file").write_text("")

    def said(out: str, names: tuple[str, ...] = ("a",), **options: bool) -> str:
        return message(lambda: check_output(tmp_path / out, scan, names, overwrite=overwrite, **options))

    with open_scan(tmp_path / "image.npz") as scan:
        for suffix in (".nii.gz", ".nrrd", ".mha"):
            assert "does not say where it lies in a patient" in said(f"a{suffix}")
        assert "is the scan itself" in said("image.npz")
    with open_scan(path) as scan:
        assert "no label map is written as '.jpg'; write .nii, " in said("a.jpg")
        assert "is the scan itself" in said("image.nii")
        assert "is a file" in said("file/out.nii")
        assert "is a file" in said("file")
        assert "names, each another" in said("out.nii", ("a", "a")) and "names" in said("out.nii", ())
        assert "same file name" in said("out.nii", ("a b", "a/b"), separate=True)
    sheared = affine_of("LPS", False)
    sheared[0, 1] = 0.3
    with open_scan(image(tmp_path / "sheared.nii", sheared)) as scan:
        assert "not at right angles" in said("a.nrrd")
        check_output(tmp_path / "a.nii", scan, ["a"])


def test_uneven_slices_are_no_grid(tmp_path: Path) -> None:
    files = write_series(tmp_path / "series", toy_array((7, 6, 5)))
    files[3].unlink()
    with open_scan(tmp_path / "series", reader_options={"gaps": "allow"}) as scan:
        assert "even distances" in message(lambda: check_output(tmp_path / "a.nii", scan, ["a"]))


def test_masks_of_another_size_are_refused(tmp_path: Path) -> None:
    with (
        open_scan(image(tmp_path / "image.nii")) as scan,
        LabelWriter(tmp_path / "o.nii", scan, ["a"]) as writer,
        pytest.raises(ValueError, match=r"\(1, 5, 6\)"),
    ):
        writer.put(0, np.zeros((1, 6, 5), bool))


def test_a_full_disk_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*where: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with open_scan(image(tmp_path / "image.nii")) as scan:
        assert "TMPDIR" in message(lambda: LabelWriter(tmp_path / "o.nii", scan, ["a"]))


def test_a_large_label_map_takes_little_memory(tmp_path: Path) -> None:
    shape = (512, 512, 200)
    header = nibabel.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(np.uint8)
    header.set_sform(np.diag([-1.0, -1.0, 2.0, 1.0]), 1)
    with (tmp_path / "big.nii").open("wb") as file:
        header.set_data_offset(352)
        header.write_to(file)
        file.truncate(352 + int(np.prod(shape)))
    mask = np.zeros((1, 512, 512), bool)
    mask[0, 100:200, 50:70] = True
    tracemalloc.start()
    try:
        with open_scan(tmp_path / "big.nii") as scan, LabelWriter(tmp_path / "out.nii.gz", scan, ["a"]) as writer:
            for number in (5, 199):
                writer.put(number, mask)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()
    labels = nibabel.load(tmp_path / "out.nii.gz")
    assert int(np.asarray(labels.dataobj[..., 199]).sum()) == 2000
    assert int(np.asarray(labels.dataobj).sum()) == 4000
