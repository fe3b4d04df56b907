"""Models side by side: which cases they answer, how they are asked, and what the tables make of it."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from toy import save_nifti

from data_shards.build import build
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from data_shards.scan import write_index
from data_shards.triplet import Provenance, Target, Triplet
from data_shards.writer import ShardWriter
from trainer.evaluation import sources
from trainer.evaluation.cases import SequenceCase, ShardStack, Thing, image_cases, sequence_cases, things_of
from trainer.evaluation.protocol import COPY, load_protocol
from trainer.evaluation.rows import Row, read
from trainer.evaluation.tables import copy_of, differences, figures, label, section_of
from trainer.evaluation.text import markdown
from trainer.metrics import volume_scores
from trainer.models import Preprocessing, SegmentationModel
from trainer.report.statistics import bootstrap_ci95
from trainer.scores import read_scores

REPOSITORY = Path(__file__).parents[2]
SIDE, DEPTH = 64, 8
SPACING = (3.0, 1.5, 1.0)
BRIGHT, DARK, GREY = 240, 20, 120


def truth_of(volume: int) -> np.ndarray:
    """Labels (D, H, W): a bright square that grows by a row a slice, a dark one, and a speck in one slice."""
    labels = np.zeros((DEPTH, SIDE, SIDE), np.uint8)
    for z in range(1, 7):
        labels[z, 10 : 16 + z, 8 + volume : 20] = 1
    labels[2:5, 40:50, 30:44] = 2
    labels[4, 60:62, 60:62] = 3
    return labels


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three volumes of three patients."""
    folder = tmp_path_factory.mktemp("evaluated")
    cases = []
    for number in range(3):
        labels = truth_of(number)
        image = np.full(labels.shape, GREY, np.uint8)
        image[labels == 1], image[labels == 2], image[labels == 3] = BRIGHT, DARK, BRIGHT
        affine = np.diag([-SPACING[2], -SPACING[1], SPACING[0], 1.0])
        save_nifti(folder / f"image{number}.nii.gz", image, affine)
        save_nifti(folder / f"mask{number}.nii.gz", labels, affine)
        names = {"image": f"image{number}.nii.gz", "mask": f"mask{number}.nii.gz"}
        cases.append({**names, "patient": f"p{number}", "split": "test"})
    targets = [{"term": term, "value": value} for value, term in enumerate(("bright", "dark", "speck"), start=1)]
    spec = {
        "dataset": "squares", "modality": "MR", "cases": cases, "targets": targets, "intensity": {"kind": "none"},
        "slices": {"keep": "all"}, "split": {"kind": "explicit"}, "licence": "none", "cite": "nobody",
    }  # fmt: skip
    (folder / "squares.yaml").write_text(yaml.safe_dump(spec))
    build(folder / "squares.yaml", folder / "shards", root=folder)
    return folder / "shards/test"


class Bright(SegmentationModel):
    """Finds what is brighter (or, for `dark`, darker) than grey inside of the box, pixel by pixel."""

    def __init__(self, dark: bool = False) -> None:
        super().__init__()
        self.preprocessing = Preprocessing(SIDE, resize="squash", scaling="minmax")
        self.sign = nn.Parameter(torch.tensor(-1.0 if dark else 1.0))
        self.asked: list[list[float]] = []

    @property
    def mask_side(self) -> int:
        return SIDE

    def encode(self, images: Tensor) -> Tensor:
        return images[:, 0]

    def decode(self, features: Tensor, prompts: Any) -> tuple[Tensor, Tensor]:
        assert len(features) == 1, "an image is encoded once"
        masks = []
        middle = (GREY - DARK) / (BRIGHT - DARK) if features.amin() == 0 else 0.5
        for box in prompts.boxes.tolist():
            self.asked.append(box)
            inside = torch.zeros(SIDE, SIDE)
            x0, y0, x1, y1 = (round(edge) for edge in box)
            inside[y0 : y1 + 1, x0 : x1 + 1] = 1
            masks.append((self.sign * (features[0] - middle) > 0.05) * inside * 2 - 1)
        return torch.stack(masks)[:, None], torch.ones(len(prompts), 1)

    def at_size(self, image_size: int) -> SegmentationModel:
        raise NotImplementedError


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Bright]:
    """Models that a protocol's names give, made when they are asked for."""
    made: dict[str, Bright] = {}

    def make(spec: Any, device: torch.device, where: str) -> Bright:
        name = where.rpartition(".")[2]
        made[name] = Bright(dark=name == "Dark")
        return made[name].eval()

    monkeypatch.setattr(sources, "_make", make)
    return made


NODE = {"class_path": "trainer.models.LiteMedSAM", "init_args": {"weights": None, "image_size": SIDE}}


def write(path: Path, sets: list[dict[str, Any]], names: tuple[str, ...] = ("Bright",), **keys: Any) -> Path:
    content = {"models": dict.fromkeys(names, NODE), "sets": sets, **keys}
    path.write_text("# Which one is better?\n# Caveat: a test.\n#\n# Launch: trainer evaluate it\n\n" + dump(content))
    return path


