"""Walks the members of a plain tar without trust in its headers.

Python's `tarfile` takes a damaged header for the end, follows headers that send it in circles, and resolves sparse
files and links. Shards need none of that: this reads files and folders of USTAR, GNU (long names) and PAX (names and
sizes), as `tarfile`, `webdataset` and tar itself write them, and refuses anything else with one line.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from data_shards.codecs import IMAGE_EXTENSIONS, MAX_BYTES
from data_shards.errors import UserError
from data_shards.strict import is_key, show
from data_shards.triplet import MAX_RECORD
from data_shards.writer import BLOCK

FORBIDDEN = frozenset(
    "pkl pickle pyd dill cloudpickle joblib pt pth ckpt py pyc so dll dylib exe sh bat".split()  # noqa: SIM905
)
"""Extensions of members that hold pickles or code. We never open them, but other readers of a shard would."""

_MAX_HEADERS = 2**20
"""Bytes of a long name or a PAX header."""
_MAX_PADDING = 2**20
"""Bytes after the end of a tar; tar itself fills records of 10 KiB."""
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}
_FILES = (b"0", b"\0", b"7")
_TRIPLET = ("json", *IMAGE_EXTENSIONS)
_FOLDER, _LONG_NAME, _PAX, _PAX_GLOBAL = b"5", b"L", b"x", b"g"
_REFUSED = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe",
    b"S": "a sparse file", b"M": "a part of a file in several volumes",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One file in a tar.

    Attributes:
        name: Its name, a relative path.
        key: The sample that it belongs to: the name up to the first dot of its last part.
        extension: What follows that dot.
        offset: First byte of its content in the tar.
        size: Bytes of it.
    """

    name: str
    key: str
    extension: str
    offset: int
    size: int


@dataclass(frozen=True)
class Member:
    """Where the bytes of one member of a sample lie in its tar; those that are not wanted are not read."""

    extension: str
    offset: int
    data: bytes


def open_tar(path: Path) -> io.BufferedReader:
    """Open a tar for reading.

    Raises:
        UserError: It cannot be read, is no regular file, or is compressed.
    """
    try:
        # Opening a pipe would wait for whoever writes into it.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path}: not a file: shards are read from plain files only")
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): copy or build the shard again") from error
    start = file.peek(8)
    for magic, name in _PACKED.items():
        if start.startswith(magic):
            file.close()
            raise UserError(f"{path}: not a plain tar, it is compressed ({name}): unpack it first")
    return file


