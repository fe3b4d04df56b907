from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from test_triplet import make, values
from toy import make_inputs

from data_shards.build import build
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from data_shards.index import INDEX_NAME, Index
from data_shards.scan import write_index
from data_shards.writer import ShardWriter, shard_name


def write(folder: Path, count: int, max_samples: int = 10, max_bytes: int = 2**20, seed: int = 0) -> dict[str, dict]:
    samples = {f"toy-{n:03d}": make(values("uint8") ^ np.uint8(n + seed), masks=n % 3).encode() for n in range(count)}
    with ShardWriter(folder, max_samples, max_bytes) as writer:
        for key, members in samples.items():
            writer.write(key, members)
    return samples


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_shards_are_cut_by_samples(tmp_path: Path) -> None:
    samples = write(tmp_path, 7, max_samples=3)
    assert sorted(files(tmp_path)) == [shard_name(n) for n in range(3)]
    index = write_index(tmp_path)
    assert index.keys.tolist() == list(samples) and index.shard.tolist() == [0, 0, 0, 1, 1, 1, 2]


def test_shards_are_cut_by_bytes_and_a_large_sample_has_its_own(tmp_path: Path) -> None:
    big = {"json": b"{}", "image.npy": b"x" * 5000}
    with ShardWriter(tmp_path, 100, 4096) as writer:
        for key, members in [("a", {"json": b"1"}), ("b", {"json": b"2"}), ("c", big), ("d", {"json": b"3"})]:
            writer.write(key, members)
    found = []
    for path in sorted(tmp_path.glob("*.tar")):
        with tarfile.open(path) as tar:
            found.append(tar.getnames())
    assert found == [["a.json", "b.json"], ["c.image.npy", "c.json"], ["d.json"]]


def test_nothing_but_names_and_bytes_enters_a_tar(tmp_path: Path) -> None:
    samples = write(tmp_path, 2)
    with tarfile.open(tmp_path / shard_name(0)) as tar:
        items = tar.getmembers()
        contents = {item.name: tar.extractfile(item).read() for item in items}  # type: ignore[union-attr]
    assert contents == {f"{key}.{name}": data for key, members in samples.items() for name, data in members.items()}
    assert {(item.mtime, item.uid, item.gid, item.uname, item.gname, item.mode) for item in items} == {
        (0, 0, 0, "", "", 0o644)
    }


def test_an_error_leaves_no_complete_shard(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, 10, 2**20) as writer:
        writer.write("a", {"json": b"1"})
        raise RuntimeError
    assert not list(tmp_path.glob("*.tar"))


def test_index_offsets_are_those_of_tarfile(built: Path) -> None:
    index = Index.load(built / "train")
    seen = 0
    for number, name in enumerate(index.shard_names):
        path = built / "train" / str(name)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == index.shard_sha256[number]
        assert path.stat().st_size == index.shard_sizes[number]
        with tarfile.open(path) as tar:
            for item in tar:
                key, _, extension = item.name.partition(".")
                position = index.keys.tolist().index(key)
                assert index.shard[position] == number
                assert index.members(position)[extension] == (item.offset_data, item.size)
                assert len(index.members(position)) == 2
                seen += 1
    assert seen == 2 * len(index)


def test_index_lists_targets_and_owners(built: Path) -> None:
    dataset = ShardDataset(built / "train")
    for number, triplet in enumerate(dataset):
        assert dataset.index.targets(number) == [(item.term, item.area, item.kind) for item in triplet.targets]
        assert dataset.index.patients[dataset.index.patient[number]] == triplet.provenance.patient
    assert any(dataset.index.targets(n) for n in range(len(dataset)))
    assert not all(dataset.index.targets(n) for n in range(len(dataset)))


