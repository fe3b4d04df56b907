"""`data-shards stats`: every figure is that of the samples themselves, counted one by one."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_inspect import words
from toy import command_of

from data_shards import stats
from data_shards.counts import QUANTILES, _grouped, count_corpus
from data_shards.dataset import ShardDataset
from data_shards.index import Index
from data_shards.scan import write_index
from data_shards.stats_plots import draw
from data_shards.triplet import Provenance, Target, Triplet
from data_shards.writer import ShardWriter

Run = Callable[..., tuple[int, str, str]]
TERMS = ("liver", "cell nucleus", "mass [/left] $x_$ :smile:")
AT = (0, 0.05, 0.5, 0.95, 1)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command: (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "100")
    return command_of(stats, "stats", capsys)


def sample(number: int, rng: np.random.Generator) -> Triplet:
    """Of three data sets in two modalities, very unequal; with and without targets, instances and spacing."""
    kind = 0 if number % 8 else 1 + number // 8 % 2
    height, width = ((20, 30), (25, 25), (40, 22))[kind]
    colour = kind == 1
    image = rng.integers(0, 256, (height, width, 3) if colour else (height, width)).astype(
        np.uint8 if kind else np.int16
    )
    masks = [rng.random((height, width)) > rng.random() for _ in range(int(rng.integers(0, 4)))]
    targets = [Target.from_mask(mask, TERMS[0]) for mask in masks[:1] if mask.any()]
    targets += [Target.from_mask(mask, TERMS[1], (), "instance") for mask in masks[1:] if mask.any()]
    origin = Provenance(
        dataset=("big", "small", "tiny")[kind], patient=f"p{number // 5}", volume=f"v{number // 2}",
        modality=("CT", "CT", "MR")[kind], source_sha256="0" * 64,
        spacing=None if kind else (0.5 + number % 3, 0.75), slice_spacing=None if number % 2 else 3.0,
    )  # fmt: skip
    looked_for = TERMS if number % 3 else TERMS[:2]
    return Triplet(f"s{number:03d}", image, tuple(targets), looked_for, origin)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Splits train and test of 40 and 9 samples; not to be changed."""
    folder = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(2)
    for name, numbers in (("train", range(40)), ("test", range(40, 49))):
        with ShardWriter(folder / name, 7, 2**20) as writer:
            for number in numbers:
                writer.write(f"s{number:03d}", sample(number, rng).encode())
        write_index(folder / name)
    return folder


@pytest.fixture(scope="module")
def splits(mixed: Path) -> dict[str, list[Triplet]]:
    return {name: list(ShardDataset(mixed / name)) for name in ("train", "test")}


@pytest.fixture
def counted(mixed: Path) -> dict[str, Any]:
    return count_corpus({name: Index.load(mixed / name) for name in ("train", "test")})


def quantiles(values: list[float]) -> Any:
    return pytest.approx(dict(zip(QUANTILES, np.quantile(values, AT), strict=True))) if values else None


def test_splits_are_counted(counted: dict[str, Any], splits: dict[str, list[Triplet]], mixed: Path) -> None:
    for name, triplets in splits.items():
        found, each = counted["splits"][name], [len(t.targets) for t in triplets]
        kinds = Counter(target.kind for t in triplets for target in t.targets)
        assert (found["images"], found["targets"]) == (len(triplets), sum(each))
        assert (found["semantic"], found["instance"]) == (kinds["semantic"], kinds["instance"])
        assert found["without_target"] == each.count(0) > 0
        mean = found["targets_per_image"].pop("mean")
        assert found["targets_per_image"] == quantiles(each) and mean == pytest.approx(np.mean(each))
        assert found["patients"] == len({t.provenance.patient for t in triplets})
        assert found["volumes"] == len({t.provenance.volume for t in triplets})
        tars = list((mixed / name).glob("*.tar"))
        assert (found["shards"], found["bytes"]) == (len(tars), sum(tar.stat().st_size for tar in tars))
        assert found["index_sha256"] == Index.load(mixed / name).sha256 and found["foreign"] is False
    everyone = {t.provenance.patient for triplets in splits.values() for t in triplets}
    assert counted["total"]["patients"] == len(everyone) < sum(s["patients"] for s in counted["splits"].values()) + 1
    assert counted["total"]["images"] == 49 and counted["outdated"] == []


