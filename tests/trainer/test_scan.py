import gzip
import itertools
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import yaml
from one_line import message
from PIL import Image
from toy_dicom import AXIAL, ORIGIN, SPACING, make_seg, make_series, save, toy_array, write_enhanced, write_series

from data_shards.build import build
from data_shards.dataset import ShardDataset
from data_shards.preprocessing import Axis, Percentiles, Window, cut
from data_shards.readers import read_volume
from trainer.volumes.scan import open_labels, open_scan, parse_spacing
from trainer.volumes.scan_intensity import fit, parse_intensity

AXES: tuple[Axis, ...] = ("axial", "coronal", "sagittal")
OBLIQUE = np.array([[0.1, -1.9, 0.4, 5], [0.2, 0.3, 2.9, -7], [0.95, 0.1, -0.2, 11], [0, 0, 0, 1]])
"""Axes to the right, up and back, turned by some degrees."""


def nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None, **fields: Any) -> Path:
    """Write (I, J, K); fields of the header by name."""
    image = nibabel.Nifti1Image(array, np.diag([-0.5, -0.75, 2, 1]) if affine is None else affine)
    for name, value in fields.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def values(shape: tuple[int, ...] = (7, 8, 9), dtype: str = "int16", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 250, shape).astype(dtype)


def patch(path: Path, place: int, data: bytes) -> Path:
    content = bytearray(path.read_bytes())
    content[place : place + len(data)] = data
    path.write_bytes(bytes(content))
    return path


# --- what a slice looks like


def source(kind: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """A volume of each format, with values from -1024 on; the mask is the image itself."""
    array = toy_array((5, 12, 10))
    if kind == "nifti":
        return nifti(folder / "image.nii.gz", array, OBLIQUE), {}
    if kind == "scaled":
        return nifti(folder / "image.nii", array, np.diag([3, -2, -1, 1.0]), scl_slope=0.5, scl_inter=3), {}
    if kind == "channels":
        several = np.stack([array, array[::-1]], axis=-1)
        return nifti(folder / "image.nii", several), {"channels": [1]}
    if kind == "nrrd":
        image = sitk.GetImageFromArray(array)
        image.SetDirection((0, 0, 1, 1, 0, 0, 0, -1, 0))
        image.SetSpacing((0.5, 0.75, 2))
        sitk.WriteImage(image, folder / "image.nrrd")
        return folder / "image.nrrd", {}
    if kind == "npz":
        np.savez(folder / "image.npz", imgs=array, gts=(array > 0).astype(np.uint8), spacing=np.array([0.5, 0.75, 2]))
        return folder / "image.npz", {}
    turned = {"dicom": AXIAL, "sagittal dicom": (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)}[kind]
    write_series(folder / "image", array, ["b", "a", "d", "c", "e"], orientation=turned)
    return folder / "image", {}


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("kind", ["nifti", "scaled", "channels", "nrrd", "npz", "dicom", "sagittal dicom"])
def test_a_slice_is_that_of_shards_of_the_same_file(kind: str, axis: Axis, tmp_path: Path) -> None:
    path, options = source(kind, tmp_path)
    mask = path
    if kind != "npz":
        volume = read_volume(path, **options)
        labels = np.where(volume.array > 100, np.uint8(1), np.uint8(0)).transpose(2, 1, 0)
        assert volume.affine is not None
        mask = nifti(tmp_path / "mask.nii", labels, volume.affine)
    spec = {
        "dataset": "toy",
        "salt": "public",
        "modality": "CT",
        "cases": [{"image": str(path), "mask": str(mask), "patient": "p", "id": "p"}],
        "targets": [{"term": "bright", "value": 1}],
        "intensity": {"kind": "percentiles", "low": 2, "high": 98, "nonzero": False},
        "slices": {"axis": axis, "keep": "all"},
        "reader": options,
        "split": {"kind": "external"},
    }
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    build(tmp_path / "spec.yaml", tmp_path / "shards")
    shards = ShardDataset(next(path.parent for path in (tmp_path / "shards").rglob("*.tar")))
    with open_scan(path, axis=axis, intensity=spec["intensity"], reader_options=options) as scan:
        assert len(scan) == len(shards)
        for number in range(len(shards)):
            sample = shards[number]
            place = sample.provenance.slice_index
            assert place is not None
            image = scan.image(place)
            assert image.shape[0] == 1 and str(image.dtype) == "torch.uint8"
            np.testing.assert_array_equal(image[0].numpy(), sample.image)
            assert scan.size == sample.image.shape
            row, column = sample.provenance.spacing
            assert scan.spacing == (sample.provenance.slice_spacing, row, column)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(
    "name",
    [
        "ct_abdomen_totalseg_nifti/example_ct_sm.nii.gz",
        "mr_spinal_cord_nifti/t1/t1w.nii.gz",
        "mr_spinal_cord_nifti/t2s/t2s.nii.gz",
        "ct_sarcoma_dicom_rtstruct/STS_002/image",
        "mr_brain_tumor_nrrd/brain1_image.nrrd",
        "ct_lesion_recist_npz/CT_Lesion_000001_02_01_008-023.npz",
    ],
)
def test_real_volumes_are_cut_as_for_shards(test_data: Path, name: str, axis: Axis) -> None:
    volume = read_volume(test_data / name)
    stack, rescale = cut(volume, axis), Percentiles().fit(volume.array)
    with open_scan(test_data / name, axis=axis, intensity="percentiles") as scan:
        assert len(scan) == len(stack.slices) and scan.rescale == rescale
        for number in (*range(0, len(scan), 7), len(scan) - 1):
            np.testing.assert_array_equal(scan.raw(number), stack.slices[number])
            np.testing.assert_array_equal(scan.image(number)[0].numpy(), rescale.apply(stack.slices[number]))
        assert scan.spacing is not None and stack.spacing is not None
        assert scan.spacing[1:] == stack.spacing and scan.spacing[0] == stack.slice_spacing


def test_frames_are_read_in_natural_order_and_keep_their_colours(tmp_path: Path) -> None:
    for number in (10, 9, 2):
        Image.fromarray(np.full((4, 6, 3), [number, 0, 50], np.uint8)).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".hidden").write_text("yours")
    with open_scan(tmp_path, axis="sagittal") as scan:
        assert (len(scan), scan.size, scan.flat, scan.spacing, scan.axis) == (3, (4, 6), True, None, "axial")
        assert [int(scan.image(number)[0, 0, 0]) for number in range(3)] == [2, 9, 10]
        assert scan.image(1).shape == (3, 4, 6)
        assert scan.notes == (f"{tmp_path}: 1 entry of it that are no pictures: ignored",)


