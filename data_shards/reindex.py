"""The command `data-shards index`: makes the index of any folder of tars, ours or other people's."""

from __future__ import annotations

import argparse
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_shards.errors import CommandParser, UserError, counted

if TYPE_CHECKING:
    from data_shards.index import Index
    from data_shards.layout import Layout

HELP = """\
Make index.npz beside the tars of a folder, or make it anew. It tells where each sample lies and
what it holds.

  data-shards index data/liver              a corpus, or one split of it, that `build` made
  data-shards index /data/polyps            foreign tars whose members speak for themselves

Tars that others wrote for `webdataset` become samples when it is known what their members are. In
0001.jpg, 0001.mask.png, 0001.txt the image is .jpg, the mask .mask.png, and the text is its term:

  data-shards index DIR                                                 found by itself
  data-shards index DIR --image jpg --mask png --term polyp             one term for all
  data-shards index DIR --mask seg.png --terms 1=liver,2=spleen,255=    values; 255 is left out
  data-shards index DIR --mask liver.png=liver --mask cyst.png=cyst     a mask for each term
  data-shards index DIR --mask m.png --term "cell nucleus" --instances  each value is one of many
  data-shards index DIR --json json --term object --instances           run lengths, as in SA-1B
  data-shards index DIR --mask png --json json --json-term caption      the term is in a JSON

Whose samples they are, so that patients can be kept apart; here the keys begin with P017_:

  data-shards index DIR … --dataset polyps --modality endoscopy --patient '^(P[0-9]+)_'

What was given is stored in the index: give it once. The tars are only read.
"""

_PEEK = 16
"""Samples whose members tell the layout."""
_MOST_NAMES = 5
_TERMS_SHOWN = 3


def add_arguments(parser: CommandParser) -> None:
    """Add the arguments of `data-shards index`."""
    parser.add_argument("dir", metavar="DIR", help="a folder of tars, a split, or a corpus with all its splits")
    group = parser.add_argument_group("what the members of foreign samples are (EXT is what follows the first dot)")
    group.add_argument("--image", metavar="EXT", action="append", help="the image: jpg, png or npy; several may occur")
    group.add_argument(
        "--mask", metavar="EXT[=TERM]", action="append", help="a mask: png or npy; give it again for each of several"
    )
    group.add_argument("--text", metavar="EXT", help="a text, which is the term of the mask")
    group.add_argument("--json", metavar="EXT", help="a JSON with annotations, or with the term: see --json-term")
    group.add_argument("--json-term", metavar="KEY", help="key of the term in an annotation, or in the JSON itself")
    group.add_argument("--term", metavar="TEXT", help="the term of the masks, where no text says another")
    group.add_argument(
        "--terms",
        metavar="VALUE=TERM,…",
        action="append",
        help="terms of the values of a mask; VALUE= leaves one out; begin with a minus as --terms=-1=TERM",
    )
    group.add_argument(
        "--instances", action="store_true", default=None, help="each value of a mask, or annotation, is one of many"
    )
    group.add_argument("--dataset", metavar="NAME", help="name of the data set (default: that of the folder)")
    group.add_argument("--modality", metavar="M", help="CT, MR, …")
    group.add_argument("--patient", metavar="REGEX", help="finds the patient in a key; default: each image is its own")


def run(values: argparse.Namespace) -> int:
    """Run `data-shards index`.

    Raises:
        UserError: There is no tar, one cannot be read, or it is not clear what its members are.
    """
    from rich.console import Console

    from data_shards.corpus import existing_folder, split_folders

    given = _given(values)
    folder = existing_folder(values.dir)
    if not any(any(folder.glob(pattern)) for pattern in ("*.tar", "*/*.tar")):
        raise UserError(f"{folder}: no .tar file here, nor one folder below: name the folder of the shards")
    console = Console(markup=False, emoji=False, highlight=False)
    results = []
    for path in split_folders(folder).values():
        results.append(_reindex(folder, path.resolve().name, path, given))
        for line in results[-1].lines:
            console.print(line, soft_wrap=True)
    _show(results, console)
    return 0


