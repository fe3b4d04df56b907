"""The checks of terms and of their balance; the index is enough for them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from difflib import get_close_matches

from data_shards import vocabulary
from data_shards.errors import counted
from data_shards.lint.findings import corpus_check
from data_shards.lint.survey import Corpus, Hit

_RARE = 10
"""Images in the training split below which a term is rare."""
_UNEVEN = 100
"""Ratio of the most common term to the rarest from which a corpus is out of balance."""
_MODALITY = 0.01
"""Share of the samples below which a modality is rare."""
_NEAR = 0.75
"""Similarity from which an unknown term may be a known one, misspelt."""
_TRAIN = "train"

_PLACEHOLDER = re.compile(
    r"(?:(?:the )?(?:mask|masks|label|labels|class|classes|object|objects|segment|segmentation|roi|region|target|"
    r"annotation|instance|category|item|structure|seg|gt|ground truth|foreground|background|value|channel|unknown|"
    r"unnamed|untitled|undefined|unlabell?ed|none|null|nan|n/?a|tbd|todo|test|foo|bar|xxx+|other|others|misc|default|"
    r"term|thing|stuff|image|name|string|text|placeholder)(?:[ _#.:-]*[0-9]+)?|[0-9 _.,#:+-]+|[^\w]+|[a-z])",
    re.IGNORECASE,
)
"""Terms that say nothing: a word from a form, with or without a number; or no word at all."""


@corpus_check("placeholder-term", "error", "A term names nothing: 'label 1', 'mask', 'unknown', a number.")
def placeholder_term(corpus: Corpus) -> Iterator[Hit]:
    """Look for terms that no clinician would say."""
    for split, term, count in _terms(corpus):
        if is_placeholder(term):
            message = f"the term '{term}' names nothing: give the clinical term in the spec"
            yield Hit(message, split=split, term=term, value=count)


@corpus_check("unknown-term", "warning", "A term is not in the vocabulary: it has no synonyms, and may be misspelt.")
def unknown_term(corpus: Corpus) -> Iterator[Hit]:
    """Look terms up."""
    concepts = vocabulary.vocabulary().concepts
    for split, term, count in _terms(corpus):
        if term.strip() and not is_placeholder(term) and not vocabulary.known(term):
            near = get_close_matches(term.casefold(), concepts, n=1, cutoff=_NEAR)
            hint = f"did you mean '{concepts[near[0]]}'?" if near else "give it synonyms in the spec, if it has any"
            message = f"the term '{term}' is not in the vocabulary: {hint}"
            yield Hit(message, split=split, term=term, value=count)


@corpus_check("several-spellings", "warning", "One concept has several spellings in the corpus.")
def several_spellings(corpus: Corpus) -> Iterator[Hit]:
    """Group terms by the concept that they name."""
    spellings: dict[str, dict[str, int]] = defaultdict(dict)
    for _, term, count in _terms(corpus):
        if term.strip():
            mine = spellings[vocabulary.canonical(term).casefold()]
            mine[term] = mine.get(term, 0) + count
    for terms in spellings.values():
        if len(terms) > 1:
            term = vocabulary.canonical(next(iter(terms)))
            listed = ", ".join(f"'{name}' ({counted(count, 'target')})" for name, count in sorted(terms.items()))
            yield Hit(f"{listed} are one concept: write '{term}' everywhere", term=term, value=len(terms))


@corpus_check("term-not-in-train", "warning", "A term has targets in another split and none in the training split.")
def term_not_in_train(corpus: Corpus) -> Iterator[Hit]:
    """Compare the terms of the splits."""
    learnt = {term for split, term, count in _terms(corpus) if split == _TRAIN and count}
    if not learnt:
        return
    for split, term, count in _terms(corpus):
        if split != _TRAIN and count and term not in learnt:
            message = f"'{term}' has {counted(count, 'target')} here and none in {_TRAIN}: nothing can learn it"
            yield Hit(message, split=split, term=term, value=count)


@corpus_check("rare-term", "note", f"A term is in fewer than {_RARE} images of the training split.")
def rare_term(corpus: Corpus) -> Iterator[Hit]:
    """Count the images of each term."""
    for term, count in _images(corpus).items():
        if count < _RARE:
            message = (
                f"'{term}' is in {count} image{'s' * (count != 1)} only: add cases, or do not expect it to be learnt"
            )
            yield Hit(message, split=_TRAIN, term=term, value=count)


@corpus_check("imbalance", "note", f"A term is in {_UNEVEN} times as many training images as another, or more.")
def imbalance(corpus: Corpus) -> Iterator[Hit]:
    """Compare the most common term with the rarest."""
    counts = _images(corpus)
    if counts and max(counts.values()) >= _UNEVEN * min(counts.values()):
        most, least = max(counts, key=lambda term: counts[term]), min(counts, key=lambda term: counts[term])
        ratio = counts[most] / counts[least]
        message = f"'{most}' is in {counts[most]:,} images, '{least}' in {counts[least]:,}: weigh what is sampled"
        yield Hit(message, split=_TRAIN, term=least, value=ratio)


@corpus_check("never-absent", "note", "A term that was looked for is in every such image: it has no negatives.")
def never_absent(corpus: Corpus) -> Iterator[Hit]:
    """Look for terms whose absence cannot be learnt."""
    for part in corpus.parts:
        images = part.terms_in_samples()
        for term, count, absent in zip(part.index.terms.tolist(), images.tolist(), part.index.absent, strict=True):
            if part.name == _TRAIN and count and absent == 0:
                where = "the one image" if count == 1 else f"all {count:,} images"
                message = f"'{term}' is in {where} where it was looked for: no negatives can be drawn"
                yield Hit(message, split=part.name, term=term, value=0)


@corpus_check("rare-modality", "note", f"A modality has less than {_MODALITY:.0%} of the samples.")
def rare_modality(corpus: Corpus) -> Iterator[Hit]:
    """Count the samples of each modality."""
    counts = Counter[str]()
    for part in corpus.parts:
        for number, name in enumerate(part.index.modalities.tolist()):
            counts[name] += int((part.index.modality == number).sum())
    for name, count in sorted(counts.items()):
        if 0 < count < _MODALITY * counts.total():
            share = count / counts.total()
            message = f"'{name}' has {count:,} of {counts.total():,} samples: weigh it when you sample, or leave it out"
            yield Hit(message, term=name, value=share)


def is_placeholder(term: str) -> bool:
    """Whether a term names nothing, as ``label 1``, ``class_3`` or ``7``."""
    return _PLACEHOLDER.fullmatch(" ".join(term.split())) is not None or not term.strip()


def _terms(corpus: Corpus) -> Iterator[tuple[str, str, int]]:
    """Yield (split, term, number of targets) of every term of every split, those without targets too."""
    for part in corpus.parts:
        counts = Counter(part.index.target_term.tolist())
        for number, term in enumerate(part.index.terms.tolist()):
            yield part.name, term, counts[number]


def _images(corpus: Corpus) -> dict[str, int]:
    """Return the number of training images with a target of each term that has any."""
    counts = Counter[str]()
    for part in corpus.parts:
        if part.name == _TRAIN:
            counts.update(dict(zip(part.index.terms.tolist(), part.terms_in_samples().tolist(), strict=True)))
    return {term: count for term, count in counts.items() if count}
