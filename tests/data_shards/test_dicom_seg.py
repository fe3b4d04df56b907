from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813  # the field's habit
from pydicom import Dataset
from pydicom.pixels import pack_bits
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
)

from data_shards.errors import UserError
from data_shards.readers import Drawing, Ground, Layer, read_drawing, read_volume
from data_shards.readers.dicom_files import is_wanted

SHAPE = (4, 5, 7)  # 35 pixels: frames do not end with bytes
BUNDLED = Path(pydicom.__file__).parent / "data" / "test_files"


def full(layer: Layer, shape: tuple[int, ...]) -> np.ndarray:
    """A layer in the whole volume."""
    found = np.zeros(shape, layer.values.dtype)
    z, y, x = (slice(start, start + size) for start, size in zip(layer.origin, layer.values.shape, strict=True))
    found[z, y, x] = layer.values
    return found


def write(sources: list[Dataset], folder: Path) -> Ground:
    for number, dataset in enumerate(sources):
        save(dataset, folder / f"{number}.dcm")
    return Ground(folder, read_volume(folder))


@pytest.fixture
def sources() -> list[Dataset]:
    return make_series(toy_array(SHAPE))


@pytest.fixture
def ground(sources: list[Dataset], tmp_path: Path) -> Ground:
    return write(sources, tmp_path / "ct")


def masks(count: int = 3, seed: int = 0) -> np.ndarray:
    """Segments (Z, Y, X, S) that overlap; a slice of the second one is empty."""
    found = np.random.default_rng(seed).integers(0, 2, (*SHAPE, count)).astype(np.uint8)
    found[2, ..., 1] = 0
    return found


def check(drawing: Drawing, expected: np.ndarray) -> None:
    """Compare layers with segments (Z, Y, X, S)."""
    assert [layer.number for layer in drawing.layers] == list(range(1, expected.shape[-1] + 1))
    assert [layer.name for layer in drawing.layers] == [f"part {layer.number}" for layer in drawing.layers]
    for number, layer in enumerate(drawing.layers):
        np.testing.assert_array_equal(full(layer, expected.shape[:3]), expected[..., number])
        assert set(np.unique(layer.values)) <= {0, 1}


def of_highdicom(seg: Any, sources: list[Dataset], **options: Any) -> np.ndarray:
    """Segments (Z, Y, X, S) as highdicom decodes them."""
    return seg.get_pixels_by_source_instance(
        [dataset.SOPInstanceUID for dataset in sources],
        assert_missing_frames_are_empty=True,
        ignore_spatial_locations=True,
        **options,
    )


def test_overlapping_segments_stay_apart(sources: list[Dataset], ground: Ground, tmp_path: Path) -> None:
    seg = make_seg(sources, masks())
    assert seg.NumberOfFrames == 11  # the empty slice has no frame
    drawing = read_drawing(save(seg, tmp_path / "seg.dcm"), ground)
    assert not drawing.complete and drawing.volume is None
    check(drawing, of_highdicom(seg, sources))
    check(drawing, masks())


def test_layers_are_boxes(sources: list[Dataset], ground: Ground, tmp_path: Path) -> None:
    mask = np.zeros((*SHAPE, 1), np.uint8)
    mask[1:3, 2:4, 3:6] = 1
    layer = read_drawing(save(make_seg(sources, mask), tmp_path / "seg.dcm"), ground).layers[0]
    assert layer.origin == (1, 2, 3) and layer.values.shape == (2, 2, 3) and layer.values.all()


@pytest.mark.parametrize("fraction", [0.5, 0.25, 1.0])
def test_fractions(sources: list[Dataset], ground: Ground, tmp_path: Path, fraction: float) -> None:
    values = np.random.default_rng(1).random((*SHAPE, 2))
    values[0, 0, 0] = 1
    seg = make_seg(sources, values, "FRACTIONAL", max_fractional_value=200)
    path = save(seg, tmp_path / "seg.dcm")
    expected = of_highdicom(seg, sources, rescale_fractional=True) >= np.float32(fraction)
    assert 0 < expected.sum() < expected.size
    check(read_drawing(path, ground, fraction=fraction), expected)
    if fraction == 0.5:
        check(read_drawing(path, ground), expected)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.80"])  # RLE, JPEG-LS
