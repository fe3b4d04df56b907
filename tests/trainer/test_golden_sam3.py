"""Our losses and matchers against recorded outputs of SAM3's, and the script that compares them."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import numpy as np
import object_sets
import pytest
from object_sets import GOLDEN


def test_all_recorded_files_are_here():
    kinds = [path.name[0] for path in sorted((GOLDEN / "sam3").glob("*.npz"))]
    assert {kind: kinds.count(kind) for kind in "abcd"} == {"a": 9, "b": 9, "c": 12, "d": 3} and len(kinds) == 33


ARRAYS = {"a": 4, "b": 4, "c": 80, "d": 76}  # that are compared, at least


@pytest.mark.parametrize("path", sorted((GOLDEN / "sam3").glob("*.npz")), ids=lambda path: path.stem)
def test_matches_values_and_gradients_are_the_official_ones(path):
    check = object_sets.checker()
    found = check.compare(path)
    assert found.unchecked() == []
    assert len(found.errors) >= ARRAYS[path.name[0]] and max(found.errors.values()) < check.BAR, found.errors


def checked(*arguments: str) -> tuple[int, dict[str, Any], str]:
    """Run the checker: its exit code, what its last line says, and the rest of what it wrote."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = object_sets.checker().main(list(arguments))
    lines = out.getvalue().splitlines()
    return code, json.loads(lines[-1]) if lines else {}, err.getvalue()


def test_the_checker_runs_as_a_script_and_reports_the_worst_file(tmp_path):
    names = ["b_o2m_seed0.npz", "d_semseg_seed0.npz"]
    for name in names:
        (tmp_path / name).write_bytes((GOLDEN / "sam3" / name).read_bytes())
    command = [sys.executable, str(GOLDEN / "check.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    found = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and found["files"] == 2 and found["unchecked"] == []
    assert 0 < found["worst_relative_error"] < 1e-6 and found["worst_file"] == names[1]


@pytest.mark.parametrize(
    ("file", "array", "change", "worst"),
    [
        ("b_o2m_seed0", "out_src_idx", lambda found: found[::-1], 1.0),
        ("a_o2o_seed0", "out_src_idx", lambda found: np.roll(found, 1), 1.0),
        ("a_o2o_seed0", "out_cost", lambda found: found * np.float32(1.001), 0.001),
        ("c_loss_seed0", "out_o2m_tgt_idx_l2", lambda found: found[::-1], 1.0),
        ("c_loss_seed0", "out_paper_grad_pred_boxes", lambda found: found * np.float32(1.001), 0.001),
        ("c_loss_seed0", "out_loss_ce_aux_1_o2m", lambda found: found * np.nan, 1.0),
        ("d_semseg_seed0", "out_head1_ploss1_down1_focal1_core_loss", lambda found: found * 2, 0.5),
    ],
)
def test_the_checker_fails_where_an_array_is_off(file, array, change, worst, tmp_path):
    with np.load(GOLDEN / "sam3" / f"{file}.npz") as stored:
        arrays = {name: stored[name] for name in stored.files}
    arrays[array] = np.asarray(change(arrays[array])).copy()
    np.savez(tmp_path / f"{file}.npz", **arrays)
    code, found, _ = checked(str(tmp_path))
    assert code == 1 and found["worst_file"] == f"{file}.npz"
    assert found["worst_relative_error"] == pytest.approx(worst, rel=0.5)
    assert found["worst_array"] == array or worst == 1


def test_the_checker_says_in_one_line_what_it_cannot_read(tmp_path):
    assert "no .npz file" in checked(str(tmp_path))[2]
    with np.load(GOLDEN / "sam3" / "a_o2o_seed0.npz") as stored:
        short = {name: stored[name] for name in stored.files} | {"out_src_idx": np.zeros(3, np.int64)}
    cases: list[tuple[Any, str]] = [
        (b"nonsense", "cannot be read"),
        ({"something": np.zeros(2)}, "unknown layout"),
        ({"something": np.array([{}], dtype=object)}, "cannot be read"),
        ({name: value for name, value in short.items() if name != "out_tgt_idx"}, "out_tgt_idx' is missing"),
        (short, "do not fit"),
    ]
    for content, text in cases:
        if isinstance(content, dict):
            np.savez(tmp_path / "x.npz", **content)
        else:
            (tmp_path / "x.npz").write_bytes(content)
        code, found, said = checked(str(tmp_path))
        assert code == 2 and not found and text in said and len(said.splitlines()) == 1, said
