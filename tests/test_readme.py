"""README.md tells the truth: its tree is the tree, its commands exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from data_shards.spec import load_spec

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()


def tree() -> dict[str, str]:
    """Paths in the README's tree with their purposes."""
    block = README.split("## The tree")[1].split("```")[1]
    found, parents = {}, []
    for line in block.strip("\n").splitlines():
        name, purpose = re.fullmatch(r"\s*(\S+)\s*(.*)", line).groups()
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth:] = [name.rstrip("/")]
        found["/".join(parents)] = purpose
    return found


def test_every_module_is_in_the_tree_and_the_tree_in_the_folders():
    modules = {
        str(path.relative_to(REPOSITORY))
        for root in ("trainer", "data_shards")
        for path in (REPOSITORY / root).rglob("*.py")
        if path.name != "__init__.py"
    }
    told = tree()
    assert {path for path in told if path.endswith(".py")} == modules
    assert all((REPOSITORY / path).exists() for path in told)


def test_every_line_of_the_tree_has_a_purpose():
    bare = {path for path, purpose in tree().items() if not purpose}
    # folders whose files say it all
    assert bare <= {"trainer", "trainer/losses", "trainer/metrics"}


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([a-z-]+)", README))))
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)


def test_named_files_exist():
    for path in set(re.findall(r"(?:recipes|tests|data_shards|trainer)/[\w/.]+\.(?:yaml|py|png)", README)):
        assert (REPOSITORY / path).is_file(), path
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (REPOSITORY / path).is_file(), path


def test_the_specs_shown_are_specs(tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        (tmp_path / "spec.yaml").write_text(block)
        assert load_spec(tmp_path / "spec.yaml").targets


def test_make_alone_says_what_there_is():
    shown = subprocess.run(["make"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert "make quickstart" in shown
    assert "make test" in shown


def test_nothing_in_the_repository_is_tied_to_a_machine_or_a_registry():
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout
    for name in tracked.splitlines():
        path = REPOSITORY / name
        if path.suffix in (".py", ".md", ".yaml", ".toml", "") and path.is_file() and path != Path(__file__):
            text = path.read_text()
            for wrong in ("/work/", "/home/", "/root/", "://pypi", "://download.pytorch", "://registry"):
                assert wrong not in text, f"{name} names {wrong}"


def test_the_matrix_of_exports_is_what_the_gate_wrote():
    """README's rows are the results'; whatever a family can be exported to is there."""
    results = (REPOSITORY / "benchmarks/results/exports.md").read_text()
    written = {tuple(cell.strip() for cell in line.split("|")[1:6]) for line in results.splitlines() if "|" in line}
    matrix = README.partition("<!-- exports -->\n")[2].partition("<!-- /exports -->")[0].splitlines()[2:]
    rows = [tuple(cell.strip() for cell in line.split("|")[1:6]) for line in matrix]
    assert rows and {*rows} <= written
    graphs = {"`onnx`", "`torch-export`"}
    assert {family: {form for own, form, *_ in rows if own == family} for family, *_ in rows} == {
        "litemedsam": {"`litemedsam`", "`monai`", *graphs},
        "medsam": {"`segment-anything`", "`monai`", "`peft`", "`transformers`", *graphs},
        "sam2": {"`sam2`", "`monai`", "`peft`", "`transformers`", *graphs},
        "sam3": {"`sam3`", "`peft`", "`transformers`", *graphs},
    }
    assert all(float(difference) <= 1e-3 for *_, difference in rows)
    assert "FAILED" not in results
    offered = README.partition("| `--to` | what |")[2].partition("\n\n")[0]
    assert {form for _, form, *_ in rows} <= {*re.findall(r"^\| (`[a-z0-9-]+`)", offered, re.MULTILINE)}
