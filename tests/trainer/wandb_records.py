"""Reads what Weights & Biases keeps of a run: its log of records, in LevelDB's log format, and every byte beside it."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEADER = 32768, 7


def payloads(path: Path) -> Iterator[bytes]:
    """The records of a ``.wandb`` file, put together from their fragments."""
    content = path.read_bytes()
    assert content[:4] == b":W&B", "no log of Weights & Biases"
    place, record = _HEADER, b""
    while place + _HEADER <= len(content):
        if _BLOCK - place % _BLOCK < _HEADER:  # what is left of a block is padding
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + _HEADER])
        if not kind:
            break
        record += content[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        if kind in (1, 4):  # whole, or the last fragment
            yield record
            record = b""
    assert not record, "cut off"


def records(folder: Path) -> list[Any]:
    """All records of an offline run's folder, decoded."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for payload in payloads(next(folder.glob("*.wandb"))):
        found.append(wandb_internal_pb2.Record())
        found[-1].ParseFromString(payload)
    return found


def everything(folder: Path) -> str:
    """All that a folder says: names of files, their bytes, unpacked where they are packed, records as text."""
    said = []
    for path in sorted(folder.rglob("*")):
        said.append(str(path.relative_to(folder)))
        if not path.is_file():
            continue
        raw = path.read_bytes()
        said.append(raw.decode("latin-1"))
        if raw[:2] == b"\x1f\x8b":
            said.append(gzip.decompress(raw).decode("latin-1"))
        if raw[:4] == b"\x89PNG":
            said += _texts(raw)
        if path.suffix == ".wandb":
            said += [payload.decode("latin-1") for payload in payloads(path)]
            said += [str(record) for record in records(path.parent)]
    return "\n".join(said)


def _texts(png: bytes) -> list[str]:
    """Texts beside the pixels of a PNG."""
    found, place = [], 8
    while place < len(png):
        (length,), kind = struct.unpack(">I", png[place : place + 4]), png[place + 4 : place + 8]
        data = png[place + 8 : place + 8 + length]
        if kind in (b"tEXt", b"iTXt"):
            found.append(data.decode("latin-1"))
        if kind == b"zTXt":
            found.append(zlib.decompress(data.partition(b"\0")[2][1:]).decode("latin-1"))
        place += 12 + length
    return found
