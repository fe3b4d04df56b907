"""The frames of a film as pictures, decoded by PyAV (FFmpeg's libraries)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from data_shards.errors import UserError
from trainer.demo.limits import Limits

CONTAINERS = {
    ".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".avi": "avi", ".mkv": "matroska", ".webm": "matroska",
    ".mpg": "mpeg", ".mpeg": "mpeg", ".wmv": "asf",
}  # fmt: skip
"""Endings of films, and what FFmpeg calls their containers."""


def is_film(name: str) -> bool:
    """Whether a file is a film, by its ending."""
    return name.lower().endswith(tuple(CONTAINERS))


def frames_of(path: Path, limits: Limits) -> list[Path]:
    """Decode a film, frame by frame, into PNGs beside it, and delete it.

    A container is read as what its name says, and never tried as others: a playlist under the name of a film would
    have FFmpeg open other files. A phone's mark that the film is to be turned is not obeyed.

    Args:
        path: The film.
        limits: Bounds of its frames, their pixels and the bytes of the PNGs.

    Raises:
        UserError: PyAV is missing, or the film is damaged, has no picture or too many of them.
    """
    if importlib.util.find_spec("av") is None:
        raise UserError(
            f"{path.name}: films need PyAV: pip install 'sam-trainer[demo]', or upload the frames as pictures"
        )
    import av

    kept: list[Path] = []
    pixels = written = 0
    container = CONTAINERS[path.suffix.lower()]
    try:
        with av.open(str(path), format=container, options={"protocol_whitelist": "file"}) as film:
            if not film.streams.video:
                raise UserError(f"{path.name}: holds no picture, only sound or text")
            for frame in film.decode(video=0):
                pixels += frame.width * frame.height
                limits.check_voxels(pixels, path.name)
                limits.check_files(len(kept) + 1, f"{path.name}, frame by frame")
                picture = path.with_name(f"frame{len(kept):05d}.png")
                frame.to_image().save(picture, compress_level=1)
                written += picture.stat().st_size
                limits.check_bytes(written, f"{path.name}, frame by frame")
                kept.append(picture)
    except av.FFmpegError as error:
        raise UserError(f"{path.name}: is damaged, or no film that can be read ({type(error).__name__})") from None
    if not kept:
        raise UserError(f"{path.name}: holds no frame")
    path.unlink()
    return kept
