"""DICOM SEG: one binary segment for each object, on the frames of the series that it was drawn on.

Shapes: N objects, I columns, J rows, K slices of the series.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np

from data_shards import __version__
from data_shards.errors import UserError
from data_shards.readers.dicom_files import reading
from trainer.volumes.output_files import Written
from trainer.volumes.scan import Scan

_LABEL = 64
"""Characters that DICOM allows a segment's label."""


def check_dicom(path: Path, scan: Scan) -> None:
    """Raise a `UserError` if no DICOM SEG can be written: highdicom is missing, or the scan is no DICOM series."""
    if scan.place.layout is None:
        raise UserError(
            f"{path}: a DICOM SEG names the images that it lies on, and {scan.path} is no DICOM series with places in "
            "a patient: write .nii.gz, .nrrd or .npz"
        )
    files = {file for file, _, _ in scan.place.layout.slices}
    if 1 < len(files) < len(scan.place.layout.slices):
        raise UserError(f"{path}: {scan.path} has several files of several slices: write .nii.gz")
    if scan.place.layout.frame is None:
        raise UserError(f"{path}: {scan.path} has no frame of reference, as a DICOM SEG needs: write .nii.gz")
    if util.find_spec("highdicom") is None:
        raise UserError(f"{path}: writing DICOM SEG needs another package: pip install highdicom")
    count = len(scan.place.layout.slices) if len(files) == 1 else 1
    columns, rows = scan.grid.shape[:2]
    blank = np.broadcast_to(np.uint8(0), (count, rows, columns, 1))
    _segmentation(scan, list(scan.files[:1]), blank, ["trial"])  # what the headers lack shows before any work


def write_dicom(path: Path, written: Written) -> None:
    """Write the segments, each as a generic tissue with its name as label; the patient and the study are the source's.

    Frames without a voxel are left out. In memory are the masks of the slices that hold any.

    Raises:
        UserError: The series lacks what a segmentation takes from it.
    """
    layout = written.scan.place.layout
    assert layout is not None  # `check_dicom` saw to it
    files = list(written.scan.files)
    planes = np.asarray(written.labels).transpose(2, 1, 0, 3)
    if len(files) == 1:  # in the order of its frames; all of them are needed
        masks = planes[np.argsort([frame for _, frame, _ in layout.slices])]
    else:
        held = [number for number, plane in enumerate(planes) if plane.any()] or [0]
        files, masks = [files[number] for number in held], planes[held]
    _segmentation(written.scan, files, masks, written.names).save_as(path)


def _segmentation(scan: Scan, files: Sequence[Path], masks: np.ndarray, names: Sequence[str]) -> Any:
    """Make a segmentation of masks (K, J, I, N) uint8 on files.

    Raises:
        UserError: It cannot be made.
    """
    import highdicom
    import pydicom

    with reading(files[0]):
        images = [pydicom.dcmread(file, stop_before_pixels=True, force=True) for file in files]
        for image in images:
            if not image.get("SpecificCharacterSet"):  # empty, as it often is once names are gone, it says nothing
                image.pop("SpecificCharacterSet", None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # highdicom is particular about what others wrote
            return highdicom.seg.Segmentation(
                source_images=images,
                pixel_array=masks,
                segmentation_type="BINARY",
                segment_descriptions=[_segment(number, name) for number, name in enumerate(names, start=1)],
                series_instance_uid=pydicom.uid.generate_uid(),
                series_number=100,
                sop_instance_uid=pydicom.uid.generate_uid(),
                instance_number=1,
                manufacturer="sam-trainer",
                manufacturer_model_name="sam-trainer",
                software_versions=__version__,
                device_serial_number="0",
                series_description="Segmentation",
                omit_empty_frames=bool(masks.any()),
            )
    except (AttributeError, ValueError, TypeError, KeyError) as error:  # their texts may quote the header
        raise UserError(
            f"{scan.path}: no DICOM SEG can be made of it ({type(error).__name__}): its headers lack what the standard "
            "demands: write .nii.gz"
        ) from error


def _segment(number: int, name: str) -> Any:
    import highdicom
    from pydicom.sr.codedict import codes

    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:_LABEL],
        segmented_property_category=codes.SCT.Tissue,
        segmented_property_type=codes.SCT.Tissue,
        algorithm_type="SEMIAUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="sam-trainer", family=codes.DCM.ArtificialIntelligence, version=__version__
        ),
    )