def test_groups_are_counted(counted: dict[str, Any], splits: dict[str, list[Triplet]]) -> None:
    expected = Counter(
        (t.provenance.modality, t.provenance.dataset, name) for name, triplets in splits.items() for t in triplets
    )
    found = {(r["modality"], r["dataset"], name): n for r in counted["groups"] for name, n in r["splits"].items()}
    assert found == expected
    images = [row["images"] for row in counted["groups"]]
    assert images == sorted(images, reverse=True) and sum(images) == 49


def test_images_are_described(counted: dict[str, Any], splits: dict[str, list[Triplet]], mixed: Path) -> None:
    triplets = [t for found in splits.values() for t in found]
    images = counted["images"]
    sizes = Counter(t.image.shape[:2] for t in triplets)
    assert {(item["height"], item["width"]): item["images"] for item in images["sizes"]} == sizes
    assert [item["images"] for item in images["sizes"]] == sorted(sizes.values(), reverse=True)
    for axis, name in enumerate(("height", "width")):
        assert images[name] == quantiles([t.image.shape[axis] for t in triplets])
    assert images["dtypes"] == Counter(t.image.dtype.name for t in triplets)
    assert images["channels"] == Counter(str(t.image.shape[2] if t.image.ndim == 3 else 1) for t in triplets)
    spacings = {
        "row": [t.provenance.spacing[0] for t in triplets if t.provenance.spacing],
        "column": [t.provenance.spacing[1] for t in triplets if t.provenance.spacing],
        "slice": [t.provenance.slice_spacing for t in triplets if t.provenance.slice_spacing],
    }
    for name, values in spacings.items():
        assert images["spacing"][name].pop("known") == len(values) < 49
        assert images["spacing"][name] == quantiles(values)
    members = Counter[str]()
    for name in splits:
        dataset = ShardDataset(mixed / name)
        for number in range(len(dataset)):
            members.update({extension: len(data) for extension, data in dataset.read(number).items()})
    assert {extension: item["bytes"] for extension, item in counted["members"].items()} == members
    assert sum(item["members"] for item in counted["members"].values()) == 2 * 49


def test_terms_are_counted_and_measured(counted: dict[str, Any], splits: dict[str, list[Triplet]]) -> None:
    for term in TERMS:
        row = counted["terms"][term]
        for name, triplets in splits.items():
            having = [t for t in triplets if any(target.term == term for target in t.targets)]
            kinds = Counter(target.kind for t in triplets for target in t.targets if target.term == term)
            assert row["splits"][name] == {
                "positives": len(having),
                "absent": sum(term in t.looked_for for t in triplets) - len(having),
                "semantic": kinds["semantic"],
                "instance": kinds["instance"],
            }
        for kind in ("semantic", "instance"):
            found = [(t, target) for triplets in splits.values() for t in triplets for target in t.targets]
            mine = [(t, target) for t, target in found if (target.term, target.kind) == (term, kind)]
            assert row[kind]["area"] == quantiles([target.area for _, target in mine])
            shares = [target.area / math.prod(t.image.shape[:2]) for t, target in mine]
            assert row[kind]["share"] == quantiles(shares)
    assert list(counted["terms"]) == sorted(
        counted["terms"], key=lambda t: -sum(s["positives"] for s in counted["terms"][t]["splits"].values())
    )


def test_balance_is_what_sampling_would_make(counted: dict[str, Any], splits: dict[str, list[Triplet]]) -> None:
    for by in ("modality", "dataset"):
        counts = Counter(getattr(t.provenance, by) for t in splits["train"])
        found = counted["balance"]["train"][by]
        assert found["ratio"] == pytest.approx(max(counts.values()) / min(counts.values())) and found["ratio"] > 3
        assert {group["name"]: group["images"] for group in found["groups"]} == counts
        for power in (1.0, 0.5, 0.0):
            total = sum(count**power for count in counts.values())
            shares = {group["name"]: group["shares"][str(power)] for group in found["groups"]}
            assert shares == pytest.approx({name: count**power / total for name, count in counts.items()})


