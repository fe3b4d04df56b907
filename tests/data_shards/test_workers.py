from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tasks

from data_shards.errors import UserError
from data_shards.workers import run


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.02)


def alive(process: int) -> bool:
    """Whether a process runs; one that ended and was not yet waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_task_is_done_once_and_counted(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    shown: list[tuple[int, int, int]] = []
    run(tasks.note, [(tmp_path, str(n), 0.01) for n in range(7)], workers, lambda *now: shown.append(now))
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(n) for n in range(7)]
    assert shown == sorted(shown) and shown[-1] == (7, 140, 14)
    done = [path.read_text().split() for path in tmp_path.iterdir()]
    here = str(os.getpid())
    if workers <= 1:
        assert {process for process, _ in done} == {here}
    else:
        assert here not in {process for process, _ in done}
        assert {int(threads) for _, threads in done} == {max(1, len(os.sched_getaffinity(0)) // 3)}


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        (tasks.fail, OSError, "No space left"),
        (tasks.die, UserError, "a worker process was killed, most likely for want"),
    ],
)
def test_what_one_worker_meets_ends_the_others_at_once(
    tmp_path: Path, task: Callable[..., None], error: type[Exception], message: str
) -> None:
    (tmp_path / "others").mkdir()
    start = time.monotonic()
    with pytest.raises(error, match=message):
        run(
            tasks.either,
            [(tmp_path / "others", "long", 60.0), (tmp_path / "others", task.__name__, 0.0)],
            2,
            lambda *_: None,
        )
    assert time.monotonic() - start < 30
    for path in (tmp_path / "others").iterdir():
        wait_for(lambda path=path: not alive(int(path.read_text().split()[0])))


PROGRAM = """
import sys, tasks
from pathlib import Path
from data_shards.workers import run

if __name__ == "__main__":
    def stop(*_):
        sys.exit(143)
    import signal
    signal.signal(signal.SIGTERM, stop)
    run(tasks.note, [(Path(sys.argv[1]), str(n), 60.0) for n in range(2)], 2, lambda *_: None)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("group", [False, True])
def test_workers_end_with_their_parent(tmp_path: Path, number: int, group: bool) -> None:
    """A scheduler signals every process of a job, a terminal every process in the foreground, `kill` only one."""
    notes = tmp_path / "notes"
    notes.mkdir()
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), str(notes)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_for(lambda: len(list(notes.iterdir())) == 2 and all(path.read_text() for path in notes.iterdir()))
    workers = [int(path.read_text().split()[0]) for path in notes.iterdir()]
    assert all(map(alive, workers)) and len(set(workers)) == 2
    start = time.monotonic()
    (os.killpg if group else os.kill)(process.pid, number)
    process.wait(30)
    assert time.monotonic() - start < 10
    codes = {signal.SIGTERM: {143}, signal.SIGINT: {1, -2, 130}, signal.SIGKILL: {-9}}
    assert process.returncode in codes[signal.Signals(number)]
    for worker in workers:
        wait_for(lambda worker=worker: not alive(worker), 5)
    errors = process.communicate()[1]
    assert "Broken" not in errors and "a worker process was killed" not in errors


HANDS_OVER = """
import os, signal, sys, time
from data_shards.workers import settle

parent = os.getpid()
if os.fork():
    time.sleep(float(sys.argv[1]))
    os.kill(parent, signal.SIGKILL)
settle(0)
sys.excepthook(EOFError, EOFError("handed to nobody"), None)
"""


@pytest.mark.parametrize(("seconds", "shown"), [("0.2", False), ("3", True)])
def test_a_worker_says_nothing_when_its_parent_was_killed(seconds: str, shown: bool) -> None:
    """A batch that nobody takes any more is an error of a worker whose parent lives."""
    done = subprocess.run([sys.executable, "-c", HANDS_OVER, seconds], capture_output=True, text=True, timeout=30)
    assert done.returncode == -signal.SIGKILL
    assert ("handed to nobody" in done.stderr) == shown
