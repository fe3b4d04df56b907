"""The intensity rule of a scan: as a build spec's, fitted slice by slice.

Shapes: D slices, H W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_shards.errors import UserError, nearest
from data_shards.preprocessing import AnyIntensity, Colour, Intensity, MinMax, Native, Percentiles, Rescale, Window
from data_shards.schema import from_mapping

AIR = -500
"""Values below are found in CT in Hounsfield units, where air has -1000, and hardly anywhere else."""

_FORMS = (
    "window:LOW,HIGH or window:NAME, percentiles or percentiles:LOW,HIGH, minmax, rgb, none, or a mapping as in a "
    "build spec, such as {kind: percentiles, nonzero: false}"
)


@dataclass(frozen=True)
class _Rule:
    intensity: AnyIntensity


def parse_intensity(rule: str | Mapping[str, Any] | Intensity | None) -> Intensity | None:
    """Read an intensity rule.

    Args:
        rule: A text such as ``window:-160,240`` (lowest and highest value), ``window:lung`` or
            ``percentiles:0.5,99.5``, a mapping as under ``intensity`` in a build spec or its text, or a rule.

    Raises:
        UserError: It is none of these.
    """
    if rule is None or isinstance(rule, Intensity):
        return rule
    if isinstance(rule, Mapping):
        return from_mapping(_Rule, {"intensity": rule}, "--intensity").intensity
    text = rule.strip()
    if text.startswith("{"):
        return parse_intensity(_mapping(text))
    kind, _, values = text.partition(":")
    plain: dict[str, Intensity] = {"minmax": MinMax(), "rgb": Colour(), "none": Native()}
    if kind in plain and not values:
        return plain[kind]
    try:
        if kind == "percentiles":
            return Percentiles(*_numbers(values)) if values else Percentiles()
        if kind == "window" and values:
            if not any(character.isdigit() for character in values):
                return from_mapping(_Rule, {"intensity": {"kind": kind, "name": values}}, "--intensity").intensity
            low, high = _numbers(values)
            if low >= high:
                raise UserError(f"the lowest value comes first, got {values}")
            return Window(level=(low + high) / 2, width=high - low)
    except UserError as error:
        raise UserError(f"--intensity {text}: {str(error).removeprefix('--intensity: ')}") from None
    hint = "" if kind in ("window", *plain) else nearest(kind, ["window", "percentiles", *plain])
    raise UserError(f"--intensity {text}: is no intensity rule{hint}; a rule is {_FORMS}")


def _mapping(text: str) -> Mapping[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    if not isinstance(found, Mapping):
        raise UserError(f"--intensity {text}: is no mapping in YAML; a rule is {_FORMS}")
    return found


def _numbers(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"two numbers are needed, as in -160,240, got '{text}'") from None
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"two finite numbers are needed, got '{text}'")
    return low, high


def fit(rule: Intensity | None, slices: Callable[[], Iterable[np.ndarray]]) -> tuple[Rescale, str]:
    """Fit a rule to a volume as `Intensity.fit` does, without holding more than a slice of it.

    Percentiles are exact: values are counted, 16 bits of them in a pass, so that whole numbers of 16 bits need one
    pass, those of 32 bits and float32 two, and float64 four.

    Args:
        rule: The rule; None takes 8-bit images as they are, colours as `Colour`, and all else by `Percentiles`.
        slices: Starts a pass through the D slices, (H, W) or (H, W, 3).

    Returns:
        The map, and a note for the user, empty if there is nothing to say.

    Raises:
        UserError: What reading a slice raises.
    """
    given = rule is not None
    if rule is None:
        first = next(iter(slices()))
        rule = Native() if first.dtype in (np.uint8, np.bool_) else Colour() if first.ndim == 3 else Percentiles()
    if isinstance(rule, Percentiles):
        counts = _Counts(rule.nonzero, slices)
        low, high = counts.percentiles((rule.low, rule.high))
        rescale, lowest = Rescale("percentiles", low, high), counts.lowest
    elif isinstance(rule, MinMax | Colour):
        lowest, highest, dtype = _range(slices())
        ends = np.array([lowest, highest], dtype)  # the rule asks for no more of a volume
        rescale, lowest = rule.fit(ends), float(lowest)
    else:
        return rule.fit(np.zeros(0)), ""
    if given or lowest >= AIR:
        return rescale, ""
    return rescale, (
        f"its lowest value is {lowest:g}, so it looks like CT in Hounsfield units, shown here between its percentiles: "
        "was the model trained with a window? Then give it, as in --intensity window:-160,240"
    )


def _range(slices: Iterable[np.ndarray]) -> tuple[Any, Any, np.dtype]:
    ends = [(part.min(), part.max()) for part in slices]
    return min(low for low, _ in ends), max(high for _, high in ends), np.result_type(*(low for low, _ in ends))


class _Counts:
    """Order statistics of values that are read again and again, found by counting 16 bits of them at a time.

    Args:
        nonzero: Leave zeros out.
        slices: Starts a pass through the slices.

    Attributes:
        lowest: Smallest value, once it is known; infinite before.
    """

    def __init__(self, nonzero: bool, slices: Callable[[], Iterable[np.ndarray]]) -> None:
        self.nonzero, self.slices, self.lowest = nonzero, slices, math.inf
        self.dtype = np.result_type(next(iter(slices())), np.int8)  # booleans become numbers
        self.dtype = max(self.dtype, np.dtype(np.int16), key=lambda dtype: dtype.itemsize)

    def percentiles(self, shares: Sequence[float]) -> tuple[float, float]:
        """Find two percentiles as `numpy.percentile` does; (0, 0) where no value is left."""
        while True:
            before = self.dtype
            counts = self._count([()])[()]
            if self.dtype == before:  # else a slice held wider numbers than those before it
                break
        total = int(counts.sum())
        if not total:
            return 0.0, 0.0
        places = [(total - 1) * (share / 100) for share in shares]
        below = [math.floor(place) for place in places]
        ranks = sorted({min(rank + more, total - 1) for rank in below for more in (0, 1)})
        # for each rank: the digits known of its value, and its rank among the values that share them
        known = {rank: _descend(counts, (), rank) for rank in ranks}
        for _ in range(1, self.dtype.itemsize // 2):
            tables = self._count([prefix for prefix, _ in known.values()])
            known = {rank: _descend(tables[prefix], prefix, left) for rank, (prefix, left) in known.items()}
        values = {rank: _value(prefix, self.dtype) for rank, (prefix, _) in known.items()}
        low, high = (
            _between(values[rank], values[min(rank + 1, total - 1)], place - rank)
            for rank, place in zip(below, places, strict=True)
        )
        return low, high

    def _count(self, prefixes: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], np.ndarray]:
        """Count the next digit of the keys that begin with each of the prefixes: (65536,) by prefix."""
        tables = {prefix: np.zeros(2**16, np.int64) for prefix in prefixes}
        for keys in self._keys():
            for prefix, table in tables.items():
                size = 8 * self.dtype.itemsize - 16 * len(prefix)  # bits that are not known yet
                fitting = keys[keys >> np.uint64(size) == _number(prefix)] if prefix else keys
                digit = (fitting >> np.uint64(size - 16)) & np.uint64(2**16 - 1)
                table += np.bincount(digit.astype(np.int64), minlength=2**16)
        return tables

    def _keys(self) -> Iterator[np.ndarray]:
        """Yield for each slice whole numbers (uint64) that have the order of its values."""
        sign = np.uint64(1 << 8 * self.dtype.itemsize - 1)
        for part in self.slices():
            wider = np.result_type(part, self.dtype)
            if wider != self.dtype:
                self.dtype = wider
                return
            self.lowest = min(self.lowest, float(part.min()))
            values = (part[part != 0] if self.nonzero else part.ravel()).astype(self.dtype)
            raw = values.view(f"u{self.dtype.itemsize}").astype(np.uint64)
            if self.dtype.kind == "f":  # IEEE 754: negative numbers run the other way
                raw = np.where(raw & sign, raw ^ (sign | (sign - np.uint64(1))), raw | sign)
            yield raw ^ sign if self.dtype.kind == "i" else raw


def _number(digits: Sequence[int]) -> int:
    return sum(digit << 16 * place for place, digit in enumerate(reversed(digits)))


def _value(digits: Sequence[int], dtype: np.dtype) -> Any:
    """Return the value of a key, a Python integer or a float of the dtype."""
    key, sign = _number(digits), 1 << 8 * dtype.itemsize - 1
    if dtype.kind != "f":
        return key - sign if dtype.kind == "i" else key
    raw = key ^ sign if key & sign else key ^ (2 * sign - 1)
    return np.array(raw, f"u{dtype.itemsize}").view(dtype)[()]


def _descend(table: np.ndarray, prefix: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], int]:
    """Return the prefix with the digit that holds a rank, and the rank among those that share it."""
    ends = np.cumsum(table)
    digit = int(np.searchsorted(ends, rank, side="right"))
    return (*prefix, digit), rank - int(ends[digit] - table[digit])


def _between(low: Any, high: Any, share: float) -> float:
    """Interpolate linearly, rounding as NumPy does."""
    apart = float(high - low)
    return float(high) - apart * (1 - share) if share >= 0.5 else float(low) + apart * share
