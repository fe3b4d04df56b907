"""Checkpoints that others made: no code in them runs, and nothing that they say of themselves is believed."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import files_of, holds, made, one_rank, seal
from one_line import message
from torch import nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from trainer.checkpoints import load_sharded, read, verify
from trainer.checkpoints.folder import tiles
from trainer.checkpoints.mark import Entry, Mark


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_rank(tmp_path_factory.mktemp("ranks")):
        yield


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.touched}",)


def evil_zip(path: Path, touched: Path) -> None:
    with path.open("wb") as file:
        torch.save({"state_dict": {"weight": torch.ones(1)}, "x": Evil(touched)}, file)


def evil_pickle(path: Path, touched: Path) -> None:
    path.write_bytes(pickle.dumps(Evil(touched)))


@pytest.mark.parametrize("make", [evil_zip, evil_pickle])
@pytest.mark.parametrize(
    "target", ["file", "unmarked", "state.pt", "shard-00000.safetensors", "complete.json", ".metadata"]
)
def test_code_is_never_run(
    make: Callable[[Path, Path], None], target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touched = tmp_path / "touched"
    path = made(tmp_path, "file" if target in ("file", "unmarked") else "folder")
    make(path if path.is_file() else path / target, touched)
    if target == "unmarked":
        files_of(path)[-1].unlink()
    elif target != "complete.json":
        seal(path) if target != ".metadata" else None
    said = message(lambda: read(path)) if target != ".metadata" else ""
    assert target == ".metadata" or path.name in said
    if target == ".metadata":
        assert holds(path, 3)  # what is not ours and hidden is not looked at
    if target not in ("file", "unmarked"):
        network = nn.Linear(3, 4)
        if target != ".metadata":
            message(lambda: load_sharded(path, network))
    assert not touched.exists()
    with (path if path.is_file() else path / target).open("rb") as file:
        torch.load(file, weights_only=False) if make is evil_zip else pickle.load(file)
    assert touched.exists(), "the test's own evil does nothing"


@pytest.mark.parametrize(
    "name", ["../state.pt", "/etc/passwd", "a/b", "..", "x\0", "evil.pkl", "shard-1.safetensors", ""]
)
def test_a_mark_names_no_other_files(name: str, tmp_path: Path) -> None:
    path = made(tmp_path, "folder")
    mark = Mark.read(path / "complete.json")
    Mark(3, {**mark.files, name: mark.files["state.pt"]}).write(path / "complete.json")
    assert "the checkpoint's mark names" in (said := message(lambda: read(path))) or "the mark names" in said
    one = made(tmp_path, "file", 4)
    beside = one.with_name(one.name + ".json")
    Mark(4, {**Mark.read(beside).files, "other.ckpt": Entry(1, "0" * 64)}).write(beside)
    assert "not that of one file" in message(lambda: verify(one))


@pytest.mark.parametrize("target", ["state.pt", "shard-00000.safetensors", "complete.json"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_only_plain_files_are_read(target: str, kind: str, tmp_path: Path) -> None:
    path = made(tmp_path, "folder")
    file = path / target
    outside = tmp_path / "outside"
    file.rename(outside)
    {"link": lambda: file.symlink_to(outside), "pipe": lambda: os.mkfifo(file), "folder": file.mkdir}[kind]()
    assert target in message(lambda: read(path))


def test_what_lies_beside_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path, "folder")
    for name in ("shard-00001.safetensors", "other.pt", ".x.safetensors"):
        (path / name).write_bytes(b"")
        assert f"{name}: no part of the checkpoint" in message(lambda: read(path))
        (path / name).unlink()
    (path / ".nfs01").touch()
    assert holds(path, 3)


def header(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    found: dict[str, Any] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return found


def forge(path: Path, change: Callable[[dict[str, Any]], None], places: Callable[[dict[str, Any]], None]) -> None:
    """Change a shard's header, and what DCP notes in there."""
    shard = path / "shard-00000.safetensors"
    raw = shard.read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    told = header(shard)
    inner = json.loads(told["__metadata__"]["DCP_SHARDING_INFO"])
    places(inner)
    told["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(inner)
    change(told)
    text = json.dumps(told).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data)
    seal(path)


