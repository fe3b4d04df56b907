"""Clinical terms: one spelling for each concept, and its other names.

Only `vocabulary.yaml` and what a spec says are known here; no term is guessed, mapped to an ontology or translated.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType

import yaml

from data_shards.errors import UserError


@dataclass(frozen=True)
class Vocabulary:
    """The concepts of `vocabulary.yaml`.

    Attributes:
        regions: Concepts in the order of the file, by the heading under which they stand.
        synonyms: The other names of each concept.
        concepts: From a concept or a synonym, case-folded, to the concept.
    """

    regions: Mapping[str, tuple[str, ...]]
    synonyms: Mapping[str, tuple[str, ...]]
    concepts: Mapping[str, str]


@functools.cache
def vocabulary() -> Vocabulary:
    """Return the vocabulary, read once."""
    text = resources.files("data_shards").joinpath("vocabulary.yaml").read_text(encoding="utf-8")
    regions: dict[str, dict[str, list[str]]] = yaml.safe_load(text)
    concepts = {concept: tuple(others) for region in regions.values() for concept, others in region.items()}
    known = {name.casefold(): concept for concept, others in concepts.items() for name in (concept, *others)}
    return Vocabulary(
        regions=MappingProxyType({name: tuple(region) for name, region in regions.items()}),
        synonyms=MappingProxyType(concepts),
        concepts=MappingProxyType(known),
    )


def normalise(term: str) -> str:
    """Strip a term and collapse its white space; case is kept, since abbreviations need it.

    Raises:
        UserError: Nothing is left.
    """
    text = " ".join(term.split())
    if not text:
        raise UserError("a term is empty: name what is to be segmented")
    return text


def known(term: str) -> bool:
    """Return whether a term is a concept of the vocabulary or another name of one, in any case.

    Raises:
        UserError: The term is empty.
    """
    return normalise(term).casefold() in vocabulary().concepts


def canonical(term: str) -> str:
    """Return the concept that a term names, as the vocabulary spells it; an unknown term is only normalised.

    Raises:
        UserError: The term is empty.
    """
    text = normalise(term)
    return vocabulary().concepts.get(text.casefold(), text)


def synonyms(term: str, given: Iterable[str]) -> tuple[str, ...]:
    """Return the synonyms of a term: those given, normalised, then those of the vocabulary, without repeats.

    The concept itself is among them if the term is another name of it; the term is not.
    """
    concept = canonical(term)
    seen = {normalise(term).casefold()}
    result = []
    for text in (*map(normalise, given), concept, *vocabulary().synonyms.get(concept, ())):
        if text.casefold() not in seen:
            seen.add(text.casefold())
            result.append(text)
    return tuple(result)