def test_a_tiff_with_pages_is_a_stack(tmp_path: Path) -> None:
    array = values((5, 4, 6), "uint8")
    pages = [Image.fromarray(page) for page in array]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    with open_scan(tmp_path / "stack.tif") as scan:
        assert len(scan) == 5
        np.testing.assert_array_equal(scan.image(3)[0].numpy(), array[3])


def test_colours_of_a_nifti(tmp_path: Path) -> None:
    colours = values((4, 5, 3, 3), "uint8")
    record = np.ascontiguousarray(colours).view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    path = nifti(tmp_path / "rgb.nii", record)
    with open_scan(path, axis="coronal") as scan:
        expected = cut(read_volume(path), "coronal").slices
        np.testing.assert_array_equal(np.stack([scan.image(n).numpy() for n in range(5)]), np.moveaxis(expected, -1, 1))


def test_frames_of_one_dicom_file_in_another_order_and_with_other_scales(tmp_path: Path) -> None:
    array = values((4, 6, 5), "uint16")
    path = write_enhanced(tmp_path / "multi.dcm", array, [2, 0, 3, 1], [(1, 0), (2, -5), (0.5, 0), (1, 1)])
    expected = read_volume(path)
    for axis in AXES:
        with open_scan(path, axis=axis, intensity="none") as scan:
            for number, known in enumerate(cut(expected, axis).slices):
                np.testing.assert_array_equal(scan.raw(number), known)


# --- intensity