def test_compressed_fractions(sources: list[Dataset], ground: Ground, tmp_path: Path, syntax: str) -> None:
    values = np.repeat(np.repeat(masks(2).astype(float), 8, axis=1), 8, axis=2)
    large = make_series(np.repeat(np.repeat(toy_array(SHAPE), 8, axis=1), 8, axis=2))
    seg = make_seg(large, values, "FRACTIONAL", transfer_syntax_uid=syntax)
    drawing = read_drawing(save(seg, tmp_path / "seg.dcm"), write(large, tmp_path / "large"))
    check(drawing, values)


def test_label_maps(sources: list[Dataset], ground: Ground, tmp_path: Path) -> None:
    labels = np.random.default_rng(2).integers(0, 4, SHAPE).astype(np.uint8)
    seg = make_seg(sources, labels, "LABELMAP")
    drawing = read_drawing(save(seg, tmp_path / "seg.dcm"), ground)
    check(drawing, np.stack([labels == number for number in (1, 2, 3)], axis=-1))
    seg.SegmentSequence = seg.SegmentSequence[:3]  # background, 1 and 2
    with pytest.raises(UserError, match=r"frame 1 holds 3, which is no segment's number"):
        read_drawing(save(seg, tmp_path / "seg.dcm"), ground)


def test_empty_segment_was_looked_for(sources: list[Dataset], ground: Ground, tmp_path: Path) -> None:
    mask = masks()
    mask[..., 2] = 0
    drawing = read_drawing(save(make_seg(sources, mask), tmp_path / "seg.dcm"), ground)
    assert [layer.values.shape for layer in drawing.layers][2] == (0, 0, 0)
    check(drawing, mask)


def shuffle(seg: Dataset, seed: int) -> None:
    """Put the frames of a binary segmentation into another order."""
    order = np.random.default_rng(seed).permutation(int(seg.NumberOfFrames))
    assert list(order) != sorted(order)
    seg.PixelData = pack_bits(seg.pixel_array[order])
    seg.PerFrameFunctionalGroupsSequence = [seg.PerFrameFunctionalGroupsSequence[number] for number in order]


def test_frames_in_any_order(sources: list[Dataset], ground: Ground, tmp_path: Path) -> None:
    seg = pydicom.dcmread(save(make_seg(sources, masks()), tmp_path / "seg.dcm"))
    shuffle(seg, 3)
    check(read_drawing(save(seg, tmp_path / "seg.dcm"), ground), masks())


VIEWS: dict[str, tuple[tuple[float, ...], Callable[[np.ndarray], np.ndarray], tuple[float, float, float]]] = {
    # Directions of rows and columns, the volume (Z, Y, X, …) as slices of that view, their distances.
    "rows turned round": ((-1, 0, 0, 0, 1, 0), lambda v: v[:, :, ::-1][::-1], SPACING),
    "both turned round": ((-1, 0, 0, 0, -1, 0), lambda v: v[:, ::-1, ::-1], SPACING),
    "coronal": ((1, 0, 0, 0, 0, -1), lambda v: v[::-1].swapaxes(0, 1), (0.75, 2.0, 0.5)),
    "sagittal": ((0, 1, 0, 0, 0, -1), lambda v: np.moveaxis(v[::-1, :, ::-1], (2, 0, 1), (0, 1, 2)), (0.5, 2.0, 0.75)),
    "columns first": ((0, 1, 0, 1, 0, 0), lambda v: v.swapaxes(1, 2)[::-1], (2.0, 0.5, 0.75)),
}


