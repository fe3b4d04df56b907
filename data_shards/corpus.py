"""The splits of a corpus on disk."""

from __future__ import annotations

from pathlib import Path

from data_shards import manifest as manifests
from data_shards.errors import UserError
from data_shards.index import INDEX_NAME


def split_folders(folder: str | Path) -> dict[str, Path]:
    """Return the folder of each split of a corpus; or the one folder given, if it is a split itself.

    Splits come in the order of the manifest. A split that the manifest lists is returned even if it is gone.

    Raises:
        UserError: There is neither a manifest nor an index.
    """
    folder = Path(folder)
    if (folder / INDEX_NAME).is_file():
        return {folder.name: folder}
    content = manifests.read(folder)
    names = list(content["splits"]) if content else sorted(path.parent.name for path in folder.glob(f"*/{INDEX_NAME}"))
    if not names:
        raise UserError(
            f"{folder}: no corpus here ({manifests.MANIFEST_NAME} or {INDEX_NAME}): run `data-shards build`"
        )
    return {name: folder / name for name in names}
