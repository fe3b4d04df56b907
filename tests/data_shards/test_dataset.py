from __future__ import annotations

import importlib.util
import os
import pickle
import sys
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from test_triplet import make, values
from torch.utils.data import DataLoader

import data_shards.stores.local
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from data_shards.scan import write_index
from data_shards.triplet import Triplet
from data_shards.writer import ShardWriter, shard_name

COUNT = 23


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five shards of different images."""
    with ShardWriter(tmp_path / "many", 5, 2**20) as writer:
        for number in range(COUNT):
            dtype = ("uint8", "int16", "float32")[number % 3]
            image = np.roll(values(dtype), number)
            writer.write(f"toy-{number:03d}", make(image, masks=number % 4).encode())
    write_index(tmp_path / "many")
    return tmp_path / "many"


def same(one: Triplet, other: Triplet) -> bool:
    """Equal in everything; images too."""
    np.testing.assert_array_equal(one.image, other.image)
    return one.image.dtype == other.image.dtype and one.encode() == other.encode() and one.key == other.key


def sequential(folder: Path) -> list[Triplet]:
    """All samples, read with tarfile alone."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for item in tar:
                key, _, extension = item.name.partition(".")
                found.setdefault(key, {})[extension] = tar.extractfile(item).read()  # type: ignore[union-attr]
    return [Triplet.decode(key, members) for key, members in found.items()]


def test_random_access_equals_sequential_reading(folder: Path) -> None:
    expected, dataset = sequential(folder), ShardDataset(folder)
    assert len(dataset) == len(expected) == COUNT
    for number in np.random.default_rng(0).permutation(COUNT):
        assert same(dataset[number], expected[number])
        assert same(dataset[int(number) - COUNT], expected[number])
    for number in (COUNT, -COUNT - 1):
        with pytest.raises(IndexError):
            dataset[number]


def test_closing_and_few_open_files_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_shards.stores.local, "_MAX_OPEN", 2)
    opened: list[int] = []
    closed: list[int] = []
    real = os.open, os.close
    monkeypatch.setattr(os, "open", lambda *a: opened.append(real[0](*a)) or opened[-1])
    monkeypatch.setattr(os, "close", lambda handle: closed.append(handle) or real[1](handle))
    dataset = ShardDataset(folder)
    expected = list(dataset)
    assert len(opened) > 5 and len(opened) - len(closed) == 2
    dataset.close()
    assert sorted(opened) == sorted(closed)
    assert same(dataset[7], expected[7])


def test_a_copy_by_pickle_opens_its_own_files(folder: Path) -> None:
    dataset = ShardDataset(folder)
    expected = list(dataset)
    copy = pickle.loads(pickle.dumps(dataset))
    dataset.close()
    assert all(same(triplet, other) for triplet, other in zip(copy, expected, strict=True))


def test_threads_may_share_it(folder: Path) -> None:
    expected, dataset = sequential(folder), ShardDataset(folder)
    order = np.random.default_rng(1).integers(0, COUNT, 400).tolist()
    with ThreadPoolExecutor(8) as pool:
        for number, triplet in zip(order, pool.map(dataset.__getitem__, order), strict=True):
            assert same(triplet, expected[number])


def first(batch: list[Triplet]) -> Triplet:
    return batch[0]


def read_in_a_worker(folder: Path) -> list[Triplet]:
    iterator = iter(DataLoader(ShardDataset(folder), batch_size=1, num_workers=1, collate_fn=first))
    try:
        return list(iterator)
    finally:  # left to the garbage collector, its worker would be waited for
        iterator._shutdown_workers()


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_what_the_main_process_reads(folder: Path, context: str) -> None:
    dataset = ShardDataset(folder)
    expected = list(dataset)  # the files are open before the workers start
    loader = DataLoader(dataset, batch_size=1, num_workers=2, collate_fn=first, multiprocessing_context=context)
    assert all(same(triplet, other) for triplet, other in zip(loader, expected, strict=True))


def damage(folder: Path, number: int) -> str:
    """Flip a bit in a sample's image; return the message to be expected."""
    index = ShardDataset(folder).index
    path = folder / str(index.shard_names[index.shard[number]])
    with path.open("r+b") as file:
        file.seek(list(index.members(number).values())[1][0] + 3)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    return (
        f"{path}: sample '{index.key(number)}' is damaged, its bytes changed since the build: "
        f"run `data-shards verify {folder}`"
    )