@pytest.mark.parametrize("nonzero", [True, False])
@pytest.mark.parametrize(
    "dtype",
    ["uint8", "int8", "int16", "uint16", ">i2", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64"],
)
def test_percentiles_are_exactly_those_of_the_whole(dtype: str, nonzero: bool) -> None:
    array = np.random.default_rng(1).normal(0, 300, (7, 33, 21))
    array[array < -100] = 0
    array = np.abs(array) if np.dtype(dtype).kind == "u" else array
    array = (array / 10 if np.dtype(dtype).itemsize == 1 else array).astype(dtype)
    for low, high in ((0.5, 99.5), (0, 100), (37.3, 50)):
        rule = Percentiles(low, high, nonzero)
        assert fit(rule, lambda: array)[0] == rule.fit(array)


def test_percentiles_of_slices_whose_dtypes_differ_and_of_a_blank_volume() -> None:
    slices = [values((9, 9)), values((9, 9), seed=1) * np.float32(1.7)]
    assert fit(Percentiles(), lambda: slices)[0] == Percentiles().fit(np.stack(slices))
    blank = np.zeros((2, 3, 3), np.int16)
    assert fit(Percentiles(), lambda: blank)[0] == Percentiles().fit(blank)


@pytest.mark.parametrize("rule", ["minmax", "rgb", "window:-100,50", "none"])
def test_other_rules_are_those_of_the_specs(rule: str, tmp_path: Path) -> None:
    array = values((6, 5, 4)) - np.int16(120)
    with open_scan(nifti(tmp_path / "a.nii", array), intensity=rule) as scan:
        expected = parse_intensity(rule)
        assert expected is not None and scan.rescale == expected.fit(array)


def test_without_a_rule_8_bits_stay_and_all_else_is_stretched(tmp_path: Path) -> None:
    with open_scan(nifti(tmp_path / "a.nii", values(dtype="uint8"))) as scan:
        assert scan.rescale.kind == "none" and not scan.notes
    with open_scan(nifti(tmp_path / "b.nii", values(dtype="int16"))) as scan:
        assert scan.rescale.kind == "percentiles" and not scan.notes


def test_what_looks_like_ct_is_told(tmp_path: Path) -> None:
    path = nifti(tmp_path / "ct.nii", values() - np.int16(1000))
    with open_scan(path) as scan:
        assert len(scan.notes) == 1 and "--intensity window:-160,240" in scan.notes[0] and "-1000" in scan.notes[0]
    with open_scan(path, intensity="percentiles") as scan:
        assert not scan.notes


def test_rules_in_words() -> None:
    assert parse_intensity("window:-160,240") == Window(level=40, width=400)
    assert parse_intensity("window:lung") == Window(name="lung")
    assert parse_intensity("percentiles:1,99") == Percentiles(1, 99)
    assert parse_intensity("{kind: percentiles, nonzero: false}") == Percentiles(nonzero=False)
    assert parse_intensity(None) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("windw:1,2", "did you mean 'window'"),
        ("window", "window:LOW,HIGH"),
        ("window:lng", "soft_tissue, lung"),
        ("window:5", "two numbers"),
        ("window:5,1", "lowest value comes first"),
        ("window:nan,1", "finite"),
        ("percentiles:0.005,0.9", "per cent"),
        ("none:3", "is no intensity rule"),
        ("{kind: wndow}", "did you mean 'window'"),
        ("{a", "no mapping"),
    ],
)
def test_a_wrong_rule_is_one_line(text: str, says: str) -> None:
    said = message(lambda: parse_intensity(text))
    assert says in said and said.startswith("--intensity")


# --- memory


def big(path: Path, shape: tuple[int, int, int] = (640, 640, 384)) -> Path:
    """314 MB of zeros, with 1600 numbers in them, that take no room on the disk."""
    header = nibabel.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(np.int16)
    header.set_sform(np.diag([-1.0, -1.0, 2.0, 1.0]), 1)
    header.set_data_offset(352)
    with path.open("wb") as file:
        header.write_to(file)
        file.truncate(352 + 2 * int(np.prod(shape)))
    np.memmap(path, np.int16, "r+", 352, shape, "F")[270:310, 270:310, 100] = np.arange(1600).reshape(40, 40)
    return path


@pytest.mark.parametrize("axis", AXES)
def test_a_large_volume_is_streamed(axis: Axis, tmp_path: Path) -> None:
    path = big(tmp_path / "big.nii")
    tracemalloc.start()
    try:
        rule = "percentiles" if axis == "axial" else "window:0,1599"
        with open_scan(path, axis=axis, intensity=rule) as scan:
            number = {"axial": 100, "coronal": 300, "sagittal": 300}[axis]
            assert int(scan.raw(number).max()) >= 20 * 40
            assert scan.rescale.high == (pytest.approx(1591.01) if axis == "axial" else 1599)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


def test_a_large_packed_volume_is_streamed_too(tmp_path: Path) -> None:
    path = tmp_path / "big.nii.gz"
    with gzip.open(path, "wb", compresslevel=1) as packed:
        packed.write(big(tmp_path / "big.nii", (320, 320, 384)).read_bytes())
    tracemalloc.start()
    try:
        with open_scan(path, axis="sagittal", intensity="window:0,1", spacing=(2, 1, 1)) as scan:
            assert scan.raw(309).shape == (384, 320)
            assert int(scan.raw(309).max()) == 1599
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


