"""How the members of a foreign sample become a triplet: which is the image, which are masks, and what these mean."""

from __future__ import annotations

import json as jsons
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from data_shards.codecs import IMAGE_EXTENSIONS
from data_shards.errors import UserError
from data_shards.patterns import compile_pattern
from data_shards.pictures import IMAGE_KINDS, LABEL_KINDS
from data_shards.strict import is_text, read_json, show

_MAX_LAYOUT = 2**20
"""Bytes of the largest layout, as JSON, that is read."""
_EXTENSION = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_VALUE = re.compile(r"-?\d{1,12}")
_MASK_WORDS = re.compile(r"(mask|masks|seg|segm|segmentation|label|labels|labelmap|gt)\d*")
_IMAGE_WORDS = re.compile(r"(image|img|input|scan|picture|photo|rgb)\d*")
_TEXT_EXTENSIONS = ("txt", "text", "caption", "term", "prompt")
_TERM_HELP = (
    "--term TEXT for one term, --terms 1=liver,2=spleen for the values of a mask, --mask EXT=TEXT for one of several "
    "masks, --text EXT for a member with the term, or --json EXT --json-term KEY"
)


@dataclass(frozen=True)
class Layout:
    """How a foreign sample becomes a triplet. Extensions are in lower case and without a dot before them.

    Attributes:
        image: Extensions that the image can have; a sample has exactly one of them.
        masks: Extensions of the mask members; a sample has all of them. What is not 0 is inside.
        mask_terms: Terms of single masks, by extension; the others have the term of the text, the JSON or `term`.
        text: Extension of a member that holds the term as UTF-8, or None.
        json: Extension of a JSON member, or None. Without masks its ``annotations`` are the regions, as in SA-1B:
            ``{"segmentation": {"size": [H, W], "counts": …}}``.
        json_term: Key of the term in an annotation or in the JSON object, or None.
        term: The term where no text says another.
        terms: Terms of the values of masks without a term of their own; an empty one leaves the value out.
        instances: Each value of a mask is one instance, besides the whole of its term; each annotation is one, without
            a whole, as annotations lie in each other.
        dataset: Name of the data set.
        modality: ``"CT"``, ``"MR"``, …
        patient: Regular expression with one group that finds the patient in a key; None: each image is its own.

    Raises:
        UserError: The parts do not go together; it names the option of `data-shards index` to change.
    """

    image: tuple[str, ...]
    masks: tuple[str, ...] = ()
    mask_terms: Mapping[str, str] = field(default_factory=dict)
    text: str | None = None
    json: str | None = None
    json_term: str | None = None
    term: str = ""
    terms: Mapping[int, str] = field(default_factory=dict)
    instances: bool = False
    dataset: str = ""
    modality: str = ""
    patient: str | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        _check_extensions(self)
        _check_terms(self)
        if self.patient is not None:
            try:
                compile_pattern(self.patient)
            except UserError as error:
                raise UserError(f"--patient: {error}") from error

    @property
    def one_term(self) -> bool:
        """Whether some mask, or every annotation, has the term of the text, the JSON or `term`."""
        return not self.masks or (not self.terms and bool(set(self.masks) - set(self.mask_terms)))

    def to_json(self) -> str:
        """Return the layout as JSON; equal layouts give equal texts."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        record = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
        return jsons.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """Read what `to_json` wrote; it may be damaged or hostile.

        Raises:
            UserError: It is something else.
        """
        try:
            record = read_json(text.encode("utf-8", "replace"), _MAX_LAYOUT)
            names = {item.name for item in fields(cls)}
            if record.keys() != names:
                odd = min(record.keys() ^ names)
                raise UserError(f"it {'lacks' if odd in names else 'has'} {show(odd)}")
            for name in ("image", "masks"):
                if isinstance(record[name], list):
                    record[name] = tuple(record[name])
            if isinstance(record["terms"], dict):
                if not all(_VALUE.fullmatch(value) for value in record["terms"]):
                    raise UserError("its terms are not of whole numbers")
                record["terms"] = {int(value): term for value, term in record["terms"].items()}
            return cls(**record)
        except UserError as error:
            raise UserError(f"the layout of the samples is damaged ({error}): run `data-shards index` again") from error

    @classmethod
    def detect(cls, members: Sequence[str], given: Mapping[str, Any] | None = None) -> Layout | None:
        """Propose the roles of members from their extensions.

        Args:
            members: Extensions of the members of the first samples, as they come.
            given: Attributes that are known already.

        Returns:
            The layout; None for triplets of our own, unless something was given.

        Raises:
            UserError: It cannot be told what is what; lists the extensions and the options to give.
        """
        found = list(dict.fromkeys(name.lower() for name in members if name))
        if not given and is_ours(found):
            return None
        known = {name: value for name, value in (given or {}).items() if value is not None}
        pictures = [name for name in found if _EXTENSION.fullmatch(name) and _kind(name) in IMAGE_KINDS]
        free = [name for name in pictures if name not in (*known.get("image", ()), *known.get("masks", ()))]
        masks = known.get("masks") or tuple(name for name in free if _named(name, _MASK_WORDS))
        if "masks" not in known and ("json" not in known or "json_term" in known):
            known["masks"] = masks
        if "image" not in known:
            images = [name for name in free if name not in masks]
            known["image"] = tuple(name for name in images if "." not in name or _named(name, _IMAGE_WORDS))
            # A .jpg beside a .png can be an image and its mask, or two ways to store an image.
            if not known["image"] or (not masks and len({_kind(name) for name in known["image"]} - {"jpeg"}) > 1):
                raise _unclear(found, "which members are images and which are masks", "--image EXT and --mask EXT")
        if "json" not in known and (not known.get("masks") or "json_term" in known):
            known["json"] = _detect_json(found)
        if not known.get("masks"):
            known.setdefault("instances", True)
        if not (known.keys() & {"text", "json_term", "term", "terms"} or _all_named(known)):
            _detect_text(found, known)
        return cls(**known)


def wanted(layout: Layout) -> frozenset[str]:
    """Return the extensions of the members to read, in lower and in upper case."""
    names = {*layout.image, *layout.masks, *filter(None, (layout.text, layout.json))}
    return frozenset(names | {name.upper() for name in names})


def is_ours(members: Iterable[str]) -> bool:
    """Whether samples with members of these extensions may be triplets, which say themselves what they are."""
    found = set(members)
    return "json" in found and not found.isdisjoint(IMAGE_EXTENSIONS)


def _detect_json(found: list[str]) -> str:
    files = [name for name in found if _kind(name) == "json"]
    if len(files) != 1:
        raise _unclear(found, "which members are masks", "--mask EXT, or --json EXT for annotations as in SA-1B")
    return files[0]


def _detect_text(found: list[str], known: dict[str, Any]) -> None:
    texts = [name for name in found if name in _TEXT_EXTENSIONS or _kind(name) == "txt"]
    if len(texts) != 1:
        raise _unclear(found, "which term the masks have", _TERM_HELP)
    known["text"] = texts[0]


def _all_named(known: Mapping[str, Any]) -> bool:
    return bool(known.get("masks")) and set(known["masks"]) <= set(known.get("mask_terms", ()))


def _unclear(found: Iterable[str], what: str, options: str) -> UserError:
    names = [f".{show(name)[1:-1]}" for name in found]
    listed = ", ".join(names[:20]) + (" and more" if len(names) > 20 else "")
    return UserError(f"it is not clear {what} (members found: {listed or 'none'}): give {options}")


def _kind(extension: str) -> str:
    return extension.rpartition(".")[2]


def _named(extension: str, words: re.Pattern[str]) -> bool:
    """Whether one of the words of an extension but the last, as ``liver_mask.png`` has two, says what it is."""
    return any(words.fullmatch(word) for word in re.split(r"[._-]", extension.rpartition(".")[0]))


def _check_types(layout: Layout) -> None:
    """Refuse what is of a wrong type, as a damaged file may hold."""
    lists = all(
        isinstance(item, tuple) and all(isinstance(n, str) for n in item) for item in (layout.image, layout.masks)
    )
    optional = (layout.text, layout.json, layout.json_term, layout.patient)
    texts = all(map(is_text, (layout.term, layout.dataset, layout.modality, *(n for n in optional if n is not None))))
    maps = isinstance(layout.mask_terms, Mapping) and isinstance(layout.terms, Mapping)
    if not (lists and texts and maps and type(layout.instances) is bool):
        raise UserError("a field of the layout has a wrong type, or is no text on one line")
    if not all(type(value) is int and is_text(term) for value, term in layout.terms.items()):
        raise UserError("--terms: whole numbers and texts are needed, as 1=liver,2=spleen")
    if not all(is_text(name) and is_text(term) and term for name, term in layout.mask_terms.items()):
        raise UserError("--mask: an extension and a text are needed, as liver.png=liver")


def _check_extensions(layout: Layout) -> None:
    names = [*layout.image, *layout.masks, *(name for name in (layout.text, layout.json) if name is not None)]
    for name in names:
        if not _EXTENSION.fullmatch(name):
            raise UserError(f"{show(name)} is no extension: it is what follows the first dot of a name, as mask.png")
        if names.count(name) > 1:
            raise UserError(f"the member .{name} is given twice: each has one role")
    for option, role, kinds in (("--image", layout.image, IMAGE_KINDS), ("--mask", layout.masks, LABEL_KINDS)):
        for name in role:
            if _kind(name) not in kinds:
                why = ": JPEG blurs the edge of a mask" if _kind(name) in ("jpg", "jpeg") else ""
                raise UserError(f"{option} {name}: only {', '.join(kinds)} are read here{why}")
    if not layout.image:
        raise UserError("no image: give --image EXT")
    if not layout.masks and layout.json is None:
        raise UserError("no masks: give --mask EXT, or --json EXT for annotations as in SA-1B")
    stray = [name for name in layout.mask_terms if name not in layout.masks]
    if stray:
        raise UserError(f"--mask: {show(stray[0])} has a term but is no mask")


def _check_terms(layout: Layout) -> None:
    """Refuse terms that are missing, or that nothing would use."""
    if layout.json_term is not None and layout.json is None:
        raise UserError("--json-term: give --json EXT too, the member that has the key")
    if layout.json is not None and layout.masks and layout.json_term is None:
        raise UserError(f"--json {layout.json}: with masks only a term is read from it: give --json-term KEY")
    if layout.terms and not layout.masks:
        raise UserError("--terms: annotations have no values: give --json-term KEY or --term TEXT")
    if layout.terms and layout.instances:
        raise UserError("--terms: with --instances the values of a mask are instances, not terms: give --term TEXT")
    if layout.text is not None and layout.json_term is not None:
        raise UserError("--text and --json-term both give the term: choose one")
    given = [layout.text, layout.json_term, layout.term or None]
    if layout.one_term and not any(item is not None for item in given):
        raise UserError(f"it is not clear which term the masks have: give {_TERM_HELP}")
    if not layout.one_term:
        for option, value in zip(("--text", "--json-term", "--term"), given, strict=True):
            if value is not None:
                raise UserError(f"{option} {value}: all masks have terms already: drop one of the two")
