"""`data-shards index`: foreign tars read back pixel by pixel, and corpora of ours whose index is made anew."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import re
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image
from pycocotools import mask as coco_mask
from toy import command_of

from data_shards import progress, reindex
from data_shards.cli import main
from data_shards.dataset import ShardDataset
from data_shards.errors import CommandParser
from data_shards.foreign import Layout
from data_shards.index import Index
from data_shards.manifest import MANIFEST_NAME
from data_shards.triplet import Target
from data_shards.verify import verify

COUNT = 12
RNG = np.random.default_rng(3)
IMAGES = [RNG.integers(0, 256, (30 + n, 40, 3), dtype=np.uint8) for n in range(COUNT)]
MASKS = [(RNG.random(image.shape[:2]) > 0.6).astype(np.uint8) * (n % 4) for n, image in enumerate(IMAGES)]
KEYS = [f"site{n % 2}/P{n // 3:02d}_{n}" for n in range(COUNT)]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command: (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "100")
    return command_of(reindex, "index", capsys)


def write(folder: Path, samples: list[dict[str, Any]], size: int = 5) -> Path:
    """Write tars as `webdataset` does."""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / "part-%03d.tar"), maxcount=size, verbose=0) as writer:
        for sample in samples:
            writer.write(sample)
    return folder


def pack(image: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=kind)
    return buffer.getvalue()


def polyps(**changes: Any) -> list[dict[str, Any]]:
    return [
        {"__key__": key, "png": image, "mask.png": mask, **changes}
        for key, image, mask in zip(KEYS, IMAGES, MASKS, strict=True)
    ]


def test_png_and_text_by_webdataset(tmp_path: Path, run: Run) -> None:
    write(tmp_path / "polyps", polyps(txt="colon polyp"))
    code, out, err = run(tmp_path / "polyps", "--patient", r"/(P\d+)_", "--modality", "endoscopy")
    assert (code, err) == (0, "")
    assert "polyps: image .png; mask .mask.png; term .txt; patient /(P\\d+)_" in out
    assert [cell.strip() for cell in out.splitlines()[-2].strip("│").split("│")][:6] == [
        "polyps", "12", str(sum(mask.any() for mask in MASKS)), "1", "4", "3",
    ]  # fmt: skip
    dataset = ShardDataset(tmp_path / "polyps")
    assert dataset.index.keys.tolist() == KEYS
    for number in np.random.default_rng(0).permutation(COUNT):
        triplet = dataset[number]
        np.testing.assert_array_equal(triplet.image, IMAGES[number])
        expected = (Target.from_mask(MASKS[number], "colon polyp"),) if MASKS[number].any() else ()
        assert triplet.targets == expected and triplet.looked_for == ("colon polyp",)
        assert triplet.provenance.dataset == "polyps" and triplet.provenance.modality == "endoscopy"
    index = dataset.index
    assert index.patient.tolist() == [n // 3 for n in range(COUNT)] and index.absent.tolist() == [3]
    assert index.height.tolist() == [30 + n for n in range(COUNT)] and set(index.channels.tolist()) == {3}


def test_jpegs_and_values_in_a_gnu_tar(tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "in"
    for key, image, mask in zip(KEYS, IMAGES, MASKS, strict=True):
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        for extension, data in (("JPG", pack(image, "JPEG")), ("seg.png", pack(mask, "PNG")), ("cls", b"1")):
            (folder / f"{key}.{extension}").write_bytes(data)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-C", folder, "-cf", tmp_path / "out" / "a.tar", *names], check=True)
    code, out, _ = run(tmp_path / "out", "--terms", "1=liver,2=cyst, simple,3=")
    assert code == 0 and "terms 1 liver, 2 cyst, simple" in out
    dataset = ShardDataset(tmp_path / "out")
    assert sorted(dataset.index.keys.tolist()) == sorted(KEYS)
    for triplet in dataset:
        number = KEYS.index(triplet.key)
        shown = np.asarray(Image.open(folder / f"{triplet.key}.JPG"))
        np.testing.assert_array_equal(triplet.image, shown)
        terms = {1: "liver", 2: "cyst, simple"}
        value = MASKS[number].max()
        assert triplet.targets == ((Target.from_mask(MASKS[number], terms[value]),) if value in terms else ())
        assert triplet.looked_for == ("liver", "cyst, simple")


def test_annotations_as_in_sa1b(tmp_path: Path, run: Run) -> None:
    samples, expected = [], []
    for number, image in enumerate(IMAGES):
        regions = [RNG.random(image.shape[:2]) > 0.7 for _ in range(number % 3)]
        rles = [coco_mask.encode(np.asfortranarray(region.astype(np.uint8))) for region in regions]
        items = [{"segmentation": {**rle, "counts": rle["counts"].decode()}, "area": 1} for rle in rles]
        record = {"image": {"image_id": number}, "annotations": items}
        samples.append({"__key__": f"sa_{number}", "jpg": pack(image, "JPEG"), "json": record})
        expected.append(tuple(Target.from_mask(region, "object", (), "instance") for region in regions))
    code, out, _ = run(write(tmp_path / "sa", samples), "--term", "object", "--dataset", "SA-1B")
    assert code == 0 and "annotations .json; term 'object'; instances" in out
    dataset = ShardDataset(tmp_path / "sa")
    assert [triplet.targets for triplet in dataset] == expected
    assert dataset.index.datasets.tolist() == ["SA-1B"] and dataset.index.target_kind.all()


def test_what_was_given_is_given_once(tmp_path: Path, run: Run) -> None:
    folder = write(tmp_path / "x" / "train", polyps())
    assert run(folder, "--term", "a", "--instances", "--dataset", "toy")[0] == 0
    first = (folder / "index.npz").read_bytes()
    assert run(folder)[0] == 0
    assert (folder / "index.npz").read_bytes() == first
    assert run(folder, "--term", "b")[0] == 0
    assert Layout.from_json(str(Index.load(folder).layout[0])).term == "b"


def test_every_split_of_a_folder(tmp_path: Path, run: Run) -> None:
    for name in ("train", "test"):
        write(tmp_path / "x" / name, polyps())
    code, out, _ = run(tmp_path / "x", "--term", "a")
    assert code == 0 and "│ test  │" in out and "│ train │" in out
    one, other = (ShardDataset(tmp_path / "x" / name) for name in ("train", "test"))
    assert one.index.datasets.tolist() == ["x"]
    assert one.index.patients.tolist() == other.index.patients.tolist()  # the same images: a leak can be seen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "it is not clear which term the masks have (members found: .mask.png, .png): give --term TEXT"),
        (["--mask", "seg.png", "--term", "x"], "part-000.tar: sample 'site0/P00_0': it has no member .seg.png"),
        (["--terms", "1=a"], "sample 'site0/P00_2': its mask.png has the values 2, which no term has"),
        (["--terms", "liver"], "--terms liver: give values and terms, as 1=liver,2=spleen"),
        (["--terms", "1=a,1=b"], "--terms: the value 1 is given twice"),
        (["--mask", "mask.png="], "--mask mask.png=: the term is missing"),
        (["--term", "x", "--patient", "(Q.)"], "sample 'site0/P00_0': the pattern of --patient, '(Q.)', finds"),
        (["--trem", "x"], "unexpected '--trem'; did you mean '--term'?"),
        (["--term", "x", "--image", "webp"], "--image webp: only jpg, jpeg, png, npy are read here"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(tmp_path: Path, run: Run, arguments: list[str], message: str) -> None:
    folder = write(tmp_path / "x", polyps())
    code, out, err = run(folder, *arguments)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    assert not (folder / "index.npz").exists()


def test_folders_without_tars(tmp_path: Path, run: Run) -> None:
    assert "none: no such folder" in run(tmp_path / "none")[2]
    (tmp_path / "README.md").touch()
    assert "README.md: is a file: name the folder of a corpus, or of .tar files" in run(tmp_path / "README.md")[2]
    assert f"{tmp_path}: no .tar file here, nor one folder below: name the folder" in run(tmp_path)[2]
    url = run("s3://bucket/x")
    assert url[0] == 2 and "s3://bucket/x: this command reads folders of this machine" in url[2]
    assert "copy the shards here first" in url[2]


def test_the_hint_for_values_below_zero_can_be_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In front of the number, the whole command would take it for an option."""
    samples = [{"__key__": key, "png": image, "mask.npy": mask.astype(np.int16) - 2 * (mask == 1)}
               for key, image, mask in zip(KEYS, IMAGES, MASKS, strict=True)]  # fmt: skip
    folder = write(tmp_path / "x", samples)
    assert main(["index", str(folder), "--mask", "mask.npy", "--terms", "2=liver,3="]) == 2
    hint = re.search(r"add (--terms=-1=)TERM, or --terms=-1= to leave it out", capsys.readouterr().err)
    assert hint is not None
    assert main(["index", str(folder), "--mask", "mask.npy", f"{hint[1]}cyst,2=liver,3="]) == 0
    terms = {1: ("cyst",), 2: ("liver",)}
    for triplet, mask in zip(ShardDataset(folder), MASKS, strict=True):
        assert tuple(target.term for target in triplet.targets) == terms.get(int(mask.max()), ())