def in_view(array: np.ndarray, view: str) -> list[Dataset]:
    """The same volume as another series: slices in another plane, or turned round."""
    way, turn, spacing = VIEWS[view]
    place = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1) * SPACING + ORIGIN[::-1]
    first = turn(place)[0, 0, 0][::-1]
    return make_series(turn(array), spacing, way, first)


@pytest.mark.parametrize("view", VIEWS)
def test_frames_that_run_another_way(ground: Ground, tmp_path: Path, view: str) -> None:
    other = in_view(ground.volume.array, view)
    seen = write(other, tmp_path / "other")
    np.testing.assert_array_equal(seen.volume.array, ground.volume.array)  # the same volume indeed
    assert seen.volume.apart(ground.volume) < 1e-6
    seg = save(make_seg(other, np.ascontiguousarray(VIEWS[view][1](masks()))), tmp_path / "seg.dcm")
    check(read_drawing(seg, ground), masks())
    check(read_drawing(seg, seen), masks())


@pytest.mark.parametrize("view", VIEWS)
def test_axial_frames_on_other_series(sources: list[Dataset], ground: Ground, tmp_path: Path, view: str) -> None:
    seen = write(in_view(ground.volume.array, view), tmp_path / "other")
    check(read_drawing(save(make_seg(sources, masks()), tmp_path / "seg.dcm"), seen), masks())


def test_on_an_oblique_series(tmp_path: Path) -> None:
    angle = np.deg2rad(20)
    way = (np.cos(angle), np.sin(angle), 0.0, -np.sin(angle), np.cos(angle), 0.0)
    sources = make_series(toy_array(SHAPE), orientation=way)
    drawing = read_drawing(save(make_seg(sources, masks()), tmp_path / "seg.dcm"), write(sources, tmp_path / "ct"))
    check(drawing, masks())


