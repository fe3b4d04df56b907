from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813  # the field's habit
from matplotlib.path import Path as Outline
from pydicom import Dataset
from toy_dicom import AXIAL, FRAME, ORIGIN, SPACING, base, make_rtstruct, make_series, save, set_pixels, toy_array

from data_shards.errors import UserError
from data_shards.readers import Drawing, Ground, Layer, read_drawing, read_volume
from data_shards.readers.contours import fill

SHAPE = (5, 12, 10)
CLOSED = "CLOSED_PLANAR"


def square(low: float, high: float) -> np.ndarray:
    return np.array([[low, low], [high, low], [high, high], [low, high]])


def drawn(mask: np.ndarray) -> list[str]:
    return ["".join("#" if value else "." for value in row) for row in mask]


def test_fill_takes_centres() -> None:
    assert drawn(fill([square(0.6, 2.4)], 4, 4)) == ["....", ".##.", ".##.", "...."]
    assert drawn(fill([np.array([[0.5, -0.5], [3.5, 1.5], [0.5, 1.5]])], 3, 4)) == [".#..", ".##.", "...."]
    assert fill([], 3, 4).sum() == 0


def test_fill_of_centres_on_edges() -> None:
    # To the right of a left edge and below an upper one is inside, so that neighbours share no pixel and leave none.
    assert drawn(fill([square(1, 3)], 5, 5)) == [".....", ".##..", ".##..", ".....", "....."]
    left = np.array([[0, 0], [2, 0], [3, 4], [0, 4]])
    right = np.array([[2, 0], [5, 0], [5, 4], [3, 4]])
    parts = [fill([part], 5, 6) for part in (left, right)]
    assert not (parts[0] & parts[1]).any()
    np.testing.assert_array_equal(parts[0] | parts[1], fill([np.array([[0, 0], [5, 0], [5, 4], [0, 4]])], 5, 6))


def test_fill_leaves_holes_and_islands() -> None:
    rings = [square(-0.5, 8.5), square(1.5, 6.5), square(3.5, 4.5)]
    expected = np.ones((9, 9), bool)
    expected[2:7, 2:7] = False
    expected[4, 4] = True
    np.testing.assert_array_equal(fill(rings, 9, 9), expected)
    np.testing.assert_array_equal(fill([ring[::-1] for ring in rings], 9, 9), expected)
    # A hole at the end of a channel: one contour, there and back along one line.
    keyhole = np.concatenate([square(-0.5, 8.5), square(-0.5, 8.5)[:1], square(1.5, 6.5), square(1.5, 6.5)[:1]])
    expected[4, 4] = False
    np.testing.assert_array_equal(fill([keyhole], 9, 9), expected)
    touching = fill([square(-0.5, 2.5), square(2.5, 4.5)], 6, 6)  # at a corner
    assert touching.sum() == 9 + 4


def test_fill_of_tiny_and_broken_polygons() -> None:
    assert fill([square(1.1, 1.9)], 4, 4).sum() == 0  # no centre inside
    assert drawn(fill([square(0.9, 1.1)], 3, 3)) == ["...", ".#.", "..."]
    for points in ([[1, 1]], [[0, 0], [3, 3]], [[1, 1], [1, 1], [1, 1]]):
        assert fill([np.array(points, float)], 4, 4).sum() == 0
    assert fill([square(1, 2), square(1, 2)], 4, 4).sum() == 0  # twice the same is nothing


def test_fill_cuts_at_the_border() -> None:
    np.testing.assert_array_equal(fill([square(-100, 100)], 3, 5), np.ones((3, 5), bool))
    assert drawn(fill([square(-100, 1.5)], 3, 4)) == ["##..", "##..", "...."]
    assert drawn(fill([square(1.5, 100)], 3, 4)) == ["....", "....", "..##"]


@pytest.mark.parametrize("seed", range(6))
def test_fill_is_that_of_a_reference(seed: int) -> None:
    random = np.random.default_rng(seed)
    angles = np.sort(random.uniform(0, 2 * np.pi, 40))
    radii = random.uniform(3, 25, 40)  # a star, whose corners are no centres
    star = np.stack([30 + radii * np.cos(angles), 28 + radii * np.sin(angles)], axis=1)
    rows, columns = np.mgrid[:60, :64]
    expected = Outline(np.concatenate([star, star[:1]]), closed=True).contains_points(
        np.stack([columns.ravel(), rows.ravel()], axis=1)
    )
    np.testing.assert_array_equal(fill([star], 60, 64), expected.reshape(60, 64))


