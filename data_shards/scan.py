"""From tars to their index: every sample is looked at once, without decoding its image where its header will do.

Shapes: N samples, T targets.
"""

from __future__ import annotations

import hashlib
import zlib
from array import array
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.codecs import IMAGE_EXTENSIONS, image_header
from data_shards.errors import UserError
from data_shards.foreign import Layout, decode, wanted
from data_shards.index import Index, local_folder
from data_shards.index_file import ARRAYS, TABLES
from data_shards.tars import Member, scan_shard
from data_shards.triplet import KINDS, Provenance, Target, read_record


def write_index(
    folder: str | Path, layout: Layout | None = None, advance: Callable[[int], object] | None = None
) -> Index:
    """Scan the tars of a folder, write their index beside them and open it.

    The tars need not be ours: a sample needs a JSON member with our fields and one image, or the members that a layout
    names.

    Args:
        folder: Folder of the tars.
        layout: How foreign samples become triplets; None for triplets.
        advance: Told the bytes that were read since it was told last.

    Raises:
        UserError: There is no tar, or a tar or a sample cannot be read.
    """
    folder = local_folder(folder)
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise UserError(f"{folder}: no .tar file here")
    table = _Table(layout)
    extensions = () if layout is None else (wanted(layout),)
    for path in paths:
        done = 0
        for key, members in scan_shard(path, *extensions):
            table.add(path, key, members)
            end = members[-1].offset + len(members[-1].data)
            if advance is not None and end > done:
                advance(end - done)
                done = end
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
        table.shards.append((path.name, size, digest))
        if advance is not None:
            advance(size - done)
    table.index(folder).save()
    return Index.load(folder)


class _Table:
    """Collects the rows of an index, in columns of plain numbers."""

    def __init__(self, layout: Layout | None) -> None:
        self.shards: list[tuple[str, int, str]] = []
        self._layout = layout
        self._places: dict[bytes, int] = {}
        self._columns: dict[str, array[Any]] = {
            name: array("d" if kind.startswith("float") else "q")
            for name, (kind, length) in ARRAYS.items()
            if length in ("N", "N + 1", "M", "T") and name != "raw_keys"
        }
        self._columns["member_start"].append(0)
        self._columns["target_start"].append(0)
        self._next: dict[int, bytes] = {}
        self._absent: Counter[int] = Counter()
        self._numbers: dict[str, dict[str, int]] = {table: {} for table in TABLES.values()}

    def add(self, path: Path, key: str, members: list[Member]) -> None:
        """Add a sample found in a shard."""
        try:
            if self._layout is None:
                kept, targets, looked_for, origin, shape, dtype = _ours(members)
            else:
                kept = [member for member in members if member.extension in wanted(self._layout)]
                triplet = decode(self._layout, key, {member.extension: member.data for member in kept})
                targets, looked_for, origin = triplet.targets, triplet.looked_for, triplet.provenance
                shape, dtype = triplet.image.shape, triplet.image.dtype
        except UserError as error:
            place = f"{path}: sample '{key}' " if self._layout is None else f"{path}: "  # `decode` names the sample
            raise UserError(f"{place}{error}") from error
        raw = key.encode("ascii")
        if raw in self._places:
            other = self._columns["shard"][self._places[raw]]
            name = self.shards[other][0] if other < len(self.shards) else path.name
            raise UserError(f"{path}: sample '{key}' is in {name} too: rename one, or move one shard elsewhere")
        if origin.next is not None:
            self._next[len(self._places)] = origin.next.encode("ascii")
        self._places[raw] = len(self._places)
        crc = 0
        for member in kept:
            crc = zlib.crc32(member.data, crc)
            self._put(member_offset=member.offset, member_size=len(member.data), member_extension=member.extension)
        for target in targets:
            kind = KINDS.index(target.kind)
            self._put(target_term=target.term, target_area=target.area, target_kind=kind)
        here = {target.term for target in targets}
        self._absent.update(self._number("terms", term) for term in dict.fromkeys(looked_for) if term not in here)
        rows, columns = (np.nan, np.nan) if origin.spacing is None else origin.spacing
        self._put(
            shard=len(self.shards),
            crc32=crc,
            member_start=len(self._columns["member_size"]),
            target_start=len(self._columns["target_area"]),
            dataset=origin.dataset,
            modality=origin.modality,
            patient=origin.patient,
            volume=origin.volume,
            slice_index=-1 if origin.slice_index is None else min(origin.slice_index, 2**31 - 1),
            height=shape[0],
            width=shape[1],
            channels=shape[2] if len(shape) == 3 else 1,
            dtype=dtype.name,
            row_spacing=rows,
            column_spacing=columns,
            slice_spacing=np.nan if origin.slice_spacing is None else origin.slice_spacing,
        )

    def index(self, folder: Path) -> Index:
        """Return the rows as arrays."""
        self._columns["following"] = self._following()
        names, sizes, hashes = zip(*self.shards, strict=True)
        with np.errstate(over="ignore"):  # a spacing of 1e300 mm is infinite: `data-shards lint` finds it
            columns = {name: np.array(values, dtype=ARRAYS[name][0]) for name, values in self._columns.items()}
        return Index(
            folder=folder,
            sha256="",
            shard_names=np.array(names, dtype=str),
            shard_sizes=np.array(sizes, dtype=np.int64),
            shard_sha256=np.array(hashes, dtype=str),
            raw_keys=np.array(list(self._places), dtype=bytes),
            absent=np.array([self._absent[number] for number in range(len(self._numbers["terms"]))], dtype=np.int64),
            layout=np.array(["" if self._layout is None else self._layout.to_json()]),
            **columns,
            **{name: np.array(list(known), dtype=str) for name, known in self._numbers.items()},
        )

    def _following(self) -> array[int]:
        """The next slices as numbers of samples; one that is not here, or that is of another volume, is none."""
        found = array("q", [-1]) * len(self._places)
        owners = [self._columns[name] for name in ("dataset", "patient", "volume")]
        for number, key in self._next.items():
            other = self._places.get(key, number)
            if other != number and all(owner[other] == owner[number] for owner in owners):
                found[number] = other
        return found

    def _put(self, **values: str | float) -> None:
        for name, value in values.items():
            self._columns[name].append(self._number(TABLES[name], value) if isinstance(value, str) else value)

    def _number(self, table: str, name: str) -> int:
        known = self._numbers[table]
        return known.setdefault(name, len(known))


def _ours(
    members: list[Member],
) -> tuple[list[Member], tuple[Target, ...], tuple[str, ...], Provenance, tuple[int, ...], np.dtype]:
    """Return the members of a triplet, what its JSON holds, and the shape and type of its image."""
    record = next((member for member in members if member.extension == "json"), None)
    images = [member for member in members if member.extension in IMAGE_EXTENSIONS]
    if record is None or len(images) != 1:
        got = ", ".join(member.extension for member in members)
        raise UserError(f"needs a json member and one image ({' or '.join(IMAGE_EXTENSIONS)}), got {got}")
    try:
        shape, dtype = image_header(images[0].extension, images[0].data)
        return [record, images[0]], *read_record(record.data), shape, dtype
    except UserError as error:
        raise UserError(f"is not a triplet: {error}") from error
