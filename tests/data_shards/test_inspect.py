from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from test_triplet import make
from toy import make_inputs

from data_shards import inspect
from data_shards.build import build
from data_shards.cli import main
from data_shards.errors import UserError
from data_shards.scan import write_index
from data_shards.triplet import Target, Triplet
from data_shards.writer import ShardWriter


def words(text: str) -> list[list[str]]:
    """The cells of every row of the tables of a text."""
    rows = (line.strip("│┃|").replace("┃", "│").split("│") for line in text.splitlines())
    return [[cell.strip() for cell in row] for row in rows if len(row) > 1]


def test_tables(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(built)]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    rows = words(text)
    splits = inspect.open_splits(built)
    for name, dataset in splits.items():
        size = f"{dataset.index.shard_sizes.sum() / 1e6:.1f}"
        assert [name, "20", "2", "1", size, "24 x 20 uint8", dataset.index.sha256[:12]] in rows
        areas = sorted(target.area for t in dataset for target in t.targets if target.term == "left kidney")
        median = f"{np.median(areas):.0f}"
        assert [name, "left kidney", "12", "8", str(areas[0]), median, str(areas[-1])] in rows
        assert [name, "kidney cyst", "2", "18", "1", "1", "1"] in rows


def test_one_split_is_enough(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(built / "test")]) == 0
    text = capsys.readouterr().out
    assert "test" in text and "train" not in text