def test_a_log_hears_of_it_every_ten_seconds(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "x", polyps(), size=12)
    clock = itertools.count(0, 4)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    code, _, err = run(folder, "--term", "a")
    size = next(folder.glob("*.tar")).stat().st_size / 1e6
    assert code == 0 and len(err.splitlines()) > 2
    for line in err.splitlines():
        assert re.fullmatch(rf"index x: \d\.\d/{size:.1f} MB, \d\.\d MB/s, left \d+:\d\d:\d\d", line), line


def test_foreign_samples_that_look_like_ours_get_a_hint(tmp_path: Path, run: Run) -> None:
    sample = {"__key__": "1", "image.png": IMAGES[0], "json": {"annotations": []}}
    code, _, err = run(write(tmp_path / "x", [sample]))
    assert code == 2 and "sample '1' is not a triplet" in err and "--image image.png --json json" in err
    assert run(tmp_path / "x", "--image", "image.png", "--json", "json", "--term", "x")[0] == 0


def test_a_corpus_of_ours_is_as_the_build_left_it(corpus: Path, run: Run) -> None:
    before = {path: path.read_bytes() for path in corpus.rglob("*") if path.is_file()}
    (corpus / "train" / "index.npz").unlink()
    code, out, err = run(corpus)
    assert (code, err) == (0, "") and out.startswith("┏")
    assert {path: path.read_bytes() for path in corpus.rglob("*") if path.is_file()} == before
    assert "give no options" in run(corpus, "--dataset", "x")[2]


