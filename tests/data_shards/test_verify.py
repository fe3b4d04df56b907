from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from toy import make_inputs

from data_shards.build import build
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from data_shards.index import INDEX_NAME, Index
from data_shards.inspect import open_splits
from data_shards.scan import write_index
from data_shards.sources import file_sha256
from data_shards.tars import Entry, walk
from data_shards.triplet import Target, Triplet
from data_shards.verify import verify
from data_shards.writer import ShardWriter

SHARD = "shard-000000.tar"


def problems(folder: Path) -> list[str]:
    found = verify(folder).problems
    assert all("\n" not in problem for problem in found)
    return found


def test_a_sound_corpus(built: Path) -> None:
    result = verify(built)
    assert (result.problems, result.splits, result.samples, result.targets) == ([], 2, 40, 28)
    assert result.bytes == sum(path.stat().st_size for path in built.rglob("*.tar"))
    assert result.summary().startswith("40 samples, 28 targets in 2 splits")
    assert verify(built / "train").samples == 20


def test_it_writes_nothing(corpus: Path) -> None:
    (corpus / "train" / SHARD).write_bytes(b"damage")

    def state() -> dict[str, tuple]:
        paths = [corpus, *corpus.rglob("*")]
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}

    before = state()
    assert verify(corpus).problems
    assert state() == before


def test_any_flipped_byte_of_a_sample_is_found(corpus: Path) -> None:
    path, index = corpus / "train" / SHARD, Index.load(corpus / "train")
    data = path.read_bytes()
    (offset, size), first = index.members(7)["image.png"], index.members(0)["image.png"][0]
    places = [index.members(3)["json"][0], offset + size - 1, first + 5]
    for place, number in zip(places, (3, 7, 0), strict=True):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        found = problems(corpus)
        assert len(found) == 2, found
        assert found[0].startswith(f"{path}: its SHA-256 is not the recorded one")
        assert found[1] == f"{path}: sample '{index.key(number)}' is damaged, its bytes changed since the build"


def test_a_flipped_byte_outside_of_samples_is_found(corpus: Path) -> None:
    path = corpus / "test" / SHARD
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"\x01")
    assert [problem.partition(":")[0] for problem in problems(corpus)] == [str(path)]


def test_truncated_shard(corpus: Path) -> None:
    path = corpus / "train" / SHARD
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = problems(corpus)
    assert f"{path}: the shard has" in found[0] and "SHA-256" in found[1]
    damaged = [problem for problem in found if "is damaged" in problem]
    assert 5 < len(damaged) < 15 and len(damaged) + 2 == len(found)


def test_missing_shard_index_and_split(corpus: Path) -> None:
    (corpus / "train" / SHARD).unlink()
    assert problems(corpus)[0].startswith(f"{corpus / 'train' / SHARD}: the shard is missing")
    (corpus / "train" / INDEX_NAME).unlink()
    assert problems(corpus)[0].startswith(f"{corpus / 'train'}: no index.npz here")
    shutil.rmtree(corpus / "train")
    assert problems(corpus)[0].startswith(f"{corpus / 'train'}: no index.npz here")
    with pytest.raises(UserError, match="elsewhere: no such folder: name the folder of a corpus"):
        verify(corpus / "elsewhere")


def change_index(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    with np.load(folder / INDEX_NAME) as content:
        arrays = dict(content)
    change(arrays)
    np.savez(folder / INDEX_NAME, **arrays)


def test_wrong_checksum_in_the_index(corpus: Path) -> None:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays["crc32"][4] ^= 1
        arrays["shard_sha256"][0] = "0" * 64

    change_index(corpus / "train", change)
    key = Index.load(corpus / "train").key(4)
    found = problems(corpus)
    assert len(found) == 3
    assert "the index is not the one that the manifest records" in found[0]
    assert "its SHA-256 is not the recorded one" in found[1]
    assert f"sample '{key}' is damaged" in found[2]


def test_wrong_statistics_in_the_index(corpus: Path) -> None:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays["target_area"][0] += 1
        arrays["patient"][5] ^= 1

    change_index(corpus / "train", change)
    found = problems(corpus / "train")
    assert len(found) == 2
    assert "the index lists other targets" in found[0] and "the index lists another patient" in found[1]


def test_extra_files(corpus: Path) -> None:
    (corpus / "train" / "shard-000001.tar").write_bytes(b"")
    (corpus / "train" / f".{SHARD}.partial").write_bytes(b"")
    shutil.copytree(corpus / "test", corpus / "validation")
    (corpus / "README.txt").write_text("whose corpus this is")
    assert problems(corpus) == [
        f"{corpus / 'train' / f'.{SHARD}.partial'}: not part of the corpus: move it away",
        f"{corpus / 'train' / 'shard-000001.tar'}: not part of the corpus: move it away",
        f"{corpus / 'validation'}: the manifest lists no such split: move it away",
    ]


def rewrite(folder: Path, change: Callable[[Triplet, dict], None]) -> None:
    """Write a split again, with an index that fits, after changing the JSON of its samples."""
    triplets = list(ShardDataset(folder))
    shutil.rmtree(folder)
    with ShardWriter(folder, 1000, 2**30) as writer:
        for triplet in triplets:
            members = triplet.encode()
            record = json.loads(members["json"])
            change(triplet, record)
            writer.write(triplet.key, {**members, "json": json.dumps(record).encode()})
    write_index(folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("box", [0, 0, 1, 1], "the box of 'left kidney' is (0, 0, 1, 1), that of its mask (6, 5, "),
        ("area", 1, "the area of 'left kidney' is 1, that of its mask "),
        ("size", [30, 30], "the mask of 'left kidney' has size (30, 30), its image (24, 20)"),
        ("counts", "0", "the mask of 'left kidney' is damaged: its run lengths do not fill 24 x 20 pixels"),
        ("term", "spleen", "'spleen' has a target but was not looked for"),
    ],
)
def test_targets_that_contradict_themselves(corpus: Path, field: str, value: object, message: str) -> None:
    def change(triplet: Triplet, record: dict) -> None:
        if record["targets"] and triplet.provenance.slice_index == 5:
            record["targets"][0][field] = value

    rewrite(corpus / "train", change)
    found = problems(corpus / "train")
    assert len(found) == 2 and all(message in problem and f"{SHARD}: sample 'toy-" in problem for problem in found)


