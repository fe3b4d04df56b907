"""The command, what it prints and writes, and its exit code."""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lint_corpus import Splits, clean, disc, with_mask, with_origin, with_target, write
from PIL import Image
from pycocotools import mask as coco_mask

from data_shards import progress
from data_shards.dataset import ShardDataset
from data_shards.errors import CommandParser, UserError
from data_shards.lint import findings, lint
from data_shards.lint.command import HELP, add_arguments, run
from data_shards.lint.findings import CHECKS, Finding, Report
from data_shards.lint.page import EXAMPLES, render
from data_shards.lint.pictures import COLOURS, SIDE, draw
from data_shards.triplet import Target


def command(*arguments: object) -> int:
    parser = CommandParser(prog="data-shards lint", description=HELP)
    add_arguments(parser)
    values: argparse.Namespace = parser.parse_args([str(argument) for argument in arguments])
    return run(values)


def damaged() -> Splits:
    """Errors, warnings and notes; terms that would be markup if they were not escaped."""
    splits = clean()
    train = splits["train"]
    for number in range(20, 36):
        train[number] = with_mask(train[number], disc(10, 9, 4)) if train[number].targets else train[number]
    train[4] = with_target(train[4], box=(1, 2, 30, 40), term="<script>alert('x')</script>")
    train[4] = replace(train[4], looked_for=(*train[4].looked_for, train[4].targets[0].term))
    train[7] = replace(train[7], image=splits["test"][0].image[:, ::-1])
    train[8] = with_origin(train[8], patient="p-test-1", volume="v-test-1")
    return splits


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("lint") / "a corpus <b>", damaged())


@pytest.fixture(scope="module")
def report(corpus: Path) -> Report:
    return lint(corpus)


@pytest.mark.parametrize(
    ("worst", "codes"), [("error", [2, 2, 0]), ("warning", [0, 1, 0]), ("note", [0, 0, 0]), (None, [0, 0, 0])]
)
def test_the_exit_code_tells_the_worst(worst: str | None, codes: list[int], tmp_path: Path) -> None:
    splits = clean()
    faults = {
        "error": lambda: splits["train"].__setitem__(4, with_target(splits["train"][4], area=1)),
        "warning": lambda: splits["train"].__setitem__(5, with_mask(splits["train"][5], disc(10, 9, 4))),
        "note": lambda: splits["train"].__setitem__(7, with_mask(splits["train"][7], disc(40, 40, 2))),
    }
    for severity in ("error", "warning", "note"):
        if worst is not None and ["error", "warning", "note"].index(severity) >= ["error", "warning", "note"].index(
            worst
        ):
            faults[severity]()
    folder = write(tmp_path, splits)
    assert lint(folder).worst == worst
    assert [command(folder, "--fail-on", level) for level in ("error", "warning", "never")] == codes
    assert command(folder) == codes[0]