def test_on_a_nifti_image(sources: list[Dataset], ground: Ground, tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(ground.volume.array)
    image.SetSpacing(SPACING[::-1])
    image.SetOrigin(ORIGIN)
    sitk.WriteImage(image, str(tmp_path / "ct.nii"))
    nifti = Ground(tmp_path / "ct.nii", read_volume(tmp_path / "ct.nii"))
    check(read_drawing(save(make_seg(sources, masks()), tmp_path / "seg.dcm"), nifti), masks())


def test_on_a_series_with_a_gap(tmp_path: Path) -> None:
    sources = make_series(toy_array((6, 5, 7)))
    mask = np.random.default_rng(5).integers(0, 2, (6, 5, 7, 1)).astype(np.uint8)
    mask[2] = 0
    seg = save(make_seg(sources, mask), tmp_path / "seg.dcm")
    del sources[2]
    for number, dataset in enumerate(sources):
        save(dataset, tmp_path / "ct" / f"{number}.dcm")
    ground = Ground(tmp_path / "ct", read_volume(tmp_path / "ct", gaps="allow"))
    check(read_drawing(seg, ground), np.delete(mask, 2, axis=0))
    mask[2, 0, 0] = 1  # something is drawn in the gap
    seg = save(make_seg(make_series(toy_array((6, 5, 7))), mask), tmp_path / "seg.dcm")
    with pytest.raises(UserError, match=r"frame \d does not lie on the voxels of its image \(up to 0\.5"):
        read_drawing(seg, ground)


def test_another_frame_of_reference(sources: list[Dataset], ground: Ground, tmp_path: Path) -> None:
    for dataset in sources:
        dataset.FrameOfReferenceUID, dataset.SeriesInstanceUID = "1.2.3", "1.2.4"
    seg = make_seg(sources, masks())
    path = save(seg, tmp_path / "seg.dcm")
    with pytest.raises(UserError, match=r"seg\.dcm: was drawn in another frame of reference than its image"):
        read_drawing(path, ground)
    check(read_drawing(path, ground, match="position"), masks())
    seg.ReferencedSeriesSequence[0].SeriesInstanceUID = "1.2.826.0.1.3680043.8.498.2"  # the image's
    check(read_drawing(save(seg, path), ground), masks())


@pytest.mark.parametrize(("shift", "fits"), [((0.1, -0.15, 0.4), True), ((0.3, 0, 0), False), ((0, 0, 1.2), False)])
def test_frames_between_voxels(ground: Ground, tmp_path: Path, shift: tuple[float, ...], fits: bool) -> None:
    moved = make_series(toy_array(SHAPE), origin=np.add(ORIGIN, shift))
    mask = masks()
    mask[-1] = mask[:, -1] = mask[:, :, -1] = 0  # nothing may leave the image
    path = save(make_seg(moved, mask), tmp_path / "seg.dcm")
    if fits:
        check(read_drawing(path, ground), mask)
        return
    with pytest.raises(UserError, match=r"does not lie on the voxels of its image \(up to 0\.4"):
        read_drawing(path, ground)


def test_other_pixels_and_what_lies_beyond(ground: Ground, tmp_path: Path) -> None:
    coarse = make_series(toy_array(SHAPE), spacing=(2.0, 1.5, 1.0))
    with pytest.raises(UserError, match=r"frame 1 does not lie on the voxels of its image.*resample"):
        read_drawing(save(make_seg(coarse, masks()), tmp_path / "seg.dcm"), ground)
    moved = make_series(toy_array(SHAPE), origin=np.add(ORIGIN, (0.5, 0, 0)))
    mask = masks()
    mask[:, :, -1] = 0
    expected = np.zeros_like(mask)
    expected[:, :, 1:] = mask[:, :, :-1]
    check(read_drawing(save(make_seg(moved, mask), tmp_path / "seg.dcm"), ground), expected)
    mask[0, 0, -1] = 1
    with pytest.raises(UserError, match=r"frame \d has voxels beyond its image"):
        read_drawing(save(make_seg(moved, mask), tmp_path / "seg.dcm"), ground)
    tilted = make_series(toy_array(SHAPE), orientation=(np.cos(0.5), np.sin(0.5), 0, -np.sin(0.5), np.cos(0.5), 0))
    with pytest.raises(UserError, match="does not lie on the voxels"):
        read_drawing(save(make_seg(tilted, masks()), tmp_path / "seg.dcm"), ground)


def without_places(path: Path) -> Dataset:
    seg = pydicom.dcmread(path)
    for item in seg.PerFrameFunctionalGroupsSequence:
        del item.PlanePositionSequence
    return seg


@pytest.mark.parametrize("view", ["axial", "coronal", "rows turned round"])
def test_images_are_named_where_places_are_not(tmp_path: Path, view: str) -> None:
    array = toy_array(SHAPE)
    sources = make_series(array) if view == "axial" else in_view(array, view)
    mask = masks() if view == "axial" else np.ascontiguousarray(VIEWS[view][1](masks()))
    ground = write(sources, tmp_path / "ct")
    seg = without_places(save(make_seg(sources, mask), tmp_path / "seg.dcm"))
    shuffle(seg, 4)
    check(read_drawing(save(seg, tmp_path / "seg.dcm"), ground), masks())
    seg.PerFrameFunctionalGroupsSequence[5].DerivationImageSequence = []
    with pytest.raises(UserError, match="frame 6 has no position and names no image"):
        read_drawing(save(seg, tmp_path / "seg.dcm"), ground)


def test_on_a_picture_without_a_place(tmp_path: Path) -> None:
    image = base("1.2.840.10008.5.1.4.1.1.1", "CR")
    set_pixels(image, np.arange(35, dtype=np.uint8).reshape(5, 7))
    ground = Ground(tmp_path / "cr.dcm", read_volume(save(image, tmp_path / "cr.dcm")))
    sources = make_series(toy_array((1, 5, 7)))
    sources[0].SOPInstanceUID = image.SOPInstanceUID
    seg = without_places(save(make_seg(sources, masks()[:1]), tmp_path / "seg.dcm"))
    check(read_drawing(save(seg, tmp_path / "seg.dcm"), ground), masks()[:1])
    image.SOPInstanceUID = "1.2.3"
    other = Ground(tmp_path / "other.dcm", read_volume(save(image, tmp_path / "other.dcm")))
    with pytest.raises(UserError, match="frame 1 was drawn on another image than"):
        read_drawing(tmp_path / "seg.dcm", other)
    check(read_drawing(tmp_path / "seg.dcm", other, match="position"), masks()[:1])
    set_pixels(image, np.zeros((7, 5), np.uint8))
    turned = Ground(tmp_path / "other.dcm", read_volume(save(image, tmp_path / "other.dcm")))
    with pytest.raises(UserError, match="frame 1 has 5 x 7 pixels, unlike its image"):
        read_drawing(tmp_path / "seg.dcm", turned)


def test_frames_of_one_file_are_named_by_number(sources: list[Dataset], tmp_path: Path) -> None:
    order = [3, 0, 2, 1]  # frame 1 of the image is its highest slice
    stored = (toy_array(SHAPE) + 1024).astype(np.uint16)
    enhanced = write_enhanced(tmp_path / "mr.dcm", stored, order, [(1.0, 0.0)] * 4)
    film = base("1.2.840.10008.5.1.4.1.1.3.1", "US")
    set_pixels(film, stored[order])
    film.NumberOfFrames = 4
    save(film, tmp_path / "us.dcm")
    seg = without_places(save(make_seg(sources, masks()), tmp_path / "seg.dcm"))
    slices = [dataset.SOPInstanceUID for dataset in sources]
    for path, expected in ((enhanced, masks()), (tmp_path / "us.dcm", masks()[order])):
        uid = pydicom.dcmread(path).SOPInstanceUID
        moved = pydicom.dcmread(tmp_path / "seg.dcm")
        for item, old in zip(seg.PerFrameFunctionalGroupsSequence, moved.PerFrameFunctionalGroupsSequence, strict=True):
            source = item.DerivationImageSequence[0].SourceImageSequence[0]
            named = old.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
            source.ReferencedSOPInstanceUID = uid
            source.ReferencedFrameNumber = order.index(slices.index(named)) + 1
        drawing = read_drawing(save(seg, tmp_path / "new.dcm"), Ground(path, read_volume(path)))
        check(drawing, expected)


def test_only_some_segments(sources: list[Dataset], ground: Ground, tmp_path: Path) -> None:
    path = save(make_seg(sources, masks()), tmp_path / "seg.dcm")
    assert [layer.number for layer in read_drawing(path, ground, regions=["PART 3", "part 1"]).layers] == [1, 3]
    assert [layer.number for layer in read_drawing(path, ground, regions=["part*"]).layers] == [1, 2, 3]
    assert read_drawing(path, ground, regions=["none"]).layers == ()


def test_folder_of_one_segmentation(sources: list[Dataset], ground: Ground, tmp_path: Path) -> None:
    save(make_seg(sources, masks()), ground.path / "seg.dcm")
    check(read_drawing(ground.path, ground), masks())
    save(make_rtstruct([]), ground.path / "rs.dcm")
    with pytest.raises(UserError, match="holds 2 segmentations or sets of contours: name one file"):
        read_drawing(ground.path, ground)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda seg: setattr(seg.SegmentSequence[1], "SegmentNumber", 1), "two of its segments have the number 1"),
        (lambda seg: delattr(seg, "SegmentSequence"), "lists no segments"),
        (lambda seg: setattr(seg, "SegmentSequence", seg.SegmentSequence[:2]), "belongs to no segment of its list"),
        (lambda seg: setattr(seg, "NumberOfFrames", 3), "has 3 frames and describes 11"),
        (lambda seg: setattr(seg, "SegmentationType", "OTHER"), "of this kind is not read"),
        (lambda seg: setattr(seg, "SegmentationType", "FRACTIONAL"), "does not say what the highest value is"),
        (lambda seg: setattr(seg, "PixelData", seg.PixelData[:10]), "fewer pixels than its header promises"),
    ],
)
def test_damage_is_one_line(
    sources: list[Dataset], ground: Ground, tmp_path: Path, change: Callable[[Dataset], None], message: str
) -> None:
    seg = pydicom.dcmread(save(make_seg(sources, masks()), tmp_path / "seg.dcm"))
    change(seg)
    with pytest.raises(UserError, match=message):
        read_drawing(save(seg, tmp_path / "seg.dcm"), ground)


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8, 0.999])
def test_truncated_segmentation(
    sources: list[Dataset], ground: Ground, tmp_path: Path, keep: float, capfd: pytest.CaptureFixture[str]
) -> None:
    path = save(make_seg(sources, masks()), tmp_path / "seg.dcm")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(UserError, match=r"seg\.dcm"):
        read_drawing(path, ground)
    assert capfd.readouterr() == ("", "")