def test_leaks_between_splits(corpus: Path, tmp_path: Path) -> None:
    shutil.rmtree(corpus / "test")
    shutil.copytree(corpus / "train", corpus / "test")
    found = problems(corpus)
    assert sum("the key was already in split 'test'" in problem for problem in found) == 20
    assert sum("the same slice is in split 'test'" in problem for problem in found) == 20
    assert sum("is in splits test, train: split by patient" in problem for problem in found) == 2


def test_slabs_leak_by_design(tmp_path: Path) -> None:
    spec = make_inputs(tmp_path, cases=1, split={"kind": "slabs", "thickness": 4, "guard": 1})
    build(spec, tmp_path / "out")
    assert problems(tmp_path / "out") == []
    (tmp_path / "out" / "manifest.json").unlink()
    assert any("split by patient" in problem for problem in problems(tmp_path / "out"))


def test_a_split_without_an_index_is_read_from_its_tars(corpus: Path) -> None:
    for damage in (b"damage", None):
        path = corpus / "train" / INDEX_NAME
        path.unlink() if damage is None else path.write_bytes(damage)
        result = verify(corpus)
        assert len(result.problems) == 1 and (result.samples, result.targets) == (40, 28)
        wanted = f"{corpus / 'train'}: no index.npz here" if damage is None else f"{path}: damaged index"
        assert result.problems[0].startswith(wanted)
        assert result.problems[0].endswith("(its 1 shard was read without an index)")
    assert verify(corpus / "train").samples == 20
    shard = corpus / "train" / SHARD
    data, place = shard.read_bytes(), places(shard)[11]
    shard.write_bytes(data[: place.offset - 512 + 150] + b"9" + data[place.offset - 512 + 151 :])  # its checksum
    found = problems(corpus)
    assert len(found) == 2 and verify(corpus).samples == 20 + 5
    assert found[1].startswith(f"{shard}: damaged after '{places_before(place)}': no tar header is there")
    assert found[1].endswith("; what follows in this shard was not checked")


def places(shard: Path) -> list[Entry]:
    """The members as they were before anything was damaged."""
    with shard.open("rb") as file:
        _ENTRIES[shard] = list(walk(file, shard))
    return _ENTRIES[shard]


_ENTRIES: dict[Path, list[Entry]] = {}


def places_before(entry: Entry) -> str:
    """The name of the member before one."""
    entries = next(entries for entries in _ENTRIES.values() if entry in entries)
    return entries[entries.index(entry) - 1].name


def test_a_damaged_sample_leaves_the_rest_readable_without_an_index(corpus: Path) -> None:
    shard = corpus / "train" / SHARD
    members = [places(shard)[number] for number in (4, 9)]  # the image of the third sample, the JSON of the fifth
    data = bytearray(shard.read_bytes())
    for member in members:
        data[member.offset + 3] ^= 0x80
    shard.write_bytes(data)
    (corpus / "train" / INDEX_NAME).unlink()
    found = problems(corpus / "train")
    assert len(found) == 3 and verify(corpus / "train").samples == 20
    assert found[1] == f"{shard}: sample '{members[0].key}': its image.png is no PNG"
    assert found[2].startswith(f"{shard}: sample '{members[1].key}': its json is damaged: it is no JSON (Unicode")


