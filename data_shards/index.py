"""The index of a folder of shards: random access, checks and statistics without opening a tar.

``index.npz`` lies beside the tars; a million samples open at once. Shapes: S shards, N samples, M members, T targets.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.errors import UserError, nearest
from data_shards.index_file import ARRAYS, INDEX_VERSION, read_arrays, write_arrays
from data_shards.stores.base import INDEX_NAME, MAX_INDEX
from data_shards.stores.local import LocalStore
from data_shards.triplet import KINDS

__all__ = ["INDEX_NAME", "INDEX_VERSION", "Index", "local_folder"]


@dataclass(frozen=True)
class Index:
    """Where every sample lies and what it holds.

    Attributes:
        folder: Folder of the index; that of the shards too, unless they are read from elsewhere.
        sha256: SHA-256 of the index file: it covers the shards' own hashes, so it names the data of a run.
        shard_names: (S,) file names.
        shard_sizes: (S,) bytes.
        shard_sha256: (S,) hexadecimal.
        raw_keys: (N,) keys as ASCII bytes; `keys` has them as text.
        shard: (N,) number of the shard.
        crc32: (N,) CRC-32 of the sample's members, one after another.
        member_start: (N + 1,) the members of sample i are ``member_start[i]:member_start[i + 1]``.
        member_offset: (M,) first byte of the member in the shard.
        member_size: (M,) its bytes.
        member_extension: (M,) number of its extension in `extensions`.
        target_start: (N + 1,) the targets of sample i are ``target_start[i]:target_start[i + 1]``.
        target_term: (T,) number of the term in `terms`.
        target_area: (T,) pixels.
        target_kind: (T,) 0 semantic, 1 instance.
        dataset: (N,) number of the data set in `datasets`.
        modality: (N,) number of the modality in `modalities`.
        patient: (N,) number of the patient in `patients`.
        volume: (N,) number of the case in `volumes`.
        slice_index: (N,) position along the axis; −1 where there is none.
        following: (N,) number of the sample that is the next slice; −1 where there is none.
        height: (N,) pixels; 0 where an old index cannot say.
        width: (N,) pixels; 0 likewise.
        channels: (N,) 1 or 3; 0 likewise.
        dtype: (N,) number of the image's type in `dtypes`.
        row_spacing: (N,) mm between rows; NaN where it is not known.
        column_spacing: (N,) mm between columns; NaN likewise.
        slice_spacing: (N,) mm between slices; NaN likewise.
        extensions: Table of extensions.
        terms: Table of terms, of the targets and of those looked for.
        absent: (number of terms,) samples in which a term was looked for and is not; −1 where an old index cannot say.
        datasets: Table of data sets; ``[""]`` where an old index cannot say.
        modalities: Table of modalities.
        patients: Table of patient hashes.
        volumes: Table of hashes of cases; ``[""]`` likewise.
        dtypes: Table of types; ``[""]`` likewise.
        layout: (1,) how foreign samples become triplets, as JSON; ``""`` for triplets.
    """

    folder: Path
    sha256: str
    shard_names: np.ndarray
    shard_sizes: np.ndarray
    shard_sha256: np.ndarray
    raw_keys: np.ndarray
    shard: np.ndarray
    crc32: np.ndarray
    member_start: np.ndarray
    member_offset: np.ndarray
    member_size: np.ndarray
    member_extension: np.ndarray
    target_start: np.ndarray
    target_term: np.ndarray
    target_area: np.ndarray
    target_kind: np.ndarray
    dataset: np.ndarray
    modality: np.ndarray
    patient: np.ndarray
    volume: np.ndarray
    slice_index: np.ndarray
    following: np.ndarray
    height: np.ndarray
    width: np.ndarray
    channels: np.ndarray
    dtype: np.ndarray
    row_spacing: np.ndarray
    column_spacing: np.ndarray
    slice_spacing: np.ndarray
    extensions: np.ndarray
    terms: np.ndarray
    absent: np.ndarray
    datasets: np.ndarray
    modalities: np.ndarray
    patients: np.ndarray
    volumes: np.ndarray
    dtypes: np.ndarray
    layout: np.ndarray

    def __len__(self) -> int:
        return len(self.raw_keys)

    def __reduce__(self) -> Any:
        # A process that is not forked opens the file itself, instead of being sent a million rows.
        return (_reopen, (self.folder, self.sha256)) if self.sha256 else super().__reduce__()

    @cached_property
    def keys(self) -> np.ndarray:
        """The keys as text (N,)."""
        return self.raw_keys.astype(str)

    def key(self, number: int) -> str:
        """Return one key."""
        return bytes(self.raw_keys[number]).decode("ascii")

    def members(self, number: int) -> dict[str, tuple[int, int]]:
        """Return (offset, size) in the shard of the members of one sample, by extension."""
        first, last = self.member_start[number : number + 2].tolist()
        offsets, sizes = self.member_offset[first:last].tolist(), self.member_size[first:last].tolist()
        names = [str(self.extensions[extension]) for extension in self.member_extension[first:last]]
        return dict(zip(names, zip(offsets, sizes, strict=True), strict=True))

    def targets(self, number: int) -> list[tuple[str, int, str]]:
        """Return (term, area, kind) of the targets of one sample."""
        span = slice(self.target_start[number], self.target_start[number + 1])
        rows = zip(self.target_term[span], self.target_area[span], self.target_kind[span], strict=True)
        return [(str(self.terms[term]), int(area), KINDS[kind]) for term, area, kind in rows]

    @property
    def is_old(self) -> bool:
        """Whether it was written before indices told data sets, volumes, neighbours, sizes and spacings."""
        return self.dtypes.tolist() == [""]

    @classmethod
    def load(cls, folder: str | Path, check: bool = True) -> Index:
        """Open the index of a folder.

        Args:
            folder: Folder of the shards.
            check: Check that every shard exists with the recorded size.

        Raises:
            UserError: The index is missing or damaged, or a shard is missing or has another size.
        """
        folder = local_folder(folder)
        path = folder / INDEX_NAME
        try:
            # Opening a pipe would wait for whoever writes into it.
            status = path.stat()
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_INDEX:
                raise UserError(f"{path}: not a file of at most {MAX_INDEX} bytes: copy or build the shards again")
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(_where_it_is(folder)) from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}): change the rights") from error
        try:
            arrays, sha256 = read_arrays(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}): change the rights") from error
        except Exception as error:  # whatever damaged bytes make zipfile and NumPy raise
            how = "copy or build the shards again, or run `data-shards index`"
            raise UserError(f"{path}: damaged index ({error}): {how}") from error
        index = cls(folder=folder, sha256=sha256, **arrays)
        if check:
            for problem in index.missing():
                raise UserError(problem)
        return index

    def missing(self) -> Iterator[str]:
        """Yield one line for each shard that does not exist with the recorded size."""
        return LocalStore(self.folder).missing(self.shard_names.tolist(), self.shard_sizes.tolist())

    def save(self) -> None:
        """Write the index into its folder; equal indices give equal bytes."""
        write_arrays(self.folder / INDEX_NAME, {name: getattr(self, name) for name in ARRAYS})


def _reopen(folder: Path, sha256: str) -> Index:
    index = Index.load(folder, check=False)
    if index.sha256 != sha256:
        raise UserError(f"{folder / INDEX_NAME}: changed under the run: start again")
    return index


def _where_it_is(folder: Path) -> str:
    """Say that there is no index, where one may be, and how to get one."""
    if not folder.exists():
        near = [path.name for path in folder.parent.glob("*/")] if folder.parent.is_dir() else []
        return f"{folder}: no {INDEX_NAME} here: there is no such folder{nearest(folder.name, near)}"
    if not folder.is_dir():
        return f"{folder}: is a file: name the folder of a split, such as shards/train"
    return f"{folder}: no {INDEX_NAME} here: {_how_to_make(folder)}"


def _how_to_make(folder: Path) -> str:
    splits = sorted(path.parent.name for path in folder.glob(f"*/{INDEX_NAME}"))
    if splits:
        return f"build the shards with `data-shards build`, or name one of its splits: {', '.join(splits)}"
    if any(folder.glob("*.tar")):
        return f"make it with `data-shards index {folder}`"
    return "build the shards with `data-shards build`"


def local_folder(folder: str | Path) -> Path:
    """Return a folder's path.

    Raises:
        UserError: It is written as a URL or as a command, as WebDataset takes them: nothing is fetched or run here.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", str(folder)) and not Path(folder).exists():
        raise UserError(f"{folder}: shards are read from folders only; nothing is fetched or run: copy them here first")
    return Path(folder)
