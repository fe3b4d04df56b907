"""Checkpoints on the disk: whole or not there, refused where a byte is wrong, and never run."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import FORMS, content, files_of, holds, made, one_rank
from one_line import message
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import trainer.checkpoints.mark as marks
from data_shards.errors import UserError
from trainer.checkpoints import (
    Background,
    Buffers,
    is_complete,
    is_sharded,
    newest_good,
    outline,
    point_last,
    read,
    remove,
    stage,
    step_checkpoints,
    sweep,
    verify,
    write,
)


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_rank(tmp_path_factory.mktemp("ranks")):
        yield


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_read(form: str, tmp_path: Path) -> None:
    path = made(tmp_path, form)
    assert path.is_dir() == (form == "folder") == is_sharded(content(form))
    mark = verify(path)
    assert mark is not None and mark.step == 3 and set(mark.files) == {file.name for file in files_of(path)[:-1]}
    found = read(path)
    assert found["loops"] == {"epoch": [1, (2, None)]} and found["seed"] == 7 and holds(path, 3)
    assert found["state_dict"]["bias"].dtype == torch.bfloat16 and is_complete(path)
    assert {file.name for file in tmp_path.iterdir()} == {path.name} | (
        {path.name + ".json"} - {path.name} if form == "file" else set()
    )
    point_last(path)
    last = tmp_path / "last.ckpt"
    assert last.is_symlink() and last.readlink() == Path(path.name)
    assert holds(last, 3) and verify(last) == mark and outline(last)["global_step"] == 3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_damage_at_any_byte_is_refused(form: str, how: str, tmp_path: Path) -> None:
    path = made(tmp_path, form)
    rng = random.Random(0)
    for file in files_of(path):
        good = file.read_bytes()
        positions = {0, 1, len(good) - 2, len(good) - 1} | {rng.randrange(len(good)) for _ in range(30)}
        for position in positions:
            flipped = good[position] ^ (1 << rng.randrange(8))
            bad = good[:position] if how == "truncated" else good[:position] + bytes([flipped]) + good[position + 1 :]
            file.write_bytes(bad)
            assert file.name in message(lambda: verify(path)), position
            assert file.name in message(lambda: read(path)), position
            file.write_bytes(good)
        file.write_bytes(good + b"\n")
        assert file.name in message(lambda: verify(path))
        file.write_bytes(good)
        file.unlink()
        message(lambda: verify(path))
        assert not is_complete(path)
        file.write_bytes(good)
    assert holds(path, 3)


@pytest.mark.parametrize("form", FORMS)
def test_the_newest_good_one_is_taken(form: str, tmp_path: Path) -> None:
    assert newest_good(tmp_path, print) is None
    paths = [made(tmp_path, form, step) for step in (9, 100, 20)]
    assert [path.name for path in step_checkpoints(tmp_path)] == [f"step-{n:06d}.ckpt" for n in (9, 20, 100)]
    said: list[str] = []
    assert newest_good(tmp_path, said.append) == paths[1] and not said
    assert newest_good(tmp_path, said.append, before=99) == paths[2] and not said
    first = files_of(paths[1])[0]
    first.write_bytes(first.read_bytes()[:-1])
    files_of(paths[2])[-1].unlink()  # the mark
    assert newest_good(tmp_path, said.append) == paths[0]
    assert len(said) == 2 and all("\n" not in line and f"{paths[0]} is taken instead" in line for line in said)
    assert str(first) in said[0] and "truncated" in said[0]
    assert paths[2].name in said[1] and "no completion mark" in said[1]
    remove(paths[0])
    said.clear()
    assert newest_good(tmp_path, said.append) is None
    assert len(said) == 2 and said[0].endswith("there is no older one")


def test_a_file_of_an_older_trainer(tmp_path: Path) -> None:
    path = tmp_path / "step-000003.ckpt"
    torch.save(content("file"), path)
    assert holds(path, 3) and verify(path, unmarked=True) is None
    assert "no completion mark" in message(lambda: verify(path)) and newest_good(tmp_path, lambda line: None) is None
    good = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        start = next(item for item in archive.infolist() if item.filename.endswith("data/0")).header_offset
    start += 30 + sum(int.from_bytes(good[start + at : start + at + 2], "little") for at in (26, 28))  # its header
    for bad in (good[:-1], good[: len(good) // 2], good[:start] + bytes([good[start] ^ 4]) + good[start + 1 :], b""):
        path.write_bytes(bad)
        assert "damaged" in message(lambda: read(path))
        message(lambda: verify(path, unmarked=True))


def test_an_unmarked_folder_is_never_read(tmp_path: Path) -> None:
    path = made(tmp_path, "folder")
    (path / "complete.json").unlink()
    assert "complete.json: no completion mark" in message(lambda: read(path))
    assert "no completion mark" in message(lambda: verify(path, unmarked=True))


def test_another_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path, "file")
    monkeypatch.setattr(marks, "FORMAT", 2)
    assert "is of format 1, this trainer reads format 2" in message(lambda: verify(path))


class Killed(BaseException):
    """The process is gone."""


STEPS = [
    (os, "fsync"),
    (Path, "replace"),
    (Path, "rename"),
    (Path, "unlink"),
    (Path, "mkdir"),
    (marks.HashedFile, "__init__"),
]


def fail_at(step: int, error: type[BaseException], patch: pytest.MonkeyPatch) -> list[int]:
    """Let one step to the disk fail; what is returned counts them."""
    count = [0]

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            count[0] += 1
            if count[0] == step + 1:
                raise error(errno.ENOSPC, "No space left on device")
            return real(*arguments, **named)

        return counted

    patch.setattr(os, "fsync", lambda number: None)  # slow, and of no meaning here
    for owner, name in STEPS:
        patch.setattr(owner, name, wrapped(getattr(owner, name)))
    return count


@pytest.mark.parametrize("error", [Killed, OSError])
@pytest.mark.parametrize("before", [None, *FORMS])
@pytest.mark.parametrize("form", FORMS)
def test_a_kill_at_any_step_leaves_the_old_or_the_new(
    form: str, before: str | None, error: type[BaseException], tmp_path: Path
) -> None:
    reached = 0
    outcomes = []
    while True:
        folder = tmp_path / str(reached)
        folder.mkdir()
        if before:
            made(folder, before, 7)
            (folder / "step-000007.ckpt").rename(folder / "step-000008.ckpt")
            if before == "file":
                (folder / "step-000007.ckpt.json").rename(folder / "step-000008.ckpt.json")
        path = folder / "step-000008.ckpt"
        with pytest.MonkeyPatch.context() as patch:
            count = fail_at(reached, error, patch)
            try:
                write(content(form, 8), path)
            except Killed:
                assert error is Killed
            except UserError as told:
                assert error is Killed or "No space left on device" in str(told)
                assert "\n" not in str(told)
        if count[0] <= reached:
            break
        if before == form == "file":
            verify(path)  # at every moment, and before anything is mended
        sweep(folder)
        found = newest_good(folder, print)
        if before:
            assert found == path, reached
        outcomes.append(None if found is None else read(found)["global_step"])
        names = {file.name for file in folder.iterdir()}
        assert not {name for name in names if not name.endswith((".ckpt", ".ckpt.json"))}, names
        write(content(form, 9), path)
        assert holds(path, 9)
        shutil.rmtree(folder)
        reached += 1
    assert outcomes[-1] == 8 and outcomes[0] == (7 if before else None) and reached >= 8
    assert set(outcomes) == {8, 7 if before else None}


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    path = made(tmp_path, "file")
    large = {**content("file"), "state_dict": {"weight": torch.zeros(300_000)}}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        for form in FORMS:
            if form == "folder":
                large["state_dict"]["weight"] = distribute_tensor(
                    torch.zeros(300_000), init_device_mesh("cpu", (1,)), [Shard(0)]
                )
            said = message(lambda: write(large, path))
            assert str(path) in said and "File too large" in said and "1,200,008 bytes" in said and "are free" in said
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert holds(path, 3) and verify(path)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("form", FORMS)
def test_what_could_not_be_read_back_is_not_written(form: str, tmp_path: Path) -> None:
    def with_x(value: Any) -> dict[str, Any]:
        return {**content(form), "x": value}

    assert "neither tensor nor plain value" in message(lambda: write(with_x(UserError("no")), tmp_path / "a.ckpt"))
    assert "cannot be saved" in message(lambda: write(with_x(lambda: None), tmp_path / "a.ckpt"))
    assert not list(tmp_path.iterdir())


def test_removing_and_sweeping(tmp_path: Path) -> None:
    for form in FORMS:
        path = made(tmp_path, form)
        remove(path)
        assert not list(tmp_path.iterdir())
    kept = made(tmp_path, "folder", 5)
    for name in ("a.ckpt.partial", "b.ckpt.old"):
        (tmp_path / name).mkdir()
    for name in ("c.ckpt.partial", "d.ckpt.json", "e.ckpt.json.next", "last.ckpt.link"):
        (tmp_path / name).touch()
    older = tmp_path / "last.ckpt"
    torch.save({}, older)
    sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == [older, kept]
    point_last(kept)
    assert older.is_symlink() and holds(older, 5)
    write(content("file", 6), older)  # the link is replaced, not what it leads to
    assert not older.is_symlink() and holds(older, 6) and holds(kept, 5)


def test_a_copy_is_safe_from_later_steps(tmp_path: Path) -> None:
    live = content("file")
    live["tied"] = live["state_dict"]["weight"]
    live["flipped"] = torch.arange(6).reshape(2, 3).t()
    buffers = Buffers()
    staged = stage(live, buffers)
    live["state_dict"]["weight"].zero_()
    live["loops"]["epoch"].append(1)
    live["flipped"].zero_()
    write(staged, tmp_path / "a.ckpt")
    found = read(tmp_path / "a.ckpt")
    assert holds(tmp_path / "a.ckpt", 3) and found["loops"] == {"epoch": [1, (2, None)]}
    assert found["tied"].equal(found["state_dict"]["weight"])
    assert found["tied"].data_ptr() == found["state_dict"]["weight"].data_ptr()  # written once
    assert found["flipped"].equal(torch.arange(6).reshape(2, 3).t())
    again = stage(live, buffers)  # the same memory
    assert again["state_dict"]["weight"] is staged["state_dict"]["weight"] and not again["flipped"].any()
    assert stage(live)["flipped"].data_ptr() != again["flipped"].data_ptr()
    live["flipped"] = torch.ones(2, 2)
    assert stage(live, buffers)["flipped"].equal(torch.ones(2, 2))


def test_the_background_does_one_thing_after_the_other() -> None:
    background = Background()
    free, done = threading.Event(), []
    background.submit(lambda: (free.wait(5), done.append(1)))
    assert background.busy and not done
    background.check()  # does not wait
    threading.Timer(0.1, free.set).start()
    background.submit(lambda: done.append(2))
    assert done[:1] == [1]
    background.wait()
    assert done == [1, 2] and not background.busy
    background.wait()


@pytest.mark.parametrize("how", ["wait", "check", "submit", "stage"])
def test_what_goes_wrong_in_the_background_is_told(how: str) -> None:
    background = Background()

    def fail() -> None:
        raise UserError("disk is full")

    background.submit(fail)
    while background.busy:
        time.sleep(0.01)
    calls = {"submit": lambda: background.submit(lambda: done.append(1)), "stage": lambda: background.stage({})}
    done: list[int] = []
    assert message(calls.get(how) or getattr(background, how)) == "disk is full"
    background.wait()  # once
    assert not done
    background.submit(lambda: 1 / 0)
    assert "ZeroDivisionError" in message(background.wait)


def test_the_end_of_a_program_waits_for_a_write_but_not_for_ever(tmp_path: Path) -> None:
    code = """
import sys, threading, time, torch
from pathlib import Path
import trainer.checkpoints.background as module
from trainer.checkpoints import Background, write
module.EXIT_SECONDS = float(sys.argv[2])
background = Background()
def work():
    time.sleep(0.3)
    write({"global_step": 1}, Path(sys.argv[1]))
    threading.Event().wait()
background.submit(work)
"""
    runs = {}
    for seconds, there in ((3, True), (0.01, False)):
        command = [sys.executable, "-c", code, str(tmp_path / f"{there}.ckpt"), str(seconds)]
        runs[there] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for there, run in runs.items():
        said = run.communicate(timeout=60)[1]
        assert run.returncode == 0 and not said
        assert is_complete(tmp_path / f"{there}.ckpt") == there