def test_sample(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    triplet = next(t for t in inspect.open_splits(built)["test"] if len(t.targets) == 2)
    assert main(["inspect", str(built), "--sample", triplet.key]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    rows = dict(row for row in words(text) if row[0])
    assert rows["key"] == triplet.key and rows["spacing"] == "(0.75, 0.5)" and rows["slice_index"] == "4"
    assert rows["target"].startswith("kidney cyst (also: renal cyst): semantic, 1 px, box (18, 20,")
    assert rows["looked for"] == "left kidney, kidney cyst"
    assert triplet.provenance.source_sha256 in "".join(row[1] for row in words(text))


def test_an_unknown_sample_gets_the_nearest_key(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = inspect.open_splits(built)["train"].index.key(0)
    for wrong, hint in [(key[:-1] + "x", "; did you mean 'toy-"), ("zzz", "; the first is toy-")]:
        assert main(["inspect", str(built), "--sample", wrong]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"data-shards: error: no sample '{wrong}'{hint}") and error.count("\n") == 1


def test_terms_with_brackets_dollars_and_colons_are_shown_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    targets = [{"term": "mass [/left] $x_$ :smile:", "value": 1}, {"term": "[bold]cyst", "value": 2}]
    spec = make_inputs(tmp_path, targets=targets, slices={"min_area": 2})
    assert main(["build", str(spec), "--out", str(tmp_path / "[out]")]) == 0
    assert "dropped 4 targets '[bold]cyst' below min_area" in capsys.readouterr().out
    key = inspect.open_splits(tmp_path / "[out]")["train"].index.key(0)
    for extra in ([], ["--sample", key]):
        assert main(["inspect", str(tmp_path / "[out]"), *extra, "--png", str(tmp_path / "a.png")]) == 0
        assert "mass [/left] $x_$ :smile:" in capsys.readouterr().out


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def coloured(pixels: np.ndarray) -> int:
    return int((np.ptp(pixels.astype(int), axis=2) > 40).sum())


def test_png_of_a_sample_shows_image_and_targets(built: Path, tmp_path: Path) -> None:
    train = inspect.open_splits(built)["train"]
    with_target = next(t for t in train if t.targets)
    without = next(t for t in train if not t.targets)
    for triplet in (with_target, without):
        assert main(["inspect", str(built), "--sample", triplet.key, "--png", str(tmp_path / "a.png")]) == 0
        pixels = picture(tmp_path / "a.png")
        assert min(pixels.shape[:2]) > 300 and len(np.unique(pixels)) > 50
        left, right = np.array_split(pixels, 2, axis=1)
        assert coloured(left) == 0
        assert (coloured(right) > 1000) == bool(triplet.targets)


def test_png_of_a_corpus_is_a_sheet(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(built), "--png", str(tmp_path / "a.png")]) == 0
    assert capsys.readouterr().out.endswith(f"drawn {tmp_path / 'a.png'}\n")
    pixels = picture(tmp_path / "a.png")
    assert len(np.unique(pixels)) > 50 and coloured(pixels) > 1000
    quarters = [part for half in np.array_split(pixels, 2) for part in np.array_split(half, 2, axis=1)]
    assert all(part.std() > 20 for part in quarters)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("channels", [(), (3,)])
def test_images_of_every_dtype_are_drawn_with_contrast(tmp_path: Path, dtype: str, channels: tuple[int, ...]) -> None:
    image = np.broadcast_to(np.linspace(0, 200, 7), (11, 7)).astype(dtype)
    image = np.repeat(image[..., None], 3, axis=2) if channels else image
    inspect.draw_sample(make(image, masks=0), tmp_path / "a.png")
    pixels = picture(tmp_path / "a.png")
    assert pixels[pixels.shape[0] // 2, : pixels.shape[1] // 2].std() > 40


def test_pixels_are_drawn_as_tall_as_they_are_in_mm(tmp_path: Path) -> None:
    triplet = make(np.zeros((10, 20), np.uint8), masks=0)
    inspect.draw_sample(
        replace(triplet, provenance=replace(triplet.provenance, spacing=(2.0, 0.5))), tmp_path / "a.png"
    )
    pixels = picture(tmp_path / "a.png").max(axis=2)
    black = pixels[:, : pixels.shape[1] // 2] < 10
    height, width = (black.mean(axis=axis).max() * black.shape[axis] for axis in (0, 1))
    assert height / width == pytest.approx((10 * 2.0) / (20 * 0.5), rel=0.03)


def nuclei() -> Triplet:
    """An RGB image, red left and blue right, with a semantic target and instances of one term, and another term."""
    image = np.zeros((30, 40, 3), np.uint8)
    image[:, :20, 0] = image[:, 20:, 2] = 200
    masks = np.zeros((7, 30, 40), np.uint8)
    for number in range(7):
        masks[number, 4 * number : 4 * number + 2, 3:6] = 1
    targets = [Target.from_mask(masks.any(axis=0), "cell nucleus"), Target.from_mask(masks[0], "tumour")]
    targets += [Target.from_mask(mask, "cell nucleus", (), "instance") for mask in masks]
    triplet = make(np.zeros((30, 40), np.uint8), masks=0)
    looked_for = ("cell nucleus", "tumour", "fat")
    return replace(triplet, image=image, targets=tuple(targets), looked_for=looked_for)


def test_instances_are_counted_once_in_the_title() -> None:
    triplet = nuclei()
    assert inspect.title(triplet) == "cell nucleus ×7, tumour"
    assert inspect.title(replace(triplet, targets=triplet.targets[:2])) == "cell nucleus, tumour"
    assert inspect.title(replace(triplet, targets=())) == "no target"


def test_tables_tell_instances_from_semantic_targets_and_count_negatives(tmp_path: Path) -> None:
    triplet = nuclei()
    with ShardWriter(tmp_path / "train", 10, 2**20) as writer:
        writer.write("toy-1", triplet.encode())
        writer.write("toy-2", replace(triplet, key="toy-2", targets=triplet.targets[1:2]).encode())
    write_index(tmp_path / "train")
    output = io.StringIO()
    inspect.show_corpus(inspect.open_splits(tmp_path), Console(file=output, width=100))
    rows = words(output.getvalue())
    assert ["train", "cell nucleus", "1", "1", "42", "42", "42"] in rows
    assert ["train", "cell nucleus (instances)", "7", "1", "6", "6", "6"] in rows
    assert ["train", "tumour", "2", "0", "6", "6", "6"] in rows
    assert ["train", "fat", "0", "2", "", "", ""] in rows


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_colours_are_drawn_as_they_are(tmp_path: Path, dtype: str) -> None:
    triplet = nuclei()
    scale = 1 if dtype == "uint8" else 100
    inspect.draw_sample(
        replace(triplet, image=triplet.image.astype(dtype) * np.array(scale, dtype), targets=()), tmp_path / "a.png"
    )
    left = np.array_split(picture(tmp_path / "a.png").astype(int), 2, axis=1)[0]
    red = (left[..., 0] > 180) & (left[..., 1:] < 30).all(axis=2)
    blue = (left[..., 2] > 180) & (left[..., :2] < 30).all(axis=2)
    assert red.sum() > 5000 and blue.sum() > 5000
    assert np.nonzero(red)[1].mean() < np.nonzero(blue)[1].mean()


def test_instances_are_drawn_in_several_colours(tmp_path: Path) -> None:
    triplet = replace(nuclei(), image=np.zeros((30, 40), np.uint8), targets=nuclei().targets[2:])
    inspect.draw_sample(triplet, tmp_path / "a.png")
    right = np.array_split(picture(tmp_path / "a.png").astype(int), 2, axis=1)[1]
    for colour in inspect._COLOURS:
        wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
        assert (np.abs(right - wanted).max(axis=2) < 12).sum() > 20, colour


def test_a_blank_image_is_drawn(tmp_path: Path) -> None:
    inspect.draw_sample(make(np.zeros((11, 7), np.float32)), tmp_path / "a.png")
    assert picture(tmp_path / "a.png").size


def test_png_that_cannot_be_written(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "none" / "a.png"
    assert main(["inspect", str(built), "--png", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"data-shards: error: {path}: cannot be written (No such file or directory): choose another --png\n"
    )


def test_long_names_keep_the_tables_legible_at_80_columns(tmp_path: Path) -> None:
    term = "left posterior superior alveolar artery"
    targets = [{"term": term, "value": 1}, {"term": "cyst", "value": 2}]
    split = {"kind": "patients", "fractions": {"validation": 0.5, "train": 0.5}}
    build(make_inputs(tmp_path, targets=targets, split=split), tmp_path / "out")
    output = io.StringIO()
    inspect.show_corpus(inspect.open_splits(tmp_path / "out"), Console(file=output, width=80))
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in output.getvalue()
    assert all(word in output.getvalue() for word in ["validation", *term.split()])


def test_spread() -> None:
    assert inspect.spread(100, 5) == [0, 25, 50, 74, 99]
    assert inspect.spread(3, 12) == [0, 1, 2] and inspect.spread(1, 12) == [0]


def test_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no corpus here \(manifest\.json or index\.npz\): run `data-shards build`"):
        inspect.open_splits(tmp_path)
