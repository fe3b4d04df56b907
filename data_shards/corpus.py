"""What is on disk at the place of a corpus: its splits, and whether it may stay or be replaced."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_shards import manifest as manifests
from data_shards.errors import UserError
from data_shards.index import INDEX_NAME, Index, local_folder

PARTS = "parts"
"""Folder, in that of a corpus, of the parts that are merged into it."""


def split_folders(folder: str | Path) -> dict[str, Path]:
    """Return the folder of each split of a corpus; or the one folder given, if it is a split itself.

    Splits come in the order of the manifest. A split that the manifest lists is returned even if it is gone, and a
    folder of shards even if it has no index.

    Raises:
        UserError: There is nothing of a corpus, its manifest is damaged, or `folder` is no folder of this machine.
    """
    folder = existing_folder(folder)
    if (folder / INDEX_NAME).is_file():
        return {folder.name: folder}
    content = manifests.read(folder)
    if content:
        return {name: folder / name for name in content["splits"]}
    if any(folder.glob("*.tar")):
        return {folder.name: folder}
    found = {path.parent for pattern in (INDEX_NAME, "*.tar") for path in folder.glob(f"*/{pattern}")}
    if not found:
        raise UserError(
            f"{folder}: no corpus here ({manifests.MANIFEST_NAME} or {INDEX_NAME}): run `data-shards build`"
        )
    return {path.name: path for path in sorted(found)}


def existing_folder(folder: str | Path) -> Path:
    """Return the path of a folder of this machine, in which a corpus may lie.

    Raises:
        UserError: It is written as a URL or a command, does not exist, or is a file.
    """
    try:
        found = local_folder(folder)
    except UserError:
        raise UserError(
            f"{folder}: this command reads folders of this machine: its shards are read from folders only; nothing is "
            "fetched or run: copy the shards here first (trainings do read URLs)"
        ) from None
    if not found.is_dir():
        what = "is a file" if found.exists() else "no such folder"
        raise UserError(f"{found}: {what}: name the folder of a corpus, or of .tar files")
    return found


def existing(out: Path, overwrite: bool) -> dict[str, Any] | None:
    """Return the manifest of the corpus at `out`, empty if it is damaged and to be replaced; None where there is none.

    Parts of a build that wait there to be merged are no corpus.

    Raises:
        UserError: Something else lies there.
    """
    if not out.exists() or (out.is_dir() and all(path.name == PARTS for path in out.iterdir())):
        return None
    try:
        found = manifests.read(out) if out.is_dir() else None
    except UserError:
        if overwrite:
            return {}
        raise
    if found is None:
        raise UserError(f"{out}: exists and is no corpus: choose another --out")
    return found


def may_stay(out: Path, found: Mapping[str, Any], origin: Mapping[str, Any], overwrite: bool) -> bool:
    """Return whether the corpus at `out` is the one asked for and complete; False if it shall be replaced.

    Args:
        out: Its folder.
        found: Its manifest.
        origin: What the manifest of the one asked for would say of its origin.
        overwrite: Whether another one may be replaced.

    Raises:
        UserError: It is another one, or damaged, and must not be replaced.
    """
    different = manifests.differences(found, origin)
    if not different:
        try:
            for name in found["splits"]:
                Index.load(out / name)
            return True
        except UserError as error:
            different = [f"damage ({error})"]
    if not overwrite:
        raise UserError(
            f"{out}: holds another corpus; what differs: {', '.join(different)}: pass --overwrite to replace it"
        )
    return False
