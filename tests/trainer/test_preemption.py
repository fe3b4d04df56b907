"""Runs that are preempted, and ranks that hang: on real processes, as torchrun and srun start them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))  # as the processes that run the commands have it

from corpus import write_recipe
from harness import Lane, Variant, compare, environment, finish, lane, left_by, wait_for

from trainer.callbacks import roll_call
from trainer.callbacks.roll_call import Home, Place, RollCall

TWO = Variant("DDP, 2 ranks", ranks=2)
LIMIT = 12.0
"""Seconds after which a rank that hangs is given up in these tests."""
_EMA: dict[str, Any] = {"class_path": "trainer.callbacks.EMA", "init_args": {"decay": 0.9}}
_BEAT: dict[str, Any] = {"class_path": "trainer.callbacks.Heartbeat", "init_args": {"minutes": LIMIT / 60}}
WATCHED = Variant("watched", ranks=2, options=(("trainer.callbacks", [_EMA, _BEAT]),))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lane]:
    with lane(tmp_path_factory.mktemp("preemption")) as made:
        yield made
        made.anew()  # what hangs is ended


@pytest.mark.parametrize("how", ["srun", "torchrun"])
def test_sigusr1_at_one_rank_stops_all_and_the_run_goes_on(place: Lane, how: str) -> None:
    place.undisturbed(TWO)
    place.anew()
    processes = place.start(TWO, how=how)
    wait_for(processes[0], place.root, 5)
    processes[1].signal(signal.SIGUSR1)
    ended = finish(processes)
    ended.check_quiet()
    assert set(ended.codes) == {143}, ended.lines
    assert [line for line in ended.lines if line.startswith("stopped by SIGUSR1 at step")], ended.lines
    assert not list(place.root.rglob("hpc_*")), "Lightning's own checkpoint, written inside of the signal"
    assert not [line for line in ended.lines if "scontrol" in line or "requeu" in line.lower()]
    place.go_on(TWO)


def test_a_rank_that_is_stopped_is_named_within_the_timeout(place: Lane) -> None:
    place.anew()
    first, second = place.start(WATCHED)
    wait_for(first, place.root, 5)
    second.signal(signal.SIGSTOP)
    assert first.wait(120) == 2, first.said
    (line,) = [line for line in first.said.splitlines() if line.startswith("trainer: error: ")]
    assert line.startswith(f"trainer: error: rank 1 on {socket.gethostname()} is silent"), line
    assert "Traceback" not in first.said


def test_torchrun_starts_a_killed_rank_again_and_the_run_ends_as_undisturbed(place: Lane, tmp_path: Path) -> None:
    place.undisturbed(TWO)
    place.anew()
    recipe = write_recipe(tmp_path / "recipe.yaml", TWO.recipe(place.shards, place.root))
    fault = {"at": "hook", "hook": "on_train_batch_start", "step": 7, "nth": 1, "do": "kill"}
    fault["log"] = str(tmp_path / "struck.txt")
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, os, sys\n"
        'if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):\n'
        "    from inject import install\n"
        f"    install(json.loads({json.dumps(fault)!r}))\n"
        "from trainer.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    command += ["--standalone", str(worker)]
    done = subprocess.run(
        [*command, "fit", "-c", str(recipe), "--ckpt_path", "last"],
        # without the last one the new ranks find the addresses of the old ones in torchrun's store (torch 2.14)
        env={**environment(), "GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    assert "going on from" in said
    compare(left_by(place.root), place.expected[TWO.name])


@pytest.fixture
def roll(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[RollCall]]:
    """Some ranks of one process: what they agree on is what the first one says."""

    def make(homes: list[Home]) -> list[RollCall]:
        agreed: dict[int, Any] = {}
        calls = [0]

        def every_rank(part: Any) -> list[Any]:
            calls[0] += 1
            if isinstance(part, Home):
                return homes
            if isinstance(part, tuple):
                return [agreed.setdefault(0, part)]
            return [part]

        monkeypatch.setattr(roll_call, "every_rank", every_rank)
        return [RollCall(rank, "127.0.0.1") for rank in range(len(homes))]

    return make


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_roll_names_who_is_silent_behind_or_left(roll: Callable[..., list[RollCall]]) -> None:
    ranks = roll([Home(f"node{rank}", "", 1) for rank in range(4)])
    assert all(each.works for each in ranks)

    def beat(count: int = 1) -> None:
        for _ in range(count):
            ranks[0].beat(Place(9, 3, "waiting"), ask=True)
            ranks[1].beat(Place(7, 3, "loading"))
            time.sleep(0.05)  # packets take a moment

    ranks[2].beat(Place(9, 3, "waiting"))
    ranks[3].beat(Place(9, 3, "waiting", left=True))
    beat(8)
    seen = {one.rank: one for one in ranks[0].board}
    assert seen[2].silent and not seen[1].silent and not seen[0].silent
    assert [one.rank for one in ranks[0].board] == [2, 1, 0], "the silent first, then those behind"
    assert ranks[0].left == {3}

    def answered() -> bool:
        ranks[1].beat(Place(8, 3, "loading"), ask=True)
        return {one.rank for one in ranks[1].board if one.silent} == {2} and ranks[1].left == {3}

    wait_until(answered)


def test_a_stranger_s_packet_changes_nothing(roll: Callable[..., list[RollCall]]) -> None:
    first, second = roll([Home("a", "", 1), Home("b", "", 1)])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        for packet in (b"\xff", b"[]", b"{}", json.dumps(["token", 1, True, 99, 0, "x", True]).encode()):
            stranger.sendto(packet, first._first)

    def answered() -> bool:
        first.beat(Place(1), ask=True)
        second.beat(Place(2, 0, "here"), ask=True)
        return any(one.place.doing == "here" for one in first.board) and second.answered == second.beats

    wait_until(answered)
    assert first.left == set()


def test_processes_of_this_machine_are_seen_to_end(roll: Callable[..., list[RollCall]]) -> None:
    here = Home.here()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    first, _, _ = roll([here, Home(here.host, here.space, child.pid), Home("elsewhere", here.space, 2**22 + 1)])
    assert first.gone() == []
    child.kill()
    wait_until(lambda: first.gone() == [1])  # not yet waited for: a zombie
    child.wait()
    assert first.gone() == [1]
    assert os.getpid() == here.pid