def test_fraction_in_range(sources: list[Dataset], ground: Ground, tmp_path: Path) -> None:
    path = save(make_seg(sources, masks()), tmp_path / "seg.dcm")
    with pytest.raises(UserError, match=r"fraction must be above 0 and at most 1, got 1\.5"):
        read_drawing(path, ground, fraction=1.5)


def test_big_endian_bits(tmp_path: Path) -> None:
    # The same segmentation in both byte orders; the image is made to lie where it lies.
    seg = pydicom.dcmread(BUNDLED / "liver_1frame.dcm")
    item = seg.PerFrameFunctionalGroupsSequence[0]
    place = item.PlanePositionSequence[0].ImagePositionPatient
    spacing = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing
    image = make_series(
        np.zeros((1, 512, 512), np.int16), (1.0, *map(float, spacing)), AXIAL, [float(x) for x in place]
    )
    ground = write(image, tmp_path / "ct")
    expected = seg.pixel_array != 0
    for name in ("liver_1frame.dcm", "liver_expb_1frame.dcm"):
        seg = pydicom.dcmread(BUNDLED / name)
        seg.PerFrameFunctionalGroupsSequence = [item]
        path = save(seg, tmp_path / name)
        layer = read_drawing(path, ground, match="position").layers[0]
        np.testing.assert_array_equal(full(layer, (1, 512, 512))[0] != 0, expected)


