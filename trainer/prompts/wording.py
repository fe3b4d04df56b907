"""Words for concepts: which name of a term a text prompt says, and in what sentence."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from data_shards.errors import UserError, nearest
from data_shards.seed import run_seed, stream
from trainer.prompts.concepts import Concept

_PLACES = ("term", "modality", "plane")
_PLAIN = "{term}"


class Wording:
    """Puts concepts into words: the term alone by default, as Medical SAM3 asks (one canonical term a label).

    Names and sentences are drawn in training only, as a pure function of (seed, epoch, sample, concept).

    Args:
        synonyms: Probability in training that another name of the term is said instead; each is as likely.
        templates: What the term is put into: ``{term}``, and where they are known ``{modality}`` and ``{plane}``, as in
            ``{plane} {modality} of the {term}``. Each is as likely in training; evaluation takes the first. One that
            needs what an image does not tell is passed over; with none left, the term stands alone.
        seed: Seed of the draws; that of the run (`seed_everything`) if null.

    Raises:
        UserError: A probability outside of [0, 1], no template, or one that cannot be filled in.
    """

    def __init__(self, synonyms: float = 0.0, templates: Sequence[str] = (_PLAIN,), seed: int | None = None) -> None:
        if not 0 <= synonyms <= 1:
            raise UserError(f"synonyms {synonyms}: a probability from 0 to 1")
        if isinstance(templates, str) or not templates:
            raise UserError(f"templates {templates!r}: a list of one template or more, such as ['{_PLAIN}']")
        self.synonyms, self.templates, self.seed = synonyms, tuple(templates), run_seed(seed)
        self._needs = [_places(template) for template in self.templates]

    def say(self, concepts: Sequence[Concept], epoch: int | None) -> list[str]:
        """Put concepts into words.

        Args:
            concepts: What is asked for.
            epoch: The epoch in training, None in evaluation: nothing is random then.

        Returns:
            A text for each.
        """
        return [self._drawn(concept, epoch) for concept in concepts]

    def others(self, concept: Concept) -> list[str]:
        """Every other way to say a concept, for a test of how much the words matter.

        Returns:
            The synonyms in the first template, then the term in the other templates, without repeats in any case.
        """
        first, *rest = self._templates(concept)
        said = [_filled(first, concept, name) for name in (concept.term, *concept.synonyms)]
        said += [_filled(template, concept, concept.term) for template in rest]
        found: dict[str, str] = {}
        for text in said:
            found.setdefault(text.casefold(), text)
        return list(found.values())[1:]

    def describe(self) -> dict[str, Any]:
        """What it says, as JSON."""
        return {"kind": type(self).__name__, "synonyms": self.synonyms, "templates": list(self.templates)}

    def _drawn(self, concept: Concept, epoch: int | None) -> str:
        templates = self._templates(concept)
        if epoch is None:
            return _filled(templates[0], concept, concept.term)
        # three numbers whatever they are for: the sentence does not depend on how many names there are
        other, which, sentence = stream(self.seed, "wording", epoch, *concept.draw).random(3)
        names = concept.synonyms if other < self.synonyms else ()
        name = names[int(which * len(names))] if names else concept.term
        return _filled(templates[int(sentence * len(templates))], concept, name)

    def _templates(self, concept: Concept) -> list[str]:
        """The templates that can be filled in for a concept, at least one."""
        known = {"term", *(place for place in ("modality", "plane") if getattr(concept, place))}
        pairs = zip(self.templates, self._needs, strict=True)
        return [template for template, needs in pairs if needs <= known] or [_PLAIN]


def _places(template: str) -> set[str]:
    """What a template needs to be filled in.

    Raises:
        UserError: It is none, has no ``{term}``, or asks for something that a concept does not have.
    """
    try:
        parts = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except (TypeError, ValueError) as error:
        raise UserError(f"template {template!r}: is no text with places in braces ({error}): as '{_PLAIN}'") from error
    for name, form, conversion in parts:
        if name not in _PLACES or form or conversion:
            wrong = (name or "") + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            known = nearest(name or "", _PLACES)
            raise UserError(f"template {template!r}: there is no place '{{{wrong}}}'{known}")
    found = {str(name) for name, _, _ in parts}
    if "term" not in found:
        raise UserError(f"template {template!r}: does not say what is asked for: put '{_PLAIN}' into it")
    return found


def _filled(template: str, concept: Concept, name: str) -> str:
    return template.format(term=name, modality=concept.modality, plane=concept.plane)