def test_quantiles_of_groups_are_those_of_numpy() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 30, 500) * 2
    values = rng.integers(0, 10**6, 500).astype(float)
    for count in (60, 70_000):
        found = _grouped(values, groups, count)
        for group in range(60):
            mine = values[groups == group]
            expected = np.quantile(mine, AT) if mine.size else np.full(5, np.nan)
            np.testing.assert_allclose(found[group], expected)
    assert np.isnan(_grouped(values[:0], groups[:0], 3)).all()


def test_everything_is_strict_json(mixed: Path, run: Run, tmp_path: Path, counted: dict[str, Any]) -> None:
    code, out, err = run(mixed, "--json", tmp_path / "a.json")
    assert (code, err) == (0, "") and out.endswith(f"written {tmp_path / 'a.json'}\n")

    def refuse(text: str) -> None:
        raise AssertionError(text)

    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=refuse) == json.loads(json.dumps(counted, allow_nan=False))


def test_tables(mixed: Path, run: Run, counted: dict[str, Any]) -> None:
    code, out, _ = run(mixed)
    assert code == 0 and max(map(len, out.splitlines())) <= 100
    rows = words(out)
    train, test = counted["splits"]["train"], counted["splits"]["test"]
    counts = (train["images"], train["without_target"], train["targets"], train["patients"], train["volumes"])
    assert ["train", *map(str, counts), "6", f"{train['bytes'] / 1e6:.1f}"] in rows
    assert out.index("│ train") < out.index("│ test")
    for row in counted["groups"]:
        by_split = (row["splits"].get("train", 0), row["splits"].get("test", 0), row["images"])
        assert [row["modality"], row["dataset"], *map(str, by_split)] in rows
    cells = [f"{split['positives']} / {split['absent']}" for split in counted["terms"][TERMS[1]]["splits"].values()]
    instances = train["instance"] + test["instance"]
    assert [TERMS[1], *cells, str(instances)] in rows
    assert [TERMS[2], "0 / 26", "0 / 6", "0"] in rows  # looked for in two of three
    found = counted["terms"]["liver"]["semantic"]
    area = [f"{value:,.0f}" for value in found["area"].values()]
    assert ["liver", *area, f"{100 * found['share']['median']:.3g}"] in rows
    assert "row spacing: median 1.5 mm, from 0.5 to 2.5, unknown for 7 images" in out
    groups = counted["balance"]["train"]["dataset"]["groups"]
    assert ["big", "35", "87.5%", "65.3%", "33.3%", "x 0.75"] in rows and groups[0]["name"] == "big"
    assert "the largest data set has 17.5 times the images of the smallest" in out


def test_one_split_is_enough(mixed: Path, run: Run) -> None:
    out = run(mixed / "test")[1]
    assert "│ test  │" in out and "train" not in out and "│ all" not in out


def many(folder: Path, count: int) -> Path:
    """One image with many terms."""
    mask = np.zeros((8, 8), np.uint8)
    mask[2:4, 3:5] = 1
    targets = tuple(Target.from_mask(mask, f"term {n:03d} of a very long name that goes on") for n in range(count))
    origin = Provenance(dataset="d", patient="p", volume="v", modality="CT", source_sha256="0" * 64)
    triplet = Triplet("k", np.zeros((8, 8), np.uint8), targets, tuple(t.term for t in targets), origin)
    with ShardWriter(folder, 7, 2**20) as writer:
        writer.write("k", triplet.encode())
    write_index(folder)
    return folder


def test_long_tables_are_cut(tmp_path: Path, run: Run) -> None:
    many(tmp_path / "x", 75)
    code, out, _ = run(tmp_path / "x", "--json", tmp_path / "a.json", "--png", tmp_path / "a.png")
    assert code == 0 and out.count("… and 45 more; --json has all") == 2
    assert len(json.loads((tmp_path / "a.json").read_text())["terms"]) == 75


def old(index: Index) -> Index:
    """The index as one of version 1 is read."""
    unknown = {name: np.array([""]) for name in ("datasets", "volumes", "dtypes")}
    names = ("dataset", "volume", "height", "width", "channels", "dtype")
    numbers = {name: np.zeros_like(getattr(index, name)) for name in names}
    none = np.full(len(index), np.nan, np.float32)
    spacing = dict.fromkeys(("row_spacing", "column_spacing", "slice_spacing"), none)
    return replace(index, absent=np.full(len(index.terms), -1), **unknown, **numbers, **spacing)


