"""A checkpoint as a folder: each rank writes the parts of tensors that it holds, by PyTorch's DCP.

DCP (`torch.distributed.checkpoint`) plans who writes what, once, and what each rank reads of which file, for any number
of ranks. The files are safetensors; what is sharded nowhere is in `STATE`. DCP's own files would be unpickled: none is
written, and none is read.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.futures import Future

from data_shards.errors import UserError
from trainer.checkpoints.file import (
    discard,
    exchange,
    explained,
    load,
    next_mark_of,
    old_of,
    partial_of,
    save,
    step_of,
)
from trainer.checkpoints.mark import FOLDER_MARK, Entry, HashedFile, Mark, sync
from trainer.checkpoints.optimizers import numbered
from trainer.checkpoints.ranks import rank_of, together
from trainer.checkpoints.tree import Path as TreePath
from trainer.checkpoints.tree import leaves, mapped

STATE = "state.pt"
"""What is not sharded, with tensors without content where sharded ones belong."""
OPTIMIZERS = "optimizer_states"
"""Where Lightning keeps the optimisers' states in a checkpoint."""

_SHARD = re.compile(r"shard-\d{5,9}\.safetensors")
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_folder(content: dict[str, Any], path: Path, group: ProcessGroup | None) -> None:
    """Write a checkpoint as a folder; all ranks call this.

    Args:
        content: The checkpoint, some tensors of which are `DTensor`.
        path: Where to; what is there is replaced.
        group: The ranks' connection.

    Raises:
        UserError: It cannot be written, or holds what could not be read back.
    """
    partial, first = partial_of(path), rank_of(group) == 0
    shards, rest = _divided(content)
    try:
        with together(group), explained(path, content):
            if first:
                path.parent.mkdir(exist_ok=True)  # a run that was moved away is not made anew
                discard(partial)  # what a killed run left would be read as part of this
                partial.mkdir()
        with together(group), explained(path, content):
            writer = ShardWriter(partial)
            dcp.save(shards, storage_writer=writer, process_group=group)
        with together(group), explained(path, content):
            if first:
                files = {STATE: save(rest, partial / STATE), **writer.entries}
                Mark(step_of(content), files).write(partial / FOLDER_MARK)
                sync(partial)
                settle_folder(path)
    except UserError:
        if first:
            with suppress(OSError):
                discard(partial)
        raise


def settle_folder(path: Path) -> None:
    """Give a written folder, which is marked, its name."""
    exchange(path)
    sync(path.parent)
    for mark in (next_mark_of(path), path.with_name(path.name + ".json")):
        mark.unlink(missing_ok=True)
    discard(old_of(path))


def check_names(path: Path, mark: Mark) -> None:
    """Check that a folder holds what its mark names, and nothing else that could be taken for a part of it.

    Raises:
        UserError: It does not.
    """
    foreign = [name for name in mark.files if name != STATE and not _SHARD.fullmatch(name)]
    if foreign or STATE not in mark.files:
        raise UserError(f"{path / FOLDER_MARK}: the mark names {foreign[0] if foreign else 'no ' + STATE}")
    for file in path.iterdir():
        hidden = file.name.startswith(".") and file.suffix != ".safetensors"
        if file.name not in mark.files and file.name != FOLDER_MARK and not hidden:
            raise UserError(f"{file}: no part of the checkpoint that it lies in: remove it")


def read_folder(path: Path) -> dict[str, Any]:
    """Put a folder's checkpoint together in this process, as a run of one process would have written it.

    Raises:
        UserError: It is damaged or not ours.
    """
    content = load_rest(path)
    whole = fill({key: torch.empty(leaf.shape, dtype=leaf.dtype) for key, leaf in stored(path, content).items()}, path)
    made: dict[str, Any] = mapped(content, lambda at, leaf: whole[key_of(at)] if is_stored(leaf) else leaf)
    made[OPTIMIZERS] = [numbered(state, path) for state in made.get(OPTIMIZERS, [])]
    return made


def load_rest(path: Path) -> dict[str, Any]:
    """What is not sharded in a folder, with tensors without content (`is_stored`) in the others' places.

    Raises:
        UserError: It is damaged or not ours.
    """
    content = load(path / STATE)
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path}: no checkpoint of a run")
    return content


def is_stored(leaf: Any) -> bool:
    """Whether a value stands for a tensor whose content is in other files."""
    return isinstance(leaf, Tensor) and leaf.is_meta


def key_of(path: TreePath) -> str:
    """Name of a sharded tensor in the files."""
    return "/".join(map(str, path))


def stored(path: Path, content: Any) -> dict[str, Tensor]:
    """The sharded tensors of a folder by key, without their content; the files have exactly these.

    Raises:
        UserError: They do not.
    """
    expected = {key_of(at): leaf for at, leaf in leaves(content) if is_stored(leaf)}
    ShardReader(path, expected).read_metadata()
    return expected


def fill(tensors: dict[str, Tensor], path: Path, group: ProcessGroup | None = None) -> dict[str, Tensor]:
    """Read tensors, which may be sharded over any ranks, by key; with a group all of its ranks call this.

    Args:
        tensors: Where to, in place: all that the folder has, or some.
        path: The folder.
        group: The ranks' connection; None reads in this process alone.

    Raises:
        UserError: A file cannot be read.
    """
    reader = ShardReader(path, None)
    with warnings.catch_warnings(), explained(path, None):
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)
    return tensors


