"""What a report says of a model that is asked in words: what it finds where nothing is, other words, and boxes."""

from __future__ import annotations

from typing import Any

from data_shards.errors import counted
from trainer.presence import PresenceRates
from trainer.report.data import Evaluation, RunData
from trainer.report.markup import paragraph, score, section, signed, table
from trainer.report.records import WAYS, BoxesGiven

_RATES = {"found": "Found", "false_positives": "Found where absent", "auroc": "AUROC"}
_KINDS = {"all": "all", "dataset": "data set", "modality": "modality"}
_WAYS = dict(zip(WAYS, ("Text", "Text and box", "Box"), strict=True))


def word_sections(data: RunData) -> list[str]:
    """Presence, other words, text against box; of what was not recorded there is none."""
    return [_presence(data), _synonyms(data), _boxes_given(data)]


def _sides(data: RunData, name: str) -> dict[str, Evaluation]:
    """The evaluations that have something, by ``before`` and ``after``."""
    found = {"before": data.before, "after": data.after}
    return {side: one for side, one in found.items() if one and getattr(one, name)}


def _columns(names: list[str], sides: dict[str, Evaluation]) -> list[str]:
    return [f"{name} {side}" for name in names for side in sides]


def _presence(data: RunData) -> str:
    sides = _sides(data, "presence")
    if not sides:
        return ""
    rates = {side: {(g.kind, g.group): g for g in one.presence.groups} for side, one in sides.items() if one.presence}
    last = list(rates.values())[-1]
    several = {kind for kind in _KINDS if kind == "all" or sum(key[0] == kind for key in last) > 1}
    rows = []
    for key, group in last.items():
        if key[0] not in several:
            continue
        values = [_rate(rates[side].get(key), name) for name in _RATES for side in sides]
        rows.append((group.group, _KINDS.get(group.kind, group.kind), group.present, group.absent, *values))
    columns = ["Group", "Of", "Asked where there", "Asked where absent", *_columns(list(_RATES.values()), sides)]
    levels = " and ".join(f"{one.presence.threshold:g} {side} tuning" for side, one in sides.items() if one.presence)
    same = {one.presence.threshold for one in sides.values() if one.presence}
    levels = f"{same.pop():g}" if len(same) == 1 < len(sides) else levels
    note = (
        f"A term counts as found from a confidence of {levels}. Found where absent: share of the terms that were "
        "looked for, are not there, and were answered with a mask all the same. AUROC: how often a term that is there "
        "is answered with more confidence than one that is not."
    )
    shown = table(columns, rows, label="Terms found where they are and where they are not", words=(0, 1))
    return section("Terms that are there, and that are not", shown, paragraph(note, "note"))


def _rate(group: PresenceRates | None, name: str) -> str | None:
    value = None if group is None else getattr(group, name)
    return None if value is None else score(value)


def _synonyms(data: RunData) -> str:
    sides = _sides(data, "synonyms")
    found = {side: one.synonyms for side, one in sides.items() if one.synonyms}
    if not found:
        return ""
    rows = [
        (
            f"{side} tuning",
            one.wordings,
            score(one.canonical),
            score(one.others),
            signed(one.others - one.canonical),
            f"{one.share_worse:.1%}".replace("%", "\u00a0%"),
        )
        for side, one in found.items()
    ]
    side, last = list(found.items())[-1]
    columns = ("", "n", "DSC canonical", "DSC in other words", "Difference", f"Worse by more than {last.worse:g}")
    means = table(columns, rows, label="Scores in canonical and in other words")
    worst: list[tuple[Any, ...]] = [(term, said, count, signed(-loss)) for term, said, count, loss in last.worst]
    names = ("Term", "Said as", "n", "Difference")
    note = f"Below, the wordings that lose most {side} tuning." if worst else ""
    listed = table(names, worst, label="Wordings that lose most", words=(0, 1)) if worst else ""
    return section("Other words for the same", means, paragraph(note, "note"), listed)


def _boxes_given(data: RunData) -> str:
    sides = _sides(data, "boxes_given")
    found = {side: one.boxes_given for side, one in sides.items() if one.boxes_given}
    if not found:
        return ""
    last = list(found.values())[-1]
    by_name = {side: dict(one.datasets) for side, one in found.items()}
    whole = ("all", last.concepts, *_ways(found))
    rows = [
        (name, part.concepts, *_ways({side: parts.get(name) for side, parts in by_name.items()}))
        for name, part in last.datasets
    ]
    several = len(rows) > 1
    columns = ["Data set", "n", *_columns(list(_WAYS.values()), sides)]
    note = (
        f"Mean DSC of the same {counted(last.concepts, 'concept')}, asked by text, by text with the true box as an "
        "exemplar, and by the box alone. Where the box helps much, the model knows the thing and not the word for it."
    )
    shown = table(
        columns, rows if several else [whole], label="Scores by text and by box", foot=whole if several else ()
    )
    return section("Text against box", shown, paragraph(note, "note"))


def _ways(sides: dict[str, Any]) -> list[str | None]:
    """Scores of each way before and after."""
    parts: list[BoxesGiven | None] = list(sides.values())
    return [score(part.dsc[way]) if part else None for way in range(len(WAYS)) for part in parts]
