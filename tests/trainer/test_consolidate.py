"""`trainer consolidate`: one file of what ranks wrote."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_ranks import Network, optimizer_of, save_main
from checkpoint_samples import files_of
from gradient_ranks import free_port

from trainer.checkpoints import read, verify, write
from trainer.cli import main
from trainer.restore import read_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks, whose newest checkpoint is a folder."""
    run = tmp_path_factory.mktemp("run")
    (run / "checkpoints").mkdir()
    (run / "recipe.yaml").touch()
    torch.multiprocessing.start_processes(
        save_main, (2, free_port(), 1, str(run / "checkpoints")), nprocs=2, start_method="fork"
    )
    return run


def test_one_process_goes_on_from_the_file(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "one.ckpt"
    assert main(["consolidate", str(source), "--out", str(out)]) == 0
    assert f"{out}: 0.0 MB, from {source / 'checkpoints' / 'step-000002.ckpt'}" in capsys.readouterr().out
    assert out.is_file() and verify(out) is not None
    saved = torch.load(source / "checkpoints" / "saved.pt")
    found = read_checkpoint(out)
    assert found["state_dict"].keys() == saved["state_dict"].keys()
    assert all(found["state_dict"][name].equal(tensor) for name, tensor in saved["state_dict"].items())
    assert found["average"]["steps"] == 2 and found["loops"] == saved["loops"] and found["global_step"] == 2
    average = found["average"]["weights"]
    assert all(average[name].equal(tensor) for name, tensor in saved["average"]["weights"].items())

    network = Network(9)
    network.load_state_dict(found["state_dict"])
    optimizer = optimizer_of(network)
    optimizer.load_state_dict(found["optimizer_states"][0])
    names = {name: parameter for name, parameter in network.named_parameters() if parameter in optimizer.state}
    expected = saved["optimizer_states"][0]["state"]
    assert names.keys() == expected.keys() == {"first.weight", "first.bias", "last.weight", "last.bias"}
    for name, parameter in names.items():
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert optimizer.state[parameter][key].equal(expected[name][key]), (name, key)
    assert torch.load(out, weights_only=True)["state_dict"]["first.weight"].equal(found["state_dict"]["first.weight"])


def test_where_the_file_goes(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = source / "checkpoints" / "step-000002.ckpt"
    link = source / "checkpoints" / "last.ckpt"
    link.symlink_to(path.name)
    for named in (path, link):
        assert main(["consolidate", str(named)]) == 0
        out = path.with_name("step-000002-consolidated.ckpt")
        verify(out)
        for file in files_of(out):
            file.unlink()


def test_a_damaged_checkpoint_is_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "recipe.yaml").touch()
    paths = [tmp_path / "checkpoints" / f"step-{step:06d}.ckpt" for step in (1, 2)]
    for path in paths:
        shutil.copytree(source / "checkpoints" / "step-000002.ckpt", path)
    shard = paths[1] / "shard-00000.safetensors"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert main(["consolidate", str(paths[1])]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{shard}: damaged" in said
    out = tmp_path / "one.ckpt"
    assert main(["consolidate", str(tmp_path), "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert f"{paths[0]} is taken instead" in captured.err and f"from {paths[0]}" in captured.out
    assert read(out)["global_step"] == 2


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = tmp_path / "one.ckpt"
    write({"state_dict": {}, "global_step": 1}, one)
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").touch()
    cases = {
        (str(one),): "is one file already",
        (str(one), "--out", str(tmp_path / "x.pt")): "ends in .ckpt",
        (str(one), "--out", str(one)): "the checkpoint itself",
        (str(one), "--out", str(tmp_path / "y.ckpt")): None,
        (str(tmp_path / "none"),): "no such run or checkpoint",
        (str(run),): "has no complete checkpoint",
        (str(one), "--uot", "x"): "did you mean '--out'",
        (): "RUN_OR_CHECKPOINT",
    }
    for arguments, expected in cases.items():
        code = main(["consolidate", *arguments])
        said = capsys.readouterr().err
        assert (code, said) == (0, "") if expected is None else (code == 2 and expected in said), said
    torch.save({"state_dict": {}, "global_step": 1}, run / "unmarked.ckpt")
    (run / "checkpoints").mkdir()
    (run / "unmarked.ckpt").rename(run / "checkpoints" / "last.ckpt")  # as an older trainer left it
    assert main(["consolidate", str(run), "--out", str(tmp_path / "z.ckpt")]) == 0


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["consolidate", "--help"]) == 0
    assert "trainer consolidate runs/organs" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert "  consolidate  make one file of a checkpoint" in capsys.readouterr().out
