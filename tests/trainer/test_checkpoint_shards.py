"""Checkpoints of several ranks: what any number of ranks loads is what was saved, bit by bit."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_ranks import Network, beside_main, content_of, fail_main, load_main, optimizer_of, save_main, train
from gradient_ranks import free_port
from one_line import message
from safetensors import safe_open
from torch import Tensor

from trainer.checkpoints import is_complete, load_sharded, outline, read, verify, write

LEARNING = {"first.weight", "first.bias", "last.weight", "last.bias", "unreached.weight", "unreached.bias"}
ORDER = ["unreached.weight", "unreached.bias", "last.weight", "last.bias", "first.weight", "first.bias"]


def spawn(main: Any, ranks: int, *arguments: Any) -> None:
    torch.multiprocessing.start_processes(
        main, (ranks, free_port(), *arguments), nprocs=ranks, start_method="fork", join=True
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two ranks, of two times two, and of one process as a file."""
    root = tmp_path_factory.mktemp("shards")
    for name, ranks, copies in (("two", 2, 1), ("grid", 4, 2)):
        (root / name).mkdir()
        spawn(save_main, ranks, copies, str(root / name))
    network = Network(0)
    optimizer = optimizer_of(network)
    train(network, optimizer, 2)
    content = {**content_of(network, optimizer), "optimizer_states": [optimizer.state_dict()]}
    write(content, root / "one.ckpt")
    return root


@pytest.fixture(scope="module")
def loaded(folder: Path) -> dict[str, dict[str, Any]]:
    """What ranks have after loading, by case."""
    two, grid, one = (str(folder / name) for name in ("two/step-000002.ckpt", "grid/step-000002.ckpt", "one.ckpt"))
    (folder / "loaded").mkdir()
    four = {"two at 4": (two, 1), "trained, two at 2x2": (two, 2), "grid at 4": (grid, 1), "file at 4": (one, 1)}
    for ranks, cases in ((1, {"two at 1": (two, 1)}), (4, four)):
        spawn(load_main, ranks, cases, str(folder / "loaded"))
    return {path.stem: torch.load(path) for path in (folder / "loaded").iterdir()}


def same(found: Any, expected: Any, where: str = "") -> None:
    """Check that two trees are equal, tensors bit by bit and in type."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            same(found[key], value, f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, value in enumerate(expected):
            same(found[number], value, f"{where}/{number}")
    elif isinstance(expected, Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), where
    else:
        assert found == expected, where


def by_numbers(state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's state by names, by the numbers that one process gives."""
    numbers = {name: number for number, name in enumerate(ORDER)}
    return {
        "state": {numbers[name]: kept for name, kept in state["state"].items()},
        "param_groups": [
            {**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]
        ],
    }


@pytest.mark.parametrize("name", ["two", "grid"])
def test_one_process_reads_what_ranks_saved(folder: Path, name: str) -> None:
    path = folder / name / "step-000002.ckpt"
    saved = torch.load(folder / name / "saved.pt")
    assert saved["average"]["weights"].keys() == LEARNING
    assert saved["optimizer_states"][0]["state"].keys() == LEARNING - {"unreached.weight", "unreached.bias"}
    found = read(path)
    saved["optimizer_states"] = [by_numbers(state) for state in saved["optimizer_states"]]
    assert found.pop("loops") == saved.pop("loops") == {"seen": (1, [2, None])}
    same(found, saved)
    assert saved["state_dict"]["seen"] == 2  # not what was trained while it was written

    network = Network(9)
    network.load_state_dict(found["state_dict"])
    optimizer = optimizer_of(network)
    optimizer.load_state_dict(found["optimizer_states"][0])
    assert optimizer.state[network.last.weight]["exp_avg"].equal(saved["optimizer_states"][0]["state"][2]["exp_avg"])
    assert [group["layer"] for group in optimizer.param_groups] == ["top", "bottom"]


@pytest.mark.parametrize("case", ["two at 1", "two at 4", "trained, two at 2x2", "grid at 4"])
def test_ranks_load_what_other_ranks_saved(folder: Path, loaded: dict[str, dict[str, Any]], case: str) -> None:
    saved = torch.load(folder / ("grid" if case.startswith("grid") else "two") / "saved.pt")
    now, rest = loaded[case]["now"], loaded[case]["rest"]
    for key in ("state_dict", "optimizer_states"):
        same(now[key], saved[key], key)
        assert key not in rest
    same(rest, {key: saved[key] for key in ("average", "global_step", "loops")})
    assert loaded[case]["sharded"]


def test_ranks_load_a_file_of_one_process(folder: Path, loaded: dict[str, dict[str, Any]]) -> None:
    saved, now = read(folder / "one.ckpt"), loaded["file at 4"]["now"]
    same(now["state_dict"], dict(saved["state_dict"]))
    states = [by_numbers(state) for state in now["optimizer_states"]]
    assert states[0]["state"].keys() == saved["optimizer_states"][0]["state"].keys() == {2, 3, 4, 5}
    same(states[0]["state"], saved["optimizer_states"][0]["state"])
    lines = [[{**group, "params": sorted(group["params"])} for group in state["param_groups"]] for state in states]
    assert lines == [saved["optimizer_states"][0]["param_groups"]]