def test_real_segmentations(test_data: Path) -> None:
    folder = test_data / "ct_liver_dicom_seg"
    ground = Ground(folder / "image", read_volume(folder / "image"))
    liver = read_drawing(folder / "seg" / "liver.dcm", ground)
    assert [(layer.name, int(layer.values.sum())) for layer in liver.layers] == [("Liver", 107098)]
    expected = read_volume(folder / "nrrd" / "liver_seg.nrrd").array
    np.testing.assert_array_equal(full(liver.layers[0], expected.shape), expected)
    shapes = read_drawing(folder / "seg" / "partial_overlaps.dcm", ground)
    assert [int(layer.values.sum()) for layer in shapes.layers] == [9602, 11888, 10743, 6693, 4713]
    reference = highdicom.seg.segread(folder / "seg" / "partial_overlaps.dcm")
    uids = [pydicom.dcmread(path).SOPInstanceUID for path in ground.volume.files]
    pixels = reference.get_pixels_by_source_instance(
        uids, assert_missing_frames_are_empty=True, ignore_spatial_locations=True
    )
    for number, layer in enumerate(shapes.layers):
        np.testing.assert_array_equal(full(layer, pixels.shape[:3]), pixels[..., number])


def test_brackets_in_names_are_text() -> None:
    assert is_wanted("GTV [1]", ["gtv [1]"]) and is_wanted("GTV [1]", ["*[1]"])
    assert not is_wanted("GTV 1", ["gtv [1]"]) and not is_wanted("a", ["[a]"])
