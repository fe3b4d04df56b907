"""Ranks that meet after every step, as training does, and one of which hangs or is killed: who names whom, and when."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_shards.errors import UserError
from trainer.callbacks import Heartbeat, roll_call
from trainer.callbacks.heartbeat import heartbeat_of

WORLD = 3
LIMIT = 4.0
"""Seconds that the ranks wait for one another."""
HOST = socket.gethostname()


class Ranks:
    """Forked processes that train nothing, and wait for one another by files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.pids = []
        for rank in range(WORLD):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    self._be(rank)
                    code = 0
                finally:
                    os._exit(code)
            self.pids.append(pid)

    def step(self) -> int:
        """The step that all have come to."""
        return len(list(self.folder.glob("met-*-0")))

    def wait_for(self, ready: Callable[[], bool], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < end, [self.said(rank) for rank in range(WORLD)]
            time.sleep(0.01)

    def codes(self, of: list[int], seconds: float = 60) -> list[int]:
        """The exit codes of some ranks, when they have ended."""
        found: dict[int, int] = {}

        def ended() -> bool:
            for rank in of:
                if rank not in found:
                    pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
                    if pid:
                        found[rank] = os.waitstatus_to_exitcode(status)
                        self.pids[rank] = 0
            return len(found) == len(of)

        self.wait_for(ended, seconds)
        return [found[rank] for rank in of]

    def said(self, rank: int) -> str:
        return (self.folder / f"said-{rank}").read_text()

    def end(self) -> None:
        for pid in filter(None, self.pids):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _be(self, rank: int) -> None:
        with (self.folder / f"said-{rank}").open("wb") as output:
            for number in (1, 2):
                os.dup2(output.fileno(), number)
        talks = iter(range(100))
        roll_call.every_rank = lambda part: self._meet(f"talk-{next(talks)}", rank, part)  # type: ignore[assignment]
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        trainer: Any = SimpleNamespace(
            world_size=WORLD,
            global_rank=rank,
            is_global_zero=rank == 0,
            global_step=0,
            strategy=SimpleNamespace(launcher=None),
        )
        module: Any = None
        beat = Heartbeat(LIMIT / 60)
        beat.setup(trainer, module, "fit")
        beat.on_train_start(trainer, module)
        for step in range(1_000_000):
            trainer.global_step = step
            while (self.folder / f"sleep-{rank}").exists():
                time.sleep(0.05)
            beat.on_train_batch_start(trainer, module)
            beat.on_before_backward(trainer, module)
            self._meet(f"met-{step}", rank, None, beat)
            beat.on_train_batch_end(trainer, module)
            if (self.folder / "end").exists() and step > 30:
                break
        beat.teardown(trainer, module, "fit")

    def _meet(self, name: str, rank: int, part: Any, beat: Heartbeat | None = None) -> list[Any]:
        mine = self.folder / f"{name}-{rank}"
        mine.with_name(f"writing-{rank}").write_bytes(pickle.dumps(part))
        mine.with_name(f"writing-{rank}").rename(mine)
        others = [self.folder / f"{name}-{other}" for other in range(WORLD)]
        while not all(other.exists() for other in others):
            time.sleep(0.005)
            if beat is not None and (self.folder / "broken").exists():  # what a connection would tell
                trainer: Any = None
                beat.on_exception(trainer, trainer, RuntimeError())
                os.write(1, str(beat.lost()).encode())
                beat.leave()
                os._exit(2)
        return [pickle.loads(other.read_bytes()) for other in others]


@pytest.fixture
def ranks(tmp_path: Path) -> Any:
    made = Ranks(tmp_path / "ranks")
    try:
        made.wait_for(lambda: made.step() > 5)
        yield made
    finally:
        made.end()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped_is_named_once_within_the_timeout(ranks: Ranks, rank: int) -> None:
    os.kill(ranks.pids[rank], signal.SIGSTOP)
    started = time.monotonic()
    others = [other for other in range(WORLD) if other != rank]
    assert ranks.codes(others) == [2, 2]
    assert time.monotonic() - started > LIMIT / 2
    assert ranks.said(others[1]) == "", "one line for all"
    line = ranks.said(others[0])
    assert line.startswith(f"trainer: error: rank {rank} on {HOST} is silent: ") and line.count("\n") == 1, line
    assert "--ckpt_path last" in line and "waited 4 s at step" in line


def test_a_rank_that_is_alive_and_behind_is_named_with_its_place(ranks: Ranks) -> None:
    (ranks.folder / "sleep-1").touch()
    assert ranks.codes([0, 2]) == [2, 2]
    assert f"rank 1 on {HOST} is still between two batches (step " in ranks.said(0)
    assert ranks.said(2) == "", "nobody else is named"


def test_a_rank_that_is_killed_is_named_by_those_that_lose_it(ranks: Ranks) -> None:
    os.kill(ranks.pids[1], signal.SIGKILL)
    (ranks.folder / "broken").touch()
    assert ranks.codes([0, 1, 2], seconds=20) == [2, -signal.SIGKILL, 2]
    assert ranks.said(0).startswith(f"rank 1 on {HOST} is gone")
    assert f"rank 1 on {HOST}" in ranks.said(2)


def test_ranks_that_are_suspended_together_go_on(ranks: Ranks) -> None:
    for pid in ranks.pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(LIMIT + 1)
    for pid in ranks.pids:
        os.kill(pid, signal.SIGCONT)
    step = ranks.step()
    ranks.wait_for(lambda: ranks.step() > step + 5)
    (ranks.folder / "end").touch()
    assert ranks.codes([0, 1, 2]) == [0, 0, 0]
    assert [ranks.said(rank) for rank in range(WORLD)] == ["", "", ""]


def test_one_rank_needs_none_and_a_time_is_above_zero() -> None:
    beat = Heartbeat()
    trainer: Any = SimpleNamespace(world_size=1, callbacks=[beat])
    beat.setup(trainer, trainer, "fit")
    beat.on_train_start(trainer, trainer)
    assert beat.lost() is None
    beat.teardown(trainer, trainer, "fit")
    assert heartbeat_of(trainer) is beat
    with pytest.raises(UserError, match="minutes 0"):
        Heartbeat(0)
