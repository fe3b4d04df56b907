"""Clinical terms: one spelling for each.

Only what a spec says is known here; no term is guessed, mapped to an ontology or translated.
"""

from __future__ import annotations

from collections.abc import Iterable

from data_shards.errors import UserError


def normalise(term: str) -> str:
    """Strip a term and collapse its white space; case is kept, since abbreviations need it.

    Raises:
        UserError: Nothing is left.
    """
    text = " ".join(term.split())
    if not text:
        raise UserError("a term is empty: name what is to be segmented")
    return text


def synonyms(term: str, given: Iterable[str]) -> tuple[str, ...]:
    """Return the synonyms of a term: normalised, in the order given, without repeats and without the term itself."""
    seen = {normalise(term).casefold()}
    result = []
    for text in map(normalise, given):
        if text.casefold() not in seen:
            seen.add(text.casefold())
            result.append(text)
    return tuple(result)
