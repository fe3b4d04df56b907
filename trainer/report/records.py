"""The JSON files of a run, refused where a value is not of the kind that a report needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from data_shards.errors import UserError
from trainer.presence import PresenceRates
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


@dataclass(frozen=True)
class Presence:
    """How often terms were found where they are, and where they are not.

    Attributes:
        threshold: Confidence from which a term counts as found.
        groups: Rates of all answers, then of each data set and modality.
    """

    threshold: float
    groups: tuple[PresenceRates, ...]


@dataclass(frozen=True)
class Synonyms:
    """Scores of the same concepts in their canonical and in other words.

    Attributes:
        wordings: Number of other wordings that were asked, over all samples; at least one.
        canonical: Mean DSC of the canonical ones, each counted as often as it has others.
        others: Mean DSC of the others.
        worse: Loss of DSC from which a wording counts as worse.
        share_worse: Share of the others that lose more.
        worst: Term, wording, number of samples and mean loss of those that lose most.
    """

    wordings: int
    canonical: float
    others: float
    worse: float
    share_worse: float
    worst: tuple[tuple[str, str, int, float], ...]


WAYS = ("text", "text_and_box", "box")
"""How `trainer.callbacks.BoxGivenProbe` asks."""


@dataclass(frozen=True)
class BoxesGiven:
    """Scores of the same concepts asked by text, by text and box, and by box.

    Attributes:
        concepts: Number of concepts, over all samples.
        dsc: Mean DSC of each of `WAYS`.
        datasets: The same of each data set.
    """

    concepts: int
    dsc: tuple[float, ...]
    datasets: tuple[tuple[str, BoxesGiven], ...] = ()


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
    _numbers(path, export, ("max_logit_difference", "tolerance", "dsc_run", "dsc_consumer", "bytes"))
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


def read_presence(path: Path) -> Presence | None:
    """Read ``presence.json``; None if there is none.

    Raises:
        UserError: The file is damaged.
    """
    if not path.is_file():
        return None
    content = _object(path)
    names = [column.name for column in fields(PresenceRates)]
    groups = []
    for group in _list(path, content, "groups"):
        if not isinstance(group, dict) or not {*names} <= group.keys():
            raise UserError(f"{path}: groups should hold objects with {', '.join(names)}; run the evaluation again")
        _numbers(path, group, names[2:], "groups.")
        if None in (group["present"], group["absent"]):
            raise UserError(f"{path}: groups.present and groups.absent should be numbers; run the evaluation again")
        groups.append(PresenceRates(**{name: group[name] for name in names}))
    return Presence(_number(path, content, "threshold"), tuple(groups))


def read_synonyms(path: Path) -> Synonyms | None:
    """Read ``synonyms.json``; None if there is none, or if no concept had another name.

    Raises:
        UserError: The file is damaged.
    """
    if not path.is_file():
        return None
    content = _object(path)
    wordings = int(_number(path, content, "wordings"))
    if not wordings:
        return None
    _objects(path, content, ("dsc",))
    dsc = content.get("dsc") or {}
    worst = []
    for row in _list(path, content, "worst"):
        if not isinstance(row, dict):
            raise UserError(f"{path}: worst should hold objects; run the evaluation again")
        loss, count = _number(path, row, "drop"), int(_number(path, row, "n"))
        worst.append((str(row.get("term")), str(row.get("wording")), count, loss))
    return Synonyms(
        wordings=wordings,
        canonical=_number(path, dsc, "canonical"),
        others=_number(path, dsc, "others"),
        worse=_number(path, content, "worse"),
        share_worse=_number(path, content, "share_worse"),
        worst=tuple(worst),
    )


def read_boxes_given(path: Path) -> BoxesGiven | None:
    """Read ``boxes_given.json``; None if there is none.

    Raises:
        UserError: The file is damaged.
    """
    if not path.is_file():
        return None
    content = _object(path)
    _objects(path, content, ("datasets",))
    datasets = content.get("datasets") or {}
    _objects(path, datasets, tuple(datasets), "datasets.")
    whole = _boxes_given(path, content)
    parts = tuple((name, _boxes_given(path, part)) for name, part in datasets.items() if part)
    return BoxesGiven(whole.concepts, whole.dsc, parts)


def _boxes_given(path: Path, content: Mapping[str, Any]) -> BoxesGiven:
    _objects(path, content, ("dsc",))
    scores = content.get("dsc") or {}
    return BoxesGiven(int(_number(path, content, "concepts")), tuple(_number(path, scores, way) for way in WAYS))


def _number(path: Path, record: Mapping[str, Any], name: str) -> float:
    value: Any = record.get(name)
    if not _is_number(value) or not math.isfinite(value):
        raise UserError(f"{path}: {name} should be a number, not {value!r}; run the evaluation again")
    return float(value)


def _list(path: Path, record: Mapping[str, Any], name: str) -> list[Any]:
    value = record.get(name)
    if not isinstance(value, list):
        raise UserError(f"{path}: {name} should be a list, not {_kind(value)}; run the evaluation again")
    return value


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