def test_fill_is_fast() -> None:
    angles = np.linspace(0, 2 * np.pi, 5000, endpoint=False)
    radii = 200 + 20 * np.sin(37 * angles)
    outline = np.stack([256 + radii * np.cos(angles), 256 + radii * np.sin(angles)], axis=1)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        mask = fill([outline], 512, 512)
        seconds.append(time.perf_counter() - start)
    assert mask.sum() == pytest.approx(np.pi * (200**2 + 20**2 / 2), rel=1e-3)
    assert min(seconds) < 0.02


def full(layer: Layer) -> np.ndarray:
    found = np.zeros(SHAPE, np.uint8)
    z, y, x = (slice(start, start + size) for start, size in zip(layer.origin, layer.values.shape, strict=True))
    found[z, y, x] = layer.values
    return found


def in_mm(outline: np.ndarray, depth: float) -> np.ndarray:
    """Corners (x, y) in pixels of an axial slice, as points of the patient."""
    return np.column_stack([outline * SPACING[:0:-1], np.full(len(outline), depth * SPACING[0])]) + ORIGIN


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    for number, dataset in enumerate(make_series(toy_array(SHAPE))):
        save(dataset, tmp_path / "ct" / f"{number}.dcm")
    return Ground(tmp_path / "ct", read_volume(tmp_path / "ct"))


def draw(tmp_path: Path, ground: Ground, *regions: tuple, **options: object) -> Drawing:  # type: ignore[type-arg]
    return read_drawing(save(make_rtstruct(regions), tmp_path / "rs.dcm"), ground, **options)


def test_regions_become_layers(tmp_path: Path, ground: Ground) -> None:
    organ = [(CLOSED, in_mm(square(1.5, 7.5), depth)) for depth in (1, 2)]
    hole = (CLOSED, in_mm(square(3.5, 5.5), 2))
    second = (CLOSED, in_mm(square(7.5, 8.5), 1))
    lesion = ("CLOSEDPLANAR_XOR", in_mm(square(2.5, 4.5), 1))
    drawing = draw(tmp_path, ground, ("Organ", [*organ, hole, second]), ("Lesion 1", [lesion]))
    expected = np.zeros(SHAPE, np.uint8)
    expected[1:3, 2:8, 2:8] = 1
    expected[2, 4:6, 4:6] = 0
    expected[1, 8, 8] = 1
    assert not drawing.complete and drawing.volume is None
    assert [(layer.name, layer.number) for layer in drawing.layers] == [("Organ", 1), ("Lesion 1", 2)]
    np.testing.assert_array_equal(full(drawing.layers[0]), expected)
    assert drawing.layers[0].origin[0] == 1 and drawing.layers[0].values.shape[0] == 2  # a box
    lesion_mask = np.zeros(SHAPE, np.uint8)
    lesion_mask[1, 3:5, 3:5] = 1  # overlaps the organ
    np.testing.assert_array_equal(full(drawing.layers[1]), lesion_mask)


def test_points_and_empty_regions_have_no_layer(tmp_path: Path, ground: Ground) -> None:
    point = ("POINT", in_mm(np.array([[2.0, 2.0]]), 1))
    line = ("OPEN_PLANAR", in_mm(square(1, 3), 1))
    tiny = (CLOSED, in_mm(square(1.2, 1.8), 1))
    real = (CLOSED, in_mm(square(1.5, 3.5), 1))
    drawing = draw(
        tmp_path, ground, ("iso", [point]), ("line", [line]), ("none", []), ("tiny", [tiny]), ("a", [point, real])
    )
    assert [(layer.name, layer.number, int(layer.values.sum())) for layer in drawing.layers] == [("a", 5, 4)]


def test_contours_between_slices(tmp_path: Path, ground: Ground) -> None:
    outline = square(1.5, 4.5)
    assert full(draw(tmp_path, ground, ("a", [(CLOSED, in_mm(outline, 1.4))])).layers[0])[1].sum() == 9
    assert full(draw(tmp_path, ground, ("a", [(CLOSED, in_mm(outline, 1.6))])).layers[0])[2].sum() == 9
    with pytest.raises(UserError, match=r"region 'a'.*a contour lies 2\.0 slices beyond the image"):
        draw(tmp_path, ground, ("a", [(CLOSED, in_mm(outline, 6))]))
    with pytest.raises(UserError, match=r"a contour lies 0\.6 slices beyond the image"):
        draw(tmp_path, ground, ("a", [(CLOSED, in_mm(outline, -0.6))]))
    with pytest.raises(UserError, match="contours lie closer to each other than the image's slices"):
        draw(tmp_path, ground, ("a", [(CLOSED, in_mm(outline, depth)) for depth in (1, 1.3)]))


