"""Worker processes that end with their parent, however it ends.

Nothing heavy is imported here: a worker sets its number of threads before any library counts the CPUs.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from data_shards.errors import UserError

Report = Callable[[int, int], None]
"""Called by a task with what it has done so far: bytes of source files, and slices."""

Show = Callable[[int, int, int], None]
"""Called with what all tasks have done so far: tasks, bytes of source files, and slices."""

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")
_POLL_SECONDS = 0.25
_OUTLIVE_SECONDS = 30
"""Between a SIGTERM and the end of a loader's worker."""
_GONE_SECONDS = 1.0
"""Within which a parent whose connections are closed counts as gone."""

_counts: Any = None
"""In a worker: two numbers for each task, as a `Report` gives them, shared with the parent."""


def cpus() -> int:
    """Return how many CPUs this process may use: on a cluster fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(task: Callable[..., None], arguments: Sequence[tuple[Any, ...]], workers: int, show: Show) -> None:
    """Call a function once for each tuple of arguments.

    Args:
        task: Called as ``task(*arguments, report)``.
        arguments: Of each call.
        workers: Processes that do it; 0 and 1 do it in this one.
        show: Called now and then.

    Raises:
        UserError: A worker was killed. Whatever a task raises is raised here, and ends the others at once.
    """
    if min(workers, len(arguments)) > 1:
        _run_apart(task, arguments, min(workers, len(arguments)), show)
        return
    size = slices = 0
    for number, values in enumerate(arguments):
        before, now = (size, slices), (0, 0)

        def report(done: int, written: int) -> None:
            nonlocal now
            now = done, written
            show(number, before[0] + done, before[1] + written)  # noqa: B023  # called at once

        task(*values, report)
        size, slices = before[0] + now[0], before[1] + now[1]
        show(number + 1, size, slices)


def _run_apart(task: Callable[..., None], arguments: Sequence[tuple[Any, ...]], workers: int, show: Show) -> None:
    context = get_context("spawn")  # a fork of a process with threads may hang
    counts = context.RawArray("q", 2 * len(arguments))
    life, holder = context.Pipe(duplex=False)  # once its other end is closed, by us or by our death, a worker leaves
    start = (life, max(1, cpus() // workers), counts)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=start)
    waiting, running, finished = deque(enumerate(arguments)), set[Future[None]](), 0
    try:
        while waiting or running:
            with _signals_blocked():
                while waiting and len(running) < 2 * workers:  # the next one is there when a worker asks for it
                    number, values = waiting.popleft()
                    running.add(pool.submit(_call, number, task, values))
                    if not waiting:
                        pool.submit(int)  # does nothing, but a pool sees the death only of workers older than this
            done, running = wait(running, _POLL_SECONDS, FIRST_COMPLETED)
            for future in done:
                future.result()
            finished += len(done)
            show(finished, sum(counts[::2]), sum(counts[1::2]))
    except BaseException as error:
        holder.close()
        if isinstance(error, BrokenProcessPool):
            raise UserError(
                "a worker process was killed, most likely for want of memory: run it again with fewer --workers"
            ) from None
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        holder.close()
        life.close()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Start processes that Ctrl-C and SIGTERM do not reach: their parent hears them, and ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def settle(worker: int) -> None:
    """Set up a loader's worker: it outlives SIGTERM for a while, and a parent that is gone without a word.

    Args:
        worker: Its number.
    """
    outlive_sigterm(worker)
    sys.excepthook = partial(_tell, os.getppid(), sys.excepthook)


def _tell(parent: int, usual: Callable[..., None], *error: Any) -> None:
    """Show an error, unless it is that of a parent that was killed while a batch was handed to it.

    Its connections are closed a moment before it counts as gone.
    """
    limit = time.monotonic() + _GONE_SECONDS
    while issubclass(error[0], EOFError | OSError) and time.monotonic() < limit:
        if os.getppid() != parent:
            return
        time.sleep(0.01)
    usual(*error)


def outlive_sigterm(worker: int) -> None:
    """Let a loader's worker live on for a while after SIGTERM, so that its parent can end its step with it.

    Schedulers send it, or SIGUSR1, to every process of a job. A worker that nobody stops ends by itself.

    Args:
        worker: Its number.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: signal.alarm(_OUTLIVE_SECONDS))


def _begin(life: Connection, threads: int, counts: Any) -> None:
    """Set up a worker."""
    global _counts
    _counts = counts
    for name in _THREADS:
        os.environ.setdefault(name, str(threads))
    threading.Thread(target=_end_with, args=(life,), daemon=True).start()


def _end_with(life: Connection) -> None:
    """Wait for the parent's end, and leave."""
    try:
        life.recv_bytes()
    finally:
        os._exit(1)


def _call(number: int, task: Callable[..., None], values: tuple[Any, ...]) -> None:
    """Call a task in a worker."""

    def report(size: int, slices: int) -> None:
        _counts[2 * number], _counts[2 * number + 1] = size, slices

    task(*values, report)