def test_the_terminal_shows_counts_and_a_few_examples(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(corpus) == 2
    out = capsys.readouterr().out
    assert re.search(r"│ warning +│ mask-on-nothing +│ +(\d+) │ +│ +\1 │", out), out
    count = int(re.search(r"mask-on-nothing +│ +(\d+)", out)[1])  # type: ignore[index]
    assert count > 8 and f"… and {count - 3:,} more" in out
    assert "train toy-train-1-1: the box of '<script>alert('x')</script>' is (1, 2, 30, 40), that of its mask (" in out
    assert len(out.splitlines()) < 60
    assert re.search(
        r"Mend the errors before you train: \d+ errors, \d+ warnings and \d+ notes? found in 48 samples of 2 spl", out
    )


def test_checks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--checks") == 0
    out = " ".join(capsys.readouterr().out.split())
    for check in CHECKS.values():
        assert f"{check.code} {check.severity} {check.about}" in out or check.code in out


def test_json_holds_everything(corpus: Path, report: Report, tmp_path: Path) -> None:
    assert command(corpus, "--json", tmp_path / "a.json", "--workers", 2) == 2

    def refuse(text: str) -> None:
        raise AssertionError(text)

    content = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert content["schema_version"] == 1
    assert {name: split["index_sha256"] for name, split in content["splits"].items()} == {
        name: ShardDataset(corpus / name).index.sha256 for name in ("test", "train")
    }
    assert len(content["findings"]) == len(report.findings) == report.counts.total()
    for row, item in zip(content["findings"], report.findings, strict=True):
        assert (row["code"], row["severity"], row["split"], row["key"], row["term"], row["message"]) == (
            *(item.code, item.severity, item.split, item.key, item.term, item.message),
        )  # fmt: skip
    copy = next(row for row in content["findings"] if row["code"] == "near-duplicate")
    assert copy["key"] == "toy-test-0-0" and copy["other"] == {"split": "train", "key": "toy-train-2-1", "number": 7}
    assert content["totals"] == {name: report.total(name) for name in ("error", "warning", "note")}


class Page(HTMLParser):
    """Collects what a page has, and whether its elements are closed."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, list[str]] = {}
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "section":
            self.here: list[str] = self.sections.setdefault(str(dict(attributes).get("id")), [])
        if tag == "img":
            self.here.append(str(dict(attributes)["src"]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def picture(uri: str) -> np.ndarray:
    kind, _, content = uri.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content, validate=True))).convert("RGB"))


def test_the_page_stands_alone(corpus: Path, report: Report, tmp_path: Path) -> None:
    assert command(corpus, "--html", tmp_path / "page.html") == 2
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert page.open == []
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form"}
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("data:image/png;base64,", "#"))  # type: ignore[union-attr]
    assert "http" not in re.sub(r'http-equiv|src="[^"]*"', "", text)
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert report.summary() in page.words and "a corpus <b>" in page.words
    assert "<script>alert('x')</script>" in page.words and "<script" not in text
    for check, _ in report.found():
        assert check.code in page.sections and f'href="#{check.code}"' in text


def test_the_page_shows_the_offenders(corpus: Path, report: Report) -> None:
    page = Page(render(report))
    assert len(page.sections["mask-on-nothing"]) == EXAMPLES
    total = report.counts["mask-on-nothing", "train"]
    assert f"The first {EXAMPLES} of {total:,} are shown" in page.words
    assert len(page.sections["near-duplicate"]) == 2 and len(page.sections["wrong-box"]) == 1
    assert page.sections["patient-in-splits"] == []
    mirrored, original = (picture(uri) for uri in page.sections["near-duplicate"])
    assert mirrored.shape == original.shape == (192, 192, 3)
    grey = [np.ptp(image.astype(int), axis=2) < 8 for image in (mirrored[:, ::-1], original)]
    both = grey[0] & grey[1]
    difference = np.abs(mirrored[:, ::-1].astype(int) - original)[both]
    assert both.mean() > 0.8 and np.median(difference) <= 4


def test_a_picture_shows_the_outline_where_the_mask_is() -> None:
    triplet = clean()["train"][4]
    image = picture(draw(triplet, 0))
    mask = triplet.targets[0].mask() != 0
    inner = mask & np.roll(mask, 1, 0) & np.roll(mask, -1, 0) & np.roll(mask, 1, 1) & np.roll(mask, -1, 1)
    orange = (image[..., 0] > 200) & (image[..., 2] < 60)
    scale = len(image) // len(mask)
    edge = (mask & ~inner).repeat(scale, 0).repeat(scale, 1)
    assert orange.sum() > 20 and edge[orange].all()


def test_a_mask_without_a_pixel_leaves_no_mark() -> None:
    triplet = clean()["train"][4]
    counts = coco_mask.encode(np.zeros(triplet.image.shape, np.uint8, order="F"))["counts"].decode()
    assert triplet.targets[0].box[0] > 2
    empty = with_target(triplet, counts=counts, box=(0, 0, 0, 0), area=0)
    white = [(picture(draw(one, 0)) == 255).all(axis=2) for one in (triplet, empty)]
    assert white[0].sum() > 20 and not white[1].any()
    assert not (picture(draw(empty, 0)) == (255, 176, 0)).all(axis=2).any()
    # A box that nothing contradicts is shown, though the mask cannot be read.
    assert (picture(draw(with_target(triplet, counts="0"), 0)) == 255).all(axis=2).sum() > 20


def test_the_page_explains_its_pictures(corpus: Path, report: Report, tmp_path: Path) -> None:
    text = render(report)
    page = Page(text)
    styles = [str(attributes["style"]) for tag, attributes in page.elements if tag == "span" and "style" in attributes]
    assert styles == [f"outline: 2px {kind} rgb{colour}" for kind, colour in zip(
        ("solid", "solid", "dotted"), COLOURS, strict=True)]  # fmt: skip
    for words in ("orange outline: the target", "blue outline: the other", "white dotted box: the box"):
        assert words in page.words
    copy = next(item for item in report.findings if item.code == "near-duplicate")
    assert copy.other is not None
    place = f"left: {copy.split} {copy.key}; right: {copy.other.split} {copy.other.key}"
    assert place in page.words and "the left one is the sample that the finding names" in page.words
    pictures = [attributes for tag, attributes in page.elements if tag == "img"]
    left, right = re.findall(r'<img [^>]*alt="([^"]*)"', text[text.index('class="tiles pair"') :])[:2]
    assert left.startswith(f"{copy.split} {copy.key}: ") and right.startswith(f"{copy.other.split} {copy.other.key}: ")
    assert pictures and all(re.match(r"(train|test) toy-\S+: ", str(attributes["alt"])) for attributes in pictures)
    write(tmp_path, {"train": clean()["train"][:1]})
    assert "orange outline" not in render(lint(tmp_path))  # nothing is drawn


def test_a_phone_sees_all_findings_and_no_split(report: Report) -> None:
    text = render(report)
    narrow = text[text.index("@media (max-width: 600px)") :]
    rule = re.search(r"\.counts :is\(th, td\):nth-child\(n\+3\):not\(:last-child\) { display: none; }", narrow)
    assert rule is not None
    table = text[text.index('<section class="counts">') :]
    names = re.findall(r"<th[^>]*>([^<]*)</th>", table[: table.index("</thead>")])
    assert names == ["", "Check", "What it finds", "train", "test", "All"]


def test_a_log_hears_of_it_every_ten_seconds(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = itertools.count(0, 2)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert command(corpus) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 5
    for line in lines:
        assert re.fullmatch(r"lint: \d+/48, \d+/s, left 0:\d\d:\d\d", line), line


@pytest.mark.parametrize("shape", [(5, 700), (3, 2), (2000, 1500), (1, 1), (300, 200, 3)])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64", "uint16"])
def test_any_image_and_a_single_pixel_can_be_drawn(shape: tuple[int, ...], dtype: str) -> None:
    values = np.random.default_rng(0).random(shape) * 200
    if np.dtype(dtype).kind == "f":
        values.flat[::3] = np.nan
        values.flat[0] = -np.inf
    mask = np.zeros(shape[:2], bool)
    mask[-1, -1] = True
    triplet = replace(clean()["train"][4], image=values.astype(dtype), targets=(Target.from_mask(mask, "liver"),))
    with np.errstate(all="raise"):
        image = picture(draw(triplet, 0))
    assert max(image.shape[:2]) <= SIDE
    assert ((image[..., 0] > 200) & (image[..., 2] < 60)).any()


def test_samples_that_are_gone_leave_a_page(corpus: Path, report: Report, tmp_path: Path) -> None:
    folder = write(tmp_path / "x", damaged())
    before = lint(folder)
    for path in (folder / "train").glob("*.tar"):
        path.write_bytes(b"")
    page = Page(render(before))
    assert page.words.count("cannot be shown") > EXAMPLES and page.sections["wrong-box"] == []
    after = lint(folder)
    assert after.counts["unreadable-sample", "train"] == 36
    assert Page(render(after)).open == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "lint: DIR is missing: the folder of a corpus; see data-shards lint --help"),
        (("DIR", "--ignore", "wrong-boxes"), "no check is called 'wrong-boxes'; did you mean 'wrong-box'?"),
        (
            ("DIR", "--json", "no/such/a.json"),
            "--json no/such/a.json: cannot be written there: name a file in a folder",
        ),
        (("DIR", "--html", "."), "--html .: cannot be written there"),
        (("DIR", "--sample", "0"), "argument --sample: '0' is no whole number from 1 on"),
        (("DIR", "--workers", "-2"), "argument --workers: '-2' is no whole number"),
        (("s3://bucket/x",), "s3://bucket/x: this command reads folders of this machine"),
        (("DIR", "--fail-on", "notes"), "argument --fail-on: invalid choice: 'notes'"),
        (("nowhere",), "nowhere: no such folder: name the folder of a corpus"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], message: str, corpus: Path) -> None:
    with pytest.raises(UserError) as caught:
        command(*(str(corpus) if item == "DIR" else item for item in arguments))
    assert str(caught.value).startswith(message)


def test_very_many_findings_are_counted_and_not_all_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "MOST_KEPT", 5)
    report = Report("x", splits={"train": findings.SplitFacts(9, 9, ""), "test": findings.SplitFacts(9, 9, "")})
    for number in range(9):
        for split in ("train", "test"):
            report.add(Finding("empty-mask", "error", "m", split=split, number=number))
    report.add(Finding("wrong-box", "error", "m", split="train"))
    assert report.counts == {("empty-mask", "train"): 9, ("empty-mask", "test"): 9, ("wrong-box", "train"): 1}
    assert [item.code for item in report.findings].count("empty-mask") == 5
    assert report.total("error") == 19 and len(report.findings) == 6


def test_help_is_light() -> None:
    import subprocess
    import sys

    code = "import sys, data_shards.lint.command; print({'numpy', 'PIL', 'scipy', 'rich'} & sys.modules.keys())"
    done: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
