"""From the cases of a spec to files on this machine."""

from __future__ import annotations

import functools
import glob
import hashlib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from data_shards.errors import UserError
from data_shards.readers import check_options, files_of
from data_shards.readers.base import reader_for
from data_shards.readers.dicom import read_dicom, read_dicom_drawing
from data_shards.readers.dicom_files import patient_of
from data_shards.spec import Case, Spec
from data_shards.vocabulary import canonical

PACKAGE = "package://"
DICOM_PATIENT = "dicom"
"""The rule for patients that takes the identifier from the header of the image."""


@dataclass(frozen=True)
class Source:
    """One case whose files exist.

    Attributes:
        id: The case's identifier.
        patient: The patient's identifier; the case's where no patient is known.
        patient_known: Whether the spec names patients.
        image: The image's file, or the folder of its files.
        masks: What was drawn on it: files by the name of the mask, ``""`` for the only one. An absent mask that means
            "nothing found" has no files.
        split: The split that the spec names, or None.
        looked_for: The terms that were looked for in this case, or None for all.
        no_target: What it means if the masks hold none of the targets: ``"error"``, ``"empty"``, ``"skip"``, or
            None, which depends on the image.
    """

    id: str
    patient: str
    image: Path
    masks: Mapping[str, tuple[Path, ...]]
    split: str | None = None
    patient_known: bool = True
    looked_for: tuple[str, ...] | None = None
    no_target: str | None = None

    @property
    def image_files(self) -> list[Path]:
        """The files that hold the image."""
        return files_of(self.image)

    @property
    def mask_files(self) -> list[Path]:
        """The files that hold what was drawn, mask by mask."""
        return [file for name in sorted(self.masks) for path in self.masks[name] for file in files_of(path)]


def find_sources(
    spec: Spec, spec_path: Path, root: str | Path | None = None, skipped: list[str] | None = None
) -> list[Source]:
    """Expand the cases of a spec and check that every file exists and has a reader.

    Args:
        spec: The spec.
        spec_path: Its file: the default root is the folder of it.
        root: Overrides the spec's root.
        skipped: Gets the identifiers of cases without a mask that the spec leaves out.

    Raises:
        UserError: A file, folder or package is missing, a pattern fits nothing, or two cases share an id.
    """
    folder = Path(root) if root is not None else spec_path.parent / Path(spec.root or "").expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: correct --root or the spec's root")
    result: list[Source] = []
    seen: set[str] = set()
    kinds: set[tuple[str, ...]] = set()
    files: set[tuple[Path, ...]] = set()
    dicom = False
    for case in spec.cases:
        for source in _expand(case, folder, spec_path, [] if skipped is None else skipped):
            if source.id in seen:
                raise UserError(f"{spec_path}: cases: two cases have the id '{source.id}': give them different ids")
            seen.add(source.id)
            masks = [path for paths in source.masks.values() for path in paths]
            if (source.image, *masks) in files:
                raise UserError(f"{spec_path}: cases: {source.image} is there twice, with the same mask: drop one case")
            files.add((source.image, *masks))
            kind = tuple(path.suffix for path in (source.image, *masks))
            if kind not in kinds:  # a check of each of a million cases of one kind takes minutes
                check_options(source.image, masks, spec.reader)
                kinds.add(kind)
                dicom = dicom or _is_dicom(source.image, masks)
            result.append(source)
    if not result:
        raise UserError(f"{spec_path}: cases: none has a mask: correct the pattern of 'mask'")
    _check_masks(spec, result, spec_path)
    _check_images(result, spec_path)
    if dicom:
        _check_salt(spec)
    return result


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


@functools.lru_cache(maxsize=16)
def _unchanged_sha256(path: Path, size: int, changed: int) -> str:
    """Return the SHA-256 of a file as it was then: one annotation file serves all images of a data set."""
    return file_sha256(path)