@dataclass(frozen=True)
class _Result:
    """One split: its index, what is to be said, the bytes read and the time taken."""

    name: str
    index: Index
    lines: list[str]
    seconds: float


def _given(values: argparse.Namespace) -> dict[str, Any]:
    """Return the attributes of a layout that the options name."""
    given: dict[str, Any] = {
        name: getattr(values, name)
        for name in ("json_term", "term", "instances", "dataset", "modality", "patient")
        if getattr(values, name) is not None
    }
    for name in ("text", "json"):
        if getattr(values, name) is not None:
            given[name] = _extension(getattr(values, name))
    if values.image:
        given["image"] = tuple(map(_extension, values.image))
    if values.mask:
        pairs = [mask.partition("=") for mask in values.mask]
        given["masks"] = tuple(_extension(name) for name, _, _ in pairs)
        empty = [name for name, sign, term in pairs if sign and not term.strip()]
        if empty:
            raise UserError(f"--mask {empty[0]}=: the term is missing: give --mask {empty[0]}=TERM")
        given["mask_terms"] = {_extension(name): term.strip() for name, _, term in pairs if term}
    if values.terms:
        given["terms"] = _terms(values.terms)
    return given


def _extension(text: str) -> str:
    return text.lower().removeprefix(".")


def _terms(texts: list[str]) -> dict[int, str]:
    """Read ``1=liver,2=spleen``; a comma that no ``VALUE=`` follows belongs to a term."""
    found: dict[int, str] = {}
    for text in (part for whole in texts for part in re.split(r",(?=\s*-?\d+\s*=)", whole)):
        match = re.fullmatch(r"\s*(-?\d{1,12})\s*=(.*)", text)
        if match is None:
            raise UserError(f"--terms {text}: give values and terms, as 1=liver,2=spleen")
        if int(match[1]) in found:
            raise UserError(f"--terms: the value {int(match[1])} is given twice")
        found[int(match[1])] = match[2].strip()
    return found


def _reindex(folder: Path, name: str, path: Path, given: dict[str, Any]) -> _Result:
    """Write the index of one split."""
    from data_shards.index import INDEX_NAME, Index
    from data_shards.progress import progress
    from data_shards.scan import write_index

    start = time.perf_counter()
    lines = []
    before = None
    if (path / INDEX_NAME).exists():
        try:
            before = Index.load(path, check=False)
        except UserError:
            lines.append(f"{name}: the index that was there is damaged or of a newer version: it is replaced")
    layout = _layout(path, before, given, folder.resolve().name)
    total = sum(tar.stat().st_size for tar in path.glob("*.tar"))
    with progress(of_bytes=True) as bar:
        task = bar.add_task(f"index {name}", total=total)
        try:
            index = write_index(path, layout, lambda count: bar.advance(task, count))
        except UserError as error:
            if layout is None and before is None:
                error.add_note(
                    "its members are called as those of samples of our own: if they are others, say so, for instance "
                    "with --image image.png --json json --term object"
                )
            raise
    lines += [f"{name}: {line}" for line in _changes(before, index)]
    if layout is not None:
        lines.append(f"{name}: {_describe(layout)}")
    lines += _update_manifest(folder, name, before, index)
    return _Result(name, index, lines, time.perf_counter() - start)


def _layout(path: Path, before: Index | None, given: dict[str, Any], dataset: str) -> Layout | None:
    """Return the layout asked for; else that of the index that was there; else what the members tell."""
    from data_shards.layout import Layout, is_ours

    if before is not None and not given and before.layout[0]:
        try:
            return Layout.from_json(str(before.layout[0]))
        except UserError:  # a damaged one: what the members tell is better than nothing
            pass
    members = _members(path)
    if not is_ours(members) or not given.keys().isdisjoint(("image", "masks", "json")):
        try:
            return Layout.detect(members, {"dataset": dataset, **given})
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    if given:
        raise UserError(
            f"{path}: its samples are triplets of our own, which name terms, data set and patient themselves: give no "
            "options, or say with --image, --mask or --json what is what"
        )
    return None


