from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from toy import make_case, make_inputs, save_nifti, write_spec

from data_shards.cli import main
from data_shards.index import Index
from data_shards.schema import from_mapping
from data_shards.spec import Spec
from data_shards.verify import Verification

IMAGE, MASK = "imgs/PAT1_scan.nii.gz", "gts/PAT1_scan_seg.nii.gz"


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*arguments, "--help"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and max(map(len, captured.out.splitlines())) <= 100
    return captured.out


def test_help_teaches_with_a_spec_that_works(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = help_of(capsys)
    for command in ("build", "merge", "verify", "inspect", "lint", "stats", "index"):
        assert f"data-shards {command} " in text
        assert help_of(capsys, command).startswith(f"usage: data-shards {command}")
    block = re.search(r"^  dataset:.*?(?=^\S)", text, re.MULTILINE | re.DOTALL)
    assert block
    spec = from_mapping(Spec, yaml.safe_load(block[0]), "help")
    for number in range(5):
        image, labels = make_case(number)
        save_nifti(tmp_path / "imgs" / f"P{number}_a.nii.gz", image)
        save_nifti(tmp_path / "gts" / f"P{number}_a_seg.nii.gz", labels)
    (tmp_path / "spec.yaml").write_text(block[0])
    assert main(["build", str(tmp_path / "spec.yaml"), "--out", str(tmp_path / "out")]) == 0
    assert sorted(spec.split.split_names([])) == sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir())


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    options = {
        "build": ["--out", "--root", "--part", "--workers", "--overwrite", "--dry-run"],
        "merge": ["--out", "--overwrite", "--keep-parts"],
        "verify": [],
        "inspect": ["--sample", "--png"],
    }
    for command, names in options.items():
        text = help_of(capsys, command)
        assert re.findall(r"^  (--[\w-]+)", text, re.MULTILINE) == names


def test_the_help_of_build_teaches_slurm(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, "build")
    array = re.search(r"--array=1-(\d+)", text)
    assert array and f"--part $SLURM_ARRAY_TASK_ID/{array[1]} " in text
    assert "data-shards merge data/liver" in text


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "data-shards build SPEC.yaml" in capsys.readouterr().out


