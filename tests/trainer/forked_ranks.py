"""Ranks of one machine, each a process that is forked from this one: nothing is imported again."""

from __future__ import annotations

import io
import os
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from object_sets import free_port


def _rank(rank: int, target: Callable[..., None], port: int, options: dict[str, Any]) -> None:
    """Be a rank: Lightning takes processes that its environment names as started by others."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK="0", LOCAL_RANK=str(rank))
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        target(**options)


def run(target: Callable[..., None], root: Path, ranks: int = 1, dies: bool = False, **options: Any) -> None:
    """Run something on some ranks.

    Args:
        target: What each of them does.
        root: Folder of the run.
        ranks: How many.
        dies: Whether they are to be killed.
        options: Of the target, besides ``root`` and ``ranks``.

    Raises:
        torch.multiprocessing.ProcessRaisedException: A rank broke down.
    """
    root.mkdir(parents=True, exist_ok=True)
    options |= {"root": str(root), "ranks": ranks}
    context = torch.multiprocessing.start_processes(
        _rank, (target, free_port(), options), nprocs=ranks, join=False, start_method="fork"
    )
    assert context is not None
    deadline = time.monotonic() + 240
    try:
        while not dies and not context.join(timeout=1):
            assert time.monotonic() < deadline, "the ranks hang"
        while dies and all(process.is_alive() for process in context.processes):
            assert time.monotonic() < deadline, "nobody died"
            time.sleep(0.01)
    finally:
        for process in context.processes:
            if dies:
                process.join(0.5)  # they meet the same moment
            process.kill()
            process.join()
    if dies:
        assert -signal.SIGKILL in [process.exitcode for process in context.processes]