def test_slices_of_a_series_are_decoded_when_they_are_asked_for(tmp_path: Path) -> None:
    files = write_series(tmp_path / "series", toy_array())
    damaged = make_series(toy_array())[3]
    damaged.PixelData = damaged.PixelData[:-8]
    save(damaged, files[3])
    with open_scan(tmp_path / "series", intensity="window:lung") as scan:
        scan.image(2)
        assert str(files[3]) in message(lambda: scan.image(3))
    assert str(files[3]) in message(lambda: open_scan(tmp_path / "series", axis="coronal", intensity="window:lung"))


# --- mistakes


def test_what_is_missing_or_no_volume(tmp_path: Path) -> None:
    assert "no such file" in message(lambda: open_scan(tmp_path / "missing.nii"))
    (tmp_path / "text.xyz").write_text("")
    assert "no reader" in message(lambda: open_scan(tmp_path / "text.xyz"))
    assert "did you mean 'axial'" in message(lambda: open_scan(nifti(tmp_path / "a.nii", values()), axis="axal"))  # type: ignore[arg-type]
    (tmp_path / "folder" / "more").mkdir(parents=True)
    assert "neither pictures nor DICOM" in message(lambda: open_scan(tmp_path / "folder"))
    for cut_off in ("cut.nii", "cut.nii.gz"):
        path = nifti(tmp_path / cut_off, values())
        path.write_bytes(path.read_bytes()[:-40])
        assert "is it complete?" in message(lambda path=path: open_scan(path))
    said = message(lambda: open_scan(nifti(tmp_path / "time.nii", values((4, 4, 4, 6)))))
    assert "(4, 4, 4, 6)" in said and "channels" in said
    assert "did you mean 'channels'" in message(
        lambda: open_scan(nifti(tmp_path / "a.nii", values()), reader_options={"chanels": [0]})
    )


def test_a_folder_of_both_kinds_and_frames_that_do_not_fit(tmp_path: Path) -> None:
    for name, size in (("1.png", (6, 4)), ("2.png", (5, 4))):
        Image.new("L", size).save(tmp_path / name)
    with open_scan(tmp_path) as scan:
        said = message(lambda: scan.image(1))
        assert "2.png" in said and "5 x 4" in said and "6 x 4" in said
    write_series(tmp_path, toy_array())
    assert "both pictures and DICOM" in message(lambda: open_scan(tmp_path))


def test_values_that_are_no_numbers_are_told_with_their_slice(tmp_path: Path) -> None:
    array = values(dtype="float32")
    array[2, 3, 4], array[1, 1, 6], array[0, 1, 6] = np.nan, np.inf, np.nan
    path = nifti(tmp_path / "nan.nii", array)
    for rule in (None, "window:0,100", "none", "minmax"):
        said = message(lambda rule=rule: open_scan(path, intensity=rule))
        assert "slice 4: 1 of its 56 values" in said and "--fill" in said
    with open_scan(path, intensity="none", fill=-3) as scan:
        filled = cut(read_volume(path), "axial").slices
        np.testing.assert_array_equal(scan.raw(6), np.where(np.isfinite(filled[6]), filled[6], -3))
    assert "--fill nan" in message(lambda: open_scan(path, fill=float("nan")))


def test_too_few_slices_and_slices_that_are_not_there(tmp_path: Path) -> None:
    with open_scan(nifti(tmp_path / "one.nii", values((5, 5, 1)))) as scan:
        said = message(lambda: scan.require_slices(2))
        assert "has 1 slice, 2 are needed" in said and "another axis" in said
        scan.require_slices(1)
        assert "no slice 1, only 0 to 0" in message(lambda: scan.image(1))
        assert "no slice -1" in message(lambda: scan.image(-1))


