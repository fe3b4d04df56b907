"""The JSON files of a run, refused where a value is not of the kind that a report needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.errors import UserError
from trainer.run import read_json


@dataclass(frozen=True)
class Jitter:
    """Scores of the same targets with boxes that are off.

    Attributes:
        side: Side of the input that the shifts are pixels of.
        targets: Number of targets.
        shifts: Pixels by which every side of the box is pushed outwards, in rising order; inwards below 0.
        dsc: Mean DSC at each shift.
    """

    side: int
    targets: int
    shifts: tuple[float, ...]
    dsc: tuple[float, ...]


def read_record(path: Path) -> dict[str, Any]:
    """Read ``run.json`` or ``evaluation.json``; empty if there is none.

    Raises:
        UserError: The file is damaged.
    """
    if not path.is_file():
        return {}
    record = _object(path)
    _objects(path, record, ("model", "versions", "data"))
    _objects(path, record.get("data") or {}, tuple(record.get("data") or ()), "data.")
    model = record.get("model") or {}
    _objects(path, model, ("preprocessing",), "model.")
    _numbers(path, model, ("parameters", "trainable"), "model.")
    return record


def read_export(path: Path) -> dict[str, Any]:
    """Read an ``export.json``; its folder is its format where it names none.

    Raises:
        UserError: The file is damaged.
    """
    export = {"format": path.parent.name, "verified": None, **_object(path)}
    _numbers(path, export, ("max_logit_difference", "tolerance", "dsc_run", "dsc_consumer"))
    if not isinstance(export.get("notes") or [], str | list):
        raise UserError(f"{path}: notes should be a list, not {_kind(export['notes'])}")
    return export


def read_stages(path: Path) -> dict[str, float]:
    """Read ``stages.json``, seconds by stage; empty if there is none.

    Raises:
        UserError: The file is damaged.
    """
    if not path.is_file():
        return {}
    stages = _object(path)
    for name, seconds in stages.items():
        if not _is_number(seconds) or not math.isfinite(seconds):
            raise UserError(f"{path}: {name} should be a number of seconds, not {seconds!r}")
    return {name: float(seconds) for name, seconds in stages.items()}


def read_jitter(path: Path) -> Jitter | None:
    """Read ``jitter.json``; None if there is none.

    Raises:
        UserError: The file is damaged.
    """
    if not path.is_file():
        return None
    content = _object(path)
    _objects(path, content, ("dsc",))
    _numbers(path, content, ("side", "targets"))
    shifts, means = (
        _row(path, "shifts", content.get("shifts")),
        _row(path, "dsc.mean", (content.get("dsc") or {}).get("mean")),
    )
    if len(shifts) != len(means) or None in (content.get("side"), content.get("targets")):
        raise UserError(f"{path}: side, targets, shifts and dsc.mean do not fit together; run the evaluation again")
    return Jitter(int(content["side"]), int(content["targets"]), shifts, means)


def _row(path: Path, name: str, values: Any) -> tuple[float, ...]:
    if not (isinstance(values, list) and values and all(_is_number(v) and math.isfinite(v) for v in values)):
        raise UserError(f"{path}: {name} should be a list of numbers; run the evaluation again")
    return tuple(map(float, values))


def _object(path: Path) -> dict[str, Any]:
    content: Any = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, not {_kind(content)}")
    return content


def _objects(path: Path, record: Mapping[str, Any], names: Sequence[str], within: str = "") -> None:
    for name in names:
        value = record.get(name)
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{path}: {within}{name} should be an object, not {_kind(value)}")


def _numbers(path: Path, record: Mapping[str, Any], names: Sequence[str], within: str = "") -> None:
    for name in names:
        value = record.get(name)
        if value is not None and not _is_number(value):
            raise UserError(f"{path}: {within}{name} should be a number, not {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    kinds = {list: "a list", dict: "an object", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