def test_all_go_on_alike(folder: Path, loaded: dict[str, dict[str, Any]]) -> None:
    found = read(folder / "two" / "step-000002.ckpt")
    network = Network(9)
    network.load_state_dict(found["state_dict"])
    optimizer = optimizer_of(network)
    optimizer.load_state_dict(found["optimizer_states"][0])
    before = network.last.weight.detach().clone()
    train(network, optimizer, 1)
    assert (network.last.weight - before).abs().max() > 1e-3
    for case in loaded:
        for name, tensor in network.state_dict().items():
            torch.testing.assert_close(loaded[case]["next"][name], tensor, rtol=1e-6, atol=1e-7, msg=f"{case} {name}")


def test_what_lies_in_a_folder(folder: Path) -> None:
    path = folder / "two" / "step-000002.ckpt"
    assert {file.name for file in path.iterdir()} == {
        "complete.json",
        "state.pt",
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    }
    assert is_complete(path) and not (path / ".metadata").exists()
    mark = verify(path)
    assert mark is not None and mark.step == 2
    assert {file.name for file in (folder / "two").iterdir()} == {"step-000002.ckpt", "saved.pt"}
    with safe_open(path / "shard-00001.safetensors", "pt") as shard:  # any tool reads them
        saved = torch.load(folder / "two" / "saved.pt")
        assert shard.get_tensor("state_dict/first.weight").equal(saved["state_dict"]["first.weight"][4:])


def test_copies_write_each_part_once(folder: Path) -> None:
    path = folder / "grid" / "step-000002.ckpt"
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) == 4
    kept = 0
    for file in shards:
        with safe_open(file, "pt") as shard:
            kept += sum(shard.get_tensor(name).numel() for name in shard.keys())  # noqa: SIM118
    sharded = torch.load(folder / "grid" / "saved.pt")
    weights = sum(tensor.numel() for name, tensor in sharded["state_dict"].items() if name != "seen")
    states = sharded["optimizer_states"][0]["state"].values()
    others = sum(state[name].numel() for state in states for name in ("exp_avg", "exp_avg_sq"))
    assert kept == weights + others + sum(tensor.numel() for tensor in sharded["average"]["weights"].values())


def test_an_outline_has_no_content(folder: Path) -> None:
    found = outline(folder / "two" / "step-000002.ckpt")
    weight = found["state_dict"]["first.weight"]
    assert weight.is_meta and weight.shape == (7, 6) and found["state_dict"]["seen"] == 2
    assert found["loops"] == {"seen": (1, [2, None])}


def test_a_write_in_the_main_thread_does_not_meet_one_in_the_background(tmp_path: Path) -> None:
    """As of a checkpoint callback of Lightning's own, which a recipe may name."""
    spawn(beside_main, 2, str(tmp_path))
    beside, alone = read(tmp_path / "beside.ckpt"), read(tmp_path / "main.ckpt")
    assert beside["global_step"] == 2 and "global_step" not in alone
    same(beside["state_dict"], alone["state_dict"])


def test_a_write_that_fails_on_one_rank_fails_on_all(tmp_path: Path) -> None:
    spawn(fail_main, 2, str(tmp_path))
    told = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    first, second = ([re.sub(r"[\d,]+ are free", "", line) for line in lines] for lines in told)
    assert first == second and len(first) == 4
    assert all("No space left on device" in line and "step-000002.ckpt" in line and "\n" not in line for line in first)
    assert {file.name for file in tmp_path.iterdir()} - {"step-000002.ckpt.json.next"} == {
        "step-000002.ckpt",
        "step-000002.ckpt.json",
        "rank0.pt",
        "rank1.pt",
    }


def test_one_process_loads_a_folder_into_its_module(folder: Path) -> None:
    saved = torch.load(folder / "two" / "saved.pt")
    network = Network(9)
    optimizer = optimizer_of(network)
    rest = load_sharded(folder / "two" / "step-000002.ckpt", network, [optimizer])
    same(dict(network.state_dict()), saved["state_dict"])
    expected = by_numbers(saved["optimizer_states"][0])
    same(optimizer.state_dict()["state"], expected["state"])
    assert rest["average"]["weights"]["last.bias"].equal(saved["average"]["weights"]["last.bias"])
    weights_alone = Network(7)
    assert "optimizer_states" not in load_sharded(folder / "two" / "step-000002.ckpt", weights_alone)
    same(dict(weights_alone.state_dict()), saved["state_dict"])


def test_another_model_or_optimiser_is_refused(folder: Path) -> None:
    for path in (folder / "two" / "step-000002.ckpt", folder / "one.ckpt"):
        network = Network(9)
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        network.more = torch.nn.Linear(1, 1)
        assert "of another model or tuning than the recipe's: more.bias, more.weight" in message(
            partial(load_sharded, path, network)
        )
        del network.more
        one_group = torch.optim.AdamW(network.parameters())
        assert "groups of [4, 2] parameters, the recipe's of [8]" in message(
            partial(load_sharded, path, network, [one_group])
        )
        assert "1 optimisers, the recipe 2" in message(
            partial(load_sharded, path, network, [optimizer_of(network), one_group])
        )
        same(dict(network.state_dict()), before)
    other = optimizer_of(network)
    other.param_groups[0]["params"][0], other.param_groups[1]["params"][0] = network.first.weight, network.last.weight
    assert "groups differ from the recipe's: first.weight" in message(
        partial(load_sharded, folder / "two" / "step-000002.ckpt", network, [other])
    )