def test_build_verify_and_reuse_say_what_they_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec, out = make_inputs(tmp_path, slices={"min_area": 2}), tmp_path / "out"
    assert main(["build", str(spec), "--out", str(out)]) == 0
    text = capsys.readouterr()
    assert text.err == "" and "dropped 4 targets 'kidney cyst' below min_area" in text.out
    assert text.out.endswith(f"built {out}\n")
    rows = [re.split(r" *│ *", line)[1:-1] for line in text.out.splitlines() if line.startswith("│")]
    assert [row[:5] for row in rows[:2]] == [["test", "12", "12", "2", "1"], ["train", "12", "12", "2", "1"]]
    assert rows[2:] == [["kidney cyst", "0", ""], ["left kidney", "24", "45"]]
    assert re.search(r"^left out: 16 slices without a target", text.out, re.MULTILINE)
    assert re.search(r"^24 slices in 0:00:0\d, [\d,]+/s$", text.out, re.MULTILINE)
    assert main(["build", str(spec), "--out", str(out)]) == 0
    assert capsys.readouterr().out.endswith(f"reused {out}\n")
    assert main(["verify", str(out)]) == 0
    assert re.fullmatch(r"OK: 24 samples, 24 targets in 2 splits, \d\.\d MB at \d+ MB/s\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("expected", "line", "warning"),
    [
        ({"images": 24, "masks": 28}, "expected 24 images, 28 masks: built 24, 28", ""),
        ({"images": 24}, "expected 24 images: built 24", ""),
        (
            {"images": 1076, "masks": 28},
            "expected 1,076 images, 28 masks: built 24, 28",
            "data-shards: warning: expected 1,076 images, 28 masks: built 24 and 28\n",
        ),
    ],
)
def test_what_the_publishers_say_is_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], expected: dict, line: str, warning: str
) -> None:
    spec = make_inputs(tmp_path, expected=expected)
    assert main(["build", str(spec), "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr()
    assert line in text.out.splitlines() and text.err == warning


def test_a_dry_run_shows_the_plan_and_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = make_inputs(tmp_path, cases=8)
    cut(tmp_path / IMAGE)  # not even read
    before = sorted(tmp_path.rglob("*"))
    assert main(["build", str(spec), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    text = capsys.readouterr()
    assert text.err == "" and sorted(tmp_path.rglob("*")) == before
    rows = [re.split(r" *│ *", line)[1:4] for line in text.out.splitlines() if line.startswith("│")]
    assert rows == [["test", "4", "1"], ["train", "4", "1"]]
    assert f"PAT1_scan: patient PAT1\n  image {tmp_path / IMAGE}\n  mask {tmp_path / MASK}\n" in text.out
    assert "… and 3 more cases\n" in text.out and text.out.endswith("nothing was built\n")


def test_finished_blocks_are_announced_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec, out = make_inputs(tmp_path, cases=8, shards={"max_samples": 1}), tmp_path / "out"
    good = (tmp_path / IMAGE).read_bytes()
    cut(tmp_path / IMAGE)
    assert main(["build", str(spec), "--out", str(out), "--workers", "0"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("data-shards: error: ") and IMAGE in first
    found = re.fullmatch(
        r"data-shards: (\d) of 8 blocks are finished and kept in (.*): the same command goes .*", second
    )
    assert found and found[2] == str(tmp_path / ".out.partial") and 1 <= int(found[1]) <= 7
    (tmp_path / IMAGE).write_bytes(good)
    assert main(["build", str(spec), "--out", str(out)]) == 0
    assert f"resumed: {found[1]} of 8 blocks were there\n" in capsys.readouterr().out


def test_parts_and_merge_say_what_they_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec, out = make_inputs(tmp_path), tmp_path / "out"
    for part, text in (("1/3", "12 slices in"), ("2/3", "12 slices in"), ("3/3", "part 3/3 is empty: there are fewer")):
        assert main(["build", str(spec), "--out", str(out), "--part", part]) == 0
        shown = capsys.readouterr()
        assert text in shown.out and shown.err == ""
        assert shown.out.endswith(f"built {out}/parts/{part.replace('/', '-of-')}\n")
    assert main(["build", str(spec), "--out", str(out), "--part", "1/3"]) == 0
    shown = capsys.readouterr().out
    assert "resumed: 1 of 1 blocks were there\n" in shown and shown.endswith(f"reused {out}/parts/1-of-3\n")
    assert complaint(capsys, "build", spec, "--out", out) == (
        f"{out}: holds parts of a build: run `data-shards merge {out}`, or choose another --out"
    )
    assert main(["merge", str(out)]) == 0
    assert capsys.readouterr().out.endswith(f"built {out}\n")
    assert main(["verify", str(out)]) == 0
    assert main(["merge", str(out)]) == 0
    assert capsys.readouterr().out.endswith(f"reused {out}\n")
    assert main(["build", str(spec), "--out", str(out), "--part", "2/3"]) == 0
    assert capsys.readouterr().out == f"reused {out}: the corpus is there already\n"


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail with one line; return the line."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.endswith("\n")
    assert captured.err.startswith("data-shards: error: ") and "Traceback" not in captured.err
    return captured.err.removeprefix("data-shards: error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["biuld", "x"], "unknown command 'biuld'; did you mean 'build'?"),
        (["zzz"], "unknown command 'zzz'; known: build, formats, index, inspect, lint, merge, stats, verify"),
        (["--hepl"], "unknown option '--hepl'; did you mean '--help'?"),
        (["build", "x.yaml", "--ot", "y"], "build: unknown option '--ot'; did you mean '--out'?"),
        (
            ["build", "x.yaml", "--out", "y", "--overwite"],
            "build: unknown option '--overwite'; did you mean '--overwri",
        ),
        (["build", "x.yaml", "--rot=a", "--out=y"], "build: unknown option '--rot'; did you mean '--root'?"),
        (["inspect", "y", "--sampel", "k"], "inspect: unknown option '--sampel'; did you mean '--sample'?"),
        (["verify", "y", "--zzz"], "verify: unknown option '--zzz'; known: --help, -h"),
        (["build", "x.yaml"], "build: --out is missing: the folder of the corpus; see data-shards build --help"),
        (["build", "--out", "y"], "the following arguments are required: SPEC.yaml; see data-shards build --help"),
        (["build", "x.yaml", "--out"], "argument --out: expected one argument; see data-shards build --help"),
        (["verify", "a", "b"], "verify: unexpected 'b'; see data-shards verify --help"),
        (["build", "x", "--out", "y", "--part", "0/8"], "'0/8' is no part: give I/N with I from 1 to N, as 2/8"),
        (["build", "x", "--out", "y", "--part", "9/8"], "argument --part: '9/8' is no part: give I/N"),
        (["build", "x", "--out", "y", "--part", "/8"], "argument --part: '/8' is no part: give I/N"),
        (["build", "x", "--out", "y", "--workers", "-2"], "unknown option '-2'"),
        (["build", "x", "--out", "y", "--workers", "all"], "'all' is no number of processes: give a whole number"),
        (["merge"], "the following arguments are required: DIR; see data-shards merge --help"),
        (["merge", "a", "--keep"], "merge: unknown option '--keep'; did you mean '--keep-parts'?"),
    ],
)
def test_mistakes_in_the_command(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in complaint(capsys, *arguments)


def build_complaint(capsys: pytest.CaptureFixture[str], folder: Path, spec: Path | None = None) -> str:
    line = complaint(capsys, "build", spec or folder / "toy.yaml", "--out", folder / "out")
    assert not (folder / "out").exists() and not list(folder.glob(".*"))
    return line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cases: [\n  - image: a\n", "not valid YAML: while parsing"),
        ("a: b: c\n", "not valid YAML: mapping values are not allowed here"),
        ("\tx: 1\n", "not valid YAML: while scanning"),
        ("", "expected a mapping of keys to values, got None"),
        ("just words\n", "expected a mapping of keys to values, got 'just words'"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (None, "no such spec file"),
    ],
)
def test_files_that_are_no_spec(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | bytes | None, message: str
) -> None:
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert build_complaint(capsys, tmp_path, path).startswith(f"{path}: {message}")
    if content is None:
        assert f"{tmp_path}: cannot be read" in build_complaint(capsys, tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modalty": "CT"}, "unknown key 'modalty'; did you mean 'modality'?"),
        (
            {"intensity": {"kind": "window", "levle": 1, "width": 3}},
            "intensity: unknown key 'levle'; did you mean 'lev",
        ),
        ({"split": {"kind": "slab"}}, "split.kind: unknown kind 'slab'; did you mean 'slabs'?"),
        ({"targets": None}, "the key 'targets' is missing"),
        ({"targets": [{"term": "kidney", "value": 9}]}, "the mask holds none of 'kidney' (its values: 1, 2): "),
        (
            {"split": {"kind": "patients", "fractions": {"train": 0.9, "test": 0.1}}},
            "split 'test' gets none of the 4 p",
        ),
        ({"slices": {"start": 50}}, "got no slice: widen 'slices' or 'split' in the spec"),
        ({"cases": [{"image": "a/{id}.nii", "mask": "{id}", "patient": "{id}"}]}, "no file fits 'a/{id}.nii'"),
    ],
)
def test_mistakes_in_the_spec(tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict, message: str) -> None:
    make_inputs(tmp_path)
    write_spec(tmp_path / "toy.yaml", **changes)
    assert message in build_complaint(capsys, tmp_path)


def nan_volume(path: Path) -> None:
    image = make_case(1)[0].astype(np.float32)
    image[3, 4, 5:7] = np.nan
    save_nifti(path, image)


def flipped_gzip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_shape(path: Path) -> None:
    save_nifti(path, make_case(1)[1][:, 1:])


def empty_mask(path: Path) -> None:
    save_nifti(path, make_case(1)[1] * 0)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (IMAGE, Path.unlink, "no such file: correct the spec or pass --root"),
        (MASK, Path.unlink, "no such file, the mask of "),
        (MASK, other_shape, "shape (10, 23, 20) (z, y, x) differs from (10, 24"),
        (MASK, empty_mask, "the mask holds none of 'left kidney', 'kidney cyst'"),
        (IMAGE, nan_volume, "2 of 4800 voxels are NaN or infinite: repair the file or leave the case out"),
        (IMAGE, flipped_gzip, "cannot be read, is it complete?"),
        (IMAGE, cut, "cannot be read, is it complete? (EOFError: Compressed file ended"),
        (MASK, cut, "cannot be read, is it complete?"),
        (IMAGE, lambda path: path.write_bytes(b""), "cannot be read, is it complete?"),
        (IMAGE, lambda path: path.write_text("hello"), "cannot be read, is it complete?"),
    ],
)  # fmt: skip
def test_bad_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Callable[[Path], object], message: str
) -> None:
    cases = [
        {"image": f"imgs/PAT{n}_scan.nii.gz", "mask": f"gts/PAT{n}_scan_seg.nii.gz", "patient": f"{n}"}
        for n in range(2)
    ]
    make_inputs(tmp_path, cases=2)
    write_spec(tmp_path / "toy.yaml", cases=cases, split={"kind": "external"})  # one block
    damage(tmp_path / name)
    line = build_complaint(capsys, tmp_path)
    assert str(tmp_path / name) in line and message in line


@pytest.mark.parametrize("which", ["image", "mask"])
def test_corrupt_npz(tmp_path: Path, capsys: pytest.CaptureFixture[str], which: str) -> None:
    image, labels = make_case(0)
    np.savez(tmp_path / "image.npz", imgs=image)
    np.savez_compressed(tmp_path / "mask.npz", gts=labels)
    case = {"image": "image.npz", "mask": "mask.npz", "patient": "p"}
    write_spec(tmp_path / "toy.yaml", cases=[case], split={"kind": "slabs", "thickness": 5})
    path = tmp_path / f"{which}.npz"
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[150] ^= 0xFF
    for content in (bytes(flipped), data[: len(data) // 2], b"PK\x03\x04", b""):
        path.write_bytes(content)
        assert build_complaint(capsys, tmp_path).startswith(f"{path}: cannot be read, is it complete?")


def test_unwritable_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = make_inputs(tmp_path)
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    assert complaint(capsys, "build", spec, "--out", out) == (
        f"{out}: cannot be written (Not a directory): choose another --out"
    )
    assert complaint(capsys, "build", spec, "--out", tmp_path / "imgs").endswith(
        "imgs: exists and is no corpus: choose another --out"
    )
    missing = tmp_path / "none"
    assert f"{missing}: no such folder: correct --root" in complaint(
        capsys, "build", spec, "--out", tmp_path / "out", "--root", missing
    )


def test_a_folder_that_may_not_be_entered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_inputs(tmp_path)

    def refuse(*_: object) -> bool:
        raise PermissionError(13, "Permission denied", str(tmp_path / "out"))

    monkeypatch.setattr(Path, "exists", refuse)  # as root, no folder refuses
    assert complaint(capsys, "build", spec, "--out", tmp_path / "out").startswith(
        f"{tmp_path / 'out'}: permission denied"
    )


def test_a_corrupt_shard(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, index = corpus / "train" / "shard-000000.tar", Index.load(corpus / "train")
    with path.open("r+b") as file:
        file.seek(index.members(0)["image.png"][0] + 1)
        file.write(b"\x00\x00\x00")
    expected = f"{path}: sample '{index.key(0)}' is damaged, its bytes changed since the build: run `data-shards verify"
    assert expected in complaint(capsys, "inspect", corpus)
    assert expected in complaint(capsys, "inspect", corpus, "--sample", index.key(0))
    assert main(["verify", str(corpus)]) == 2
    text = capsys.readouterr()
    assert re.match(r"2 problems in 39|2 problems in 40", text.out) and text.err.count("\n") == 2
    assert all(line.startswith(f"data-shards: problem: {path}: ") for line in text.err.splitlines())


def test_one_problem_is_no_plural(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (corpus / "train" / "notes.txt").touch()
    assert main(["verify", str(corpus)]) == 2
    assert capsys.readouterr().out.startswith("1 problem in 40 samples, 28 targets in 2 splits, ")
    assert Verification(samples=1, targets=1, splits=1).summary().startswith("1 sample, 1 target in 1 split, ")


def test_thousands_of_problems_are_not_all_printed(
    corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_shards.cli._MOST_PROBLEMS", 5)
    (corpus / "train" / "shard-000000.tar").write_bytes(b"")
    assert main(["verify", str(corpus)]) == 2
    text = capsys.readouterr()
    assert text.out.startswith("22 problems in ")
    assert len(text.err.splitlines()) == 6 and text.err.endswith("… and 17 more\n")


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_no_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    expected = "no corpus here (manifest.json or index.npz): run `data-shards build`"
    assert complaint(capsys, command, tmp_path) == f"{tmp_path}: {expected}"
    (tmp_path / "file").touch()
    assert complaint(capsys, command, tmp_path / "file").startswith(f"{tmp_path / 'file'}: is a file: name the folder")
    assert complaint(capsys, command, tmp_path / "none").startswith(f"{tmp_path / 'none'}: no such folder: name the")
    (tmp_path / "manifest.json").write_text("{")
    assert complaint(capsys, command, tmp_path).startswith(f"{tmp_path / 'manifest.json'}: damaged manifest")


def shell(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_shards.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_the_real_process(tmp_path: Path) -> None:
    spec, out = make_inputs(tmp_path, cases=2), tmp_path / "out"
    done = shell("build", spec, "--out", out)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith(f"built {out}\n")
    assert shell("verify", out).returncode == 0
    cut(tmp_path / IMAGE)
    write_spec(spec, split={"kind": "external"})
    failed = shell("build", spec, "--out", tmp_path / "other")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert re.fullmatch(r"data-shards: error: .*PAT1_scan\.nii\.gz: cannot be read, .*\n", failed.stderr)
    wrong = shell("inspct", out)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "data-shards: error: unknown command 'inspct'; did you mean 'inspect'?\n"