def _members(path: Path) -> list[str]:
    """Return the extensions of the members of the first samples of a folder."""
    from data_shards.tars import open_tar, walk

    tars = sorted(path.glob("*.tar"))
    if not tars:
        raise UserError(f"{path}: no .tar file here")
    keys: set[str] = set()
    found = []
    with open_tar(tars[0]) as file:
        for entry in walk(file, tars[0]):
            keys.add(entry.key)
            if len(keys) > _PEEK:
                break
            found.append(entry.extension)
    if not found:
        raise UserError(f"{tars[0]}: the shard holds no sample")
    return found


def _changes(before: Index | None, index: Index) -> list[str]:
    """Say in which shards an index differs from the one before."""
    if before is None:
        return []
    old, new = _hashes(before), _hashes(index)
    kinds = {
        "changed": [name for name in new if name in old and new[name] != old[name]],
        "added": [name for name in new if name not in old],
        "gone": [name for name in old if name not in new],
    }
    lines = []
    for what, names in kinds.items():
        if names:
            listed = ", ".join(names[:_MOST_NAMES]) + (f" and {len(names) - _MOST_NAMES:,} more" * (len(names) > 5))
            total = counted(len(old if what == "gone" else new), "shard")
            lines.append(f"{len(names):,} of {total} {what} since the last index: {listed}")
    return lines


def _hashes(index: Index) -> dict[str, str]:
    return dict(zip(index.shard_names.tolist(), index.shard_sha256.tolist(), strict=True))


def _update_manifest(folder: Path, name: str, before: Index | None, index: Index) -> list[str]:
    """Let the manifest of a corpus name the new index, if it is certain that the shards are those of the build."""
    from data_shards import manifest as manifests
    from data_shards.stage import writing

    place = folder if (folder / manifests.MANIFEST_NAME).is_file() else index.folder.resolve().parent
    content = manifests.read(place)
    if not content or name not in content["splits"] or (place / name).resolve() != index.folder.resolve():
        return []
    recorded = content["splits"][name]
    if recorded.get("index_sha256") == index.sha256:
        return []
    if before is None or before.sha256 != recorded.get("index_sha256") or _hashes(before) != _hashes(index):
        why = "shards are not those" if before is not None else "index is gone that could tell whether shards are those"
        return [f"{name}: {manifests.MANIFEST_NAME} is left as it is, as the {why} of the build: `verify` will say so"]
    content["splits"][name] = {**recorded, **manifests.describe(index)}
    with writing(place):
        manifests.write(place, content)
    return []


def _describe(layout: Layout) -> str:
    """Return a layout in words."""
    parts = [f"image {_list(layout.image)}"]
    parts += [f"mask .{name}{f' ({term})' if (term := layout.mask_terms.get(name)) else ''}" for name in layout.masks]
    if layout.json is not None and not layout.masks:
        parts.append(f"annotations .{layout.json}")
    if layout.terms:
        named = {value: term for value, term in layout.terms.items() if term}
        shown = [f"{value} {term}" for value, term in list(named.items())[:_TERMS_SHOWN]]
        parts.append(f"terms {', '.join(shown)}{' …' if len(named) > _TERMS_SHOWN else ''}")
    if layout.one_term:
        source = f".{layout.text}" if layout.text else f"'{layout.json_term}' of .{layout.json}"
        parts.append(f"term {source}" if layout.text or layout.json_term else f"term '{layout.term}'")
    if layout.instances:
        parts.append("instances")
    parts.append(f"patient {layout.patient}" if layout.patient else "each image its own patient")
    return "; ".join(parts)


def _list(extensions: tuple[str, ...]) -> str:
    return " or ".join(f".{name}" for name in extensions)


def _show(results: list[_Result], console: Any) -> None:
    from data_shards.display import make_table

    table = make_table("split", "samples", "targets", "terms", "patients", "shards", "MB", "seconds")
    for result in results:
        index = result.index
        counts = (len(index), len(index.target_term), len(index.terms), len(index.patients), len(index.shard_names))
        size = f"{index.shard_sizes.sum() / 1e6:,.1f}"
        table.add_row(result.name, *(f"{count:,}" for count in counts), size, f"{result.seconds:.1f}")
    console.print(table)
