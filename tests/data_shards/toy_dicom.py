"""Small DICOM series, segmentations and contours that tests share; every value is made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    RTStructureSetStorage,
    generate_uid,
)

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
ORIGIN = (-10.0, -20.0, 30.0)
SPACING = (2.0, 0.75, 0.5)  # between slices, rows and columns
FRAME = "1.2.826.0.1.3680043.8.498.1"

Change = Callable[[Dataset, int], None]


def normal(orientation: Sequence[float]) -> np.ndarray:
    return np.cross(orientation[:3], orientation[3:])


def base(sop_class: str, modality: str) -> Dataset:
    """A data set with what every file needs."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = sop_class
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.Modality = modality
    dataset.PatientID = "toy"
    dataset.PatientName = "Toy^"
    dataset.PatientBirthDate = dataset.PatientSex = dataset.AccessionNumber = dataset.StudyID = ""
    dataset.StudyDate = dataset.StudyTime = dataset.ReferringPhysicianName = ""
    dataset.StudyInstanceUID = dataset.SeriesInstanceUID = "1.2.826.0.1.3680043.8.498.2"
    dataset.SeriesNumber = 1
    dataset.FrameOfReferenceUID = FRAME
    return dataset


def set_pixels(dataset: Dataset, array: np.ndarray) -> None:
    """Put grey values (…, rows, columns) into a data set."""
    dataset.Rows, dataset.Columns = array.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8 * array.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(array.dtype.kind == "i")
    data = array.tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = "OB" if array.dtype.itemsize == 1 else "OW"


def save(dataset: Dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def make_series(
    array: np.ndarray,
    spacing: tuple[float, float, float] = SPACING,
    orientation: Sequence[float] = AXIAL,
    origin: Sequence[float] = ORIGIN,
    step: Sequence[float] | None = None,
    change: Change | None = None,
) -> list[Dataset]:
    """CT slices of an array (Z, Y, X) whose stored values become those of `array` by an intercept of -1024.

    Args:
        array: Values in HU.
        spacing: Distances of slices, rows and columns in mm.
        orientation: Directions of rows and of columns.
        origin: Place of the first pixel of the first slice.
        step: From a slice to the next, in mm; at right angles by default.
        change: Called with each data set and its number, to change it.
    """
    move = np.asarray(step) if step is not None else normal(orientation) * spacing[0]
    found = []
    for number, image in enumerate(array):
        dataset = base(CTImageStorage, "CT")
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.InstanceNumber = number + 1
        dataset.ImagePositionPatient = [float(x) for x in np.round(np.asarray(origin) + number * move, 6)]
        dataset.ImageOrientationPatient = list(orientation)
        dataset.PixelSpacing = list(spacing[1:])
        dataset.SliceThickness = spacing[0]
        dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, -1024, "HU"
        set_pixels(dataset, (image + 1024).astype(np.uint16))
        if change is not None:
            change(dataset, number)
        found.append(dataset)
    return found


def write_series(folder: Path, array: np.ndarray, names: Sequence[str] | None = None, **options: Any) -> list[Path]:
    """Write `make_series` to a folder; return the files in the order of the slices."""
    names = names or [f"{number:03d}.dcm" for number in range(len(array))]
    return [save(dataset, folder / name) for dataset, name in zip(make_series(array, **options), names, strict=True)]


def toy_array(shape: tuple[int, int, int] = (5, 12, 10), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1500, shape).astype(np.int16)


def write_enhanced(path: Path, array: np.ndarray, order: Sequence[int], scales: Sequence[tuple[float, float]]) -> Path:
    """Write stored values (Z, Y, X) as one multi-frame file, its frames in another order, each with a scale."""
    dataset = base(EnhancedMRImageStorage, "MR")
    set_pixels(dataset, array[list(order)])
    dataset.NumberOfFrames = len(order)
    shared = Dataset()
    shared.PlaneOrientationSequence = [Dataset()]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = list(AXIAL)
    shared.PixelMeasuresSequence = [Dataset()]
    shared.PixelMeasuresSequence[0].PixelSpacing = list(SPACING[1:])
    dataset.SharedFunctionalGroupsSequence = [shared]
    dataset.PerFrameFunctionalGroupsSequence = []
    for number in order:
        item = Dataset()
        item.PlanePositionSequence = [Dataset()]
        item.PlanePositionSequence[0].ImagePositionPatient = [*ORIGIN[:2], ORIGIN[2] + number * SPACING[0]]
        item.PixelValueTransformationSequence = [Dataset()]
        scale = item.PixelValueTransformationSequence[0]
        scale.RescaleSlope, scale.RescaleIntercept = scales[number]
        dataset.PerFrameFunctionalGroupsSequence.append(item)
    return save(dataset, path)


def make_seg(sources: Sequence[Dataset], masks: np.ndarray, kind: str = "BINARY", **options: Any) -> Any:
    """A segmentation by highdicom.

    Args:
        sources: The series.
        masks: (Z, Y, X, segments) of 0 and 1, or of fractions; or (Z, Y, X) of labels.
        kind: ``BINARY``, ``FRACTIONAL`` or ``LABELMAP``.
        options: More for highdicom.
    """
    import highdicom
    from pydicom.sr.codedict import codes

    count = masks.shape[-1] if masks.ndim == 4 else int(masks.max())
    segments = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=f"part {number}",
            segmented_property_category=codes.cid7150.Tissue,
            segmented_property_type=codes.cid7166.ConnectiveTissue,
            algorithm_type="MANUAL",
        )
        for number in range(1, count + 1)
    ]
    return highdicom.seg.Segmentation(
        source_images=list(sources),
        pixel_array=masks,
        segmentation_type=kind,
        segment_descriptions=segments,
        series_instance_uid=generate_uid(),
        series_number=7,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="toy",
        manufacturer_model_name="toy",
        software_versions="1",
        device_serial_number="1",
        **options,
    )


Region = tuple[str, Sequence[tuple[str, np.ndarray]]]
"""Name of a region, and its contours: the kind, and points (N, 3) in mm."""


def make_rtstruct(regions: Sequence[Region], frame: str = FRAME, series: str = "1.2.3") -> Dataset:
    """Contours in the patient; the regions are numbered from 1."""
    dataset = base(RTStructureSetStorage, "RTSTRUCT")
    del dataset.FrameOfReferenceUID
    dataset.StructureSetLabel = "toy"
    place, study, images = Dataset(), Dataset(), Dataset()
    images.SeriesInstanceUID = series
    study.RTReferencedSeriesSequence = [images]
    place.FrameOfReferenceUID, place.RTReferencedStudySequence = frame, [study]
    dataset.ReferencedFrameOfReferenceSequence = [place]
    dataset.StructureSetROISequence, dataset.ROIContourSequence = [], []
    for number, (name, contours) in enumerate(regions, start=1):
        item, drawn = Dataset(), Dataset()
        item.ROINumber, item.ROIName, item.ReferencedFrameOfReferenceUID = number, name, frame
        dataset.StructureSetROISequence.append(item)
        drawn.ReferencedROINumber = number
        drawn.ContourSequence = []
        for kind, points in contours:
            contour = Dataset()
            contour.ContourGeometricType = kind
            contour.NumberOfContourPoints = len(points)
            contour.ContourData = [f"{value:.6g}" for value in np.asarray(points, dtype=float).ravel()]
            drawn.ContourSequence.append(contour)
        dataset.ROIContourSequence.append(drawn)
    return dataset