class ShardWriter(HuggingFaceStorageWriter):
    """DCP's storage of safetensors, hashed as they are written; DCP's own would copy each rank's part twice in memory.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path=str(path), save_distributed=True)
        self._folder = path
        self.entries: dict[str, Entry] = {}
        """On the first rank, when all is written: the files of all ranks by name."""

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Number the files."""
        return [replace(plan, storage_data=f"shard-{rank:05d}.safetensors") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file, if it has anything to write."""
        results = []
        if plan.items:
            found = [(item, planner.resolve_data(item)) for item in plan.items]
            parts = [(item, tensor) for item, tensor in found if isinstance(tensor, Tensor)]
            entry = _write_shard(self._folder / plan.storage_data, parts)
            results = [WriteResult(item.index, 0, (plan.storage_data, entry)) for item in plan.items]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Take note of what the ranks have written."""
        self.entries = dict(result.storage_data for part in results for result in part)


class ShardReader(HuggingFaceStorageReader):
    """DCP's storage of safetensors, which believes no header.

    Args:
        path: The folder.
        expected: What has to be there, by key; None for what was checked before.
    """

    def __init__(self, path: Path, expected: Mapping[str, Tensor] | None) -> None:
        super().__init__(path=str(path))
        self._folder, self._expected = path, expected

    def read_metadata(self) -> Metadata:
        """Which part of which tensor is in which file.

        Raises:
            UserError: A header is damaged, a part is missing or there twice, or other tensors are there than expected.
        """
        try:
            metadata = super().read_metadata()
        except Exception as error:  # of safetensors, JSON, and of what a lying header leads to
            raise UserError(
                f"checkpoint {self._folder}: a shard's header is damaged ({type(error).__name__})"
            ) from error
        if self._expected is not None:
            self._check(metadata, self._expected)
        return metadata

    def _check(self, metadata: Metadata, expected: Mapping[str, Tensor]) -> None:
        found: dict[str, Any] = dict(metadata.state_dict_metadata)
        for key in sorted(found.keys() ^ expected.keys()):
            what = "is unknown to" if key in found else "is missing from the shards of"
            raise UserError(f"checkpoint {self._folder}: the tensor {key} {what} {STATE}")
        for key, wanted in expected.items():
            one = found[key]
            if one.properties.dtype != wanted.dtype or not tiles(wanted.shape, one.chunks):
                raise UserError(f"checkpoint {self._folder}: the parts of {key} do not make up {tuple(wanted.shape)}")


def tiles(size: Sequence[int], chunks: Sequence[ChunkStorageMetadata]) -> bool:
    """Whether parts make up a tensor, without gaps and overlaps, cut along one of its dimensions at most."""
    parts = [chunk for chunk in chunks if math.prod(chunk.sizes)]
    if not parts or any(len(part.sizes) != len(size) or len(part.offsets) != len(size) for part in chunks):
        return not math.prod(size) and not parts
    if not size:
        return len(parts) == 1
    cut = [axis for axis in range(len(size)) if any(part.sizes[axis] != size[axis] for part in parts)]
    if len(cut) > 1:
        return False
    axis = cut[0] if cut else 0
    end = 0
    for part in sorted(parts, key=lambda part: part.offsets[axis]):
        if any(offset for other, offset in enumerate(part.offsets) if other != axis) or part.offsets[axis] != end:
            return False
        end += part.sizes[axis]
    return end == size[axis]


def _divided(content: dict[str, Any]) -> tuple[dict[str, DTensor], dict[str, Any]]:
    """The sharded tensors of a checkpoint by key, and the rest, with tensors without content in their places."""
    shards: dict[str, DTensor] = {}

    def left(path: TreePath, leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        kinds = [type(placement) for placement in leaf.placements]
        if set(kinds) - {Shard, Replicate} or kinds.count(Shard) > 1:
            raise UserError(f"checkpoint: {key_of(path)} is spread over the ranks in a way that is not supported")
        if not leaf.ndim:
            return leaf.to_local()
        if key_of(path) in shards:
            raise UserError(f"checkpoint: two tensors are called {key_of(path)}")
        shards[key_of(path)] = leaf
        return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")

    return shards, mapped(content, left)


def _write_shard(path: Path, parts: Sequence[tuple[WriteItem, Tensor]]) -> Entry:
    """Write tensors as safetensors, each with its place in the whole as DCP notes it."""
    parts = sorted(parts, key=lambda part: (-part[1].element_size(), part[0].index.fqn))  # so all are aligned
    chunks = {item.index.fqn: item.tensor_data.chunk for item, _ in parts if item.tensor_data is not None}
    places = {key: {"saved_offsets": list(chunk.offsets)} for key, chunk in chunks.items()}
    header: dict[str, Any] = {
        "__metadata__": {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"}
    }
    end = 0
    for item, tensor in parts:
        start, end = end, end + tensor.numel() * tensor.element_size()
        kind = _TYPES[tensor.dtype]
        header[item.index.fqn] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with HashedFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in parts:
            if tensor.numel():
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return file.entry()
