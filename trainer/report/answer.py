"""The answer to a recipe's question in words, and what it does not mean."""

from __future__ import annotations

from collections.abc import Sequence

from data_shards.errors import counted
from trainer.report.data import RunData
from trainer.report.markup import interval, p_value, score, signed
from trainer.report.statistics import Comparison
from trainer.scores import CaseScore, volume_of

UNCHANGED = 0.0005
"""A mean gain below this shows as 0.000."""
FEW = 6
"""Of fewer targets no verdict is given: a signed-rank test cannot reach `SIGNIFICANT` on them."""
SIGNIFICANT = 0.05
"""A verdict needs a smaller p, besides an interval without 0."""


def answer(data: RunData) -> str:
    """One sentence or two with the figures; says so where there is no answer yet."""
    compared = data.compare("dsc")
    if compared:
        return _compared(compared, subject(data))
    if data.before and data.after:
        return (
            "The two evaluations have no target in common, so nothing can be compared: "
            "evaluate the same split before and after tuning."
        )
    only = data.after or data.before
    if only is None:
        return "There is no answer yet: this run has not been evaluated."
    mean = sum(row.dsc for row in only.scores) / len(only.scores)
    when, other = ("after", "before") if data.after else ("before", "after")
    return (
        f"On {subject(data)} mean DSC is {score(mean)} {when} tuning. Whether tuning changed that is not known: "
        f"there is no evaluation {other} it."
    )


def subject(data: RunData) -> str:
    """What was scored, such as ``43 unseen slices`` or ``87 targets in 43 test images``.

    "Unseen" is said only where the record of the training shows it.
    """
    rows = data.scores()
    keys = {row.key for row in rows}
    noun = "slice" if all(row.volume != row.key for row in rows) else "image"
    kind = "unseen" if data.trained and not keys & data.trained else "test"
    if len(keys) == len(rows):
        return counted(len(keys), f"{kind} {noun}")
    return f"{counted(len(rows), 'target')} in {counted(len(keys), f'{kind} {noun}')}"


def limits(data: RunData) -> list[str]:
    """What statistics and split do not show; one sentence or two each."""
    rows = data.scores()
    return [note for note in (_dependence(rows, data), _overlap(rows, data), _unmatched(data), _skipped(data)) if note]


def _skipped(data: RunData) -> str:
    """How many samples are missing because they were damaged."""
    notes = []
    if data.skipped:
        notes.append(f"{counted(len(data.skipped), 'sample')} could not be read and were skipped in training.")
    unscored = {key for one in (data.before, data.after) if one for key in one.record.get("skipped") or ()}
    if unscored:
        what = counted(len(unscored), "sample")
        notes.append(f"{what} of the evaluated split could not be read and were not scored.")
    return " ".join(notes)


def few_volumes(data: RunData) -> str:
    """One short line where the targets come from too few volumes to speak of others; else nothing."""
    rows, compared = data.scores(), data.compare("dsc")
    volumes = {row.volume for row in rows}
    if len(rows) < 2 or len(volumes) >= FEW:
        return ""
    sliced = any(row.volume != row.key for row in rows)
    figure = "interval" if compared and compared.gain_ci95 else "mean"
    of, these = (counted(len(volumes), "volume"), "slices") if sliced else (counted(len(volumes), "image"), "images")
    return f"{counted(len(rows), 'target')} of {of}: the {figure} describes these {these}, not other patients"


def scored_unlike(data: RunData) -> str:
    """A warning where the two evaluations were not scored alike; else nothing."""
    found = data.unlike()
    return f"{', '.join(found)}; the difference may come from that." if found else ""


def _compared(compared: Comparison, what: str) -> str:
    ends = f"from {score(compared.before)} to {score(compared.after)}"
    unclear = _unclear(compared)
    if not unclear:
        verdict = f"{'rose' if compared.gain > 0 else 'fell'} {ends}"
    elif abs(compared.gain) < UNCHANGED:
        verdict = f"stayed at {score(compared.after)}"
    else:
        verdict = f"went {ends}"
    inside = [signed(compared.gain)]
    if compared.gain_ci95:
        inside.append(f"95\u00a0%\u00a0CI {interval(compared.gain_ci95)}")
    if compared.p_value is not None:
        inside.append(f"Wilcoxon {p_value(compared.p_value)}")
    end = unclear or ("" if compared.gain > 0 else " Tuning made it worse here.")
    return f"On {what} mean DSC {verdict} ({', '.join(inside)}){_each(compared)}.{end}"


def _unclear(compared: Comparison) -> str:
    """Why the figures do not show that the score rose or fell; nothing if they do."""
    if compared.gain_ci95 is None:
        return " One target allows neither an interval nor a test."
    if compared.count < FEW:
        return f" {compared.count} targets are too few to tell whether that is a change."
    low, high = compared.gain_ci95
    if low <= 0 <= high:
        return " That is no clear change: the interval includes 0."
    if compared.p_value is None or compared.p_value >= SIGNIFICANT:
        return f" That is no clear change: the interval excludes 0, but p is not below {SIGNIFICANT}."
    return ""


def _each(compared: Comparison) -> str:
    """How many targets rose and fell."""
    same = compared.count - compared.rose - compared.fell
    numbers = [(compared.rose, "rose"), (compared.fell, "fell"), (same, "stayed the same")]
    found = [f"{number} {word}" for number, word in numbers if number]
    if compared.count == 1:
        return ""
    return f"; all {found[0]}" if len(found) == 1 else f"; {', '.join(found[:-1])} and {found[-1]}"


def _dependence(rows: Sequence[CaseScore], data: RunData) -> str:
    keys, volumes = {row.key for row in rows}, {row.volume for row in rows}
    if len(keys) < 2 and len(rows) < 2:
        return ""
    figures = "the interval and p describe" if data.compare("dsc") else "the means describe"
    if len(volumes) == len(keys):
        return (
            f"Several targets share an image and are not independent: {figures} them only."
            if len(rows) > len(keys)
            else ""
        )
    if len(volumes) == 1:
        return (
            f"All {len(keys)} slices come from one volume. Slices of one volume are alike and not independent: "
            f"{figures} these slices, not other patients."
        )
    return (
        f"The {len(keys)} slices come from {len(volumes)} volumes. Slices of one volume are alike and not independent: "
        f"{figures} these slices, and seem surer than {len(volumes)} volumes allow."
    )


def _overlap(rows: Sequence[CaseScore], data: RunData) -> str:
    """Warn of evaluated samples, or volumes, that were trained on."""
    if not data.trained or not rows:
        return ""
    keys = {row.key for row in rows}
    same = keys & data.trained
    if same:
        verb = "was" if len(same) == 1 else "were"
        of = counted(len(keys), "evaluated sample")
        return f"{len(same)} of the {of} {verb} also trained on: the scores after tuning flatter."
    volumes = {row.volume for row in rows if row.volume != row.key} & {volume_of(key) for key in data.trained}
    if not volumes:
        return ""
    whose = "this volume" if len({row.volume for row in rows}) == 1 else f"{len(volumes)} of these volumes"
    return f"Other slices of {whose} were trained on."


def _unmatched(data: RunData) -> str:
    pairs = len(data.pairs())
    if not pairs or not data.before or not data.after:
        return ""
    alone = [len(evaluation.scores) - pairs for evaluation in (data.before, data.after)]
    if not any(alone):
        return ""
    return (
        f"Compared are the {pairs} targets that both evaluations scored; {alone[0]} were scored only before "
        f"and {alone[1]} only after tuning."
    )