def test_what_an_old_index_does_not_know_is_unknown(mixed: Path, tmp_path: Path, run: Run) -> None:
    new, before = Index.load(mixed / "train"), old(Index.load(mixed / "test"))
    found = count_corpus({"train": new, "test": before})
    assert found["outdated"] == ["test"] and found["images"]["unknown"] == 9
    assert found["splits"]["test"]["volumes"] is None and found["balance"]["test"]["dataset"] is None
    assert {row["dataset"] for row in found["groups"]} == {"big", "small", "tiny", None}
    assert found["terms"]["liver"]["splits"]["test"]["absent"] is None
    alone, both = count_corpus({"train": new}), found
    assert both["terms"]["liver"]["semantic"]["share"] == alone["terms"]["liver"]["semantic"]["share"]
    assert both["terms"]["liver"]["semantic"]["area"] != alone["terms"]["liver"]["semantic"]["area"]
    replace(before, folder=tmp_path).save()
    code, out, _ = run(tmp_path, "--json", tmp_path / "a.json", "--png", tmp_path / "a.png")
    assert code == 0 and "knows no data sets, volumes, sizes nor spacings: run `data-shards index`" in " ".join(
        out.split()
    )
    rows = words(out)
    assert any(row[:2] == ["CT", "unknown"] for row in rows) and any(
        row[0] == "liver" and "/ ?" in row[1] for row in rows
    )
    assert json.loads((tmp_path / "a.json").read_text())["images"]["height"] is None


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def coloured(pixels: np.ndarray, colour: str) -> int:
    wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    return int((np.abs(pixels - wanted).max(axis=2) < 8).sum())


def test_the_figure_has_bars_of_both_splits(mixed: Path, run: Run, tmp_path: Path) -> None:
    code, out, err = run(mixed, "--png", tmp_path / "a.png")
    assert (code, err) == (0, "") and out.endswith(f"drawn {tmp_path / 'a.png'}\n")
    pixels = picture(tmp_path / "a.png")
    assert pixels.shape[1] >= 1200 and pixels.shape[0] >= 700
    train, test = coloured(pixels, "#33658a"), coloured(pixels, "#f6ae2d")
    assert train > 3 * test > 3000  # 40 images and 9
    assert coloured(pixels[:, : pixels.shape[1] // 3], "#33658a") > 2000  # terms
    assert coloured(pixels[:, -pixels.shape[1] // 3 :], "#33658a") > 2000  # modalities and data sets


def test_the_figure_of_odd_corpora(tmp_path: Path, counted: dict[str, Any]) -> None:
    """No term, one of a foreign script, and more groups than are drawn."""
    draw({**counted, "terms": {}}, "x", tmp_path / "none.png")
    row = counted["terms"]["liver"]
    draw({**counted, "terms": {"肝臓 $\\frac": row, "x" * 1000: row}}, "$\\x", tmp_path / "odd.png")
    groups = [{**counted["groups"][0], "dataset": f"set {n}"} for n in range(40)]
    draw({**counted, "groups": groups}, "many", tmp_path / "many.png")
    for name in ("none", "odd", "many"):
        assert len(np.unique(picture(tmp_path / f"{name}.png"))) > 50


def test_files_that_cannot_be_written(mixed: Path, run: Run, tmp_path: Path) -> None:
    for option, name in (("--png", "a.png"), ("--json", "a.json")):
        path = tmp_path / "none" / name
        expected = (
            f"data-shards: error: {option} {path}: cannot be written there: name a file in a folder that exists\n"
        )
        assert run(mixed, option, path) == (2, "", expected)
        # before anything is counted, or looked for
        assert run(tmp_path / "nowhere", option, path)[2] == expected
    assert "a PNG is drawn: give it a name that ends in .png" in run(mixed, "--png", tmp_path / "a.jpg")[2]
    assert "no corpus here" in run(tmp_path)[2]
    assert "nowhere: no such folder: name the folder of a corpus" in run(tmp_path / "nowhere")[2]
    assert "this command reads folders of this machine" in run("https://example.org/liver")[2]


def test_shards_need_not_be_there(mixed: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "index.npz").write_bytes((mixed / "train" / "index.npz").read_bytes())
    assert run(tmp_path / "train")[1] == run(mixed / "train")[1]