def files_sha256(paths: list[Path]) -> str:
    """Return the SHA-256 of one file, or that of the list of several files' hashes.

    Raises:
        UserError: A file cannot be read.
    """
    try:
        status = [path.stat() for path in paths]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
    hashes = [_unchanged_sha256(path, item.st_size, item.st_mtime_ns) for path, item in zip(paths, status, strict=True)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _check_masks(spec: Spec, sources: list[Source], spec_path: Path) -> None:
    """Raise unless every target says which of the named masks it is drawn in."""
    names = {name for source in sources for name in source.masks}
    for target in spec.targets:
        if (target.mask or "") not in names:
            known = ", ".join(sorted(filter(None, names)))
            raise UserError(
                f"{spec_path}: targets: '{target.term}' needs 'mask: NAME', one of {known}"
                if known
                else f"{spec_path}: targets: '{target.term}': no mask '{target.mask}': the cases' mask has no name"
            )
    wanted = {target.mask or "" for target in spec.targets}
    for source in sources:
        if wanted.isdisjoint(source.masks):
            raise UserError(f"{spec_path}: cases: '{source.id}' has none of the masks that the targets name")


def _check_images(sources: list[Source], spec_path: Path) -> None:
    """Raise if the mask of one case is the image of another: a pattern that fits both makes negatives of masks."""
    masks = {path: source.id for source in sources for paths in source.masks.values() for path in paths}
    for source in sources:
        owner = masks.get(source.image, source.id)
        if owner != source.id:
            raise UserError(
                f"{spec_path}: cases: {source.image} is taken for an image, and is the mask of '{owner}': "
                "choose the images by 'only', a regular expression that their ids contain"
            )


def _check_salt(spec: Spec) -> None:
    """Raise if identifiers from DICOM would be hashed with a key that everybody knows."""
    if spec.salt is None and spec.salt_env is None:
        raise UserError(
            "DICOM carries patients' identifiers, which are hashed with a private key: add 'salt_env: DATA_SALT' and "
            "run `export DATA_SALT=$(openssl rand -hex 16)`, or 'salt: public' if the files are public"
        )


def _is_dicom(image: Path, masks: list[Path]) -> bool:
    """Whether the image or a mask goes to the readers of DICOM, which take names without an ending too."""
    return reader_for(image) is read_dicom or any(reader_for(mask, "mask") is read_dicom_drawing for mask in masks)


def _expand(case: Case, folder: Path, spec_path: Path, skipped: list[str]) -> Iterator[Source]:
    """Yield the one case, or those that fit its pattern, sorted by id."""
    where = f"{spec_path}: cases"
    named = set(_PLACEHOLDER.findall(case.image))
    masks = case.mask if isinstance(case.mask, dict) else {"": case.mask}
    for text in (*masks.values(), case.patient or ""):
        for name in _PLACEHOLDER.findall(text):
            if name not in named:
                raise UserError(
                    f"{where}: '{{{name}}}' in '{text}' stands for nothing: '{case.image}' has no such placeholder"
                )
    if not named:
        if re.search(r"[{}*]", case.image):
            raise UserError(f"{where}: '{case.image}' has no placeholder: write {{id}} for what differs between cases")
        if case.only is not None:
            raise UserError(f"{where}: 'only' chooses among files that fit a pattern, and '{case.image}' is one file")
        yield from _source(
            case, case.id or case.image, {}, Path(_locate(case.image, folder)), masks, folder, where, skipped
        )
        return
    if case.id is not None:
        raise UserError(f"{where}: '{case.image}' is a pattern: each case's id comes from it, and no id is given")
    for text in masks.values():
        if not _PLACEHOLDER.search(text) and not text.lower().endswith(_SHARED):
            raise UserError(f"{where}: '{case.image}' is a pattern: its mask '{text}' needs its placeholders too")
    fitting = sorted(_fits(_locate(case.image, folder)))
    if not fitting:
        there = _what_is_there(_locate(case.image, folder))
        raise UserError(f"{folder}: no file fits '{case.image}'{there}: correct the pattern or --root")
    chosen = [item for item in fitting if case.only is None or _search(case.only, item[0], f"{where}: only")]
    if not chosen:
        raise UserError(f"{where}: only '{case.only}' fits none of {len(fitting)} ids, as '{fitting[0][0]}'")
    for identifier, path, texts in ((text, Path(path), dict(pairs)) for text, path, pairs in chosen):
        yield from _source(case, identifier, texts, path, masks, folder, where, skipped)


def _source(
    case: Case,
    identifier: str,
    texts: Mapping[str, str],
    image: Path,
    masks: Mapping[str, str],
    folder: Path,
    where: str,
    skipped: list[str],
) -> Iterator[Source]:
    """Yield the case of an image, unless its mask is missing and the spec leaves such cases out."""
    if not (image.is_file() or image.is_dir()):
        raise UserError(f"{image}: no such file: correct the spec or pass --root")
    files = {name: _mask_files(text, texts, folder) for name, text in masks.items()}
    missing = [
        name for name, paths in files.items() if not paths or not all(path.is_file() or path.is_dir() for path in paths)
    ]
    if missing and case.no_mask == "skip":
        skipped.append(identifier)
        return
    for name in missing:
        if case.no_mask == "error":
            place = files[name][0] if files[name] else _locate(_filled(masks[name], texts), folder)
            raise UserError(
                f"{place}: no such file, the mask of {image}: correct the spec or --root, or set no_mask; 'only' "
                "passes over what is no image"
            )
        files[name] = ()
    patient = case.patient
    if patient == DICOM_PATIENT:
        patient = patient_of(image)
        if not patient:
            raise UserError(f"{image}: its header names no patient: give 'patient' another rule, as a placeholder")
    elif patient is not None:
        patient = _patient(patient, identifier, texts, where) if texts else patient.removeprefix("=")
    yield Source(
        id=identifier,
        patient=identifier if patient is None else patient,
        image=image,
        masks=files,
        split=case.split,
        patient_known=patient is not None,
        looked_for=None if case.looked_for is None else tuple(map(canonical, case.looked_for)),
        no_target=case.no_target,
    )


_SHARED = (".json",)
"""Endings of mask files that serve many images."""

_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")


def _filled(text: str, texts: Mapping[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda match: texts[match[1]], text)


def _mask_files(text: str, texts: Mapping[str, str], folder: Path) -> tuple[Path, ...]:
    """Return the files of a mask; none if nothing fits its ``*``."""
    if "*" not in text:
        return (Path(_locate(_filled(text, texts), folder)),)
    # What an id stands for is text, not a pattern, even if it holds a bracket.
    located = _locate(_filled(text, {name: value.replace("*", "\0") for name, value in texts.items()}), folder)
    pattern = "*".join(glob.escape(piece.replace("\0", "*")) for piece in located.split("*"))
    return tuple(Path(path) for path in sorted(glob.iglob(pattern)))  # noqa: PTH207  # the folder may be a pattern too


def _locate(text: str, folder: Path) -> str:
    """Return a path of the spec as a path of this machine; placeholders stay in it."""
    if not text.startswith(PACKAGE):
        return str(folder / Path(text).expanduser())
    package, _, inside = text.removeprefix(PACKAGE).partition("/")
    # Found, not imported: a file is wanted, not the package's code.
    found = importlib.util.find_spec(package) if re.fullmatch(r"\w+", package) else None
    if found is None or not found.submodule_search_locations:
        raise UserError(f"{text}: the package '{package}' is not installed: pip install {package}")
    return str(Path(found.submodule_search_locations[0]) / inside)


def _fits(pattern: str) -> Iterator[tuple[str, str, tuple[tuple[str, str], ...]]]:
    """Yield (id, path, what each placeholder stood for) of the files that fit.

    A placeholder stands for text without ``/``, everywhere the same; ``*`` for any such text.
    """
    names: list[str] = []
    wanted = ""
    pieces = re.split(r"(\{[A-Za-z_]\w*\}|\*)", pattern)
    for piece in pieces:
        if piece == "*":
            wanted += "[^/]*"
        elif _PLACEHOLDER.fullmatch(piece):
            name = piece[1:-1]
            wanted += f"(?P={name})" if name in names else f"(?P<{name}>[^/]+)"
            names += [name] if name not in names else []
        else:
            wanted += re.escape(piece)
    shell = "".join("*" if piece == "*" or _PLACEHOLDER.fullmatch(piece) else glob.escape(piece) for piece in pieces)
    for path in glob.iglob(shell):  # noqa: PTH207  # the folder may be a pattern too
        match = re.fullmatch(wanted, path)
        if match:
            yield "/".join(match[name] for name in names), path, tuple((name, match[name]) for name in names)


def _what_is_there(pattern: str) -> str:
    """Say what lies in the last folder of a pattern that exists: the user wrote another ending, or another level."""
    fixed = Path(re.split(r"[{*]", pattern, maxsplit=1)[0] + "x").parent
    while not fixed.is_dir():
        fixed = fixed.parent
    names = sorted(path.name + "/" * path.is_dir() for path in fixed.iterdir() if not path.name.startswith("."))
    if not names:
        return f"; {fixed} is empty"
    return f"; {fixed} holds {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"


def _search(rule: str, identifier: str, where: str) -> re.Match[str] | None:
    try:
        return re.search(rule, identifier)
    except re.error as error:
        raise UserError(f"{where} '{rule}' is not a regular expression ({error})") from error


def _patient(rule: str, identifier: str, texts: Mapping[str, str], where: str) -> str:
    """Return the patient of an id that a pattern found."""
    if rule.startswith("=") and rule != "=":
        return rule[1:]
    if _PLACEHOLDER.search(rule):
        return _filled(rule, texts)
    match = _search(rule, identifier, f"{where}: patient")
    found = None if match is None else match[1] if match.re.groups else match[0]
    if not found:
        raise UserError(
            f"{where}: patient '{rule}' finds nothing in the id '{identifier}'; one patient for all is '={rule}'"
        )
    return found