def test_spacing_is_asked_for_where_the_file_does_not_say(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", imgs=values())
    unknown = nifti(tmp_path / "a.nii", values())
    patch(patch(unknown, 80, bytes(12)), 252, bytes(4))  # pixdim[1:4], qform_code and sform_code
    for path in (tmp_path / "a.npz", unknown):
        with open_scan(path) as scan:
            assert scan.spacing is None
            said = message(lambda scan=scan: scan.require_spacing("a surface distance in 3D"))
            assert "--spacing z,y,x" in said and "which a surface distance in 3D needs" in said and str(path) in said
        with open_scan(path, axis="sagittal", spacing=(5, 0.7, 0.8)) as scan:
            assert scan.require_spacing("x") == (0.8, 5, 0.7)
    with open_scan(nifti(tmp_path / "known.nii", values()), spacing=(1, 1, 1)) as scan:
        assert scan.spacing == (1, 1, 1) and "2,0.75,0.5 mm apart (z,y,x); --spacing wins" in scan.notes[0]


def test_spacing_in_words() -> None:
    assert parse_spacing("5,0.7,0.8") == (5, 0.7, 0.8)
    for text in ("5,0.7", "a,b,c", ""):
        assert "three numbers" in message(lambda text=text: parse_spacing(text))
    for text in ("0,1,1", "-1,1,1", "nan,1,1"):
        assert "above 0" in message(lambda text=text: parse_spacing(text))


def test_a_missing_slice_of_a_series_is_told_and_may_be_allowed(tmp_path: Path) -> None:
    files = write_series(tmp_path, toy_array((7, 6, 5)))
    files[3].unlink()
    assert "is a file missing?" in message(lambda: open_scan(tmp_path))
    with open_scan(tmp_path, reader_options={"gaps": "allow"}) as scan:
        assert len(scan) == 6 and not scan.grid.even


# --- what was drawn on a scan


def test_labels_are_cut_like_their_scan(tmp_path: Path) -> None:
    image = nifti(tmp_path / "image.nii", values((6, 5, 4)), OBLIQUE)
    drawn = values((6, 5, 4), "uint8", 3) // 80
    mask = nifti(tmp_path / "mask.nii.gz", drawn.astype(np.float32), OBLIQUE)
    for axis in AXES:
        with open_scan(image, axis=axis) as scan, open_labels(mask, scan) as labels:
            expected = cut(read_volume(mask), axis).slices
            assert labels.raw(1).dtype.kind == "i" and labels.size == scan.size and len(labels) == len(scan)
            np.testing.assert_array_equal([labels.raw(n) for n in range(len(scan))], expected)


def test_labels_that_do_not_fit(tmp_path: Path) -> None:
    with open_scan(nifti(tmp_path / "image.nii", values())) as scan:
        other = nifti(tmp_path / "other.nii", values((7, 8, 3), "uint8"))
        assert "shape (3, 8, 7) (z, y, x) differs from (9, 8, 7)" in message(lambda: open_labels(other, scan))
        away = nifti(tmp_path / "away.nii", values(dtype="uint8"), np.diag([-0.5, -0.75, 2.5, 1]))
        assert "mm apart" in message(lambda: open_labels(away, scan))
        parts = nifti(tmp_path / "parts.nii", values(dtype="float32") / 7)
        assert "fractions" in message(lambda: open_labels(parts, scan))
        assert "no such file" in message(lambda: open_labels(tmp_path / "none.nii", scan))


def test_segments_of_a_dicom_seg_have_their_names(tmp_path: Path) -> None:
    write_series(tmp_path / "series", toy_array())
    masks = np.zeros((5, 12, 10, 2), np.uint8)
    masks[1:3, 2:5, 3:6, 0] = masks[2:4, 4:7, 5:8, 1] = 1
    save(make_seg(make_series(toy_array()), masks), tmp_path / "seg.dcm")
    expected = np.where(masks[..., 0], 1, 2 * masks[..., 1])
    with open_scan(tmp_path / "series") as scan:
        labels = open_labels(tmp_path / "seg.dcm", scan, {"match": "position"})
        assert labels.label_names == {1: "part 1", 2: "part 2"}
        np.testing.assert_array_equal([labels.raw(n) for n in range(5)], expected)


def test_masks_of_frames(tmp_path: Path) -> None:
    drawn = values((3, 4, 6), "uint8") // 100
    for folder, name in itertools.product(("frames", "masks"), range(3)):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(drawn[name]).save(tmp_path / folder / f"{name}.png")
    with open_scan(tmp_path / "frames") as scan:
        labels = open_labels(tmp_path / "masks", scan)
        np.testing.assert_array_equal([labels.raw(n) for n in range(3)], drawn)
        (tmp_path / "masks" / "2.png").unlink()
        assert "2 masks" in message(lambda: open_labels(tmp_path / "masks", scan))


def test_toy_series_has_the_spacing_that_it_says(tmp_path: Path) -> None:
    write_series(tmp_path, toy_array())
    with open_scan(tmp_path, axis="coronal") as scan:
        assert scan.spacing == pytest.approx((SPACING[1], SPACING[0], SPACING[2]))
        assert scan.grid.affine is not None
        np.testing.assert_allclose(scan.grid.affine[:3, 3], np.array(ORIGIN) * [-1, -1, 1])