def test_one_faulty_region_can_be_left_out(tmp_path: Path, ground: Ground) -> None:
    regions = [("couch", [(CLOSED, in_mm(square(1.5, 4.5), 40))]), ("GTV 1", [(CLOSED, in_mm(square(1.5, 4.5), 1))])]
    with pytest.raises(UserError, match=r"region 'couch' \(others can be read without it: reader: \{regions:"):
        draw(tmp_path, ground, *regions)
    layers = draw(tmp_path, ground, *regions, regions=["gtv*"]).layers
    assert [(layer.name, layer.number) for layer in layers] == [("GTV 1", 2)]


def test_contours_beyond_the_edge_are_cut_off(tmp_path: Path, ground: Ground) -> None:
    layer = draw(tmp_path, ground, ("a", [(CLOSED, in_mm(square(-5, 2.5), 1))])).layers[0]
    expected = np.zeros(SHAPE, np.uint8)
    expected[1, :3, :3] = 1
    np.testing.assert_array_equal(full(layer), expected)
    with pytest.raises(UserError, match=r"region 'a'.*its contours lie beside the image"):
        draw(tmp_path, ground, ("a", [(CLOSED, in_mm(square(20, 30), 1))]))


def test_contours_across_slices(tmp_path: Path, ground: Ground) -> None:
    points = in_mm(square(1.5, 4.5), 1)
    points[:2, 2] += 3
    with pytest.raises(UserError, match=r"region 'tilted'.*a contour runs across slices of the image"):
        draw(tmp_path, ground, ("tilted", [(CLOSED, points)]), ("flat", [(CLOSED, in_mm(square(1.5, 4.5), 1))]))


TURN = np.deg2rad(20)


@pytest.mark.parametrize(
    "way",
    [
        AXIAL,
        (-1, 0, 0, 0, -1, 0),
        (0, 1, 0, 0, 0, -1),
        (1, 0, 0, 0, 0, -1),
        (np.cos(TURN), np.sin(TURN), 0, -np.sin(TURN), np.cos(TURN), 0),
    ],
)
def test_any_orientation_of_slices(tmp_path: Path, way: tuple[float, ...]) -> None:
    # The inside of a contour is marked in the pixels too: the mask has to be where the pixels are.
    inside = np.zeros(SHAPE, bool)
    inside[1:4, 3:9, 2:6] = True
    sources = make_series(inside.astype(np.int16), orientation=way)
    contours = []
    for number in (1, 2, 3):
        first = np.array(sources[number].ImagePositionPatient, float)
        corners = [(1.5, 2.5), (5.5, 2.5), (5.5, 8.5), (1.5, 8.5)]  # column, row
        row, column = np.array(way[:3]) * SPACING[2], np.array(way[3:]) * SPACING[1]
        contours.append((CLOSED, np.array([first + x * row + y * column for x, y in corners])))
        save(sources[number], tmp_path / "ct" / f"{number}.dcm")
    for number in (0, 4):
        save(sources[number], tmp_path / "ct" / f"{number}.dcm")
    ground = Ground(tmp_path / "ct", read_volume(tmp_path / "ct"))
    layer = draw(tmp_path, ground, ("a", contours)).layers[0]
    found = np.zeros(ground.volume.array.shape, bool)
    z, y, x = (slice(start, start + size) for start, size in zip(layer.origin, layer.values.shape, strict=True))
    found[z, y, x] = layer.values != 0
    assert found.sum() == inside.sum()
    np.testing.assert_array_equal(found, ground.volume.array == 1)


def test_on_a_series_with_a_gap(tmp_path: Path) -> None:
    sources = make_series(toy_array((6, 12, 10)))
    del sources[2]
    for number, dataset in enumerate(sources):
        save(dataset, tmp_path / "ct" / f"{number}.dcm")
    ground = Ground(tmp_path / "ct", read_volume(tmp_path / "ct", gaps="allow"))
    contours = [(CLOSED, in_mm(square(1.5, 4.5), depth)) for depth in (0, 1, 3, 4, 5)]
    layer = draw(tmp_path, ground, ("a", contours)).layers[0]
    assert layer.origin == (0, 2, 2) and layer.values.shape == (5, 3, 3) and layer.values.all()


def test_on_a_nifti_image(tmp_path: Path, ground: Ground) -> None:
    image = sitk.GetImageFromArray(ground.volume.array)
    image.SetSpacing(SPACING[::-1])
    image.SetOrigin(ORIGIN)
    sitk.WriteImage(image, str(tmp_path / "ct.nii"))
    nifti = Ground(tmp_path / "ct.nii", read_volume(tmp_path / "ct.nii"))
    layer = draw(tmp_path, nifti, ("a", [(CLOSED, in_mm(square(1.5, 4.5), 2))])).layers[0]
    assert layer.origin == (2, 2, 2) and layer.values.shape == (1, 3, 3)