def dump(content: Any) -> str:
    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return yaml.dump(content, Dumper=Plain, sort_keys=False)


def only(rows: list[Row], **values: Any) -> list[Row]:
    return [row for row in rows if all(getattr(row, name) == value for name, value in values.items())]


# --- cases


def test_the_slice_that_is_shown() -> None:
    case = SequenceCase(tuple(range(100, 112)), "v", {"even": (2, 3, 4, 5), "odd": (2, 3, 4), "one": (7,)})
    things, left_out = things_of(case, "3d", whole=False)
    assert things == [Thing("even", 4, 2, 5), Thing("odd", 3, 2, 4)], "the middle of n slices is number n // 2"
    assert left_out == ["one"]
    assert things_of(case, "video", whole=False)[0] == [Thing("even", 2, 2, 5), Thing("odd", 2, 2, 4)]
    whole, none = things_of(case, "3d", whole=True)
    assert whole == [Thing("even", 4, 0, 11), Thing("odd", 3, 0, 11), Thing("one", 7, 0, 11)]
    assert none == []
    assert things_of(case, "video", whole=True)[0][0] == Thing("even", 2, 2, 11)
    gone = SequenceCase(tuple(range(12)), "v", {"hole": (0, 1, 8, 9), "late": (11, 3)})
    assert things_of(gone, "3d", whole=False)[0][0].shown == 8, "of those that show it the nearest to slice 5"
    last = SequenceCase(tuple(range(12)), "v", {"end": (11,)})
    assert things_of(last, "video", whole=True) == ([], ["end"]), "nothing comes after the last frame"


def test_a_volume_of_shards_is_a_stack(shards: Path) -> None:
    data = ShardDataset(shards)
    cases = sequence_cases(data.index, None, None)
    assert len(cases) == 3
    assert cases[0].where == {"bright": (1, 2, 3, 4, 5, 6), "dark": (2, 3, 4), "speck": (4,)}
    stack = ShardStack(data, cases[0].positions)
    assert (len(stack), stack.size, stack.spacing, stack.name) == (DEPTH, (SIDE, SIDE), SPACING, cases[0].key)
    found = np.stack([stack.truth("bright", z) for z in range(DEPTH)])
    volume = next(n for n in range(3) if (found == (truth_of(n) == 1)).all())
    assert stack.image(3).shape == (1, SIDE, SIDE)
    assert (stack.image(3)[0].numpy() == np.where(truth_of(volume)[3] == 2, DARK, GREY) * (truth_of(volume)[3] != 1)
            + BRIGHT * (truth_of(volume)[3] == 1)).all()  # fmt: skip
    assert not stack.truth("bright", 0).any()
    assert sequence_cases(data.index, ["dark"], None)[0].where == {"dark": (2, 3, 4)}
    assert [case.key for case in sequence_cases(data.index, None, 2)] == [cases[0].key, cases[2].key]


def test_all_of_a_term_and_a_hole_between_slices(tmp_path: Path) -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[1, 1:3] = 1
    parts = [Target.from_mask(np.roll(mask, shift, 0), "nucleus", kind="instance") for shift in range(3)]
    with ShardWriter(tmp_path, 2, 2**20) as writer:
        for number in (0, 1, 4, 5, 9):
            near = {"previous": number in (1, 5), "next": number in (0, 4)}
            keys = {
                side: f"s-v-{number + step:02d}" if near[side] else None
                for side, step in (("previous", -1), ("next", 1))
            }
            origin = Provenance("s", "p", "v", "CT", "0" * 64, "axial", number, (1.0, 1.0), 2.0, {}, **keys)
            triplet = Triplet(f"s-v-{number:02d}", np.zeros((8, 8), np.uint8), tuple(parts), ("nucleus",), origin)
            writer.write(triplet.key, triplet.encode())
    write_index(tmp_path)
    shards = ShardDataset(tmp_path)
    cases = sequence_cases(shards.index, None, None)
    assert [len(case.positions) for case in cases] == [2, 2], "a hole makes two of one, and what is alone is none"
    assert len({case.key for case in cases}) == 2
    assert ShardStack(shards, cases[0].positions).truth("nucleus", 0).sum() == 6
    assert len(image_cases(shards.index, None, None)) == 5
    assert image_cases(shards.index, None, 3)[1].targets == (0, 1, 2)


# --- answers