@pytest.mark.parametrize("fast", [True, False])
def test_checksums_are_zlibs_with_and_without_the_fast_ones(
    folder: Path, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fast:
        pytest.importorskip("isal")
    else:
        monkeypatch.setitem(sys.modules, "isal.isal_zlib", None)
    spec = importlib.util.find_spec("data_shards.dataset")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)  # a copy: the classes of the one in use stay what they are
    spec.loader.exec_module(module)
    assert (module.crc32 is zlib.crc32) is not fast
    dataset = module.ShardDataset(folder)
    for content in (b"", b"x", *(data for number in range(COUNT) for data in dataset.read(number).values())):
        assert module.crc32(content, 0x12345678) == zlib.crc32(content, 0x12345678)


def test_a_corrupt_byte_names_shard_and_sample(folder: Path) -> None:
    message = damage(folder, 11)
    dataset = ShardDataset(folder)
    with pytest.raises(UserError) as caught:
        dataset[11]
    assert str(caught.value) == message
    assert [dataset[number].key for number in (10, 12)] == ["toy-010", "toy-012"]


def test_a_corrupt_byte_is_one_line_from_a_worker_too(folder: Path) -> None:
    message = damage(folder, 11)
    with pytest.raises(UserError) as caught:
        read_in_a_worker(folder)
    assert str(caught.value) == message


def test_a_sample_that_cannot_be_decoded_is_one_line_from_a_worker_too(tmp_path: Path) -> None:
    good = make(values("uint8")).encode()
    with ShardWriter(tmp_path, 5, 2**20) as writer:
        writer.write("toy-0", {**good, "image.png": good["image.png"][:-40]})  # its header says that all is well
    write_index(tmp_path)
    expected = f"^{tmp_path}/shard-000000.tar: sample 'toy-0': its image.png cannot be decoded"
    with pytest.raises(UserError, match=expected):
        ShardDataset(tmp_path)[0]
    with pytest.raises(UserError, match=expected):
        read_in_a_worker(tmp_path)


def test_an_image_without_a_header_is_refused_by_the_index(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 5, 2**20) as writer:
        writer.write("toy-0", {**make(values("uint8")).encode(), "image.png": b"no picture"})
    expected = f"^{tmp_path}/shard-000000.tar: sample 'toy-0' is not a triplet: its image.png is no PNG$"
    with pytest.raises(UserError, match=expected):
        write_index(tmp_path)


def test_a_shard_that_shrinks_or_goes_while_in_use(folder: Path) -> None:
    dataset = ShardDataset(folder)
    (folder / shard_name(1)).unlink()
    with pytest.raises(UserError, match=r"shard-000001\.tar: sample 'toy-006' is damaged, it cannot be read \(No such"):
        dataset[6]
    os.truncate(folder / shard_name(2), 1000)
    with pytest.raises(UserError, match=r"shard-000002\.tar: changed while it was in use: put back what was there"):
        dataset[13]


def rebuilt(folder: Path, first: int) -> None:
    """Build the corpus again from other samples, each file put in the place of the old one."""
    other = folder.parent / "other"
    with ShardWriter(other, 5, 2**20) as writer:
        for number in range(COUNT):
            writer.write(f"toy-{number:03d}", make(np.roll(values("uint8"), first + number)).encode())
    write_index(other)
    for path in other.iterdir():
        path.replace(folder / path.name)


def test_a_corpus_that_is_built_again_while_in_use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, expected = ShardDataset(folder), sequential(folder)
    assert same(dataset[0], expected[0])
    rebuilt(folder, 7)
    assert same(dataset[1], expected[1]), "an open shard is read on as it was"
    with pytest.raises(UserError, match=r"shard-000003\.tar: changed while it was in use: put back .*, or start anew"):
        dataset[16]
    monkeypatch.setattr(dataset, "_next_look", 0.0)
    with pytest.raises(UserError, match=r"index\.npz: changed while it was in use"):
        dataset[1]


def test_a_corpus_that_is_copied_over_itself_is_no_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, expected = ShardDataset(folder), sequential(folder)
    for path in folder.iterdir():
        twin = path.with_suffix(".copy")
        twin.write_bytes(path.read_bytes())
        twin.replace(path)
    monkeypatch.setattr(dataset, "_next_look", 0.0)
    assert all(same(dataset[number], expected[number]) for number in range(COUNT))
    assert dataset._next_look > 0, "it has looked"