@pytest.mark.parametrize("whole", [True, False])
def test_a_new_index_of_the_same_shards_goes_into_the_manifest(corpus: Path, run: Run, whole: bool) -> None:
    """As after an update that writes indices in another way."""
    path = corpus / "train" / "index.npz"
    index = Index.load(corpus / "train")
    object.__setattr__(index, "crc32", index.crc32 + 1)
    index.save()
    record = json.loads((corpus / MANIFEST_NAME).read_text())
    right = record["splits"]["train"]["index_sha256"]
    record["splits"]["train"]["index_sha256"] = Index.load(corpus / "train").sha256
    (corpus / MANIFEST_NAME).write_text(json.dumps(record))
    assert run(corpus if whole else corpus / "train")[:2][0] == 0
    assert Index.load(corpus / "train").sha256 == right
    assert json.loads((corpus / MANIFEST_NAME).read_text())["splits"]["train"]["index_sha256"] == right
    assert verify(corpus).problems == [] and path.is_file()


def test_shards_that_changed_are_named_and_not_vouched_for(corpus: Path, run: Run) -> None:
    """A sample was taken out of a shard, and another shard put beside it."""
    path = corpus / "train" / "shard-000000.tar"
    members = {}
    with tarfile.open(path) as tar:
        for item in tar:
            members[item.name] = tar.extractfile(item).read()  # type: ignore[union-attr]
    names = list(members)
    with tarfile.open(path, "w") as one, tarfile.open(path.with_name("more.tar"), "w") as other:
        for name in names:
            item = tarfile.TarInfo(name)
            item.size = len(members[name])
            (other if name in names[-2:] else one).addfile(item, io.BytesIO(members[name]))
    record = (corpus / MANIFEST_NAME).read_bytes()
    code, out, _ = run(corpus)
    assert code == 0
    assert "train: 1 of 2 shards changed since the last index: shard-000000.tar\n" in out
    assert "train: 1 of 2 shards added since the last index: more.tar\n" in out
    assert "train: manifest.json is left as it is, as the shards are not those of the build" in out
    assert (corpus / MANIFEST_NAME).read_bytes() == record
    assert len(Index.load(corpus / "train")) == len(names) // 2
    path.with_name("more.tar").unlink()
    assert "train: 1 of 2 shards gone since the last index: more.tar\n" in run(corpus)[1]


def test_a_damaged_index_is_replaced(corpus: Path, run: Run) -> None:
    right = (corpus / "test" / "index.npz").read_bytes()
    (corpus / "test" / "index.npz").write_bytes(right[:500])
    assert "test: the index that was there is damaged" in run(corpus / "test")[1]
    assert (corpus / "test" / "index.npz").read_bytes() == right


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    parser = CommandParser(prog="data-shards index", description=reindex.HELP)
    reindex.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    options = [name for action in parser._actions for name in action.option_strings]
    assert all(name in text for name in options) and "--terms 1=liver,2=spleen,255=" in text
    assert parser.parse_args(["x"]) == argparse.Namespace(
        dir="x", image=None, mask=None, text=None, json=None, json_term=None, term=None, terms=None, instances=None,
        dataset=None, modality=None, patient=None,
    )  # fmt: skip