def walk(file: IO[bytes], path: Path) -> Iterator[Entry]:
    """Yield the files of an open tar, in its order; their contents are not read.

    Args:
        file: The tar; it may be moved between two entries.
        path: Its name, for messages.

    Raises:
        UserError: The tar is damaged, is cut off, or holds what no shard needs: links, devices, sparse files,
            absolute names or ``..``, extensions of `FORBIDDEN`.
    """
    end = file.seek(0, os.SEEK_END)
    offset, last = 0, "its start"
    name = size = None  # what an extra header says of the next member
    while True:
        header = _read(file, offset, BLOCK)
        if header == bytes(BLOCK):
            _check_end(file, offset, end, f"{path}: after {last}")
            return
        place = f"{path}: damaged after {last}"
        if len(header) < BLOCK:
            raise UserError(f"{path}: cut off after {last}: copy or build the shard again")
        kind = header[156:157]
        if not _is_header(header):
            raise UserError(f"{place}: no tar header is there: copy or build the shard again")
        offset += BLOCK
        length = size if size is not None and kind in _FILES else _number(header[124:136])
        if length is None or not 0 <= length <= end - offset:
            raise UserError(f"{place}: a member is larger than what is left of the shard: copy or build it again")
        if kind in (_LONG_NAME, _PAX, _PAX_GLOBAL):
            if length > _MAX_HEADERS:
                raise UserError(f"{place}: a header has {length} bytes")
            content = _read(file, offset, length)
            if kind == _LONG_NAME:
                name = _text(content.rstrip(b"\0"), place)
            else:
                fields = _pax(content, place)
                if kind == _PAX_GLOBAL and fields.keys() & {"path", "size"}:
                    raise UserError(f"{place}: a global header renames or resizes every member")
                name, size = fields.get("path", name), int(fields["size"]) if "size" in fields else size
        else:
            entry = _entry(header, kind, name, offset, length, place)
            if entry is not None:
                yield entry
                last = f"'{entry.name}'"
            name = size = None
        offset += -(-length // BLOCK) * BLOCK


def scan_shard(path: Path, wanted: Collection[str] = _TRIPLET) -> Iterator[tuple[str, list[Member]]]:
    """Yield the samples of any WebDataset tar: (key, members), in the order of the tar.

    Members of one sample follow each other and share the key, which is the name up to the first dot of its last part.

    Args:
        path: The tar.
        wanted: Extensions of the members that are read; of others the bytes are left empty.

    Raises:
        UserError: The tar is missing or damaged, has no samples or one key twice, or holds what is never read: see
            `walk`.
    """
    key, members, seen = None, list[Member](), set[str]()
    with open_tar(path) as file:
        for entry in walk(file, path):
            if entry.key != key:
                if key is not None:
                    yield key, members
                if entry.key in seen:
                    raise UserError(f"{path}: sample '{entry.key}' is there twice: build the shard again")
                seen.add(entry.key)
                key, members = entry.key, []
            if any(member.extension == entry.extension for member in members):
                raise UserError(f"{path}: sample '{key}' has two members .{entry.extension}: build the shard again")
            members.append(Member(entry.extension, entry.offset, _content(file, entry, path, wanted)))
    if key is None:
        raise UserError(f"{path}: the shard holds no sample")
    yield key, members


def _content(file: io.BufferedReader, entry: Entry, path: Path, wanted: Collection[str]) -> bytes:
    """Return the bytes of a member, if it is wanted."""
    if entry.extension not in wanted:
        return b""
    limit = MAX_RECORD if entry.extension == "json" else MAX_BYTES
    if entry.size > limit:
        raise UserError(
            f"{path}: sample '{entry.key}': its {entry.extension} has {entry.size} bytes, more than {limit}"
        )
    try:
        file.seek(entry.offset)
        return file.read(entry.size)
    except (OSError, MemoryError) as error:
        raise UserError(f"{path}: sample '{entry.key}' cannot be read ({error})") from error


def _entry(header: bytes, kind: bytes, name: str | None, offset: int, size: int, place: str) -> Entry | None:
    """Return the file of a header, or None for a folder."""
    if name is None:
        prefix = header[345:500] if header[257:263] == b"ustar\0" else b""
        name = _text(b"/".join(part.partition(b"\0")[0] for part in (prefix, header[:100]) if part[:1] > b"\0"), place)
    if kind == _FOLDER or (kind == b"\0" and name.endswith("/")):
        if size:
            raise UserError(f"{place}: the folder {show(name)} has content")
        return None
    if kind not in _FILES:
        raise UserError(f"{place}: {show(name)} is {_REFUSED.get(kind, 'of an unknown type')}; only files are read")
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not is_key(name) or not stem:
        raise UserError(
            f"{place}: the name {show(name)} is refused: printable ASCII is needed, no absolute path and no '..': "
            "rename the file and pack the shard again"
        )
    forbidden = FORBIDDEN.intersection(extension.lower().split("."))
    if forbidden:
        raise UserError(
            f"{place}: {show(name)} is refused: .{min(forbidden)} files hold pickles or code, which shards never do: "
            "pack the shard again without it"
        )
    return Entry(name, f"{folder}/{stem}" if folder else stem, extension, offset, size)


def _is_header(header: bytes) -> bool:
    """Whether the checksum fits; as the sum of signed or of unsigned bytes, as old tars have it."""
    recorded = _number(header[148:156])
    blank = header[:148] + b" " * 8 + header[156:]
    total = sum(blank)
    return recorded in (total, total - 256 * sum(byte > 127 for byte in blank))


def _number(field: bytes) -> int | None:
    """Read a number: octal digits, or binary where the first bit is set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        text = field.partition(b"\0")[0].decode("ascii").strip()
        return int(text, 8) if text.isdigit() else (0 if not text else None)
    except ValueError:
        return None


def _pax(content: bytes, place: str) -> dict[str, str]:
    """Read the records of a PAX header: ``LENGTH NAME=VALUE`` and a newline, the length being that of all of it."""
    found: dict[str, str] = {}
    start = 0
    while start < len(content):
        digits, space, _ = content[start : start + 20].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        record = content[start : start + length]
        name, equals, value = record[len(digits) + 1 :].partition(b"=")
        if not equals or not record.endswith(b"\n") or len(record) != length:
            raise UserError(f"{place}: a PAX header is damaged: copy or build the shard again")
        start += length
        if name.startswith(b"GNU.sparse"):
            raise UserError(f"{place}: a sparse file is in the tar: pack it without --sparse")
        if name == b"hdrcharset" or (name == b"size" and not value[:-1].isdigit()):
            raise UserError(f"{place}: a PAX header is damaged: copy or build the shard again")
        if name in (b"path", b"size"):
            found[name.decode()] = _text(value[:-1], place)
    if len(found.get("size", "")) > 15:
        raise UserError(f"{place}: a member is larger than what is left of the shard: copy or build it again")
    return found


def _text(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{place}: the name {show(data)} is no UTF-8") from None


def _read(file: IO[bytes], offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _check_end(file: IO[bytes], offset: int, end: int, place: str) -> None:
    """Refuse a tar that goes on after its end: nobody would read what follows."""
    if end - offset > _MAX_PADDING or _read(file, offset, end - offset).strip(b"\0"):
        raise UserError(f"{place}: the tar ends, but the file goes on: build the shard again")
