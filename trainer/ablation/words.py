"""The answer of an ablation in one sentence, with how sure it is."""

from __future__ import annotations

from collections.abc import Sequence

from data_shards.errors import counted
from trainer.ablation.results import Entry, Results, Row
from trainer.ablation.spec import Loaded
from trainer.ablation.tables import mark
from trainer.report.markup import score, signed

FEW = 2
"""So many cells are named each with its interval; of more, one of them."""


def verdict(loaded: Loaded, results: Results) -> str:
    """What the cells that were tuned score beside the reference; says so where there is no answer yet."""
    base = results.entry(results.reference, "dsc")
    if base is None:
        return f"No answer yet: the reference, {results.reference}, has no scores."
    head = (
        f"After {loaded.spec.budget.describe()} each, {results.reference} reaches a median DSC of {score(base.median)} "
        f"on {counted(base.n, 'target')}"
    )
    compared = [(row, entry) for row in results.rows if (entry := _compared(row, results)) and _is_method(row)]
    kinds = {kind: [pair for pair in compared if mark(pair[1]) == kind] for kind in ("*", "", "↓")}
    if not compared:
        return f"{head}; no other cell has been scored yet."
    found = [_said(kind, pairs, len(pairs) == len(compared)) for kind, pairs in kinds.items() if pairs]
    return f"{head}; {'; '.join(found)}."


def scale(results: Results) -> str:
    """What untouched weights and specialists score, as a scale for the differences; nothing without them."""
    found = []
    for row in results.rows:
        entry = results.entry(row.name, "dsc")
        if entry is None or _is_method(row) or row.name == results.reference:
            continue
        what = f"the specialist {row.name}, trained from scratch on the same images," if row.specialist else row.name
        apart = f" ({_gain(entry)})" if entry.difference is not None else ""
        found.append(f"{what} reaches a median of {score(entry.median)}{apart}")
    return f"For scale: {'; '.join(found)}." if found else ""


def _is_method(row: Row) -> bool:
    return row.tuned and not row.specialist


def _compared(row: Row, results: Results) -> Entry | None:
    entry = results.entry(row.name, "dsc")
    return entry if entry and row.name != results.reference and entry.difference is not None else None


def _said(kind: str, pairs: Sequence[tuple[Row, Entry]], alone: bool) -> str:
    """What is said of the cells that are better, worse, or neither beyond chance.

    Args:
        kind: Their mark.
        pairs: They.
        alone: Whether there are no others.
    """
    pairs = sorted(pairs, key=lambda pair: pair[1].difference or 0, reverse=True)
    if len(pairs) <= FEW:
        names = " and ".join(f"{row.name} ({_gain(entry)}{_share(row)})" for row, entry in pairs)
        verb = "score" if len(pairs) > 1 else "scores"
        words = {"*": f"{names} {verb} higher beyond chance", "↓": f"{names} {verb} lower beyond chance"}
        return words.get(kind, f"no difference beyond chance was found for {names}")
    who, names = ("every other method", "any other method") if alone else (_list(pairs), _list(pairs))
    verb = "scores" if alone else "score"
    first, entry = pairs[0]
    if not kind:
        widest, entry = max(pairs, key=lambda pair: _width(pair[1]))
        return f"no difference beyond chance was found for {names}; the least certain is {widest.name} ({_gain(entry)})"
    if kind == "*":
        return f"{who} {verb} higher beyond chance, and most of all {first.name}: {_gain(entry)}{_share(first)}"
    return f"{who} {verb} lower beyond chance; {first.name} comes closest: {_gain(entry)}{_share(first)}"


def _list(pairs: Sequence[tuple[Row, Entry]]) -> str:
    *most, last = [row.name for row, _ in pairs]
    return f"{', '.join(most)} and {last}"


def _gain(entry: Entry) -> str:
    """A difference with its interval."""
    if entry.difference_low is None or entry.difference_high is None:
        return f"{signed(entry.difference)} in mean DSC"
    ends = f"{signed(entry.difference_low)} to {signed(entry.difference_high)}"
    return f"{signed(entry.difference)} in mean DSC, 95\u00a0% CI {ends}"


def _share(row: Row) -> str:
    last = row.results[-1]
    share = f"{100 * last.learning / last.parameters:.3g}\u00a0%" if last.parameters else ""
    return f", with {share} of the parameters learning" if share else ""


def _width(entry: Entry) -> float:
    return (entry.difference_high or 0) - (entry.difference_low or 0)
