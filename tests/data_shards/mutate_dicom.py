"""Damages DICOM files in ways that a seed decides."""

from __future__ import annotations

import struct

from mutate import NUMBERS, Rng, damage, pick

_LONG = (b"OB", b"OD", b"OF", b"OL", b"OW", b"SQ", b"UC", b"UN", b"UR", b"UT", b"OV", b"SV", b"UV")
_TEXTS = (
    b"",
    b"-1",
    b"0",
    b"1",
    b"nan",
    b"1e400",
    b"99999999999",
    b"1e-300",
    b"\\",
    b"1\\2\\3",
    b"x",
    b"1.2.3",
    b"\xff\xfe",
)


def elements(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """Place, place of the value, length and type of the elements of an explicit little-endian file, nested ones too."""
    found, place = [], 132
    while place + 8 <= len(data):
        group, _ = struct.unpack("<HH", data[place : place + 4])
        if group == 0xFFFE:
            place += 8  # the beginning or end of an item: what it holds comes next
            continue
        kind = data[place + 4 : place + 6]
        long = kind in _LONG
        start = place + (12 if long else 8)
        length = struct.unpack("<I" if long else "<H", data[start - (4 if long else 2) : start])[0]
        if not kind.isalpha() or start > len(data):
            break
        found.append((place, start, length, kind))
        if kind != b"SQ" and length == 2**32 - 1:
            break
        place = start if kind == b"SQ" else start + length
    return found


def damage_dicom(data: bytes, rng: Rng) -> bytes:
    """Damage a DICOM file: its bytes, or the value, type, tag or length of some elements."""
    places = elements(data)
    if rng.random() < 0.25 or not places:
        return damage(data, rng)
    for place, start, length, kind in sorted((pick(rng, places) for _ in range(int(rng.integers(1, 4)))), reverse=True):
        what = rng.random()
        if what < 0.5 and kind != b"SQ" and length < 2**16:
            data = data[:start] + _value(kind, length, rng) + data[start + length :]
        elif what < 0.65 and kind != b"SQ" and length < 2**16 and kind not in _LONG:
            text = pick(rng, _TEXTS) * int(rng.integers(1, 9))
            text += b" " * (len(text) % 2)
            data = data[: start - 2] + struct.pack("<H", len(text)) + text + data[start + length :]
        elif what < 0.75:
            kinds = (b"SQ", b"UN", b"US", b"DS", b"OB", b"XX", b"IS", b"FD", b"UT")
            data = data[: place + 4] + pick(rng, kinds) + data[place + 6 :]
        elif what < 0.85:
            size = struct.pack("<H", int(pick(rng, NUMBERS)) & 0xFFFF)
            data = data[: start - 2] + size + data[start:]
        elif what < 0.93:
            end = start + (length if length < 2**32 - 1 else 0)
            data = data[:place] + (data[place:end] * 2 if rng.random() < 0.3 else b"") + data[end:]
        else:
            data = data[:place] + struct.pack("<HH", *(int(x) for x in rng.integers(0, 0x60, 2))) + data[place + 4 :]
    return data


def _value(kind: bytes, length: int, rng: Rng) -> bytes:
    """Another value of the same length."""
    if kind in (b"US", b"SS", b"UL", b"SL", b"FD", b"FL"):
        size = {b"U": 2, b"S": 2}.get(kind[:1], 8) if kind[1:] == b"S" else 4
        numbers = (0, 1, 2, 8, 16, 7, 255, 65535, 2**31 - 1, 2**32 - 1, 0x7F800000, 0x7FC00000)
        return b"".join(
            (pick(rng, numbers) & (256**size - 1)).to_bytes(size, "little") for _ in range(length // size + 1)
        )[:length]
    text = pick(rng, _TEXTS)
    return (text + b" " * length)[:length] if rng.random() < 0.7 else rng.bytes(length)