def chain(volume: int, start: int, first: int, last: int, value: int = 1) -> np.ndarray:
    """What a perfect finder with the box chain answers: the truth within the box of the slice before."""
    truth = truth_of(volume) == value
    found = np.zeros_like(truth)
    found[start] = truth[start]
    for way in (range(start + 1, last + 1), range(start - 1, first - 1, -1)):
        for z in way:
            before = found[z - 1 if way.step > 0 else z + 1]
            rows, columns = np.flatnonzero(before.any(1)), np.flatnonzero(before.any(0))
            if len(rows):
                box = np.s_[z, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
                found[box] = truth[box]
    return found


def volume_behind(shards: Path, key: str) -> int:
    data = ShardDataset(shards)
    case = next(case for case in sequence_cases(data.index, None, None) if case.key == key)
    mine = ShardStack(data, case.positions).truth("bright", 3)
    return next(n for n in range(3) if (mine == (truth_of(n)[3] == 1)).all())


@pytest.fixture
def evaluated(shards: Path, tmp_path: Path, stubs: dict[str, Bright], trainer_command: Any) -> Callable[..., list[Row]]:
    def run(sets: list[dict[str, Any]], *arguments: object, **keys: Any) -> list[Row]:
        path = write(tmp_path / "p.yaml", [{"folder": str(shards), **one} for one in sets], **keys)
        code, _, err = trainer_command("evaluate", path, "--out", tmp_path / "out", "--device", "cpu", *arguments)
        assert code == 0, err
        return read(tmp_path / "out/per_case.csv")

    return run


def test_images_are_asked_with_tight_boxes(evaluated, stubs) -> None:
    rows = evaluated([{"kind": "2d", "terms": ["bright"]}])
    assert len(rows) == 3 * 6
    assert {(row.dsc, row.nsd, row.tolerance, row.initial, row.slices) for row in rows} == {(1, 1, "2 mm", "", 1)}
    assert sorted(stubs["Bright"].asked)[0] == [8, 10, 19, 16]


def test_boxes_can_be_enlarged(evaluated, stubs) -> None:
    rows = evaluated([{"kind": "2d", "terms": ["speck"], "margin": 5, "unit": "px", "tolerance": 1}])
    assert stubs["Bright"].asked == [[55, 55, 63, 63]] * 3, "within the image"
    assert {(row.dsc, row.tolerance) for row in rows} == {(1, "1 px")}


def test_volumes_are_followed_from_the_middle(evaluated, shards, tmp_path) -> None:
    rows = evaluated([{"name": "v", "kind": "3d", "initial": ["model", "truth", "prompt"]}], names=("Bright", "Dark"))
    found = only(rows, model="Bright", initial="Bright", term="bright")
    assert len(found) == 3
    for row in found:
        volume = volume_behind(shards, row.case)
        assert (row.shown, row.first, row.slices) == (4, 1, 6), "the middle of slices 1 to 6, top and bottom known"
        truth, answer = (truth_of(volume) == 1)[1:7], chain(volume, 4, 1, 6)[1:7]
        expected = volume_scores(answer, truth, SPACING)
        assert 0.5 < expected.dsc < 1
        assert row.dsc == pytest.approx(expected.dsc, abs=1e-6)
        assert row.nsd == pytest.approx(expected.nsd, abs=1e-6)
        assert row.hd95 == pytest.approx(expected.hd95, abs=1e-6)
        assert row.tolerance == "2 mm"
        rest = volume_scores(np.delete(answer, 3, 0), np.delete(truth, 3, 0))
        assert row.dsc_unprompted == pytest.approx(rest.dsc, abs=1e-6)
        (copy,) = only(rows, model=COPY, initial="Bright", term="bright", case=row.case)
        repeated = volume_scores(np.broadcast_to(truth[3], truth.shape), truth, SPACING)
        assert (copy.dsc, copy.nsd) == pytest.approx((repeated.dsc, repeated.nsd), abs=1e-6)
        for initial in ("truth", "prompt"):  # it finds the truth on the slice that is shown
            (other,) = only(rows, model="Bright", initial=initial, term="bright", case=row.case)
            assert other.dsc == pytest.approx(row.dsc)
    blind = only(rows, model="Dark", initial="Dark", term="bright")
    assert {(row.dsc, row.nsd, row.hd95) for row in blind} == {(0, 0, float("inf"))}
    assert {row.dsc for row in only(rows, model="Dark", initial="truth", term="bright")} != {0}, (
        "its first mask is given"
    )
    assert len(only(rows, model=COPY, initial="truth")) == 6, "the repeated truth is the same for every model"
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert {one["term"] for one in summary["left_out"]} == {"speck"}


def test_first_masks_of_another_model(evaluated) -> None:
    rows = evaluated([{"kind": "3d", "initial": ["model", "Bright"], "terms": ["bright"]}], names=("Dark", "Bright"))
    assert {(row.model, row.initial) for row in rows} == {
        ("Dark", "Dark"), ("Dark", "Bright"), ("Bright", "Bright"), (COPY, "Dark"), (COPY, "Bright"),
    }  # fmt: skip
    assert all(row.dsc == 0 for row in only(rows, model="Dark", initial="Dark"))
    # on the slice that is shown it has Bright's answer, on the others nothing
    assert all(row.dsc > 0 and row.dsc_unprompted == 0 for row in only(rows, model="Dark", initial="Bright"))


def test_whole_volumes(evaluated, shards) -> None:
    rows = evaluated([{"kind": "3d", "extent": "volume", "initial": ["prompt"]}])
    assert {(row.first, row.slices) for row in rows} == {(0, DEPTH)}
    assert {row.initial for row in only(rows, model=COPY)} == {"prompt to Bright"}
    speck = only(rows, model="Bright", term="speck")
    assert [(row.dsc, row.dsc_unprompted) for row in speck] == [(1, 1)] * 3, "it is where it is, and nowhere else"
    for row in only(rows, model="Bright", term="bright"):
        volume = volume_behind(shards, row.case)
        expected = volume_scores(chain(volume, 4, 0, DEPTH - 1), truth_of(volume) == 1, SPACING)
        assert row.dsc == pytest.approx(expected.dsc, abs=1e-6)


def test_videos_are_followed_from_their_first_frame(evaluated, shards) -> None:
    rows = evaluated([{"kind": "video", "terms": ["bright"], "unit": "px"}])
    for row in only(rows, model="Bright"):
        volume = volume_behind(shards, row.case)
        truth, answer = (truth_of(volume) == 1)[1:7], chain(volume, 1, 1, 6)[1:7]
        each = [2 * (a & t).sum() / (a.sum() + t.sum()) for a, t in zip(answer, truth, strict=True)]
        assert (row.shown, row.first, row.slices, row.hd95, row.tolerance) == (1, 1, 6, None, "2 px")
        assert row.dsc == pytest.approx(np.mean(each), abs=1e-6)
        assert row.dsc_unprompted == pytest.approx(np.mean(each[1:]), abs=1e-6)


# --- going on


def test_what_is_done_is_not_computed_again(evaluated, stubs, tmp_path) -> None:
    sets = [{"name": "i", "kind": "2d", "limit": 4}, {"name": "v", "kind": "3d", "initial": ["truth"]}]
    first = evaluated(sets)
    table = tmp_path / "out/per_case.csv"
    whole = table.read_text()
    stubs.clear()
    assert evaluated(sets) == first
    assert stubs == {}, "no model is even made"
    lines = whole.splitlines(keepends=True)
    table.write_text("".join(lines[:-3]) + lines[-3][:20])  # killed while it wrote
    again = evaluated(sets)
    assert list(stubs) == ["Bright"]
    timeless = [{replace(row, seconds=0) for row in rows} for rows in (first, again)]
    assert timeless[0] == timeless[1]
    stubs.clear()
    more = evaluated(sets, names=("Bright", "Dark"))
    assert list(stubs) == ["Dark"], "a new model does not make the others' rows again"
    assert len(more) == len(first) + sum(row.model == "Bright" for row in first)
    stubs.clear()
    changed = evaluated([{**sets[0], "margin": 1}, sets[1]])
    assert list(stubs) == ["Bright"]
    assert {row.made_by for row in only(changed, set="i")}.isdisjoint(row.made_by for row in first)
    kept = [row for row in more if row.set == "v" and row.model != "Dark"]
    assert only(changed, set="v") == kept, "the other set is as it was"
    assert not only(changed, model="Dark"), "rows of what is not asked for any more are gone"
    (tmp_path / "out/panels").rename(tmp_path / "elsewhere")
    stubs.clear()
    evaluated([{**sets[0], "margin": 1}, sets[1]])
    assert list(stubs) == ["Bright"], "pictures that are gone are made again"


def objects_of(path: Path) -> list[int]:
    """Number of objects in each section of the tables, as both the summary and the Markdown have it."""
    counts = [section["objects"] for section in json.loads((path / "summary.json").read_text())["sections"]]
    for name in ("summary.md", "report.html"):
        found = re.findall(r": (\d+) objects?, the same for all", (path / name).read_text())
        assert [int(count) for count in found] == counts, name
    return counts


def test_tables_are_of_what_is_asked_for_now(evaluated, stubs, tmp_path) -> None:
    out = tmp_path / "out"
    images, volumes = {"name": "i", "kind": "2d"}, {"name": "v", "kind": "3d"}
    first = evaluated([images, volumes], pictures=0)
    assert objects_of(out) == [3 * (6 + 3 + 1), 3 * 2]
    stubs.clear()
    assert evaluated([{**images, "terms": ["dark"]}, {**volumes, "terms": ["dark"]}], pictures=0) == first, (
        "kept for later"
    )
    assert objects_of(out) == [3 * 3, 3]
    line = json.loads((out / "summary.json").read_text())["sections"][1]["lines"][0]
    assert line["scores"]["all"]["dsc"]["n"] == 3
    assert evaluated([{**images, "limit": 2}, volumes], "--limit", 1, pictures=0) == first
    assert objects_of(out)[1] == 2, "one volume"
    assert 1 <= objects_of(out)[0] <= 3, "one image"
    assert stubs == {}, "nothing was computed"
    assert evaluated([images, volumes], pictures=0) == first
    assert objects_of(out) == [30, 6]


def test_rows_of_other_versions_are_left_aside(shards, tmp_path, stubs, trainer_command, monkeypatch) -> None:
    path = write(tmp_path / "p.yaml", [{"folder": str(shards), "kind": "2d", "limit": 2}])
    command = ("evaluate", path, "--out", tmp_path / "out", "--device", "cpu")
    assert "left aside" not in trainer_command(*command)[1]
    before = read(tmp_path / "out/per_case.csv")
    stubs.clear()
    assert "left aside" not in trainer_command(*command)[1] and stubs == {}
    monkeypatch.setattr(sources, "versions", lambda: {"torch": "99.0"})
    (line,) = [line for line in trainer_command(*command)[1].splitlines() if "left aside" in line]
    assert f"per_case.csv: {len(before)} earlier rows left aside: {len(before)} computed with other versions of" in line
    assert list(stubs) == ["Bright"]
    after = read(tmp_path / "out/per_case.csv")
    assert len(after) == len(before), "old ones do not stand beside new ones"
    assert {row.made_by for row in after}.isdisjoint(row.made_by for row in before)
    write(path, [{"folder": str(shards), "kind": "2d", "limit": 2, "margin": 1}])
    assert f"{len(before)} of another model, other data or other settings" in trainer_command(*command)[1]
    write(path, [{"folder": str(shards), "kind": "2d", "limit": 2, "margin": 1}], names=("Dark",))
    assert f"{len(before)} of models, sets or first masks that the protocol does" in trainer_command(*command)[1]
    monkeypatch.setattr(sources, "__version__", "99.0")
    assert f"{len(before)} computed with other versions" in trainer_command(*command)[1]


def test_one_kind_and_a_few_cases(evaluated) -> None:
    sets = [{"name": "i", "kind": "2d"}, {"name": "v", "kind": "3d"}]
    rows = evaluated(sets, "--only", "3d", "--limit", 1)
    assert {row.kind for row in rows} == {"3d"}
    assert len({row.case for row in rows}) == 1
    after = evaluated(sets, "--only", "2d", "--limit", 2)
    assert only(after, kind="3d") == rows, "the other kind's rows stay"
    assert len({row.case for row in only(after, kind="2d")}) == 2


def test_runs_and_recipes_score_as_trainer_test_does(
    tiny_run: Path, tiny_shards: Path, tmp_path: Path, trainer_command
) -> None:
    models = {"tuned": {"run": str(tiny_run)}, "untouched": {"recipe": str(tiny_run / "recipe.yaml")}}
    content = {"models": models, "sets": [{"folder": str(tiny_shards / "test"), "kind": "2d"}]}
    (tmp_path / "p.yaml").write_text("# Same?\n" + dump(content))
    code, _, err = trainer_command("evaluate", tmp_path / "p.yaml", "--out", tmp_path / "out", "--device", "cpu")
    assert code == 0, err
    rows = read(tmp_path / "out/per_case.csv")
    for name in ("tuned", "untouched"):
        expected = {
            (row.key, row.target): (row.dsc, row.iou, row.nsd)
            for row in read_scores(tiny_run / f"evaluation/{name}/per_case.csv")
        }
        found = {(row.case, row.target): (row.dsc, row.iou, row.nsd) for row in rows if row.model == name}
        assert found.keys() == expected.keys()
        for place, scores in expected.items():
            assert found[place] == pytest.approx(scores, abs=2e-3), "but for the precision of the run"


def test_models_and_data_may_be_named_without_a_protocol(
    tiny_run: Path, tiny_shards: Path, tmp_path: Path, trainer_command
) -> None:
    out, data = tmp_path / "out", tiny_shards / "test"
    models = (f"before={tiny_run / 'recipe.yaml'}", f"after={tiny_run / 'checkpoints/last.ckpt'}")
    asked = ("--data", data, "--prompt", "box", "point", "--limit", 2, "--device", "cpu")
    code, told, err = trainer_command("evaluate", *models, *asked, "--out", out)
    assert code == 0, err
    assert "8 cases computed" in told
    rows = read(out / "per_case.csv")
    assert {(row.model, row.set, row.prompt) for row in rows} == {
        (model, f"test by {prompt}", prompt) for model in ("before", "after") for prompt in ("box", "point")
    }
    assert all(row.hd95 is not None and row.iou == pytest.approx(row.dsc / (2 - row.dsc), abs=1e-5) for row in rows)

    # what it did is a protocol, with the same answers
    again = ("evaluate", out / "protocol.yaml", "--limit", 2, "--device", "cpu", "--out", out)
    code, told, err = trainer_command(*again)
    assert code == 0 and "0 cases computed, 8 were there already" in told, err
    assert "asked in two ways" in trainer_command("evaluate", "--help")[1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("nowhere", "--data", "DATA"), "nowhere: there is no such run, checkpoint or recipe"),
        (("a.ckpt", "--data", "DATA"), "no checkpoint in the folder of its run"),
        (("RUN", "a=RUN", "a=RUN", "--data", "DATA"), "two models are called 'a': give each a name"),
        (("RUN",), "evaluated on what? Give --data FOLDER"),
        (("RUN", "b=RUN"), "several models, and no data"),
        (("RUN", "--data", "DATA", "DATA", "--out", "o"), "--data names one folder twice"),
        (("RUN", "--data", "DATA"), "where shall the results go? Give --out FOLDER"),
        (("RUN", "--data", "DATA", "--prompt", "mask"), "prompt mask: in an image the mask is the answer"),
        (("RUN", "--data", "DATA", "--prompt", "boxes"), "boxes"),
        (("RUN", "--data", "elsewhere", "--out", "o"), "set 'elsewhere'"),
        (("p.yaml", "--prompt", "point"), "--prompt belongs to --data"),
    ],
)
def test_mistakes_in_models_and_data(
    arguments, expected, tiny_run, tiny_shards, tmp_path, trainer_command, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.ckpt").write_bytes(b"x")
    given = [one.replace("RUN", str(tiny_run)).replace("DATA", str(tiny_shards / "test")) for one in arguments]
    code, _, err = trainer_command("evaluate", *given)
    assert code == 2 and expected in err, err
    assert err.count("trainer: error") == 1 and "Traceback" not in err


# --- tables


def row(model: str, case: str, dsc: float, initial: str = "", modality: str = "CT", **values: Any) -> Row:
    kind = "3d" if initial else "2d"
    first = Row(
        model, initial, "s", kind, "box", "d", modality, case, "liver", -1, 2, 0, 5, dsc, dsc / (2 - dsc), dsc / 2,
        None, dsc if initial else None, "2 mm", 1.0, "x",
    )  # fmt: skip
    return replace(first, **values)


def test_only_what_all_have_answered_is_compared() -> None:
    rows = [row("A", "1", 0.5), row("A", "2", 0.7), row("A", "3", 0.1), row("B", "2", 0.9), row("B", "1", 0.6)]
    section = section_of(
        "2d", "box", ["s"], [("A", ""), ("B", ""), ("C", "")], [*rows, row("A", "1", 0.0, set="other")]
    )
    assert [one.case for one in section.rows["A", ""]] == [one.case for one in section.rows["B", ""]] == ["1", "2"]
    assert section.partial == 1
    assert ("C", "") not in section.rows
    found = figures(section.rows["B", ""], "dsc")
    assert (found.n, found.mean, found.q1, found.median, found.q3) == pytest.approx((2, 0.75, 0.675, 0.75, 0.825))
    dsc, nsd = differences(section)
    assert (dsc.line, dsc.against, dsc.metric, nsd.metric) == (("B", ""), ("A", ""), "dsc", "nsd")
    assert dsc.found.gain == pytest.approx(0.15)
    assert dsc.found.gain_ci95 == pytest.approx(bootstrap_ci95(np.array([0.1, 0.2])))
    assert nsd.found.gain == pytest.approx(0.075)


def test_figures_by_modality_and_against_the_baseline() -> None:
    rows = [
        *(row("A", case, 0.8, "A", modality) for case, modality in (("1", "CT"), ("2", "CT"), ("3", "MR"))),
        *(row(COPY, case, 0.5, "A", modality) for case, modality in (("1", "CT"), ("2", "CT"), ("3", "MR"))),
        *(row("B", case, 0.9, "truth", modality) for case, modality in (("1", "CT"), ("2", "CT"), ("3", "MR"))),
    ]
    lines = [("A", "A"), ("B", "truth"), (COPY, "A"), (COPY, "truth")]
    section = section_of("3d", "box", ["s"], lines, rows)
    assert section.modalities == ["CT", "MR"]
    assert figures(section.rows["A", "A"], "dsc", "CT").n == 2
    assert section.metrics == ["dsc", "nsd", "dsc_unprompted"]
    pairs = [(one.line, one.against) for one in differences(section) if one.metric == "dsc"]
    assert pairs == [(("B", "truth"), ("A", "A")), (("A", "A"), (COPY, "A"))]
    names = [label(line) for line in (*lines, ("A", "prompt"), copy_of(("A", "prompt")))]
    assert names == [
        "A", "B, from the true mask", "first mask repeated (A)", "first mask repeated (truth)", "A, prompted directly",
        "first mask repeated (prompt to A)",
    ]  # fmt: skip
    text = markdown("p", "Why?", [section], [("s", "4", "speck")])
    assert "| DSC | CT | MR | all | n | time an object |" in text
    assert "| A | 0.800; 0.800 (0.800–0.800) |" in text
    assert "| B, from the true mask | A | +0.100 (+0.100 to +0.100)" in text
    assert "1 object is left out, being in one slice alone: speck of 4 (s)." in text


def test_the_page_shows_every_model_on_the_same_objects(evaluated, tmp_path) -> None:
    evaluated(
        [{"name": "i<", "kind": "2d", "limit": 3}, {"name": "v", "kind": "3d"}],
        names=("Bright", "Dark & co"),
        pictures=2,
    )
    page = (tmp_path / "out/report.html").read_text()
    assert page.count('class="tile"') == 2 * 2 * 2, "sets, objects, models"
    assert not re.search(r'(src|href)="(?!#|data:)', page), "it needs no other file"
    assert "<script" not in page
    assert "i&lt;" in page
    assert "i<," not in page
    assert "Dark &amp; co" in page
    assert "Which one is better?" in page
    assert "<b>Caveat.</b> a test." in page
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert [section["kind"] for section in summary["sections"]] == ["2d", "3d"]
    assert summary["sections"][1]["lines"][0]["scores"]["all"]["dsc"]["n"] == 6


# --- recipes


def test_the_tiny_recipe_runs(shards: Path, tmp_path: Path, trainer_command) -> None:
    pytest.importorskip("sam2")
    recipe = (REPOSITORY / "recipes/evaluation/tiny.yaml").read_text().replace("data/mine/test", str(shards))
    (tmp_path / "tiny.yaml").write_text(recipe)
    code, out, err = trainer_command("evaluate", tmp_path / "tiny.yaml", "--out", tmp_path / "out", "--limit", 1)
    assert code == 0, err
    with (tmp_path / "out/per_case.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    count = {name: sum(row["set"] == name for row in rows) for name in ("volumes", "whole volumes", "videos")}
    # three models from their own mask, SAM's and the truth; SAM's own is SAM's; as many repetitions as first masks
    assert count == {"volumes": 2 * (8 + 4), "whole volumes": 3 * (3 + 3), "videos": 2 * (3 + 3)}
    assert "0 were there already" in out
    assert (tmp_path / "out/report.html").is_file()


@pytest.mark.parametrize(
    "recipe", sorted((REPOSITORY / "recipes/evaluation").glob("*.yaml")), ids=lambda path: path.stem
)
def test_protocols_open_with_question_and_command(recipe: Path) -> None:
    pytest.importorskip("sam2")  # a class of theirs needs it
    loaded = load_protocol(recipe)
    assert loaded.question.partition("?")[1] == "?"
    assert loaded.protocol.out
    text = recipe.read_text()
    assert f"# Launch: trainer evaluate recipes/evaluation/{recipe.name}" in text
    for name in re.findall(r"recipes/[\w/.]+\.yaml", text):
        assert (REPOSITORY / name).is_file(), name


# --- mistakes

IMAGES = {"folder": "FOLDER", "kind": "2d"}
VOLUMES = {"folder": "FOLDER", "kind": "3d"}
MISTAKES = {
    "an unknown key": ({"set": [IMAGES]}, "unknown key 'set'; did you mean 'sets'?"),
    "an unknown key of a set": ({"sets": [{**IMAGES, "promt": "box"}]}, "unknown key 'promt'; did you mean 'prompt'?"),
    "an unknown prompt": ({"sets": [{**IMAGES, "prompt": "word"}]}, "sets[0].prompt: expected one of box, point, mask"),
    "no sets": ({"sets": []}, "models and sets name at least one each"),
    "a folder that is not there": ({"sets": [{**IMAGES, "folder": "nowhere"}]}, "set 'nowhere': nowhere: no index"),
    "an unknown term": ({"sets": [{**IMAGES, "terms": ["brigth"]}]}, "it has no 'brigth'; did you mean 'bright'?"),
    "single images as volumes": ({"sets": [{**VOLUMES, "folder": "SINGLE"}]}, "no volumes: none of its 2 images"),
    "objects of one slice": ({"sets": [{**VOLUMES, "terms": ["speck"]}]}, "every object of it is in one slice alone"),
    "the mask of an image": ({"sets": [{**IMAGES, "prompt": "mask"}]}, "in an image the mask is the answer"),
    "first masks of images": ({"sets": [{**IMAGES, "initial": ["truth"]}]}, "an image has no other slices"),
    "a mask twice": ({"sets": [{**VOLUMES, "prompt": "mask", "initial": ["model"]}]}, "initial is then [truth]"),
    "an unknown first mask": ({"sets": [{**VOLUMES, "initial": ["Brigth"]}]}, "no model 'Brigth'; did you mean"),
    "a set twice": ({"sets": [IMAGES, IMAGES]}, "is there twice as 2d: give it a name"),
    "a negative tolerance": ({"sets": [{**IMAGES, "tolerance": -1}]}, "tolerance and margin are 0 or more"),
    "no models": ({"models": {}}, "models and sets name at least one each"),
    "models as a list": ({"models": [NODE]}, "models: expected names, each with a run"),
    "a model that is nothing": ({"models": {"A": {}}}, "models.A: give one of run, recipe and class_path, not none"),
    "a model that is two": ({"models": {"A": {**NODE, "run": "r"}}}, "not run and class_path"),
    "a run that is not there": ({"models": {"A": {"run": "runs/nowhere"}}}, "models.A: runs/nowhere is no run"),
    "a recipe that is not there": ({"models": {"A": {"recipe": "no.yaml"}}}, "recipe no.yaml: cannot be read"),
    "a checkpoint without a run": ({"models": {"A": {**NODE, "checkpoint": "last"}}}, "belong to a run"),
    "a reserved name": ({"models": {"truth": NODE}}, "'truth' means something else here"),
    "a class from elsewhere": ({"models": {"A": {"class_path": "os.system"}}}, "outside the allowed packages"),
    "a misspelt argument": (
        {"models": {"A": {**NODE, "init_args": {"wieghts": None}}}},
        "models.A: LiteMedSAM has no argument 'wieghts'; did you mean 'weights'?",
    ),
    "a class that is no model": ({"models": {"A": {"class_path": "trainer.losses.DiceCrossEntropy"}}}, "models.A: "),
    "SAM3": (
        {"models": {"A": {"class_path": "trainer.models.SAM3", "init_args": {"weights": None, "image_size": 112}}}},
        "models.A: SAM3 is asked in words",
    ),
    "a training's recipe": ({"models": None, "model": NODE}, "this is a recipe of a training"),
}  # fmt: skip


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images that do not follow each other."""
    folder = tmp_path_factory.mktemp("single")
    target = Target.from_mask(np.eye(8, dtype=np.uint8), "line")
    with ShardWriter(folder, 2, 2**20) as writer:
        for number in range(2):
            origin = Provenance("s", f"p{number}", f"v{number}", "US", "0" * 64)
            triplet = Triplet(f"s-{number}", np.zeros((8, 8), np.uint8), (target,), ("line",), origin)
            writer.write(triplet.key, triplet.encode())
    write_index(folder)
    return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name, shards, single, tmp_path, trainer_command, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes, expected = MISTAKES[name]
    content = {"models": {"Bright": NODE}, "sets": [IMAGES], **changes}
    content = {key: value for key, value in content.items() if value is not None}
    text = dump(content).replace("FOLDER", str(shards)).replace("SINGLE", str(single))
    (tmp_path / "p.yaml").write_text(text)
    code, _, err = trainer_command("evaluate", "p.yaml", "--out", "out", "--limit", 1, "--device", "cpu")
    assert code == 2, err
    lines = [line for line in err.splitlines() if line.startswith("trainer: error")]
    assert len(lines) == 1, err
    assert "p.yaml" in lines[0] or "recipe" in lines[0]
    assert expected in lines[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("nowhere.yaml", "--out", "out"), "there is no such protocol"),
        (("p.yaml",), "where shall the results go?"),
        (("p.yaml", "--out", "out", "--only", "video"), "it has no set of kind video"),
        (("p.yaml", "--out", "out", "--limit", "0"), "--limit 0: 1 or more"),
        (("p.yaml", "--out", "p.yaml/out"), "cannot be written"),
        (("p.yaml", "--out", "out", "--device", "tpu"), "--device tpu"),
        (("p.yaml", "--out", "out", "--limits", "2"), "did you mean '--limit'?"),
    ],
)
def test_mistakes_on_the_command_line(arguments, expected, shards, tmp_path, trainer_command, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "p.yaml", [{"folder": str(shards), "kind": "2d"}])
    code, _, err = trainer_command("evaluate", *arguments)
    assert (code, len(err.splitlines())) == (2, 1), err
    assert expected in err


def test_pixels_that_are_no_number_and_slices_of_different_sizes(tmp_path: Path) -> None:
    target = Target.from_mask(np.eye(8, dtype=np.uint8), "line")
    with ShardWriter(tmp_path, 2, 2**20) as writer:
        for number, image in enumerate((np.full((8, 8), np.nan, np.float32), np.zeros((8, 8), np.float32))):
            keys = {"next": "s-1"} if number == 0 else {"previous": "s-0"}
            origin = Provenance("s", "p", "v", "CT", "0" * 64, "axial", number, None, None, {}, **keys)
            triplet = Triplet(f"s-{number}", image, (target,), ("line",), origin)
            writer.write(triplet.key, triplet.encode())
    write_index(tmp_path)
    data = ShardDataset(tmp_path)
    stack = ShardStack(data, sequence_cases(data.index, None, None)[0].positions)
    assert stack.spacing is None
    with pytest.raises(UserError, match=r"sample 's-0' has pixels that are no number"):
        stack.image(0)
    heights = np.array([8, 9])
    data.index = replace(data.index, height=heights)
    with pytest.raises(UserError, match=r"slices have different sizes \(8 x 8 and 8 x 9\)"):
        ShardStack(data, [0, 1])
