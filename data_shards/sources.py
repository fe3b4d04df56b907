"""From the cases of a spec to files on this machine."""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_shards.errors import UserError, nearest
from data_shards.readers import check_options
from data_shards.spec import Case, Spec

PACKAGE = "package://"


@dataclass(frozen=True)
class Source:
    """One case whose files exist.

    Attributes:
        id: The case's identifier.
        patient: The patient's identifier.
        image: The image's file.
        mask: The mask's file.
        split: The split that the spec names, or None.
    """

    id: str
    patient: str
    image: Path
    mask: Path
    split: str | None


def find_sources(spec: Spec, spec_path: Path, root: str | Path | None = None) -> list[Source]:
    """Expand the cases of a spec and check that every file exists and has a reader.

    Args:
        spec: The spec.
        spec_path: Its file: the default root is the folder of it.
        root: Overrides the spec's root.

    Raises:
        UserError: A file, folder or package is missing, a pattern fits nothing, or two cases share an id.
    """
    folder = Path(root) if root is not None else spec_path.parent / (spec.root or "")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: correct --root or the spec's root")
    sources = [source for case in spec.cases for source in _expand(case, folder, spec_path)]
    seen: set[str] = set()
    for source in sources:
        if source.id in seen:
            raise UserError(f"{spec_path}: cases: two cases have the id '{source.id}': give them different ids")
        seen.add(source.id)
        for path in (source.image, source.mask):
            if not path.is_file():
                raise UserError(f"{path}: no such file: correct the spec or pass --root")
            check_options(path, dict(spec.reader))
    return sources


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


def _expand(case: Case, folder: Path, spec_path: Path) -> Iterator[Source]:
    """Yield the one case, or those that fit its pattern, sorted by id."""
    for text in (case.image, case.mask):
        for name in re.findall(r"\{(\w*)\}", text):
            if name != "id":
                raise UserError(
                    f"{spec_path}: cases: unknown placeholder '{{{name}}}' in '{text}'{nearest(name, ['id'])}"
                )
    image, mask = _locate(case.image, folder), _locate(case.mask, folder)
    if "{id}" not in case.image:
        if "{id}" in case.patient:
            raise UserError(
                f"{spec_path}: cases: patient '{case.patient}': {{id}} has no meaning, '{case.image}' is one file: "
                "write the patient's identifier"
            )
        yield Source(case.id or case.image, case.patient, Path(image), Path(mask), case.split)
        return
    if "{id}" not in case.mask or case.id is not None:
        raise UserError(
            f"{spec_path}: cases: '{case.image}' is a pattern: its mask needs '{{id}}' too, and no id is given"
        )
    fitting = sorted(_fits(image))
    if not fitting:
        raise UserError(f"{folder}: no file fits '{case.image}': correct the pattern or --root")
    for identifier, path in fitting:
        patient = _patient(case.patient, identifier, spec_path)
        yield Source(identifier, patient, Path(path), Path(mask.replace("{id}", identifier)), case.split)


def _locate(text: str, folder: Path) -> str:
    """Return a path of the spec as a path of this machine; ``{id}`` stays in it."""
    if not text.startswith(PACKAGE):
        return str(folder / Path(text).expanduser())
    package, _, inside = text.removeprefix(PACKAGE).partition("/")
    # Found, not imported: a file is wanted, not the package's code.
    found = importlib.util.find_spec(package) if re.fullmatch(r"\w+", package) else None
    if found is None or not found.submodule_search_locations:
        raise UserError(f"{text}: the package '{package}' is not installed: pip install {package}")
    return str(Path(found.submodule_search_locations[0]) / inside)


def _fits(pattern: str) -> Iterator[tuple[str, str]]:
    """Yield (id, path) of the files that fit; ``{id}`` stands for the same text, without ``/``, everywhere."""
    pieces = pattern.split("{id}")
    wanted = re.escape(pieces[0]) + "(?P<id>[^/]+)" + "(?P=id)".join(re.escape(piece) for piece in pieces[1:])
    for path in glob.iglob("*".join(map(glob.escape, pieces))):  # noqa: PTH207  # the folder may be a pattern too
        match = re.fullmatch(wanted, path)
        if match:
            yield match["id"], path


def _patient(rule: str, identifier: str, spec_path: Path) -> str:
    """Return the patient of an id that a pattern found."""
    if "{id}" in rule:
        return rule.replace("{id}", identifier)
    try:
        match = re.search(rule, identifier)
    except re.error as error:
        raise UserError(f"{spec_path}: cases: patient '{rule}' is not a regular expression ({error})") from error
    if match is None:
        raise UserError(f"{spec_path}: cases: patient '{rule}' finds nothing in the id '{identifier}'")
    return match[1] if match.re.groups else match[0]
