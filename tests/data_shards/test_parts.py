"""A corpus is the same to the byte, whoever builds which part of it, and however often the build was stopped."""

from __future__ import annotations

import functools
import gc
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from toy import make_case, make_inputs, save_nifti, write_spec

import data_shards.plan
from data_shards.build import build, build_part, prepare
from data_shards.errors import UserError
from data_shards.index import INDEX_NAME
from data_shards.merge import merge
from data_shards.scan import write_index
from data_shards.stage import locked, work_folder
from data_shards.verify import verify

MANY = 40


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def marks(folder: Path, pattern: str = "*.tar") -> dict[str, tuple[int, int]]:
    """Inode and time of files: what was left alone keeps both."""
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(folder.rglob(pattern))}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty cases and a spec that makes some thirty blocks of them; not to be changed."""
    return make_inputs(tmp_path_factory.mktemp("many") / "in", cases=MANY, shards={"max_samples": 2})


@pytest.fixture(scope="module")
def whole(inputs: Path) -> Path:
    """The corpus of `inputs`, built at once."""
    out = inputs.parents[1] / "whole"
    build(inputs, out)
    return out


@pytest.fixture(scope="module")
def three(inputs: Path) -> Path:
    """The same in three parts, to be copied."""
    out = inputs.parents[1] / "three"
    for number in (2, 3, 1):
        build_part(inputs, out, number, 3)
    return out


@pytest.fixture
def parts(three: Path, tmp_path: Path) -> Path:
    """A copy of `three`."""
    return shutil.copytree(three, tmp_path / "out")


def finished(work: Path) -> list[Path]:
    return sorted((work / "blocks").glob("[!.]*/block.json"))


def start(inputs: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "data_shards.cli", "build", str(inputs), "--out", str(out), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stop_after(process: subprocess.Popen[str], work: Path, blocks: int, number: int, seconds: float = 0) -> None:
    """Send a signal a moment after so many blocks are finished."""
    limit = time.monotonic() + 60
    while len(finished(work)) < blocks:
        assert process.poll() is None and time.monotonic() < limit, process.communicate()
        time.sleep(0.001)
    time.sleep(seconds)
    process.send_signal(number)
    process.wait(30)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)


@pytest.mark.parametrize(
    ("number", "times", "workers"), [(signal.SIGKILL, 5, "1"), (signal.SIGKILL, 3, "2"), (signal.SIGTERM, 3, "2")]
)
def test_a_build_killed_again_and_again_is_the_same_corpus(
    tmp_path: Path, inputs: Path, whole: Path, number: int, times: int, workers: str
) -> None:
    out, chance, before = tmp_path / "out", random.Random(number), dict[str, tuple[int, int]]()
    work = work_folder(out)
    for _ in range(times):
        process = start(inputs, out, "--workers", workers)
        stop_after(process, work, len(before) + chance.randint(1, 3), number, chance.random() / 100)
        if number == signal.SIGTERM:
            assert f"{len(finished(work))} of {len(blocks_of(inputs))} blocks are finished" in process.communicate()[1]
            assert not list((work / "blocks").glob(".*"))
        assert not out.exists()
        now = marks(work, "block.json")
        assert len(now) > len(before) and before.items() <= now.items()  # none was built twice
        before = now
    process = start(inputs, out, "--workers", workers)
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and errors == ""
    resumed = re.search(rf"^resumed: (\d+) of {len(blocks_of(inputs))} blocks were there$", shown, re.MULTILINE)
    late = int(workers) if number == signal.SIGKILL and workers != "1" else 0  # orphans may end the block at hand
    assert resumed and len(before) <= int(resumed[1]) <= len(before) + late
    assert files(out) == files(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


STEPS = ("os.fsync", "pathlib.Path.rename", "pathlib.Path.hardlink_to", "shutil.rmtree")


def crash(action: Callable[[], object], step: int) -> bool:
    """Do something in another process that is killed at its n-th step on the disk; return whether it came so far."""
    process = os.fork()
    if not process:
        count = 0

        def counted(call: Callable[..., Any], *values: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*values, **options)

        for name in STEPS:
            owner, _, attribute = name.rpartition(".")
            place = pathlib.Path if owner == "pathlib.Path" else sys.modules[owner]
            call = getattr(place, attribute)
            setattr(place, attribute, functools.partialmethod(_swapped, call, counted) if place is pathlib.Path
                    else functools.partial(counted, call))  # fmt: skip
        try:
            action()
        finally:
            os._exit(0)
    status = os.waitpid(process, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


def _swapped(self: Path, call: Callable[..., Any], counted: Callable[..., Any], *values: Any, **options: Any) -> Any:
    return counted(call, self, *values, **options)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_crash_at_any_step_leaves_the_old_or_the_new_corpus(tmp_path: Path, replaced: bool) -> None:
    spec, out = make_inputs(tmp_path / "in", cases=2), tmp_path / "out"
    build(spec, tmp_path / "new")
    new, old, gone = files(tmp_path / "new"), dict[str, bytes](), 0
    if replaced:
        build(write_spec(tmp_path / "in" / "old.yaml", slices={"step": 2}), tmp_path / "old")
        old = files(tmp_path / "old")
    for step in range(1, 500):
        shutil.rmtree(out, ignore_errors=True)
        if replaced:
            shutil.copytree(tmp_path / "old", out)
        crashed = crash(lambda: build(spec, out, overwrite=True), step)
        found = files(out) if out.exists() else {}
        assert found in (old, new, {})
        gone += found == {}
        build(spec, out, overwrite=True)
        assert files(out) == new
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"in", "new", "out", *(["old"] * replaced)})
        if not crashed:
            break
    assert 25 < step < 499 and found == new
    if replaced:
        assert gone == 1  # between two renames; the next build mends it


def test_a_crash_at_any_step_of_a_merge_loses_nothing(tmp_path: Path) -> None:
    spec, out = make_inputs(tmp_path / "in", cases=2), tmp_path / "out"
    build(spec, tmp_path / "new")
    new = files(tmp_path / "new")
    for step in range(1, 500):
        shutil.rmtree(out, ignore_errors=True)
        for number in (1, 2):
            build_part(spec, out, number, 2)
        crashed = crash(lambda: merge([out]), step)
        merge([out])
        assert {name: data for name, data in files(out).items() if not name.startswith("parts/")} == new
        if not crashed:
            break
    assert 12 < step < 499


def blocks_of(spec: Path) -> list[str]:
    return [block.name for block in prepare(spec).plan.blocks]


def test_the_corpus_is_sound_and_its_shards_are_numbered_without_a_gap(inputs: Path, whole: Path) -> None:
    assert verify(whole).problems == [] and len(blocks_of(inputs)) > 20
    for split in ("train", "test"):
        names = sorted(path.name for path in (whole / split).glob("*.tar"))
        assert names == [f"shard-{number:06d}.tar" for number in range(len(names))] and len(names) > 30


def test_the_joint_index_is_that_of_the_shards(whole: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        shutil.copytree(whole / split, tmp_path / split, ignore=shutil.ignore_patterns(INDEX_NAME))
        write_index(tmp_path / split)
        assert (tmp_path / split / INDEX_NAME).read_bytes() == (whole / split / INDEX_NAME).read_bytes()


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_build_the_same_corpus(inputs: Path, whole: Path, tmp_path: Path, workers: int) -> None:
    result = build(inputs, tmp_path / "out", workers=workers)
    assert files(tmp_path / "out") == files(whole)
    assert (result.effort.workers, result.effort.slices) == (workers, MANY * 6)


def test_merged_parts_are_the_same_corpus(parts: Path, whole: Path) -> None:
    blocks = [len(finished(part)) for part in sorted((parts / "parts").iterdir())]
    assert max(blocks) - min(blocks) <= 1
    out, _, reused = merge([parts])
    assert out == parts and not reused and files(parts) == files(whole)
    assert [path.name for path in parts.parent.iterdir()] == ["out"]
    assert merge([parts])[2]


def test_parts_from_different_places_merge_in_any_order(three: Path, tmp_path: Path, whole: Path) -> None:
    places = []
    for number in (3, 1, 2):
        places.append(tmp_path / f"node{number}" / "parts" / f"{number}-of-3")
        shutil.copytree(three / "parts" / f"{number}-of-3", places[-1])
    with pytest.raises(UserError, match="say with --out where"):
        merge(places)
    merge([places[0], *(place.parents[1] for place in places[1:])], tmp_path / "out")
    assert files(tmp_path / "out") == files(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_parts_may_be_kept(parts: Path, whole: Path) -> None:
    before = files(parts / "parts")
    merge([parts], keep_parts=True)
    assert {name: data for name, data in files(parts).items() if not name.startswith("parts/")} == files(whole)
    assert files(parts / "parts") == before
    assert merge([parts], parts.with_name("other"), keep_parts=True)[0] == parts.with_name("other")
    assert files(parts.with_name("other")) == files(whole) and files(parts / "parts") == before


def test_shards_are_copied_where_files_have_one_name_only(
    parts: Path, inputs: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    before = files(parts / "parts")
    merge([parts], parts.with_name("other"), keep_parts=True)
    assert files(parts.with_name("other")) == files(whole) and files(parts / "parts") == before
    build(inputs, parts.with_name("moved"))
    assert files(parts.with_name("moved")) == files(whole)


def test_more_parts_than_blocks(tmp_path: Path) -> None:
    spec, out = make_inputs(tmp_path / "in", cases=2, split={"kind": "external"}), tmp_path / "out"
    for number in (1, 2, 3):
        result = build_part(spec, out, number, 3)
        assert (result.effort.blocks, result.effort.slices) == ((1, 12) if number == 1 else (0, 0))
    merge([out])
    build(spec, tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")


def test_a_killed_part_goes_on_from_its_blocks(inputs: Path, tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "out"
    part = out / "parts" / "2-of-2"
    stop_after(start(inputs, out, "--part", "2/2"), part, 3, signal.SIGKILL)
    build_part(inputs, out, 1, 2)
    with pytest.raises(UserError) as caught:
        merge([out])
    assert str(caught.value) == f"{part}: part 2/2 is not finished: run `data-shards build` with --part 2/2"
    before = marks(part, "block.json")
    assert build_part(inputs, out, 2, 2).effort.resumed == len(before) >= 3
    assert before.items() <= marks(part, "block.json").items()
    state = marks(part, "*.*")
    assert build_part(inputs, out, 2, 2).reused and marks(part, "*.*") == state
    merge([out])
    assert files(out) == files(whole)


def test_a_part_is_built_by_one_process_and_not_merged_meanwhile(parts: Path, inputs: Path) -> None:
    part = parts / "parts" / "2-of-3"
    with locked(part, ""):
        for action in (lambda: build_part(inputs, parts, 2, 3), lambda: merge([parts])):
            with pytest.raises(UserError, match="2-of-3: part 2/3 is being built by another process: wait for it"):
                action()
        assert build_part(inputs, parts, 1, 3).reused
    with locked(work_folder(parts), ""), pytest.raises(UserError, match="out: another build of it is running"):
        merge([parts])


def change_spec(spec: Path) -> None:
    content = yaml.safe_load(spec.read_text())
    write_spec(spec, **{**content, "slices": {"step": 2}, "targets": content["targets"][:1]})


def change_notes(spec: Path) -> None:
    write_spec(spec, **{**yaml.safe_load(spec.read_text()), "notes": "other"})


def change_salt(spec: Path) -> None:
    write_spec(spec, **{**yaml.safe_load(spec.read_text()), "salt": "other"})


def change_cases(spec: Path) -> None:
    image, labels = make_case(4)
    save_nifti(spec.parent / "imgs" / "PAT9_scan.nii.gz", image)
    save_nifti(spec.parent / "gts" / "PAT9_scan_seg.nii.gz", labels)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (change_spec, "'slices' in the spec, 'targets' in the spec"),
        (change_notes, "'notes' in about"),
        (change_salt, "the salt"),
        (change_cases, "the cases, or the sizes of their files"),
    ],
)
def test_parts_of_different_plans_do_not_merge(tmp_path: Path, change: Any, difference: str) -> None:
    spec, out = make_inputs(tmp_path / "in", cases=6, shards={"max_samples": 1}), tmp_path / "out"
    build_part(spec, out, 1, 2)
    change(spec)
    build_part(spec, out, 2, 2)
    before = files(out)
    with pytest.raises(UserError) as caught:
        merge([out])
    assert str(caught.value).startswith(
        f"{out}/parts/2-of-2: part 2/2 was built from something else than part 1/2; what differs: {difference}: build"
    )
    assert files(out) == before
    build_part(spec, out, 1, 2)
    merge([out])
    build(spec, tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")


def test_parts_that_are_not_all_and_whole(parts: Path, three: Path, inputs: Path) -> None:
    before = files(parts)
    for action, message in [
        (lambda: shutil.rmtree(parts / "parts/2-of-3"), "out: part 2/3 is missing: run `data-shards build` with"),
        (lambda: build_part(inputs, parts, 2, 4), "out: parts of 3 and of 4 are mixed: remove those"),
    ]:  # fmt: skip
        action()
        with pytest.raises(UserError, match=message):
            merge([parts])
    shutil.rmtree(parts / "parts")
    with pytest.raises(UserError, match="out: no parts here: run `data-shards build"):
        merge([parts])
    shutil.copytree(three, parts, dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"part 1/3 is there twice: in .* and .*: give one"):
        merge([parts, parts / "parts" / "1-of-3"], parts.with_name("other"))
    assert files(parts) == before


@pytest.mark.parametrize("damage", ["flipped", "short", "gone", "index", "block"])
def test_a_damaged_part_is_named(parts: Path, damage: str, inputs: Path, whole: Path) -> None:
    part = parts / "parts" / "3-of-3"
    shard = sorted(part.rglob("*.tar"))[-1]
    data = bytearray(shard.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    elif damage == "short":
        shard.write_bytes(data[:-512])
    elif damage == "gone":
        shard.unlink()
    elif damage == "index":
        shard.with_name(INDEX_NAME).write_bytes(b"x")
    else:
        shutil.rmtree(shard.parents[1])
    before = files(parts)
    with pytest.raises(UserError, match=f"{part}.*(build this part again|--part 3/3)"):
        merge([parts])
    assert files(parts) == before and [path.name for path in parts.parent.iterdir()] == ["out"]
    if damage == "flipped":
        shutil.rmtree(shard.parents[1])
    build_part(inputs, parts, 3, 3)
    merge([parts])
    assert files(parts) == files(whole)


def test_a_corpus_is_not_replaced_by_accident(parts: Path, inputs: Path, whole: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    build(make_inputs(tmp_path / "in"), other)
    before = files(other)
    with pytest.raises(UserError, match=r"other: holds another corpus; what differs: .*: pass --overwrite"):
        merge([parts], other)
    assert files(other) == before and len(list((parts / "parts").iterdir())) == 3
    merge([parts], other, overwrite=True, keep_parts=True)
    assert files(other) == files(whole)
    state = marks(other, "*.*")
    assert merge([parts], other)[2] and marks(other, "*.*") == state and not parts.exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    for action in (lambda: merge([other], tmp_path / "thesis"), lambda: build_part(inputs, tmp_path / "thesis", 1, 2)):
        with pytest.raises(UserError, match=r"thesis: exists and is no corpus|other: no parts here"):
            action()


def test_parts_beside_an_old_corpus_replace_it(tmp_path: Path, inputs: Path, whole: Path) -> None:
    out = tmp_path / "out"
    build(make_inputs(tmp_path / "in"), out)
    old = files(out)
    with pytest.raises(UserError, match=r"out: holds another corpus; what differs: .*: pass --overwrite"):
        build_part(inputs, out, 1, 2)
    for number in (1, 2):
        build_part(inputs, out, number, 2, overwrite=True)
    assert {name: data for name, data in files(out).items() if not name.startswith("parts/")} == old
    assert verify(out).problems == []
    with pytest.raises(UserError, match="pass --overwrite"):
        merge([out])
    merge([out], overwrite=True)
    assert files(out) == files(whole)
    state = marks(out, "*.*")
    assert build_part(inputs, out, 1, 2).reused and marks(out, "*.*") == state


# The plan


def names_of(tmp_path: Path, **changes: object) -> list[str]:
    return blocks_of(write_spec(tmp_path / "in" / "plan.yaml", **changes))


def test_the_plan_does_not_depend_on_the_order_of_the_cases(tmp_path: Path) -> None:
    make_inputs(tmp_path / "in", cases=12)
    cases = [
        {"image": f"imgs/PAT{n}_scan.nii.gz", "mask": f"gts/PAT{n}_scan_seg.nii.gz", "patient": f"{n}"}
        for n in range(12)
    ]
    plans = []
    for seed in range(3):
        random.Random(seed).shuffle(cases)
        plans.append(prepare(write_spec(tmp_path / "in" / "s.yaml", cases=cases, shards={"max_samples": 3})).plan)
    assert plans[0].record == plans[1].record == plans[2].record
    for plan in plans[:1]:
        owners = [case.volume for block in plan.blocks for case in block.cases]
        assert len(owners) == len(set(owners)) == 12
        kinds = [block.cases[0].rule.splits for block in plan.blocks]
        assert kinds == sorted(kinds)
        for block in plan.blocks:
            volumes = [case.volume for case in block.cases]
            assert volumes == sorted(volumes) and 1 <= len(volumes) <= 3


def test_blocks_have_a_limit_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_inputs(tmp_path / "in", cases=40, split={"kind": "external"})
    assert len(prepare(spec).plan.blocks) == 1
    size = prepare(spec).plan.blocks[0].size
    monkeypatch.setattr(data_shards.plan, "BLOCK_BYTES", size // 8)
    blocks = prepare(spec).plan.blocks
    assert 8 <= len(blocks) <= 16 and max(block.size for block in blocks) <= size // 4
    assert sum(block.size for block in blocks) == size
    monkeypatch.setattr(data_shards.plan, "BLOCK_BYTES", 1)
    assert [len(block.cases) for block in prepare(spec).plan.blocks] == [1] * 40


def test_leaving_out_a_case_changes_its_own_block_only(tmp_path: Path) -> None:
    changes = {"split": {"kind": "external"}, "shards": {"max_samples": 4}}
    make_inputs(tmp_path / "in", cases=41)
    before = names_of(tmp_path, **changes)
    (tmp_path / "in" / "imgs" / "PAT17_scan.nii.gz").unlink()
    after = names_of(tmp_path, **changes)
    assert len(before) > 10 and len(set(before) - set(after)) == 1 and len(set(after) - set(before)) <= 1


def stopped(spec: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Build all blocks, and stop before they are joined."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("data_shards.build.join", interrupt)
        build(spec, out, **options)


def test_only_blocks_of_changed_files_are_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, out = make_inputs(tmp_path / "in", cases=6, shards={"max_samples": 1}), tmp_path / "out"
    stopped(spec, out, monkeypatch)
    before = set(marks(work_folder(out)).values())
    mask = tmp_path / "in" / "gts" / "PAT3_scan_seg.nii.gz"
    labels = make_case(3)[1]
    labels[2] = 0
    save_nifti(mask, labels)
    os.utime(tmp_path / "in" / "imgs" / "PAT5_scan.nii.gz")  # touched: read again, and found the same
    result = build(spec, out)
    assert (result.effort.resumed, result.effort.blocks) == (5, 6)
    after = set(marks(out).values())
    assert len(before) == 36 and len(after) == 35 and len(before & after) == 30
    build(spec, tmp_path / "fresh")
    assert files(out) == files(tmp_path / "fresh")


def test_other_files_of_the_same_size_and_time_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        for number in range(2):
            image, labels = make_case(number)
            (tmp_path / name).mkdir(exist_ok=True)
            np.savez(tmp_path / name / f"{number}.npz", imgs=image + (name == "b"), gts=labels)
            os.utime(tmp_path / name / f"{number}.npz", (1e9, 1e9))
    specs = {
        name: write_spec(
            tmp_path / f"{name}.yaml",
            cases=[
                {"id": str(n), "image": f"{name}/{n}.npz", "mask": f"{name}/{n}.npz", "patient": "p"} for n in range(2)
            ],
            split={"kind": "external"},
            intensity=None,
        )
        for name in ("a", "b", "c")
    }
    assert blocks_of(specs["a"]) == blocks_of(specs["b"])
    stopped(specs["a"], tmp_path / "out", monkeypatch)
    assert build(specs["b"], tmp_path / "out").effort.resumed == 0
    build(specs["b"], tmp_path / "fresh")
    assert files(tmp_path / "out") == files(tmp_path / "fresh")
    stopped(specs["a"], tmp_path / "other", monkeypatch)
    assert build(specs["c"], tmp_path / "other").effort.resumed == 1  # the same files in another place are the same


def test_a_damaged_block_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: Path) -> None:
    out = tmp_path / "out"
    stopped(inputs, out, monkeypatch)
    records = finished(work_folder(out))
    next(records[0].parent.rglob("*.tar")).unlink()
    next(records[1].parent.rglob(INDEX_NAME)).write_bytes(b"")
    records[2].write_text("{")
    records[3].write_text(json.dumps({"name": records[3].parent.name}))
    (records[0].parents[1] / ".left.0123.partial").mkdir()
    assert build(inputs, out).effort.resumed == len(records) - 4
    assert verify(out).problems == []


def test_work_folders_say_nothing_of_who_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, out = make_inputs(tmp_path / "in", salt="private"), tmp_path / "out"
    stopped(spec, out, monkeypatch)
    build_part(spec, tmp_path / "parts", 1, 1)
    for folder in (work_folder(out), tmp_path / "parts"):
        content = files(folder)
        assert len(content) >= 6
        for name, data in content.items():
            assert b"PAT" not in data and str(tmp_path).encode() not in data and b"private" not in data, name


def test_memory_does_not_grow_with_the_cases(tmp_path: Path) -> None:
    peaks = []
    for count in (2, 2, 24):  # the first warms up
        rng = np.random.default_rng(0)
        for number in range(count):
            image = rng.integers(0, 255, (8, 128, 128)).astype(np.uint8)
            np.savez(tmp_path / f"{count}-{number}.npz", imgs=image, gts=(image > 100).astype(np.uint8))
        spec = write_spec(
            tmp_path / f"{count}.yaml",
            cases=[{"image": f"{count}-{{id}}.npz", "mask": f"{count}-{{id}}.npz", "patient": "{id}"}],
            targets=[{"term": "liver", "value": 1}],
            intensity=None,
            split={"kind": "external"},
        )
        gc.collect()
        tracemalloc.start()
        result = build(spec, tmp_path / f"out{len(peaks)}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert result.manifest["splits"]["external"]["bytes"] > count * 8 * 128 * 128
    # All images of the 22 cases more would be 2.9 MB.
    assert peaks[2] - peaks[1] < 0.6e6, peaks


def test_a_corpus_cannot_take_the_place_of_a_mounted_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_inputs(tmp_path / "in", cases=2)
    build_part(spec, tmp_path / "out", 1, 1)
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name in ("out", "disk"))
    for begin in (lambda: build(spec, tmp_path / "disk"), lambda: merge([tmp_path / "out"])):
        with pytest.raises(UserError, match="is where a disk is mounted, which cannot be renamed"):
            begin()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