def test_webdataset_reads_the_same_samples(built: Path) -> None:
    dataset = ShardDataset(built / "train")
    urls = [str(path) for path in sorted((built / "train").glob("*.tar"))]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("l8"))
    assert len(read) == len(dataset) == 20
    for item, triplet in zip(read, dataset, strict=True):
        assert item["__key__"] == triplet.key
        np.testing.assert_array_equal(np.asarray(item["image.png"]), triplet.image)
        assert item["json"] == json.loads(triplet.encode()["json"])


def test_tars_that_webdataset_wrote_can_be_indexed(tmp_path: Path) -> None:
    samples = {f"deep/toy-{n}": make(values("float32"), masks=1) for n in range(4)}
    with webdataset.TarWriter(str(tmp_path / "foreign.tar")) as tar:
        for key, triplet in samples.items():
            tar.write({"__key__": key, **triplet.encode()})
    write_index(tmp_path)
    dataset = ShardDataset(tmp_path)
    assert [triplet.key for triplet in dataset] == list(samples)
    np.testing.assert_array_equal(dataset[2].image, values("float32"))


def test_two_builds_in_two_folders_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        build(make_inputs(tmp_path / name / "in", slices={"keep": "all"}), tmp_path / name / "a" / "toy")
    one, two = (files(tmp_path / name / "a" / "toy") for name in ("one", "two"))
    assert one == two and len(one) == 5


def test_identity_changes_with_any_sample(tmp_path: Path) -> None:
    hashes = set()
    for name, count, seed in [("a", 5, 0), ("b", 5, 0), ("c", 5, 1), ("d", 4, 0)]:
        write(tmp_path / name, count, seed=seed)
        hashes.add(write_index(tmp_path / name).sha256)
    assert len(hashes) == 3
    assert Index.load(tmp_path / "a").sha256 == hashlib.sha256((tmp_path / "a" / INDEX_NAME).read_bytes()).hexdigest()