def test_frames_of_reference(tmp_path: Path, ground: Ground) -> None:
    region = ("a", [(CLOSED, in_mm(square(1.5, 4.5), 1))])
    other = save(make_rtstruct([region], frame="1.2.3"), tmp_path / "rs.dcm")
    with pytest.raises(UserError, match=r"rs\.dcm: was drawn in another frame of reference than its image"):
        read_drawing(other, ground)
    assert read_drawing(other, ground, match="position").layers[0].values.sum() == 9
    series = "1.2.826.0.1.3680043.8.498.2"
    named = save(make_rtstruct([region], frame="1.2.3", series=series), tmp_path / "rs.dcm")
    assert read_drawing(named, ground).layers[0].values.sum() == 9
    # Another series in the same frame, as after images were written anew.
    assert read_drawing(save(make_rtstruct([region], FRAME, "9.9"), tmp_path / "rs.dcm"), ground).layers


def test_on_a_picture_without_a_place(tmp_path: Path) -> None:
    image = base("1.2.840.10008.5.1.4.1.1.1", "CR")
    set_pixels(image, np.zeros((5, 7), np.uint8))
    ground = Ground(tmp_path / "cr.dcm", read_volume(save(image, tmp_path / "cr.dcm")))
    with pytest.raises(UserError, match=r"its image .*cr\.dcm does not say where it lies in the patient"):
        draw(tmp_path, ground, ("a", []))


def first_contour(dataset: Dataset) -> Dataset:
    return dataset.ROIContourSequence[0].ContourSequence[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda item: setattr(first_contour(item), "NumberOfContourPoints", 9), "has 4 points, 9 were promised"),
        (lambda item: setattr(first_contour(item), "ContourData", [1, 2, 3, 4]), "is not made of points"),
        (lambda item: delattr(first_contour(item), "ContourData"), "holds no numbers|is not made of points"),
        (lambda item: delattr(item, "ROIContourSequence"), "lists no regions, or none of their contours"),
        (lambda item: delattr(item, "StructureSetROISequence"), "lists no regions"),
        (
            lambda item: setattr(item.ROIContourSequence[0], "ReferencedROINumber", 7),
            "contours of region 7, which it does",
        ),
    ],
)
def test_damage_is_one_line(tmp_path: Path, ground: Ground, change: Callable[[Dataset], None], message: str) -> None:
    dataset = make_rtstruct([("a", [(CLOSED, in_mm(square(1.5, 4.5), 1))])])
    change(dataset)
    with pytest.raises(UserError, match=message):
        read_drawing(save(dataset, tmp_path / "rs.dcm"), ground)


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.8, 0.95, 0.999])
def test_truncated_contours(tmp_path: Path, ground: Ground, keep: float, capfd: pytest.CaptureFixture[str]) -> None:
    contours = [(CLOSED, in_mm(square(1.5, 4.5), depth)) for depth in range(5)]
    path = save(make_rtstruct([("a", contours), ("b", contours)]), tmp_path / "rs.dcm")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(UserError, match=r"rs\.dcm"):
        read_drawing(path, ground)
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore:The value for the data element:UserWarning")
def test_long_contours(tmp_path: Path, ground: Ground) -> None:
    # More text than the length of its field can say: writers give it another type.
    angles = np.linspace(0, 2 * np.pi, 6000, endpoint=False)
    outline = np.stack([5 + 3 * np.cos(angles), 5 + 3 * np.sin(angles)], axis=1)
    layer = draw(tmp_path, ground, ("a", [(CLOSED, in_mm(outline, 2))])).layers[0]
    rows, columns = np.mgrid[: SHAPE[1], : SHAPE[2]]
    inside = (rows - 5) ** 2 + (columns - 5) ** 2 < 9
    touching = (rows - 5) ** 2 + (columns - 5) ** 2 == 9
    np.testing.assert_array_equal((full(layer)[2] == 1) & ~touching, inside)


def test_real_contours(test_data: Path) -> None:
    folder = test_data / "ct_sarcoma_dicom_rtstruct" / "STS_002"
    ground = Ground(folder / "image", read_volume(folder / "image"))
    layers = read_drawing(folder / "rtstruct" / "RS.dcm", ground).layers
    assert [(layer.name, int(layer.values.sum())) for layer in layers] == [("GTV_Mass_CT", 17090)]
    expected = read_volume(folder / "reference_mask.nii.gz")
    found = np.zeros(expected.array.shape, bool)
    z, y, x = (slice(start, start + size) for start, size in zip(layers[0].origin, layers[0].values.shape, strict=True))
    found[z, y, x] = layers[0].values != 0
    np.testing.assert_array_equal(found, expected.array != 0)
    assert ground.volume.apart(expected) < 1e-3
