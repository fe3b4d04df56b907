"""Decodes the pixels of DICOM files; run as a script, those that it is asked for, in a process that may break down.

It reads lines of JSON, [path, most bytes], and answers with a line of JSON and the array as npy. It imports nothing of
this package, so that it starts quickly.
"""

from __future__ import annotations

import io
import json
import os
import sys
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pydicom import Dataset

SECONDS = 120
"""What one file may take."""


def decode(dataset: Dataset, plugin: str = "") -> tuple[np.ndarray, str]:
    """Return the stored values of all frames, YBR turned to RGB, and their photometric interpretation.

    Args:
        dataset: A whole file.
        plugin: The library that decodes; empty takes any.
    """
    from pydicom.pixels import get_decoder
    from pydicom.pixels.utils import as_pixel_options

    decoder = get_decoder(dataset.file_meta.TransferSyntaxUID)
    # What lies behind the last frame is padding, not another frame.
    options = as_pixel_options(dataset, allow_excess_frames=False)
    array, properties = decoder.as_array(dataset, decoding_plugin=plugin, **options)
    return array, str(properties["photometric_interpretation"])


def _serve() -> None:
    """Answer until there is nothing more to read."""
    import resource
    import warnings

    import pydicom

    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever the libraries print is no answer
    for line in sys.stdin:
        path, most = json.loads(line)
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used) + SECONDS, hard))
        # Compressed data may claim to be of any size, whatever the header says.
        resource.setrlimit(resource.RLIMIT_AS, (4 * most + 4 * 2**30, resource.getrlimit(resource.RLIMIT_AS)[1]))
        array, colours = decode(pydicom.dcmread(path, force=True))
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        answers.write(json.dumps({"bytes": buffer.tell(), "colours": colours}).encode() + b"\n")
        answers.write(buffer.getbuffer())
        answers.flush()


if __name__ == "__main__":
    _serve()