def test_index_of_a_damaged_or_foreign_tar(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.tar file here"):
        write_index(tmp_path)
    path = tmp_path / shard_name(0)
    good = make(values("uint8")).encode()
    for members, message in [
        ({"json": good["json"]}, "sample 'k' needs a json member and one image .*, got json$"),
        ({**good, "image.npy": b""}, "needs a json member and one image"),
        ({**good, "json": b"[]"}, "sample 'k' is not a triplet"),
        ({**good, "json": b"{"}, "sample 'k' is not a triplet"),
        ({"json": good["json"], "image.jpg": b"x"}, "got image.jpg, json"),
    ]:
        with ShardWriter(tmp_path, 10, 2**20) as writer:
            writer.write("k", members)
        with pytest.raises(UserError, match=message) as caught:
            write_index(tmp_path)
        assert str(path) in str(caught.value)
    write(tmp_path, 3)
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    whole_blocks = [data[:cut] for cut in range(0, end, 128)]
    for content in (*whole_blocks, data[:end], b"no tar at all" * 100):
        path.write_bytes(content)
        with pytest.raises(UserError, match=str(path)):
            write_index(tmp_path)
    assert not (tmp_path / INDEX_NAME).exists()


def test_a_key_in_two_shards_is_refused(tmp_path: Path) -> None:
    good = make(values("uint8")).encode()
    for name in ("a", "b"):
        with webdataset.TarWriter(str(tmp_path / f"{name}.tar")) as tar:
            for key in (name, "same"):
                tar.write({"__key__": key, **good})
    with pytest.raises(UserError, match=r"b\.tar: sample 'same' is in a\.tar too: rename one, or move one shard"):
        write_index(tmp_path)


def test_loading_says_what_is_missing(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(UserError, match=r"no index\.npz here: .*, or name one of its splits: test, train"):
        Index.load(corpus)
    index = corpus / "train" / INDEX_NAME
    data = bytearray(index.read_bytes())
    for change in (data[: len(data) // 2], data[: len(data) // 2] + b"\xff" + data[len(data) // 2 + 1 :], b"", b"x"):
        index.write_bytes(change)
        with pytest.raises(UserError, match=r"index\.npz: damaged index"):
            Index.load(corpus / "train")
    index.write_bytes(data)
    shard = corpus / "train" / shard_name(0)
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(UserError, match=r"shard-000000\.tar: the shard has \d+ bytes instead of \d+"):
        Index.load(corpus / "train")
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-000000\.tar: the shard is missing"):
        Index.load(corpus / "train")
    assert len(Index.load(corpus / "train", check=False)) == 20


def test_an_index_of_a_newer_version_is_refused(corpus: Path) -> None:
    path = corpus / "train" / INDEX_NAME
    with np.load(path) as content:
        arrays = dict(content)
    np.savez(path, **{**arrays, "version": np.int64(99)})
    with pytest.raises(UserError, match="format 99 is newer than 3: update"):
        Index.load(corpus / "train")


MILLION = """
import re, sys, time
from pathlib import Path
from data_shards.index import Index

def peak():  # of this process; that of `resource` counts the one that started it too
    return int(re.search(r"VmHWM:\\s+([0-9]+) kB", Path("/proc/self/status").read_text())[1]) / 1024

before = peak()
start = time.perf_counter()
index = Index.load(sys.argv[1], check=False)
seconds = time.perf_counter() - start
key = index.key(999_999)
print(len(index), key, seconds, peak() - before)
"""


def test_a_million_samples_open_at_once(tmp_path: Path) -> None:
    count = 1_000_000
    numbers = np.arange(count)
    Index(
        folder=tmp_path,
        sha256="",
        shard_names=np.array([shard_name(n) for n in range(100)]),
        shard_sizes=np.full(100, 2**28),
        shard_sha256=np.array(["0" * 64] * 100),
        raw_keys=np.char.add(b"totalsegmentator-0123456789abcdef-a", np.char.zfill(numbers.astype(bytes), 6)),
        shard=(numbers // 10_000).astype(np.int32),
        member_start=np.arange(count + 1) * 2,
        member_offset=np.repeat(numbers % 10_000 * 16_384, 2) + np.tile([512, 8192], count),
        member_size=np.repeat(numbers % 4096, 2),
        member_extension=np.tile(np.array([0, 1], np.uint8), count),
        crc32=numbers.astype(np.uint32),
        target_start=np.arange(count + 1) * 3,
        target_term=np.zeros(3 * count, np.int32),
        target_area=np.ones(3 * count, np.int64),
        target_kind=np.ones(3 * count, np.uint8),
        modality=np.zeros(count, np.int32),
        patient=(numbers // 100).astype(np.int32),
        dataset=np.zeros(count, np.int32),
        volume=(numbers // 100).astype(np.int32),
        slice_index=(numbers % 100).astype(np.int32),
        following=np.where(numbers % 100 == 99, -1, numbers + 1).astype(np.int32),
        **{name: np.full(count, 512, np.int32) for name in ("height", "width")},
        channels=np.ones(count, np.uint8),
        dtype=np.zeros(count, np.uint8),
        **{name: np.ones(count, np.float32) for name in ("row_spacing", "column_spacing", "slice_spacing")},
        extensions=np.array(["json", "image.png"]),
        datasets=np.array(["totalsegmentator"]),
        volumes=np.array([f"{n:016x}" for n in range(10_000)]),
        dtypes=np.array(["uint8"]),
        layout=np.array([""]),
        terms=np.array(["liver"]),
        absent=np.array([7]),
        modalities=np.array(["CT"]),
        patients=np.array([f"{n:016x}" for n in range(10_000)]),
    ).save()
    runs = [
        subprocess.run([sys.executable, "-c", MILLION, str(tmp_path)], capture_output=True, text=True, check=True)
        for _ in range(2)  # a shared machine is slow at times: the better of two counts
    ]
    found = [run.stdout.split() for run in runs]
    assert found[0][:2] == ["1000000", "totalsegmentator-0123456789abcdef-a999999"]
    assert min(float(seconds) for _, _, seconds, _ in found) < 1
    assert 100 < max(float(megabytes) for *_, megabytes in found) < 400