def test_what_is_in_the_tar_but_not_in_the_index_is_found(corpus: Path) -> None:
    folder = corpus / "train"
    triplets = list(ShardDataset(folder))
    (folder / SHARD).unlink()
    with ShardWriter(folder, 1000, 2**30) as writer:
        for triplet in triplets[:5]:
            writer.write(triplet.key, triplet.encode())
    write_index(folder)
    with ShardWriter(folder, 1000, 2**30) as writer:
        for triplet in triplets[:7]:
            writer.write(triplet.key, triplet.encode())

    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays["shard_sizes"][0] = (folder / SHARD).stat().st_size
        arrays["shard_sha256"][0] = file_sha256(folder / SHARD)

    change_index(folder, change)
    assert sorted(problems(folder)) == [
        f"{folder / SHARD}: sample '{triplet.key}' is in the tar but not in the index: build the corpus again"
        for triplet in sorted(triplets[5:7], key=lambda triplet: triplet.key)
    ]

    def swap(arrays: dict[str, np.ndarray]) -> None:
        change(arrays)
        arrays["crc32"][[0, 1]] = arrays["crc32"][[1, 0]]
        for name in ("member_offset", "member_size"):
            arrays[name][[0, 1, 2, 3]] = arrays[name][[2, 3, 0, 1]]

    change_index(folder, swap)
    found = problems(folder)
    assert sum("lies elsewhere than the index says" in problem for problem in found) == 2


def test_neighbours_that_do_not_exist(corpus: Path) -> None:
    folder = corpus / "train"
    keys = [triplet.key for triplet in ShardDataset(folder)]
    others = [triplet.key for triplet in ShardDataset(corpus / "test")]

    def change(triplet: Triplet, record: dict) -> None:
        number = keys.index(triplet.key)
        record["provenance"]["previous"] = keys[number - 1] if number else None
        record["provenance"]["next"] = keys[number + 1] if number + 1 < len(keys) else None
        if number == 3:
            record["provenance"]["previous"] = others[0]
        elif number == 8:
            record["provenance"]["next"] = "nobody"

    rewrite(folder, change)
    assert problems(folder) == [
        f"{folder / SHARD}: sample '{keys[3]}': its previous slice '{others[0]}' is not in this split",
        f"{folder / SHARD}: sample '{keys[8]}': its next slice 'nobody' is not in this split",
    ]


def test_instances_outside_of_their_semantic_target(corpus: Path) -> None:
    changed = []

    def change(triplet: Triplet, record: dict) -> None:
        if not triplet.targets or triplet.provenance.slice_index not in (3, 5):
            return
        whole = triplet.targets[0]
        mask = whole.mask()
        top, left = mask.copy(), mask.copy()
        top[10:] = left[:, 8:] = 0
        if triplet.provenance.slice_index == 5:
            left[0, 0] = 1
            changed.append(triplet.key)
        new = [Target.from_mask(part, whole.term, (), "instance") for part in (top, left)]
        record["targets"] += [asdict(target) for target in new]

    rewrite(corpus / "train", change)
    found = problems(corpus / "train")
    assert found == [
        f"{corpus / 'train' / SHARD}: sample '{key}': 1 instances of 'left kidney' reach outside of the semantic target"
        for key in changed
    ]
    assert len(found) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["splits"].update({"../elsewhere": {}}),
        lambda content: content["splits"].update({"/elsewhere": {}}),
        lambda content: content["splits"].update({"train": "x"}),
        lambda content: content.update(splits=["train"]),
        lambda content: content.update(sources=[{"volume": []}]),
        lambda content: content.update(sources="volume"),
        lambda content: content.update(spec=None),
    ],
)
def test_a_hostile_manifest_leads_nowhere(
    corpus: Path, change: Callable[[dict], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = corpus / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    monkeypatch.setattr(Index, "load", lambda *_: pytest.fail("a folder was opened"))
    with pytest.raises(UserError, match=r"manifest\.json: damaged manifest \("):
        verify(corpus)
    with pytest.raises(UserError, match=r"manifest\.json: damaged manifest \("):
        open_splits(corpus)
    for text in ("[" * 100_000, '{"splits": {}, "splits": {}}', '{"a": NaN}', "\udcff"):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(UserError, match=r"manifest\.json: damaged manifest \("):
            verify(corpus)


def test_a_corpus_without_its_manifest_or_with_other_counts(corpus: Path) -> None:
    path = corpus / "manifest.json"
    content = json.loads(path.read_text())
    content["splits"]["train"]["slices"] += 1
    path.write_text(json.dumps(content))
    assert problems(corpus) == [f"{corpus / 'train'}: the manifest states other counts than the index: build again"]
    path.unlink()
    assert problems(corpus) == [f"{corpus}: has no manifest.json: copy it again, or build the corpus again"]
    assert problems(corpus / "train") == []