WEIGHT, BIAS = "state_dict/weight", "state_dict/bias"
LIES: dict[str, tuple[Callable[[dict[str, Any]], Any], Callable[[dict[str, Any]], Any]]] = {
    "beyond the end": (lambda told: told[BIAS].update(data_offsets=[48, 2**40]), lambda inner: None),
    "over another": (lambda told: told[BIAS].update(data_offsets=[0, 8]), lambda inner: None),
    "huge": (lambda told: told[WEIGHT].update(shape=[2**40, 2**20]), lambda inner: None),
    "other shape": (lambda told: told[WEIGHT].update(shape=[3, 4]), lambda inner: None),
    "other type": (lambda told: told[WEIGHT].update(dtype="I32"), lambda inner: None),
    "unknown type": (lambda told: told[WEIGHT].update(dtype="X9"), lambda inner: None),
    "no note": (lambda told: told.pop("__metadata__"), lambda inner: None),
    "elsewhere": (lambda told: None, lambda inner: inner[WEIGHT].update(saved_offsets=[2**50, 0])),
    "below zero": (lambda told: None, lambda inner: inner[WEIGHT].update(saved_offsets=[-4, 0])),
    "no offsets": (lambda told: None, lambda inner: inner.pop(WEIGHT)),
    "text offsets": (lambda told: None, lambda inner: inner[WEIGHT].update(saved_offsets=["0", "0"])),
    "one offset": (lambda told: None, lambda inner: inner[WEIGHT].update(saved_offsets=[0])),
    "other name": (lambda told: told.update(other=told.pop(WEIGHT)), lambda inner: inner.update(other=inner[WEIGHT])),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused(lie: str, tmp_path: Path) -> None:
    path = made(tmp_path, "folder")
    forge(path, lambda told: None, lambda inner: None)
    assert holds(path, 3)  # the forgery itself is right
    forge(path, *LIES[lie])
    if lie == "no note":  # the whole tensor, then: what it says is true
        assert holds(path, 3)
        return
    assert str(path) in message(lambda: read(path))


def test_a_header_of_any_length_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path, "folder")
    shard = path / "shard-00000.safetensors"
    for raw in (b"", b"\0" * 7, (2**63).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]", b"\xff" * 64):
        shard.write_bytes(raw)
        seal(path)
        assert "header is damaged" in message(lambda: read(path))


@pytest.mark.parametrize("lie", ["larger", "more", "fewer", "no checkpoint"])
def test_a_state_that_does_not_fit_the_shards_is_refused(lie: str, tmp_path: Path) -> None:
    path = made(tmp_path, "folder")
    state = torch.load(path / "state.pt")
    weights = state["state_dict"]
    assert weights["weight"].is_meta
    if lie == "larger":
        weights["weight"] = torch.empty(2**40, 2**10, device="meta")
    elif lie == "more":
        weights["more"] = torch.empty(2**40, device="meta")
    elif lie == "fewer":
        del weights["bias"]
    torch.save(state if lie != "no checkpoint" else [1], path / "state.pt")
    seal(path)
    assert str(path) in message(lambda: read(path))


def test_a_packed_file_is_refused(tmp_path: Path) -> None:
    path, packed = made(tmp_path, "file"), tmp_path / "packed.ckpt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.namelist():
            new.writestr(item, old.read(item))
    assert "compressed" in message(lambda: read(packed))


def test_parts_make_up_a_tensor() -> None:
    def chunks(*parts: tuple[tuple[int, ...], tuple[int, ...]]) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in parts]

    whole = ((0, 0), (3, 2))
    assert tiles((3, 2), chunks(whole)) and tiles((3, 2), chunks(((2, 0), (1, 2)), ((0, 0), (2, 2))))
    assert tiles((3, 2), chunks(((0, 1), (3, 1)), ((0, 0), (3, 1)), ((0, 2), (3, 0))))
    assert tiles((), chunks(((), ()))) and tiles((0, 2), chunks(((0, 0), (0, 2))))
    for wrong in (
        chunks(whole, whole),
        chunks(((0, 0), (2, 2))),
        chunks(((0, 0), (2, 2)), ((1, 0), (2, 2))),
        chunks(((0, 0), (1, 2)), ((2, 0), (1, 2))),
        chunks(((0, 0), (3, 1)), ((0, 1), (2, 1)), ((2, 1), (1, 1))),
        chunks(((0, 0, 0), (3, 2, 1))),
        chunks(((0, 1), (3, 2))),
        [],
    ):
        assert not tiles((3, 2), wrong)
